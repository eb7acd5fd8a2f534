"""SGD and Lion: one average of the gradient."""

from __future__ import annotations

from typing import Any

import torch

from .groups import Params, arguments, check_numbers
from .optimizer import Optimizer

_NESTEROV = "Nesterov momentum requires a momentum and zero dampening"


class SGD(Optimizer):
    """SGD with momentum and torch's rule. Its momentum is on the servers, in 8 bit unless told otherwise.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    lr, momentum, dampening, weight_decay, nesterov
        As ``torch.optim.SGD``.
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
    ...     optimizer = orlop.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.grad_norm > 0
    True
    """

    slots = ("momentum_buffer",)
    _kernel = "sgd"
    _numbers = ("lr", "momentum", "dampening", "weight_decay", "nesterov")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
                 weight_decay: float = 0, nesterov: bool = False, *, maximize: bool = False, foreach: bool | None = None,
                 differentiable: bool = False, fused: bool | None = None, **options: Any) -> None:
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(_NESTEROV)
        self._without_buffer: set[int] = set()  # ids of parameters that have been updated, but never with momentum
        super().__init__(params, arguments(locals()), **options)

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        values = super()._values(group)
        return values | {"nesterov": values["nesterov"] if values["momentum"] else 0.0}  # torch ignores it without momentum

    def _check_values(self, values: dict[str, float]) -> None:
        check_numbers(values | {"dampening": abs(values["dampening"])})
        if values["nesterov"] and values["dampening"]:
            raise ValueError(_NESTEROV)

    def _check_update(self, group: dict[str, Any], parameter: torch.Tensor, name: str) -> None:
        is_marked, updates = id(parameter) in self._without_buffer, self.state[parameter]["step"]
        if not group["momentum"]:
            if not is_marked and float(updates) == 0:
                self._without_buffer.add(id(parameter))
        elif is_marked and group["dampening"] and float(updates) > 0:
            raise NotImplementedError(f"momentum={group['momentum']} with dampening={group['dampening']}: parameter {name!r} was updated "
                                      "without momentum before, and torch would begin its momentum_buffer undampened now, which the "
                                      "servers do in the first update alone; dampening=0 here, or momentum from the first step on")
        else:
            self._without_buffer.discard(id(parameter))


class Lion(Optimizer):
    """Lion: the sign of an interpolation of momentum and gradient, with decoupled decay.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    lr, betas, weight_decay
        As in the paper's code.
    **options
        session, state, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`.

    References
    ----------
    Chen et al., Symbolic Discovery of Optimization Algorithms, 2023, algorithm 2.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = torch.nn.Linear(3, 1)
    ...     optimizer = orlop.Lion(model.named_parameters(), lr=0.01)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    slots = ("exp_avg",)
    _kernel = "lion"
    _numbers = ("lr", "betas", "weight_decay")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, arguments(locals()), **options)
