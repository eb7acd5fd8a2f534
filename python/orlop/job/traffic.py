# One pull, 1 of 4 (ARCHITECTURE.md); next: client/lanes/grpc_pull.cc
"""Gradients from this process to the servers, and weights back into its tensors."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from .. import _core, tensors
from ..errors import EditedWeights
from ..names import DTYPE_NAMES, Entry
from .held import Held, digests
from .wire import GradientWire, Part
from .workers import Bucket, Slice, Workers, slice_of

TRIMMED_STEPS = (1, 2)  # after the one in which the job is joined
PULL_BYTES = 16 << 20  # a call of pull_tracked() takes the buckets of which this rank fetches so many bytes together


class Traffic:
    """The bytes of one job at one worker.

    A worker that is alone moves whole tensors. Of several, each moves its own flat slice of every tensor (:func:`workers.slice_of`). Of a
    DTensor each moves the box that it has; if several have the same box, the first of them sends it.

    Parameters
    ----------
    handle : orlop._core.JobHandle
    workers : Workers
    entries : list of Entry
        The job's tensors in the order of the manifest.
    boxes : dict of int to list
        Of :func:`boxes_of`.

    Attributes
    ----------
    index_of : dict of int to int
        Manifest index of a tensor by its ``id``.
    held : Held
        Which tensors of this process the servers hold as they are.
    unset : set of int
        Manifest indexes of the tensors that the servers have no value of: frozen ones that stay in this process until they change.
    wire : GradientWire
        How gradients are encoded.
    seconds : dict of str to float
        Time of the step that is being made, in seconds, by ``"reduce"``, ``"push"``, ``"commit"``, ``"pull"`` and ``"gather"``.
    """

    def __init__(self, handle: _core.JobHandle, workers: Workers, entries: list[Entry],
                 boxes: dict[int, list[tensors.Box | None]]) -> None:
        self.handle = handle
        self.workers = workers
        self.entries = entries
        self.boxes = boxes
        self.index_of = {id(entry.tensor): index for index, entry in enumerate(entries)}
        self.wire = GradientWire(None, handle.shard_elements)
        self.seconds: dict[str, float] = {}
        self.held = Held(entries)
        self.unset: set[int] = set()
        self._tracked: dict[int, None] = {}  # an ordered set
        self._steps_here = False
        self._buckets: list[Bucket] = []
        self._steps = 0  # since the last track()

    def track(self, indexes: list[int], gradient_wire: str | None, steps_here: bool) -> None:
        """Sets the trained parameters, as manifest indexes, and the encoding of their gradients.

        `steps_here` says that this process changes the parameters itself, so that a change is no edit.
        """
        if not self.workers.alone:
            self._buckets = Bucket.pack({index: self.entries[index].local for index in indexes if index not in self.boxes},
                                        self.workers.world_size)
        self._tracked, self._steps_here, self._steps = dict.fromkeys(indexes), steps_here, 0
        self.wire = GradientWire(gradient_wire, self.handle.shard_elements)

    @property
    def tracked(self) -> list[int]:
        """Manifest indexes of the trained parameters, ascending."""
        return list(self._tracked)

    def trains(self, index: int) -> bool:
        """Whether a tensor is one of :attr:`tracked`."""
        return index in self._tracked

    def edited(self) -> list[int]:
        """The parameters that the servers step and that have changed since the servers' weights were written into them."""
        return [] if self._steps_here else self.held.changed(self._tracked)

    def check_unedited(self) -> None:
        """Raises EditedWeights if there are :meth:`edited` ones."""
        edited = self.edited()
        if edited:
            name = self.entries[edited[0]].name
            others = f" and {len(edited) - 1} others were" if len(edited) > 1 else " was"
            raise EditedWeights(
                f"parameter {name!r}{others} changed outside the optimizer, and the servers do not know: session.store(model) keeps the "
                "edit (load_state_dict, clamping), session.load(model) brings the servers' weights back", {"tensor": name})

    def layout(self, indexes: list[int]) -> dict[str, Any]:
        """The boxes of the trained parameters that this rank pushes, each exactly once (``ContributionLayout``)."""
        rank, world_size = self.workers.rank, self.workers.world_size
        listed = []
        for index in indexes:
            begin, end = slice_of(self.entries[index].tensor.numel(), rank, world_size)
            box = self.boxes[index][rank] if index in self.boxes else (begin, end - begin)
            if self.is_first_with(index) if index in self.boxes else begin < end:
                listed.append({"tensor": index, "boxes": [_message(box, self.entries[index].tensor)]})
        return {"mode": "EXACTLY_ONCE", "preset": "EXPLICIT", "tensors": listed, "reduced_from": world_size}

    def is_first_with(self, index: int) -> bool:
        """Whether this rank has a box of a DTensor, and no rank before it has the same."""
        boxes, rank = self.boxes[index], self.workers.rank
        return boxes[rank] != tensors.NOTHING and boxes.index(boxes[rank]) == rank

    def sets(self, part: Part) -> bool:
        """Whether this rank sends a part of a LOAD step that all ranks have made: its own box of a DTensor, and rank 0 all else."""
        index, slot, _, box, *_ = part
        if index in self.boxes and slot not in ("row_var", "col_var") and box == self.boxes[index][self.workers.rank]:
            return self.is_first_with(index)
        return self.workers.rank == 0

    # Gradients.

    def reduce(self, gradients: dict[int, torch.Tensor], present: set[int], reduced: bool,
               loss_scale: float) -> tuple[list[Part], list[int]]:
        """Makes the parts that this rank pushes.

        Parameters
        ----------
        gradients : dict of int to torch.Tensor
            Flat gradients by manifest index.
        present : set of int
            Tensors for which some rank has a gradient.
        reduced : bool
            Whether the gradients are averaged over the ranks already. Otherwise they are averaged here.
        loss_scale : float
            Factor that the loss, and so every gradient, was multiplied by.

        Returns
        -------
        parts : list of Part
        absent : list of int
            Tensors, of those that this rank pushes, for which no rank has a gradient.
        """
        start = time.perf_counter()
        if self.workers.alone:
            parts = [self.wire.part(index, gradient, loss_scale) for index, gradient in gradients.items()]
            return parts, [index for index in self.tracked if index not in gradients]
        parts = [self.wire.part(index, gradients[index], loss_scale, self.entries[index].box)
                 for index in self.boxes if index in gradients and self.is_first_with(index)]
        for bucket in self._buckets:
            for piece, values in self._slices(bucket, gradients, reduced):
                if piece.index in present:
                    parts.append(self.wire.part(piece.index, values, loss_scale, piece.flat))
        mine = {piece.index for bucket in self._buckets for piece in bucket.segments[self.workers.rank]}
        mine |= {index for index in self.boxes if self.is_first_with(index)}
        self.seconds["reduce"] = time.perf_counter() - start
        return parts, [index for index in self.tracked if index in mine and index not in present]

    def _slices(self, bucket: Bucket, gradients: dict[int, torch.Tensor], reduced: bool) -> list[tuple[Slice, torch.Tensor]]:
        if not reduced:
            return self.workers.average(bucket, gradients)
        return [(piece, gradients[piece.index][piece.begin:piece.end]) for piece in bucket.segments[self.workers.rank]
                if piece.index in gradients]

    def count_step(self) -> None:
        """Notes that a step is about to be sent, and gives unused memory of the first ones back to the system.

        glibc aligns a large tensor by cutting a little off both sides of a block. The small objects that a step makes and keeps lie there
        afterwards, so a gradient's block, once freed, is too small for the next gradient, and a whole set of gradients is never used again.
        """
        if self._steps in TRIMMED_STEPS:
            _core.trim_heap()
        self._steps += 1

    def push(self, parts: list[Part], loss_scale: float) -> _core.Push | None:
        """Starts to send `parts`; None if there are none."""
        return self.handle.push_async(parts, loss_scale=loss_scale) if parts else None

    # Weights.

    def pull(self, entries: list[Entry]) -> None:
        """Writes the committed weights into these tensors, whole. Into a DTensor the part that is here. :attr:`unset` ones are left."""
        entries = [entry for entry in entries if self.index_of[id(entry.tensor)] not in self.unset]
        inside, copies = [], []
        for entry in entries:
            tensor = entry.local
            room = tensor if tensors.is_host_memory(tensor) else torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if room.numel():
                inside.append(self._weight_in(entry, room))
            if room is not tensor:
                copies.append((tensor, room))
        try:
            if inside:
                self.handle.pull(inside)
            for tensor, room in copies:
                tensor.copy_(room)
        finally:  # a pull that fails may have written some
            self._written([entry.tensor for entry in entries])

    def stored(self, index: int) -> torch.Tensor:
        """The newest committed value of a tensor, in a new CPU tensor of its shape and dtype. Of a DTensor the part that is here."""
        entry = self.entries[index]
        room = torch.empty(entry.local.shape, dtype=entry.tensor.dtype, device="cpu")
        if room.numel():
            self.handle.pull([self._weight_in(entry, room)], latest=True)
        return room

    def is_stored(self, index: int) -> bool:
        """Whether the servers' value of a tensor is the one here, bit for bit, which is then noted."""
        here, there = digests([self.entries[index].tensor, self.stored(index)])
        if here == there:
            self.held.note([index])
        return here == there

    def weight_and_master(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The newest committed weight of a parameter and its fp32 master, of one step, flat. Of a DTensor the parts that are here."""
        entry = self.entries[index]
        weight, master = (torch.empty(entry.local.numel(), dtype=dtype, device="cpu") for dtype in (entry.tensor.dtype, torch.float32))
        if weight.numel():
            self.handle.pull([(index, "weight", DTYPE_NAMES[entry.tensor.dtype], entry.box, weight, None),
                              (index, "master", "F32", entry.box, master, None)], latest=True)
        return weight, master

    def pull_tracked(self) -> None:
        """Writes the committed weights into the trained parameters. Each rank fetches its slices and broadcasts them to the others.

        It raises on every rank if it raises on one.
        """
        start = time.perf_counter()
        if self.workers.alone:
            self.pull([self.entries[index] for index in self._tracked])
            self.seconds["pull"] = time.perf_counter() - start
            return
        self.seconds |= {"pull": 0.0, "gather": 0.0}
        errors: list[Exception] = []
        self._pull_buckets(errors)
        try:
            if not errors:
                self.pull([self.entries[index] for index in self._tracked if index in self.boxes])
        except Exception as error:
            errors.append(error)
        self._written([self.entries[index].tensor for index in self._tracked])

        def check() -> None:
            if errors:
                raise errors[0]
        self.workers.together(check)

    def _weight_in(self, entry: Entry, room: torch.Tensor) -> Part:
        return self.index_of[id(entry.tensor)], "weight", DTYPE_NAMES[room.dtype], entry.box, room.view(-1), None

    def _pull_buckets(self, errors: list[Exception]) -> None:
        """Fetches and gathers the buckets, in calls of about :data:`PULL_BYTES`. A call is under way while those before it are gathered.

        If one fails, the error is appended to `errors` and this rank's slices keep their values from there on: the other ranks wait in the
        gather, so this one takes part in it.
        """
        calls = self._pull_calls()
        with ThreadPoolExecutor(max_workers=1) as ahead:
            coming = ahead.submit(self._fetch, calls[0]) if calls else None
            for place, buckets in enumerate(calls):
                start = time.perf_counter()
                try:
                    segments = coming.result() if not errors else self._here(buckets)
                except Exception as error:
                    errors.append(error)
                    segments = self._here(buckets)
                if place + 1 < len(calls) and not errors:
                    coming = ahead.submit(self._fetch, calls[place + 1])
                pulled = time.perf_counter()
                for bucket, own in zip(buckets, segments):
                    self._gather(bucket, own)
                self.seconds["pull"] += pulled - start
                self.seconds["gather"] += time.perf_counter() - pulled

    def _pull_calls(self) -> list[list[Bucket]]:
        """The buckets, in order, by the calls that fetch them."""
        calls: list[list[Bucket]] = []
        room = 0
        for bucket in self._buckets:
            if room <= 0:
                calls.append([])
                room = PULL_BYTES
            calls[-1].append(bucket)
            room -= bucket.sizes[self.workers.rank] * bucket.dtype.itemsize
        return calls

    def _fetch(self, buckets: list[Bucket]) -> list[torch.Tensor]:
        """This rank's segments of some buckets, from the servers. Any thread may call it."""
        segments = [torch.empty(bucket.sizes[self.workers.rank], dtype=bucket.dtype, device="cpu") for bucket in buckets]
        parts: list[Part] = [(piece.index, "weight", DTYPE_NAMES[bucket.dtype], piece.flat, piece.of(own), None)
                             for bucket, own in zip(buckets, segments) for piece in bucket.segments[self.workers.rank]]
        if parts:
            self.handle.pull(parts)
        return segments

    def _here(self, buckets: list[Bucket]) -> list[torch.Tensor]:
        """This rank's segments of some buckets as they are here."""
        segments = []
        for bucket in buckets:
            own = torch.empty(bucket.sizes[self.workers.rank], dtype=bucket.dtype, device="cpu")
            for piece in bucket.segments[self.workers.rank]:
                piece.of(own).copy_(self.entries[piece.index].local.reshape(-1)[piece.begin:piece.end])
            segments.append(own)
        return segments

    def _gather(self, bucket: Bucket, own: torch.Tensor) -> None:
        for pieces, segment in zip(bucket.segments, self.workers.gather(bucket, own)):
            for piece in pieces:
                _copy_flat(self.entries[piece.index].local, piece.begin, piece.of(segment))

    def _written(self, written: Iterable[torch.Tensor]) -> None:
        """Tells autograd that these tensors have changed, which it cannot see of the client's writes, and notes that they are held."""
        written = list(written)
        torch.autograd.graph.increment_version(written)
        self.held.note(self.index_of[id(tensor)] for tensor in written)


def _copy_flat(tensor: torch.Tensor, begin: int, values: torch.Tensor) -> None:
    if tensor.is_contiguous():
        tensor.view(-1)[begin:begin + values.numel()].copy_(values)
        return
    whole = tensor.contiguous()
    whole.view(-1)[begin:begin + values.numel()].copy_(values)
    tensor.copy_(whole)


def boxes_of(workers: Workers, entries: list[Entry]) -> dict[int, list[tensors.Box | None]]:
    """For each DTensor, by manifest index, the boxes of all ranks. Empty if this worker is alone. All ranks call it.

    Raises
    ------
    ValueError
        The boxes do not have every element of a tensor.
    """
    own = {index: entry.box for index, entry in enumerate(entries) if tensors.is_distributed(entry.tensor)}
    if workers.alone or not own:
        return {}
    ranks = workers.all_of(own)
    boxes = {index: [rank[index] for rank in ranks] for index in own}
    for index, some in boxes.items():
        tensor = entries[index].tensor
        count = sum(tensor.numel() if box is None else math.prod(box[1]) if isinstance(box[1], tuple) else box[1] for box in set(some))
        if count != tensor.numel():
            raise ValueError(f"tensor {entries[index].name!r} is a DTensor with placements {tensor.placements} on {tensor.device_mesh}, "
                             f"and the ranks have {count} of its {tensor.numel()} elements: place each element on one of the "
                             f"{workers.world_size} ranks of this job")
    return boxes


def _message(box: tensors.Box | None, tensor: torch.Tensor) -> dict[str, Any]:
    """A box as messages have it (``Box``)."""
    offset, extent = box if box is not None else ((0,) * tensor.dim(), tuple(tensor.shape))
    if isinstance(offset, tuple):
        return {"offset": list(offset), "extent": list(extent)}
    return {"offset": [offset], "extent": [extent], "flat": True}
