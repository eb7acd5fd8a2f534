"""`bench/quality.py`: its optimizer equals the servers', it runs at a tiny size, and (--slow) every format meets its limits."""
import pathlib
import subprocess
import sys

import pytest
import torch

orlop = pytest.importorskip("orlop", reason="the Python package orlop is not built: run `make test`")

from bench import quality, quality_report  # noqa: E402
from demo import model, run, train  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
SMALL = ["--depth", "1", "--width", "128", "--context", "16", "--batch", "2", "--validation-sequences", "2"]
BEGIN, END = "<!-- bench-quality: begin -->", "<!-- bench-quality: end -->"


def outside_markers(text):
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]


@pytest.fixture(scope="module")
def servers(bin_dir):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORLOP_BIN_DIR", str(bin_dir))
        with orlop.local(servers=2) as session:
            yield session.address


@pytest.mark.parametrize("name", quality.ORLOP)
def test_steps_in_this_process_give_the_bits_of_the_servers(name, servers):
    state, master = (*quality.ORLOP[name], "exact")[:2]
    training = quality.Training(name, run.parse_arguments(["--steps", "6", "--seed", "0", *SMALL]))
    theirs = quality.seeded_model(training.options)
    with orlop.connect(servers, job=name.replace(", ", "-").replace(" ", "-")) as session:
        session.bind(theirs)
        optimizer = orlop.AdamW(model.parameter_groups(theirs, train.WEIGHT_DECAY), lr=1.0, betas=train.BETAS, state=state, master=master,
                                max_norm=train.MAX_NORM, session=session)
        for step in range(training.options.steps):
            _, gradients = training.gradients(step)
            for parameter, gradient in zip(theirs.parameters(), gradients):
                parameter.grad = gradient.clone()
            for group in optimizer.param_groups:
                group["lr"] = training.rate(step)
            optimizer.step()
            training.optimizer.step(gradients, training.rate(step))
            training.optimizer.pull()
    for (tensor_name, mine), other in zip(training.model.named_parameters(), theirs.parameters()):
        assert torch.equal(mine, other), tensor_name


def test_every_format_is_measured_or_skipped_in_words(tmp_path):
    results, chart = tmp_path / "RESULTS.md", tmp_path / "quality.png"
    original = (ROOT / "bench/RESULTS.md").read_text()
    results.write_text(original)
    subprocess.run([sys.executable, "-m", "bench.quality", "--steps", "12", *SMALL, "--seeds", "0", "--drift-steps", "10",
                    "--results", results, "--chart", chart], cwd=ROOT, check=True)
    text = results.read_text()
    assert outside_markers(text) == outside_markers(original)
    assert "(quality.png)" in text and chart.read_bytes().startswith(b"\x89PNG")
    written = text.split(BEGIN)[1].split(END)[0]
    for name in quality.FORMATS:
        assert f"\n| {name} | " in written or f"\n{name} skipped" in written, name


@pytest.mark.slow
@pytest.mark.timeout(3 * 3600)
def test_every_format_keeps_its_limits_on_the_demo_over_three_seeds(capsys):
    found = quality.run_all([0, 1, 2], 2000, [], processes=2)
    with capsys.disabled():
        print("\n" + quality_report.markdown(found, []))
    assert not [goal.what for goal in quality_report.goals(found) if not goal.met]
