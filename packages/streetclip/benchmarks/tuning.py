"""Rate and steps of each trained arm on synthetic captions, at seeds 100 and 101, that is on other worlds.

The same trials for each arm; the first phase, on generic captions, is one for all and is not tuned here. Scored by the
country on test photos of those worlds, the mean over seen cities, unseen cities and unseen countries (of the label head
on seen and unseen cities, as it cannot name a country that it was not trained on). `python tuning.py [--jobs N]
[--output FILE]`; results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from metazoo.options import RunOptions
from streetclip import evaluate, plots, train
from streetclip.claims import GROUPS, arms_of
from streetclip.config import PRESETS, Config, EvaluateOptions

SEEDS = (100, 101)
RATES = (3e-4, 1e-3, 3e-3)
STEPS = (100, 200)


def run(config: Config, weights: dict[str, torch.Tensor] | None) -> train.Run:
    """Train; from these weights of the first phase, if there are any."""
    load_model = train.load_model

    def started(of: Config) -> Any:
        clip = load_model(of)
        if weights is not None:
            clip.load_state_dict(weights)
        return clip

    train.load_model = started
    try:
        with tempfile.TemporaryDirectory() as scratch:
            options = RunOptions(output_dir=Path(scratch) / "run", log_every=10**6, checkpoint_every=10**9)
            return train.train(config, options)
    finally:
        train.load_model = load_model


def score(found: train.Run) -> dict[str, float]:
    values = {}
    for name, photos in found.data.tests.items():
        features = evaluate.encode(found.clip, photos)
        if found.head is not None:
            one = evaluate.score_head(found.head, features, photos, found.data.gazetteer)
        else:
            locator = evaluate.geolocator_of(found, found.data.gazetteer, EvaluateOptions())
            one = evaluate.score(locator, features, photos)
        values[name] = one.summary["country_top1"]
    groups = GROUPS[:2] if found.head is not None else GROUPS
    return {**values, "score": float(np.mean([values[name] for name in groups]))}


def trials(seed: int) -> list[dict[str, Any]]:
    """Of all arms on one world, which share their first phase."""
    torch.set_num_threads(1)
    plots.training = lambda rows, path: None
    base = replace(PRESETS["small"], seed=seed)
    first = run(replace(base, method="clip"), None)
    weights = {name: value.clone() for name, value in first.clip.state_dict().items()}
    rows = [{"arm": "clip", "seed": seed, **score(first)}]
    print(rows[-1], flush=True)
    for arm, config in arms_of(base).items():
        if config.method == "clip":
            continue
        for lr in RATES:
            for steps in STEPS:
                found = run(replace(config, generic_steps=0, lr=lr, steps=steps), weights)
                rows.append({"arm": arm, "seed": seed, "lr": lr, "steps": steps, **score(found)})
                print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning.json"))
    args = parser.parse_args()
    rows = [row for of in Parallel(n_jobs=args.jobs)(delayed(trials)(seed) for seed in SEEDS) for row in of]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
