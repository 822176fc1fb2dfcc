"""The training loop on Accelerate: steps, rows, checkpoints, signals. What a step does is the package's own."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.util
import math
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm

from metazoo import checkpoint
from metazoo.environment import describe
from metazoo.errors import UserError
from metazoo.options import RunOptions
from metazoo.runfolder import RunFolder, config_to_dict, read_json, read_metrics, write_json


class Learner(Protocol):
    """What is trained. ``step`` does one optimizer step; ``state`` names everything that a resumed run needs."""

    def step(self, step: int) -> Mapping[str, Any]:
        """Train once; ``step`` counts from 0. Returns numbers, 0-d tensors or lists for metrics.jsonl."""

    def state(self) -> Mapping[str, checkpoint.Stateful]: ...


class Stopped(SystemExit):
    """The run was asked to stop (SIGTERM: 143, Ctrl-C: 130) and has saved a checkpoint."""


def prepare(options: RunOptions, *, seed: int, precision: str | None = None) -> Accelerator:
    """The Accelerator of this process, with every random generator seeded.

    All processes draw the same random numbers; what differs by process is derived from its rank.

    Raises:
        UserError: a tracker or the precision is not available here.
    """
    for tracker in options.report_to:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"--report-to {tracker}: not installed; run `pip install {tracker}` or leave it out")
    # under torchrun without an accelerator, Accelerate joins the processes (gloo) only when told to use the CPU
    cpu = "LOCAL_RANK" in os.environ and not torch.accelerator.is_available()
    try:
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision=precision,
            log_with=list(options.report_to) or None,
            project_dir=str(options.output_dir) if options.report_to else None,
        )
    except ValueError as error:
        raise UserError(f"cannot start: {' '.join(str(error).split())}") from error
    set_seed(seed)
    return accelerator


def share(items: Sequence[int] | torch.Tensor, accelerator: Accelerator, parts: int = 1) -> list[Any]:
    """Split one global batch: over the processes, then into ``parts`` for gradient accumulation.

    Each process backpropagates the sum of its items' losses divided by the global count; :func:`sum_gradients`
    then gives every process the gradient of the whole batch, whatever the split.
    """
    mine = items[accelerator.process_index :: accelerator.num_processes]
    return [mine[i::parts] for i in range(parts) if len(mine[i::parts])]


def sum_gradients(parameters: Sequence[torch.Tensor], accelerator: Accelerator) -> None:
    """Add the gradients of all processes, in one message. Nothing to do on one process."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten() for grad in grads])
    flat = accelerator.reduce(flat, reduction="sum")
    for grad, summed in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(summed.view_as(grad))


def fit(
    learner: Learner,
    folder: RunFolder,
    accelerator: Accelerator,
    *,
    steps: int,
    options: RunOptions,
    name: str,
) -> list[dict[str, Any]]:
    """Train ``learner`` for ``steps`` steps, from the last checkpoint if ``options.resume``.

    Rows go to metrics.jsonl every ``options.log_every`` steps, checkpoints every ``options.checkpoint_every`` and
    at the end. Killed at any moment and resumed, a run on CPU ends with the same bits. The caller ends with
    ``accelerator.end_training()``.

    Returns:
        All rows of metrics.jsonl.

    Raises:
        UserError: a number in a row is NaN or infinite, or the disk is full; the last good checkpoint stays.
        Stopped: after SIGTERM or Ctrl-C, with a checkpoint saved.
    """
    accelerator.wait_for_everyone()  # the main process has checked the folder
    state = {**learner.state(), "random": checkpoint.RandomState()}
    first = 0
    if options.resume:
        first = checkpoint.restore(folder.checkpoints, state, say=_say if folder.main else lambda line: None)
        folder.rewind(first)
    session = _Session(folder, accelerator)
    if options.report_to:
        accelerator.init_trackers(name, config=_flat(config_to_dict(folder.config)))
    saved = first if first else -1
    progress = tqdm(total=steps, initial=first, desc=name, unit="step", disable=None if folder.main else True)
    with _signals() as received, progress:
        for step in range(first, steps):
            values = learner.step(step)
            done = step + 1
            progress.update()
            if done % options.log_every == 0 or done == steps:
                row = {"step": done, **{key: _plain(value) for key, value in values.items()}}
                _check_finite(row, folder)
                folder.log(row)
                accelerator.log({k: v for k, v in row.items() if isinstance(v, float)}, step=done)
                if isinstance(row.get("loss"), float):
                    progress.set_postfix(loss=f"{row['loss']:.3g}", refresh=False)
            stop = bool(received) if accelerator.num_processes == 1 else _any(bool(received), accelerator, done)
            if done % options.checkpoint_every == 0 or done == steps or stop:
                _save(folder, done, state, options.keep)
                saved = done
                accelerator.wait_for_everyone()
            if stop:
                session.end()
                number = received[0] if received else signal.SIGTERM
                progress.close()
                if folder.main:
                    _say(f"stopped after step {done}: add --resume to go on")
                raise Stopped(128 + number)
    if saved < 0:  # nothing was left to do, or no steps were asked for
        _save(folder, steps, state, options.keep)
    session.end()
    return list(read_metrics(folder.metrics_path)) if folder.metrics_path.exists() else []


def _save(folder: RunFolder, done: int, state: Mapping[str, checkpoint.Stateful], keep: int) -> None:
    """A checkpoint after ``done`` steps, of the main process; all call it."""
    if folder.main:
        checkpoint.save(folder.checkpoints, done, state, keep=keep)
    else:
        for part in state.values():
            part.state_dict()  # sharded parts gather in it, which takes all processes


class _Session:
    """Notes in environment.json when and where (part of) the run was trained."""

    def __init__(self, folder: RunFolder, accelerator: Accelerator) -> None:
        self.folder, self.started = folder, time.monotonic()
        path = folder.path / "environment.json"
        self.sessions = read_json(path)["sessions"] if path.exists() and folder.main else []
        self.sessions.append(
            {
                "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
                "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
                "device": str(accelerator.device),
                "processes": accelerator.num_processes,
                "precision": accelerator.mixed_precision,
                "seconds": None,
            }
        )
        self.described = describe()
        if folder.main:
            write_json(path, {**self.described, "sessions": self.sessions})

    def end(self) -> None:
        self.sessions[-1]["seconds"] = round(time.monotonic() - self.started, 3)
        if self.folder.main:
            write_json(self.folder.path / "environment.json", {**self.described, "sessions": self.sessions})


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect SIGTERM and SIGINT while the loop runs, so that it stops between two steps."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: types.FrameType | None) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: stop at once, the last checkpoint is good
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _any(flag: bool, accelerator: Accelerator, done: int) -> bool:
    """Whether any process was asked to stop; asked only every tenth step, as it is a message to all."""
    if done % 10:
        return False
    number = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(number, reduction="sum").item() > 0)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.item() if value.ndim == 0 else value.tolist()
    return value


def _check_finite(row: Mapping[str, Any], folder: RunFolder) -> None:
    for key, value in row.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(
                f"{key} became {value} at step {row['step']} in {folder.path}: lower the learning rate, or look at "
                "the data (the last good checkpoint stays)"
            )


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """Trackers take numbers, strings and booleans only."""
    return {k: v if isinstance(v, (int, float, str, bool)) else str(v) for k, v in config.items()}


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def default_folder(name: str, preset: str) -> Path:
    """Where a run goes when no --output-dir is given."""
    return Path("runs") / f"{name}-{preset}"


def with_folder(options: RunOptions, path: Path) -> RunOptions:
    """The same options with ``path`` as output folder, unless one was given."""
    return options if options.output_dir else dataclasses.replace(options, output_dir=path)
