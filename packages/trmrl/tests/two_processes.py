"""Run under torchrun by test_train.py: train in two processes, in several folders one after another, and keep what each
process has in the end."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from metazoo.options import RunOptions
from trmrl import plots
from trmrl import train as training
from trmrl.config import Config


def parameters_of(state: dict[str, Any]) -> Iterator[tuple[str, np.ndarray]]:
    """Trained numbers of all modules of a learner's state, without biases of keys: attention does not depend on them,
    so that AdamW moves them by what rounding leaves."""
    for name, part in state.items():
        for key, value in part.named_parameters() if isinstance(part, torch.nn.Module) else ():
            found = value.detach().cpu().clone()
            if key.endswith("in_proj.bias"):
                found.view(3, -1)[1] = 0
            yield f"{name}.{key}", found.numpy()


def trained(folder: Path, config: Config) -> dict[str, np.ndarray]:
    """What a learner has learned after all updates, of this process."""
    held: list[Any] = []
    real = training.learner_of

    def kept(config: Config, accelerator: Accelerator) -> Any:
        held.append(real(config, accelerator))
        return held[-1]

    training.learner_of = kept
    try:
        training.train(config, RunOptions(output_dir=folder, log_every=1, checkpoint_every=4))
    finally:
        training.learner_of = real
    return dict(parameters_of(held[0].state()))


def main(jobs: list[tuple[str, dict[str, Any]]]) -> None:
    """Train each (folder, fields); folder.RANK.npz has the weights of each process."""
    torch.set_num_threads(1)
    plots.training = lambda rows, path: None  # which would take longer than the training
    end = Accelerator.end_training
    Accelerator.end_training = lambda self: None  # type: ignore[method-assign]  # it would part the processes
    for folder, fields in jobs:
        config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        weights = trained(Path(folder), config)
        np.savez(f"{folder}.{Accelerator().process_index}.npz", **weights)  # type: ignore[arg-type]
    end(Accelerator())


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
