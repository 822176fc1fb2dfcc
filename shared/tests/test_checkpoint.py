"""State dicts to disk and back, bit for bit; nothing but tensors and plain values."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo import checkpoint
from metazoo.errors import UserError

plain = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
nested = st.recursive(
    plain,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text() | st.integers(), inner, max_size=3)
        | st.tuples(inner, inner)
    ),
    max_leaves=8,
)


class Held:
    """Any state dict, as an object with state."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value = state["value"]


@settings(max_examples=60, deadline=None)
@given(value=nested)
def test_plain_values_come_back(tmp_path_factory: pytest.TempPathFactory, value: Any) -> None:
    """Every nesting of lists, tuples, dicts (with integer keys) and plain values comes back equal."""
    folder = tmp_path_factory.mktemp("ckpt")
    checkpoint.save(folder, 1, {"held": Held(value)})
    assert checkpoint.read(checkpoint.listing(folder)[0])[1]["held"]["value"] == value


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]
)
def test_tensors_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every type, empty, 0-d, transposed and sharing memory."""
    base = (torch.rand(3, 4) * 10).to(dtype)
    tensors = [base, base.T, base[1], base.new_zeros(()), base.new_zeros(0, 2)]
    checkpoint.save(tmp_path, 7, {"held": Held(tensors)})
    step, state = checkpoint.read(checkpoint.listing(tmp_path)[0])
    assert step == 7
    for ours, theirs in zip(tensors, state["held"]["value"], strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_objects_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="plain values only"):
        checkpoint.save(tmp_path, 1, {"held": Held(object())})
    assert not checkpoint.listing(tmp_path)


def test_last_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        checkpoint.save(tmp_path, step, {"held": Held(step)}, keep=3)
    assert [path.name for path in checkpoint.listing(tmp_path)] == [f"step-{i:08d}" for i in (5, 4, 3)]


def test_random_states_go_on(tmp_path: Path) -> None:
    """Python's, NumPy's and torch's generators draw after a restore what they drew after the save."""
    checkpoint.save(tmp_path, 1, {"random": checkpoint.RandomState()})
    first = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), random.gauss(0, 1))  # noqa: NPY002
    assert checkpoint.restore(tmp_path, {"random": checkpoint.RandomState()}) == 1
    again = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist(), random.gauss(0, 1))  # noqa: NPY002
    assert first == again


def test_missing_part_is_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"held": Held(1)})
    with pytest.raises(UserError, match="lacks the part 'other'"):
        checkpoint.restore(tmp_path, {"other": Held(1)})


def test_nothing_to_restore(tmp_path: Path) -> None:
    assert checkpoint.restore(tmp_path / "none", {}) == 0
