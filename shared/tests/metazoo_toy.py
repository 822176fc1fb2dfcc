"""Claims that measure nothing, for the sweep's tests: a module, so that worker processes can import it."""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metazoo.claims import Claim
from metazoo.sweep import reproduce


@dataclass(frozen=True)
class Config:
    """``level`` is what the arm gives; ``seconds`` how long it takes."""

    level: float = 0.0
    seconds: float = 0.0
    fail: str = ""


def measure(config: Config, seed: int) -> dict[str, Any]:
    """A noisy level. Notes each call in the file that the environment variable METAZOO_TOY_LOG names."""
    log = os.environ.get("METAZOO_TOY_LOG")
    if log:
        with Path(log).open("a", encoding="utf-8") as file:
            file.write(f"{config.level} {seed}\n")
    time.sleep(config.seconds)
    if config.fail and seed == 2:
        if config.fail == "nan":
            return {"score": float("nan"), "cost": 1.0}
        if config.fail == "die":
            os._exit(9)
        raise RuntimeError(f"{config.fail}\nsecond line")
    noise = random.Random(f"{config.level} {seed}").gauss(0, 0.1)
    return {"score": config.level + noise, "cost": 2.0 + seed, "process": os.getpid()}


def claim(name: str = "toy", *, seconds: float = 0.0, fail: str = "", **changes: Any) -> Claim:
    """Treatment 1, baseline 0, five seeds: reproduced."""
    fields: dict[str, Any] = {
        "name": name,
        "version": 1,
        "source": "Section 1",
        "statement": "One is more than zero.",
        "paper": "1.00 against 0.00",
        "metric": "score",
        "arms": {"small": {"ours": Config(1.0, seconds, fail), "theirs": Config(0.0, seconds)}},
        "measure": measure,
        "treatment": "ours",
        "baseline": "theirs",
        "margin": 0.5,
        "seeds": 5,
        "tuning": {"ours": 0, "theirs": 0},
        "chance": 0.0,
        "also": ("cost",),
    }
    return Claim(**{**fields, **changes})


def faster(slow: Claim) -> Claim:
    """The same claim without the waiting (another config, hence other cells)."""
    arms = {arm: replace(config, seconds=0.0) for arm, config in slow.arms["small"].items()}  # type: ignore[type-var]
    return replace(slow, arms={"small": arms})


if __name__ == "__main__":  # metazoo_toy.py FOLDER JOBS: a slow sweep, to be killed
    reproduce("toy", [claim(seconds=0.3)], folder=Path(sys.argv[1]), jobs=int(sys.argv[2]))
