"""Optimizer "store": the job has exactly the pushed weights, or the mean of several contributors'."""
import numpy as np
import pytest

from clusters import SMALL_SHARD_ELEMENTS, SMALL_TENSORS
from plain_client import from_bfloat16_bits
from test_bad_input import arrays, refused


@pytest.fixture(scope="module")
def cluster(make_module_cluster):
    return make_module_cluster(2)


@pytest.fixture
def job(cluster, job_name):
    job = cluster.job(job_name, SMALL_TENSORS, shard_elements=SMALL_SHARD_ELEMENTS)
    job.create(seed=7)
    job.configure(job.groups("store"))
    return job


def fp32(tensor, values):
    return from_bfloat16_bits(values) if tensor.dtype == "BF16" else values


def test_masters_are_the_bits_that_were_pushed(job):
    job.join()
    job.load(arrays(0))
    for seed, scale in ((1, 1.0), (2, 4e37), (3, 1e-40)):  # ordinary, near the largest, and subnormal numbers
        pushed = arrays(seed, scale)
        job.step(pushed, [{}])
        for tensor in SMALL_TENSORS:
            if tensor.kind == "PARAMETER":
                assert job.pull(tensor.name, "master").tobytes() == fp32(tensor, pushed[tensor.name]).tobytes(), (tensor.name, seed)


def test_contributors_are_averaged(job):
    job.join([job.layout("SUM"), job.layout("SUM")])
    job.load(arrays(0))
    pushed = [arrays(1), arrays(2)]
    for rank in (0, 1):
        job.push(pushed[rank], rank=rank)
    job.commit([{}])
    for tensor in SMALL_TENSORS:
        if tensor.kind == "PARAMETER":
            a, b = (fp32(tensor, values[tensor.name]) for values in pushed)
            assert np.array_equal(job.pull(tensor.name, "master"), ((a + b) * np.float32(0.5)).reshape(tensor.shape)), tensor.name


def test_weights_are_neither_clipped_nor_scaled(job):
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "max_norm is 1.5", "group 0", "'store'"):
        job.configure(job.groups("store"), max_norm=1.5)
    job.join()
    job.load(arrays(0))
    before = job.snapshot()
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "loss_scale is 2", "group 0", "'store'"):
        job.commit([{}], loss_scale=2.0)
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "lr"):
        job.commit([{"lr": 0.1}])
    job.abort()
    assert job.snapshot() == before
    job.step(arrays(1), [{}])
    assert job.pull("layers.0.weight", "master").tobytes() == arrays(1)["layers.0.weight"].tobytes()
