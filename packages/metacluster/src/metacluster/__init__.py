"""MetaCluster: deep compression of Kolmogorov-Arnold networks by a meta-learner and K-means (arXiv 2510.19105).

Training and evaluation are functions of their modules: ``metacluster.train.train``, ``metacluster.evaluate.evaluate``.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metacluster.clustering import attach_meta_learner, compress, finetune_codebook
    from metacluster.config import PRESETS, Config
    from metacluster.estimator import MetaClusterClassifier, MetaClusterRegressor
    from metacluster.model import KAN, MLP, ConvKAN, KANConv2d, KANLinear, from_efficient_kan, from_fastkan
    from metacluster.packing import CompressedKAN, CompressionReport, compression_report, load_packed, save_packed
    from metacluster.train import Run

__all__ = [
    "KAN",
    "MLP",
    "PRESETS",
    "CompressedKAN",
    "CompressionReport",
    "Config",
    "ConvKAN",
    "KANConv2d",
    "KANLinear",
    "MetaClusterClassifier",
    "MetaClusterRegressor",
    "Run",
    "attach_meta_learner",
    "compress",
    "compression_report",
    "finetune_codebook",
    "from_efficient_kan",
    "from_fastkan",
    "load_packed",
    "save_packed",
]

_HOME = {
    **dict.fromkeys(["PRESETS", "Config"], "config"),
    **dict.fromkeys(["KAN", "MLP", "ConvKAN", "KANConv2d", "KANLinear", "from_efficient_kan", "from_fastkan"], "model"),
    **dict.fromkeys(["attach_meta_learner", "compress", "finetune_codebook"], "clustering"),
    **dict.fromkeys(
        ["CompressedKAN", "CompressionReport", "compression_report", "load_packed", "save_packed"], "packing"
    ),
    **dict.fromkeys(["MetaClusterClassifier", "MetaClusterRegressor"], "estimator"),
    "Run": "train",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first used: the command line starts without torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'metacluster' has no attribute {name!r}")
    return getattr(importlib.import_module(f"metacluster.{_HOME[name]}"), name)
