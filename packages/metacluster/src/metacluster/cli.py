"""`metacluster train|evaluate|reproduce|info|compress|report`."""

from __future__ import annotations

from metazoo.cli import Command, run

from metacluster.config import CompressOptions, ReportOptions

COMMANDS = {
    "compress": Command(CompressOptions, "metacluster.train:compress_run", "another K for a finished run"),
    "report": Command(ReportOptions, "metacluster.packing:report", "where the bits of a compressed network are"),
}


def main() -> None:
    """Entry point of the console script."""
    run("metacluster", COMMANDS)
