"""The simulator can fail: it catches every bug planted into the step machine, and prints the seed that caught it."""
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def lines(pytestconfig):
    """Return the output of planted_bugs.py by the name of the bug. It runs once, so the unpatched code is compiled once.

    The seed that is noted for a bug runs first. With --slow, every bug is searched for from seed 1.
    """
    search = ["--search"] if pytestconfig.getoption("--slow") else []
    run = subprocess.run([sys.executable, HERE / "planted_bugs.py", *search], capture_output=True, text=True)
    assert "without a bug" in run.stdout, run.stdout + run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)


@pytest.mark.timeout(1200)  # the first test waits for all bugs
@pytest.mark.parametrize("bug", sorted(path.stem for path in (HERE / "planted").glob("*.patch")))
def test_simulator_catches_the_planted_bug(bug, lines, capsys):
    with capsys.disabled():
        print(f"\n  {bug}: {lines[bug]}", end="")
    assert lines[bug].startswith("caught by seed ")
