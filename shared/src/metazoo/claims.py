"""The paper's claims as code: a record per claim, and the verdict on what was measured.

A verdict compares the effect's 95 % interval with a margin that was fixed before measuring:

- "reproduced": the whole interval lies beyond the margin (at it or on the better side);
- "not reproduced": the whole interval lies short of it;
- "inconclusive": the margin lies inside;
- "no verdict": fewer than 5 seeds, whatever the interval.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from metazoo.errors import UserError

MIN_SEEDS = 5
Verdict = Literal["reproduced", "not reproduced", "inconclusive", "no verdict"]
Values = Sequence[float] | Sequence[Sequence[float]]
Cell = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A statement of the paper, how it is measured, and what counts as having reproduced it.

    Raises:
        UserError: the record contradicts itself; the message names the claim.
    """

    name: str
    """In kebab-case: "routing-recovery"."""
    version: int
    """Bumped when metric, margin, arms or data change; results of older versions are not mixed in."""
    source: str
    """Where the paper says it: "Section 4.1, Figure 3"."""
    statement: str
    """The claim in one sentence."""
    paper: str
    """The figure that the paper reports, or "not stated" with what it does report."""
    metric: str
    """Key in what `measure` returns that is compared."""
    arms: Mapping[str, Mapping[str, object]]
    """Scale ("small", "paper") -> arm -> its config, a frozen dataclass."""
    measure: Callable[[Any, int], Mapping[str, object]]
    """(config, seed) -> metrics: floats, or a list of floats, one per task. A module-level function."""
    treatment: str
    """The arm that the claim is about."""
    baseline: str | None
    """The arm it is compared with; None for a stated value."""
    compare: Literal["difference", "ratio", "value"] = "difference"
    """treatment − baseline, treatment / baseline (judged on the log scale), or the treatment's own value."""
    better: Literal["greater", "less"] = "greater"
    """On which side of the margin the effect must lie. Unused where a tolerance is given."""
    margin: float
    """Least effect that counts, in the metric's unit or as a ratio; the stated value for "value"."""
    seeds: int
    """Seeds per arm; at least 5 for a verdict."""
    tolerance: float | None = None
    """For "value" only: how far from `margin` the interval may reach; None judges one side, as `better` says."""
    flagship: bool = False
    """Measured by `reproduce` alone, in minutes."""
    chance: float | None = None
    """What guessing gives on the metric."""
    tuning: Mapping[str, int]
    """Trials of tuning spent on each arm."""
    also: tuple[str, ...] = ()
    """Further metrics whose means the report shows."""

    def __post_init__(self) -> None:
        def refuse(what: str) -> None:
            raise UserError(f"claim {self.name!r}: {what}")

        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", self.name):
            refuse("the name is not kebab-case: use lower-case letters, digits and single hyphens")
        for field in ("source", "statement", "paper", "metric"):
            if not getattr(self, field):
                refuse(f"{field} is empty: say it")
        for field, value in (("version", self.version), ("seeds", self.seeds)):
            if value < 1:
                refuse(f"{field} is {value}: give 1 or more")
        if self.compare not in ("difference", "ratio", "value") or self.better not in ("greater", "less"):
            refuse(f"compare is {self.compare!r} and better {self.better!r}: see the fields' texts")
        if not math.isfinite(self.margin) or (self.compare == "ratio" and self.margin <= 0):
            refuse(f"margin is {self.margin}: give a finite number, above 0 for a ratio")
        if self.chance is not None and not math.isfinite(self.chance):
            refuse(f"chance is {self.chance}: give a finite number or None")
        if self.compare == "value":
            if self.baseline is not None:
                refuse('compare="value" has no baseline: set it to None')
            if self.tolerance is not None and not 0 <= self.tolerance < math.inf:
                refuse(f"tolerance is {self.tolerance}: give 0 or more, or None")
        else:
            if self.baseline is None or self.baseline == self.treatment:
                refuse(f"compare={self.compare!r} needs a baseline other than the treatment")
            if self.tolerance is not None:
                refuse('a tolerance is for compare="value" only: leave it out')
        if not self.arms:
            refuse('no arms: give at least the scale "small"')
        for scale, arms in self.arms.items():
            for arm in (self.treatment, self.baseline):
                if arm is not None and arm not in arms:
                    refuse(f"unknown arm {arm!r} at scale {scale!r}: one of {', '.join(arms) or '(none)'}")
            for arm, config in arms.items():
                if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", arm):
                    refuse(f"arm {arm!r} becomes part of a file name: use letters, digits, '.', '_' and '-'")
                if not dataclasses.is_dataclass(config) or isinstance(config, type):
                    refuse(f"the config of arm {arm!r} at scale {scale!r} is no dataclass instance")
            if set(self.tuning) != set(arms):
                refuse(f"tuning names {sorted(self.tuning)}, the arms at scale {scale!r} are {sorted(arms)}")
        if "<" in self.measure.__qualname__:
            refuse("measure is a lambda or a local function: workers need one at a module's level")


@dataclass(frozen=True, kw_only=True)
class Effect:
    """What was found: the effect with its 95 % interval, and the verdict.

    `task_low` and `task_high` are the interval with tasks resampled within seeds, where a seed holds several
    tasks. `iqm_*` are the interquartile means of the arms, over seeds and tasks.
    """

    effect: float
    low: float
    high: float
    verdict: Verdict
    n_seeds: int
    iqm_treatment: float
    iqm_baseline: float | None
    probability_of_improvement: float | None
    task_low: float | None
    task_high: float | None


def verdict(claim: Claim, treatment: Values, baseline: Values | None) -> Effect:
    """Judge ``claim`` by one value (or list of task values) per seed of each arm, in the same order.

    Raises:
        UserError: the arms differ in seeds or tasks, a value is NaN, or a ratio is asked of values that are
            not positive.
    """
    from metazoo import statistics

    try:
        found = statistics.effect(treatment, baseline, claim.compare)
        improvement = (
            None if baseline is None else statistics.probability_of_improvement(treatment, baseline, claim.better)
        )
        iqm = [None if arm is None else statistics.interquartile_mean(arm) for arm in (treatment, baseline)]
    except UserError as error:
        raise UserError(f"claim {claim.name!r}, metric {claim.metric!r}: {error}") from error
    assert iqm[0] is not None
    return Effect(
        effect=found.effect,
        low=found.low,
        high=found.high,
        verdict=_verdict(claim, found.low, found.high) if len(treatment) >= MIN_SEEDS else "no verdict",
        n_seeds=len(treatment),
        iqm_treatment=iqm[0],
        iqm_baseline=iqm[1],
        probability_of_improvement=improvement,
        task_low=found.task_low,
        task_high=found.task_high,
    )


def _verdict(claim: Claim, low: float, high: float) -> Verdict:
    if claim.tolerance is not None:
        least, most = claim.margin - claim.tolerance, claim.margin + claim.tolerance
        inside, outside = least <= low and high <= most, high < least or low > most
    elif claim.better == "greater":
        inside, outside = low >= claim.margin, high < claim.margin
    else:
        inside, outside = high <= claim.margin, low > claim.margin
    return "reproduced" if inside else "not reproduced" if outside else "inconclusive"


def judge(claim: Claim, cells: Sequence[Cell]) -> dict[str, Any]:
    """The row of ``claim`` for <scale>.json.

    Args:
        claim: whose cells these are.
        cells: what :mod:`metazoo.sweep` stored, of all arms and the same seeds in each; each has arm, seed,
            metrics, seconds and git.

    Raises:
        UserError: a cell is missing or twice there, lacks a metric, or holds NaN; the message names claim,
            arm and seed.
    """
    arms: dict[str, dict[int, Cell]] = {}
    for cell in cells:
        seeds_of = arms.setdefault(cell["arm"], {})
        if cell["seed"] in seeds_of:
            raise UserError(f"claim {claim.name!r}, arm {cell['arm']}, seed {cell['seed']}: measured twice")
        seeds_of[cell["seed"]] = cell
    seeds = sorted({cell["seed"] for cell in cells})
    for arm in filter(None, (claim.treatment, claim.baseline, *arms)):
        for seed in seeds or [0]:
            if seed not in arms.get(arm, {}):
                raise UserError(f"claim {claim.name!r}, arm {arm}, seed {seed}: not measured; sweep again")
    values = {arm: [_value(claim, arm, of[seed], claim.metric) for seed in seeds] for arm, of in arms.items()}
    found = verdict(claim, values[claim.treatment], values[claim.baseline] if claim.baseline else None)
    revisions = sorted({str(revision) for cell in cells if (revision := cell["git"]["revision"])})
    dirty = {cell["git"]["dirty"] for cell in cells}  # None: measured outside a repository
    return {
        "name": claim.name,
        "version": claim.version,
        "source": claim.source,
        "statement": claim.statement,
        "paper": claim.paper,
        "metric": claim.metric,
        "compare": claim.compare,
        "treatment": claim.treatment,
        "baseline": claim.baseline,
        "margin": claim.margin,
        "tolerance": claim.tolerance,
        "better": claim.better,
        "effect": found.effect,
        "low": _json(found.low),
        "high": _json(found.high),
        "task_low": found.task_low,
        "task_high": found.task_high,
        "probability_of_improvement": found.probability_of_improvement,
        "seeds": found.n_seeds,
        "planned_seeds": claim.seeds,
        "verdict": found.verdict,
        "flagship": claim.flagship,
        "seconds": round(sum(float(cell["seconds"]) for cell in cells), 3),
        "arms": {arm: _arm_row(claim, arm, [of[seed] for seed in seeds]) for arm, of in arms.items()},
        "chance": claim.chance,
        "tuning": dict(claim.tuning),
        "revisions": revisions,
        "dirty": next((state for state in (True, None) if state in dirty), False),
    }


def _arm_row(claim: Claim, arm: str, cells: Sequence[Cell]) -> dict[str, Any]:
    """Mean, seeds' means, interquartile mean, and the means of the further metrics."""
    from metazoo.statistics import interquartile_mean

    values = [_value(claim, arm, cell, claim.metric) for cell in cells]
    means = [_mean(value) for value in values]
    also = {
        metric: math.fsum(_mean(_value(claim, arm, cell, metric)) for cell in cells) / len(cells)
        for metric in claim.also
    }
    return {
        "mean": math.fsum(means) / len(means),
        "iqm": interquartile_mean([_listed(value) for value in values]),
        "values": means,
        "also": also,
    }


def _value(claim: Claim, arm: str, cell: Cell, metric: str) -> Any:
    where = f"claim {claim.name!r}, arm {arm}, seed {cell['seed']}"
    metrics = cell["metrics"]
    if metric not in metrics:
        raise UserError(f"{where}: no metric {metric!r}, measure() gives {', '.join(metrics) or 'none'}")
    value = metrics[metric]
    for number in _listed(value) or [None]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise UserError(f"{where}: {metric} is {value!r}, not a number or a list of numbers")
        if not math.isfinite(number):
            raise UserError(f"{where}: {metric} is {number}; mend measure() so that it gives a finite number")
    return value


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _mean(value: Any) -> float:
    numbers = _listed(value)
    return math.fsum(numbers) / len(numbers)


def _json(number: float) -> float | None:
    return number if math.isfinite(number) else None  # JSON knows no infinity
