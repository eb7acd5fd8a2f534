"""bench/pairs.py finds the ratio of two builds, whatever the machine does meanwhile; `orlop` is a script that prints figures."""
import random
import re
import subprocess
import sys

import pytest

from bench import pairs

ORLOP = """#!/usr/bin/env python3
import json, pathlib, random
state = pathlib.Path(__file__).parents[1] / "runs"
run = int(state.read_text()) if state.exists() else 0
state.write_text(str(run + 1))
drift = 1 + 0.02 * run * random.Random(run).random()      # the machine gets slower
slow = {slow} * drift
print(json.dumps([{{"name": "x.push", "better": "higher", "median": 2.0 / slow}},
                  {{"name": "x.cpu", "better": "lower", "median": 0.5 * slow}},
                  {{"name": "x.push.share", "better": "lower", "median": random.random()}}]))
"""


def build(folder, slow):
    folder.mkdir()
    program = folder / "orlop"
    program.write_text(ORLOP.format(slow=slow))
    program.chmod(0o755)
    return folder


def test_a_slower_build_is_found_beside_one_that_is_not(tmp_path):
    run = subprocess.run([sys.executable, "-m", "bench.pairs", build(tmp_path / "a", 1.0), build(tmp_path / "b", 1.1), "--bench", "wire",
                          "--pairs", "9", "--most", "9"], capture_output=True, text=True, check=True)
    rows = {tuple(line.split()[:2]): [float(x) for x in re.findall(r"\d+\.\d+", line)] for line in run.stdout.splitlines()[1:]}
    assert set(rows) == {(label, name) for label in ("A/A", "A/B") for name in ("x.push", "x.cpu")}
    for name in ("x.push", "x.cpu"):
        ratio, low, high = rows["A/B", name]
        assert low <= ratio <= high
        assert rows["A/A", name][0] < ratio


@pytest.mark.parametrize("count", [6, 15, 40])
def test_the_interval_holds_the_median_as_often_as_it_says(count):
    seed = 3
    draw = random.Random(seed)
    hits = 0
    for _ in range(2000):
        low, high = pairs.interval([draw.lognormvariate(0, 0.3) for _ in range(count)])
        hits += low <= 1.0 <= high
    assert hits >= 0.94 * 2000, f"seed {seed}"


def test_too_few_pairs_give_all_there_is():
    assert pairs.interval([1.2, 0.9, 1.0]) == (0.9, 1.2)


def test_a_run_that_fails_is_repeated_and_said(tmp_path, capfd):
    folder = build(tmp_path / "once", 1.0)
    program = folder / "orlop"
    program.rename(folder / "works")
    program.write_text(f"#!/bin/sh\n[ -e {tmp_path}/failed ] && exec {folder}/works\ntouch {tmp_path}/failed; echo no disk >&2; exit 3\n")
    program.chmod(0o755)
    assert set(pairs.figures(folder, "wire", [])) == {"x.push", "x.cpu"}
    assert "no disk" in capfd.readouterr().err


def test_a_run_that_always_fails_ends_the_comparison(tmp_path, capfd):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "orlop").write_text("#!/bin/sh\necho no disk >&2; exit 3\n")
    (folder / "orlop").chmod(0o755)
    with pytest.raises(SystemExit, match="failed 3 times"):
        pairs.figures(folder, "wire", [])
    assert "no disk" in capfd.readouterr().err


def test_ctrl_c_ends_a_comparison_with_the_pairs_it_has(monkeypatch, capsys):
    calls = iter(range(1000))

    def figures(folder, bench, extra):
        if next(calls) in (5, 12):
            raise KeyboardInterrupt
        return {"x.push": 1.0 if folder.name == "a" else 2.0}
    monkeypatch.setattr(pairs, "figures", figures)
    pairs.main(["a", "b", "--bench", "wire"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [(row[0], row[2], row[-1]) for row in rows] == [("A/A", "1.000", "2"), ("A/B", "2.000", "3")]
