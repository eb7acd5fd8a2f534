"""AdamW steps of Orlop and of its peers on a CPU, taking turns in one process.

`make bench-peers` installs the peers of `requirements.txt` in `.venv-peers/` and runs this. It draws `adamw.png` and writes the part of
`bench/RESULTS.md` between its two markers. If a peer cannot be imported or built, a sentence says that it is skipped. Everything compiled
at run time (DeepSpeed's kernel, torchao's graph) is kept in the virtual environment.

One step of the same parameters is timed, with weight decay, on all threads. After three warm-up turns, each round gives every candidate one
turn, in a random order. Ratios are medians of the ratios within a round, with a 95 % bootstrap interval.

- *step*: the optimizer alone. Peers keep weight and gradient in fp32. Orlop reads a bf16 gradient and writes a bf16 weight, with an exact
  fp32 master as bf16 + int16, as its state servers do.
- *with passes*: from a bf16 gradient to a bf16 weight, clipped by the global norm. Peers widen the gradient, compute its norm, scale it,
  step, and write the weight in bf16. Orlop computes the squared norm of the bf16 gradient; its step scales while it reads.
- *copy*: torch copies fp32 elements, as many bytes as Orlop's step must move, half of them read and half written. C's memmove on as many
  threads was no faster.

Bytes per parameter count each array once per pass that reads it and once per pass that writes it:

- Orlop 8-bit: gradient 2 r, weight 2 r + 2 w, remainder 2 r + 2 w, two codes 1 r + 1 w each, two absmax per 256: 14.06;
- Orlop fp32: gradient 2 r, weight 2 r + 2 w, remainder 2 r + 2 w, two moments 4 r + 4 w each: 26; the norm of either: 2 r more;
- torch, DeepSpeed: gradient 4 r, weight and two moments 4 r + 4 w each: 28;
- their passes: widen 2 r + 4 w, norm 4 r, clip 4 r + 4 w, bf16 weight 4 r + 2 w: 24 more;
- bitsandbytes, torchao: not counted; bitsandbytes works through temporaries of its own.

Before anything is timed, Orlop's weights are compared with torch's.
"""

from __future__ import annotations

import argparse
import functools
import glob
import logging
import math
import os
import pathlib
import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from tqdm import tqdm

import report

HERE = pathlib.Path(__file__).resolve().parent
WARM_UP_TURNS = 3
PAUSE_SECONDS = 0.02  # OpenMP's threads spin for some milliseconds after a turn, on the cores that the next turn uses
MAX_NORM = 1.0
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.999), 1e-8, 0.01

ORLOP_BYTES = {"8bit": 2 + 4 + 4 + 2 * 2 + 2 * 8 / 256, "fp32": 2 + 4 + 4 + 2 * 8}  # the module's docstring lists the terms
ORLOP_NORM_BYTES = 2
FP32_BYTES = 4 + 3 * 8
FP32_PASSES_BYTES = 6 + 4 + 8 + 6
ORLOP_NAMES = {"8bit": "Orlop 8-bit", "fp32": "Orlop fp32"}

GOALS = [
    report.Goal("Orlop 8-bit, step", "copy of Orlop 8-bit's bytes", 1.5, at_most=True),
    report.Goal("DeepSpeed, with passes", "Orlop 8-bit, with passes", 2.2, at_most=False),
    report.Goal("torch fused, with passes", "Orlop 8-bit, with passes", 2.2, at_most=False),
    report.Goal("bitsandbytes 8-bit, step", "Orlop 8-bit, step", 25, at_most=False),
    report.Goal("torchao 8-bit, step", "Orlop 8-bit, step", 25, at_most=False),
    report.Goal("Orlop fp32, with passes", "torch fused, with passes", 0.75, at_most=True),
    report.Goal("Orlop fp32, step", "copy of Orlop fp32's bytes", 1.2, at_most=True),
    report.Goal("Orlop 8-bit on AVX2, step", "Orlop 8-bit, step", 1.8, at_most=True),
]


class Candidate(NamedTuple):
    """A computation that is timed.

    Attributes
    ----------
    name : str
        The name in the table and in `GOALS`.
    turn : callable
        Makes one step, or one copy, of `count` parameters.
    count : int
        Number of parameters.
    traffic : float or None
        Bytes read and written per parameter; None if not counted.
    """

    name: str
    turn: Callable[[], object]
    count: int
    traffic: float | None


class Inputs:
    """The arrays that candidates share, so that 64 Mi parameters of all of them fit into 8 GiB.

    Attributes
    ----------
    master : torch.Tensor
        The initial weights, fp32.
    gradient : torch.Tensor
        bf16; its norm is above `MAX_NORM` from 1 Mi parameters on.
    widened : torch.Tensor
        The gradient in fp32 for the peer whose turn it is: passes widen and clip it in place.
    """

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.master = torch.randn(count, generator=generator).mul_(0.02)
        self.gradient = torch.randn(count, generator=generator).mul_(1e-3).bfloat16()
        self.widened = self.gradient.float()

    def parameter(self, count: int) -> torch.nn.Parameter:
        """Return the first `count` weights in memory of their own, with the shared gradient."""
        parameter = torch.nn.Parameter(self.master[:count].clone())
        parameter.grad = self.widened[:count]
        return parameter


def copies(inputs: Inputs, options: argparse.Namespace) -> list[Candidate]:
    """Return plain copies of as many bytes as the step of each Orlop variant moves."""
    size = inputs.master.numel() * 2  # fp32 elements: 8 bytes per parameter, enough for the 8-bit variant's 7.03 in one go
    source, target = torch.ones(size), torch.zeros(size)

    def turn(elements: int) -> None:
        while elements > 0:
            part = min(elements, size)
            target[:part].copy_(source[:part])
            elements -= part

    count = inputs.master.numel()
    return [Candidate(f"copy of {name}'s bytes", functools.partial(turn, int(count * ORLOP_BYTES[state] / 8)), count, ORLOP_BYTES[state])
            for state, name in ORLOP_NAMES.items()]


def step_and_passes(name: str, optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, inputs: Inputs) -> list[Candidate]:
    """Return an fp32 optimizer alone, and one from a bf16 gradient to a bf16 weight. Both share its state."""
    weight = torch.empty_like(inputs.gradient)

    def with_passes() -> None:
        parameter.grad.copy_(inputs.gradient)
        torch.nn.utils.clip_grad_norm_([parameter], MAX_NORM)
        optimizer.step()
        weight.copy_(parameter.detach())

    count = parameter.numel()
    return [Candidate(f"{name}, step", optimizer.step, count, FP32_BYTES),
            Candidate(f"{name}, with passes", with_passes, count, FP32_BYTES + FP32_PASSES_BYTES)]


def torch_fused(inputs: Inputs, options: argparse.Namespace) -> list[Candidate]:
    """torch.optim.AdamW in its fastest form on a CPU."""
    parameter = inputs.parameter(inputs.master.numel())
    optimizer = torch.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
    return step_and_passes("torch fused", optimizer, parameter, inputs)


def deepspeed_cpu_adam(inputs: Inputs, options: argparse.Namespace) -> list[Candidate]:
    """DeepSpeedCPUAdam with fp32 state. It compiles itself at first use."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam
    parameter = inputs.parameter(inputs.master.numel())
    optimizer = DeepSpeedCPUAdam([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, adamw_mode=True)
    return step_and_passes("DeepSpeed", optimizer, parameter, inputs)


def bitsandbytes_8bit(inputs: Inputs, options: argparse.Namespace) -> list[Candidate]:
    """bitsandbytes' AdamW8bit on fp32 weights and gradient."""
    from bitsandbytes.optim import AdamW8bit
    parameter = inputs.parameter(options.slow_count)
    optimizer = AdamW8bit([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    return [Candidate("bitsandbytes 8-bit, step", optimizer.step, options.slow_count, None)]


def torchao_8bit(inputs: Inputs, options: argparse.Namespace) -> list[Candidate]:
    """torchao's AdamW8bit on fp32 weights and gradient. torch.compile makes its kernel at first use."""
    from torchao.optim import AdamW8bit
    parameter = inputs.parameter(options.slow_count)
    optimizer = AdamW8bit([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    return [Candidate("torchao 8-bit, step", optimizer.step, options.slow_count, None)]


def hyper_parameters(lr: float = LR) -> dict[str, float]:
    """Return AdamW's hyper-parameters by Orlop's names."""
    return {"lr": lr, "beta1": BETAS[0], "beta2": BETAS[1], "eps": EPS, "weight_decay": WEIGHT_DECAY}


def orlop_adamw(inputs: Inputs, options: argparse.Namespace) -> list[Candidate]:
    """Orlop's kernels in this process, with fp32 and with 8-bit state."""
    from orlop import kernels
    check_orlop(kernels, "8bit", 1, options.threads)  # the state is zero before this step, so nothing was rounded to 8 bits yet
    check_orlop(kernels, "fp32", 3, options.threads)
    return orlop_state(kernels, "fp32", inputs, options.threads) + orlop_state(kernels, "8bit", inputs, options.threads)


def orlop_state(kernels, state: str, inputs: Inputs, threads: int) -> list[Candidate]:
    """Return one state format of Orlop: the step alone, and the step after the norm."""
    shard = kernels.Shard("adamw", inputs.master, state=state)
    values = hyper_parameters()

    def with_passes() -> None:
        sum_squares, _ = kernels.squared_norm(inputs.gradient, threads=threads)
        clip = min(1.0, MAX_NORM / (math.sqrt(sum_squares) + 1e-6))
        shard.step(inputs.gradient, values, gradient_scale=clip, threads=threads)

    def step() -> None:
        shard.step(inputs.gradient, values, gradient_scale=1.0, threads=threads)

    def step_on_avx2() -> None:
        kernels.use_target("AVX2")
        step()
        kernels.use_target()

    count, traffic = inputs.master.numel(), ORLOP_BYTES[state]
    candidates = [Candidate(f"{ORLOP_NAMES[state]}, step", step, count, traffic),
                  Candidate(f"{ORLOP_NAMES[state]}, with passes", with_passes, count, traffic + ORLOP_NORM_BYTES)]
    targets = kernels.targets()
    if state == "8bit" and "AVX2" in targets and targets[0] != "AVX2":
        candidates.append(Candidate(f"{ORLOP_NAMES[state]} on AVX2, step", step_on_avx2, count, traffic))
    return candidates


def check_orlop(kernels, state: str, steps: int, threads: int) -> None:
    """Compare a few steps of Orlop with torch's, so that no wrong kernel is measured.

    Orlop's weight is bf16: torch's fp32 weight must be within 1e-6 of a value that rounds to it. The learning rate is large and weights are
    in [1, 2], so the update is a good part of them and none is near zero.
    """
    generator = torch.Generator().manual_seed(1)
    master = torch.rand(1 << 16, generator=generator) + 1
    parameter = torch.nn.Parameter(master.clone())
    optimizer = torch.optim.AdamW([parameter], lr=0.05, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True)
    shard = kernels.Shard("adamw", master, state=state)
    for _ in range(steps):
        gradient = torch.randn(master.numel(), generator=generator).bfloat16()
        parameter.grad = gradient.float().mul_(0.5)
        optimizer.step()
        shard.step(gradient, hyper_parameters(0.05), gradient_scale=0.5, threads=threads)
    wrong = ~rounds_to(parameter.detach(), shard.weight, 1e-6)
    if wrong.any():
        sys.exit(f"{ORLOP_NAMES[state]}: {wrong.sum()} of {wrong.numel()} weights differ from torch's after {steps} steps; not measured")


def rounds_to(values: torch.Tensor, rounded: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Return whether each positive fp32 value, or one within a relative tolerance of it, rounds to the corresponding bf16 value."""
    bits = rounded.view(torch.int16)
    below, here, above = ((bits + offset).view(torch.bfloat16).double() for offset in (-1, 0, 1))
    exact = values.double()
    return (exact * (1 + tolerance) >= (below + here) / 2) & (exact * (1 - tolerance) <= (here + above) / 2)


# Orlop is first: if its weights are wrong, the others need no warm-up.
BUILDERS = {"Orlop": orlop_adamw, "copies": copies, "torch": torch_fused, "DeepSpeed": deepspeed_cpu_adam,
            "bitsandbytes": bitsandbytes_8bit, "torchao": torchao_8bit}
FOREIGN = ("DeepSpeed", "bitsandbytes", "torchao")  # these may fail for reasons outside Orlop, such as a missing compiler


def build(inputs: Inputs, options: argparse.Namespace) -> tuple[list[Candidate], list[str]]:
    """Build and warm up all candidates.

    Returns
    -------
    candidates : list of Candidate
    skipped : list of str
        A sentence for each peer that is missing.
    """
    candidates, skipped = [], []
    for name, builder in BUILDERS.items():
        print(f"warming up: {name}", file=sys.stderr)
        try:
            built = builder(inputs, options)
            for candidate in built * WARM_UP_TURNS:
                candidate.turn()
            candidates += built
        except ImportError as error:
            skipped.append(f"{name} skipped: {str(error).split(' (')[0]}")  # without the path
        except Exception as error:  # any error that a peer raises
            if name not in FOREIGN:
                raise
            skipped.append(f"{name} skipped, it failed: {str(error).splitlines()[0] if str(error) else repr(error)}")
    return candidates, skipped


def measure(candidates: list[Candidate], rounds: int) -> dict[str, list[float]]:
    """Return nanoseconds per parameter of every candidate, one value per round."""
    times = {candidate.name: [] for candidate in candidates}
    shuffle = random.Random(0)
    for _ in tqdm(range(rounds), desc="rounds"):
        for candidate in shuffle.sample(candidates, len(candidates)):
            time.sleep(PAUSE_SECONDS)
            start = time.perf_counter()
            candidate.turn()
            times[candidate.name].append((time.perf_counter() - start) / candidate.count * 1e9)
    return times


def prepare_environment(threads: int) -> None:
    """Set the number of threads for all, and folders for what peers compile. Call it before any peer is imported."""
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for an OpenMP library other than torch's
    os.environ["PATH"] = f"{sys.prefix}/bin:{os.environ['PATH']}"  # ninja
    os.environ["DS_ACCELERATOR"] = "cpu"
    extensions = f"{sys.prefix}/extensions"
    os.environ["TORCH_EXTENSIONS_DIR"] = extensions
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{sys.prefix}/inductor"
    for lock in glob.glob(f"{extensions}/*/lock"):
        os.unlink(lock)  # the lock of a build that was killed; the next build would wait for it for ever
    logging.disable(logging.WARNING)  # peers warn that they have no GPU
    warnings.simplefilter("ignore")


def parse_options() -> argparse.Namespace:
    """Parse the command line. Counts are in parameters."""
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mebiparameters", type=float, default=64, help="parameters of every candidate, times 2^20 (64)")
    parser.add_argument("--slow-mebiparameters", type=float, help="of bitsandbytes and torchao, where time or memory is short (the same)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=cores, help=f"(all cores: {cores})")
    parser.add_argument("--results", type=pathlib.Path, default=HERE.parent / "RESULTS.md", help="a file with the two markers")
    parser.add_argument("--chart", type=pathlib.Path, default=HERE / "adamw.png")
    options = parser.parse_args()
    options.count = int(options.mebiparameters * (1 << 20))
    options.slow_count = min(options.count, int((options.slow_mebiparameters or options.mebiparameters) * (1 << 20)))
    return options


def main() -> None:
    """Build, measure, report."""
    options = parse_options()
    load = os.getloadavg()[0]
    prepare_environment(options.threads)
    inputs = Inputs(options.count)
    candidates, skipped = build(inputs, options)
    del inputs.master
    times = measure(candidates, options.rounds)
    text = report.markdown(candidates, times, GOALS, skipped, options, load)
    print(text)
    report.draw(times, options.chart)
    report.write_between_markers(options.results, "bench-peers", text, "One AdamW step: nanoseconds per parameter", options.chart)


if __name__ == "__main__":
    main()
