"""Servers that hang: the others answer at once, and say who is silent, and since when."""
import json
import signal
import subprocess
import time

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import Tensor, stubs

SERVERS = 8
HUNG = 6
SOON = 2.0  # seconds


@pytest.fixture
def cluster(make_cluster):
    cluster = make_cluster(SERVERS, memory="64MiB", tcp=True)
    job = cluster.job("j", (Tensor("w", (256, 256)),), shard_elements=16384)
    job.create()
    job.configure()
    job.join()
    job.load({"w": np.ones((256, 256), "f4")})
    yield cluster
    for server in cluster.servers:
        if server.running():
            server.process.send_signal(signal.SIGCONT)


def hang(servers):
    for server in servers:
        server.process.send_signal(signal.SIGSTOP)


def orlop(bin_dir, server, *words):
    """Run the command; return its output and its seconds. It must succeed."""
    begun = time.monotonic()
    done = subprocess.run([bin_dir / "orlop", "--server", server.address, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, time.monotonic() - begun


def silent_servers(address):
    admin = stubs().admin_grpc.AdminStub(grpc.insecure_channel(address))
    servers = admin.ListServers(stubs().admin.ListServersRequest(), timeout=30).placement.servers
    return [server.name for server in servers if "silent for" in server.state]


def test_six_of_eight_hang_and_a_healthy_one_answers(cluster, bin_dir):
    hang(cluster.servers[SERVERS - HUNG:])
    for server in cluster.servers[:SERVERS - HUNG]:
        table, seconds = orlop(bin_dir, server, "servers")
        assert seconds < SOON + 1 and table.count("does not answer") == HUNG, table
        wait_until(lambda: len(silent_servers(server.address)) == HUNG)
        table, seconds = orlop(bin_dir, server, "servers")
        assert seconds < SOON and table.count("silent for") == HUNG, table
        status, seconds = orlop(bin_dir, server, "status")
        assert seconds < SOON, status


def test_the_leader_hangs_and_a_follower_answers_for_itself(cluster, bin_dir):
    hang(cluster.servers[:1])
    follower = cluster.servers[1]
    wait_until(lambda: silent_servers(follower.address) == ["server-0"])
    status, seconds = orlop(bin_dir, follower, "status", "--json")
    assert seconds < SOON and json.loads(status)
    admin = stubs().admin_grpc.AdminStub(grpc.insecure_channel(follower.address))
    begun = time.monotonic()
    with pytest.raises(grpc.RpcError) as error:
        admin.ListJobs(stubs().admin.ListJobsRequest(), timeout=30)
    assert error.value.code() == grpc.StatusCode.UNAVAILABLE and "silent for" in error.value.details()
    assert time.monotonic() - begun < SOON


def test_servers_that_go_on_are_known_again(cluster):
    hang(cluster.servers[3:5])
    first = cluster.servers[0]
    wait_until(lambda: silent_servers(first.address) == ["server-3", "server-4"])
    for server in cluster.servers[3:5]:
        server.process.send_signal(signal.SIGCONT)
    wait_until(lambda: not silent_servers(first.address))
