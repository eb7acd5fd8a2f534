"""The servers' optimizer kernels in this process, without a server: for comparison, benchmarks and tests.

Examples
--------
>>> import torch
>>> from orlop import kernels
>>> shard = kernels.Shard("adamw", torch.ones(1000), state="8bit")
>>> shard.step(torch.full((1000,), 0.5), {"lr": 0.1})
>>> round(shard.master()[0].item(), 4)
0.899
"""

from __future__ import annotations

import os
from typing import Any

import torch

from . import _core

BLOCK = {"8bit": 256, "4bit": 128}  # elements that share one absmax


def optimizers() -> dict[str, dict[str, Any]]:
    """Describes every optimizer.

    Returns
    -------
    dict of str to dict
        By name: ``hyper_parameters`` with their defaults; ``states``, by name whether their code book is signed; ``whole_tensor``, whether
        a step makes a pass over a whole tensor before it changes an element.
    """
    return _core.kernel_optimizers()


def targets() -> list[str]:
    """The instruction sets that the kernels can use on this machine. The one in use is the first."""
    return _core.kernel_targets()


def use_target(name: str = "") -> None:
    """Sets the instruction set of the kernels, for comparisons. Not thread-safe.

    Parameters
    ----------
    name : str
        One of :func:`targets`; empty: the best one.
    """
    _core.kernel_use_target(name)


def squared_norm(gradient: torch.Tensor, threads: int | None = None) -> tuple[float, int]:
    """Sums the squares of a gradient in the servers' order, in double.

    Parameters
    ----------
    gradient : torch.Tensor
        Contiguous host memory of any shape: float32, bfloat16 or float16.
    threads : int, optional
        Default: as many as there are processors. The result does not depend on it.

    Returns
    -------
    sum : float
        Of the finite elements.
    count : int
        Elements that are not finite.

    Raises
    ------
    ValueError
        The gradient is elsewhere, not contiguous or of another dtype.

    Examples
    --------
    >>> squared_norm(torch.tensor([3.0, 4.0, float("nan")]))
    (25.0, 1)
    """
    address = _address(gradient, "gradient", (torch.float32, torch.bfloat16, torch.float16))
    return _core.kernel_squared_norm((address, _name(gradient.dtype)), gradient.numel(), threads or os.cpu_count() or 1)


class Shard:
    """One tensor with its optimizer state, as a server holds it.

    Parameters
    ----------
    optimizer : str
        One of :func:`optimizers`.
    master : torch.Tensor
        The fp32 weights, of any shape; copied.
    state : str
        ``"fp32"``, ``"8bit"`` or ``"4bit"``, whatever the tensor's size.
    rounding : str
        ``"no_zero"``, ``"nearest"`` or ``"stochastic"``.
    master_format : str
        ``"exact"``, ``"24bit"`` or ``"bf16"``.
    seed, tensor : int
        Seed of stochastic rounding, together with the step.

    Attributes
    ----------
    weight : torch.Tensor
        The stored bf16 weights, in the shape of `master`.
    steps : int
        How many steps have been made.
    codes, absmax : dict of str to torch.Tensor
        Codes (uint8) and scales (fp32) of every quantised state, flat.
    """

    def __init__(self, optimizer: str, master: torch.Tensor, state: str = "8bit", rounding: str = "no_zero", master_format: str = "exact",
                 seed: int = 0, tensor: int = 0) -> None:
        known = optimizers()
        if optimizer not in known:
            raise ValueError(f"optimizer {optimizer!r}; one of {', '.join(known)}")
        if state not in ("fp32", *BLOCK):
            raise ValueError(f"state {state!r}; 'fp32', '8bit' or '4bit'")
        self.optimizer, self._spec, self._formats = optimizer, known[optimizer], (master_format, state, rounding)
        self._seed, self._tensor, self.steps = seed, tensor, 0
        bits = master.detach().float().contiguous().view(torch.int32).reshape(-1)
        if master_format == "exact":
            kept = (bits + 0x8000) >> 16
            self._remainder = (bits - (kept << 16)).to(torch.int16)
        elif master_format == "24bit":
            bits = (bits + 0x80) >> 8
            kept = (bits + 0x80) >> 8
            self._remainder = (bits - (kept << 8)).to(torch.int8)
        elif master_format == "bf16":
            kept = (bits + 0x8000) >> 16
            self._remainder = torch.empty(0, dtype=torch.int8, device="cpu")
        else:
            raise ValueError(f"master_format {master_format!r}; 'exact', '24bit' or 'bf16'")
        self.weight = kept.to(torch.int16).view(torch.bfloat16).reshape(master.shape)
        count = master.numel()
        self._values: dict[str, torch.Tensor] = {}
        self.codes: dict[str, torch.Tensor] = {}
        self.absmax: dict[str, torch.Tensor] = {}
        self._rows = master.shape[:-1].numel() if optimizer == "adafactor" and master.dim() > 1 else 0
        self._averages = torch.zeros(self._rows + self._rows // master.shape[-2] * master.shape[-1] if self._rows else 0,
                                     dtype=torch.float32, device="cpu")
        for name, is_signed in self._spec["states"].items():
            if state == "fp32":
                self._values[name] = torch.zeros(count, dtype=torch.float32, device="cpu")
                continue
            zero = (127 if state == "8bit" else 0x77) if is_signed else 0
            self.codes[name] = torch.full((count if state == "8bit" else (count + 1) // 2,), zero, dtype=torch.uint8, device="cpu")
            self.absmax[name] = torch.zeros(-(-count // BLOCK[state]), dtype=torch.float32, device="cpu")

    def step(self, gradient: torch.Tensor, hyper_parameters: dict[str, float] | None = None, *, gradient_scale: float = 1.0,
             threads: int | None = None) -> None:
        """Makes one step of the whole tensor.

        Parameters
        ----------
        gradient : torch.Tensor
            As many elements as the weights: float32, bfloat16 or float16, contiguous.
        hyper_parameters : dict of str to float
            Those that differ from the defaults.
        gradient_scale : float
            Factor that the gradient is multiplied by first: clipping, unscaling, averaging.
        threads : int, optional
            Default: as many as there are processors. The result does not depend on it.

        Raises
        ------
        ValueError
            A hyper-parameter is unknown, or the gradient has another size, dtype or place.
        """
        values = dict(self._spec["hyper_parameters"])
        if unknown := set(hyper_parameters or {}) - set(values):
            raise ValueError(f"{self.optimizer} has no {', '.join(sorted(unknown))}; it has {', '.join(values)}")
        values.update(hyper_parameters or {})
        if gradient.numel() != self.weight.numel():
            raise ValueError(f"gradient has {gradient.numel()} elements; the weights have {self.weight.numel()}")
        address = _address(gradient, "gradient", (torch.float32, torch.bfloat16, torch.float16))
        states = [(self._values[name].data_ptr(), 0) if self._values else (self.codes[name].data_ptr(), self.absmax[name].data_ptr())
                  for name in self._spec["states"]]
        _core.kernel_step(self.optimizer, [float(value) for value in values.values()], self.steps, gradient_scale,
                          (address, _name(gradient.dtype)), gradient.numel(), self.weight.data_ptr(), self._remainder.data_ptr(),
                          *self._formats, states, self._seed, self._tensor, threads or os.cpu_count() or 1,
                          list(self.weight.shape), self._averages.data_ptr())
        self.steps += 1

    def master(self) -> torch.Tensor:
        """The fp32 weights, in the shape of `master`."""
        bits = self.weight.contiguous().view(torch.int16).to(torch.int32).reshape(-1)
        bits <<= 16  # in place, here and below: a model's weights are read after every step
        if self._remainder.numel():
            bits.add_(self._remainder, alpha=256 if self._remainder.dtype == torch.int8 else 1)
        return bits.view(torch.float32).reshape(self.weight.shape)

    def state(self, name: str) -> torch.Tensor:
        """One state as fp32, flat. A matrix of Adafactor also has the states ``"row_var"`` and ``"col_var"``."""
        if name in ("row_var", "col_var") and self._rows:
            return self._averages[:self._rows] if name == "row_var" else self._averages[self._rows:]
        if self._values:
            return self._values[name]
        book = code_book(self._formats[1], self._spec["states"][name])
        codes = self.codes[name].to(torch.int64)
        if self._formats[1] == "4bit":
            codes = torch.stack([codes & 15, codes >> 4], 1).reshape(-1)[:self.weight.numel()]
        scales = self.absmax[name].repeat_interleave(BLOCK[self._formats[1]])[:codes.numel()]
        return book[codes] * scales


def code_book(state: str, is_signed: bool) -> torch.Tensor:
    """The value of every code of a quantised state, from the closed form.

    Parameters
    ----------
    state : str
        ``"8bit"`` or ``"4bit"``.
    is_signed : bool
        Whether the state has negative values.

    Returns
    -------
    torch.Tensor
        fp32 [256 or 16], ascending.

    Examples
    --------
    >>> code_book("4bit", False)[-2:]
    tensor([0.9375, 1.0000])
    """
    if state == "4bit" and not is_signed:
        return torch.arange(1, 17, dtype=torch.float32, device="cpu") / 16
    decades = 7 if state == "8bit" else 3
    values = [0.0, 1.0]
    for decade in range(decades):
        count = 2 ** (decade if is_signed else decade + 1)
        for j in range(count):
            value = (0.1 + 0.9 * (j + 0.5) / count) * 10.0 ** (decade + 1 - decades)
            values += [value, -value] if is_signed else [value]
    return torch.tensor(sorted(values), dtype=torch.float64, device="cpu").float()


def _address(tensor: torch.Tensor, what: str, dtypes: tuple[torch.dtype, ...]) -> int:
    if tensor.device.type != "cpu" or not tensor.is_contiguous() or tensor.dtype not in dtypes:
        raise ValueError(f"{what} is {tensor.dtype} on {tensor.device}, contiguous: {tensor.is_contiguous()}; expected contiguous "
                         f"host memory of {', '.join(_name(dtype) for dtype in dtypes)}")
    return tensor.data_ptr()


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
