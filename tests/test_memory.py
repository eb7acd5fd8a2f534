"""Bytes of a server: at rest, during a step, and in its own reports."""
import time

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import ADAMW, Tensor, stubs

REST_BYTES_PER_PARAMETER = 6.1
STEP_BYTES_PER_PARAMETER = 2.1
REPORT_ERROR = 0.03
STALL_SECONDS = 60  # kMaxStallMs
WIDTH = 2048
FP32_TENSORS = ("embedding.weight", "bias")


def tensors_of(parameter_count):
    """Return bf16 matrices of 4 M parameters with 8-bit state, and two tensors with fp32 state: an embedding (on request) and a bias
    (always).
    """
    matrices = [Tensor(f"layers.{i}.weight", (WIDTH, WIDTH), "BF16") for i in range(parameter_count // WIDTH**2)]
    return matrices + [Tensor("embedding.weight", (256, WIDTH), "BF16"), Tensor("bias", (WIDTH,), "BF16")]


def start_job(cluster, name, tensors):
    job = cluster.job(name, tensors)
    job.create()
    job.configure(job.groups(state="8bit", fp32_tensors=[job.index["embedding.weight"]]))
    job.join()
    return job


def status_of(job, server):
    return job.admin(server.address).ServerStatus(stubs().admin.ServerStatusRequest(), timeout=60)


def dram_uses(status, job=None):
    return [use for use in status.uses if use.tier == "DRAM" and (job is None or use.job == job)]


def total_bytes(uses):
    return sum(use.bytes for use in uses)


def rest_bytes(job, names):
    """Return the bytes of these tensors at rest, in all slots, as the servers report them."""
    listed = job.admin().ListTensors(stubs().admin.ListTensorsRequest(job=job.name), timeout=60)
    assert listed.next == 0
    return sum(tensor.rest_bytes for tensor in listed.tensors if tensor.spec.name in names)


def settle(job, cluster, at_ready):
    """Return the bytes of the job, once the servers' reported bytes are as close as required to what the kernel counted.

    The job's bytes must be there at once. gRPC's read buffers are given back only when a server has had no message for a moment.
    """
    job_bytes = reported = measured = 0

    def is_near():
        nonlocal job_bytes, reported, measured
        statuses = [status_of(job, server) for server in cluster.servers]
        for status in statuses:
            assert total_bytes(dram_uses(status)) == status.memory_bytes <= status.memory_budget_bytes
        job_bytes = sum(total_bytes(dram_uses(status, job.name)) for status in statuses)
        reported = sum(status.memory_bytes for status in statuses)
        measured = sum(server.memory_bytes() for server in cluster.servers) - at_ready
        return abs(reported - measured) <= REPORT_ERROR * measured

    try:
        wait_until(is_near)
    finally:
        print(f"reported {reported >> 20} MiB, measured {measured >> 20} MiB: {(reported / measured - 1) * 100:+.2f} %")
    return job_bytes


def check(make_cluster, parameter_count, server_count, memory):
    cluster = make_cluster(server_count, memory=memory)
    at_ready = sum(server.memory_bytes() for server in cluster.servers)
    tensors = tensors_of(parameter_count)
    job = start_job(cluster, "large", tensors)
    bits = np.random.default_rng(1).integers(0x3C00, 0x3E00, WIDTH**2, dtype="<u2")
    arrays = {tensor.name: bits[:tensor.element_count].reshape(tensor.shape) for tensor in tensors}
    job.load(arrays)
    job.step(arrays, [ADAMW])
    wait_until_applied(job)
    rest = settle(job, cluster, at_ready)
    job.push(arrays)
    middle = settle(job, cluster, at_ready)
    job.commit([ADAMW])

    in_fp32 = rest_bytes(job, FP32_TENSORS)
    in_8bit = rest - in_fp32
    fp32_count = sum(tensor.element_count for tensor in tensors if tensor.name in FP32_TENSORS)
    count = sum(tensor.element_count for tensor in tensors) - fp32_count
    print(f"{server_count} servers, {count} parameters in 8-bit state: {in_8bit / count:.3f} bytes each at rest, and "
          f"{fp32_count} in fp32 state: {in_fp32 / fp32_count:.3f}; {(middle - rest) / (count + fp32_count):.3f} more in mid-step")
    assert in_8bit / count <= REST_BYTES_PER_PARAMETER
    assert (middle - rest) / (count + fp32_count) <= STEP_BYTES_PER_PARAMETER


def wait_until_applied(job):
    """A pull of the committed version waits for the apply of its shards."""
    for tensor in job.tensors:
        job.pull(tensor.name, box=(0, 1))
        job.pull(tensor.name, box=(tensor.element_count - 1, 1))


def test_bytes_of_a_job_of_32_million_parameters(make_cluster):
    check(make_cluster, 32 << 20, 2, "512MiB")


@pytest.mark.slow
def test_bytes_of_a_job_of_256_million_parameters(make_cluster):
    check(make_cluster, 256 << 20, 2, "2GiB")


def test_slots_are_reserved_before_they_hold_bytes(make_cluster):
    """A configured job has its room reserved from the start. Memory is allocated when a slot is first written."""
    cluster = make_cluster(1)
    tensors = tensors_of(4 << 20)
    job = start_job(cluster, "reserved", tensors)

    def uses():
        return {use.slot: use for use in dram_uses(status_of(job, cluster.servers[0]), job.name)}

    for slot in ("weight", "remainder", "exp_avg", "exp_avg_sq", "staging"):
        assert uses()[slot].bytes == 0 and uses()[slot].reserved_bytes >= WIDTH**2, slot
    arrays = {tensor.name: np.full(tensor.shape, 0x3C00, "<u2") for tensor in tensors}
    job.load(arrays)
    job.step(arrays, [ADAMW])
    wait_until_applied(job)
    for slot in ("weight", "remainder", "exp_avg", "exp_avg_sq"):
        assert uses()[slot].bytes == uses()[slot].reserved_bytes, slot
    status = status_of(job, cluster.servers[0])
    assert sum(use.reserved_bytes for use in dram_uses(status)) == status.memory_reserved_bytes


def test_what_the_store_and_messages_hold_is_reported(make_cluster):
    cluster = make_cluster(1)
    tensors = tensors_of(4 << 20)
    job = start_job(cluster, "own", tensors)
    job.load({tensor.name: np.full(tensor.shape, 0x3C00, "<u2") for tensor in tensors})
    own = {use.slot: use for use in dram_uses(status_of(job, cluster.servers[0]), "")}
    assert 0 < own["rocksdb"].bytes <= own["rocksdb"].reserved_bytes
    assert own["messages"].bytes == 0, "no call is under way"
    assert 1 << 20 <= own["messages"].peak_bytes <= own["messages"].reserved_bytes, "a chunk of 1 MiB was in hand"


def test_budget_is_never_exceeded_and_peaks_are_kept(make_cluster):
    cluster = make_cluster(1, memory="200MiB")
    tensors = tensors_of(8 << 20)
    job = start_job(cluster, "peaks", tensors)
    generator = np.random.default_rng(2)
    arrays = {tensor.name: generator.integers(0x3C00, 0x3E00, tensor.shape, dtype="<u2") for tensor in tensors}
    job.load(arrays)
    for _ in range(3):
        job.step(arrays, [ADAMW])
    status = status_of(job, cluster.servers[0])
    assert status.memory_budget_bytes == 200 << 20
    assert status.memory_bytes <= status.memory_peak_bytes <= status.memory_budget_bytes
    assert all(use.bytes <= use.peak_bytes for use in status.uses)
    staging = [use for use in status.uses if use.slot == "staging" and use.job == job.name]
    assert sum(use.peak_bytes for use in staging) >= 2 * 8 << 20


@pytest.mark.slow
def test_a_pull_that_nobody_takes_is_ended(make_cluster):
    """Without a limit such a pull would keep the version it reads, and its memory, from the next apply for ever."""
    cluster = make_cluster(1)
    job = start_job(cluster, "stalled", tensors_of(32 << 20))
    job.load({tensor.name: np.full(tensor.shape, 0x3C00, "<u2") for tensor in job.tensors})
    regions = [job.region(tensor.name, dtype="F32") for tensor in job.tensors]  # before the call, whose memory is measured

    def held_bytes():
        return sum(use.bytes for use in dram_uses(status_of(job, cluster.servers[0]), job.name) if use.slot == "messages")

    call = job.data(job.tensors[0].name).Pull(stubs().data.PullRequest(job=job.name, version=0, regions=regions))
    next(call)
    assert held_bytes() > 0
    end = time.monotonic() + 2 * STALL_SECONDS
    while held_bytes() > 0:
        assert time.monotonic() < end, "the server still waits for the caller"
    with pytest.raises(grpc.RpcError) as caught:
        list(call)
    assert caught.value.code() == grpc.StatusCode.CANCELLED


def nvme_bytes(status, job):
    return total_bytes(use for use in status.uses if use.tier == "NVME" and use.job == job.name)


def test_spilled_slots_come_back_when_a_guest_has_gone(make_cluster):
    cluster = make_cluster(1, memory="128MiB")
    tensors = [Tensor(f"layers.{i}.weight", (1024, 1024)) for i in range(4)]
    host, guest = (cluster.job(name, tensors) for name in ("host", "guest"))
    weights = {tensor.name: np.full(tensor.shape, 3, "f4") for tensor in tensors}
    for job in (host, guest):
        job.create()
        job.configure(job.groups(state="fp32"))
        job.join()
        job.load(weights)
    assert nvme_bytes(status_of(host, cluster.servers[0]), host) > 0
    host.step(weights, [ADAMW])
    held = {name: host.pull(name).tobytes() for name in weights}
    guest.delete()
    wait_until(lambda: nvme_bytes(status_of(host, cluster.servers[0]), host) == 0)
    assert {name: host.pull(name).tobytes() for name in weights} == held
    host.step(weights, [ADAMW])
