"""MixER: hierarchical meta-learning of dynamical systems by a mixture of expert reconstructors (arXiv 2502.05335).

Training and evaluation are functions of their modules: ``mixer.train.train``, ``mixer.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixer.config import PRESETS, Config
    from mixer.data import Environments
    from mixer.gating import KMeansLeastSquaresGate
    from mixer.model import CoDAExpert, GEPSExpert, MixER, NCFExpert, ShallowPLRNNExpert
    from mixer.optim import AdaBelief
    from mixer.regressor import MixERRegressor
    from mixer.train import Run

__all__ = [
    "PRESETS",
    "AdaBelief",
    "CoDAExpert",
    "Config",
    "Environments",
    "GEPSExpert",
    "KMeansLeastSquaresGate",
    "MixER",
    "MixERRegressor",
    "NCFExpert",
    "Run",
    "ShallowPLRNNExpert",
]

_HOME = {
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["CoDAExpert", "GEPSExpert", "MixER", "NCFExpert", "ShallowPLRNNExpert"], "model"),
    "AdaBelief": "optim",
    "Environments": "data",
    "KMeansLeastSquaresGate": "gating",
    "MixERRegressor": "regressor",
    "Run": "train",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'mixer' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mixer.{_HOME[name]}"), name)
