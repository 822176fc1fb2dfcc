"""Photos from files: any mode to RGB, the right way up; and the coordinates that a camera wrote into them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from metazoo.errors import UserError
from PIL import Image, UnidentifiedImageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif"}
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")  # others, as EPS, run programs
_ORIENTATION = 0x112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # fmt: skip
# phones take photos of more pixels than Pillow warns of; at twice that it refuses
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
_GPS = 0x8825  # the EXIF directory of GPS


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """Photos among files and, with all below them, folders; sorted within a folder, each once.

    Raises:
        UserError: no such file or folder, or a folder without a photo.
    """
    found: dict[Path, None] = {}

    def is_photo(path: Path) -> bool:
        return path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()

    for path in paths:
        if path.is_dir():
            held = sorted(one for one in path.rglob("*") if is_photo(one))
            if not held:
                raise UserError(f"{path}: no photo in it ({', '.join(sorted(SUFFIXES))}): give another folder")
            found |= dict.fromkeys(held)
        elif not path.exists():
            raise UserError(f"{path}: no such photo or folder")
        else:
            found[path] = None
    return list(found)


def read_photo(path: Path) -> Image.Image:
    """A photo as RGB, turned as its EXIF orientation says: grey, palette, RGBA (on white), CMYK and 16 bits too.

    Raises:
        UserError: missing, cut off, no image, too large to be one, or HEIC without the extra [heic].
    """
    if path.suffix.lower() in (".heic", ".heif"):
        _register_heif(path)
    try:
        with Image.open(path, formats=_formats()) as opened:
            opened.load()
            turn = _TURNS.get(opened.getexif().get(_ORIENTATION))
            return to_rgb(opened if turn is None else opened.transpose(turn))
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: more pixels than a photo has: make it smaller") from error
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image that can be read: convert it, or leave it out") from error
    except (OSError, ValueError, SyntaxError, EOFError, TypeError, KeyError, IndexError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}): fetch it again, or leave it out") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB of any mode; what is transparent becomes white, 16 bits and floats are scaled to 8."""
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        # 16-bit files are scaled by their range; others by their own
        deep = image.mode.startswith("I;16") or values.max(initial=0) > 255
        low, high = 0.0, 65535.0 if deep else 255.0
        if image.mode == "F":
            values = np.nan_to_num(values, posinf=0.0, neginf=0.0)
            low, high = float(values.min()), float(values.max())
        scaled = 255 * (values - low) / (high - low if high > low else 1)
        image = Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        above = image.convert("RGBA")
        below = Image.new("RGBA", above.size, (255, 255, 255, 255))
        image = Image.alpha_composite(below, above)
    return image.convert("RGB")


def exif_coordinates(path: Path) -> tuple[float, float] | None:
    """(latitude, longitude) in degrees that the camera wrote, or None; the file stays as it is."""
    if path.suffix.lower() in (".heic", ".heif"):
        if importlib.util.find_spec("pillow_heif") is None:
            return None
        _register_heif(path)
    try:
        with Image.open(path, formats=_formats()) as opened:
            gps = opened.getexif().get_ifd(_GPS)
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return None
    try:
        latitude = _degrees(gps[2]) * {"N": 1, "S": -1}[_letter(gps[1])]
        longitude = _degrees(gps[4]) * {"E": 1, "W": -1}[_letter(gps[3])]
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError):
        return None
    sound = np.isfinite([latitude, longitude]).all() and abs(latitude) <= 90 and abs(longitude) <= 180
    return (latitude, longitude) if sound else None


def _letter(value: object) -> str:
    text = value.decode("ascii", "replace") if isinstance(value, bytes) else str(value)
    return text.strip("\0 ").upper()[:1]


def _degrees(values: object) -> float:
    """Of degrees, minutes and seconds."""
    degrees, minutes, seconds = (float(value) for value in values)  # type: ignore[attr-defined]
    return degrees + minutes / 60 + seconds / 3600


def _formats() -> tuple[str, ...]:
    return (*_FORMATS, "HEIF") if "HEIF" in Image.OPEN else _FORMATS


def _register_heif(path: Path) -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        raise UserError(f"{path}: HEIC needs pillow-heif: run `pip install metazoo-streetclip[heic]`, or convert it")
    import pillow_heif

    pillow_heif.register_heif_opener()
