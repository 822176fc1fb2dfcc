"""Rates of each learner on the point robot, at a seed from 100 on, on goals drawn for it; test goals are not looked at.

Three trials an arm: the rate of the policy (PPO: with the value's), of the inner step (maml), of all parts (pearl).
The score is S of the first episode, of maml and pearl of their best later one; of rates within 0.02 of the best the
smallest is taken. `python tuning.py [ARM …] [--jobs N] [--output FILE]`; results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from joblib import Parallel, delayed
from trmrl import claims, references
from trmrl.config import PRESETS, Config
from trmrl.env import make_vector
from trmrl.evaluate import evaluate_adaptation
from trmrl.train import learner_of

SEED = 100
RATES = {
    "trmrl": (3e-4, 5e-4, 1e-3),
    "rl2": (3e-4, 1e-3, 3e-3),
    "varibad": (3e-4, 1e-3, 3e-3),
    "pearl": (3e-4, 1e-3, 3e-3),
    "maml": (0.03, 0.1, 0.3),
}
LATER = ("pearl", "maml")


def with_rate(arm: str, config: Config, rate: float) -> Config:
    """The config of an arm at a rate."""
    if arm == "pearl":
        return replace(config, sac_lr=rate)
    if arm == "maml":
        return replace(config, inner_lr=rate)
    return replace(config, lr=rate, value_lr=rate)


def trial(arm: str, config: Config, rate: float) -> dict[str, Any]:
    """One training, and its score on 64 drawn goals."""
    torch.set_num_threads(1)
    learner: Any = learner_of(replace(config, seed=SEED), Accelerator(cpu=True))
    for step in range(config.updates):
        learner.step(step)
    env = make_vector(config.env, 64)
    found = evaluate_adaptation(learner.agent, env, episodes=4, horizon=config.horizon, split="train", seed=SEED)
    scores = [references.score(float(value), config.horizon) for value in found.returns.mean(0)]
    value = max(scores[1:]) if arm in LATER else scores[0]
    row = {"arm": arm, "seed": SEED, "rate": rate, "score": value, "by_episode": scores}
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--rates", type=float, nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning.json"))
    args = parser.parse_args()
    arms = claims.arms_of(PRESETS["small"])
    asked = [(arm, rate) for arm in args.arms or RATES for rate in args.rates or RATES[arm]]
    rows = Parallel(n_jobs=args.jobs)(delayed(trial)(arm, with_rate(arm, arms[arm], rate), rate) for arm, rate in asked)
    chosen = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        held = [row for row in rows if row["arm"] == arm]
        top = max(row["score"] for row in held)
        chosen[arm] = min(row["rate"] for row in held if row["score"] >= top - 0.02)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"trials": rows, "chosen": chosen}, indent=2) + "\n", encoding="utf-8")
    print(chosen)


if __name__ == "__main__":
    main()
