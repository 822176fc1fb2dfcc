"""Learning rates of the claims' arms: as many trials for each, at seed 100, away from every test.

A trial trains without a fifth of the training sentences and is scored on them: macro-F1 over the label words of
training (no novel word, no test sentence, no second domain). `python tuning.py [GROUP …] [--jobs N] [--output FILE]`;
trials that FILE holds are not repeated, and results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from flipped_learning import data
from flipped_learning.claims import CLAIMS
from flipped_learning.config import Config
from flipped_learning.data import Data
from flipped_learning.evaluate import pair_scores, seen_pairs
from flipped_learning.train import FlippedLearner, Run
from joblib import Parallel, delayed
from tqdm import tqdm

SEED, LIMIT = 100, 300
GROUPS: dict[str, dict[str, Any]] = {
    "bag": {
        "rates": (2e-3, 5e-3, 1e-2),
        "arms": {"novel-labels": ("flipped", "direct-tied", "direct-untied"), "unlikelihood": ("channel",)},
    },
    "t5": {
        "rates": (1e-3, 2e-3, 4e-3),
        "arms": {"t5-novel-labels": ("flipped", "direct-tied", "direct-untied", "channel")},
    },
}


def held_out(source: Data) -> Data:
    """A fifth of the training sentences as test; the sets' own tests are left out."""
    (task,) = source.tasks
    cut = len(task.train) * 4 // 5
    return Data((replace(task, train=task.train[:cut], test=task.train[cut:]),), (), source.corpus)


def trial(config: Config) -> dict[str, float]:
    """Macro-F1 on held-out sentences, and seconds; no score if it diverged."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    config = replace(config, seed=SEED)
    source = held_out(data.load(config))
    torch.manual_seed(SEED)
    learner = FlippedLearner(config, source, Accelerator(cpu=True))
    for step in range(config.steps):
        row = learner.step(step)
        if not bool(torch.isfinite(row["loss"])):
            return {"seconds": round(time.perf_counter() - start, 1)}
    run = Run(Path(), config, learner.model.eval(), learner.collator, source, [])
    limit = None if config.model == "bag" else LIMIT
    scores = pair_scores(run, source.tasks[0], seen_pairs(config), limit, progress=False)
    return {"macro_f1": float(np.mean(list(scores.values()))), "seconds": round(time.perf_counter() - start, 1)}


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
                for lr in GROUPS[group]["rates"]:
                    if lr not in [t["lr"] for t in done]:
                        calls.append((group, arm, lr, replace(config, lr=lr, zero_shot=())))
    runs = Parallel(n_jobs=jobs, return_as="generator")(delayed(trial)(config) for *_, config in calls)
    progress = tqdm(runs, desc="tuning", total=len(calls), disable=None)
    for (group, arm, lr, _), result in zip(calls, progress, strict=True):
        found[group][arm]["trials"].append({"lr": lr, **result})
    for arms in found.values():
        for row in arms.values():
            row["trials"].sort(key=lambda t: t["lr"])
            row["best"] = max((t for t in row["trials"] if "macro_f1" in t), key=lambda t: t["macro_f1"])
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
