#!/usr/bin/env python3
"""Measures the phases of `make test` and prints a table of their times.

    python3 tests/times.py begin DIR                    empties DIR and starts the clock
    python3 tests/times.py run DIR PHASE COMMAND...     runs the command, appends its seconds to DIR/phases, and exits with its status
    python3 tests/times.py table DIR                    prints the phases, and the programs and files of their tests

A phase may write DIR/PHASE.xml (JUnit of ctest or pytest) and DIR/PHASE.json (`ctest --show-only=json-v1`), which names the program of
each C++ test. Tests of a phase run in parallel, so their seconds may add up to more than those of the phase.
"""
from __future__ import annotations

import collections
import json
import pathlib
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree

LEAST_SECONDS = 5.0  # groups below it share one line, "others"
ROW = "{:<50}{:>8}{:>8}   {}"


def begin(directory: pathlib.Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    (directory / "begun").write_text(str(time.time()))


def run(directory: pathlib.Path, phase: str, command: list[str]) -> int:
    directory.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    status = subprocess.run(command).returncode
    with open(directory / "phases", "a") as phases:
        print(phase, f"{time.monotonic() - started:.1f}", file=phases)
    return status


def programs(listing: pathlib.Path) -> dict[str, str]:
    """The program of each C++ test, by the test's name."""
    tests = json.loads(listing.read_text())["tests"] if listing.exists() else []
    return {test["name"]: pathlib.PurePath(word).name for test in tests for word in test.get("command", []) if word.endswith("_test")}


def groups(report: pathlib.Path) -> dict[str, list[tuple[float, str]]]:
    """(seconds, test) of a JUnit file, by program or by Python file."""
    program_of, found = programs(report.with_suffix(".json")), collections.defaultdict(list)
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        name, where = case.get("name", ""), case.get("classname", "")
        group = program_of.get(name) or re.sub(r"\.Test\w+$", "", where).replace(".", "/") + ".py"
        found[group].append((float(case.get("time", 0)), name))
    return found


def print_groups(report: pathlib.Path) -> None:
    rest_seconds, rest_tests = 0.0, 0
    sums = [(sum(seconds for seconds, _ in tests), group, tests) for group, tests in groups(report).items()]
    for seconds, group, tests in sorted(sums, reverse=True):
        slowest, name = max(tests)
        if seconds < LEAST_SECONDS:
            rest_seconds, rest_tests = rest_seconds + seconds, rest_tests + len(tests)
        else:
            print(ROW.format(f"    {group}", f"{seconds:.0f}", len(tests), f"{slowest:.0f} s  {name}"[:60]))
    if rest_tests:
        print(ROW.format("    others", f"{rest_seconds:.0f}", rest_tests, ""))


def table(directory: pathlib.Path) -> None:
    phases = [line.split() for line in (directory / "phases").read_text().splitlines()]
    print("\n" + ROW.format("where the time went", "seconds", "tests", "slowest test"))
    for phase, seconds in phases:
        print(ROW.format(phase, f"{float(seconds):.0f}", "", ""))
        if (directory / f"{phase}.xml").exists():
            print_groups(directory / f"{phase}.xml")
    total = time.time() - float((directory / "begun").read_text())
    rest = total - sum(float(seconds) for _, seconds in phases)
    print(ROW.format("packages, environments, CMake", f"{rest:.0f}", "", ""))
    print(ROW.format("all", f"{total:.0f}", "", f"{total / 60:.1f} minutes"), flush=True)


def main() -> int:
    command, directory, *rest = sys.argv[1:]
    if command == "run":
        return run(pathlib.Path(directory), rest[0], rest[1:])
    (begin if command == "begin" else table)(pathlib.Path(directory))
    return 0


if __name__ == "__main__":
    sys.exit(main())
