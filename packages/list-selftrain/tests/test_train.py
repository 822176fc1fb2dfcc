"""Self-training: runs and their folders, the same bits after an interruption, processes, sessions, what is learned."""

from __future__ import annotations

import csv
import dataclasses
import json
import runpy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from list_selftrain import data
from list_selftrain import train as training
from list_selftrain.config import Config
from list_selftrain.data import Data, Part
from list_selftrain.model import PromptClassifier
from list_selftrain.train import LiSTLearner, Run, load, phases, position, score, train, train_on
from metazoo import checkpoint, testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from safetensors.torch import load_file

torch.set_num_threads(1)
SCRIPT = str(Path(__file__).with_name("two_processes.py"))
# teacher: steps 0, 1; session 1: 2 to 5 and 6, 7; session 2: 8 to 11 and 12, 13; re-weighted: 5 and 11
TINY = Config(
    width=16, layers=1, heads=2, feedforward=32, vocabulary=300, pretrain_steps=0, max_length=64, adapter_dim=2,
    shots=8, max_unlabelled=40, max_test=20, sessions=2, session_steps=4, teacher_epochs=1, finetune_epochs=1,
    unlabelled_batch=6, warmup=0.6, lr=1e-2, teacher_lr=1e-2,
)  # fmt: skip
FEATURES = dataclasses.replace(TINY, model="features", svd=10, hidden=8)
GAUSSIAN = dataclasses.replace(FEATURES, dataset="gaussian", dimension=6)
# of 60 steps or more, which is enough to learn something
LEARNING = Config(
    model="features", dropout=0.0, sessions=1, session_steps=200, teacher_epochs=0, finetune_epochs=0, warmup=0.0,
    unlabelled_batch=64, lr=3e-3, teacher_lr=3e-3, max_unlabelled=1500,
)  # fmt: skip
LOAD = data.load
SOURCES: dict[Any, Data] = {}


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pre-trained models of these tests go nowhere else; children inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def _loaded_once() -> Iterator[None]:
    """The generated reviews are made once for each choice of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", loaded)
        yield


def loaded(config: Config) -> Data:
    if config.dataset != "generated":
        return LOAD(config)
    key = (config.seed, config.shots, config.max_unlabelled, config.max_test, config.unlabelled_batch)
    if key not in SOURCES:
        SOURCES[key] = LOAD(config)
    return SOURCES[key]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("tiny") / "run")


def trained(folder: Path, config: Config = TINY, *, resume: bool = False, every: int = 1, **changes: Any) -> Run:
    options = RunOptions(output_dir=folder, log_every=every, checkpoint_every=every, resume=resume)
    return train(dataclasses.replace(config, **changes), options)


def learner_of(config: Config = GAUSSIAN, **changes: Any) -> LiSTLearner:
    config = dataclasses.replace(config, **changes)
    return LiSTLearner(config, loaded(config), Accelerator(cpu=True))


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Config, last: int) -> None:
    """A run that ends before step ``last``, with a checkpoint of each step."""
    real = LiSTLearner.step

    def step(self: LiSTLearner, step: int) -> dict[str, Any]:
        if step == last:
            raise Interrupted
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(LiSTLearner, "step", step)
        with pytest.raises(Interrupted):
            trained(folder, config)


class Interrupted(Exception):
    """What ends a run early."""


def test_logits(run: Run) -> torch.Tensor:
    assert run.data.test is not None
    return score(run.model, run.model.encode(run.data.test), range(len(run.data.test)))


test_logits.__test__ = False  # type: ignore[attr-defined]


def values(learner: LiSTLearner) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in learner.parameters]).clone()


def table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# ---- run folder


def test_run_folder(tiny: Run) -> None:
    """What is in it, and its rows: 14 steps of teacher, sessions and fine-tuning."""
    names = {str(path.relative_to(tiny.folder)) for path in tiny.folder.rglob("*") if path.is_file()}
    assert {
        "config.json", "environment.json", "metrics.jsonl", "sessions.json", "pseudo-labels.csv", "training.png",
        "model/list.json", "model/model.safetensors", "model/base/model.safetensors", "model/base/tokenizer.json",
        "checkpoints/step-00000013/state.safetensors", "checkpoints/step-00000014/state.safetensors",
    } <= names  # fmt: skip
    assert (tiny.folder / "training.png").stat().st_size > 1000
    assert json.loads((tiny.folder / "config.json").read_text())["session_steps"] == 4
    (session,) = json.loads((tiny.folder / "environment.json").read_text())["sessions"]
    assert session["processes"] == 1
    assert session["seconds"] > 0
    assert json.loads((tiny.folder / "sessions.json").read_text()) == tiny.sessions
    assert tiny.metrics == testing.rows(tiny.folder)
    assert [row["step"] for row in tiny.metrics] == list(range(1, 15))
    assert [row["session"] for row in tiny.metrics] == [0] * 2 + [1] * 6 + [2] * 6
    shown = {"step", "session", "loss", "lr", "grad_norm"}
    for row in tiny.metrics:
        distilled = row["step"] - 1 in (*range(2, 6), *range(8, 12))
        assert set(row) == shown | ({"zero_weights", "effective_examples"} if distilled else set())
        assert all(np.isfinite(value) for value in row.values())
    assert tiny.metrics[2]["zero_weights"] == 0
    assert tiny.metrics[2]["effective_examples"] == pytest.approx(6)
    assert not tiny.model.training


def test_sessions(tiny: Run) -> None:
    """Accuracy of teacher and students, and of the last one as it is predicted afterwards; what is known of labels."""
    assert tiny.data.test is not None
    assert set(tiny.sessions[0]) == {"accuracy"}
    for number, one in enumerate(tiny.sessions[1:], 1):
        assert set(one) == {"accuracy", "pseudo_label_accuracy", "zero_weights", "effective_examples"}
        (row,) = [row for row in tiny.metrics if row["step"] == 6 * number]  # the one step after the warm-up
        assert one["zero_weights"] == pytest.approx(row["zero_weights"])
        assert one["effective_examples"] == pytest.approx(row["effective_examples"])
    found = tiny.predict_proba(tiny.data.test).argmax(1) == tiny.data.test.labels
    assert tiny.sessions[-1]["accuracy"] == pytest.approx(100 * found.mean())
    drawn = tiny.targets.sum(1) > 0
    right = tiny.targets[drawn].argmax(1) == tiny.data.unlabelled.labels[drawn]  # type: ignore[index]
    assert tiny.sessions[-1]["pseudo_label_accuracy"] == pytest.approx(100 * right.mean())


def test_pseudo_labels_file(tiny: Run) -> None:
    """A row for each example that the last session drew, none twice; those of the one re-weighted step have weights."""
    rows = table(tiny.folder / "pseudo-labels.csv")
    assert list(rows[0]) == ["text", "pseudo_label", "probability", "weight", "label"]
    source, texts = tiny.data.unlabelled, [row["text"] for row in rows]
    assert len(set(texts)) == len(texts) == 24
    places = {text: i for i, (text,) in enumerate(source.texts)}
    assert [places[text] for text in texts] == np.flatnonzero(tiny.targets.sum(1) > 0).tolist()
    assert source.labels is not None
    for row in rows:
        i = places[row["text"]]
        assert row["label"] == tiny.data.labels[int(source.labels[i])]
        assert row["pseudo_label"] == tiny.data.labels[int(tiny.targets[i].argmax())]
        assert 0.5 <= float(row["probability"]) == pytest.approx(tiny.targets[i].max(), rel=1e-5)
        assert (row["weight"] == "") == np.isnan(tiny.weights[i])
        if row["weight"]:
            assert float(row["weight"]) == pytest.approx(tiny.weights[i], rel=1e-5)
    weights = [float(row["weight"]) for row in rows if row["weight"]]
    assert len(weights) == 6
    assert sum(weights) == pytest.approx(6, abs=1e-4) or sum(weights) == 0
    assert min(weights) >= 0


def test_pseudo_labels_of_one_own_file(tmp_path: Path) -> None:
    """Pairs of texts, unlabelled ones without truth: the column stays empty, and a comma or a quote breaks nothing."""
    rows = [(f'a, "{word}" {i}', word) for i in range(4) for word in ("yes", "no")]
    lines = [json.dumps({"sentence1": text, "sentence2": "b", "label": word}) for text, word in rows]
    (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    more = [json.dumps({"sentence1": f'c, "d" {i}', "sentence2": f"yes no a {i}"}) for i in range(8)]
    (tmp_path / "more.jsonl").write_text("\n".join(more) + "\n", encoding="utf-8")
    config = dataclasses.replace(
        FEATURES, dataset=str(tmp_path / "own.jsonl"), unlabelled=str(tmp_path / "more.jsonl"), shots=None,
        template="*cls**sent_0*_?*mask*,*+sentl_1**sep+*", words=("yes", "no"), svd=3,
    )  # fmt: skip
    run = trained(tmp_path / "run", config)
    found = table(run.folder / "pseudo-labels.csv")
    assert {row["text"] for row in found} <= {f'c, "d" {i} | yes no a {i}' for i in range(8)}
    assert {row["label"] for row in found} == {""}
    assert {row["pseudo_label"] for row in found} <= {"yes", "no"}
    assert all("accuracy" not in one and "pseudo_label_accuracy" not in one for one in run.sessions)
    assert load(run.folder).sessions == run.sessions


@pytest.mark.parametrize(
    "changes",
    [{}, {"tune": "full"}, {"tune": "bias", "pretrain_steps": 2, "pretrain_batch_size": 4}, {"tune": "lora"}],
    ids=["adapter", "full", "pretrained", "lora"],
)
def test_saved_classifier(tmp_path: Path, changes: dict[str, Any]) -> None:
    """model/ and load() give the run's logits bit for bit."""
    run = trained(tmp_path / "run", sessions=1, **changes)
    wanted = test_logits(run)
    again = load(run.folder)
    assert again.config == run.config
    assert again.metrics == run.metrics
    assert again.sessions == run.sessions
    assert np.array_equal(again.targets, run.targets)
    assert np.array_equal(again.weights, run.weights, equal_nan=True)
    assert torch.equal(test_logits(again), wanted)
    shutil.move(run.folder / "model", tmp_path / "elsewhere")
    model = PromptClassifier.from_pretrained(tmp_path / "elsewhere")
    assert model.labels == ("negative", "positive")
    assert run.data.test is not None
    assert torch.equal(score(model, model.encode(run.data.test), range(len(run.data.test))), wanted)


@pytest.mark.parametrize("config", [FEATURES, GAUSSIAN], ids=["features", "gaussian"])
def test_features_run(tmp_path: Path, config: Config) -> None:
    """No model/, which nothing could load; load() gives the logits bit for bit."""
    run = trained(tmp_path / "run", config)
    assert not (run.folder / "model").exists()
    assert len(table(run.folder / "pseudo-labels.csv")) == 24
    assert torch.equal(test_logits(load(run.folder)), test_logits(run))


def test_data_of_ones_own(tmp_path: Path) -> None:
    """train_on() takes arrays; noise without the true labels is refused in one line."""
    rng = np.random.default_rng(0)
    labels = np.arange(10) % 2
    vectors = (rng.normal(size=(10, 3)) + 4 * labels[:, None]).astype(np.float32)
    more = (rng.normal(size=(30, 3)) + 2).astype(np.float32)
    source = Data("own", ("a", "b"), Part(((),) * 10, labels, vectors), Part(((),) * 30, None, more), None, ())
    run = train_on(FEATURES, lambda config: source, RunOptions(output_dir=tmp_path / "run"))
    assert run.targets.shape == (30, 2)
    noisy = dataclasses.replace(FEATURES, noise="class", noise_rate=0.5, teacher_epochs=0)
    with pytest.raises(UserError, match="flips true labels") as caught:
        train_on(noisy, lambda config: source, RunOptions(output_dir=tmp_path / "noisy"))
    assert "\n" not in str(caught.value)


# ---- the same bits


@pytest.mark.parametrize("config", [TINY, FEATURES], ids=["tiny", "features"])
def test_same_seed_same_bits(tmp_path: Path, config: Config) -> None:
    """Twice the same, whatever the process has drawn before; another seed is another run."""
    trained(tmp_path / "one", config)
    torch.manual_seed(7)
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    trained(tmp_path / "two", config)
    testing.assert_same_run(tmp_path / "one", tmp_path / "two")
    for name in ("sessions.json", "pseudo-labels.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    other = trained(tmp_path / "other", config, seed=1)
    assert other.metrics[0]["loss"] != testing.rows(tmp_path / "one")[0]["loss"]


RESUMED = {  # the config, and before which steps it is stopped
    "tiny-meta": (TINY, (1, 2, 3, 5, 6, 8, 13)),
    "tiny-uncertainty": (dataclasses.replace(TINY, weights="uncertainty", mc_passes=3, mc_pool=30), (1, 2, 3, 7, 8, 9)),
    "tiny-full": (dataclasses.replace(TINY, tune="full", weights="uniform"), (3, 8)),
    "tiny-lora": (dataclasses.replace(TINY, tune="lora", meta_gradient="finite", warmup=0.0), (3, 8)),
    "classic": (dataclasses.replace(TINY, classifier="classic", tune="full", warmup=0.0), (3, 8)),
    "features-meta": (dataclasses.replace(FEATURES, accumulation=2, meta_batches=2), (1, 2, 3, 5, 6, 7, 8, 11, 12, 13)),
    "features-uniform": (dataclasses.replace(FEATURES, weights="uniform", fresh=False), (1, 2, 4, 6, 8)),
    "features-uncertainty": (
        dataclasses.replace(FEATURES, weights="uncertainty", mc_passes=3, mc_pool=30, soft_labels=False),
        (1, 2, 3, 7, 8, 9, 13),
    ),
    "features-confidence": (dataclasses.replace(FEATURES, weights="confidence", threshold=0.6), (4, 8)),
    "features-noise": (
        dataclasses.replace(FEATURES, noise="class", noise_rate=0.5, teacher_epochs=0, warmup=0.0), (1, 4, 6),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Weights, optimizer, random states, rows, pseudo-labels and their weights: in teacher, before and after
    re-weighting begins, at the boundaries of sessions, and in fine-tuning."""
    monkeypatch.setattr("list_selftrain.plots.training", lambda run, path: None)  # for time
    config, stops = RESUMED[name]
    trained(tmp_path / "whole", config)
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        interrupted(monkeypatch, folder, config, stop)
        assert checkpoint.listing(folder / "checkpoints")[0].name == f"step-{stop:08d}"
        assert not (folder / "sessions.json").exists()
        trained(folder, config, resume=True)
        testing.assert_same_run(tmp_path / "whole", folder)
        for file in ("sessions.json", "pseudo-labels.csv"):
            assert (folder / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), stop


def test_stops_are_where_they_should_be() -> None:
    """Of 14 steps: in the teacher 1; before a session 2 and 8; in its warm-up 3; after it 5; in fine-tuning 7, 13."""
    assert phases(TINY, 8) == (2, 4, 2)
    at = {step: position(TINY, 8, step) for step in range(14)}
    assert [step for step in at if at[step].begins] == [0, 2, 8]
    assert [step for step in at if at[step].labelled] == [0, 1, 6, 7, 12, 13]
    reweighted = [s for s in at if not at[s].labelled and training.reweights(TINY, at[s].i)]
    assert reweighted == [5, 11]


def test_finished_run_is_resumed(tmp_path: Path) -> None:
    """Nothing is left to do: what is written is written again, as it was."""
    first = trained(tmp_path / "run", GAUSSIAN)
    kept = (tmp_path / "run" / "pseudo-labels.csv").read_bytes()
    (tmp_path / "run" / "pseudo-labels.csv").unlink()
    again = trained(tmp_path / "run", GAUSSIAN, resume=True)
    assert again.metrics == first.metrics
    assert (tmp_path / "run" / "pseudo-labels.csv").read_bytes() == kept


# ---- folders that are refused


def test_unfinished_and_foreign_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one line that says what the folder is."""
    interrupted(monkeypatch, tmp_path / "half", GAUSSIAN, 5)
    (tmp_path / "start").mkdir()
    shutil.copy(tmp_path / "half" / "config.json", tmp_path / "start")
    for name, fields in (("foreign", {"dataset": "omniglot", "tasks": 5}), ("broken", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{" if fields is None else json.dumps(fields))
    for name, said in (
        ("half", "is at step 5 of 14: finish it with --resume"), ("start", "no checkpoint yet"),
        ("foreign", "which this version does not know"), ("broken", "config.json"), ("none", "not a run folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """load() names a damaged one: the one before it is that of an unfinished run; with none left that is said."""
    run = trained(tmp_path / "run", GAUSSIAN)
    wanted = test_logits(run)
    newest = checkpoint.listing(run.folder / "checkpoints")[0]
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is at step 13 of 14"):
        load(run.folder)
    said = capsys.readouterr()
    assert f"{newest.name}/state.safetensors is damaged" in said.out + said.err
    again = trained(run.folder, GAUSSIAN, resume=True)
    assert torch.equal(test_logits(again), wanted)
    for path in checkpoint.listing(run.folder / "checkpoints"):
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="every checkpoint"):
        load(run.folder)


def test_taken_folder_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before data are read and a model is pre-trained, and nothing in it changes."""
    run = trained(tmp_path / "run", GAUSSIAN)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}

    def never(*args: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(training, "load_model", never)
    monkeypatch.setattr(data, "load", never)
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        trained(run.folder, GAUSSIAN)
    assert before == {path: path.read_bytes() for path in before}


def test_nothing_is_left_of_a_config_that_does_not_fit(tmp_path: Path) -> None:
    """One line, and no run folder."""
    for changes, said in (
        ({"dataset": "nothing"}, "unknown data set 'nothing'"),
        ({"unlabelled_batch": 41}, "fewer than --unlabelled-batch 41"),
        ({"template": "no template"}, "template"),
        ({"words": ("bad",)}, "1 label word"),
        ({"max_length": 8}, "--max-length"),
        ({"model": "/nowhere"}, "no such folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            trained(tmp_path / "run", TINY, **changes)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_another_precision(tmp_path: Path) -> None:
    """Accelerate keeps a process's first precision: another one is refused in our words, and nothing is written."""
    Accelerator(cpu=True)
    with pytest.raises(UserError, match="--precision is bf16, but this process has worked with no"):
        trained(tmp_path / "run", precision="bf16")
    assert not list(tmp_path.iterdir())


def test_bf16(tmp_path: Path, tiny: Run) -> None:
    """Mixed precision: other numbers than single precision, near them; weights stay single."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trained(tmp_path / "run", precision="bf16", sessions=1)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert run.metrics[0]["loss"] != tiny.metrics[0]["loss"]
    assert run.metrics[0]["loss"] == pytest.approx(tiny.metrics[0]["loss"], rel=0.05)


def test_gradient_checkpointing(tmp_path: Path) -> None:
    """The same numbers up to float error."""
    config = dataclasses.replace(TINY, dropout=0.0, meta_gradient="finite", sessions=1, warmup=0.0)
    one = trained(tmp_path / "one", config)
    two = trained(tmp_path / "two", config, gradient_checkpointing=True)
    assert [row["loss"] for row in two.metrics] == pytest.approx([row["loss"] for row in one.metrics], abs=1e-4)


# ---- sessions


def test_fresh_student_or_the_teachers_weights() -> None:
    """--no-fresh goes on from the teacher; a fresh student begins anew, differently in each session, as its seed says;
    both with an optimizer that has forgotten."""
    begun: dict[bool, torch.Tensor] = {}
    for fresh in (True, False):
        learner = learner_of(fresh=fresh)
        first = values(learner)
        learner.step(0)
        learner.step(1)
        teacher = values(learner)
        assert not torch.equal(first, teacher)
        assert learner.optimizer.state
        learner._begin(1)
        begun[fresh] = values(learner)
        assert not learner.optimizer.state
        assert torch.equal(begun[fresh], teacher) != fresh
        learner._begin(2)
        assert torch.equal(values(learner), teacher) != fresh
        if fresh:
            assert not torch.equal(values(learner), begun[fresh])
    again = learner_of(fresh=True)
    again._begin(1)
    assert torch.equal(values(again), begun[True])


def test_pseudo_labels_are_the_teachers() -> None:
    """q is the softmax of its logits, at --temperature; the student before is the teacher of a second session."""
    for temperature in (1.0, 0.5):
        learner = learner_of(temperature=temperature)
        for step in range(8):
            if step in (2,):
                wanted = score(learner.model, learner.unlabelled, np.unique(learner.draws(1))) / temperature
            learner.step(step)
            if step == 2:
                found = learner.targets[np.unique(learner.draws(1))]
                assert torch.allclose(found, wanted.softmax(-1), atol=1e-6)
        wanted = score(learner.model, learner.unlabelled, np.unique(learner.draws(2))) / temperature
        learner.step(8)
        assert torch.allclose(learner.targets[np.unique(learner.draws(2))], wanted.softmax(-1), atol=1e-6)
        assert int((learner.targets.sum(1) > 0).sum()) == len(np.unique(learner.draws(2)))


def test_labels_of_unlabelled_and_test_examples_are_never_used(tmp_path: Path) -> None:
    """Another truth gives the same weights, bit for bit."""
    wanted = trained(tmp_path / "one", GAUSSIAN)

    def other(config: Config) -> Data:
        source = loaded(config)
        assert source.test is not None
        changed = [Part(part.texts, 1 - part.labels, part.vectors) for part in (source.unlabelled, source.test)]  # type: ignore[operator]
        return dataclasses.replace(source, unlabelled=changed[0], test=changed[1])

    run = train_on(GAUSSIAN, other, RunOptions(output_dir=tmp_path / "two"))
    assert torch.equal(test_logits(run), test_logits(wanted))
    assert np.array_equal(run.weights, wanted.weights, equal_nan=True)
    assert run.sessions[-1]["accuracy"] == pytest.approx(100 - wanted.sessions[-1]["accuracy"])


@pytest.mark.parametrize("config", [TINY, GAUSSIAN], ids=["tiny", "gaussian"])
def test_no_sessions(tmp_path: Path, config: Config) -> None:
    """The teacher alone: no pseudo-labels, and no unlabelled example is needed."""
    run = trained(tmp_path / "run", config, sessions=0, max_unlabelled=1)
    assert [row["session"] for row in run.metrics] == [0, 0]
    assert [set(one) for one in run.sessions] == [{"accuracy"}]
    assert not (run.folder / "pseudo-labels.csv").exists()
    assert run.targets.sum() == 0
    assert np.isnan(run.weights).all()
    assert torch.equal(test_logits(load(run.folder)), test_logits(run))


def test_noise_without_a_teacher(tmp_path: Path) -> None:
    """Pseudo-labels are the truth, with half of class 1 flipped; the session's steps are all there are."""
    run = trained(
        tmp_path / "run", GAUSSIAN, noise="class", noise_rate=0.5, teacher_epochs=0, finetune_epochs=0, sessions=1,
        session_steps=7, warmup=0.0,
    )  # fmt: skip
    assert len(run.metrics) == 7
    assert set(run.sessions[0]) == set()
    truth = run.data.unlabelled.labels
    assert truth is not None
    drawn = run.targets.sum(1) > 0
    assert drawn.all()  # 42 of 40
    assert set(run.targets.flatten().tolist()) == {0.0, 1.0}
    given = run.targets.argmax(1)
    assert (given[truth == 0] == 0).all()
    assert (given[truth == 1] == 0).sum() == round(0.5 * (truth == 1).sum())
    assert run.sessions[1]["pseudo_label_accuracy"] == pytest.approx(100 * (given == truth).mean())
    assert not np.isnan(run.weights).any()


def test_fewer_pseudo_labels_than_a_batch(tmp_path: Path) -> None:
    """UST chooses half of its pool: a batch is then all of them."""
    run = trained(tmp_path / "run", FEATURES, weights="uncertainty", mc_passes=2, mc_pool=8)
    assert int((run.targets.sum(1) > 0).sum()) == 4
    assert all(row["effective_examples"] <= 4.001 for row in run.metrics if "effective_examples" in row)


def test_nothing_to_choose_from(tmp_path: Path) -> None:
    """UST on a single unlabelled example: one line says that two are needed."""
    with pytest.raises(UserError, match="uncertainty"):
        trained(tmp_path / "run", FEATURES, weights="uncertainty", mc_passes=2, max_unlabelled=1, unlabelled_batch=1)


def test_threshold(tmp_path: Path) -> None:
    """Above it equal weights, below it none; where no pseudo-label is above it, nothing is learned from a batch."""
    run = trained(tmp_path / "run", GAUSSIAN, weights="confidence", threshold=0.7, sessions=1, finetune_epochs=0)
    drawn = run.targets.sum(1) > 0
    sure = run.targets[drawn].max(1) > 0.7
    assert ((run.weights[drawn] > 0) == sure).all()
    learner = learner_of(weights="confidence", threshold=0.9999, clip=0.0)
    rows = [learner.step(step) for step in range(3)]
    assert rows[2]["zero_weights"] == 100
    assert rows[2]["effective_examples"] == rows[2]["grad_norm"] == 0


# ---- what is learned


def test_few_labels_are_above_chance(tmp_path: Path) -> None:
    """30 labelled reviews and self-training: about 70 %, chance is 52."""
    found = [
        trained(tmp_path / str(seed), LEARNING, every=1000, seed=seed, teacher_epochs=30, session_steps=50).sessions
        for seed in (0, 1, 2)
    ]
    assert np.mean([one[0]["accuracy"] for one in found]) > 62
    assert np.mean([one[1]["accuracy"] for one in found]) > 62


def test_reweighting_withstands_class_noise(tmp_path: Path) -> None:
    """With 60 % of the positive pseudo-labels flipped: some 90 % against 57, and flipped ones get less weight."""
    accuracy: dict[str, list[float]] = {"meta": [], "uniform": []}
    for seed in (0, 1):
        for weights, of in accuracy.items():
            run = trained(
                tmp_path / f"{weights}-{seed}",
                LEARNING,
                every=1000,
                noise="class",
                noise_rate=0.6,
                weights=weights,
                seed=seed,
            )
            of.append(run.sessions[-1]["accuracy"])
        run = load(tmp_path / f"meta-{seed}")
        right = run.targets.argmax(1) == run.data.unlabelled.labels
        assert np.nanmean(run.weights[right]) > 1.2 * np.nanmean(run.weights[~right])
    assert np.mean(accuracy["meta"]) > np.mean(accuracy["uniform"]) + 15
    assert np.mean(accuracy["meta"]) > 75


# ---- processes


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """The gradient of all examples and the same weights of pseudo-labels in each step and process, whatever the parts;
    rows, checkpoints and model/ are one process's up to float error, also after a resume."""
    script = runpy.run_path(SCRIPT)
    features = dataclasses.replace(FEATURES, dropout=0.0, labelled_batch=3, unlabelled_batch=7, warmup=0.2, clip=0.0)
    prompted = dataclasses.replace(TINY, dropout=0.0, tune="full", sessions=1, lr=1e-3, teacher_lr=1e-3)
    runs = {
        "features": (features, 0),
        "parts": (dataclasses.replace(features, accumulation=2), 0),
        "resumed": (features, 6),
        "finite": (dataclasses.replace(features, meta_gradient="finite"), 0),
        "gaussian": (dataclasses.replace(GAUSSIAN, dropout=0.0, warmup=0.0, meta_batches=2), 0),
        "tiny": (prompted, 0),
    }
    jobs = [(str(tmp_path / f"{n}-two"), dataclasses.asdict(config), last) for n, (config, last) in runs.items()]
    testing.torchrun(2, SCRIPT, json.dumps(jobs))
    for name, (config, last) in runs.items():
        with script["Recorded"]() as record:
            one = trained(tmp_path / f"{name}-one", config)
        seen = [np.load(tmp_path / f"{name}-two.{rank}.npz") for rank in (0, 1)]
        for key in ("gradients", "weights"):
            assert np.array_equal(seen[0][key], seen[1][key]), (name, key)  # the processes never part
            wanted = np.stack(getattr(record, key))[-len(seen[0][key]) :]
            assert len(seen[0][key]) == len(wanted) or last
            scale = np.abs(wanted).max(1, keepdims=True)
            off = 2e-2 if (name, key) == ("finite", "weights") else 1e-3 if name in ("finite", "tiny") else 1e-4
            assert (np.abs(seen[0][key] - wanted) <= off * scale + 1e-7).all(), (name, key)
        assert any(0 < (row == 0).sum() < len(row) for row in record.weights), name  # re-weighted for some
        step, wanted = checkpoint.read(checkpoint.listing(one.folder / "checkpoints")[0])
        found_step, found = checkpoint.read(checkpoint.listing(tmp_path / f"{name}-two" / "checkpoints")[0])
        assert step == found_step == len(one.metrics)
        for part in ("model", "session"):
            assert found[part].keys() == wanted[part].keys()
            for key, value in wanted[part].items():
                near = torch.allclose(found[part][key].float(), value.float(), rtol=2e-2, atol=5e-3)
                assert near, (name, part, key)
        rows = testing.rows(tmp_path / f"{name}-two")
        assert [row["step"] for row in rows] == [row["step"] for row in one.metrics]
        for row, other in zip(rows, one.metrics, strict=True):
            assert row == pytest.approx(other, rel=1e-2, abs=2e-3)
        assert torch.allclose(test_logits(load(tmp_path / f"{name}-two")), test_logits(one), atol=1e-2)
    testing.assert_same_run(tmp_path / "features-two", tmp_path / "resumed-two")
    one, two = (load_file(tmp_path / f"tiny-{n}" / "model" / "model.safetensors") for n in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.allclose(one[key], two[key], atol=5e-3) for key in one)


def test_too_few_examples_for_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(type(accelerator), "num_processes", property(lambda self: 5))
    with pytest.raises(UserError, match="5 processes want --labelled-batch and --unlabelled-batch"):
        LiSTLearner(GAUSSIAN, loaded(GAUSSIAN), accelerator)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TINY, FEATURES], ids=["tiny", "features"])
def test_gpu(tmp_path: Path, config: Config) -> None:
    """Losses on CUDA are the CPU's up to float error, and a bf16 run stays finite."""
    config = dataclasses.replace(config, dropout=0.0, warmup=0.0, lr=1e-3, teacher_lr=1e-3)
    rows = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        learner = LiSTLearner(config, loaded(config), Accelerator(cpu=cpu))
        rows.append([learner.step(step)["loss"].item() for step in range(6)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trained(tmp_path / "run", config, precision="no" if config.model == "features" else "bf16")
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
    assert torch.isfinite(test_logits(run)).all()
    AcceleratorState._reset_state(reset_partial_state=True)
