"""The meta-learner's curve, K-means, the codebook: the exact checks of the method."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metacluster.clustering import attach_meta_learner, compress, finetune_codebook, kmeans, residuals
from metacluster.edges import ClusteredEdges, DirectEdges, MetaEdges, MetaLearner
from metacluster.model import KAN, MLP, kan_layers
from metazoo.errors import UserError


def edges_of(model: torch.nn.Module, layer: int = 0) -> Any:
    return list(kan_layers(model).values())[layer].edges


def test_one_dimension_gives_a_polyline() -> None:
    """Check 4: d_emb = 1 and H hidden units: between the H kinks coefficients move along straight lines."""
    torch.manual_seed(0)
    learner = MetaLearner(1, 5, 9).double()
    kinks = (-learner.hidden.bias / learner.hidden.weight[:, 0]).detach().sort().values
    ends = torch.cat([kinks[:1] - 1, kinks, kinks[-1:] + 1])
    directions = []
    for low, high in itertools.pairwise(ends):
        w = learner(torch.linspace(low, high, 7, dtype=torch.float64)[1:-1, None])
        steps = w.diff(dim=0)
        assert torch.linalg.matrix_rank(steps, atol=1e-9) <= 1
        directions.append(steps[0] / (high - low))
    assert len(directions) == 6
    assert torch.linalg.matrix_rank(torch.stack(directions), atol=1e-9) > 2  # with kinks: no straight line altogether


def test_without_first_weights_all_edges_are_one() -> None:
    """Check 3: W₁ = 0 leaves W₂ ReLU(b₁) + b₂ for every edge; K = 1 is then lossless."""
    model = attach_meta_learner(KAN([4, 3]))
    edges = edges_of(model)
    torch.nn.init.zeros_(edges.meta_learner.hidden.weight)
    learner = edges.meta_learner
    expected = learner.out.weight @ learner.hidden.bias.relu() + learner.out.bias
    assert torch.allclose(edges(), expected.expand(12, -1), atol=1e-6)
    clustered = compress(model, 1)
    x = torch.randn(3, 4)
    assert torch.allclose(clustered(x), model(x), atol=1e-5)


def test_meta_learner_can_emit_anything() -> None:
    """Check 3: with d_hidden ≥ E and one-hot embeddings any coefficients come out."""
    wanted = torch.randn(6, 9)
    learner = MetaLearner(6, 6, 9)
    with torch.no_grad():
        learner.hidden.weight.copy_(torch.eye(6))
        learner.hidden.bias.zero_()
        learner.out.weight.copy_(wanted.T)
        learner.out.bias.zero_()
    assert torch.allclose(MetaEdges(torch.eye(6), learner)(), wanted)


@pytest.mark.parametrize("d_emb", [1, 2, 4])
def test_meta_learner_starts_as_the_layer_does(d_emb: int) -> None:
    """Emitted coefficients have mean 0 and deviation 1/√I at the start; scales have 1 and 0."""
    model = attach_meta_learner(KAN([50, 40], scale=True), d_emb)
    emitted = edges_of(model)()
    assert torch.allclose(emitted.mean(0), torch.tensor([0.0] * 9 + [1.0]), atol=1e-5)
    assert emitted[:, :9].std(0).mean().item() == pytest.approx(50**-0.5, rel=0.2)
    assert not emitted[:, 9].std() > 1e-6
    assert torch.equal(emitted, edges_of(attach_meta_learner(KAN([50, 40], scale=True), d_emb))())


def test_scopes() -> None:
    """One meta-learner, one codebook for all layers, or one each."""
    model = attach_meta_learner(KAN([6, 5, 4]), scope="model")
    assert edges_of(model, 0).meta_learner is edges_of(model, 1).meta_learner
    shared = compress(model, 7, scope="model")
    assert edges_of(shared, 0).codebook is edges_of(shared, 1).codebook
    assert len([p for p in shared.parameters() if p.shape == (7, 9)]) == 1
    own = compress(attach_meta_learner(KAN([6, 5, 4])), 7)
    assert edges_of(own, 0).codebook is not edges_of(own, 1).codebook
    mixed = torch.nn.Sequential(KAN([3, 4]), KAN([4, 2], "fourier", scale=True))
    with pytest.raises(UserError, match="several sizes"):
        compress(mixed, 2, scope="model")
    with pytest.raises(UserError, match="unknown scope"):
        compress(model, 2, scope="net")  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(count=st.integers(5, 60), k=st.integers(1, 5), size=st.integers(1, 4), seed=st.integers(0, 100))
def test_kmeans_is_a_fixed_point_of_lloyd(count: int, k: int, size: int, seed: int) -> None:
    """Check 7: every edge is at its nearest centroid, every centroid the mean of its members; the residual is what is
    left of the variance."""
    vectors = torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).float()
    found = kmeans(vectors, k, seed=seed)
    distances = torch.cdist(vectors.double(), found.codebook.double())
    nearest = distances.min(1).values
    own = distances[torch.arange(count), found.assignment]
    assert torch.allclose(own, nearest, atol=1e-5)
    for cluster in found.assignment.unique():
        assert torch.allclose(found.codebook[cluster], vectors[found.assignment == cluster].mean(0), atol=1e-5)
    within = (vectors - found.codebook[found.assignment]).square().sum()
    assert found.residual == pytest.approx(float(within / (vectors - vectors.mean(0)).square().sum()), abs=1e-5)
    assert found.assignment.dtype == torch.int64


def test_kmeans_residual_falls_with_k_and_starts_help() -> None:
    """More centroids leave less; more starts never more; the same seed the same clusters."""
    vectors = torch.randn(400, 5, generator=torch.Generator().manual_seed(0))
    found = [kmeans(vectors, k).residual for k in (1, 2, 4, 16, 64)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1.0)
    assert kmeans(vectors, 16, n_init=8).residual <= kmeans(vectors, 16, n_init=1).residual + 1e-9
    assert torch.equal(kmeans(vectors, 16, seed=3).assignment, kmeans(vectors, 16, seed=3).assignment)


def test_permuted_edges_permute_indices_only() -> None:
    """Well-parted clusters: another order of the edges gives the same centroids and permuted indices."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(4, 3, generator=generator) * 20
    vectors = centres[torch.arange(80) % 4] + torch.randn(80, 3, generator=generator) * 0.1
    order = torch.randperm(80, generator=generator)
    one, other = kmeans(vectors, 4), kmeans(vectors[order], 4)
    assert torch.allclose(one.codebook[one.assignment][order], other.codebook[other.assignment], atol=1e-4)


def test_as_many_centroids_as_distinct_vectors_lose_nothing() -> None:
    """Check 5: duplicates are found, spare centroids do no harm."""
    distinct = torch.randn(5, 9)
    vectors = distinct[torch.arange(40) % 5]
    for k in (5, 8, 40):
        found = kmeans(vectors, k)
        assert found.residual == 0
        assert torch.equal(found.codebook[found.assignment], vectors)
        assert found.codebook.shape == (k, 9)


def test_standardise_changes_the_metric_not_the_units() -> None:
    """A column of large numbers no longer decides alone."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(200) % 2
    vectors = torch.stack([labels + 0.01 * torch.randn(200, generator=generator), 1e4 * torch.randn(200)], 1)
    plain, scaled = kmeans(vectors, 4), kmeans(vectors, 4, standardise=True)
    pure = [labels[scaled.assignment == c].float().mean() for c in range(4)]
    assert all(p in (0, 1) for p in pure)
    assert any(0 < labels[plain.assignment == c].float().mean() < 1 for c in range(4))
    members = vectors[scaled.assignment == 0].mean(0)
    assert torch.allclose(scaled.codebook[0], members, rtol=1e-4)


def test_many_edges_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond the sample size starts are compared on a part; the residual stays near that of all edges."""
    vectors = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0))
    whole = kmeans(vectors, 4).residual
    monkeypatch.setattr("metacluster.clustering.SAMPLE", 500)
    assert kmeans(vectors, 4).residual == pytest.approx(whole, rel=0.05)


def test_codebook_gradient_is_the_sum_over_its_edges() -> None:
    """Check 6: autograd through the gather = index_add of the edges' gradients = finite differences."""
    torch.manual_seed(0)
    model = compress(KAN([4, 3], "rbf"), 3).double()
    edges = edges_of(model)
    x = torch.randn(5, 4, dtype=torch.float64)
    loss = model(x).square().sum()
    (found,) = torch.autograd.grad(loss, edges.codebook)
    plain = copy.deepcopy(model)
    direct = DirectEdges(edges().detach().clone())
    plain.layers[0].edges = direct
    (per_edge,) = torch.autograd.grad(plain(x).square().sum(), direct.coefficients)
    assert torch.allclose(found, torch.zeros_like(found).index_add_(0, edges.assignment, per_edge))
    step = 1e-6
    with torch.no_grad():
        edges.codebook[1, 2] += step
        change = (model(x).square().sum() - loss) / step
    assert change.item() == pytest.approx(found[1, 2].item(), rel=1e-3)


def test_compress_leaves_the_model_and_drops_the_meta_learner() -> None:
    model = attach_meta_learner(KAN([6, 5, 4], "gram"))
    before = copy.deepcopy(model.state_dict())
    clustered = compress(model, 4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert isinstance(edges_of(model), MetaEdges)
    assert isinstance(edges_of(clustered), ClusteredEdges)
    assert not [name for name, _ in clustered.named_parameters() if "meta_learner" in name or "embedding" in name]


def test_finetuning_moves_the_codebook_alone() -> None:
    """Stage 3: the loss falls, no index changes."""
    torch.manual_seed(0)
    x = torch.rand(256, 3) * 2 - 1
    y = torch.sin(3 * x).sum(1, keepdim=True)
    model = compress(attach_meta_learner(KAN([3, 8, 1])), 6)
    indices = edges_of(model).assignment
    codebook = edges_of(model).codebook.detach().clone()
    loss = torch.nn.functional.mse_loss
    before = loss(model(x), y).item()
    finetune_codebook(model, list(zip(x.split(64), y.split(64), strict=True)), loss, epochs=20, lr=1e-2)
    assert loss(model(x), y).item() < 0.7 * before
    assert torch.equal(edges_of(model).assignment, indices)
    assert not torch.equal(edges_of(model).codebook, codebook)
    with pytest.raises(UserError, match="the loss became nan"):
        finetune_codebook(model, [(x * float("nan"), y)], loss)


def test_residuals_name_the_layers() -> None:
    assert list(residuals(KAN([6, 5, 4]), 3)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: kmeans(torch.randn(5, 2), 0), "0 clusters for 5 edges"),
        (lambda: kmeans(torch.randn(5, 2), 6), "6 clusters for 5 edges"),
        (lambda: kmeans(torch.tensor([[0.0], [float("nan")]]), 1), "edge 1 are not finite"),
        (lambda: compress(KAN([2, 2]), 5), r"layers\.0 has 4 edges"),
        (lambda: compress(MLP([2, 2]), 2), "no KAN layer"),
        (lambda: attach_meta_learner(MLP([2, 2])), "no KAN layer"),
        (lambda: attach_meta_learner(KAN([2, 2]), 0), "d_emb 0"),
        (lambda: ClusteredEdges(torch.randn(2, 3), torch.tensor([0, 2])), "does not fit"),
        (lambda: finetune_codebook(KAN([2, 2]), [], torch.nn.functional.mse_loss), "call compress first"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
