"""One job from a worker's side: its tensors, its contributors, and its steps.

This is the door of the folder: other folders import from here only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from .. import _core, tensors
from ..errors import Aborted, FailedPrecondition
from ..names import Entry
from .attempt import Attempt
from .held import digests
from .traffic import Traffic, boxes_of
from .wire import GRADIENT_WIRES, Part, part
from .workers import Workers

__all__ = ["GRADIENT_WIRES", "Part", "TrainingJob", "Workers", "digests", "part"]

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
        self.workers.check_same([(entry.name, entry.described()) for entry in entries])
        boxes = boxes_of(self.workers, entries)
        specs = [entry.spec(_value_digest(entry) if entry.stays else "") for entry in entries]
        created: list[_core.JobHandle] = []

        def create() -> bool:
            created.append(client.create_job(name, specs))
            return created[0].existed

        self.existed: bool = self.workers.run_first(create)
        handle = created[0] if created else client.create_job(name, specs)
        self.traffic = Traffic(handle, self.workers, entries, boxes)
        self.traffic.unset = self._unset(client)
        # Of these, those that are to stay and that some rank has otherwise than the job's creator had.
        digests_of_creator = [spec["value_digest"] for spec in handle.tensors]
        own = {index for index in self.traffic.unset
               if (here := specs[index]["value_digest"]) and digests_of_creator[index] not in ("", here)}
        self._replaced = set().union(*self.workers.all_of(own))
        if not self.loading:
            self._check_bound()
        self.attempt = Attempt(self.traffic)
        self.joined = False
        self._layout: dict[str, Any] = {}
        self._configuration: dict[str, Any] = {}

    def _unset(self, client: _core.Client) -> set[int]:
        """Manifest indexes of the tensors that the servers have no value of."""
        def find() -> set[int]:
            some = {index for index, spec in enumerate(self.handle.tensors) if spec["may_be_unset"]}
            return {index for index in some if self.loading
                    or not client.describe_tensor(self.name, self.entries[index].name)["shards"][0]["slots"]}
        return self.workers.run_first(find)

    def _check_bound(self) -> None:
        """Raises ValueError if a tensor that stays with its worker has another value than when the job was created."""
        if self._replaced:
            name = self.entries[min(self._replaced)].name
            raise ValueError(f"frozen parameter {name!r}, with {len(self._replaced) - 1} others, has another value than when job "
                             f"{self.name!r} was created, and the servers do not have it, since it never changed: give the model the "
                             "weights of then, or create the job with session.bind(model, store_frozen=True)")

    def staying(self, trained: Iterable[int]) -> set[int]:
        """Manifest indexes of the tensors that need no value on the servers: frozen ones, on all ranks as the job's creator had them."""
        return self.traffic.unset - self._replaced - set(trained)

    def set_trained(self, trained: Iterable[int]) -> None:
        """Gives the servers the values of trained tensors that stayed here so far. All ranks call it."""
        some = sorted(self.traffic.unset & set(trained))
        if some:
            self.load(lambda: [self.weight_part(self.entries[index]) for index in some])
            self.traffic.unset -= set(some)

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

    def trains(self, tensor: torch.Tensor) -> bool:
        """Whether the optimizer that joined last trains a tensor, which may have been frozen since then."""
        return self.has(tensor) and self.traffic.trains(self.index_of(tensor))

    # Joining.

    def configure(self, request: dict[str, Any]) -> None:
        """Sets the optimizer of every parameter (``ConfigureOptimizerRequest``). ValueError if the ranks ask for different ones."""
        agreed = self.workers.agree(request)

        def check() -> None:
            if request != agreed:
                raise ValueError("the parameter groups of this rank have other parameters than rank 0's; they must be the same on all")
        self.workers.together(check)
        self.workers.run_first(lambda: self.handle.configure_optimizer(request))
        self._configuration = request

    def join(self, layout: dict[str, Any]) -> None:
        """Becomes a contributor, and returns when all ranks are. Contributors that joined before lose the job."""
        self._layout = layout
        workers = self.workers
        seen = self.step if self.joined else None
        generation = workers.run_first(lambda: self.handle.start_generation(workers.world_size, seen))
        self.handle.join(generation, workers.rank, workers.world_size, layout, seen)
        self.joined = True

    def leave(self) -> None:
        """Contributes no more: the weights here are not those of the job."""
        self.joined = False

    def join_frozen(self) -> None:
        """Joins a job that no optimizer trains, so that weights can be stored and read."""
        self.join({"mode": "EXACTLY_ONCE", "preset": "WHOLE" if self.workers.alone else "FLAT_SLICES"})

    # Loading.

    def known_of(self, entries: list[Entry]) -> dict[str, Entry]:
        """The job's own entries for tensors of a model, by the model's names. Names that the job does not have are missing."""
        by_name = {name: entry for entry in self.entries for name in (entry.name, *entry.tied_names)}
        return {entry.name: by_name[entry.name] for entry in entries if entry.name in by_name}

    def matching(self, entries: list[Entry]) -> list[Entry]:
        """Finds the job's own entries for the tensors of a model, and copies the model's values into them.

        Raises
        ------
        ValueError
            The job has no tensor of such a name, or one of another shape.
        """
        known = self.known_of(entries)
        for entry in entries:
            own = known.get(entry.name)
            if own is None:
                raise ValueError(f"job {self.name!r} has no tensor {entry.name!r}")
            if own.tensor.shape != entry.tensor.shape:
                raise ValueError(f"tensor {entry.name!r} has shape {list(entry.tensor.shape)}; job {self.name!r} has it as "
                                 f"{list(own.tensor.shape)}")
        for entry in entries:
            own = known[entry.name]
            if own.tensor is not entry.tensor:
                tensors.copy(own.tensor, entry.tensor)
        return [known[entry.name] for entry in entries]

    def store(self, entries: list[Entry]) -> int:
        """Sets those of these weights and buffers that differ from the servers', from rank 0, by a LOAD step if there are any.

        Afterwards every rank has rank 0's. Returns the step.
        """
        changed = self.changed_anywhere(entries)
        if changed:
            self.load(lambda: [self.edited_part(index) for index in changed])
            self.traffic.unset -= set(changed)
        self.traffic.pull([self.entries[index] for index in changed] if self.workers.alone else entries)
        return self.step

    def changed_anywhere(self, entries: list[Entry]) -> list[int]:
        """Manifest indexes of those of these tensors that :meth:`changed` on rank 0, and of DTensors that did on any rank."""
        changed, boxes = self.workers.together(lambda: self.changed(entries)), self.traffic.boxes
        some = dict(zip(boxes, self.workers.any_of([index in changed for index in boxes]))) if boxes else {}
        return [index for index in self.workers.agree(sorted({*changed, *boxes})) if some.get(index, index not in boxes)]

    def changed(self, entries: list[Entry]) -> list[int]:
        """Manifest indexes of those of these tensors whose values here are not the servers'."""
        if self.loading:
            return [self.index_of(entry.tensor) for entry in entries]
        held = self.traffic.held
        changed = held.changed(self.index_of(entry.tensor) for entry in entries)
        return [index for index in changed if index in held or index in self.traffic.unset or not self.traffic.is_stored(index)]

    def edited_part(self, index: int) -> Part:
        """The part of a LOAD step that sets a tensor to its value here.

        Where a 16-bit parameter has the servers' value, its element keeps the exact master.
        """
        entry = self.entries[index]
        if self.loading or entry.is_buffer or entry.tensor.dtype == torch.float32 or not self.traffic.trains(index):
            return self.weight_part(entry)
        here = tensors.host(entry.tensor)
        weight, master = self.traffic.weight_and_master(index)
        exact = torch.where(here.view(torch.int16) == weight.view(torch.int16), master, here.float())
        return part(index, exact, "master", entry.box)

    def store_alone(self, indexes: list[int]) -> None:
        """Sets these tensors to their values here, by a LOAD step of this rank as the only contributor.

        The other ranks may have left already. Nothing happens if newer contributors have the job.
        """
        if not indexes or self.handle.status()["generation"] != self.handle.state["generation"]:
            return
        generation = self.handle.start_generation(1, self.step)
        self.handle.join(generation, 0, 1, {"mode": "EXACTLY_ONCE", "preset": "WHOLE"}, self.step)
        self.handle.set_state([self.edited_part(index) for index in indexes])
        self.handle.commit(load=True)
        self.traffic.unset -= set(indexes)

    def load(self, parts: Callable[[], list[Part]]) -> None:
        """Makes a LOAD step of any slots. Rank 0 makes and sends the parts, and other ranks those of the boxes of DTensors that they have.

        Slots without a part keep their bits.
        """
        if self.workers.any_of([self.attempt.is_open])[0]:
            self.attempt.settle()
        self.attempt.open()

        def send() -> None:
            self.handle.set_state([part for part in parts() if self.traffic.sets(part)])
        self.workers.run_first(send)
        if self.traffic.boxes:
            self.workers.together(send if self.workers.rank else lambda: None)
        self.workers.together(lambda: self.handle.commit(load=True))
        self.attempt.close()

    def weight_part(self, entry: Entry) -> Part:
        """The part of a LOAD step that sets a weight or buffer to its value here."""
        index, tensor = self.index_of(entry.tensor), entry.tensor
        if entry.is_buffer or tensor.dtype == torch.bfloat16:
            return part(index, tensor, "weight")
        return part(index, tensor.detach().float(), "master")

    # A step.

    def survey(self, gradients: dict[int, torch.Tensor], configuration: dict[str, Any],
               overflowed: bool) -> tuple[set[int], bool, bool, bool, bool]:
        """Compares the ranks before a step. All ranks call it.

        Parameters
        ----------
        gradients : dict of int to torch.Tensor
            By manifest index.
        configuration : dict
            What :meth:`configure` would be given now.
        overflowed : bool
            Whether a gradient of this rank is known not to be finite.

        Returns
        -------
        present : set of int
            Manifest indexes of the tensors for which some rank has a gradient.
        stopped : bool
            Whether a call of some rank raised before, so that all ranks must catch up.
        changed : bool
            Whether the gradients of some rank are others than those of the step that began last.
        moved : bool
            Whether the configuration of some rank is another than the servers'.
        overflowed : bool
            Whether it was given as true on some rank.

        Raises
        ------
        ValueError
            Of a DTensor some ranks have a gradient and some have none. Every rank raises.
        """
        tracked, boxes, rank = self.traffic.tracked, self.traffic.boxes, self.workers.rank
        distributed = [index for index in tracked if index in boxes]
        lacking = [index not in gradients and boxes[index][rank] != tensors.NOTHING for index in distributed]
        changed, stopped, moved, overflowed, *some = self.workers.any_of(
            [not self.attempt.has_tried(gradients), self.attempt.is_unfinished, configuration != self._configuration, overflowed,
             *(index in gradients for index in tracked), *lacking])
        present = {index for index, there in zip(tracked, some) if there}
        for index, lacks in zip(distributed, some[len(tracked):]):
            if lacks and index in present:
                raise ValueError(f"the gradient of {self.entries[index].name!r}, a DTensor, is missing on some ranks and there on others: "
                                 "every rank needs it, or none")
        return present, stopped, changed, moved, overflowed

    def differing(self) -> str | None:
        """The name of the first tensor whose values are not the same on all ranks, DTensors left out. All ranks call it."""
        if self.workers.alone:
            return None
        plain = [entry for entry in self.entries if not tensors.is_distributed(entry.tensor)]
        ranks = self.workers.all_of(digests([entry.tensor for entry in plain]))
        return next((entry.name for entry, *some in zip(plain, *ranks) if len(set(some)) > 1), None)

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
        self.traffic.count_step()
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


def _value_digest(entry: Entry) -> str:
    """Names the value of a tensor, wherever its memory is; empty for a DTensor, of which no process has all."""
    return "" if tensors.is_distributed(entry.tensor) else digests([entry.tensor.detach().cpu()])[0]
