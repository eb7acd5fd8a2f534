#!/usr/bin/env python3
"""Checks the length of lines, and that a comment names the lock wherever NO_THREAD_SAFETY_ANALYSIS switches clang's analysis off.

Files that git tracks are checked, and untracked ones that it does not ignore.

    python3 tools/lines.py [ROOT]     prints each fault as `FILE:LINE: fault` and exits with 1 if there is one
"""
from __future__ import annotations

import pathlib
import re
import subprocess
import sys

# The limit in characters, and the names' endings to which it applies. Other files have no limit.
LENGTHS = {100: (".h", ".cc", ".cc.in", ".cu.in"),
           140: (".py", ".pyi", ".md", ".cmake", "CMakeLists.txt", ".proto", ".toml", ".json", "Makefile", ".sh", ".yaml")}
# Lines that cannot be broken: a row of a Markdown table, and a line that ends with a URL.
UNBREAKABLE = re.compile(r"^\s*\||https?://\S+$")
# Paths, and beginnings of paths, that are not checked: shell code for users, and records of measurements.
EXCEPT = ("cli/completion.cc", "bench/RESULTS.md", "python/tests/data/")

OFF = "NO_THREAD_SAFETY_ANALYSIS"
# The check is only that a comment has one of these words; whether it is a reason is for the reviewer.
REASON = re.compile(r"//.*\b(lock|locks|locked|mutex|held|holds)\b")
LINES_ABOVE = 6  # the comment is above its statement, whose macro may be some lines further down


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
