"""Fixtures of the whole-system tests: real orlopd processes in temporary directories.

Slow tests (long forms of others) run with --slow, or if named: `pytest tests/test_memory.py::test_name` or `-k name`.
"""
import itertools
import os
import pathlib
import random
import subprocess
import tempfile

import pytest

from clusters import Cluster

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the long forms")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: long form of a test; runs with --slow or when named")


def pytest_collection_modifyitems(config, items):
    named = config.getoption("-k") or config.getoption("-m") or any("::" in argument for argument in config.args)
    if config.getoption("--slow") or named:
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if item not in slow]


@pytest.fixture(scope="session")
def bin_dir():
    """Return the directory of orlopd and orlop."""
    directory = pathlib.Path(os.environ.get("ORLOP_BIN_DIR", ROOT / "build" / "release" / "bin"))
    for name in ("orlopd", "orlop"):
        if not (directory / name).exists():
            pytest.exit(f"{directory / name} does not exist: run `make` first, or set ORLOP_BIN_DIR", returncode=2)
    return directory


@pytest.fixture
def seed(request):
    """Return a seed that is printed with a failure. ORLOP_TEST_SEED sets it."""
    value = int(os.environ.get("ORLOP_TEST_SEED", random.SystemRandom().randrange(2**32)))
    request.node.add_report_section("setup", "seed", f"ORLOP_TEST_SEED={value}")
    return value


def cluster_maker(bin_dir):
    """Return make(count, ...) -> a started Cluster. All clusters are closed at the end."""
    made = []

    def make(count=1, start=True, **options):
        # Not pytest's tmp_path, because a Unix socket's path has at most 107 bytes.
        made.append(Cluster(bin_dir / "orlopd", tempfile.mkdtemp(prefix="orlop-test-"), count, **options))
        return made[-1].start() if start else made[-1]

    yield make
    for cluster in made:
        cluster.close()


make_cluster = pytest.fixture(cluster_maker)
make_module_cluster = pytest.fixture(cluster_maker, scope="module")


@pytest.fixture
def small_disk(tmp_path):
    """Return mount(size), which makes a file system of that size in a mount namespace of its own, without privileges."""
    holders = []

    def mount(size):
        path = tmp_path / f"disk-{len(holders)}"
        path.mkdir()
        script = f"mount -t tmpfs -o size={size} tmpfs '{path}' && echo mounted && exec cat"
        namespaces = ["--mount"] if os.geteuid() == 0 else ["--mount", "--user", "--map-root-user"]
        holder = subprocess.Popen(["unshare", *namespaces, "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                  stderr=subprocess.PIPE, text=True)
        holders.append(holder)
        if holder.stdout.readline() != "mounted\n":
            pytest.skip(f"a file system of limited size needs the right to mount, or a user namespace: {holder.stderr.read().strip()}")
        return pathlib.Path(f"/proc/{holder.pid}/root{path}")  # the path as the holder sees it

    yield mount
    for holder in holders:
        holder.communicate()  # it ends when its input does


_job_numbers = itertools.count()


@pytest.fixture
def job_name(request):
    """Return a name that no other test uses."""
    return f"{request.node.originalname}-{next(_job_numbers)}"
