"""MambaCL: meta-trained selective state space models as continual learners (arXiv 2412.00776).

Training and evaluation are functions of their modules: ``mambacl.train.train``, ``mambacl.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mambacl.attention import AttentionBlock
    from mambacl.baselines import OML, GeMCL, Offline, PrototypicalNetwork
    from mambacl.config import PRESETS, Config
    from mambacl.data import (
        ClassEpisodes,
        CompletionEpisodes,
        Episode,
        EpisodeConfig,
        Episodes,
        FeatureEpisodes,
        OmniglotEpisodes,
        RotationEpisodes,
        SineEpisodes,
        validate,
    )
    from mambacl.estimator import MambaContinualClassifier
    from mambacl.model import ContinualLearner, Encoder, LearnerState, MambaBlock
    from mambacl.scan import selective_scan
    from mambacl.selectivity import selectivity_loss
    from mambacl.train import Run

__all__ = [
    "OML",
    "PRESETS",
    "AttentionBlock",
    "ClassEpisodes",
    "CompletionEpisodes",
    "Config",
    "ContinualLearner",
    "Encoder",
    "Episode",
    "EpisodeConfig",
    "Episodes",
    "FeatureEpisodes",
    "GeMCL",
    "LearnerState",
    "MambaBlock",
    "MambaContinualClassifier",
    "Offline",
    "OmniglotEpisodes",
    "PrototypicalNetwork",
    "RotationEpisodes",
    "Run",
    "SineEpisodes",
    "selective_scan",
    "selectivity_loss",
    "validate",
]

_EPISODES = [
    "ClassEpisodes", "CompletionEpisodes", "Episode", "EpisodeConfig", "Episodes", "FeatureEpisodes",
    "OmniglotEpisodes", "RotationEpisodes", "SineEpisodes", "validate",
]  # fmt: skip
_HOME = {
    "AttentionBlock": "attention",
    **dict.fromkeys(["OML", "GeMCL", "Offline", "PrototypicalNetwork"], "baselines"),
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(_EPISODES, "data"),
    "MambaContinualClassifier": "estimator",
    **dict.fromkeys(["ContinualLearner", "Encoder", "LearnerState", "MambaBlock"], "model"),
    "selective_scan": "scan",
    "selectivity_loss": "selectivity",
    "Run": "train",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'mambacl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mambacl.{_HOME[name]}"), name)
