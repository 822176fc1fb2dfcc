"""Inner and outer rates of each trained arm of the claims on real data, on the dev part, at seed 100.

The same number of trials for each arm of a set: MAML-like arms try pairs of inner and outer rates, fine-tuning as many
outer ones. `python tuning.py SET [--jobs N] [--output FILE]` with SET stsb, xquad-r or minilm;
results/bench/tuning.json holds what it gave, set by set. With --edge some more where the best lay at an edge.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from joblib import Parallel, delayed
from maml_align import evaluate
from maml_align.claims import arms_of
from maml_align.config import PRESETS, Config
from maml_align.train import train
from metazoo.options import RunOptions

SEED = 100
META = {
    "stsb": [(a, b) for a in (0.3, 1.0, 3.0) for b in (1e-2, 3e-2, 1e-1)],
    "xquad-r": [(a, b) for a in (1.0, 3.0) for b in (1e-2, 3e-2)],
    "minilm": [(0.1, b) for b in (1e-4, 3e-4)],
}
FINE = {
    "stsb": (1e-3, 2e-3, 3e-3, 5e-3, 1e-2, 2e-2, 3e-2, 5e-2, 1e-1),
    "xquad-r": (3e-3, 1e-2, 3e-2, 1e-1),
    "minilm": (1e-4, 3e-4),
}
ARMS = ("t-maml", "s-maml", "maml-align", "fine-tune", "fine-tune-all")
SKIPPED = {"minilm": ("s-maml", "fine-tune-all"), "xquad-r": ("s-maml",)}
# where the best lay at the least outer rate: T-MAML on stsb, all arms on xquad-r
EDGE = {
    "stsb": [("t-maml", a, 3e-3) for a in (0.3, 1.0, 3.0)],
    "xquad-r": [(arm, a, 3e-3) for arm in ("t-maml", "maml-align") for a in (1.0, 3.0)]
    + [(arm, 1.0, b) for arm in ("fine-tune", "fine-tune-all") for b in (1e-3, 2e-3)],
}
METRIC = {"stsb": "cross_seen", "xquad-r": "map", "minilm": "cross_seen"}


def trial(name: str, arm: str, config: Config) -> dict[str, Any]:
    """The dev part's score of an arm with these rates."""
    torch.set_num_threads(1)
    config = replace(config, seed=SEED, unseen=())
    with tempfile.TemporaryDirectory() as scratch:
        options = RunOptions(output_dir=Path(scratch) / "run", log_every=10**6, checkpoint_every=10**9)
        try:
            run = train(config, options)
        except Exception as error:
            return {"arm": arm, "inner_lr": config.inner_lr, "outer_lr": config.outer_lr, "failed": str(error)[:200]}
        found, _ = evaluate.score(run.encoder, run.data.dev.head(config.max_test), config)  # type: ignore[arg-type]
    return {"arm": arm, "inner_lr": config.inner_lr, "outer_lr": config.outer_lr, METRIC[name]: found[METRIC[name]]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=sorted(META))
    parser.add_argument("--edge", action="store_true", help="the trials beyond the edge of the grid alone")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("results/bench/tuning.json"))
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    arms = arms_of(PRESETS[args.set])
    calls = []
    if args.edge:
        calls = [(args.set, arm, replace(arms[arm], inner_lr=a, outer_lr=b)) for arm, a, b in EDGE[args.set]]
    for arm in () if args.edge else ARMS:
        if arm in SKIPPED.get(args.set, ()):
            continue
        rates = META[args.set] if "maml" in arm else [(arms[arm].inner_lr, rate) for rate in FINE[args.set]]
        calls += [(args.set, arm, replace(arms[arm], inner_lr=a, outer_lr=b)) for a, b in rates]
    rows = Parallel(n_jobs=args.jobs, return_as="generator")(delayed(trial)(*call) for call in calls)
    kept = []
    for row in rows:
        kept.append(row)
        print(row, flush=True)
    held = json.loads(args.output.read_text()) if args.output.exists() else {}
    held[args.set] = held.get(args.set, []) + kept if args.edge else kept
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(held, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
