"""A script may end while a session is open, whoever holds it."""

import contextlib
import os
import select
import subprocess
import sys

import pytest

SCRIPT = """
import threading, time
import torch, orlop

session = orlop.local(memory="256MiB")
model = session.bind(torch.nn.Linear(4, 2))
optimizer = orlop.AdamW(model.parameters())
model(torch.ones(1, 4)).sum().backward()
optimizer.step()
ran = threading.Event()


def hold(session, optimizer):
    ran.set()
    while True:
        time.sleep(60)


def call(session, optimizer):
    while True:
        session.status()
        ran.set()


def call_for_a_while(session, optimizer):
    ran.set()
    for _ in range(20):
        session.status()


threading.Thread(target=THREAD, args=(session, optimizer), daemon=DAEMON).start()
ran.wait()
print("last line")
"""


@pytest.mark.parametrize(("thread", "daemon"), [("hold", True), ("call", True), ("call_for_a_while", False)])
def test_a_script_that_ends_with_a_session_and_a_thread_ends_quietly(thread, daemon):
    """A thread that Python stops in a call aborts the process unless the extension holds it; what its frames have is no leak."""
    script = SCRIPT.replace("THREAD", thread).replace("DAEMON", str(daemon))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=220)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "last line\n", "")


HELD = """
import atexit, builtins, sys
import torch, orlop

session = orlop.local(memory="256MiB")
model = session.bind(torch.nn.Linear(4, 2))
optimizer = orlop.AdamW(model.parameters(), overlap="backward", accumulation_steps=1)


def train():
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    model(torch.ones(1, 4)).sum().backward()  # pushes are under way at the end


train()
print(session._servers._children[0].pid, session._servers._sockets, flush=True)
"""

HOLDERS = """
circle = [session, optimizer]
circle.append(circle)
builtins.kept = torch.kept = circle  # of modules that end late
try:
    optimizer.add_param_group({"params": []})
except RuntimeError as error:
    kept = error  # its traceback has frames of the optimizer
atexit.register(print, "last line")
"""


@pytest.mark.parametrize(("ending", "status", "last"), [
    (HOLDERS, 0, []), (HOLDERS + "sys.exit(5)", 5, []),
    ("def main():\n    mine = session, optimizer\n    raise ValueError('uncaught')\nmain()", 1, ["ValueError: uncaught"])],
    ids=["end", "exit", "raise"])
def test_a_process_that_holds_a_session_ends_as_without_one_and_its_servers_end(ending, status, last):
    ended = subprocess.run([sys.executable, "-c", HELD + ending], capture_output=True, text=True, timeout=220)
    assert (ended.returncode, ended.stderr.splitlines()[-1:]) == (status, last)
    server, sockets = ended.stdout.splitlines()[0].split()
    assert not os.path.exists(sockets)
    with contextlib.suppress(ProcessLookupError):  # if it has ended already
        select.select([os.pidfd_open(int(server))], [], [])
