"""Cross-batch meta-optimisation (Section 3.2): a step on one batch is judged on the next.

    θ′ = θ − α ∇L^S(θ)                                   inner step, on the support batch S
    g  = ∇L^S(θ) + δ ∇L^Q(θ′)                            what the optimizer gets, Q being the query batch

First order, the query's gradient is taken at θ′ and applied at θ. To first order in α it is g_Q − α H_Q g_S: beside
both losses, agreement ⟨g_S, g_Q⟩ of the batches' gradients is rewarded. With α = 0 it is training on S and Q at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from metazoo import inner
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Loss = Callable[[Any], Tensor]
Reduce = Callable[[Sequence[Tensor]], None]


@dataclass(frozen=True)
class Step:
    """What a step saw, all 0-d and detached.

    Attributes:
        support_loss: L^S(θ).
        query_loss: L^Q(θ′); L^S(θ) where the query is not looked at.
        cosine: of ∇L^S(θ) and ∇L^Q(θ′); 0 where it is not.
    """

    support_loss: Tensor
    query_loss: Tensor
    cosine: Tensor


def cross_batch_step(
    module: nn.Module, loss: Loss, support: Any, query: Any, *, alpha: float, delta: float = 1.0,
    first_order: bool = True, reduce: Reduce | None = None,
) -> Step:  # fmt: skip
    """Put g into ``.grad`` of the trainable parameters: an optimizer's step is to follow.

    First order works in place: the parameters are moved to θ′ for the query's backward pass, and put back exactly. It
    costs two forward and two backward passes, as training on both batches does, and a copy of parameters and gradient.

    Args:
        module: θ, its parameters that require a gradient; what these hold in ``.grad`` is replaced.
        loss: ``loss(batch)``, a scalar of the module as it stands; of a process's share where ``reduce`` adds shares.
        support, query: S and Q; a list is of micro-batches, whose losses add up.
        alpha: rate of the inner step; 0: both gradients are taken at θ.
        delta: weight of the query's gradient; 0: the query is not looked at.
        first_order: leave the Hessian out (FOMAML), or differentiate through the inner step; then without checkpointing
            of activations, which would be computed again at other weights.
        reduce: adds gradients of all processes in place, so that θ′ is the same in each (first order only).

    Raises:
        ValueError: a negative alpha or delta, no trainable parameter, or second order with ``reduce``.
    """
    if alpha < 0 or delta < 0:
        raise ValueError(f"alpha is {alpha}, delta {delta}: give 0 or more")
    named = {name: value for name, value in module.named_parameters() if value.requires_grad}
    if not named:
        raise ValueError("no parameter requires a gradient: nothing to train")
    parameters = list(named.values())
    if not first_order:
        if reduce is not None:
            raise ValueError("first_order=False is for one process: leave reduce out")
        return _second_order(module, loss, support, query, named, alpha, delta)
    support_loss, support_gradient = gradient_of(loss, support, parameters, reduce)
    if delta == 0:
        return _give(parameters, support_gradient, support_loss, support_loss, support_loss.new_tensor(0.0))
    if alpha:
        # θ comes back from a copy, as adding what was taken away is not exact
        before = [value.detach().clone() for value in parameters]
        with torch.no_grad():
            torch._foreach_add_(parameters, support_gradient, alpha=-alpha)
    try:
        query_loss, query_gradient = gradient_of(loss, query, parameters, reduce)
    finally:
        if alpha:
            with torch.no_grad():
                torch._foreach_copy_(parameters, before)
    angle = cosine(support_gradient, query_gradient)
    torch._foreach_add_(support_gradient, query_gradient, alpha=delta)
    return _give(parameters, support_gradient, support_loss, query_loss, angle)


def gradient_of(
    loss: Loss, batch: Any, parameters: Sequence[nn.Parameter], reduce: Reduce | None
) -> tuple[Tensor, list[Tensor]]:
    total, gradient = parameters[0].new_zeros(()), None
    for part in _parts(batch):
        with torch.enable_grad():
            value = loss(part)
            found = torch.autograd.grad(value, parameters, allow_unused=True)
        total = total + value.detach()
        grads = [torch.zeros_like(one) if got is None else got for one, got in zip(parameters, found, strict=True)]
        if gradient is None:
            gradient = grads
        else:
            torch._foreach_add_(gradient, grads)
    if gradient is None:  # an empty list: this process has no share
        gradient = [torch.zeros_like(one) for one in parameters]
    if reduce is not None:
        reduce([total, *gradient])
    return total, gradient


def _parts(batch: Any) -> list[Any]:
    return batch if isinstance(batch, list) else [batch]


def _give(
    parameters: Sequence[nn.Parameter], gradient: Sequence[Tensor], support: Tensor, query: Tensor, angle: Tensor
) -> Step:
    for parameter, one in zip(parameters, gradient, strict=True):
        parameter.grad = one
    return Step(support, query, angle)


class _At(nn.Module):
    """``loss`` as a module, for its parameters to be called with others in their place."""

    def __init__(self, module: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.module, self.loss = module, loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(batch)


def _second_order(
    module: nn.Module, loss: Loss, support: Any, query: Any, named: dict[str, nn.Parameter], alpha: float, delta: float
) -> Step:
    """∇_θ [L^S(θ) + δ L^Q(θ − α∇L^S(θ))], through the inner step."""
    at = _At(module, loss)

    def of(params: inner.Params, batch: Any) -> Tensor:
        moved = {f"module.{name}": one for name, one in params.items()}
        return torch.stack([inner.call(at, moved, part) for part in _parts(batch)]).sum()

    theta = {name: value.detach().requires_grad_() for name, value in named.items()}
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        adapted = inner.adapt(of, theta, [support], alpha)
        query_loss = of(adapted.params, query)
        found = torch.autograd.grad(query_loss, list(theta.values()), allow_unused=True)
    first = [adapted.gradient[name] for name in theta]
    second = [torch.zeros_like(a) if b is None else b for a, b in zip(first, found, strict=True)]
    angle = cosine(first, second)
    gradient = [a + delta * b for a, b in zip(first, second, strict=True)]
    return _give(list(named.values()), gradient, adapted.losses[0], query_loss.detach(), angle)


def cosine(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Of two gradients, each a list of tensors, 0-d; 0 where one vanishes."""
    both = sum(((a * b).sum() for a, b in zip(one, other, strict=True)), start=one[0].new_tensor(0.0))
    lengths = torch.stack([torch.stack(torch._foreach_norm(list(side))).norm() for side in (one, other)]).prod()
    return torch.where(lengths > 0, both / lengths.clamp_min(1e-30), both.new_tensor(0.0))


@dataclass(frozen=True)
class Virtual:
    """What an inner step would do, all 0-d and detached.

    Attributes:
        gain: L^Q(θ − α g_S) − L^Q(θ); below 0 where the step on S helps on Q.
        cosine: of g_S and g_Q, both at θ.
        query_loss: L^Q(θ).
    """

    gain: Tensor
    cosine: Tensor
    query_loss: Tensor


def virtual_step(
    module: nn.Module, loss: Loss, support: Any, query: Any, *, alpha: float, reduce: Reduce | None = None
) -> Virtual:
    """Measure an inner step that is not taken; parameters and their ``.grad`` stay as they are."""
    parameters = [value for value in module.parameters() if value.requires_grad]
    _, of_support = gradient_of(loss, support, parameters, reduce)
    query_loss, of_query = gradient_of(loss, query, parameters, reduce)
    before = [value.detach().clone() for value in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, of_support, alpha=-alpha)
        try:
            after = sum((loss(part) for part in _parts(query)), start=query_loss.new_zeros(()))
        finally:
            torch._foreach_copy_(parameters, before)
    if reduce is not None:
        reduce([after])
    return Virtual(after - query_loss, cosine(of_support, of_query), query_loss)
