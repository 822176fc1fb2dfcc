"""HalfCheetahVel on two cores: TrMRL, RL², PPO without memory, and an oracle, for as many steps as an hour allows.

`python halfcheetah.py [ARM …] [--updates N] [--seeds S …] [--jobs N] [--output DIR]`. Each arm is trained with the
preset medium for the same number of environment steps, then tried on 20 test tasks, in and out of distribution.
results/bench/medium.json holds numbers and learning curves, results/medium.png the picture. The full size, on a GPU
machine: `trmrl train paper --threads 16 --output-dir runs/paper` (20 million steps, 2,500 updates).

`--tune` gives each arm three short trainings instead, at rates of its own, at seed 100, scored on training tasks drawn
for it; results/bench/medium-tuning.json holds them, and the rates that the trainings then have (else the preset's).
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
from joblib import Parallel, delayed
from metazoo import environment
from metazoo.options import RunOptions
from metazoo.runfolder import config_to_dict
from trmrl import plots
from trmrl.claims import arms_of
from trmrl.config import PRESETS, Config
from trmrl.env import make_vector
from trmrl.evaluate import evaluate_adaptation, settled, summarise
from trmrl.train import learner_of, train

ARMS = ("trmrl", "rl2", "memoryless", "oracle")
RATES = (2.5e-4, 5e-4, 1e-3)
TUNING_SEED = 100


def tuned(output: Path) -> Path:
    """Where trials are kept."""
    return output / "bench" / "medium-tuning.json"


def with_updates(config: Config, updates: int) -> Config:
    """So many, of which the rate falls in the last third."""
    return replace(config, updates=updates, decay_from=2 * updates // 3, decay_to=updates - 1)


def trial(arm: str, config: Config, rate: float) -> dict[str, Any]:
    """One training at a rate, and mean |v − v*| after step 20 of the first episode on 20 drawn training tasks."""
    torch.set_num_threads(1)
    learner: Any = learner_of(replace(config, lr=rate, value_lr=2 * rate, seed=TUNING_SEED), Accelerator(cpu=True))
    for step in range(config.updates):
        learner.step(step)
    learner.env.close()
    env = make_vector(config.env, 20)
    found = evaluate_adaptation(
        learner.agent, env, episodes=1, horizon=config.horizon, split="train", seed=TUNING_SEED
    )  # fmt: skip
    env.close()
    row = {"arm": arm, "rate": rate, "error_settled": settled(found, 0), "return_1": float(found.returns.mean())}
    print(row, flush=True)
    return row


def tune(arms: list[str], updates: int, jobs: int, output: Path) -> None:
    """Trials of all arms; of each the rate with the least error is kept."""
    configs = arms_of(with_updates(PRESETS["medium"], updates))
    rows = Parallel(n_jobs=jobs)(delayed(trial)(arm, configs[arm], rate) for arm in arms for rate in RATES)
    chosen = {
        arm: min((row for row in rows if row["arm"] == arm), key=lambda row: row["error_settled"])["rate"]
        for arm in arms
    }
    tuned(output).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"updates": updates, "seed": TUNING_SEED, "trials": rows, "chosen": chosen}, indent=2)
    tuned(output).write_text(text + "\n", encoding="utf-8")
    print(chosen)


def run(arm: str, config: Config, folder: Path) -> dict[str, Any]:
    """Train and test one arm; a run that was stopped goes on."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    options = RunOptions(output_dir=folder, log_every=1, checkpoint_every=10, resume=(folder / "checkpoints").exists())
    found = train(config, options)
    seconds = time.perf_counter() - started
    env = make_vector(config.env, 20)
    row: dict[str, Any] = {"arm": arm, "seed": config.seed, "seconds": seconds, "config": config_to_dict(config)}
    for split in ("test", "ood"):
        result = evaluate_adaptation(found.agent, env, episodes=6, horizon=config.horizon, split=split)  # type: ignore[arg-type]
        row[split] = summarise(result) | {"error_by_step": result.infos["error"][:, 0].mean(0).tolist()}
    env.close()
    row["curve"] = {
        name: [metrics[name] for metrics in found.metrics] for name in ("return_1", "return_2", "error", "std", "kl")
    }
    print(arm, config.seed, round(seconds), row["test"]["return_1"], row["test"]["error_settled"], flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("arms", nargs="*")
    parser.add_argument("--updates", type=int, default=PRESETS["medium"].updates)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--runs", type=Path, default=Path("runs/halfcheetah"))
    parser.add_argument("--output", type=Path, default=Path("results"))
    parser.add_argument("--tune", action="store_true")
    args = parser.parse_args()
    arms = args.arms or list(ARMS)
    if args.tune:
        tune(arms, args.updates, args.jobs, args.output)
        return
    base = with_updates(PRESETS["medium"], args.updates)
    configs = arms_of(base)
    if tuned(args.output).exists():
        for arm, rate in json.loads(tuned(args.output).read_text(encoding="utf-8"))["chosen"].items():
            configs[arm] = replace(configs[arm], lr=rate, value_lr=2 * rate)
    asked = [(arm, replace(configs[arm], seed=seed)) for seed in args.seeds for arm in arms]
    rows = Parallel(n_jobs=args.jobs)(
        delayed(run)(arm, config, args.runs / f"{arm}-{config.seed}") for arm, config in asked
    )
    target = args.output / "bench" / "medium.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment.describe(), "updates": args.updates, "runs": rows}, indent=1)
    target.write_text(text + "\n", encoding="utf-8")
    draw(rows, base, args.output / "medium.png")


def draw(rows: list[dict[str, Any]], base: Config, path: Path) -> None:
    """Learning curves: means of ten updates."""
    groups, steps = {}, {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        curves = np.array([row["curve"]["return_1"] for row in rows if row["arm"] == arm])
        width = min(10, curves.shape[1])
        whole = curves.shape[1] // width * width
        groups[arm] = curves[:, :whole].reshape(len(curves), -1, width).mean(-1)
        steps[arm] = base.steps * width * np.arange(1, groups[arm].shape[1] + 1)
    plots.curves(
        groups, steps, path, ("environment steps, HalfCheetahVel", "return of the first episode, with exploration")
    )


if __name__ == "__main__":
    main()
