"""Meta-tasks: a support set and one or two query sets, each in the languages of a tuple."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from metazoo.errors import UserError
from torch import Tensor

from maml_align import config as configs
from maml_align import search
from maml_align.config import Config
from maml_align.data import Data, Pairs, Questions
from maml_align.model import DualEncoder, Encoder, warn_unknown
from maml_align.rotations import World

TopScore = 5.0  # of scored pairs
SIMILAR = 5  # nearest questions of each support question


@dataclass(frozen=True)
class Set:
    """What one set of a task is made of.

    Attributes:
        query: language of sentence 1, or of the questions. candidates: of sentence 2, or of the candidates.
        rows: pairs or questions [k].
        languages: of sentence 2 of each pair [k].
        positives: (language, candidate) of each question, and ``negatives``.
    """

    query: str
    candidates: tuple[str, ...]
    rows: np.ndarray
    languages: tuple[str, ...] = ()
    positives: tuple[tuple[tuple[str, int], ...], ...] = ()
    negatives: tuple[tuple[tuple[str, int], ...], ...] = ()
    vectors: Mapping[str, np.ndarray] = field(default_factory=dict)


class MetaTaskSampler:
    """Draws the meta-tasks of an outer step; the same for (config.seed, step), in whatever order they are asked for.

    Args:
        config: mode or tuples, shots, queries, negatives.
        data: of which ``train`` gives the sets (``dev`` with dev=True).
        encoder: tokenises; its vectors before training tell similar questions and hard negatives.
        dev: sets of the dev part, for validation.

    Raises:
        UserError: fewer examples than a task needs, or a pair of languages that the data have not.
    """

    def __init__(self, config: Config, data: Data, encoder: Encoder, *, dev: bool = False) -> None:
        self.config, self.kind, self.dev = config, data.kind, dev
        self.encoder = encoder
        self.support: Any = data.dev if dev else data.train
        self.query: Any = data.dev if dev or (config.query_from == "dev" and data.kind == "pairs") else data.train
        self._ids: dict[tuple[Any, ...], list[np.ndarray]] = {}
        self._mined: dict[tuple[str, str], list[np.ndarray]] = {}
        self._near: dict[tuple[str, str], np.ndarray] = {}
        self._vectors: dict[tuple[str, str], np.ndarray] = {}
        self._eligible: dict[tuple[str, tuple[str, ...]], np.ndarray] = {}
        if self.kind != "vectors":
            self._check()
            self._tokenise()
        if self.kind == "questions":
            self._encode()

    def batch(self, step: int) -> list[list[dict[str, Any]]]:
        """The sets, as batches of the loss, of each task of an outer step."""
        return [[self.tensors(one, number > 0) for number, one in enumerate(task)] for task in self.draw(step)]

    def draw(self, step: int) -> list[list[Set]]:
        """The tasks of an outer step; those of a task have no pair and, drawn at random, no question in common."""
        rng = np.random.default_rng([self.config.seed, 2 if self.dev else 1, step])
        return [self._task(rng) for _ in range(self.config.task_batch)]

    def tensors(self, one: Set, is_query: bool) -> dict[str, Any]:
        """A batch of the loss: tensors of a set."""
        if self.kind == "vectors":
            return {
                "tokens": {
                    "vectors": torch.from_numpy(one.vectors["vectors"]),
                    "language": torch.from_numpy(one.vectors["language"]),
                },
                "scores": torch.from_numpy(one.vectors["scores"]),
                "weight": torch.ones(len(one.rows)),
            }
        assert isinstance(self.encoder, DualEncoder)
        part = self.query if is_query else self.support
        if self.kind == "pairs":
            first = [
                self._pair_ids(part, one.query, two, 0)[row] for two, row in zip(one.languages, one.rows, strict=True)
            ]
            second = [
                self._pair_ids(part, one.query, two, 1)[row] for two, row in zip(one.languages, one.rows, strict=True)
            ]
            scores = [part.pairs(one.query, two)[2][row] for two, row in zip(one.languages, one.rows, strict=True)]
            return {
                "tokens": self.encoder.pad([*first, *second]),
                "scores": torch.tensor(scores, dtype=torch.float32) / TopScore,
                "weight": torch.ones(len(one.rows)),
            }
        candidates: list[np.ndarray] = []
        triplets: list[tuple[int, int, int]] = []
        for i, (near, far) in enumerate(zip(one.positives, one.negatives, strict=True)):
            start = len(candidates)
            candidates += [self._ids["candidates", language][index] for language, index in (*near, *far)]
            triplets += [
                (i, start + p, start + len(near) + n) for p in range(len(near)) for n in range(len(far))
            ]  # fmt: skip
        question, positive, negative = torch.tensor(triplets).unbind(1)
        return {
            "questions": self.encoder.pad([self._ids["questions", one.query][row] for row in one.rows]),
            "candidates": self.encoder.pad(candidates),
            "question": question,
            "positive": positive,
            "negative": negative,
            "weight": torch.ones(len(triplets)),
        }

    # ---- drawing

    def _task(self, rng: np.random.Generator) -> list[Set]:
        tuples = configs.draw_tuples(self.config, rng)
        sizes = [self.config.shots, *[self.config.queries] * (len(tuples) - 1)]
        if self.kind == "vectors":
            return self._vector_sets(tuples, sizes, rng)
        if self.kind == "pairs":
            return self._pair_sets(tuples, sizes, rng)
        return self._question_sets(tuples, sizes, rng)

    def _vector_sets(self, tuples: Any, sizes: Sequence[int], rng: np.random.Generator) -> list[Set]:
        world: World = self.support
        weights, sets = world.weights(rng), []
        for (query, candidates), size in zip(tuples, sizes, strict=True):
            one = np.full(size, world.languages.index(query))
            among = np.array([world.languages.index(language) for language in candidates])
            other = among[rng.integers(len(among), size=size)]
            vectors, scores = world.pairs(weights, one, other, rng)
            drawn = {
                "vectors": vectors.reshape(2 * size, -1), "language": np.concatenate([one, other]), "scores": scores,
            }  # fmt: skip
            sets.append(Set(query, candidates, np.arange(size), vectors=drawn))
        return sets

    def _pair_sets(self, tuples: Any, sizes: Sequence[int], rng: np.random.Generator) -> list[Set]:
        sets: list[Set] = []
        taken: dict[tuple[bool, Any], set[int]] = {}
        for number, ((query, candidates), size) in enumerate(zip(tuples, sizes, strict=True)):
            part: Pairs = self.query if number else self.support
            languages = tuple(candidates[i] for i in rng.integers(len(candidates), size=size))
            rows = []
            for language in languages:
                # the rows of aligned sets are the same texts in every language
                pool = (part is self.query, None if part.aligned else (query, language))
                used, count = taken.setdefault(pool, set()), part.size(query, language)
                row = int(rng.integers(count))
                while row in used:
                    row = (row + 1) % count
                used.add(row)
                rows.append(row)
            sets.append(Set(query, candidates, np.array(rows), languages))
        return sets

    def _question_sets(self, tuples: Any, sizes: Sequence[int], rng: np.random.Generator) -> list[Set]:
        sets: list[Set] = []
        taken: list[int] = []
        for (query, candidates), size in zip(tuples, sizes, strict=True):
            pool = self.eligible(query, candidates)
            if sets and self.config.query_sampling == "similar":
                near = self._similar(sets[0], query)
                pool = np.concatenate([near[np.isin(near, pool)], rng.permutation(pool[~np.isin(pool, near)])])
                if sets[0].query == query:
                    pool = pool[~np.isin(pool, sets[0].rows)]
                most = max(size, int(np.isin(near, pool).sum()))
                rows = rng.permutation(pool[:most])[:size]
            else:
                rows = rng.permutation(pool[~np.isin(pool, taken)])[:size]
            taken += rows.tolist()
            near_by = tuple(tuple((one, int(self.support.answers[one][row])) for one in candidates) for row in rows)
            far = tuple(self._negatives(query, candidates, int(row), rng) for row in rows)
            sets.append(Set(query, candidates, rows, positives=near_by, negatives=far))
        return sets

    def eligible(self, query: str, candidates: tuple[str, ...]) -> np.ndarray:
        """Questions that are there in the query language and have an answer in each of the candidates' languages."""
        if (query, candidates) not in self._eligible:
            part: Questions = self.support
            held = np.array([text is not None for text in part.questions[query]])
            for language in candidates:
                held &= part.answers[language] >= 0
            self._eligible[query, candidates] = np.flatnonzero(held)
        return self._eligible[query, candidates]

    def _negatives(
        self, query: str, candidates: tuple[str, ...], row: int, rng: np.random.Generator
    ) -> tuple[tuple[str, int], ...]:
        found = []
        for language in (candidates[i] for i in rng.integers(len(candidates), size=self.config.negatives)):
            answer, count = int(self.support.answers[language][row]), len(self.support.sentences[language])
            if self.config.negative_sampling == "random":
                index = int(rng.integers(count - 1))
                index += index >= answer
            else:
                allowed = self._mine(query, language)[row]
                index = int(allowed[rng.integers(len(allowed))])
            found.append((language, index))
        return tuple(found)

    # ---- nearness, by the encoder before training

    def _encode(self) -> None:
        """All vectors that will be asked for, now: later the encoder is another, and in a resumed run yet another."""
        mined = self.config.negative_sampling != "random"
        for language in self.config.languages:
            if mined or self.config.query_sampling == "similar":
                self._encoded("questions", language)
            if mined:
                self._encoded("candidates", language)

    def _encoded(self, what: str, language: str) -> np.ndarray:
        if (what, language) not in self._vectors:
            assert isinstance(self.encoder, DualEncoder)
            part: Questions = self.support
            if what == "questions":
                texts = [text or "-" for text in part.questions[language]]
            else:
                texts = part.candidates(language, self.config.context)
            self._vectors[what, language] = self.encoder.encode(texts, role=_ROLE[what])
        return self._vectors[what, language]

    def _mine(self, query: str, language: str) -> list[np.ndarray]:
        if (query, language) not in self._mined:
            self._mined[query, language] = search.hard_negatives(
                self._encoded("questions", query), self._encoded("candidates", language),
                self.support.answers[language], self.config.negative_sampling,
            )  # fmt: skip
        return self._mined[query, language]

    def _similar(self, support: Set, query: str) -> np.ndarray:
        """Questions nearest to the support's, and, in another language, their translations."""
        if (support.query, query) not in self._near:
            index = search.Index(self._encoded("questions", query))
            among = min(SIMILAR + 1, len(self.support.ids))
            found = index.search(self._encoded("questions", support.query), among)[1]
            self._near[support.query, query] = np.stack(
                [np.append(i, row[row != i][: among - 1]) for i, row in enumerate(found)]
            )
        return np.unique(self._near[support.query, query][support.rows])

    # ---- preparation

    def _possible(self) -> Iterator[tuple[tuple[str, tuple[str, ...]], ...]]:
        """Tuples that can be drawn; where languages are drawn for each task, all pairs of them."""
        if self.config.tuples:
            yield from (configs.parse_tuple(text) for text in self.config.tuples)
            return
        for kinds in configs.parts(self.config.mode):
            for one in self.config.languages:
                for other in [language for language in self.config.languages if language != one] or [one]:
                    third = [(language,) for language in self.config.languages if language not in (one, other)]
                    for more in third if self.config.mode == "MONO_BIL_MULTI" else [()]:
                        candidates = {"MONO": (one,), "BIL": (other,), "MULTI": (other, one, *more)}
                        yield tuple((one, candidates[kind]) for kind in kinds)

    def _check(self) -> None:
        """Refuse at once what would fail in the middle of training."""
        config = self.config
        sizes = [config.shots, *[config.queries] * (configs.set_kinds(config) - 1)]
        for tuples in self._possible():
            for number, (query, candidates) in enumerate(tuples):
                if self.kind == "pairs":
                    part = self.query if number else self.support
                    both = self.query is self.support
                    wanted = sum(sizes) if both else sum(sizes[1:]) if number else sizes[0]
                    for language in candidates:
                        self._check_pairs(part, query, language, wanted)
                else:
                    self._check_questions(query, candidates, sum(sizes))

    def _check_questions(self, query: str, candidates: tuple[str, ...], wanted: int) -> None:
        if (held := len(self.eligible(query, candidates))) < wanted:
            raise UserError(
                f"{held} questions in {query} with answers in {', '.join(candidates)}, but a task takes {wanted}: "
                "lower --shots or --queries, or give more data"
            )
        for language in candidates:
            if (count := len(self.support.sentences[language])) <= self.config.negatives:
                raise UserError(
                    f"{count} candidates in {language}, but each question takes {self.config.negatives} negatives: "
                    "lower --negatives"
                )

    def _check_pairs(self, part: Pairs, query: str, language: str, wanted: int) -> None:
        if not part.has(query, language):
            raise UserError(f"no scored pairs {query}–{language} in the data: name --tuples whose pairs are there")
        if part.size(query, language) < wanted:
            raise UserError(
                f"{part.size(query, language)} pairs {query}–{language}, but a task takes {wanted}: lower --shots or "
                "--queries, or give more data"
            )

    def _tokenise(self) -> None:
        """Token ids of all texts, once; a warning for a language of unknown tokens."""
        assert isinstance(self.encoder, DualEncoder)
        config = self.config
        for language in config.languages:
            if self.kind == "questions":
                part: Questions = self.support
                asked = [text or "-" for text in part.questions[language]]
                ids = self.encoder.token_ids(asked, config.max_query_length, "query")
                self._ids["questions", language] = ids
                texts = part.candidates(language, config.context)
                self._ids["candidates", language] = self.encoder.token_ids(texts, config.max_answer_length, "document")
            elif self.support.has(language, language):
                ids = self._pair_ids(self.support, language, language, 0)
            else:
                other = next((one for one in config.languages if self.support.has(language, one)), None)
                ids = [] if other is None else self._pair_ids(self.support, language, other, 0)
            if not self.dev:
                warn_unknown(self.encoder, language, ids)

    def _pair_ids(self, part: Pairs, one: str, other: str, which: int) -> list[np.ndarray]:
        """Of sentence 1 or 2; an aligned set has the same sentence 1 whatever the language of sentence 2."""
        key = (part is self.query, which, (one, other)[which] if part.aligned else (one, other))
        if key not in self._ids:
            assert isinstance(self.encoder, DualEncoder)
            language = (one, other)[which]
            texts = (part.pairs(language, language) if part.aligned else part.pairs(one, other))[which]
            self._ids[key] = self.encoder.token_ids(texts, self.config.max_query_length)
        return self._ids[key]


_ROLE = {"questions": "query", "candidates": "document"}


def stack(sets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The same set of several tasks as one batch with the tasks first; what is filled up has weight 0."""
    found: dict[str, Any] = {}
    for name, value in sets[0].items():
        values = [one[name] for one in sets]
        if isinstance(value, Mapping):
            found[name] = {key: _filled([one[key] for one in values]) for key in value}
            if "attention_mask" in value:
                found[name]["attention_mask"][..., 0] = 1  # a row that is filled up has a mean, too
        else:
            found[name] = _filled(values)
    return found


def _filled(tensors: Sequence[Tensor]) -> Tensor:
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in tensors), strict=True)]
    found = tensors[0].new_zeros([len(tensors), *shape])
    for i, tensor in enumerate(tensors):
        found[(i, *(slice(size) for size in tensor.shape))] = tensor
    return found
