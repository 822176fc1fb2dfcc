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
from list_selftrain import claims
from list_selftrain.config import Config
from metazoo.claims import Claim
from metazoo.runfolder import config_to_dict

torch.set_num_threads(1)
LISTED = pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
# what makes any arm a matter of a second, without any file
LEAN: dict[str, Any] = {
    "model": "tiny", "dataset": "generated", "shots": 8, "max_unlabelled": 40, "max_test": 40, "vocabulary": 300,
    "width": 8, "heads": 2, "layers": 1, "feedforward": 8, "adapter_dim": 2, "pretrain_steps": 0, "session_steps": 3,
    "unlabelled_batch": 4, "mc_passes": 2, "max_length": 64,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def arms(claim: Claim, scale: str) -> dict[str, Config]:
    return {name: config for name, config in claim.arms[scale].items() if isinstance(config, Config)}


def lean(config: Config) -> Config:
    """The same arm in seconds."""
    found = dict(LEAN)
    if config.model == "features":
        found = {name: LEAN[name] for name in ("session_steps", "unlabelled_batch", "shots")}
        found |= {"svd": 4, "hidden": 4, "max_test": 40}
        if config.dataset != "gaussian":
            found |= {"dataset": "generated", "max_unlabelled": 40}
    if config.tune == "simple":
        del found["adapter_dim"]
    epochs = {name: min(getattr(config, name), 1) for name in ("teacher_epochs", "finetune_epochs")}
    return dataclasses.replace(config, **found, **epochs, sessions=min(config.sessions, 2))


def test_list() -> None:
    """Names are told apart, one claim is the flagship, and each has its seeds and both scales."""
    names = [claim.name for claim in claims.CLAIMS]
    assert len(set(names)) == len(names)
    assert [claim.name for claim in claims.CLAIMS if claim.flagship] == ["class-noise-60"]
    for claim in claims.CLAIMS:
        assert claim.seeds >= 5
        assert set(claim.arms) == {"small", "paper"}
        assert all(len(arms(claim, scale)) == len(claim.arms[scale]) for scale in claim.arms)


@LISTED
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_arms_have_one_budget(claim: Claim, scale: str) -> None:
    """The same data, model and steps for every arm; the same rates for all that were not tuned."""
    found = arms(claim, scale)
    budgets = {
        (
            config.dataset, config.shots, config.model, config.width, config.layers, config.pretrain_steps,
            config.session_steps, config.unlabelled_batch, config.labelled_batch, config.meta_batch, config.max_test,
            config.max_unlabelled, config.adapter_dim, config.hidden, config.svd,
        )
        for config in found.values()
    }  # fmt: skip
    assert len(budgets) == 1
    for arm, config in found.items():
        if not claim.tuning[arm]:
            assert (config.lr, config.teacher_lr) == (found[claim.treatment].lr, found[claim.treatment].teacher_lr), arm


def test_what_the_arms_vary() -> None:
    """The treatment against the ablation of the statement, and nothing else (but rates that were tuned)."""
    wanted: dict[str, dict[str, Any]] = {
        **{f"class-noise-{rate}": {"weights": "uniform"} for rate in (40, 60, 80)},
        "symmetric-noise-40": {"weights": "uniform"},
        "above-labelled-only": {"noise": "none", "noise_rate": 0.0, "sessions": 0, "teacher_epochs": 50},
        "adapter-parity": {"tune": "full"},
        "adapter-parity-scratch": {"tune": "full"},
        "prompt-over-classic": {"classifier": "classic"},
        "prompt-over-classic-scratch": {"classifier": "classic"},
        "list-over-prompt": {"tune": "full", "sessions": 0},
        "list-over-prompt-generated": {"tune": "full", "sessions": 0},
        "list-over-self-training": {"weights": "uniform"},
        "list-over-self-training-generated": {"weights": "uniform"},
    }
    compared = {claim.name: claim for claim in claims.CLAIMS if claim.baseline is not None}
    assert set(compared) == set(wanted)
    for name, changes in wanted.items():
        claim = compared[name]
        assert claim.baseline is not None
        found = arms(claim, "small")
        baseline = found[claim.baseline]
        rates = {"lr": baseline.lr, "teacher_lr": baseline.teacher_lr}
        assert baseline == dataclasses.replace(found[claim.treatment], **changes, **rates), name
    students = arms(next(claim for claim in claims.CLAIMS if claim.name == "noisy-student"), "small")
    assert {(s.dropout, s.soft_labels) for s in students.values()} == {
        (0.3, True),
        (0.0, True),
        (0.3, False),
        (0.0, False),
    }


def every_small_arm() -> dict[str, tuple[Claim, Config]]:
    found: dict[Config, tuple[str, Claim]] = {}
    for claim in claims.CLAIMS:
        for arm, config in arms(claim, "small").items():
            found.setdefault(lean(config), (f"{claim.name}-{arm}", claim))
    return {name: (claim, config) for config, (name, claim) in found.items()}


@pytest.mark.parametrize("name", every_small_arm())
def test_measure(name: str) -> None:
    """No arm that ends a sweep after hours: each gives the figures that its claim compares and shows."""
    claim, config = every_small_arm()[name]
    found = claims.measure(config, 3)
    for metric in (claim.metric, *claim.also):
        assert np.isfinite(found[metric]), metric
    assert found["by_session"][-1] == found["accuracy"]
    assert 0 < found["share"] <= 100
    if config.sessions and config.teacher_epochs:
        assert found["gain"] == pytest.approx(found["accuracy"] - found["by_session"][0])
    if "weight_separation" in found:
        assert 0 <= found["weight_separation"] <= 1
        assert all(len(counts) == 40 for counts in found["weight_counts"].values())
    json.dumps(found)


def cell(folder: Path, claim: Claim, arm: str, metrics: dict[str, Any], **changes: Any) -> None:
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    record = {
        "claim": claim.name, "version": claim.version, "scale": "small", "arm": arm,
        "config": config_to_dict(claim.arms["small"][arm]), "metrics": metrics,
    }  # fmt: skip
    name = f"{claim.name}-{arm}-{changes}.json".replace(" ", "")
    (folder / "cells" / name).write_text(json.dumps(record | changes))


def test_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each from cells of the present version alone."""
    drawn: dict[str, Any] = {}
    monkeypatch.setattr("list_selftrain.plots.lines", lambda curves, path, **_: drawn.__setitem__(path.name, curves))
    for claim in claims.CLAIMS:
        for arm in claim.arms["small"]:
            for seed in range(2):
                metrics = {
                    "accuracy": 60.0 + seed, "by_session": [50.0, 60.0 + seed],
                    "weight_counts": {"right": [1] * 40, "wrong": [2] * 40},
                }  # fmt: skip
                cell(tmp_path, claim, arm, metrics, seed=seed)
            cell(tmp_path, claim, arm, {"accuracy": 0.0, "by_session": [0.0]}, seed=0, version=0)
            cell(tmp_path, claim, arm, {"accuracy": 0.0, "by_session": [0.0]}, seed=99)
    claims.plot(tmp_path, "small")
    assert set(drawn) == {
        "small-class-noise.png", "small-symmetric-noise.png", "small-noisy-student.png", "small-sessions.png",
        "small-sessions-generated.png",
    }  # fmt: skip
    assert (tmp_path / "small-weights.png").stat().st_size > 5000
    assert drawn["small-class-noise.png"]["meta"] == ([40, 60, 80], [[60.0, 61.0]] * 3)
    assert drawn["small-symmetric-noise.png"]["uniform"] == ([10, 20, 30, 40, 45], [[60.0, 61.0]] * 5)
    assert drawn["small-noisy-student.png"]["soft"] == ([0, 1], [[50.0, 50.0], [60.0, 61.0]])


def test_nothing_to_plot(tmp_path: Path) -> None:
    claims.plot(tmp_path, "small")
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("whole", [True, False], ids=["flagship", "one cell"])
def test_plot_of_few_cells(tmp_path: Path, whole: bool) -> None:
    """What a sweep of one claim, or one that was interrupted, has left can be drawn."""
    metrics = {"accuracy": 60.0, "by_session": [50.0, 60.0], "weight_counts": {"right": [1] * 40, "wrong": [2] * 40}}
    for claim in claims.CLAIMS:
        if claim.flagship:
            for arm in claim.arms["small"] if whole else (claim.treatment,):
                for seed in range(2 if arm == claim.treatment else 1):
                    cell(tmp_path, claim, arm, metrics, seed=seed)
    claims.plot(tmp_path, "small")
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures
    assert all(name.startswith("small-") for name in pictures)
    claims.plot(tmp_path, "paper")
    assert {path.name for path in tmp_path.glob("*.png")} == pictures
