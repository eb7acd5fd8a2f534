"""The tensors of a job and their names.

A tensor's name is its PyTorch name in the model without the prefixes of wrappers. Tied parameters are one tensor with several names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from . import tensors

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
    stays : bool
        Whether it stays in this process until it changes: a frozen parameter.
    """

    name: str
    tensor: torch.Tensor
    is_buffer: bool = False
    is_embedding: bool = False
    is_whole: bool = False
    tied_names: list[str] = field(default_factory=list)
    stays: bool = False

    @cached_property
    def box(self) -> tensors.Box | None:
        """The part of the tensor that is in this process; None: all of it."""
        return tensors.box(self.tensor)

    @property
    def local(self) -> torch.Tensor:
        """A plain tensor that shares the memory of that part."""
        return tensors.local(self.tensor)

    def described(self) -> str:
        """What must be the same on every rank, in words."""
        kind = "buffer" if self.is_buffer else "parameter" if self.tensor.requires_grad else "frozen parameter"
        return (f"{kind}, {self.tensor.dtype}, shape {list(self.tensor.shape)}"
                + (f", DTensor with placements {self.tensor.placements}" if tensors.is_distributed(self.tensor) else "")
                + (f", tied to {', '.join(self.tied_names)}" if self.tied_names else ""))

    def spec(self, digest: str = "") -> dict[str, Any]:
        """Its entry in the manifest (``TensorSpec``). `digest` names its value, if it stays."""
        return {
            "name": self.name,
            "kind": "TENSOR_KIND_BUFFER" if self.is_buffer else "TENSOR_KIND_PARAMETER",
            "shape": list(self.tensor.shape),
            "dtype": "DTYPE_" + DTYPE_NAMES[self.tensor.dtype],
            "tied_names": self.tied_names,
            "whole": self.is_whole,
            "may_be_unset": self.stays,
            "value_digest": digest,
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

    Tensors without elements and those of :func:`kept_here` are left out.

    Raises
    ------
    ValueError
        Two tensors have the same name once wrapper prefixes are removed, or the servers cannot hold a parameter that requires a gradient.
    """
    return _of_model(model)[0]


def kept_here(model: torch.nn.Module) -> dict[str, str]:
    """Frozen parameters and buffers that the servers cannot hold, each with the reason. They stay in this process."""
    return _of_model(model)[1]


def of_groups(param_groups: list[dict[str, Any]]) -> list[Entry]:
    """The parameters of an optimizer that was given ``model.named_parameters()``.

    Raises
    ------
    ValueError
        As :func:`of_model`, or a group has not as many names as parameters.
    """
    for number, group in enumerate(param_groups):
        if len(group.get("param_names", group["params"])) != len(group["params"]):
            raise ValueError(f"group {number} has {len(group['param_names'])} names and {len(group['params'])} parameters: a wrapper has "
                             "replaced its parameters by flat partitions (DeepSpeed ZeRO); use torch.distributed.fsdp.fully_shard")
    named = [pair for group in param_groups for pair in zip(group.get("param_names", ()), group["params"])]
    entries = _collect(named, False, set(), {})
    _check_memory(entries)
    return entries


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


def _of_model(model: torch.nn.Module) -> tuple[list[Entry], dict[str, str]]:
    _reshard(model)
    embeddings = {id(module.weight) for module in model.modules()
                  if isinstance(module, (torch.nn.Embedding, torch.nn.EmbeddingBag))}
    kept: dict[str, str] = {}
    taken: set[str] = set()
    entries = _collect(model.named_parameters(remove_duplicate=False), False, taken, kept)
    for entry in entries:
        entry.is_embedding = id(entry.tensor) in embeddings
    entries += _collect(_persistent_buffers(model), True, taken, kept)
    views = _check_memory(entries)
    return [entry for entry in entries if entry.name not in views], kept | views


def _reshard(model: torch.nn.Module) -> None:
    """Lets the modules that ``fully_shard`` wrapped have their own parameters, which they lack after a forward without backward.

    Raises
    ------
    ValueError
        A module is wrapped by FullyShardedDataParallel, which replaces parameters.
    """
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for name, module in model.named_modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FullyShardedDataParallel):
            raise ValueError(f"module {name!r} is wrapped by FullyShardedDataParallel, which flattens parameters and so hides their names "
                             "and shapes: use torch.distributed.fsdp.fully_shard")
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def _collect(named: Iterable[tuple[str, torch.Tensor]], is_buffer: bool, taken: set[str], kept: dict[str, str]) -> list[Entry]:
    """The entries of named tensors. Their names are added to `taken`, and tensors that stay in this process to `kept`."""
    entries: dict[int, Entry] = {}
    for raw_name, tensor in named:
        name = clean(raw_name)
        is_trained = not is_buffer and tensor.requires_grad
        reason = tensors.fault(tensor, tuple(DTYPE_NAMES) if is_buffer else PARAMETER_DTYPES)
        if reason is None and is_buffer and tensors.is_distributed(tensor) and not all(p.is_replicate() for p in tensor.placements):
            reason = f"a buffer and a DTensor with placements {tensor.placements}: one rank stores all buffers"
        if reason is not None and (is_trained or torch.nn.parameter.is_lazy(tensor)):
            kind, way_out = "buffer" if is_buffer else "parameter", "; if it is frozen, it stays in this process" if is_trained else ""
            raise ValueError(f"{kind} {name!r} is {reason}{way_out}")
        if reason is None and tensor.numel() == 0:
            continue
        if is_trained and tensors.is_read_only(tensor):
            raise ValueError(f"parameter {name!r} is in memory that cannot be written, e.g. of a file that is mapped for reading: clone() "
                             "it; if it is frozen, it may stay there")
        if name in taken:
            raise ValueError(f"two tensors are called {name!r} once wrapper prefixes are taken off (the second is {raw_name!r})")
        taken.add(name)
        if reason is not None:
            kept[name] = reason
        elif id(tensor) in entries:
            entries[id(tensor)].tied_names.append(name)
        else:
            entries[id(tensor)] = Entry(name, tensor, is_buffer)
    return list(entries.values())


def _check_memory(entries: list[Entry]) -> dict[str, str]:
    """Finds tensors that are not trained and whose memory is a trained parameter's, which sets them, each with the reason.

    Raises
    ------
    ValueError
        Two trained parameters have memory in common and are not one tensor.
    """
    views: dict[str, str] = {}
    reaching: list[tuple[int, Entry]] = []
    places = ((*tensors.memory(entry.local), entry) for entry in entries if entry.local.numel())
    for begin, end, entry in sorted(places, key=lambda place: place[:2]):
        reaching = [(other_end, other) for other_end, other in reaching if other_end > begin]
        for _, other in reaching:
            trained = [one for one in (other, entry) if not one.is_buffer and one.tensor.requires_grad]
            if not trained or not tensors.share_memory(other.tensor, entry.tensor):
                continue
            if len(trained) == 2:
                raise ValueError(f"parameters {other.name!r} and {entry.name!r} are two tensors with memory in common, so both would be "
                                 "stepped: tie them by assigning one Parameter to both places, or clone() one")
            view = other if trained[0] is entry else entry
            views[view.name] = f"in the memory of parameter {trained[0].name!r}"
        reaching.append((end, entry))
    return views
