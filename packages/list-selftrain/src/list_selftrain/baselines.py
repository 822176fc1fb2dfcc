"""What the paper compares with: choices of pseudo-labels that are not learned, and supervised and classical yardsticks.

Most baselines are settings of the same loop: classic fine-tuning (--classifier classic --tune full --sessions 0),
prompt fine-tuning (--tune full --sessions 0), prompt-adapter fine-tuning (--sessions 0), PromptST (--weights uniform),
confidence (--weights confidence --threshold c), UST (--classifier classic --tune full --weights uncertainty
--no-soft-labels), MetaST (--classifier classic --tune full).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from list_selftrain.data import Data


def mutual_information(probabilities: Tensor) -> Tensor:
    """BALD, H(mean p) − mean H(p) over passes with dropout (UST, equation 7); [S, N, C] -> [N], in nats."""

    def entropy(p: Tensor) -> Tensor:
        return torch.special.entr(p).sum(-1)

    return entropy(probabilities.mean(0)) - entropy(probabilities).mean(0)


def uncertainty_choice(
    probabilities: Tensor, count: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """UST's choice of pseudo-labelled examples (Mukherjee and Awadallah 2020, easy examples, equally many of each
    class).

    Within the examples whose mean probability is highest for a class, one is drawn without replacement with probability
    in proportion to 1 − BALD; classes with too few leave their places to the others. An example's loss counts log(1 /
    Var) of its class's probability over the passes.

    Args:
        probabilities: of S passes with dropout, [S, N, C]. count: examples to choose, at most N. rng: draws them.

    Returns:
        Their indices [count], pseudo-labels [count] and weights [count] (non-negative, of mean 1).
    """
    mean = probabilities.mean(0)
    labels = mean.argmax(-1).numpy()
    easy = (1 - mutual_information(probabilities)).clamp(min=1e-6).double().numpy()
    keys = rng.exponential(size=len(easy)) / easy  # the smallest keys are a draw without replacement
    classes = mean.shape[-1]
    order = [np.flatnonzero(labels == c)[np.argsort(keys[labels == c])] for c in range(classes)]
    ranks = np.concatenate([np.arange(len(of)) for of in order])
    members = np.concatenate(order)
    chosen = members[np.argsort(ranks, kind="stable")[:count]]  # round by round, one of each class
    variance = probabilities.var(0, unbiased=False)[torch.from_numpy(chosen), torch.from_numpy(labels[chosen])]
    weights = torch.log(1 / (variance.double() + 1e-10)).clamp(min=0).numpy()
    return chosen, labels[chosen], weights / max(weights.mean(), 1e-12)


def tfidf_self_training(data: Data, seed: int = 0) -> dict[str, float]:
    """scikit-learn's self-training on TF-IDF features, beside the same classifier on the labelled texts alone.

    Returns:
        tfidf_accuracy and, where there are unlabelled texts, tfidf_self_training_accuracy on the test part, in percent.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.semi_supervised import SelfTrainingClassifier

    assert data.test is not None
    assert data.test.labels is not None
    assert data.labelled.labels is not None
    labelled, unlabelled, test = (
        [" ".join(texts) for texts in part.texts] for part in (data.labelled, data.unlabelled, data.test)
    )
    vectorizer = TfidfVectorizer(sublinear_tf=True).fit([*labelled, *unlabelled])
    supervised = make_pipeline(vectorizer, LogisticRegression(random_state=seed)).fit(labelled, data.labelled.labels)
    found = {"tfidf_accuracy": 100 * float(supervised.score(test, data.test.labels))}
    if unlabelled:
        labels = np.concatenate([data.labelled.labels, np.full(len(unlabelled), -1)])
        semi = SelfTrainingClassifier(
            LogisticRegression(random_state=seed), criterion="k_best", k_best=min(100, len(unlabelled))
        )
        semi.fit(vectorizer.transform([*labelled, *unlabelled]), labels)
        accuracy = semi.score(vectorizer.transform(test), data.test.labels)
        found["tfidf_self_training_accuracy"] = 100 * float(accuracy)
    return found
