"""SGD and Lion: one average of the gradient."""

from __future__ import annotations

from typing import Any

import torch

from .groups import Params, arguments, check_numbers
from .optimizer import Optimizer


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
        super().__init__(params, arguments(locals()), **options)

    def _check_values(self, values: dict[str, float]) -> None:
        check_numbers({name: value for name, value in values.items() if name != "dampening"})
        if values["nesterov"] and (values["momentum"] <= 0 or values["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")


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
