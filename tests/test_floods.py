"""Floods of calls: what a server holds stays within its budget, and those who train or look are served meanwhile."""
import contextlib
import queue
import socket
import subprocess
import sys
import threading
import time

import grpc
import numpy as np
import pytest

import http2_floods
from clusters import wait_until
from plain_client import ADAMW, DEADLINE_SECONDS, Tensor, stubs
from test_bad_input import detail_of
from test_waiting_calls import FEW_THREADS, thread_count

MIB = 1 << 20
BUDGET = 64 * MIB
# What gRPC, RocksDB and the allocator take besides the budget, at most.
BESIDE = 48 * MIB
TENSORS = (Tensor("w", (256, 256)),)
STREAMS = 1100


def raw_channel(address):
    return grpc.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])


def raw_call(channel, method):
    """A unary RPC that sends and returns bytes."""
    return channel.unary_unary(method, request_serializer=lambda sent: sent, response_deserializer=lambda got: got)


def outcome(call):
    """Code, reason and message of a call that must fail."""
    error = call.exception(DEADLINE_SECONDS)
    assert error is not None, "the call was answered"
    return error.code().name, stubs().types.ErrorDetail.Reason.Name(detail_of(error).reason), error.details()


@pytest.fixture
def make_small(make_cluster):
    """Return make() -> a job on a server with the smallest budget."""
    def make(**options):
        cluster = make_cluster(1, memory="64MiB", **options)
        job = cluster.job("j", TENSORS, shard_elements=16384)
        job.server = cluster.servers[0]
        job.create()
        job.configure()
        job.join()
        job.load({"w": np.ones((256, 256), "f4")})
        return job
    return make


@pytest.fixture
def small(make_small):
    return make_small()


@contextlib.contextmanager
def watched(server):
    """Note the server's largest anonymous memory meanwhile; it must stay within the budget and what is beside it."""
    stop, most = threading.Event(), [0]

    def watch():
        while not stop.wait(0.02):
            most[0] = max(most[0], server.memory_bytes())
    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    print(f"at most {most[0] / MIB:.0f} MiB")
    assert most[0] <= BUDGET + BESIDE, f"{most[0] / MIB:.0f} MiB"


def step(job):
    job.step({"w": np.ones((256, 256), "f4")}, [ADAMW])


def test_lists_of_empty_entries_are_counted_before_they_are_parsed(small):
    """4.2 MB of two-byte entries are two million objects."""
    bomb = b"\x0a\x01x" + b"\x12\x00" * 2_090_000
    before = small.pull("w")
    with watched(small.server):
        channels = [raw_channel(small.address) for _ in range(4)]
        create = [raw_call(channel, "/orlop.v1.Job/CreateJob") for channel in channels]
        calls = [call.future(bomb, timeout=DEADLINE_SECONDS) for call in create for _ in range(3)]
        for call in calls:
            code, reason, text = outcome(call)
            assert (code, reason) == ("INVALID_ARGUMENT", "BAD_REQUEST") and "--memory" in text
        step(small)
    assert (small.pull("w") != before).any()


def test_compressed_requests_are_refused_unread(small):
    """200 kB of gzip can hold 200 MiB."""
    with watched(small.server):
        channel = raw_channel(small.address)
        for method in ("/orlop.v1.Job/CreateJob", "/orlop.v1.Admin/ServerStatus"):
            call = raw_call(channel, method).future(bytes(200 * MIB), timeout=DEADLINE_SECONDS, compression=grpc.Compression.Gzip)
            assert outcome(call)[0] == "UNIMPLEMENTED"
        step(small)


def test_streams_that_send_nothing_stop_nobody(small):
    channels, ends = [raw_channel(small.address) for _ in range(4)], queue.Queue()

    def only_a_key():
        yield stubs().types.Chunk(key=small.key()).SerializeToString()
        ends.get()
    push = [channel.stream_unary("/orlop.v1.Data/Push", request_serializer=lambda sent: sent, response_deserializer=lambda got: got)
            for channel in channels]
    with watched(small.server):
        calls = [push[number % 4].future(only_a_key()) for number in range(STREAMS)]
        time.sleep(1)
        refused = [call for call in calls if call.done()]
        assert all(outcome(call)[:2] == ("RESOURCE_EXHAUSTED", "BUSY") for call in refused) and len(refused) < STREAMS / 4
        assert thread_count(small.server) < FEW_THREADS
        begun = time.monotonic()
        other = small.connections.admin(small.address).ServerStatus(stubs().admin.ServerStatusRequest(), timeout=5)
        assert other.ready and small.status().committed_step == small.committed_step
        for call in calls[:STREAMS // 2]:
            call.cancel()
        step(small)
        assert time.monotonic() - begun < 30
    for call in calls:
        call.cancel()
        ends.put(None)


def test_calls_that_send_no_request_end(small):
    """4,096 of them are all that a server takes of calls that may wait."""
    channel, ends = raw_channel(small.address), threading.Event()

    def nothing():
        ends.wait()
        yield b""
    join = channel.stream_unary("/orlop.v1.Job/Join", request_serializer=lambda sent: sent, response_deserializer=lambda got: got)
    calls = [join.future(nothing()) for _ in range(200)]
    wait_until(lambda: all(call.done() for call in calls))
    assert {outcome(call)[0] for call in calls} <= {"CANCELLED", "INVALID_ARGUMENT"}
    ends.set()
    step(small)


def test_joins_that_time_out_in_a_recovery_leave_nothing(make_cluster):
    """One server of two is away, and 24 ranks ask to join with a large layout until they give up."""
    cluster = make_cluster(2, memory="64MiB")
    tensors = [Tensor(f"layers.{number}.weight", (8, 8)) for number in range(2000)]
    job = cluster.job("j", tensors)
    job.create()
    job.configure()
    job.join()
    cluster.stop()
    leader = cluster.servers[0]
    leader.launch()
    job.connections.reconnect()
    wait_until(lambda: job.admin().ListJobs(stubs().admin.ListJobsRequest(), timeout=DEADLINE_SECONDS).jobs)
    boxes = {tensor.name: [([row, 0], [1, 8]) for row in range(8)] for tensor in tensors}
    layout = job.layout("EXACTLY_ONCE", boxes=boxes)
    before = leader.memory_bytes()
    for _ in range(4):
        calls = [job.job().Join.future(job.join_request(rank, layout, 0 if rank == 0 else 1, 24), timeout=1) for rank in range(24)]
        assert {outcome(call)[0] for call in calls} <= {"DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "ALREADY_EXISTS",
                                                        "INVALID_ARGUMENT", "FAILED_PRECONDITION"}
    wait_until(lambda: leader.memory_bytes() < before + 16 * MIB)
    assert leader.memory_bytes() <= BUDGET + BESIDE


def spilled_bytes(job):
    """What is on disk because there was no memory for it."""
    uses = job.admin().ServerStatus(stubs().admin.ServerStatusRequest(), timeout=DEADLINE_SECONDS).uses
    return sum(use.peak_bytes for use in uses if use.tier == "NVME" and use.slot != "flush")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("seconds", [3, pytest.param(300, marks=pytest.mark.slow)])
def test_readers_that_read_nothing_hold_little(make_cluster, seconds):
    """200 clients ask for all of a tensor and take only what gRPC reads ahead for them."""
    cluster = make_cluster(1, memory="64MiB")
    gradient = {"w": np.ones((1024, 1024), "f4")}
    job = cluster.job("j", (Tensor("w", (1024, 1024)),), shard_elements=1 << 18)
    job.create()
    job.configure()
    job.join()
    job.load(gradient)
    job.step(gradient, [ADAMW])

    request = stubs().data.PullRequest(job=job.name, version=job.committed_step, regions=[job.region("w", "weight", None, None)])
    with watched(cluster.servers[0]), contextlib.ExitStack() as kept:
        stubs_of_readers = [stubs().data_grpc.DataStub(kept.enter_context(raw_channel(job.address))) for _ in range(20)]
        readers = [stub.Pull(request, timeout=600) for stub in stubs_of_readers for _ in range(10)]
        end, steps = time.monotonic() + seconds, 0
        while time.monotonic() < end:
            job.step(gradient, [ADAMW])
            steps += 1
        assert steps > 0 and spilled_bytes(job) == 0
        for reader in readers:
            reader.cancel()
    print(f"{steps} steps in {seconds} s")
    assert job.pull("w").shape == (1024, 1024)


def test_readers_that_read_nothing_give_way_to_one_who_reads(make_cluster):
    """Each asks for more than gRPC reads ahead, built in memory of which a server of 64 MiB has room for a few."""
    cluster = make_cluster(1, memory="64MiB")
    values = {"w": np.arange(1 << 22, dtype="f4").reshape(2048, 2048)}
    job = cluster.job("j", (Tensor("w", (2048, 2048)),), shard_elements=1 << 20)
    job.create()
    job.configure()
    job.join()
    job.load(values)
    request = stubs().data.PullRequest(job=job.name, version=job.committed_step, max_chunk_bytes=1 << 20,
                                       regions=[job.region("w", "master", None, None)])
    with contextlib.ExitStack() as kept:
        readers = [stubs().data_grpc.DataStub(kept.enter_context(raw_channel(job.address))).Pull(request, timeout=600) for _ in range(20)]
        wait_until(lambda: any(reader.done() for reader in readers))
        assert ("RESOURCE_EXHAUSTED", "BUSY") in {outcome(reader)[:2] for reader in readers if reader.done()}
        begun = time.monotonic()

        one = stubs().data_grpc.DataStub(kept.enter_context(raw_channel(job.address)))

        def reads():
            try:
                return sum(len(chunk.payload) for chunk in one.Pull(request, timeout=DEADLINE_SECONDS))
            except grpc.RpcError as error:
                assert error.code() in (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED)
        wait_until(lambda: reads() == values["w"].nbytes)
        assert time.monotonic() - begun < 45  # 60 s end a stream that nobody wants
        for reader in readers:
            reader.cancel()


def methods(service):
    descriptor = {"Job": stubs().job, "Admin": stubs().admin}[service].DESCRIPTOR.services_by_name[service]
    return [f"/{descriptor.full_name}/{method.name}" for method in descriptor.methods]


@pytest.mark.parametrize("bytes_sent", [b"\xff" * 40, b"\x0a\x05ab", b"\x0b", b"\0"], ids=["tags", "cut off", "group", "field 0"])
def test_bytes_that_are_no_protobuf_are_a_bad_request(small, bytes_sent):
    channel = raw_channel(small.address)
    for method in [*methods("Job"), *methods("Admin"), "/orlop.v1.Data/QueryPush"]:
        call = raw_call(channel, method).future(bytes_sent, timeout=DEADLINE_SECONDS)
        assert outcome(call)[:2] == ("INVALID_ARGUMENT", "BAD_REQUEST"), method
    pull = channel.unary_stream("/orlop.v1.Data/Pull", request_serializer=lambda sent: sent, response_deserializer=lambda got: got)
    with pytest.raises(grpc.RpcError) as error:
        list(pull(bytes_sent, timeout=DEADLINE_SECONDS))
    assert error.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    step(small)


PLACES = [pytest.param(False, 3, id="unix"), pytest.param(True, 3, id="loopback"),
          pytest.param(True, 300, id="loopback-long", marks=pytest.mark.slow),
          pytest.param(False, 300, id="unix-long", marks=pytest.mark.slow)]


def patiently(call):
    """Repeat a call while the server has no room for it, and when its connection was that of a flood."""
    end = time.monotonic() + DEADLINE_SECONDS
    while True:
        try:
            return call()
        except grpc.RpcError as error:
            assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED), error
            assert time.monotonic() < end, error


def step_with_patience(job):
    patiently(lambda: job.push({"w": np.ones((256, 256), "f4")}))
    patiently(lambda: job.commit([ADAMW]))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", http2_floods.KINDS)
@pytest.mark.parametrize("tcp, seconds", PLACES)
def test_frames_of_one_client_are_bounded(make_small, tcp, kind, seconds):
    """A client writes frames as fast as it can, and a job trains beside it."""
    small = make_small(tcp=tcp)
    before, steps, most = small.pull("w"), 0, 0.0
    command = [sys.executable, "-B", http2_floods.__file__, kind, small.address, str(seconds)]
    with watched(small.server), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as flood:
        while flood.poll() is None:
            begun = time.monotonic()
            step_with_patience(small)
            steps, most = steps + 1, max(most, time.monotonic() - begun)
        sent, connections = flood.stdout.read().split()
    print(f"{kind}: {sent} frames on {connections} connections in {seconds} s; {steps} steps meanwhile, the longest {most:.2f} s")
    assert int(sent) > 1000 and steps > 0
    assert (patiently(lambda: small.pull("w")) != before).any()
    step_with_patience(small)


@pytest.mark.parametrize("sent", [b"", http2_floods.PREFACE, b"\x16\x03\x01\x02\0\x01", b"GET / HTTP/1.1\r\n\r\n"],
                         ids=["nothing", "preface", "half a TLS hello", "HTTP/1"])
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "loopback"])
def test_five_thousand_connections_leave_room_for_who_is_there(make_small, tcp, sent):
    small = make_small(tcp=tcp)
    step(small)
    with watched(small.server), contextlib.ExitStack() as kept:
        host, _, port = small.address.rpartition(":")
        for _ in range(5000):
            connection = kept.enter_context(socket.socket(socket.AF_INET if tcp else socket.AF_UNIX))
            connection.connect((host, int(port)) if tcp else port)
            with contextlib.suppress(OSError):
                connection.sendall(sent)
        if sent in (b"", http2_floods.PREFACE):  # other bytes end a connection at once
            wait_until(lambda: "closes new connections" in small.server.log())
        step(small)
    with grpc.insecure_channel(small.address, options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        grpc.channel_ready_future(channel).result(DEADLINE_SECONDS)
    step(small)
