"""Optimizer state as dictionaries: plain values while the tensors stay on the servers, or torch's own format in full."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .. import names
from ..errors import NotFound
from ..job.job import TrainingJob
from ..job.wire import Part, part
from ..options import OPTIONS
from . import foreign

if TYPE_CHECKING:
    from ..optim.optimizer import Optimizer

KEY = "orlop"  # of a state_dict: where its tensors are


def save(optimizer: Optimizer, state_dict: dict[str, Any], full: bool, format: str = "torch") -> dict[str, Any]:
    """torch's state_dict of `optimizer`, with plain values for tensors, or with all tensors of the servers; or another library's."""
    if format not in foreign.FORMATS:
        raise ValueError(f"format={format!r}; {' or '.join(map(repr, foreign.FORMATS))}")
    if format != "torch":
        if not full:
            raise ValueError(f"format={format!r} has all tensors: it goes with full=True")
        return foreign.export(optimizer, state_dict, format)
    state_dict[KEY] = _whereabouts(optimizer)
    if full:
        state_dict[KEY]["masters"] = _masters(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state_dict["state"] = {number: {"step": float(optimizer.state[p]["step"])} for number, p in enumerate(parameters)}
    for group in state_dict["param_groups"]:
        group.update({key: value.item() for key, value in group.items() if isinstance(value, torch.Tensor)})
    if full:
        for number, parameter in enumerate(parameters):
            state_dict["state"][number] = _full(optimizer, parameter)
        state_dict["state"] = {number: state for number, state in state_dict["state"].items() if state}
    return state_dict


def has_tensors(state_dict: dict[str, Any]) -> bool:
    return any(isinstance(value, (torch.Tensor, foreign.Quantised)) and name != "step"
               for state in state_dict["state"].values() for name, value in state.items())


def copied(state_dict: dict[str, Any]) -> dict[str, Any]:
    """Its state with tensors of its own: the optimizer it came from may step on before the servers take it."""
    state = {number: {name: value.clone() if isinstance(value, (torch.Tensor, foreign.Quantised)) else value
                      for name, value in values.items()}
             for number, values in state_dict["state"].items()}
    masters = {number: master.clone() for number, master in state_dict.get(KEY, {}).get("masters", {}).items()}
    return {"state": state, "param_groups": state_dict["param_groups"], KEY: {"masters": masters}}


def without_tensors(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    """What torch's load_state_dict may keep: groups, completed by this optimizer's own keys, and update counts as they are now."""
    groups = [{**{key: value for key, value in own.items() if key != "params"}, **loaded}
              for own, loaded in zip(optimizer.param_groups, state_dict["param_groups"])]
    if len(groups) < len(state_dict["param_groups"]):
        groups = state_dict["param_groups"]  # torch says what is wrong
    for group in groups:
        for option, words in OPTIONS.items():
            group.setdefault(option, words[0])
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    counts = {number: {"step": optimizer.state[p]["step"]} for number, p in zip(numbers, parameters)}
    return {"state": counts, "param_groups": groups}


def check_available(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """ValueError unless the servers hold the step that a plain state_dict speaks of."""
    where = state_dict.get(KEY)
    if has_tensors(state_dict):
        return
    if where is None:
        if any(state_dict["state"].values()):
            raise ValueError("this state_dict has neither an optimizer's tensors nor the name of an Orlop job")
        return
    if where["step"] is None:
        return
    session = optimizer.session
    try:
        status = session.client.job_status(session.job)
    except NotFound:
        raise ValueError(f"the state of job {where['job']!r} at step {where['step']} is not here: these servers have no job {session.job!r}; "
                         f"jobs here: {', '.join(job['job'] for job in session.client.list_jobs()) or 'none'}") from None
    later = status["committed_step"] > where["step"] and _count_of_updates(state_dict) == sum(
        tensor["applied_count"] for tensor in session.client.list_tensors(session.job))  # steps that set buffers, as close() makes
    if where["job"] != session.job or status["committed_step"] != where["step"] and not later:
        offer = f", and a rollback to step {status['rollback_step']}" if "rollback_step" in status else ""
        raise ValueError(f"the state of job {where['job']!r} at step {where['step']} is not here: available is job {session.job!r} at step "
                         f"{status['committed_step']}{offer}. state_dict(full=True) makes copies that can be loaded anywhere")


def _count_of_updates(state_dict: dict[str, Any]) -> int:
    return sum(int(state.get("step", 0)) for state in state_dict["state"].values())


def parts(optimizer: Optimizer, job: TrainingJob, state_dict: dict[str, Any]) -> list[Part]:
    """The loaded tensors as a LOAD step sends them."""
    sent = []
    masters = state_dict.get(KEY, {}).get("masters", {})
    stored = {tensor["index"]: tensor for tensor in optimizer.session.client.list_tensors(job.core.job)}
    for number, (parameter, state) in enumerate(_states(optimizer, state_dict)):
        if id(parameter) not in job.index_of or not parameter.requires_grad:
            continue
        index = job.index_of[id(parameter)]
        if number in masters and _rounds_to(masters[number], parameter):
            sent.append(part(index, masters[number], "master"))
        for slot in optimizer.slots_of(parameter):
            value = state.get(slot)
            if value is None:
                continue
            shape = names.shape_of(slot, parameter.shape)
            if list(value.shape) != shape:
                raise ValueError(f"{slot} of {job.entries[index].name!r} has shape {list(value.shape)}; expected {shape}")
            if isinstance(value, foreign.Quantised):
                sent += foreign.parts(job, index, slot, value, _count(state), stored[index])
                continue
            if _count(state) == 0:  # before its first update; torch's Adagrad begins with a sum that the servers add with the first one
                value = torch.zeros_like(value)
            sent.append(part(index, value.float(), slot, names.box_of(slot, parameter.shape), _count(state)))
    return sent


def set_counts(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Update counts of the loaded state, once the servers have it."""
    for parameter, state in _states(optimizer, state_dict):
        if any(state.get(slot) is not None for slot in optimizer.slots):
            optimizer.state[parameter]["step"] = torch.tensor(float(_count(state)))


def _count(state: dict[str, Any]) -> int:
    return int(state.get("step", 1))  # torch's SGD keeps no count; its first update is the only one that differs


def _states(optimizer: Optimizer, state_dict: dict[str, Any]) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return [(parameter, state_dict["state"].get(number, {})) for number, parameter in zip(numbers, parameters)]


def _whereabouts(optimizer: Optimizer) -> dict[str, Any]:
    if optimizer._job is None:
        return {"job": None, "step": None, "arithmetic_version": None}
    core = optimizer._job.core
    version = optimizer.session.client.server_status()["arithmetic_version"]
    return {"job": core.job, "step": optimizer._job.step, "arithmetic_version": version}


def _masters(optimizer: Optimizer) -> dict[int, torch.Tensor]:
    """What the parameters of a half precision were rounded from, by position: with it, a copy steps on with the same bits."""
    masters = {}
    for number, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        if optimizer._job is not None and parameter.requires_grad and parameter.dtype != torch.float32 and parameter.numel():
            name = optimizer._job.entries[optimizer._job.index_of[id(parameter)]].name
            masters[number] = optimizer.session.get(name, "master")
    return masters


def _rounds_to(master: torch.Tensor, parameter: torch.Tensor) -> bool:
    """Whether the servers round `master` to `parameter`, so that it is the master of these weights and not of others."""
    if master.shape != parameter.shape or parameter.dtype == torch.float32:
        return False
    if parameter.dtype == torch.float16:
        return torch.equal(master.half(), parameter.detach().cpu())
    rounded = (master.contiguous().view(torch.int32) + 0x8000) >> 16  # half away from zero, as remainders are made
    return torch.equal(rounded.to(torch.int16), parameter.detach().cpu().contiguous().view(torch.int16))


def _full(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    count = optimizer.state[parameter]["step"]
    if optimizer._job is None or not parameter.requires_grad or count == 0:
        return optimizer._state_before_first_update(parameter)
    name = optimizer._job.entries[optimizer._job.index_of[id(parameter)]].name
    return {"step": count.clone(), **{slot: optimizer.session.get(name, slot) for slot in optimizer.slots_of(parameter)}}
