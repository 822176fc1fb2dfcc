"""Classifiers, tokenizer, tiny RoBERTa, pre-training and its cache, foreign models (the card's checks 5, 9, 10)."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from list_selftrain import model as m
from list_selftrain.adapters import LiSTAdapter, LiSTAdapterConfig
from list_selftrain.config import Config
from list_selftrain.data import Data, Part
from list_selftrain.prompts import TEMPLATES, PromptTemplate
from metazoo.errors import UserError
from torch import nn
from transformers import (
    AlbertConfig,
    AutoModelForMaskedLM,
    BertConfig,
    BertModel,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    GPT2Config,
    MobileBertConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
)

torch.set_num_threads(1)

CONFIG = Config(
    width=16, heads=2, layers=2, feedforward=24, vocabulary=300, pretrain_steps=6, pretrain_batch_size=4, adapter_dim=3,
    max_length=40, dataset="sst2", dropout=0.2, adapter_std=0.05, seed=3,
)  # fmt: skip
WORDS = ("terrible", "great")
FILMS = tuple((text,) for text in ("a good film", "a bad film with a plot", "it was so", "no", "bad, bad plot") * 2)


def make_corpus() -> tuple[str, ...]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abdeilmnorst"), rng.integers(2, 7))) for _ in range(100)]
    texts = [" ".join(rng.choice(words, rng.integers(2, 12))) for _ in range(80)]
    return (*texts, *(text for (text,) in FILMS), "it was great, so great", "it was terrible.", "é–ß", "x", "")


CORPUS = make_corpus()
DATA = Data("sst2", ("0", "1"), Part(FILMS[:4], np.array([1, 0, 1, 0])), Part(FILMS), None, CORPUS)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "cache" / "list-selftrain"


@pytest.fixture(scope="module")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return m.train_tokenizer(CORPUS, 300, m._all_words(CONFIG))


SIZE: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 48, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
DEBERTA: dict[str, Any] = {**SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
LAYOUTS: dict[str, Any] = {
    "bert": lambda size: BertConfig(**size),
    "roberta": lambda size: RobertaConfig(**size),
    "electra": lambda size: ElectraConfig(**size, embedding_size=8),
    "deberta": lambda size: DebertaConfig(**size, **{k: DEBERTA[k] for k in ("relative_attention", "pos_att_type")}),
    "deberta-v2": lambda size: DebertaV2Config(
        **size, **{k: DEBERTA[k] for k in ("relative_attention", "pos_att_type")}
    ),
    "distilbert": lambda size: DistilBertConfig(
        vocab_size=size["vocab_size"], dim=16, n_layers=1, n_heads=2, hidden_dim=24, pad_token_id=1
    ),
    "albert": lambda size: AlbertConfig(**size, embedding_size=8),
    "mpnet": lambda size: MPNetConfig(**size),
    "modernbert": lambda size: ModernBertConfig(**size, cls_token_id=0, sep_token_id=2),
}


def layout(name: str, tokenizer: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    mlm = AutoModelForMaskedLM.from_config(LAYOUTS[name]({**SIZE, "vocab_size": len(tokenizer)})).eval()
    with torch.no_grad():  # a head with biases, which are 0 at first
        for parameter in mlm.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    return mlm


def prompted(tokenizer: Any, name: str = "roberta", tune: str = "adapter", **more: Any) -> m.PromptClassifier:
    settings = {"adapters": LiSTAdapterConfig(3, std=0.05), "base": "none", **more}
    return m.PromptClassifier(layout(name, tokenizer), tokenizer, TEMPLATES["sst2"], 40, tune=tune, **settings).eval()


def batch(model: Any) -> dict[str, torch.Tensor]:
    return dict(model.encode(DATA.unlabelled).take(range(5)))


def digest(tokenizer: Any) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def same(a: nn.Module, b: nn.Module) -> bool:
    left, right = dict(a.named_parameters()), dict(b.named_parameters())
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def entries(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


# ---- tokenizer


def test_tokenizer_has_robertas_ids(tokenizer: Any) -> None:
    assert tokenizer.convert_ids_to_tokens(range(5)) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert (tokenizer.pad_token_id, tokenizer.mask_token_id, tokenizer.cls_token_id) == (1, 4, 0)
    assert 300 < len(tokenizer) <= 300 + len(m._all_words(CONFIG))
    for text in CORPUS:
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == 0
        assert ids[-1] == 2
        assert 3 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer("a", "b")["input_ids"].count(2) == 3


def test_label_words_are_one_token_wherever_they_stand(tokenizer: Any) -> None:
    """In a running text, too: else they would never be seen in pre-training."""
    for template in TEMPLATES.values():
        assert len(template.label_ids(tokenizer)) == len(template.words)
    for word in m._all_words(CONFIG):
        (own,) = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
        assert tokenizer.convert_ids_to_tokens(own) == f"Ġ{word}"
        for text in (f"it was {word}.", f"so {word}, no", f"a {word}"):
            assert tokenizer(text)["input_ids"].count(own) == 1
            assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text
        assert own not in tokenizer(f"it was {word}xq")["input_ids"]
    own = m.train_tokenizer(CORPUS, 300, ("very good", "good"))
    assert own.tokenize(" very good")[-1] == "Ġgood"
    assert "Ġvery Ġgood" not in own.get_vocab()


def test_tokenizer_is_the_same_each_time_and_refuses_what_it_cannot_hold(tokenizer: Any, tmp_path: Path) -> None:
    assert digest(m.train_tokenizer(CORPUS, 300, m._all_words(CONFIG))) == digest(tokenizer)
    with pytest.raises(UserError, match="--vocabulary is 260: give 261 or more"):
        m.train_tokenizer(CORPUS, 260)
    with pytest.raises(UserError, match="empty"):
        m.train_tokenizer(["", " \n"], 300)


# ---- inputs


def test_inputs_are_padded_to_the_longest() -> None:
    inputs = m.Inputs([[5, 6], [7], [8, 9, 10]], pad=1, masks=[0, 0, 2])
    assert len(inputs) == 3
    found = inputs.take(np.array([1, 0]))
    assert found["input_ids"].tolist() == [[7, 1], [5, 6]]
    assert found["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert found["mask_position"].tolist() == [0, 0]
    assert inputs.take([2])["input_ids"].shape == (1, 3)
    none = inputs.take([])
    assert [none[name].shape for name in ("input_ids", "attention_mask", "mask_position")] == [(0, 1), (0, 1), (0,)]
    features = m.Inputs(features=torch.arange(6.0).view(3, 2))
    assert features.take([2, 0])["features"].tolist() == [[4, 5], [0, 1]]
    assert len(features) == 3


# ---- prompts


@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_are_those_of_the_label_words(tokenizer: Any, name: str) -> None:
    """Label-word logits at the mask of the whole masked language model, padded or alone."""
    tune = "head" if name in ("distilbert", "albert", "mpnet", "modernbert") else "adapter"
    mlm = layout(name, tokenizer)
    model = prompted(tokenizer, name, tune)
    for module in model.modules():
        if isinstance(module, LiSTAdapter):
            nn.init.zeros_(module.up.weight)
    inputs = batch(model)
    ids = TEMPLATES["sst2"].label_ids(tokenizer)
    with torch.no_grad():
        full = mlm(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
        wanted = full[torch.arange(5), inputs["mask_position"]][:, ids]
        found = model(**inputs)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
        assert wanted.std() > 1e-3
        encoded = model.encode(DATA.unlabelled)
        alone = torch.cat([model(**encoded.take([i])) for i in range(5)])
    torch.testing.assert_close(alone, found, atol=1e-5, rtol=0)
    assert inputs["input_ids"][torch.arange(5), inputs["mask_position"]].tolist() == [4] * 5
    trained, every = m.parameters(model)
    assert trained == sum(p.numel() for p in model.trained().values())
    assert every < sum(p.numel() for p in mlm.parameters()) + 2000
    assert all(p.shape[0] < len(tokenizer) for p in model.trained().values())  # nothing of the whole vocabulary
    model(**inputs).sum().backward()
    assert all(p.grad is not None for p in model.trained().values())


def test_other_rows_of_the_decoder_have_no_gradient(tokenizer: Any) -> None:
    """Check 10: so that training the rows of the label words alone is the same; and these gradients are ours."""
    mlm = layout("roberta", tokenizer)
    mlm.lm_head.decoder.weight = nn.Parameter(mlm.lm_head.decoder.weight.detach().clone())
    model = prompted(tokenizer, tune="head")
    inputs, labels = batch(model), torch.tensor([0, 1, 1, 0, 1])
    ids = TEMPLATES["sst2"].label_ids(tokenizer)
    full = mlm(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    F.cross_entropy(full[torch.arange(5), inputs["mask_position"]][:, ids], labels).backward()
    gradient = mlm.lm_head.decoder.weight.grad
    others = [i for i in range(len(tokenizer)) if i not in ids]
    assert not gradient[others].any()
    assert not mlm.lm_head.bias.grad[others].any()
    F.cross_entropy(model(**inputs), labels).backward()
    torch.testing.assert_close(model.head.decoder.weight.grad, gradient[ids])
    torch.testing.assert_close(model.head.decoder.bias.grad, mlm.lm_head.bias.grad[ids])
    torch.testing.assert_close(model.head.dense.weight.grad, mlm.lm_head.dense.weight.grad)


def test_decoder_is_not_tied_and_the_rest_is_frozen(tokenizer: Any) -> None:
    """Check 9: an AdamW step leaves each frozen bit, the embeddings of the label words included."""
    model = prompted(tokenizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained = model.trained()
    assert set(trained) == {name for name in before if "adapter" in name or name.startswith("head.")}
    assert m.parameters(model)[0] == 2 * 2 * 2 * 3 * 16 + 16 * 16 + 16 + 32 + 2 * 16 + 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    F.cross_entropy(model.train()(**batch(model)), torch.tensor([0, 1, 1, 0, 1])).backward()
    optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(trained)


def test_refused_prompts(tokenizer: Any) -> None:
    with pytest.raises(UserError, match="--max-length is 47, but the model has 46 positions"):
        m.PromptClassifier(layout("roberta", tokenizer), tokenizer, TEMPLATES["sst2"], 47)
    with pytest.raises(UserError, match="--max-length is 49, but the model has 48 positions"):
        m.ClassicClassifier(layout("bert", tokenizer), tokenizer, 2, 49)
    m.PromptClassifier(layout("roberta", tokenizer), tokenizer, TEMPLATES["sst2"], 46, base="none")
    with pytest.raises(UserError, match="'magnificent' is not one token"):
        m.PromptClassifier(
            layout("roberta", tokenizer), tokenizer, PromptTemplate("*sent_0**mask*", ("great", "magnificent"))
        )
    without = SimpleNamespace(mask_token_id=None)
    with pytest.raises(UserError, match="no mask token"):
        m.PromptClassifier(layout("roberta", tokenizer), without, TEMPLATES["sst2"])
    config = MobileBertConfig(**{**SIZE, "hidden_size": 512}, vocab_size=len(tokenizer), intra_bottleneck_size=16)
    with pytest.raises(UserError, match="mobilebert: its language-modelling head is not known"):
        m.mlm_head(AutoModelForMaskedLM.from_config(config))


# ---- a fresh student


@pytest.mark.parametrize("tune", ["adapter", "houlsby", "simple", "lora", "bias", "feedforward", "full"])
def test_reset_is_a_fresh_student(tokenizer: Any, tune: str) -> None:
    """Adapters by the generator's seed, all else exactly as it was before training."""
    model = prompted(tokenizer, tune=tune)
    model.reset(torch.Generator().manual_seed(1))
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(1.0)
    model.reset(torch.Generator().manual_seed(1))
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters())
    model.reset(torch.Generator().manual_seed(2))
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, first[name])}
    assert moved == {name for name in model.trained() if ".adapter." in name or "lora_A" in name}
    for name, p in model.trained().items():
        if "lora_B" in name:
            assert not p.any()
        elif "lora_A" in name:  # peft's: uniform within 1 / √d
            assert 0.2 < p.abs().max() <= 0.25
        elif ".adapter." in name:
            drawn = p - torch.eye(16) if tune == "simple" else p
            assert 0.02 < drawn.std() < 0.08


def test_reset_of_other_classifiers(tokenizer: Any) -> None:
    torch.manual_seed(0)
    classic = m.ClassicClassifier(layout("bert", tokenizer), tokenizer, 3, 40, tune="full")
    before = {name: p.detach().clone() for name, p in classic.named_parameters()}
    with torch.no_grad():
        for parameter in classic.parameters():
            parameter.add_(1.0)
    classic.reset(torch.Generator().manual_seed(1))
    moved = {name for name, p in classic.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"dense.weight", "dense.bias", "out.weight", "out.bias"}
    features = m.FeatureClassifier(replace(CONFIG, model="features", svd=4), DATA)
    features.reset(torch.Generator().manual_seed(1))
    once = [p.detach().clone() for p in features.parameters()]
    features.reset(torch.Generator().manual_seed(2))
    assert not any(torch.equal(p, q) for p, q in zip(features.parameters(), once, strict=True))
    features.reset(torch.Generator().manual_seed(1))
    assert all(torch.equal(p, q) for p, q in zip(features.parameters(), once, strict=True))
    assert features.inner.weight.abs().max() <= 0.5  # torch's own: uniform within 1 / √inputs
    assert list(features.trained()) == ["inner.weight", "inner.bias", "outer.weight", "outer.bias"]


# ---- derivatives


@pytest.mark.parametrize("name", ["roberta", "bert", "deberta", "deberta-v2", "electra"])
def test_forward_mode_and_second_derivatives(tokenizer: Any, name: str) -> None:
    """Inside, jvp = ⟨gradient, tangent⟩, double backward works, and logits are those of the fused attention."""
    model = prompted(tokenizer, name)
    inputs = batch(model)
    outside = model(**inputs).detach()
    kind = model.encoder.config._attn_implementation
    names = list(model.trained())
    values = tuple(model.trained().values())
    generator = torch.Generator().manual_seed(0)
    tangents = tuple(torch.randn(p.shape, generator=generator) for p in values)

    def logits(*weights: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch.func.functional_call(model, dict(zip(names, weights, strict=True)), kwargs=inputs)
        return found

    with model.differentiable():
        assert model.encoder.config._attn_implementation == "eager"
        inside, moved = torch.func.jvp(logits, tuple(p.detach() for p in values), tangents)
        torch.testing.assert_close(inside, outside, atol=1e-5, rtol=0)
        gradients = torch.autograd.grad(model(**inputs)[0, 1], values, create_graph=True)
        wanted = sum(float((g.detach() * t).sum()) for g, t in zip(gradients, tangents, strict=True))
        assert float(moved[0, 1]) == pytest.approx(wanted, rel=1e-3, abs=1e-4)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradients), values, allow_unused=True)
        assert any(g is not None and bool(g.abs().max() > 0) for g in second)
    assert model.encoder.config._attn_implementation == kind
    with pytest.raises(ZeroDivisionError), model.differentiable():
        _ = 1 / 0
    assert model.encoder.config._attn_implementation == kind
    with m.FeatureClassifier(replace(CONFIG, svd=4), DATA).differentiable():
        pass


# ---- classic


def test_classic_head_by_hand(tokenizer: Any) -> None:
    """out(tanh(dense(first token))), with pairs of texts as the tokenizer marks them."""
    mlm = layout("roberta", tokenizer)
    model = m.ClassicClassifier(mlm, tokenizer, 3, 30, dropout=0.5).eval()
    part = Part((("a good film", "so it was"), ("it", "a bad film with a plot " * 9)))
    encoded = model.encode(part)
    assert encoded.rows[0] == tokenizer("a good film", "so it was")["input_ids"]
    assert len(encoded.rows[1]) == 30
    found = model(**encoded.take([0, 1]))
    assert found.shape == (2, 3)
    first = mlm.roberta(**encoded.take([0, 1])).last_hidden_state[:, 0]
    wanted = torch.tanh(first @ model.dense.weight.T + model.dense.bias) @ model.out.weight.T + model.out.bias
    torch.testing.assert_close(found, wanted)
    assert model.dropout.p == 0.5
    single = model.encode(DATA.labelled)
    assert single.rows[1] == tokenizer("a bad film with a plot")["input_ids"]
    assert len(model.encode(Part(()))) == 0
    assert all(p.requires_grad for p in model.out.parameters())


# ---- features


def test_features_are_standardised_and_the_same_each_time() -> None:
    config = replace(CONFIG, model="features", svd=5, hidden=7)
    model = m.FeatureClassifier(config, DATA)
    both = Part((*DATA.labelled.texts, *DATA.unlabelled.texts))
    features = model.encode(both).take(range(len(both)))["features"]
    assert features.shape == (14, 5)
    assert features.dtype == torch.float32
    assert float(features.square().mean()) == pytest.approx(1, abs=1e-5)
    again = m.FeatureClassifier(config, DATA).encode(both).take(range(len(both)))["features"]
    assert torch.equal(features, again)
    assert model(features).shape == (14, 2)
    inner = torch.tanh(features @ model.inner.weight.T + model.inner.bias)
    torch.testing.assert_close(model.eval()(features), inner @ model.outer.weight.T + model.outer.bias)
    assert len(model.encode(Part(()))) == 0
    assert m.FeatureClassifier(replace(config, svd=500), DATA).inner.in_features < 14
    with pytest.raises(UserError, match="sst2: no features in the texts"):
        m.FeatureClassifier(config, Data("sst2", ("0", "1"), Part((("a",),)), Part((("b",),)), None, ()))


def test_vectors_are_taken_as_they_are() -> None:
    vectors = np.arange(12, dtype=np.float64).reshape(4, 3)
    data = Data("gaussian", ("0", "1"), Part(((),) * 4, np.zeros(4, int), vectors), Part(()), None, ())
    model = m.FeatureClassifier(replace(CONFIG, model="features"), data)
    features = model.encode(data.labelled).take([1, 0])["features"]
    assert features.tolist() == [[3, 4, 5], [0, 1, 2]]
    assert model(features).shape == (2, 2)
    for part in (Part((("a",),)), Part(((),), None, np.zeros((1, 2), np.float32))):
        with pytest.raises(UserError, match="takes vectors of 3 numbers"):
            model.encode(part)


# ---- saving


@pytest.mark.parametrize("tune", ["adapter", "simple", "lora", "full", "head"])
def test_saved_and_loaded_bit_for_bit(tokenizer: Any, tmp_path: Path, tune: str) -> None:
    """With the language model beside, which is of no hub id or folder; nothing else is needed."""
    model = prompted(tokenizer, tune=tune, base=None)
    untouched = layout("roberta", tokenizer)
    with torch.no_grad():
        for parameter in model.trained().values():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / "a", labels=("bad", "good"))
    again = m.PromptClassifier.from_pretrained(str(tmp_path / "a"))
    assert same(model, again)
    assert torch.equal(model(**batch(model)), again(**batch(again)))
    assert (again.template, again.tune, again.adapters, again.max_length) == (
        model.template, tune, model.adapters, 40,
    )  # fmt: skip
    assert again.labels == ("bad", "good")
    assert not again.training
    assert same(AutoModelForMaskedLM.from_pretrained(tmp_path / "a" / "base"), untouched)
    again.save_pretrained(tmp_path / "b")  # stands alone, too
    for path in (tmp_path / "a" / "base").iterdir():
        path.unlink()
    assert same(m.PromptClassifier.from_pretrained(tmp_path / "b"), model)
    assert json.loads((tmp_path / "b" / "list.json").read_text())["labels"] == ["bad", "good"]


def test_saved_beside_a_folder(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a given model adapters and head alone are written; the folder is found from elsewhere, or another is given."""
    layout("bert", tokenizer).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    monkeypatch.chdir(tmp_path)
    mlm, words = m.from_hub_or_folder("./bert")
    model = m.PromptClassifier(mlm, words, TEMPLATES["sst2"], 40, adapters=LiSTAdapterConfig(3), base="./bert").eval()
    assert model.full is None
    model.save_pretrained("small")
    assert sorted(path.name for path in (tmp_path / "small").iterdir()) == ["list.json", "model.safetensors"]
    monkeypatch.chdir("/")
    assert same(m.PromptClassifier.from_pretrained(tmp_path / "small"), model)
    (tmp_path / "bert").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="no such folder"):
        m.PromptClassifier.from_pretrained(tmp_path / "small")
    again = m.PromptClassifier.from_pretrained(tmp_path / "small", base=str(tmp_path / "moved"))
    assert same(again, model)


def test_damaged_saved_classifiers(tokenizer: Any, tmp_path: Path) -> None:
    prompted(tokenizer, base=None).save_pretrained(tmp_path / "good")

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            m.PromptClassifier.from_pretrained(tmp_path / "good")

    weights, settings = tmp_path / "good" / "model.safetensors", tmp_path / "good" / "list.json"
    written, text = weights.read_bytes(), settings.read_text()
    for damaged in (written[:-5], b"", bytes([*written[:-1], written[-1] ^ 1])):
        weights.write_bytes(damaged)
        refused("holds no saved classifier")
    weights.unlink()
    refused("holds no saved classifier .FileNotFoundError")
    weights.write_bytes(written)
    head = json.loads(text)
    for change in ({"words": 5}, {"r": "x"}, {"max_length": None}, {"places": ["x"]}, {"tune": "y"}, {"labels": 3}):
        settings.write_text(json.dumps({**head, **change}))
        with pytest.raises(UserError):
            m.PromptClassifier.from_pretrained(tmp_path / "good")
    for damaged_text in ("{", "[]", "{}", "3"):
        settings.write_text(damaged_text)
        refused("holds no saved classifier")
    settings.write_text(json.dumps({**head, "r": 4}))
    refused("its weights do not fit base/")
    settings.write_text(text)
    assert isinstance(m.PromptClassifier.from_pretrained(tmp_path / "good"), m.PromptClassifier)
    (tmp_path / "good" / "base").rename(tmp_path / "base")
    refused("lacks the folder base")
    with pytest.raises(UserError, match="holds no saved classifier"):
        m.PromptClassifier.from_pretrained(tmp_path / "nowhere")


# ---- tiny RoBERTa and its pre-training


def test_tiny_is_a_roberta(tokenizer: Any) -> None:
    made = m.tiny_mlm(CONFIG, tokenizer)
    assert isinstance(made, RobertaForMaskedLM)
    assert made.lm_head.decoder.weight is made.roberta.embeddings.word_embeddings.weight
    assert made.config.vocab_size == len(tokenizer)
    assert (made.config.hidden_dropout_prob, made.config.attention_probs_dropout_prob) == (0.2, 0.2)
    assert m._positions(made.base_model) >= max(CONFIG.max_length, m.PRETRAIN_LENGTH)
    long = m.tiny_mlm(replace(CONFIG, max_length=100), tokenizer).eval()
    assert long(input_ids=torch.full((1, 100), 7)).logits.shape == (1, 100, len(tokenizer))


def test_masking() -> None:
    """15 % to be found, 80 % of them masked, 10 % another token, 10 % as they are; marks never; the draws decide."""
    ids = torch.arange(5, 205).repeat(200, 1)
    special = torch.zeros_like(ids, dtype=torch.bool)
    special[:, :20] = True
    corrupted, chosen = m.mask_tokens(ids, special, 4, 300, np.random.default_rng(0))
    assert not chosen[:, :20].any()
    assert chosen[:, 20:].float().mean().item() == pytest.approx(0.15, abs=0.006)
    assert torch.equal(corrupted[~chosen], ids[~chosen])
    assert (corrupted[chosen] == 4).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert (corrupted[chosen] == ids[chosen]).float().mean().item() == pytest.approx(0.1, abs=0.02)
    again = m.mask_tokens(ids, special, 4, 300, np.random.default_rng(0))
    assert torch.equal(again[0], corrupted)
    one = torch.tensor([[True, True, False, True]])
    _, chosen = m.mask_tokens(torch.zeros(1, 4, dtype=torch.long), one, 4, 300, np.random.default_rng(0))
    assert chosen.tolist() == [[False, False, True, False]]


def test_pretrained_is_made_once_and_leaves_random_states(
    accelerator: Accelerator, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index] # noqa: NPY002
    first = m.load_model(CONFIG, DATA, accelerator)
    assert isinstance(first, m.PromptClassifier)
    assert not first.training
    (entry,) = entries(cache)
    assert {"model.safetensors", "tokenizer.json", "entry.json"} <= {path.name for path in entry.iterdir()}
    monkeypatch.setattr(m, "_pretrain", None)  # from here on everything is loaded
    second = m.load_model(replace(CONFIG, lr=0.5, dataset="mr"), DATA, accelerator)
    assert same(first, second)
    assert first.labels == ("0", "1")
    assert {layer.p for layer in second.modules() if isinstance(layer, nn.Dropout)} == {0.2}
    other = m.load_model(replace(CONFIG, seed=4, dropout=0.0, adapter_dim=5), DATA, accelerator)
    assert {layer.p for layer in other.modules() if isinstance(layer, nn.Dropout)} == {0.0}
    classic = m.load_model(replace(CONFIG, classifier="classic", tune="full"), DATA, accelerator)
    assert classic(**classic.encode(DATA.labelled).take([0, 1])).shape == (2, 2)
    fresh = copy.deepcopy(first)
    fresh.reset(torch.Generator().manual_seed(CONFIG.seed))
    assert same(first, fresh)
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[index] # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_pretrained_is_made_again_for_what_decides_it(accelerator: Accelerator, cache: Path) -> None:
    config = replace(CONFIG, pretrain_steps=1)
    m.language_model(config, CORPUS, accelerator)
    for other, corpus in (
        (replace(config, pretrain_seed=4), CORPUS),
        (replace(config, pretrain_lr=1e-2), CORPUS),
        (replace(config, words=("x", "y")), CORPUS),
        (config, CORPUS[:-3]),
    ):
        m.language_model(other, corpus, accelerator)
    assert len(entries(cache)) == 5


def test_pretraining_lowers_the_loss_and_learns_label_words(accelerator: Accelerator, cache: Path) -> None:
    """The mask in "It was<mask>." is filled by a word that stands there in the corpus, though rare in the merges."""
    corpus = ("so it was terrible.", "no, it was terrible.", "then it was terrible.") * 10
    config = replace(CONFIG, pretrain_steps=120, pretrain_batch_size=16, pretrain_lr=1e-2, layers=1, vocabulary=262)
    mlm, tokenizer = m.language_model(config, corpus, accelerator)
    template = PromptTemplate("*cls*so it was*mask*.*sent_0**sep+*", ("terrible", "great"))
    model = m.PromptClassifier(mlm, tokenizer, template, 40, tune="head", base="none").eval()
    logits = model(**model.encode(Part((("",),))).take([0]))[0]
    assert logits[0] > logits[1] + 2
    (entry,) = entries(cache)
    assert json.loads((entry / "entry.json").read_text())["loss"] < 2  # ln 300 = 5.7 at first


def test_killed_pretraining_goes_on(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, _ = m.language_model(CONFIG, CORPUS, accelerator)
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(m, "CHECKPOINT_EVERY", 2)
    mask, rate = m.mask_tokens, m._rate
    steps: list[int] = []

    def killed(*arguments: Any) -> Any:
        if len(steps) == 4:
            raise KeyboardInterrupt
        return mask(*arguments)

    monkeypatch.setattr(m, "_rate", lambda step, total: (steps.append(step), rate(step, total))[1])
    monkeypatch.setattr(m, "mask_tokens", killed)
    with pytest.raises(KeyboardInterrupt):
        m.language_model(CONFIG, CORPUS, accelerator)
    (training,) = entries(tmp_path / "other" / "list-selftrain")
    assert training.name.endswith(".training")
    steps.clear()
    monkeypatch.setattr(m, "mask_tokens", mask)
    rest, _ = m.language_model(CONFIG, CORPUS, accelerator)
    assert steps == [2, 3, 4, 5]
    assert same(whole, rest)
    (entry,) = entries(tmp_path / "other" / "list-selftrain")
    assert entry.name == training.name.removesuffix(".training")
    capsys.readouterr()

    training.mkdir()  # only damaged checkpoints: from the start
    (training / "step-00000003").mkdir()
    for path in entry.iterdir():
        path.unlink()
    assert same(whole, m.language_model(CONFIG, CORPUS, accelerator)[0])
    assert "pre-training from the start" in capsys.readouterr().err
    assert not training.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "entry.json"])
def test_damaged_entry_is_named_and_made_again(
    accelerator: Accelerator, cache: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    config = replace(CONFIG, pretrain_steps=2)
    first, _ = m.language_model(config, CORPUS, accelerator)
    (entry,) = entries(cache)
    data = bytearray((entry / name).read_bytes())
    data[len(data) // 2] ^= 255
    (entry / name).write_bytes(data)
    capsys.readouterr()
    assert same(first, m.language_model(config, CORPUS, accelerator)[0])
    said = capsys.readouterr().err
    assert "is damaged in" in said
    assert name in said


def test_lock_makes_others_wait(cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache.mkdir(parents=True)
    script = (
        "import sys, time, filelock\nwith filelock.FileLock(sys.argv[1]):\n print('x', flush=True)\n time.sleep(1.6)"
    )
    command = [sys.executable, "-c", script, str(cache / "a.lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with m._locked(cache / "a.lock"):
            assert "waiting" in capsys.readouterr().err


def test_cache_folder_that_cannot_be_written(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"set METAZOO_CACHE to a folder that can be written"):
        m.language_model(CONFIG, CORPUS, accelerator)


def test_no_pretraining_and_bad_pretraining(accelerator: Accelerator, cache: Path) -> None:
    config = replace(CONFIG, pretrain_steps=0)
    first, _ = m.language_model(config, CORPUS, accelerator)
    assert not cache.exists()
    assert same(first, m.language_model(config, CORPUS, accelerator)[0])
    assert not same(first, m.language_model(replace(config, pretrain_seed=4), CORPUS, accelerator)[0])
    with pytest.raises(UserError, match="--pretrain-lr"):
        m.language_model(replace(CONFIG, pretrain_lr=1e30), CORPUS, accelerator)
    with pytest.raises(UserError, match="two tokens"):
        m.language_model(CONFIG, ["a", "b"], accelerator)


def test_learning_rate_of_pretraining() -> None:
    rates = [m._rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert np.allclose(np.diff(rates[4:]), -0.9 / 95)
    assert m._rate(0, 1) == 1


# ---- foreign models


@pytest.mark.parametrize("name", ["bert", "roberta", "deberta", "deberta-v2"])
def test_given_model(tokenizer: Any, tmp_path: Path, accelerator: Accelerator, cache: Path, name: str) -> None:
    """From its folder as it is, or pre-trained further: once, and cached by its weights."""
    mlm = layout(name, tokenizer)
    folder = tmp_path / name
    mlm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = replace(CONFIG, model=str(folder), pretrain_steps=0)
    model = m.load_model(config, DATA, accelerator)
    assert isinstance(model, m.PromptClassifier)
    assert model.base == str(folder)
    for at, value in mlm.base_model.named_parameters():
        found = dict(model.encoder.named_parameters())
        assert torch.equal(value, found.get(at, found.get(at.replace("dense.", "dense.base."))))  # type: ignore[arg-type]
    assert model.encoder.config.hidden_dropout_prob == 0.2
    assert not cache.exists()
    if name not in ("bert", "roberta"):
        return
    further = m.load_model(replace(config, pretrain_steps=3), DATA, accelerator)
    assert isinstance(further, m.PromptClassifier)
    assert further.base is None
    assert not torch.equal(*(x.encoder.embeddings.word_embeddings.weight for x in (model, further)))  # type: ignore[union-attr]
    assert len(entries(cache)) == 1
    folder.rename(tmp_path / "moved")
    moved = replace(config, pretrain_steps=3, model=str(tmp_path / "moved"))
    assert same(m.load_model(moved, DATA, accelerator), further)
    assert len(entries(cache)) == 1
    layout(name, tokenizer, 1).save_pretrained(tmp_path / "moved")
    m.load_model(moved, DATA, accelerator)
    assert len(entries(cache)) == 2


def test_encoder_without_head(tokenizer: Any, tmp_path: Path, accelerator: Accelerator, cache: Path) -> None:
    """A BertModel: refused as it is, with a head of its own after pre-training, whatever --seed."""
    torch.manual_seed(0)
    BertModel(BertConfig(**{**SIZE, "vocab_size": len(tokenizer)})).save_pretrained(tmp_path / "encoder")
    tokenizer.save_pretrained(tmp_path / "encoder")
    config = replace(CONFIG, model=str(tmp_path / "encoder"), pretrain_steps=0)
    with pytest.raises(UserError, match=r"an encoder without the head of a masked language model .*--pretrain-steps"):
        m.load_model(config, DATA, accelerator)
    first, _ = m.language_model(replace(config, pretrain_steps=2), CORPUS, accelerator)
    assert first.get_output_embeddings().weight is first.get_input_embeddings().weight
    torch.manual_seed(99)
    m.load_model(replace(config, pretrain_steps=2, seed=8), DATA, accelerator)
    assert len(entries(cache)) == 1


def test_gradient_checkpointing(tokenizer: Any, tmp_path: Path, accelerator: Accelerator) -> None:
    """The same gradients."""
    layout("roberta", tokenizer).save_pretrained(tmp_path / "given")
    tokenizer.save_pretrained(tmp_path / "given")
    gradients = []
    for checkpointing in (False, True):
        config = replace(
            CONFIG, model=str(tmp_path / "given"), pretrain_steps=0, gradient_checkpointing=checkpointing, dropout=0.0,
            meta_gradient="finite",
        )  # fmt: skip
        model = m.load_model(config, DATA, accelerator).train()
        layers = [module for module in model.modules() if getattr(module, "gradient_checkpointing", False)]
        assert bool(layers) is checkpointing
        model(**model.encode(DATA.labelled).take([0, 1]))[:, 0].sum().backward()
        gradients.append([p.grad for p in model.trained().values()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_refused_models(tokenizer: Any, tmp_path: Path, accelerator: Accelerator) -> None:
    folder = tmp_path / "given"
    config = replace(CONFIG, model=str(folder), pretrain_steps=0)

    def refused(message: str) -> None:
        with pytest.raises(UserError, match=message):
            m.load_model(config, DATA, accelerator)

    refused("no such folder")
    folder.mkdir()
    refused("cannot load --model")
    mlm = layout("bert", tokenizer)
    mlm.save_pretrained(folder)
    for path in (tmp_path / "given").glob("token*"):
        path.unlink()
    refused("tokenizer")
    tokenizer.save_pretrained(folder)
    m.load_model(config, DATA, accelerator)
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-40])
    refused("cannot load --model")
    mlm.bert.encoder.layer = mlm.bert.encoder.layer[:1]
    mlm.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "num_hidden_layers": 2}))
    refused("lacks the weights bert.encoder.layer.1")
    small = BertConfig(**{**SIZE, "vocab_size": 200})
    AutoModelForMaskedLM.from_config(small).save_pretrained(folder)
    refused("do not belong together")
    for other in (T5Config(), GPT2Config()):
        other.save_pretrained(folder)
        refused("no masked language model|cannot load")
    (folder / "config.json").write_text("{")
    refused("cannot load --model")


def test_no_hub(monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator) -> None:
    calls = []

    def fail(self: Any, name: str, timeout: float) -> None:
        calls.append(timeout)
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    with pytest.raises(UserError, match="cannot load --model nobody/nothing"):
        m.load_model(replace(CONFIG, model="nobody/nothing", pretrain_steps=0), DATA, accelerator)
    assert len(calls) == 1
