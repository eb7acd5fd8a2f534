"""Tensors that are placed whole: each on one server, with the same bits, and unchanged when the job is created again."""
import dataclasses

import pytest

from clusters import SMALL_SHARD_ELEMENTS, SMALL_TENSORS
from plain_client import stubs
from test_bad_input import ADAMW, arrays, refused


@pytest.fixture(scope="module")
def cluster(make_module_cluster):
    return make_module_cluster(3)


def made(cluster, name, whole):
    tensors = [dataclasses.replace(tensor, whole=tensor.name in whole) for tensor in SMALL_TENSORS]
    return cluster.job(name, tensors, shard_elements=SMALL_SHARD_ELEMENTS)


def servers_of(job):
    return {name: {job.owners[key] for key in job.owners if key[0] == index} for name, index in job.index.items()}


def test_whole_tensors_lie_on_one_server_each_and_make_the_same_bits(cluster):
    snapshots = []
    for name, whole in (("split", ()), ("whole", ("layers.0.weight", "head.weight"))):
        job = made(cluster, name, whole)
        job.create(seed=7)
        job.configure(job.groups(state="8bit"))
        job.join()
        job.load(arrays(0))
        job.step(arrays(1), [ADAMW])
        snapshots.append(job.snapshot())
        assert (len(servers_of(job)["layers.0.weight"]) == 1) == bool(whole)
        told = {run.tensor: run.reason for run in job.read_placement().placement.runs}
        for tensor in SMALL_TENSORS:
            assert told[job.index[tensor.name]].startswith("whole tensor, ") == (tensor.name in whole), told
    assert snapshots[0] == snapshots[1]


def test_manifest_carries_the_flag_and_its_digest(cluster):
    digests = [made(cluster, name, whole).create(seed=7).manifest_digest
               for name, whole in (("one.a", ()), ("one.b", ("layers.0.weight",)))]
    assert digests[0] != digests[1]
    manifest = made(cluster, "one.b", ()).job().GetManifest(stubs().job.GetManifestRequest(job="one.b"), timeout=60)
    assert [spec.whole for spec in manifest.tensors] == [spec.name == "layers.0.weight" for spec in manifest.tensors]
    assert manifest.manifest_digest == digests[1]


@pytest.mark.parametrize("first, second", [((), ("layers.0.weight",)), (("layers.0.weight",), ())], ids=["split", "whole"])
def test_job_that_exists_keeps_its_placement(cluster, first, second):
    name = f"again.{len(first)}"
    job = made(cluster, name, first)
    created = job.create(seed=7)
    placement = job.read_placement()
    again = made(cluster, name, second)
    answer = again.create(seed=7)
    assert answer.existed and answer.manifest_digest == created.manifest_digest
    assert again.read_placement() == placement
    with refused("ALREADY_EXISTS", "CONFLICT", name):
        made(cluster, name, second).create(seed=8)
