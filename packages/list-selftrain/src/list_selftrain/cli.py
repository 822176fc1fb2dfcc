"""`list-selftrain train|evaluate|reproduce|info|predict|reweight-demo|export-adapter`."""

from __future__ import annotations

from metazoo.cli import Command, run

from list_selftrain.config import ExportOptions, PredictOptions, ReweightOptions

COMMANDS = {
    "predict": Command(PredictOptions, "list_selftrain.estimator:predict", "classify your texts with a run"),
    "reweight-demo": Command(
        ReweightOptions, "list_selftrain.evaluate:reweight_demo", "flip pseudo-labels, see their weights"
    ),
    "export-adapter": Command(
        ExportOptions, "list_selftrain.evaluate:export_adapter", "write adapters and head of a run"
    ),
}


def main() -> None:
    """Entry point of the console script."""
    run("list-selftrain", COMMANDS)
