"""A closure given to step(): it runs once, at the servers' weights, before the gradients are read."""

import warnings

import pytest
import torch

import orlop
from conftest import loss_of, train_step


def closure_of(net, optimizer, batch, clip=None):
    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(net, batch)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(net.parameters(), clip)
        closure.calls += 1
        return loss
    closure.calls = 0
    return closure


def assert_close(mine, other):
    for ours, theirs in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("kind, options", [
    ("SGD", {"momentum": 0.9}), ("Adam", {}), ("AdamW", {}), ("Adagrad", {}), ("RMSprop", {}), ("Adafactor", {})])
def test_steps_with_a_closure_are_those_of_torch(job, make_net, batches, kind, options, clip):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours = getattr(orlop, kind)(mine.parameters(), lr=0.01, state="fp32", **options)
    theirs = getattr(torch.optim, kind)(other.parameters(), lr=0.01, **options)
    schedules = [torch.optim.lr_scheduler.StepLR(optimizer, 2) for optimizer in (ours, theirs)]
    for batch in batches[:5]:
        closures = [closure_of(net, optimizer, batch, clip) for net, optimizer in ((mine, ours), (other, theirs))]
        torch.testing.assert_close(ours.step(closures[0]), theirs.step(closure=closures[1]))
        assert closures[0].calls == 1
        for schedule in schedules:
            schedule.step()
    assert_close(mine, other)


@pytest.mark.parametrize("make", [
    lambda net: orlop.Lion(net.parameters()), lambda net: orlop.LAMB(net.parameters()), lambda net: orlop.AdEMAMix(net.parameters()),
    lambda net: orlop.Muon([net.first.weight]),
    lambda net: orlop.Together(orlop.Muon([net.first.weight]), orlop.AdamW([net.first.bias, *net.second.parameters()]))],
    ids=["Lion", "LAMB", "AdEMAMix", "Muon", "Together"])
def test_a_closure_changes_no_bit_of_a_step(servers, request, make_net, batches, make):
    nets, name = [make_net(), make_net()], request.node.name.replace("[", "-").replace("]", "")
    for number, net in enumerate(nets):
        with orlop.connect(servers.address, job=f"{name}-{number}") as session:
            session.bind(net)
            optimizer = make(net)
            for batch in batches[:3]:
                if number == 0:
                    train_step(net, optimizer, batch)
                else:
                    optimizer.step(closure_of(net, optimizer, batch))
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


@pytest.mark.parametrize("inside", [1, 2])
def test_a_backward_inside_a_closure_pushes(job, make_net, batches, inside):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours = orlop.SGD(mine.parameters(), lr=0.1, state="fp32", overlap="backward", accumulation_steps=inside)
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for first in range(0, 6, 2):
        for net, optimizer in ((mine, ours), (other, theirs)):
            def closure(net=net, optimizer=optimizer):
                optimizer.zero_grad()
                for batch in batches[first:first + inside]:
                    loss_of(net, batch).backward()
                return len(ours._pusher._sent) if optimizer is ours else 0
            sent = optimizer.step(closure)
            assert sent == (4 if optimizer is ours else 0)
    assert_close(mine, other)


def test_a_closure_adds_to_accumulated_gradients(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours, theirs = orlop.SGD(mine.parameters(), lr=0.1, state="fp32"), torch.optim.SGD(other.parameters(), lr=0.1)
    for net, optimizer in ((mine, ours), (other, theirs)):
        for first in range(0, 6, 3):
            optimizer.zero_grad()
            loss_of(net, batches[first]).backward()
            loss_of(net, batches[first + 1]).backward()
            optimizer.step(lambda: loss_of(net, batches[first + 2]).backward())
    assert_close(mine, other)


def test_the_first_closure_of_a_later_run_sees_the_stored_weights(servers, job, make_net, batches):
    mine, other = make_net(), make_net()
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    train_step(mine, orlop.SGD(mine.named_parameters(), lr=0.1, state="fp32", session=job), batches[0])
    train_step(other, theirs, batches[0])
    with orlop.connect(servers.address, job=job.job) as later:
        net = make_net(seed=1)
        optimizer = orlop.SGD(net.named_parameters(), lr=0.1, state="fp32", session=later)
        loss_of(net, batches[2]).backward()  # of other weights: the join drops it
        optimizer.step(lambda: loss_of(net, batches[1]).backward())
        assert later.step == 2
    train_step(other, theirs, batches[1])
    assert_close(net, other)


def test_a_closure_after_a_step_that_raised_sees_the_weights_of_that_step(job, make_net, batches, monkeypatch):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours, theirs = orlop.SGD(mine.parameters(), lr=0.1, state="fp32"), torch.optim.SGD(other.parameters(), lr=0.1)
    loss_of(mine, batches[0]).backward()
    with monkeypatch.context() as patch:
        patch.setattr(ours._job.traffic, "pull_tracked", lambda: ours._job.traffic.pull(0))
        with pytest.raises(TypeError):
            ours.step()
    train_step(other, theirs, batches[0])
    loss = ours.step(closure_of(mine, ours, batches[1]))
    torch.testing.assert_close(loss, theirs.step(closure_of(other, theirs, batches[1])))
    assert job.step == 2
    assert_close(mine, other)


@pytest.mark.parametrize("overlap", [False, True])
def test_a_closure_that_raises_makes_no_step(job, make_net, batches, overlap):
    net = make_net()
    job.bind(net)
    options = {"overlap": "backward", "accumulation_steps": 1} if overlap else {}
    optimizer = orlop.AdamW(net.parameters(), state="fp32", **options)
    train_step(net, optimizer, batches[0])
    before = [parameter.detach().clone() for parameter in net.parameters()]

    def closure():
        optimizer.zero_grad()
        loss_of(net, batches[1]).backward()
        raise ValueError("in the closure")
    with pytest.raises(ValueError, match="in the closure"):
        optimizer.step(closure)
    assert job.step == 1 and float(optimizer.state[net.first.weight]["step"]) == 1
    assert all(torch.equal(old, new) for old, new in zip(before, net.parameters()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure_of(net, optimizer, batches[2]))
    assert job.step == 2


def test_a_store_pushes_what_its_closure_stepped(job, make_net, batches):
    net = make_net()
    job.bind(net)
    inner, store = torch.optim.SGD(net.parameters(), lr=0.1), orlop.Store(net.parameters())

    def closure():
        return train_step(net, inner, batches[0])
    assert store.step(closure) > 0
    assert torch.equal(job.get("first.weight"), net.first.weight) and not torch.equal(net.first.weight, make_net().first.weight)


@pytest.mark.parametrize("scaler", [orlop.GradScaler, torch.amp.GradScaler])
@pytest.mark.parametrize("how", ["position", "name"])
def test_a_scaler_refuses_a_closure_as_torch_does(job, make_net, batches, scaler, how):
    net = make_net()
    job.bind(net)
    optimizer, scaler = orlop.SGD(net.parameters()), scaler("cpu", init_scale=4.0)
    scaler.scale(loss_of(net, batches[0])).backward()
    closure = closure_of(net, optimizer, batches[0])
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, *([closure] if how == "position" else []), **({"closure": closure} if how == "name" else {}))
    assert closure.calls == 0 and job.step == 0
    scaler.step(optimizer)
    scaler.update()
    optimizer.step(closure)
    assert job.step == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_two_workers_with_closures_are_one_with_the_whole_batch(servers, make_net, batches, overlap, torchrun):
    """Rank 1's closure of the fourth step raises the first time it runs."""
    weights = torchrun("torchrun_closure.py", f"closures-{overlap}", *(["--overlap"] if overlap else []))
    net = make_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for batch in batches[:6]:
        train_step(net, optimizer, batch)
    for name, value in net.state_dict().items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-5)
