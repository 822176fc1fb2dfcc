"""Run under torchrun by test_train.py: train in two processes, in several folders one after another, and keep the
gradient of each step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from metazoo.options import RunOptions
from open_mede import plots, sprites
from open_mede.config import Config
from open_mede.train import CrossBatchMetaTrainer, train


class Recorded:
    """Within it the gradients that optimizers get are noted, those on single frames left out."""

    def __init__(self) -> None:
        self.gradients: list[np.ndarray] = []

    def __enter__(self) -> Recorded:
        self.held = held = CrossBatchMetaTrainer._gradient

        def noted(learner: CrossBatchMetaTrainer, *args: Any) -> dict[str, Any]:
            row = held(learner, *args)
            found = [value.grad.flatten() for value in learner.parameters if value.grad is not None]
            self.gradients.append(torch.cat(found).numpy().copy())
            return row

        CrossBatchMetaTrainer._gradient = noted  # type: ignore[method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        CrossBatchMetaTrainer._gradient = self.held  # type: ignore[method-assign]


def main(jobs: list[tuple[str, dict[str, Any]]]) -> None:
    """Train each (folder, fields); folder.RANK.npz has the gradients and the final weights of each process."""
    torch.set_num_threads(1)
    # plots would take longer than the training
    plots.training = lambda rows, path: None
    plots.gaussian = lambda config, path: None
    sprites.BACKGROUNDS = 4
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # it would part the processes
    for folder, fields in jobs:
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        with Recorded() as record:
            run = train(config, RunOptions(output_dir=Path(folder), log_every=1, checkpoint_every=4))
        weights = torch.cat([value.detach().flatten() for value in run.model.parameters()]).numpy()
        losses = [row["loss"] for row in run.metrics]
        rank = Accelerator().process_index
        np.savez(f"{folder}.{rank}.npz", gradients=record.gradients, weights=weights, losses=losses)
    end(Accelerator())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
