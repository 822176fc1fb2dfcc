"""The fault tests of metazoo.testing with streetclip's own steps (faults 1 to 7, 10, 11 and 13)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from metazoo import testing
from streetclip.config import Config

PRELOAD = (
    "streetclip.plots", "streetclip.world", "streetclip.captions", "scipy.linalg", "sklearn.cluster", "pandas",
    "transformers.models.clip.modeling_clip", "transformers.models.clip.image_processing_pil_clip",
)  # fmt: skip
TINY = Config(
    images=24, test_images=2, width=8, heads=2, vision_layers=1, text_layers=1, projection=4, patch=16, batch=4,
    generic_batch=4, generic_steps=5, steps=9, warmup=0,
)  # fmt: skip
TRAINING = testing.Training("streetclip.train:train", TINY, preload=PRELOAD)


@pytest.fixture(scope="module")
def captions() -> testing.Training:
    """Generic captions, then synthetic ones: the change lies between two checkpoints."""
    return TRAINING


def test_killed_anywhere(tmp_path: Path, captions: testing.Training) -> None:
    testing.killed_anywhere(captions, tmp_path, draws=2)


def test_killed_anywhere_with_a_head(tmp_path: Path) -> None:
    testing.killed_anywhere(replace(TRAINING, config=replace(TINY, method="label-head")), tmp_path, draws=1, seed=1)


@pytest.mark.faults
@pytest.mark.parametrize("method", ["streetclip", "label-head"])
def test_killed_at_twenty_moments(tmp_path: Path, method: str) -> None:
    training = replace(TRAINING, config=replace(TINY, method=method))  # type: ignore[arg-type]
    testing.killed_anywhere(training, tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path, captions: testing.Training) -> None:
    testing.killed_before_rename(replace(captions, config=replace(TINY, steps=6)), tmp_path)


def test_full_disk(tmp_path: Path, captions: testing.Training) -> None:
    testing.full_disk(captions, tmp_path)


def test_damaged_checkpoints(tmp_path: Path, captions: testing.Training) -> None:
    testing.damaged_checkpoints(captions, tmp_path)


def test_asked_to_stop(tmp_path: Path, captions: testing.Training) -> None:
    testing.asked_to_stop(captions, tmp_path)


def test_second_process_refused(tmp_path: Path, captions: testing.Training) -> None:
    testing.second_process_refused(captions, tmp_path)


def test_changed_config(tmp_path: Path, captions: testing.Training) -> None:
    testing.changed_config(captions, tmp_path, lr=0.25)


def test_foreign_tensors(tmp_path: Path, captions: testing.Training) -> None:
    testing.foreign_tensors(captions, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path, captions: testing.Training) -> None:
    testing.pickles_are_not_loaded(captions, tmp_path)
