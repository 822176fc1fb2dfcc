"""The three rules in the smallest model that has them: bags of words, and an instruction that fits or does not.

With h = Σ_{w in x} E[w] / √n and label embedding E[l], the match is s(x, l) = hᵀ M E[l].
    FLIPPED  the instruction's likelihood is P(I | x, l) = σ(s(x, l)): one token, whose alternative is "no instruction"
    DIRECT   P(l | x) is a softmax over the whole vocabulary of hᵀ M U[l], with U = E (tied) or weights of its own
    CHANNEL  P(x | l) = Π_{w in x} softmax_w(U[w]ᵀ M E[l])
M begins as the identity.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flipped_learning.flipping import Method, likelihood_loss, unlikelihood_loss

UNKNOWN = 0


def words(text: str) -> list[str]:
    """Lower-case words of letters, digits and apostrophes."""
    return re.findall(r"[a-z0-9']+", text.lower())


def build_vocabulary(texts: Iterable[str], size: int, always: Iterable[str] = ()) -> dict[str, int]:
    """Ids from 1 of the ``size`` most frequent words (of equal ones the first in the alphabet) and of ``always``."""
    counts = Counter(word for text in texts for word in words(text))
    kept = [word for word, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:size]]
    kept = [*dict.fromkeys([*kept, *always])]
    return {word: i + 1 for i, word in enumerate(kept)}


class BagOfWords(nn.Module):
    """Scores labels of one word.

    Args:
        vocabulary: word to id, from 1. width: of the embeddings. method: the rule. tied: U = E.
    """

    def __init__(self, vocabulary: dict[str, int], width: int, method: Method, *, tied: bool) -> None:
        super().__init__()
        self.vocabulary, self.method = vocabulary, method
        self.embedding = nn.Embedding(len(vocabulary) + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.match = nn.Parameter(torch.eye(width))
        self.output = self.embedding
        if not tied and method != "flipped":
            self.output = nn.Embedding(len(vocabulary) + 1, width)
            nn.init.normal_(self.output.weight, std=0.1)

    def ids(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Word ids of all texts in a row [Σn], and each text's index of it [Σn]."""
        found = [[self.vocabulary.get(word, UNKNOWN) for word in words(text)] or [UNKNOWN] for text in texts]
        flat = torch.tensor([i for ids in found for i in ids])
        return flat, torch.repeat_interleave(torch.arange(len(found)), torch.tensor([len(ids) for ids in found]))

    def log_probs(self, flat: Tensor, owner: Tensor, labels: Tensor) -> Tensor:
        """The rule's log P [B, K] of texts (word ids and owners of :meth:`ids`) and label ids [B, K]."""
        count = len(labels)
        label = self.embedding(labels)  # [B, K, d]
        if self.method == "channel":
            logits = F.log_softmax(label @ self.match.T @ self.output.weight.T, -1)  # [B, K, V]
            chosen = logits[owner, :, flat]  # [Σn, K]
            return chosen.new_zeros(count, labels.shape[1]).index_add(0, owner, chosen)
        sizes = torch.bincount(owner, minlength=count).sqrt()
        h = self.embedding.weight.new_zeros(count, self.match.shape[0])
        h = h.index_add(0, owner, self.embedding(flat)) / sizes[:, None]
        if self.method == "flipped":
            return F.logsigmoid(torch.einsum("bd,de,bke->bk", h, self.match, label))
        logits = F.log_softmax(h @ self.match @ self.output.weight.T, -1)  # [B, V]
        return logits.gather(1, labels)

    def terms(self, texts: Sequence[str], right: Sequence[str], wrong: Sequence[str]) -> dict[str, Tensor]:
        """Sums over the texts: likelihood, unlikelihood (flipped), log_p_right and log_p_wrong."""
        flat, owner = self.ids(texts)
        labels = torch.tensor([[self.word(r), self.word(w)] for r, w in zip(right, wrong, strict=True)])
        log_p = self.log_probs(flat, owner, labels)
        counts = torch.ones(len(texts), dtype=torch.bool)
        return {
            "likelihood": likelihood_loss(log_p[:, 0]),
            "unlikelihood": unlikelihood_loss(log_p[:, 1], counts),
            "log_p_right": log_p[:, 0].detach().sum(),
            "log_p_wrong": log_p[:, 1].detach().sum(),
        }

    def word(self, label: str) -> int:
        """Id of a label of one word; of several words the first that is known."""
        return next((self.vocabulary[w] for w in words(label) if w in self.vocabulary), UNKNOWN)

    @torch.no_grad()
    def score(self, texts: Sequence[str], options: Sequence[str]) -> Tensor:
        """log P [N, K] of each option for each text."""
        flat, owner = self.ids(texts)
        labels = torch.tensor([self.word(option) for option in options]).expand(len(texts), -1)
        return self.log_probs(flat, owner, labels)
