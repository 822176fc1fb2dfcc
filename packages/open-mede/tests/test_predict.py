"""Predictions for a user's own videos, by a saved learner, a plain CLIP and an X-CLIP; and wrong models."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import av
import huggingface_hub.constants
import numpy as np
import pytest
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from open_mede import videos
from open_mede.config import Config, PredictOptions
from open_mede.model import VideoTextClassifier, load_classifier, tiny_clip
from open_mede.predict import predict
from PIL import Image
from transformers import BertConfig, BertModel, XCLIPConfig, XCLIPModel

torch.set_num_threads(1)

TINY = Config(
    dataset="sprites", model="tiny", width=8, heads=2, vision_layers=1, text_layers=1, patch=16, clips=4, test_clips=4
)
CLASSES = ("east steady", "west steady", "turn halting", "nod steady")


def saved(folder: Path) -> Path:
    """Models as a user has them: a learner, a CLIP, an X-CLIP, and one of another type."""
    torch.manual_seed(0)
    backbone, tokenizer, processor = tiny_clip(TINY)
    VideoTextClassifier.of(backbone, adapter=2, tokenizer=tokenizer, processor=processor).save_pretrained(
        folder / "learner"
    )
    both = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    xclip = XCLIPModel(
        XCLIPConfig(
            text_config={**both, "vocab_size": len(tokenizer), "max_position_embeddings": 16, "pad_token_id": 0,
                         "bos_token_id": 1, "eos_token_id": 3},
            vision_config={**both, "image_size": 32, "patch_size": 16, "num_frames": 8, "mit_hidden_size": 8,
                           "mit_intermediate_size": 16, "mit_num_attention_heads": 2, "mit_num_hidden_layers": 1},
            projection_dim=8, prompt_layers=1, prompt_num_attention_heads=2,
        )
    )  # fmt: skip
    for name, model in (("clip", backbone), ("xclip", xclip)):
        for part in (model, tokenizer, processor):
            part.save_pretrained(folder / name)
    BertModel(BertConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2, num_hidden_layers=1,
                         vocab_size=8)).save_pretrained(folder / "bert")  # fmt: skip
    return folder


def movie(path: Path, frames: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=5)
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = saved(tmp_path_factory.mktemp("predict"))
    frames = np.random.default_rng(0).integers(0, 256, (12, 40, 48, 3), dtype=np.uint8)
    np.save(root / "a.npy", frames)
    (root / "b").mkdir()
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(root / "b" / f"{i:03d}.png")
    movie(root / "c.mp4", frames)
    np.save(root / "short.npy", frames[:5])
    np.save(root / "long.npy", np.concatenate([frames, frames]))
    (root / "text.mp4").write_text("404")
    return root


def asked(root: Path, out: Path, *names: str, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "videos": tuple(root / name for name in names or ("a.npy", "b", "c.mp4")), "model": str(root / "learner"),
        "classes": CLASSES, "output_dir": out, **changes,
    }  # fmt: skip
    return predict(PredictOptions(**given))


def rows(out: Path) -> list[list[str]]:
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_predictions(folder: Path, tmp_path: Path) -> None:
    """Best first, as many as asked for; the same frames say the same in an .npy and a folder; a picture beside."""
    found = asked(folder, tmp_path / "new" / "out")
    assert (found["videos"], found["skipped"]) == (3, 0)
    assert found["predictions"] == str(tmp_path / "new" / "out" / "predictions.csv")
    head, *held = rows(tmp_path / "new" / "out")
    assert head == ["video", "rank", "class", "probability"]
    assert [row[0] for row in held] == [str(folder / name) for name in ("a.npy", "b", "c.mp4") for _ in range(3)]
    assert [row[1] for row in held] == ["1", "2", "3"] * 3
    for i in range(0, 9, 3):
        values = [float(row[3]) for row in held[i : i + 3]]
        assert values == sorted(values, reverse=True)
        assert sum(values) < 1
        assert len({row[2] for row in held[i : i + 3]} & set(CLASSES)) == 3
    assert [row[1:] for row in held[:3]] == [row[1:] for row in held[3:6]]
    with Image.open(tmp_path / "new" / "out" / "strips.png") as picture:
        assert min(picture.size) > 300


def test_as_by_hand(folder: Path, tmp_path: Path) -> None:
    """The mean of probabilities over views; all classes where fewer than --top-k are there."""
    asked(folder, tmp_path, "a.npy", top_k=9, views=2, stride=1, frames=4, templates=("{}", "a {} on sand"))
    model = load_classifier(folder / "learner")
    texts = model.encode_texts(CLASSES, ("{}", "a {} on sand"))
    views = videos.read_clips(folder / "a.npy", 4, 1, [0.25, 0.75])
    pixels = model.pixels(np.stack([videos.fitted(view, 32, 32, 0.5, 0.5, False) for view in views]))
    with torch.no_grad():
        said = model(pixels, texts).softmax(-1).mean(0)
    wanted = sorted(zip(said.tolist(), CLASSES, strict=True), reverse=True)
    assert [(row[2], float(row[3])) for row in rows(tmp_path)[1:]] == [
        (name, pytest.approx(value, abs=1e-4)) for value, name in wanted
    ]


def test_classes_from_a_file(folder: Path, tmp_path: Path) -> None:
    """One a line; a comma in a name is quoted."""
    names = tmp_path / "names.txt"
    names.write_text("east steady, slowly\nwest steady\n", encoding="utf-8")
    asked(folder, tmp_path / "out", "a.npy", classes=(str(names),))
    assert {row[2] for row in rows(tmp_path / "out")[1:]} == {"east steady, slowly", "west steady"}


@pytest.mark.parametrize(
    ("classes", "says"),
    [
        (("wave", "nod", "wave"), "class 'wave' comes twice"), (("wave", " "), "class 2 has no name"),
        (("east " * 20,), "has more tokens than the 16 of the text tower"),
    ],
)  # fmt: skip
def test_wrong_classes(folder: Path, tmp_path: Path, classes: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        asked(folder, tmp_path / "out", "a.npy", classes=classes)
    assert not (tmp_path / "out").exists()


def test_wrong_class_file(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("wave\nwave\n")
    with pytest.raises(UserError, match=r"names\.txt: 'wave' comes twice"):
        asked(folder, tmp_path / "out", "a.npy", classes=(str(tmp_path / "names.txt"),))


def test_overwrite(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "predictions.csv").write_text("mine")
    with pytest.raises(UserError, match=r"predictions\.csv is there: give --overwrite, or another --output-dir"):
        asked(folder, tmp_path, "a.npy")
    assert (tmp_path / "predictions.csv").read_text() == "mine"
    assert list(tmp_path.iterdir()) == [tmp_path / "predictions.csv"]
    asked(folder, tmp_path, "a.npy", overwrite=True)
    assert len(rows(tmp_path)) == 4


def test_unreadable(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Stop names it and writes nothing; skip names it, counts it and goes on."""
    for name, says in (("short.npy", "has 5 frames, a clip 8"), ("text.mp4", "cannot be read as a video")):
        with pytest.raises(UserError, match=rf"{name}.*{says}.*\(--unreadable skip goes on without it\)"):
            asked(folder, tmp_path / "out", "a.npy", name)
    assert not (tmp_path / "out").exists()
    found = asked(folder, tmp_path / "out", "short.npy", "a.npy", "text.mp4", unreadable="skip", top_k=1)
    assert (found["videos"], found["skipped"]) == (1, 2)
    assert [row[0] for row in rows(tmp_path / "out")[1:]] == [str(folder / "a.npy")]
    said = capsys.readouterr().err.splitlines()
    assert [line.startswith("skipped: ") for line in said] == [True, True]
    with pytest.raises(UserError, match="none of the 2 videos can be read"):
        asked(folder, tmp_path / "none", "short.npy", "text.mp4", unreadable="skip")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("model", ["clip", "xclip"])
def test_plain_models(folder: Path, tmp_path: Path, model: str) -> None:
    """Folders as transformers saves them, with tokenizer and processor."""
    asked(folder, tmp_path, "a.npy", "c.mp4", model=str(folder / model), top_k=4)
    values = [float(row[3]) for row in rows(tmp_path)[1:]]
    assert len(values) == 8
    assert sum(values[:4]) == pytest.approx(1, abs=1e-3)


def test_clip_is_the_mean_over_frames(folder: Path, tmp_path: Path) -> None:
    """A plain CLIP's logits of each frame, as transformers gives them, averaged."""
    asked(folder, tmp_path, "a.npy", model=str(folder / "clip"), top_k=4, views=1)
    learner = load_classifier(folder / "clip")
    backbone, tokenizer = learner.backbone, learner.tokenizer
    (clip,) = videos.read_clips(folder / "a.npy", 8, 16, [0.5])
    pixels = learner.pixels(videos.fitted(clip, 32, 32, 0.5, 0.5, False))
    with torch.no_grad():
        ids = tokenizer(list(CLASSES), padding=True, return_tensors="pt")["input_ids"]
        logits = backbone(input_ids=ids, pixel_values=pixels).logits_per_image.mean(0)
    wanted = dict(zip(CLASSES, logits.softmax(-1).tolist(), strict=True))
    assert {row[2]: float(row[3]) for row in rows(tmp_path)[1:]} == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("frames", [4, 12, 16])
def test_frames_of_an_xclip(folder: Path, tmp_path: Path, frames: int) -> None:
    """It has places for 8 frames: another number is refused by name, not by a traceback."""
    with pytest.raises(UserError, match="8"):
        asked(folder, tmp_path, "long.npy", model=str(folder / "xclip"), frames=frames)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("bert", "holds a model of type 'bert': give a CLIP or an X-CLIP"), ("b", "no config.json in it"),
        ("empty", "not JSON"), ("weightless", "cannot load"), ("partial", "weights of .* are missing"),
        ("pickled", "cannot load"), ("wordless", "tokenizer"), ("unfinished", "has no model yet: finish it"),
    ],
)  # fmt: skip
def test_wrong_models(folder: Path, tmp_path: Path, model: str, says: str) -> None:
    """Named in one line; no pickle is loaded."""
    source = folder / model
    if model in ("empty", "weightless", "partial", "pickled", "wordless"):
        source = tmp_path / "model"
        source.mkdir()
        for file in (folder / "clip").iterdir():
            (source / file.name).write_bytes(file.read_bytes())
        if model == "empty":
            (source / "config.json").write_text("{")
        elif model == "weightless":
            (source / "model.safetensors").write_bytes(b"\0" * 64)
        elif model == "partial":
            from safetensors.torch import load_file, save_file

            weights = load_file(source / "model.safetensors")
            weights.pop("visual_projection.weight")
            save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
        elif model == "pickled":
            (source / "model.safetensors").rename(source / "pytorch_model.bin")
        else:
            for file in source.glob("*token*"):
                file.unlink()
    if model == "unfinished":
        source = tmp_path / "run"
        (source / "checkpoints").mkdir(parents=True)
        runfolder.write_json(source / "config.json", runfolder.config_to_dict(TINY))
    with pytest.raises(UserError, match=says) as raised:
        asked(folder, tmp_path / "out", "a.npy", model=str(source))
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_without_network(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"cannot load 'nobody/no-such-clip' .*without a network only") as raised:
        asked(folder, tmp_path, "a.npy", model="nobody/no-such-clip")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"--model runs/none: no such run: train one, or give the hub id"):
        asked(folder, tmp_path, "a.npy", model="runs/none")


def test_config_without_backbone(folder: Path, tmp_path: Path) -> None:
    """A learner's config that was emptied by hand."""
    for file in (folder / "learner").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    del config["backbone"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="a backbone of type None: give a CLIP or an X-CLIP"):
        load_classifier(tmp_path)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"videos": ()}, "no videos: give"), ({"videos": (Path("none.mp4"),)}, "none.mp4: no such video"),
        ({"classes": ()}, "no --classes"), ({"top_k": 0}, "--top-k is 0"), ({"frames": 0}, "--frames is 0"),
        ({"stride": 0}, "--stride is 0"), ({"views": 0}, "--views is 0"),
        ({"templates": ("a {} and {}",)}, "give one {} for the class name"),
        ({"templates": ("a {name}",)}, "give one {} for the class name"),
        ({"model": ""}, "no --model"),
    ],
)  # fmt: skip
def test_wrong_options(folder: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        PredictOptions(**{"videos": (folder / "a.npy",), "classes": CLASSES, "model": "m", **options})
