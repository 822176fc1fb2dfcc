"""Meta-test: fresh episodes of unseen classes or functions; by task, by number of tasks and shots, under noise,
on another data set."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from torch import nn
from tqdm import tqdm

from mambacl import data
from mambacl.baselines import nearest_class_mean
from mambacl.config import EvaluateOptions, ForgettingOptions, GeneralizeOptions
from mambacl.data import ClassEpisodes, Episode, EpisodeConfig, Episodes
from mambacl.model import ContinualLearner
from mambacl.selectivity import relevant_mass, relevant_tokens, selectivity_loss, task_loss
from mambacl.train import Run, load

BATCH = 50
TEST, TRAIN = 10**12, 2 * 10**12  # seeds of episodes that no training step has


@dataclass
class Score:
    """Scores of E episodes' queries.

    metric: accuracy (percent), mse, or angle_loss (1 − cos). values, tasks [E, Q]: of each query, and its task.
    """

    metric: str
    values: np.ndarray
    tasks: np.ndarray
    terms: dict[str, float]

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    def by_task(self) -> list[float]:
        """Mean over the queries of each task, from the first in the stream to the last."""
        return [float(self.values[self.tasks == task].mean()) for task in range(int(self.tasks.max()) + 1)]


@torch.no_grad()
def meta_test(
    model: nn.Module, episodes: Episodes, setting: EpisodeConfig, count: int, *, seed: int = 0, held: int = TEST
) -> Score:
    """Answer the queries of ``count`` fixed episodes: the same for all learners, given ``setting`` and ``seed``.

    Args:
        model: any learner. episodes: meta-test or meta-train source. held: TEST or TRAIN, two streams of seeds.

    Raises:
        UserError: the source has too few classes or examples for ``setting``, or the vocabulary too few symbols; or
            an answer is NaN or infinite.
    """
    device = next(model.parameters()).device
    metric = {"class": "accuracy", "angle": "angle_loss"}.get(episodes.kind, "mse")
    training = model.training
    model.eval()
    values, tasks = [], []
    sums: dict[str, float] = {}
    for first in range(0, count, BATCH):
        size = min(BATCH, count - first)
        generator = torch.Generator().manual_seed(held + seed * 1_000_003 + first)
        episode = episodes.draw(size, generator, setting).to(device)
        output = model(episode)
        if not bool(output.prediction.isfinite().all()):
            raise UserError("an answer is NaN or infinite: the inputs (or --noise) are too large, or training diverged")
        if metric == "accuracy":
            found = 100 * (output.prediction.argmax(-1) == episode.query_y).float()
        else:
            found = task_loss(episodes.kind, output.prediction.float(), episode.query_y)
        values.append(found.cpu().numpy())
        tasks.append(episode.query_task.cpu().numpy())
        if output.associations:
            p = relevant_tokens(episode.task, episode.query_task)
            for name, term in (("selectivity", selectivity_loss), ("relevant_mass", relevant_mass)):
                mean = torch.stack([term(log_q, p) for log_q in output.associations]).mean().item()
                sums[name] = sums.get(name, 0.0) + mean * size / count
    model.train(training)
    return Score(metric, np.concatenate(values), np.concatenate(tasks), sums)


def every_task(setting: EpisodeConfig) -> EpisodeConfig:
    """The same with queries of every task, so that positions in the stream can be told apart."""
    return replace(setting, queries=None)


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Meta-test of a run, beside meta-train and the trivial references.

    Returns:
        METRIC (accuracy in percent, mse or angle_loss) at meta-test and METRIC_meta_train, on episodes not trained on,
        and gap (how much worse meta-test is); METRIC_by_task, first to last in the stream; chance or the reference
        that answers 0, and the nearest class mean of raw inputs; selectivity and relevant_mass (means over blocks);
        state_bytes of one stream, parameters, episodes_per_second. Also written to evaluation.json, with plots.

    Raises:
        UserError: not a run folder, an unfinished run, or no good checkpoint.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    model, source = run.model, run.data
    setting = every_task(EpisodeConfig.from_config(run.config))
    started = time.perf_counter()
    score = meta_test(model, source.test, setting, options.episodes, seed=run.config.seed)
    seconds = time.perf_counter() - started
    trained = meta_test(model, source.train, setting, options.episodes, seed=run.config.seed, held=TRAIN)
    gap = trained.mean - score.mean if score.metric == "accuracy" else score.mean - trained.mean
    found: dict[str, Any] = {
        score.metric: score.mean,
        f"{score.metric}_meta_train": trained.mean,
        "gap": gap,
        f"{score.metric}_by_task": score.by_task(),
        **references(source.test, setting, options.episodes, run.config.vocabulary, seed=run.config.seed),
        **score.terms,
        "parameters": sum(p.numel() for p in model.parameters()),
        "episodes_per_second": options.episodes / seconds,
    }
    if isinstance(model, ContinualLearner):
        found["state_bytes"] = state_bytes(model, source.test, setting)
    runfolder.write_text(run.folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    if options.plots:
        from mambacl import plots

        plots.by_task({run.config.method: score.by_task()}, score.metric, run.folder / "by_task.png")
        if isinstance(model, ContinualLearner):
            shown = association_map(model, source.test, setting, seed=run.config.seed)
            plots.associations({run.config.method: shown}, run.folder / "associations.png")
    return found


def references(
    episodes: Episodes, setting: EpisodeConfig, count: int, vocabulary: int, *, seed: int = 0
) -> dict[str, float]:
    """On the meta-test's own episodes: chance and nearest class mean of the raw inputs, or the loss of answering 0."""
    values = []
    for first in range(0, count, BATCH):
        generator = torch.Generator().manual_seed(TEST + seed * 1_000_003 + first)
        episode = episodes.draw(min(BATCH, count - first), generator, setting)
        if episodes.kind == "class":
            values.append(100 * (nearest_class_mean(episode, vocabulary) == episode.query_y).float())
        else:
            values.append(task_loss(episodes.kind, torch.zeros_like(episode.query_y), episode.query_y))
    mean = torch.cat(values).mean().item()
    if episodes.kind == "class":
        return {"chance": 100 / setting.tasks, "nearest_class_mean": mean}
    return {"answer_zero": mean}


@torch.no_grad()
def state_bytes(model: ContinualLearner, episodes: Episodes, setting: EpisodeConfig) -> int:
    """Bytes that the learner keeps of one stream of ``setting``."""
    episode = episodes.draw(1, torch.Generator().manual_seed(TEST), setting)
    device = next(model.parameters()).device
    return model.observe(episode.x.to(device), episode.y.to(device)).bytes


@torch.no_grad()
def association_map(
    model: ContinualLearner, episodes: Episodes, setting: EpisodeConfig, *, seed: int = 0, count: int = 100
) -> np.ndarray:
    """Mean share q [T, L] that queries of each task give to each token of the stream, over ``count`` episodes, blocks
    and heads. Where T tasks have S shots each, the right one is the block diagonal of 2 S tokens."""
    setting = every_task(setting)
    generator = torch.Generator().manual_seed(TEST + seed * 1_000_003)
    episode = episodes.draw(count, generator, setting).to(next(model.parameters()).device)
    training = model.training
    output = model.eval()(episode)
    model.train(training)
    share = torch.stack([torch.exp(log_q).mean(1) for log_q in output.associations]).mean(0)  # [B, Q, L]
    tasks = episode.query_task[0]  # every task's queries stand at the same places in all episodes
    found: np.ndarray = torch.stack([share[:, tasks == t].mean((0, 1)) for t in range(setting.tasks)]).cpu().numpy()
    return found


def generalize(options: GeneralizeOptions) -> dict[str, Any]:
    """`mambacl generalize`: the meta-test with other numbers of tasks and shots, noise on the inputs, other data.

    Returns:
        METRIC tasks=T, shots=S and noise=σ, one varied at a time; with ``dataset`` also METRIC dataset=own and of the
        other one. Also written to generalization.json, with a plot.

    Raises:
        UserError: more tasks or shots than vocabulary, classes or examples allow, or another data set that the run
            cannot be asked about; before anything is computed.
    """
    run = load(options.run)
    own, setting = run.data.test, every_task(EpisodeConfig.from_config(run.config))
    most = limits(own, setting)
    tasks, shots = options.tasks, options.shots
    if tasks is None:
        last = most["tasks"][0] if most["tasks"][0] < math.inf else 4 * setting.tasks
        tasks = tuple(sorted({round(t) for t in np.linspace(setting.tasks, last, 4).tolist()}))
    if shots is None:
        shots = tuple(k * setting.shots for k in (1, 2, 3, 4) if k * setting.shots <= most["shots"][0])
    asked: list[tuple[str, float | str, Episodes, EpisodeConfig]] = []
    varied: dict[str, tuple[Any, ...]] = {"tasks": tasks, "shots": shots, "noise": options.noise}
    for name, values in varied.items():
        for value in values:
            limit, why = most.get(name, (math.inf, ""))
            if value > limit:
                raise UserError(f"--{name} is {value}: give at most {limit}, as {why}")
            asked.append((name, value, own, replace(setting, **{name: value})))
    if options.dataset is not None:
        other = _other(run, setting, options)
        asked += [("dataset", "own", own, setting), ("dataset", options.dataset, other, setting)]
    found: dict[str, Any] = {}
    curves: dict[str, dict[Any, float]] = {}
    metric = ""
    for name, value, episodes, changed in tqdm(asked, desc="generalize", disable=None):
        score = meta_test(run.model, episodes, changed, options.episodes, seed=run.config.seed)
        metric = score.metric
        found[f"{metric} {name}={value if isinstance(value, str) else f'{value:g}'}"] = score.mean
        curves.setdefault(name, {})[value] = score.mean
    runfolder.write_text(run.folder / "generalization.json", json.dumps(found, indent=2) + "\n")
    if curves:
        from mambacl import plots

        plots.generalization({run.config.method: curves}, metric, run.folder / "generalization.png")
    return found


def limits(episodes: Episodes, setting: EpisodeConfig) -> dict[str, tuple[float, str]]:
    """The most tasks and shots that ``episodes`` can have, and why: {"tasks": (6, "…"), "shots": (math.inf, "")}."""
    found: dict[str, tuple[float, str]] = {"tasks": (math.inf, ""), "shots": (math.inf, "")}
    if episodes.kind == "class":
        found["tasks"] = setting.vocabulary, f"the run's --vocabulary has {setting.vocabulary} symbols"
    if isinstance(episodes, ClassEpisodes):
        classes, least = len(episodes.classes), int(episodes.counts.min())
        if classes < found["tasks"][0]:
            found["tasks"] = classes, f"{classes} classes are there for meta-test"
        found["shots"] = (
            max(0, least - setting.test_shots),
            f"the smallest class has {least} examples, of which --test-shots {setting.test_shots} are asked",
        )
    return found


def _other(run: Run, setting: EpisodeConfig, options: GeneralizeOptions) -> Episodes:
    """The other data set of ``options``, whole. Raises UserError if the run cannot be asked about it."""
    config, where = run.config, f"--dataset {options.dataset}"
    assert options.dataset is not None
    if (options.dataset, options.data_dir) == (config.dataset, config.data_dir):
        raise UserError(f"{where} is what the run was trained on: give another, or leave it out")
    if "sine" in (options.dataset, config.dataset):  # else the kind is that of the run's --variant
        raise UserError(f"{where}: the run was trained on {config.dataset}, and sine asks for another kind of answer")
    chosen = {name: getattr(options, name) for name in ("dataset", "data_dir", "target")}
    episodes = data.load_whole(replace(config, **chosen))
    if episodes.shape != run.data.test.shape:
        raise UserError(
            f"{where}: its examples have the shape {episodes.shape}, the run's {run.data.test.shape}: give examples of "
            "the same shape"
        )
    for name, (limit, why) in limits(episodes, setting).items():
        if getattr(setting, name) > limit:
            raise UserError(
                f"{where}: the run's --{name} is {getattr(setting, name)}, here it can be at most {limit}, as {why}: "
                "give another data set, or train with fewer"
            )
    return episodes


def forgetting_matrix(
    model: nn.Module, episodes: Episodes, setting: EpisodeConfig, count: int, *, seed: int = 0
) -> tuple[str, np.ndarray]:
    """The metric and its value [T, T]: row k after k + 1 tasks of the stream, column t of task t; NaN for t > k."""
    setting = every_task(setting)
    values = np.full((setting.tasks, setting.tasks), np.nan)
    metric = ""
    for k in range(setting.tasks):
        score = meta_test(model, _Prefix(episodes, setting, k + 1), setting, count, seed=seed)
        metric = score.metric
        values[k, : k + 1] = score.by_task()
    return metric, values


class _Prefix(Episodes):
    """The same episodes, cut after the first ``tasks`` tasks of the stream."""

    def __init__(self, episodes: Episodes, setting: EpisodeConfig, tasks: int) -> None:
        super().__init__(episodes.kind, episodes.shape, episodes.outputs, setting, episodes.seed)
        self.whole, self.tasks = episodes, tasks

    def draw(self, count: int, generator: torch.Generator, setting: EpisodeConfig | None = None) -> Episode:
        episode = self.whole.draw(count, generator, setting or self.setting)
        examples, queries = (episode.task[0] < self.tasks), (episode.query_task[0] < self.tasks)
        return Episode(
            episode.x[:, examples], episode.y[:, examples], episode.task[:, examples],
            episode.query_x[:, queries], episode.query_y[:, queries], episode.query_task[:, queries],
        )  # fmt: skip


def forgetting(options: ForgettingOptions) -> dict[str, Any]:
    """`mambacl forgetting`: how the answers for each task fare while the stream goes on.

    Returns:
        METRIC_after_K_tasks (mean over the tasks seen); METRIC_by_lag, of tasks that were the last, the one before, …
        when asked (lag 0, 1, …, T − 1: mean over all places in the stream where there is such a task); forgetting, the
        mean over tasks but the last of how much worse the answer is at the end than at its best. Also written to
        forgetting.json (the whole matrix), with a plot.

    Raises:
        UserError: more tasks than the vocabulary has symbols or the source classes.
    """
    run = load(options.run)
    setting = EpisodeConfig.from_config(run.config)
    if options.tasks is not None:
        setting = replace(setting, tasks=options.tasks)
    if setting.tasks < 2:
        raise UserError("a stream of one task has nothing to forget: give --tasks 2 or more")
    metric, matrix = forgetting_matrix(run.model, run.data.test, setting, options.episodes, seed=run.config.seed)
    found: dict[str, Any] = {f"{metric}_after_{k + 1}_tasks": float(np.nanmean(matrix[k])) for k in range(len(matrix))}
    found[f"{metric}_by_lag"] = by_lag(matrix)
    found["forgetting"] = forgotten(metric, matrix)
    rows = [[None if np.isnan(value) else value for value in row] for row in matrix.tolist()]
    text = json.dumps({**found, "matrix": rows}, indent=2)
    runfolder.write_text(run.folder / "forgetting.json", text + "\n")
    from mambacl import plots

    plots.forgetting(metric, matrix, run.folder / "forgetting.png")
    return found


def forgotten(metric: str, matrix: np.ndarray) -> float:
    """Mean over all tasks but the last of (best before the end − at the end); for losses the other way round."""
    sign = 1.0 if metric == "accuracy" else -1.0
    before, last = sign * matrix[:-1, :-1], sign * matrix[-1, :-1]
    return float((np.nanmax(before, 0) - last).mean())


def by_lag(matrix: np.ndarray) -> list[float]:
    """Scores by how many tasks ago the task came: of lag l the mean over k of matrix[k, k − l]."""
    return [float(np.diagonal(matrix, -lag).mean()) for lag in range(len(matrix))]
