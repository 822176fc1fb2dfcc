"""The seq2seq models: a tiny T5 pre-trained here by span corruption, or any AutoModelForSeq2SeqLM."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import filelock
import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from metazoo import checkpoint
from metazoo.errors import UserError
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from flipped_learning.config import Config

CACHE_VARIABLE = "METAZOO_CACHE"  # folder of pre-trained models [default: ~/.cache/metazoo]
CACHE_FORMAT = 1  # to be raised when pre-training itself changes
SENTINELS = 100
PRETRAIN_LENGTH = 64  # tokens of a text in pre-training
CHECKPOINT_EVERY = 250  # steps of pre-training
PRETRAIN_FIELDS = (
    "vocabulary", "width", "layers", "heads", "feedforward", "tied", "pretrain_steps", "pretrain_batch_size",
    "pretrain_lr",
)  # fmt: skip


# ---- tokenizer


def train_tokenizer(corpus: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer with T5's conventions, trained on ``corpus``; the same corpus gives the same bytes.

    Ids: ``<pad>`` 0, ``</s>`` 1, ``<unk>`` 2, at most ``vocabulary`` tokens, then ``<extra_id_99>`` … ``<extra_id_0>``.
    Words begin with ▁, all whitespace counts as one space, and a text ends with ``</s>``.

    Raises:
        UserError: the corpus is empty, or has more characters than ``vocabulary``.
    """
    characters = sorted({c for text in corpus for c in text if not c.isspace()} | {"▁"})
    if len(characters) == 1:
        raise UserError("the training texts are empty: there is nothing to make a tokenizer from; give other data")
    if len(characters) > vocabulary:
        raise UserError(
            f"--vocabulary is {vocabulary}, but the training texts have {len(characters)} different characters: "
            "give more"
        )
    # byte-pair encoding, as tokenizers' Unigram trainer (T5's own kind) does not find the same tokens each time
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    trainer = trainers.BpeTrainer(
        vocab_size=3 + vocabulary,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=characters,
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(SENTINELS))]
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in sentinels])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=sentinels,
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )


def sentinel_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of ``<extra_id_0>``, ``<extra_id_1>``, … (mT5 writes ``▁<extra_id_0>``); [] if the tokenizer has none."""
    known = tokenizer.get_added_vocab()  # small, where the whole vocabulary takes 10 ms
    if not any(name.endswith("<extra_id_0>") for name in known):
        known = tokenizer.get_vocab()
    ids: list[int] = []
    while True:
        name = f"<extra_id_{len(ids)}>"
        found = known.get(name, known.get(f"▁{name}"))
        if found is None:
            return ids
        ids.append(found)


# ---- tiny T5 and its pre-training


def tiny_t5(config: Config, tokenizer: PreTrainedTokenizerBase) -> T5ForConditionalGeneration:
    """A T5 v1.1 of the config's size for ``tokenizer``, initialised from the global random state of torch."""
    embeddings: dict[str, Any] = {
        "tie_word_embeddings": config.tied,  # decides, too, whether the decoder's output is scaled by width^-1/2
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    settings = T5Config(
        vocab_size=len(tokenizer),
        d_model=config.width,
        d_kv=config.width // config.heads,
        d_ff=config.feedforward,
        num_layers=config.layers,
        num_decoder_layers=config.layers,
        num_heads=config.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=config.dropout,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **embeddings,
    )
    settings.tie_word_embeddings = config.tied  # T5Config of transformers 5 has set it to True
    model = T5ForConditionalGeneration(settings)
    if not config.tied:  # transformers draws with std 1, T5's own code with this, so that logits begin at unit variance
        nn.init.normal_(model.lm_head.weight, std=config.width**-0.5)
        # transformers 5 has untied these, too; T5 v1.1 has one table for both inputs
        model.encoder.embed_tokens.weight = model.decoder.embed_tokens.weight = model.shared.weight
    return model


def span_corruption(
    ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    rng: np.random.Generator,
    rate: float = 0.15,
    mean_length: float = 3.0,
) -> tuple[list[int], list[int]]:
    """T5's denoising task: each masked span gives way to a sentinel in the source and follows it in the target.

    The target ends with one more sentinel, as in T5's paper; both end with ``</s>``. Spans lie anywhere in the text:
    T5's code always masks the end, which its long packed texts do not notice but single sentences would.

    Args:
        ids: the tokens of a text, without ``</s>``; at least one is masked, and one kept.
        tokenizer: has sentinels. rng: draws the spans. rate: share of masked tokens. mean_length: of a span.

    Raises:
        UserError: fewer than two tokens.
    """
    if len(ids) < 2:
        raise UserError(f"span corruption needs texts of two tokens or more, not {len(ids)}: leave this one out")
    sentinels = sentinel_ids(tokenizer)
    masked = min(max(round(len(ids) * rate), 1), len(ids) - 1)
    kept = len(ids) - masked
    count = min(max(round(masked / mean_length), 1), masked, kept + 1, len(sentinels) - 1)
    spans = _parts(masked, count, rng)
    gaps = _parts(kept + 2, count + 1, rng)  # at least 1 between two spans, 0 before the first and after the last
    gaps[0], gaps[-1] = gaps[0] - 1, gaps[-1] - 1
    source: list[int] = []
    target: list[int] = []
    at = 0
    for sentinel, gap, span in zip(sentinels, gaps, spans, strict=False):
        source += [*ids[at : at + gap], sentinel]
        target += [sentinel, *ids[at + gap : at + gap + span]]
        at += gap + span
    return [*source, *ids[at:], tokenizer.eos_token_id], [*target, sentinels[count], tokenizer.eos_token_id]


def _parts(total: int, count: int, rng: np.random.Generator) -> list[int]:
    """``count`` numbers of at least 1 that add up to ``total``, all such lists equally likely."""
    cuts = np.sort(rng.choice(total - 1, count - 1, replace=False)) + 1
    return [int(n) for n in np.diff([0, *cuts, total])]


def pretrained(
    config: Config, corpus: Sequence[str], accelerator: Accelerator
) -> tuple[T5ForConditionalGeneration, PreTrainedTokenizerFast]:
    """The tiny T5 after ``config.pretrain_steps`` steps of span corruption on ``corpus``, and its tokenizer.

    It is trained once for all runs that agree in what decides it, and kept in ``$METAZOO_CACHE`` (~/.cache/metazoo).
    Processes that want the same wait for the one that trains; killed, it goes on from its last checkpoint. As for T5
    v1.1, dropout is off in pre-training. The global random states are left as they were.

    Returns:
        The model, in eval mode on the CPU, and the tokenizer.

    Raises:
        UserError: the corpus or the cache folder does not serve, or the loss became infinite.
    """
    with _random_states_kept():
        if config.pretrain_steps == 0:
            tokenizer = train_tokenizer(corpus, config.vocabulary)
            torch.manual_seed(_seed(config))
            model = tiny_t5(config, tokenizer)
            model.eval()  # type: ignore[no-untyped-call]
            return model, tokenizer
        settings = _what_decides(config, corpus, accelerator)
        name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
        root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "metazoo") / "flipped-learning"
        entry = root / name
        if not _complete(entry):
            try:
                root.mkdir(parents=True, exist_ok=True)
                with _locked(root / f"{name}.lock"):
                    if not _complete(entry):  # another process may have made it in the meantime
                        _pretrain(config, corpus, accelerator, entry, settings)
            except (OSError, SafetensorError) as error:
                reason = getattr(error, "strerror", None) or error
                raise UserError(
                    f"cannot write the pre-trained model in {root}: {reason}; set {CACHE_VARIABLE} to a folder that "
                    "can be written, with free space"
                ) from error
        with quiet():
            model = T5ForConditionalGeneration.from_pretrained(
                entry, dtype=torch.float32, use_safetensors=True, dropout_rate=config.dropout
            )
            tokenizer = PreTrainedTokenizerFast.from_pretrained(entry)
        _settle(model)
        if accelerator.num_processes > 1:  # machines with folders of their own have trained one each
            nn.Module.to(model, accelerator.device)
            for parameter in model.parameters():
                parameter.data.copy_(broadcast(parameter.data))
            nn.Module.to(model, "cpu")
        return model, tokenizer


def _seed(config: Config) -> int:
    return config.seed if config.pretrain_seed is None else config.pretrain_seed


def _what_decides(config: Config, corpus: Sequence[str], accelerator: Accelerator) -> dict[str, Any]:
    return {
        "format": CACHE_FORMAT,
        **{name: getattr(config, name) for name in PRETRAIN_FIELDS},
        "seed": _seed(config),
        "corpus": hashlib.sha256(json.dumps(list(corpus)).encode()).hexdigest(),
        "device": accelerator.device.type,
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
    }


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of one cache entry; say so when another process has it."""
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=1)
    except filelock.Timeout:
        _say("another process pre-trains this model: waiting for it")
        lock.acquire(poll_interval=0.5)
    try:
        yield
    finally:
        lock.release()


def _complete(entry: Path) -> bool:
    """Whether the files of a cache entry are all there and as they were written; a damaged one is named."""
    if not entry.is_dir():
        return False
    try:
        written = json.loads((entry / "entry.json").read_text(encoding="utf-8"))["sha256"]
        damaged = [name for name, digest in written.items() if _sha256(entry / name) != digest]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        damaged = [f"entry.json ({type(error).__name__})"]
    if damaged:
        _say(f"{entry} is damaged in {', '.join(damaged)}: pre-training it again")
    return not damaged


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "missing"


def _pretrain(
    config: Config, corpus: Sequence[str], accelerator: Accelerator, entry: Path, settings: dict[str, Any]
) -> None:
    """Train what belongs in ``entry``, on this process alone, going on from checkpoints that a killed one has left."""
    tokenizer = train_tokenizer(corpus, config.vocabulary)
    tokens = tokenizer(list(corpus), add_special_tokens=False)["input_ids"]
    texts = [ids[:PRETRAIN_LENGTH] for ids in tokens if len(ids) > 1]
    if not texts:
        raise UserError("no training text has two tokens or more: there is nothing to pre-train on; give other data")
    torch.manual_seed(_seed(config))
    model = tiny_t5(config, tokenizer).to(accelerator.device).eval()  # eval: without dropout
    optimizer = torch.optim.Adam(model.parameters(), lr=config.pretrain_lr)
    state: dict[str, checkpoint.Stateful] = {"model": model, "optimizer": optimizer}
    checkpoints = entry.with_name(f"{entry.name}.training")
    try:
        first = checkpoint.restore(checkpoints, state, say=_say)
    except UserError as error:
        _say(f"{' '.join(str(error).split())}; pre-training from the start")
        shutil.rmtree(checkpoints)
        first = 0
    steps, loss = config.pretrain_steps, math.nan
    progress = tqdm(range(first, steps), total=steps, initial=first, desc="pre-training", unit="step", disable=None)
    for step in progress:
        for group in optimizer.param_groups:
            group["lr"] = config.pretrain_lr * _rate(step, steps)
        rng = np.random.default_rng([_seed(config), step])
        drawn = rng.integers(len(texts), size=config.pretrain_batch_size)
        pairs = [span_corruption(texts[i], tokenizer, rng) for i in drawn]
        source = _padded([source for source, _ in pairs], 0).to(accelerator.device)
        target = _padded([target for _, target in pairs], -100).to(accelerator.device)
        output = model(input_ids=source, attention_mask=source.ne(0).long(), labels=target)
        optimizer.zero_grad()
        output.loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % 50 == 0 or done % CHECKPOINT_EVERY == 0 or done == steps:
            loss = output.loss.item()
            if not math.isfinite(loss):
                raise UserError(f"the loss of pre-training became {loss} at step {done}: use a lower --pretrain-lr")
            progress.set_postfix(loss=f"{loss:.3g}", refresh=False)
        if done % CHECKPOINT_EVERY == 0 or done == steps:
            checkpoint.save(checkpoints, done, state)
    beside = entry.with_name(f".{entry.name}.tmp")  # no process but this one, as it holds the lock
    shutil.rmtree(beside, ignore_errors=True)
    with quiet():
        model.config.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
    # not model.save_pretrained: under torchrun it writes on rank 0 only, and any rank may have come here first
    weights = {name: value.detach().to("cpu").contiguous() for name, value in model.named_parameters()}
    save_file(weights, beside / "model.safetensors", metadata={"format": "pt"})
    digests = {path.name: _sha256(path) for path in sorted(beside.iterdir())}
    head = {"sha256": digests, "settings": settings, "loss": None if math.isnan(loss) else loss}
    (beside / "entry.json").write_text(json.dumps(head, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(entry, ignore_errors=True)
    beside.rename(entry)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first 5 % of the steps, then down to 0.1, both linearly."""
    warmup = math.ceil(0.05 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.9 * (step + 1 - warmup) / (steps - warmup)


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    """[N, length of the longest row], filled up with ``value`` at the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


# ---- any model


def load_model(
    config: Config, corpus: Sequence[str], accelerator: Accelerator
) -> tuple[nn.Module, PreTrainedTokenizerBase]:
    """The model of ``config``, ready to be trained, and its tokenizer.

    Args:
        config: names a hub id or folder, or tiny. corpus: texts that tiny is pre-trained on. accelerator: device and
            processes of the pre-training.

    Returns:
        The model (with --lora: a PeftModel, only its adapters trainable) in float32 and eval mode on the CPU. The
        global random states are left as they were.

    Raises:
        UserError: the model cannot be had, is not seq2seq, has no safetensors, or its tokenizer does not serve.
    """
    if config.lora and importlib.util.find_spec("peft") is None:
        raise UserError("--lora needs peft: pip install peft, or leave it out")
    with _random_states_kept():
        model: Any
        tokenizer: PreTrainedTokenizerBase
        if config.model == "tiny":
            model, tokenizer = pretrained(config, corpus, accelerator)
        else:
            model, tokenizer = from_hub_or_folder(config)
        if config.gradient_checkpointing:
            model.config.use_cache = False
            try:
                enable = getattr(model, "activation_checkpointing_enable", None)  # its name since transformers 5.24
                (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
            except ValueError as error:
                raise UserError(f"{config.model} has no gradient checkpointing: leave it out") from error
        if config.lora:
            model = _with_lora(config, model)
        return model.eval(), tokenizer


def parameters(model: nn.Module) -> int:
    """Number of weights that are trained."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and the hub from logging, warning and drawing bars: what matters is raised as a UserError."""
    ours, hubs = transformers.utils.logging, huggingface_hub.utils.logging
    levels = ours.get_verbosity(), hubs.get_verbosity()
    drawn = ours.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the environment decides on the bars, the hub warns
        ours.set_verbosity(logging.CRITICAL)
        hubs.set_verbosity(logging.CRITICAL)
        ours.disable_progress_bar()  # type: ignore[no-untyped-call]
        disable_progress_bars()
        try:
            yield
        finally:
            ours.set_verbosity(levels[0])
            hubs.set_verbosity(levels[1])
            if drawn[0]:
                ours.enable_progress_bar()  # type: ignore[no-untyped-call]
            (enable_progress_bars if drawn[1] else disable_progress_bars)()


def from_hub_or_folder(config: Config) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name = config.model
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"--model {name}: no such folder; give the folder or hub id of a seq2seq model")
    with quiet():
        local = Path(name).is_dir() or not _hub_answers(name)
        try:
            settings = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local)
            if not settings.is_encoder_decoder:
                raise UserError(
                    f"--model {name} is not seq2seq ({settings.model_type}): give an encoder-decoder such as "
                    "google/t5-v1_1-small"
                )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
            _check_tokenizer(config, tokenizer)
            for field in ("dropout_rate", "dropout"):  # T5's name, and the others'
                if hasattr(settings, field):
                    setattr(settings, field, config.dropout)
            model, found = AutoModelForSeq2SeqLM.from_pretrained(
                name,
                config=settings,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=local,
                output_loading_info=True,
            )
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
            reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
            reason = reason if len(reason) <= 240 else f"{reason[:240]}…"
            raise UserError(
                f"cannot load --model {name}: {reason}; give the folder or hub id of a seq2seq model with "
                "safetensors weights"
            ) from error
    if found["missing_keys"]:
        raise UserError(
            f"--model {name} lacks the weights {', '.join(sorted(found['missing_keys'])[:3])}: it is not a complete "
            f"{type(model).__name__}; give another"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model "
            f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
        )
    if getattr(model.config, "decoder_start_token_id", None) is None:
        model.config.decoder_start_token_id = tokenizer.pad_token_id  # as all T5 have it
    _settle(model)
    return model, tokenizer


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached; it is asked once, as the loaders would try again and again for half a minute."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        return True  # with a refusal, which the loader will report
    except Exception:  # of the HTTP client, whose kind differs by version
        return False  # what has been downloaded before can still be loaded
    return True


def _check_tokenizer(config: Config, tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise UserError(f"--model {config.model}: its tokenizer has no padding or end token; give another model")
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - {"▁"}:  # transformers makes up an empty one
        raise UserError(f"--model {config.model} has no tokenizer: save the tokenizer's files with the model's")
    if config.method == "flipped" and config.sentinels and len(sentinel_ids(tokenizer)) < 3:
        raise UserError(f"--model {config.model}: its tokenizer has no sentinels (<extra_id_0> …): use --no-sentinels")


def _settle(model: PreTrainedModel) -> None:
    """Make a loaded model independent of its file, which is only mapped, and of T5Config's claim that all are tied."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    if isinstance(model, T5ForConditionalGeneration):  # else the next tie_weights() would tie it
        model.config.tie_word_embeddings = model.lm_head.weight is model.shared.weight


def _with_lora(config: Config, model: PreTrainedModel) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    layers = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    settings = LoraConfig(
        task_type=TaskType.SEQ_2_SEQ_LM,
        r=config.lora,
        lora_alpha=2 * config.lora,
        lora_dropout=0.0,
        target_modules=["q", "v"] if {"q", "v"} <= layers else None,  # None: peft's own choice
    )
    torch.manual_seed(config.seed)
    try:
        with quiet():
            return get_peft_model(model, settings)
    except ValueError as error:
        raise UserError(f"--lora: peft does not know where to adapt {model.config.model_type}; leave it out") from error


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Leave the global random states of Python, NumPy and torch as they were."""
    states = checkpoint.RandomState()
    before = states.state_dict()
    try:
        yield
    finally:
        states.load_state_dict(before)


def _say(line: str) -> None:
    print(line, file=sys.stderr)
