"""Pictures: training, errors, countries, calibration, a map of places, and the claims' arms."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from streetclip import metrics
from streetclip.config import RADII
from streetclip.gazetteer import Gazetteer

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555", "#000000"]
MARKERS = "osv^DPX*"
LOSSES = {
    "loss": "loss",
    "classifier_loss": "photo → captions",
    "representation_loss": "caption → photos",
}


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def training(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Losses by step, and the share of photos told from the batch's other captions; a line where synthetic captions
    begin.

    Args:
        rows: of metrics.jsonl, with step, loss, and any of classifier_loss, representation_loss, batch_accuracy, phase.
        path: .png that is written.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    alone: dict[str, Any] = {"marker": "o", "markersize": 3} if len(rows) == 1 else {}
    for i, (name, label) in enumerate(LOSSES.items()):
        held = [row for row in rows if row.get(name) is not None]
        if held:
            values = [row[name] for row in held]
            left.plot([row["step"] for row in held], values, linewidth=1, color=COLOURS[i], label=label, **alone)
    held = [row for row in rows if row.get("batch_accuracy") is not None]
    right.plot([r["step"] for r in held], [r["batch_accuracy"] for r in held], linewidth=1, color=COLOURS[0], **alone)
    starts = [row["step"] for before, row in itertools.pairwise(rows) if row.get("phase") != before.get("phase")]
    for axes in (left, right):
        axes.set_xlabel("step")
        for start in starts:
            axes.axvline(start, color="0.6", linewidth=0.8, linestyle="--", label="synthetic captions begin")
    left.set_ylabel("loss")
    right.set(ylabel="photos told right in their batch [%]", ylim=(0, 102))
    left.legend(fontsize=8)
    _save(figure, path)


def errors(groups: Mapping[str, np.ndarray], path: Path) -> None:
    """Share of photos within a distance, by distance, with the five radii.

    Args:
        groups: label -> errors [N] in km.
        path: .png that is written.
    """
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    for i, (label, values) in enumerate(groups.items()):
        ordered = np.sort(np.maximum(values, 0.1))
        share = 100 * np.arange(1, len(ordered) + 1) / len(ordered)
        axes.step(
            [0.1, *ordered, 20_040], [0, *share, 100], where="post", color=COLOURS[i % len(COLOURS)],
            label=f"{label} ({len(values)})",
        )  # fmt: skip
    for radius in RADII:
        axes.axvline(radius, color="0.8", linewidth=0.8, zorder=0)
    axes.set_xscale("log")
    axes.set_xticks(RADII, [f"{radius:g}" for radius in RADII])
    axes.minorticks_off()
    axes.set(xlabel="error [km]", ylabel="photos within [%]", ylim=(0, 102), xlim=(0.1, 20_040))
    axes.legend(fontsize=8, loc="upper left")
    _save(figure, path)


def confusion(country: np.ndarray, found: np.ndarray, names: Sequence[str], path: Path, most: int = 24) -> None:
    """Share of a country's photos by the country found; the ``most`` countries with most photos, the rest as one.

    Args:
        country, found: [N] numbers of countries; found -1: none.
        names: of all countries.
        path: .png that is written.
    """
    count = np.bincount(country, minlength=len(names))
    kept = [int(i) for i in np.argsort(-count, kind="stable")[:most] if count[i]]
    kept = sorted(kept)
    place = {one: i for i, one in enumerate(kept)}
    table = np.zeros((len(kept), len(kept) + 1))
    for true, guess in zip(country.tolist(), found.tolist(), strict=True):
        if true in place:
            table[place[true], place.get(guess, len(kept))] += 1
    table = 100 * table / table.sum(1, keepdims=True)
    side = 2.2 + 0.26 * len(kept)
    figure = Figure(figsize=(side + 1.2, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table, cmap="viridis", vmin=0, vmax=100)
    axes.set_xticks(range(len(kept) + 1), [*(names[i] for i in kept), "others"], rotation=90, fontsize=7)
    axes.set_yticks(range(len(kept)), [names[i] for i in kept], fontsize=7)
    axes.set(xlabel="country found", ylabel="true country")
    figure.colorbar(image, ax=axes, label="photos of the country [%]", shrink=0.8)
    _save(figure, path)


def calibration(probability: np.ndarray, correct: np.ndarray, path: Path) -> None:
    """Share of right countries by the probability that they were given.

    Args:
        probability, correct: [N].
        path: .png that is written.
    """
    table, error = metrics.calibration(probability, correct)
    held = table[:, 2] > 0
    figure = Figure(figsize=(4.6, 3.8), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color="0.7", linewidth=0.8, label="as it should be")
    size = 15 + 120 * table[held, 2] / table[:, 2].max()
    axes.plot(100 * table[held, 0], 100 * table[held, 1], color=COLOURS[0], linewidth=1)
    axes.scatter(
        100 * table[held, 0], 100 * table[held, 1], s=size, color=COLOURS[0], label="photos, by area", zorder=3
    )
    axes.set(
        xlabel="probability of the country [%]", ylabel="right [%]", xlim=(0, 102), ylim=(0, 102),
        title=f"expected calibration error {100 * error:.1f} points",
    )  # fmt: skip
    axes.legend(fontsize=8)
    _save(figure, path)


def places(
    latitude: np.ndarray, longitude: np.ndarray, found_latitude: np.ndarray, found_longitude: np.ndarray,
    gazetteer: Gazetteer, path: Path, most: int = 300,
) -> None:  # fmt: skip
    """A map: true places, places found, a line between the two of a photo, over the gazetteer's cities.

    Args:
        latitude, longitude, found_latitude, found_longitude: [N] degrees; of more than ``most`` photos, some are drawn.
        path: .png that is written.
    """
    shown = np.linspace(0, len(latitude) - 1, min(most, len(latitude))).round().astype(int)
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.subplots()
    axes.scatter(gazetteer.longitude, gazetteer.latitude, s=0.4 if len(gazetteer.cities) > 2000 else 6, color="0.82")
    for i in shown:
        if abs(longitude[i] - found_longitude[i]) <= 180:  # others go round the back
            axes.plot([longitude[i], found_longitude[i]], [latitude[i], found_latitude[i]], color="0.6", linewidth=0.3)
    axes.scatter(longitude[shown], latitude[shown], s=8, color=COLOURS[0], label="true")
    axes.scatter(found_longitude[shown], found_latitude[shown], s=8, color=COLOURS[3], label="found", marker="x")
    axes.set(xlabel="longitude [°]", ylabel="latitude [°]", xlim=(-180, 180), ylim=(-90, 90), aspect="equal")
    axes.legend(fontsize=8, loc="lower left", title=f"{len(shown)} of {len(latitude)} photos", title_fontsize=8)
    _save(figure, path)


def _points(axes: Axes, values: Sequence[float], x: float, colour: str) -> None:
    spread = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else np.zeros(1)
    axes.scatter(x + spread, values, s=10, color=colour, alpha=0.6, zorder=3)
    axes.plot([x - 0.22, x + 0.22], [np.mean(values)] * 2, color=colour, linewidth=2, zorder=4)


def arms(
    panels: Mapping[str, Mapping[str, Sequence[float]]], path: Path, *, label: str,
    chance: Mapping[str, float] | None = None,
) -> None:  # fmt: skip
    """A panel for each metric, with a point for each seed of an arm and the mean as a line.

    Args:
        panels: title -> arm -> values by seed.
        path: .png that is written.
        label: of the axis, with the unit.
        chance: title -> a dotted line.
    """
    figure = Figure(figsize=(3.2 * len(panels) + 0.6, 3.8), layout="constrained")
    for i, (axes, (title, of)) in enumerate(
        zip(np.atleast_1d(figure.subplots(1, len(panels))), panels.items(), strict=True)
    ):
        for x, values in enumerate(of.values()):
            _points(axes, values, x, COLOURS[x % len(COLOURS)])
        if chance and title in chance:
            axes.axhline(chance[title], color="0.5", linewidth=0.8, linestyle=":", label="chance")
            axes.legend(fontsize=8)
        axes.set_xticks(range(len(of)), list(of), rotation=35, ha="right", fontsize=8)
        axes.set_title(title, fontsize=9)
        if i == 0:
            axes.set_ylabel(label)
        axes.grid(axis="y", color="0.92")
    _save(figure, path)


def ceilings(found: Mapping[str, Mapping[str, float]], path: Path, published: Mapping[str, float]) -> None:
    """Percent within each radius: ceilings by number of cities, and what is published.

    Args:
        found: label -> within_R -> percent. published: the same, of StreetCLIP. path: .png that is written.
    """
    figure = Figure(figsize=(6, 3.8), layout="constrained")
    axes = figure.subplots()
    x = np.arange(len(RADII))
    for i, (label, values) in enumerate(found.items()):
        axes.plot(
            x, [values[f"within_{radius}"] for radius in RADII], marker=MARKERS[i % len(MARKERS)], label=label,
            color=COLOURS[i % len(COLOURS)], linewidth=1, markersize=4,
        )  # fmt: skip
    held = [(i, published[f"within_{radius}"]) for i, radius in enumerate(RADII) if f"within_{radius}" in published]
    axes.plot(*zip(*held, strict=True), color="0", linestyle="--", marker="*", label="StreetCLIP, published")
    axes.set_xticks(x, [f"{radius:g}" for radius in RADII])
    axes.set(xlabel="radius [km]", ylabel="photos within [%]", ylim=(0, 102))
    axes.legend(fontsize=8)
    _save(figure, path)
