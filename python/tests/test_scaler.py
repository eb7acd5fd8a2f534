import math
import warnings

import pytest
import torch

import orlop
from conftest import loss_of


def test_scaled_steps_are_those_of_torch_and_an_overflow_backs_off(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)
    pairs = [(mine, orlop.SGD(mine.parameters(), lr=0.1, state="fp32"), orlop.GradScaler(init_scale=1024.0, growth_interval=2)),
             (other, torch.optim.SGD(other.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2))]
    for number, batch in enumerate(batches[:6]):
        for net, optimizer, scaler in pairs:
            optimizer.zero_grad()
            scaler.scale(loss_of(net, batch)).backward()
            if number == 3:
                net.first.weight.grad[0, 0] = math.nan
            scaler.step(optimizer)
            scaler.update()
        assert pairs[0][1].skipped == (number == 3)
        assert pairs[0][2].get_scale() == pairs[1][2].get_scale()
    for ours, theirs in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_unscale_before_clipping_counts_once(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)
    for net, optimizer, scaler in ((mine, orlop.SGD(mine.parameters(), lr=0.1, state="fp32"), orlop.GradScaler(init_scale=64.0)),
                                   (other, torch.optim.SGD(other.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=64.0))):
        scaler.scale(loss_of(net, batches[0])).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
    for ours, theirs in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_pushes_during_backward_carry_the_scale(job, make_net, batches):
    net = make_net()
    job.bind(net)
    optimizer, scaler = orlop.SGD(net.parameters(), overlap="backward", accumulation_steps=1), orlop.GradScaler(init_scale=256.0)
    for batch in batches[:3]:
        optimizer.zero_grad()
        scaler.scale(loss_of(net, batch)).backward()
        scaler.step(optimizer)  # a stale scale would warn, and warnings are errors below
        scaler.update()
        assert not optimizer.skipped


def test_unscaled_gradients_that_were_pushed_during_backward_are_pushed_again(job, make_net, batches):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours = orlop.SGD(mine.parameters(), lr=0.1, state="fp32", overlap="backward", accumulation_steps=1)
    ours.attach()
    for net, optimizer in ((mine, ours), (other, torch.optim.SGD(other.parameters(), lr=0.1))):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        scaler.scale(loss_of(net, batches[0])).backward()
        scaler.unscale_(optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the second push
            scaler.step(optimizer)
        scaler.update()
    for ours, theirs in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def repair(net):
    """Makes gradients finite again."""
    torch.nn.utils.clip_grad_value_(net.parameters(), 0.5)
    for parameter in net.parameters():
        parameter.grad.nan_to_num_()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kind", [orlop.GradScaler, torch.amp.GradScaler])
def test_a_gradient_that_is_finite_again_after_unscale_still_skips_the_step(job, make_net, batches, kind, overlap):
    mine, other = make_net(), make_net()
    job.bind(mine)
    options = {"overlap": "backward", "accumulation_steps": 1} if overlap else {}
    pairs = [(mine, orlop.SGD(mine.parameters(), lr=0.1, momentum=0.9, state="fp32", **options),
              kind("cpu", init_scale=1024.0, growth_interval=3)),
             (other, torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.9),
              torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3))]
    bad = {2: math.inf, 3: math.nan, 9: -math.inf, 10: math.inf, 11: math.nan, 17: math.inf}
    for number, batch in enumerate(batches):
        for net, optimizer, scaler in pairs:
            optimizer.zero_grad()
            scaler.scale(loss_of(net, batch)).backward()
            if number in bad:
                net.second.weight.grad[3, 5] = bad[number]
            scaler.unscale_(optimizer)
            repair(net)
            before = job.step, [parameter.detach().clone() for parameter in net.parameters()]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of the second push
                scaler.step(optimizer)
            scaler.update()
            if number in bad and optimizer is pairs[0][1]:
                assert optimizer.skipped and job.step == before[0]
                assert all(torch.equal(old, new) for old, new in zip(before[1], net.parameters()))
        assert pairs[0][1].skipped == (number in bad)
        assert pairs[0][2].get_scale() == pairs[1][2].get_scale()
    assert float(pairs[0][1].state[mine.first.weight]["step"]) == job.step == len(batches) - len(bad)
    for ours, theirs in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("again", ["scaler", "optimizer"])
@pytest.mark.parametrize("kind", [orlop.GradScaler, torch.amp.GradScaler])
def test_a_scaled_step_that_raised_may_be_made_again(job, make_net, batches, monkeypatch, kind, again):
    mine, other = make_net(), make_net()
    job.bind(mine)
    ours, scaler = orlop.SGD(mine.parameters(), lr=0.1, state="fp32"), kind("cpu", init_scale=64.0)
    scaler.scale(loss_of(mine, batches[0])).backward()
    with monkeypatch.context() as patch:
        patch.setattr(ours._job.traffic, "push", None)
        with pytest.raises(TypeError):
            scaler.step(ours)
    scaler.step(ours) if again == "scaler" else ours.step()
    loss_of(other, batches[0]).backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    for ours, theirs in zip(mine.parameters(), other.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["orlop", "torch"])
def test_a_gradient_that_one_rank_made_finite_again_skips_the_step_of_all(servers, torchrun, make_net, batches, kind):
    saved = torchrun("torchrun_scaler.py", f"scaler-{kind}", kind)
    net = make_net()
    optimizer, scaler = torch.optim.SGD(net.parameters(), lr=0.1), torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, batch)).backward()
        if number % 5 == 3:
            net.first.weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
    for name, value in net.state_dict().items():
        torch.testing.assert_close(saved["weights"][name], value, rtol=1e-4, atol=1e-5)
    assert kind == "torch" or saved["scales"] == [scaler.get_scale()] * 2


pytestmark = pytest.mark.filterwarnings("error:a gradient changed")
