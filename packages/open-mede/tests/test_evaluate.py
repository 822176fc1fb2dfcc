"""Scores: figures by hand, texts encoded once, views averaged, videos that cannot be read, other data sets."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from metazoo.errors import UserError
from metazoo.options import RunOptions
from open_mede import data, metrics, videos
from open_mede.config import Config, EvaluateOptions
from open_mede.data import Clips, VideoClips
from open_mede.evaluate import OpenVocabularyEvaluator, evaluate
from open_mede.model import FeatureClassifier, VideoTextClassifier, tiny_clip
from open_mede.train import Run, load, train
from PIL import Image

torch.set_num_threads(1)

TINY = Config(
    dataset="sprites", model="tiny", width=8, heads=2, vision_layers=1, text_layers=1, patch=16, clips=40,
    test_clips=8, draws=2, image_steps=0, adapter=2, epochs=1, batch=16, method="meta", alpha=0.1, lr=0.1,
)  # fmt: skip
FEATURES = Config(dataset="features", model="linear", clips=200, test_clips=60, epochs=2, batch=50, seed=3)
SHARES = st.floats(0, 100)


# ---- metrics


@given(SHARES, SHARES)
def test_harmonic_mean(a: float, b: float) -> None:
    """Between both, at most the geometric mean, symmetric; 0 where one is."""
    found = metrics.harmonic_mean(a, b)
    assert found == metrics.harmonic_mean(b, a)
    assert min(a, b) - 1e-9 <= found <= max(a, b) + 1e-9
    assert found <= np.sqrt(a * b) + 1e-9
    assert metrics.harmonic_mean(a, 0) == 0


@pytest.mark.parametrize(
    ("a", "b", "found"), [(73.8, 42.0, 53.53), (83.3, 33.2, 47.48), (83.7, 44.7, 58.28), (50, 50, 50), (0, 0, 0)]
)
def test_harmonic_mean_of_the_table(a: float, b: float, found: float) -> None:
    """Of the pairs that the paper prints."""
    assert metrics.harmonic_mean(a, b) == pytest.approx(found, abs=5e-3)


def test_accuracy() -> None:
    probabilities = np.array([[0.2, 0.8, 0.0], [0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.9, 0.1, 0.0]])
    labels = np.array([1, 0, 2, 2])
    assert metrics.accuracy(probabilities, labels) == 75
    assert metrics.by_class(probabilities, labels, ["a", "b", "c", "d"]) == {"a": 100, "b": 100, "c": 50}
    with pytest.raises(UserError, match="no clips"):
        metrics.accuracy(np.zeros((0, 3)), np.zeros(0))


def test_summary() -> None:
    found = metrics.summary({"base_in": 80, "base_out": 20, "novel_in": 60, "novel_out": 30})
    assert found == {
        "base_in": 80, "base_out": 20, "novel_in": 60, "novel_out": 30, "hm_in": pytest.approx(9600 / 140),
        "hm_out": pytest.approx(24), "base_hm": pytest.approx(32), "novel_hm": pytest.approx(40), "base_drop": 60,
        "novel_drop": 30,
    }  # fmt: skip
    assert metrics.summary({"base": 60, "novel": 30}) == {"base": 60, "novel": 30, "hm": pytest.approx(40)}
    assert metrics.summary({"ucf101": 12.5}) == {"ucf101": 12.5}
    assert metrics.summary({}) == {}


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0, 27.753), (10, 10, 72.247, 100), (81, 263, 25.527, 36.620), (1, 29, 0.611, 17.176)],
)
def test_interval(right: int, count: int, low: float, high: float) -> None:
    """Of 81 in 263 and 1 in 29 as in Newcombe (1998), Table I, method 3."""
    assert metrics.interval(right, count) == pytest.approx((low, high), abs=6e-3)


# ---- the evaluator


@pytest.fixture(scope="module")
def model() -> VideoTextClassifier:
    torch.manual_seed(0)
    backbone, tokenizer, processor = tiny_clip(TINY)
    return VideoTextClassifier.of(backbone, adapter=2, tokenizer=tokenizer, processor=processor)


CLASSES = ("east steady", "west steady", "turn halting")


def own(folder: Path, count: int = 6, **options: Any) -> VideoClips:
    """Videos of noise of 12 frames; classes in turn."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.npy" for i in range(count)]
    for path in paths:
        np.save(path, rng.integers(0, 256, (12, 40, 36, 3), dtype=np.uint8))
    config = Config(dataset="x.csv", model="x", **{"frames": 4, "stride": 2, "views": 3, "workers": 2, **options})
    return VideoClips(paths, [CLASSES[i % 3] for i in range(count)], CLASSES, config)


def test_texts_are_encoded_once(model: VideoTextClassifier, tmp_path: Path) -> None:
    """For each list of classes, however many clips and sets there are."""
    before = model.encoded
    evaluator = OpenVocabularyEvaluator(model, ["{}", "a video of {}"], batch_size=2)
    clips = own(tmp_path)
    evaluator.score(clips)
    evaluator.score(clips)
    evaluator({"one": clips, "two": clips})
    assert model.encoded - before == 2 * len(CLASSES)
    evaluator.texts(CLASSES[:2])
    assert model.encoded - before == 2 * len(CLASSES) + 2 * 2


def test_views_are_averaged(model: VideoTextClassifier, tmp_path: Path) -> None:
    """Probabilities, not logits, of views as read one by one; the size is the model's; no gradient is kept."""
    clips = own(tmp_path)
    evaluator = OpenVocabularyEvaluator(model, batch_size=4)
    found = evaluator.score(clips)
    assert clips.size == 32
    assert found.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert found.indices.tolist() == list(range(6))
    np.testing.assert_allclose(found.probabilities.sum(1), 1, rtol=1e-5)
    texts = model.encode_texts(CLASSES)
    for row, path in enumerate(clips.paths):
        views = videos.read_clips(path, 4, 2, [1 / 6, 1 / 2, 5 / 6])
        said = []
        for view in views:
            pixels = model.pixels(videos.fitted(view, 32, 32, 0.5, 0.5, False)[None])
            with torch.no_grad():
                said.append(model(pixels, texts).softmax(-1)[0].numpy())
        np.testing.assert_allclose(found.probabilities[row], np.mean(said, 0), rtol=1e-4, atol=1e-6)
    assert found.accuracy == metrics.accuracy(found.probabilities, found.labels)
    assert set(found.by_class) == set(CLASSES)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_batches_do_not_matter(model: VideoTextClassifier, tmp_path: Path, size: int) -> None:
    clips = own(tmp_path, 5)
    found, other = (OpenVocabularyEvaluator(model, batch_size=n).score(clips).probabilities for n in (size, 2))
    np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-6)


def test_unreadable_are_not_scored(model: VideoTextClassifier, tmp_path: Path) -> None:
    """Nor counted as wrong; their place among labels is not taken by another; a batch may have none."""
    clips = own(tmp_path, unreadable="skip")
    whole = OpenVocabularyEvaluator(model).score(clips)
    for i in (1, 2, 3):
        clips.paths[i].write_bytes(b"no")
    found = OpenVocabularyEvaluator(model, batch_size=1).score(clips)
    assert found.indices.tolist() == [0, 4, 5]
    assert found.labels.tolist() == [0, 1, 2]
    np.testing.assert_allclose(found.probabilities, whole.probabilities[[0, 4, 5]], rtol=1e-4, atol=1e-6)
    assert set(clips.skipped) == {1, 2, 3}
    for path in clips.paths:
        path.write_bytes(b"no")
    with pytest.raises(UserError, match=r"none of the 6 videos can be read, as .*0\.npy: look at --data-dir"):
        OpenVocabularyEvaluator(model).score(clips)
    clips.config = replace(clips.config, unreadable="stop")
    with pytest.raises(UserError, match=r"--unreadable skip"):
        OpenVocabularyEvaluator(model).score(clips)


def test_no_clips(model: VideoTextClassifier) -> None:
    with pytest.raises(UserError, match="no clips to score"):
        OpenVocabularyEvaluator(model).score(Clips(("a",), np.zeros(0, int), np.zeros((0, 8, 3, 32, 32), np.uint8)))


def test_features() -> None:
    """The start knows contexts alone: right in context, by chance out of it."""
    world = data.load(replace(FEATURES, test_clips=400))
    assert world.features is not None
    found = OpenVocabularyEvaluator(FeatureClassifier.of(world.features))(world.tests)
    assert found["base_in"] > 70 > 15 > found["base_out"]
    assert found["novel_in"] > 70 > 15 > found["novel_out"]
    assert found["base_drop"] == pytest.approx(found["base_in"] - found["base_out"])


# ---- runs


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(FEATURES, RunOptions(output_dir=tmp_path_factory.mktemp("features") / "run"))


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Videos of four classes, of which two are trained on."""
    folder = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(2)
    lines = ["video,label,split"]
    for i in range(24):
        np.save(folder / f"{i}.npy", rng.integers(0, 256, (9, 34, 40, 3), dtype=np.uint8))
        label = ("east steady", "west steady", "turn halting", "nod steady")[i % 4]
        lines.append(f"{i}.npy,{label},{'train' if i < 16 else 'test'}")
    (folder / "videos.csv").write_text("\n".join(lines) + "\n")
    (folder / "base.txt").write_text("east steady\nwest steady\n")
    backbone, tokenizer, processor = tiny_clip(TINY)
    for part in (backbone, tokenizer, processor):
        part.save_pretrained(folder / "clip")
    return folder / "videos.csv"


@pytest.fixture(scope="module")
def run(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    config = Config(
        dataset=str(table), base_classes=str(table.parent / "base.txt"), model=str(table.parent / "clip"), frames=3,
        stride=2, views=2, adapter=2, epochs=1, batch=4, method="meta", alpha=0.1, lr=0.1, workers=1,
        unreadable="skip",
    )  # fmt: skip
    return train(config, RunOptions(output_dir=tmp_path_factory.mktemp("own") / "run"))


def kept(folder: Path, stem: str = "evaluation") -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"{stem}.json").read_text())
    return found


def test_generated(features: Run) -> None:
    """Also from its folder alone; numbers of classes give chance; nothing is skipped."""
    found = evaluate(features)
    assert {"base_in", "base_out", "novel_in", "novel_out", "hm_in", "hm_out", "base_drop"} <= found.keys()
    assert found["chance_base_in"] == found["chance_novel_out"] == 5
    assert "skipped" not in found
    held = kept(features.folder)
    assert {name: value for name, value in held.items() if name != "by_class"} == found
    assert len(held["by_class"]["novel_in"]) == len(np.unique(features.data.tests["novel_in"].labels))
    pictures = {path.name for path in features.folder.glob("evaluation*.png")}
    assert pictures == {"evaluation.png", "evaluation-base.png", "evaluation-novel.png"}
    for picture in pictures:
        with Image.open(features.folder / picture) as image:
            assert min(image.size) > 300
    assert evaluate(features.folder, EvaluateOptions(plots=False)) == pytest.approx(found)
    assert evaluate(load(str(features.folder)), EvaluateOptions(plots=False)) == pytest.approx(found)


def test_average_is_chosen(features: Run) -> None:
    """Each gives the scores of its weights, and the run's own come back."""
    own_scores = evaluate(features, EvaluateOptions(plots=False))
    for name in ("last", "swa", "ema", "gwa"):
        found = evaluate(features, EvaluateOptions(average=name, plots=False))
        model = features.use(name)
        wanted = OpenVocabularyEvaluator(model)(features.data.tests)
        assert {key: found[key] for key in wanted} == pytest.approx(wanted)
        for key, value in features.weights[name].items():
            assert torch.equal(dict(model.named_parameters())[key], value)
    assert evaluate(features, EvaluateOptions(plots=False)) == pytest.approx(own_scores)


def test_no_plots(features: Run, tmp_path: Path) -> None:
    evaluate(replace(features, folder=tmp_path), EvaluateOptions(plots=False))
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]


def test_own_videos(run: Run) -> None:
    """Base and novel classes by name, each among its own; frames with predictions are drawn."""
    found = evaluate(run)
    assert {"base", "novel", "hm", "chance_base", "chance_novel", "skipped"} == set(found)
    assert found["hm"] == pytest.approx(metrics.harmonic_mean(found["base"], found["novel"]))
    assert (found["chance_base"], found["chance_novel"], found["skipped"]) == (50, 50, 0)
    assert set(kept(run.folder)["by_class"]["novel"]) == {"nod steady", "turn halting"}
    pictures = {path.name for path in run.folder.glob("evaluation*.png")}
    assert {"evaluation.png", "evaluation-strips.png"} <= pictures


def test_skipped_videos(run: Run, table: Path) -> None:
    """Counted over all sets, and left out of the scores."""
    held = {i: (table.parent / f"{i}.npy").read_bytes() for i in (16, 17, 22)}
    try:
        for i in held:
            (table.parent / f"{i}.npy").write_bytes(b"no")
        found = evaluate(load(run.folder), EvaluateOptions(plots=True))
        assert found["skipped"] == 3
    finally:
        for i, content in held.items():
            (table.parent / f"{i}.npy").write_bytes(content)


def other(table: Path, name: str, *rows: str) -> Path:
    path = table.parent / name
    path.write_text("\n".join(["video,label,split", *rows]) + "\n")
    return path


def test_other_data(run: Run, table: Path) -> None:
    """Its test videos among all of its classes; in files of their own; without what was trained on, if asked."""
    path = other(table, "ucf.csv", "0.npy,East Steady,test", "1.npy,bounce steady,test", "2.npy,blink steady,train",
                 "3.npy,blink steady,test")  # fmt: skip
    before = (run.folder / "evaluation.json").read_bytes() if (run.folder / "evaluation.json").exists() else b""
    found = evaluate(run, EvaluateOptions(dataset=str(path)))
    assert set(found) == {"ucf", "chance_ucf", "skipped"}
    assert found["chance_ucf"] == pytest.approx(100 / 3)
    assert set(kept(run.folder, "evaluation-ucf")["by_class"]["ucf"]) == {
        "East Steady", "bounce steady", "blink steady"
    }  # fmt: skip
    assert (run.folder / "evaluation-ucf.png").exists()
    found = evaluate(run, EvaluateOptions(dataset=str(path), without_trained=True, plots=False, views=1))
    assert found["chance_ucf"] == 50
    assert set(kept(run.folder, "evaluation-ucf")["by_class"]["ucf"]) == {"bounce steady", "blink steady"}
    assert before == ((run.folder / "evaluation.json").read_bytes() if before else b"")


def test_other_data_without_split(run: Run, table: Path) -> None:
    """All of them are tests then."""
    path = table.parent / "all.csv"
    path.write_text("video,label\n0.npy,sway steady\n1.npy,bounce steady\n")
    evaluate(run, EvaluateOptions(dataset=str(path), plots=False))
    assert len(kept(run.folder, "evaluation-all")["by_class"]["all"]) == 2


def test_wrong_other_data(features: Run, run: Run, table: Path) -> None:
    path = other(table, "same.csv", "0.npy,EAST steady,test", "1.npy,west steady,test")
    with pytest.raises(UserError, match="no test videos of classes that were not trained on"):
        evaluate(run, EvaluateOptions(dataset=str(path), without_trained=True))
    with pytest.raises(UserError, match="learned of feature vectors, not of videos"):
        evaluate(features, EvaluateOptions(dataset=str(path)))
    with pytest.raises(UserError, match="--dataset ucf101 needs --data-dir"):
        evaluate(run, EvaluateOptions(dataset="ucf101"))


def test_nothing_trained(tmp_path: Path) -> None:
    """A frozen learner has scores, and no averages to choose from."""
    run = train(replace(FEATURES, method="frozen"), RunOptions(output_dir=tmp_path / "run"))
    assert evaluate(run, EvaluateOptions(plots=False))["base_in"] > 50
    with pytest.raises(UserError, match="--average gwa: the run has none: leave it out"):
        evaluate(run, EvaluateOptions(average="gwa"))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"views": 0}, "--views is 0"), ({"batch_size": 0}, "--batch-size is 0"),
        ({"templates": ("a video",)}, "give one {} for the class name"), ({"without_trained": True}, "is for another"),
        ({"dataset": "sprites"}, "is a run's own"),
    ],
)  # fmt: skip
def test_wrong_options(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        EvaluateOptions(**options)
