"""What MAML-Align is compared with, on the same sets: MAML (T-MAML, S-MAML), Reptile, fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from metazoo import inner
from metazoo.inner import Params

from maml_align.meta_distillation import Inner, TaskGradients, outer, split


def maml(loss: inner.Loss, theta: Params, sets: Any, loop: Inner) -> TaskGradients:
    """Inner steps on the support set, outer loss on the query set: the teacher T-MAML on (mono, bilingual) sets, the
    student S-MAML on (bilingual, multilingual) ones; FOMAML and MAML by ``loop.first_order``."""
    support, query = sets
    found = outer(loss, theta, support, query, loop)
    zero = torch.zeros_like(found.loss)
    return TaskGradients(found.gradient, {}, zero, zero, {"query_loss": found.loss}, found.distance)


def reptile(loss: inner.Loss, theta: Params, sets: Any, loop: Inner) -> TaskGradients:
    """(θ − φ) / α after U steps, on the task's sets in turn (Nichol et al. 2018); one step on one set: SGD's ∇ℓ(θ)."""
    batches = [sets[step % len(sets)] for step in range(loop.steps)]
    adapted = inner.adapt(loss, theta, batches, loop.rate, first_order=True, functional=loop.functional)
    pull = {name: (theta[name] - adapted.params[name]).detach() / loop.rate for name in theta}
    zero = torch.zeros_like(adapted.losses[0])
    losses = {"query_loss": adapted.losses.mean()}
    return TaskGradients(pull, {}, zero, zero, losses, inner.distance(adapted.params, theta))


def fine_tune(loss: inner.Loss, theta: Params, sets: Any, loop: Inner) -> TaskGradients:
    """∇ of the mean loss of the sets at θ, without an inner loop."""

    def objective(params: Params) -> tuple[torch.Tensor, tuple[()]]:
        return torch.stack([loss(params, batch) for batch in sets]).mean(), ()

    gradient, value, _ = inner.gradient(objective, split(theta, 0.0)[0], functional=loop.functional)
    zero = torch.zeros_like(value)
    return TaskGradients(gradient, {}, zero, zero, {"query_loss": value.detach()}, zero)


class TfidfEncoder:
    """TF-IDF of the 8,192 most frequent character n-grams (3 to 5, within words): search without a network.

    Args:
        texts: that n-grams and document frequencies are taken of.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.vectorizer = TfidfVectorizer(
            analyzer="char_wb", ngram_range=(3, 5), max_features=8192, sublinear_tf=True, dtype=np.float32
        )
        self.vectorizer.fit(texts)

    def encode(self, texts: Sequence[str], batch_size: int = 64, role: str | None = None) -> np.ndarray:
        """Unit vectors [N, n-grams] float32; zero for a text with none of them."""
        return np.asarray(self.vectorizer.transform(texts).toarray(), dtype=np.float32)
