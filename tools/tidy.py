#!/usr/bin/env python3
"""Runs clang-tidy on C++ sources, and skips a source that was clean and has not changed since.

clang-tidy needs about ten seconds for a source, and a quarter of an hour for all of them on two cores. BUILD/clean/ holds, for each clean
source, a digest of its command, of .clang-tidy, of the version of clang-tidy, and of the bytes of every file that it includes.

    python3 tools/tidy.py BUILD JOBS FILE...     BUILD holds compile_commands.json; exits with 1 if there is a finding
"""
from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
CLANG_TIDY = os.environ.get("CLANG_TIDY", "clang-tidy-19")


@functools.cache
def digest_of(path: str) -> str:
    try:
        return hashlib.sha256(pathlib.Path(path).read_bytes()).hexdigest()
    except OSError:
        return "missing"


class Linter:
    """Sources of one build directory."""

    def __init__(self, build: pathlib.Path):
        self.build = build
        self.commands = {os.path.relpath(entry["file"], ROOT): entry for entry in json.loads((build / "compile_commands.json").read_text())}
        version = subprocess.run([CLANG_TIDY, "--version"], check=True, capture_output=True, text=True).stdout
        self.common = version + (ROOT / ".clang-tidy").read_text()

    def command(self, path: str) -> tuple[str, list[str]]:
        """(directory, words) of the command that compiles a source. A source without a target uses the command of a neighbour."""
        folder = pathlib.PurePath(path).parent
        neighbours = (entry for other, entry in self.commands.items() if pathlib.PurePath(other).parent == folder)
        entry = self.commands.get(path) or next(neighbours, None)
        if entry is None:
            raise SystemExit(f"{path}: no target of {self.build} compiles it or another source of its folder")
        words = shlex.split(entry["command"])
        return entry["directory"], [*words[:words.index("-o")], str(ROOT / path)]

    def digest(self, path: str, read: list[str]) -> str:
        parts = [self.common, *self.command(path)[1], *(f"{file} {digest_of(file)}" for file in read)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def files_read(self, path: str) -> list[str]:
        """Absolute paths of the source and of every file that it includes."""
        directory, words = self.command(path)
        rule = subprocess.run([*words, "-M"], cwd=directory, check=True, capture_output=True, text=True).stdout
        return sorted(os.path.join(directory, file) for file in rule.replace("\\\n", " ").split(":", 1)[1].split())

    def stamp(self, path: str) -> pathlib.Path:
        return self.build / "clean" / f"{path.replace('/', '+')}.json"

    def was_clean(self, path: str) -> bool:
        try:
            known = json.loads(self.stamp(path).read_text())
        except (OSError, ValueError):
            return False
        return known["digest"] == self.digest(path, known["read"])

    def check(self, path: str) -> str:
        """The findings of clang-tidy in a source; empty if it is clean."""
        if self.was_clean(path):
            return ""
        read = self.files_read(path)
        known = {"digest": self.digest(path, read), "read": read}  # taken before the check, because a file may change meanwhile
        run = subprocess.run([CLANG_TIDY, "-p", self.build, "--quiet", path], cwd=ROOT, capture_output=True, text=True)
        if run.returncode == 0:
            self.stamp(path).write_text(json.dumps(known))
            return ""
        return run.stdout or run.stderr


def main() -> int:
    build, jobs, files = pathlib.Path(sys.argv[1]).resolve(), int(sys.argv[2]), [f for f in sys.argv[3:] if f.endswith(".cc")]
    started, linter = time.monotonic(), Linter(build)
    (build / "clean").mkdir(exist_ok=True)
    faulty = 0
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        for found in pool.map(linter.check, files):
            faulty += bool(found)
            print(found, end="", flush=True)
    print(f"clang-tidy: {len(files)} sources, {faulty} with findings, in {time.monotonic() - started:.0f} s")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
