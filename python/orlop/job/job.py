"""One job from a worker's side: its tensors, its place among the contributors, and the traffic of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .. import _core
from ..errors import Aborted, EditedWeights, FailedPrecondition, Unavailable
from ..names import DTYPE_NAMES, Entry
from .wire import GradientWire, Part, part
from .workers import Bucket, Workers

STEP_TRIES = 8  # attempts of one step that servers may give up (restarts) before the error is the caller's
SETTLE_SECONDS = 60.0  # how long a decision under way, or a recovery, may keep us from knowing what became of a step


@dataclass
class Begun:
    """A step that began and whose weights are not known to be here."""

    gradients: dict[int, tuple[torch.Tensor, int]] | None  # with their versions; None: others have taken their place
    decision: dict[str, Any] | None = None                 # once known to be committed
    pulled: bool = False                                   # or not wanted


class TrainingJob:
    """Creates or attaches to a job when made, on all workers at once.

    Parameters
    ----------
    client : orlop._core.Client
    name : str
    entries : list of Entry
        The job's tensors in the order of the manifest; the same on every rank.
    """

    def __init__(self, client: _core.Client, name: str, entries: list[Entry]) -> None:
        self.workers = Workers()
        self.entries = entries
        self.index_of = {id(entry.tensor): index for index, entry in enumerate(entries)}
        specs = [entry.spec() for entry in entries]
        created: list[_core.JobHandle] = []

        def create() -> bool:
            created.append(client.create_job(name, specs))
            return created[0].existed

        self.existed: bool = self.workers.run_first(create)
        self.core = created[0] if created else client.create_job(name, specs)
        self.joined = False
        self.wire = GradientWire(None, self.core.shard_elements)
        self.seconds: dict[str, float] = {}
        self._layout: dict[str, Any] = {}
        self._seen_versions: dict[int, tuple[int, int]] = {}
        self._buckets: list[Bucket] = []
        self._open: int | None = None  # step or load whose commit was not seen: something may be staged, or it may be committed
        self._begun: Begun | None = None

    @property
    def step(self) -> int:
        """Committed step; -1: no weights yet."""
        return self.core.state["committed_step"]

    @property
    def loading(self) -> bool:
        return self.step < 0

    # Joining.

    def configure(self, request: dict[str, Any]) -> None:
        self.workers.run_first(lambda: self.core.configure_optimizer(request))

    def join(self, layout: dict[str, Any]) -> None:
        """Becomes a contributor; returns when all ranks are. Newer ones take over from older ones."""
        self._layout = layout
        workers = self.workers
        seen = self.step if self.joined else None
        generation = workers.run_first(lambda: self.core.start_generation(workers.world_size, seen))
        self.core.join(generation, workers.rank, workers.world_size, layout, seen)
        self.joined = True

    def join_frozen(self) -> None:
        """Joins a job that no optimizer trains: weights can be stored and read."""
        mode = {"mode": "EXACTLY_ONCE", "preset": "WHOLE" if self.workers.alone else "FLAT_SLICES"}
        self.join(mode)

    def track(self, indexes: list[int]) -> None:
        """Parameters whose weights every step brings back."""
        if not self.workers.alone:
            self._buckets = Bucket.pack({index: self.entries[index].tensor for index in indexes}, self.workers.world_size)
        self._seen_versions = {index: _version(self.entries[index].tensor) for index in indexes}

    # Loading.

    def matching(self, entries: list[Entry]) -> list[Entry]:
        """The job's own entries for the tensors of a model; ValueError naming what the job does not know, or has in another shape."""
        by_name = {name: entry for entry in self.entries for name in (entry.name, *entry.tied_names)}
        for entry in entries:
            known = by_name.get(entry.name)
            if known is None:
                raise ValueError(f"job {self.core.job!r} has no tensor {entry.name!r}")
            if known.tensor.shape != entry.tensor.shape:
                raise ValueError(f"tensor {entry.name!r} has shape {list(entry.tensor.shape)}; job {self.core.job!r} has it as "
                                 f"{list(known.tensor.shape)}")
            if known.tensor is not entry.tensor:
                with torch.no_grad():
                    known.tensor.copy_(entry.tensor)
        return [by_name[entry.name] for entry in entries]

    def store(self, entries: list[Entry]) -> int:
        """A LOAD step that sets these weights and buffers from rank 0; every rank has them afterwards."""
        self.load([self._weight_part(entry) for entry in entries])
        self.pull(entries)
        return self.step

    def store_alone(self, entries: list[Entry]) -> None:
        """A LOAD step of those that are not the servers', by this rank as the only contributor: the others may have left already.

        Nothing happens if newer contributors have the job.
        """
        held = [torch.empty(entry.tensor.shape, dtype=entry.tensor.dtype) for entry in entries]
        self.core.pull([(self.index_of[id(entry.tensor)], "weight", DTYPE_NAMES[room.dtype], None, room.view(-1), None)
                        for entry, room in zip(entries, held)], latest=True)
        changed = [entry for entry, room in zip(entries, held) if not torch.equal(room, entry.tensor.detach().cpu())]
        if not changed or self.core.status()["generation"] != self.core.state["generation"]:
            return
        generation = self.core.start_generation(1, self.step)
        self.core.join(generation, 0, 1, {"mode": "EXACTLY_ONCE", "preset": "WHOLE"}, self.step)
        self.core.set_state([self._weight_part(entry) for entry in changed])
        self.core.commit(load=True)

    def load(self, parts: list[Part]) -> None:
        """A LOAD step of any slots, sent by rank 0. What it does not set keeps its bits."""
        if self.workers.any_of([self._open is not None])[0]:
            self._settle()
        self._open = self.step + 1
        self.workers.run_first(lambda: self.core.set_state(parts))
        self.workers.together(lambda: self.core.commit(load=True))
        self._open = None

    def _weight_part(self, entry: Entry) -> Part:
        index, tensor = self.index_of[id(entry.tensor)], entry.tensor
        if entry.is_buffer or tensor.dtype == torch.bfloat16:
            return part(index, tensor, "weight")
        return part(index, tensor.detach().float(), "master")

    # A step.

    def check_unedited(self) -> None:
        """EditedWeights if a parameter changed since the servers' weights were put into it."""
        for index, seen in self._seen_versions.items():
            entry = self.entries[index]
            if _version(entry.tensor) != seen:
                raise EditedWeights(
                    f"parameter {entry.name!r} was changed outside the optimizer, and the servers do not know: call "
                    "session.store(model) after an edit (load_state_dict, clamping) to keep it", {"tensor": entry.name})

    def survey(self, gradients: dict[int, torch.Tensor]) -> tuple[set[int], bool, bool]:
        """What the ranks have together: tensors with a gradient on some, as manifest indexes; whether some rank has a call before to
        :meth:`catch_up` with; whether gradients of some rank are others than those of the step begun last."""
        tracked = list(self._seen_versions)
        changed, stopped, *some = self.workers.any_of(
            [not self._tried(gradients), self._open is not None or self._begun is not None, *(index in gradients for index in tracked)])
        return {index for index, there in zip(tracked, some) if there}, stopped, changed

    # After a call that raised. Every rank is in the same place: make_step, load and pull_tracked raise on all ranks or on none. Ctrl-C
    # in a collective is another matter: then the process group is out of step, and the processes start again.

    def begin(self, gradients: dict[int, torch.Tensor], pulls: bool = True) -> None:
        """From here to :meth:`finish` a step may be left half made; `pulls`: its weights are wanted here."""
        self._open = self.step + 1
        self._begun = Begun({index: (gradient, gradient._version) for index, gradient in gradients.items()}, pulled=not pulls)

    def finish(self) -> None:
        self._begun = None

    def forget_gradients(self) -> None:
        """The gradients of a step that raised are wanted no more; those that come are new."""
        if self._begun is not None:
            self._begun.gradients = None

    def _tried(self, gradients: dict[int, torch.Tensor]) -> bool:
        """Whether these are the gradients of the step begun last."""
        tried = self._begun.gradients if self._begun is not None else None
        return tried is not None and tried.keys() == gradients.keys() and all(
            gradient.data_ptr() == tried[index][0].data_ptr() and gradient._version == tried[index][1]
            for index, gradient in gradients.items())

    @property
    def is_open(self) -> bool:
        """Whether a call raised before it knew of its commit: :meth:`catch_up` or the next load ends the attempt."""
        return self._open is not None

    @property
    def behind(self) -> bool:
        """Whether the weights here may not be those of the last step."""
        return self._open is not None or self._begun is not None and not self._begun.pulled

    def catch_up(self) -> dict[str, Any] | None:
        """Ends what a call that raised left half made, on all ranks at once. The decision of the step begun last, if it was committed;
        its weights are here then, if they were wanted. If not, nothing of it is left."""
        self._settle()
        if self._begun is None:
            return None
        if not self._begun.pulled:
            self.pull_tracked()
            self._begun.pulled = True
        return self._begun.decision

    def _settle(self) -> None:
        decision = self.workers.run_first(self._end_open)
        if not self.workers.alone:
            self.workers.together(self.core.refresh)
        self._open = None
        if self._begun is not None and self._begun.decision is None:
            self._decided(decision)
            if decision is None:
                self._begun = None

    def _decided(self, decision: dict[str, Any] | None) -> None:
        """What became of the step begun last is known now; None: it was not made."""
        if self._begun is not None:
            self._begun.decision = decision
        self.wire.settle(decision["outcome"] if decision is not None else None)

    def _end_open(self) -> dict[str, Any] | None:
        """The decision of the open step, if it was committed after all; else the attempt is aborted."""
        if self._open is None:
            return self._begun.decision if self._begun is not None else None
        until = time.monotonic() + SETTLE_SECONDS
        while True:
            self.core.refresh()
            if self.step >= self._open:
                return self.core.status()["last_decision"]
            error = Unavailable("the job is recovering, and what became of the last step is not known yet")
            if self.core.state["attempt"] != 0:  # 0: recovering
                try:
                    self.core.abort("a call before raised")
                    return None
                except FailedPrecondition as refused:  # decided: the commit is about to come
                    error = refused
            if time.monotonic() > until:
                raise error
            time.sleep(0.02)

    def reduce(self, gradients: dict[int, torch.Tensor], present: set[int], reduced: bool,
               loss_scale: float) -> tuple[list[Part], list[int]]:
        """What this rank pushes, and which of its tensors nobody has a gradient for, as manifest indexes.

        `gradients` are flat. With several workers: averaged here (or taken as they are, if `reduced`), this rank's slice of each.
        """
        start = time.perf_counter()
        tracked = list(self._seen_versions)
        if self.workers.alone:
            parts = [self.wire.part(index, gradient, loss_scale) for index, gradient in gradients.items()]
            return parts, [index for index in tracked if index not in gradients]
        parts = []
        for bucket in self._buckets:
            for piece, values in self._slices(bucket, gradients, reduced):
                if piece.index in present:
                    parts.append(self.wire.part(piece.index, values, loss_scale, (piece.begin, piece.end - piece.begin)))
        mine = {piece.index for bucket in self._buckets for piece in bucket.segments[self.workers.rank]}
        self.seconds["reduce"] = time.perf_counter() - start
        return parts, [index for index in tracked if index in mine and index not in present]

    def _slices(self, bucket: Bucket, gradients: dict[int, torch.Tensor], reduced: bool) -> list[tuple[Any, torch.Tensor]]:
        if not reduced:
            return self.workers.average(bucket, gradients)
        return [(piece, gradients[piece.index][piece.begin:piece.end]) for piece in bucket.segments[self.workers.rank]
                if piece.index in gradients]

    def push(self, parts: list[Part], loss_scale: float) -> _core.Push | None:
        """Starts sending; None if there is nothing to send."""
        return self.core.push_async(parts, loss_scale=loss_scale) if parts else None

    def make_step(self, parts: list[Part], start: Callable[[], list[_core.Push | None]] | None, groups: list[dict[str, float]],
                  absent: list[int], loss_scale: float) -> dict[str, Any]:
        """Pushes, commits, and answers the decision. Redoes attempts that servers gave up.

        `parts` is everything this rank contributes; `start()`, if given, completes it and sends, the first time, what is not on its way
        already.
        Raises on every rank if it does on one.
        """
        decision = self.workers.together(lambda: self._make_step(parts, start, groups, absent, loss_scale))
        self._decided(decision)
        self._open = None
        return decision

    def _make_step(self, parts: list[Part], start: Callable[[], list[_core.Push | None]] | None, groups: list[dict[str, float]],
                   absent: list[int], loss_scale: float) -> dict[str, Any]:
        target = self.step + 1
        for tries in range(STEP_TRIES):
            try:
                begin = time.perf_counter()
                pushes = start() if start is not None else [self.push(parts, loss_scale)]
                start = None
                for push in pushes:
                    if push is not None:
                        push.wait()
                pushed = time.perf_counter()
                decision = self.core.commit(groups=groups, absent_tensors=absent, loss_scale=loss_scale)
                self.seconds |= {"push": pushed - begin, "commit": time.perf_counter() - pushed}
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
        return self.core.status()["last_decision"] if self.step >= target else None

    def pull(self, entries: list[Entry]) -> None:
        """The committed version of these tensors, whole, into them."""
        inside, copies = [], []
        for entry in entries:
            tensor = entry.tensor.detach()
            room = tensor if tensor.is_contiguous() and tensor.device.type == "cpu" else torch.empty(tensor.shape, dtype=tensor.dtype)
            inside.append((self.index_of[id(entry.tensor)], "weight", DTYPE_NAMES[room.dtype], None, room.view(-1), None))
            if room is not tensor:
                copies.append((tensor, room))
        try:
            if inside:
                self.core.pull(inside)
            for tensor, room in copies:
                tensor.copy_(room)
        finally:  # a pull that fails may have written some
            self._written([entry.tensor for entry in entries])

    def pull_tracked(self) -> None:
        """The committed weights of the trained parameters: each rank fetches its slices, the group passes them round."""
        start = time.perf_counter()
        if self.workers.alone:
            self.pull([self.entries[index] for index in self._seen_versions])
            self.seconds["pull"] = time.perf_counter() - start
            return
        self.seconds |= {"pull": 0.0, "gather": 0.0}
        errors: list[Exception] = []
        for bucket in self._buckets:
            self._pull_bucket(bucket, errors)
        self._written([self.entries[index].tensor for index in self._seen_versions])

        def check() -> None:
            if errors:
                raise errors[0]
        self.workers.together(check)

    def _pull_bucket(self, bucket: Bucket, errors: list[Exception]) -> None:
        """A pull that fails goes to `errors`, and the slices here stay what they are: the other ranks wait in the gather."""
        start = time.perf_counter()
        rank = self.workers.rank
        own = torch.empty(bucket.sizes[rank], dtype=bucket.dtype)
        parts = [(piece.index, "weight", DTYPE_NAMES[bucket.dtype], (piece.begin, piece.end - piece.begin),
                  own[piece.offset:piece.offset + piece.end - piece.begin], None) for piece in bucket.segments[rank]]
        try:
            if parts and not errors:
                self.core.pull(parts)
        except Exception as error:
            errors.append(error)
        if errors:
            for piece in bucket.segments[rank]:
                flat = self.entries[piece.index].tensor.detach().reshape(-1)
                own[piece.offset:piece.offset + piece.end - piece.begin].copy_(flat[piece.begin:piece.end])
        pulled = time.perf_counter()
        for pieces, segment in zip(bucket.segments, self.workers.gather(bucket, own)):
            for piece in pieces:
                _copy_flat(self.entries[piece.index].tensor.detach(), piece.begin,
                           segment[piece.offset:piece.offset + piece.end - piece.begin])
        self.seconds["pull"] += pulled - start
        self.seconds["gather"] += time.perf_counter() - pulled

    def _written(self, tensors: list[torch.Tensor]) -> None:
        """Tells autograd that these tensors changed (the client wrote past it) and notes their versions."""
        torch.autograd.graph.increment_version(tensors)
        for tensor in tensors:
            index = self.index_of[id(tensor)]
            if index in self._seen_versions:
                self._seen_versions[index] = _version(tensor)


def _version(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor._version, tensor.data_ptr()


def _copy_flat(tensor: torch.Tensor, begin: int, values: torch.Tensor) -> None:
    if tensor.is_contiguous():
        tensor.view(-1)[begin:begin + values.numel()].copy_(values)
        return
    whole = tensor.contiguous()
    whole.view(-1)[begin:begin + values.numel()].copy_(values)
    tensor.copy_(whole)
