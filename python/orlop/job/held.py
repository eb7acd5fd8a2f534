"""Which tensors of this process differ from what the servers hold of them.

torch's version counter does not count every change of a tensor (``parameter.data``, numpy's views and other processes write past it), and
it counts changes that change no value. So the values themselves are compared, by their digest (XXH3-128), before a step and after its pull.
Each time that is a pass over the memory, at 10 to 20 GB/s on one thread (``orlop bench kernels``, ``kernels.digest``). What is on a device
is hashed there, so that nothing is copied for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .. import _core, tensors
from ..names import Entry

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the bytes of an element
_RANGE = 1 << 22  # elements whose sum is made at a time


class Held:
    """What the servers held of tensors when they were last equal to those of this process.

    Parameters
    ----------
    entries : list of Entry
        The job's tensors in the order of the manifest.
    """

    def __init__(self, entries: list[Entry]) -> None:
        self._entries = entries
        self._digests: dict[int, str] = {}

    def __contains__(self, index: int) -> bool:
        """Whether anything was noted of a tensor."""
        return index in self._digests

    def note(self, indexes: Iterable[int]) -> None:
        """Notes that the servers hold these tensors, by manifest index, as they are here now."""
        indexes = list(indexes)
        self._digests |= zip(indexes, digests([self._entries[index].tensor for index in indexes]))

    def changed(self, indexes: Iterable[int]) -> list[int]:
        """Those of these tensors that differ from what was noted, or of which nothing was noted."""
        indexes = list(indexes)
        now = digests([self._entries[index].tensor for index in indexes])
        return [index for index, digest in zip(indexes, now) if self._digests.get(index) != digest]


def digests(some: list[torch.Tensor]) -> list[str]:
    """The digests of tensors' values, of a DTensor those that are here. In host memory they are the same on every machine for the same bits
    in the same order."""
    values = [tensors.host(tensor) if tensor.device.type == "cpu" else None for tensor in some]
    in_host = iter(_core.digests([(value.data_ptr(), value.nbytes) for value in values if value is not None], torch.get_num_threads()))
    return [next(in_host) if value is not None else digest_on_device(tensor) for tensor, value in zip(some, values)]


def digest_on_device(tensor: torch.Tensor) -> str:
    """A digest that is computed where the tensor is: sums of its bits, weighted by their places, of ranges of 4 Mi elements."""
    flat = tensors.local(tensor).resolve_conj().resolve_neg().contiguous().view(-1)
    bits = flat.view(_INTEGERS[flat.element_size()])
    places = torch.arange(1, min(bits.numel(), _RANGE) + 1, dtype=torch.int64, device=bits.device)
    sums = [(part.to(torch.int64) * places[:part.numel()]).sum() for part in bits.split(_RANGE)]
    return " ".join(f"{value & (2**64 - 1):016x}" for value in torch.stack(sums).tolist())
