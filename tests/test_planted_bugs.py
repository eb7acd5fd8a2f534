"""The simulator can fail: every bug planted into the step machine is caught, and the seed that caught it is printed."""
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def lines():
    """What planted_bugs.py says, by the name of the bug. One run: the sound code is compiled once."""
    run = subprocess.run([sys.executable, HERE / "planted_bugs.py"], capture_output=True, text=True)
    assert "without a bug" in run.stdout, run.stdout + run.stderr
    return dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)


@pytest.mark.timeout(1200)  # the first one waits for all
@pytest.mark.parametrize("bug", sorted(path.stem for path in (HERE / "planted").glob("*.patch")))
def test_simulator_catches_the_planted_bug(bug, lines, capsys):
    with capsys.disabled():
        print(f"\n  {bug}: {lines[bug]}", end="")
    assert lines[bug].startswith("caught by seed ")
