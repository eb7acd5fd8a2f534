"""int8 with block scales in numpy, written only from the descriptions in types.proto and kernels/int8_blocks.h."""

import numpy as np


def bf16(values):
    """Round to nearest, ties to even; NaN stays NaN."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).astype(np.uint32).view(np.float32)
    return np.where(np.isnan(values), np.float32(np.nan), rounded)


def fma(a, b, c):
    """a * b + c in fp32. The product of two fp32 is exact in fp64; for bf16 times a power of two the sum is nearly always exact too."""
    return (a.astype(np.float64) * np.float64(b) + c.astype(np.float64)).astype(np.float32)


def encode_block(values):
    values = np.asarray(values, np.float32)
    with np.errstate(all="ignore"):
        scale = np.float32(np.max(np.abs(values))) / np.float32(127)
        if not np.all(np.isfinite(values)):
            scale = np.float32(np.nan)
        codes = np.rint(np.clip(values / scale, -127, 127)) if scale > 0 else np.zeros(len(values))
    return scale, codes.astype(np.int8)


def encode(values):
    """Return the bytes of one piece."""
    blocks = [encode_block(values[begin:begin + 256]) for begin in range(0, len(values), 256)]
    return b"".join(scale.tobytes() + codes.tobytes() for scale, codes in blocks)


def decode(piece):
    """Return the bf16 values that the servers stage, as fp32."""
    parts = []
    for begin in range(0, len(piece), 260):
        scale = np.frombuffer(piece[begin:begin + 4], "<f4")[0]
        codes = np.frombuffer(piece[begin + 4:begin + 260], np.int8).astype(np.float32)
        with np.errstate(all="ignore"):
            parts.append(bf16(codes * (scale if np.isfinite(scale) else np.float32(np.nan))))
    return np.concatenate(parts)


def encode_range(values, first, shard_elements):
    """Return the bytes of the pieces of a flat range that begins at element `first`, and their decoded values."""
    pieces, begin = [], 0
    while begin < len(values):
        end = min(len(values), begin + shard_elements - (first + begin) % shard_elements)
        pieces.append(encode(values[begin:end]))
        begin = end
    return b"".join(pieces), np.concatenate([decode(piece) for piece in pieces])


class Feedback:
    """A worker's residual of one range of elements."""

    def __init__(self, count, first=0, shard_elements=1 << 22):
        self.residual = np.zeros(count, np.float32)  # bf16 values
        self._first, self._shard_elements = first, shard_elements

    def send(self, gradient, loss_scale=1.0, applied=True):
        """Return the wire's bytes and the decoded gradient, still scaled."""
        scaled = fma(self.residual, loss_scale, np.asarray(gradient, np.float32))
        wire, decoded = encode_range(scaled, self._first, self._shard_elements)
        if applied:
            self.residual = bf16((scaled - decoded) * (np.float32(1) / np.float32(loss_scale)))
        return wire, decoded
