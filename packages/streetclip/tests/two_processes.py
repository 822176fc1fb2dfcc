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
from metazoo import loop
from metazoo.options import RunOptions
from streetclip import plots
from streetclip.config import Config
from streetclip.train import train


def main(jobs: list[tuple[str, dict[str, Any]]]) -> None:
    """Train each (folder, fields); folder.RANK.npz has the gradients and the last weights of each process."""
    torch.set_num_threads(1)
    plots.training = lambda rows, path: None  # which would take longer than the training
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # it would part the processes
    summing = loop.sum_gradients
    for folder, fields in jobs:
        noted: list[np.ndarray] = []

        def summed(parameters: Any, accelerator: Any, noted: list[np.ndarray] = noted) -> None:
            summing(parameters, accelerator)
            noted.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).numpy().copy())

        loop.sum_gradients = summed
        run = train(Config(**fields), RunOptions(output_dir=Path(folder), log_every=1, checkpoint_every=4))
        weights = torch.cat([value.detach().flatten() for value in run.clip.parameters()]).numpy()
        np.savez(f"{folder}.{Accelerator().process_index}.npz", *noted, weights=weights)
    end(Accelerator())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
