"""Run by test_torchrun.py in every worker: trains, and rank 0 writes the weights."""

import argparse
import copy
import gc
import os
import pathlib
import signal

import torch
import torch.distributed as dist

import orlop
from conftest import Net, loss_of

parser = argparse.ArgumentParser()
parser.add_argument("address")
parser.add_argument("job")
parser.add_argument("out")
parser.add_argument("--ddp", action="store_true")
parser.add_argument("--overlap", action="store_true")
parser.add_argument("--store", action="store_true", help="stepped here, by torch; with --ddp")
parser.add_argument("--wire", help="gradient_wire")
parser.add_argument("--kill-at", type=int, default=-1, help="step in whose push rank 1 kills itself")
parser.add_argument("--second-thoughts", action="store_true", help="one rank in turn takes back a backward that is pushed already")
parser.add_argument("--move", action="store_true", help="two groups exchange their parameters in step 3, on the last rank first")
parser.add_argument("--fault", help="what goes wrong once on rank 1, in step 3: a call that fails (push, commit, answer (of a commit "
                    "made), pull, or abort (of a gradient that changed after its push)), or edit: a weight is changed")
parser.add_argument("--freeze", action="store_true", help="two parameters are frozen; one is the same on all ranks, and stays there")
parser.add_argument("--rewind", action="store_true", help="after step 5 everybody loads the checkpoint of step 3, the optimizer first")
arguments = parser.parse_args()

dist.init_process_group("gloo")
rank, world_size = dist.get_rank(), dist.get_world_size()
torch.manual_seed(rank)  # rank 0's weights count
net = Net()
if arguments.freeze:
    net.first.weight.requires_grad_(False)
    torch.nn.init.zeros_(net.second.bias).requires_grad_(False)
model = torch.nn.parallel.DistributedDataParallel(net) if arguments.ddp else net
generator = torch.Generator().manual_seed(7)
batches = list(zip(torch.randn(6, 16, 64, generator=generator), torch.randn(6, 16, 8, generator=generator)))


class Faulty:
    """A core whose next call of the kind that --fault names fails."""

    def __init__(self, core):
        self.core, self.failed = core, False

    def __getattr__(self, name):
        if self.failed or name != {"push": "push_async", "answer": "commit"}.get(arguments.fault, arguments.fault):
            return getattr(self.core, name)

        def fail(*args, **kwargs):
            self.failed = True
            if arguments.fault == "answer":
                self.core.commit(*args, **kwargs)
            raise orlop.Unavailable("injected")
        return fail


with orlop.connect(arguments.address, job=arguments.job, timeout_seconds=5 if arguments.fault else 60) as session:
    session.bind(model)
    options = {"overlap": "backward", "accumulation_steps": 1} if arguments.overlap else {}
    groups = [{"params": [p for p in model.parameters() if (p.dim() == 2) == matrices], "lr": lr} for matrices, lr in ((1, 0.01), (0, 0.1))]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = orlop.AdamW(groups if arguments.move else trained, lr=0.01, state="fp32", max_norm=1.0,
                            gradient_wire=arguments.wire, **options)
    if arguments.store:
        inner = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
        optimizer = orlop.Store(model.parameters())
        optimizer.register_step_pre_hook(lambda *_: inner.step())
    optimizer.attach()

    def move():
        first, second = optimizer.param_groups
        first["params"], second["params"] = second["params"], first["params"]
    done, saved = session.step, None
    while done < len(batches):
        if arguments.rewind and done == 3 and saved is None:
            saved = copy.deepcopy({"optimizer": optimizer.state_dict(full=True), "model": model.state_dict()})
        if arguments.rewind and done == 5 and session.step == 5:
            optimizer.load_state_dict(saved["optimizer"])
            model.load_state_dict(saved["model"])
            done = 3
        if session.step == arguments.kill_at and rank == 1:
            push = optimizer._job.traffic.push
            optimizer._job.traffic.push = lambda parts, scale: (push(parts[:1], scale).wait(), os.kill(os.getpid(), signal.SIGKILL))
        x, y = batches[done]
        share = slice(rank * 16 // world_size, (rank + 1) * 16 // world_size)
        if arguments.second_thoughts and session.step % 2 == rank:
            loss_of(model, (y @ x.new_ones(8, 64), y)).backward()
        optimizer.zero_grad()
        loss_of(model, (x[share], y[share])).backward()
        if arguments.fault and session.step == 3 and rank == 1:
            optimizer._job.traffic.handle = Faulty(optimizer._job.handle)
            if arguments.fault == "abort":
                for parameter in net.parameters():
                    parameter.grad.mul_(1)
            if arguments.fault == "edit":
                with torch.no_grad():
                    net.first.bias.zero_()
        step = session.step
        if arguments.move and step == 3 and rank == world_size - 1:
            move()
        try:
            optimizer.step()
            assert not arguments.store or torch.equal(session.get("first.weight", "master"), net.first.weight)
            assert not ((arguments.fault or arguments.move and world_size > 1) and step == 3), "the fault went unnoticed on this rank"
        except ValueError as error:
            assert arguments.move and step == 3 and rank == 1 and "other parameters than rank 0's" in str(error)
            optimizer.step()
        except orlop.Error as error:
            assert (arguments.fault or arguments.move) and step == 3
            if arguments.move:
                move()
            assert isinstance(error, orlop.EditedWeights) == (arguments.fault == "edit" and rank == 1)
            if arguments.fault == "edit":
                session.store(net)  # rank 0's count, and it has edited nothing
                assert session.step == step
            optimizer.step()
        done += 1
    if arguments.freeze:
        first, second = (session.client.describe_tensor(arguments.job, name)["shards"][0]["slots"]
                         for name in ("first.weight", "second.bias"))
        assert bool(first) == (world_size > 1) and not second
    if rank == 0:
        torch.save(net.state_dict(), arguments.out)
model = session = optimizer = None  # DistributedDataParallel holds the group as long as it lives
gc.collect()
dist.destroy_process_group()
threads = [task.joinpath("comm").read_text().strip() for task in pathlib.Path("/proc/self/task").iterdir()]
assert "pt_gloo_runloop" not in threads, threads  # one left here can abort the process (python/orlop/job/workers.py)
