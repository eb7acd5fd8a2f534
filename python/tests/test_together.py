"""Muon for matrices and AdamW for the rest as one optimizer: the bits of both alone, one step for both or for none, and its state."""
import pytest
import torch

import orlop
from conftest import loss_of, train_step


def split(net):
    named = list(net.named_parameters())
    return [pair for pair in named if pair[1].dim() == 2], [pair for pair in named if pair[1].dim() != 2]


def both(net, session, **options):
    matrices, others = split(net)
    return orlop.Together(orlop.Muon(matrices, lr=0.02, session=session), orlop.AdamW(others, lr=1e-2, session=session), **options)


def test_steps_are_those_of_the_parts_alone(servers, make_net, batches):
    net, apart = make_net(), make_net()
    with orlop.connect(servers.address, job="together") as session, orlop.connect(servers.address, job="muon-alone") as first, \
            orlop.connect(servers.address, job="adamw-alone") as second:
        optimizer = both(net, session)
        matrices, others = split(apart)
        alone = [orlop.Muon(matrices, lr=0.02, session=first), orlop.AdamW(others, lr=1e-2, session=second)]
        for batch in batches[:4]:
            train_step(net, optimizer, batch)
            for one in alone:
                one.zero_grad()
            loss_of(apart, batch).backward()
            for one in alone:
                one.step()
            for (name, a), b in zip(net.named_parameters(), apart.parameters()):
                assert torch.equal(a, b), name
        names = [entry.name for entry in optimizer._job.entries]
        assert {names[t["index"]]: t["optimizer"] for t in session.client.list_tensors("together")} == {
            "first.weight": "muon", "second.weight": "muon", "first.bias": "adamw", "second.bias": "adamw"}
        for name, _ in split(apart)[0]:
            assert torch.equal(session.get(name, "momentum_buffer"), first.get(name, "momentum_buffer"))


def test_a_bad_gradient_of_one_part_stops_the_step_of_all(servers, make_net, batches):
    net = make_net()
    with orlop.connect(servers.address, job="together-veto") as session:
        optimizer = both(net, session, max_norm=1.0)
        train_step(net, optimizer, batches[0])
        before = [p.detach().clone() for p in net.parameters()]
        net.first.bias.grad[0] = torch.inf
        optimizer.step()
        assert optimizer.skipped
        assert all(torch.equal(a, b) for a, b in zip(before, net.parameters()))
        train_step(net, optimizer, batches[1])
        assert not optimizer.skipped and not any(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_schedulers_and_full_state_go_on_in_another_job(servers, make_net, batches):
    net, copy = make_net(), make_net()
    with orlop.connect(servers.address, job="together-from") as first, orlop.connect(servers.address, job="together-to") as second:
        optimizer = both(net, first)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step: 1 / (step + 1), lambda step: 0.5 ** step])
        for batch in batches[:3]:
            train_step(net, optimizer, batch)
            scheduler.step()
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02 / 4, 1e-2 / 8])
        copy.load_state_dict(net.state_dict())
        other = both(copy, second)
        saved = optimizer.state_dict(full=True)
        assert [set(saved["state"][number]) for number in range(4)] == 2 * [{"step", "momentum_buffer"}] + 2 * [
            {"step", "exp_avg", "exp_avg_sq"}]
        other.load_state_dict(saved)
        assert [group["lr"] for group in other.param_groups] == [group["lr"] for group in optimizer.param_groups]
        for batch in batches[3:6]:
            train_step(net, optimizer, batch)
            train_step(copy, other, batch)
        for (name, a), b in zip(net.named_parameters(), copy.named_parameters()):
            assert torch.equal(a, b[1]), name


def test_groups_added_later_take_their_parts_defaults(servers, make_net, batches):
    net = make_net()
    with orlop.connect(servers.address, job="together-groups") as session:
        session.bind(net)
        optimizer = orlop.Together(orlop.Muon([net.first.weight], momentum=0.5, session=session),
                                   orlop.AdamW([net.first.bias], lr=1e-2, session=session))
        optimizer.add_param_group({"params": [net.second.weight], "part": 0, "lr": 0.1})
        optimizer.add_param_group({"params": [net.second.bias], "part": 1})
        assert optimizer.param_groups[2]["momentum"] == 0.5 and optimizer.param_groups[3]["lr"] == 1e-2
        with pytest.raises(ValueError, match=r"part=None of a group; 0 to 1"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
        before = [p.detach().clone() for p in net.parameters()]
        train_step(net, optimizer, batches[0])
        assert not any(torch.equal(a, b) for a, b in zip(before, net.parameters()))


def test_parts_know_the_groups_of_now(servers, make_net, batches):
    """RMSprop is another algorithm once a group has momentum, and Adagrad's state has a value before the first step."""
    net = make_net()
    with orlop.connect(servers.address, job="together-now") as session:
        session.bind(net)
        optimizer = orlop.Together(orlop.RMSprop([net.first.weight], lr=1e-3, session=session),
                                   orlop.Adagrad([net.first.bias], initial_accumulator_value=0.5, session=session))
        optimizer.add_param_group({"params": [net.second.weight], "part": 0, "momentum": 0.9})
        optimizer.add_param_group({"params": [net.second.bias], "part": 1, "initial_accumulator_value": 0.25})
        assert set(optimizer.slots) == {"square_avg", "momentum_buffer", "grad_avg", "sum"}
        saved = optimizer.state_dict(full=True)["state"]
        assert saved[3]["sum"].eq(0.25).all() and saved[1]["sum"].eq(0.5).all()
        train_step(net, optimizer, batches[0])
        assert [t["optimizer"] for t in session.client.list_tensors("together-now")] == [
            "rmsprop_full", "adagrad", "rmsprop_full", "adagrad"]


def test_parts_of_two_sessions_are_refused(servers, make_net):
    net = make_net()
    with orlop.connect(servers.address, job="together-a") as first, orlop.connect(servers.address, job="together-b") as second:
        matrices, others = split(net)
        with pytest.raises(ValueError, match="the AdamW has another session than the Muon"):
            orlop.Together(orlop.Muon(matrices, session=first), orlop.AdamW(others, session=second))


def test_what_cannot_be_together_is_refused_by_name(make_net):
    net = make_net()
    with pytest.raises(ValueError, match="no optimizers"):
        orlop.Together()
    with pytest.raises(ValueError, match="torch.optim.sgd.SGD"):
        orlop.Together(torch.optim.SGD(net.parameters()))
    with pytest.raises(ValueError, match="Store"):
        orlop.Together(orlop.Store(net.parameters()))
    with pytest.raises(ValueError, match="max_norm of the AdamW: give it to orlop.Together"):
        orlop.Together(orlop.AdamW(net.parameters(), max_norm=1.0))
    part = orlop.AdamW(net.parameters())
    whole = orlop.Together(part)
    for use in (part.step, part.attach, lambda: part.load_state_dict({}), lambda: orlop.Together(part)):
        with pytest.raises(RuntimeError, match="this AdamW is a part of an orlop.Together"):
            use()
    with pytest.raises(ValueError, match=r"belong to parts \[None\]; expected \[0\]"):
        whole.load_state_dict(torch.optim.AdamW(net.parameters()).state_dict())
    loaded = orlop.AdamW(net.parameters())
    loaded._pending_state = {}
    with pytest.raises(ValueError, match="the AdamW has joined a job or loaded a state"):
        orlop.Together(loaded)
    with pytest.raises(ValueError, match="more than one parameter group"):
        orlop.Together(orlop.Lion(net.parameters()), orlop.AdamW(net.parameters()))
    with pytest.raises(ValueError, match="an optimizer of another library is one, this is 1"):
        orlop.Together(orlop.AdamW(net.parameters())).state_dict(full=True, format="torchao")
