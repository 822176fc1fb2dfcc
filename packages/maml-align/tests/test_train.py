"""Training: every method, two processes, resuming, validation, what is saved."""

from __future__ import annotations

import dataclasses
import json
import runpy
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from maml_align import plots
from maml_align import train as training
from maml_align.config import Config
from maml_align.data import Data, Pairs
from maml_align.train import MetaLearner, load, train, train_on
from metazoo import checkpoint, testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from safetensors.torch import load_file

torch.set_num_threads(1)
SCRIPT = Path(__file__).parent / "two_processes.py"
DRAW = plots.training
ROTATIONS = Config(
    dataset="rotations", model="linear", languages=("a", "b", "c"), unseen=(), dimension=4, shots=3, queries=3,
    inner_steps=2, inner_lr=0.5, steps=3, outer_lr=1e-2, task_batch=2,
)  # fmt: skip
SHARED = {"step", "loss", "distance", "grad_norm"}
LOSSES = {"teacher_query_loss", "student_support_loss", "student_query_loss"}
KEYS = {*SHARED, *LOSSES, "alignment_loss", "kd_share"}
LANGUAGES = ("de", "en", "es")


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    """The picture of a training takes longer than the training; test_run_folder draws it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training", lambda rows, path: None)
        yield


@pytest.fixture
def alone() -> Iterator[None]:
    """A process keeps its first precision: forget it, before and after."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs.csv and questions.csv, files of one's own in three languages."""
    path = tmp_path_factory.mktemp("own")
    lines = ["sentence1,sentence2,score,language1,language2"]
    for one in LANGUAGES:
        for other in LANGUAGES:
            lines += [f"{one} first {i},{other} second {i + i % 3},{5 - i % 3},{one},{other}" for i in range(80)]
    (path / "pairs.csv").write_text("\n".join(lines) + "\n")
    lines = ["id,language,question,answer"]
    lines += [f"{i},{one},what is {one} {i},it is {one} number {i}" for i in range(40) for one in LANGUAGES]
    (path / "questions.csv").write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def static(folder: Path) -> Config:
    """Static vectors on scored pairs of three languages."""
    return Config(
        dataset=str(folder / "pairs.csv"), model="static", languages=LANGUAGES, unseen=(), width=4, vocabulary=300,
        shots=3, queries=3, inner_steps=2, inner_lr=0.5, steps=4, task_batch=3, outer_lr=1e-2, max_query_length=12,
        max_answer_length=12,
    )  # fmt: skip


@pytest.fixture(scope="module")
def asked(static: Config, folder: Path) -> Config:
    """Static vectors on questions, at a rate that moves them far, with similar questions and hard negatives."""
    return replace(
        static, dataset=str(folder / "questions.csv"), shots=2, queries=2, negatives=2, negative_sampling="hard",
        query_sampling="similar", inner_steps=1, outer_lr=0.5, task_batch=1, steps=8,
    )  # fmt: skip


@pytest.fixture(scope="module")
def tiny(static: Config) -> Config:
    """A BERT on scored pairs, a task at a time."""
    return replace(static, model="tiny", width=8, heads=2, layers=1, feedforward=8, inner_lr=0.05, steps=3)


def trained(folder: Path, config: Config, *, resume: bool = False, every: int = 2) -> training.Run:
    return train(config, RunOptions(output_dir=folder, log_every=1, checkpoint_every=every, resume=resume))


def weights(run: training.Run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.encoder.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(value, other[name]) for name, value in one.items())


def learner_of(config: Config) -> MetaLearner:
    return MetaLearner(config, training.data.load(config), Accelerator(cpu=True))


class Interrupted(Exception):
    """What ends a run early."""


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Config, last: int) -> None:
    """A run that ends before step ``last``, with a checkpoint of each step."""
    real = MetaLearner.step

    def step(self: MetaLearner, step: int) -> dict[str, Any]:
        if step == last:
            raise Interrupted
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(MetaLearner, "step", step)
        with pytest.raises(Interrupted):
            trained(folder, config, every=1)


def methods(config: Config) -> dict[str, Config]:
    two = replace(config, method="maml", mode="MONO_BIL")
    tuned = replace(config, method="fine-tune")
    return {
        "maml-align": config,
        "as-coded": replace(config, student_steps=0),
        "second-order": replace(config, first_order=False),
        "meta-sgd": replace(config, learn_inner_lr=True),
        "detached": replace(config, detach_teacher=True),
        "after-teacher": replace(config, teacher_steps=2),
        "clipped": replace(config, clip=1e-3),
        "t-maml": two,
        "s-maml": replace(two, mode="BIL_MULTI"),
        "mixt": replace(two, mode="MIXT"),
        "reptile": replace(two, method="reptile"),
        "fine-tune": tuned,
        "fine-tune-outer": replace(tuned, finetune_sets="outer"),
        "fine-tune-apart": replace(tuned, finetune_apart=True, finetune_sets="outer"),
    }


# ---- methods


@pytest.mark.parametrize("name", sorted(methods(ROTATIONS)))
def test_methods(tmp_path: Path, name: str) -> None:
    """Every method runs, moves the weights, and logs the rows that are documented."""
    run = trained(tmp_path / "run", methods(ROTATIONS)[name])
    start = training.encoder_of(ROTATIONS, run.data)
    assert not same(weights(run), dict(start.named_parameters()))
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    for row in run.metrics:
        aligned = run.config.method == "maml-align" and row["step"] > run.config.teacher_steps
        assert set(row) == (KEYS if aligned else SHARED | {"query_loss"})
        assert all(np.isfinite(value) for value in row.values())
        assert (row["distance"] == 0) == (run.config.method == "fine-tune")
        assert row["grad_norm"] > 0


@pytest.mark.parametrize("name", ["maml-align", "t-maml", "reptile", "fine-tune"])
def test_losses_fall(tmp_path: Path, name: str) -> None:
    """In the synthetic world, from the first ten steps to the last ten."""
    config = replace(methods(ROTATIONS)[name], shots=16, queries=16, steps=40, outer_lr=5e-2, task_batch=6)
    rows = trained(tmp_path / "run", config, every=100).metrics
    losses = [row["loss"] for row in rows]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.mark.parametrize("model", ["static", "asked", "tiny"])
def test_models(tmp_path: Path, request: pytest.FixtureRequest, model: str) -> None:
    """Static vectors on pairs and on questions, and a transformer: they train, and load() gives the same weights."""
    config = replace(request.getfixturevalue(model), steps=2)
    run = trained(tmp_path / "run", config)
    start = training.encoder_of(config, run.data)
    assert not same(weights(run), dict(start.named_parameters()))
    assert all(set(row) == KEYS for row in run.metrics)
    again = load(run.folder)
    assert same(weights(again), weights(run))
    assert again.metrics == run.metrics
    assert again.config == config


def test_alignment_in_the_rows() -> None:
    """loss is the mean of the two query losses and λ (Σ L_T − Σ L_S)², the sums over the three tasks."""
    config = replace(ROTATIONS, task_batch=3, kd_lambda=5.0)
    row = {name: float(value) for name, value in learner_of(config).step(0).items()}
    gap = 3 * (row["teacher_query_loss"] - row["student_support_loss"])
    assert row["alignment_loss"] == pytest.approx(5 * gap**2, rel=1e-3)
    queries = (row["teacher_query_loss"] + row["student_query_loss"]) / 2
    assert row["loss"] == pytest.approx(row["alignment_loss"] + queries)
    without = {name: float(value) for name, value in learner_of(replace(config, kd_lambda=0.0)).step(0).items()}
    assert without["kd_share"] == without["alignment_loss"] == 0
    assert without["teacher_query_loss"] == row["teacher_query_loss"]


def test_zero_shot_changes_nothing(tmp_path: Path, static: Config) -> None:
    """It is the encoder as it begins; saved and loaded as any."""
    run = trained(tmp_path / "run", replace(static, method="zero-shot", validate_every=2))
    start = training.encoder_of(static, run.data)
    assert same(weights(run), dict(start.named_parameters()))
    assert not run.metrics
    assert same(weights(load(tmp_path / "run")), weights(run))
    assert (run.folder / "model" / "model.safetensors").is_file()


def test_no_steps(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", replace(ROTATIONS, steps=0))
    assert not run.metrics
    assert same(weights(load(tmp_path / "run")), weights(run))


def test_finetune_apart_takes_a_step_for_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all sets three, without the first two."""
    steps = []
    held = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), held(self, *a, **k))[1])
    config = replace(ROTATIONS, method="fine-tune", finetune_apart=True, steps=2)
    trained(tmp_path / "all", config)
    assert len(steps) == 2 * 3
    trained(tmp_path / "outer", replace(config, finetune_sets="outer"))
    assert len(steps) == 2 * 3 + 2 * 2
    trained(tmp_path / "one", replace(config, finetune_apart=False))
    assert len(steps) == 2 * 3 + 2 * 2 + 2


def test_finetuning_on_one_set_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sets of a step in their order, each of all tasks."""
    learner = learner_of(replace(ROTATIONS, method="fine-tune", finetune_apart=True))
    wanted = learner.sampler.batch(0)
    seen: list[Any] = []
    real = learner._optimise
    monkeypatch.setattr(learner, "_optimise", lambda tasks, step: (seen.append(tasks), real(tasks, step))[1])
    learner.step(0)
    assert [len(tasks) for tasks in seen] == [2, 2, 2]
    for number, tasks in enumerate(seen):
        for task, whole in zip(tasks, wanted, strict=True):
            assert len(task) == 1
            assert torch.equal(task[0]["scores"], whole[number]["scores"])


def test_learned_rates_move(tmp_path: Path) -> None:
    """Away from inner_lr, each parameter's own; they go into checkpoints, not into the encoder."""
    config = replace(ROTATIONS, learn_inner_lr=True)
    learner = learner_of(config)
    learner.step(0)
    rates = {name: value for name, value in learner.theta.items() if name.startswith("rate:")}
    assert len(rates) == len(list(learner.encoder.parameters()))
    assert all((value != config.inner_lr).any() for value in rates.values())
    run = trained(tmp_path / "run", config)
    _, state = checkpoint.read(checkpoint.listing(run.folder / "checkpoints")[0])
    assert {value.shape for value in state["rates"].values()} == {value.shape for value in weights(run).values()}
    assert state["model"].keys() == weights(run).keys()


def test_teacher_first(tmp_path: Path) -> None:
    """The first steps are T-MAML's on the same tasks, to the bit; the alignment begins after them."""
    config = replace(ROTATIONS, teacher_steps=2, task_batch=1)
    run = trained(tmp_path / "run", config)
    teacher = trained(tmp_path / "teacher", replace(config, method="maml", mode="MONO_BIL", teacher_steps=0))
    assert run.metrics[:2] == teacher.metrics[:2]
    assert set(run.metrics[2]) == KEYS
    assert run.metrics[2]["teacher_query_loss"] == pytest.approx(teacher.metrics[2]["query_loss"])


def test_clipping() -> None:
    """The row has the norm before it; AdamW gets the norm that is allowed."""
    learner = learner_of(replace(ROTATIONS, clip=1e-3))
    seen: list[float] = []
    learner.optimizer.register_step_pre_hook(
        lambda optimizer, *args: seen.append(
            float(torch.stack([value.grad.square().sum() for value in learner.theta.values()]).sum().sqrt())
        )
    )
    row = learner.step(0)
    assert float(row["grad_norm"]) > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


# ---- run folders


def test_run_folder(tmp_path: Path, static: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it."""
    monkeypatch.setattr(plots, "training", DRAW)
    run = trained(tmp_path / "run", static)
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert {
        "config.json", "environment.json", "metrics.jsonl", "model/modules.json", "model/model.safetensors",
        "checkpoints/step-00000002/state.safetensors", "checkpoints/step-00000004/state.safetensors",
    } <= names  # fmt: skip
    assert (run.folder / "training.png").stat().st_size > 1000
    assert json.loads((run.folder / "config.json").read_text())["task_batch"] == 3
    assert run.metrics == testing.rows(run.folder)


def test_twice_the_same(tmp_path: Path, static: Config) -> None:
    """A second run has the same rows and the same files, whatever the process has drawn before; another seed not."""
    one = trained(tmp_path / "one", static)
    torch.manual_seed(7)
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    trained(tmp_path / "two", static)
    testing.assert_same_run(tmp_path / "one", tmp_path / "two")
    model = Path("model") / "model.safetensors"
    assert (tmp_path / "one" / model).read_bytes() == (tmp_path / "two" / model).read_bytes()
    other = trained(tmp_path / "other", replace(static, seed=1))
    assert other.metrics[0]["loss"] != one.metrics[0]["loss"]


RESUMED = {  # the fixture, what differs from it, and before which steps it is stopped
    "validated": ("static", {"validate_every": 2, "steps": 5, "outer_lr": 0.3}, (3,)),
    "meta-sgd": ("static", {"learn_inner_lr": True}, (2,)),
    "after-teacher": ("static", {"teacher_steps": 2}, (2,)),
    "fine-tune-apart": ("static", {"method": "fine-tune", "finetune_apart": True}, (2,)),
    "questions": ("asked", {}, (1, 5)),
    "tiny": ("tiny", {}, (2,)),
}


@pytest.mark.parametrize("name", RESUMED)
def test_resumed_is_never_interrupted(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Weights, optimizer, random states and rows: also where rates are learned, the best weights are kept, the teacher
    is alone, and negatives and similar questions are those of the start."""
    fixture, changes, stops = RESUMED[name]
    config = replace(request.getfixturevalue(fixture), **changes)
    whole = trained(tmp_path / "whole", config, every=1)
    for stop in stops:
        folder = tmp_path / f"stopped-{stop}"
        interrupted(monkeypatch, folder, config, stop)
        run = trained(folder, config, resume=True, every=1)
        testing.assert_same_run(tmp_path / "whole", folder)
        assert same(weights(run), weights(whole)), stop


def test_nearness_is_that_of_the_start(asked: Config) -> None:
    """A task's questions and negatives do not depend on what was trained meanwhile."""
    learner, untrained = learner_of(asked), learner_of(asked)
    for step in range(6):
        for one, other in zip(learner.sampler.draw(step)[0], untrained.sampler.draw(step)[0], strict=True):
            assert one.rows.tolist() == other.rows.tolist()
            assert one.negatives == other.negatives
        learner.step(step)


def test_saved_model_is_a_sentence_transformer(tmp_path: Path, static: Config) -> None:
    """It gives the run's vectors, of norm 1."""
    from sentence_transformers import SentenceTransformer

    run = trained(tmp_path / "run", static)
    texts = ["de first 1", "en second 2"]
    theirs = SentenceTransformer(str(run.folder / "model"), device="cpu").encode(texts)
    assert np.allclose(theirs, run.encoder.encode(texts), atol=1e-6)  # type: ignore[union-attr]
    assert np.allclose(np.linalg.norm(theirs, axis=1), 1, atol=1e-6)
    assert load_file(run.folder / "model" / "model.safetensors")


def test_model_of_a_folder(tmp_path: Path, static: Config) -> None:
    """--model FOLDER goes on from what was saved there, wherever it was moved."""
    first = trained(tmp_path / "first", static)
    shutil.move(first.folder / "model", tmp_path / "elsewhere")
    run = trained(tmp_path / "second", replace(static, model=str(tmp_path / "elsewhere"), method="zero-shot"))
    texts = ["de first 1", "en second 2"]
    assert np.allclose(run.encoder.encode(texts), first.encoder.encode(texts), atol=1e-6)  # type: ignore[union-attr]
    more = trained(tmp_path / "third", replace(static, model=str(tmp_path / "elsewhere")))
    assert not same(weights(more), weights(run))
    assert same(weights(load(more.folder)), weights(more))


def test_data_of_ones_own(tmp_path: Path, static: Config) -> None:
    """Data by hand, whose rows say the same in every language."""
    texts = {
        (one, one): (
            tuple(f"{one} {i}" for i in range(30)), tuple(f"{one} also {i}" for i in range(30)), np.arange(30) % 6.0,
        )
        for one in LANGUAGES
    }  # fmt: skip
    part = Pairs(LANGUAGES, texts, aligned=True)
    given: list[Config] = []

    def source(config: Config) -> Data:
        given.append(config)
        return Data("own", "pairs", part, part, part)

    run = train_on(static, source, RunOptions(output_dir=tmp_path / "run", log_every=1))
    assert given == [static]
    assert run.data.name == "own"
    assert len(run.metrics) == 4
    assert run.encoder.encode(["de 1", "en 2"]).shape == (2, 4)  # type: ignore[union-attr]


# ---- validation


@pytest.mark.parametrize("mode", ["TRANS", "MONO_BIL_MULTI"])
def test_best_of_validations_is_kept(tmp_path: Path, static: Config, mode: str) -> None:
    """The weights are those of the step with the least validation loss, in model/ and in load(), too."""
    method = "maml" if mode == "TRANS" else "maml-align"
    config = replace(static, mode=mode, method=method, validate_every=2, steps=6, outer_lr=0.3)  # type: ignore[arg-type]
    run = trained(tmp_path / "run", config)
    scored = {row["step"]: row["validation_loss"] for row in run.metrics if "validation_loss" in row}
    assert list(scored) == [2, 4, 6]
    best = min(scored, key=scored.__getitem__)
    wanted = weights(trained(tmp_path / "until", replace(config, steps=best, validate_every=0)))
    assert same(weights(run), wanted)
    assert same(weights(load(tmp_path / "run")), wanted)
    (saved,) = load_file(run.folder / "model" / "model.safetensors").values()
    assert torch.equal(saved, next(iter(wanted.values())))
    _, state = checkpoint.read(checkpoint.listing(run.folder / "checkpoints")[0])
    assert int(state["best"]["step"]) == best
    assert float(state["best"]["score"]) == pytest.approx(scored[best])


def test_best_is_an_earlier_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses that are made up: the second of three is the least, and its weights are kept; one that is not a number is
    no best, and leaves the checkpoints whole."""
    losses = {2: 3.0, 4: 1.0, 6: 2.0, 8: float("nan")}
    real = MetaLearner.gradients
    step = 0

    def gradients(self: MetaLearner, tasks: Any, objective: Any) -> Any:
        task, alignment, found = real(self, tasks, objective)
        if len(tasks) == training.VALIDATION_TASKS:
            nonlocal step
            step += 2
            found["student_query_loss"] = torch.tensor(losses[step] * len(tasks))
        return task, alignment, found

    monkeypatch.setattr(MetaLearner, "gradients", gradients)
    config = replace(ROTATIONS, validate_every=2, steps=9)
    options = RunOptions(output_dir=tmp_path / "run", log_every=9, checkpoint_every=1)
    run = train(config, options)
    wanted = weights(trained(tmp_path / "until", replace(ROTATIONS, steps=4)))
    assert same(weights(run), wanted)
    assert same(weights(load(tmp_path / "run")), wanted)


def test_validation_tasks_are_the_same_each_time(static: Config) -> None:
    """They take no part in training, which is the same with and without them; TRANS is validated as BIL_MULTI."""
    learners = [learner_of(replace(static, validate_every=every)) for every in (1, 0)]
    rows = [[learner.step(step) for step in range(2)] for learner in learners]
    for one, other in zip(*rows, strict=True):
        assert set(one) - set(other) == {"validation_loss"}
        assert all(torch.equal(value, one[name]) for name, value in other.items())
    one, other = (learners[0]._validate(step) for step in (5, 6))
    assert torch.equal(one, other)
    trans = learner_of(replace(static, method="maml", mode="TRANS", validate_every=1))
    assert trans.validation is not None
    assert trans.validation.config.mode == "BIL_MULTI"
    assert len(trans.validation.draw(0)) == training.VALIDATION_TASKS


@pytest.mark.parametrize("method", ["reptile", "fine-tune", "maml"])
def test_validation_of_other_methods(method: str) -> None:
    """Reptile is validated as MAML, which it stands for at the test; the config stays its own."""
    config = replace(ROTATIONS, method=method, mode="MONO_BIL", validate_every=1)  # type: ignore[arg-type]
    learner = learner_of(config)
    row = learner.step(0)
    assert np.isfinite(float(row["validation_loss"]))
    assert learner.config == config
    if method == "reptile":
        maml = learner_of(replace(config, method="maml"))
        maml.encoder.load_state_dict(learner.encoder.state_dict())
        assert torch.equal(maml._validate(0), row["validation_loss"])


# ---- folders and settings that are refused


def test_load_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one line that says what the folder is."""
    interrupted(monkeypatch, tmp_path / "half", ROTATIONS, 2)
    (tmp_path / "start").mkdir()
    shutil.copy(tmp_path / "half" / "config.json", tmp_path / "start")
    for name, text in (("foreign", '{"dataset": "omniglot", "tasks": 5}'), ("broken", "{")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(text)
    for name, said in (
        ("half", "is at step 2 of 3: finish it with --resume first"), ("start", "has no checkpoint yet"),
        ("foreign", "which this version does not know"), ("broken", "is not JSON"), ("none", "is not a run folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert same(weights(trained(tmp_path / "half", ROTATIONS, resume=True)), weights(load(tmp_path / "half")))


def test_damaged_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """load() names a damaged one: the one before it is that of an unfinished run; with none left that is said."""
    run = trained(tmp_path / "run", ROTATIONS)
    newest, *others = checkpoint.listing(run.folder / "checkpoints")
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    with pytest.raises(UserError, match="is at step 2 of 3"):
        load(run.folder)
    assert f"{newest.name}/state.safetensors is damaged" in capsys.readouterr().err
    for path in others:
        (path / "state.json").write_text("{")
    with pytest.raises(UserError, match="every checkpoint"):
        load(run.folder)


def test_taken_folder_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before data are read and a model is made, and nothing in it changes."""
    run = trained(tmp_path / "run", ROTATIONS)
    before = {path: path.read_bytes() for path in run.folder.rglob("*") if path.is_file() and path.name != ".lock"}

    def never(*args: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(training, "MetaLearner", never)
    monkeypatch.setattr(training.data, "load", never)
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        trained(run.folder, ROTATIONS)
    with pytest.raises(UserError, match=r"was made with kd_lambda = 0\.5, now it is 1\.0"):
        trained(run.folder, replace(ROTATIONS, kd_lambda=1.0), resume=True)
    assert before == {path: path.read_bytes() for path in before}


def test_nothing_is_left_of_a_config_that_does_not_fit(tmp_path: Path, static: Config) -> None:
    """One line, and no run folder."""
    for changes, said in (
        ({"dataset": "nothing"}, "--dataset nothing: give"),
        ({"dataset": str(tmp_path / "none.csv")}, "none.csv: No such file"),
        ({"languages": ("de", "en", "xx")}, "no language xx in it"),
        ({"shots": 500}, "lower --shots"),
        ({"model": str(tmp_path)}, "no modules.json and no config.json"),
        ({"checkpointing": True, "first_order": False}, "--checkpointing is for transformers"),
    ):
        with pytest.raises(UserError, match=said) as caught:
            trained(tmp_path / "run", replace(static, **changes))
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="has no unseen languages"):
        trained(tmp_path / "run", replace(ROTATIONS, unseen=("d",)))
    assert not list(tmp_path.iterdir())


# ---- precision


@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("model", ["rotations", "static", "tiny"])
def test_bf16(tmp_path: Path, request: pytest.FixtureRequest, model: str) -> None:
    """Mixed precision: other numbers than single precision, near them; weights stay single."""
    config = ROTATIONS if model == "rotations" else request.getfixturevalue(model)
    single = float(learner_of(config).step(0)["loss"])
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trained(tmp_path / "run", replace(config, precision="bf16", steps=2))
    assert all(value.dtype == torch.float32 for value in run.encoder.parameters())
    assert run.metrics[0]["loss"] == pytest.approx(single, rel=0.05)
    if model != "static":  # which only looks up and adds
        assert run.metrics[0]["loss"] != single


@pytest.mark.usefixtures("alone")
def test_another_precision(tmp_path: Path) -> None:
    """Accelerate keeps a process's first precision: another one is refused in our words, and nothing is written."""
    Accelerator(cpu=True)
    with pytest.raises(UserError, match="--precision is bf16, but this process has worked with no"):
        trained(tmp_path / "run", replace(ROTATIONS, precision="bf16"))
    assert not list(tmp_path.iterdir())


# ---- processes


def test_two_processes_train_the_same_objective(tmp_path: Path, static: Config, tiny: Config) -> None:
    """The gradients are those of one process: the alignment's sums run over all tasks, which do not divide evenly; a
    process without a task adds nothing. So are rows, the best weights of validations, and what is saved."""
    of = methods(replace(static, kd_lambda=5.0))
    runs = {
        **{name: of[name] for name in ("maml-align", "second-order", "meta-sgd", "after-teacher", "t-maml")},
        **{name: of[name] for name in ("reptile", "fine-tune", "fine-tune-apart", "clipped")},
        "validated": replace(static, validate_every=2, outer_lr=0.3),
        "one-task": replace(ROTATIONS, task_batch=1, kd_lambda=5.0),
        "one-static-task": replace(static, task_batch=1, kd_lambda=5.0, steps=2),
        "tiny": replace(tiny, kd_lambda=5.0),
        "one-tiny-task": replace(tiny, task_batch=1, kd_lambda=5.0, steps=2),
    }
    jobs = [(str(tmp_path / f"{name}-two"), dataclasses.asdict(config)) for name, config in runs.items()]
    testing.torchrun(2, str(SCRIPT), json.dumps(jobs))
    recorded = runpy.run_path(str(SCRIPT))["Recorded"]
    for name, config in runs.items():
        with recorded() as record:
            one = trained(tmp_path / f"{name}-one", config, every=4)
        seen = [np.load(tmp_path / f"{name}-two.{rank}.npz") for rank in (0, 1)]
        wanted = np.stack(record.gradients)
        for key in ("gradients", "weights"):
            assert np.array_equal(seen[0][key], seen[1][key]), (name, key)  # the processes never part
        scale = np.abs(wanted).max(1, keepdims=True)
        assert (np.abs(seen[0]["gradients"] - wanted) <= 1e-4 * scale).all(), name
        held = torch.cat([value.flatten() for value in weights(one).values()]).numpy()
        assert np.allclose(seen[0]["weights"], held, atol=1e-3), name
        rows = testing.rows(tmp_path / f"{name}-two")
        assert rows[0] == pytest.approx(one.metrics[0], rel=1e-4, abs=1e-7), name
        for row, other in zip(rows, one.metrics, strict=True):
            assert row == pytest.approx(other, rel=1e-2, abs=1e-4), name
    both = [load_file(tmp_path / f"maml-align-{n}" / "model" / "model.safetensors") for n in ("one", "two")]
    assert both[0].keys() == both[1].keys()
    assert all(torch.allclose(value, both[1][key], atol=1e-3) for key, value in both[0].items())
    assert load(tmp_path / "validated-two").metrics == testing.rows(tmp_path / "validated-two")


@pytest.mark.gpu
@pytest.mark.usefixtures("alone")
@pytest.mark.parametrize("model", ["rotations", "static", "tiny"])
def test_gpu(tmp_path: Path, request: pytest.FixtureRequest, model: str) -> None:
    """Losses on CUDA are the CPU's up to float error, and a bf16 run trains there and stays finite."""
    config = ROTATIONS if model == "rotations" else request.getfixturevalue(model)
    rows = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        learner = MetaLearner(replace(config, validate_every=1), training.data.load(config), Accelerator(cpu=cpu))
        rows.append([float(learner.step(step)["loss"]) for step in range(3)])
        assert next(learner.encoder.parameters()).is_cuda != cpu
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trained(tmp_path / "run", replace(config, precision="bf16", validate_every=2))
    assert next(run.encoder.parameters()).is_cuda
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
    if model == "rotations":
        from maml_align.evaluate import evaluate_world

        assert all(np.isfinite(value) for value in evaluate_world(run).values())
    else:
        assert np.isfinite(run.encoder.encode(["de first 1"])).all()  # type: ignore[union-attr]
    assert same(weights(load(run.folder)), weights(run))
