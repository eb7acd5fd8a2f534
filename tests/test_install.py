"""Both ways to install: cmake --install, with a C++ project that finds the client by find_package(orlop), and pip install."""
import os
import pathlib
import subprocess
import sys

import pytest
import torch

ROOT = pathlib.Path(__file__).resolve().parent.parent

EXAMPLE = ROOT / "examples" / "cpp"


# Runs a command and returns its standard output. Fails with all of its output unless it exits with 0 within `timeout` seconds.
def run(*command, timeout=600, **options):
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=timeout, **options)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# The CMake build directory that the tests use: the parent of ORLOP_BIN_DIR, by default build/release.
@pytest.fixture(scope="module")
def build_dir(request):
    directory = pathlib.Path(os.environ.get("ORLOP_BIN_DIR", ROOT / "build" / "release" / "bin")).resolve().parent
    if not (directory / "CMakeCache.txt").exists():
        pytest.skip(f"{directory} is not a CMake build directory: nothing to install from")
    return directory


def files_under(directory):
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file() or path.is_symlink())


def test_installed_client_builds_another_project_and_uninstall_leaves_nothing(build_dir, make_cluster, tmp_path):
    prefix = tmp_path / "prefix"
    # CMake overwrites the build directory's list of installed files. An earlier installation of the developer needs its own list back.
    manifest = build_dir / "install_manifest.txt"
    before = manifest.read_bytes() if manifest.exists() else None
    run("cmake", "--install", build_dir, "--prefix", prefix)
    try:
        installed = files_under(prefix)
        assert {"bin/orlopd", "bin/orlop"} <= set(installed)
        assert run(prefix / "bin" / "orlopd", "--version").startswith("orlopd ")
        run("cmake", "-S", EXAMPLE, "-B", tmp_path / "build", "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}",
            "-DCMAKE_BUILD_TYPE=Release")
        cache = (tmp_path / "build" / "CMakeCache.txt").read_text()
        assert f"orlop_DIR:PATH={prefix}" in cache, "the example must find the installed package"
        run("cmake", "--build", tmp_path / "build")
        programs = [path for path in (tmp_path / "build").iterdir() if path.is_file() and os.access(path, os.X_OK)]
        assert len(programs) == 1, programs
        cluster = make_cluster(2)
        assert "step 200" in run(programs[0], cluster.address)
        assert str(prefix) not in "".join(installed)
    finally:
        run("cmake", "--build", build_dir, "--target", "uninstall")
        if before is None:
            manifest.unlink()
        else:
            manifest.write_bytes(before)
    assert files_under(prefix) == []


# Runs in the installed package's environment. It checks that module, extension and programs are the installed ones, and trains 3 steps.
TRAINING = """
import pathlib, sys, torch, orlop
from orlop.local import find_binary
for path in (orlop.__file__, orlop._core.__file__, find_binary("orlopd"), find_binary("orlop")):
    assert pathlib.Path(path).is_relative_to(sys.prefix), path
assert (pathlib.Path(orlop.__file__).parent / "py.typed").exists()
with orlop.local(servers=2, memory="64MiB") as session:
    model = session.bind(torch.nn.Linear(8, 4))
    optimizer = orlop.AdamW(model.parameters())
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
    session.export("model.safetensors")
    print("step", session.step)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pip_installs_a_package_that_trains_outside_the_repository(tmp_path):
    """A new virtual environment with the package trains in an empty directory. The package is built from the sources, as a user would.

    Torch and the other dependencies come from the running environment through torch.pth, because a download of them would test nothing.
    """
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    site = run(python, "-c", "import site; print(site.getsitepackages()[0])").strip()
    pathlib.Path(site, "torch.pth").write_text(str(pathlib.Path(torch.__file__).parents[1]))
    run(python, "-m", "pip", "install", "--no-deps", ROOT, timeout=3600)
    environment = {name: value for name, value in os.environ.items() if name not in ("ORLOP_BIN_DIR", "PYTHONPATH")}
    assert "step 3" in run(python, "-c", TRAINING, cwd=tmp_path, env=environment)
    assert (tmp_path / "model.safetensors").exists()
    assert run(tmp_path / "venv" / "bin" / "orlopd", "--version").startswith("orlopd ")
