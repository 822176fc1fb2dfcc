"""Open-MeDe (Yu et al. 2025): open-vocabulary action recognition by cross-batch meta-optimisation, without static bias.

Training and evaluation are functions of their modules: ``open_mede.train.train``, ``open_mede.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from open_mede.baselines import ResidualProjector, distillation_loss, interpolated_gradient
    from open_mede.config import PRESETS, Config
    from open_mede.crossbatch import cross_batch_step, virtual_step
    from open_mede.data import Clips, Data, VideoClips
    from open_mede.ensemble import ExponentialWeightAverage, GaussianWeightAverage, UniformWeightAverage
    from open_mede.evaluate import OpenVocabularyEvaluator
    from open_mede.lists import Listed
    from open_mede.metrics import harmonic_mean
    from open_mede.model import FeatureClassifier, VideoTextClassifier, VideoTextConfig, load_classifier
    from open_mede.sprites import SpriteWorld
    from open_mede.stripes import ScubaBackground, stripe_background
    from open_mede.train import CrossBatchMetaTrainer, Run, train_on

__all__ = [
    "PRESETS",
    "Clips",
    "Config",
    "CrossBatchMetaTrainer",
    "Data",
    "ExponentialWeightAverage",
    "FeatureClassifier",
    "GaussianWeightAverage",
    "Listed",
    "OpenVocabularyEvaluator",
    "ResidualProjector",
    "Run",
    "ScubaBackground",
    "SpriteWorld",
    "UniformWeightAverage",
    "VideoClips",
    "VideoTextClassifier",
    "VideoTextConfig",
    "cross_batch_step",
    "distillation_loss",
    "harmonic_mean",
    "interpolated_gradient",
    "load_classifier",
    "stripe_background",
    "train_on",
    "virtual_step",
]

_HOME = {
    "Listed": "lists",
    **dict.fromkeys(["ResidualProjector", "distillation_loss", "interpolated_gradient"], "baselines"),
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["cross_batch_step", "virtual_step"], "crossbatch"),
    **dict.fromkeys(["Clips", "Data", "VideoClips"], "data"),
    **dict.fromkeys(["ExponentialWeightAverage", "GaussianWeightAverage", "UniformWeightAverage"], "ensemble"),
    "OpenVocabularyEvaluator": "evaluate",
    "harmonic_mean": "metrics",
    **dict.fromkeys(["FeatureClassifier", "VideoTextClassifier", "VideoTextConfig", "load_classifier"], "model"),
    "SpriteWorld": "sprites",
    **dict.fromkeys(["ScubaBackground", "stripe_background"], "stripes"),
    **dict.fromkeys(["CrossBatchMetaTrainer", "Run", "train_on"], "train"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'open_mede' has no attribute {name!r}")
    return getattr(importlib.import_module(f"open_mede.{_HOME[name]}"), name)
