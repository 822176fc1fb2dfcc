"""The fault tests of metazoo.testing with open-mede's own steps (faults 1 to 7, 10, 11 and 13)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from metazoo import testing
from open_mede.config import Config

PRELOAD = (
    "open_mede.plots", "open_mede.train", "transformers.models.clip.modeling_clip",
    "transformers.models.clip.image_processing_pil_clip",
)  # fmt: skip
TINY = Config(
    dataset="features", model="linear", clips=40, test_clips=4, method="meta", alpha=0.5, epochs=4, batch=8,
    optimizer="sgd", lr=0.1, momentum=0.9, average="gwa", mu=2.0, sigma=1.0,
)  # fmt: skip
SPRITES = Config(
    dataset="sprites", model="tiny", clips=16, test_clips=2, draws=1, width=8, heads=2, vision_layers=1, text_layers=1,
    patch=16, image_steps=6, image_batch=4, adapter=2, method="meta", alpha=0.01, epochs=3, batch=4, optimizer="adamw",
    lr=1e-3, average="gwa", mu=1.0, sigma=1.0,
)  # fmt: skip
TRAINING = testing.Training("open_mede.train:train", TINY, preload=PRELOAD)


@pytest.fixture(scope="module")
def episodes() -> testing.Training:
    """Four epochs of five steps, so that a checkpoint is at the end of each, where averages are taken."""
    return TRAINING


def test_killed_anywhere(tmp_path: Path, episodes: testing.Training) -> None:
    testing.killed_anywhere(episodes, tmp_path, draws=2)


def test_killed_anywhere_with_single_frames_first(tmp_path: Path, episodes: testing.Training) -> None:
    """The change of phase lies between two checkpoints."""
    testing.killed_anywhere(replace(episodes, config=SPRITES), tmp_path, draws=1, seed=1)


@pytest.mark.faults
@pytest.mark.parametrize("config", [TINY, SPRITES, replace(TINY, method="distill")], ids=["meta", "sprites", "distill"])
def test_killed_at_twenty_moments(tmp_path: Path, config: Config) -> None:
    testing.killed_anywhere(replace(TRAINING, config=config), tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path, episodes: testing.Training) -> None:
    testing.killed_before_rename(replace(episodes, config=replace(TINY, epochs=2)), tmp_path)


def test_full_disk(tmp_path: Path, episodes: testing.Training) -> None:
    testing.full_disk(episodes, tmp_path)


def test_damaged_checkpoints(tmp_path: Path, episodes: testing.Training) -> None:
    testing.damaged_checkpoints(episodes, tmp_path)


def test_asked_to_stop(tmp_path: Path, episodes: testing.Training) -> None:
    testing.asked_to_stop(episodes, tmp_path)


def test_second_process_refused(tmp_path: Path, episodes: testing.Training) -> None:
    testing.second_process_refused(episodes, tmp_path)


def test_changed_config(tmp_path: Path, episodes: testing.Training) -> None:
    testing.changed_config(episodes, tmp_path, alpha=0.25)


def test_foreign_tensors(tmp_path: Path, episodes: testing.Training) -> None:
    testing.foreign_tensors(episodes, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path, episodes: testing.Training) -> None:
    testing.pickles_are_not_loaded(episodes, tmp_path)
