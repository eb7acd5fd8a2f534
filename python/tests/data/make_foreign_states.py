"""Makes foreign_states.safetensors with the real bitsandbytes and torchao: states after three steps, and the weights of a fourth.

    python make_foreign_states.py    # where both are installed; torchao compiles its step, so a C++ compiler too

Weights and gradients are functions of position and step (test_foreign_states.py has the same ones), so that only states are stored.
"""

import json
import pathlib
import sys

import bitsandbytes
import safetensors.torch
import torch
import torchao

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
from test_foreign_states import FIXTURES, KEPT, digest, gradient, parameters, start


def made(library, kind, arguments):
    weights = parameters()
    module = bitsandbytes.optim if library == "bitsandbytes" else torchao.optim
    optimizer = getattr(module, kind)(weights, **arguments)
    for step in range(3):
        for place, weight in enumerate(weights):
            weight.grad = gradient(place, step)
        optimizer.step()
    saved = optimizer.state_dict()
    decoded = {f"{place}.{slot}": digest(value) for place, weight in enumerate(weights)
               for slot, value in decode(library, optimizer.state[weight]).items()}
    states = flat(saved["state"])
    with torch.no_grad():
        for place, weight in enumerate(weights):
            weight.copy_(start(place))
            weight.grad = gradient(place, 3)
    optimizer.step()
    after = {f"after.{place}": weight.detach().reshape(-1)[:KEPT].clone() for place, weight in enumerate(weights)}
    groups = [{key: float(value) if isinstance(value, torch.Tensor) else value for key, value in group.items()}
              for group in saved["param_groups"]]
    return states | after, groups, decoded


def decode(library, state):
    """By the library's own functions."""
    if library == "torchao":
        return {slot: state[slot].dequantize() if hasattr(state[slot], "dequantize") else state[slot] for slot in ("exp_avg", "exp_avg_sq")}
    found = {}
    for number in (1, 2):
        codes = state.get(f"state{number}")
        if codes is not None and codes.dtype == torch.uint8:
            found[f"state{number}"] = bitsandbytes.functional.dequantize_blockwise(
                codes, absmax=state[f"absmax{number}"].flatten(), code=state[f"qmap{number}"], blocksize=256)
        elif codes is not None:
            found[f"state{number}"] = codes
    return found


def flat(states):
    """Every tensor by its path; plain numbers as tensors."""
    found = {}

    def walk(path, value):
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{path}.{key}", inner)
        elif hasattr(value, "tensor_attrs"):
            for name in value.tensor_attrs:
                walk(f"{path}.{name}", getattr(value, name))
        else:
            found[path] = value.clone() if isinstance(value, torch.Tensor) else torch.tensor(value)
    for number, state in states.items():
        walk(str(number), state)
    return found


if __name__ == "__main__":
    tensors, about = {}, {"versions": json.dumps({"bitsandbytes": bitsandbytes.__version__, "torchao": torchao.__version__,
                                                  "torch": torch.__version__})}
    for library, kind, arguments in FIXTURES:
        states, groups, decoded = made(library, kind, arguments)
        tensors |= {f"{library}.{kind}.{path}": tensor.contiguous() for path, tensor in states.items()}
        about[f"{library}.{kind}"] = json.dumps({"groups": groups, "decoded": decoded})
    safetensors.torch.save_file(tensors, pathlib.Path(__file__).parent / "foreign_states.safetensors", about)
