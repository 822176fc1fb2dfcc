"""Learning rates of the claims' arms: as many trials for each, at seed 100, away from every meta-test.

A trial is scored on held-out episodes: of generated data fresh ones (no measured seed has them), of Omniglot episodes
of 40 characters that are held out of the 203 for meta-training. The score is the one that the arm is measured by: on
features the mean over the learning curve of accuracy (so that neither its beginning nor its end alone decides), else
accuracy or mean squared error at the end. On sine λ is tuned, too (of OML the start of its inner rate).
`python tuning.py [GROUP …] [--jobs N] [--output FILE]`; trials that FILE holds are not repeated, and
results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from joblib import Parallel, delayed
from mambacl import data
from mambacl.claims import CLAIMS
from mambacl.config import Config
from mambacl.data import ClassEpisodes, Data
from mambacl.evaluate import meta_test
from mambacl.train import MambaCLLearner
from tqdm import tqdm

SEED, HELD_OUT = 100, 40
TUNED = ("lr", "selectivity", "inner_lr")
RATES = [{"lr": lr} for lr in (1e-3, 3e-3, 1e-2)]
GROUPS: dict[str, dict[str, Any]] = {
    "features": {
        "trials": [{"lr": lr} for lr in (3e-3, 1e-2, 3e-2, 1e-1)],
        "arms": {
            "selectivity-final": ("mamba", "plain", "linear", "linear-plain"),
            "longer-streams": ("transformer", "transformer-no-positions", "performer"),
        },
    },
    "sine": {
        "trials": [
            *({"lr": lr, "selectivity": 1.0} for lr in (1e-3, 3e-3, 1e-2)),
            *({"lr": lr, "selectivity": 0.0} for lr in (1e-3, 3e-3)),
        ],
        "oml": [
            *({"lr": lr, "inner_lr": 0.03} for lr in (1e-3, 3e-3, 1e-2)),
            *({"lr": lr, "inner_lr": 0.1} for lr in (1e-3, 3e-3)),
        ],
        "arms": {"sine-recurrent": ("mamba", "transformer", "linear", "performer", "oml")},
    },
    "omniglot": {
        "trials": RATES,
        "arms": {
            "omniglot-linear": (
                "mamba", "mamba-plain", "prototype", "gemcl", "transformer", "linear", "performer", "oml", "offline",
            ),
        },
    },
}  # fmt: skip


def held_out(source: Data, config: Config) -> Data:
    """Classes of meta-training only: the last 40 of them as meta-test. Generated sources as they are."""
    episodes = source.train
    if not isinstance(episodes, ClassEpisodes):
        return source
    x, y, setting = episodes.x, episodes.y, episodes.setting
    ids = y.unique()
    last = torch.isin(y, ids[-HELD_OUT:])
    return Data(source.name, ClassEpisodes(x[~last], y[~last], setting), ClassEpisodes(x[last], y[last], setting))


def trial(config: Config) -> dict[str, float]:
    """Score on held-out episodes, and seconds; no score if it diverged."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    config = replace(config, seed=SEED)
    source = held_out(data.load(config), config)
    learner = MambaCLLearner(config, source, Accelerator(cpu=True), log_every=config.eval_every or 10**9)
    curve = []
    for step in range(learner.steps):
        row = learner.step(step)
        if not bool(torch.isfinite(row["loss"])):
            return {"seconds": round(time.perf_counter() - start, 1)}
        curve += [row["meta_test_accuracy"]] if "meta_test_accuracy" in row else []
    score = meta_test(learner.model, source.test, learner.setting, config.eval_episodes, seed=SEED)
    found = {score.metric: score.mean, "seconds": round(time.perf_counter() - start, 1)}
    return {"curve": sum(curve) / len(curve), **found} if curve else found


def best(trials: list[dict[str, float]]) -> dict[str, float]:
    """The trial with the best score."""
    scored = [t for t in trials if "accuracy" in t or "mse" in t]
    return max(scored, key=lambda t: t.get("curve", t.get("accuracy", -t.get("mse", 0.0))))


def tune(groups: list[str], jobs: int, known: dict[str, Any]) -> dict[str, Any]:
    """All trials of the groups that are not ``known`` yet, and each arm's best."""
    measured = {claim.name: claim.arms["small"] for claim in CLAIMS}
    found: dict[str, Any] = {group: {arm: dict(row) for arm, row in known.get(group, {}).items()} for group in GROUPS}
    calls = []
    for group in groups:
        for claim, arms in GROUPS[group]["arms"].items():
            for arm in arms:
                config = measured[claim][arm]
                assert isinstance(config, Config)
                done = found[group].setdefault(arm, {"trials": []})["trials"]
                for chosen in GROUPS[group].get(arm, GROUPS[group]["trials"]):
                    if chosen not in [{name: t[name] for name in TUNED if name in t} for t in done]:
                        calls.append((group, arm, chosen, replace(config, **chosen)))
    runs = Parallel(n_jobs=jobs, return_as="generator")(delayed(trial)(config) for *_, config in calls)
    progress = tqdm(runs, desc="tuning", total=len(calls), disable=None)
    for (group, arm, chosen, _), result in zip(calls, progress, strict=True):
        found[group][arm]["trials"].append({**chosen, **result})
    for arms in found.values():
        for row in arms.values():
            row["best"] = best(row["trials"])
    return {group: arms for group, arms in found.items() if arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    kept = json.loads(options.output.read_text(encoding="utf-8")) if options.output and options.output.exists() else {}
    found = {"seed": SEED, **tune(options.groups, options.jobs, kept)}
    text = json.dumps(found, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
