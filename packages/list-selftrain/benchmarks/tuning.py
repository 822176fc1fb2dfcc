"""Learning rates of the claims' arms on Subj: as many trials for each, away from every test.

A trial takes 30 labelled sentences of Subj and 1,000 to be scored on from what is the claims' unlabelled part: no
split's labelled examples and no test. Groups: minilm and scratch (the teacher's rate), minilm-sessions (a session's
rate, after the teacher's has been settled). `python tuning.py [GROUP …] [--jobs N] [--output FILE]`; trials that FILE
holds are not repeated, and results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass, replace
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

LABELLED, SCORED = 30, 1000
LOW, MIDDLE, HIGH = (3e-5, 1e-4, 3e-4), (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Group:
    """Arms of a claim, the rate that is tuned, its values for each arm, and seeds."""

    claim: str
    field: str
    rates: dict[str, tuple[float, ...]]
    seeds: tuple[int, ...]


_PARTS = ("adapter", "houlsby", "lora", "bias", "feedforward", "attention", "embedding", "head")
GROUPS = {
    "minilm": Group(
        "adapter-parity",
        "teacher_lr",
        {"prompt-adapter": HIGH, "prompt-full": LOW, "classic-full": LOW},
        (100, 101),
    ),
    "minilm-sessions": Group("list-over-prompt", "lr", {"list": HIGH, "prompt-st": HIGH}, (100,)),
    "scratch": Group(
        "adapter-parity-scratch",
        "teacher_lr",
        {**{f"prompt-{part}": HIGH for part in _PARTS}, "prompt-full": MIDDLE, "classic-full": MIDDLE},
        (100, 101, 102),
    ),
}


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


def trial(config: Config, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Accuracy on the scored examples at each seed, and seconds; no score if it diverged."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    values = []
    for seed in seeds:
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
    for name in groups:
        group = GROUPS[name]
        for arm, rates in group.rates.items():
            config = measured[group.claim][arm]
            assert isinstance(config, Config)
            done = found.setdefault(name, {}).setdefault(arm, {"seeds": group.seeds, "trials": []})["trials"]
            calls += [
                (name, arm, rate, replace(config, **{group.field: rate}))
                for rate in rates
                if rate not in [one["rate"] for one in done]
            ]
    work = Parallel(n_jobs=jobs, return_as="generator_unordered")(delayed(_keyed)(call) for call in calls)
    for name, arm, rate, row in tqdm(work, total=len(calls), disable=None):
        entry = found[name][arm]
        entry["trials"] = sorted([*entry["trials"], {"rate": rate, **row}], key=lambda one: one["rate"])
        scored = [one for one in entry["trials"] if "accuracy" in one]
        if scored:
            entry["best"] = max(scored, key=lambda one: one["accuracy"])["rate"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    return found


def _keyed(call: tuple[str, str, float, Config]) -> tuple[str, str, float, dict[str, Any]]:
    name, arm, rate, config = call
    return name, arm, rate, trial(config, GROUPS[name].seeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", default=list(GROUPS), help=", ".join(GROUPS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning.json"))
    args = parser.parse_args()
    found = tune(args.groups, args.jobs, args.output)
    for name, arms in found.items():
        for arm, entry in arms.items():
            values = ", ".join(f"{one['rate']:g}: {one.get('accuracy', float('nan')):.1f}" for one in entry["trials"])
            print(f"{name} {arm}: best {entry.get('best')} ({values})")


if __name__ == "__main__":
    main()
