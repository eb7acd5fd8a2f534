#!/usr/bin/env python3
"""Prints registers, shared memory and spills of every CUDA kernel: `make cuda-report`.

Compiles each .cu file of a build directory again with its own command, and reads the output of ptxas.
"""

import json
import pathlib
import re
import shlex
import subprocess
import sys
import time

KERNEL = re.compile(r"Compiling entry function '\S*?cuda\d+([a-z0-9_]+?)10StepBlocks\S*' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers.*?(\d+) bytes smem")
ROW = "{:14} {:>8} {:>10} {:>13} {:>13} {:>12}"


def compile_verbosely(entry: dict) -> str:
    """Return ptxas' report of one file; its object is discarded."""
    words = shlex.split(entry["command"])
    words[words.index("-o") + 1] = "/dev/null"
    nvcc = next(i for i, word in enumerate(words) if pathlib.Path(word).name == "nvcc")
    run = subprocess.run(words[nvcc:] + ["-Xptxas=-v"], cwd=entry["directory"], check=True,
                         capture_output=True, text=True)
    return run.stderr


def main() -> None:
    build = pathlib.Path(sys.argv[1])
    entries = json.loads((build / "compile_commands.json").read_text())
    entries = [entry for entry in entries if entry["file"].endswith(".cu")]
    if not entries:
        sys.exit(f"{build} has no CUDA kernels: CMake says why when it configures")
    print(ROW.format("kernel", "machine", "registers", "shared bytes", "spill stores", "spill loads"))
    began = time.monotonic()
    for entry in entries:
        report = compile_verbosely(entry)
        for (name, machine), spills, used in zip(
                KERNEL.findall(report), SPILLS.findall(report), USED.findall(report), strict=True):
            print(ROW.format(name, machine, used[0], used[1], *spills), flush=True)
    print(f"{len(entries)} files compiled in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
