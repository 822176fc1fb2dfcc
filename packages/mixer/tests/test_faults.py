"""The fault tests of metazoo.testing with MixER's own steps, gate and data (faults 1 to 7, 10, 11 and 13)."""

from __future__ import annotations

from pathlib import Path

import pytest
from metazoo import testing
from mixer.config import Config

TINY = Config(
    dataset="odebench-4", every=20, experts=4, context_size=8, width=8, depth=2, contributors=3, outer_steps=4,
    inner_steps=(3, 3), gate_every=2, crop=0.7,
)  # fmt: skip
MIXER = testing.Training("mixer.train:train", TINY, preload=("mixer.plots", "matplotlib.backends.backend_agg"))


def test_killed_anywhere(tmp_path: Path) -> None:
    testing.killed_anywhere(MIXER, tmp_path, draws=3)


@pytest.mark.faults
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    testing.killed_anywhere(MIXER, tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path) -> None:
    testing.killed_before_rename(MIXER, tmp_path)


def test_full_disk(tmp_path: Path) -> None:
    testing.full_disk(MIXER, tmp_path)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    testing.damaged_checkpoints(MIXER, tmp_path)


def test_asked_to_stop(tmp_path: Path) -> None:
    testing.asked_to_stop(MIXER, tmp_path)


def test_second_process_refused(tmp_path: Path) -> None:
    testing.second_process_refused(MIXER, tmp_path)


def test_changed_config(tmp_path: Path) -> None:
    testing.changed_config(MIXER, tmp_path, width=4)


def test_foreign_tensors(tmp_path: Path) -> None:
    testing.foreign_tensors(MIXER, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    testing.pickles_are_not_loaded(MIXER, tmp_path)
