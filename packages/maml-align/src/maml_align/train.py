"""The outer loop: meta-tasks, their gradients, AdamW."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from metazoo import checkpoint, inner, loop, runfolder
from metazoo.errors import UserError
from metazoo.inner import Params
from metazoo.options import RunOptions
from torch import Tensor, nn

from maml_align import baselines, data, meta_distillation
from maml_align.config import PRESETS, Config
from maml_align.data import Data
from maml_align.meta_distillation import RATE, Inner, TaskGradients
from maml_align.model import DualEncoder, Encoder, LinearEncoder, load_model
from maml_align.tasks import MetaTaskSampler, stack

VALIDATION_TASKS = 32


@dataclass
class Run:
    """A trained encoder, with its data and the rows of metrics.jsonl."""

    folder: Path
    config: Config
    encoder: Encoder
    data: Data
    metrics: list[dict[str, Any]]


def encoder_of(config: Config, source: Data) -> Encoder:
    """The encoder of a config, before training.

    Raises:
        UserError: no such model.
    """
    if source.kind == "vectors":
        generator = torch.Generator().manual_seed(config.seed)
        return LinearEncoder(config.dimension, len(config.languages), generator)
    return load_model(config, data.texts(source, (*config.languages, *config.unseen)))


class MetaLearner:
    """One outer step at a time: the task batch's gradients, their sums over processes, AdamW.

    Args:
        config: what to train.
        source: the data.
        accelerator: of this process.
    """

    def __init__(self, config: Config, source: Data, accelerator: Accelerator) -> None:
        self.config, self.source, self.accelerator = config, source, accelerator
        self.encoder = encoder_of(config, source)
        if config.checkpointing and self.encoder.vectorises:
            raise UserError(f"--checkpointing is for transformers, not for --model {config.model}: leave it out")
        self.encoder.to(accelerator.device)
        self.sampler = MetaTaskSampler(config, source, self.encoder)
        self.validation = self._validation()
        self.theta: dict[str, nn.Parameter] = dict(self.encoder.named_parameters())
        self.rates = nn.ParameterDict()
        if config.learn_inner_lr:
            rates = {name: nn.Parameter(torch.full_like(value, config.inner_lr)) for name, value in self.theta.items()}
            self.rates = nn.ParameterDict({name.replace(".", "|"): value for name, value in rates.items()})
            self.theta |= {RATE + name: value for name, value in rates.items()}
        decays = [value for value in self.theta.values() if value.ndim > 1]
        others = [value for value in self.theta.values() if value.ndim <= 1]
        groups = [{"params": decays, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW([group for group in groups if group["params"]], lr=config.outer_lr, eps=1e-8)
        if source.kind == "questions":
            self.loss = meta_distillation.triplet_loss(self.encoder, config.margin)
        else:
            self.loss = meta_distillation.similarity_loss(self.encoder)
        self.best = {"score": torch.tensor(-1.0), "step": torch.tensor(0)}
        if config.validate_every:
            self.best |= {name: value.detach().clone() for name, value in self.encoder.named_parameters()}

    def _validation(self) -> MetaTaskSampler | None:
        """Tasks of the dev part, the same at every validation; TRANS is validated from bilingual to multilingual."""
        config = self.config
        if not config.validate_every:
            return None
        mode = "BIL_MULTI" if config.mode == "TRANS" else config.mode
        return MetaTaskSampler(
            replace(
                config, mode=mode, tuples=() if mode != config.mode else config.tuples, task_batch=VALIDATION_TASKS
            ),
            self.source, self.encoder, dev=True,
        )  # fmt: skip

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs."""
        found: dict[str, checkpoint.Stateful] = {"model": self.encoder, "optimizer": self.optimizer}
        if self.config.learn_inner_lr:
            found["rates"] = self.rates
        if self.config.validate_every:
            found["best"] = checkpoint.TensorState(**self.best)
        return found

    # ---- a step

    def step(self, step: int) -> dict[str, Any]:
        """Train once; ``step`` counts from 0.

        Returns:
            loss; of MAML-Align teacher_query_loss, student_support_loss, student_query_loss (means over tasks),
            alignment_loss λ(ΣL_T − ΣL_S)², and kd_share, the norm of its gradient in percent of the tasks' own;
            distance ‖φ − θ‖ (mean over tasks); grad_norm; validation_loss where there is one.
        """
        config = self.config
        tasks = self.sampler.batch(step)
        if config.method == "fine-tune":
            tasks = [task if config.finetune_sets == "all" else task[1:] for task in tasks]
        apart = config.method == "fine-tune" and config.finetune_apart
        rows = [
            self._optimise([[task[i]] for task in tasks] if apart else tasks, step)
            for i in range(len(tasks[0]) if apart else 1)
        ]
        row = {name: torch.stack([one[name] for one in rows]).mean() for name in rows[0]}
        if self.validation is not None and (step + 1) % config.validate_every == 0:
            row["validation_loss"] = self._validate(step)
        return row

    def _optimise(self, tasks: Sequence[Sequence[dict[str, Any]]], step: int) -> dict[str, Tensor]:
        config = self.config
        task, alignment, found = self.gradients(tasks, self.objective(step))
        task, alignment = self._summed(task), self._summed(alignment) if alignment else {}
        count = len(tasks)
        combined = meta_distillation.combine(
            task, alignment, found.pop("teacher") - found.pop("student"), count, config.kd_lambda
        )
        for name, value in self.theta.items():
            value.grad = combined.gradient[name]
        norm = meta_distillation.norm(combined.gradient)
        if config.clip:
            nn.utils.clip_grad_norm_(list(self.theta.values()), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        means = {name: value / count for name, value in found.items()}
        row = {"loss": combined.alignment + torch.stack(
            [value for name, value in means.items() if name.endswith("query_loss")]
        ).mean(), **means}  # fmt: skip
        if alignment:
            row |= {"alignment_loss": combined.alignment, "kd_share": 100 * combined.share}
        return {**row, "grad_norm": norm}

    def objective(self, step: int) -> Callable[[Params, Any], TaskGradients]:
        """A task's gradients in this step, as a function of θ and the task's sets."""
        config, loss = self.config, self.loss
        loop_ = Inner(
            config.inner_steps, config.inner_lr, config.first_order, config.checkpointing, self.encoder.vectorises
        )
        if config.method == "fine-tune":
            return lambda theta, sets: baselines.fine_tune(loss, theta, sets, loop_)
        if config.method == "reptile":
            return lambda theta, sets: baselines.reptile(loss, theta, sets, loop_)
        if config.method == "maml":
            return lambda theta, sets: baselines.maml(loss, theta, sets, loop_)
        if step < config.teacher_steps:
            return lambda theta, sets: baselines.maml(loss, theta, sets[:2], loop_)
        student = loop_._replace(steps=config.inner_steps if config.student_steps is None else config.student_steps)
        return lambda theta, sets: meta_distillation.maml_align(
            loss, theta, sets, loop_, student, detach_teacher=config.detach_teacher
        )

    def gradients(
        self, tasks: Sequence[Sequence[dict[str, Any]]], objective: Callable[[Params, Any], TaskGradients]
    ) -> tuple[Params, Params, dict[str, Tensor]]:
        """Sums over tasks: of the tasks' gradients and the alignments' of this process's tasks; of the losses, of
        ``distance``, ``teacher`` and ``student`` over all processes."""
        mine = loop.share(range(len(tasks)), self.accelerator)
        mine = [tasks[i] for i in mine[0]] if mine else []
        # one process may be left without a task; it still sums, so it computes one and weighs it by nothing
        weight = 1.0 if mine else 0.0
        mine = mine or [tasks[0]]
        batches = [mine] if self.encoder.vectorises else [[task] for task in mine]
        task: Params = {}
        alignment: Params = {}
        totals: dict[str, Tensor] = {}
        for batch in batches:
            found, used = self._of(batch, objective)
            for into, gradients in ((task, found.task), (alignment, found.alignment)):
                self._add(into, gradients, used, weight)
            values = {"teacher": found.teacher, "student": found.student, "distance": found.distance, **found.losses}
            for name, value in values.items():
                totals[name] = totals.get(name, 0.0) + weight * value.float().sum()
        names = list(totals)
        summed = torch.stack([totals[name] for name in names])
        if self.accelerator.num_processes > 1:
            summed = self.accelerator.reduce(summed, reduction="sum")
        return task, alignment, dict(zip(names, summed, strict=True))

    def _of(
        self, tasks: Sequence[Sequence[dict[str, Any]]], objective: Callable[[Params, Any], TaskGradients]
    ) -> tuple[TaskGradients, Tensor | None]:
        """Gradients of tasks (all at once with the tasks first, or of one), and the table's rows that they are of."""
        device = self.accelerator.device
        theta = {name: value.detach() for name, value in self.theta.items()}
        cut = [name for name in theta if isinstance(self.encoder, DualEncoder) and name.endswith(self.encoder.table)]
        used: list[Tensor | None] = [None] * len(tasks)
        if isinstance(self.encoder, DualEncoder):
            pairs = [self.encoder.cut(task) for task in tasks]
            used, tasks = [rows for rows, _ in pairs], [sets for _, sets in pairs]
        with self.accelerator.autocast():
            if not self.encoder.vectorises:
                rows = None if used[0] is None else used[0].to(device)
                given = {
                    name: value[rows] if rows is not None and name in cut else value for name, value in theta.items()
                }
                return objective(given, _to(list(tasks[0]), device)), rows
            sets = _to([stack(of) for of in zip(*tasks, strict=True)], device)
            if not cut:
                return inner.over_tasks(objective, (None, 0), theta, sets), None
            most = max(len(rows) for rows in used if rows is not None)
            table = torch.stack([nn.functional.pad(rows, (0, most - len(rows))) for rows in used if rows is not None])
            table = table.to(device)  # filled up with row 0, at which no token is
            given = {name: value[table] if name in cut else value for name, value in theta.items()}
            dims = {name: 0 if name in cut else None for name in theta}
            return inner.over_tasks(objective, (dims, 0), given, sets), table

    def _add(self, into: Params, gradients: Params, used: Tensor | None, weight: float) -> None:
        """Add gradients of one task or several, those of the table at its rows."""
        for name, value in gradients.items():
            whole = self.theta[name]
            if name not in into:
                into[name] = torch.zeros_like(whole)
            if used is not None and isinstance(self.encoder, DualEncoder) and name.endswith(self.encoder.table):
                into[name].index_add_(0, used.flatten(), weight * value.reshape(-1, *whole.shape[1:]).to(whole.dtype))
            else:
                into[name] += weight * value.reshape(-1, *whole.shape).sum(0)

    def _summed(self, gradients: Params) -> Params:
        """Over all processes; what the method does not touch is zero."""
        for name, value in self.theta.items():
            value.grad = gradients.get(name, torch.zeros_like(value))
        loop.sum_gradients(list(self.theta.values()), self.accelerator)
        found = {name: value.grad for name, value in self.theta.items()}
        return {name: value for name, value in found.items() if value is not None}

    def _validate(self, step: int) -> Tensor:
        """Mean query loss after adaptation of the validation tasks; the best weights so far are kept."""
        assert self.validation is not None
        tasks = self.validation.batch(0)
        name = {"maml-align": "student_query_loss"}.get(self.config.method, "query_loss")
        method = self.config.method if self.config.method != "reptile" else "maml"
        learner_config, self.config = self.config, replace(self.config, method=method)
        try:
            _, _, found = self.gradients(tasks, self.objective(self.config.teacher_steps))
        finally:
            self.config = learner_config
        loss = found[name] / len(tasks)
        if loss.isfinite() and (self.best["score"] < 0 or loss.cpu() < self.best["score"]):
            self.best["score"].copy_(loss)
            self.best["step"].fill_(step + 1)
            for key, value in self.encoder.named_parameters():
                self.best[key].copy_(value.detach())
        return loss

    def finish(self) -> None:
        """Take the weights of the best validation, where there was one."""
        if self.config.validate_every and self.best["score"] >= 0:
            with torch.no_grad():
                for name, value in self.encoder.named_parameters():
                    value.copy_(self.best[name])


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _to(one, device) for name, one in value.items()}
    return [_to(one, device) for one in value]


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Meta-train an encoder; also under ``accelerate launch -m maml_align.train PRESET …`` and torchrun.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/maml-align-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, a plot, and model/, which
        ``SentenceTransformer(path)`` loads.

    Raises:
        UserError: config, data and model do not fit, this process has worked in another precision, or the folder holds
            another run.
    """
    return train_on(config, data.load, options)


def train_on(config: Config, load_data: Callable[[Config], Data], options: RunOptions | None = None) -> Run:
    """:func:`train` on what ``load_data(config)`` gives: :class:`Data` of your own."""
    options = loop.with_folder(options or RunOptions(), loop.default_folder("maml-align", "small"))
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
    learner = MetaLearner(config, load_data(config), accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=main)
    try:
        steps = 0 if config.method == "zero-shot" else config.steps
        metrics = loop.fit(learner, folder, accelerator, steps=steps, options=options, name="maml-align")
        learner.finish()
        run = Run(folder.path, config, learner.encoder, learner.source, metrics)
        if main:
            _finish(run)
    finally:
        folder.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def load(folder: Path | str) -> Run:
    """A finished run from its folder, with its data.

    Raises:
        UserError: not a run folder, a run that is not finished, or no good checkpoint.
    """
    path = Path(folder)
    config = runfolder.open_run(path, Config)
    accelerator = loop.prepare(RunOptions(), seed=config.seed)
    learner = MetaLearner(config, data.load(config), accelerator)
    state = learner.state()
    kept = {name: state[name] for name in ("model", "best") if name in state}
    step = checkpoint.restore(path / "checkpoints", kept, say=lambda line: print(line, file=sys.stderr))
    steps = 0 if config.method == "zero-shot" else config.steps
    if not step and steps:
        raise UserError(f"{path} has no checkpoint yet: train it first")
    if step < steps:
        raise UserError(f"{path} is at step {step} of {steps}: finish it with --resume first")
    learner.finish()
    metrics = path / "metrics.jsonl"
    rows = list(runfolder.read_metrics(metrics)) if metrics.exists() else []
    return Run(path, config, learner.encoder, learner.source, rows)


def _finish(run: Run) -> None:
    """Save the encoder, and draw the training."""
    from maml_align import plots

    if isinstance(run.encoder, DualEncoder):
        run.encoder.save_pretrained(run.folder / "model")
    if run.metrics:
        plots.training(run.metrics, run.folder / "training.png")


if __name__ == "__main__":
    from maml_align.cli import main

    sys.argv[1:1] = ["train"]
    main()
