"""Cloze templates in LM-BFF's syntax, with a label word for each class; and those of the paper's tasks."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from metazoo.errors import UserError

from list_selftrain.config import Config

_PIECE = re.compile(r"\*([^*]+)\*")
_SENTENCE = re.compile(r"(\+?)sent(-?)(l?)_([01])")


@dataclass(frozen=True)
class PromptTemplate:
    """A template and the label words, in the order of the classes.

    Pieces between asterisks, all else is text, where `_` stands for a space:
    ``*cls*``, ``*mask*``, ``*sep*`` and ``*sep+*``; ``*sent_0*`` and ``*sent_1*``, the sentences; with ``+`` before
    (``*+sent_0*``) after a space, with ``-`` (``*sent-_0*``) without the last character, with ``l`` (``*sentl_1*``)
    with a lower-case first letter.

    Raises:
        UserError: not exactly one mask, no first sentence, an unknown piece, or words that do not serve.
    """

    template: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        kinds = [kind for kind, _ in self.pieces()]
        if (masks := kinds.count("mask")) != 1:
            raise UserError(f"template {self.template!r} has {masks} masks: give *mask* once")
        if not any(kind == "sentence" and _place(value) == 0 for kind, value in self.pieces()):
            raise UserError(f"template {self.template!r} has no first sentence: give *sent_0*")
        if len(self.words) < 2:
            raise UserError(f"label words {self.words}: give two or more")
        if len(set(self.words)) < len(self.words):
            raise UserError(f"label words {', '.join(self.words)}: two classes have the same: give different ones")

    @classmethod
    def from_lmbff(cls, template: str, mapping: str | Mapping[Any, str]) -> PromptTemplate:
        """A template with LM-BFF's mapping from class to word, a dictionary or the text of one; its order is kept.

        Raises:
            UserError: the mapping is no dictionary of words; as for the class itself.
        """
        if isinstance(mapping, str):
            try:
                mapping = ast.literal_eval(mapping)
            except (ValueError, SyntaxError) as error:
                raise UserError(f"mapping {mapping!r}: give a dictionary such as {{0: 'terrible'}}") from error
        if not isinstance(mapping, Mapping) or not all(isinstance(word, str) for word in mapping.values()):
            raise UserError(f"mapping {mapping!r}: give a dictionary from class to word")
        return cls(template, tuple(mapping.values()))

    def pieces(self) -> list[tuple[str, str]]:
        """(kind, value): cls, mask, sep, sentence (its piece) and text, in order."""
        found: list[tuple[str, str]] = []
        parts = _PIECE.split(self.template)  # text and pieces in turn
        for i, part in enumerate(parts):
            if i % 2 == 0:
                if "*" in part:
                    raise UserError(f"template {self.template!r}: an asterisk has no partner: mend it")
                if part:
                    found.append(("text", part.replace("_", " ")))
            elif part in ("cls", "mask"):
                found.append((part, part))
            elif part in ("sep", "sep+"):
                found.append(("sep", part))
            elif _SENTENCE.fullmatch(part):
                found.append(("sentence", part))
            else:
                raise UserError(
                    f"template {self.template!r}: unknown piece *{part}*: give cls, mask, sep+, sent_0, sent_1, or a "
                    "sentence with + before, - or l after sent"
                )
        return found

    @property
    def sentences(self) -> int:
        """Sentences that an example must have."""
        return 1 + max(_place(value) for kind, value in self.pieces() if kind == "sentence")

    def render(self, texts: tuple[str, ...], tokenizer: Any = None) -> str:
        """The prompt as text, with the tokenizer's marks [default: RoBERTa's].

        Raises:
            UserError: too few sentences.
        """
        marks = {"cls": "<s>", "mask": "<mask>", "sep": "</s>"}
        if tokenizer is not None:
            marks = {kind: str(getattr(tokenizer, f"{kind}_token")) for kind in marks}
        return "".join(
            marks[kind] if kind in marks else self._sentence(value, texts) if kind == "sentence" else value
            for kind, value in self.pieces()
        )

    def encode(self, texts: tuple[str, ...], tokenizer: Any, max_length: int) -> tuple[list[int], int]:
        """Token ids and the place of the mask.

        Each piece is tokenized alone, as LM-BFF does. What is too long loses tokens at the end of its longest sentence,
        the template never.

        Raises:
            UserError: too few sentences, a template that is longer than ``max_length``, or a mark that the tokenizer
                lacks.
        """
        marks = {"cls": tokenizer.cls_token_id, "mask": tokenizer.mask_token_id, "sep": tokenizer.sep_token_id}
        if lacking := [kind for kind, _ in self.pieces() if kind in marks and marks[kind] is None]:
            raise UserError(
                f"template {self.template!r}: the tokenizer has no token for *{lacking[0]}*: leave it out or give "
                "another model"
            )
        parts: list[tuple[str, list[int]]] = []
        for kind, value in self.pieces():
            if kind in marks:
                parts.append((kind, [marks[kind]]))
            else:
                text = self._sentence(value, texts) if kind == "sentence" else value
                parts.append((kind, tokenizer(text, add_special_tokens=False)["input_ids"]))
        excess = sum(len(ids) for _, ids in parts) - max_length
        sentences = [ids for kind, ids in parts if kind == "sentence"]
        while excess > 0:
            longest = max(sentences, key=len)
            others = max((len(ids) for ids in sentences if ids is not longest), default=0)
            cut = min(excess, max(1, len(longest) - others), len(longest) - 1)
            if cut < 1:
                raise UserError(
                    f"template {self.template!r} leaves no place for a sentence in {max_length} tokens: raise "
                    "--max-length"
                )
            del longest[-cut:]
            excess -= cut
        ids: list[int] = []
        mask = 0
        for kind, part in parts:
            if kind == "mask":
                mask = len(ids)
            ids += part
        return ids, mask

    def _sentence(self, piece: str, texts: tuple[str, ...]) -> str:
        match = _SENTENCE.fullmatch(piece)
        assert match
        space, cut, lower, place = match.groups()
        if int(place) >= len(texts):
            raise UserError(f"template {self.template!r} wants {int(place) + 1} sentences, an example has {len(texts)}")
        text = texts[int(place)]
        text = text[:-1] if cut else text
        text = text[:1].lower() + text[1:] if lower else text
        return " " + text if space else text

    def label_ids(self, tokenizer: Any) -> list[int]:
        """The token of each label word, with a leading space where the tokenizer tells one.

        Raises:
            UserError: a word is not one token, or none that is known; the message has the tokens that it got.
        """
        found = []
        for word in self.words:
            ids = tokenizer(" " + word, add_special_tokens=False)["input_ids"]
            if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
                tokens = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
                raise UserError(
                    f"label word {word!r} is not one token of this model but {len(ids)}: {tokens}; give a word that is "
                    "one"
                )
            found.append(ids[0])
        if len(set(found)) < len(found):
            raise UserError(f"label words {', '.join(self.words)}: two are the same token: give different ones")
        return found


def _place(piece: str) -> int:
    return int(piece[-1])


_SENTIMENT = PromptTemplate("*cls**sent_0*_It_was*mask*.*sep+*", ("terrible", "great"))
_PAIR = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"
_SAME = PromptTemplate("*cls**sent_0**mask*,*+sentl_1**sep+*", ("No", "Yes"))
_NLI = PromptTemplate(_PAIR, ("No", "Yes", "Maybe"))  # contradiction, entailment, neutral

# Templates and label words of the paper's tasks, by the names of --dataset.
TEMPLATES: dict[str, PromptTemplate] = {
    "generated": _SENTIMENT,
    "sst2": _SENTIMENT,
    "mr": _SENTIMENT,
    "cr": _SENTIMENT,
    "mpqa": _SENTIMENT,
    "sst5": PromptTemplate(_SENTIMENT.template, ("terrible", "bad", "okay", "good", "great")),
    "subj": PromptTemplate("*cls**sent_0*_This_is*mask*.*sep+*", ("subjective", "objective")),
    "trec": PromptTemplate(
        "*cls**mask*:*+sent_0**sep+*", ("Description", "Entity", "Expression", "Human", "Location", "Number")
    ),
    "cola": PromptTemplate("*cls**sent_0*_This_is*mask*.*sep+*", ("incorrect", "correct")),
    "mnli": _NLI,
    "snli": _NLI,
    "rte": PromptTemplate(_PAIR, ("No", "Yes")),
    "qnli": PromptTemplate(_PAIR, ("No", "Yes")),
    "qqp": _SAME,
    "mrpc": _SAME,
}


def template_for(config: Config, labels: tuple[str, ...]) -> PromptTemplate:
    """The template and words of the settings, else those of the data set.

    Raises:
        UserError: there are none, or not a word for each class.
    """
    known = TEMPLATES.get(config.dataset)
    if known is None and not (config.template and config.words):
        raise UserError(
            f"{config.dataset} has no template of its own: give --template, as '*cls**sent_0*_It_was*mask*.*sep+*', "
            f"and --words, one for each of {', '.join(labels)}"
        )
    template = config.template or (known.template if known else "")
    words = config.words or (known.words if known else ())
    if len(words) != len(labels):
        raise UserError(
            f"{len(words)} label words for the {len(labels)} classes {', '.join(labels)}: give --words for each"
        )
    return PromptTemplate(template, tuple(words))
