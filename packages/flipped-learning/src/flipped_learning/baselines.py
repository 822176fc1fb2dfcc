"""What flipped learning is compared with. DIRECT (T0) and CHANNEL go through the same loop: --method direct, channel;
FLIPPED without unlikelihood is --unlikelihood 0. Here are the references that need no language model."""

from __future__ import annotations

from collections import Counter

import numpy as np

from flipped_learning import metrics
from flipped_learning.data import Task


def majority(task: Task, references: np.ndarray) -> dict[str, float]:
    """metrics.compute of answering the most frequent label of ``task.train``."""
    counts = Counter(example["label"] for example in task.train if "label" in example)
    most = counts.most_common(1)[0][0] if counts else 0
    return metrics.compute(np.full(len(references), most), references)


def tfidf(task: Task, limit: int | None = None) -> dict[str, float]:
    """metrics.compute of logistic regression on TF-IDF of words and word pairs, trained on ``task.train`` with its
    labels: supervised, where all rules of this package are asked with label words alone."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def text(example: object) -> str:
        assert isinstance(example, dict)
        return " ".join(str(value) for key, value in example.items() if key != "label")

    model = make_pipeline(TfidfVectorizer(ngram_range=(1, 2), min_df=2), LogisticRegression(max_iter=1000))
    model.fit([text(one) for one in task.train], [one["label"] for one in task.train])
    test = task.test[:limit]
    return metrics.compute(model.predict([text(one) for one in test]), [one["label"] for one in test])
