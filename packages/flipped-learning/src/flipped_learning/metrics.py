"""Metrics in the form of `evaluate`: compute(predictions, references) gives a dictionary; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score

from flipped_learning import flipping


def compute(predictions: Sequence[int] | np.ndarray, references: Sequence[int] | np.ndarray) -> dict[str, float]:
    """accuracy and macro_f1 (over the classes of the references), in percent."""
    labels = np.unique(np.asarray(references))
    return {
        "accuracy": 100 * float(accuracy_score(references, predictions)),
        "macro_f1": 100 * float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0)),
    }


def reliability(
    scores: Sequence[np.ndarray], references: Sequence[int] | np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of predictions by the probability of the chosen option, in ``bins`` of equal width over 0 … 1: mean probability,
    share that is right, and count [bins]; NaN in empty bins. Probabilities are softmax of the log-likelihoods."""
    chosen, _ = flipping.choose(scores)
    sure = np.array([p.max() for p in flipping.probabilities(scores)])
    right = chosen == np.asarray(references)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return (
            np.bincount(place, sure, bins) / count,
            np.bincount(place, right.astype(float), bins) / count,
            count,
        )


def calibration_error(scores: Sequence[np.ndarray], references: Sequence[int] | np.ndarray, bins: int = 10) -> float:
    """Expected calibration error in percent: Σ_bins (share of predictions) |mean probability − share right|."""
    sure, right, count = reliability(scores, references, bins)
    held = count > 0
    return 100 * float(np.abs(sure - right)[held] @ (count[held] / count.sum()))
