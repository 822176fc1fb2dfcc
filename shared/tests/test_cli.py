"""The command line: errors are one line, presets and fields are checked, help is complete."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import pytest
from metazoo import cli
from metazoo.errors import UserError
from metazoo.options import RunOptions


@dataclass(frozen=True)
class Options:
    width: int = 3
    """Hidden units."""
    kind: Literal["a", "b"] = "a"
    """Which kind."""

    def __post_init__(self) -> None:
        if self.width < 1:
            raise UserError(f"--width is {self.width}: give 1 or more")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--widht", "3"], "Unrecognized options: --widht"),
        (["--width", "x"], "--width"),
        (["--width", "0"], "--width is 0: give 1 or more"),
        (["--kind", "c"], "--kind"),
        (["--width"], "--width"),
    ],
)
def test_errors_are_one_line(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        cli.parse(Options, arguments, prog="toy train")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert "│" not in str(error.value)


def test_parse_gives_the_options() -> None:
    assert cli.parse(Options, ["--width", "5", "--kind", "b"], prog="toy") == Options(5, "b")


@pytest.mark.parametrize(("field", "value"), [("keep", 1), ("log_every", 0), ("checkpoint_every", 0)])
def test_run_options_are_checked(field: str, value: int) -> None:
    """One checkpoint alone is refused: the last may be half-written."""
    with pytest.raises(UserError, match=f"--{field.replace('_', '-')} is {value}"):
        RunOptions(**{field: value})


def test_unknown_command_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run("metazoo-toy", argv=["dance"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "metazoo-toy: error: unknown command 'dance': one of train, evaluate, reproduce, info"
    ]
