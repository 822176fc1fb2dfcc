"""LiST (Wang et al., Findings of NAACL 2022): few-shot text classification by prompts, adapters and self-training.

Training and evaluation are functions of their modules: ``list_selftrain.train.train``,
``list_selftrain.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from list_selftrain.adapters import LiSTAdapter, LiSTAdapterConfig, add_adapters
    from list_selftrain.config import PRESETS, Config
    from list_selftrain.data import Data, Part, flip
    from list_selftrain.estimator import LiSTClassifier
    from list_selftrain.model import ClassicClassifier, FeatureClassifier, PromptClassifier, load_model
    from list_selftrain.prompts import TEMPLATES, PromptTemplate
    from list_selftrain.reweighting import MetaReweighter, distillation, normalised, pseudo_labels
    from list_selftrain.train import Run, train_on

__all__ = [
    "PRESETS",
    "TEMPLATES",
    "ClassicClassifier",
    "Config",
    "Data",
    "FeatureClassifier",
    "LiSTAdapter",
    "LiSTAdapterConfig",
    "LiSTClassifier",
    "MetaReweighter",
    "Part",
    "PromptClassifier",
    "PromptTemplate",
    "Run",
    "add_adapters",
    "distillation",
    "flip",
    "load_model",
    "normalised",
    "pseudo_labels",
    "train_on",
]

_HOME = {
    **dict.fromkeys(["LiSTAdapter", "LiSTAdapterConfig", "add_adapters"], "adapters"),
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["Data", "Part", "flip"], "data"),
    "LiSTClassifier": "estimator",
    **dict.fromkeys(["ClassicClassifier", "FeatureClassifier", "PromptClassifier", "load_model"], "model"),
    **dict.fromkeys(["TEMPLATES", "PromptTemplate"], "prompts"),
    **dict.fromkeys(["MetaReweighter", "distillation", "normalised", "pseudo_labels"], "reweighting"),
    **dict.fromkeys(["Run", "train_on"], "train"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'list_selftrain' has no attribute {name!r}")
    return getattr(importlib.import_module(f"list_selftrain.{_HOME[name]}"), name)
