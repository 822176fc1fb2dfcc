"""Intervals, effects and the judge: numbers worked by hand, coverage and rates by simulation, properties."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo.claims import Verdict, verdict
from metazoo.errors import UserError
from metazoo.statistics import (
    effect,
    hierarchical_interval,
    interquartile_mean,
    paired_interval,
    probability_of_improvement,
)
from metazoo_toy import claim
from numpy.typing import NDArray
from scipy import stats

FINITE = st.floats(-1e3, 1e3, allow_subnormal=False).map(lambda x: round(x, 6))
POSITIVE = st.floats(1e-3, 1e3)


def spread(n: int) -> NDArray[np.float64]:
    """n values that look like a sample, without a generator."""
    return stats.norm.ppf((np.arange(n) + 0.5) / n) + 0.1 * np.arange(n) ** 0.5  # type: ignore[no-any-return]


def test_t_interval_by_hand() -> None:
    """1, 2, 3, 4, 5: mean 3, s = √2.5, t(4) = 2.7764 gives 3 ± 2.7764 · √(2.5/5) = 3 ± 1.9632."""
    low, high = paired_interval([1, 2, 3, 4, 5])
    assert float(low) == pytest.approx(3 - 1.96324, abs=1e-5)
    assert float(high) == pytest.approx(3 + 1.96324, abs=1e-5)


@pytest.mark.parametrize("n", [2, 5, 19])
def test_t_interval_is_scipys(n: int) -> None:
    """Below 20 values the interval is that of a one-sample t test."""
    values = spread(n)
    expected = stats.ttest_1samp(values, 0).confidence_interval(0.9)
    assert np.allclose(paired_interval(values, 0.9), expected, rtol=1e-12)


def test_bootstrap_from_20_on() -> None:
    """At 20 values the bootstrap decides, near the t interval for symmetric data, shifted for skewed."""
    symmetric = np.concatenate([spread(10), -spread(10)])
    low, high = paired_interval(symmetric)
    expected = stats.ttest_1samp(symmetric, 0).confidence_interval(0.95)
    assert not np.allclose([low, high], expected, rtol=1e-6)
    assert np.allclose([low, high], expected, atol=0.04 * (expected.high - expected.low))
    skewed = np.exp(spread(25))
    low, high = paired_interval(skewed)
    assert high - skewed.mean() > 1.1 * (skewed.mean() - low)


@pytest.mark.parametrize("n", [5, 25])
def test_no_spread_is_a_point(n: int) -> None:
    """Equal differences give exactly their value, which a mean of floats would miss by rounding."""
    low, high = paired_interval([0.7] * n)
    assert (float(low), float(high)) == (0.7, 0.7)
    assert effect([1.7] * n, [1.0] * n).effect == 1.7 - 1.0


def test_one_seed_has_no_interval() -> None:
    """One value says nothing of its spread."""
    found = effect([2.0], [1.0])
    assert (found.effect, found.low, found.high) == (1.0, -math.inf, math.inf)


@pytest.mark.parametrize("n", [5, 8, 10, 20, 25])
def test_coverage(n: int) -> None:
    """95 % intervals of normal differences hold the true mean in 93 to 97 % of 6000 simulated sweeps."""
    generator = np.random.default_rng(n)
    held = 0
    for _ in range(12):  # in parts, for memory
        low, high = paired_interval(generator.normal(0.3, 2.0, size=(500, n)))
        held += int(((low <= 0.3) & (high >= 0.3)).sum())
    assert 0.93 <= held / 6000 <= 0.97


@pytest.mark.parametrize(("seed_spread", "task_spread"), [(1.0, 0.5), (1.0, 4.5), (0.0, 1.0)])
@pytest.mark.parametrize("n", [5, 10, 25])
def test_hierarchical_coverage(n: int, seed_spread: float, task_spread: float) -> None:
    """Seeds' means decide: they cover 93 to 97 % whether the chance lies in the seeds or in the tasks."""
    generator = np.random.default_rng(100 * n + int(10 * task_spread))
    held, draws = 0, 4000
    for _ in range(8):
        seeds = generator.normal(0, seed_spread, size=(draws // 8, n, 1))
        tasks = seeds + generator.normal(0, task_spread, size=(draws // 8, n, 20))
        low, high = paired_interval(tasks.mean(axis=-1))
        held += int(((low <= 0) & (high >= 0)).sum())
    assert 0.93 <= held / draws <= 0.97
    (decided_low, decided_high), (task_low, task_high) = hierarchical_interval(list(tasks[0]))
    expected = [float(x[0]) for x in (low, high)]
    assert [decided_low, decided_high] == pytest.approx(expected, rel=1e-9)
    assert task_low < tasks[0].mean() < task_high


def test_tasks_are_resampled_within_seeds() -> None:
    """Seeds with equal means: all chance lies in the tasks; the seeds' interval is a point."""
    tasks = [[-3.0, -1.0, 1.0, 3.0], [3.0, 1.0, -1.0, -3.0]] * 8
    (low, high), (task_low, task_high) = hierarchical_interval(tasks)
    assert (low, high) == (0.0, 0.0)
    expected = 1.96 * math.sqrt(5.0 / 4 / 16)  # the tasks' variance is 5
    assert task_high == pytest.approx(expected, rel=0.06)
    assert task_low == pytest.approx(-expected, rel=0.06)


def test_seeds_are_resampled_too() -> None:
    """Tasks that agree within each seed: all chance lies in the seeds, and both intervals show it."""
    levels = (-3.0, -1.0, 1.0, 3.0)
    (_, high), (task_low, task_high) = hierarchical_interval([[x] * 3 for x in levels] * 4)
    expected = 1.96 * math.sqrt(5.0 / 16)  # a bootstrap's variance is Σ(x − mean)²/n²
    step = 2 / 16  # between two possible means
    assert task_high == pytest.approx(expected, abs=step)
    assert task_low == pytest.approx(-expected, abs=step)
    assert high == pytest.approx(stats.t.ppf(0.975, 15) * math.sqrt(5.0 / 15), rel=1e-9)


def test_seeds_may_hold_different_numbers_of_tasks() -> None:
    """The mean is over seeds of means over tasks: (2 + 5)/2, not 14/4."""
    found = effect([[1.0, 2.0, 3.0], [5.0]], [[0.0, 0.0, 0.0], [0.0]])
    assert found.effect == 3.5


def test_ratio_by_hand() -> None:
    """Ratios 1/2 and 2 have the geometric mean 1, with an interval that is symmetric on the log scale."""
    found = effect([1.0, 4.0], [2.0, 2.0], "ratio")
    assert found.effect == pytest.approx(1.0)
    assert found.low * found.high == pytest.approx(1.0)
    assert math.log(found.high) == pytest.approx(stats.t.ppf(0.975, 1) * math.log(2), rel=1e-9)


def test_value_is_of_the_treatment_alone() -> None:
    """compare="value" gives the mean of the arm."""
    assert effect([1.0, 2.0, 6.0], None, "value").effect == 3.0


@pytest.mark.parametrize(
    ("treatment", "baseline", "compare", "words"),
    [
        ([1.0, 0.0], [1.0, 1.0], "ratio", "positive"),
        ([1.0, 1.0], [1.0, -1.0], "ratio", "positive"),
        ([1.0, 2.0], [1.0], "difference", "different numbers"),
        ([[1.0, 2.0]], [[1.0]], "difference", "different numbers"),
        ([float("nan"), 2.0], [1.0, 1.0], "difference", "NaN"),
        ([float("inf")], None, "value", "infinity"),
        ([], [], "difference", "no values"),
        ([[]], [[]], "difference", "no values"),
    ],
)
def test_bad_values_are_refused(treatment: Any, baseline: Any, compare: Any, words: str) -> None:
    """Nothing that makes the effect meaningless goes through."""
    with pytest.raises(UserError, match=words):
        effect(treatment, baseline, compare)


def test_interquartile_mean() -> None:
    """By hand: of 1 … 8 the middle four have mean 4.5, of 0, 0, 5, 100 the middle two have 2.5."""
    assert interquartile_mean([8.0, 1.0, 7.0, 2.0, 6.0, 3.0, 5.0, 4.0]) == 4.5
    assert interquartile_mean([[0.0, 100.0], [0.0, 5.0]]) == 2.5


@settings(deadline=None)
@given(st.lists(FINITE, min_size=1, max_size=40))
def test_interquartile_mean_is_scipys_trimmed_mean(values: list[float]) -> None:
    """For every size: scipy's mean after a quarter was trimmed at each end."""
    assert interquartile_mean(values) == pytest.approx(stats.trim_mean(values, 0.25), rel=1e-9, abs=1e-9)


def test_probability_of_improvement_by_hand() -> None:
    """Task 1: (1, 3) against (2, 2): 2 of 4; task 2: (5, 5) against (5, 4): 2 wins, 2 ties, 3 of 4."""
    ours, theirs = [[1.0, 5.0], [3.0, 5.0]], [[2.0, 5.0], [2.0, 4.0]]
    assert probability_of_improvement(ours, theirs) == pytest.approx((0.5 + 0.75) / 2)
    assert probability_of_improvement(ours, theirs, "less") == pytest.approx((0.5 + 0.25) / 2)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=2, max_size=9), st.lists(FINITE, min_size=2, max_size=9))
def test_probability_of_improvement_is_mann_whitney(ours: list[float], theirs: list[float]) -> None:
    """On one task it is U/(N K)."""
    u = stats.mannwhitneyu(ours, theirs, method="asymptotic").statistic
    assert probability_of_improvement(ours, theirs) == pytest.approx(u / (len(ours) * len(theirs)))


SAMPLES = st.sampled_from([2, 5, 12, 22]).flatmap(
    lambda n: st.tuples(st.lists(FINITE, min_size=n, max_size=n), st.lists(FINITE, min_size=n, max_size=n))
)


@settings(max_examples=40, deadline=None)
@given(SAMPLES, st.sampled_from([0.001, 0.5, 3.0, 1e4]))
def test_scaling_scales_the_interval(arms: tuple[list[float], list[float]], factor: float) -> None:
    """In other units the effect and its interval are the same in those units."""
    ours, theirs = (np.array(arm) for arm in arms)
    before, after = effect(ours.tolist(), theirs.tolist()), effect(list(factor * ours), list(factor * theirs))
    assert after.effect == pytest.approx(factor * before.effect, rel=1e-6, abs=1e-7 * factor)
    assert after.low == pytest.approx(factor * before.low, rel=1e-6, abs=1e-7 * factor)
    assert after.high == pytest.approx(factor * before.high, rel=1e-6, abs=1e-7 * factor)


@settings(max_examples=40, deadline=None)
@given(SAMPLES)
def test_swapping_arms_flips_the_sign(arms: tuple[list[float], list[float]]) -> None:
    """Which arm is called the treatment decides the sign, nothing else."""
    one, other = effect(*arms), effect(arms[1], arms[0])
    assert one.effect == pytest.approx(-other.effect, rel=1e-6, abs=1e-7)
    assert one.low == pytest.approx(-other.high, rel=1e-6, abs=1e-7)
    assert one.low <= one.effect + 1e-9
    assert one.effect <= one.high + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(POSITIVE, POSITIVE), min_size=3, max_size=12))
def test_swapping_arms_inverts_a_ratio(pairs: list[tuple[float, float]]) -> None:
    """treatment / baseline and baseline / treatment are one over the other, intervals included."""
    ours, theirs = [x for x, _ in pairs], [y for _, y in pairs]
    one, other = effect(ours, theirs, "ratio"), effect(theirs, ours, "ratio")
    assert one.effect * other.effect == pytest.approx(1, rel=1e-9)
    if other.high < 1e300:
        assert math.log(one.low) == pytest.approx(-math.log(other.high), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("better", ["greater", "less"])
@pytest.mark.parametrize("planted", [3.0, 0.0, -3.0])
def test_the_judge_gives_each_verdict_at_its_rate(planted: float, better: str) -> None:
    """Planted effects, 3 standard errors beyond the margin (true), at it (null) and short of it (reversed).

    With 8 seeds a verdict falls if |t| > t(7; .975), so "reproduced" comes at the power of a t test, by the
    non-central t: 74 % for the true effect, 2.5 % for the null, below 10⁻⁵ for the reversed one; "not
    reproduced" mirrors it. 1500 sweeps each; the rates lie within 4 standard errors.
    """
    n, sweeps, sign = 8, 1500, 1 if better == "greater" else -1
    judged = claim(margin=0.4, better=better, seeds=n)
    generator = np.random.default_rng(5)
    differences = 0.4 + sign * (planted / math.sqrt(n) + generator.normal(size=(sweeps, n)))
    theirs = generator.normal(size=(sweeps, n))
    got = [verdict(judged, list(x), list(y)).verdict for x, y in zip(theirs + differences, theirs, strict=True)]
    bound = stats.t.ppf(0.975, n - 1)
    rates: dict[Verdict, float] = {
        "reproduced": stats.nct.sf(bound, n - 1, planted) if planted else 0.025,
        "not reproduced": stats.nct.cdf(-bound, n - 1, planted) if planted else 0.025,
    }
    rates["inconclusive"] = 1 - sum(rates.values())
    assert set(got) <= set(rates)
    for kind, rate in rates.items():
        assert abs(got.count(kind) / sweeps - rate) <= 4 * math.sqrt(rate * (1 - rate) / sweeps) + 1e-3, kind


def test_the_judge_on_ratios() -> None:
    """The rates hold on the log scale: 0.5 against a margin of 0.7 is reproduced, 0.7 is undecided, 1 fails."""
    generator = np.random.default_rng(6)
    judged = claim(margin=0.7, better="less", compare="ratio", seeds=10)
    shares = {}
    for ratio in (0.5, 0.7, 1.0):
        theirs = generator.lognormal(size=(400, 10))
        ours = theirs * ratio * generator.lognormal(0, 0.25, size=theirs.shape)
        got = [verdict(judged, list(x), list(y)).verdict for x, y in zip(ours, theirs, strict=True)]
        shares[ratio] = {kind: got.count(kind) / 400 for kind in ("reproduced", "not reproduced")}
    assert shares[0.5]["reproduced"] > 0.9
    assert shares[0.5]["not reproduced"] == 0
    assert shares[0.7]["reproduced"] < 0.055
    assert shares[0.7]["not reproduced"] < 0.055
    assert shares[1.0]["not reproduced"] > 0.9
    assert shares[1.0]["reproduced"] == 0
