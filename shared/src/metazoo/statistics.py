"""Intervals and effects from few seeds.

A percentile bootstrap over n paired differences covers 84 % at n = 5 and 90 % at n = 10 where it promises
95 %; the paired t interval keeps its promise there, so it decides below 20 seeds. From 20 seeds on a
bootstrap decides, with widened percentiles, as the plain ones still cover only 92 % at n = 20.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from metazoo.errors import UserError

Floats = NDArray[np.float64]
Compare = Literal["difference", "ratio", "value"]
Arm = Sequence[float] | Sequence[Sequence[float]]  # one value per seed, or per seed one value per task

BOOTSTRAP_FROM = 20  # seeds
RESAMPLES = 9999
TASK_RESAMPLES = 1999
_SEED = 20150101  # of the resampling alone: two runs of one report agree


@dataclass(frozen=True)
class Estimate:
    """An effect with its interval; ``task_low`` and ``task_high`` where a seed holds several tasks."""

    effect: float
    low: float
    high: float
    task_low: float | None = None
    task_high: float | None = None


def paired_interval(differences: ArrayLike, confidence: float = 0.95) -> tuple[Floats, Floats]:
    """Interval of the mean of n differences, one per seed.

    Below 20 seeds the t interval, mean ± t_{n−1} s/√n. From 20 on the percentile bootstrap of the mean with
    the expanded percentiles Φ(−√(n/(n−1)) t_{n−1}) of Hesterberg, "What teachers should know about the
    bootstrap" (The American Statistician 69(4), 2015), which undo that a bootstrap's spread is √((n−1)/n) too
    small.

    Args:
        differences: (..., n), in any unit; each row is a sample of its own.
        confidence: what share of such intervals is to hold the true mean.

    Returns:
        low and high, each (...), in the same unit. Equal differences give a point, a single one gives
        (−∞, ∞).

    Raises:
        UserError: no differences, or one is NaN or infinite.
    """
    values = _checked(differences)
    n = values.shape[-1]
    first = values[..., 0]
    if n == 1:
        return np.full_like(first, -np.inf), np.full_like(first, np.inf)
    low, high = (_t_interval if n < BOOTSTRAP_FROM else _bootstrap_interval)(values, confidence)
    point = (values == values[..., :1]).all(axis=-1)  # a mean of equal numbers may differ in the last digit
    return np.where(point, first, low), np.where(point, first, high)


def _checked(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim == 0 or array.size == 0:
        raise UserError("no values to compare: measure at least one seed")
    if not np.isfinite(array).all():
        raise UserError("values to compare hold NaN or infinity: mend the measurement")
    return array


def _t_quantile(n: int, confidence: float) -> float:
    from scipy.special import stdtrit

    return float(stdtrit(n - 1, (1 + confidence) / 2))


def _t_interval(values: Floats, confidence: float) -> tuple[Floats, Floats]:
    n = values.shape[-1]
    mean = values.mean(axis=-1)
    half = _t_quantile(n, confidence) * values.std(axis=-1, ddof=1) / math.sqrt(n)
    return mean - half, mean + half


def _bootstrap_interval(values: Floats, confidence: float) -> tuple[Floats, Floats]:
    from scipy.special import ndtr

    n = values.shape[-1]
    counts = np.random.default_rng(_SEED).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    means = values @ (counts.T / n)
    tail = float(ndtr(-math.sqrt(n / (n - 1)) * _t_quantile(n, confidence)))
    low, high = np.quantile(means, [tail, 1 - tail], axis=-1)
    return low, high


def hierarchical_interval(
    differences: Sequence[ArrayLike], confidence: float = 0.95
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Interval of the mean over seeds of the mean over tasks.

    The first pair decides: :func:`paired_interval` of the seeds' means. A seed's mean carries the chance of
    its tasks with it, so no more resampling is wanted for coverage: Davison and Hinkley, "Bootstrap Methods
    and their Application" (1997), section 3.8, show that resampling at both levels counts the tasks' spread
    twice. The second pair is that bootstrap (seeds resampled, tasks resampled within each). By simulation it
    covers 86 % at 5 seeds where the seeds differ most and 98 % where only the tasks do, the first pair 94 to
    96 % in both; so it does not decide and stands beside: where it is the wider one, most of the chance lies
    in the tasks.

    Args:
        differences: per seed an array (tasks,); seeds may hold different numbers of tasks.
        confidence: as in :func:`paired_interval`.

    Returns:
        (low, high) that decides, and (low, high) with tasks resampled within seeds.

    Raises:
        UserError: a seed without tasks, NaN or infinity.
    """
    seeds = [_checked(tasks) for tasks in differences]
    low, high = paired_interval([tasks.mean() for tasks in seeds], confidence)
    generator = np.random.default_rng(_SEED)
    n = len(seeds)
    drawn = generator.integers(0, n, size=(TASK_RESAMPLES, n))
    means = np.empty(drawn.shape)
    for index, tasks in enumerate(seeds):
        where = drawn == index
        picks = generator.multinomial(tasks.size, np.full(tasks.size, 1 / tasks.size), size=int(where.sum()))
        means[where] = picks @ tasks / tasks.size
    tail = (1 - confidence) / 2
    task_low, task_high = np.quantile(means.mean(axis=1), [tail, 1 - tail])
    return (float(low), float(high)), (float(task_low), float(task_high))


def effect(treatment: Arm, baseline: Arm | None, compare: Compare = "difference", confidence: float = 0.95) -> Estimate:
    """Effect of the treatment over seeds, paired by position: seed with seed and, within it, task with task.

    "difference": mean of treatment − baseline, in the metric's unit. "ratio": geometric mean of treatment /
    baseline, computed and its interval formed on the log scale, and exponentiated back. "value": mean of the
    treatment alone.

    Args:
        treatment: per seed a value, or the values of its tasks.
        baseline: the same seeds and tasks; None for "value".
        compare: which effect.
        confidence: as in :func:`paired_interval`.

    Raises:
        UserError: arms of different lengths, NaN, or a ratio of values that are not positive.
    """
    ours = _arm(treatment)
    if baseline is None:
        theirs = None
    else:
        theirs = _arm(baseline)
        if [x.size for x in ours] != [x.size for x in theirs]:
            raise UserError("the arms hold different numbers of seeds or tasks: measure the same ones")
    if compare == "ratio" and min(float(x.min()) for x in [*ours, *(theirs or [])]) <= 0:
        raise UserError("a ratio needs positive values: compare by difference, or mend the metric")
    if theirs is None:
        paired = ours
    elif compare == "ratio":
        paired = [np.log(x) - np.log(y) for x, y in zip(ours, theirs, strict=True)]
    else:
        paired = [x - y for x, y in zip(ours, theirs, strict=True)]
    back = _exp if compare == "ratio" else float
    means = [float(x.mean()) for x in paired]
    middle = means[0] if len(set(means)) == 1 else float(np.mean(means))
    if all(x.size == 1 for x in paired):
        low, high = (float(x) for x in paired_interval(means, confidence))
        return Estimate(back(middle), back(low), back(high))
    (low, high), (task_low, task_high) = hierarchical_interval(paired, confidence)
    return Estimate(back(middle), back(low), back(high), back(task_low), back(task_high))


def _exp(x: float) -> float:
    return math.exp(x) if x < 700 else math.inf  # two seeds give intervals of any width


def _arm(values: Arm) -> list[Floats]:
    if not len(values):
        raise UserError("no values to compare: measure at least one seed")
    return [_checked(np.atleast_1d(np.asarray(seed, dtype=np.float64))) for seed in values]


def interquartile_mean(values: Arm) -> float:
    """Mean of the middle half of all values, seeds and tasks pooled.

    Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice" (NeurIPS 2021),
    section 4.3: a quarter of the values, rounded down, is left out at each end.
    """
    pooled = np.sort(np.concatenate(_arm(values)))
    cut = pooled.size // 4
    return float(pooled[cut : pooled.size - cut].mean())


def probability_of_improvement(treatment: Arm, baseline: Arm, better: Literal["greater", "less"] = "greater") -> float:
    """Chance that a run of the treatment beats a run of the baseline on a task, averaged over tasks.

    Agarwal et al. (2021), section 4.3: P(X > Y) = 1/(N K) Σ_i Σ_j S(x_i, y_j) with S = 1 if x_i > y_j, ½ if
    equal: the Mann–Whitney statistic, over all pairs of seeds. Seeds with different numbers of tasks are
    compared by their means.
    """
    ours, theirs = _arm(treatment), _arm(baseline)
    if len({x.size for x in [*ours, *theirs]}) > 1:
        ours, theirs = [x.mean(keepdims=True) for x in ours], [x.mean(keepdims=True) for x in theirs]
    x, y = np.stack(ours)[:, None], np.stack(theirs)[None]  # (N, 1, tasks), (1, K, tasks)
    if better == "less":
        x, y = -x, -y
    return float(((x > y) + 0.5 * (x == y)).mean())
