"""Flipped learning: the likelihood of the instruction given the input and a label, and its unlikelihood given a wrong
label; and the scores of options by the three rules.

A prompted instance is (I, x, L = {l_1 … l_K}, l_c): instruction, input, options, right option (Section 3).

    DIRECT   argmax_k P(l_k | I, x)        CHANNEL  argmax_k P(I, x | l_k)        FLIPPED  argmax_k P(I | x, l_k)

Meta-training minimises L = L_LM + λ L_UL with
    L_LM = −Σ_t log P(I_t | x, l_c, I_<t)        L_UL = −Σ_t log(1 − P(I_t | x, l_w, I_<t))
and l_w drawn uniformly from L without l_c.
Both terms train all weights; nothing is detached. Sums are divided by the number of tokens that count, over the whole
batch, as T5 does (the paper does not say: sum or mean).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from metazoo.errors import UserError
from torch import Tensor, nn

from flipped_learning.templates import Instance

Method = Literal["flipped", "direct", "channel"]
IGNORED = -100
# p is held below 1 − 1e-6 in log(1 − p): in float32 its logarithm is noise beyond.
LARGEST_LOG_P = float(np.log1p(-1e-6))


def source_and_target(instance: Instance, option: str, method: Method, *, sentinels: bool = True) -> tuple[str, str]:
    """What the encoder reads and what the decoder is scored on, for one option.

    flipped: the source is "input: " + the instance + newline + "output: " + the option, with <extra_id_i> where the
    template has its i-th piece of instruction; the target is "<extra_id_0> piece <extra_id_1> piece … <extra_id_n>",
    as in T5's span corruption (the form of the model card's first revision; the closing sentinel is our reading).
    Without ``sentinels`` both are plain text. direct: the prompt, and the option. channel: the option, and the prompt.

    Raises:
        UserError: flipped, and the template has no instruction text, so that all options would score alike.
    """
    if method == "direct":
        return _plain(instance.prompt), _plain(option)
    if method == "channel":
        return _plain(option), _plain(instance.prompt)
    pieces = [_plain(piece).strip() for piece in instance.pieces]
    wanted = [piece for piece in pieces if piece]
    if not wanted:
        raise UserError("the template has no text but the fields, so all options would score alike: add an instruction")
    marks = iter(range(len(wanted)))
    body = []
    for i, piece in enumerate(pieces):
        if piece and sentinels:
            body.append(f"<extra_id_{next(marks)}>")
        if i < len(instance.fields):
            body.append(_plain(instance.fields[i]))
    source = f"input: {' '.join(body)}\noutput: {_plain(option)}"
    if not sentinels:
        return source, " ".join(wanted)
    target = [f"<extra_id_{i}> {piece}" for i, piece in enumerate(wanted)]
    return source, " ".join([*target, f"<extra_id_{len(wanted)}>"])


def _plain(text: str) -> str:
    """Users' text must not be read as a special token."""
    return re.sub(r"<(?=/?s>|pad>|unk>|extra_id_\d)", "< ", text)


def token_log_probs(logits: Tensor, labels: Tensor) -> Tensor:
    """log P(label_t | …) [B, T] in float32 from logits [B, T, V]; 0 where ``labels`` is −100."""
    losses = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(labels.shape)


def likelihood_loss(log_probs: Tensor) -> Tensor:
    """L_LM = −Σ_t log P(I_t | x, l_c, I_<t), from token log-probabilities of any shape (0 where none counts)."""
    return -log_probs.sum()


def unlikelihood_loss(log_probs: Tensor, counts: Tensor) -> Tensor:
    """L_UL = −Σ_t log(1 − P(I_t | x, l_w, I_<t)) over the tokens where ``counts`` is true.

    The value of p stops at 1 − 1e-6. The gradient does not: by the logits it is p (δ_jy − p_j) / (1 − p), of norm at
    most √2 p however near p is to 1; only by log p it explodes.
    """
    held = log_probs - (log_probs - LARGEST_LOG_P).clamp(min=0).detach()
    held = torch.where(counts, held, -1.0)  # no log(0) and no gradient where nothing counts
    # log(1 − e^x), exact at both ends
    log1mexp = torch.where(held > -0.693, torch.log(-torch.expm1(held)), torch.log1p(-torch.exp(held)))
    return -torch.where(counts, log1mexp, 0.0).sum()


@dataclass(frozen=True)
class Batch:
    """``input_ids``, ``attention_mask`` [N, S], ``labels`` [N, T] (−100: padding), ``counted`` [N, T] (tokens of the
    instruction itself), ``wrong`` [N] (whether the row has a wrong option)."""

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor
    counted: Tensor
    wrong: Tensor

    def take(self, rows: Tensor | Sequence[int]) -> Batch:
        """The given rows."""
        index = torch.as_tensor(rows)
        return Batch(*(value[index] for value in vars(self).values()))

    def to(self, device: torch.device | str) -> Batch:
        return Batch(*(value.to(device) for value in vars(self).values()))


class FlippedCollator:
    """Instances as padded tensors.

    Args:
        tokenizer: of the seq2seq model. method, sentinels: see :func:`source_and_target`. max_source, max_target:
            tokens; a longer source loses text of the instance, never of instruction or option (``shortened`` counts);
            a longer target its end (``cut`` counts). unlikelihood_on_sentinels: count them in ``counted``, too.
    """

    def __init__(
        self, tokenizer: Any, method: Method = "flipped", *, sentinels: bool = True, max_source: int = 512,
        max_target: int = 128, unlikelihood_on_sentinels: bool = False,
    ) -> None:  # fmt: skip
        self.tokenizer, self.method, self.sentinels = tokenizer, method, sentinels
        self.max_source, self.max_target = max_source, max_target
        self.shortened = self.cut = 0
        special = set(tokenizer.all_special_ids)
        special |= {i for i in map(tokenizer.convert_tokens_to_ids, map("<extra_id_{}>".format, range(100))) if i}
        special -= {tokenizer.unk_token_id}
        self.uncounted = torch.tensor([] if unlikelihood_on_sentinels else sorted(special), dtype=torch.long)
        known = tokenizer.get_vocab()
        self.marks = sum(f"<extra_id_{i}>" in known for i in range(100))
        self._ids: Callable[[str], list[int]] = functools.lru_cache(100_000)(lambda text: tokenizer(text)["input_ids"])

    def encode(self, instance: Instance, option: str) -> tuple[list[int], list[int]]:
        """Ids of source and target.

        Raises:
            UserError: no instruction, more pieces than the tokenizer has sentinels, or instruction and option alone
                are longer than max_source.
        """
        source, target = source_and_target(instance, option, self.method, sentinels=self.sentinels)
        if self.method == "flipped" and self.sentinels and target.count("<extra_id_") > self.marks:
            raise UserError(
                f"the template's instruction is in {target.count('<extra_id_') - 1} pieces, the tokenizer has "
                f"{self.marks} sentinels: use a simpler template, or --no-sentinels"
            )
        ids = self._ids(source)
        if len(ids) > self.max_source:
            self.shortened += 1
            if self.method == "channel":  # an option longer than the model takes
                raise UserError(f"an option has {len(ids)} tokens, more than --max-source {self.max_source}")
            while len(ids) > self.max_source:
                instance = self._shorten(instance, len(ids) - self.max_source)
                ids = self._ids(source_and_target(instance, option, self.method, sentinels=self.sentinels)[0])
        labels = self._ids(target)
        if len(labels) > self.max_target:
            self.cut += 1
            labels = labels[: self.max_target]
        return ids, labels

    def _shorten(self, instance: Instance, tokens: int) -> Instance:
        """``instance`` without the last ``tokens`` tokens (or all but one) of its longest field."""
        sizes = [len(self._ids(_plain(field))) for field in instance.fields]
        longest = max(range(len(sizes)), key=sizes.__getitem__, default=None)
        text = "" if longest is None else instance.fields[longest]
        ids = self._ids(_plain(text))
        kept = len(ids) - 1 - tokens  # one is the end token
        if longest is None or len(ids) <= 2:
            raise UserError(
                f"instruction and option alone have more than --max-source {self.max_source} tokens: give more, or a "
                "shorter template"
            )
        shorter = self.tokenizer.decode(ids[: max(1, kept)], skip_special_tokens=True)
        if len(shorter) >= len(text):
            shorter = text[: len(text) // 2]
        fields = (*instance.fields[:longest], shorter, *instance.fields[longest + 1 :])
        return Instance(instance.pieces, fields, instance.options, instance.label)

    def pad(self, pairs: Sequence[tuple[list[int], list[int]]], wrong: Sequence[bool] = ()) -> Batch:
        """Pairs of source and target ids as one batch, padded on the right."""
        longest = max(len(source) for source, _ in pairs), max(len(target) for _, target in pairs)
        input_ids = torch.full((len(pairs), longest[0]), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        labels = torch.full((len(pairs), longest[1]), IGNORED)
        for row, (source, target) in enumerate(pairs):
            input_ids[row, : len(source)] = torch.tensor(source)
            attention_mask[row, : len(source)] = 1
            labels[row, : len(target)] = torch.tensor(target)
        counted = (labels != IGNORED) & ~torch.isin(labels, self.uncounted)
        return Batch(input_ids, attention_mask, labels, counted, torch.tensor(list(wrong) or [False] * len(pairs)))

    def __call__(self, instances: Sequence[Instance], wrong: Sequence[int] | None = None) -> Batch:
        """Rows with the right option, then, where ``wrong`` is given, as many with option ``wrong[i]`` of instance i.

        Raises:
            UserError: an instance without label, or as :meth:`encode`.
        """
        labels = []
        for instance in instances:
            if instance.label is None:
                raise UserError("an instance to train on has no label: give one to each example")
            labels.append(instance.label)
        pairs = [self.encode(one, one.options[k]) for one, k in zip(instances, labels, strict=True)]
        if wrong is not None:
            pairs += [self.encode(one, one.options[k]) for one, k in zip(instances, wrong, strict=True)]
        return self.pad(pairs, [i >= len(instances) for i in range(len(pairs))])


def batch_log_probs(model: nn.Module, batch: Batch) -> Tensor:
    """Token log-probabilities [N, T] of the targets of ``batch``, by one encoder and one decoder pass."""
    start = model.prepare_decoder_input_ids_from_labels(batch.labels)
    output = model(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, decoder_input_ids=start, use_cache=False
    )
    return token_log_probs(output.logits, batch.labels)


@dataclass(frozen=True)
class Terms:
    """Sums over a batch and how many tokens count in each: likelihood of right rows, unlikelihood of wrong rows."""

    likelihood: Tensor
    unlikelihood: Tensor
    log_p_right: Tensor
    log_p_wrong: Tensor

    def loss(self, right_tokens: int, wrong_tokens: int, weight: float) -> Tensor:
        """L_LM / T_c + λ L_UL / T_w."""
        loss = self.likelihood / max(1, right_tokens)
        return loss + weight * self.unlikelihood / max(1, wrong_tokens) if weight else loss


def loss_terms(log_probs: Tensor, batch: Batch) -> Terms:
    """The two terms of the objective as sums, and the sums of log P over the instruction's own tokens."""
    wrong = batch.wrong[:, None]
    right = torch.where(wrong, 0.0, log_probs)
    counted = batch.counted & wrong
    detached = log_probs.detach()
    return Terms(
        likelihood_loss(right),
        unlikelihood_loss(log_probs, counted),
        torch.where(batch.counted & ~wrong, detached, 0.0).sum(),
        torch.where(counted, detached, 0.0).sum(),
    )


def token_counts(batch: Batch) -> tuple[int, int, int]:
    """Tokens of right rows (all), of wrong rows (the instruction's own), and of right rows (the instruction's own)."""
    wrong = batch.wrong[:, None]
    right = (batch.labels != IGNORED) & ~wrong
    return int(right.sum()), int((batch.counted & wrong).sum()), int((batch.counted & ~wrong).sum())


@torch.no_grad()
def score(
    model: nn.Module,
    collator: FlippedCollator,
    instances: Sequence[Instance],
    *,
    batch_size: int = 64,
    normalise: bool = False,
    progress: bool = False,
) -> list[np.ndarray]:
    """log P(target | source) of every option of every instance: an array [K_i] for each, in nats, summed over tokens.

    Pairs are sorted by length and passed ``batch_size`` at a time; padding is masked, so that batches change nothing
    but rounding. A source that several options share (direct, channel) is encoded once a batch.

    Args:
        normalise: divide by the number of target tokens (never changes FLIPPED's choice; can change DIRECT's, for
            which T0 does not).

    Raises:
        UserError: fewer than two options, two options that are the same tokens, or as FlippedCollator.encode.
    """
    device = next(model.parameters()).device
    pairs, owner = [], []
    for i, instance in enumerate(instances):
        if len(instance.options) < 2:
            raise UserError(f"{len(instance.options)} option(s): a choice needs two or more")
        encoded = [collator.encode(instance, option) for option in instance.options]
        keys = [(tuple(source), tuple(target)) for source, target in encoded]
        if len(set(keys)) < len(keys):
            twice = next(k for k, key in enumerate(keys) if key in keys[:k])
            raise UserError(
                f"option {instance.options[twice]!r} is the same tokens as another of {list(instance.options)}: "
                "give options that the tokenizer tells apart"
            )
        pairs += encoded
        owner += [i] * len(encoded)
    order = sorted(range(len(pairs)), key=lambda n: (len(pairs[n][0]), pairs[n][0], len(pairs[n][1]), pairs[n][1]))
    found = np.zeros(len(pairs))
    training = model.training
    model.eval()
    from tqdm import tqdm

    starts = range(0, len(order), batch_size)
    for first in tqdm(starts, desc="score", unit="batch", disable=None if progress else True):
        rows = order[first : first + batch_size]
        batch = collator.pad([pairs[n] for n in rows]).to(device)
        found[rows] = _sums(model, batch, [tuple(pairs[n][0]) for n in rows]).cpu().numpy()
    model.train(training)
    if normalise:
        found /= [len(target) for _, target in pairs]
    edges = np.flatnonzero(np.diff(owner)) + 1
    return np.split(found, edges) if pairs else []


def _sums(model: nn.Module, batch: Batch, sources: Sequence[tuple[int, ...]]) -> Tensor:
    """Σ_t log P of each row [N]; equal sources stand once in the encoder's batch."""
    place = {source: i for i, source in enumerate(dict.fromkeys(sources))}
    first = [sources.index(source) for source in place]
    hidden = model.get_encoder()(input_ids=batch.input_ids[first], attention_mask=batch.attention_mask[first])
    index = torch.tensor([place[source] for source in sources], device=batch.labels.device)
    encoded = hidden.last_hidden_state
    output = model(
        encoder_outputs=(encoded if len(place) == len(sources) else encoded[index],),
        attention_mask=batch.attention_mask,
        decoder_input_ids=model.prepare_decoder_input_ids_from_labels(batch.labels),
        use_cache=False,
    )
    # a row at a time: log-softmax over the whole batch would double the memory of the logits
    rows = zip(output.logits, batch.labels, strict=True)
    return torch.stack([token_log_probs(row[None], label[None]).sum() for row, label in rows])


def choose(scores: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """Index of the best option of each instance (of equal ones the first), and how many instances had a tie."""
    best = np.array([int(np.argmax(values)) for values in scores], dtype=int)
    ties = sum(int(np.sum(values == values.max()) > 1) for values in scores)
    return best, ties


def probabilities(scores: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Softmax of the log-likelihoods over the options: FLIPPED's P(l | I, x) under a uniform P(l | x)."""
    return [np.exp(values - np.logaddexp.reduce(values)) for values in scores]
