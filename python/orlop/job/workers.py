"""The group of training processes: who pushes and pulls which part.

With several processes every tensor is cut into one flat slice per rank (``FLAT_SLICES`` of the protocol). Each rank pushes the average
of its slice and pulls the new weights of its slice, so that one copy of everything passes the servers, whatever the number of workers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..errors import Aborted

if dist.is_available():
    # Its functions have the default group as default argument. Imported only by the first optimizer, after init_process_group, they keep
    # that group and gloo's threads past destroy_process_group, and such a thread that frees a tensor while Python ends aborts the process.
    import torch.distributed.nn.functional  # noqa: F401

BUCKET_BYTES = 8 << 20  # gradients averaged and weights gathered at a time: a worker needs about three times this beside its tensors
QUANT_BLOCK = 256


def slice_of(count: int, rank: int, world_size: int) -> tuple[int, int]:
    """The flat range [begin, end) of a tensor of `count` elements that `rank` owns; whole 256-blocks, empty if there are too few.

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
    """Where a rank's part of one tensor lies: flat range of the tensor, offset in that rank's segment of the bucket."""

    index: int
    begin: int
    end: int
    offset: int


class Bucket:
    """Tensors of one dtype that travel together; per rank one segment, its slices one after another."""

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
        """Buckets for tensors by manifest index, in that order."""
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
        self.rank: int = dist.get_rank() if together else 0
        self.world_size: int = dist.get_world_size() if together else 1
        self._gathered: list[dist.Work] = []  # kept until the next gather, so that not a thread of gloo but this one frees them

    @property
    def alone(self) -> bool:
        return self.world_size == 1

    def agree(self, value: Any) -> Any:
        """Rank 0's plain value, on every rank."""
        if self.alone:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def run_first(self, action: Any) -> Any:
        """Rank 0's result of `action()` on every rank; its exception too, so that nobody is left waiting."""
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
        """`action()`'s result, once it succeeded on every rank. If it raised on some, every rank raises: none is left in a collective."""
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
        """Per position: whether any rank says so."""
        if self.alone:
            return flags
        mask = torch.tensor(flags, dtype=torch.int32, device=self._device())
        dist.all_reduce(mask, op=dist.ReduceOp.MAX)
        return [bool(flag) for flag in mask.tolist()]

    def average(self, bucket: Bucket, gradients: dict[int, torch.Tensor]) -> list[tuple[Slice, torch.Tensor]]:
        """This rank's slices of the mean gradient over all ranks; a gradient that is missing here counts as zero.

        All-to-all and a sum in rank order: the order of additions is fixed, the sum is fp32, and each byte crosses once (gloo's
        reduce_scatter and all_reduce move twice as much: 0.7 GB/s of fp32 gradient against 2.1, two processes on one host).
        """
        sent = torch.zeros(sum(bucket.sizes), dtype=bucket.dtype, device=self._device())
        for segment, room in zip(bucket.segments, sent.split(bucket.sizes)):
            for part in segment:
                if part.index in gradients:
                    room[part.offset:part.offset + part.end - part.begin].copy_(gradients[part.index][part.begin:part.end])
        own = bucket.sizes[self.rank]
        received = torch.empty(own * self.world_size, dtype=bucket.dtype, device=sent.device)
        dist.all_to_all_single(received, sent, [own] * self.world_size, bucket.sizes)
        total = received[:own].float()  # where it is fp32 already, summed in place
        for rank in range(1, self.world_size):
            total += received[rank * own:(rank + 1) * own]
        mean = (total / self.world_size).to(bucket.dtype).cpu()
        return [(part, mean[part.offset:part.offset + part.end - part.begin]) for part in bucket.segments[self.rank]]

    def gather(self, bucket: Bucket, own: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's segment, given this rank's. One broadcast per rank: 2.6 GB/s where gloo's all_gather makes 1.0."""
        segments, pending = [], []
        for rank, size in enumerate(bucket.sizes):
            segment = own if rank == self.rank else torch.empty(size, dtype=bucket.dtype)
            segment = segment.to(self._device())
            if size:
                pending.append(dist.broadcast(segment, src=rank, async_op=True))
            segments.append(segment)
        for work in pending:
            work.wait()
        self._gathered = pending
        return segments

    def _device(self) -> torch.device:
        if not self.alone and dist.get_backend() == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")
