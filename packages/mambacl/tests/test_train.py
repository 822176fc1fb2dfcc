"""Meta-training: data order, gradients over parts and processes, ablations, the run folder, evaluation, commands."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from mambacl import data
from mambacl.config import PRESETS, Config, EvaluateOptions, ForgettingOptions, GeneralizeOptions
from mambacl.data import EpisodeConfig
from mambacl.evaluate import (
    TEST,
    TRAIN,
    association_map,
    evaluate,
    forgetting,
    forgetting_matrix,
    forgotten,
    generalize,
    meta_test,
    references,
)
from mambacl.model import ContinualLearner
from mambacl.train import MambaCLLearner, build_model, load, parameter_groups, train
from metazoo import testing
from metazoo.errors import UserError
from metazoo.options import RunOptions

torch.set_num_threads(1)
SCRIPT = str(Path(__file__).with_name("two_processes.py"))
TINY = Config(width=8, blocks=2, steps=12, batch_size=6, warmup=3, decay_every=8, state_size=4, queries=2)
SINE = dataclasses.replace(
    TINY, dataset="sine", encoder="mlp", encoder_width=8, tasks=2, test_shots=2, queries=None, vocabulary=6
)  # fmt: skip
METHODS = ["mamba", "transformer", "linear_transformer", "performer", "oml", "prototype", "gemcl", "offline"]


def learner_of(config: Config, **changes: Any) -> MambaCLLearner:
    config = dataclasses.replace(config, **changes)
    return MambaCLLearner(config, data.load(config), Accelerator(cpu=True))


def gradient(learner: MambaCLLearner, step: int = 0) -> list[torch.Tensor]:
    learner.backward(*learner.draw(step), step)
    return [p.grad.clone() for p in learner.parameters if p.grad is not None]


def test_episodes_follow_from_seed_and_step() -> None:
    """The same step draws the same episodes, another step or seed others; never those of a meta-test."""
    one, again, later, other = (
        learner_of(TINY).draw(3)[0].x,
        learner_of(TINY).draw(3)[0].x,
        learner_of(TINY).draw(4)[0].x,
        learner_of(TINY, seed=1).draw(3)[0].x,
    )
    assert torch.equal(one, again)
    assert not torch.equal(one, later)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "offline"])
def test_accumulated_gradient_is_the_gradient(method: str) -> None:
    """One part or three: the same gradient and the same terms."""
    found = []
    for parts in (1, 3):
        learner = learner_of(TINY, method=method, accumulation=parts)
        terms = learner.backward(*learner.draw(0), 0)
        found.append((terms["loss"], *gradient(learner)))
    for one, many in zip(*found, strict=True):
        assert torch.allclose(one, many, rtol=1e-4, atol=1e-6)


def test_chunk_changes_no_gradient() -> None:
    grads = [gradient(learner_of(TINY, chunk=chunk)) for chunk in (3, 16)]
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(*grads, strict=True))


def test_lambda_zero_is_the_unregularised_run() -> None:
    """Check 4: with λ = 0, or after --selectivity-until, parameters move bit for bit as without the term."""

    def after(**changes: Any) -> list[torch.Tensor]:
        learner = learner_of(TINY, **changes)
        for step in range(3):
            learner.step(step)
        return [p.detach().clone() for p in learner.parameters]

    plain = after(selectivity=0.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, after(selectivity=5.0, selectivity_until=0), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(plain, after(selectivity=5.0), strict=True))


def test_objective_is_loss_plus_lambda_times_divergence() -> None:
    """loss = task loss + λ · mean over blocks (or the last one's) + the precursor's term, summed over blocks."""
    for changes in ({}, {"selectivity_blocks": "last"}, {"selectivity": 0.5}):
        terms = learner_of(TINY, **changes)
        row = terms.backward(*terms.draw(0), 0)
        divergence = row["selectivity"][-1] if changes.get("selectivity_blocks") else row["selectivity"].mean()
        wanted = row["task_loss"] + terms.config.selectivity * divergence
        assert row["loss"].item() == pytest.approx(wanted.item(), rel=1e-5)
    learner = learner_of(TINY, selectivity=0.0, task_attention=1.0, task_attention_until=5)
    first, last = (learner.backward(*learner.draw(0), step) for step in (0, 5))
    assert first["loss"] > first["task_loss"]
    assert last["loss"].item() == pytest.approx(last["task_loss"].item())


def test_distributed_queries_while_asked_for() -> None:
    """Up to the given step each query is asked after its own task or a later one; then none is."""
    learner = learner_of(TINY, distributed_until=2, queries=6)
    episode, after = learner.draw(1)
    assert after is not None
    assert (after >= episode.query_task).all()
    assert (after < 3).all()
    assert (after < 2).any()
    assert learner.draw(2)[1] is None
    assert learner.step(0)["loss"].isfinite()


def test_learning_rate() -> None:
    """Rises over the warm-up, then falls by --decay every --decay-every steps."""
    learner = learner_of(TINY)
    rates = [learner.step(step)["lr"] for step in range(10)]
    assert rates[:4] == pytest.approx([TINY.lr / 3, TINY.lr * 2 / 3, TINY.lr, TINY.lr])
    assert rates[8] == pytest.approx(TINY.lr * TINY.decay)


def test_no_decay_for_dynamics_norms_and_biases() -> None:
    """A_log, D, dt_proj's bias and norms keep their size; matrices, embeddings and convolutions decay."""
    model = build_model(TINY, data.load(TINY))
    kept = {id(p) for p in parameter_groups(model, 0.1)[1]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in kept}
    assert {"blocks.0.A_log", "blocks.0.D", "blocks.0.dt_proj.bias", "blocks.0.norm.weight"} <= names
    assert not any(name.endswith(("proj.weight", "encoder.net.1.weight", "label.weight")) for name in names)


@pytest.mark.parametrize("config", [TINY, SINE], ids=["classes", "sine"])
def test_two_processes_train_as_one(tmp_path: Path, config: Config) -> None:
    """Fault 8 over 50 steps: the same losses up to float error, and no drift; batch norm is one over both."""
    config = dataclasses.replace(config, steps=50, lr=1e-3)
    train(config, RunOptions(output_dir=tmp_path / "one", log_every=1, checkpoint_every=50))
    testing.torchrun(2, SCRIPT, str(tmp_path / "two"), json.dumps(dataclasses.asdict(config)))
    one, two = (testing.rows(tmp_path / name) for name in ("one", "two"))
    difference = np.array([a["loss"] - b["loss"] for a, b in zip(one, two, strict=True)])
    assert len(one) == 50
    assert np.abs(difference).max() < 1e-4
    assert abs(difference.mean()) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_is_evaluated(tmp_path: Path, method: str) -> None:
    """A run of each learner: files, rows, a finite score; sequence models have associations and a state."""
    config = dataclasses.replace(TINY, method=method, offline_steps=3)
    run = train(config, RunOptions(output_dir=tmp_path / "run", log_every=4))
    found = evaluate(run, EvaluateOptions(episodes=20))
    assert 0 <= found["accuracy"] <= 100
    assert found["chance"] == pytest.approx(100 / 3)
    assert len(found["accuracy_by_task"]) == 3
    for name in ("config.json", "environment.json", "checkpoints", "evaluation.json", "by_task.png"):
        assert (run.folder / name).exists(), name
    sequence = isinstance(run.model, ContinualLearner)
    assert ("state_bytes" in found) == sequence == (run.folder / "associations.png").exists()
    if sequence:
        assert len(run.metrics[-1]["selectivity"]) == 2
        again = ContinualLearner.from_pretrained(run.folder / "model").eval()
        episode = run.data.test.draw(3, torch.Generator().manual_seed(0), EpisodeConfig.from_config(config))
        assert torch.equal(again(episode).prediction, run.model(episode).prediction)
    assert ("delta_p95" in run.metrics[-1] if run.metrics else False) == (method == "mamba")
    assert load(run.folder).config == config


def test_vectors_are_scored_by_their_error(tmp_path: Path) -> None:
    """Sine: mean squared error, beside that of answering 0 (0.5417 on average)."""
    run = train(SINE, RunOptions(output_dir=tmp_path / "run"))
    found = evaluate(run, EvaluateOptions(episodes=100, plots=False))
    assert found["mse"] > 0
    assert found["answer_zero"] == pytest.approx(0.5417, abs=0.06)
    assert "chance" not in found


def test_meta_test_is_the_same_for_all_and_leaves_no_trace() -> None:
    """Fixed episodes by (seed, setting); training mode and random states are as before."""
    learner = learner_of(TINY)
    learner.model.train()
    state = torch.get_rng_state()
    one = meta_test(learner.model, learner.source.test, learner.setting, 7)
    assert learner.model.training
    assert torch.equal(state, torch.get_rng_state())
    again = meta_test(learner.model, learner.source.test, learner.setting, 7)
    assert np.array_equal(one.values, again.values)
    other = meta_test(learner.model, learner.source.test, learner.setting, 7, held=TRAIN)
    assert not np.array_equal(one.tasks, other.tasks)


def test_curve_during_training(tmp_path: Path) -> None:
    """--eval-every: a meta-test in the row of its step, and no other course of training for it."""
    curved = train(
        dataclasses.replace(TINY, eval_every=4, eval_episodes=5), RunOptions(output_dir=tmp_path / "a", log_every=4)
    )
    plain = train(TINY, RunOptions(output_dir=tmp_path / "b", log_every=4))
    assert all("meta_test_accuracy" in row for row in curved.metrics)
    assert [row["loss"] for row in curved.metrics] == [row["loss"] for row in plain.metrics]


def test_curve_is_of_episodes_that_no_other_curve_has() -> None:
    """meta_test by the seeds of TEST, which all evaluations share; meta_train by those of TRAIN, as in evaluate()."""
    learner = learner_of(TINY, eval_every=1, eval_episodes=20)
    row = learner.step(0)
    for name, episodes, held in (("train", learner.source.train, TRAIN), ("test", learner.source.test, TEST)):
        score = meta_test(learner.model, episodes, learner.setting, 20, held=held)
        assert row[f"meta_{name}_accuracy"] == score.mean
    other = meta_test(learner.model, learner.source.train, learner.setting, 20, held=TEST)
    assert row["meta_train_accuracy"] != other.mean


def test_curve_that_would_be_lost(tmp_path: Path) -> None:
    """A meta-test at a step that has no row is refused before anything is written; the last step always has one."""
    for changes in ({"eval_every": 3}, {"eval_every": 6}):
        with pytest.raises(UserError, match=r"--eval-every is [36], --log-every 4"):
            train(dataclasses.replace(TINY, **changes), RunOptions(output_dir=tmp_path / "run", log_every=4))
    assert not list(tmp_path.iterdir())
    config = dataclasses.replace(TINY, steps=6, eval_every=6, eval_episodes=5)
    run = train(config, RunOptions(output_dir=tmp_path / "run", log_every=4))
    assert ["meta_test_accuracy" in row for row in run.metrics] == [False, True]
    train(dataclasses.replace(config, method="offline", eval_every=3), RunOptions(output_dir=tmp_path / "offline"))


def test_untrained_is_at_chance_over_codes() -> None:
    """Check 7: random codes for every episode, so an untrained learner is right once in 6."""
    learner = learner_of(TINY)
    score = meta_test(learner.model, learner.source.test, learner.setting, 1000)
    spread = 100 * np.sqrt(1 / 6 * 5 / 6 / score.values.size)
    assert abs(score.mean - 100 / 6) < 4 * spread


def test_nearest_class_mean_is_nearly_always_right() -> None:
    source = data.load(TINY)
    found = references(source.test, EpisodeConfig.from_config(TINY), 300, 6)
    assert found["nearest_class_mean"] > 99


def test_forgetting_by_hand() -> None:
    """Mean over all tasks but the last of best before − at the end; for losses the other way round."""
    matrix = np.array([[90, np.nan, np.nan], [80, 70, np.nan], [60, 75, 50]], dtype=float)
    assert forgotten("accuracy", matrix) == pytest.approx((30 + -5) / 2)
    assert forgotten("mse", matrix) == pytest.approx((60 - 80 + 75 - 70) / 2)


def test_forgetting_matrix_ends_with_the_meta_test() -> None:
    """After all tasks: the meta-test's own scores by task; before a task was seen: nothing."""
    learner = learner_of(TINY)
    metric, matrix = forgetting_matrix(learner.model, learner.source.test, learner.setting, 30)
    whole = meta_test(learner.model, learner.source.test, dataclasses.replace(learner.setting, queries=None), 30)
    assert metric == "accuracy"
    assert matrix[-1] == pytest.approx(whole.by_task())
    assert np.isnan(matrix[0, 1:]).all()


def test_association_map() -> None:
    """Rows of shares that sum to 1, a row a task, two tokens an example."""
    learner = learner_of(TINY)
    found = association_map(learner.model, learner.source.test, learner.setting, count=10)
    assert found.shape == (3, 12)
    assert np.allclose(found.sum(1), 1, atol=1e-5)


def test_commands(tmp_path: Path) -> None:
    """generalize and forgetting: figures, files and pictures; what the run cannot do is one line."""
    train(TINY, RunOptions(output_dir=tmp_path / "run"))
    found = generalize(
        GeneralizeOptions(run=tmp_path / "run", tasks=(2, 6), shots=(1, 3), noise=(0.0, 2.0), episodes=10)
    )
    assert set(found) == {
        f"accuracy {name}" for name in ("tasks=2", "tasks=6", "shots=1", "shots=3", "noise=0", "noise=2")
    }
    found = forgetting(ForgettingOptions(run=tmp_path / "run", episodes=10))
    assert {"accuracy_after_1_tasks", "accuracy_after_3_tasks", "accuracy_by_lag", "forgetting"} <= set(found)
    for name in ("generalization.json", "generalization.png", "forgetting.json", "forgetting.png", "training.png"):
        assert (tmp_path / "run" / name).stat().st_size > 0, name
    assert len(json.loads((tmp_path / "run" / "forgetting.json").read_text())["accuracy_by_lag"]) == 3
    with pytest.raises(UserError, match="vocabulary"):
        generalize(GeneralizeOptions(run=tmp_path / "run", tasks=(7,), episodes=2))
    with pytest.raises(UserError, match="nothing to forget"):
        forgetting(ForgettingOptions(run=tmp_path / "run", tasks=1))


@pytest.mark.parametrize("preset", list(PRESETS))
def test_presets_build(preset: str) -> None:
    """Every preset's learner can be built; at the paper's scale on stand-ins of its data's shape."""
    config = PRESETS[preset]
    shapes = {"omniglot": (1, 32, 32), "cifar100": (3, 32, 32), "casia": (1, 32, 32), "sine": (50,)}
    if config.dataset in shapes:
        kind = {"rotation": "angle", "completion": "image"}.get(config.variant, "class" if config.classes else "vector")
        shape = (512,) if config.frozen else shapes[config.dataset]
        outputs = {"angle": 2, "image": 512, "vector": 50, "class": 0}[kind]
        if kind == "image":
            shape = (1, 16, 32)
        episodes = _Stand(kind, shape, outputs, EpisodeConfig.from_config(config))
        source = data.Data("stand-in", episodes, episodes)
    else:
        source = data.load(config)
    model = build_model(config, source)
    if preset == "paper":  # the paper's 5.4 million, with one symbol a task and 3 blocks
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(6.6e6, rel=0.05)


class _Stand(data.Episodes):
    """The shape of a data set that is not here."""

    def draw(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("nothing is drawn")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tasks": 7}, "vocabulary"), ({"shots": 0}, "--shots is 0"), ({"selectivity": -1.0}, "--selectivity"),
        ({"method": "prototype", "dataset": "sine"}, "classes only"), ({"width": 7}, "even number"),
        ({"experts": 2, "method": "performer"}, "--experts"), ({"lr": 0.0}, "--lr"),
        ({"association": "full", "method": "transformer"}, "--association"), ({"queries": 0}, "--queries"),
        ({"dropout": 1.0}, "--dropout"), ({"seed": -1}, "--seed"), ({"steps": -1}, "--steps"),
    ],
)  # fmt: skip
def test_config_refuses(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        dataclasses.replace(TINY, **changes)
    assert "\n" not in str(caught.value)


def test_too_few_episodes_for_the_parts() -> None:
    with pytest.raises(UserError, match="--batch-size"):
        learner_of(TINY, accumulation=7)


@pytest.mark.parametrize(
    "changes", [{}, {"dataset": "sine", "encoder": "linear"}, {"dataset": "sine", "method": "oml"}]
)
def test_batch_norm_has_two_values(changes: dict[str, Any]) -> None:
    """The smallest episode, alone in its part: trains where only examples are normalised, for a query comes with it;
    a vector's label stands alone, and is refused before the first step."""
    smallest = {"encoder": "mlp", "tasks": 1, "shots": 1, "queries": 1, "batch_size": 2, "accumulation": 2}
    if changes.get("encoder") != "linear":
        assert learner_of(TINY, **smallest | changes).step(0)["loss"].isfinite()
        return
    with pytest.raises(UserError, match="batch norm") as caught:
        learner_of(TINY, **smallest | changes)
    assert "\n" not in str(caught.value)
    for more in ({"batch_size": 4}, {"accumulation": 1}, {"tasks": 2}, {"shots": 2}):
        assert learner_of(TINY, **smallest | changes | more).step(0)["loss"].isfinite()


def test_another_precision(tmp_path: Path) -> None:
    """Accelerate keeps a process's first precision: another one is refused in our words, and nothing is written."""
    Accelerator(cpu=True)
    with pytest.raises(UserError, match="--precision is bf16, but this process has worked with no"):
        train(dataclasses.replace(TINY, precision="bf16"), RunOptions(output_dir=tmp_path / "run"))
    assert not list(tmp_path.iterdir())


def test_unfinished_and_foreign_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        load(tmp_path)


@pytest.mark.gpu
def test_gpu(tmp_path: Path) -> None:
    """The gradient on CUDA is the CPU's up to float error, and a bf16 run stays finite."""
    grads = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        learner = MambaCLLearner(TINY, data.load(TINY), Accelerator(cpu=cpu))
        grads.append(torch.cat([g.flatten().cpu() for g in gradient(learner)]))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = train(dataclasses.replace(TINY, precision="bf16"), RunOptions(output_dir=tmp_path / "run", log_every=1))
    assert next(run.model.parameters()).is_cuda
    assert all(np.isfinite(row["loss"]) for row in run.metrics)


def test_bf16(tmp_path: Path) -> None:
    """Mixed precision on the CPU: the first loss within 5 % of float32's; weights stay float32."""
    losses = []
    for precision in ("no", "bf16"):
        AcceleratorState._reset_state(reset_partial_state=True)
        run = train(
            dataclasses.replace(TINY, precision=precision), RunOptions(output_dir=tmp_path / precision, log_every=1)
        )
        losses.append(run.metrics[0]["loss"])
        assert all(p.dtype == torch.float32 for p in run.model.parameters())
    AcceleratorState._reset_state(reset_partial_state=True)
    assert losses[1] != losses[0]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
