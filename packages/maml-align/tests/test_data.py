"""Loaders: counts of the real sets, folds without leaks, files of one's own, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from maml_align import data
from maml_align.config import PRESETS, Config
from metazoo.errors import UserError

REAL = pytest.mark.skipif(not os.environ.get("METAZOO_DATA"), reason="METAZOO_DATA is not set")
SENTENCES = {
    "ar": 1222, "de": 1276, "el": 1234, "en": 1180, "es": 1215, "hi": 1244, "ru": 1219, "th": 852, "tr": 1167,
    "vi": 1209, "zh": 1196,
}  # fmt: skip
OWN = Config(languages=("de", "en", "es"), unseen=())


def folder() -> Path:
    return Path(os.environ["METAZOO_DATA"]) / "lareqa" / "xquad-r"


def written(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_embedded_counts() -> None:
    """1,190 questions of 48 articles; each answer is one of the sentences."""
    whole = data.load_xquad_r(None, data.EMBEDDED)
    assert len(whole.questions.ids) == 1190
    assert len(np.unique(whole.articles)) == 48
    for one in data.EMBEDDED:
        assert len(whole.questions.sentences[one]) == SENTENCES[one]
        assert whole.questions.answers[one].min() >= 0


@REAL
def test_real_counts_and_embedded_files() -> None:
    whole = data.load_xquad_r(folder(), tuple(SENTENCES))
    assert {one: len(texts) for one, texts in whole.questions.sentences.items()} == SENTENCES
    packed = data.load_xquad_r(None, data.EMBEDDED).questions
    for one in data.EMBEDDED:
        assert packed.sentences[one] == whole.questions.sentences[one]
        assert packed.questions[one] == whole.questions.questions[one]
        assert np.array_equal(packed.answers[one], whole.questions.answers[one])


@pytest.mark.parametrize("seed", range(5))
def test_folds_do_not_leak(seed: int) -> None:
    """No question and no paragraph is in two parts, in any language; answers stay with their questions."""
    found = data.load(replace(PRESETS["small"], seed=seed))
    parts = (found.train, found.dev, found.test)
    assert sum(len(part.ids) for part in parts) == 1190
    assert len({key for part in parts for key in part.ids}) == 1190
    for one in ("de", "tr"):
        paragraphs = [set(part.contexts[one]) for part in parts]
        assert not any(paragraphs[i] & paragraphs[j] for i in range(3) for j in range(i))
    whole = data.load_xquad_r(None, ("de", "en")).questions
    for part in parts:
        for i, key in enumerate(part.ids[:50]):
            row = whole.ids.index(key)
            assert part.sentences["de"][part.answers["de"][i]] == whole.sentences["de"][whole.answers["de"][row]]


def test_every_fold_is_tested_once() -> None:
    tests = [data.load(replace(PRESETS["small"], fold=fold)).test.ids for fold in range(5)]
    assert len({key for ids in tests for key in ids}) == 1190


def test_candidates() -> None:
    part = data.load(replace(PRESETS["small"], max_test=7)).test
    assert len(part.ids) == 7
    plain, whole = part.candidates("en", False), part.candidates("en", True)
    assert len(plain) == len(whole)
    assert all(text.startswith(sentence) and "\n" not in text for text, sentence in zip(whole, plain, strict=True))


@REAL
def test_stsb() -> None:
    """5,749, 1,500 and 1,379 rows; row i says the same in every language."""
    found = data.load(PRESETS["stsb"])
    assert [part.size("de", "en") for part in (found.train, found.dev, found.test)] == [5749, 1500, 1379]
    first, second, scores = found.train.pairs("en", "de")
    assert (first[0], second[0], scores[0]) == ("A plane is taking off.", "Ein Flugzeug hebt gerade ab.", 5.0)
    assert found.train.pairs("de", "de")[0][1] == "Ein Mann spielt eine große Flöte."
    with pytest.raises(UserError, match="no scored pairs de–xx"):
        found.train.pairs("de", "xx")


@REAL
def test_language_that_is_not_there() -> None:
    with pytest.raises(UserError, match=r"has no stsb-tr-train\.csv: leave that language out"):
        data.load(replace(PRESETS["stsb"], unseen=("tr",)))


def stsb(path: Path, **lines: tuple[str, ...]) -> Path:
    for one, rows in lines.items():
        for split in ("train", "dev", "test"):
            written(path / f"stsb-{one}-{split}.csv", *rows)
    return path


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a,b", "line 2: 2 columns: give sentence1, sentence2, score"),
        ("a,b,6", "line 2: the score is '6': give a number from 0 to 5"),
        ("a,b,nan", "line 2: the score is 'nan'"),
        ("a, ,1", "line 2: sentence 2 is empty"),
    ],
)
def test_wrong_rows(tmp_path: Path, row: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.load_stsb_multi(stsb(tmp_path, de=("x,y,1", row)), ("de",), "train")


def test_files_that_are_no_translations(tmp_path: Path) -> None:
    stsb(tmp_path, de=("x,y,1", "u,v,2"), en=("x,y,1", "u,v,3"))
    with pytest.raises(UserError, match="differ in rows or scores"):
        data.load_stsb_multi(tmp_path, ("de", "en"), "train")


def pairs(count: int) -> list[str]:
    lines = ["sentence1,sentence2,score,language1,language2"]
    return lines + [f"de {i},en {i},{i % 6},de,en" for i in range(count)]


def test_own_pairs(tmp_path: Path) -> None:
    """Each pair is there in both orders; a byte order mark is no part of a name."""
    path = tmp_path / "own.csv"
    path.write_text("\ufeff" + "\n".join(pairs(100)) + "\n", encoding="utf-8")
    found = data.load(replace(OWN, languages=("de", "en"), mode="MONO_BIL", method="maml", dataset=str(path)))
    assert found.kind == "pairs"
    assert [part.size("de", "en") for part in (found.train, found.dev, found.test)] == [70, 15, 15]
    forth, back = found.train.pairs("de", "en"), found.train.pairs("en", "de")
    assert forth[0] == back[1]
    assert not found.train.has("de", "de")


def test_own_questions(tmp_path: Path) -> None:
    """Questions that share an answer stay together; a missing translation is None and has no answer."""
    lines = ["id,language,question,answer,context"]
    for i in range(40):
        lines += [
            f"{i},{one},{one} q{i},{one} a{i // 2},{one} c{i // 2}" for one in ("de", "en") + (("es",) if i % 4 else ())
        ]
    found = data.load(replace(OWN, dataset=str(written(tmp_path / "own.csv", *lines))))
    assert found.kind == "questions"
    parts = (found.train, found.dev, found.test)
    answers = [set(part.sentences["de"]) for part in parts]
    assert not answers[0] & answers[1]
    assert not answers[0] & answers[2]
    for part in parts:
        for i, key in enumerate(part.ids):
            assert (part.questions["es"][i] is None) == (int(key) % 4 == 0) == (part.answers["es"][i] == -1)
            assert part.sentences["de"][part.answers["de"][i]] == f"de a{int(key) // 2}"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (("a,b", "1,2"), "columns a, b: give sentence1"),
        (("sentence1,sentence2,score,language1,language2", "x,y,7,de,en"), "line 2: the score is '7'"),
        (("sentence1,sentence2,score,language1,language2", "x,,1,de,en"), "line 2: sentence2 is empty"),
        (("sentence1,sentence2,score,language1,language2", "x,y,1,de,en"), "no language es in it: it has de, en"),
        (("id,language,question,answer", "1,de,q,"), "line 2: answer is empty"),
        (("id,language,question,answer", "1,de,q,a", "1,de,r,b"), "no language en in it: it has de"),
    ],
)
def test_own_files_refused(tmp_path: Path, lines: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        data.load(replace(OWN, dataset=str(written(tmp_path / "own.csv", *lines))))


def test_question_twice(tmp_path: Path) -> None:
    lines = ["id,language,question,answer", *(f"1,{one},q,a" for one in ("de", "en", "es")), "1,de,q,b"]
    with pytest.raises(UserError, match="question 1 in de is there twice"):
        data.load(replace(OWN, dataset=str(written(tmp_path / "own.csv", *lines))))


def test_not_utf8_and_not_there(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_bytes(b"sentence1,sentence2\n\xff\xfe")
    with pytest.raises(UserError, match="not UTF-8"):
        data.load(replace(OWN, dataset=str(path)))
    with pytest.raises(UserError, match="No such file"):
        data.load(replace(OWN, dataset=str(tmp_path / "none.csv")))
    with pytest.raises(UserError, match="--dataset nonsense: give xquad-r"):
        data.load(replace(OWN, dataset="nonsense"))


@pytest.mark.parametrize("content", ["[]", "{", '{"data": [{"paragraphs": [{"context": "x"}]}]}'])
def test_no_xquad(tmp_path: Path, content: str) -> None:
    written(tmp_path / "de.json", content)
    with pytest.raises(UserError, match=r"de\.json: not XQuAD-R's layout"):
        data.load_xquad_r(tmp_path, ("de",))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=60), st.integers(0, 3))
def test_split_keeps_texts_apart(rows: list[tuple[int, int]], seed: int) -> None:
    """No text is in two parts."""
    groups = data._groups([[("one", a), ("two", b)] for a, b in rows])
    part = data._parts(groups, seed)
    for which in (0, 1):
        for text in {row[which] for row in rows}:
            assert len({int(part[i]) for i, row in enumerate(rows) if row[which] == text}) == 1


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration for each language; aligned where the scores are the same row by row."""
    import datasets

    class Rows(dict[str, Any]):
        column_names = ("sentence1", "sentence2", "similarity_score")

    def load_dataset(name: str, language: str, *, split: str) -> Rows:
        texts = [f"{language} {split} {i}" for i in range(4)]
        return Rows(sentence1=texts, sentence2=texts, similarity_score=[0.0, 1.0, 2.0, 5.0])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, language: ["train", "dev", "test"])
    found = data.load(replace(OWN, dataset="hub:some/set"))
    assert found.train.aligned
    assert found.train.pairs("de", "en")[1][0] == "en train 0"

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(UserError, match="hub:some/set de train: no network: check id"):
        data.load(replace(OWN, dataset="hub:some/set"))


def test_texts_once() -> None:
    part = data.Pairs(("de",), {("de", "de"): (("a", "b"), ("a", "c"), np.zeros(2))}, aligned=True)
    source = SimpleNamespace(train=part)
    assert list(data.texts(source, ("de",))) == ["a", "b", "c"]  # type: ignore[arg-type]
    assert not list(data.texts(source, ("en",)))  # type: ignore[arg-type]
