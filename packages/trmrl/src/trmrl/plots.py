"""Pictures: training, adaptation on test tasks, attention and episodic memories, arms and seeds, curves, depths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555", "#000000"]
MARKERS = "osv^DPX*"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _curve(axes: Axes, rows: Sequence[Mapping[str, Any]], name: str, **style: Any) -> None:
    """A column of the rows by step, where it is there."""
    held = [row for row in rows if row.get(name) is not None]
    if held:
        alone: dict[str, Any] = {"marker": "o", "markersize": 3} if len(held) == 1 else {}
        axes.plot([row["step"] for row in held], [row[name] for row in held], linewidth=1, **alone, **style)


def training(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Returns of each episode of the trials, and losses, by update.

    Args:
        rows: of metrics.jsonl, with step, return_1 … and any of loss, value_loss, kl.
        path: .png that is written.
    """
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    names = sorted({name for row in rows for name in row if name.startswith("return_")}, key=lambda n: int(n[7:]))
    for i, name in enumerate(names):
        _curve(left, rows, name, color=COLOURS[i % 8], label=f"episode {name[7:]}")
    left.set(xlabel="update", ylabel="return, with exploration")
    for i, (name, label) in enumerate(
        (("value_loss", "value loss"), ("kl", "KL(old ‖ new)"), ("std", "std of actions"))
    ):
        if any(row.get(name) is not None for row in rows):
            _curve(right, rows, name, color=COLOURS[i + 3], label=label)
    right.set(xlabel="update")
    for axes in (left, right):
        if axes.lines:
            axes.legend(fontsize=8)
    _save(figure, path)


def band(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile bootstrap of means over tasks.

    Args:
        values: (tasks, n), NaN where a task has none.

    Returns:
        Lower and upper ends (n,).
    """
    count = len(values)
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=2000)
    finite = np.isfinite(values)
    with np.errstate(invalid="ignore"):  # a resample of nothing but NaN
        means = (drawn @ np.where(finite, values, 0.0)) / (drawn @ finite)
    low, high = np.nanquantile(means, (0.025, 0.975), axis=0)
    return low, high


def adaptation(returns: np.ndarray, errors: np.ndarray, path: Path) -> None:
    """Returns by episode, and how far an agent is from its target by step, with the bands of :func:`band`.

    Args:
        returns: (tasks, episodes).
        errors: (tasks, episodes, steps), NaN after an episode's end.
        path: .png that is written.
    """
    figure = Figure(figsize=(9.5, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    episodes = np.arange(1, returns.shape[1] + 1)
    left.plot(episodes, returns.T, color="#BBBBBB", linewidth=0.7)
    left.fill_between(episodes, *band(returns), color=COLOURS[0], alpha=0.25, linewidth=0)
    left.plot(episodes, returns.mean(0), color=COLOURS[0], marker="o", label="mean over tasks (band: 95 % bootstrap)")
    left.set(xlabel="episode", ylabel="return", xticks=episodes)
    left.legend(fontsize=8)
    shown = sorted({0, errors.shape[1] - 1})
    for i, episode in enumerate(shown):
        going = np.isfinite(errors[:, episode]).any(0)  # no task lasts longer
        held, steps = errors[:, episode][:, going], np.arange(1, len(going) + 1)[going]
        right.fill_between(steps, *band(held), color=COLOURS[i], alpha=0.25, linewidth=0)
        right.plot(steps, np.nanmean(held, 0), color=COLOURS[i], linewidth=1, label=f"episode {episode + 1}")
    right.set(xlabel="step", ylabel="distance from the target\n(minus the reward where there is none)")
    right.legend(fontsize=8)
    _save(figure, path)


def attention(maps: np.ndarray, memories: np.ndarray, tasks: np.ndarray, path: Path) -> None:
    """Attention of the newest transition to those before it, layer by layer, and memories in two dimensions.

    Args:
        maps: (layers, steps, K), mean over heads and tasks; the newest transition first.
        memories: (steps, tasks, d), what the head sees.
        tasks: (tasks,), which colours them.
        path: .png that is written.
    """
    layers = len(maps)
    figure = Figure(figsize=(2.4 * layers + 8, 3.6), layout="constrained")
    axes = figure.subplots(1, layers + 2, width_ratios=[1] * layers + [1.6, 1.6])
    for i, (one, map_) in enumerate(zip(axes, maps, strict=False)):
        image = one.imshow(map_, aspect="auto", vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
        one.set(title=f"layer {i + 1}", xlabel="transitions ago", xticks=range(maps.shape[2]))
        one.set_ylabel("step" if i == 0 else "")
    figure.colorbar(image, ax=axes[:layers].tolist(), label="attention", shrink=0.8)
    flat = memories.reshape(-1, memories.shape[-1])
    centred = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    points = (centred @ directions[:2].T).reshape(*memories.shape[:2], -1)
    if points.shape[-1] < 2:  # a memory of one number
        points = np.concatenate([points, np.zeros_like(points)], -1)
    for one, step in ((axes[-2], 0), (axes[-1], len(points) - 1)):
        shown = one.scatter(*points[step].T, c=tasks, cmap="viridis", s=18)
        one.set(title=f"memories at step {step + 1}", xlabel="first component")
        one.set(xlim=_around(points[..., 0]), ylim=_around(points[..., 1]))
    axes[-2].set_ylabel("second component")
    figure.colorbar(shown, ax=axes[-2:].tolist(), label="task", shrink=0.8)
    _save(figure, path)


def _around(values: np.ndarray) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    edge = 0.05 * (high - low) or 1.0
    return low - edge, high + edge


def by_arm(values: Mapping[str, Sequence[float]], path: Path, label: str, lines: Mapping[str, float]) -> None:
    """A dot for each seed, a bar for each arm's mean, and named levels.

    Args:
        values: of each arm, by seed.
        path: .png that is written.
        label: of the axis.
        lines: name → level.
    """
    figure = Figure(figsize=(max(5.5, 1.0 * len(values) + 2), 3.6), layout="constrained")
    axes = figure.add_subplot()
    for i, held in enumerate(values.values()):
        axes.plot([i - 0.25, i + 0.25], [np.mean(held)] * 2, color="black", linewidth=2)
        spread = np.linspace(-0.15, 0.15, len(held)) if len(held) > 1 else [0.0]
        axes.plot(i + np.asarray(spread), held, MARKERS[i % 8], color=COLOURS[i % 8], markersize=4)
    for name, level in lines.items():
        axes.axhline(level, color="#999999", linewidth=1, linestyle="--")
        axes.annotate(name, (len(values) - 0.5, level), fontsize=8, ha="right", va="bottom", color="#555555")
    axes.set_xticks(range(len(values)), list(values), rotation=25, ha="right", fontsize=8)
    axes.set(ylabel=label, xlim=(-0.6, len(values) - 0.4))
    _save(figure, path)


def curves(
    groups: Mapping[str, np.ndarray], x: Mapping[str, np.ndarray], path: Path, labels: tuple[str, str]
) -> None:  # fmt: skip
    """Curves of arms: each seed thin, their mean thick.

    Args:
        groups: arm → (seeds, points).
        x: arm → (points,).
        path: .png that is written.
        labels: of the axes.
    """
    figure = Figure(figsize=(6.5, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, held) in enumerate(groups.items()):
        axes.plot(x[name], np.asarray(held).T, color=COLOURS[i % 8], linewidth=0.6, alpha=0.4)
        axes.plot(x[name], np.mean(held, 0), color=COLOURS[i % 8], linewidth=2, label=name)
    axes.set(xlabel=labels[0], ylabel=labels[1])
    axes.legend(fontsize=8)
    _save(figure, path)


def depths(groups: Mapping[str, Sequence[float]], path: Path) -> None:
    """Growth ‖h_N‖ / ‖h_0‖ by depth N, on logarithmic axes.

    Args:
        groups: initialisation → one value a depth 2, 4, 8, 16, 32.
        path: .png that is written.
    """
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for i, (name, held) in enumerate(groups.items()):
        depth = 2 ** np.arange(1, len(held) + 1)
        axes.plot(depth, held, marker=MARKERS[i], color=COLOURS[i], label=name)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="layers N", ylabel="‖h_N‖ / ‖h_0‖ at initialisation")
    axes.legend(fontsize=8)
    _save(figure, path)
