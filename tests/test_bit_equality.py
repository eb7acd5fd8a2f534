"""fp32 state: servers, chunk sizes, contributors, boxes and restarts change no bit; errors are no larger than torch's.

A small GPT is trained with every variation; the demo's own model with two in the ordinary run and all with `-k demo` or --slow.
"""
import numpy as np
import pytest
import torch

orlop = pytest.importorskip("orlop", reason="the Python package orlop is not built: run `make test`")

from plain_client import SGD, Tensor  # noqa: E402
from recorded import BETAS, EPS, MAX_NORM, Demo, demo_recording, loss_of, small_gpt_recording, torch_groups  # noqa: E402
from test_restart import recovered  # noqa: E402

pytestmark = pytest.mark.timeout(900)  # a model of 9.6 M parameters trains slowly beside other work

SHARD_ELEMENTS = 1 << 20  # 4 MiB of fp32: the small GPT's embeddings have two shards, and a chunk may be a whole shard
SGD_RATES = (0.03, 0.01)  # at ten times this, torch with its norm in float64 differs by 5e-5 from torch with an fp32 norm
VARIATIONS = ("server_count, chunk_mib, restart_at", [(1, 4, 25), (2, 1, 17), (2, 4, None), (3, 1, None), (3, 4, 33)])


@pytest.fixture(scope="module")
def recording():
    return small_gpt_recording(seed=1)


def start_job(cluster, recording, name="recorded", layouts=None, reduce="", chunk_bytes=1 << 20, max_norm=MAX_NORM):
    job = cluster.job(name, recording.tensors, shard_elements=SHARD_ELEMENTS,
                      options=[("grpc.max_receive_message_length", chunk_bytes + (64 << 10))])
    job.create()
    job.configure(job.groups(parts=recording.groups), max_norm=max_norm, reduce=reduce)
    job.join(layouts(job) if layouts else None)
    job.load(recording.initial, chunk_bytes=chunk_bytes)
    return job


def weight_bits(job, **options):
    return {name: array.tobytes() for name, array in job.pull_all(**options).items()}


def train(cluster, recording, chunk_bytes, restart_at=None):
    """Train on all recorded gradients and return the final weights."""
    job = start_job(cluster, recording, chunk_bytes=chunk_bytes)
    for step, gradients in enumerate(recording.gradients):
        if step == restart_at:
            cluster.restart()
            recovered(job)
            job.join()
        job.push(gradients, chunk_bytes=chunk_bytes)
        job.commit(recording.group_values())
    return job.pull_all(max_chunk_bytes=chunk_bytes)


@pytest.fixture(scope="module")
def one_server_weights(make_module_cluster, recording):
    return train(make_module_cluster(1), recording, 1 << 20)


def error_of(weights, exact):
    """Return the maximum and RMS difference from float64."""
    differences = np.concatenate([(weights[name].astype("f8") - exact[name]).ravel() for name in exact])
    return np.abs(differences).max(), np.sqrt(np.mean(differences**2))


def check_errors(recording, weights):
    exact = recording.float64_final()
    ours, theirs = error_of(weights, exact), error_of(recording.torch_final, exact)
    print(f"maximum and RMS error against float64: orlop {ours}, torch {theirs}, ratios {ours[0] / theirs[0]}, {ours[1] / theirs[1]}")
    assert ours[0] <= 1.5 * theirs[0]
    assert ours[1] <= 1.5 * theirs[1]


def check_equal(weights, expected):
    for name, array in weights.items():
        assert array.tobytes() == expected[name].tobytes(), name


def test_errors_against_float64_are_at_most_one_and_a_half_of_torch(recording, one_server_weights):
    check_errors(recording, one_server_weights)


@pytest.mark.parametrize(*VARIATIONS)
def test_servers_chunks_and_restarts_change_no_bit(make_cluster, recording, one_server_weights, server_count, chunk_mib,
                                                   restart_at):
    check_equal(train(make_cluster(server_count), recording, chunk_mib << 20, restart_at), one_server_weights)


@pytest.fixture(scope="module")
def demo():
    return Demo(seed=1)


@pytest.fixture(scope="module")
def demo_recorded(demo, tmp_path_factory):
    path = tmp_path_factory.mktemp("demo") / "gradients"
    yield demo_recording(demo, path)
    path.unlink()  # the file is large, and pytest keeps the folder


@pytest.fixture(scope="module")
def demo_weights(make_module_cluster, demo_recorded):
    return train(make_module_cluster(1), demo_recorded, 1 << 20)


def test_errors_of_the_demo_model_are_at_most_one_and_a_half_of_torch(demo_recorded, demo_weights):
    check_errors(demo_recorded, demo_weights)


def test_demo_model_on_three_servers_restarted_has_the_same_bits(make_cluster, demo_recorded, demo_weights):
    check_equal(train(make_cluster(3), demo_recorded, 4 << 20, restart_at=25), demo_weights)


@pytest.mark.slow
@pytest.mark.parametrize(*VARIATIONS)
def test_demo_model_in_every_variation_has_the_same_bits(make_cluster, demo_recorded, demo_weights, server_count, chunk_mib,
                                                         restart_at):
    check_equal(train(make_cluster(server_count), demo_recorded, chunk_mib << 20, restart_at), demo_weights)


@pytest.mark.slow
def test_demo_model_through_the_package_has_the_same_bits(make_cluster, demo, demo_recorded, demo_weights):
    model = demo.model()
    with orlop.connect(make_cluster(2).address, job="package") as session:
        session.bind(model)
        optimizer = orlop.AdamW(torch_groups(model), betas=BETAS, eps=EPS, session=session, state="fp32", max_norm=MAX_NORM)
        for gradients in demo_recorded.gradients:
            for name, parameter in model.named_parameters():
                parameter.grad = torch.from_numpy(gradients[name])
            optimizer.step()
    check_equal({name: parameter.detach().numpy() for name, parameter in model.named_parameters()}, demo_weights)


def closed_loop(demo, make_ours, make_theirs, address, name, steps=20):
    """Train two copies of the demo's model, each on its own gradients. Return (models, [(our loss, torch's loss)])."""
    ours, theirs = demo.model(), demo.model()
    losses = []
    with orlop.connect(address, job=name) as session:
        session.bind(ours)
        pairs = [(ours, make_ours(ours, session)), (theirs, make_theirs(theirs))]
        for step in range(steps):
            tokens, both = demo.batch(step), []
            for model, optimizer in pairs:
                optimizer.zero_grad()
                loss = loss_of(model, tokens)
                loss.backward()
                if model is theirs:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
                optimizer.step()
                both.append(loss.item())
            losses.append(both)
    return ours, theirs, losses


def test_demo_model_trained_with_sgd_follows_torch(make_cluster, demo):
    ours, theirs, losses = closed_loop(
        demo, lambda model, session: orlop.SGD(torch_groups(model, SGD_RATES), momentum=0.9, session=session, state="fp32",
                                               max_norm=MAX_NORM),
        lambda model: torch.optim.SGD(torch_groups(model, SGD_RATES), momentum=0.9), make_cluster(2).address, "sgd")
    assert losses[-1][1] < losses[0][1]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6, msg=lambda text: f"{name}: {text}")


def test_demo_model_trained_with_adamw_has_the_losses_of_torch(make_cluster, demo):
    _, _, losses = closed_loop(
        demo, lambda model, session: orlop.AdamW(torch_groups(model), betas=BETAS, eps=EPS, session=session, state="fp32",
                                                 max_norm=MAX_NORM),
        lambda model: torch.optim.AdamW(torch_groups(model), betas=BETAS, eps=EPS), make_cluster(2).address, "adamw")
    print(f"largest relative difference of a loss: {max(abs(mine / other - 1) for mine, other in losses)}")
    assert losses[-1][1] < 0.9 * losses[0][1]
    for mine, other in losses:
        assert mine == pytest.approx(other, rel=1e-4)


def flat_slices(job):
    return [job.layout("EXACTLY_ONCE", "FLAT_SLICES")] * 3


def slice_of_rank(job, name, array, rank, world_size=3):
    """Cut by the preset's rule in job.proto."""
    count = array.size
    part = -(-count // world_size)
    part = -(-part // 256) * 256
    begin, end = min(rank * part, count), min((rank + 1) * part, count)
    return [((begin, end - begin), array.reshape(-1)[begin:end])] if end > begin else []


def column_boxes(shape, rank):
    """Return two N-d boxes that share a tensor: left and right columns, or first and last elements."""
    cut = max(1, shape[-1] // 3)
    offset, extent = [0] * len(shape), list(shape)
    offset[-1], extent[-1] = (0, cut) if rank == 0 else (cut, shape[-1] - cut)
    return (offset, extent)


def test_several_contributors_and_boxes_of_any_shape_change_no_bit(make_cluster, recording):
    """Make 3 steps each: whole; flat slices of three ranks; columns of two ranks; the same gradient twice, averaged."""
    cluster = make_cluster(2)
    steps = recording.gradients[:3]
    whole = start_job(cluster, recording, "whole")
    slices = start_job(cluster, recording, "slices", flat_slices)
    columns = start_job(cluster, recording, "columns", lambda job: [
        job.layout(boxes={tensor.name: [column_boxes(tensor.shape, rank)] for tensor in recording.tensors}) for rank in (0, 1)])
    twice = start_job(cluster, recording, "twice", lambda job: [job.layout("SUM")] * 2)
    for gradients in steps:
        whole.step(gradients, recording.group_values())
        for rank in (2, 0, 1):
            slices.push({name: slice_of_rank(slices, name, array, rank) for name, array in gradients.items()}, rank)
        slices.commit(recording.group_values())
        for rank in (1, 0):
            twice.push(gradients, rank)
            columns.push({name: [box_part(array, column_boxes(array.shape, rank))] for name, array in gradients.items()}, rank)
        columns.commit(recording.group_values())
        twice.commit(recording.group_values())
    expected = weight_bits(whole)
    assert weight_bits(slices) == expected
    assert weight_bits(columns) == expected
    assert weight_bits(twice) == expected


def box_part(array, box):
    ranges = tuple(slice(offset, offset + extent) for offset, extent in zip(*box))
    return box, np.ascontiguousarray(array[ranges])


def test_contributions_are_summed_in_rank_order_whenever_they_come(make_cluster, recording):
    """(g0 + g1) + g2 in fp32, pushed in another order, equals one contributor that pushes that sum."""
    cluster = make_cluster(2)
    three = recording.gradients[10:13]
    job = start_job(cluster, recording, "ranks", lambda job: [job.layout("SUM")] * 3, reduce="sum")
    one = start_job(cluster, recording, "one", reduce="sum")
    for rank in (2, 0, 1):
        job.push(three[rank], rank)
    answer = job.commit(recording.group_values())
    total = {name: (three[0][name] + three[1][name]) + three[2][name] for name in three[0]}
    assert one.step(total, recording.group_values()).gradient_norm == answer.gradient_norm
    assert answer.clip_factor < 1
    assert weight_bits(job) == weight_bits(one)


def test_mean_of_several_contributors_is_their_average(make_cluster, recording):
    """Plain SGD makes the averaged gradient visible: w - lr * (g0 + g1 + g2) / 3."""
    cluster = make_cluster(2)
    tensors = [Tensor("a", (300, 11))]
    job = cluster.job("mean", tensors, shard_elements=256)
    job.create()
    job.configure(job.groups("sgd"))
    job.join([job.layout("SUM")] * 3)
    generator = np.random.default_rng(3)
    weights, *gradients = [generator.standard_normal((300, 11)).astype("<f4") for _ in range(4)]
    job.load({"a": weights})
    for rank, gradient in enumerate(gradients):
        job.push({"a": gradient}, rank)
    job.commit([{**SGD, "lr": 0.1, "momentum": 0.0}])
    expected = weights.astype("f8") - 0.1 * sum(gradient.astype("f8") for gradient in gradients) / 3
    np.testing.assert_allclose(job.pull("a"), expected, rtol=0, atol=1e-6)


def test_shards_of_a_tensor_are_placed_on_several_servers_and_explained(make_cluster, recording):
    job = start_job(make_cluster(3), recording)
    assert len(job.addresses()) == 3
    job.pull("token.weight")  # waits until the committed LOAD is applied
    shards = job.describe("token.weight").shards
    assert [(shard.first_element, shard.element_count) for shard in shards] == [
        (0, SHARD_ELEMENTS), (SHARD_ELEMENTS, 4500 * 256 - SHARD_ELEMENTS)]
    for shard in shards:
        assert shard.reason and shard.version == 0 and len(shard.copies) == 1
