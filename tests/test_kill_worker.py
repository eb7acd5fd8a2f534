"""Workers that die, fail or change their mind during a step. The final state equals that of an undisturbed run, bit for bit."""
import multiprocessing
import os
import random
import signal
import time
from multiprocessing import forkserver

import pytest

import training_process
from plain_client import PlainJob

STEPS = 12
PATIENCE_SECONDS = 120


@pytest.fixture(scope="module")
def processes():
    """Return a function that starts training processes from a server process that has already imported torch."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training_process"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.path.dirname(training_process.__file__))  # its only sys.path before Python 3.13
        forkserver.ensure_running()
    return context


def start(processes, function, *arguments, **options):
    here, there = processes.Pipe()
    process = processes.Process(target=function, args=(there, *arguments), kwargs=options, daemon=True)
    process.start()
    there.close()
    return process, here


def receive(process, connection):
    """Return the worker's next message. If the worker ends without one, the test fails."""
    assert connection.poll(PATIENCE_SECONDS), "the worker says nothing"
    try:
        return connection.recv()
    except EOFError:
        process.join()
        raise AssertionError(f"the worker ended with {process.exitcode}; its error is above") from None


def train_undisturbed(processes, cluster, job, **options):
    """Train to the end and return the seconds of each step."""
    process, connection = start(processes, training_process.run, cluster.address, job, STEPS, **options)
    times = []
    while receive(process, connection) is not None:
        times.append(time.monotonic())
    process.join()
    assert process.exitcode == 0
    return [later - earlier for earlier, later in zip(times, times[1:])]


def stored_bits(cluster, job):
    """Return every byte that the servers hold, read by the plain client."""
    reader = PlainJob.attach(cluster.address, job)
    try:
        assert reader.committed_step == STEPS
        return reader.snapshot()
    finally:
        reader.connections.close()


def train_with_kills(processes, cluster, job, moments, step_seconds):
    """Kill the worker at each (step, fraction of a step) in order, then let it finish. Returns the number of kills that hit a running
    worker.
    """
    kills = 0
    pending = sorted(moments)
    while True:
        process, connection = start(processes, training_process.run, cluster.address, job, STEPS)
        while (step := receive(process, connection)) is not None:
            if pending and step >= pending[0][0]:
                process.join(pending.pop(0)[1] * step_seconds)  # sleeps, unless the worker ends before
                process.kill()
                break
        process.join()
        kills += process.exitcode == -signal.SIGKILL  # it may have ended before
        if step is None:
            assert process.exitcode == 0
            return kills


def check_kills(processes, make_cluster, seed, count):
    cluster = make_cluster(2)
    seconds = sorted(train_undisturbed(processes, cluster, "undisturbed"))
    generator = random.Random(seed)
    kills, trainings = 0, 0
    while kills < count:  # a kill that came too late for one training is repeated in another
        moments = [(generator.randint(1, STEPS), generator.random()) for _ in range(count - kills)]
        kills += train_with_kills(processes, cluster, f"killed-{trainings}", moments, seconds[len(seconds) // 2])
        assert stored_bits(cluster, f"killed-{trainings}") == stored_bits(cluster, "undisturbed")
        trainings += 1
    print(f"seed {seed}: {kills} kills met a running worker, in {trainings} trainings; a step takes {seconds[len(seconds) // 2]:.3f} s")


def test_worker_killed_at_20_seeded_moments_of_a_step_leaves_no_trace(processes, make_cluster, seed):
    check_kills(processes, make_cluster, seed, 20)


@pytest.mark.parametrize("overlap, kind", [("backward", "exception in backward"), ("backward", "zero_grad after push"),
                                           (None, "exception before step")])
def test_caught_errors_and_second_thoughts_leave_no_trace(processes, make_cluster, overlap, kind):
    cluster = make_cluster(2)
    train_undisturbed(processes, cluster, "undisturbed")
    train_undisturbed(processes, cluster, "disturbed", overlap=overlap, disturb=(kind, (1, 4, 5, STEPS)))
    assert stored_bits(cluster, "disturbed") == stored_bits(cluster, "undisturbed")
    reader = PlainJob.attach(cluster.address, "disturbed")
    if overlap:
        assert reader.status().abort_reason, "what was pushed must have been taken back"
    reader.connections.close()


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_client_gives_up_after_its_deadline_naming_server_and_tensor(processes, make_cluster, victim):
    cluster = make_cluster(2)
    process, connection = start(processes, training_process.report_lost_server, cluster.address, "lost", 3.0)
    assert receive(process, connection) == "joined"
    cluster.servers[victim].kill()
    connection.send("killed")
    for expected in ("step", "get"):
        name, kind, message, detail = receive(process, connection)
        assert name == expected
        assert kind in ("Unavailable", "DeadlineExceeded"), message
        assert cluster.names[victim] in message or cluster.servers[victim].address in message, message
        assert "weight" in message or "bias" in message, message
        assert detail.get("tensor"), detail
    process.join()
