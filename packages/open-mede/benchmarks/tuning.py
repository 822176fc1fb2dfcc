"""Rate of each trained arm on moving sprites, and the inner rate α, at a seed from 100 on, on held-out known classes.

The same trials for each arm: of the 30 known classes six are kept out of training, and stand for novel ones. Scored by
the mean of accuracies on kept and held-out classes, in and out of context; of rates within a point of the best, the
smallest is taken. Then α is chosen alike, at the rate found. `python tuning.py [--jobs N] [--output FILE]`;
results/bench/tuning.json holds what it gave.
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
from open_mede import claims, plots
from open_mede.config import Config

SEED, HOLDOUT = 100, 6
RATES = (1e-3, 3e-3)
ALPHAS = (2e-3, 2e-2, 2e-1)


def trial(arm: str, config: Config) -> dict[str, Any]:
    """One training."""
    torch.set_num_threads(1)
    plots.training = lambda rows, path: None
    plots.gaussian = lambda config, path: None
    found = claims.measure(replace(config, holdout=HOLDOUT), SEED)
    values = {name: found[name] for name in claims.GROUPS}
    row = {
        "arm": arm, "seed": SEED, "lr": config.lr, "alpha": config.alpha if arm == "meta" else None, **values,
        "score": float(np.mean(list(values.values()))), "seconds": found["seconds_of_training"],
    }  # fmt: skip
    print(row, flush=True)
    return row


def best(rows: list[dict[str, Any]], key: str) -> float:
    """The smallest value whose score is within a point of the best."""
    top = max(row["score"] for row in rows)
    return min(float(row[key]) for row in rows if row["score"] >= top - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning.json"))
    args = parser.parse_args()
    arms = claims.sprite_arms()
    asked = [(arm, replace(config, lr=lr)) for arm, config in arms.items() if arm != "frozen" for lr in RATES]
    asked.sort(key=lambda one: one[0] not in ("two-batch", "meta", "interp"))  # the longest first
    rows = Parallel(n_jobs=args.jobs)(delayed(trial)(*one) for one in [("frozen", arms["frozen"]), *asked])
    of_meta = [row for row in rows if row["arm"] == "meta"]
    meta = replace(arms["meta"], lr=best(of_meta, "lr"))
    further = [("meta", replace(meta, alpha=alpha)) for alpha in ALPHAS if alpha != meta.alpha]
    rows += Parallel(n_jobs=args.jobs)(delayed(trial)(*one) for one in further)
    chosen = {
        arm: {"lr": best([row for row in rows if row["arm"] == arm], "lr")} for arm in arms if arm != "frozen"
    }  # fmt: skip
    chosen["meta"] = {
        "lr": meta.lr,
        "alpha": best([row for row in rows if row["arm"] == "meta" and row["lr"] == meta.lr], "alpha"),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"chosen": chosen, "trials": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
