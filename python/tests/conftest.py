"""Fixtures: private servers, and small models whose gradients are not trivial."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import orlop


@pytest.fixture
def session():
    with orlop.local(memory="256MiB") as opened:
        yield opened


@pytest.fixture(scope="module")
def servers():
    """Servers that tests of a module share, each with a job of its own."""
    with orlop.local(servers=2, memory="256MiB", job="owner") as opened:
        yield opened


@pytest.fixture
def job(servers, request):
    with orlop.connect(servers.address, job=request.node.name.replace("[", "-").replace("]", "")) as opened:
        yield opened


@pytest.fixture
def torchrun(servers, tmp_path):
    """Runs a script of this folder in two workers, and returns what rank 0 saved."""
    def run(script, job, *options):
        here, out = Path(__file__).parent, tmp_path / "saved.pt"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(here / script),
                   servers.address, job, str(out), *options]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return torch.load(out)
    return run


class Net(torch.nn.Module):
    """A weight of 16,384 elements (8-bit when asked), and small ones (always fp32)."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(64, 256)
        self.second = torch.nn.Linear(256, 8)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def make_net():
    def make(seed=0, dtype=torch.float32):
        torch.manual_seed(seed)
        return Net().to(dtype)
    return make


@pytest.fixture
def batches():
    """20 batches of a regression task, the same in every call."""
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(20, 16, 64, generator=generator)
    y = torch.randn(20, 16, 8, generator=generator)
    return list(zip(x, y))


def loss_of(model, batch):
    x, y = batch
    return torch.nn.functional.mse_loss(model(x.to(next(model.parameters()).dtype)).float(), y)


def train_step(model, optimizer, batch):
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return float(loss)
