"""Other compressions: bits by formula, limits that lose nothing, what each leaves untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from metacluster import baselines as b
from metacluster.clustering import kmeans
from metacluster.config import Config
from metacluster.edges import MetaLearner
from metacluster.model import MLP
from metazoo.errors import UserError

V = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))


def test_configs() -> None:
    """direct changes the edges alone; the MLP has the bits it was given."""
    assert b.direct(Config()) == Config(edges="direct")
    config = b.mlp_of_equal_storage(Config(), 61_952, 196, 10)
    size = sum(p.numel() for p in MLP([196, *config.hidden, 10]).parameters())
    assert abs(32 * size - 61_952) <= 32 * 207 / 2


def test_scalar_clustering() -> None:
    """At most K values; bits E·W·⌈log₂ K⌉ + 32 K; as many as distinct numbers lose nothing."""
    found = b.scalar_clustering(V, 5)
    assert len(found.coefficients.unique()) <= 5
    assert found.bits == 540 * 3 + 160
    few = V.round()
    assert torch.equal(b.scalar_clustering(few, 16).coefficients, few)


def test_product_quantisation() -> None:
    """Bits by formula; one part is K-means; more parts are nearer; K = E loses nothing."""
    found = b.product_quantisation(V, 3, 8)
    assert found.bits == 3 * (60 * 3 + 32 * 8 * 3)
    whole = kmeans(V, 8)
    assert torch.equal(b.product_quantisation(V, 1, 8).coefficients, whole.codebook[whole.assignment])
    errors = [b.relative_error(V, b.product_quantisation(V, parts, 8).coefficients) for parts in (1, 3, 9)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(b.product_quantisation(V, 2, 60).coefficients, V)


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_uniform_quantisation(bits: int) -> None:
    """No number moves by more than half a step of its column; the largest stays; bits by formula."""
    found = b.uniform_quantisation(V, bits)
    step = V.abs().amax(0) / (2 ** (bits - 1) - 1)
    assert ((found.coefficients - V).abs() <= step / 2 + 1e-6).all()
    assert torch.allclose(found.coefficients.abs().amax(0), V.abs().amax(0))
    assert found.bits == 540 * bits + 288


def test_magnitude_pruning() -> None:
    """The largest tenth stays as it is, the rest is 0."""
    found = b.magnitude_pruning(V, 0.1)
    kept = found.coefficients != 0
    assert kept.sum() == 54
    assert torch.equal(found.coefficients[kept], V[kept])
    assert V[kept].abs().min() >= V[~kept].abs().max()
    assert found.bits == 32 * 54 + 540
    assert torch.equal(b.magnitude_pruning(V, 1.0).coefficients, V)


@pytest.mark.parametrize("method", [b.gaussian_mixture, b.agglomerative])
def test_other_clusterings(method: Any) -> None:
    """Planted clusters are found; every edge has its cluster's mean; bits as K-means'."""
    centres = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)) * 30
    labels = torch.arange(60) % 4
    vectors = centres[labels] + V * 0.1
    found = method(vectors, 4)
    means = torch.stack([vectors[labels == c].mean(0) for c in range(4)])
    assert torch.allclose(found.coefficients, means[labels], atol=1e-4)
    assert found.bits == 60 * 2 + 4 * 9 * 32


def test_agglomerative_of_a_sample() -> None:
    """Edges outside the draw go to the nearest centroid."""
    labels = torch.arange(60) % 3
    vectors = torch.eye(3)[labels] * 50 + torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    found = b.agglomerative(vectors, 3, most=12)
    assert b.relative_error(vectors, found.coefficients) < 0.01


def test_post_hoc_meta_learner() -> None:
    """Coefficients that came from a meta-learner are fitted by one; free ones are not; bits by formula."""
    torch.manual_seed(3)
    learner = MetaLearner(1, 4, 9)
    torch.nn.init.normal_(learner.hidden.weight)
    planted = learner(torch.randn(60, 1)).detach()
    found = b.post_hoc_meta_learner(planted, 1, 16, steps=500)
    assert b.relative_error(planted, found.coefficients) < 0.05
    assert b.relative_error(V, b.post_hoc_meta_learner(V, 1, 16, steps=100).coefficients) > 0.3
    assert found.bits == 32 * (60 + 16 * 2 + 16 * 9 + 9)
    again = b.post_hoc_meta_learner(planted, 1, 16, steps=500)
    assert torch.equal(found.coefficients, again.coefficients)


def test_relative_error() -> None:
    """1 for the mean alone, 0 for the vectors themselves; K-means' residual."""
    assert b.relative_error(V, V.mean(0).expand_as(V)) == pytest.approx(1.0)
    assert b.relative_error(V, V) == 0
    found = kmeans(V, 7)
    assert b.relative_error(V, found.codebook[found.assignment]) == pytest.approx(found.residual, rel=1e-4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: b.product_quantisation(V, 10, 2), "10 parts of vectors of 9"),
        (lambda: b.uniform_quantisation(V, 1), "1 bits"),
        (lambda: b.uniform_quantisation(V * float("nan"), 8), "not finite"),
        (lambda: b.magnitude_pruning(V, 0.0), "keep is 0"),
        (lambda: b.gaussian_mixture(V, 61), "61 clusters for 60"),
        (lambda: b.agglomerative(V, 0), "0 clusters"),
        (lambda: b.agglomerative(V, 20, most=10), "a draw of 10"),
        (lambda: b.scalar_clustering(V, 541), "541 clusters"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
