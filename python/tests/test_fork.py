"""A process with a session may fork: the child ends as it would without one, and the parent goes on."""

import subprocess
import sys

import pytest

HEAD = """
import gc, os, subprocess, sys, threading
import torch, orlop
from orlop import kernels

torch.set_num_threads(1)  # threads of OpenMP, and so torch's large operations, do not survive a fork
session = orlop.local(memory="256MiB")
model = session.bind(torch.nn.Linear(4, 2))
optimizer = orlop.AdamW(model.parameters(), **OPTIONS)


def backward():
    optimizer.zero_grad()
    model(torch.ones(3, 4)).sum().backward()


def status_of(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


backward()
optimizer.step()
"""

ENDS = [
    ("os._exit(3)", 3),
    ("sys.exit(3)", 3),
    ("session.close()", 0),
    ("session.__exit__(None, None, None); sys.exit(3)", 3),
    ("del session, model, optimizer, entry; gc.collect(); sys.exit(3)", 3),
    ("model(torch.ones(1, 4)); plain(torch.ones(1, 4)).sum().backward(); torch.optim.SGD(plain.parameters()).step(); sys.exit(3)", 3),
    ("kernels.squared_norm(torch.ones(1 << 20), threads=2); sys.exit(3)", 3),
    ("raise SystemExit('in a child')", 1)]

USES = ["session.step", "session.status()", "session.get('weight')", "session.store(model)", "session.checkpoint()", "session.export('x')",
        "optimizer.step()", "optimizer.state_dict(full=True)", "orlop.connect(session.address)", "orlop.local()"]


def run(script, options="{}"):
    """The script's status, lines and errors. It is waited for no longer than a test may take."""
    ended = subprocess.run([sys.executable, "-c", script.replace("OPTIONS", options)], capture_output=True, text=True, timeout=220)
    return ended.returncode, ended.stdout.splitlines(), ended.stderr


@pytest.mark.parametrize("options", ["{}", "{'overlap': 'backward', 'accumulation_steps': 1}"], ids=["plain", "overlap"])
def test_children_end_and_their_parent_goes_on(options):
    """With overlap, pushes are under way at the fork."""
    script = HEAD + f"""
entry, plain = optimizer._job.entries[0], torch.nn.Linear(4, 2)
kernels.squared_norm(torch.ones(1 << 20), threads=2)
for end, status in {ENDS!r}:
    backward()
    child = os.fork()
    if not child:
        exec(end)
        sys.exit(0)
    ended = status_of(child)
    if ended != status:
        print(end, ended)
    optimizer.step()
print(session.step, session.get("weight").equal(model.weight))
session.close()
"""
    returned, lines, errors = run(script, options)
    assert (returned, lines, errors) == (0, [f"{1 + len(ENDS)} True"], "in a child\n")


def test_a_session_says_in_a_child_whose_it_is():
    script = HEAD + f"""
backward()
before = model.weight.detach().clone()
child = os.fork()
if not child:
    for use in {USES!r}:
        try:
            exec(use)
            print(use, "worked")
        except RuntimeError as error:
            told = f"the session belongs to process {{os.getppid()}}, " in str(error) and "orlop.connect(" in str(error)
            print(*([] if told else [use, error]), end="")
    print(torch.equal(before, model.weight), flush=True)
    sys.exit(3)
print(status_of(child))
optimizer.step()
print(session.step)
session.close()
"""
    assert run(script) == (0, ["True", "3", "2"], "")


def test_a_step_in_another_thread_survives_forks():
    script = HEAD + """
running, children = True, []
def train():
    while running:
        backward()
        optimizer.step()
thread = threading.Thread(target=train)
thread.start()
for _ in range(4):
    child = os.fork()
    if not child:
        sys.exit(3)
    children.append(child)
print([status_of(child) for child in children])
running = False
thread.join()
print(optimizer.state[model.weight]["step"].item() == session.step)
session.close()
"""
    assert run(script) == (0, [str([3] * 4), "True"], "")


def test_loaders_and_processes_that_fork_leave_training_alone():
    script = HEAD + """
import multiprocessing
data = torch.utils.data.TensorDataset(torch.ones(8, 4))
for (batch,) in torch.utils.data.DataLoader(data, batch_size=2, num_workers=2, multiprocessing_context="fork"):
    optimizer.zero_grad()
    model(batch).sum().backward()
    optimizer.step()
subprocess.run(["true"], check=True)
process = multiprocessing.get_context("fork").Process(target=lambda: sys.exit(int(model.weight.isfinite().sum())))
process.start()
process.join()
print(process.exitcode, session.step)
session.close()
"""
    assert run(script) == (0, ["8 5"], "")
