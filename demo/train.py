"""One worker of the demo, started by torchrun: trains the model through Orlop or with torch alone, and writes a record.

Both ways use the same rows of the same batches, the same initial weights and the same schedule. They differ only in who averages gradients
and who updates weights. Rank 0 writes the record (JSON) that `report.py` reads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import pathlib
import time

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported first, so that exit joins gloo's threads (see python/orlop/job/workers.py)
from tqdm import tqdm

from demo import data, model, processes

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_NORM = 1.0
STEP_PARTS = ("reduce", "push", "commit", "pull", "gather")  # of orlop.Optimizer.timings, in order
VALIDATIONS = 5  # evenly spread over the run, first and last step included


class PlainTorch:
    """torch.optim.AdamW in every worker, on gradients averaged by an all-reduce."""

    def __init__(self, gpt: model.GPT, options: argparse.Namespace) -> None:
        self._parameters = list(gpt.parameters())
        self.optimizer = torch.optim.AdamW(model.parameter_groups(gpt, WEIGHT_DECAY), lr=options.lr, betas=BETAS)
        self.seconds = {"reduce": 0.0, "clip and apply": 0.0}

    def step(self) -> None:
        start = time.perf_counter()
        gradient = torch.cat([p.grad.flatten() for p in self._parameters])
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
        for parameter, part in zip(self._parameters, gradient.split([p.numel() for p in self._parameters])):
            parameter.grad.copy_(part.view_as(parameter))
        reduced = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(self._parameters, MAX_NORM)
        self.optimizer.step()
        self.seconds["reduce"] += reduced - start
        self.seconds["clip and apply"] += time.perf_counter() - reduced

    def close(self) -> None:
        """Do nothing."""


class ThroughServers:
    """orlop.AdamW: the package averages gradients, pushes each part once, and returns with the new weights."""

    def __init__(self, gpt: model.GPT, options: argparse.Namespace) -> None:
        import orlop  # the plain run does not need the package

        self._session = orlop.connect(options.server, job=options.job)
        self._session.bind(gpt)
        self.optimizer = orlop.AdamW(model.parameter_groups(gpt, WEIGHT_DECAY), lr=options.lr, betas=BETAS,
                                     session=self._session, state=options.state, max_norm=MAX_NORM)
        self.seconds = dict.fromkeys((*STEP_PARTS, "other"), 0.0)

    def step(self) -> None:
        self.optimizer.step()
        timings = self.optimizer.timings
        for part in STEP_PARTS:
            self.seconds[part] += timings[part]
        self.seconds["other"] += timings["total"] - sum(timings[part] for part in STEP_PARTS)

    def close(self) -> None:
        self._session.close()


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the run, then a cosine down to a tenth."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return (step + 1) / warm_up
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


@torch.no_grad()
def validation_loss(gpt: model.GPT, text: torch.Tensor, options: argparse.Namespace) -> float:
    """Return the mean over evenly spread held-out sequences. If there are several workers, each computes its share."""
    total = torch.zeros(2, dtype=torch.float64)
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for rows in data.validation_batches(text, count=options.validation_sequences, batch_size=8 * world_size,
                                        context=options.context):
        mine = rows[rank::world_size]
        if len(mine):
            total += torch.tensor([gpt.loss(mine).item() * len(mine), len(mine)])
    if world_size > 1:
        dist.all_reduce(total)
    return (total[0] / total[1]).item()


def tensor_bytes(gpt: model.GPT, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Return the bytes that this worker keeps between steps, by slot."""
    sizes = {"weight": sum(p.nbytes for p in gpt.parameters()),
             "gradient": sum(p.grad.nbytes for p in gpt.parameters() if p.grad is not None)}
    for values in optimizer.state.values():
        for slot, value in values.items():
            if torch.is_tensor(value) and value.dim() > 0:
                sizes[slot] = sizes.get(slot, 0) + value.nbytes
    return sizes


def train(options: argparse.Namespace) -> dict:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    text = data.load_text()
    gpt = model.seeded_model(model.ModelConfig(depth=options.depth, width=options.width, context=options.context), options.seed)
    way = ThroughServers(gpt, options) if options.through == "orlop" else PlainTorch(gpt, options)
    schedule = torch.optim.lr_scheduler.LambdaLR(way.optimizer, lambda step: learning_rate_factor(step, options.steps))
    validated_at = {round(index * options.steps / (VALIDATIONS - 1)) for index in range(VALIDATIONS)}
    record = {"through": options.through, "losses": [], "validation": [], "parameters": gpt.config.parameter_count(),
              "text_digest": text.digest, "workers": world_size}
    seconds = {"forward and backward": 0.0}
    bar = tqdm(range(options.steps), desc=options.through, disable=rank != 0, unit="step", dynamic_ncols=True)
    start = time.perf_counter()
    for step in bar:
        if step in validated_at:
            record["validation"].append([step, validation_loss(gpt, text.validation, options)])
        rows = data.batch(text.train, seed=options.seed, step=step, count=options.batch, context=options.context)
        way.optimizer.zero_grad()
        began = time.perf_counter()
        loss = gpt.loss(rows[rank::world_size])
        loss.backward()
        seconds["forward and backward"] += time.perf_counter() - began
        way.step()
        schedule.step()
        mean_loss = loss.detach() / world_size
        dist.all_reduce(mean_loss)
        record["losses"].append(mean_loss.item())
        bar.set_postfix(loss=f"{mean_loss.item():.3f}", refresh=False)
    record["validation"].append([options.steps, validation_loss(gpt, text.validation, options)])
    record["total_seconds"] = time.perf_counter() - start
    record["seconds"] = {name: total / options.steps for name, total in {**seconds, **way.seconds}.items()}
    record["worker_bytes"] = tensor_bytes(gpt, way.optimizer)
    way.close()
    return record


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--through", choices=("orlop", "torch"), required=True)
    parser.add_argument("--server", help="any server of the cluster, HOST:PORT (orlop)")
    parser.add_argument("--job", help="name of the job (orlop)")
    parser.add_argument("--state", choices=("8bit", "fp32"), default="8bit")
    for name in ("steps", "batch", "depth", "width", "context", "seed", "validation-sequences"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--lr", type=float, required=True)
    parser.add_argument("--record", type=pathlib.Path, required=True, help="JSON file that rank 0 writes")
    return parser.parse_args()


def main() -> None:
    processes.end_with_parent()
    options = parse_arguments()
    dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
    record = train(options)
    if dist.get_rank() == 0:
        options.record.write_text(json.dumps(record))
    dist.barrier()  # keeps every process's connections open until nobody needs them
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
