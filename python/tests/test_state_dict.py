"""Round trips that step the copy and compare it with one that never stopped."""

import copy

import pytest
import torch

import orlop
from conftest import train_step


def trained(job, net, batches, make):
    job.bind(net)
    optimizer = make(net.parameters(), session=job)
    for batch in batches:
        train_step(net, optimizer, batch)
    return optimizer


SLOTS = {"adamw": ("master", "exp_avg", "exp_avg_sq"), "sgd": ("master", "momentum_buffer")}


def stored(job, net, algorithm):
    """Everything the servers hold of a model's parameters."""
    return {(name, slot): job.get(name, slot) for name, _ in net.named_parameters() for slot in SLOTS[algorithm]}


@pytest.mark.parametrize("algorithm, state, dtype", [
    ("adamw", "fp32", torch.float32), ("adamw", "8bit", torch.float32), ("adamw", "8bit", torch.bfloat16),
    ("adamw", "8bit", torch.float16), ("sgd", "8bit", torch.float32)], ids=str)
def test_a_full_state_dict_steps_on_in_another_job_bit_for_bit(servers, tmp_path, make_net, batches, algorithm, state, dtype):
    def make(params, session):
        if algorithm == "sgd":
            return orlop.SGD(params, lr=0.05, momentum=0.9, session=session, state=state)
        return orlop.AdamW(params, session=session, state=state)

    case = f"{algorithm}-{state}-{str(dtype).removeprefix('torch.')}"
    with orlop.connect(servers.address, job=f"from-{case}") as first, orlop.connect(servers.address, job=f"to-{case}") as second:
        net, copy = make_net(dtype=dtype), make_net(dtype=dtype)
        optimizer = trained(first, net, batches[:5], make)
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(full=True)}, tmp_path / "saved.pt")
        saved = torch.load(tmp_path / "saved.pt")
        copy.load_state_dict(saved["model"])
        second.bind(copy)
        other = make(copy.parameters(), second)
        other.load_state_dict(saved["optimizer"])
        other.attach()
        for (name, slot), values in stored(first, net, algorithm).items():
            assert torch.equal(second.get(name, slot), values), (name, slot)
        for batch in batches[5:10]:
            train_step(net, optimizer, batch)
            train_step(copy, other, batch)
        for (name, slot), values in stored(first, net, algorithm).items():
            assert torch.equal(second.get(name, slot), values), (name, slot)
        for name, value in net.state_dict().items():
            assert torch.equal(copy.state_dict()[name], value), name


def test_masters_of_other_weights_are_not_taken(servers, make_net, batches):
    with orlop.connect(servers.address, job="from-masters") as first, orlop.connect(servers.address, job="to-masters") as second:
        saved = trained(first, make_net(dtype=torch.bfloat16), batches[:2], orlop.AdamW).state_dict(full=True)
        other = make_net(seed=9, dtype=torch.bfloat16)
        wanted = {name: value.clone() for name, value in other.state_dict().items()}
        second.bind(other)
        optimizer = orlop.AdamW(other.parameters(), session=second)
        optimizer.load_state_dict(saved)
        optimizer.attach()
        for name, value in wanted.items():
            assert torch.equal(second.get(name), value)


def make_adamw(params, session):
    return orlop.AdamW(params, session=session)


@pytest.mark.parametrize("where", ["same-optimizer", "new-optimizer", "new-session"])
@pytest.mark.parametrize("first", ["model", "optimizer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_of_an_earlier_step_gives_the_bits_of_a_run_that_never_stopped(job, tmp_path, make_net, batches, where, first, dtype):
    net = make_net(dtype=dtype)
    optimizer = trained(job, net, batches[:3], make_adamw)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(full=True)}, tmp_path / "saved.pt")
    for batch in batches[3:6]:
        train_step(net, optimizer, batch)
    expected = stored(job, net, "adamw")
    saved = torch.load(tmp_path / "saved.pt")

    session = orlop.connect(job.address, job=job.job) if where == "new-session" else job
    if where == "new-session":
        net = session.bind(make_net(seed=8, dtype=dtype))
    if where != "same-optimizer":
        optimizer = make_adamw(net.parameters(), session)
    for name in ("model", "optimizer") if first == "model" else ("optimizer", "model"):
        (net if name == "model" else optimizer).load_state_dict(saved[name])
    again = optimizer.state_dict(full=True)
    for number, state in saved["optimizer"]["state"].items():
        for slot, value in state.items():
            assert torch.equal(again["state"][number][slot], value), (number, slot)
    for batch in batches[3:6]:
        train_step(net, optimizer, batch)
    for key, value in stored(session, net, "adamw").items():
        assert torch.equal(value, expected[key]), key
    session.close()


def test_a_state_beside_weights_of_another_step_is_refused(job, make_net, batches):
    net = make_net()
    optimizer = trained(job, net, batches[:2], make_adamw)
    saved, weights = optimizer.state_dict(full=True), {name: value.clone() for name, value in net.state_dict().items()}
    train_step(net, optimizer, batches[2])
    before = stored(job, net, "adamw")
    with orlop.connect(job.address, job=job.job) as session:
        other = session.bind(make_net(seed=5))
        optimizer = make_adamw(other.parameters(), session)
        optimizer.load_state_dict(saved)
        for _ in range(2):
            with pytest.raises(ValueError, match=r"other weights than those of the model and of job .* at step 3: load the model's"):
                other(batches[0][0])
        assert session.step == 3
        for key, value in stored(session, net, "adamw").items():
            assert torch.equal(value, before[key]), key
        other.load_state_dict(weights)
        other(batches[0][0])
        assert session.step == 4 and torch.equal(session.get("first.weight"), weights["first.weight"])
    with orlop.connect(job.address, job=job.job) as session:  # the servers have these weights now, and no model is loaded
        other = session.bind(make_net(seed=6))
        optimizer = make_adamw(other.parameters(), session)
        optimizer.load_state_dict(saved)
        other(batches[0][0])
        assert torch.equal(other.first.weight, weights["first.weight"])


def test_a_state_loaded_alone_goes_with_the_weights_of_now_as_in_torch(job, make_net, batches):
    mine, theirs = make_net(), make_net()
    job.bind(mine)
    ours, reference = orlop.AdamW(mine.parameters(), state="fp32"), torch.optim.AdamW(theirs.parameters())
    for batch in batches[:2]:
        train_step(mine, ours, batch)
        train_step(theirs, reference, batch)
    saved, expected = ours.state_dict(full=True), copy.deepcopy(reference.state_dict())
    for batch in batches[2:6]:
        train_step(mine, ours, batch)
        train_step(theirs, reference, batch)
    ours.load_state_dict(saved)
    reference.load_state_dict(expected)
    for batch in batches[6:9]:
        train_step(mine, ours, batch)
        train_step(theirs, reference, batch)
    for a, b in zip(theirs.parameters(), mine.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_torch_state_dict_steps_on_here_and_back_there(job, make_net, batches):
    net = make_net()
    theirs = torch.optim.AdamW(net.parameters())
    for batch in batches[:5]:
        train_step(net, theirs, batch)
    mine = make_net()
    mine.load_state_dict(net.state_dict())
    job.bind(mine)
    ours = orlop.AdamW(mine.parameters(), state="fp32")
    ours.load_state_dict(theirs.state_dict())
    for batch in batches[5:10]:
        train_step(net, theirs, batch)
        train_step(mine, ours, batch)
    for a, b in zip(net.parameters(), mine.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    back = make_net()
    back.load_state_dict(mine.state_dict())
    again = torch.optim.AdamW(back.parameters())
    again.load_state_dict(ours.state_dict(full=True))
    train_step(net, theirs, batches[10])
    train_step(back, again, batches[10])
    for a, b in zip(net.parameters(), back.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_plain_state_dict_of_this_step_changes_nothing_and_of_another_is_refused(job, make_net, batches):
    net = make_net()
    optimizer = trained(job, net, batches[:2], orlop.AdamW)
    saved = optimizer.state_dict()
    assert saved["orlop"]["step"] == 2 and not any(isinstance(v, torch.Tensor) for v in saved["state"][0].values())
    optimizer.load_state_dict(saved)
    assert job.step == 2
    train_step(net, optimizer, batches[2])
    with pytest.raises(ValueError, match="at step 2 is not here: available is job .* at step 3"):
        optimizer.load_state_dict(saved)


def test_a_directory_resumes_bit_for_bit(tmp_path, capsys, make_net, batches):
    with orlop.local(directory=tmp_path / "kept", servers=2, memory="256MiB") as session:
        net = make_net()
        optimizer = trained(session, net, batches[:3], orlop.AdamW)
        for batch in batches[3:6]:
            train_step(net, optimizer, batch)
    with orlop.local(directory=tmp_path / "stopped", servers=2, memory="256MiB") as session:
        trained(session, make_net(), batches[:3], orlop.AdamW)
    with orlop.local(directory=tmp_path / "stopped", servers=2, memory="256MiB") as session:
        assert "resuming job default at step 3" in capsys.readouterr().out
        assert session.step == 3
        other = session.bind(make_net(seed=1))  # its weights lose
        optimizer = orlop.AdamW(other.parameters())
        optimizer.load_state_dict(optimizer.state_dict())  # as accelerate does: what it says of no job changes none
        for batch in batches[3:6]:
            train_step(other, optimizer, batch)
    for ours, theirs in zip(net.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)


def test_the_state_of_a_parameter_that_was_frozen_later_is_saved_and_loaded(job, make_net, batches):
    mine, theirs = make_net(), make_net()
    job.bind(mine)
    pairs = [(mine, orlop.AdamW(mine.parameters(), state="fp32")), (theirs, torch.optim.AdamW(theirs.parameters()))]
    for net, optimizer in pairs:
        train_step(net, optimizer, batches[0])
        net.first.weight.requires_grad_(False)
        saved = copy.deepcopy(optimizer.state_dict(full=True) if net is mine else optimizer.state_dict())
        train_step(net, optimizer, batches[1])
        optimizer.load_state_dict(saved)
        net.first.weight.requires_grad_(True)
        train_step(net, optimizer, batches[2])
    for ours, other in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("full", [True, False])
def test_a_new_optimizer_goes_on_while_a_parameter_is_frozen(job, make_net, batches, full):
    """The one before it in the session trained the parameter, so its state stays on the servers."""
    mine, theirs = make_net(), make_net()
    job.bind(mine)
    ours, reference = orlop.AdamW(mine.parameters(), state="fp32"), torch.optim.AdamW(theirs.parameters())
    for net, optimizer in ((mine, ours), (theirs, reference)):
        train_step(net, optimizer, batches[0])
        net.first.weight.requires_grad_(False)
    saved, expected = ours.state_dict(full=full), copy.deepcopy(reference.state_dict())
    ours, reference = orlop.AdamW(mine.parameters(), state="fp32"), torch.optim.AdamW(theirs.parameters())
    for net, optimizer, state in ((mine, ours, saved), (theirs, reference, expected)):
        optimizer.load_state_dict(state)
        train_step(net, optimizer, batches[1])
        net.first.weight.requires_grad_(True)
        train_step(net, optimizer, batches[2])
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_state_of_a_parameter_that_another_job_does_not_train_is_saved_again(job, make_net, batches):
    net, theirs = make_net(), make_net()
    ours = trained(job, net, batches[:2], lambda p, session: orlop.AdamW(p, state="fp32", session=session))
    reference = torch.optim.AdamW(theirs.parameters())
    for batch in batches[:2]:
        train_step(theirs, reference, batch)
    with orlop.connect(job.address, job="frozen") as session:
        session.bind(net)
        saved = ours.state_dict(full=True)
        for model in (net, theirs):
            model.first.weight.requires_grad_(False)
        ours = orlop.AdamW(net.parameters(), state="fp32", session=session)
        ours.load_state_dict(saved)
        train_step(net, ours, batches[2])
        train_step(theirs, reference, batches[2])
        saved, plain = ours.state_dict(full=True), ours.state_dict()
    assert all(set(state) == {"step"} for state in plain["state"].values())
    for number, state in reference.state_dict()["state"].items():
        for slot, value in state.items():
            torch.testing.assert_close(saved["state"][number][slot], value, rtol=1e-4, atol=1e-7)
    with orlop.connect(job.address, job="unfrozen") as session:
        session.bind(net)
        for model in (net, theirs):
            model.first.weight.requires_grad_(True)
        ours = orlop.AdamW(net.parameters(), state="fp32", session=session)
        ours.load_state_dict(saved)
        train_step(net, ours, batches[3])
        train_step(theirs, reference, batches[3])
        for a, b in zip(net.parameters(), theirs.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("is_torchs", [False, True])
def test_a_state_of_before_the_first_step_is_taken_by_a_new_optimizer(job, make_net, batches, is_torchs):
    """The job has stepped, and its momentum begins anew."""
    mine, theirs = make_net(), make_net()
    job.bind(mine)
    pairs = []
    for net, kind, words in ((mine, orlop.SGD, {"state": "fp32"}), (theirs, torch.optim.SGD, {})):
        optimizer = kind(net.parameters(), lr=0.05, momentum=0.9, **words)
        begin = torch.optim.SGD(theirs.parameters(), 0.05, 0.9).state_dict() if is_torchs or not words else optimizer.state_dict(full=True)
        train_step(net, optimizer, batches[0])
        optimizer = kind(net.parameters(), lr=0.05, momentum=0.9, **words)
        optimizer.load_state_dict(copy.deepcopy(begin))
        pairs.append((net, optimizer))
    for batch in batches[1:4]:
        for net, optimizer in pairs:
            train_step(net, optimizer, batch)
    for a, b in zip(mine.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
