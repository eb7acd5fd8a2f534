"""A script may end while a session is open and a thread still has it."""
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
