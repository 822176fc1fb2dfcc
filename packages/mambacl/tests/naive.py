"""Slow, obvious versions: the truth that the package is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def recurrent(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """S_t = exp(Δ_t A) S_{t−1} + Δ_t x_t B_t, y_t = S_t C_t + D x_t, one number at a time."""
    y = torch.zeros_like(x)
    state = state.clone()
    rows = []
    for b in range(x.shape[0]):
        out = []
        s = state[b]
        for t in range(x.shape[1]):
            s = torch.exp(delta[b, t][:, None] * A) * s + (delta[b, t] * x[b, t])[:, None] * B[b, t][None]
            out.append(s @ C[b, t] + (0 if D is None else D * x[b, t]))
        rows.append((torch.stack(out), s))
    y = torch.stack([row[0] for row in rows])
    return y, torch.stack([row[1] for row in rows])


def blelloch(decay: Tensor, update: Tensor) -> Tensor:
    """Work-efficient scan of (a, u) pairs along dim 0 (up-sweep, down-sweep); any length."""
    length = len(update)
    size = 1
    while size < length:
        size *= 2
    a = torch.cat([decay, torch.ones_like(decay[:1]).expand(size - length, *decay.shape[1:])])
    u = torch.cat([update, torch.zeros_like(update[:1]).expand(size - length, *update.shape[1:])])
    levels = []
    while len(a) > 1:
        levels.append((a, u))
        a, u = a[1::2] * a[::2], a[1::2] * u[::2] + u[1::2]
    before = torch.zeros_like(u)  # what comes before each node
    for a, u in reversed(levels):
        both = torch.stack([before, a[::2] * before + u[::2]], 1)
        before = both.flatten(0, 1)
    return (decay * before[:length]) + update
