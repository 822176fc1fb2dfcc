"""Nearest neighbours of unit vectors: exact or by faiss; negatives and similar questions found with it."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any, Literal, get_args

import numpy as np
from metazoo.errors import UserError

from maml_align.metrics import top

Kind = Literal["exact", "faiss", "hnsw"]
BLOCK = 2**23  # similarities held at a time: 32 MB, and a few times that while they are sorted
DEPTH = 1_000  # nearest candidates that negatives are looked for among, where the index is not exact


class Index:
    """An index of unit vectors [N, d]; the nearest are those of the greatest cosine.

    Args:
        vectors: [N, d] float32.
        kind: exact; faiss (all compared below 10,000 vectors; from there on inverted lists, an eighth of which is
            looked at); hnsw (faiss's graph). The last two are approximate, and the same each time.

    Raises:
        UserError: no vectors, one that is not finite, another kind, or a library that is not installed.
    """

    def __init__(self, vectors: np.ndarray, kind: Kind = "exact") -> None:
        if kind not in get_args(Kind):
            raise UserError(f"index {kind!r}: one of {', '.join(get_args(Kind))}")
        if vectors.ndim != 2 or not vectors.size:
            raise UserError(f"an index of vectors of shape {vectors.shape}: give [N, d] with N of 1 or more")
        self.vectors, self.kind = np.ascontiguousarray(vectors, dtype=np.float32), kind
        _finite(self.vectors)
        self._index: Any = None if kind == "exact" else _faiss(self.vectors, kind)

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Cosines [Q, k] float32 and numbers [Q, k] int64 of the k nearest to each of the queries [Q, d], best first.

        Raises:
            UserError: k is larger than the index, or the queries are of another width, or not finite.
        """
        count, width = self.vectors.shape
        if not 1 <= k <= count:
            raise UserError(f"k is {k}, but there are {count} sentences: give 1 to {count}")
        if queries.ndim != 2 or queries.shape[1] != width:
            raise UserError(
                f"queries of shape {queries.shape} in an index of width {width}: encode both with one model"
            )
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        _finite(queries)
        if self._index is not None:
            if self.kind == "hnsw":
                self._index.hnsw.efSearch = max(128, 2 * k)
            scores, found = self._index.search(queries, k)
            short = (found < 0).any(1)  # what was looked at holds fewer than k
            if short.any():
                scores[short], found[short] = self._exact(queries[short], k)
            return scores, found.astype(np.int64)
        return self._exact(queries, k)

    def _exact(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.empty((len(queries), k), dtype=np.float32)
        found = np.empty((len(queries), k), dtype=np.int64)
        for rows, cosines in _blocks(queries, self.vectors):
            found[rows] = top(cosines, k)
            scores[rows] = np.take_along_axis(cosines, found[rows], axis=1)
        return scores, found


def _blocks(queries: np.ndarray, vectors: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Rows of the queries, and their cosines with all vectors, at most BLOCK at a time."""
    step = max(1, BLOCK // len(vectors))
    for start in range(0, len(queries), step):
        rows = slice(start, start + step)
        yield rows, queries[rows] @ vectors.T


def _finite(vectors: np.ndarray) -> None:
    if not np.isfinite(vectors).all():
        raise UserError("a vector is not finite: the encoder's weights are not; train with a lower rate")


def _faiss(vectors: np.ndarray, kind: Kind) -> Any:
    try:
        faiss = importlib.import_module("faiss")
    except ImportError as error:
        raise UserError(f"index {kind}: faiss is not installed: add the extra [faiss]") from error
    count, width = vectors.shape
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = 80
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(1)  # the order of insertion decides on the graph
        try:
            index.add(vectors)
        finally:
            faiss.omp_set_num_threads(threads)
        return index
    index = faiss.IndexFlatIP(width)
    if count >= 10_000:
        lists = min(int(4 * count**0.5), count // 39)  # faiss wants 39 vectors or more for each
        index = faiss.IndexIVFFlat(index, width, lists, faiss.METRIC_INNER_PRODUCT)
        index.nprobe = lists // 8
        index.train(vectors[np.random.default_rng(0).permutation(count)[: 64 * lists]])
    index.add(vectors)
    return index


def hard_negatives(
    questions: np.ndarray, candidates: np.ndarray, answers: np.ndarray, kind: str, margin: float = 0.2, most: int = 50,
    index: Kind = "exact",
) -> list[np.ndarray]:  # fmt: skip
    """Candidates that may be negatives of each question, by the distance d = √(2 − 2 cos) of unit vectors.

    Args:
        questions: [Q, d]. candidates: [N, d]. answers: the right candidate of each question [Q], -1: none.
        kind: random: all but the answer; hard: d(n) < d(answer); semi-hard: d(answer) ≤ d(n) ≤ d(answer) + margin;
            easy: d(n) > d(answer) + margin. Where there are none, the nearest (of easy: the farthest) that is not the
            answer.
        margin: see there. most: keep so many of the nearest, of hard and semi-hard.
        index: other than exact, only the 1,000 nearest that it finds are looked at, but for easy.

    Returns:
        Numbers of candidates, one or more for each question, the nearest first. A question without an answer gets all.

    Raises:
        UserError: another kind, an answer that is no candidate, no candidate but the answer, or a vector not finite.
    """
    if kind not in ("random", "easy", "semi-hard", "hard"):
        raise UserError(f"negative sampling {kind!r}: one of random, easy, semi-hard, hard")
    count = len(candidates)
    if len(answers) and not -1 <= answers.min() <= answers.max() < count:
        raise UserError(f"answers {answers.min()} to {answers.max()} of {count} candidates: give -1 to {count - 1}")
    if count < 2:
        raise UserError(f"{count} candidates: give two or more, an answer and a negative")
    _finite(questions)
    _finite(candidates)
    found = []
    for answer, pool, cosines, right in _compared(questions, candidates, answers, "exact" if kind == "easy" else index):
        order = np.argsort(-cosines, kind="stable")
        order = order[pool[order] != answer]
        pool, distances = pool[order], _distance(cosines[order])
        bound = _distance(right)
        if answer < 0 or kind == "random":
            kept = pool
        elif kind == "hard":
            kept = pool[distances < bound][:most]
        elif kind == "semi-hard":
            kept = pool[(distances >= bound) & (distances <= bound + margin)][:most]
        else:
            kept = pool[distances > bound + margin]
        if not len(kept):
            kept = pool[-1:] if kind == "easy" else pool[:1]
        found.append(kept)
    return found


def _compared(
    questions: np.ndarray, candidates: np.ndarray, answers: np.ndarray, index: Kind
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """Of each question: its answer, the candidates looked at [P], their cosines [P], and the answer's []."""
    if index == "exact":
        every = np.arange(len(candidates))
        for rows, cosines in _blocks(questions, candidates):
            for answer, row in zip(answers[rows], cosines, strict=True):
                yield answer, every, row, row[answer]
        return
    near = Index(candidates, index).search(questions, min(len(candidates), DEPTH))[1]
    for question, answer, few in zip(questions, answers, near, strict=True):
        yield answer, few, candidates[few] @ question, candidates[answer] @ question


def _distance(cosines: np.ndarray) -> np.ndarray:
    """Euclidean distance of unit vectors."""
    return np.asarray(np.sqrt(np.maximum(2 - 2 * cosines, 0)))


def neighbours(questions: np.ndarray, k: int) -> np.ndarray:
    """The k nearest others of each question by cosine, nearest first: [Q, d] -> [Q, k] int64.

    Raises:
        UserError: there are not k others.
    """
    count = len(questions)
    if not 1 <= k < count:
        raise UserError(f"k is {k}, but a question has {count - 1} others: give 1 to that many")
    found = Index(questions).search(questions, k + 1)[1]
    # a question itself is dropped; where its copies crowd it out, the last
    itself = found == np.arange(count)[:, None]
    itself[~itself.any(1), -1] = True
    return np.asarray(found[~itself].reshape(count, k))
