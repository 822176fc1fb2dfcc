"""Fault tests, written once: each package runs them with its own small preset.

A run is started in a child of a fork server that has torch and the package imported, so that a kill and a restart
cost a fraction of a second. Use in a package's tests/test_faults.py::

    TRAIN = Training("mixer.train:train", Config(…tiny…))
    def test_killed_anywhere(tmp_path): killed_anywhere(TRAIN, tmp_path, draws=3)
"""

from __future__ import annotations

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.process
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from metazoo.errors import UserError
from metazoo.options import RunOptions

WAIT = 300.0  # seconds until a child counts as hung


@dataclass(frozen=True)
class Training:
    """How a test trains: "module:function" of (config, RunOptions), a tiny config, rows and checkpoints; ``preload``
    names modules that training imports late, so that the children find them imported."""

    target: str
    config: Any
    log_every: int = 1
    checkpoint_every: int = 5
    preload: tuple[str, ...] = ()

    def options(self, folder: Path, *, resume: bool = False) -> RunOptions:
        return RunOptions(
            output_dir=folder, resume=resume, log_every=self.log_every, checkpoint_every=self.checkpoint_every
        )


def _child(training: Training, options: RunOptions, errors: str, before: Callable[[], None] | None) -> None:
    """Body of the child: train; a user's error is one line in the file ``errors`` and exit status 2."""
    with Path(errors).open("w") as file:
        os.dup2(file.fileno(), 2)
    import torch

    torch.set_num_threads(1)
    if before is not None:
        before()
    module, function = training.target.split(":")
    try:
        getattr(importlib.import_module(module), function)(training.config, options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(2)


class Child:
    """One training process.

    Args:
        training: what to train.
        folder: run folder.
        resume: go on with it.
        before: runs in the child first (module-level function: plants a fault).
    """

    def __init__(
        self, training: Training, folder: Path, *, resume: bool = False, before: Callable[[], None] | None = None
    ) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch._dynamo", "metazoo.loop", training.target.split(":")[0], *training.preload]
        )
        self.errors = folder.parent / f"{folder.name}.stderr"
        self.folder = folder
        self.process = context.Process(
            target=_child, args=(training, training.options(folder, resume=resume), str(self.errors), before)
        )
        self.process.start()

    def wait(self) -> int:
        """Exit status (negative: killed by that signal)."""
        self.process.join(WAIT)
        if self.process.exitcode is None:
            self.process.kill()
            raise TimeoutError(f"training in {self.folder} did not end: {self.stderr()}")
        return self.process.exitcode

    def stderr(self) -> str:
        return self.errors.read_text() if self.errors.exists() else ""

    def wait_for_row(self, step: int) -> None:
        """Block until metrics.jsonl has ``step`` rows or the child has ended."""
        path = self.folder / "metrics.jsonl"
        end = time.monotonic() + WAIT
        while self.process.is_alive() and time.monotonic() < end:
            if path.exists() and path.read_bytes().count(b"\n") >= step:
                return
            time.sleep(0.0005)

    def kill(self, number: int = signal.SIGKILL) -> int:
        if self.process.pid is not None and self.process.is_alive():
            os.kill(self.process.pid, number)
        return self.wait()


def finished(training: Training, folder: Path, *, resume: bool = False) -> Path:
    """Train to the end in ``folder``."""
    child = Child(training, folder, resume=resume)
    status = child.wait()
    assert status == 0, f"exit status {status}: {child.stderr()}"
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one: Path, other: Path) -> None:
    """The last checkpoints (weights, optimizers, random states) and the rows are equal bit for bit."""
    from metazoo import checkpoint

    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    last, last_other = (checkpoint.listing(folder / "checkpoints")[0] for folder in (one, other))
    assert last.name == last_other.name
    assert (last / "state.json").read_bytes() == (last_other / "state.json").read_bytes(), "plain values or digests"
    assert (last / "state.safetensors").read_bytes() == (last_other / "state.safetensors").read_bytes(), "tensors"


def killed_anywhere(training: Training, tmp: Path, *, draws: int, seed: int = 0) -> None:
    """Faults 1, 2, 3: SIGKILL at ``draws`` random moments, resumed each time (every second draw killed once more,
    shortly after it resumed): weights, optimizer, random states, metrics and the sequence of ids equal those of the
    uninterrupted run, bit for bit, and no row stands twice."""
    whole = finished(training, tmp / "whole")
    total = len(rows(whole))
    rng = random.Random(seed)
    for draw in range(draws):
        folder = tmp / f"draw-{draw}"
        child = Child(training, folder)
        child.wait_for_row(rng.randrange(1, total))
        time.sleep(rng.random() * 0.005)  # somewhere inside a step or a checkpoint
        child.kill()
        if draw % 2:
            done = len(rows(folder)) if (folder / "metrics.jsonl").exists() else 0
            child = Child(training, folder, resume=True)
            child.wait_for_row(min(total - 1, done + rng.randrange(0, 4)))
            child.kill()
        finished(training, folder, resume=True)
        assert_same_run(whole, folder)
        shutil.rmtree(folder)


def _die_before_rename() -> None:
    original = Path.rename

    def rename(self: Path, target: Path) -> Path:
        if "step-00000010" in str(target):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, target)

    Path.rename = rename  # type: ignore[assignment, method-assign]


def killed_before_rename(training: Training, tmp: Path) -> None:
    """Fault 5: killed between write and rename of the second checkpoint; the first is used, nothing half is named."""
    from metazoo import checkpoint

    whole = finished(training, tmp / "whole")
    folder = tmp / "cut"
    assert Child(training, folder, before=_die_before_rename).wait() == -signal.SIGKILL
    assert [path.name for path in checkpoint.listing(folder / "checkpoints")] == ["step-00000005"]
    assert_same_run(whole, finished(training, folder, resume=True))


def _small_files() -> None:
    """Files above this size cannot be written, as on a full disk: the fault is real, in write(2)."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, 2_000))


def full_disk(training: Training, tmp: Path) -> None:
    """Fault 5: the disk is full while a checkpoint is written: one clear line, status 2, the last good one stays."""
    from metazoo import checkpoint

    whole = finished(training, tmp / "whole")
    folder = tmp / "full"
    child = Child(training, folder)
    child.wait_for_row(6)
    child.kill()
    before = [path.name for path in checkpoint.listing(folder / "checkpoints")]
    child = Child(training, folder, resume=True, before=_small_files)
    assert child.wait() == 2, child.stderr()
    assert_one_line(child.stderr(), "cannot write")
    assert [path.name for path in checkpoint.listing(folder / "checkpoints")] == before
    assert_same_run(whole, finished(training, folder, resume=True))


def damaged_checkpoints(training: Training, tmp: Path) -> None:
    """Fault 6: truncated, a byte flipped, or a file gone: named in one line and the checkpoint before it used; all
    damaged: status 2 and nothing overwritten."""
    from metazoo import checkpoint

    whole = finished(training, tmp / "whole")
    half = tmp / "half"
    child = Child(training, half)
    child.wait_for_row(12)
    child.kill()
    damages: dict[str, Callable[[Path], None]] = {"truncated": _truncate, "flipped": _flip, "gone": Path.unlink}
    for name, damage in damages.items():
        for file in ("state.safetensors", "state.json"):
            folder = tmp / f"{name}-{file}"
            shutil.copytree(half, folder)
            newest = checkpoint.listing(folder / "checkpoints")[0]
            damage(newest / file)
            child = Child(training, folder, resume=True)
            assert child.wait() == 0, child.stderr()
            assert newest.name in child.stderr()
            assert file in child.stderr()
            assert_same_run(whole, folder)
    folder = tmp / "all"
    shutil.copytree(half, folder)
    for path in checkpoint.listing(folder / "checkpoints"):
        _flip(path / "state.safetensors")
    before = _contents(folder)
    child = Child(training, folder, resume=True)
    assert child.wait() == 2
    assert "every checkpoint" in child.stderr()
    assert _contents(folder) == before


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) * 3 // 4] ^= 1
    path.write_bytes(bytes(data))


def _contents(folder: Path) -> dict[str, bytes]:
    kept = {"environment.json", ".lock"}
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in kept}


def asked_to_stop(training: Training, tmp: Path) -> None:
    """Fault 7: SIGTERM and Ctrl-C end with a checkpoint and status 143 and 130; resumed, the run is the same."""
    from metazoo import checkpoint

    whole = finished(training, tmp / "whole")
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130)):
        folder = tmp / f"signal-{number}"
        child = Child(training, folder)
        child.wait_for_row(7)
        assert child.kill(number) == status, child.stderr()
        steps = [row["step"] for row in rows(folder)]
        assert checkpoint.listing(folder / "checkpoints")[0].name == f"step-{steps[-1]:08d}"
        assert_same_run(whole, finished(training, folder, resume=True))


def second_process_refused(training: Training, tmp: Path) -> None:
    """Fault 13: two processes on one run folder; the second is refused in one line and the first goes on."""
    folder = tmp / "one"
    first = Child(training, folder)
    first.wait_for_row(1)
    assert first.process.pid is not None
    os.kill(first.process.pid, signal.SIGSTOP)
    try:
        second = Child(training, folder, resume=True)
        assert second.wait() == 2
        assert_one_line(second.stderr(), "another process works in")
    finally:
        os.kill(first.process.pid, signal.SIGCONT)
    assert first.wait() == 0, first.stderr()


def changed_config(training: Training, tmp: Path, **changes: Any) -> None:
    """Fault 10: resumed with another config: status 2, the field named, nothing changed."""
    folder = finished(training, tmp / "run")
    before = _contents(folder)
    child = Child(replace(training, config=replace(training.config, **changes)), folder, resume=True)
    assert child.wait() == 2
    for name in changes:
        assert_one_line(child.stderr(), name)
    assert _contents(folder) == before


def foreign_tensors(training: Training, tmp: Path) -> None:
    """Fault 10: a checkpoint with an extra, a missing, a wrong-shaped or a NaN tensor: status 2, the tensor named."""
    import torch
    from safetensors.torch import load_file

    run = finished(training, tmp / "run")
    newest = max((run / "checkpoints").iterdir())
    weights = load_file(newest / "state.safetensors")
    name = next(n for n, t in weights.items() if n.startswith("model.") and t.is_floating_point() and t.ndim)
    for fault in ("missing", "extra", "shape", "nan"):
        folder = tmp / fault
        shutil.copytree(run, folder)
        for path in (folder / "checkpoints").iterdir():
            if path.name != newest.name:
                shutil.rmtree(path)

        def change(tensors: dict[str, torch.Tensor], body: str, fault: str = fault) -> str:
            if fault == "missing":
                del tensors[name]
                return body.replace(f'{{"tensor":"{name}"}}', '{"value":null}')
            if fault == "extra":
                tensors[f"{name}2"] = tensors[name].clone()
                entry = re.compile(r'\["([^"]*)",\{"tensor":"' + re.escape(name) + r'"\}\]')
                return entry.sub(rf'\g<0>,["\g<1>2",{{"tensor":"{name}2"}}]', body)
            if fault == "shape":
                tensors[name] = torch.cat([tensors[name], tensors[name]])
            else:
                tensors[name].view(-1)[0] = float("nan")
            return body

        rewrite(folder / "checkpoints" / newest.name, change)
        child = Child(training, folder, resume=True)
        assert child.wait() == 2, f"{fault}: {child.stderr()}"
        assert name in child.stderr(), f"{fault}: {child.stderr()}"
        assert "Traceback" not in child.stderr()


def rewrite(path: Path, change: Callable[[dict[str, Any], str], str]) -> None:
    """Rewrite one checkpoint, digests included, as somebody who forges it would."""
    import hashlib

    from safetensors.torch import load_file, save_file

    tensors = load_file(path / "state.safetensors")
    head = json.loads((path / "state.json").read_text())
    body = change(tensors, head["body"])
    save_file(tensors, path / "state.safetensors")
    digests = {
        "state.safetensors": hashlib.sha256((path / "state.safetensors").read_bytes()).hexdigest(),
        "body": hashlib.sha256(body.encode()).hexdigest(),
    }
    (path / "state.json").write_text(json.dumps({"sha256": digests, "body": body}))


class Payload:
    """A pickle that would create ``marker`` if anything loaded it."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (self.marker, "w")


def pickles_are_not_loaded(training: Training, tmp: Path) -> None:
    """Fault 11: pickles in the run folder, also dressed as safetensors: the payload never runs, status 2."""
    import hashlib
    import pickle

    run = finished(training, tmp / "run")
    marker = tmp / "payload-ran"
    payload = pickle.dumps(Payload(marker))
    for path in (run / "checkpoints").iterdir():
        (path / "state.safetensors").write_bytes(payload)
        head = json.loads((path / "state.json").read_text())
        digests = {"state.safetensors": hashlib.sha256(payload).hexdigest(), "body": head["sha256"]["body"]}
        (path / "state.json").write_text(json.dumps({"sha256": digests, "body": head["body"]}))
        for name in ("state.pt", "optimizer.pkl", "pytorch_model.bin"):
            (path / name).write_bytes(payload)
    child = Child(training, run, resume=True)
    assert child.wait() == 2, child.stderr()
    assert "not a safetensors file" in child.stderr()
    assert not marker.exists()


def assert_one_line(text: str, part: str) -> None:
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    assert part in lines[0], text
    assert "Traceback" not in text


@contextlib.contextmanager
def nan_in_empty() -> Iterator[None]:
    """Fault 13: ``torch.empty`` gives NaN, so that a value read before it is written shows."""
    import torch

    before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before  # type: ignore[attr-defined]


def torchrun(processes: int, script: str, *arguments: str, timeout: float = WAIT) -> None:
    """Run ``script`` in ``processes`` gloo processes on this machine; raises AssertionError with their output."""
    import subprocess

    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*command, script, *arguments], capture_output=True, text=True, timeout=timeout, env=environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
