"""The record of a claim refuses contradictions; its verdict and its row are what the numbers say."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from metazoo.claims import Claim, judge, verdict
from metazoo.errors import UserError
from metazoo_toy import Config, claim, measure

TWO = {"small": {"ours": Config(1.0), "theirs": Config(0.0)}}
VALUE: dict[str, Any] = {"compare": "value", "baseline": None, "margin": 1.0, "tolerance": 0.5}


def cells(values: dict[str, list[Any]], metric: str = "score", **changes: Any) -> list[dict[str, Any]]:
    """Stored cells with ``values`` per arm and seed."""
    git = {"revision": "a" * 40, "dirty": False}
    return [
        {
            "arm": arm,
            "seed": seed,
            "metrics": {metric: value, "cost": 1.0 + seed},
            "seconds": 2.0,
            "git": git,
            **changes,
        }
        for arm, of_arm in values.items()
        for seed, value in enumerate(of_arm)
    ]


class Measure:
    """A measure with a local name, as a nested function has."""

    def local(self) -> Any:
        def inner(config: object, seed: int) -> dict[str, object]:
            return {}

        return inner


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"name": "Routing Recovery"}, "kebab-case"),
        ({"version": 0}, "version is 0"),
        ({"seeds": 0}, "seeds is 0"),
        ({"source": ""}, "source is empty"),
        ({"treatment": "mine"}, "unknown arm 'mine' at scale 'small': one of ours, theirs"),
        ({"baseline": "nobody"}, "unknown arm 'nobody'"),
        ({"arms": {**TWO, "paper": {"ours": Config()}}}, "unknown arm 'theirs' at scale 'paper'"),
        ({"arms": {}}, "no arms"),
        ({"arms": {"small": {"ours": Config(), "theirs": {"level": 0}}}}, "no dataclass"),
        ({"arms": {"small": {"ours": Config(), "theirs": Config}}}, "no dataclass"),
        ({"arms": {"small": {**TWO["small"], "a/b": Config()}}}, "file name"),
        ({"compare": "ratio", "margin": 0.0}, "above 0 for a ratio"),
        ({"compare": "ratio", "margin": -0.5}, "above 0 for a ratio"),
        ({"margin": float("nan")}, "margin is nan"),
        ({"chance": float("inf")}, "chance is inf"),
        ({"compare": "slope"}, "compare is 'slope'"),
        ({"better": "more"}, "better 'more'"),
        ({"baseline": None}, "needs a baseline"),
        ({"baseline": "ours"}, "other than the treatment"),
        ({"tolerance": 0.1}, "tolerance is for"),
        ({**VALUE, "tolerance": -1.0}, "tolerance is -1.0"),
        ({**VALUE, "baseline": "theirs"}, "has no baseline"),
        ({"tuning": {"ours": 3}}, "tuning names"),
        ({"measure": lambda config, seed: {}}, "lambda"),
        ({"measure": Measure().local()}, "local function"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], words: str) -> None:
    """Each wrong field is one line that names the claim."""
    with pytest.raises(UserError, match=words) as caught:
        claim(**changes)
    assert "\n" not in str(caught.value)
    assert repr(changes.get("name", "toy")) in str(caught.value)


def test_a_claim_is_frozen() -> None:
    """The margin cannot be moved after measuring."""
    with pytest.raises(AttributeError):
        claim().margin = 0.0  # type: ignore[misc]


def sample(low: float, high: float) -> list[float]:
    """Five values whose t interval is exactly [low, high]: two at each side of the middle."""
    middle, half = (low + high) / 2, (high - low) / 2
    shift = half / 2.7764451051977987 * 5**0.5  # s of (-1, -1, 0, 1, 1) is 1
    return [middle + shift * x for x in (-1, -1, 0, 1, 1)]


@pytest.mark.parametrize(
    ("better", "low", "high", "expected"),
    [
        ("greater", 0.6, 0.8, "reproduced"),
        ("greater", 0.4, 0.8, "inconclusive"),
        ("greater", 0.2, 0.4, "not reproduced"),
        ("greater", -0.8, -0.6, "not reproduced"),
        ("less", 0.2, 0.4, "reproduced"),
        ("less", 0.4, 0.8, "inconclusive"),
        ("less", 0.6, 0.8, "not reproduced"),
    ],
)
def test_verdicts_of_a_difference(better: Any, low: float, high: float, expected: str) -> None:
    """The margin 0.5 against intervals on either side of it and around it."""
    found = verdict(claim(better=better), sample(low, high), [0.0] * 5)
    assert [found.low, found.high] == pytest.approx([low, high])
    assert found.verdict == expected


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.6, 1.4, "reproduced"),
        (0.4, 1.4, "inconclusive"),
        (1.2, 1.8, "inconclusive"),
        (0.2, 0.4, "not reproduced"),
        (1.6, 1.8, "not reproduced"),
    ],
)
def test_verdicts_of_a_value(low: float, high: float, expected: str) -> None:
    """1 ± 0.5: the whole interval inside, outside, or neither."""
    assert verdict(claim(**VALUE), sample(low, high), None).verdict == expected


def test_the_margin_itself_counts() -> None:
    """The margin is the least effect that counts; without spread the interval is that point."""
    for better in ("greater", "less"):
        found = verdict(claim(better=better, margin=1.0), [1.0] * 5, [0.0] * 5)
        assert (found.effect, found.low, found.high) == (1.0, 1.0, 1.0)
        assert found.verdict == "reproduced"
    exact = claim(**{**VALUE, "margin": 6042.0, "tolerance": 0.0})
    assert verdict(exact, [6042.0] * 5, None).verdict == "reproduced"
    assert verdict(exact, [6043.0] * 5, None).verdict == "not reproduced"


@pytest.mark.parametrize("n", [1, 2, 4])
def test_no_verdict_below_five_seeds(n: int) -> None:
    """However clear the effect; the interval is there all the same."""
    found = verdict(claim(), [1.0, 1.1, 1.2, 1.3][:n], [0.0] * n)
    assert found.verdict == "no verdict"
    assert found.low < found.effect < found.high


def test_tasks_within_seeds() -> None:
    """Seeds' means decide; task interval, interquartile means, probability of improvement beside."""
    ours = [[1.0, 2.0, 3.0, 6.0], [1.5, 2.5, 3.5, 4.5]] * 3
    theirs = [[0.0, 1.0, 2.0, 7.0]] * 6
    found = verdict(claim(), ours, theirs)
    assert found.effect == pytest.approx((0.5 + 0.5) / 2)
    assert found.n_seeds == 6
    assert found.task_low is not None
    assert found.task_high is not None
    assert found.task_low < 0.5 < found.task_high
    assert found.iqm_baseline == pytest.approx(1.5)
    assert found.probability_of_improvement == pytest.approx(0.75)


def test_judge_gives_the_row() -> None:
    """All that <scale>.json promises, and it is JSON."""
    row = judge(claim(flagship=True), cells({"ours": [1, 2, 3, 4, 5], "theirs": [0, 1, 2, 3, 4]}))
    promised = [
        "name",
        "version",
        "source",
        "statement",
        "paper",
        "metric",
        "compare",
        "treatment",
        "baseline",
        "margin",
        "better",
        "effect",
        "low",
        "high",
        "seeds",
        "verdict",
        "flagship",
        "seconds",
        "arms",
        "chance",
        "tuning",
    ]
    assert set(promised) <= set(row)
    assert (row["effect"], row["low"], row["high"], row["seeds"]) == (1.0, 1.0, 1.0, 5)
    assert row["verdict"] == "reproduced"
    assert row["seconds"] == 20.0
    assert row["arms"]["ours"] == {"mean": 3.0, "iqm": 3.0, "values": [1, 2, 3, 4, 5], "also": {"cost": 3.0}}
    assert row["revisions"] == ["a" * 40]
    assert row["dirty"] is False
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_judge_pairs_by_seed() -> None:
    """The order of the cells is of no matter."""
    made = cells({"ours": [1.0, 3.0, 2.0, 5.0, 4.0], "theirs": [0.3, 2.0, 1.2, 4.1, 3.0]})
    assert judge(claim(), made) == judge(claim(), made[::-1]) | {
        "arms": judge(claim(), made)["arms"],
    }


def test_judge_with_one_seed_is_json() -> None:
    """An interval without ends becomes null."""
    row = judge(claim(), cells({"ours": [1.0], "theirs": [0.0]}))
    assert (row["low"], row["high"], row["verdict"]) == (None, None, "no verdict")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (lambda made: made[3]["metrics"].update(score=float("nan")), "arm ours, seed 3: score is nan"),
        (
            lambda made: made[6]["metrics"].update(score=[1.0, float("inf")]),
            "arm theirs, seed 1: score is inf",
        ),
        (lambda made: made[4]["metrics"].update(score="high"), "arm ours, seed 4: score is 'high'"),
        (lambda made: made[4]["metrics"].update(score=[]), r"arm ours, seed 4: score is \[\]"),
        (lambda made: made[4]["metrics"].update(cost=None), "arm ours, seed 4: cost is None"),
        (lambda made: made[0]["metrics"].pop("score"), "arm ours, seed 0: no metric 'score'"),
        (lambda made: made.pop(2), "arm ours, seed 2: not measured"),
        (lambda made: made.append(made[1]), "arm ours, seed 1: measured twice"),
        (lambda made: made.__delitem__(slice(5, None)), "arm theirs, seed 0: not measured"),
        (lambda made: made.clear(), "arm ours, seed 0: not measured"),
    ],
)
def test_judge_refuses_bad_cells(changes: Any, words: str) -> None:
    """One line names claim, arm and seed."""
    made = cells({"ours": [1.0, 2.0, 3.0, 4.0, 5.0], "theirs": [0.0] * 5})
    changes(made)
    with pytest.raises(UserError, match=f"claim 'toy', {words}"):
        judge(claim(), made)


def test_a_ratio_of_zero_names_the_claim() -> None:
    """The error of the statistics says which claim and metric."""
    with pytest.raises(UserError, match="claim 'toy', metric 'score': a ratio needs positive"):
        verdict(claim(compare="ratio"), [1.0] * 5, [0.0] * 5)


def test_dirty_and_unknown_trees_are_told() -> None:
    """One cell from a changed tree marks the row; outside a repository it is unknown."""
    made = cells({"ours": [1.0] * 5, "theirs": [0.0] * 5})
    made[0]["git"] = {"revision": None, "dirty": None}
    assert judge(claim(), made)["dirty"] is None
    made[1]["git"] = {"revision": "b" * 40, "dirty": True}
    assert judge(claim(), made)["dirty"] is True
    assert judge(claim(), made)["revisions"] == ["a" * 40, "b" * 40]


def test_claims_import_nothing_heavy() -> None:
    """`info` and errors answer at once, as neither numpy nor torch is loaded."""
    code = "import sys, metazoo.claims; print({'numpy', 'scipy', 'torch', 'joblib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_measure_keeps_its_name() -> None:
    """The claim holds the function itself."""
    made: Claim = claim()
    assert made.measure is measure
