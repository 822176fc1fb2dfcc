"""The three stages of MetaCluster in one run: meta-learner, K-means, codebook (Section 3 of the paper).

Stage 1 trains embeddings and meta-learner (or, with ``edges="direct"``, the coefficients themselves) for ``epochs``;
K-means then turns the network into a codebook and indices; stage 3 trains the codebook for ``finetune_epochs``.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import broadcast
from metazoo import checkpoint, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions
from torch import nn

from metacluster import data
from metacluster.clustering import attach_meta_learner, compress, finetune_codebook, layer_groups
from metacluster.config import PRESETS, CompressOptions, Config
from metacluster.edges import ClusteredEdges, DirectEdges
from metacluster.model import KAN, MLP, ConvKAN, kan_layers
from metacluster.packing import compression_report, load_packed, save_packed

LEAST_NORMED = 8  # inputs: LayerNorm over fewer columns loses too much of them (over one: all)


@dataclass
class Run:
    """A trained (or training) MetaCluster: ``model`` after stage 1, ``clustered`` after stage 3 (None for an MLP),
    ``residual`` the within-cluster / total variance of each layer at K-means."""

    folder: Path
    config: Config
    model: nn.Module
    clustered: nn.Module | None
    residual: dict[str, float]
    dataset: data.Dataset
    metrics: list[dict[str, Any]]


def basis_settings(config: Config) -> dict[str, Any]:
    """The basis that ``config`` describes, as :func:`metacluster.bases.make` takes it."""
    sizes = {
        "bspline": {"grid": config.grid, "order": config.order},
        "rbf": {"centres": config.centres},
        "fourier": {"frequencies": config.frequencies},
    }.get(config.basis, {"degree": config.degree})
    found: dict[str, Any] = {"name": config.basis, **sizes}
    if config.input_range is not None and config.basis in ("bspline", "rbf"):
        found["low"], found["high"] = config.input_range
    return found


def build_model(config: Config, dataset: data.Dataset) -> nn.Module:
    """The network of ``config`` for the inputs and outputs of ``dataset``, seeded by the config.

    Raises:
        UserError: a convolution for data that are no images, or more clusters than a layer has edges.
    """
    outputs = 1 if dataset.classes is None else len(dataset.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.model == "conv":
            if len(dataset.shape) != 3:
                raise UserError(
                    f"--model conv needs images, but {dataset.name} has {dataset.shape[0]} columns: use kan"
                )
            model: nn.Module = ConvKAN(
                dataset.shape[0], outputs, config.channels, config.strides, basis_settings(config), scale=config.scale
            )
        else:
            sizes = [math.prod(dataset.shape), *config.hidden, outputs]
            if config.model == "mlp":
                return MLP(sizes)
            model = KAN(
                sizes,
                basis_settings(config),
                scale=config.scale,
                norm=config.norm != "none" and sizes[0] >= LEAST_NORMED,
                affine=config.norm == "affine",
            )
    for name, layer in kan_layers(model).items():
        layer.recompute = config.recompute
        if config.scope == "layer" and config.clusters > layer.count:
            raise UserError(
                f"--clusters is {config.clusters}, but {name} has {layer.count} edges: use at most {layer.count}, or "
                "--scope model"
            )
    if config.edges == "meta":
        attach_meta_learner(model, config.embedding_size, config.meta_hidden, scope=config.meta_scope, seed=config.seed)
    return model


def empty_codebooks(model: nn.Module, config: Config) -> nn.Module:
    """A copy of ``model`` with codebooks of zeros: what stage 3 trains, before K-means has filled it."""
    clustered = copy.deepcopy(model)
    for group in layer_groups(clustered, config.scope):
        if config.clusters > sum(layer.count for layer in group):
            raise UserError(f"--clusters is {config.clusters}, but the network has fewer edges: use fewer")
        codebook = nn.Parameter(torch.zeros(config.clusters, group[0].vector_size))
        for layer in group:
            layer.edges = ClusteredEdges(codebook, torch.zeros(layer.count, dtype=torch.int64))
    return clustered


def inputs_of(config: Config, x: torch.Tensor) -> torch.Tensor:
    """Examples as the network takes them: images for a convolution, else flat."""
    return x if config.model == "conv" else x.flatten(1)


def losses_of(classes: tuple[str, ...] | None, outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """The loss of each example [B]: cross-entropy, or squared error of regression."""
    if classes is None:
        return (outputs - y).square().mean(1)
    return F.cross_entropy(outputs, y, reduction="none")


class MetaClusterLearner:
    """One optimizer step at a time, through all stages.

    Args:
        config: the run's config. dataset: what to train on. accelerator: device and processes.

    Raises:
        UserError: config and data do not fit.
    """

    def __init__(self, config: Config, dataset: data.Dataset, accelerator: Accelerator) -> None:
        self.config, self.dataset, self.accelerator = config, dataset, accelerator
        device = accelerator.device
        self.model = build_model(config, dataset).to(device)
        self.clustered = None if config.model == "mlp" else empty_codebooks(self.model, config).to(device)
        embeddings = [p for name, p in self.model.named_parameters() if name.endswith("edges.embedding")]
        others = [p for name, p in self.model.named_parameters() if not name.endswith("edges.embedding")]
        groups = [
            {"params": others, "lr": config.lr, "weight_decay": config.weight_decay},
            {"params": embeddings, "lr": config.embedding_lr, "weight_decay": config.embedding_weight_decay},
        ]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]])
        self.starts = [group["lr"] for group in self.optimizer.param_groups]
        self.finetuning = torch.optim.Adam(
            [torch.zeros(())] if self.clustered is None else self.clustered.parameters(), lr=config.finetune_lr
        )
        self.residual = torch.zeros(len(kan_layers(self.model)))
        count = len(dataset.x_train)
        self.batch_size = min(config.batch_size, count)
        if config.model == "conv" and self.batch_size < accelerator.num_processes * config.accumulation:
            raise UserError(  # batch norm adds up over processes: each needs as many parts as the others
                f"{self.batch_size} images a step for {accelerator.num_processes} processes x {config.accumulation} "
                "parts: use a larger --batch-size or a smaller --accumulation"
            )
        self.batches = count // self.batch_size  # what is left over is drawn in another epoch
        self.first_steps = config.epochs * self.batches
        self.steps = self.first_steps + (0 if self.clustered is None else config.finetune_epochs * self.batches)
        self._order: tuple[int, torch.Tensor] = (-1, torch.empty(0))

    def state(self) -> Mapping[str, checkpoint.Stateful]:
        state: dict[str, checkpoint.Stateful] = {
            "model": self.model,
            "optimizer": self.optimizer,
            "clusters": checkpoint.TensorState(residual=self.residual),
        }
        if self.clustered is not None:
            state |= {"clustered": self.clustered, "finetuning": self.finetuning}
        return state

    def step(self, step: int) -> dict[str, Any]:
        """Step ``step``, counted over stages 1 and 3; K-means comes before the first one of stage 3."""
        first = step < self.first_steps
        if step == self.first_steps:
            self.cluster()
        model = self.model if first else self.clustered
        assert model is not None
        optimizer = self.optimizer if first else self.finetuning
        self._set_learning_rate(step)
        model.train()
        optimizer.zero_grad()
        loss = self.backward(model, self.draw(step))
        optimizer.step()
        return {
            "loss": loss,
            "stage": 1 if first else 3,
            "epoch": step // self.batches,
            "lr": optimizer.param_groups[0]["lr"],
            "residual": self.residual,
        }

    def draw(self, step: int) -> torch.Tensor:
        """Indices of the examples of one step [B]: a slice of the epoch's own permutation."""
        epoch, batch = divmod(step, self.batches)
        if self._order[0] != epoch:
            generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + epoch)
            self._order = (epoch, torch.randperm(len(self.dataset.x_train), generator=generator))
        return self._order[1][batch * self.batch_size : (batch + 1) * self.batch_size]

    def backward(self, model: nn.Module, chosen: torch.Tensor) -> torch.Tensor:
        """Gradient of the mean loss of the examples ``chosen`` [B] over all processes and parts; returns that loss."""
        total = torch.zeros((), device=self.accelerator.device)
        for part in loop.share(chosen, self.accelerator, self.config.accumulation):
            x = inputs_of(self.config, self.dataset.x_train[part]).to(self.accelerator.device)
            y = self.dataset.y_train[part].to(self.accelerator.device)
            with self.accelerator.autocast():
                outputs = model(x)
            loss = losses_of(self.dataset.classes, outputs.float(), y).sum() / len(chosen)
            self.accelerator.backward(loss)
            total += loss.detach()
        loop.sum_gradients([p for p in model.parameters() if p.requires_grad], self.accelerator)
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        return total

    @torch.no_grad()
    def cluster(self) -> None:
        """Stage 2, in place: codebooks and assignments by K-means, dense parameters as stage 1 left them."""
        assert self.clustered is not None
        config = self.config
        found = compress(
            self.model,
            config.clusters,
            scope=config.scope,
            seed=config.seed,
            n_init=config.kmeans_starts,
            standardise=config.standardise,
        )
        state = found.state_dict()
        if self.accelerator.num_processes > 1:  # the same in all processes, whatever their float errors
            state = broadcast(state)
        self.clustered.load_state_dict(state)
        self.residual.copy_(torch.tensor(list(residual_of(self.model, self.clustered).values())))

    def _set_learning_rate(self, step: int) -> None:
        config = self.config
        if step >= self.first_steps:
            share = (step - self.first_steps) / (self.steps - self.first_steps)
            for group in self.finetuning.param_groups:
                group["lr"] = config.finetune_lr * (1 + math.cos(math.pi * share)) / 2
            return
        factor = 1.0
        if config.schedule == "cosine":
            factor = (1 + math.cos(math.pi * step / self.first_steps)) / 2
        elif config.schedule == "exponential":
            factor = config.gamma ** (step // self.batches)
        for group, start in zip(self.optimizer.param_groups, self.starts, strict=True):
            group["lr"] = start * factor


@torch.no_grad()
def residual_of(model: nn.Module, clustered: nn.Module) -> dict[str, float]:
    """Within-cluster / total variance of each layer's coefficients under the assignment of ``clustered``."""
    found = {}
    before, after = kan_layers(model), kan_layers(clustered)
    for name, layer in before.items():
        vectors = layer.edges().double()
        error = (vectors - after[name].edges().double()).square().sum()
        found[name] = (error / (vectors - vectors.mean(0)).square().sum().clamp(min=1e-300)).item()
    return found


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Train, cluster and fine-tune; also under ``accelerate launch -m metacluster.train PRESET …`` and torchrun.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/metacluster-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, model/ (the uncompressed
        network), compressed/ (codebooks and packed indices) and a plot.

    Raises:
        UserError: the config does not fit the data, or the folder holds another run.
    """
    options = loop.with_folder(options or RunOptions(), loop.default_folder("metacluster", "small"))
    assert options.output_dir is not None
    accelerator = loop.prepare(options, seed=config.seed, precision=config.precision)
    learner = MetaClusterLearner(config, data.load(config), accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=accelerator.is_main_process)
    try:
        metrics = loop.fit(learner, folder, accelerator, steps=learner.steps, options=options, name="metacluster")
        run = finished(folder.path, learner, metrics)
        if accelerator.is_main_process:
            _finish(run)
    finally:
        folder.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def load(path: Path | str) -> Run:
    """The run in the folder ``path``, at its last good checkpoint.

    Raises:
        UserError: it is not a run folder, or has no good checkpoint, or has not reached stage 2.
    """
    path = Path(path)
    config = runfolder.open_run(path, Config)
    accelerator = loop.prepare(RunOptions(), seed=config.seed)
    learner = MetaClusterLearner(config, data.load(config), accelerator)
    step = checkpoint.restore(path / "checkpoints", learner.state())
    if not step:
        raise UserError(f"{path} has no checkpoint yet: train it first")
    if step < learner.steps:
        raise UserError(f"{path} is at step {step} of {learner.steps}: finish it with --resume first")
    return finished(path, learner, list(runfolder.read_metrics(path / "metrics.jsonl")))


def finished(path: Path, learner: MetaClusterLearner, metrics: list[dict[str, Any]]) -> Run:
    """The Run of a learner that has done all its steps."""
    if learner.clustered is not None and learner.config.finetune_epochs == 0:
        learner.cluster()  # there was no step of stage 3 to come before
    names = kan_layers(learner.model)
    return Run(
        folder=path,
        config=learner.config,
        model=learner.model.eval(),
        clustered=None if learner.clustered is None else learner.clustered.eval(),
        residual=dict(zip(names, learner.residual.tolist(), strict=True)),
        dataset=learner.dataset,
        metrics=metrics,
    )


@torch.no_grad()
def materialised(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose layers have coefficients of their own: an ordinary KAN."""
    plain = copy.deepcopy(model)
    for layer in kan_layers(plain).values():
        layer.edges = DirectEdges(layer.edges().clone())
    return plain


def _finish(run: Run) -> None:
    """Save both networks, and draw the training."""
    from metacluster import plots

    model = materialised(run.model).cpu()
    assert isinstance(model, (KAN, ConvKAN, MLP))
    model.save_pretrained(run.folder / "model")
    if run.clustered is not None:
        save_packed(run.clustered, run.folder / "compressed")
    plots.training(run, run.folder / "training.png")


class Batches:
    """(x, y) of the training set, in another order each time they are gone through."""

    def __init__(self, config: Config, dataset: data.Dataset, device: torch.device) -> None:
        self.config, self.dataset, self.device, self.epoch = config, dataset, device, 0
        self.batch_size = min(config.batch_size, len(dataset.x_train))

    def __len__(self) -> int:
        return len(self.dataset.x_train) // self.batch_size

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.dataset.x_train), generator=generator)
        for chosen in order.split(self.batch_size)[: len(self)]:
            x = inputs_of(self.config, self.dataset.x_train[chosen])
            yield x.to(self.device), self.dataset.y_train[chosen].to(self.device)


def recompress(
    run: Run, *, clusters: int | None = None, scope: str | None = None, finetune_epochs: int | None = None
) -> nn.Module:
    """Stages 2 and 3 again on a finished run, with another K or scope; None keeps the run's own.

    Raises:
        UserError: the run is of an MLP, or K is larger than a layer's edges.
    """
    if run.clustered is None:
        raise UserError(f"{run.folder} is a run of an MLP: it has no edges to cluster")
    config = run.config
    model = compress(
        run.model,
        config.clusters if clusters is None else clusters,
        scope=scope or config.scope,  # type: ignore[arg-type]
        seed=config.seed,
        n_init=config.kmeans_starts,
        standardise=config.standardise,
    )
    epochs = config.finetune_epochs if finetune_epochs is None else finetune_epochs
    batches = Batches(config, run.dataset, next(model.parameters()).device)
    batches.epoch = config.epochs  # the same order as the run's own stage 3

    def loss(outputs: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return losses_of(run.dataset.classes, outputs, y).mean()

    return finetune_codebook(model, batches, loss, epochs=epochs, lr=config.finetune_lr)


def compress_run(options: CompressOptions) -> dict[str, Any]:
    """`metacluster compress`: another K for a finished run, written as a folder that load_packed reads."""
    from metacluster.evaluate import score

    if options.finetune_epochs is not None and options.finetune_epochs < 0:
        raise UserError(f"--finetune-epochs is {options.finetune_epochs}: give 0 or more")
    run = load(options.run)
    clusters = run.config.clusters if options.clusters is None else options.clusters
    scope = options.scope or run.config.scope
    folder = options.output or options.run / f"compressed-{clusters}-{scope}"
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is no empty folder: give another --output, or remove it")
    model = recompress(run, clusters=clusters, scope=scope, finetune_epochs=options.finetune_epochs)
    path = save_packed(model, folder, half=options.half)
    stored = load_packed(folder).to(next(model.parameters()).device)
    report = compression_report(model, codebook_width=16 if options.half else 32)
    return {
        **{f"{name}_before": value for name, value in score(run.model, run.config, run.dataset).items()},
        **{f"{name}_compressed": value for name, value in score(stored, run.config, run.dataset).items()},
        "factor": report.factor,
        "factor_of_coefficients": report.edge_factor,
        "file_bytes": path.stat().st_size,
        "written": str(folder),
    }


if __name__ == "__main__":
    import sys

    from metacluster.cli import main

    sys.argv[1:1] = ["train"]
    main()
