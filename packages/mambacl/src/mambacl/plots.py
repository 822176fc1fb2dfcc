"""Pictures: training, scores by place in the stream, forgetting, generalisation, associations, learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from mambacl.train import Run

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555", "#000000"]
MARKERS = "osv^DPX*"
LABELS = {"accuracy": "accuracy [%]", "mse": "mean squared error", "angle_loss": "1 − cos of the angle"}


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def training(run: Run, path: Path) -> None:
    """Loss, selectivity and relevant mass over the steps of ``run``; meta-tests where there are any."""
    rows = run.metrics
    steps = np.array([row["step"] for row in rows])
    sequence = "selectivity" in rows[0]
    figure = Figure(figsize=(9 if sequence else 5, 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, 2 if sequence else 1))
    losses = [row["task_loss"] for row in rows]
    panels[0].plot(steps, losses, color=COLOURS[0], alpha=0.8)
    scale = "log" if min(losses) > 0 and max(losses) > 20 * min(losses) else "linear"
    panels[0].set(xlabel="step", ylabel="loss of the queries", yscale=scale)
    tested = [(row["step"], row) for row in rows if any(key.startswith("meta_test_") for key in row)]
    if tested:
        name = next(key for key in tested[0][1] if key.startswith("meta_test_"))
        other = panels[0].twinx()
        other.plot([s for s, _ in tested], [row[name] for _, row in tested], color=COLOURS[3], marker=".")
        other.set_ylabel(f"meta-test {LABELS[name.removeprefix('meta_test_')]}", color=COLOURS[3])
    if sequence:
        for block in range(len(rows[0]["selectivity"])):
            colour = COLOURS[block % len(COLOURS)]
            panels[1].plot(steps, [row["selectivity"][block] for row in rows], color=colour, label=f"block {block + 1}")
        panels[1].set(xlabel="step", ylabel="KL(p ‖ q) of a block")
        panels[1].legend(fontsize=8)
    _save(figure, path)


def by_task(curves: Mapping[str, Sequence[float]], metric: str, path: Path) -> None:
    """A score by the task's place in the stream, a curve for each learner."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, values) in enumerate(curves.items()):
        places = np.arange(1, len(values) + 1)
        style = "-" if i < 8 else "--"
        axes.plot(places, values, style, color=COLOURS[i % 8], marker=MARKERS[i % 8], label=name)
    axes.set(xlabel="place of the task in the stream (1: the oldest)", ylabel=LABELS[metric])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path)


def forgetting(metric: str, matrix: np.ndarray, path: Path) -> None:
    """Each task's score while the stream goes on: a curve from the moment that it was seen."""
    figure = Figure(figsize=(5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    count = len(matrix)
    shades = [str(0.75 * t / max(1, count - 1)) for t in range(count)]
    for t in range(count):
        axes.plot(np.arange(t, count) + 1, matrix[t:, t], color=shades[t], marker=".", linewidth=1)
    axes.plot(np.arange(count) + 1, np.nanmean(matrix, 1), color=COLOURS[3], linewidth=2, label="mean of tasks seen")
    axes.set(xlabel="tasks seen", ylabel=f"{LABELS[metric]} (dark: the oldest task)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    _save(figure, path)


def generalization(curves: Mapping[str, Mapping[str, Mapping[Any, float]]], metric: str, path: Path) -> None:
    """A score by number of tasks, shots, noise and data set: a panel for each, a curve for each learner."""
    names = {"tasks": "tasks T", "shots": "shots S", "noise": "noise σ on the inputs", "dataset": "data set"}
    varied = [name for name in names if any(name in its for its in curves.values())]
    figure = Figure(figsize=(3.6 * len(varied), 3.6), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(varied), sharey=True))
    for axes, name in zip(panels, varied, strict=True):
        for i, (learner, its) in enumerate(curves.items()):
            points = [*its.get(name, {}).items()] if name == "dataset" else sorted(its.get(name, {}).items())
            x = [Path(place).name if name == "dataset" else place for place, _ in points]
            y = [value for _, value in points]
            axes.plot(x, y, color=COLOURS[i % 8], marker=MARKERS[i % 8], markersize=4, label=learner)
        axes.set(xlabel=names[name])
        if name in ("tasks", "shots"):
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].set_ylabel(LABELS[metric])
    panels[0].legend(fontsize=7)
    _save(figure, path)


def associations(maps: Mapping[str, np.ndarray], path: Path) -> None:
    """q by task of the query (rows) and token of the stream (columns): right is the block diagonal, framed."""
    figure = Figure(figsize=(4.2 * len(maps), 2.8), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, len(maps)))
    most = max(float(values.max()) for values in maps.values())
    for axes, (name, values) in zip(panels, maps.items(), strict=True):
        tasks, tokens = values.shape
        picture = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=most)
        width = tokens / tasks
        for t in range(tasks):
            left, right = t * width - 0.5, (t + 1) * width - 0.5
            axes.plot([left, right, right, left, left], [t - 0.5, t - 0.5, t + 0.5, t + 0.5, t - 0.5], color="#D55E00")
        axes.set(title=name, xlabel="token of the stream", ylabel="task of the query", yticks=range(tasks))
    figure.colorbar(picture, ax=panels.tolist(), label="share q")
    _save(figure, path)


def learning_curves(curves: Mapping[str, Mapping[str, Any]], path: Path, *, ylabel: str) -> None:
    """Mean over seeds with the range of the seeds: {arm: {"steps": [...], "values": [[...] per seed]}}."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for i, (name, curve) in enumerate(curves.items()):
        values = np.array(curve["values"], dtype=np.float64)
        axes.plot(curve["steps"], values.mean(0), color=COLOURS[i % 8], label=name)
        axes.fill_between(curve["steps"], values.min(0), values.max(0), color=COLOURS[i % 8], alpha=0.15, linewidth=0)
    axes.set(xlabel="meta-training step", ylabel=ylabel)
    axes.legend(fontsize=8)
    _save(figure, path)


def drops(panels: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]], path: Path) -> None:
    """Accuracy as in training (left end) and in a harder meta-test (right end), a line for each learner."""
    figure = Figure(figsize=(3.2 * len(panels), 3.8), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels), sharey=True))
    for panel, (title, (before, after)) in zip(axes, panels.items(), strict=True):
        for i, name in enumerate(before):
            panel.plot([0, 1], [before[name], after[name]], color=COLOURS[i % 8], marker=MARKERS[i % 8], label=name)
        panel.set(xticks=[0, 1], xticklabels=["as trained", title], xlim=(-0.15, 1.15))
    axes[0].set_ylabel(LABELS["accuracy"])
    axes[0].legend(fontsize=7)
    _save(figure, path)
