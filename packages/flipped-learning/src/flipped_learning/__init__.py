"""Flipped Learning (Ye et al., ICLR 2023): zero-shot classification by the likelihood of the instruction.

Training and evaluation are functions of their modules: ``flipped_learning.train.train``,
``flipped_learning.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flipped_learning.classifier import FlippedClassifier
    from flipped_learning.config import PRESETS, Config
    from flipped_learning.data import Data, Task
    from flipped_learning.flipping import (
        FlippedCollator,
        likelihood_loss,
        score,
        source_and_target,
        token_log_probs,
        unlikelihood_loss,
    )
    from flipped_learning.minimodel import BagOfWords
    from flipped_learning.model import load_model, span_corruption, tiny_t5, train_tokenizer
    from flipped_learning.templates import NOVEL_PAIRS, SEEN_PAIRS, Instance, Template, read_templates
    from flipped_learning.train import Run
    from flipped_learning.trainer import FlippedTrainer

__all__ = [
    "NOVEL_PAIRS",
    "PRESETS",
    "SEEN_PAIRS",
    "BagOfWords",
    "Config",
    "Data",
    "FlippedClassifier",
    "FlippedCollator",
    "FlippedTrainer",
    "Instance",
    "Run",
    "Task",
    "Template",
    "likelihood_loss",
    "load_model",
    "read_templates",
    "score",
    "source_and_target",
    "span_corruption",
    "tiny_t5",
    "token_log_probs",
    "train_tokenizer",
    "unlikelihood_loss",
]

_FLIPPING = [
    "FlippedCollator", "likelihood_loss", "score", "source_and_target", "token_log_probs", "unlikelihood_loss",
]  # fmt: skip
_HOME = {
    "FlippedClassifier": "classifier",
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["Data", "Task"], "data"),
    **dict.fromkeys(_FLIPPING, "flipping"),
    "BagOfWords": "minimodel",
    **dict.fromkeys(["load_model", "span_corruption", "tiny_t5", "train_tokenizer"], "model"),
    **dict.fromkeys(["NOVEL_PAIRS", "SEEN_PAIRS", "Instance", "Template", "read_templates"], "templates"),
    "Run": "train",
    "FlippedTrainer": "trainer",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'flipped_learning' has no attribute {name!r}")
    return getattr(importlib.import_module(f"flipped_learning.{_HOME[name]}"), name)
