"""The claims: every arm can be built, arms of a claim have one budget, the figures of an arm are those of its run."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from mambacl import claims, data
from mambacl.config import Config
from mambacl.data import EpisodeConfig
from mambacl.train import build_model
from metazoo.claims import Claim

torch.set_num_threads(1)
LISTED = pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)


class _Stand(data.Episodes):
    """The shape of a data set that is not here."""

    def draw(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is drawn")


def arms(claim: Claim, scale: str) -> dict[str, Config]:
    return {name: config for name, config in claim.arms[scale].items() if isinstance(config, Config)}


@LISTED
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_arm_can_be_built(claim: Claim, scale: str) -> None:
    """No arm that ends a sweep after hours."""
    for config in set(arms(claim, scale).values()):
        kind, shape = ("class", (8,)) if config.classes else ("vector", (50,))
        if config.dataset.startswith("omniglot"):
            shape = (1, config.image_size, config.image_size)
        episodes = _Stand(kind, shape, 0 if config.classes else 50, EpisodeConfig.from_config(config))
        model = build_model(config, data.Data("stand-in", episodes, episodes))
        assert sum(p.numel() for p in model.parameters()) > 0


@LISTED
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_arms_have_one_budget(claim: Claim, scale: str) -> None:
    """The same episodes, as many of them, and the same encoder for every arm."""
    budgets = {
        (
            config.dataset, config.tasks, config.shots, config.vocabulary, config.steps, config.batch_size,
            config.encoder, config.encoder_width, config.width,
        )
        for config in arms(claim, scale).values()
        if config.method != "offline"  # which is not meta-trained
    }  # fmt: skip
    assert len(budgets) == 1


def test_measure() -> None:
    """One tiny arm: scores, drops and curve are those of its run."""
    tiny = Config(width=8, steps=20, batch_size=4, queries=1, eval_every=10, eval_episodes=20)
    found = claims.measure(tiny, 3)
    assert found["drop_more_shots"] == pytest.approx(found["accuracy"] - found["more_shots"])
    assert found["drop_more_tasks"] == pytest.approx(found["accuracy"] - found["more_tasks"])
    assert found["drop_noise"] == pytest.approx(found["accuracy"] - found["noise"])
    assert found["steps"] == [10, 20]
    assert found["at_40_percent"] == found["curve"][0]
    assert found["final"] == found["curve"][1]
    sine = dataclasses.replace(tiny, dataset="sine", encoder="mlp", encoder_width=8, method="linear_transformer")
    found = claims.measure(dataclasses.replace(sine, queries=None, eval_every=0), 3)
    assert found["mse"] > 0
    assert "more_shots" not in found


def test_state_of_long_streams() -> None:
    """Fixed for Mamba; a Transformer's grows 50 times from 40 to 2000 examples."""
    small = next(claim for claim in claims.CLAIMS if claim.name == "constant-state").arms["small"]
    found = {name: claims.measure_state(config, 0) for name, config in small.items()}  # type: ignore[arg-type]
    assert found["mamba"]["bytes_ratio"] == found["linear"]["bytes_ratio"] == 1.0
    assert found["transformer"]["bytes_ratio"] == 50.0
