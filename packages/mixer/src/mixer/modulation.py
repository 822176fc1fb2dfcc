"""Contextual self-modulation: the vector field of a neighbour's context, expanded to one's own by Taylor's formula
(neural context flows; used by MixER with order 2 for Sel'kov and the series)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.func import jvp

Function = Callable[[torch.Tensor], torch.Tensor]


def taylor(f: Function, xi: torch.Tensor, xi0: torch.Tensor, order: int) -> torch.Tensor:
    """Expand f about ξ' = ``xi0`` and evaluate the expansion at ξ = ``xi``.

    With v = ξ − ξ' and g(ζ) = J(ζ)(ξ − ζ), all by forward-mode products:
    order 1 is f(ξ') + g(ξ') = f + Jv; order 2 is f(ξ') + 1.5 g(ξ') + 0.5 ∂g(ξ')[v] = f + Jv + ½ vᵀHv, since
    ∂g[v] = vᵀHv − Jv. Exact for f linear (quadratic) in ξ. Order 0 is f(ξ), without an expansion.

    Args:
        f: context -> output, batched as it likes; each output may depend on its own row of ξ only.
        xi: own contexts [B, C].
        xi0: contexts that the expansion is taken around, of the same shape.
        order: 0, 1 or 2.

    Returns:
        What f returns.
    """
    if order == 0:
        return f(xi)
    v = xi - xi0
    if order == 1:
        value, slope = jvp(f, (xi0,), (v,))
        return value + slope

    def g(zeta: torch.Tensor) -> torch.Tensor:
        return jvp(f, (zeta,), (xi - zeta,))[1]

    slope, curve = jvp(g, (xi0,), (v,))
    return f(xi0) + 1.5 * slope + 0.5 * curve


def nearest(contexts: torch.Tensor, xi: torch.Tensor, k: int) -> torch.Tensor:
    """The ``k`` contexts nearest to each of ``xi`` in mean absolute distance, itself among them ("NF" pool).

    Args:
        contexts: [E, C] to choose from.
        xi: [B, C].

    Returns:
        [B, k, C], the nearest first; gradients flow to the chosen contexts.
    """
    distances = (xi.detach()[:, None] - contexts.detach()[None]).abs().mean(-1)
    return contexts[distances.argsort(dim=1, stable=True)[:, :k]]
