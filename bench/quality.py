"""How well the demo's model trains with each state format, beside torch's AdamW in fp32 and bitsandbytes' AdamW8bit.

`make bench-quality` runs this. It draws `peers/quality.png` and writes the part of `bench/RESULTS.md` between its two markers. Orlop's
steps are made in this process by the servers' kernels, with the servers' rule for fp32 state and their clipping. The bits are those of
servers, as `tests/test_bench_quality.py` shows. bitsandbytes keeps the same tensors in fp32; if it cannot be imported, a sentence says that
it is skipped.

- *Own gradients*: the demo's model, text, schedule and 300 steps, once per format and seed. Each run uses the gradients of its own weights.
  The result is the loss on held-out files at the end.
- *Given gradients*: beside torch's run, every format steps on torch's gradients, so only its weights differ: relative L2 of the weight
  change (`|change - fp32's| / |fp32's|`). Both changes are counted from the initial weights as the format stores them.
- *Spike*: the second half of the first seed once more, with a first gradient a hundred times as large after clipping (before clipping,
  clipping would undo it).
- *Drift*: 2,000 steps at a learning rate of 1e-6, a thousandth of the demo's, on torch's gradients of a fresh batch each: the projection of
  the weight change on torch's, relative to torch's. A GPT of one block and width 256 (0.9 M parameters), to save time.

A training is one process on one thread; as many run at once as there are cores. Options that --help does not list are the demo's
(`--steps`, `--width`, ...).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import copy
import json
import logging
import math
import multiprocessing
import os
import pathlib
import warnings

import torch
from tqdm import tqdm

from bench import quality_report
from bench.peers import report
from demo import data, model, run, train
from orlop import kernels, names

HERE = pathlib.Path(__file__).resolve().parent
LEAST_QUANTISED = 4096  # elements, as in server/job/slots.cc
SPIKE = 100
DRIFT_RATE, DRIFT_SHAPE = 1e-6, {"depth": 1, "width": 256}
POINTS = 20  # points of a sampled curve


class OrlopAdamW:
    """AdamW of a model as servers compute it, with their kernels in this process.

    Parameters
    ----------
    gpt : torch.nn.Module
        Its parameters are read here; only :meth:`pull` writes them.
    seed : int
        Seed of stochastic rounding.
    state, master : str
        Formats as in `orlop.AdamW`.
    """

    def __init__(self, gpt: torch.nn.Module, seed: int, state: str, master: str = "exact") -> None:
        decays = {id(parameter): group["weight_decay"] for group in model.parameter_groups(gpt, train.WEIGHT_DECAY)
                  for parameter in group["params"]}
        self._parameters, self._decays, self._shards = [], [], []
        for index, entry in enumerate(names.of_model(gpt)):
            parameter = entry.tensor
            quantised = parameter.numel() >= LEAST_QUANTISED and parameter.dim() > 1 and not entry.is_embedding
            self._parameters.append(parameter)
            self._decays.append(decays[id(parameter)])
            self._shards.append(kernels.Shard("adamw", parameter, state if quantised else "fp32", master_format=master, seed=seed,
                                              tensor=index))

    def step(self, gradients: list[torch.Tensor], lr: float, factor: float = 1.0) -> None:
        """Clip, multiply by `factor`, and update. `gradients` are in the order of the parameters and are not changed."""
        norm = math.sqrt(sum(kernels.squared_norm(gradient, threads=1)[0] for gradient in gradients))
        scale = min(1.0, train.MAX_NORM / (norm + 1e-6)) * factor
        for shard, gradient, decay in zip(self._shards, gradients, self._decays):
            values = {"lr": lr, "beta1": train.BETAS[0], "beta2": train.BETAS[1], "weight_decay": decay}
            shard.step(gradient, values, gradient_scale=scale, threads=1)

    @torch.no_grad()
    def pull(self) -> None:
        """Write the weights to the model."""
        for parameter, shard in zip(self._parameters, self._shards):
            parameter.copy_(shard.master())

    def weights(self) -> torch.Tensor:
        return torch.cat([shard.master().flatten() for shard in self._shards])


class PeerAdamW:
    """An optimizer with torch's interface, clipped by torch. It writes to the model, and clips the given gradients in place."""

    def __init__(self, parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer

    def step(self, gradients: list[torch.Tensor], lr: float, factor: float = 1.0) -> None:
        for parameter, gradient in zip(self._parameters, gradients):
            parameter.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._parameters, train.MAX_NORM)
        if factor != 1:
            torch._foreach_mul_(gradients, factor)
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.step()

    def __deepcopy__(self, memo: dict) -> PeerAdamW:
        optimizer = copy.deepcopy(self._optimizer, memo)  # copies only those of bitsandbytes' attributes that torch knows
        optimizer.__dict__ = self._optimizer.__dict__ | optimizer.__dict__
        return PeerAdamW(copy.deepcopy(self._parameters, memo), optimizer)

    def pull(self) -> None:
        """Nothing to do."""

    def weights(self) -> torch.Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in self._parameters])


def torch_adamw(gpt: torch.nn.Module) -> PeerAdamW:
    return PeerAdamW(list(gpt.parameters()), torch.optim.AdamW(model.parameter_groups(gpt, train.WEIGHT_DECAY), betas=train.BETAS))


def bitsandbytes_adamw(gpt: torch.nn.Module) -> PeerAdamW:
    """Return AdamW8bit whose embeddings stay in 32 bits, as its authors advise and Orlop does; small tensors do so by default."""
    from bitsandbytes.optim import AdamW8bit, GlobalOptimManager
    manager = GlobalOptimManager.get_instance()
    manager.initialize()  # it knows parameters by address and index, and still has those of earlier models of this process
    for entry in names.of_model(gpt):
        if entry.is_embedding:
            manager.override_config(entry.tensor, "optim_bits", 32)
    groups = model.parameter_groups(gpt, train.WEIGHT_DECAY)
    manager.register_parameters(groups)
    return PeerAdamW(list(gpt.parameters()), AdamW8bit(groups, betas=train.BETAS, min_8bit_size=LEAST_QUANTISED))


BASELINE, BITSANDBYTES = quality_report.BASELINE, quality_report.BITSANDBYTES
ORLOP = {"Orlop fp32": ("fp32",), "Orlop 8-bit": ("8bit",), "Orlop 4-bit": ("4bit",), "Orlop 8-bit, 24-bit master": ("8bit", "24bit"),
         "Orlop 8-bit, bf16 master": ("8bit", "bf16")}
FORMATS = (BASELINE, *ORLOP, BITSANDBYTES)


def make_optimizer(name: str, gpt: torch.nn.Module, seed: int) -> OrlopAdamW | PeerAdamW:
    """Return the optimizer of that name in `FORMATS`."""
    if name in ORLOP:
        return OrlopAdamW(gpt, seed, *ORLOP[name])
    return {BASELINE: torch_adamw, BITSANDBYTES: bitsandbytes_adamw}[name](gpt)


class Training:
    """The demo's model and text in this process with the optimizer of that name. It trains on its own gradients."""

    def __init__(self, name: str, options: argparse.Namespace) -> None:
        self.options, self.text = options, data.load_text()
        self.model = seeded_model(options)
        self.optimizer = make_optimizer(name, self.model, options.seed)
        self.optimizer.pull()

    def gradients(self, step: int) -> tuple[float, list[torch.Tensor]]:
        """Return loss and gradients on the batch of that step."""
        options = self.options
        self.model.zero_grad()
        loss = self.model.loss(data.batch(self.text.train, seed=options.seed, step=step, count=options.batch, context=options.context))
        loss.backward()
        return loss.item(), [parameter.grad for parameter in self.model.parameters()]

    def rate(self, step: int) -> float:
        return self.options.lr * train.learning_rate_factor(step, self.options.steps)

    def validate(self) -> float:
        return train.validation_loss(self.model, self.text.validation, self.options)


def seeded_model(options: argparse.Namespace) -> model.GPT:
    return model.seeded_model(model.ModelConfig(options.depth, options.width, context=options.context), options.seed)


class Replays:
    """All other formats, stepping on the gradients of torch's run."""

    def __init__(self, options: argparse.Namespace, baseline: PeerAdamW) -> None:
        self._baseline, self._peers = baseline, {}
        for name in measured():
            if name != BASELINE:
                self._peers[name] = make_optimizer(name, seeded_model(options), options.seed)
        self._starts = {name: peer.weights() for name, peer in self._peers.items()}
        self._start = baseline.weights()

    def step(self, gradients: list[torch.Tensor], lr: float) -> None:
        for peer in self._peers.values():
            peer.step([gradient.clone() for gradient in gradients] if isinstance(peer, PeerAdamW) else gradients, lr)

    def compare(self) -> dict[str, tuple[float, float]]:
        """Return (distance from torch's weight change, length of the projection on it) of each format, relative to torch's."""
        reference = (self._baseline.weights() - self._start).double()
        square, found = reference @ reference, {}
        for name, peer in self._peers.items():
            change = (peer.weights() - self._starts[name]).double()
            found[name] = ((change - reference).norm() / square.sqrt()).item(), (change @ reference / square).item()
        return found


def own_gradients(name: str, options: argparse.Namespace, with_spike: bool, with_replays: bool = False) -> dict:
    """Train and return the losses of each step, the held-out loss, and on request the same after a spike and the results of the replays."""
    training = Training(name, options)
    replays = Replays(options, training.optimizer) if with_replays else None
    record = {"losses": [], "weight_error": {}}
    spiked = None
    for step in range(options.steps):
        if with_spike and step == options.steps // 2:
            spiked = copy.deepcopy(training)
        loss, gradients = training.gradients(step)
        record["losses"].append(loss)
        if replays:
            replays.step(gradients, training.rate(step))
        training.optimizer.step(gradients, training.rate(step))
        training.optimizer.pull()
        if replays and (step + 1) % max(1, options.steps // POINTS) == 0:
            for peer, (error, _) in replays.compare().items():
                record["weight_error"].setdefault(peer, []).append([step + 1, error])
    record["held_out"] = training.validate()
    if spiked:
        record["spike"] = {"losses": [], "step": options.steps // 2}
        for step in range(options.steps // 2, options.steps):
            loss, gradients = spiked.gradients(step)
            record["spike"]["losses"].append(loss)
            spiked.optimizer.step(gradients, spiked.rate(step), SPIKE if step == options.steps // 2 else 1.0)
            spiked.optimizer.pull()
        record["spike"]["held_out"] = spiked.validate()
    return record


def drift(options: argparse.Namespace, steps: int) -> dict:
    """Train a small model at a tiny rate. Return {format: [[step, projection on torch's change, distance from it]]}, relative to torch's.
    """
    training = Training(BASELINE, argparse.Namespace(**vars(options) | DRIFT_SHAPE))
    replays, record = Replays(training.options, training.optimizer), {}
    for step in range(steps):
        _, gradients = training.gradients(step)
        replays.step(gradients, DRIFT_RATE)
        training.optimizer.step(gradients, DRIFT_RATE)
        if (step + 1) % max(1, steps // POINTS) == 0:
            for name, (distance, along) in replays.compare().items():
                record.setdefault(name, []).append([step + 1, along, distance])
    return record


def measured() -> list[str]:
    """Return the formats that can be measured on this machine."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return [name for name in FORMATS if name != BITSANDBYTES]
    return list(FORMATS)


def quieten() -> None:
    """Use one thread, and silence bitsandbytes' warning that it has no GPU."""
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def run_all(seeds: list[int], drift_steps: int, demo_flags: list[str], processes: int, kept: pathlib.Path | None = None) -> dict:
    """Run every training. Records that the folder `kept` has are reused; the others are written to it.

    Returns
    -------
    dict
        `own`: {format: {seed: record of :func:`own_gradients`}}; `drift`: record of :func:`drift`; `options`: the demo's.
    """
    by_seed = {seed: run.parse_arguments([*demo_flags, "--seed", str(seed)]) for seed in seeds}
    tasks = {f"{BASELINE}, seed {seed}": (own_gradients, BASELINE, by_seed[seed], seed == seeds[0], True) for seed in seeds}
    tasks["drift"] = (drift, by_seed[seeds[0]], drift_steps)
    tasks |= {f"{name}, seed {seed}": (own_gradients, name, by_seed[seed], seed == seeds[0])
              for seed in seeds for name in measured() if name != BASELINE}
    records = {}
    if kept:
        kept.mkdir(parents=True, exist_ok=True)
        records = {file.stem: json.loads(file.read_text()) for file in kept.glob("*.json") if file.stem in tasks}
    with concurrent.futures.ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), quieten) as pool:
        futures = {pool.submit(*task): name for name, task in tasks.items() if name not in records}
        try:
            for future in tqdm(concurrent.futures.as_completed(futures), total=len(futures), desc="trainings"):
                name = futures[future]
                records[name] = future.result()
                if kept:
                    (kept / f"{name}.json").write_text(json.dumps(records[name]))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    own = {name: {seed: records[f"{name}, seed {seed}"] for seed in seeds} for name in measured()}
    return {"own": own, "drift": records["drift"], "options": by_seed[seeds[0]]}


def main() -> None:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--drift-steps", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=cores, help=f"trainings side by side (all cores: {cores})")
    parser.add_argument("--keep", type=pathlib.Path, help="a folder that keeps every training's record, to go on after an interruption")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "RESULTS.md", help="a file with the two markers")
    parser.add_argument("--chart", type=pathlib.Path, default=HERE / "peers" / "quality.png")
    options, demo_flags = parser.parse_known_args()
    quieten()
    found = run_all(options.seeds, options.drift_steps, demo_flags, options.processes, options.keep)
    skipped = [f"{name} skipped: it cannot be imported" for name in FORMATS if name not in found["own"]]
    text = quality_report.markdown(found, skipped)
    print(text)
    quality_report.draw(found, options.chart)
    report.write_between_markers(options.results, "bench-quality", text, "Loss, weight error, spike and drift of every format",
                                 options.chart)


if __name__ == "__main__":
    main()
