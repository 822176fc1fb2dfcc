"""Training state on disk: safetensors + JSON, with digests, written beside and renamed.

Accelerate's ``save_state`` writes pickles and goes on when a random state cannot be restored; this module does
neither. A checkpoint is a folder ``step-00000042`` with ``state.safetensors`` (every tensor) and ``state.json``
(everything else, and the SHA-256 of both).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from metazoo.errors import UserError

Tensors = dict[str, torch.Tensor]


class Stateful(Protocol):
    """What can be saved: modules, optimizers, schedulers and a package's own objects."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state_dict: Any, /) -> Any: ...


def _pack(value: Any, name: str, tensors: Tensors) -> Any:
    """Take the tensors out of a state dict; leave JSON that says where they were."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"items": [[key, _pack(item, f"{name}.{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]}
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{name} is a {type(value).__name__}: a checkpoint holds tensors and plain values only")


def _unpack(packed: Any, tensors: Tensors) -> Any:
    ((kind, value),) = packed.items()
    if kind == "tensor":
        return tensors[value]
    if kind == "items":
        return {key: _unpack(item, tensors) for key, item in value}
    if kind in ("list", "tuple"):
        items = [_unpack(item, tensors) for item in value]
        return tuple(items) if kind == "tuple" else items
    return value


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save(folder: Path, step: int, state: Mapping[str, Stateful], *, keep: int = 2) -> Path:
    """Save ``state`` after ``step`` steps and drop all but the last ``keep`` checkpoints.

    The checkpoint takes its final name only when it is complete and on disk.

    Raises:
        UserError: it cannot be written (disk full, no permission); the last good checkpoint stays.
    """
    tensors: Tensors = {}
    body = {name: _pack(part.state_dict(), name, tensors) for name, part in state.items()}
    final = folder / f"step-{step:08d}"
    beside = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        for leftover in folder.glob(".step-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)
        beside.mkdir(parents=True)
        weights = beside / "state.safetensors"
        save_file(tensors, weights)
        text = json.dumps({"step": step, "state": body}, separators=(",", ":"))
        digests = {"state.safetensors": _sha256(weights), "body": hashlib.sha256(text.encode()).hexdigest()}
        (beside / "state.json").write_text(json.dumps({"sha256": digests, "body": text}))
        for path in (weights, beside / "state.json", beside):
            _fsync(path)
        if final.exists():
            shutil.rmtree(final)
        beside.rename(final)
        _fsync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        good = [path.name for path in listing(folder)]
        raise UserError(
            f"cannot write the checkpoint of step {step} in {folder}: {getattr(error, 'strerror', None) or error}; "
            f"free space and add --resume (last good checkpoint: {good[0] if good else 'none'})"
        ) from error
    for old in listing(folder)[keep:]:
        shutil.rmtree(old)
    return final


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def listing(folder: Path) -> list[Path]:
    """The complete checkpoints in ``folder``, the newest first."""
    return sorted((path for path in folder.glob("step-*") if path.is_dir()), reverse=True)


def read(path: Path) -> tuple[int, dict[str, Any]]:
    """The step and the state dicts of one checkpoint.

    Raises:
        UserError: a file is missing, truncated or altered, or a tensor holds NaN; the message names it.
    """
    weights, body_file = path / "state.safetensors", path / "state.json"
    try:
        head = json.loads(body_file.read_text(encoding="utf-8"))
        digests, text = head["sha256"], head["body"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{body_file} is missing or damaged: {error}") from error
    if not weights.is_file():
        raise UserError(f"{weights} is missing")
    if not isinstance(text, str) or hashlib.sha256(text.encode()).hexdigest() != digests.get("body"):
        raise UserError(f"{body_file} is damaged: its digest does not match")
    if _sha256(weights) != digests.get("state.safetensors"):
        raise UserError(f"{weights} is damaged: its digest does not match")
    tensors = read_tensors(weights)
    body = json.loads(text)
    return int(body["step"]), {name: _unpack(part, tensors) for name, part in body["state"].items()}


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors file; nothing in it is executed.

    Raises:
        UserError: the file is no safetensors file (a pickle in disguise, say), or a tensor holds NaN or infinity.
    """
    tensors: Tensors = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a mapping)
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a safetensors file ({error}): only safetensors are loaded") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{path}: tensor {name} holds NaN or infinity; use an earlier checkpoint")
    return tensors


def restore(folder: Path, state: Mapping[str, Stateful], *, say: Any = print) -> int:
    """Load the newest good checkpoint in ``folder`` into ``state`` and return its step (0: there is none).

    A damaged checkpoint is named in one line and the one before it is used.

    Raises:
        UserError: all checkpoints are damaged; or one fits the model no more (a tensor of another shape, missing
            or left over, named in the message).
    """
    found = listing(folder)
    for path in found:
        try:
            step, saved = read(path)
        except UserError as error:
            say(f"{error}; using the checkpoint before it")
            continue
        _check_fits(path, saved, state)
        for name, part in state.items():
            part.load_state_dict(saved[name])
        return step
    if found:
        raise UserError(f"every checkpoint in {folder} is damaged: restore one, or choose another --output-dir")
    return 0


def _check_fits(path: Path, saved: Mapping[str, Any], state: Mapping[str, Stateful]) -> None:
    """Compare names and shapes of all tensors before anything is loaded."""
    for name in state:
        if name not in saved:
            raise UserError(f"{path} lacks the part {name!r}: it was made by another version or method")
    for name, part in state.items():
        ours: Tensors = {}
        theirs: Tensors = {}
        _pack(part.state_dict(), name, ours)
        _pack(saved[name], name, theirs)
        for key in sorted(set(ours) | set(theirs)):
            if key in theirs and key not in ours and not isinstance(part, (torch.nn.Module, TensorState)):
                continue  # optimizers and gates fill their state as they go; modules have all of it from the start
            if key not in ours or key not in theirs:
                kind = "lacks" if key in ours else "has an unknown"
                raise UserError(f"{path} {kind} tensor {key}: it belongs to another model")
            if ours[key].shape != theirs[key].shape:
                raise UserError(
                    f"{path}: tensor {key} has shape {tuple(theirs[key].shape)}, the model wants "
                    f"{tuple(ours[key].shape)}: resume with the config that made it"
                )


class RandomState:
    """The random states of Python, NumPy and torch (all devices), as plain numbers and tensors."""

    def state_dict(self) -> dict[str, Any]:
        import random

        import numpy as np

        version, internal, gauss = random.getstate()
        name, keys, position, has_gauss, cached = cast("tuple[str, Any, int, int, float]", np.random.get_state())  # noqa: NPY002
        return {
            "python": [version, torch.tensor(internal, dtype=torch.int64), gauss],
            "numpy": [name, torch.from_numpy(keys.astype("int64")), position, has_gauss, cached],
            "torch": torch.get_rng_state(),
            "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        import random

        import numpy as np

        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal.tolist()), gauss))
        name, keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), position, has_gauss, cached))  # noqa: NPY002
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda"])


class GeneratorState:
    """A torch.Generator of the package's own, saved with the rest."""

    def __init__(self, generator: torch.Generator) -> None:
        self.generator = generator

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"state": self.generator.get_state()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        self.generator.set_state(state["state"])


class TensorState:
    """Tensors that are no module's: contexts, proximal anchors. Loaded in place."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def state_dict(self) -> Tensors:
        return dict(self.tensors)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state[name])
