"""FlippedClassifier and the predict command: scores, scikit-learn's protocol, run folders, files, bad input."""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import flipped_learning.classifier
import flipped_learning.train
import numpy as np
import pandas
import pytest
import torch
from flipped_learning import flipping
from flipped_learning.classifier import FlippedClassifier, predict
from flipped_learning.config import Config, PredictOptions
from flipped_learning.minimodel import BagOfWords
from flipped_learning.model import quiet, tiny_t5, train_tokenizer
from flipped_learning.templates import Template
from metazoo import runfolder
from metazoo.errors import UserError
from sklearn.base import clone
from sklearn.metrics import get_scorer

torch.set_num_threads(1)

WORDS = "a the film plot is was good bad dull great fine cast story of What sentiment expressed in this text Title by"
CORPUS = [
    WORDS,
    "Premise Does it follow yes no input: output: negative positive neutral ?",
    "abcdefghijklmnopqrstuvwxyz",
]
CONFIG = Config(width=16, layers=1, heads=2, feedforward=16, vocabulary=150, dropout=0.0)
TEXTS = ["the film is great", "a dull plot", "the cast was fine and the story of the film was good", "bad", "it is"]
TEMPLATE = "{{text}} What is the sentiment expressed in this text?"
Pair = tuple[torch.nn.Module, Any]


@pytest.fixture(scope="module")
def pair() -> Pair:
    """A T5 with random weights, large enough that labels differ in more than rounding."""
    tokenizer = train_tokenizer(CORPUS, CONFIG.vocabulary)
    torch.manual_seed(0)
    model = tiny_t5(CONFIG, tokenizer)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def folder(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder, as far as it is read."""
    return save_run(pair, tmp_path_factory.mktemp("run"), CONFIG)


def save_run(pair: Pair, path: Path, config: Config) -> Path:
    runfolder.write_json(path / "config.json", runfolder.config_to_dict(config))
    with quiet():
        pair[0].save_pretrained(path / "model")
        pair[1].save_pretrained(path / "model")
    return path


def test_scores_are_those_of_the_rules(pair: Pair) -> None:
    """predict is the argmax of the log-likelihoods, the probabilities are their softmax; all as flipping.score."""
    for method in ("flipped", "direct", "channel"):
        classifier = FlippedClassifier(pair, ("bad", "good", "fine"), method=method).fit()
        scores = classifier.predict_log_likelihood(TEXTS)
        assert scores.shape == (5, 3)
        assert np.array_equal(classifier.predict(TEXTS), np.array(["bad", "good", "fine"])[scores.argmax(1)])
        proba = classifier.predict_proba(TEXTS)
        assert np.allclose(proba, np.exp(scores) / np.exp(scores).sum(1, keepdims=True))
        template = Template("", TEMPLATE, None)
        instances = [template.apply({"text": text}, ("bad", "good", "fine")) for text in TEXTS]
        wanted = flipping.score(pair[0], flipping.FlippedCollator(pair[1], method), instances)
        assert np.array_equal(scores, np.stack(wanted))
    assert classifier.predict([]).shape == (0,)
    assert classifier.predict_proba([]).shape == (0, 3)


def test_normalise_divides_by_the_length_of_the_target(pair: Pair) -> None:
    whole = FlippedClassifier(pair, method="direct").predict_log_likelihood(TEXTS)
    mean = FlippedClassifier(pair, method="direct", normalise=True).predict_log_likelihood(TEXTS)
    lengths = [len(pair[1](label)["input_ids"]) for label in ("negative", "positive")]
    assert np.allclose(whole, mean * lengths)


def test_permuting_labels_permutes_columns_exactly(pair: Pair) -> None:
    labels, order = ("bad", "good", "fine", "dull"), [2, 0, 3, 1]
    scores = FlippedClassifier(pair, labels).predict_log_likelihood(TEXTS)
    permuted = FlippedClassifier(pair, [labels[i] for i in order]).predict_log_likelihood(TEXTS)
    assert np.array_equal(permuted, scores[:, order])


def test_batches_and_padding_change_nothing(pair: Pair) -> None:
    together = FlippedClassifier(pair).predict_log_likelihood(TEXTS)
    for batch_size in (1, 3):
        assert np.allclose(
            FlippedClassifier(pair, batch_size=batch_size).predict_log_likelihood(TEXTS), together, atol=1e-4
        )
    alone = [FlippedClassifier(pair).predict_log_likelihood([text])[0] for text in TEXTS]
    assert np.allclose(alone, together, atol=1e-4)


def test_ties_take_the_first_label(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    classifier = FlippedClassifier(pair).fit()
    monkeypatch.setattr(flipping, "score", lambda *args, **kwargs: [np.array([-1.0, -1.0]), np.array([-2.0, -1.0])])
    assert classifier.predict(TEXTS[:2]).tolist() == ["negative", "positive"]
    assert classifier.n_ties_ == 1


def test_every_kind_of_table_gives_the_same(pair: Pair) -> None:
    template = "Premise {{premise}} Does {{hypothesis}} follow ?"
    rows = [{"premise": text, "hypothesis": "it is", "id": 3} for text in TEXTS]
    classifier = FlippedClassifier(pair, ("yes", "no"), template)
    wanted = classifier.predict_log_likelihood(rows)
    assert np.array_equal(classifier.predict_log_likelihood(pandas.DataFrame(rows)), wanted)
    import datasets

    assert np.array_equal(classifier.predict_log_likelihood(datasets.Dataset.from_list(rows)), wanted)
    classifier = FlippedClassifier(pair)
    wanted = classifier.predict_log_likelihood(TEXTS)
    for texts in (np.array(TEXTS), pandas.Series(TEXTS), tuple(TEXTS), [{"text": text, "label": 7} for text in TEXTS]):
        assert np.array_equal(classifier.predict_log_likelihood(texts), wanted)
    with_target = clone(classifier).set_params(template=f"{TEMPLATE} ||| {{{{answer_choices[label]}}}}")
    assert np.array_equal(with_target.predict_log_likelihood(TEXTS), wanted)


def test_scikit_learn(pair: Pair, folder: Path) -> None:
    classifier = FlippedClassifier(str(folder), ("bad", "good"), batch_size=3)
    assert classifier.get_params() == {
        "model": str(folder), "labels": ("bad", "good"), "template": TEMPLATE, "method": None, "batch_size": 3,
        "normalise": False,
    }  # fmt: skip
    copied = clone(classifier)
    assert copied is not classifier
    assert copied.get_params() == classifier.get_params()
    assert copied.fit() is copied
    assert list(copied.classes_) == ["bad", "good"]
    found = copied.predict(TEXTS)
    assert 0 <= get_scorer("accuracy")(copied, TEXTS, ["good", "bad", "good", "bad", "bad"]) <= 1
    assert copied.score(TEXTS, found) == 1
    again = pickle.loads(pickle.dumps(copied))
    assert np.array_equal(again.predict(TEXTS), found)
    scores = copied.predict_log_likelihood(TEXTS)
    changed = copied.set_params(labels=("good", "bad")).predict_log_likelihood(TEXTS)  # without a fit
    assert np.array_equal(changed, scores[:, ::-1])
    assert list(copied.classes_) == ["good", "bad"]
    direct = copied.set_params(method="direct").predict_log_likelihood(TEXTS)
    assert copied.method_ == "direct"
    assert not np.allclose(direct, changed)
    assert not hasattr(clone(FlippedClassifier(pair)), "model_")


def test_run_folder_hub_form_and_pair_agree(pair: Pair, folder: Path) -> None:
    wanted = FlippedClassifier(pair).predict_log_likelihood(TEXTS)
    for model in (folder, str(folder), folder / "model"):
        loaded = FlippedClassifier.from_pretrained(model)
        assert not loaded.model_.training
        assert loaded.method_ == "flipped"
        assert np.array_equal(loaded.predict_log_likelihood(TEXTS), wanted)


def test_run_is_scored_as_it_was_trained(pair: Pair, tmp_path: Path) -> None:
    run = save_run(pair, tmp_path / "direct", replace(CONFIG, method="direct"))
    loaded = FlippedClassifier.from_pretrained(run)
    assert loaded.method_ == "direct"
    assert np.array_equal(
        loaded.predict_log_likelihood(TEXTS), FlippedClassifier(pair, method="direct").predict_log_likelihood(TEXTS)
    )
    run = save_run(pair, tmp_path / "plain", replace(CONFIG, sentinels=False, max_source=40, max_target=9))
    loaded = FlippedClassifier.from_pretrained(run)
    assert loaded._collator is not None
    assert (loaded._collator.sentinels, loaded._collator.max_source, loaded._collator.max_target) == (False, 40, 9)


def test_shortened_texts_are_told(pair: Pair, tmp_path: Path) -> None:
    run = save_run(pair, tmp_path / "run", replace(CONFIG, max_source=40, max_target=4))
    classifier = FlippedClassifier.from_pretrained(run)
    with pytest.warns(UserWarning, match="lost the") as warned:
        classifier.predict(["the film is good " * 30, "bad"])
    assert [str(one.message) for one in warned] == [
        "2 of 4 sources (a text with a label) were longer than 40 tokens and lost the end of their text",
        "4 of 4 targets were longer than 4 tokens and lost their end",
    ]


def test_bag_of_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run of the bag of words is what train.load makes of its checkpoint and data."""
    bag = BagOfWords({word: i for i, word in enumerate(WORDS.lower().split(), 1)}, 8, "flipped", tied=False)
    monkeypatch.setattr(flipped_learning.train, "load", lambda path: SimpleNamespace(model=bag))
    runfolder.write_json(tmp_path / "config.json", runfolder.config_to_dict(replace(CONFIG, model="bag", pairs=1)))
    classifier = FlippedClassifier(tmp_path, ("dull", "great"), batch_size=2)
    scores = classifier.predict_log_likelihood(TEXTS)
    assert np.allclose(scores, bag.score(TEXTS, ("dull", "great")).numpy())
    assert list(classifier.predict(TEXTS)) == [("dull", "great")[k] for k in scores.argmax(1)]
    with pytest.raises(UserError, match="the labels 'qqq' and 'zzz' for the same"):
        FlippedClassifier(tmp_path, ("qqq", "zzz")).predict(TEXTS)
    with pytest.raises(UserError, match="trained as flipped: it cannot score as direct"):
        FlippedClassifier(tmp_path, method="direct").fit()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": ("good",)}, "two or more texts"),
        ({"labels": "good"}, "two or more texts"),
        ({"labels": ("good", " ")}, "two or more texts"),
        ({"labels": ("good", 3)}, "two or more texts"),
        ({"labels": ("good", "bad", "good ")}, "'good' stands twice"),
        ({"labels": ("good  film", "good film")}, "is the same tokens as another"),
        ({"template": "What is the sentiment ?"}, "has no field: write {{text}}"),
        ({"template": "{{text}}"}, "add an instruction"),
        ({"template": "{{text} Good ?"}, "is no Jinja"),
        ({"template": "{{text}} {{text|random}}"}, "draws at random"),
        ({"template": None}, "template is None: give a text such as"),
        ({"template": "{{text}} {{title}} ?"}, r"X\[0\] is a text, but the template has the fields text, title"),
        ({"method": "other"}, "give flipped, direct or channel"),
        ({"batch_size": 0}, "give 1 or more"),
    ],
)
def test_bad_arguments(pair: Pair, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        FlippedClassifier(pair).set_params(**arguments).predict(TEXTS)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ("one text", "X is str: give a list"),
        (None, "X is NoneType: give a list"),
        ({"text": ["a", "b"]}, "X is dict: give a list"),
        (np.array([["a"]]), r"X has the shape \(1, 1\)"),
        (["good", 3], r"X\[1\] is int"),
        (["good", " \t"], r"X\[1\]: text is empty"),
        ([{"text": "good"}, {"title": "good"}], r"X\[1\] has no text, only title"),
        ([{"text": "good"}, {"text": None}], r"X\[1\]: text is missing"),
        (pandas.DataFrame({"text": [0.5, float("nan")]}), r"X\[1\]: text is missing"),
        (["good", "\ue000"], r"X\[1\]: template 'given': a text of the example is empty"),
    ],
)
def test_bad_texts(pair: Pair, X: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as raised:
        FlippedClassifier(pair).predict(X)
    assert "\n" not in str(raised.value)


def test_bad_models(pair: Pair, tmp_path: Path) -> None:
    def refused(model: Any, message: str, **kwargs: Any) -> None:
        with pytest.raises(UserError, match=message) as raised:
            FlippedClassifier(model, **kwargs).predict(TEXTS)
        assert "\n" not in str(raised.value)

    refused("runs/no-such-run", "runs/no-such-run is no folder")
    refused(tmp_path / "nothing", "nothing is no folder")
    refused("tiny", "has to be trained first")
    refused("bag", "has to be trained first")
    refused((pair[1], pair[0]), "not of a seq2seq model and its tokenizer")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "has no config.json")
    runfolder.write_json(tmp_path / "begun" / "config.json", runfolder.config_to_dict(CONFIG))
    refused(tmp_path / "begun", "not finished .* finish it with --resume")
    runfolder.write_json(tmp_path / "other" / "config.json", {"model_type": "t5"})
    refused(tmp_path / "other", "other has no tokenizer")
    runfolder.write_json(tmp_path / "foreign" / "config.json", {"color": "blue"})
    refused(tmp_path / "foreign", "does not know")
    run = save_run(pair, tmp_path / "run", CONFIG)
    (run / "model" / "model.safetensors").write_bytes(b"broken")
    refused(run, "cannot load")
    (run / "model" / "model.safetensors").unlink()
    torch.save(pair[0].state_dict(), run / "model" / "pytorch_model.bin")
    refused(run, "cannot load .* safetensors")


# ---- the predict command


def test_predict_prints_a_line_for_each_text(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    texts = ("good", "the film\n\x1b[31m " + "is great " * 9)
    lines = predict(PredictOptions(run=str(folder), texts=texts, labels=("bad", "excellent"))).split("\n")
    classifier = FlippedClassifier(folder, ("bad", "excellent"))
    for line, label, proba in zip(lines, classifier.predict(texts), classifier.predict_proba(texts), strict=True):
        assert len(line) <= 30
        assert line.split()[0] == label
        assert line.split()[1] == f"{proba.max():.1%}"
        assert line.isprintable()
    assert lines[0].endswith("  good")
    assert lines[1].endswith("…")


def test_predict_says_what_was_shortened(pair: Pair, tmp_path: Path) -> None:
    run = save_run(pair, tmp_path / "run", replace(CONFIG, max_source=40))
    assert predict(PredictOptions(run=str(run), texts=("good film " * 40,))).split("\n")[1] == (
        "note: 2 of 2 sources (a text with a label) were longer than 40 tokens and lost the end of their text"
    )


def test_files_and_texts_agree(folder: Path, tmp_path: Path) -> None:
    """.txt, .csv (with a byte-order mark) and .jsonl give the same; the output has the input's columns first."""
    (tmp_path / "a.txt").write_text("\n".join(TEXTS) + "\n")
    rows = [{"id": i, "text": text, "label": "x"} for i, text in enumerate(TEXTS)]
    with (tmp_path / "a.csv").open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, ["id", "text", "label"])
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({**row, "more": [1]}) + "\n\n" for row in rows))
    wanted = predict(PredictOptions(run=str(folder), texts=tuple(TEXTS)))
    scores = FlippedClassifier(folder).predict_log_likelihood(TEXTS)
    columns = {
        "a.txt": ["text", "label"],
        "a.csv": ["id", "text", "label", "label_predicted"],
        "a.jsonl": ["id", "text", "label", "more", "label_predicted"],
    }
    for name, names in columns.items():
        output = tmp_path / "out" / f"{name}.csv"
        assert predict(PredictOptions(run=str(folder), file=tmp_path / name, output=output)) == wanted
        table = pandas.read_csv(output)
        assert list(table.columns) == [*names, "log_likelihood_negative", "log_likelihood_positive"]
        assert list(table["text"]) == TEXTS
        assert np.array_equal(table.iloc[:, -2:].to_numpy(), scores)
        assert list(table[names[-1]]) == [("negative", "positive")[k] for k in scores.argmax(1)]
    assert list(table["more"]) == ["[1]"] * 5
    with pytest.raises(UserError, match="exists: choose another --output"):
        predict(PredictOptions(run=str(folder), texts=("a",), output=output))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "cannot read .*: No such file"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\n\n", "is empty"),
        ("a.txt", b"good\n\nbad\n", r"a.txt line 2: text is empty"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.xlsx", b"", "cannot read .xlsx"),
        ("a.csv", b"", "is empty"),
        ("a.csv", b"text\n", "is empty"),
        ("a.csv", b"title,body\na,b\n", "has no column text, only title, body"),
        ("a.csv", b"text,text\na,b\n", "stands twice"),
        ("a.csv", b"text,id\ngood,1\n\n ,2\n", "a.csv line 4: text is empty"),
        ("a.csv", b"text\ngood, but long\n", "a.csv line 2 has 2 cells, the header 1"),
        ("a.csv", b'text\n"good\n', "is no CSV"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl line 2 is not JSON"),
        ("a.jsonl", b'"a"\n', "a.jsonl line 1 is no JSON object"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ""}\n', "a.jsonl line 3: text is empty"),
        ("a.jsonl", b'{"text": "a"}\n{"id": 1}\n', "a.jsonl line 2 has no text, only id"),
        ("a.jsonl", b"", "is empty"),
    ],
)
def test_bad_files(folder: Path, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as raised:
        predict(PredictOptions(run=str(folder), file=tmp_path / name))
    assert "\n" not in str(raised.value)


def test_empty_text_on_the_command_line(folder: Path) -> None:
    with pytest.raises(UserError, match="--texts 2: text is empty"):
        predict(PredictOptions(run=str(folder), texts=("good", "")))


def test_example_in_the_docstring() -> None:
    import doctest

    assert doctest.testmod(flipped_learning.classifier).failed == 0
