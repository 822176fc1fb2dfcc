"""Open-vocabulary scores: accuracy on classes trained on and on novel ones, and their harmonic mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from metazoo.errors import UserError


def harmonic_mean(a: float, b: float) -> float:
    """2ab / (a + b); 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


def accuracy(probabilities: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in % of probabilities [N, C] and labels [N].

    Raises:
        UserError: nothing to score.
    """
    if not len(labels):
        raise UserError("no clips to score")
    return 100 * float((probabilities.argmax(1) == labels).mean())


def by_class(probabilities: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    """Top-1 in % of each class that has clips."""
    right = probabilities.argmax(1) == labels
    return {
        name: 100 * float(right[labels == i].mean()) for i, name in enumerate(classes) if (labels == i).any()
    }  # fmt: skip


def summary(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores with harmonic means: of base and novel, and of in and out of context.

    Args:
        scores: base_in, base_out, novel_in, novel_out; or base, novel; or others, which are left alone.
    """
    found = dict(scores)
    pairs = (
        ("hm", "base", "novel"), ("hm_in", "base_in", "novel_in"), ("hm_out", "base_out", "novel_out"),
        ("base_hm", "base_in", "base_out"), ("novel_hm", "novel_in", "novel_out"),
    )  # fmt: skip
    for name, one, other in pairs:
        if one in scores and other in scores:
            found[name] = harmonic_mean(scores[one], scores[other])
    for kind in ("base", "novel"):
        if f"{kind}_in" in scores and f"{kind}_out" in scores:
            found[f"{kind}_drop"] = scores[f"{kind}_in"] - scores[f"{kind}_out"]
    return found


def interval(right: int, count: int) -> tuple[float, float]:
    """95 % interval of an accuracy, in %, after Wilson: of clips alone, not of seeds."""
    from scipy.stats import binomtest

    found = binomtest(right, count).proportion_ci(method="wilson")
    return 100 * found.low, 100 * found.high
