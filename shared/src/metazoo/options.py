"""How a training run is kept: where it goes, how often it is saved and logged. None of it changes a result."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from metazoo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How the run is kept."""

    output_dir: Path | None = None
    """Run folder [default: runs/NAME-PRESET]."""
    resume: bool = False
    """Go on from the last checkpoint in the run folder."""
    checkpoint_every: int = 100
    """Steps between two checkpoints."""
    keep: int = 2
    """Checkpoints kept; at least 2, as a crash may leave the last one unfinished."""
    log_every: int = 10
    """Steps between two rows of metrics.jsonl."""
    report_to: tuple[str, ...] = ()
    """Trackers of Accelerate: tensorboard, wandb, mlflow, … (each must be installed)."""

    def __post_init__(self) -> None:
        for name, least in (("checkpoint_every", 1), ("keep", 2), ("log_every", 1)):
            value = getattr(self, name)
            if value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give {least} or more")
