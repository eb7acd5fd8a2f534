"""LAMB, Adafactor and Muon: a step first makes a pass over a whole tensor."""

from __future__ import annotations

from typing import Any

import torch

from .groups import Params, arguments, check_real, number
from .optimizer import Optimizer


class LAMB(Optimizer):
    """LAMB: AdamW whose step of each tensor is as long as the tensor itself, for large batches (You et al., 2020).

    A step makes a pass over a whole tensor before it changes any element, so each tensor is on one server: create the job with this
    optimizer.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    lr, betas, eps, weight_decay
        As the paper's algorithm 2, read at every step. The ratio of the norms is 1 where either is 0.
    maximize : bool
        Refused when true.
    **options
        session, state, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = torch.nn.Linear(3, 1)
    ...     optimizer = orlop.LAMB(model.named_parameters(), lr=1e-2)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    needs_whole_tensors = True
    slots = ("exp_avg", "exp_avg_sq")
    _kernel = "lamb"
    _numbers = ("lr", "betas", "eps", "weight_decay")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 1e-2, *, maximize: bool = False, **options: Any) -> None:
        super().__init__(params, arguments(locals()), **options)


class Adafactor(Optimizer):
    """Adafactor with torch's rule: the second moment of a matrix is kept as averages over its rows and its columns, in fp32.

    A step makes a pass over a whole tensor before it changes any element, so each tensor is on one server: create the job with this
    optimizer.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    lr, beta2_decay, eps, d, weight_decay
        As ``torch.optim.Adafactor``; read at every step. ``eps[0]`` None is the parameters' ``torch.finfo(dtype).eps``.
    foreach : bool, optional
        Accepted and ignored.
    maximize : bool
        Refused when true.
    **options
        session, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = torch.nn.Linear(3, 2)
    ...     optimizer = orlop.Adafactor(model.named_parameters())
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     session.get("weight", "row_var").shape
    torch.Size([2, 1])
    """

    needs_whole_tensors = True
    slots = ("row_var", "col_var", "variance")
    _kernel = "adafactor"
    _numbers = ("lr", "beta2_decay", "d", "weight_decay")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-2, beta2_decay: float = -0.8,
                 eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0, weight_decay: float = 0.0, *, foreach: bool | None = None,
                 maximize: bool = False, **options: Any) -> None:
        super().__init__(params, arguments(locals()), **options)

    def slots_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        return self.slots[:2] if parameter.dim() > 1 else self.slots[2:]

    def _check_group(self, group: dict[str, Any]) -> None:
        check_real(group, "Adafactor")
        super()._check_group(group)

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        if len(group["eps"]) != 2:
            raise ValueError(f"Invalid eps: {group['eps']}; exactly 2 values")
        eps1, eps2 = group["eps"]
        if eps1 is None:
            dtypes = [p.dtype for p in group["params"] if isinstance(p, torch.Tensor)]  # a state_dict has numbers in their place
            eps1 = torch.finfo(dtypes[0] if dtypes else torch.float32).eps
        return super()._values(group) | {"eps1": number(eps1, "eps[0]"), "eps2": number(eps2, "eps[1]")}

    def _check_values(self, values: dict[str, float]) -> None:
        for place in (1, 2):
            if not values[f"eps{place}"] >= 0:
                raise ValueError(f"epsilon{place} should be >= 0 but is: {values[f'eps{place}']}")
        if not values["beta2_decay"] <= 0:
            raise ValueError(f"beta2_decay should be <= 0 but is: {values['beta2_decay']}")
        if not values["d"] >= 1:
            raise ValueError(f"Clipping threshold d should be >= 1 but is: {values['d']}")
        super()._check_values(values | {"beta2_decay": -values["beta2_decay"]})


class Muon(Optimizer):
    """Muon with torch's rule: the momentum of a matrix is made orthogonal before it becomes the step.

    It trains matrices only; another optimizer, :class:`Together` with this one, trains the other parameters. Each tensor is on one
    server. A BLAS library multiplies the matrices, so the bits are the same on machines of one type, not on every type.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`; two dimensions each.
    lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn
        As ``torch.optim.Muon``; read at every step. The Newton-Schulz iteration runs in fp32, where torch's runs in bf16.
    **options
        session, state, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`; ``state`` is that of
        the momentum.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = torch.nn.Linear(3, 2, bias=False)
    ...     optimizer = orlop.Muon(model.named_parameters(), lr=0.02)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    needs_whole_tensors = True
    slots = ("momentum_buffer",)
    _kernel = "muon"
    _numbers = ("lr", "weight_decay", "momentum", "nesterov", "eps", "ns_steps")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
                 nesterov: bool = True, ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315), eps: float = 1e-7,
                 ns_steps: int = 5, adjust_lr_fn: str | None = None, **options: Any) -> None:
        super().__init__(params, arguments(locals()), **options)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_real(group, "Muon")
        super()._check_group(group)
        for parameter in group["params"]:
            if isinstance(parameter, torch.Tensor) and parameter.dim() != 2:  # a state_dict has numbers in their place
                raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {parameter.size()}")

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        adjust = {None: 0.0, "original": 0.0, "match_rms_adamw": 1.0}
        if group["adjust_lr_fn"] not in adjust:
            raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; original or match_rms_adamw")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"Invalid ns_coefficients: {group['ns_coefficients']}; exactly 3 values")
        coefficients = dict(zip(("ns_a", "ns_b", "ns_c"), (number(value, "ns_coefficients") for value in group["ns_coefficients"])))
        return super()._values(group) | coefficients | {"adjust_lr": adjust[group["adjust_lr_fn"]]}

    def _check_values(self, values: dict[str, float]) -> None:
        super()._check_values(values | {name: abs(values[name]) for name in ("ns_a", "ns_b", "ns_c")})
        if not (values["ns_steps"] == int(values["ns_steps"]) and values["ns_steps"] < 100):
            raise ValueError(f"Invalid ns_steps: {values['ns_steps']}; a whole number below 100")
        if values["momentum"] > 1:
            raise ValueError(f"Invalid momentum value: {values['momentum']}; at most 1")
