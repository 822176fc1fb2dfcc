"""The fault tests of metazoo.testing with trmrl's own updates (faults 1 to 7, 10, 11 and 13)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from metazoo import testing
from trmrl.config import Config

PRELOAD = ("trmrl.plots", "trmrl.pearl", "trmrl.varibad", "trmrl.maml", "scipy.signal")
TINY = Config(
    horizon=4, episodes=2, tasks=4, window=3, d_model=8, heads=2, layers=1, d_ff=16, head_hidden=(8,), updates=14,
    passes=2, minibatch=16, rollouts=2, sac_steps=2, sac_hidden=8, sac_batch=4, sac_tasks=2, context=4, train_tasks=6,
    vae_trials=8, vae_steps=2, decay_from=4, decay_to=9,
)  # fmt: skip
TRAINING = testing.Training("trmrl.train:train", TINY, preload=PRELOAD)


@pytest.fixture(scope="module")
def updates() -> testing.Training:
    """Fourteen updates; checkpoints after 5, 10 and 14; the rate falls from the fifth to the ninth."""
    return TRAINING


def test_killed_anywhere(tmp_path: Path, updates: testing.Training) -> None:
    testing.killed_anywhere(updates, tmp_path, draws=2)


def test_killed_anywhere_with_buffers(tmp_path: Path, updates: testing.Training) -> None:
    """PEARL learns from all transitions so far, which a resumed run has, too."""
    testing.killed_anywhere(replace(updates, config=replace(TINY, algo="pearl")), tmp_path, draws=1, seed=1)


@pytest.mark.faults
@pytest.mark.parametrize("algo", ["trmrl", "rl2", "varibad", "maml", "pearl"])
def test_killed_at_twenty_moments(tmp_path: Path, algo: str) -> None:
    config = replace(TINY, algo=algo)  # type: ignore[arg-type]
    testing.killed_anywhere(replace(TRAINING, config=config), tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path, updates: testing.Training) -> None:
    testing.killed_before_rename(replace(updates, config=replace(TINY, updates=11)), tmp_path)


def test_full_disk(tmp_path: Path, updates: testing.Training) -> None:
    testing.full_disk(updates, tmp_path)


def test_damaged_checkpoints(tmp_path: Path, updates: testing.Training) -> None:
    testing.damaged_checkpoints(updates, tmp_path)


def test_asked_to_stop(tmp_path: Path, updates: testing.Training) -> None:
    testing.asked_to_stop(updates, tmp_path)


def test_second_process_refused(tmp_path: Path, updates: testing.Training) -> None:
    testing.second_process_refused(updates, tmp_path)


def test_changed_config(tmp_path: Path, updates: testing.Training) -> None:
    testing.changed_config(updates, tmp_path, clip=0.25)


def test_foreign_tensors(tmp_path: Path, updates: testing.Training) -> None:
    testing.foreign_tensors(updates, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path, updates: testing.Training) -> None:
    testing.pickles_are_not_loaded(updates, tmp_path)
