"""Rates of each arm on the point robot, at seeds from 100 on, on goals drawn for it; test goals are not looked at.

Learners have six trials each: four rates, then two more. If the best is at an edge, these are the rate beyond it and
the best again at another seed; else the best two again. Shorter windows and the arm without rewards have three, around
TrMRL's. The rate is that of the policy and the value (PPO), of the inner step (maml), of all parts (pearl). The score
is S of the first episode, of maml and pearl of the third; the rate with the highest mean score is taken.

`python tuning.py [ARM …] [--jobs N] [--output FILE]` adds to results/bench/tuning.json what is not there yet.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from joblib import Parallel, delayed
from trmrl import claims, references
from trmrl.config import Config
from trmrl.env import make_vector
from trmrl.evaluate import evaluate_adaptation
from trmrl.train import learner_of

SEEDS = (100, 101)
RATES: dict[str, tuple[float, ...]] = {
    "trmrl": (3e-4, 5e-4, 1e-3, 2e-3),
    "rl2": (3e-4, 1e-3, 3e-3, 6e-3),
    "memoryless": (3e-4, 1e-3, 3e-3, 6e-3),
    "pearl": (3e-4, 1e-3, 3e-3, 6e-3),
    "maml": (0.05, 0.1, 0.2, 0.4),
    **dict.fromkeys(("no-reward", "k-2", "k-1"), (5e-4, 1e-3, 2e-3)),
}
LATER = ("pearl", "maml")
MAIN = ("trmrl", "rl2", "memoryless", "pearl", "maml")


def names_of(arm: str) -> tuple[str, ...]:
    """What the rate is of."""
    return {"pearl": ("sac_lr",), "maml": ("inner_lr",)}.get(arm, ("lr", "value_lr"))


def trial(arm: str, rate: float, seed: int) -> dict[str, Any]:
    """One training, and its score on 64 drawn goals."""
    torch.set_num_threads(1)
    found: Any = claims._ARMS["small"][arm]
    config: Config = replace(found, seed=seed, **dict.fromkeys(names_of(arm), rate))
    learner: Any = learner_of(config, Accelerator(cpu=True))
    for step in range(config.updates):
        learner.step(step)
    env = make_vector(config.env, 64)
    result = evaluate_adaptation(learner.agent, env, episodes=3, horizon=config.horizon, split="train", seed=seed)
    scores = [references.score(float(value), config.horizon) for value in result.returns.mean(0)]
    row = {"arm": arm, "seed": seed, "rate": rate, "score": scores[2 if arm in LATER else 0], "by_episode": scores}
    print(row, flush=True)
    return row


def second_round(arm: str, rows: list[dict[str, Any]]) -> list[tuple[str, float, int]]:
    """Arm, rate and seed of the trials that follow from the first round's rows."""
    if arm not in MAIN:
        return []
    rates = RATES[arm]
    first = [row for row in rows if row["arm"] == arm and row["seed"] == SEEDS[0] and row["rate"] in rates]
    by_score = [row["rate"] for row in sorted(first, key=lambda row: -row["score"])]
    best = by_score[0]
    if best in (rates[0], rates[-1]):
        return [(arm, best / 2 if best == rates[0] else best * 2, SEEDS[0]), (arm, best, SEEDS[1])]
    return [(arm, rate, SEEDS[1]) for rate in by_score[:2]]


def chosen_of(rows: list[dict[str, Any]]) -> float | None:
    """The rate with the highest mean score."""
    if not rows:
        return None
    scores: dict[float, list[float]] = {}
    for row in rows:
        scores.setdefault(row["rate"], []).append(row["score"])
    return max(scores, key=lambda rate: float(np.mean(scores[rate])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning.json"))
    args = parser.parse_args()
    arms = args.arms or list(RATES)
    rows: list[dict[str, Any]] = json.loads(args.output.read_text())["trials"] if args.output.exists() else []

    def add(asked: list[tuple[str, float, int]]) -> None:
        held = {(row["arm"], row["rate"], row["seed"]) for row in rows}
        rows.extend(Parallel(n_jobs=args.jobs)(delayed(trial)(*one) for one in asked if one not in held))

    add([(arm, rate, SEEDS[0]) for arm in arms for rate in RATES[arm]])
    add([one for arm in arms for one in second_round(arm, rows)])
    chosen = {arm: chosen_of([row for row in rows if row["arm"] == arm]) for arm in RATES}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"trials": rows, "chosen": chosen}, indent=2) + "\n", encoding="utf-8")
    print(chosen)


if __name__ == "__main__":
    main()
