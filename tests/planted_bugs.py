#!/usr/bin/env python3
"""Shows that the simulator can fail: plants each bug of tests/planted/ and finds a seed that catches it.

For every patch, the step machine is copied to a temporary directory, patched, and compiled with the simulator. The seed that
tests/planted/seeds.txt notes for the bug runs first. If its schedule does not fail, or with --search, schedules run from seed 1 until one
fails. Prints the seed and the failure. Exits with 1 if a patch no longer applies, does not compile, or is not caught, or if the unpatched
code fails.

    python3 tests/planted_bugs.py [--search] [--note] [NAME ...]     --note writes the seeds into the file
"""

import argparse
import concurrent.futures
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
PATCHES = ROOT / "tests" / "planted"
SEEDS = PATCHES / "seeds.txt"
SCHEDULES = 400_000  # a bug that survives four times the ordinary run is not caught
UNPATCHED_SCHEDULES = 2_000
CXX = (["ccache"] if shutil.which("ccache") else []) + [os.environ.get("CXX", "g++")]
FLAGS = ["-std=c++20", "-O1", "-w", "-I."]
LIBRARIES = [
    "-labsl_statusor", "-labsl_status", "-labsl_cord", "-labsl_str_format_internal", "-labsl_strings",
    "-labsl_throw_delegate", "-labsl_int128", "-labsl_base", "-labsl_raw_logging_internal", "-lxxhash",
]


def run(command, where):
    """Run a command in a directory; return (exit status, output)."""
    done = subprocess.run(command, cwd=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return done.returncode, done.stdout.strip()


def copy_sources(where):
    """Copy the step machine and the simulator, without tests; return the .cc files to compile."""
    base = where / "base"
    step = where / "server" / "step"
    tests = where / "tests"
    for folder in (base, step, tests):
        folder.mkdir(parents=True)
    for path in ("box.h", "box.cc", "checksum.h", "checksum.cc"):
        shutil.copy(ROOT / "base" / path, base)
    for path in (ROOT / "server" / "step").iterdir():
        if path.suffix in (".h", ".cc") and not path.stem.endswith("_test"):
            shutil.copy(path, step)
    for pattern in ("oracle*", "simulat*"):
        for path in (ROOT / "tests").glob(pattern):
            if path.suffix in (".h", ".cc") and not path.stem.endswith("_test"):
                shutil.copy(path, tests)
    return sorted(path.relative_to(where) for path in where.rglob("*.cc"))


def object_of(source):
    return pathlib.Path(source.stem + ".o")


def compile_one(source, where):
    return run([*CXX, *FLAGS, "-c", str(source), "-o", str(object_of(source))], where)


def noted_seeds():
    """The seed that caught each bug when it was last searched for, by the name of the bug."""
    lines = SEEDS.read_text().split("\n") if SEEDS.exists() else []
    return {name: int(seed) for name, seed in map(str.split, filter(None, lines))}


def link_and_run(where, objects, seeds, schedules):
    """Run single seeds, then schedules from seed 1, until one fails.

    Return (exit status, output) of the simulator that failed or was the last, or of the linker.
    """
    status, output = run([*CXX, *map(str, objects), *LIBRARIES, "-o", "simulator"], where)
    if status != 0:
        return 2, output
    for seed in seeds:
        status, output = run(["./simulator", str(seed), "1"], where)
        if status != 0:
            return status, output
    return run(["./simulator", "1", str(schedules)], where)


def plant(patch, base, sources, seeds):
    """Plant one bug; return (caught, line to print)."""
    with tempfile.TemporaryDirectory(prefix="orlop-planted-") as name:
        where = pathlib.Path(name)
        copy_sources(where)
        # One line of context on each side is enough, because the code around a bug may change while the bug does not.
        status, output = run(["git", "apply", "-C1", str(patch)], where)
        if status != 0:
            return False, f"{patch.stem}: the patch no longer applies:\n{output}"
        changed = [s for s in sources if (where / s).read_bytes() != (base / s).read_bytes()]
        if not changed:
            return False, f"{patch.stem}: the patch changes no source"
        objects = []
        for source in sources:
            if source in changed:
                status, output = compile_one(source, where)
                if status != 0:
                    return False, f"{patch.stem}: does not compile:\n{output}"
                objects.append(object_of(source))
            else:
                objects.append(base / object_of(source))
        status, output = link_and_run(where, objects, seeds, SCHEDULES)
        if status == 1:
            return True, f"{patch.stem}: caught by {output}"
        return False, f"{patch.stem}: NOT CAUGHT: {output}"


def note(lines):
    """Write the seeds of caught bugs into the file, those of others as they were."""
    found = {m[1]: int(m[2]) for m in (re.match(r"(\w+): caught by seed (\d+) ", line) for line in lines) if m}
    seeds = {name: seed for name, seed in (noted_seeds() | found).items() if (PATCHES / f"{name}.patch").exists()}
    SEEDS.write_text("".join(f"{name} {seed}\n" for name, seed in sorted(seeds.items())))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--search", action="store_true", help="from seed 1, whatever is noted")
    parser.add_argument("--note", action="store_true", help=f"write the seeds into {SEEDS.relative_to(ROOT)}")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args()
    patches = [p for p in sorted(PATCHES.glob("*.patch")) if not options.names or p.stem in options.names]
    if not patches:
        print(f"no patch in {PATCHES} has such a name")
        return 1
    noted = noted_seeds()
    with tempfile.TemporaryDirectory(prefix="orlop-planted-") as name, \
            concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        base = pathlib.Path(name)
        sources = copy_sources(base)
        for status, output in pool.map(lambda source: compile_one(source, base), sources):
            if status != 0:
                print(output)
                return 1
        status, output = link_and_run(base, [object_of(s) for s in sources], sorted(set(noted.values())), UNPATCHED_SCHEDULES)
        print(f"without a bug: {output}", flush=True)
        if status != 0:
            return 1

        def plant_one(patch):
            seeds = [noted[patch.stem]] if patch.stem in noted and not options.search else []
            return plant(patch, base, sources, seeds)

        lines = []
        for is_caught, line in pool.map(plant_one, patches):
            print(line, flush=True)
            lines.append(line if is_caught else "")
    caught = len([line for line in lines if line])
    if options.note:
        note(lines)
    print(f"{caught} of {len(patches)} planted bugs caught")
    return 0 if caught == len(patches) else 1


if __name__ == "__main__":
    sys.exit(main())
