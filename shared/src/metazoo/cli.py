"""The command line of every package: `NAME train|evaluate|reproduce|info`, and the boundary of its errors.

Nothing heavy is imported here: torch and what stands on it load when work starts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from metazoo.errors import UserError
from metazoo.options import RunOptions


@dataclass(frozen=True)
class Command:
    """A further sub-command of a package: its options (a dataclass) and the function "module:name" that takes them."""

    options: type
    target: str
    help: str


@dataclass(frozen=True, kw_only=True)
class ReproduceOptions:
    """Measure the paper's claims: arms x seeds, an effect with its 95 % interval, and a verdict."""

    claim: str = "flagship"
    """Name of a claim, "all", or "flagship" (see `info`)."""
    scale: Literal["small", "paper"] = "small"
    """small: two cores and minutes; paper: the paper's own setting, for GPUs."""
    seeds: int | None = None
    """Seeds per arm [default: what the claim states; below 5 there is no verdict]."""
    jobs: int | None = None
    """Cells measured at the same time [default: one per core]."""
    backend: Literal["loky", "sequential", "dask", "ray"] = "loky"
    """Where cells run; dask and ray use your cluster (extras of the package metazoo)."""
    output_dir: Path | None = None
    """Folder of cells, report and plots [default: runs/NAME-reproduce]; finished cells in it are reused."""

    def __post_init__(self) -> None:
        for name in ("seeds", "jobs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name} is {value}: give 1 or more")


def run(name: str, commands: Mapping[str, Command] | None = None, argv: Sequence[str] | None = None) -> None:
    """Run the command line of the package ``name`` and exit.

    Exit status: 0 done, 1 a bug (with its traceback), 2 a user's error (one line on stderr), 130 Ctrl-C,
    143 SIGTERM. By convention the package's module (``name`` with underscores) has config.PRESETS,
    config.EvaluateOptions, train.train, evaluate.evaluate and claims.CLAIMS.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(name, dict(commands or {}), args)
    except (UserError, PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of our output went away (| head)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 141
    sys.exit(status)


def _dispatch(name: str, commands: dict[str, Command], args: list[str]) -> int:
    module = name.replace("-", "_")
    known = ["train", "evaluate", "reproduce", "info", *commands]
    if not args or args[0] in ("-h", "--help"):
        print(_overview(name, commands))
        return 0
    if args[0] == "--version":
        print(f"{name} {importlib.metadata.version(f'metazoo-{name}')}")
        return 0
    command, rest = args[0], args[1:]
    if command not in known:
        raise UserError(f"unknown command {command!r}: one of {', '.join(known)}")
    if command == "train":
        _train(name, module, rest)
    elif command == "evaluate":
        _with_run(name, module, rest)
    elif command == "reproduce":
        _reproduce(name, module, rest)
    elif command == "info":
        if rest:
            raise UserError(f"info takes no arguments, got {' '.join(rest)}")
        print(_info(name, module))
    else:
        options = parse(commands[command].options, rest, prog=f"{name} {command}")
        target, function = commands[command].target.split(":")
        _show(getattr(importlib.import_module(target), function)(options))
    return 0


def parse(cls: Any, args: Sequence[str], *, prog: str, default: Any = None) -> Any:
    """``tyro.cli`` with its errors folded into one line.

    Raises:
        UserError: an unknown field, a value of the wrong type, a value that the dataclass refuses.
    """
    printed = io.StringIO()
    kwargs = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(printed):
            return tyro.cli(cls, args=list(args), prog=prog, config=(tyro.conf.OmitArgPrefixes,), **kwargs)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        lines = [line.strip("│╭╮╰╯─ \n") for line in printed.getvalue().splitlines()]
        first = lines[1:]  # the first line is the box's title
        message = " ".join(first[: first.index("")] if "" in first else first) or "cannot read the arguments"
        refused = re.fullmatch(r"Error parsing [\w.]+: (--.*)", message)  # by the dataclass, which says all
        raise UserError(refused[1] if refused else f"{message}; see {prog} --help") from None


def _train(name: str, module: str, rest: list[str]) -> None:
    presets = importlib.import_module(f"{module}.config").PRESETS
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else "small"
    if preset not in presets:
        raise UserError(f"unknown preset {preset!r}: one of {', '.join(presets)}")
    default = presets[preset]
    both = dataclasses.make_dataclass(
        "train",
        [
            ("config", type(default), dataclasses.field(default=default)),
            ("run", RunOptions, dataclasses.field(default=RunOptions())),
        ],
    )
    both.__doc__ = f"Train with the preset {preset}. Presets: {', '.join(presets)}."
    chosen = parse(both, rest, prog=f"{name} train {preset}")
    options = chosen.run
    if options.output_dir is None:
        options = dataclasses.replace(options, output_dir=Path("runs") / f"{name}-{preset}")
    importlib.import_module(f"{module}.train").train(chosen.config, options)
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"run folder: {options.output_dir}")


def _with_run(name: str, module: str, rest: list[str]) -> None:
    options_type = importlib.import_module(f"{module}.config").EvaluateOptions
    if not rest or (rest[0].startswith("-") and rest[0] not in ("-h", "--help")):
        raise UserError(f"give a run folder: {name} evaluate RUN [--field value …]")
    options = parse(options_type, rest[1:] if not rest[0].startswith("-") else rest, prog=f"{name} evaluate RUN")
    run_folder = Path(rest[0])
    if not (run_folder / "config.json").is_file():
        raise UserError(f"{run_folder} is not a run folder (no config.json): give the --output-dir of `{name} train`")
    _show(importlib.import_module(f"{module}.evaluate").evaluate(run_folder, options))


def _reproduce(name: str, module: str, rest: list[str]) -> None:
    options = parse(ReproduceOptions, rest, prog=f"{name} reproduce")
    claims = select_claims(importlib.import_module(f"{module}.claims").CLAIMS, options.claim)
    folder = options.output_dir or Path("runs") / f"{name}-reproduce"
    import joblib

    from metazoo import report, sweep

    rows = sweep.reproduce(
        name,
        claims,
        scale=options.scale,
        seeds=options.seeds,
        jobs=options.jobs or joblib.cpu_count(),
        backend=options.backend,
        folder=folder,
    )
    print(report.summary(rows))
    report.plot({"package": name, "scale": options.scale, "claims": rows}, folder / f"{options.scale}.png")
    plot = getattr(importlib.import_module(f"{module}.claims"), "plot", None)
    if plot is not None:
        plot(folder, options.scale)
    print(
        f"report: {folder / f'{options.scale}.json'}   plots: {', '.join(sorted(str(p) for p in folder.glob('*.png')))}"
    )


def select_claims(claims: Sequence[Any], wanted: str) -> list[Any]:
    """The claims that ``wanted`` names: one, "all" or "flagship". Raises UserError that lists the names."""
    chosen = [c for c in claims if wanted in ("all", c.name) or (wanted == "flagship" and c.flagship)]
    if not chosen:
        raise UserError(f"unknown claim {wanted!r}: one of flagship, all, {', '.join(c.name for c in claims)}")
    return chosen


def _overview(name: str, commands: Mapping[str, Command]) -> str:
    lines = [
        f"usage: {name} COMMAND [--help]",
        "",
        importlib.metadata.metadata(f"metazoo-{name}")["Summary"],
        "",
        f"  {name} train [PRESET] [--field value …] [--output-dir D] [--resume]",
        f"  {name} evaluate RUN [--field value …]",
        f"  {name} reproduce [--claim C|all] [--scale small|paper] [--seeds N] [--jobs N]",
        f"  {name} info",
        *(f"  {name} {command} [--field value …]   {entry.help}" for command, entry in commands.items()),
    ]
    return "\n".join(lines)


def _info(name: str, module: str) -> str:
    config = importlib.import_module(f"{module}.config")
    claims = importlib.import_module(f"{module}.claims").CLAIMS
    meta = importlib.metadata.metadata(f"metazoo-{name}")
    lines = [f"{meta['Name']} {meta['Version']}: {meta['Summary']}", "", "Presets:"]
    first = next(iter(config.PRESETS.values()))
    for preset, values in config.PRESETS.items():
        changed = [
            f"{field.name}={getattr(values, field.name)}"
            for field in dataclasses.fields(values)
            if getattr(values, field.name) != getattr(first, field.name)
        ]
        lines.append(f"  {preset:16s} {', '.join(changed) or 'the default'}")
    lines += ["", "Claims:"]
    for claim in claims:
        lines.append(f"  {claim.name}{' (flagship)' if claim.flagship else ''}: {claim.statement} [{claim.source}]")
    return "\n".join(lines)


def _show(result: Any) -> None:
    """Print what a command returns: a mapping as one `name  value` line each, anything else as it is."""
    if result is None:
        return
    if not isinstance(result, Mapping):
        print(result)
        return
    width = max((len(str(key)) for key in result), default=0)
    for key, value in result.items():
        print(f"{key!s:{width}s}  {value:.6g}" if isinstance(value, float) else f"{key!s:{width}s}  {value}")
