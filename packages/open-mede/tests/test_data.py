"""What a run works on: base and novel classes of videos, other data sets, and moving sprites as a user's own files."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metazoo.errors import UserError
from open_mede import data, scuba, sprites
from open_mede.config import Config, PredictOptions, ScubaOptions, SpriteOptions
from open_mede.data import Clips, VideoClips
from open_mede.model import VideoTextClassifier, tiny_clip
from open_mede.predict import predict

torch.set_num_threads(1)

TRAINED = {"nod": 5, "wave": 4, "turn": 3, "sway": 2, "run": 1}
"""Training videos of each class; two are tests."""


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .csv of videos, of which nothing is read here."""
    folder = tmp_path_factory.mktemp("table")
    lines = ["video,label,split"]
    for name, count in TRAINED.items():
        lines += [f"{name}{i}.mp4,{name},{'train' if i < count else 'test'}" for i in range(count + 2)]
    (folder / "videos.csv").write_text("\n".join(lines) + "\n")
    for line in lines[1:]:
        (folder / line.split(",")[0]).touch()
    return folder / "videos.csv"


def config(table: Path, **options: Any) -> Config:
    return Config(dataset=str(table), model="x", frames=2, stride=1, **options)


def names(path: Path, *classes: str) -> str:
    path.write_text("\n".join(classes) + "\n")
    return str(path)


def shown(clips: Clips | VideoClips | None) -> tuple[tuple[str, ...], list[str]]:
    """Classes, and videos by name; each label is its video's."""
    assert isinstance(clips, VideoClips)
    found = [path.stem for path in clips.paths]
    assert [clips.classes[i] for i in clips.labels] == [name.rstrip("0123456789") for name in found]
    return clips.classes, found


# ---- base and novel


def test_all_classes(table: Path) -> None:
    found = data.load(config(table))
    classes, videos = shown(found.train)
    assert classes == tuple(sorted(TRAINED))
    assert len(videos) == sum(TRAINED.values())
    assert list(found.tests) == ["base"]
    assert len(found.tests["base"]) == 2 * len(TRAINED)
    assert set(videos).isdisjoint(shown(found.tests["base"])[1])


def test_frequent(table: Path) -> None:
    """The half with the most training videos is trained on; each test is among its own classes."""
    found = data.load(config(table, split="frequent"))
    classes, videos = shown(found.train)
    assert classes == ("nod", "turn", "wave")
    assert Counter(name.rstrip("0123456789") for name in videos) == {"nod": 5, "wave": 4, "turn": 3}
    assert shown(found.tests["base"]) == (classes, ["nod5", "nod6", "wave4", "wave5", "turn3", "turn4"])
    assert shown(found.tests["novel"]) == (("run", "sway"), ["sway2", "sway3", "run1", "run2"])


def test_by_files(table: Path, tmp_path: Path) -> None:
    """In the order of the file; the novel ones are all others, or those of a file."""
    base = names(tmp_path / "base.txt", "wave", "nod")
    found = data.load(config(table, base_classes=base))
    assert shown(found.train)[0] == ("wave", "nod")
    assert shown(found.tests["novel"])[0] == ("run", "sway", "turn")
    novel = names(tmp_path / "novel.txt", "turn")
    found = data.load(config(table, base_classes=base, novel_classes=novel))
    assert shown(found.tests["novel"]) == (("turn",), ["turn3", "turn4"])


def test_wrong_classes(table: Path, tmp_path: Path) -> None:
    base, novel = names(tmp_path / "base.txt", "wave", "nod"), names(tmp_path / "novel.txt", "turn", "nod")
    with pytest.raises(UserError, match=r"'nod' is among base and novel classes \(1 are\)"):
        data.load(config(table, base_classes=base, novel_classes=novel))
    with pytest.raises(UserError, match=r"class 'Wave' has no videos \(1 of them\): write it as the data set does"):
        data.load(config(table, base_classes=names(tmp_path / "b.txt", "Wave", "nod")))
    with pytest.raises(UserError, match=r"class 'jump' has no videos"):
        data.load(config(table, base_classes=base, novel_classes=names(tmp_path / "n.txt", "jump")))
    with pytest.raises(UserError, match=r"none\.txt: no such file"):
        data.load(config(table, base_classes=str(tmp_path / "none.txt")))
    with pytest.raises(UserError, match=r"none\.csv: no such \.csv or folder"):
        data.load(config(tmp_path / "none.csv"))


def test_holdout(table: Path) -> None:
    """Settings are chosen on training videos of base classes: no test video and no novel class is among them."""
    found = data.load(config(table, split="frequent", holdout=1))
    classes, videos = shown(found.train)
    held, tests = shown(found.tests["novel"])
    assert list(found.tests) == ["novel"]
    assert len(classes) == 2
    assert {*classes, *held} == {"nod", "turn", "wave"}
    assert len(videos) + len(tests) == 5 + 4 + 3
    assert all(int(name[-1]) < TRAINED[name[:-1]] for name in tests)
    others = {shown(data.load(config(table, split="frequent", holdout=1, seed=s)).tests["novel"])[0] for s in range(9)}
    assert len(others) > 1
    with pytest.raises(UserError, match="--holdout is 2 of 3 classes: leave 2 or more"):
        data.load(config(table, split="frequent", holdout=2))


def test_shots(table: Path) -> None:
    """As many of each class, or all where there are fewer; drawn by the seed; tests stay whole."""
    found = data.load(config(table, shots=2))
    _, videos = shown(found.train)
    assert Counter(name[:-1] for name in videos) == {"nod": 2, "wave": 2, "turn": 2, "sway": 2, "run": 1}
    assert shown(data.load(config(table, shots=2)).train)[1] == videos
    drawn = {tuple(shown(data.load(config(table, shots=2, seed=seed)).train)[1]) for seed in range(5)}
    assert len(drawn) > 1
    assert len(found.tests["base"]) == 2 * len(TRAINED)


def test_nothing_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests alone: a frozen learner can still be scored."""
    (tmp_path / "t.csv").write_text("video,label,split\na.mp4,wave,test\nb.mp4,nod,test\n")
    with pytest.raises(UserError, match=r"none of the 2 videos is there, as .*a\.mp4: look at --data-dir"):
        data.load(config(tmp_path / "t.csv"))
    (tmp_path / "b.mp4").touch()
    found = data.load(config(tmp_path / "t.csv"))
    assert "1 of 2 videos looked at are missing" in capsys.readouterr().err
    assert found.train is None
    assert {name: len(clips) for name, clips in found.tests.items()} == {"novel": 2}


# ---- other data sets


def test_other_data(table: Path) -> None:
    """Test videos alone; classes that were trained on go by name, whatever their case."""
    asked = config(table)
    assert shown(data.other_data(str(table), None, 1, asked))[0] == tuple(sorted(TRAINED))
    found = data.other_data(str(table), None, 1, asked, ["Wave", "NOD", "jump"])
    assert shown(found) == (("run", "sway", "turn"), ["turn3", "turn4", "sway2", "sway3", "run1", "run2"])
    with pytest.raises(UserError, match="no test videos of classes that were not trained on"):
        data.other_data(str(table), None, 1, asked, list(TRAINED))
    with pytest.raises(UserError, match="--dataset hmdb51 needs --data-dir"):
        data.other_data("hmdb51", None, 1, asked)


def test_other_data_without_tests(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("video,label\na.mp4,wave\nb.mp4,nod\n")
    assert len(data.other_data(str(tmp_path / "t.csv"), None, 1, config(tmp_path / "t.csv"))) == 2


# ---- generated clips


def test_holdout_of_generated() -> None:
    """Held-out classes are of the known ones, with their test clips in context and out of it."""
    features = Config(dataset="features", model="linear", clips=100, test_clips=100, holdout=5)
    moving = Config(dataset="sprites", model="tiny", clips=90, test_clips=30, draws=1, holdout=6)
    for whole, few, known in ((replace(features, holdout=0), features, 20), (replace(moving, holdout=0), moving, 30)):
        all_classes = data.load(whole).train
        found = data.load(few)
        assert all_classes is not None
        assert found.train is not None
        held = found.tests["novel_in"].classes
        assert len(held) == few.holdout
        assert len(found.train.classes) == known - few.holdout
        assert {*held, *found.train.classes} == set(all_classes.classes)
        assert found.tests["base_out"].classes == found.train.classes


def test_batches() -> None:
    """Each clip at most once an epoch, in whole batches; another epoch, seed or stream is another order."""
    found = data.batches(23, 4, 0, 0)
    assert found.shape == (5, 4)
    assert len(np.unique(found)) == 20
    assert found.max() < 23
    assert np.array_equal(found, data.batches(23, 4, 0, 0))
    for other in (data.batches(23, 4, 1, 0), data.batches(23, 4, 0, 1), data.batches(23, 4, 0, 0, 1)):
        assert not np.array_equal(found, other)


# ---- sprites as files


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sprites") / "new" / "world"
    found = data.make_sprites(SpriteOptions(output_dir=folder, clips=35, test_clips=30, seed=4))
    assert found == {"videos": 95, "table": str(folder / "videos.csv")}
    return folder


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_written(world: Path) -> None:
    """Clips with their masks and classes; lists that tell known classes from novel ones."""
    held = rows(world / "videos.csv")
    base, novel = ((world / f"{kind}.txt").read_text().splitlines() for kind in ("base", "novel"))
    assert len(base) == len(novel) == len({*base, *novel}) / 2 == 30
    assert Counter(row["split"] for row in held) == {"train": 35, "test": 60}
    assert {row["label"] for row in held if row["split"] == "train"} <= set(base)
    assert {row["label"] for row in held if row["split"] == "test"} == {*base, *novel}
    for row in held[:5]:
        clip = np.load(world / row["video"])
        mask = np.load(world / row["video"].replace("videos", "masks"))
        assert (clip.shape, clip.dtype) == ((8, 32, 32, 3), np.uint8)
        assert (mask.shape, mask.dtype) == ((8, 32, 32), bool)
        assert len(np.unique(clip[mask], axis=0)) == 1  # a sprite has one colour
        behind = np.where(mask[..., None], 0, clip)
        assert (np.abs(behind[0].astype(int) - behind[1])[~(mask[0] | mask[1])] == 0).all()


def test_written_again(world: Path, tmp_path: Path) -> None:
    """The same by seed; another seed is another world; what is there is left alone."""
    options = SpriteOptions(output_dir=tmp_path / "a", clips=35, test_clips=30, seed=4)
    data.make_sprites(options)
    for file in ("videos.csv", "base.txt", "videos/00003.npy", "masks/00090.npy"):
        assert (tmp_path / "a" / file).read_bytes() == (world / file).read_bytes()
    data.make_sprites(replace(options, output_dir=tmp_path / "b", seed=5))
    assert (tmp_path / "b" / "videos.csv").read_bytes() != (world / "videos.csv").read_bytes()
    with pytest.raises(UserError, match="a is not an empty folder: give another --output-dir"):
        data.make_sprites(options)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is not an empty folder"):
        data.make_sprites(replace(options, output_dir=tmp_path / "file"))


def test_from_sprites_to_predictions(world: Path, tmp_path: Path) -> None:
    """What make-data writes is read by load, by make-ooc, whose table is another data set, and by predict."""
    own = Config(
        dataset=str(world / "videos.csv"), base_classes=str(world / "base.txt"), novel_classes=str(world / "novel.txt"),
        model="x", frames=8, stride=1, views=1, jitter=(224, 224),
    )  # fmt: skip
    found = data.load(own)
    assert isinstance(found.train, VideoClips)
    found.train.size = 32
    clips, labels = found.train.training([0, 7], [0])
    assert clips.shape == (2, 8, 3, 32, 32)
    assert np.array_equal(clips[1], np.load(world / "videos" / "00007.npy").transpose(0, 3, 1, 2))
    assert found.train.classes[labels[1]] == rows(world / "videos.csv")[7]["label"]
    assert {kind: len(clips) for kind, clips in found.tests.items()} == {"base": 30, "novel": 30}

    few = tmp_path / "few.csv"
    few.write_text("\n".join((world / "videos.csv").read_text().splitlines()[:4]) + "\n")
    made = scuba.make_scuba(
        ScubaOptions(
            videos=few, data_dir=world, masks=world / "masks", draws=2, output_dir=tmp_path / "ooc"
        )
    )  # fmt: skip
    assert made["videos"] == 6
    outside = data.other_data(made["table"], None, 1, own)
    outside.size = 32
    seen, read = outside.testing(range(6))
    assert len(read) == 6
    mask = np.load(world / "masks" / "00002.npy")
    frames = np.load(world / "videos" / "00002.npy")
    for view in seen[4:, 0].transpose(0, 1, 3, 4, 2):
        assert np.array_equal(view[mask], frames[mask])
        assert (view[~mask] != frames[~mask]).any(-1).mean() > 0.9

    backbone, tokenizer, processor = tiny_clip(
        Config(dataset="sprites", model="tiny", width=8, heads=2, vision_layers=1, text_layers=1, patch=16)
    )
    VideoTextClassifier.of(backbone, tokenizer=tokenizer, processor=processor).save_pretrained(tmp_path / "model")
    said = predict(
        PredictOptions(
            videos=(world / "videos" / "00000.npy", outside.paths[0]), model=str(tmp_path / "model"),
            classes=(str(world / "novel.txt"),), output_dir=tmp_path / "out", top_k=1,
        )
    )  # fmt: skip
    assert said["videos"] == 2
    assert {row["class"] for row in rows(Path(said["predictions"]))} <= set(
        (world / "novel.txt").read_text().splitlines()
    )


def test_words_are_known(world: Path) -> None:
    """The tiny tokenizer knows every word of a class: no two of them read alike."""
    _, tokenizer, _ = tiny_clip(
        Config(dataset="sprites", model="tiny", width=8, heads=2, vision_layers=1, text_layers=1, patch=16)
    )
    classes = (world / "base.txt").read_text().split("\n")[:-1] + (world / "novel.txt").read_text().split("\n")[:-1]
    ids = tokenizer(classes)["input_ids"]
    assert len({tuple(one) for one in ids}) == len(sprites.CLASSES)
    assert not any(tokenizer.unk_token_id in one for one in ids)
