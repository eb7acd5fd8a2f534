"""One job from a worker's side: its tensors, its contributors, and its steps.

This is the door of the folder: other folders import from here only.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from .. import _core
from ..errors import Aborted, FailedPrecondition
from ..names import Entry
from .attempt import Attempt
from .traffic import Traffic
from .wire import GRADIENT_WIRES, Part, part
from .workers import Workers

__all__ = ["GRADIENT_WIRES", "Part", "TrainingJob", "Workers", "part"]

STEP_TRIES = 8  # attempts of one step that servers may give up (restarts) before the error is the caller's


class TrainingJob:
    """Creates a job or attaches to it. All workers make theirs at the same time.

    Parameters
    ----------
    client : orlop._core.Client
    name : str
    entries : list of Entry
        The job's tensors in the order of the manifest; the same on every rank.

    Attributes
    ----------
    workers : Workers
    traffic : Traffic
        Bytes to and from the servers.
    attempt : Attempt
        The step that a call has begun.
    existed : bool
        Whether the job was there before.
    joined : bool
        Whether this process is a contributor.
    """

    def __init__(self, client: _core.Client, name: str, entries: list[Entry]) -> None:
        self.workers = Workers()
        self.entries = entries
        specs = [entry.spec() for entry in entries]
        created: list[_core.JobHandle] = []

        def create() -> bool:
            created.append(client.create_job(name, specs))
            return created[0].existed

        self.existed: bool = self.workers.run_first(create)
        handle = created[0] if created else client.create_job(name, specs)
        self.traffic = Traffic(handle, self.workers, entries)
        self.attempt = Attempt(self.traffic)
        self.joined = False
        self._layout: dict[str, Any] = {}

    @property
    def handle(self) -> _core.JobHandle:
        """The job in the C++ client."""
        return self.traffic.handle

    @property
    def name(self) -> str:
        return self.handle.job

    @property
    def step(self) -> int:
        """The committed step; -1 if the job has no weights yet."""
        return self.handle.state["committed_step"]

    @property
    def loading(self) -> bool:
        """Whether the job has no weights yet."""
        return self.step < 0

    def index_of(self, tensor: torch.Tensor) -> int:
        """Manifest index of a tensor of this process. KeyError if the job does not have it."""
        return self.traffic.index_of[id(tensor)]

    def has(self, tensor: torch.Tensor) -> bool:
        return id(tensor) in self.traffic.index_of

    # Joining.

    def configure(self, request: dict[str, Any]) -> None:
        """Sets the optimizer of every parameter (``ConfigureOptimizerRequest``)."""
        self.workers.run_first(lambda: self.handle.configure_optimizer(request))

    def join(self, layout: dict[str, Any]) -> None:
        """Becomes a contributor, and returns when all ranks are. Contributors that joined before lose the job."""
        self._layout = layout
        workers = self.workers
        seen = self.step if self.joined else None
        generation = workers.run_first(lambda: self.handle.start_generation(workers.world_size, seen))
        self.handle.join(generation, workers.rank, workers.world_size, layout, seen)
        self.joined = True

    def join_frozen(self) -> None:
        """Joins a job that no optimizer trains, so that weights can be stored and read."""
        self.join({"mode": "EXACTLY_ONCE", "preset": "WHOLE" if self.workers.alone else "FLAT_SLICES"})

    # Loading.

    def matching(self, entries: list[Entry]) -> list[Entry]:
        """Finds the job's own entries for the tensors of a model, and copies the model's values into them.

        Raises
        ------
        ValueError
            The job has no tensor of such a name, or one of another shape.
        """
        by_name = {name: entry for entry in self.entries for name in (entry.name, *entry.tied_names)}
        for entry in entries:
            known = by_name.get(entry.name)
            if known is None:
                raise ValueError(f"job {self.name!r} has no tensor {entry.name!r}")
            if known.tensor.shape != entry.tensor.shape:
                raise ValueError(f"tensor {entry.name!r} has shape {list(entry.tensor.shape)}; job {self.name!r} has it as "
                                 f"{list(known.tensor.shape)}")
            if known.tensor is not entry.tensor:
                with torch.no_grad():
                    known.tensor.copy_(entry.tensor)
        return [by_name[entry.name] for entry in entries]

    def store(self, entries: list[Entry]) -> int:
        """Sets these weights and buffers from rank 0 by a LOAD step. Afterwards every rank has them. Returns the step."""
        self.load([self.weight_part(entry) for entry in entries])
        self.traffic.pull(entries)
        return self.step

    def store_alone(self, entries: list[Entry]) -> None:
        """Sets those of these tensors that differ from the servers', by a LOAD step of this rank as the only contributor.

        The other ranks may have left already. Nothing happens if newer contributors have the job.
        """
        held = self.traffic.stored(entries)
        changed = [entry for entry, value in zip(entries, held) if not torch.equal(value, entry.tensor.detach().cpu())]
        if not changed or self.handle.status()["generation"] != self.handle.state["generation"]:
            return
        generation = self.handle.start_generation(1, self.step)
        self.handle.join(generation, 0, 1, {"mode": "EXACTLY_ONCE", "preset": "WHOLE"}, self.step)
        self.handle.set_state([self.weight_part(entry) for entry in changed])
        self.handle.commit(load=True)

    def load(self, parts: list[Part]) -> None:
        """Makes a LOAD step of any slots, sent by rank 0. Slots without a part keep their bits."""
        if self.workers.any_of([self.attempt.is_open])[0]:
            self.attempt.settle()
        self.attempt.open()
        self.workers.run_first(lambda: self.handle.set_state(parts))
        self.workers.together(lambda: self.handle.commit(load=True))
        self.attempt.close()

    def weight_part(self, entry: Entry) -> Part:
        """The part of a LOAD step that sets a weight or buffer to its value here."""
        index, tensor = self.index_of(entry.tensor), entry.tensor
        if entry.is_buffer or tensor.dtype == torch.bfloat16:
            return part(index, tensor, "weight")
        return part(index, tensor.detach().float(), "master")

    # A step.

    def survey(self, gradients: dict[int, torch.Tensor]) -> tuple[set[int], bool, bool]:
        """Compares the ranks before a step. All ranks call it.

        Returns
        -------
        present : set of int
            Manifest indexes of the tensors for which some rank has a gradient.
        stopped : bool
            Whether a call of some rank raised before, so that all ranks must catch up.
        changed : bool
            Whether the gradients of some rank are others than those of the step that began last.
        """
        tracked = self.traffic.tracked
        changed, stopped, *some = self.workers.any_of(
            [not self.attempt.has_tried(gradients), self.attempt.is_unfinished, *(index in gradients for index in tracked)])
        return {index for index, there in zip(tracked, some) if there}, stopped, changed

    def make_step(self, parts: list[Part], start: Callable[[], list[_core.Push | None]] | None, groups: list[dict[str, float]],
                  absent: list[int], loss_scale: float) -> dict[str, Any]:
        """Pushes and commits the open step, again if servers gave the attempt up. It raises on every rank if it raises on one.

        Parameters
        ----------
        parts : list of Part
            Everything that this rank contributes.
        start : callable, optional
            Completes `parts` and sends, the first time, those of them that have not been sent during backward.
        groups : list of dict
            Hyper-parameters of every group, in the order of :meth:`configure`.
        absent : list of int
            Tensors that have no gradient in this step.
        loss_scale : float

        Returns
        -------
        dict
            The decision (``CommitStepResponse``).
        """
        decision = self.workers.together(lambda: self._make_step(parts, start, groups, absent, loss_scale))
        self.attempt.decide(decision)
        self.attempt.close()
        return decision

    def _make_step(self, parts: list[Part], start: Callable[[], list[_core.Push | None]] | None, groups: list[dict[str, float]],
                   absent: list[int], loss_scale: float) -> dict[str, Any]:
        target = self.step + 1
        for tries in range(STEP_TRIES):
            try:
                begin = time.perf_counter()
                pushes = start() if start is not None else [self.traffic.push(parts, loss_scale)]
                start = None
                for push in pushes:
                    if push is not None:
                        push.wait()
                pushed = time.perf_counter()
                decision = self.handle.commit(groups=groups, absent_tensors=absent, loss_scale=loss_scale)
                self.traffic.seconds |= {"push": pushed - begin, "commit": time.perf_counter() - pushed}
                return decision
            except (Aborted, FailedPrecondition) as error:
                if tries + 1 == STEP_TRIES:
                    raise
                decided = self._recover(error, target)
                if decided is not None:
                    return decided
        raise AssertionError("unreachable")

    def _recover(self, error: Aborted | FailedPrecondition, target: int) -> dict[str, Any] | None:
        """Makes the step possible again, or returns its decision if it was committed after all. Raises `error` if neither."""
        if error.reason in ("STALE_ATTEMPT", "CHECKSUM"):
            return None
        if error.reason != "STALE_EPOCH" or not self.workers.alone:
            raise error
        self.join(self._layout)
        return self.handle.status()["last_decision"] if self.step >= target else None
