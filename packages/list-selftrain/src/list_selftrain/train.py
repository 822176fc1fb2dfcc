"""The schedule: a teacher on the labelled examples, then sessions of a fresh student on its pseudo-labels."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState, is_initialized
from metazoo import checkpoint, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions
from torch import Tensor

from list_selftrain import baselines, data, reweighting
from list_selftrain.config import PRESETS, Config
from list_selftrain.data import Data, Part
from list_selftrain.model import Classifier, Inputs, PromptClassifier, load_model

# What is kept of each session, the teacher being session 0; -1 where there is none.
HISTORY = ("accuracy", "pseudo_label_accuracy", "zero_weights", "effective_examples")


@dataclass(frozen=True)
class Position:
    """Where a step is: session 0 trains the teacher; ``labelled`` says on what; ``i`` counts within this phase."""

    session: int
    labelled: bool
    i: int
    rate: float
    begins: bool
    ends: bool


def phases(config: Config, labelled: int) -> tuple[int, int, int]:
    """Steps of the teacher, of a session on unlabelled batches, and of its fine-tuning on labelled ones."""
    batches = -(-labelled // config.labelled_batch)
    return config.teacher_epochs * batches, config.session_steps, config.finetune_epochs * batches


def total_steps(config: Config, labelled: int) -> int:
    """Optimizer steps of a run on so many labelled examples: 400 + 6 · 1,400 in the paper at 30."""
    teacher, session, finetune = phases(config, labelled)
    return teacher + config.sessions * (session + finetune)


def position(config: Config, labelled: int, step: int) -> Position:
    """Where ``step`` (from 0) is in the schedule; the learning rate falls linearly to 0 within teacher and session."""
    teacher, session, finetune = phases(config, labelled)
    if step < teacher:
        rate = config.teacher_lr * (1 - step / teacher)
        return Position(0, True, step, rate, step == 0, step == teacher - 1)
    number, within = divmod(step - teacher, session + finetune)
    rate = config.lr * (1 - within / (session + finetune))
    tuning = within >= session
    i = within - session if tuning else within
    return Position(number + 1, tuning, i, rate, within == 0, within == session + finetune - 1)


def reweights(config: Config, i: int) -> bool:
    """Whether step i of a session comes after the warm-up of knowledge distillation, with learned weights."""
    return config.weights == "meta" and (config.warmup == 0 or i > config.warmup * config.session_steps)


@dataclass
class Run:
    """A trained classifier, with its data, its sessions and the rows of metrics.jsonl.

    Attributes:
        sessions: of the teacher and each student what HISTORY names, in percent, where there is such.
        targets: pseudo-labels of the last session, [unlabelled, classes]; 0 for examples that it did not draw.
        weights: of the last session, mean over the re-weighted steps in which an example was, times the examples in
            the batch (1 is the weight in a plain mean); NaN where it was in none; [unlabelled].
    """

    folder: Path
    config: Config
    model: Classifier
    data: Data
    sessions: list[dict[str, float]]
    targets: np.ndarray
    weights: np.ndarray
    metrics: list[dict[str, Any]]

    def predict_proba(self, part: Part, batch_size: int = 64) -> np.ndarray:
        """Probabilities of the classes, [N, C]."""
        logits = score(self.model, self.model.encode(part), range(len(part)), batch_size)
        return logits.softmax(-1).cpu().numpy()


@torch.no_grad()
def score(
    model: Classifier, inputs: Inputs, indices: Sequence[int] | np.ndarray, batch_size: int = 64,
    accelerator: Accelerator | None = None, *, dropout: bool = False,
) -> Tensor:  # fmt: skip
    """Logits of the examples ``indices``, [N, C], each process scoring its share; evaluation mode unless
    ``dropout``."""
    training = model.training
    model.train(dropout)
    device = next(model.parameters()).device
    ordered = sorted(range(len(indices)), key=lambda k: inputs.lengths[indices[k]])
    mine = ordered if accelerator is None else ordered[accelerator.process_index :: accelerator.num_processes]
    found = torch.zeros(len(indices), model.classes, device=device)
    for first in range(0, len(mine), batch_size):
        part = mine[first : first + batch_size]
        batch = {name: value.to(device) for name, value in inputs.take([indices[k] for k in part]).items()}
        found[part] = model(**batch).float()
    model.train(training)
    if accelerator is not None and accelerator.num_processes > 1:
        found = accelerator.reduce(found, reduction="sum")
    return found


class LiSTLearner:
    """One optimizer step at a time, of teacher, student or fine-tuning.

    Args:
        config: the run's config. source: its data. accelerator: device and processes.

    Raises:
        UserError: config, data and model do not fit.
    """

    def __init__(self, config: Config, source: Data, accelerator: Accelerator) -> None:
        self.config, self.source, self.accelerator = config, source, accelerator
        if config.labelled_batch < accelerator.num_processes or config.unlabelled_batch < accelerator.num_processes:
            raise UserError(
                f"{accelerator.num_processes} processes want --labelled-batch and --unlabelled-batch of as many or more"
            )
        if config.weights == "uncertainty" and config.sessions and len(source.unlabelled) < 2:
            raise UserError("--weights uncertainty chooses half of the unlabelled examples: give two or more")
        self.model = load_model(config, source, accelerator).to(accelerator.device)
        self.parameters = list(self.model.trained().values())
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, weight_decay=0.0)
        self.labelled, self.unlabelled = self.model.encode(source.labelled), self.model.encode(source.unlabelled)
        self.test = None if source.test is None else self.model.encode(source.test)
        assert source.labelled.labels is not None
        self.labels = torch.from_numpy(source.labelled.labels).to(accelerator.device)
        self.steps = total_steps(config, len(source.labelled))
        size, device = len(source.unlabelled), accelerator.device
        self.targets = torch.zeros(size, len(source.labels), device=device)
        self.weight_sum, self.weight_count = torch.zeros(size, device=device), torch.zeros(size, device=device)
        self.chosen = torch.zeros(min(config.mc_pool, size) // 2, dtype=torch.long)  # uncertainty
        self.chosen_weights = torch.ones(size, device=device)
        self.statistics = torch.zeros(3)  # sums of zero_weights and effective_examples, and their count
        self.history = torch.full((config.sessions + 1, len(HISTORY)), -1.0)
        self._drawn: tuple[int, np.ndarray] = (-1, np.zeros(0, dtype=int))

    def state(self) -> Mapping[str, checkpoint.Stateful]:
        kept = {
            name: getattr(self, name)
            for name in ("targets", "weight_sum", "weight_count", "chosen", "chosen_weights", "statistics", "history")
        }
        return {
            "model": checkpoint.TensorState(**{name: p.detach() for name, p in self.model.trained().items()}),
            "optimizer": self.optimizer,
            "session": checkpoint.TensorState(**kept),
        }

    # ---- which examples

    def labelled_indices(self, session: int, i: int) -> np.ndarray:
        """Labelled examples of step i of the teacher or of a session's fine-tuning: shuffled epochs."""
        config, size = self.config, len(self.source.labelled)
        epoch, batch = divmod(i, -(-size // config.labelled_batch))
        order = np.random.default_rng([config.seed, 1, session, epoch]).permutation(size)
        return order[batch * config.labelled_batch : (batch + 1) * config.labelled_batch]

    def meta_indices(self, session: int, i: int) -> np.ndarray:
        """Labelled examples of the meta gradient in step i, [batches, examples]."""
        size = len(self.source.labelled)
        rng = np.random.default_rng([self.config.seed, 2, session, i])
        wanted = min(self.config.meta_batch, size)
        return np.stack([rng.permutation(size)[:wanted] for _ in range(self.config.meta_batches)])

    def draws(self, session: int) -> np.ndarray:
        """Unlabelled examples of all steps of a session, [T, B]: shuffled epochs of those it learns from."""
        if self._drawn[0] != session:
            config = self.config
            pool = self.chosen.numpy() if config.weights == "uncertainty" else np.arange(len(self.source.unlabelled))
            rng = np.random.default_rng([config.seed, 3, session])
            size = min(config.unlabelled_batch, len(pool))
            epochs = -(-config.session_steps * size // len(pool))
            order = np.concatenate([rng.permutation(pool) for _ in range(epochs)])[: config.session_steps * size]
            self._drawn = (session, order.reshape(config.session_steps, size))
        return self._drawn[1]

    # ---- a step

    def step(self, step: int) -> dict[str, Any]:
        """Train once; ``step`` counts from 0.

        Returns:
            session, loss, lr, grad_norm; on unlabelled batches zero_weights (percent) and effective_examples (1 / Σ
            w²).
        """
        at = position(self.config, len(self.source.labelled), step)
        if at.begins and at.session:
            self._begin(at.session)
        for group in self.optimizer.param_groups:
            group["lr"] = at.rate
        self.model.train()
        self.optimizer.zero_grad()
        found = self.supervise(at) if at.labelled else self.distil(at)
        loop.sum_gradients(self.parameters, self.accelerator)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.clip or float("inf"))
        self.optimizer.step()
        if at.ends:
            self._end(at.session)
        return {"session": at.session, **found, "lr": at.rate, "grad_norm": norm}

    def supervise(self, at: Position) -> dict[str, Any]:
        """Gradient of the mean cross-entropy of a labelled batch (stage 0, step 4)."""
        indices = self.labelled_indices(at.session, at.i)
        loss = torch.zeros((), device=self.accelerator.device)
        for part in loop.share(range(len(indices)), self.accelerator, self.config.accumulation):
            rows = indices[list(part)]
            with self.accelerator.autocast():
                logits = self.model(**self._take(self.labelled, rows))
            part_loss = F.cross_entropy(logits.float(), self.labels[rows], reduction="sum") / len(indices)
            self.accelerator.backward(part_loss)
            loss += part_loss.detach()
        return {"loss": self._summed(loss)}

    def distil(self, at: Position) -> dict[str, Any]:
        """Gradient of Σ w_i ℓ_i of an unlabelled batch (step 3); w is found first, and no gradient flows into it."""
        indices = self.draws(at.session)[at.i]
        targets, weights = self.learned(indices), self.weigh(at, indices)
        loss = torch.zeros((), device=self.accelerator.device)
        for part in loop.share(range(len(indices)), self.accelerator, self.config.accumulation):
            rows = list(part)
            with self.accelerator.autocast():
                logits = self.model(**self._take(self.unlabelled, indices[rows]))
            part_loss = (weights[rows] * reweighting.distillation(logits, targets[rows])).sum()
            self.accelerator.backward(part_loss)
            loss += part_loss.detach()
        square = weights.square().sum()
        effective = torch.where(square > 0, 1 / square.clamp(min=1e-30), 0.0)
        zero = 100 * (weights == 0).float().mean()
        if self.config.weights != "meta" or reweights(self.config, at.i):
            rows = torch.from_numpy(indices).to(self.weight_sum.device)  # twice the same where an epoch ends
            self.weight_sum.index_add_(0, rows, weights * len(indices))
            self.weight_count.index_add_(0, rows, torch.ones_like(weights))
            self.statistics += torch.stack([zero, effective, torch.ones_like(zero)]).cpu()
        return {"loss": self._summed(loss), "zero_weights": zero, "effective_examples": effective}

    def learned(self, indices: np.ndarray) -> Tensor:
        """q of unlabelled examples: the teacher's probabilities, or its decisions; [B, C]."""
        probabilities = self.targets[indices]
        return probabilities if self.config.soft_labels else reweighting.decided(probabilities)

    def weigh(self, at: Position, indices: np.ndarray) -> Tensor:
        """w of an unlabelled batch, [B], the same in all processes."""
        config = self.config
        if config.weights == "uncertainty":
            weights = self.chosen_weights[indices]
            return weights / weights.sum()
        if not reweights(config, at.i):  # uniform where every pseudo-label is above the threshold
            return reweighting.confident(
                self.targets[indices], config.threshold if config.weights == "confidence" else 0.0
            )
        labelled = [
            (self._take(self.labelled, rows), self.labels[rows]) for rows in self.meta_indices(at.session, at.i)
        ]
        targets = self.learned(indices)
        products = torch.zeros(len(indices), device=self.accelerator.device)
        for part in loop.share(range(len(indices)), self.accelerator, config.accumulation):
            rows = list(part)
            inputs = self._take(self.unlabelled, indices[rows])
            products[rows] = reweighting.products(
                self.model, labelled, inputs, targets[rows], config.meta_gradient
            ).float()
        return reweighting.normalised(self._summed(products))

    # ---- sessions

    def _begin(self, session: int) -> None:
        """The student becomes the teacher, labels what the session will draw, and gives way to a fresh one."""
        config, source = self.config, self.source
        self.targets.zero_()
        self.weight_sum.zero_()
        self.weight_count.zero_()
        self.statistics.zero_()
        if config.weights == "uncertainty":
            self._choose(session)
        drawn = np.unique(self.draws(session))
        if config.noise != "none":
            truth = _truth(source)
            rng = np.random.default_rng([config.seed, 4])
            flipped = data.flip(truth, config.noise, config.noise_rate, len(source.labels), rng)
            found = F.one_hot(torch.from_numpy(flipped[drawn]), len(source.labels)).float()
            self.targets[drawn] = found.to(self.targets)
        elif source.pseudo is not None:
            self.targets[drawn] = torch.from_numpy(source.pseudo[drawn]).to(self.targets)
        elif config.weights != "uncertainty":
            logits = score(self.model, self.unlabelled, drawn, accelerator=self.accelerator)
            self.targets[drawn] = reweighting.pseudo_labels(logits, temperature=config.temperature)
        if source.unlabelled.labels is not None:
            right = self.targets[drawn].argmax(-1).cpu().numpy() == source.unlabelled.labels[drawn]
            self.history[session, HISTORY.index("pseudo_label_accuracy")] = 100 * float(right.mean())
        if config.fresh:
            self.model.reset(torch.Generator().manual_seed(config.seed * 1000 + session))
        self.optimizer.state.clear()

    def _choose(self, session: int) -> None:
        """UST: pool, passes with dropout, choice."""
        config, size = self.config, len(self.source.unlabelled)
        rng = np.random.default_rng([config.seed, 5, session])
        pool = np.sort(rng.permutation(size)[: config.mc_pool])
        passes = [
            score(self.model, self.unlabelled, pool, accelerator=self.accelerator, dropout=True).softmax(-1).cpu()
            for _ in range(config.mc_passes)
        ]
        probabilities = torch.stack(passes)
        chosen, _, weights = baselines.uncertainty_choice(probabilities, len(self.chosen), rng)
        self._drawn = (-1, self._drawn[1])
        self.chosen.copy_(torch.from_numpy(pool[chosen]))
        self.chosen_weights[pool[chosen]] = torch.from_numpy(weights).to(self.chosen_weights)
        self.targets[pool[chosen]] = probabilities.mean(0)[torch.from_numpy(chosen)].to(self.targets)

    def _end(self, session: int) -> None:
        """What is kept of the session; accuracy on the test part is for the record alone, nothing is chosen by it."""
        count = float(self.statistics[2])
        if session and count:
            self.history[session, HISTORY.index("zero_weights")] = float(self.statistics[0]) / count
            self.history[session, HISTORY.index("effective_examples")] = float(self.statistics[1]) / count
        if self.test is None or self.source.test is None:
            return
        logits = score(self.model, self.test, range(len(self.source.test)), accelerator=self.accelerator)
        right = logits.argmax(-1).cpu().numpy() == self.source.test.labels
        self.history[session, HISTORY.index("accuracy")] = 100 * float(right.mean())

    def _take(self, inputs: Inputs, indices: np.ndarray) -> dict[str, Tensor]:
        return {name: value.to(self.accelerator.device) for name, value in inputs.take(indices).items()}

    def _summed(self, value: Tensor) -> Tensor:
        if self.accelerator.num_processes == 1:
            return value
        summed: Tensor = self.accelerator.reduce(value, reduction="sum")
        return summed


def _truth(source: Data) -> np.ndarray:
    labels = source.unlabelled.labels
    if labels is None:
        raise UserError(f"--noise flips true labels, but those of the unlabelled texts of {source.name} are not known")
    return labels


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Train teacher and students; also under ``accelerate launch -m list_selftrain.train PRESET …`` and torchrun.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/list-selftrain-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, sessions.json,
        pseudo-labels.csv, a plot, and model/ (of prompted classifiers: :meth:`PromptClassifier.from_pretrained`).

    Raises:
        UserError: config, data and model do not fit, this process has worked in another precision, or the folder holds
            another run.
    """
    return train_on(config, data.load, options)


def train_on(config: Config, load_data: Any, options: RunOptions | None = None) -> Run:
    """:func:`train` on what ``load_data(config)`` gives: :class:`Data` of your own."""
    options = loop.with_folder(options or RunOptions(), loop.default_folder("list-selftrain", "small"))
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
    learner = LiSTLearner(config, load_data(config), accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=main)
    try:
        metrics = loop.fit(
            learner, folder, accelerator, steps=learner.steps, options=options, name="list-selftrain"
        )  # fmt: skip
        run = _run(learner, folder.path, metrics)
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
    learner = LiSTLearner(config, data.load(config), accelerator)
    state = learner.state()
    kept = {name: state[name] for name in ("model", "session")}
    step = checkpoint.restore(path / "checkpoints", kept, say=lambda line: print(line, file=sys.stderr))
    if not step:
        raise UserError(f"{path} has no checkpoint yet: train it first")
    if step < learner.steps:
        raise UserError(f"{path} is at step {step} of {learner.steps}: finish it with --resume first")
    metrics = path / "metrics.jsonl"
    rows = list(runfolder.read_metrics(metrics)) if metrics.exists() else []
    return _run(learner, path, rows)


def _run(learner: LiSTLearner, folder: Path, metrics: list[dict[str, Any]]) -> Run:
    sessions = [
        {name: float(value) for name, value in zip(HISTORY, row, strict=True) if value >= 0}
        for row in learner.history.tolist()
    ]
    count = learner.weight_count.cpu().numpy()
    weights = np.where(count > 0, learner.weight_sum.cpu().numpy() / np.maximum(count, 1), np.nan)
    targets = learner.targets.cpu().numpy()
    return Run(folder, learner.config, learner.model.eval(), learner.source, sessions, targets, weights, metrics)


def _finish(run: Run) -> None:
    """Save the classifier, the sessions and the pseudo-labels, and draw the training."""
    from list_selftrain import plots

    if isinstance(run.model, PromptClassifier):
        run.model.save_pretrained(run.folder / "model", labels=run.data.labels)
    runfolder.write_json(run.folder / "sessions.json", run.sessions)
    if run.config.sessions:
        write_pseudo_labels(run, run.folder / "pseudo-labels.csv")
    if run.metrics:
        plots.training(run, run.folder / "training.png")


def write_pseudo_labels(run: Run, path: Path) -> None:
    """A row for each unlabelled example that the last session drew: text, pseudo-label, its probability, weight, and
    the true label where it is known."""
    part, labels = run.data.unlabelled, run.data.labels
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["text", "pseudo_label", "probability", "weight", "label"])
    for i in np.flatnonzero(run.targets.sum(1) > 0):
        best = int(run.targets[i].argmax())
        weight = "" if np.isnan(run.weights[i]) else f"{run.weights[i]:.6g}"
        truth = "" if part.labels is None else labels[int(part.labels[i])]
        writer.writerow([" | ".join(part.texts[i]), labels[best], f"{run.targets[i, best]:.6g}", weight, truth])
    runfolder.write_text(path, out.getvalue())


if __name__ == "__main__":
    from list_selftrain.cli import main

    sys.argv[1:1] = ["train"]
    main()
