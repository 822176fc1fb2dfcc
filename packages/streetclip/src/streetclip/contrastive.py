"""Pre-training on synthetic captions (Section 3): the text tower writes the weights of a classifier for each batch.

Within a batch of B photos v_i and captions x_j, both of norm 1, the logits are L = exp(τ) V Xᵀ. The loss is CLIP's,
½ [CE(L) + CE(Lᵀ)]. The paper reads its first half as meta-learning: h(v; X) = softmax(exp(τ) X v) is a linear
classifier of B classes whose weights X the text tower makes from captions, so each batch is a zero-shot task with
classes of its own; the second half is a loss of the photos' representation. Nothing is frozen, no gradient is
stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional as F

Encode = Callable[[Tensor], Tensor]


class Losses(NamedTuple):
    """Means over a batch, 0-d."""

    loss: Tensor
    classifier: Tensor
    """Photo to captions: the loss of the zero-shot classifier."""
    representation: Tensor
    """Caption to photos."""
    accuracy: Tensor
    """Share of photos whose own caption, or one equal to it, has the greatest logit."""


def logits(images: Tensor, texts: Tensor, log_scale: Tensor) -> Tensor:
    """exp(τ) V Xᵀ [B, N] of rows of norm 1: images [B, d], texts [N, d]."""
    return log_scale.exp() * images @ texts.T


def soft_targets(same: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Each photo's probability over captions [B, B]: shared among all equal to its own. ``same``: [B, B] bool."""
    return same.to(dtype) / same.sum(1, keepdim=True)


def contrastive_loss(
    images: Tensor, texts: Tensor, log_scale: Tensor, same: Tensor | None = None, *, soft: bool = False
) -> Losses:
    """CLIP's loss of a batch.

    With hard targets, captions that occur n_c times keep the loss of the classifier at or above
    (1/B) Σ_c n_c log n_c; with soft ones its excess over the targets' entropy can reach 0.

    Args:
        images: [B, d], norm 1.
        texts: [B, d], norm 1, in the same order.
        log_scale: τ, 0-d.
        same: [B, B] whether captions are equal; None: no two are.
        soft: targets are shared among equal captions; else each photo's own is its only one.
    """
    found = logits(images, texts, log_scale)
    own = torch.arange(len(images), device=images.device)
    same = torch.eye(len(images), dtype=torch.bool, device=images.device) if same is None else same
    targets = soft_targets(same, found.dtype) if soft else own
    classifier, representation = F.cross_entropy(found, targets), F.cross_entropy(found.T, targets)
    best = same.gather(1, found.argmax(1, keepdim=True))
    return Losses((classifier + representation) / 2, classifier, representation, best.float().mean())


def backward(
    pixels: Sequence[Tensor],
    ids: Sequence[Tensor],
    encode_images: Encode,
    encode_texts: Encode,
    log_scale: Tensor,
    accelerator: Accelerator,
    same: Tensor | None = None,
    *,
    soft: bool = False,
) -> Losses:
    """Accumulate in ``.grad`` this process's part of the gradient of :func:`contrastive_loss` on the whole batch.

    The sum over processes of what is accumulated is the gradient of one process with the whole batch: negatives are
    the captions and photos of all processes and of all micro-batches. More than one micro-batch is encoded twice
    (GradCache, Gao et al. 2021): first without a graph, to know ∂loss/∂features; then each with its graph, through
    which that is sent back.

    Args:
        pixels: micro-batches [b, 3, H, W] of this process; of every process the same number of photos in all.
        ids: token ids [b, T] of their captions.
        encode_images, encode_texts: to features of norm 1, [b, d]; without dropout.
        log_scale: τ, 0-d, a leaf.
        accelerator: of this process.
        same: [B, B] whether captions are equal, in the order of process, then of micro-batch.
        soft: as of :func:`contrastive_loss`.
    """
    single = len(pixels) == 1
    with torch.set_grad_enabled(single):
        images = [encode_images(one) for one in pixels]
        texts = [encode_texts(one) for one in ids]
    here = [torch.cat(features).detach() for features in (images, texts)]
    whole = [_gathered(features, accelerator).requires_grad_() for features in here]
    scale = log_scale.detach().requires_grad_()
    found = contrastive_loss(whole[0], whole[1], scale, same, soft=soft)
    gradients = torch.autograd.grad(found.loss, [*whole, scale])
    rank, count = accelerator.process_index, len(here[0])
    mine = [gradient[rank * count : (rank + 1) * count] for gradient in gradients[:2]]
    if rank == 0 and log_scale.requires_grad:  # once, as the sum over processes is taken
        log_scale.grad = gradients[2] if log_scale.grad is None else log_scale.grad + gradients[2]
    sizes = [len(one) for one in pixels]
    for inputs, features, encode, gradient in (
        (pixels, images, encode_images, mine[0]),
        (ids, texts, encode_texts, mine[1]),
    ):
        for one, kept, part in zip(inputs, features, gradient.split(sizes), strict=True):
            with_graph = kept if single else encode(one)
            if with_graph.requires_grad:  # a frozen tower has none
                with_graph.backward(part)
    return Losses(*(value.detach() for value in found))


def _gathered(features: Tensor, accelerator: Accelerator) -> Tensor:
    """Those of all processes, in their order."""
    if accelerator.num_processes == 1:
        return features.clone()
    gathered = accelerator.gather(features.contiguous())
    assert isinstance(gathered, Tensor)
    return gathered.clone()
