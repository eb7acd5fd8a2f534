"""Prints, draws and writes the results of `memory.py`: bytes per parameter of every way of training, and their limits."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench.peers import report

MOST_AT_PEAK = {"Orlop bf16": 10.8, "Orlop fp32": 18.4, "Orlop fp32, bf16 gradients": 16.4}  # bytes per parameter
MOST_AT_REST = 6.2
WAYS = (*MOST_AT_PEAK, "torch bf16", "torch fp32", "torch bf16, fp32 master", "bitsandbytes bf16")
PARTS = {"worker": "#0b6e8a", "servers": "#e0a030", "shared memory that nobody maps": "#7a6c9d"}


class Figures(NamedTuple):
    """Bytes per parameter of one way, each the median of all rounds.

    Attributes
    ----------
    parts : numpy.ndarray
        At the peak, of every part of `PARTS`.
    low, peak, high : float
        Their sum: the lowest of all rounds, the median, the highest.
    rest : float or None
        Without the worker. None if the way has no servers.
    """

    parts: np.ndarray
    low: float
    peak: float
    high: float
    rest: float | None


def figures(runs: list[dict]) -> Figures | None:
    """Return the figures of the runs of one way; None if it was skipped."""
    if any("skipped" in run for run in runs):
        return None
    peaks = np.array([np.array(run["peak"]) / run["parameters"] for run in runs])
    rests = [sum(run["rest"]) / run["parameters"] for run in runs]
    sums = peaks.sum(axis=1)
    rest = float(np.median(rests)) if any(rests) else None
    return Figures(np.median(peaks, axis=0), sums.min(), float(np.median(sums)), sums.max(), rest)


def words(run: dict) -> str:
    """Describe one run."""
    if "skipped" in run:
        return f"skipped: {run['skipped']}"
    parts = ", ".join(f"{name} {part / run['parameters']:.2f}" for name, part in zip(PARTS, run["peak"]))
    return f"{sum(run['peak']) / run['parameters']:.2f} bytes per parameter ({parts}), {sum(run['rest']) / run['parameters']:.2f} at rest"


def limit_words(found: float, limit: float | None) -> list[str]:
    return ["", ""] if limit is None else [f"at most {limit:g}", "met" if found <= limit else "missed"]


def markdown(found: dict[str, dict[str, list[dict]]]) -> str:
    """Format the whole report except the chart."""
    rounds = max(len(runs) for ways in found.values() for runs in ways.values())
    texts = [f"Bytes per parameter, {f'medians of {rounds} rounds' if rounds > 1 else 'one round'}. "
             f"{report.machine()}; {report.versions(('torch', 'bitsandbytes'))}."]
    for model, ways in found.items():
        rows, skipped = [], []
        count = next(run["parameters"] for runs in ways.values() for run in runs if "parameters" in run)
        for way, runs in ways.items():
            result = figures(runs)
            if result is None:
                skipped.append(f"{way} skipped: {next(run['skipped'] for run in runs if 'skipped' in run)}")
                continue
            rest = ["", "", ""] if result.rest is None else [f"{result.rest:.2f}", *limit_words(result.rest, MOST_AT_REST)]
            rows.append([way, *(f"{part:.2f}" for part in result.parts), f"{result.peak:.2f}", f"{result.low:.2f} to {result.high:.2f}",
                         *limit_words(result.peak, MOST_AT_PEAK.get(way)), *rest])
        texts.append(f"**{model}**, {count / 1e6:.1f} M parameters")
        texts.append(report.table(["", *PARTS, "peak of a step", "rounds", "limit", "", "at rest, no worker", "limit", ""], rows))
        texts.extend(skipped)
    return "\n\n".join(texts)


def draw(found: dict[str, dict[str, list[dict]]], path: pathlib.Path) -> None:
    """Draw a bar of its parts for every way, and a red line at its limit; one panel for each model."""
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
             "axes.grid.axis": "x", "font.size": 10, "axes.titlesize": 11}
    with plt.rc_context(style):
        figure, panels = plt.subplots(1, len(found), figsize=(7.5 * len(found), 4.2), layout="constrained", sharex=True, squeeze=False)
        for axes, (model, ways) in zip(panels[0], found.items()):
            shown = {way: result for way, runs in ways.items() if (result := figures(runs)) is not None}
            places, begins = np.arange(len(shown)), np.zeros(len(shown))
            for part, (name, colour) in enumerate(PARTS.items()):
                widths = np.array([result.parts[part] for result in shown.values()])
                axes.barh(places, widths, left=begins, color=colour, label=name)
                begins += widths
            for place, (way, result) in enumerate(shown.items()):
                axes.text(result.peak + 0.2, place, f"{result.peak:.1f}", va="center")
                if way in MOST_AT_PEAK:
                    axes.plot([MOST_AT_PEAK[way]] * 2, [place - 0.45, place + 0.45], color="#b00020", linewidth=2)
            axes.set_yticks(places, list(shown))
            axes.invert_yaxis()
            axes.set(title=f"{model}: peak of a step (red: limit)", xlabel="bytes per parameter")
        figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PARTS), frameon=False)
        figure.savefig(path, dpi=110)
        plt.close(figure)
