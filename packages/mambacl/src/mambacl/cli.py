"""`mambacl train|evaluate|reproduce|info|generalize|forgetting`."""

from __future__ import annotations

from metazoo.cli import Command, run

from mambacl.config import ForgettingOptions, GeneralizeOptions

COMMANDS = {
    "generalize": Command(GeneralizeOptions, "mambacl.evaluate:generalize", "more tasks and shots, noise, other data"),
    "forgetting": Command(ForgettingOptions, "mambacl.evaluate:forgetting", "each task while the stream goes on"),
}


def main() -> None:
    """Entry point of the console script."""
    run("mambacl", COMMANDS)
