"""What the training loop costs over the same training written by hand, at a step of a few milliseconds.

Both train the same network on the same batches; runs alternate, and the median of the paired ratios is reported.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from metazoo import checkpoint, loop, runfolder
from metazoo.options import RunOptions


@dataclass(frozen=True)
class Config:
    width: int = 1024
    steps: int = 300


class Learner:
    """A two-layer network on random batches."""

    def __init__(self, config: Config) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Sequential(
            torch.nn.Linear(64, config.width), torch.nn.Tanh(), torch.nn.Linear(config.width, 64)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters())
        self.x = torch.randn(256, 64)

    def state(self) -> dict[str, checkpoint.Stateful]:
        return {"model": self.model, "optimizer": self.optimizer}

    def step(self, step: int) -> dict[str, Any]:
        self.optimizer.zero_grad()
        loss = (self.model(self.x) - self.x).square().mean()
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.detach()}


def by_hand(config: Config) -> float:
    learner = Learner(config)
    start = time.perf_counter()
    for step in range(config.steps):
        values = learner.step(step)
        if (step + 1) % 10 == 0:
            float(values["loss"])
    return time.perf_counter() - start


def with_loop(config: Config, folder: Path) -> float:
    options = RunOptions(output_dir=folder, log_every=10, checkpoint_every=100)
    accelerator = loop.prepare(options, seed=0)
    learner = Learner(config)
    run = runfolder.RunFolder(folder, config)
    seconds = []

    class Timed:
        """From the first step to the last, as by hand; checkpoints and rows fall in between."""

        def state(self) -> dict[str, checkpoint.Stateful]:
            return learner.state()

        def step(self, step: int) -> dict[str, Any]:
            if step == 0:
                seconds.append(time.perf_counter())
            return learner.step(step)

    loop.fit(Timed(), run, accelerator, steps=config.steps, options=options, name="bench")
    seconds.append(time.perf_counter())
    run.close()
    return seconds[1] - seconds[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    config = Config()
    ratios, hand = [], []
    with tempfile.TemporaryDirectory() as scratch:
        by_hand(config), with_loop(config, Path(scratch) / "warm")
        for i in range(repeats):
            hand.append(by_hand(config))
            ratios.append(with_loop(config, Path(scratch) / str(i)) / hand[-1])
    quartiles = statistics.quantiles(ratios, n=4)
    print(
        json.dumps(
            {
                "step_ms": round(1000 * statistics.median(hand) / config.steps, 3),
                "loop_over_hand": round(statistics.median(ratios), 4),
                "quartiles": [round(quartiles[0], 4), round(quartiles[2], 4)],
                "repeats": repeats,
            }
        )
    )


if __name__ == "__main__":
    main()
