"""LiST's claims as code. Margins, seeds and arms were set before anything was measured.

A seed decides split (LiST's split seed % 5 + 1), initialisation, noise and order. `tuning` counts the trials spent on
each arm: benchmarks/tuning.py, results/bench/tuning.json, on labelled examples and sentences that are in no split's
labelled part and in no test. The features arms take the setting of their preset, untuned. The paper's arms take the
paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metazoo.claims import Claim

from list_selftrain.config import PRESETS, Config

_PAPER = PRESETS["paper"]


def _noise(base: Config, kind: Any, rate: float, **more: Any) -> Config:
    """A single student on true labels with flips, neither teacher nor fine-tuning."""
    return replace(
        base, noise=kind, noise_rate=rate, sessions=1, teacher_epochs=0, finetune_epochs=0, warmup=0.0, **more
    )


def _noise_arms(base: Config, kind: Any, rate: float) -> dict[str, Config]:
    return {
        "meta": _noise(base, kind, rate),
        "uniform": _noise(base, kind, rate, weights="uniform"),
        "meta-late": replace(_noise(base, kind, rate), warmup=0.6),
        "labelled-only": replace(base, noise="none", noise_rate=0.0, sessions=0, teacher_epochs=50),
    }


_FEATURES = PRESETS["features"]
_CLASS = {rate: _noise_arms(_FEATURES, "class", rate) for rate in (0.4, 0.6, 0.8)}
_PAPER_CLASS = {rate: _noise_arms(_PAPER, "class", rate) for rate in (0.4, 0.6, 0.8)}


def _symmetric(base: Config) -> dict[str, Config]:
    return {
        f"{weights}-{round(100 * rate)}": _noise(base, "symmetric", rate, weights=weights)
        for rate in (0.1, 0.2, 0.3, 0.4, 0.45)
        for weights in ("meta", "uniform")
    }


_GAUSS = PRESETS["gaussian"]


def _students(base: Config, noisy: float) -> dict[str, Config]:
    return {
        "soft-noisy": replace(base, dropout=noisy),
        "soft": replace(base, dropout=0.0),
        "hard-noisy": replace(base, dropout=noisy, soft_labels=False),
        "hard": replace(base, dropout=0.0, soft_labels=False),
    }


_PAPER_STUDENTS = _students(replace(_PAPER, weights="uniform"), 0.1)


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Train one arm; what its run comes to.

    Returns:
        accuracy of the last student (of the teacher where there are no sessions) on the test part, in percent;
        by_session; teacher_accuracy and gain over the teacher where there is a teacher; separation of weights where
        there are wrong pseudo-labels, with counts of weights of right and wrong ones by bin; trained (parameters) and
        share of all, in percent; seconds_of_training.
    """
    import tempfile
    import time

    import numpy as np
    from metazoo.options import RunOptions

    from list_selftrain.evaluate import pseudo_labels, weight_groups
    from list_selftrain.model import parameters
    from list_selftrain.train import train

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        options = RunOptions(output_dir=Path(scratch) / "run", log_every=50, checkpoint_every=10**9)
        run = train(replace(config, seed=seed), options)
        seconds = time.perf_counter() - started
    trained, every = parameters(run.model)
    found: dict[str, Any] = {
        "accuracy": run.sessions[-1]["accuracy"],
        "by_session": [one["accuracy"] for one in run.sessions if "accuracy" in one],
        "trained": trained,
        "share": 100 * trained / every,
        "seconds_of_training": seconds,
    }
    if "accuracy" in run.sessions[0]:
        found["teacher_accuracy"] = run.sessions[0]["accuracy"]
        found["gain"] = found["accuracy"] - found["teacher_accuracy"]
    about = pseudo_labels(run)
    found |= about
    if "weight_separation" in about:
        bins = np.linspace(0, 4, 41)
        found["weight_counts"] = {
            name: np.histogram(np.minimum(values, 4), bins)[0].tolist() for name, values in weight_groups(run).items()
        }
    return found


SETS = ("subj", "mpqa", "sst2")


def measure_sets(config: Config, seed: int) -> dict[str, Any]:
    """:func:`measure` on Subj, MPQA and SST-2 in turn.

    Returns:
        accuracy: a list of one for each; their mean; subj, mpqa and sst2 alone; gain (mean over the sets, 0 where there
        are no sessions); trained, share and seconds_of_training.
    """
    rows = {name: measure(replace(config, dataset=name), seed) for name in SETS}
    accuracies = [row["accuracy"] for row in rows.values()]
    return {
        "accuracy": accuracies,
        "mean": sum(accuracies) / len(SETS),
        **{name: row["accuracy"] for name, row in rows.items()},
        "by_session": {name: row["by_session"] for name, row in rows.items()},
        "gain": sum(row["gain"] for row in rows.values()) / len(SETS),
        "trained": rows["subj"]["trained"],
        "share": rows["subj"]["share"],
        "seconds_of_training": sum(row["seconds_of_training"] for row in rows.values()),
    }


def _prompted(base: Config) -> dict[str, Config]:
    """The same student, trained on the labelled examples alone: what is tuned, and how."""
    teacher = replace(base, sessions=0)
    return {
        "prompt-adapter": teacher,
        "prompt-full": replace(teacher, tune="full"),
        "classic-full": replace(teacher, tune="full", classifier="classic"),
        "prompt-houlsby": replace(teacher, tune="houlsby"),
        "prompt-lora": replace(teacher, tune="lora"),
        "prompt-bias": replace(teacher, tune="bias"),
        "prompt-head": replace(teacher, tune="head"),
    }


def _self_trained(base: Config) -> dict[str, Config]:
    return {
        "list": base,
        "prompt-adapter": replace(base, sessions=0),
        "prompt-full": replace(base, sessions=0, tune="full"),
        "prompt-st": replace(base, weights="uniform"),
        "confidence": replace(base, weights="confidence", threshold=0.9, soft_labels=False),
        "no-warm-up": replace(base, warmup=0.0),
        "hard-labels": replace(base, soft_labels=False),
        "not-fresh": replace(base, fresh=False),
        "meta-st": replace(base, classifier="classic", tune="full"),
        "ust": replace(base, classifier="classic", tune="full", weights="uncertainty", soft_labels=False),
    }


_TINY = PRESETS["sentences"]
_TINY_PROMPTED, _PAPER_PROMPTED = _prompted(_TINY), _prompted(_PAPER)
_TINY_LIST, _PAPER_LIST = _self_trained(_TINY), _self_trained(_PAPER)


def _tuned(arms: Mapping[str, Config], trials: int = 0, **but: int) -> dict[str, int]:
    return {arm: but.get(arm.replace("-", "_"), trials) for arm in arms}


def _class_claim(rate: float, margin: float, **more: Any) -> Claim:
    percent = round(100 * rate)
    return Claim(
        name=f"class-noise-{percent}",
        version=1,
        source="Section on meta re-weighting, Table of ablations",
        statement=f"With {percent} % of one class's labels flipped (Subj, 30 true labels), re-weighting is at least "
        f"{margin:g} points above equal weights",
        paper="not stated; without re-weighting LiST loses accuracy",
        metric="accuracy",
        arms={"small": _CLASS[rate], "paper": _PAPER_CLASS[rate]},
        measure=measure,
        treatment="meta",
        baseline="uniform",
        margin=margin,
        seeds=5,
        chance=50.0,
        tuning=_tuned(_CLASS[rate]),
        also=("trained",),
        **more,
    )


def _list_claim(name: str, statement: str, baseline: str, paper: str) -> Claim:
    return Claim(
        name=name,
        version=1,
        source="Table of main results, |K| = 30",
        statement=statement,
        paper=paper,
        metric="accuracy",
        arms={"small": _TINY_LIST, "paper": _PAPER_LIST},
        measure=measure_sets,
        treatment="list",
        baseline=baseline,
        margin=0.0,
        seeds=5,
        chance=50.0,
        tuning=_tuned(_TINY_LIST),
        also=("subj", "mpqa", "sst2", "gain", "share"),
    )


CLAIMS: tuple[Claim, ...] = (
    _class_claim(0.6, 15.0, flagship=True),
    _class_claim(0.4, 5.0),
    _class_claim(0.8, 15.0),
    Claim(
        name="above-labelled-only",
        version=1,
        source="Section on meta re-weighting",
        statement="With 60 % of one class flipped, re-weighted pseudo-labels still serve: above the 30 labels alone",
        paper="not stated",
        metric="accuracy",
        arms={"small": _CLASS[0.6], "paper": _PAPER_CLASS[0.6]},
        measure=measure,
        treatment="meta",
        baseline="labelled-only",
        margin=0.0,
        seeds=5,
        chance=50.0,
        tuning=_tuned(_CLASS[0.6]),
        also=("trained",),
    ),
    Claim(
        name="weights-find-flips",
        version=1,
        source="Section on meta re-weighting",
        statement="With 60 % of one class flipped, true pseudo-labels get more weight than flipped ones: the area under "
        "the ROC curve is at least 0.55",
        paper="not stated; noisy pseudo-labels get low weights",
        metric="weight_separation",
        arms={
            "small": {"meta": _CLASS[0.6]["meta"], "meta-late": _CLASS[0.6]["meta-late"]},
            "paper": {"meta": _PAPER_CLASS[0.6]["meta"], "meta-late": _PAPER_CLASS[0.6]["meta-late"]},
        },
        measure=measure,
        treatment="meta",
        baseline=None,
        compare="value",
        margin=0.55,
        seeds=5,
        chance=0.5,
        tuning={"meta": 0, "meta-late": 0},
        also=("accuracy", "zero_weights"),
    ),
    Claim(
        name="symmetric-noise-40",
        version=1,
        source="Section on meta re-weighting",
        statement="With 40 % of all labels flipped at random, too, re-weighting is above equal weights",
        paper="not stated; re-weighting is said to help against noisy pseudo-labels",
        metric="accuracy",
        arms={"small": _symmetric(_FEATURES), "paper": _symmetric(_PAPER)},
        measure=measure,
        treatment="meta-40",
        baseline="uniform-40",
        margin=0.0,
        seeds=5,
        chance=50.0,
        tuning=_tuned(_symmetric(_FEATURES)),
    ),
    Claim(
        name="noisy-student",
        version=1,
        source="Section on self-training",
        statement="Six sessions of a fresh student with dropout on soft pseudo-labels gain at least 8 points over the "
        "teacher (two Gaussians in 50 dimensions, 30 labels)",
        paper="not stated",
        metric="gain",
        arms={"small": _students(_GAUSS, 0.3), "paper": _PAPER_STUDENTS},
        measure=measure,
        treatment="soft-noisy",
        baseline=None,
        compare="value",
        margin=8.0,
        seeds=8,
        tuning=_tuned(_PAPER_STUDENTS),
        also=("accuracy", "teacher_accuracy"),
    ),
    Claim(
        name="student-without-noise",
        version=1,
        source="Section on self-training",
        statement="Without dropout a fresh student of soft pseudo-labels stays where its teacher is, within 1.5 points",
        paper="not stated",
        metric="gain",
        arms={"small": _students(_GAUSS, 0.3), "paper": _PAPER_STUDENTS},
        measure=measure,
        treatment="soft",
        baseline=None,
        compare="value",
        margin=0.0,
        tolerance=1.5,
        seeds=8,
        tuning=_tuned(_PAPER_STUDENTS),
        also=("accuracy", "teacher_accuracy"),
    ),
    Claim(
        name="adapter-parity",
        version=1,
        source="Abstract; table of tuned components",
        statement="Adapters and head (a few percent of the weights) come within 3 points of tuning all weights, with 30 "
        "labels of Subj and a RoBERTa of four layers trained from scratch",
        paper="14 of 355 million parameters, no loss stated",
        metric="accuracy",
        arms={"small": _TINY_PROMPTED, "paper": _PAPER_PROMPTED},
        measure=measure,
        treatment="prompt-adapter",
        baseline="prompt-full",
        margin=-3.0,
        seeds=5,
        chance=50.0,
        tuning=_tuned(_TINY_PROMPTED),
        also=("share",),
    ),
    Claim(
        name="prompt-over-classic",
        version=1,
        source="Table of main results, |K| = 30",
        statement="A prompt is above a new head on the first token, all weights tuned on 30 labels of Subj",
        paper="91.0 against 90.2 on Subj; 77.6 against 60.9 on average",
        metric="accuracy",
        arms={"small": _TINY_PROMPTED, "paper": _PAPER_PROMPTED},
        measure=measure,
        treatment="prompt-full",
        baseline="classic-full",
        margin=0.0,
        seeds=5,
        chance=50.0,
        tuning=_tuned(_TINY_PROMPTED),
        also=("share",),
    ),
    _list_claim(
        "list-over-prompt",
        "LiST is above prompt fine-tuning of all weights (Subj, MPQA, SST-2; a RoBERTa of four layers from scratch)",
        "prompt-full",
        "93.5, 85.2, 92.8 against 91.0, 82.7, 91.5",
    ),
    _list_claim(
        "list-over-self-training",
        "LiST is above the same self-training without re-weighting (Subj, MPQA, SST-2)",
        "prompt-st",
        "93.5, 85.2, 92.8 against 90.3, 81.8, 91.1",
    ),
)


def plot(folder: Path, scale: str) -> None:
    """Accuracy by noise, weights of right and flipped pseudo-labels, and accuracy by session, from the cells in
    folder."""
    import json

    import numpy as np
    from metazoo.runfolder import config_to_dict

    from list_selftrain import plots

    wanted = {claim.name: claim for claim in CLAIMS if scale in claim.arms}
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        claim = wanted.get(cell["claim"])
        if claim is None or cell["scale"] != scale or cell["version"] != claim.version or cell["seed"] >= claim.seeds:
            continue
        config = claim.arms[scale].get(cell["arm"])
        if config is not None and config_to_dict(config) == cell["config"]:
            cells.setdefault(claim.name, {}).setdefault(cell["arm"], []).append(cell["metrics"])

    rates = [rate for rate in (40, 60, 80) if f"class-noise-{rate}" in cells]
    if rates:
        arms = list(cells[f"class-noise-{rates[0]}"])
        curves = {
            arm: (rates, [[row["accuracy"] for row in cells[f"class-noise-{rate}"].get(arm, [])] for rate in rates])
            for arm in arms
            if all(arm in cells[f"class-noise-{rate}"] for rate in rates)
        }
        plots.lines(
            curves, folder / f"{scale}-class-noise.png", xlabel="labels of one class that are flipped [%]",
            ylabel="accuracy [%]",
        )  # fmt: skip
    if symmetric := cells.get("symmetric-noise-40"):
        rates = sorted({int(arm.rpartition("-")[2]) for arm in symmetric})
        curves = {
            name: (rates, [[row["accuracy"] for row in symmetric[f"{name}-{rate}"]] for rate in rates])
            for name in ("meta", "uniform")
            if all(f"{name}-{rate}" in symmetric for rate in rates)
        }
        plots.lines(
            curves, folder / f"{scale}-symmetric-noise.png", xlabel="labels that are flipped [%]", ylabel="accuracy [%]"
        )
    if rows := cells.get("weights-find-flips", {}).get("meta"):
        counts = {name: np.sum([row["weight_counts"][name] for row in rows], axis=0) for name in ("right", "wrong")}
        middles = np.linspace(0, 4, 41)[:-1] + 0.05
        groups = {name.replace("wrong", "flipped"): np.repeat(middles, of) for name, of in counts.items()}
        plots.weights(groups, folder / f"{scale}-weights.png", title="60 % of one class flipped")
    if students := cells.get("noisy-student"):
        sessions = range(len(next(iter(students.values()))[0]["by_session"]))
        curves = {
            arm: (list(sessions), [[row["by_session"][k] for row in rows] for k in sessions])
            for arm, rows in students.items()
        }
        plots.lines(curves, folder / f"{scale}-noisy-student.png", xlabel="session (0: teacher)", ylabel="accuracy [%]")
    if trained := cells.get("list-over-prompt"):
        curves = {}
        for arm in ("list", "prompt-st", "not-fresh", "hard-labels"):
            if arm in trained:
                by_set = [[row["by_session"][name] for name in SETS] for row in trained[arm]]
                means = np.mean(by_set, axis=1)  # [seeds, sessions]
                curves[arm] = (list(range(means.shape[1])), means.T.tolist())
        if curves:
            plots.lines(
                curves, folder / f"{scale}-sessions.png", xlabel="session (0: teacher)",
                ylabel="accuracy, mean of three sets [%]",
            )  # fmt: skip
