"""gradient_wire: what reaches the servers is what numpy makes of it, and what rounding loses is sent later."""

import math

import numpy as np
import pytest
import torch

import orlop
from conftest import loss_of, train_step
from orlop.job.wire import GradientWire
from tests.int8_blocks import Feedback, bf16, decode, encode

LR = 2.0**-4  # so that lr * gradient is exact, and SGD is one subtraction


class Weights(torch.nn.Module):
    """Two tensors: of several shards with a short block in each tail, and of one short block."""

    def __init__(self, sizes=(1_000_003, 77)):
        super().__init__()
        self.weights = torch.nn.ParameterList(torch.nn.Parameter(torch.linspace(-1, 1, size)) for size in sizes)


def gradients_of(model, generator, scale=1.0):
    return [torch.from_numpy((generator.standard_normal(p.numel()) * scale).astype(np.float32)) for p in model.parameters()]


def give(model, gradients):
    for parameter, gradient in zip(model.parameters(), gradients):
        parameter.grad = gradient.clone()


def start(job, make=Weights, **options):
    model = make()
    job.bind(model)
    return model, orlop.SGD(model.parameters(), lr=LR, gradient_wire="int8", session=job, **options)


def assert_weights(model, expected):
    for parameter, values in zip(model.parameters(), expected):
        np.testing.assert_array_equal(parameter.detach().numpy(), values)


def feedbacks(model):
    return [Feedback(p.numel()) for p in model.parameters()]


def apply(expected, sent):
    return [values - np.float32(LR) * decoded for values, decoded in zip(expected, sent)]


@pytest.mark.parametrize("loss_scale", [1.0, 1024.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bytes_and_residuals_are_numpys(dtype, loss_scale):
    generator = np.random.default_rng(3)
    wire = GradientWire("int8", 2048)
    first, count = 1900, 5000  # four pieces, none of whole blocks but two
    numpys = Feedback(count, first, 2048)
    for step in range(4):
        gradient = torch.from_numpy(generator.standard_normal(count).astype(np.float32) * 10.0**(step - 2)).to(dtype)
        index, slot, name, flat, encoded, _ = wire.part(0, gradient, loss_scale, (first, count))
        wire.settle("APPLY")
        expected, _ = numpys.send(gradient.float().numpy(), loss_scale)
        assert (index, slot, name, flat) == (0, "", "I8_BLOCK", (first, count))
        assert encoded.numpy().tobytes() == expected
        np.testing.assert_array_equal(wire._residuals[0, flat].float().numpy(), numpys.residual)


@pytest.mark.parametrize("special", [0.0, 1e-45, 1e-42, 1e-38, 3e38, math.inf, -math.inf, math.nan])
def test_special_values_are_encoded_as_by_numpy(special):
    values = np.full(600, special, np.float32)
    values[5:300] *= np.float32(0.3)
    encoded = GradientWire("int8", 1 << 22).part(0, torch.from_numpy(values), 1.0)[4]
    assert encoded.numpy().tobytes() == encode(values)


def test_every_kind_is_taken_and_others_are_refused(job, make_net, batches):
    net = make_net()
    job.bind(net)
    for kind in (None, "fp32", "bf16", "fp16"):
        optimizer = orlop.AdamW(net.parameters(), session=job, gradient_wire=kind)
        train_step(net, optimizer, batches[0])
    with pytest.raises(ValueError, match="gradient_wire='int4'; one of None, 'fp32', 'bf16', 'fp16', 'int8'"):
        orlop.AdamW(net.parameters(), session=job, gradient_wire="int4")


@pytest.mark.parametrize("overlap", [None, "backward"])
def test_weights_are_numpys(job, overlap):
    model, optimizer = start(job, overlap=overlap)
    optimizer.attach()
    job._training.handle.take_timings()
    generator = np.random.default_rng(5)
    expected, kept = [p.detach().numpy().copy() for p in model.parameters()], feedbacks(model)
    for _ in range(4):
        gradients = gradients_of(model, generator)
        give(model, gradients)
        optimizer.step()
        expected = apply(expected, [feedback.send(g.numpy())[1] for feedback, g in zip(kept, gradients)])
        assert_weights(model, expected)
    assert job._training.handle.take_timings()["push_bytes"] == 4 * sum(len(encode(np.zeros(size, np.float32))) for size in (1_000_003, 77))


def test_what_is_pushed_during_backward_has_the_same_bits(servers, make_net, batches, request):
    weights = []
    for overlap in (None, "backward"):
        with orlop.connect(servers.address, job=f"{request.node.name}-{overlap}") as job:
            net = make_net()
            job.bind(net)
            optimizer = orlop.AdamW(net.parameters(), session=job, gradient_wire="int8", overlap=overlap)
            for number, batch in enumerate(batches[:6]):
                optimizer.zero_grad()
                with optimizer.last_backward():
                    loss_of(net, batch).backward()
                if number == 2 and overlap:  # a gradient that changes after its push is taken back with its residual
                    optimizer.zero_grad()
                    with optimizer.last_backward():
                        loss_of(net, batch).backward()
                optimizer.step()
            weights.append([p.detach().clone() for p in net.parameters()])
    for ours, theirs in zip(*weights):
        assert torch.equal(ours, theirs)


def test_a_changing_loss_scale_rescales_the_residual(job):
    model, optimizer = start(job)
    generator = np.random.default_rng(6)
    expected, kept = [p.detach().numpy().copy() for p in model.parameters()], feedbacks(model)
    for scale in (1.0, 1024.0, 0.25, 65536.0):
        gradients = gradients_of(model, generator)
        give(model, [g * scale for g in gradients])
        optimizer.grad_scale = scale
        optimizer.step()
        sent = [feedback.send(g.numpy() * np.float32(scale), scale)[1] / np.float32(scale) for feedback, g in zip(kept, gradients)]
        expected = apply(expected, sent)
        assert_weights(model, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_skipped_step_keeps_the_residual(job, bad):
    model, optimizer = start(job)
    generator = np.random.default_rng(7)
    expected, kept = [p.detach().numpy().copy() for p in model.parameters()], feedbacks(model)
    for step in range(4):
        gradients = gradients_of(model, generator)
        if step == 2:
            gradients[0][123_456] = bad
        give(model, gradients)
        optimizer.step()
        assert optimizer.skipped == (step == 2)
        if step != 2:
            expected = apply(expected, [feedback.send(g.numpy())[1] for feedback, g in zip(kept, gradients)])
        assert_weights(model, expected)


def test_an_aborted_step_sends_the_same_bits_again(job):
    """The commit that fails: once before it was sent, once after, when it counts."""
    model, optimizer = start(job)
    generator = np.random.default_rng(8)
    expected, kept = [p.detach().numpy().copy() for p in model.parameters()], feedbacks(model)
    training = None
    for fault in (None, "before", None, "after", None):
        gradients = gradients_of(model, generator)
        give(model, gradients)
        if fault is not None:
            training = job._training
            core = training.handle

            class Faulty:
                sent = []

                def __getattr__(self, name):
                    return getattr(core, name)

                def push_async(self, parts, loss_scale):
                    self.sent.append([part[4].clone() for part in parts])
                    return core.push_async(parts, loss_scale=loss_scale)

                def commit(self, **options):
                    if fault == "after":
                        core.commit(**options)
                    raise KeyboardInterrupt
            training.traffic.handle = faulty = Faulty()
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
            training.traffic.handle = core
        if fault == "before":
            again = [training.traffic.wire.part(index, g, 1.0)[4] for index, g in enumerate(gradients)]
            for before, after in zip(faulty.sent[0], again):
                assert torch.equal(before, after)
            training.traffic.wire.settle(None)
        optimizer.step()
        expected = apply(expected, [feedback.send(g.numpy())[1] for feedback, g in zip(kept, gradients)])
        assert_weights(model, expected)


def test_a_worker_that_joins_anew_begins_with_zero(job):
    model, optimizer = start(job)
    generator = np.random.default_rng(9)
    give(model, gradients_of(model, generator))
    optimizer.step()
    assert all(residual.count_nonzero() > 0 for residual in job._training.traffic.wire._residuals.values())
    expected = [p.detach().numpy().copy() for p in model.parameters()]
    optimizer = orlop.SGD(model.parameters(), lr=LR, gradient_wire="int8", session=job)
    optimizer.attach()
    gradients = gradients_of(model, generator)
    give(model, gradients)
    optimizer.step()
    assert_weights(model, apply(expected, [Feedback(g.numel()).send(g.numpy())[1] for g in gradients]))


def test_what_was_sent_tracks_what_was_given_and_without_feedback_it_does_not(job):
    """A gradient of one large element and many below half a quantum: coded alone, they are never sent."""
    model, optimizer = start(job, lambda: Weights((256 * 40,)))
    steps, count = 100, 256 * 40
    gradient = np.full(count, 0.003, np.float32)
    gradient[::256] = 1.0  # a quantum of 1 / 127
    noise = np.random.default_rng(10)
    before = model.weights[0].detach().numpy().astype(np.float64)
    given, without = np.zeros(count), np.zeros(count)
    for _ in range(steps):
        now = gradient * (1 + 0.01 * noise.standard_normal(count)).astype(np.float32)
        give(model, [torch.from_numpy(now)])
        optimizer.step()
        given += now
        without += decode(encode(now))
    sent = (before - model.weights[0].detach().numpy()) / LR
    small = np.arange(count) % 256 != 0
    assert np.abs(sent - given).max() < 1.1 / 127  # one quantum, and the rounding of fp32 weights
    assert np.abs(without[small]).max() == 0       # the mean of what is applied is biased by all of it
    assert given[small].min() > 0.25


def test_training_ends_where_fp32_gradients_end(servers, make_net, batches, request):
    """160 steps of AdamW on 20 batches: the loss is within 0.1 % of that with fp32 gradients."""
    losses = {}

    @torch.no_grad()
    def loss_of_all(net):
        return sum(float(loss_of(net, batch)) for batch in batches)
    for kind in ("fp32", "int8"):
        with orlop.connect(servers.address, job=f"{request.node.name}-{kind}") as job:
            net = make_net()
            job.bind(net)
            optimizer = orlop.AdamW(net.parameters(), lr=2e-3, session=job, state="fp32", gradient_wire=kind)
            first = loss_of_all(net)
            for step in range(160):
                train_step(net, optimizer, batches[step % 20])
            losses[kind] = loss_of_all(net)
    print(first, losses)
    assert losses["fp32"] < 0.7 * first
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=1e-3)


def test_bf16_travels_as_rounded(job):
    model = Weights()
    job.bind(model)
    optimizer = orlop.SGD(model.parameters(), lr=LR, gradient_wire="bf16", session=job)
    expected = [p.detach().numpy().copy() for p in model.parameters()]
    gradients = gradients_of(model, np.random.default_rng(11))
    give(model, gradients)
    optimizer.step()
    assert_weights(model, apply(expected, [bf16(g.numpy()) for g in gradients]))
