"""The fault tests of metazoo.testing with MetaCluster's own stages (faults 1 to 7, 10, 11 and 13).

With 3 + 2 epochs of 4 steps the kills fall before, at and after K-means.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from metacluster.config import Config
from metazoo import testing

TINY = Config(
    dataset="digits", train_size=200, hidden=(8,), clusters=4, epochs=3, finetune_epochs=2, batch_size=50, centres=4,
    meta_hidden=4,
)  # fmt: skip
TRAINING = testing.Training(
    "metacluster.train:train", TINY, preload=("metacluster.plots", "sklearn.datasets", "sklearn.model_selection")
)


def test_killed_anywhere(tmp_path: Path) -> None:
    testing.killed_anywhere(TRAINING, tmp_path, draws=3)


@pytest.mark.faults
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    testing.killed_anywhere(TRAINING, tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path) -> None:
    testing.killed_before_rename(TRAINING, tmp_path)


def test_full_disk(tmp_path: Path) -> None:
    testing.full_disk(TRAINING, tmp_path)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    testing.damaged_checkpoints(TRAINING, tmp_path)


def test_asked_to_stop(tmp_path: Path) -> None:
    testing.asked_to_stop(TRAINING, tmp_path)


def test_second_process_refused(tmp_path: Path) -> None:
    testing.second_process_refused(TRAINING, tmp_path)


def test_changed_config(tmp_path: Path) -> None:
    testing.changed_config(TRAINING, tmp_path, clusters=8)


def test_foreign_tensors(tmp_path: Path) -> None:
    testing.foreign_tensors(TRAINING, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    testing.pickles_are_not_loaded(TRAINING, tmp_path)
