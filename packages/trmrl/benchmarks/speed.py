"""Environment steps a second in collection, and seconds of an update, beside sb3-contrib's RecurrentPPO.

`python speed.py [PART …] [--threads N] [--rounds N] [--output FILE]` with parts

- collect: HalfCheetahVel, 20 environments: stepping alone (gymnasium's SyncVectorEnv, ours), our collection with a
  random policy, with the transformer (paper's size, medium's, small's), and RecurrentPPO's (LSTM of 256, its default).
- update: 8,000 steps x 10 passes: ours of each size (policy and value), RecurrentPPO's with the same minibatch.

RecurrentPPO sees what RL² sees (our RL2Wrapper), one of its episodes being a trial. Each part goes in turn, `rounds`
times; medians and spreads are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from accelerate import Accelerator
from gymnasium.vector import SyncVectorEnv
from metazoo import environment
from trmrl.collect import collect, standard_normal, starts
from trmrl.config import PRESETS, Config
from trmrl.env import RL2Wrapper, make, make_vector
from trmrl.model import TrMRLPolicy
from trmrl.ppo import PPOLearner

ENV, COUNT, HORIZON = "trmrl/HalfCheetahVel-v5", 20, 200
STEPS = 100  # vector steps that are timed
SIZES = {name: PRESETS[name] for name in ("paper", "medium", "small")}


class Trial(gym.Wrapper):
    """A trial of two episodes of a task drawn at its start, as one episode of 400 steps."""

    def reset(self, **kwargs: Any) -> tuple[np.ndarray, dict[str, Any]]:
        rng = np.random.default_rng(kwargs.get("seed"))
        self.env.unwrapped.set_task(self.env.unwrapped.sample_tasks(1, rng, "train")[0])
        self.done = 0
        return self.env.reset(**kwargs)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, Any, bool, bool, dict[str, Any]]:
        found, reward, terminated, _, info = self.env.step(action)
        self.done += 1
        if self.done == HORIZON:
            found, _ = self.env.reset()
        return found, reward, terminated, self.done == 2 * HORIZON, info


def policy_of(config: Config) -> TrMRLPolicy:
    """A transformer of a preset's size for HalfCheetahVel."""
    torch.manual_seed(0)
    return TrMRLPolicy(
        20, 6, window=config.window, d_model=config.d_model, heads=config.heads, layers=config.layers, d_ff=config.d_ff
    )


def per_second(function: Callable[[], int]) -> float:
    """Steps a second of what does some and says how many."""
    started = time.perf_counter()
    steps = function()
    return steps / (time.perf_counter() - started)


def recurrent_ppo() -> Any:
    """sb3-contrib's learner on trials, 20 environments, an update of 8,000 steps."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.logger import Logger
    from stable_baselines3.common.vec_env import DummyVecEnv

    venv = DummyVecEnv([lambda: Trial(RL2Wrapper(make(ENV))) for _ in range(COUNT)])
    model = RecurrentPPO("MlpLstmPolicy", venv, n_steps=400, batch_size=256, n_epochs=10, seed=0, device="cpu")
    model.set_logger(Logger(None, []))
    _, callback = model._setup_learn(10**9, None)
    return model, venv, callback


def collection(threads: int) -> dict[str, Callable[[], int]]:
    """What is timed: each does STEPS vector steps of 20 environments."""
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (STEPS, COUNT, 6))
    sync = SyncVectorEnv([lambda: make(ENV).unwrapped for _ in range(COUNT)])
    ours = make_vector(ENV, COUNT, threads)
    tasks = ours.sample_tasks(COUNT, rng, "train")

    def stepping(env: Any) -> int:
        env.reset(seed=list(range(COUNT)))
        for action in actions:
            env.step(action)
        return STEPS * COUNT

    def collecting(policy: TrMRLPolicy) -> int:
        collect(
            policy, ours, tasks, episodes=1, horizon=STEPS, seeds=starts(0, episodes=1, count=COUNT),
            noise=standard_normal(0, shape=(1, STEPS, COUNT, 6)),
        )  # fmt: skip
        return STEPS * COUNT

    model, venv, callback = recurrent_ppo()

    def theirs() -> int:
        model.rollout_buffer.buffer_size = STEPS
        model.rollout_buffer.reset()
        model.collect_rollouts(venv, callback, model.rollout_buffer, n_rollout_steps=STEPS)
        return STEPS * COUNT

    return {
        "gymnasium's SyncVectorEnv alone": lambda: stepping(sync),
        "our vector environment alone": lambda: stepping(ours),
        **{f"trmrl, {name}": functools.partial(collecting, policy_of(config)) for name, config in SIZES.items()},
        "RecurrentPPO": theirs,
    }


def updates(threads: int) -> dict[str, Callable[[], int]]:
    """What is timed: an update on 8,000 steps that are there already, 10 passes."""
    found: dict[str, Callable[[], int]] = {}
    for name, config in SIZES.items():
        shape = replace(
            PRESETS["paper"], d_model=config.d_model, heads=config.heads, layers=config.layers, d_ff=config.d_ff,
            threads=threads,
        )  # fmt: skip
        learner = PPOLearner(shape, Accelerator(cpu=True))
        trials = learner.collect(0)
        learner.collect = lambda step, trials=trials: trials  # type: ignore[method-assign]
        found[f"trmrl, {name}"] = functools.partial(_update, learner)
    model, venv, callback = recurrent_ppo()
    model.collect_rollouts(venv, callback, model.rollout_buffer, n_rollout_steps=400)

    def theirs() -> int:
        model.train()
        return 400 * COUNT

    found["RecurrentPPO"] = theirs
    return found


def _update(learner: PPOLearner) -> int:
    learner.step(0)
    return learner.config.steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["collect", "update"])
    parser.add_argument("--threads", type=int, default=1, help="of torch and of MuJoCo")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.filterwarnings("ignore")
    result: dict[str, Any] = {"environment": environment.describe(), "threads": args.threads, "rounds": args.rounds}
    for part in args.parts:
        timed = collection(args.threads) if part == "collect" else updates(args.threads)
        rounds = args.rounds if part == "collect" else max(args.rounds // 2, 1)
        speeds: dict[str, list[float]] = {name: [] for name in timed}
        if part == "collect":
            for function in timed.values():
                function()
        for _ in range(rounds):
            for name, function in timed.items():
                speeds[name].append(per_second(function))
        peer = np.array(speeds["RecurrentPPO"])
        alone = np.array(speeds.get("gymnasium's SyncVectorEnv alone", peer))
        result[part] = {}
        for name, held in speeds.items():
            of_peer = np.array(held) / peer
            row = {
                "steps_per_second": float(np.median(held)), "least": min(held), "most": max(held),
                "times_recurrent_ppo": float(np.median(of_peer)), "times_least": float(of_peer.min()),
                "times_most": float(of_peer.max()),
            }  # fmt: skip
            if part == "collect":
                row["of_stepping_alone"] = float(np.median(np.array(held) / alone))
            result[part][name] = row
            print(part, name, {key: round(value, 3) for key, value in row.items()}, flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
