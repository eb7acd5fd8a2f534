"""Jobs of which some servers hold buffers alone, or nothing: what is committed is applied, and survives stops."""
import numpy as np
import pytest

from clusters import wait_until
from plain_client import ADAMW, Tensor
from test_restart import recovered, rejoin_at, state_of

KINDS = {
    "one parameter": [Tensor("w", (8,))],
    "a parameter and a buffer": [Tensor("w", (8,)), Tensor("count", (300,), "I64", "BUFFER")],
    "buffers alone": [Tensor("mean", (40,), "F32", "BUFFER"), Tensor("count", (), "I64", "BUFFER")],
}


def values_of(tensors, seed):
    generator = np.random.default_rng(seed)
    return {tensor.name: generator.integers(-9, 9, tensor.shape).astype("<i8" if tensor.dtype == "I64" else "<f4") for tensor in tensors}


def assert_holds(job, values):
    for name, array in values.items():
        assert np.array_equal(job.pull(name), array), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("servers", [2, 4])
def test_loads_and_steps_survive_where_servers_hold_little(make_cluster, kind, servers):
    cluster = make_cluster(servers)
    tensors = KINDS[kind]
    parameters = [tensor for tensor in tensors if tensor.kind != "BUFFER"]
    job = cluster.job("little", tensors, shard_elements=256)
    job.create()
    job.configure(job.groups())
    job.join()
    values = values_of(tensors, 1)
    job.load(values)
    assert_holds(job, values)
    for seed in (2, 3, 4):
        before = job.committed_step
        if parameters:
            job.push({tensor.name: np.ones(tensor.shape, "<f4") for tensor in parameters})
            job.commit([ADAMW])
            values |= {tensor.name: job.pull(tensor.name) for tensor in parameters}
        buffers = [tensor for tensor in tensors if tensor.kind == "BUFFER"]
        if buffers:  # as the statistics of a model are stored when it is closed
            edited = values_of(buffers[-1:], seed)
            job.set_state(edited)
            job.commit(kind="LOAD")
            values |= edited
        assert job.committed_step > before
        wait_until(lambda: job.status().applied_step == job.committed_step)
        assert_holds(job, values)
        step = job.committed_step
        if seed == 2:
            cluster.restart()
        else:  # servers one after the other, while the others run
            for server in cluster.servers:
                server.stop()
                server.start()
        assert recovered(job).committed_step == step and state_of(job) == "READY"
        rejoin_at(job, step)
        assert_holds(job, values)
