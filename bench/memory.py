"""Bytes per parameter that one training step takes on one host: worker and servers of Orlop, beside torch and bitsandbytes.

`make bench-memory` runs this. It draws `peers/memory.png` and writes the part of `bench/RESULTS.md` between its two markers.

Each way of training is one worker process, with two servers of its own if it is Orlop's. While the worker makes its steps, the proportional
set sizes (`Pss` of `/proc/PID/smaps_rollup`) of worker and servers are read every few milliseconds. What the worker took after its imports
and what the servers took when they were ready is subtracted. Shared memory that no process of the machine maps counts as the run's if it
came while the run was made. The first step is not counted, since the worker joins its job in it. At rest the worker has ended, and so have
the two seconds after which servers give freed pages back.

- *square*: 48 layers of 2,048 x 2,048, 201 M parameters, batch 4.
- *llama*: 200 M parameters in the shapes of a Llama, with a vocabulary of 32,000 and sizes that are no powers of two; 4 sequences of 16.

Orlop keeps an exact fp32 master and 8-bit moments. torch's AdamW keeps its moments in the dtype of the parameters; with a master copy it is
given fp32 copies of bf16 parameters and of their gradients. A way whose library cannot be imported, or refuses the model, is skipped in
words.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable

import torch

from bench import memory_report
from bench.peers import report

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE_SECONDS = 0.004  # between two looks, each of which takes some milliseconds itself
REST_SECONDS = 3.0  # longer than the servers keep pages that were freed
SQUARE = {"layers": 48, "width": 2048}
LLAMA = {"layers": 11, "width": 1008, "inner": 2728, "vocabulary": 32_000}
WAYS = memory_report.WAYS


class Square(torch.nn.Module):
    """Square layers, each of which adds a little to what passes through."""

    def __init__(self, layers: int, width: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(layers))
        self.width = width

    def loss(self, dtype: torch.dtype) -> torch.Tensor:
        values = torch.randn(4, self.width, dtype=dtype)
        for layer in self.layers:
            values = values + layer(values) / len(self.layers)
        return values.float().square().mean()


class Llama(torch.nn.Module):
    """The matrices of a Llama, with single-headed causal attention and without position codes, which have no parameters."""

    def __init__(self, layers: int, width: int, inner: int, vocabulary: int) -> None:
        super().__init__()

        def linear(begin: int, end: int) -> torch.nn.Linear:
            return torch.nn.Linear(begin, end, bias=False)
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.blocks = torch.nn.ModuleList(torch.nn.ModuleDict({
            "attention_norm": torch.nn.RMSNorm(width), "q": linear(width, width), "k": linear(width, width), "v": linear(width, width),
            "o": linear(width, width), "inner_norm": torch.nn.RMSNorm(width), "gate": linear(width, inner), "up": linear(width, inner),
            "down": linear(inner, width)}) for _ in range(layers))
        self.norm = torch.nn.RMSNorm(width)
        self.head = linear(width, vocabulary)

    def loss(self, dtype: torch.dtype) -> torch.Tensor:
        tokens = torch.randint(self.embedding.num_embeddings, (4, 17))
        values = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            normed = block["attention_norm"](values)
            mixed = torch.nn.functional.scaled_dot_product_attention(block["q"](normed), block["k"](normed), block["v"](normed),
                                                                     is_causal=True)
            values = values + block["o"](mixed)
            normed = block["inner_norm"](values)
            values = values + block["down"](torch.nn.functional.silu(block["gate"](normed)) * block["up"](normed))
        return torch.nn.functional.cross_entropy(self.head(self.norm(values)).flatten(0, 1), tokens[:, 1:].flatten())


MODELS = {"square": (Square, SQUARE), "llama": (Llama, LLAMA)}


class WithMaster:
    """torch's AdamW on fp32 copies of the parameters."""

    def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
        self._parameters = parameters
        self._masters = [parameter.detach().float() for parameter in parameters]
        self._optimizer = torch.optim.AdamW(self._masters, lr=1e-4)

    @torch.no_grad()
    def step(self) -> None:
        for parameter, master in zip(self._parameters, self._masters):
            master.grad, parameter.grad = parameter.grad.float(), None
        self._optimizer.step()
        self._optimizer.zero_grad()
        for parameter, master in zip(self._parameters, self._masters):
            parameter.copy_(master)

    def zero_grad(self) -> None:
        """Nothing to do: a step has dropped the gradients."""


def make_optimizer(way: str, model: torch.nn.Module, address: str) -> torch.optim.Optimizer | WithMaster:
    """Return the optimizer of a way of `WAYS`."""
    parameters = list(model.parameters())
    if way.startswith("Orlop"):
        import orlop
        session = orlop.connect(address, job=re.sub(r"\W+", "-", way))
        session.bind(model)
        return orlop.AdamW(parameters, lr=1e-4, session=session, gradient_wire="bf16" if way.endswith("gradients") else None)
    if way.startswith("bitsandbytes"):
        from bitsandbytes.optim import AdamW8bit
        return AdamW8bit(parameters, lr=1e-4)
    return WithMaster(parameters) if way.endswith("master") else torch.optim.AdamW(parameters, lr=1e-4)


def train(way: str, model_name: str, sizes: dict, steps: int, address: str) -> None:
    """Be the worker: say where it is in lines of JSON, and go on at each line that comes."""
    def tell(**fields) -> None:
        print(json.dumps(fields), flush=True)
        sys.stdin.readline()

    make_model: Callable[..., torch.nn.Module] = MODELS[model_name][0]
    if way.startswith("Orlop"):
        import orlop  # noqa: F401
    if way.startswith("bitsandbytes"):
        import bitsandbytes  # noqa: F401
    tell(at="imported")
    torch.manual_seed(0)
    dtype = torch.float32 if " fp32" in way and not way.endswith("master") else torch.bfloat16
    torch.set_default_dtype(dtype)
    model = make_model(**sizes)
    optimizer = make_optimizer(way, model, address)
    torch.set_default_dtype(torch.float32)
    for step in range(1 + steps):
        if step == 1:
            tell(at="joined", parameters=sum(parameter.numel() for parameter in model.parameters()))
        loss = model.loss(dtype)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    tell(at="stepped", loss=float(loss))


def pss_bytes(process: int) -> tuple[int, int]:
    """Return the proportional set size of a process, swapped pages included, and the part of it that is shared memory."""
    fields = dict(line.split(":", 1) for line in pathlib.Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:])
    pss, swapped, shared = (int(fields[name].split()[0]) << 10 for name in ("Pss", "SwapPss", "Pss_Shmem"))
    return pss + swapped, shared


def shared_bytes() -> int:
    """Return the shared memory of the whole machine."""
    return int(re.search(r"^Shmem: +(\d+) kB$", pathlib.Path("/proc/meminfo").read_text(), re.MULTILINE).group(1)) << 10


class Watch:
    """Reads what a worker and its servers take."""

    def __init__(self, worker: int, servers: list[int]) -> None:
        self._worker, self._servers = worker, servers
        self._shared_before = self._unmapped(sum(shared for _, shared in map(pss_bytes, [worker, *servers])))
        self._before = [0, 0, 0]
        self._before = self.look()

    @staticmethod
    def _unmapped(mapped: int) -> int:
        return shared_bytes() - mapped

    def look(self, with_worker: bool = True) -> list[int]:
        """Return bytes of the worker, of the servers, and of shared memory that neither maps, each above what it was at first."""
        (worker, shared), of_servers = pss_bytes(self._worker) if with_worker else (0, 0), [pss_bytes(one) for one in self._servers]
        mapped = shared + sum(of for _, of in of_servers)
        found = [worker, sum(of for of, _ in of_servers), max(0, self._unmapped(mapped) - self._shared_before)]
        return [now - before if now else 0 for now, before in zip(found, self._before)]

    def highest(self, is_over: threading.Event) -> list[int]:
        """Look until `is_over`; return the bytes of the moment at which their sum was highest."""
        highest = self.look()
        while not is_over.wait(SAMPLE_SECONDS):
            highest = max(highest, self.look(), key=sum)
        return highest


def server_processes() -> list[int]:
    """Return the orlopd processes that this process has started."""
    found = []
    for status in pathlib.Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue  # it has ended
        if re.search(rf"^PPid:\t{os.getpid()}$", text, re.MULTILINE) and text.startswith("Name:\torlopd"):
            found.append(int(status.parent.name))
    return found


def measure(way: str, model_name: str, sizes: dict, steps: int, memory: str) -> dict:
    """Make one run and return its bytes: `peak` and `rest` as of :class:`Watch`, and `parameters`; or `skipped`, a reason."""
    if not way.startswith("Orlop"):
        return run_worker(way, model_name, sizes, steps, "")
    import orlop
    with orlop.local(servers=2, memory=memory) as session:
        return run_worker(way, model_name, sizes, steps, session.address)


def run_worker(way: str, model_name: str, sizes: dict, steps: int, address: str) -> dict:
    """Make one run with the servers that this process has started, if `address` is that of one."""
    worker = subprocess.Popen([sys.executable, "-m", "bench.memory", "--worker", json.dumps([way, model_name, sizes, steps]),
                               "--address", address], cwd=HERE.parent, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE)

    def wait_for(place: str) -> dict:
        for line in worker.stdout:
            if line.startswith("{") and (fields := json.loads(line))["at"] == place:
                return fields
        raise ChildProcessError((worker.stderr.read().strip().splitlines() or ["the worker ended"])[-1])

    def go_on() -> None:
        worker.stdin.write("\n")
        worker.stdin.flush()
    try:
        wait_for("imported")
        watch = Watch(worker.pid, server_processes() if address else [])
        go_on()
        parameters = wait_for("joined")["parameters"]
        is_over, highest = threading.Event(), []
        watching = threading.Thread(target=lambda: highest.extend(watch.highest(is_over)))
        watching.start()
        try:
            go_on()
            wait_for("stepped")
        finally:
            is_over.set()
            watching.join()
        go_on()
    except ChildProcessError as error:
        if not way.startswith("bitsandbytes"):
            raise
        return {"skipped": str(error)}
    finally:
        worker.communicate()
    if not address:
        return {"peak": highest, "rest": [0, 0, 0], "parameters": parameters}
    time.sleep(REST_SECONDS)
    return {"peak": highest, "rest": watch.look(with_worker=False), "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--layers", type=int, help="of every model, in place of 48 and 11")
    parser.add_argument("--steps", type=int, default=4, help="that are counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="2GiB", help="budget of each server")
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "RESULTS.md", help="a file with the two markers")
    parser.add_argument("--chart", type=pathlib.Path, default=HERE / "peers" / "memory.png")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--address", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return train(*options.worker, options.address)
    found: dict[str, dict[str, list[dict]]] = {}
    for number in range(options.rounds):
        for name in options.models:
            sizes = MODELS[name][1] | ({"layers": options.layers} if options.layers else {})
            for way in options.ways:
                run = measure(way, name, sizes, options.steps, options.memory)
                found.setdefault(name, {}).setdefault(way, []).append(run)
                print(f"round {number + 1}, {name}, {way}: {memory_report.words(run)}", flush=True)
    text = memory_report.markdown(found)
    print(text)
    memory_report.draw(found, options.chart)
    report.write_between_markers(options.results, "bench-memory", text, "Bytes per parameter of a step", options.chart)


if __name__ == "__main__":
    main()
