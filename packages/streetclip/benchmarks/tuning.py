"""Rate of each trained arm on synthetic captions, at seeds 100 and 101, that is on other worlds.

The same trials for each arm; the first phase, on generic captions, is one for all and is not tuned. Scored by the
country on test photos of those worlds, the mean over seen cities, unseen cities and unseen countries (of the label
head over the first two, as it cannot name a country that it was not trained on); of rates whose score is within a point
of the best, the smallest is taken; where that is the greatest tried, a greater one is tried, too. `python tuning.py
[--jobs N] [--output FILE]`; results/bench/tuning.json holds what it gave.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from joblib import Parallel, delayed
from streetclip import claims, plots
from streetclip.config import PRESETS

SEEDS = (100, 101)
RATES = (3e-4, 1e-3, 3e-3)


def trials(seed: int) -> list[dict[str, Any]]:
    """Of all arms on one world."""
    torch.set_num_threads(1)
    plots.training = lambda rows, path: None
    rows = []
    for arm, config in claims.arms_of(PRESETS["small"]).items():
        groups = claims.GROUPS[:2] if config.method == "label-head" else claims.GROUPS
        for lr in (config.lr,) if config.method == "clip" else RATES:
            found = claims.measure(replace(config, lr=lr), seed)
            values = {group: found[f"{group}_country_top1"] for group in claims.GROUPS}
            rows.append({
                "arm": arm, "seed": seed, "lr": lr, **values, "score": float(np.mean([values[g] for g in groups])),
                "seen_city_given_country": found.get("seen_city_given_country"),
                "seconds": found["seconds_of_training"],
            })  # fmt: skip
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
