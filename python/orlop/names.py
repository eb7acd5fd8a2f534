"""The tensors of a job and their names.

A tensor's name is its PyTorch name in the model without the prefixes of wrappers. Tied parameters are one tensor with several names.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

DTYPE_NAMES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.uint8: "U8", torch.int8: "I8",
    torch.int16: "I16", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
}
TORCH_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
PARAMETER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Entry:
    """One tensor of a job in this process.

    Attributes
    ----------
    name : str
    tensor : torch.Tensor
    is_buffer, is_embedding : bool
    is_whole : bool
        Whether all of it must be on one server.
    tied_names : list of str
        Other names of the same tensor.
    """

    name: str
    tensor: torch.Tensor
    is_buffer: bool = False
    is_embedding: bool = False
    is_whole: bool = False
    tied_names: list[str] = field(default_factory=list)

    def spec(self) -> dict[str, Any]:
        """Its entry in the manifest (``TensorSpec``)."""
        return {
            "name": self.name,
            "kind": "TENSOR_KIND_BUFFER" if self.is_buffer else "TENSOR_KIND_PARAMETER",
            "shape": list(self.tensor.shape),
            "dtype": "DTYPE_" + DTYPE_NAMES[self.tensor.dtype],
            "tied_names": self.tied_names,
            "whole": self.is_whole,
        }


def clean(name: str) -> str:
    """A parameter's name without the prefixes of DDP, ``torch.compile`` and activation checkpointing.

    ``module.`` is removed at the front only, since a model may have a layer of that name.

    Examples
    --------
    >>> clean("module._orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    name = name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
    while name.startswith("module."):
        name = name[len("module."):]
    return name


def of_model(model: torch.nn.Module) -> list[Entry]:
    """The parameters of a model, then the buffers that its ``state_dict()`` holds, both in the model's order.

    Tensors without elements are left out.

    Raises
    ------
    ValueError
        Two tensors have the same name once wrapper prefixes are removed, or the servers do not hold a tensor's dtype.
    """
    embeddings = {id(module.weight) for module in model.modules()
                  if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))}
    entries = _collect(model.named_parameters(remove_duplicate=False), is_buffer=False)
    for entry in entries:
        entry.is_embedding = id(entry.tensor) in embeddings
    return entries + _collect(_persistent_buffers(model), is_buffer=True, taken={n for e in entries for n in _names(e)})


def of_groups(param_groups: list[dict[str, Any]]) -> list[Entry]:
    """The parameters of an optimizer that was given ``model.named_parameters()``."""
    named = [pair for group in param_groups for pair in zip(group.get("param_names", ()), group["params"])]
    return _collect(named, is_buffer=False)


def shape_of(slot: str, shape: Iterable[int]) -> list[int]:
    """The shape of one slot of a tensor: the tensor's shape, except for Adafactor's averages over rows and columns.

    Examples
    --------
    >>> shape_of("row_var", (4, 3)), shape_of("col_var", (4, 3))
    ([4, 1], [1, 3])
    """
    sizes = [int(size) for size in shape]
    if len(sizes) < 2:
        return sizes
    if slot == "row_var":
        sizes[-1:] = [1]
    elif slot == "col_var":
        sizes[-2:-1] = [1]
    return sizes


def box_of(slot: str, shape: Iterable[int]) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The box, offset and extent, by which all of a slot is read and set. None: the whole tensor."""
    extent = shape_of(slot, shape)
    if slot not in ("row_var", "col_var") or len(extent) < 2:
        return None
    return (0,) * len(extent), tuple(extent)


def step_count(updates: float | torch.Tensor) -> torch.Tensor:
    """A number of updates as torch.optim keeps it: fp32 on the CPU. The process's default dtype may end counting at 256 (bf16)."""
    return torch.tensor(float(updates), dtype=torch.float32, device="cpu")


def _names(entry: Entry) -> list[str]:
    return [entry.name, *entry.tied_names]


def _persistent_buffers(model: torch.nn.Module) -> Iterable[tuple[str, torch.Tensor]]:
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield (f"{prefix}.{name}" if prefix else name), buffer


def _collect(named: Iterable[tuple[str, torch.Tensor]], is_buffer: bool, taken: set[str] | None = None) -> list[Entry]:
    entries: dict[int, Entry] = {}
    taken = set() if taken is None else set(taken)
    for raw_name, tensor in named:
        name = clean(raw_name)
        if tensor.numel() == 0:
            continue
        if name in taken:
            raise ValueError(f"two tensors are called {name!r} once wrapper prefixes are taken off (the second is {raw_name!r})")
        taken.add(name)
        _check_dtype(name, tensor, is_buffer)
        if id(tensor) in entries:
            entries[id(tensor)].tied_names.append(name)
        else:
            entries[id(tensor)] = Entry(name, tensor, is_buffer)
    return list(entries.values())


def _check_dtype(name: str, tensor: torch.Tensor, is_buffer: bool) -> None:
    allowed = tuple(DTYPE_NAMES) if is_buffer else PARAMETER_DTYPES
    if tensor.dtype not in allowed:
        raise ValueError(f"{'buffer' if is_buffer else 'parameter'} {name!r} is {tensor.dtype}; the servers hold "
                         + ", ".join(str(dtype) for dtype in allowed))
