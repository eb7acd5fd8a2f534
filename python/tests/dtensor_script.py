"""Run by test_dtensor.py in every worker: `dtensor_script.py ADDRESS CASE:JOB ...` runs cases, each in a session of its own."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import orlop

ADDRESS, *WANTED = sys.argv[1:]
STEPS = 20
dist.init_process_group("gloo")
RANK, WORLD = dist.get_rank(), dist.get_world_size()
MESH = init_device_mesh("cpu", (WORLD,))


class Model(torch.nn.Module):
    """Tied tensors, sizes that no two ranks can share equally, a parameter of one element, one that is not used, and a buffer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(11, 8)
        self.layers = torch.nn.ModuleList(torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))
                                          for _ in range(2))
        self.norm = torch.nn.LayerNorm(8)
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.unused = torch.nn.Parameter(torch.ones(3, 2))
        self.head = torch.nn.Linear(8, 11)
        self.head.weight = self.embedding.weight
        self.register_buffer("table", torch.arange(4, dtype=torch.float32))

    def forward(self, tokens):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = x + layer(x)
        return self.head(self.norm(x)) * self.scale


def sharded():
    model = Model()
    for layer in model.layers:
        fully_shard(layer, mesh=MESH)
    return fully_shard(model, mesh=MESH)


def parallel():
    model = Model()
    plan = {"layers.0.0": ColwiseParallel(), "layers.0.2": RowwiseParallel(), "layers.1.0": ColwiseParallel(),
            "layers.1.2": RowwiseParallel()}
    return parallelize_module(model, MESH, plan)


def batches(share):
    """Of each step the tokens: this rank's, or all."""
    everything = torch.randint(0, 11, (STEPS, 12), generator=torch.Generator().manual_seed(7))
    return everything.chunk(WORLD, dim=1)[RANK] if share else everything


def train(model, optimizer, tokens):
    optimizer.zero_grad()
    loss = torch.nn.functional.cross_entropy(model(tokens), (tokens + 3) % 11)
    loss.backward()
    optimizer.step()
    return loss.item()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def trains_as_torch(session, make, share):
    """The losses of 20 steps, the weights and the states are those of torch's AdamW. A state that was saved can be loaded."""
    model, other = session.bind(make()), make()
    optimizer = orlop.AdamW(model.parameters(), lr=1e-3, state="fp32")
    reference = torch.optim.AdamW(other.parameters(), lr=1e-3)
    for step, tokens in enumerate(batches(share)):
        loss, expected = train(model, optimizer, tokens), train(other, reference, tokens)
        assert abs(loss - expected) <= 1e-6 * abs(expected), (step, loss, expected)
        if step == 5:  # an edit of every rank's parts
            with torch.no_grad():
                for parameter in (*model.parameters(), *other.parameters()):
                    parameter.mul_(0.9)
            session.store(model)
        if step == 10:
            state = optimizer.state_dict(full=True)
            saved = {name: session.get(name, "exp_avg_sq") for name, _ in other.named_parameters() if name != "unused"}
            optimizer.load_state_dict(state)
            assert all(torch.equal(session.get(name, "exp_avg_sq"), value) for name, value in saved.items())
        if step == 15:  # a forward without backward leaves a model of fully_shard with other parameters
            with torch.no_grad():
                model(tokens)
            assert session.store(model) == step + 3, "nothing differs, so nothing is stored"
    assert session.step == STEPS + 2  # the load and the first store
    state = reference.state_dict()["state"]
    for number, (name, parameter) in enumerate(other.named_parameters()):
        value = whole(parameter)
        torch.testing.assert_close(session.get(name), value, rtol=1e-5, atol=2e-6)
        if name != "unused":
            torch.testing.assert_close(session.get(name, "exp_avg"), whole(state[number]["exp_avg"]), rtol=1e-4, atol=1e-6)
        if number % 2 and isinstance(parameter, DTensor):
            torch.testing.assert_close(whole(dict(model.named_parameters())[name]), value, rtol=1e-5, atol=2e-6)


def resumes(session, make):
    """Three more steps of a job, on however many processes, of whatever model."""
    model = session.bind(make())
    optimizer = orlop.AdamW(model.parameters(), lr=1e-3, state="fp32")
    optimizer.attach()
    begin = session.step
    for tokens in batches(share=True)[begin:begin + 3]:
        train(model, optimizer, tokens)
    assert session.step == begin + 3


def compares(session):
    """The weights of the job are those of torch's AdamW after as many steps."""
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for tokens in batches(share=False)[:session.step]:
        train(model, optimizer, tokens)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(session.get(name), parameter.detach(), rtol=1e-5, atol=2e-6)


def differs(session):
    """Ranks that begin with other weights get those of rank 0, and a line says so."""
    model = session.bind(Model())
    torch.nn.init.constant_(model.norm.bias, RANK)
    orlop.AdamW(model.parameters(), session=session).attach()
    assert model.norm.bias.eq(0).all()


def refuses(session):
    """What cannot be right raises on every rank, and changes nothing."""
    model = Model()
    if WORLD > 1:
        model.norm.weight = torch.nn.Parameter(torch.ones(8 + RANK))
        with pytest.raises(ValueError, match=r"'norm.weight' .*shape \[8\]\) on rank 0 .*shape \[9\]\) on rank 1"):
            orlop.AdamW(session.bind(model).parameters(), session=session).attach()
        model.norm.weight = torch.nn.Parameter(torch.ones(8, dtype=torch.float64 if RANK else torch.float32))
        with pytest.raises(ValueError if RANK else orlop.Aborted):
            orlop.AdamW(session.bind(model).parameters(), session=session).attach()
    flat = FullyShardedDataParallel(Model(), device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match="fully_shard"):
        orlop.AdamW(session.bind(flat).parameters(), session=session).attach()
    with pytest.raises(ValueError, match="fully_shard"):  # no model is bound
        session._model = None
        orlop.AdamW(flat.named_parameters(), session=session).attach()
    model = session.bind(parallel())
    with pytest.raises(ValueError, match="'layers.0.0.weight'"):
        if WORLD == 1:
            raise ValueError("'layers.0.0.weight' is whole")
        orlop.AdamW(model.parameters(), session=session, overlap="backward").attach()
    assert session.step == 0
    optimizer = orlop.SGD(model.parameters(), lr=0.1, session=session)
    optimizer.attach()
    before = session.step, session.get("layers.0.0.weight")
    weight = model.layers[0][0].weight
    weight.grad = distribute_tensor(torch.ones(16, 8), MESH, weight.placements)
    if RANK == 1:
        weight.grad = None
    if WORLD > 1:
        with pytest.raises(ValueError, match="'layers.0.0.weight', a DTensor, is missing on some ranks"):
            optimizer.step()
    assert session.step == before[0] and torch.equal(session.get("layers.0.0.weight"), before[1])
    # A sum of which each rank has a term.
    weight.grad = None
    bias = model.layers[0][2].bias
    bias.grad = DTensor.from_local(torch.full((8,), 2.0 / WORLD), MESH, [Partial()])
    assert bias.placements == (Replicate(),)
    expected = whole(bias).clone() - 0.2
    optimizer.step()
    torch.testing.assert_close(whole(bias), expected)
    torch.testing.assert_close(session.get("layers.0.2.bias"), expected)


CASES = {
    "shard": lambda session: trains_as_torch(session, sharded, share=True),
    "parallel": lambda session: trains_as_torch(session, parallel, share=False),
    "differ": differs,
    "refuse": refuses,
    "resume-sharded": lambda session: resumes(session, sharded),
    "resume-plain": lambda session: resumes(session, Model),
    "compare": compares,
}
for case, job in (word.split(":") for word in WANTED):
    with orlop.connect(ADDRESS, job=job) as opened:
        CASES[case](opened)
dist.destroy_process_group()
# Meshes hold their groups, whose threads may abort a process that ends while they let go of the last collective (torch 2.13).
os._exit(0)
