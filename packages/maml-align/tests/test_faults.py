"""The fault tests of metazoo.testing with maml-align's own steps (faults 1 to 7, 10, 11 and 13)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from maml_align.config import Config
from metazoo import testing

PRELOAD = (
    "maml_align.plots", "maml_align.tasks", "maml_align.rotations", "scipy.linalg", "sentence_transformers",
    "sentence_transformers.sentence_transformer.modules",
    "transformers.models.bert.modeling_bert", "torch.func",
)  # fmt: skip
ROTATIONS = Config(
    dataset="rotations", model="linear", languages=("a", "b", "c"), unseen=(), dimension=4, shots=3, queries=3,
    inner_steps=2, inner_lr=0.5, steps=14, outer_lr=1e-2, task_batch=2,
)  # fmt: skip
TRAINING = testing.Training("maml_align.train:train", ROTATIONS, preload=PRELOAD)


@pytest.fixture(scope="module")
def vectors() -> testing.Training:
    """The synthetic world: no text, a fraction of a second; checkpoints at steps 5, 10 and 14."""
    return TRAINING


def pairs(folder: Path) -> Path:
    """Scored pairs of three languages in a file of one's own."""
    lines = ["sentence1,sentence2,score,language1,language2"]
    for one in ("de", "en", "es"):
        for other in ("de", "en", "es"):
            lines += [f"{one} first {i},{other} second {i + i % 3},{5 - i % 3},{one},{other}" for i in range(80)]
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def asked(folder: Path) -> Path:
    """Questions in three languages, each with its answer, in a file of one's own."""
    lines = ["id,language,question,answer"]
    for i in range(40):
        lines += [f"{i},{one},what is {one} {i},it is {one} number {i}" for one in ("de", "en", "es")]
    path = folder / "questions.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> testing.Training:
    """Static vectors on scored pairs, with learned rates and the best of three validations."""
    path = pairs(tmp_path_factory.mktemp("pairs"))
    config = Config(
        dataset=str(path), model="static", languages=("de", "en", "es"), unseen=(), width=4, vocabulary=300, shots=3,
        queries=3, inner_steps=2, inner_lr=0.5, steps=9, task_batch=2, validate_every=3, learn_inner_lr=True,
    )  # fmt: skip
    return replace(TRAINING, config=config)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> testing.Training:
    """Static vectors on questions, at a rate that moves them far: similar questions and hard negatives stay those of
    the start, also after a resume."""
    path = asked(tmp_path_factory.mktemp("asked"))
    config = Config(
        dataset=str(path), model="static", languages=("de", "en", "es"), unseen=(), width=4, vocabulary=300, shots=2,
        queries=2, negatives=2, negative_sampling="hard", query_sampling="similar", inner_steps=1, inner_lr=0.5,
        outer_lr=0.5, steps=9, task_batch=1,
    )  # fmt: skip
    return replace(TRAINING, config=config, checkpoint_every=1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> testing.Training:
    """A BERT on questions, with negatives mined by it before training."""
    config = Config(
        dataset=str(asked(tmp_path_factory.mktemp("questions"))), model="tiny", languages=("de", "en", "es"), unseen=(),
        width=8, heads=2, layers=1, feedforward=8, vocabulary=300, shots=2, queries=2, negatives=2,
        negative_sampling="hard", inner_steps=1, inner_lr=0.1, steps=6, task_batch=2, max_query_length=12,
        max_answer_length=12,
    )  # fmt: skip
    return replace(TRAINING, config=config)


def test_killed_anywhere(tmp_path: Path, static: testing.Training) -> None:
    testing.killed_anywhere(static, tmp_path, draws=1)


def test_killed_anywhere_on_questions(tmp_path: Path, questions: testing.Training) -> None:
    testing.killed_anywhere(questions, tmp_path, draws=1, seed=1)


def test_killed_anywhere_with_a_transformer(tmp_path: Path, tiny: testing.Training) -> None:
    testing.killed_anywhere(tiny, tmp_path, draws=1, seed=2)


def test_killed_anywhere_on_vectors(tmp_path: Path, vectors: testing.Training) -> None:
    testing.killed_anywhere(vectors, tmp_path, draws=1, seed=3)


@pytest.mark.faults
@pytest.mark.parametrize("name", ["static", "questions", "tiny", "vectors"])
def test_killed_at_twenty_moments(tmp_path: Path, request: pytest.FixtureRequest, name: str) -> None:
    testing.killed_anywhere(request.getfixturevalue(name), tmp_path, draws=20, seed=1)


def test_killed_before_rename(tmp_path: Path, vectors: testing.Training) -> None:
    testing.killed_before_rename(replace(vectors, config=replace(ROTATIONS, steps=11)), tmp_path)


def test_full_disk(tmp_path: Path, vectors: testing.Training) -> None:
    testing.full_disk(vectors, tmp_path)


def test_damaged_checkpoints(tmp_path: Path, vectors: testing.Training) -> None:
    testing.damaged_checkpoints(vectors, tmp_path)


@pytest.mark.faults
def test_damaged_checkpoints_of_static_vectors(tmp_path: Path, static: testing.Training) -> None:
    testing.damaged_checkpoints(static, tmp_path)


def test_asked_to_stop(tmp_path: Path, vectors: testing.Training) -> None:
    testing.asked_to_stop(vectors, tmp_path)


def test_second_process_refused(tmp_path: Path, vectors: testing.Training) -> None:
    testing.second_process_refused(vectors, tmp_path)


def test_changed_config(tmp_path: Path, vectors: testing.Training) -> None:
    testing.changed_config(vectors, tmp_path, kd_lambda=0.25)


def test_foreign_tensors(tmp_path: Path, vectors: testing.Training) -> None:
    testing.foreign_tensors(vectors, tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path, vectors: testing.Training) -> None:
    testing.pickles_are_not_loaded(vectors, tmp_path)
