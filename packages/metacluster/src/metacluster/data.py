"""Data of MetaCluster: digits in the package, image sets in the hub's and the original formats, equations, own files.

Everything ends in a `Dataset`. Images are scaled to [-1, 1], the range of the B-splines; columns of your own files too.
"""

from __future__ import annotations

import csv
import gzip
import io
import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo.data import check_finite, find, load_npz
from metazoo.errors import UserError

from metacluster.config import Config

MOST_CLASSES = 20  # more distinct whole numbers are a quantity
GENERATED = ("exp-sine", "sine-sum")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test examples.

    x: float32 [N, columns] or images [N, C, height, width]; y: classes int64 [N], or standardised targets float32
    [N, 1] (target = y · target_std + target_mean).
    """

    name: str
    x_train: torch.Tensor
    y_train: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    classes: tuple[str, ...] | None
    """names of the classes; None for a regression"""
    shape: tuple[int, ...]
    """of one example"""
    target_mean: float = 0.0
    target_std: float = 1.0


@dataclass(frozen=True)
class _Images:
    """A set of images in the hub's Parquet schema."""

    hub: str
    files: tuple[str, str]
    image: str
    label: str
    shape: tuple[int, int, int]
    classes: int


IMAGES = {
    "mnist": _Images("ylecun/mnist", ("mnist/train-00000-of-00001.parquet", "mnist/test-00000-of-00001.parquet"),
                     "image", "label", (1, 28, 28), 10),
    "cifar10": _Images("uoft-cs/cifar10", ("plain_text/train-00000-of-00001.parquet",
                       "plain_text/test-00000-of-00001.parquet"), "img", "label", (3, 32, 32), 10),
    "cifar100": _Images("uoft-cs/cifar100", ("cifar100/train-00000-of-00001.parquet",
                        "cifar100/test-00000-of-00001.parquet"), "img", "fine_label", (3, 32, 32), 100),
}  # fmt: skip
NAMES = ("mnist14", "digits", *IMAGES, "kmnist", *GENERATED)


def load(config: Config) -> Dataset:
    """The data set that ``config`` names, cut to its ``train_size``.

    Raises:
        UserError: unknown name, missing or damaged files, or numbers that cannot be learned from; one line says where.
    """
    name = config.dataset
    if name.endswith((".csv", ".npz")):
        found = _own(Path(name), config)
    elif name == "mnist14":
        found = _mnist14()
    elif name == "digits":
        found = _digits()
    elif name in IMAGES:
        found = _parquet_images(name, config.data_dir)
    elif name == "kmnist":
        found = _kmnist(config.data_dir)
    elif name in GENERATED:
        found = equation(name, config.dimension, seed=config.seed)
    else:
        raise UserError(f"unknown data set {name!r}: one of {', '.join(NAMES)}, or the path of a .csv or .npz")
    if config.train_size is None:
        return found
    return replace(found, x_train=found.x_train[: config.train_size], y_train=found.y_train[: config.train_size])


def _scaled(images: np.ndarray) -> torch.Tensor:
    """uint8 0 … 255 to float32 −1 … 1."""
    return torch.from_numpy(images).float().div_(127.5).sub_(1)


def _classes(labels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.array(labels, dtype=np.int64))


def _mnist14() -> Dataset:
    """8 000 training and 2 000 test digits of MNIST at 14 x 14 (mnist14.LICENSE.txt says from where)."""
    stored = load_npz(Path(__file__).with_name("mnist14.npz"), ["x_train", "y_train", "x_test", "y_test"])
    x_train, x_test = (_scaled(stored[key]).unsqueeze(1) for key in ("x_train", "x_test"))
    y_train, y_test = (_classes(stored[key]) for key in ("y_train", "y_test"))
    return Dataset("mnist14", x_train, y_train, x_test, y_test, tuple("0123456789"), (1, 14, 14))


def _digits() -> Dataset:
    """scikit-learn's 8 x 8 digits, 1 437 to train and 360 to test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    images = (x.reshape(-1, 1, 8, 8) / 8 - 1).astype(np.float32)
    parts = train_test_split(images, y, test_size=360, stratify=y, random_state=0)
    x_train, x_test = (torch.from_numpy(part) for part in parts[:2])
    return Dataset("digits", x_train, _classes(parts[2]), x_test, _classes(parts[3]), tuple("0123456789"), (1, 8, 8))


def equation(name: str, dimension: int, *, seed: int = 0, train: int = 20_000, test: int = 5_000) -> Dataset:
    """Points of a function of ``dimension`` variables x_i ~ U(−1, 1).

    exp-sine: f = exp((1/d) Σ sin²(π x_i / 2)), the same in every variable. sine-sum: f = Σ a_i sin(ω_i x_i) with
    a ~ N(0, 1), ω ~ U(1, 6) drawn from the seed. Inputs are given standardised (times √3), targets too.
    """
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (train + test, dimension))
    if name == "exp-sine":
        y = np.exp((np.sin(np.pi * x / 2) ** 2).mean(1))
    else:
        amplitude, omega = rng.standard_normal(dimension), rng.uniform(1, 6, dimension)
        y = (amplitude * np.sin(omega * x)).sum(1)
    return _regression(name, x[:train] * math.sqrt(3), y[:train], x[train:] * math.sqrt(3), y[train:])


def _regression(name: str, x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray, y_test: np.ndarray) -> Dataset:
    """Targets standardised by the training ones."""
    mean, std = float(y_train.mean()), float(y_train.std())
    if not std > 0:
        raise UserError(f"{name}: all training targets are {mean:g}: there is nothing to regress")
    parts = [torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)) for part in (x_train, x_test)]
    targets = [torch.from_numpy(((y - mean) / std).astype(np.float32)[:, None]) for y in (y_train, y_test)]
    return Dataset(name, parts[0], targets[0], parts[1], targets[1], None, tuple(parts[0].shape[1:]), mean, std)


def _parquet_images(name: str, data_dir: str | None) -> Dataset:
    kind = IMAGES[name]
    try:
        paths = _both(name, ("train.parquet", "test.parquet"), data_dir)
    except UserError as local:
        if data_dir is not None and not Path(data_dir).is_dir():
            raise
        try:
            paths = _both(name, kind.files, data_dir, hub_id=kind.hub)
        except UserError as error:
            raise UserError(f"{local}; {error}") from error
    (x_train, y_train), (x_test, y_test) = (_read_parquet(path, kind) for path in paths)
    names = tuple(map(str, range(kind.classes)))
    return Dataset(name, _scaled(x_train), _classes(y_train), _scaled(x_test), _classes(y_test), names, kind.shape)


def _both(name: str, files: tuple[str, str], data_dir: str | None, hub_id: str | None = None) -> list[Path]:
    folder = find(name, files, data_dir=data_dir, hub_id=hub_id)
    return [folder / file for file in files]


def _read_parquet(path: Path, kind: _Images) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, C, height, width] and labels [N]."""
    try:
        import pyarrow
        import pyarrow.parquet
        from PIL import Image, UnidentifiedImageError
    except ImportError as error:
        raise UserError(
            f"{path.name} is Parquet with images, and {error.name} is missing: "
            "pip install 'metazoo-metacluster[images]'"
        ) from error

    try:
        table = pyarrow.parquet.read_table(path, columns=[kind.image, kind.label])
    except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{path}: unreadable ({reason}): fetch it again") from error
    if set(table.column_names) != {kind.image, kind.label}:
        raise UserError(f"{path}: wants the columns {kind.image}, {kind.label}: give the hub's file")
    channels, height, width = kind.shape
    images = np.empty((len(table), height, width, channels), dtype=np.uint8)
    for row, entry in enumerate(table[kind.image].to_pylist()):
        try:
            picture = Image.open(io.BytesIO(entry["bytes"])).convert("L" if channels == 1 else "RGB")
            pixels = np.asarray(picture)
        except (UnidentifiedImageError, OSError, TypeError, KeyError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: the image in row {row} cannot be decoded ({type(error).__name__})") from error
        if pixels.shape[:2] != (height, width):
            raise UserError(
                f"{path}: row {row} has {pixels.shape[1]} x {pixels.shape[0]} pixels, not {width} x {height}"
            )
        images[row] = pixels.reshape(height, width, channels)
    labels = np.asarray(table[kind.label])
    if len(labels) == 0:
        raise UserError(f"{path}: no rows: fetch it again")
    if labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= kind.classes:
        raise UserError(f"{path}: column {kind.label} must hold 0 … {kind.classes - 1}")
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels


def _kmnist(data_dir: str | None) -> Dataset:
    """Kuzushiji-MNIST; where the training images are absent, 8 000 of the test images train and 2 000 test."""
    kinds = ("images-idx3-ubyte.gz", "labels-idx1-ubyte.gz")
    test = find("kmnist", [f"t10k-{kind}" for kind in kinds], data_dir=data_dir)
    x, y = (_read_idx(test / f"t10k-{kind}") for kind in kinds)
    if all((test / f"train-{kind}").is_file() for kind in kinds):
        x_train, y_train = (_read_idx(test / f"train-{kind}") for kind in kinds)
        x_test, y_test = x, y
    else:
        x_train, y_train, x_test, y_test = x[:8000], y[:8000], x[8000:], y[8000:]
    for images, labels in ((x_train, y_train), (x_test, y_test)):
        if len(images) != len(labels):
            raise UserError(f"{test}: {len(images)} images, but {len(labels)} labels: fetch the set again")
    parts = [_scaled(part).unsqueeze(1) for part in (x_train, x_test)]
    return Dataset("kmnist", parts[0], _classes(y_train), parts[1], _classes(y_test), tuple("0123456789"), (1, 28, 28))


def _read_idx(path: Path) -> np.ndarray:
    """An idx file of bytes: magic 0, 0, 8, dimensions; sizes, big-endian; data."""
    try:
        raw = gzip.decompress(path.read_bytes())
        if raw[:3] != b"\x00\x00\x08":
            raise ValueError("no idx file of bytes")
        sizes = struct.unpack_from(f">{raw[3]}I", raw, 4)
        return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * raw[3]).reshape(sizes).copy()
    except (OSError, EOFError, ValueError, IndexError, struct.error, zlib.error) as error:
        raise UserError(f"{path}: truncated or no idx file ({error}): fetch it again") from error


def _own(path: Path, config: Config) -> Dataset:
    """The user's own .csv or .npz."""
    if not path.is_file():
        raise UserError(f"{path}: no such file: check --dataset")
    if path.suffix == ".csv":
        x, y, where = *_read_csv(path, config.target), str(path)
        return from_arrays(x, y, task=config.task, name=where)
    with np.load(path) if _is_npz(path) else _refuse(path) as stored:
        names = stored.files
    arrays = load_npz(path, ["x", "y", *(key for key in ("x_test", "y_test") if key in names)])
    return from_arrays(
        arrays["x"], arrays["y"], arrays.get("x_test"), arrays.get("y_test"), task=config.task, name=str(path)
    )


def _is_npz(path: Path) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)


def _refuse(path: Path) -> Any:
    raise UserError(f"{path}: not an .npz file (truncated, or of another format): write it with numpy.savez")


def _read_csv(path: Path, target: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Columns of features, float64, and the target column as text or numbers."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: no CSV ({error}): save it again") from error
    if len(rows) < 3:
        raise UserError(f"{path}: {max(0, len(rows) - 1)} rows of data: give a header line and at least 2 rows")
    header, body = rows[0], rows[1:]
    if len(header) < 2:
        raise UserError(f"{path}: one column only: give features and a target, separated by commas")
    if target is not None and target not in header:
        raise UserError(f"{path} has no column {target!r}: --target must be one of {', '.join(header)}")
    goal = len(header) - 1 if target is None else header.index(target)
    features = [i for i in range(len(header)) if i != goal]
    x = np.empty((len(body), len(features)))
    for number, row in enumerate(body, start=2):
        if len(row) != len(header):
            raise UserError(f"{path} line {number}: {len(row)} values under {len(header)} columns: mend the line")
        for j, i in enumerate(features):
            try:
                x[number - 2, j] = float(row[i])
            except ValueError as error:
                raise UserError(
                    f"{path} line {number}, column {header[i]}: {row[i]!r} is no number: encode or remove the column"
                ) from error
        if not np.isfinite(x[number - 2]).all():
            bad = header[features[int(np.argmin(np.isfinite(x[number - 2])))]]
            raise UserError(f"{path} line {number}, column {bad}: not a finite number: remove or replace it")
    values = [row[goal] for row in body]
    texts = [number for number, value in enumerate(values, start=2) if not _is_number(value)]
    if not texts:
        return x, np.array([float(value) for value in values])
    if 2 * len(texts) < len(values):
        raise UserError(
            f"{path} line {texts[0]}, column {header[goal]}: {values[texts[0] - 2]!r} among numbers: fill in or remove "
            "the line"
        )
    return x, np.array(values)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def from_arrays(
    x: np.ndarray,
    y: np.ndarray,
    x_test: np.ndarray | None = None,
    y_test: np.ndarray | None = None,
    *,
    task: str = "auto",
    name: str = "arrays",
) -> Dataset:
    """A Dataset of your own arrays; without a test part every fifth example (by a fixed draw) becomes it.

    Args:
        x: [N, columns], scaled to [−1, 1] by the training columns' least and greatest; or images [N, C, height, width],
            taken as they are (uint8 are scaled). y: [N]. task: auto takes text, and up to 20 distinct whole numbers, as
            classes.

    Raises:
        UserError: shapes that do not fit, NaN, one class only, a class that the training part lacks.
    """
    if x.ndim not in (2, 4) or len(x) < 2 or y.ndim != 1 or len(x) != len(y):
        raise UserError(
            f"{name}: x {list(x.shape)} and y {list(y.shape)} do not fit: give x [N, columns] or "
            "[N, C, height, width], y [N], and at least 2 examples"
        )
    if (x_test is None) != (y_test is None):
        raise UserError(f"{name}: give both x_test and y_test, or neither")
    numeric = y.dtype.kind in "fiub"
    for part, label in ((x, "x"), (x_test, "x_test"), (y, "y"), (y_test, "y_test")):
        if part is None:
            continue
        if part.dtype.kind not in "fiub" and (numeric or not label.startswith("y")):
            raise UserError(f"{name}: {label} holds {part.dtype}, not numbers: encode it")
        if part.dtype.kind == "f":
            check_finite(part, f"{name}, {label}")
    whole = numeric and bool((y == np.round(y)).all())
    few = len(np.unique(y)) <= MOST_CLASSES
    kind = task if task != "auto" else ("classification" if not numeric or (whole and few) else "regression")
    if kind == "regression" and not numeric:
        raise UserError(f"{name}: the target {y[0]!r} is text, which cannot be regressed: use --task classification")
    if kind == "classification" and numeric and y_test is not None:
        unseen = np.setdiff1d(y_test, y)  # before 0.5 would become class 0
        if len(unseen):
            raise UserError(f"{name}: class {unseen[0]} is in the test part only: train on it too")
    if kind == "classification" and whole:
        y = y.astype(np.int64)
        y_test = None if y_test is None else y_test.astype(np.int64)
    if x_test is None or y_test is None:
        x, y, x_test, y_test = _split(x, y, stratify=kind == "classification")
    if x_test.shape[1:] != x.shape[1:] or len(x_test) != len(y_test) or y_test.ndim != 1:
        raise UserError(
            f"{name}: x_test {list(x_test.shape)} and y_test {list(y_test.shape)} do not fit x {list(x.shape)}"
        )
    if x.dtype == np.uint8 and x.ndim == 4:
        train, test = x / 127.5 - 1, x_test / 127.5 - 1
    elif x.ndim == 4:
        train, test = x, x_test
    else:
        columns = [part.astype(np.float64) for part in (x, x_test)]  # small integers would wrap
        low, high = columns[0].min(0), columns[0].max(0)
        span = np.where(high > low, high - low, 1.0)
        train, test = (np.where(high > low, 2 * (part - low) / span - 1, 0.0) for part in columns)
    if kind == "regression":
        return _regression(name, train, y.astype(np.float64), test, y_test.astype(np.float64))
    labels = np.unique(y)
    if len(labels) < 2:
        raise UserError(f"{name}: one class only ({labels[0]}): there is nothing to tell apart")
    unseen = np.setdiff1d(y_test, labels)
    if len(unseen):
        raise UserError(f"{name}: class {unseen[0]} is in the test part only: train on it too")
    inputs = [torch.from_numpy(np.ascontiguousarray(part, dtype=np.float32)) for part in (train, test)]
    targets = [_classes(np.searchsorted(labels, part)) for part in (y, y_test)]
    return Dataset(
        name, inputs[0], targets[0], inputs[1], targets[1], tuple(map(str, labels)), tuple(inputs[0].shape[1:])
    )


def _split(x: np.ndarray, y: np.ndarray, *, stratify: bool) -> tuple[np.ndarray, ...]:
    """80 to 20, by a fixed draw; the shares of the classes kept where each has two examples."""
    from sklearn.model_selection import train_test_split

    enough = stratify and np.unique(y, return_counts=True)[1].min() >= 2 and len(y) >= 5 * len(np.unique(y))
    parts: Sequence[np.ndarray] = train_test_split(x, y, test_size=0.2, random_state=0, stratify=y if enough else None)
    return parts[0], parts[2], parts[1], parts[3]
