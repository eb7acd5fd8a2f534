"""Tables and the plot of the demo, from the records of the workers and the servers' statistics."""

from __future__ import annotations

import pathlib

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

GIB = 1 << 30
TRAIN_WINDOW = 10  # a printed or drawn training loss is the mean of this many steps
COLOURS = {"orlop": "#0b6e8a", "torch": "#d1603d"}
SLOT_COLOURS = {"weight": "#0b6e8a", "remainder": "#5aa9bf", "exp_avg": "#e0a030", "exp_avg_sq": "#d1603d", "gradient": "#9aa5ad"}
TIME_PARTS = ("forward and backward", "reduce", "push", "commit", "pull", "gather", "clip and apply", "other")  # in the order of a step
OTHER_COLOURS = ("#7a6c9d", "#8fb572", "#c58fae", "#6b6b6b")


def bytes_by_slot(statuses: list[dict], job: str) -> dict[str, tuple[int, int]]:
    """Return (bytes now, highest bytes) of every slot of a job, added over servers and tiers.

    `statuses` is the output of `orlop status --json`: one ServerStatusResponse per server.
    """
    totals: dict[str, tuple[int, int]] = {}
    for status in statuses:
        for use in status["uses"]:
            if use["job"] == job:
                now, peak = totals.get(use["slot"], (0, 0))
                totals[use["slot"]] = (now + use["bytes"], peak + use["peak_bytes"])
    return totals


def _window_mean(losses: list[float], end: int) -> float:
    window = losses[max(0, end - TRAIN_WINDOW):end] or losses[:1]
    return sum(window) / len(window)


def _table(title: str, header: list[str], rows: list[list[str]]) -> str:
    """Format a table with the first column aligned left and the others right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                       for column, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in [header, *rows]]
    return "\n".join(["", title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def loss_table(ours: dict, plain: dict | None) -> str:
    """Format the training loss (mean of the last steps) and the loss on held-out files of both runs, in nats per byte."""
    header = ["step", "orlop train", "held out"] + (["torch train", "held out", "difference"] if plain else [])
    rows = []
    for index, (step, loss) in enumerate(ours["validation"]):
        row = [str(step), f"{_window_mean(ours['losses'], step):.4f}", f"{loss:.4f}"]
        if plain:
            other = plain["validation"][index][1]
            row += [f"{_window_mean(plain['losses'], step):.4f}", f"{other:.4f}", f"{(loss / other - 1) * 100:+.2f} %"]
        rows.append(row)
    return _table(f"Loss, nats per byte (train: mean of the {TRAIN_WINDOW} steps before; difference: on held-out files)", header, rows)


def bytes_table(ours: dict, plain: dict | None, server_bytes: dict[str, tuple[int, int]]) -> str:
    """Format bytes per parameter by slot: on a worker, on all servers together at rest and at their peak, and on a plain torch worker."""
    count = ours["parameters"]
    per = lambda size: f"{size / count:.2f}" if size else "-"  # noqa: E731
    columns = [ours["worker_bytes"], {slot: now for slot, (now, _) in server_bytes.items()},
               {slot: peak for slot, (_, peak) in server_bytes.items()}]
    header = ["slot", "each worker", "servers, now", "servers, peak"]
    if plain:
        columns.append(plain["worker_bytes"])
        header.append("each torch worker")
    slots = list(dict.fromkeys(slot for column in columns for slot in column))
    rows = [[slot, *(per(column.get(slot, 0)) for column in columns)] for slot in slots]
    rows.append(["sum", *(per(sum(column.values())) for column in columns)])
    title = (f"Bytes per parameter, {count / 1e6:.2f} M parameters (embeddings and small tensors keep fp32 moments, hence more than 1 byte;"
             "\npeaks of slots need not coincide)")
    return _table(title, header, rows)


def time_table(ours: dict, plain: dict | None, statuses: list[dict]) -> str:
    """Format the mean milliseconds of a step on rank 0, and the servers' own figures of their last step."""
    records = [ours] + ([plain] if plain else [])
    present = set().union(*(record["seconds"] for record in records))
    rows = [[part, *(f"{record['seconds'][part] * 1e3:.1f}" if part in record["seconds"] else "-" for record in records)]
            for part in TIME_PARTS if part in present]
    rows.append(["sum", *(f"{sum(record['seconds'].values()) * 1e3:.1f}" for record in records)])
    text = _table("Milliseconds of a step, mean on rank 0 (orlop's apply is on the servers, below: commit and pull wait for it)",
                  ["part", *(record["through"] for record in records)], rows)
    lasts = [(status["name"], status["last_step"]) for status in statuses if status.get("last_step")]
    if lasts:
        text += "\n" + _table("Milliseconds on the servers, last step", ["server", "stage", "decide", "apply"], [
            [name, *(f"{last[f'{part}_seconds'] * 1e3:.1f}" for part in ("stage", "decide", "apply"))] for name, last in lasts])
    wall = [f"{record['through']} {record['total_seconds']:.0f} s" for record in records]
    together = f", together {sum(record['total_seconds'] for record in records):.0f} s" if plain else ""
    return f"{text}\n\ntraining, validation included: {', '.join(wall)}{together}"


def _draw_losses(axes, records: list[dict]) -> None:
    for record in records:
        losses, colour = record["losses"], COLOURS[record["through"]]
        smooth = [_window_mean(losses, end) for end in range(1, len(losses) + 1)]
        style = "-" if record["through"] == "orlop" else "--"
        axes.plot(range(1, len(losses) + 1), losses, color=colour, alpha=0.18, linewidth=0.8)
        axes.plot(range(1, len(losses) + 1), smooth, style, color=colour, linewidth=1.8, label=f"{record['through']}, training")
        axes.plot(*zip(*record["validation"]), "o" if style == "-" else "x", color=colour, markersize=8, fillstyle="none",
                  markeredgewidth=1.6, label=f"{record['through']}, held-out files")
    axes.set(xlabel="step", ylabel="loss, nats per byte", title="Loss on the standard library's source")
    axes.legend(frameon=False)


def _absmax_together(sizes: dict[str, int]) -> dict[str, int]:
    """Add up the absmax of all slots, because each alone is too small to be visible."""
    merged: dict[str, int] = {}
    for slot, size in sizes.items():
        name = "absmax" if slot.endswith("_absmax") else slot
        merged[name] = merged.get(name, 0) + size
    return merged


def _draw_bytes(axes, columns: dict[str, dict[str, int]], count: int) -> None:
    columns = {name: _absmax_together(column) for name, column in columns.items()}
    slots = list(dict.fromkeys(slot for column in columns.values() for slot in column))
    spare = iter(OTHER_COLOURS * len(slots))
    left = [0.0] * len(columns)
    for slot in slots:
        widths = [column.get(slot, 0) / count for column in columns.values()]
        axes.barh(list(columns), widths, left=left, height=0.55, color=SLOT_COLOURS.get(slot) or next(spare), label=slot)
        left = [a + b for a, b in zip(left, widths)]
    for place, total in enumerate(left):
        axes.text(total + max(left) * 0.01, place, f"{total:.2f}", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="bytes per parameter", title="Where a parameter's bytes are", xlim=(0, max(left) * 1.12))
    axes.legend(frameon=False, ncols=6, loc="upper center", bbox_to_anchor=(0.5, -0.25), fontsize=8)


def _draw_memory(axes, records: list[dict]) -> None:
    for record in records:
        memory, colour = record["memory"], COLOURS[record["through"]]
        axes.plot(memory["seconds"], [size / GIB for size in memory["worker_bytes"]], color=colour, label=f"{record['through']}: workers")
        if record["through"] == "orlop":
            axes.plot(memory["seconds"], [size / GIB for size in memory["server_bytes"]], ":", color=colour, linewidth=2,
                      label="orlop: servers")
    axes.set(xlabel="seconds", ylabel="GiB held (anonymous and shared)", title="Memory of all workers, and of all servers")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, loc="center")


def plot(ours: dict, plain: dict | None, server_bytes: dict[str, tuple[int, int]], path: pathlib.Path) -> pathlib.Path:
    """Draw losses, bytes per parameter and memory over time into a PNG."""
    records = [ours] + ([plain] if plain else [])
    columns = {"Orlop, each worker": ours["worker_bytes"],
               "Orlop, all servers": {slot: now for slot, (now, _) in server_bytes.items() if now}}
    if plain:
        columns["torch, each worker"] = plain["worker_bytes"]
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
             "font.size": 10}
    with plt.rc_context(style):
        figure, axes = plt.subplot_mosaic([["loss", "bytes"], ["loss", "memory"]], figsize=(13, 7), layout="constrained")
        _draw_losses(axes["loss"], records)
        _draw_bytes(axes["bytes"], columns, ours["parameters"])
        _draw_memory(axes["memory"], records)
        figure.suptitle(f"{ours['parameters'] / 1e6:.1f} M parameters, {ours['workers']} workers", fontweight="bold")
        figure.savefig(path, dpi=130)
        plt.close(figure)
    return path
