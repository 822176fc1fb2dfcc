"""Evaluation, the sub-commands, plots, and the baselines that are no setting of the loop."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from list_selftrain import baselines, cli, data, metrics, plots
from list_selftrain.config import Config, EvaluateOptions, ExportOptions, ReweightOptions
from list_selftrain.data import Data, Part
from list_selftrain.evaluate import evaluate, export_adapter, reweight_demo
from list_selftrain.ipet import ipet, next_set
from list_selftrain.model import PromptClassifier
from list_selftrain.train import Run, score, train
from metazoo.errors import UserError
from metazoo.options import RunOptions

torch.set_num_threads(1)
FEATURES = Config(
    model="features", shots=20, svd=10, hidden=8, sessions=2, session_steps=20, teacher_epochs=5, finetune_epochs=1,
    max_unlabelled=200, max_test=100,
)  # fmt: skip
TINY = dataclasses.replace(
    FEATURES, model="tiny", width=8, heads=2, layers=1, feedforward=8, vocabulary=300, pretrain_steps=0, adapter_dim=2,
    session_steps=4, teacher_epochs=1, max_length=64,
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(FEATURES, RunOptions(output_dir=tmp_path_factory.mktemp("features") / "run"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(TINY, RunOptions(output_dir=tmp_path_factory.mktemp("tiny") / "run"))


def command(*arguments: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.run("list-selftrain", cli.COMMANDS, list(arguments))
    assert stop.value.code == 0


def test_evaluate(features: Run) -> None:
    """All figures, the file and the pictures; the last session's accuracy is the run's."""
    found = evaluate(features.folder)
    assert set(found) == {
        "accuracy", "macro_f1", "chance", "calibration_error", "teacher_accuracy", "session_1_accuracy",
        "session_2_accuracy", "pseudo_label_accuracy", "zero_weights", "effective_examples", "weight_separation",
        "tfidf_accuracy", "tfidf_self_training_accuracy", "trained_parameters", "parameters",
    }  # fmt: skip
    assert found["accuracy"] == pytest.approx(found["session_2_accuracy"], abs=1e-4)
    assert found["trained_parameters"] == found["parameters"] == 10 * 8 + 8 + 8 * 2 + 2
    assert found == json.loads((features.folder / "evaluation.json").read_text())
    for name in ("calibration.png", "weights.png", "training.png"):
        assert (features.folder / name).stat().st_size > 5000


def test_evaluate_without_extras(features: Run) -> None:
    (features.folder / "calibration.png").unlink(missing_ok=True)
    found = evaluate(features, EvaluateOptions(baselines=False, plots=False))
    assert "tfidf_accuracy" not in found
    assert not (features.folder / "calibration.png").exists()


def test_evaluate_needs_test_rows(tmp_path: Path) -> None:
    lines = [f"the film number {i} is {word},{k}" for i in range(20) for k, word in enumerate(("bad", "good"))]
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    run = train(
        dataclasses.replace(FEATURES, dataset=str(tmp_path / "own.csv")), RunOptions(output_dir=tmp_path / "run")
    )
    assert all("accuracy" not in session for session in run.sessions)
    with pytest.raises(UserError, match="without test rows: give them to `train` with --test"):
        evaluate(run)


def test_export_adapter(tmp_path: Path, tiny: Run, features: Run) -> None:
    """What is written gives the run's logits, bit for bit; a network on features has nothing of the kind."""
    said = export_adapter(ExportOptions(run=tiny.folder, output=tmp_path / "out"))
    assert "PromptClassifier.from_pretrained" in said
    again = PromptClassifier.from_pretrained(tmp_path / "out")
    assert again.labels == ("negative", "positive")
    test = tiny.data.test
    assert test is not None
    found = [score(model, model.encode(test), range(len(test))) for model in (tiny.model, again)]
    assert torch.equal(*found)
    with pytest.raises(UserError, match="no prompted classifier"):
        export_adapter(ExportOptions(run=features.folder, output=tmp_path / "none"))


def test_reweight_demo(tmp_path: Path) -> None:
    """Flipped labels are as many as asked for and get less weight; the re-weighted student is better."""
    found = reweight_demo(ReweightOptions(noise_rate=0.7, output_dir=tmp_path))
    truth = data.load(Config(model="features", noise="class", noise_rate=0.7)).unlabelled.labels
    assert truth is not None
    assert found["flipped"] == pytest.approx(100 * round(0.7 * truth.sum()) / len(truth), abs=0.01)
    assert found["weight_separation"] > 0.55
    assert found["mean_weight_wrong"] < 0.9 * found["mean_weight_right"]
    assert found["meta_accuracy"] > found["uniform_accuracy"] + 10
    assert Path(found["plot"]).stat().st_size > 5000


def test_predict_and_evaluate_commands(tmp_path: Path, tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    command("evaluate", str(tiny.folder), "--no-baselines", "--no-plots")
    assert "calibration_error" in capsys.readouterr().out
    out = tmp_path / "out.csv"
    command("predict", "--run", str(tiny.folder), "--texts", "a dull plot", "a great cast", "--output", str(out))
    shown = capsys.readouterr().out
    assert "a dull plot" in shown
    assert len(out.read_text().splitlines()) == 3
    (tmp_path / "texts.txt").write_text("one text\n\nanother\n")
    command("predict", "--run", str(tiny.folder), "--file", str(tmp_path / "texts.txt"))
    assert "another" in capsys.readouterr().out


def test_wrong_input(tmp_path: Path, tiny: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, status 2, nothing written."""
    (tmp_path / "latin.txt").write_bytes(b"a caf\xe9\n")
    (tmp_path / "own.csv").write_text("text,label\na film,1\n")
    folder = ["--output-dir", str(tmp_path / "run")]
    for arguments, words in (
        (["train", "huge"], "unknown preset"),
        (["train", "--sesions", "2"], "--sesions"),
        (["train", "--sessions", "-1", *folder], "--sessions is -1: give 0 or more"),
        (["train", "--lr", "nan", *folder], "--lr is nan: give a number above 0"),
        (["train", "--dataset", "nothing", *folder], "unknown data set"),
        (["train", "--dataset", str(tmp_path / "none.csv"), *folder], "none.csv"),
        (["train", "--dataset", str(tmp_path / "own.csv"), *folder], "all labels are '1'"),
        (["train", "--dataset", "subj", "--data-dir", str(tmp_path / "none"), *folder], "not a folder"),
        (["train", "--words", "good", *folder], "1 label words for the 2 classes"),
        (["train", "--words", "very good", "bad", "--pretrain-steps", "0", *folder], "is not one token"),
        (["train", "--template", "*cls**sent_0*_It_was.*sep+*", *folder], "has 0 masks"),
        (["train", "--unlabelled", str(tmp_path / "latin.txt"), *folder], "line 1: not UTF-8"),
        (["train", "--max-unlabelled", "5", *folder], "fewer than --unlabelled-batch 16"),
        (["train", "--model", str(tmp_path / "model"), "--pretrain-steps", "0", *folder], "no such folder"),
        (["train", "--weights", "confidence", "--noise", "class", "--noise-rate", "0.5", *folder], "--weights conf"),
        (["evaluate", str(tmp_path)], "is not a run folder"),
        (["predict", "--run", str(tiny.folder)], "give --texts or --file"),
        (["predict", "--run", str(tmp_path), "--texts", "a"], "config.json"),
        (["reweight-demo", "--noise-rate", "1.5"], "--noise-rate is 1.5"),
        (["reweight-demo", "--dataset", "nothing", *folder], "unknown data set"),
        (["export-adapter", "--run", str(tmp_path)], "config.json"),
        (["reproduce", "--claim", "none"], "unknown claim"),
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run("list-selftrain", cli.COMMANDS, arguments)
        said = capsys.readouterr()
        lines = [line for line in said.err.splitlines() if line.startswith("list-selftrain: error:")]
        assert stop.value.code == 2, (arguments, said)
        assert len(lines) == 1, said.err
        assert words in lines[0]
        assert "Traceback" not in said.err
    assert not (tmp_path / "run" / "checkpoints").exists()


# ---- metrics and plots


def test_metrics_by_hand() -> None:
    """Two of three right; probabilities 0.9, 0.6, 0.8 of which the second is wrong."""
    assert metrics.compute([0, 1, 1], [0, 0, 1]) == pytest.approx({"accuracy": 200 / 3, "macro_f1": 200 / 3})
    probabilities = np.array([[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]])
    assert metrics.calibration_error(probabilities, [0, 0, 1]) == pytest.approx(100 * (0.1 + 0.6 + 0.2) / 3)
    assert metrics.separation(np.array([1.0, 0.5, np.nan, 0.7]), np.array([True, False, False, True])) == 1.0
    assert metrics.separation(np.array([0.5, 0.5]), np.array([True, False])) == 0.5
    assert np.isnan(metrics.separation(np.array([0.5, np.nan]), np.array([True, False])))


def test_plots_of_odd_runs(tmp_path: Path) -> None:
    """A group without weights, and all weights nought."""
    plots.weights({"right": np.zeros(3), "wrong": np.zeros(0)}, tmp_path / "weights.png")
    plots.lines({"a": ([0, 1], [[1.0, 2.0], [3.0, 4.0]])}, tmp_path / "lines.png", xlabel="x", ylabel="y")
    assert all((tmp_path / name).stat().st_size > 3000 for name in ("weights.png", "lines.png"))


# ---- baselines


def test_tfidf_self_training() -> None:
    """Words that tell classes apart are learned from six texts; unlabelled ones do no harm here."""
    texts = [(f"{'good fine' if k else 'bad poor'} film {i % 3}",) for i in range(40) for k in (0, 1)]
    labels = np.array([k for _ in range(40) for k in (0, 1)])
    parts = [Part(tuple(texts[a:b]), labels[a:b]) for a, b in ((0, 6), (6, 60), (60, 80))]
    found = baselines.tfidf_self_training(Data("own", ("0", "1"), *parts, ()))
    assert found == {"tfidf_accuracy": 100.0, "tfidf_self_training_accuracy": 100.0}


def test_next_set_of_ipet() -> None:
    """As many of each class as asked for, labelled ones counted, where enough are likeliest of it."""
    labelled = Part((("a",), ("b",), ("c",)), np.array([0, 1, 1]))
    unlabelled = Part(tuple((str(i),) for i in range(10)))
    probabilities = np.array([[0.9, 0.1]] * 7 + [[0.2, 0.8]] * 3)
    found = next_set(
        Data("own", ("0", "1"), labelled, unlabelled, None, ()), probabilities, [5, 9], np.random.default_rng(0)
    )
    assert found.labels is not None
    assert found.texts[:3] == labelled.texts
    assert np.bincount(found.labels).tolist() == [5, 5]  # four of class 0 drawn; only three can be of class 1
    drawn = found.texts[3:]
    assert len(set(drawn)) == len(drawn) == 7
    assert all((int(text) < 7) == (label == 0) for (text,), label in zip(drawn, found.labels[3:], strict=True))


def test_ipet() -> None:
    """Templates train and label for each other; the last classifier learns what they agree on."""
    config = dataclasses.replace(TINY, session_steps=10, max_unlabelled=60)
    templates = ["*cls**sent_0*_It_was*mask*.*sep+*", "*cls*_A*mask*_one_._*sent_0**sep+*"]
    run = ipet(config, templates, generations=1, factor=2.0)
    assert run.data.pseudo is not None
    np.testing.assert_allclose(run.data.pseudo.sum(1), 1, rtol=1e-5)
    drawn = run.targets.sum(1) > 0
    np.testing.assert_allclose(run.targets[drawn], run.data.pseudo[drawn], rtol=1e-5)
    with pytest.raises(UserError, match="give two or more"):
        ipet(config, templates[:1])
