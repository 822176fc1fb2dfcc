"""Evaluation, search, bias, settings and the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from maml_align import evaluate
from maml_align.config import (
    PRESETS,
    BiasOptions,
    Config,
    EvaluateOptions,
    SearchOptions,
    draw_tuples,
    parse_tuple,
    parts,
)
from maml_align.data import Pairs, Questions
from maml_align.train import Run, train
from metazoo.errors import UserError
from metazoo.options import RunOptions

torch.set_num_threads(1)
LANGUAGES = ("de", "en", "es")


class Fake:
    """Vectors by a function of the text."""

    def __init__(self, of: Any) -> None:
        self.of = of

    def encode(self, texts: Sequence[str], batch_size: int = 64, role: str | None = None) -> np.ndarray:
        found = np.stack([self.of(text) for text in texts]).astype(np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True)


def questions(count: int = 12) -> Questions:
    """Question i of each language is answered by its candidate i."""
    return Questions(
        tuple(str(i) for i in range(count)),
        {one: tuple(f"{one} q {i}" for i in range(count)) for one in LANGUAGES},
        {one: tuple(f"{one} a {i}" for i in range(count)) for one in LANGUAGES},
        {one: ("",) * count for one in LANGUAGES},
        {one: np.arange(count) for one in LANGUAGES},
    )


def meaning(text: str) -> np.ndarray:
    return np.eye(12)[int(text.split()[2])]


def language(text: str) -> np.ndarray:
    return np.eye(3)[LANGUAGES.index(text.split()[0])]


CONFIG = Config(languages=LANGUAGES, unseen=())


def test_perfect_encoder() -> None:
    """By meaning alone: all answers first, and languages at chance among them."""
    found, matrix = evaluate.evaluate_retrieval(Fake(meaning), questions(), CONFIG, k=3)
    assert found["map"] == pytest.approx(100)
    assert found["recall"] == pytest.approx(100)
    assert found["same_language"] == pytest.approx(100 / 3) == found["same_language_chance"]
    assert set(matrix) == {(one, other) for one in LANGUAGES for other in LANGUAGES}
    assert found["pool_gap"] == pytest.approx(0)


def test_encoder_of_languages_alone() -> None:
    found, _ = evaluate.evaluate_retrieval(Fake(language), questions(), CONFIG, k=3)
    assert found["same_language"] == 100
    bias = evaluate.language_bias(Fake(language), questions(), CONFIG, 3)
    assert set(bias) == {"same_language", "same_language_chance", "pool_gap"}


def test_unanswerable_question_is_left_out() -> None:
    part = questions()
    part.answers["de"][0] = part.answers["en"][0] = part.answers["es"][0] = -1
    found, _ = evaluate.evaluate_retrieval(Fake(meaning), part, CONFIG, k=3)
    assert found["map"] == pytest.approx(100)
    for one in LANGUAGES:
        part.answers[one][:] = -1
    with pytest.raises(UserError, match="no question of the test part has an answer"):
        evaluate.evaluate_retrieval(Fake(meaning), part, CONFIG, k=3)


def test_sts_by_hand() -> None:
    """Cosines that are the scores correlate fully; gap and means by hand."""
    scores = np.array([0.0, 1.0, 2.5, 5.0])
    angles = np.arccos(scores / 5)
    part = Pairs(
        ("de", "en"),
        {(one, one): (("0",) * 4, tuple(str(angle) for angle in angles), scores) for one in ("de", "en")},
        aligned=True,
    )
    encoder = Fake(lambda text: np.array([np.cos(float(text)), np.sin(float(text))]))
    pearson, spearman = evaluate.evaluate_sts(encoder, part, ("de", "en"))
    assert set(pearson) == {(one, other) for one in ("de", "en") for other in ("de", "en")}
    assert all(value == pytest.approx(100) for value in (*pearson.values(), *spearman.values()))


def test_summarise() -> None:
    matrix = {("a", "a"): 80.0, ("b", "b"): 60.0, ("a", "b"): 30.0, ("b", "a"): 10.0, ("u", "u"): 50.0, ("a", "u"): 5.0}
    found = evaluate.summarise(matrix, ("a", "b"), ("u",))
    assert found == {"mono_seen": 70.0, "cross_seen": 20.0, "mono_unseen": 50.0, "cross_unseen": 5.0, "gap": 50.0}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    """A run on scored pairs, one on questions and one in the synthetic world."""
    folder = tmp_path_factory.mktemp("runs")
    lines = ["sentence1,sentence2,score,language1,language2"]
    for one in LANGUAGES:
        for other in LANGUAGES:
            lines += [f"{one} first {i},{other} second {i + i % 3},{5 - i % 3},{one},{other}" for i in range(40)]
    (folder / "pairs.csv").write_text("\n".join(lines) + "\n")
    lines = ["id,language,question,answer"]
    lines += [f"{i},{one},what is {one} {i},it is {one} number {i}" for i in range(60) for one in LANGUAGES]
    (folder / "questions.csv").write_text("\n".join(lines) + "\n")
    base = Config(
        model="static", languages=LANGUAGES, unseen=(), width=4, vocabulary=300, shots=2, queries=2, negatives=2,
        inner_steps=1, inner_lr=0.5, steps=2, task_batch=2,
    )  # fmt: skip
    configs = {
        "pairs": replace(base, dataset=str(folder / "pairs.csv")),
        "questions": replace(base, dataset=str(folder / "questions.csv")),
        "rotations": replace(base, dataset="rotations", model="linear", dimension=4, languages=("a", "b", "c")),
    }
    return {name: train(config, RunOptions(output_dir=folder / name, log_every=1)) for name, config in configs.items()}


@pytest.mark.parametrize("name", ["pairs", "questions", "rotations"])
def test_evaluate(runs: dict[str, Run], name: str) -> None:
    """From a folder: what is documented, in evaluation.json, too, and plots."""
    folder = runs[name].folder
    found = evaluate.evaluate(folder, EvaluateOptions(k=3))
    assert json.loads((folder / "evaluation.json").read_text()) == found
    wanted = {
        "pairs": {"mono_seen", "cross_seen", "gap", "spearman_cross_seen", "zero_shot_cross_seen", "tfidf_cross_seen"},
        "questions": {"map", "mrr", "recall", "seen_map", "same_language", "same_language_chance", "zero_shot_map"},
        "rotations": {"pearson", "zero_shot_pearson", "gap", "query_loss", "support_loss"},
    }
    assert wanted[name] <= set(found)
    if name != "rotations":
        assert (folder / "languages.png").stat().st_size > 1000
        assert (folder / "comparison.png").stat().st_size > 1000


def test_search(runs: dict[str, Run], tmp_path: Path) -> None:
    folder = runs["questions"].folder
    text = evaluate.search_sentences(SearchOptions(run=folder, queries=("what is de 3",), k=2))
    assert len(text.splitlines()) == 3
    (tmp_path / "own.txt").write_text("it is en number 1\n\nsomething else\n")
    text = evaluate.search_sentences(
        SearchOptions(run=folder / "model", queries=("it is en number 1",), file=tmp_path / "own.txt", k=1)
    )
    assert text.splitlines()[1].strip() == "1.000  it is en number 1"
    with pytest.raises(UserError, match="is a model without sentences: give --file"):
        evaluate.search_sentences(SearchOptions(run=folder / "model", queries=("a",)))
    with pytest.raises(UserError, match="k is 9, but there are 2 sentences"):
        evaluate.search_sentences(SearchOptions(run=folder, queries=("a",), file=tmp_path / "own.txt", k=9))
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(UserError, match="no sentence in it"):
        evaluate.search_sentences(SearchOptions(run=folder, queries=("a",), file=tmp_path / "empty.txt"))
    with pytest.raises(UserError, match="is of a synthetic world"):
        evaluate.search_sentences(SearchOptions(run=runs["rotations"].folder, queries=("a",)))


def test_bias(runs: dict[str, Run]) -> None:
    found = evaluate.bias(BiasOptions(run=runs["questions"].folder, k=3))
    assert {"same_language", "zero_shot_same_language", "pool_gap", "zero_shot_pool_gap"} <= set(found)
    with pytest.raises(UserError, match="no language bias to measure"):
        evaluate.bias(BiasOptions(run=runs["rotations"].folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shots": 0}, "--shots is 0: give 1 or more"),
        ({"student_steps": -1}, "--student-steps is -1"),
        ({"inner_lr": 0.0}, "--inner-lr is 0.0: give a number above 0"),
        ({"margin": -1.0}, "--margin is -1.0"),
        ({"kd_lambda": -0.5}, "--kd-lambda is -0.5: give 0 or more"),
        ({"fold": 5}, "--fold is 5: give 0 to 4"),
        ({"model": "tiny", "width": 30}, "--width is 30, --heads 4"),
        ({"model": "linear"}, "go together"),
        ({"mode": "MONO_BIL"}, "needs the three sets"),
        ({"method": "maml"}, "takes two sets"),
        ({"method": "fine-tune", "learn_inner_lr": True}, "--learn-inner-lr is for maml"),
        ({"seed": -1}, "--seed is -1: give 0 or more"),
        ({"method": "reptile", "mode": "MONO_BIL", "inner_steps": 0}, "give --inner-steps 1 or more"),
        ({"checkpointing": True}, "add --no-first-order"),
        ({"query_from": "dev", "validate_every": 5}, "trains on dev"),
        ({"mode": "MONO"}, "--mode MONO: one of MONO_MONO"),
        ({"languages": ()}, "--languages is empty"),
        ({"languages": ("de", "en"), "unseen": ()}, "needs 3 languages or more"),
        ({"languages": ("de", "e1", "es")}, "language 'e1'"),
        ({"unseen": ("de",)}, "language de is named twice"),
        ({"tuples": ("de_de-de_en",)}, "2 sets, but --mode MONO_BIL_MULTI has 3"),
        ({"tuples": ("de_de-de_en-de_en,xx",)}, "xx not in --languages"),
        ({"tuples": ("de",)}, "no language tuple"),
    ],
)
def test_wrong_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        replace(PRESETS["small"], **fields)


def test_tuples() -> None:
    """The paper's syntax, and what each mode draws."""
    assert parse_tuple("el_el-el_ar-el_ar,el,hi") == (("el", ("el",)), ("el", ("ar",)), ("el", ("ar", "el", "hi")))
    assert parts("MIXT") == (("MONO", "MONO"), ("MONO", "BIL"), ("MONO", "MULTI"), ("BIL", "MULTI"))
    assert parts("TRANS") == (("MONO", "BIL"),)
    rng = np.random.default_rng(0)
    for _ in range(20):
        (a, mono), (b, bilingual), (c, multilingual) = draw_tuples(PRESETS["small"], rng)
        assert a == b == c
        assert mono == (a,)
        assert a not in bilingual
        assert {a, *bilingual} < set(multilingual)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--mode", "FOO"], "--mode FOO: one of"),
        (["train", "--dataset", "nope.csv"], "nope.csv: No such file"),
        (["evaluate", "nowhere"], "nowhere is not a run folder"),
        (["search", "--run", "nowhere", "--queries", "a"], "nowhere is not a run folder"),
        (["search", "--queries", " "], "an empty query"),
        (["bias", "--run", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_command_line_refuses(words: list[str], message: str, tmp_path: Path) -> None:
    """One line, exit status 2, nothing written."""
    code = f"import sys; sys.argv = ['maml-align', *{words!r}]; from maml_align.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_help_without_torch() -> None:
    code = "import sys, maml_align, maml_align.cli, maml_align.claims, maml_align.config; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
