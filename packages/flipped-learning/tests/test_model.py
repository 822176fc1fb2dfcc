"""Tokenizer, tiny T5, span corruption, the cache of pre-trained models, and foreign models."""

import hashlib
import inspect
import json
import logging
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from flipped_learning import model as m
from flipped_learning.config import Config
from metazoo.errors import UserError
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    T5ForConditionalGeneration,
)

CONFIG = Config(
    width=16, heads=2, layers=1, feedforward=32, vocabulary=200, pretrain_steps=8, pretrain_batch_size=4, seed=3
)


def make_corpus() -> list[str]:
    rng = np.random.default_rng(0)
    words = ["".join(rng.choice(list("abdeilmnorst"), rng.integers(2, 7))) for _ in range(150)]
    return [" ".join(rng.choice(words, rng.integers(2, 12))) for _ in range(120)] + ["é–ß good, bad?", "x", ""]


CORPUS = make_corpus()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    return tmp_path / "cache" / "flipped-learning"


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(scope="module")
def tokenizer():
    return m.train_tokenizer(CORPUS, 200)


def digest(tokenizer):
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def same(a, b):
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def entries(folder):
    return [path for path in folder.iterdir() if path.is_dir()]


# ---- tokenizer


def test_tokenizer_has_t5s_ids(tokenizer):
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    assert names[:3] == ["<pad>", "</s>", "<unk>"]
    assert len(names) == 3 + 200 + 100
    assert names[203] == "<extra_id_99>"
    assert names[-1] == "<extra_id_0>"
    assert m.sentinel_ids(tokenizer) == list(range(302, 202, -1))
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length > 10**9


def test_tokenizer_reads_every_training_text_back(tokenizer):
    for text in CORPUS:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == 1
        assert 2 not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_tokenizer_takes_whitespace_as_one_space_and_keeps_sentinels(tokenizer):
    plain = tokenizer("good, bad?")["input_ids"]
    assert tokenizer("  good,\n\n\tbad? \n")["input_ids"] == plain
    ids = tokenizer("<extra_id_0> good,<extra_id_1>\nbad?")["input_ids"]
    assert [i for i in ids if i > 202] == [302, 301]
    assert [i for i in ids if i <= 202] == plain
    assert tokenizer("good, bad?", add_special_tokens=False)["input_ids"] == plain[:-1]
    assert 2 in tokenizer("Ω")["input_ids"]


def test_tokenizer_is_the_same_in_another_process(tokenizer, tmp_path):
    (tmp_path / "corpus.json").write_text(json.dumps(CORPUS))
    script = (  # the function alone, as importing all of transformers' models may take half a minute
        "from __future__ import annotations\nimport hashlib, json, pathlib, sys\n"
        "from metazoo.errors import UserError\nfrom transformers import PreTrainedTokenizerFast\n"
        "from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers\n"
        f"SENTINELS = {m.SENTINELS}\n{inspect.getsource(m.train_tokenizer)}\n"
        "t = train_tokenizer(json.loads(pathlib.Path(sys.argv[1]).read_text()), 200)\n"
        "print(hashlib.sha256(t.backend_tokenizer.to_str().encode()).hexdigest())"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", script, str(tmp_path / "corpus.json")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == digest(tokenizer)


def test_tokenizer_refuses_what_it_cannot_hold():
    with pytest.raises(UserError, match="--vocabulary is 5"):
        m.train_tokenizer(["abcdefg"], 5)
    with pytest.raises(UserError, match="empty"):
        m.train_tokenizer(["", " \n"], 100)


# ---- tiny T5


@pytest.mark.parametrize("tied", [False, True])
def test_tiny_t5_is_tied_or_not_also_after_saving(tokenizer, tmp_path, tied):
    torch.manual_seed(0)
    made = m.tiny_t5(replace(CONFIG, tied=tied), tokenizer).eval()
    assert made.config.scale_decoder_outputs is tied
    assert made.config.decoder_start_token_id == 0
    assert made.config.d_kv == 8
    assert abs(made.shared.weight.std().item() - 1) < 0.05
    assert abs(made.lm_head.weight.std().item() - (1 if tied else 0.25)) < 0.05
    made.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    again, read = m.load_model(replace(CONFIG, model=str(tmp_path / "t5")), [], None)
    for model in (made, again):
        model.tie_weights()
        assert (model.lm_head.weight is model.shared.weight) is tied
    assert same(made, again)
    assert again.config.scale_decoder_outputs is tied
    ids = torch.tensor([[5, 6, 1]])
    assert torch.equal(made(input_ids=ids, labels=ids).logits, again(input_ids=ids, labels=ids).logits)
    again.save_pretrained(tmp_path / "twice")
    third = T5ForConditionalGeneration.from_pretrained(tmp_path / "twice")
    assert third.config.scale_decoder_outputs is tied
    assert same(made, third)
    assert digest(read) == digest(tokenizer)
    size = 303 * 16 * (1 if tied else 2)
    assert m.parameters(made) - size == m.parameters(again) - size > 0


# ---- span corruption


@pytest.mark.parametrize("length", [2, 3, 7, 20, 64, 500])
def test_span_corruption_can_be_undone(tokenizer, length):
    sentinels = m.sentinel_ids(tokenizer)
    rng = np.random.default_rng(length)
    first, last = 0, 0
    for _ in range(60):
        ids = rng.integers(3, 203, length).tolist()
        source, target = m.span_corruption(ids, tokenizer, rng)
        assert source[-1] == target[-1] == 1
        used = [i for i in source if i in sentinels]
        assert used == sentinels[: len(used)]
        assert [i for i in target if i in sentinels] == sentinels[: len(used) + 1]
        assert target[-2] == sentinels[len(used)]
        spans, key = {}, None
        for i in target[:-1]:
            if i in sentinels:
                spans[key := i] = []
            else:
                spans[key].append(i)
        assert all(spans[i] for i in used)
        assert [x for i in source[:-1] for x in spans.get(i, [i])] == ids
        masked = sum(map(len, spans.values()))
        assert masked == min(max(round(0.15 * length), 1), length - 1)
        first += source[0] in sentinels
        last += source[-2] in sentinels
    if length < 64:  # spans lie at either end, too
        assert first > 0
        assert last > 0


def test_span_corruption_draws_from_its_generator_alone(tokenizer):
    ids = list(range(10, 60))
    once = m.span_corruption(ids, tokenizer, np.random.default_rng(4))
    assert once == m.span_corruption(ids, tokenizer, np.random.default_rng(4))
    assert once != m.span_corruption(ids, tokenizer, np.random.default_rng(5))
    with pytest.raises(UserError, match="two tokens"):
        m.span_corruption([5], tokenizer, np.random.default_rng(0))


# ---- pre-training and its cache


@pytest.mark.parametrize("tied", [False, True])
def test_pretrained_is_made_once_and_leaves_random_states(accelerator, cache, monkeypatch, tied):
    config = replace(CONFIG, tied=tied)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    kept = []
    save = m.save_file
    monkeypatch.setattr(
        m, "save_file", lambda weights, *rest, **more: (kept.append(weights), save(weights, *rest, **more))
    )
    first, words = m.pretrained(config, CORPUS, accelerator)
    assert not first.training
    assert len(kept) == 1
    assert all(torch.equal(kept[0][name], value) for name, value in first.named_parameters())
    (entry,) = entries(cache)
    assert {"model.safetensors", "tokenizer.json", "entry.json"} <= {path.name for path in entry.iterdir()}
    monkeypatch.setattr(m, "_pretrain", None)  # from here on everything is loaded
    second, again = m.pretrained(replace(config, dropout=0.3, lr=0.5, pretrain_seed=3, seed=9), CORPUS, accelerator)
    assert same(first, second)
    assert (second.lm_head.weight is second.shared.weight) is tied
    assert second.config.dropout_rate == 0.3
    assert {layer.p for layer in second.modules() if isinstance(layer, torch.nn.Dropout)} == {0.3}
    assert digest(words) == digest(again)
    assert len(words) == len(again) == first.config.vocab_size
    after = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


def test_pretrained_is_made_again_for_what_decides_it(accelerator, cache):
    config = replace(CONFIG, pretrain_steps=1)
    m.pretrained(config, CORPUS, accelerator)
    for other, corpus in (
        (replace(config, seed=4), CORPUS),
        (replace(config, pretrain_lr=1e-2), CORPUS),
        (config, CORPUS[:-3]),
    ):
        m.pretrained(other, corpus, accelerator)
    assert len(entries(cache)) == 4


def test_pretraining_lowers_the_loss(accelerator, cache):
    config = replace(CONFIG, pretrain_steps=60, pretrain_batch_size=16, pretrain_lr=1e-2)
    m.pretrained(replace(config, pretrain_steps=1), CORPUS, accelerator)
    m.pretrained(config, CORPUS, accelerator)
    losses = {}
    for entry in entries(cache):
        head = json.loads((entry / "entry.json").read_text())
        losses[head["settings"]["pretrain_steps"]] = head["loss"]
    assert losses[60] < losses[1] - 0.5


def test_killed_pretraining_goes_on(accelerator, tmp_path, monkeypatch, capsys):
    whole, _ = m.pretrained(CONFIG, CORPUS, accelerator)
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr(m, "CHECKPOINT_EVERY", 3)
    corrupt, rate = m.span_corruption, m._rate
    steps = []

    def killed(*arguments):
        if len(steps) == 5:
            raise KeyboardInterrupt
        return corrupt(*arguments)

    monkeypatch.setattr(m, "_rate", lambda step, total: (steps.append(step), rate(step, total))[1])
    monkeypatch.setattr(m, "span_corruption", killed)
    with pytest.raises(KeyboardInterrupt):
        m.pretrained(CONFIG, CORPUS, accelerator)
    (training,) = entries(tmp_path / "other" / "flipped-learning")
    assert training.name.endswith(".training")
    steps.clear()
    monkeypatch.setattr(m, "span_corruption", corrupt)
    rest, _ = m.pretrained(CONFIG, CORPUS, accelerator)
    assert steps == [3, 4, 5, 6, 7]
    assert same(whole, rest)
    (entry,) = entries(tmp_path / "other" / "flipped-learning")
    assert entry.name == training.name.removesuffix(".training")
    capsys.readouterr()

    training.mkdir()  # only damaged checkpoints: from the start
    (training / "step-00000003").mkdir()
    for path in entry.iterdir():
        path.unlink()
    assert same(whole, m.pretrained(CONFIG, CORPUS, accelerator)[0])
    assert "pre-training from the start" in capsys.readouterr().err
    assert not training.exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "entry.json"])
def test_damaged_entry_is_named_and_made_again(accelerator, cache, capsys, name):
    config = replace(CONFIG, pretrain_steps=2)
    first, _ = m.pretrained(config, CORPUS, accelerator)
    (entry,) = entries(cache)
    data = bytearray((entry / name).read_bytes())
    data[len(data) // 2] ^= 255
    (entry / name).write_bytes(data)
    capsys.readouterr()
    assert same(first, m.pretrained(config, CORPUS, accelerator)[0])
    said = capsys.readouterr().err
    assert "is damaged in" in said
    assert name in said
    m.pretrained(config, CORPUS, accelerator)
    assert "damaged" not in capsys.readouterr().err


def test_lock_makes_others_wait(cache, capsys):
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


def test_cache_folder_that_cannot_be_written(accelerator, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("METAZOO_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"set METAZOO_CACHE to a folder that can be written"):
        m.pretrained(CONFIG, CORPUS, accelerator)


def test_no_pretraining_and_bad_pretraining(accelerator, cache):
    config = replace(CONFIG, pretrain_steps=0)
    first, _ = m.pretrained(config, CORPUS, accelerator)
    assert not cache.exists()
    assert same(first, m.pretrained(config, CORPUS, accelerator)[0])
    assert not same(first, m.pretrained(replace(config, seed=4), CORPUS, accelerator)[0])
    with pytest.raises(UserError, match="--pretrain-lr"):
        m.pretrained(replace(CONFIG, pretrain_lr=1e30), CORPUS, accelerator)
    with pytest.raises(UserError, match="two tokens"):
        m.pretrained(CONFIG, ["a" * 4, "a" * 4], accelerator)


def test_learning_rate_of_pretraining():
    rates = [m._rate(step, 100) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[-1] == pytest.approx(0.1)
    assert np.allclose(np.diff(rates[4:]), -0.9 / 95)
    assert m._rate(0, 1) == 1


# ---- load_model


def test_lora_and_gradient_checkpointing(accelerator):
    config = replace(CONFIG, pretrain_steps=0, lora=2, gradient_checkpointing=True)
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first, _ = m.load_model(config, CORPUS, accelerator)
    assert torch.equal(torch.get_rng_state(), before)
    second, _ = m.load_model(config, CORPUS, accelerator)
    assert same(first, second)
    assert m.parameters(first) == 3 * 2 * 2 * (16 + 16)  # attentions, q and v, rank, in + out
    adapted = {name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in first.named_parameters() if p.requires_grad}
    assert adapted == {"q", "v"}
    assert first.config.use_cache is False
    base = first.get_base_model()
    assert base.encoder.gradient_checkpointing
    assert base.lm_head.weight is not base.shared.weight
    ids = torch.tensor([[5, 6, 1]])
    first.train()(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in first.parameters() if p.requires_grad)


def test_bart_is_a_foreign_model(tokenizer, tmp_path):
    settings = BartConfig(
        vocab_size=303, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0, bos_token_id=1,
        eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1,
    )  # fmt: skip
    BartForConditionalGeneration(settings).half().save_pretrained(tmp_path / "bart")
    tokenizer.save_pretrained(tmp_path / "bart")
    config = replace(CONFIG, model=str(tmp_path / "bart"), dropout=0.25)
    level = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    loaded, _ = m.load_model(config, [], None)
    assert transformers.utils.logging.get_verbosity() == level != logging.CRITICAL
    assert transformers.utils.logging.is_progress_bar_enabled() == bars
    assert loaded.config.dropout == 0.25
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    adapted, _ = m.load_model(replace(config, lora=2), [], None)
    assert 0 < m.parameters(adapted) < m.parameters(loaded)

    without = m.train_tokenizer(CORPUS, 200)
    folder = tmp_path / "bart"
    text = without.backend_tokenizer.to_str().replace("<extra_id_", "<other_")
    (folder / "tokenizer.json").write_text(text)
    settings_path = folder / "tokenizer_config.json"
    kept = json.loads(settings_path.read_text())
    settings_path.write_text(json.dumps({k: v for k, v in kept.items() if "special_tokens" not in k}))
    with pytest.raises(UserError, match="use --no-sentinels"):
        m.load_model(config, [], None)
    for other in (replace(config, sentinels=False), replace(config, method="direct")):
        _, loaded_tokenizer = m.load_model(other, [], None)
        assert m.sentinel_ids(loaded_tokenizer) == []


def test_gpt2_is_refused(tokenizer, tmp_path):
    settings = GPT2Config(vocab_size=303, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    GPT2LMHeadModel(settings).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    with pytest.raises(UserError, match="not seq2seq"):
        m.load_model(replace(CONFIG, model=str(tmp_path / "gpt2")), [], None)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_broken_checkpoints_are_refused_in_one_line(tokenizer, tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "t5"
    config = replace(CONFIG, model=str(folder))
    made = m.tiny_t5(CONFIG, tokenizer)
    made.save_pretrained(folder)

    def refused(match):
        with pytest.raises(UserError, match=match) as caught:
            m.load_model(config, [], None)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600

    refused("has no tokenizer")
    tokenizer.save_pretrained(folder)
    m.load_model(config, [], None)
    weights = folder / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:1000])
    refused("cannot load --model")
    weights.unlink()
    torch.save({"shared.weight": Payload(tmp_path / "ran")}, folder / "pytorch_model.bin")
    refused("safetensors")
    assert not (tmp_path / "ran").exists()
    del made.decoder.final_layer_norm
    made.save_pretrained(folder)
    refused("lacks the weights decoder.final_layer_norm.weight")
    m.tiny_t5(CONFIG, m.train_tokenizer(CORPUS, 100)).save_pretrained(folder)
    refused("do not belong together")
    (folder / "config.json").write_text("{")
    refused("cannot load --model")


def test_no_such_model(monkeypatch):
    with pytest.raises(UserError, match="no such folder"):
        m.load_model(replace(CONFIG, model="./nowhere"), [], None)
    monkeypatch.setattr(m, "_hub_answers", lambda name: False)
    with pytest.raises(UserError, match="cannot load --model nobody/nothing: We couldn't connect"):
        m.load_model(replace(CONFIG, model="nobody/nothing"), [], None)


def test_hub_is_asked_once(monkeypatch):
    calls = []

    def fail(self, name, timeout):
        calls.append(timeout)
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    assert not m._hub_answers("a/b")
    assert len(calls) == 1
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, timeout: None)
    assert m._hub_answers("a/b")


def test_lora_without_peft(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--lora needs peft"):
        m.load_model(Config(lora=2), ["a film"], Accelerator(cpu=True))
