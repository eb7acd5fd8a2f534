"""Adagrad and RMSprop: the learning rate of an element follows its squared gradients."""

from __future__ import annotations

from typing import Any

import torch

from ..names import step_count
from .groups import Params, arguments, check_numbers, numbers
from .optimizer import Optimizer


class Adagrad(Optimizer):
    """Adagrad with torch's rule.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    lr, lr_decay, weight_decay, initial_accumulator_value, eps
        As ``torch.optim.Adagrad``.
    maximize, differentiable : bool
        Refused when true.
    foreach, fused
        Accepted and ignored.
    **options
        session, state, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = torch.nn.Linear(3, 1)
    ...     optimizer = orlop.Adagrad(model.named_parameters())
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    slots = ("sum",)
    _kernel = "adagrad"
    _numbers = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-2, lr_decay: float = 0, weight_decay: float = 0,
                 initial_accumulator_value: float = 0, eps: float = 1e-10, foreach: bool | None = None, *, maximize: bool = False,
                 differentiable: bool = False, fused: bool | None = None, **options: Any) -> None:
        super().__init__(params, arguments(locals()), **options)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As :meth:`Optimizer.add_param_group`. ValueError for an initial_accumulator_value other than the constructor's, which torch
        takes for all groups.
        """
        own = self.defaults["initial_accumulator_value"]
        if param_group.get("initial_accumulator_value", own) != own:
            raise ValueError(f"initial_accumulator_value={param_group['initial_accumulator_value']} of a group: torch's Adagrad begins all "
                             f"groups with the constructor's, which is {own}; give it there")
        super().add_param_group(param_group)

    def _state_before_first_update(self, parameter: torch.Tensor) -> dict[str, Any]:
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        return {"step": step_count(0), "sum": torch.full_like(parameter, group["initial_accumulator_value"], device="cpu")}


class RMSprop(Optimizer):
    """RMSprop with torch's rule, centered or not, with momentum or without.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`. If one group has momentum or is centered, the servers keep these states for all groups. If none has when
        the job is joined, none can have later.
    lr, alpha, eps, weight_decay, momentum, centered
        As ``torch.optim.RMSprop``.
    capturable, maximize, differentiable : bool
        Refused when true.
    foreach
        Accepted and ignored.
    **options
        session, state, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = torch.nn.Linear(3, 1)
    ...     optimizer = orlop.RMSprop(model.named_parameters(), momentum=0.9, centered=True)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    _numbers = ("lr", "alpha", "eps", "weight_decay")
    _settled: bool | None = None  # whether the servers keep all three states; None before the job is joined

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0,
                 momentum: float = 0, centered: bool = False, capturable: bool = False, foreach: bool | None = None,
                 maximize: bool = False, differentiable: bool = False, **options: Any) -> None:
        super().__init__(params, arguments(locals()), **options)

    @property
    def slots(self) -> tuple[str, ...]:  # type: ignore[override]
        """Names of the states on the servers."""
        return ("square_avg", "momentum_buffer", "grad_avg") if self._is_full() else ("square_avg",)

    def _is_full(self) -> bool:
        if self._settled is not None:
            return self._settled
        return any(_needs_full(group) for group in (self.defaults, *self.param_groups))

    def _settle(self) -> None:
        self._settled = None
        self._settled = self._is_full()

    def _check_group(self, group: dict[str, Any]) -> None:
        check_numbers(numbers(group, ("momentum", "centered")))
        super()._check_group(group)
        if self._settled is False and _needs_full(group):
            raise ValueError(f"momentum={group['momentum']}, centered={group['centered']}: the job was joined by an RMSprop with neither, "
                             "so the servers keep no states for them; give one of them to the constructor")

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "rmsprop_full" if self._is_full() else "rmsprop"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return super()._values(group) | (numbers(group, ("momentum", "centered")) if self._is_full() else {})


def _needs_full(group: dict[str, Any]) -> bool:
    return group["momentum"] > 0 or bool(group["centered"])
