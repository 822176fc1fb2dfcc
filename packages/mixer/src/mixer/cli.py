"""`mixer train|evaluate|reproduce|info|generate`."""

from __future__ import annotations

from metazoo.cli import Command, run

from mixer.config import GenerateOptions

COMMANDS = {"generate": Command(GenerateOptions, "mixer.data:generate", "write a data set as .npz or .csv")}


def main() -> None:
    """Entry point of the console script."""
    run("mixer", COMMANDS)
