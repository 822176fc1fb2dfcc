"""MAML-Align (M'hamdi et al. 2023): multilingual sentence-level semantic search by meta-distillation.

Training and evaluation are functions of their modules: ``maml_align.train.train``, ``maml_align.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from maml_align.baselines import TfidfEncoder, fine_tune, maml, reptile
    from maml_align.config import PRESETS, Config
    from maml_align.data import Data, Pairs, Questions, load_stsb_multi, load_xquad_r
    from maml_align.evaluate import evaluate_retrieval, evaluate_sts, language_bias
    from maml_align.meta_distillation import combine, maml_align, similarity_loss, triplet_loss
    from maml_align.model import DualEncoder, load_model
    from maml_align.search import Index, hard_negatives
    from maml_align.tasks import MetaTaskSampler
    from maml_align.train import MetaLearner, Run, train_on

__all__ = [
    "PRESETS",
    "Config",
    "Data",
    "DualEncoder",
    "Index",
    "MetaLearner",
    "MetaTaskSampler",
    "Pairs",
    "Questions",
    "Run",
    "TfidfEncoder",
    "combine",
    "evaluate_retrieval",
    "evaluate_sts",
    "fine_tune",
    "hard_negatives",
    "language_bias",
    "load_model",
    "load_stsb_multi",
    "load_xquad_r",
    "maml",
    "maml_align",
    "reptile",
    "similarity_loss",
    "train_on",
    "triplet_loss",
]

_HOME = {
    **dict.fromkeys(["TfidfEncoder", "fine_tune", "maml", "reptile"], "baselines"),
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["Data", "Pairs", "Questions", "load_stsb_multi", "load_xquad_r"], "data"),
    **dict.fromkeys(["evaluate_retrieval", "evaluate_sts", "language_bias"], "evaluate"),
    **dict.fromkeys(["combine", "maml_align", "similarity_loss", "triplet_loss"], "meta_distillation"),
    **dict.fromkeys(["DualEncoder", "load_model"], "model"),
    **dict.fromkeys(["Index", "hard_negatives"], "search"),
    "MetaTaskSampler": "tasks",
    **dict.fromkeys(["MetaLearner", "Run", "train_on"], "train"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'maml_align' has no attribute {name!r}")
    return getattr(importlib.import_module(f"maml_align.{_HOME[name]}"), name)
