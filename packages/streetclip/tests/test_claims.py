"""The claims: every arm can be built, arms of a claim have one budget, and their figures are those of their runs."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from metazoo.claims import Claim
from metazoo.options import RunOptions
from metazoo.runfolder import config_to_dict
from streetclip import claims, plots
from streetclip.config import PRESETS, Config, OracleOptions
from streetclip.train import train

torch.set_num_threads(1)
LISTED = pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
TRAINED = [claim for claim in claims.CLAIMS if claim.measure is claims.measure]
EXACT = [claim for claim in claims.CLAIMS if claim.measure is not claims.measure]


def arms(claim: Claim, scale: str) -> dict[str, Config]:
    return {name: config for name, config in claim.arms[scale].items() if isinstance(config, Config)}


def lean(config: Config) -> Config:
    """The same arm in a second."""
    return dataclasses.replace(
        config, images=40, test_images=8, width=8, heads=2, vision_layers=1, text_layers=1, projection=4, patch=16,
        batch=8, generic_batch=8, generic_steps=1, steps=2, warmup=0,
    )  # fmt: skip


def test_list() -> None:
    """Names are told apart, one claim is the flagship, and each has its seeds and both scales."""
    names = [claim.name for claim in claims.CLAIMS]
    assert len(set(names)) == len(names)
    assert [claim.name for claim in claims.CLAIMS if claim.flagship] == ["unseen-places"]
    for claim in claims.CLAIMS:
        assert claim.seeds >= 5
        assert set(claim.arms) == {"small", "paper"}
    assert len(TRAINED) + len(EXACT) == len(names)


@pytest.mark.parametrize("claim", TRAINED, ids=lambda claim: claim.name)
def test_one_budget(claim: Claim) -> None:
    """Data, CLIP, its first phase, steps and batch are those of all arms; the method is what differs."""
    for scale in claim.arms:
        held = arms(claim, scale)
        if claim.name == "gain-25km" and scale == "paper":
            continue  # two CLIPs that others have trained
        same = {
            tuple(
                getattr(config, name)
                for name in (
                    "dataset",
                    "images",
                    "model",
                    "width",
                    "generic_steps",
                    "generic_lr",
                    "steps",
                    "batch",
                )
            )
            for config in held.values()
        }
        assert len(same) == 1, scale
        assert len({json.dumps(config_to_dict(config)) for config in held.values()}) == len(held)


def test_clip_is_only_asked_at_paper_scale() -> None:
    (gain,) = (claim for claim in claims.CLAIMS if claim.name == "gain-25km")
    held = arms(gain, "paper")
    assert {config.method for config in held.values()} == {"clip"}
    assert {name: config.model for name, config in held.items()} == {
        "clip": "openai/clip-vit-large-patch14-336", "streetclip": "geolocal/StreetCLIP"
    }  # fmt: skip


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def measured(cache: Path) -> dict[str, dict[str, Any]]:
    """Each small arm, in a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(cache))
        patch.setattr(plots, "training", lambda rows, path: None)
        every = {name: config for claim in TRAINED for name, config in arms(claim, "small").items()}
        return {name: claims.measure(lean(config), 3) for name, config in every.items()}


@pytest.mark.parametrize("claim", TRAINED, ids=lambda claim: claim.name)
def test_metrics_are_there(claim: Claim, measured: dict[str, dict[str, Any]]) -> None:
    for name in claim.arms["small"]:
        for metric in (claim.metric, *claim.also):
            assert isinstance(measured[name][metric], float), (name, metric)


def test_first_phase_is_trained_once(measured: dict[str, dict[str, Any]], cache: Path) -> None:
    (entry,) = (path for path in (cache / "streetclip").iterdir() if path.is_dir())
    assert (entry / "done").exists()


def test_going_on_is_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the first phase's CLIP, an arm ends with the weights of a run of both phases, bit for bit."""
    monkeypatch.setattr(plots, "training", lambda rows, path: None)
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "cache"))
    config = dataclasses.replace(lean(PRESETS["small"]), seed=3, generic_steps=3, drop_levels=0.5)
    whole = train(config, RunOptions(output_dir=tmp_path / "whole"))
    start = claims.start_of(config, 3)
    parts = train(
        dataclasses.replace(config, model=str(start), generic_steps=0), RunOptions(output_dir=tmp_path / "parts")
    )
    for name, value in whole.clip.state_dict().items():
        assert torch.equal(value, parts.clip.state_dict()[name]), name


def test_same_seed_same_figures(measured: dict[str, dict[str, Any]], cache: Path) -> None:
    (config,) = {lean(arms(claim, "small")["streetclip"]) for claim in TRAINED}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(cache))
        patch.setattr(plots, "training", lambda rows, path: None)
        again = claims.measure(lean(config), 3)
    timed = {"seconds_of_training", "ms", "flat_ms"}
    assert {k: v for k, v in again.items() if k not in timed} == {
        k: v for k, v in measured["streetclip"].items() if k not in timed
    }
    gains = [again[f"{g}_within_750"] - again[f"flat_{g}_within_750"] for g in claims.GROUPS]
    assert again["hierarchical_gain_750"] == pytest.approx(sum(gains) / 3)
    for metric in ("within_25", "country_top1"):
        unseen = [again[f"{g}_{metric}"] for g in claims.GROUPS[1:]]
        assert again[f"unseen_{metric}"] == pytest.approx(sum(unseen) / 2)


def test_cost() -> None:
    """244 countries of GeoNames and at most 30 cities of one, against 4,507 cities."""
    found = claims.measure_cost(OracleOptions(cities=(30,)), 0)
    assert found == {"flat": 4507.0, "hierarchical": 274.0, "ratio": 4507 / 274}


def test_ceilings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On coordinates at the most populous city of a country all is within a kilometre."""
    from streetclip.gazetteer import Gazetteer

    places = Gazetteer.geonames()
    best = [int(places.top(country, 1)[0]) for country in range(0, 240, 40)]
    lines = [f"{i}.jpg,{places.latitude[i]},{places.longitude[i]}" for i in best]
    (tmp_path / "im2gps").mkdir()
    (tmp_path / "im2gps" / "img2gps3k_dataset_2997.csv").write_text(
        "\n".join(["filename,latitude,longitude", *lines]) + "\n"
    )
    monkeypatch.setenv("METAZOO_DATA", str(tmp_path))
    found = claims.measure_ceilings(OracleOptions(coords="im2gps3k"), 0)
    assert found["ceiling_1_1"] == found["ceiling_0_2500"] == 100
    assert found["deviation"] == pytest.approx(100 - 4.4)
    assert found["headroom"] == pytest.approx(100 - 80.4)


def test_plots(tmp_path: Path, measured: dict[str, dict[str, Any]]) -> None:
    """Cells of these claims are drawn; of other versions, seeds or configs not."""
    cells = tmp_path / "cells"
    cells.mkdir()
    (claim,) = (claim for claim in claims.CLAIMS if claim.name == "both-towers")
    for name, config in arms(claim, "small").items():
        for seed in range(2):
            cell = {
                "claim": claim.name, "version": claim.version, "scale": "small", "arm": name, "seed": seed,
                "config": config_to_dict(config), "metrics": measured[name],
            }  # fmt: skip
            (cells / f"{name}-{seed}.json").write_text(json.dumps(cell))
    longer = claims.arms_of_longer()["clip"]  # another arm of this name, which is not among those drawn
    cell = {
        "claim": "unseen-places-longer-start", "version": 1, "scale": "small", "arm": "clip", "seed": 1,
        "config": config_to_dict(longer), "metrics": {name: 1000.0 for name in measured["clip"]},
    }  # fmt: skip
    (cells / "longer.json").write_text(json.dumps(cell))
    drawn: list[dict[str, Any]] = []
    kept = plots.arms
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "arms", lambda panels, *rest, **more: (drawn.append(panels), kept(panels, *rest, **more)))
        claims.plot(tmp_path, "small")
    assert {path.name for path in tmp_path.glob("*.png")} == {"small-countries.png", "small-cities.png"}
    assert all(value <= 100 for panels in drawn for of in panels.values() for values in of.values() for value in values)
    for path in cells.glob("*.json"):
        cell = json.loads(path.read_text())
        path.write_text(json.dumps({**cell, "version": claim.version + 1}))
    for path in tmp_path.glob("*.png"):
        path.unlink()
    claims.plot(tmp_path, "small")
    assert not list(tmp_path.glob("*.png"))


@LISTED
def test_sources(claim: Claim) -> None:
    """What a claim says names its place in the paper, or that it is ours."""
    assert claim.source.startswith(("Section", "Table", "Ours"))
    assert claim.statement[0].isupper()
