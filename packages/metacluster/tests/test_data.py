"""Data: the set in the package, files of the real formats, equations against their closed forms, what is refused."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from metacluster import data
from metacluster.config import Config
from metazoo.errors import UserError
from PIL import Image


def load(dataset: str, **changes: Any) -> data.Dataset:
    return data.load(Config(dataset=dataset, **changes))


def png(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def parquet(path: Path, images: list[Any], labels: list[int], image: str = "image", label: str = "label") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.table({image: images, label: labels}), path)


def idx(path: Path, array: np.ndarray) -> None:
    head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


def test_mnist14() -> None:
    """8 000 + 2 000 digits, as many of each, in [-1, 1]; train_size takes the first."""
    found = load("mnist14")
    assert found.x_train.shape == (8000, 1, 14, 14)
    assert found.x_test.shape == (2000, 1, 14, 14)
    assert torch.bincount(found.y_train).tolist() == [800] * 10
    assert torch.bincount(found.y_test).tolist() == [200] * 10
    assert found.x_train.min() == -1
    assert found.x_train.max() == 1
    few = load("mnist14", train_size=7)
    assert torch.equal(few.x_train, found.x_train[:7])
    assert len(few.x_test) == 2000


def test_digits() -> None:
    """A fixed split of all 1 797."""
    one, two = load("digits"), load("digits", seed=5)
    assert len(one.x_train) + len(one.x_test) == 1797
    assert torch.equal(one.x_test, two.x_test)
    assert one.x_train.abs().max() == 1


@pytest.mark.parametrize("dimension", [1, 10])
def test_equations(dimension: int) -> None:
    """Targets are the closed forms of the inputs, up to the stated mean and deviation."""
    found = load("exp-sine", dimension=dimension)
    x = found.x_test.double() / 3**0.5
    y = torch.exp((torch.sin(torch.pi * x / 2) ** 2).mean(1, keepdim=True))
    assert torch.allclose(found.y_test.double() * found.target_std + found.target_mean, y, atol=1e-5)
    assert found.x_train.shape == (20_000, dimension)
    assert found.x_train.std().item() == pytest.approx(1, abs=0.01)
    sines = load("sine-sum", dimension=dimension, seed=3)
    rng = np.random.default_rng(3)
    points = rng.uniform(-1, 1, (25_000, dimension))
    a, omega = rng.standard_normal(dimension), rng.uniform(1, 6, dimension)
    truth = (a * np.sin(omega * points)).sum(1)[20_000:]
    assert np.allclose(sines.y_test[:, 0] * sines.target_std + sines.target_mean, truth, atol=1e-5)
    assert not torch.equal(load("sine-sum", dimension=dimension, seed=4).y_test, sines.y_test)


@pytest.mark.parametrize("hub", [False, True])
def test_images_in_the_hubs_schema(tmp_path: Path, hub: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parquet with encoded images, under the local or the hub's own file names, by --data-dir or METAZOO_DATA."""
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 28, 28), dtype=np.uint8)
    names = data.IMAGES["mnist"].files if hub else ("train.parquet", "test.parquet")
    for name in names:
        parquet(tmp_path / "mnist" / name, [png(p) for p in pixels], [3, 1, 4, 1])
    found = load("mnist", data_dir=str(tmp_path))
    assert torch.allclose(found.x_train[:, 0], torch.from_numpy(pixels) / 127.5 - 1)
    assert found.y_test.tolist() == [3, 1, 4, 1]
    monkeypatch.setenv("METAZOO_DATA", str(tmp_path))
    assert torch.equal(load("mnist").x_train, found.x_train)


def test_colour_images(tmp_path: Path) -> None:
    """CIFAR-100's columns, channels first."""
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    for name in ("train.parquet", "test.parquet"):
        parquet(tmp_path / name, [png(p) for p in pixels], [0, 50, 99], "img", "fine_label")
    found = load("cifar100", data_dir=str(tmp_path))
    assert found.shape == (3, 32, 32)
    assert torch.allclose(found.x_train[1, 2], torch.from_numpy(pixels[1, :, :, 2]) / 127.5 - 1)
    assert found.classes is not None
    assert len(found.classes) == 100


def test_kmnist(tmp_path: Path) -> None:
    """idx files; the test images are parted where the training ones are absent."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (10_000, 28, 28)), np.arange(10_000) % 10
    idx(tmp_path / "t10k-images-idx3-ubyte.gz", images)
    idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels)
    found = load("kmnist", data_dir=str(tmp_path))
    assert (len(found.x_train), len(found.x_test)) == (8000, 2000)
    assert torch.allclose(found.x_test[0, 0], torch.from_numpy(images[8000]).float() / 127.5 - 1)
    idx(tmp_path / "train-images-idx3-ubyte.gz", images[:60])
    idx(tmp_path / "train-labels-idx1-ubyte.gz", labels[:60])
    whole = load("kmnist", data_dir=str(tmp_path))
    assert (len(whole.x_train), len(whole.x_test)) == (60, 10_000)
    idx(tmp_path / "train-labels-idx1-ubyte.gz", labels[:59])
    with pytest.raises(UserError, match="60 images, but 59 labels"):
        load("kmnist", data_dir=str(tmp_path))
    path = tmp_path / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="truncated"):
        load("kmnist", data_dir=str(tmp_path))


@pytest.mark.skipif("METAZOO_DATA" not in os.environ, reason="METAZOO_DATA names no folder with the real sets")
def test_real_mnist() -> None:
    """The real test file, and that the digits in the package are of it."""
    path = Path(os.environ["METAZOO_DATA"]) / "mnist" / "test.parquet"
    images, labels = data._read_parquet(path, data.IMAGES["mnist"])
    assert images.shape == (10_000, 1, 28, 28)
    assert np.bincount(labels).min() == 892
    small = images[:, 0].reshape(-1, 14, 2, 14, 2).astype(float).mean((2, 4)).round().astype(np.uint8)
    known = {image.tobytes() for image in small}
    ours = ((load("mnist14").x_test[:, 0] + 1) * 127.5).round().to(torch.uint8).numpy()
    assert all(image.tobytes() in known for image in ours)


def write_csv(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_own_csv(tmp_path: Path) -> None:
    """Columns to [-1, 1] by the training rows; text and whole targets are classes, others are regressed."""
    rows = "\n".join(f"{i},{i % 3},7,{'ab'[i % 2]}" for i in range(20))
    found = load(write_csv(tmp_path / "a.csv", f"x,z,constant,label\n{rows}\n"))
    assert found.classes == ("a", "b")
    assert (len(found.x_train), len(found.x_test)) == (16, 4)
    assert found.x_train.min(0).values.tolist() == [-1, -1, 0]
    assert found.x_train.max(0).values.tolist() == [1, 1, 0]
    numbers = "\n".join(f"{i},{i / 7}" for i in range(20))
    assert load(write_csv(tmp_path / "b.csv", f"x,y\n{numbers}")).classes is None
    by_name = load(
        write_csv(tmp_path / "c.csv", "k,y\n" + "\n".join(f"{i % 4},{i / 7}" for i in range(40))), target="k"
    )
    assert by_name.classes == ("0", "1", "2", "3")
    assert load(str(tmp_path / "c.csv"), target="k", task="regression").classes is None
    many = "\n".join(f"{i},{i / 7}" for i in range(21))
    assert load(write_csv(tmp_path / "d.csv", f"x,y\n{many}"), target="x").classes is None


def test_own_npz(tmp_path: Path) -> None:
    """With and without a test part; images stay images."""
    x, y = np.random.default_rng(0).random((30, 4)), np.arange(30) % 2
    np.savez(tmp_path / "a.npz", x=x, y=y)
    assert len(load(str(tmp_path / "a.npz")).x_test) == 6
    np.savez(tmp_path / "b.npz", x=x, y=y, x_test=x[:5], y_test=y[:5])
    assert len(load(str(tmp_path / "b.npz")).x_test) == 5
    np.savez(tmp_path / "c.npz", x=np.zeros((30, 3, 8, 8), dtype=np.uint8), y=y)
    found = load(str(tmp_path / "c.npz"))
    assert found.shape == (3, 8, 8)
    assert found.x_train.max() == -1


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("a,b\n1,2\n", {}, "1 rows of data"),
        ("", {}, "0 rows of data"),
        ("a\n1\n2\n3\n", {}, "one column only"),
        ("a,b\n1,2\nx,3\n4,5\n", {}, "line 3, column a: 'x' is no number"),
        ("a,b\n1,2\nnan,3\n4,5\n", {}, "line 3, column a: not a finite number"),
        ("a,b\n1,2\n1\n4,5\n", {}, "line 3: 1 values under 2 columns"),
        ("a,b\n1,2\n3,4\n", {"target": "c"}, "no column 'c'"),
        ("a,b\n1,2\n3,2\n4,2\n5,2\n6,2\n", {}, "one class only"),
        ("a,b\n1,u\n3,v\n4,u\n5,v\n6,u\n", {"task": "regression"}, "is text"),
        ("a,b\n1,nan\n3,1\n4,2\n5,2\n6,2\n", {}, "not finite"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        load(write_csv(tmp_path / "a.csv", text), **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_bad_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown names, missing, damaged and hostile files: one line that names what and where."""
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    good = [png(np.zeros((28, 28), dtype=np.uint8))] * 2
    cases: list[tuple[Any, str]] = [
        (lambda: load("imagenet"), "unknown data set 'imagenet'"),
        (lambda: load(str(tmp_path / "none.csv")), "no such file"),
        (lambda: load("mnist", data_dir=str(tmp_path / "none")), "not a folder"),
        (lambda: load("kmnist", data_dir=str(tmp_path)), "t10k-images"),
    ]
    (tmp_path / "latin.csv").write_bytes("a,b\n1,é\n".encode("latin-1"))
    cases.append((lambda: load(str(tmp_path / "latin.csv")), "not UTF-8"))
    (tmp_path / "p.npz").write_bytes(pickle.dumps([1]))
    cases.append((lambda: load(str(tmp_path / "p.npz")), "not an .npz"))
    np.savez(tmp_path / "o.npz", x=np.array([{}], dtype=object), y=np.zeros(1))
    cases.append((lambda: load(str(tmp_path / "o.npz")), "o.npz"))
    np.savez(tmp_path / "short.npz", x=np.zeros((3, 2)), y=np.zeros(4))
    cases.append((lambda: load(str(tmp_path / "short.npz")), "do not fit"))
    np.savez(tmp_path / "wide.npz", x=np.eye(9), y=np.arange(9) % 2, x_test=np.zeros((2, 3)), y_test=np.zeros(2))
    cases.append((lambda: load(str(tmp_path / "wide.npz")), "do not fit"))
    np.savez(tmp_path / "nan.npz", x=np.full((9, 2), np.nan), y=np.arange(9) % 2)
    cases.append((lambda: load(str(tmp_path / "nan.npz")), "index (0, 0)"))
    for name, images, labels, message in (
        ("text", [*good, {"bytes": b"no image", "path": None}], [0, 1, 2], "row 2 cannot be decoded"),
        ("small", [*good, png(np.zeros((9, 28), dtype=np.uint8))], [0, 1, 2], "row 2 has 28 x 9 pixels"),
        ("label", good, [0, 10], "0 … 9"),
    ):
        for part in ("train.parquet", "test.parquet"):
            parquet(tmp_path / name / part, images, labels)
        cases.append((lambda name=name: load("mnist", data_dir=str(tmp_path / name)), message))
    for part in ("train.parquet", "test.parquet"):
        parquet(tmp_path / "columns" / part, good, [0, 1], image="picture")
        parquet(tmp_path / "cut" / part, good, [0, 1])
    cases.append((lambda: load("mnist", data_dir=str(tmp_path / "columns")), "image"))
    cut = tmp_path / "cut" / "train.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    cases.append((lambda: load("mnist", data_dir=str(tmp_path / "cut")), "unreadable"))
    for call, message in cases:
        with pytest.raises(UserError) as error:
            call()
        assert message in str(error.value), message
        assert "\n" not in str(error.value)


def test_small_integers_do_not_wrap() -> None:
    """Columns of uint8 are scaled as the same numbers in float64."""
    x = np.random.default_rng(0).integers(0, 256, (50, 3), dtype=np.uint8)
    y = np.arange(50) % 2
    for kind in (np.uint8, np.int8):
        small = data.from_arrays(x.view(kind), y)
        assert torch.equal(small.x_train, data.from_arrays(x.view(kind).astype(np.float64), y).x_train)
        assert small.x_train.max() == 1


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y_test": np.array([1.5, np.nan])}, "y_test"),
        ({"y_test": np.array(["a", "b"])}, "y_test holds <U1, not numbers"),
        ({"x_test": np.array([["a"], ["b"]])}, "x_test holds <U1, not numbers"),
        ({"x": np.array([["a"]] * 6)}, "x holds <U1, not numbers"),
        ({"y": np.arange(6) % 2, "y_test": np.array([0.5, 1.0])}, "class 0.5 is in the test part only"),
    ],
)
def test_parts_of_arrays_that_cannot_be_used(arrays: dict[str, np.ndarray], message: str) -> None:
    """The test part is checked as the training part is."""
    given = {
        "x": np.arange(6.0)[:, None], "y": np.linspace(0, 0.7, 6), "x_test": np.ones((2, 1)), "y_test": np.ones(2)
    }  # fmt: skip
    with pytest.raises(UserError, match=message) as error:
        data.from_arrays(**(given | arrays))
    assert "\n" not in str(error.value)


def test_a_gap_in_a_numeric_target_is_named(tmp_path: Path) -> None:
    """One blank among numbers is a gap with a line, not a class."""
    path = tmp_path / "t.csv"
    path.write_text("a,b\n" + "".join(f"{i},{i / 7}\n" for i in range(8)) + "9,\n")
    with pytest.raises(UserError, match=r"line 10, column b: '' among numbers"):
        data.load(Config(dataset=str(path)))
