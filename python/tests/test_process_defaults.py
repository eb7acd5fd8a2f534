"""A process may have another default dtype and device than float32 and cpu: they must change nothing."""

import ast
from pathlib import Path

import pytest
import torch
from torch.utils._device import _device_constructors

import orlop
from conftest import loss_of
from orlop import kernels

PACKAGE = Path(orlop.__file__).parent


def test_every_factory_is_told_dtype_and_device():
    """torch.frombuffer has no device. Only the functions that a default device changes are meant: those like another tensor keep its."""
    factories, bare = {function.__name__ for function in _device_constructors()}, []
    for path in PACKAGE.rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text())):
            if (isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and ast.unparse(call.func.value) == "torch"
                    and call.func.attr in factories and not {"dtype", "device"} <= {word.arg for word in call.keywords}):
                bare.append(f"{path.name}:{call.lineno}: {ast.unparse(call)}")
    assert len(factories) > 20 and not bare, "\n".join(bare)


DEFAULTS = [(torch.float64, "cpu"), (torch.bfloat16, "cpu"), (torch.float16, "cpu"), (torch.float32, "meta")]


@pytest.fixture(params=DEFAULTS, ids=lambda pair: f"{pair[0]}-{pair[1]}".removeprefix("torch."))
def defaults(request):
    """Sets the defaults of the process when it is called, until the test ends."""
    def set_defaults():
        torch.set_default_dtype(request.param[0])
        torch.set_default_device(request.param[1])
    yield set_defaults
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def trained(session, net, batches, state, format, wire):
    """Two steps and what can be read of them."""
    session.bind(net)
    optimizer = orlop.AdamW(net.parameters(), lr=0.01, state=state, gradient_wire=wire)
    scaler = orlop.GradScaler("cpu", init_scale=8.0)
    for batch in batches:
        optimizer.zero_grad()
        scaler.scale(loss_of(net, batch)).backward()
        scaler.step(optimizer)
        scaler.update()
    optimizer.load_state_dict(optimizer.state_dict(full=True))
    optimizer.step()
    return [*net.parameters(), session.get("first.weight", "exp_avg"), optimizer.state[net.first.weight]["step"],
            optimizer.state_dict(full=True, format=format)["state"]]


def leaves(values):
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, (dict, list)):
            yield from leaves(value)
        elif isinstance(value, torch.Tensor):
            yield value.detach()


def assert_same(mine, other):
    for ours, theirs in zip(leaves(mine), leaves(other), strict=True):
        assert ours.device == theirs.device and ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("state, format, wire", [("8bit", "bitsandbytes", "int8"), ("4bit", "torch", None), ("fp32", "torch", "bf16")])
def test_defaults_of_the_process_change_no_bit_of_training(servers, make_net, batches, defaults, request, state, format, wire):
    ran = []
    for number in range(2):
        net, some = make_net(), [tuple(half.clone() for half in batch) for batch in batches[:2]]
        if number == 1:
            defaults()
        with orlop.connect(servers.address, job=f"{request.node.name}-{number}".replace("[", "-").replace("]", "")) as session:
            ran.append(trained(session, net, some, state, format, wire))
    assert_same(*ran)


@pytest.mark.parametrize("optimizer, state", [("adamw", "fp32"), ("adamw", "8bit"), ("adamw", "4bit"), ("adafactor", "fp32")])
def test_defaults_of_the_process_change_no_bit_of_the_kernels(defaults, optimizer, state):
    weights, gradient, found = torch.linspace(-1, 1, 1000).view(10, 100), torch.linspace(2, 1, 1000), []
    for number in range(2):
        if number == 1:
            defaults()
        shard = kernels.Shard(optimizer, weights, state=state)
        shard.step(gradient, {"lr": 0.1})
        found.append([shard.master(), *(shard.state(name) for name in kernels.optimizers()[optimizer]["states"])])
    assert_same(*found)


def test_counts_of_updates_do_not_end_at_256(job, defaults):
    weight = torch.nn.Parameter(torch.ones(300))
    optimizer = orlop.SGD([("weight", weight)], lr=0.1, session=job)
    weight.grad = torch.zeros_like(weight)
    defaults()
    for _ in range(258):
        optimizer.step()
    assert optimizer.state[weight]["step"] == 258 and optimizer.state_dict(full=True)["state"][0]["step"] == 258
    optimizer.load_state_dict(optimizer.state_dict(full=True))
    optimizer.step()
    assert optimizer.state[weight]["step"] == 259
