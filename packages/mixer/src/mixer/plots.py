"""Pictures of a run: the gate over training, the contexts in two dimensions, trajectories against the truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from mixer.data import Environments
    from mixer.train import Run

# Okabe and Ito's colours, told apart by every eye; then darker shades for more than eight experts
COLOURS = [
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#555555",
    "#00456B", "#8C6000", "#005F45", "#803800", "#7A4864", "#2F6F8C", "#8F8728", "#BBBBBB",
]  # fmt: skip


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def gate_map(
    axes: Axes, steps: Sequence[int], routes: np.ndarray, family: np.ndarray | None, title: str, experts: int
) -> None:
    """Heat-map of the expert (colour) that the gate chooses for each environment (row) over training (column).

    Args:
        steps: the step of each column [S].
        routes: chosen expert [S, E].
        family: true family of each environment [E], drawn as separating lines.
    """
    colours = ListedColormap([COLOURS[m % len(COLOURS)] for m in range(experts)])
    last = steps[-1] if len(steps) else 1
    axes.imshow(
        routes.T, aspect="auto", interpolation="nearest", cmap=colours, vmin=-0.5, vmax=experts - 0.5,
        extent=(0, last, routes.shape[1] - 0.5, -0.5),
    )  # fmt: skip
    axes.set(title=title, xlabel="inner step", ylabel="environment")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    if family is not None:
        for edge in np.flatnonzero(np.diff(family)) + 0.5:
            axes.axhline(edge, color="white", linewidth=2)


def training(run: Run, path: Path) -> None:
    """Loss and gate over the training of ``run``."""
    rows = run.metrics
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(9, 6), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[1, 1.4])
    for phase, colour in (("contexts", COLOURS[1]), ("model", COLOURS[0])):
        chosen = [(row["step"], row["loss"]) for row in rows if row["phase"] == phase]
        if chosen:
            top.semilogy(*zip(*chosen, strict=True), ".", markersize=3, color=colour, label=f"{phase} steps")
    top.set(title="training loss of the contributors", xlabel="inner step", ylabel="mean squared error")
    top.grid(alpha=0.3)
    top.legend(frameon=False)
    routes = np.array([row["route"] for row in rows])
    title = "expert (colour) chosen by the gate; white lines part the true families"
    gate_map(bottom, steps, routes, run.environments.family, title, run.config.experts)
    _save(figure, path)


def contexts(run: Run, path: Path) -> None:
    """The contexts in their first two principal components: colour by expert, number by family."""
    from sklearn.decomposition import PCA

    points = run.contexts.cpu().numpy()
    route = run.model.route(run.contexts).cpu().numpy()
    family = run.environments.family
    flat = PCA(2).fit_transform(points) if points.shape[1] > 2 else np.pad(points, ((0, 0), (0, 2 - points.shape[1])))
    figure = Figure(figsize=(6.5, 5.5), layout="constrained")
    axes = figure.subplots()
    for m in np.unique(route):
        chosen = route == m
        axes.scatter(*flat[chosen].T, s=110, color=COLOURS[m % len(COLOURS)], alpha=0.75, label=f"expert {m}")
    if family is not None and len(flat) <= 200:
        for point, number in zip(flat, family, strict=True):
            axes.annotate(str(number), point, ha="center", va="center", fontsize=7, color="black")
    axes.set(title="contexts ξ (PCA); numbers are the true families", xlabel="component 1", ylabel="component 2")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False, fontsize=8, ncols=2 if run.config.experts > 5 else 1)
    _save(figure, path)


def trajectories(run: Run, test: Environments, path: Path, *, most: int = 10) -> None:
    """Prediction (lines) against truth (dots) for one environment of each family, first test trajectory."""
    from mixer.evaluate import predict

    family = test.family if test.family is not None else np.arange(len(test))
    shown = [int(np.flatnonzero(family == f)[0]) for f in np.unique(family)][:most]
    part = test.select(shown)
    predicted = predict(run.model, part, run.contexts[shown], run.config).cpu().numpy()
    columns = min(len(shown), 5)
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * lines + 0.4), layout="constrained")
    for i, axes in enumerate(figure.subplots(lines, columns, squeeze=False).flat):
        if i >= len(shown):
            axes.set_visible(False)
            continue
        every = max(1, part.t.shape[1] // 30)
        for k in range(min(part.x.shape[-1], 3)):
            axes.plot(part.t[i], predicted[i, 0, :, k], color=COLOURS[k], linewidth=1.6, label=f"x{k + 1}")
            axes.plot(part.t[i][::every], part.x[i, 0, ::every, k], "o", color=COLOURS[k], markersize=3, alpha=0.6)
        axes.set_title(part.names[i], fontsize=8)
        axes.set_xlabel("t", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    figure.axes[0].legend(frameon=False, fontsize=7)
    figure.suptitle("first test trajectory: prediction (lines) against truth (dots)", fontsize=10)
    _save(figure, path)


def routing_of_arms(cells: dict[str, dict[str, Any]], path: Path) -> None:
    """Gate over training for one seed of several arms side by side.

    Args:
        cells: arm name -> {"steps": [S], "routes": [S, E], "family": [E], "experts": M, "ari": float}.
    """
    figure = Figure(figsize=(4.3 * len(cells), 4.2), layout="constrained")
    for axes, (arm, cell) in zip(figure.subplots(1, len(cells), squeeze=False).flat, cells.items(), strict=True):
        title = f"{arm}: adjusted Rand index {cell['ari']:.2f}"
        gate_map(axes, cell["steps"], np.array(cell["routes"]), np.array(cell["family"]), title, cell["experts"])
    figure.suptitle("expert (colour) that the gate chooses for each environment; white lines part the true families")
    _save(figure, path)
