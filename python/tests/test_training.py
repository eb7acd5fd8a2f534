"""Closed loops against torch.optim, and what a training script may do between steps."""

import copy
import math

import pytest
import torch

import orlop
from conftest import loss_of, train_step


def pair(make_net, job, ours, theirs, **options):
    """The same network twice: one trained by Orlop, one by torch."""
    mine, other = make_net(), make_net()
    job.bind(mine)
    return mine, ours(mine.parameters(), session=job, **options), other, theirs(other.parameters(), **options)


def assert_same(mine, other, rtol=1e-5, atol=1e-6):
    for (name, ours), theirs in zip(mine.named_parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("options", [{}, {"nesterov": True}, {"weight_decay": 0.1}, {"dampening": 0.3}], ids=str)
def test_sgd_with_momentum_follows_torch_for_20_steps(servers, make_net, batches, options):
    with orlop.connect(servers.address, job=f"sgd-{'-'.join(options)}") as job:
        mine, other = make_net(), make_net()
        job.bind(mine)
        ours = orlop.SGD(mine.parameters(), lr=0.05, momentum=0.9, state="fp32", **options)
        theirs = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9, **options)
        for batch in batches:
            train_step(mine, ours, batch)
            train_step(other, theirs, batch)
        assert_same(mine, other)


def test_adamw_loss_follows_torch_at_each_of_20_steps(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours = orlop.AdamW(mine.parameters(), lr=1e-3, state="fp32")
    theirs = torch.optim.AdamW(other.parameters(), lr=1e-3)
    for batch in batches:
        assert train_step(mine, ours, batch) == pytest.approx(train_step(other, theirs, batch), rel=1e-4)


def test_adamw_in_8_bit_stays_close(job, make_net, batches):
    start, mine, other = make_net(), make_net(), make_net()
    job.bind(mine)
    ours, theirs = orlop.AdamW(mine.parameters()), torch.optim.AdamW(other.parameters())
    for batch in batches:
        train_step(mine, ours, batch)
        train_step(other, theirs, batch)
    change = (other.first.weight - start.first.weight).norm()
    assert (mine.first.weight - other.first.weight).norm() / change < 0.1


def test_groups_schedulers_and_tensor_learning_rates(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)

    def groups(net):
        return [{"params": net.first.parameters(), "weight_decay": 0.5}, {"params": net.second.parameters(), "lr": 0.02}]
    ours = orlop.AdamW(groups(mine), lr=torch.tensor(1e-2), state="fp32")
    theirs = torch.optim.AdamW(groups(other), lr=1e-2)
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, max_lr=[0.01, 0.02], total_steps=20) for o in (ours, theirs)]
    for batch in batches[:-1]:
        train_step(mine, ours, batch)
        train_step(other, theirs, batch)
        for schedule in schedules:
            schedule.step()
    assert_same(mine, other, rtol=1e-4, atol=1e-5)


def test_frozen_parameters_stay_and_have_no_state(job, make_net, batches):
    mine = make_net()
    mine.first.requires_grad_(False)
    before = copy.deepcopy(mine.first.weight)
    job.bind(mine)
    optimizer = orlop.AdamW(mine.parameters())
    for batch in batches[:3]:
        train_step(mine, optimizer, batch)
    assert torch.equal(mine.first.weight, before)
    with pytest.raises(orlop.Error):
        job.get("first.weight", "exp_avg")
    mine.first.requires_grad_(True)
    with pytest.raises(RuntimeError, match="first.weight.*frozen"):
        train_step(mine, optimizer, batches[3])


def test_a_parameter_without_gradient_is_left_alone_as_in_torch(job, make_net, batches):
    mine, ours, other, theirs = pair(make_net, job, lambda p, **o: orlop.AdamW(p, state="fp32", **o), torch.optim.AdamW, lr=0.01)
    for number, batch in enumerate(batches[:6]):
        for net, optimizer in ((mine, ours), (other, theirs)):
            optimizer.zero_grad()
            loss_of(net, batch).backward()
            if number % 2:
                net.second.bias.grad = None
            optimizer.step()
    assert_same(mine, other)
    assert float(ours.state[mine.second.bias]["step"]) == 3


def test_accumulated_gradients_are_one_push(job, make_net, batches):
    mine, ours, other, theirs = pair(make_net, job, lambda p, **o: orlop.SGD(p, state="fp32", **o), torch.optim.SGD, lr=0.1)
    for net, optimizer in ((mine, ours), (other, theirs)):
        for batch in batches[:4]:
            (loss_of(net, batch) / 4).backward()
        optimizer.step()
    assert_same(mine, other)
    assert job.step == 1


def test_clipping_on_the_servers_is_that_of_clip_grad_norm(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours = orlop.SGD(mine.parameters(), lr=0.1, max_norm=0.05, state="fp32")
    theirs = torch.optim.SGD(other.parameters(), lr=0.1)
    for batch in batches[:5]:
        train_step(mine, ours, batch)
        theirs.zero_grad()
        loss_of(other, batch).backward()
        norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 0.05)
        theirs.step()
        assert ours.grad_norm == pytest.approx(float(norm), rel=1e-5)
    assert_same(mine, other)


def test_what_users_do_to_gradients_counts(job, make_net, batches):
    mine, ours, other, theirs = pair(make_net, job, lambda p, **o: orlop.SGD(p, state="fp32", **o), torch.optim.SGD, lr=0.1)
    for net, optimizer in ((mine, ours), (other, theirs)):
        loss_of(net, batches[0]).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.01)
        optimizer.step()
    assert_same(mine, other)


def test_a_gradient_that_is_not_finite_skips_the_step_everywhere(job, make_net, batches):
    mine = make_net()
    job.bind(mine)
    optimizer = orlop.AdamW(mine.parameters())
    train_step(mine, optimizer, batches[0])
    before, moment = copy.deepcopy(mine.state_dict()), job.get("first.weight", "exp_avg")
    optimizer.zero_grad()
    loss_of(mine, batches[1]).backward()
    mine.second.bias.grad[0] = math.inf
    optimizer.step()
    assert optimizer.skipped and job.step == 2
    assert all(torch.equal(before[name], value) for name, value in mine.state_dict().items())
    assert torch.equal(moment, job.get("first.weight", "exp_avg"))
    assert float(optimizer.state[mine.first.weight]["step"]) == 1
    train_step(mine, optimizer, batches[1])
    assert not optimizer.skipped


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_parameters_are_the_rounded_master(job, make_net, batches, dtype):
    mine = make_net(dtype=dtype)
    job.bind(mine)
    optimizer = orlop.AdamW(mine.parameters(), lr=1e-3)
    for batch in batches[:5]:
        train_step(mine, optimizer, batch)
    master = job.get("first.weight", "master")
    assert master.dtype == torch.float32
    torch.testing.assert_close(mine.first.weight, master.to(dtype), rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)


def test_tied_weights_are_one_tensor(job):
    torch.manual_seed(0)
    embed, head = torch.nn.Embedding(50, 16), torch.nn.Linear(16, 50, bias=False)
    head.weight = embed.weight
    model = torch.nn.Sequential(embed, head)
    job.bind(model)
    optimizer = orlop.AdamW(model.parameters())
    model(torch.arange(50)).square().mean().backward()
    optimizer.step()
    assert torch.equal(job.get("1.weight"), embed.weight) and embed.weight is head.weight


def test_autograd_notices_the_new_weights(job, make_net, batches):
    mine = make_net()
    job.bind(mine)
    optimizer = orlop.SGD(mine.parameters(), lr=0.1)
    loss = loss_of(mine, batches[0])
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("edit", ["clamp", "load_state_dict"])
def test_an_edit_is_found_named_and_can_be_stored(job, make_net, batches, edit):
    mine = make_net()
    job.bind(mine)
    optimizer = orlop.SGD(mine.parameters(), lr=0.1)
    train_step(mine, optimizer, batches[0])
    if edit == "clamp":
        with torch.no_grad():
            mine.first.weight.clamp_(-0.01, 0.01)
    else:
        mine.load_state_dict(make_net(seed=5).state_dict())
    with pytest.raises(orlop.EditedWeights, match=r"first.weight.*session.store\(model\)"):
        train_step(mine, optimizer, batches[1])
    assert job.step == 1
    wanted = mine.first.weight.detach().clone()
    job.store(mine)
    assert torch.equal(job.get("first.weight"), wanted) and job.step == 2
    train_step(mine, optimizer, batches[1])
    assert job.step == 3


def test_names_are_needed_and_named_parameters_are_enough(job, make_net, batches):
    mine = make_net()
    optimizer = orlop.SGD(mine.parameters(), session=job)
    with pytest.raises(ValueError, match=r"session.bind\(model\)"):
        train_step(mine, optimizer, batches[0])
    train_step(mine, orlop.SGD(mine.named_parameters(), session=job), batches[0])
    assert torch.equal(job.get("second.bias"), mine.second.bias)


def test_a_newer_optimizer_takes_over_and_the_older_one_is_told(job, make_net, batches):
    mine = make_net()
    job.bind(mine)
    older = orlop.SGD(mine.parameters())
    train_step(mine, older, batches[0])
    newer = orlop.SGD(mine.parameters())
    train_step(mine, newer, batches[1])
    with pytest.raises(orlop.Superseded, match="job="):
        train_step(mine, older, batches[2])


def test_parameters_cannot_be_added_after_the_first_step(job, make_net, batches):
    mine = make_net()
    job.bind(mine)
    optimizer = orlop.SGD(mine.first.parameters())
    optimizer.add_param_group({"params": list(mine.second.parameters()), "lr": 0.5})
    train_step(mine, optimizer, batches[0])
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(1))]})
