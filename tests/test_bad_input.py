"""Bad input on a running job. Each is refused with the thing, its value and the limit; no bit changes; then the step is made.

Bad starts (directories, files, disks) are in test_bad_start.py, lost processes in test_kill_worker.py and test_restart.py.
"""
import contextlib
import os
import socket

import grpc
import numpy as np
import pytest

from clusters import SMALL_SHARD_ELEMENTS, SMALL_TENSORS, wait_until
from plain_client import ADAMW, LEAF_BYTES, PlainJob, Tensor, bfloat16_bits, chunk_checksum, chunks_of_piece, detail_of, stubs

WIDE, BIAS, HEAD = "layers.0.weight", "layers.0.bias", "head.weight"


def arrays(seed, scale=1.0):
    """Return random contents of every parameter in its own dtype; the buffer only with weights (seed 0)."""
    generator = np.random.default_rng(seed)
    made = {}
    for tensor in SMALL_TENSORS:
        values = (scale * generator.standard_normal(tensor.shape)).astype("<f4")
        if tensor.kind == "PARAMETER":
            made[tensor.name] = bfloat16_bits(values).reshape(tensor.shape) if tensor.dtype == "BF16" else values
        elif seed == 0:
            made[tensor.name] = np.arange(tensor.element_count, dtype="<i8").reshape(tensor.shape)
    return made


def ready_job(cluster, name):
    """Return a job that has made step 1, so that every slot has contents."""
    job = cluster.job(name, SMALL_TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create(seed=7)
    job.configure(job.groups(state="8bit"))
    job.join()
    job.load(arrays(0))
    job.step(arrays(1), [ADAMW])
    return job


@pytest.fixture(scope="module")
def cluster(make_module_cluster):
    return make_module_cluster(2, tcp=True)


@pytest.fixture(scope="module")
def undisturbed(cluster):
    """Return all bits after step 2 of a job without bad input."""
    job = ready_job(cluster, "undisturbed")
    job.step(arrays(2), [ADAMW])
    return job.snapshot()


@contextlib.contextmanager
def refused(code, reason, *fragments):
    """The body must raise this code and ErrorDetail reason, with every fragment in the message."""
    with pytest.raises(grpc.RpcError) as caught:
        yield caught
    error = caught.value
    detail = detail_of(error)
    told = f"{error.code().name} {stubs().types.ErrorDetail.Reason.Name(detail.reason)}: {error.details()}\n{detail}"
    assert error.code() == getattr(grpc.StatusCode, code), told
    assert detail.reason == stubs().types.ErrorDetail.Reason.Value(reason), told
    for fragment in fragments:
        assert str(fragment) in error.details(), f"'{fragment}' is not in: {told}"


@pytest.fixture
def job(cluster, undisturbed, job_name):
    """Yield a job at step 1. Afterwards no bit has changed, and step 2 makes the undisturbed bits."""
    job = ready_job(cluster, job_name)
    before = job.snapshot()
    yield job
    assert job.snapshot() == before, "bad input changed stored bits"
    job.attempt = job.status().attempt
    job.step(arrays(2), [ADAMW])
    assert job.snapshot() == undisturbed, "the step after bad input made other bits"
    job.delete()


def send(job, messages, tensor=WIDE, shard=0):
    return job.data(tensor, shard).Push(iter(messages), timeout=60)


def wide_messages(job, shard=0, rank=0, seed=2, **key):
    """Return a correct push of one shard of the wide tensor: two chunks."""
    payload = dict(job.pieces(WIDE, arrays(seed)[WIDE]))[shard]
    messages = chunks_of_piece(job.region(WIDE, shard=shard), payload)
    messages[0].key.CopyFrom(job.key(rank, **key))
    return messages


def one_piece(job, region, payload):
    messages = chunks_of_piece(region, payload)
    messages[0].key.CopyFrom(job.key())
    return messages


# Regions.

def test_unknown_tensor_is_refused(job):
    region = job.region("layers.9.weight", shard=0)
    with refused("NOT_FOUND", "UNKNOWN_TENSOR", "layers.9.weight", job.name):
        send(job, one_piece(job, region, bytes(1200)), BIAS)
    with refused("NOT_FOUND", "UNKNOWN_TENSOR", "layers.9.weight"):
        request = stubs().data.PullRequest(job=job.name, version=1, regions=[region])
        list(job.data(BIAS).Pull(request, timeout=60))
    with refused("NOT_FOUND", "UNKNOWN_TENSOR", "layers.9.weight"):
        job.describe("layers.9.weight")


def test_more_shards_than_the_limit_are_refused_before_anything_is_reserved(job, cluster):
    other = PlainJob(cluster.address, "too-many-shards", [Tensor("huge", (1 << 38,))], shard_elements=256)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "huge", 1 << 20, 256):
        other.create()
    other.connections.close()


def test_unknown_job_is_refused(job, cluster):
    other = PlainJob(cluster.address, "no-such-job", SMALL_TENSORS)
    with refused("NOT_FOUND", "UNKNOWN_JOB", "no-such-job"):
        other.status()
    with refused("NOT_FOUND", "UNKNOWN_JOB", "no-such-job"):
        other.describe(BIAS)
    other.connections.close()


@pytest.mark.parametrize("box, fragments", [
    pytest.param(([0], [300]), ("1 offsets", "2"), id="wrong dimensions"),
    pytest.param(([0] * 9, [1] * 9), ("8", "9"), id="nine dimensions"),
    pytest.param(([1000, 0], [101, 1000]), ("1100",), id="beyond the shape"),
    pytest.param(([0, 0], [0, 1000]), ("extent 0",), id="empty"),
    pytest.param((1_000_000, 100_001), ("1100000",), id="flat beyond the end"),
    pytest.param((2**63, 2**64 - 1), ("1100000", str(2**63)), id="flat overflow"),
    pytest.param(([2**63, 0], [2**64 - 1, 1000]), ("1100", str(2**63)), id="overflow"),
])
@pytest.mark.parametrize("direction", ["push", "pull"])
def test_box_outside_the_tensor_is_refused(job, direction, box, fragments):
    region = job.region(WIDE, box=box, shard=0)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", WIDE, *fragments):
        if direction == "push":
            send(job, one_piece(job, region, bytes(4000)))
        else:
            request = stubs().data.PullRequest(job=job.name, version=1, regions=[region])
            list(job.data(WIDE).Pull(request, timeout=60))


def test_shard_that_does_not_exist_is_refused(job):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", WIDE, "3"):
        send(job, one_piece(job, job.region(WIDE, shard=3), bytes(4000)))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", WIDE, "shard"):
        send(job, one_piece(job, job.region(WIDE), bytes(4000)))


@pytest.mark.parametrize("dtype, name", [("U8", "uint8"), ("I64", "int64")])
def test_dtype_that_a_gradient_cannot_have_is_refused(job, dtype, name):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", BIAS, name, "float32"):
        send(job, one_piece(job, job.region(BIAS, dtype=dtype, shard=0), bytes(1200)), BIAS)


def test_slot_that_does_not_exist_is_refused(job):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", BIAS, "momentum_buffer"):
        job.pull(BIAS, "momentum_buffer", "F32")
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", BIAS, "weight"):
        send(job, one_piece(job, job.region(BIAS, "weight", shard=0), bytes(1200)), BIAS)


@pytest.mark.parametrize("size", [1196, 1204, 1199])
def test_piece_of_the_wrong_length_is_refused(job, size):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", BIAS, 1200):
        send(job, one_piece(job, job.region(BIAS, shard=0), bytes(size)), BIAS)


def test_push_outside_the_layout_and_overlapping_pieces_are_refused(job):
    """The layout is whole tensors, so a part of one, and a part that overlaps a stored piece, are outside it."""
    send(job, wide_messages(job))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", WIDE):
        send(job, one_piece(job, job.region(WIDE, box=(100, 100), shard=0), bytes(400)))


def test_overlapping_boxes_of_new_contents_are_refused_and_the_first_are_kept(job):
    def piece(first, count):
        region = job.region(WIDE, "weight", "F32", (first, count), 0)
        return one_piece(job, region, np.full(count, 1.5, "<f4").tobytes())
    push = job.data(WIDE).SetState
    assert push(iter(piece(0, 512)), timeout=60).piece_count == 1
    with refused("ALREADY_EXISTS", "CONFLICT", WIDE, "weight", "flat[256]+[512]", "flat[0]+[512]"):
        push(iter(piece(256, 512)), timeout=60)
    assert push(iter(piece(0, 512)), timeout=60).repeated_count == 1
    job.abort()


def test_push_of_a_buffer_is_refused(job):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "mask"):
        send(job, one_piece(job, job.region("mask", dtype="F32", shard=0), bytes(120)), "mask")


def test_shard_of_another_server_is_refused(job, cluster):
    owner = job.owners[job.index[WIDE], 0]
    other = next(server.address for server in cluster.servers if server.address != owner)
    with refused("NOT_FOUND", "NOT_OWNER", WIDE):
        job.connections.data(other).Push(iter(wide_messages(job)), timeout=60)


# Manifests.

@pytest.mark.parametrize("tensor, fragments", [
    pytest.param(Tensor("a", (1,) * 9), ("9", "8"), id="nine dimensions"),
    pytest.param(Tensor("a", (3, 0)), ("0",), id="dimension zero"),
    pytest.param(Tensor("a", (1 << 40, 1 << 40)), (1 << 40,), id="too many elements"),
    pytest.param(Tensor("layers..weight", (3,)), ("layers..weight", ".."), id="dots"),
    pytest.param(Tensor("../../etc/passwd", (3,)), ("../../etc/passwd", ".."), id="path"),
    pytest.param(Tensor("n" * 257, (3,)), ("257", "256"), id="long name"),
    pytest.param(Tensor("", (3,)), ("1 to 256",), id="no name"),
    pytest.param(Tensor("a b", (3,)), ("a b",), id="space"),
    pytest.param(Tensor("a", (3,), "I64"), ("a", "int64"), id="integer parameter"),
    pytest.param(Tensor("a", (3,), tied_names=tuple(f"t{i}" for i in range(17))), ("17", "16"), id="tied names"),
    pytest.param(Tensor("a", (3,), tied_names=("a",)), ("a",), id="repeated name"),
    pytest.param(Tensor("a", (3,), value_digest="d" * 65), ("value_digest", "65", "64"), id="long digest"),
])
def test_manifest_out_of_limits_is_refused(job, cluster, tensor, fragments):
    other = cluster.job(f"{job.name}-other", [tensor])
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", *fragments):
        other.create()
    with refused("NOT_FOUND", "UNKNOWN_JOB", other.name):
        other.status()


@pytest.mark.parametrize("name", ["..", "a/../b", "n" * 257, "", "a b"])
def test_job_name_out_of_limits_is_refused(job, cluster, name):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "job"):
        cluster.job(name, SMALL_TENSORS).create()


@pytest.mark.parametrize("shard_elements", [255, 300, 1 << 27])
def test_shard_size_out_of_limits_is_refused(job, cluster, shard_elements):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", shard_elements, "256"):
        cluster.job(f"{job.name}-other", SMALL_TENSORS, shard_elements=shard_elements).create()


def test_second_job_of_a_name_with_another_manifest_is_refused(job, cluster):
    tensors = [Tensor("other", (3,)), *SMALL_TENSORS[1:]]
    with refused("ALREADY_EXISTS", "CONFLICT", job.name):
        cluster.job(job.name, tensors, shard_elements=SMALL_SHARD_ELEMENTS).create(seed=7)
    with refused("ALREADY_EXISTS", "CONFLICT", job.name):
        cluster.job(job.name, SMALL_TENSORS, shard_elements=SMALL_SHARD_ELEMENTS).create(seed=8)


@pytest.mark.parametrize("level", ["JOURNALED", "REPLICATED", "REPLICATED_JOURNALED"])
def test_durability_level_that_is_not_built_is_refused_by_name(job, cluster, level):
    with refused("UNIMPLEMENTED", "BAD_REQUEST", level, "MEMORY"):
        other = cluster.job(f"{job.name}-other", SMALL_TENSORS)
        other.create(durability=stubs().types.Durability.Value(f"DURABILITY_{level}"))


@pytest.mark.parametrize("options, fragment", [
    ({"optimizer": "adagradx"}, "adagradx"), ({"state": "2bit"}, "2bit"), ({"rounding": "up"}, "up"),
    ({"master": "fp8"}, "fp8")])
def test_unknown_optimizer_is_refused(job, cluster, options, fragment):
    other = cluster.job(f"{job.name}-other", SMALL_TENSORS)
    other.create()
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", fragment):
        other.configure(other.groups(**options))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "mask"):
        other.configure(other.groups(parts=[["mask"]]))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", BIAS):
        other.configure(other.groups(parts=[[BIAS], [BIAS]]))
    other.delete()


def test_other_optimizer_after_the_first_step_is_refused(job):
    with refused("FAILED_PRECONDITION", "CONFLICT", job.name):
        job.configure(job.groups(state="fp32"))
    assert not job.configure(job.groups(state="8bit")).changed


# Steps and attempts.

@pytest.mark.parametrize("step", [0, 1, 3, -5], ids=["old", "committed", "future", "negative"])
def test_push_for_another_step_is_refused(job, step):
    with refused("FAILED_PRECONDITION", "WRONG_STEP", step, 2):
        send(job, wide_messages(job, step=step))
    if step != 1:  # a repeat of the last commit is answered from store
        with refused("FAILED_PRECONDITION", "WRONG_STEP", step, 2):
            job.commit([ADAMW], step=step)


def test_push_of_another_attempt_generation_or_epoch_is_refused(job):
    with refused("ABORTED", "STALE_ATTEMPT", "attempt", job.attempt + 1, job.attempt):
        send(job, wide_messages(job, attempt=job.attempt + 1))
    with refused("FAILED_PRECONDITION", "STALE_GENERATION", "generation", job.generation + 1, job.generation):
        send(job, wide_messages(job, generation=job.generation + 1))
    over = job.attempt
    job.abort()
    with refused("ABORTED", "STALE_ATTEMPT", "attempt", over, job.attempt):
        send(job, wide_messages(job, attempt=over))
    if job.epoch > 1:
        with refused("FAILED_PRECONDITION", "STALE_EPOCH", job.epoch):
            send(job, wide_messages(job, epoch=job.epoch - 1))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "rank"):
        send(job, wide_messages(job, rank=5))


def test_commit_and_abort_of_another_attempt_generation_or_step_are_refused(job):
    with refused("ABORTED", "STALE_ATTEMPT", job.attempt + 1, job.attempt) as caught:
        job.job().CommitStep(job.commit_request(0, [ADAMW], attempt=job.attempt + 1), timeout=60)
    assert detail_of(caught.value).attempt == job.attempt
    with refused("FAILED_PRECONDITION", "STALE_GENERATION", job.generation + 1):
        job.job().CommitStep(job.commit_request(0, [ADAMW], generation=job.generation + 1), timeout=60)

    def abort(step=2, attempt=job.attempt, generation=job.generation):
        request = stubs().job.AbortStepRequest(job=job.name, generation=generation, step=step, attempt=attempt)
        return job.job().AbortStep(request, timeout=60)

    with refused("FAILED_PRECONDITION", "DECIDED", 1):
        abort(step=1)
    with refused("FAILED_PRECONDITION", "STALE_GENERATION"):
        abort(generation=job.generation + 1)
    with refused("FAILED_PRECONDITION", "WRONG_STEP", 3):
        abort(step=3)
    with refused("FAILED_PRECONDITION", "WRONG_STEP", job.attempt + 1):
        abort(attempt=job.attempt + 1)


def test_same_push_key_with_other_bytes_is_refused_and_the_first_is_kept(job):
    assert send(job, wide_messages(job)).piece_count == 1
    assert send(job, wide_messages(job)).repeated_count == 1
    with refused("ALREADY_EXISTS", "CONFLICT", WIDE):
        send(job, wide_messages(job, seed=3))


def test_loss_scales_that_differ_in_one_attempt_are_refused(job):
    """The server that has both scales refuses, or the leader at the commit."""
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "scale", 1024):
        job.push(arrays(2))
        job.commit([ADAMW], loss_scale=1024.0)
    job.abort()


@pytest.mark.parametrize("scale", [1e-320, 1e-39, 1e39, -1.0, np.inf, np.nan])
def test_loss_scale_without_an_fp32_inverse_is_refused(job, scale):
    """A gradient times the inverse would become infinite, or lose bits."""
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "loss_scale"):
        send(job, wide_messages(job, loss_scale=scale))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "loss_scale"):
        job.commit([ADAMW], loss_scale=scale)


def waiting_commit(job):
    """Start rank 0's CommitStep, which has arrived and waits for pushes."""
    call = job.job().CommitStep.future(job.commit_request(0, [ADAMW]), timeout=60)
    wait_until(lambda: list(job.status().committed_ranks) == [0])
    return call


def test_contributors_with_different_hyper_parameters_are_refused(job):
    job.join([job.layout("SUM")] * 2)
    first = waiting_commit(job)
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "lr", "0.5", "0.001"):
        job.job().CommitStep(job.commit_request(1, [{**ADAMW, "lr": 0.5}]), timeout=60)
    first.cancel()
    job.join()


def test_second_commit_with_other_hyper_parameters_is_refused(job):
    """The same rank calls again while its first call waits for the pushes."""
    first = waiting_commit(job)
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "weight_decay", "0.75", "0.01"):
        job.job().CommitStep(job.commit_request(0, [{**ADAMW, "weight_decay": 0.75}]), timeout=60)
    first.cancel()
    job.abort()


def test_repeat_of_a_committed_step_with_other_hyper_parameters_is_refused(cluster, job_name):
    job = ready_job(cluster, job_name)
    after, request = job.snapshot(), job.commit_request(0, [{**ADAMW, "lr": 0.25}], step=1)
    request.attempt = 1
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "lr", "0.25", "0.001"):
        job.job().CommitStep(request, timeout=60)
    assert job.snapshot() == after
    job.delete()


@pytest.mark.parametrize("change, fragment", [
    ({"lr": float("nan")}, "lr"), ({"lr": -1.0}, "lr"), ({"beta1": 1.5}, "beta1"), ({"eps": -1.0}, "eps"),
    ({"momentum": 0.5}, "momentum")])
def test_hyper_parameters_out_of_range_are_refused(job, change, fragment):
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", fragment):
        job.commit([{**ADAMW, **change}])
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "lr"):
        job.commit([{name: value for name, value in ADAMW.items() if name != "lr"}])
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "1"):
        job.commit([])


def test_pull_of_a_version_applied_over_is_refused_naming_the_current_one(job):
    with refused("OUT_OF_RANGE", "VERSION_GONE", WIDE, 0, 1) as caught:
        job.pull(WIDE, version=0)
    assert detail_of(caught.value).version == 1


def test_pull_of_a_version_that_no_attempt_can_make_is_refused(job):
    with refused("FAILED_PRECONDITION", "WRONG_STEP", 9):
        job.pull(WIDE, version=9)


def test_pull_of_the_next_version_ends_at_its_deadline_or_when_aborted(job):
    with pytest.raises(grpc.RpcError) as caught:
        job.pull(WIDE, version=2, timeout=0.05)
    assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED


# Chunks.

def _missing(messages):
    del messages[1]


def _repeated(messages):
    messages.insert(1, type(messages[0])())
    messages[1].CopyFrom(messages[0])
    messages[1].ClearField("key")
    messages[1].ClearField("region")


def _out_of_order(messages):
    messages[0].offset_bytes, messages[1].offset_bytes = messages[1].offset_bytes, messages[0].offset_bytes


def _gap(messages):
    messages[1].offset_bytes += LEAF_BYTES


def _uneven_offset(messages):
    messages[1].offset_bytes -= 4


def _no_digest(messages):
    messages[1].ClearField("piece_digest")


def _no_region(messages):
    messages[0].ClearField("region")


def _no_key(messages):
    messages[0].ClearField("key")


def _late_key(messages):
    messages[1].key.CopyFrom(messages[0].key)


def _no_payload(messages):
    messages[1].payload = b""


def _over_the_chunk_limit(messages):
    messages[0].payload = bytes((4 << 20) + 4)
    messages[0].checksum = chunk_checksum(messages[0].payload)


WHOLE_BYTES = 4 * SMALL_SHARD_ELEMENTS  # bytes of the first shard of the wide tensor, as float32: two leaves
TOLD_OF_DAMAGE = {
    _missing: (WIDE, LEAF_BYTES, WHOLE_BYTES),
    _repeated: (WIDE, "offset 0", LEAF_BYTES, "repeated"),
    _out_of_order: (WIDE, f"offset {LEAF_BYTES}", "expected 0"),
    _gap: (WIDE, f"offset {2 * LEAF_BYTES}", f"expected {LEAF_BYTES}"),
    _uneven_offset: (WIDE, f"offset {LEAF_BYTES - 4}", f"expected {LEAF_BYTES}"),
    _no_digest: (WIDE, "piece_digest", WHOLE_BYTES),
    _no_region: ("region",),
    _no_key: ("key",),
    _late_key: ("key",),
    _no_payload: (WIDE, "0 bytes", LEAF_BYTES),
    _over_the_chunk_limit: ((4 << 20) + 4, 4 << 20),
}


@pytest.mark.parametrize("damage", TOLD_OF_DAMAGE, ids=lambda damage: damage.__name__[1:])
def test_damaged_stream_is_refused(job, damage):
    messages = wide_messages(job)
    damage(messages)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", *TOLD_OF_DAMAGE[damage]):
        send(job, messages)
    assert list(job.query_push(job.owners[job.index[WIDE], 0]).pieces) == []


def test_stream_without_messages_is_refused(job):
    for method in (job.data(WIDE).Push, job.data(WIDE).SetState):
        with refused("INVALID_ARGUMENT", "BAD_REQUEST", "empty"):
            method(iter(()), timeout=60)


def test_error_about_a_name_of_20_kB_arrives(job):
    """gRPC gives up an error whose message and detail are longer than its limit of 8 KiB."""
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "yyy"):
        job.configure(job.groups(optimizer="y" * 20_000))


def _checksum(messages):
    messages[1].checksum ^= 1


def _payload_bit(messages):
    payload = bytearray(messages[1].payload)
    payload[12345] ^= 0x10
    messages[1].payload = bytes(payload)


def _digest(messages):
    messages[1].piece_digest.low ^= 1


@pytest.mark.parametrize("damage", [_checksum, _payload_bit, _digest], ids=lambda damage: damage.__name__[1:])
def test_wrong_checksum_is_refused_and_the_piece_can_be_sent_again(job, damage):
    messages = wide_messages(job)
    damage(messages)
    with refused("ABORTED", "CHECKSUM", WIDE):
        send(job, messages)
    assert send(job, wide_messages(job)).repeated_count == 0


def test_message_over_the_limit_is_refused(job):
    """gRPC itself ends the call before the message is read: the code is ResourceExhausted, and there is no ErrorDetail."""
    messages = wide_messages(job)
    messages[0].payload = bytes(80 << 20)
    with pytest.raises(grpc.RpcError) as caught:
        send(job, messages)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED, caught.value
    assert str(messages[0].ByteSize()) in caught.value.details() and str((4 << 20) + (64 << 10)) in caught.value.details(), caught.value


def test_control_message_over_the_limit_is_refused(job):
    """The transport allows a little more than 4 MiB, for the headers of chunks."""
    spec = Tensor("x" * 250, (1,)).spec()
    request = stubs().job.CreateJobRequest(job="long", tensors=[spec] * 16_200, more=True)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", request.ByteSize(), 4 << 20):
        job.job().CreateJob(request, timeout=60)
    commit = job.commit_request(0, [ADAMW], absent_tensors=range(2**21, 2**21 + 1_055_000))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", commit.ByteSize(), 4 << 20):
        job.job().CommitStep(commit, timeout=60)


def test_lists_that_nobody_ends_stay_within_the_budget(make_cluster):
    cluster = make_cluster(1, memory="64MiB")
    job = cluster.job("lists", (Tensor("w", (4,)),))
    page = [Tensor("x" * 200, (1,)).spec()] * 15_000
    with refused("RESOURCE_EXHAUSTED", "BUDGET", "lists", 64 << 20):
        for number in range(64):
            job.job().CreateJob(stubs().job.CreateJobRequest(job=f"list-{number}", tensors=page, more=True), timeout=60)
    status = job.admin().ServerStatus(stubs().admin.ServerStatusRequest(), timeout=60)
    held = {use.slot: use.bytes for use in status.uses}
    assert held["lists"] > 16 << 20 and status.memory_bytes <= status.memory_budget_bytes


def test_stream_cut_off_in_the_middle_leaves_no_piece(job):
    """A worker that dies during a push: its last piece is dropped, complete ones are kept."""
    send(job, wide_messages(job))
    address = job.owners[job.index[WIDE], 1]

    def broken():
        yield wide_messages(job, shard=1)[0]
        raise RuntimeError("the worker died")

    with pytest.raises(grpc.RpcError):
        job.connections.data(address).Push(broken(), timeout=60)
    assert [piece.region.shard for piece in job.query_push(job.owners[job.index[WIDE], 0]).pieces
            if piece.region.tensor == WIDE and piece.region.shard < 2] == [0]


@pytest.mark.parametrize("request_options, fragment", [
    ({"max_chunk_bytes": 1000}, "max_chunk_bytes"), ({"max_chunk_bytes": 8 << 20}, "max_chunk_bytes"),
    ({"regions": []}, "regions")])
def test_pull_request_out_of_limits_is_refused(job, request_options, fragment):
    options = {"regions": [job.region(BIAS)], **request_options}
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", fragment):
        list(job.data(BIAS).Pull(stubs().data.PullRequest(job=job.name, version=1, **options), timeout=60))


# Contributors.

def _layout_error(job, layouts, *fragments):
    """Join with these layouts; some rank must be refused. The job keeps its old generation, or gets a new one afterwards."""
    generation = job.job().Join(job.join_request(0, layouts[0], world_size=len(layouts)), timeout=60).generation
    calls = [job.job().Join.future(job.join_request(rank, layout, generation, len(layouts)), timeout=60)
             for rank, layout in enumerate(layouts)]
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", *fragments):
        errors = [call.exception() for call in calls]
        raise next(error for error in errors if error is not None)


def _boxes(job, wide):
    """Return the boxes of a layout with every trainable tensor whole, except the wide one, whose boxes are given."""
    boxes = {tensor.name: [(0, tensor.element_count)] for tensor in SMALL_TENSORS if tensor.kind == "PARAMETER"}
    return {**boxes, WIDE: wide}


@pytest.mark.parametrize("mode, first, second, fragments", [
    pytest.param("EXACTLY_ONCE", [(0, 500_000)], [(500_001, 599_999)], ("gap", "[500,0]", "500000 of 1100000", "0 contributors"),
                 id="gap"),
    pytest.param("EXACTLY_ONCE", [(0, 500_000)], [(499_999, 600_001)],
                 ("overlap", "[499,999]", "rank 0 in flat[0]+[500000]", "rank 1 in flat[499999]+[600001]", "exactly one"), id="overlap"),
    pytest.param("SUM", [(0, 1_100_000)], [(0, 500_000)],
                 ("uneven multiplicity", "[500,0]", "1 contributors", "rank 0 in flat[0]+[1100000]"), id="uneven"),
    pytest.param("EXACTLY_ONCE", [([0, 0], [1100, 501])], [([0, 500], [1100, 500])],
                 ("overlap", "[0,500]", "rank 0 in [0,0]+[1100,501]", "rank 1 in [0,500]+[1100,500]", "exactly one"),
                 id="overlapping columns"),
    pytest.param("EXACTLY_ONCE", [(0, 500_000), (400_000, 200_000)], [(600_000, 500_000)],
                 ("overlap", "rank 0", "flat[0]+[500000]", "flat[400000]+[200000]"), id="one rank overlaps itself"),
    pytest.param("EXACTLY_ONCE", [(0, 1_100_001)], [], ("flat[0]+[1100001]", 1_100_000), id="beyond the end"),
])
def test_layout_with_gap_overlap_or_uneven_multiplicity_is_refused(job, mode, first, second, fragments):
    layouts = [job.layout(mode, boxes=_boxes(job, first)), job.layout(mode, boxes={WIDE: second} if mode != "SUM"
                                                                      else _boxes(job, second))]
    _layout_error(job, layouts, WIDE, *fragments)
    job.join()


def test_layout_without_room_to_stage_is_refused_at_join(make_cluster):
    """The refusal names the budget. A layout that needs less then joins, and the step makes the usual bits."""
    cluster = make_cluster(1, memory="128MiB")
    job = ready_job(cluster, "crowded")
    before = job.snapshot()
    with refused("RESOURCE_EXHAUSTED", "BUDGET", "staging", 128 << 20):
        job.join([job.layout("SUM")] * 64)
    assert job.snapshot() == before
    job.join()
    job.step(arrays(2), [ADAMW])
    assert job.snapshot() != before


def test_second_contributor_with_the_same_rank_is_refused(job):
    request = job.join_request(0, job.layout(), job.generation, client_id="an impostor")
    with refused("ALREADY_EXISTS", "CONFLICT", "rank 0"):
        job.job().Join(request, timeout=60)


def test_generation_that_was_never_issued_is_refused_and_hides_nobody(job):
    request = job.join_request(0, job.layout(), job.generation + 1000, client_id="an impostor")
    with refused("FAILED_PRECONDITION", "STALE_GENERATION", job.generation + 1000):
        job.job().Join(request, timeout=60)
    assert list(job.status().joined_ranks) == [0]
    with refused("ALREADY_EXISTS", "CONFLICT", "rank 0"):
        job.job().Join(job.join_request(0, job.layout(), job.generation, client_id="an impostor"), timeout=60)


@pytest.mark.parametrize("rank, world_size, fragment", [(1, 1, "rank"), (0, 0, "world_size"), (0, 513, "512")])
def test_rank_or_world_size_out_of_limits_is_refused(job, rank, world_size, fragment):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", fragment):
        job.job().Join(job.join_request(rank, job.layout(), 0, world_size), timeout=60)


def test_superseded_generation_is_refused(job):
    old = wide_messages(job)
    old_commit = job.commit_request(0, [ADAMW])
    generation = job.generation
    job.join()
    with refused("FAILED_PRECONDITION", "STALE_GENERATION", generation):
        send(job, old)
    with refused("FAILED_PRECONDITION", "STALE_GENERATION", generation):
        job.job().CommitStep(old_commit, timeout=60)


def test_job_below_what_a_worker_saw_answers_data_loss(job):
    with refused("DATA_LOSS", "LOST", 9, 1):
        job.job().Join(job.join_request(0, job.layout(), min_committed_step=9), timeout=60)


def test_hold_over_ten_minutes_is_refused(job):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", 600_001, 600_000):
        job.hold(1, 600_001)
    with refused("OUT_OF_RANGE", "VERSION_GONE", 0, 1):
        job.hold(0, 1000)


def test_deletion_that_does_not_repeat_the_name_is_refused(job):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "confirm"):
        job.job().DeleteJob(stubs().job.DeleteJobRequest(job=job.name, confirm="another"), timeout=60)


# Numbers.

@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tensor", [WIDE, HEAD])
def test_non_finite_gradient_skips_the_step_on_all_shards(cluster, job_name, value, tensor):
    """One bad value: the step advances, no state byte changes, and the step does not count for bias correction."""
    job, twin = ready_job(cluster, job_name), ready_job(cluster, f"{job_name}-twin")
    before = job.snapshot()
    gradients = arrays(2)
    bad = np.float32(value)
    gradients[tensor].reshape(-1)[-1] = bfloat16_bits(np.array([np.inf * np.sign(bad)]))[0] if (
        tensor == HEAD and np.isinf(value)) else 0x7FC0 if tensor == HEAD else bad
    job.push(gradients)
    answer = job.commit([ADAMW])
    assert answer.outcome == stubs().job.CommitStepResponse.SKIP
    assert answer.step == 2 and answer.nonfinite_count == 1 and not np.isfinite(answer.gradient_norm)
    assert job.snapshot() == before
    assert {job.describe(name.name).summary.applied_count for name in SMALL_TENSORS if name.kind == "PARAMETER"} == {1}
    job.step(arrays(2), [ADAMW])
    twin.step(arrays(2), [ADAMW])
    assert job.snapshot() == twin.snapshot(), "bias correction must not count the skipped step"
    job.delete()
    twin.delete()


def test_absent_gradients_leave_a_tensor_untouched(cluster, job_name):
    job = ready_job(cluster, job_name)
    before = job.snapshot()
    gradients = arrays(2)
    del gradients[BIAS]
    job.push(gradients)
    job.commit([ADAMW], absent_tensors=[job.index[BIAS]])
    after = job.snapshot()
    for (tensor, slot), stored in after.items():
        if tensor in (BIAS, "mask"):
            assert stored == before[tensor, slot], (tensor, slot)
    assert after[WIDE, "weight"] != before[WIDE, "weight"]
    assert job.describe(BIAS).summary.applied_count == 1
    assert job.describe(WIDE).summary.applied_count == 2
    job.delete()


# The port.

@pytest.mark.parametrize("garbage", [
    pytest.param(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", id="http"), pytest.param(b"\x16\x03\x01\x02\x00" + bytes(512), id="tls"),
    pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096, id="broken http2"), pytest.param(None, id="random"),
    pytest.param(b"", id="nothing")])
def test_garbage_on_the_port_harms_nobody(job, cluster, garbage):
    garbage = os.urandom(1 << 16) if garbage is None else garbage
    for server in cluster.servers:
        host, port = server.address.split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection, contextlib.suppress(ConnectionError):
            connection.sendall(garbage)
        assert server.running()


def test_garbage_in_a_known_method_is_refused(job):
    channel = job.connections.channel(job.leader)
    with pytest.raises(grpc.RpcError):
        channel.unary_unary("/orlop.v1.Job/CommitStep")(b"\xff" * 100, timeout=60)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST"):
        channel.stream_unary("/orlop.v1.Data/Push")(iter([b"\xff" * 100]), timeout=60)
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/orlop.v1.Job/NoSuchMethod")(b"", timeout=60)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
