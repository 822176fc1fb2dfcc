"""The fault tests of metazoo.testing with MambaCL's own steps (faults 1 to 7, 10, 11 and 13); dropout draws numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from mambacl.config import Config
from metazoo import testing

TINY = Config(
    width=8, blocks=1, steps=20, batch_size=4, warmup=5, decay_every=10, eval_every=7, eval_episodes=3, queries=2,
    state_size=4,
)  # fmt: skip
TRAINING = testing.Training("mambacl.train:train", TINY, preload=("mambacl.plots", "mambacl.evaluate"))


def test_killed_anywhere(tmp_path: Path) -> None:
    testing.killed_anywhere(TRAINING, tmp_path, draws=3)


def test_killed_anywhere_with_dropout(tmp_path: Path) -> None:
    """The Performer with dropout: random states and redrawn features are part of the run."""
    from dataclasses import replace

    config = replace(TINY, method="performer", dropout=0.2, favor_features=4, favor_redraw=6, encoder="mlp")
    testing.killed_anywhere(replace(TRAINING, config=config), tmp_path, draws=2)


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
    testing.changed_config(TRAINING, tmp_path, width=16)


def test_foreign_tensors(tmp_path: Path) -> None:
    testing.foreign_tensors(TRAINING, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    testing.pickles_are_not_loaded(TRAINING, tmp_path)
