"""The claims: every arm can be built, arms of a claim have one budget, the figures of an arm are those of its run."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from metacluster import claims, data
from metacluster.config import Config
from metacluster.train import build_model
from metazoo.claims import Claim

SHAPES = {"mnist14": (1, 14, 14), "mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
LISTED = pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)


def arms(claim: Claim, scale: str) -> dict[str, Config]:
    return {name: config for name, config in claim.arms[scale].items() if isinstance(config, Config)}


@LISTED
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_every_arm_can_be_built(claim: Claim, scale: str) -> None:
    """No arm asks for more centroids than a layer has edges: that would end a sweep after hours."""
    for config in set(arms(claim, scale).values()):
        classes = None if config.dataset in data.GENERATED else tuple("0123456789")
        none = torch.zeros(0)
        shape = SHAPES.get(config.dataset, (config.dimension,))
        model = build_model(config, data.Dataset(config.dataset, none, none, none, none, classes, shape))
        assert sum(p.numel() for p in model.parameters()) > 0


@LISTED
@pytest.mark.parametrize("scale", ["small", "paper"])
def test_arms_have_one_budget(claim: Claim, scale: str) -> None:
    """The same data, batches and number of epochs over all stages for every arm (d10 has another equation)."""
    budgets = {
        (config.dataset, config.train_size, config.batch_size, config.epochs + trained_codebook(config))
        for config in arms(claim, scale).values()
    }
    assert len(budgets) == 1


def trained_codebook(config: Config) -> int:
    return 0 if config.model == "mlp" else config.finetune_epochs


def test_measure() -> None:
    """One tiny arm of each kind: the stages' figures, their differences, and what is deployed."""
    tiny = Config(dataset="digits", train_size=200, hidden=(8,), clusters=4, epochs=2, finetune_epochs=1, centres=4)
    meta = claims.measure(tiny, 3)
    assert meta["drop_at_clustering"] == pytest.approx(meta["before"] - meta["clustered"])
    assert meta["change_by_compression"] == pytest.approx(meta["finetuned"] - meta["before"])
    assert meta["deployed"] == meta["finetuned"]
    assert meta["residual"] == pytest.approx((meta["residual_layers.0"] + meta["residual_layers.1"]) / 2)
    assert meta["file_factor"] == pytest.approx(4 * (64 * 8 + 80) * 5 / meta["file_bytes"])
    direct = claims.measure(dataclasses.replace(tiny, edges="direct", lr=3e-3), 3)
    assert direct["deployed"] == direct["before"]
    mlp = claims.measure(dataclasses.replace(tiny, model="mlp"), 3)
    assert mlp["finetuned"] == mlp["before"]
    assert mlp["bytes"] == 4 * (65 * 8 + 9 * 10)
