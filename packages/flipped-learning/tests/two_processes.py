"""Run under torchrun by test_train.py: train in two processes, in several folders one after another."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from flipped_learning.config import Config
from flipped_learning.train import FlippedLearner, train
from metazoo.options import RunOptions

torch.set_num_threads(1)
STEP = FlippedLearner.step
END = Accelerator.end_training
Accelerator.end_training = lambda self: None  # it would part the processes after the first run


class Interrupted(Exception):
    """What ends a run early."""


def interrupted_at(last: int) -> None:
    """Let training end before step ``last``."""

    def step(self: FlippedLearner, step: int) -> dict[str, Any]:
        if step == last:
            raise Interrupted
        return STEP(self, step)

    FlippedLearner.step = step  # type: ignore[method-assign]


for folder, fields, last in json.loads(sys.argv[1]):
    config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
    options = {"output_dir": Path(folder), "log_every": 1, "checkpoint_every": 4}
    if last:
        interrupted_at(last)
        try:
            train(config, RunOptions(**options))
        except Interrupted:
            FlippedLearner.step = STEP  # type: ignore[method-assign]
    train(config, RunOptions(**options, resume=bool(last)))
END(Accelerator())
