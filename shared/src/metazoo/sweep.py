"""Measure claims: arms x seeds; finished cells are stored at once, an interrupted sweep goes on."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metazoo import environment
from metazoo.claims import Claim, judge
from metazoo.errors import UserError
from metazoo.runfolder import config_to_dict, read_json, write_json

BACKENDS = ("loky", "sequential", "dask", "ray")


@dataclass(frozen=True)
class _Cell:
    """One arm of one claim at one seed, and the file that holds it."""

    claim: Claim
    arm: str
    seed: int
    config: Any
    path: Path

    def __str__(self) -> str:
        return f"claim {self.claim.name!r}, arm {self.arm}, seed {self.seed}"


@dataclass(frozen=True)
class _Task:
    """One measurement, as it travels to a worker: the record of every cell that it fills."""

    measure: Callable[[Any, int], Mapping[str, object]]
    config: Any
    seed: int
    label: str
    records: list[tuple[Path, dict[str, Any]]]
    jobs: int
    parent: int | None  # the sweep's process, where workers are its children


def reproduce(
    package: str,
    claims: Sequence[Claim],
    *,
    scale: str = "small",
    seeds: int | None = None,
    jobs: int = 1,
    backend: str = "loky",
    folder: Path,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Measure ``claims`` and judge them.

    Each cell (claim, arm, seed) is a JSON file in ``folder``/cells, written by the worker as soon as it is
    finished. A finished cell is used again when its claim's version, its config and its seed are the same.
    Arms of several claims that share measure, config and seed are measured once. The rows go to
    ``folder``/<scale>.json; rows of claims that were not asked for stay there.

    Args:
        package: name of the package, as on its command line.
        claims: what to measure.
        scale: which arms of the claims.
        seeds: seeds 0 … seeds − 1 per arm; None for what each claim states.
        jobs: cells at a time; a worker uses its share of the cores.
        backend: "loky" (processes), "sequential", or a cluster: "dask" (the active client, else a local
            cluster) or "ray".
        folder: of cells and results; made if need be.
        progress: show a bar on a terminal.

    Returns:
        One row per claim, as :func:`metazoo.claims.judge` makes them.

    Raises:
        UserError: another sweep works in ``folder``; a cell failed (finished ones stay); a metric is NaN; the
            backend is not installed; ``folder`` cannot be written.
    """
    from tqdm import tqdm

    _check(claims, scale, seeds, jobs, backend)
    folder = Path(folder)
    with _lock(folder):
        target = folder / f"{scale}.json"
        kept = _kept_rows(target, package)
        around = environment.describe(package.replace("-", "_"))
        cells = [cell for claim in claims for cell in _cells(claim, scale, seeds or claim.seeds, folder)]
        missing = [cell for cell in cells if _stored(cell) is None]
        parent = os.getpid() if backend == "loky" else None
        tasks = _tasks(package, scale, missing, around, jobs, parent)
        bar = tqdm(
            total=len(cells),
            initial=len(cells) - len(missing),
            desc=f"{package} reproduce",
            unit="cell",
            disable=None if progress else True,
        )
        with bar:
            for finished in _run(tasks, jobs, backend):
                bar.update(finished)
        records = {cell.path: _stored(cell) for cell in cells}
        rows = []
        for claim in claims:
            of_claim = [(cell, records[cell.path]) for cell in cells if cell.claim is claim]
            for cell, record in of_claim:
                if record is None:
                    raise UserError(f"{cell}: {cell.path.name} vanished; run the sweep again")
            rows.append(judge(claim, [record for _, record in of_claim if record is not None]))
        fresh = {row["name"]: row for row in rows}
        merged = [fresh.pop(row["name"], row) for row in kept] + list(fresh.values())
        write_json(target, {"package": package, "scale": scale, "environment": around, "claims": merged})
    return rows


def _check(claims: Sequence[Claim], scale: str, seeds: int | None, jobs: int, backend: str) -> None:
    names = [claim.name for claim in claims]
    for claim in claims:
        if names.count(claim.name) > 1:
            raise UserError(f"two claims are named {claim.name!r}: rename one")
        if scale not in claim.arms:
            raise UserError(f"claim {claim.name!r} has no scale {scale!r}: one of {', '.join(claim.arms)}")
    if not claims:
        raise UserError("no claims to measure: name one, or all")
    for name, value in (("seeds", seeds), ("jobs", jobs)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}: give 1 or more")
    if backend not in BACKENDS:
        raise UserError(f"unknown backend {backend!r}: one of {', '.join(BACKENDS)}")
    needed = {"dask": "distributed", "ray": "ray"}.get(backend)
    if needed and importlib.util.find_spec(needed) is None:
        raise UserError(f"backend {backend!r} is not installed: run `pip install 'metazoo[{backend}]'`")


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Keep other sweeps out of ``folder``; the lock ends with the process, however it ends."""
    try:
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write in {folder}: {error.strerror}; choose another --output-dir") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"another sweep works in {folder}: wait for it, or choose another --output-dir") from error
        yield


def _kept_rows(target: Path, package: str) -> list[dict[str, Any]]:
    """The rows of an earlier sweep, read before anything is measured."""
    if not target.exists():
        return []
    results = read_json(target)
    if not isinstance(results, dict) or results.get("package") != package or "claims" not in results:
        raise UserError(f"{target} holds no results of {package}: choose another --output-dir")
    rows: list[dict[str, Any]] = results["claims"]
    return rows


def _cells(claim: Claim, scale: str, seeds: int, folder: Path) -> Iterator[_Cell]:
    for seed in range(seeds):  # seed by seed, so that an interrupted sweep holds whole pairs
        for arm, config in claim.arms[scale].items():
            name = f"{claim.name}-v{claim.version}-{arm}-seed{seed}-{config_hash(config)[:8]}.json"
            yield _Cell(claim, arm, seed, config, folder.resolve() / "cells" / name)


def config_hash(config: object) -> str:
    """SHA-256 of a config: its class's name and its fields as canonical JSON."""
    named = [type(config).__qualname__, config_to_dict(config)]
    text = json.dumps(named, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _stored(cell: _Cell) -> dict[str, Any] | None:
    """The finished cell, or None; a damaged one is named in a line and counts as missing."""
    if not cell.path.exists():
        return None
    wanted = {
        "claim": cell.claim.name,
        "version": cell.claim.version,
        "arm": cell.arm,
        "seed": cell.seed,
        "config": config_to_dict(cell.config),
    }
    try:
        record: dict[str, Any] = json.loads(cell.path.read_text(encoding="utf-8"))
        for key, value in wanted.items():
            if record[key] != value:
                raise ValueError(f"{key} is {record[key]!r}, not {value!r}")
        if not isinstance(record["metrics"], dict):
            raise ValueError("metrics is no object")
        float(record["seconds"]), record["git"]["revision"], record["git"]["dirty"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        cause = f"lacks {error}" if isinstance(error, KeyError) else error
        print(f"warning: {cell.path.name} is damaged ({cause}): measured again", file=sys.stderr)
        return None
    return record


def _tasks(
    package: str, scale: str, cells: Sequence[_Cell], around: Mapping[str, Any], jobs: int, parent: int | None
) -> list[_Task]:
    """One task per measurement: cells with the same measure, config and seed share it."""
    groups: dict[tuple[str, str, str, int], list[_Cell]] = {}
    for cell in cells:
        measure = cell.claim.measure
        key = (measure.__module__, measure.__qualname__, config_hash(cell.config), cell.seed)
        groups.setdefault(key, []).append(cell)
    return [
        _Task(
            measure=group[0].claim.measure,
            config=group[0].config,
            seed=group[0].seed,
            label=str(group[0]),
            records=[(cell.path, _record(package, scale, cell, around)) for cell in group],
            jobs=jobs,
            parent=parent,
        )
        for group in groups.values()
    ]


def _record(package: str, scale: str, cell: _Cell, around: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of a cell before it is measured."""
    options = ["--claim", cell.claim.name, "--scale", scale, "--seeds", str(cell.seed + 1)]
    return {
        "package": package,
        "claim": cell.claim.name,
        "version": cell.claim.version,
        "arm": cell.arm,
        "scale": scale,
        "seed": cell.seed,
        "config": config_to_dict(cell.config),
        "command": shlex.join([package, "reproduce", *options]),
        "versions": around["versions"],
        "git": around["git"],
        "tuning": cell.claim.tuning[cell.arm],
        "chance": cell.claim.chance,
    }


def _run(tasks: Sequence[_Task], jobs: int, backend: str) -> Iterator[int]:
    """Measure all tasks; yields the number of cells that each one filled, as it ends."""
    import joblib

    if not tasks:
        return
    try:
        with _cluster(backend, jobs), joblib.parallel_config(backend=backend, n_jobs=jobs):
            # ray's backend gives its results only all at once
            parallel = joblib.Parallel(batch_size=1, return_as="list" if backend == "ray" else "generator_unordered")
            yield from parallel(joblib.delayed(_measure)(task) for task in tasks)
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, most likely for want of memory: run again with fewer --jobs "
            "(finished cells stay)"
        ) from error


@contextlib.contextmanager
def _cluster(backend: str, jobs: int) -> Iterator[None]:
    """The cluster that ``backend`` needs; nothing for the local ones."""
    if backend == "dask":
        from distributed import Client, LocalCluster, get_client

        try:
            get_client()
        except ValueError:  # none is active
            with (
                LocalCluster(  # type: ignore[no-untyped-call]
                    n_workers=jobs, threads_per_worker=1, dashboard_address=None
                ) as cluster,
                Client(cluster),  # type: ignore[no-untyped-call]
            ):
                yield
            return
    elif backend == "ray":
        from ray.util.joblib import register_ray

        register_ray()
    yield


def _measure(task: _Task) -> int:
    """Measure in a worker and write the cells; returns how many.

    Raises:
        UserError: the measurement failed, with the cause in one line; its traceback lies beside the cell.
    """
    if task.parent is not None and task.parent != os.getpid():
        _leave_with(task.parent)
    failed = task.records[0][0].with_suffix(".traceback.txt")
    try:
        with _threads(task.jobs):
            environment.reset_peak_memory()
            started = time.perf_counter()
            metrics = task.measure(task.config, task.seed)
            seconds = time.perf_counter() - started
        plain = {name: _plain(value, name) for name, value in metrics.items()}
    except UserError as error:
        raise UserError(f"{task.label}: {_line(error)}") from error
    except Exception as error:
        failed.write_text(traceback.format_exc(), encoding="utf-8")
        cause = f"{type(error).__name__}: {_line(error)}"
        raise UserError(f"{task.label}: {cause} (traceback in cells/{failed.name})") from error
    for path, record in task.records:
        measured = {
            "metrics": plain,
            "seconds": round(seconds, 3),
            "peak_memory_mb": environment.peak_memory_mb(),
            "device": environment.device(),
        }
        write_json(path, record | measured)
    failed.unlink(missing_ok=True)
    return len(task.records)


@functools.cache  # once per worker
def _leave_with(parent: int) -> None:
    """End this worker when its sweep was killed: by itself it would go on with what is queued."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _threads(jobs: int) -> Iterator[None]:
    """Give torch this worker's share of the cores, or less where OMP_NUM_THREADS says so."""
    import joblib
    import torch

    before = torch.get_num_threads()
    asked = os.environ.get("OMP_NUM_THREADS", "")
    share = max(1, joblib.cpu_count() // jobs)
    torch.set_num_threads(min(share, int(asked)) if asked.isdigit() and int(asked) else share)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _plain(value: Any, where: str) -> Any:
    """What JSON can hold: arrays and tensors as lists, NaN refused."""
    import numpy as np
    import torch

    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"metric {where} is {value}: mend measure() so that it gives a finite number")
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise UserError(f"metric {where} is a {type(value).__name__}: give numbers, strings, or lists of them")


def _line(error: BaseException) -> str:
    """The message of ``error`` on one line of readable length."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:299]}…"
