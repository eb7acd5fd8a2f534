"""A piece of SetState that is refused sets nothing, and the LOAD after it is a step like any other."""
import time

import grpc
import numpy as np
import pytest

from clusters import wait_until
from plain_client import ADAMW, chunk_checksum, chunks_of_piece
from test_restart import TENSORS, random_arrays, recovered, rejoin_at, start_job, state_of, step_all

BIAS = random_arrays(7)["bias"]


def chunks(job, more=b""):
    made = chunks_of_piece(job.region("bias", "weight", "F32", None, 0), BIAS.tobytes() + more)
    made[0].key.CopyFrom(job.key())
    return made


def wrong_checksum(job):
    made = chunks(job)
    made[0].checksum ^= 1
    return made


def wrong_digest(job):
    made = chunks(job)
    made[-1].piece_digest.low ^= 1
    return made


def wrong_length(job):
    return chunks(job, b"1234")


def wrong_offset(job):
    made = chunks(job)
    made[0].offset_bytes = 1 << 20
    return made


def cut_off(job):
    made = chunks(job)
    made[0].payload = made[0].payload[:600]
    made[0].checksum = chunk_checksum(made[0].payload)
    made[0].ClearField("piece_digest")
    return made


def given_up(job):
    """The stream is cancelled by its client while the piece is under way."""
    for chunk in cut_off(job):
        yield chunk
        time.sleep(2)


@pytest.mark.parametrize("refused", [wrong_checksum, wrong_digest, wrong_length, wrong_offset, cut_off, given_up])
def test_load_after_a_refused_piece_can_be_applied(make_cluster, refused):
    cluster = make_cluster(1)
    job = start_job(cluster)
    step_all(job, 1)
    before = job.pull_all()
    with pytest.raises(grpc.RpcError):
        job.data("bias").SetState(iter(refused(job)), timeout=1 if refused is given_up else 60)
    edited = {"layers.0.weight": random_arrays(9)["layers.0.weight"]}
    job.set_state(edited)
    job.commit(kind="LOAD")
    wait_until(lambda: job.status().applied_step == 2)
    after = job.pull_all()
    for tensor in TENSORS:
        wanted = edited.get(tensor.name, before[tensor.name])
        assert np.array_equal(after[tensor.name].reshape(-1), np.asarray(wanted).reshape(-1)), tensor.name
    step_all(job, 3)
    expected = job.snapshot()
    cluster.restart()
    assert recovered(job).committed_step == 3 and state_of(job) == "READY"
    assert job.snapshot() == expected
    rejoin_at(job, 3)
    job.push(random_arrays(4))
    job.commit([ADAMW])


def test_load_of_refused_pieces_alone_changes_nothing(make_cluster):
    cluster = make_cluster(2)
    job = start_job(cluster)
    step_all(job, 1)
    before = job.pull_all()
    for refused in (wrong_checksum, wrong_digest, cut_off):
        with pytest.raises(grpc.RpcError):
            job.data("bias").SetState(iter(refused(job)), timeout=60)
    job.commit(kind="LOAD")
    wait_until(lambda: job.status().applied_step == 2)
    after = job.pull_all()
    for name, values in before.items():
        assert np.array_equal(after[name], values), name
    cluster.restart()
    assert recovered(job).committed_step == 2 and state_of(job) == "READY"
