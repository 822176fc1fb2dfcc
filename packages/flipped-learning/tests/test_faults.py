"""The fault tests of metazoo.testing with meta-training's own steps (faults 1 to 7, 10, 11 and 13); dropout draws."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from flipped_learning.config import Config
from metazoo import testing

PRELOAD = ("flipped_learning.plots", "joblib", "transformers.optimization", "peft")
TRAINING = testing.Training("flipped_learning.train:train", Config(), preload=PRELOAD)


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Iterator[testing.Training]:
    """A tiny T5 with dropout, on a small file. Pre-trained models go nowhere else: the fork server and its children
    inherit the variable."""
    folder = tmp_path_factory.mktemp("reviews")
    lines = [f"the film number {i} is {word},{k}" for i in range(20) for k, word in enumerate(("bad", "good"))]
    (folder / "own.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    (folder / "templates.yaml").write_text(
        "templates:\n  a: {name: Tone, answer_choices: 'negative ||| positive',\n"
        "    jinja: '{{text}} What is the tone? ||| {{answer_choices[label]}}'}\n"
    )
    config = Config(
        dataset=(str(folder / "own.csv"),), templates=str(folder / "templates.yaml"), width=8, heads=2, layers=1,
        feedforward=8, vocabulary=100, pretrain_steps=0, steps=20, batch_size=2, warmup=5, decay=True, dropout=0.1,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(folder / "cache"))
        yield replace(TRAINING, config=config)


@pytest.fixture(scope="module")
def pretrained(t5: testing.Training) -> testing.Training:
    return replace(
        t5, config=replace(t5.config, pretrain_steps=3, pretrain_batch_size=4, accumulation=2, optimizer="adafactor")
    )


@pytest.fixture(scope="module")
def bag(t5: testing.Training) -> testing.Training:
    return replace(t5, config=replace(t5.config, model="bag", pairs=2, width=4, dropout=0.0))


def test_killed_anywhere(tmp_path: Path, t5: testing.Training) -> None:
    testing.killed_anywhere(t5, tmp_path, draws=2)


def test_killed_anywhere_after_pretraining(tmp_path: Path, pretrained: testing.Training) -> None:
    """Pre-trained in the first process, taken from the cache by all others; Adafactor's state is part of the run."""
    testing.killed_anywhere(pretrained, tmp_path, draws=1)


def test_killed_anywhere_bag(tmp_path: Path, bag: testing.Training) -> None:
    testing.killed_anywhere(bag, tmp_path, draws=1)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["t5", "pretrained", "bag"])
def test_killed_at_twenty_moments(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    testing.killed_anywhere(request.getfixturevalue(name), tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path, bag: testing.Training) -> None:
    testing.killed_before_rename(bag, tmp_path)


def test_full_disk(tmp_path: Path, t5: testing.Training) -> None:
    testing.full_disk(t5, tmp_path)


def test_damaged_checkpoints(tmp_path: Path, bag: testing.Training) -> None:
    testing.damaged_checkpoints(bag, tmp_path)


@pytest.mark.faults
def test_damaged_checkpoints_of_a_language_model(tmp_path: Path, t5: testing.Training) -> None:
    testing.damaged_checkpoints(t5, tmp_path)


def test_asked_to_stop(tmp_path: Path, t5: testing.Training) -> None:
    testing.asked_to_stop(t5, tmp_path)


def test_second_process_refused(tmp_path: Path, t5: testing.Training) -> None:
    testing.second_process_refused(t5, tmp_path)


def test_changed_config(tmp_path: Path, t5: testing.Training) -> None:
    testing.changed_config(t5, tmp_path, width=16)


def test_foreign_tensors(tmp_path: Path, t5: testing.Training) -> None:
    testing.foreign_tensors(t5, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path, bag: testing.Training) -> None:
    testing.pickles_are_not_loaded(bag, tmp_path)
