"""What `validate` lets through from outside: every kind of the package's own, and nothing else."""

from __future__ import annotations

import re
from typing import Any

import mambacl
import pytest
import torch
from mambacl.episodes import (
    ClassEpisodes,
    CompletionEpisodes,
    Episode,
    EpisodeConfig,
    FeatureEpisodes,
    RotationEpisodes,
    SineEpisodes,
    check_shapes,
    validate,
)
from metazoo.errors import UserError
from torch import Tensor

torch.set_num_threads(1)

SETTING = EpisodeConfig(tasks=3, shots=2, test_shots=2, vocabulary=5)
IMAGES = torch.randint(0, 256, (40, 1, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
CLASSES = torch.arange(40) // 10
SOURCES = [
    FeatureEpisodes(4, 0.3, SETTING), SineEpisodes(SETTING), ClassEpisodes(IMAGES, CLASSES, SETTING),
    RotationEpisodes(IMAGES, CLASSES, SETTING), CompletionEpisodes(IMAGES, CLASSES, SETTING),
]  # fmt: skip


@pytest.mark.parametrize("source", SOURCES, ids=lambda source: type(source).__name__)
def test_the_package_s_own_are_valid(source: Any) -> None:
    """In any order of queries and under noise; and as another kind they are not."""
    for setting in (SETTING, EpisodeConfig(tasks=3, shots=2, queries=4, vocabulary=5, noise=1.0)):
        episode = source.draw(7, torch.Generator().manual_seed(0), setting)
        validate(episode, source.kind, 5, task_order=True)
        check_shapes(episode, source.kind, source.shape, source.outputs)
    for kind in ("class", "vector", "angle"):
        if kind != source.kind and (kind, source.kind) not in (("vector", "angle"), ("vector", "image")):
            with pytest.raises(UserError, match=r"(classes want codes|wants targets)"):
                validate(episode, kind, 5)


def test_is_public() -> None:
    assert mambacl.validate is validate
    assert mambacl.Episodes.__module__ == "mambacl.episodes"
    assert {"validate", "Episodes"} <= set(mambacl.__all__)


X, QUERIES = torch.zeros(2, 6, 4), torch.zeros(2, 6, 4)
Y, TASK = torch.tensor([[0, 0, 1, 1, 2, 2]] * 2), torch.tensor([[0, 0, 1, 1, 2, 2]] * 2)
GOOD: dict[str, Tensor] = {"x": X, "y": Y, "task": TASK, "query_x": QUERIES, "query_y": Y, "query_task": TASK}
VECTORS = {"y": torch.zeros(2, 6, 3), "query_y": torch.zeros(2, 6, 3)}
NAN = torch.zeros(2, 6, 3).index_fill(2, torch.tensor(1), float("nan"))
BAD: list[tuple[str, dict[str, Tensor], str]] = [
    ("text", {}, "kind 'text': one of class, vector, angle, image"),
    ("class", {name: tensor[:0] for name, tensor in GOOD.items()}, "no episodes (B = 0)"),
    ("class", {name: tensor[0] for name, tensor in GOOD.items()}, "give [B, M, …] and [B, Q, …]"),
    ("class", {"query_x": QUERIES[:, 0]}, "give [B, M, …] and [B, Q, …]"),
    ("class", {"x": X.byte()}, "x is torch.uint8"),
    ("class", {"y": Y.float()}, "y is torch.float32 (2, 6): classes want codes"),
    ("class", {"query_y": Y.float()}, "query_y is torch.float32 (2, 6): classes want codes"),
    ("class", VECTORS, "classes want codes"),
    ("class", {"task": TASK.float()}, "task is torch.float32: give whole numbers"),
    ("class", {"query_task": TASK.bool()}, "query_task is torch.bool: give whole numbers"),
    ("class", {"task": TASK.unsqueeze(2)}, "task is (2, 6, 1)"),
    ("class", {"x": X.bfloat16() + float("inf")}, "x: inf at index (0, 0, 0)"),
    ("class", {"query_y": Y + 3}, "a code is outside 0 … 4"),
    ("class", {"query_y": Y + 1}, "episode 0, query 4: label 3 is not in the stream"),
    ("vector", {}, "kind 'vector' wants targets [B, M, O]"),
    ("vector", {"y": VECTORS["y"].long(), "query_y": VECTORS["y"].long()}, "floating-point"),
    ("vector", {**VECTORS, "query_y": NAN}, "query_y: nan at index (0, 0, 1)"),
    ("vector", {**VECTORS, "query_y": torch.zeros(2, 6, 2)}, "labels are (2, 6, 3)"),
    ("angle", VECTORS, "kind 'angle' wants targets [B, M, 2]"),
    ("angle", {"y": torch.ones(2, 6, 2), "query_y": torch.ones(2, 6, 2)}, "its norm is not 1"),
    ("image", {**VECTORS, "query_y": torch.full((2, 6, 3), 255.0)}, "outside −1 … 1"),
    ("class", {"task": TASK * 2, "query_task": TASK * 2}, "number them in the order"),
    ("class", {"task": TASK + 1, "query_task": TASK + 1}, "number them in the order"),
    ("class", {"task": TASK.flip(1)}, "tasks come back"),
    ("class", {"task": torch.tensor([[0, 1, 2] * 2] * 2)}, "tasks come back"),
]


def test_a_stream_by_hand_is_valid() -> None:
    validate(Episode(**GOOD), "class", 5, task_order=True)
    validate(Episode(**{**GOOD, **VECTORS}), "vector", 0, task_order=True)
    narrow = {name: tensor.to(torch.int32) for name, tensor in GOOD.items() if not tensor.is_floating_point()}
    validate(Episode(**{**GOOD, **narrow, "x": X.bfloat16()}), "class", 5, task_order=True)


@pytest.mark.parametrize(("kind", "changes", "words"), BAD, ids=range(len(BAD)))
def test_what_is_refused(kind: str, changes: dict[str, Tensor], words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        validate(Episode(**{**GOOD, **changes}), kind, 5, task_order=True)
    assert "\n" not in str(caught.value)


def test_other_examples_and_targets_than_the_learner_s() -> None:
    """What a learner knows of its episodes, beside the kind."""
    vectors = Episode(**{**GOOD, **VECTORS})
    check_shapes(vectors, "vector", (4,), 3)
    with pytest.raises(UserError, match=re.escape("the learner wants (5,)")):
        check_shapes(vectors, "vector", (5,), 3)
    with pytest.raises(UserError, match=re.escape("wants targets [B, M, 2]")):
        check_shapes(vectors, "vector", (4,), 2)
