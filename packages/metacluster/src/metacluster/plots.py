"""Pictures of a run: training, the shared curves, the clouds of coefficients, residual and score against K."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from metacluster.edges import ClusteredEdges
from metacluster.model import KANLayer, kan_layers

if TYPE_CHECKING:
    from metacluster.train import Run

# Okabe and Ito's colours, told apart by every eye
COLOURS = ["#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#555555"]


def _save(figure: Figure, path: Path) -> None:
    FigureCanvasAgg(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def training(run: Run, path: Path) -> None:
    """Loss over the stages of ``run``."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    for stage, colour, label in ((1, COLOURS[0], "stage 1: meta-learner"), (3, COLOURS[3], "stage 3: codebook")):
        rows = [row for row in run.metrics if row["stage"] == stage]
        if stage == 1 and run.config.edges == "direct":
            label = "stage 1: coefficients"
        if rows:
            steps, losses = np.array([row["step"] for row in rows]), np.array([row["loss"] for row in rows])
            axes.plot(steps, losses, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(steps, _smooth(losses), color=colour, label=label)
    first = next((row["step"] for row in run.metrics if row["stage"] == 3), None)
    if first is not None:
        axes.axvline(first, color="#555555", linestyle=":", label=f"K-means, K = {run.config.clusters}")
    axes.set(xlabel="step", ylabel="loss of the batch", yscale="log")
    axes.legend()
    _save(figure, path)


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean of the last few values at each place."""
    width = max(1, len(values) // 40)
    sums = np.cumsum(np.concatenate([np.zeros(1), values]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - width)
    return (sums[ends] - sums[starts]) / (ends - starts)


@torch.no_grad()
def _curves(layer: KANLayer, vectors: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """The curves [N, points] that coefficient vectors [N, W] stand for in ``layer``."""
    spline, base = layer.effective(vectors)
    y = spline @ layer.basis(x).T
    if base is not None:
        y = y + base.unsqueeze(1) * torch.nn.functional.silu(x)
    return y.cpu().numpy()


@torch.no_grad()
def curves(run: Run, path: Path, most: int = 16) -> None:
    """Some edges' curves before clustering, and the shared ones after fine-tuning, per layer; line width shows how many
    edges share a curve."""
    assert run.clustered is not None
    layers, clustered = kan_layers(run.model), kan_layers(run.clustered)
    names = list(layers)[:4]
    figure = Figure(figsize=(9, 2.6 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), 2, squeeze=False, sharex="row", sharey="row")
    for row, name in zip(grid, names, strict=True):
        layer, edges = layers[name], clustered[name].edges
        assert isinstance(edges, ClusteredEdges)
        device = edges.codebook.device
        low, high = (layer.basis.low, layer.basis.high) if layer.basis.__class__.__name__ in _RANGED else (-2.0, 2.0)
        x = torch.linspace(low, high, 200, device=device)
        vectors = layer.edges()
        chosen = torch.linspace(0, len(vectors) - 1, min(60, len(vectors)), device=device).long()
        for y in _curves(layer, vectors[chosen], x):
            row[0].plot(x.cpu(), y, color=COLOURS[0], alpha=0.35, linewidth=0.7)
        sizes = torch.bincount(edges.assignment, minlength=len(edges.codebook)).float()
        largest = sizes.argsort(descending=True)[:most]
        shown = _curves(clustered[name], edges.codebook[largest], x)
        for y, size in zip(shown, sizes[largest], strict=True):
            row[1].plot(x.cpu(), y, color=COLOURS[3], linewidth=0.6 + 5 * float(size / sizes.sum()))
        row[0].set_title(f"{name}: {len(chosen)} of {len(vectors)} edges", fontsize=9)
        shared = f"{len(largest)} of {len(edges.codebook)}" if len(largest) < len(edges.codebook) else str(len(largest))
        row[1].set_title(f"{name}: {shared} shared curves", fontsize=9)
        row[0].set_ylabel("value of an edge")
    for axes in grid[-1]:
        axes.set_xlabel("input of the edge (after its norm)")
    _save(figure, path)


_RANGED = ("BSpline", "GaussianRBF")


@torch.no_grad()
def coefficients(run: Run, path: Path) -> None:
    """Each layer's coefficients on their first two principal axes, with the centroids of K-means."""
    assert run.clustered is not None
    from metacluster.evaluate import at_kmeans

    layers, clustered = kan_layers(run.model), kan_layers(at_kmeans(run.model, run.clustered))
    names = list(layers)[:4]
    figure = Figure(figsize=(4.2 * len(names), 3.8), layout="constrained")
    row = figure.subplots(1, len(names), squeeze=False)[0]
    for axes, name in zip(row, names, strict=True):
        edges = clustered[name].edges
        assert isinstance(edges, ClusteredEdges)
        _cloud(axes, layers[name].edges().cpu().numpy(), edges.codebook.cpu().numpy())
        axes.set_title(f"{name}: residual {run.residual[name]:.3g}", fontsize=10)
    _save(figure, path)


def _cloud(axes: Any, vectors: np.ndarray, centroids: np.ndarray) -> None:
    mean = vectors.mean(0)
    _, _, directions = np.linalg.svd(vectors[:: max(1, len(vectors) // 5000)] - mean, full_matrices=False)
    plane = directions[:2].T
    points, centres = (vectors - mean) @ plane, (centroids - mean) @ plane
    shown = points[:: max(1, len(points) // 4000)]
    axes.scatter(shown[:, 0], shown[:, 1], s=3, alpha=0.4, color=COLOURS[0], linewidths=0, label="edges")
    axes.scatter(centres[:, 0], centres[:, 1], s=28, marker="x", color=COLOURS[3], label="centroids")
    axes.set(xlabel="first principal axis", ylabel="second")
    axes.legend(fontsize=8, loc="best")


@torch.no_grad()
def against_k(run: Run, path: Path) -> None:
    """Residual of K-means, and the test score after it (no fine-tuning), for K = 1, 2, 4 …"""
    from metacluster.clustering import compress
    from metacluster.evaluate import score
    from metacluster.train import residual_of

    layers = kan_layers(run.model)
    most = min(256, *(layer.count for layer in layers.values()))
    ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= most]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    config = run.config
    models = [
        compress(
            run.model,
            k,
            scope=config.scope,
            seed=config.seed,
            n_init=config.kmeans_starts,
            standardise=config.standardise,
        )
        for k in ks
    ]
    found = [residual_of(run.model, model) for model in models]
    for i, name in enumerate(layers):
        values = [max(row[name], 1e-6) for row in found]
        left.plot(ks, values, marker="o", markersize=3, color=COLOURS[i % len(COLOURS)], label=name)
    left.set(yscale="log", xlabel="K", ylabel="within-cluster / total variance")
    left.legend(fontsize=8)
    scores = [score(model, config, run.dataset) for model in models]
    (metric,) = scores[0]
    right.plot(ks, [row[metric] for row in scores], marker="o", markersize=3, color=COLOURS[3], label="after K-means")
    (before,) = score(run.model, run.config, run.dataset).values()
    right.axhline(before, color=COLOURS[0], linestyle="--", label="before clustering")
    unit = "%" if metric == "accuracy" else "standard deviations of the target"
    right.set(xlabel="K", ylabel=f"test {metric}, {unit}")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    _save(figure, path)


def stages(cells: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """Accuracy of each arm before clustering, after K-means and after fine-tuning; a thin line a seed."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    keys = ("before", "clustered", "finetuned")
    for i, (arm, rows) in enumerate(cells.items()):
        values = np.array([[row[key] for key in keys] for row in rows])
        colour = COLOURS[i % len(COLOURS)]
        axes.plot(range(3), values.T, color=colour, alpha=0.25, linewidth=0.8)
        axes.plot(range(3), values.mean(0), color=colour, marker="o", label=f"{arm} ({len(rows)} seeds)")
    axes.set_xticks(range(3), ["uncompressed", "after K-means", "codebook fine-tuned"])
    axes.set(ylabel="test accuracy, %")
    axes.legend()
    _save(figure, path)


def compression(points: Mapping[str, tuple[Sequence[float], Sequence[float]]], path: Path) -> None:
    """Test accuracy against how many times smaller the coefficients are: name -> (factors, accuracies), one a seed."""
    figure = Figure(figsize=(8.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for i, (name, (factors, accuracies)) in enumerate(points.items()):
        colour, marker = COLOURS[i % len(COLOURS)], "os^vDPX*<>"[i % 10]
        low, mean, high = np.min(accuracies), np.mean(accuracies), np.max(accuracies)
        axes.errorbar(
            np.mean(factors), mean, yerr=[[mean - low], [high - mean]], color=colour, marker=marker, capsize=3,
            linestyle="", label=name,
        )  # fmt: skip
    axes.set(
        xlabel="compression factor of the coefficients",
        ylabel="test accuracy, % (mean; least to greatest of the seeds)",
    )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)
