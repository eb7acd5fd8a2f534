"""Prints, draws and writes the results of `adamw.py`: a table with machine, versions and spread, ratios and their goals, and a chart."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import pathlib
import platform
import resource
import sys
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch

PACKAGES = ("torch", "deepspeed", "bitsandbytes", "torchao", "numpy")
COLOURS = {"copy": "#9aa5ad", "torch fused": "#d1603d", "DeepSpeed": "#e0a030", "bitsandbytes": "#7a6c9d", "torchao": "#8fb572",
           "Orlop": "#0b6e8a"}
RESAMPLES = 10_000


class Goal(NamedTuple):
    """A ratio of two candidates' times, and its limit."""

    numerator: str
    denominator: str
    limit: float
    at_most: bool


def paired_ratio(numerator: list[float], denominator: list[float]) -> tuple[float, float, float]:
    """Return the median of the ratios of paired rounds.

    Returns
    -------
    low, median, high : float
        The median, and the 95 % interval of a bootstrap over rounds.
    """
    ratios = np.asarray(numerator) / np.asarray(denominator)
    samples = np.random.default_rng(0).choice(ratios, (RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(samples, axis=1), [2.5, 97.5])
    return float(low), float(np.median(ratios)), float(high)


def machine() -> str:
    """Describe CPU, instruction set, cores, memory and kernel in a phrase."""
    cpu = platform.processor() or platform.machine()
    with open("/proc/cpuinfo") as lines:
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30)
    return (f"{cpu} ({torch.backends.cpu.get_cpu_capability()}), {os.cpu_count()} cores, {memory:.0f} GiB, "
            f"{platform.system()} {platform.release()}")


def versions(packages: tuple[str, ...] = PACKAGES) -> str:
    """Return the versions of Python, of Orlop if it was measured, and of those packages that are installed."""
    found = [f"Python {platform.python_version()}"]
    if "orlop.kernels" in sys.modules:
        found.append(f"Orlop {sys.modules['orlop'].__version__}")
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{package} {importlib.metadata.version(package)}")
    return ", ".join(found)


def table(header: list[str], rows: list[list[str]]) -> str:
    """Format a markdown table. All columns except the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def times_table(candidates: list, times: dict[str, list[float]], count: int) -> str:
    """Format the spread of every candidate, fastest first. A candidate with another size than `count` is marked with it."""
    rows = []
    for candidate in sorted(candidates, key=lambda candidate: np.median(times[candidate.name])):
        values = times[candidate.name]
        median = float(np.median(values))
        size = "" if candidate.count == count else f" ({candidate.count / (1 << 20):g} Mi parameters)"
        moved = [f"{candidate.traffic:.4g}", f"{candidate.traffic / median:.1f}"] if candidate.traffic else ["", ""]
        rows.append([candidate.name + size, f"{min(values):.3f}", f"{median:.3f}", f"{max(values):.3f}", *moved])
    return table(["ns per parameter", "min", "median", "max", "bytes per parameter", "GB/s"], rows)


def goals_table(times: dict[str, list[float]], goals: list[Goal]) -> str:
    """Format each goal whose two candidates were measured, as met or missed by its median."""
    rows = []
    for goal in goals:
        if goal.numerator in times and goal.denominator in times:
            low, median, high = paired_ratio(times[goal.numerator], times[goal.denominator])
            met = median <= goal.limit if goal.at_most else median >= goal.limit
            rows.append([f"{goal.numerator} / {goal.denominator}", f"{median:.2f} [{low:.2f}, {high:.2f}]",
                         f"{'at most' if goal.at_most else 'at least'} {goal.limit:g}", "met" if met else "missed"])
    return table(["ratio of paired rounds", "median, 95 % interval", "goal", ""], rows) if rows else ""


def markdown(candidates: list, times: dict[str, list[float]], goals: list[Goal], skipped: list[str], options, load: float) -> str:
    """Format the whole report except the chart."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)
    facts = (f"{options.count / (1 << 20):g} Mi parameters, threads: {options.threads}, {options.rounds} rounds by turns. {machine()}; "
             f"load {load:.1f} before. {versions()}. {peak:.1f} GiB resident at most.")
    parts = [facts, times_table(candidates, times, options.count), goals_table(times, goals), *skipped]
    return "\n\n".join(part for part in parts if part)


def draw(times: dict[str, list[float]], path: pathlib.Path) -> None:
    """Draw medians as dots, with a whisker from minimum to maximum, fastest on top."""
    names = sorted(times, key=lambda name: np.median(times[name]), reverse=True)
    figure, axes = plt.subplots(figsize=(9, 0.38 * len(names) + 1.2), layout="constrained")
    for row, name in enumerate(names):
        values, colour = times[name], next(colour for prefix, colour in COLOURS.items() if name.startswith(prefix))
        axes.plot([min(values), max(values)], [row, row], color=colour, linewidth=2, solid_capstyle="butt", alpha=0.5)
        axes.plot(np.median(values), row, "o", color=colour, markersize=9)
        axes.annotate(f"{np.median(values):.3g}", (max(values), row), (8, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(names)), names)
    axes.set(xscale="log", xlabel="nanoseconds per parameter (logarithmic): median, minimum to maximum",
             title="One AdamW step on a CPU")
    axes.set_xlim(right=2 * max(map(max, times.values())))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write_between_markers(path: pathlib.Path, markers: str, text: str, title: str, chart: pathlib.Path) -> None:
    """Replace the part of a document between the markers of that name by a report and its chart."""
    begin, end = f"<!-- {markers}: begin -->", f"<!-- {markers}: end -->"
    before, rest = path.read_text().split(begin)
    _, after = rest.split(end)
    path.write_text(f"{before}{begin}\n{text}\n\n![{title}]({os.path.relpath(chart, path.parent)})\n{end}{after}")
