"""Evaluation and the command line: what is scored and written, the demonstration, export and predict, wrong input."""

from __future__ import annotations

import csv
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from list_selftrain import baselines, data, metrics, plots
from list_selftrain import config as configs
from list_selftrain import evaluate as evaluation
from list_selftrain.claims import CLAIMS
from list_selftrain.cli import COMMANDS
from list_selftrain.config import PRESETS, Config, EvaluateOptions, ExportOptions, ReweightOptions
from list_selftrain.data import Data, Part
from list_selftrain.evaluate import evaluate, export_adapter, reweight_demo
from list_selftrain.ipet import ipet, next_set
from list_selftrain.model import PromptClassifier
from list_selftrain.train import Run, load, score, train
from metazoo import cli
from metazoo.errors import UserError
from metazoo.options import RunOptions
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

torch.set_num_threads(1)
TINY = Config(
    width=16, layers=1, heads=2, feedforward=32, vocabulary=300, pretrain_steps=0, max_length=64, adapter_dim=2,
    shots=8, max_unlabelled=120, max_test=30, sessions=2, session_steps=3, teacher_epochs=1, finetune_epochs=1,
    unlabelled_batch=6, warmup=0.0, lr=1e-2, teacher_lr=1e-2,
)  # fmt: skip
FEATURES = dataclasses.replace(TINY, model="features", svd=10, hidden=8, session_steps=30)
VECTORS = dataclasses.replace(FEATURES, dataset="gaussian", dimension=5)
SCORES = {"accuracy", "macro_f1", "chance", "calibration_error"}
PSEUDO = {"pseudo_label_accuracy", "zero_weights", "effective_examples"}
TFIDF_ALONE = {"tfidf_accuracy"}
TFIDF = TFIDF_ALONE | {"tfidf_self_training_accuracy"}
COUNTS = {"trained_parameters", "parameters"}
SESSIONS = {"teacher_accuracy", "session_1_accuracy", "session_2_accuracy"}


def trained(folder: Path, config: Config = TINY, **changes: Any) -> Run:
    options = RunOptions(output_dir=folder, log_every=1)
    return train(dataclasses.replace(config, **changes), options)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pre-trained models of these tests go nowhere else; the training's plot is drawn by test_train.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(plots, "training", lambda run, path: None)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A prompted classifier."""
    return trained(tmp_path_factory.mktemp("tiny") / "run")


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("features") / "run", FEATURES)


@pytest.fixture(scope="module")
def vectors(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("vectors") / "run", VECTORS)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A .csv with 20 labelled rows of each of two classes."""
    lines = [f"the {kind} number {i} was {word},{word}" for i in range(20) for kind, word in (
        ("soup", "tasty"), ("bread", "stale"),
    )]  # fmt: skip
    (tmp_path / "own.csv").write_text("\n".join(["text,label", *lines]) + "\n")
    return tmp_path / "own.csv"


# ---- metrics


def test_metrics_by_hand() -> None:
    """F1 of class 0 is 2 · 1 / (2 + 2), of class 1 2 · 2 / (3 + 2), of class 2 is 0; class 3 is none."""
    references, predictions = [0, 0, 1, 1, 1, 2], [0, 3, 1, 1, 0, 3]
    found = metrics.compute(predictions, references)
    assert found["accuracy"] == pytest.approx(100 * 3 / 6)
    assert found["macro_f1"] == pytest.approx(100 * (1 / 2 + 4 / 5 + 0) / 3)
    rng = np.random.default_rng(0)
    references, predictions = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    found = metrics.compute(predictions, references)
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(references, predictions))
    assert found["macro_f1"] == pytest.approx(100 * f1_score(references, predictions, average="macro"))


def test_calibration_by_hand() -> None:
    """Two of three right at 0.85, one of one at 1: (3 |0.85 − 2/3| + 0) / 4; 1 is in the last bin, empty: NaN."""
    probabilities = np.array([[0.85, 0.15], [0.85, 0.15], [0.15, 0.85], [1.0, 0.0]])
    references = [0, 1, 1, 0]
    sure, right, count = metrics.reliability(probabilities, references)
    assert count.tolist() == [0] * 8 + [3, 1]
    assert sure[8:] == pytest.approx([0.85, 1.0])
    assert right[8:] == pytest.approx([2 / 3, 1.0])
    assert np.isnan(sure[:8]).all()
    assert metrics.calibration_error(probabilities, references) == pytest.approx(100 * 3 * (0.85 - 2 / 3) / 4)
    assert metrics.calibration_error(probabilities, references, 1) == pytest.approx(100 * (3.55 / 4 - 3 / 4))
    assert metrics.calibration_error(probabilities[3:], [0]) == 0


def test_separation_by_hand() -> None:
    """Of 2 · 2 pairs of a right and a wrong one the right has more weight in 2, as much in 1; NaN has no part."""
    weights = np.array([2.0, 0.5, 0.5, 1.0, np.nan])
    right = np.array([True, True, False, False, False])
    assert metrics.separation(weights, right) == pytest.approx(2.5 / 4)
    assert np.isnan(metrics.separation(weights[:2], right[:2]))
    assert np.isnan(metrics.separation(weights[[0, 4]], right[[0, 4]]))
    assert np.isnan(metrics.separation(np.full(5, np.nan), right))


# ---- evaluation of runs


def test_evaluate(run: Run) -> None:
    """Keys, files and pictures, by the folder and by the run itself."""
    found = evaluate(run.folder)
    assert set(found) - {"weight_separation"} == SCORES | PSEUDO | TFIDF | COUNTS | SESSIONS
    percents = SCORES | TFIDF | SESSIONS | {"pseudo_label_accuracy", "zero_weights"}
    assert all(0 <= found[name] <= 100 for name in percents)
    assert json.loads((run.folder / "evaluation.json").read_text()) == found
    assert (run.folder / "calibration.png").stat().st_size > 1000
    assert (run.folder / "weights.png").exists() == ("weight_separation" in found)
    assert run.data.test is not None
    assert run.data.test.labels is not None
    assert found["chance"] == pytest.approx(100 * np.bincount(run.data.test.labels).max() / 30)
    assert found["accuracy"] == pytest.approx(run.sessions[-1]["accuracy"]) == found["session_2_accuracy"]
    assert found["teacher_accuracy"] == run.sessions[0]["accuracy"]
    assert found["trained_parameters"] == sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    assert found["parameters"] == sum(p.numel() for p in run.model.parameters()) > found["trained_parameters"]
    assert evaluate(run, EvaluateOptions(batch_size=7, plots=False)) == pytest.approx(found)


def test_evaluate_features(features: Run) -> None:
    """The scores are those of its probabilities, the separation that of its weights."""
    found = evaluate(features)
    part = features.data.test
    assert part is not None
    assert part.labels is not None
    probabilities = features.predict_proba(part)
    assert probabilities.sum(1) == pytest.approx(1, abs=1e-5)
    assert found["macro_f1"] == metrics.compute(probabilities.argmax(1), part.labels)["macro_f1"]
    assert found["calibration_error"] == metrics.calibration_error(probabilities, part.labels)
    right = features.targets.argmax(1) == features.data.unlabelled.labels
    held = ~np.isnan(features.weights)
    assert found["weight_separation"] == pytest.approx(roc_auc_score(right[held], features.weights[held]))
    groups = evaluation.weight_groups(features)
    assert len(groups["right"]) + len(groups["wrong"]) == held.sum()
    assert found["pseudo_label_accuracy"] == pytest.approx(100 * right[features.targets.sum(1) > 0].mean())
    assert (features.folder / "weights.png").stat().st_size > 1000


def test_evaluate_vectors(vectors: Run) -> None:
    """Without texts there is no TF-IDF."""
    assert set(evaluate(vectors)) - {"weight_separation"} == SCORES | PSEUDO | COUNTS | SESSIONS


def test_without_baselines_and_plots(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run", FEATURES, weights="uniform", sessions=1)
    monkeypatch.setattr("list_selftrain.baselines.tfidf_self_training", lambda *args: pytest.fail("was left out"))
    found = evaluate(run, EvaluateOptions(baselines=False, plots=False))
    assert set(found) == SCORES | PSEUDO | COUNTS | {"teacher_accuracy", "session_1_accuracy"}
    assert not list(run.folder.glob("*.png"))


def test_teacher_alone_and_noise(tmp_path: Path) -> None:
    """No pseudo-labels without a session; no accuracy of a teacher that there is not."""
    run = trained(tmp_path / "teacher", VECTORS, sessions=0)
    assert set(evaluate(run)) == SCORES | COUNTS | {"teacher_accuracy"}
    assert (run.folder / "calibration.png").exists()
    noisy = trained(tmp_path / "noise", VECTORS, noise="symmetric", noise_rate=0.3, teacher_epochs=0, sessions=1)
    assert set(evaluate(noisy)) == SCORES | PSEUDO | COUNTS | {"session_1_accuracy", "weight_separation"}


def test_few_unlabelled_texts(tmp_path: Path) -> None:
    """Fewer than scikit-learn takes at a time, or none: no warning of its own."""
    for changes, wanted in (({"max_unlabelled": 40}, TFIDF), ({"max_unlabelled": None, "shots": 3000}, TFIDF_ALONE)):
        run = trained(tmp_path / str(len(wanted)), FEATURES, sessions=0, **changes)
        assert set(evaluate(run, EvaluateOptions(plots=False))) == SCORES | COUNTS | {"teacher_accuracy"} | wanted


def test_unlabelled_texts_without_truth(tmp_path: Path, own: Path) -> None:
    """What is known is shown: no accuracy of pseudo-labels, and no weights of right and wrong ones."""
    (tmp_path / "more.txt").write_text(
        "".join(f"a {word} meal {i}\n" for i in range(60) for word in ("tasty", "stale"))
    )
    (tmp_path / "test.csv").write_text("text,label\nthe tasty soup was mine,tasty\nthe stale bread was mine,stale\n")
    run = trained(
        tmp_path / "run", FEATURES, dataset=str(own), test=str(tmp_path / "test.csv"), words=("stale", "tasty"),
        unlabelled=str(tmp_path / "more.txt"), svd=3,
    )  # fmt: skip
    found = evaluate(run)
    assert set(found) == SCORES | TFIDF | COUNTS | SESSIONS | {"zero_weights", "effective_examples"}
    assert not (run.folder / "weights.png").exists()


def test_refused_runs(tmp_path: Path, own: Path) -> None:
    """No test rows, or no run: one line."""
    run = trained(tmp_path / "run", FEATURES, dataset=str(own), max_test=None, svd=3)
    for folder, said in ((run.folder, "was trained without test rows: give them to `train`"), (tmp_path, "not a run")):
        with pytest.raises(UserError, match=said) as caught:
            evaluate(folder)
        assert "\n" not in str(caught.value)
    assert not (run.folder / "evaluation.json").exists()


# ---- flipped labels


def test_reweight_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that differ in weights alone; its figures are theirs."""
    shorter = dataclasses.replace(PRESETS["features"], session_steps=100, max_unlabelled=1000)
    monkeypatch.setitem(configs.PRESETS, "features", shorter)
    options = ReweightOptions(noise_rate=0.5, output_dir=tmp_path / "demo")
    found = reweight_demo(options)
    assert set(found) == {
        "uniform_accuracy", "meta_accuracy", "flipped", "weight_separation", "mean_weight_right", "mean_weight_wrong",
        "plot",
    }  # fmt: skip
    assert Path(found["plot"]).stat().st_size > 1000
    uniform, meta = (load(tmp_path / "demo" / name) for name in ("uniform", "meta"))
    assert dataclasses.replace(uniform.config, weights="meta") == meta.config
    assert (meta.config.noise, meta.config.noise_rate) == ("class", 0.5)
    assert np.array_equal(uniform.targets, meta.targets)
    assert found["uniform_accuracy"] == uniform.sessions[-1]["accuracy"]
    assert found["meta_accuracy"] == meta.sessions[-1]["accuracy"]
    labels = meta.data.unlabelled.labels
    assert labels is not None
    assert found["flipped"] == pytest.approx(100 * round(0.5 * labels.sum()) / len(labels), abs=1e-3)
    groups = evaluation.weight_groups(meta)
    assert found["mean_weight_right"] == pytest.approx(groups["right"].mean())
    assert found["mean_weight_right"] > found["mean_weight_wrong"]
    assert found["weight_separation"] > 0.5
    with pytest.raises(UserError, match="already holds a run"):
        reweight_demo(options)


def test_reweight_demo_as_it_is(tmp_path: Path) -> None:
    """Flipped labels are as many as asked for and get less weight; the re-weighted student is better."""
    found = reweight_demo(ReweightOptions(noise_rate=0.7, output_dir=tmp_path))
    truth = data.load(Config(model="features", noise="class", noise_rate=0.7)).unlabelled.labels
    assert truth is not None
    assert found["flipped"] == pytest.approx(100 * round(0.7 * truth.sum()) / len(truth), abs=0.01)
    assert found["weight_separation"] > 0.55
    assert found["mean_weight_wrong"] < 0.9 * found["mean_weight_right"]
    assert found["meta_accuracy"] > found["uniform_accuracy"] + 10
    assert Path(found["plot"]).stat().st_size > 5000


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    """The demonstration in a moment."""
    shorter = dataclasses.replace(PRESETS["features"], session_steps=3, max_unlabelled=200, shots=8, unlabelled_batch=8)
    monkeypatch.setitem(configs.PRESETS, "features", shorter)


@pytest.mark.usefixtures("short_demo")
def test_reweight_demo_on_vectors(tmp_path: Path) -> None:
    found = reweight_demo(ReweightOptions(dataset="gaussian", noise="symmetric", output_dir=tmp_path / "vectors"))
    assert 0 < found["flipped"] < 100


@pytest.mark.usefixtures("short_demo")
def test_reweight_demo_with_nothing_flipped(tmp_path: Path) -> None:
    """A figure, not a warning."""
    found = reweight_demo(ReweightOptions(dataset="gaussian", noise_rate=1e-6, output_dir=tmp_path / "none"))
    assert found["flipped"] == 0
    assert np.isnan(found["weight_separation"])


@pytest.mark.usefixtures("short_demo")
def test_reweight_demo_without_test_rows(tmp_path: Path, own: Path) -> None:
    """One line, not a KeyError."""
    with pytest.raises(UserError, match="test"):
        reweight_demo(ReweightOptions(dataset=str(own), output_dir=tmp_path / "own"))


# ---- export and predict


def test_export_adapter(tmp_path: Path, run: Run, features: Run) -> None:
    """What is written gives the run's logits bit for bit, and says how large it is."""
    said = export_adapter(ExportOptions(run=run.folder, output=tmp_path / "adapter"))
    assert "\n" not in said
    assert repr(str(tmp_path / "adapter")) in said
    assert f"{sum(p.numel() for p in run.model.trained().values()):,} of" in said
    model = PromptClassifier.from_pretrained(tmp_path / "adapter")
    assert model.labels == run.data.labels
    part = run.data.test
    assert part is not None
    logits = [score(one, one.encode(part), range(len(part))) for one in (model, run.model)]
    assert torch.equal(*logits)
    with pytest.raises(UserError, match="holds no prompted classifier"):
        export_adapter(ExportOptions(run=features.folder, output=tmp_path / "none"))
    assert not (tmp_path / "none").exists()


def test_export_where_a_file_is(tmp_path: Path, run: Run) -> None:
    """One line, and the file stays."""
    (tmp_path / "held").write_text("kept")
    with pytest.raises(UserError, match="held"):
        export_adapter(ExportOptions(run=run.folder, output=tmp_path / "held"))
    assert (tmp_path / "held").read_text() == "kept"


def cli_run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Any, str, str]:
    """Exit status, stdout and stderr."""
    with pytest.raises(SystemExit) as stopped:
        cli.run("list-selftrain", COMMANDS, [str(one) for one in arguments])
    said = capsys.readouterr()
    return stopped.value.code, said.out, said.err


def test_train_and_evaluate_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A preset with fields changed, resumed, and evaluated without baselines."""
    fields = ["gaussian", "--sessions", "1", "--session-steps", "4", "--max-unlabelled", "100", "--max-test", "20"]
    arguments = ["train", *fields, "--output-dir", tmp_path / "run"]
    assert cli_run(capsys, *arguments)[:2] == (0, f"run folder: {tmp_path / 'run'}\n")
    config = load(tmp_path / "run").config
    assert config == dataclasses.replace(
        PRESETS["gaussian"], sessions=1, session_steps=4, max_unlabelled=100, max_test=20
    )
    status, _, err = cli_run(capsys, *arguments)
    assert status == 2
    assert "already holds a run" in err
    assert cli_run(capsys, *arguments, "--resume")[0] == 0
    status, out, err = cli_run(capsys, "evaluate", tmp_path / "run", "--no-baselines", "--no-plots")
    assert (status, err) == (0, "")
    shown = dict(line.split() for line in out.splitlines())
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {name: float(value) for name, value in shown.items()} == pytest.approx(written, rel=1e-4)


def test_predict_command(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """--texts, --file of each kind and --output, as the run itself predicts."""
    texts = ["the film was wonderful", "an awful, dull plot"]
    wanted = run.predict_proba(Part(tuple((text,) for text in texts)))
    labels = [run.data.labels[k] for k in wanted.argmax(1)]
    status, out, err = cli_run(capsys, "predict", "--run", run.folder, "--texts", *texts)
    assert (status, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == labels
    (tmp_path / "a.txt").write_text("\n".join(texts) + "\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in texts)])
    for kind in ("txt", "jsonl", "csv"):
        output = tmp_path / f"{kind}-out.csv"
        arguments = ["--file", tmp_path / f"a.{kind}", "--output", output, "--batch-size", "1"]
        assert cli_run(capsys, "predict", "--run", run.folder, *arguments)[:2] == (0, out)
        with output.open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["text"] for row in rows] == texts
        assert [row["label"] for row in rows] == labels
        found = [[float(row[f"probability_{label}"]) for label in run.data.labels] for row in rows]
        assert np.allclose(found, wanted, atol=1e-4)


def test_demo_and_export_commands(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorter = dataclasses.replace(PRESETS["features"], session_steps=3, max_unlabelled=100)
    monkeypatch.setitem(configs.PRESETS, "features", shorter)
    status, out, err = cli_run(
        capsys, "reweight-demo", "--dataset", "gaussian", "--noise", "symmetric", "--output-dir", tmp_path / "demo"
    )
    assert (status, err) == (0, "")
    assert out.splitlines()[0].startswith("uniform_accuracy")
    status, out, err = cli_run(capsys, "export-adapter", "--run", run.folder, "--output", tmp_path / "adapter")
    assert (status, err) == (0, "")
    assert "PromptClassifier.from_pretrained" in out


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    """Presets and claims, by name."""
    status, out, err = cli_run(capsys, "info")
    assert (status, err) == (0, "")
    words = {line.split()[0].rstrip(":") for line in out.splitlines() if line.startswith("  ")}
    assert words == {*PRESETS, *(claim.name for claim in CLAIMS)}
    assert "(flagship)" in out
    for command in COMMANDS:
        assert command in cli_run(capsys, "--help")[1]


def test_help_is_quick() -> None:
    """The installed command, the help of all sub-commands and `info` need no torch."""
    code = (
        "import contextlib, io, sys\n"
        "from list_selftrain.cli import main\n"
        "shown = {'train': ('--meta-gradient', '--output-dir'), 'predict': ('--texts', '--file')}\n"
        "for line in ('--help', 'info', 'train --help', 'train paper --help', 'evaluate --help', 'reproduce --help',\n"
        "    'predict --help', 'reweight-demo --help', 'export-adapter --help'):\n"
        "    words = line.split()\n"
        "    sys.argv[1:] = words\n"
        "    out = io.StringIO()\n"
        "    try:\n"
        "        with contextlib.redirect_stdout(out):\n"
        "            main()\n"
        "    except SystemExit as stop:\n"
        "        assert not stop.code, words\n"
        "    text = out.getvalue()\n"
        "    assert words[-1] == 'info' or text.split()[0] == 'usage:', words\n"
        "    for name in shown.get(words[0], ()):\n"
        "        assert name in text, (words, name)\n"
        "heavy = {'torch', 'transformers', 'sklearn', 'accelerate', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - started < 20  # far more than it takes, less than with torch on a busy machine
    script = Path(sys.executable).with_name("list-selftrain")
    if script.exists():  # where the package is installed
        shown = subprocess.run([script, "train", "--help"], capture_output=True, text=True, check=True).stdout
        assert "--pretrain-steps" in shown


def wrong_train() -> list[tuple[list[str], str]]:
    fields = [
        ("--no-such-field 1", "no-such-field"), ("--lr", "lr"), ("--lr high", "high"), ("--lr nan", "--lr is nan"),
        ("--lr inf", "--lr is inf"), ("--lr 0", "--lr is 0"), ("--teacher-lr -1", "--teacher-lr is -1"),
        ("--pretrain-lr nan", "--pretrain-lr is nan"), ("--temperature 0", "--temperature is 0"),
        ("--clip -1", "--clip is -1"), ("--clip nan", "--clip is nan"), ("--adapter-std -1", "--adapter-std is -1"),
        ("--dropout 1", "--dropout is 1"), ("--dropout nan", "--dropout is nan"), ("--threshold 1", "--threshold is 1"),
        ("--warmup 1.1", "--warmup is 1.1"), ("--warmup nan", "--warmup is nan"),
        ("--noise-rate 2", "--noise-rate is 2"), ("--noise-rate nan", "--noise-rate is nan"),
        ("--noise-rate 0.5", "--noise-rate needs --noise"), ("--shots 0", "--shots is 0"), ("--shots 1", "--shots 1"),
        ("--shots 1.5", "1.5"), ("--split 6", "--split is 6"), ("--split 1", "--split"),
        ("--max-unlabelled 0", "--max-unlabelled is 0"), ("--max-test -1", "--max-test is -1"),
        ("--max-unlabelled 4", "fewer than --unlabelled-batch"), ("--seed -1", "--seed is -1"),
        ("--pretrain-seed -1", "--pretrain-seed is -1"), ("--sessions -1", "--sessions is -1"),
        ("--session-steps 0", "--session-steps is 0"), ("--teacher-epochs -1", "--teacher-epochs is -1"),
        ("--finetune-epochs -1", "--finetune-epochs is -1"), ("--labelled-batch 0", "--labelled-batch is 0"),
        ("--meta-batch 0", "--meta-batch is 0"), ("--meta-batches 0", "--meta-batches is 0"),
        ("--unlabelled-batch 0", "--unlabelled-batch is 0"), ("--accumulation 0", "--accumulation is 0"),
        ("--mc-passes 1", "--mc-passes is 1"), ("--mc-pool 1", "--mc-pool is 1"), ("--width 10", "--width is 10"),
        ("--width 0", "--width is 0"), ("--layers 0", "--layers is 0"), ("--vocabulary 100", "--vocabulary is 100"),
        ("--adapter-dim 0", "--adapter-dim is 0"), ("--svd 0", "--svd is 0"), ("--hidden 0", "--hidden is 0"),
        ("--dimension 1", "--dimension is 1"), ("--max-length 4", "--max-length is 4"),
        ("--pretrain-steps -1", "--pretrain-steps is -1"), ("--tune some", "some"), ("--weights best", "best"),
        ("--noise all", "all"), ("--precision fp16", "fp16"), ("--model /nowhere", "no such folder"),
        ("--tune simple", "--adapter-dim"), ("--words a a", "the same word"),
        ("--template none --words a b", "template"), ("--classifier classic --words a b", "--words"),
        ("--dataset nothing", "unknown data set"), ("--dataset gaussian", "--model features"),
        ("--dataset none.csv", "none.csv"), ("--dataset hub:", "hub"),
        ("--dataset mpqa --data-dir /nowhere", "/nowhere"), ("--dataset mr --data-dir /nowhere", "/nowhere"),
        ("--words very bad good", "3 label words"), ("--words good", "1 label words"),
        ("--template *cls**sent_0*_It_was.*sep+*", "has 0 masks"), ("--unlabelled none.txt", "none.txt"),
        ("--test none.csv", "none.csv"), ("--test none.pdf", "none.pdf"),
        ("--weights confidence --noise class --noise-rate 0.5", "--weights confidence"),
        ("--weights uncertainty --dropout 0", "--weights uncertainty"), ("--gradient-checkpointing", "finite"),
        ("--model features --precision bf16", "--precision"), ("--sessions 0 --teacher-epochs 0", "nothing to train"),
        ("--log-every 0", "--log-every is 0"), ("--checkpoint-every 0", "--checkpoint-every is 0"),
        ("--keep 1", "--keep is 1"), ("--report-to nothing", "nothing"),
        ("--output-dir /dev/null/run", "/dev/null/run"),
    ]  # fmt: skip
    return [(["train", *line.split()], said) for line, said in fields] + [
        (["train", "none"], "unknown preset 'none'"), (["train", "gaussian", "extra"], "extra"),
        (["train", "gaussian", "--shots", "1"], "--shots 1"), (["train", "gaussian", "--test", "a.csv"], "--test"),
        (["train", "--words", "very good", "bad"], "is not one token"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "said"), wrong_train(), ids=lambda value: None if isinstance(value, str) else " ".join(value[1:])
)
def test_wrong_input_to_train(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    """Exit status 2, one line that names what is wrong, and nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("list_selftrain.model._hub_answers", lambda name: False)
    smaller = dataclasses.replace(PRESETS["small"], pretrain_steps=0)
    monkeypatch.setitem(configs.PRESETS, "small", smaller)
    status, out, err = cli_run(capsys, *arguments)
    assert (status, out) == (2, ""), err
    lines = err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("list-selftrain: error: ")
    assert said in lines[0]
    assert not list(tmp_path.iterdir())


def test_wrong_input_to_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run, vectors: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit status 2 and one line that names what is wrong."""
    monkeypatch.chdir(tmp_path)
    unfinished, foreign, broken, empty = (tmp_path / name for name in ("unfinished", "foreign", "broken", "empty"))
    for folder in (unfinished, foreign, broken, empty):
        folder.mkdir()
    (unfinished / "config.json").write_text((run.folder / "config.json").read_text())
    (foreign / "config.json").write_text('{"tasks": 3}')
    (broken / "config.json").write_text("{")
    nowhere, file, pairs, held = (tmp_path / name for name in ("nowhere", "texts.pdf", "pairs.csv", "held.csv"))
    file.write_text("a\n")
    pairs.write_text("sentence1,sentence2\na,b\n")
    held.write_text("kept")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "other.csv").write_text("note\nb\n")
    texts = ["--texts", "a"]
    wrong: list[tuple[list[Any], str]] = [
        (["nothing"], "unknown command 'nothing'"), (["info", "x"], "info takes no arguments"),
        (["evaluate"], "give a run folder"), (["evaluate", nowhere], "not a run folder"),
        (["evaluate", empty], "not a run folder"), (["evaluate", unfinished], "no checkpoint"),
        (["evaluate", foreign], "'tasks'"), (["evaluate", broken], "is not JSON"),
        (["evaluate", run.folder, "--batch-size", "0"], "--batch-size is 0"),
        (["evaluate", run.folder, "--batch-size", "nan"], "nan"),
        (["evaluate", run.folder, "--examples", "3"], "examples"),
        (["reproduce", "--claim", "none"], "unknown claim 'none'"), (["reproduce", "--seeds", "0"], "--seeds is 0"),
        (["reproduce", "--jobs", "-1"], "--jobs is -1"), (["reproduce", "--scale", "large"], "large"),
        (["predict"], "give --texts or --file"), (["predict", *texts, "--file", pairs], "give --texts or --file"),
        (["predict", "--texts", ""], "--texts 1 is empty"), (["predict", *texts, "--batch-size", "-1"], "--batch-size"),
        (["predict", *texts, "--run", nowhere], "not a run folder"), (["predict", *texts], "not a run folder"),
        (["predict", *texts, "--run", unfinished], "no checkpoint"), (["predict", *texts, "--run", foreign], "'tasks'"),
        (["predict", *texts, "--run", run.folder, "--output", held], "exists: choose another --output"),
        (["predict", *texts, "--run", run.folder, "--output", "/dev/null/a.csv"], "/dev/null"),
        (["predict", *texts, "--run", vectors.folder], "classifies vectors"),
        *(
            (["predict", "--run", run.folder, "--file", given], said)
            for given, said in (
                (nowhere, "nowhere"), (file, "texts.pdf"), (tmp_path / "none.txt", "none.txt"), (pairs, "single texts"),
                (tmp_path / "blank.txt", "no texts in it"), (tmp_path / "latin.txt", "UTF-8"), (empty, "empty"),
                (tmp_path / "other.csv", "line 2"),
            )
        ),
        (["reweight-demo", "--noise-rate", "0"], "--noise-rate is 0"), (["reweight-demo", "--noise", "none"], "none"),
        (["reweight-demo", "--noise-rate", "nan"], "--noise-rate is nan"),
        (["reweight-demo", "--noise-rate", "1"], "--noise-rate is 1"),
        (["reweight-demo", "--dataset", "nothing"], "unknown data set"),
        (["reweight-demo", "--dataset", "mpqa", "--data-dir", nowhere], "nowhere"),
        (["reweight-demo", "--seed", "-1"], "--seed is -1"),
        (["export-adapter", "--run", nowhere], "not a run folder"),
        (["export-adapter", "--run", unfinished], "no checkpoint"),
        (["export-adapter", "--run", vectors.folder], "holds no prompted classifier"),
        (["export-adapter", "--run", run.folder, "--output", "/dev/null/a"], "/dev/null/a"),
    ]  # fmt: skip
    kept = sorted(tmp_path.rglob("*"))
    for arguments, said in wrong:
        status, out, err = cli_run(capsys, *arguments)
        lines = err.splitlines()
        assert (status, out) == (2, ""), (arguments, out, err)
        assert len(lines) == 1, (arguments, lines)
        assert said in lines[0], (arguments, lines)
    assert [path for path in sorted(tmp_path.rglob("*")) if path.name != ".lock"] == kept
    assert held.read_text() == "kept"


# ---- plots and baselines


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
