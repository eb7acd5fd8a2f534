"""State_dicts of other libraries: read with the code books they carry, and written so that those libraries load them.

A quantised value is ``book[code] * absmax`` in fp32. The stored book is used; none is ever assumed. If the servers keep a state in the
same form (bits, a multiple of their block, a book within 2 ulp of the closed form), its codes and scales are set bit for bit. Otherwise
the decoded values are set, in fp32 or requantised with the rounding of the group.

The libraries' Adam and torch's have the same moments.
"""

from __future__ import annotations

from typing import Any

import torch

from ..names import shape_of
from . import bitsandbytes, quantised, torchao
from .view import View

LIBRARIES = {"bitsandbytes": bitsandbytes, "torchao": torchao}
FORMATS = ("torch", *LIBRARIES)


def to_torch(view: View, state_dict: dict[str, Any]) -> dict[str, Any]:
    """A state_dict with torch's names of the states, from one of torch (returned unchanged), bitsandbytes or torchao.

    Parameters
    ----------
    view : View
        Of the optimizer that will load it. It is not changed.
    state_dict : dict
        From torch.optim, bitsandbytes (8 and 32 bit; wrapped or not) or torchao (its tensors, or mappings with ``codes``, ``scale``
        and ``qmap``).

    Returns
    -------
    dict
        Its states are :class:`quantised.Quantised` where the library's are quantised.

    Raises
    ------
    ValueError
        Something is not understood completely: unknown keys, books of another length than 256 or 16 or not ascending, scales that
        do not match the tensor or are not finite, shapes, states that the optimizer does not have. The message names tensor, value and
        limit.
    """
    groups = state_dict["param_groups"]
    parameters = _parameters(view, groups)
    state = {number: values for number, values in state_dict["state"].items() if number in parameters}
    library = next((library for library in LIBRARIES.values() if library.recognises(view, state, groups)), None)
    if library is not None:
        groups = [library.read_group(view, group) for group in groups]
    states = {}
    for number, (name, parameter) in parameters.items():
        values = state.get(number, {})
        states[number] = library.read_state(view, name, parameter, values) if library is not None and values else values
        _check_shapes(view, name, parameter, states[number])
    return state_dict if library is None else {"state": state_dict["state"] | states, "param_groups": groups}


def export(view: View, state_dict: dict[str, Any], format: str) -> dict[str, Any]:
    """The state of an optimizer as another library loads it.

    Parameters
    ----------
    view : View
        Of the optimizer.
    state_dict : dict
        Its plain state_dict, which gives groups and numbers.
    format : str
        ``"bitsandbytes"`` or ``"torchao"`` (Adam and AdamW; it must be installed, as its states are tensors of its own classes).

    Returns
    -------
    dict
        Quantised states are the servers' codes, scales and book, bit for bit. fp32 states stay fp32. Both libraries go on with either,
        whatever the parameter's size. 4-bit states are fp32 for bitsandbytes, which has none.

    Raises
    ------
    ValueError
        The library lacks something that the optimizer does (Nesterov, dampening, centered RMSprop, L2 decay with bitsandbytes' Adam),
        so it would go on with other numbers.
    """
    library = LIBRARIES[format]
    groups = [library.write_group(view, group) for group in state_dict["param_groups"]]
    state = {}
    stored = view.tensors() if view.job is not None else {}
    for number, parameter in enumerate(view.parameters):
        count = view.updates(parameter)
        if not view.trains(parameter) or count == 0:
            continue  # as before a parameter's first update
        tensor = stored[view.job.index_of(parameter)]
        values = {slot: quantised.read(view, tensor, slot) for slot in view.slots_of(parameter)}
        state[number] = library.write_state(view, parameter, int(count), values)
    return {"state": state, "param_groups": groups}


def _parameters(view: View, groups: list[dict[str, Any]]) -> dict[int, tuple[str, torch.Tensor]]:
    """Name and parameter by the number that `groups` give it."""
    found = {}
    for place, (own, group) in enumerate(zip(view.groups, groups)):
        given = own.get("param_names", ())
        for position, (parameter, number) in enumerate(zip(own["params"], group["params"])):
            fallback = given[position] if position < len(given) else f"parameter {position} of group {place}"
            found[number] = (view.names.get(id(parameter)) or fallback, parameter)
    return found


def _check_shapes(view: View, name: str, parameter: torch.Tensor, values: dict[str, Any]) -> None:
    for slot in view.slots_of(parameter):
        value, expected = values.get(slot), shape_of(slot, parameter.shape)
        if value is not None and list(value.shape) != expected:
            raise ValueError(f"{slot} of {name!r} has shape {list(value.shape)}; expected {expected}")
