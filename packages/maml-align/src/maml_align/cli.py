"""`maml-align train|evaluate|reproduce|info|bias|search`."""

from __future__ import annotations

from metazoo.cli import Command, run

from maml_align.config import BiasOptions, SearchOptions

COMMANDS = {
    "bias": Command(BiasOptions, "maml_align.evaluate:bias", "how much an encoder favours the query's language"),
    "search": Command(SearchOptions, "maml_align.evaluate:search_sentences", "search sentences of any language"),
}


def main() -> None:
    """Entry point of the console script."""
    run("maml-align", COMMANDS)
