"""Meta-training: one optimizer step on a batch of prompted instances at a time, all rules through the same loop."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from metazoo import checkpoint, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions
from torch import nn

from flipped_learning import data, flipping
from flipped_learning.config import PRESETS, Config
from flipped_learning.flipping import FlippedCollator, Terms
from flipped_learning.minimodel import BagOfWords, build_vocabulary
from flipped_learning.model import load_model, quiet
from flipped_learning.sharding import Sharded, check_processes, shard, whole
from flipped_learning.templates import NOVEL_PAIRS, SEEN_PAIRS, Instance


@dataclass
class Run:
    """A meta-trained model, with its data and the rows of metrics.jsonl."""

    folder: Path
    config: Config
    model: nn.Module
    collator: FlippedCollator | None
    data: data.Data
    metrics: list[dict[str, Any]]

    def score(self, instances: Sequence[Instance], batch_size: int = 64) -> list[np.ndarray]:
        """log-likelihoods of the options of each instance, by the rule that the run was trained with."""
        if isinstance(self.model, BagOfWords):
            groups: dict[tuple[str, ...], list[int]] = {}
            for i, one in enumerate(instances):
                groups.setdefault(one.options, []).append(i)
            found: list[np.ndarray] = [np.zeros(0)] * len(instances)
            for options, members in groups.items():
                for first in range(0, len(members), 256):
                    part = members[first : first + 256]
                    scores = self.model.score([text_of(instances[i]) for i in part], options).double().numpy()
                    for i, row in zip(part, scores, strict=True):
                        found[i] = row
            return found
        assert self.collator is not None
        return flipping.score(self.model, self.collator, instances, batch_size=batch_size)


def text_of(instance: Instance) -> str:
    """The instance without the instruction: all that a bag of words reads."""
    return " ".join(instance.fields)


def make_collator(config: Config, tokenizer: Any) -> FlippedCollator:
    """The collator of ``config``."""
    return FlippedCollator(
        tokenizer, config.method, sentinels=config.sentinels, max_source=config.max_source,
        max_target=config.max_target, unlikelihood_on_sentinels=config.unlikelihood_on_sentinels,
    )  # fmt: skip


class FlippedLearner:
    """One meta-training step at a time, of a seq2seq model or of the bag of words.

    Args:
        config: the run's config. source: its data. accelerator: device and processes.

    Raises:
        UserError: config, data and model do not fit.
    """

    def __init__(self, config: Config, source: data.Data, accelerator: Accelerator) -> None:
        self.config, self.source, self.accelerator = config, source, accelerator
        self.model: nn.Module
        self.collator: FlippedCollator | None = None
        if config.model == "bag":
            # hidden words have an embedding, too: one that no text has trained
            always = [word for pair in (*SEEN_PAIRS, *NOVEL_PAIRS) for word in pair]
            texts = (str(text) for task in source.tasks for one in task.train for text in _texts(one))
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(config.seed)
                vocabulary = build_vocabulary(texts, config.vocabulary, always)
                self.model = BagOfWords(vocabulary, config.width, config.method, tied=config.tied)
        else:
            if config.fsdp:
                check_processes()  # said now, as loading may take long
            self.model, tokenizer = load_model(config, source.corpus, accelerator)
            self.collator = make_collator(config, tokenizer)
            if config.fsdp:
                shard(self.model, accelerator)  # moves its own shards to the device
            else:
                self.model.to(accelerator.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = _optimizer(config, self.parameters)
        if config.batch_size < accelerator.num_processes * config.accumulation:
            raise UserError(
                f"--batch-size is {config.batch_size} for {accelerator.num_processes} processes x "
                f"{config.accumulation} parts: give a larger one, or a smaller --accumulation"
            )

    def state(self) -> Mapping[str, checkpoint.Stateful]:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        if self.config.fsdp:
            sharded = Sharded(trained, self.optimizer)
            return {"model": sharded.model, "optimizer": sharded.optimizer}
        return {
            "model": checkpoint.TensorState(**{n: p.detach() for n, p in trained.items()}),
            "optimizer": self.optimizer,
        }

    def draw(self, step: int) -> tuple[list[Instance], list[int] | None]:
        """The instances of one step and, for flipped with λ > 0, a wrong option of each."""
        rng = np.random.default_rng([self.config.seed, step])
        instances = data.draw(self.source.tasks, self.config.batch_size, rng, self.config.pairs)
        if self.config.method != "flipped" or not self.config.unlikelihood:
            return instances, None
        return instances, data.wrong_options(instances, rng)

    def step(self, step: int) -> dict[str, Any]:
        """Train once; ``step`` counts from 0.

        Returns:
            loss; likelihood and unlikelihood (means over their tokens); log_p_right and log_p_wrong: the mean
            log-probability of the instruction's tokens given the right and a wrong label; lr and grad_norm.
        """
        config = self.config
        rate = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
        if config.decay and step >= config.warmup:
            rate *= (config.steps - step) / max(1, config.steps - config.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.model.train()
        self.optimizer.zero_grad()
        found = self.backward(*self.draw(step))
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip or float("inf"))
        self.optimizer.step()
        return {**found, "lr": rate, "grad_norm": norm.full_tensor() if config.fsdp else norm}

    def backward(self, instances: Sequence[Instance], wrong: Sequence[int] | None) -> dict[str, Any]:
        """Gradient of L_LM + λ L_UL of the whole batch over all processes and parts; its terms."""
        config, accelerator = self.config, self.accelerator
        sums = torch.zeros(4, device=accelerator.device)
        parts = loop.share(range(len(instances)), accelerator, config.accumulation)
        if isinstance(self.model, BagOfWords):
            counts = (len(instances), 0 if wrong is None else len(instances), len(instances))
        else:
            assert self.collator is not None
            batch = self.collator(instances, wrong)
            counts = flipping.token_counts(batch)
        for part in parts:
            if isinstance(self.model, BagOfWords):
                terms = self._bag_terms(
                    [instances[i] for i in part], None if wrong is None else [wrong[i] for i in part]
                )
            else:
                rows = [*part, *(() if wrong is None else (len(instances) + i for i in part))]
                mine = batch.take(rows).to(accelerator.device)
                with accelerator.autocast():
                    log_probs = flipping.batch_log_probs(self.model, mine)
                terms = flipping.loss_terms(log_probs, mine)
            accelerator.backward(terms.loss(counts[0], counts[1], config.unlikelihood if wrong is not None else 0.0))
            values = (terms.likelihood, terms.unlikelihood, terms.log_p_right, terms.log_p_wrong)
            sums += torch.stack([value.detach() for value in values]).to(sums.device)  # the bag stays on the CPU
        if not config.fsdp:
            loop.sum_gradients(self.parameters, accelerator)
        if accelerator.num_processes > 1:
            sums = accelerator.reduce(sums, reduction="sum")
        likelihood, unlikelihood = sums[0] / max(1, counts[0]), sums[1] / max(1, counts[1])
        found = {"loss": likelihood, "likelihood": likelihood, "log_p_right": sums[2] / max(1, counts[2])}
        if wrong is not None:
            found |= {
                "loss": likelihood + config.unlikelihood * unlikelihood,
                "unlikelihood": unlikelihood,
                "log_p_wrong": sums[3] / max(1, counts[1]),
            }
        return found

    def _bag_terms(self, instances: Sequence[Instance], wrong: Sequence[int] | None) -> Terms:
        assert isinstance(self.model, BagOfWords)
        right = [one.options[one.label] for one in instances if one.label is not None]
        other = right if wrong is None else [one.options[k] for one, k in zip(instances, wrong, strict=True)]
        return Terms(**self.model.terms([text_of(one) for one in instances], right, other))


def _texts(example: Mapping[str, Any]) -> Sequence[str]:
    """Strings among an example's fields."""
    return [value for value in example.values() if isinstance(value, str)]


def _optimizer(config: Config, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr)
    from transformers.optimization import Adafactor

    # a constant rate that is not scaled by the size of the weights, as T0's; the loop clips and warms up
    return Adafactor(parameters, lr=config.lr, scale_parameter=False, relative_step=False, warmup_init=False)


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Meta-train; also under ``accelerate launch -m flipped_learning.train PRESET …`` and torchrun.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/flipped-learning-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, a plot, and model/ (as
        transformers' from_pretrained loads it, with its tokenizer; adapter/ beside it where there is LoRA).

    Raises:
        UserError: config, data and model do not fit, this process has worked in another precision, or the folder holds
            another run.
    """
    options = loop.with_folder(options or RunOptions(), loop.default_folder("flipped-learning", "small"))
    assert options.output_dir is not None
    if is_initialized() and (kept := AcceleratorState().mixed_precision) != config.precision:
        raise UserError(
            f"--precision is {config.precision}, but this process has worked with {kept}, which Accelerate keeps: "
            "start a new process"
        )
    accelerator = loop.prepare(options, seed=config.seed, precision=config.precision)
    main = accelerator.is_main_process
    if main and (options.output_dir / "config.json").exists():
        # what would refuse the folder is said now, as pre-training may take minutes
        runfolder.RunFolder(options.output_dir, config, resume=options.resume).close()
    learner = FlippedLearner(config, data.load(config), accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=main)
    try:
        metrics = loop.fit(learner, folder, accelerator, steps=config.steps, options=options, name="flipped-learning")
        run = Run(folder.path, config, learner.model.eval(), learner.collator, learner.source, metrics)
        _warn(learner.collator, main)
        _finish(run, accelerator)
    finally:
        folder.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def _warn(collator: FlippedCollator | None, main: bool) -> None:
    if collator is None or not main:
        return
    if collator.shortened:
        print(f"{collator.shortened} sources were longer than --max-source and lost text of theirs", file=sys.stderr)
    if collator.cut:
        print(f"{collator.cut} targets were longer than --max-target and lost their end", file=sys.stderr)


def load(folder: Path | str) -> Run:
    """A finished run from its folder, with its data.

    Raises:
        UserError: not a run folder, a run that is not finished, or no good checkpoint.
    """
    path = Path(folder)
    config = runfolder.open_run(path, Config)
    accelerator = loop.prepare(RunOptions(), seed=config.seed)
    # the checkpoint replaces all weights but those that LoRA freezes
    lean = replace(config, fsdp=False, pretrain_steps=config.pretrain_steps if config.lora else 0)
    learner = FlippedLearner(lean, data.load(config), accelerator)
    state = {"model": learner.state()["model"]}
    step = checkpoint.restore(path / "checkpoints", state)
    if not step and config.steps:
        raise UserError(f"{path} has no checkpoint yet: train it first")
    if step < config.steps:
        raise UserError(f"{path} is at step {step} of {config.steps}: finish it with --resume first")
    metrics = path / "metrics.jsonl"
    rows = list(runfolder.read_metrics(metrics)) if metrics.exists() else []
    return Run(path, config, learner.model.eval(), learner.collator, learner.source, rows)


def _finish(run: Run, accelerator: Accelerator) -> None:
    """Save the model, and draw the training."""
    from flipped_learning import plots

    if run.collator is not None:
        save_model(run.model, run.collator.tokenizer, run.folder, accelerator, run.config)
    if run.metrics and accelerator.is_main_process:
        plots.training(run, run.folder / "training.png")


def save_model(model: nn.Module, tokenizer: Any, folder: Path, accelerator: Accelerator, config: Config) -> None:
    """model/ for transformers' from_pretrained; with LoRA the merged model, and adapter/ beside it."""
    import copy

    weights = None
    if config.fsdp:  # every process takes part in gathering
        once = {p: whole(p.detach()) for p in model.parameters()}  # what is tied stays one tensor
        weights = {name: once[p] for name, p in model.named_parameters(remove_duplicate=False)}
    if not accelerator.is_main_process:
        return
    with quiet():
        if config.lora:
            model.save_pretrained(folder / "adapter")
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(folder / "model", state_dict=weights)
        tokenizer.save_pretrained(folder / "model")


if __name__ == "__main__":
    from flipped_learning.cli import main

    sys.argv[1:1] = ["train"]
    main()
