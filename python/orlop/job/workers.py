"""The group of training processes: which of them pushes and pulls which part.

With several processes every tensor is cut into one flat slice per rank (``FLAT_SLICES`` of the protocol). Each rank pushes the average
of its slice and pulls the new weights of its slice, so the servers send and receive everything once, whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import os
import pickle
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from .. import _core
from ..errors import Aborted

if dist.is_available():
    # The functions of this module have the default group as default argument. If the first optimizer imported it, after
    # init_process_group, they would keep that group and gloo's threads past destroy_process_group. If such a thread frees a tensor while
    # Python ends, the process aborts.
    import torch.distributed.nn.functional

# What the last collectives on host memory left. gloo's thread lets go of a collective some time after it is done. If it is the last to hold
# it while Python ends, it waits for Python's lock and the process aborts ("terminate called without an active exception", torch 2.13).
# This list lives until the modules go, in the thread that ends Python.
_last: list[dist.Work] = []

BUCKET_BYTES = 8 << 20  # gradients averaged and weights gathered at a time: a worker needs about three times this beside its tensors
QUANT_BLOCK = 256  # elements; a slice begins where a block of quantised state begins


def slice_of(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The flat range [begin, end) of a tensor of `count` elements that `rank` owns. It begins at a multiple of 256, and may be empty.

    Examples
    --------
    >>> slice_of(1000, 0, 2), slice_of(1000, 1, 2)
    ((0, 512), (512, 1000))
    """
    per_rank = -(-count // world_size)
    per_rank = -(-per_rank // QUANT_BLOCK) * QUANT_BLOCK
    return min(rank * per_rank, count), min((rank + 1) * per_rank, count)


@dataclass
class Slice:
    """A rank's part of one tensor.

    Attributes
    ----------
    index : int
        Of the tensor in the manifest.
    begin, end : int
        Flat range of the tensor.
    offset : int
        Where the part begins in that rank's segment of the bucket.
    """

    index: int
    begin: int
    end: int
    offset: int

    @property
    def flat(self) -> tuple[int, int]:
        """Offset and count in the flattened tensor, as a part has them."""
        return self.begin, self.end - self.begin

    def of(self, segment: torch.Tensor) -> torch.Tensor:
        """A view of this part in its rank's segment."""
        return segment[self.offset:self.offset + self.end - self.begin]


class Bucket:
    """Tensors of one dtype that are averaged and gathered together.

    Attributes
    ----------
    dtype : torch.dtype
    segments : list of list of Slice
        For each rank its slices, which its segment holds one after another.
    sizes : list of int
        Elements of each rank's segment.
    """

    def __init__(self, dtype: torch.dtype, members: list[tuple[int, int]], world_size: int) -> None:
        self.dtype = dtype
        self.segments: list[list[Slice]] = []
        self.sizes: list[int] = []
        for rank in range(world_size):
            offset, segment = 0, []
            for index, count in members:
                begin, end = slice_of(count, rank, world_size)
                if begin < end:
                    segment.append(Slice(index, begin, end, offset))
                    offset += end - begin
            self.segments.append(segment)
            self.sizes.append(offset)

    @staticmethod
    def pack(tensors: dict[int, torch.Tensor], world_size: int) -> list[Bucket]:
        """Buckets of at most :data:`BUCKET_BYTES`, or of one larger tensor, for tensors by manifest index, in that order."""
        buckets: list[Bucket] = []
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
            members: list[tuple[int, int]] = []
            room = BUCKET_BYTES
            for index, tensor in tensors.items():
                if tensor.dtype != dtype:
                    continue
                if members and tensor.nbytes > room:
                    buckets.append(Bucket(dtype, members, world_size))
                    members, room = [], BUCKET_BYTES
                members.append((index, tensor.numel()))
                room -= tensor.nbytes
            buckets.append(Bucket(dtype, members, world_size))
        return buckets


class Workers:
    """The processes that train together: this one alone, or all of ``torch.distributed``'s default group."""

    def __init__(self) -> None:
        together = dist.is_available() and dist.is_initialized()
        self._process = os.getpid()
        self.rank: int = dist.get_rank() if together else 0
        self.world_size: int = dist.get_world_size() if together else 1

    @property
    def alone(self) -> bool:
        """Whether this is the only process. RuntimeError in a forked child, whose messages would mix with its parent's."""
        _core.check_process(self._process)
        return self.world_size == 1

    def agree(self, value: Any) -> Any:
        """Broadcasts rank 0's picklable `value` to every rank."""
        if self.alone:
            return value
        data = self._bytes(pickle.dumps(value if self.rank == 0 else None))
        size = torch.tensor([data.numel()], dtype=torch.int64, device=data.device)
        _wait(dist.broadcast(size, src=0, async_op=True))
        if self.rank != 0:
            data = data.new_empty(int(size))
        _wait(dist.broadcast(data, src=0, async_op=True))
        return value if self.rank == 0 else pickle.loads(data.cpu().numpy())

    def all_of(self, value: Any) -> list[Any]:
        """Gathers every rank's picklable `value` on every rank, in rank order."""
        if self.alone:
            return [value]
        data = self._bytes(pickle.dumps(value))
        sizes = torch.empty(self.world_size, dtype=torch.int64, device=data.device)
        size = torch.tensor([data.numel()], dtype=torch.int64, device=data.device)
        _wait(dist.all_gather(list(sizes.split(1)), size, async_op=True))
        longest = int(sizes.max())
        gathered = data.new_empty(self.world_size * longest)
        padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
        _wait(dist.all_gather(list(gathered.split(longest)), padded, async_op=True))
        return [pickle.loads(one[:size].numpy()) for one, size in zip(gathered.cpu().split(longest), sizes.tolist())]

    def check_same(self, described: list[tuple[str, str]]) -> None:
        """Compares descriptions of the ranks' tensors: pairs of a name and words.

        Raises
        ------
        ValueError
            A rank has another description than rank 0. Every rank raises, and names the first tensor that differs.
        """
        if len(set(self.all_of(hashlib.sha256(repr(described).encode()).digest()))) == 1:
            return
        first = self.agree(described)
        pair = next((pair for pair in zip_longest(first, described) if pair[0] != pair[1]), None)
        rank, (one, other) = next((rank, pair) for rank, pair in enumerate(self.all_of(pair)) if pair is not None)
        raise ValueError(f"the ranks have different tensors; the first that differs is {_words(one)} on rank 0 and {_words(other)} on rank "
                         f"{rank}: build the same model and optimizer on every rank")

    def run_first(self, action: Any) -> Any:
        """Calls `action()` on rank 0 and returns its result on every rank. An exception is raised on every rank, too."""
        outcome: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                outcome = (action(), None)
            except Exception as error:
                if self.alone:
                    raise
                outcome = (None, error)
        result, error = self.agree(outcome)
        if error is not None:
            raise error
        return result

    def together(self, action: Any) -> Any:
        """Calls `action()` on every rank and returns its result. If it raises on one rank, every rank raises, so none waits for another."""
        if self.alone:
            return action()
        result, error = None, None
        try:
            result = action()
        except Exception as raised:
            error = raised
        (failed,) = self.any_of([error is not None])
        if error is not None:
            raise error
        if failed:
            raise Aborted("another rank could not do its part; its error says why")
        return result

    def any_of(self, flags: list[bool]) -> list[bool]:
        """Ors the flags of all ranks, position by position."""
        if self.alone:
            return flags
        mask = torch.tensor(flags, dtype=torch.int32, device=self._device())
        _wait(dist.all_reduce(mask, op=dist.ReduceOp.MAX, async_op=True))
        return [bool(flag) for flag in mask.tolist()]

    def average(self, bucket: Bucket, gradients: dict[int, torch.Tensor]) -> list[tuple[Slice, torch.Tensor]]:
        """Averages the gradients of a bucket over all ranks.

        An all-to-all is followed by a sum in fp32 in rank order, so the order of additions is fixed and each byte is sent once. gloo's
        reduce_scatter and all_reduce send twice as much (0.7 GB/s of fp32 gradient against 2.1, two processes on one host).

        Parameters
        ----------
        bucket : Bucket
        gradients : dict of int to torch.Tensor
            Flat gradients by manifest index. One that is missing counts as zero.

        Returns
        -------
        list of (Slice, torch.Tensor)
            This rank's slices, with views of host memory in the dtype of the bucket.
        """
        sent = torch.zeros(sum(bucket.sizes), dtype=bucket.dtype, device=self._device())
        for segment, room in zip(bucket.segments, sent.split(bucket.sizes)):
            for part in segment:
                if part.index in gradients:
                    part.of(room).copy_(gradients[part.index][part.begin:part.end])
        own = bucket.sizes[self.rank]
        received = torch.empty(own * self.world_size, dtype=bucket.dtype, device=sent.device)
        _wait(dist.all_to_all_single(received, sent, [own] * self.world_size, bucket.sizes, async_op=True))
        total = received[:own].float()  # a view if it is fp32 already
        for rank in range(1, self.world_size):
            total += received[rank * own:(rank + 1) * own]
        mean = (total / self.world_size).to(bucket.dtype).cpu()
        return [(part, part.of(mean)) for part in bucket.segments[self.rank]]

    def gather(self, bucket: Bucket, own: torch.Tensor) -> list[torch.Tensor]:
        """Gathers every rank's segment, given this rank's `own`, by one broadcast per rank (2.6 GB/s; gloo's all_gather: 1.0)."""
        segments, pending = [], []
        for rank, size in enumerate(bucket.sizes):
            segment = own if rank == self.rank else torch.empty(size, dtype=bucket.dtype, device="cpu")
            segment = segment.to(self._device())
            if size:
                pending.append(dist.broadcast(segment, src=rank, async_op=True))
            segments.append(segment)
        _wait(*pending)
        return segments

    def _bytes(self, data: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(data), dtype=torch.uint8).to(self._device())

    def _device(self) -> torch.device:
        if not self.alone and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")


def _wait(*works: dist.Work) -> None:
    for work in works:
        work.wait()
    if dist.get_backend() != "nccl":
        _last[:] = works


def _words(described: tuple[str, str] | None) -> str:
    return "no tensor" if described is None else f"{described[0]!r} ({described[1]})"
