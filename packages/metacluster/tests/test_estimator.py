"""The estimators: scikit-learn's own checks, real digits, a smooth function, files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from metacluster import MetaClusterClassifier, MetaClusterRegressor
from metazoo.errors import UserError
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.utils.estimator_checks import parametrize_with_checks

QUICK: dict[str, Any] = {"hidden": (16,), "clusters": 8, "random_state": 0}


@parametrize_with_checks(
    [
        MetaClusterClassifier(**QUICK, epochs=8, finetune_epochs=1, batch_size=16),
        MetaClusterRegressor(**QUICK, epochs=20, finetune_epochs=2, batch_size=16, lr=3e-3, embedding_lr=3e-2),
    ]
)
def test_scikit_learns_checks(estimator: Any, check: Any) -> None:
    check(estimator)


def test_digits() -> None:
    """Real digits: above 90 % after compression, at more than 15 times fewer bits, the same each time."""
    x, y = load_digits(return_X_y=True)
    model = MetaClusterClassifier(random_state=0).fit(x[:1400], y[:1400])
    assert model.score(x[1400:], y[1400:]) > 0.9
    assert model.compression_report_.edge_factor > 30
    assert max(model.residual_.values()) < 0.05
    proba = model.predict_proba(x[1400:])
    assert np.allclose(proba.sum(1), 1)
    again = clone(model).fit(x[:1400], y[:1400])
    assert np.array_equal(again.predict_proba(x[1400:]), proba)


def test_smooth_function() -> None:
    """sin + square of two columns, in a unit of its own: R² above 0.95 on new points."""
    rng = np.random.default_rng(0)
    x = rng.uniform(-3, 3, (1200, 2))
    y = 1000 + 50 * (np.sin(x[:, 0]) + x[:, 1] ** 2)
    model = MetaClusterRegressor(epochs=40, random_state=0).fit(x[:1000], y[:1000])
    assert model.score(x[1000:], y[1000:]) > 0.95


def test_files(tmp_path: Path) -> None:
    """Saved and loaded, without a pickle: the same predictions, text classes too."""
    x, y = load_digits(return_X_y=True)
    names = np.array([f"digit {d}" for d in range(10)])[y]
    model = MetaClusterClassifier(**QUICK, epochs=2, finetune_epochs=1).fit(x[:300], names[:300])
    model.save(tmp_path / "c")
    assert {path.name for path in (tmp_path / "c").iterdir()} == {"config.json", "estimator.json", "model.safetensors"}
    again = MetaClusterClassifier.load(tmp_path / "c")
    assert np.array_equal(again.predict_proba(x), model.predict_proba(x))
    assert np.array_equal(again.predict(x), model.predict(x))
    regressor = MetaClusterRegressor(**QUICK, epochs=2).fit(x[:300], y[:300])
    regressor.save(tmp_path / "r")
    assert np.array_equal(MetaClusterRegressor.load(tmp_path / "r").predict(x), regressor.predict(x))
    with pytest.raises(UserError, match="of a MetaClusterClassifier"):
        MetaClusterRegressor.load(tmp_path / "c")
    stored = json.loads((tmp_path / "c" / "estimator.json").read_text())
    del stored["classes"]
    (tmp_path / "c" / "estimator.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match="damaged"):
        MetaClusterClassifier.load(tmp_path / "c")
    with pytest.raises(UserError, match="cannot read"):
        MetaClusterClassifier.load(tmp_path / "nowhere")


def test_numbers_of_numpy(tmp_path: Path) -> None:
    """Parameters from a grid of np.arange work, and are saved; names and residuals come back."""
    x, y = load_digits(return_X_y=True)
    numbers = {"hidden": np.array([8]), "clusters": np.int64(4), "epochs": np.int64(1), "random_state": np.int64(1)}
    model = MetaClusterClassifier(**numbers).fit(x[:300], y[:300])
    model.feature_names_in_ = np.array([f"pixel {i}" for i in range(64)], dtype=object)
    model.save(tmp_path / "c")
    again = MetaClusterClassifier.load(tmp_path / "c")
    assert again.residual_ == model.residual_
    assert again.clusters == 4
    assert list(again.feature_names_in_) == list(model.feature_names_in_)


def test_independent_of_an_earlier_accelerator() -> None:
    """A precision that other code in the process asked Accelerate for does not reach an estimator."""
    x, y = load_digits(return_X_y=True)
    model = MetaClusterClassifier(**QUICK, epochs=1, finetune_epochs=0)
    alone = model.fit(x[:200], y[:200]).predict_proba(x[:9])
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        Accelerator(cpu=True, mixed_precision="bf16")
        assert np.array_equal(clone(model).fit(x[:200], y[:200]).predict_proba(x[:9]), alone)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)


def test_bad_input() -> None:
    """More clusters than edges, one class, a basis that does not exist: one line each."""
    x, y = load_digits(return_X_y=True)
    with pytest.raises(ValueError, match="has 160 edges"):
        MetaClusterClassifier(**{**QUICK, "clusters": 161}, epochs=1).fit(x, y)
    with pytest.raises(ValueError, match="one class only"):
        MetaClusterClassifier(**QUICK).fit(x, np.zeros(len(x)))
    with pytest.raises(ValueError, match="unknown basis"):
        MetaClusterClassifier(**QUICK, basis="wavelet").fit(x, y)
