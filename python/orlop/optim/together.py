"""Several optimizers as one."""

from __future__ import annotations

from typing import Any

import torch

from .optimizer import Optimizer
from .store import Store


class Together(Optimizer):
    """Several optimizers of one model as one: one push, one clipping, one commit, so that a step happens for all of them or for none.

    Parameters
    ----------
    *parts : Optimizer
        New optimizers of this package, except :class:`Store`, of one session, each with its own parameters. This one steps them.
    max_norm, overlap, accumulation_steps, gradient_wire
        As for :class:`AdamW`, here and not in the parts.

    Notes
    -----
    ``param_groups`` are the parts' groups one after another. Each has a ``part`` (0, 1, ...); a group that is added later needs one, too.
    Schedulers belong on this optimizer; those that cycle momentum need ``cycle_momentum=False``. ``state_dict(full=True)`` has torch's
    state of all parts; other libraries' formats have no place for several optimizers.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = session.bind(torch.nn.Linear(3, 2))
    ...     optimizer = orlop.Together(orlop.Muon([model.weight], lr=0.02), orlop.AdamW([model.bias], lr=1e-3), max_norm=1.0)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    def __init__(self, *parts: Optimizer, max_norm: float | None = None, overlap: str | None = None,
                 accumulation_steps: int | None = None, gradient_wire: str | None = None) -> None:
        if not parts:
            raise ValueError("orlop.Together of no optimizers; one or more are needed")
        for part in parts:
            kind = type(part).__name__
            if not isinstance(part, Optimizer) or isinstance(part, (Store, Together)):
                raise ValueError(f"orlop.Together of {type(part).__module__}.{kind}; this package's optimizers but Store")
            part._check_own()
            if part.attached or part._pending_state is not None:
                raise ValueError(f"the {kind} has joined a job or loaded a state: put it together before, and load into the whole")
            if part._session is not parts[0]._session:
                raise ValueError(f"the {kind} has another session than the {type(parts[0]).__name__}: a step is made in one")
            for option, is_set in (("max_norm", part._max_norm), ("overlap", part._pusher), ("gradient_wire", part._gradient_wire)):
                if is_set is not None:
                    raise ValueError(f"{option} of the {kind}: give it to orlop.Together, since all push and commit as one")
        self._parts = parts
        groups = [{**group, "part": number} for number, part in enumerate(parts) for group in part.param_groups]
        super().__init__(groups, {}, session=parts[0]._session, max_norm=max_norm, overlap=overlap,
                         accumulation_steps=accumulation_steps, gradient_wire=gradient_wire)
        for part in parts:
            part._given_to = type(self).__name__

    @property
    def slots(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the states of all parts."""
        return tuple(dict.fromkeys(slot for group in self.param_groups for slot in self._part(group).slots))

    @property
    def needs_whole_tensors(self) -> bool:  # type: ignore[override]
        """Whether one of the parts does."""
        return any(part.needs_whole_tensors for part in self._parts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the first step. ``part`` names the optimizer of the group, whose defaults complete it."""
        number = param_group.get("part")
        if type(number) is not int or number not in range(len(self._parts)):
            raise ValueError(f"part={number!r} of a group; 0 to {len(self._parts) - 1}")
        super().add_param_group({**self._parts[number].defaults, **param_group})

    def state_dict(self, full: bool = False, format: str = "torch") -> dict[str, Any]:
        """As :meth:`AdamW.state_dict`, in torch's format alone."""
        if format != "torch":
            raise ValueError(f"format={format!r}: an optimizer of another library is one, this is {len(self._parts)}; 'torch'")
        return super().state_dict(full, format)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`AdamW.load_state_dict`, from :meth:`state_dict` of the same parts in the same order."""
        own, loaded = ([group.get("part") for group in groups] for groups in (self.param_groups, state_dict["param_groups"]))
        if loaded != own:
            raise ValueError(f"the groups of this state belong to parts {loaded}; expected {own}, as orlop.Together saves them")
        super().load_state_dict(state_dict)

    def _part(self, group: dict[str, Any]) -> Optimizer:
        """The optimizer of a group. Its own ``param_groups`` are brought up to date."""
        part = self._parts[group["part"]]
        part.param_groups = [other for other in self.param_groups if other["part"] == group["part"]]
        return part

    def _part_of(self, parameter: torch.Tensor) -> Optimizer:
        return next(self._part(group) for group in self.param_groups if any(parameter is p for p in group["params"]))

    def _settle(self) -> None:
        for group in self.param_groups:
            self._part(group)._settle()

    def _loaded(self, group: dict[str, Any]) -> dict[str, Any]:
        return self._part(group)._loaded(group)

    def _check_group(self, group: dict[str, Any]) -> None:
        self._part(group)._check_group(group)

    def _check_update(self, group: dict[str, Any], parameter: torch.Tensor, name: str) -> None:
        part = self._parts[group["part"]]
        part.state = self.state
        part._check_update(group, parameter, name)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return self._part(group)._algorithm(group)

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return self._part(group)._values(group)

    def _needs_whole(self, group: dict[str, Any]) -> bool:
        return self._part(group).needs_whole_tensors

    def slots_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        return self._part_of(parameter).slots_of(parameter)

    def _state_before_first_update(self, parameter: torch.Tensor) -> dict[str, Any]:
        return self._part_of(parameter)._state_before_first_update(parameter)
