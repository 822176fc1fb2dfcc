"""Run under torchrun by test_train.py: train in two processes, in several folders one after another, and keep the outer
gradient of each step."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from maml_align import meta_distillation, plots
from maml_align.config import Config
from maml_align.train import train
from metazoo.options import RunOptions


class Recorded:
    """Within it the outer gradients of training are noted."""

    def __init__(self) -> None:
        self.gradients: list[np.ndarray] = []

    def __enter__(self) -> Recorded:
        self.held = combine = meta_distillation.combine

        def noted(*args: Any) -> meta_distillation.Combined:
            found = combine(*args)
            self.gradients.append(torch.cat([value.flatten() for value in found.gradient.values()]).numpy().copy())
            return found

        meta_distillation.combine = noted
        return self

    def __exit__(self, *error: object) -> None:
        meta_distillation.combine = self.held


def main(jobs: list[tuple[str, dict[str, Any]]]) -> None:
    """Train each (folder, fields); folder.RANK.npz has the gradients and the last weights of each process."""
    torch.set_num_threads(1)
    plots.training = lambda rows, path: None  # which would take longer than the training
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # it would part the processes
    for folder, fields in jobs:
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        with Recorded() as record:
            run = train(config, RunOptions(output_dir=Path(folder), log_every=1, checkpoint_every=4))
        weights = torch.cat([value.detach().flatten() for value in run.encoder.parameters()]).numpy()
        np.savez(f"{folder}.{Accelerator().process_index}.npz", gradients=record.gradients, weights=weights)
    end(Accelerator())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
