"""Meta-training: one optimizer step on a batch of new episodes at a time, end to end through the scan (Section 3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from metazoo import checkpoint, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions
from torch import nn

from mambacl import data
from mambacl.baselines import OML, GeMCL, Offline, PrototypicalNetwork
from mambacl.config import PRESETS, SEQUENCE, Config
from mambacl.data import Episode, EpisodeConfig, validate
from mambacl.model import ContinualLearner, Encoder, MambaBlock, Output
from mambacl.selectivity import relevant_mass, relevant_tokens, selectivity_loss, task_attention, task_loss

MODEL_FIELDS = (
    "method", "width", "blocks", "state_size", "expand", "conv", "experts", "chunk", "association", "heads",
    "head_size", "value_size", "feedforward", "dropout", "norm", "positions", "favor_features", "favor_redraw",
    "encoder", "encoder_width",
)  # fmt: skip


@dataclass
class Run:
    """A meta-trained learner, with its sources of episodes and the rows of metrics.jsonl."""

    folder: Path
    config: Config
    model: nn.Module
    data: data.Data
    metrics: list[dict[str, Any]]


def build_model(config: Config, source: data.Data) -> nn.Module:
    """The learner of ``config`` for the episodes of ``source``, seeded by the config.

    Raises:
        UserError: an encoder that does not fit the examples.
    """
    episodes = source.train
    shape, kind = episodes.shape, episodes.kind
    outputs = config.vocabulary if kind == "class" else episodes.outputs
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        if config.method in SEQUENCE:
            settings = {name: getattr(config, name) for name in MODEL_FIELDS}
            return ContinualLearner(shape, kind, outputs, **settings)
        if config.method == "offline":
            return Offline(
                shape, kind, outputs, make_encoder=lambda: _encoder(config, shape, norm=False),
                steps=config.offline_steps, lr=config.lr, batch=config.batch_size,
            )  # fmt: skip
        encoder = _encoder(config, shape)
        if config.method == "oml":
            return OML(
                encoder, config.width, outputs, kind, hidden=config.width, fast_layers=config.fast_layers,
                inner_lr=config.inner_lr,
            )  # fmt: skip
        return (PrototypicalNetwork if config.method == "prototype" else GeMCL)(encoder, outputs)


def _encoder(config: Config, shape: tuple[int, ...], *, norm: bool = True) -> Encoder:
    return Encoder(config.encoder, shape, config.encoder_width, config.width, norm=norm)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """All parameters that are trained; matrices decay, A_log, D, biases and norms do not."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    kept = [p for name, p in named if p.ndim < 2 or name.endswith("A_log")]
    decayed = [p for name, p in named if not (p.ndim < 2 or name.endswith("A_log"))]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


class MambaCLLearner:
    """One meta-training step at a time.

    Args:
        config: the run's config. source: where episodes come from. accelerator: device and processes. log_every:
            steps between two rows, for what is measured for rows alone.

    Raises:
        UserError: config and data do not fit.
    """

    def __init__(self, config: Config, source: data.Data, accelerator: Accelerator, log_every: int = 1) -> None:
        self.config, self.source, self.accelerator, self.log_every = config, source, accelerator, log_every
        self.model = build_model(config, source).to(accelerator.device)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, config.weight_decay), lr=config.lr)
        self.setting = EpisodeConfig.from_config(config)
        self.steps = 0 if config.method == "offline" else config.steps  # the reference learns within episodes only
        if config.batch_size < accelerator.num_processes * config.accumulation:
            raise UserError(  # batch norm adds up over processes: each needs as many parts as the others
                f"{config.batch_size} episodes a step for {accelerator.num_processes} processes x "
                f"{config.accumulation} parts: use a larger --batch-size or a smaller --accumulation"
            )
        # the encoder of vector labels has batch norm (so may that of examples, but queries make them two at least)
        labels = config.batch_size // config.accumulation * config.tasks * config.shots * accelerator.num_processes
        if isinstance(self.model, ContinualLearner) and self.model.kind != "class" and labels < 2:
            raise UserError(
                f"--batch-size {config.batch_size} in --accumulation {config.accumulation} parts with --tasks 1 and "
                "--shots 1: one label a part, which batch norm cannot normalise; give more of one, or fewer parts"
            )

        first = source.train.draw(1, torch.Generator().manual_seed(config.seed), self.setting)
        in_order = bool(config.task_attention or config.distributed_until)
        validate(first, source.train.kind, config.vocabulary, task_order=in_order)  # a source may be the user's own

    def state(self) -> Mapping[str, checkpoint.Stateful]:
        return {"model": self.model, "optimizer": self.optimizer}

    def draw(self, step: int) -> tuple[Episode, torch.Tensor | None]:
        """The episodes of one step, and after which task each query is asked (None: after the last)."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + step)
        episode = self.source.train.draw(self.config.batch_size, generator, self.setting)
        if step >= self.config.distributed_until:
            return episode, None
        left = self.config.tasks - episode.query_task
        later = (torch.rand(left.shape, generator=generator) * left).long()
        return episode, episode.query_task + later

    def step(self, step: int) -> dict[str, Any]:
        """Meta-train on new episodes; ``step`` counts from 0.

        Returns:
            The terms of the whole batch, lr and grad_norm. In rows that are logged, of Mamba by block: delta_mean,
            delta_p95 and state_norm, of this process's last part only (of queries amid the stream: of its last task).
            Every ``eval_every`` steps meta_train_METRIC and meta_test_METRIC.
        """
        config = self.config
        logged = (step + 1) % self.log_every == 0 or step + 1 == self.steps
        rate = config.lr * config.decay ** (step // config.decay_every) * min(1.0, (step + 1) / max(1, config.warmup))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        mamba = [m for m in self.model.modules() if isinstance(m, MambaBlock)]
        for block in mamba:
            block.watch = logged
        self.model.train()
        self.optimizer.zero_grad()
        found = self.backward(*self.draw(step), step)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, config.clip or float("inf"))
        self.optimizer.step()
        row: dict[str, Any] = {**found, "lr": rate, "grad_norm": norm}
        if logged and mamba:
            row |= {name: [float(block.statistics[name]) for block in mamba] for name in mamba[0].statistics}
            for block in mamba:
                block.watch = False
        if isinstance(self.model, OML):
            row["inner_lr"] = self.model.inner_log_lr.detach().exp()
        if config.eval_every and (step + 1) % config.eval_every == 0:
            from mambacl.evaluate import TEST, TRAIN, meta_test

            parts = (("meta_train", self.source.train, TRAIN), ("meta_test", self.source.test, TEST))
            for name, episodes, held in parts:
                score = meta_test(self.model, episodes, self.setting, config.eval_episodes, seed=config.seed, held=held)
                row |= {f"{name}_{score.metric}": score.mean}
        return row

    def backward(self, episode: Episode, after: torch.Tensor | None, step: int) -> dict[str, Any]:
        """Gradient of the meta-objective of ``episode``'s B episodes over all processes and parts; its terms."""
        config, device, count = self.config, self.accelerator.device, len(episode.x)
        totals = torch.zeros(0, device=device)
        for part in loop.share(torch.arange(count), self.accelerator, config.accumulation):
            mine = episode.take(part).to(device)
            with self.accelerator.autocast():
                output = self._forward(mine, None if after is None else after[part].to(device))
            loss, terms = self._objective(mine, output, step)
            share = len(part) / count
            self.accelerator.backward(loss * share)
            terms = terms.detach() * share
            totals = totals + terms if len(totals) else terms
        loop.sum_gradients(self.parameters, self.accelerator)
        if self.accelerator.num_processes > 1:
            totals = self.accelerator.reduce(totals, reduction="sum")
        names = ["loss", "task_loss", *(["accuracy"] if self.source.train.kind == "class" else [])]
        found: dict[str, Any] = {name: totals[i] for i, name in enumerate(names)}
        rest = totals[len(names) :]
        if len(rest):
            blocks = len(rest) // 2
            found |= {"selectivity": rest[:blocks], "relevant_mass": rest[blocks:]}
        return found

    def _forward(self, episode: Episode, after: torch.Tensor | None) -> Output:
        if after is None or not isinstance(self.model, ContinualLearner):
            return self.model(episode)  # type: ignore[no-any-return]
        return self.model.forward_distributed(episode, after)

    def _objective(self, episode: Episode, output: Output, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and (loss, task loss, accuracy in percent for classes, ℓ_slct and relevant mass by block)."""
        config, kind = self.config, self.source.train.kind
        task = task_loss(kind, output.prediction.float(), episode.query_y).mean()
        loss, terms = task, [task]
        if kind == "class":
            terms.append(100 * (output.prediction.argmax(-1) == episode.query_y).float().mean())
        if output.associations:
            p = relevant_tokens(episode.task, episode.query_task)
            divergences = [selectivity_loss(log_q, p) for log_q in output.associations]
            chosen = divergences[-1:] if config.selectivity_blocks == "last" else divergences
            until = config.selectivity_until
            if config.selectivity and (until is None or step < until):
                loss = loss + config.selectivity * torch.stack(chosen).mean()
            until = config.task_attention_until
            if config.task_attention and (until is None or step < until):
                attention = [task_attention(log_q, p) for log_q in output.associations]
                loss = loss + config.task_attention * torch.stack(attention).sum()
            terms += [*divergences, *(relevant_mass(log_q, p) for log_q in output.associations)]
        return loss, torch.stack([loss.detach(), *(term.detach() for term in terms)])


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Meta-train; also under ``accelerate launch -m mambacl.train PRESET …`` and torchrun.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/mambacl-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, model/ (as
        :class:`ContinualLearner` loads it; sequence models only) and a plot.

    Raises:
        UserError: the config does not fit the data, --eval-every not --log-every, this process has worked in another
            precision, or the folder holds another run.
    """
    options = loop.with_folder(options or RunOptions(), loop.default_folder("mambacl", "small"))
    assert options.output_dir is not None
    steps = 0 if config.method == "offline" else config.steps
    if config.eval_every % options.log_every and config.eval_every < steps:  # the last step always has its row
        raise UserError(
            f"--eval-every is {config.eval_every}, --log-every {options.log_every}: a meta-test stands in the row of "
            "its step, so give a multiple of --log-every"
        )
    if is_initialized() and (kept := AcceleratorState().mixed_precision) != config.precision:
        raise UserError(
            f"--precision is {config.precision}, but this process has worked with {kept}, which Accelerate keeps: "
            "start a new process"
        )
    accelerator = loop.prepare(options, seed=config.seed, precision=config.precision)
    learner = MambaCLLearner(config, data.load(config), accelerator, options.log_every)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=accelerator.is_main_process)
    try:
        metrics = loop.fit(learner, folder, accelerator, steps=learner.steps, options=options, name="mambacl")
        run = Run(folder.path, config, learner.model.eval(), learner.source, metrics)
        if accelerator.is_main_process:
            _finish(run)
    finally:
        folder.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def load(folder: Path | str) -> Run:
    """A finished run from its folder.

    Raises:
        UserError: not a run folder, a run that is not finished, or no good checkpoint.
    """
    path = Path(folder)
    if not (path / "config.json").is_file():
        raise UserError(f"{path} is not a run folder (no config.json): give the --output-dir of `mambacl train`")
    config = runfolder.config_from_dict(Config, runfolder.read_json(path / "config.json"), path / "config.json")
    accelerator = loop.prepare(RunOptions(), seed=config.seed)
    learner = MambaCLLearner(config, data.load(config), accelerator)
    step = checkpoint.restore(path / "checkpoints", learner.state())
    if not step and learner.steps:
        raise UserError(f"{path} has no checkpoint yet: train it first")
    if step < learner.steps:
        raise UserError(f"{path} is at step {step} of {learner.steps}: finish it with --resume first")
    metrics = path / "metrics.jsonl"
    rows = list(runfolder.read_metrics(metrics)) if metrics.exists() else []
    return Run(folder=path, config=config, model=learner.model.eval(), data=learner.source, metrics=rows)


def _finish(run: Run) -> None:
    """Save the learner, and draw the training."""
    from mambacl import plots

    if isinstance(run.model, ContinualLearner):
        run.model.save_pretrained(run.folder / "model")
    if run.metrics:
        plots.training(run, run.folder / "training.png")


if __name__ == "__main__":
    import sys

    from mambacl.cli import main

    sys.argv[1:1] = ["train"]
    main()
