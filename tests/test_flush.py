"""Flushes of running jobs: what a killed server goes back to, which flushes are kept, and what a damaged one costs."""
import contextlib
import random
import re
import subprocess
import threading
import time

import grpc
import pytest

from clusters import wait_until
from plain_client import stubs
from test_bad_input import refused
from test_restart import SHARD_ELEMENTS, TENSORS, recovered, rejoin_at, snapshots_of_undisturbed_run, start_job, state_of, step_all


def flush(job, address=None):
    return job.admin(address).FlushJob(stubs().admin.FlushJobRequest(job=job.name), timeout=60)


def kill_all(cluster):
    for server in cluster.servers:
        server.kill()
    cluster.start()


def step_all_to_the_end(job, step):
    """A server that is stopped right after a commit may write the step before, with this one prepared."""
    step_all(job, step)
    wait_until(lambda: job.status().applied_step == step)


def test_killed_servers_go_back_to_the_flush_of_a_running_job(make_cluster, bin_dir):
    cluster = make_cluster(3, flags=["--rollback", "auto"])
    expected = snapshots_of_undisturbed_run(cluster, 4)
    job = start_job(cluster)
    step_all(job, 1)
    assert flush(job, cluster.servers[2].address).step == 1  # forwarded to the leader
    step_all(job, 2)
    done = subprocess.run([bin_dir / "orlop", "--server", cluster.address, "flush", job.name], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "step 2 " in done.stdout, (done.stdout, done.stderr)
    assert flush(job).step == 2, "it is on disk already"
    step_all(job, 3)
    assert job.snapshot() == expected[3], "the job goes on"
    kill_all(cluster)
    assert recovered(job).committed_step == 2, "without an operator"
    assert state_of(job) == "READY"
    rejoin_at(job, 2)
    assert job.snapshot() == expected[2]
    for seed in (3, 4):
        step_all(job, seed)
    assert job.snapshot() == expected[4]
    cluster.restart()
    assert recovered(job).committed_step == 4
    assert job.snapshot() == expected[4]


def test_flush_goes_on_beside_pushes_and_holds_the_next_apply_back(make_cluster):
    """Pieces of the next step that arrive during a flush are not part of it."""
    cluster = make_cluster(2, flags=["--rollback", "auto"])
    expected = snapshots_of_undisturbed_run(cluster, 6)
    job = start_job(cluster)
    flushed = []
    for seed in range(1, 7):
        other = threading.Thread(target=lambda: flushed.append(flush(job).step))
        other.start()
        step_all(job, seed)
        other.join()
    assert len(flushed) == 6 and flushed == sorted(flushed)
    assert job.snapshot() == expected[6]
    kill_all(cluster)
    status = recovered(job)
    assert status.committed_step == flushed[-1]
    rejoin_at(job, status.committed_step)
    assert job.snapshot() == expected[status.committed_step]


def test_flush_of_a_job_without_weights_or_servers_says_so(make_cluster):
    cluster = make_cluster(2)
    job = cluster.job("empty", TENSORS, shard_elements=SHARD_ELEMENTS)
    with refused("NOT_FOUND", "UNKNOWN_JOB", "empty"):
        flush(job)
    job.create()
    wait_until(lambda: state_of(job) == "LOADING")
    with refused("FAILED_PRECONDITION", "LOADING"):
        flush(job)
    job = start_job(cluster)
    cluster.servers[1].kill()
    call = job.admin().FlushJob.future(stubs().admin.FlushJobRequest(job=job.name), timeout=60)
    wait_until(lambda: state_of(job) == "READY")
    cluster.servers[1].start()
    assert call.exception().code() == grpc.StatusCode.UNAVAILABLE
    assert recovered(job) and state_of(job) == "LOST"
    with refused("DATA_LOSS", "LOST"):
        flush(job)


def test_servers_flush_by_themselves(make_cluster):
    cluster = make_cluster(2, flags=["--rollback", "auto", "--flush-every", "200ms"])
    expected = snapshots_of_undisturbed_run(cluster, 8)
    job = start_job(cluster)
    for seed in range(1, 9):
        step_all(job, seed)
        time.sleep(0.1)

    def flushed():
        return [int(step) for step in re.findall(rf"job {job.name}: step (\d+) is on disk on all servers", cluster.servers[0].log())]
    wait_until(flushed)
    kill_all(cluster)
    status = recovered(job)
    assert state_of(job) == "READY" and status.committed_step >= max(flushed())
    rejoin_at(job, status.committed_step)
    assert job.snapshot() == expected[status.committed_step]


@pytest.mark.parametrize("victims", [(1, 1), (0, 0), (0, 1, 0, 1)], ids=str)
def test_stops_of_single_servers_keep_what_all_have(make_cluster, victims):
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 1)
    job = start_job(cluster)
    step_all_to_the_end(job, 1)
    cluster.restart()
    recovered(job)
    rejoin_at(job, 1)
    for number, victim in enumerate(victims):
        step_all_to_the_end(job, 2 + number)
        cluster.servers[victim].stop()
        cluster.servers[victim].start()
        recovered(job)
        rejoin_at(job, 2 + number)
    step_all(job, 9)
    cluster.servers[victims[0]].kill()
    cluster.servers[victims[0]].start()
    status = recovered(job)
    assert state_of(job) == "ROLLBACK_OFFERED" and status.rollback_step == 1, status
    job.roll_back(1)
    rejoin_at(job, 1)
    assert job.snapshot() == expected[1]


def test_flushes_of_another_history_are_erased(make_cluster):
    """A job that went back does not come back to what it left."""
    cluster = make_cluster(2)
    job = start_job(cluster)
    for seed in (1, 2):
        step_all_to_the_end(job, seed)
        cluster.restart()
        recovered(job)
        rejoin_at(job, seed)
    step_all(job, 3)
    cluster.servers[1].kill()
    cluster.servers[1].start()
    assert recovered(job).rollback_step == 2
    assert "can go back to: 2, 1" in job.status().explanation
    job.roll_back(1)
    rejoin_at(job, 1)
    step_all(job, 12)
    step_all(job, 13)
    kill_all(cluster)
    assert recovered(job).rollback_step == 1
    job.roll_back(1)


def flip_a_bit(path, at):
    size = path.stat().st_size
    with open(path, "r+b") as file:
        file.seek(int(size * at))
        byte = file.read(1)
        file.seek(int(size * at))
        file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize("servers", [1, 2])
def test_damaged_old_flush_stops_no_later_one(make_cluster, servers):
    """Values of the flush before the last are damaged while the job runs. The next clean stops succeed all the same."""
    cluster = make_cluster(servers)
    expected = snapshots_of_undisturbed_run(cluster, 5)
    job = start_job(cluster)
    step_all(job, 1)
    cluster.stop()
    old = list(cluster.servers[-1].data_dir.rglob("*.blob"))
    cluster.start()
    recovered(job)
    rejoin_at(job, 1)
    step_all(job, 2)
    cluster.stop()
    assert any(path.exists() for path in old)
    for path in old:
        if path.exists():
            flip_a_bit(path, 1 / 3)
    cluster.start()
    for seed in (3, 4, 5):
        assert recovered(job).committed_step == seed - 1 and state_of(job) == "READY"
        assert job.snapshot() == expected[seed - 1]
        rejoin_at(job, seed - 1)
        step_all(job, seed)
        cluster.restart()
    assert recovered(job).committed_step == 5
    assert job.snapshot() == expected[5]


def older_and_newer_blobs(cluster, job):
    """Make two flushes, of steps 1 and 2. Return the files that each server wrote for the second one."""
    step_all_to_the_end(job, 1)
    cluster.stop()
    before = [set(server.data_dir.rglob("*.blob")) for server in cluster.servers]
    cluster.start()
    recovered(job)
    rejoin_at(job, 1)
    step_all_to_the_end(job, 2)
    cluster.stop()
    return [sorted(set(server.data_dir.rglob("*.blob")) - old) for server, old in zip(cluster.servers, before)]


@pytest.mark.parametrize("victim", [0, 1])
def test_damaged_flush_is_not_offered_and_the_one_before_is(make_cluster, victim):
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 2)
    job = start_job(cluster)
    for path in older_and_newer_blobs(cluster, job)[victim]:
        flip_a_bit(path, 1 / 3)
    cluster.start()
    status = recovered(job)
    assert state_of(job) == "ROLLBACK_OFFERED" and status.rollback_step == 1, status
    job.roll_back(1)
    rejoin_at(job, 1)
    assert job.snapshot() == expected[1]
    step_all(job, 2)
    assert job.snapshot() == expected[2]
    cluster.restart()
    assert recovered(job).committed_step == 2


def test_flush_that_is_damaged_under_a_running_server_names_the_one_before(make_cluster):
    """Server 0 keeps its memory and does not read its flushes before it is told to go back to one."""
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 2)
    job = start_job(cluster)
    newer = older_and_newer_blobs(cluster, job)
    cluster.start()
    recovered(job)
    rejoin_at(job, 2)
    step_all(job, 3)
    for path in newer[0]:
        flip_a_bit(path, 1 / 3)
    cluster.servers[1].kill()
    cluster.servers[1].start()
    assert recovered(job).rollback_step == 2
    with pytest.raises(grpc.RpcError) as caught:
        job.roll_back(2)
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    wait_until(lambda: job.status().rollback_step == 1)
    job.roll_back(1)
    rejoin_at(job, 1)
    assert job.snapshot() == expected[1]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_servers_lose_what_came_after_the_newest_flush_alone(make_cluster, seed, kills):
    """A job is flushed at every tenth step, and servers are killed at random moments. What is served afterwards is the newest flush that
    was acknowledged, or a later one, bit for bit."""
    chance = random.Random(seed)
    cluster = make_cluster(2, flags=["--rollback", "auto"])
    expected = snapshots_of_undisturbed_run(cluster, 40)
    job = start_job(cluster)
    newest = flush(job).step

    def train(until):
        nonlocal newest
        while job.committed_step < until:
            step_all(job, job.committed_step + 1)
            if job.committed_step % 10 == 0:
                newest = max(newest, flush(job).step)

    def train_until_killed():
        with contextlib.suppress(grpc.RpcError):
            train(40)

    job.patience_seconds, job.commit_seconds = 0, 3  # a commit waits for a killed server
    for kill in range(kills):
        training = threading.Thread(target=train_until_killed)
        training.start()
        time.sleep(chance.uniform(0, 1.0))
        victims = chance.choice([[0], [1], [0, 1]])
        for victim in victims:
            cluster.servers[victim].kill()
        training.join()
        for victim in victims:
            cluster.servers[victim].launch()
        for victim in victims:
            cluster.servers[victim].wait_until_ready()
        status = recovered(job)
        assert state_of(job) == "READY", f"seed {seed}, kill {kill}: {status}"
        assert status.committed_step >= newest and status.committed_step % 10 == 0, f"seed {seed}, kill {kill}: {status}"
        rejoin_at(job, status.committed_step)
        assert job.snapshot() == expected[status.committed_step], f"seed {seed}, kill {kill}"
        if status.committed_step == 40:
            job.delete()
            job = start_job(cluster)
            job.patience_seconds, job.commit_seconds = 0, 3
            newest = flush(job).step
        else:
            newest = status.committed_step
