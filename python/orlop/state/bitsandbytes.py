"""Optimizer states of bitsandbytes, 8 and 32 bit.

bitsandbytes' Adam decouples the weight decay; torch's adds it to the gradient. On CUDA bitsandbytes decays after the update, and its
RMSprop and Adagrad keep the second moment in the signed code book.

Source: bitsandbytes 0.50.2, ``optim/optimizer.py``.
"""

from __future__ import annotations

from typing import Any

import torch

from .quantised import Quantised, checked, update_count
from .view import View

_WRAPPER = "__bnb_optimizer_quant_state__"  # the key around the tensors since 0.49.2
_BLOCKS = (256, 2048)  # 2048 before 0.44.0
_STATE = ("step", "state1", "state2", "absmax1", "absmax2", "qmap1", "qmap2", "unorm_vec", "gnorm_vec")
_WHOLE_TENSOR = ("max1", "max2", "new_max1", "new_max2")  # of block_wise=False, which 0.50.0 removed


def recognises(view: View, state: dict[int, Any], groups: list[dict[str, Any]]) -> bool:
    """Whether a state_dict with this ``state`` and these ``param_groups`` is bitsandbytes'."""
    if any(state.values()):
        return any(_WRAPPER in values or "state1" in values for values in state.values())
    return any("t_alpha" in group or "betas" in group and "betas" not in own
               for own, group in zip(view.groups, groups))


def read_group(view: View, group: dict[str, Any]) -> dict[str, Any]:
    """A group with this optimizer's keys, from one of bitsandbytes. ValueError if the optimizer would go on with other numbers."""
    kind = view.kind
    kept = {key: value for key, value in group.items() if key not in ("betas", "eps", "alpha", "t_alpha", "t_beta3")}
    if kind in ("AdamW", "Adam", "AdEMAMix"):
        kept |= {"betas": tuple(group["betas"])[:3 if kind == "AdEMAMix" else 2], "eps": group["eps"]}
    if kind == "Adam" and group["weight_decay"] and not view.groups[0]["decoupled_weight_decay"]:
        raise ValueError(f"bitsandbytes' Adam decays weights decoupled (weight_decay={group['weight_decay']}), this one adds it to the "
                         "gradient: load into orlop.AdamW, or set decoupled_weight_decay=True")
    if kind == "AdEMAMix":
        if group["t_alpha"] != group["t_beta3"]:
            raise ValueError(f"t_alpha={group['t_alpha']} and t_beta3={group['t_beta3']} differ; orlop.AdEMAMix has one T for both")
        kept |= {"alpha": group["alpha"], "T": group["t_alpha"] or 0}
    if kind == "Lion":
        kept["betas"] = tuple(group["betas"])
    if kind == "SGD":
        kept |= {"momentum": group["betas"][0], "dampening": 0}  # bitsandbytes has the argument, and its kernels ignore it
    if kind == "RMSprop":
        kept |= {"alpha": group["betas"][0], "eps": group["eps"]}
    if kind == "Adagrad":
        kept["eps"] = group["eps"]
    return kept


def read_state(view: View, name: str, parameter: torch.Tensor, values: dict[str, Any]) -> dict[str, Any]:
    """A parameter's states by this optimizer's names: fp32 tensors, or :class:`Quantised`. ValueError if something is not understood."""
    values = {**{key: value for key, value in values.items() if key != _WRAPPER}, **values.get(_WRAPPER, {})}
    if old := [key for key in _WHOLE_TENSOR if key in values]:
        raise ValueError(f"{', '.join(old)} of {name!r}: states scaled by whole tensors (bitsandbytes before 0.50, block_wise=False) are "
                         "not taken; block-wise ones are")
    if unknown := [key for key in values if key not in _STATE]:
        raise ValueError(f"unknown in the bitsandbytes state of {name!r}: {', '.join(map(str, unknown))}; known: {', '.join(_STATE)}")
    slots = slots_in(view)
    if len(slots) < 2 and "state2" in values:
        raise ValueError(f"{name!r} has state2; orlop.{view.kind} has one state, {slots[0][0]}")
    read: dict[str, Any] = {"step": update_count(name, values)}
    for number, names in enumerate(slots, start=1):
        state = _states(name, number, values, stacked=len(names) > 1)
        if len(names) > 1 and len(state) != len(names):
            raise ValueError(f"state{number} of {name!r} has {len(state)} states stacked; expected {len(names)}, {', '.join(names)}")
        read.update(zip(names, state))
    return read


def write_group(view: View, group: dict[str, Any]) -> dict[str, Any]:
    """A group with bitsandbytes' keys. ValueError if bitsandbytes would go on with other numbers."""
    kind = view.kind
    slots_in(view)
    for key in ("nesterov", "dampening", "lr_decay"):
        if group.get(key):
            raise ValueError(f"{key}={group[key]}: bitsandbytes' {kind} has none, and would go on with other numbers")
    if kind == "Adam" and group["weight_decay"] and not group["decoupled_weight_decay"]:
        raise ValueError(f"weight_decay={group['weight_decay']} is added to the gradient here; bitsandbytes' Adam decays decoupled")
    betas = {"SGD": lambda: (group["momentum"], 0.0), "RMSprop": lambda: (group["alpha"], 0.0), "Adagrad": lambda: (0.0, 0.0)}
    written = {key: group[key] for key in ("params", "param_names", "initial_lr", "weight_decay") if key in group}
    written |= {"lr": float(group["lr"]), "eps": group.get("eps", 0.0), "betas": tuple(betas.get(kind, lambda: group["betas"])())}
    if len(view.slots) > 1:
        warm_up = group.get("T") or None
        written |= {"alpha": group.get("alpha", 0.0), "t_alpha": warm_up, "t_beta3": warm_up}
    return written


def write_state(view: View, parameter: torch.Tensor, count: int, values: dict[str, Any]) -> dict[str, Any]:
    """A parameter's states with bitsandbytes' keys, without the wrapper, as every version accepts them. 4-bit states become fp32."""
    written: dict[str, Any] = {"step": count}
    for number, names in enumerate(slots_in(view), start=1):
        states = [values[name] for name in names]
        if isinstance(states[0], Quantised) and states[0].state == "8bit":
            written |= {f"state{number}": _stacked([state.codes for state in states]), f"qmap{number}": states[0].book,
                        f"absmax{number}": _stacked([state.absmax for state in states])}
        else:
            written[f"state{number}"] = _stacked([state.float() for state in states])
    return written


def _states(name: str, number: int, values: dict[str, Any], stacked: bool) -> list[Any]:
    """Reads ``state<number>``: one state, or several that are stacked along its first dimension."""
    what = f"state{number}"
    state = values.get(what)
    if state is None:
        raise ValueError(f"{what} of {name!r} is missing; there are {', '.join(values)}")
    if state.dtype == torch.float32:
        return list(state) if stacked else [state]
    if state.dtype != torch.uint8:
        raise ValueError(f"{what} of {name!r} is {state.dtype}; float32, or uint8 codes")
    absmax, book = values.get(f"absmax{number}"), values.get(f"qmap{number}")
    if absmax is None or book is None:
        raise ValueError(f"{what} of {name!r} has codes but no {'absmax' if absmax is None else 'qmap'}{number}: a book is never assumed")
    if book.numel() != 256:
        raise ValueError(f"the code book of {what} of {name!r} is {book.dtype} {list(book.shape)}; float32 with 256 entries")
    if not stacked:
        return [checked(name, what, state, absmax, book, _BLOCKS)]
    if absmax.dim() != 2 or len(absmax) != len(state):
        raise ValueError(f"scales of {what} of {name!r} have shape {list(absmax.shape)}; {len(state)} rows expected")
    return [checked(name, what, codes, scales, book, _BLOCKS) for codes, scales in zip(state, absmax)]


def slots_in(view: View) -> tuple[tuple[str, ...], ...]:
    """The names of the states in ``state1`` and, if there is one, in ``state2``. AdEMAMix stacks two states in the first."""
    slots = view.slots
    if slots == ("exp_avg", "exp_avg_slow", "exp_avg_sq"):
        return slots[:2], slots[2:]
    if len(slots) > 2:
        raise ValueError(f"bitsandbytes' {view.kind} keeps neither momentum nor a mean gradient; this optimizer has {slots}")
    return tuple((slot,) for slot in slots)


def _stacked(tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors)
