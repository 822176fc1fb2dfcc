"""Students with and without noise on two Gaussians, by learning rate and batch: gain over the teacher, seeds 100 to
103.

What the claims noisy-student and its like measure hangs on how sure the teacher is and how far a student gets; the grid
says by how much. `python tuning_gaussian.py [--jobs N] [--output FILE]`; results/bench/tuning_gaussian.json holds what
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

SEEDS = range(100, 104)
RATES, BATCHES = (1e-3, 3e-3, 1e-2), (16, 64)


def trial(arm: str, config: Config) -> dict[str, Any]:
    """Means over the seeds: the teacher's accuracy, the gain, and accuracy by session, in percent."""
    torch.set_num_threads(1)
    rows = [measure(config, seed) for seed in SEEDS]
    return {
        "arm": arm,
        "lr": config.lr,
        "unlabelled_batch": config.unlabelled_batch,
        "teacher": float(np.mean([row["teacher_accuracy"] for row in rows])),
        "gain": float(np.mean([row["gain"] for row in rows])),
        "gains": [row["gain"] for row in rows],
        "by_session": np.mean([row["by_session"] for row in rows], axis=0).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning_gaussian.json"))
    args = parser.parse_args()
    arms = next(claim for claim in CLAIMS if claim.name == "noisy-student").arms["small"]
    calls = [
        (arm, replace(config, lr=rate, teacher_lr=rate, unlabelled_batch=batch))
        for arm, config in arms.items()
        if isinstance(config, Config)
        for rate in RATES
        for batch in BATCHES
    ]
    rows = Parallel(n_jobs=args.jobs)(delayed(trial)(*call) for call in calls)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"seeds": list(SEEDS), "trials": rows}, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"{row['arm']:12s} lr {row['lr']:g} batch {row['unlabelled_batch']:3d}: gain {row['gain']:+.2f}")


if __name__ == "__main__":
    main()
