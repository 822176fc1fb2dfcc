"""Contextual self-modulation: the vector field of a neighbour's context, expanded to one's own by Taylor's formula
(neural context flows; used by MixER with order 2 for Sel'kov and the series)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from metazoo.errors import UserError
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

    Raises:
        UserError: another order.
    """
    if order not in (0, 1, 2):
        raise UserError(f"taylor_order is {order}: give 0, 1 or 2")
    if order == 0:
        return f(xi)
    v = xi - xi0
    if order == 1:
        value, slope = _jvp(f, xi0, v)
        return value + slope

    def g(zeta: torch.Tensor) -> torch.Tensor:
        return _jvp(f, zeta, xi - zeta)[1]

    slope, curve = _jvp(g, xi0, v)
    return f(xi0) + 1.5 * slope + 0.5 * curve


def _jvp(f: Function, at: torch.Tensor, along: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return cast("tuple[torch.Tensor, torch.Tensor]", cast(Any, jvp)(f, (at,), (along,)))


def multiplication(coefficients: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiplication by a power series of matrices, cut at s^K, as one matrix on stacked coefficients.

    Coefficients of 1 … s^K [B, out, in] each -> [B, (K + 1)·out, (K + 1)·in], block (i, j) is coefficient i − j.
    """
    nothing = torch.zeros_like(coefficients[0])
    powers = range(len(coefficients))
    rows = [torch.cat([coefficients[i - j] if i >= j else nothing for j in powers], dim=-1) for i in powers]
    return torch.cat(rows, dim=-2)


def swish_series(x: torch.Tensor, beta: Sequence[torch.Tensor]) -> torch.Tensor:
    """x·σ(βx) for power series cut at s^K, K = 1 or 2: stacked x [B, N, (K + 1)·h], K + 1 of β [B] -> as x."""
    beta = [value[:, None, None] for value in beta]
    x0, x1, *more = x.chunk(len(beta), dim=-1)
    s0 = torch.sigmoid(beta[0] * x0)
    u1 = beta[0] * x1 + beta[1] * x0
    slope = s0 * (1 - s0)  # σ'
    s1 = slope * u1
    out = [x0 * s0, x0 * s1 + x1 * s0]
    if more:
        (x2,) = more
        u2 = beta[0] * x2 + beta[1] * x1 + beta[2] * x0
        s2 = slope * u2 + 0.5 * (1 - 2 * s0) * s1 * u1  # σ'u₂ + ½σ''u₁²
        out.append(x0 * s2 + x1 * s1 + x2 * s0)
    return torch.cat(out, dim=-1)


def relu_series(x: torch.Tensor, powers: int) -> torch.Tensor:
    """relu for power series: the sign of the coefficient of 1 decides for all. Stacked [B, N, powers·h] -> as x."""
    return x * (x.chunk(powers, dim=-1)[0] > 0).repeat(1, 1, powers)


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
