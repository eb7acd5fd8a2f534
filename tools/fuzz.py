#!/usr/bin/env python3
"""Runs the fuzzers of every decoder (fuzz/) and prints a table.

    python3 tools/fuzz.py BUILD [TARGET...]                      each corpus, then 2 seconds of new inputs
    python3 tools/fuzz.py BUILD --runs N [TARGET...]             N inputs each, and the lines of each decoder that they reached
    python3 tools/fuzz.py BUILD --runs N --uncovered [TARGET...] prints the lines that they have not reached, too
    python3 tools/fuzz.py BUILD --grow [TARGET...]               adds to fuzz/corpus what reaches more, from the seeds and BUILD/found

BUILD is the build directory with bin/orlop_fuzz. What a run has found is in BUILD/found/TARGET; an input that made a decoder fail is
BUILD/crash/TARGET-*, and goes to the corpus with the fix. Exits with 1 if a target has failed.
"""
from __future__ import annotations

import argparse
import concurrent.futures
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field

ROOT = pathlib.Path(__file__).resolve().parent.parent
CORPUS = ROOT / "fuzz" / "corpus"
SECONDS = 2
MOST_INPUTS = 64  # of a corpus in the tree
LLVM = "19"
ROW = "{:<14}{:>10}{:>9}{:>9}{:>8}   {}"


@dataclass(frozen=True)
class Part:
    """A decoder: a file, of it only some functions (by their names), or all but some that decode nothing."""
    file: str
    only: str = ""
    but: str = ""


# The target's decoders.
TARGETS: dict[str, list[Part]] = {
    "chunk": [Part("proto/chunk.cc")],
    "requests": [Part("proto/parse_bound.cc"), Part("server/job/manifest.cc"), Part("server/job/contributions.cc"),
                 Part("server/lanes/region.cc", but="ForAnAttempt"),
                 Part("server/job/optimizer_config.cc", but="StateName OptimizerOf"),
                 Part("server/runtime/step_scalars.cc", only="ContributionsPerElement ParseGroups ValuesOf")],
    "status": [Part("proto/status.cc")],
    "step_message": [Part("server/step/check.cc", but="CheckRecord CheckImage"),
                     Part("server/job/step_codec.cc", but="DetailOfStep ParseJobRecord ParseImage Serialize")],
    "record": [Part("server/job/step_codec.cc", only="ParseJobRecord"), Part("server/step/check.cc", only="CheckRecord")],
    "image": [Part("server/job/step_codec.cc", only="ParseImage"), Part("server/step/check.cc", only="CheckImage")],
    "definition": [Part("server/job/definition.cc"), Part("server/job/job_model.cc")],
    "scalars": [Part("server/runtime/step_scalars.cc", only="DecisionScalars::Parse FillCommitted")],
    "flush": [Part("server/durability/flush_codec.h"),
              Part("server/durability/flush.cc", but="WriteFlush WriteBulkValues KeepFlushes EraseFlushes Erasure"),
              Part("server/durability/flush_shard.cc", but="Write WriteBytes WriteGradient WriteLoad"),
              Part("server/shards/gradient_stage.cc", only="Holds CheckBytes Install"),
              Part("server/shards/load_stage.cc", only="Install")],
    "config": [Part("server/config.cc", but="ParseCommandLine SetParent")],
    "roles": [Part("server/services/roles.cc", but="RuleTable")],
    "safetensors": [Part("cli/safetensors.cc", but="FileError NameOf Header WriteAll SafetensorsWriter Write Close")],
}


@dataclass
class Result:
    target: str
    status: int = 0
    inputs: int = 0
    output: str = ""
    lines: int = 0
    reached: int = 0
    missed: list[str] = field(default_factory=list)


def functions(lines: list[str]) -> dict[int, str]:
    """The function around each line of a source that clang-format has laid out, by number from 1: `Parse` or `Access::Parse`."""
    found, name = {}, ""
    for number, line in enumerate(lines, 1):
        begin = re.match(r"(?=[A-Za-z]).*?([\w:~]+)\(", line)
        if begin and not line.startswith(("using", "namespace", "static_assert")):
            name = begin[1]
        found[number] = name
        if line.rstrip() in ("}", "};"):
            name = ""
    return found


def belongs(part: Part, name: str) -> bool:
    names = {name, *name.split("::")}
    if part.only:
        return bool(names & set(part.only.split()))
    return not names & set(part.but.split())


class Runner:
    def __init__(self, build: pathlib.Path, runs: int | None, seed: int):
        self.binary, self.build, self.runs, self.seed = build / "bin" / "orlop_fuzz", build, runs, seed
        for name in ("found", "crash", "profile"):
            (build / name).mkdir(parents=True, exist_ok=True)

    def start(self, target: str, *arguments: str, profile: str = "/dev/null", **variables: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "ORLOP_FUZZ": target, "LLVM_PROFILE_FILE": profile, **variables,
                       "ASAN_OPTIONS": "detect_stack_use_after_return=1:allocator_may_return_null=0",
                       "UBSAN_OPTIONS": "print_stacktrace=1"}
        return subprocess.run([self.binary, *arguments], env=environment, text=True, errors="replace", stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)

    def fuzz(self, target: str) -> Result:
        """Runs the corpus and then new inputs."""
        limit = f"-runs={self.runs}" if self.runs else f"-max_total_time={SECONDS}"
        with tempfile.TemporaryDirectory() as nowhere:
            found = self.build / "found" / target if self.runs else pathlib.Path(nowhere)
            found.mkdir(exist_ok=True)
            done = self.start(target, limit, "-max_len=4096", "-timeout=20", "-rss_limit_mb=2560", f"-seed={self.seed}",
                              "-print_final_stats=1", f"-artifact_prefix={self.build}/crash/{target}-", str(found),
                              str(CORPUS / target), profile=str(self.build / "profile" / target) if self.runs else "/dev/null")
        inputs = re.search(r"number_of_executed_units: (\d+)", done.stdout)
        return Result(target, done.returncode, int(inputs[1]) if inputs else 0, done.stdout)

    def measure(self, result: Result) -> None:
        """Counts the lines of the target's decoders that its inputs have reached."""
        raw = self.build / "profile" / result.target
        if not raw.exists():
            return
        subprocess.run([f"llvm-profdata-{LLVM}", "merge", "-sparse", raw, "-o", f"{raw}.data"], check=True)
        for part in TARGETS[result.target]:
            shown = subprocess.run([f"llvm-cov-{LLVM}", "show", self.binary, f"-instr-profile={raw}.data", "-show-instantiations=false",
                                    "-use-color=0", ROOT / part.file], check=True, text=True, stdout=subprocess.PIPE).stdout
            around = functions((ROOT / part.file).read_text().splitlines())
            for number, count, text in re.findall(r"^ *(\d+)\| *([\d.]+[kMGTE]?)\|(.*)$", shown, re.M):
                if not belongs(part, around[int(number)]):
                    continue
                result.lines += 1
                result.reached += count != "0"
                if count == "0":
                    result.missed.append(f"{part.file}:{number}:{text}")

    def grow(self, target: str) -> None:
        """Adds to the corpus in the tree those of the seeds and found inputs that reach more."""
        with tempfile.TemporaryDirectory() as seeds:
            self.start(target, ORLOP_FUZZ_SEEDS=seeds)
            corpus = CORPUS / target
            corpus.mkdir(parents=True, exist_ok=True)
            kept = set(corpus.iterdir())
            (self.build / "found" / target).mkdir(exist_ok=True)
            done = self.start(target, "-set_cover_merge=1", "-max_len=4096", "-use_counters=0", str(corpus), seeds,
                              str(self.build / "found" / target))
            if done.returncode != 0:
                sys.exit(done.stdout[-4000:])
            added = sorted((path for path in corpus.iterdir() if path not in kept), key=lambda path: path.stat().st_mtime_ns)
            for path in added[max(MOST_INPUTS - len(kept), 0):]:  # libFuzzer writes those that reach most first
                path.unlink()
            print(f"{target}: {len(list(corpus.iterdir()))} inputs, {sum(f.stat().st_size for f in corpus.iterdir())} bytes")


def print_table(results: list[Result]) -> None:
    print(ROW.format("fuzzed", "inputs", "lines", "reached", "%", "").rstrip())
    for result in results:
        lines = (result.lines, result.reached, f"{100 * result.reached / result.lines:.1f}") if result.lines else ("", "", "")
        failed = "" if result.status == 0 else "FAILED"
        print(ROW.format(result.target, result.inputs, *lines, failed).rstrip())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=pathlib.Path)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--runs", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--uncovered", action="store_true")
    parser.add_argument("--grow", action="store_true")
    arguments = parser.parse_intermixed_args()
    runner = Runner(arguments.build.resolve(), arguments.runs, arguments.seed)
    targets = arguments.targets or list(TARGETS)
    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        if arguments.grow:
            list(pool.map(runner.grow, targets))
            return 0
        results = list(pool.map(runner.fuzz, targets))
    for result in results:
        if result.status != 0:
            print(f"{result.target}:\n{result.output[-8000:]}")
        elif arguments.runs:
            runner.measure(result)
    print_table(results)
    if arguments.uncovered:
        print("\n".join(line for result in results for line in result.missed))
    return 1 if any(result.status for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
