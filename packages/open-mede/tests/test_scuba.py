"""Striped backgrounds: the foreground stays to the bit, the rest changes; by masks or boxes of a user's own videos."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from metazoo.errors import UserError
from open_mede import scuba
from open_mede.config import ScubaOptions
from open_mede.stripes import CROP, ScubaBackground, stripe_background
from open_mede.videos import Unreadable
from PIL import Image

RNG = np.random.default_rng(0)
FRAMES = RNG.integers(0, 256, (4, 20, 30, 3), dtype=np.uint8)
MASKS = np.zeros((4, 20, 30), dtype=bool)
for number in range(4):
    MASKS[number, 5:12, 3 + number : 10 + number] = True


# ---- stripes


@pytest.mark.parametrize("size", [CROP, 32, 300])
def test_stripe_background(size: int) -> None:
    """A colour and its complement; no corner of the rotated picture is in it."""
    for seed in range(5):
        found = stripe_background(np.random.default_rng(seed), size)
        assert found.shape == (size, size, 3)
        assert found.dtype == np.uint8
        if size == CROP:
            colours = np.unique(found.reshape(-1, 3), axis=0).astype(int)
            assert len(colours) == 2
            assert np.abs(colours.sum(0) - 255).max() <= 1
            shares = (found.reshape(-1, 3) == colours[0]).all(1).mean()
            assert 0.05 < shares < 0.95


def test_background_by_seed() -> None:
    one, other = (stripe_background(np.random.default_rng(seed)) for seed in (3, 3))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, stripe_background(np.random.default_rng(4)))


def test_foreground_stays() -> None:
    """To the bit below the mask; elsewhere there is one background in all frames, another for each clip."""
    masked = ScubaBackground(1)
    before = FRAMES.copy()
    found, second = masked(FRAMES, MASKS), masked(FRAMES, MASKS)
    assert np.array_equal(FRAMES, before)
    assert found.shape == FRAMES.shape
    assert found.dtype == np.uint8
    assert np.array_equal(found[MASKS], FRAMES[MASKS])
    behind = found[:, :, 15:]  # no mask there
    assert (behind == behind[0]).all()
    assert (behind[0] != FRAMES[0, :, 15:]).any(-1).mean() > 0.9
    assert not np.array_equal(found[:, :, 15:], second[:, :, 15:])
    assert np.array_equal(second[MASKS], FRAMES[MASKS])
    assert np.array_equal(ScubaBackground(1)(FRAMES, MASKS), found)
    assert not np.array_equal(ScubaBackground(2)(FRAMES, MASKS), found)


def test_soft_masks_and_own_background() -> None:
    """A mask of a half mixes; all or nothing gives the frames or the background."""
    behind = RNG.integers(0, 256, (20, 30, 3), dtype=np.uint8)
    masked = ScubaBackground()
    assert np.array_equal(masked(FRAMES, np.ones(MASKS.shape), behind), FRAMES)
    assert (masked(FRAMES, np.zeros(MASKS.shape), behind) == behind).all()
    half = masked(FRAMES, np.full(MASKS.shape, 0.5), behind)
    assert np.array_equal(half, np.rint((FRAMES.astype(float) + behind) / 2))


@pytest.mark.parametrize(
    ("frames", "masks", "background", "says"),
    [
        (FRAMES[0], MASKS[0], None, r"frames have shape \(20, 30, 3\): give \[T, H, W, 3\], colour last"),
        (FRAMES.transpose(0, 3, 1, 2), MASKS, None, r"\(4, 3, 20, 30\): give \[T, H, W, 3\]"),
        (FRAMES, MASKS[:3], None, r"masks have shape \(3, 20, 30\), frames \(4, 20, 30, 3\)"),
        (FRAMES, MASKS.transpose(0, 2, 1), None, r"masks have shape \(4, 30, 20\)"),
        (FRAMES, MASKS, FRAMES[0, :5], r"background has shape \(5, 30, 3\), frames \(20, 30, 3\)"),
    ],
)
def test_wrong_shapes(frames: np.ndarray, masks: np.ndarray, background: np.ndarray | None, says: str) -> None:
    with pytest.raises(UserError, match=says):
        ScubaBackground()(frames, masks, background)


# ---- a user's own videos


def own(folder: Path, count: int = 2) -> Path:
    """videos.csv, clips 0.npy, 1.npy, …, of class "wave, slowly"."""
    lines = ["video,label,split"]
    for i in range(count):
        np.save(folder / f"{i}.npy", np.roll(FRAMES, i, 0))
        lines.append(f'{i}.npy,"wave, slowly",train')
    (folder / "videos.csv").write_text("\n".join(lines) + "\n")
    (folder / "masks").mkdir()
    return folder / "videos.csv"


def made(table: Path, **options: Any) -> dict[str, Any]:
    folder = table.parent
    masks = {} if "boxes" in options else {"masks": folder / "masks"}
    given: dict[str, Any] = {"videos": table, "output_dir": folder / "ooc", "draws": 2, **masks, **options}
    return scuba.make_scuba(ScubaOptions(**given))


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def assert_pasted(path: Path, frames: np.ndarray, masks: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.load(path)
    assert found.dtype == np.uint8
    assert np.array_equal(found[masks], frames[masks])
    assert (found[~masks] != frames[~masks]).any(-1).mean() > 0.9
    return found


@pytest.mark.parametrize("kind", ["npy", "floats", "images"])
def test_masks(tmp_path: Path, kind: str) -> None:
    """As .npy or as images, one a frame; the table is one that --dataset takes."""
    table = own(tmp_path)
    for i in range(2):
        masks = np.roll(MASKS, i, 0)
        if kind == "images":
            (tmp_path / "masks" / f"{i}").mkdir()
            for j, mask in enumerate(masks):
                Image.fromarray(mask).save(tmp_path / "masks" / f"{i}" / f"{j:03d}.png")
        else:
            np.save(tmp_path / "masks" / f"{i}.npy", masks.astype(np.float32) if kind == "floats" else masks)
    found = made(table)
    assert (found["videos"], found["skipped"]) == (4, 0)
    written = rows(Path(found["table"]))
    assert written[0] == ["video", "label", "split"]
    assert {(label, split) for _, label, split in written[1:]} == {("wave, slowly", "test")}
    clips = [
        assert_pasted(tmp_path / "ooc" / name, np.roll(FRAMES, row // 2, 0), np.roll(MASKS, row // 2, 0))
        for row, (name, _, _) in enumerate(written[1:])
    ]
    assert not np.array_equal(clips[0], clips[1])
    assert len(list((tmp_path / "ooc" / "videos").iterdir())) == 4


def test_many_mask_images(tmp_path: Path) -> None:
    """Images are in the order of their numbers, whether these have zeros before them or not."""
    frames, masks = np.tile(FRAMES, (3, 1, 1, 1)), np.zeros((12, 20, 30), dtype=bool)
    for i in range(12):
        masks[i, i : i + 4, 2:9] = True
    np.save(tmp_path / "a.npy", frames)
    (tmp_path / "masks" / "a").mkdir(parents=True)
    for i, mask in enumerate(masks):
        Image.fromarray(mask).save(tmp_path / "masks" / "a" / f"{i}.png")
    (tmp_path / "videos.csv").write_text("video,label\na.npy,wave\n")
    found = made(tmp_path / "videos.csv", draws=1)
    assert_pasted(tmp_path / "ooc" / rows(Path(found["table"]))[1][0], frames, masks)


def test_boxes(tmp_path: Path) -> None:
    """Any number a frame, cut at the border; frames before the first and after the last box are left out."""
    table = own(tmp_path, 1)
    (tmp_path / "boxes.csv").write_text(
        "video,frame,x1,y1,x2,y2\n0.npy,0,3,5,10,12\n0.npy,0,20.4,0,99,2.6\n0.npy,2,-5,-5,4,4\n0.npy,50,0,0,9,9\n"
        "sub/1.mp4,1,0,0,30,20\n"
    )
    found = made(table, boxes=tmp_path / "boxes.csv", draws=1)
    masks = np.zeros(MASKS.shape, dtype=bool)
    masks[0, 5:12, 3:10] = True
    masks[0, 0:3, 20:] = True
    masks[2, :4, :4] = True
    # what is annotated: frames 0 to 2
    clip = assert_pasted(tmp_path / "ooc" / rows(Path(found["table"]))[1][0], FRAMES[:3], masks[:3])
    assert np.array_equal(clip[1, 12:, 12:], clip[2, 12:, 12:])


def movie(path: Path) -> np.ndarray:
    """A video of 6 frames, and these."""
    frames = np.zeros((6, 32, 32, 3), dtype=np.uint8)
    frames[:] = (40 * np.arange(6))[:, None, None, None]
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        assert isinstance(stream, av.VideoStream)
        stream.height = stream.width = 32
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return frames


def test_whole_video(tmp_path: Path) -> None:
    """All frames of a file, in order; also where its header counts fewer."""
    frames = movie(tmp_path / "a.avi")
    found = scuba.whole(tmp_path / "a.avi")
    assert found.shape == frames.shape
    assert np.abs(found.astype(int) - frames).max() <= 6
    data = bytearray((tmp_path / "a.avi").read_bytes())
    place = data.find(b"strh") + 8 + 32  # dwLength of the stream's header
    data[place] = 3
    (tmp_path / "b.avi").write_bytes(data)
    assert np.array_equal(scuba.whole(tmp_path / "b.avi"), found)


@pytest.mark.parametrize("kind", ["folder", "npy"])
def test_whole_of_nothing(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a{'.npy' if kind == 'npy' else ''}"
    if kind == "npy":
        np.save(path, FRAMES[:0])
    else:
        path.mkdir()
    with pytest.raises(Unreadable, match=path.name):
        scuba.whole(path)


# ---- errors


def bad_mask(folder: Path, kind: str) -> None:
    """The second video's mask is wrong; the first one's is good."""
    np.save(folder / "masks" / "0.npy", MASKS)
    path = folder / "masks" / "1.npy"
    arrays = {
        "short": MASKS[:3], "turned": MASKS.transpose(0, 2, 1), "bytes": MASKS.astype(np.uint8) * 255,
        "nan": np.full(MASKS.shape, np.nan), "negative": MASKS * -1.0,
    }  # fmt: skip
    if kind in arrays:
        np.save(path, arrays[kind])
    elif kind == "pickle":
        np.save(path, np.array([{}], dtype=object), allow_pickle=True)
    elif kind == "archive":
        with path.open("wb") as file:
            np.savez(file, MASKS)
    elif kind == "empty folder":
        path.with_suffix("").mkdir()
    elif kind == "no image":
        path.with_suffix("").mkdir()
        (path.with_suffix("") / "0.png").write_bytes(b"no")
    elif kind == "no video":
        (folder / "1.npy").unlink()


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("short", r"1\.npy: its masks have shape \(3, 20, 30\), its frames \(4, 20, 30\)"),
        ("turned", r"its masks have shape \(4, 30, 20\)"), ("bytes", "give one of 0 to 1"),
        ("nan", "give one of 0 to 1"), ("negative", "give one of 0 to 1"), ("pickle", r"1\.npy: not an \.npy"),
        ("archive", r"1\.npy: not an \.npy"), ("empty folder", "masks/1: not images"),
        ("no image", "masks/1: not images"), ("no video", r"1\.npy: no such video"),
        ("none", r"1\.npy: no mask 1\.npy, and no folder 1, in .*masks"),
    ],
)  # fmt: skip
def test_wrong_masks(tmp_path: Path, kind: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Stop names it; skip names it, counts it and goes on."""
    table = own(tmp_path)
    bad_mask(tmp_path, kind)
    with pytest.raises(UserError, match=rf"{says}.* \(--unreadable skip goes on without it\)"):
        made(table)
    found = made(table, output_dir=tmp_path / "skip", unreadable="skip")
    assert (found["videos"], found["skipped"]) == (2, 1)
    assert len(rows(Path(found["table"]))) == 3
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert said[0].startswith("skipped: ")


def test_no_box(tmp_path: Path) -> None:
    table = own(tmp_path)
    (tmp_path / "boxes.csv").write_text("video,frame,x1,y1,x2,y2\n0.npy,0,3,5,10,12\n")
    with pytest.raises(UserError, match=r"1\.npy: no box in .*boxes\.csv"):
        made(table, boxes=tmp_path / "boxes.csv")


@pytest.mark.parametrize(
    "row", ["0.npy,one,0,0,9,9", "0.npy,1.5,0,0,9,9", "0.npy,1,0,nan,9,9", "0.npy,1,0,inf,9,9", "0.npy,1,9,0,3,9"]
)
def test_wrong_boxes(tmp_path: Path, row: str) -> None:
    table = own(tmp_path)
    (tmp_path / "boxes.csv").write_text(f"video,frame,x1,y1,x2,y2\n0.npy,0,3,5,10,12\n{row}\n")
    with pytest.raises(UserError, match=r"boxes\.csv, line 3: frame, x1, y1, x2, y2 are no frame and box"):
        made(table, boxes=tmp_path / "boxes.csv")
    (tmp_path / "boxes.csv").write_text("video,frame,x1,y1,x2\n0.npy,0,3,5,10\n")
    with pytest.raises(UserError, match=r"boxes\.csv: no column 'y2'"):
        made(table, boxes=tmp_path / "boxes.csv")


def test_none_with_masks(tmp_path: Path) -> None:
    table = own(tmp_path)
    with pytest.raises(UserError, match="none of its 2 videos could be read with its mask"):
        made(table, unreadable="skip")


def test_nothing_overwritten(tmp_path: Path) -> None:
    table = own(tmp_path)
    bad_mask(tmp_path, "none")
    (tmp_path / "ooc").mkdir()
    (tmp_path / "ooc" / "mine.txt").write_text("kept")
    with pytest.raises(UserError, match=r"ooc is not an empty folder: give another --output-dir"):
        made(table)
    assert [path.name for path in (tmp_path / "ooc").iterdir()] == ["mine.txt"]
    with pytest.raises(UserError, match=r"mine\.txt is not an empty folder"):
        made(table, output_dir=tmp_path / "ooc" / "mine.txt")
    assert (tmp_path / "ooc" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "no --videos"), ({"videos": "none.csv"}, r"--videos .*none\.csv: no such file"),
        ({"videos": "videos.csv"}, "give one of --masks and --boxes"),
        ({"videos": "videos.csv", "masks": "masks", "boxes": "videos.csv"}, "give one of --masks and --boxes"),
        ({"videos": "videos.csv", "masks": "none"}, "--masks .*none: no such file or folder"),
        ({"videos": "videos.csv", "masks": "masks", "draws": 0}, "--draws is 0: give 1 or more"),
    ],
)  # fmt: skip
def test_wrong_options(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    own(tmp_path)
    paths = {name: tmp_path / value if isinstance(value, str) else value for name, value in options.items()}
    with pytest.raises(UserError, match=says):
        ScubaOptions(**paths)


def test_flickering_foreground(tmp_path: Path) -> None:
    """Masks are of whole videos: one that is hidden at an end keeps its frames, or it is too short to be a clip."""
    np.save(tmp_path / "a.npy", FRAMES)
    (tmp_path / "masks").mkdir()
    np.save(tmp_path / "masks" / "a.npy", MASKS & np.array([True, False, True, False])[:, None, None])
    (tmp_path / "videos.csv").write_text("video,label\na.npy,flicker\n")
    found = made(tmp_path / "videos.csv", draws=1)
    assert len(np.load(tmp_path / "ooc" / rows(Path(found["table"]))[1][0])) == 4
