"""Synthetic-caption pre-training: batches of photos and captions, their contrastive gradient, AdamW."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from metazoo import checkpoint, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions
from torch import Tensor, nn
from torch.nn import functional as F

from streetclip import contrastive, data, world
from streetclip.baselines import LabelHead
from streetclip.captions import SyntheticCaptioner
from streetclip.config import PRESETS, Config
from streetclip.data import Data
from streetclip.model import Clip, load_model


@dataclass
class Run:
    """A trained CLIP, with its data and the rows of metrics.jsonl; the head of --method label-head."""

    folder: Path
    config: Config
    clip: Clip
    data: Data
    metrics: list[dict[str, Any]]
    head: LabelHead | None = None


def steps_of(config: Config) -> int:
    """Steps in all: on generic captions, then on synthetic ones."""
    return config.generic_steps + (0 if config.method == "clip" else config.steps)


class SyntheticCaptionTrainer:
    """One step at a time: first on generic captions, where a config has them, then on synthetic ones.

    Args:
        config: what to train.
        source: the data.
        accelerator: of this process.

    Raises:
        UserError: config and data do not fit, or a training photo lacks a level that the template needs.
    """

    def __init__(self, config: Config, source: Data, accelerator: Accelerator) -> None:
        self.config, self.source, self.accelerator = config, source, accelerator
        self.learns = config.method != "clip" and config.steps > 0
        self._check()
        self.clip = load_model(config)
        self.head: LabelHead | None = None
        self.captions: list[str] = []
        if self.learns and config.method == "label-head":
            assert source.train is not None
            width = self.clip.model.config.projection_dim
            self.head = LabelHead(config.head, source.train, source.gazetteer, width, config.cells, config.seed)
        elif self.learns:
            assert source.train is not None
            held = source.train
            self.captions = SyntheticCaptioner(config.template).all(held.city, held.region, held.country)
            self._check_captions()
        self.clip.to(accelerator.device)
        if self.head is not None:
            self.head.to(accelerator.device)
        if config.checkpointing:
            self.clip.model.activation_checkpointing_enable({"use_reentrant": False})
        parameters = [*self.clip.parameters(), *(self.head.parameters() if self.head is not None else ())]
        decays = [value for value in parameters if value.ndim > 1]
        others = [value for value in parameters if value.ndim <= 1]
        groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
        self.parameters = parameters
        self.frozen = self._frozen()
        self.of_head = {id(value) for value in self.head.parameters()} if self.head is not None else set()

    def _check(self) -> None:
        config, train, processes = self.config, self.source.train, self.accelerator.num_processes
        if not self.learns and not config.generic_steps:
            return
        if self.learns and train is None:
            raise UserError(f"{config.dataset}: no training photos: give some, or --method clip")
        for option, size, used in (
            ("batch", config.batch, self.learns), ("generic-batch", config.generic_batch, config.generic_steps > 0)
        ):  # fmt: skip
            if used and size % processes:
                raise UserError(f"--{option} is {size}, over {processes} processes: give a multiple")
        if train is not None and self.learns and len(train) < config.batch:
            raise UserError(f"{len(train)} training photos, --batch is {config.batch}: give fewer, or more photos")

    def _check_captions(self) -> None:
        """What would fail in the middle of training is said now."""
        different = sorted(set(self.captions))
        if len(different) < 2:
            raise UserError("all training photos have one caption: give photos of more places")
        # a token is a byte or more
        most = self.clip.model.config.text_config.max_position_embeddings
        doubtful = [caption for caption in different if len(caption.encode()) > most - 2]
        for start in range(0, len(doubtful), 4096):
            self.clip.tokenize(doubtful[start : start + 4096])

    def _frozen(self) -> set[int]:
        """Parameters, by id, that synthetic captions do not train."""
        model, towers = self.clip.model, self.config.towers
        kept: list[nn.Module] = []
        if towers == "image" or self.config.method == "label-head":
            kept += [model.text_model, model.text_projection]
        if towers == "text":
            kept += [model.vision_model, model.visual_projection]
        return {id(value) for module in kept for value in module.parameters()}

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs."""
        found: dict[str, checkpoint.Stateful] = {"model": self.clip, "optimizer": self.optimizer}
        if self.head is not None:
            found["head"] = self.head
        return found

    # ---- a step

    def step(self, step: int) -> dict[str, Any]:
        """Train once; ``step`` counts from 0.

        Returns:
            loss; of captions classifier_loss (photo to captions), representation_loss (caption to photos),
            batch_accuracy (share of photos told from the batch's other captions), scale exp(τ); lr, grad_norm; phase 0
            for generic captions, 1 after.
        """
        config = self.config
        generic = step < config.generic_steps
        done = step - config.generic_steps
        if done == 0:  # as one starts from a CLIP: without the averages of its training
            self.optimizer.state.clear()
        rate = self._rate(step if generic else done, generic)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        still = self.of_head if generic else self.frozen
        trained = [value for value in self.parameters if id(value) not in still]
        for value in self.parameters:
            value.requires_grad_(id(value) not in still)
        self.clip.train()
        row = self._label_step(done) if self.head is not None and not generic else self._caption_step(step, generic)
        loop.sum_gradients(trained, self.accelerator)
        norm = torch.nn.utils.clip_grad_norm_(trained, config.clip or math.inf)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.clip.log_scale.clamp_(max=math.log(config.max_scale))
        return {**row, "scale": self.clip.log_scale.exp(), "lr": rate, "grad_norm": norm, "phase": int(not generic)}

    def _rate(self, done: int, generic: bool) -> float:
        config = self.config
        most = config.generic_lr if generic else config.lr
        if done < config.warmup:
            return most * (done + 1) / config.warmup
        if generic:
            return most
        if config.schedule == "cosine":
            part = (done - config.warmup) / max(1, config.steps - config.warmup)
            return config.lr * (1 + math.cos(math.pi * part)) / 2
        return config.lr

    def _mine(self, count: int) -> list[slice]:
        """Micro-batches of this process, as parts of the batch."""
        config, rank = self.config, self.accelerator.process_index
        share = count // self.accelerator.num_processes
        size = min(config.micro_batch or share, share)
        first = rank * share
        return [slice(i, min(i + size, first + share)) for i in range(first, first + share, size)]

    def _caption_step(self, step: int, generic: bool) -> dict[str, Any]:
        config, device = self.config, self.accelerator.device
        if generic:
            assert self.source.generic is not None
            arrays, attributes = self.source.generic
            chosen = data.batch_of(len(arrays), config.generic_batch, step, config.seed, 0)
            rng = np.random.default_rng([config.seed, 6, step])
            captions = world.generic_captions(attributes[chosen], rng, config.local_words)

            def pixels(numbers: np.ndarray) -> Tensor:
                return data.scaled(arrays[numbers], self.clip)
        else:
            train = self.source.train
            assert train is not None
            chosen = data.batch_of(len(train), config.batch, step - config.generic_steps, config.seed, 1)
            captions = self._captions(chosen, step - config.generic_steps)

            def pixels(numbers: np.ndarray) -> Tensor:
                return train.pixels(numbers, self.clip)

        parts = self._mine(len(chosen))
        number = np.unique(captions, return_inverse=True)[1]
        same = torch.from_numpy(number[:, None] == number[None]).to(device)
        found = contrastive.backward(
            [pixels(chosen[part]).to(device) for part in parts],
            [self.clip.tokenize(captions[part]).to(device) for part in parts],
            self._autocast(self.clip.encode_images), self._autocast(self.clip.encode_texts), self.clip.log_scale,
            self.accelerator, same, soft=config.targets == "soft" and not generic,
        )  # fmt: skip
        return {
            "loss": found.loss, "classifier_loss": found.classifier, "representation_loss": found.representation,
            "batch_accuracy": 100 * found.accuracy,
        }  # fmt: skip

    def _captions(self, chosen: np.ndarray, done: int) -> list[str]:
        train, config = self.source.train, self.config
        assert train is not None
        if not config.drop_levels:
            return [self.captions[i] for i in chosen]
        rng = np.random.default_rng([config.seed, 7, done])
        captioner = SyntheticCaptioner(config.template)
        return [
            captioner(
                {"city": train.city[i], "region": train.region[i], "country": train.country[i]},
                drop=lambda: bool(rng.random() < config.drop_levels),
            )
            for i in chosen
        ]

    def _label_step(self, done: int) -> dict[str, Any]:
        config, train, device = self.config, self.source.train, self.accelerator.device
        assert train is not None
        assert self.head is not None
        chosen = data.batch_of(len(train), config.batch, done, config.seed, 1)
        encode = self._autocast(self.clip.encode_images)
        total, right = torch.zeros((), device=device), torch.zeros((), device=device)
        for part in self._mine(config.batch):
            targets = self.head.targets[chosen[part]].to(device)
            logits = self.head(encode(train.pixels(chosen[part], self.clip).to(device)))
            loss = F.cross_entropy(logits, targets, reduction="sum") / config.batch
            loss.backward()
            total += loss.detach()
            right += (logits.argmax(1) == targets).sum() / config.batch
        summed = torch.stack([total, right])
        if self.accelerator.num_processes > 1:
            summed = self.accelerator.reduce(summed, reduction="sum")
        return {"loss": summed[0], "batch_accuracy": 100 * summed[1]}

    def _autocast(self, encode: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def within(inputs: Tensor) -> Tensor:
            with self.accelerator.autocast():
                return encode(inputs)

        return within


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Pre-train on synthetic captions; also under ``accelerate launch -m streetclip.train PRESET …`` and torchrun.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/streetclip-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, a plot, and model/, which
        ``CLIPModel.from_pretrained`` loads.

    Raises:
        UserError: config, data and model do not fit, this process has worked in another precision, or the folder holds
            another run.
    """
    return train_on(config, data.load, options)


def train_on(config: Config, load_data: Callable[[Config], Data], options: RunOptions | None = None) -> Run:
    """:func:`train` on what ``load_data(config)`` gives: :class:`Data` of your own."""
    options = loop.with_folder(options or RunOptions(), loop.default_folder("streetclip", "small"))
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
    learner = SyntheticCaptionTrainer(config, load_data(config), accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=main)
    try:
        metrics = loop.fit(
            learner, folder, accelerator, steps=steps_of(config), options=options, name="streetclip"
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
    learner = SyntheticCaptionTrainer(config, load_data(config), accelerator)
    kept = {name: value for name, value in learner.state().items() if name in ("model", "head")}
    step = checkpoint.restore(path / "checkpoints", kept, say=lambda line: print(line, file=sys.stderr))
    steps = steps_of(config)
    if not step and steps:
        raise UserError(f"{path} has no checkpoint yet: train it first")
    if step < steps:
        raise UserError(f"{path} is at step {step} of {steps}: finish it with --resume first")
    metrics = path / "metrics.jsonl"
    return _run(path, learner, list(runfolder.read_metrics(metrics)) if metrics.exists() else [])


def _run(path: Path, learner: SyntheticCaptionTrainer, metrics: Sequence[dict[str, Any]]) -> Run:
    learner.clip.eval().requires_grad_(False)
    return Run(path, learner.config, learner.clip, learner.source, list(metrics), learner.head)


def _finish(run: Run) -> None:
    """Save the CLIP, and draw the training."""
    from streetclip import plots

    run.clip.save_pretrained(run.folder / "model")
    if run.metrics:
        plots.training(run.metrics, run.folder / "training.png")


if __name__ == "__main__":
    from streetclip.cli import main

    sys.argv[1:1] = ["train"]
    main()
