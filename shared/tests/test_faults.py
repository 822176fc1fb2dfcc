"""The fault tests of metazoo.testing, on the toy method with dropout (faults 1 to 7, 10, 11 and 13)."""

from __future__ import annotations

from pathlib import Path

import pytest
from metazoo import testing
from toy_method import Config

TOY = testing.Training("toy_method:train", Config())


def test_killed_anywhere(tmp_path: Path) -> None:
    testing.killed_anywhere(TOY, tmp_path, draws=3)


@pytest.mark.faults
def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    testing.killed_anywhere(TOY, tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path) -> None:
    testing.killed_before_rename(TOY, tmp_path)


def test_full_disk(tmp_path: Path) -> None:
    testing.full_disk(TOY, tmp_path)


def test_damaged_checkpoints(tmp_path: Path) -> None:
    testing.damaged_checkpoints(TOY, tmp_path)


def test_asked_to_stop(tmp_path: Path) -> None:
    testing.asked_to_stop(TOY, tmp_path)


def test_second_process_refused(tmp_path: Path) -> None:
    testing.second_process_refused(TOY, tmp_path)


def test_changed_config(tmp_path: Path) -> None:
    testing.changed_config(TOY, tmp_path, width=8)


def test_foreign_tensors(tmp_path: Path) -> None:
    testing.foreign_tensors(TOY, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path) -> None:
    testing.pickles_are_not_loaded(TOY, tmp_path)
