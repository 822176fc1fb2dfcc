"""Photos from files: modes, orientation, coordinates of the camera, and files that are none."""

from __future__ import annotations

import importlib.util
import struct
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from metazoo.errors import UserError
from PIL import Image
from streetclip import images

RAMP = np.arange(0, 240, 20, dtype=np.uint8).reshape(3, 4)
COLOURS = np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8)
GPS, ORIENTATION = 0x8825, 0x112


def read(path: Path) -> np.ndarray:
    """[H, W, 3] of a file, whose bytes stay."""
    before = path.read_bytes()
    found = images.read_photo(path)
    assert found.mode == "RGB"
    assert path.read_bytes() == before
    return np.asarray(found)


def saved(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def located(*, north: str, latitude: Any, east: str, longitude: Any) -> Image.Exif:
    exif = Image.Exif()
    exif[GPS] = {1: north, 2: latitude, 3: east, 4: longitude}
    return exif


def png(width: int, height: int) -> bytes:
    """A PNG of this many pixels, of which there are hardly any bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


# ---- modes


def test_rgb_stays(tmp_path: Path) -> None:
    assert np.array_equal(read(saved(Image.fromarray(COLOURS), tmp_path / "a.png")), COLOURS)


def test_grey(tmp_path: Path) -> None:
    assert np.array_equal(read(saved(Image.fromarray(RAMP), tmp_path / "a.png")), np.stack([RAMP] * 3, axis=-1))
    bits = Image.fromarray(RAMP > 100)
    assert bits.mode == "1"
    assert np.array_equal(read(saved(bits, tmp_path / "b.png"))[..., 0], np.where(RAMP > 100, 255, 0))


def on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """What shows through becomes white."""
    share = alpha[..., None] / 255
    return np.asarray(colour * share + 255 * (1 - share))


def test_rgba(tmp_path: Path) -> None:
    """On white: opaque stays, transparent is white, whatever colour lies below."""
    alpha = np.array([[0, 0, 0, 0], [255, 255, 255, 255], [128, 64, 192, 1]], dtype=np.uint8)
    found = read(saved(Image.fromarray(np.dstack([COLOURS, alpha])), tmp_path / "a.png"))
    assert (found[0] == 255).all()
    assert np.array_equal(found[1], COLOURS[1])
    assert np.abs(found - on_white(COLOURS, alpha)).max() <= 1


def test_grey_with_alpha(tmp_path: Path) -> None:
    alpha = np.array([[0] * 4, [255] * 4, [100] * 4], dtype=np.uint8)
    image = Image.merge("LA", [Image.fromarray(RAMP), Image.fromarray(alpha)])
    found = read(saved(image, tmp_path / "a.png"))
    assert np.abs(found - on_white(np.stack([RAMP] * 3, axis=-1), alpha)).max() <= 1
    assert (found[0] == 255).all()


@pytest.mark.parametrize("transparency", [1, bytes([255, 0, 255])])
def test_palette_with_transparency(tmp_path: Path, transparency: int | bytes) -> None:
    image = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8))
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    assert image.mode == "P"
    opaque = read(saved(image, tmp_path / "a.png"))
    assert opaque.tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    found = read(saved(image, tmp_path / "b.png", transparency=transparency))
    assert found.tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]


def test_transparent_colour(tmp_path: Path) -> None:
    """A PNG of RGB may name one colour that is transparent."""
    colours = np.array([[[1, 2, 3], [4, 5, 6]]], dtype=np.uint8)
    found = read(saved(Image.fromarray(colours), tmp_path / "a.png", transparency=(1, 2, 3)))
    assert found.tolist() == [[[255, 255, 255], [4, 5, 6]]]


@pytest.mark.parametrize("suffix", ["tif", "jpg"])
def test_cmyk(tmp_path: Path, suffix: str) -> None:
    """No ink is white, magenta and yellow red, cyan and yellow green."""
    inks = np.array([[0, 0, 0, 0], [0, 255, 255, 0], [255, 0, 255, 0]], dtype=np.uint8)
    image = Image.frombytes("CMYK", (24, 8), np.repeat(np.tile(inks.repeat(8, axis=0), (8, 1)), 1, axis=0).tobytes())
    found = read(saved(image, tmp_path / f"a.{suffix}"))[4, [4, 12, 20]].astype(int)
    assert np.abs(found - [[255, 255, 255], [255, 0, 0], [0, 255, 0]]).max() <= 12


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits(tmp_path: Path, suffix: str) -> None:
    """65535 is white, not cut off at 255."""
    deep = RAMP.astype(np.uint16) * 257
    found = read(saved(Image.fromarray(deep), tmp_path / f"a.{suffix}"))
    assert np.array_equal(found, np.stack([RAMP] * 3, axis=-1))


def test_floats(tmp_path: Path) -> None:
    """Scaled from its least to its greatest value."""
    image = Image.fromarray(np.array([[-1.0, 0.0], [1.0, 3.0]], dtype=np.float32))
    found = read(saved(image, tmp_path / "a.tif"))
    assert found[..., 0].tolist() == [[0, 64], [128, 255]]
    holes = Image.fromarray(np.array([[0.0, np.nan], [1.0, 2.0]], dtype=np.float32))
    assert read(saved(holes, tmp_path / "c.tif"))[..., 0].ravel()[[0, 2, 3]].tolist() == [0, 128, 255]
    even = Image.fromarray(np.full((2, 2), 7.5, dtype=np.float32))
    assert len(np.unique(read(saved(even, tmp_path / "b.tif")))) == 1


# ---- orientation


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, COLOURS),
        (2, COLOURS[:, ::-1]),
        (3, COLOURS[::-1, ::-1]),
        (4, COLOURS[::-1]),
        (5, COLOURS.swapaxes(0, 1)),
        (6, np.rot90(COLOURS, -1)),
        (7, COLOURS[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90(COLOURS)),
    ],
)
def test_orientation(tmp_path: Path, orientation: int, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    assert np.array_equal(read(saved(Image.fromarray(COLOURS), tmp_path / "a.png", exif=exif)), upright)


@pytest.mark.parametrize(
    ("tag", "kind", "value"),
    [(0x100, 2, b"a\0\0\0"), (0x10F, 11, struct.pack(">f", 1.0))],  # a width of text, a maker that is a number
)
def test_damaged_exif(tmp_path: Path, tag: int, kind: int, value: bytes) -> None:
    """An entry of the wrong type does not keep a photo from being read and turned."""
    entries = sorted([(ORIENTATION, 3, 1, b"\0\6\0\0"), (tag, kind, 1, value)])
    body = b"".join(struct.pack(">HHI", *head) + tail for *head, tail in entries)
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + struct.pack(">H", len(entries)) + body + bytes(4)
    image = Image.new("RGB", (16, 8), (90, 90, 90))
    assert read(saved(image, tmp_path / "a.jpg", exif=exif)).shape == (16, 8, 3)


# ---- coordinates


@pytest.mark.parametrize(
    ("north", "east", "signs"), [("N", "E", (1, 1)), ("S", "E", (-1, 1)), ("N", "W", (1, -1)), ("S", "W", (-1, -1))]
)
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_coordinates(tmp_path: Path, north: str, east: str, signs: tuple[int, int], suffix: str) -> None:
    """33° 51' 30" is 33.858333°; the hemisphere gives the sign; the file stays."""
    exif = located(north=north, latitude=(33.0, 51.0, 30.0), east=east, longitude=(151.0, 12.0, 45.0))
    path = saved(Image.fromarray(COLOURS), tmp_path / f"a.{suffix}", exif=exif)
    before = path.read_bytes()
    assert images.exif_coordinates(path) == pytest.approx((signs[0] * 33.858333333, signs[1] * 151.2125), abs=1e-8)
    assert path.read_bytes() == before


def test_decimal_degrees(tmp_path: Path) -> None:
    """Some cameras write minutes or degrees with a fraction."""
    exif = located(north="s", latitude=(Fraction(3350, 100), 0, 0), east="W", longitude=(70, Fraction(305, 10), 0))
    path = saved(Image.fromarray(COLOURS), tmp_path / "a.jpg", exif=exif)
    assert images.exif_coordinates(path) == pytest.approx((-33.5, -(70 + 30.5 / 60)))


def test_no_coordinates(tmp_path: Path) -> None:
    assert images.exif_coordinates(saved(Image.fromarray(COLOURS), tmp_path / "a.jpg")) is None
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    assert images.exif_coordinates(saved(Image.fromarray(COLOURS), tmp_path / "b.jpg", exif=exif)) is None
    exif[GPS] = {1: "N", 2: (1.0, 2.0, 3.0)}
    assert images.exif_coordinates(saved(Image.fromarray(COLOURS), tmp_path / "c.jpg", exif=exif)) is None
    # without its hemisphere a latitude may be either of two
    exif[GPS] = {2: (1.0, 2.0, 3.0), 3: "E", 4: (1.0, 2.0, 3.0)}
    assert images.exif_coordinates(saved(Image.fromarray(COLOURS), tmp_path / "d.jpg", exif=exif)) is None


@pytest.mark.parametrize(
    "latitude",
    [
        (91.0, 0.0, 0.0),
        (89.0, 60.0, 1.0),
        (12.0, 30.0),
        (12.0,),
    ],
)
def test_broken_coordinates(tmp_path: Path, latitude: Any) -> None:
    """Not a number, out of range or too few: no coordinates, and the photo can be read all the same."""
    exif = located(north="N", latitude=latitude, east="E", longitude=(1.0, 0.0, 0.0))
    path = saved(Image.fromarray(COLOURS), tmp_path / "a.png", exif=exif)
    assert images.exif_coordinates(path) is None
    assert np.array_equal(read(path), COLOURS)


def test_coordinates_over_zero(tmp_path: Path) -> None:
    """A fraction without a value, as cameras write it where they have no fix."""
    exif = located(north="N", latitude=(77.0, 0.0, 0.0), east="E", longitude=(1.0, 0.0, 0.0))
    path = saved(Image.fromarray(COLOURS), tmp_path / "a.jpg", exif=exif)
    assert images.exif_coordinates(path) == pytest.approx((77.0, 1.0))
    held = path.read_bytes()
    for order in "<>":
        held = held.replace(struct.pack(f"{order}II", 77, 1), struct.pack(f"{order}II", 77, 0))
    assert held != path.read_bytes()
    path.write_bytes(held)
    assert images.exif_coordinates(path) is None
    assert read(path).shape == COLOURS.shape


def test_coordinates_of_what_is_no_photo(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_text("no photo")
    (tmp_path / "b.jpg").write_bytes(b"")
    assert images.exif_coordinates(tmp_path / "a.jpg") is None
    assert images.exif_coordinates(tmp_path / "b.jpg") is None


# ---- files that are no photos


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif", "bmp"])
def test_cut_off(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    whole = saved(Image.fromarray(noise), path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"a\.{suffix}: (cannot be read|not an image)"):
        images.read_photo(path)


@pytest.mark.parametrize("content", [b"", b"not a photo", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_no_image(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.jpg: .*leave it out"):
        images.read_photo(tmp_path / "a.jpg")


def test_missing_and_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none\.jpg: cannot be read \(No such file"):
        images.read_photo(tmp_path / "none.jpg")
    with pytest.raises(UserError, match="cannot be read"):
        images.read_photo(tmp_path)


def test_decompression_bomb(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(60_000, 60_000))
    with pytest.raises(UserError, match=r"a\.png: more pixels than a photo has"):
        images.read_photo(tmp_path / "a.png")


# ---- HEIC


def test_heic(tmp_path: Path) -> None:
    """Colours and coordinates of a phone's format, whatever the case of its suffix."""
    import pillow_heif as heif

    heif.register_heif_opener()
    colours = np.zeros((32, 64, 3), dtype=np.uint8)
    colours[:, :32, 0] = 200  # red on the left
    exif = located(north="S", latitude=(10.0, 30.0, 0.0), east="W", longitude=(20.0, 0.0, 36.0))
    path = saved(Image.fromarray(colours), tmp_path / "a.HEIC", format="HEIF", exif=exif)
    found = read(path)
    assert found.shape == (32, 64, 3)
    assert np.abs(found[4:28, 4:28].astype(int) - [200, 0, 0]).mean() < 12
    assert found[4:28, 36:].mean() < 12
    before = path.read_bytes()
    assert images.exif_coordinates(path) == pytest.approx((-10.5, -20.01))
    assert path.read_bytes() == before


def test_heic_without_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"a\.heic: HEIC needs pillow-heif: run `pip install metazoo-streetclip\[heic"):
        images.read_photo(tmp_path / "a.heic")
    assert images.exif_coordinates(tmp_path / "a.heic") is None


# ---- folders


def test_find_photos(tmp_path: Path) -> None:
    """Sorted, with all below a folder but what is hidden, whatever the case of a suffix; each once; in the order that
    was given."""
    for name in ("b.JPG", "a.png", "._a.png", "note.txt", "below/c.heic", "below/deep/d.webp"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    (tmp_path / "photos" / "folder.jpg").mkdir()
    folder, single = tmp_path / "photos", tmp_path / "z.jpeg"
    single.write_bytes(b"x")
    found = images.find_photos([single, folder, folder / "a.png", folder / "below"])
    assert [path.relative_to(tmp_path).as_posix() for path in found] == [
        "z.jpeg", "photos/a.png", "photos/b.JPG", "photos/below/c.heic", "photos/below/deep/d.webp",
    ]  # fmt: skip


def test_find_no_photos(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none: no such photo or folder"):
        images.find_photos([tmp_path / "none"])
    (tmp_path / "note.txt").write_text("x")
    with pytest.raises(UserError, match=r"no photo in it \(\.bmp, .*\): give another folder"):
        images.find_photos([tmp_path])
