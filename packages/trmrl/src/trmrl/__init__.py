"""TrMRL (Melo 2022): transformers as meta-reinforcement learners, that infer a task from their last few transitions.

Training is a function of its module: ``trmrl.train.train``. ``import trmrl.env`` registers
its environments: ``gymnasium.make("trmrl/PointRobot-v0")``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trmrl.config import PRESETS, Config
    from trmrl.env import MetaEnv, RL2Wrapper, TaskVectorEnv, make, make_vector
    from trmrl.evaluate import evaluate_adaptation
    from trmrl.model import RL2Policy, Sizes, Trials, TrMRLPolicy, Value
    from trmrl.ppo import PPOLearner, clipped_surrogate, gae
    from trmrl.tfixup import tfixup_init_
    from trmrl.train import Run, load

__all__ = [
    "PRESETS",
    "Config",
    "MetaEnv",
    "PPOLearner",
    "RL2Policy",
    "RL2Wrapper",
    "Run",
    "Sizes",
    "TaskVectorEnv",
    "TrMRLPolicy",
    "Trials",
    "Value",
    "clipped_surrogate",
    "evaluate_adaptation",
    "gae",
    "load",
    "make",
    "make_vector",
    "tfixup_init_",
]

_HOME = {
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["MetaEnv", "RL2Wrapper", "TaskVectorEnv", "make", "make_vector"], "env"),
    "evaluate_adaptation": "evaluate",
    **dict.fromkeys(["RL2Policy", "Sizes", "TrMRLPolicy", "Trials", "Value"], "model"),
    **dict.fromkeys(["PPOLearner", "clipped_surrogate", "gae"], "ppo"),
    "tfixup_init_": "tfixup",
    **dict.fromkeys(["Run", "load"], "train"),
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'trmrl' has no attribute {name!r}")
    return getattr(importlib.import_module(f"trmrl.{_HOME[name]}"), name)
