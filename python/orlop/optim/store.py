"""The store: weights that are stepped in this process."""

from __future__ import annotations

from typing import Any

import torch

from ..job.job import TrainingJob
from ..state.checkpoint import Connection
from .groups import Params
from .optimizer import Optimizer


class Store(Optimizer):
    """No optimizer: the servers keep the weights that you step yourself, with any ``torch.optim.Optimizer`` or none.

    :meth:`step` pushes the values of all parameters and commits them as one version, which :meth:`Session.get`, :meth:`Session.export`
    and the next run read. It does not change the parameters. The states of your own optimizer (its momentum) are not stored.

    Parameters
    ----------
    params : iterable
        As for :class:`AdamW`.
    master : str
        As for :class:`AdamW`: ``"exact"`` keeps the bits of fp32, bf16 and fp16 parameters. The fp32 master of a bf16 parameter becomes
        its bf16 value.
    session : Session, optional
        Default: the one opened last.

    Notes
    -----
    Parameters that require no gradient when the job is joined are stored then, and later by :meth:`Session.store` only.

    A new job takes the weights of rank 0. The weights of an existing job replace those of the parameters: at the first forward of a bound
    model, or else at the first ``step()``, which then undoes what was stepped before it.

    A value that is NaN or infinite makes the job skip the step: ``skipped`` is true then, the servers keep the weights of the step before,
    and the parameters here keep theirs. ``grad_norm`` is the norm of the weights that were pushed.

    With several processes each sends its slice of its own parameters, which are not averaged: they must be the same on all, as
    DistributedDataParallel keeps them. A loss scale has no effect, since values are pushed and no gradients.

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

    _kernel = "store"
    _steps_here = True

    def __init__(self, params: Params, *, master: str = "exact", session: Connection | None = None) -> None:
        super().__init__(params, {}, session=session, state="fp32", master=master)

    def _gradients(self) -> dict[int, torch.Tensor]:
        return {index: parameter.detach() for index, parameter in self._members.trained.items()}

    def _loss_scale_of_step(self) -> float:
        return 1.0

    def _layout(self, job: TrainingJob) -> dict[str, Any]:
        layout = super()._layout(job)
        self._reduced = not job.workers.alone
        return layout
