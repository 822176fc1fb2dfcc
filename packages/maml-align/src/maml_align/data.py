"""Scored sentence pairs and questions with answer sentences, in several languages, each checked on the way in."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from metazoo.data import find
from metazoo.errors import UserError

from maml_align.config import Config

EMBEDDED = ("de", "en", "es", "tr", "vi")
TOP_SCORE = 5.0
FOLDS = 5


@dataclass(frozen=True)
class Pairs:
    """Scored sentence pairs of one part.

    Attributes:
        languages: of the part.
        texts: (language of sentence 1, of sentence 2) -> sentences 1, sentences 2, scores 0..5 [N]; of an aligned set
            the pairs within a language.
        aligned: row i says the same in every language, so that sentence 1 in one and sentence 2 in another are a pair
            of the same score.
    """

    languages: tuple[str, ...]
    texts: Mapping[tuple[str, str], tuple[tuple[str, ...], tuple[str, ...], np.ndarray]]
    aligned: bool

    def has(self, one: str, other: str) -> bool:
        """Whether there are pairs of these languages, in this order."""
        return {one, other} <= set(self.languages) if self.aligned else (one, other) in self.texts

    def pairs(self, one: str, other: str) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
        """Sentences 1 in ``one``, sentences 2 in ``other``, and scores 0..5 [N].

        Raises:
            UserError: there are no such pairs.
        """
        if not self.has(one, other):
            raise UserError(f"no scored pairs {one}–{other} in the data (languages: {', '.join(self.languages)})")
        if self.aligned:
            first, scores = self.texts[one, one][0], self.texts[one, one][2]
            return first, self.texts[other, other][1], scores
        return self.texts[one, other]

    def size(self, one: str, other: str) -> int:
        """Number of these pairs."""
        return len(self.pairs(one, other)[2])

    def head(self, count: int | None) -> Pairs:
        """The first ``count`` rows of each pair of languages."""
        cut = {key: (one[:count], two[:count], scores[:count]) for key, (one, two, scores) in self.texts.items()}
        return Pairs(self.languages, cut, self.aligned)


@dataclass(frozen=True)
class Questions:
    """Questions and the sentences among which their answers are, of one part.

    Attributes:
        ids: of the Q questions, the same in all languages.
        questions: language -> Q texts, None where a translation is missing.
        sentences: language -> candidate sentences. contexts: their paragraphs, "" where there is none.
        answers: language -> candidate that answers each question, int64 [Q], -1: none.
    """

    ids: tuple[str, ...]
    questions: Mapping[str, tuple[str | None, ...]]
    sentences: Mapping[str, tuple[str, ...]]
    contexts: Mapping[str, tuple[str, ...]]
    answers: Mapping[str, np.ndarray]

    @property
    def languages(self) -> tuple[str, ...]:
        """Of the part."""
        return tuple(self.questions)

    def candidates(self, language: str, context: bool) -> list[str]:
        """Sentences, or with ``context`` each with its paragraph after it; no line breaks."""
        sentences, contexts = self.sentences[language], self.contexts[language]
        found = [f"{one} {two}" for one, two in zip(sentences, contexts, strict=True)] if context else sentences
        return [text.strip().replace("\n", " ") for text in found]

    def head(self, count: int | None) -> Questions:
        """The first ``count`` questions; all candidates."""
        return Questions(
            self.ids[:count], {one: texts[:count] for one, texts in self.questions.items()}, self.sentences,
            self.contexts, {one: answers[:count] for one, answers in self.answers.items()},
        )  # fmt: skip


@dataclass(frozen=True)
class Data:
    """A data set: Pairs, Questions, or a synthetic world, in three parts."""

    name: str
    kind: Literal["pairs", "questions", "vectors"]
    train: Any
    dev: Any
    test: Any


def load(config: Config) -> Data:
    """The data set of a config, in its languages.

    Raises:
        UserError: it is nowhere, a language or a column is not in it, or a row is wrong (with file and line).
    """
    languages = (*config.languages, *config.unseen)
    if config.dataset == "rotations":
        from maml_align import rotations

        return rotations.load(config)
    if config.dataset == "stsb":
        names = [f"stsb-{{}}-{split}.csv" for split in ("train", "dev", "test")]
        folder = _folder("stsb-multi-mt", names, languages, config)
        parts: list[Any] = [load_stsb_multi(folder, languages, split) for split in ("train", "dev", "test")]
        found = Data("stsb", "pairs", *parts)
    elif config.dataset == "xquad-r":
        found = _xquad_data(config, languages)
    elif config.dataset.startswith("hub:"):
        found = _hub(config.dataset.removeprefix("hub:"), languages)
    elif config.dataset.endswith(".csv"):
        found = _own(Path(config.dataset), config, languages)
    else:
        raise UserError(f"--dataset {config.dataset}: give xquad-r, stsb, rotations, hub:ID or the path of a .csv")
    _check_parts(found, config.dataset)
    test = found.test.head(config.max_test)
    return Data(found.name, found.kind, found.train, found.dev, test)


def texts(data: Data, languages: Sequence[str]) -> Iterator[str]:
    """Training text of the languages, each text once."""
    seen: set[str] = set()
    for text in _all_texts(data.train, languages):
        if text and text not in seen:
            seen.add(text)
            yield text


def _all_texts(part: Pairs | Questions, languages: Sequence[str]) -> Iterator[str]:
    if isinstance(part, Questions):
        for language in languages:
            yield from (text for text in part.questions[language] if text is not None)
            yield from part.contexts[language]
            yield from part.sentences[language]
        return
    for (one, other), (first, second, _) in part.texts.items():
        yield from first if one in languages else ()
        yield from second if other in languages else ()


def _folder(dataset: str, names: Sequence[str], languages: Sequence[str], config: Config) -> Path:
    """Where the files of the languages are, each of ``names`` with a language for {}; if there are files of some
    languages only, the error names the one that is missing and those that are there."""
    files = [name.format(language) for language in languages for name in names]
    try:
        return find(dataset, files, data_dir=config.data_dir)
    except UserError:
        for file in files:
            try:
                folder = find(dataset, [file], data_dir=config.data_dir)
            except UserError:
                continue
            language, missing = next(
                (language, name.format(language))
                for language in languages
                for name in names
                if not (folder / name.format(language)).is_file()
            )
            pattern = re.compile(names[0].replace(".", r"\.").format("([A-Za-z]+)"))
            there = sorted(match[1] for path in folder.iterdir() if (match := pattern.fullmatch(path.name)))
            raise UserError(
                f"{folder} has no {missing}: leave {language} out (it has {', '.join(there)}), or add the file"
            ) from None
        raise


def _check_parts(data: Data, where: str) -> None:
    """Each part has something to learn from or to score."""
    for name, part in (("train", data.train), ("dev", data.dev), ("test", data.test)):
        if isinstance(part, Pairs):
            what, some = "scored pair", any(len(scores) for _, _, scores in part.texts.values())
        else:
            what, some = "question with an answer", any((answers >= 0).any() for answers in part.answers.values())
        if not some:
            raise UserError(f"{where}: no {what} in {', '.join(part.languages)} for the {name} part: give more rows")


# Scored pairs


def load_stsb_multi(folder: Path | str, languages: Sequence[str], split: str) -> Pairs:
    """A part of STS-B in several languages: stsb-LANGUAGE-SPLIT.csv of sentence1, sentence2, score, without header.

    Raises:
        UserError: a file is missing or wrong, with its line; the languages do not have the same rows.
    """
    read = {language: _scored(Path(folder) / f"stsb-{language}-{split}.csv") for language in languages}
    first = languages[0]
    for language in languages[1:]:
        if len(read[language][2]) != len(read[first][2]) or not np.array_equal(read[language][2], read[first][2]):
            raise UserError(
                f"{folder}: stsb-{language}-{split}.csv and stsb-{first}-{split}.csv differ in rows or scores: they "
                "are to be translations of each other, row by row"
            )
    return Pairs(tuple(languages), {(one, one): read[one] for one in languages}, aligned=True)


def _scored(path: Path) -> tuple[tuple[str, ...], tuple[str, ...], np.ndarray]:
    rows = []
    for where, row in _records(path):
        if len(row) != 3:
            raise UserError(f"{where}: {len(row)} columns: give sentence1, sentence2, score")
        rows.append((_filled(row[0], where, "sentence 1"), _filled(row[1], where, "sentence 2"), _score(row[2], where)))
    if not rows:
        raise UserError(f"{path}: no rows in it")
    one, two, scores = zip(*rows, strict=True)
    return one, two, np.array(scores)


def _score(text: Any, where: str) -> float:
    try:
        score = float(text)
    except (TypeError, ValueError):
        score = math.nan
    if not 0 <= score <= TOP_SCORE:
        raise UserError(f"{where}: the score is {text!r}: give a number from 0 to {TOP_SCORE:g}")
    return score


def _filled(text: Any, where: str, what: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}: {what} is empty: give a text, or leave the row out")
    return text.strip()


def _records(path: Path) -> Iterator[tuple[str, list[str]]]:
    """File and line, and values, of each row of a .csv."""
    reader = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        for row in reader:
            yield f"{path} line {reader.line_num}", row
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num}: no CSV ({error}): save it again") from error


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {number}: not UTF-8: save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}: give a readable file") from error


def _hub(name: str, languages: Sequence[str]) -> Data:
    """A hub set with a configuration for each language, columns sentence1, sentence2, similarity_score or score."""
    try:
        import datasets
    except ImportError as error:
        raise UserError("--dataset hub:ID needs the package datasets: add the extra [hub]") from error
    parts = []
    for splits in (("train",), ("dev", "validation"), ("test",)):
        read = {}
        for language in languages:
            where = f"hub:{name} {language} {splits[0]}"
            try:
                kept = datasets.get_dataset_split_names(name, language)
                split = next((one for one in splits if one in kept), None)
                if split is None:
                    raise UserError(f"{where}: no such split (there are {', '.join(kept)}): give another set")
                rows = datasets.load_dataset(name, language, split=split)
                columns = list(rows.column_names)
                column = "similarity_score" if "similarity_score" in columns else "score"
                if not {"sentence1", "sentence2", column} <= set(columns):
                    raise UserError(
                        f"{where}: columns {', '.join(columns)}: give a set with sentence1, sentence2 and "
                        "similarity_score or score"
                    )
                one, two, scores = list(rows["sentence1"]), list(rows["sentence2"]), list(rows[column])
            except UserError:
                raise
            except Exception as error:  # whatever the hub and its formats raise
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                raise UserError(f"{where}: {reason}: check id, languages and columns, or the network") from error
            read[language] = (
                tuple(_filled(text, f"{where} row {i}", "sentence 1") for i, text in enumerate(one, 1)),
                tuple(_filled(text, f"{where} row {i}", "sentence 2") for i, text in enumerate(two, 1)),
                np.array([_score(score, f"{where} row {i}") for i, score in enumerate(scores, 1)]),
            )
        first = read[languages[0]][2]
        aligned = all(np.array_equal(scores, first) for _, _, scores in read.values())
        parts.append(Pairs(tuple(languages), {(one, one): read[one] for one in languages}, aligned))
    return Data(name, "pairs", *parts)


# Questions


@dataclass(frozen=True)
class XQuAD:
    """XQuAD-R: Questions, with the article of each question and of each candidate by language."""

    questions: Questions
    articles: np.ndarray
    of_candidate: Mapping[str, np.ndarray]


def load_xquad_r(folder: Path | str | None, languages: Sequence[str]) -> XQuAD:
    """XQuAD-R from LANGUAGE.json files (SQuAD's layout with ``sentences`` and ``sentence_breaks``).

    Args:
        folder: of the files; None: those in the package.
        languages: wanted.

    Raises:
        UserError: a file is missing or wrong, an answer lies in no sentence, or the languages differ in questions.
    """
    asked: dict[str, dict[str, str]] = {}
    answers: dict[str, dict[str, int]] = {}
    sentences: dict[str, list[str]] = {}
    contexts: dict[str, list[str]] = {}
    article_of: dict[str, int] = {}
    of_candidate: dict[str, np.ndarray] = {}
    for language in languages:
        name = f"{language}.json"
        where = name if folder is None else str(Path(folder) / name)
        try:
            articles = _json(folder, language)["data"]
            asked[language], answers[language] = {}, {}
            sentences[language], contexts[language] = [], []
            owners: list[int] = []
            for number, article in enumerate(articles):
                for paragraph in article["paragraphs"]:
                    said, breaks, start = paragraph["sentences"], paragraph["sentence_breaks"], len(owners)
                    _filled(paragraph["context"], where, "a paragraph")
                    if len(said) != len(breaks):
                        raise UserError(f"{where}: {len(said)} sentences, but {len(breaks)} breaks: fetch it again")
                    sentences[language] += [_filled(text, where, "a sentence") for text in said]
                    contexts[language] += [paragraph["context"]] * len(said)
                    owners += [number] * len(said)
                    for question in paragraph["qas"]:
                        key, at = question["id"], question["answers"][0]["answer_start"]
                        held = [i for i, (a, b) in enumerate(breaks) if a <= at < b]
                        if not held:
                            raise UserError(
                                f"{where}: the answer of question {key} lies in no sentence: fetch it again"
                            )
                        if key in asked[language]:
                            raise UserError(f"{where}: question {key} is there twice: fetch it again")
                        if article_of.setdefault(key, number) != number:
                            raise UserError(
                                f"{where}: question {key} is in another article than in {languages[0]}.json: take "
                                "files of one release"
                            )
                        asked[language][key] = _filled(question["question"], where, f"question {key}")
                        answers[language][key] = start + held[0]
            of_candidate[language] = np.array(owners, dtype=np.int64)
        except UserError:
            raise
        except (
            AttributeError, EOFError, IndexError, KeyError, OSError, RecursionError, TypeError, ValueError, zlib.error,
        ) as error:  # fmt: skip
            raise UserError(f"{where}: not XQuAD-R's layout ({error!r:.80}): fetch it again") from error
        if not asked[language]:
            raise UserError(f"{where}: no questions in it: fetch it again")
        if set(asked[language]) != set(asked[languages[0]]):
            raise UserError(f"{where}: not the same questions as {languages[0]}.json: take files of one release")
    ids = tuple(asked[languages[0]])
    questions = Questions(
        ids,
        {one: tuple(asked[one][key] for key in ids) for one in languages},
        {one: tuple(sentences[one]) for one in languages},
        {one: tuple(contexts[one]) for one in languages},
        {one: np.array([answers[one][key] for key in ids], dtype=np.int64) for one in languages},
    )
    return XQuAD(questions, np.array([article_of[key] for key in ids]), of_candidate)


def _json(folder: Path | str | None, language: str) -> Any:
    if folder is not None:
        return json.loads(_text(Path(folder) / f"{language}.json"))
    if language not in EMBEDDED:
        raise UserError(f"{language}.json is not in the package (it has {', '.join(EMBEDDED)}): give --data-dir")
    packed = Path(__file__).parent / "xquad-r" / f"{language}.json.gz"
    return json.loads(gzip.decompress(packed.read_bytes()))


def _xquad_data(config: Config, languages: Sequence[str]) -> Data:
    """Three folds of articles to train, the next after the test fold as dev."""
    folder = None
    if config.data_dir is not None or not set(languages) <= set(EMBEDDED):
        folder = _folder("lareqa/xquad-r", ["{}.json"], languages, config)
    whole = load_xquad_r(folder, languages)
    articles = np.unique(np.concatenate([whole.articles, *whole.of_candidate.values()]))
    fold_of = np.zeros(int(articles.max()) + 1, dtype=int)
    fold_of[np.random.default_rng(0).permutation(articles)] = np.arange(len(articles)) % FOLDS
    test = config.seed % FOLDS if config.fold is None else config.fold
    parts = [
        _subset(whole, np.isin(fold_of, folds)) for folds in (
            [(test + i) % FOLDS for i in (2, 3, 4)], [(test + 1) % FOLDS], [test],
        )
    ]  # fmt: skip
    return Data("xquad-r", "questions", *parts)


def _subset(whole: XQuAD, kept: np.ndarray) -> Questions:
    """Questions and candidates of the articles that are ``kept`` [articles]."""
    part, asked = whole.questions, kept[whole.articles]
    rows = np.flatnonzero(asked)
    sentences, contexts, answers = {}, {}, {}
    for language in part.languages:
        mine = kept[whole.of_candidate[language]]
        place = np.cumsum(mine) - 1
        sentences[language] = tuple(np.array(part.sentences[language], dtype=object)[mine])
        contexts[language] = tuple(np.array(part.contexts[language], dtype=object)[mine])
        answers[language] = place[part.answers[language][rows]].astype(np.int64)
    ids = tuple(part.ids[i] for i in rows)
    return Questions(
        ids, {one: tuple(of[i] for i in rows) for one, of in part.questions.items()}, sentences, contexts, answers
    )


# A file of one's own


def _own(path: Path, config: Config, languages: Sequence[str]) -> Data:
    """A .csv of scored pairs or of questions, 70 % to train, 15 % dev, 15 % test."""
    columns: list[str] = []
    rows: list[tuple[str, dict[str, str]]] = []
    for where, values in _records(path):
        if not columns:
            columns = [value.strip() for value in values]
        elif len(values) == len(columns):
            rows.append((where, dict(zip(columns, values, strict=True))))
        elif values:
            raise UserError(f"{where}: {len(values)} values, but {len(columns)} columns: mend the line")
    if {"sentence1", "sentence2", "score", "language1", "language2"} <= set(columns):
        return _own_pairs(path, rows, config, languages)
    if {"id", "language", "question", "answer"} <= set(columns):
        return _own_questions(path, rows, config, languages)
    raise UserError(
        f"{path}: columns {', '.join(columns) or '(none)'}: give sentence1, sentence2, score, language1, language2, or "
        "id, language, question, answer and, if any, context"
    )


def _require(path: Path, there: set[str], languages: Sequence[str]) -> None:
    missing = [language for language in languages if language not in there]
    if missing:
        raise UserError(f"{path}: no language {missing[0]} in it: it has {', '.join(sorted(there)) or 'none'}")


def _parts(groups: Sequence[int], seed: int) -> np.ndarray:
    """0 train, 1 dev, 2 test, of each row; rows of a group stay together."""
    names = np.unique(np.array(groups, dtype=int))
    order = np.random.default_rng([seed, 0x637376]).permutation(len(names))
    cuts = np.array([0.7, 0.85]) * len(names)
    part = np.searchsorted(cuts, order, side="right")
    return part[np.searchsorted(names, np.array(groups, dtype=int))]


def _groups(keys: Sequence[Sequence[Any]]) -> list[int]:
    """Rows that share a key, in a chain too, get the same number."""
    parent = list(range(len(keys)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[Any, int] = {}
    for i, some in enumerate(keys):
        for key in some:
            parent[root(i)] = root(first.setdefault(key, i))
    return [root(i) for i in range(len(keys))]


def _own_pairs(path: Path, rows: Sequence[tuple[str, Any]], config: Config, languages: Sequence[str]) -> Data:
    read = [
        (
            _filled(row["language1"], where, "language1"), _filled(row["language2"], where, "language2"),
            _filled(row["sentence1"], where, "sentence1"), _filled(row["sentence2"], where, "sentence2"),
            _score(row["score"], where),
        )
        for where, row in rows
    ]  # fmt: skip
    _require(path, {one for row in read for one in row[:2]}, languages)
    ids = [row.get("id") for _, row in rows]
    keys = [
        [row[2], row[3]] if not name else [row[2], row[3], ("id", name)] for row, name in zip(read, ids, strict=True)
    ]
    part_of = _parts(_groups(keys), config.seed)
    parts = []
    for number in range(3):
        found: dict[tuple[str, str], list[tuple[str, str, float]]] = {}
        for (one, other, first, second, score), part in zip(read, part_of, strict=True):
            if part == number and {one, other} <= set(languages):
                found.setdefault((one, other), []).append((first, second, score))
                if one != other:
                    found.setdefault((other, one), []).append((second, first, score))
        made = {}
        for key, some in found.items():
            firsts, seconds, scores = zip(*some, strict=True)
            made[key] = (firsts, seconds, np.array(scores))
        parts.append(Pairs(tuple(languages), made, aligned=False))
    return Data(path.stem, "pairs", *parts)


def _own_questions(path: Path, rows: Sequence[tuple[str, Any]], config: Config, languages: Sequence[str]) -> Data:
    read = [
        (
            _filled(row["id"], where, "id"), _filled(row["language"], where, "language"),
            _filled(row["question"], where, "question"),
            _filled(row["answer"], where, "answer"), (row.get("context") or "").strip(), where,
        )
        for where, row in rows
    ]  # fmt: skip
    _require(path, {row[1] for row in read}, languages)
    read = [row for row in read if row[1] in languages]
    seen: dict[tuple[str, str], str] = {}
    for key, language, _, _, _, where in read:
        if (key, language) in seen:
            raise UserError(f"{where}: question {key} in {language} is there twice (also {seen[key, language]})")
        seen[key, language] = where
    keys = [
        [("id", key), ("answer", answer), *([("context", context)] if context else [])]
        for key, _, _, answer, context, _ in read
    ]
    part_of = _parts(_groups(keys), config.seed)
    parts = [
        _questions([row for row, part in zip(read, part_of, strict=True) if part == number], languages)
        for number in range(3)
    ]
    return Data(path.stem, "questions", *parts)


def _questions(rows: Sequence[tuple[str, str, str, str, str, str]], languages: Sequence[str]) -> Questions:
    ids = tuple(dict.fromkeys(row[0] for row in rows))
    place = {key: i for i, key in enumerate(ids)}
    questions: dict[str, list[str | None]] = {one: [None] * len(ids) for one in languages}
    answers = {one: np.full(len(ids), -1, dtype=np.int64) for one in languages}
    candidates: dict[str, dict[tuple[str, str], int]] = {one: {} for one in languages}
    for key, language, question, answer, context, _ in rows:
        questions[language][place[key]] = question
        answers[language][place[key]] = candidates[language].setdefault((answer, context), len(candidates[language]))
    return Questions(
        ids,
        {one: tuple(texts) for one, texts in questions.items()},
        {one: tuple(sentence for sentence, _ in found) for one, found in candidates.items()},
        {one: tuple(context for _, context in found) for one, found in candidates.items()},
        answers,
    )
