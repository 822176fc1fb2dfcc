"""Encoders: what is saved is what sentence-transformers loads and encodes, what is trained is what is encoded, and what
cannot be loaded is refused without running any of it."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maml_align import model
from maml_align.config import Config
from maml_align.model import DualEncoder, load_model
from metazoo.errors import UserError
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

torch.set_num_threads(1)

CONFIG = Config(
    dataset="own.csv", vocabulary=300, width=8, layers=1, heads=2, feedforward=12, max_query_length=8,
    max_answer_length=12,
)  # fmt: skip
TEXTS = (
    "Der Hund bellt laut im Garten.", "A dog barks in the garden", "Een hond blaft", "wo ist der Bahnhof?",
    "where is the station, please? it must be near the old town hall and the river", "สถานีอยู่ที่ไหน",
)  # fmt: skip


@cache
def encoder(name: str, attention: str = "sdpa") -> DualEncoder:
    if name == "minilm":
        return DualEncoder.from_pretrained(model.minilm(), attention=attention)
    return load_model(replace(CONFIG, model=name, first_order=attention == "sdpa"), TEXTS)


def forward(one: DualEncoder, texts: Any = TEXTS, role: str | None = None) -> np.ndarray:
    """Vectors as the losses have them."""
    longest = 10_000 if one.vectorises else one.backbone.max_seq_length
    with torch.no_grad():
        return np.asarray(one(**one.pad(one.token_ids(texts, longest, role))))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A BERT's folder."""
    encoder("tiny").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# ---- one encoder, three ways


@pytest.mark.parametrize("name", ["static", "tiny"])
def test_what_is_saved_is_what_sentence_transformers_encodes(name: str, tmp_path: Path) -> None:
    own = encoder(name)
    wanted = own.encode(TEXTS)
    own.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    vectors = theirs.encode(list(TEXTS), show_progress_bar=False)
    np.testing.assert_allclose(vectors, wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert (wanted.shape, wanted.dtype) == ((len(TEXTS), 8), np.float32)
    again = DualEncoder.from_pretrained(tmp_path)
    assert (again.vectorises, again.dimension, again.padding) == (own.vectorises, own.dimension, own.padding)
    np.testing.assert_allclose(again.encode(TEXTS), wanted, rtol=0, atol=1e-6)
    for ids, others in zip(own.token_ids(TEXTS, 8), again.token_ids(TEXTS, 8), strict=True):
        assert ids.tolist() == others.tolist()
    again.save_pretrained(tmp_path / "twice")
    for one, other in zip(DualEncoder.from_pretrained(tmp_path / "twice").parameters(), own.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "tolerance"), [("static", 1e-6), ("tiny", 1e-6), ("minilm", 1e-5)])
def test_what_is_trained_is_what_is_encoded(name: str, tolerance: float) -> None:
    own = encoder(name)
    np.testing.assert_allclose(forward(own), own.encode(TEXTS, batch_size=4), rtol=0, atol=tolerance)
    assert own.encode([]).shape == (0, own.dimension)
    assert own.token_ids([], 8) == []


def test_weights_are_those_that_are_given() -> None:
    for name in ("static", "tiny"):
        own = encoder(name)
        tokens = own.pad(own.token_ids(TEXTS, 8))
        theta = {key: value.detach() for key, value in own.named_parameters()}
        assert torch.equal(own.embed(theta, tokens), own(**tokens))
        moved = own.embed({**theta, own.table: theta[own.table] * 2 + 1}, tokens)
        assert not torch.allclose(moved, own(**tokens), atol=1e-2)
        with pytest.raises(ValueError, match="has no parameter"):
            own.embed({"tabel": theta[own.table]}, tokens)


def test_both_attentions_are_the_same() -> None:
    for name in ("tiny", "minilm"):
        fused, eager = encoder(name), encoder(name, "eager")
        kinds = [one.backbone[0].model.config._attn_implementation for one in (fused, eager)]
        assert kinds == ["sdpa", "eager"]
        np.testing.assert_allclose(forward(fused), forward(eager), rtol=0, atol=1e-6)


def test_minilm_tells_what_is_near() -> None:
    vectors = encoder("minilm").encode(["A dog barks", "a barking dog", "stock prices fell"])
    near, far = vectors[0] @ vectors[1], vectors[0] @ vectors[2]
    assert near > 0.8
    assert far < 0.2


def test_dropout_stays_off() -> None:
    own = encoder("tiny")
    tokens = own.pad(own.token_ids(TEXTS, 8))
    assert own.train() is own
    assert not any(module.training for module in own.modules())
    assert torch.equal(own(**tokens), own(**tokens))


def test_a_network_without_fused_attention_is_loaded(tmp_path: Path) -> None:
    """MPNet has none; and of a transformer alone the mean of its tokens is taken."""
    import transformers

    own = encoder("tiny")
    size = own.backbone.tokenizer.vocab_size
    shape = transformers.MPNetConfig(
        vocab_size=size, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12,
        max_position_embeddings=24,
    )  # fmt: skip
    with model.quiet():
        transformers.MPNetModel(shape, add_pooling_layer=False).save_pretrained(tmp_path)
        own.backbone.tokenizer.save_pretrained(tmp_path)
    for attention in ("sdpa", "eager"):
        loaded = DualEncoder.from_pretrained(tmp_path, attention=attention)
        np.testing.assert_allclose(forward(loaded), loaded.encode(TEXTS), rtol=0, atol=1e-6)


def test_half_precision_becomes_single(saved: Path) -> None:
    weights = {name: value.half() for name, value in load_file(saved / "model.safetensors").items()}
    save_file(weights, saved / "model.safetensors", {"format": "pt"})
    settings = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**settings, "dtype": "float16"}))
    loaded = DualEncoder.from_pretrained(saved)
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    np.testing.assert_allclose(loaded.encode(TEXTS), encoder("tiny").encode(TEXTS), rtol=0, atol=1e-2)


# ---- prompts


@pytest.mark.parametrize("name", ["static", "tiny"])
def test_prompts_are_used_and_kept(name: str, tmp_path: Path) -> None:
    """In training, encoding and after saving; the model's default one where there is no role."""
    plain = encoder(name)
    prompts = {"query": "where: ", "passage": "dog: ", "garden": "garden: "}
    own = DualEncoder(SentenceTransformer(modules=list(plain.backbone), prompts=prompts, device="cpu"))
    for role, prompt in (("query", "where: "), ("document", "dog: "), (None, "")):
        wanted = plain.encode([prompt + text for text in TEXTS[:4]])
        np.testing.assert_allclose(own.encode(TEXTS[:4], role=role), wanted, rtol=0, atol=1e-6)
        np.testing.assert_allclose(forward(own, TEXTS[:4], role), wanted, rtol=0, atol=1e-6)
    own.backbone.default_prompt_name = "garden"
    wanted = plain.encode(["garden: " + text for text in TEXTS[:4]])
    np.testing.assert_allclose(own.encode(TEXTS[:4]), wanted, rtol=0, atol=1e-6)
    np.testing.assert_allclose(forward(own, TEXTS[:4]), wanted, rtol=0, atol=1e-6)
    own.save_pretrained(tmp_path)
    theirs = SentenceTransformer(str(tmp_path), device="cpu")
    assert (theirs.prompts | prompts, theirs.default_prompt_name) == (theirs.prompts, "garden")
    vectors = theirs.encode_query(list(TEXTS[:4]), show_progress_bar=False)
    np.testing.assert_allclose(vectors, own.encode(TEXTS[:4], role="query"), rtol=0, atol=1e-6)


def test_without_prompts_roles_change_nothing() -> None:
    for name in ("static", "tiny", "minilm"):
        own = encoder(name)
        for role in ("query", "document"):
            np.testing.assert_allclose(own.encode(TEXTS, role=role), own.encode(TEXTS), rtol=0, atol=1e-6)


# ---- tokens


@pytest.mark.parametrize("most", [4, 6, 12])
def test_tokens_are_cut_off(most: int) -> None:
    """The static encoder's are the first; a BERT's keep their ends."""
    for name in ("static", "tiny"):
        own = encoder(name)
        whole, short = own.token_ids(TEXTS, 12), own.token_ids(TEXTS, most)
        assert max(len(ids) for ids in whole) == 12
        for ids, first in zip(whole, short, strict=True):
            assert first.dtype == np.int64
            assert len(first) == min(most, len(ids))
            if name == "static":
                assert first.tolist() == ids[:most].tolist()
            else:
                assert first.tolist() == [ids[0], *ids[1:-1][: most - 2], ids[-1]]


def test_padding_is_told_by_the_mask() -> None:
    own = encoder("tiny")
    padded = own.pad([np.array([2, 9, 3]), np.array([2, 3])])
    assert padded["input_ids"].tolist() == [[2, 9, 3], [2, 3, 0]]
    assert padded["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_unknown_tokens_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Special tokens of a BERT do not count; from a tenth on there is a line."""
    for name in ("static", "tiny"):
        own = encoder(name)
        ids = own.token_ids(["dog", "Ж Ц", "dog dog dog dog dog dog dog"], 12)
        unknown = own.unknown_share(ids[1:2])
        assert unknown == 1
        assert own.unknown_share(ids[:1]) == 0
        assert own.unknown_share([]) == 0
        assert model.warn_unknown(own, "ru", ids[1:2]) == 1
        assert "100% of the tokens of language ru are unknown" in capsys.readouterr().err
        assert 0 < model.warn_unknown(own, "ru", ids, least=0.5) < 0.5
        assert capsys.readouterr().err == ""


def of_tokens(kind: Any) -> DualEncoder:
    """A static encoder with a tokenizer of this model."""
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Tokenizer, pre_tokenizers

    tokenizer = Tokenizer(kind)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return DualEncoder(SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=4)], device="cpu"))


def test_unknown_may_have_the_first_number() -> None:
    from tokenizers import models

    own = of_tokens(models.WordLevel({"[UNK]": 0, "dog": 1}, unk_token="[UNK]"))
    assert own.unknown_share(own.token_ids(["dog cat cat cat"], 8)) == 0.75
    own = of_tokens(models.WordLevel({"<unk>": 0, "dog": 1}, unk_token="<unk>"))
    assert own.unknown_share(own.token_ids(["dog cat"], 8)) == 0.5


def test_texts_of_no_token_are_refused() -> None:
    """A tokenizer without a token for what is unknown leaves it out."""
    from tokenizers import models

    own = of_tokens(models.BPE({"d": 0, "o": 1, "g": 2}, []))
    assert own.unknown_share(own.token_ids(["dog cat"], 8)) == 0
    with pytest.raises(UserError, match="'cat' comes to no token"):
        own.token_ids(["dog", "cat"], 8)


def vocabularies() -> list[list[tuple[str, int]]]:
    return [sorted(model.train_tokenizer(iter(TEXTS), size).get_vocab().items()) for size in (300, 60)]


@cache
def elsewhere() -> tuple[str, str]:
    """stdout and stderr of another process, in which nobody looks: tokenizers, and models loaded, used and saved."""
    script = """
import json, sys, tempfile
import transformers
from maml_align import model
texts = json.loads(sys.stdin.read())
print(json.dumps([sorted(model.train_tokenizer(texts, size).get_vocab().items()) for size in (300, 60)]))
level = transformers.utils.logging.get_verbosity()
with tempfile.TemporaryDirectory() as folder:
    for name in (model.minilm(), folder):
        one = model.DualEncoder.from_pretrained(name)
        one.encode(["a dog", "barks"], role="query")
        one.save_pretrained(folder)
assert transformers.utils.logging.get_verbosity() == level
assert transformers.utils.logging.is_progress_bar_enabled()
"""
    path = os.pathsep.join([str(Path(model.__file__).parent.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7", "HF_HUB_OFFLINE": "1"}
    found = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(TEXTS), capture_output=True, text=True, timeout=300,
        env={**os.environ, **environment},
    )  # fmt: skip
    return found.stdout, found.stderr


def test_tokenizers_are_the_same_in_every_process() -> None:
    """Else a resumed run has another word in each row of its table."""
    found = vocabularies()
    assert [vocabularies() for _ in range(3)] == [found] * 3
    assert len(found[1]) >= 60
    assert json.loads(elsewhere()[0]) == json.loads(json.dumps(found))


def test_tokenizers_have_no_special_characters() -> None:
    """Characters are given to the trainer in order; in the tokenizer they are none but themselves."""
    tokenizer = model.train_tokenizer(TEXTS, 300)
    vocabulary = tokenizer.get_vocab()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert [vocabulary[name] for name in names] == list(range(5))
    assert sorted(token.content for token in tokenizer.get_added_tokens_decoder().values()) == sorted(names)
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert {"hund", "##t", "ส"} <= set(vocabulary)
    assert tokenizer.decode(tokenizer.encode("Der HUND bellt").ids) == "der hund bellt"
    assert len(model.train_tokenizer(TEXTS, 120).get_vocab()) == 120


# ---- what is refused


def test_what_is_no_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "file").write_text("x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "garbage").mkdir()
    (tmp_path / "garbage" / "config.json").write_text("{not json")
    (tmp_path / "strange").mkdir()
    (tmp_path / "strange" / "config.json").write_text('{"model_type": "nothing-that-is-there"}')
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "modules.json").write_text('{"a": 1}')
    for name, reason in (
        ("file", "is a file"), ("empty", "no modules.json and no config.json"), ("garbage", "give the folder"),
        ("strange", "nothing-that-is-there"), ("modules", "give the folder"), ("nowhere", "give the folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=reason) as raised:
            DualEncoder.from_pretrained(tmp_path / name)
        assert str(tmp_path / name) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_empty_texts_are_refused() -> None:
    own = encoder("static")
    for call in (own.encode, lambda texts: own.token_ids(texts, 8)):
        with pytest.raises(UserError, match="text 1 is empty"):
            call(["dog", " \n"])


def test_models_without_all_their_weights_are_refused(saved: Path) -> None:
    """transformers would draw them at random, and say so in a log."""
    whole = load_file(saved / "model.safetensors")
    kept = {name: value for name, value in whole.items() if "query" not in name}
    for weights in (kept, {f"other.{name}": value for name, value in whole.items()}):
        save_file(weights, saved / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match="no weights for"):
            DualEncoder.from_pretrained(saved)
    unpooled = {name: value for name, value in whole.items() if "pooler" not in name}
    save_file(unpooled, saved / "model.safetensors", {"format": "pt"})
    loaded = DualEncoder.from_pretrained(saved)
    np.testing.assert_allclose(loaded.encode(TEXTS), encoder("tiny").encode(TEXTS), rtol=0, atol=1e-6)
    short = {**whole, "embeddings.word_embeddings.weight": whole["embeddings.word_embeddings.weight"][:-2].clone()}
    save_file(short, saved / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="give the folder or hub id"):
        DualEncoder.from_pretrained(saved)


class Writes:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.write_text, (self.path, "ran")


@pytest.mark.parametrize("name", ["static", "tiny"])
def test_no_pickle_is_run(name: str, tmp_path: Path) -> None:
    """Weights of tensors only are read from pytorch_model.bin; anything else in it is refused, and does not run."""
    own, folder, proof = encoder(name), tmp_path / "model", tmp_path / "proof"
    own.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    part = own.backbone[0] if own.vectorises else own.backbone[0].model
    torch.save(part.state_dict(), folder / "pytorch_model.bin")
    loaded = DualEncoder.from_pretrained(folder)
    np.testing.assert_allclose(loaded.encode(TEXTS), own.encode(TEXTS), rtol=0, atol=1e-6)
    for way in ("torch", "pickle"):
        if way == "torch":
            torch.save({**part.state_dict(), "more": Writes(proof)}, folder / "pytorch_model.bin")
        else:
            (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Writes(proof)))
        with pytest.raises(UserError, match="give the folder or hub id"):
            DualEncoder.from_pretrained(folder)
        assert not proof.exists()
    pickle.loads(pickle.dumps(Writes(proof)))
    assert proof.exists()  # it would have


def test_no_code_of_a_model_is_run(saved: Path, tmp_path: Path) -> None:
    """Neither as a module of sentence-transformers nor as a network of transformers."""
    proof = tmp_path / "proof"
    code = f"import pathlib\npathlib.Path({str(proof)!r}).write_text('ran')\nclass Own: pass\n"
    for name in ("as-module", "as-network"):
        folder = tmp_path / name
        shutil.copytree(saved, folder)
        (folder / "own.py").write_text(code)
        file = folder / ("modules.json" if name == "as-module" else "config.json")
        settings = json.loads(file.read_text())
        if name == "as-module":
            settings[-1]["type"] = "own.Own"
        else:
            settings |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Own"}}
        file.write_text(json.dumps(settings))
        with pytest.raises(UserError, match="give the folder or hub id"):
            DualEncoder.from_pretrained(folder)
    assert not proof.exists()


# ---- silence


def test_nothing_is_printed_where_nobody_looks() -> None:
    """No bars, no logs, no warnings, of minilm either; and logging is as it was."""
    assert elsewhere()[1] == ""
