"""Scores of a learner: classes trained on and novel ones, in context and out of it, and other data sets' classes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from torch import Tensor

from open_mede import data, metrics
from open_mede.config import EvaluateOptions
from open_mede.data import Clips, VideoClips
from open_mede.model import Learner, VideoTextClassifier
from open_mede.train import Run, load


@dataclass(frozen=True)
class Scored:
    """What a learner said of a test set.

    Attributes:
        classes: names.
        labels: [N] numbers of classes.
        probabilities: [N, C], the mean over views.
        indices: [N] numbers of the clips that could be read.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    probabilities: np.ndarray
    indices: np.ndarray

    @property
    def accuracy(self) -> float:
        """Top-1 in %."""
        return metrics.accuracy(self.probabilities, self.labels)

    @property
    def by_class(self) -> dict[str, float]:
        """Top-1 in % of each class."""
        return metrics.by_class(self.probabilities, self.labels, self.classes)


class OpenVocabularyEvaluator:
    """Asks a learner for classes by name; texts of a list of classes are encoded once.

    Args:
        model: a VideoTextClassifier, or a learner of feature vectors.
        templates: prompts of a class.
        batch_size: clips at a time.
    """

    def __init__(self, model: Learner, templates: Sequence[str] = ("{}",), batch_size: int = 64) -> None:
        self.model, self.templates, self.batch_size = model, tuple(templates), batch_size
        self._texts: dict[tuple[str, ...], Tensor] = {}

    def texts(self, classes: Sequence[str]) -> Tensor:
        """[C, d]."""
        key = tuple(classes)
        if key not in self._texts:
            self._texts[key] = self.model.encode_texts(key, self.templates)
        return self._texts[key]

    @torch.no_grad()
    def score(self, clips: Clips | VideoClips) -> Scored:
        """Of a test set, each clip among its classes.

        Raises:
            UserError: no clips, a video that cannot be read with --unreadable stop, or none that can.
        """
        if not len(clips):
            raise UserError("no clips to score")
        if isinstance(clips, VideoClips) and isinstance(self.model, VideoTextClassifier):
            clips.size = self.model.size
        self.model.eval()
        texts = self.texts(clips.classes)
        probabilities, indices = [], []
        for first in range(0, len(clips), self.batch_size):
            asked = range(first, min(first + self.batch_size, len(clips)))
            views, read = clips.testing(asked)
            if not len(read):
                continue
            flat = self.model.pixels(views.reshape(-1, *views.shape[2:]))
            said = self.model(flat, texts).softmax(-1).view(*views.shape[:2], -1).mean(1)
            probabilities.append(said.float().cpu().numpy())
            indices.append(read)
        if not indices:
            raise UserError(f"none of the {len(clips)} videos can be read, as {clips.name(0)}: look at --data-dir")
        kept = np.concatenate(indices)
        return Scored(clips.classes, clips.labels[kept], np.concatenate(probabilities), kept)

    def __call__(self, tests: Mapping[str, Clips | VideoClips]) -> dict[str, float]:
        """Top-1 in % of each test set, and what :func:`open_mede.metrics.summary` adds."""
        return metrics.summary({name: self.score(clips).accuracy for name, clips in tests.items()})


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Scores of a run on its own tests, or on another data set.

    Args:
        run: a run, or its folder.
        options: which weights, what is asked for, and how.

    Returns:
        Top-1 in % of each test set: base_in, base_out, novel_in, novel_out of generated clips (out: the same motions on
        other backgrounds), base and novel of videos, else the data set's name; hm, hm_in, hm_out of base and novel,
        base_hm, novel_hm of in and out of context, base_drop, novel_drop in less out; chance_ before a set's name;
        skipped videos. Also goes to evaluation.json, with by_class of each set.

    Raises:
        UserError: not a run folder, an unfinished run, no good checkpoint, no test clips, or no such average.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    if options.average is not None and options.average not in run.weights:
        held = ", ".join(name for name in run.weights if name != "start") or "none"
        raise UserError(f"--average {options.average}: the run has {held}: leave it out, or give one of these")
    model = run.use(options.average)
    tests = _tests(run, options)
    evaluator = OpenVocabularyEvaluator(model, options.templates or run.config.templates, options.batch_size)
    scored = {name: evaluator.score(clips) for name, clips in tests.items()}
    found: dict[str, Any] = metrics.summary({name: one.accuracy for name, one in scored.items()})
    found |= {f"chance_{name}": 100 / len(one.classes) for name, one in scored.items()}
    if videos := [clips for clips in tests.values() if isinstance(clips, VideoClips)]:
        found["skipped"] = sum(len(clips.skipped) for clips in videos)
    said = [options.dataset and _stem(options), options.average]
    stem = "-".join(["evaluation", *(str(one) for one in said if one)])
    kept = {**found, "by_class": {name: one.by_class for name, one in scored.items()}}
    runfolder.write_text(run.folder / f"{stem}.json", json.dumps(kept, indent=2) + "\n")
    if options.plots:
        _plot(run.folder, stem, tests, scored)
    return found


def _stem(options: EvaluateOptions) -> str:
    """Name of another data set: of its file, or, as many are called videos.csv, of the folder that it is in."""
    path = Path(options.dataset or "")
    name = path.absolute().parent.name if path.stem == "videos" else path.stem
    return name if options.list_number == 1 else f"{name}-{options.list_number}"


def _tests(run: Run, options: EvaluateOptions) -> Mapping[str, Clips | VideoClips]:
    config = replace(
        run.config, views=options.views or run.config.views, unreadable=options.unreadable or run.config.unreadable
    )
    if options.dataset is not None:
        if run.config.dataset == "features":
            raise UserError("--dataset: this run has learned of feature vectors, not of videos: leave it out")
        trained = run.data.train.classes if run.data.train is not None and options.without_trained else ()
        other = data.other_data(options.dataset, options.data_dir, options.list_number, config, trained)
        return {_stem(options): other}
    if not run.data.tests:
        raise UserError(f"{run.config.dataset}: no test clips: give a split with train and test, or --dataset")
    for clips in run.data.tests.values():
        if isinstance(clips, VideoClips):
            clips.config = config
    return run.data.tests


def _plot(folder: Path, stem: str, tests: Mapping[str, Clips | VideoClips], scored: Mapping[str, Scored]) -> None:
    from open_mede import plots

    bars = {
        name: (one.accuracy, *metrics.interval(int((one.probabilities.argmax(1) == one.labels).sum()), len(one.labels)))
        for name, one in scored.items()
    }
    plots.accuracies(
        bars, folder / f"{stem}.png", chance={name: 100 / len(one.classes) for name, one in scored.items()}
    )
    for kind in ("base", "novel"):
        if f"{kind}_in" in scored and f"{kind}_out" in scored:
            plots.reliance(scored[f"{kind}_in"].by_class, scored[f"{kind}_out"].by_class, folder / f"{stem}-{kind}.png")
    strips = []
    for name, one in scored.items():
        for row in range(min(3, len(one.labels))):
            views, read = tests[name].testing([int(one.indices[row])])
            if len(read) and views.ndim == 6:
                said = _said(one.probabilities[row], one.classes)
                strips.append((views[0, 0], f"{name}: {one.classes[one.labels[row]]}", said))
    if strips:
        plots.strips(strips, folder / f"{stem}-strips.png")


def _said(probabilities: np.ndarray, classes: Sequence[str], top: int = 1) -> list[tuple[str, float]]:
    order = np.argsort(-probabilities)[:top]
    return [(classes[i], float(probabilities[i])) for i in order]
