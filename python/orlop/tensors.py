"""Where the values of a tensor are: in plain memory that the servers' bytes can be copied to and from, or elsewhere.

A DTensor is distributed over the processes of a device mesh. Its values here are its local tensor, a box of the global tensor.
"""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from typing import Any

import torch

Box = tuple[Any, Any]
"""Offset and extent: numbers of the flattened tensor, or tuples of one number for each dimension (python/core/parts.h)."""

NOTHING: Box = (0, 0)  # the box of a process that has no element of a DTensor


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor."""
    return _is_of("torch.distributed.tensor", "DTensor", tensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The plain tensor that shares its memory: detached, and the local tensor of a DTensor."""
    with torch.no_grad():
        tensor = _waited(tensor.to_local() if is_distributed(tensor) else tensor)
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.detach()


def host(tensor: torch.Tensor) -> torch.Tensor:
    """The values that are here, flat and contiguous in host memory. Conjugate and negative bits, which are no bytes, are applied."""
    return local(tensor).resolve_conj().resolve_neg().contiguous().cpu().view(-1)


def is_host_memory(tensor: torch.Tensor) -> bool:
    """Whether the bytes of a plain tensor are its values in row-major order, in host memory."""
    return tensor.device.type == "cpu" and tensor.is_contiguous() and not tensor.is_neg()


def box(tensor: torch.Tensor) -> Box | None:
    """The box whose values are here. None: the whole tensor."""
    if not is_distributed(tensor):
        return None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
    extent, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    if 0 in extent:
        return NOTHING
    if tuple(extent) == tuple(tensor.shape):
        return None
    if tuple(extent[1:]) == tuple(tensor.shape[1:]):  # consecutive rows are a range of the flattened tensor
        row = tensor.shape[1:].numel()
        return offset[0] * row, extent[0] * row
    return tuple(offset), tuple(extent)


def inside(values: torch.Tensor, part: Box | None) -> torch.Tensor:
    """The values of a box of a whole tensor."""
    if part is None:
        return values
    if isinstance(part[0], tuple):
        return values[tuple(slice(begin, begin + count) for begin, count in zip(*part))]
    return values.reshape(-1)[part[0]:part[0] + part[1]]


def version(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes whenever torch sees the tensor change, or its memory is another. A DTensor and its local tensor are counted separately."""
    here = local(tensor)
    return tensor._version + here._version, here.data_ptr()


def copy(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copies the values of one tensor into another of its global shape. Either may be a DTensor; then all ranks call it."""
    if is_distributed(source) and not is_distributed(target):
        source = source.full_tensor()
    with torch.no_grad():
        if is_distributed(target) and not is_distributed(source):
            here = local(target)
            here.copy_(inside(source, box(target)).reshape(here.shape))
        else:
            target.copy_(source)


def like(gradient: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """The gradient's values of the elements that are here of the parameter, flat. All ranks of a DTensor's mesh call it."""
    if is_distributed(gradient) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)  # e.g. a sum of which each rank has a term
    return local(gradient).reshape(-1)


def fault(tensor: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reason why the servers cannot hold a tensor, and a way out, after "parameter 'x' is". None: they can."""
    reason = _not_plain(tensor)
    if reason is not None or tensor.numel() == 0:
        return reason
    here = local(tensor)
    if here.is_inference():
        return "an inference tensor, whose changes torch does not count: make it outside torch.inference_mode()"
    if is_distributed(tensor) and any(placement.is_partial() for placement in tensor.placements):
        return f"a DTensor with placements {tensor.placements}, of whose values each rank has a term: redistribute it"
    if is_distributed(tensor) and not _is_box(tensor):
        return f"a DTensor with placements {tensor.placements}, whose local part is no box of the tensor: shard another dimension"
    if here.dtype not in dtypes:
        return f"{here.dtype}; the servers hold " + ", ".join(str(dtype) for dtype in dtypes)
    if _may_overlap(here):
        return "expanded (several elements have the same memory): clone() it"
    return None


def gradient_fault(gradient: torch.Tensor, parameter: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> str | None:
    """The reason why a gradient cannot be sent, and the way out, after "the gradient of 'x' is". None: it can."""
    if gradient.layout != torch.strided:
        layout = "sparse" if "sparse" in str(gradient.layout) else "not dense"
        return f"{layout} ({gradient.layout}); use sparse=False in the embedding, or to_dense()"
    reason = _not_plain(gradient)
    if reason is not None:
        return reason
    if is_distributed(gradient) != is_distributed(parameter):
        one, other = ("a DTensor", "a plain tensor") if is_distributed(gradient) else ("a plain tensor", "a DTensor")
        return f"{one}, its parameter {other}: make both alike (full_tensor(), distribute_tensor())"
    if is_distributed(gradient) and gradient.device_mesh != parameter.device_mesh:
        return f"on another device mesh ({gradient.device_mesh}) than its parameter ({parameter.device_mesh})"
    if local(gradient).is_inference():
        return "an inference tensor, whose changes torch does not count: clone() it outside torch.inference_mode()"
    if gradient.dtype not in dtypes:
        return f"{gradient.dtype}; " + ", ".join(str(dtype) for dtype in dtypes) + " can be sent"
    return None


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether an element of one tensor and an element of the other have a byte in common."""
    one, other = local(one), local(other)
    (begin, end), (other_begin, other_end) = memory(one), memory(other)
    if one.device != other.device or end <= other_begin or other_end <= begin:
        return False
    start = min(begin, other_begin)
    mask = torch.zeros(max(end, other_end) - start, dtype=torch.bool, device="cpu")
    _bytes_of(mask, one, begin - start).fill_(True)
    return bool(_bytes_of(mask, other, other_begin - start).any())


def is_read_only(tensor: torch.Tensor) -> bool:
    """Whether the first or last byte that is here cannot be written, without an attempt that would end the process.

    The kernel is asked to read each byte to where it is. Where it does not offer that, the answer is False.
    """
    here = local(tensor)
    if here.device.type != "cpu" or here.numel() == 0:
        return False
    begin, end = memory(here)
    try:
        process = os.open("/proc/self/mem", os.O_RDONLY)
    except OSError:
        return False
    try:
        for address in (begin, end - 1):
            os.preadv(process, [ctypes.c_char.from_address(address)], address)
    except OSError as error:
        return error.errno == errno.EFAULT
    finally:
        os.close(process)
    return False


def memory(tensor: torch.Tensor) -> tuple[int, int]:
    """The addresses of a plain tensor's first byte and after its last one."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.itemsize


def checksum(tensor: torch.Tensor) -> int:
    """The sum of a plain tensor's bits, as integers of its element's size."""
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize]
    return int(host(tensor).view(bits).sum(dtype=torch.int64))


def _bytes_of(mask: torch.Tensor, tensor: torch.Tensor, offset: int) -> torch.Tensor:
    strides = [stride * tensor.itemsize for stride in tensor.stride()]
    return mask.as_strided((*tensor.shape, tensor.itemsize), (*strides, 1), offset)


def _is_of(module: str, name: str, value: Any) -> bool:
    """Whether a value is of a class. If nothing has imported the module, no value is."""
    return module in sys.modules and isinstance(value, getattr(sys.modules[module], name))


def _waited(tensor: torch.Tensor) -> torch.Tensor:
    """The values of a collective that may be under way."""
    return tensor.wait() if _is_of("torch.distributed._functional_collectives", "AsyncCollectiveTensor", tensor) else tensor


def _not_plain(tensor: torch.Tensor) -> str | None:
    tensor = _waited(tensor)
    kind = f"{type(tensor).__module__}.{type(tensor).__qualname__}"
    if torch.nn.parameter.is_lazy(tensor):
        return "not initialised (the module is lazy): run a forward before the model is bound"
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return "wrapped by torch.func (grad, vmap): use it outside of the transform"
    if getattr(tensor, "_is_flat_param", False) or getattr(tensor, "_fsdp_flattened", False):
        return "flattened by FullyShardedDataParallel: use torch.distributed.fsdp.fully_shard, whose parameters keep names and shapes"
    if not is_distributed(tensor) and torch._C._dispatch_keys(tensor).has(torch._C.DispatchKey.Python):
        return f"a {kind}, a tensor subclass whose values are not in its own memory: use a plain tensor"
    if tensor.is_meta:
        return "on the meta device, without values: give it some (to_empty, load_state_dict(assign=True)) before the model is bound"
    if tensor.is_nested or tensor.layout != torch.strided:
        layout = "nested" if tensor.is_nested else "sparse" if "sparse" in str(tensor.layout) else "of an opaque layout"
        return f"{layout} ({tensor.layout}): use a dense tensor"
    if tensor.is_quantized:
        return f"quantised ({tensor.dtype}): dequantize() it"
    return _not_plain(tensor._local_tensor) if is_distributed(tensor) else None


def _is_box(tensor: torch.Tensor) -> bool:
    """Whether the local part of a DTensor is a box: each dimension's indices are consecutive."""
    if all(placement.is_replicate() or placement.is_shard() for placement in tensor.placements):
        return True
    for dimension, size in enumerate(tensor.shape):
        indices = torch.arange(size, dtype=torch.int64, device="cpu")
        for mesh_dimension, placement in enumerate(tensor.placements):
            if not placement.is_replicate() and placement.dim == dimension:
                shape = [1] * dimension + [len(indices)]
                pieces, _ = placement._split_tensor(indices.view(shape), tensor.device_mesh.size(mesh_dimension), with_padding=False)
                indices = pieces[tensor.device_mesh.get_local_rank(mesh_dimension)].reshape(-1)
        if len(indices) and int(indices[-1] - indices[0]) != len(indices) - 1:
            return False
    return True


def _may_overlap(tensor: torch.Tensor) -> bool:
    """Whether two elements of a plain tensor may have the same memory, by its strides."""
    reach = 0
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape) if size > 1):
        if stride <= reach:
            return True
        reach += (size - 1) * stride
    return False
