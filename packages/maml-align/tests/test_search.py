"""Search: every index against brute force; negatives by geometry made by hand; the nearest questions."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from maml_align import search
from maml_align.search import Index, hard_negatives, neighbours
from metazoo.errors import UserError


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def clustered(count: int, width: int = 16, seed: int = 0) -> np.ndarray:
    """Unit vectors around 40 centres, as sentences around their topics."""
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(40, width))
    return unit(centres[rng.integers(40, size=count)] + 0.4 * rng.normal(size=(count, width)))


def at(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane; the distance of two is 2 sin(angle / 2)."""
    angle = np.deg2rad(np.array(degrees))
    return np.stack([np.cos(angle), np.sin(angle)], axis=1).astype(np.float32)


def brute(vectors: np.ndarray, queries: np.ndarray, k: int) -> np.ndarray:
    return np.argsort(-(queries @ vectors.T), axis=1, kind="stable")[:, :k]


# ---- indices


@pytest.mark.parametrize("block", [1, 700, search.BLOCK])
def test_exact_is_brute_force_in_blocks_of_any_size(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "BLOCK", block)
    rng = np.random.default_rng(0)
    # numbers of few bits: products are exact, in whatever order a matrix product adds them
    vectors, queries = (rng.integers(-4, 5, size=(count, 8)).astype(np.float32) / 8 for count in (300, 7))
    for k in (1, 10, 300):
        scores, found = Index(vectors).search(queries, k)
        assert found.tolist() == brute(vectors, queries, k).tolist()
        assert (scores == np.take_along_axis(queries @ vectors.T, found, axis=1)).all()
        assert (scores.dtype, found.dtype) == (np.float32, np.int64)


@pytest.mark.parametrize(("kind", "count"), [("exact", 2_000), ("faiss", 2_000), ("faiss", 12_000), ("hnsw", 3_000)])
def test_indices_find_what_brute_force_finds(kind: Any, count: int, capfd: pytest.CaptureFixture[str]) -> None:
    vectors, queries = clustered(count), clustered(50, seed=1)
    scores, found = Index(vectors, kind).search(queries, 10)
    expected = brute(vectors, queries, 10)
    recall = np.mean([len(np.intersect1d(*rows)) / 10 for rows in zip(found, expected, strict=True)])
    assert recall >= (0.9 if kind == "hnsw" or count >= 10_000 else 1)
    assert scores == pytest.approx(np.take_along_axis(queries @ vectors.T, found, axis=1), abs=1e-5)
    assert (np.diff(scores, axis=1) <= 0).all()
    assert (scores.shape, found.shape, scores.dtype, found.dtype) == ((50, 10), (50, 10), np.float32, np.int64)
    again = Index(vectors, kind).search(queries, 10)[1]
    assert (again == found).all()
    assert capfd.readouterr().err == ""  # faiss warns of too few vectors for its lists


@pytest.mark.parametrize(("kind", "count"), [("exact", 5), ("faiss", 5), ("faiss", 10_000), ("hnsw", 5), ("hnsw", 600)])
def test_all_can_be_asked_for(kind: Any, count: int) -> None:
    """Also of an index that looks at a part, or whose graph does not reach all."""
    vectors = np.repeat(at(*range(5)), count // 5, axis=0)
    found = Index(vectors, kind).search(at(0.1, 3), count)[1]
    assert (np.sort(found, axis=1) == np.arange(count)).all()
    assert (found[0, : count // 5] < count // 5).all()


@pytest.mark.parametrize("kind", ["exact", "faiss", "hnsw"])
def test_an_index_of_one(kind: Any) -> None:
    scores, found = Index(at(0), kind).search(at(0, 60), 1)
    assert found.tolist() == [[0], [0]]
    assert scores == pytest.approx(np.array([[1], [0.5]]), abs=1e-6)


def test_wrong_input_of_an_index(monkeypatch: pytest.MonkeyPatch) -> None:
    index = Index(at(0, 10, 20))
    for k in (0, 4):
        with pytest.raises(UserError, match=f"k is {k}, but there are 3"):
            index.search(at(0), k)
    with pytest.raises(UserError, match="width 2"):
        index.search(np.ones((1, 3), dtype=np.float32), 1)
    with pytest.raises(UserError, match="not finite"):
        index.search(np.array([[np.nan, 1]]), 1)
    with pytest.raises(UserError, match="not finite"):
        Index(np.array([[np.inf, 1]]))
    with pytest.raises(UserError, match="give \\[N, d\\]"):
        Index(np.zeros((0, 4)))
    with pytest.raises(UserError, match="'annoy': one of exact, faiss, hnsw"):
        Index(at(0), "annoy")  # type: ignore[arg-type]
    for kind, library in (("faiss", "faiss"), ("hnsw", "faiss")):
        monkeypatch.setitem(sys.modules, library, None)
        with pytest.raises(UserError, match=r"not installed: add the extra \[faiss\]"):
            Index(at(0), kind)  # type: ignore[arg-type]


# ---- negatives

# the question at 0°, its answer (number 2) at 30°: distance 0.518; 0.2 farther is 0.718, at 42.1°
PLANE = at(20, 41, 30, -10, 35, 60, 43, -180, 15)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hard", [3, 8, 0]),
        ("semi-hard", [4, 1]),
        ("easy", [6, 5, 7]),
        ("random", [3, 8, 0, 4, 1, 6, 5, 7]),
    ],
)
def test_negatives_by_distance(kind: str, expected: list[int]) -> None:
    """Nearest first."""
    (found,) = hard_negatives(at(0), PLANE, np.array([2]), kind)
    assert found.tolist() == expected


def test_the_nearest_are_kept() -> None:
    for kind, expected in (("hard", [3, 8]), ("semi-hard", [4, 1]), ("easy", [6, 5, 7])):
        assert hard_negatives(at(0), PLANE, np.array([2]), kind, most=2)[0].tolist() == expected


def test_margin() -> None:
    """Distances: 43° 0.733, 60° 1, 180° 2. Within no margin there is none, so the nearest of all."""
    for margin, semi, easy in ((0.0, [3], [4, 1, 6, 5, 7]), (0.22, [4, 1, 6], [5, 7]), (2, [4, 1, 6, 5, 7], [7])):
        assert hard_negatives(at(0), PLANE, np.array([2]), "semi-hard", margin)[0].tolist() == semi
        assert hard_negatives(at(0), PLANE, np.array([2]), "easy", margin)[0].tolist() == easy


def test_where_none_is_allowed_the_nearest_or_farthest() -> None:
    """The answer nearest of all, then farthest of all, with nothing within the margin."""
    near, far = at(5, 90, 100), at(150, 20, 10)
    assert hard_negatives(at(0), near, np.array([0]), "hard")[0].tolist() == [1]
    assert hard_negatives(at(0), near, np.array([0]), "semi-hard")[0].tolist() == [1]
    assert hard_negatives(at(0), far, np.array([0]), "semi-hard")[0].tolist() == [2]
    assert hard_negatives(at(0), far, np.array([0]), "easy")[0].tolist() == [1]


def test_a_question_without_an_answer_gets_all() -> None:
    for kind in ("random", "easy", "semi-hard", "hard"):
        found = hard_negatives(at(0, 0), at(20, 10, 30), np.array([-1, 0]), kind)
        assert found[0].tolist() == [1, 0, 2]
        assert 0 not in found[1]


@pytest.mark.parametrize("kind", ["random", "easy", "semi-hard", "hard"])
def test_negatives_of_many_in_blocks(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each alone or all at once; never the answer; the three kinds share out the candidates."""
    questions, candidates = clustered(30, seed=1), clustered(200)
    answers = np.random.default_rng(0).integers(200, size=30)
    whole = hard_negatives(questions, candidates, answers, kind, most=200)
    monkeypatch.setattr(search, "BLOCK", 1)
    single = hard_negatives(questions, candidates, answers, kind, most=200)
    distance = np.linalg.norm(questions[:, None] - candidates, axis=2)
    for row, answer, found, again in zip(distance, answers, whole, single, strict=True):
        assert len(found)
        assert answer not in found
        assert (np.diff(row[found]) >= -1e-6).all()
        low, high = {
            "hard": (0, row[answer]), "semi-hard": (row[answer], row[answer] + 0.2), "easy": (row[answer] + 0.2, 2),
            "random": (0, 2),
        }[kind]  # fmt: skip
        inside = (row >= low - 1e-5) & (row <= high + 1e-5)
        assert len(found) == 1 or inside[found].all()
        strictly = (row > low + 1e-5) & (row < high - 1e-5)
        strictly[answer] = False
        assert set(np.flatnonzero(strictly)) <= set(found.tolist())
        assert set(found.tolist()) == set(again.tolist())


@pytest.mark.parametrize("index", ["faiss", "hnsw"])
@pytest.mark.parametrize("kind", ["random", "easy", "semi-hard", "hard"])
def test_negatives_by_another_index(kind: str, index: Any) -> None:
    questions, candidates, answers = clustered(20, seed=1), clustered(300), np.arange(20)
    exact = hard_negatives(questions, candidates, answers, kind)
    found = hard_negatives(questions, candidates, answers, kind, index=index)
    assert np.mean([set(a.tolist()) == set(b.tolist()) for a, b in zip(exact, found, strict=True)]) >= 0.9


def test_an_index_limits_what_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Far answers: the nearest of those looked at; easy looks at all."""
    monkeypatch.setattr(search, "DEPTH", 3)
    answers = np.array([2])
    assert hard_negatives(at(0), PLANE, answers, "hard", index="faiss")[0].tolist() == [3, 8, 0]
    assert hard_negatives(at(0), PLANE, answers, "semi-hard", index="faiss")[0].tolist() == [3]
    assert hard_negatives(at(0), PLANE, answers, "random", index="faiss")[0].tolist() == [3, 8, 0]
    assert hard_negatives(at(0), PLANE, answers, "easy", index="faiss")[0].tolist() == [6, 5, 7]


def test_wrong_input_of_negatives() -> None:
    with pytest.raises(UserError, match="'tough': one of random, easy, semi-hard, hard"):
        hard_negatives(at(0), PLANE, np.array([2]), "tough")
    for answer in (-2, 9):
        with pytest.raises(UserError, match="of 9 candidates: give -1 to 8"):
            hard_negatives(at(0), PLANE, np.array([answer]), "hard")
    with pytest.raises(UserError, match="1 candidates: give two or more"):
        hard_negatives(at(0), at(0), np.array([0]), "hard")
    with pytest.raises(UserError, match="not finite"):
        hard_negatives(at(np.nan), PLANE, np.array([2]), "hard")


# ---- neighbours


def test_neighbours_by_hand() -> None:
    assert neighbours(at(0, 10, 25, 100), 2).tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]


def test_copies_are_neighbours_but_never_itself() -> None:
    """Of five copies, the last are crowded out of their own nearest."""
    found = neighbours(at(0, 0, 0, 0, 0, 50), 2)
    assert found.shape == (6, 2)
    assert all(i not in row for i, row in enumerate(found.tolist()))
    assert (found[:5] < 5).all()


def test_wrong_input_of_neighbours() -> None:
    for k in (0, 3):
        with pytest.raises(UserError, match=f"k is {k}, but a question has 2 others"):
            neighbours(at(0, 10, 20), k)
