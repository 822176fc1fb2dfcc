"""Learning to re-weight pseudo-labels (LiST, section on meta re-weighting; Ren et al. 2018), and the session's losses.

A pseudo-labelled example i is worth what a small step on it does for a batch of true labels:

    ψ̂(ε) = ψ − α ∇_ψ Σ_i ε_i ℓ_i(ψ),    u_i = max(−∂L_meta(ψ̂(ε))/∂ε_i |_{ε=0}, 0),    w_i = u_i / Σ_j u_j.

At ε = 0 the chain rule gives −∂L_meta/∂ε_i = α ⟨∇_ψ L_meta, ∇_ψ ℓ_i⟩: no graph of the inner step is needed. One
backward gives g = ∇L_meta, and one forward-mode product in direction g gives all ⟨g, ∇ℓ_i⟩ at once (:func:`by_jvp`).
The other two forms compute the same: :func:`by_differences` with two passes and no derivative, :func:`by_inner_step` as
the paper's code does, backward through the step. α cancels in w and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

Parameters = Mapping[str, Tensor]
Losses = Callable[[Parameters], Tensor]
"""Parameters -> losses; [B] of single examples, or [] of a batch."""


def distillation(logits: Tensor, targets: Tensor) -> Tensor:
    """ℓ_i = KL(q_i ‖ p_i), summed over classes and not reduced (step 3b); the cross-entropy where q is a decision.

    Args:
        logits: of the student, [B, C]. targets: q, the teacher's probabilities or one-hot decisions, [B, C].

    Returns:
        [B]; no gradient flows into ``targets``.
    """
    logits = _full(logits)
    return F.kl_div(logits.log_softmax(-1), targets.detach().to(logits), reduction="none").sum(-1)


def pseudo_labels(logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """q = softmax(teacher's logits / temperature) (step 3a); [N, C]."""
    return (_full(logits) / temperature).softmax(-1)


def decided(probabilities: Tensor) -> Tensor:
    """Hard pseudo-labels: the argmax as one-hot; [N, C]."""
    return F.one_hot(probabilities.argmax(-1), probabilities.shape[-1]).to(probabilities)


def confident(targets: Tensor, threshold: float) -> Tensor:
    """w_i = 1[max q_i > c] / their number (step 3c), 0 where none is; [B]. With c = 0 the mean."""
    chosen = (targets.max(-1).values > threshold).to(targets)
    return chosen / chosen.sum().clamp(min=1)


def normalised(products: Tensor, total: Tensor | None = None) -> Tensor:
    """w = u / Σ u with u = max(⟨g, ∇ℓ⟩, 0); all 0 where no example helps. [B].

    The paper's code adds 1e-6 to the sum, which is not small beside α ⟨g, ∇ℓ⟩ with its α of 5e-6; here the weights do
    not depend on the scale of the loss.

    Args:
        products: ⟨g, ∇ℓ_i⟩ up to a positive factor, [B]. total: Σ u over all processes [default: over these].
    """
    useful = products.clamp(min=0)
    total = useful.sum() if total is None else total
    return torch.where(total > 0, useful / torch.where(total > 0, total, torch.ones_like(total)), 0.0)


def by_jvp(parameters: Parameters, meta_loss: Losses, example_losses: Losses) -> Tensor:
    """⟨∇L_meta, ∇ℓ_i⟩ by one backward and one forward-mode product; [B]."""
    gradient = _gradient(parameters, meta_loss)
    return along(parameters, gradient, example_losses)


def along(parameters: Parameters, direction: Parameters, example_losses: Losses) -> Tensor:
    """Derivative of every ℓ_i in ``direction``, d/dδ ℓ_i(ψ + δ·direction) at δ = 0, by forward mode; [B]."""
    primal = {name: value.detach() for name, value in parameters.items()}
    with torch.no_grad():
        _, products = torch.func.jvp(example_losses, (primal,), (dict(direction),))
    return products.detach()


def by_differences(
    parameters: Parameters, meta_loss: Losses, example_losses: Losses, step: float | None = None
) -> Tensor:
    """⟨∇L_meta, ∇ℓ_i⟩ ≈ (ℓ_i(ψ + δg) − ℓ_i(ψ − δg)) / 2δ by two passes without gradient; [B].

    Args:
        step: δ‖g‖, the distance moved in all [default: a quarter of the cube root of the precision].
    """
    gradient = _gradient(parameters, meta_loss)
    return differences(parameters, gradient, example_losses, step)


def differences(
    parameters: Parameters, direction: Parameters, example_losses: Losses, step: float | None = None
) -> Tensor:
    """:func:`along` by central differences; [B]."""
    norm = _norm(direction) or 1.0  # of a gradient that is 0 all products are 0
    if step is None:
        some = next(iter(parameters.values()))
        step = float(torch.finfo(some.dtype).eps ** (1 / 3)) / 4
    delta = step / norm
    with torch.no_grad():
        ahead = example_losses({name: value + delta * direction[name] for name, value in parameters.items()})
        behind = example_losses({name: value - delta * direction[name] for name, value in parameters.items()})
    return (ahead - behind) / (2 * delta)


def by_inner_step(parameters: Parameters, meta_loss: Losses, example_losses: Losses, rate: float = 1.0) -> Tensor:
    """−∂L_meta/∂ε_i at ε = 0, backward through the inner step ψ̂(ε) = ψ − α ∇ Σ ε_i ℓ_i; α = ``rate``; [B].

    The form of the paper's code (there by the library higher): a graph of second order over the whole batch.
    """
    inner = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    losses = example_losses(inner)
    epsilon = torch.zeros_like(losses, requires_grad=True)
    values = list(inner.values())
    gradients = torch.autograd.grad((epsilon * losses).sum(), values, create_graph=True, materialize_grads=True)
    moved = {name: value - rate * g for (name, value), g in zip(inner.items(), gradients, strict=True)}
    (found,) = torch.autograd.grad(meta_loss(moved), epsilon)
    return -found


FORMS = {"jvp": by_jvp, "finite": by_differences, "double": by_inner_step}


def _gradient(parameters: Parameters, loss: Losses) -> dict[str, Tensor]:
    """∇ loss, zeros where a parameter takes no part."""
    leaves = {name: value.detach().requires_grad_() for name, value in parameters.items()}
    with torch.enable_grad():
        found = torch.autograd.grad(loss(leaves), list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _norm(values: Parameters) -> float:
    return float(torch.stack([value.detach().double().square().sum() for value in values.values()]).sum().sqrt())


class MetaReweighter:
    """Weights of pseudo-labelled batches by a classifier's gradient on labelled ones.

    Args:
        model: logits = model(**inputs), [B, C]; in evaluation mode while weights are computed (no dropout), and put
        back.
            Where it has ``differentiable()``, its passes run inside.
        labelled: batches (inputs, labels [b]) that are taken in turn, again from the start when they are used up.
        form: "jvp", "finite" or "double" (see the module). batches: labelled batches summed for one set of weights.
    """

    def __init__(
        self, model: nn.Module, labelled: Sequence[tuple[Mapping[str, Tensor], Tensor]], *, form: str = "jvp",
        batches: int = 1,
    ) -> None:  # fmt: skip
        self.model, self.labelled, self.form, self.batches = model, labelled, form, batches
        self._next = 0

    def weights(self, inputs: Mapping[str, Tensor], targets: Tensor) -> Tensor:
        """w [B] of pseudo-labelled examples: inputs of the model, and targets q [B, C]; non-negative, sum 1 or 0."""
        batch = [self.labelled[(self._next + i) % len(self.labelled)] for i in range(self.batches)]
        self._next = (self._next + self.batches) % len(self.labelled)
        return normalised(products(self.model, batch, inputs, targets, self.form))


def products(
    model: nn.Module, labelled: Sequence[tuple[Mapping[str, Tensor], Tensor]], inputs: Mapping[str, Tensor],
    targets: Tensor, form: str = "jvp",
) -> Tensor:  # fmt: skip
    """⟨∇L_meta, ∇ℓ_i⟩ of each pseudo-labelled example, summed over the labelled batches; [B].

    L_meta is the mean cross-entropy of a labelled batch. Model, inputs and forms: as :class:`MetaReweighter` has them.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def example_losses(values: Parameters) -> Tensor:
        return distillation(functional_call(model, dict(values), kwargs=dict(inputs)), targets)

    def meta_loss(values: Parameters) -> Tensor:
        losses = [
            F.cross_entropy(_full(functional_call(model, dict(values), kwargs=dict(batch))), labels)
            for batch, labels in labelled
        ]
        return torch.stack(losses).sum()

    training = model.training
    model.eval()
    try:
        if form == "finite":
            return by_differences(parameters, meta_loss, example_losses)
        differentiable: Callable[[], AbstractContextManager[Any]] | None = getattr(model, "differentiable", None)
        if differentiable is None:
            return FORMS[form](parameters, meta_loss, example_losses)
        if form == "jvp":  # the backward needs none of it
            gradient = _gradient(parameters, meta_loss)
            with differentiable():
                return along(parameters, gradient, example_losses)
        with differentiable():
            return FORMS[form](parameters, meta_loss, example_losses)
    finally:
        model.train(training)


def _full(logits: Tensor) -> Tensor:
    """Half precision to single; double stays."""
    return logits if logits.dtype == torch.float64 else logits.float()
