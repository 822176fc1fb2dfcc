"""A run's accuracy before clustering, after K-means and after fine-tuning; its sizes; other compressions beside it."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from metazoo import runfolder
from metazoo.errors import UserError
from torch import nn

from metacluster import baselines, data
from metacluster.config import Config, EvaluateOptions
from metacluster.edges import ClusteredEdges, DirectEdges
from metacluster.model import kan_layers, outside_shares
from metacluster.packing import compression_report
from metacluster.train import Run, inputs_of, load

BATCH = 1000


@torch.no_grad()
def predict(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Outputs [N, O] for inputs [N, ...], in batches, on the CPU."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    outputs = torch.cat([model(part.to(device)).cpu() for part in x.split(BATCH)])
    model.train(was_training)
    return outputs


def score(model: nn.Module, config: Config, dataset: data.Dataset) -> dict[str, float]:
    """On the test set: accuracy in percent, or rmse in standard deviations of the target."""
    outputs = predict(model, inputs_of(config, dataset.x_test))
    if dataset.classes is None:
        return {"rmse": (outputs - dataset.y_test).square().mean().sqrt().item()}
    return {"accuracy": 100 * (outputs.argmax(1) == dataset.y_test).float().mean().item()}


@torch.no_grad()
def at_kmeans(model: nn.Module, clustered: nn.Module) -> nn.Module:
    """``clustered`` as K-means left it: centroids are the means of their members' coefficients in ``model``, dense
    parameters those of ``model``."""
    fresh = copy.deepcopy(model)
    after = kan_layers(clustered)
    members: dict[int, list[str]] = {}
    for name, layer in after.items():
        assert isinstance(layer.edges, ClusteredEdges)
        members.setdefault(id(layer.edges.codebook), []).append(name)
    layers = kan_layers(fresh)
    for names in members.values():
        edges = [after[name].edges for name in names]
        vectors = torch.cat([layers[name].edges() for name in names])
        assignment = torch.cat([e.assignment for e in edges if isinstance(e, ClusteredEdges)])
        shape = edges[0].codebook.shape  # type: ignore[union-attr]
        sums = torch.zeros(shape, dtype=torch.float64, device=vectors.device).index_add_(
            0, assignment, vectors.double()
        )
        counts = torch.bincount(assignment, minlength=shape[0]).clamp(min=1)
        codebook = nn.Parameter((sums / counts.unsqueeze(1)).to(vectors.dtype))
        for name, e in zip(names, edges, strict=True):
            assert isinstance(e, ClusteredEdges)
            layers[name].edges = ClusteredEdges(codebook, e.assignment)
    return fresh


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Test score at every stage, and where the bits are.

    Returns:
        accuracy_before (percent; rmse_before of a regression), accuracy_clustered, accuracy_finetuned;
        drop_at_clustering and change_by_compression (finetuned − before); residual (within-cluster / total variance)
        by layer; factor, factor_of_coefficients, bytes, bytes_uncompressed; parameters trained in stage 1 and of the
        network that they emit; outside_LAYER, the share of inputs outside the basis's range, where there are any.
        Also written to evaluation.json in the run folder, with plots.

    Warns:
        UserWarning: more than 5 % of a layer's inputs leave the range of its B-splines or radial functions.

    Raises:
        UserError: not a run folder, an unfinished run, or no good checkpoint.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    config, dataset = run.config, run.dataset
    found: dict[str, Any] = {}
    (metric, before), *_ = score(run.model, config, dataset).items()
    found[f"{metric}_before"] = before
    found["parameters_trained"] = sum(p.numel() for p in run.model.parameters())
    if run.clustered is None:
        found["bytes"] = 4 * found["parameters_trained"]
    else:
        found |= _compressed(run, metric, before)
        device = next(run.model.parameters()).device
        shares = outside_shares(run.model, inputs_of(config, dataset.x_test[:BATCH]).to(device))
        found |= {f"outside_{name}": share for name, share in shares.items() if share > 0}
        far = [f"{100 * share:.1f} % of the inputs of {name}" for name, share in shares.items() if share > 0.05]
        if far:
            mend = "widen --input-range" if config.norm != "none" else "widen --input-range or use --norm plain"
            warnings.warn(
                f"{', '.join(far)} leave the range of the basis, far from which an edge is its base term alone: {mend}",
                stacklevel=2,
            )
    if options.baselines:
        found |= compare(run)
    runfolder.write_text(run.folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    if options.plots and run.clustered is not None:
        from metacluster import plots

        plots.curves(run, run.folder / "curves.png")
        plots.coefficients(run, run.folder / "coefficients.png")
        plots.against_k(run, run.folder / "against_k.png")
    return found


def _compressed(run: Run, metric: str, before: float) -> dict[str, Any]:
    assert run.clustered is not None
    clustered = score(at_kmeans(run.model, run.clustered), run.config, run.dataset)[metric]
    finetuned = score(run.clustered, run.config, run.dataset)[metric]
    report = compression_report(run.clustered)
    layers = kan_layers(run.model)
    coefficients = sum(layer.count * layer.vector_size for layer in layers.values())
    return {
        f"{metric}_clustered": clustered,
        f"{metric}_finetuned": finetuned,
        "drop_at_clustering": clustered - before if metric == "rmse" else before - clustered,
        "change_by_compression": finetuned - before,
        **{f"residual_{name}": value for name, value in run.residual.items()},
        "factor": report.factor,
        "factor_of_coefficients": report.edge_factor,
        "bytes": report.bits / 8,
        "bytes_uncompressed": (report.dense_bits + report.dense_other_bits) / 8,
        "parameters_of_the_network": coefficients + report.other_bits // 32,
    }


@torch.no_grad()
def compare(run: Run) -> dict[str, float]:
    """Other compressions of the same uncompressed network, none fine-tuned: score and factor of the coefficients.

    Raises:
        UserError: the run is of an MLP.
    """
    if run.clustered is None:
        raise UserError(f"{run.folder} is a run of an MLP: it has no edges to compress")
    layers = kan_layers(run.model)
    dense_bits = sum(32 * layer.count * layer.vector_size for layer in layers.values())
    k, seed = run.config.clusters, run.config.seed
    methods = {
        "scalar_kmeans": lambda v: baselines.scalar_clustering(v, k, seed=seed),
        "product_quantisation": lambda v: baselines.product_quantisation(
            v, min(3, v.shape[1]), min(k, len(v)), seed=seed
        ),
        "int8": lambda v: baselines.uniform_quantisation(v, 8),
        "int4": lambda v: baselines.uniform_quantisation(v, 4),
        "pruned_to_10_percent": lambda v: baselines.magnitude_pruning(v, 0.1),
        "gaussian_mixture": lambda v: baselines.gaussian_mixture(v, min(k, len(v)), seed=seed),
        "agglomerative": lambda v: baselines.agglomerative(v, min(k, len(v))),
        "post_hoc_meta_learner": lambda v: baselines.post_hoc_meta_learner(
            v, run.config.embedding_size, run.config.meta_hidden, seed=seed
        ),
    }
    own = at_kmeans(run.model, run.clustered)
    ((metric, value),) = score(own, run.config, run.dataset).items()
    found = {f"kmeans_{metric}": value, "kmeans_factor": compression_report(own).edge_factor}
    for name, method in methods.items():
        model = copy.deepcopy(run.model)
        bits = 0
        for layer in kan_layers(model).values():
            compressed = method(layer.edges().cpu())
            layer.edges = DirectEdges(compressed.coefficients.clone()).to(next(run.model.parameters()).device)
            bits += compressed.bits
        ((metric, value),) = score(model, run.config, run.dataset).items()
        found[f"{name}_{metric}"] = value
        found[f"{name}_factor"] = dense_bits / bits
    for width in (8, 4):  # on top of the codebook
        model = copy.deepcopy(run.clustered)
        bits, seen = 0, set()
        for layer in kan_layers(model).values():
            assert isinstance(layer.edges, ClusteredEdges)
            bits += layer.edges.count * layer.edges.bits
            if id(layer.edges.codebook) in seen:
                continue
            seen.add(id(layer.edges.codebook))
            rounded = baselines.uniform_quantisation(layer.edges.codebook.cpu(), width)
            layer.edges.codebook.copy_(rounded.coefficients)
            bits += rounded.bits
        ((metric, value),) = score(model, run.config, run.dataset).items()
        found[f"metacluster_int{width}_{metric}"] = value
        found[f"metacluster_int{width}_factor"] = dense_bits / bits
    return found
