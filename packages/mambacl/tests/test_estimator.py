"""MambaContinualClassifier: streams, fixed state, files, scikit-learn's protocol, bad input."""

from __future__ import annotations

import copy
import doctest
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mambacl.estimator
import numpy as np
import pytest
import torch
from mambacl.estimator import MambaContinualClassifier
from mambacl.model import ContinualLearner
from metazoo.errors import UserError
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.estimator_checks import check_estimator

torch.set_num_threads(1)


def table(classes: int = 8, each: int = 12, columns: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    means = 3 * rng.normal(size=(classes, columns))
    y = np.repeat(np.arange(classes), each)
    return means[y] + rng.normal(size=(len(y), columns)), np.array([f"c{i}" for i in range(classes)])[y]


@pytest.fixture(scope="module")
def trained() -> MambaContinualClassifier:
    X, y = table(60, 6)
    return MambaContinualClassifier(steps=300, random_state=0).meta_fit(X, y)


def stream(model: MambaContinualClassifier, seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Three new classes, one after the other, two examples each; returns 30 further examples."""
    X, y = table(3, 12, seed=seed)
    for name in ("c0", "c1", "c2"):
        rows = np.flatnonzero(y == name)[:2]
        model.partial_fit(X[rows], y[rows])
    rest = np.concatenate([np.flatnonzero(y == name)[2:] for name in ("c0", "c1", "c2")])
    return X[rest], y[rest]


def test_learns_new_classes_without_a_gradient_step(trained: MambaContinualClassifier) -> None:
    """Meta-trained on other classes, it is well above chance on three new ones; no weight has moved."""
    before = {name: p.clone() for name, p in trained.learner_.named_parameters()}
    scores = []
    for seed in range(1, 6):
        trained._forget()
        X, y = stream(trained, seed)
        scores.append(trained.score(X, y))
    assert np.mean(scores) > 0.6
    assert all(torch.equal(p, before[name]) for name, p in trained.learner_.named_parameters())


def test_one_by_one_is_all_at_once(trained: MambaContinualClassifier) -> None:
    """The same stream in pieces gives the same answers; predicting in between changes nothing."""
    X, y = table(3, 4)
    trained._forget()
    whole = trained.partial_fit(X, y).predict_proba(X)
    codes = dict(trained._codes)
    trained._forget()
    for i in range(len(X)):
        trained.partial_fit(X[i : i + 1], y[i : i + 1])
        trained.predict(X)
    assert trained._codes == codes
    assert np.allclose(trained.predict_proba(X), whole, atol=1e-4)
    assert trained.state_ is not None
    assert trained.state_.tokens == 24


def test_class_by_class_is_all_at_once(trained: MambaContinualClassifier) -> None:
    """A given learner takes columns as they are: what comes first does not change what the rest is."""
    X, y = table(3, 4)
    answers = []
    for size in (4, 12):
        model = MambaContinualClassifier(trained.learner_, random_state=0)
        for start in range(0, 12, size):
            model.partial_fit(X[start : start + size], y[start : start + size])
        assert (model.feature_scale_ == 1).all()
        answers.append((model.state_.tokens if model.state_ else 0, float(model.feature_mean_.sum())))
    assert answers[0] == answers[1] == (24, 0.0)


def test_state_has_one_size(trained: MambaContinualClassifier) -> None:
    trained._forget()
    sizes = []
    for _ in range(3):
        X, y = table(3, 20)
        trained.partial_fit(X, y)
        sizes.append(trained.state_.bytes if trained.state_ else 0)
    assert sizes[0] == sizes[1] == sizes[2] > 0


def test_saves_and_goes_on(trained: MambaContinualClassifier, tmp_path: Path) -> None:
    """save and load between two parts of a stream: the same answers as without."""
    trained._forget()
    X, y = table(3, 6)
    trained.partial_fit(X[:9], y[:9]).save(tmp_path / "kept")
    again = MambaContinualClassifier.load(tmp_path / "kept")
    assert np.allclose(again.predict_proba(X), trained.predict_proba(X), atol=1e-5)
    again.partial_fit(X[9:], y[9:])
    trained.partial_fit(X[9:], y[9:])
    assert list(again.classes_) == list(trained.classes_)
    assert np.allclose(again.predict_proba(X), trained.predict_proba(X), atol=1e-5)
    (tmp_path / "kept" / "state.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="damaged"):
        MambaContinualClassifier.load(tmp_path / "kept")


def test_takes_a_learner(trained: MambaContinualClassifier, tmp_path: Path) -> None:
    """A learner that was meta-trained elsewhere, as an object or as its folder; clones keep it."""
    X, y = table(3, 6)
    trained.learner_.save_pretrained(tmp_path / "learner")
    for learner in (trained.learner_, tmp_path / "learner", str(tmp_path / "learner")):
        model = clone(MambaContinualClassifier(learner, random_state=0)).fit(X, y)
        assert model.predict(X).shape == (18,)
    with pytest.raises(UserError, match="columns"):
        MambaContinualClassifier(trained.learner_).fit(X[:, :4], y)
    with pytest.raises(UserError, match="save_pretrained"):
        MambaContinualClassifier(tmp_path / "none").fit(X, y)
    with pytest.raises(UserError, match="Linear: give a ContinualLearner"):
        MambaContinualClassifier(torch.nn.Linear(5, 6)).fit(X, y)  # type: ignore[arg-type]


def small(**changes: Any) -> MambaContinualClassifier:
    """Of a second's meta-training, which teaches nothing."""
    settings: dict[str, Any] = {"steps": 2, "width": 8, "blocks": 1, "batch_size": 4, "random_state": 0, **changes}
    return MambaContinualClassifier(**settings)


def test_fit_starts_from_scratch() -> None:
    """Another fit is what a new estimator's is, whatever was fitted before and with which columns and parameters."""
    X, y = table(3, 4)
    model = small(vocabulary=4).partial_fit(X, y)
    model.set_params(vocabulary=6, width=16).fit(X[:, :3], y)
    assert (model.n_features_in_, model.learner_.outputs) == (3, 6)
    new = small(width=16).fit(X[:, :3], y)
    assert np.array_equal(model.predict_proba(X[:, :3]), new.predict_proba(X[:, :3]))
    assert np.array_equal(model.fit(X[:, :3], y).predict_proba(X[:, :3]), new.predict_proba(X[:, :3]))


def test_fit_keeps_what_was_meta_trained(tmp_path: Path) -> None:
    """The learner of meta_fit and its scale stay, through save and load too; each fit of a stream gives the same."""
    X, y = table(6, 4)
    model = small(random_state=None).meta_fit(10 * X, y)
    learner, scale = model.learner_, model.feature_scale_
    answers = model.fit(X, y).fit(X, y).predict_proba(X)
    assert model.learner_ is learner
    assert model.feature_scale_ is scale
    assert np.array_equal(answers, model.fit(X, y).predict_proba(X))
    model.save(tmp_path / "kept")
    again = MambaContinualClassifier.load(tmp_path / "kept").fit(X, y)
    assert np.array_equal(answers, again.predict_proba(X))
    for kept in (model, again):
        with pytest.raises(UserError, match="on 5 columns, X has 4: call meta_fit"):
            kept.fit(X[:, :4], y)
        assert np.array_equal(answers, kept.predict_proba(X))
    assert model.meta_fit(X[:, :4], y).fit(X[:, :4], y).n_features_in_ == 4


@pytest.mark.parametrize("meta", [False, True])
def test_random_state_decides_all(meta: bool, tmp_path: Path) -> None:
    """A RandomState gives one seed, of weights and of codes; it is kept in files."""
    X, y = table(6, 4)
    models = []
    for _ in range(2):
        model = small(random_state=np.random.RandomState(3))
        models.append((model.meta_fit(X, y) if meta else model).fit(X, y))
    first, second = models
    assert first.seed_ == second.seed_
    assert first._codes == second._codes
    assert np.array_equal(first.predict_proba(X), second.predict_proba(X))
    first.save(tmp_path / "kept")
    again = MambaContinualClassifier.load(tmp_path / "kept")
    assert (again.seed_, again.fit(X, y)._codes) == (first.seed_, first._codes)
    assert small(random_state=np.int64(7)).fit(X, y).seed_ == 7


def test_failure_changes_nothing(trained: MambaContinualClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a first call: still not fitted, and no meta-training before the classes are counted. Later: as before."""
    X, y = table(8, 3)
    unfitted = MambaContinualClassifier(steps=10**9)
    loud = copy.deepcopy(trained.learner_)
    loud.encoder.net[-1].weight.data *= 1e10  # type: ignore[operator, union-attr]
    fitted = MambaContinualClassifier(loud, random_state=0).fit(X[:6], y[:6])
    codes, classes, state, answers = fitted._codes, fitted.classes_, fitted.state_, fitted.predict_proba(X)
    copied = dict(codes), list(fitted._free)

    def check() -> None:
        assert set(vars(unfitted)) == set(unfitted.get_params())
        with pytest.raises(NotFittedError):
            unfitted.predict(X)
        assert fitted._codes is codes
        assert (codes, fitted._free) == copied
        assert fitted.classes_ is classes
        assert fitted.state_ is state
        assert np.array_equal(fitted.predict_proba(X), answers)

    for model in (unfitted, fitted):
        for read in (model.partial_fit, model.fit):
            with pytest.raises(UserError, match="8 classes, but the learner has 6"):
                read(X, y)
            check()
    for factor, words in ((1e200, "too large for the learner's torch.float32"), (1e30, "became NaN or infinite")):
        with pytest.raises(UserError, match=words):
            fitted.partial_fit(X[:9] * factor, y[:9])
        with pytest.raises(UserError, match=words):
            fitted.predict(X[:9] * factor)
        check()

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinualLearner, "observe", broken)
    unfitted.set_params(learner=trained.learner_)
    for model in (unfitted, fitted):
        with pytest.raises(KeyboardInterrupt):
            model.partial_fit(X[:9], y[:9])
        check()


@pytest.mark.parametrize("stored", [False, True])
def test_labels_of_a_stream_are_of_one_kind(trained: MambaContinualClassifier, stored: bool, tmp_path: Path) -> None:
    X, _ = table(1, 4)
    kinds: dict[str, Any] = {
        "numbers": np.array([1, 2, 3, 4]), "strings": np.array(["a", "b", "c", "d"]),
        "booleans": np.array([True, False] * 2),
    }  # fmt: skip
    for kind, y in kinds.items():
        model = MambaContinualClassifier(trained.learner_, random_state=0).fit(X, y)
        if stored:
            model.save(tmp_path / kind)
            model = MambaContinualClassifier.load(tmp_path / kind)
        for other in set(kinds) - {kind}:
            with pytest.raises(UserError, match=f"labels are {other}, but those before are {kind}"):
                model.partial_fit(X, kinds[other])
            with pytest.raises(UserError, match=f"labels are {kind}, but classes are {other}"):
                model.partial_fit(X, y, classes=kinds[other])
        assert set(model.partial_fit(X, y).predict(X)) <= set(y.tolist())
    with pytest.raises(UserError, match="mixed"):
        MambaContinualClassifier(trained.learner_).fit(X, np.array(["a", 1, "b", 2], dtype=object))
    with pytest.raises(UserError, match="rounded"):
        MambaContinualClassifier(trained.learner_).fit(X, [2**53 + 1] * 4).partial_fit(X, [1.0] * 4)


@pytest.mark.parametrize("dtype", [None, object])
def test_names_of_classes_may_grow(trained: MambaContinualClassifier, dtype: Any, tmp_path: Path) -> None:
    """Strings of other lengths than those before, before and after a file; objects of pandas too."""
    X, _ = table(1, 2)
    model = MambaContinualClassifier(trained.learner_, random_state=0)
    for number, name in enumerate(["cat", "a long name", "x", "a name that is longer yet"], 1):
        model.partial_fit(X, np.array([name] * 2, dtype=dtype))
        model.save(tmp_path / "kept")
        model = MambaContinualClassifier.load(tmp_path / "kept")
        assert name in model.classes_
        assert model.predict_proba(X).shape == (2, number)
    assert list(model.classes_) == ["a long name", "a name that is longer yet", "cat", "x"]


def test_precision_of_the_learner(trained: MambaContinualClassifier, tmp_path: Path) -> None:
    """A learner of float64 computes in float64, its files keep it; one of half precision is widened."""
    X, y = table(3, 4)
    wide = copy.deepcopy(trained.learner_).double()
    model = MambaContinualClassifier(wide, random_state=0).fit(X, y)
    narrow = MambaContinualClassifier(trained.learner_, random_state=0).fit(X, y)
    assert model.state_ is not None
    assert model.state_.blocks[0][0].dtype == torch.float64
    assert np.allclose(model.predict_proba(X), narrow.predict_proba(X), atol=1e-3)
    wide.head.weight.data += 1e-12  # what float32 cannot hold
    model = MambaContinualClassifier(wide, random_state=0).fit(X, y)
    model.save(tmp_path / "kept")
    for again in (
        MambaContinualClassifier.load(tmp_path / "kept"),
        MambaContinualClassifier(tmp_path / "kept" / "learner", random_state=0).fit(X, y),
    ):
        assert np.array_equal(again.predict_proba(X), model.predict_proba(X))
    half = MambaContinualClassifier(copy.deepcopy(trained.learner_).bfloat16(), random_state=0).fit(X, y)
    assert half.learner_.head.weight.dtype == torch.float32


def test_the_callers_learner_is_theirs(trained: MambaContinualClassifier) -> None:
    """It stays in training mode, and what becomes of it later does not reach the estimator."""
    X, y = table(3, 4)
    mine = copy.deepcopy(trained.learner_).train()
    model = MambaContinualClassifier(mine, random_state=0).fit(X, y)
    answers = model.predict_proba(X)
    assert mine.training
    assert not model.learner_.training
    with torch.no_grad():
        mine.head.weight.zero_()
    assert np.array_equal(model.predict_proba(X), answers)


def test_shapes_of_decisions(trained: MambaContinualClassifier) -> None:
    """[N, 1] of one class, [N] of two (above 0: the second), [N, classes] of more."""
    X, y = table(3, 4)
    model = MambaContinualClassifier(trained.learner_, random_state=0)
    for number, shape in ((1, (12, 1)), (2, (12,)), (3, (12, 3))):
        model.partial_fit(X[4 * number - 4 : 4 * number], y[4 * number - 4 : 4 * number])
        found = model.decision_function(X)
        assert found.shape == shape
        chosen = (found > 0).astype(int) if number == 2 else found.argmax(1)
        assert (model.classes_[chosen] == model.predict(X)).all()
        assert model.predict_proba(X).shape == (12, number)


@pytest.fixture(scope="module")
def kept(trained: MambaContinualClassifier, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved stream of three classes."""
    folder = tmp_path_factory.mktemp("estimator") / "kept"
    MambaContinualClassifier(trained.learner_, random_state=0).fit(*table(3, 4)).save(folder)
    return folder


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "a code twice": (lambda s: s.update(codes=[s["codes"][0], *s["codes"][:2]]), "symbols"),
    "a code beyond": (lambda s: s.update(codes=[99, *s["codes"][1:]]), "symbols"),
    "a code below": (lambda s: s.update(codes=[-1, *s["codes"][1:]]), "integers"),
    "a code of text": (lambda s: s.update(codes=["1", *s["codes"][1:]]), "integers"),
    "a code and free": (lambda s: s.update(free=[s["codes"][0], *s["free"][1:]]), "symbols"),
    "free lacks one": (lambda s: s.update(free=s["free"][1:]), "symbols"),
    "a class too many": (lambda s: s.update(classes=[*s["classes"], "more"]), "4 classes with 3 codes"),
    "a class twice": (lambda s: s.update(classes=["c0", "c1", "c1"]), "twice"),
    "classes of two kinds": (lambda s: s.update(classes=["c0", "c1", 2]), "type"),
    "names cut short": (lambda s: s.update(dtype="<U1"), "type"),
    "a mean too few": (lambda s: s["mean"].pop(), "mean is not 5"),
    "a scale too many": (lambda s: s["scale"].append(1.0), "scale is not 5"),
    "a mean of NaN": (lambda s: s["mean"].__setitem__(0, float("nan")), "finite"),
    "an endless scale": (lambda s: s["scale"].__setitem__(0, float("inf")), "finite"),
    "a scale of 0": (lambda s: s["scale"].__setitem__(0, 0.0), "above 0"),
    "a name too few": (lambda s: s.update(feature_names=["a"] * 4), "feature_names"),
    "no seed": (lambda s: s.pop("seed"), "no 'seed'"),
    "a seed of text": (lambda s: s.update(seed="0"), "integers"),
    "no tokens": (lambda s: s.update(tokens=0), "0 tokens for 3 classes"),
    "an unknown parameter": (lambda s: s["parameters"].update(more=1), "more"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_json(damage: str, kept: Path, tmp_path: Path) -> None:
    change, words = DAMAGES[damage]
    folder = shutil.copytree(kept, tmp_path / "copy")
    stored = json.loads((folder / "estimator.json").read_text())
    change(stored)
    (folder / "estimator.json").write_text(json.dumps(stored))
    with pytest.raises(UserError, match=words) as caught:
        MambaContinualClassifier.load(folder)
    assert f"{folder} is damaged" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["mamba", "transformer", "linear_transformer", "performer"])
def test_state_must_be_the_learners(method: str, tmp_path: Path) -> None:
    """Of each method the state is read back, and one that the learner would not make is refused."""
    X, y = table(3, 2)
    learner = ContinualLearner((5,), "class", 6, method=method, width=16, blocks=2, state_size=4)
    model = MambaContinualClassifier(learner, random_state=0).fit(X, y)
    model.save(tmp_path)
    again = MambaContinualClassifier.load(tmp_path)
    assert np.allclose(again.predict_proba(X), model.predict_proba(X), atol=1e-6)
    assert np.allclose(again.partial_fit(X, y).predict_proba(X), model.partial_fit(X, y).predict_proba(X), atol=1e-6)
    path = tmp_path / "state.safetensors"
    good = {
        name: tensor.clone() for name, tensor in mambacl.estimator.load_file(path).items()
    }  # not the file's own pages
    changes = [
        {**good, "0.0": good["0.0"][..., :-1]},
        {**good, "1.1": good["1.1"].double()},
        {**good, "2.0": good["0.0"]},
    ]
    changes += [{k: v for k, v in good.items() if k != "1.0"}, {**good, "0.1": good["0.1"] * float("nan")}]
    if method == "transformer":
        changes.append({name: tensor[:, :, 2:] for name, tensor in good.items()})  # of another number of tokens
    for tensors in changes:
        mambacl.estimator.save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)
        with pytest.raises(UserError, match=r"is damaged \(state.safetensors"):
            MambaContinualClassifier.load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="is damaged"):
        MambaContinualClassifier.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "config", "a weight is missing", "another shape", "no weights", "none"])
def test_damaged_learner(damage: str, kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, from load and from ``learner``; the hub is not asked."""

    def hub(*_: Any, **__: Any) -> None:
        pytest.fail("asked the hub")

    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", hub)
    folder = shutil.copytree(kept, tmp_path / "copy")
    learner, weights = folder / "learner", folder / "learner" / "model.safetensors"
    if damage == "none":
        shutil.rmtree(learner)
    elif damage == "no weights":
        weights.unlink()
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif damage == "config":
        (learner / "config.json").write_text("{")
    else:
        tensors = {name: tensor.clone() for name, tensor in mambacl.estimator.load_file(weights).items()}
        tensors["head.bias"] = tensors["head.bias"][1:].clone()
        if damage == "a weight is missing":
            del tensors["head.bias"]
        mambacl.estimator.save_file(tensors, weights)
    X, y = table(3, 4)
    for read in (
        lambda: MambaContinualClassifier.load(folder),
        lambda: MambaContinualClassifier(learner).fit(X, y),
        lambda: MambaContinualClassifier(str(learner)).fit(X, y),
    ):
        with pytest.raises(UserError, match="save_pretrained" if damage == "none" else "is damaged") as caught:
            read()
        assert str(learner) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 600


def test_failed_save_keeps_the_old(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save that fails before its last file leaves the folder as it was; one that works replaces all."""
    X, y = table(3, 4)
    folder = shutil.copytree(kept, tmp_path / "copy")
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    other = small().meta_fit(X, y)

    def full(path: Path, value: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(mambacl.estimator, "write_json", full)
        with pytest.raises(UserError, match="No space left"):
            other.save(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    other.save(folder)
    assert sorted(file.name for file in folder.iterdir()) == ["estimator.json", "learner"]  # no state: it read none
    assert MambaContinualClassifier.load(folder).learner_.head.in_features == 8
    with pytest.raises(UserError, match="cannot write"):
        other.save(folder / "estimator.json")


def bad(case: str) -> Any:
    X, y = table(3, 6)
    model = MambaContinualClassifier(steps=2, width=8, vocabulary=3)
    if case == "before":
        return model.predict(X)
    if case == "nan":
        X[3, 1] = np.nan
        return model.fit(X, y)
    if case == "vocabulary":
        return model.fit(*table(4, 6))
    if case == "announced":
        return model.partial_fit(X, y, classes=["a", "b", "c", "d"])
    if case == "few classes":
        return model.meta_fit(*table(2, 6))
    if case == "few examples":
        return model.meta_fit(*table(3, 2))
    if case == "empty":
        return model.meta_fit(X, y).predict(X)
    return model.fit(X, y).predict(X[:, :2])


@pytest.mark.parametrize(
    ("case", "error", "words"),
    [
        ("before", NotFittedError, "not fitted"), ("nan", ValueError, "NaN"), ("vocabulary", UserError, "vocabulary"),
        ("announced", UserError, "vocabulary"), ("few classes", UserError, "lower tasks or shots"),
        ("few examples", UserError, "lower tasks or shots"), ("empty", UserError, "partial_fit"),
        ("columns", ValueError, "features"),
    ],
)  # fmt: skip
def test_bad_input(case: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        bad(case)


def test_docstring_example() -> None:
    found = doctest.testmod(mambacl.estimator)
    assert found.attempted > 3
    assert not found.failed


def test_scikit_learn_checks() -> None:
    """All of scikit-learn's checks but one: 300 examples in any order are not what 3 steps of meta-training teach."""
    check_estimator(
        small(steps=3),
        expected_failed_checks={"check_classifiers_train": "accuracy on a long, shuffled stream"},
        on_skip=None,
    )
