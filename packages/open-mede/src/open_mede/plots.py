"""Pictures: training, weights of epochs, accuracies in and out of context, classes, frames and what was said."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from open_mede.config import Config
from open_mede.ensemble import bell, gaussian_weights

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555", "#000000"]
MARKERS = "osv^DPX*"


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def training(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses of support and query batch by step, and what the inner step does: its gain and the gradients' cosine.

    Args:
        rows: of metrics.jsonl, with step, loss, and any of query_loss, cosine, gain, phase.
        path: .png that is written.
    """
    watched = [row for row in rows if row.get("gain") is not None]
    paired = [row for row in rows if row.get("cosine") is not None]
    count = 1 + bool(paired) + bool(watched)
    figure = Figure(figsize=(4.5 * count, 3.4), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1, count))
    alone: dict[str, Any] = {"marker": "o", "markersize": 3} if len(rows) == 1 else {}
    axes = panels[0]
    for i, (name, label) in enumerate((("loss", "support batch, at θ"), ("query_loss", "query batch, at θ′"))):
        held = [row for row in rows if row.get(name) is not None and row.get("phase", 1) == 1]
        if held:
            axes.plot([r["step"] for r in held], [r[name] for r in held], linewidth=1, color=COLOURS[i], label=label,
                      **alone)  # fmt: skip
    if first := [row for row in rows if row.get("phase") == 0]:
        axes.plot([r["step"] for r in first], [r["loss"] for r in first], linewidth=1, color=COLOURS[6],
                  label="single frames and captions", **alone)  # fmt: skip
    axes.set(xlabel="step", ylabel="loss")
    axes.legend(fontsize=8)
    if paired:
        panels[1].plot(
            [r["step"] for r in paired], [r["cosine"] for r in paired], linewidth=1, color=COLOURS[2], **alone
        )
        panels[1].axhline(0, color="0.6", linewidth=0.8)
        panels[1].set(xlabel="step", ylabel="cosine of support's and query's gradient")
    if watched:
        panels[-1].plot(
            [r["step"] for r in watched], [r["gain"] for r in watched], linewidth=1, color=COLOURS[3], **alone
        )
        panels[-1].axhline(0, color="0.6", linewidth=0.8)
        panels[-1].set(xlabel="step", ylabel="query loss after the inner step − before")
        panels[-1].set_yscale("symlog", linthresh=1e-3)
    _save(figure, path)


def gaussian(config: Config, path: Path) -> None:
    """Share of each epoch in the Gaussian average; the weights before the first epoch are not in it."""
    mu, sigma = bell(config.epochs, config.mu, config.sigma)
    shares = gaussian_weights(config.epochs, mu, sigma)
    figure = Figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, config.epochs + 1)
    axes.bar(epochs, shares, color=COLOURS[0])
    axes.axhline(1 / config.epochs, color="0.4", linewidth=0.8, linestyle="--", label="all alike (SWA)")
    axes.set(xlabel="epoch", ylabel="share in the average", title=f"μ = {mu:.3g}, σ = {sigma:.3g}")
    axes.legend(fontsize=8)
    _save(figure, path)


def accuracies(
    bars: Mapping[str, tuple[float, float, float]], path: Path, *, chance: Mapping[str, float] | None = None
) -> None:
    """Accuracy with its interval over clips, for each test set, and chance.

    Args:
        bars: label -> accuracy, low, high [%].
        path: .png that is written.
        chance: label -> [%].
    """
    figure = Figure(figsize=(1.5 + 1.1 * len(bars), 3.4), layout="constrained")
    axes = figure.subplots()
    for i, (label, (value, low, high)) in enumerate(bars.items()):
        colour = COLOURS[1] if label.endswith("_out") else COLOURS[0]
        axes.bar(i, value, color=colour, width=0.6)
        axes.errorbar(i, value, [[max(0, value - low)], [max(0, high - value)]], color="0.2", capsize=3)
        if chance is not None:
            axes.hlines(chance[label], i - 0.4, i + 0.4, color="0.4", linestyle="--", linewidth=1,
                        label="chance" if not i else None)  # fmt: skip
    axes.set_xticks(range(len(bars)), [label.replace("_", ",\n") for label in bars])
    axes.set(ylabel="accuracy [%]", ylim=(0, 105))
    if chance is not None:
        axes.legend(fontsize=8)
    _save(figure, path)


def reliance(inside: Mapping[str, float], outside: Mapping[str, float], path: Path) -> None:
    """Accuracy of each class in its context and out of it, the largest drop first.

    Args:
        inside, outside: class -> accuracy [%].
        path: .png that is written.
    """
    names = sorted(inside.keys() & outside.keys(), key=lambda name: outside[name] - inside[name])
    figure = Figure(figsize=(6, 1 + 0.2 * len(names)), layout="constrained")
    axes = figure.subplots()
    rows = np.arange(len(names))
    axes.hlines(rows, [outside[n] for n in names], [inside[n] for n in names], color="0.7", linewidth=2, zorder=1)
    axes.scatter([inside[n] for n in names], rows, color=COLOURS[0], s=16, label="in context", zorder=2)
    axes.scatter(
        [outside[n] for n in names], rows, color=COLOURS[1], s=16, marker="s", label="out of context", zorder=2
    )
    axes.set_yticks(rows, names, fontsize=7)
    axes.invert_yaxis()
    axes.set(xlabel="accuracy [%]", xlim=(-3, 103))
    axes.legend(fontsize=8)
    _save(figure, path)


def strips(rows: Sequence[tuple[np.ndarray, str, Sequence[tuple[str, float]]]], path: Path, *, most: int = 24) -> None:
    """Frames of clips, side by side, with their class and what was said of them.

    Args:
        rows: clip [T, 3, H, W] of bytes, its class (or name), and (class, probability) of what was said, best first.
        path: .png that is written.
        most: rows that are drawn.
    """
    shown = list(rows)[:most]
    figure = Figure(figsize=(9, 1.15 * len(shown)), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(shown), 1))
    for axes, (clip, name, said) in zip(panels, shown, strict=True):
        axes.imshow(np.concatenate(list(clip.transpose(0, 2, 3, 1)), axis=1))
        axes.set_axis_off()
        found = ", ".join(f"{label} {100 * probability:.0f} %" for label, probability in said)
        axes.set_title(f"{name}  →  {found}", fontsize=8, loc="left")
    _save(figure, path)


def arms(
    panels: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    *,
    label: str,
    chance: Mapping[str, float] | None = None,
) -> None:
    """One mark a seed and the mean with its interval for each arm, a panel for each metric.

    Args:
        panels: title -> arm -> values by seed.
        path: .png that is written.
        label: of the values.
        chance: title -> value that guessing gives.
    """
    from metazoo.statistics import effect

    figure = Figure(figsize=(1.2 + 3.1 * len(panels), 3.6), layout="constrained")
    for number, (axes, (title, found)) in enumerate(
        zip(np.atleast_1d(figure.subplots(1, len(panels), sharey=True)), panels.items(), strict=True)
    ):
        _arms(axes, found, effect)
        axes.set_title(title, fontsize=10)
        if chance is not None and title in chance:
            axes.axhline(chance[title], color="0.5", linestyle="--", linewidth=0.8, label="chance")
            axes.legend(fontsize=8)
        if number == 0:
            axes.set_ylabel(label)
    _save(figure, path)


def _arms(axes: Axes, found: Mapping[str, Sequence[float]], effect: Any) -> None:
    for i, values in enumerate(found.values()):
        colour = COLOURS[i % len(COLOURS)]
        spread = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        axes.scatter(i + spread, values, s=12, color=colour, alpha=0.5, marker=MARKERS[i % len(MARKERS)])
        if len(values) > 1:
            held = effect(list(values), None, "value")
            spread = [[held.effect - held.low], [held.high - held.effect]]
            axes.errorbar(
                i, held.effect, spread, color=colour, capsize=4, marker="_", markersize=14, linewidth=1.5
            )  # fmt: skip
    axes.set_xticks(range(len(found)), list(found), rotation=35, ha="right", fontsize=8)
