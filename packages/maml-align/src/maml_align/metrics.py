"""Metrics in the form of `evaluate`: computed here, vectorised; tests hold them to torchmetrics and scipy."""

from __future__ import annotations

import warnings

import numpy as np
from metazoo.errors import UserError


def pearson_spearman(predicted: np.ndarray, scores: np.ndarray) -> dict[str, float]:
    """Correlations ×100 of predictions [N] and scores [N]; 0 where one of them is constant.

    Raises:
        UserError: fewer than two pairs, or a value that is not finite.
    """
    from scipy import stats

    if len(predicted) < 2:
        raise UserError(f"a correlation of {len(predicted)} pairs: give two or more")
    if not (np.isfinite(predicted).all() and np.isfinite(scores).all()):
        raise UserError("a prediction or score is not finite: train with a lower rate, or mend the scores")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.ConstantInputWarning)
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        found = {
            "pearson": float(stats.pearsonr(predicted, scores).statistic),
            "spearman": float(stats.spearmanr(predicted, scores).statistic),
        }
    return {name: 100 * value if np.isfinite(value) else 0.0 for name, value in found.items()}


def top(similarity: np.ndarray, k: int) -> np.ndarray:
    """Candidates of the k greatest similarities of each row, best first, ties by number: [Q, N] -> [Q, min(k, N)].

    Similarities are no NaN.
    """
    count = similarity.shape[1]
    if k >= count:
        return np.argsort(-similarity, axis=1, kind="stable")
    # the k-th greatest: all above it are in, and of those equal to it the first
    cut = np.partition(similarity, count - k, axis=1)[:, count - k, None]
    held = similarity >= cut
    tied = np.flatnonzero(held.sum(1) > k)
    if len(tied):
        above, equal = similarity[tied] > cut[tied], similarity[tied] == cut[tied]
        held[tied] = above | (equal & (equal.cumsum(1) <= k - above.sum(1, keepdims=True)))
    chosen = np.nonzero(held)[1].reshape(-1, k)
    order = np.argsort(-np.take_along_axis(similarity, chosen, axis=1), axis=1, kind="stable")
    return np.take_along_axis(chosen, order, axis=1)


def retrieval(similarity: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, np.ndarray]:
    """Of each query: ap (AP@k), reciprocal_rank (0 beyond k), recall (share of the relevant within k), [Q] each.

    AP@k is Σ_{r ≤ k, hit at r} precision@r / min(#relevant, k). torchmetrics' RetrievalMAP(top_k=k) divides by the
    number of hits within k instead, so that a relevant candidate beyond k costs nothing; the two agree where at most
    one is relevant, or all are within k. torchmetrics also takes candidates of a similarity ≤ 0 as never relevant.

    Args:
        similarity: of queries and candidates, [Q, N]. relevant: which candidates answer, [Q, N] of bool.
        k: candidates that a search returns.

    Raises:
        UserError: shapes differ, a query has no relevant candidate, k is below 1 or larger than the pool, or a
            similarity is NaN.
    """
    if similarity.shape != relevant.shape:
        raise UserError(f"similarities {similarity.shape}, but relevant {relevant.shape}: give [Q, N] for both")
    if not 1 <= k <= similarity.shape[1]:
        raise UserError(f"k is {k}, but the pool has {similarity.shape[1]} candidates: give 1 to that many")
    if np.isnan(similarity).any():
        raise UserError("a similarity is NaN: the encoder's weights are not finite; train with a lower rate")
    count = relevant.sum(1)
    if (count == 0).any():
        raise UserError(f"query {int(np.argmin(count))} has no relevant candidate: leave it out")
    hits = np.take_along_axis(relevant, top(similarity, k), axis=1)
    precision = np.cumsum(hits, axis=1) / np.arange(1, k + 1)
    return {
        "ap": (precision * hits).sum(1) / np.minimum(count, k),
        "reciprocal_rank": np.where(hits.any(1), 1 / (1 + hits.argmax(1)), 0.0),
        "recall": hits.sum(1) / count,
    }


def compute_retrieval(similarity: np.ndarray, relevant: np.ndarray, k: int) -> dict[str, float]:
    """map, mrr and recall: means of :func:`retrieval` over one query or more, ×100."""
    found = retrieval(similarity, relevant, k)
    return {
        "map": 100 * float(found["ap"].mean()),
        "mrr": 100 * float(found["reciprocal_rank"].mean()),
        "recall": 100 * float(found["recall"].mean()),
    }


def same_language_share(order: np.ndarray, query_language: np.ndarray, candidate_language: np.ndarray) -> float:
    """Percent of the candidates found that are in the query's language.

    Args:
        order: candidates found, [Q, k]. query_language: numbers or names, [Q]. candidate_language: of all, [N].
    """
    return 100 * float((candidate_language[order] == query_language[:, None]).mean())


def same_language_chance(query_language: np.ndarray, candidate_language: np.ndarray) -> float:
    """What :func:`same_language_share` is where language plays no part, in percent."""
    names, counts = np.unique(candidate_language, return_counts=True)
    shares = dict(zip(names.tolist(), (counts / len(candidate_language)).tolist(), strict=True))
    return 100 * float(np.mean([shares.get(language, 0.0) for language in query_language.tolist()]))
