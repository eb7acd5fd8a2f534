"""One job from a worker's side: its tensors, its place among the contributors, and the traffic of a step."""

from __future__ import annotations

import time
from typing import Any

import torch

from . import _core
from .errors import Aborted, EditedWeights, FailedPrecondition
from .names import DTYPE_NAMES, Entry
from .workers import Bucket, Workers

Part = tuple[int, str, str, "tuple[int, int] | None", torch.Tensor, "int | None"]

STEP_TRIES = 8  # attempts of one step that servers may give up (restarts) before the error is the caller's


def part(index: int, tensor: torch.Tensor, slot: str = "", flat: tuple[int, int] | None = None,
         applied_count: int | None = None) -> Part:
    """What the client sends or fills: `tensor` must be contiguous host memory for a pull; for a push it is made so."""
    host = tensor.detach().contiguous().cpu().view(-1)
    return index, slot, DTYPE_NAMES[tensor.dtype], flat, host, applied_count


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
        created: list[_core.Session] = []

        def create() -> bool:
            created.append(client.create_job(name, specs))
            return created[0].existed

        self.existed: bool = self.workers.run_first(create)
        self.core = created[0] if created else client.create_job(name, specs)
        self.joined = False
        self.seconds: dict[str, float] = {}
        self._layout: dict[str, Any] = {}
        self._seen_versions: dict[int, tuple[int, int]] = {}
        self._buckets: list[Bucket] = []

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
        self.workers.run_first(lambda: self.core.set_state(parts))
        self.core.commit(load=True)

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

    def present(self, gradients: dict[int, torch.Tensor]) -> set[int]:
        """Tensors that some rank has a gradient for, as manifest indexes."""
        tracked = list(self._seen_versions)
        return {index for index, some in zip(tracked, self.workers.any_of([index in gradients for index in tracked])) if some}

    def reduce(self, gradients: dict[int, torch.Tensor], present: set[int], reduced: bool) -> tuple[list[Part], list[int]]:
        """What this rank pushes, and which of its tensors nobody has a gradient for, as manifest indexes.

        `gradients` are flat. With several workers: averaged here (or taken as they are, if `reduced`), this rank's slice of each.
        """
        start = time.perf_counter()
        tracked = list(self._seen_versions)
        if self.workers.alone:
            parts = [part(index, gradient) for index, gradient in gradients.items()]
            return parts, [index for index in tracked if index not in gradients]
        parts = []
        for bucket in self._buckets:
            for piece, values in self._slices(bucket, gradients, reduced):
                if piece.index in present:
                    parts.append(part(piece.index, values, flat=(piece.begin, piece.end - piece.begin)))
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

    def make_step(self, parts: list[Part], pushes: list[_core.Push], groups: list[dict[str, float]], absent: list[int],
                  loss_scale: float) -> dict[str, Any]:
        """Pushes (what `pushes` did not bring already), commits, and answers the decision. Redoes attempts that servers gave up.

        `parts` is everything this rank contributes, for the redo.
        """
        target = self.step + 1
        for tries in range(STEP_TRIES):
            try:
                start = time.perf_counter()
                for push in pushes or [self.push(parts, loss_scale)]:
                    if push is not None:
                        push.wait()
                pushed = time.perf_counter()
                decision = self.core.commit(groups=groups, absent_tensors=absent, loss_scale=loss_scale)
                self.seconds |= {"push": pushed - start, "commit": time.perf_counter() - pushed}
                return decision
            except (Aborted, FailedPrecondition) as error:
                if tries + 1 == STEP_TRIES:
                    raise
                decided = self._recover(error, target)
                if decided is not None:
                    return decided
                pushes = []
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
        if inside:
            self.core.pull(inside)
        for tensor, room in copies:
            tensor.copy_(room)
        self._written([entry.tensor for entry in entries])

    def pull_tracked(self) -> None:
        """The committed weights of the trained parameters: each rank fetches its slices, the group passes them round."""
        start = time.perf_counter()
        if self.workers.alone:
            self.pull([self.entries[index] for index in self._seen_versions])
            self.seconds["pull"] = time.perf_counter() - start
            return
        self.seconds |= {"pull": 0.0, "gather": 0.0}
        for bucket in self._buckets:
            self._pull_bucket(bucket)
        self._written([self.entries[index].tensor for index in self._seen_versions])

    def _pull_bucket(self, bucket: Bucket) -> None:
        start = time.perf_counter()
        rank = self.workers.rank
        own = torch.empty(bucket.sizes[rank], dtype=bucket.dtype)
        parts = [(piece.index, "weight", DTYPE_NAMES[bucket.dtype], (piece.begin, piece.end - piece.begin),
                  own[piece.offset:piece.offset + piece.end - piece.begin], None) for piece in bucket.segments[rank]]
        if parts:
            self.core.pull(parts)
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
