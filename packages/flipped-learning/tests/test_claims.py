"""The claims: every arm can be built, arms of a claim have one budget, the figures of an arm are those of its run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from flipped_learning import claims
from flipped_learning.config import Config
from flipped_learning.minimodel import BagOfWords
from flipped_learning.model import load_model, parameters
from flipped_learning.templates import NOVEL_PAIRS, SEEN_PAIRS
from metazoo.claims import Claim
from metazoo.runfolder import config_to_dict

torch.set_num_threads(1)
LISTED = pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
SMALL: dict[str, Any] = {
    "dataset": ("generated",), "zero_shot": (), "max_examples": 60, "width": 16, "vocabulary": 300, "steps": 20,
    "batch_size": 8, "pretrain_steps": 2, "pretrain_batch_size": 4, "heads": 2, "layers": 1, "feedforward": 32,
    "template_names": ("Text Expressed Sentiment",),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def arms(claim: Claim, scale: str) -> dict[str, Config]:
    return {name: config for name, config in claim.arms[scale].items() if isinstance(config, Config)}


def named(name: str) -> Claim:
    return next(claim for claim in claims.CLAIMS if claim.name == name)


def test_list() -> None:
    """Names are told apart, one claim is the flagship, and each has its seeds and both scales."""
    names = [claim.name for claim in claims.CLAIMS]
    assert len(set(names)) == len(names)
    assert [claim.name for claim in claims.CLAIMS if claim.flagship] == ["novel-labels"]
    for claim in claims.CLAIMS:
        assert claim.seeds >= 5
        assert set(claim.arms) == {"small", "paper"}
        assert all(len(arms(claim, scale)) == len(claim.arms[scale]) for scale in claim.arms)


@LISTED
def test_every_small_arm_can_be_built(claim: Claim) -> None:
    """No arm that ends a sweep after hours; bags need no data for it, the T5 no pre-training."""
    corpus = ["the plot is good and the acting is bad", "a film that nobody will see twice ."]
    for config in set(arms(claim, "small").values()):
        model: torch.nn.Module
        if config.model == "bag":
            model = BagOfWords({"good": 1, "bad": 2}, config.width, config.method, tied=config.tied)
        else:
            lean = dataclasses.replace(config, pretrain_steps=0)
            model, _ = load_model(lean, corpus, Accelerator(cpu=True))
        assert parameters(model) > 0


@LISTED
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_arms_have_one_budget(claim: Claim, scale: str) -> None:
    """The same data, label words, steps and size for every arm; the same rate for all that were not tuned."""
    budgets = {
        (
            config.dataset, config.zero_shot, config.pairs, config.steps, config.batch_size, config.optimizer,
            config.warmup, config.decay, config.clip, config.dropout, config.vocabulary, config.width,
            config.layers, config.pretrain_steps, config.template_names, config.max_examples,
        )
        for config in arms(claim, scale).values()
    }  # fmt: skip
    assert len(budgets) == 1
    found = arms(claim, scale)
    for arm, config in found.items():
        if not claim.tuning[arm]:  # the rate of the arm that it varies
            assert config.lr == found[claim.treatment].lr, arm


def test_what_the_arms_vary() -> None:
    """FLIPPED against the ablation of the statement, and nothing else."""
    for name, changes in (
        ("novel-labels", {"method": "direct", "tied": True}), ("novel-labels-untied", {"method": "direct"}),
        ("unlikelihood", {"unlikelihood": 0.0}), ("words-must-be-known", {"hide_words": True}),
        ("t5-novel-labels", {"method": "direct"}), ("t5-unlikelihood", {"unlikelihood": 0.0}),
        ("cost", {"method": "direct"}),
    ):  # fmt: skip
        claim = named(name)
        assert claim.baseline is not None
        found = arms(claim, "small")
        assert found[claim.baseline] == dataclasses.replace(found[claim.treatment], **changes), name
    for name, count in (("novel-labels-one-pair", 1), ("novel-labels-six-pairs", 6), ("novel-labels", 3)):
        assert {config.pairs for config in arms(named(name), "small").values()} == {count}


def test_measure(tmp_path: Path) -> None:
    """Figures are means over pairs, in percent; a second sentiment set is scored on novel pairs only."""
    rows = [f"a {word} film {i},{k}" for i in range(10) for k, word in enumerate(("bad", "good"))]
    other = tmp_path / "other.csv"
    other.write_text("\n".join(["text,label", *rows]) + "\n")
    (tmp_path / "templates.yaml").write_text(
        "templates:\n  a: {name: Tone, answer_choices: 'negative ||| positive',\n"
        "    jinja: '{{text}} What is the tone? ||| {{answer_choices[label]}}'}\n"
    )
    tiny = SMALL | {"zero_shot": (str(other),), "templates": str(tmp_path / "templates.yaml"), "template_names": ()}
    found = claims.measure(dataclasses.replace(arms(named("novel-labels"), "small")["flipped"], **tiny), 3)
    assert set(found["by_pair"]) == {"/".join(pair) for pair in (*SEEN_PAIRS[:3], *NOVEL_PAIRS)}
    assert found["seen_f1"] == pytest.approx(np.mean([found["by_pair"]["/".join(pair)] for pair in SEEN_PAIRS[:3]]))
    assert found["novel_f1"] == pytest.approx(np.mean([found["by_pair"]["/".join(pair)] for pair in NOVEL_PAIRS]))
    assert found["gap"] == pytest.approx(found["seen_f1"] - found["novel_f1"])
    assert set(found["other_by_pair"]) == {"/".join(pair) for pair in NOVEL_PAIRS}
    assert found["other_novel_f1"] == pytest.approx(np.mean([*found["other_by_pair"].values()]))
    assert found["steps"] == [20]
    assert len(found["log_p_right"]) == len(found["log_p_wrong"]) == 1
    assert found["seconds_of_training"] > 0


def test_measure_language_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """DIRECT with a T5: no wrong label, no second set."""
    monkeypatch.setattr("flipped_learning.templates.NOVEL_PAIRS", NOVEL_PAIRS[:1])  # for time
    config = arms(named("t5-novel-labels"), "small")["direct-untied"]
    config = dataclasses.replace(config, **SMALL | {"steps": 3, "pairs": 1})
    found = claims.measure(config, 0)
    assert set(found["by_pair"]) == {"/".join(pair) for pair in (SEEN_PAIRS[0], NOVEL_PAIRS[0])}
    assert found["novel_f1"] == found["by_pair"]["/".join(NOVEL_PAIRS[0])]
    assert "log_p_wrong" not in found
    assert "other_novel_f1" not in found
    assert len(found["log_p_right"]) == 1


def test_measure_cost() -> None:
    """Of both rules: more options take longer, and the slope is that of the three."""
    found = {
        arm: claims.measure_cost(dataclasses.replace(config, **SMALL), 0)
        for arm, config in arms(named("cost"), "small").items()
    }
    for times in found.values():
        assert set(times) == {"ms_2", "ms_6", "ms_50", "ms_per_option"}
        assert 0 < times["ms_2"] < times["ms_50"]
        slope = np.polyfit([2, 6, 50], [times["ms_2"], times["ms_6"], times["ms_50"]], 1)[0]
        assert times["ms_per_option"] == pytest.approx(slope)


def test_plot(tmp_path: Path) -> None:
    """Pictures of the cells that are there, of this version and these configs only."""
    (tmp_path / "cells").mkdir()

    def cell(name: str, arm: str, seed: int, metrics: dict[str, Any], **changes: Any) -> None:
        claim = named(name)
        record = {
            "claim": name, "version": claim.version, "scale": "small", "arm": arm, "seed": seed,
            "config": config_to_dict(claim.arms["small"][arm]), "metrics": metrics,
        }  # fmt: skip
        path = tmp_path / "cells" / f"{name}-{arm}-{seed}-{len(changes)}.json"
        path.write_text(json.dumps(record | changes))

    def pictures() -> set[str]:
        return {path.name for path in tmp_path.glob("*.png")}

    broken: dict[str, Any] = {}  # would end in a KeyError if it were taken
    cell("novel-labels", "flipped", 0, broken, version=99)
    cell("novel-labels", "flipped", 1, broken, config={}, scale="small")
    cell("novel-labels", "flipped", 99, broken)
    claims.plot(tmp_path, "small")
    assert pictures() == set()
    for seed in (0, 1):
        for arm in named("novel-labels").arms["small"]:
            values = {"seen_f1": 75.0 + seed, "novel_f1": 70.0, "other_novel_f1": 60.0}
            cell("novel-labels", arm, seed, values)
        for arm in ("flipped", "direct-untied"):
            rows = {"steps": [20, 40], "log_p_right": [-3.0, -1.0]}
            if arm == "flipped":
                rows["log_p_wrong"] = [-3.0, -2.0 - seed]
            cell("t5-novel-labels", arm, seed, values | rows)
        for arm, slope in (("flipped", 2.0), ("direct", 0.3)):
            cell("cost", arm, seed, {f"ms_{count}": 1 + slope * count for count in (2, 6, 50)})
    claims.plot(tmp_path, "small")
    assert pictures() == {f"small-{name}.png" for name in ("novel-labels", "t5-novel-labels", "margin", "cost")}
    claims.plot(tmp_path, "paper")
    assert not any(name.startswith("paper") for name in pictures())
