"""Other compressions: bits by formula, limits that lose nothing, what each leaves untouched."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from metacluster import baselines as b
from metacluster.bits import bits_for
from metacluster.clustering import kmeans
from metacluster.config import Config
from metacluster.edges import MetaLearner
from metacluster.model import MLP
from metazoo.errors import UserError

V = torch.randn(60, 9, generator=torch.Generator().manual_seed(0))


def relative_error(vectors: torch.Tensor, reconstructed: torch.Tensor) -> float:
    """Squared error / total variance about the mean, as K-means' residual."""
    vectors = vectors.double()
    return float((vectors - reconstructed).square().sum() / (vectors - vectors.mean(0)).square().sum())


METHODS: dict[str, Any] = {
    "scalar clustering, K=5": lambda v: b.scalar_clustering(v, 5, seed=1),
    "product quantisation, 2 parts, K=8": lambda v: b.product_quantisation(v, 2, 8, seed=1),
    "int4": lambda v: b.uniform_quantisation(v, 4),
    "pruned to 0.3": lambda v: b.magnitude_pruning(v, 0.3),
    "Gaussian mixture, K=6": lambda v: b.gaussian_mixture(v, 6, seed=1),
    "agglomerative (Ward), K=6": lambda v: b.agglomerative(v, 6),
    "post-hoc meta-learner, d_emb=2": lambda v: b.post_hoc_meta_learner(v, 2, 8, seed=1, steps=30),
}


def test_import_is_light() -> None:
    """claims.py imports this module for its configs: that must not load torch or scikit-learn."""
    code = "import sys, metacluster.baselines; print([m for m in ('torch', 'sklearn') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_configs() -> None:
    """direct changes the edges alone; the MLP has the bits it was given, nearest, with one unit at least."""
    assert b.direct(Config()) == Config(edges="direct")
    config = b.mlp_of_equal_storage(Config(), 61_952, 196, 10)
    assert config == Config(model="mlp", hidden=config.hidden)

    def distance(width: int) -> int:
        return abs(32 * sum(p.numel() for p in MLP([196, width, 10]).parameters()) - 61_952)

    assert config.hidden == (min(range(1, 30), key=distance),)
    assert b.mlp_of_equal_storage(Config(), 1, 196, 10).hidden == (1,)


@pytest.mark.parametrize("name", METHODS)
def test_what_all_share(name: str) -> None:
    """Shape, type and determinism; no graph is kept, the input and the global generator stay as they were."""
    given = V.clone().requires_grad_()
    state = torch.random.get_rng_state()
    found = METHODS[name](given)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(given, V)
    assert found.coefficients.shape == V.shape
    assert found.coefficients.dtype == V.dtype
    assert not found.coefficients.requires_grad
    assert isinstance(found.bits, int)
    assert torch.equal(found.coefficients, METHODS[name](V).coefficients)
    assert METHODS[name](V.double()).coefficients.dtype == torch.float64
    assert 0 < relative_error(V, found.coefficients) < 1


@pytest.mark.parametrize("name", METHODS)
def test_units_of_the_coefficients(name: str) -> None:
    """Coefficients 4096 times smaller lose the same share: no absolute tolerance swallows them."""
    error, small = (relative_error(v, METHODS[name](v).coefficients) for v in (V, V / 4096))
    assert small == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("name", [n for n in METHODS if n.startswith(("Gaussian", "agglom", "product", "post-hoc"))])
def test_means_of_the_columns(name: str) -> None:
    """Columns that lie 50 apart (as a base weight beside basis coefficients) lose the same share."""
    error, apart = (relative_error(v, METHODS[name](v).coefficients) for v in (V, V + 50 * torch.arange(9)))
    assert apart == pytest.approx(error, rel=1e-2)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_finite(name: str, bad: float) -> None:
    """One bad number among all is refused by every method."""
    vectors = V.clone()
    vectors[17, 3] = bad
    with pytest.raises(UserError, match="not finite"):
        METHODS[name](vectors)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("vectors", [V[0], V[:0], V.reshape(20, 3, 9)])
def test_not_a_matrix(name: str, vectors: torch.Tensor) -> None:
    """Anything but [E, W] with at least one number is refused by every method."""
    with pytest.raises(UserError, match="give \\[E, W\\]"):
        METHODS[name](vectors)


def test_scalar_clustering() -> None:
    """At most K values; bits E·W·⌈log₂ K⌉ + 32 K; as many as distinct numbers, or more, lose nothing."""
    found = b.scalar_clustering(V, 5)
    assert len(found.coefficients.unique()) <= 5
    assert found.bits == 540 * 3 + 160
    few = V.round()
    for k in (len(few.unique()), 16):
        assert torch.equal(b.scalar_clustering(few, k).coefficients, few)
    assert not torch.equal(b.scalar_clustering(few, len(few.unique()) - 1).coefficients, few)
    errors = [relative_error(V, b.scalar_clustering(V, k).coefficients) for k in (1, 2, 4, 16, 64, 540)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] == 0


def test_product_quantisation() -> None:
    """Bits by formula; one part is K-means; more parts are nearer; K = E loses nothing."""
    found = b.product_quantisation(V, 3, 8)
    assert found.bits == 3 * (60 * 3 + 32 * 8 * 3)
    whole = kmeans(V, 8)
    assert torch.equal(b.product_quantisation(V, 1, 8).coefficients, whole.codebook[whole.assignment])
    errors = [relative_error(V, b.product_quantisation(V, parts, 8).coefficients) for parts in (1, 3, 9)]
    assert errors == sorted(errors, reverse=True)
    assert torch.equal(b.product_quantisation(V, 2, 60).coefficients, V)


def test_product_quantisation_of_unequal_parts() -> None:
    """9 = 3 + 2 + 2 + 2: each part takes at most K values of its own; the codebooks hold K·W numbers together."""
    found = b.product_quantisation(V, 4, 5)
    for start, stop in ((0, 3), (3, 5), (5, 7), (7, 9)):
        part = kmeans(V[:, start:stop], 5)
        assert torch.equal(found.coefficients[:, start:stop], part.codebook[part.assignment])
    assert found.bits == 4 * 60 * 3 + 32 * 5 * 9


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_uniform_quantisation(bits: int) -> None:
    """No number moves by more than half a step; the largest stays; bits and number of integers by formula."""
    vectors = V * torch.logspace(-3, 3, 9)
    found = b.uniform_quantisation(vectors, bits)
    largest = vectors.abs().amax(0)
    step = largest / (2 ** (bits - 1) - 1)
    assert ((found.coefficients - vectors).abs() <= step / 2 + 1e-6 * largest).all()
    assert torch.allclose(found.coefficients.abs().amax(0), largest, atol=0)
    assert found.bits == 540 * bits + 32 * 9
    integers = found.coefficients / step
    assert torch.allclose(integers, integers.round(), atol=1e-2)
    assert integers.abs().max() < 2 ** (bits - 1) - 0.9


def test_uniform_quantisation_of_integers() -> None:
    """Numbers on the grid come back exactly, a column of zeros and numbers below float32's normal ones unharmed."""
    grid = torch.randint(-127, 128, (50, 4), generator=torch.Generator().manual_seed(0)).float()
    grid[0] = 127
    grid[:, 2] = 0
    assert torch.equal(b.uniform_quantisation(grid, 8).coefficients, grid)
    assert torch.isfinite(b.uniform_quantisation(V * 1e-43, 16).coefficients).all()


def test_magnitude_pruning() -> None:
    """The largest tenth stays as it is, the rest is 0; one coefficient at least."""
    found = b.magnitude_pruning(V, 0.1)
    kept = found.coefficients != 0
    assert kept.sum() == 54
    assert torch.equal(found.coefficients[kept], V[kept])
    assert V[kept].abs().min() >= V[~kept].abs().max()
    assert V[kept].min() < 0 < V[kept].max()
    assert found.bits == 32 * 54 + 540
    assert torch.equal(b.magnitude_pruning(V, 1.0).coefficients, V)
    assert (b.magnitude_pruning(V, 1e-9).coefficients != 0).sum() == 1
    ties = b.magnitude_pruning(torch.ones(4, 5), 0.25)
    assert (ties.coefficients != 0).sum() == 5


@pytest.mark.parametrize("method", [b.gaussian_mixture, b.agglomerative])
def test_other_clusterings(method: Any) -> None:
    """Planted clusters are found, also far from 0; every edge has its cluster's mean; bits as K-means'."""
    centres = torch.randn(4, 9, generator=torch.Generator().manual_seed(1)) * 30
    labels = torch.arange(60) % 4
    for offset in (0.0, 1e4):
        vectors = centres[labels] + V * 0.1 + offset
        found = method(vectors, 4)
        means = torch.stack([vectors[labels == c].mean(0) for c in range(4)])
        assert torch.allclose(found.coefficients, means[labels], atol=1e-4 + offset * 1e-6)
        assert found.bits == 60 * 2 + 4 * 9 * 32


@pytest.mark.parametrize("method", [b.gaussian_mixture, b.agglomerative])
def test_limits_of_other_clusterings(method: Any) -> None:
    """K = 1 is the mean, K = E and K above the distinct edges lose nothing, a single edge is no failure."""
    assert torch.allclose(method(V, 1).coefficients, V.mean(0).expand_as(V), atol=1e-6)
    assert method(V, 1).bits == 60 * bits_for(1) + 9 * 32
    assert torch.equal(method(V, 60).coefficients, V)
    assert torch.equal(method(V[:1], 1).coefficients, V[:1])
    repeated = V[:3].repeat(20, 1)
    assert torch.allclose(method(repeated, 6).coefficients, repeated, atol=1e-6)


def test_agglomerative_of_a_sample() -> None:
    """Edges outside the draw go to the nearest centroid, also where the mean is large beside the spread."""
    labels = torch.arange(60) % 3
    vectors = torch.eye(3)[labels] * 50 + torch.randn(60, 3, generator=torch.Generator().manual_seed(2))
    means = torch.stack([vectors[labels == c].mean(0) for c in range(3)])
    found = b.agglomerative(vectors, 3, most=12)
    assert torch.allclose(found.coefficients, means[labels], atol=1e-4)
    far = vectors / 4096 + 64  # 1/4096 and 64: the sum still holds most digits of float32
    assert relative_error(far, b.agglomerative(far, 3, most=12).coefficients) < 0.01


def test_post_hoc_meta_learner() -> None:
    """Coefficients on a polyline are fitted with d_emb = 1; free ones are not; bits by formula."""
    torch.manual_seed(3)
    learner = MetaLearner(1, 4, 9)
    torch.nn.init.normal_(learner.hidden.weight)
    planted = learner(torch.randn(60, 1)).detach()
    found = b.post_hoc_meta_learner(planted, 1, 16, steps=500)
    assert relative_error(planted, found.coefficients) < 0.01
    assert relative_error(V, b.post_hoc_meta_learner(V, 1, 16, steps=100).coefficients) > 0.3
    assert found.bits == 32 * (60 + 16 * 2 + 16 * 9 + 9)


def test_post_hoc_meta_learner_limits() -> None:
    """A larger d_emb fits better; d_emb above W, a single edge and edges all alike are no failure; seeds differ."""
    errors = [relative_error(V, b.post_hoc_meta_learner(V, d, 32, steps=200).coefficients) for d in (1, 3, 9)]
    assert errors == sorted(errors, reverse=True)
    assert b.post_hoc_meta_learner(V, 12, 4, steps=5).bits == 32 * (60 * 12 + 4 * 13 + 9 * 5)
    for vectors in (V[:1], V[:1].repeat(5, 1)):
        assert torch.allclose(b.post_hoc_meta_learner(vectors, 1, 4, steps=5).coefficients, vectors, atol=1e-6)
    first, second = (b.post_hoc_meta_learner(V, 1, 4, seed=s, steps=5).coefficients for s in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: b.product_quantisation(V, 10, 2), "10 parts of vectors of 9"),
        (lambda: b.product_quantisation(V, 0, 2), "0 parts of vectors of 9"),
        (lambda: b.product_quantisation(V, 3, 61), "61 clusters for 60 edges"),
        (lambda: b.product_quantisation(V, 3, 0), "0 clusters for 60 edges"),
        (lambda: b.uniform_quantisation(V, 1), "1 bits"),
        (lambda: b.uniform_quantisation(V, 17), "17 bits"),
        (lambda: b.magnitude_pruning(V, 0.0), "keep is 0"),
        (lambda: b.magnitude_pruning(V, -0.1), "keep is -0.1"),
        (lambda: b.magnitude_pruning(V, 1.01), "keep is 1.01"),
        (lambda: b.magnitude_pruning(V, math.nan), "keep is nan"),
        (lambda: b.gaussian_mixture(V, 61), "61 clusters for 60"),
        (lambda: b.gaussian_mixture(V, 0), "0 clusters"),
        (lambda: b.agglomerative(V, 61), "61 clusters for 60"),
        (lambda: b.agglomerative(V, 0), "0 clusters"),
        (lambda: b.agglomerative(V, 20, most=10), "a draw of 10"),
        (lambda: b.scalar_clustering(V, 541), "541 clusters for 540 coefficients"),
        (lambda: b.scalar_clustering(V, 0), "0 clusters for 540 coefficients"),
        (lambda: b.post_hoc_meta_learner(V, 0, 4), "d_emb is 0"),
        (lambda: b.post_hoc_meta_learner(V, 1, 0), "d_hidden is 0"),
        (lambda: b.post_hoc_meta_learner(V, 1, 4, steps=0), "steps is 0"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    """Sizes out of range are refused in one line that says what to give."""
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "give" in str(caught.value)
    assert "\n" not in str(caught.value)
