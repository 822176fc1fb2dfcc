"""The fault tests of metazoo.testing with self-training's own steps (faults 1 to 7, 10, 11 and 13); dropout draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from list_selftrain.config import Config
from metazoo import testing

PRELOAD = (
    "list_selftrain.plots", "list_selftrain.estimator", "joblib", "peft", "sklearn.decomposition",
    "sklearn.feature_extraction.text", "transformers.models.roberta.modeling_roberta",
)  # fmt: skip
TRAINING = testing.Training("list_selftrain.train:train", Config(), preload=PRELOAD)


@pytest.fixture(scope="module")
def prompted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testing.Training]:
    """A tiny RoBERTa with dropout, on a small file: a teacher of 2 steps, and two sessions of 6 and 3. Pre-trained
    models go nowhere else: the fork server and its children inherit the variable."""
    folder = tmp_path_factory.mktemp("reviews")
    for name, first in (("own", 0), ("test", 20)):
        lines = [f"the film number {first + i} is {word},{word}" for i in range(16) for word in ("bad", "good")]
        (folder / f"{name}.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    config = Config(
        dataset=str(folder / "own.csv"), test=str(folder / "test.csv"), shots=6, max_test=8, width=8, heads=2, layers=1,
        feedforward=8, vocabulary=300, template="*cls**sent_0*_It_was*mask*.*sep+*", words=("bad", "good"),
        max_length=32, adapter_dim=2, pretrain_steps=0, labelled_batch=3, unlabelled_batch=4, sessions=2,
        session_steps=6, teacher_epochs=1, finetune_epochs=1, warmup=0.3, dropout=0.1, lr=1e-2, teacher_lr=1e-2,
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
def uncertain(prompted: testing.Training) -> testing.Training:
    """UST: what it chooses depends on what dropout draws."""
    return replace(prompted, config=replace(prompted.config, weights="uncertainty", mc_passes=3, mc_pool=20))


@pytest.fixture(scope="module")
def features(uncertain: testing.Training) -> testing.Training:
    """The same on frozen features of the texts."""
    return replace(uncertain, config=replace(uncertain.config, model="features", svd=4, hidden=4))


@pytest.fixture(scope="module")
def vectors() -> testing.Training:
    """A network on vectors."""
    config = Config(
        dataset="gaussian", model="features", dimension=6, hidden=32, shots=6, max_unlabelled=40, max_test=20,
        labelled_batch=3, unlabelled_batch=6, sessions=2, session_steps=6, teacher_epochs=1, finetune_epochs=1,
        warmup=0.3, dropout=0.2, lr=1e-2, teacher_lr=1e-2,
    )  # fmt: skip
    return replace(TRAINING, config=config)


def test_killed_anywhere(tmp_path: Path, prompted: testing.Training) -> None:
    testing.killed_anywhere(prompted, tmp_path, draws=2)


def test_killed_anywhere_after_pretraining(tmp_path: Path, pretrained: testing.Training) -> None:
    """Pre-trained in the first process, taken from the cache by all others; all weights are trained, in parts."""
    testing.killed_anywhere(pretrained, tmp_path, draws=1)


def test_killed_anywhere_with_sampled_choices(tmp_path: Path, uncertain: testing.Training) -> None:
    testing.killed_anywhere(uncertain, tmp_path, draws=1, seed=2)


def test_killed_anywhere_on_features(tmp_path: Path, features: testing.Training) -> None:
    testing.killed_anywhere(features, tmp_path, draws=1)


def test_killed_anywhere_on_vectors(tmp_path: Path, vectors: testing.Training) -> None:
    testing.killed_anywhere(vectors, tmp_path, draws=1, seed=3)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["prompted", "pretrained", "uncertain", "features", "vectors"])
def test_killed_at_twenty_moments(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    testing.killed_anywhere(request.getfixturevalue(name), tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path, vectors: testing.Training) -> None:
    testing.killed_before_rename(vectors, tmp_path)


def test_full_disk(tmp_path: Path, vectors: testing.Training) -> None:
    testing.full_disk(vectors, tmp_path)


def test_damaged_checkpoints(tmp_path: Path, vectors: testing.Training) -> None:
    testing.damaged_checkpoints(vectors, tmp_path)


@pytest.mark.faults
def test_damaged_checkpoints_of_a_language_model(tmp_path: Path, prompted: testing.Training) -> None:
    testing.damaged_checkpoints(prompted, tmp_path)


def test_asked_to_stop(tmp_path: Path, prompted: testing.Training) -> None:
    testing.asked_to_stop(prompted, tmp_path)


def test_second_process_refused(tmp_path: Path, vectors: testing.Training) -> None:
    testing.second_process_refused(vectors, tmp_path)


def test_changed_config(tmp_path: Path, vectors: testing.Training) -> None:
    testing.changed_config(vectors, tmp_path, warmup=0.5)


def test_foreign_tensors(tmp_path: Path, prompted: testing.Training) -> None:
    testing.foreign_tensors(prompted, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path, vectors: testing.Training) -> None:
    testing.pickles_are_not_loaded(vectors, tmp_path)
