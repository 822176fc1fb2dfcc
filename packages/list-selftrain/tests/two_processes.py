"""Run under torchrun by test_train.py: train in two processes, in several folders one after another, and keep what
each step's gradient and weights of pseudo-labels were."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from list_selftrain.config import Config
from list_selftrain.train import LiSTLearner, Position, train
from metazoo.options import RunOptions
from torch import Tensor


class Interrupted(Exception):
    """What ends a run early."""


class Recorded:
    """Within it, steps of training note the gradient and the weights, and a run may end before step ``last``."""

    def __init__(self, last: int = 0) -> None:
        self.last = last
        self.gradients: list[np.ndarray] = []
        self.weights: list[np.ndarray] = []

    def __enter__(self) -> Recorded:
        self.held = step, weigh = LiSTLearner.step, LiSTLearner.weigh

        def noted_step(learner: LiSTLearner, number: int) -> dict[str, Any]:
            if self.last and number == self.last:
                raise Interrupted
            row = step(learner, number)
            grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters]
            self.gradients.append(torch.cat([grad.flatten() for grad in grads]).numpy().copy())
            return row

        def noted_weigh(learner: LiSTLearner, at: Position, indices: np.ndarray) -> Tensor:
            found = weigh(learner, at, indices)
            self.weights.append(found.numpy().copy())
            return found

        LiSTLearner.step, LiSTLearner.weigh = noted_step, noted_weigh  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        LiSTLearner.step, LiSTLearner.weigh = self.held  # type: ignore[method-assign]


def main(jobs: list[tuple[str, dict[str, Any], int]]) -> None:
    """Train each (folder, fields, step to be interrupted at or 0); folder.RANK.npz has the record of each process."""
    torch.set_num_threads(1)
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # it would part the processes after the first run
    for folder, fields, last in jobs:
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        options = RunOptions(output_dir=Path(folder), log_every=1, checkpoint_every=4)
        if last:
            try:
                with Recorded(last):
                    train(config, options)
            except Interrupted:
                options = dataclasses.replace(options, resume=True)
        with Recorded() as record:
            train(config, options)
        rank = Accelerator().process_index
        np.savez(f"{folder}.{rank}.npz", gradients=record.gradients, weights=record.weights)
    end(Accelerator())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
