"""Parts of tensors as the client sends and fills them, and gradients made smaller for it (``gradient_wire``)."""

from __future__ import annotations

from typing import Any

import torch

from .. import _core, tensors
from ..names import DTYPE_NAMES

Part = tuple[int, str, str, "tuple[Any, Any] | None", torch.Tensor, "int | None"]
"""Manifest index, slot, dtype name, box, flat host memory, and applied count, as ``_core.pyi`` describes them."""

CASTS = {None: None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRADIENT_WIRES = (*CASTS, "int8")


def part(index: int, tensor: torch.Tensor, slot: str = "", box: tuple[Any, Any] | None = None,
         applied_count: int | None = None) -> Part:
    """A part that is sent: `tensor`, copied to contiguous host memory if it is elsewhere. Of a DTensor, the box that is here.

    Parameters
    ----------
    index : int
        Of the tensor in the manifest.
    tensor : torch.Tensor
        Values of the box, in its order.
    slot : str
        Empty for a gradient.
    box : tuple, optional
        Offset and extent in the flattened tensor, or tuples of them, one for each dimension. None: the whole tensor.
    applied_count : int, optional
        Updates that a loaded state has seen.
    """
    if tensors.is_distributed(tensor):
        box = tensors.box(tensor)
    return index, slot, DTYPE_NAMES[tensor.dtype], box, tensors.host(tensor), applied_count


class GradientWire:
    """Encodes gradients for the network.

    With ``"int8"`` (``kernels/int8_blocks.h``) the residual, which is what the codes lose of a gradient, is kept and added to the next
    gradient: 2 bytes (bf16) per element that this process pushes, 4 while a step is open. Residuals are divided by the loss scale, so the
    loss scale may change. A residual advances when its step is applied, and only then: a step that is repeated, aborted or skipped is
    encoded from the same residual, so the same gradient gives the same bits. A process that joins anew begins with residuals of zero,
    which loses less than one quantum of each element.

    Parameters
    ----------
    kind : str or None
        One of :data:`GRADIENT_WIRES`; None sends a gradient in its own dtype.
    shard_elements : int
        Elements of a shard of the job. Every shard's piece is encoded separately.
    """

    def __init__(self, kind: str | None, shard_elements: int) -> None:
        self._kind = kind
        self._shard_elements = shard_elements
        self._residuals: dict[tuple[int, tensors.Box | None], torch.Tensor] = {}
        self._next: dict[tuple[int, tensors.Box | None], torch.Tensor] = {}  # residuals if the open step is applied

    def part(self, index: int, gradient: torch.Tensor, loss_scale: float, box: tensors.Box | None = None) -> Part:
        """A part of the open step: a gradient of a loss that was multiplied by `loss_scale`, whole or of one box. int8: a flat range."""
        if self._kind != "int8":
            return part(index, gradient.to(CASTS[self._kind] or gradient.dtype), box=box)
        host = part(index, gradient)[4]
        key, first, count = (index, box), box[0] if box else 0, host.numel()
        residual = self._residuals.get(key)
        if residual is None:
            residual = self._residuals[key] = torch.zeros(count, dtype=torch.bfloat16, device="cpu")
        self._next[key] = torch.empty_like(residual)
        encoded = torch.empty(_core.kernel_int8_bytes(first, count, self._shard_elements), dtype=torch.uint8, device="cpu")
        _core.kernel_encode_int8((host.data_ptr(), str(host.dtype).removeprefix("torch.")), first, count, self._shard_elements, loss_scale,
                                 residual.data_ptr(), self._next[key].data_ptr(), encoded.data_ptr(), torch.get_num_threads())
        return index, "", "I8_BLOCK", box, encoded, None

    def settle(self, outcome: str | None) -> None:
        """Ends the step whose parts were made last. `outcome` is the decision's; None if the step was not made."""
        if outcome == "APPLY":
            self._residuals |= self._next
        self._next = {}
