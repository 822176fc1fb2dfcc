"""`streetclip train|evaluate|reproduce|info|predict|score|oracle|caption|make-world`."""

from __future__ import annotations

from metazoo.cli import Command, run

from streetclip.config import CaptionOptions, OracleOptions, PredictOptions, ScoreOptions, WorldOptions

COMMANDS = {
    "predict": Command(PredictOptions, "streetclip.predict:predict", "say where photos were taken, on a map"),
    "score": Command(ScoreOptions, "streetclip.coordinates:score_predictions", "hold predictions against coordinates"),
    "oracle": Command(OracleOptions, "streetclip.coordinates:oracle", "ceilings of the method for coordinates"),
    "caption": Command(CaptionOptions, "streetclip.captions:caption", "write synthetic captions of labels"),
    "make-world": Command(WorldOptions, "streetclip.data:make_world", "write generated street scenes as files"),
}


def main() -> None:
    """Entry point of the console script."""
    run("streetclip", COMMANDS)
