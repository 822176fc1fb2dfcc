"""Losses, inner loops, alignment and the cut table against numbers by hand and other ways of computing them (the card's
exact checks 1 to 5 and 8 to 10)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from maml_align import baselines, meta_distillation, rotations
from maml_align.config import Config
from maml_align.data import Data, Pairs, Questions
from maml_align.meta_distillation import (
    RATE,
    Combined,
    Inner,
    combine,
    maml_align,
    outer,
    similarity_loss,
    triplet_loss,
)
from maml_align.model import DualEncoder, LinearEncoder, quiet
from maml_align.tasks import stack
from maml_align.train import MetaLearner
from metazoo import inner, loop
from metazoo.errors import UserError
from metazoo.options import RunOptions
from torch import Tensor

torch.set_num_threads(1)

Params = dict[str, Tensor]
LANGUAGES = ("de", "en", "es")
CONFIG = Config(
    dataset="own.csv", languages=LANGUAGES, unseen=(), shots=3, queries=2, negatives=2, context=False, vocabulary=300,
    width=8, layers=1, heads=2, feedforward=12, max_query_length=16, max_answer_length=16, inner_steps=2, inner_lr=0.5,
    task_batch=2,
)  # fmt: skip
ROTATIONS = replace(CONFIG, dataset="rotations", model="linear", dimension=4, languages=("a", "b", "c"))


# ---- material


def sentence(rng: np.random.Generator, language: str) -> str:
    """Of words that are a language's own, and some that are not."""
    words = [f"{language}{chr(97 + i)}{chr(107 + i % 5)}" for i in range(12)] + ["radio", "taxi"]
    return " ".join(words[i] for i in rng.integers(len(words), size=int(rng.integers(2, 7))))


@cache
def scored(count: int = 14) -> Data:
    """Aligned pairs."""
    rng = np.random.default_rng(0)
    scores = np.round(rng.uniform(0, 5, count), 1)

    def part() -> Pairs:
        made = {
            (one, one): (
                tuple(sentence(rng, one) for _ in range(count)), tuple(sentence(rng, one) for _ in range(count)), scores
            )
            for one in LANGUAGES
        }  # fmt: skip
        return Pairs(LANGUAGES, made, aligned=True)

    return Data("own", "pairs", part(), part(), part())


@cache
def asked(count: int = 14) -> Data:
    """Questions, each with an answer among ``count`` + 3 sentences."""
    rng = np.random.default_rng(1)

    def part() -> Questions:
        return Questions(
            tuple(f"q{i}" for i in range(count)),
            {one: tuple(sentence(rng, one) for _ in range(count)) for one in LANGUAGES},
            {one: tuple(sentence(rng, one) for _ in range(count + 3)) for one in LANGUAGES},
            {one: ("",) * (count + 3) for one in LANGUAGES},
            {one: rng.permutation(count + 3)[:count] for one in LANGUAGES},
        )

    return Data("own", "questions", part(), part(), part())


def source(config: Config, kind: str) -> Data:
    return rotations.load(config) if config.dataset == "rotations" else {"pairs": scored, "questions": asked}[kind]()


def learner(config: Config, kind: str = "pairs") -> MetaLearner:
    return MetaLearner(config, source(config, kind), loop.prepare(RunOptions(), seed=0))


def theta_of(one: MetaLearner) -> Params:
    return {name: value.detach().clone() for name, value in one.theta.items()}


def combined(one: MetaLearner, tasks: Sequence[Any]) -> Combined:
    """The outer gradient that a step would take."""
    task, alignment, found = one.gradients(tasks, one.objective(0))
    return combine(task, alignment, found["teacher"] - found["student"], len(tasks), one.config.kd_lambda)


def assert_same(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], tolerance: float = 1e-6) -> None:
    """To ``tolerance`` of the largest gradient (or of 1, where that is less); and there is a gradient."""
    assert set(found) == set(wanted)
    scale = max(float(value.abs().max()) for value in wanted.values())
    assert scale > 1e-4
    for name, value in wanted.items():
        assert found[name].shape == value.shape
        assert float((found[name] - value).abs().max()) <= tolerance * max(1.0, scale), name


class Rows(torch.nn.Module):
    """An encoder whose texts are rows of one matrix, normalised or as they are."""

    vectorises = True

    def __init__(self, unit: bool = True) -> None:
        super().__init__()
        self.unit = unit

    def embed(self, params: Params, tokens: Mapping[str, Tensor]) -> Tensor:
        found = params["rows"][tokens["row"]]
        return F.normalize(found, dim=-1) if self.unit else found


def pairs_batch(count: int, scores: Tensor, weight: Tensor | None = None) -> dict[str, Any]:
    return {
        "tokens": {"row": torch.arange(2 * count)}, "scores": scores,
        "weight": torch.ones(count) if weight is None else weight,
    }  # fmt: skip


def triplets_batch(count: int) -> dict[str, Any]:
    """Triplet i: question row i, positive row count + 2i, negative row count + 2i + 1."""
    every = torch.arange(count)
    return {
        "questions": {"row": every}, "candidates": {"row": count + torch.arange(2 * count)},
        "question": every, "positive": 2 * every, "negative": 2 * every + 1, "weight": torch.ones(count),
    }  # fmt: skip


# ---- the whole objective, naively


def adapted(loss: inner.Loss, theta: Params, support: Any, steps: int, rate: Any, first_order: bool) -> Params:
    """φ, through torch.autograd alone."""
    params, rates = dict(theta), rate if isinstance(rate, dict) else dict.fromkeys(theta, rate)
    for _ in range(steps):
        found = torch.autograd.grad(
            loss(params, support), list(params.values()), create_graph=not first_order, materialize_grads=True
        )
        params = {name: params[name] - rates[name] * one for name, one in zip(params, found, strict=True)}
    return params


def naive(
    loss: inner.Loss, theta: Params, tasks: Sequence[Any], teacher: Inner, student: Inner, kd_lambda: float,
    detach_teacher: bool = False,
) -> tuple[Params, Tensor]:  # fmt: skip
    """∇ and value of Σ_τ [L_T + ℓ(φ_S; Q_multi)] / 2n + λ (Σ L_T − Σ L_S)², in one graph."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in theta.items()}
    params, rates = meta_distillation.split(leaves, teacher.rate)
    mean, of_teacher, of_student = [], [], []
    for mono, bilingual, multilingual in tasks:
        by_teacher = adapted(loss, params, mono, teacher.steps, rates, teacher.first_order)
        by_student = adapted(loss, params, bilingual, student.steps, rates, student.first_order)
        query = loss(by_teacher, bilingual)
        mean.append((query + loss(by_student, multilingual)) / 2)
        of_teacher.append(query.detach() if detach_teacher else query)
        of_student.append(loss(params, bilingual))
    gap = torch.stack(of_teacher).sum() - torch.stack(of_student).sum()
    value = torch.stack(mean).mean() + kd_lambda * gap.square()
    found = torch.autograd.grad(value, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, found, strict=True)), value.detach()


def ours(
    loss: inner.Loss, theta: Params, tasks: Sequence[Any], teacher: Inner, student: Inner, kd_lambda: float, **more: Any
) -> Combined:
    """combine() of the sums of maml_align()."""
    found = [maml_align(loss, theta, sets, teacher, student, **more) for sets in tasks]
    sums = [
        {name: torch.stack([getattr(one, part)[name] for one in found]).sum(0) for name in theta}
        for part in ("task", "alignment")
    ]
    gap = torch.stack([one.teacher - one.student for one in found]).sum()
    return combine(sums[0], sums[1], gap, len(tasks), kd_lambda)


@cache
def world() -> tuple[LinearEncoder, list[Any]]:
    """A linear encoder and three tasks, in double precision."""
    one = learner(replace(ROTATIONS, task_batch=3))
    encoder = one.encoder
    assert isinstance(encoder, LinearEncoder)

    def doubled(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.double() if value.is_floating_point() else value
        return {name: doubled(part) for name, part in value.items()}

    return encoder.double(), [[doubled(part) for part in task] for task in one.sampler.batch(0)]


# ---- check 1: without inner steps and alignment, fine-tuning


@pytest.mark.parametrize(
    ("model", "kind"),
    [("static", "pairs"), ("static", "questions"), ("tiny", "pairs"), ("tiny", "questions"), ("linear", "vectors")],
)
def test_without_inner_steps_and_alignment_it_is_fine_tuning(model: str, kind: str) -> None:
    """U = 0 and λ = 0: the gradient is that of (bilingual + multilingual) / 2."""
    config = replace(ROTATIONS if model == "linear" else replace(CONFIG, model=model), inner_steps=0, kd_lambda=0.0)
    one, other = learner(config, kind), learner(replace(config, method="fine-tune"), kind)
    tasks = one.sampler.batch(0)
    found = combined(one, tasks)
    assert_same(found.gradient, combined(other, [task[1:] for task in tasks]).gradient)
    assert not found.alignment
    assert not found.share


# ---- check 2: an inner loop


@pytest.mark.parametrize("functional", [False, True])
@pytest.mark.parametrize("steps", [0, 1, 3])
def test_first_order_is_the_gradient_at_phi(steps: int, functional: bool) -> None:
    encoder, tasks = world()
    loss, theta = similarity_loss(encoder), inner.parameters(encoder)
    support, query, _ = tasks[0]
    found = outer(loss, theta, support, query, Inner(steps, 0.7, functional=functional))
    leaves = {name: value.clone().requires_grad_() for name, value in theta.items()}
    phi = {
        name: value.detach().requires_grad_()
        for name, value in adapted(loss, leaves, support, steps, 0.7, True).items()
    }
    wanted = torch.autograd.grad(loss(phi, query), list(phi.values()))
    assert_same(found.gradient, dict(zip(phi, wanted, strict=True)), 1e-12)
    assert float(found.loss) == pytest.approx(float(loss(phi, query).detach()), rel=1e-12)
    moved = sum(float((phi[name].detach() - theta[name]).square().sum()) for name in theta) ** 0.5
    assert float(found.distance) == pytest.approx(moved, rel=1e-12)
    assert (moved > 0.01) == (steps > 0)
    assert len(found.support_losses) == steps


def quadratic(params: Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """½ Σ a (θ − c)²."""
    a, c = batch
    return (a * (params["x"] - c).square()).sum() / 2


@pytest.mark.parametrize("how", [{}, {"functional": True}, {"checkpoint": True}])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_second_order_on_a_quadratic(steps: int, how: dict[str, bool]) -> None:
    """φ − c_s = (1 − α a_s)^U (θ − c_s), and dL/dθ = (1 − α a_s)^U a (φ − c)."""
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64)
    support = (torch.tensor([0.5, 3.0], dtype=torch.float64), torch.tensor([0.2, 0.4], dtype=torch.float64))
    query = (torch.tensor([2.0, 0.7], dtype=torch.float64), torch.tensor([-1.0, 0.3], dtype=torch.float64))
    loop_ = Inner(steps, 0.1, first_order=False, **how)

    def value(at: Tensor) -> float:
        return float(outer(quadratic, {"x": at}, support, query, loop_).loss)

    found = outer(quadratic, {"x": theta}, support, query, loop_)
    shrink = (1 - 0.1 * support[0]) ** steps
    phi = support[1] + shrink * (theta - support[1])
    torch.testing.assert_close(found.gradient["x"], shrink * query[0] * (phi - query[1]), rtol=1e-12, atol=0)
    h = 1e-6
    for i, e in enumerate(torch.eye(2, dtype=torch.float64)):
        differences = (value(theta + h * e) - value(theta - h * e)) / (2 * h)
        assert float(found.gradient["x"][i]) == pytest.approx(differences, rel=1e-7)
    first = outer(quadratic, {"x": theta}, support, query, Inner(steps, 0.1))
    torch.testing.assert_close(first.gradient["x"], query[0] * (phi - query[1]), rtol=1e-12, atol=0)
    assert first.support_losses[0] == pytest.approx(float(quadratic({"x": theta}, support)))
    torch.testing.assert_close(found.support_gradient["x"], support[0] * (theta - support[1]))


# ---- check 3: the alignment


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("student_steps", [0, 2])
@pytest.mark.parametrize("steps", [0, 1, 2])
@pytest.mark.parametrize(("first_order", "functional"), [(True, False), (True, True), (False, False), (False, True)])
def test_gradient_is_that_of_the_whole_objective(
    first_order: bool, functional: bool, steps: int, student_steps: int, detach: bool
) -> None:
    """Sums over tasks, squared: what no task's gradient has alone; λ large enough to be seen."""
    encoder, tasks = world()
    loss, theta = similarity_loss(encoder), inner.parameters(encoder)
    teacher = Inner(steps, 0.7, first_order, functional=functional)
    student = teacher._replace(steps=student_steps)
    wanted, value = naive(loss, theta, tasks[:2], teacher, student, 3.0, detach)
    found = ours(loss, theta, tasks[:2], teacher, student, 3.0, detach_teacher=detach)
    assert_same(found.gradient, wanted, 1e-12)
    each = [maml_align(loss, theta, sets, teacher, student).losses for sets in tasks[:2]]
    outer_losses = sum(float(one["teacher_query_loss"] + one["student_query_loss"]) for one in each) / 4
    assert outer_losses + float(found.alignment) == pytest.approx(float(value), rel=1e-12)


@pytest.mark.parametrize("first_order", [True, False])
def test_alignment_is_twice_the_gap_times_the_difference_of_gradients(first_order: bool) -> None:
    """2 λ (L_T − L_S) (∇L_T − ∇L_S), the gradients taken one by one; without the teacher's, −∇L_S is left."""
    encoder, tasks = world()
    loss, theta = similarity_loss(encoder), inner.parameters(encoder)
    loop_ = Inner(2, 0.7, first_order)
    mono, bilingual, _ = tasks[0]
    by_teacher = outer(loss, theta, mono, bilingual, loop_)
    at_theta, value, _ = inner.gradient(lambda params: (loss(params, bilingual), ()), theta)
    with_it, without = (ours(loss, theta, tasks[:1], loop_, loop_, weight).gradient for weight in (0.5, 0.0))
    gap = by_teacher.loss - value
    assert abs(gap) > 1e-3
    wanted = {name: gap * (by_teacher.gradient[name] - at_theta[name]) for name in theta}
    assert_same({name: with_it[name] - without[name] for name in theta}, wanted, 1e-12)
    alone = maml_align(loss, theta, tasks[0], loop_, loop_, detach_teacher=True)
    assert_same(alone.alignment, {name: -value for name, value in at_theta.items()}, 1e-12)
    assert_same(alone.task, maml_align(loss, theta, tasks[0], loop_, loop_).task, 0)


def test_alignment_is_nothing_where_teacher_and_student_are_the_same() -> None:
    """No inner steps: L_T = L_S at θ, whatever the other sets are."""
    encoder, tasks = world()
    loss, theta = similarity_loss(encoder), inner.parameters(encoder)
    same, other = tasks[0][1], tasks[0][2]
    for sets in ((same, same, other), tasks[0]):
        found = maml_align(loss, theta, sets, Inner(0, 0.7), Inner(0, 0.7))
        assert found.teacher == found.student
        assert all(not value.any() for value in found.alignment.values())
        both = ours(loss, theta, [sets], Inner(0, 0.7), Inner(0, 0.7), 1e6)
        assert not both.alignment
        assert_same(both.gradient, found.task, 0)


def test_student_without_steps_stays_at_theta() -> None:
    """As the paper's code has it: the student's query loss is the multilingual one at θ."""
    encoder, tasks = world()
    loss, theta = similarity_loss(encoder), inner.parameters(encoder)
    found = maml_align(loss, theta, tasks[0], Inner(2, 0.7), Inner(0, 0.7))
    assert float(found.losses["student_query_loss"]) == float(loss(theta, tasks[0][2]))
    assert float(found.student) == float(loss(theta, tasks[0][1]))
    moved = maml_align(loss, theta, tasks[0], Inner(2, 0.7), Inner(2, 0.7))
    assert moved.losses["student_query_loss"] != found.losses["student_query_loss"]
    assert float(moved.student) == pytest.approx(float(found.student), rel=1e-12)
    assert_same(moved.alignment, found.alignment, 1e-12)


# ---- check 4: the student's support


@pytest.mark.parametrize("student_steps", [0, 1, 3])
def test_the_student_learns_from_the_teacher_s_query_set(student_steps: int) -> None:
    """The very tensors: seen where the loss is called."""
    encoder, tasks = world()
    loss, theta = similarity_loss(encoder), inner.parameters(encoder)
    mono, bilingual, multilingual = sets = tasks[0]
    seen: list[Any] = []

    def spied(params: Params, batch: Any) -> Tensor:
        seen.append(batch)
        return loss(params, batch)

    maml_align(spied, theta, sets, Inner(2, 0.7), Inner(student_steps, 0.7))
    if student_steps:
        wanted = [mono, mono, bilingual, *[bilingual] * student_steps, multilingual]
    else:
        wanted = [mono, mono, bilingual, multilingual, bilingual]
    assert [id(batch) for batch in seen] == [id(batch) for batch in wanted]


# ---- check 5: triplets


def test_triplet_loss_of_collapsed_embeddings_is_the_margin() -> None:
    rows = torch.ones(6, 3) * torch.tensor([0.3, -1.0, 2.0])
    for margin in (1.0, 0.25):
        assert float(triplet_loss(Rows(), margin)({"rows": rows}, triplets_batch(2))) == margin


def test_triplet_loss_by_hand() -> None:
    """In the plane, without normalising: q = 0, a at 0.5, n at 1 gives 0.5; n at 1.5 or farther 0."""
    rows = torch.zeros(9, 2)
    rows[[3, 5, 7], 0] = 0.5
    rows[[4, 6, 8], 1] = torch.tensor([1.0, 1.5, 9.0])
    loss = triplet_loss(Rows(unit=False))
    assert float(loss({"rows": rows}, triplets_batch(3))) == pytest.approx(0.5 / 3, abs=1e-6)
    leaf = rows.clone().requires_grad_()
    loss({"rows": leaf}, triplets_batch(3)).backward()
    assert leaf.grad is not None
    assert leaf.grad[[3, 4]].any()
    assert not leaf.grad[7:].any()  # clipped


def test_triplet_loss_is_torch_s() -> None:
    rows = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(rows, dim=-1)
    for margin in (1.0, 0.3):
        found = triplet_loss(Rows(), margin)({"rows": rows}, triplets_batch(20))
        wanted = torch.nn.TripletMarginLoss(margin)(unit[:20], unit[20::2], unit[21::2])
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
        by_cosine = [
            max(0.0, margin + math.sqrt(2 - 2 * float(q @ a)) - math.sqrt(2 - 2 * float(q @ n)))
            for q, a, n in zip(unit[:20], unit[20::2], unit[21::2], strict=True)
        ]
        assert float(found) == pytest.approx(sum(by_cosine) / 20, abs=1e-5)


# ---- check 8: similarity


def test_similarity_loss_by_hand() -> None:
    """Cosines 0, 1 and 0.6 against scores 0.2, 1 and 0: (0.04 + 0 + 0.36) / 3."""
    rows = torch.tensor([[1.0, 0], [2, 0], [3, 0], [0, 5], [7, 0], [3, 4]])
    loss = similarity_loss(Rows())
    batch = pairs_batch(3, torch.tensor([0.2, 1.0, 0.0]))
    assert float(loss({"rows": rows}, batch)) == pytest.approx(0.4 / 3, rel=1e-6)
    weighed = pairs_batch(3, torch.tensor([0.2, 1.0, 0.0]), torch.tensor([1.0, 1.0, 0.0]))
    assert float(loss({"rows": rows}, weighed)) == pytest.approx(0.02, rel=1e-6)


def test_scores_are_divided_by_five() -> None:
    one = learner(CONFIG)
    for task, sets in zip(one.sampler.draw(0), one.sampler.batch(0), strict=True):
        for drawn, batch in zip(task, sets, strict=True):
            wanted = scored().train.texts["de", "de"][2][drawn.rows] / 5
            np.testing.assert_allclose(batch["scores"].numpy(), wanted, rtol=1e-6)


@pytest.mark.parametrize("model", ["static", "tiny"])
def test_swapping_the_sentences_changes_nothing(model: str) -> None:
    one = learner(replace(CONFIG, model=model))
    theta, batch = theta_of(one), one.sampler.batch(0)[0][2]
    count = len(batch["scores"])
    swapped = {name: torch.cat([ids[count:], ids[:count]]) for name, ids in batch["tokens"].items()}
    found = one.loss(theta, {**batch, "tokens": swapped})
    torch.testing.assert_close(found, one.loss(theta, batch), rtol=1e-6, atol=0)


# ---- padding, in a sentence and in a batch


@pytest.mark.parametrize("model", ["static", "tiny"])
def test_padding_changes_nothing(model: str) -> None:
    """Check 9 of the card: three tokens more, masked; whichever tokens they are, in the static encoder."""
    one = learner(replace(CONFIG, model=model))
    theta, encoder = theta_of(one), one.encoder
    assert isinstance(encoder, DualEncoder)
    tokens = one.sampler.batch(0)[0][0]["tokens"]
    assert not tokens["attention_mask"].all()
    wanted = encoder.embed(theta, tokens)
    for filler in (encoder.padding or 0, 7):
        longer = {
            "input_ids": F.pad(tokens["input_ids"], (0, 3), value=filler),
            "attention_mask": F.pad(tokens["attention_mask"], (0, 3)),
        }
        torch.testing.assert_close(encoder.embed(theta, longer), wanted, rtol=0, atol=1e-6)
    shortest = int(tokens["attention_mask"][0].sum())
    alone = {name: value[:1, :shortest] for name, value in tokens.items()}
    torch.testing.assert_close(encoder.embed(theta, alone), wanted[:1], rtol=0, atol=1e-6)


def test_rows_of_weight_zero_change_nothing() -> None:
    """Sets of 4 and of 12 triplets, stacked: each has the loss and the gradient that it has alone."""
    learners = [learner(replace(CONFIG, queries=one, negatives=one), "questions") for one in (2, 3)]
    sets = [one.sampler.batch(0)[0][1] for one in learners]
    loss, theta = learners[1].loss, theta_of(learners[1])
    stacked = stack(sets)
    assert stacked["weight"].tolist() == [[1] * 4 + [0] * 5, [1] * 9]
    assert (stacked["candidates"]["attention_mask"].sum(-1) > 0).all()
    for i, alone in enumerate(sets):
        held = {
            name: {key: part[i] for key, part in value.items()} if isinstance(value, dict) else value[i]
            for name, value in stacked.items()
        }
        found, value, _ = inner.gradient(lambda params, held=held: (loss(params, held), ()), theta)
        wanted, expected, _ = inner.gradient(lambda params, alone=alone: (loss(params, alone), ()), theta)
        torch.testing.assert_close(value, expected)
        assert_same(found, wanted)


def test_pairs_of_weight_zero_change_nothing() -> None:
    rows = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    scores, loss = torch.rand(5, generator=torch.Generator().manual_seed(1)), similarity_loss(Rows())
    weight = torch.tensor([1.0, 0, 1, 1, 0])
    kept = torch.tensor([0, 2, 3])
    few = {"tokens": {"row": torch.cat([kept, 5 + kept])}, "scores": scores[kept], "weight": torch.ones(3)}
    found, value, _ = inner.gradient(lambda p: (loss(p, pairs_batch(5, scores, weight)), ()), {"rows": rows})
    wanted, expected, _ = inner.gradient(lambda p: (loss(p, few), ()), {"rows": rows})
    torch.testing.assert_close(value, expected)
    assert_same(found, wanted)
    assert not found["rows"][[1, 4, 6, 9]].any()


# ---- the cut table, and all tasks at once


def folder_of(kind: str, folder: Path) -> str:
    """A transformer as initialised, in which <pad> is 1 and places of tokens are counted from it."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    part = scored().train
    words = sorted({word for one, two, _ in part.texts.values() for text in (*one, *two) for word in text.split()})
    vocabulary = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("</s>", 2), ("<s>", 0))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        cls_token="<s>", sep_token="</s>", model_max_length=20,
    )  # fmt: skip
    shape = {
        "vocab_size": len(vocabulary), "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 12, "max_position_embeddings": 24, "pad_token_id": 1,
    }  # fmt: skip
    torch.manual_seed(0)
    if kind == "xlm-r":
        network: Any = transformers.XLMRobertaModel(transformers.XLMRobertaConfig(**shape), add_pooling_layer=False)
    else:
        network = transformers.MPNetModel(transformers.MPNetConfig(**shape), add_pooling_layer=False)
    with quiet():
        network.save_pretrained(folder)
        fast.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("model", ["static", "tiny", "xlm-r", "mpnet"])
def test_the_cut_table_is_exact(model: str, learned: bool, tmp_path: Path) -> None:
    """Sums of losses and gradients are those of the tasks one by one with the whole table, through torch.autograd."""
    name = folder_of(model, tmp_path) if model in ("xlm-r", "mpnet") else model
    one = learner(replace(CONFIG, model=name, learn_inner_lr=learned, kd_lambda=2.0))
    encoder, tasks, theta = one.encoder, one.sampler.batch(0), theta_of(one)
    assert isinstance(encoder, DualEncoder)
    assert encoder.padding == {"static": None, "tiny": 0}.get(model, 1)
    assert (RATE + encoder.table in theta) == learned
    for task in tasks:
        used, sets = encoder.cut(task)
        assert used is not None
        assert len(used) < len(theta[encoder.table])
        for before, after in zip(task, sets, strict=True):  # the same tokens at other places, <pad> at its own
            assert torch.equal(used[after["tokens"]["input_ids"]], before["tokens"]["input_ids"])
            assert torch.equal(after["tokens"]["attention_mask"], before["tokens"]["attention_mask"])
            if encoder.padding is not None:
                padded = before["tokens"]["input_ids"] == encoder.padding
                assert torch.equal(after["tokens"]["input_ids"] == encoder.padding, padded)
    loop_ = Inner(2, 0.5)
    each = [maml_align(one.loss, theta, task, loop_, loop_) for task in tasks]
    task_sum, alignment, totals = one.gradients(tasks, one.objective(0))
    for found, part in ((task_sum, "task"), (alignment, "alignment")):
        wanted = {name: torch.stack([getattr(own, part)[name] for own in each]).sum(0) for name in theta}
        assert_same(found, wanted)
    for part in ("teacher", "student", "distance"):
        assert float(totals[part]) == pytest.approx(sum(float(getattr(own, part)) for own in each), rel=1e-5)
    for part, value in each[0].losses.items():
        assert float(totals[part]) == pytest.approx(float(value) + float(each[1].losses[part]), rel=1e-5)
    touched = task_sum[encoder.table].abs().sum(1) > 0
    seen = torch.cat([batch["tokens"]["input_ids"].flatten() for task in tasks for batch in task])
    assert set(touched.nonzero().flatten().tolist()) <= set(seen.tolist())


@pytest.mark.parametrize("model", ["tiny", "xlm-r", "mpnet"])
def test_padding_keeps_its_row_where_no_text_is_padded(model: str, tmp_path: Path) -> None:
    """Else the first token of the cut table would be taken for it, and have no place and no gradient."""
    one = learner(replace(CONFIG, model=folder_of(model, tmp_path) if model != "tiny" else model))
    encoder, theta = one.encoder, theta_of(one)
    assert isinstance(encoder, DualEncoder)
    ids = [np.array([5, 9, 6, 7]), np.array([11, 5, 8, 6])]  # no ends either
    batch = {"tokens": encoder.pad(ids), "scores": torch.tensor([0.3]), "weight": torch.ones(1)}
    used, (placed,) = encoder.cut([batch])
    assert used is not None
    assert encoder.padding in used.tolist()
    cut = {**theta, encoder.table: theta[encoder.table][used]}
    torch.testing.assert_close(
        encoder.embed(cut, placed["tokens"]), encoder.embed(theta, batch["tokens"]), rtol=0, atol=1e-6
    )
    found, _, _ = inner.gradient(lambda params: (one.loss(params, placed), ()), cut)
    wanted, _, _ = inner.gradient(lambda params: (one.loss(params, batch), ()), theta)
    whole = torch.zeros_like(theta[encoder.table]).index_add_(0, used, found[encoder.table])
    assert_same({**found, encoder.table: whole}, wanted)


def test_a_table_whose_padding_is_far_down_is_not_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    one = learner(replace(CONFIG, model="tiny"))
    tasks = one.sampler.batch(0)
    wanted = combined(one, tasks)
    monkeypatch.setattr("maml_align.model.TABLE_HEAD", 0)
    assert isinstance(one.encoder, DualEncoder)
    assert one.encoder.cut(tasks[0])[0] is None
    assert_same(combined(one, tasks).gradient, wanted.gradient)


METHODS: dict[str, dict[str, Any]] = {
    "maml-align": {}, "second order": {"first_order": False}, "learned rates": {"learn_inner_lr": True},
    "student without steps": {"student_steps": 0}, "teacher alone": {"teacher_steps": 5},
    "maml": {"method": "maml", "mode": "MONO_BIL"}, "reptile": {"method": "reptile", "mode": "BIL_MULTI"},
    "fine-tune": {"method": "fine-tune"},
}  # fmt: skip


@pytest.mark.parametrize("changes", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("kind", ["pairs", "questions", "vectors"])
def test_all_tasks_at_once_are_the_tasks_one_by_one(
    kind: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = learner(replace(ROTATIONS if kind == "vectors" else CONFIG, task_batch=3, **changes), kind)
    tasks, objective = one.sampler.batch(0), one.objective(0)
    task, alignment, totals = one.gradients(tasks, objective)
    each = [one.gradients([own], objective) for own in tasks]
    assert_same(task, {name: sum(own[0][name] for own in each) for name in task})
    assert set(alignment) == (set(task) if changes.get("method") is None and "teacher_steps" not in changes else set())
    for name, value in alignment.items():
        torch.testing.assert_close(value, sum(own[1][name] for own in each), rtol=1e-4, atol=1e-6)
    for name, value in totals.items():
        assert float(value) == pytest.approx(sum(float(own[2][name]) for own in each), rel=1e-5, abs=1e-7)
    if kind == "vectors":  # torch.autograd and no vmap
        monkeypatch.setattr(one.encoder, "vectorises", False, raising=False)
        plain = one.gradients(tasks, one.objective(0))
        assert_same(plain[0], task)
        for name, value in alignment.items():
            torch.testing.assert_close(value, plain[1][name], rtol=1e-4, atol=1e-6)


# ---- Reptile, learned rates, checkpointing


@pytest.mark.parametrize("functional", [False, True])
def test_reptile_of_one_step_is_sgd(functional: bool) -> None:
    """Check 10 of the card: (θ − φ) / α is the gradient; of two steps the sum of those on the two sets in turn."""
    encoder, tasks = world()
    loss, theta = similarity_loss(encoder), inner.parameters(encoder)
    one, other, _ = tasks[0]
    found = baselines.reptile(loss, theta, [one], Inner(1, 0.3, functional=functional))
    wanted, value, _ = inner.gradient(lambda params: (loss(params, one), ()), theta)
    assert_same(found.task, wanted, 1e-12)
    assert float(found.losses["query_loss"]) == pytest.approx(float(value), rel=1e-12)
    two = baselines.reptile(loss, theta, [one, other], Inner(2, 0.3, functional=functional))
    phi = {name: theta[name] - 0.3 * wanted[name] for name in theta}
    second, _, _ = inner.gradient(lambda params: (loss(params, other), ()), phi)
    assert_same(two.task, {name: wanted[name] + second[name] for name in theta}, 1e-12)


@pytest.mark.parametrize("functional", [False, True])
def test_gradients_of_learned_rates_by_finite_differences(functional: bool) -> None:
    """Meta-SGD, through two steps, of MAML-Align's whole objective; and in first order by autograd."""
    encoder, tasks = world()
    loss = similarity_loss(encoder)
    weights = inner.parameters(encoder)
    generator = torch.Generator().manual_seed(0)
    theta = weights | {
        RATE + name: 0.2 + torch.rand(value.shape, generator=generator, dtype=torch.float64)
        for name, value in weights.items()
    }
    loop_ = Inner(2, 0.0, first_order=False, functional=functional)
    found = ours(loss, theta, tasks[:2], loop_, loop_, 2.0).gradient
    h = 1e-6
    for name, places in ((RATE + "shared", [(0, 0), (1, 3)]), (RATE + "languages", [(0, 1, 1), (2, 0, 3)])):
        for place in places:
            values = []
            for sign in (h, -h):
                moved = theta[name].clone()
                moved[place] += sign
                values.append(naive(loss, {**theta, name: moved}, tasks[:2], loop_, loop_, 2.0)[1])
            wanted = float(values[0] - values[1]) / (2 * h)
            assert abs(wanted) > 1e-6
            assert float(found[name][place]) == pytest.approx(wanted, rel=1e-5, abs=1e-9)
    first = loop_._replace(first_order=True)
    wanted_first, _ = naive(loss, theta, tasks[:2], first, first, 2.0)
    assert_same(ours(loss, theta, tasks[:2], first, first, 2.0).gradient, wanted_first, 1e-12)


def test_checkpointing_changes_no_gradient() -> None:
    """Second order of a BERT: with inner steps computed again, without, and in one naive graph."""
    config = replace(CONFIG, model="tiny", first_order=False, task_batch=1, kd_lambda=2.0)
    one, other = learner(config), learner(replace(config, checkpointing=True))
    tasks = one.sampler.batch(0)
    wanted = combined(one, tasks).gradient
    assert_same(combined(other, tasks).gradient, wanted)
    loop_ = Inner(2, 0.5, first_order=False)
    assert_same(naive(one.loss, theta_of(one), tasks, loop_, loop_, 2.0)[0], wanted)
    first = learner(replace(config, first_order=True))
    assert any((combined(first, tasks).gradient[name] - value).abs().max() > 1e-4 for name, value in wanted.items())


def test_checkpointing_is_for_transformers() -> None:
    """A whole meta-batch at once has nothing to save: refused before training, not in its first step."""
    with pytest.raises(UserError, match="--checkpointing is for transformers"):
        learner(replace(CONFIG, first_order=False, checkpointing=True))


# ---- sums


def test_combine_by_hand() -> None:
    """Two tasks, Σ∇ = (6, 8), Σ∇(L_T − L_S) = (0, 5), gap 0.2, λ = 3: (3, 4) + 1.2 (0, 5), 3 · 0.04, and 6 / 5."""
    task = {"x": torch.tensor([6.0]), "y": torch.tensor([[8.0]])}
    alignment = {"x": torch.tensor([0.0]), "y": torch.tensor([[5.0]])}
    for sign in (1, -1):
        found = combine(task, alignment, torch.tensor(sign * 0.2), 2, 3.0)
        assert found.gradient["x"].tolist() == [3]
        assert found.gradient["y"].item() == pytest.approx(4 + sign * 6)
        assert float(found.alignment) == pytest.approx(0.12)
        assert float(found.share) == pytest.approx(1.2)
    for nothing in (combine(task, alignment, torch.tensor(0.2), 2, 0.0), combine(task, {}, torch.tensor(0.2), 2, 3.0)):
        assert (nothing.gradient["x"].item(), nothing.gradient["y"].item()) == (3, 4)
        assert (float(nothing.alignment), float(nothing.share)) == (0, 0)


def test_a_step_logs_what_it_did() -> None:
    """Means over tasks, λ (Σ L_T − Σ L_S)², its share in percent, and the loss, their sum."""
    one = learner(replace(CONFIG, kd_lambda=2.0))
    tasks = one.sampler.batch(0)
    _, _, sums = one.gradients(tasks, one.objective(0))
    wanted = combined(one, tasks)
    row = one.step(0)
    gap = float(sums["teacher_query_loss"] - sums["student_support_loss"])
    assert float(row["alignment_loss"]) == pytest.approx(2 * gap**2, rel=1e-4)
    assert float(row["kd_share"]) == pytest.approx(100 * float(wanted.share), rel=1e-4)
    assert float(row["teacher_query_loss"]) == pytest.approx(float(sums["teacher_query_loss"]) / 2)
    outer_loss = float(row["teacher_query_loss"] + row["student_query_loss"]) / 2
    assert float(row["loss"]) == pytest.approx(outer_loss + 2 * gap**2, rel=1e-4)
    norm = sum(float(value.square().sum()) for value in wanted.gradient.values()) ** 0.5
    assert float(row["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_a_step_is_adamw_s() -> None:
    """The first moves each parameter by the outer rate against its gradient's sign."""
    one = learner(replace(CONFIG, model="tiny", outer_lr=1e-3))
    before, gradient = theta_of(one), combined(one, one.sampler.batch(0)).gradient
    one.step(0)
    for name, value in one.theta.items():
        sure = gradient[name].abs() > 1e-4
        torch.testing.assert_close(
            (before[name] - value.detach())[sure], 1e-3 * gradient[name].sign()[sure], rtol=1e-3, atol=1e-6
        )
