"""Pictures: training, scores by languages, against the encoder before training, by arm and seed, by a swept value."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555", "#000000"]
MARKERS = "osv^DPX*"
LOSSES = {
    "loss": "outer loss",
    "teacher_query_loss": "teacher, query set",
    "student_support_loss": "student, support set",
    "student_query_loss": "student, query set",
    "validation_loss": "dev",
}


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
    """Losses by step; on the right, where they were logged, the alignment's share of the gradient and ‖φ − θ‖.

    Args:
        rows: of metrics.jsonl, with step and any of loss, teacher_query_loss, student_support_loss,
            student_query_loss, validation_loss, kd_share [% of the task gradient's norm], distance.
        path: .png that is written.
    """
    names = {
        "kd_share": "alignment gradient\n[% of tasks' norm]",
        "distance": "distance moved\n‖φ − θ‖",
    }
    names = {name: label for name, label in names.items() if any(row.get(name) is not None for row in rows)}
    figure = Figure(figsize=(9.5 if names else 5.5, 3.8), layout="constrained")
    grid = figure.add_gridspec(max(len(names), 1), 2 if names else 1)
    left = figure.add_subplot(grid[:, 0])
    for i, (name, label) in enumerate(LOSSES.items()):
        _curve(left, rows, name, color=COLOURS[i], label=label, zorder=3 - i / 10)
    left.set(xlabel="outer step", ylabel="loss (mean over tasks)")
    if left.lines:
        left.legend(fontsize=8)
    for i, (name, label) in enumerate(names.items()):
        axes = figure.add_subplot(grid[i, 1])
        _curve(axes, rows, name, color=COLOURS[i])
        axes.set(ylabel=label)
        if name == "kd_share" and any((row.get(name) or 0) > 0 for row in rows):
            axes.set_yscale("log", nonpositive="mask")
        if i == len(names) - 1:
            axes.set(xlabel="outer step")
    _save(figure, path)


def language_matrix(
    values: np.ndarray, languages_rows: Sequence[str], languages_columns: Sequence[str], path: Path, *, title: str,
    label: str, unseen: Collection[str] = (),
) -> None:  # fmt: skip
    """Heat map of scores by the query's language and the candidates', with the numbers in it; a * marks the unseen.

    Args:
        values: [L1, L2], NaN where there is none. languages_rows: [L1]. languages_columns: [L2].
        path: .png that is written. title: above. label: of the colours, with the unit. unseen: languages.
    """
    values = np.asarray(values, dtype=float)
    size = 0.6 * np.array([len(languages_columns), len(languages_rows)])
    figure = Figure(figsize=(size[0] + 2.8, size[1] + 1.4), layout="constrained")
    axes = figure.subplots()
    held = values[np.isfinite(values)]
    low, high = (float(held.min()), float(held.max())) if len(held) else (0.0, 1.0)
    axes.set_facecolor("0.9")
    image = axes.imshow(np.ma.masked_invalid(values), cmap="viridis", vmin=low, vmax=max(high, low + 1e-6))
    for (i, j), value in np.ndenumerate(values):
        dark = value < low + 0.45 * (high - low)
        text = f"{value:.1f}" if np.isfinite(value) else "–"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    starred = [[f"{one}*" if one in unseen else one for one in some] for some in (languages_rows, languages_columns)]
    axes.set_xticks(range(len(languages_columns)), starred[1])
    axes.set_yticks(range(len(languages_rows)), starred[0])
    note = " (* unseen)" if set(unseen) & {*languages_rows, *languages_columns} else ""
    axes.set(xlabel=f"language of the candidates{note}", ylabel=f"language of the query{note}")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label=label)
    _save(figure, path)


def comparison(groups: Mapping[str, Mapping[str, float]], path: Path, label: str) -> None:
    """Bars, a colour for each method: {method: {group: value}}; ``label`` is of the values, with the unit."""
    names = list(dict.fromkeys(name for of in groups.values() for name in of))
    figure = Figure(figsize=(max(5.5, 1.5 + 0.5 * len(names) * max(len(groups), 1)), 3.8), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / max(len(groups), 1)
    for i, (method, of) in enumerate(groups.items()):
        places = [j + (i - (len(groups) - 1) / 2) * width for j, name in enumerate(names) if name in of]
        values = [of[name] for name in names if name in of]
        bars = axes.bar(places, values, width, color=COLOURS[i % 8], edgecolor="white", label=method)
        axes.bar_label(bars, fmt="%.1f", fontsize=7, padding=1)
    axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_xticks(range(len(names)), names)
    axes.set(xlabel="languages of query and candidates", ylabel=label)
    axes.margins(y=0.1)
    if groups:
        figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path)


def by_arm(values: Mapping[str, Sequence[float]], path: Path, label: str) -> None:
    """A row for each arm: a dot for each seed, a bar at their mean; ``label`` is of the values, with the unit."""
    figure = Figure(figsize=(6.5, 1.2 + 0.42 * len(values)), layout="constrained")
    axes = figure.subplots()
    for i, of in enumerate(values.values()):
        spread = np.linspace(-0.18, 0.18, len(of)) if len(of) > 1 else np.zeros(len(of))
        first = i == 0
        axes.scatter(of, i + spread, s=14, color=COLOURS[0], alpha=0.6, linewidth=0, label="a seed" if first else "")
        if len(of):
            mean = float(np.mean(of))
            axes.vlines(mean, i - 0.33, i + 0.33, color=COLOURS[3], linewidth=2, label="mean" if first else "")
            axes.annotate(f"{mean:.1f}", (mean, i - 0.33), ha="center", va="bottom", fontsize=7, color=COLOURS[3])
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.7)
    axes.set(xlabel=label, ylabel="arm")
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if values:
        figure.legend(fontsize=8, loc="outside right upper")
    _save(figure, path)


def dose(
    x: Sequence[float], curves: Mapping[str, Sequence[Sequence[float]]], path: Path, xlabel: str,
    labels: Mapping[str, str] | Sequence[str] = (),
) -> None:  # fmt: skip
    """A panel for each curve: a dot for each seed, a line through their means; x by powers of ten, with 0 where it is.

    Args:
        x: values swept, [P], each ≥ 0. curves: {name: values [P][seeds]}. path: .png that is written.
        xlabel: with the unit. labels: of the values of each curve, with the unit, by name or in order [default: names].
    """
    figure = Figure(figsize=(max(4.2 * len(curves), 4.2), 3.6), layout="constrained")
    panels = figure.subplots(1, max(len(curves), 1), squeeze=False)[0]
    above = [value for value in x if value > 0]
    order = np.argsort(x, kind="stable")
    named = labels if isinstance(labels, Mapping) else dict(zip(curves, labels, strict=False))
    for i, (axes, (name, values)) in enumerate(zip(panels, curves.items(), strict=False)):
        colour = COLOURS[i % 8]
        for place, of in zip(x, values, strict=True):
            axes.scatter([place] * len(of), of, s=14, color=colour, alpha=0.5, linewidth=0)
        means = [float(np.mean(values[j])) if len(values[j]) else float("nan") for j in order]
        axes.plot([x[j] for j in order], means, color=colour, linewidth=1.5, marker=MARKERS[i % 8], markersize=5)
        if above:
            axes.set_xscale("symlog", linthresh=min(above), linscale=0.5)
            axes.set_xticks(sorted(set(x)), [f"{value:g}" for value in sorted(set(x))])
            axes.minorticks_off()
        axes.set(xlabel=xlabel, ylabel=named.get(name, name))
    _save(figure, path)
