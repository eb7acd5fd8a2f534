"""Optimizer state as dictionaries: plain values while the tensors stay on the servers, or torch's own format with all tensors.

This is the door of the folder: other folders import from here only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from .. import tensors
from ..errors import NotFound
from ..job.job import Part, digests, part
from ..names import box_of, shape_of, step_count
from . import foreign, quantised
from .foreign import to_torch
from .quantised import Quantised
from .view import Connection, View

__all__ = [
    "Connection", "View", "check_available", "check_sizes", "copied", "fits", "has_tensors", "keep_untrained", "parts", "replaces_states",
    "save", "set_counts", "to_torch", "without_tensors",
]

_TENSORS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", "square_avg", "grad_avg", "row_var", "col_var",
            "variance")  # states of torch's optimizers
KEY = "orlop"  # key of a state_dict; its value names the job and step that hold the tensors


def save(view: View, state_dict: dict[str, Any], full: bool, format: str = "torch") -> dict[str, Any]:
    """Completes torch's state_dict of an optimizer.

    Parameters
    ----------
    view : View
        Of the optimizer.
    state_dict : dict
        What torch made of it.
    full : bool
        Whether the tensors are read from the servers. Otherwise the dictionary has plain values only, and says where the tensors are.
    format : str
        One of :data:`foreign.FORMATS`.

    Returns
    -------
    dict

    Raises
    ------
    ValueError
        The format is unknown, or cannot express what this optimizer does.
    """
    if format not in foreign.FORMATS:
        raise ValueError(f"format={format!r}; {' or '.join(map(repr, foreign.FORMATS))}")
    if format != "torch":
        if not full:
            raise ValueError(f"format={format!r} has all tensors: it goes with full=True")
        return foreign.export(view, state_dict, format)
    state_dict[KEY] = _whereabouts(view)
    if full:
        state_dict[KEY] |= {"masters": _masters(view), "weights": _weights(view)}
    ours = {"step"} if full else {"step", *view.slots}  # plain values have no tensors of keep_untrained() either
    kept = {number: {name: value for name, value in state_dict["state"].get(number, {}).items() if name not in ours}
            for number in range(len(view.parameters))}  # what users and hooks put beside the states
    for number, parameter in enumerate(view.parameters):
        state = _full(view, parameter) if full else {"step": float(view.updates(parameter))}
        state_dict["state"][number] = kept[number] | state
    for group in state_dict["param_groups"]:
        group.update({key: value.item() for key, value in group.items() if isinstance(value, torch.Tensor)})
    if full:
        state_dict["state"] = {number: state for number, state in state_dict["state"].items() if state != {}}
    return state_dict


def has_tensors(view: View, state_dict: dict[str, Any]) -> bool:
    """Whether a state_dict has the optimizer's tensors, besides update counts and what users have put there."""
    return any(isinstance(state.get(slot), (torch.Tensor, Quantised)) for _, state in _states(view, state_dict) for slot in view.slots)


def replaces_states(view: View, state_dict: dict[str, Any]) -> bool:
    """Whether loading it changes what the servers hold. Otherwise it says that they hold its tensors (:func:`check_available`).

    A state of before the first step has no tensors and makes those of the servers new. A plain one of before the join says nothing of the
    job that an optimizer is going to join.
    """
    where = state_dict.get(KEY, {})
    is_new = "masters" in where or KEY not in state_dict or view.job is not None and where.get("step") is None
    return bool(view.slots) and (is_new or has_tensors(view, state_dict))


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """A copy with tensors of its own, since the optimizer that a state_dict came from may step before the servers have it."""
    state = {number: {name: value.clone() if isinstance(value, (torch.Tensor, Quantised)) else value
                      for name, value in values.items()}
             for number, values in state_dict["state"].items() if isinstance(values, dict)}
    own = state_dict.get(KEY, {})
    masters = {number: master.clone() for number, master in own.get("masters", {}).items()}
    return {"state": state, "param_groups": state_dict["param_groups"], KEY: own | {"masters": masters}}


def fits(view: View, state_dict: dict[str, Any], weight_of: Callable[[int], torch.Tensor]) -> bool:
    """Whether an optimizer's state belongs to the weights that `weight_of` gives by manifest index. The optimizer has joined.

    A state that was saved here names the digests of its weights. Another library's does not: it belongs to whatever weights it is loaded
    beside.
    """
    wanted = state_dict.get(KEY, {}).get("weights", {})
    return all(wanted.get(number) in (None, digests([weight_of(view.job.index_of(parameter))])[0])
               for number, parameter in _numbered(view, state_dict) if view.job.has(parameter))


def without_tensors(view: View, state_dict: dict[str, Any]) -> dict[str, Any]:
    """The part of a state_dict that torch's load_state_dict gets: groups, completed by this optimizer's own keys, update counts as they
    are now, and what users have put beside the states."""
    groups = [{**{key: value for key, value in own.items() if key != "params"}, **loaded}
              for own, loaded in zip(view.groups, state_dict["param_groups"])]
    state = dict(state_dict["state"])
    for (number, parameter), (_, loaded) in zip(_numbered(view, state_dict), _states(view, state_dict)):
        others = {name: value for name, value in loaded.items() if name != "step" and name not in view.slots}
        state[number] = {"step": view.updates(parameter), **others}
    return {"state": state, "param_groups": groups}


def check_sizes(view: View, state_dict: dict[str, Any]) -> None:
    """Raises ValueError if a state_dict has other numbers of groups or of their parameters than the optimizer."""
    own, loaded = ([len(group["params"]) for group in groups] for groups in (view.groups, state_dict["param_groups"]))
    if loaded != own:
        raise ValueError(f"loaded state dict has {len(loaded)} parameter groups of {loaded} parameters; this optimizer has {len(own)} of "
                         f"{own}")


def check_available(view: View, state_dict: dict[str, Any]) -> None:
    """Raises ValueError if a state_dict has no tensors and the servers do not hold the step that it names."""
    where = state_dict.get(KEY)
    if has_tensors(view, state_dict) or "masters" in (where or {}):  # a full state of before the first step has none
        return
    if where is None:
        if any(state.get(name) is not None for _, state in _states(view, state_dict) for name in ("step", *_TENSORS)):
            raise ValueError("this state_dict has neither an optimizer's tensors nor the name of an Orlop job")
        return
    if where["step"] is None:
        return
    session = view.find_session()
    try:
        status = session.client.job_status(session.job)
    except NotFound:
        jobs = ", ".join(job["job"] for job in session.client.list_jobs()) or "none"
        raise ValueError(f"the state of job {where['job']!r} at step {where['step']} is not here: these servers have no job "
                         f"{session.job!r}; jobs here: {jobs}") from None
    later = status["committed_step"] > where["step"] and _count_of_updates(view, state_dict) == sum(
        tensor["applied_count"] for tensor in session.client.list_tensors(session.job))  # steps that set buffers, as close() makes
    if where["job"] != session.job or status["committed_step"] != where["step"] and not later:
        offer = f", and a rollback to step {status['rollback_step']}" if "rollback_step" in status else ""
        raise ValueError(f"the state of job {where['job']!r} at step {where['step']} is not here: available is job {session.job!r} at step "
                         f"{status['committed_step']}{offer}. state_dict(full=True) makes copies that can be loaded anywhere")


def _count_of_updates(view: View, state_dict: dict[str, Any]) -> int:
    return sum(int(state.get("step", 0)) for _, state in _states(view, state_dict))


def parts(view: View, state_dict: dict[str, Any]) -> list[Part]:
    """The parts by which a LOAD step sets the loaded tensors, whose shapes :func:`to_torch` has checked. The optimizer has joined."""
    sent = []
    masters = state_dict.get(KEY, {}).get("masters", {})
    job, stored = view.job, view.tensors()
    for number, (parameter, state) in enumerate(_states(view, state_dict)):
        if not view.trains(parameter):
            continue
        index = job.index_of(parameter)
        if number in masters and _rounds_to(masters[number], parameter):
            box = job.entries[index].box
            sent.append(part(index, tensors.inside(masters[number], box), "master", box))
        count = _count(view, state)
        if count == 0 and stored[index]["applied_count"] == 0:
            continue  # torch's Adagrad begins with a sum that the servers add at the first update
        for slot in view.slots_of(parameter):
            value = state.get(slot)
            if tensors.is_distributed(value) and tensors.box(value) != job.entries[index].box:
                raise ValueError(f"{slot} of {job.entries[index].name!r} is a DTensor with placements {value.placements}, and its "
                                 "parameter has other ones: load its full_tensor()")
            if isinstance(value, Quantised):
                sent += quantised.parts(index, slot, value, count, stored[index])
                continue
            if value is None or count == 0:  # the state does not have it, so that what the servers have must go
                value = torch.zeros(shape_of(slot, parameter.shape), dtype=torch.float32, device="cpu")
            sent.append(part(index, value.float(), slot, box_of(slot, parameter.shape), count))
    return sent


def set_counts(view: View, state_dict: dict[str, Any]) -> None:
    """Sets the update counts of the loaded state, once the servers have it."""
    for parameter, state in _states(view, state_dict):
        view.state[parameter]["step"] = step_count(_count(view, state))


def keep_untrained(view: View, state_dict: dict[str, Any]) -> None:
    """Keeps the loaded tensors of parameters that were frozen when the job was joined, so that a full state_dict has them.

    The servers have no states of these parameters. Quantised ones are kept as their values.
    """
    for parameter, state in _states(view, state_dict):
        if not view.trains(parameter):
            loaded = {slot: state.get(slot) for slot in view.slots}
            view.state[parameter] |= {slot: value.float() if isinstance(value, Quantised) else value for slot, value in loaded.items()
                                      if isinstance(value, (torch.Tensor, Quantised))}


def _count(view: View, state: dict[str, Any]) -> int:
    """Updates that a loaded state has seen."""
    if all(state.get(slot) is None for slot in view.slots):
        return 0
    return int(state.get("step", 1))  # torch's SGD keeps no count; its first update is the only one that differs


def _states(view: View, state_dict: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    return [(parameter, state_dict["state"].get(number, {})) for number, parameter in _numbered(view, state_dict)]


def _numbered(view: View, state_dict: dict[str, Any]) -> list[tuple[int, torch.Tensor]]:
    """The optimizer's parameters with the numbers that a state_dict gives them."""
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    return list(zip(numbers, view.parameters))


def _whereabouts(view: View) -> dict[str, Any]:
    if view.job is None:
        return {"job": None, "step": None, "arithmetic_version": None}
    version = view.find_session().client.server_status()["arithmetic_version"]
    return {"job": view.job.name, "step": view.job.step, "arithmetic_version": version}


def _masters(view: View) -> dict[int, torch.Tensor]:
    """The fp32 masters of parameters in half precision, by position. With them a copy steps on with the same bits."""
    masters = {}
    for number, parameter in enumerate(view.parameters):
        if view.trains(parameter) and parameter.dtype != torch.float32:
            masters[number] = view.find_session().get(view.name_in_job(parameter), "master")
    return masters


def _weights(view: View) -> dict[int, str]:
    """The digests of the weights that the state belongs to, by position. Of a DTensor only a part is here."""
    plain = {number: parameter for number, parameter in enumerate(view.parameters)
             if view.job is not None and view.job.has(parameter) and not tensors.is_distributed(parameter)}
    return dict(zip(plain, digests(list(plain.values()))))


def _rounds_to(master: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether `master` belongs to these weights: the servers round it to `parameter`."""
    if master.shape != parameter.shape or parameter.dtype == torch.float32:
        return False
    master, weights = tensors.inside(master, tensors.box(parameter)).reshape(-1), tensors.host(parameter)
    if parameter.dtype == torch.float16:
        return torch.equal(master.half(), weights)
    rounded = (master.contiguous().view(torch.int32) + 0x8000) >> 16  # half away from zero, as remainders are made
    return torch.equal(rounded.to(torch.int16), weights.view(torch.int16))


def _full(view: View, parameter: torch.Tensor) -> dict[str, Any]:
    count = view.updates(parameter)
    if any(slot in view.state.get(parameter, {}) for slot in view.slots):  # keep_untrained() did it
        return {"step": count.clone()}
    if not view.trains(parameter) or count == 0:
        return view.state_before_first_update(parameter)
    name, session = view.name_in_job(parameter), view.find_session()
    return {"step": count.clone(), **{slot: session.get(name, slot) for slot in view.slots_of(parameter)}}
