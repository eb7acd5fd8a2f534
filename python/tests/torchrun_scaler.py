"""Run by test_scaler.py in every worker: rank 1 finds infinities and makes them finite; rank 0 writes weights and scales."""

import argparse
import math

import torch
import torch.distributed as dist

import orlop
from conftest import Net, loss_of

parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("job")
parser.add_argument("out")
parser.add_argument("scaler", choices=["orlop", "torch"])
arguments = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
net = Net()
generator = torch.Generator().manual_seed(7)
xs, ys = torch.randn(20, 16, 64, generator=generator), torch.randn(20, 16, 8, generator=generator)
share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
kind = orlop.GradScaler if arguments.scaler == "orlop" else torch.amp.GradScaler
with orlop.connect(arguments.address, job=arguments.job) as session:
    session.bind(net)
    optimizer, scaler = orlop.SGD(net.parameters(), lr=0.1, state="fp32"), kind("cpu", init_scale=1024.0, growth_interval=3)
    for number in range(20):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, (xs[number, share], ys[number, share]))).backward()
        if number % 5 == 3 and rank == 1:
            net.first.weight.grad[0, 0] = math.inf
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_value_(net.parameters(), 100.0)
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.skipped == (number % 5 == 3)
    assert session.step == 16
    scales = [torch.zeros(()) for _ in range(world_size)]
    dist.all_gather(scales, torch.tensor(scaler.get_scale()))
    if rank == 0:
        torch.save({"weights": net.state_dict(), "scales": [float(scale) for scale in scales]}, arguments.out)
dist.destroy_process_group()
