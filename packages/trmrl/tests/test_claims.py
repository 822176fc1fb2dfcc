"""The claims: every arm can be built, arms differ in what they say alone, and figures are those of their runs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metazoo.claims import Claim
from metazoo.runfolder import config_to_dict
from PIL import Image
from trmrl import claims, plots, references
from trmrl.config import Config

torch.set_num_threads(1)
LISTED = pytest.mark.parametrize("claim", claims.CLAIMS, ids=lambda claim: claim.name)
SCALES = pytest.mark.parametrize("scale", ["small", "paper"])
ALGORITHMS = ("trmrl", "rl2", "ppo", "oracle", "varibad", "maml", "pearl")
# what may differ between the arms of a claim: what the claim is about, and the rates that each algorithm was tuned by
OWN = {
    "algo", "lr", "value_lr", "vae_lr", "sac_lr", "inner_lr", "max_kl", "inner_discount", "rollouts", "tasks",
    "updates", "decay_from", "decay_to", "decay_floor", "clip", "entropy", "init_std", "d_model", "kl_weight",
    "latent", "sac_steps", "sac_tasks", "sac_batch", "sac_hidden", "context", "reward_scale", "first_order",
    "vae_steps", "minibatch", "passes", "discount", "gae_lambda", "normalize_advantages", "max_grad_norm",
}  # fmt: skip
RATES = {"lr", "value_lr"}
SAYS: dict[str, set[str]] = {
    **{arm: OWN for arm in ("trmrl", "rl2", "memoryless", "oracle", "varibad", "maml", "pearl")},
    **{arm: {"init", "norm"} for arm in ("tfixup", "xavier")},
    **{arm: {"init", "norm", *RATES} for arm in claims.DEEP},
    **{arm: {"window", *RATES} for arm in ("k-5", "k-2", "k-1")},
    "no-reward": {"mask_reward", *RATES},
}


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    """The picture of a training takes longer than the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training", lambda rows, path: None)
        yield


def arms(claim: Claim, scale: str) -> dict[str, Config]:
    return {name: config for name, config in claim.arms[scale].items() if isinstance(config, Config)}


def lean(config: Config) -> Config:
    """The same arm in a fraction of a second."""
    return dataclasses.replace(
        config, horizon=4, episodes=2, tasks=2, d_model=8, heads=2, layers=1, d_ff=16, head_hidden=(8,), updates=2,
        passes=1, minibatch=16, rollouts=2, sac_steps=2, sac_hidden=8, sac_batch=4, sac_tasks=2, context=4,
        train_tasks=4, vae_trials=4, vae_steps=1, decay_from=0, decay_to=0,
    )  # fmt: skip


def named(name: str) -> Claim:
    return next(claim for claim in claims.CLAIMS if claim.name == name)


# ---- what is claimed


def test_list() -> None:
    """Names are told apart, there are flagships, and each claim has its seeds, both scales and its arms."""
    names = [claim.name for claim in claims.CLAIMS]
    assert len(set(names)) == len(names)
    assert {claim.name for claim in claims.CLAIMS if claim.flagship} >= {"over-memoryless", "tfixup-growth"}
    for claim in claims.CLAIMS:
        assert claim.seeds >= 5
        assert set(claim.arms) == {"small", "paper"}
        for scale in claim.arms:
            assert len(arms(claim, scale)) == len(claim.arms[scale])
            assert set(claim.arms[scale]) == {claim.treatment, *filter(None, [claim.baseline])}
            assert set(claim.tuning) == set(claim.arms[scale])


@LISTED
@SCALES
def test_arms_differ_in_what_they_say(claim: Claim, scale: str) -> None:
    """All else is the same, and something differs."""
    if claim.baseline is None:
        return
    one, other = (dataclasses.asdict(claim.arms[scale][arm]) for arm in (claim.treatment, claim.baseline))  # type: ignore[call-overload]
    changed = {name for name, value in one.items() if value != other[name]}
    assert changed
    assert changed <= SAYS[claim.treatment] | SAYS[claim.baseline]


@LISTED
@SCALES
def test_arms_have_one_budget(claim: Claim, scale: str) -> None:
    """The same environment, trials and number of environment steps, within a hundredth."""
    held = arms(claim, scale).values()
    assert len({(config.env, config.horizon, config.episodes, config.seed) for config in held}) == 1
    steps = [config.steps * config.updates for config in held]
    assert max(steps) <= 1.01 * min(steps), steps


def test_arms_are_what_they_say() -> None:
    for scale in ("small", "paper"):
        found = arms(named("needs-reward"), scale)
        assert found["no-reward"].mask_reward
        assert not found["k-5"].mask_reward
        assert found["k-5"].window == found["no-reward"].window == 5
        found = arms(named("two-over-one"), scale)
        assert (found["k-1"].window, found["k-2"].window) == (1, 2)
        assert {config.algo for config in claims._ARMS[scale].values()} == set(ALGORITHMS)
        deep = {arm: (claims._ARMS[scale][arm].init, claims._ARMS[scale][arm].norm) for arm in claims.DEEP}
        assert deep == {
            "tfixup-8": ("tfixup", "none"), "xavier-8": ("xavier", "none"), "layernorm-8": ("xavier", "post"),
        }  # fmt: skip
        assert {claims._ARMS[scale][arm].layers for arm in claims.DEEP} == {8}


# ---- what is measured


@pytest.mark.parametrize("arm", sorted(claims._ARMS["small"]))
def test_measure(arm: str) -> None:
    """Every arm gives the metrics that its claims compare and show, as JSON."""
    mine = [claim for claim in claims.CLAIMS if claim.measure is claims.measure and arm in claim.arms["small"]]
    wanted = {name for claim in mine for name in (claim.metric, *claim.also)}
    config = lean(claims._ARMS["small"][arm])
    found = claims.measure(config, 1)
    assert mine or arm in ("oracle", "varibad")  # which benchmarks use, and no claim yet
    assert wanted <= set(found)
    assert found == json.loads(json.dumps(found, default=float))
    assert found["above_floor"] == max(found["episode_1"], 0)
    assert {f"ood_episode_{i}" for i in (1, 2, 3, 4)} <= set(found)
    assert found["steps"] == config.steps * 2
    assert len(found["curve"]) == 2  # type: ignore[arg-type]
    assert found["seconds_of_training"] > 0  # type: ignore[operator]


@pytest.mark.parametrize("name", ["no-reward"])
def test_measure_of_ablations(name: str) -> None:
    """What they need, too; no score is above 1 by much: 1 is the best possible."""
    base = claims._ARMS["small"]
    found = claims.measure(lean(base[name]), 0)
    assert {"episode_1", "episode_2", "seconds_of_training"} <= set(found)
    assert found["episode_1"] < 1  # type: ignore[operator]


def test_measure_on_mujoco() -> None:
    """Of how far from the target velocity it is once it has settled: standing still is off by 1.5 or 3.5 on average."""
    config = dataclasses.replace(lean(claims._ARMS["paper"]["trmrl"]), horizon=21, episodes=1, updates=1)
    found = claims.measure(config, 0)
    assert -3 < found["episode_1"] < 0  # type: ignore[operator]
    assert -6 < found["ood_episode_1"] < found["episode_1"]  # type: ignore[operator]
    assert references.velocity_score(0.75) == 0
    assert references.velocity_score(0.0) == 1
    targets = np.random.default_rng(0).uniform(0, 3, 10**5)
    assert np.abs(targets - 1.5).mean() == pytest.approx(0.75, abs=0.01)


def test_measured_arm_is_its_run(tmp_path: Path) -> None:
    """measure() gives what training and evaluating by hand give."""
    from metazoo.options import RunOptions
    from trmrl.env import make_vector
    from trmrl.evaluate import evaluate_adaptation
    from trmrl.train import train

    config = lean(claims._ARMS["small"]["trmrl"])
    found = claims.measure(config, 3)
    run = train(dataclasses.replace(config, seed=3), RunOptions(output_dir=tmp_path / "run", log_every=1))
    assert found["curve"] == [row["return_1"] for row in run.metrics]
    goals = references.goals()
    result = evaluate_adaptation(
        run.agent, make_vector(config.env, 64), episodes=4, horizon=4, tasks=goals, seed=1003
    )  # fmt: skip
    returns = result.returns.mean(0)
    floor, ceiling = references.memoryless_return(4), references.oracle_return(4)
    for i, value in enumerate(returns):
        assert found[f"episode_{i + 1}"] == pytest.approx((value - floor) / (ceiling - floor))


def test_growth() -> None:
    """With T-Fixup norms stay; with plain Xavier they explode; as the claims say, by the metrics that they name."""
    found = {
        init: claims.measure_growth(config, 0)
        for init, config in claims._GROWTH_ARMS.items()
        if init != "tfixup-original"
    }
    assert 1 <= found["tfixup"]["growth_4"] <= 1.25
    assert 1 <= found["tfixup"]["worst"] <= 1.25
    assert found["xavier"]["growth_16"] > 100
    assert found["xavier"]["worst"] == found["xavier"]["growth_32"] > found["xavier"]["growth_16"]
    for claim in claims.CLAIMS:
        if claim.measure is claims.measure_growth:
            assert {claim.metric, *claim.also} <= set(found["tfixup"])
    assert claims.measure_growth(claims._GROWTH_ARMS["tfixup"], 1) != found["tfixup"]


def test_risk() -> None:
    found = claims.measure_risk(Config(), 0)
    assert found["least_gap"] >= 0
    assert found["mean_gap"] > found["least_gap"]
    claim = named("consensus-risk")
    assert {claim.metric, *claim.also} <= set(found)


# ---- what is drawn


def cells(folder: Path, scale: str, changes: dict[str, Any] | None = None) -> None:
    """Two seeds of each arm of all claims, written by hand."""
    (folder / "cells").mkdir(parents=True)
    names = "episode_1", "episode_3", "above_floor", "ood_episode_3", "worst", *(f"growth_{n}" for n in claims.DEPTHS)
    for claim in claims.CLAIMS:
        for arm, config in arms(claim, scale).items():
            for seed in range(2):
                wanted = names[:4] if claim.measure is claims.measure else names[4:]
                metrics: dict[str, Any] = dict.fromkeys(wanted, seed + 1.0)
                if claim.measure is claims.measure:
                    metrics["curve"] = [1.0, 2.0, seed + 2.0]
                cell = {
                    "claim": claim.name, "scale": scale, "version": claim.version, "seed": seed, "arm": arm,
                    "config": config_to_dict(config), "metrics": metrics, **(changes or {}),
                }  # fmt: skip
                (folder / "cells" / f"{claim.name}-{arm}-{seed}.json").write_text(json.dumps(cell))


PICTURES = ("first-episode", "adapted", "ood", "training", "window", "depth", "growth")


@SCALES
def test_plot(tmp_path: Path, scale: str) -> None:
    cells(tmp_path, scale)
    claims.plot(tmp_path, scale)
    assert {path.name for path in tmp_path.glob("*.png")} == {f"{scale}-{name}.png" for name in PICTURES}
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.convert("L").getextrema()[0] < 100  # type: ignore[operator]


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 99},
        {"config": config_to_dict(Config(lr=0.5))},
        {"scale": "paper"},
        {"claim": "none"},
        {"arm": "none"},
        {"seed": 100},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_plot_ignores_others(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Cells of another version, config, scale, claim, arm, or beyond the claim's seeds."""
    cells(tmp_path, "small", changes)
    claims.plot(tmp_path, "small")
    assert not list(tmp_path.glob("*.png"))


def test_plot_of_little(tmp_path: Path) -> None:
    """No cells, no pictures; cells of one arm alone are drawn."""
    (tmp_path / "cells").mkdir()
    claims.plot(tmp_path, "small")
    assert not list(tmp_path.glob("*.png"))
    cells(tmp_path / "one", "small")
    for path in (tmp_path / "one" / "cells").iterdir():
        if path.name != "tfixup-growth-tfixup-0.json":
            path.unlink()
    claims.plot(tmp_path / "one", "small")
    assert [path.name for path in (tmp_path / "one").glob("*.png")] == ["small-growth.png"]
