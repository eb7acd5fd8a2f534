"""Compares two builds of Orlop: `orlop bench` of each in turn.

    python3 bench/pairs.py BEFORE AFTER [--bench wire] [--bench step] [--pairs 15] [--within 0.02] [--most 60]

BEFORE and AFTER are folders with `orlop` and `orlopd`. First BEFORE runs beside itself (A/A), then AFTER beside BEFORE (A/B). In every pair
the two run one after the other, and the order changes from pair to pair, so that a drift of the machine meets both alike. The figure of a
pair is the ratio of the two medians, turned so that above 1 is always worse. Pairs are added until the 95 % interval of the median ratio of
every figure lies within 1 +- `--within` of its median, or `--most` pairs have run. The interval is that of the sign test, which holds for
any distribution of the ratios.

Ctrl-C ends one comparison, which counts as far as it went. Leave the machine alone meanwhile.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import statistics
import subprocess
import sys

ATTEMPTS = 3  # of one run: without a repetition, one accident in a hundred runs loses an hour of pairs


def figures(folder: pathlib.Path, bench: str, extra: list[str]) -> dict[str, float]:
    """Medians of one run by name; a figure of which more is better is inverted, and shares are left out."""
    environment = {**os.environ, "PATH": f"{folder.resolve()}:{os.environ['PATH']}"}
    for _ in range(ATTEMPTS):
        run = subprocess.run([folder / "orlop", "bench", bench, "--json", *extra], env=environment, capture_output=True,
                             text=True)
        if run.returncode == 0:
            break
        print(f"{folder}/orlop bench {bench} failed:\n{run.stderr}", file=sys.stderr)
    else:
        sys.exit(f"{folder}/orlop bench {bench} failed {ATTEMPTS} times one after the other")
    rows = json.loads(run.stdout)
    return {row["name"]: row["median"] if row["better"] == "lower" else 1 / row["median"]
            for row in rows if not row["name"].endswith(".share")}


def interval(ratios: list[float]) -> tuple[float, float]:
    """The 95 % interval of the median by the sign test: two order statistics. All there is, if that is too little."""
    ratios = sorted(ratios)
    count = len(ratios)
    below, tail = 0, 0.5 ** count
    while below < count // 2 and tail + math.comb(count, below + 1) * 0.5 ** count <= 0.025:
        below += 1
        tail += math.comb(count, below) * 0.5 ** count
    return ratios[below], ratios[count - 1 - below]


def compare(first: pathlib.Path, second: pathlib.Path, bench: str, options: argparse.Namespace) -> dict[str, list[float]]:
    """Ratios second / first by figure, of as many pairs as it takes, or as there were until Ctrl-C."""
    ratios: dict[str, list[float]] = {}
    for pair in range(options.most):
        order = (first, second) if pair % 2 == 0 else (second, first)
        try:
            one, other = (figures(folder, bench, options.extra) for folder in order)
        except KeyboardInterrupt:
            break
        before, after = (one, other) if pair % 2 == 0 else (other, one)
        for name, value in before.items():
            if name in after:
                ratios.setdefault(name, []).append(after[name] / value)
        enough = pair + 1 >= options.pairs
        if enough and all(is_narrow(values, options.within) for values in ratios.values()):
            break
    return ratios


def is_narrow(ratios: list[float], within: float) -> bool:
    low, high = interval(ratios)
    middle = statistics.median(ratios)
    return low >= middle * (1 - within) and high <= middle * (1 + within)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=pathlib.Path)
    parser.add_argument("after", type=pathlib.Path)
    parser.add_argument("--bench", action="append", choices=("wire", "step"), help="both unless given")
    parser.add_argument("--pairs", type=int, default=15, help="the fewest (default 15)")
    parser.add_argument("--most", type=int, default=60, help="the most (default 60)")
    parser.add_argument("--within", type=float, default=0.02, help="half the width of the interval that is enough (default 0.02)")
    options, options.extra = parser.parse_known_args(arguments)
    if options.most < options.pairs:
        parser.error(f"--most {options.most} is below --pairs {options.pairs}")
    print(f"{'':4}{'figure':24}{'ratio':>8}{'95 % interval':>18}{'pairs':>7}   above 1: worse")
    for bench in options.bench or ("wire", "step"):
        for label, second in (("A/A", options.before), ("A/B", options.after)):
            for name, values in compare(options.before, second, bench, options).items():
                low, high = interval(values)
                print(f"{label} {name:24}{statistics.median(values):8.3f}{low:10.3f} to {high:5.3f}{len(values):6}", flush=True)


if __name__ == "__main__":
    main()
