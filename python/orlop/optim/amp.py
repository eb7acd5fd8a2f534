"""Loss scaling for fp16, decided for the whole job."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp.grad_scaler import OptState

from .connection import opened
from .optimizer import Optimizer


class GradScaler(torch.amp.GradScaler):
    """A ``torch.amp.GradScaler`` that decides for the whole job.

    The servers unscale gradients and find those that are not finite: one bad gradient on any worker skips the step everywhere, and the
    scale of every rank changes alike. With optimizers of other libraries it does what torch's does.

    Parameters
    ----------
    device : str
        ``"cpu"`` or ``"cuda"``: where the loss is.
    init_scale, growth_factor, backoff_factor, growth_interval, enabled
        As ``torch.amp.GradScaler``.

    Examples
    --------
    >>> import torch, orlop
    >>> with orlop.local() as session:
    ...     model = session.bind(torch.nn.Linear(2, 1))
    ...     optimizer, scaler = orlop.AdamW(model.parameters()), orlop.GradScaler(init_scale=8.0)
    ...     scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    ...     scaler.step(optimizer)
    ...     scaler.update()
    ...     scaler.get_scale()
    8.0
    """

    def __init__(self, device: str = "cpu", init_scale: float = 2.0**16, growth_factor: float = 2.0, backoff_factor: float = 0.5,
                 growth_interval: int = 2000, enabled: bool = True) -> None:
        super().__init__(device, init_scale, growth_factor, backoff_factor, growth_interval, enabled)

    def scale(self, outputs: Any) -> Any:
        """As torch's. Gradients that the next backward pushes are sent with this scale."""
        scaled = super().scale(outputs)
        for session in opened:
            session.loss_scale = self.get_scale()
        return scaled

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> float | None:
        """As torch's, except that a step which the job skipped counts as an overflow."""
        if not self._enabled or not isinstance(optimizer, Optimizer):
            return super().step(optimizer, *args, **kwargs)
        if args or kwargs:
            raise RuntimeError("Closure use is not currently supported if GradScaler is enabled.")
        scale, _ = self._check_scale_growth_tracker("step")
        record = self._per_optimizer_states[id(optimizer)]
        if record["stage"] is OptState.STEPPED:
            raise RuntimeError("step() has already been called since the last update().")
        optimizer.grad_scale = None if record["stage"] is OptState.UNSCALED else scale
        optimizer.found_inf = sum(record["found_inf_per_device"].values())  # of unscale_; the gradients may be finite again
        optimizer.step()
        del optimizer.grad_scale, optimizer.found_inf  # not after a step that raised: it may be called again
        record["stage"] = OptState.STEPPED
        record["found_inf_per_device"] = {scale.device: torch.full((), float(optimizer.skipped), dtype=torch.float32, device=scale.device)}
        return None
