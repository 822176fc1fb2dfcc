"""What the paper compares MetaCluster with, and what its reviewers asked for.

The trained ones are configs that go through the same loop (train.py). The others compress trained coefficients [E, W]
without training on: E edges, W = |w| coefficients of an edge.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from metazoo.errors import UserError

from metacluster.config import Config

if TYPE_CHECKING:
    import torch


def direct(config: Config) -> Config:
    """The KAN whose coefficients are trained themselves; its K-means and codebook are naive weight sharing."""
    return replace(config, edges="direct")


def mlp_of_equal_storage(config: Config, bits: int, inputs: int, outputs: int) -> Config:
    """An MLP of one hidden layer whose float32 parameters take the nearest to ``bits``."""
    width = max(1, round((bits / 32 - outputs) / (inputs + outputs + 1)))
    return replace(config, model="mlp", hidden=(width,))


@dataclass(frozen=True)
class Compressed:
    """Reconstructed coefficients [E, W] and the bits that they take."""

    coefficients: torch.Tensor
    bits: int


def relative_error(vectors: torch.Tensor, reconstructed: torch.Tensor) -> float:
    """Squared error / total variance about the mean, as K-means' residual. 0 where there is no variance."""
    total = (vectors - vectors.mean(0)).square().sum()
    return float((vectors - reconstructed).square().sum() / total) if total > 0 else 0.0


def scalar_clustering(vectors: torch.Tensor, k: int, *, seed: int = 0) -> Compressed:
    """One codebook of k scalars for all coefficients (weight sharing as in deep compression of MLPs)."""
    from metacluster.clustering import kmeans

    found = kmeans(vectors.reshape(-1, 1), k, seed=seed, n_init=1)
    bits = vectors.numel() * _index_bits(k) + 32 * k
    return Compressed(found.codebook[found.assignment].view_as(vectors), bits)


def product_quantisation(vectors: torch.Tensor, parts: int, k: int, *, seed: int = 0) -> Compressed:
    """W cut into ``parts`` near-equal sub-vectors, each with a codebook of k of its own."""
    import torch

    from metacluster.clustering import kmeans

    count, size = vectors.shape
    if not 1 <= parts <= size:
        raise UserError(f"{parts} parts of vectors of {size} numbers: give 1 to {size}")
    pieces, bits = [], 0
    for piece in vectors.tensor_split(parts, 1):
        found = kmeans(piece, k, seed=seed)
        pieces.append(found.codebook[found.assignment])
        bits += count * _index_bits(k) + 32 * k * piece.shape[1]
    return Compressed(torch.cat(pieces, 1), bits)


def uniform_quantisation(vectors: torch.Tensor, bits: int) -> Compressed:
    """Signed integers of ``bits`` bits, symmetric, with a float32 scale for each of the W columns."""
    if not 2 <= bits <= 16:
        raise UserError(f"integers of {bits} bits: give 2 to 16")
    _finite(vectors)
    most = 2 ** (bits - 1) - 1
    scale = vectors.abs().amax(0).clamp(min=1e-12) / most
    rounded = (vectors / scale).round().clamp(-most, most) * scale
    return Compressed(rounded, vectors.numel() * bits + 32 * vectors.shape[1])


def magnitude_pruning(vectors: torch.Tensor, keep: float) -> Compressed:
    """All but the share ``keep`` of largest coefficients set to 0; stored as a bit mask and the kept values."""
    import torch

    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep}: give a share above 0 and at most 1")
    _finite(vectors)
    count = max(1, round(keep * vectors.numel()))
    kept = vectors.abs().flatten().topk(count).indices
    pruned = torch.zeros_like(vectors).flatten()
    pruned[kept] = vectors.flatten()[kept]
    return Compressed(pruned.view_as(vectors), 32 * count + vectors.numel())


def gaussian_mixture(vectors: torch.Tensor, k: int, *, seed: int = 0) -> Compressed:
    """A Gaussian mixture with diagonal covariances instead of K-means; every edge takes the mean of its component."""
    import warnings

    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    _finite(vectors, k)
    x = vectors.double().cpu().numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = GaussianMixture(k, covariance_type="diag", random_state=seed).fit_predict(x)
    return _from_labels(vectors, torch.from_numpy(labels), k)


def agglomerative(vectors: torch.Tensor, k: int, *, most: int = 5000) -> Compressed:
    """Ward's clustering of at most ``most`` edges (a fixed draw); the others go to the nearest centroid."""
    import torch
    from sklearn.cluster import AgglomerativeClustering

    _finite(vectors, k)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(vectors), generator=generator)[:most]
    if k > len(chosen):
        raise UserError(f"{k} clusters from a draw of {len(chosen)} edges: give {len(chosen)} or less")
    labels = AgglomerativeClustering(k).fit_predict(vectors[chosen].double().cpu().numpy())
    drawn = vectors[chosen]
    centroids = torch.stack([drawn[torch.from_numpy(labels == c)].mean(0) for c in range(k)])
    return _from_labels(vectors, torch.cdist(vectors, centroids).argmin(1), k)


def post_hoc_meta_learner(
    vectors: torch.Tensor, d_emb: int, d_hidden: int, *, seed: int = 0, steps: int = 1000, lr: float = 1e-2
) -> Compressed:
    """Embeddings and a meta-learner fitted to coefficients that were trained without one (a reviewer's question)."""
    import torch

    from metacluster.edges import MetaLearner

    _finite(vectors)
    vectors = vectors.detach()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        learner = MetaLearner(d_emb, d_hidden, vectors.shape[1]).to(vectors)
        mean, std = vectors.mean(0), vectors.std().clamp(min=1e-12)
        target = (vectors - mean) / std
        # the first principal axes place the edges well from the start
        _, _, directions = torch.linalg.svd(target, full_matrices=False)
        start = target @ directions[: min(d_emb, len(directions))].T
        z = torch.zeros(len(vectors), d_emb, dtype=vectors.dtype)
        z[:, : start.shape[1]] = start / start.std(0).clamp(min=1e-12)
        z.requires_grad_()
        optimizer = torch.optim.Adam([z, *learner.parameters()], lr=lr)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            (learner(z) - target).square().mean().backward()
            optimizer.step()
        fitted = learner(z).detach() * std + mean
    bits = 32 * (z.numel() + sum(p.numel() for p in learner.parameters()))
    return Compressed(fitted, bits)


def _from_labels(vectors: torch.Tensor, labels: torch.Tensor, k: int) -> Compressed:
    """Every edge takes the mean of its cluster."""
    import torch

    sums = torch.zeros(k, vectors.shape[1], dtype=torch.float64).index_add_(0, labels, vectors.double().cpu())
    means = sums / torch.bincount(labels, minlength=k).clamp(min=1).unsqueeze(1)
    bits = len(vectors) * _index_bits(k) + 32 * means.numel()
    return Compressed(means[labels].to(vectors), bits)


def _index_bits(k: int) -> int:
    return max(1, (k - 1).bit_length())


def _finite(vectors: torch.Tensor, k: int = 1) -> None:
    import torch

    if not 1 <= k <= len(vectors):
        raise UserError(f"{k} clusters for {len(vectors)} edges: give 1 to {len(vectors)}")
    if not bool(torch.isfinite(vectors).all()):
        raise UserError("coefficients are not finite: training has diverged; lower the learning rate")
