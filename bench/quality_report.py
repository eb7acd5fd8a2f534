"""Prints, draws and writes the results of `quality.py`: the figures of every format, their limits, and curves."""

from __future__ import annotations

import pathlib
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench.peers import report
from demo import model

BASELINE, BITSANDBYTES = "torch fp32", "bitsandbytes 8-bit"
MOST_ABOVE = {"Orlop 8-bit": 0.005, "Orlop 4-bit": 0.02, "Orlop 8-bit, 24-bit master": 0.005, "Orlop 8-bit, bf16 master": 0.005}
MOST_OFF = 0.05  # limit of the drift's length, and of the loss after a spike
WINDOW = 10  # a loss is the mean of this many steps
STYLES = {BASELINE: ("#444444", "-"), "Orlop fp32": ("#9aa5ad", "--"), "Orlop 8-bit": ("#0b6e8a", "-"), "Orlop 4-bit": ("#e0a030", "-"),
          "Orlop 8-bit, 24-bit master": ("#8fb572", "-."), "Orlop 8-bit, bf16 master": ("#d1603d", "-"), BITSANDBYTES: ("#7a6c9d", ":")}


class Figures(NamedTuple):
    """Results of one state format.

    Attributes
    ----------
    held_out : list of float
        Held-out loss at the end, one per seed.
    above : float
        Mean held-out loss relative to fp32's, minus 1.
    weight_error : float or None
        Relative L2 error of the weight change at the end, given fp32's gradients; mean of all seeds. None for fp32 itself.
    recovery_steps : int or None
        Steps after the spike until the loss stays within `MOST_OFF` of the run without it; None if it never does.
    spike_above : float
        Held-out loss at the end of the run with the spike relative to the run without, minus 1.
    along : float or None
        Length of the weight drift's projection on fp32's drift, divided by fp32's length.
    """

    held_out: list[float]
    above: float
    weight_error: float | None
    recovery_steps: int | None
    spike_above: float
    along: float | None


class Goal(NamedTuple):
    """A figure and its limit."""

    what: str
    found: str
    limit: str
    met: bool


def means(values: list[float]) -> np.ndarray:
    """Return the mean of every `WINDOW` consecutive values (of all values if there are fewer)."""
    window = min(WINDOW, len(values))
    return np.convolve(values, np.full(window, 1 / window), "valid")


def after_spike(record: dict) -> np.ndarray:
    """Return the loss with the spike relative to the loss without, both as `means`, from the step of the spike on."""
    return means(record["spike"]["losses"]) / means(record["losses"][record["spike"]["step"]:]) - 1


def recovery_steps(record: dict) -> int | None:
    outside = np.flatnonzero(after_spike(record) > MOST_OFF)
    if len(outside) and outside[-1] == len(after_spike(record)) - 1:
        return None
    return int(outside[-1]) + 1 if len(outside) else 0


def figures(found: dict) -> dict[str, Figures]:
    """Return the figures of every measured format."""
    own, results = found["own"], {}
    baseline = np.mean([record["held_out"] for record in own[BASELINE].values()])
    for name, records in own.items():
        held_out = [record["held_out"] for record in records.values()]
        first = next(record for record in records.values() if "spike" in record)
        errors = [record["weight_error"][name][-1][1] for record in own[BASELINE].values() if name != BASELINE]
        results[name] = Figures(held_out, float(np.mean(held_out) / baseline - 1), float(np.mean(errors)) if errors else None,
                                recovery_steps(first), first["spike"]["held_out"] / first["held_out"] - 1,
                                found["drift"][name][-1][1] if name in found["drift"] else None)
    return results


def goals(found: dict) -> list[Goal]:
    """Return every figure with a limit, and whether it is met."""
    results = figures(found)
    checked = [Goal(f"{name}: held-out loss above fp32's", f"{results[name].above:+.2%}", f"at most {limit:.1%}",
                    results[name].above <= limit)
               for name, limit in MOST_ABOVE.items()]
    if BITSANDBYTES in results:
        ours, theirs = results["Orlop 8-bit"].weight_error, results[BITSANDBYTES].weight_error
        checked.append(Goal("Orlop 8-bit: weight error beside bitsandbytes'", f"{ours:.5f}", f"at most {theirs:.5f}", ours <= theirs))
    for name in MOST_ABOVE:
        steps = results[name].recovery_steps
        checked.append(Goal(f"{name}: back within {MOST_OFF:.0%} after the spike", "never" if steps is None else f"after {steps} steps",
                            "before the end", steps is not None))
    for name in MOST_ABOVE:
        along = results[name].along
        checked.append(Goal(f"{name}: drift along fp32's", f"{along:.2%}", f"{1 - MOST_OFF:.0%} to {1 + MOST_OFF:.0%}",
                            abs(along - 1) <= MOST_OFF))
    return checked


def figures_table(found: dict) -> str:
    """Format one row for every format."""
    seeds = ", ".join(str(seed) for seed in found["own"][BASELINE])
    rows = []
    for name, result in figures(found).items():
        rows.append([name, f"{np.mean(result.held_out):.4f}", ", ".join(f"{loss:.4f}" for loss in result.held_out),
                     "" if name == BASELINE else f"{result.above:+.2%}",
                     "" if result.weight_error is None else f"{result.weight_error:.4g}",
                     "never" if result.recovery_steps is None else str(result.recovery_steps), f"{result.spike_above:+.2%}",
                     "" if result.along is None else f"{result.along:.2%}"])
    return report.table(["", "held-out loss, mean", f"seeds {seeds}", "above fp32", "weight error, given gradients",
                         f"steps to within {MOST_OFF:.0%} after the spike", "held-out loss above the run without", "drift along fp32's"],
                        rows)


def markdown(found: dict, skipped: list[str]) -> str:
    """Format the whole report except the chart."""
    demo, drift_steps = found["options"], max(points[-1][0] for points in found["drift"].values())
    config = model.ModelConfig(demo.depth, demo.width, context=demo.context)
    facts = (f"The demo's GPT, {config.parameter_count() / 1e6:.2f} M parameters, {demo.steps} steps of "
             f"{demo.batch} x {demo.context} bytes, "
             f"lr {demo.lr:g} with warm-up and cosine, seeds {', '.join(str(seed) for seed in found['own'][BASELINE])}; spike: the "
             f"first seed; drift: {drift_steps} steps of a smaller GPT, the first seed. "
             f"{report.machine()}; {report.versions(('torch', 'bitsandbytes', 'numpy'))}.")
    limits = report.table(["", "found", "limit", ""], [[*goal[:3], "met" if goal.met else "missed"] for goal in goals(found)])
    return "\n\n".join([facts, figures_table(found), limits, *skipped])


def seed_mean(records: dict, key: str = "losses") -> np.ndarray:
    return np.mean([record[key] for record in records.values()], axis=0)


def draw(found: dict, path: pathlib.Path) -> None:
    """Draw six panels, each format in one colour: losses, their excess over fp32 at the end, weight errors, the spike and the drift."""
    own, results = found["own"], figures(found)
    baseline = seed_mean(own[BASELINE])
    style = {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.25, "axes.axisbelow": True,
             "font.size": 10, "axes.titlesize": 11}
    with plt.rc_context(style):
        figure, axes = plt.subplots(2, 3, figsize=(15, 8.6), layout="constrained")
        (losses, above, ends), (errors, spike, drift) = axes
        for place, (name, (colour, line)) in enumerate((name, STYLES[name]) for name in own):
            options = {"color": colour, "linestyle": line, "linewidth": 1.8}
            mean = seed_mean(own[name])
            steps = np.arange(len(means(mean))) + min(WINDOW, len(mean))
            losses.plot(steps, means(mean), label=name, **options)
            each = [loss / other - 1 for loss, other in zip(results[name].held_out, results[BASELINE].held_out)]
            if name != BASELINE:
                above.plot(steps, (means(mean) / means(baseline) - 1) * 100, **options)
                points = np.mean([record["weight_error"][name] for record in own[BASELINE].values()], axis=0)
                errors.plot(*points.T, **options)
                drift.plot([point[0] for point in found["drift"][name]], [point[1] * 100 for point in found["drift"][name]], **options)
                ends.plot([value * 100 for value in each], [place] * len(each), "o", color=colour, alpha=0.45, markersize=5)
                ends.plot(results[name].above * 100, place, "D", color=colour, markersize=8)
            if name in MOST_ABOVE:
                ends.plot([MOST_ABOVE[name] * 100] * 2, [place - 0.35, place + 0.35], color="#b00020", linewidth=2)
            record = next(record for record in own[name].values() if "spike" in record)
            ratio = after_spike(record) * 100
            spike.plot(np.arange(len(ratio)) + record["spike"]["step"], ratio, **options)
        losses.set(title="Training loss, mean of all seeds", xlabel="step", ylabel=f"nats per byte, mean of {WINDOW} steps")
        above.set(title="Training loss beside torch fp32's", xlabel="step", ylabel="above, %")
        compared = [name for name in own if name != BASELINE]
        ends.set(title="Held-out loss at the end (red: limit)", xlabel="above torch fp32's, % (diamond: mean of seeds)")
        ends.set_yticks([list(own).index(name) for name in compared], compared)
        ends.invert_yaxis()
        errors.set(title="Weight error, given torch fp32's gradients", xlabel="step", ylabel="relative L2 of the weight change",
                   yscale="log")
        spike.set(title="After a gradient 100 times as large", xlabel="step", ylabel="training loss above the run without, %")
        spike.axhline(MOST_OFF * 100, color="#b00020", linewidth=1.2)
        drift.axhspan(100 - MOST_OFF * 100, 100 + MOST_OFF * 100, color="#0b6e8a", alpha=0.08)
        drift.set(title="Drift at a learning rate of 1e-6", xlabel="step", ylabel="length along torch fp32's, %")
        figure.legend(*losses.get_legend_handles_labels(), loc="outside lower center", ncols=len(own), frameon=False)
        figure.savefig(path, dpi=110)
        plt.close(figure)
