"""Every picture of usual and of degenerate input; warnings are errors here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streetclip import plots
from streetclip.config import RADII
from streetclip.gazetteer import Gazetteer

RNG = np.random.default_rng(0)
WORLD = Gazetteer(
    countries=("Bado", "Mipu"), cities=("Rasa", "Lofi", "Gunu"), country=np.array([0, 0, 1]),
    latitude=np.array([0.0, 10.0, -40.0]), longitude=np.array([0.0, 10.0, 170.0]), population=np.ones(3),
)  # fmt: skip


def rows(count: int, *names: str) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl, of two phases."""
    return [
        {"step": i, "phase": "generic" if i < count // 2 else "synthetic", **{name: 5 / (i + 1) for name in names}}
        for i in range(count)
    ]


def within(start: float) -> dict[str, float]:
    return {f"within_{radius}": start + 10 * i for i, radius in enumerate(RADII)}


def confusion(count: int, countries: int, path: Path, most: int = 24) -> None:
    names = [f"Country {i}" for i in range(countries)]
    found = RNG.integers(-1, countries, count)
    plots.confusion(RNG.integers(0, countries, count), found, names, path, most)


def places(count: int, path: Path) -> None:
    latitude, longitude = RNG.uniform(-90, 90, (2, count)), RNG.uniform(-180, 180, (2, count))
    plots.places(latitude[0], longitude[0], latitude[1], longitude[1], WORLD, path)


LOSSES = ("loss", "classifier_loss", "representation_loss", "batch_accuracy")
DRAWN: dict[str, Callable[[Path], None]] = {
    "training": lambda path: plots.training(rows(20, *LOSSES), path),
    "training, one row": lambda path: plots.training(rows(1, *LOSSES), path),
    "training of a head": lambda path: plots.training([{"step": i, "loss": 1.0} for i in range(3)], path),
    "training, a missing value": lambda path: plots.training([*rows(3, *LOSSES), {"step": 9, "loss": None}], path),
    "errors": lambda path: plots.errors({"seen": RNG.exponential(900, 50), "unseen": RNG.exponential(9, 9)}, path),
    "errors, one photo at its place": lambda path: plots.errors({"all": np.zeros(1)}, path),
    "errors, an empty group": lambda path: plots.errors({"seen": np.ones(3), "unseen": np.zeros(0)}, path),
    "errors, groups without end": lambda path: plots.errors({str(i): np.ones(2) * 20_015.1 for i in range(20)}, path),
    "confusion": lambda path: confusion(300, 9, path),
    "confusion of more than are shown": lambda path: confusion(300, 40, path, most=5),
    "confusion, one country": lambda path: plots.confusion(np.zeros(3, int), np.zeros(3, int), ["Bado"], path),
    "confusion, none found": lambda path: plots.confusion(np.array([2]), np.array([-1]), ["a", "b", "c"], path),
    "calibration": lambda path: plots.calibration(RNG.uniform(size=99), RNG.uniform(size=99) < 0.5, path),
    "calibration, one photo": lambda path: plots.calibration(np.array([1.0]), np.array([False]), path),
    "calibration, one bin": lambda path: plots.calibration(np.full(9, 0.31), np.ones(9, bool), path),
    "places": lambda path: places(50, path),
    "places, one": lambda path: places(1, path),
    "places, more than are drawn": lambda path: places(900, path),
    "arms": lambda path: plots.arms(
        {"seen": {"clip": [1.0, 2.0], "streetclip": [3.0, 4.0]}, "unseen": {"clip": [0.0, 1.0]}}, path,
        label="[%]", chance={"seen": 4.0},
    ),
    "arms, one of one seed": lambda path: plots.arms({"all": {"clip": [1.0]}}, path, label="[%]"),
    "ceilings": lambda path: plots.ceilings({f"{i}": within(i) for i in range(11)}, path, within(20)),
    "ceilings, some published": lambda path: plots.ceilings({"K = 1": within(0)}, path, {"within_25": 22.4}),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_picture(name: str, tmp_path: Path) -> None:
    """A PNG with several colours in a folder that was not there."""
    path = tmp_path / "new" / "picture.png"
    DRAWN[name](path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        colours = picture.convert("RGB").getcolors(1 << 24)
        assert min(picture.size) > 300
    assert colours is not None
    # white, axes, and what is drawn in colour: no picture is empty
    vivid = sum(count for count, colour in colours if max(colour) - min(colour) > 80)
    assert vivid > 15, vivid


def test_confusion_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows sum to 100 %; what is found among countries that are not shown, or nowhere, is in the last column."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    country, found = np.array([1, 1, 1, 1, 2, 2, 0]), np.array([1, 2, 0, -1, 2, 2, 0])
    plots.confusion(country, found, ["a", "b", "c"], tmp_path / "x.png", most=2)
    axes = drawn[0].axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[25, 25, 50], [0, 100, 0]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["b", "c", "others"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "c"]


def test_error_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The curve stands at k/N from the k-th error on."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.errors({"all": np.array([500.0, 0.0, 3.0, 3.0])}, tmp_path / "x.png")
    line = drawn[0].axes[0].lines[0]
    assert line.get_drawstyle() == "steps-post"
    x, y = (np.asarray(one, dtype=float) for one in line.get_data())
    for distance, share in ((0.2, 25), (2.9, 25), (3.0, 75), (499, 75), (500, 100), (20_000, 100)):
        assert y[x <= distance][-1] == share, distance


def test_lines_do_not_cross_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place and what was found across the date line are not joined the long way."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    longitude, found = np.array([179.0, 10.0]), np.array([-179.0, 20.0])
    plots.places(np.zeros(2), longitude, np.zeros(2), found, WORLD, tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert [list(line.get_xdata()) for line in axes.lines] == [[10.0, 20.0]]
    assert len(axes.collections[1].get_offsets()) == 2


def test_phase_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where synthetic captions begin."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: drawn.append(figure))
    plots.training(rows(10, *LOSSES), tmp_path / "x.png")
    for axes in drawn[0].axes:
        dashed = [line for line in axes.lines if line.get_linestyle() == "--"]
        assert [list(line.get_xdata()) for line in dashed] == [[5, 5]]
