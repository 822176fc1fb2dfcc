"""TrMRL's claims as code. Margins, seeds and metrics were set before measuring.

A seed decides initialisation, training tasks, starts and actions; the 64 test goals are always the same. Rates were
chosen at seeds from 100 on, on drawn training goals (benchmarks/tuning.py); `tuning` counts these and all pilots.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from metazoo.claims import Claim

from trmrl.config import PRESETS, Config

DEPTHS = (2, 4, 8, 16, 32)
TEST_EPISODES = 4


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Train an agent, and try it on test tasks and out of the training distribution, with mean actions.

    Returns:
        episode_1 … episode_4 and ood_episode_1 … 4: S, 0 for the best behaviour without a memory and 1 for one that
        knows the task. On the point robot by returns, where velocities have targets by the error after step 20;
        elsewhere returns as they are. above_floor: episode_1, but at least 0. steps (of training),
        seconds_of_training, curve (return of the first episode by update, with exploration).
    """
    import tempfile
    import time

    from metazoo.options import RunOptions

    from trmrl import references
    from trmrl.env import make_vector
    from trmrl.evaluate import evaluate_adaptation, settled
    from trmrl.train import train

    robot = config.env == "trmrl/PointRobot-v0"
    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        options = RunOptions(output_dir=Path(scratch) / "run", log_every=1, checkpoint_every=10**9)
        run = train(replace(config, seed=seed), options)
        seconds = time.perf_counter() - started
    env = make_vector(config.env, references.GOALS if robot else 20, config.threads)
    found: dict[str, Any] = {}
    for prefix, split in (("", "test"), ("ood_", "ood")):
        tasks = references.goals(split) if robot else None
        result = evaluate_adaptation(
            run.agent, env, episodes=TEST_EPISODES, horizon=config.horizon, split=split, tasks=tasks, seed=1000 + seed,
        )  # type: ignore[arg-type]  # fmt: skip
        for i, value in enumerate(result.returns.mean(0)):
            if robot:
                scored = references.score(value, config.horizon)
            else:
                scored = references.velocity_score(settled(result, i)) if "error" in result.infos else float(value)
            found[f"{prefix}episode_{i + 1}"] = scored
    env.close()
    found["above_floor"] = max(found["episode_1"], 0.0)
    curve = [row["return_1"] for row in run.metrics]
    return {**found, "curve": curve, "steps": config.steps * config.updates, "seconds_of_training": seconds}


def measure_growth(config: Config, seed: int) -> dict[str, Any]:
    """How an encoder of each depth changes the norm of its memories at initialisation; nothing is trained.

    Returns:
        growth_N = ‖h_N‖ / ‖h_0‖ for N of 2, 4, 8, 16, 32, and worst, the one that is farthest from 1 (as a ratio).
    """
    import torch

    from trmrl.model import TrMRLPolicy

    generator = torch.Generator().manual_seed(seed)
    window = torch.randn(256, config.window, 28, generator=generator)  # tokens of HalfCheetahVel's size
    found = {}
    for depth in DEPTHS:
        torch.manual_seed(seed)
        policy = TrMRLPolicy(
            20, 6, window=config.window, d_model=config.d_model, heads=config.heads, layers=depth, d_ff=config.d_ff,
            init=config.init,
        )  # fmt: skip
        with torch.no_grad():
            first = h = policy.embedding(window) + policy.positions
            for layer in policy.encoder:
                h = layer(h)
        found[f"growth_{depth}"] = float(h.norm() / first.norm())
    return {**found, "worst": max(found.values(), key=lambda value: max(value, 1 / value))}


def measure_risk(config: Config, seed: int) -> dict[str, Any]:
    """Minimum Bayes Risk less the consensus' risk in 2,000 random cases of 7 unit-norm memories in 16 dimensions."""
    import torch

    from trmrl import bayes

    generator = torch.Generator().manual_seed(seed)
    memories = torch.nn.functional.normalize(torch.randn(2000, 7, 16, generator=generator, dtype=torch.float64), dim=-1)
    weights = torch.randn(2000, 7, generator=generator, dtype=torch.float64).softmax(-1)
    gaps = bayes.minimum_bayes_risk(weights, memories) - bayes.risk(
        bayes.consensus(weights, memories), weights, memories
    )
    return {"least_gap": float(gaps.min()), "mean_gap": float(gaps.mean())}


def arms_of(base: Config) -> dict[str, Config]:
    """All meta-learners on the same number of environment steps."""
    return {
        "trmrl": base,
        # a GRU of 128, as VariBAD's RL² has
        "rl2": replace(base, algo="rl2", d_model=128),
        "memoryless": replace(base, algo="ppo"),
        "oracle": replace(base, algo="oracle"),
        "varibad": replace(base, algo="varibad", d_model=128),
        # rollouts before and after the inner step: the same number of environment steps an update
        "maml": replace(base, algo="maml", tasks=base.tasks // 2, rollouts=base.episodes),
        "pearl": replace(base, algo="pearl"),
    }


_SMALL, _PAPER = PRESETS["small"], PRESETS["paper"]
_ARMS = {"small": arms_of(_SMALL), "paper": arms_of(_PAPER)}
# At the paper's size PPO without TrMRL has the settings of VariBAD's authors (theirs of RL², too), MAML those of ProMP,
# PEARL its authors', with as many gradient steps a step of the environment.
_PPO: dict[str, Any] = {
    "lr": 7e-4, "value_lr": 7e-4, "discount": 0.97, "gae_lambda": 0.9, "clip": 0.1, "entropy": 0.01, "passes": 2,
    "minibatch": 2000, "normalize_advantages": True, "max_grad_norm": 0.5, "init_std": 1.0, "decay_from": 0,
    "decay_to": 0,
}  # fmt: skip
_PAPER_OWN: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("rl2", "memoryless", "oracle", "varibad"), _PPO),
    "maml": {"tasks": 40, "rollouts": 20, "updates": 62, "init_std": 1.0, "decay_from": 0, "decay_to": 0},
    "pearl": {
        "discount": 0.99, "sac_steps": 3200, "sac_tasks": 16, "sac_batch": 256, "sac_hidden": 300, "context": 100,
        "decay_from": 0, "decay_to": 0,
    },
}  # fmt: skip
# PEARL's scale of rewards is that of its authors' point robot.
_SMALL_OWN: dict[str, dict[str, Any]] = {"pearl": {"reward_scale": 100.0}}
for _scale, _own in (("small", _SMALL_OWN), ("paper", _PAPER_OWN)):
    for _arm, _changed in _own.items():
        _ARMS[_scale][_arm] = replace(_ARMS[_scale][_arm], **_changed)
    _base = _ARMS[_scale]["trmrl"]
    _deep = replace(_base, layers=8)
    if _scale == "small":
        _deep = replace(_deep, tasks=20, updates=60, decay_from=24, decay_to=59)
    _ARMS[_scale] |= {
        "k-5": _base,
        "k-2": replace(_base, window=2),
        "k-1": replace(_base, window=1),
        "no-reward": replace(_base, mask_reward=True),
        "tfixup-8": _deep,
        "xavier-8": replace(_deep, init="xavier"),
        "layernorm-8": replace(_deep, init="xavier", norm="post"),
    }
LEARNERS = ("trmrl", "rl2", "memoryless", "maml", "pearl")
WINDOWS = ("k-5", "k-2", "k-1", "no-reward")
DEEP = ("tfixup-8", "xavier-8", "layernorm-8")
# results/bench/tuning.json
_PPO_RATES = {
    "trmrl": 1e-3, "k-5": 1e-3, "no-reward": 1e-3, "rl2": 1e-3, "memoryless": 1e-3, "k-2": 5e-4, "k-1": 5e-4,
    **dict.fromkeys(DEEP, 5e-4),
}  # fmt: skip
_RATES: dict[str, dict[str, float]] = {
    **{arm: {"lr": rate, "value_lr": rate} for arm, rate in _PPO_RATES.items()},
    "pearl": {"sac_lr": 3e-3}, "maml": {"inner_lr": 0.1},
}  # fmt: skip
for _arm, _rates in _RATES.items():
    _ARMS["small"][_arm] = replace(_ARMS["small"][_arm], **_rates)  # type: ignore[arg-type]
_GROWTH = Config(d_model=64, heads=4, d_ff=256, window=5)
_GROWTH_ARMS = {init: replace(_GROWTH, init=init) for init in ("tfixup", "xavier")}  # type: ignore[arg-type]
# All trials and pilots that there ever were. TrMRL (k-5 is the same): 6 of benchmarks/tuning.py, 8 of smaller budgets
# of gradient steps, and 14 pilots of version 1, which set updates, clipping and decay for all arms of PPO and were
# scored on test goals. MAML: 4 before it explored by θ in tests. None of eight layers: half of TrMRL's rate.
_TRIALS = {
    "trmrl": 28, "k-5": 28, "rl2": 8, "memoryless": 7, "pearl": 13, "maml": 14, "no-reward": 3, "k-2": 3, "k-1": 3,
    **dict.fromkeys(DEEP, 0),
}  # fmt: skip
_ALSO = ("episode_1", "episode_2", "episode_3", "ood_episode_1", "ood_episode_3", "seconds_of_training")


def _claim(name: str, treatment: str, baseline: str | None, **more: Any) -> Claim:
    """A trained arm beside another one on the same environment steps, or beside a stated value."""
    arms = [arm for arm in (treatment, baseline) if arm is not None]
    return Claim(
        name=name, measure=measure, seeds=5, arms={s: {arm: _ARMS[s][arm] for arm in arms} for s in _ARMS},
        treatment=treatment, baseline=baseline, compare="difference" if baseline else "value",
        tuning={arm: _TRIALS[arm] for arm in arms}, also=_ALSO,
        **{"version": 2, "metric": "episode_1", "chance": 0.0, **more},
    )  # fmt: skip


def _growth(name: str, treatment: str, **more: Any) -> Claim:
    arms = {treatment: _GROWTH_ARMS[treatment]}
    return Claim(
        name=name, version=1, measure=measure_growth, seeds=5, arms={"small": arms, "paper": arms}, treatment=treatment,
        baseline=None, compare="value", tuning={treatment: 0}, also=tuple(f"growth_{n}" for n in DEPTHS), **more,
    )  # fmt: skip


_PLOTS = "plots only, no table"
CLAIMS = (
    _claim(
        "over-memoryless", "trmrl", "memoryless", metric="above_floor", flagship=True, margin=0.4,
        source="Section 5, Figures 4 and 5",
        statement="Within its first episode TrMRL infers the task: its S is 0.4 above that of PPO without a memory, "
        "which counts as 0 where it is below",
        paper="adapts within about 20 steps of the first episode; memoryless PPO is not in the paper",
    ),
    _claim(
        "task-inference", "trmrl", None, margin=0.6, source="Section 5, Figures 4 and 5",
        statement="In its first episode TrMRL has at least 60 % of what knowing the task is worth (S)",
        paper="adapts within about 20 steps of the first episode; " + _PLOTS,
    ),
    _claim(
        "over-rl2", "trmrl", "rl2", margin=0.0, source="Section 5, Figure 5",
        statement="In the first episode TrMRL is above RL² with a GRU",
        paper="best or on par from the first episode on; " + _PLOTS,
    ),
    _claim(
        "over-maml-adapted", "trmrl", "maml", metric="episode_3", margin=0.0, source="Section 5, Figure 5",
        statement="TrMRL is above MAML-TRPO after its inner step on two episodes, too (episode 3)",
        paper="above MAML-TRPO over six episodes; " + _PLOTS,
    ),
    _claim(
        "over-pearl-adapted", "trmrl", "pearl", metric="episode_3", margin=0.0, source="Section 5, Figure 5",
        statement="TrMRL is above PEARL after its adaptation to two episodes (episode 3)",
        paper="true on two of three sets, PEARL overtakes on HalfCheetahDir; " + _PLOTS,
    ),
    _claim(
        "ood-over-rl2", "trmrl", "rl2", metric="ood_episode_1", margin=0.0,
        source="Section 5, out-of-distribution tasks",
        statement="On tasks just out of the training distribution (the arcs beside it) TrMRL is above RL²",
        paper="TrMRL above RL² for target velocities in [3, 4]; " + _PLOTS,
    ),
    _claim(
        "ood-over-pearl", "trmrl", "pearl", metric="ood_episode_3", margin=0.0,
        source="Section 5, out-of-distribution tasks",
        statement="On tasks just out of the training distribution TrMRL is above PEARL, adapted to two episodes",
        paper="PEARL, best in distribution, fails for target velocities in [3, 4]; " + _PLOTS,
    ),
    _claim(
        "needs-reward", "k-5", "no-reward", margin=0.3, source="Section 4, working memories",
        statement="The reward in a working memory is what the task is inferred from: without it S is 0.3 lower",
        paper="working memories hold reward; not ablated",
    ),
    _claim(
        "two-over-one", "k-2", "k-1", margin=0.1, source="Section 5, ablation of the window",
        statement="Two transitions tell more than one: K = 2 is 0.1 above K = 1 (S; one distance leaves two goals)",
        paper="longer windows are better up to a point; " + _PLOTS,
    ),
    _claim(
        "five-over-two", "k-5", "k-2", margin=0.0, source="Section 5, ablation of the window",
        statement="K = 5 is above K = 2", paper="longer windows are better up to a point; " + _PLOTS,
    ),
    _claim(
        "deep-tfixup", "tfixup-8", None, version=1, margin=0.3, source="Section 5, ablation of T-Fixup",
        statement="Eight layers without LayerNorm learn to infer the task with T-Fixup: S is at least 0.3",
        paper="T-Fixup makes training stable without LayerNorm and warm-up; " + _PLOTS,
    ),
    _claim(
        "deep-over-xavier", "tfixup-8", "xavier-8", version=1, margin=0.2, source="Section 5, ablation of T-Fixup",
        statement="With T-Fixup eight layers are 0.2 above those with plain Xavier (S)",
        paper="without T-Fixup training is unstable or worse; " + _PLOTS,
    ),
    _claim(
        "deep-over-layernorm", "tfixup-8", "layernorm-8", version=1, margin=0.0,
        source="Section 4.4 and 5, ablation of T-Fixup",
        statement="With T-Fixup eight layers are above those with LayerNorm after each sum",
        paper="transformers with LayerNorm are hard to train in reinforcement learning; " + _PLOTS,
    ),
    _growth(
        "tfixup-growth", "tfixup", metric="worst", margin=1.125, tolerance=0.125, source="Section 4.4",
        statement="With T-Fixup memories keep their norm at depths of 2 to 32 without LayerNorm: growth in [1, 1.25]",
        paper="not stated", flagship=True,
    ),
    _growth(
        "xavier-growth", "xavier", metric="growth_16", margin=100.0, source="Section 4.4",
        statement="With plain Xavier they grow more than a hundredfold over 16 layers", paper="not stated",
        flagship=True,
    ),
    Claim(
        name="consensus-risk", version=1, measure=measure_risk, seeds=5, source="Theorem on Minimum Bayes Risk",
        arms={"small": {"random": Config()}, "paper": {"random": Config()}}, treatment="random", baseline=None,
        compare="value",
        metric="least_gap", margin=0.0, statement="Attention's consensus has at most the Minimum Bayes Risk's risk",
        paper="a theorem", tuning={"random": 0}, also=("mean_gap",),
    ),
)  # fmt: skip


def plot(folder: Path, scale: str) -> None:
    """Beside the effects: S by arm and seed, returns in training, windows, depths."""
    import json

    import numpy as np
    from metazoo.runfolder import config_to_dict

    from trmrl import plots

    by_name = {claim.name: claim for claim in CLAIMS if scale in claim.arms}
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        claim = by_name.get(cell["claim"])
        if claim is None or cell["scale"] != scale or cell["version"] != claim.version or cell["seed"] >= claim.seeds:
            continue
        arm = claim.arms[scale].get(cell["arm"])
        if arm is not None and config_to_dict(arm) == cell["config"]:
            cells.setdefault(cell["arm"], {})[cell["seed"]] = cell["metrics"]

    def values(metric: str, *arms: str) -> dict[str, list[Any]]:
        """Of each arm, by seed."""
        return {arm: [row[metric] for _, row in sorted(cells[arm].items())] for arm in arms if arm in cells}

    label = "S in the first episode"
    levels = {"oracle": 1.0, "best memoryless": 0.0}
    if found := values("episode_1", *LEARNERS):
        plots.by_arm(found, folder / f"{scale}-first-episode.png", label, levels)
        plots.by_arm(values("episode_3", *LEARNERS), folder / f"{scale}-adapted.png", "S in the third episode", levels)
        plots.by_arm(
            values("ood_episode_3", *LEARNERS), folder / f"{scale}-ood.png",
            "S in the third episode,\nout of distribution", levels,
        )  # fmt: skip
    trained = values("curve", *LEARNERS)
    if trained:
        steps = {arm: _ARMS[scale][arm].steps for arm in trained}
        plots.curves(
            {arm: np.array(held) for arm, held in trained.items()},
            {arm: steps[arm] * np.arange(1, len(held[0]) + 1) for arm, held in trained.items()},
            folder / f"{scale}-training.png", ("environment steps", "return of the first episode, with exploration"),
        )  # fmt: skip
    for name, arms in (("window", WINDOWS), ("depth", DEEP)):
        if found := values("episode_1", *arms):
            plots.by_arm(found, folder / f"{scale}-{name}.png", label, levels)
    growth = {arm: [np.mean(values(f"growth_{n}", arm)[arm]) for n in DEPTHS] for arm in _GROWTH_ARMS if arm in cells}
    if growth:
        plots.depths(growth, folder / f"{scale}-growth.png")
