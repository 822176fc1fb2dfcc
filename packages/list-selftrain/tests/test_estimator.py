"""LiSTClassifier and the predict command: scikit-learn's protocol, labels and texts of all kinds, files, bad input."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import list_selftrain.estimator
import list_selftrain.plots
import numpy as np
import pandas
import pytest
import torch
from list_selftrain.config import Config, PredictOptions
from list_selftrain.data import Data, Part
from list_selftrain.estimator import GIVEN, PAIR_TEMPLATE, TEMPLATE, LiSTClassifier, predict
from list_selftrain.model import PromptClassifier
from list_selftrain.train import load, score, train, train_on
from metazoo.errors import UserError
from metazoo.loop import Stopped
from metazoo.options import RunOptions
from sklearn.base import clone, is_classifier
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, StandardScaler

torch.set_num_threads(1)

FEATURES: dict[str, Any] = {
    "sessions": 1, "session_steps": 10, "teacher_epochs": 10, "finetune_epochs": 10, "random_state": 0, "warmup": 0.0,
    "dropout": 0.0, "teacher_lr": 2e-2, "lr": 2e-2,
}  # fmt: skip
TINY: dict[str, Any] = {
    "words": ("bad", "good"), "sessions": 1, "session_steps": 4, "teacher_epochs": 2, "finetune_epochs": 1,
    "pretrain_steps": 0, "random_state": 0,
}  # fmt: skip


def texts(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Reviews that one word decides, and their labels."""
    rng = np.random.default_rng(seed)
    things, links = ("film", "plot", "cast", "story"), ("is", "was", "seemed")
    labels = [("neg", "pos")[i % 2] for i in range(count)]
    return [
        f"the {rng.choice(things)} {rng.choice(links)} {('bad', 'good')[label == 'pos']} and {rng.choice(things)}"
        for label in labels
    ], labels


X, Y = texts(12)
MORE, TRUTH = texts(40, seed=1)


def table(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    labels = np.arange(count) % 2
    return np.random.default_rng(seed).normal(size=(count, 5)) + 2 * labels[:, None], labels


@pytest.fixture(scope="module", autouse=True)
def no_plots() -> Iterator[None]:
    """Drawing would be the larger part of these fits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(list_selftrain.plots, "training", lambda run, path: None)
        yield


@pytest.fixture(scope="module")
def on_table() -> LiSTClassifier:
    return LiSTClassifier("features", **FEATURES).fit(*table(12), table(60, 1)[0])


@pytest.fixture(scope="module")
def on_texts() -> LiSTClassifier:
    return LiSTClassifier("features", **FEATURES).fit(X, Y, MORE)


@pytest.fixture(scope="module")
def on_words() -> LiSTClassifier:
    return LiSTClassifier(**TINY).fit(X, Y, MORE)


# ---- what fit gives


@pytest.mark.parametrize("name", ["on_table", "on_texts", "on_words"])
def test_attributes_and_predictions(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    rows, count = (table(9, 2)[0], 60) if name == "on_table" else (MORE[:9], 40)
    proba = model.predict_proba(rows)
    assert proba.shape == (9, 2)
    assert np.allclose(proba.sum(1), 1)
    assert np.array_equal(model.predict(rows), model.classes_[proba.argmax(1)])
    assert model.classes_.tolist() == ([0, 1] if name == "on_table" else ["neg", "pos"])
    assert len(model.sessions_) == 2
    assert not model.model_.training
    weights, labels = model.pseudo_label_weights_, model.pseudo_labels_
    assert weights.shape == labels.shape == (count,)
    assert (weights[~np.isnan(weights)] >= 0).all()
    missing = labels == -1 if name == "on_table" else np.array([label is None for label in labels])
    assert set(labels[~missing].tolist()) <= set(model.classes_.tolist())
    assert np.isnan(weights[missing]).all()
    assert hasattr(model, "n_features_in_") == (name == "on_table")
    assert model.predict([]).shape == (0,)
    assert model.predict_proba([]).shape == (0, 2)


def test_it_learns(on_table: LiSTClassifier, on_texts: LiSTClassifier) -> None:
    assert on_table.score(*table(200, 3)) > 0.8
    assert on_texts.score(MORE, TRUTH) > 0.9
    assert (on_texts.pseudo_labels_ == np.array(TRUTH)).mean() > 0.8
    assert on_table.n_features_in_ == 5


def test_predictions_do_not_depend_on_neighbours(on_words: LiSTClassifier) -> None:
    together = on_words.predict_proba(MORE)
    alone = np.concatenate([on_words.predict_proba([text]) for text in MORE[:5]])
    assert np.allclose(alone, together[:5], atol=1e-5)


def test_the_same_seed_gives_the_same(on_words: LiSTClassifier) -> None:
    again = clone(on_words).fit(X, Y, MORE)
    assert np.array_equal(again.predict_proba(MORE), on_words.predict_proba(MORE))
    assert np.array_equal(again.pseudo_label_weights_, on_words.pseudo_label_weights_, equal_nan=True)
    model = LiSTClassifier("features", **{**FEATURES, "random_state": np.random.RandomState(0)})
    first, second = (model.fit(*table(12), table(60, 1)[0]).predict_proba(table(9)[0]) for _ in range(2))
    assert not np.array_equal(first, second)


def test_random_states_are_put_back() -> None:
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    wanted = random.random(), np.random.random(), torch.rand(1)  # noqa: NPY002
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    LiSTClassifier("features", **FEATURES).fit(*table(12), table(20)[0])
    assert (random.random(), np.random.random(), torch.rand(1)) == wanted  # noqa: NPY002


def test_quiet_unless_verbose(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    for verbose in (False, True):
        LiSTClassifier("features", **FEATURES, verbose=verbose).fit(*table(12), table(20)[0])
        shown = capsys.readouterr()
        assert ("list-selftrain" in shown.err) is verbose
        assert shown.out == ""


# ---- labels


@pytest.mark.parametrize(
    ("y", "classes", "missing"),
    [
        ([1, 0, 1, 0, -1, -1], [0, 1], -1),
        (np.array([7, 3, 7, 3, -1, -1], dtype=np.int8), [3, 7], -1),
        ([2.0, 0.0, 2.0, 0.0, -1.0, -1.0], [0.0, 2.0], -1.0),
        ([1, 0, 1, 0, None, None], [0, 1], -1),
        (["b", "a", "b", "a", None, None], ["a", "b"], None),
        (np.array(["b", "a", "b", "a", None, None], dtype=object), ["a", "b"], None),
        (pandas.Series(["b", "a", "b", "a", None, None]), ["a", "b"], None),
        (pandas.Series(["b", "a", "b", "a", None, pandas.NA], dtype=object), ["a", "b"], None),
        ([True, False, True, False, None, None], [False, True], None),
        (["-1", "1", "-1", "1", None, None], ["-1", "1"], None),
    ],
)
def test_labels_of_all_kinds(y: Any, classes: list[Any], missing: Any) -> None:
    """Rows that have no label are unlabelled, and come before X_unlabeled; without a draw there is no pseudo-label."""
    rows = table(6)[0]
    options = {**FEATURES, "session_steps": 1}
    model = LiSTClassifier("features", **options).fit(rows, y, table(40, 1)[0])
    assert model.classes_.tolist() == classes
    assert model.pseudo_labels_.shape == (42,)
    drawn = ~np.isnan(model.pseudo_label_weights_)
    assert 0 < drawn.sum() <= 16
    assert [label for label, is_drawn in zip(model.pseudo_labels_, drawn, strict=True) if not is_drawn] == [
        missing
    ] * int((~drawn).sum())
    assert set(model.predict(rows).tolist()) <= set(classes)


def test_unlabelled_rows_are_those_of_x_unlabeled() -> None:
    rows, y = table(12)
    more = table(30, 1)[0]
    apart = LiSTClassifier("features", **FEATURES).fit(rows, y, more)
    order = np.argsort(np.arange(42) % 4 == 1, kind="stable")  # labelled and unlabelled rows between each other
    together = np.concatenate([rows, more])[order], np.concatenate([y, np.full(30, -1)])[order]
    known = together[1] != -1
    model = LiSTClassifier("features", **FEATURES).fit(*together)
    assert np.array_equal(together[0][known][np.argsort(order[known])], rows)
    again = LiSTClassifier("features", **FEATURES).fit(together[0][known], together[1][known], together[0][~known])
    assert np.array_equal(model.predict_proba(more), again.predict_proba(more))
    assert model.pseudo_label_weights_.shape == apart.pseudo_label_weights_.shape == (30,)


def test_pseudo_labels_and_weights_are_in_the_order_of_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def spy(config: Config, give: Any, options: RunOptions) -> Any:
        seen["data"], seen["config"] = give(config), config
        run = train_on(config, give, options)
        run.targets[:] = np.eye(2)[np.arange(32) % 2]
        run.targets[5] = 0
        run.weights[:] = np.arange(32)
        return run

    monkeypatch.setattr(list_selftrain.estimator, "train_on", spy)
    rows, y = table(12)
    more = table(30, 1)[0]
    model = LiSTClassifier("features", **FEATURES).fit(rows, np.where(np.arange(12) < 2, -1, y), more)
    data: Data = seen["data"]
    assert data.unlabelled.vectors is not None
    assert np.array_equal(data.unlabelled.vectors, np.concatenate([rows[:2], more]).astype(np.float32))
    assert data.labelled.labels is not None
    assert data.labelled.labels.tolist() == y[2:].tolist()
    assert data.test is data.unlabelled.labels is None
    assert seen["config"].dataset == data.name == GIVEN
    assert model.pseudo_labels_.tolist() == [-1 if i == 5 else i % 2 for i in range(32)]
    assert model.pseudo_label_weights_.tolist() == list(range(32))


def test_without_sessions_no_unlabelled_text_is_needed() -> None:
    options = {**FEATURES, "sessions": 0}
    for given in ((table(12)[0], table(12)[1]), (X, Y)):
        model = LiSTClassifier("features", **options).fit(*given)
        assert len(model.sessions_) == 1
        assert model.pseudo_labels_.shape == model.pseudo_label_weights_.shape == (0,)
        model.predict(given[0])
    more = LiSTClassifier("features", **options).fit(X, Y, MORE)
    assert np.isnan(more.pseudo_label_weights_).all()
    assert more.pseudo_labels_.tolist() == [None] * 40


# ---- texts


def test_every_kind_of_texts_gives_the_same(on_texts: LiSTClassifier) -> None:
    wanted = on_texts.predict_proba(MORE)
    for rows in (
        np.array(MORE),
        pandas.Series(MORE),
        tuple(MORE),
        pandas.DataFrame({"text": MORE}),
        [(t,) for t in MORE],
    ):
        assert np.array_equal(on_texts.predict_proba(rows), wanted)
    again = clone(on_texts).fit(pandas.Series(X), pandas.Series(Y), np.array(MORE, dtype=object))
    assert np.array_equal(again.predict_proba(MORE), wanted)


def test_pairs() -> None:
    pairs, more = list(zip(X, reversed(X), strict=True)), list(zip(MORE, reversed(MORE), strict=True))
    model = LiSTClassifier(**{**TINY, "words": {"pos": "good", "neg": "bad"}}).fit(pairs, Y, more)
    wanted = model.predict_proba(pairs)
    for rows in (np.array(pairs), pandas.DataFrame(pairs, columns=["one", "two"]), [list(pair) for pair in pairs]):
        assert np.array_equal(model.predict_proba(rows), wanted)
    with pytest.raises(UserError, match=r"X has one text a row, but fit was given 2 texts"):
        model.predict(X)


def test_a_table_as_a_frame() -> None:
    rows, y = table(12)
    frame = pandas.DataFrame(rows, columns=list("abcde"))
    model = LiSTClassifier("features", **FEATURES).fit(frame, y, pandas.DataFrame(table(30)[0], columns=list("abcde")))
    assert model.feature_names_in_.tolist() == list("abcde")
    model.predict(frame)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame.rename(columns={"a": "z"}))
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[list("abcd")])
    with pytest.raises(UserError, match=r"X has one text a row, but fit was given a table of numbers"):
        model.predict(X)
    model.fit(X, Y, MORE)
    assert not hasattr(model, "n_features_in_")
    assert not hasattr(model, "feature_names_in_")
    with pytest.raises(UserError, match="X of fit was texts"):
        model.predict(rows)


def test_config_of_the_parameters() -> None:
    classes = np.array(["neg", "pos"])
    config = LiSTClassifier(words={"pos": "great", "neg": "terrible"}, random_state=7)._config(classes, 1)
    assert (config.words, config.template, config.seed) == (("terrible", "great"), TEMPLATE, 7)
    assert (config.model, config.adapter_dim, config.pretrain_steps, config.sessions) == ("tiny", 8, 1000, 3)
    assert LiSTClassifier(words=["a", "b"])._config(classes, 2).template == PAIR_TEMPLATE
    assert LiSTClassifier(words=["a", "b"], template="*cls**mask*")._config(classes, 1).template == "*cls**mask*"
    assert LiSTClassifier("some/roberta", words=["a", "b"])._config(classes, 1).pretrain_steps == 0
    classic = LiSTClassifier(classifier="classic")._config(classes, 1)
    assert (classic.template, classic.words, classic.classifier) == (None, (), "classic")
    assert LiSTClassifier("features", words=["a", "b"])._config(classes, 0).words == ()
    assert LiSTClassifier(words=["a", "b"], tune="simple")._config(classes, 1).tune == "simple"
    numpy = LiSTClassifier("features", lr=np.float32(0.5), sessions=np.int64(2))._config(classes, 0)
    assert (type(numpy.lr), type(numpy.sessions), numpy.lr, numpy.sessions) == (float, int, 0.5, 2)


def test_classic_head() -> None:
    options = {name: value for name, value in TINY.items() if name != "words"}
    model = LiSTClassifier(classifier="classic", **options).fit(X, Y, MORE)
    assert model.predict(MORE).shape == (40,)


# ---- scikit-learn


def test_protocol() -> None:
    model = LiSTClassifier("features", lr=0.5, words={"a": "b"})
    assert is_classifier(model)
    assert clone(model).get_params() == model.get_params()
    assert model.set_params(lr=0.25).lr == 0.25
    assert set(LiSTClassifier().get_params()) == {
        "model", "template", "words", "classifier", "tune", "adapter_dim", "sessions", "session_steps",
        "teacher_epochs", "finetune_epochs", "weights", "warmup", "soft_labels", "teacher_lr", "lr", "dropout",
        "pretrain_steps", "random_state", "output_dir", "verbose",
    }  # fmt: skip
    assert LiSTClassifier().__sklearn_tags__().input_tags.string
    assert not LiSTClassifier().__sklearn_tags__().input_tags.two_d_array
    assert "lr=0.25" in repr(model)
    for call in (model.predict, model.predict_proba, model.save_pretrained):
        with pytest.raises(NotFittedError):
            call(X)


def test_grid_search() -> None:
    model = LiSTClassifier("features", **FEATURES)
    search = GridSearchCV(model, {"lr": np.array([1e-9, 3e-2]), "sessions": [np.int64(1)]}, cv=2, error_score="raise")
    search.fit(X, Y, X_unlabeled=MORE)
    assert set(search.predict(MORE)) <= {"neg", "pos"}
    assert len(search.cv_results_["mean_test_score"]) == 2
    assert not np.isnan(search.cv_results_["mean_test_score"]).any()


def test_pipelines() -> None:
    lower = FunctionTransformer(lambda rows: [row.lower() for row in rows])
    pipeline = make_pipeline(lower, LiSTClassifier("features", **FEATURES))
    pipeline.fit([text.upper() for text in X], Y, listclassifier__X_unlabeled=MORE)
    assert pipeline.score([text.upper() for text in MORE], TRUTH) > 0.9
    rows, y = table(40)
    scaled = make_pipeline(StandardScaler(), LiSTClassifier("features", **FEATURES))
    assert scaled.fit(rows, np.where(np.arange(40) < 12, y, -1)).score(rows, y) > 0.8


# ---- keeping


def test_output_dir(tmp_path: Path) -> None:
    model = LiSTClassifier("features", **FEATURES, output_dir=tmp_path / "run").fit(X, Y, MORE)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"config.json", "metrics.jsonl", "checkpoints", "sessions.json", "pseudo-labels.csv"} <= names
    with pytest.raises(UserError, match="already holds a run"):
        model.fit(X, Y, MORE)
    with pytest.raises(UserError, match="data that are not kept"):
        predict(PredictOptions(run=tmp_path / "run", texts=("a",)))
    assert model.predict(MORE[:1]).shape == (1,)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(list_selftrain.estimator.tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    LiSTClassifier("features", **FEATURES).fit(*table(12), table(20)[0])
    assert list(tmp_path.iterdir()) == []


def test_save_pretrained(on_words: LiSTClassifier, on_table: LiSTClassifier, tmp_path: Path) -> None:
    on_words.save_pretrained(tmp_path / "model")
    again = PromptClassifier.from_pretrained(str(tmp_path / "model"))
    part = Part(tuple((text,) for text in MORE))
    logits = score(again, again.encode(part), range(40))
    assert np.allclose(logits.softmax(-1).cpu().numpy(), on_words.predict_proba(MORE), atol=1e-5)
    if not hasattr(on_table.model_, "save_pretrained"):
        with pytest.raises(UserError, match="output_dir"):
            on_table.save_pretrained(tmp_path / "table")


# ---- bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, None), "requires y to be passed"),
        ((X, Y[:-1], MORE), "X has 12 rows and y has 11"),
        ((X, ["a"] * 12, MORE), "one class only, 'a'"),
        ((X, [1, -1] * 6, MORE), r"one class only, 1 \(−1 and None mark"),
        ((X, [-1] * 12, MORE), "all rows as unlabelled"),
        ((X, [None] * 12, MORE), "all rows as unlabelled"),
        ((X, [0.5, 1.5] * 6, MORE), "Unknown label type"),
        ((X, [0, float("nan"), *[0, 1] * 5], MORE), r"y\[1\] is NaN: give a class, or −1"),
        ((X, np.array([0, "a"] * 6, dtype=object), MORE), "mixes strings"),
        ((X, [Y, Y], MORE), r"y has the shape \(2, 12\)"),
        ((X, Y), r"sessions=1 learn from unlabelled rows.*give X_unlabeled, or sessions=0"),
        ((X, Y, []), "give X_unlabeled, or sessions=0"),
        (([], [], MORE), "X is empty"),
        (("a text", Y, MORE), "X is str: give a list of texts"),
        ((None, Y, MORE), "X is NoneType"),
        (([*X[:-1], None], Y, MORE), r"X\[11\] is missing \(None\)"),
        (([*X[:-1], float("nan")], Y, MORE), r"X\[11\] is missing \(nan\)"),
        (([*X[:-1], " "], Y, MORE), r"X\[11\] is empty"),
        (([*X[:-1], 3], Y, MORE), r"X\[11\] is int: give a text"),
        (([*X[:-1], ("a", "b")], Y, MORE), r"X\[11\] is 2 texts and X\[0\] 1"),
        (([*X[:-1], ("a", "b", "c")], Y, MORE), r"X\[11\] has 3 values"),
        ((X, Y, [*MORE, ""]), r"X_unlabeled\[40\] is empty"),
        ((X, Y, [(text, text) for text in MORE]), "X_unlabeled has two texts a row and X one text"),
        ((X, Y, table(20)[0]), "X_unlabeled is a table of numbers, but X of fit was texts"),
        ((table(12)[0], Y, MORE), "X_unlabeled has one text a row and X 5 numbers"),
        ((table(12)[0], Y, table(20)[0][:, :3]), "3 features"),
        ((np.full((12, 5), np.nan), Y, table(20)[0]), "NaN"),
    ],
)
def test_bad_data(arguments: tuple[Any, ...], message: str) -> None:
    model = LiSTClassifier("features", **FEATURES)
    with pytest.raises(ValueError, match=message):
        model.fit(*arguments)
    assert not hasattr(model, "model_")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({}, r"words is None: .* give a word for each of the classes 'neg', 'pos', such as words=\{'neg': 'terrible'"),
        ({"words": []}, "give a word for each"),
        ({"words": "good"}, "words is 'good'"),
        ({"words": ["good"]}, "1 words for the 2 classes"),
        ({"words": {"pos": "good"}}, "give a word for each of y's"),
        ({"words": {"pos": "good", "neg": "bad", "other": "so"}}, "give a word for each of y's"),
        ({"words": ["good", ""]}, "words has ''"),
        ({"words": ["good", "good"]}, "two classes have the same word"),
        ({"words": ["bad", "good"], "template": "*cls**sent_0*"}, "mask"),
        ({"words": ["bad", "good"], "lr": 0}, "lr is 0"),
        ({"words": ["bad", "good"], "weights": "some"}, "weights is 'some': give meta, uniform"),
        ({"classifier": "some"}, "classifier is 'some': give prompt, classic"),
        ({"classifier": "classic", "random_state": -1}, "seed is -1"),
    ],
)
def test_bad_parameters(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiSTClassifier(**{"pretrain_steps": 0, **parameters}).fit(X, Y, MORE)


def test_a_table_needs_features() -> None:
    with pytest.raises(UserError, match='give texts, or model="features"'):
        LiSTClassifier(words=("bad", "good")).fit(*table(12))


def test_a_fit_that_fails_changes_nothing() -> None:
    model = LiSTClassifier("features", **FEATURES).fit(X, Y, MORE)
    wanted = model.predict_proba(MORE)
    for arguments in ((X, Y), (X, ["a"] * 12, MORE), ([*X[:-1], ""], Y, MORE)):
        with pytest.raises(UserError):
            model.fit(*arguments)
    assert np.array_equal(model.predict_proba(MORE), wanted)


@pytest.mark.parametrize(("code", "raised"), [(130, KeyboardInterrupt), (143, Stopped)])
def test_interrupted(code: int, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*arguments: Any) -> None:
        raise Stopped(code)

    monkeypatch.setattr(list_selftrain.estimator, "train_on", stop)
    with pytest.raises(raised):
        LiSTClassifier("features", **FEATURES).fit(X, Y, MORE)


# ---- the predict command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the generated reviews."""
    path = tmp_path_factory.mktemp("predict") / "run"
    config = Config(
        model="features", sessions=1, session_steps=3, teacher_epochs=20, finetune_epochs=1, max_unlabelled=200,
        max_test=20, svd=20,
    )  # fmt: skip
    train(config, RunOptions(output_dir=path))
    return path


def test_predict(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    shown = predict(PredictOptions(run=folder, texts=("the film was\twonderful", "awful " * 30))).splitlines()
    assert len(shown) == 2
    proba = load(folder).predict_proba(Part((("the film was\twonderful",), ("awful " * 29 + "awful",))))
    for line, row in zip(shown, proba, strict=True):
        assert line.split()[:2] == [("negative", "positive")[row.argmax()], f"{row.max():.1%}"]
        assert len(line) <= 40
    assert "the film was" in shown[0]
    assert shown[1].endswith("…")
    (tmp_path / "in.txt").write_text("the film was wonderful\n\nan awful plot\n", encoding="utf-8")
    found = tmp_path / "out.csv"
    shown = predict(PredictOptions(run=folder, file=tmp_path / "in.txt", output=found, batch_size=1)).splitlines()
    with found.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["the film was wonderful", "an awful plot"]
    assert list(rows[0]) == ["text", "label", "probability_negative", "probability_positive"]
    assert [line.split()[0] for line in shown] == [row["label"] for row in rows]
    for row in rows:
        both = {name: float(row[f"probability_{name}"]) for name in ("negative", "positive")}
        assert sum(both.values()) == pytest.approx(1, abs=1e-5)
        assert max(both, key=lambda name: both[name]) == row["label"]


def test_predict_refuses(folder: Path, tmp_path: Path) -> None:
    def options(**values: Any) -> PredictOptions:
        return PredictOptions(**{"run": folder, **values})

    (tmp_path / "pairs.csv").write_text("sentence1,sentence2\na,b\n", encoding="utf-8")
    (tmp_path / "held.csv").write_text("kept", encoding="utf-8")
    for given, message in (
        (options(texts=("a", " ")), "--texts 2 is empty"),
        (options(texts=("a",), output=tmp_path / "held.csv"), "exists: choose another --output"),
        (options(file=tmp_path / "none.txt"), "none.txt"),
        (options(file=tmp_path / "pairs.csv"), "classifies single texts: give one text in each line"),
        (options(texts=("a",), run=tmp_path), "not a run folder"),
    ):
        with pytest.raises(UserError, match=message):
            predict(given)
    assert (tmp_path / "held.csv").read_text(encoding="utf-8") == "kept"


def test_predict_refuses_vectors(tmp_path: Path) -> None:
    config = Config(
        dataset="gaussian", model="features", sessions=0, teacher_epochs=1, dimension=3, max_unlabelled=20, max_test=5
    )
    train(config, RunOptions(output_dir=tmp_path / "run"))
    with pytest.raises(UserError, match="classifies vectors: it takes no texts"):
        predict(PredictOptions(run=tmp_path / "run", texts=("a",)))
