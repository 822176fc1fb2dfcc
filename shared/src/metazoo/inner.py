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
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_map_only

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
    """The module's output with ``params`` in place of its parameters of these names; others and buffers are its own.

    Raises:
        ValueError: a name that the module does not have: its own parameter would be used, and nothing adapted.
    """
    unknown = params.keys() - {name for name, _ in module.named_parameters(remove_duplicate=False)}
    if unknown and (unknown := unknown - {name for name, _ in module.named_buffers(remove_duplicate=False)}):
        raise ValueError(f"{type(module).__name__} has no parameter {min(unknown)!r}: give names of named_parameters()")
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

    Raises:
        ValueError: below a transform of torch.func without ``functional=True``.
    """
    if functional:
        grads, (value, extra) = grad_and_value(function, has_aux=True)(params)
        return grads, value, extra
    _above_transforms()
    with torch.enable_grad():
        views = {name: _own(tensor, create_graph) for name, tensor in params.items()}
        value, extra = function(views)
        found: Sequence[Tensor | None] = [None] * len(views)
        if views and value.requires_grad:  # depends on something
            found = torch.autograd.grad(value, list(views.values()), create_graph=create_graph, allow_unused=True)
    grads = {
        name: torch.zeros_like(view) if one is None else one
        for (name, view), one in zip(views.items(), found, strict=True)
    }
    if not create_graph:
        value, extra = value.detach(), tree_map_only(Tensor, Tensor.detach, extra)
    return grads, value, extra


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
            reach params and rates only, not batches or tensors that ``loss`` takes from elsewhere.
        functional: below torch.func.vmap or torch.func.grad.

    Second order keeps its graph, as ``loss`` may hold more that wants a gradient; under ``torch.no_grad()``, as for
    evaluation, it keeps none.

    Raises:
        ValueError: checkpoint together with functional or first_order, a rate for a name that is no parameter, or
            below a transform of torch.func without ``functional``.
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
        del grads  # as large as the parameters: not to be there in the next step
    if not losses:
        device = next((value.device for value in params.values()), None)
        return Adapted(current, torch.zeros(0, device=device), first)
    return Adapted(current, torch.stack(losses), first)


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

    again = not first_order and torch.is_grad_enabled()
    grads, value, _ = gradient(of, moving, functional=functional, create_graph=again)
    if first_order:  # by torch.func it depends on what else the loss holds
        grads = {name: one.detach() for name, one in grads.items()}
    stepped = {name: params[name] - rates[name] * grads[name] for name in rates}
    return {**params, **stepped}, value, grads


class _Checkpointed(torch.autograd.Function):
    """A step that keeps its inputs only, and is computed again for its gradient: of its first ``moved`` outputs."""

    @staticmethod
    def forward(ctx: Any, step: Any, moved: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.step, ctx.moved = step, moved
        ctx.autocast = [
            {
                "device_type": device,
                "enabled": torch.is_autocast_enabled(device),
                "dtype": torch.get_autocast_dtype(device),
                "cache_enabled": torch.is_autocast_cache_enabled(),
            }
            for device in sorted({"cpu", *(tensor.device.type for tensor in tensors)})
            if torch.amp.is_autocast_available(device)
        ]
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        outputs: tuple[Tensor, ...] = step([tensor.detach() for tensor in tensors])
        ctx.mark_non_differentiable(*outputs[moved:])
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        again = torch.is_grad_enabled()  # this gradient will be differentiated, too
        needed = ctx.needs_input_grad[2:]
        with ExitStack() as stack:
            stack.enter_context(torch.enable_grad())
            for state in ctx.autocast:
                stack.enter_context(torch.autocast(**state))
            inputs = [
                _own(tensor, again) if wanted else tensor
                for tensor, wanted in zip(ctx.saved_tensors, needed, strict=True)
            ]
            outputs = ctx.step(inputs)
        pairs = [
            (output, cotangent)
            for output, cotangent in zip(outputs[: ctx.moved], cotangents[: ctx.moved], strict=True)
            if cotangent is not None and output.requires_grad
        ]
        found = iter(
            torch.autograd.grad(
                [output for output, _ in pairs],
                [tensor for tensor, wanted in zip(inputs, needed, strict=True) if wanted],
                [cotangent for _, cotangent in pairs],
                create_graph=again,
                allow_unused=True,
            )
        )
        return (None, None, *(next(found) if wanted else None for wanted in needed))


def _checkpointed(loss: Loss, params: Params, batch: Any, rates: Mapping[str, Any]) -> tuple[Params, Tensor, Params]:
    _above_transforms()
    names = list(params)
    learned = {id(rate): rate for rate in rates.values() if isinstance(rate, Tensor)}  # one tensor for all is one

    def step(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        given = dict(zip(names, tensors[: len(names)], strict=True))
        found = dict(zip(learned, tensors[len(names) :], strict=True))
        by_name = {name: found.get(id(rate), rate) for name, rate in rates.items()}
        stepped, value, grads = _step(loss, given, batch, by_name, False, False)
        return (*(stepped[name] for name in rates), value.detach(), *(one.detach() for one in grads.values()))

    apply: Callable[..., tuple[Tensor, ...]] = _Checkpointed.apply
    outputs = apply(step, len(rates), *params.values(), *learned.values())
    stepped = dict(zip(rates, outputs, strict=False))
    return {**params, **stepped}, outputs[len(rates)], dict(zip(rates, outputs[len(rates) + 1 :], strict=True))


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


def _above_transforms() -> None:
    """Below vmap, torch.autograd may take what it should differentiate for constants."""
    if torch._C._are_functorch_transforms_active():
        raise ValueError("functional=False below a transform of torch.func: give functional=True")


def _own(tensor: Tensor, connected: bool) -> Tensor:
    """A view to differentiate by, connected to what the tensor was computed from or not.

    Not the tensor itself: it may have two names, or another may be computed from it, and these would share in its
    gradient; and autocast would keep its cast, and by that the graph, as it does of leaves.
    """
    leaf = tensor if connected and tensor.requires_grad else tensor.detach().requires_grad_()
    return leaf.view_as(leaf)
