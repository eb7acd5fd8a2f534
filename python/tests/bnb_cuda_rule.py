"""The written rule of bitsandbytes' CUDA kernel for 8-bit blockwise AdamW, in numpy, apart from Orlop: ``python bnb_cuda_rule.py``
writes data/bnb_cuda_rule.npz, which test_bnb_rule.py holds Orlop's kernels against.

  m = fma(beta1, m, (1 - beta1) * g)              m, v: the values of the codes times the absmax of their block of 256
  v = fma(beta2, v, ((1 - beta2) * g) * g)
  p = fma(-step, m / (sqrt(v) + eps * c2), p) * (1 - lr * weight_decay)         step = lr * c2 / c1, c2 = sqrt(1 - beta2^t)
  codes: nearest to x * (1 / absmax), a tie to the even code; m keeps its sign, -0 too: what is negative and nearest to 0 gets the code
  below. A block of zeros has the codes of 0.

Fused where nvcc contracts. Division and root are IEEE's, where the kernel has __fdividef; 1 / absmax is rounded once.
"""

from pathlib import Path

import numpy as np

RECORDED = Path(__file__).parent / "data" / "bnb_cuda_rule.npz"
BLOCK = 256
F = np.float32
# Of each run: lr, beta1, beta2, eps, weight_decay.
HYPER_PARAMETERS = {"wide": (1e-2, 0.9, 0.999, 1e-8, 0.1), "slow": (1e-3, 0.95, 0.99, 1e-6, 0.0), "ties": (1e-3, 0.0, 0.0, 1e-8, 0.01)}


def code_book(signed):
    values = [0.0, 1.0]
    for decade in range(7):
        count = 2 ** decade if signed else 2 ** (decade + 1)
        magnitudes = [(0.1 + 0.9 * (j + 0.5) / count) * 10.0 ** (decade - 6) for j in range(count)]
        values += magnitudes + [-x for x in magnitudes if signed]
    return np.sort(np.array(values)).astype(F)


SIGNED, UNSIGNED = code_book(True), code_book(False)


def fma(a, b, c):
    """The product is exact in double, so only the sum is rounded twice."""
    return (np.float64(a) * np.float64(b) + np.float64(c)).astype(F)


def by_blocks(x):
    return [slice(begin, min(begin + BLOCK, x.size)) for begin in range(0, x.size, BLOCK)]


def nearest(book, r):
    """Distances are exact in double."""
    distance = np.abs(book.astype(np.float64)[None, :] - r.astype(np.float64)[:, None])
    tied = distance == distance.min(1, keepdims=True)
    first, last = tied.argmax(1), book.size - 1 - tied[:, ::-1].argmax(1)
    return np.where(first % 2 == 0, first, last)


def quantise(x, signed):
    book = SIGNED if signed else UNSIGNED
    codes, absmax = np.zeros(x.size, np.uint8), []
    for block in by_blocks(x):
        largest = F(np.abs(x[block]).max())
        absmax.append(largest)
        if largest == 0:
            codes[block] = 127 if signed else 0
            continue
        code = nearest(book, x[block] * (F(1) / largest))
        if signed:
            other_sign = np.signbit(x[block]) != np.signbit(book[code])
            code = np.where(other_sign, np.where(x[block] > 0, code + 1, code - 1), code)
        codes[block] = code
    return codes, np.array(absmax, F)


def dequantise(codes, absmax, signed):
    return (SIGNED if signed else UNSIGNED)[codes] * np.repeat(absmax, BLOCK)[:codes.size]


def steps(hyper_parameters, start, gradients):
    """After each step: weights, codes and absmax of m, codes and absmax of v."""
    lr, beta1, beta2, eps, weight_decay = hyper_parameters
    p = start.copy()
    m = np.full(p.size, 127, np.uint8), np.zeros(-(-p.size // BLOCK), F)
    v = np.zeros(p.size, np.uint8), np.zeros(-(-p.size // BLOCK), F)
    results = []
    for t, g in enumerate(gradients, 1):
        c1, c2 = 1 - beta1 ** t, (1 - beta2 ** t) ** 0.5
        new_m = fma(F(beta1), dequantise(*m, True), F(1 - beta1) * g)
        new_v = fma(F(beta2), dequantise(*v, False), (F(1 - beta2) * g) * g)
        ratio = new_m / (np.sqrt(new_v) + F(eps * c2))
        p = fma(-F(lr * c2 / c1), ratio, p) * F(1 - lr * weight_decay)
        m, v = quantise(new_m, True), quantise(new_v, False)
        results.append((p, *m, *v))
    return [np.stack(values) for values in zip(*results)]


def inputs():
    """Sums of whole numbers and powers of two: the same bits from every libm."""
    random = np.random.RandomState(20)

    def near_normal(count):
        return (random.randint(-2 ** 20, 2 ** 20, (4, count)).sum(0) / 2 ** 20).astype(F)

    made = {}
    for name, count, exponents in (("wide", 4 * BLOCK + 100, (-14, 4)), ("slow", 2 * BLOCK + 1, (-2, 2))):
        scale = np.ldexp(F(1), random.randint(*exponents, count)).astype(F)
        gradients = np.stack([near_normal(count) * scale for _ in range(6)])
        gradients[:, 1:BLOCK:17] = 0
        gradients[1::2, 2:BLOCK:17] = -0.0
        gradients[:, BLOCK:2 * BLOCK] *= F(2 ** -10)
        gradients[2:4, BLOCK:BLOCK + 200] = 0  # what decays alone
        if name == "wide":
            gradients[:, 2 * BLOCK:3 * BLOCK] = 0
            gradients[1, 3 * BLOCK + 5] = 1000
        made[name] = near_normal(count), gradients
    # beta1 = beta2 = 0 and a largest gradient of 1: m is g, v is g * g rounded, and both are codes' exact middles where g is chosen so.
    ties = []
    for book in (SIGNED, UNSIGNED):
        middles = (book[1:].astype(np.float64) + book[:-1]) / 2
        exact = middles[middles.astype(F) == middles].astype(F)
        if book is UNSIGNED:
            roots = [np.nextafter(np.sqrt(x), F(way)) if way is not None else np.sqrt(x) for x in exact for way in (None, 0, 1)]
            exact = np.array([g for g in roots if F(g * g) in exact], F)
        for begin in range(0, exact.size, BLOCK - 1):
            block = np.zeros(BLOCK, F)
            block[0] = 1
            block[1:1 + exact[begin:begin + BLOCK - 1].size] = exact[begin:begin + BLOCK - 1]
            ties.append(block)
    ties = np.concatenate(ties)
    made["ties"] = near_normal(ties.size), np.stack([ties, -ties])
    return made


def record():
    arrays = {}
    for name, (start, gradients) in inputs().items():
        arrays[f"{name}.start"], arrays[f"{name}.gradients"] = start, gradients
        results = steps(HYPER_PARAMETERS[name], start, gradients)
        for what, values in zip(("weights", "m.codes", "m.absmax", "v.codes", "v.absmax"), results):
            arrays[f"{name}.{what}"] = values
    return arrays


if __name__ == "__main__":
    RECORDED.parent.mkdir(exist_ok=True)
    np.savez_compressed(RECORDED, **record())
    print(RECORDED, RECORDED.stat().st_size, "bytes")
