"""Frames of videos: files by PyAV or torchcodec, folders of frames, .npy; a clip of T of them, at its size."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from metazoo.errors import UserError
from PIL import Image, UnidentifiedImageError

IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


class Unreadable(UserError):
    """A video that cannot be read, or has too few frames; the message names it."""


def clip_indices(count: int, frames: int, stride: int, place: float, where: str = "the video") -> np.ndarray:
    """Numbers [T] of the frames of a clip.

    Args:
        count: frames of the video.
        frames: T.
        stride: from one to the next; less where the video is too short for it.
        place: 0 to 1, from the first possible clip to the last.
        where: name of the video, for the error.

    Raises:
        Unreadable: fewer than T frames.
    """
    if count < frames:
        raise Unreadable(f"{where} has {count} frames, a clip {frames}: leave the video out, or give fewer --frames")
    if frames == 1:
        return np.array([round(place * (count - 1))])
    stride = min(stride, (count - 1) // (frames - 1))
    first = round(place * (count - 1 - stride * (frames - 1)))
    found: np.ndarray = first + stride * np.arange(frames)
    return found


def read_clips(path: Path, frames: int, stride: int, places: Sequence[float]) -> np.ndarray:
    """Clips [V, T, H, W, 3] of bytes of one video, at V places (:func:`clip_indices`).

    Raises:
        Unreadable: no such video, none that can be read, or too few frames.
        UserError: a video file, and nothing to read it with.
    """
    if not path.exists():
        raise Unreadable(f"{path}: no such video")
    if path.is_dir():
        return _of_folder(path, frames, stride, places)
    if path.suffix.lower() == ".npy":
        return _of_array(path, frames, stride, places)
    check_reader(path)
    if importlib.util.find_spec("av") is not None:
        return _by_pyav(path, frames, stride, places)
    return _by_torchcodec(path, frames, stride, places)


def check_reader(path: Path) -> None:
    """Raise UserError where a video file has nothing to read it with."""
    if path.is_dir() or path.suffix.lower() == ".npy":
        return
    if importlib.util.find_spec("av") is None and importlib.util.find_spec("torchcodec") is None:
        raise UserError(
            f"{path}: nothing to read videos with: pip install 'metazoo-open-mede[video]' (PyAV) or "
            "'metazoo-open-mede[torchcodec]', or give folders of frames or .npy"
        )


def frame_files(folder: Path) -> list[Path]:
    """Images of a folder in the order of their numbers: frame2 is before frame10."""
    files = [file for file in folder.iterdir() if file.suffix.lower() in IMAGES]
    return sorted(files, key=lambda file: natural(file.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Key of an order by numbers: frame2 before frame10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"([0-9]+)", name)]


def count_frames(path: Path) -> int:
    """Frames of a video.

    Raises:
        Unreadable: no such video, or none that can be read.
        UserError: a video file, and nothing to read it with.
    """
    if not path.exists():
        raise Unreadable(f"{path}: no such video")
    if path.is_dir():
        return len(frame_files(path))
    if path.suffix.lower() == ".npy":
        return len(_array(path))
    check_reader(path)
    if importlib.util.find_spec("av") is None:
        from torchcodec.decoders import VideoDecoder

        try:
            return len(VideoDecoder(str(path)))
        except (RuntimeError, OSError, ValueError) as error:
            raise Unreadable(f"{path}: cannot be read as a video ({' '.join(str(error).split())[:100]})") from error
    import av

    try:
        with av.open(str(path)) as container:
            return sum(1 for _ in container.decode(video=0))
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        raise Unreadable(f"{path}: cannot be read as a video ({' '.join(str(error).split())[:100]})") from error


def _chosen(count: int, frames: int, stride: int, places: Sequence[float], path: Path) -> np.ndarray:
    return np.stack([clip_indices(count, frames, stride, place, str(path)) for place in places])


def _of_folder(path: Path, frames: int, stride: int, places: Sequence[float]) -> np.ndarray:
    files = frame_files(path)
    chosen = _chosen(len(files), frames, stride, places, path)
    held: dict[int, np.ndarray] = {}
    for number in np.unique(chosen).tolist():
        try:
            with Image.open(files[number]) as image:
                held[number] = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, ValueError) as error:
            raise Unreadable(f"{files[number]}: not an image that can be read") from error
    if len({frame.shape for frame in held.values()}) > 1:
        raise Unreadable(f"{path}: its frames differ in size")
    return np.stack([np.stack([held[number] for number in row]) for row in chosen.tolist()])


def _array(path: Path) -> np.ndarray:
    try:
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise Unreadable(f"{path}: not an .npy of numbers") from error
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[-1] != 3:
        raise Unreadable(f"{path} holds {array.dtype} {array.shape}: give uint8 [T, H, W, 3], colour last")
    return array


def _of_array(path: Path, frames: int, stride: int, places: Sequence[float]) -> np.ndarray:
    array = _array(path)
    return np.asarray(array[_chosen(len(array), frames, stride, places, path)])


def _by_pyav(path: Path, frames: int, stride: int, places: Sequence[float]) -> np.ndarray:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise Unreadable(f"{path}: no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            count = stream.frames
            if count < frames:  # the header does not say, or says too little
                count = _counted(container, stream)
            decoded = _decoded(container, stream, count, frames, stride, places, path)
            if decoded is None:  # the header says more frames than there are
                count = _counted(container, stream)
                decoded = _decoded(container, stream, count, frames, stride, places, path)
    except (av.FFmpegError, OSError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise Unreadable(f"{path}: cannot be read as a video ({' '.join(str(error).split())[:100]})") from error
    if decoded is None:
        raise Unreadable(f"{path}: cannot be read to its end")
    return decoded


def _counted(container: Any, stream: Any) -> int:
    container.seek(0)
    return sum(1 for _ in container.decode(stream))


def _decoded(
    container: Any, stream: Any, count: int, frames: int, stride: int, places: Sequence[float], path: Path
) -> np.ndarray | None:
    """Read from the start on, which is exact in every format; None where a frame is missing."""
    chosen = _chosen(count, frames, stride, places, path)
    wanted, last = set(chosen.ravel().tolist()), int(chosen.max())
    held: dict[int, np.ndarray] = {}
    container.seek(0)
    for number, frame in enumerate(container.decode(stream)):
        if number in wanted:
            held[number] = frame.to_ndarray(format="rgb24")
        if number >= last:
            break
    if len(held) < len(wanted):
        return None
    return np.stack([np.stack([held[number] for number in row]) for row in chosen.tolist()])


def _by_torchcodec(path: Path, frames: int, stride: int, places: Sequence[float]) -> np.ndarray:
    from torchcodec.decoders import VideoDecoder

    try:
        decoder = VideoDecoder(str(path), dimension_order="NHWC")
        chosen = _chosen(len(decoder), frames, stride, places, path)
        unique, back = np.unique(chosen, return_inverse=True)
        found: np.ndarray = decoder.get_frames_at(unique.tolist()).data.numpy()[back.reshape(chosen.shape)]
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        if isinstance(error, UserError):
            raise
        raise Unreadable(f"{path}: cannot be read as a video ({' '.join(str(error).split())[:100]})") from error
    return found


def fitted(clip: np.ndarray, side: int, short: int, x: float, y: float, mirror: bool) -> np.ndarray:
    """A clip scaled so that its shorter side is ``short``, and a square of ``side`` pixels cropped out of it.

    Args:
        clip: [T, H, W, 3] of bytes.
        side: pixels of the result.
        short: pixels of the shorter side, at least ``side``.
        x, y: place of the square, 0 to 1; 0.5: the middle.
        mirror: left becomes right.

    Returns:
        [T, 3, side, side] of bytes.
    """
    height, width = clip.shape[1:3]
    short = max(short, side)
    scale = short / min(height, width)
    new_height, new_width = max(side, round(scale * height)), max(side, round(scale * width))
    top, left = round(y * (new_height - side)), round(x * (new_width - side))
    frames = []
    for frame in clip:
        image = Image.fromarray(frame)
        if (new_width, new_height) != image.size:
            image = image.resize((new_width, new_height), Image.Resampling.BICUBIC)
        frames.append(np.asarray(image)[top : top + side, left : left + side])
    found = np.stack(frames).transpose(0, 3, 1, 2)
    return np.ascontiguousarray(found[..., ::-1] if mirror else found)
