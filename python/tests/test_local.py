"""Servers of orlop.local() that take long to write their state: nobody kills them, and the next run waits for them."""

import contextlib
import fcntl
import importlib
import os
import signal

import pytest
import torch

import orlop
from conftest import train_step

module = importlib.import_module("orlop.local")  # orlop.local is the function


def test_a_rerun_waits_for_the_servers_of_the_run_before_and_says_so(tmp_path, monkeypatch):
    orlop.local(directory=tmp_path, memory="64MiB").close()
    monkeypatch.setattr(module, "QUIET_SECONDS", 0.0, raising=False)
    said = []
    with open(tmp_path / "s0" / "LOCK") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)

        def say(text, **options):
            said.append(text)
            fcntl.flock(lock, fcntl.LOCK_UN)
        monkeypatch.setattr(module, "print", say, raising=False)
        with orlop.local(directory=tmp_path, memory="64MiB") as session:
            assert session.status()["servers"][0]["ready"]
    assert str(tmp_path / "s0") in said[0]


def test_a_directory_in_use_is_an_error_after_start_seconds(tmp_path):
    with orlop.local(directory=tmp_path, memory="64MiB"), pytest.raises(orlop.Unavailable, match="in use by process"):
        orlop.local(directory=tmp_path, memory="64MiB", start_seconds=3.0)


def test_killed_servers_go_back_to_the_last_checkpoint(tmp_path, make_net, batches):
    """The servers of a run are killed. The next run on their directory goes on from the checkpoint, as a run does that was never there."""
    def train(directory, steps, checkpoint=None):
        with contextlib.suppress(orlop.Unavailable), orlop.local(directory=directory, servers=2, memory="64MiB") as session:
            net = session.bind(make_net())
            optimizer = orlop.AdamW(net.parameters())
            net(batches[0][0])  # joins
            first = session.step
            for batch in batches[first:steps]:
                train_step(net, optimizer, batch)
                if session.step == checkpoint:
                    assert session.checkpoint() == checkpoint
            weights = [parameter.detach().clone() for parameter in net.parameters()]
            if checkpoint is not None:
                for server in session._servers._children:
                    server.kill()
            return first, weights

    _, expected = train(tmp_path / "undisturbed", 4)
    train(tmp_path / "killed", 3, checkpoint=2)
    first, weights = train(tmp_path / "killed", 4)
    assert first == 2
    for mine, theirs in zip(weights, expected):
        assert torch.equal(mine, theirs)


def test_stop_waits_for_servers_that_write_their_state_and_says_so(tmp_path, monkeypatch):
    session = orlop.local(directory=tmp_path, memory="64MiB")
    (server,) = session._servers._children
    for name in ("QUIET_SECONDS", "STOP_SECONDS"):
        monkeypatch.setattr(module, name, 0.1, raising=False)
    said = []

    def say(text, **options):
        said.append(text)
        os.kill(server.pid, signal.SIGCONT)
    monkeypatch.setattr(module, "print", say, raising=False)
    os.kill(server.pid, signal.SIGSTOP)
    session._servers.stop()
    assert server.returncode == 0 and str(tmp_path / "s0") in said[0]
    session.close()
