"""Evaluation: what is scored and written, label pairs, metrics and calibration by hand, references."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flipped_learning import baselines, data, metrics
from flipped_learning.config import Config, EvaluateOptions, SweepOptions
from flipped_learning.data import Task
from flipped_learning.evaluate import evaluate, label_sweep, open_templates, pair_scores, score_template, seen_pairs
from flipped_learning.templates import BUILTIN, NOVEL_PAIRS, SEEN_PAIRS
from flipped_learning.train import Run, train
from metazoo.errors import UserError
from metazoo.options import RunOptions
from sklearn.metrics import accuracy_score, f1_score

torch.set_num_threads(1)
OPEN = "Text Expressed Sentiment"  # shows no option
CLOSED = "Sentiment with choices"
TINY = Config(
    max_examples=60, width=16, heads=2, layers=1, feedforward=32, vocabulary=300, pretrain_steps=0, steps=2,
    batch_size=4, template_names=(OPEN, CLOSED),
)  # fmt: skip
BAG = dataclasses.replace(TINY, model="bag", pairs=2, width=6, steps=40, lr=3e-2, template_names=())


def trained(folder: Path, config: Config = TINY, **changes: Any) -> Run:
    return train(dataclasses.replace(config, **changes), RunOptions(output_dir=folder))


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("t5") / "run")


@pytest.fixture(scope="module")
def bag(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return trained(tmp_path_factory.mktemp("bag") / "run", BAG)


# ---- metrics


def test_metrics_by_hand() -> None:
    """F1 of class 0 is 2 · 1 / (2 + 2), of class 1 2 · 2 / (3 + 2), of class 2 is 0; class 3 is none."""
    references, predictions = [0, 0, 1, 1, 1, 2], [0, 3, 1, 1, 0, 3]
    assert metrics.compute(predictions, references)["accuracy"] == pytest.approx(100 * 3 / 6)
    assert metrics.compute(predictions, references)["macro_f1"] == pytest.approx(100 * (1 / 2 + 4 / 5 + 0) / 3)
    rng = np.random.default_rng(0)
    references, predictions = rng.integers(0, 4, 50), rng.integers(0, 4, 50)
    found = metrics.compute(predictions, references)
    assert found["accuracy"] == pytest.approx(100 * accuracy_score(references, predictions))
    assert found["macro_f1"] == pytest.approx(100 * f1_score(references, predictions, average="macro"))


def test_calibration_by_hand() -> None:
    """Two of three right at 0.85, one of one at 1: (3 |0.85 − 2/3| + 0) / 4; 1 is in the last bin, empty: NaN."""
    sure = np.log([0.85, 0.15])
    scores = [sure - 40, sure, sure[::-1].copy() - 3, np.array([0.0, -1000.0])]
    references = [0, 1, 1, 0]
    chosen, right, count = metrics.reliability(scores, references)
    assert count.tolist() == [0] * 8 + [3, 1]
    assert chosen[8:] == pytest.approx([0.85, 1.0])
    assert right[8:] == pytest.approx([2 / 3, 1.0])
    assert np.isnan(chosen[:8]).all()
    assert metrics.calibration_error(scores, references) == pytest.approx(100 * 3 * (0.85 - 2 / 3) / 4)
    assert metrics.calibration_error(scores, references, 1) == pytest.approx(100 * ((3 * 0.85 + 1) / 4 - 3 / 4))
    assert metrics.calibration_error([np.array([0.0, -1000.0])] * 3, [0, 0, 0]) == 0


def test_references() -> None:
    """tfidf finds what tells the classes apart; the most frequent label is that of the training examples."""
    rows = [{"text": f"a {word} film {i % 7}", "label": k} for i in range(20) for k, word in enumerate(("bad", "good"))]
    task = Task("own", (*rows[:30], rows[1]), tuple(rows[30:]), BUILTIN["mr"], True)
    assert baselines.tfidf(task) == {"accuracy": 100.0, "macro_f1": 100.0}
    assert baselines.tfidf(task, 3)["accuracy"] == 100
    found = baselines.majority(task, np.array([1, 1, 1, 0]))
    assert found == {"accuracy": 75.0, "macro_f1": pytest.approx(100 * (6 / 7) / 2)}
    assert baselines.majority(dataclasses.replace(task, train=()), np.array([0, 1]))["accuracy"] == 50


# ---- evaluation of runs


def test_evaluate(run: Run) -> None:
    """Keys, files and pictures; means over templates and pairs are those of the details."""
    found = evaluate(run.folder, EvaluateOptions(examples=6))
    names = {f"generated {key}" for key in (
        "accuracy", "macro_f1", "chance", "calibration_error", "seen_f1", "novel_f1", "tfidf_f1"
    )}  # fmt: skip
    assert set(found) == names | {"parameters"}
    assert all(0 <= found[name] <= 100 for name in names)
    assert found["parameters"] == sum(p.numel() for p in run.model.parameters())
    for name in ("calibration.png", "pairs.png"):
        assert (run.folder / name).stat().st_size > 0
    written = json.loads((run.folder / "evaluation.json").read_text())
    assert {key: written[key] for key in found} == found
    details = written["templates"]["generated"]
    assert {row["template"] for row in details} == {OPEN, CLOSED}
    assert all(row["examples"] == 6 for row in details)
    assert found["generated macro_f1"] == pytest.approx(np.mean([row["macro_f1"] for row in details]))
    pairs = written["pairs"]["generated"]
    assert set(pairs) == {"/".join(pair) for pair in (("negative", "positive"), *NOVEL_PAIRS)}
    assert found["generated novel_f1"] == pytest.approx(np.mean([pairs["/".join(pair)] for pair in NOVEL_PAIRS]))
    assert found["generated seen_f1"] == pairs["negative/positive"]


def test_evaluate_bag(bag: Run) -> None:
    """It reads no instruction: one template for all, with each pair of training; without plots there is none."""
    found = evaluate(bag, EvaluateOptions(plots=False))
    written = json.loads((bag.folder / "evaluation.json").read_text())
    assert [row["options"] for row in written["templates"]["generated"]] == [list(pair) for pair in SEEN_PAIRS[:2]]
    assert [row["examples"] for row in written["templates"]["generated"]] == [300, 300]
    assert found["generated accuracy"] > 55
    assert not list(bag.folder.glob("pairs.png"))
    assert set(written["pairs"]["generated"]) == {"/".join(pair) for pair in (*SEEN_PAIRS[:2], *NOVEL_PAIRS)}


def test_pair_scores_by_hand(bag: Run) -> None:
    """Macro-F1 of the option with the larger score, over the test reviews."""
    (task,) = bag.data.tasks
    pair = NOVEL_PAIRS[0]
    found = pair_scores(bag, task, [pair], 50, progress=False)
    instances = data.instances(task, open_templates(task)[0], 50, pair)
    assert all(one.options == pair for one in instances)
    predictions = np.array([int(scores[1] > scores[0]) for scores in bag.score(instances)])
    references = np.array([example["label"] for example in task.test[:50]])
    f1 = []
    for label in (0, 1):
        both = ((predictions == label) & (references == label)).sum()
        f1.append(2 * both / ((predictions == label).sum() + (references == label).sum()))
    assert found == {pair: pytest.approx(100 * np.mean(f1))}


def test_pair_scores_are_means_over_open_templates(run: Run) -> None:
    (task,) = run.data.tasks
    assert [template.name for template in open_templates(task)] == [OPEN]
    score = score_template(run, task, open_templates(task)[0], 6, options=("dull", "lively"))
    assert score is not None
    assert pair_scores(run, task, [("dull", "lively")], 6) == {("dull", "lively"): score.macro_f1}
    assert score.references.tolist() == [example["label"] for example in task.test[:6]]


def test_seen_pairs() -> None:
    assert seen_pairs(BAG) == SEEN_PAIRS[:2]
    assert seen_pairs(TINY) == (("negative", "positive"),)


def test_label_sweep(bag: Run) -> None:
    """Pairs that were asked for, else all; written as returned."""
    found = label_sweep(SweepOptions(run=bag.folder, pairs=("dull/lively", "poor / excellent"), examples=20))
    assert set(found) == {"generated dull/lively", "generated poor/excellent"}
    assert json.loads((bag.folder / "label-sweep.json").read_text()) == {
        "generated": {key.removeprefix("generated "): value for key, value in found.items()}
    }
    (bag.folder / "label-sweep.png").unlink()
    everything = label_sweep(SweepOptions(run=bag.folder, examples=20))
    assert set(everything) == {f"generated {'/'.join(pair)}" for pair in (*SEEN_PAIRS, *NOVEL_PAIRS)}
    assert everything["generated poor/excellent"] == found["generated poor/excellent"]
    assert (bag.folder / "label-sweep.png").stat().st_size > 0


def test_without_open_templates(tmp_path: Path) -> None:
    """No pair is exchanged where the prompt shows its options: evaluate() leaves it out, label-sweep says so."""
    run = trained(tmp_path / "run", template_names=(CLOSED,))
    found = evaluate(run, EvaluateOptions(examples=4))
    assert set(found) == {"parameters"} | {f"generated {key}" for key in (
        "accuracy", "macro_f1", "chance", "calibration_error", "tfidf_f1"
    )}  # fmt: skip
    assert (run.folder / "calibration.png").exists()
    assert not (run.folder / "pairs.png").exists()
    with pytest.raises(UserError, match="no two-class sentiment set with a template that shows no options") as caught:
        label_sweep(SweepOptions(run=run.folder))
    assert "\n" not in str(caught.value)
    assert not (run.folder / "label-sweep.json").exists()
    with pytest.raises(UserError, match="generated: label words can be exchanged"):
        pair_scores(run, run.data.tasks[0], [("bad", "good")], 4)


def test_no_sentiment_and_zero_shot(tmp_path: Path) -> None:
    """Three classes of one's own, and a zero-shot set: no pairs, and no supervised reference without training."""
    words = ("soup", "train", "song")
    for name, start in (("own", 0), ("other", 1000)):
        rows = [{"text": f"{word} number {start + i}", "label": k} for i in range(10) for k, word in enumerate(words)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "templates.yaml").write_text(
        "templates:\n  a: {name: Topic, answer_choices: 'food ||| travel ||| music',\n"
        "    jinja: '{{text}} Which topic is it? ||| {{answer_choices[label]}}'}\n"
    )
    own, other = (str(tmp_path / f"{name}.jsonl") for name in ("own", "other"))
    run = trained(
        tmp_path / "run", dataset=(own,), zero_shot=(other,), templates=str(tmp_path / "templates.yaml"),
        template_names=(), vocabulary=100,
    )  # fmt: skip
    found = evaluate(run, EvaluateOptions(examples=None))
    assert set(found) == {"parameters", f"{own} tfidf_f1"} | {
        f"{name} {key}" for name in (own, other) for key in ("accuracy", "macro_f1", "chance", "calibration_error")
    }
    written = json.loads((run.folder / "evaluation.json").read_text())
    assert [row["examples"] for name in (own, other) for row in written["templates"][name]] == [6, 30]
    assert written["pairs"] == {}
    with pytest.raises(UserError, match="label words can be exchanged"):
        pair_scores(run, run.data.tasks[0], [("bad", "good")], 4)


def test_task_without_a_prompt(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Said instead of a score; the run's other figures are there."""
    (task,) = run.data.tasks
    empty = dataclasses.replace(task, name="empty", test=({"text": " ", "label": 0},))
    other = dataclasses.replace(run, data=dataclasses.replace(run.data, zero_shot=(empty,)))
    found = evaluate(other, EvaluateOptions(examples=2, plots=False))
    assert found["empty accuracy"] == "no prompt for any test example"
    assert "generated accuracy" in found


def test_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        evaluate(tmp_path)
    with pytest.raises(UserError, match="not a run folder"):
        label_sweep(SweepOptions(run=tmp_path))


@pytest.mark.parametrize("pair", ["dull", "dull/", "dull/dull", "a/b/c", "/"])
def test_sweep_refuses_pairs(pair: str) -> None:
    with pytest.raises(UserError, match="two different words with a slash"):
        SweepOptions(pairs=(pair,))
