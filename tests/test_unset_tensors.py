"""Tensors that the first LOAD leaves out (TensorSpec.may_be_unset): they take no room until they are set, through restarts too."""
import numpy as np

from clusters import wait_until
from plain_client import ADAMW, Tensor, stubs
from test_bad_input import refused
from test_restart import recovered, rejoin_at

TRAINED, BASE = Tensor("w", (40, 30)), Tensor("base", (500, 400), may_be_unset=True)


def test_a_tensor_is_set_later_and_survives_restarts(make_cluster):
    cluster = make_cluster(2)
    job = cluster.job("unset", [TRAINED, BASE], shard_elements=25_600)
    job.create()
    job.configure(job.groups(parts=[["w"]]))
    job.join()
    generator = np.random.default_rng(1)
    weight, base = (generator.standard_normal(tensor.shape).astype("<f4") for tensor in (TRAINED, BASE))
    job.load({"w": weight})
    for restarted in (False, True):
        assert not any(shard.slots for shard in job.describe("base").shards)
        with refused("NOT_FOUND", "UNSET", "'base'"):
            job.pull("base")
        if not restarted:
            job.push({"w": np.ones(TRAINED.shape, "<f4")})
            job.commit([ADAMW])
            weight = job.pull("w")
        wait_until(lambda: job.status().applied_step == job.committed_step)
        step = job.committed_step
        cluster.restart()
        assert recovered(job).committed_step == step
        rejoin_at(job, step)
        assert np.array_equal(job.pull("w"), weight)
    job.set_state({"base": base}, slot="master", dtype="F32")
    job.commit(kind="LOAD")
    assert np.array_equal(job.pull("base", "master", dtype="F32"), base)
    wait_until(lambda: job.status().applied_step == job.committed_step)
    step = job.committed_step
    cluster.restart()
    assert recovered(job).committed_step == step
    rejoin_at(job, step)
    assert np.array_equal(job.pull("base", "master", dtype="F32"), base) and np.array_equal(job.pull("w"), weight)


def test_a_part_of_a_tensor_does_not_set_it(make_cluster):
    cluster = make_cluster(1)
    job = cluster.job("part", [TRAINED, BASE], shard_elements=25_600)
    job.create()
    job.configure(job.groups(parts=[["w"]]))
    job.join()
    job.load({"w": np.zeros(TRAINED.shape, "<f4")})
    job.set_state({"base": [(([0, 0], [10, 400]), np.ones((10, 400), "<f4"))]})
    with refused("FAILED_PRECONDITION", "LOADING", "'base'"):
        job.commit(kind="LOAD")
    job.join()
    with refused("NOT_FOUND", "UNSET", "'base'"):
        job.pull("base")
    job.push({"w": np.ones(TRAINED.shape, "<f4")})
    job.commit([ADAMW])
    assert job.committed_step == 1


def test_an_existing_job_keeps_what_it_was_created_with(make_cluster):
    cluster = make_cluster(1)
    job = cluster.job("kept", [TRAINED, Tensor("base", (500, 400), may_be_unset=True, value_digest="one")])
    job.create()
    again = cluster.job("kept", [TRAINED, Tensor("base", (500, 400), value_digest="other")])
    assert again.create().existed
    base = job.job().GetManifest(stubs().job.GetManifestRequest(job="kept"), timeout=60).tensors[1]
    assert (base.may_be_unset, base.value_digest) == (True, "one")
