"""Pictures: training, scores by pair of label words, calibration, sweeps of claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

if TYPE_CHECKING:
    from flipped_learning.train import Run

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555", "#000000"]
MARKERS = "osv^DPX*"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def training(run: Run, path: Path) -> None:
    """Loss, and the log-likelihood of an instruction token given the right and a wrong label: their margin is what
    flipped learning makes."""
    rows = run.metrics
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(steps, [row["likelihood"] for row in rows], color=COLOURS[0], label="likelihood term")
    if "unlikelihood" in rows[0]:
        left.plot(steps, [row["unlikelihood"] for row in rows], color=COLOURS[3], label="unlikelihood term")
    left.set(xlabel="step", ylabel="loss per token [nats]")
    left.legend(fontsize=8)
    right.plot(steps, [row["log_p_right"] for row in rows], color=COLOURS[0], label="right label")
    if "log_p_wrong" in rows[0]:
        right.plot(steps, [row["log_p_wrong"] for row in rows], color=COLOURS[3], label="wrong label")
    right.set(xlabel="step", ylabel="log P of a target token [nats]")
    right.legend(fontsize=8)
    _save(figure, path)


def pairs(by_task: Mapping[str, Mapping[str, float]], seen: set[str], path: Path) -> None:
    """Macro-F1 by pair of label words, a panel for each data set; blue: seen in training."""
    rows = max(len(values) for values in by_task.values())
    figure = Figure(figsize=(4.2 * len(by_task), 1.2 + 0.26 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(by_task), sharey=True))
    for axes, (name, values) in zip(panels, by_task.items(), strict=True):
        places = np.arange(len(values))[::-1]
        colours = [COLOURS[0] if pair in seen else COLOURS[1] for pair in values]
        axes.barh(places, list(values.values()), color=colours)
        axes.set(title=name, xlabel="macro-F1 [%]", xlim=(0, 100), yticks=places, yticklabels=list(values))
        axes.axvline(50, color="0.4", linewidth=0.8, linestyle=":")
    handles = [figure.axes[0].barh([0], [0], color=COLOURS[i]) for i in (0, 1)]
    figure.legend(handles, ["labels of training", "novel labels"], fontsize=8, loc="outside lower center", ncols=2)
    _save(figure, path)


def calibration(found: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """Share of right predictions by their probability, a curve for each data set; points as large as their count."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    for i, (name, (sure, right, count)) in enumerate(found.items()):
        held = count > 0
        colour = COLOURS[i % 8]
        axes.plot(sure[held], right[held], color=colour, linewidth=1)
        axes.scatter(sure[held], right[held], s=8 + 120 * count[held] / count.sum(), color=colour, label=name)
    axes.set(xlabel="probability of the chosen option", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    _save(figure, path)


def seen_and_novel(arms: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, title: str = "") -> None:
    """Macro-F1 on seen and novel labels and in another domain, for each arm: bars are means, points are seeds."""
    figure = Figure(figsize=(7.5, 3.8), layout="constrained")
    axes = figure.subplots()
    kinds = list(next(iter(arms.values())))
    width = 0.8 / len(arms)
    for i, (arm, values) in enumerate(arms.items()):
        for k, kind in enumerate(kinds):
            place = k + (i - (len(arms) - 1) / 2) * width
            label = arm if k == 0 else None
            axes.bar(place, float(np.mean(values[kind])), width * 0.95, color=COLOURS[i % 8], alpha=0.7, label=label)
            axes.plot([place] * len(values[kind]), values[kind], ".", color="black", markersize=3)
    axes.axhline(50, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xticks=range(len(kinds)), xticklabels=kinds, ylabel="macro-F1 [%]", ylim=(0, 100), title=title)
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path)


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], path: Path, *, xlabel: str, ylabel: str,
    log: str = "",
) -> None:  # fmt: skip
    """Mean over seeds with the range of the seeds: {name: (x [P], values [P][seeds])}; ``log``: "x", "y" or "xy"."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, (x, values)) in enumerate(curves.items()):
        table = [np.asarray(of, dtype=float) for of in values]
        means: list[Any] = [of.mean() for of in table]
        style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "markersize": 4}
        axes.plot(x, means, label=name, **style)
        low, high = [of.min() for of in table], [of.max() for of in table]
        axes.fill_between(x, low, high, color=COLOURS[i % 8], alpha=0.15, linewidth=0)
    axes.set(xlabel=xlabel, ylabel=ylabel)
    if "x" in log:
        ticks = sorted({value for x, _ in curves.values() for value in x})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
    if "y" in log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(fontsize=8)
    _save(figure, path)
