"""Calls that wait for other workers: they hold no thread of the server, end with their client, and end when the server stops."""
import pathlib
import re

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import ADAMW, Tensor, stubs

RANKS = 300
FEW_THREADS = 100  # gRPC's own, the pool, and RocksDB's; far fewer than one for each rank


def thread_count(server):
    status = pathlib.Path(f"/proc/{server.process.pid}/status").read_text()
    return int(re.search(r"Threads:\s+(\d+)", status)[1])


@pytest.fixture
def job(make_cluster):
    """A job on one server whose ranks will each contribute all of it."""
    cluster = make_cluster(1)
    job = cluster.job("crowd", (Tensor("w", (64,)),))
    job.server = cluster.servers[0]
    job.create()
    job.configure()
    return job


def joins(job, ranks):
    """Begin the joins of some ranks of one generation; return the calls by rank."""
    layout = job.layout(mode="SUM")
    if job.generation == 0:
        request = job.join_request(0, layout, world_size=RANKS)
        job.generation = job.job().Join(request, timeout=60).generation
    return {rank: job.job().Join.future(job.join_request(rank, layout, job.generation, world_size=RANKS), timeout=60) for rank in ranks}


def joined_count(job):
    return len(job.status().joined_ranks)


def test_ranks_that_wait_for_one_another_hold_no_thread(job):
    calls = joins(job, range(RANKS - 1))
    wait_until(lambda: joined_count(job) == RANKS - 1)
    assert thread_count(job.server) < FEW_THREADS
    assert not any(call.done() for call in calls.values())
    calls |= joins(job, [RANKS - 1])
    assert {call.result().generation for call in calls.values()} == {job.generation}
    job.world_size, job.attempt = RANKS, calls[0].result().attempt
    job.epoch = calls[0].result().epoch
    job.read_placement()
    job.load({"w": np.ones(64, "f4")})
    commits = [job.job().CommitStep.future(job.commit_request(rank, [ADAMW]), timeout=60) for rank in range(RANKS - 1)]
    wait_until(lambda: len(job.status().committed_ranks) == RANKS - 1)
    assert thread_count(job.server) < FEW_THREADS
    job.abort()
    assert {call.exception().code() for call in commits} == {grpc.StatusCode.ABORTED}


def test_a_thousand_calls_wait_on_the_threads_that_are_there(make_cluster):
    """500 ranks of each of two jobs wait in Join, and then the same 1,000 in CommitStep."""
    cluster = make_cluster(1)
    server, jobs = cluster.servers[0], [cluster.job(name, (Tensor("w", (64,)),)) for name in ("left", "right")]
    for job in jobs:
        job.create()
        job.configure()
    before = thread_count(server)
    calls = {}
    for job in jobs:
        layout = job.layout(mode="SUM")
        job.generation = job.job().Join(job.join_request(0, layout, world_size=501), timeout=60).generation
        calls[job.name] = [job.job().Join.future(job.join_request(rank, layout, job.generation, world_size=501), timeout=60)
                           for rank in range(500)]
    wait_until(lambda: all(joined_count(job) == 500 for job in jobs))
    assert thread_count(server) <= before + 16
    for job in jobs:
        last = job.job().Join.future(job.join_request(500, job.layout(mode="SUM"), job.generation, world_size=501), timeout=60)
        assert {call.result().generation for call in [*calls[job.name], last]} == {job.generation}
        job.world_size, job.attempt, job.epoch = 501, last.result().attempt, last.result().epoch
        job.read_placement()
        job.load({"w": np.ones(64, "f4")})
    commits = [job.job().CommitStep.future(job.commit_request(rank, [ADAMW]), timeout=60) for job in jobs for rank in range(500)]
    wait_until(lambda: all(len(job.status().committed_ranks) == 500 for job in jobs))
    assert thread_count(server) <= before + 16
    for job in jobs:
        job.abort()
    assert {call.exception().code() for call in commits} == {grpc.StatusCode.ABORTED}


def test_a_client_that_goes_away_waits_no_longer(job):
    calls = joins(job, range(RANKS - 1))
    wait_until(lambda: joined_count(job) == RANKS - 1)
    for rank in range(0, RANKS - 1, 2):
        calls[rank].cancel()
    again = joins(job, range(0, RANKS, 2)) | joins(job, [RANKS - 1])
    answers = [call.result() for rank, call in {**calls, **again}.items()]
    assert len(answers) == RANKS and {answer.generation for answer in answers} == {job.generation}


def test_too_many_calls_that_wait_are_refused_and_the_others_stay(job):
    """Two clients ask 2,100 times each; the limit of a server is 4,096, and three quarters of that for one connection."""
    calls = list(joins(job, [1]).values())
    request = job.join_request(1, job.layout(mode="SUM"), job.generation, world_size=RANKS)
    for _ in range(2):
        stub = stubs().job_grpc.JobStub(grpc.insecure_channel(job.address, options=[("grpc.use_local_subchannel_pool", 1)]))
        calls += [stub.Join.future(request, timeout=60) for _ in range(2100)]
    wait_until(lambda: sum(call.done() for call in calls) > 100)
    refused = [call for call in calls if call.done()]
    assert {call.exception().code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert len(calls) - len(refused) <= 4100
    assert joined_count(job) == 1
    for call in calls:
        call.cancel()
    layout = job.layout(mode="SUM")
    assert job.job().Join(job.join_request(0, layout, world_size=2), timeout=60).generation > job.generation


def test_a_deadline_ends_the_wait(job):
    layout = job.layout(mode="SUM")
    generation = job.job().Join(job.join_request(0, layout, world_size=2), timeout=60).generation
    with pytest.raises(grpc.RpcError) as late:
        job.job().Join(job.join_request(0, layout, generation, world_size=2), timeout=1)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


def test_a_deleted_job_answers_those_who_wait(job):
    calls = joins(job, range(RANKS - 1))
    wait_until(lambda: joined_count(job) == RANKS - 1)
    job.delete()
    assert {call.exception().code() for call in calls.values()} == {grpc.StatusCode.NOT_FOUND}


def test_a_clean_stop_ends_calls_that_wait(job):
    calls = joins(job, range(RANKS - 1))
    wait_until(lambda: joined_count(job) == RANKS - 1)
    job.server.stop()
    codes = {call.exception().code() for call in calls.values()}
    assert codes <= {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}, codes
    job.server.start()
    job.connections.reconnect()
    assert stubs().job.JobStatusResponse.State.Name(job.status().state) == "LOADING"
