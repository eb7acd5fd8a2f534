"""Memory of a worker's heap: gradients use again the memory that gradients of the step before have freed."""
import os
import pathlib
import platform
import subprocess
import sys

import pytest

SCRIPT = """
import re
import orlop, torch
LAYERS, WIDTH = 24, 2048

def heap_bytes():
    is_heap, found = False, 0
    for line in open("/proc/self/smaps"):
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            is_heap = line.rstrip().endswith("[heap]")
        elif is_heap and line.startswith("Rss:"):
            found += int(line.split()[1]) << 10
    return found

torch.manual_seed(0)
layers = torch.nn.ModuleList(torch.nn.Linear(WIDTH, WIDTH, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS))
with orlop.local(servers=2, memory="512MiB") as session:
    session.bind(layers)
    optimizer = orlop.AdamW(layers.parameters(), lr=1e-4)
    before = heap_bytes()
    for step in range(4):
        values = torch.randn(4, WIDTH, dtype=torch.bfloat16)
        for layer in layers:
            values = values + layer(values) / LAYERS
        values.float().square().mean().backward()
        print((heap_bytes() - before) / (2 * LAYERS * WIDTH**2), flush=True)
        optimizer.step()
        optimizer.zero_grad()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the heap is not glibc's")
def test_the_heap_has_one_set_of_gradients(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    run = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True,
                         env=os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])})
    sets = [float(line) for line in run.stdout.split()]
    print("gradients in the heap after each backward, in sets:", *(f"{found:.2f}" for found in sets))
    if sets[0] < 0.9:
        pytest.skip("gradients are not in the heap (the environment sets MALLOC_MMAP_THRESHOLD_, or another malloc is loaded)")
    assert sets[-1] < 1.6  # 2.0 to 2.1 if the heap is not trimmed
