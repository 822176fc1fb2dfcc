"""Clips and their classes: generated vectors and sprites, or videos; what is trained on and what is tested on."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from metazoo.errors import UserError

from open_mede import features, lists, sprites, videos
from open_mede.config import Config, SpriteOptions
from open_mede.features import FeatureWorld

SCUBA = Path("scuba") / "videos.csv"
"""Where the folder of a data set has its tests on other backgrounds."""


@dataclass(frozen=True)
class Clips:
    """Labelled clips in memory: vectors [N, 128], or clips [N, T, 3, H, W] of bytes.

    Attributes:
        classes: names that a clip may have.
        labels: [N] numbers of classes.
        array: the clips.
    """

    classes: tuple[str, ...]
    labels: np.ndarray
    array: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Of a clip."""
        return f"clip {index}"

    def training(self, indices: Sequence[int], seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Clips [B, …] and labels [B]; ``seed`` says which augmentation, where there is one."""
        chosen = np.asarray(indices)
        return self.array[chosen], self.labels[chosen]

    def testing(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Clips [B, V, …] of V views each, and which of ``indices`` could be read, [B]."""
        return self.array[np.asarray(indices)][:, None], np.asarray(indices)


class VideoClips:
    """Labelled videos, read when they are asked for.

    Args:
        paths: [N].
        labels: [N] class names.
        classes: names that a video may have.
        config: frames, stride, views, jitter, flip, unreadable, workers.
        size: pixels of a frame's side; set before clips are read.

    Attributes:
        skipped: names of videos that could not be read so far.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Sequence[str], classes: Sequence[str], config: Config, size: int = 224
    ) -> None:
        number = {name: i for i, name in enumerate(classes)}
        self.classes = tuple(classes)
        self.paths, self.labels = list(paths), np.array([number[label] for label in labels], dtype=int)
        self.config, self.size = config, size
        self.skipped: dict[int, str] = {}
        self._pool = ThreadPoolExecutor(config.workers)

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Of a video."""
        return str(self.paths[index])

    def training(self, indices: Sequence[int], seed: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Clips [B, T, 3, H, W] at random places and crops, drawn by ``seed`` and index, and labels [B].

        Raises:
            UserError: a video cannot be read, and --unreadable is stop; or none can.
        """
        found = list(self._pool.map(lambda i: self._drawn(int(i), seed), indices))
        return np.stack([clip for clip, _ in found]), self.labels[[index for _, index in found]]

    def _drawn(self, index: int, seed: Sequence[int]) -> tuple[np.ndarray, int]:
        """A clip of this video, or of the next that can be read."""
        config = self.config
        rng = np.random.default_rng([*seed, index])
        place, x, y = rng.random(3)
        short = int(rng.integers(config.jitter[0], config.jitter[1] + 1))
        mirror = bool(config.flip and rng.random() < 0.5)
        for other in range(len(self)):
            chosen = (index + other) % len(self)
            if chosen in self.skipped:
                continue
            try:
                clip = videos.read_clips(self.paths[chosen], config.frames, config.stride, [place])[0]
            except videos.Unreadable as error:
                self._skip(chosen, error)
                continue
            return videos.fitted(clip, self.size, round(short * self.size / 224), x, y, mirror), chosen
        raise UserError(f"none of the {len(self)} videos can be read, as {self.paths[0]}: look at --data-dir")

    def _skip(self, index: int, error: UserError) -> None:
        if self.config.unreadable == "stop":
            raise UserError(f"{error} (--unreadable skip goes on without it)") from error
        if index not in self.skipped:
            self.skipped[index] = str(self.paths[index])
            print(f"skipped: {error}", file=sys.stderr)

    def testing(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Clips [B, V, T, 3, H, W] of V views each, their middle cropped, and which of ``indices`` could be read, [B].

        Raises:
            UserError: a video cannot be read, and --unreadable is stop.
        """
        found = list(self._pool.map(lambda i: self._viewed(int(i)), indices))
        read = np.array([i for i, clips in zip(indices, found, strict=True) if clips is not None], dtype=int)
        held = [clips for clips in found if clips is not None]
        return (np.stack(held) if held else np.empty((0,))), read

    def _viewed(self, index: int) -> np.ndarray | None:
        config = self.config
        places = [(i + 0.5) / config.views for i in range(config.views)] if config.views > 1 else [0.5]
        try:
            clips = videos.read_clips(self.paths[index], config.frames, config.stride, places)
        except videos.Unreadable as error:
            self._skip(index, error)
            return None
        return np.stack([videos.fitted(clip, self.size, self.size, 0.5, 0.5, False) for clip in clips])

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_pool"}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._pool = ThreadPoolExecutor(self.config.workers)


@dataclass(frozen=True)
class Data:
    """What a run works on.

    Attributes:
        train: clips to be trained on, None where there are none.
        tests: by name: base_in, base_out, novel_in, novel_out of generated clips; base, novel of videos.
        features: texts and start (features).
        sprites: single frames (sprites).
    """

    train: Clips | VideoClips | None
    tests: Mapping[str, Clips | VideoClips]
    features: FeatureWorld | None = None
    sprites: sprites.SpriteWorld | None = None


def load(config: Config) -> Data:
    """The data of a config.

    Raises:
        UserError: files are missing or not understood, base and novel classes overlap, or no class is left.
    """
    if config.dataset == "features":
        return _features(config)
    if config.dataset == "sprites":
        return _sprites(config)
    return _videos(config)


def batches(count: int, batch: int, epoch: int, seed: int, stream: int = 0) -> np.ndarray:
    """Order of an epoch, [count // batch, batch]; what is left over is not used in it.

    Args:
        count: clips.
        batch: in a batch.
        epoch: from 0.
        seed: of the run.
        stream: another number is another order.
    """
    order = np.random.default_rng([seed, 4, stream, epoch]).permutation(count)
    whole = count // batch
    found: np.ndarray = order[: whole * batch].reshape(whole, batch)
    return found


def _kept(classes: int, config: Config) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the known classes that are trained on, and of those that are held out."""
    if config.holdout > classes - 2:
        raise UserError(f"--holdout is {config.holdout} of {classes} classes: leave 2 or more to be trained on")
    order = np.random.default_rng([config.seed, 5]).permutation(classes)
    return np.sort(order[config.holdout :]), np.sort(order[: config.holdout])


def _subset(names: Sequence[str], numbers: np.ndarray, labels: np.ndarray, array: np.ndarray) -> Clips:
    """Of the clips of some classes, which are numbered anew."""
    new = np.full(len(names), -1)
    new[numbers] = np.arange(len(numbers))
    chosen = new[labels] >= 0
    return Clips(tuple(names[i] for i in numbers), new[labels[chosen]], array[chosen])


def _features(config: Config) -> Data:
    world = features.generate(
        config.seed, config.clips, config.test_clips, ratio=config.ratio, motion_noise=config.motion_noise
    )
    known = np.arange(features.CLASSES)
    base, novel = known, known + features.CLASSES
    source = {"base": "base", "novel": "novel"}
    if config.holdout:
        base, novel = _kept(features.CLASSES, config)
        source["novel"] = "base"
    tests = {}
    for kind, numbers in (("base", base), ("novel", novel)):
        for context in ("in", "out"):
            held = world.tests[f"{source[kind]}_{context}"]
            tests[f"{kind}_{context}"] = _subset(world.names, numbers, held.labels, held.inputs)
    train = _subset(world.names, base, world.train.labels, world.train.inputs)
    return Data(train, tests, features=world)


def _sprites(config: Config) -> Data:
    world = sprites.SpriteWorld(config.seed)
    names = [world.name(i, debiased=config.debiased) for i in range(len(sprites.CLASSES))]
    base, novel = world.known, world.novel
    if config.holdout:
        kept, out = _kept(len(world.known), config)
        base, novel = world.known[kept], world.known[out]
    rng = np.random.default_rng([config.seed, 6])
    labels = base[rng.permutation(config.clips) % len(base)]
    train = _subset(names, base, labels, world.clips(labels, rng, ratio=config.ratio, classes=base))
    tests = {}
    for number, (kind, classes) in enumerate((("base", base), ("novel", novel))):
        asked, inside, outside = world.test(classes, config.test_clips, config.draws, number)
        tests[f"{kind}_in"] = _subset(names, classes, asked, inside)
        tests[f"{kind}_out"] = _subset(
            names, classes, np.tile(asked, config.draws), outside.reshape(-1, *inside.shape[1:])
        )
    return Data(train, tests, sprites=world)


def _videos(config: Config) -> Data:
    listed = lists.read(config.dataset, Path(config.data_dir) if config.data_dir else None, config.list_number)
    base, novel = _classes(config, listed)
    _check_there(listed)
    paths, labels = listed.of("train", base)
    if config.holdout:  # the novel classes stay unseen: some of the base classes stand for them
        kept, out = _kept(len(base), config)
        base, novel = tuple(base[i] for i in kept), tuple(base[i] for i in out)
        held = {"novel": listed.of("train", novel)}
        paths, labels = listed.of("train", base)
    else:
        held = {"base": listed.of("test", base), "novel": listed.of("test", novel)}
    if config.shots is not None:
        paths, labels = _few(paths, labels, config)
    train = VideoClips(paths, labels, base, config) if paths else None
    of_kind = {"base": base, "novel": novel}
    tests = {kind: VideoClips(found, names, of_kind[kind], config) for kind, (found, names) in held.items() if found}
    if not tests:
        print(f"{config.dataset}: no test videos: there will be nothing to evaluate", file=sys.stderr)
    elsewhere = Path(config.data_dir or ".") / SCUBA
    if config.data_dir is not None and not config.holdout and elsewhere.is_file():
        tests = with_context(tests, elsewhere, config)
    return Data(train, tests)


def with_context(tests: Mapping[str, Clips | VideoClips], table: Path, config: Config) -> dict[str, Any]:
    """Tests in context, as NAME_in, and the same classes on other backgrounds, as NAME_out.

    Args:
        tests: by name.
        table: .csv of the same videos on other backgrounds.
        config: of the clips.

    Raises:
        UserError: none of a test's classes is in the table.
    """
    listed = lists.table(table, table.parent)
    found: dict[str, Any] = {}
    for name, clips in tests.items():
        paths, labels = listed.of("test", clips.classes)
        if not paths:
            raise UserError(f"{table}: no test videos of {name} classes, as {clips.classes[0]!r}: make them anew")
        found[f"{name}_in"] = clips
        found[f"{name}_out"] = VideoClips(paths, labels, clips.classes, config)
    return found


def _check_there(listed: lists.Listed, looked: int = 500) -> None:
    """Say before anything is loaded that videos are missing, and refuse where all are.

    Raises:
        UserError: none of those that are looked at is there.
    """
    chosen = listed.paths[:: max(1, len(listed.paths) // looked)]
    missing = [path for path in chosen if not path.exists()]
    if len(missing) == len(chosen):
        raise UserError(f"none of the {len(listed.paths)} videos is there, as {chosen[0]}: look at --data-dir")
    if missing and int(os.environ.get("RANK", "0")) == 0:
        print(f"{len(missing)} of {len(chosen)} videos looked at are missing, as {missing[0]}", file=sys.stderr)
    videos.check_reader(next(path for path in chosen if path.exists()))


def _classes(config: Config, listed: lists.Listed) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Base and novel."""
    if config.base_classes is not None:
        base = lists.names_in(Path(config.base_classes))
        if config.novel_classes is not None:
            novel = lists.names_in(Path(config.novel_classes))
        else:
            novel = tuple(name for name in listed.classes if name not in set(base))
        lists.check_split(base, novel, listed.classes)
        return base, novel
    if config.split == "frequent":
        return listed.frequent()
    trained = {label for label, split in zip(listed.labels, listed.splits, strict=True) if split == "train"}
    base = tuple(name for name in listed.classes if name in trained)
    return base, tuple(name for name in listed.classes if name not in trained)


def _few(paths: Sequence[Path], labels: Sequence[str], config: Config) -> tuple[list[Path], list[str]]:
    """``shots`` videos of each class, drawn by the seed."""
    assert config.shots is not None
    rng = np.random.default_rng([config.seed, 8])
    chosen: list[int] = []
    for name in sorted(set(labels)):
        rows = [i for i, label in enumerate(labels) if label == name]
        chosen += rng.permutation(rows)[: config.shots].tolist()
    return [paths[i] for i in sorted(chosen)], [labels[i] for i in sorted(chosen)]


def other_data(
    dataset: str, data_dir: Path | None, number: int, config: Config, without: Sequence[str] = ()
) -> VideoClips:
    """Test videos of another data set (all of them where it has no test split), for the cross-dataset protocol.

    Args:
        without: classes that are left out, by name.

    Raises:
        UserError: files are missing or not understood, or no video is left.
    """
    if dataset in ("kinetics", "ucf101", "hmdb51", "ssv2") and data_dir is None:
        raise UserError(f"--dataset {dataset} needs --data-dir, the folder of its videos and lists")
    listed = lists.read(dataset, data_dir, number)
    left_out = {name.lower() for name in without}
    classes = tuple(name for name in listed.classes if name.lower() not in left_out)
    paths, labels = listed.of("test", classes)
    if "test" not in listed.splits:
        paths, labels = listed.of("train", classes)
    if not paths:
        raise UserError(f"{dataset}: no test videos of classes that were not trained on")
    return VideoClips(paths, labels, classes, replace(config))


def make_sprites(options: SpriteOptions) -> dict[str, Any]:
    """Write a world of moving sprites as a user's own videos: videos.csv, .npy, masks, and lists of classes.

    Raises:
        UserError: the folder is not empty.
    """
    folder = options.output_dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder: give another --output-dir")
    world = sprites.SpriteWorld(options.seed)
    rng = np.random.default_rng([options.seed, 6])
    rows = ["video,label,split"]
    for kind in ("videos", "masks"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    parts = [("train", world.known, options.clips), ("test", world.known, options.test_clips),
             ("test", world.novel, options.test_clips)]  # fmt: skip
    number = 0
    for split, classes, count in parts:
        labels = classes[np.arange(count) % len(classes)]
        masks, colours = world.foregrounds(labels, rng)
        if split == "train":
            others = world.known[rng.integers(len(world.known), size=count)]
            shown = np.where(rng.random(count) < 0.95, labels, others)
        else:
            shown = labels
        clips = sprites.paste(masks, colours, world.crops(world.owner[shown], rng))
        for label, clip, mask in zip(labels, clips, masks, strict=True):
            name = f"{number:05d}.npy"
            np.save(folder / "videos" / name, clip.transpose(0, 2, 3, 1))
            np.save(folder / "masks" / name, mask)
            rows.append(f"videos/{name},{world.name(label)},{split}")
            number += 1
    for kind, classes in (("base", world.known), ("novel", world.novel)):
        text = "".join(f"{world.name(label)}\n" for label in classes)
        (folder / f"{kind}.txt").write_text(text, encoding="utf-8")
    (folder / "videos.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return {"videos": number, "table": str(folder / "videos.csv")}
