"""Where the coefficients of a layer's edges come from. Each module's forward gives them all: [E, W].

Shapes: E edges, W = |w| coefficients of an edge, K centroids.
"""

from __future__ import annotations

import torch
from metazoo.errors import UserError
from torch import nn

from metacluster.bits import bits_for, pack_indices, unpack_indices


class DirectEdges(nn.Module):
    """An ordinary KAN: every edge has coefficients of its own [E, W]."""

    def __init__(self, coefficients: torch.Tensor) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(coefficients)

    def forward(self) -> torch.Tensor:
        return self.coefficients


class MetaLearner(nn.Module):
    """M_θ(z) = W₂ ReLU(W₁ z + b₁) + b₂: an edge's coefficients [E, W] from its embedding [E, d_emb] (Section 3.1)."""

    def __init__(self, d_emb: int, d_hidden: int, size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_emb, d_hidden)
        self.out = nn.Linear(d_hidden, size)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return self.out(self.hidden(z).relu_())  # type: ignore[no-any-return]


class MetaEdges(nn.Module):
    """Stage 1: every edge has an embedding z [E, d_emb]; the meta-learner emits its coefficients."""

    def __init__(self, embedding: torch.Tensor, meta_learner: MetaLearner) -> None:
        super().__init__()
        self.embedding = nn.Parameter(embedding)
        self.meta_learner = meta_learner

    def forward(self) -> torch.Tensor:
        return self.meta_learner(self.embedding)  # type: ignore[no-any-return]


class ClusteredEdges(nn.Module):
    """Stages 2 and 3: every edge has the coefficients of its centroid, w_e = μ_{a(e)}.

    The codebook [K, W] is trained; its gradient is the sum of its edges' gradients. The assignment is kept as a
    stream of ⌈log₂ K⌉ bits an edge.

    Args:
        codebook: [K, W]; a Parameter is shared, not copied.
        assignment: centroid of each edge, int64 [E].

    Raises:
        UserError: an index that the codebook does not have.
    """

    packed: torch.Tensor

    def __init__(self, codebook: torch.Tensor, assignment: torch.Tensor) -> None:
        super().__init__()
        self.codebook = codebook if isinstance(codebook, nn.Parameter) else nn.Parameter(codebook)
        self.count = len(assignment)
        self.bits = bits_for(len(codebook))
        if self.count and not 0 <= int(assignment.min()) <= int(assignment.max()) < len(codebook):
            raise UserError(
                f"assignment {int(assignment.min())} … {int(assignment.max())} does not fit a codebook of "
                f"{len(codebook)} centroids: cluster again"
            )
        self.register_buffer("packed", pack_indices(assignment, self.bits))

    @property
    def assignment(self) -> torch.Tensor:
        """Centroid of each edge, int64 [E]."""
        return self.indices(0, self.count)

    def indices(self, start: int, stop: int) -> torch.Tensor:
        """Centroids of the edges start … stop − 1, int64."""
        return unpack_indices(self.packed, self.bits, stop - start, start=start)

    def forward(self) -> torch.Tensor:
        return nn.functional.embedding(self.assignment, self.codebook)


Edges = DirectEdges | MetaEdges | ClusteredEdges
