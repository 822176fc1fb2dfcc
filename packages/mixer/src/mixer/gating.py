"""The gate that learns without a gradient: cluster the contexts, pair clusters with experts, fit W by least squares
(Section 3 of the paper; train_step_gates of the released code).

Shapes: E environments, M experts (and clusters), C context size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from metazoo.errors import UserError


def distances(contexts: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Mean absolute distance (L1, as in the released code) [E, C], [K, C] -> [E, K]."""
    return torch.cdist(contexts, centroids, p=1) / contexts.shape[1]


def kmeans_plus_plus(contexts: torch.Tensor, k: int, generator: torch.Generator) -> torch.Tensor:
    """K-means++ seeding (Arthur and Vassilvitskii, 2007) with the same distance: each further centroid is a context
    drawn with probability proportional to the squared distance to the nearest one so far. [E, C] -> [K, C].

    Contexts that all coincide (as at the start of training) give coinciding centroids.
    """
    first = torch.randint(len(contexts), (1,), generator=generator)
    chosen = contexts[first]
    nearest = distances(contexts, chosen).squeeze(1)
    for _ in range(1, k):
        weights = nearest.square().cpu()
        if not bool(weights.sum() > 0):
            weights = torch.ones_like(weights)
        index = torch.multinomial(weights, 1, generator=generator)
        chosen = torch.cat([chosen, contexts[index]])
        nearest = torch.minimum(nearest, distances(contexts, contexts[index]).squeeze(1))
    return chosen


@dataclass(frozen=True)
class Clusters:
    """Result of K-means: centroids [K, C], assignment [E], whether it converged, and whether a cluster is empty."""

    centroids: torch.Tensor
    assignment: torch.Tensor
    converged: bool
    empty: bool


def cluster(
    contexts: torch.Tensor, centroids: torch.Tensor, *, max_iterations: int, tolerance: float, reseed: bool
) -> Clusters:
    """K-means with L1-mean assignment and mean update, from ``centroids`` [K, C].

    It has converged when no coordinate of a centroid moved by more than ``tolerance``. With ``reseed`` an empty
    cluster moves to the context farthest from its own centroid; without, it ends the clustering (``empty``).
    """
    k = len(centroids)
    assignment = distances(contexts, centroids).argmin(1)
    for _ in range(max_iterations):
        before = centroids
        gaps = distances(contexts, centroids)
        assignment = gaps.argmin(1)
        members = torch.nn.functional.one_hot(assignment, k).to(contexts.dtype)  # [E, K]
        count = members.sum(0)
        if not bool(count.min() > 0):
            if not reseed:
                return Clusters(centroids, assignment, converged=False, empty=True)
            assignment = _fill(gaps, assignment, k)
            members = torch.nn.functional.one_hot(assignment, k).to(contexts.dtype)
            count = members.sum(0)
        centroids = (members.T @ contexts) / count[:, None]
        if bool((centroids - before).abs().max() <= tolerance):
            return Clusters(centroids, assignment, converged=True, empty=False)
    return Clusters(centroids, assignment, converged=False, empty=False)


def _fill(gaps: torch.Tensor, assignment: torch.Tensor, k: int) -> torch.Tensor:
    """Give each empty cluster the farthest context whose own cluster keeps another member."""
    assignment = assignment.clone()
    count = assignment.bincount(minlength=k)
    for j in (count == 0).nonzero().flatten().tolist():
        own = gaps.gather(1, assignment[:, None]).squeeze(1)
        spare = count[assignment] > 1
        farthest = torch.where(spare, own, own.new_tensor(-1.0)).argmax()
        count[assignment[farthest]] -= 1
        assignment[farthest] = j
        count[j] += 1
    return assignment


def cluster_losses(losses: torch.Tensor, assignment: torch.Tensor, k: int) -> torch.Tensor:
    """Median over each cluster's environments of every expert's loss: [E, M], [E] -> L [K, M].

    The median of an even number is the midpoint, as in NumPy and JAX.
    """
    return torch.stack([losses[assignment == j].quantile(0.5, dim=0) for j in range(k)])


def greedy_pairing(losses: torch.Tensor) -> torch.Tensor:
    """Cluster by cluster, the expert with the lowest loss that is not taken yet: L [K, M] -> expert of each cluster.

    Ties go to the lower index: with identical experts cluster j gets expert j, which is what breaks their symmetry.
    """
    pairing, taken = [], set()
    for row in losses.argsort(dim=1, stable=True).tolist():
        expert = next(m for m in row if m not in taken)
        taken.add(expert)
        pairing.append(expert)
    return torch.tensor(pairing, device=losses.device)


def with_bias(contexts: torch.Tensor) -> torch.Tensor:
    """[ξ; 1]: append the gate's bias input. [E, C] -> [E, C + 1]."""
    return torch.cat([contexts, contexts.new_ones(len(contexts), 1)], dim=1)


def fit_gate(
    contexts: torch.Tensor, experts: torch.Tensor, count: int, *, noise: float, generator: torch.Generator
) -> torch.Tensor:
    """W [C + 1, M], the least-squares solution of least norm of [Ξ + noise; 1] W = one-hot(expert).

    Args:
        contexts: Ξ [E, C].
        experts: expert of each environment [E].
        count: M.
        noise: standard deviation of the Gaussian noise on Ξ.
        generator: of the noise.
    """
    drawn = torch.randn(contexts.shape, generator=generator).to(contexts) * noise
    target = torch.nn.functional.one_hot(experts, count).to(contexts.dtype)
    # the problem is tiny; float64 on the CPU has the driver that handles rank deficiency (contexts that coincide)
    x, y = with_bias(contexts + drawn).double().cpu(), target.double().cpu()
    weight: torch.Tensor = torch.linalg.lstsq(x, y, driver="gelsd").solution
    return weight.to(contexts)


@dataclass(frozen=True)
class GateUpdate:
    """W [C + 1, M] or None if the update was given up, the expert of each environment [E], and why."""

    weight: torch.Tensor | None
    experts: torch.Tensor | None
    reason: Literal["accepted", "empty cluster", "no convergence"]


class KMeansLeastSquaresGate:
    """The gate's state between updates: centroids, random state, and how many updates were accepted.

    Args:
        experts: M.
        init: "kmeans++" (ours) seeds by distance, re-seeds empty clusters, keeps centroids from update to update,
            and uses the last assignment when ``max_iterations`` were not enough. "paper" seeds uniformly within
            ±1e-3, then starts from the centroids of the last accepted update; an empty cluster or no convergence
            gives the update up and forgets the centroids.
        max_iterations, tolerance: of K-means.
        noise: of the least-squares fit.
        seed: of seeding and noise.
    """

    def __init__(
        self,
        experts: int,
        *,
        init: Literal["kmeans++", "paper"] = "kmeans++",
        max_iterations: int = 20,
        tolerance: float = 1e-4,
        noise: float = 1e-4,
        seed: int = 0,
    ) -> None:
        self.experts, self.init = experts, init
        self.max_iterations, self.tolerance, self.noise = max_iterations, tolerance, noise
        self.generator = torch.Generator().manual_seed(seed)
        self.centroids: torch.Tensor | None = None
        self.accepted = 0
        self.aborted = 0

    def update(self, contexts: torch.Tensor, losses: torch.Tensor) -> GateUpdate:
        """One refit from contexts Ξ [E, C] and the losses of all experts ℓ [E, M] (steps 2 to 5 of the method).

        Raises:
            UserError: fewer environments than experts, or a context that is not finite.
        """
        if len(contexts) < self.experts:
            raise UserError(f"{self.experts} experts for {len(contexts)} environments: use at most {len(contexts)}")
        if not bool(torch.isfinite(contexts).all()):
            raise UserError("contexts are not finite, training has diverged: lower the learning rate of the contexts")
        paper = self.init == "paper"
        centroids = self.centroids
        if centroids is None and paper:
            centroids = (torch.rand(self.experts, contexts.shape[1], generator=self.generator) * 2 - 1) * 1e-3
            centroids = centroids.to(contexts)
        elif centroids is None:
            centroids = kmeans_plus_plus(contexts, self.experts, self.generator)
        found = cluster(
            contexts,
            centroids.to(contexts),
            max_iterations=self.max_iterations,
            tolerance=self.tolerance,
            reseed=not paper,
        )
        if found.empty or (paper and not found.converged):
            self.centroids = None
            self.aborted += 1
            return GateUpdate(None, None, "empty cluster" if found.empty else "no convergence")
        self.centroids = found.centroids
        self.accepted += 1
        pairing = greedy_pairing(cluster_losses(losses, found.assignment, self.experts))
        experts = pairing[found.assignment]
        weight = fit_gate(contexts, experts, self.experts, noise=self.noise, generator=self.generator)
        return GateUpdate(weight, experts, "accepted")

    def state_dict(self) -> dict[str, Any]:
        return {
            "centroids": self.centroids,
            "generator": self.generator.get_state(),
            "accepted": self.accepted,
            "aborted": self.aborted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.centroids = state["centroids"]
        self.generator.set_state(state["generator"])
        self.accepted, self.aborted = state["accepted"], state["aborted"]
