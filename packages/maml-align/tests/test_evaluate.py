"""Evaluation, search, bias, settings and the command line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maml_align import evaluate, plots
from maml_align.claims import CLAIMS
from maml_align.cli import COMMANDS
from maml_align.config import (
    MODES,
    PRESETS,
    BiasOptions,
    Config,
    EvaluateOptions,
    SearchOptions,
    draw_tuples,
    parse_tuple,
    parts,
    set_kinds,
)
from maml_align.data import Pairs, Questions
from maml_align.train import Run, encoder_of, load, train
from metazoo import cli
from metazoo.errors import UserError
from metazoo.options import RunOptions
from scipy import stats

torch.set_num_threads(1)
LANGUAGES = ("de", "en", "es")
EVERY = {(one, other) for one in LANGUAGES for other in LANGUAGES}


class Fake:
    """Vectors by a function of the text."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def encode(self, texts: Sequence[str], batch_size: int = 64, role: str | None = None) -> np.ndarray:
        found = np.stack([self.of(text) for text in texts]).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def questions(count: int = 12) -> Questions:
    """Question i of each language is answered by its candidate i."""
    return Questions(
        tuple(str(i) for i in range(count)),
        {one: tuple(f"{one} q {i}" for i in range(count)) for one in LANGUAGES},
        {one: tuple(f"{one} a {i}" for i in range(count)) for one in LANGUAGES},
        {one: ("",) * count for one in LANGUAGES},
        {one: np.arange(count) for one in LANGUAGES},
    )


def meaning(text: str) -> np.ndarray:
    return np.eye(12)[int(text.split()[2])]


def language(text: str) -> np.ndarray:
    return np.eye(3)[LANGUAGES.index(text.split()[0])]


CONFIG = Config(languages=LANGUAGES, unseen=())


# ---- retrieval


def test_perfect_encoder() -> None:
    """By meaning alone: all answers first, and languages at chance among them."""
    found, matrix = evaluate.evaluate_retrieval(Fake(meaning), questions(), CONFIG, k=3)
    assert found["map"] == pytest.approx(100)
    assert found["mrr"] == pytest.approx(100)
    assert found["recall"] == pytest.approx(100)
    assert found["same_language"] == pytest.approx(100 / 3) == found["same_language_chance"]
    assert set(matrix) == EVERY
    assert all(value == pytest.approx(100) for value in matrix.values())
    assert found["pool_gap"] == pytest.approx(0)


def test_encoder_of_languages_alone() -> None:
    found, _ = evaluate.evaluate_retrieval(Fake(language), questions(), CONFIG, k=3)
    assert found["same_language"] == 100
    assert found["map"] < 50
    bias = evaluate.language_bias(Fake(language), questions(), CONFIG, 3)
    assert set(bias) == {"same_language", "same_language_chance", "pool_gap"}
    assert bias["same_language"] == 100
    assert bias["same_language_chance"] == pytest.approx(100 / 3)


def test_seen_and_unseen_languages() -> None:
    """By meaning for questions in two languages, wrongly in the third, unseen one: means over languages by hand."""

    def of(text: str) -> np.ndarray:
        wrong = text.startswith("es q")
        return np.roll(meaning(text), 6) if wrong else meaning(text)

    config = replace(CONFIG, languages=("de", "en"), unseen=("es",), mode="MONO_BIL", method="maml")
    found, matrix = evaluate.evaluate_retrieval(Fake(of), questions(), config, k=1)  # beyond 1 all are as near
    assert found["seen_map"] == pytest.approx(100)
    assert found["unseen_map"] == found["unseen_recall"] == found["unseen_mrr"] == 0
    assert found["map"] == pytest.approx(200 / 3)
    assert {key for key, value in matrix.items() if value < 99} == {("es", one) for one in LANGUAGES}
    assert found["pool_mono_seen"] == found["pool_cross_seen"] == pytest.approx(100)
    assert found["pool_mono_unseen"] == 0
    assert found["pool_cross_unseen"] == pytest.approx(50)  # de and en to es are right, es to these two are not


def test_search_deeper_than_the_pool() -> None:
    found, _ = evaluate.evaluate_retrieval(Fake(meaning), questions(), CONFIG, k=1000)
    assert found["recall"] == pytest.approx(100)
    assert found["same_language"] == pytest.approx(found["same_language_chance"])


def test_unanswerable_question_is_left_out() -> None:
    part = questions()
    part.answers["de"][0] = part.answers["en"][0] = part.answers["es"][0] = -1
    found, _ = evaluate.evaluate_retrieval(Fake(meaning), part, CONFIG, k=3)
    assert found["map"] == pytest.approx(100)
    for one in LANGUAGES:
        part.answers[one][:] = -1
    with pytest.raises(UserError, match="no question of the test part has an answer"):
        evaluate.evaluate_retrieval(Fake(meaning), part, CONFIG, k=3)


def test_translation_that_is_missing() -> None:
    """A question that is there in one language only is asked in that one, and found in all."""
    part = questions()
    asked = {one: part.questions[one] if one == "de" else (None,) * 12 for one in LANGUAGES}
    found, matrix = evaluate.evaluate_retrieval(Fake(meaning), replace(part, questions=asked), CONFIG, k=3)
    assert found["map"] == pytest.approx(100)
    assert set(matrix) == {("de", one) for one in LANGUAGES}


# ---- scored pairs


def test_sts_by_hand() -> None:
    """Cosines that are the scores correlate fully; gap and means by hand."""
    scores = np.array([0.0, 1.0, 2.5, 5.0])
    angles = np.arccos(scores / 5)
    part = Pairs(
        ("de", "en"),
        {(one, one): (("0",) * 4, tuple(str(angle) for angle in angles), scores) for one in ("de", "en")},
        aligned=True,
    )
    encoder = Fake(lambda text: np.array([np.cos(float(text)), np.sin(float(text))]))
    pearson, spearman = evaluate.evaluate_sts(encoder, part, ("de", "en"))
    assert set(pearson) == {(one, other) for one in ("de", "en") for other in ("de", "en")}
    assert all(value == pytest.approx(100) for value in (*pearson.values(), *spearman.values()))


@pytest.mark.parametrize("aligned", [True, False])
def test_sts_against_numpy(aligned: bool) -> None:
    """Random vectors of each text: the right sentences are compared, in each order of the languages."""
    rng = np.random.default_rng(0)
    keys = [(one, one) for one in LANGUAGES] if aligned else [("de", "en"), ("en", "de"), ("es", "es")]
    scores = rng.uniform(0, 5, 9)
    texts = {
        key: (tuple(f"{key} 1 {i}" for i in range(9)), tuple(f"{key} 2 {i}" for i in range(9)), scores) for key in keys
    }
    vector: dict[str, np.ndarray] = {
        text: rng.standard_normal(5) for one, two, _ in texts.values() for text in (*one, *two)
    }
    encoder = Fake(vector.__getitem__)
    pearson, spearman = evaluate.evaluate_sts(encoder, Pairs(LANGUAGES, texts, aligned), LANGUAGES)
    assert set(pearson) == set(spearman) == (EVERY if aligned else set(keys))
    for one, other in pearson:
        firsts = texts[one, one][0] if aligned else texts[one, other][0]
        seconds = texts[other, other][1] if aligned else texts[one, other][1]
        cosine = [
            vector[a] @ vector[b] / np.linalg.norm(vector[a]) / np.linalg.norm(vector[b])
            for a, b in zip(firsts, seconds, strict=True)
        ]
        assert pearson[one, other] == pytest.approx(100 * np.corrcoef(cosine, scores)[0, 1], abs=1e-3)
        ranks = [stats.rankdata(values) for values in (cosine, scores)]
        assert spearman[one, other] == pytest.approx(100 * np.corrcoef(*ranks)[0, 1], abs=1e-3)


def test_no_scored_pairs_at_all() -> None:
    """One line, not an evaluation of nothing."""
    part = Pairs(LANGUAGES, {}, aligned=False)
    with pytest.raises(UserError, match="no scored pairs of de, en, es in this part"):
        evaluate.evaluate_sts(Fake(meaning), part, LANGUAGES)


def test_summarise() -> None:
    matrix = {("a", "a"): 80.0, ("b", "b"): 60.0, ("a", "b"): 30.0, ("b", "a"): 10.0, ("u", "u"): 50.0, ("a", "u"): 5.0}
    found = evaluate.summarise(matrix, ("a", "b"), ("u",))
    assert found == {"mono_seen": 70.0, "cross_seen": 20.0, "mono_unseen": 50.0, "cross_unseen": 5.0, "gap": 50.0}
    assert evaluate.summarise({("a", "b"): 30.0}, ("a", "b"), ()) == {"cross_seen": 30.0}
    assert evaluate.summarise({}, ("a", "b"), ()) == {}


def test_language_bias_of_pairs() -> None:
    """Right within a language, at chance between two: the gap is the correlation that is lost."""
    scores = np.array([0.0, 1.0, 2.5, 5.0])
    angles = np.arccos(scores / 5)
    turned = {"de": angles, "en": angles[::-1]}
    part = Pairs(
        ("de", "en"),
        {
            (one, other): (
                ("0",) * 4,
                tuple(str(angle) for angle in (angles if one == other else turned["en"])),
                scores,
            )
            for one in ("de", "en")
            for other in ("de", "en")
        },
        aligned=False,
    )
    encoder = Fake(lambda text: np.array([np.cos(float(text)), np.sin(float(text))]))
    config = replace(CONFIG, languages=("de", "en"), mode="MONO_BIL", method="maml")
    crossed = np.corrcoef(np.cos(angles[::-1]), scores)[0, 1]
    assert evaluate.language_bias(encoder, part, config) == {"gap": pytest.approx(100 * (1 - crossed), abs=1e-3)}


# ---- runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """A run on scored pairs, one on questions and one in the synthetic world."""
    folder = tmp_path_factory.mktemp("runs")
    lines = ["sentence1,sentence2,score,language1,language2"]
    for one in LANGUAGES:
        for other in LANGUAGES:
            lines += [f"{one} first {i},{other} second {i + i % 3},{5 - i % 3},{one},{other}" for i in range(80)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    lines = ["id,language,question,answer"]
    lines += [f"{i},{one},what is {one} {i},it is {one} number {i}" for i in range(60) for one in LANGUAGES]
    (folder / "questions.csv").write_text("\n".join(lines) + "\n")
    base = Config(
        model="static", languages=LANGUAGES, unseen=(), width=4, vocabulary=300, shots=2, queries=2, negatives=2,
        inner_steps=1, inner_lr=0.5, steps=2, task_batch=2,
    )  # fmt: skip
    two = replace(base, languages=("de", "en"), unseen=("es",), mode="MONO_BIL", method="maml")
    configs = {
        "pairs": replace(base, dataset=str(folder / "pairs.csv")),
        "questions": replace(base, dataset=str(folder / "questions.csv")),
        "unseen-pairs": replace(two, dataset=str(folder / "pairs.csv")),
        "unseen-questions": replace(two, dataset=str(folder / "questions.csv")),
        "rotations": replace(base, dataset="rotations", model="linear", dimension=4, languages=("a", "b", "c")),
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training", lambda rows, path: None)  # for time; test_train.py draws it
        yield {
            name: train(config, RunOptions(output_dir=folder / name, log_every=1)) for name, config in configs.items()
        }


def keys(kinds: Sequence[str], *more: str) -> set[str]:
    """Of scored pairs, before training and by TF-IDF, too."""
    names = [*(f"{kind}" for kind in kinds), *(f"spearman_{kind}" for kind in kinds), *more]
    return {f"{prefix}{name}" for prefix in ("", "zero_shot_", "tfidf_") for name in names}


def retrieved(groups: Sequence[str], pools: Sequence[str]) -> set[str]:
    names = [f"{group}{name}" for group in groups for name in ("map", "mrr", "recall")]
    names += [f"pool_{pool}" for pool in pools] + ["same_language", "same_language_chance"]
    return {f"{prefix}{name}" for prefix in ("", "zero_shot_", "tfidf_") for name in names}


KINDS = ("mono_seen", "cross_seen", "gap")
UNSEEN_KINDS = (*KINDS, "mono_unseen", "cross_unseen")
DOCUMENTED = {
    "pairs": keys(KINDS),
    "unseen-pairs": keys(UNSEEN_KINDS),
    "questions": retrieved(("", "seen_"), KINDS),
    "unseen-questions": retrieved(("", "seen_", "unseen_"), UNSEEN_KINDS),
    "rotations": {"pearson", "zero_shot_pearson", "gap", "query_loss", "support_loss"},
}


@pytest.mark.parametrize("name", DOCUMENTED)
def test_evaluate(runs: dict[str, Run], name: str) -> None:
    """From a folder or a run: what is documented, in evaluation.json, too, and plots."""
    folder = runs[name].folder
    found = evaluate.evaluate(folder, EvaluateOptions(k=3))
    assert set(found) == DOCUMENTED[name]
    assert all(np.isfinite(value) for value in found.values())
    assert json.loads((folder / "evaluation.json").read_text()) == found
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == (set() if name == "rotations" else {"languages.png", "comparison.png"})
    assert all((folder / one).stat().st_size > 1000 for one in drawn)
    again = evaluate.evaluate(runs[name], EvaluateOptions(k=3, batch_size=7, plots=False))
    assert again == pytest.approx(found, abs=1e-3)


def test_evaluate_less(runs: dict[str, Run], tmp_path: Path) -> None:
    """Without the encoder before training, TF-IDF and plots; a zero-shot run is its own encoder before training."""
    run = replace(runs["pairs"], folder=tmp_path)
    found = evaluate.evaluate(run, EvaluateOptions(zero_shot=False, baselines=False, plots=False))
    assert set(found) == {name for name in DOCUMENTED["pairs"] if not name.startswith(("zero_shot_", "tfidf_"))}
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    untrained = replace(run, config=replace(run.config, method="zero-shot"), encoder=encoder_of(run.config, run.data))
    plain = evaluate.evaluate(untrained, EvaluateOptions(baselines=False))
    assert set(plain) == set(found)
    before = evaluate.evaluate(run, EvaluateOptions(baselines=False, plots=False))
    assert plain == pytest.approx({name: before[f"zero_shot_{name}"] for name in found})
    assert (tmp_path / "comparison.png").stat().st_size > 1000


def test_evaluate_pairs_of_two_languages_only(runs: dict[str, Run], tmp_path: Path) -> None:
    """There is no score within a language; what there is, is drawn."""
    run = runs["pairs"]
    test = run.data.test
    crossed = replace(test, texts={key: value for key, value in test.texts.items() if key[0] != key[1]})
    drawn: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "comparison", lambda bars, *args: drawn.append(bars))
        found = evaluate.evaluate(replace(run, folder=tmp_path, data=replace(run.data, test=crossed)))
    assert {name for name in found if not name.startswith(("zero_shot_", "tfidf_"))} == {
        "cross_seen",
        "spearman_cross_seen",
    }
    assert list(drawn[0]) == ["trained", "before training", "TF-IDF"]
    assert drawn[0]["trained"] == {"cross seen": found["cross_seen"]}


def test_evaluate_world(runs: dict[str, Run]) -> None:
    """Without an inner step nothing is adapted; batches larger than the number of test tasks are one of all."""
    run = runs["rotations"]
    found = evaluate.evaluate_world(run)
    assert found["pearson"] != found["zero_shot_pearson"]
    still = evaluate.evaluate_world(replace(run, config=replace(run.config, inner_steps=0)))
    assert still["pearson"] == still["zero_shot_pearson"] == pytest.approx(found["zero_shot_pearson"])
    assert still["gap"] == 0
    whole = evaluate.evaluate_world(replace(run, config=replace(run.config, task_batch=1000)))
    assert whole["gap"] == pytest.approx(1000 * abs(found["query_loss"] - found["support_loss"]), rel=1e-4)


def test_evaluate_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate.evaluate(tmp_path)
    assert not list(tmp_path.iterdir())


def found_by(text: str) -> list[list[str]]:
    """Sentences of each query."""
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    return [line.split(maxsplit=1) for line in lines]


def test_search(runs: dict[str, Run], tmp_path: Path) -> None:
    """A run's own candidates, of all languages; a file; a model's folder with a file."""
    run = runs["questions"]
    text = evaluate.search_sentences(SearchOptions(run=run.folder, queries=("what is de 3", "number 7"), k=2))
    assert [line for line in text.splitlines() if not line.startswith("  ")] == ["what is de 3", "number 7"]
    rows = found_by(text)
    assert len(rows) == 4
    every = {sentence for one in LANGUAGES for sentence in run.data.test.sentences[one]}
    assert {sentence for _, sentence in rows} <= every
    scores = [float(score) for score, _ in rows]
    assert scores[0] >= scores[1]
    vectors = run.encoder.encode(["what is de 3", rows[0][1]])  # type: ignore[union-attr]
    assert scores[0] == pytest.approx(float(vectors[0] @ vectors[1]), abs=1e-3)
    own = tmp_path / "own.txt"
    own.write_text("\ufeffit is en number 1\n\n  something else \n", encoding="utf-8")
    for folder in (run.folder, run.folder / "model"):
        text = evaluate.search_sentences(SearchOptions(run=folder, queries=("it is en number 1",), file=own, k=2))
        assert found_by(text)[0] == ["1.000", "it is en number 1"]
        assert found_by(text)[1][1] == "something else"


def test_search_in_pairs(runs: dict[str, Run]) -> None:
    """Second sentences of the test part, each once."""
    run = runs["pairs"]
    test = run.data.test
    every = {text for key in EVERY if test.has(*key) for text in test.pairs(*key)[1]}
    text = evaluate.search_sentences(SearchOptions(run=run.folder, queries=("de first 3",), k=len(every)))
    assert sorted(sentence for _, sentence in found_by(text)) == sorted(every)


@pytest.mark.parametrize("kind", ["faiss", "hnsw"])
def test_search_by_faiss(runs: dict[str, Run], kind: Any) -> None:
    options = SearchOptions(run=runs["questions"].folder, queries=("what is de 3",), k=3)
    exact, near = (evaluate.search_sentences(replace(options, index=one)) for one in ("exact", kind))
    assert [score for score, _ in found_by(exact)] == [score for score, _ in found_by(near)]


def test_bias(runs: dict[str, Run]) -> None:
    """Before training and after, as language_bias() has it."""
    names = {"questions": {"same_language", "same_language_chance", "pool_gap"}, "pairs": {"gap"}}
    for name, wanted in names.items():
        run = runs[name]
        found = evaluate.bias(BiasOptions(run=run.folder, k=3))
        assert set(found) == wanted | {f"zero_shot_{one}" for one in wanted}
        encoders = {"": run.encoder, "zero_shot_": encoder_of(run.config, run.data)}
        for prefix, encoder in encoders.items():
            by_hand = evaluate.language_bias(encoder, run.data.test, run.config, 3)  # type: ignore[arg-type]
            assert {one: found[f"{prefix}{one}"] for one in wanted} == pytest.approx(by_hand, abs=1e-3)


# ---- settings

LEAST = {
    "shots": 1, "queries": 1, "negatives": 1, "vocabulary": 300, "width": 2, "layers": 1, "heads": 1, "feedforward": 1,
    "dimension": 2, "max_query_length": 4, "max_answer_length": 4, "inner_steps": 0, "teacher_steps": 0, "steps": 0,
    "task_batch": 1, "validate_every": 0, "seed": 0, "student_steps": 0, "max_test": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", LEAST)
def test_least(name: str) -> None:
    """The least value is taken, one below it is not."""
    assert getattr(replace(PRESETS["small"], **{name: LEAST[name]}), name) == LEAST[name]
    said = f"--{name.replace('_', '-')} is {LEAST[name] - 1}: give {LEAST[name]} or more"
    with pytest.raises(UserError, match=re.escape(said)):
        replace(PRESETS["small"], **{name: LEAST[name] - 1})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["inner_lr", "outer_lr", "margin", "kd_lambda", "weight_decay", "clip"])
def test_not_a_rate(name: str, value: float) -> None:
    wanted = "a number above 0" if name in ("inner_lr", "outer_lr", "margin") else "0 or more"
    said = f"--{name.replace('_', '-')} is {value}: give {wanted}"
    with pytest.raises(UserError, match=re.escape(said)):
        replace(PRESETS["small"], **{name: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"inner_lr": 0.0}, "--inner-lr is 0.0: give a number above 0"),
        ({"outer_lr": 0.0}, "--outer-lr is 0.0: give a number above 0"),
        ({"margin": 0.0}, "--margin is 0.0: give a number above 0"),
        ({"fold": 5}, "--fold is 5: give 0 to 4"),
        ({"fold": -1}, "--fold is -1: give 0 to 4"),
        ({"model": "tiny", "width": 30}, "--width is 30, --heads 4: give a multiple of it"),
        ({"model": "linear"}, "--dataset rotations and --model linear go together"),
        ({"dataset": "rotations"}, "--dataset rotations and --model linear go together"),
        ({"mode": "MONO_BIL"}, "--method maml-align needs the three sets of --mode MONO_BIL_MULTI, not MONO_BIL"),
        ({"method": "maml"}, "--method maml takes two sets"),
        ({"method": "reptile"}, "--method reptile takes two sets"),
        ({"method": "fine-tune", "learn_inner_lr": True}, "--learn-inner-lr is for maml and maml-align, not fine-tune"),
        ({"method": "reptile", "mode": "MONO_BIL", "inner_steps": 0}, "give --inner-steps 1 or more"),
        ({"checkpointing": True}, "--checkpointing saves memory of second order: add --no-first-order"),
        ({"query_from": "dev", "validate_every": 5}, "--query-from dev trains on dev: leave --validate-every out"),
        ({"mode": "MONO"}, "--mode MONO: one of MONO_MONO"),
        ({"languages": ()}, "--languages is empty"),
        ({"languages": ("de", "en"), "unseen": ()}, "needs 3 languages or more, --languages has 2"),
        ({"languages": ("de",), "unseen": (), "mode": "MONO_BIL", "method": "maml"}, "needs 2 languages or more"),
        ({"languages": ("de", "e1", "es")}, "language 'e1': give a code of letters"),
        ({"unseen": ("",)}, "language '': give a code of letters"),
        ({"unseen": ("de",)}, "language de is named twice"),
        ({"languages": ("de", "en", "es", "en")}, "language en is named twice"),
        ({"tuples": ("de_de-de_en",)}, "2 sets, but --mode MONO_BIL_MULTI has 3"),
        ({"tuples": ("de_de-de_en-de_en,xx",)}, "xx not in --languages"),
        ({"tuples": ("de",)}, "'de' is no language tuple: write as el_el-el_ar-el_ar,el,hi"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        replace(PRESETS["small"], **fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "fields", "message"),
    [
        (EvaluateOptions, {"k": 0}, "--k is 0: give 1 or more"),
        (EvaluateOptions, {"batch_size": 0}, "--batch-size is 0: give 1 or more"),
        (BiasOptions, {"k": 0}, "--k is 0: give 1 or more"),
        (SearchOptions, {"k": 0, "queries": ("a",)}, "--k is 0: give 1 or more"),
        (SearchOptions, {}, "no --queries: give one or more"),
        (SearchOptions, {"queries": ("a", " ")}, "an empty query in --queries"),
    ],
)
def test_wrong_options(options: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        options(**fields)


def test_tuples() -> None:
    """The paper's syntax, and what the sets of a mode are."""
    assert parse_tuple("el_el-el_ar-el_ar,el,hi") == (("el", ("el",)), ("el", ("ar",)), ("el", ("ar", "el", "hi")))
    for text in ("", "el", "el_", "el_ar,", "el_ar-", "el_a1", "el_ar el_el", "el__ar", "el_ar\n"):
        with pytest.raises(UserError, match="is no language tuple"):
            parse_tuple(text)
    assert parts("MIXT") == (("MONO", "MONO"), ("MONO", "BIL"), ("MONO", "MULTI"), ("BIL", "MULTI"))
    assert parts("TRANS") == (("MONO", "BIL"),)
    assert parts("MONO_BIL_MULTI") == (("MONO", "BIL", "MULTI"),)
    sets = {mode: set_kinds(replace(PRESETS["small"], mode=mode, method="fine-tune")) for mode in MODES}
    assert sets == {mode: 3 if mode == "MONO_BIL_MULTI" else 2 for mode in MODES}


def kind_of(query: str, candidates: tuple[str, ...]) -> str:
    if len(candidates) > 1:
        assert query in candidates
        return "MULTI"
    return "MONO" if candidates == (query,) else "BIL"


@pytest.mark.parametrize("mode", MODES)
def test_drawn_tuples(mode: str) -> None:
    """Sets of the mode's kinds, on one query language (two for MONO_MONO); each language is drawn at some time."""
    config = replace(PRESETS["small"], mode=mode, method="fine-tune")
    rng = np.random.default_rng(0)
    kinds, asked = set(), set()
    for _ in range(60):
        found = draw_tuples(config, rng)
        drawn = tuple(kind_of(query, candidates) for query, candidates in found)
        kinds.add(drawn)
        queries = {query for query, _ in found}
        asked |= queries
        assert len(queries) == (2 if drawn == ("MONO", "MONO") else 1)
        for query, candidates in found:
            assert {query, *candidates} <= set(config.languages)
            assert len(set(candidates)) == len(candidates)
        if mode == "MONO_BIL_MULTI":
            (one, _), (_, (other,)), (_, every) = found
            assert every[:2] == (other, one)
            assert len(every) == 3
    assert kinds == set(parts(mode))
    assert asked == set(config.languages)


def test_drawn_from_given_tuples() -> None:
    texts = ("de_de-de_en-de_en,de,es", "en_en-en_es-en_es,en")
    config = replace(PRESETS["small"], tuples=texts)
    rng = np.random.default_rng(0)
    assert {draw_tuples(config, rng) for _ in range(20)} == {parse_tuple(text) for text in texts}


def test_one_and_two_languages() -> None:
    """One language is enough within it, two between them."""
    one = replace(PRESETS["small"], languages=("de",), unseen=(), mode="MONO_MONO", method="maml")
    assert draw_tuples(one, np.random.default_rng(0)) == (("de", ("de",)), ("de", ("de",)))
    two = replace(PRESETS["small"], languages=("de", "en"), unseen=(), mode="BIL_MULTI", method="maml")
    (query, candidates), (_, every) = draw_tuples(two, np.random.default_rng(0))
    assert {query, *candidates} == {"de", "en"}
    assert every == (*candidates, query)


def test_presets() -> None:
    """Every preset is a config that can be trained with fewer steps; the paper's own values are in `paper`."""
    assert next(iter(PRESETS)) == "small"
    paper = PRESETS["paper"]
    assert (paper.steps, paper.task_batch, paper.inner_steps, paper.kd_lambda) == (3500, 4, 5, 0.5)
    assert all(isinstance(replace(config, steps=1), Config) for config in PRESETS.values())


# ---- the command line


def cli_run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    """Exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.run("maml-align", COMMANDS, [str(one) for one in arguments])
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


def test_train_and_evaluate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset with fields changed, refused a second time, resumed, and evaluated."""
    fields = ["rotations", "--dimension", "4", "--steps", "2", "--shots", "3", "--queries", "3"]
    arguments = ["train", *fields, "--output-dir", tmp_path / "run"]
    assert cli_run(capsys, *arguments)[:2] == (0, f"run folder: {tmp_path / 'run'}\n")
    config = load(tmp_path / "run").config
    assert config == replace(PRESETS["rotations"], dimension=4, steps=2, shots=3, queries=3)
    status, _, err = cli_run(capsys, *arguments)
    assert status == 2
    assert "already holds a run" in err
    assert cli_run(capsys, *arguments, "--resume")[0] == 0
    status, out, err = cli_run(capsys, "evaluate", tmp_path / "run")
    assert (status, err) == (0, "")
    shown = {name: float(value) for name, value in (line.split() for line in out.splitlines())}
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert shown == pytest.approx(written, rel=1e-4)


def test_bias_and_search_commands(runs: dict[str, Run], capsys: pytest.CaptureFixture[str]) -> None:
    """They print what the functions return."""
    folder = runs["questions"].folder
    status, out, err = cli_run(capsys, "bias", "--run", folder, "--k", "3")
    assert (status, err) == (0, "")
    wanted = evaluate.bias(BiasOptions(run=folder, k=3))
    assert {name: float(value) for name, value in (line.split() for line in out.splitlines())} == pytest.approx(
        wanted, rel=1e-4, abs=1e-4
    )
    status, out, err = cli_run(capsys, "search", "--run", folder, "--queries", "what is de 3", "number", "--k", "2")
    assert (status, err) == (0, "")
    options = SearchOptions(run=folder, queries=("what is de 3", "number"), k=2)
    assert out == evaluate.search_sentences(options) + "\n"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("train none", "unknown preset 'none'"),
        ("train --no-such-field 1", "no-such-field"),
        ("train --mode FOO", "--mode FOO: one of"),
        ("train --steps", "steps"),
        ("train --steps many", "many"),
        ("train --shots 0", "--shots is 0: give 1 or more"),
        ("train --outer-lr nan", "--outer-lr is nan"),
        ("train --method best", "best"),
        ("train --precision fp16", "fp16"),
        ("train --languages de de en", "language de is named twice"),
        ("train --tuples de", "'de' is no language tuple"),
        ("train --dataset nope.csv", "nope.csv: No such file"),
        ("train --dataset nothing", "--dataset nothing: give xquad-r"),
        ("train --data-dir /nowhere", "/nowhere"),
        ("train --languages de en es xx", "xx"),
        ("train --model /nowhere", "/nowhere"),
        ("train --checkpointing", "--no-first-order"),
        ("train --log-every 0", "--log-every is 0"),
        ("train --keep 1", "--keep is 1"),
        ("train rotations --unseen g", "has no unseen languages"),
        ("train rotations --output-dir /dev/null/run", "/dev/null/run"),
        ("evaluate", "give a run folder"),
        ("evaluate nowhere", "nowhere is not a run folder"),
        ("evaluate nowhere --k 0", "--k is 0"),
        ("evaluate nowhere --batch-size none", "none"),
        ("evaluate foreign", "which this version does not know"),
        ("evaluate broken", "is not JSON"),
        ("bias --run nowhere", "nowhere is not a run folder"),
        ("bias --k 0", "--k is 0"),
        ("bias", "is not a run folder"),
        ("bias --run foreign", "which this version does not know"),
        ("search", "no --queries: give one or more"),
        ("search --queries a --k 0", "--k is 0"),
        ("search --queries a --index best", "best"),
        ("search --run nowhere --queries a", "nowhere is not a run folder"),
        ("search --run broken --queries a", "is not JSON"),
        ("reproduce --claim none", "unknown claim 'none'"),
        ("reproduce --seeds 0", "--seeds is 0"),
        ("reproduce --scale large", "large"),
        ("info x", "info takes no arguments"),
        ("nothing", "unknown command 'nothing'"),
    ],
)
def test_command_line_refuses(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One line, exit status 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, text in (("foreign", '{"tasks": 3}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    kept = sorted(tmp_path.rglob("*"))
    status, out, err = cli_run(capsys, *line.split())
    assert (status, out) == (2, ""), err
    lines = err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("maml-align: error: ")
    assert said in lines[0]
    assert sorted(tmp_path.rglob("*")) == kept


def test_search_and_bias_refuse(runs: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On good runs: one line, exit status 2."""
    run, world = runs["questions"].folder, runs["rotations"].folder
    own, empty, latin = (tmp_path / name for name in ("own.txt", "empty.txt", "latin.txt"))
    own.write_text("one\ntwo\n")
    empty.write_text("\n \n")
    latin.write_bytes(b"caf\xe9\n")
    one = ["--queries", "a"]
    wrong: list[tuple[list[Any], str]] = [
        (["search", "--queries", " "], "an empty query"),
        (["search", *one, "--run", run / "model"], "is a model without sentences: give --file"),
        (["search", *one, "--run", run, "--file", own, "--k", "9"], "k is 9, but there are 2 sentences"),
        (["search", *one, "--run", run, "--file", empty], "no sentence in it"),
        (["search", *one, "--run", run, "--file", latin], "not UTF-8"),
        (["search", *one, "--run", run, "--file", tmp_path / "none.txt"], "none.txt: No such file"),
        (["search", *one, "--run", run, "--file", tmp_path], "Is a directory"),
        (["search", *one, "--run", run, "--k", "9999"], "k is 9999, but there are"),
        (["search", *one, "--run", world], "is of a synthetic world: it has no sentences"),
        (["search", *one, "--run", world, "--file", own], "is of a synthetic world"),
        (["bias", "--run", world], "no language bias to measure"),
        (["bias", "--run", run / "model"], "is not a run folder"),
    ]
    for arguments, said in wrong:
        status, out, err = cli_run(capsys, *arguments)
        assert (status, out) == (2, ""), (arguments, err)
        assert len(err.splitlines()) == 1, (arguments, err)
        assert said in err, (arguments, err)


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    """Presets and claims, by name."""
    status, out, err = cli_run(capsys, "info")
    assert (status, err) == (0, "")
    words = {line.split()[0].rstrip(":") for line in out.splitlines() if line.startswith("  ")}
    assert words == {*PRESETS, *(claim.name for claim in CLAIMS)}
    assert out.count("(flagship)") == 1
    for command in COMMANDS:
        assert command in cli_run(capsys, "--help")[1]


def test_help_without_torch() -> None:
    """The help of all sub-commands, `info`, and errors that need no computing."""
    code = (
        "import contextlib, io, sys\n"
        "from maml_align.cli import main\n"
        "shown = {'train': ('--kd-lambda', '--output-dir'), 'search': ('--queries', '--file'), 'bias': ('--run',)}\n"
        "for line in ('--help', 'info', 'train --help', 'train paper --help', 'evaluate --help', 'reproduce --help',\n"
        "    'bias --help', 'search --help', 'train --shots 0', 'search', 'reproduce --claim none'):\n"
        "    words = line.split()\n"
        "    sys.argv[1:] = words\n"
        "    out = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):\n"
        "            main()\n"
        "    except SystemExit as stop:\n"
        "        wrong = line in ('train --shots 0', 'search', 'reproduce --claim none')\n"
        "        assert stop.code == (2 if wrong else 0), (words, stop.code)\n"
        "    text = out.getvalue()\n"
        "    if '--help' in words:\n"
        "        assert text.split()[0] == 'usage:', words\n"
        "        for name in shown.get(words[0], ()):\n"
        "            assert name in text, (words, name)\n"
        "heavy = {'torch', 'transformers', 'sentence_transformers', 'sklearn', 'scipy', 'accelerate', 'matplotlib'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    script = Path(sys.executable).with_name("maml-align")
    if script.exists():  # where the package is installed
        done = subprocess.run([script, "search", "--help"], capture_output=True, text=True, check=True)
        assert "--queries" in done.stdout
