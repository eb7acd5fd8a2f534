"""Gradients as int8 with block scales: the weights equal numpy's for any number of servers and workers, any boxes and chunks."""
import numpy as np
import pytest

from clusters import SMALL_SHARD_ELEMENTS
from int8_blocks import Feedback, decode, encode
from plain_client import SGD, Tensor, stubs
from test_bad_input import refused
from test_restart import recovered

SHAPES = {"wide": (1100, 1300), "cube": (7, 33, 129), "bias": (300,), "one": (1,)}
TENSORS = [Tensor(name, shape) for name, shape in SHAPES.items()]
LR = 2.0**-4  # SGD's product is exact
RULE = SGD | {"lr": LR, "momentum": 0.0}
STEPS = 4


def start(cluster, name, layouts=None, **options):
    job = cluster.job(name, TENSORS, shard_elements=SMALL_SHARD_ELEMENTS, options=[("grpc.max_receive_message_length", 5 << 20)])
    job.create()
    job.configure(job.groups("sgd"), **options)
    job.join(layouts(job) if layouts else None)
    weights = {name: np.linspace(-1, 1, np.prod(shape), dtype="<f4").reshape(shape) for name, shape in SHAPES.items()}
    job.load(weights)
    return job, weights


class Worker:
    """The pushes of one rank: the same pieces in the same order every step, each with a residual of its own."""

    def __init__(self, parts):
        self.parts, self.kept = parts, {}

    def begin(self):
        self.number, self.decoded = 0, []

    def encode(self, part):
        kept = self.kept.setdefault(self.number, Feedback(part.size))
        self.number += 1
        wire, decoded = kept.send(part)
        self.decoded.append(decoded)
        return wire

    def push(self, job, rank, gradients, **options):
        """Push, and return the gradients as the servers decode them, with zeros where this rank has none."""
        self.begin()
        arrays = {name: self.parts(name, gradient) for name, gradient in gradients.items()}
        job.push({name: parts for name, parts in arrays.items() if parts}, rank=rank, dtype="I8_BLOCK", encode=self.encode, **options)
        decoded = np.concatenate(self.decoded)
        filled, at = {}, 0
        for name, gradient in gradients.items():
            filled[name] = np.zeros(gradient.size, np.float32)
            places = np.arange(gradient.size).reshape(gradient.shape)
            for box, _ in arrays[name]:
                place = places_of(places, box)
                filled[name][place] = decoded[at:at + place.size]
                at += place.size
            filled[name] = filled[name].reshape(gradient.shape)
        return filled


def places_of(array, box):
    if box is None:
        return array.reshape(-1)
    if isinstance(box[0], int):
        return array.reshape(-1)[box[0]:box[0] + box[1]]
    return array[tuple(slice(offset, offset + extent) for offset, extent in zip(*box))].reshape(-1)


def whole(name, gradient):
    return [(None, gradient)]


def boxes(rank):
    """Return two workers' halves of every tensor, cut where no block, row or shard ends. The first worker has the smallest tensor."""
    def of(name):
        shape = SHAPES[name]
        count = int(np.prod(shape))
        if name == "one":
            return [None] if rank == 0 else []
        if name == "wide":  # columns: runs with gaps
            return [([0, 0], [1100, 333])] if rank == 0 else [([0, 333], [1100, 500]), ([0, 833], [1100, 467])]
        cut = count // 3 + 1
        return [(0, cut)] if rank == 0 else [(cut, count - cut)]

    def parts(name, gradient):
        return [(box, places_of(gradient, box)) for box in of(name)]

    def layout(job):
        return job.layout(boxes={name: [box or (0, 1) for box in of(name)] for name in SHAPES if of(name)})
    return parts, layout


def run(cluster, name, workers, mean, chunk_bytes, **options):
    job, weights = start(cluster, name, **options)
    generator = np.random.default_rng(17)
    expected = {name: array.copy() for name, array in weights.items()}
    for _ in range(STEPS):
        sums = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
        for rank, worker in enumerate(workers):
            gradients = {name: generator.standard_normal(shape).astype("<f4") for name, shape in SHAPES.items()}
            decoded = worker.push(job, rank, gradients, chunk_bytes=chunk_bytes)
            sums = {name: sums[name] + decoded[name] for name in SHAPES}
        job.commit([RULE])
        expected = {name: expected[name] - np.float32(LR / mean) * sums[name] for name in SHAPES}
        for name, array in job.pull_all().items():
            np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("server_count, chunk_mib", [(1, 1), (2, 4)])
def test_one_worker(make_cluster, server_count, chunk_mib):
    run(make_cluster(server_count), "one", [Worker(whole)], 1, chunk_mib << 20)


@pytest.mark.parametrize("server_count, chunk_mib", [(1, 4), (2, 1)])
def test_two_workers_are_summed_in_fp32(make_cluster, server_count, chunk_mib):
    run(make_cluster(server_count), "two", [Worker(whole), Worker(whole)], 2, chunk_mib << 20, reduce="mean",
        layouts=lambda job: [job.layout("SUM", "WHOLE")] * 2)


@pytest.mark.parametrize("server_count, chunk_mib", [(1, 1), (2, 4)])
def test_two_workers_with_misaligned_boxes(make_cluster, server_count, chunk_mib):
    sides = [boxes(rank) for rank in range(2)]
    run(make_cluster(server_count), "boxes", [Worker(parts) for parts, _ in sides], 1, chunk_mib << 20,
        layouts=lambda job: [layout(job) for _, layout in sides])


def test_a_clean_stop_keeps_what_was_staged(make_cluster):
    """Decoded pieces are read back from disk. The same push again is recognised by the digest of its wire bytes."""
    cluster = make_cluster(2)
    job, weights = start(cluster, "stop")
    generator = np.random.default_rng(3)
    gradients = {name: generator.standard_normal(shape).astype("<f4") for name, shape in SHAPES.items()}
    job.push(gradients, dtype="I8_BLOCK", encode=encode)
    cluster.restart()
    recovered(job)
    job.join(generation=job.generation)
    answers = job.push(gradients, dtype="I8_BLOCK", encode=encode)
    assert all(answer.repeated_count == answer.piece_count for answer in answers)
    job.commit([RULE])
    for name, array in job.pull_all().items():
        expected = weights[name] - np.float32(LR) * expected_of(job, name, gradients[name])
        np.testing.assert_array_equal(array, expected, err_msg=name)


def expected_of(job, name, gradient):
    pieces = [decode(payload) for _, payload in job.pieces(name, gradient, encode=encode)]
    return np.concatenate(pieces).reshape(gradient.shape)


def test_a_bad_element_skips_and_bad_bytes_are_refused(make_cluster):
    cluster = make_cluster(1)
    job, weights = start(cluster, "bad")
    gradients = {name: np.ones(shape, "<f4") for name, shape in SHAPES.items()}
    bad = {**gradients, "wide": gradients["wide"].copy()}
    bad["wide"][700, 5] = np.inf
    job.push(bad, dtype="I8_BLOCK", encode=encode)
    answer = job.commit([RULE])
    assert answer.outcome == stubs().job.CommitStepResponse.SKIP
    for name, array in job.pull_all().items():
        np.testing.assert_array_equal(array, weights[name], err_msg=name)

    def negative(part):
        wire = bytearray(encode(part))
        wire[3] |= 0x80
        return bytes(wire)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "tensor 'bias', shard 0, rank 0", "scale of block 0 is -0.00787402", "at least +0"):
        job.push({"bias": gradients["bias"]}, dtype="I8_BLOCK", encode=negative)
    for encoded, fragments in ((lambda part: encode(part)[:-1], ("307", "308")), (lambda part: encode(part) + b"0", ("309", "308"))):
        with refused("INVALID_ARGUMENT", "BAD_REQUEST", "bias", *fragments):
            job.push({"bias": gradients["bias"]}, dtype="I8_BLOCK", encode=encoded)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "bias", "int8 with block scales"):
        job.set_state({"bias": gradients["bias"]}, dtype="I8_BLOCK", encode=encode)
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "bias", "float32, bfloat16, float16 or int8 with block scales, not int8"):
        job.push({"bias": gradients["bias"].astype("i1")}, dtype="I8")
    with refused("INVALID_ARGUMENT", "BAD_REQUEST", "bias", "cannot read weight as int8 with block scales"):
        job.pull("bias", dtype="I8_BLOCK")
    tiny = np.full(300, 2.0**-149 * 100, "<f4")  # a subnormal scale, 1 ulp of zero
    job.push({**gradients, "bias": tiny}, dtype="I8_BLOCK", encode=encode)
    assert job.commit([RULE]).outcome == stubs().job.CommitStepResponse.APPLY
