"""What became of a step whose call raised.

A call that raises may leave its step half made: bytes may be staged on the servers, the step may be committed after all, and its weights
may not be here. The next call finds out and ends it. Every rank is at the same point, since steps, loads and pulls raise on all ranks or
on none. Ctrl-C inside a collective is the exception: the ranks may be out of step then, and the processes must be started again.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from .. import _core, tensors
from ..errors import FailedPrecondition, Unavailable
from .traffic import Traffic

SETTLE_SECONDS = 60.0  # how long a decision under way, or a recovery, may hide what became of a step


@dataclass
class _Begun:
    """A step that began and whose weights are not known to be here."""

    gradients: dict[int, tuple[torch.Tensor, tuple[int, int]]] | None  # with their versions; None: others have replaced them
    pulled: bool  # true also if this process does not want the weights
    decision: dict[str, Any] | None = None  # once the step is known to be committed


class Attempt:
    """The step or load that a call has begun.

    Parameters
    ----------
    traffic : Traffic
        Of the same job.
    """

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic
        self._open: int | None = None  # a step or load whose commit was not seen
        self._begun: _Begun | None = None

    @property
    def is_open(self) -> bool:
        """Whether a call raised before it saw its commit. :meth:`catch_up` or the next load ends the attempt."""
        return self._open is not None

    @property
    def is_unfinished(self) -> bool:
        """Whether a call raised before :meth:`finish`, so that :meth:`catch_up` has something to do."""
        return self._open is not None or self._begun is not None

    @property
    def is_behind(self) -> bool:
        """Whether the weights here may not be those of the last step."""
        return self._open is not None or self._begun is not None and not self._begun.pulled

    def begin(self, gradients: dict[int, torch.Tensor], pulls: bool = True) -> None:
        """Opens the next step. Until :meth:`finish` it may be left half made. `pulls` says whether its weights are wanted here."""
        self.open()
        self._begun = _Begun({index: (gradient, tensors.version(gradient)) for index, gradient in gradients.items()}, pulled=not pulls)

    def open(self) -> None:
        """Opens the next step or load: from now on it may be staged or committed."""
        self._open = self._committed_step() + 1

    def close(self) -> None:
        """Notes that the commit of the open step or load was seen."""
        self._open = None

    def finish(self) -> None:
        """Ends the step that began: its weights are here."""
        self._begun = None

    def forget_gradients(self) -> None:
        """Forgets the gradients of a step that raised. Those that are computed from now on belong to a new step."""
        if self._begun is not None:
            self._begun.gradients = None

    def has_tried(self, gradients: dict[int, torch.Tensor]) -> bool:
        """Whether these are the gradients of the step that began last: the same memory, unchanged since."""
        tried = self._begun.gradients if self._begun is not None else None
        return tried is not None and tried.keys() == gradients.keys() and all(
            tensors.version(gradient) == tried[index][1] for index, gradient in gradients.items())

    def decide(self, decision: dict[str, Any] | None) -> None:
        """Notes the decision of the step that began last; None if the step was not made."""
        if self._begun is not None:
            self._begun.decision = decision
        self._traffic.wire.settle(decision["outcome"] if decision is not None else None)

    def catch_up(self) -> dict[str, Any] | None:
        """Ends what a call that raised left half made. All ranks call it.

        Returns
        -------
        dict or None
            The decision of the step that began last, if it was committed. Its weights are here then, if they were wanted. None: nothing
            of the step is left.
        """
        self.settle()
        if self._begun is None:
            return None
        if not self._begun.pulled:
            self._traffic.pull_tracked()
            self._begun.pulled = True
        return self._begun.decision

    def settle(self) -> None:
        """Finds out whether the open step or load was committed, and aborts it if not. All ranks call it."""
        workers = self._traffic.workers
        decision = workers.run_first(self._end_open)
        if not workers.alone:
            workers.together(self._handle.refresh)
        self.close()
        if self._begun is not None and self._begun.decision is None:
            self.decide(decision)
            if decision is None:
                self._begun = None

    @property
    def _handle(self) -> _core.JobHandle:
        return self._traffic.handle

    def _committed_step(self) -> int:
        return self._handle.state["committed_step"]

    def _end_open(self) -> dict[str, Any] | None:
        """The decision of the open step, if it was committed after all. Otherwise the attempt is aborted."""
        if self._open is None:
            return self._begun.decision if self._begun is not None else None
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            self._handle.refresh()
            if self._committed_step() >= self._open:
                return self._handle.status()["last_decision"]
            error = Unavailable("the job is recovering, and what became of the last step is not known yet")
            if self._handle.state["attempt"] != 0:  # 0: recovering
                try:
                    self._handle.abort("a call before raised")
                    return None
                except FailedPrecondition as refused:  # decided: the commit is about to come
                    error = refused
            if time.monotonic() > until:
                raise error
            time.sleep(0.02)
