"""`flipped-learning train|evaluate|reproduce|info|predict|label-sweep`."""

from __future__ import annotations

from metazoo.cli import Command, run

from flipped_learning.config import PredictOptions, SweepOptions

COMMANDS = {
    "predict": Command(PredictOptions, "flipped_learning.classifier:predict", "classify your texts with your labels"),
    "label-sweep": Command(SweepOptions, "flipped_learning.evaluate:label_sweep", "macro-F1 by pair of label words"),
}


def main() -> None:
    """Entry point of the console script."""
    run("flipped-learning", COMMANDS)
