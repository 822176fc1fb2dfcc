"""Learning rates of the claims' arms: as many trials for each, at seed 100, on examples held out of the training set.

An arm's best trial is the one whose final network (compressed and fine-tuned; of an MLP the network itself) has the
best score on the held-out examples. The test set is not touched, and seed 100 is not among the measured ones.
`python tuning.py [GROUP …] [--jobs N] [--output FILE]`; results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from joblib import Parallel, delayed
from metacluster import data
from metacluster.claims import CLAIMS
from metacluster.config import Config
from metacluster.evaluate import score
from metacluster.train import MetaClusterLearner
from tqdm import tqdm

SEED = 100
META = {"lr": (3e-3, 1e-2), "embedding_lr": (3e-2, 1e-1), "finetune_lr": (3e-3, 1e-2)}
DIRECT = {"lr": (1e-3, 3e-3, 1e-2, 3e-2), "finetune_lr": (3e-3, 1e-2)}
GROUPS: dict[str, dict[str, Any]] = {
    "digits": {
        "train": 6400,
        "validate": 1600,
        "arms": {
            "metacluster": ("better-than-naive", "metacluster", META),
            "naive": ("better-than-naive", "naive", DIRECT),
            "mlp": ("better-than-naive", "mlp", {"lr": (5e-4, 1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2)}),
            "d2": ("embedding-2-over-4", "d2", META),
            "d4": ("embedding-2-over-4", "d4", META),
            "d8": ("embedding-1-over-2", "d8", META),
        },
    },
    "symmetric": {
        "train": 16_000,
        "validate": 4_000,
        "arms": {
            "metacluster": (
                "equation-symmetric",
                "metacluster",
                {"lr": (1e-3, 3e-3), "embedding_lr": (1e-2, 1e-1), "finetune_lr": (1e-3, 3e-3)},
            ),
            "naive": ("equation-symmetric", "naive", DIRECT),
        },
    },
    "asymmetric": {
        "train": 16_000,
        "validate": 4_000,
        "arms": {
            "metacluster": (
                "equation-asymmetric",
                "metacluster",
                {"lr": (1e-3, 3e-3), "embedding_lr": (1e-2, 1e-1), "finetune_lr": (1e-3, 3e-3)},
            ),
            "naive": ("equation-asymmetric", "naive", DIRECT),
        },
    },
    "conv": {
        "train": 10_000,
        "validate": 5_000,
        "arms": {
            "metacluster": (
                "conv-no-loss",
                "metacluster",
                {"lr": (3e-4, 1e-3, 3e-3), "embedding_lr": (1e-2, 3e-2)},
            ),
            "naive": ("conv-no-loss", "naive", {"lr": (1e-3, 3e-3, 1e-2), "finetune_lr": (1e-3, 3e-3)}),
        },
    },
}


def trial(config: Config, train: int, validate: int) -> dict[str, float]:
    """Scores on the held-out examples, before and after compression; seconds."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    whole = data.load(replace(config, train_size=None, seed=SEED))
    held_out = slice(train, train + validate)
    dataset = replace(
        whole,
        x_train=whole.x_train[:train],
        y_train=whole.y_train[:train],
        x_test=whole.x_train[held_out],
        y_test=whole.y_train[held_out],
    )
    config = replace(config, train_size=None, seed=SEED)
    learner = MetaClusterLearner(config, dataset, Accelerator(cpu=True))
    for step in range(learner.steps):
        loss = learner.step(step)["loss"]
        if not bool(torch.isfinite(loss)):
            return {"seconds": round(time.perf_counter() - start, 1)}  # diverged: no score
    ((metric, before),) = score(learner.model, config, dataset).items()
    final = before if learner.clustered is None else score(learner.clustered, config, dataset)[metric]
    return {f"{metric}_before": before, metric: final, "seconds": round(time.perf_counter() - start, 1)}


def tune(groups: list[str], jobs: int) -> dict[str, Any]:
    """All trials of the groups, and each arm's best."""
    claims = {claim.name: claim for claim in CLAIMS}
    calls: list[tuple[str, str, dict[str, float], Config]] = []
    for group in groups:
        for arm, (claim, name, grid) in GROUPS[group]["arms"].items():
            config = claims[claim].arms["small"][name]
            assert isinstance(config, Config)
            for values in itertools.product(*grid.values()):
                chosen = dict(zip(grid, values, strict=True))
                calls.append((group, arm, chosen, replace(config, **chosen)))
    runs = Parallel(n_jobs=jobs, return_as="generator")(
        delayed(trial)(config, GROUPS[group]["train"], GROUPS[group]["validate"]) for group, _, _, config in calls
    )
    results = list(tqdm(runs, desc="tuning", total=len(calls), disable=None))
    found: dict[str, Any] = {}
    for (group, arm, chosen, _), result in zip(calls, results, strict=True):
        found.setdefault(group, {}).setdefault(arm, {"trials": []})["trials"].append({**chosen, **result})
    for arms in found.values():
        for row in arms.values():
            scored = [t for t in row["trials"] if "accuracy" in t or "rmse" in t]
            best = max(scored, key=lambda t: t["accuracy"] if "accuracy" in t else -t["rmse"])
            row["best"] = best
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = {"seed": SEED, **tune(options.groups, options.jobs)}
    text = json.dumps(found, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
