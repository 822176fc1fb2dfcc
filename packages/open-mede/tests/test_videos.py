"""Frames of real files, folders and arrays: the right ones, at their size; and files that are none."""

from __future__ import annotations

import importlib.util
import pickle
import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from metazoo.errors import UserError
from open_mede import videos
from open_mede.config import Config
from open_mede.data import VideoClips
from open_mede.videos import Unreadable, clip_indices, fitted, read_clips
from PIL import Image

STEP = 8
"""Grey levels from a frame to the next: what a codec loses is less than half of it."""


def movie(path: Path, count: int, codec: str, *, side: tuple[int, int] = (48, 64)) -> Path:
    """A video whose frame i has the grey 10 + 8 i."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = side
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(np.full((*side, 3), 10 + STEP * i, dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def sound(path: Path) -> Path:
    """A file with sound alone."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts, frame.time_base = 16_000, 0, Fraction(1, 16_000)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def grey(count: int, side: tuple[int, int] = (48, 64)) -> np.ndarray:
    """[T, H, W, 3] with the greys of :func:`movie`."""
    return np.broadcast_to((10 + STEP * np.arange(count, dtype=np.uint8))[:, None, None, None], (count, *side, 3))


def array(path: Path, count: int = 24) -> Path:
    np.save(path, grey(count))
    return path


def images(path: Path, count: int = 24, suffix: str = "png", form: str = "img_{:05d}") -> Path:
    path.mkdir()
    for i, frame in enumerate(grey(count)):
        Image.fromarray(frame).save(path / f"{form.format(i + 1)}.{suffix}")
    return path


def numbers(clips: np.ndarray) -> list[Any]:
    """Which frames they are."""
    assert clips.dtype == np.uint8
    found: list[Any] = np.rint((clips.mean((-3, -2, -1)) - 10) / STEP).astype(int).tolist()
    return found


KINDS: dict[str, Callable[[Path], Path]] = {
    "mp4": lambda folder: movie(folder / "a.mp4", 24, "libx264"),
    "upper case": lambda folder: movie(folder / "a.mp4", 24, "libx264").rename(folder / "a.MP4"),
    "avi": lambda folder: movie(folder / "a.avi", 24, "mpeg4"),
    "avi of images": lambda folder: movie(folder / "a.avi", 24, "mjpeg"),
    "mkv, whose header has no count": lambda folder: movie(folder / "a.mkv", 24, "libx264"),
    "webm": lambda folder: movie(folder / "a.webm", 24, "libvpx"),
    "npy": lambda folder: array(folder / "a.npy"),
    "png": lambda folder: images(folder / "a"),
    "jpg": lambda folder: images(folder / "a", suffix="JPG"),
    "numbers without zeros": lambda folder: images(folder / "a", form="{}"),
}


# ---- which frames


@given(
    st.integers(1, 60), st.integers(1, 12), st.integers(1, 20), st.floats(0, 1, allow_subnormal=False)
)  # fmt: skip
def test_clip_indices(count: int, frames: int, stride: int, place: float) -> None:
    """T frames in order, inside, evenly spaced, by the stride where there is room; the ends are at 0 and 1."""
    if count < frames:
        with pytest.raises(Unreadable, match=f"x has {count} frames, a clip {frames}: "):
            clip_indices(count, frames, stride, place, "x")
        return
    found = clip_indices(count, frames, stride, place)
    assert found.shape == (frames,)
    assert found.min() >= 0
    assert found.max() < count
    assert clip_indices(count, frames, stride, 0)[0] == 0
    assert clip_indices(count, frames, stride, 1)[-1] == count - 1
    if frames == 1:
        return
    steps = np.unique(np.diff(found))
    assert len(steps) == 1
    assert 1 <= steps[0] <= stride
    if steps[0] < stride:  # one more would not fit
        assert (steps[0] + 1) * (frames - 1) >= count


@pytest.mark.parametrize(
    ("count", "frames", "stride", "place", "found"),
    [
        (100, 4, 16, 0.5, [26, 42, 58, 74]), (30, 4, 16, 0.5, [1, 10, 19, 28]), (8, 8, 16, 0.7, list(range(8))),
        (9, 1, 16, 0.5, [4]), (9, 1, 16, 1.0, [8]), (10, 4, 2, 1.0, [3, 5, 7, 9]),
    ],
)  # fmt: skip
def test_by_hand(count: int, frames: int, stride: int, place: float, found: list[int]) -> None:
    assert clip_indices(count, frames, stride, place).tolist() == found


@pytest.mark.parametrize("kind", KINDS)
def test_right_frames(tmp_path: Path, kind: str) -> None:
    """Clips of every kind of video hold the frames that clip_indices says, in their order."""
    path = KINDS[kind](tmp_path)
    clips = read_clips(path, 4, 3, [0.0, 0.5, 1.0])
    assert clips.shape == (3, 4, 48, 64, 3)
    assert numbers(clips) == [[0, 3, 6, 9], [7, 10, 13, 16], [14, 17, 20, 23]]
    assert numbers(read_clips(path, 24, 16, [0.3])) == [list(range(24))]
    assert videos.count_frames(path) == 24
    with pytest.raises(Unreadable, match=rf"{path.name} has 24 frames, a clip 25"):
        read_clips(path, 25, 1, [0.0])


@pytest.mark.parametrize("suffix", ["png", "npy", "mp4"])
def test_colours(tmp_path: Path, suffix: str) -> None:
    """Red stays red."""
    red = np.full((8, 32, 32, 3), (250, 10, 20), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    if suffix == "npy":
        np.save(path, red)
    elif suffix == "png":
        path = tmp_path / "a"
        path.mkdir()
        for i, frame in enumerate(red):
            Image.fromarray(frame).convert("RGBA" if i % 2 else "RGB").save(path / f"{i}.png")
    else:
        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=10)
            assert isinstance(stream, av.VideoStream)
            stream.height = stream.width = 32
            stream.pix_fmt = "yuv444p"
            for frame in red:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
    found = read_clips(path, 8, 1, [0.0])[0].astype(int)
    assert np.abs(found - red).max() <= 6


def lying(path: Path, count: int) -> Path:
    """An .avi of 24 frames whose header says another count."""
    data = bytearray(movie(path, 24, "mpeg4").read_bytes())
    place = data.find(b"strh") + 8 + 32  # dwLength of the stream's header
    assert struct.unpack_from("<I", data, place) == (24,)
    struct.pack_into("<I", data, place, count)
    path.write_bytes(data)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == count
    return path


def test_header_says_too_much(tmp_path: Path) -> None:
    """Frames are counted then: clips end at the last that is there."""
    path = lying(tmp_path / "a.avi", 40)
    assert numbers(read_clips(path, 4, 3, [0.0, 0.5, 1.0])) == [[0, 3, 6, 9], [7, 10, 13, 16], [14, 17, 20, 23]]
    assert videos.count_frames(path) == 24
    with pytest.raises(Unreadable, match="has 24 frames, a clip 30"):
        read_clips(path, 30, 1, [0.0])


def test_header_says_too_little(tmp_path: Path) -> None:
    """A clip that the header has no room for is read all the same."""
    assert numbers(read_clips(lying(tmp_path / "a.avi", 6), 8, 1, [0.0])) == [list(range(8))]


# ---- files that cannot be read


def damaged(folder: Path) -> dict[str, Path]:
    """By what is wrong with them."""
    found = {}
    for name, codec in (("a.mp4", "libx264"), ("a.avi", "mpeg4")):
        data = movie(folder / name, 24, codec).read_bytes()
        found[f"cut {name}"] = folder / f"cut-{name}"
        found[f"cut {name}"].write_bytes(data[: len(data) // 2])
    for name in ("text.mp4", "text.avi", "text.npy", "text.webm"):
        found[name] = folder / name
        found[name].write_text("404: Not Found\n")
    for name in ("empty.mp4", "empty.npy"):
        found[name] = folder / name
        found[name].touch()
    found["sound"] = sound(folder / "sound.mp4")
    found["cut npy"] = folder / "cut.npy"
    found["cut npy"].write_bytes(array(folder / "whole.npy").read_bytes()[:5000])
    found["pickle"] = folder / "pickle.npy"
    np.save(found["pickle"], np.array([{"a": 1}], dtype=object), allow_pickle=True)
    found["archive"] = folder / "archive.npy"
    with found["archive"].open("wb") as file:
        np.savez(file, frames=grey(24))
    wrong = {
        "floats": grey(24) / 255, "signed": grey(24).astype(np.int64), "colour first": grey(24).transpose(0, 3, 1, 2),
        "one frame": grey(24)[0], "grey": grey(24)[..., 0], "alpha": np.concatenate([grey(24)] * 2, -1)[..., :4],
        "no frames": grey(24)[:0],
    }  # fmt: skip
    for name, value in wrong.items():
        found[name] = folder / f"{name}.npy"
        np.save(found[name], value)
    found["no images"] = folder / "no-images"
    found["no images"].mkdir()
    (found["no images"] / "notes.txt").touch()
    found["damaged image"] = images(folder / "damaged", 24)
    (found["damaged image"] / "img_00001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found["sizes differ"] = images(folder / "sizes", 24)
    Image.new("RGB", (5, 5)).save(found["sizes differ"] / "img_00001.png")
    found["none"] = folder / "none.mp4"
    return found


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return damaged(tmp_path_factory.mktemp("broken"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cut a.mp4", "cut-a"), ("cut a.avi", "cut-a"), ("text.mp4", "cannot be read as a video"),
        ("text.avi", "cannot be read as a video"), ("text.webm", "cannot be read as a video"),
        ("text.npy", "not an .npy of numbers"), ("empty.mp4", "cannot be read as a video"),
        ("empty.npy", "not an .npy of numbers"),
        ("sound", "no video in it"), ("cut npy", "not an .npy of numbers"), ("pickle", "not an .npy of numbers"),
        ("archive", "not an .npy of numbers"),
        ("floats", r"holds float64 \(24, 48, 64, 3\): give uint8 \[T, H, W, 3\], colour last"),
        ("signed", "holds int64"), ("colour first", r"holds uint8 \(24, 3, 48, 64\)"), ("one frame", r"\(48, 64, 3\)"),
        ("grey", r"\(24, 48, 64\)"), ("alpha", r"\(24, 48, 64, 4\)"), ("no frames", "no frames.npy"),
        ("no images", "has 0 frames, a clip 20"), ("damaged image", "img_00001.png: not an image"),
        ("sizes differ", "frames differ in size"), ("none", "no such video"),
    ],
)  # fmt: skip
def test_unreadable(broken: dict[str, Path], name: str, says: str) -> None:
    """Named, in one line; nothing else is raised."""
    path = broken[name]
    with pytest.raises(Unreadable, match=says) as raised:
        read_clips(path, 20, 1, [0.0])
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name", ["cut a.mp4", "text.mp4", "text.npy", "empty.mp4", "sound", "pickle", "archive", "none", "floats"]
)
def test_uncountable(broken: dict[str, Path], name: str) -> None:
    with pytest.raises(Unreadable, match=broken[name].name):
        videos.count_frames(broken[name])


def test_pickle_does_not_run(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    for name in ("a.npy", "b.npy"):
        path = tmp_path / name
        if name == "a.npy":
            np.save(path, np.array([Payload()], dtype=object), allow_pickle=True)
        else:
            path.write_bytes(pickle.dumps(Payload()))
        with pytest.raises(Unreadable, match=name):
            read_clips(path, 1, 1, [0.0])
    assert not (tmp_path / "ran").exists()


def test_without_decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line says what to install; and it is not a matter of one video, to be skipped."""
    path = movie(tmp_path / "a.mp4", 8, "mpeg4")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    for ask in (lambda: read_clips(path, 8, 1, [0.0]), lambda: videos.count_frames(path)):
        with pytest.raises(UserError, match=r"a\.mp4: nothing .* pip install 'metazoo-open-mede\[video\]'") as raised:
            ask()
        assert not isinstance(raised.value, Unreadable)
        assert "\n" not in str(raised.value)
    assert numbers(read_clips(array(tmp_path / "b.npy"), 2, 1, [0.0])) == [[0, 1]]


# ---- fitted


def plane(height: int, width: int) -> np.ndarray:
    """[1, H, W, 3]: red tells the column, green the row."""
    rows, columns = np.mgrid[:height, :width].astype(np.uint8)
    return np.stack([columns, rows, np.zeros_like(rows)], -1)[None]


@pytest.mark.parametrize(("x", "y", "left", "top"), [(0, 0, 0, 0), (1, 1, 24, 0), (0.5, 0.5, 12, 0), (0.25, 1, 6, 0)])
def test_places(x: float, y: float, left: int, top: int) -> None:
    """Without scaling: the square is cut out at its place; mirrored, columns run backwards."""
    found = fitted(plane(40, 64), 40, 40, x, y, False)
    assert found.shape == (1, 3, 40, 40)
    assert found.flags.c_contiguous
    assert np.array_equal(found[0, 0, 0], np.arange(left, left + 40))
    assert np.array_equal(found[0, 1, :, 0], np.arange(top, top + 40))
    assert np.array_equal(fitted(plane(40, 64), 40, 40, x, y, True), found[..., ::-1])
    upright = fitted(plane(64, 40), 40, 40, y, x, False)
    assert np.array_equal(upright[0, 1, :, 0], np.arange(left, left + 40))


@given(
    st.integers(1, 70), st.integers(1, 70), st.integers(1, 40), st.integers(0, 30), st.floats(0, 1), st.floats(0, 1)
)  # fmt: skip
def test_sizes(height: int, width: int, side: int, more: int, x: float, y: float) -> None:
    """Any shape, odd or narrow, gives a square of its size."""
    clip = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    found = fitted(clip, side, side + more, x, y, True)
    assert found.shape == (2, 3, side, side)
    assert found.dtype == np.uint8


def test_scaled() -> None:
    """The shorter side becomes the given one, the other keeps its share; less than the square is not enough."""
    clip = plane(50, 100)
    found = fitted(clip, 20, 25, 0.5, 0.5, False)[0].astype(int)
    wanted = np.asarray(Image.fromarray(clip[0]).resize((50, 25), Image.Resampling.BICUBIC))[2:22, 15:35]
    assert np.array_equal(found, wanted.transpose(2, 0, 1))
    assert np.array_equal(fitted(clip, 20, 5, 0.5, 0.5, False), fitted(clip, 20, 20, 0.5, 0.5, False))


def test_same_crop_in_all_frames() -> None:
    found = fitted(np.repeat(plane(30, 50), 3, 0), 16, 20, 0.3, 0.8, False)
    assert (found == found[0]).all()


# ---- VideoClips


def clips_of(folder: Path, count: int = 6, **options: Any) -> VideoClips:
    """Videos of noise, of classes a and b in turn."""
    rng = np.random.default_rng(1)
    paths = []
    for i in range(count):
        path = folder / f"{i}.npy"
        if not path.exists():
            np.save(path, rng.integers(0, 256, (12, 20, 26, 3), dtype=np.uint8))
        paths.append(path)
    settings = {"frames": 3, "stride": 2, "views": 2, "jitter": (224, 400), "flip": True, "workers": 1, **options}
    config = Config(dataset="x.csv", model="x", **settings)
    return VideoClips(paths, ["a", "b"] * (count // 2), ("a", "b"), config, 16)


def test_training_clips(tmp_path: Path) -> None:
    """The same draws for the same seed, in whatever batches and by how many threads; others for another."""
    clips = clips_of(tmp_path)
    whole, labels = clips.training(range(6), [0, 11, 2])
    assert whole.shape == (6, 3, 3, 16, 16)
    assert labels.tolist() == [0, 1, 0, 1, 0, 1]
    for workers in (1, 3):
        other = clips_of(tmp_path, workers=workers)
        for parts in ([[0, 1, 2, 3, 4, 5]], [[5], [3, 1], [0, 2, 4]]):
            for part in parts:
                found, of = other.training(part, [0, 11, 2])
                assert np.array_equal(found, whole[part])
                assert of.tolist() == labels[part].tolist()
    assert not np.array_equal(clips.training(range(6), [0, 11, 3])[0], whole)
    assert not np.array_equal(clips.training(range(6), [1, 11, 2])[0], whole)


def test_augmentation(tmp_path: Path) -> None:
    """Without flip no clip is mirrored, with it about half are; without room to jitter, the whole frame is there."""
    np.save(tmp_path / "0.npy", np.repeat(plane(16, 16), 3, 0))
    np.save(tmp_path / "1.npy", np.repeat(plane(16, 16), 3, 0))
    for flip in (False, True):
        clips = clips_of(tmp_path, 2, flip=flip, jitter=(224, 224))
        drawn = [clips.training([0], [seed])[0][0, 0] for seed in range(40)]
        mirrored = [bool(clip[0, 0, 0] > clip[0, 0, -1]) for clip in drawn]
        assert all(np.array_equal(np.sort(clip[0, 0]), np.arange(16)) for clip in drawn)
        assert 10 < sum(mirrored) < 30 if flip else not any(mirrored)


def test_views(tmp_path: Path) -> None:
    """In the middle of equal parts; the middle of a frame; always the same."""
    path = array(tmp_path / "0.npy", 24)
    config = Config(dataset="x.csv", model="x", frames=4, stride=2, views=3)
    clips = VideoClips([path], ["a"], ("a",), config, 16)
    views, read = clips.testing([0])
    assert views.shape == (1, 3, 4, 3, 16, 16)
    assert read.tolist() == [0]
    # the first frame of a clip is 0 to 17: a sixth of it, a half, five sixths
    assert numbers(views.transpose(0, 1, 2, 4, 5, 3)) == [[[3, 5, 7, 9], [8, 10, 12, 14], [14, 16, 18, 20]]]
    assert np.array_equal(views, clips.testing([0])[0])
    single = VideoClips([path], ["a"], ("a",), Config(dataset="x.csv", model="x", frames=4, stride=2, views=1), 16)
    assert np.array_equal(single.testing([0])[0], views[:, 1:2])


def test_stop(tmp_path: Path) -> None:
    clips = clips_of(tmp_path)
    clips.paths[2].write_bytes(b"no")
    for ask in (lambda: clips.training([1, 2], [0]), lambda: clips.testing([1, 2])):
        with pytest.raises(UserError, match=r"2\.npy: not an .* \(--unreadable skip goes on without it\)"):
            ask()


@pytest.mark.parametrize("workers", [1, 3])
def test_skip(tmp_path: Path, workers: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The next video that can be read stands in its place, with its own label; each is named once."""
    clips = clips_of(tmp_path, unreadable="skip", workers=workers)
    clips.paths[2].write_bytes(b"no")
    clips.paths[5].unlink()
    for _ in range(2):
        _, labels = clips.training([1, 2, 5], [0])
        assert labels.tolist() == [1, 1, 0]
        _, read = clips.testing(range(6))
        assert read.tolist() == [0, 1, 3, 4]
    assert set(clips.skipped) == {2, 5}
    said = sorted(capsys.readouterr().err.splitlines())
    assert [line.split(":")[0] for line in said] == ["skipped", "skipped"]
    assert "2.npy" in said[0]
    assert "5.npy" in said[1]


def test_skip_gives_the_next_ones_frames(tmp_path: Path) -> None:
    """At the place and crop that were drawn for the one that is missing."""
    clips = clips_of(tmp_path, unreadable="skip")
    clips.paths[2].write_bytes(clips.paths[3].read_bytes())
    wanted = clips.training([2], [7])[0]
    clips.paths[2].write_bytes(b"no")
    assert np.array_equal(clips.training([2], [7])[0], wanted)


def test_none_readable(tmp_path: Path) -> None:
    clips = clips_of(tmp_path, 2, unreadable="skip")
    for path in clips.paths:
        path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of the 2 videos can be read, as .*0\.npy"):
        clips.training([0], [0])
    views, read = clips.testing([0, 1])
    assert len(views) == len(read) == 0


def test_pickled(tmp_path: Path) -> None:
    """As a process of its own gets them."""
    clips = clips_of(tmp_path, unreadable="skip")
    clips.paths[2].write_bytes(b"no")
    wanted: Sequence[np.ndarray] = clips.training(range(6), [3])
    other: VideoClips = pickle.loads(pickle.dumps(clips))
    assert other.skipped == clips.skipped
    assert (len(other), other.name(1)) == (6, str(clips.paths[1]))
    for one, two in zip(other.training(range(6), [3]), wanted, strict=True):
        assert np.array_equal(one, two)
