"""Parameter groups: how an optimizer's arguments become their defaults, and which tensors of a job they train."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, SupportsFloat

import torch

from .. import tensors
from ..job.job import TrainingJob
from ..names import PARAMETER_DTYPES, Entry, of_groups, of_model
from ..options import OPTIONS

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, torch.Tensor]]

FIXED = (*OPTIONS, "decoupled_weight_decay", "part")  # options of a group that choose what the servers hold, from the join on

_WORDS = {"lr": "learning rate", "eps": "epsilon value", "weight_decay": "weight_decay value", "momentum": "momentum value",
          "lr_decay": "lr_decay value", "initial_accumulator_value": "initial_accumulator_value value"}
_BETAS = {f"beta{place + 1}": f"beta parameter at index {place}" for place in range(3)} | {"alpha": "alpha value"}


def arguments(given: dict[str, Any]) -> dict[str, Any]:
    """The defaults of an optimizer's groups, from the ``locals()`` of its constructor: every argument but `params` and `options`.

    ``foreach`` and ``fused``, which choose among torch's implementations, are accepted and become None.

    Examples
    --------
    >>> arguments({"self": 0, "params": [], "lr": 0.1, "foreach": True, "options": {}})
    {'lr': 0.1, 'foreach': None}
    """
    kept = {name: value for name, value in given.items() if name not in ("self", "__class__", "params", "options")}
    return kept | {name: None for name in ("foreach", "fused") if name in kept}


def number(value: SupportsFloat, name: str) -> float:
    """A hyper-parameter as a float.

    Raises
    ------
    TypeError
        It is no number, e.g. the text ``"1e-3"`` of a configuration file.
    ValueError
        It is a tensor of several elements.

    Examples
    --------
    >>> number(torch.tensor([0.5]), "lr")
    0.5
    """
    if isinstance(value, torch.Tensor) and value.numel() != 1:
        raise ValueError(f"Tensor {name} must be 1-element, not of shape {list(value.shape)}")
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}={value!r} is of type {type(value).__name__}; a number")
    return float(value)


def numbers(group: dict[str, Any], names: Iterable[str], betas: int = 2) -> dict[str, float]:
    """These options of a group as floats. ``betas``, of which there must be so many, become ``beta1``, ``beta2``, and so on.

    Examples
    --------
    >>> numbers({"lr": 1, "betas": (0.9, 0.99)}, ("lr", "betas"))
    {'lr': 1.0, 'beta1': 0.9, 'beta2': 0.99}
    """
    found = {}
    for name in names:
        if name == "betas":
            if len(group["betas"]) != betas:
                raise ValueError(f"Invalid betas: {group['betas']}; exactly {betas} values")
            found |= {f"beta{place + 1}": number(beta, f"betas[{place}]") for place, beta in enumerate(group["betas"])}
        else:
            found[name] = number(group[name], name)
    return found


def check_numbers(values: dict[str, float]) -> None:
    """ValueError unless every hyper-parameter is finite and at least 0, and the decays of averages are below 1."""
    for name, value in values.items():
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"Invalid {_WORDS.get(name, name)}: {value}; finite and at least 0")
        if name in _BETAS and value >= 1:
            raise ValueError(f"Invalid {_BETAS[name]}: {value}; below 1")


def check_options(group: dict[str, Any], kind: str) -> None:
    """ValueError if a group of an optimizer called `kind` asks for what the servers do not have, or has an unknown word for an option."""
    for flag in ("amsgrad", "maximize", "differentiable", "capturable"):
        if group.get(flag):
            raise ValueError(f"{flag}={group[flag]} is not offered by orlop.{kind}")
    for option, words in OPTIONS.items():
        if group[option] not in words:
            raise ValueError(f"{option}={group[option]!r}; {' or '.join(map(repr, words))}")


def check_real(group: dict[str, Any], kind: str) -> None:
    """RuntimeError, as torch's, if a parameter is complex. A group of a state_dict has numbers in place of parameters."""
    if any(isinstance(parameter, torch.Tensor) and parameter.is_complex() for parameter in group["params"]):
        raise RuntimeError(f"{kind} does not support complex parameters")


def entries_of(model: torch.nn.Module | None, param_groups: list[dict[str, Any]],
               needs_whole: Callable[[dict[str, Any]], bool], store_frozen: bool) -> list[Entry]:
    """The tensors of the job that an optimizer joins: the bound model's, or else those of its groups.

    Parameters
    ----------
    model : torch.nn.Module or None
    param_groups : list of dict
    needs_whole : callable
        Whether the tensors of a group must each be on one server.
    store_frozen : bool
        Whether frozen parameters are stored with the others.

    Raises
    ------
    ValueError
        A parameter of a group has no name, or the servers cannot hold it.
    """
    entries = of_model(model) if model is not None else of_groups(param_groups)
    _check_named(model, param_groups, entries)
    given = {id(p) for group in param_groups for p in group["params"]}
    whole = {id(p) for group in param_groups if needs_whole(group) for p in group["params"] if p.requires_grad}
    for entry in entries:
        entry.is_whole = id(entry.tensor) in whole
        entry.stays = not (store_frozen or entry.is_buffer or id(entry.tensor) in given or entry.tensor.requires_grad)
    return entries


def is_averaged_by_ddp(model: torch.nn.Module | None, param_groups: list[dict[str, Any]]) -> bool:
    """Whether DistributedDataParallel averages the gradients, as the bound model or else the parameters' names show."""
    if model is not None:
        return isinstance(model, torch.nn.parallel.DistributedDataParallel)
    return param_groups[0].get("param_names", [""])[0].startswith("module.")


def stays_here(parameter: torch.Tensor) -> bool:
    """Whether the job has no tensor for a parameter of a group, since it has no elements or is frozen and of a kind that servers do not
    hold."""
    if tensors.fault(parameter, PARAMETER_DTYPES) is not None:
        return not parameter.requires_grad
    return parameter.numel() == 0


def _check_named(model: torch.nn.Module | None, param_groups: list[dict[str, Any]], entries: list[Entry]) -> None:
    known = {id(entry.tensor) for entry in entries}
    for number, group in enumerate(param_groups):
        for position, parameter in enumerate(group["params"]):
            if id(parameter) in known or stays_here(parameter):
                continue
            reason = tensors.fault(parameter, PARAMETER_DTYPES)
            if reason is not None:
                raise ValueError(f"parameter {position} of group {number} is {reason}")
            if model is None:
                raise ValueError(
                    f"parameter {position} of group {number} (shape {list(parameter.shape)}) has no name: call session.bind(model) "
                    "with the model it belongs to, or give the optimizer model.named_parameters()")
            raise ValueError(
                f"parameter {position} of group {number} (shape {list(parameter.shape)}) has no name in the bound model: make the "
                "optimizer from the parameters of that model, after fully_shard has replaced them. Flat partitions "
                "(FullyShardedDataParallel, DeepSpeed ZeRO) have no names: use torch.distributed.fsdp.fully_shard")


class Members:
    """The parameters of an optimizer's groups among the tensors of a job, as they were when the job was joined.

    Parameters
    ----------
    param_groups : list of dict
        Empty before the optimizer has joined.
    job : TrainingJob or None

    Attributes
    ----------
    trained : dict of int to torch.Tensor
        Parameters that require a gradient, or that an earlier optimizer of this session trained, by manifest index, ascending.
    """

    def __init__(self, param_groups: list[dict[str, Any]], job: TrainingJob | None) -> None:
        trained: dict[int, torch.Tensor] = {}
        self._job = job
        self._frozen: dict[int, tuple[str, torch.Tensor]] = {}  # name and parameter by its id
        self._fixed: dict[int, dict[str, Any]] = {}  # options that choose what the servers hold, by manifest index
        for number, group in enumerate(param_groups):
            in_group = {job.index_of(p): p for p in group["params"] if p.numel() and (p.requires_grad or job.trains(p))}
            trained |= in_group
            self._fixed |= dict.fromkeys(in_group, {option: group[option] for option in FIXED if option in group})
            for position, parameter in enumerate(group["params"]):
                if not parameter.requires_grad and not job.trains(parameter):
                    name = job.entries[job.index_of(parameter)].name if job.has(parameter) else f"{position} of group {number}"
                    self._frozen[id(parameter)] = name, parameter
        self.trained = dict(sorted(trained.items()))

    def groups(self, param_groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], list[int]]]:
        """The groups that have trained parameters, with the manifest indexes of these.

        Raises
        ------
        ValueError
            An option that chooses what the servers hold of a parameter has changed since the job was joined, or a parameter is there twice.
        RuntimeError
            A parameter has come to the groups or has left them since then.
        """
        groups, absent = [], set(self.trained)
        for place, group in enumerate(param_groups):
            indexes = []
            for position, parameter in enumerate(group["params"]):
                if not parameter.numel() or id(parameter) in self._frozen:
                    continue
                index = self._job.index_of(parameter) if self._job.has(parameter) else None
                if index not in self.trained:
                    raise RuntimeError(f"parameter {position} of group {place} (shape {list(parameter.shape)}) came to the groups after "
                                       f"job {self._job.name!r} was joined, whose parameters are fixed: add it before the first step")
                if index not in absent:
                    raise ValueError(f"parameter {self._job.entries[index].name!r} is twice in the groups: torch would update it twice "
                                     "in a step, the servers once")
                self._check_fixed(index, group)
                absent.remove(index)
                indexes.append(index)
            if indexes:
                groups.append((group, indexes))
        for index in absent:
            raise RuntimeError(f"parameter {self._job.entries[index].name!r} is in no group any more, but the servers train it: leave it "
                               "in a group and set its .grad to None")
        return groups

    def _check_fixed(self, index: int, group: dict[str, Any]) -> None:
        for option, joined in self._fixed[index].items():
            if group.get(option) != joined:
                raise ValueError(f"{option}={group.get(option)!r} of parameter {self._job.entries[index].name!r}: job {self._job.name!r} "
                                 f"was joined with {joined!r}, which stays; a new job may have another")

    def configuration(self, groups: list[tuple[dict[str, Any], list[int]]],
                      algorithm: Callable[[dict[str, Any]], str]) -> list[dict[str, Any]]:
        """The groups as ``ConfigureOptimizer`` sends them (``OptimizerGroup``). `algorithm` names the servers' optimizer of a group."""
        return [{"optimizer": algorithm(group), **{option: group[option] for option in OPTIONS}, "tensors": indexes,
                 "fp32_tensors": [index for index in indexes if self._job.entries[index].is_embedding]} for group, indexes in groups]

    def gradients(self) -> dict[int, torch.Tensor]:
        """The gradients by manifest index.

        Raises
        ------
        RuntimeError
            A parameter that was frozen when the job was joined has a gradient.
        ValueError
            A gradient cannot be sent: it is sparse, or a tensor subclass.
        """
        for name, parameter in self._frozen.values():
            if parameter.grad is not None:
                raise RuntimeError(f"parameter {name!r} was frozen when the job was joined, so the servers hold "
                                   "no optimizer state for it; unfreeze before the first step")
        gradients = {}
        for index, parameter in self.trained.items():
            if parameter.grad is not None:
                reason = tensors.gradient_fault(parameter.grad, parameter, PARAMETER_DTYPES)
                if reason is not None:
                    raise ValueError(f"the gradient of {self._job.entries[index].name!r} is {reason}")
                gradients[index] = parameter.grad.detach()
        return gradients
