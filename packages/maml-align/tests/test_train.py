"""Training: every method, two processes, resuming, validation, what is saved."""

from __future__ import annotations

import dataclasses
import json
import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maml_align import train as training
from maml_align.config import Config
from maml_align.data import Data, Pairs
from maml_align.train import load, train, train_on
from metazoo import testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from safetensors.torch import load_file

torch.set_num_threads(1)
SCRIPT = Path(__file__).parent / "two_processes.py"
ROTATIONS = Config(
    dataset="rotations", model="linear", languages=("a", "b", "c"), unseen=(), dimension=4, shots=3, queries=3,
    inner_steps=2, inner_lr=0.5, steps=9, outer_lr=1e-2, task_batch=2,
)  # fmt: skip
KEYS = {
    "step", "loss", "teacher_query_loss", "student_support_loss", "student_query_loss", "alignment_loss", "kd_share",
    "distance", "grad_norm",
}  # fmt: skip


def pairs(folder: Path) -> Path:
    """Scored pairs of three languages in a file of one's own."""
    lines = ["sentence1,sentence2,score,language1,language2"]
    for one in ("de", "en", "es"):
        for other in ("de", "en", "es"):
            lines += [f"{one} first {i},{other} second {i + i % 3},{5 - i % 3},{one},{other}" for i in range(40)]
    path = folder / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def static(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Static vectors on scored pairs of three languages."""
    return Config(
        dataset=str(pairs(tmp_path_factory.mktemp("pairs"))), model="static", languages=("de", "en", "es"), unseen=(),
        width=4, vocabulary=300, shots=3, queries=3, inner_steps=2, inner_lr=0.5, steps=4, task_batch=3, outer_lr=1e-2,
    )  # fmt: skip


def trained(folder: Path, config: Config, **more: Any) -> training.Run:
    return train(config, RunOptions(output_dir=folder, log_every=1, checkpoint_every=2, **more))


def weights(run: training.Run) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in run.encoder.named_parameters()}


def methods(config: Config) -> dict[str, Config]:
    two = {"mode": "MONO_BIL"}
    return {
        "maml-align": config,
        "as-coded": replace(config, student_steps=0),
        "second-order": replace(config, first_order=False),
        "meta-sgd": replace(config, learn_inner_lr=True),
        "after-teacher": replace(config, teacher_steps=2),
        "t-maml": replace(config, method="maml", **two),  # type: ignore[arg-type]
        "reptile": replace(config, method="reptile", **two),  # type: ignore[arg-type]
        "fine-tune": replace(config, method="fine-tune"),
        "fine-tune-apart": replace(config, method="fine-tune", finetune_apart=True, finetune_sets="outer"),
    }


@pytest.mark.parametrize("name", sorted(methods(ROTATIONS)))
def test_methods(tmp_path: Path, name: str) -> None:
    """Every method runs, moves the weights, and logs a row a step."""
    config = replace(methods(ROTATIONS)[name], steps=3)
    run = trained(tmp_path / "run", config)
    before = weights(trained(tmp_path / "zero", replace(config, method="zero-shot", learn_inner_lr=False)))
    assert any(not torch.equal(value, before[key]) for key, value in weights(run).items())
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    if name in ("maml-align", "as-coded", "second-order", "meta-sgd"):
        assert all(set(row) == KEYS for row in run.metrics)


def test_zero_shot_changes_nothing(tmp_path: Path, static: Config) -> None:
    run = trained(tmp_path / "run", replace(static, method="zero-shot"))
    start = training.encoder_of(static, run.data)
    assert all(torch.equal(value, weights(run)[name]) for name, value in start.named_parameters())
    assert not run.metrics
    assert weights(load(tmp_path / "run")).keys() == weights(run).keys()


def test_finetune_apart_takes_a_step_for_each_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    held = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a, **k: (steps.append(1), held(self, *a, **k))[1])
    trained(tmp_path / "run", replace(ROTATIONS, method="fine-tune", finetune_apart=True, steps=2))
    assert len(steps) == 2 * 3


def test_learned_rates_move(tmp_path: Path) -> None:
    from accelerate import Accelerator

    learner = training.MetaLearner(
        replace(ROTATIONS, learn_inner_lr=True), training.data.load(ROTATIONS), Accelerator(cpu=True)
    )
    learner.step(0)
    rates = {name: value for name, value in learner.theta.items() if name.startswith("rate:")}
    assert rates
    assert all((value != ROTATIONS.inner_lr).any() for value in rates.values())


def test_twice_the_same(tmp_path: Path, static: Config) -> None:
    """A second run of the same config has the same rows and the same files."""
    one, two = (trained(tmp_path / name, static) for name in ("one", "two"))
    assert one.metrics == two.metrics
    model = Path("model") / "model.safetensors"
    assert (one.folder / model).read_bytes() == (two.folder / model).read_bytes()
    loaded = load(tmp_path / "one")
    assert all(torch.equal(value, weights(one)[name]) for name, value in weights(loaded).items())


def test_best_of_validations_is_kept(tmp_path: Path, static: Config) -> None:
    """The weights are those of the step with the least validation loss; TRANS is validated as BIL_MULTI."""
    config = replace(static, mode="TRANS", method="maml", validate_every=2, steps=6, outer_lr=0.3)
    run = trained(tmp_path / "run", config)
    scored = {row["step"]: row["validation_loss"] for row in run.metrics if "validation_loss" in row}
    assert list(scored) == [2, 4, 6]
    best = min(scored, key=scored.__getitem__)
    until = trained(tmp_path / "until", replace(config, steps=best))
    wanted = weights(until)
    assert all(torch.equal(value, wanted[name]) for name, value in weights(run).items())
    assert all(torch.equal(value, wanted[name]) for name, value in weights(load(tmp_path / "run")).items())


def test_two_processes_train_the_same_objective(tmp_path: Path, static: Config) -> None:
    """The gradients are those of one process: the alignment's sums run over all tasks, which do not divide evenly; a
    process without a task adds nothing."""
    runs = {
        "align": replace(static, kd_lambda=5.0),
        "second": replace(static, first_order=False, kd_lambda=5.0),
        "t-maml": replace(static, method="maml", mode="MONO_BIL"),
        "fine-tune": replace(static, method="fine-tune"),
        "one-task": replace(ROTATIONS, task_batch=1, steps=3, kd_lambda=5.0),
    }
    jobs = [(str(tmp_path / f"{name}-two"), dataclasses.asdict(config)) for name, config in runs.items()]
    testing.torchrun(2, SCRIPT, json.dumps(jobs))
    recorded = runpy.run_path(str(SCRIPT))["Recorded"]
    for name, config in runs.items():
        with recorded() as record:
            one = trained(tmp_path / f"{name}-one", config)
        seen = [np.load(tmp_path / f"{name}-two.{rank}.npz")["gradients"] for rank in (0, 1)]
        wanted = np.stack(record.gradients)
        assert np.array_equal(seen[0], seen[1]), name  # the processes never part
        assert np.abs(seen[0] - wanted).max() <= 1e-4 * np.abs(wanted).max(), name
        for row, other in zip(testing.rows(tmp_path / f"{name}-two"), one.metrics, strict=True):
            assert row == pytest.approx(other, rel=1e-2, abs=1e-4), name


def test_data_and_model_of_ones_own(tmp_path: Path, static: Config) -> None:
    """Data by hand, and the folder of a trained model as --model."""
    first = trained(tmp_path / "first", static)
    texts = {
        (one, one): (
            tuple(f"{one} {i}" for i in range(30)),
            tuple(f"{one} also {i}" for i in range(30)),
            np.arange(30) % 6,
        )
        for one in static.languages
    }
    part = Pairs(static.languages, texts, aligned=True)
    config = replace(static, model=str(first.folder / "model"))
    run = train_on(
        config, lambda config: Data("own", "pairs", part, part, part), RunOptions(output_dir=tmp_path / "own")
    )
    assert len(run.encoder.encode(["de 1", "en 2"])) == 2  # type: ignore[union-attr]


def test_saved_model_is_a_sentence_transformer(tmp_path: Path, static: Config) -> None:
    from sentence_transformers import SentenceTransformer

    run = trained(tmp_path / "run", static)
    theirs = SentenceTransformer(str(run.folder / "model"), device="cpu").encode(["de first 1", "en second 2"])
    assert np.allclose(theirs, run.encoder.encode(["de first 1", "en second 2"]), atol=1e-6)  # type: ignore[union-attr]
    assert load_file(run.folder / "model" / "model.safetensors")


def test_load_refuses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        load(tmp_path)
    trained(tmp_path / "run", replace(ROTATIONS, steps=2))
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 5'))
    with pytest.raises(UserError, match="is at step 2 of 5: finish it with --resume first"):
        load(tmp_path / "run")


def test_bf16(tmp_path: Path) -> None:
    """In a process of its own, as Accelerate keeps a precision."""
    code = (
        "import sys; from pathlib import Path; from dataclasses import replace; sys.path.insert(0, sys.argv[2])\n"
        "from test_faults import ROTATIONS; from maml_align.train import train\n"
        "from metazoo.options import RunOptions\n"
        "config, options = replace(ROTATIONS, precision='bf16', steps=2), RunOptions(output_dir=Path(sys.argv[1]))\n"
        "run = train(config, options)\n"
        "assert all(value.dtype.itemsize == 4 for value in run.encoder.parameters())\n"
    )
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run"), str(Path(__file__).parent)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["maml-align", "second-order"])
def test_gpu(tmp_path: Path, static: Config, name: str) -> None:
    """On a GPU, the same losses as on the CPU to float error."""
    run = trained(tmp_path / "run", methods(static)[name])
    assert next(run.encoder.parameters()).is_cuda
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
