"""The loop: two processes and accumulation train as one (faults 8 and 9), rows, refusals, trackers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from metazoo import checkpoint, loop, runfolder, testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from toy_method import Config, train

SCRIPT = str(Path(__file__).with_name("two_processes.py"))


def _losses(folder: Path) -> torch.Tensor:
    return torch.tensor([row["loss"] for row in testing.rows(folder)])


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Fault 8: the same ids in the same order; over 50 steps the losses differ by float error, without a drift."""
    train(Config(steps=50, dropout=0.0), RunOptions(output_dir=tmp_path / "one", log_every=1, checkpoint_every=10))
    testing.torchrun(2, SCRIPT, str(tmp_path / "two"), "50")
    one, two = tmp_path / "one", tmp_path / "two"
    assert [row["ids"] for row in testing.rows(one)] == [row["ids"] for row in testing.rows(two)]
    difference = _losses(two) - _losses(one)
    assert difference.abs().max() < 1e-5
    assert difference.mean().abs() < 1e-6


def test_resumed_on_another_number_of_processes(tmp_path: Path) -> None:
    """Fault 9: 30 steps on one process, 20 more on two: the ids go on as they would have on one."""
    options = RunOptions(output_dir=tmp_path / "mixed", log_every=1, checkpoint_every=10)
    config = Config(steps=50, dropout=0.0)
    train(config, RunOptions(output_dir=tmp_path / "one", log_every=1, checkpoint_every=10))
    child = testing.Child(testing.Training("toy_method:train", config, checkpoint_every=10), tmp_path / "mixed")
    child.wait_for_row(31)
    child.kill()
    testing.torchrun(2, SCRIPT, str(options.output_dir), "50", "resume")
    one, mixed = tmp_path / "one", tmp_path / "mixed"
    assert [row["ids"] for row in testing.rows(one)] == [row["ids"] for row in testing.rows(mixed)]
    assert (_losses(one) - _losses(mixed)).abs().max() < 1e-5


def test_accumulation_leaves_the_trajectory(tmp_path: Path) -> None:
    """Fault 8: a batch of 8 at once or in 8 parts."""
    for parts in (1, 8):
        config = Config(steps=50, dropout=0.0, accumulation=parts)
        train(config, RunOptions(output_dir=tmp_path / str(parts), log_every=1, checkpoint_every=50))
    difference = _losses(tmp_path / "8") - _losses(tmp_path / "1")
    assert difference.abs().max() < 1e-5
    assert difference.mean().abs() < 1e-6


def test_same_seed_same_bits(tmp_path: Path) -> None:
    """A second run of the same config and seed ends with the same bits."""
    for name in ("a", "b"):
        train(Config(), RunOptions(output_dir=tmp_path / name, log_every=1, checkpoint_every=12))
    testing.assert_same_run(tmp_path / "a", tmp_path / "b")


def test_share_covers_the_batch_once() -> None:
    """Whatever the number of parts, each item is in exactly one; more parts than items leave no empty one."""
    accelerator = Accelerator(cpu=True)
    for parts in (1, 2, 3, 8, 11):
        split = loop.share(torch.arange(8), accelerator, parts)
        assert sorted(torch.cat(split).tolist()) == list(range(8))
        assert all(len(part) for part in split)


def test_nan_stops_the_run_in_one_line(tmp_path: Path) -> None:
    """A learning rate that explodes ends with a UserError that names value, step and folder; no NaN is saved."""
    options = RunOptions(output_dir=tmp_path / "run", log_every=1, checkpoint_every=5)
    with pytest.raises(UserError, match=r"loss became (nan|inf) at step \d+") as error:
        train(Config(lr=1e30, dropout=0.0), options)
    assert "\n" not in str(error.value)
    for path in checkpoint.listing(tmp_path / "run" / "checkpoints"):
        checkpoint.read(path)


def test_folder_is_refused_without_resume(tmp_path: Path) -> None:
    train(Config(steps=2), RunOptions(output_dir=tmp_path / "run"))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="already holds a run"):
        train(Config(steps=2), RunOptions(output_dir=tmp_path / "run"))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_no_folder_can_be_made(tmp_path: Path) -> None:
    """A file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write in .*file/run"):
        train(Config(steps=2), RunOptions(output_dir=tmp_path / "file" / "run"))


def test_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    options = RunOptions(output_dir=tmp_path / "run", log_every=1)
    train(Config(steps=4), options)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(Config(steps=4), RunOptions(output_dir=tmp_path / "run", log_every=1, resume=True))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_environment_tells_what_ran(tmp_path: Path) -> None:
    train(Config(steps=2), RunOptions(output_dir=tmp_path / "run"))
    told = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {"python", "torch", "metazoo"} <= set(told["versions"])
    assert told["sessions"][0]["processes"] == 1
    assert told["sessions"][0]["seconds"] > 0


def test_missing_tracker_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--report-to clearml: not installed"):
        train(Config(steps=2), RunOptions(output_dir=tmp_path / "run", report_to=("clearml",)))


def test_metrics_survive_a_broken_last_line(tmp_path: Path) -> None:
    """A kill inside a write leaves half a row; it is left out, and half a row in the middle is an error."""
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [row["step"] for row in runfolder.read_metrics(path)] == [1, 2]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        list(runfolder.read_metrics(path))


def test_row_that_a_full_disk_refuses_is_reported_once(tmp_path: Path) -> None:
    """The folder closes after it: what is left of the row in the buffer is no second error."""
    folder = runfolder.RunFolder(tmp_path / "run", Config())
    folder.metrics_path.symlink_to("/dev/full")
    with pytest.raises(UserError, match="cannot write"):
        folder.log({"step": 1, "loss": 0.5})
    folder.close()
    again = runfolder.RunFolder(tmp_path / "run", Config(), resume=True)  # the lock was given back
    again.close()
