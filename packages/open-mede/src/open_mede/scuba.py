"""SCUBA of a user's own videos: their foreground, by masks or boxes, on striped backgrounds."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from metazoo.errors import UserError
from PIL import Image

from open_mede import lists, videos
from open_mede.config import ScubaOptions
from open_mede.stripes import ScubaBackground


def make_scuba(options: ScubaOptions) -> dict[str, Any]:
    """Write each video ``draws`` times, all frames on one new background, as videos/NAME__I.npy, and videos.csv.

    Returns:
        videos: written; skipped; table: the .csv.

    Raises:
        UserError: the folder is not empty, a table, video or mask cannot be read, or none is written.
    """
    assert options.videos is not None
    folder = options.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give another --output-dir")
    listed = lists.table(options.videos, options.data_dir or options.videos.parent)
    asked = [row for row in zip(listed.paths, listed.labels, listed.splits, strict=True)]
    if "test" in listed.splits:  # training videos are no test, on any background
        asked = [row for row in asked if row[2] == "test"]
    mask_of = _boxes(options.boxes) if options.boxes is not None else _masks(options.masks)
    scuba = ScubaBackground(options.seed)
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    rows, skipped = [], 0
    for number, (path, label, _) in enumerate(asked):
        try:
            frames = whole(path)
            masks = mask_of(path, frames.shape[:3])
            if options.boxes is not None:
                frames, masks = annotated(frames, masks, path)
        except videos.Unreadable as error:
            if options.unreadable == "stop":
                raise UserError(f"{error} (--unreadable skip goes on without it)") from error
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
            continue
        for draw in range(options.draws):
            name = f"videos/{number:05d}-{path.stem}__{draw}.npy"
            np.save(folder / name, scuba(frames, masks))
            rows.append((name, label, "test"))
    if not rows:
        raise UserError(f"{options.videos}: none of its {len(asked)} videos could be read with its mask")
    with (folder / "videos.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["video", "label", "split"])
        writer.writerows(rows)
    return {"videos": len(rows), "skipped": skipped, "table": str(folder / "videos.csv")}


def whole(path: Path) -> np.ndarray:
    """All frames [T, H, W, 3] of a video.

    Raises:
        Unreadable: no such video, or none that can be read.
    """
    count = videos.count_frames(path)
    if not count:
        raise videos.Unreadable(f"{path} has no frames")
    return videos.read_clips(path, count, 1, [0.0])[0]


def annotated(frames: np.ndarray, masks: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """From the first frame with a foreground to the last: before and after it there would be stripes alone.

    Raises:
        Unreadable: no frame has one.
    """
    shown = np.flatnonzero(masks.reshape(len(masks), -1).any(1))
    if not len(shown):
        raise videos.Unreadable(f"{path}: no foreground in any frame")
    kept = slice(shown[0], shown[-1] + 1)
    return frames[kept], masks[kept]


def _masks(folder: Path | None) -> Callable[[Path, tuple[int, ...]], np.ndarray]:
    assert folder is not None

    def of(path: Path, shape: tuple[int, ...]) -> np.ndarray:
        # beside the class, where there are folders of them
        own = folder / path.parent.name if (folder / path.parent.name).is_dir() else folder
        array, images = own / f"{path.stem}.npy", own / path.stem
        if array.is_file():
            try:
                found = np.array(np.lib.format.open_memmap(array, mode="r"))
            except (OSError, ValueError, EOFError) as error:
                raise videos.Unreadable(f"{array}: not an .npy of numbers") from error
        elif images.is_dir():
            files = videos.frame_files(images)
            try:
                found = np.stack([np.asarray(Image.open(file).convert("L")) for file in files])
                found = found / 255 if found.max() > 1 else found  # or of 0 and 1
            except (OSError, ValueError) as error:
                raise videos.Unreadable(f"{images}: not images of one size that can be read") from error
        else:
            raise videos.Unreadable(f"{path}: no mask {array.name}, and no folder {path.stem}, in {own}")
        if found.shape != shape or not (found.min() >= 0 and found.max() <= 1):
            raise videos.Unreadable(
                f"{path}: its masks have shape {found.shape}, its frames {shape}: give one of 0 to 1 for each frame"
            )
        return found

    return of


def _boxes(path: Path) -> Callable[[Path, tuple[int, ...]], np.ndarray]:
    """Masks of boxes: a frame without one has no foreground."""
    columns = ("video", "frame", "x1", "y1", "x2", "y2")
    held: dict[str, list[tuple[int, float, float, float, float]]] = {}
    for line, row in lists.rows(path, columns):
        try:
            numbers = [float(row[name]) for name in columns[1:]]
            frame, x1, y1, x2, y2 = numbers
            if not all(np.isfinite(numbers)) or frame != int(frame) or x2 <= x1 or y2 <= y1:
                raise ValueError
        except ValueError as error:
            raise UserError(f"{path}, line {line}: frame, x1, y1, x2, y2 are no frame and box") from error
        held.setdefault(row["video"].strip(), []).append((int(numbers[0]), *numbers[1:]))  # type: ignore[arg-type]

    by_stem: dict[str, list[str]] = {}
    for name in held:
        by_stem.setdefault(Path(name).stem, []).append(name)

    def of(video: Path, shape: tuple[int, ...]) -> np.ndarray:
        names = [name for name in held if video.as_posix().endswith(f"/{name}")] or by_stem.get(video.stem, [])
        if len(names) != 1:
            raise videos.Unreadable(f"{video}: {'no box' if not names else 'boxes of several such videos'} in {path}")
        own = held[names[0]]
        found = np.zeros(shape, dtype=bool)
        for frame, x1, y1, x2, y2 in own:
            if 0 <= frame < shape[0]:
                found[frame, max(0, round(y1)) : max(0, round(y2)), max(0, round(x1)) : max(0, round(x2))] = True
        return found

    return of
