"""Servers that stop and restart. The committed step is the same, staged pushes survive a clean stop, and lost memory is always reported."""
import json
import subprocess

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import ADAMW, DEADLINE_SECONDS, Tensor, detail_of, stubs
from test_bad_input import refused

TENSORS = [Tensor("wte.weight", (700, 64)), Tensor("layers.0.weight", (256, 256), "F32"), Tensor("bias", (300,))]
SHARD_ELEMENTS = 16384


def random_arrays(seed):
    generator = np.random.default_rng(seed)
    return {tensor.name: generator.standard_normal(tensor.shape).astype("<f4") for tensor in TENSORS}


def start_job(cluster, name="kept", world_size=1):
    job = cluster.job(name, TENSORS, shard_elements=SHARD_ELEMENTS)
    job.create()
    job.configure(job.groups(state="8bit"))
    job.join([job.layout("SUM" if world_size > 1 else "EXACTLY_ONCE")] * world_size)
    job.load(random_arrays(0))
    return job


def step_all(job, seed):
    for rank in range(job.world_size):
        job.push(random_arrays(seed + 100 * rank), rank)
    return job.commit([ADAMW])


def state_of(job):
    return stubs().job.JobStatusResponse.State.Name(job.status().state)


def recovered(job):
    """Connect to the restarted servers, wait until they have agreed on the state of the job, and return it."""
    job.connections.reconnect()
    wait_until(lambda: state_of(job) not in ("RECOVERING", "WAITING"))
    return job.status()


def rejoin_at(job, step):
    job.committed_step = step
    job.join()


def snapshots_of_undisturbed_run(cluster, steps, world_size=1):
    job = start_job(cluster, "undisturbed", world_size)
    made = [job.snapshot()]
    for seed in range(1, steps + 1):
        step_all(job, seed)
        made.append(job.snapshot())
    return made


def test_clean_stop_and_restart_serve_the_same_step(make_cluster):
    cluster = make_cluster(3)
    job = start_job(cluster)
    expected = snapshots_of_undisturbed_run(cluster, 4)
    for seed in (1, 2):
        step_all(job, seed)
    epoch, incarnations = job.epoch, servers_of(job)
    cluster.restart()
    assert recovered(job).committed_step == 2
    assert state_of(job) == "READY"
    job.read_placement()
    assert job.epoch > epoch, "each restart raises the epoch"
    assert servers_of(job).keys() == incarnations.keys()
    assert job.snapshot() == expected[2]
    job.join(min_committed_step=2)
    for seed in (3, 4):
        step_all(job, seed)
    assert job.snapshot() == expected[4]


def servers_of(job):
    placement = job.admin().ListServers(stubs().admin.ListServersRequest(), timeout=60).placement
    return {server.name: server.incarnation for server in placement.servers}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["leader first", "leader last"])
def test_servers_stopped_one_by_one_in_mid_commit_go_on_with_the_attempt(make_cluster, order):
    """There are two contributors; rank 0 commits and waits. All pushes survive the stops, so no byte is sent again."""
    cluster = make_cluster(3)
    expected = snapshots_of_undisturbed_run(cluster, 2, world_size=2)
    job = start_job(cluster, world_size=2)
    step_all(job, 1)
    for rank in (0, 1):
        job.push(random_arrays(2 + 100 * rank), rank)
    waiting = job.job().CommitStep.future(job.commit_request(0, [ADAMW]), timeout=60)
    wait_until(lambda: list(job.status().committed_ranks) == [0])
    for index in order:
        cluster.servers[index].stop()
    assert waiting.exception() is not None
    cluster.start()
    assert recovered(job).committed_step == 1
    assert job.snapshot() == expected[1]
    job.join([job.layout("SUM")] * 2, generation=job.generation)
    for address in job.addresses():
        for rank in (0, 1):
            assert job.query_push(address, rank).complete, "staged pushes must survive a clean stop"
    job.commit([ADAMW])
    assert job.snapshot() == expected[2]


def test_acknowledged_commit_survives_stops_right_after_it(make_cluster):
    """The apply may still run when the server stops: the flush has the committed step."""
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 1)
    job = start_job(cluster)
    step_all(job, 1)
    cluster.restart()
    assert recovered(job).committed_step == 1
    assert job.snapshot() == expected[1]


def test_half_pushed_attempt_is_completed_after_a_restart(make_cluster):
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 1)
    job = start_job(cluster)
    first, second = list(random_arrays(1).items())[:1], list(random_arrays(1).items())[1:]
    job.push(dict(first))
    cluster.restart()
    recovered(job)
    job.join(generation=job.generation)
    stored = [piece.region.tensor for address in job.addresses() for piece in job.query_push(address).pieces]
    assert set(stored) == {first[0][0]}
    job.push(dict(second))
    job.commit([ADAMW])
    assert job.snapshot() == expected[1]


def kill_and_restart(cluster, index):
    cluster.servers[index].kill()
    cluster.servers[index].launch()
    cluster.servers[index].wait_until_ready()


def assert_nothing_is_served(job):
    """Neither lost nor kept bytes are served, because a mixture would be worse than nothing."""
    for tensor in TENSORS:
        with pytest.raises(grpc.RpcError) as caught:
            job.pull(tensor.name)
        assert caught.value.code() in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.UNAVAILABLE), caught.value


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_killed_server_offers_the_common_flush_and_no_mixture(make_cluster, bin_dir, victim):
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 2)
    job = start_job(cluster)
    step_all(job, 1)
    cluster.restart()  # both servers have the flush of step 1
    recovered(job)
    job.join()
    step_all(job, 2)
    assert job.snapshot() == expected[2]
    kill_and_restart(cluster, victim)
    status = recovered(job)
    assert stubs().job.JobStatusResponse.State.Name(status.state) == "ROLLBACK_OFFERED", status
    assert status.rollback_step == 1 and status.explanation
    with refused("DATA_LOSS", "ROLLBACK_OFFERED", 1) as caught:
        job.join(min_committed_step=2)
    assert detail_of(caught.value).version == 1
    assert_nothing_is_served(job)
    with refused("FAILED_PRECONDITION", "ROLLBACK_OFFERED", 1) as caught:
        job.roll_back(0, cluster.servers[1].address)  # forwarded
    assert detail_of(caught.value).limit == "1"

    if victim == 0:
        accepted = job.roll_back(1)
        assert accepted.committed_step == 1
    else:
        command = [bin_dir / "orlop", "--server", cluster.address, "--json", "rollback", job.name, "--to-step", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["committed_step"] in (1, "1")
    rejoin_at(job, 1)
    assert job.snapshot() == expected[1]
    step_all(job, 2)
    assert job.snapshot() == expected[2], "the step after the rollback makes the same bits again"


def test_killed_server_without_any_flush_is_data_loss(make_cluster):
    cluster = make_cluster(2)
    job = start_job(cluster)
    step_all(job, 1)
    kill_and_restart(cluster, 1)
    status = recovered(job)
    assert stubs().job.JobStatusResponse.State.Name(status.state) == "LOST" and status.explanation
    with refused("DATA_LOSS", "LOST"):
        job.join()
    assert_nothing_is_served(job)
    with refused("FAILED_PRECONDITION", "LOST", job.name):
        job.roll_back(0)


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_job_whose_server_is_killed_before_the_first_load_can_be_loaded(make_cluster, victim):
    """Nothing was committed, so nothing is lost: the same workers continue with another attempt."""
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 1)
    job = cluster.job("unloaded", TENSORS, shard_elements=SHARD_ELEMENTS)
    job.create()
    job.configure(job.groups(state="8bit"))
    job.join()
    job.set_state(random_arrays(0))
    kill_and_restart(cluster, victim)
    assert recovered(job).committed_step == -1
    assert state_of(job) == "LOADING"
    job.join()
    job.load(random_arrays(0))
    assert job.snapshot() == expected[0]
    step_all(job, 1)
    assert job.snapshot() == expected[1]


def test_job_is_not_served_while_a_server_is_down(make_cluster):
    cluster = make_cluster(2)
    job = start_job(cluster)
    step_all(job, 1)
    before = job.snapshot()
    cluster.servers[1].stop()
    job.patience_seconds = 0
    with pytest.raises(grpc.RpcError) as caught:
        step_all(job, 2)
    assert caught.value.code() == grpc.StatusCode.UNAVAILABLE
    job.patience_seconds = DEADLINE_SECONDS
    servers = job.admin().ListServers(stubs().admin.ListServersRequest(), timeout=60).placement.servers
    down = [server for server in servers if not server.ready]
    assert [server.name for server in down] == [cluster.names[1]] and down[0].state
    cluster.servers[1].start()
    recovered(job)
    job.join()
    assert job.snapshot() == before
    step_all(job, 2)
