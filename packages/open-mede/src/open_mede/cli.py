"""`open-mede train|evaluate|reproduce|info|predict|average|make-data|make-ooc`."""

from __future__ import annotations

from metazoo.cli import Command, run

from open_mede.config import AverageOptions, PredictOptions, ScubaOptions, SpriteOptions

COMMANDS = {
    "predict": Command(PredictOptions, "open_mede.predict:predict", "say what happens in videos"),
    "average": Command(AverageOptions, "open_mede.ensemble:average", "average checkpoints by Gaussian weights"),
    "make-data": Command(SpriteOptions, "open_mede.data:make_sprites", "write moving sprites as files"),
    "make-ooc": Command(ScubaOptions, "open_mede.scuba:make_scuba", "put foregrounds onto striped backgrounds"),
}


def main() -> None:
    """Entry point of the console script."""
    run("open-mede", COMMANDS)
