"""The K-means + least-squares gate: exact checks of each step, and what makes it give up."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo.errors import UserError
from mixer import gating
from scipy.optimize import linear_sum_assignment

matrices = st.integers(1, 6).flatmap(
    lambda k: st.lists(st.lists(st.floats(0, 9), min_size=k, max_size=k), min_size=k, max_size=k)
)


def clouds(k: int = 4, each: int = 5, c: int = 6, spread: float = 0.01) -> tuple[torch.Tensor, torch.Tensor]:
    """k well-separated clusters of contexts, and the cluster of each."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(k, c, generator=generator)
    noise = torch.randn(k * each, c, generator=generator) * spread
    return centres.repeat_interleave(each, 0) + noise, torch.arange(k).repeat_interleave(each)


def same_partition(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a[:, None] == a[None], b[:, None] == b[None])


def test_distance_is_the_mean_absolute_one() -> None:
    found = gating.distances(torch.tensor([[0.0, 3.0]]), torch.tensor([[1.0, 1.0], [0.0, 3.0]]))
    assert torch.allclose(found, torch.tensor([[1.5, 0.0]]))


def test_fitted_gate_reproduces_the_assignment() -> None:
    """Check 4: M well-separated clusters with C + 1 ≥ M: the top-1 of W is the assignment."""
    contexts, family = clouds()
    experts = torch.tensor([2, 0, 3, 1])[family]
    weight = gating.fit_gate(contexts, experts, 4, noise=1e-4, generator=torch.Generator())
    assert torch.equal((gating.with_bias(contexts) @ weight).argmax(1), experts)


def test_fitted_gate_interpolates_and_solves_the_normal_equations() -> None:
    """Check 4: without noise, C + 1 ≥ E interpolates Y; otherwise XᵀXW = XᵀY; the solution has the least norm."""
    generator = torch.Generator().manual_seed(1)
    experts = torch.tensor([0, 1, 2, 1, 0])
    wide = torch.randn(5, 9, generator=generator, dtype=torch.float64)
    weight = gating.fit_gate(wide, experts, 3, noise=0.0, generator=generator)
    target = torch.nn.functional.one_hot(experts, 3).double()
    assert torch.allclose(gating.with_bias(wide) @ weight, target, atol=1e-9)
    assert torch.allclose(weight, torch.linalg.pinv(gating.with_bias(wide)) @ target, atol=1e-9)
    tall = torch.randn(20, 3, generator=generator, dtype=torch.float64)
    experts = torch.randint(3, (20,), generator=generator)
    weight = gating.fit_gate(tall, experts, 3, noise=0.0, generator=generator)
    x, y = gating.with_bias(tall), torch.nn.functional.one_hot(experts, 3).double()
    assert torch.allclose(x.T @ x @ weight, x.T @ y, atol=1e-6)


@settings(max_examples=80, deadline=None)
@given(values=matrices)
def test_greedy_pairing(values: list[list[float]]) -> None:
    """Check 5: a permutation for any losses; never better than the Hungarian one; the argmin where these differ."""
    losses = torch.tensor(values, dtype=torch.float64)
    pairing = gating.greedy_pairing(losses)
    k = len(values)
    assert sorted(pairing.tolist()) == list(range(k))
    rows, columns = linear_sum_assignment(losses.numpy())
    assert losses[torch.arange(k), pairing].sum() >= losses.numpy()[rows, columns].sum() - 1e-9
    least = losses.argmin(1)
    if len(set(least.tolist())) == k and all((row == row.min()).sum() == 1 for row in losses):
        assert torch.equal(pairing, least)


def test_greedy_pairing_by_hand() -> None:
    """Cluster 1 wants expert 0 too, but cluster 0 came first; equal losses give the identity."""
    losses = torch.tensor([[1.0, 2.0, 3.0], [0.1, 5.0, 4.0], [9.0, 1.0, 1.0]])
    assert gating.greedy_pairing(losses).tolist() == [0, 2, 1]
    assert gating.greedy_pairing(torch.ones(5, 5)).tolist() == [0, 1, 2, 3, 4]


def test_cluster_losses_are_midpoint_medians() -> None:
    losses = torch.tensor([[1.0, 8.0], [3.0, 6.0], [100.0, 0.0], [5.0, 5.0]])
    found = gating.cluster_losses(losses, torch.tensor([0, 0, 1, 0]), 2)
    assert torch.equal(found, torch.tensor([[3.0, 6.0], [100.0, 0.0]]))
    assert gating.cluster_losses(losses, torch.tensor([0, 0, 1, 1]), 2)[0].tolist() == [2.0, 7.0]


def test_empty_cluster_gives_the_paper_update_up() -> None:
    """Check 6: no new weight, the centroids forgotten, counted; contexts of size 1 against centroids within 1e-3."""
    gate = gating.KMeansLeastSquaresGate(4, init="paper")
    contexts, _ = clouds()
    update = gate.update(contexts.abs() + 1, torch.rand(20, 4))
    assert update.weight is None
    assert update.reason == "empty cluster"
    assert gate.centroids is None
    assert (gate.accepted, gate.aborted) == (0, 1)


def test_no_convergence_gives_the_paper_update_up() -> None:
    gate = gating.KMeansLeastSquaresGate(2, init="paper", max_iterations=1, tolerance=0.0)
    contexts, _ = clouds(2)
    gate.centroids = contexts[[0, 5]] + 0.05
    assert gate.update(contexts, torch.rand(10, 2)).reason == "no convergence"


@pytest.mark.parametrize("k", [2, 4, 10])
def test_kmeans_plus_plus_finds_separated_clusters(k: int) -> None:
    """Every cluster found, from the first update, whatever the losses; experts are used once each."""
    contexts, family = clouds(k, c=12)
    gate = gating.KMeansLeastSquaresGate(k)
    update = gate.update(contexts, torch.rand(len(family), k))
    assert same_partition(update.experts, family)
    assert len(update.experts.unique()) == k


def test_coinciding_contexts_fill_every_cluster() -> None:
    """At the start all contexts are 0: re-seeding must end, with every expert used."""
    gate = gating.KMeansLeastSquaresGate(4)
    update = gate.update(torch.zeros(9, 8), torch.ones(9, 4))
    assert len(update.experts.unique()) == 4
    assert torch.isfinite(update.weight).all()


def test_as_many_experts_as_environments() -> None:
    gate = gating.KMeansLeastSquaresGate(5)
    update = gate.update(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.rand(5, 5))
    assert sorted(update.experts.tolist()) == list(range(5))


def test_clustering_is_a_fixed_point() -> None:
    """After convergence every context is with its nearest centroid, and centroids are means: against NumPy."""
    contexts, _ = clouds(3, each=8, spread=0.8)
    start = contexts[[0, 8, 16]]
    found = gating.cluster(contexts, start, max_iterations=100, tolerance=1e-7, reseed=False)
    points, centres = contexts.numpy(), found.centroids.numpy()
    nearest = np.abs(points[:, None] - centres[None]).mean(-1).argmin(1)
    assert found.converged
    assert (nearest == found.assignment.numpy()).all()
    for j in range(3):
        assert np.allclose(points[nearest == j].mean(0), centres[j], atol=1e-5)


def test_paper_starts_from_the_last_centroids_and_forgets_them_after_failing() -> None:
    """Accepted: the clusters keep their order, whichever it was; given up: centroids and order are forgotten."""
    contexts, family = clouds(2)
    for order in ([0, 1], [1, 0]):
        gate = gating.KMeansLeastSquaresGate(2, init="paper")
        gate.centroids = contexts[[0, 5]][order]
        for _ in range(2):
            assert gate.update(contexts, torch.rand(10, 2)).reason == "accepted"
            means = torch.stack([contexts[family == j].mean(0) for j in order])
            assert torch.allclose(gate.centroids, means, atol=1e-5)
        assert gate.update(contexts.abs() + 100, torch.rand(10, 2)).reason == "empty cluster"
        assert gate.centroids is None
        assert (gate.accepted, gate.aborted) == (2, 1)


def test_paper_seeds_within_a_thousandth(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(contexts: torch.Tensor, centroids: torch.Tensor, **options: object) -> gating.Clusters:
        seen.append(centroids)
        return gating.Clusters(centroids, torch.zeros(len(contexts), dtype=torch.long), converged=False, empty=True)

    monkeypatch.setattr(gating, "cluster", spy)
    gating.KMeansLeastSquaresGate(50, init="paper").update(torch.ones(60, 40), torch.rand(60, 50))
    assert 0.99e-3 < seen[0].max() <= 1e-3
    assert -1e-3 <= seen[0].min() < -0.99e-3


def test_kmeans_plus_plus_goes_on_from_its_centroids_and_without_convergence() -> None:
    """The second update starts where the first ended; too few iterations do not stop it."""
    contexts, _ = clouds(spread=1.0)
    gate = gating.KMeansLeastSquaresGate(4, max_iterations=1, tolerance=0.0)
    losses = torch.rand(20, 4)
    assert gate.update(contexts, losses).reason == "accepted"
    expected = gating.cluster(contexts, gate.centroids, max_iterations=1, tolerance=0.0, reseed=True)
    assert not expected.converged
    gate.update(contexts, losses)
    assert torch.equal(gate.centroids, expected.centroids)


def test_kmeans_plus_plus_draws_by_squared_distance() -> None:
    """From 0 among {0, 1, 3} the second centroid is 3 nine times as often as 1, and never 0 again."""
    contexts, generator = torch.tensor([[0.0], [1.0], [3.0]]), torch.Generator().manual_seed(0)
    pairs = [gating.kmeans_plus_plus(contexts, 2, generator).flatten().tolist() for _ in range(3000)]
    after_zero = [second for first, second in pairs if first == 0]
    assert 0.0 not in after_zero
    assert 0.87 < after_zero.count(3.0) / len(after_zero) < 0.93


def test_empty_cluster_takes_the_farthest_context() -> None:
    """Centroid 1 attracts nobody and gets the context at 5, the farthest from its own centroid."""
    contexts = torch.tensor([[0.0], [0.1], [0.2], [5.0]])
    found = gating.cluster(contexts, torch.tensor([[0.0], [99.0]]), max_iterations=1, tolerance=0.0, reseed=True)
    assert found.assignment.tolist() == [0, 0, 0, 1]
    assert torch.allclose(found.centroids, torch.tensor([[0.1], [5.0]]))


def test_noise_is_what_the_fit_sees() -> None:
    """Contexts that coincide: with noise the fit separates what it saw; the same seed gives the same W."""
    contexts, experts = torch.zeros(6, 9), torch.tensor([0, 1, 2, 0, 1, 2])
    flat = gating.fit_gate(contexts, experts, 3, noise=0.0, generator=torch.Generator())
    assert torch.allclose(gating.with_bias(contexts) @ flat, torch.full((6, 3), 1 / 3))
    assert flat[:-1].abs().max() < 1e-6
    one, other = (
        gating.fit_gate(contexts, experts, 3, noise=1e-2, generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert torch.equal(one, other)
    drawn = torch.randn(6, 9, generator=torch.Generator().manual_seed(1)) * 1e-2
    assert torch.equal((gating.with_bias(drawn) @ one).argmax(1), experts)


def test_losses_decide_which_expert_a_cluster_gets() -> None:
    contexts, family = clouds()
    experts = torch.tensor([2, 0, 3, 1])[family]
    losses = 1.0 - torch.nn.functional.one_hot(experts, 4) + 0.1 * torch.rand(20, 4)
    update = gating.KMeansLeastSquaresGate(4).update(contexts, losses)
    assert torch.equal(update.experts, experts)
    assert torch.equal((gating.with_bias(contexts) @ update.weight).argmax(1), experts)


def test_an_expert_whose_loss_is_not_finite_comes_last() -> None:
    assert gating.greedy_pairing(torch.tensor([[float("nan"), 2.0], [0.0, 1.0]])).tolist() == [1, 0]


def test_impossible_updates_are_refused() -> None:
    gate = gating.KMeansLeastSquaresGate(4)
    with pytest.raises(UserError, match="4 experts for 3 environments: use at most 3"):
        gate.update(torch.zeros(3, 8), torch.ones(3, 4))
    contexts = torch.zeros(9, 8)
    contexts[3, 2] = float("nan")
    with pytest.raises(UserError, match="contexts are not finite"):
        gate.update(contexts, torch.ones(9, 4))


def test_state_goes_on() -> None:
    """A gate restored from its state dict makes the same next update, bit for bit."""
    contexts, _ = clouds(spread=0.5)
    losses = torch.rand(20, 4)
    one, other = gating.KMeansLeastSquaresGate(4, seed=3), gating.KMeansLeastSquaresGate(4, seed=9)
    one.update(contexts, losses)
    other.load_state_dict(one.state_dict())
    a, b = one.update(contexts + 0.1, losses), other.update(contexts + 0.1, losses)
    assert torch.equal(a.weight, b.weight)
    assert torch.equal(a.experts, b.experts)
