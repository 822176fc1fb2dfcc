"""Cross-batch training: single frames first for a tiny CLIP, then episodes of two batches, and averages by epoch."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from metazoo import checkpoint, inner, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions
from torch import Tensor, nn
from torch.nn import functional as F

from open_mede import baselines, data
from open_mede.baselines import ResidualProjector
from open_mede.config import PRESETS, Config
from open_mede.crossbatch import Step, cross_batch_step, virtual_step
from open_mede.data import Data, VideoClips
from open_mede.ensemble import averages_of, warn_outside
from open_mede.model import FeatureClassifier, Learner, VideoTextClassifier, is_new, load_model

Weights = dict[str, Tensor]


@dataclass
class Run:
    """A trained learner, with its data and the rows of metrics.jsonl.

    Attributes:
        model: with the final weights, which --average and --mix choose.
        weights: of what was trained: last, gwa, swa, ema, and start, CLIP's own.
    """

    folder: Path
    config: Config
    model: Learner
    data: Data
    metrics: list[dict[str, Any]]
    weights: dict[str, Weights] = field(default_factory=dict)

    def use(self, average: str | None = None) -> Learner:
        """The model with an average's weights [default: the run's], mixed with CLIP's by --mix."""
        chosen = self.weights.get(average or self.config.average)
        if chosen is not None:
            _put(self.model, mixed(chosen, self.weights.get("start"), self.config.mix))
        return self.model


def mixed(weights: Weights, start: Weights | None, share: float) -> Weights:
    """share · θ₀ + (1 − share) · θ, Open-VCLIP's last step; θ where the share is 0, and of what CLIP does not have."""
    if not share:
        return weights
    assert start is not None
    return {name: value if is_new(name) else value.lerp(start[name], share) for name, value in weights.items()}


def _put(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    held = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            held[name].copy_(value)


def steps_per_epoch(config: Config, clips: int) -> int:
    """Whole batches of an epoch.

    Raises:
        UserError: fewer than two, where a batch needs another.
    """
    found = clips // config.batch
    least = 2 if config.method in ("meta", "two-batch") else 1
    if found < least:
        raise UserError(
            f"{clips} training clips are {found} batches of {config.batch}, --method {config.method} needs {least} or "
            "more: give a smaller --batch, or more clips"
        )
    return found


class CrossBatchMetaTrainer:
    """One step at a time: on single frames, where a config has them, then on pairs of batches (Section 3.2).

    Args:
        config: what to train.
        source: the data.
        accelerator: of this process.

    Raises:
        UserError: config, data and model do not fit.
    """

    def __init__(self, config: Config, source: Data, accelerator: Accelerator) -> None:
        self.config, self.source, self.accelerator = config, source, accelerator
        self.learns = config.method != "frozen"
        self._check()
        self.model = load_model(config, source.features)
        self.trained = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        self.projector: ResidualProjector | None = None
        if self.learns and config.method == "distill":
            width = self.model.encode_texts(self._classes()[:1]).shape[1]
            self.projector = ResidualProjector(width)
        self.model.to(accelerator.device)
        if self.projector is not None:
            self.projector.to(accelerator.device)
        if config.checkpointing and isinstance(self.model, VideoTextClassifier):
            self.model.backbone.vision_model.activation_checkpointing_enable({"use_reentrant": False})
        for clips in (source.train, *source.tests.values()):
            if isinstance(clips, VideoClips) and isinstance(self.model, VideoTextClassifier):
                clips.size = self.model.size
        if self.learns and isinstance(source.train, VideoClips):
            source.train.training([0], [config.seed, 11, 0])  # what cannot be read at all is said before a run begins
        if self.learns:
            assert source.train is not None
            self.per_epoch = steps_per_epoch(config, len(source.train))
        self.parameters = [*self.trained.values(), *(self.projector.parameters() if self.projector is not None else ())]
        self.optimizer = self._optimizer()
        self.averages = averages_of(config) if self.learns and config.trained != "lora" else {}
        if self.learns and accelerator.is_main_process:
            warn_outside(config.epochs, config.mu)
        needs_start = config.method in ("interp", "distill", "l2-sp") or config.mix > 0 or config.image_steps > 0
        self.start = checkpoint.TensorState(
            **({name: value.detach().clone() for name, value in self.trained.items()} if needs_start else {})
        )
        self.image_optimizer: torch.optim.Optimizer | None = None
        if config.image_steps:
            assert isinstance(self.model, VideoTextClassifier)
            learned = [value for name, value in self.model.backbone.named_parameters() if not is_new(name)]
            self.image_optimizer = torch.optim.AdamW(learned, lr=config.image_lr, weight_decay=0.01, fused=True)
            self.image_parameters = learned
        self.texts: Tensor | None = None
        self._loaded: dict[tuple[int, int, int], Any] = {}
        self._reader = ThreadPoolExecutor(1) if isinstance(source.train, VideoClips) else None

    def _classes(self) -> tuple[str, ...]:
        if self.source.train is not None:
            return self.source.train.classes
        return next(iter(self.source.tests.values())).classes

    def _check(self) -> None:
        config, train = self.config, self.source.train
        if not self.learns:
            return
        if train is None or not len(train):
            raise UserError(f"{config.dataset}: no training clips: give some, or --method frozen")
        if len(train.classes) < 2:
            raise UserError(f"{config.dataset}: one class to train on, {train.classes[0]!r}: give clips of more")
        if config.order == "second" and self.accelerator.num_processes > 1:
            raise UserError("--order second is for one process: give --order first")

    def _optimizer(self) -> torch.optim.Optimizer:
        config = self.config
        decays = [value for value in self.parameters if value.ndim > 1]
        others = [value for value in self.parameters if value.ndim <= 1]
        if config.optimizer == "sgd":
            return torch.optim.SGD(self.parameters, lr=config.lr, momentum=config.momentum)
        groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.lr, fused=True)

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs."""
        found: dict[str, checkpoint.Stateful] = {"model": self.model, "optimizer": self.optimizer}
        if self.projector is not None:
            found["projector"] = self.projector
        if self.start.tensors:
            found["start"] = self.start
        if self.image_optimizer is not None:
            found["image_optimizer"] = self.image_optimizer
        return found | {f"average_{name}": one for name, one in self.averages.items() if name != "last"}

    @property
    def steps(self) -> int:
        """In all."""
        return self.config.image_steps + (self.per_epoch * self.config.epochs if self.learns else 0)

    # ---- a step

    def step(self, step: int) -> dict[str, Any]:
        """Train once; ``step`` counts from 0.

        Returns:
            loss, of the support batch; query_loss at θ′ and cosine of both gradients (meta, two-batch); gain and
            cosine_at of :func:`open_mede.crossbatch.virtual_step` (at --watch-every); lr, grad_norm, epoch; skipped,
            videos that this process could not read since it began; phase 0 on single frames, 1 after.
        """
        if step < self.config.image_steps:
            return self._image_step(step)
        done = step - self.config.image_steps
        if done == 0 and self.config.image_steps:  # the learner starts where single frames ended
            assert isinstance(self.model, VideoTextClassifier)
            with torch.random.fork_rng(devices=[]):  # alike, whatever the method has drawn before
                torch.manual_seed(self.config.seed)
                self.model.start_new_parts(blank=False)
            with torch.no_grad():
                for name, value in self.trained.items():
                    self.start.tensors[name].copy_(value)
        self._require(self.trained.values())
        epoch, number = divmod(done, self.per_epoch)
        rate = self._rate(done)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.texts is None:  # texts are frozen: encoded once
            self.model.eval()
            self.texts = self.model.encode_texts(self._classes(), self.config.templates)
        self.model.train()
        row = self._gradient(epoch, number, done)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if number == self.per_epoch - 1:
            for name, average in self.averages.items():
                if name != "last":
                    average.update(self.trained)
        if isinstance(self.source.train, VideoClips):
            row["skipped"] = len(self.source.train.skipped)
        return {**row, "lr": rate, "grad_norm": norm, "epoch": epoch + 1, "phase": 1}

    def _require(self, wanted: Any) -> None:
        ids = {id(value) for value in wanted}
        for value in self.model.parameters():
            value.requires_grad_(id(value) in ids)

    def _rate(self, done: int) -> float:
        config = self.config
        warm, total = config.warmup_epochs * self.per_epoch, config.epochs * self.per_epoch
        if done < warm:
            return config.lr * (done + 1) / (warm + 1)
        if config.schedule == "cosine":
            return config.lr * (1 + math.cos(math.pi * (done - warm) / max(1, total - warm))) / 2
        return config.lr

    def _gradient(self, epoch: int, number: int, done: int) -> dict[str, Any]:
        """Put the method's gradient into ``.grad``."""
        config = self.config
        reduce = self._sum if self.accelerator.num_processes > 1 else None
        self._loaded = {key: one for key, one in self._loaded.items() if key[0] > epoch or key[1] >= number}
        support = self._batch(epoch, number, 0)
        if config.method in ("meta", "two-batch"):
            query = self._query(epoch, number)
            alpha = config.alpha if config.method == "meta" else 0.0
            row: dict[str, Any] = {}
            if config.watch_every and (done + 1) % config.watch_every == 0:
                seen = virtual_step(self.model, self._loss, support, query, alpha=config.alpha, reduce=reduce)
                row = {"gain": seen.gain, "cosine_at": seen.cosine, "query_loss_at": seen.query_loss}
            found: Step = cross_batch_step(
                self.model, self._loss, support, query, alpha=alpha, delta=config.delta,
                first_order=config.order == "first", reduce=reduce,
            )  # fmt: skip
            return {"loss": found.support_loss, "query_loss": found.query_loss, "cosine": found.cosine, **row}
        self._ahead(epoch, number)
        # what CLIP does not have is not pulled anywhere
        of_clip = {name: value for name, value in self.trained.items() if not is_new(name)}
        if config.method == "interp":
            share = float(np.random.default_rng([config.seed, 10, done]).uniform(0, config.interp_max))
            start = [self.start.tensors[name] if name in of_clip else value for name, value in self.trained.items()]
            loss, gradient = baselines.interpolated_gradient(
                self._loss, support, list(self.trained.values()), start, share, config.interp_weight, reduce
            )
        else:
            of = self._distilled if config.method == "distill" else self._loss
            loss, gradient = baselines.gradient_of(of, support, self.parameters, reduce)
        for parameter, one in zip(self.parameters, gradient, strict=True):
            parameter.grad = one
        if config.method == "l2-sp":
            baselines.add_anchor(list(of_clip.values()), [self.start.tensors[name] for name in of_clip], config.anchor)
        return {"loss": loss}

    def _sum(self, tensors: Sequence[Tensor]) -> None:
        """Over all processes, in place, in one message."""
        flat = torch.cat([one.flatten() for one in tensors])
        flat = self.accelerator.reduce(flat, reduction="sum")
        for one, summed in zip(tensors, flat.split([one.numel() for one in tensors]), strict=True):
            one.copy_(summed.view_as(one))

    def _loss(self, batch: tuple[Tensor, Tensor, int]) -> Tensor:
        """Cross-entropy of a share of a batch: its sum over the size of the whole."""
        inputs, labels, size = batch
        with self.accelerator.autocast():
            logits = self.model(inputs, self.texts)
        return F.cross_entropy(logits.float(), labels, reduction="sum") / size

    def _distilled(self, batch: tuple[Tensor, Tensor, int]) -> Tensor:
        """With the distance of projected features to CLIP's."""
        inputs, labels, size = batch
        assert self.projector is not None
        assert self.texts is not None
        frozen = self._of_clip(inputs)
        with self.accelerator.autocast():
            features = self.model.video_features(inputs)
            logits = self.model.logits(features, self.texts)
        far = baselines.distillation_loss(features["frames"], frozen, self.projector)
        loss = F.cross_entropy(logits.float(), labels, reduction="sum")
        return (loss + self.config.distill_weight * far.sum()) / size

    @torch.no_grad()
    def _of_clip(self, inputs: Tensor) -> Tensor:
        """CLIP's own features [B, T, d]: at θ₀ without new parts, frame by frame, where nothing is dropped."""
        model = self.model
        apart = model.frame_by_frame() if isinstance(model, VideoTextClassifier) else contextlib.nullcontext()
        model.eval()
        with apart, self.accelerator.autocast():
            own = {
                f"model.{name}": torch.zeros_like(value) if is_new(name) else value
                for name, value in self.start.tensors.items()
            }
            found: Tensor = inner.call(_Features(model), own, inputs)
        model.train()
        return found

    # ---- batches

    def _query(self, epoch: int, number: int) -> list[Any]:
        """Of the batch that a step is judged on; the last of an epoch is judged on its first."""
        query = self.config.query
        if query == "next":
            following = (number + 1) % self.per_epoch
            found = self._batch(epoch, following, 0)
            if following:
                self._ahead(epoch, following)
            elif epoch + 1 < self.config.epochs:
                self._ahead(epoch + 1, -1)
            return found
        self._ahead(epoch, number)
        if query == "shuffle":
            return self._batch(epoch, number, 1)
        train = self.source.train
        assert train is not None
        seen = set(train.labels[self._indices(epoch, number, 0)].tolist())
        order = np.roll(
            data.batches(len(train), self.config.batch, epoch, self.config.seed, 1), -number, axis=0
        ).ravel()
        chosen = order[[label not in seen for label in train.labels[order].tolist()]][: self.config.batch]
        if not len(chosen):
            raise UserError(
                f"--query class-disjoint: a batch of {self.config.batch} has clips of all classes: "
                "give a smaller --batch"
            )
        return self._load(chosen, (epoch, number, 2))

    def _indices(self, epoch: int, number: int, stream: int) -> np.ndarray:
        train = self.source.train
        assert train is not None
        found: np.ndarray = data.batches(len(train), self.config.batch, epoch, self.config.seed, stream)[number]
        return found

    def _batch(self, epoch: int, number: int, stream: int) -> list[Any]:
        """This process's share of a batch, as micro-batches; a query is kept, as it is the next support batch."""
        key = (epoch, number, stream)
        if key not in self._loaded:
            self._loaded[key] = self._load(self._indices(*key), key)
        found = self._loaded[key]
        if isinstance(found, Future):
            found = self._loaded[key] = self._on_device(*found.result())
        batches: list[Any] = found
        return batches

    def _ahead(self, epoch: int, number: int) -> None:
        """Begin to read the batch after this one."""
        if self._reader is None or number + 1 >= self.per_epoch:
            return
        key = (epoch, number + 1, 0)
        if key not in self._loaded:
            self._loaded[key] = self._reader.submit(self._read, self._indices(*key), key)

    def _load(self, indices: np.ndarray, key: Sequence[int]) -> list[Any]:
        return self._on_device(*self._read(indices, key))

    def _read(self, indices: np.ndarray, key: Sequence[int]) -> tuple[list[tuple[np.ndarray, np.ndarray]], int]:
        train, size = self.source.train, self.config.micro_batch
        assert train is not None
        (mine,) = loop.share(indices.tolist(), self.accelerator) or [[]]
        parts = [mine[i : i + size] for i in range(0, len(mine), size)] if size else [mine]
        return [train.training(part, [self.config.seed, 11, key[0]]) for part in parts if part], len(indices)

    def _on_device(self, parts: Sequence[tuple[np.ndarray, np.ndarray]], size: int) -> list[Any]:
        device = self.accelerator.device
        return [(self.model.pixels(clips), torch.from_numpy(labels).to(device), size) for clips, labels in parts]

    # ---- single frames

    def _image_step(self, step: int) -> dict[str, Any]:
        """Contrastive, of generated frames and what is on them, and actions said in two ways; alike in all processes.

        So made, images show static things only, and texts tell actions apart, as CLIP's do.
        """
        config, model, world = self.config, self.model, self.source.sprites
        assert isinstance(model, VideoTextClassifier)
        assert world is not None
        assert self.image_optimizer is not None
        self._require(self.image_parameters)
        model.train()
        rng = np.random.default_rng([config.seed, 9, step])
        clips, said = world.frames(config.image_batch, rng)
        one, other = world.actions(config.image_batch, rng)
        rate = config.image_lr * min(1.0, (step + 1) / 50)
        for group in self.image_optimizer.param_groups:
            group["lr"] = rate
        ids = model.tokenizer([*said, *one, *other], padding=True, return_tensors="pt")["input_ids"]
        with self.accelerator.autocast():
            images = model.video_features(model.pixels(clips))["frames"][:, 0]
            pooled = model.backbone.text_model(input_ids=ids.to(self.accelerator.device)).pooler_output
            texts = F.normalize(model.backbone.text_projection(pooled).float(), dim=-1)
        captions, one_way, other_way = texts.chunk(3)
        loss = contrastive(model.scale * images @ captions.T)
        words = contrastive(model.scale * one_way @ other_way.T)
        (loss + words).backward()
        norm = nn.utils.clip_grad_norm_(self.image_parameters, 1.0)
        self.image_optimizer.step()
        self.image_optimizer.zero_grad()
        with torch.no_grad():
            model.backbone.logit_scale.clamp_(max=math.log(100))
        return {
            "loss": loss.detach(),
            "text_loss": words.detach(),
            "lr": rate,
            "grad_norm": norm,
            "epoch": 0,
            "phase": 0,
        }


def contrastive(logits: Tensor) -> Tensor:
    """CLIP's loss of logits [N, N], the right pairs on the diagonal: the mean of both directions."""
    targets = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


class _Features(nn.Module):
    """A learner's features per frame as a module, for other weights to be put in its place."""

    def __init__(self, model: Learner) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model.video_features(inputs)["frames"]


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Train; also under ``accelerate launch -m open_mede.train PRESET …`` and torchrun.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/open-mede-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, plots, and model/, which
        ``VideoTextClassifier.from_pretrained`` loads.

    Raises:
        UserError: config, data and model do not fit, this process has worked in another precision, or the folder holds
            another run.
    """
    return train_on(config, data.load, options)


def train_on(config: Config, load_data: Callable[[Config], Data], options: RunOptions | None = None) -> Run:
    """:func:`train` on what ``load_data(config)`` gives: :class:`Data` of your own."""
    options = loop.with_folder(options or RunOptions(), loop.default_folder("open-mede", "small"))
    assert options.output_dir is not None
    if is_initialized() and (kept := AcceleratorState().mixed_precision) != config.precision:
        raise UserError(
            f"--precision is {config.precision}, but this process has worked with {kept}, which Accelerate keeps: "
            "start a new process"
        )
    accelerator = loop.prepare(options, seed=config.seed, precision=config.precision)
    main = accelerator.is_main_process
    if main and (options.output_dir / "config.json").exists():
        # what would refuse the folder is said now, before data and model are loaded
        runfolder.RunFolder(options.output_dir, config, resume=options.resume).close()
    learner = CrossBatchMetaTrainer(config, load_data(config), accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=main)
    try:
        metrics = loop.fit(
            learner, folder, accelerator, steps=learner.steps, options=options, name="open-mede"
        )  # fmt: skip
        run = _run(folder.path, learner, metrics)
        if main:
            _finish(run)
    finally:
        folder.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def load(folder: Path | str, load_data: Callable[[Config], Data] = data.load) -> Run:
    """A finished run from its folder, with its data; of :func:`train_on` give what it was given.

    Raises:
        UserError: not a run folder, a run that is not finished, or no good checkpoint.
    """
    path = Path(folder)
    config = runfolder.open_run(path, Config)
    accelerator = loop.prepare(RunOptions(), seed=config.seed)
    learner = CrossBatchMetaTrainer(config, load_data(config), accelerator)
    kept = {name: value for name, value in learner.state().items() if "optimizer" not in name}
    step = checkpoint.restore(path / "checkpoints", kept, say=lambda line: print(line, file=sys.stderr))
    if not step and learner.steps:
        raise UserError(f"{path} has no checkpoint yet: train it first")
    if step < learner.steps:
        raise UserError(f"{path} is at step {step} of {learner.steps}: finish it with --resume first")
    metrics = path / "metrics.jsonl"
    return _run(path, learner, list(runfolder.read_metrics(metrics)) if metrics.exists() else [])


def _run(path: Path, learner: CrossBatchMetaTrainer, metrics: Sequence[dict[str, Any]]) -> Run:
    learner.model.eval().requires_grad_(False)
    device = learner.accelerator.device
    weights: dict[str, Weights] = {}
    if learner.learns:
        weights["last"] = {name: value.detach().clone() for name, value in learner.trained.items()}
        for name, one in learner.averages.items():
            if one.average:
                weights[name] = {key: value.to(device) for key, value in one.average.items()}
        if learner.start.tensors:
            weights["start"] = dict(learner.start.tensors)
    run = Run(path, learner.config, learner.model, learner.source, list(metrics), weights)
    run.use()
    return run


def _finish(run: Run) -> None:
    """Save the learner, and draw the training."""
    from open_mede import plots

    if isinstance(run.model, FeatureClassifier):
        run.model.save_pretrained(run.folder / "model", config={"names": run.model.names, "hidden": _hidden(run)})
    else:
        run.model.save_pretrained(run.folder / "model")
    if run.metrics:
        plots.training(run.metrics, run.folder / "training.png")
    if run.config.method != "frozen":
        plots.gaussian(run.config, run.folder / "gwa.png")


def _hidden(run: Run) -> int:
    return run.config.hidden if run.config.model == "mlp" else 0


if __name__ == "__main__":
    from open_mede.cli import main

    sys.argv[1:1] = ["train"]
    main()
