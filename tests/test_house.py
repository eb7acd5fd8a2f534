"""tools/house.py finds no fault in this tree, and finds each fault that tests/planted_house/ plants into a copy of it."""
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))
import house  # noqa: E402 -- tools/ is no package

PATCHES = ROOT / "tests" / "planted_house"

FOUND = {
    "inner_header": "cli/planted.cc:2: includes client/session_core.h: an inner part of client, whose doors are: client session",
    "upward_include": "server/step/planted.cc:2: includes server/job/job_model.h: goes up: server/job is above server/step",
    "file_without_target": "tests/planted_main.cc:1: is in no target of CMakeLists.txt",
    "python_circle": "python/orlop/even.py:1: imports form a circle: orlop.even -> orlop.odd -> orlop.even",
}
# Sources that a build leaves out: other projects and programs, and parts that need nvcc, clang or the Python preset.
NOT_ALWAYS_BUILT = {"examples/cpp/least_squares.cc", "tests/simulator_main.cc", "kernels/cuda/step.cc", "kernels/cuda/device_test.cc",
                    *(path.relative_to(ROOT).as_posix() for path in ROOT.glob("fuzz/*.cc"))}


def faults(root):
    """Lines that the checker of a tree prints."""
    run = subprocess.run([sys.executable, root / "tools" / "house.py", root], capture_output=True, text=True)
    assert run.stderr == ""
    lines = run.stdout.splitlines()
    assert run.returncode == (1 if lines else 0)
    return lines


@pytest.fixture
def copy(tmp_path):
    ignored = shutil.ignore_patterns(".*", "build", "dist", "__pycache__", "*.so", "demo-out", "state")
    return pathlib.Path(shutil.copytree(ROOT, tmp_path / "copy", ignore=ignored))


def test_this_tree_keeps_to_the_table():
    assert faults(ROOT) == []


def test_every_patch_has_its_message():
    assert {path.stem for path in PATCHES.glob("*.patch")} == set(FOUND)


@pytest.mark.parametrize("name", sorted(FOUND))
def test_a_planted_fault_is_found(name, copy):
    before = faults(copy)
    subprocess.run(["git", "apply", PATCHES / f"{name}.patch"], cwd=copy, check=True)
    assert [line for line in faults(copy) if line not in before] == [FOUND[name]]


def test_the_build_compiles_every_source():
    """The checker derives targets from CMakeLists.txt; CMake's own list, after a build, confirms them."""
    build = pathlib.Path(os.environ.get("ORLOP_BIN_DIR", ROOT / "build" / "release" / "bin")).resolve().parent
    commands = build / "compile_commands.json"
    if not commands.exists():
        pytest.skip(f"{commands} does not exist: run `make` first")
    compiled = {pathlib.Path(command["file"]) for command in json.loads(commands.read_text())}
    sources = {ROOT / path for path in house.tree(ROOT) if path.endswith(".cc")}
    if not any("python/core" in str(path) for path in compiled):   # configured without the extension
        sources -= set(ROOT.glob("python/core/*.cc"))
    left_out = {path.relative_to(ROOT).as_posix() for path in sources - compiled}
    assert left_out <= NOT_ALWAYS_BUILT
