"""MAML-Align: the monolingual-to-bilingual teacher's loss is aligned with the bilingual-to-multilingual student's.

For a task τ with sets S_mono, Q_bi, Q_multi, teacher and student being the same θ in two inner loops:

    φ_T = θ after U steps on S_mono          L_T = ℓ(φ_T; Q_bi)
    φ_S = θ after U_S steps on Q_bi          L_S = ℓ(θ; Q_bi)        (the student's support is the teacher's query)
    L = Σ_τ [ℓ(φ_T; Q_bi) + ℓ(φ_S; Q_multi)] / 2n + λ (Σ_τ L_T − Σ_τ L_S)²

(Section 3 and the diagram "T-MAML2T-MAML" of the official repository.) The alignment couples the tasks of a batch, so a
task gives two gradients, and the sums decide how they are weighed: see :func:`combine`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from metazoo import inner
from metazoo.inner import Params
from torch import Tensor

from maml_align.model import Encoder

RATE = "rate:"  # a learned inner rate goes among the parameters under this and the parameter's name


def similarity_loss(encoder: Encoder) -> inner.Loss:
    """Symmetric search: mean over pairs of (cos(h(s1), h(s2)) − score)², scores scaled to 0..1.

    A batch holds tokens of 2k sentences (first all s1, then all s2), scores [k] and weight [k] (0: filled up).
    """

    def loss(params: Params, batch: Mapping[str, Any]) -> Tensor:
        one, two = encoder.embed(params, batch["tokens"]).chunk(2)
        error = ((one * two).sum(-1) - batch["scores"]).square()
        return (batch["weight"] * error).sum() / batch["weight"].sum()

    return loss


def triplet_loss(encoder: Encoder, margin: float = 1.0) -> inner.Loss:
    """Asymmetric search: mean over triplets of max(0, margin + ‖q − a‖₂ − ‖q − n‖₂), on unit vectors.

    A batch holds tokens of questions and of candidates, positives and negatives: triplets [t] as rows of ``question``,
    ``positive``, ``negative``, and weight [t] (0: filled up).
    """

    def loss(params: Params, batch: Mapping[str, Any]) -> Tensor:
        questions = encoder.embed(params, batch["questions"])
        candidates = encoder.embed(params, batch["candidates"])
        question = questions[batch["question"]]
        near = F.pairwise_distance(question, candidates[batch["positive"]])
        far = F.pairwise_distance(question, candidates[batch["negative"]])
        each = F.relu(margin + near - far)
        return (batch["weight"] * each).sum() / batch["weight"].sum()

    return loss


class Inner(NamedTuple):
    """How an inner loop runs."""

    steps: int
    rate: float
    first_order: bool = True
    checkpoint: bool = False
    functional: bool = False


class Outer(NamedTuple):
    """Of one inner loop: ∇_θ ℓ(φ(θ); Q), ℓ(φ; Q), support losses [U], ∇ℓ(θ; S) where U > 0, and ‖φ − θ‖."""

    gradient: Params
    loss: Tensor
    support_losses: Tensor
    support_gradient: Params
    distance: Tensor


def outer(loss: inner.Loss, theta: Params, support: Any, query: Any, loop: Inner) -> Outer:
    """Inner steps on the support set, and the query loss's gradient with respect to θ (and to learned rates)."""

    def objective(given: Params) -> tuple[Tensor, tuple[Any, ...]]:
        params, rates = split(given, loop.rate)
        adapted = inner.adapt(
            loss, params, [support] * loop.steps, rates, first_order=loop.first_order, checkpoint=loop.checkpoint,
            functional=loop.functional,
        )  # fmt: skip
        moved = inner.distance(adapted.params, params)
        return loss(adapted.params, query), (adapted.losses, adapted.gradient, moved)

    gradient, value, (losses, first, moved) = inner.gradient(objective, theta, functional=loop.functional)
    return Outer(gradient, value.detach(), losses, first, moved)


def split(theta: Params, rate: float) -> tuple[Params, inner.Rates]:
    """Parameters and their rates: learned ones by name, else the number."""
    params = {name: value for name, value in theta.items() if not name.startswith(RATE)}
    if len(params) == len(theta):
        return params, rate
    return params, {name: theta[RATE + name] for name in params}


class TaskGradients(NamedTuple):
    """Of one task (or, with a first dimension, of several): what the outer step needs.

    Attributes:
        task: ∇ of the task's own outer loss; it is divided by the number of tasks in :func:`combine`.
        alignment: ∇(L_T − L_S), empty where there is no alignment.
        teacher: L_T, and ``student``: L_S, whose sums are aligned.
        losses: by name, for the record.
        distance: ‖φ − θ‖, of the teacher.
    """

    task: Params
    alignment: Params
    teacher: Tensor
    student: Tensor
    losses: dict[str, Tensor]
    distance: Tensor


def maml_align(
    loss: inner.Loss, theta: Params, sets: Any, teacher: Inner, student: Inner, *, detach_teacher: bool = False
) -> TaskGradients:
    """The two inner loops of a task on (S_mono, Q_bi, Q_multi)."""
    mono, bilingual, multilingual = sets
    by_teacher = outer(loss, theta, mono, bilingual, teacher)
    by_student = outer(loss, theta, bilingual, multilingual, student)
    if student.steps:
        support_loss, support = by_student.support_losses[0], by_student.support_gradient
    else:  # φ_S = θ, as the paper's code has it
        support, support_loss, _ = inner.gradient(
            lambda params: (loss(params, bilingual), ()), split(theta, 0.0)[0], functional=student.functional
        )
    task = {name: (by_teacher.gradient[name] + by_student.gradient[name]) / 2 for name in theta}
    none = {name: torch.zeros_like(value) for name, value in theta.items()}
    pull = none if detach_teacher else by_teacher.gradient
    alignment = {name: pull[name] - support.get(name, none[name]) for name in theta}
    losses = {
        "teacher_query_loss": by_teacher.loss,
        "student_support_loss": support_loss.detach(),
        "student_query_loss": by_student.loss,
    }
    return TaskGradients(task, alignment, by_teacher.loss, support_loss.detach(), losses, by_teacher.distance)


class Combined(NamedTuple):
    """The outer gradient; the alignment's value λ(ΣL_T − ΣL_S)², and its share: ‖its gradient‖ / ‖the tasks'‖."""

    gradient: Params
    alignment: Tensor
    share: Tensor


def combine(task: Params, alignment: Params, gap: Tensor, tasks: int, kd_lambda: float) -> Combined:
    """∇L = Σ_τ ∇L_τ / n + 2λ (ΣL_T − ΣL_S) Σ_τ ∇(L_T − L_S), from sums over all tasks of a batch.

    Args:
        task: Σ of the tasks' gradients. alignment: Σ of theirs, empty: none. gap: ΣL_T − ΣL_S. tasks: n.
        kd_lambda: λ.
    """
    mean = {name: value / tasks for name, value in task.items()}
    zero = torch.zeros((), device=gap.device)
    if not alignment or kd_lambda == 0:
        return Combined(mean, zero, zero)
    weight = 2 * kd_lambda * gap
    total = {name: mean[name] + weight * alignment[name] for name in mean}
    share = weight.abs() * norm(alignment) / norm(mean).clamp(min=1e-30)
    return Combined(total, kd_lambda * gap.square(), share)


def norm(params: Params) -> Tensor:
    """Of all entries together."""
    return torch.stack([value.square().sum() for value in params.values()]).sum().sqrt()


Objective = Callable[[Params, Any], TaskGradients]
