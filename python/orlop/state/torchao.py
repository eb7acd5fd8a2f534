"""Optimizer states of torchao: 8 bit, 4 bit and fp8.

Source: torchao 0.18, ``optim/subclass_*.py`` and ``optim/adam.py``. It has Adam and AdamW, with torch's decay.
"""

from __future__ import annotations

from typing import Any

import torch

from ..names import step_count
from .quantised import Quantised, check_book, checked, packed, update_count
from .view import View

_MOMENTS = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}


def recognises(view: View, state: dict[int, Any], groups: list[dict[str, Any]]) -> bool:
    """Whether a state_dict with this ``state`` and these ``param_groups`` is torchao's."""
    return any(_is_tensor(value) for values in state.values() for value in values.values())


def read_group(view: View, group: dict[str, Any]) -> dict[str, Any]:
    """A group with this optimizer's keys, from one of torchao, whose learning rate is a tensor."""
    return {**group, "lr": float(group["lr"])}


def read_state(view: View, name: str, parameter: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """A parameter's states by this optimizer's names: fp32 tensors, or :class:`Quantised`. ValueError if something is not understood."""
    unknown = [key for key in values if key != "step" and key not in _MOMENTS]
    if unknown or "max_exp_avg_sq" in values:
        raise ValueError(f"not taken from the torchao state of {name!r}: {', '.join(unknown) or 'max_exp_avg_sq (amsgrad)'}; "
                         "step, exp_avg and exp_avg_sq are")
    read: dict[str, Any] = {"step": update_count(name, values)}
    for slot in ("exp_avg", "exp_avg_sq"):
        if slot not in values or slot not in view.slots:
            raise ValueError(f"torchao's state of {name!r} has {', '.join(values)}; orlop.{view.kind} has "
                             f"{', '.join(view.slots)}, and both need {slot}")
        value = values[slot]
        read[slot] = _state(name, slot, parameter, value) if _is_tensor(value) else value
    return read


def write_group(view: View, group: dict[str, Any]) -> dict[str, Any]:
    """A group with torchao's keys. ValueError if torchao has no such optimizer."""
    if set(view.slots) != {"exp_avg", "exp_avg_sq"}:
        raise ValueError(f"torchao has Adam and AdamW; not {view.kind}")
    written = {key: group[key] for key in ("params", "param_names", "initial_lr", "betas", "eps", "weight_decay") if key in group}
    rate = torch.tensor(float(group["lr"]), dtype=torch.float32, device="cpu")  # torchao's step does not accept a float
    return written | {"lr": rate, "amsgrad": False}


def write_state(view: View, parameter: torch.Tensor, count: int, values: dict[str, Any]) -> dict[str, Any]:
    """A parameter's states as tensors of torchao's classes. ImportError if torchao is not installed."""
    return {"step": step_count(count), **{slot: _tensor(value, parameter, slot) for slot, value in values.items()}}


def _state(name: str, slot: str, parameter: torch.Tensor, value: Any) -> Any:
    codes, scale, book = (_field(value, field) for field in ("codes", "scale", "qmap"))
    shape = parameter.shape
    if codes.dtype == torch.float8_e4m3fn:
        if scale.dim() != 1 or not scale.numel() or codes.numel() % scale.numel():
            raise ValueError(f"scales of {slot} of {name!r} have shape {list(scale.shape)}; a number that divides {codes.numel()} elements")
        return (codes.cpu().float().view(scale.numel(), -1) * scale.cpu().float().view(-1, 1)).view(codes.shape)
    if codes.dtype != torch.uint8 or book is None:
        raise ValueError(f"{slot} of {name!r} has codes of {codes.dtype} and {'a' if book is not None else 'no'} qmap; uint8 with a qmap, "
                         "or float8_e4m3fn")
    check_book(name, slot, book)
    if book.numel() == 16:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).reshape(-1)  # torchao packs the first of a pair into the high bits
        if codes.numel() != shape.numel():
            raise ValueError(f"{slot} of {name!r} has {codes.numel()} codes; expected {shape.numel()}, of shape {list(shape)}")
        codes = codes.view(shape)
    block = codes.numel() // scale.numel() if scale.numel() else 0
    if not block or codes.numel() % scale.numel():
        raise ValueError(f"scales of {slot} of {name!r} have shape {list(scale.shape)}; a number that divides {codes.numel()} elements")
    return checked(name, slot, codes, scale, book, (block,))


def _tensor(value: Any, parameter: torch.Tensor, slot: str) -> torch.Tensor:
    """One state for torchao. It stays fp32 where torchao's own optimizers would not quantise it, since torchao has whole blocks only."""
    if not isinstance(value, Quantised) or value.codes.numel() % value.block:
        return value.float()
    try:
        from torchao.optim.subclass_4bit import OptimState4bit
        from torchao.optim.subclass_8bit import OptimState8bit
    except ImportError as error:
        raise ImportError("a torchao state_dict has tensors of torchao's own classes: install torchao to make one") from error
    is_signed = slot == "exp_avg"
    if value.state == "8bit":
        return OptimState8bit(value.codes, value.absmax, value.book, is_signed, dtype=parameter.dtype)
    codes = packed(value.codes.reshape(-1), first_is_low=False)
    return OptimState4bit(codes, value.absmax, value.book, is_signed, value.shape, dtype=parameter.dtype)


def _is_tensor(value: Any) -> bool:
    """Whether it is a tensor of torchao, or a mapping with the fields of one. torchao is not imported."""
    return _field(value, "codes") is not None and _field(value, "scale") is not None


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)
