"""How the flagship's effect hangs on the learning rate: FLIPPED and DIRECT (tied) at each rate that was tried, seeds 0
to 4, on the test sentences. Nothing is chosen by it. `python tuning_rates.py [--jobs N] [--output FILE]`.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from flipped_learning.claims import CLAIMS, measure
from joblib import Parallel, delayed

RATES, SEEDS = (2e-3, 5e-3, 1e-2), range(5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    arms = next(claim for claim in CLAIMS if claim.flagship).arms["small"]
    calls = [(arm, lr, seed) for arm in ("flipped", "direct-tied") for lr in RATES for seed in SEEDS]
    runs = Parallel(n_jobs=options.jobs)(delayed(measure)(replace(arms[arm], lr=lr), seed) for arm, lr, seed in calls)
    rows = []
    for arm in ("flipped", "direct-tied"):
        for lr in RATES:
            of = [run for (a, rate, _), run in zip(calls, runs, strict=True) if (a, rate) == (arm, lr)]
            means = {name: float(np.mean([run[name] for run in of])) for name in ("seen_f1", "novel_f1")}
            rows.append({"arm": arm, "lr": lr, **means, "by_seed": [run["novel_f1"] for run in of]})
    text = json.dumps(rows, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
