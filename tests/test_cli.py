"""The `orlop` command: every subcommand, with output for people and for programs."""
import json
import os
import re
import subprocess

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from clusters import SMALL_SHARD_ELEMENTS, SMALL_TENSORS, free_address
from plain_client import Tensor
from test_bad_input import ready_job

JOB = "trained"
COLUMNS = 100  # width of a usual terminal window
SUBCOMMANDS = {"servers", "status", "jobs", "tensors", "describe", "export", "import", "flush", "rollback", "delete", "bench", "completion"}


@pytest.fixture(scope="module")
def cluster(make_module_cluster):
    return make_module_cluster(2, tcp=True)


@pytest.fixture(scope="module")
def job(cluster):
    return ready_job(cluster, JOB)


@pytest.fixture(scope="module")
def orlop(bin_dir, cluster, job):
    """Return orlop(*arguments), which runs the program and returns the finished process. It must succeed unless stated otherwise."""

    def run(*arguments, succeeds=True, server=cluster.address, timeout=120):
        environment = {**os.environ, "ORLOP_SERVER": server}
        done = subprocess.run([bin_dir / "orlop", *map(str, arguments)], capture_output=True, text=True, timeout=timeout,
                              env=environment)
        assert (done.returncode == 0) == succeeds, f"orlop {arguments}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done

    return run


def columns_of(table):
    """Return the titles of a table after checking that columns are aligned: gaps of two blanks run through all lines."""
    lines = table.rstrip("\n").split("\n")
    assert all(line == line.rstrip() for line in lines), "trailing blanks"
    width = max(map(len, lines))
    blank = "".join(" " if all(line.ljust(width)[i] == " " for line in lines) else "x" for i in range(width))
    titles = re.split(r"\s{2,}", lines[0].strip())
    assert len(re.split(r"\s{2,}", blank.strip())) == len(titles), f"not aligned:\n{table}"
    return titles


TABLES = [(("servers",), "NAME"), (("jobs",), "JOB"), (("tensors", JOB), "TENSOR"), (("tensors",), "TENSOR")]


@pytest.mark.parametrize("arguments, title", TABLES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else value)
def test_tables_are_aligned(orlop, arguments, title):
    text = orlop(*arguments).stdout
    assert columns_of(text)[0] == title
    assert all(len(line) <= COLUMNS for line in text.splitlines())
    assert text.isascii(), "no Unicode bars where the output is not a terminal"


def test_servers_are_listed(orlop, cluster):
    text = orlop("servers").stdout
    for name, server in zip(cluster.names, cluster.servers):
        line = next(line for line in text.splitlines() if line.startswith(name))
        assert server.address in line and "ready" in line and "GiB" in line
    assert text.count("leader") == 1
    listed = json.loads(orlop("servers", "--json").stdout)
    assert [server["name"] for server in listed] == cluster.names


def test_jobs_and_tensors_are_listed(orlop):
    listed = json.loads(orlop("--json", "jobs").stdout)
    assert [(each["job"], each["committed_step"], each["state"]) for each in listed] == [(JOB, 1, "READY")]
    tensors = json.loads(orlop("tensors", JOB, "--json").stdout)
    assert [tensor["spec"]["name"] for tensor in tensors] == [tensor.name for tensor in SMALL_TENSORS]
    assert [tensor["shard_count"] for tensor in tensors] == [-(-t.element_count // SMALL_SHARD_ELEMENTS) for t in SMALL_TENSORS]
    some = json.loads(orlop("tensors", JOB, "--name", "layers", "--json").stdout)
    assert {tensor["spec"]["name"] for tensor in some} == {"layers.0.weight", "layers.0.bias"}


def test_tensor_is_described_shard_by_shard(orlop, job):
    text = orlop("describe", "layers.0.weight").stdout
    head, shards, slots, reasons = text.split("\n\n")
    assert "[1100, 1000]" in head and "adamw 8bit" in head and "3 shards" in head
    assert columns_of(shards)[0] == "SHARDS" and columns_of(slots)[0] == "SLOT"
    assert f"[{SMALL_SHARD_ELEMENTS}, {2 * SMALL_SHARD_ELEMENTS})" in shards and "server-0" in reasons
    assert all(len(line) <= COLUMNS for line in text.splitlines())
    described = json.loads(orlop("describe", "layers.0.weight", "--job", JOB, "--json").stdout)
    assert [shard["shard"] for shard in described["shards"]] == [0, 1, 2]
    for shard in described["shards"]:
        assert shard["version"] == 1 and shard["reason"] and len(shard["copies"]) == 1
        slots = {slot["slot"]: slot for slot in shard["slots"]}
        assert {"weight", "exp_avg", "exp_avg_sq"} <= slots.keys()
        assert slots["exp_avg"]["bytes"] == shard["element_count"] and slots["exp_avg"]["tier"] == "DRAM"
    assert "tied to wte.weight" in orlop("describe", "head.weight").stdout
    assert orlop("describe", "wte.weight").stdout.startswith("head.weight")


def test_status_shows_bytes_against_the_budget(orlop, cluster):
    text = orlop("status").stdout
    for name in cluster.names:
        assert name in text
    assert re.search(r"[#.]{10,}", text), "bars"
    assert all(len(line) <= COLUMNS for line in text.splitlines())
    assert not re.search(r"rocksdb +0 B", text), "what RocksDB holds is measured"
    for status in json.loads(orlop("status", "--json").stdout):
        assert status["ready"] and 0 < status["memory_bytes"] <= status["memory_budget_bytes"] == 2 << 30
        assert sum(use["bytes"] for use in status["uses"] if use["tier"] == "DRAM") == status["memory_bytes"]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_export_and_import_round_trip(orlop, job, cluster, tmp_path, dtype):
    path = tmp_path / "model.safetensors"
    told = json.loads(orlop("export", JOB, "--to", path, "--dtype", dtype, "--json").stdout)
    assert (told["job"], told["step"]) == (JOB, job.status().committed_step)
    stored = safetensors.torch.load_file(path)
    assert stored.keys() == {tensor.name for tensor in SMALL_TENSORS}
    for tensor in SMALL_TENSORS:
        mine = stored[tensor.name]
        assert tuple(mine.shape) == tensor.shape
        if tensor.kind == "BUFFER":
            assert (mine.numpy() == job.pull(tensor.name)).all()
        elif dtype == "fp32":
            assert (mine.numpy() == job.pull(tensor.name, "master", "F32")).all()
        else:
            assert mine.dtype == torch.bfloat16
            bits = mine.reshape(-1).view(torch.int16).numpy().view("<u2")
            assert (bits == job.pull(tensor.name, "weight", "BF16").reshape(-1)).all()
    if dtype == "fp32":
        other = cluster.job("imported", SMALL_TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
        other.create()
        other.configure()
        orlop("import", path, "--job", "imported")
        other.join()
        for tensor in SMALL_TENSORS:
            slot = "weight" if tensor.kind == "BUFFER" else "master"
            kind = tensor.dtype if tensor.kind == "BUFFER" else "F32"
            assert (other.pull(tensor.name, slot, kind) == job.pull(tensor.name, slot, kind)).all(), tensor.name
        assert other.committed_step == 0
        orlop("delete", "imported")


def test_fp32_buffers_are_imported_too(orlop, cluster, tmp_path):
    tensors = (Tensor("norm.weight", (300,)), Tensor("norm.running_mean", (300,), "F32", "BUFFER"),
               Tensor("half", (20,), "BF16", "BUFFER"))
    generator = np.random.default_rng(3)
    values = {"norm.weight": generator.standard_normal(300).astype("f4"), "norm.running_mean": generator.standard_normal(300).astype("f4"),
              "half": np.arange(20, dtype="<u2")}
    there, back = (cluster.job(name, tensors) for name in ("normed", "normed-again"))
    for job in (there, back):
        job.create()
        job.configure()
    there.join()
    there.load(values)
    path = tmp_path / "model.safetensors"
    orlop("export", "normed", "--to", path)
    orlop("import", path, "--job", "normed-again")
    back.join()
    assert back.committed_step == 0
    for name, value in values.items():
        assert (back.pull(name) == value).all(), name
    for job in (there, back):
        orlop("delete", job.name)


def test_import_of_a_wrong_file_changes_nothing(orlop, job, tmp_path):
    before = job.snapshot()
    wrong_shape, unknown, torn = tmp_path / "shape", tmp_path / "unknown", tmp_path / "torn"
    safetensors.numpy.save_file({"layers.0.bias": np.zeros(299, "f4")}, wrong_shape)
    safetensors.numpy.save_file({"layers.9.bias": np.zeros(300, "f4")}, unknown)
    torn.write_bytes(wrong_shape.read_bytes()[:40])
    for path, fragment in ((wrong_shape, "layers.0.bias"), (unknown, "layers.9.bias"), (torn, str(torn)),
                           (tmp_path / "missing", "missing")):
        assert fragment in orlop("import", path, "--job", JOB, succeeds=False).stderr
    assert job.snapshot() == before


def test_export_where_it_cannot_write_says_so(orlop, tmp_path):
    path = tmp_path / "no" / "such" / "directory" / "model.safetensors"
    assert str(path) in orlop("export", JOB, "--to", path, succeeds=False).stderr


def test_unknown_names_say_what_to_do_next(orlop):
    assert "orlop jobs" in orlop("tensors", "nothing", succeeds=False).stderr
    failed = orlop("describe", "nothing", succeeds=False).stderr
    assert "nothing" in failed and "orlop tensors" in failed
    failed = orlop("rollback", JOB, "--to-step", "0", succeeds=False).stderr
    assert JOB in failed
    assert "servres" in orlop("servres", succeeds=False).stderr
    assert "orlop describe --help" in orlop("describe", succeeds=False).stderr


def test_equal_shards_of_a_large_tensor_are_shown_as_one_row(orlop, cluster):
    other = cluster.job("folded", (Tensor("weight", (64, 1024), "BF16"),), shard_elements=256)
    other.create()
    try:
        shards = orlop("describe", "weight", "--job", "folded").stdout.split("\n\n")[1]
        assert len(shards.splitlines()) == 3, "two servers hold 256 shards by turns"
        assert "0, 2, 4, ..., 254" in shards and "128 x 256" in shards
    finally:
        orlop("delete", "folded")


def test_without_arguments_it_says_what_to_do(bin_dir):
    done = subprocess.run([bin_dir / "orlop"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    for word in [*SUBCOMMANDS, "--server", "ORLOP_SERVER", "orlopd --data-dir"]:
        assert word in done.stdout


@pytest.mark.parametrize("subcommand", sorted(SUBCOMMANDS))
def test_every_subcommand_has_help(orlop, subcommand):
    assert "Usage" in orlop(subcommand, "--help").stdout


@pytest.mark.parametrize("json_flag", [[], ["--json"]])
def test_no_server_and_wrong_addresses_say_what_to_do(orlop, json_flag, tmp_path):
    address = free_address()
    for wrong in (address, f"unix:{tmp_path}/none.sock", "nonsense"):
        failed = orlop("--server", wrong, "--timeout", "1", *json_flag, "servers", succeeds=False)
        assert failed.returncode == 1 and failed.stdout == ""
        assert wrong in failed.stderr
    assert "HOST:PORT" in failed.stderr
    failed = orlop("--timeout", "1", "servers", server=address, succeeds=False)
    assert address in failed.stderr and "orlopd --listen" in failed.stderr and "--server" in failed.stderr


def complete(orlop, bin_dir, cluster, *words):
    script = (f'export PATH="{bin_dir}:$PATH" ORLOP_SERVER={cluster.address}; eval "$(orlop completion bash)"; '
              f'COMP_WORDS=(orlop {" ".join(words)}); COMP_CWORD={len(words)}; _orlop; echo "${{COMPREPLY[@]}}"')
    return set(subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=60).stdout.split())


def test_shell_completion_knows_commands_and_jobs(orlop, bin_dir, cluster):
    assert complete(orlop, bin_dir, cluster, "''") == SUBCOMMANDS
    assert complete(orlop, bin_dir, cluster, "ser") == {"servers"}
    assert complete(orlop, bin_dir, cluster, "--js") == {"--json"}
    assert complete(orlop, bin_dir, cluster, "export", JOB[:3]) == {JOB}
    for shell in ("zsh", "fish"):
        script = orlop("completion", shell).stdout
        assert all(subcommand in script for subcommand in SUBCOMMANDS)


def test_only_the_named_job_is_deleted(orlop, cluster):
    other = cluster.job("doomed", SMALL_TENSORS)
    other.create()
    failed = orlop("tensors", succeeds=False).stderr
    assert "doomed" in failed and JOB in failed and "several jobs" in failed
    assert json.loads(orlop("delete", "doomed", "--json").stdout)["existed"]
    assert not json.loads(orlop("delete", "doomed", "--json").stdout)["existed"]
    assert [each["job"] for each in json.loads(orlop("jobs", "--json").stdout)] == [JOB]


BENCH_FIELDS = {"name", "unit", "min", "median", "max", "better", "baseline_name", "baseline_median", "ratio", "repetitions",
                "machine"}


def check_bench(figures, name):
    assert figures
    for figure in figures:
        assert figure.keys() >= BENCH_FIELDS, figure
        assert figure["name"].startswith(f"{name}.") and figure["better"] in ("higher", "lower")
        assert figure["min"] <= figure["median"] <= figure["max"]
        assert {"cpu", "cores", "memory", "kernel"} <= {key.lower().split("_")[0] for key in figure["machine"]}
        if figure["baseline_name"]:
            assert figure["ratio"] == pytest.approx(figure["median"] / figure["baseline_median"], rel=0.01)


def test_bench_wire_prints_figures(orlop):
    figures = json.loads(orlop("bench", "wire", "--json", "--repetitions", 3, "--mebibytes", 8).stdout)
    check_bench(figures, "wire")
    assert {"wire.grpc.push", "wire.grpc.pull"} <= {figure["name"] for figure in figures}


def test_bench_kernels_prints_figures(orlop):
    figures = json.loads(orlop("bench", "kernels", "--json", "--repetitions", 3, "--mebiparameters", 1).stdout)
    check_bench(figures, "kernels")
    assert {"kernels.adamw.8bit", "kernels.adamw.fp32", "kernels.adamw.4bit", "kernels.lion.8bit", "kernels.stage.bf16",
            "kernels.digest.bf16", "kernels.adamw.8bit.1thread", "kernels.adamw.8bit.bandwidth"} <= {figure["name"] for figure in figures}
    assert {figure["baseline_name"] for figure in figures} == {"copy"}


def test_bench_flush_prints_figures_and_leaves_nothing(orlop, tmp_path):
    done = orlop("bench", "flush", "--json", "--repetitions", 3, "--mebibytes", 8, "--data-dir", tmp_path)
    figures = {figure["name"]: figure for figure in json.loads(done.stdout)}
    check_bench(list(figures.values()), "flush")
    assert {name: figure["baseline_name"] for name, figure in figures.items()} == {
        "flush.bytes": "weights in bf16", "flush.seconds": "plain write", "flush.speed": "plain write",
        "flush.pause": "step with no flush", "flush.pause.per_gb": "plain write", "flush.lost.per_gb": "plain write",
        "flush.plain.again": "plain write"}
    assert figures["flush.bytes"]["median"] == pytest.approx(6.03 * 2**22 / 1e6, rel=0.01)  # one tensor; README, "Memory"
    assert figures["flush.speed"]["median"] == pytest.approx(figures["flush.bytes"]["median"] / 1e3 / figures["flush.seconds"]["median"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_bulk_path_moves_as_much_as_a_bare_stream(orlop):
    """For an otherwise idle machine: the median over paired rounds, hash and norm included."""
    figures = json.loads(orlop("bench", "wire", "--json", "--repetitions", 25, "--mebibytes", 256, timeout=900).stdout)
    for name in ("wire.grpc.push", "wire.grpc.pull"):
        (figure,) = (each for each in figures if each["name"] == name and each["baseline_name"] == "bare gRPC stream")
        low, median, high = figure["paired_ratio"]
        print(f"{name}: {median:.2f} [{low:.2f}, {high:.2f}] of the bare stream, {figure['median']:.2f} {figure['unit']}")
        assert median >= 0.85, figure


@pytest.mark.slow
def test_bench_step_prints_figures(orlop):
    check_bench(json.loads(orlop("bench", "step", "--json", "--repetitions", 3, timeout=900).stdout), "step")


def test_version_is_told(orlop, bin_dir):
    assert re.fullmatch(r"orlop \d+\.\d+\.\d+\n", orlop("--version").stdout)
    told = subprocess.run([bin_dir / "orlopd", "--version"], capture_output=True, text=True, check=True, timeout=60)
    assert re.fullmatch(r"orlopd \d+\.\d+\.\d+\n", told.stdout)
