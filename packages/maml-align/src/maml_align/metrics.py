"""Metrics in the form of `evaluate`: computed here, vectorised; tests hold them to torchmetrics and scipy."""

from __future__ import annotations

import warnings

import numpy as np
from metazoo.errors import UserError


def pearson_spearman(predicted: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Correlations ×100 of predictions [N] and scores [N]; 0 where one of them is constant."""
    from scipy import stats

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        found = {
            "pearson": float(stats.pearsonr(predicted, scores).statistic),
            "spearman": float(stats.spearmanr(predicted, scores).statistic),
        }
    return {name: 100 * value if np.isfinite(value) else 0.0 for name, value in found.items()}


def top(similarity: np.ndarray, k: int) -> np.ndarray:
    """Candidates of the k greatest similarities of each row, best first, ties by number: [Q, N] -> [Q, k]."""
    return np.argsort(-similarity, axis=1, kind="stable")[:, :k]


def retrieval(similarity: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Of each query: ap (AP@k, divided by min(#relevant, k)), reciprocal_rank (0 beyond k), recall (at k), [Q] each.

    Args:
        similarity: of queries and candidates, [Q, N]. relevant: which candidates answer, [Q, N] of bool.
        k: candidates that a search returns.

    Raises:
        UserError: a query has no relevant candidate, k is larger than the pool, or a similarity is NaN.
    """
    if k > similarity.shape[1]:
        raise UserError(f"k is {k}, but the pool has {similarity.shape[1]} candidates: lower it")
    if np.isnan(similarity).any():
        raise UserError("a similarity is NaN: the encoder's weights are not finite; train with a lower rate")
    count = relevant.sum(1)
    if (count == 0).any():
        raise UserError(f"query {int(np.argmin(count))} has no relevant candidate: leave it out")
    hits = np.take_along_axis(relevant, top(similarity, k), axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, k + 1)
    first = np.where(hits.any(1), 1 / (1 + hits.argmax(1)), 0.0)
    return {
        "ap": (precision * hits).sum(1) / np.minimum(count, k),
        "reciprocal_rank": first,
        "recall": hits.sum(1) / count,
    }


def compute_retrieval(similarity: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, float]:
    """map, mrr and recall: means of :func:`retrieval` over queries, ×100."""
    found = retrieval(similarity, relevant, k)
    return {
        "map": 100 * float(found["ap"].mean()),
        "mrr": 100 * float(found["reciprocal_rank"].mean()),
        "recall": 100 * float(found["recall"].mean()),
    }


def same_language_share(order: np.ndarray, query_language: np.ndarray, candidate_language: np.ndarray) -> float:
    """Percent of the candidates found that are in the query's language.

    Args:
        order: candidates found, [Q, k]. query_language: [Q]. candidate_language: of all candidates, [N].
    """
    return 100 * float((candidate_language[order] == query_language[:, None]).mean())


def same_language_chance(query_language: np.ndarray, candidate_language: np.ndarray) -> float:
    """What :func:`same_language_share` is where language plays no part, in percent."""
    shares = np.bincount(candidate_language, minlength=int(query_language.max()) + 1) / len(candidate_language)
    return 100 * float(shares[query_language].mean())
