"""MambaContinualClassifier: streams, fixed state, files, scikit-learn's protocol, bad input."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import mambacl.estimator
import numpy as np
import pytest
import torch
from mambacl.estimator import MambaContinualClassifier
from metazoo.errors import UserError
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

torch.set_num_threads(1)


def table(classes: int = 8, each: int = 12, columns: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(classes, columns))
    y = np.repeat(np.arange(classes), each)
    return means[y] + rng.normal(size=(len(y), columns)), np.array([f"c{i}" for i in range(classes)])[y]


@pytest.fixture(scope="module")
def trained() -> MambaContinualClassifier:
    X, y = table(60, 6)
    return MambaContinualClassifier(steps=300, random_state=0).meta_fit(X, y)


def stream(model: MambaContinualClassifier, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Three new classes, one after the other, two examples each; returns 30 further examples."""
    X, y = table(3, 12, seed=seed)
    for name in ("c0", "c1", "c2"):
        rows = np.flatnonzero(y == name)[:2]
        model.partial_fit(X[rows], y[rows])
    rest = np.concatenate([np.flatnonzero(y == name)[2:] for name in ("c0", "c1", "c2")])
    return X[rest], y[rest]


def test_learns_new_classes_without_a_gradient_step(trained: MambaContinualClassifier) -> None:
    """Meta-trained on other classes, it is well above chance on three new ones; no weight has moved."""
    before = {name: p.clone() for name, p in trained.learner_.named_parameters()}
    scores = []
    for seed in range(1, 6):
        trained._forget()
        X, y = stream(trained, seed)
        scores.append(trained.score(X, y))
    assert np.mean(scores) > 0.6
    assert all(torch.equal(p, before[name]) for name, p in trained.learner_.named_parameters())


def test_one_by_one_is_all_at_once(trained: MambaContinualClassifier) -> None:
    """The same stream in pieces gives the same answers; predicting in between changes nothing."""
    X, y = table(3, 4)
    trained._forget()
    whole = trained.partial_fit(X, y).predict_proba(X)
    codes = dict(trained._codes)
    trained._forget()
    for i in range(len(X)):
        trained.partial_fit(X[i : i + 1], y[i : i + 1])
        trained.predict(X)
    assert trained._codes == codes
    assert np.allclose(trained.predict_proba(X), whole, atol=1e-4)
    assert trained.state_ is not None
    assert trained.state_.tokens == 24


def test_class_by_class_is_all_at_once(trained: MambaContinualClassifier) -> None:
    """A given learner takes columns as they are: what comes first does not change what the rest is."""
    X, y = table(3, 4)
    answers = []
    for size in (4, 12):
        model = MambaContinualClassifier(trained.learner_, random_state=0)
        for start in range(0, 12, size):
            model.partial_fit(X[start : start + size], y[start : start + size])
        assert (model.feature_scale_ == 1).all()
        answers.append((model.state_.tokens if model.state_ else 0, float(model.feature_mean_.sum())))
    assert answers[0] == answers[1] == (24, 0.0)


def test_state_has_one_size(trained: MambaContinualClassifier) -> None:
    trained._forget()
    sizes = []
    for _ in range(3):
        X, y = table(3, 20)
        trained.partial_fit(X, y)
        sizes.append(trained.state_.bytes if trained.state_ else 0)
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_saves_and_goes_on(trained: MambaContinualClassifier, tmp_path: Path) -> None:
    """save and load between two parts of a stream: the same answers as without."""
    trained._forget()
    X, y = table(3, 6)
    trained.partial_fit(X[:9], y[:9]).save(tmp_path / "kept")
    again = MambaContinualClassifier.load(tmp_path / "kept")
    assert np.allclose(again.predict_proba(X), trained.predict_proba(X), atol=1e-5)
    again.partial_fit(X[9:], y[9:])
    trained.partial_fit(X[9:], y[9:])
    assert list(again.classes_) == list(trained.classes_)
    assert np.allclose(again.predict_proba(X), trained.predict_proba(X), atol=1e-5)
    (tmp_path / "kept" / "state.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        MambaContinualClassifier.load(tmp_path / "kept")


def test_takes_a_learner(trained: MambaContinualClassifier, tmp_path: Path) -> None:
    """A learner that was meta-trained elsewhere, as an object or as its folder; clones keep it."""
    X, y = table(3, 6)
    trained.learner_.save_pretrained(tmp_path / "learner")
    for learner in (trained.learner_, tmp_path / "learner", str(tmp_path / "learner")):
        model = clone(MambaContinualClassifier(learner, random_state=0)).fit(X, y)
        assert model.predict(X).shape == (18,)
    with pytest.raises(UserError, match="columns"):
        MambaContinualClassifier(trained.learner_).fit(X[:, :4], y)
    with pytest.raises(UserError, match="save_pretrained"):
        MambaContinualClassifier(tmp_path / "none").fit(X, y)


def bad(case: str) -> Any:
    X, y = table(3, 6)
    model = MambaContinualClassifier(steps=2, width=8, vocabulary=3)
    if case == "before":
        return model.predict(X)
    if case == "nan":
        X[3, 1] = np.nan
        return model.fit(X, y)
    if case == "vocabulary":
        return model.fit(*table(4, 6))
    if case == "announced":
        return model.partial_fit(X, y, classes=["a", "b", "c", "d"])
    if case == "few classes":
        return model.meta_fit(*table(2, 6))
    if case == "few examples":
        return model.meta_fit(*table(3, 2))
    if case == "empty":
        return model.meta_fit(X, y).predict(X)
    return model.fit(X, y).predict(X[:, :2])


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("before", NotFittedError, "not fitted"), ("nan", ValueError, "NaN"), ("vocabulary", UserError, "vocabulary"),
        ("announced", UserError, "vocabulary"), ("few classes", UserError, "lower tasks or shots"),
        ("few examples", UserError, "lower tasks or shots"), ("empty", UserError, "partial_fit"),
        ("columns", ValueError, "features"),
    ],
)  # fmt: skip
def test_bad_input(case: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bad(case)


def test_docstring_example() -> None:
    found = doctest.testmod(mambacl.estimator)
    assert found.attempted > 3
    assert not found.failed


def test_scikit_learn_checks() -> None:
    """All of scikit-learn's checks but one: 300 examples in any order are not what 3 steps of meta-training teach."""
    check_estimator(
        MambaContinualClassifier(steps=3, width=8, blocks=1, batch_size=4, random_state=0),
        expected_failed_checks={"check_classifiers_train": "accuracy on a long, shuffled stream"},
        on_skip=None,
    )
