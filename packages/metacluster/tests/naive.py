"""Slow truths of the tests, by definition and by loops."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from metacluster.model import KANConv2d, KANLinear


def cox_de_boor(x: np.ndarray, grid: int, order: int, low: float, high: float) -> np.ndarray:
    """All B-splines at x [N] by the recursion -> [N, grid + order]."""
    h = (high - low) / grid
    knots = low + h * np.arange(-order, grid + order + 1)
    values = ((x[:, None] >= knots[:-1]) & (x[:, None] < knots[1:])).astype(np.float64)
    for k in range(1, order + 1):
        left = (x[:, None] - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1]) * values[:, :-1]
        right = (knots[k + 1 :] - x[:, None]) / (knots[k + 1 :] - knots[1:-k]) * values[:, 1:]
        values = left + right
    return values


def curve(layer: KANLinear | KANConv2d, vector: torch.Tensor, x: torch.Tensor, raw: torch.Tensor) -> torch.Tensor:
    """Value of one edge with the numbers ``vector`` [W]: basis at x, base term at ``raw``."""
    g = layer.basis.size
    scale = vector[-1] if layer.scale else 1.0
    y = sum(vector[i] * scale * layer.basis(x)[..., i] for i in range(g))
    return y + vector[g] * F.silu(raw) if layer.base else y


def linear(layer: KANLinear, x: torch.Tensor) -> torch.Tensor:
    """KANLinear edge by edge, [B, I] -> [B, O]."""
    vectors = layer.edges()
    inputs = x if layer.norm is None else layer.norm(x)
    y = torch.zeros(len(x), layer.out_features, dtype=x.dtype)
    for o in range(layer.out_features):
        for i in range(layer.in_features):
            y[:, o] = y[:, o] + curve(layer, vectors[o * layer.in_features + i], inputs[:, i], x[:, i])
    return y


def convolution(layer: KANConv2d, x: torch.Tensor) -> torch.Tensor:
    """KANConv2d pixel by pixel and edge by edge; outside the image an edge gives 0."""
    vectors = layer.edges()
    b, _, height, width = x.shape
    kh, kw = layer.kernel_size
    per_group = layer.in_channels // layer.groups
    out_h = (height + 2 * layer.padding - layer.dilation * (kh - 1) - 1) // layer.stride + 1
    out_w = (width + 2 * layer.padding - layer.dilation * (kw - 1) - 1) // layer.stride + 1
    y = torch.zeros(b, layer.out_channels, out_h, out_w, dtype=x.dtype)
    for o in range(layer.out_channels):
        group = o // (layer.out_channels // layer.groups)
        for i in range(per_group):
            for ky in range(kh):
                for kx in range(kw):
                    channel = x[:, group * per_group + i]
                    image = curve(layer, vectors[((o * per_group + i) * kh + ky) * kw + kx], channel, channel)
                    for row in range(out_h):
                        for column in range(out_w):
                            r = row * layer.stride - layer.padding + ky * layer.dilation
                            c = column * layer.stride - layer.padding + kx * layer.dilation
                            if 0 <= r < height and 0 <= c < width:
                                y[:, o, row, column] += image[:, r, c]
    return y
