"""Metrics in the form of `evaluate`: compute(predictions, references) gives a dictionary; nothing is fetched."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score


def compute(predictions: Sequence[int] | np.ndarray, references: Sequence[int] | np.ndarray) -> dict[str, float]:
    """accuracy and macro_f1 (over the classes of the references), in percent."""
    labels = np.unique(np.asarray(references))
    return {
        "accuracy": 100 * float(accuracy_score(references, predictions)),
        "macro_f1": 100 * float(f1_score(references, predictions, labels=labels, average="macro", zero_division=0)),
    }


def reliability(
    probabilities: np.ndarray, references: Sequence[int] | np.ndarray, bins: int = 10
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of predictions by their probability, in ``bins`` of equal width over 0 … 1: mean probability, share that is
    right, and count [bins]; NaN in empty bins.

    Args:
        probabilities: of the classes, [N, C]. references: true classes [N].
    """
    sure = probabilities.max(1)
    right = probabilities.argmax(1) == np.asarray(references)
    place = np.minimum((sure * bins).astype(int), bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        return (
            np.bincount(place, sure, bins) / count,
            np.bincount(place, right.astype(float), bins) / count,
            count,
        )


def calibration_error(probabilities: np.ndarray, references: Sequence[int] | np.ndarray, bins: int = 10) -> float:
    """Expected calibration error in percent: Σ_bins (share of predictions) |mean probability − share right|."""
    sure, right, count = reliability(probabilities, references, bins)
    held = count > 0
    return 100 * float(np.abs(sure - right)[held] @ (count[held] / count.sum()))


def separation(weights: np.ndarray, right: np.ndarray) -> float:
    """Area under the ROC curve of the weights of right pseudo-labels against those of wrong ones: 0.5 is chance.

    Args:
        weights: of pseudo-labels, NaN where there is none, [N]. right: which are right, [N] of bool.

    Returns:
        NaN where all that have a weight are right, or all wrong.
    """
    held = ~np.isnan(weights)
    if len(np.unique(right[held])) < 2:
        return float("nan")
    return float(roc_auc_score(right[held], weights[held]))
