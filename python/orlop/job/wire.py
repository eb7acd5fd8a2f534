"""Parts of tensors on their way to the servers, and how a gradient is made smaller for it (``gradient_wire``)."""

from __future__ import annotations

from typing import Any

import torch

from .. import _core
from ..names import DTYPE_NAMES

Part = tuple[int, str, str, "tuple[Any, Any] | None", torch.Tensor, "int | None"]

CASTS = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
KINDS = (*CASTS, "int8")


def part(index: int, tensor: torch.Tensor, slot: str = "", box: tuple[Any, Any] | None = None,
         applied_count: int | None = None) -> Part:
    """What the client sends or fills: `tensor` must be contiguous host memory for a pull; for a push it is made so.

    `box` is offset and extent of the flattened tensor, or tuples of them, one for each dimension; None: all of it.
    """
    host = tensor.detach().contiguous().cpu().view(-1)
    return index, slot, DTYPE_NAMES[tensor.dtype], box, host, applied_count


class GradientWire:
    """Gradients as they travel.

    As ``"int8"`` (kernels/int8_blocks.h) what the codes lose of a gradient is kept, and added to the next one: 2 bytes (bf16) per
    element that this process pushes, 4 while a step is open. It is held in unscaled terms, so the loss scale may change. It moves on
    when the step is applied, and only then: a step that is repeated, aborted or skipped is encoded from the same residual, so the
    same gradient has the same bits. A process that joins anew begins with zero, and loses less than one quantum of each element.

    Parameters
    ----------
    kind : str or None
        One of :data:`KINDS`; None: as the gradient is.
    shard_elements : int
        Of the job: every piece is encoded by itself.
    """

    def __init__(self, kind: str | None, shard_elements: int) -> None:
        self._kind = kind
        self._shard_elements = shard_elements
        self._residuals: dict[tuple[int, tuple[int, int] | None], torch.Tensor] = {}
        self._next: dict[tuple[int, tuple[int, int] | None], torch.Tensor] = {}  # if the step is applied

    def part(self, index: int, gradient: torch.Tensor, loss_scale: float, flat: tuple[int, int] | None = None) -> Part:
        """A gradient that was multiplied by `loss_scale`, whole or of one flat range, to be pushed for the open step."""
        if self._kind != "int8":
            return part(index, gradient.to(CASTS[self._kind] or gradient.dtype), box=flat)
        host = part(index, gradient)[4]
        key, first, count = (index, flat), flat[0] if flat else 0, host.numel()
        residual = self._residuals.get(key)
        if residual is None:
            residual = self._residuals[key] = torch.zeros(count, dtype=torch.bfloat16)
        self._next[key] = torch.empty_like(residual)
        encoded = torch.empty(_core.kernel_int8_bytes(first, count, self._shard_elements), dtype=torch.uint8)
        _core.kernel_encode_int8((host.data_ptr(), str(host.dtype).removeprefix("torch.")), first, count, self._shard_elements, loss_scale,
                                 residual.data_ptr(), self._next[key].data_ptr(), encoded.data_ptr(), torch.get_num_threads())
        return index, "", "I8_BLOCK", flat, encoded, None

    def settle(self, outcome: str | None) -> None:
        """What became of the step whose parts were made last; None: its attempt is over and it was not made."""
        if outcome == "APPLY":
            self._residuals |= self._next
        self._next = {}
