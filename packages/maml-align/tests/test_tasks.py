"""Meta-tasks: what is drawn for which languages, from which part, the same each time; and what is refused at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from maml_align import rotations
from maml_align.config import MODES, Config, draw_tuples
from maml_align.data import Data, Pairs, Questions
from maml_align.model import DualEncoder, load_model
from maml_align.tasks import SIMILAR, MetaTaskSampler, Set, stack
from metazoo.errors import UserError

torch.set_num_threads(1)

LANGUAGES = ("de", "en", "es", "vi")
COUNT = 16
CONFIG = Config(
    dataset="own.csv", languages=LANGUAGES, unseen=(), shots=3, queries=2, negatives=2, context=False, vocabulary=300,
    width=16, max_query_length=16, max_answer_length=16, task_batch=3,
)  # fmt: skip
MARGIN = 0.2


# ---- material


def sentence(rng: np.random.Generator, language: str) -> str:
    words = [f"{language}{chr(97 + i)}{chr(107 + i % 5)}" for i in range(9)] + ["radio", "taxi", "metro"]
    return " ".join(words[i] for i in rng.integers(len(words), size=int(rng.integers(2, 7))))


@cache
def scored(aligned: bool = True, count: int = COUNT, ordered: tuple[tuple[str, str], ...] | None = None) -> Data:
    """Aligned pairs, or pairs of their own for each two languages (or for those given)."""
    rng = np.random.default_rng(0)
    keys = [(one, one) for one in LANGUAGES] if aligned else ordered or list(itertools.product(LANGUAGES, LANGUAGES))

    def part() -> Pairs:
        scores = np.round(rng.uniform(0, 5, count), 1)
        made = {key: (*(tuple(sentence(rng, one) for _ in range(count)) for one in key), scores) for key in keys}
        return Pairs(LANGUAGES, made, aligned)

    return Data("own", "pairs", part(), part(), part())


@cache
def asked(count: int = COUNT) -> Data:
    """Questions, each with an answer among ``count`` + 5 sentences; half of it the question's own words."""
    rng = np.random.default_rng(1)

    def part() -> Questions:
        questions = {one: tuple(sentence(rng, one) for _ in range(count)) for one in LANGUAGES}
        answers = {one: rng.permutation(count + 5)[:count] for one in LANGUAGES}
        sentences = {}
        for one in LANGUAGES:
            made = [sentence(rng, one) for _ in range(count + 5)]
            for question, answer in zip(questions[one], answers[one], strict=True):
                made[answer] += f" {question}"
            sentences[one] = tuple(made)
        contexts = {one: ("",) * (count + 5) for one in LANGUAGES}
        return Questions(tuple(f"q{i}" for i in range(count)), questions, sentences, contexts, answers)

    return Data("own", "questions", part(), part(), part())


@cache
def encoder() -> DualEncoder:
    texts = [text for one, two, _ in scored().train.texts.values() for text in (*one, *two)]
    return load_model(CONFIG, texts)


def sampler(config: Config = CONFIG, kind: str | Data = "pairs", dev: bool = False) -> MetaTaskSampler:
    data = kind if isinstance(kind, Data) else {"pairs": scored, "questions": asked}[kind]()
    return MetaTaskSampler(config, data, encoder(), dev=dev)


def drawn(config: Config, kind: str | Data = "pairs", steps: int = 12) -> list[list[Set]]:
    one = sampler(config, kind)
    return [task for step in range(steps) for task in one.draw(step)]


def flat(value: Any) -> list[Any]:
    """Of nested dictionaries and lists of tensors, the tensors' values, in order."""
    if isinstance(value, torch.Tensor):
        return [value.tolist()]
    return [one for part in (value.values() if isinstance(value, dict) else value) for one in flat(part)]


def without(questions: Questions, language: str, rows: Sequence[int]) -> Questions:
    """Questions without some of their translations."""
    texts = {
        one: tuple(None if one == language and i in rows else text for i, text in enumerate(of))
        for one, of in questions.questions.items()
    }
    answers = {
        one: np.where(np.isin(np.arange(len(of)), rows), -1, of) if one == language else of
        for one, of in questions.answers.items()
    }
    return replace(questions, questions=texts, answers=answers)


# ---- the same each time


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("pairs", {}), ("questions", {}), ("questions", {"query_sampling": "similar"}),
        ("questions", {"negative_sampling": "hard"}), ("vectors", {}),
    ],
)  # fmt: skip
def test_tasks_are_those_of_seed_and_step(kind: str, changes: dict[str, Any]) -> None:
    """In whatever order they are asked for, and again; other steps, seeds and parts have others."""
    config = replace(CONFIG, **changes)
    if kind == "vectors":
        config = replace(config, dataset="rotations", model="linear", dimension=4)

    def make(config: Config, dev: bool = False) -> MetaTaskSampler:
        if kind == "vectors":
            return MetaTaskSampler(config, rotations.load(config), encoder(), dev=dev)
        return sampler(config, kind, dev)

    first, second = make(config), make(config)
    forwards = [flat(first.batch(step)) for step in range(4)]
    backwards = [flat(second.batch(step)) for step in (3, 1, 0, 2)]
    assert forwards == [backwards[2], backwards[1], backwards[3], backwards[0]]
    assert flat(first.batch(2)) == forwards[2]
    assert len({str(one) for one in forwards}) == 4
    assert flat(make(replace(config, seed=1)).batch(0)) != forwards[0]
    assert flat(make(config, dev=True).batch(0)) != forwards[0]
    assert len(first.draw(0)) == 3


# ---- languages


KINDS = {
    "MONO_MONO": ("MONO", "OTHER"), "MONO_BIL": ("MONO", "BIL"), "MONO_MULTI": ("MONO", "MULTI"),
    "BIL_MULTI": ("BIL", "MULTI"), "TRANS": ("MONO", "BIL"), "MONO_BIL_MULTI": ("MONO", "BIL", "MULTI3"),
}  # fmt: skip


def shape_of(task: Sequence[Set]) -> tuple[str, ...]:
    """Kinds of a task's sets, by their languages."""
    found = []
    for one in task:
        if len(one.candidates) > 1:
            assert len(set(one.candidates)) == len(one.candidates)
            assert one.query in one.candidates
            found.append("MULTI" if len(one.candidates) == 2 else f"MULTI{len(one.candidates)}")
        elif one.candidates == (one.query,):
            found.append("MONO" if one.query == task[0].query else "OTHER")
        else:
            found.append("BIL")
    others = {one.candidates[0] for one, kind in zip(task, found, strict=True) if kind != "MONO"}
    assert len(others) == 1  # the bilingual set's other language is in the multilingual one, too
    if "OTHER" not in found:
        assert len({one.query for one in task}) == 1
    return tuple(found)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["pairs", "questions"])
def test_languages_are_those_of_the_mode(mode: str, kind: str) -> None:
    method = "maml-align" if mode == "MONO_BIL_MULTI" else "maml"
    tasks = drawn(replace(CONFIG, mode=mode, method=method), kind)
    shapes = {shape_of(task) for task in tasks}
    assert shapes == (set(list(KINDS.values())[:4]) if mode == "MIXT" else {KINDS[mode]})
    assert {task[0].query for task in tasks} == set(LANGUAGES)
    for task in tasks:
        assert [len(one.rows) for one in task] == [3, *[2] * (len(task) - 1)]
        for one in task:
            if kind == "pairs":
                assert len(one.languages) == len(one.rows)
                assert set(one.languages) <= set(one.candidates)
            else:
                assert all([language for language, _ in of] == list(one.candidates) for of in one.positives)
                assert {language for of in one.negatives for language, _ in of} <= set(one.candidates)
    if kind == "pairs" and "MULTI" in mode:  # all languages of a multilingual set come up
        spread = {one.candidates.index(language) for task in tasks for one in task[-1:] for language in one.languages}
        assert spread == set(range(3 if mode == "MONO_BIL_MULTI" else 2))


def test_trans_is_validated_from_bilingual_to_multilingual() -> None:
    from maml_align.train import MetaLearner
    from metazoo import loop
    from metazoo.options import RunOptions

    config = replace(CONFIG, mode="TRANS", method="maml", validate_every=1)
    learner = MetaLearner(config, scored(), loop.prepare(RunOptions(), seed=0))
    assert learner.validation is not None
    assert {shape_of(task) for task in learner.sampler.draw(0)} == {("MONO", "BIL")}
    tasks = learner.validation.draw(0)
    assert len(tasks) == 32
    assert {shape_of(task) for task in tasks} == {("BIL", "MULTI")}
    assert learner.validation.support is scored().dev
    loss = float(learner.step(0)["validation_loss"])
    kept = learner.state()["best"].state_dict()  # the weights of the best validation, for a resumed run
    assert (float(kept["score"]), int(kept["step"])) == (pytest.approx(loss), 1)
    for name, value in learner.encoder.named_parameters():
        assert torch.equal(kept[name], value)


@pytest.mark.parametrize("kind", ["pairs", "questions"])
def test_language_tuples_are_taken_as_they_are(kind: str) -> None:
    given = ("de_de-de_en-de_en,de,vi", "vi_vi-es_en-en_es,vi")
    wanted = [
        [("de", ("de",)), ("de", ("en",)), ("de", ("en", "de", "vi"))],
        [("vi", ("vi",)), ("es", ("en",)), ("en", ("es", "vi"))],
    ]
    tasks = drawn(replace(CONFIG, tuples=given), kind)
    found = [[(one.query, one.candidates) for one in task] for task in tasks]
    assert all(one in found for one in wanted)
    assert all(one in wanted for one in found)


def test_two_languages_and_one() -> None:
    rng = np.random.default_rng(0)
    two = replace(CONFIG, languages=("de", "en"), mode="BIL_MULTI", method="maml")
    assert {draw_tuples(two, rng) for _ in range(20)} == {
        ((one, (other,)), (one, (other, one))) for one, other in (("de", "en"), ("en", "de"))
    }
    one = replace(CONFIG, languages=("de",), mode="MONO_MONO", method="maml")
    assert {draw_tuples(one, rng) for _ in range(5)} == {(("de", ("de",)), ("de", ("de",)))}
    assert all(len({*task[0].rows, *task[1].rows}) == 5 for task in drawn(one))


# ---- rows


@pytest.mark.parametrize("mode", ["MONO_MONO", "MIXT", "MONO_BIL_MULTI"])
@pytest.mark.parametrize("kind", ["pairs", "questions"])
def test_sets_of_a_task_share_no_rows(kind: str, mode: str) -> None:
    """Aligned pairs are the same texts in every language, so are questions; just enough are there."""
    config = replace(CONFIG, mode=mode, method="maml-align" if mode == "MONO_BIL_MULTI" else "maml", shots=6, queries=5)
    seen: set[int] = set()
    for task in drawn(config, kind):
        rows = [int(row) for one in task for row in one.rows]
        assert len(set(rows)) == len(rows)
        seen |= set(rows)
    assert seen == set(range(COUNT))


def test_sets_of_pairs_that_are_not_aligned_share_none_of_one_language_pair() -> None:
    config = replace(CONFIG, shots=6, queries=5)
    met = 0
    for task in drawn(config, scored(aligned=False)):
        found = [
            (one.query, other, int(row)) for one in task for other, row in zip(one.languages, one.rows, strict=True)
        ]
        assert len(set(found)) == len(found)
        met += len({row for _, _, row in found}) < len(found)
    assert met  # other texts may have the same number


def test_queries_come_from_dev_where_wanted() -> None:
    """Support from train, queries from dev: texts and scores."""
    one = sampler(replace(CONFIG, query_from="dev"))
    assert (one.support, one.query) == (scored().train, scored().dev)
    clashes = 0
    for step in range(6):
        for task, sets in zip(one.draw(step), one.batch(step), strict=True):
            for number, (found, batch) in enumerate(zip(task, sets, strict=True)):
                part = scored().dev if number else scored().train
                wanted = [
                    part.pairs(found.query, to)[2][row] for to, row in zip(found.languages, found.rows, strict=True)
                ]
                np.testing.assert_allclose(batch["scores"], np.array(wanted) / 5, rtol=1e-6)
            clashes += bool(set(task[0].rows) & set(np.concatenate([task[1].rows, task[2].rows])))
            assert not set(task[1].rows) & set(task[2].rows)
    assert clashes
    assert sampler(replace(CONFIG, query_from="dev"), "questions").query is asked().train  # of pairs only
    assert sampler(replace(CONFIG, query_from="dev"), dev=True).support is scored().dev


@pytest.mark.parametrize("aligned", [True, False])
def test_a_batch_of_pairs_holds_their_texts(aligned: bool) -> None:
    """First all sentences 1, then all 2, in the languages drawn."""
    data = scored(aligned)
    one = sampler(CONFIG, data)
    for task, sets in zip(one.draw(1), one.batch(1), strict=True):
        for found, batch in zip(task, sets, strict=True):
            texts = [
                data.train.pairs(found.query, to)[which][row]
                for which in (0, 1)
                for to, row in zip(found.languages, found.rows, strict=True)
            ]
            wanted = encoder().pad(encoder().token_ids(texts, 16))
            for name, value in batch["tokens"].items():
                assert torch.equal(value, wanted[name])
            assert batch["weight"].tolist() == [1] * len(found.rows)


def test_a_batch_of_questions_holds_all_triplets() -> None:
    """Each answer with each negative of its question."""
    one = sampler(CONFIG, "questions")
    part = asked().train
    for task, sets in zip(one.draw(1), one.batch(1), strict=True):
        for found, batch in zip(task, sets, strict=True):
            wanted = set()
            for row, near, far in zip(found.rows, found.positives, found.negatives, strict=True):
                wanted |= {(part.questions[found.query][row], p, n) for p in near for n in far}
            texts = {}
            for language, sentences in part.sentences.items():
                for number, ids in enumerate(encoder().token_ids(sentences, 16)):
                    texts.setdefault(tuple(ids), set()).add((language, number))
            asks = {tuple(encoder().token_ids([part.questions[found.query][row]], 16)[0]): row for row in found.rows}

            def plain(tokens: Any, i: int) -> tuple[int, ...]:
                return tuple(tokens["input_ids"][i][tokens["attention_mask"][i] == 1].tolist())

            triplets = list(zip(*(batch[name].tolist() for name in ("question", "positive", "negative")), strict=True))
            assert len(triplets) == len(batch["weight"]) == len(found.rows) * len(found.candidates) * 2
            for question, positive, negative in triplets:
                row = asks[plain(batch["questions"], question)]
                place = found.rows.tolist().index(row)
                assert texts[plain(batch["candidates"], positive)] & set(found.positives[place])
                assert texts[plain(batch["candidates"], negative)] & set(found.negatives[place])
            assert len(set(triplets)) == len(triplets)


def test_vectors_are_of_their_languages() -> None:
    """R_l z, the weights of a task the same in all of its sets: scores are weighted cosines of z."""
    config = replace(CONFIG, dataset="rotations", model="linear", dimension=4, shots=40, queries=40)
    data = rotations.load(config)
    one = MetaTaskSampler(config, data, encoder())
    for task, sets in zip(one.draw(0), one.batch(0), strict=True):
        assert shape_of(task) == ("MONO", "BIL", "MULTI3")
        relevant = []
        for found, batch in zip(task, sets, strict=True):
            languages = batch["tokens"]["language"].numpy()
            names = [data.train.languages[i] for i in languages]
            assert set(names[:40]) == {found.query}
            assert set(names[40:]) == set(found.candidates)
            z = np.einsum("nji,nj->ni", data.train.rotations[languages], batch["tokens"]["vectors"].numpy())
            left, right = z[:40], z[40:]
            fits = []
            for i in range(4):  # one of four dimensions is relevant
                weights = np.where(np.arange(4) == i, 1, 0.15)
                products = (weights * left * right).sum(1)
                norms = np.sqrt((weights * left**2).sum(1) * (weights * right**2).sum(1))
                fits.append(np.abs(products / norms - batch["scores"].numpy()).max())
            assert min(fits) < 1e-5
            relevant.append(int(np.argmin(fits)))
        assert len(set(relevant)) == 1


# ---- negatives


@pytest.mark.parametrize("kind", ["random", "easy", "semi-hard", "hard"])
def test_negatives_are_never_the_answer(kind: str) -> None:
    """And easy, semi-hard or hard by the encoder at the start, where there are such."""
    config = replace(CONFIG, negative_sampling=kind, negatives=4)
    part, own = asked().train, encoder()
    questions = {one: own.encode([text or "-" for text in part.questions[one]]) for one in LANGUAGES}
    candidates = {one: own.encode(part.sentences[one]) for one in LANGUAGES}
    seen: dict[tuple[str, str, int], set[int]] = {}
    held = 0
    for task in drawn(config, "questions", steps=20):
        for one in task:
            assert all(len(far) == 4 for far in one.negatives)
            for row, near, far in zip(one.rows, one.positives, one.negatives, strict=True):
                assert near == tuple((language, int(part.answers[language][row])) for language in one.candidates)
                for language, index in far:
                    answer = int(part.answers[language][row])
                    assert 0 <= index < COUNT + 5
                    assert index != answer
                    seen.setdefault((one.query, language, int(row)), set()).add(index)
                    distances = np.linalg.norm(candidates[language] - questions[one.query][row], axis=1)
                    bound, others = distances[answer], np.delete(distances, answer)
                    slack = 1e-5
                    fits = {
                        "random": (others > -1, True),
                        "easy": (others > bound + MARGIN, distances[index] > bound + MARGIN - slack),
                        "semi-hard": (
                            (others >= bound) & (others <= bound + MARGIN),
                            bound - slack <= distances[index] <= bound + MARGIN + slack,
                        ),
                        "hard": (others < bound, distances[index] < bound + slack),
                    }[kind]
                    if fits[0].any():
                        held += 1
                        assert fits[1]
    assert held > 50
    if kind == "random":
        assert max(len(indices) for indices in seen.values()) > 8


# ---- similar questions


@pytest.mark.parametrize("mode", ["MONO_MONO", "MONO_BIL", "MONO_BIL_MULTI"])
def test_similar_queries_are_the_nearest_and_translations(mode: str) -> None:
    """Of each support question its five nearest, not itself in the same language, but itself in another."""
    method = "maml-align" if mode == "MONO_BIL_MULTI" else "maml"
    config = replace(CONFIG, mode=mode, method=method, shots=1, queries=3, query_sampling="similar")
    own, part = encoder(), asked().train
    vectors = {one: own.encode([text or "-" for text in part.questions[one]]) for one in LANGUAGES}
    seen: dict[tuple[str, str, int], set[int]] = {}
    for task in drawn(config, "questions", steps=150):
        support, itself = task[0], int(task[0].rows[0])
        for one in task[1:]:
            assert len(set(one.rows)) == 3
            assert (itself in one.rows) <= (one.query != support.query)
            seen.setdefault((support.query, one.query, itself), set()).update(map(int, one.rows))
    complete = 0
    for (language, query, itself), rows in seen.items():
        order = np.argsort(-(vectors[query] @ vectors[language][itself]), kind="stable")
        nearest = [int(i) for i in order if i != itself][:SIMILAR]
        allowed = set(nearest) | ({itself} if query != language else set())
        assert rows <= allowed
        complete += rows == allowed
    assert complete >= 5


def test_similar_queries_are_filled_up() -> None:
    """Where the near ones are too few, others are taken; still none twice, and none of the support in its language."""
    config = replace(CONFIG, shots=1, queries=7, query_sampling="similar")
    for task in drawn(config, "questions", steps=20):
        for one in task[1:]:
            assert len(set(one.rows)) == 7
            assert not set(one.rows) & set(task[0].rows)


def test_questions_that_are_not_translated_are_left_out() -> None:
    whole = asked().train
    part = without(without(whole, "es", range(5)), "vi", [6])
    data = Data("own", "questions", part, part, part)
    for sampling in ("random", "similar"):
        for task in drawn(replace(CONFIG, query_sampling=sampling), data):
            for one in task:
                languages = {one.query, *one.candidates}
                assert not ("es" in languages and set(one.rows) & set(range(5)))
                assert not ("vi" in languages and 6 in one.rows)
                assert all(index >= 0 for of in one.positives for _, index in of)


# ---- what is refused


def test_too_few_examples_are_refused() -> None:
    exact = replace(CONFIG, shots=8, queries=4)  # 16 of 16
    for kind in ("pairs", "questions"):
        sampler(exact, kind)
        with pytest.raises(UserError, match="but a task takes 17: lower --shots"):
            sampler(replace(exact, shots=9), kind)
    sampler(replace(CONFIG, shots=16, queries=8, query_from="dev"))  # each part for itself
    for sizes in ({"shots": 17}, {"queries": 9}):
        with pytest.raises(UserError, match=r"16 pairs .* but a task takes 1[78]"):
            sampler(replace(CONFIG, query_from="dev", **sizes))


def test_missing_language_pairs_are_refused() -> None:
    """Before training, whichever task would draw them."""
    every = tuple(itertools.product(LANGUAGES, LANGUAGES))
    data = scored(False, COUNT, tuple(pair for pair in every if pair != ("vi", "en")))
    with pytest.raises(UserError, match="no scored pairs vi–en"):
        sampler(CONFIG, data)
    sampler(replace(CONFIG, languages=("de", "es", "vi")), data)
    sampler(replace(CONFIG, tuples=("de_de-de_en-de_en,vi",)), data)
    with pytest.raises(UserError, match="no scored pairs vi–en"):
        sampler(replace(CONFIG, tuples=("de_de-de_en-de_en,vi", "de_de-vi_de-vi_de,en")), data)


def test_too_few_candidates_are_refused() -> None:
    sampler(replace(CONFIG, negatives=COUNT + 4), "questions")
    with pytest.raises(UserError, match=f"{COUNT + 5} candidates in .*{COUNT + 5} negatives: lower --negatives"):
        sampler(replace(CONFIG, negatives=COUNT + 5), "questions")


def test_questions_in_no_three_languages_are_refused() -> None:
    """Each two languages have questions in common, but no three: found before training, not in a task."""
    whole = asked(24).train
    part = without(whole, "de", [i for i in range(24) if i % 3 == 0])
    part = without(part, "en", [i for i in range(24) if i % 3 == 1])
    part = without(part, "es", [i for i in range(24) if i % 3 == 2])
    data = Data("own", "questions", part, part, part)
    config = replace(CONFIG, languages=("de", "en", "es"), shots=2, queries=2)
    sampler(replace(config, mode="BIL_MULTI", method="maml"), data)
    with pytest.raises(UserError, match=r"0 questions in .* with answers in"):
        sampler(config, data)


def test_unknown_languages_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A line for each language of whose tokens a tenth or more are unknown; not again for validation."""
    strange = "Ж Ц Ы"
    data = scored()
    texts = dict(data.train.texts)
    texts["vi", "vi"] = ((strange,) * COUNT, texts["vi", "vi"][1], texts["vi", "vi"][2])
    odd = replace(data, train=replace(data.train, texts=texts))
    sampler(CONFIG, odd)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("warning: 100% of the tokens of language vi are unknown")
    sampler(CONFIG, replace(odd, dev=odd.train), dev=True)
    sampler(CONFIG, data)
    part = asked().train
    questions = {**part.questions, "en": (strange, *part.questions["en"][1:])}
    sampler(CONFIG, replace(asked(), train=replace(part, questions=questions)))
    assert capsys.readouterr().err == ""


# ---- stacking


def test_stack_fills_up_with_weight_zero() -> None:
    first = {
        "questions": {"input_ids": torch.tensor([[5, 6]]), "attention_mask": torch.tensor([[1, 1]])},
        "positive": torch.tensor([0]), "weight": torch.ones(1),
    }  # fmt: skip
    second = {
        "questions": {
            "input_ids": torch.tensor([[7, 0, 0], [8, 9, 4]]), "attention_mask": torch.tensor([[1, 0, 0], [1, 1, 1]])
        },
        "positive": torch.tensor([1, 0]), "weight": torch.ones(2),
    }  # fmt: skip
    found = stack([first, second])
    assert found["questions"]["input_ids"].tolist() == [[[5, 6, 0], [0, 0, 0]], [[7, 0, 0], [8, 9, 4]]]
    assert found["questions"]["attention_mask"].tolist() == [[[1, 1, 0], [1, 0, 0]], [[1, 0, 0], [1, 1, 1]]]
    assert found["positive"].tolist() == [[0, 0], [1, 0]]
    assert found["weight"].tolist() == [[1, 0], [1, 1]]
    assert found["positive"].dtype == torch.int64
    assert first["questions"]["attention_mask"].tolist() == [[1, 1]]  # the sets are as they were
    assert stack([second])["positive"].tolist() == [[1, 0]]
