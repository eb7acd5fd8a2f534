"""Run by test_closure.py in every worker: trains with closures, and rank 0 writes the weights."""

import argparse

import torch
import torch.distributed as dist

import orlop
from conftest import Net, loss_of

parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("job")
parser.add_argument("out")
parser.add_argument("--overlap", action="store_true")
arguments = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)  # rank 0's weights count
net = Net()
generator = torch.Generator().manual_seed(7)
xs, ys = torch.randn(20, 16, 64, generator=generator), torch.randn(20, 16, 8, generator=generator)
share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
raised = False


def closure():
    global raised
    optimizer.zero_grad()
    loss = loss_of(net, (xs[session.step, share], ys[session.step, share]))
    loss.backward()
    if session.step == 3 and rank == 1 and not raised:
        raised = True
        raise ValueError("in the closure of one rank")
    return float(loss)


with orlop.connect(arguments.address, job=arguments.job) as session:
    options = {"overlap": "backward", "accumulation_steps": 1} if arguments.overlap else {}
    optimizer = orlop.SGD(net.named_parameters(), lr=0.1, state="fp32", **options)
    failures = 0
    while session.step < 6:
        step = session.step
        try:
            assert optimizer.step(closure) > 0
        except (ValueError, orlop.Aborted) as error:
            failures += 1
            assert isinstance(error, ValueError) == (rank == 1) and step == session.step == 3, error
    assert failures == 1
    if rank == 0:
        torch.save(net.state_dict(), arguments.out)
dist.destroy_process_group()
