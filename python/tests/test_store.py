"""orlop.Store: what is stepped here is what the servers have, bit for bit, whatever goes wrong on the way."""

import pytest
import safetensors.torch
import torch

import orlop
from conftest import loss_of
from test_repeated_step import FAULTS, inject


def sgd(net):
    return torch.optim.SGD(net.parameters(), lr=0.05)


def started(session, net, **options):
    session.bind(net)
    return net, sgd(net), orlop.Store(net.parameters(), session=session, **options)


def step_here(net, inner, batch):
    inner.zero_grad()
    loss_of(net, batch).backward()
    inner.step()


def trained(net, batches):
    """As torch alone trains it."""
    inner = sgd(net)
    for batch in batches:
        step_here(net, inner, batch)
    return net


def assert_stored(session, net, slot="master"):
    for name, parameter in net.named_parameters():
        assert torch.equal(session.get(name, slot), parameter.detach().to(torch.float32 if slot == "master" else parameter.dtype)), name


def assert_same(net, other):
    for ours, theirs in zip(net.parameters(), other.parameters()):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_servers_have_the_weights_after_every_step(job, make_net, batches, dtype):
    net, inner, store = started(job, make_net(dtype=dtype))
    for number, batch in enumerate(batches[:6]):
        step_here(net, inner, batch)
        store.step()
        assert job.step == number + 1 and not store.skipped
        assert_stored(job, net)
        assert_stored(job, net, "weight")
    assert_same(net, trained(make_net(dtype=dtype), batches[:6]))
    norm = sum(p.double().square().sum() for p in net.parameters()).sqrt()
    assert store.grad_norm == pytest.approx(float(norm.detach()), rel=1e-12)


def test_a_trainer_that_starts_again_goes_on_from_the_servers(job, make_net, batches, tmp_path):
    net, inner, store = started(job, make_net())
    for batch in batches[:3]:
        step_here(net, inner, batch)
        store.step()
    job.export(tmp_path / "weights.safetensors")
    exported = safetensors.torch.load_file(tmp_path / "weights.safetensors")
    assert exported.keys() == net.state_dict().keys()
    assert all(torch.equal(exported[name], value) for name, value in net.state_dict().items())
    with orlop.connect(job.address, job=job.job) as session:
        again, inner, store = started(session, make_net(seed=99))
        for batch in batches[3:6]:
            step_here(again, inner, batch)  # its first forward brings the weights
            store.step()
        assert session.step == 6
        assert_stored(session, again)
    assert_same(again, trained(make_net(), batches[:6]))


def test_servers_that_start_again_have_the_weights(make_net, batches, tmp_path):
    for first in (0, 3):
        with orlop.local(directory=tmp_path, servers=2, memory="256MiB") as session:
            net, inner, store = started(session, make_net(seed=first))
            for batch in batches[first:first + 3]:
                step_here(net, inner, batch)
                store.step()
            assert session.step == first + 3
            assert_stored(session, net)
    assert_same(net, trained(make_net(), batches[:6]))


def test_a_value_that_is_not_finite_is_skipped(job, make_net, batches):
    net, inner, store = started(job, make_net())
    step_here(net, inner, batches[0])
    store.step()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net.first.weight[3, 5] = torch.nan
        net.second.bias += 1
    store.step()
    assert store.skipped and job.step == 2
    assert all(torch.equal(job.get(name), value) for name, value in before.items())
    assert net.first.weight.isnan().sum() == 1, "the parameters stay as they are"
    net.load_state_dict(before)
    store.step()
    assert not store.skipped and job.step == 3
    assert_stored(job, net)


def test_edits_count_and_frozen_parameters_are_stored_once(job, make_net, batches):
    net = make_net()
    net.second.bias.requires_grad_(False)
    net, inner, store = started(job, net)
    step_here(net, inner, batches[0])
    store.step()
    assert_stored(job, net, "weight")
    kept = net.second.bias.clone()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 1
    store.step()
    with orlop.connect(job.address, job=job.job) as reader:
        assert torch.equal(reader.get("second.bias"), kept)
    assert torch.equal(job.get("second.bias"), net.second.bias), "this process has a newer value"
    assert torch.equal(job.get("first.weight"), net.first.weight)
    job.store(net)
    assert_stored(job, net, "weight")
    step_here(net, inner, batches[1])
    store.step()
    assert_stored(job, net, "weight")


@pytest.mark.parametrize("fault", [name for name in FAULTS if "pull" not in name])  # nothing is pulled
def test_a_repeated_step_counts_once_and_new_values_always(job, make_net, batches, fault):
    net, inner, store = started(job, make_net())
    step_here(net, inner, batches[0])
    store.step()
    for number, moved in enumerate((False, True)):
        step_here(net, inner, batches[1 + 2 * number])
        step = job.step
        committed = inject(store, fault)
        with pytest.raises((orlop.Error, KeyboardInterrupt)):
            store.step()
        if moved:
            step_here(net, inner, batches[2 + 2 * number])
        store.step()
        assert job.step == step + 1 + (committed and moved)
        assert_stored(job, net)
    assert_same(net, trained(make_net(), [batches[0], batches[1], batches[3], batches[4]]))


def test_a_loss_scale_does_not_matter(job, make_net, batches):
    net, inner, store = started(job, make_net())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for batch in batches[:2]:
        inner.zero_grad()
        scaler.scale(loss_of(net, batch)).backward()
        scaler.step(inner)
        scaler.update()
        store.step()
        assert_stored(job, net)


def test_state_dicts_hold_no_state(job, make_net, batches):
    net, inner, store = started(job, make_net())
    step_here(net, inner, batches[0])
    store.step()
    saved = store.state_dict(full=True)
    assert {key for state in saved["state"].values() for key in state} == {"step"}
    store.load_state_dict(saved)
    store.step()
    assert_stored(job, net)


def test_there_is_nothing_to_clip_or_to_overlap(make_net):
    for option in ({"max_norm": 1.0}, {"overlap": "backward"}, {"state": "8bit"}):
        with pytest.raises(TypeError, match=next(iter(option))):
            orlop.Store(make_net().named_parameters(), **option)
