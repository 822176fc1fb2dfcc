"""Episodes follow their laws; sets in their real formats, written here; what is damaged is one line."""

from __future__ import annotations

import io
import math
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import transformers
from mambacl import data
from mambacl.config import Config
from mambacl.data import (
    ClassEpisodes,
    CompletionEpisodes,
    Episode,
    EpisodeConfig,
    FeatureEpisodes,
    OmniglotEpisodes,
    RotationEpisodes,
    SineEpisodes,
    encode_images,
    encode_sentences,
    load,
    pooled,
    read_gnt,
    validate,
)
from mambacl.episodes import rotate, scaled
from metazoo.errors import UserError
from PIL import Image
from torch import Tensor

torch.set_num_threads(1)
SETTING = EpisodeConfig(tasks=3, shots=2, test_shots=2, vocabulary=6)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No data of the machine's own, no cache of an earlier test, no network."""
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def images(classes: int = 6, each: int = 5, size: int = 8) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 256, (classes * each, 1, size, size), dtype=torch.uint8, generator=generator())
    return x, torch.arange(classes).repeat_interleave(each)


SOURCES = {
    "features": lambda: FeatureEpisodes(8, 0.3, SETTING),
    "sine": lambda: SineEpisodes(SETTING),
    "classes": lambda: ClassEpisodes(*images(), SETTING),
    "rotation": lambda: RotationEpisodes(*images(), SETTING),
    "completion": lambda: CompletionEpisodes(*images(), SETTING),
    "omniglot": lambda: OmniglotEpisodes("test", SETTING),
}


@pytest.mark.parametrize("name", SOURCES)
def test_episodes_have_their_shapes_and_order(name: str) -> None:
    """Streams in task order, queries of every task; the same from the same generator, another from another."""
    source = SOURCES[name]()
    episode = source.draw(4, generator())
    assert episode.task.tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    assert episode.query_task.tolist() == [[0, 0, 1, 1, 2, 2]] * 4
    assert episode.x.shape == episode.query_x.shape == (4, 6, *source.shape)
    assert episode.x.dtype == torch.float32
    wanted = (4, 6) if source.kind == "class" else (4, 6, source.outputs)
    assert episode.y.shape == episode.query_y.shape == wanted
    again, other = source.draw(4, generator()), source.draw(4, generator(1))
    assert all(torch.equal(a, b) for a, b in zip(episode, again, strict=True))
    assert not torch.equal(episode.x, other.x)
    validate(episode, source.kind, 6, task_order=True)
    first = next(iter(source))
    assert first.x.shape == (6, *source.shape)


@pytest.mark.parametrize("name", ["features", "classes"])
def test_codes_are_injections(name: str) -> None:
    """Check of step 3: one symbol a class, different ones in an episode, every symbol as likely; anew in each."""
    episode = SOURCES[name]().draw(400, generator())
    symbols = episode.y[:, ::2]
    assert torch.equal(symbols, episode.y[:, 1::2])
    assert torch.equal(symbols, episode.query_y[:, ::2])
    assert all(len(set(row)) == 3 for row in symbols.tolist())
    share = torch.bincount(symbols.flatten(), minlength=6) / 1200
    assert (share - 1 / 6).abs().max() < 5 * math.sqrt(1 / 6 * 5 / 6 / 1200)


def test_random_queries() -> None:
    """``queries``: of random tasks, of fresh examples."""
    x = torch.arange(60.0).unsqueeze(1)
    source = ClassEpisodes(x, torch.arange(4).repeat_interleave(15), EpisodeConfig(
        tasks=3, shots=2, queries=5, vocabulary=6))  # fmt: skip
    episode = source.draw(50, generator())
    assert episode.query_x.shape == (50, 5, 1)
    assert episode.query_task.unique().tolist() == [0, 1, 2]
    for b in range(50):
        seen = torch.cat([episode.x[b], episode.query_x[b]]).flatten().tolist()
        assert len(set(seen)) == 11


def test_no_example_is_in_stream_and_queries() -> None:
    """All different, each of the class that its code says; classes of unequal size too."""
    y = torch.tensor([7] * 4 + [2] * 9 + [5] * 6 + [3] * 4)
    source = ClassEpisodes(torch.arange(23.0).unsqueeze(1), y, SETTING)
    episode = source.draw(100, generator())
    for b in range(100):
        stream, asked = episode.x[b].flatten().long(), episode.query_x[b].flatten().long()
        assert len({*stream.tolist(), *asked.tolist()}) == 12
        of = {int(c): int(y[i]) for c, i in zip(episode.y[b], stream, strict=True)}
        assert len(set(of.values())) == 3
        assert all(of[int(c)] == int(y[i]) for c, i in zip(episode.y[b], stream, strict=True))
        assert all(of[int(c)] == int(y[i]) for c, i in zip(episode.query_y[b], asked, strict=True))
    drawn = torch.bincount(y[episode.x.flatten().long()], minlength=8)
    assert (drawn[torch.tensor([2, 3, 5, 7])] > 100).all()


def test_features_have_their_moments() -> None:
    """Within a class the standard deviation is ``spread``; class means have 1."""
    setting = EpisodeConfig(tasks=2, shots=50, vocabulary=2)
    x = FeatureEpisodes(8, 0.3, setting).draw(100, generator()).x.view(100, 2, 50, 8)
    assert x.std(2).mean().item() == pytest.approx(0.3, rel=0.02)
    assert x.mean(2).std().item() == pytest.approx(math.sqrt(1 + 0.09 / 50), rel=0.05)


def test_sine_law() -> None:
    """Check 8: E[y²] = ½(1 + 1/12) = 0.5417; noise of 0.1 on x only; every curve is one sine of 0.1 to 1.1 Hz."""
    setting = EpisodeConfig(tasks=5, shots=4, test_shots=1, vocabulary=0)
    episode = SineEpisodes(setting).draw(200, generator())
    assert episode.y.square().mean().item() == pytest.approx(0.5417, abs=0.01)
    times = torch.linspace(0, 10, 50, dtype=torch.float64)
    frequencies = torch.linspace(0.1, 1.1, 2001, dtype=torch.float64)
    basis = torch.stack([torch.sin(2 * math.pi * frequencies[:, None] * times),
                         torch.cos(2 * math.pi * frequencies[:, None] * times)], 2)  # fmt: skip
    projections, _ = torch.linalg.qr(basis)
    for b in range(5):
        best = []
        for t in range(5):
            y = episode.y[b, 4 * t].double()
            left = y.square().sum() - (projections.mT @ y).square().sum(1)
            best.append(int(left.argmin()))
            assert left.min() / y.square().sum() < 1e-4  # a noiseless sine
            x = episode.x[b, 4 * t : 4 * t + 4].double()
            rest = x.square().sum() - (x @ projections[best[-1]]).square().sum()
            assert 0.05 < math.sqrt(rest / (4 * 48)) < 0.15  # the same frequency, and noise
        assert len(set(best)) == 5
    assert frequencies.max() < 49 / 10 / 2


def test_noise_is_on_the_raw_inputs() -> None:
    """σ of the difference to the same law without noise; labels have none."""
    noisy = EpisodeConfig(tasks=3, shots=50, vocabulary=6, noise=2.0)
    x = FeatureEpisodes(8, 0.0, noisy).draw(50, generator()).x.view(50, 3, 50, 8)
    assert x.std(2).mean().item() == pytest.approx(2.0, rel=0.03)
    sine = SineEpisodes(EpisodeConfig(tasks=3, shots=4, noise=2.0)).draw(50, generator())
    assert sine.y.abs().max() <= 1.5
    assert sine.x.std().item() == pytest.approx(math.sqrt(4 + 0.01 + 0.5417), rel=0.05)


def test_rotation() -> None:
    """A quarter turn is torch.rot90; outside is white; targets are the angle's cosine and sine."""
    x = scaled(images()[0][:3]).unsqueeze(0)
    for quarter in range(4):
        angle = torch.full((1, 3), quarter * math.pi / 2)
        assert torch.allclose(rotate(x, angle), torch.rot90(x, quarter, (3, 4)), atol=1e-4)
    black = torch.full((1, 1, 1, 8, 8), -1.0)
    turned = rotate(black, torch.tensor([[math.pi / 4]]))
    assert turned[0, 0, 0, 0, 0].item() == pytest.approx(1.0)
    assert turned[0, 0, 0, 4, 4].item() == pytest.approx(-1.0)
    episode = SOURCES["rotation"]().draw(3, generator())
    assert torch.allclose(episode.y.square().sum(-1), torch.ones(3, 6))


def test_completion_halves_make_the_image() -> None:
    x, y = images()
    source = CompletionEpisodes(x, y, SETTING)
    episode = source.draw(5, generator())
    whole = torch.cat([episode.x, episode.y.view(5, 6, 1, 4, 8)], 3)
    known = {tuple(image.flatten().tolist()) for image in scaled(x)}
    assert all(tuple(image.flatten().tolist()) in known for image in whole.flatten(0, 1))


def test_omniglot20_is_in_the_package() -> None:
    """242 characters x 20 drawings; 39 of Tagalog and Early Aramaic for meta-test, no character in both."""
    found = load(Config(dataset="omniglot20", image_size=20))
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert (len(found.train.classes), len(found.test.classes)) == (203, 39)
    assert not set(found.train.classes.tolist()) & set(found.test.classes.tolist())
    assert (found.train.counts == 20).all()
    assert found.train.shape == (1, 20, 20)
    with pytest.raises(UserError, match="20 x 20"):
        load(Config(dataset="omniglot20"))
    with pytest.raises(UserError, match="train or test"):
        OmniglotEpisodes("dev", SETTING)


def png(size: int = 12, mode: str = "L", seed: int = 0) -> bytes:
    rng = np.random.default_rng(seed)
    shape = (size, size) if mode == "L" else (size, size, 3)
    file = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def omniglot_zip(path: Path, alphabets: dict[str, int], drawings: int = 4) -> None:
    with zipfile.ZipFile(path, "w") as file:
        for alphabet, characters in alphabets.items():
            for c in range(characters):
                for i in range(drawings):
                    name = f"{path.stem}/{alphabet}/character{c + 1:02d}/{c:04d}_{i:02d}.png"
                    file.writestr(name, png(seed=100 * c + i))


def test_omniglot_zips(tmp_path: Path) -> None:
    """The official pair: background trains, evaluation tests; the small pair: by alphabet, what both have once."""
    omniglot_zip(tmp_path / "images_background_small1.zip", {"Greek": 3, "Latin": 2})
    omniglot_zip(tmp_path / "images_background_small2.zip", {"Greek": 3, "Tagalog": 3})
    config = Config(dataset="omniglot", data_dir=str(tmp_path), image_size=10, tasks=2)
    found = load(config)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert (len(found.train.x), len(found.test.x)) == (20, 12)
    omniglot_zip(tmp_path / "images_background.zip", {"Greek": 3, "Latin": 2})
    omniglot_zip(tmp_path / "images_evaluation.zip", {"Avesta": 4})
    found = load(config)
    assert (len(found.train.x), len(found.test.x)) == (20, 16)  # type: ignore[attr-defined]
    assert found.train.shape == (1, 10, 10)
    (tmp_path / "images_evaluation.zip").write_bytes((tmp_path / "images_background.zip").read_bytes()[:300])
    with pytest.raises(UserError, match=r"images_evaluation\.zip"):
        load(config)


def parquet(path: Path, rows: int, classes: int = 100, **columns: Any) -> None:
    pictures = [{"bytes": png(32, "RGB", seed=i), "path": None} for i in range(rows)]
    table = {"img": pictures, "fine_label": [i % classes for i in range(rows)], **columns}
    pyarrow.parquet.write_table(pyarrow.table(table), path)


def test_cifar100(tmp_path: Path) -> None:
    """The hub's schema; all images of both files, 40 of 100 classes for meta-test."""
    parquet(tmp_path / "train.parquet", 300)
    parquet(tmp_path / "test.parquet", 100)
    config = Config(dataset="cifar100", data_dir=str(tmp_path))
    found = load(config)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert (len(found.train.classes), len(found.test.classes)) == (60, 40)
    assert found.train.shape == (3, 32, 32)
    assert len(found.train.x) == 240
    parquet(tmp_path / "test.parquet", 3, fine_label=[1, 2, 100])
    with pytest.raises(UserError, match=r"row 2: fine_label is 100"):
        load(config)
    pyarrow.parquet.write_table(pyarrow.table({"image": [1]}), tmp_path / "test.parquet")
    with pytest.raises(UserError, match=r"test\.parquet"):
        load(config)
    (tmp_path / "test.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match="unreadable"):
        load(config)


def gnt(*records: tuple[str, int, int]) -> bytes:
    rng = np.random.default_rng(0)
    return b"".join(
        struct.pack("<I2sHH", 10 + w * h, label.encode("gbk").ljust(2, b"\0"), w, h) + rng.bytes(w * h)
        for label, w, h in records
    )


def test_casia(tmp_path: Path) -> None:
    """GNT records in any folder: fitted into a square, centred on white; a fifth of the characters for meta-test."""
    (tmp_path / "Gnt1.0TrainPart1").mkdir()
    for number in range(3):
        rows = [(label, 20 + number, 30) for label in "一二三四五六七八九十" for _ in range(2)]
        (tmp_path / "Gnt1.0TrainPart1" / f"{number}.gnt").write_bytes(gnt(*rows))
    config = Config(dataset="casia", data_dir=str(tmp_path), image_size=16, tasks=2)
    found = load(config)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert (len(found.train.classes), len(found.test.classes)) == (8, 2)
    assert (found.train.counts == 6).all()
    (name, image), *_ = read_gnt(tmp_path / "Gnt1.0TrainPart1" / "0.gnt", 16)
    assert name == "一"
    assert image.shape == (1, 16, 16)
    assert (image[0, :, :2] == 255).all()  # 20 x 30 is narrower than the square
    assert (image[0, :, 4:12] != 255).any()
    for variant, kind in (("rotation", "angle"), ("completion", "image")):
        other = load(Config(dataset="casia", variant=variant, data_dir=str(tmp_path), image_size=16, tasks=2))
        assert other.train.kind == kind
    cut = tmp_path / "Gnt1.0TrainPart1" / "0.gnt"
    cut.write_bytes(gnt(("一", 5, 5))[:-3])
    with pytest.raises(UserError, match=r"0\.gnt: the record at byte 0"):
        load(config)
    cut.write_bytes(gnt(("一", 5, 5)) + b"\1\2")
    with pytest.raises(UserError, match="cut off at byte 35"):
        load(config)
    for folder, words in (("none", "not a folder"), ("empty", r"\.gnt")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=words):
            load(Config(dataset="casia", data_dir=str(tmp_path / folder)))


def sentences(folder: Path) -> None:
    folder.mkdir(parents=True)
    for files in data.CORPORA.values():
        for file in files:
            labels = range(6) if file.startswith("TREC") else range(2)
            lines = [f"{label} text {i} of {file} caf\xe9" for label in labels for i in range(4)]
            (folder / file).write_text("\n".join(lines) + "\n", encoding="latin-1")


def bert(folder: Path) -> None:
    """A tiny sentence encoder in the hub's layout."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "text", "of", *map(str, range(10))]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words), hidden_size=12, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    transformers.BertModel(config).save_pretrained(folder)


def test_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Six corpora, 16 classes, TREC's six for meta-test; features of a frozen encoder, computed once."""
    sentences(tmp_path / "sentences")
    bert(tmp_path / "bert")
    config = Config(dataset="sentences", data_dir=str(tmp_path), frozen=str(tmp_path / "bert"))
    found = load(config)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert (len(found.train.classes), len(found.test.classes)) == (10, 6)
    assert found.train.shape == (12,)
    assert torch.allclose(found.test.x.norm(dim=1), torch.ones(len(found.test.x)), atol=1e-5)
    monkeypatch.setattr(data, "_transformers", lambda what: pytest.fail("features were computed again"))
    again = load(config)
    assert torch.equal(again.test.x, found.test.x)  # type: ignore[attr-defined]
    (tmp_path / "sentences" / "mpqa.all").write_text("1 fine\nno label here\n", encoding="latin-1")
    with pytest.raises(UserError, match=r"mpqa\.all line 2"):
        load(config)


def test_features_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    """Padding is masked: batches of 1 and of 3 give the same features, in the order of the texts."""
    bert(tmp_path / "bert")
    texts = ["text 1 of 2 of 3 text", "text", "of 4 text"]
    together = encode_sentences(texts, str(tmp_path / "bert"), batch=3)
    for text, row in zip(texts, together, strict=True):
        assert np.allclose(encode_sentences([text], str(tmp_path / "bert"))[0], row, atol=1e-5)
    states, mask = torch.tensor([[[3.0, 4.0], [9.0, 9.0]]]), torch.tensor([[1, 0]])
    assert torch.allclose(pooled(states, mask), torch.tensor([[0.6, 0.8]]))


def clip(folder: Path) -> None:
    """A tiny CLIP in the hub's layout."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        vision_config={**size, "image_size": 16, "patch_size": 8}, text_config={**size, "vocab_size": 9},
        projection_dim=6,
    )  # fmt: skip
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}).save_pretrained(
        folder
    )


def test_frozen_clip(tmp_path: Path) -> None:
    """Images by the features of a CLIP; grey ones too; what is no CLIP or no picture is refused."""
    clip(tmp_path / "clip")
    for name in "abcdef":
        (tmp_path / "mine" / name).mkdir(parents=True)
        for i in range(4):
            (tmp_path / "mine" / name / f"{i}.png").write_bytes(png(seed=i))
    config = Config(dataset=str(tmp_path / "mine"), frozen=str(tmp_path / "clip"), tasks=2, meta_test_classes=2)
    found = load(config)
    assert found.train.shape == (6,)
    assert torch.allclose(found.train.x.norm(dim=1), torch.ones(16), atol=1e-5)  # type: ignore[attr-defined]
    bert(tmp_path / "bert")
    with pytest.raises(UserError, match="--frozen"):
        encode_images(np.zeros((1, 1, 8, 8), dtype=np.uint8), str(tmp_path / "bert"))
    with pytest.raises(UserError, match="neither"):
        encode_images(np.zeros((1, 8), dtype=np.float32), str(tmp_path / "clip"))
    with pytest.raises(UserError, match="cannot be loaded"):
        encode_images(np.zeros((1, 1, 8, 8), dtype=np.uint8), str(tmp_path / "nowhere"))


def test_missing_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"metazoo-mambacl\[frozen\]"):
        encode_images(np.zeros((1, 1, 8, 8), dtype=np.uint8), "any")
    monkeypatch.setitem(sys.modules, "PIL", None)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(UserError, match=r"metazoo-mambacl\[images\]"):
        data._pillow()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"metazoo-mambacl\[minilm\]"):
        data.minilm()


def write_csv(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_own_table(tmp_path: Path) -> None:
    """A CSV with a column of classes; a fifth of them for meta-test, or as many as asked for; standardised by the rest."""
    rng = np.random.default_rng(0)
    lines = ["a,species,b"] + [f"{rng.normal():.3f},s{i % 10},{10 + rng.normal():.3f}" for i in range(60)]
    path = write_csv(tmp_path / "mine.csv", lines)
    found = load(Config(dataset=path, target="species", tasks=2))
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert (len(found.train.classes), len(found.test.classes)) == (8, 2)
    assert torch.allclose(found.train.x.mean(0), torch.zeros(2), atol=1e-5)
    assert torch.allclose(found.train.x.std(0, correction=0), torch.ones(2), atol=1e-5)
    found = load(Config(dataset=path, target="species", tasks=2, meta_test_classes=4))
    assert len(found.test.classes) == 4  # type: ignore[attr-defined]


def test_own_arrays(tmp_path: Path) -> None:
    """An .npz of features, or of images as bytes with channels last; classes may be text."""
    y = np.repeat(["p", "q", "r", "s", "t", "u"], 5)
    np.savez(tmp_path / "f.npz", x=np.random.default_rng(0).normal(size=(30, 4)), y=y)
    assert load(Config(dataset=str(tmp_path / "f.npz"), tasks=1)).train.shape == (4,)
    np.savez(tmp_path / "i.npz", x=np.zeros((30, 9, 7, 3), dtype=np.uint8), y=y)
    assert load(Config(dataset=str(tmp_path / "i.npz"), tasks=1)).train.shape == (3, 9, 7)


def test_own_folder(tmp_path: Path) -> None:
    for name in "abcdef":
        (tmp_path / name).mkdir()
        for i in range(4):
            (tmp_path / name / f"{i}.png").write_bytes(png(mode="RGB", seed=i))
    assert load(Config(dataset=str(tmp_path), image_size=10, tasks=1)).train.shape == (3, 10, 10)
    (tmp_path / "a" / "0.png").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"0\.png: cannot be decoded"):
        load(Config(dataset=str(tmp_path), image_size=10, tasks=1))


def bad(case: str, folder: Path) -> Any:
    body = [f"{i},{i % 3},c{i % 5}" for i in range(20)]
    table = {
        "text": ["a,b,c", *body, "x,1,c0"],
        "nan": ["a,b,c", *body, "nan,1,c0"],
        "ragged": ["a,b,c", *body, "1,c0"],
        "short": ["a,b,c"],
        "column": ["a,b,c", *body],
        "few classes": ["a,b,c", *body],
        "all classes": ["a,b,c", *body],
    }
    if case in table:
        path = write_csv(folder / "mine.csv", table[case])
        changes: dict[str, Any] = {"column": {"target": "d"}, "all classes": {"meta_test_classes": 5}}.get(case, {})
        return load(Config(dataset=path, **changes))
    if case == "few examples":
        np.savez(folder / "f.npz", x=np.zeros((18, 2)), y=np.repeat(np.arange(6), 3))
        source = load(Config(dataset=str(folder / "f.npz"), tasks=1, shots=3)).train
        return source.draw(1, generator(), EpisodeConfig(tasks=1, shots=3, vocabulary=6))
    if case == "many tasks":
        return ClassEpisodes(*images(), SETTING).draw(1, generator(), EpisodeConfig(tasks=7, shots=1, vocabulary=9))
    if case == "vocabulary":
        return FeatureEpisodes(3, 0.1, SETTING).draw(1, generator(), EpisodeConfig(tasks=7, shots=1, vocabulary=6))
    if case == "shots":
        return EpisodeConfig(tasks=1, shots=0)
    if case == "npz":
        np.savez(folder / "f.npz", x=np.array([[np.inf, 1.0]] * 3), y=np.arange(3))
        return load(Config(dataset=str(folder / "f.npz")))
    if case == "pickle":
        np.savez(folder / "f.npz", x=np.zeros((3, 2)), y=np.array([{}, {}, {}]))
        return load(Config(dataset=str(folder / "f.npz")))
    if case == "empty folder":
        return load(Config(dataset=str(folder)))
    if case == "odd":
        return CompletionEpisodes(*images(size=9), SETTING)
    if case == "turned features":
        return RotationEpisodes(torch.zeros(6, 3), torch.arange(6), SETTING)
    if case == "variant":
        return load(Config(variant="rotation"))
    if case == "frozen":
        return load(Config(frozen="any"))
    if case == "no omniglot":
        return load(Config(dataset="omniglot"))
    return load(Config(dataset="mnist"))


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("text", "line 22, column a: 'x' is no number"), ("nan", "line 22, column a: not a finite number"),
        ("ragged", "line 22: 2 values"), ("short", "a header"), ("column", "no column 'd'"),
        ("few classes", "1 classes for meta-test"), ("all classes", "leave some"),
        ("few examples", "has 3 examples, an episode wants 4"), ("many tasks", "6 classes"),
        ("vocabulary", "vocabulary of 6"), ("shots", "shots is 0"), ("npz", "index"), ("pickle", "unreadable"),
        ("empty folder", "a folder for each class"), ("odd", "even height"), ("turned features", "only images"),
        ("variant", "needs images"), ("frozen", "--frozen"), ("no omniglot", "METAZOO_DATA"),
        ("unknown", "unknown data set 'mnist'"),
    ],
)  # fmt: skip
def test_bad_input(case: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words) as caught:
        bad(case, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("label", "episode 0, query 1: label"), ("code", "outside 0 … 5"), ("order", "tasks come back"),
        ("nan", "query_x: nan"), ("empty", "at least one shot"), ("shapes", "one for each"), ("kind", "the same kind"),
        ("task", "show the task"),
    ],
)  # fmt: skip
def test_validate(case: str, words: str) -> None:
    """Episodes from outside: each fault is named."""
    x, query_x = torch.zeros(1, 4, 2), torch.zeros(1, 2, 2)
    y, task = torch.tensor([[1, 1, 3, 3]]), torch.tensor([[0, 0, 1, 1]])
    query_y, query_task = torch.tensor([[1, 3]]), torch.tensor([[0, 1]])
    if case == "label":
        query_y = torch.tensor([[1, 2]])
    elif case == "code":
        y = query_y = torch.tensor([[1, 6]])
        x, task = x[:, :2], torch.tensor([[0, 1]])
    elif case == "order":
        task = torch.tensor([[0, 1, 0, 1]])
    elif case == "nan":
        query_x[0, 1, 0] = torch.nan
    elif case == "empty":
        x, y, task = x[:, :0], y[:, :0], task[:, :0]
    elif case == "shapes":
        y = y[:, :3]
    elif case == "kind":
        query_x = torch.zeros(1, 2, 3)
    else:
        query_task = torch.tensor([[0, 2]])
    with pytest.raises(UserError, match=words):
        validate(Episode(x, y, task, query_x, query_y, query_task), "class", 6, task_order=True)
