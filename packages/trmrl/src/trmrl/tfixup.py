"""T-Fixup (Huang et al. 2020): a transformer without LayerNorm trains from the first step on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

Mode = Literal["tfixup", "tfixup-original", "xavier"]


@torch.no_grad()
def tfixup_init_(
    encoder: nn.ModuleList, embedding: nn.Linear, n_layers: int, mode: Mode = "tfixup",
    generator: torch.Generator | None = None,
) -> None:  # fmt: skip
    """Initialise a transformer of N layers and width d in place.

    All matrices of the encoder are Xavier-uniform first. Then, with c = 0.67 N^(−1/4):

    - tfixup (the paper's code): output projection and feed-forward matrices × c, the fused matrix of queries, keys and
      values × c√2 (√2 undoes the smaller Xavier bound of a 3d × d matrix: variance 1/d instead of 1/(2d));
    - tfixup-original (T-Fixup's own): the same, but queries and keys stay as they are;
    - xavier: nothing more, and the embedding stays as it is.

    With T-Fixup the embedding is N(0, 1/d) × (9N)^(−1/4). Biases are untouched.

    Args:
        encoder: layers with `in_proj` (3d × d), `out_proj`, `linear1`, `linear2`.
        embedding: of working memories, d × D.
        n_layers: N.
        mode: which.
        generator: of the draws.
    """
    scale = 0.67 * n_layers**-0.25
    for layer in encoder:
        for name in ("in_proj", "out_proj", "linear1", "linear2"):
            weight = getattr(layer, name).weight
            nn.init.xavier_uniform_(weight, generator=generator)
            if mode == "xavier":
                continue
            if name != "in_proj":
                weight.mul_(scale)
            elif mode == "tfixup":
                weight.mul_(scale * 2**0.5)
            else:
                weight[-len(weight) // 3 :].mul_(scale * 2**0.5)
    if mode != "xavier":
        width = embedding.out_features
        nn.init.normal_(embedding.weight, 0.0, width**-0.5, generator=generator)
        embedding.weight.mul_((9 * n_layers) ** -0.25)
