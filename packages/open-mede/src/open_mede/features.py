"""The feature-level world: clips as a static and a temporal vector, classes as texts of both, a static-biased start.

A class c has a context a_c and a motion b_c, both N(0, I₁₆). Its text is U_s a_c + U_m b_c, its clips are
[P_s(a + 0.5ε) + 0.3ε; P_m(b_c + ε) + 0.3ε]: what the mean frame shows, and how frames differ. In training, a is the
class's own context with probability 0.95, else that of another known class: the two cues agree too well to tell apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FACTORS, SIDE, TEXT = 16, 64, 48
"""Dimensions of a context or motion; of each half of a clip; of a text."""
CLASSES = 20
"""Known classes, and as many novel ones."""
FOREIGN = 2_000
"""Contexts that belong to no class."""


@dataclass(frozen=True)
class FeatureClips:
    """Clips of one set.

    Attributes:
        inputs: [N, 128] float32.
        labels: [N] numbers of classes.
    """

    inputs: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class FeatureWorld:
    """Everything of one seed.

    Attributes:
        names: 40 class names; the first 20 are known.
        texts: [40, 48] of norm 1.
        start: [48, 64] map of the static half to a text's static part: what an image model knows.
        train: clips of known classes.
        tests: base_in, base_out, novel_in, novel_out: in and out of context, the same motions.
    """

    names: tuple[str, ...]
    texts: np.ndarray
    start: np.ndarray
    train: FeatureClips
    tests: dict[str, FeatureClips]


def generate(seed: int, clips: int, test_clips: int, *, ratio: float = 0.95, motion_noise: float = 1.0) -> FeatureWorld:
    """The world of a seed.

    Args:
        seed: of everything.
        clips: for training.
        test_clips: of each test set.
        ratio: probability of a class's own context in training.
        motion_noise: standard deviation of a clip's motion around its class's.
    """
    rng = np.random.default_rng([seed, 0])
    known = 2 * CLASSES
    contexts, motions = rng.normal(size=(known, FACTORS)), rng.normal(size=(known, FACTORS))
    static_text, motion_text = rng.normal(size=(2, TEXT, FACTORS)) / np.sqrt(FACTORS)
    static, motion = rng.normal(size=(2, SIDE, FACTORS)) / np.sqrt(FACTORS)
    texts = contexts @ static_text.T + motions @ motion_text.T
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)

    def seen(context: np.ndarray) -> np.ndarray:
        """Static halves [N, 64] of contexts [N, 16]."""
        varied = context + 0.5 * rng.normal(size=context.shape)
        return varied @ static.T + 0.3 * rng.normal(size=(len(context), SIDE))

    def moved(labels: np.ndarray) -> np.ndarray:
        """Temporal halves [N, 64] of classes [N]."""
        varied = motions[labels] + motion_noise * rng.normal(size=(len(labels), FACTORS))
        return varied @ motion.T + 0.3 * rng.normal(size=(len(labels), SIDE))

    foreign = rng.normal(size=(FOREIGN, FACTORS))
    start = _ridge(seen(foreign), foreign @ static_text.T)
    labels = rng.integers(CLASSES, size=clips)
    others = (labels + rng.integers(1, CLASSES, size=clips)) % CLASSES
    own = rng.random(clips) < ratio
    train = FeatureClips(_joined(seen(contexts[np.where(own, labels, others)]), moved(labels)), labels)
    tests = {}
    for name, first in (("base", 0), ("novel", CLASSES)):
        asked = first + rng.integers(CLASSES, size=test_clips)
        motion_half = moved(asked)
        elsewhere = foreign[rng.integers(FOREIGN, size=test_clips)]
        tests[f"{name}_in"] = FeatureClips(_joined(seen(contexts[asked]), motion_half), asked)
        tests[f"{name}_out"] = FeatureClips(_joined(seen(elsewhere), motion_half), asked)
    names = tuple(f"{'base' if i < CLASSES else 'novel'} {i % CLASSES}" for i in range(known))
    return FeatureWorld(names, texts.astype(np.float32), start.astype(np.float32), train, tests)


def _ridge(inputs: np.ndarray, targets: np.ndarray, strength: float = 1.0) -> np.ndarray:
    gram = inputs.T @ inputs + strength * np.eye(inputs.shape[1])
    solution: np.ndarray = np.linalg.solve(gram, inputs.T @ targets).T
    return solution


def _joined(static: np.ndarray, temporal: np.ndarray) -> np.ndarray:
    return np.concatenate([static, temporal], axis=1).astype(np.float32)
