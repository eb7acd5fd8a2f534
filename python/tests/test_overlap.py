"""overlap="backward": the same bits as without it, whatever goes wrong on the way."""

import warnings

import pytest
import torch

import orlop
from conftest import loss_of, train_step


@pytest.fixture
def plain(servers, make_net, batches, request):
    """Weights after 4 steps without overlap."""
    with orlop.connect(servers.address, job="plain-" + request.node.name) as job:
        net = make_net()
        job.bind(net)
        optimizer = orlop.AdamW(net.parameters(), session=job)
        for batch in batches[:4]:
            train_step(net, optimizer, batch)
        yield [p.detach().clone() for p in net.parameters()]


def start(job, make_net, **options):
    net = make_net()
    job.bind(net)
    return net, orlop.AdamW(net.parameters(), session=job, overlap="backward", **options)


def assert_equal(net, expected):
    for ours, theirs in zip(net.parameters(), expected):
        assert torch.equal(ours, theirs)


def test_pushing_in_the_last_backward_gives_the_same_bits(job, make_net, batches, plain):
    net, optimizer = start(job, make_net)
    for batch in batches[:4]:
        optimizer.zero_grad()
        with optimizer.last_backward():
            loss_of(net, batch).backward()
        assert len(optimizer._pusher._pushes) == 4
        optimizer.step()
    assert_equal(net, plain)


def test_accumulation_steps_push_in_the_last_of_k(job, make_net, batches, plain):
    net, optimizer = start(job, make_net, accumulation_steps=2)
    for batch in batches[:4]:
        optimizer.zero_grad()
        for part in range(2):
            (loss_of(net, batch) * (0.25, 0.75)[part]).backward()
            assert len(optimizer._pusher._pushes) == 4 * part
        optimizer.step()
    for ours, theirs in zip(net.parameters(), plain):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_gradient_changed_after_its_push_is_pushed_again_with_one_warning(job, make_net, batches, plain):
    net, optimizer = start(job, make_net, accumulation_steps=1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for batch in batches[:4]:
            optimizer.zero_grad()
            (loss_of(net, batch) * 2).backward()
            for parameter in net.parameters():
                parameter.grad /= 2
            optimizer.step()
    assert len([w for w in caught if "pushed again" in str(w.message)]) == 1
    assert_equal(net, plain)


def test_an_exception_in_backward_and_zero_grad_take_back_what_was_pushed(job, make_net, batches, plain):
    net, optimizer = start(job, make_net)

    def fail(gradient):
        raise ArithmeticError("planned")
    for batch in batches[:4]:
        optimizer.zero_grad()
        handle = net.first.weight.register_hook(fail)  # arrives last: the second layer is pushed by then
        with pytest.raises(ArithmeticError), optimizer.last_backward():
            loss_of(net, batch).backward()
        handle.remove()
        optimizer.zero_grad()
        with optimizer.last_backward():
            (loss_of(net, batch) * 3).backward()
        optimizer.zero_grad()  # after a push
        with optimizer.last_backward():
            loss_of(net, batch).backward()
        optimizer.step()
    assert_equal(net, plain)
