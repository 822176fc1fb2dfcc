"""Commands on a finished run: what they take by default, what they refuse before they compute, other data, lags."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mambacl import data, evaluate
from mambacl.config import PRESETS, Config, ForgettingOptions, GeneralizeOptions
from mambacl.data import ClassEpisodes, EpisodeConfig, FeatureEpisodes, SineEpisodes
from mambacl.evaluate import by_lag, forgetting, forgetting_matrix, generalize, limits, meta_test
from mambacl.train import Run, build_model, load, train
from metazoo import cli
from metazoo.errors import UserError
from metazoo.options import RunOptions

torch.set_num_threads(1)
TINY = Config(width=8, blocks=1, steps=2, batch_size=4, state_size=4, queries=1)


def table(path: Path, classes: int, each: int, columns: int = 8) -> Path:
    rng = np.random.default_rng(0)
    np.savez(path, x=rng.normal(size=(classes * each, columns)), y=np.arange(classes).repeat(each))
    return path


def trained(folder: Path, **changes: Any) -> Path:
    return train(dataclasses.replace(TINY, **changes), RunOptions(output_dir=folder)).folder


def varied(found: dict[str, Any], name: str) -> list[str]:
    return [key.split("=")[1] for key in found if f" {name}=" in key]


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every meta-test."""
    calls: list[int] = []
    real = evaluate.meta_test

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(evaluate, "meta_test", counting)
    return calls


@pytest.mark.parametrize("preset", ["small", "sine", "omniglot"])
def test_generalize_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str) -> None:
    """Values of every preset that has its data here: from the run's own T and S to what is there."""
    config = dataclasses.replace(PRESETS[preset], width=8, encoder_width=4)
    source = data.load(config)
    run = Run(tmp_path, config, build_model(config, source), source, [])
    monkeypatch.setattr(evaluate, "load", lambda folder: run)
    found = generalize(GeneralizeOptions(run=tmp_path, noise=(0.0,), episodes=2))
    tasks, shots = {
        "small": (["3", "4", "5", "6"], ["2", "4", "6", "8"]),
        "sine": (["5", "10", "15", "20"], ["5", "10", "15", "20"]),
        "omniglot": (["5"], ["2", "4", "6", "8"]),
    }[preset]
    assert varied(found, "tasks") == tasks
    assert varied(found, "shots") == shots


def test_generalize_by_default_within_a_small_set(tmp_path: Path) -> None:
    """4 classes of 6 examples are kept: T to 4 of 9 symbols, S to 5, as one is asked."""
    own = table(tmp_path / "own.npz", 8, 6)
    run = trained(tmp_path / "run", dataset=str(own), meta_test_classes=4, tasks=2, vocabulary=9)
    found = generalize(GeneralizeOptions(run=run, noise=(), episodes=2))
    assert varied(found, "tasks") == ["2", "3", "4"]
    assert varied(found, "shots") == ["2", "4"]
    assert "accuracy noise=0" not in found


def test_generalize_refuses_before_it_computes(tmp_path: Path, counted: list[int]) -> None:
    """A value that the run cannot have, after ones that it can: one line with the limit, and nothing is computed."""
    own = table(tmp_path / "own.npz", 8, 6)
    run = trained(tmp_path / "run", dataset=str(own), meta_test_classes=4, tasks=2, vocabulary=9)
    small = trained(tmp_path / "small")
    for folder, changes, words in (
        (run, {"tasks": (2, 5)}, "--tasks is 5: give at most 4, as 4 classes"),
        (run, {"shots": (2, 6)}, "--shots is 6: give at most 5, as the smallest class has 6 examples"),
        (small, {"tasks": (3, 7)}, "--tasks is 7: give at most 6, as the run's --vocabulary has 6"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            generalize(GeneralizeOptions(run=folder, **changes))
        assert "\n" not in str(caught.value)
    assert not counted
    assert not list(tmp_path.glob("*/generalization.*"))


def test_limits() -> None:
    """Symbols and classes bound T, examples S; a sine has no bound, and other answers than codes need no symbols."""
    setting = EpisodeConfig(tasks=2, shots=1, test_shots=2, vocabulary=3)
    x, y = torch.randint(0, 255, (20, 1, 4, 4), dtype=torch.uint8), torch.arange(20) % 5
    assert [limit for limit, _ in limits(ClassEpisodes(x, y, setting), setting).values()] == [3, 2]
    assert [limit for limit, _ in limits(data.RotationEpisodes(x, y, setting), setting).values()] == [5, 2]
    assert [limit for limit, _ in limits(FeatureEpisodes(2, 0.1, setting), setting).values()] == [3, np.inf]
    assert [limit for limit, _ in limits(SineEpisodes(setting), setting).values()] == [np.inf, np.inf]


def test_another_data_set(tmp_path: Path, counted: list[int]) -> None:
    """All classes of the other set, in streams of the run's own; beside the run's own meta-test."""
    folder = trained(tmp_path / "run")
    other = table(tmp_path / "other.npz", 5, 4)
    found = generalize(GeneralizeOptions(run=folder, tasks=(), shots=(), noise=(), dataset=str(other), episodes=30))
    run = load(folder)
    stored = np.load(other)
    setting = EpisodeConfig(tasks=3, shots=2, vocabulary=6)
    whole = ClassEpisodes(torch.from_numpy(stored["x"]).float(), torch.from_numpy(stored["y"]), setting)
    assert found == {
        "accuracy dataset=own": meta_test(run.model, run.data.test, setting, 30).mean,
        f"accuracy dataset={other}": meta_test(run.model, whole, setting, 30).mean,
    }
    assert found == json.loads((folder / "generalization.json").read_text())
    assert (folder / "generalization.png").stat().st_size > 0
    counted.clear()
    few, short, wide = (table(tmp_path / f"{i}.npz", *size) for i, size in enumerate(((2, 4), (5, 2), (5, 4, 7))))
    for name, words in (
        (str(few), "the run's --tasks is 3, here it can be at most 2"),
        (str(short), "the run's --shots is 2, here it can be at most 1"),
        (str(wide), r"shape \(7,\), the run's \(8,\)"),
        ("features", "what the run was trained on"),
        ("sine", "another kind of answer"),
        ("omniglot20", "--image-size"),
        ("nowhere", "unknown data set"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            generalize(GeneralizeOptions(run=folder, dataset=name))
        assert "\n" not in str(caught.value)
    assert not counted
    with pytest.raises(UserError, match="belong to --dataset"):
        GeneralizeOptions(target="y")


def test_answers_that_are_no_numbers() -> None:
    """Noise that no float32 holds: refused, not scored."""
    source = data.load(TINY)
    setting = EpisodeConfig(tasks=3, shots=2, vocabulary=6, noise=1e39)
    with pytest.raises(UserError, match="NaN or infinite"):
        meta_test(build_model(TINY, source), source.test, setting, 2)


def test_by_lag_by_hand() -> None:
    """Lag 0: the diagonal; lag 2 of three tasks: the oldest at the end."""
    matrix = np.array([[90, np.nan, np.nan], [80, 70, np.nan], [60, 75, 50]], dtype=float)
    assert by_lag(matrix) == pytest.approx([70, 77.5, 60])


def test_lags_of_a_run(tmp_path: Path) -> None:
    """The file and what is returned hold a number for each lag; the longest is the oldest task's at the end."""
    folder = trained(tmp_path / "run")
    found = forgetting(ForgettingOptions(run=folder, tasks=4, episodes=20))
    run = load(folder)
    _, matrix = forgetting_matrix(run.model, run.data.test, EpisodeConfig(tasks=4, shots=2, vocabulary=6), 20)
    assert found["accuracy_by_lag"] == by_lag(matrix)
    assert found["accuracy_by_lag"][3] == matrix[3, 0]
    assert json.loads((folder / "forgetting.json").read_text())["accuracy_by_lag"] == found["accuracy_by_lag"]


def test_wrong_input_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """evaluate, generalize and forgetting by the command line: exit status 2 and one line that names what is wrong."""
    from mambacl.cli import COMMANDS

    run, nowhere, unfinished = str(trained(tmp_path / "run")), str(tmp_path / "none"), tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "config.json").write_text((tmp_path / "run" / "config.json").read_text())
    for arguments, words in (
        (["evaluate"], "run folder"),
        (["evaluate", nowhere], "not a run folder"),
        (["evaluate", str(unfinished)], "no checkpoint"),
        (["evaluate", run, "--episodes", "1"], "--episodes is 1"),
        (["generalize", "--run", nowhere], "not a run folder"),
        (["generalize", "--run", str(unfinished)], "no checkpoint"),
        (["generalize", "--run", run, "--tasks", "3", "0"], "--tasks is 0"),
        (["generalize", "--run", run, "--shots", "0"], "--shots is 0"),
        (["generalize", "--run", run, "--noise", "-1"], "--noise is -1"),
        (["generalize", "--run", run, "--noise", "nan"], "--noise is nan"),
        (["generalize", "--run", run, "--noise", "inf"], "--noise is inf"),
        (["generalize", "--run", run, "--episodes", "1"], "--episodes is 1"),
        (["generalize", "--run", run, "--tasks", "7"], "--tasks is 7"),
        (["forgetting", "--run", nowhere], "not a run folder"),
        (["forgetting", "--run", str(unfinished)], "no checkpoint"),
        (["forgetting", "--run", run, "--tasks", "0"], "--tasks is 0"),
        (["forgetting", "--run", run, "--tasks", "1"], "--tasks 2 or more"),
        (["forgetting", "--run", run, "--tasks", "7"], "6 symbols"),
        (["forgetting", "--run", run, "--episodes", "1"], "--episodes is 1"),
    ):
        with pytest.raises(SystemExit) as stopped:
            cli.run("mambacl", COMMANDS, arguments)
        lines = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2, arguments
        assert len(lines) == 1, lines
        assert words in lines[0], (arguments, lines)
