"""Nearest neighbours of unit vectors: exact, or by faiss; and the negatives and similar questions found with it."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import numpy as np
from metazoo.errors import UserError

Kind = Literal["exact", "faiss", "hnsw"]
BLOCK = 2**25  # similarities held at a time


class Index:
    """An index of unit vectors [N, d]; the nearest are those of the greatest cosine.

    Args:
        vectors: [N, d] float32.
        kind: exact; faiss (inverted lists, from 10,000 vectors on, of which an eighth is looked at); hnsw (faiss's
            graph). Both of faiss are approximate.

    Raises:
        UserError: no vectors, or faiss is not installed.
    """

    def __init__(self, vectors: np.ndarray, kind: Kind = "exact") -> None:
        if vectors.ndim != 2 or not len(vectors):
            raise UserError(f"an index of vectors of shape {vectors.shape}: give [N, d] with N of 1 or more")
        self.vectors, self.kind = np.ascontiguousarray(vectors, dtype=np.float32), kind
        self._index: Any = None
        if kind != "exact":
            self._index = self._faiss()

    def _faiss(self) -> Any:
        if importlib.util.find_spec("faiss") is None:
            raise UserError(f"--index {self.kind}: faiss is not installed: add the extra [faiss]")
        import faiss

        count, width = self.vectors.shape
        if self.kind == "hnsw":
            index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
            index.hnsw.efConstruction, index.hnsw.efSearch = 80, 128
        elif count < 10_000:
            index = faiss.IndexFlatIP(width)
        else:
            lists = int(4 * count**0.5)
            index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
            index.nprobe = max(8, lists // 8)
            index.train(self.vectors[np.random.default_rng(0).permutation(count)[: 64 * lists]])
        index.add(self.vectors)
        return index

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [Q, k] and numbers [Q, k] of the k nearest to each of the queries [Q, d], best first.

        Raises:
            UserError: k is larger than the index, or the queries are of another width.
        """
        count, width = self.vectors.shape
        if not 1 <= k <= count:
            raise UserError(f"k is {k}, but there are {count} sentences: give 1 to {count}")
        if queries.ndim != 2 or queries.shape[1] != width:
            raise UserError(f"queries of shape {queries.shape} in an index of width {width}: encode both with one model")
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        if self._index is not None:
            scores, found = self._index.search(queries, k)
            return scores, found.astype(np.int64)
        step = max(1, BLOCK // count)
        blocks = [_nearest(queries[i : i + step] @ self.vectors.T, k) for i in range(0, len(queries), step)]
        return np.concatenate([one for one, _ in blocks]), np.concatenate([one for _, one in blocks])


def _nearest(cosines: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k greatest of each row, best first, ties by number."""
    if k < cosines.shape[1]:
        least = -np.partition(-cosines, k - 1, axis=1)[:, k - 1 : k]
        few = [np.flatnonzero(row >= cut) for row, cut in zip(cosines, least[:, 0], strict=True)]
    else:
        few = [np.arange(cosines.shape[1])] * len(cosines)
    found = np.stack([one[np.argsort(-row[one], kind="stable")[:k]] for row, one in zip(cosines, few, strict=True)])
    return np.take_along_axis(cosines, found, axis=1), found


def hard_negatives(
    questions: np.ndarray, candidates: np.ndarray, answers: np.ndarray, kind: str, margin: float = 0.2, most: int = 50
) -> list[np.ndarray]:
    """Candidates that may be negatives of each question, by Euclidean distance d of unit vectors.

    Args:
        questions: [Q, d]. candidates: [N, d]. answers: the right candidate of each question [Q], -1: none.
        kind: hard: d(n) < d(answer); semi-hard: d(answer) ≤ d(n) ≤ d(answer) + margin; easy: d(n) > d(answer) +
            margin. Where there are none, the nearest (farthest, of easy) that are not the answer.
        margin: see there. most: keep so many of the nearest, of hard and semi-hard.

    Returns:
        Numbers of candidates, of each question one or more. A question without an answer gets all.
    """
    if kind not in ("easy", "semi-hard", "hard"):
        raise UserError(f"negative sampling {kind!r}: one of easy, semi-hard, hard")
    found = []
    distances = np.sqrt(np.maximum(2 - 2 * questions @ candidates.T, 0))
    for row, answer in zip(distances, answers, strict=True):
        order = np.argsort(row, kind="stable")
        if answer < 0:
            found.append(order)
            continue
        order = order[order != answer]
        near = row[answer]
        if kind == "hard":
            kept = order[row[order] < near][:most]
        elif kind == "semi-hard":
            kept = order[(row[order] >= near) & (row[order] <= near + margin)][:most]
        else:
            kept = order[row[order] > near + margin]
        if not len(kept):
            kept = order[-1:] if kind == "easy" else order[:1]
        found.append(kept)
    return found
