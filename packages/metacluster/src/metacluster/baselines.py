"""What the paper compares MetaCluster with, and what its reviewers asked for.

The trained ones are configs that go through the same loop (train.py). The others compress trained coefficients [E, W]
without training on: E edges, W = |w| coefficients of an edge. All raise UserError for coefficients that are no matrix
or not finite, and for more clusters than there are things to cluster; all repeat exactly for the same seed.
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
    """An MLP of one hidden layer, of at least one unit, whose float32 parameters take the nearest to ``bits``."""
    width = max(1, round((bits / 32 - outputs) / (inputs + outputs + 1)))
    return replace(config, model="mlp", hidden=(width,))


@dataclass(frozen=True)
class Compressed:
    """Reconstructed coefficients [E, W] and the bits that they take."""

    coefficients: torch.Tensor
    bits: int


def scalar_clustering(vectors: torch.Tensor, k: int, *, seed: int = 0) -> Compressed:
    """One codebook of k scalars for all coefficients (weight sharing as in deep compression of MLPs).

    Raises:
        UserError: k is not within 1 … E·W.
    """
    from metacluster.clustering import kmeans

    vectors = _checked(vectors)
    if not 1 <= k <= vectors.numel():
        raise UserError(f"{k} clusters for {vectors.numel()} coefficients: give 1 to {vectors.numel()}")
    found = kmeans(vectors.reshape(-1, 1), k, seed=seed, n_init=1)
    bits = vectors.numel() * _index_bits(k) + 32 * k
    return Compressed(found.codebook[found.assignment].view_as(vectors), bits)


def product_quantisation(vectors: torch.Tensor, parts: int, k: int, *, seed: int = 0) -> Compressed:
    """W cut into ``parts`` near-equal sub-vectors, each with a codebook of k of its own.

    Raises:
        UserError: parts is not within 1 … W, or k not within 1 … E.
    """
    import torch

    from metacluster.clustering import kmeans

    vectors = _checked(vectors, k)
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
    """Signed integers of ``bits`` bits, symmetric, with a float32 scale for each of the W columns.

    Raises:
        UserError: bits is not within 2 … 16.
    """
    import torch

    if not 2 <= bits <= 16:
        raise UserError(f"integers of {bits} bits: give 2 to 16")
    vectors = _checked(vectors)
    most = 2 ** (bits - 1) - 1
    scale = (vectors.abs().amax(0).float() / most).clamp(min=torch.finfo(torch.float32).tiny)  # zeros stay zeros
    rounded = (vectors / scale).round().clamp(-most, most) * scale
    return Compressed(rounded.to(vectors), vectors.numel() * bits + 32 * len(scale))


def magnitude_pruning(vectors: torch.Tensor, keep: float) -> Compressed:
    """All but the share ``keep`` of largest coefficients set to 0; stored as a bit mask and the kept values.

    At least one coefficient is kept.

    Raises:
        UserError: keep is not above 0 and at most 1.
    """
    import torch

    if not 0 < keep <= 1:
        raise UserError(f"keep is {keep}: give a share above 0 and at most 1")
    vectors = _checked(vectors)
    count = max(1, round(keep * vectors.numel()))
    kept = vectors.abs().flatten().topk(count).indices
    pruned = torch.zeros_like(vectors).flatten()
    pruned[kept] = vectors.flatten()[kept]
    return Compressed(pruned.view_as(vectors), 32 * count + vectors.numel())


def gaussian_mixture(vectors: torch.Tensor, k: int, *, seed: int = 0) -> Compressed:
    """A Gaussian mixture with diagonal covariances instead of K-means; every edge takes the mean of its component.

    Raises:
        UserError: k is not within 1 … E.
    """
    import warnings

    import torch
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    vectors = _checked(vectors, k)
    if k in (1, len(vectors)):
        return _trivial(vectors, k)
    x = vectors.double().cpu()
    # the variance that scikit-learn adds, 1e-6, is absolute: it would swallow clusters of small coefficients
    x = x - x.mean(0)
    x = x / x.square().mean().sqrt().clamp(min=1e-30)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        labels = GaussianMixture(k, covariance_type="diag", random_state=seed).fit_predict(x.numpy())
    return _from_labels(vectors, torch.from_numpy(labels), k)


def agglomerative(vectors: torch.Tensor, k: int, *, most: int = 5000) -> Compressed:
    """Ward's clustering of at most ``most`` edges (a fixed draw); then all go to the nearest of its centroids.

    Every edge takes the mean of its cluster.

    Raises:
        UserError: k is not within 1 … E, or above ``most``.
    """
    import torch
    from sklearn.cluster import AgglomerativeClustering

    vectors = _checked(vectors, k)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(vectors), generator=generator)[:most]
    if k > len(chosen):
        raise UserError(f"{k} clusters from a draw of {len(chosen)} edges: give {len(chosen)} or less")
    if k in (1, len(vectors)):
        return _trivial(vectors, k)
    x = vectors.double().cpu()
    x = x - x.mean(0)  # distances below are taken by ‖x‖² - 2xc + ‖c‖², which a large mean would spoil
    drawn = x[chosen]
    labels = torch.from_numpy(AgglomerativeClustering(k).fit_predict(drawn.numpy()))
    centroids = torch.stack([drawn[labels == c].mean(0) for c in range(k)])
    nearest = torch.cat([torch.cdist(part, centroids).argmin(1) for part in torch.split(x, 1 << 16)])
    return _from_labels(vectors, nearest, k)


def post_hoc_meta_learner(
    vectors: torch.Tensor, d_emb: int, d_hidden: int, *, seed: int = 0, steps: int = 1000, lr: float = 1e-2
) -> Compressed:
    """Embeddings and a meta-learner fitted to coefficients that were trained without one (a reviewer's question).

    Adam on the mean squared error, cosine to 0.

    Raises:
        UserError: d_emb, d_hidden or steps below 1.
    """
    import torch

    from metacluster.edges import MetaLearner

    for what, value in (("d_emb", d_emb), ("d_hidden", d_hidden), ("steps", steps)):
        if value < 1:
            raise UserError(f"{what} is {value}: give 1 or more")
    vectors = _checked(vectors)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(seed)
        learner = MetaLearner(d_emb, d_hidden, vectors.shape[1]).to(vectors)
        mean = vectors.mean(0)
        std = (vectors - mean).square().mean().sqrt().clamp(min=1e-12)
        target = (vectors - mean) / std
        # the first principal axes place the edges well from the start
        _, _, directions = torch.linalg.svd(target, full_matrices=False)
        start = target @ directions[: min(d_emb, len(directions))].T
        z = vectors.new_zeros(len(vectors), d_emb)
        z[:, : start.shape[1]] = start / start.std(0, correction=0).clamp(min=1e-12)
        z.requires_grad_()
        optimizer = torch.optim.Adam([z, *learner.parameters()], lr=lr)
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.zero_grad()
            (learner(z) - target).square().mean().backward()
            optimizer.step()
        fitted = learner(z).detach() * std + mean
    # mean and standard deviation cost nothing: W2 and b2 take them in
    bits = 32 * (z.numel() + sum(p.numel() for p in learner.parameters()))
    return Compressed(fitted, bits)


def _from_labels(vectors: torch.Tensor, labels: torch.Tensor, k: int) -> Compressed:
    """Every edge takes the mean of its cluster."""
    import torch

    sums = torch.zeros(k, vectors.shape[1], dtype=torch.float64).index_add_(0, labels, vectors.double().cpu())
    means = sums / torch.bincount(labels, minlength=k).clamp(min=1).unsqueeze(1)
    bits = len(vectors) * _index_bits(k) + 32 * means.numel()
    return Compressed(means[labels].to(vectors), bits)


def _trivial(vectors: torch.Tensor, k: int) -> Compressed:
    """One cluster for all edges, or one for each (scikit-learn refuses to cluster a single edge)."""
    import torch

    labels = torch.arange(len(vectors)) if k == len(vectors) else torch.zeros(len(vectors), dtype=torch.int64)
    return _from_labels(vectors, labels, k)


def _index_bits(k: int) -> int:
    """As bits.bits_for: one cluster still takes a bit, which is what a packed file holds."""
    return max(1, (k - 1).bit_length())


def _checked(vectors: torch.Tensor, k: int = 1) -> torch.Tensor:
    """The vectors without their graph, if they are finite, a matrix, and can make k clusters."""
    import torch

    if vectors.ndim != 2 or not vectors.numel():
        raise UserError(f"coefficients of shape {list(vectors.shape)}: give [E, W], a row of numbers for each edge")
    if not 1 <= k <= len(vectors):
        raise UserError(f"{k} clusters for {len(vectors)} edges: give 1 to {len(vectors)}")
    if not bool(torch.isfinite(vectors).all()):
        raise UserError("coefficients are not finite: training has diverged; lower the learning rate")
    return vectors.detach()
