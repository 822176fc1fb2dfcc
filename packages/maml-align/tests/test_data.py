"""Loaders: counts of the real sets, folds without leaks, files of one's own, and what they refuse."""

from __future__ import annotations

import csv
import gzip
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
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
        assert packed.contexts[one] == whole.questions.contexts[one]
        assert packed.questions[one] == whole.questions.questions[one]
        assert np.array_equal(packed.answers[one], whole.questions.answers[one])


@pytest.mark.parametrize("seed", range(5))
def test_folds_do_not_leak(seed: int) -> None:
    """No question and no paragraph is in two parts, in any language; answers stay with their questions."""
    found = data.load(replace(PRESETS["small"], seed=seed))
    parts = (found.train, found.dev, found.test)
    assert sum(len(part.ids) for part in parts) == 1190
    assert len({key for part in parts for key in part.ids}) == 1190
    for one in ("de", "en", "es", "tr", "vi"):
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
    with pytest.raises(UserError, match=r"has no stsb-tr-train\.csv: leave tr out \(it has de, en, es, fr, "):
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
        (("sentence1,sentence2,score,language1,language2", "x,y,nan,de,en"), "line 2: the score is 'nan'"),
        (("sentence1,sentence2,score,language1,language2", "x,y,1,de, "), "line 2: language2 is empty"),
        (("sentence1,sentence2,score,language1,language2", "x,y,z,1,de,en"), "line 2: 6 values, but 5 columns"),
        (("sentence1,sentence2,score,language1,language2", "x" * 200_000 + ",y,1,de,en"), "line 2: no CSV"),
        ((), r"columns \(none\): give sentence1"),
        (("id,language,question,answer", "1,,q,a"), "line 2: language is empty"),
        (("id,language,question,answer", "1,de,who, then?,a"), "line 2: 5 values, but 4 columns"),
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


def test_texts_once() -> None:
    part = data.Pairs(("de",), {("de", "de"): (("a", "b"), ("a", "c"), np.zeros(2))}, aligned=True)
    source = SimpleNamespace(train=part)
    assert list(data.texts(source, ("de",))) == ["a", "b", "c"]  # type: ignore[arg-type]
    assert not list(data.texts(source, ("en",)))  # type: ignore[arg-type]


# The embedded set


def test_answers_begin_in_their_sentences() -> None:
    """The sentence of each answer holds the answer's first word, as far as the sentence goes."""
    for one in data.EMBEDDED:
        packed = (Path(data.__file__).parent / "xquad-r" / f"{one}.json.gz").read_bytes()
        assert packed[4:9] == b"\0\0\0\0\2"  # no time of writing; level 9
        found = data.load_xquad_r(None, (one,)).questions
        row = {key: i for i, key in enumerate(found.ids)}
        for article in json.loads(gzip.decompress(packed))["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    at, answer = asked["answers"][0]["answer_start"], asked["answers"][0]["text"]
                    held = found.answers[one][row[asked["id"]]]
                    end = next(end for start, end in paragraph["sentence_breaks"] if start <= at < end)
                    said = paragraph["context"][at : min(end, at + len(answer))]
                    assert answer.startswith(said)
                    # a Turkish sentence has a mended character that its paragraph has not
                    assert said.split()[0] in found.sentences[one][held]
                    assert found.contexts[one][held] == paragraph["context"]


def test_folds_are_the_same_for_all_seeds() -> None:
    small = PRESETS["small"]
    assert data.load(replace(small, seed=6)).test.ids == data.load(replace(small, seed=3, fold=1)).test.ids
    assert data.load(replace(small, fold=0)).dev.ids == data.load(replace(small, fold=1)).test.ids


def test_no_line_breaks_in_candidates() -> None:
    part = data.Questions(("1",), {"de": ("q",)}, {"de": ("O\n2",)}, {"de": ("O\n2\nis",)}, {"de": np.array([0])})
    assert part.candidates("de", False) == ["O 2"]
    assert part.candidates("de", True) == ["O 2 O 2 is"]
    assert replace(part, contexts={"de": ("",)}).candidates("de", True) == ["O 2"]


def test_questions_to_train_on() -> None:
    """Questions, paragraphs and sentences of the training part, each once."""
    found = data.load(PRESETS["small"])
    said = list(data.texts(found, ("de", "en")))
    assert len(said) == len(set(said))
    assert {*found.train.questions["de"], *found.train.contexts["en"], *found.train.sentences["en"]} <= set(said)
    assert not set(said) & set(found.test.contexts["de"])


# Files in XQuAD-R's layout


def squad(path: Path, *, articles: int = 10, **lines: dict[str, Any]) -> Path:
    """LANGUAGE.json files of one question in each article; ``lines`` replaces keys of the last paragraph."""
    for one, odd in lines.items():
        found = []
        for i in range(articles):
            paragraph = {
                "context": f"{one} a{i}. {one} b{i}.", "sentences": [f"{one} a{i}.", f"{one} b{i}."],
                "sentence_breaks": [[0, 6], [6, 12]], "qas": [question(f"q{i}")],
            }  # fmt: skip
            found.append({"paragraphs": [paragraph | (odd if i == articles - 1 else {})]})
        (path / f"{one}.json").write_text(json.dumps({"data": found}), encoding="utf-8")
    return path


def question(key: str, start: int = 1) -> dict[str, Any]:
    return {"id": key, "question": "who?", "answers": [{"answer_start": start, "text": "x"}]}


def test_files_of_ones_own_before_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """--data-dir holds LANGUAGE.json itself."""
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    found = data.load(replace(OWN, data_dir=str(squad(tmp_path, de={}, en={}, es={}))))
    assert [len(part.ids) for part in (found.train, found.dev, found.test)] == [6, 2, 2]
    assert found.test.sentences["de"][found.test.answers["de"][0]] == f"de a{found.test.ids[0][1:]}."
    assert len(found.test.sentences["de"]) == 4
    with pytest.raises(UserError, match=r"has no tr\.json: leave tr out \(it has de, en, es\), or add the file"):
        data.load(replace(OWN, unseen=("tr",), data_dir=str(tmp_path)))
    with pytest.raises(UserError, match="not a folder"):
        data.load(replace(OWN, data_dir=str(tmp_path / "none")))


def test_too_few_articles(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"xquad-r: no question with an answer in de, en, es for the train part"):
        data.load(replace(OWN, data_dir=str(squad(tmp_path, articles=1, de={}, en={}, es={}))))


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        ({"qas": [question("q9", 40)]}, r"en\.json: the answer of question q9 lies in no sentence"),
        ({"qas": [question("q9"), question("q9")]}, r"en\.json: question q9 is there twice"),
        ({"qas": [question("q9"), question("q0")]}, r"en\.json: question q0 is there twice"),
        ({"qas": [question("new")]}, r"en\.json: not the same questions as de\.json"),
        ({"qas": []}, r"en\.json: not the same questions as de\.json"),
        ({"sentence_breaks": [[0, 6]]}, r"en\.json: 2 sentences, but 1 breaks"),
        ({"sentences": ["", "b"]}, r"en\.json: a sentence is empty"),
        ({"context": 3}, r"en\.json: a paragraph is empty"),
        ({"qas": [question("q9") | {"question": None}]}, r"en\.json: question q9 is empty"),
        ({"qas": [question("q9") | {"answers": []}]}, r"en\.json: not XQuAD-R's layout \(IndexError"),
        ({"qas": [question("q9") | {"answers": [{"answer_start": "1"}]}]}, r"en\.json: not XQuAD-R's layout"),
    ],
)
def test_wrong_questions(tmp_path: Path, odd: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        data.load_xquad_r(squad(tmp_path, de={}, en=odd), ("de", "en"))
    assert "\n" not in str(raised.value)
    assert str(tmp_path) in str(raised.value)


def test_articles_in_another_order(tmp_path: Path) -> None:
    """Folds are by article: files that order them differently would put a question in two."""
    path = squad(tmp_path, de={}, en={}) / "en.json"
    turned = json.loads(path.read_text(encoding="utf-8"))["data"][::-1]
    path.write_text(json.dumps({"data": turned}), encoding="utf-8")
    with pytest.raises(UserError, match=r"en\.json: question q9 is in another article than in de\.json"):
        data.load_xquad_r(tmp_path, ("de", "en"))


def test_no_questions(tmp_path: Path) -> None:
    written(tmp_path / "de.json", '{"data": []}')
    with pytest.raises(UserError, match=r"de\.json: no questions in it"):
        data.load_xquad_r(tmp_path, ("de",))
    (tmp_path / "de.json").write_bytes(b"{\n\xff")
    with pytest.raises(UserError, match=r"de\.json line 2: not UTF-8"):
        data.load_xquad_r(tmp_path, ("de",))
    with pytest.raises(UserError, match=r"en\.json: No such file"):
        data.load_xquad_r(tmp_path, ("en",))
    with pytest.raises(UserError, match=r"fr\.json is not in the package \(it has de, en, es, tr, vi\)"):
        data.load_xquad_r(None, ("fr",))


# Scored pairs, and files of one's own


def test_first_rows(tmp_path: Path) -> None:
    """max_test cuts the test part; files are read from --data-dir, quoted commas and all."""
    stsb(tmp_path, **{one: ('"x, y",z,1', "u,v,2.5", "s,t,0") for one in ("de", "en", "es")})
    found = data.load(replace(OWN, dataset="stsb", data_dir=str(tmp_path), max_test=2))
    assert [part.size("de", "es") for part in (found.train, found.dev, found.test)] == [3, 3, 2]
    assert found.test.pairs("de", "es")[0] == ("x, y", "u")
    assert found.test.pairs("de", "es")[2].tolist() == [1.0, 2.5]
    written(tmp_path / "stsb-es-dev.csv", "u,v,2")
    with pytest.raises(UserError, match=r"stsb-es-dev\.csv and stsb-de-dev\.csv differ in rows or scores"):
        data.load(replace(OWN, dataset="stsb", data_dir=str(tmp_path)))
    (tmp_path / "stsb-de-train.csv").write_text("", encoding="utf-8")
    with pytest.raises(UserError, match=r"stsb-de-train\.csv: no rows in it"):
        data.load_stsb_multi(tmp_path, ("de",), "train")


@REAL
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_stsb_means_the_same_in_all_languages(split: str) -> None:
    named = ("de", "en", "es", "fr", "it", "ja", "nl", "pl", "pt", "ru", "zh")
    part = data.load_stsb_multi(Path(os.environ["METAZOO_DATA"]) / "stsb-multi-mt", named, split)
    scores = part.pairs("ja", "zh")[2]
    assert part.size("ja", "zh") == {"train": 5749, "dev": 1500, "test": 1379}[split]
    assert 0 <= scores.min() < scores.max() <= 5
    assert all(np.array_equal(part.pairs(one, one)[2], scores) for one in named)


def test_own_questions_with_byte_order_mark(tmp_path: Path) -> None:
    lines = ["id,language,question,answer", *(f"{i},{one},q{i},a{i}" for i in range(20) for one in ("de", "en", "es"))]
    path = tmp_path / "own.csv"
    path.write_text("\ufeff" + "\n".join(lines) + "\n", encoding="utf-8")
    found = data.load(replace(OWN, dataset=str(path), max_test=2))
    assert [len(part.ids) for part in (found.train, found.dev, found.test)] == [14, 3, 2]
    assert len(found.test.sentences["de"]) == 3
    assert found.test.contexts["de"] == ("", "", "")


def test_rows_of_one_id_stay_together(tmp_path: Path) -> None:
    """Translations of a pair of sentences are in one part if they are given an id."""
    lines = ["id,sentence1,sentence2,score,language1,language2"]
    lines += [f"{i},{one} x{i},{one} y{i},3,{one},{one}" for i in range(30) for one in ("de", "en", "es")]
    found = data.load(replace(OWN, dataset=str(written(tmp_path / "own.csv", *lines))))
    for part in (found.train, found.dev, found.test):
        said = {one: {text.split()[1] for text in part.pairs(one, one)[0]} for one in ("de", "en", "es")}
        assert said["de"] == said["en"] == said["es"]


@pytest.mark.parametrize(
    ("header", "row", "message"),
    [
        ("sentence1,sentence2,score,language1,language2", "x{0},y{0},1,{1},{1}", "no scored pair in de, en, es for"),
        ("id,language,question,answer", "{0},{1},q{0},a{0}", "no question with an answer in de, en, es for the dev"),
    ],
)
def test_too_few_rows(tmp_path: Path, header: str, row: str, message: str) -> None:
    """A file whose dev or test part would be empty is refused before anything is trained."""
    lines = [row.format(i, one) for i in range(2) for one in ("de", "en", "es")]
    path = written(tmp_path / "own.csv", header, *lines)
    with pytest.raises(UserError, match=message) as raised:
        data.load(replace(OWN, dataset=str(path)))
    assert str(raised.value).startswith(str(path))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=40), st.integers(0, 3), st.booleans())
def test_no_text_in_two_parts(drawn: list[tuple[int, int]], seed: int, asked: bool) -> None:
    """From file to parts: no sentence of a pair, and no id, answer or paragraph of a question."""
    named = ("de", "en", "es")
    if asked:
        rows: list[list[Any]] = [["id", "language", "question", "answer", "context"]]
        rows += [[f"u{i}", one, f"q{i}", f"u{i}", ""] for i in range(20) for one in named]
        rows += [[f"d{i}", one, f"q{i}", f"a{a}", f"c{c}"] for i, (a, c) in enumerate(drawn) for one in named[i % 3 :]]
    else:
        rows = [["sentence1", "sentence2", "score", "language1", "language2"]]
        rows += [[f"u{i}", f"v{i}", 1, named[i % 3], named[(i + 1) % 3]] for i in range(20)]
        rows += [[f"t{a}", f"t{b}", 5, named[i % 3], named[i % 2]] for i, (a, b) in enumerate(drawn)]
    with tempfile.TemporaryDirectory() as made:
        path = Path(made) / "own.csv"
        with path.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows(rows)
        found = data.load(replace(OWN, dataset=str(path), seed=seed))
    parts: list[set[Any]] = []
    for part in (found.train, found.dev, found.test):
        if isinstance(part, data.Pairs):
            parts.append({text for one, two, _ in part.texts.values() for text in (*one, *two)})
        else:
            sentences = {("answer", text) for of in part.sentences.values() for text in of}
            contexts = {("context", text) for of in part.contexts.values() for text in of if text}
            parts.append({("id", key) for key in part.ids} | sentences | contexts)
    assert not any(parts[i] & parts[j] for i in range(3) for j in range(i))
    if asked:
        assert sum(len(part.ids) for part in (found.train, found.dev, found.test)) == 20 + len(drawn)


# The hub


class Rows(dict[str, Any]):
    """Columns of a split."""

    @property
    def column_names(self) -> list[str]:
        return list(self)


def hub(monkeypatch: pytest.MonkeyPatch, made: Callable[[str, str], Rows], *splits: str) -> Config:
    """A hub whose sets have these splits, ``made`` of language and split; importing the real one takes seconds."""

    def load_dataset(name: str, language: str, *, split: str) -> Rows:
        assert name == "some/set"
        return made(language, split)

    there = SimpleNamespace(load_dataset=load_dataset, get_dataset_split_names=lambda name, language: list(splits))
    monkeypatch.setitem(sys.modules, "datasets", there)
    return replace(OWN, dataset="hub:some/set")


def test_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A configuration for each language; aligned where the scores are the same row by row."""

    def made(language: str, split: str) -> Rows:
        texts = [f"{language} {split} {i}" for i in range(4)]
        return Rows(sentence1=texts, sentence2=texts, similarity_score=[0.0, 1.0, 2.0, 5.0])

    found = data.load(hub(monkeypatch, made, "train", "dev", "test"))
    assert found.train.aligned
    assert found.train.pairs("de", "en")[1][0] == "en train 0"
    assert found.test.pairs("de", "en")[2].tolist() == [0.0, 1.0, 2.0, 5.0]


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(language: str, split: str) -> Rows:
        raise ConnectionError("no\nnetwork")

    with pytest.raises(UserError, match="hub:some/set de train: no network: check id"):
        data.load(hub(monkeypatch, refuse, "train", "dev", "test"))


def test_hub_by_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """`validation` and `score`; languages that do not have the same scores are not aligned."""

    def made(language: str, split: str) -> Rows:
        count = 4 if language == "de" else 3
        return Rows(sentence1=[f"{split} x"] * count, sentence2=["y"] * count, score=[1.0] * count)

    found = data.load(hub(monkeypatch, made, "train", "validation", "test"))
    assert found.dev.pairs("de", "de")[0][0] == "validation x"
    assert not found.train.aligned
    assert found.train.has("en", "en")
    assert not found.train.has("de", "en")


@pytest.mark.parametrize(
    ("columns", "splits", "message"),
    [
        ({"text": ["x"], "score": [1.0]}, ("train",), "some/set de train: columns text, score: give a set with"),
        ({"sentence1": ["x"], "sentence2": ["y"], "label": [1]}, ("train",), "columns sentence1, sentence2, label"),
        ({"sentence1": ["x"], "sentence2": ["y"], "score": [9]}, ("train",), "de train row 1: the score is 9"),
        ({"sentence1": ["x"], "sentence2": [None], "score": [1]}, ("train",), "de train row 1: sentence 2 is empty"),
        ({"sentence1": ["x"], "sentence2": ["y"], "score": [1]}, ("train",), r"dev: no such split \(there are train\)"),
        ({"sentence1": [], "sentence2": [], "score": []}, ("train", "dev", "test"), "no scored pair in de, en, es"),
    ],
)
def test_hub_refused(
    monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], splits: tuple[str, ...], message: str
) -> None:
    config = hub(monkeypatch, lambda language, split: Rows(columns), *splits)
    with pytest.raises(UserError, match=message):
        data.load(config)


def test_hub_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"add the extra \[hub\]"):
        data.load(replace(OWN, dataset="hub:some/set"))


def test_synthetic_world() -> None:
    assert data.load(PRESETS["rotations"]).kind == "vectors"
