"""The main job from start to end: servers, workers, the same training in plain torch, figures, generated text, and the servers' tables.

    python -m demo [--steps 300] [--workers 2] [--servers 2] [--state 8bit|fp32] [--no-baseline] [--seed 0] [--out demo-out]
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
JOB = "demo"
PROMPT = b"def "
TRAINING_FLAGS = ("steps", "batch", "depth", "width", "context", "seed", "lr", "validation_sequences")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__.splitlines()[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="training steps")
    parser.add_argument("--workers", type=int, default=2, help="training processes")
    parser.add_argument("--servers", type=int, default=2, help="orlopd processes")
    parser.add_argument("--state", choices=("8bit", "fp32"), default="8bit", help="optimizer state on the servers")
    parser.add_argument("--no-baseline", action="store_true", help="leave out the training in plain torch")
    parser.add_argument("--seed", type=int, default=0, help="of the weights, the batches and the text")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("demo-out"), help="folder of plot, records and logs")
    parser.add_argument("--depth", type=int, default=3, help="blocks of the model")
    parser.add_argument("--width", type=int, default=512, help="width of the model, a multiple of 64")
    parser.add_argument("--context", type=int, default=128, help="bytes of a sequence")
    parser.add_argument("--batch", type=int, default=4, help="sequences of a step, all workers together")
    parser.add_argument("--validation-sequences", type=int, default=64, help="held-out sequences of a validation")
    parser.add_argument("--lr", type=float, default=1e-3, help="highest learning rate")
    parser.add_argument("--memory", default="1GiB", help="budget of each server")
    options = parser.parse_args(arguments)
    for name in ("steps", "workers", "servers", "batch", "depth", "width", "context", "validation_sequences"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}; it must be at least 1")
    if options.batch % options.workers:
        parser.error(f"--batch is {options.batch}; it must be a multiple of --workers, {options.workers}")
    if options.validation_sequences < options.workers:
        parser.error(f"--validation-sequences is {options.validation_sequences}; every worker needs one, {options.workers} in all")
    if options.width % 64:
        parser.error(f"--width is {options.width}; it must be a multiple of 64")
    return options


def train(options: argparse.Namespace, through: str, servers):
    """Run the workers to their end. Return their record, with the memory of all processes over time."""
    from demo import processes

    record_file = options.out / f"{through}.json"
    record_file.unlink(missing_ok=True)
    flags = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in TRAINING_FLAGS]
    if through == "orlop":
        flags += [f"--server={servers.address}", f"--job={JOB}", f"--state={options.state}"]
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // options.workers)),
                                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    launcher = processes.Child(f"training through {through}", [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.workers}", "-m",
        "demo.train", f"--through={through}", f"--record={record_file.resolve()}", *flags], env=environment)
    with processes.MemoryTrace(servers.children, launcher) as trace:
        try:
            while not ended(launcher):
                servers.check()
        finally:
            launcher.stop()
    if launcher.process.returncode:
        launcher.check()
    record = json.loads(record_file.read_text())
    record["memory"] = {"seconds": trace.seconds, "server_bytes": trace.server_bytes, "worker_bytes": trace.worker_bytes}
    record_file.write_text(json.dumps(record))
    return record


def ended(child, period_seconds: float = 1.0) -> bool:
    try:
        child.process.wait(period_seconds)
        return True
    except subprocess.TimeoutExpired:
        return False


def bin_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("ORLOP_BIN_DIR", ROOT / "build" / "release" / "bin"))


def command_line(servers, *arguments: str, capture: bool = False) -> str:
    """Run `orlop` against the servers. Its output is printed on the terminal unless `capture` is set."""
    command = [str(bin_folder() / "orlop"), "--server", servers.address, *arguments]
    if not capture:
        print("\n$ " + " ".join(["orlop", *command[1:]]), flush=True)
    return subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE if capture else None).stdout or ""


def pulled_text(options: argparse.Namespace, servers, count: int = 320) -> str:
    """Return text of a fresh model whose weights are pulled, one by one, from the servers."""
    import torch

    import orlop
    from demo import model

    torch.set_num_threads(1)  # for one byte at a time, threads would wait for each other longer than they work
    config = model.ModelConfig(depth=options.depth, width=options.width, context=options.context)
    gpt = model.seeded_model(config, options.seed + 1)  # not the initial weights of the training
    with orlop.connect(servers.address, job=JOB) as session, torch.no_grad():
        for name, parameter in gpt.named_parameters():
            parameter.copy_(session.get(name))
    return (PROMPT + gpt.continue_text(PROMPT, count, seed=options.seed)).decode(errors="replace")


def run(options: argparse.Namespace) -> None:
    from demo import processes, report

    try:
        import orlop  # noqa: F401 - a missing package is found before a minute of training, not after it
    except ImportError as error:
        raise processes.ProcessFailed(f"the package orlop is not in {sys.executable}: {error}. `make demo` installs it.") from error
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="orlop-demo-") as folder, \
            processes.Servers(bin_folder() / "orlopd", options.servers, pathlib.Path(folder), options.out,
                              options.memory) as servers:
        print(f"{options.servers} orlopd ready, the first on {servers.address}; {options.workers} workers", flush=True)
        ours = train(options, "orlop", servers)
        statuses = json.loads(command_line(servers, "status", "--json", capture=True))
        plain = None if options.no_baseline else train(options, "torch", servers)
        server_bytes = report.bytes_by_slot(statuses, JOB)
        print(report.loss_table(ours, plain))
        print(report.bytes_table(ours, plain, server_bytes))
        print(report.time_table(ours, plain, statuses))
        print(f"\nplot: {report.plot(ours, plain, server_bytes, options.out / 'loss-and-memory.png')}")
        print(f"\nText of a fresh model, its weights pulled from the servers:\n\n{pulled_text(options, servers)}")
        command_line(servers, "servers")
        command_line(servers, "describe", "blocks.0.query_key_value.weight", "--job", JOB)
        print("\nThe servers stop now. To go on: `python -m demo --steps 1000` trains longer, `--servers 3` shards further, `--state fp32`"
              "\nkeeps full optimizer state; README.md has the fifteen lines for a model of your own.")


def stop_on_sigterm(*_) -> None:
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    signal.signal(signal.SIGTERM, stop_on_sigterm)
    from demo import processes

    try:
        run(options)
    except KeyboardInterrupt:
        print("\nstopped; no process is left behind", file=sys.stderr)
        return 130
    except (processes.ProcessFailed, subprocess.CalledProcessError, OSError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
