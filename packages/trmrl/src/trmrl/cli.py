"""`trmrl train|evaluate|reproduce|info|video|attention`."""

from __future__ import annotations

from metazoo.cli import Command, run

from trmrl.config import AttentionOptions, VideoOptions

COMMANDS = {
    "video": Command(VideoOptions, "trmrl.evaluate:video", "film a trained agent: .gif or .mp4"),
    "attention": Command(AttentionOptions, "trmrl.evaluate:attention", "draw attention maps and episodic memories"),
}


def main() -> None:
    """Entry point of the console script."""
    run("trmrl", COMMANDS)
