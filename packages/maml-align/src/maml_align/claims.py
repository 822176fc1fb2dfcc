"""MAML-Align's claims as code. Margins, seeds and metrics were set before the claims were measured.

A seed decides initialisation, split and meta-tasks. `tuning` counts trials at seeds from 100 on, scored on the dev part
(benchmarks/tuning.py): the same number for each trained arm of a claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metazoo.claims import Claim

from maml_align.config import PRESETS, Config

_PAPER, _PAPER_STS = PRESETS["paper"], PRESETS["paper-stsb"]


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Train one arm, and score it on the test part.

    Returns:
        What :func:`maml_align.evaluate.evaluate` returns of the trained encoder; seconds_of_training; kd_share and
        distance, means over the rows of training where they are; matrix of scores by languages, as lists.
    """
    import tempfile
    import time

    import numpy as np
    from metazoo.options import RunOptions

    from maml_align import evaluate
    from maml_align.data import Questions
    from maml_align.train import train

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        options = RunOptions(output_dir=Path(scratch) / "run", log_every=10, checkpoint_every=10**9)
        run = train(replace(config, seed=seed), options)
        seconds = time.perf_counter() - started
    if run.data.kind == "vectors":
        found: dict[str, Any] = dict(evaluate.evaluate_world(run))
    else:
        summary, matrix = evaluate.score(run.encoder, run.data.test, run.config)  # type: ignore[arg-type]
        languages = [*config.languages, *config.unseen]
        found = dict(summary)
        found["matrix"] = [[matrix.get((one, other)) for other in languages] for one in languages]
        if isinstance(run.data.test, Questions):
            found["questions"] = float(len(run.data.test.ids))
    for name in ("kd_share", "distance"):
        values = [row[name] for row in run.metrics if name in row]
        if values:
            found[name] = float(np.mean(values))
    return {**found, "seconds_of_training": seconds}


def arms_of(base: Config, **rates: tuple[float, float]) -> dict[str, Config]:
    """Zero-shot, the teacher alone, the student alone, MAML-Align, and fine-tuning on the same outer sets or on all.

    Args:
        base: MAML-Align.
        rates: (inner, outer) of an arm, where they are not the base's.
    """
    arms = {
        "zero-shot": replace(base, method="zero-shot"),
        "t-maml": _two_sets(base, "MONO_BIL"),
        "s-maml": _two_sets(base, "BIL_MULTI"),
        "maml-align": base,
        "fine-tune": replace(base, method="fine-tune", finetune_sets="outer"),
        "fine-tune-all": replace(base, method="fine-tune", finetune_sets="all"),
    }
    for arm, (inner_lr, outer_lr) in rates.items():
        name = arm.replace("_", "-")
        arms[name] = replace(arms[name], inner_lr=inner_lr, outer_lr=outer_lr)
    arms["as-coded"] = replace(arms["maml-align"], student_steps=0)
    arms["second-order"] = replace(arms["maml-align"], first_order=False)
    return arms


def _two_sets(base: Config, mode: str) -> Config:
    """MAML in a mode of two sets; of the base's tuples those two."""
    places = (0, 1) if mode == "MONO_BIL" else (1, 2)
    tuples = tuple("-".join(text.split("-")[i] for i in places) for text in base.tuples)
    return replace(base, method="maml", mode=mode, tuples=tuples)


def _only(arms: Mapping[str, Config], *names: str) -> dict[str, Config]:
    return {name: arms[name] for name in names}


# Rates: benchmarks/tuning.py.
_STS_ARMS = arms_of(
    PRESETS["stsb"], t_maml=(1.0, 1e-2), s_maml=(1.0, 3e-2), maml_align=(1.0, 3e-2), fine_tune=(1.0, 2e-2),
    fine_tune_all=(1.0, 2e-2),
)  # fmt: skip
_PAPER_STS_ARMS = arms_of(_PAPER_STS)
_XQUAD_ARMS, _PAPER_XQUAD_ARMS = arms_of(PRESETS["xquad-r"]), arms_of(_PAPER)
_MINI_ARMS = arms_of(PRESETS["minilm"])

# λ of the alignment in a world where adapting helps; there is no such world in the paper, and no other scale of it.
_WORLD = PRESETS["rotations"]
_DOSES = {f"kd-{weight:g}": replace(_WORLD, kd_lambda=weight) for weight in (0.0, 0.5, 5.0, 50.0)}
_DOSES["kd-50-detached"] = replace(_DOSES["kd-50"], detach_teacher=True)

_GAIN = ("zero-shot", "t-maml", "maml-align")
_ALL = ("zero-shot", "t-maml", "s-maml", "maml-align", "fine-tune", "fine-tune-all", "as-coded", "second-order")
_RETRIEVAL = ("zero-shot", "t-maml", "maml-align", "fine-tune", "fine-tune-all")
_MINI = ("zero-shot", "maml-align", "fine-tune")
_TRIALS = {
    "stsb": {"t-maml": 13, "s-maml": 9, "maml-align": 13, "fine-tune": 10, "fine-tune-all": 10, "second-order": 1},
    "xquad-r": {"t-maml": 6, "maml-align": 9, "fine-tune": 6, "fine-tune-all": 7},
    "minilm": {"t-maml": 4, "maml-align": 2, "fine-tune": 2},
    "rotations": {"kd-0": 5, "kd-0.5": 1, "kd-5": 1, "kd-50": 1, "kd-50-detached": 1},
}
_ALSO_STS = ("mono_seen", "cross_unseen", "mono_unseen", "gap", "spearman_cross_seen")
_ALSO_XQUAD = ("mrr", "recall", "same_language", "pool_mono_seen", "pool_cross_seen")


def _sts(name: str, arms: tuple[str, ...], **more: Any) -> Claim:
    trials = _TRIALS["stsb"]
    return Claim(
        name=name, version=1, measure=measure, seeds=10, treatment="maml-align",
        arms={"small": _only(_STS_ARMS, *arms), "paper": _only(_PAPER_STS_ARMS, *arms)},
        tuning={arm: trials.get(arm, 0) for arm in arms},
        **{"metric": "cross_seen", "also": _ALSO_STS, "chance": 0.0, **more},
    )  # fmt: skip


def _mini(name: str, **more: Any) -> Claim:
    return Claim(
        name=name, version=1, measure=measure, seeds=5, treatment="maml-align", metric="cross_seen", chance=0.0,
        arms={"small": _only(_MINI_ARMS, *_MINI), "paper": _only(_PAPER_STS_ARMS, *_MINI)},
        tuning={arm: _TRIALS["minilm"].get(arm, 0) for arm in _MINI},
        also=(*_ALSO_STS, "seconds_of_training"), **more,
    )  # fmt: skip


def _xquad(name: str, **more: Any) -> Claim:
    return Claim(
        name=name, version=1, measure=measure, seeds=5, treatment="maml-align",
        arms={"small": _only(_XQUAD_ARMS, *_RETRIEVAL), "paper": _only(_PAPER_XQUAD_ARMS, *_RETRIEVAL)},
        tuning={arm: _TRIALS["xquad-r"].get(arm, 0) for arm in _RETRIEVAL},
        **{"metric": "map", "also": _ALSO_XQUAD, **more},
    )  # fmt: skip


def _dose(name: str, **more: Any) -> Claim:
    return Claim(
        name=name, version=1, measure=measure, seeds=5, arms={"small": _DOSES, "paper": _DOSES},
        tuning=_TRIALS["rotations"], **more,
    )  # fmt: skip


CLAIMS: tuple[Claim, ...] = (
    _sts(
        "cross-lingual-gain", _GAIN, flagship=True, baseline="zero-shot", margin=12.0,
        source="Abstract; experiments on symmetric search",
        statement="MAML-Align lifts a lexical encoder's Pearson on pairs in two seen languages (STS-B) by 12 points",
        paper="gains over the encoder as it is; tables not readable here",
    ),
    _sts(
        "unseen-languages", _GAIN, metric="cross_unseen", baseline="zero-shot", margin=5.0,
        also=("cross_seen", "mono_seen", "mono_unseen", "gap"),
        source="Abstract; generalisation to unseen languages",
        statement="It lifts Pearson on pairs with a language that was not trained on by 5 points",
        paper="generalises to unseen languages; tables not readable here",
    ),
    _sts(
        "language-bias", _GAIN, metric="gap", better="less", baseline="zero-shot", margin=-10.0, chance=None,
        also=("mono_seen", "cross_seen"),
        source="Introduction; language bias",
        statement="It narrows the gap between pairs in one language and in two by 10 points of Pearson",
        paper="less bias to same-language candidates; tables not readable here",
    ),
    _sts(
        "align-over-t-maml", _ALL, baseline="t-maml", margin=2.5,
        source="Abstract; Section on MAML-Align",
        statement="MAML-Align is 2.5 points of Pearson above its teacher, T-MAML, on pairs in two seen languages",
        paper="boosts the gains of MAML; tables not readable here",
    ),
    _sts(
        "align-over-s-maml", _ALL, baseline="s-maml", margin=0.0,
        source="Abstract; Section on MAML-Align",
        statement="MAML-Align is above S-MAML, its student trained alone",
        paper="boosts the gains of MAML; tables not readable here",
    ),
    _sts(
        "align-over-fine-tuning", _ALL, baseline="fine-tune", margin=0.0,
        source="Abstract",
        statement="MAML-Align is above fine-tuning on the same bilingual and multilingual sets",
        paper="significantly outperforms naive fine-tuning; tables not readable here",
    ),
    _sts(
        "align-over-fine-tuning-all", _ALL, baseline="fine-tune-all", margin=0.0,
        source="Abstract",
        statement="MAML-Align is above fine-tuning on all three sets of its tasks",
        paper="significantly outperforms naive fine-tuning; tables not readable here",
    ),
    _mini(
        "gain-minilm", baseline="zero-shot", margin=1.0,
        source="Abstract",
        statement="On a pre-trained encoder, all-MiniLM-L6-v2, MAML-Align gains a point on pairs in two seen languages",
        paper="gains over a strong sentence-transformers baseline; tables not readable here",
    ),
    _mini(
        "align-over-fine-tuning-minilm", baseline="fine-tune", margin=0.0,
        source="Abstract",
        statement="On all-MiniLM-L6-v2 MAML-Align is above fine-tuning on the same bilingual and multilingual sets",
        paper="significantly outperforms naive fine-tuning; tables not readable here",
    ),
    _xquad(
        "retrieval-gain", baseline="zero-shot", margin=1.0,
        source="Abstract; experiments on asymmetric search (LAReQA)",
        statement="MAML-Align lifts a lexical encoder's mAP@20 in a pool of four languages (XQuAD-R) by a point",
        paper="gains over the encoder as it is; tables not readable here",
    ),
    _xquad(
        "retrieval-align-over-t-maml", baseline="t-maml", margin=0.0,
        source="Abstract; Section on MAML-Align",
        statement="MAML-Align's mAP@20 is above T-MAML's",
        paper="boosts the gains of MAML; tables not readable here",
    ),
    _xquad(
        "retrieval-align-over-fine-tuning", baseline="fine-tune", margin=0.0,
        source="Abstract",
        statement="MAML-Align's mAP@20 is above that of fine-tuning on the same bilingual and multilingual sets",
        paper="significantly outperforms naive fine-tuning; tables not readable here",
    ),
    _xquad(
        "retrieval-bias", metric="same_language", better="less", baseline="zero-shot", margin=-4.0, chance=25.0,
        also=("map",),
        source="Introduction; language bias",
        statement="The share of the question's own language in the first 20 falls by 4 points",
        paper="less bias to same-language candidates; tables not readable here",
    ),
    _dose(
        "alignment-narrows-gap", metric="gap", compare="ratio", better="less", treatment="kd-50", baseline="kd-0",
        margin=0.75, also=("pearson", "zero_shot_pearson", "kd_share"),
        source="Section on MAML-Align, the alignment loss",
        statement="With λ = 50 teacher's and student's losses differ by at most 0.75 of what they do with λ = 0",
        paper="not stated; λ = 0.5 in the code",
    ),
    _dose(
        "default-alignment-is-free", metric="pearson", treatment="kd-0.5", baseline="kd-0", margin=-0.5,
        also=("gap", "kd_share"),
        source="Official code, kd_lambda",
        statement="With λ = 0.5 an adapted encoder's Pearson is at most half a point below that with λ = 0",
        paper="not stated; λ = 0.5 in the code",
    ),
    _dose(
        "detached-teacher", metric="pearson", treatment="kd-50-detached", baseline="kd-50", margin=5.0,
        also=("gap", "kd_share"),
        source="Ours; the code lets the alignment's gradient into the teacher",
        statement="With λ = 50 an encoder whose teacher is detached adapts to a Pearson 5 points higher",
        paper="not stated",
    ),
)  # fmt: skip


def plot(folder: Path, scale: str) -> None:
    """Beside the effects: scores by arm and seed on each set, scores by languages before and after, and λ's doses."""
    import json

    import numpy as np
    from metazoo.runfolder import config_to_dict

    from maml_align import plots

    by_name = {claim.name: claim for claim in CLAIMS if scale in claim.arms}
    cells: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        claim = by_name.get(cell["claim"])
        if claim is None or cell["scale"] != scale or cell["version"] != claim.version or cell["seed"] >= claim.seeds:
            continue
        arm = claim.arms[scale].get(cell["arm"])
        if arm is not None and config_to_dict(arm) == cell["config"]:
            cells.setdefault(claim.name, {}).setdefault(cell["arm"], []).append(cell["metrics"])

    def values(claim: Claim, metric: str) -> dict[str, list[Any]]:
        """Of each arm, by seed."""
        held = cells.get(claim.name, {})
        return {arm: [row[metric] for row in held[arm]] for arm in claim.arms[scale] if arm in held}

    for name, metric, label, title in (
        ("align-over-t-maml", "cross_seen", "Pearson ×100, pairs in two seen languages", "stsb"),
        ("gain-minilm", "cross_seen", "Pearson ×100, pairs in two seen languages", "minilm"),
        ("retrieval-gain", "map", "mAP@20 ×100, pool of four languages", "xquad-r"),
        ("retrieval-gain", "same_language", "own language in the first 20 [%]", "bias"),
    ):
        if found := values(by_name[name], metric):
            plots.by_arm(found, folder / f"{scale}-{title}.png", label)
    gain = by_name["cross-lingual-gain"]
    matrices = values(gain, "matrix")
    if {"zero-shot", "maml-align"} <= set(matrices):
        config = gain.arms[scale]["maml-align"]
        assert isinstance(config, Config)
        languages = (*config.languages, *config.unseen)
        lift = np.mean(matrices["maml-align"], axis=0) - np.mean(matrices["zero-shot"], axis=0)
        plots.language_matrix(
            lift, languages, languages, folder / f"{scale}-languages.png",
            title="What MAML-Align gains: sentence 1 by sentence 2", label="Pearson ×100, difference",
            unseen=set(config.unseen),
        )  # fmt: skip
    dose = by_name["alignment-narrows-gap"]
    arms = ("kd-0", "kd-0.5", "kd-5", "kd-50")
    curves = {metric: values(dose, metric) for metric in ("gap", "pearson", "kd_share")}
    if all(arm in curves["gap"] for arm in arms):
        labels = {
            "gap": "|L_T − L_S| ×1000", "pearson": "Pearson ×100 after adaptation",
            "kd_share": "alignment's gradient [% of the tasks']",
        }  # fmt: skip
        plots.dose(
            [0.0, 0.5, 5.0, 50.0], {metric: [of[arm] for arm in arms] for metric, of in curves.items()},
            folder / f"{scale}-dose.png", "λ", labels,
        )  # fmt: skip
