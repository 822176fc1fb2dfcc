"""Objective and scores against numbers worked out by hand, Hugging Face's loss and toy distributions (the card's exact
checks 1 to 10)."""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from flipped_learning import data
from flipped_learning.config import Config
from flipped_learning.flipping import (
    IGNORED,
    LARGEST_LOG_P,
    Batch,
    FlippedCollator,
    batch_log_probs,
    choose,
    likelihood_loss,
    loss_terms,
    probabilities,
    score,
    source_and_target,
    token_counts,
    token_log_probs,
    unlikelihood_loss,
)
from flipped_learning.model import sentinel_ids, tiny_t5, train_tokenizer
from flipped_learning.templates import BUILTIN, Instance
from metazoo.errors import UserError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, T5ForConditionalGeneration

torch.set_num_threads(1)

METHODS = ("flipped", "direct", "channel")
LABELS, INPUTS, INSTRUCTIONS = ("yes", "no", "maybe"), ("red", "green", "blue"), ("guess", "tell", "name", "choose")
CORPUS = (
    "the film was a very good bad great story with awful actors and an excellent plot which many people did not like "
    "at all Did reviewer find this movie or What is sentiment Title: Review: input: output: Question: ?"
)
WORDS = CORPUS.split()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([" ".join([CORPUS, *LABELS, *INPUTS, *INSTRUCTIONS])] * 20, 600)


@pytest.fixture(scope="module")
def model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    return tiny_t5(Config(width=16, layers=1, heads=2, feedforward=32, dropout=0.3), tokenizer).eval()


def text(length: int, rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS[:26], length))


def instances(number: int, seed: int = 0) -> list[Instance]:
    """Of one or two fields, 1 to 40 words and 2 to 6 options of 1 to 4 words."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(number):
        options = tuple(dict.fromkeys(text(int(rng.integers(1, 5)), rng) for _ in range(2 + i % 5)))
        options = (*options, "yes") if len(options) < 2 else options
        fields = tuple(text(int(rng.integers(1, 41)), rng) for _ in range(1 + i % 2))
        pieces = ("Title: ", *[" Review: "] * (len(fields) - 1), f"\n{text(int(rng.integers(1, 9)), rng)} ?")
        made.append(Instance(pieces, fields, options, int(rng.integers(len(options)))))
    return made


ONE = Instance(("Title: ", " Did the reviewer like this ?"), ("the film was great",), ("bad", "good"), 1)


class Stub(nn.Module):
    """A seq2seq model whose next token depends on the tokens seen: those of the source, and of the target so far."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.size, self.end = len(tokenizer), tokenizer.eos_token_id

    def get_encoder(self) -> Any:
        return lambda input_ids, attention_mask: SimpleNamespace(last_hidden_state=input_ids)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        return nn.functional.pad(labels[:, :-1], (1, 0)).clamp(min=0)

    def forward(
        self,
        decoder_input_ids: Tensor,
        attention_mask: Tensor,
        input_ids: Tensor | None = None,
        encoder_outputs: tuple[Tensor] | None = None,
        use_cache: bool = False,
    ) -> SimpleNamespace:
        source = input_ids if encoder_outputs is None else encoder_outputs[0]
        assert source is not None
        rows = [
            torch.stack([self.logits({*known.tolist(), *prefix[: t + 1].tolist()}) for t in range(len(prefix))])
            for known, prefix in zip(source, decoder_input_ids, strict=True)
        ]
        return SimpleNamespace(logits=torch.stack(rows))

    @abstractmethod
    def logits(self, seen: set[int]) -> Tensor:
        """Of the next token, given those seen."""


class Unigram(Stub):
    """The same distribution at each token: that of the given words and the end token, or the uniform one."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, given: dict[str, float] | None = None) -> None:
        super().__init__(tokenizer)
        self.fixed = torch.zeros(self.size)
        if given is not None:
            self.fixed[:] = -math.inf
            for word, p in given.items():
                self.fixed[tokenizer.convert_tokens_to_ids(word)] = math.log(p)

    def logits(self, seen: set[int]) -> Tensor:
        return self.fixed


class Toy(Stub):
    """P(l, x, I) by table: the first of x, I and l that has not been seen comes next, given those that have."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, joint: np.ndarray) -> None:
        super().__init__(tokenizer)
        self.joint = joint
        self.ids = [[tokenizer.convert_tokens_to_ids(f"▁{w}") for w in some] for some in (LABELS, INPUTS, INSTRUCTIONS)]
        assert tokenizer.unk_token_id not in {i for ids in self.ids for i in ids}

    def logits(self, seen: set[int]) -> Tensor:
        known = [[i for i, one in enumerate(ids) if one in seen] for ids in self.ids]
        logits = torch.full((self.size,), -math.inf)
        wanted = next((axis for axis in (1, 2, 0) if not known[axis]), None)
        if wanted is None:
            logits[self.end] = 0
            return logits
        table = self.joint
        for axis, found in enumerate(known):
            table = table.take(found or range(table.shape[axis]), axis)
        p = table.sum(tuple(axis for axis in range(3) if axis != wanted))
        logits[self.ids[wanted]] = torch.tensor(np.log(p / p.sum()), dtype=torch.float32)
        return logits


def joint(seed: int, *, uniform: bool = False) -> np.ndarray:
    """A random P(l, x, I); or one with P(l | x) = 1/3."""
    table = np.random.default_rng(seed).gamma(0.5, size=(3, 3, 4)) + 1e-3
    if uniform:
        table /= table.sum(2, keepdims=True)
    return table / table.sum()


def toys() -> list[Instance]:
    """All pairs of x and I, in this order."""
    return [Instance(("", f" {piece}"), (x,), LABELS, None) for x in INPUTS for piece in INSTRUCTIONS]


def gradients(loss: Tensor, model: nn.Module) -> tuple[Tensor, ...]:
    """By each weight, zero where there is none."""
    return torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)


def naive(model: nn.Module, source: list[int], target: list[int]) -> float:
    """log P(target | source) of one pair, without padding."""
    output = model(input_ids=torch.tensor([source]), labels=torch.tensor([target]))
    log_p = torch.log_softmax(output.logits[0].double(), -1)
    return float(log_p[range(len(target)), target].sum())


# ---- check 1: length normalisation


def test_normalising_never_changes_flipped(tokenizer: Any, model: nn.Module) -> None:
    """Check 1: all options have the same target, so that ÷ T keeps the order."""
    collator, some = FlippedCollator(tokenizer), instances(20)
    plain, normalised = (score(model, collator, some, normalise=n) for n in (False, True))
    for instance, a, b in zip(some, plain, normalised, strict=True):
        lengths = {len(collator.encode(instance, option)[1]) for option in instance.options}
        assert len(lengths) == 1
        np.testing.assert_allclose(a / lengths.pop(), b)
    assert choose(plain)[0].tolist() == choose(normalised)[0].tolist()


def test_normalising_can_change_direct(tokenizer: Any) -> None:
    """Check 1: 0.2 · 0.25 > 0.25⁴, but (0.2 · 0.25)^½ < 0.25."""
    stub = Unigram(tokenizer, {"▁yes": 0.2, "▁very": 0.25, "▁good": 0.25, "</s>": 0.25, "▁no": 0.05})
    instance = Instance(("", " Question:"), ("the film",), ("yes", "very very good"), None)
    collator = FlippedCollator(tokenizer, "direct")
    (plain,), (normalised,) = (score(stub, collator, [instance], normalise=n) for n in (False, True))
    np.testing.assert_allclose(plain, [math.log(0.2) + math.log(0.25), 4 * math.log(0.25)], atol=1e-6)
    np.testing.assert_allclose(normalised, plain / [2, 4])
    assert (plain.argmax(), normalised.argmax()) == (0, 1)


# ---- check 2: Hugging Face's loss


@pytest.mark.parametrize("method", METHODS)
def test_likelihood_is_hf_loss(method: Any, tokenizer: Any, model: nn.Module) -> None:
    """Check 2: with λ = 0, L · T = HF's `loss` · T of the right pairs, and so are the gradients."""
    batch = FlippedCollator(tokenizer, method)(instances(5))
    right, wrong, _ = token_counts(batch)
    assert right == (batch.labels != IGNORED).sum()
    ours = loss_terms(batch_log_probs(model, batch), batch).loss(right, wrong, 0.0)
    theirs = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
    assert ours.item() * right == pytest.approx(theirs.item() * right, rel=1e-6)
    for a, b in zip(gradients(ours, model), gradients(theirs, model), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_zero_weight_ignores_wrong_rows(tokenizer: Any, model: nn.Module) -> None:
    """Check 2: with λ = 0 the rows of wrong options change nothing; with λ they add λ L_UL / T_w."""
    some, collator = instances(4), FlippedCollator(tokenizer)
    wrong = [(one.label + 1) % len(one.options) for one in some]  # type: ignore[operator]
    alone, both = collator(some), collator(some, wrong)
    right, tokens, _ = token_counts(both)
    terms = loss_terms(batch_log_probs(model, both), both)
    without = loss_terms(batch_log_probs(model, alone), alone)
    assert terms.loss(right, tokens, 0.0).item() == pytest.approx(without.loss(right, 0, 0.0).item(), rel=1e-6)
    wanted = terms.likelihood / right + 0.3 * terms.unlikelihood / tokens
    assert terms.loss(right, tokens, 0.3).item() == pytest.approx(wanted.item(), rel=1e-6)
    assert without.unlikelihood.item() == 0


# ---- checks 3 to 5: the terms


def test_uniform_model(tokenizer: Any) -> None:
    """Check 3: all logits equal, so L_LM = T ln V and L_UL = −T_w ln(1 − 1/V)."""
    stub, size = Unigram(tokenizer), len(tokenizer)
    batch = FlippedCollator(tokenizer)([ONE, *instances(2)], [0, 1, 1])
    right, wrong, own = token_counts(batch)
    terms = loss_terms(batch_log_probs(stub, batch), batch)
    assert terms.likelihood.item() == pytest.approx(right * math.log(size), rel=1e-6)
    assert terms.unlikelihood.item() == pytest.approx(-wrong * math.log(1 - 1 / size), rel=1e-4)
    assert terms.log_p_right.item() == pytest.approx(-own * math.log(size), rel=1e-6)
    assert terms.log_p_wrong.item() == pytest.approx(-wrong * math.log(size), rel=1e-6)
    (scores,) = score(stub, FlippedCollator(tokenizer), [ONE])
    assert choose([scores])[0].tolist() == [0]
    assert choose([scores])[1] == 1


def at(p: float, size: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Logits whose softmax gives token 0 probability p; the others are uneven."""
    others = torch.linspace(-1, 1, size - 1, dtype=torch.float64)
    first = others.logsumexp(0) + math.log(p / (1 - p))
    return torch.cat([first[None], others]).to(dtype).requires_grad_()


def unlikelihood(logits: Tensor) -> Tensor:
    """L_UL of token 0."""
    log_p = torch.log_softmax(logits, -1)[..., 0]
    return unlikelihood_loss(log_p, torch.ones(log_p.shape, dtype=torch.bool))


@pytest.mark.parametrize("p", [1e-6, 0.01, 0.3, 0.5, 0.9, 0.999])
def test_gradient_of_unlikelihood(p: float) -> None:
    """Check 4: ∂L_UL/∂z_j = p_y (δ_jy − p_j) / (1 − p_y), by formula, autograd and finite differences."""
    logits = at(p, 7)
    (found,) = torch.autograd.grad(unlikelihood(logits), logits)
    soft = torch.softmax(logits.detach(), -1)
    unit = torch.eye(7, dtype=torch.float64)
    torch.testing.assert_close(found, p * (unit[0] - soft) / (1 - p), rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        numeric = [(unlikelihood(logits + 1e-5 * e) - unlikelihood(logits - 1e-5 * e)) / 2e-5 for e in unit]
    torch.testing.assert_close(found, torch.stack(numeric), rtol=1e-6, atol=1e-9)
    (likelihood,) = torch.autograd.grad(likelihood_loss(torch.log_softmax(logits, -1)[0]), logits)
    torch.testing.assert_close(found, -p / (1 - p) * likelihood, rtol=1e-9, atol=1e-12)
    if p == 0.5:
        torch.testing.assert_close(found, -likelihood, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("size", [2, 50])
@pytest.mark.parametrize("rest", [0.1, 1e-3, 1e-5, 2e-6, 1e-6, 3e-7, 1e-7])
def test_gradient_stays_bounded(rest: float, size: int) -> None:
    """Check 4: its norm is p (1 − p) √(1 + Σ_j≠y q_j²) / (1 − p) ≤ √2, also where float32 hardly tells p from 1."""
    logits = at(1 - rest, size, torch.float32)
    log_p = token_log_probs(logits[None, None], torch.zeros(1, 1, dtype=torch.long))
    loss = unlikelihood_loss(log_p, torch.ones(1, 1, dtype=torch.bool))
    (found,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert found.norm() <= math.sqrt(2)
    if rest > 1e-6:
        assert found[0].item() == pytest.approx(1 - rest, abs=0.1)  # up to float32's rounding of 1 − p
    assert found[0] >= 0
    assert (found[1:] <= 0).all()


def test_unlikelihood_at_the_ends() -> None:
    """Check 5: −log(1 − p) → 0 as p → 0; at and above 1 − 1e-6 it is −log 1e-6, with a finite gradient."""
    counts = torch.tensor([True])
    for log_p in (-5.0, -20.0, -50.0, -1e4):
        assert unlikelihood_loss(torch.tensor([log_p]), counts).item() == pytest.approx(
            -math.log1p(-math.exp(log_p)), abs=1e-7
        )
    for p in (1 - 1e-7, 1.0):
        log_p = torch.tensor([math.log(p)], requires_grad=True)
        loss = unlikelihood_loss(log_p, counts)
        loss.backward()
        assert loss.item() == pytest.approx(-math.log(1e-6), rel=1e-2)
        assert log_p.grad is not None
        assert log_p.grad.isfinite().all()
    assert pytest.approx(math.log(1 - 1e-6), rel=1e-9) == LARGEST_LOG_P
    logits = torch.tensor([[[1e4, 0.0, -1e4]]], requires_grad=True)
    unlikelihood_loss(token_log_probs(logits, torch.tensor([[0]])), counts[None]).backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
    assert logits.grad.norm() <= math.sqrt(2)


def test_unlikelihood_of_an_impossible_token() -> None:
    """Check 5: 0 at p = 0 itself."""
    logits = torch.tensor([[[-math.inf, 0.0, 1.0]]])
    loss = unlikelihood_loss(token_log_probs(logits, torch.tensor([[0]])), torch.tensor([[True]]))
    assert loss.item() == 0


def test_half_precision_logits() -> None:
    """Check 5: both terms of a token agree to 1e-2 between logits in bf16 and float32; they come in float32."""
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(8, 16, 20, generator=generator), torch.randint(20, (8, 16), generator=generator)
    logits.scatter_(2, labels[:, :8, None], 4.0)  # half of them likely
    full, half = token_log_probs(logits, labels), token_log_probs(logits.bfloat16(), labels)
    assert half.dtype == torch.float32
    counts = torch.ones(8, 16, dtype=torch.bool)
    assert likelihood_loss(half).item() / 128 == pytest.approx(likelihood_loss(full).item() / 128, abs=1e-2)
    a, b = (unlikelihood_loss(log_p, counts).item() / 128 for log_p in (half, full))
    assert a == pytest.approx(b, abs=1e-2)


def test_what_does_not_count() -> None:
    """No value and no gradient of tokens that do not count, even of p = 1 and p = 0; −100 is log P = 0."""
    log_p = torch.tensor([0.0, -math.inf, -1.0], requires_grad=True)
    loss = unlikelihood_loss(log_p, torch.tensor([False, False, True]))
    loss.backward()
    p = math.exp(-1)
    assert loss.item() == pytest.approx(-math.log(1 - p))
    assert log_p.grad is not None
    assert log_p.grad.tolist() == [0, 0, pytest.approx(p / (1 - p))]
    found = token_log_probs(torch.randn(1, 3, 5), torch.tensor([[1, IGNORED, IGNORED]]))
    assert found[0, 0] < 0
    assert found[0, 1:].tolist() == [0, 0]


# ---- checks 6 and 10: Bayes and the chain rule


@pytest.mark.parametrize("seed", range(3))
def test_bayes(seed: int, tokenizer: Any) -> None:
    """Check 6: log P(I | x, l) + log P(l | x) − log P(I | x) = log P(l | I, x), so that the argmax is the same."""
    table = joint(seed)
    stub = Toy(tokenizer, table)
    flipped = np.stack(score(stub, FlippedCollator(tokenizer, sentinels=False), toys()))
    direct = np.stack(score(stub, FlippedCollator(tokenizer, "direct"), toys()))
    pair = np.log(table.sum(2) / table.sum((0, 2)))  # P(l | x) [l, x]
    posterior = flipped + np.repeat(pair.T, 4, 0)
    assert posterior.argmax(1).tolist() == direct.argmax(1).tolist()
    instruction = np.log(table.sum(0) / table.sum((0, 2))[:, None]).reshape(12, 1)  # P(I | x)
    np.testing.assert_allclose(posterior - instruction, direct, atol=1e-5)
    np.testing.assert_allclose(np.exp(direct), np.moveaxis(table / table.sum(0), 0, 2).reshape(12, 3), atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_bayes_with_uniform_labels(seed: int, tokenizer: Any) -> None:
    """Check 6: P(l | x) = 1/K makes the rules coincide, and `probabilities` is P(l | I, x)."""
    stub = Toy(tokenizer, joint(seed, uniform=True))
    flipped = score(stub, FlippedCollator(tokenizer, sentinels=False), toys())
    direct = score(stub, FlippedCollator(tokenizer, "direct"), toys())
    assert choose(flipped)[0].tolist() == choose(direct)[0].tolist()
    np.testing.assert_allclose(probabilities(flipped), np.exp(direct), atol=1e-5)


@pytest.mark.parametrize("seed", range(3))
def test_channel_is_flipped_times_input(seed: int, tokenizer: Any) -> None:
    """Check 10: log P(I, x | l) = log P(I | x, l) + log P(x | l)."""
    table = joint(seed)
    stub = Toy(tokenizer, table)
    flipped = np.stack(score(stub, FlippedCollator(tokenizer, sentinels=False), toys()))
    channel = np.stack(score(stub, FlippedCollator(tokenizer, "channel"), toys()))
    x = np.log(table.sum(2) / table.sum((1, 2))[:, None])  # P(x | l) [l, x]
    np.testing.assert_allclose(channel, flipped + np.repeat(x.T, 4, 0), atol=1e-5)


# ---- check 7: scores


@pytest.mark.parametrize("method", METHODS)
def test_batches_change_nothing(method: Any, tokenizer: Any, model: nn.Module) -> None:
    """Check 7: scores of ragged lengths and numbers of options are those of each pair alone, whatever the batch."""
    some, collator = instances(12), FlippedCollator(tokenizer, method)
    assert {len(one.options) for one in some} >= {2, 3, 6}
    with torch.no_grad():
        alone = [[naive(model, *collator.encode(one, option)) for option in one.options] for one in some]
    for size in (1, 3, 64):
        found = score(model, collator, some, batch_size=size)
        assert [len(values) for values in found] == [len(one.options) for one in some]
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-4)
    assert score(model, collator, []) == []


@pytest.mark.parametrize("method", METHODS)
def test_permuting_options(method: Any, tokenizer: Any, model: nn.Module) -> None:
    """Check 7: each option is passed on its own, so that another order is another order of the scores."""
    collator, rng = FlippedCollator(tokenizer, method), np.random.default_rng(1)
    some = instances(6)
    orders = [rng.permutation(len(one.options)) for one in some]
    moved = [
        Instance(one.pieces, one.fields, tuple(one.options[k] for k in order), None)
        for one, order in zip(some, orders, strict=True)
    ]
    before, after = score(model, collator, some), score(model, collator, moved)
    for a, b, order in zip(before, after, orders, strict=True):
        np.testing.assert_allclose(b, a[order], rtol=0, atol=1e-5)


def test_passes_of_the_encoder(tokenizer: Any, model: Any) -> None:
    """Claim C4: K options cost K encoder passes for FLIPPED and CHANNEL, and one for DIRECT."""
    rows: list[int] = []
    handle = model.get_encoder().register_forward_hook(
        lambda module, args, kwargs, output: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    instance = Instance(ONE.pieces, ONE.fields, LABELS, None)
    for method in METHODS:
        score(model, FlippedCollator(tokenizer, method), [instance, instance])
    handle.remove()
    assert rows == [3, 1, 3]  # of two equal instances


def test_score_leaves_the_model(tokenizer: Any, model: nn.Module) -> None:
    """Dropout is off while scoring; the training mode comes back, no gradient is left, no random number drawn."""
    collator, some = FlippedCollator(tokenizer), instances(3)
    wanted = score(model, collator, some)
    assert not model.training
    state = torch.get_rng_state()
    model.train()
    try:
        found = score(model, collator, some)
        assert model.training
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_choose_and_probabilities() -> None:
    """Of equal scores the first is chosen, and counted; probabilities add up to 1, however unlikely all options are."""
    scores = [np.array([-3.0, -1.0, -1.0]), np.array([-2.0, -1.0]), np.array([-1e4, -1e4 - 1, -2e4])]
    best, ties = choose(scores)
    assert best.tolist() == [1, 1, 0]
    assert ties == 1
    found = probabilities(scores)
    assert [values.sum() for values in found] == pytest.approx([1, 1, 1])
    assert found[2].tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.e), 0])
    assert choose([])[0].tolist() == []


# ---- check 8: wrong options


def test_wrong_options() -> None:
    """Check 8: never the right one, each other one alike; one option or no label is refused."""
    rng = np.random.default_rng(0)
    for label in range(4):
        instance = Instance(("Question: ", ""), ("a",), ("yes", "no", "maybe", "good"), label)
        counts = np.bincount(data.wrong_options([instance] * 3000, rng), minlength=4)
        assert counts[label] == 0
        others = np.delete(counts, label)
        assert (np.abs(others - 1000) < 4 * math.sqrt(3000 * 2 / 9)).all()
    two = [Instance(("Question: ", ""), ("a",), ("yes", "no"), k % 2) for k in range(50)]
    assert data.wrong_options(two, rng) == [1 - k % 2 for k in range(50)]
    for options, label in ((("yes",), 0), (("yes", "no"), None)):
        with pytest.raises(UserError):
            data.wrong_options([Instance(("Question: ", ""), ("a",), options, label)], rng)


def test_one_option_is_no_choice(tokenizer: Any, model: nn.Module) -> None:
    """Check 8: K = 1 and K = 0 are refused."""
    for options in ((), ("yes",)):
        with pytest.raises(UserError, match="a choice needs two or more"):
            score(model, FlippedCollator(tokenizer), [Instance(ONE.pieces, ONE.fields, options, None)])


@pytest.mark.parametrize("method", METHODS)
def test_equal_options(method: Any, tokenizer: Any, model: nn.Module) -> None:
    """Options that the tokenizer does not tell apart are refused by name: more whitespace, or a cut target."""
    collator = FlippedCollator(tokenizer, method, max_target=4)
    with pytest.raises(UserError, match=r"option 'very  good' is the same tokens as another of \['yes', 'very good'"):
        score(model, collator, [Instance(ONE.pieces, ONE.fields, ("yes", "very good", "very  good"), None)])
    cut = Instance(ONE.pieces, ONE.fields, ("a very very very good film", "a very very very bad film"), None)
    if method == "direct":
        with pytest.raises(UserError, match="the same tokens"):
            score(model, collator, [cut])
    else:
        assert len(score(model, collator, [cut])[0]) == 2


# ---- check 9: texts

TEXTS = {
    "after": (("", " Did they like it?"), ("x y",), "x y <extra_id_0>", "<extra_id_0> Did they like it? <extra_id_1>"),
    "before": (("Sentiment?\n", ""), ("x",), "<extra_id_0> x", "<extra_id_0> Sentiment? <extra_id_1>"),
    "around": (
        ("Title: ", "\n\nIs it good\nor bad? "), ("x",),
        "<extra_id_0> x <extra_id_1>", "<extra_id_0> Title: <extra_id_1> Is it good\nor bad? <extra_id_2>",
    ),
    "between": (("", " Question: ", ""), ("x", "y"), "x <extra_id_0> y", "<extra_id_0> Question: <extra_id_1>"),
    "all": (
        ("Given ", ", is “", "” true?"), ("x", "y"), "<extra_id_0> x <extra_id_1> y <extra_id_2>",
        "<extra_id_0> Given <extra_id_1> , is “ <extra_id_2> ” true? <extra_id_3>",
    ),
    "adjacent": (("", " ", " Answer:"), ("x", "y"), "x y <extra_id_0>", "<extra_id_0> Answer: <extra_id_1>"),
    "lines": (("", "\nAnswer:"), ("x\ny ",), "x\ny  <extra_id_0>", "<extra_id_0> Answer: <extra_id_1>"),
    "no field": (("Say it.",), (), "<extra_id_0>", "<extra_id_0> Say it. <extra_id_1>"),
    "marks in the text": (
        ("", " Is <extra_id_1> it?"), ("a <extra_id_0> b",),
        "a < extra_id_0> b <extra_id_0>", "<extra_id_0> Is < extra_id_1> it? <extra_id_1>",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_texts_by_hand(case: str) -> None:
    """Check 9: sentinel i stands in the source where piece i was; the target has the pieces, and one sentinel more."""
    pieces, fields, source, target = TEXTS[case]
    instance = Instance(pieces, fields, ("so <extra_id_5>", "no"), None)
    found = source_and_target(instance, "so <extra_id_5>", "flipped")
    assert found == (f"input: {source}\noutput: so < extra_id_5>", target)
    bare = source_and_target(instance, "no", "flipped", sentinels=False)
    shown = " ".join(re.sub(r"<extra_id_\d+>", "", source).split(" "))
    assert " ".join(bare[0].split()) == " ".join(f"input: {shown}\noutput: no".split())
    assert bare[1] == re.sub(r" ?<extra_id_\d+> ?", " ", target).strip()
    prompt = instance.prompt.replace("<extra_id_", "< extra_id_")
    for sentinels in (True, False):
        assert source_and_target(instance, "no", "direct", sentinels=sentinels) == (prompt, "no")
        assert source_and_target(instance, "no", "channel", sentinels=sentinels) == ("no", prompt)


@pytest.mark.parametrize("pieces", [("", ""), (" ", "\n"), ("", "  ", "")])
def test_no_instruction(pieces: tuple[str, ...], tokenizer: Any) -> None:
    """FLIPPED without instruction text scores all options alike: refused; the other rules take it."""
    instance = Instance(pieces, ("x",) * (len(pieces) - 1), ("yes", "no"), 0)
    for sentinels in (True, False):
        with pytest.raises(UserError, match="no text but the fields"):
            FlippedCollator(tokenizer, sentinels=sentinels)([instance])
    assert source_and_target(instance, "yes", "direct")[1] == "yes"
    assert source_and_target(instance, "yes", "channel")[0] == "yes"


@pytest.mark.parametrize("name", BUILTIN)
def test_prompts_reassemble(name: str) -> None:
    """Check 9: pieces for sentinels give the rendered prompt of each template but for whitespace; DIRECT's is exact."""
    for template in BUILTIN[name]:
        example = {column: f"some {column}:\nquite\ta “text”." for column in template.variables}
        instance = template.apply({**example, "label": 1})
        source, target = source_and_target(instance, instance.options[1], "flipped")
        pieces = re.findall(r"<extra_id_\d+> (.*?)(?= <extra_id_)", target, re.DOTALL)
        assert len(re.findall(r"<extra_id_\d+>", target)) == len(pieces) + 1
        body, option = source.removeprefix("input: ").rsplit("\noutput: ", 1)
        for i, piece in enumerate(pieces):
            assert body.count(f"<extra_id_{i}>") == 1
            body = body.replace(f"<extra_id_{i}>", piece)
        assert "".join(body.split()) == "".join(instance.prompt.split())
        assert option == instance.options[1]
        assert source_and_target(instance, option, "direct")[0] == instance.prompt
        assert all(value in instance.prompt for value in example.values())


# ---- batches


def test_ids_of_a_batch(tokenizer: Any) -> None:
    """Right rows come before wrong ones; sources and targets are those of the texts, padded by pad and −100."""
    other = Instance(("", " Did the reviewer like this movie or not ?"), ("bad",), ("very good", "bad"), 0)
    collator = FlippedCollator(tokenizer)
    batch = collator([ONE, other], [0, 1])
    assert batch.wrong.tolist() == [False, False, True, True]
    expected = [(ONE, "good"), (other, "very good"), (ONE, "bad"), (other, "bad")]
    for row, (instance, option) in enumerate(expected):
        source, target = (tokenizer(one)["input_ids"] for one in source_and_target(instance, option, "flipped"))
        length = len(source)
        assert batch.input_ids[row].tolist() == source + [tokenizer.pad_token_id] * (batch.input_ids.shape[1] - length)
        assert batch.attention_mask[row].tolist() == [i < length for i in range(batch.input_ids.shape[1])]
        assert batch.labels[row].tolist() == target + [IGNORED] * (batch.labels.shape[1] - len(target))
    assert batch.input_ids.shape[1] > len(tokenizer(source_and_target(other, "bad", "flipped")[0])["input_ids"])
    with pytest.raises(UserError, match="no label"):
        collator([Instance(ONE.pieces, ONE.fields, ONE.options, None)])


def test_instruction_tokens_count(tokenizer: Any) -> None:
    """In the unlikelihood neither sentinels nor the end token nor padding count, unless they are asked for."""
    short = Instance(("", " ?"), ("a",), ("yes", "no"), 0)
    marks = {*sentinel_ids(tokenizer), tokenizer.eos_token_id, IGNORED}
    batch = FlippedCollator(tokenizer)([ONE, short], [0, 1])
    assert batch.counted.tolist() == [[label not in marks for label in row] for row in batch.labels.tolist()]
    pieces = [tokenizer(piece.strip(), add_special_tokens=False)["input_ids"] for piece in ONE.pieces]
    own = sum(map(len, pieces)) + 1  # of ONE, and "?"
    assert token_counts(batch) == (own + 3 + 1 + 2 + 1, own, own)
    with_marks = FlippedCollator(tokenizer, unlikelihood_on_sentinels=True)([ONE, short], [0, 1])
    assert torch.equal(with_marks.counted, with_marks.labels != IGNORED)
    assert token_counts(with_marks) == (own + 7, own + 7, own + 7)
    log_p = torch.full(batch.labels.shape, math.log(0.5))
    for one, tokens in ((batch, own), (with_marks, own + 7)):
        assert loss_terms(log_p, one).unlikelihood.item() == pytest.approx(tokens * math.log(2), rel=1e-6)
    moved = torch.where(batch.counted, log_p, -0.1)
    assert torch.equal(loss_terms(moved, batch).unlikelihood, loss_terms(log_p, batch).unlikelihood)


def test_an_unknown_word_counts(tokenizer: Any) -> None:
    """<unk> is a special token, but it stands for a word of the instruction."""
    batch = FlippedCollator(tokenizer)([Instance(("", " ☃ ?"), ("a",), ("yes", "no"), 0)])
    assert batch.labels.eq(tokenizer.unk_token_id).any()
    assert batch.counted[batch.labels == tokenizer.unk_token_id].all()


@pytest.mark.parametrize("cut", [1, 3, 12])
def test_parts_add_up(cut: int, tokenizer: Any, model: nn.Module) -> None:
    """Terms, tokens and gradients of a batch are the sums over its rows, or over any parts of it."""
    some = instances(6)
    wrong = [(one.label + 1) % len(one.options) for one in some]  # type: ignore[operator]
    whole = FlippedCollator(tokenizer)(some, wrong)
    assert len(whole.labels) == 12
    right, tokens, own = token_counts(whole)
    terms = loss_terms(batch_log_probs(model, whole), whole)
    wanted = gradients(terms.loss(right, tokens, 0.7), model)
    order = np.random.default_rng(cut).permutation(12)
    parts: list[Batch] = [whole.take(order[k::cut]) for k in range(cut)]
    assert [sum(n) for n in zip(*map(token_counts, parts), strict=True)] == [right, tokens, own]
    found = [torch.zeros_like(w) for w in model.parameters()]
    sums = np.zeros(4)
    for part in parts:
        one = loss_terms(batch_log_probs(model, part), part)
        for total, g in zip(found, gradients(one.loss(right, tokens, 0.7), model), strict=True):
            total += g
        sums += [v.item() for v in (one.likelihood, one.unlikelihood, one.log_p_right, one.log_p_wrong)]
    whole_sums = [v.item() for v in (terms.likelihood, terms.unlikelihood, terms.log_p_right, terms.log_p_wrong)]
    np.testing.assert_allclose(sums, whole_sums, rtol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_both_terms_train_all_weights(tokenizer: Any, model: nn.Module) -> None:
    """Nothing is detached: each term alone has a gradient in each weight; the reported log P have none."""
    batch = FlippedCollator(tokenizer)(instances(3), [0, 0, 0])
    for name in ("likelihood", "unlikelihood"):
        terms = loss_terms(batch_log_probs(model, batch), batch)
        found = zip(model.named_parameters(), gradients(getattr(terms, name), model), strict=True)
        assert [weight for (weight, _), g in found if not g.any()] == []
        assert not terms.log_p_right.requires_grad
        assert not terms.log_p_wrong.requires_grad


# ---- lengths

LONG = Instance(
    ("Title: ", " Review: ", " Did the reviewer like this ?"),
    (" ".join(["very good film"] * 4), " ".join(["bad story and awful plot"] * 6)),
    ("very excellent", "bad"),
    0,
)


@pytest.mark.parametrize("method", ["flipped", "direct"])
def test_a_long_source_loses_instance_text(method: Any, tokenizer: Any) -> None:
    """Instruction's sentinels and option stay, fields keep their beginning, the longest loses first; it is counted."""
    whole = tokenizer(source_and_target(LONG, "very excellent", method)[0])["input_ids"]
    target = tokenizer(source_and_target(LONG, "very excellent", method)[1])["input_ids"]
    for size in (len(whole), len(whole) - 1, len(whole) - 8, len(whole) - 30, len(whole) - 38):
        collator = FlippedCollator(tokenizer, method, max_source=size)
        ids, labels = collator.encode(LONG, "very excellent")
        assert size - 1 <= len(ids) <= size
        assert labels == target
        assert collator.shortened == (size < len(whole))
        shown = tokenizer.decode(ids)
        if method == "flipped":
            kept = re.fullmatch(
                r"input: ?<extra_id_0> ?(.+?) ?<extra_id_1> ?(.+?) ?<extra_id_2> ?output: very excellent ?</s>", shown
            )
        else:
            kept = re.fullmatch(r"Title: (.+) Review: (.+) Did the reviewer like this \? ?</s>", shown)
        assert kept is not None
        assert all(field.startswith(part) for field, part in zip(LONG.fields, kept.groups(), strict=True))
        if size > len(whole) - 15:
            assert kept[1] == LONG.fields[0]
    assert len(FlippedCollator(tokenizer, method, max_source=len(whole) - 1)([LONG, LONG]).input_ids) == 2


def test_a_long_source_of_one_long_word(tokenizer: Any) -> None:
    """A field of one long word has nothing to lose; the other has, though it has fewer characters."""
    instance = Instance(("", " Question: ", " ?"), ("excellent", "a a a a"), ("yes", "no"), 0)
    whole = tokenizer(source_and_target(instance, "yes", "flipped")[0])["input_ids"]
    assert len(tokenizer("excellent")["input_ids"]) == 2
    ids, _ = FlippedCollator(tokenizer, max_source=len(whole) - 2).encode(instance, "yes")
    assert len(ids) <= len(whole) - 2


@pytest.mark.parametrize("method", METHODS)
def test_nothing_left_to_lose(method: Any, tokenizer: Any) -> None:
    """Instruction and option (CHANNEL: the option) that alone exceed max_source are refused, whatever the fields."""
    option = " ".join(["very good"] * 12)
    for fields in (("a",), ("the film",), ("☃☃☃",), ("",)):
        pieces = ("", f" {option} ?" if method == "direct" else " Question:")
        instance = Instance(pieces, fields, (option, "no"), 0)
        with pytest.raises(UserError, match="more than --max-source 16"):
            FlippedCollator(tokenizer, method, max_source=16)([instance])


def test_a_cut_target(tokenizer: Any) -> None:
    """A long target loses its end, and is counted."""
    target = tokenizer(source_and_target(ONE, "good", "flipped")[1])["input_ids"]
    for size in (4, len(target) - 1, len(target)):
        collator = FlippedCollator(tokenizer, max_target=size)
        batch = collator([ONE], [0])
        assert batch.labels.tolist() == [target[:size]] * 2
        assert collator.cut == 2 * (size < len(target))
        assert collator.shortened == 0


def test_pieces_and_sentinels(tokenizer: Any) -> None:
    """n pieces need n + 1 sentinels: with 100 of them 99 pieces pass and 100 do not, but they do as plain text."""

    def of(pieces: int) -> Instance:
        return Instance(("good",) * pieces, ("bad",) * (pieces - 1), ("yes", "no"), 0)

    collator = FlippedCollator(tokenizer, max_target=512)
    source, target = collator.encode(of(99), "yes")
    marks = sentinel_ids(tokenizer)
    assert len(marks) == 100
    assert [i for i in source if i in marks] == marks[:99]
    assert [i for i in target if i in marks] == marks
    with pytest.raises(UserError, match="in 100 pieces, the tokenizer has 100 sentinels"):
        collator.encode(of(100), "yes")
    FlippedCollator(tokenizer, sentinels=False).encode(of(100), "yes")
    FlippedCollator(tokenizer, "direct").encode(of(100), "yes")
