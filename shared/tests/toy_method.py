"""A small method with all that makes resuming hard: dropout, NumPy noise, an own order, Adam, accumulation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import checkpoint, loop, runfolder
from metazoo.options import RunOptions


@dataclass(frozen=True)
class Config:
    steps: int = 24
    width: int = 16
    seed: int = 0
    lr: float = 1e-2
    dropout: float = 0.2
    accumulation: int = 1


class Toy:
    """Regress y = sin(x) from batches of 8 numbered examples."""

    def __init__(self, config: Config, accelerator: Any) -> None:
        self.config, self.accelerator = config, accelerator
        self.model = torch.nn.Sequential(
            torch.nn.Linear(1, config.width),
            torch.nn.Dropout(config.dropout),
            torch.nn.Tanh(),
            torch.nn.Linear(config.width, 1),
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=config.lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.x = torch.linspace(-3, 3, 64)[:, None]

    def state(self) -> Mapping[str, checkpoint.Stateful]:
        return {
            "model": self.model,
            "optimizer": self.optimizer,
            "order": checkpoint.GeneratorState(self.generator),
        }

    def step(self, step: int) -> dict[str, Any]:
        ids = torch.randperm(64, generator=self.generator)[:8]
        noise = np.random.standard_normal() * 1e-3 if self.config.dropout else 0.0  # noqa: NPY002
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for part in loop.share(ids, self.accelerator, self.config.accumulation):
            loss = (self.model(self.x[part]) - self.x[part].sin() + noise).square().sum() / len(ids)
            self.accelerator.backward(loss)
            total += loss.detach()
        loop.sum_gradients(list(self.model.parameters()), self.accelerator)
        self.optimizer.step()
        return {"loss": self.accelerator.reduce(total, reduction="sum"), "ids": ids}


def train(config: Config, options: RunOptions) -> Toy:
    options = loop.with_folder(options, Path("runs/toy"))
    assert options.output_dir is not None
    accelerator = loop.prepare(options, seed=config.seed)
    learner = Toy(config, accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=accelerator.is_main_process)
    try:
        loop.fit(learner, folder, accelerator, steps=config.steps, options=options, name="toy")
    finally:
        folder.close()
    accelerator.end_training()
    return learner
