"""Metrics: by hand, against torchmetrics and scipy, and wrong input; every plot, with and without what it may lack."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from maml_align import metrics, plots
from metazoo.errors import UserError
from scipy import stats
from torchmetrics.functional.retrieval import retrieval_average_precision
from torchmetrics.retrieval import RetrievalMAP, RetrievalMRR, RetrievalRecall


def ranked(*hits: int) -> tuple[np.ndarray, np.ndarray]:
    """One query whose candidates come in order, relevant where ``hits`` is 1."""
    return np.linspace(1, -1, len(hits))[None], np.array([hits], dtype=bool)


def drawn(seed: int, queries: int = 12, count: int = 30, share: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """Similarities in (0, 1), all different, and which are relevant: one or more of each query."""
    rng = np.random.default_rng(seed)
    relevant = rng.random((queries, count)) < share
    relevant[np.arange(queries), rng.integers(count, size=queries)] = True
    return rng.permuted(np.tile((np.arange(count) + 0.5) / count, (queries, 1)), axis=1), relevant


# ---- retrieval


@pytest.mark.parametrize(
    ("hits", "k", "ap", "reciprocal_rank", "recall"),
    [
        ((1, 0, 0, 0), 4, 1, 1, 1),
        ((0, 0, 1, 0), 4, 1 / 3, 1 / 3, 1),
        ((0, 0, 1, 0), 2, 0, 0, 0),
        ((1, 1, 1, 0), 4, 1, 1, 1),
        ((1, 1, 1, 0), 2, 1, 1, 2 / 3),  # divided by k: as good as k candidates can be
        ((1, 0, 1, 0), 3, (1 + 2 / 3) / 2, 1, 1),
        ((0, 1, 0, 1), 2, (1 / 2) / 2, 1 / 2, 1 / 2),
        ((0, 1, 1, 1), 4, (1 / 2 + 2 / 3 + 3 / 4) / 3, 1 / 2, 1),
    ],
)
def test_retrieval_by_hand(hits: tuple[int, ...], k: int, ap: float, reciprocal_rank: float, recall: float) -> None:
    found = metrics.retrieval(*ranked(*hits), k)
    assert {name: of.shape for name, of in found.items()} == dict.fromkeys(["ap", "reciprocal_rank", "recall"], (1,))
    assert [found[name][0] for name in ("ap", "reciprocal_rank", "recall")] == pytest.approx(
        [ap, reciprocal_rank, recall]
    )


@pytest.mark.parametrize("rank", [1, 2, 7, 20])
def test_of_one_relevant_ap_is_one_over_its_rank(rank: int) -> None:
    hits = [int(place == rank) for place in range(1, 41)]
    found = metrics.retrieval(*ranked(*hits), 20)
    assert found["ap"][0] == found["reciprocal_rank"][0] == pytest.approx(1 / rank)


def test_chance_of_one_relevant_among_n_is_the_harmonic_number_over_n() -> None:
    """Every rank once is the mean over random rankings: AP@20 is H_20 / N, recall 20 / N."""
    count = 50
    similarity = np.tile(np.linspace(1, 0, count), (count, 1))
    found = metrics.compute_retrieval(similarity, np.eye(count, dtype=bool), 20)
    harmonic = sum(1 / rank for rank in range(1, 21))
    assert found == pytest.approx({"map": 100 * harmonic / count, "mrr": 100 * harmonic / count, "recall": 40})


@pytest.mark.parametrize("k", [1, 5, 20, 30])
@pytest.mark.parametrize("seed", range(3))
def test_means_are_those_of_torchmetrics(k: int, seed: int) -> None:
    similarity, relevant = drawn(seed)
    queries = np.repeat(np.arange(len(relevant)), relevant.shape[1])
    given_ = torch.tensor(similarity.ravel()), torch.tensor(relevant.ravel()), torch.tensor(queries)
    found = metrics.compute_retrieval(similarity, relevant, k)
    assert found["mrr"] / 100 == pytest.approx(float(RetrievalMRR(top_k=k)(given_[0], given_[1], indexes=given_[2])))
    assert found["recall"] / 100 == pytest.approx(
        float(RetrievalRecall(top_k=k)(given_[0], given_[1], indexes=given_[2]))
    )
    one = np.zeros_like(relevant)
    one[np.arange(len(one)), relevant.argmax(1)] = True
    expected = RetrievalMAP(top_k=k)(given_[0], torch.tensor(one.ravel()), indexes=given_[2])
    assert metrics.compute_retrieval(similarity, one, k)["map"] / 100 == pytest.approx(float(expected))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 30), share=st.floats(0, 0.9))
def test_ap_is_torchmetrics_by_another_divisor(seed: int, k: int, share: float) -> None:
    """theirs × hits within k = ours × min(#relevant, k)."""
    similarity, relevant = drawn(seed, queries=3, share=share)
    found = metrics.retrieval(similarity, relevant, k)["ap"]
    for row, right, ap in zip(similarity, relevant, found, strict=True):
        theirs = float(retrieval_average_precision(torch.tensor(row), torch.tensor(right), top_k=k))
        hits = right[np.argsort(-row)[:k]].sum()
        assert ap * min(right.sum(), k) == pytest.approx(theirs * hits, abs=1e-5)
    every = metrics.retrieval(similarity, relevant, similarity.shape[1])["ap"]
    theirs = [
        float(retrieval_average_precision(torch.tensor(row), torch.tensor(right)))
        for row, right in zip(similarity, relevant, strict=True)
    ]
    assert every == pytest.approx(theirs, abs=1e-5)


def test_similarities_below_zero_count_too() -> None:
    similarity, relevant = drawn(0)
    shifted = metrics.compute_retrieval(similarity - 2, relevant, 10)
    assert shifted == pytest.approx(metrics.compute_retrieval(similarity, relevant, 10))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), count=st.integers(1, 12), k=st.integers(1, 14))
def test_top_is_a_stable_sort(data: st.DataObject, count: int, k: int) -> None:
    """Ties, also those at the k-th place, go to the candidate of the lower number."""
    values = data.draw(st.lists(st.lists(st.integers(-2, 2), min_size=count, max_size=count), min_size=1, max_size=4))
    similarity = np.array(values, dtype=np.float32)
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    assert metrics.top(similarity, k).tolist() == expected.tolist()


def test_ties_by_number() -> None:
    relevant = np.array([[False, True, False, False]])
    assert metrics.retrieval(np.zeros((1, 4)), relevant, 3)["ap"].tolist() == [0.5]
    assert metrics.top(np.array([[0.0, 1, 0, 1, 0]]), 3).tolist() == [[1, 3, 0]]


def test_wrong_input_of_retrieval() -> None:
    similarity, relevant = drawn(0, queries=4, count=6)
    none = relevant.copy()
    none[2] = False
    with pytest.raises(UserError, match="query 2 has no relevant candidate"):
        metrics.retrieval(similarity, none, 3)
    for k in (0, 7):
        with pytest.raises(UserError, match=f"k is {k}, but the pool has 6"):
            metrics.retrieval(similarity, relevant, k)
    with pytest.raises(UserError, match="NaN"):
        metrics.retrieval(np.where(similarity > 0.9, np.nan, similarity), relevant, 3)
    with pytest.raises(UserError, match=r"\(4, 6\), but relevant \(4, 5\)"):
        metrics.retrieval(similarity, relevant[:, :5], 3)


# ---- correlations


def test_correlations_by_hand() -> None:
    line = np.arange(5.0)
    assert metrics.pearson_spearman(2 * line - 7, line) == pytest.approx({"pearson": 100, "spearman": 100})
    assert metrics.pearson_spearman(-line, line) == pytest.approx({"pearson": -100, "spearman": -100})
    # Σ(x−x̄)(y−ȳ) = 1·1 + 0 + 1·0 … of (0, 1, 2) and (0, 2, 1): 1 / √(2 · 2)
    assert metrics.pearson_spearman(np.array([0.0, 2, 1]), line[:3]) == pytest.approx({"pearson": 50, "spearman": 50})
    assert metrics.pearson_spearman(np.exp(line), line)["spearman"] == pytest.approx(100)


def test_correlations_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(6, size=80).astype(float)  # with ties
    predicted = (scores + rng.normal(size=80)).astype(np.float32)
    found = metrics.pearson_spearman(predicted, scores)
    assert found["pearson"] == pytest.approx(100 * np.corrcoef(predicted, scores)[0, 1])
    ranks = stats.rankdata(predicted), stats.rankdata(scores)
    assert found["spearman"] == pytest.approx(100 * np.corrcoef(*ranks)[0, 1])


def test_a_constant_correlates_with_nothing() -> None:
    """No warning either: warnings are errors here."""
    for predicted, scores in ((np.ones(9), np.arange(9.0)), (np.arange(9.0), np.ones(9))):
        assert metrics.pearson_spearman(predicted, scores) == {"pearson": 0, "spearman": 0}


def test_wrong_input_of_correlations() -> None:
    with pytest.raises(UserError, match="correlation of 1 pairs"):
        metrics.pearson_spearman(np.ones(1), np.ones(1))
    with pytest.raises(UserError, match="not finite"):
        metrics.pearson_spearman(np.array([0, np.nan, 1]), np.arange(3.0))


# ---- languages


@pytest.mark.parametrize("names", [np.array([0, 1, 2]), np.array(["de", "en", "tr"])])
def test_share_of_the_same_language(names: np.ndarray) -> None:
    candidates = names[[0, 0, 1, 1, 1, 1]]
    queries = names[[0, 1, 2]]
    order = np.array([[0, 1], [1, 2], [3, 4]])
    assert metrics.same_language_share(order, queries, candidates) == pytest.approx(100 * (2 + 1 + 0) / 6)
    assert metrics.same_language_chance(queries, candidates) == pytest.approx(100 * (2 / 6 + 4 / 6 + 0) / 3)


def test_share_without_bias_is_chance() -> None:
    """Whole pool found, or candidates in random order."""
    rng = np.random.default_rng(0)
    queries, candidates = rng.integers(4, size=300), rng.integers(4, size=100)
    chance = metrics.same_language_chance(queries, candidates)
    whole = np.tile(np.arange(100), (300, 1))
    assert metrics.same_language_share(whole, queries, candidates) == pytest.approx(chance)
    some = rng.permuted(whole, axis=1)[:, :20]
    assert metrics.same_language_share(some, queries, candidates) == pytest.approx(chance, abs=2.5)


def test_importing_is_cheap() -> None:
    code = "import sys, maml_align.metrics, maml_align.search; print({'torch', 'scipy', 'faiss'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# ---- plots


def written(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"teacher_query_loss": 0.5, "student_query_loss": 0.6, "student_support_loss": 0.7, "kd_share": 3.0},
        {"kd_share": 0.0, "distance": 0.1, "validation_loss": 1.0},
    ],
)
def test_training_is_drawn_with_what_there_is(row: dict[str, float], tmp_path: Path) -> None:
    """Also where only the later rows have it, as after --teacher-steps."""
    rows: list[dict[str, Any]] = [{"step": step, "loss": 1 / (1 + step), **(row if step else {})} for step in range(4)]
    for number, some in enumerate((rows, rows[1:2], rows[:0])):
        plots.training(some, tmp_path / "new" / f"{number}.png")
        assert written(tmp_path / "new" / f"{number}.png")


@pytest.mark.parametrize("values", [[[1.0, np.nan], [30, 99.9]], [[np.nan, np.nan], [np.nan, np.nan]]])
def test_language_matrix_is_drawn(values: list[list[float]], tmp_path: Path) -> None:
    path = tmp_path / "languages.png"
    plots.language_matrix(
        np.array(values), ["de", "tr"], ["de", "tr"], path, title="by language", label="mAP ×100", unseen={"tr"}
    )
    assert written(path)


def test_comparison_is_drawn(tmp_path: Path) -> None:
    trained = {"mono seen": 60.0, "cross seen": 50.0}
    for number, groups in enumerate(({"trained": trained, "zero-shot": {"mono seen": 40.0, "map": -1.0}}, {})):
        plots.comparison(groups, tmp_path / f"{number}.png", "mAP ×100")
        assert written(tmp_path / f"{number}.png")


def test_arms_are_drawn(tmp_path: Path) -> None:
    for number, values in enumerate(({"maml-align": [1.0, 2, 3], "zero-shot": [1.0], "s-maml": []}, {})):
        plots.by_arm(values, tmp_path / f"{number}.png", "mAP ×100")
        assert written(tmp_path / f"{number}.png")


@pytest.mark.parametrize("labels", [["mAP ×100", "share [%]"], {"kd_share": "share [%]"}])
def test_dose_is_drawn(labels: Any, tmp_path: Path) -> None:
    curves = {"map": [[40.0, 41], [42.0], []], "kd_share": [[0.0, 0], [1.0, 2], [20.0]]}
    plots.dose([0, 1, 0.1], curves, tmp_path / "dose.png", "λ", labels)
    assert written(tmp_path / "dose.png")
    plots.dose([0], {"map": [[40.0]]}, tmp_path / "one.png", "λ", labels)
    assert written(tmp_path / "one.png")
