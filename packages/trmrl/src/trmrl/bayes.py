"""Why a mixture of memories is a good one: self-attention's consensus has at most the Minimum Bayes Risk's risk."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def consensus(weights: Tensor, memories: Tensor) -> Tensor:
    """Σ_i p_i e_i, what attention returns: weights (…, n), memories (…, n, d) → (…, d)."""
    return (weights[..., None] * memories).sum(-2)


def risk(candidate: Tensor, weights: Tensor, memories: Tensor) -> Tensor:
    """Expected risk of a candidate (…, d) under memories of unit norm: −Σ_i p_i cos(candidate, e_i)."""
    cosines = F.cosine_similarity(candidate[..., None, :], memories, dim=-1)
    return -(weights * cosines).sum(-1)


def consensus_risk(weights: Tensor, memories: Tensor) -> Tensor:
    """Risk of the consensus, in closed form −‖Σ_i p_i e_i‖ for memories of unit norm."""
    return -consensus(weights, memories).norm(dim=-1)


def minimum_bayes_risk(weights: Tensor, memories: Tensor) -> Tensor:
    """Least risk of a memory among those there are: min_j −Σ_i p_i ⟨e_j, e_i⟩."""
    similarity = memories @ memories.mT
    return -(similarity * weights[..., None, :]).sum(-1).amax(-1)
