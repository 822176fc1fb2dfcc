"""Data: laws of the generated episodes, what an episode of classes is, files of the real formats, what is refused."""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import random
import struct
import sys
import types
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
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
    validate,
)
from mambacl.episodes import rotate
from metazoo.errors import UserError
from PIL import Image
from torch import Tensor

torch.set_num_threads(1)
SETTING = EpisodeConfig(tasks=3, shots=2, test_shots=1, vocabulary=5)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(dataset: str | Path, **changes: Any) -> data.Data:
    return data.load(Config(dataset=str(dataset), **({"tasks": 2, "shots": 1, "vocabulary": 6} | changes)))


@contextlib.contextmanager
def refused(*words: str) -> Iterator[None]:
    """A UserError of one line that has all the words."""
    with pytest.raises(UserError) as error:
        yield
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def numbered(counts: tuple[int, ...] = (3, 7, 4, 5, 9)) -> tuple[Tensor, Tensor]:
    """x [N, 2] holds the class and the number of the example; the classes are 10, 20, … in a mixed order."""
    y = torch.tensor([10 * (i + 1) for i, count in enumerate(counts) for _ in range(count)])
    order = torch.randperm(len(y), generator=seeded())
    return torch.stack([y, torch.arange(len(y))], 1)[order].float(), y[order]


def pictures(classes: int = 4, each: int = 5, size: tuple[int, ...] = (1, 6, 4)) -> tuple[Tensor, Tensor]:
    x = torch.randint(0, 256, (classes * each, *size), dtype=torch.uint8, generator=seeded(1))
    return x, torch.arange(classes).repeat_interleave(each)


# Generated episodes


def replayed(setting: EpisodeConfig, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Frequencies [count, T], and curves x and y of the stream without noise, by the card's formula, in float64."""
    generator = seeded(seed)
    f = 0.1 + torch.rand(count, setting.tasks, generator=generator).double()
    phases = 2 * math.pi * torch.rand(2, count, setting.tasks, generator=generator).double()
    a = 0.5 + torch.rand(count, setting.tasks * setting.shots, generator=generator).double()
    curves = torch.empty(2, count, setting.tasks * setting.shots, 50, dtype=torch.float64)
    for kind in range(2):
        for b in range(count):
            for m in range(setting.tasks * setting.shots):
                k = m // setting.shots
                for i in range(50):
                    t = 10 * i / 49
                    curves[kind, b, m, i] = a[b, m] * math.sin(2 * math.pi * f[b, k] * t + phases[kind, b, k])
    return f, curves[0], curves[1]


def test_sine_is_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """y exactly, x exactly without noise; with it x is off by N(0, 0.1²) and y by nothing."""
    source = SineEpisodes(SETTING)
    _, x, y = replayed(SETTING, 4, 7)
    noisy = source.draw(4, seeded(7))
    assert torch.allclose(noisy.y.double(), y, atol=2e-5)
    errors = noisy.x - x
    assert errors.std().item() == pytest.approx(0.1, rel=0.1)
    assert abs(errors.mean().item()) < 4 * 0.1 / errors.numel() ** 0.5
    monkeypatch.setattr(SineEpisodes, "NOISE", 0.0)
    assert torch.allclose(source.draw(4, seeded(7)).x.double(), x, atol=2e-5)
    assert (source.kind, source.shape, source.outputs) == ("vector", (50,), 50)


def test_sine_has_its_law() -> None:
    """E[y²] = (1 + 1/12) / 2 = 0.5417 (each task's mean is one independent draw), for queries too; frequencies lie
    below the grid's Nyquist frequency 49 / 20 = 2.45."""
    episode = SineEpisodes(EpisodeConfig(tasks=2, shots=1, test_shots=1)).draw(20_000, seeded(1))
    for y in (episode.y, episode.query_y):
        squares = y.square().mean(-1).flatten()
        assert abs(squares.mean().item() - 13 / 24) < 4 * squares.std().item() / len(squares) ** 0.5
    f = 0.1 + torch.rand(20_000, 2, generator=seeded(1))  # its first draw
    assert f.min() >= 0.1
    assert f.max() <= 1.1 < 49 / 20
    power = torch.fft.rfft(episode.y[:200] * torch.hann_window(50), dim=-1).abs().square()
    assert (power[..., 15:].sum(-1) < 1e-3 * power.sum(-1)).all()  # above 15 / (50 · 10 / 49) = 1.47 only leakage


def test_queries_of_a_sine_are_its_tasks() -> None:
    """Stream and queries of a task are multiples of one curve y."""
    episode = SineEpisodes(EpisodeConfig(tasks=3, shots=2, queries=4)).draw(5, seeded())
    assert episode.query_y.shape == (5, 4, 50)
    for b in range(5):
        for q in range(4):
            curve = episode.y[b, episode.task[b] == episode.query_task[b, q]][0]
            assert torch.cosine_similarity(curve, episode.query_y[b, q], dim=0).abs() > 1 - 1e-5


def test_features_have_their_law() -> None:
    """Means N(0, I), examples about them with the spread; without spread a class is one point."""
    point = FeatureEpisodes(4, 0.0, SETTING).draw(6, seeded())
    assert torch.equal(point.x[:, 0], point.x[:, 1])
    assert torch.equal(point.x[:, ::2], point.query_x)
    assert not torch.equal(point.x[:, 0], point.x[:, 2])
    episode = FeatureEpisodes(4, 0.3, SETTING).draw(4000, seeded())
    within = (episode.x[:, 0] - episode.x[:, 1]).var()
    between = (episode.x[:, 0] - episode.x[:, 2]).var()
    assert within.item() == pytest.approx(2 * 0.09, rel=0.05)
    assert between.item() == pytest.approx(2 * 1.09, rel=0.05)
    asked = (episode.x[:, 0] - episode.query_x[:, 0]).var()
    assert asked.item() == pytest.approx(2 * 0.09, rel=0.05)


@pytest.mark.parametrize("kind", ["features", "sine", "class", "rotation", "completion"])
def test_noise_is_on_the_inputs(kind: str) -> None:
    """σ = 3 adds N(0, 9) to x and query_x, and nothing to the stream's targets."""
    setting = EpisodeConfig(tasks=3, shots=2, test_shots=2, vocabulary=5)
    x, y = pictures(size=(1, 8, 8))
    source = {
        "features": lambda: FeatureEpisodes(8, 0.1, setting),
        "sine": lambda: SineEpisodes(setting),
        "class": lambda: ClassEpisodes(x, y, setting),
        "rotation": lambda: RotationEpisodes(x, y, setting),
        "completion": lambda: CompletionEpisodes(x, y, setting),
    }[kind]()
    loud = EpisodeConfig(tasks=3, shots=2, test_shots=2, vocabulary=5, noise=3.0)
    calm, noisy = source.draw(50, seeded()), source.draw(50, seeded(), loud)
    assert torch.equal(calm.y, noisy.y)
    assert (noisy.x - calm.x).std().item() == pytest.approx(3, rel=0.05)
    extra = noisy.query_x.var() - calm.query_x.var()  # other draws: of the variance only
    assert extra.item() == pytest.approx(9, rel=0.15)


# Episodes of classes


@pytest.mark.parametrize("setting", [
    SETTING,
    EpisodeConfig(tasks=5, shots=1, test_shots=2, vocabulary=5),
    EpisodeConfig(tasks=2, shots=2, queries=1, vocabulary=9),
    EpisodeConfig(tasks=1, shots=1, vocabulary=1),
])  # fmt: skip
def test_class_episodes(setting: EpisodeConfig) -> None:
    """T classes, each with a code of its own; their examples, none twice; stream in task order."""
    x, y = numbered()
    source = ClassEpisodes(x, y, setting)
    episode = source.draw(200, seeded())
    t, s = setting.tasks, setting.shots
    assert (source.kind, source.shape, source.outputs) == ("class", (2,), 0)
    assert torch.equal(episode.task, torch.arange(t).repeat_interleave(s).expand(200, -1))
    if setting.queries is None:
        assert torch.equal(episode.query_task, torch.arange(t).repeat_interleave(setting.test_shots).expand(200, -1))
    else:
        assert episode.query_task.shape == (200, setting.queries)
        assert set(episode.query_task.unique().tolist()) == set(range(t))
    truth = dict(zip(x[:, 1].tolist(), y.tolist(), strict=True))
    validate(episode, "class", setting.vocabulary, task_order=True)
    for b in range(200):
        shown = torch.cat([episode.x[b], episode.query_x[b]])
        tasks = torch.cat([episode.task[b], episode.query_task[b]]).tolist()
        codes = torch.cat([episode.y[b], episode.query_y[b]]).tolist()
        assert len(set(shown[:, 1].tolist())) == len(shown)
        classes = [truth[number] for number in shown[:, 1].tolist()]
        assert classes == shown[:, 0].tolist()
        assert len(set(zip(tasks, classes, strict=True))) == t == len(set(classes))
        assert len(set(zip(tasks, codes, strict=True))) == t == len(set(codes))
        assert 0 <= min(codes) <= max(codes) < setting.vocabulary


def test_draws_are_uniform() -> None:
    """Code and class of a task, the example of a class and the task of a query: as often as they should."""
    x, y = numbered()
    episode = ClassEpisodes(x, y, EpisodeConfig(tasks=3, shots=1, queries=1, vocabulary=6)).draw(6000, seeded())

    def agree(values: Tensor, share: float, of: int) -> None:
        counts = torch.unique(values, return_counts=True)[1]
        n = len(values)
        assert len(counts) == of
        assert (counts - n * share).abs().max() < 4.5 * (n * share * (1 - share)) ** 0.5

    agree(episode.y[:, 2], 1 / 6, 6)
    agree(episode.x[:, 1, 0], 1 / 5, 5)
    agree(episode.query_task[:, 0], 1 / 3, 3)
    for label, count in zip(range(10, 60, 10), (3, 7, 4, 5, 9), strict=True):
        agree(episode.x[:, 0, 1][episode.x[:, 0, 0] == label], 1 / count, count)
    pairs = 6 * episode.y[:, 0] + (episode.x[:, 0, 0] / 10).long() * 100
    agree(pairs, 1 / 30, 30)  # the code says nothing of the class


def test_many_queries_of_one_task_are_different_examples() -> None:
    """Queries of random tasks fall on a task again and again: each time a fresh example."""
    x, y = numbered((40, 40))
    episode = ClassEpisodes(x, y, EpisodeConfig(tasks=2, shots=3, queries=12, vocabulary=2)).draw(100, seeded())
    numbers = torch.cat([episode.x, episode.query_x], 1)[..., 1].sort(1).values
    assert (numbers.diff(dim=1) > 0).all()


@pytest.mark.parametrize("make", [
    lambda: FeatureEpisodes(3, 0.3, SETTING, seed=5),
    lambda: SineEpisodes(SETTING, seed=5),
    lambda: ClassEpisodes(*numbered(), SETTING, seed=5),
    lambda: RotationEpisodes(*pictures(), SETTING, seed=5),
    lambda: CompletionEpisodes(*pictures(), SETTING, seed=5),
])  # fmt: skip
def test_draws_follow_from_the_generator(make: Callable[[], Any]) -> None:
    """Equal generators, equal episodes, whatever the global seed; iteration from ``seed``, and through a loader."""
    source = make()
    one = source.draw(4, seeded(3))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again, other = source.draw(4, seeded(3)), source.draw(4, seeded(4))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    assert not torch.equal(one.x, other.x)
    first, second = next(iter(source)), next(iter(make()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first.x.shape == (6, *source.shape)
    assert first.query_y.shape == ((3,) if source.kind == "class" else (3, source.outputs))
    batch = next(iter(torch.utils.data.DataLoader(source, batch_size=4)))
    assert isinstance(batch, Episode)
    assert all(torch.equal(a[0], b) for a, b in zip(batch, first, strict=True))


def test_rows_of_a_batch() -> None:
    episode = SineEpisodes(SETTING).draw(4, seeded())
    assert torch.equal(episode.take(torch.tensor([2, 0])).y, episode.y[[2, 0]])
    assert torch.equal(episode.take(slice(1, 3)).query_task, episode.query_task[1:3])
    assert episode.to("cpu").x is episode.x


def test_images_are_scaled() -> None:
    """0 … 255 to −1 … 1; numbers stay."""
    x = torch.tensor([0, 51, 255], dtype=torch.uint8).view(3, 1, 1, 1).repeat_interleave(2, 0)
    setting = EpisodeConfig(tasks=3, shots=1, vocabulary=3)
    found = ClassEpisodes(x, torch.arange(6) // 2, setting).draw(1, seeded()).x
    assert found.dtype == torch.float32
    assert sorted(found.flatten().tolist()) == pytest.approx([-1, -0.6, 1], abs=1e-6)


def test_what_a_setting_and_a_set_refuse() -> None:
    x, y = numbered()
    with refused("3 classes", "2 symbols"):
        FeatureEpisodes(2, 0.3, SETTING).draw(1, seeded(), EpisodeConfig(tasks=3, shots=1, vocabulary=2))
    with refused("6 tasks", "5 classes"):
        ClassEpisodes(x, y, SETTING).draw(1, seeded(), EpisodeConfig(tasks=6, shots=1, vocabulary=6))
    with refused("class 10 has 3 examples", "may want 4"):
        ClassEpisodes(x, y, SETTING).draw(1, seeded(), EpisodeConfig(tasks=2, shots=2, test_shots=2, vocabulary=6))
    with refused("0 examples"):
        ClassEpisodes(x[:0], y[:0], SETTING)
    with refused("examples and 1 labels"):
        ClassEpisodes(x, y[:1], SETTING)
    for name in ("tasks", "shots", "test_shots"):
        with refused(f"{name} is 0"):
            EpisodeConfig(**({"tasks": 1, "shots": 1} | {name: 0}))
    with refused("noise is -1"):
        EpisodeConfig(tasks=1, shots=1, noise=-1)
    with refused("only images can be rotated"):
        RotationEpisodes(x, y, SETTING)
    with refused("even height"):
        CompletionEpisodes(*pictures(size=(1, 5, 4)), SETTING)
    with refused("even height"):
        CompletionEpisodes(x, y, SETTING)


def test_setting_of_a_config() -> None:
    config = Config(tasks=4, shots=3, test_shots=2, queries=7, vocabulary=9)
    wanted = EpisodeConfig(tasks=4, shots=3, test_shots=2, queries=7, vocabulary=9)
    assert EpisodeConfig.from_config(config) == wanted


# Rotation and completion


def test_quarter_turns() -> None:
    """90, 180, 270 and 360 degrees are torch.rot90; of oblong images too, where 180 keeps the frame."""
    x = torch.rand(2, 3, 3, 8, 8, generator=seeded()) * 2 - 1
    for turns in range(5):
        found = rotate(x, torch.full((2, 3), turns * math.pi / 2))
        assert torch.allclose(found, torch.rot90(x, turns, (-2, -1)), atol=1e-5)
    oblong = torch.rand(1, 1, 1, 4, 8, generator=seeded())
    assert torch.allclose(rotate(oblong, torch.full((1, 1), math.pi)), oblong.flip(-1, -2), atol=1e-5)
    turned = rotate(oblong, torch.full((1, 1), math.pi / 2))  # its middle square turns, what leaves the frame is lost
    assert torch.allclose(turned[..., 2:6], torch.rot90(oblong[..., 2:6], 1, (-2, -1)), atol=1e-5)
    assert torch.allclose(turned[..., :2], torch.ones(1), atol=1e-5)


def test_outside_is_white() -> None:
    black = rotate(-torch.ones(1, 1, 1, 9, 9), torch.full((1, 1), math.pi / 4))
    assert black[0, 0, 0, 0, 0] == 1
    assert black[0, 0, 0, 4, 4] == pytest.approx(-1, abs=1e-6)
    white = torch.ones(1, 5, 1, 9, 9)
    assert torch.allclose(rotate(white, torch.linspace(0, 6, 5).view(1, 5)), white)


def test_rotation_episodes() -> None:
    """The target is (cos, sin) of the very angle that an image of the class was turned by; angles are uniform."""
    x, y = pictures(4, 5, (1, 8, 8))
    source = RotationEpisodes(x, y, EpisodeConfig(tasks=2, shots=2))
    assert (source.kind, source.outputs, source.shape) == ("angle", 2, (1, 8, 8))
    episode = source.draw(30, seeded())
    validate(episode, "angle", 0, task_order=True)
    scaled = x.float() * 2 / 255 - 1
    for found, target in ((episode.x, episode.y), (episode.query_x, episode.query_y)):
        assert torch.allclose(target.norm(dim=-1), torch.ones(1), atol=1e-6)
        angle = torch.atan2(target[..., 1], target[..., 0])
        candidates = rotate(scaled.expand(angle.numel(), *scaled.shape), angle.reshape(-1, 1).expand(-1, len(x)))
        distance = (candidates - found.flatten(0, 1).unsqueeze(1)).abs().amax((-1, -2, -3))
        assert (distance.min(1).values < 1e-4).all()
    many = source.draw(2000, seeded()).y
    assert many.mean((0, 1)).abs().max() < 4 * (0.5 / 8000) ** 0.5
    assert (many[..., 0] * many[..., 1]).mean().abs() < 4 * (0.125 / 8000) ** 0.5


def test_completion_puts_halves_together() -> None:
    x, y = pictures(4, 5, (3, 6, 4))
    source = CompletionEpisodes(x, y, EpisodeConfig(tasks=3, shots=2))
    assert (source.kind, source.outputs, source.shape) == ("image", 36, (3, 3, 4))
    episode = source.draw(20, seeded())
    known = {image.numpy().tobytes(): int(label) for image, label in zip(x, y, strict=True)}
    whole = torch.cat([episode.x, episode.y.view(20, 6, 3, 3, 4)], 3)
    found = ((whole + 1) * 127.5).round().to(torch.uint8)
    assert torch.allclose(found.float() * 2 / 255 - 1, whole, atol=1e-6)
    for b in range(20):
        labels = [known[image.numpy().tobytes()] for image in found[b]]
        assert labels[0::2] == labels[1::2]
        assert len(set(labels)) == 3


# Streams from outside


def outside(**changes: Tensor) -> Episode:
    episode = Episode(
        x=torch.zeros(2, 4, 3), y=torch.tensor([[0, 0, 1, 1], [2, 2, 0, 0]]), task=torch.tensor([[0, 0, 1, 1]] * 2),
        query_x=torch.zeros(2, 1, 3), query_y=torch.tensor([[1], [2]]), query_task=torch.tensor([[1], [0]]),
    )  # fmt: skip
    return episode._replace(**changes)


def test_a_good_episode_is_valid() -> None:
    validate(outside(), "class", 3, task_order=True)
    mixed = outside(task=torch.tensor([[0, 1, 0, 1]] * 2), y=torch.tensor([[0, 1, 0, 1], [2, 0, 2, 0]]))
    validate(mixed, "class", 3)
    vectors = outside(y=torch.zeros(2, 4, 5), query_y=torch.zeros(2, 1, 5))
    validate(vectors, "vector", 0, task_order=True)


NAN = torch.zeros(2, 4, 3).index_fill(2, torch.tensor(1), float("nan"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": torch.zeros(2, 0, 3)}, ("at least one shot",)),
        ({"query_x": torch.zeros(2, 0, 3)}, ("one query",)),
        ({"x": torch.zeros(2, 4)}, ("stream",)),
        ({"y": torch.zeros(2, 3, dtype=torch.long)}, ("y is (2, 3)", "(2, 4, 3)")),
        ({"task": torch.zeros(1, 4, dtype=torch.long)}, ("task is (1, 4)",)),
        ({"query_y": torch.zeros(2, 2, dtype=torch.long)}, ("query_y is (2, 2)",)),
        ({"query_task": torch.zeros(2, dtype=torch.long)}, ("query_task is (2,)",)),
        ({"query_x": torch.zeros(2, 1, 4)}, ("(2, 1, 4)", "(2, 4, 3)")),
        ({"x": NAN}, ("x: nan at index (0, 0, 1)",)),
        ({"query_x": NAN[:, :1]}, ("query_x: nan at index (0, 0, 1)",)),
        ({"y": torch.tensor([[0, 0, 1, 1], [2, 2, 3, 3]])}, ("outside 0 … 2", "vocabulary")),
        ({"y": torch.tensor([[-1, -1, 1, 1], [2, 2, 0, 0]])}, ("outside 0 … 2",)),
        ({"query_y": torch.tensor([[1], [1]])}, ("episode 1, query 0: label 1 is not in the stream",)),
        ({"query_task": torch.tensor([[1], [2]])}, ("not in the stream",)),
        ({"task": torch.tensor([[0, 1, 0, 1]] * 2)}, ("tasks come back",)),
        ({"task": torch.tensor([[1, 1, 0, 0]] * 2)}, ("tasks come back",)),
    ],
)
def test_bad_episodes(changes: dict[str, Tensor], words: tuple[str, ...]) -> None:
    with refused(*words):
        validate(outside(**changes), "class", 3, task_order=True)


# Data sets by name


def test_generated_sets() -> None:
    """Meta-test has the law of meta-train and a stream of its own."""
    for name in ("features", "sine"):
        found = load(name, dimension=5)
        assert found.name == name
        assert found.train.shape == found.test.shape == ((5,) if name == "features" else (50,))
        assert not torch.equal(next(iter(found.train)).x, next(iter(found.test)).x)
        assert torch.equal(found.train.draw(2, seeded()).x, found.test.draw(2, seeded()).x)
        with refused("needs images"):
            load(name, variant="rotation")
        with refused("leave it out"):
            load(name, frozen="some/encoder")


def test_omniglot20() -> None:
    """242 characters, 20 drawings of each; two alphabets are for meta-test, and meta-train has none of theirs."""
    found = load("omniglot20", image_size=20)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert found.train.shape == (1, 20, 20)
    assert (len(found.train.classes), len(found.test.classes)) == (203, 39)
    assert found.train.seed != found.test.seed
    assert found.train.counts.unique().tolist() == found.test.counts.unique().tolist() == [20]
    assert not set(found.train.classes.tolist()) & set(found.test.classes.tolist())
    ours = {image.numpy().tobytes() for image in found.train.x}
    assert not any(image.numpy().tobytes() in ours for image in found.test.x)
    shares = found.train.draw(4, seeded()).x.flatten(2).mean(-1)
    assert (shares > 0).all()  # dark strokes on white
    with refused("--image-size is 32", "20"):
        load("omniglot20")
    parts = [OmniglotEpisodes(split, SETTING) for split in ("train", "test")]
    assert [len(part.classes) for part in parts] == [203, 39]
    assert torch.equal(parts[1].x, found.test.x)
    with refused("split 'val'"):
        OmniglotEpisodes("val", SETTING)


def test_images_have_their_variants() -> None:
    turned = load("omniglot20", image_size=20, variant="rotation")
    assert (turned.test.kind, turned.test.outputs) == ("angle", 2)
    halves = load("omniglot20", image_size=20, variant="completion")
    assert (halves.train.kind, halves.train.shape, halves.train.outputs) == ("image", (1, 10, 20), 200)


def drawings(path: Path, characters: dict[str, int], seed: int = 0, folder: str = "") -> None:
    """A zip in the layout of Omniglot's: FOLDER/ALPHABET/CHARACTER/*.png, one bit a pixel, 105 x 105."""
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{folder or path.stem}/", "")
        for number, (character, count) in enumerate(characters.items()):
            for i in range(count):
                buffer = io.BytesIO()
                Image.fromarray(rng.random((105, 105)) < 0.9).save(buffer, format="PNG")
                name = f"{folder or path.stem}/{character}/{number:04d}_{i + 1:02d}.png"
                archive.writestr(name, buffer.getvalue())


def test_omniglots_whole_zips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Background to train on, evaluation to test on, resized."""
    drawings(
        tmp_path / "images_background.zip", {"Latin/character01": 3, "Latin/character02": 3, "Greek/character01": 3}
    )
    drawings(tmp_path / "images_evaluation.zip", {"Tibetan/character01": 2, "Tibetan/character02": 2}, seed=1)
    found = load("omniglot", data_dir=str(tmp_path), image_size=16)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert found.train.counts.tolist() == [3, 3, 3]
    assert found.test.counts.tolist() == [2, 2]
    assert found.train.shape == (1, 16, 16)
    with zipfile.ZipFile(tmp_path / "images_background.zip") as archive:
        raw = archive.read("images_background/Latin/character01/0000_01.png")
    image = Image.open(io.BytesIO(raw)).convert("L").resize((16, 16), Image.Resampling.BILINEAR)
    assert any(np.array_equal(np.asarray(image), one[0].numpy()) for one in found.train.x)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "omniglot").symlink_to(tmp_path)
    monkeypatch.setenv("METAZOO_DATA", str(tmp_path / "root"))
    by_variable = load("omniglot", image_size=16).train
    assert isinstance(by_variable, ClassEpisodes)
    assert torch.equal(by_variable.x, found.train.x)


def test_omniglots_small_zips(tmp_path: Path) -> None:
    """An alphabet of both sets counts once; Tagalog and Early_Aramaic are for meta-test."""
    shared = {"Latin/character01": 2, "Latin/character02": 2}
    drawings(
        tmp_path / "images_background_small1.zip", shared | {"Early_Aramaic/character01": 2, "Greek/character01": 2}
    )
    drawings(tmp_path / "images_background_small2.zip", shared | {"Tagalog/character01": 2})
    found = load("omniglot", data_dir=str(tmp_path), image_size=8)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert found.train.counts.tolist() == [2, 2, 2]
    assert found.test.counts.tolist() == [2, 2]
    assert len(OmniglotEpisodes("test", SETTING, str(tmp_path), 8).classes) == 2


def test_bad_omniglots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    with refused("images_background.zip", "--data-dir"):
        load("omniglot", data_dir=str(tmp_path))
    with refused("not a folder"):
        load("omniglot", data_dir=str(tmp_path / "none"))
    names = [tmp_path / "images_background.zip", tmp_path / "images_evaluation.zip"]
    for path in names:
        drawings(path, {"Latin/character01": 2})
    whole = names[0].read_bytes()
    names[0].write_bytes(whole[: len(whole) // 2])
    with refused(str(names[0])):
        load("omniglot", data_dir=str(tmp_path))
    names[0].write_bytes(whole[:200] + bytes(50) + whole[250:])
    with refused(str(names[0])):
        load("omniglot", data_dir=str(tmp_path))
    for member, content, word in (
        ("readme.txt", b"", "no FOLDER/ALPHABET/CHARACTER"),
        ("a/b/c/d.png", b"no image", "d.png: cannot be decoded"),
        ("../a/b/c/d.png", b"", "outside"),
    ):
        with zipfile.ZipFile(names[0], "w") as archive:
            archive.writestr(member, content)
        with refused(str(names[0]), word):
            load("omniglot", data_dir=str(tmp_path))


@pytest.mark.skipif("METAZOO_DATA" not in os.environ, reason="METAZOO_DATA names no folder with the real sets")
def test_the_package_holds_the_real_characters() -> None:
    """Characters of one of the real zips, read and resized now, are those of the package."""
    path = Path(os.environ["METAZOO_DATA"]) / "omniglot" / "images_background_small2.zip"
    ours = data._omniglot20(20)
    rows = {name: ours.x[ours.y == i] for i, name in enumerate(ours.names)}
    found: dict[str, list[np.ndarray]] = {}
    for name, image in data._omniglot_zip(path, 20):
        found.setdefault(name, []).append(image)
    assert len(found) == 156
    assert all(np.array_equal(np.stack(images), rows[name]) for name, images in found.items())


def parquet(path: Path, rows: list[tuple[bytes, int]], image: str = "img", label: str = "fine_label") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": raw, "path": None} for raw, _ in rows]
    columns = {image: images, label: [number for _, number in rows], "coarse_label": [0] * len(rows)}
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


@pytest.mark.parametrize("names", [
    ("train.parquet", "test.parquet"),
    ("cifar100/train-00000-of-00001.parquet", "cifar100/test-00000-of-00001.parquet"),
])  # fmt: skip
def test_cifar100(tmp_path: Path, names: tuple[str, str]) -> None:
    """Both files pooled; of the 100 classes, shuffled by Random(0), the first 40 are for meta-test."""
    pixels = np.random.default_rng(0).integers(0, 256, (2, 100, 8, 8, 3), dtype=np.uint8)
    for part, name in enumerate(names):
        parquet(tmp_path / name, [(png(pixels[part, i]), i) for i in range(100)])
    found = load("cifar100", data_dir=str(tmp_path), image_size=8)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    order = list(range(100))
    random.Random(0).shuffle(order)
    assert found.test.classes.tolist() == sorted(order[:40])
    assert found.train.classes.tolist() == sorted(order[40:])
    assert found.train.counts.tolist() == [2] * 60
    label = order[50]
    images = found.train.x[found.train.y == label]
    assert torch.equal(images, torch.from_numpy(pixels[:, label].transpose(0, 3, 1, 2)))
    assert load("cifar100", data_dir=str(tmp_path), image_size=16).train.shape == (3, 16, 16)
    other = load("cifar100", data_dir=str(tmp_path), image_size=8, meta_test_classes=30).test
    assert isinstance(other, ClassEpisodes)
    assert other.classes.tolist() == sorted(order[:30])


def test_bad_cifar100(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    good = [(png(np.zeros((8, 8, 3), dtype=np.uint8)), i) for i in range(6)]

    def put(rows: list[tuple[bytes, int]], **names: str) -> None:
        parquet(tmp_path / "train.parquet", rows, **names)
        parquet(tmp_path / "test.parquet", good)

    def both(*words: str) -> None:
        with refused(*words):
            load("cifar100", data_dir=str(tmp_path), image_size=8)

    put([*good, (b"no image", 3)])
    both("train.parquet row 6", "cannot be decoded")
    put([*good, (good[0][0][:40], 3)])
    both("train.parquet row 6", "cannot be decoded")
    put([*good, (good[0][0], 100)])
    both("train.parquet row 6", "fine_label is 100")
    put(good, label="label")
    both("train.parquet", "fine_label")
    put(good)
    cut = tmp_path / "train.parquet"
    cut.write_bytes(cut.read_bytes()[:-20])
    both("train.parquet", "unreadable")
    with refused("not a folder"):
        load("cifar100", data_dir=str(tmp_path / "none"))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    both("metazoo-mambacl[images]")


def gnt(path: Path, records: list[tuple[bytes, np.ndarray]]) -> bytes:
    raw = b""
    for label, pixels in records:
        height, width = pixels.shape
        raw += struct.pack("<I2sHH", 10 + pixels.size, label, width, height) + pixels.tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    return raw


def test_gnt_records(tmp_path: Path) -> None:
    """Labels in GBK, images scaled to fit and centred on white; empty ones are left out."""
    tall, wide = np.zeros((8, 4), dtype=np.uint8), np.full((2, 4), 100, dtype=np.uint8)
    flat = np.zeros((0, 5), dtype=np.uint8)
    whole = np.arange(64, dtype=np.uint8).reshape(8, 8)
    records = [("啊".encode("gbk"), tall), ("好".encode("gbk"), wide), (b"A\0", flat), (b"A\0", whole)]
    gnt(tmp_path / "a.gnt", records)
    found = data.read_gnt(tmp_path / "a.gnt", 8)
    assert [name for name, _ in found] == ["啊", "好", "A"]
    assert (found[0][1][0, :, 2:6] == 0).all()
    assert (found[0][1][0, :, [0, 1, 6, 7]] == 255).all()
    assert (found[1][1][0, 2:6] == 100).all()
    assert (found[1][1][0, [0, 1, 6, 7]] == 255).all()
    assert np.array_equal(found[2][1][0], whole)
    gnt(tmp_path / "b.gnt", [(b"\xaa\xa1", whole), (b"\xaa\xa2", whole)])  # of the rows for users: no characters
    assert len({name for name, _ in data.read_gnt(tmp_path / "b.gnt", 8)}) == 2


def test_casia(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files anywhere below the folder; a fifth of the characters, shuffled by Random(0), for meta-test."""
    rng = np.random.default_rng(0)
    labels = ["甲", "乙", "丙", "丁", "戊", "己", "庚", "辛", "壬", "癸"]
    for writer in range(3):
        records = [(name.encode("gbk"), rng.integers(0, 256, (9, 7), dtype=np.uint8)) for name in labels]
        gnt(tmp_path / "casia" / f"Gnt1.{writer}" / f"{writer:03d}-c.gnt", records)
    found = load("casia", data_dir=str(tmp_path / "casia"), image_size=8)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    order = list(range(10))
    random.Random(0).shuffle(order)
    assert found.test.classes.tolist() == sorted(order[:2])
    assert found.train.counts.tolist() == [3] * 8
    assert found.train.shape == (1, 8, 8)
    monkeypatch.setenv("METAZOO_DATA", str(tmp_path))
    by_variable = load("casia", image_size=8, meta_test_classes=3).test
    assert isinstance(by_variable, ClassEpisodes)
    assert by_variable.classes.tolist() == sorted(order[:3])
    with refused("not a folder"):
        load("casia", data_dir=str(tmp_path / "none"))


def test_bad_gnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    path = tmp_path / "a.gnt"
    with refused(".gnt", "--data-dir"):
        load("casia", data_dir=str(tmp_path))
    raw = gnt(path, [(b"A\0", np.zeros((3, 4), dtype=np.uint8)), (b"B\0", np.zeros((3, 4), dtype=np.uint8))])
    assert len(raw) == 44
    for cut in (1, 9, 10, 21):
        path.write_bytes(raw[: 22 + cut])
        with refused(str(path), "byte 22", "cut off"):
            load("casia", data_dir=str(tmp_path))
    path.write_bytes(raw[:22] + struct.pack("<I", 23) + raw[26:])
    with refused(str(path), "byte 22"):
        load("casia", data_dir=str(tmp_path))


# Frozen features


def test_pooling_is_the_mean_of_a_texts_tokens() -> None:
    states = torch.randn(3, 4, 5, generator=seeded())
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]])
    found = data.pooled(states, mask)
    assert torch.allclose(found[0], states[0].mean(0) / states[0].mean(0).norm())
    assert torch.allclose(found[1], states[1, :2].mean(0) / states[1, :2].mean(0).norm())
    assert (found[2] == 0).all()
    assert torch.equal(data.pooled(states.index_fill(1, torch.tensor([2, 3]), 1e6), mask)[1], found[1])


class Tokenizer:
    """A token for each letter, padded to the longest text."""

    def __call__(self, texts: list[str], **_: Any) -> dict[str, Tensor]:
        longest = max(map(len, texts))
        ids = torch.tensor([[ord(c) for c in text.ljust(longest, "\0")] for text in texts])
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


class Encoder:
    """Sentences: the letters' codes as states; images: the means of the channels."""

    config = types.SimpleNamespace(hidden_size=2)
    batches: list[int]

    def __init__(self, wrap: Callable[[Tensor], Any] = lambda x: x) -> None:
        self.batches, self.wrap = [], wrap

    def __call__(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.batches.append(len(input_ids))
        return types.SimpleNamespace(last_hidden_state=torch.stack([input_ids, torch.ones_like(input_ids)], -1).float())

    def get_image_features(self, pixel_values: Tensor) -> Any:
        self.batches.append(len(pixel_values))
        return self.wrap(pixel_values.mean((1, 2)))

    def eval(self) -> Encoder:
        return self


def processor(images: list[np.ndarray], return_tensors: str) -> dict[str, Tensor]:
    assert all(image.shape[-1] == 3 and image.dtype == np.uint8 for image in images)
    return {"pixel_values": torch.from_numpy(np.stack(images)).float()}


def stub(monkeypatch: pytest.MonkeyPatch, folder: Path, model: Any) -> None:
    def reader(it: Any) -> Any:
        return types.SimpleNamespace(from_pretrained=lambda name, **_: it)

    module = types.SimpleNamespace(
        AutoTokenizer=reader(Tokenizer()), AutoImageProcessor=reader(processor), AutoModel=reader(model)
    )
    monkeypatch.setitem(sys.modules, "transformers", module)
    monkeypatch.setenv("METAZOO_CACHE", str(folder))


def test_sentences_are_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, in the order given, whatever the padding; the second time from the cache, unless it is damaged."""
    model = Encoder()
    stub(monkeypatch, tmp_path, model)
    texts = ["bb", "a", "ccccc", "ab", "d"]
    found = data.encode_sentences(texts, "some/encoder", batch=2)
    assert model.batches == [2, 2, 1]
    truth = np.array([[sum(map(ord, text)) / len(text), 1] for text in texts])
    assert np.allclose(found, truth / np.linalg.norm(truth, axis=1, keepdims=True), atol=1e-6)
    assert np.array_equal(data.encode_sentences(texts, "some/encoder"), found)
    assert len(model.batches) == 3
    for others in (texts[::-1], ["bb\na", *texts[2:]]):
        assert len(data.encode_sentences(others, "some/encoder")) == len(others)
    data.encode_sentences(texts, "other/encoder")
    files = sorted((tmp_path / "mambacl").iterdir())
    assert len(files) == 4
    assert all(len(file.stem) == 64 and file.suffix == ".npz" for file in files)
    for file in files:
        file.write_bytes(file.read_bytes()[:100])
    assert np.array_equal(data.encode_sentences(texts, "some/encoder"), found)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "file"))  # cannot be written into
    assert np.array_equal(data.encode_sentences(texts, "some/encoder"), found)


def test_other_weights_in_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Encoder()
    stub(monkeypatch, tmp_path / "cache", model)
    for content in (b"one", b"two", b"one"):
        (tmp_path / "model.safetensors").write_bytes(content)
        data.encode_sentences(["a"], str(tmp_path))
    assert len(model.batches) == 2


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: types.SimpleNamespace(pooler_output=x)])
def test_images_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Tensor], Any]) -> None:
    """Tensor or output object; grey images as three equal channels."""
    stub(monkeypatch, tmp_path, Encoder(wrap))
    x = np.random.default_rng(0).integers(1, 256, (5, 3, 4, 6), dtype=np.uint8)
    found = data.encode_images(x, "clip", batch=2)
    truth = x.mean((2, 3))
    assert np.allclose(found, truth / np.linalg.norm(truth, axis=1, keepdims=True), atol=1e-6)
    assert np.allclose(data.encode_images(x[:, :1], "clip"), 3**-0.5, atol=1e-6)
    with refused("leave it out"):
        data.encode_images(x[:, :2], "clip")
    with refused("leave it out"):
        data.encode_images(np.zeros((5, 3), dtype=np.float32), "clip")


@pytest.mark.filterwarnings("ignore:Deprecated in 0.9.0")  # of tokenizers, by an older transformers
def test_with_the_real_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny BERT and a tiny CLIP with random weights, saved and loaded as the hub's are; batches do not matter."""
    import transformers

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "cache"))
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "vocab.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad"])
    )
    transformers.BertTokenizer(str(tmp_path / "bert" / "vocab.txt")).save_pretrained(tmp_path / "bert")
    torch.manual_seed(0)
    bert = transformers.BertModel(transformers.BertConfig(vocab_size=7, **size)).eval()
    bert.save_pretrained(tmp_path / "bert")
    found = data.encode_sentences(["good bad good", "bad", "good"], str(tmp_path / "bert"), batch=2)
    with torch.no_grad():
        for text, row in (([2, 5, 6, 5, 3], found[0]), ([2, 6, 3], found[1]), ([2, 5, 3], found[2])):
            mean = bert(torch.tensor([text])).last_hidden_state[0].mean(0)
            assert np.allclose(row, mean / mean.norm(), atol=1e-5)
    text_config = size | {"vocab_size": 8, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 2}
    vision_config = size | {"image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text_config, vision_config=vision_config, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(tmp_path / "clip")
    crop = {"height": 16, "width": 16}
    transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=crop).save_pretrained(tmp_path / "clip")
    x = np.random.default_rng(0).integers(0, 256, (3, 1, 20, 20), dtype=np.uint8)
    grey = data.encode_images(x, str(tmp_path / "clip"), batch=2)
    assert grey.shape == (3, 12)
    assert np.allclose(np.linalg.norm(grey, axis=1), 1, atol=1e-5)
    assert np.allclose(data.encode_images(x.repeat(3, 1), str(tmp_path / "clip")), grey, atol=1e-5)
    with refused("cannot be loaded"):
        data.encode_images(x, str(tmp_path / "cache"))
    with refused("is a BertModel", "CLIP"):
        bert.save_pretrained(tmp_path / "clip")
        data.encode_images(x, str(tmp_path / "clip"))


def test_frozen_features_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stub(monkeypatch, tmp_path / "cache", Encoder())
    images = {name: [np.full((9, 9, 3), 40 * i + 1, dtype=np.uint8)] * 3 for i, name in enumerate("abcde")}
    found = load(folder_of(tmp_path / "set", images), image_size=8, frozen="clip", meta_test_classes=2)
    assert found.train.shape == (3,)
    assert found.train.kind == "class"
    with refused("needs the images themselves"):
        load(tmp_path / "set", image_size=8, frozen="clip", variant="rotation")


def test_an_encoder_that_cannot_be_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing extra is named; so is a model that is no CLIP, or not there."""
    images = np.zeros((1, 1, 8, 8), dtype=np.uint8)
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with refused("metazoo-mambacl[minilm]", "--frozen"):
        data.encode_sentences(["a"])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with refused("metazoo-mambacl[minilm]"):
        data.encode_sentences(["a"], "some/encoder")
    with refused("metazoo-mambacl[frozen]"):
        data.encode_images(images, "clip")
    stub(monkeypatch, tmp_path, types.SimpleNamespace(eval=lambda: object()))
    with refused("is a object", "CLIP"):
        data.encode_images(images, "clip")

    def absent(name: str, **_: Any) -> None:
        raise OSError("not\nthere")

    sys.modules["transformers"].AutoModel.from_pretrained = absent
    with refused("--frozen 'clip' cannot be loaded (not there)"):
        data.encode_images(images, "clip")
    assert not list(tmp_path.iterdir())


def test_sentences(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes are corpus and label; the six of TREC are for meta-test; Latin-1, blank lines left out."""
    for corpus, files in data.CORPORA.items():
        for file in files:
            labels = range(6) if corpus == "trec" else range(2)
            lines = [f"{label} {corpus} café {label} {i}\n" for label in labels for i in range(2)]
            (tmp_path / file).write_bytes("\n".join(lines).encode("latin-1"))
    seen: list[str] = []

    def encode(texts: list[str], encoder: str | None) -> np.ndarray:
        seen[:] = texts
        return np.arange(2.0 * len(texts), dtype=np.float32).reshape(-1, 2)

    monkeypatch.setattr(data, "encode_sentences", encode)
    found = load("sentences", data_dir=str(tmp_path))
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert (len(found.train.classes), len(found.test.classes)) == (10, 6)
    assert len(seen) == 4 * 4 + 3 * 4 + 2 * 12
    assert seen[0] == "subj café 0 0"
    assert found.test.counts.tolist() == [4] * 6
    for row, label in zip(found.test.x, found.test.y, strict=True):  # its text is of the class
        text = seen[int(row[0]) // 2].split()
        assert text[0] == "trec"
        assert int(text[2]) == label - found.test.classes[0]
    with refused("needs images"):
        load("sentences", variant="completion")
    (tmp_path / "mpqa.all").write_text("0 good\nx bad\n")
    with refused("mpqa.all line 2"):
        load("sentences", data_dir=str(tmp_path))
    (tmp_path / "mpqa.all").unlink()
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    with refused("mpqa.all"):
        load("sentences", data_dir=str(tmp_path))


# Your own files


def table(path: Path, rows: list[str], header: str = "a,b,kind") -> Path:
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")
    return path


def test_own_csv(tmp_path: Path) -> None:
    """Classes by the last or the named column; columns standardised by those of meta-train; a fifth for meta-test."""
    values = np.random.default_rng(0).normal(3, 5, (50, 2))
    rows = [f"{a},{b},c{i % 10}" for i, (a, b) in enumerate(values)]
    path = table(tmp_path / "a.csv", rows)
    found = load(path)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    order = list(range(10))
    random.Random(0).shuffle(order)
    assert found.test.classes.tolist() == sorted(order[:2])
    assert torch.allclose(found.train.x.mean(0), torch.zeros(2), atol=1e-6)
    assert torch.allclose(found.train.x.std(0, unbiased=False), torch.ones(2), atol=1e-6)
    held = np.isin(np.arange(50) % 10, order[:2])
    truth = (values[held] - values[~held].mean(0)) / values[~held].std(0)
    assert np.allclose(found.test.x, truth, atol=1e-5)
    other = table(tmp_path / "b.csv", [f"c{i % 4},{i},7" for i in range(12)], "kind,n,constant")
    named = load(other, target="kind", meta_test_classes=2)
    assert named.train.shape == (2,)
    assert isinstance(named.train, ClassEpisodes)
    assert (named.train.x[:, 1] == 0).all()
    with refused("images"):
        load(path, variant="rotation")
    with refused("leave it out"):
        load(path, frozen="clip")


GOOD = [f"{i},2,{'uvwx'[i % 4]}" for i in range(8)]


@pytest.mark.parametrize(
    ("rows", "changes", "words"),
    [
        ([], {}, ("at least 2 rows",)),
        ([*GOOD, "1,x,u"], {}, ("line 10, column b", "'x' is no number")),
        ([*GOOD, "nan,1,u"], {}, ("line 10, column a", "not a finite number")),
        ([*GOOD, "1,-inf,u"], {}, ("line 10, column b", "not a finite number")),
        ([*GOOD, "1,,u"], {}, ("line 10, column b", "'' is no number")),
        ([*GOOD, "1,2,"], {}, ("line 10, column kind", "no class")),
        ([*GOOD, "", "1,2"], {}, ("line 11", "2 values under 3 columns")),
        (["1,2,u"] * 4, {}, ("1 classes", "leave some to train on")),
        (["1,2,u", "1,2,v"] * 2, {}, ("1 classes for meta-test", "--tasks 2")),
        (GOOD, {"meta_test_classes": 4}, ("--meta-test-classes is 4", "4 classes")),
        (GOOD, {"meta_test_classes": 3}, ("1 classes for meta-train", "--tasks 2")),
        (GOOD, {"target": "c"}, ("no column 'c'", "a, b, kind")),
        (GOOD, {"meta_test_classes": 2, "shots": 2}, ("class u has 2 examples", "may want 3")),
        (GOOD, {"meta_test_classes": 2, "queries": 2}, ("class u has 2 examples", "may want 3")),
        # training asks one query, but the meta-test at the end --test-shots of every task
        (GOOD, {"meta_test_classes": 2, "queries": 1, "test_shots": 2}, ("class u has 2 examples", "may want 3")),
        (
            ["1e300,2,u", "-1e300,2,v"] * 2 + ["1e308,1,w", "1,1,x"] * 2,
            {"meta_test_classes": 2},
            ("deviations of the columns",),
        ),
    ],
)
def test_bad_csv(tmp_path: Path, rows: list[str], changes: dict[str, Any], words: tuple[str, ...]) -> None:
    path = table(tmp_path / "a.csv", rows)
    with refused(str(path), *words) if "leave some" not in words[-1] else refused(*words):
        load(path, **changes)


def test_the_whole_of_another_set(tmp_path: Path) -> None:
    """Every class, whatever is kept for meta-test; columns standardised by the table itself."""
    path = table(tmp_path / "a.csv", [f"{i * i},7,{'uvwx'[i % 4]}" for i in range(12)])
    whole = data.load_whole(Config(dataset=str(path), tasks=2, shots=50))
    assert isinstance(whole, ClassEpisodes)
    assert whole.counts.tolist() == [3, 3, 3, 3]
    assert whole.x.mean(0).tolist() == pytest.approx([0, 0], abs=1e-6)
    assert whole.x.std(0, unbiased=False).tolist() == pytest.approx([1, 0], abs=1e-6)
    assert isinstance(data.load_whole(Config(dimension=5)), FeatureEpisodes)
    with refused("needs images"):
        data.load_whole(Config(variant="rotation"))


def test_own_npz(tmp_path: Path) -> None:
    """Numbers or text for classes; columns as they are; images grey, or with channels first or last."""
    rng = np.random.default_rng(0)
    y = np.repeat(["u", "v", "w", "x"], 3)
    x = rng.random((12, 5))
    for labels in (y, np.repeat([7, 1, 100, -3], 3)):
        np.savez(tmp_path / "a.npz", x=x, y=labels)
        found = load(tmp_path / "a.npz", meta_test_classes=2)
        assert isinstance(found.train, ClassEpisodes)
        assert isinstance(found.test, ClassEpisodes)
        assert found.train.counts.tolist() == found.test.counts.tolist() == [3, 3]
        rows = {row.tobytes(): label for row, label in zip(x.astype(np.float32), labels, strict=True)}
        for part in (found.train, found.test):
            names = {(rows[row.numpy().tobytes()], int(number)) for row, number in zip(part.x, part.y, strict=True)}
            assert len(names) == 2
    images = rng.integers(0, 256, (12, 3, 8, 10), dtype=np.uint8)
    for stored, shape in (
        (images, (3, 8, 10)),
        (images.transpose(0, 2, 3, 1), (3, 8, 10)),
        (images[:, 0], (1, 8, 10)),
    ):
        np.savez(tmp_path / "b.npz", x=stored, y=y)
        source = load(tmp_path / "b.npz", meta_test_classes=2).train
        assert isinstance(source, ClassEpisodes)
        assert source.shape == shape
        assert source.x.dtype == torch.uint8
        assert source.x[0].numpy().tobytes() in {image.tobytes() for image in images[:, : shape[0]]}
    assert load(tmp_path / "b.npz", meta_test_classes=2, variant="completion").train.shape == (1, 4, 10)


def test_bad_npz(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    y = np.arange(8) % 4
    nan = np.zeros((8, 2))
    nan[3, 1] = np.nan
    for arrays, words in (
        ({"x": np.zeros((8, 2))}, ("no array y",)),
        ({"x": np.zeros((7, 2)), "y": y}, ("(7, 2)", "(8,)")),
        ({"x": np.zeros(8), "y": y}, ("(8,)",)),
        ({"x": np.zeros((0, 2)), "y": y[:0]}, ("(0, 2)",)),
        ({"x": nan, "y": y}, ("nan at index (3, 1)",)),
        ({"x": np.full((8, 2), 1e300), "y": y}, ("index (0, 0)",)),
        ({"x": np.zeros((8, 2)), "y": np.where(y == 1, np.nan, y)}, ("y: nan at index (1,)",)),
        ({"x": np.full((8, 2), "a"), "y": y}, ("give numbers",)),
        ({"x": np.zeros((8, 4, 5, 6), dtype=np.uint8), "y": y}, ("1 or 3 channels",)),
        ({"x": np.full((8, 2), {}, dtype=object), "y": y}, ("a.npz",)),
    ):
        np.savez(path, **arrays)
        with refused(str(path), *words):
            load(path, meta_test_classes=2)
    path.write_bytes(pickle.dumps([1]))
    with refused("not an .npz"):
        load(path)
    np.savez(path, x=np.zeros((8, 2)), y=y)
    path.write_bytes(path.read_bytes()[:-30])
    with refused(str(path)):
        load(path)
    for name in ("none.npz", "none.csv"):
        with refused("no such file"):
            load(tmp_path / name)
    (tmp_path / "l.csv").write_bytes("a,kind\n1,é\n".encode("latin-1"))
    with refused("not UTF-8"):
        load(tmp_path / "l.csv")
    with refused("unknown data set 'imagenet'", "omniglot20"):
        load("imagenet")


def folder_of(path: Path, images: dict[str, list[np.ndarray]]) -> Path:
    for name, those in images.items():
        (path / name).mkdir(parents=True)
        for i, image in enumerate(those):
            (path / name / f"{i}.png").write_bytes(png(image))
    return path


def test_own_folder(tmp_path: Path) -> None:
    """A sub-folder for each class; grey stays grey, one colour image makes all RGB; every size is brought to one."""
    grey = {name: [np.full((7 + i, 9), 30 * k, dtype=np.uint8) for i in range(2)] for k, name in enumerate("abcdef")}
    path = folder_of(tmp_path / "grey", grey)
    (path / "a" / "notes.txt").write_text("no picture")
    found = load(path, image_size=8, meta_test_classes=2)
    assert isinstance(found.train, ClassEpisodes)
    assert isinstance(found.test, ClassEpisodes)
    assert found.train.shape == (1, 8, 8)
    order = list(range(6))
    random.Random(0).shuffle(order)
    assert found.test.classes.tolist() == sorted(order[:2])
    assert found.test.x[:, 0, 0, 0].tolist() == [30 * k for k in sorted(order[:2]) for _ in range(2)]
    assert load(path, image_size=8, meta_test_classes=2, variant="rotation").train.kind == "angle"
    Image.new("RGB", (9, 9), (255, 0, 10)).save(path / "a" / "colour.jpg")
    assert load(path, image_size=8, meta_test_classes=2).train.shape == (3, 8, 8)


def test_bad_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    with refused("no CLASS/PICTURE"):
        load(tmp_path / "empty")
    images = {name: [np.zeros((8, 8), dtype=np.uint8)] * 2 for name in "abcd"}
    path = folder_of(tmp_path / "set", images)
    raw = (path / "b" / "1.png").read_bytes()
    for content in (b"no image", raw[:45]):
        (path / "b" / "1.png").write_bytes(content)
        with refused("1.png", "cannot be decoded"):
            load(path, meta_test_classes=2)
    (path / "b" / "1.png").unlink()
    with refused("class b has 1 examples", "may want 2"):
        load(path, meta_test_classes=2)
    (path / "b" / "1.png").write_bytes(raw)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)  # 64 pixels are more than twice as many: a bomb
    with refused("0.png", "cannot be decoded"):
        load(path, meta_test_classes=2)
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with refused("metazoo-mambacl[images]"):
        load(path, meta_test_classes=2)
