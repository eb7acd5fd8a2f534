"""Adam and its relatives: averages of the gradient and of its square."""

from __future__ import annotations

from typing import Any

import torch

from .groups import Params, arguments, number
from .optimizer import Optimizer


def check_tensors(lr: float | torch.Tensor, betas: tuple[float, float], capturable: bool, foreach: bool | None) -> None:
    """ValueError for the combinations of tensors and flags that torch's Adam refuses."""
    for name, value in {"lr": lr, **{f"betas[{place}]": beta for place, beta in enumerate(betas)}}.items():
        if isinstance(value, torch.Tensor) and foreach and not capturable:
            raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")
    if len({isinstance(beta, torch.Tensor) for beta in betas}) > 1:
        raise ValueError("betas must be either both floats or both Tensors")


class AdamW(Optimizer):
    """AdamW with torch's rule. Its states are on the servers, in 8 bit unless told otherwise.

    Parameters
    ----------
    params : iterable
        Parameters, named parameters or groups, as torch takes them. A group may have its own ``state``, ``rounding`` and ``master``.
    lr, betas, eps, weight_decay
        As ``torch.optim.AdamW``; read at every step, so schedulers work. ``lr`` may be a tensor.
    amsgrad, maximize, capturable, differentiable : bool
        Refused when true.
    foreach, fused
        Accepted and ignored: the servers do the arithmetic.
    session : Session, optional
        Default: the one opened last.
    state : str
        Format of the states: ``"8bit"`` (1 byte a moment), ``"fp32"`` or ``"4bit"``. The states of tensors under 4,096 elements, of
        one-dimensional tensors, and of embeddings of a bound model stay fp32.
    rounding : str
        How quantised states are rounded. ``"no_zero"``: to nearest, but no positive second moment becomes 0; averages whose beta is 0.9995
        or more and 4-bit states are rounded stochastically, since rounding to nearest would freeze them. ``"nearest"``: bitsandbytes'
        CUDA rule, with its order of decay and update. ``"stochastic"``: seeded by job, tensor, element and step.
    master : str
        Format of the master weights: ``"exact"`` (fp32), ``"24bit"`` or ``"bf16"`` keep 2, 1 or 0 bytes beside the bf16 weight. The last
        two are rounded stochastically.
    max_norm : float, optional
        Limit of the global norm of the averaged, unscaled gradient. The servers clip it as ``clip_grad_norm_`` does.
    overlap : str, optional
        ``"backward"``: push gradients while backward runs, in the backward that :meth:`last_backward` or `accumulation_steps` names.
    accumulation_steps : int, optional
        Backwards per step, for `overlap`.
    gradient_wire : str, optional
        Encoding of gradients on the network: ``"fp32"``, ``"bf16"``, ``"fp16"``, or, for slow networks, ``"int8"``: 1.016 bytes per
        element. Its rounding loss is kept here (2 bytes per element pushed, 4 while a step is open) and sent with the next gradient.
        Default: the gradient's own dtype.

    Notes
    -----
    The constructor does nothing remote. A new job takes the weights of rank 0. The weights of an existing job replace those in the
    parameters, and one line says so.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = session.bind(torch.nn.Linear(3, 1))
    ...     optimizer = orlop.AdamW(model.parameters(), lr=0.1, max_norm=1.0)
    ...     for _ in range(3):
    ...         optimizer.zero_grad()
    ...         model(torch.ones(4, 3)).square().mean().backward()
    ...         optimizer.step()
    ...     optimizer.skipped
    False
    """

    slots = ("exp_avg", "exp_avg_sq")
    _numbers = ("lr", "betas", "eps", "weight_decay")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None, **options: Any) -> None:
        check_tensors(lr, betas, capturable, foreach)
        super().__init__(params, arguments(locals()) | {"decoupled_weight_decay": True}, **options)

    def _loaded(self, group: dict[str, Any]) -> dict[str, Any]:
        return group | {"decoupled_weight_decay": True}  # as torch's AdamW takes a state of Adam

    def _algorithm(self, group: dict[str, Any]) -> str:
        if not group["decoupled_weight_decay"]:
            return "adam"
        return "adamw_bnb" if group["rounding"] == "nearest" and group["state"] == "8bit" else "adamw"


class Adam(Optimizer):
    """Adam with torch's rule: the weight decay is added to the gradient, unless it is decoupled.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    lr, betas, eps, weight_decay, decoupled_weight_decay
        As ``torch.optim.Adam``.
    amsgrad, maximize, capturable, differentiable : bool
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
    ...     optimizer = orlop.Adam(model.named_parameters(), lr=0.1)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    slots = ("exp_avg", "exp_avg_sq")
    _numbers = ("lr", "betas", "eps", "weight_decay")

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0, amsgrad: bool = False, *, foreach: bool | None = None, maximize: bool = False,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
                 decoupled_weight_decay: bool = False, **options: Any) -> None:
        check_tensors(lr, betas, capturable, foreach)
        super().__init__(params, arguments(locals()), **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "adamw" if group["decoupled_weight_decay"] else "adam"


class AdEMAMix(Optimizer):
    """AdEMAMix: AdamW with a second, slow momentum, whose weight and decay are warmed up over ``T`` steps.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    lr, betas, alpha, eps, weight_decay
        As in the paper: ``betas`` of the fast momentum, the second moment and the slow momentum.
    T : float
        Steps of warm-up of alpha and the slow beta; 0: none.
    **options
        session, state, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`. The slow
        momentum is rounded stochastically if ``rounding`` is ``"no_zero"``: nearest rounding would freeze it.

    References
    ----------
    Pagliardini, Ablin and Grangier, The AdEMAMix Optimizer, 2024, algorithm 1.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = torch.nn.Linear(3, 1)
    ...     optimizer = orlop.AdEMAMix(model.named_parameters(), T=100)
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.skipped
    False
    """

    slots = ("exp_avg", "exp_avg_slow", "exp_avg_sq")
    _kernel = "ademamix"
    _numbers = ("lr", "betas", "alpha", "eps", "weight_decay")
    _betas = 3

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
                 alpha: float = 5.0, eps: float = 1e-8, weight_decay: float = 0.0, T: float = 0, **options: Any) -> None:
        super().__init__(params, arguments(locals()), **options)

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return super()._values(group) | {"warmup": number(group["T"], "T")}

    def _check_values(self, values: dict[str, float]) -> None:
        alpha = values["alpha"]
        super()._check_values(values | {"alpha": 0.0 if alpha >= 1 else alpha})  # AdEMAMix's alpha is a weight and not a decay
