"""Learning rates of the claims' arms on a RoBERTa trained here: as many trials for each, away from every test.

A trial takes 30 labelled sentences of Subj and 1,000 to be scored on from what is the claims' unlabelled part (no
split's labelled examples, no test), at seeds 100 to 102; its value is their mean accuracy. Groups: prompted (the
teacher's rate) and self-training (a session's rate, after the teacher's has been settled). `python tuning.py [GROUP …]
[--jobs N] [--output FILE]`; trials that FILE holds are not repeated, and results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from list_selftrain import data
from list_selftrain.claims import CLAIMS
from list_selftrain.config import Config
from list_selftrain.data import Data
from list_selftrain.train import train_on
from metazoo.errors import UserError
from metazoo.options import RunOptions
from tqdm import tqdm

SEEDS = (100, 101, 102)
LABELLED, SCORED = 30, 1000
RATES = (3e-4, 1e-3, 3e-3)
GROUPS: dict[str, tuple[str, str, tuple[str, ...]]] = {  # claim, field, arms
    "prompted": (
        "adapter-parity",
        "teacher_lr",
        (
            "prompt-adapter", "prompt-full", "classic-full", "prompt-houlsby", "prompt-lora", "prompt-bias",
            "prompt-head",
        ),
    ),
    "self-training": (
        "list-over-prompt",
        "lr",
        ("list", "prompt-st", "confidence", "no-warm-up", "hard-labels", "not-fresh", "meta-st", "ust"),
    ),
}  # fmt: skip


def held_out(config: Config) -> Data:
    """New labelled and scored examples out of the unlabelled part; the test stays unseen."""
    source = data.load(config)
    pool, truth = source.unlabelled, source.unlabelled.labels
    assert truth is not None
    rng = np.random.default_rng([config.seed, 6])
    while True:
        order = rng.permutation(len(pool))
        labelled, scored, rest = np.split(order, [LABELLED, LABELLED + SCORED])
        if len(np.unique(truth[labelled])) == len(source.labels):
            break
    return replace(source, labelled=pool.take(labelled), test=pool.take(scored), unlabelled=pool.take(rest))


def trial(config: Config) -> dict[str, Any]:
    """Accuracy on the scored examples at each seed, and seconds; no score if it diverged."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    values = []
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as scratch:
            options = RunOptions(output_dir=Path(scratch) / "run", checkpoint_every=10**9, log_every=50)
            try:
                run = train_on(replace(config, seed=seed), held_out, options)
            except UserError as error:
                return {"diverged": str(error), "seconds": round(time.perf_counter() - started, 1)}
        values.append(run.sessions[-1]["accuracy"])
    return {"accuracy": float(np.mean(values)), "by_seed": values, "seconds": round(time.perf_counter() - started, 1)}


def tune(groups: list[str], jobs: int, path: Path) -> dict[str, Any]:
    """All trials of the groups that the file does not hold yet, each stored at once, and each arm's best."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    measured = {claim.name: claim.arms["small"] for claim in CLAIMS}
    calls = []
    for group in groups:
        claim, field, arms = GROUPS[group]
        for arm in arms:
            config = measured[claim][arm]
            assert isinstance(config, Config)
            done = found.setdefault(group, {}).setdefault(arm, {"trials": []})["trials"]
            calls += [
                (group, arm, rate, replace(config, dataset="subj", **{field: rate}))
                for rate in RATES
                if rate not in [one[field] for one in done]
            ]
    if calls:  # pre-trains once, before others want it
        train_on(replace(calls[0][3], sessions=0, teacher_epochs=1, seed=SEEDS[0]), held_out, _scratch())
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(_keyed)(call) for call in calls)
    for group, arm, rate, row in tqdm(work, total=len(calls), disable=None):
        entry = found[group][arm]
        entry["trials"] = sorted([*entry["trials"], {GROUPS[group][1]: rate, **row}], key=lambda t: t[GROUPS[group][1]])
        scored = [one for one in entry["trials"] if "accuracy" in one]
        if scored:
            entry["best"] = max(scored, key=lambda one: one["accuracy"])[GROUPS[group][1]]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _scratch() -> RunOptions:
    return RunOptions(output_dir=Path(tempfile.mkdtemp()) / "run", checkpoint_every=10**9)


def _keyed(call: tuple[str, str, float, Config]) -> tuple[str, str, float, dict[str, Any]]:
    group, arm, rate, config = call
    return group, arm, rate, trial(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning.json"))
    args = parser.parse_args()
    found = tune(args.groups, args.jobs, args.output)
    for group, arms in found.items():
        for arm, entry in arms.items():
            values = ", ".join(
                f"{one[GROUPS[group][1]]:g}: {one.get('accuracy', float('nan')):.1f}" for one in entry["trials"]
            )
            print(f"{group} {arm}: best {entry.get('best')} ({values})")


if __name__ == "__main__":
    main()
