"""The inner loop of gradient-based meta-learning, differentiable: φ_{u+1} = φ_u − α ∇_φ ℓ(φ_u; D_u).

Everything is a function of a dictionary of tensors (Finn et al. 2017, MAML): a loss is ``loss(params, batch)``, a
module becomes one with :func:`call`, and :func:`adapt` takes gradient steps on it. What is adapted is what has a rate:
parameters without one stay as they are and still get an outer gradient (ANIL, meta-parameters of a learned loss).

Two ways to the same numbers. Plain (``functional=False``) takes gradients by ``torch.autograd`` and keeps no graph that
nobody needs: the choice for large models, one task after another. ``functional=True`` uses ``torch.func`` and may stand
below ``torch.func.vmap`` and ``torch.func.grad``: the choice for small models, a whole meta-batch at once
(:func:`over_tasks`), where every operation of the model can be vectorised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

Params = dict[str, Tensor]
Loss = Callable[[Params, Any], Tensor]
Rates = float | Tensor | Mapping[str, Tensor]


class Adapted(NamedTuple):
    """What an inner loop came to.

    Attributes:
        params: φ_U, differentiable with respect to θ and the rates.
        losses: ℓ(φ_u; D_u) before each step, [U], detached.
        gradient: ∇ℓ(θ; D_0) of the first step, detached; empty where there was none.
    """

    params: Params
    losses: Tensor
    gradient: Params


def parameters(module: nn.Module) -> Params:
    """The trainable parameters by name, detached: they share memory with the module's."""
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def call(module: nn.Module, params: Params, *args: Any, **kwargs: Any) -> Any:
    """The module's output with ``params`` in place of its parameters of these names; others and buffers are its own."""
    return functional_call(module, params, args, kwargs)


def gradient(
    function: Callable[[Params], tuple[Tensor, Any]],
    params: Params,
    *,
    functional: bool = False,
    create_graph: bool = False,
) -> tuple[Params, Tensor, Any]:
    """Gradient of ``function``, its value and what else it returns.

    Args:
        function: gives (scalar, tensors in any nesting); the second is not differentiated.
        params: where; parameters that the value does not depend on have gradient zero.
        functional: by torch.func, as under vmap; else by torch.autograd.
        create_graph: the gradient can be differentiated again. (By torch.func it always can.)
    """
    if functional:
        grads, (value, extra) = grad_and_value(function, has_aux=True)(params)
        return grads, value, extra
    if create_graph:  # what is differentiable already stays connected
        leaves = {name: value if value.requires_grad else _leaf(value) for name, value in params.items()}
    else:
        leaves = {name: _leaf(value) for name, value in params.items()}
    with torch.enable_grad():
        value, extra = function(leaves)
        if not value.requires_grad:  # depends on none of them
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}, value, extra
        found = torch.autograd.grad(value, list(leaves.values()), create_graph=create_graph, allow_unused=True)
    grads = {
        name: torch.zeros_like(leaf) if one is None else one
        for (name, leaf), one in zip(leaves.items(), found, strict=True)
    }
    return grads, value if create_graph else value.detach(), extra


def adapt(
    loss: Loss,
    params: Params,
    batches: Sequence[Any],
    rates: Rates,
    *,
    first_order: bool = False,
    checkpoint: bool = False,
    functional: bool = False,
) -> Adapted:
    """Gradient steps from ``params``, one for each of ``batches`` (the same one U times for U steps on a support set).

    Args:
        loss: ``loss(params, batch)``, a scalar, the same whenever it is called (dropout off, or its mask in the batch).
        params: θ. Tensors that require a gradient get one through φ_U.
        batches: D_0 … D_{U−1}; none: φ_0 = θ.
        rates: α, a number or tensor for all parameters, or a mapping from names to tensors that broadcast to them;
            those without a rate are not adapted. Tensors that require a gradient get one (Meta-SGD).
        first_order: the inner gradient is a constant to the outer one, so that dL/dθ = ∇L(φ_U) (FOMAML).
        checkpoint: second order in the memory of one step: steps are computed again in the backward pass. Gradients
            reach params and rates only, not tensors that ``loss`` takes from elsewhere.
        functional: below torch.func.vmap or torch.func.grad.

    Raises:
        ValueError: checkpoint together with functional or first_order, or a rate for a name that is no parameter.
    """
    if checkpoint and (functional or first_order):
        raise ValueError("checkpoint=True is for second order without functional=True: leave one of them out")
    by_name = dict(rates) if isinstance(rates, Mapping) else dict.fromkeys(params, rates)
    if unknown := set(by_name) - set(params):
        raise ValueError(f"rates for {sorted(unknown)[0]!r}, which is no parameter: name one of {list(params)[:3]} …")
    current, losses, first = dict(params), [], {}
    for number, batch in enumerate(batches):
        if checkpoint:
            current, value, grads = _checkpointed(loss, current, batch, by_name)
        else:
            current, value, grads = _step(loss, current, batch, by_name, first_order, functional)
        losses.append(value.detach())
        if number == 0:
            first = {name: value.detach() for name, value in grads.items()}
    return Adapted(current, torch.stack(losses) if losses else torch.zeros(0), first)


def _step(
    loss: Loss, params: Params, batch: Any, rates: Mapping[str, Any], first_order: bool, functional: bool
) -> tuple[Params, Tensor, Params]:
    """φ − α ∇ℓ(φ), ℓ(φ), and the gradient of what has a rate."""
    moving = {name: params[name] for name in rates}
    still = {name: value for name, value in params.items() if name not in rates}
    if first_order:
        moving = {name: value.detach() for name, value in moving.items()}
        still = {name: value.detach() for name, value in still.items()}

    def of(some: Params) -> tuple[Tensor, tuple[()]]:
        return loss({**still, **some}, batch), ()

    grads, value, _ = gradient(of, moving, functional=functional, create_graph=not first_order)
    stepped = {name: params[name] - rates[name] * grads[name] for name in rates}
    return {**params, **stepped}, value, grads


class _Checkpointed(torch.autograd.Function):
    """A step that keeps its inputs only, and is computed again for its gradient."""

    @staticmethod
    def forward(ctx: Any, step: Any, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step = step
        ctx.save_for_backward(*tensors)
        with torch.no_grad():
            return tuple(step([tensor.detach() for tensor in tensors], keep=False))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        leaves = [_leaf(tensor) for tensor in ctx.saved_tensors]
        with torch.enable_grad():
            outputs = ctx.step(leaves, keep=True)
            pairs = [(out, cotangent) for out, cotangent in zip(outputs, cotangents, strict=True) if out.requires_grad]
            found = torch.autograd.grad(
                [out for out, _ in pairs], leaves, [cotangent for _, cotangent in pairs], allow_unused=True
            )
        return (None, *found)


def _checkpointed(loss: Loss, params: Params, batch: Any, rates: Mapping[str, Any]) -> tuple[Params, Tensor, Params]:
    names, learned = list(params), [name for name, rate in rates.items() if isinstance(rate, Tensor)]
    shared = learned and all(rates[name] is rates[learned[0]] for name in learned)  # one tensor for all
    if shared:
        learned = learned[:1]
    seen: list[tuple[Tensor, Params]] = []

    def step(tensors: Sequence[Tensor], keep: bool) -> list[Tensor]:
        given = dict(zip(names, tensors[: len(names)], strict=True))
        found = dict(zip(learned, tensors[len(names) :], strict=True))
        by_name = {name: found.get(learned[0] if shared else name, rate) for name, rate in rates.items()}
        stepped, value, grads = _step(loss, given, batch, by_name, not keep, False)
        if not keep:
            seen.append((value, grads))
        return [stepped[name] for name in names]

    stepped = _Checkpointed.apply(step, *params.values(), *(rates[name] for name in learned))
    value, grads = seen[0]
    return dict(zip(names, stepped, strict=True)), value, grads


def over_tasks(function: Callable[..., Any], in_dims: Any, *args: Any, chunk: int | None = None) -> Any:
    """``function`` of every task of a meta-batch at once (torch.func.vmap); results have the tasks first.

    Args:
        function: of one task; inner loops in it need ``functional=True``.
        in_dims: 0 for arguments (or parts of them) that hold all tasks in their first dimension, None for shared ones.
        chunk: tasks at a time [default: all].
    """
    return vmap(function, in_dims=in_dims, chunk_size=chunk)(*args)


def distance(one: Params, other: Params) -> Tensor:
    """‖φ − θ‖ over all parameters: near zero, the inner loop does nothing and MAML is plain fine-tuning."""
    squares = [(one[name].detach() - other[name].detach()).square().sum() for name in one]
    return torch.stack(squares).sum().sqrt()


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()
