"""A restarted server becomes ready when each of its jobs has reached an answer, and not before.

`connections.close()` makes the next call connect anew: a channel whose server was down waits before it tries again.
"""
import grpc
import pytest

from clusters import wait_until
from plain_client import stubs
from test_restart import start_job, state_of, step_all

SERVING, NOT_SERVING = b"\x08\x01", b"\x08\x02"  # grpc.health.v1.HealthCheckResponse on the wire


def health_of(job, server):
    return job.connections.channel(server.address).unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=60)


def status_of(job, server):
    """Return the server's status, or None while it does not answer."""
    try:
        return job.admin(server.address).ServerStatus(stubs().admin.ServerStatusRequest(), timeout=60)
    except grpc.RpcError as error:
        assert error.code() == grpc.StatusCode.UNAVAILABLE, error


@pytest.mark.parametrize("first", [0, 1], ids=["leader first", "leader last"])
def test_server_is_not_ready_before_its_jobs_are_recovered(make_cluster, first):
    cluster = make_cluster(2)
    job = start_job(cluster)
    step_all(job, 1)
    cluster.stop()
    one, other = cluster.servers[first], cluster.servers[1 - first]
    one.launch()
    job.connections.close()
    wait_until(lambda: (status := status_of(job, one)) and status.state.startswith("starting: "))
    status = status_of(job, one)
    assert not status.ready and (job.name if first == 0 else cluster.names[0]) in status.state, "it says what it waits for"
    assert health_of(job, one) == NOT_SERVING
    other.start()
    one.wait_until_ready()
    assert state_of(job) == "READY", "ready means that it can serve: nobody need wait any more"
    assert job.status().committed_step == 1
    job.connections.close()
    for server in cluster.servers:
        assert health_of(job, server) == SERVING and status_of(job, server).ready


def test_server_whose_job_is_lost_is_ready_all_the_same(make_cluster):
    """Lost is an answer too, and the operator who decides what follows needs a server that is ready."""
    cluster = make_cluster(2)
    job = start_job(cluster)
    step_all(job, 1)
    cluster.servers[1].kill()
    cluster.servers[1].start()
    assert state_of(job) == "LOST"
    job.connections.close()
    assert health_of(job, cluster.servers[1]) == SERVING


def test_server_that_waits_stops_when_told(make_cluster):
    cluster = make_cluster(2)
    job = start_job(cluster)
    cluster.stop()
    server = cluster.servers[1]
    server.launch()
    job.connections.close()
    wait_until(lambda: (status := status_of(job, server)) and status.state.startswith("starting: "))
    server.stop()
    cluster.start()
    assert state_of(job) == "READY"
