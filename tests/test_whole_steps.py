"""LAMB, Adafactor and Muon through servers: the same bits for any number of servers, shards and threads, in memory and on disk, after
restarts, and as from the kernels in one process.
"""
import dataclasses

import numpy as np
import pytest
import torch

from clusters import SMALL_TENSORS
from orlop import kernels
from plain_client import ADAMW, Tensor
from test_bad_input import arrays, refused

MATRICES = ["layers.0.weight", "head.weight"]
OTHERS = ["layers.0.bias", "scale"]
VALUES = {
    "lamb": {"lr": 1e-2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-6, "weight_decay": 0.1},
    "adafactor": {"lr": 1e-2, "beta2_decay": -0.8, "eps1": 2.0 ** -23, "eps2": 1e-3, "d": 1.0, "weight_decay": 0.1},
    "muon": {"lr": 2e-2, "weight_decay": 0.1, "momentum": 0.95, "nesterov": 1, "ns_a": 3.4445, "ns_b": -4.775, "ns_c": 2.0315, "eps": 1e-7,
             "ns_steps": 5, "adjust_lr": 0},
    "adamw": ADAMW,
}
TENSORS = [dataclasses.replace(tensor, whole=tensor.kind == "PARAMETER") for tensor in SMALL_TENSORS]
STEPS = 4


@pytest.fixture(scope="module")
def one(make_module_cluster):
    return make_module_cluster(1, flags=("--threads", "1"))


@pytest.fixture(scope="module")
def three(make_module_cluster):
    return make_module_cluster(3, flags=("--threads", "4"))


def optimizers(name):
    """Return the optimizers of the matrices and of the other parameters."""
    return name, "adamw" if name == "muon" else name


def made(cluster, name, optimizer, shard_elements, state):
    job = cluster.job(name, TENSORS, shard_elements=shard_elements)
    job.create(seed=7)
    job.configure([group for kind, part in zip(optimizers(optimizer), (MATRICES, OTHERS)) for group in job.groups(kind, state, [part])])
    job.join()
    job.load(arrays(0))
    return job


def step(job, optimizer, number):
    job.step(arrays(number, scale=0.01), [VALUES[kind] for kind in optimizers(optimizer)])


def boxes(job):
    """Return the boxes that read every slot of every tensor whole."""
    for tensor in job.tensors:
        for slot in job.describe(tensor.name).shards[0].slots:
            extent = list(tensor.shape)
            if slot.slot in ("row_var", "col_var"):
                extent[-1 if slot.slot == "row_var" else -2] = 1
            if slot.slot != "gradient":
                yield tensor.name, slot.slot, ([0] * len(extent), extent) if extent != list(tensor.shape) else None


def stored(job):
    return {(name, slot): job.pull(name, slot, box=box).tobytes() for name, slot, box in boxes(job)}


def trained(cluster, name, optimizer, shard_elements, state, restart=False):
    job = made(cluster, name, optimizer, shard_elements, state)
    for number in range(1, STEPS + 1):
        step(job, optimizer, number)
        if restart and number == 2:
            before = stored(job)
            cluster.restart()
            job.join()
            assert stored(job) == before
    return stored(job)


@pytest.mark.parametrize("state", ["fp32", "8bit"])
@pytest.mark.parametrize("optimizer", ["lamb", "adafactor", "muon"])
def test_servers_shards_threads_and_restarts_change_no_bit(one, three, optimizer, state):
    expected = trained(one, f"one.{optimizer}.{state}", optimizer, 1 << 22, state)
    for cluster, name, shard_elements, restart in ((one, "two-shards", 256 * 2200, False), (three, "three-shards", 256 * 1500, False),
                                                   (three, "eight-shards", 256 * 540, True)):
        actual = trained(cluster, f"{name}.{optimizer}.{state}", optimizer, shard_elements, state, restart)
        assert actual.keys() == expected.keys()
        assert [key for key in expected if actual[key] != expected[key]] == [], name


@pytest.mark.parametrize("optimizer", ["lamb", "adafactor", "muon"])
def test_state_on_disk_changes_no_bit(one, make_cluster, optimizer):
    """5 or 6 bytes of state and 4 of gradient for each of 7.8 million parameters do not all fit in memory."""
    small = make_cluster(1, memory="128MiB" if optimizer == "muon" else "64MiB")
    shape, results, tiers = (200, 39000), [], set()
    for cluster in (one, small):
        job = cluster.job(f"disk.{optimizer}", [Tensor("weight", shape, whole=True)], shard_elements=256 * 3100)
        job.create(seed=7)
        job.configure(job.groups(optimizer, "8bit"))
        job.join()
        generator = np.random.default_rng(3)
        job.load({"weight": generator.standard_normal(shape).astype("f4")})
        for _ in range(2):
            job.step({"weight": generator.standard_normal(shape).astype("f4")}, [VALUES[optimizer]])
        results.append(stored(job))
        tiers = {slot.tier for shard in job.describe("weight").shards for slot in shard.slots}
        job.delete()
    assert len(tiers) == 2, "nothing was spilled"
    assert [key for key in results[0] if results[1][key] != results[0][key]] == []


@pytest.mark.parametrize("optimizer", ["lamb", "adafactor", "muon"])
def test_weights_are_those_of_the_kernels_in_one_process(three, optimizer):
    job = made(three, f"kernels.{optimizer}", optimizer, 256 * 1500, "fp32")
    weights, name = arrays(0), "layers.0.weight"
    shard = kernels.Shard(optimizer, torch.from_numpy(weights[name].copy()), state="fp32")
    for number in range(1, STEPS + 1):
        step(job, optimizer, number)
        shard.step(torch.from_numpy(arrays(number, scale=0.01)[name]), VALUES[optimizer])
    assert np.array_equal(job.pull(name, "master"), shard.master().numpy())
    if optimizer == "adafactor":
        assert np.array_equal(job.pull(name, "col_var", box=([0, 0], [1, 1000])).reshape(-1), shard.state("col_var").numpy())


def test_averages_of_rows_and_columns_are_set_and_read(three):
    job = made(three, "averages", "adafactor", 256 * 540, "fp32")
    generator = np.random.default_rng(5)
    rows, columns = (generator.random(shape, "f4") for shape in ((1100, 1), (1, 1000)))
    for slot, values in (("row_var", rows), ("col_var", columns)):
        job.set_state({"layers.0.weight": [(([0, 0], list(values.shape)), values)]}, slot=slot)
    job.commit(kind="LOAD")
    assert np.array_equal(job.pull("layers.0.weight", "row_var", box=([0, 0], [1100, 1])), rows)
    assert np.array_equal(job.pull("layers.0.weight", "col_var", box=([0, 5], [1, 600])), columns[:, 5:605])
    for slot, box in (("row_var", None), ("row_var", ([0, 3], [1100, 1])), ("col_var", ([1, 0], [1, 1000]))):
        with refused("INVALID_ARGUMENT", "BAD_REQUEST", slot, "offset 0 and extent 1"):
            job.pull("layers.0.weight", slot, box=box)
    step(job, "adafactor", 1)
    w, g = 1.0, arrays(1, scale=0.01)["layers.0.weight"].astype(np.float64)
    assert np.allclose(job.pull("layers.0.weight", "row_var", box=([0, 0], [1100, 1])), w * np.mean(g * g, 1, keepdims=True), 1e-6)


def test_what_does_not_fit_is_refused(three):
    job = three.job("refusals", [Tensor("split", (1100, 1000)), Tensor("cube", (4, 8, 8), whole=True)], shard_elements=256 * 540)
    job.create(seed=7)
    with refused("FAILED_PRECONDITION", "CONFLICT", "'lamb'", "'split'", "TensorSpec.whole"):
        job.configure(job.groups("lamb", parts=[["split"]]))
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "muon steps matrices", "'cube' has 3 dimensions"):
        job.configure(job.groups("muon", parts=[["cube"]]))


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_shard_that_nobody_has_a_gradient_for_steps_by_zeros(three, optimizer):
    """Two workers have a slice of each tensor, and the first has no gradient: its shard is stepped as if zeros had been pushed."""
    tensors = [Tensor("weight", (4, 128), whole=True)]
    results = []
    for zeros in (True, False):
        job = three.job(f"absent.{optimizer}.{zeros}", tensors, shard_elements=256)
        job.create(seed=7)
        job.configure(job.groups(optimizer))
        job.join([job.layout(preset="FLAT_SLICES")] * 2)
        generator = np.random.default_rng(1)
        weights, gradient = (generator.standard_normal((4, 128)).astype("f4") for _ in range(2))
        job.load({"weight": weights})
        if zeros:
            job.push({"weight": [((0, 256), np.zeros(256, "f4"))]}, rank=0)
        job.push({"weight": [((256, 256), gradient.reshape(-1)[256:])]}, rank=1)
        calls = [job.job().CommitStep.future(job.commit_request(rank, [VALUES[optimizer]], absent_tensors=[] if zeros or rank else [0]))
                 for rank in (0, 1)]
        job.committed_step = calls[0].result().step
        results.append(stored(job))
        assert not np.array_equal(job.pull("weight", "master").reshape(-1)[:256], weights.reshape(-1)[:256]), "no decay"
    assert results[0] == results[1]


@pytest.mark.parametrize("shape", [(2, 5000), (5000, 1), (1, 5000), (3, 4, 700), (70, 90)], ids=str)
def test_averages_of_odd_shapes_do_not_depend_on_the_cut(three, shape):
    results = []
    for shard_elements in (1 << 22, 1024):
        job = three.job(f"odd.{'x'.join(map(str, shape))}.{shard_elements}", [Tensor("weight", shape, whole=True)],
                        shard_elements=shard_elements)
        job.create(seed=7)
        job.configure(job.groups("adafactor"))
        job.join()
        generator = np.random.default_rng(1)
        job.load({"weight": generator.standard_normal(shape).astype("f4")})
        for _ in range(3):
            job.step({"weight": generator.standard_normal(shape).astype("f4")}, [VALUES["adafactor"]])
        results.append(stored(job))
    assert results[0] == results[1]


def test_hyper_parameters_that_no_step_can_have_are_refused_before_the_commit(three):
    job = made(three, "beyond", "adafactor", 1 << 22, "fp32")
    job.push(arrays(1))
    beyond = VALUES["adafactor"] | {"eps1": 1e25}
    with refused("INVALID_ARGUMENT", "HYPER_PARAMETERS", "groups[0].values", "fp32"):
        job.commit([beyond, beyond])
    job.commit([VALUES["adafactor"]] * 2)
