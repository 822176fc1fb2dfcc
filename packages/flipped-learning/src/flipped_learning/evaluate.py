"""Zero-shot evaluation: accuracy and macro-F1 of each template, of seen and of novel label words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from metazoo import runfolder
from metazoo.errors import UserError
from tqdm import tqdm

from flipped_learning import baselines, data, flipping, metrics
from flipped_learning.config import Config, EvaluateOptions, SweepOptions
from flipped_learning.data import Task
from flipped_learning.model import parameters
from flipped_learning.templates import NOVEL_PAIRS, SEEN_PAIRS, Template
from flipped_learning.train import Run, load

Pair = tuple[str, str]


@dataclass
class Score:
    """Of one template and set of options: accuracy and macro_f1 in percent, ties, examples; scores and references."""

    accuracy: float
    macro_f1: float
    ties: int
    scores: list[np.ndarray]
    references: np.ndarray


def score_template(
    run: Run, task: Task, template: Template, limit: int | None, *, options: Sequence[str] | None = None,
    batch_size: int = 64,
) -> Score | None:  # fmt: skip
    """Score the first ``limit`` test examples of ``task`` with one template; None where it has no prompt for any."""
    instances = [one for one in data.instances(task, template, limit, options) if one.label is not None]
    if not instances:
        return None
    scores = run.score(instances, batch_size)
    best, ties = flipping.choose(scores)
    references = np.array([one.label for one in instances])
    found = metrics.compute(best, references)
    return Score(found["accuracy"], found["macro_f1"], ties, scores, references)


def open_templates(task: Task) -> list[Template]:
    """Templates whose prompt shows no option: the only ones for which labels can be exchanged fairly."""
    return [template for template in task.templates if template.takes_pairs]


def pair_metrics(
    run: Run, task: Task, pairs: Sequence[Pair], limit: int | None, *, batch_size: int = 64, progress: bool = True
) -> dict[Pair, dict[str, float]]:
    """accuracy and macro_f1 in percent of each pair of label words (negative, positive): means over the open templates.

    Raises:
        UserError: the task is no two-class sentiment set, or all of its templates show their options.
    """
    templates = open_templates(task) if task.sentiment else []
    if not templates:
        raise UserError(
            f"{task.name}: label words can be exchanged in two-class sentiment sets with a template that shows no "
            "options; it is none, or has none"
        )
    if run.config.model == "bag":
        templates = templates[:1]  # it reads no instruction
    found = {}
    for pair in tqdm(pairs, desc=f"{task.name} pairs", disable=None if progress else True):
        all_scores = [
            score_template(run, task, template, limit, options=pair, batch_size=batch_size) for template in templates
        ]
        scores = [score for score in all_scores if score is not None]
        found[pair] = {
            "accuracy": float(np.mean([score.accuracy for score in scores])),
            "macro_f1": float(np.mean([score.macro_f1 for score in scores])),
        }
    return found


def pair_scores(
    run: Run, task: Task, pairs: Sequence[Pair], limit: int | None, *, batch_size: int = 64, progress: bool = True
) -> dict[Pair, float]:
    """macro_f1 of :func:`pair_metrics`."""
    found = pair_metrics(run, task, pairs, limit, batch_size=batch_size, progress=progress)
    return {pair: values["macro_f1"] for pair, values in found.items()}


def seen_pairs(config: Config) -> tuple[Pair, ...]:
    """The pairs that the run was trained with; negative and positive where it was with the templates' own labels."""
    return SEEN_PAIRS[: config.pairs] or (("negative", "positive"),)


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Accuracy and macro-F1 of a run on the test examples of its data sets and of those that it was not trained on.

    Returns:
        For each data set: NAME accuracy and NAME macro_f1 (means over templates; of runs with --pairs over the pairs of
        training, too), NAME chance (macro-F1 of the most frequent label), NAME calibration_error; of sentiment sets
        with an open template NAME seen_f1 and NAME novel_f1 (means over pairs of label words); of data sets with
        training labels NAME tfidf_f1 (supervised logistic regression). parameters. All also goes to evaluation.json,
        with each template and pair, and to plots.

    Raises:
        UserError: not a run folder, an unfinished run, or no good checkpoint.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    found: dict[str, Any] = {}
    details: dict[str, Any] = {}
    calibration: dict[str, Any] = {}
    pairs_of: dict[str, dict[str, float]] = {}
    for task in (*run.data.tasks, *run.data.zero_shot):
        exchanged = bool(run.config.pairs) and task.sentiment
        choices: list[Pair | None] = [*seen_pairs(run.config)] if exchanged else [None]
        rows, kept = [], []
        for template in tqdm(task.templates, desc=task.name, disable=None):
            for choice in choices:
                score = score_template(
                    run, task, template, options.examples, options=choice, batch_size=options.batch_size
                )
                if score is None:
                    continue
                kept.append(score)
                row: dict[str, Any] = {"template": template.name, "accuracy": score.accuracy}
                row |= {"macro_f1": score.macro_f1, "ties": score.ties, "examples": len(score.references)}
                rows.append(row | ({"options": list(choice)} if choice else {}))
            if run.config.model == "bag":
                break  # it reads no instruction
        if not kept:
            found[f"{task.name} accuracy"] = "no prompt for any test example"
            continue
        name = task.name
        found[f"{name} accuracy"] = float(np.mean([score.accuracy for score in kept]))
        found[f"{name} macro_f1"] = float(np.mean([score.macro_f1 for score in kept]))
        references = kept[0].references
        found[f"{name} chance"] = baselines.majority(task, references)["macro_f1"]
        pooled = [values for score in kept for values in score.scores]
        truth = np.concatenate([score.references for score in kept])
        found[f"{name} calibration_error"] = metrics.calibration_error(pooled, truth)
        calibration[name] = metrics.reliability(pooled, truth)
        details[name] = rows
        if task.sentiment and open_templates(task):
            pairs = pair_scores(
                run, task, [*seen_pairs(run.config), *NOVEL_PAIRS], options.examples, batch_size=options.batch_size
            )
            for part, words in (("seen_f1", seen_pairs(run.config)), ("novel_f1", NOVEL_PAIRS)):
                found[f"{name} {part}"] = float(np.mean([pairs[pair] for pair in words]))
            pairs_of[name] = {"/".join(pair): value for pair, value in pairs.items()}
        if task.train and task.test and all("label" in one for one in (*task.train, *task.test)):
            found[f"{name} tfidf_f1"] = baselines.tfidf(task, options.examples)["macro_f1"]
    found["parameters"] = parameters(run.model)
    text = json.dumps({**found, "templates": details, "pairs": pairs_of}, indent=2, ensure_ascii=False)
    runfolder.write_text(run.folder / "evaluation.json", text + "\n")
    if options.plots:
        from flipped_learning import plots

        if calibration:
            plots.calibration(calibration, run.folder / "calibration.png")
        if pairs_of:
            seen = {"/".join(pair) for pair in seen_pairs(run.config)}
            plots.pairs(pairs_of, seen, run.folder / "pairs.png")
    return found


def label_sweep(options: SweepOptions) -> dict[str, Any]:
    """`flipped-learning label-sweep`: macro-F1 of a run on its sentiment sets, by pair of label words.

    Returns:
        "NAME negative/positive": macro-F1 in percent; also written to label-sweep.json, with a plot.

    Raises:
        UserError: no sentiment set with a template that shows no options, or as :func:`load`.
    """
    run = load(options.run)
    tasks = [task for task in (*run.data.tasks, *run.data.zero_shot) if task.sentiment and open_templates(task)]
    if not tasks:
        raise UserError(
            f"{options.run} has no two-class sentiment set with a template that shows no options: train with "
            "--dataset mr, or give templates without them"
        )
    asked = [(a.strip(), b.strip()) for a, b in (pair.split("/") for pair in options.pairs)]
    pairs = asked or list(dict.fromkeys([*seen_pairs(run.config), *SEEN_PAIRS, *NOVEL_PAIRS]))
    by_task = {
        task.name: {
            "/".join(pair): value
            for pair, value in pair_scores(run, task, pairs, options.examples, batch_size=options.batch_size).items()
        }
        for task in tasks
    }
    runfolder.write_text(run.folder / "label-sweep.json", json.dumps(by_task, indent=2, ensure_ascii=False) + "\n")
    from flipped_learning import plots

    seen = {"/".join(pair) for pair in seen_pairs(run.config)}
    plots.pairs(by_task, seen, run.folder / "label-sweep.png")
    return {f"{name} {pair}": value for name, values in by_task.items() for pair, value in values.items()}
