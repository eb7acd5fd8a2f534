"""An independent numpy version of the wire format int8 with block scales and of its error feedback, for tests to compare with.

It was written only from the descriptions in proto/orlop/v1/types.proto (DTYPE_I8_BLOCK) and kernels/int8_blocks.h, which define the terms.
A piece is the part of a pushed box inside one shard. All arrays are one-dimensional.
"""

import numpy as np


def bf16(values):
    """Return the values rounded to bf16, to nearest with ties to even, as fp32. NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), rounded)


def fma(a, b, c):
    """Return a * b + c as fp32; a and c are fp32 arrays, b is a number.

    The product of two fp32 numbers is exact in fp64, but the sum may be rounded twice, to fp64 and to fp32. A bf16 `a` and a power of two
    for `b` nearly always have an exact sum, so that the result is that of a fused multiply-add.
    """
    return (a.astype(np.float64) * np.float64(b) + c.astype(np.float64)).astype(np.float32)


# Returns the fp32 scale and the int8 codes of one block of up to 256 fp32 values. A block with a NaN or infinity has scale NaN and codes 0.
def encode_block(values):
    values = np.asarray(values, np.float32)
    with np.errstate(all="ignore"):
        scale = np.float32(np.max(np.abs(values))) / np.float32(127)
        if not np.all(np.isfinite(values)):
            scale = np.float32(np.nan)
        codes = np.rint(np.clip(values / scale, -127, 127)) if scale > 0 else np.zeros(len(values))
    return scale, codes.astype(np.int8)


def encode(values):
    """Return the wire's bytes of a piece with these fp32 values: for each block the scale (4 bytes), then the codes."""
    blocks = [encode_block(values[begin:begin + 256]) for begin in range(0, len(values), 256)]
    return b"".join(scale.tobytes() + codes.tobytes() for scale, codes in blocks)


def decode(piece):
    """Return the bf16 values, as fp32, that the servers stage for a piece with these bytes. A scale that is not finite gives NaN."""
    parts = []
    for begin in range(0, len(piece), 260):
        scale = np.frombuffer(piece[begin:begin + 4], "<f4")[0]
        codes = np.frombuffer(piece[begin + 4:begin + 260], np.int8).astype(np.float32)
        with np.errstate(all="ignore"):
            parts.append(bf16(codes * (scale if np.isfinite(scale) else np.float32(np.nan))))
    return np.concatenate(parts)


def encode_range(values, first, shard_elements):
    """Return the wire's bytes of a range of a tensor, one piece after another, and the decoded values.

    `values` are the range's elements in fp32. `first` is the index of its first element in the flattened tensor, and `shard_elements` the
    number of elements of a shard: pieces end where shards end.
    """
    pieces, begin = [], 0
    while begin < len(values):
        end = min(len(values), begin + shard_elements - (first + begin) % shard_elements)
        pieces.append(encode(values[begin:end]))
        begin = end
    return b"".join(pieces), np.concatenate([decode(piece) for piece in pieces])


class Feedback:
    """The error feedback of one worker for one range of a tensor. It keeps the residual: the part of the gradients that rounding lost.

    `count` is the number of elements; `first` and `shard_elements` are those of encode_range().
    """

    def __init__(self, count, first=0, shard_elements=1 << 22):
        self.residual = np.zeros(count, np.float32)  # bf16 values, without the loss scale
        self._first, self._shard_elements = first, shard_elements

    def send(self, gradient, loss_scale=1.0, applied=True):
        """Encode a gradient that was multiplied by `loss_scale`; return the wire's bytes and the decoded values, still multiplied by it.

        `applied` says whether the step is an APPLY. If it is False (a SKIP), the residual stays as it was.
        """
        scaled = fma(self.residual, loss_scale, np.asarray(gradient, np.float32))
        wire, decoded = encode_range(scaled, self._first, self._shard_elements)
        if applied:
            self.residual = bf16((scaled - decoded) * (np.float32(1) / np.float32(loss_scale)))
        return wire, decoded
