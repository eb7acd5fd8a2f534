"""Checks the demo's parts, and runs a very small demo from start to end. `make demo` runs the whole one."""

import pathlib
import re
import subprocess
import sys

import pytest
import torch

from demo import data, model, processes, report


def write_sources(folder, count=400):
    for index in range(count):
        (folder / f"module_{index:03}.py").write_text(f"value = {index}\n" * 300)
    (folder / "test").mkdir()
    (folder / "test" / "left_out.py").write_text("SECRET" * 1000)


def test_text_is_the_same_twice_and_held_out_files_are_not_trained_on(tmp_path):
    write_sources(tmp_path)
    first, second = data.load_text(str(tmp_path)), data.load_text(str(tmp_path))
    assert first.digest == second.digest
    assert torch.equal(first.train, second.train) and torch.equal(first.validation, second.validation)
    assert first.train_files + first.validation_files == 400
    train, validation = bytes(first.train), bytes(first.validation)
    assert b"SECRET" not in train + validation
    held_out = {line for line in validation.split(b"\n") if line}
    assert held_out and held_out.isdisjoint(train.split(b"\n"))


def test_a_new_file_moves_no_other_across_the_split(tmp_path):
    write_sources(tmp_path)
    before = set(bytes(data.load_text(str(tmp_path)).validation).split(b"\n"))
    (tmp_path / "aaa.py").write_text("addition = 1\n")
    after = set(bytes(data.load_text(str(tmp_path)).validation).split(b"\n"))
    assert before <= after <= before | {b"addition = 1"}


def test_too_little_text_is_refused_naming_the_folder(tmp_path):
    (tmp_path / "only.py").write_text("x = 1\n")
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*65536"):
        data.load_text(str(tmp_path))


def test_batches_depend_on_seed_and_step_and_stay_inside_the_text():
    text = torch.arange(200, dtype=torch.uint8)
    options = {"count": 64, "context": 16}
    one = data.batch(text, seed=1, step=5, **options)
    assert torch.equal(one, data.batch(text, seed=1, step=5, **options))
    assert not torch.equal(one, data.batch(text, seed=1, step=6, **options))
    assert not torch.equal(one, data.batch(text, seed=2, step=5, **options))
    assert one.shape == (64, 17) and torch.equal(one - one[:, :1], torch.arange(17).expand(64, 17))


def test_validation_covers_the_text_from_first_to_last_byte():
    text = torch.arange(250, dtype=torch.uint8)
    rows = torch.cat(list(data.validation_batches(text, count=10, batch_size=4, context=16)))
    assert rows.shape == (10, 17) and rows.min() == 0 and rows.max() == 249


def test_parameter_count_is_that_of_the_model():
    for config in (model.ModelConfig(), model.ModelConfig(depth=2, width=128, context=32)):
        counted = sum(p.numel() for p in model.seeded_model(config, seed=0).parameters())
        assert counted == config.parameter_count()
    assert 9e6 < model.ModelConfig().parameter_count() < 11e6


def test_weights_follow_the_seed_and_groups_hold_every_parameter_once():
    config = model.ModelConfig(depth=1, width=64, context=16)
    one, same, other = (model.seeded_model(config, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    assert not torch.equal(one.embedding.weight, other.embedding.weight)
    grouped = [p for group in model.parameter_groups(one, 0.1) for p in group["params"]]
    assert len(grouped) == len(set(map(id, grouped))) == len(list(one.parameters()))


def test_no_byte_sees_a_later_one():
    gpt = model.seeded_model(model.ModelConfig(depth=2, width=64, context=16), seed=3)
    text = torch.randint(256, (1, 16), generator=torch.Generator().manual_seed(4))
    changed = text.clone()
    changed[0, 9:] = (changed[0, 9:] + 1) % 256
    before, after = gpt(text), gpt(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_text_generation_repeats_with_its_seed():
    gpt = model.seeded_model(model.ModelConfig(depth=1, width=64, context=8), seed=5)
    assert gpt.continue_text(b"def ", 20, seed=6) == gpt.continue_text(b"def ", 20, seed=6)
    assert len(gpt.continue_text(b"def ", 20, seed=6)) == 20


def program(folder, body):
    """Return an executable that takes the place of orlopd. `ready` writes its ready file."""
    path = folder / "orlopd"
    path.write_text("#!/bin/sh\n" + 'ready() { while [ "$1" != --ready-file ]; do shift; done; echo here > "$2"; }\n' + body)
    path.chmod(0o755)
    return path


def test_servers_are_ready_inside_and_gone_after_with(tmp_path):
    binary = program(tmp_path, 'ready "$@"\nexec sleep 600\n')
    with processes.Servers(binary, 3, tmp_path, tmp_path, "1GiB") as servers:
        servers.check()
        pids = [child.process.pid for child in servers.children]
        assert all(processes.held_bytes(pid) > 0 for pid in pids)
    assert [processes.held_bytes(pid) for pid in pids] == [0, 0, 0]


def test_a_server_that_ends_early_is_reported_with_its_log_and_the_others_are_stopped(tmp_path):
    binary = program(tmp_path, 'case "$*" in *"--name server-2"*) echo no room on this disk; exit 7;; esac\n'
                               'ready "$@"\nexec sleep 600\n')
    servers = processes.Servers(binary, 2, tmp_path, tmp_path, "1GiB")
    with pytest.raises(processes.ProcessFailed, match="(?s)server-2 ended with status 7.*no room on this disk"):
        servers.__enter__()
    assert all(child.process.poll() is not None for child in servers.children)


def test_a_missing_binary_says_what_to_do(tmp_path):
    with pytest.raises(processes.ProcessFailed, match="(?s)server-1.*orlopd.*make"):
        processes.Servers(pathlib.Path(tmp_path / "orlopd"), 1, tmp_path, tmp_path, "1GiB").__enter__()


def test_bytes_are_added_over_servers_and_kept_apart_by_job():
    use = {"tier": "DRAM", "job": "demo", "slot": "weight", "bytes": 10, "peak_bytes": 15}
    statuses = [{"uses": [use, use | {"slot": "staging", "bytes": 0}, use | {"job": "other"}]}, {"uses": [use | {"tier": "NVME"}]}]
    assert report.bytes_by_slot(statuses, "demo") == {"weight": (20, 30), "staging": (0, 15)}


@pytest.mark.timeout(600)
def test_a_small_demo_shows_everything(tmp_path):
    pytest.importorskip("orlop", reason="the Python package orlop is not built: run `make test`")
    command = [sys.executable, "-m", "demo", "--steps=12", "--depth=1", "--width=64", "--context=32", "--validation-sequences=8",
               f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=pathlib.Path(__file__).parent.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("12/12", "loss="):
        assert part in done.stderr, "no progress bar"
    shown = done.stdout
    assert re.search(r"^step +orlop train +held out +torch train +held out +difference$", shown, re.M)
    for row in ("exp_avg_sq", "remainder", "forward and backward", "push", "commit", "pull", "clip and apply", "server-2", "sum"):
        assert re.search(rf"^{row} +[\d-]", shown, re.M), row
    for command in ("servers", "describe blocks.0.query_key_value.weight --job demo"):
        assert re.search(rf"^\$ orlop --server \S+ {re.escape(command)}\n\S+ .*\n", shown, re.M), command
    assert "\ndef " in shown and "To go on" in shown
    assert (tmp_path / "loss-and-memory.png").read_bytes().startswith(b"\x89PNG")
