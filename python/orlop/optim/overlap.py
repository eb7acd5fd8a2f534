"""Pushes gradients while backward is still running (``overlap="backward"``)."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from .. import _core, tensors
from ..job.job import Part, TrainingJob
from ..names import PARAMETER_DTYPES


class BackwardPusher:
    """Sends each gradient from its post-accumulate hook. At the step it finds out whether a gradient has changed since.

    Parameters
    ----------
    accumulation_steps : int or None
        Backwards of a parameter, of which the last pushes. None: only those inside :meth:`last_backward` push.
    """

    def __init__(self, accumulation_steps: int | None) -> None:
        if accumulation_steps is not None and accumulation_steps < 1:
            raise ValueError(f"accumulation_steps={accumulation_steps}; at least 1")
        self._accumulation_steps = accumulation_steps
        self._inside_last = False
        self._warned = False
        self._job: TrainingJob | None = None
        self._loss_scale = lambda: 1.0
        self._scale_sent = 1.0
        self._counts: dict[int, int] = {}
        self._sent: dict[int, tuple[torch.Tensor, tuple[int, int], Part]] = {}  # gradient, its version when sent, and what was sent
        self._pushes: list[_core.Push] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def attach(self, job: TrainingJob, parameters: dict[int, torch.Tensor], loss_scale: Callable[[], float]) -> None:
        """Installs hooks that push to `job`. `loss_scale()` is the factor that the loss of the running backward was multiplied by."""
        self._job = job
        self._loss_scale = loss_scale
        reference = weakref.ref(self)  # a hook must not keep the optimizer alive
        for index, parameter in parameters.items():
            def hook(tensor: torch.Tensor, index: int = index) -> None:
                pusher = reference()
                if pusher is not None:
                    pusher._arrived(index, tensor)
            self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def detach(self) -> None:
        """Removes the hooks, and forgets what was sent."""
        self._reset()
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """A context for the backward whose gradients are final. An exception inside takes back what was sent."""
        self._inside_last = True
        try:
            yield
        except BaseException:
            self.abort("exception in backward")
            raise
        finally:
            self._inside_last = False

    def _arrived(self, index: int, parameter: torch.Tensor) -> None:
        self._counts[index] = self._counts.get(index, 0) + 1
        if not self._inside_last and self._counts[index] != self._accumulation_steps:
            return
        if index in self._sent or parameter.grad is None:  # if it was sent, finish() finds that it changed
            return
        if tensors.gradient_fault(parameter.grad, parameter, PARAMETER_DTYPES) is not None:  # step() raises
            return
        assert self._job is not None
        if self._job.attempt.is_open:  # a call raised: step() ends that attempt first, and then pushes
            return
        if not self._sent:
            self._scale_sent = self._loss_scale()
        part = self._job.traffic.wire.part(index, parameter.grad, self._scale_sent)
        push = self._job.traffic.push([part], self._scale_sent)
        assert push is not None
        self._sent[index] = (parameter.grad, tensors.version(parameter.grad), part)
        self._pushes.append(push)

    def finish(self, gradients: dict[int, torch.Tensor], loss_scale: float,
               unscaled: bool) -> tuple[dict[int, Part], list[_core.Push]]:
        """Ends the backward's part of a step.

        Parameters
        ----------
        gradients : dict of int to torch.Tensor
            Gradients of the step, by manifest index.
        loss_scale : float
        unscaled : bool
            GradScaler.unscale_ changed the gradients, which does not change their versions.

        Returns
        -------
        parts : dict of int to Part
            Gradients that have been sent, by manifest index. If any of them has changed since, all are taken back and there are none.
        pushes : list of orlop._core.Push
            Their pushes, which may not be complete.
        """
        stale = bool(self._sent) and (unscaled or self._scale_sent != loss_scale)
        for index, (_, version, _) in self._sent.items():
            now = gradients.get(index)
            stale |= now is None or tensors.version(now) != version
        if stale:
            self._warn()
            self.abort("a gradient changed after its push")
        parts, pushes = {index: part for index, (_, _, part) in self._sent.items()}, self._pushes
        self._reset()
        return parts, pushes

    def abort(self, reason: str) -> None:
        """Takes back what was sent for the open attempt, if anything was. `reason` is for the servers' logs."""
        was_sent = bool(self._sent)
        self.drop()
        if was_sent:
            assert self._job is not None
            self._job.handle.abort(reason)

    def drop(self) -> None:
        """Cancels and forgets what was sent. The caller aborts the attempt."""
        for push in self._pushes:
            push.cancel()
        if self._sent and self._job is not None:
            self._job.traffic.wire.settle(None)
        self._reset()  # returns when no gradient is read any more

    def _reset(self) -> None:
        self._counts, self._sent, self._pushes = {}, {}, []

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn("a gradient changed after it was pushed during backward (accumulation, clipping or unscale_ after the last "
                          "backward): it is pushed again, which costs the overlap; use opt.last_backward() or accumulation_steps",
                          stacklevel=9)  # step()
