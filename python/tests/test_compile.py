"""torch.compile of a bound model, of step() and of zero_grad()."""

import pytest
import torch

import orlop
from conftest import loss_of


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield


def compiled_by_method(net):
    net.compile(backend="eager")
    return net


@pytest.mark.parametrize("order", ["bound", "bound-method", "compiled"])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_compiled_model_trains_as_torchs(job, make_net, batches, order, overlap):
    """The first compiled forward joins the job."""
    mine, other = make_net(), make_net()
    if order != "compiled":
        job.bind(mine)
    compiled = compiled_by_method(mine) if "method" in order else torch.compile(mine, backend="eager")
    if order == "compiled":
        job.bind(compiled)
    options = {"overlap": "backward", "accumulation_steps": 1} if overlap else {}
    ours = orlop.SGD(compiled.parameters(), lr=0.1, state="fp32", **options)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for batch in batches[:4]:
        for net, optimizer in ((compiled, ours), (other, theirs)):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            if optimizer is ours and not job.step:
                assert ours.attached and overlap == bool(ours._pusher and ours._pusher._sent)
            optimizer.step()
    for a, b in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert [tensor["spec"]["name"] for tensor in job.client.list_tensors(job.job)] == [name for name, _ in other.named_parameters()]


@pytest.mark.parametrize("has_closure", [False, True])
def test_a_compiled_step_is_torchs(job, make_net, batches, has_closure):
    mine, other = make_net(), make_net()
    job.bind(mine)
    for net, optimizer in ((mine, orlop.AdamW(mine.parameters(), lr=0.01, state="fp32")),
                           (other, torch.optim.AdamW(other.parameters(), lr=0.01))):
        def whole(batch, net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(net, batch)
            loss.backward()
            optimizer.step()
            return loss

        def by_closure(batch, net=net, optimizer=optimizer):
            def closure():
                optimizer.zero_grad()
                loss = loss_of(net, batch)
                loss.backward()
                return loss
            return optimizer.step(closure)
        train = by_closure if has_closure else whole
        if net is mine:
            train = torch.compile(train, backend="eager")
        for batch in batches[:4]:
            assert train(batch) > 0
    assert job.step == 4
    for a, b in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_step_alone_may_be_compiled(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours, theirs = orlop.SGD(mine.parameters(), lr=0.1, state="fp32"), torch.optim.SGD(other.parameters(), lr=0.1)
    step, zero_grad = torch.compile(ours.step, backend="eager"), torch.compile(ours.zero_grad, backend="eager")
    for batch in batches[:4]:
        loss_of(mine, batch).backward()
        step()
        zero_grad()
        theirs.zero_grad()
        loss_of(other, batch).backward()
        theirs.step()
    for a, b in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
