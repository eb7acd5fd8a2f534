"""The optimizers: arguments, names and defaults as torch's, or as the paper's where torch has none."""

from __future__ import annotations

from typing import Any

import torch

from ..job.job import TrainingJob
from ..session import Session
from .optimizer import Optimizer, Params


def _floats(group: dict[str, Any], *names: str) -> dict[str, float]:
    return {name: float(group[name]) for name in names}


def _betas(group: dict[str, Any]) -> dict[str, float]:
    return {f"beta{place + 1}": float(beta) for place, beta in enumerate(group["betas"])}


class AdamW(Optimizer):
    """AdamW with torch's rule, its states on the servers in 8 bit (or fp32).

    Parameters
    ----------
    params : iterable
        Parameters, named parameters or groups, as torch takes them. A group may set its own ``state``.
    lr, betas, eps, weight_decay
        As ``torch.optim.AdamW``; read at every step, so schedulers work. ``lr`` may be a tensor.
    amsgrad, maximize, capturable, differentiable : bool
        Refused when true.
    foreach, fused
        Accepted and ignored: the servers do the arithmetic.
    session : Session, optional
        Default: the one opened last.
    state : str
        ``"8bit"`` (1 byte a moment), ``"fp32"`` or ``"4bit"``. Tensors under 4,096 elements, of one dimension, and embeddings of a bound
        model stay fp32.
    rounding : str
        Of quantised state: ``"no_zero"`` (nearest, no positive second moment coded as 0; averages whose beta is 0.9995 or more and 4-bit
        states, which nearest rounding freezes, are rounded stochastically), ``"nearest"`` (bitsandbytes' CUDA rule, its order of decay
        and update included) or ``"stochastic"`` (seeded by job, tensor, element and step).
    master : str
        ``"exact"`` (the fp32 weights), ``"24bit"`` or ``"bf16"``: 2, 1 or 0 bytes beside the bf16 weight, the last two rounded
        stochastically.
    max_norm : float, optional
        Clip the global norm of the averaged, unscaled gradient, as ``clip_grad_norm_``, on the servers.
    overlap : str, optional
        ``"backward"``: push gradients while backward runs, in the backward that :meth:`last_backward` or `accumulation_steps` names.
    accumulation_steps : int, optional
        Backwards per step, for `overlap`.
    gradient_wire : str, optional
        How gradients travel: ``"fp32"``, ``"bf16"``, ``"fp16"``, or ``"int8"`` for slow networks: 1.016 bytes per element, and what
        rounding loses is kept here (2 bytes per element pushed, 4 while a step is open) and sent with the next gradient. Default: as
        they are.

    Notes
    -----
    The constructor does nothing remote. A new job takes the weights of rank 0; of an existing job the servers' weights win, and one
    line says so.

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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, foreach: bool | None = None,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None, **options: Any) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=None,
                        capturable=capturable, differentiable=differentiable, fused=None, decoupled_weight_decay=True)
        super().__init__(params, defaults, **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "adamw_bnb" if group["rounding"] == "nearest" and group["state"] == "8bit" else "adamw"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return _floats(group, "lr", "eps", "weight_decay") | _betas(group)


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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
                 weight_decay: float = 0, amsgrad: bool = False, *, foreach: bool | None = None, maximize: bool = False,
                 capturable: bool = False, differentiable: bool = False, fused: bool | None = None,
                 decoupled_weight_decay: bool = False, **options: Any) -> None:
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize, foreach=None,
                        capturable=capturable, differentiable=differentiable, fused=None, decoupled_weight_decay=decoupled_weight_decay)
        super().__init__(params, defaults, **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "adamw" if group["decoupled_weight_decay"] else "adam"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return _floats(group, "lr", "eps", "weight_decay") | _betas(group)


class SGD(Optimizer):
    """SGD with momentum and torch's rule, its momentum on the servers in 8 bit (or fp32).

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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, momentum: float = 0, dampening: float = 0,
                 weight_decay: float = 0, nesterov: bool = False, *, maximize: bool = False, foreach: bool | None = None,
                 differentiable: bool = False, fused: bool | None = None, **options: Any) -> None:
        defaults = dict(lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov, maximize=maximize,
                        foreach=None, differentiable=differentiable, fused=None)
        super().__init__(params, defaults, **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "sgd"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return {name: float(group[name]) for name in ("lr", "momentum", "dampening", "weight_decay", "nesterov")}

    def _check_values(self, values: dict[str, float]) -> None:
        super()._check_values({name: value for name, value in values.items() if name != "dampening"})
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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-4, betas: tuple[float, float] = (0.9, 0.99),
                 weight_decay: float = 0.0, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay), **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "lion"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return _floats(group, "lr", "weight_decay") | _betas(group)


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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-2, lr_decay: float = 0, weight_decay: float = 0,
                 initial_accumulator_value: float = 0, eps: float = 1e-10, foreach: bool | None = None, *, maximize: bool = False,
                 differentiable: bool = False, fused: bool | None = None, **options: Any) -> None:
        defaults = dict(lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay,
                        initial_accumulator_value=initial_accumulator_value, foreach=None, maximize=maximize,
                        differentiable=differentiable, fused=None)
        super().__init__(params, defaults, **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "adagrad"

    def _state_before_first_update(self, parameter: torch.Tensor) -> dict[str, Any]:
        group = next(group for group in self.param_groups if any(p is parameter for p in group["params"]))
        return {"step": torch.tensor(0.0), "sum": torch.full_like(parameter, group["initial_accumulator_value"], device="cpu")}

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return _floats(group, "lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")


class RMSprop(Optimizer):
    """RMSprop with torch's rule, centered or not, with momentum or without.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`. Momentum and centering are decided for all groups by the first one that has them.
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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0,
                 momentum: float = 0, centered: bool = False, capturable: bool = False, foreach: bool | None = None,
                 maximize: bool = False, differentiable: bool = False, **options: Any) -> None:
        defaults = dict(lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered, weight_decay=weight_decay,
                        capturable=capturable, foreach=None, maximize=maximize, differentiable=differentiable)
        super().__init__(params, defaults, **options)

    @property
    def slots(self) -> tuple[str, ...]:  # type: ignore[override]
        """Of the state on the servers."""
        return ("square_avg", "momentum_buffer", "grad_avg") if self._is_full() else ("square_avg",)

    def _is_full(self) -> bool:
        return any(group["momentum"] > 0 or group["centered"] for group in self.param_groups)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "rmsprop_full" if self._is_full() else "rmsprop"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        names = ("lr", "alpha", "eps", "weight_decay", "momentum", "centered")
        return _floats(group, *(names if self._is_full() else names[:4]))


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
        session, state, rounding, master, max_norm, overlap, accumulation_steps, gradient_wire: as for :class:`AdamW`. The slow momentum is rounded
        stochastically where ``rounding`` is ``"no_zero"``: nearest rounding would freeze it.

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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
                 alpha: float = 5.0, eps: float = 1e-8, weight_decay: float = 0.0, T: float = 0, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, alpha=alpha, eps=eps, weight_decay=weight_decay, T=T), **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "ademamix"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return _floats(group, "lr", "alpha", "eps", "weight_decay") | _betas(group) | {"warmup": float(group["T"])}

    def _check_values(self, values: dict[str, float]) -> None:
        alpha = values["alpha"]
        super()._check_values(values | {"alpha": 0.0 if alpha >= 1 else alpha})  # a weight here, not a decay


class LAMB(Optimizer):
    """LAMB: AdamW whose step of each tensor is as long as the tensor itself, for large batches (You et al., 2020).

    It looks at a whole tensor before it changes any of it, so each of its tensors lies on one server; create the job with it.

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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6,
                 weight_decay: float = 1e-2, *, maximize: bool = False, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, maximize=maximize), **options)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "lamb"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return _floats(group, "lr", "eps", "weight_decay") | _betas(group)


class Adafactor(Optimizer):
    """Adafactor with torch's rule: the second moment of a matrix is kept as averages over its rows and its columns, in fp32.

    It looks at a whole tensor before it changes any of it, so each of its tensors lies on one server; create the job with it.

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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-2, beta2_decay: float = -0.8,
                 eps: tuple[float | None, float] = (None, 1e-3), d: float = 1.0, weight_decay: float = 0.0, *, foreach: bool | None = None,
                 maximize: bool = False, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, beta2_decay=beta2_decay, eps=eps, d=d, weight_decay=weight_decay, foreach=None,
                                      maximize=maximize), **options)

    def slots_of(self, parameter: torch.Tensor) -> tuple[str, ...]:
        return self.slots[:2] if parameter.dim() > 1 else self.slots[2:]

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "adafactor"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        eps1, eps2 = group["eps"]
        if eps1 is None:
            dtypes = [parameter.dtype for parameter in group["params"] if isinstance(parameter, torch.Tensor)]  # numbers in a state_dict
            eps1 = torch.finfo(dtypes[0] if dtypes else torch.float32).eps
        return _floats(group, "lr", "beta2_decay", "d", "weight_decay") | {"eps1": float(eps1), "eps2": float(eps2)}

    def _check_values(self, values: dict[str, float]) -> None:
        if not values["beta2_decay"] <= 0:
            raise ValueError(f"Invalid beta2_decay: {values['beta2_decay']}; finite and at most 0")
        if not values["d"] >= 1:
            raise ValueError(f"Invalid clipping threshold d: {values['d']}; finite and at least 1")
        super()._check_values(values | {"beta2_decay": 0.0})


class Muon(Optimizer):
    """Muon with torch's rule: the momentum of a matrix is made orthogonal before it becomes the step.

    For matrices alone; give other parameters to another optimizer, :class:`Together` with this one. Each of its tensors lies on one
    server. Its products are a BLAS library's, so its bits are the same on machines of one type, not on every type.

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

    def __init__(self, params: Params, lr: float | torch.Tensor = 1e-3, weight_decay: float = 0.1, momentum: float = 0.95,
                 nesterov: bool = True, ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315), eps: float = 1e-7,
                 ns_steps: int = 5, adjust_lr_fn: str | None = None, **options: Any) -> None:
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, nesterov=nesterov,
                                      ns_coefficients=ns_coefficients, eps=eps, ns_steps=ns_steps, adjust_lr_fn=adjust_lr_fn), **options)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.dim() != 2:
                    raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {parameter.size()}")

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "muon"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        adjust = {None: 0.0, "original": 0.0, "match_rms_adamw": 1.0}
        if group["adjust_lr_fn"] not in adjust:
            raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported; original or match_rms_adamw")
        if len(group["ns_coefficients"]) != 3:
            raise ValueError(f"Invalid ns_coefficients: {group['ns_coefficients']}; exactly 3 values")
        values = _floats(group, "lr", "weight_decay", "momentum", "nesterov", "eps", "ns_steps")
        return values | dict(zip(("ns_a", "ns_b", "ns_c"), map(float, group["ns_coefficients"]))) | {"adjust_lr": adjust[group["adjust_lr_fn"]]}

    def _check_values(self, values: dict[str, float]) -> None:
        super()._check_values({name: value for name, value in values.items() if name not in ("ns_a", "ns_b", "ns_c")})
        if not (values["ns_steps"] == int(values["ns_steps"]) and values["ns_steps"] < 100):
            raise ValueError(f"Invalid ns_steps: {values['ns_steps']}; a whole number below 100")
        if values["momentum"] > 1:
            raise ValueError(f"Invalid momentum value: {values['momentum']}; at most 1")


class Store(Optimizer):
    """No optimizer: the servers keep the weights that you step yourself, with any ``torch.optim.Optimizer`` or none.

    :meth:`step` pushes the parameters' values, all of them at every step, and commits them: the servers have versions that change as a
    whole, :meth:`Session.get`, :meth:`Session.export`, and the weights for the next run. Nothing comes back: the parameters stay what
    they are. What your own optimizer keeps beside the weights (its momentum) is not stored.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    master : str
        As for :class:`AdamW`: ``"exact"`` keeps the bits of fp32, bf16 and fp16 parameters; of a bf16 parameter the fp32 master becomes
        the bf16 value.
    session : Session, optional
        Default: the one opened last.

    Notes
    -----
    Parameters that require no gradient when the job is joined are stored then, and later by :meth:`Session.store` only.

    A new job takes the weights of rank 0; of an existing job the servers' weights win: bind the model, so that they are there at its first
    forward. A first ``step()`` without that replaces what was stepped before it.

    A value that is NaN or infinite makes the job skip the step: ``skipped`` is true then, the servers keep the weights of the step before,
    and the parameters here keep theirs. ``grad_norm`` is the norm of the weights that were pushed.

    With several processes each sends its slice of its own parameters, unaveraged: they must be the same on all, as
    DistributedDataParallel keeps them. A loss scale does not matter: values are pushed as they are.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = session.bind(torch.nn.Linear(3, 1))
    ...     inner, store = torch.optim.SGD(model.parameters(), lr=0.1), orlop.Store(model.parameters())
    ...     model(torch.ones(4, 3)).square().mean().backward()
    ...     inner.step(); store.step()
    ...     session.get("weight").equal(model.weight)
    True
    """

    _steps_here = True

    def __init__(self, params: Params, *, master: str = "exact", session: Session | None = None) -> None:
        super().__init__(params, {}, session=session, state="fp32", master=master)

    def _algorithm(self, group: dict[str, Any]) -> str:
        return "store"

    def _values(self, group: dict[str, Any]) -> dict[str, float]:
        return {}

    def _gradients(self) -> dict[int, torch.Tensor]:
        return {index: parameter.detach() for index, parameter in self._trained.items()}

    def _loss_scale_of_step(self) -> float:
        return 1.0

    def _layout(self, job: TrainingJob) -> dict[str, Any]:
        layout = super()._layout(job)
        self._reduced = not job.workers.alone
        return layout


class Together(Optimizer):
    """Several optimizers of one model as one: one push, one clipping, one commit, so that a step happens for all of them or for none.

    Parameters
    ----------
    *parts : Optimizer
        Of this package, not :class:`Store`, new ones of one session; each has its own parameters. From now on this one steps them.
    max_norm, overlap, accumulation_steps, gradient_wire
        As for :class:`AdamW`, here and not in the parts.

    Notes
    -----
    ``param_groups`` are the parts' groups one after another, each with its ``part`` (0, 1, ...), which a group added later names, too.
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
        """Of the state of all parts."""
        return tuple(dict.fromkeys(slot for group in self.param_groups for slot in self._part(group).slots))

    @property
    def needs_whole_tensors(self) -> bool:  # type: ignore[override]
        """Whether one of the parts does."""
        return any(part.needs_whole_tensors for part in self._parts)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's, before the first step; ``part`` says whose it is, and that part's defaults hold."""
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
        """As :meth:`AdamW.load_state_dict`, of what :meth:`state_dict` gave, with the same parts in the same order."""
        own, loaded = ([group.get("part") for group in groups] for groups in (self.param_groups, state_dict["param_groups"]))
        if loaded != own:
            raise ValueError(f"the groups of this state belong to parts {loaded}; expected {own}, as orlop.Together saves them")
        super().load_state_dict(state_dict)

    def _part(self, group: dict[str, Any]) -> Optimizer:
        """The optimizer that a group is of, which then knows its groups of now."""
        part = self._parts[group["part"]]
        part.param_groups = [other for other in self.param_groups if other["part"] == group["part"]]
        return part

    def _part_of(self, parameter: torch.Tensor) -> Optimizer:
        return next(self._part(group) for group in self.param_groups if any(parameter is p for p in group["params"]))

    def _check_group(self, group: dict[str, Any]) -> None:
        self._part(group)._check_group(group)

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
