"""`bench/memory.py` counts what processes take: it is right about memory that is known, and it runs at a small size."""
import mmap
import os
import pathlib
import subprocess
import sys
import threading

import pytest

orlop = pytest.importorskip("orlop", reason="the Python package orlop is not built: run `make test`")

from bench import memory, memory_report  # noqa: E402

ROOT = pathlib.Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- bench-memory: begin -->", "<!-- bench-memory: end -->"
MIB = 1 << 20
HOLDER = """
import mmap, os, sys
for line in sys.stdin:
    kind, mebibytes = line.split()
    size = int(mebibytes) << 20
    if kind == "private":
        held = bytearray(b"x") * size
    elif kind == "free":
        held = None
    else:
        fd = os.memfd_create("held")
        os.ftruncate(fd, size)
        shared = mmap.mmap(fd, size)
        shared[:] = b"x" * size
        if kind == "unmapped":
            shared.close()
    print("done", flush=True)
"""


@pytest.fixture
def holder():
    """A function that has another process take memory of a kind."""
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        def hold(kind, mebibytes):
            print(kind, mebibytes, file=process.stdin, flush=True)
            assert process.stdout.readline() == "done\n"
        hold("free", 0)
        hold.pid = process.pid
        yield hold
        process.stdin.close()


@pytest.mark.parametrize("place", ["worker", "servers"])
@pytest.mark.parametrize("kind", ["private", "shared", "unmapped"])
def test_memory_of_each_kind_is_counted_where_it_is(holder, kind, place):
    watch = memory.Watch(holder.pid, [os.getpid()]) if place == "worker" else memory.Watch(os.getpid(), [holder.pid])
    holder(kind, 48)
    expected = {name: 0 for name in memory_report.PARTS}
    expected["shared memory that nobody maps" if kind == "unmapped" else place] = 48 * MIB
    for (name, bytes_of), found in zip(expected.items(), watch.look()):
        assert abs(found - bytes_of) < 4 * MIB, name


def test_memory_that_two_processes_map_is_counted_once(holder):
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, 48 * MIB)
    watch = memory.Watch(holder.pid, [os.getpid()])
    with mmap.mmap(descriptor, 48 * MIB) as shared:
        shared[:] = b"x" * (48 * MIB)
        assert abs(sum(watch.look()) - 48 * MIB) < 4 * MIB
        (go, gone), (done, has_done) = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            os.read(go, 1)
            _ = shared[::4096]
            os.write(has_done, b"x")
            os.read(go, 1)  # until it is killed
        try:
            two = memory.Watch(child, [os.getpid()])
            os.write(gone, b"x")
            os.read(done, 1)
            worker, servers, unmapped = two.look()
            assert worker > 20 * MIB and servers < -20 * MIB, "half of each page moves from one process to the other"
            assert abs(worker + servers + unmapped) < 4 * MIB
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)
            for end in (go, gone, done, has_done, descriptor):
                os.close(end)


def test_the_peak_is_found_after_it_has_gone(holder):
    watch, is_over, highest = memory.Watch(holder.pid, [os.getpid()]), threading.Event(), []
    watching = threading.Thread(target=lambda: highest.extend(watch.highest(is_over)))
    watching.start()
    holder("private", 64)
    threading.Event().wait(0.2)
    holder("free", 0)
    threading.Event().wait(0.2)
    is_over.set()
    watching.join()
    assert 60 * MIB < sum(highest) < 140 * MIB  # a bytearray may be copied while it is made
    assert sum(watch.look()) < 8 * MIB


@pytest.mark.parametrize("model", memory.MODELS)
def test_models_have_200_million_parameters(model):
    import torch
    make_model, sizes = memory.MODELS[model]
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in make_model(**sizes).parameters())
    assert abs(count / 200e6 - 1) < 0.01


def test_a_small_run_is_written_between_the_markers(bin_dir, tmp_path):
    results, chart = tmp_path / "RESULTS.md", tmp_path / "memory.png"
    original = (ROOT / "bench/RESULTS.md").read_text()
    results.write_text(original)
    ways = ["Orlop bf16", "torch fp32", "bitsandbytes bf16"]
    run = subprocess.run([sys.executable, "-m", "bench.memory", "--models", "square", "--layers", "4", "--rounds", "1", "--steps", "2",
                          "--ways", *ways, "--results", results, "--chart", chart], cwd=ROOT, check=True, text=True, capture_output=True,
                         env=os.environ | {"ORLOP_BIN_DIR": str(bin_dir)})
    before, rest = results.read_text().split(BEGIN)
    written, after = rest.split(END)
    assert (before, after) == (original.split(BEGIN)[0], original.split(END)[1])
    assert "(memory.png)" in written and chart.read_bytes().startswith(b"\x89PNG")
    rows = {cells[1].strip(): cells[2:] for line in written.splitlines() if len(cells := line.split("|")) > 3}
    for way in ways:
        assert way in rows or f"\n{way} skipped: " in written, run.stdout
    # 16.8 M parameters: weights, gradients and two moments of 4 bytes, and what libraries take at their first use
    assert 16 < float(rows["torch fp32"][3]) < 40
    at_rest, limit, verdict = rows["Orlop bf16"][7:10]
    assert 6.0 < float(at_rest) < 6.6 and limit.strip() == f"at most {memory_report.MOST_AT_REST}"
    assert verdict.strip() in ("met", "missed")


def test_figures_are_medians_and_limits_are_compared():
    runs = [{"peak": [40, 60, extra], "rest": [0, 60, 0], "parameters": 10} for extra in (0, 10, 50)]
    result = memory_report.figures(runs)
    assert (result.low, result.peak, result.high, result.rest) == (10.0, 11.0, 15.0, 6.0)
    text = memory_report.markdown({"square": {"Orlop bf16": runs, "bitsandbytes bf16": [{"skipped": "no such module"}]}})
    assert "| 11.00 | 10.00 to 15.00 | at most 10.8 | missed | 6.00 | at most 6.2 | met |" in text
    assert "bitsandbytes bf16 skipped: no such module" in text
