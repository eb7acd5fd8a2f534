"""Data directories that come back empty, of an earlier time, or of another server: what is lost is named, and can be left."""
import shutil

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import Tensor
from test_bad_input import refused
from test_flush import step_all_to_the_end
from test_restart import SHARD_ELEMENTS, TENSORS, recovered, rejoin_at, snapshots_of_undisturbed_run, start_job, state_of, step_all


def known(job):
    """Wait until the leader knows the job and what became of it."""
    def is_known():
        try:
            return state_of(job) not in ("RECOVERING", "WAITING")
        except grpc.RpcError as error:
            assert error.code() == grpc.StatusCode.NOT_FOUND
            return False
    job.connections.reconnect()
    wait_until(is_known)
    return state_of(job)


def start_small_job(cluster, name):
    """A job of one shard, which lies on one server."""
    job = cluster.job(name, [Tensor("w", (4,))], shard_elements=256)
    job.create()
    job.configure(job.groups(optimizer="sgd", state="fp32"))
    job.join()
    job.load({"w": np.ones(4, "<f4")})
    return job, set(job.owners.values()).pop()


def forget_a_session(cluster, job, path, tmp_path, steps=()):
    """Stop the servers, run one more session in which workers join and make these steps, and put `path` back as it was before it."""
    cluster.stop()
    shutil.copytree(path, tmp_path / "before")
    cluster.start()
    rejoin_at(job, recovered(job).committed_step)
    for step in steps:
        step_all_to_the_end(job, step)
    cluster.stop()
    shutil.rmtree(path)
    shutil.copytree(tmp_path / "before", path)
    cluster.start()


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_empty_directory_loses_the_jobs_that_lay_there_and_no_other(make_cluster, victim):
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 1)
    job = start_job(cluster)
    step_all(job, 1)
    small = [start_small_job(cluster, f"small-{number}") for number in range(2)]
    lying_elsewhere = [other for other, owner in small if owner != cluster.servers[victim].address]
    cluster.stop()
    shutil.rmtree(cluster.servers[victim].data_dir)
    cluster.start()  # every server becomes ready
    assert known(job) == "LOST" and job.status().explanation
    with refused("DATA_LOSS", "LOST"):
        job.join()
    for other in lying_elsewhere:
        assert known(other) == "READY"
        rejoin_at(other, 0)
        assert np.array_equal(other.pull("w"), np.ones(4))
    different = cluster.job(job.name, TENSORS[:1], shard_elements=SHARD_ELEMENTS)
    with refused("ALREADY_EXISTS", "CONFLICT"):
        different.create()
    assert job.delete().existed
    job = start_job(cluster)
    step_all(job, 1)
    assert job.snapshot() == expected[1]


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_directory_of_an_earlier_session_at_the_same_step_goes_on(make_cluster, tmp_path, victim):
    """Meanwhile another generation has formed, of which the old record of the leader knows nothing."""
    cluster = make_cluster(3)
    expected = snapshots_of_undisturbed_run(cluster, 2)
    job = start_job(cluster)
    step_all_to_the_end(job, 1)
    forget_a_session(cluster, job, cluster.servers[victim].data_dir, tmp_path)
    assert known(job) == "READY" and job.status().committed_step == 1
    rejoin_at(job, 1)
    assert job.snapshot() == expected[1]
    step_all(job, 2)
    assert job.snapshot() == expected[2]


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_directory_of_an_earlier_step_is_named(make_cluster, tmp_path, victim):
    cluster = make_cluster(3)
    expected = snapshots_of_undisturbed_run(cluster, 3)
    job = start_job(cluster)
    step_all_to_the_end(job, 1)
    forget_a_session(cluster, job, cluster.servers[victim].data_dir, tmp_path, steps=[2])
    state = known(job)
    assert state == "ROLLBACK_OFFERED" and job.status().rollback_step == 1, job.status()
    job.roll_back(1)
    rejoin_at(job, 1)
    assert job.snapshot() == expected[1]
    for seed in (2, 3):
        step_all(job, seed)
    assert job.snapshot() == expected[3]


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_store_that_is_older_than_its_last_process_is_named(make_cluster, tmp_path, victim):
    """The store forgets a whole session, as if its log had been cut, but no file beside it does. One server alone would take the state of
    the session before for the newest one."""
    cluster = make_cluster(1 + victim)
    expected = snapshots_of_undisturbed_run(cluster, 2)
    job = start_job(cluster)
    step_all_to_the_end(job, 1)
    forget_a_session(cluster, job, cluster.servers[victim].data_dir / "store", tmp_path, steps=[2])
    assert known(job) == "ROLLBACK_OFFERED" and job.status().rollback_step == 1, job.status()
    assert "is older than its last process" in cluster.servers[victim].log()
    job.roll_back(1)
    rejoin_at(job, 1)
    assert job.snapshot() == expected[1]
    step_all(job, 2)
    assert job.snapshot() == expected[2]


def test_directory_of_another_server_is_refused(make_cluster):
    cluster = make_cluster(2)
    start_job(cluster)
    cluster.stop()
    one, other = (server.data_dir for server in cluster.servers)
    one.rename(f"{one}.away")
    other.rename(one)
    cluster.servers[0].launch()
    assert cluster.servers[0].process.wait(60) == 1
    assert "server-1" in cluster.servers[0].log() and "server-0" in cluster.servers[0].log()
    one.rename(other)
    (cluster.directory / f"{one.name}.away").rename(one)
    cluster.start()


@pytest.mark.parametrize("victim", [0, 1], ids=["leader", "other"])
def test_directory_that_is_removed_under_a_server_stops_new_steps(make_cluster, victim):
    """It may be put back: until then the committed step is served, and no other is made."""
    cluster = make_cluster(2)
    expected = snapshots_of_undisturbed_run(cluster, 2)
    job = start_job(cluster)
    step_all(job, 1)
    server = cluster.servers[victim]
    away = server.data_dir.rename(f"{server.data_dir}.away")
    wait_until(lambda: "was removed or replaced" in server.log())
    job.patience_seconds = 0
    with refused("UNAVAILABLE", "STOPPING", server.data_dir):
        step_all(job, 2)
    assert job.snapshot() == expected[1]
    away.rename(server.data_dir)
    wait_until(lambda: "is back" in server.log())
    step_all(job, 2)
    assert job.snapshot() == expected[2]
    cluster.restart()
    assert recovered(job).committed_step == 2
