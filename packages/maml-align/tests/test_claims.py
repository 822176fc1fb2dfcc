"""The claims: every arm can be built, arms of a claim have one budget, and their figures are those of their runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from maml_align import claims
from maml_align.config import Config
from metazoo.claims import Claim
from metazoo.runfolder import config_to_dict

torch.set_num_threads(1)
LISTED = pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)


def arms(claim: Claim, scale: str) -> dict[str, Config]:
    return {name: config for name, config in claim.arms[scale].items() if isinstance(config, Config)}


def pairs_csv(folder: Path) -> Path:
    """Scored pairs of three languages, some hundred in each pair of them."""
    lines = ["sentence1,sentence2,score,language1,language2"]
    for one in ("de", "en", "es"):
        for other in ("de", "en", "es"):
            lines += [
                f"{one} text number {i} {'same' * (i % 3)},{other} text number {i + i % 5},{5 - i % 5},{one},{other}"
                for i in range(60)
            ]
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def lean(config: Config, folder: Path) -> Config:
    """The same arm in a second, without any file but one written here."""
    small: dict[str, Any] = {"steps": min(config.steps, 2), "task_batch": 2, "shots": 4, "queries": 4}
    if config.model == "linear":
        return dataclasses.replace(config, **small, dimension=4)
    return dataclasses.replace(
        config, **small, model="static", width=4, vocabulary=300, dataset=str(pairs_csv(folder)), unseen=(),
        languages=("de", "en", "es"), tuples=(), query_from="train", query_sampling="random", max_test=None,
    )  # fmt: skip


def test_list() -> None:
    """Names are told apart, one claim is the flagship, and each has its seeds and both scales."""
    names = [claim.name for claim in claims.CLAIMS]
    assert len(set(names)) == len(names)
    assert [claim.name for claim in claims.CLAIMS if claim.flagship] == ["cross-lingual-gain"]
    for claim in claims.CLAIMS:
        assert claim.seeds >= 5
        assert set(claim.arms) == {"small", "paper"}
        assert all(len(arms(claim, scale)) == len(claim.arms[scale]) for scale in claim.arms)


@LISTED
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_arms_have_one_budget(claim: Claim, scale: str) -> None:
    """The same data, tasks, encoder and outer steps for every arm."""
    budgets = {
        (
            config.dataset, config.languages, config.unseen, config.shots, config.queries, config.model, config.width,
            config.vocabulary, config.steps, config.task_batch, config.max_test, config.query_from, config.context,
            config.negatives, config.negative_sampling, config.query_sampling, config.fold,
        )
        for config in arms(claim, scale).values()
    }  # fmt: skip
    assert len(budgets) == 1


def test_rates_are_those_of_the_tuning() -> None:
    """Each tuned arm has the rates of its best trial, and as many trials as the claim says, less pilots."""
    path = Path(__file__).parents[1] / "results" / "bench" / "tuning.json"
    if not path.exists():
        pytest.skip("only the package's wheel is here")
    for name, metric, by_arm in (
        ("stsb", "cross_seen", claims._STS_ARMS),
        ("xquad-r", "map", claims._XQUAD_ARMS),
        ("minilm", "cross_seen", claims._MINI_ARMS),
    ):
        trials = json.loads(path.read_text(encoding="utf-8"))[name]
        for arm in {trial["arm"] for trial in trials}:
            mine = [trial for trial in trials if trial["arm"] == arm]
            best = max(mine, key=lambda trial: trial[metric])
            assert by_arm[arm].outer_lr == best["outer_lr"], (name, arm)
            if "maml" in arm:
                assert by_arm[arm].inner_lr == best["inner_lr"], (name, arm)
            assert claims._TRIALS[name][arm] >= len(mine), (name, arm)


def test_ablations_are_the_method_but_for_one_thing() -> None:
    found = claims._STS_ARMS
    method = found["maml-align"]
    assert found["as-coded"] == dataclasses.replace(method, student_steps=0)
    assert found["second-order"] == dataclasses.replace(method, first_order=False)
    assert found["t-maml"].mode == "MONO_BIL"
    assert found["s-maml"].mode == "BIL_MULTI"


def test_paper_tuples_of_two_sets() -> None:
    """Of el_el-el_ar-el_ar,el,hi the teacher takes the first two sets, the student the last two."""
    found = claims._PAPER_XQUAD_ARMS
    assert found["t-maml"].tuples == ("el_el-el_ar", "hi_hi-hi_de")
    assert found["s-maml"].tuples == ("el_ar-el_ar,el,hi", "hi_de-hi_de,hi,ar")


@pytest.mark.parametrize("name", ["align-over-t-maml", "alignment-narrows-gap"])
def test_measure(name: str, tmp_path: Path) -> None:
    """Every arm gives the metrics that its claims compare and show."""
    claim = next(claim for claim in claims.CLAIMS if claim.name == name)
    for arm, config in arms(claim, "small").items():
        found = claims.measure(lean(config, tmp_path), 1)
        wanted = {claim.metric, *claim.also, "seconds_of_training"} - {"cross_unseen", "mono_unseen"}
        assert wanted <= set(found), arm
        assert found == json.loads(json.dumps(found))


def test_measured_arm_is_its_run(tmp_path: Path) -> None:
    """measure() gives what training and evaluating by hand give."""
    from maml_align import evaluate
    from maml_align.train import train
    from metazoo.options import RunOptions

    config = lean(claims._STS_ARMS["maml-align"], tmp_path)
    found = claims.measure(config, 3)
    run = train(dataclasses.replace(config, seed=3), RunOptions(output_dir=tmp_path / "run", log_every=10))
    summary, _ = evaluate.score(run.encoder, run.data.test, run.config)  # type: ignore[arg-type]
    assert found["cross_seen"] == summary["cross_seen"]
    assert found["kd_share"] == pytest.approx(run.metrics[-1]["kd_share"])


def test_plot(tmp_path: Path) -> None:
    """Plots come of cells of this version and config alone."""
    folder = tmp_path / "results"
    (folder / "cells").mkdir(parents=True)
    for name in ("alignment-narrows-gap", "cross-lingual-gain", "gain-minilm", "retrieval-gain", "align-over-t-maml"):
        claim = next(claim for claim in claims.CLAIMS if claim.name == name)
        for arm, config in arms(claim, "small").items():
            for seed in range(2):
                size = len(config.languages) + len(config.unseen)
                metrics = dict.fromkeys(
                    ("gap", "pearson", "kd_share", "cross_seen", "map", "same_language"), seed + 1.0
                )
                cell = {
                    "claim": name, "scale": "small", "version": claim.version, "seed": seed, "arm": arm,
                    "config": config_to_dict(config), "metrics": {**metrics, "matrix": [[1.0] * size] * size},
                }  # fmt: skip
                (folder / "cells" / f"{name}-{arm}-{seed}.json").write_text(json.dumps(cell))
    claims.plot(folder, "small")
    names = {path.name for path in folder.glob("*.png")}
    assert names == {f"small-{one}.png" for one in ("stsb", "minilm", "xquad-r", "bias", "languages", "dose")}
    stale = tmp_path / "stale"
    (stale / "cells").mkdir(parents=True)
    cell["version"] = 99
    (stale / "cells" / "x.json").write_text(json.dumps(cell))
    claims.plot(stale, "small")
    assert not list(stale.glob("*.png"))
