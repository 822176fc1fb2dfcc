"""MetaCluster's idea: a meta-learner that keeps coefficients on a curve, then K-means on them (Section 3 of the paper).

1. :func:`attach_meta_learner`: every edge's coefficients are emitted by M_θ from a small embedding z_e. Trained by the
   task's loss alone, ordinary back-propagation, no stop-gradient and no clustering loss.
2. :func:`compress`: K-means in coefficient space; an edge keeps the index of its centroid. M_θ and z are dropped.
3. :func:`finetune_codebook`: the centroids are trained on, with the assignment held.

Shapes: E edges, W = |w| coefficients of an edge, K centroids. With d_emb = 1 and H hidden units all coefficient vectors
lie on a polyline of at most H + 1 pieces in R^W, which is why few centroids suffice.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from metazoo.errors import UserError
from sklearn.cluster import KMeans
from sklearn.exceptions import ConvergenceWarning
from torch import nn

from metacluster.bits import bits_for
from metacluster.edges import ClusteredEdges, MetaEdges, MetaLearner
from metacluster.model import KANLayer, kan_layers

Scope = Literal["layer", "model"]
SAMPLE = 1 << 16  # edges that the starts of K-means are compared on


def attach_meta_learner(
    model: nn.Module, d_emb: int = 1, d_hidden: int = 32, *, scope: Scope = "layer", seed: int = 0
) -> nn.Module:
    """Stage 1: let a meta-learner emit the coefficients of every KAN layer of ``model``, in place.

    z ~ N(0, 1); b₁ ~ N(0, 0.5²), as with b₁ = 0 and d_emb = 1 all kinks of the ReLUs would lie at z = 0; W₁ and W₂
    Xavier normal, W₂ and b₂ then set so that the emitted coefficients start with the layer's own mean and variance.

    Args:
        model: any module that holds KANLinear or KANConv2d.
        d_emb: size of z. d_hidden: hidden units of M_θ. scope: one M_θ a layer, or one for all. seed: of the weights.

    Returns:
        The model.

    Raises:
        UserError: sizes below 1, no KAN layer, or one meta-learner for layers with vectors of several sizes.
    """
    if min(d_emb, d_hidden) < 1:
        raise UserError(f"a meta-learner with d_emb {d_emb} and d_hidden {d_hidden}: give 1 or more of each")
    generator = torch.Generator().manual_seed(seed)
    for group in layer_groups(model, scope):
        size = group[0].vector_size
        learner = MetaLearner(d_emb, d_hidden, size)
        z = [torch.randn(layer.count, d_emb, generator=generator) for layer in group]
        with torch.no_grad():
            for linear in (learner.hidden, learner.out):
                deviation = math.sqrt(2 / sum(linear.weight.shape))
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) * deviation)
            learner.hidden.bias.copy_(0.5 * torch.randn(d_hidden, generator=generator))
            learner.out.bias.zero_()
            emitted = learner(torch.cat(z))
            start = [layer.start() for layer in group]
            mean, spread = (torch.stack(part).mean(0) for part in zip(*start, strict=True))
            factor = spread / emitted.std(0).mean().clamp(min=1e-12) if len(emitted) > 1 else spread
            learner.out.weight.mul_(factor.unsqueeze(1))
            learner.out.bias.copy_(mean - (emitted * factor).mean(0))
        for layer, embedding in zip(group, z, strict=True):
            layer.edges = MetaEdges(embedding, learner).to(next(layer.parameters()))
    return model


@dataclass(frozen=True)
class Clusters:
    """A codebook [K, W], the centroid of each edge (int64 [E]), and within-cluster / total variance."""

    codebook: torch.Tensor
    assignment: torch.Tensor
    residual: float


@torch.no_grad()
def kmeans(vectors: torch.Tensor, k: int, *, seed: int = 0, n_init: int = 4, standardise: bool = False) -> Clusters:
    """Stage 2: K-means in coefficient space, Euclidean, k-means++ starts (scikit-learn's Lloyd).

    With more than 65 536 edges the starts are compared on as many edges (at least 256 K of them), and the best one goes
    on over all edges.

    Args:
        vectors: [E, W]. k: centroids; as many as distinct vectors, or more, lose nothing.
        n_init: starts, of which the least inertia is kept.
        standardise: divide each column by its standard deviation for the distances (the codebook keeps its units).

    Raises:
        UserError: k below 1 or above E, or vectors that are not finite.
    """
    count = len(vectors)
    if not 1 <= k <= count:
        raise UserError(f"{k} clusters for {count} edges: give 1 to {count}")
    bits_for(k)
    x = vectors.detach().float().cpu().numpy()
    finite = np.isfinite(x).all(1)
    if not finite.all():
        raise UserError(
            f"coefficients of edge {int(np.argmin(finite))} are not finite ({int((~finite).sum())} of {count} edges): "
            "training has diverged; lower the learning rate"
        )
    rows, inverse = _distinct(x, k)
    if rows is not None:
        codebook = np.concatenate([rows, np.repeat(rows[-1:], k - len(rows), 0)])
        return Clusters(torch.from_numpy(codebook).to(vectors), torch.from_numpy(inverse).to(vectors.device), 0.0)
    scaled = x / x.std(0).clip(min=1e-12) if standardise else x
    labels = _lloyd(scaled, k, seed, n_init)
    sums = np.zeros((k, x.shape[1]))
    for column in range(x.shape[1]):
        sums[:, column] = np.bincount(labels, weights=x[:, column], minlength=k)
    sizes = np.bincount(labels, minlength=k)
    codebook = sums / np.maximum(sizes, 1)[:, None]
    error = ((x - codebook[labels]) ** 2).sum()
    total = ((x - x.mean(0, dtype=np.float64)) ** 2).sum()
    return Clusters(
        torch.from_numpy(codebook).to(vectors),
        torch.from_numpy(labels.astype(np.int64)).to(vectors.device),
        float(error / total) if total > 0 else 0.0,
    )


def _lloyd(x: np.ndarray, k: int, seed: int, n_init: int) -> np.ndarray:
    sample = max(SAMPLE, 256 * k)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct vectors than k in the sample
        if len(x) <= sample:
            return KMeans(k, n_init=n_init, tol=0, random_state=seed).fit(x).labels_
        chosen = np.random.default_rng(seed).choice(len(x), sample, replace=False)
        starts = KMeans(k, n_init=n_init, max_iter=20, random_state=seed).fit(x[chosen])
        return KMeans(k, init=starts.cluster_centers_, n_init=1, max_iter=10).fit(x).labels_


def _distinct(x: np.ndarray, k: int) -> tuple[np.ndarray | None, np.ndarray]:
    """The distinct rows and each row's place among them, if there are at most k; else None."""
    direction = np.random.default_rng(0).standard_normal(x.shape[1])
    if len(np.unique(x.astype(np.float64) @ direction)) > k:  # cheap, and rows that differ here do differ
        return None, np.empty(0, dtype=np.int64)
    rows, inverse = np.unique(x, axis=0, return_inverse=True)
    if len(rows) > k:
        return None, np.empty(0, dtype=np.int64)
    return rows, inverse.reshape(-1).astype(np.int64)


@torch.no_grad()
def compress(
    model: nn.Module, k: int, *, scope: Scope = "layer", seed: int = 0, n_init: int = 4, standardise: bool = False
) -> nn.Module:
    """A copy of ``model`` whose KAN layers share K coefficient vectors; the meta-learner is dropped.

    Args:
        model: any module that holds KANLinear or KANConv2d; stays as it is.
        k: centroids of a codebook. scope: a codebook a layer, or one for all. seed, n_init, standardise: of
            :func:`kmeans`.

    Raises:
        UserError: no KAN layer, K above the number of a layer's edges, or coefficients that are not finite.
    """
    clustered = copy.deepcopy(model)
    copies = _layers_of(clustered)
    for group in layer_groups(clustered, scope):
        members = [name for name, layer in copies.items() if any(layer is other for other in group)]
        stacked = torch.cat([copies[name].edges() for name in members])
        if k > len(stacked):
            raise UserError(
                f"{k} clusters, but {', '.join(members)} has {len(stacked)} edges: use {len(stacked)} clusters at most"
            )
        found = kmeans(stacked, k, seed=seed, n_init=n_init, standardise=standardise)
        codebook = nn.Parameter(found.codebook)
        parts = found.assignment.split([copies[name].count for name in members])
        for name, assignment in zip(members, parts, strict=True):
            copies[name].edges = ClusteredEdges(codebook, assignment)
    return clustered


@torch.no_grad()
def residuals(model: nn.Module, k: int, *, seed: int = 0) -> dict[str, float]:
    """Within-cluster / total variance of each layer's coefficients after K-means with k centroids."""
    return {
        name: kmeans(layer.edges(), min(k, layer.count), seed=seed).residual
        for name, layer in _layers_of(model).items()
    }


class Batches(Protocol):
    """(x, y) pairs, gone through once an epoch: a list, a DataLoader."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]: ...


def finetune_codebook(
    model: nn.Module,
    batches: Batches,
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    *,
    epochs: int = 4,
    lr: float = 1e-3,
) -> nn.Module:
    """Stage 3: train the codebooks (and what else is dense: norms, biases) with the assignment held, in place.

    Adam, whose step does not grow with the number of edges whose gradients a centroid adds up; cosine to 0.

    Args:
        model: from :func:`compress`. batches: (x, y) pairs, counted. loss: of (outputs, y).

    Raises:
        UserError: no layer is clustered, or the loss is not finite.
    """
    if not any(isinstance(layer.edges, ClusteredEdges) for layer in kan_layers(model).values()):
        raise UserError("no layer is clustered yet: call compress first")
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    total = max(1, epochs * len(batches))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (1 + math.cos(math.pi * step / total)) / 2)
    model.train()
    for epoch in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            value = loss(model(x), y)
            if not torch.isfinite(value):
                raise UserError(f"the loss became {value.item()} in epoch {epoch}: lower lr ({lr})")
            value.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def _layers_of(model: nn.Module) -> dict[str, KANLayer]:
    layers = kan_layers(model)
    if not layers:
        raise UserError("the model has no KAN layer (KANLinear, KANConv2d): there is nothing to cluster")
    return layers


def layer_groups(model: nn.Module, scope: Scope) -> list[list[KANLayer]]:
    """Layers that share a meta-learner or a codebook.

    Raises:
        UserError: no KAN layer, or one codebook for layers with vectors of several sizes.
    """
    layers = _layers_of(model)
    if scope == "layer":
        return [[layer] for layer in layers.values()]
    if scope != "model":
        raise UserError(f'unknown scope {scope!r}: "layer" or "model"')
    if len({layer.vector_size for layer in layers.values()}) > 1:
        raise UserError('the layers have coefficient vectors of several sizes: use scope "layer"')
    return [list(layers.values())]
