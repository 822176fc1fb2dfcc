"""The bag of words against the three rules written as loops over texts, options and words."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from flipped_learning.minimodel import UNKNOWN, BagOfWords, build_vocabulary, words

torch.set_num_threads(1)

METHODS = ("flipped", "direct", "channel")
VOCABULARY = {word: i for i, word in enumerate(["film", "good", "bad", "great", "awful", "the", "plot", "it's"], 1)}
TEXTS = ("The film: GOOD, good!", "", "awful plot", "xyzzy", "it's the xyzzy film", "?!")
OPTIONS = ("good", "bad", "great", "xyzzy", "very awful")


def bag(method: str, *, tied: bool = False, seed: int = 0, width: int = 5) -> BagOfWords:
    """With all weights at random, in float64."""
    torch.manual_seed(seed)
    made = BagOfWords(VOCABULARY, width, method, tied=tied).double()  # type: ignore[arg-type]
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn_like(p))
    return made


def ids(text: str) -> list[int]:
    cleaned = "".join(c if c.isalnum() or c == "'" else " " for c in text.lower()).split()
    return [VOCABULARY.get(word, 0) for word in cleaned] or [0]


def naive(model: BagOfWords, text: str, label: int) -> float:
    """log P of one text and one label, from the module's docstring."""
    E, M, U = (w.detach().numpy() for w in (model.embedding.weight, model.match, model.output.weight))
    found = ids(text)
    if model.method == "channel":
        logits = [U[w] @ M @ E[label] for w in range(len(E))]
        total = math.log(sum(math.exp(z) for z in logits))
        return sum(logits[w] - total for w in found)
    h = sum(E[w] for w in found) / math.sqrt(len(found))
    if model.method == "flipped":
        return -math.log(1 + math.exp(-(h @ M @ E[label])))
    logits = [h @ M @ U[w] for w in range(len(E))]
    return float(logits[label] - math.log(sum(math.exp(z) for z in logits)))


def test_words() -> None:
    """Lower-case words of letters, digits and apostrophes; everything else divides."""
    assert words("It's a GOOD-ish film, 10/10!\n(no…)") == ["it's", "a", "good", "ish", "film", "10", "10", "no"]
    assert words(" ?! ") == []


def test_build_vocabulary() -> None:
    """The most frequent words, then the alphabet; words that must be in come last, and once; id 0 is left free."""
    texts = ["b a c", "c b", "C d"]
    assert build_vocabulary(texts, 3) == {"c": 1, "b": 2, "a": 3}
    assert build_vocabulary(iter(texts), 99) == {"c": 1, "b": 2, "a": 3, "d": 4}
    assert build_vocabulary(texts, 2, ["b", "z", "d"]) == {"c": 1, "b": 2, "z": 3, "d": 4}
    assert build_vocabulary([], 2, ["good", "bad"]) == {"good": 1, "bad": 2}


def test_build_vocabulary_of_repeated_words() -> None:
    """A word that two pairs of labels share has one id, and all ids are rows of the embedding."""
    found = build_vocabulary(["b"], 1, ["good", "bad", "good"])
    assert found == {"b": 1, "good": 2, "bad": 3}


def test_ids() -> None:
    """All words in a row with the text of each; an empty text and unknown words are word 0."""
    flat, owner = bag("flipped").ids(TEXTS)
    assert flat.tolist() == [i for text in TEXTS for i in ids(text)]
    assert owner.tolist() == [i for i, text in enumerate(TEXTS) for _ in ids(text)]
    assert owner.tolist() == [0] * 4 + [1] + [2] * 2 + [3] + [4] * 4 + [5]
    assert flat[4:5].tolist() == [UNKNOWN]


def test_word() -> None:
    """A label is its first known word."""
    model = bag("flipped")
    wanted = {"good": 2, " GOOD ": 2, "xyzzy": 0, "very awful film": 5, "": 0}
    assert {label: model.word(label) for label in wanted} == wanted


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_rules(method: str, tied: bool) -> None:
    """log P(I | x, l) = log σ(hᵀ M E[l]); P(l | x) and P(x | l) by softmax over the vocabulary; tied: U = E."""
    model = bag(method, tied=tied)
    assert (model.output is model.embedding) == (tied or method == "flipped")
    labels = np.random.default_rng(0).integers(len(VOCABULARY) + 1, size=(len(TEXTS), 3))
    found = model.log_probs(*model.ids(TEXTS), torch.tensor(labels))
    wanted = [[naive(model, text, int(k)) for k in row] for text, row in zip(TEXTS, labels, strict=True)]
    np.testing.assert_allclose(found.detach().numpy(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_score(method: str) -> None:
    """`score` is log_probs of the same options for all texts, with no gradient; their order is the scores' order."""
    model = bag(method)
    found = model.score(TEXTS, OPTIONS)
    assert not found.requires_grad
    ranks = [2, 3, 4, 0, 5]
    np.testing.assert_allclose(found, [[naive(model, text, k) for k in ranks] for text in TEXTS], rtol=1e-6, atol=1e-6)
    order = [3, 0, 4, 2, 1]
    torch.testing.assert_close(model.score(TEXTS, [OPTIONS[k] for k in order]), found[:, order])
    torch.testing.assert_close(torch.cat([model.score([text], OPTIONS) for text in TEXTS]), found)


def test_distributions() -> None:
    """DIRECT's P(l | x) adds up to 1 over the vocabulary, CHANNEL's P(x | l) over all texts of two words."""
    every = torch.arange(len(VOCABULARY) + 1)
    direct = bag("direct")
    sums = direct.log_probs(*direct.ids(TEXTS), every.expand(len(TEXTS), -1)).exp().sum(1)
    torch.testing.assert_close(sums, torch.ones_like(sums))
    channel = bag("channel")
    names = ["xyzzy", *VOCABULARY]
    pairs = [f"{a} {b}" for a, b in itertools.product(names, names)]
    assert channel.score(pairs, OPTIONS).exp().sum(0).tolist() == pytest.approx([1] * len(OPTIONS))


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_gradient_of_flipped(weight: float) -> None:
    """∂(L_LM + λ L_UL)/∂M = Σ h ((σ(s_c) − 1) E[l_c] + λ σ(s_w) E[l_w])ᵀ."""
    model = bag("flipped")
    right, wrong = ["good", "bad", "great", "bad", "good", "good"], ["bad", "good", "awful", "great", "bad", "awful"]
    terms = model.terms(TEXTS, right, wrong)
    (found,) = torch.autograd.grad(terms["likelihood"] + weight * terms["unlikelihood"], model.match)
    E, M = model.embedding.weight.detach().numpy(), model.match.detach().numpy()
    wanted = np.zeros_like(M)
    log_right = log_wrong = unlikelihood = 0.0
    for text, r, w in zip(TEXTS, right, wrong, strict=True):
        h = sum(E[i] for i in ids(text)) / math.sqrt(len(ids(text)))
        p, q = (1 / (1 + math.exp(-(h @ M @ E[VOCABULARY[label]]))) for label in (r, w))
        wanted += np.outer(h, (p - 1) * E[VOCABULARY[r]] + weight * q * E[VOCABULARY[w]])
        log_right, log_wrong = log_right + math.log(p), log_wrong + math.log(q)
        unlikelihood -= math.log(1 - q)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    numbers = {name: value.item() for name, value in terms.items()}
    assert numbers == pytest.approx(
        {"likelihood": -log_right, "unlikelihood": unlikelihood, "log_p_right": log_right, "log_p_wrong": log_wrong},
        rel=1e-5,
    )
    assert not terms["log_p_right"].requires_grad


def test_unlikelihood_is_what_discriminates() -> None:
    """Claim C2: labels that tell nothing of a text pull nothing at s = 0 with λ = 1; without L_UL they raise all s."""
    model = bag("flipped")
    with torch.no_grad():
        model.match.zero_()  # s = 0, p = 1/2
    terms = model.terms(["film", "film"], ["good", "bad"], ["bad", "good"])
    likelihood, unlikelihood = (
        torch.autograd.grad(terms[name], model.match, retain_graph=True)[0] for name in ("likelihood", "unlikelihood")
    )
    assert likelihood.abs().max() > 0.1  # λ = 0 raises both labels, whatever the text says
    torch.testing.assert_close(likelihood, -unlikelihood, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_terms_of_the_other_rules(method: str) -> None:
    """The likelihood is −Σ log P of the right labels for each rule."""
    model = bag(method)
    right, wrong = ["good"] * len(TEXTS), ["bad"] * len(TEXTS)
    terms = model.terms(TEXTS, right, wrong)
    scores = model.score(TEXTS, ["good", "bad"])
    assert terms["likelihood"].item() == pytest.approx(-scores[:, 0].sum().item())
    assert terms["log_p_wrong"].item() == pytest.approx(scores[:, 1].sum().item())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_initialisation(method: str, tied: bool) -> None:
    """The seed decides all weights, M begins as the identity, and there is nothing that the rule has no use for."""
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(BagOfWords(VOCABULARY, 6, method, tied=tied))  # type: ignore[arg-type]
    for a, b in zip(made[0].parameters(), made[1].parameters(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(made[0].match.detach(), torch.eye(6))
    assert made[0].embedding.weight.shape == (len(VOCABULARY) + 1, 6)
    assert torch.equal(made[0].score(TEXTS, OPTIONS), made[1].score(TEXTS, OPTIONS))
    separate = method != "flipped" and not tied
    assert len(list(made[0].parameters())) == 2 + separate
