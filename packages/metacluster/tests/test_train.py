"""Training: stages, order of the data, gradients over parts and processes, the run folder, evaluation, the commands."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from metacluster import data
from metacluster.baselines import direct
from metacluster.config import PRESETS, CompressOptions, Config, EvaluateOptions, ReportOptions
from metacluster.edges import ClusteredEdges, MetaEdges
from metacluster.evaluate import at_kmeans, compare, evaluate, predict
from metacluster.model import KAN, ConvKAN, kan_layers
from metacluster.packing import CompressedKAN, load_packed, report
from metacluster.train import MetaClusterLearner, compress_run, inputs_of, load, recompress, residual_of, train
from metazoo import testing
from metazoo.errors import UserError
from metazoo.options import RunOptions

SCRIPT = str(Path(__file__).with_name("two_processes.py"))
TINY = Config(
    dataset="digits", train_size=200, hidden=(8,), clusters=4, epochs=7, finetune_epochs=3, batch_size=40, centres=4,
    meta_hidden=4,
)  # fmt: skip
CONV = dataclasses.replace(TINY, model="conv", channels=(4, 6), strides=(1, 2), basis="gram", degree=2, lr=1e-3)


def learner_of(config: Config, **changes: Any) -> MetaClusterLearner:
    config = dataclasses.replace(config, **changes)
    return MetaClusterLearner(config, data.load(config), Accelerator(cpu=True))


def trained(tmp_path: Path, config: Config = TINY, **changes: Any) -> Any:
    options = RunOptions(output_dir=tmp_path / "run", log_every=1)
    return train(dataclasses.replace(config, **changes), options)


def test_every_epoch_draws_every_example_once_in_an_order_of_its_own() -> None:
    """The order of the data follows from (seed, epoch): epochs are permutations, and differ."""
    learner = learner_of(TINY)
    epochs = [torch.cat([learner.draw(5 * epoch + i) for i in range(5)]) for epoch in range(2)]
    assert all(torch.equal(epoch.sort().values, torch.arange(200)) for epoch in epochs)
    assert not torch.equal(*epochs)
    assert torch.equal(learner.draw(3), learner_of(TINY).draw(3))


@pytest.mark.parametrize("config", [TINY, CONV], ids=["kan", "conv"])
def test_accumulated_gradient_is_the_gradient(config: Config) -> None:
    """One part or four: the same gradient (batch norm aside, which normalises each part: off here)."""
    grads = []
    for parts in (1, 4):
        learner = learner_of(config, accumulation=parts)
        learner.model.eval()
        loss = learner.backward(learner.model, torch.arange(37))
        grads.append([loss, *(p.grad for p in learner.model.parameters())])
    for one, many in zip(*grads, strict=True):
        assert torch.allclose(one, many, rtol=1e-4, atol=1e-6)


def test_recomputed_basis_gives_the_same_gradient() -> None:
    """`recompute` changes memory, not the gradient."""
    grads = []
    for recompute in (False, True):
        learner = learner_of(CONV, recompute=recompute)
        learner.backward(learner.model, torch.arange(20))
        grads.append([p.grad for p in learner.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    "config", [pytest.param(TINY, id="kan", marks=pytest.mark.faults), pytest.param(CONV, id="conv")]
)
def test_two_processes_train_as_one(tmp_path: Path, config: Config) -> None:
    """Fault 8 over 50 steps: in stage 1 losses equal up to float error, no drift; then the same clusters.

    An edge that lies between two centroids may fall to either, so stage 3 is compared less closely.
    """
    train(config, RunOptions(output_dir=tmp_path / "one", log_every=1, checkpoint_every=50))
    testing.torchrun(2, SCRIPT, str(tmp_path / "two"), json.dumps(dataclasses.asdict(config)))
    one, two = (testing.rows(tmp_path / name) for name in ("one", "two"))
    difference = np.array([a["loss"] - b["loss"] for a, b in zip(one, two, strict=True)])
    assert len(one) == 50
    assert np.abs(difference[:10]).max() < 1e-5
    assert np.abs(difference[:35]).max() < 1e-3
    assert abs(difference[:35].mean()) < 1e-4
    assert np.abs(difference[35:]).max() < 1e-2
    assert np.allclose(one[-1]["residual"], two[-1]["residual"], atol=1e-3)


def test_stages(tmp_path: Path) -> None:
    """Stage 1 trains embeddings and meta-learner, stage 3 the codebook alone; K-means lies between; the loss falls."""
    run = trained(tmp_path)
    assert [row["stage"] for row in run.metrics] == [1] * 35 + [3] * 15
    assert run.metrics[0]["residual"] == [0.0, 0.0]
    start = learner_of(TINY)
    for (name, before), after in zip(start.model.named_parameters(), run.model.parameters(), strict=True):
        assert not torch.equal(before, after), name
    assert np.mean([row["loss"] for row in run.metrics[30:35]]) < 0.7 * run.metrics[0]["loss"]
    clusters = at_kmeans(run.model, run.clustered)
    for name, layer in kan_layers(run.clustered).items():
        assert isinstance(layer.edges, ClusteredEdges)
        assert isinstance(kan_layers(run.model)[name].edges, MetaEdges)
        start_edges = kan_layers(clusters)[name].edges
        assert torch.equal(layer.edges.assignment, start_edges.assignment)
        assert not torch.equal(layer.edges.codebook, start_edges.codebook)
    assert run.residual == pytest.approx(residual_of(run.model, clusters), rel=1e-3)
    for name in (
        "config.json",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "model",
        "compressed",
        "training.png",
    ):
        assert (run.folder / name).exists(), name


def test_learning_rates_follow_their_schedules() -> None:
    """Both groups of stage 1 fall by the same cosine; stage 3 starts at its own rate and ends near 0."""
    learner = learner_of(TINY)
    rates = []
    for step in (0, 17, 34, 35, 49):
        learner._set_learning_rate(step)
        groups = learner.optimizer if step < 35 else learner.finetuning
        rates.append([group["lr"] for group in groups.param_groups])
    assert rates[0] == [TINY.lr, TINY.embedding_lr]
    assert rates[1][0] == pytest.approx(TINY.lr * (1 + np.cos(np.pi * 17 / 35)) / 2)
    assert rates[1][1] / rates[1][0] == pytest.approx(TINY.embedding_lr / TINY.lr)
    assert rates[3] == [TINY.finetune_lr]
    assert rates[4][0] < 0.02 * TINY.finetune_lr
    exponential = learner_of(TINY, schedule="exponential", gamma=0.5)
    exponential._set_learning_rate(12)
    assert exponential.optimizer.param_groups[0]["lr"] == pytest.approx(TINY.lr * 0.25)


def test_run_loads_as_it_was_and_so_do_both_networks(tmp_path: Path) -> None:
    """Run folder, hub layout and compressed folder give the same outputs."""
    run = trained(tmp_path)
    x = inputs_of(TINY, run.dataset.x_test)
    again = load(tmp_path / "run")
    assert torch.equal(predict(run.model, x), predict(again.model, x))
    assert torch.equal(predict(run.clustered, x), predict(again.clustered, x))
    assert again.residual == run.residual
    plain = KAN.from_pretrained(run.folder / "model")
    assert torch.allclose(predict(plain, x), predict(run.model, x), atol=1e-5)
    assert torch.equal(predict(load_packed(run.folder / "compressed"), x), predict(run.clustered, x))
    assert torch.equal(CompressedKAN.from_pretrained(run.folder / "compressed")(x), predict(run.clustered, x))


def test_conv_run_loads(tmp_path: Path) -> None:
    """The same with images, batch norm and Gram's β."""
    run = trained(tmp_path, CONV, epochs=2, finetune_epochs=1)
    x = run.dataset.x_test
    assert torch.equal(predict(load_packed(run.folder / "compressed"), x), predict(run.clustered, x))
    plain = ConvKAN.from_pretrained(run.folder / "model")
    assert torch.allclose(predict(plain, x), predict(run.model, x), atol=1e-5)


def test_evaluate(tmp_path: Path) -> None:
    """Metrics of all stages, their differences, files and pictures."""
    run = trained(tmp_path)
    found = evaluate(run, EvaluateOptions())
    assert found["drop_at_clustering"] == pytest.approx(found["accuracy_before"] - found["accuracy_clustered"])
    assert found["change_by_compression"] == pytest.approx(found["accuracy_finetuned"] - found["accuracy_before"])
    right = predict(run.clustered, inputs_of(TINY, run.dataset.x_test)).argmax(1) == run.dataset.y_test
    assert found["accuracy_finetuned"] == pytest.approx(100 * right.float().mean().item())
    assert found["bytes"] < found["bytes_uncompressed"]
    for name in ("evaluation.json", "curves.png", "coefficients.png", "against_k.png"):
        assert (run.folder / name).stat().st_size > 0, name


def test_compare_has_every_other_compression(tmp_path: Path) -> None:
    """Each has an accuracy and a factor above 1; 8 bits lose next to nothing, K-means agrees with the run's own."""
    run = trained(tmp_path, edges="direct", lr=3e-3)
    found = compare(run)
    own = evaluate(run, EvaluateOptions(plots=False))
    names = {key.removesuffix("_factor") for key in found if key.endswith("_factor")}
    assert {"kmeans", "scalar_kmeans", "product_quantisation", "int8", "int4", "gaussian_mixture"} <= names
    assert {"pruned_to_10_percent", "agglomerative", "post_hoc_meta_learner", "metacluster_int8"} <= names
    assert all(found[f"{name}_factor"] > 1 for name in names)
    assert abs(found["int8_accuracy"] - own["accuracy_before"]) < 2
    assert found["kmeans_accuracy"] == pytest.approx(own["accuracy_clustered"])


def test_recompress_repeats_the_run_and_takes_another_k(tmp_path: Path) -> None:
    """Without changes stages 2 and 3 give the run's own network again; with another K another codebook."""
    run = trained(tmp_path)
    again = recompress(run)
    for name, layer in kan_layers(run.clustered).items():
        other = kan_layers(again)[name]
        assert torch.equal(layer.edges.assignment, other.edges.assignment)
        assert torch.allclose(layer.edges.codebook, other.edges.codebook, atol=1e-5)
    larger = recompress(run, clusters=7, scope="model", finetune_epochs=0)
    codebooks = {id(layer.edges.codebook): layer.edges.codebook for layer in kan_layers(larger).values()}
    assert [tuple(codebook.shape) for codebook in codebooks.values()] == [(7, 5)]


def test_commands(tmp_path: Path) -> None:
    """`compress` writes a folder that `report` and load_packed read; float16 halves the codebook."""
    run = trained(tmp_path)
    found = compress_run(CompressOptions(run=run.folder, clusters=8, finetune_epochs=1))
    assert Path(found["written"]).name == "compressed-8-layer"
    full = report(ReportOptions(model=Path(found["written"])))
    assert full["bits_per_index"] == "3, 3"
    half = compress_run(CompressOptions(run=run.folder, clusters=8, half=True, output=tmp_path / "half"))
    assert half["file_bytes"] < found["file_bytes"]
    with pytest.raises(UserError, match="exists and is no empty folder"):
        compress_run(CompressOptions(run=run.folder, clusters=8, output=run.folder))
    with pytest.raises(UserError, match="0 clusters"):
        compress_run(CompressOptions(run=run.folder, clusters=0))
    assert full["file_bytes"] == (Path(found["written"]) / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "changes",
    [
        {"edges": "direct"},
        {"model": "mlp"},
        {"scope": "model", "meta_scope": "model"},
        {"basis": "bspline", "scale": True, "norm": "none"},
        {"basis": "fourier", "embedding_size": 2},
        {"basis": "chebyshev", "norm": "affine", "standardise": True},
        {"dataset": "sine-sum", "dimension": 3, "train_size": 300, "basis": "bspline", "norm": "none"},
        {"finetune_epochs": 0},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
def test_every_kind_trains(changes: dict[str, Any], tmp_path: Path) -> None:
    """Baselines, bases, scopes and regression go through the same loop; losses stay finite, evaluation works."""
    run = trained(tmp_path, **{"epochs": 2, "finetune_epochs": 1, **changes})
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
    again = load(run.folder)
    x = inputs_of(run.config, run.dataset.x_test)
    assert torch.equal(predict(run.model, x), predict(again.model, x))
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # after 2 epochs inputs may be anywhere
        found = evaluate(run, EvaluateOptions(plots=False))
    assert any(key.endswith("_before") for key in found)


def test_few_columns_are_not_normalised() -> None:
    """LayerNorm over one column would be 0 for every example."""
    narrow = learner_of(dataclasses.replace(TINY, dataset="sine-sum", dimension=7, basis="bspline"))
    wide = learner_of(dataclasses.replace(TINY, dataset="sine-sum", dimension=8, basis="bspline"))
    assert all(layer.norm is None for layer in kan_layers(narrow.model).values())
    assert all(layer.norm is not None for layer in kan_layers(wide.model).values())


def test_pictures_and_comparison_are_of_the_runs_own_clustering(tmp_path: Path) -> None:
    """One codebook for all layers: `compare` counts it once, and its K-means is the run's."""
    run = trained(tmp_path, scope="model")
    found, own = compare(run), evaluate(run, EvaluateOptions())
    assert found["kmeans_accuracy"] == own["accuracy_clustered"]
    assert found["kmeans_factor"] == own["factor_of_coefficients"]


def test_inputs_outside_the_range_are_told(tmp_path: Path) -> None:
    """B-splines that end at 0.1: a warning with layer and share, and the share among the metrics."""
    run = trained(tmp_path, basis="bspline", norm="none", input_range=(-0.1, 0.1), epochs=1, finetune_epochs=0)
    with pytest.warns(UserWarning, match=r"% of the inputs of layers\.0, .* leave the range of the basis"):
        found = evaluate(run, EvaluateOptions(plots=False))
    assert found["outside_layers.0"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clusters": 81}, "--clusters is 81, but layers.1 has 80 edges"),
        ({"clusters": 0}, "--clusters is 0"),
        ({"clusters": 65537}, "indices hold at most 16 bits"),
        ({"embedding_size": 0}, "--embedding-size is 0"),
        ({"grid": 0}, "--grid is 0"),
        ({"lr": 0.0}, "--lr is 0"),
        ({"weight_decay": -1.0}, "--weight-decay is -1"),
        ({"gamma": 2.0}, "--gamma is 2"),
        ({"seed": -1}, "--seed is -1"),
        ({"model": "conv", "strides": (1, 1, 1, 1), "batch_size": 2, "accumulation": 3}, "2 images a step"),
        ({"input_range": (1.0, -1.0)}, "--input-range"),
        ({"model": "conv", "strides": (1,)}, "--strides"),
        ({"model": "conv", "dataset": "exp-sine"}, "needs images"),
        ({"scope": "model", "clusters": 9999}, "fewer edges"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        learner_of(TINY, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_diverged_coefficients_are_refused_at_kmeans() -> None:
    """NaN in a coefficient: one line that names the edge, instead of a codebook of NaN."""
    learner = learner_of(direct(TINY))
    with torch.no_grad():
        next(iter(kan_layers(learner.model).values())).edges.coefficients[3, 1] = float("nan")
    with pytest.raises(UserError, match="coefficients of edge 3 are not finite"):
        learner.cluster()


def test_unfinished_run_is_refused(tmp_path: Path) -> None:
    """Evaluating a run that was stopped before its end says how to finish it."""
    run = trained(tmp_path)
    for path in (run.folder / "checkpoints").iterdir():
        if path.name == "step-00000050":
            path.rename(path.with_name("step-00000020"))
            testing.rewrite(
                path.with_name("step-00000020"), lambda tensors, body: body.replace('"step":50', '"step":20')
            )
        else:
            shutil.rmtree(path)
    with pytest.raises(UserError, match="--resume"):
        load(run.folder)


def test_small_preset_is_the_claims(tmp_path: Path) -> None:
    """The preset that users run: 13 184 edges of 9 numbers, K = 16, factor 61.3 (check 8)."""
    from metacluster.packing import compression_report

    learner = learner_of(PRESETS["small"])
    found = compression_report(learner.clustered)
    assert (found.edges, found.other_bits) == (13184, 0)
    assert found.edge_factor == pytest.approx(61.3, abs=0.05)


@pytest.mark.gpu
def test_gpu_takes_the_same_step(tmp_path: Path) -> None:
    """The gradient on CUDA is the CPU's up to float error, and a bf16 run stays finite."""
    grads = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        learner = MetaClusterLearner(CONV, data.load(CONV), Accelerator(cpu=cpu))
        learner.backward(learner.model, torch.arange(40))
        grads.append(torch.cat([p.grad.flatten().cpu() for p in learner.model.parameters()]))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trained(tmp_path, CONV, precision="bf16", epochs=2, finetune_epochs=1)
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
