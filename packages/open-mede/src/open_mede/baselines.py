"""What cross-batch training is compared with: pulls back to CLIP of three kinds, each as a change of the gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from open_mede.crossbatch import Loss, Reduce, gradient_of


class ResidualProjector(nn.Module):
    """f + 0.1·P(f), P of two layers, the second zero at first: the student's features, let free of the teacher's
    (FROSTER, Huang et al. 2024).

    Args:
        width: of features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.second = nn.Linear(width, width, bias=False)
        nn.init.kaiming_normal_(self.first.weight)
        nn.init.zeros_(self.second.weight)

    def forward(self, features: Tensor) -> Tensor:
        """[..., d]."""
        found: Tensor = features + 0.1 * self.second(F.gelu(self.first(features)))
        return found


def distillation_loss(features: Tensor, frozen: Tensor, projector: nn.Module) -> Tensor:
    """1 − cos of projected features and CLIP's, for each clip [B]: the mean over its frames.

    Args:
        features: [B, T, d] of norm 1, of the learner.
        frozen: the same of CLIP.
        projector: a :class:`ResidualProjector`.

    FROSTER has the same for texts. These are frozen here, so that theirs is zero, and stays so.
    """
    return (1 - F.cosine_similarity(projector(features), frozen, dim=-1)).mean(1)


def interpolated_gradient(
    loss: Loss, batch: Any, parameters: Sequence[nn.Parameter], start: Sequence[Tensor], share: float, weight: float,
    reduce: Reduce | None = None,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Open-VCLIP's interpolated weight optimisation (Weng et al. 2023): ∇L(θ) + weight · ∇L at r·θ₀ + (1 − r)·θ.

    The second gradient is applied at θ as it is, as in the released code. The parameters are put back exactly.

    Args:
        loss: as of :func:`open_mede.crossbatch.cross_batch_step`.
        parameters: θ.
        start: θ₀, CLIP's.
        share: r.
        weight: of the loss at the interpolated weights; 0: only the first term.

    Returns:
        L(θ), and the gradient.
    """
    value, gradient = gradient_of(loss, batch, parameters, reduce)
    if weight == 0:
        return value, gradient
    before = [one.detach().clone() for one in parameters]
    try:
        with torch.no_grad():
            torch._foreach_lerp_(list(parameters), list(start), share)
        _, between = gradient_of(loss, batch, parameters, reduce)
    finally:
        with torch.no_grad():
            torch._foreach_copy_(list(parameters), before)
    torch._foreach_add_(gradient, between, alpha=weight)
    return value, gradient


def add_anchor(parameters: Sequence[nn.Parameter], start: Sequence[Tensor], strength: float) -> None:
    """Add the gradient of λ‖θ − θ₀‖² to ``.grad`` (L2-SP)."""
    for parameter, first in zip(parameters, start, strict=True):
        if parameter.grad is not None:
            parameter.grad.add_(parameter.detach() - first, alpha=2 * strength)
