"""Photos from files: any mode to RGB, the right way up; and the coordinates that a camera wrote into them."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from metazoo.errors import UserError
from PIL import Image, ImageOps, UnidentifiedImageError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif"}
_GPS = 0x8825  # the EXIF directory of GPS


def find_photos(paths: Iterable[Path]) -> list[Path]:
    """Photos among files and, with all below them, folders; sorted within a folder, each once.

    Raises:
        UserError: no such file or folder, a folder without a photo, or a file of another kind.
    """
    found: dict[Path, None] = {}
    for path in paths:
        if path.is_dir():
            held = sorted(one for one in path.rglob("*") if one.suffix.lower() in SUFFIXES and one.is_file())
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
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                opened.load()
                return to_rgb(ImageOps.exif_transpose(opened))
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
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
        low, high = (0.0, 65535.0) if image.mode != "F" and values.max(initial=0) > 255 else (0.0, 255.0)
        if image.mode == "F":
            low, high = float(values.min()), float(values.max())
        scaled = 255 * (values - low) / (high - low if high > low else 1)
        image = Image.fromarray(scaled.clip(0, 255).round().astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
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
        with Image.open(path) as opened:
            gps = opened.getexif().get_ifd(_GPS)
    except (OSError, ValueError, SyntaxError, TypeError, Image.DecompressionBombError):
        return None
    try:
        latitude = _degrees(gps[2]) * (-1 if str(gps.get(1, "N")).upper().startswith("S") else 1)
        longitude = _degrees(gps[4]) * (-1 if str(gps.get(3, "E")).upper().startswith("W") else 1)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, IndexError):
        return None
    sound = np.isfinite([latitude, longitude]).all() and abs(latitude) <= 90 and abs(longitude) <= 180
    return (latitude, longitude) if sound else None


def _degrees(values: object) -> float:
    """Of degrees, minutes and seconds."""
    degrees, minutes, seconds = (float(value) for value in values)  # type: ignore[attr-defined]
    return degrees + minutes / 60 + seconds / 3600


def _register_heif(path: Path) -> None:
    if importlib.util.find_spec("pillow_heif") is None:
        raise UserError(f"{path}: HEIC needs pillow-heif: run `pip install metazoo-streetclip[heic]`, or convert it")
    import pillow_heif

    pillow_heif.register_heif_opener()
