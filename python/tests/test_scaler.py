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


pytestmark = pytest.mark.filterwarnings("error:a gradient changed")
