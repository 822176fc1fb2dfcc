"""Every picture of usual and of degenerate input; warnings are errors here."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from open_mede import plots
from open_mede.config import Config
from open_mede.ensemble import gaussian_weights
from PIL import Image

RNG = np.random.default_rng(0)
LOSSES = ("loss", "query_loss", "cosine", "gain")


def rows(count: int, *names: str, phase: int = 1) -> list[dict[str, Any]]:
    return [{"step": i, "phase": phase, **{name: 5 / (i + 1) for name in names}} for i in range(count)]


def config(epochs: int, **changes: Any) -> Config:
    return Config(dataset="features", model="linear", epochs=epochs, **changes)


def bars(count: int) -> dict[str, tuple[float, float, float]]:
    names = ["base_in", "base_out", "novel_in", "novel_out", *(f"set {i}" for i in range(9))]
    return {name: (50.0, 40.0, 60.0) for name in names[:count]}


def strip(count: int, frames: int, path: Path, **options: Any) -> None:
    clip = RNG.integers(0, 256, (frames, 3, 32, 32), dtype=np.uint8)
    plots.strips([(clip, f"class {i}", [("wave", 0.75), ("nod", 0.25)]) for i in range(count)], path, **options)


def drop(count: int, path: Path) -> None:
    plots.reliance({f"class {i}": 90.0 for i in range(count)}, {f"class {i}": 5.0 * i for i in range(count)}, path)


DRAWN: dict[str, Callable[[Path], None]] = {
    "training": lambda path: plots.training([*rows(9, "loss", phase=0), *rows(9, *LOSSES)], path),
    "training, one row": lambda path: plots.training(rows(1, *LOSSES), path),
    "training of one batch": lambda path: plots.training(rows(5, "loss"), path),
    "training on single frames alone": lambda path: plots.training(rows(5, "loss", phase=0), path),
    "training, a missing value": lambda path: plots.training([*rows(3, "loss"), {"step": 9, "loss": None}], path),
    "gaussian": lambda path: plots.gaussian(config(22), path),
    "gaussian, one epoch": lambda path: plots.gaussian(config(1, mu=1.0), path),
    "gaussian, one spike": lambda path: plots.gaussian(config(4, sigma=1e-3, mu=2.0), path),
    "accuracies": lambda path: plots.accuracies(bars(4), path, chance=dict.fromkeys(bars(4), 3.3)),
    "accuracies, one": lambda path: plots.accuracies({"other": (99.0, 1.0, 100.0)}, path),
    "accuracies, one of nothing": lambda path: plots.accuracies({"other": (0.0, 0.0, 100.0)}, path),
    "accuracies, many": lambda path: plots.accuracies(bars(9), path),
    "reliance": lambda path: drop(20, path),
    "reliance, one class": lambda path: drop(1, path),
    "reliance, many classes": lambda path: drop(60, path),
    "strips": lambda path: strip(5, 8, path),
    "strips, one of one frame": lambda path: strip(1, 1, path),
    "strips, more than are drawn": lambda path: strip(9, 2, path, most=2),
    "arms": lambda path: plots.arms(
        {"novel in context": {"meta": [1.0, 2.0], "finetune": [3.0, 4.0]}, "out of it": {"meta": [0.0, 1.0]}}, path,
        label="[%]", chance={"out of it": 3.3},
    ),
    "arms, one of one seed": lambda path: plots.arms({"all": {"meta": [1.0]}}, path, label="[%]"),
    "arms, more than colours": lambda path: plots.arms({"all": {f"{i}": [1.0, 2.0 + i] for i in range(9)}}, path,
                                                       label="[%]"),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_picture(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG with something in colour, of a size to be looked at, in a folder that was not there."""
    save = plots.Figure.savefig
    monkeypatch.setattr(plots.Figure, "savefig", lambda self, path, dpi: save(self, path, dpi=60))  # time
    path = tmp_path / "new" / "picture.png"
    DRAWN[name](path)
    with Image.open(path) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 60
        assert max(picture.size) < 2500
        colours = picture.convert("RGB").getcolors(1 << 24)
    assert colours is not None
    # beside white, axes and text there is what was drawn
    vivid = sum(count for count, colour in colours if max(colour) - min(colour) > 60)
    grey = name in ("training on single frames alone", "accuracies, one of nothing")
    assert (vivid == 0) if grey else (vivid > 5)


def test_resolution(tmp_path: Path) -> None:
    plots.gaussian(config(4), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (750, 450)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Figures, which are not written."""
    found: list[Any] = []
    monkeypatch.setattr(plots, "_save", lambda figure, path: found.append(figure))
    return found


def test_gaussian_shares(drawn: list[Any], tmp_path: Path) -> None:
    """Bars are the shares, at epochs from 1 on; the line is that of equal ones."""
    plots.gaussian(config(6, mu=2.0, sigma=1.5), tmp_path / "x.png")
    axes = drawn[0].axes[0]
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], gaussian_weights(6, 2.0, 1.5))
    centres = [bar.get_x() + bar.get_width() / 2 for bar in axes.patches]
    np.testing.assert_allclose(centres, np.arange(1, 7))
    np.testing.assert_allclose(axes.lines[0].get_ydata(), 1 / 6)


def test_reliance_order(drawn: list[Any], tmp_path: Path) -> None:
    """The largest drop on top; a class that is in one of both alone is not shown."""
    plots.reliance({"a": 50, "b": 90, "c": 20, "d": 1}, {"a": 40, "b": 10, "c": 30}, tmp_path / "x.png")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "a", "c"]
    assert axes.yaxis_inverted()
    inside, outside = (one.get_offsets().tolist() for one in axes.collections[1:])
    assert inside == [[90, 0], [50, 1], [20, 2]]
    assert outside == [[10, 0], [40, 1], [30, 2]]


def test_strip_shows_frames_in_order(drawn: list[Any], tmp_path: Path) -> None:
    clip = np.zeros((3, 3, 4, 4), dtype=np.uint8)
    clip[1, 0], clip[2, 2] = 200, 100
    plots.strips([(clip, "wave", [("nod", 0.51), ("wave", 0.49)])], tmp_path / "x.png")
    (axes,) = drawn[0].axes
    shown = axes.images[0].get_array()
    assert shown.shape == (4, 12, 3)
    assert shown[0, ::4].tolist() == [[0, 0, 0], [200, 0, 0], [0, 0, 100]]
    assert axes.get_title(loc="left") == "wave  →  nod 51 %, wave 49 %"


def test_training_panels(drawn: list[Any], tmp_path: Path) -> None:
    """A panel for what is there: losses, cosines, gains; each against its steps."""
    held = [{"step": 1, "phase": 1, "loss": 3.0, "query_loss": 4.0, "cosine": 0.25},
            {"step": 2, "phase": 1, "loss": 2.0, "query_loss": 3.0, "cosine": 0.5, "gain": -0.125}]  # fmt: skip
    plots.training(held, tmp_path / "x.png")
    losses, cosines, gains = drawn[0].axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[3.0, 2.0], [4.0, 3.0]]
    assert list(cosines.lines[0].get_ydata()) == [0.25, 0.5]
    assert (list(gains.lines[0].get_xdata()), list(gains.lines[0].get_ydata())) == ([2], [-0.125])
    plots.training(held[:1], tmp_path / "x.png")
    plots.training([{"step": 1, "loss": 3.0}], tmp_path / "x.png")
    assert [len(figure.axes) for figure in drawn] == [3, 2, 1]
