"""iPET (Schick and Schütze 2021), a baseline of the paper: an ensemble of templates that label for each other."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from metazoo.errors import UserError
from metazoo.options import RunOptions

from list_selftrain import data
from list_selftrain.config import Config
from list_selftrain.data import Data, Part
from list_selftrain.train import Run, train_on


def next_set(source: Data, probabilities: np.ndarray, each: Sequence[int], rng: np.random.Generator) -> Part:
    """The labelled examples and pseudo-labelled ones: of each class so many, drawn without replacement with a chance in
    proportion to their probability among those for which the class is the likeliest (iPET, section 3.4).

    Args:
        source: labelled and unlabelled examples. probabilities: of the unlabelled ones, [N, C]. each: how many of each
            class in all, those that are labelled counted. rng: draws them.
    """
    assert source.labelled.labels is not None
    best, held = probabilities.argmax(1), np.bincount(source.labelled.labels, minlength=probabilities.shape[1])
    chosen, labels = [], []
    for label, wanted in enumerate(each):
        members = np.flatnonzero(best == label)
        count = min(max(wanted - int(held[label]), 0), len(members))
        if count:
            chance = probabilities[members, label] / probabilities[members, label].sum()
            chosen.append(rng.choice(members, count, replace=False, p=chance))
            labels += [label] * count
    places = np.concatenate([*chosen, np.zeros(0)]).astype(np.int64)
    more = source.unlabelled.take(places)
    return Part(
        (*source.labelled.texts, *more.texts), np.concatenate([source.labelled.labels, labels]).astype(np.int64)
    )


def ipet(
    config: Config, templates: Sequence[str], *, generations: int = 2, factor: float = 5.0, share: float = 0.25,
    source: Data | None = None, options: RunOptions | None = None,
) -> Run:  # fmt: skip
    """Train iPET; its last classifier learns the probabilities of the last generation's ensemble.

    Args:
        config: data, model and rates; its teacher's epochs train each model of the ensemble, one session the last
            classifier, on the config's own template. templates: patterns in LM-BFF's syntax, one model for each.
        generations: rounds after the first, each on ``factor`` times as many examples, labelled for each model by a
            random ``share`` of the others. source: data [default: what the config names]. options: folder of the
            last classifier's run [default: none is kept].

    Raises:
        UserError: fewer than two templates, or as :func:`list_selftrain.train.train`.
    """
    if len(templates) < 2:
        raise UserError(f"iPET is an ensemble of templates, {len(templates)} are given: give two or more")
    source = data.load(config) if source is None else source
    assert source.labelled.labels is not None
    rng = np.random.default_rng([config.seed, 7])
    alone = replace(config, sessions=0, noise="none", noise_rate=0.0)
    sets = [source.labelled] * len(templates)
    sizes = np.bincount(source.labelled.labels, minlength=len(source.labels)).astype(float)
    votes: list[np.ndarray] = []
    for generation in range(generations + 1):
        if generation:
            sizes *= factor
            others = [[j for j in range(len(templates)) if j != i] for i in range(len(templates))]
            picked = [rng.choice(of, max(1, round(share * len(of))), replace=False) for of in others]
            sets = [
                next_set(source, np.mean([votes[j] for j in some], axis=0), sizes.round().astype(int).tolist(), rng)
                for some in picked
            ]
        votes = [
            _trained(replace(alone, template=template), replace(source, labelled=part)).predict_proba(source.unlabelled)
            for template, part in zip(templates, sets, strict=True)
        ]
    last = replace(
        config, sessions=1, teacher_epochs=0, finetune_epochs=0, weights="uniform", noise="none", noise_rate=0.0
    )
    return _trained(last, replace(source, pseudo=np.mean(votes, axis=0)), options)


def _trained(config: Config, source: Data, options: RunOptions | None = None) -> Run:
    if options is not None:
        return train_on(config, lambda config: source, options)
    with tempfile.TemporaryDirectory(prefix="list-selftrain-") as folder:
        every = RunOptions(output_dir=Path(folder) / "run", checkpoint_every=2**31)
        return train_on(config, lambda config: source, every)
