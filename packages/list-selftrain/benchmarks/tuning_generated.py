"""Fine-tuning on 30 labels of generated reviews by learning rate, at the claims' own seeds: how much one rate decides.

The claims on generated reviews take one untuned rate for all arms. This is no tuning: it looks at the test and
chooses nothing. `python tuning_generated.py [--jobs N] [--output FILE]`; results/bench/tuning_generated.json holds what
it gave.
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
from list_selftrain.claims import CLAIMS, measure
from list_selftrain.config import Config

RATES = (1e-4, 3e-4, 1e-3, 3e-3)
ARMS = ("prompt-adapter", "prompt-full", "classic-full")


def trial(arm: str, config: Config, seeds: int) -> dict[str, Any]:
    """Accuracy on the test at each seed, and its mean, in percent."""
    torch.set_num_threads(1)
    values = [measure(config, seed)["accuracy"] for seed in range(seeds)]
    return {"arm": arm, "teacher_lr": config.teacher_lr, "accuracy": float(np.mean(values)), "by_seed": values}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning_generated.json"))
    args = parser.parse_args()
    claim = next(claim for claim in CLAIMS if claim.name == "list-over-prompt-generated")
    calls = []
    for arm in ARMS:
        config = claim.arms["small"][arm]
        assert isinstance(config, Config)
        calls += [(arm, replace(config, teacher_lr=rate), claim.seeds) for rate in RATES]
    rows = Parallel(n_jobs=args.jobs)(delayed(trial)(*call) for call in calls)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"trials": rows}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['arm']:15s} {row['teacher_lr']:g}: {row['accuracy']:.1f}")


if __name__ == "__main__":
    main()
