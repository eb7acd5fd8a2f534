"""Optimizer states as codes, scales and a code book."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from .. import kernels
from ..job.job import Part, part
from ..names import step_count
from .view import View

BOOK_ULPS = 2  # how far a library's book may be from the closed form: torch's linspace sets the last bits


@dataclass(frozen=True)
class Quantised:
    """A state as codes of any library's book.

    Attributes
    ----------
    codes : torch.Tensor
        uint8, of the parameter's shape: one code per element, also with 4 bits.
    absmax : torch.Tensor
        fp32 [blocks]: one scale per `block` consecutive elements of the flattened state. The last block may be shorter.
    book : torch.Tensor
        fp32 [256 or 16], ascending: the value of each code.
    block : int
        Elements that share a scale.

    Examples
    --------
    >>> book = kernels.code_book("8bit", True)
    >>> Quantised(torch.tensor([127, 255], dtype=torch.uint8), torch.tensor([2.0]), book, 256).float()
    tensor([0., 2.])
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    book: torch.Tensor
    block: int

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def state(self) -> str:
        """The format as groups call it: ``"8bit"`` or ``"4bit"``."""
        return "8bit" if self.book.numel() == 256 else "4bit"

    def clone(self) -> Quantised:
        return replace(self, codes=self.codes.clone(), absmax=self.absmax.clone(), book=self.book.clone())

    def float(self) -> torch.Tensor:
        """The values in fp32, of the parameter's shape: ``book[code] * absmax``, rounded once, as in the libraries."""
        codes = self.codes.reshape(-1)
        return (self.book[codes.long()] * self.absmax.repeat_interleave(self.block)[:codes.numel()]).view(self.shape)

    def fits(self, state: str, is_signed: bool) -> bool:
        """Whether the servers' format `state` has codes of these bits, blocks that divide these and, to :data:`BOOK_ULPS`, this book."""
        if state != self.state or self.block % kernels.BLOCK[state]:
            return False
        ulps = self.book.view(torch.int32).long() - kernels.code_book(state, is_signed).view(torch.int32).long()
        return int(ulps.abs().max()) <= BOOK_ULPS

    def stored(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes and scales as the servers store them: flat, one scale per block of the servers, 4-bit codes in pairs, the first one in
        the low bits."""
        count, own = self.codes.numel(), kernels.BLOCK[self.state]
        codes = packed(self.codes.reshape(-1), first_is_low=True) if self.state == "4bit" else self.codes.reshape(-1)
        return codes, self.absmax.repeat_interleave(self.block // own)[:-(-count // own)].contiguous()


def parts(index: int, slot: str, value: Quantised, applied_count: int, stored: dict[str, Any]) -> list[Part]:
    """The parts by which a LOAD step sets one quantised state: its codes and scales if the servers keep that format, else its values.

    Parameters
    ----------
    index : int
        Of the tensor in the manifest.
    slot : str
        Name of the state.
    value : Quantised
    applied_count : int
        Updates that the state has seen.
    stored : dict
        The tensor as the servers list it (``TensorSummary``), with its ``optimizer`` and ``state``.

    Returns
    -------
    list of Part
    """
    if stored["state"] in kernels.BLOCK and value.fits(stored["state"], kernels.optimizers()[stored["optimizer"]]["states"][slot]):
        codes, absmax = value.stored()
        whole = (0, value.codes.numel())
        return [part(index, codes, slot, whole, applied_count), part(index, absmax, f"{slot}_absmax", whole, applied_count)]
    return [part(index, value.float(), slot, applied_count=applied_count)]


def read(view: View, stored: dict[str, Any], slot: str) -> Quantised | torch.Tensor:
    """Reads the state `slot` of a tensor (``TensorSummary``) in the format in which the servers store it."""
    state, shape, count = stored["state"], stored["spec"]["shape"], stored["element_count"]
    if state not in kernels.BLOCK:
        return view.find_session().get(stored["spec"]["name"], slot)
    block = kernels.BLOCK[state]
    codes = torch.empty(count if state == "8bit" else -(-count // 2), dtype=torch.uint8, device="cpu")
    absmax = torch.empty(-(-count // block), dtype=torch.float32, device="cpu")
    index, whole = stored["index"], (0, count)
    view.job.handle.pull([(index, slot, "U8", whole, codes, None), (index, f"{slot}_absmax", "F32", whole, absmax, None)], latest=True)
    if state == "4bit":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).reshape(-1)[:count]
    book = kernels.code_book(state, kernels.optimizers()[stored["optimizer"]]["states"][slot])
    return Quantised(codes.view(shape), absmax, book, block)


def packed(codes: torch.Tensor, first_is_low: bool) -> torch.Tensor:
    """Packs flat 4-bit codes in pairs, one byte each. The last of an odd number is paired with 0."""
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    first, second = codes[::2], codes[1::2]
    return first | second << 4 if first_is_low else first << 4 | second


def checked(name: str, what: str, codes: torch.Tensor, absmax: torch.Tensor, book: torch.Tensor, blocks: tuple[int, ...]) -> Quantised:
    """A state of another library, checked.

    Parameters
    ----------
    name, what : str
        Parameter and state, for messages.
    codes, absmax, book : torch.Tensor
        As :class:`Quantised` has them.
    blocks : tuple of int
        The library's block sizes. The first that gives as many scales as `absmax` has is taken.

    Raises
    ------
    ValueError
        The book, the number of scales, a scale or a code is impossible.
    """
    check_book(name, what, book)
    count, length = codes.numel(), absmax.numel()
    fitting = [block for block in blocks if -(-count // block) == length]
    if absmax.dim() != 1 or not fitting:
        wanted = " or ".join(f"{-(-count // block)} (blocks of {block})" for block in blocks)
        raise ValueError(f"scales of {what} of {name!r} have shape {list(absmax.shape)}; {count} elements have {wanted}")
    absmax = absmax.detach().cpu().float()
    wrong = ~(absmax.isfinite() & (absmax >= 0))
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"scale {place} of {what} of {name!r} is {float(absmax[place])}; finite and at least 0")
    if count and int(codes.max()) >= book.numel():
        raise ValueError(f"{what} of {name!r} has code {int(codes.max())}; its book has {book.numel()} entries")
    return Quantised(codes.detach().cpu().contiguous(), absmax.contiguous(), book.detach().cpu().contiguous(), fitting[0])


def check_book(name: str, what: str, book: torch.Tensor) -> None:
    """ValueError unless `book` is fp32 [256 or 16], finite and ascending."""
    if book.dtype != torch.float32 or book.dim() != 1 or book.numel() not in (256, 16):
        raise ValueError(f"the code book of {what} of {name!r} is {book.dtype} {list(book.shape)}; float32 with 256 or 16 entries")
    if not book.isfinite().all():
        raise ValueError(f"the code book of {what} of {name!r} has an entry that is not finite")
    falls = (book[1:] < book[:-1]).nonzero()
    if len(falls):  # equal neighbours are fine: bitsandbytes 0.36 to 0.41.0 wrote such books
        place = int(falls[0])
        raise ValueError(f"the code book of {what} of {name!r} is not ascending: entry {place} is {float(book[place])}, "
                         f"entry {place + 1} is {float(book[place + 1])}")


def update_count(name: str, values: dict[str, Any]) -> torch.Tensor:
    """The number of updates in a parameter's state, as torch keeps it. ValueError if it is not a whole number of at least 0."""
    step = values.get("step")
    if step is None or not float(step) >= 0 or float(step) != int(float(step)):
        raise ValueError(f"step of {name!r} is {step}; a whole number, at least 0")
    return step_count(step)
