"""Every way in which a server ends: signals, logs that nobody reads, limits. A clean stop loses nothing; all others say so."""
import os
import pathlib
import resource
import signal
import socket
import subprocess
import time

import pytest

from clusters import STOP_SECONDS, wait_until
from test_restart import recovered, rejoin_at, snapshots_of_undisturbed_run, start_job, state_of, step_all

ENDS = ["SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGPOLL", "SIGPWR"]


def test_every_signal_that_ends_a_server_stops_it_cleanly(make_cluster):
    cluster = make_cluster(1)
    expected = snapshots_of_undisturbed_run(cluster, len(ENDS))
    job = start_job(cluster)
    server = cluster.servers[0]
    for step, name in enumerate(ENDS, 1):
        step_all(job, step)
        server.process.send_signal(getattr(signal, name))
        assert server.process.wait(STOP_SECONDS) == 0, f"{name}\n{server.log()}"
        assert f"{name} from process {os.getpid()}" in server.log()
        server.start()
        assert recovered(job).committed_step == step and state_of(job) == "READY", name
        assert job.snapshot() == expected[step], name
        rejoin_at(job, step)


@pytest.mark.parametrize("name", ["SIGPIPE", "SIGXFSZ", "SIGCHLD", "SIGWINCH", "SIGURG"])
def test_signals_that_mean_nothing_to_a_server_do_nothing(make_cluster, name):
    cluster = make_cluster(1)
    cluster.servers[0].process.send_signal(getattr(signal, name))
    job = start_job(cluster)
    step_all(job, 1)
    cluster.stop()


def test_crash_says_so(make_cluster):
    cluster = make_cluster(1)
    server = cluster.servers[0]
    server.process.send_signal(signal.SIGABRT)
    assert server.process.wait(STOP_SECONDS) == -signal.SIGABRT
    assert "crashed by signal 06" in server.log()


@pytest.mark.parametrize("how", ["closed", "full", "full disk"])
def test_log_that_cannot_be_written_stops_nothing(make_cluster, how):
    """The log is a pipe whose reader has ended, one whose reader does not read, or a file on a full disk."""
    cluster = make_cluster(1, start=False, flags=["--log-level", "trace"])
    server = cluster.servers[0]
    read_end, write_end = os.pipe()
    log = os.open("/dev/full", os.O_WRONLY) if how == "full disk" else write_end
    if how == "full":
        os.set_blocking(write_end, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(write_end, bytes(4096))
        os.set_blocking(write_end, True)
    command = [server.binary, "--listen", server.address, "--data-dir", server.data_dir, *server.flags]
    server.log_path.touch()
    server.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
    os.close(write_end)
    if how == "full disk":
        os.close(log)
    if how != "full":
        os.close(read_end)
    server.wait_until_ready()
    job = start_job(cluster)
    expected = snapshots_of_undisturbed_run(cluster, 2)
    for step in (1, 2):
        step_all(job, step)
    server.stop()
    server.start()
    assert recovered(job).committed_step == 2
    assert job.snapshot() == expected[2]
    if how == "full":
        os.close(read_end)


def test_limit_of_file_sizes_is_an_error_of_the_flush(make_cluster):
    """RLIMIT_FSIZE sends a signal first, which would end the process."""
    cluster = make_cluster(1)
    server = cluster.servers[0]
    job = start_job(cluster)
    step_all(job, 1)
    resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    server.terminate()
    assert server.process.wait(STOP_SECONDS) == 1, server.log()
    assert "cannot be written to disk" in server.log() or "not flushed" in server.log()


def test_nobodys_file_is_touched(make_cluster, tmp_path):
    cluster = make_cluster(1)
    precious = tmp_path / "precious"
    precious.write_text("text")
    (tmp_path / "folder").mkdir()

    def start_at(path):
        command = [cluster.servers[0].binary, "--listen", f"unix:{path}", "--data-dir", tmp_path / "data"]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60)

    live = pathlib.Path(cluster.address.removeprefix("unix:"))
    for path, words in ((precious, "is no socket"), (tmp_path / "folder", "is no socket"), (live, "has the lock")):
        refused = start_at(path)
        assert refused.returncode == 1 and words in refused.stderr and str(path) in refused.stderr, refused.stderr
    assert precious.read_text() == "text" and (tmp_path / "folder").is_dir()
    stranger = socket.socket(socket.AF_UNIX)  # of another program
    stranger.bind(str(tmp_path / "stranger"))
    stranger.listen()
    refused = start_at(tmp_path / "stranger")
    assert refused.returncode == 1 and "a process listens at" in refused.stderr
    assert (tmp_path / "stranger").is_socket()
    stranger.close()
    job = start_job(cluster)
    step_all(job, 1)
    cluster.servers[0].kill()
    assert live.is_socket(), "the socket of a killed server stays, and the next server takes it"
    cluster.servers[0].start()
    job.connections.reconnect()
    wait_until(lambda: state_of(job) == "LOST")


def test_only_the_user_reads_what_a_server_writes(make_cluster):
    cluster = make_cluster(1)
    start_job(cluster)
    cluster.stop()
    data = cluster.servers[0].data_dir
    for path in (data, *data.rglob("*")):
        mode = path.stat().st_mode & 0o777
        assert mode & 0o077 == 0, f"{path} has mode {mode:o}"


@pytest.mark.timeout(2400)
@pytest.mark.parametrize("stops", [4, pytest.param(375, marks=pytest.mark.slow)])
def test_stops_under_load_end_with_zero(make_cluster, stops):
    """Servers are stopped while messages between them are under way."""
    clusters = [make_cluster(2) for _ in range(2)]
    jobs = [start_job(cluster) for cluster in clusters]
    for _ in range(stops):
        for job in jobs:
            step_all(job, job.committed_step + 1)
        for cluster in clusters:
            for server in cluster.servers:
                server.terminate()
        for cluster in clusters:
            for server in cluster.servers:
                assert server.process.wait(STOP_SECONDS) == 0, server.log()[-3000:]
        for cluster, job in zip(clusters, jobs):
            cluster.start()
            step = job.committed_step
            assert recovered(job).committed_step == step
            rejoin_at(job, step)
        time.sleep(0.01)


def test_signal_during_a_start_ends_it_and_leaves_the_state(make_cluster):
    """The server reads a flush back, job by job, and is stopped at a random moment of that."""
    cluster = make_cluster(1)
    jobs = [start_job(cluster, f"job-{number}") for number in range(6)]
    for job in jobs:
        step_all(job, 1)
    before = [job.snapshot() for job in jobs]
    server = cluster.servers[0]
    server.stop()
    for delay in (0.0, 0.005, 0.01, 0.02, 0.04, 0.08):
        server.launch()
        time.sleep(delay)
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(STOP_SECONDS)
        assert status in (0, -signal.SIGTERM), server.log()  # it may not have blocked the signal yet
    server.start()
    for job, expected in zip(jobs, before):
        assert recovered(job).committed_step == 1 and state_of(job) == "READY"
        assert job.snapshot() == expected
