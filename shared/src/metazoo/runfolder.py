"""A run folder: config.json, environment.json, metrics.jsonl, checkpoints/ and plots; one process at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from metazoo.errors import UserError

ConfigT = TypeVar("ConfigT")


def write_text(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader never sees half a file.

    Raises:
        UserError: the file cannot be written (no space, no permission).
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # where the folder is none
            beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON, beside and renamed. Raises UserError as :func:`write_text`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises UserError if the file is missing or is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); restore it or start a new run") from error


def config_to_dict(config: object) -> dict[str, Any]:
    """A frozen dataclass as what JSON gives back: tuples become lists, paths strings."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[call-overload, no-any-return]


def config_from_dict(cls: type[ConfigT], values: Mapping[str, Any], where: Path) -> ConfigT:
    """Build ``cls`` from a config.json; lists become tuples. Raises UserError on a missing or unknown field."""
    names = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for name in values:
        if name not in names:
            raise UserError(f"{where} has the field {name!r}, which this version does not know")
    for name in sorted(names - set(values)):
        raise UserError(f"{where} lacks the field {name!r}: the run was made by another version")
    return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


class RunFolder:
    """The files of one run. Every process may read; the main process alone creates, logs and saves.

    Args:
        path: the folder.
        config: the run's frozen dataclass.
        resume: go on with what the folder holds; without it the folder must hold no run.
        main: whether this process writes (``accelerator.is_main_process``).

    Raises:
        UserError: the folder holds a run and ``resume`` is off; it holds a run of another config; another
            process works in it; it cannot be written.
    """

    def __init__(self, path: Path, config: object, *, resume: bool = False, main: bool = True) -> None:
        self.path = Path(path)
        self.config = config
        self.main = main
        self._lock: IO[str] | None = None
        self._metrics: IO[str] | None = None
        if not main:  # the main process checks for all; torchrun ends the others when it gives up
            return
        held = self.config_path.exists()
        if held and not resume:
            raise UserError(f"{self.path} already holds a run: add --resume, or choose another --output-dir")
        self._take_lock()
        if held:
            try:
                self._check_same_config()
            except UserError:
                self.close()
                raise
        else:
            write_json(self.config_path, config_to_dict(config))

    @property
    def config_path(self) -> Path:
        return self.path / "config.json"

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def _take_lock(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"cannot write in {self.path}: {error.strerror}; choose another --output-dir") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"another process works in {self.path}: wait for it, or choose another --output-dir"
            ) from error

    def _check_same_config(self) -> None:
        old, new = read_json(self.config_path), config_to_dict(self.config)
        for name in sorted(set(old) | set(new)):
            if old.get(name) != new.get(name):
                raise UserError(
                    f"{self.path} was made with {name} = {old.get(name)!r}, now it is {new.get(name)!r}: "
                    "resume with the same config, or choose another --output-dir"
                )

    def log(self, row: Mapping[str, Any]) -> None:
        """Append one row to metrics.jsonl. Raises UserError if the disk is full."""
        if not self.main:
            return
        try:
            if self._metrics is None:
                self._metrics = self.metrics_path.open("a", encoding="utf-8")
            self._metrics.write(json.dumps(row) + "\n")
            self._metrics.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.metrics_path}: {error.strerror}; free space") from error

    def rewind(self, step: int) -> None:
        """Drop the rows of metrics.jsonl after ``step``, and a half-written last one."""
        if not self.main or not self.metrics_path.exists():
            return
        kept = [row for row in read_metrics(self.metrics_path) if row["step"] <= step]
        write_text(self.metrics_path, "".join(json.dumps(row) + "\n" for row in kept))

    def close(self) -> None:
        """Close the metrics file and give the lock back."""
        for file in (self._metrics, self._lock):
            if file is not None:
                with contextlib.suppress(OSError):  # a row that a full disk refuses was reported when it was logged
                    file.close()
        self._metrics = self._lock = None


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metrics.jsonl; a broken last line (the process was killed in it) is left out."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    for number, line in enumerate(lines, 1):
        try:
            yield json.loads(line)
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"{path} line {number} is not JSON: restore the file") from error


def open_run(path: Path, config_type: type[ConfigT]) -> ConfigT:
    """The config of the run in ``path``. Raises UserError if the folder is not a run."""
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{path} is not a run folder (no config.json): give the --output-dir of a training run")
    return config_from_dict(config_type, read_json(Path(path) / "config.json"), Path(path) / "config.json")
