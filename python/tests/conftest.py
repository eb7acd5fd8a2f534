"""Fixtures: private servers, and small models whose gradients are not trivial."""

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
