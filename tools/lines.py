#!/usr/bin/env python3
"""Checks the length of lines, and that a comment gives the reason wherever clang's thread-safety analysis is switched off.

    python3 tools/lines.py [ROOT]     prints each fault as `FILE:LINE: fault` and exits with 1 if there is one
"""
from __future__ import annotations

import pathlib
import re
import subprocess
import sys

LENGTHS = {100: (".h", ".cc", ".cc.in", ".cu.in"),
           140: (".py", ".pyi", ".md", ".cmake", "CMakeLists.txt", ".proto", ".toml", ".json", "Makefile", ".sh", ".yaml")}
# Rows of a table and addresses cannot be broken. The excepted files hold shell code for users, and records of measurements.
UNBREAKABLE = re.compile(r"^\s*\||https?://\S+$")
EXCEPT = ("cli/completion.cc", "bench/RESULTS.md", "python/tests/data/")

OFF = "NO_THREAD_SAFETY_ANALYSIS"
REASON = re.compile(r"//.*\b(lock|locks|locked|mutex|held|holds)\b")
LINES_ABOVE = 6  # a statement may have several lines between its comment and the macro


def tree(root: pathlib.Path) -> list[str]:
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=root, check=True, text=True,
                            capture_output=True).stdout.splitlines()
    return sorted(path for path in listed if (root / path).is_file() and not path.startswith(EXCEPT))


def check_lengths(path: str, lines: list[str]) -> list[str]:
    limit = next((limit for limit, endings in LENGTHS.items() if path.endswith(endings)), None)
    return [f"{path}:{number}: {len(line)} characters; the limit is {limit}" for number, line in enumerate(lines, 1)
            if limit and len(line) > limit and not UNBREAKABLE.search(line)]


def check_reasons(path: str, lines: list[str]) -> list[str]:
    if not path.endswith((".h", ".cc")) or path == "base/mutex.h":
        return []
    return [f"{path}:{number}: {OFF} without a comment that names the lock and the reason why clang cannot see it"
            for number, line in enumerate(lines, 1)
            if OFF in line and not any(REASON.search(near) for near in lines[max(0, number - 1 - LINES_ABOVE):number])]


def main() -> int:
    root = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent)
    faults = []
    for path in tree(root):
        if path.endswith(tuple(ending for endings in LENGTHS.values() for ending in endings)):
            lines = (root / path).read_text().splitlines()
            faults += check_lengths(path, lines) + check_reasons(path, lines)
    print(*faults, sep="\n", end="\n" if faults else "")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
