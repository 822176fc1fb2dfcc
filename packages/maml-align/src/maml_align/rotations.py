"""A synthetic world in which adapting helps: languages are rotations of one latent space, a task weighs some of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from metazoo.errors import UserError

from maml_align.config import Config
from maml_align.data import Data

TURN = 0.6  # of the antisymmetric generator of a rotation
RELEVANT, REST = 1.0, 0.15  # weights of a task's latent dimensions
SHARE = 4  # one of so many dimensions is relevant
TEST_TASKS, TEST_PAIRS = 200, 200


@dataclass(frozen=True)
class World:
    """Languages as rotations [languages, d, d]; x = R_l z."""

    languages: tuple[str, ...]
    rotations: np.ndarray

    def weights(self, rng: np.random.Generator) -> np.ndarray:
        """Of one task over the latent dimensions, [d]."""
        dimension = self.rotations.shape[-1]
        found = np.full(dimension, REST)
        found[rng.permutation(dimension)[: max(1, dimension // SHARE)]] = RELEVANT
        return found

    def pairs(
        self, weights: np.ndarray, one: np.ndarray, other: np.ndarray, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [2, k, d] in languages one [k] and other [k], and scores [k]: cosines weighted by the task."""
        latent = rng.standard_normal((2, len(one), len(weights)))
        products = (weights * latent[0] * latent[1]).sum(-1)
        scores = products / np.sqrt((weights * latent[0] ** 2).sum(-1) * (weights * latent[1] ** 2).sum(-1))
        languages = np.stack([one, other])
        vectors = np.einsum("skij,skj->ski", self.rotations[languages], latent)
        return vectors.astype(np.float32), scores.astype(np.float32)


def world(languages: tuple[str, ...], dimension: int, seed: int) -> World:
    """Rotations exp(0.6 (G − Gᵀ)/√2), G standard normal, one for each language."""
    from scipy.linalg import expm

    rng = np.random.default_rng([seed, 0x726F74])
    drawn = rng.standard_normal((len(languages), dimension, dimension))
    turned = np.stack([expm(TURN * (one - one.T) / 2**0.5) for one in drawn])
    return World(languages, turned)


def load(config: Config) -> Data:
    """The world of a seed; its tasks are drawn when they are needed.

    Raises:
        UserError: there is nothing in it that is not seen.
    """
    if config.unseen:
        raise UserError("--dataset rotations has no unseen languages: leave --unseen empty")
    found = world(config.languages, config.dimension, config.seed)
    return Data("rotations", "vectors", found, found, found)
