"""Every optimizer against a float64 model of its own in numpy, written from the papers and torch's documentation, and against torch.

Tolerances are those that bitsandbytes' tests set for parity with torch. The code books, nearest codes and the error of quantising are
checked where the whole range can be swept fast, in kernels/quantize_test.cc.
"""

import numpy as np
import pytest
import torch

from orlop import kernels

SEED = 2024
COUNT = 4096 + 77  # a short last block


@pytest.fixture(autouse=True)
def one_thread():
    """Of torch: small tensors, and machines with other work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Adam:
    """Kingma and Ba, 2015, algorithm 1; the decay in the gradient (torch.optim.Adam) or apart (Loshchilov and Hutter, 2019)."""

    decoupled = False

    def step(self, p, g, t, lr, beta1, beta2, eps, weight_decay):
        if self.decoupled:
            p = p - lr * weight_decay * p
        else:
            g = g + weight_decay * p
        self.m = beta1 * getattr(self, "m", 0) + (1 - beta1) * g
        self.v = beta2 * getattr(self, "v", 0) + (1 - beta2) * g * g
        return p - lr * (self.m / (1 - beta1 ** t)) / (np.sqrt(self.v / (1 - beta2 ** t)) + eps)


class AdamW(Adam):
    decoupled = True


class AdamWBnb:
    """bitsandbytes' CUDA kernel: eps beside the uncorrected root, so scaled; the decay takes the weights after the update."""

    def step(self, p, g, t, lr, beta1, beta2, eps, weight_decay):
        self.m = beta1 * getattr(self, "m", 0) + (1 - beta1) * g
        self.v = beta2 * getattr(self, "v", 0) + (1 - beta2) * g * g
        c1, c2 = 1 - beta1 ** t, np.sqrt(1 - beta2 ** t)
        return (p - lr * c2 / c1 * self.m / (np.sqrt(self.v) + eps * c2)) * (1 - lr * weight_decay)


class SGD:
    """The pseudocode of torch.optim.SGD."""

    def step(self, p, g, t, lr, momentum, dampening, weight_decay, nesterov):
        g = g + weight_decay * p
        if momentum:
            self.b = g if t == 1 else momentum * self.b + (1 - dampening) * g
            g = g + momentum * self.b if nesterov else self.b
        return p - lr * g


class RMSprop:
    """The pseudocode of torch.optim.RMSprop."""

    def step(self, p, g, t, lr, alpha, eps, weight_decay, momentum=0, centered=0):
        g = g + weight_decay * p
        self.v = alpha * getattr(self, "v", 0) + (1 - alpha) * g * g
        self.a = alpha * getattr(self, "a", 0) + (1 - alpha) * g
        self.b = momentum * getattr(self, "b", 0) + g / (np.sqrt(self.v - (self.a ** 2 if centered else 0)) + eps)
        return p - lr * self.b


class Adagrad:
    """The pseudocode of torch.optim.Adagrad."""

    def step(self, p, g, t, lr, lr_decay, weight_decay, initial_accumulator_value, eps):
        g = g + weight_decay * p
        self.sum = getattr(self, "sum", initial_accumulator_value) + g * g
        return p - lr / (1 + (t - 1) * lr_decay) * g / (np.sqrt(self.sum) + eps)


class Lion:
    """Chen et al., 2023, algorithm 2."""

    def step(self, p, g, t, lr, beta1, beta2, weight_decay):
        m = getattr(self, "m", 0)
        self.m = beta2 * m + (1 - beta2) * g
        return p - lr * (np.sign(beta1 * m + (1 - beta1) * g) + weight_decay * p)


class AdEMAMix:
    """Pagliardini et al., 2024, algorithm 1; the slow beta's schedule makes its half-life grow linearly."""

    def step(self, p, g, t, lr, beta1, beta2, beta3, eps, weight_decay, alpha, warmup):
        if t < warmup:
            def half_life(beta):
                return np.log(0.5) / np.log(beta) - 1
            wanted = (1 - t / warmup) * half_life(beta1) + t / warmup * half_life(beta3)
            beta3, alpha = 0.5 ** (1 / (wanted + 1)), alpha * t / warmup
        self.m = beta1 * getattr(self, "m", 0) + (1 - beta1) * g
        self.slow = beta3 * getattr(self, "slow", 0) + (1 - beta3) * g
        self.v = beta2 * getattr(self, "v", 0) + (1 - beta2) * g * g
        direction = (self.m / (1 - beta1 ** t) + alpha * self.slow) / (np.sqrt(self.v / (1 - beta2 ** t)) + eps)
        return p - lr * (direction + weight_decay * p)


class LAMB:
    """You et al., 2020, algorithm 2, with the identity for phi."""

    def step(self, p, g, t, lr, beta1, beta2, eps, weight_decay):
        self.m = beta1 * getattr(self, "m", 0) + (1 - beta1) * g
        self.v = beta2 * getattr(self, "v", 0) + (1 - beta2) * g * g
        u = self.m / (1 - beta1 ** t) / (np.sqrt(self.v / (1 - beta2 ** t)) + eps) + weight_decay * p
        return p - lr * np.linalg.norm(p) / np.linalg.norm(u) * u


class Adafactor:
    """Shazeer and Stern, 2018, algorithms 4 to 6, as torch.optim.Adafactor orders them."""

    def step(self, p, g, t, lr, beta2_decay, eps1, eps2, d, weight_decay):
        w = t ** beta2_decay
        alpha = max(eps2, np.sqrt(np.mean(p * p))) * min(lr, t ** -0.5)
        if p.ndim > 1:
            self.r = (1 - w) * getattr(self, "r", 0) + w * np.mean(g * g, -1, keepdims=True)
            self.c = (1 - w) * getattr(self, "c", 0) + w * np.mean(g * g, -2, keepdims=True)
            v = self.r * self.c / np.maximum(np.mean(self.r, -2, keepdims=True), eps1)
        else:
            v = self.v = (1 - w) * getattr(self, "v", 0) + w * g * g
        u = g / np.sqrt(np.maximum(v, eps1 ** 2))
        return p * (1 - lr * weight_decay) - alpha / max(1, np.sqrt(np.mean(u * u)) / d) * u


class Muon:
    """Jordan et al., 2024, as torch.optim.Muon orders it, all in float64."""

    def step(self, p, g, t, lr, weight_decay, momentum, nesterov, ns_a, ns_b, ns_c, eps, ns_steps, adjust_lr):
        self.m = momentum * getattr(self, "m", 0) + (1 - momentum) * g
        x = (1 - momentum) * g + momentum * self.m if nesterov else self.m
        x = x / max(np.linalg.norm(x), eps)
        for _ in range(int(ns_steps)):
            a = x @ x.T
            x = ns_a * x + (ns_b * a + ns_c * a @ a) @ x
        rows, columns = p.shape
        adjust = 0.2 * np.sqrt(max(rows, columns)) if adjust_lr else np.sqrt(max(1, rows / columns))
        return p * (1 - lr * weight_decay) - lr * adjust * x


def adafactor_of(p, h):
    return torch.optim.Adafactor([p], lr=h["lr"], beta2_decay=h["beta2_decay"], eps=(h["eps1"], h["eps2"]), d=h["d"],
                                 weight_decay=h["weight_decay"])


def adam_of(kind):
    return lambda p, h: kind([p], lr=h["lr"], betas=(h["beta1"], h["beta2"]), eps=h["eps"], weight_decay=h["weight_decay"])


def same_names(kind, **switches):
    return lambda p, h: kind([p], **{name: switches.get(name, type(value))(value) if name in switches else value
                                     for name, value in h.items()})


ADAM = dict(lr=1e-3, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1)
SGD_FORM = dict(lr=0.1, momentum=0.0, dampening=0.0, weight_decay=0.1, nesterov=0)
RMS = dict(lr=1e-3, alpha=0.99, eps=1e-8, weight_decay=0.1)
GRAD = dict(lr=1e-2, lr_decay=0.0, weight_decay=0.1, initial_accumulator_value=0.0, eps=1e-10)
FACTOR = dict(lr=1e-2, beta2_decay=-0.8, eps1=2.0 ** -23, eps2=1e-3, d=1.0, weight_decay=0.1)
MIX = dict(lr=1e-3, beta1=0.9, beta2=0.999, beta3=0.9999, eps=1e-8, weight_decay=0.1, alpha=5.0, warmup=0)
RMSPROP, SGD_OF = same_names(torch.optim.RMSprop, centered=bool), same_names(torch.optim.SGD, nesterov=bool)
ADAGRAD = same_names(torch.optim.Adagrad)
CASES = {
    "adamw": ("adamw", AdamW, ADAM, adam_of(torch.optim.AdamW)),
    "adam": ("adam", Adam, ADAM, adam_of(torch.optim.Adam)),
    "adamw_bnb": ("adamw_bnb", AdamWBnb, ADAM, None),
    "sgd": ("sgd", SGD, SGD_FORM, SGD_OF),
    "sgd-momentum": ("sgd", SGD, SGD_FORM | dict(momentum=0.9), SGD_OF),
    "sgd-dampening": ("sgd", SGD, SGD_FORM | dict(momentum=0.9, dampening=0.3), SGD_OF),
    "sgd-nesterov": ("sgd", SGD, SGD_FORM | dict(momentum=0.9, nesterov=1), SGD_OF),
    "rmsprop": ("rmsprop", RMSprop, RMS, RMSPROP),
    "rmsprop_full-plain": ("rmsprop_full", RMSprop, RMS | dict(momentum=0.0, centered=0), RMSPROP),
    "rmsprop-momentum": ("rmsprop_full", RMSprop, RMS | dict(momentum=0.9, centered=0), RMSPROP),
    "rmsprop-centered": ("rmsprop_full", RMSprop, RMS | dict(momentum=0.0, centered=1), RMSPROP),
    "rmsprop-centered-momentum": ("rmsprop_full", RMSprop, RMS | dict(momentum=0.9, centered=1), RMSPROP),
    "adagrad": ("adagrad", Adagrad, GRAD, ADAGRAD),
    "adagrad-decay-initial": ("adagrad", Adagrad, GRAD | dict(lr_decay=0.05, initial_accumulator_value=0.1), ADAGRAD),
    "lion": ("lion", Lion, dict(lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.1), None),
    "ademamix": ("ademamix", AdEMAMix, MIX, None),
    "ademamix-warmup": ("ademamix", AdEMAMix, MIX | dict(warmup=15), None),
    "lamb": ("lamb", LAMB, ADAM | dict(eps=1e-6), None),
    "adafactor": ("adafactor", Adafactor, FACTOR, adafactor_of),
    "ademamix-long-warmup": ("ademamix", AdEMAMix, MIX | dict(warmup=1000), None),
}
# Of weights: absolute and relative, by the gradients' type.
TOLERANCES = {torch.float32: (1e-6, 1e-5), torch.bfloat16: (1e-3, 1e-2), torch.float16: (1e-4, 1e-3)}


def test_the_cases_are_all_optimizers():
    others = {"store",  # no optimizer: test_store.py
              "muon"}   # of matrices: below
    assert {case[0] for case in CASES.values()} | others == set(kernels.optimizers())


MATRICES = {"adafactor": FACTOR, "adafactor-slow": FACTOR | dict(d=2.0, eps1=1e-3),
            "muon": dict(lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=1, ns_a=3.4445, ns_b=-4.775, ns_c=2.0315, eps=1e-7, ns_steps=5,
                         adjust_lr=0),
            "muon-plain": dict(lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=0, ns_a=2.0, ns_b=-1.5, ns_c=0.5, eps=1e-7, ns_steps=8,
                               adjust_lr=1)}


@pytest.mark.parametrize("case, shape", [(case, shape) for case in MATRICES for shape in [(60, 70), (70, 60), (3, 20, 61)]
                                         if len(shape) == 2 or not case.startswith("muon")], ids=str)
def test_25_steps_of_matrices_are_those_of_the_papers_and_of_torch(case, shape):
    name, values = case.partition("-")[0], MATRICES[case]
    model = {"adafactor": Adafactor, "muon": Muon}[name]()
    generator = torch.Generator().manual_seed(SEED)
    start = 0.1 * torch.randn(shape, generator=generator)
    shard, expected = kernels.Shard(name, start, state="fp32"), start.double().numpy()
    theirs = start.clone().requires_grad_()
    optimizer = adafactor_of(theirs, values) if name == "adafactor" else torch.optim.Muon(
        [theirs], values["lr"], values["weight_decay"], values["momentum"], bool(values["nesterov"]),
        (values["ns_a"], values["ns_b"], values["ns_c"]), values["eps"], values["ns_steps"],
        "match_rms_adamw" if values["adjust_lr"] else None)
    for t in range(1, 26):
        gradient = 0.01 * torch.randn(shape, generator=generator)
        shard.step(gradient, values)
        expected = model.step(expected, gradient.double().numpy(), t, **values)
        theirs.grad = gradient
        optimizer.step()
    error = np.abs(shard.master().numpy() - expected)
    moved = np.abs(expected - start.numpy()).mean()
    print(f"{case} {shape}: largest error {error.max():.2g} of a mean change of {moved:.2g}")
    assert (error <= 1e-6 + 1e-5 * np.abs(expected)).all()
    # torch iterates in bf16, with 8 bits.
    bound = 0.05 * moved if name == "muon" else 2e-6
    assert (shard.master() - theirs.detach()).abs().mean() <= bound


@pytest.mark.parametrize("dtype", TOLERANCES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("case", CASES)
def test_25_steps_are_those_of_the_papers_and_of_torch(case, dtype):
    name, model, values, make_torch = CASES[case]
    generator = torch.Generator().manual_seed(SEED)
    start = 0.1 * torch.randn(COUNT, generator=generator)
    shard, model, expected = kernels.Shard(name, start, state="fp32"), model(), start.double().numpy()
    theirs = start.clone().requires_grad_()
    optimizer = make_torch(theirs, values) if make_torch else None
    for t in range(1, 26):
        gradient = (0.01 * torch.randn(COUNT, generator=generator)).to(dtype)
        shard.step(gradient, values, threads=1)
        expected = model.step(expected, gradient.double().numpy(), t, **values)
        if optimizer:
            theirs.grad = gradient.float()
            optimizer.step()
    atol, rtol = TOLERANCES[torch.float32]  # the master has no error of the gradient's type: all were given the same gradients
    expected = torch.from_numpy(expected)
    error = (shard.master().double() - expected).abs()
    print(f"{case}, {dtype}: largest error {error.max():.2e}, against torch "
          f"{(shard.master() - theirs.detach()).abs().max() if optimizer else float('nan'):.2e}")
    torch.testing.assert_close(shard.master().double(), expected, atol=atol, rtol=rtol, msg=lambda m: f"{case}, seed {SEED}: {m}")
    if optimizer:
        torch.testing.assert_close(shard.master(), theirs.detach(), atol=atol, rtol=rtol, msg=lambda m: f"{case}, seed {SEED}: {m}")
    if dtype == torch.bfloat16:
        torch.testing.assert_close(shard.weight.double(), expected, atol=1e-3, rtol=1e-2, msg=lambda m: f"{case}, seed {SEED}: {m}")


@pytest.mark.parametrize("dtype, mean, relative", [(torch.float32, 6e-5, 6e-4), (torch.bfloat16, 1.7e-4, 1.6e-3)], ids=str)
def test_8_bit_adamw_is_as_near_to_fp32_as_bitsandbytes_asks(dtype, mean, relative):
    """As bitsandbytes' test_optimizer8bit: after each comparison torch takes the 8-bit run's state and weights. A run left alone is
    compared with torch's at its end."""
    generator = torch.Generator().manual_seed(SEED)
    start = (0.1 * torch.randn(128, 256, generator=generator)).to(dtype).float()
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.AdamW([theirs])
    free = start.clone().requires_grad_()
    free_optimizer = torch.optim.AdamW([free])
    shard = kernels.Shard("adamw", start)
    errors, relative_errors, far = [], [], 0
    for _ in range(50):
        gradient = (0.01 * torch.randn(128, 256, generator=generator)).to(dtype)
        theirs.grad = free.grad = gradient.float()
        optimizer.step()
        free_optimizer.step()
        shard.step(gradient, threads=1)
        weight = shard.master() if dtype == torch.float32 else shard.weight.float()
        error = (weight - theirs.detach()).abs()
        errors.append(error.mean().item())
        relative_errors.append((error / (theirs.detach().abs() + 1e-9)).mean().item())
        for name in ("exp_avg", "exp_avg_sq"):
            mine, state = shard.state(name).view_as(start), optimizer.state[theirs][name]
            far = max(far, int((~torch.isclose(state, mine, atol=3e-3, rtol=1e-3)).sum()))
            state.copy_(mine)
        with torch.no_grad():
            theirs.copy_(shard.master())
    apart = ((shard.master() - free.detach()).norm() / (free.detach() - start).norm()).item()
    print(f"{dtype}: mean |dp| {np.mean(errors):.2e}, relative {np.mean(relative_errors):.2e}, states far {far}, left alone {apart:.4f}")
    assert np.mean(errors) < mean and np.mean(relative_errors) < relative and far < 20, f"seed {SEED}"
    assert apart < 0.03, f"relative L2 error of the weights' change, seed {SEED}"


FORMATS = [("fp32", "no_zero", "exact"), ("8bit", "no_zero", "exact"), ("8bit", "nearest", "exact"), ("8bit", "stochastic", "24bit"),
           ("4bit", "no_zero", "bf16"), ("4bit", "stochastic", "exact")]


def stored(shard):
    return [shard.master(), *(values for states in (shard._values, shard.codes, shard.absmax) for values in states.values())]


@pytest.mark.parametrize("state, rounding, master", FORMATS)
@pytest.mark.parametrize("name", kernels.optimizers())
def test_threads_change_no_bit(name, state, rounding, master):
    """Three tasks for the threads: each begins at a block of its own of the random numbers."""
    count = 2 * 2 ** 18 + 33
    generator = torch.Generator().manual_seed(SEED)
    start, gradient = torch.randn(count, generator=generator), torch.randn(count, generator=generator).bfloat16()
    results = []
    for threads in (1, 2, 4):
        shard = kernels.Shard(name, start, state, rounding, master, seed=5)
        for _ in range(2):
            shard.step(gradient, threads=threads)
        results.append(stored(shard))
    for threads, result in zip((2, 4), results[1:]):
        assert all(torch.equal(a, b) for a, b in zip(result, results[0])), f"{threads} threads, seed {SEED}"


@pytest.mark.parametrize("state, rounding", [("fp32", "no_zero"), ("8bit", "no_zero"), ("8bit", "nearest"), ("4bit", "nearest")])
@pytest.mark.parametrize("name", [name for name, spec in kernels.optimizers().items() if not spec["whole_tensor"]])
def test_1_2_3_and_8_shards_give_the_same_bits(name, state, rounding):
    """Stochastic rounding counts blocks from the tensor's begin, which Shard cannot be told: kernels/optimizer_test.cc and the servers."""
    count = 256 * 24 + 5
    values = {"beta3": 0.999} if name == "ademamix" else {}  # one that is not rounded stochastically by itself
    results = []
    for pieces in (1, 2, 3, 8):
        generator = torch.Generator().manual_seed(SEED)
        size = 256 * (24 // pieces)
        bounds = [i * size for i in range(pieces)] + [count]
        start = torch.randn(count, generator=generator)
        shards = [kernels.Shard(name, start[a:b], state, rounding) for a, b in zip(bounds, bounds[1:])]
        for _ in range(4):
            gradient = torch.randn(count, generator=generator)
            for shard, a, b in zip(shards, bounds, bounds[1:]):
                shard.step(gradient[a:b], values, threads=1)
        results.append([torch.cat(values) for values in zip(*map(stored, shards))])
    for pieces, result in zip((2, 3, 8), results[1:]):
        assert all(torch.equal(a, b) for a, b in zip(result, results[0])), f"{pieces} shards, seed {SEED}"
