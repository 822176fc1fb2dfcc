"""The fault tests of metazoo.testing with this package's own steps (faults 1 to 7, 10, 11 and 13); dropout draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from list_selftrain.config import Config
from metazoo import testing

PRELOAD = ("list_selftrain.plots", "joblib", "transformers", "peft", "sklearn.feature_extraction.text")
TRAINING = testing.Training("list_selftrain.train:train", Config(), preload=PRELOAD)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testing.Training]:
    """A tiny prompted RoBERTa with dropout and meta weights, on a small file: 4 steps of a teacher, 2 sessions of 8."""
    folder = tmp_path_factory.mktemp("reviews")
    lines = [f"the film number {i} is {word},{k}" for i in range(20) for k, word in enumerate(("bad", "good"))]
    (folder / "own.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    config = Config(
        dataset=str(folder / "own.csv"), shots=8, template="*cls**sent_0*_It_was*mask*.*sep+*", words=("bad", "good"),
        width=8, heads=2, layers=1, feedforward=8, vocabulary=300, pretrain_steps=0, adapter_dim=2, sessions=2,
        session_steps=4, teacher_epochs=2, finetune_epochs=2, unlabelled_batch=4, warmup=0.25, max_length=32,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(folder / "cache"))
        yield replace(TRAINING, config=config)


@pytest.fixture(scope="module")
def pretrained(prompted: testing.Training) -> testing.Training:
    return replace(
        prompted, config=replace(prompted.config, pretrain_steps=3, pretrain_batch_size=4, accumulation=2, tune="full")
    )


@pytest.fixture(scope="module")
def features(prompted: testing.Training) -> testing.Training:
    """UST's choice by dropout on frozen features."""
    return replace(
        prompted, config=replace(prompted.config, model="features", svd=4, hidden=4, weights="uncertainty", mc_passes=2)
    )


def test_killed_anywhere(tmp_path: Path, prompted: testing.Training) -> None:
    testing.killed_anywhere(prompted, tmp_path, draws=1)


def test_killed_anywhere_after_pretraining(tmp_path: Path, pretrained: testing.Training) -> None:
    """Pre-trained in the first process, taken from the cache by all others."""
    testing.killed_anywhere(pretrained, tmp_path, draws=1)


def test_killed_anywhere_features(tmp_path: Path, features: testing.Training) -> None:
    testing.killed_anywhere(features, tmp_path, draws=1)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["prompted", "pretrained", "features"])
def test_killed_at_twenty_moments(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    testing.killed_anywhere(request.getfixturevalue(name), tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path, features: testing.Training) -> None:
    testing.killed_before_rename(features, tmp_path)


def test_full_disk(tmp_path: Path, prompted: testing.Training) -> None:
    testing.full_disk(prompted, tmp_path)


def test_damaged_checkpoints(tmp_path: Path, features: testing.Training) -> None:
    testing.damaged_checkpoints(features, tmp_path)


def test_asked_to_stop(tmp_path: Path, prompted: testing.Training) -> None:
    testing.asked_to_stop(prompted, tmp_path)


def test_second_process_refused(tmp_path: Path, prompted: testing.Training) -> None:
    testing.second_process_refused(prompted, tmp_path)


def test_changed_config(tmp_path: Path, prompted: testing.Training) -> None:
    testing.changed_config(prompted, tmp_path, width=16)


def test_foreign_tensors(tmp_path: Path, features: testing.Training) -> None:
    testing.foreign_tensors(features, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path, features: testing.Training) -> None:
    testing.pickles_are_not_loaded(features, tmp_path)
