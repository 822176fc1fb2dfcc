"""Pictures: training, accuracy by session, weights of right and wrong pseudo-labels, calibration, accuracy by noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from list_selftrain.train import Run

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555", "#000000"]
MARKERS = "osv^DPX*"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def training(run: Run, path: Path) -> None:
    """Loss by step, a colour for each session; accuracy and accuracy of the pseudo-labels by session."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for session in sorted({row["session"] for row in run.metrics}):
        rows = [row for row in run.metrics if row["session"] == session]
        label = "teacher" if session == 0 else f"session {session}"
        left.plot([row["step"] for row in rows], [row["loss"] for row in rows], color=COLOURS[session % 8], label=label)
    left.set(xlabel="step", ylabel="loss [nats]")
    left.legend(fontsize=8)
    names = {"accuracy": "classifier, test", "pseudo_label_accuracy": "pseudo-labels"}
    for i, (name, label) in enumerate(names.items()):
        held = [k for k, one in enumerate(run.sessions) if name in one]
        values = [run.sessions[k][name] for k in held]
        right.plot(held, values, color=COLOURS[i], marker=MARKERS[i], markersize=4, label=label)
    count = len(run.sessions)
    right.set(xlabel="session (0: teacher)", ylabel="accuracy [%]", xticks=range(0, count, -(-count // 10)))
    if right.lines:
        right.legend(fontsize=8)
    _save(figure, path)


def weights(groups: Mapping[str, np.ndarray], path: Path, *, title: str = "") -> None:
    """Histograms of pseudo-labels' weights, as shares of each group; 1 is the weight in a plain mean."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    top = max((float(np.quantile(values, 0.99)) for values in groups.values() if len(values)), default=1.0)
    bins = np.linspace(0, max(top, 1e-6), 31)
    for i, (name, values) in enumerate(groups.items()):
        if len(values):
            share = np.full(len(values), 1 / len(values))
            label = f"{name} (mean {values.mean():.2f})"
            axes.hist(np.minimum(values, bins[-1]), bins, weights=share, alpha=0.6, color=COLOURS[3 * i], label=label)
    axes.axvline(1, color="0.4", linewidth=0.8, linestyle=":")
    axes.set(xlabel="weight, times the batch's examples", ylabel="share of pseudo-labels", title=title)
    axes.legend(fontsize=8)
    _save(figure, path)


def calibration(found: Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]], path: Path) -> None:
    """Share of right predictions by their probability, a curve for each part; points as large as their count."""
    figure = Figure(figsize=(5, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=":")
    for i, (name, (sure, right, count)) in enumerate(found.items()):
        held = count > 0
        colour = COLOURS[i % 8]
        axes.plot(sure[held], right[held], color=colour, linewidth=1)
        axes.scatter(sure[held], right[held], s=8 + 120 * count[held] / count.sum(), color=colour, label=name)
    axes.set(xlabel="probability of the chosen class", ylabel="share that is right", xlim=(0, 1), ylim=(0, 1))
    axes.legend(fontsize=8)
    _save(figure, path)


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[Sequence[float]]]], path: Path, *, xlabel: str, ylabel: str,
    title: str = "",
) -> None:  # fmt: skip
    """Mean over seeds, of up to four curves with the range of the seeds: {name: (x [P], values [P][seeds])}."""
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (name, (x, values)) in enumerate(curves.items()):
        table = [np.asarray(of, dtype=float) for of in values]
        means: list[Any] = [of.mean() for of in table]
        style = {"color": COLOURS[i % 8], "marker": MARKERS[i % 8], "markersize": 4}
        axes.plot(x, means, label=name, **style)
        if len(curves) <= 4:
            low, high = [of.min() for of in table], [of.max() for of in table]
            axes.fill_between(x, low, high, color=COLOURS[i % 8], alpha=0.15, linewidth=0)
    ticks = sorted({value for x, _ in curves.values() for value in x})
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title, xticks=ticks if len(ticks) <= 10 else axes.get_xticks())
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path)
