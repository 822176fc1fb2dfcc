"""Re-weighting, losses, choices and schedule against numbers worked out by hand and other ways of computing them (the
card's exact checks 1 to 4, 6, 7 and 9)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from list_selftrain import reweighting
from list_selftrain.baselines import mutual_information, uncertainty_choice
from list_selftrain.config import PRESETS, Config
from list_selftrain.data import Data, Part
from list_selftrain.model import load_model
from list_selftrain.reweighting import (
    MetaReweighter,
    confident,
    decided,
    distillation,
    normalised,
    products,
    pseudo_labels,
)
from list_selftrain.train import HISTORY, LiSTLearner, phases, position, reweights, total_steps
from metazoo import loop
from metazoo.options import RunOptions
from torch import Tensor, nn

torch.set_num_threads(1)

FORMS = ("jvp", "finite", "double")
Batch = tuple[Mapping[str, Tensor], Tensor]


class Net(nn.Module):
    """Two layers, smooth; dropout between them."""

    def __init__(self, inputs: int = 5, classes: int = 3, dropout: float = 0.0) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, 7), nn.Linear(7, classes)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.last(self.dropout(self.first(x).tanh()))
        return found


class Linear(nn.Module):
    """Logistic regression without intercept, from zero weights."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, inputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def problem(
    dtype: torch.dtype = torch.float64, seed: int = 0, dropout: float = 0.0
) -> tuple[Net, list[Batch], dict[str, Tensor], Tensor]:
    """A network, two labelled batches, and pseudo-labelled examples with soft targets."""
    rng = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    labelled: list[Batch] = [
        ({"x": torch.randn(4, 5, generator=rng, dtype=dtype)}, torch.randint(3, (4,), generator=rng)) for _ in range(2)
    ]
    inputs = {"x": torch.randn(9, 5, generator=rng, dtype=dtype)}
    return Net(dropout=dropout).to(dtype), labelled, inputs, torch.randn(9, 3, generator=rng, dtype=dtype).softmax(-1)


def differences_in_epsilon(
    model: nn.Module, labelled: Sequence[Batch], inputs: Mapping[str, Tensor], targets: Tensor, h: float = 1e-5
) -> Tensor:
    """−∂L_meta/∂ε_i by central differences: the inner step is made, forwards and backwards, one example at a time."""
    weights = [p for p in model.parameters() if p.requires_grad]
    log_p = model(**inputs).log_softmax(-1)
    losses = torch.where(targets > 0, targets * (targets.clamp(min=1e-300).log() - log_p), 0.0).sum(-1)
    gradients = [torch.autograd.grad(loss, weights, retain_graph=True, materialize_grads=True) for loss in losses]
    found = []
    for gradient in gradients:
        meta = []
        for epsilon in (h, -h):
            with torch.no_grad():
                for weight, g in zip(weights, gradient, strict=True):
                    weight -= epsilon * g
                meta.append(sum(float(F.cross_entropy(model(**one), labels)) for one, labels in labelled))
                for weight, g in zip(weights, gradient, strict=True):
                    weight += epsilon * g
        found.append(-(meta[0] - meta[1]) / (2 * h))
    return torch.tensor(found, dtype=torch.float64)


def assert_agree(found: Tensor, wanted: Tensor, relative: float) -> None:
    """Of each example, relative to the root mean square over them."""
    scale = float(wanted.double().square().mean().sqrt())
    assert scale > 0
    assert float((found.double() - wanted.double()).abs().max()) <= relative * scale


# ---- check 1: three ways to −∂L_meta/∂ε


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batches", [1, 2])
def test_forms_are_the_derivative_in_epsilon(form: str, batches: int) -> None:
    """Check 1: each form is −∂L_meta(ψ̂(ε))/∂ε_i at 0, with soft targets, to 1e-6 in float64."""
    model, labelled, inputs, targets = problem()
    wanted = differences_in_epsilon(model, labelled[:batches], inputs, targets)
    assert_agree(products(model, labelled[:batches], inputs, targets, form), wanted, 1e-6)


def test_forms_agree_more_closely() -> None:
    """Check 1: what is rounding apart agrees as rounding does."""
    model, labelled, inputs, targets = problem()
    jvp, finite, double = (products(model, labelled, inputs, targets, form) for form in FORMS)
    assert jvp.dtype == torch.float64
    assert_agree(jvp, double, 1e-12)
    assert_agree(finite, double, 1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_forms_in_single_precision(seed: int) -> None:
    model, labelled, inputs, targets = problem(torch.float32, seed)
    jvp, finite, double = (products(model, labelled, inputs, targets, form) for form in FORMS)
    assert_agree(jvp, double, 1e-5)
    assert_agree(finite, double, 1e-3)


def test_product_is_the_inner_product_of_gradients() -> None:
    """The closed form: ⟨∇L_meta, ∇ℓ_i⟩, gradient by gradient."""
    model, labelled, inputs, targets = problem()
    weights = list(model.parameters())
    (batch, labels), *_ = labelled
    meta = torch.autograd.grad(F.cross_entropy(model(**batch), labels), weights)
    wanted = []
    for x, q in zip(inputs["x"], targets, strict=True):
        own = torch.autograd.grad(-(q * model(x).log_softmax(-1)).sum(), weights)
        wanted.append(sum(float((a * b).sum()) for a, b in zip(meta, own, strict=True)))
    assert_agree(products(model, labelled[:1], inputs, targets), torch.tensor(wanted, dtype=torch.float64), 1e-12)


def test_labelled_batches_are_summed() -> None:
    """``sampling_steps``: the products of two batches are the sums of those of each."""
    model, labelled, inputs, targets = problem()
    for form in FORMS:
        apart = [products(model, [one], inputs, targets, form) for one in labelled]
        assert_agree(products(model, labelled, inputs, targets, form), apart[0] + apart[1], 1e-8)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_forms_on_a_prompted_roberta(dtype: torch.dtype) -> None:
    """Check 1 on a RoBERTa with adapters, through its own passes."""
    learner = prompted()
    model = learner.model.to(dtype)
    with torch.no_grad():  # adapters that are all but 0 pass no gradient to each other
        for value in model.trained().values():
            value.add_(0.05 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)))
    labelled = [(learner._take(learner.labelled, np.arange(4)), learner.labels[:4])]
    inputs = learner._take(learner.unlabelled, np.arange(6))
    targets = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=dtype).softmax(-1)
    found = {form: products(model, labelled, inputs, targets, form) for form in FORMS}
    if dtype == torch.float64:
        wanted = differences_in_epsilon(model.eval(), labelled, inputs, targets)
        for form in FORMS:
            assert_agree(found[form], wanted, 1e-6)
    assert_agree(found["jvp"], found["double"], 1e-10 if dtype == torch.float64 else 1e-4)
    assert_agree(found["finite"], found["double"], 1e-6 if dtype == torch.float64 else 1e-3)


def test_no_gradient_and_no_example_that_helps() -> None:
    """A gradient of 0 gives products of 0 in each form, and then weights of 0."""
    model, _, inputs, targets = problem()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    labelled: list[Batch] = [({"x": torch.ones(3, 5, dtype=torch.float64)}, torch.tensor([0, 1, 2]))]
    for form in FORMS:
        found = products(model, labelled, inputs, targets, form)
        assert torch.allclose(found, torch.zeros_like(found), atol=1e-15)
        assert not normalised(torch.zeros_like(found)).any()


# ---- check 2: scale


@pytest.mark.parametrize("scale", [5e-6, 2.0**-30, 1e-200, 3.7, 1e5])
def test_scale_cancels(scale: float) -> None:
    """Check 2: α, or the scale of the losses, leaves the weights as they are (with the paper's + 1e-6 it would not)."""
    model, labelled, inputs, targets = problem()
    found = products(model, labelled, inputs, targets)
    torch.testing.assert_close(normalised(scale * found), normalised(found), rtol=1e-14, atol=0)


def test_rate_of_the_inner_step_cancels() -> None:
    """Check 2: −∂L_meta/∂ε is proportional to α, and w does not know it."""
    model, labelled, inputs, targets = problem()
    (batch, labels), *_ = labelled

    def example_losses(values: reweighting.Parameters) -> Tensor:
        logits = torch.func.functional_call(model, dict(values), kwargs=dict(inputs))
        return -(targets * logits.log_softmax(-1)).sum(-1)

    def meta_loss(values: reweighting.Parameters) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, dict(values), kwargs=dict(batch)), labels)

    parameters = dict(model.named_parameters())
    one = reweighting.by_inner_step(parameters, meta_loss, example_losses)
    paper = reweighting.by_inner_step(parameters, meta_loss, example_losses, rate=5e-6)
    torch.testing.assert_close(paper, 5e-6 * one, rtol=1e-10, atol=0)
    torch.testing.assert_close(normalised(paper), normalised(one), rtol=1e-10, atol=0)
    torch.testing.assert_close(reweighting.by_jvp(parameters, meta_loss, example_losses), one, rtol=1e-8, atol=1e-14)


# ---- check 3: weights


@given(st.lists(st.floats(-1e300, 1e300, allow_subnormal=False), min_size=1, max_size=20))
def test_weights_are_a_distribution(values: list[float]) -> None:
    """Check 3: w ≥ 0, Σ w = 1, or all 0 where no product is above 0."""
    found = normalised(torch.tensor(values, dtype=torch.float64))
    assert bool((found >= 0).all())
    assert float(found.sum()) == pytest.approx(float(max(values) > 0), abs=1e-12)
    assert (found > 0).tolist() <= [value > 0 for value in values]


def test_weights_by_hand() -> None:
    assert normalised(torch.tensor([3.0, -2.0, 0.0, 1.0])).tolist() == [0.75, 0.0, 0.0, 0.25]
    assert normalised(torch.tensor([-3.0, 0.0])).tolist() == [0.0, 0.0]
    halves = torch.tensor([3.0, -2.0]), torch.tensor([0.0, 1.0])
    parts = [normalised(half, torch.tensor(4.0)) for half in halves]  # of two processes, with the sum over both
    assert torch.cat(parts).tolist() == [0.75, 0.0, 0.0, 0.25]


@pytest.mark.parametrize("form", FORMS)
def test_duplicating_the_labelled_batch_changes_nothing(form: str) -> None:
    """Check 3: L_meta is a mean, whose scale cancels."""
    model, labelled, inputs, targets = problem()
    (batch, labels), *_ = labelled
    wanted = normalised(products(model, [(batch, labels)], inputs, targets, form))
    twice = {"x": torch.cat([batch["x"], batch["x"]])}, torch.cat([labels, labels])
    for again in ([twice], [(batch, labels), (batch, labels)]):
        found = normalised(products(model, again, inputs, targets, form))
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


# ---- check 4: logistic regression


@pytest.mark.parametrize("form", FORMS)
def test_logistic_regression_by_hand(form: str) -> None:
    """Check 4: at W = 0, p = (½, ½) and ∇CE of (x, y) is (p − e_y) xᵀ; the labelled point is x = (1, 2), y = 1.

    ⟨∇L_meta, ∇ℓ⟩ = ⟨p − e_1, p − q⟩ ⟨x, x'⟩: of itself ½ · 5, with the opposite label −½ · 5, of an orthogonal x' 0, of
    (1, 0) ½ · 1, of itself with q = p nothing, with q = (¼, ¾) half of the first.
    """
    x = torch.tensor([[1.0, 2], [1, 2], [2, -1], [1, 0], [1, 2], [1, 2]], dtype=torch.float64)
    q = torch.tensor([[0, 1], [1, 0], [0, 1], [0, 1], [0.5, 0.5], [0.25, 0.75]], dtype=torch.float64)
    labelled: list[Batch] = [({"x": x[:1]}, torch.tensor([1]))]
    found = products(Linear(2), labelled, {"x": x}, q, form)
    wanted = torch.tensor([2.5, -2.5, 0, 0.5, 0, 1.25], dtype=torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    if form != "finite":
        weights = MetaReweighter(Linear(2), labelled, form=form).weights({"x": x}, q)
        torch.testing.assert_close(weights, wanted.clamp(min=0) / 4.25, rtol=0, atol=1e-12)
        assert weights[1] == 0


@pytest.mark.parametrize("form", FORMS)
def test_opposite_label_gets_nothing(form: str) -> None:
    """Check 4 at p = (0.2, 0.8): ⟨p − e_1, p − e_1⟩ = 0.08, and ⟨p − e_1, p − e_0⟩ = −0.32, so w = 1 and 0."""
    model = Linear(1)
    with torch.no_grad():
        model.weight[1] = math.log(4)
    x = torch.ones(2, 1, dtype=torch.float64)
    labelled: list[Batch] = [({"x": x[:1]}, torch.tensor([1]))]
    found = products(model, labelled, {"x": x}, torch.eye(2, dtype=torch.float64).flip(0), form)
    torch.testing.assert_close(found, torch.tensor([0.08, -0.32], dtype=torch.float64), rtol=1e-6, atol=0)
    assert normalised(found).tolist() == [1.0, 0.0]


# ---- dropout, modes, turns


@pytest.mark.parametrize("form", FORMS)
def test_weights_see_no_dropout(form: str) -> None:
    """The model is in evaluation mode for the weights, and then in the mode that it was in; also after an error."""
    model, labelled, inputs, targets = problem(dropout=0.5)
    without = problem()[0]
    without.load_state_dict(model.state_dict())
    for mode in (True, False):
        model.train(mode)
        first, second = (products(model, labelled, inputs, targets, form) for _ in range(2))
        assert torch.equal(first, second)
        assert torch.equal(first, products(without, labelled, inputs, targets, form))
        assert model.training is model.dropout.training is mode
    with pytest.raises(RuntimeError):
        products(model.train(), labelled, {"x": torch.ones(9, 4, dtype=torch.float64)}, targets, form)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_frozen_parameters_take_no_part() -> None:
    model, labelled, inputs, targets = problem()
    model.first.requires_grad_(False)
    wanted = differences_in_epsilon(model, labelled, inputs, targets)
    for form in FORMS:
        assert_agree(products(model, labelled, inputs, targets, form), wanted, 1e-6)


def test_reweighter_takes_labelled_batches_in_turn() -> None:
    model, labelled, inputs, targets = problem()
    more = [*labelled, *problem(seed=1)[1][:1]]
    turns = MetaReweighter(model, more)
    for i in (0, 1, 2, 0):
        assert torch.equal(turns.weights(inputs, targets), normalised(products(model, [more[i]], inputs, targets)))
    pairs = MetaReweighter(model, more, batches=2)
    for i, j in ((0, 1), (2, 0), (1, 2)):
        wanted = normalised(products(model, [more[i], more[j]], inputs, targets))
        assert torch.equal(pairs.weights(inputs, targets), wanted)


# ---- checks 6 and 7: distillation


def test_gradient_of_distillation_is_that_of_cross_entropy() -> None:
    """Check 6: KL(q ‖ p) and CE(q, p) differ by the entropy of q alone; by the logits both have the gradient p − q."""
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=rng, requires_grad=True)
    q = torch.randn(6, 4, generator=rng).softmax(-1).requires_grad_()
    losses = distillation(logits, q)
    (found,) = torch.autograd.grad(losses.sum(), logits)
    (wanted,) = torch.autograd.grad(F.cross_entropy(logits, q.detach(), reduction="sum"), logits)
    torch.testing.assert_close(found, wanted)
    torch.testing.assert_close(found, (logits.softmax(-1) - q).detach())
    entropy = -(q * q.log()).sum(-1)
    torch.testing.assert_close(losses + entropy, F.cross_entropy(logits, q, reduction="none"))
    assert losses.shape == (6,)
    assert not distillation(logits.detach(), q).requires_grad  # stop-gradient


def test_distillation_by_hand() -> None:
    """q = (¼, ¾), p = (½, ½): ¼ ln ½ + ¾ ln 3/2 = 0.130812; a decision: −ln p."""
    logits = torch.zeros(2, 2)
    found = distillation(logits, torch.tensor([[0.25, 0.75], [1.0, 0.0]]))
    assert found.tolist() == pytest.approx([0.25 * math.log(0.5) + 0.75 * math.log(1.5), math.log(2)], rel=1e-6)


@pytest.mark.parametrize("soft", [True, False])
def test_divergence_from_oneself_is_nothing(soft: bool) -> None:
    """Check 7: KL(q ‖ q) = 0, with gradient 0; from one's own decisions it is not."""
    logits = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    q = pseudo_labels(logits.detach())
    losses = distillation(logits, q if soft else decided(q))
    (gradient,) = torch.autograd.grad(losses.sum(), logits)
    if soft:
        assert losses.abs().max() < 1e-6
        assert gradient.abs().max() < 1e-6
    else:
        assert losses.min() > 0.1
        assert gradient.abs().max() > 0.1


def test_pseudo_labels_by_hand() -> None:
    """Step 3a: softmax of (ln 3, 0) is (¾, ¼), at temperature ½ (0.9, 0.1); as a decision (1, 0)."""
    logits = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    expected = {1.0: [[0.75, 0.25], [0.25, 0.75]], 0.5: [[0.9, 0.1], [0.1, 0.9]]}
    for temperature, wanted in expected.items():
        torch.testing.assert_close(pseudo_labels(logits, temperature=temperature), torch.tensor(wanted))
    assert decided(pseudo_labels(logits)).tolist() == [[1, 0], [0, 1]]
    assert pseudo_labels(logits.bfloat16()).dtype == torch.float32


def test_confident() -> None:
    """Check 6, step 3c: at c = 0 uniform; above c equal; none above it: all 0."""
    targets = torch.tensor([[0.5, 0.5], [0.9, 0.1], [0.3, 0.7], [0.0, 1.0]])
    assert confident(targets, 0.0).tolist() == [0.25] * 4
    assert confident(targets, 0.6).tolist() == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3])
    assert confident(targets, 0.7).tolist() == [0, 0.5, 0, 0.5]
    assert confident(targets[:3], 0.95).tolist() == [0, 0, 0]


# ---- learners


def vectors(count: int, labels: bool, seed: int = 0) -> Part:
    rng = np.random.default_rng(seed)
    truth = np.arange(count) % 2
    found = rng.standard_normal((count, 4)).astype(np.float32) + 2 * truth[:, None].astype(np.float32)
    return Part(((),) * count, truth if labels else None, found)


FEATURES = Config(
    dataset="gaussian", model="features", hidden=8, sessions=1, session_steps=10, teacher_epochs=3, finetune_epochs=2,
    unlabelled_batch=6, dropout=0.0, warmup=0.0,
)  # fmt: skip


def on_vectors(config: Config = FEATURES, labelled: int = 10, unlabelled: int = 23) -> LiSTLearner:
    source = Data("gaussian", ("0", "1"), vectors(labelled, True), vectors(unlabelled, False, 1), None, ())
    return LiSTLearner(config, source, loop.prepare(RunOptions(), seed=0))


GOOD, BAD = "a good film with a great cast", "a bad film with a terrible plot"
TEXTS = (GOOD, BAD, "the great story was good", "the plot is terrible", "good", "a terrible bad cast", "it was great")
PROMPTED = Config(
    width=16, layers=1, heads=2, feedforward=16, vocabulary=300, pretrain_steps=0, adapter_dim=3, sessions=1,
    session_steps=6, teacher_epochs=1, finetune_epochs=1, unlabelled_batch=4, warmup=0.5, dropout=0.1,
    template="*cls**sent_0*_It_was*mask*.*sep+*", words=("terrible", "great"), adapter_std=0.1,
)  # fmt: skip


def prompted(config: Config = PROMPTED) -> LiSTLearner:
    texts = tuple((text,) for text in TEXTS)
    labelled = Part(texts[:4], np.array([1, 0, 1, 0]))
    source = Data("films", ("bad", "good"), labelled, Part(texts), None, TEXTS)
    return LiSTLearner(config, source, loop.prepare(RunOptions(), seed=0))


def test_student_equal_to_its_teacher_does_not_move() -> None:
    """Check 7: without dropout, fresh weights and decisions a session has no gradient beyond rounding."""
    config = replace(FEATURES, fresh=False, weights="uniform", session_steps=3, finetune_epochs=0, clip=0.0)
    norms = {}
    for name, change in {"same": {}, "hard": {"soft_labels": False}, "dropout": {"dropout": 0.3}}.items():
        learner = on_vectors(replace(config, **change))
        teacher, *_ = phases(learner.config, 10)
        for step in range(teacher):
            learner.step(step)
        before = [parameter.detach().clone() for parameter in learner.parameters]
        norms[name] = float(learner.step(teacher)["grad_norm"])
        moved = max(float((a - b).detach().abs().max()) for a, b in zip(before, learner.parameters, strict=True))
        if name == "same":  # Adam's steps are of the size of lr but for gradients near its epsilon, 1e-8
            assert moved < 0.9 * config.lr
        else:
            assert moved > 0.9 * config.lr
    assert norms["same"] < 1e-6
    assert min(norms["hard"], norms["dropout"]) > 1e-3


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("form", FORMS)
def test_gradient_of_a_step_is_that_of_the_weighted_sum(accumulation: int, form: Any) -> None:
    """Step 3d: ∇ Σ w_i ℓ_i, not divided by the batch again, w without gradient; in parts it is the same."""
    learner = on_vectors(replace(FEATURES, accumulation=accumulation, meta_gradient=form, soft_labels=False))
    teacher, *_ = phases(learner.config, 10)
    for step in range(teacher):
        learner.step(step)
    learner._begin(1)
    at = position(learner.config, 10, teacher + 2)
    indices = learner.draws(1)[2]
    targets = learner.learned(indices)
    inputs = learner._take(learner.unlabelled, indices)
    rows = learner.meta_indices(1, 2)[0]
    labelled = [(learner._take(learner.labelled, rows), learner.labels[rows])]
    weights = normalised(products(learner.model, labelled, inputs, targets, form))
    assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(learner.weigh(at, indices), weights, rtol=2e-3, atol=1e-5)
    losses = F.cross_entropy(learner.model.train()(**inputs), targets, reduction="none")
    wanted = torch.autograd.grad((weights * losses).sum(), learner.parameters)
    learner.optimizer.zero_grad()
    found = learner.distil(at)
    for parameter, gradient in zip(learner.parameters, wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=5e-3, atol=1e-4)
    assert float(found["effective_examples"]) == pytest.approx(1 / float(weights.square().sum()), rel=1e-2)
    assert float(found["zero_weights"]) == pytest.approx(100 * float((weights == 0).float().mean()))


def test_gradient_of_labelled_steps_is_that_of_the_mean() -> None:
    """Stage 0 and step 4: mean cross-entropy of the batch, also of the epoch's last, which is shorter; and in parts."""
    for accumulation in (1, 3):
        learner = on_vectors(replace(FEATURES, accumulation=accumulation))
        for step in (0, 2):
            at = position(learner.config, 10, step)
            rows = learner.labelled_indices(0, at.i)
            assert len(rows) == (4 if step == 0 else 2)
            logits = learner.model(**learner._take(learner.labelled, rows))
            loss = F.cross_entropy(logits, learner.labels[rows])
            wanted = torch.autograd.grad(loss, learner.parameters)
            learner.optimizer.zero_grad()
            assert float(learner.supervise(at)["loss"]) == pytest.approx(loss.item(), rel=1e-5)
            for parameter, gradient in zip(learner.parameters, wanted, strict=True):
                torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tune", ["adapter", "head", "bias"])
def test_frozen_parameters_stay(tune: Any) -> None:
    """Check 9: after teacher, session and fine-tuning all that is not trained has the bits that it had."""
    learner = prompted(replace(PROMPTED, tune=tune))
    trained = {id(value) for value in learner.model.trained().values()}
    named = {**dict(learner.model.named_parameters()), **dict(learner.model.named_buffers())}
    before = {name: value.detach().clone() for name, value in named.items()}
    kept = [name for name, value in named.items() if id(value) not in trained]
    assert kept
    for step in range(learner.steps):
        learner.step(step)
    after = {**dict(learner.model.named_parameters()), **dict(learner.model.named_buffers())}
    assert [name for name in kept if not torch.equal(before[name], after[name])] == []
    assert any(not torch.equal(before[name], after[name]) for name in before if name not in kept)
    assert all(not value.requires_grad for name, value in after.items() if name in kept)


def test_without_sessions_the_teacher_is_all() -> None:
    """Check 6: M = 0 takes the teacher's steps alone, and draws, labels and weighs nothing."""
    config = replace(FEATURES, sessions=0)
    assert total_steps(config, 10) == 9
    assert total_steps(replace(PRESETS["paper"], sessions=0), 30) == 400
    learner, whole = on_vectors(config), on_vectors(FEATURES)
    for step in range(learner.steps):
        assert learner.step(step)["session"] == 0
        whole.step(step)
    assert learner.history.shape == (1, len(HISTORY))
    assert not learner.targets.any()
    assert not learner.weight_count.any()
    for one, other in zip(learner.parameters, whole.parameters, strict=True):  # no session has touched it
        assert torch.equal(one, other)


def test_nothing_moves_before_the_first_step() -> None:
    """load_model and the learner agree: before the first step nothing has moved."""
    learner = on_vectors()
    again = load_model(learner.config, learner.source, loop.prepare(RunOptions(), seed=0))
    for one, other in zip(learner.parameters, again.trained().values(), strict=True):
        assert torch.equal(one.cpu(), other)


# ---- schedule


def test_schedule_of_the_paper() -> None:
    """run.sh: 50 epochs of 8 batches (30 labels by 4), then 6 sessions of 1,000 and 400 steps; rates fall linearly."""
    paper = PRESETS["paper"]
    assert phases(paper, 30) == (400, 1000, 400)
    assert total_steps(paper, 30) == 400 + 6 * 1400 == 8800
    expected = {
        0: (0, True, 0, 5e-6, True, False),
        1: (0, True, 1, 5e-6 * 399 / 400, False, False),
        399: (0, True, 399, 5e-6 / 400, False, True),
        400: (1, False, 0, 1e-4, True, False),
        1399: (1, False, 999, 1e-4 * 401 / 1400, False, False),
        1400: (1, True, 0, 1e-4 * 400 / 1400, False, False),
        1799: (1, True, 399, 1e-4 / 1400, False, True),
        1800: (2, False, 0, 1e-4, True, False),
        8799: (6, True, 399, 1e-4 / 1400, False, True),
    }
    for step, (session, labelled, i, rate, begins, ends) in expected.items():
        at = position(paper, 30, step)
        assert (at.session, at.labelled, at.i, at.begins, at.ends) == (session, labelled, i, begins, ends)
        assert at.rate == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("changes", [{}, {"teacher_epochs": 0}, {"finetune_epochs": 0}, {"session_steps": 1}])
def test_schedule_adds_up(changes: dict[str, int]) -> None:
    """Each session begins and ends once, has its steps of both kinds in order, and falls from lr."""
    config = replace(FEATURES, sessions=3, **changes)
    teacher, session, finetune = phases(config, 10)
    places = [position(config, 10, step) for step in range(total_steps(config, 10))]
    assert [at.i for at in places if at.session == 0] == list(range(teacher))
    for number in (1, 2, 3):
        of = [at for at in places if at.session == number]
        assert [(at.labelled, at.i) for at in of] == [
            *((False, i) for i in range(session)), *((True, i) for i in range(finetune)),
        ]  # fmt: skip
        assert of[0].rate == config.lr
        assert of[-1].rate == pytest.approx(config.lr / (session + finetune))
        assert [at.begins for at in of] == [True] + [False] * (len(of) - 1)
        assert [at.ends for at in of] == [False] * (len(of) - 1) + [True]


def test_reweighting_begins_after_the_warmup() -> None:
    """Step 3c: from i > 0.6 T on, i = 0.6 T being a plain mean; without warm-up from the first step."""
    paper = PRESETS["paper"]
    assert [i for i in range(1000) if reweights(paper, i)] == list(range(601, 1000))
    assert all(reweights(replace(paper, warmup=0.0), i) for i in range(1000))
    assert not any(reweights(replace(paper, warmup=1.0), i) for i in range(1000))
    for weights in ("uniform", "confidence", "uncertainty"):
        assert not any(reweights(replace(paper, weights=weights), i) for i in range(1000))


def test_warmup_weights_are_uniform() -> None:
    learner = on_vectors(replace(FEATURES, warmup=0.5))
    learner._begin(1)
    for i, step in enumerate(range(9, 19)):
        at, indices = position(learner.config, 10, step), learner.draws(1)[i]
        found = learner.weigh(at, indices)
        assert (found.tolist() == pytest.approx([1 / 6] * 6)) == (i <= 5)


# ---- order


@pytest.mark.parametrize("size", [1, 3, 4, 10])
def test_labelled_epochs_cover_each_example_once(size: int) -> None:
    learner = on_vectors(labelled=max(size, 2)) if size > 1 else on_vectors(replace(FEATURES, labelled_batch=9), 2)
    count = len(learner.source.labelled)
    batches = -(-count // learner.config.labelled_batch)
    epochs = [
        np.concatenate([learner.labelled_indices(session, epoch * batches + b) for b in range(batches)])
        for session in (0, 1)
        for epoch in (0, 1, 2)
    ]
    for epoch in epochs:
        assert sorted(epoch) == list(range(count))
    if count == 10:
        assert len({tuple(epoch) for epoch in epochs}) == 6


@pytest.mark.parametrize("batch", [1, 6, 23, 64])
def test_draws_cover_each_example_once_an_epoch(batch: int) -> None:
    learner = on_vectors(replace(FEATURES, unlabelled_batch=batch, session_steps=40))
    first, second = learner.draws(1).copy(), learner.draws(2).copy()
    assert first.shape == second.shape == (40, min(batch, 23))
    assert not np.array_equal(first, second)
    assert np.array_equal(first, learner.draws(1))
    flat = first.ravel()
    for start in range(0, len(flat) - 22, 23):
        assert sorted(flat[start : start + 23]) == list(range(23))
    rest = flat[len(flat) // 23 * 23 :]
    assert len(set(rest)) == len(rest)


def test_meta_batches() -> None:
    """Labelled examples of one meta batch differ; a batch larger than the set is the set."""
    learner = on_vectors(replace(FEATURES, meta_batches=3))
    found = [learner.meta_indices(1, i) for i in range(20)]
    for rows in found:
        assert rows.shape == (3, 4)
        assert all(len(set(row)) == 4 and row.min() >= 0 and row.max() < 10 for row in rows)
    assert set(np.concatenate(found).ravel()) == set(range(10))
    assert not np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], learner.meta_indices(1, 0))
    whole = on_vectors(replace(FEATURES, meta_batch=99)).meta_indices(1, 0)
    assert sorted(whole[0]) == list(range(10))


def test_weights_of_a_run_are_means_over_its_steps() -> None:
    """Run.weights: the mean of B · w over the steps in which an example was re-weighted; in a plain mean 1."""
    learner = on_vectors(replace(FEATURES, weights="uniform", finetune_epochs=0))
    for step in range(learner.steps):
        learner.step(step)
    count = np.bincount(learner.draws(1).ravel(), minlength=23)
    np.testing.assert_array_equal(learner.weight_count.cpu().numpy(), count)
    np.testing.assert_allclose(learner.weight_sum.cpu().numpy(), count, rtol=1e-5)


# ---- uncertainty (UST)


def test_mutual_information_by_hand() -> None:
    """BALD: passes (1, 0) and (0, 1) ln 2; equal passes 0; (0.8, 0.2) and (0.6, 0.4) H(0.7) − ½ H(0.8) − ½ H(0.6)."""
    passes = torch.tensor([[[1.0, 0], [0.3, 0.7], [0.8, 0.2]], [[0, 1], [0.3, 0.7], [0.6, 0.4]]], dtype=torch.float64)

    def entropy(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    wanted = [math.log(2), 0, entropy(0.7) - (entropy(0.8) + entropy(0.6)) / 2]
    assert mutual_information(passes).tolist() == pytest.approx(wanted, abs=1e-12)
    assert wanted[2] == pytest.approx(0.0241572, abs=1e-7)


def test_uncertainty_weights_by_hand() -> None:
    """log(1 / Var) of the class's probability, divided by their mean: Var 0.01 and 0.04 give ln 100 and ln 25."""
    passes = torch.tensor([[[0.8, 0.2], [0.1, 0.9]], [[0.6, 0.4], [0.5, 0.5]]], dtype=torch.float64)
    chosen, labels, weights = uncertainty_choice(passes, 2, np.random.default_rng(0))
    wanted = np.log([100, 25]) / np.log([100, 25]).mean()
    order = np.argsort(chosen)
    assert labels[order].tolist() == [0, 1]
    np.testing.assert_allclose(weights[order], wanted, rtol=1e-7)


@pytest.mark.parametrize(("count", "of_rare"), [(1, 0), (6, 3), (10, 5), (14, 5), (20, 5)])
def test_uncertainty_chooses_equally_many_of_each_class(count: int, of_rare: int) -> None:
    """15 of class 0, 5 of class 1: as many of each as there are, the rest of the other; each at most once; mean 1."""
    rng = np.random.default_rng(1)
    sure = torch.from_numpy(rng.uniform(0.6, 1.0, (4, 20)))
    rare = torch.arange(20) % 4 == 0
    first = torch.where(rare, 1 - sure, sure)
    chosen, labels, weights = uncertainty_choice(torch.stack([first, 1 - first], -1), count, rng)
    assert len(chosen) == len(set(chosen)) == len(labels) == len(weights) == count
    assert np.array_equal(labels, rare.numpy()[chosen].astype(int))
    assert labels.sum() == of_rare
    assert weights.mean() == pytest.approx(1)
    assert (weights >= 0).all()


def test_uncertainty_prefers_easy_examples() -> None:
    """Of two examples of a class one is drawn in proportion to 1 − BALD: 1 against 1 − 0.644."""
    passes = torch.tensor([[[1.0, 0], [0.51, 0.49]], [[0.02, 0.98], [0.51, 0.49]]], dtype=torch.float64)
    hard = 1 - float(mutual_information(passes)[0])
    assert hard == pytest.approx(0.356, abs=1e-3)
    rng = np.random.default_rng(0)
    easy = np.mean([uncertainty_choice(passes, 1, rng)[0][0] == 1 for _ in range(3000)])
    assert easy == pytest.approx(1 / (1 + hard), abs=0.03)
