"""What the paper compares MixER with. The learned ones go through the same loop (train.py) with the same budget."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from mixer.config import Config

if TYPE_CHECKING:
    import numpy as np


def single_expert(config: Config) -> Config:
    """MixER-1: one meta-learner (plain NCF, CoDA or GEPS) whose context is what one of the experts had."""
    size = config.context_size // config.experts if config.split_context else config.context_size
    return replace(config, experts=1, context_size=size)


def naive_moe(config: Config, *, same_init: bool = True) -> Config:
    """A mixture of experts with a gate learned by gradient: top-1, its output multiplied by its softmax gate value
    (as in Switch transformers), so that W does get a gradient.

    The released code's own gradient mode has no path from the loss to W and would be a strawman. Experts that start
    from the same weights cannot be told apart by a gradient, so ``same_init=False`` is the fairer one.
    """
    return replace(config, gate="gradient", same_init=same_init)


def kmeans_raw(series: np.ndarray, clusters: int, *, seed: int = 0) -> np.ndarray:
    """K-means (Euclidean) on raw series [E, T·d], each z-scored, the baseline of the series experiments -> [E]."""
    from sklearn.cluster import KMeans

    flat = series.reshape(len(series), -1)
    scaled = (flat - flat.mean(1, keepdims=True)) / flat.std(1, keepdims=True).clip(min=1e-12)
    return KMeans(clusters, n_init=10, random_state=seed).fit_predict(scaled)
