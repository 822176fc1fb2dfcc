"""Splits, what may be trained on, readers in the public formats, and the drawing of instances."""

import csv
import json
import os
import re

import datasets
import numpy as np
import pytest
from flipped_learning.config import Config
from flipped_learning.data import Task, draw, instances, load, templates_of, wrong_options
from flipped_learning.templates import NOVEL_PAIRS, SEEN_PAIRS, Instance, Template
from metazoo.errors import UserError

WORDS = {word for pair in (*SEEN_PAIRS, *NOVEL_PAIRS) for word in pair}
YAML = """templates:
  a: !Template
    answer_choices: negative ||| positive
    jinja: '{{text}} What is the sentiment? ||| {{answer_choices[label]}}'
    name: Plain
  b: !Template
    answer_choices: bad ||| good
    jinja: 'Is it {{"good or bad"}}? {{text}} ||| {{ answer_choices [label] }}'
    name: Listed
"""


REAL = os.environ.get("METAZOO_DATA")


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch):
    monkeypatch.delenv("METAZOO_DATA", raising=False)


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "templates.yaml"
    path.write_text(YAML)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Small files in the formats of the corpora."""
    sentences = tmp_path / "data" / "sentences"
    sentences.mkdir(parents=True)
    lines = [f"{i % 2} film number {i} ." for i in range(20)]
    (sentences / "rt-polarity.all").write_bytes("\n".join([*lines, "1 caf\u00e9 film", "0 ", ""]).encode("latin-1"))
    (sentences / "stsa.binary.train").write_text("1 a lamp\n0 a chair\n1 a lame lamp\n")
    (sentences / "stsa.binary.dev").write_text("0 a bed\n")
    (sentences / "stsa.binary.test").write_text("0 film number 3.\n1 a sofa\n0 Film  number 4 .\n")
    (sentences / "TREC.train.all").write_text("0 What is it ?\n2 What is AI ?\n")
    (sentences / "TREC.test.all").write_text("5 How far ?\n")
    rte = tmp_path / "data" / "list-splits" / "RTE"
    for name, rows in (("10-1/train", (0, 1)), ("10-2/train", (1, 2)), ("test", (3,))):
        (rte / name).parent.mkdir(parents=True, exist_ok=True)
        body = "".join(f'{i}\tsome "p {i}.\th {i}.\t{("entailment", "not_entailment")[i % 2]}\n' for i in rows)
        (rte / f"{name}.tsv").write_text("index\tsentence1\tsentence2\tlabel\n" + body)
    return str(tmp_path / "data")


def key(text):
    return re.sub(r"[\W_]+", "", text.lower())


def test_generated_reviews():
    data, again, other = load(Config()), load(Config()), load(Config(seed=1))
    (task,) = data.tasks
    assert data == again
    assert data.corpus != other.corpus
    assert (len(task.train), len(task.test), task.sentiment) == (4000, 600, True)
    assert not {row["text"] for row in task.train} & {row["text"] for row in task.test}
    assert 0.45 < np.mean([row["label"] for row in task.train]) < 0.55
    counts = {word: 0 for word in WORDS}
    for row in task.train:
        for word in WORDS & set(row["text"].split()):
            counts[word] += 1
    assert min(counts.values()) >= 40
    assert {"sentiment", "expressed", "negative", "positive"} <= set(" ".join(data.corpus).split())
    assert not {key(text) for text in data.corpus} & {key(row["text"]) for row in task.test}


def test_hidden_words_are_in_no_training_text():
    data = load(Config(hide_words=True, pairs=6))
    novel = {word for pair in NOVEL_PAIRS for word in pair}
    trained = " ".join([*data.corpus, *(row["text"] for row in data.tasks[0].train)]).lower()
    assert not novel & set(re.findall(r"\w+", trained))
    assert novel & set(" ".join(row["text"] for row in data.tasks[0].test).split())


def test_files_of_sentences(folder, capsys):
    data = load(Config(dataset=("mr", "sst2"), zero_shot=("trec", "rte"), data_dir=folder))
    mr, sst2 = data.tasks
    trec, rte = data.zero_shot
    assert len(mr.train) + len(mr.test) <= 21
    assert len(mr.test) == 5
    shared = {"filmnumber3", "filmnumber4"}
    assert not shared & {key(row["text"]) for row in mr.train}  # they are SST-2's test
    assert "mr: " in capsys.readouterr().err
    assert [row["text"] for row in (*mr.train, *mr.test) if "caf" in row["text"]] == ["caf\u00e9 film"]
    assert {row["text"] for row in sst2.train} == {"a lamp", "a chair", "a lame lamp", "a bed"}
    assert sst2.train[0]["sentence"] == sst2.train[0]["text"]
    assert (len(sst2.test), trec.train, len(trec.test), len(rte.test)) == (3, (), 1, 1)
    assert trec.test[0]["label"] == 5
    assert rte.test[0] == {"premise": 'some "p 3.', "hypothesis": "h 3.", "label": 1}
    held = {key(row["text"]) for row in (*mr.test, *sst2.test, *trec.test)}
    assert not held & {key(text) for text in data.corpus}
    assert "What is AI ?" in data.corpus


def test_trec_and_rte_for_training(folder):
    trec, rte = load(Config(dataset=("trec", "rte"), data_dir=folder)).tasks
    assert {row["text"]: row["label"] for row in trec.train} == {"What is it ?": 2, "What is AI ?": 0}
    assert len(rte.train) == 3
    abbreviation = next(i for i in instances(trec, trec.templates[0], None, split="train") if "AI" in i.fields[0])
    assert abbreviation.options[abbreviation.label] == "Abbreviation"


def test_zero_shot_of_a_set_without_a_test_split_is_all_of_it(folder):
    data = load(Config(zero_shot=("mr",), data_dir=folder, max_examples=50))
    assert (len(data.tasks[0].train), len(data.zero_shot[0].test)) == (50, 21)
    assert not any("number" in text for text in data.corpus)


def test_real_corpora(monkeypatch):
    if not REAL:
        pytest.skip("METAZOO_DATA is not set")
    monkeypatch.setenv("METAZOO_DATA", REAL)
    data, again = (load(Config(dataset=("mr",), zero_shot=("cr",), pairs=6)) for _ in range(2))
    mr, cr = data.tasks[0], data.zero_shot[0]
    assert data == again
    assert (len(mr.train), len(mr.test), len(cr.test)) == (8500, 2162, 3771)
    assert not {row["text"] for row in mr.train} & {row["text"] for row in mr.test}
    assert not {key(text) for text in data.corpus} & {key(row["text"]) for row in (*mr.test, *cr.test)}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_own_files(tmp_path, yaml_file, kind):
    rows = [{"text": f"text, {i}", "label": ("negative", "positive")[i % 2] if i else "0"} for i in range(10)]
    path = tmp_path / f"own.{kind}"
    with path.open("w", newline="") as file:
        if kind == "csv":
            writer = csv.DictWriter(file, ["text", "label"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("\n".join(json.dumps(row) for row in rows))
    (task,) = load(Config(dataset=(str(path),), templates=yaml_file)).tasks
    assert (len(task.train), len(task.test), task.sentiment) == (8, 2, True)
    assert all(row["label"] == int(row["text"].split()[1]) % 2 for row in (*task.train, *task.test))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,0\n", "two or more"),
        ("a.csv", "text,label\nx\ny,1\n", "line 2"),
        ("a.csv", "text,mark\nx,0\ny,1\n", "column `label`"),
        ("a.csv", "text,label\nx,so so\ny,1\n", "no option"),
        ("a.jsonl", "{\n{}", "line 1: no JSON"),
        ("a.jsonl", "[1]\n[2]", "an object"),
        ("a.jsonl", '{"text": "x", "label": -1}\n{"text": "y", "label": 1}', "column `label`"),
        ("a.jsonl", None, "cannot be read"),
        ("a.csv", None, "cannot be read"),
    ],
)
def test_refused_files(tmp_path, yaml_file, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load(Config(dataset=(str(path),), templates=yaml_file))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": ("nowhere",)}, "unknown data set"),
        ({"dataset": ("x.csv",)}, "give --templates"),
        ({"zero_shot": ("generated",)}, "both"),
        ({"template_names": ("nope",)}, "Text Expressed Sentiment"),
        ({"template_names": ("nope", "Text Expressed Sentiment")}, "no data set has it"),
        ({"pairs": 1, "template_names": ("Sentiment with choices",)}, "--pairs"),
        ({"templates": "not-there"}, "no such file"),
        ({"dataset": ("mr",), "data_dir": "not-there"}, "not a folder"),
        ({"dataset": ("mpqa",)}, "not found"),
        ({"dataset": ("p3:x",)}, "--templates"),
    ],
)
def test_refused_settings(change, message):
    with pytest.raises(UserError, match=message) as caught:
        load(Config(**change))
    assert "\n" not in str(caught.value)


def test_bad_label_in_a_file(folder, tmp_path):
    (tmp_path / "data" / "sentences" / "rt-polarity.all").write_text("0 a\nx b\n")
    with pytest.raises(UserError, match="line 2"):
        load(Config(dataset=("mr",), data_dir=folder))


def test_templates_of_a_promptsource_folder(tmp_path):
    (tmp_path / "rotten_tomatoes").mkdir()
    (tmp_path / "rotten_tomatoes" / "templates.yaml").write_text(YAML)
    config = Config(templates=str(tmp_path))
    assert [template.name for template in templates_of(config, "mr")] == ["Plain", "Listed"]
    assert [template.name for template in templates_of(Config(templates=str(tmp_path), pairs=1), "mr")] == ["Plain"]
    assert templates_of(config, "subj") == templates_of(Config(), "subj")
    assert [template.name for template in templates_of(config, "hub:somebody/rotten_tomatoes")] == ["Plain", "Listed"]


def test_hub_sets(monkeypatch, yaml_file):
    rows = [{"sentence": f"s {i}", "label": i % 2} for i in range(6)]
    hidden = [{"sentence": "t", "label": -1}]
    parts = {"train": rows[:4], "validation": rows[4:], "test": hidden}
    asked = []

    def fake(hub_id, subset=None):
        asked.append((hub_id, subset))
        if hub_id == "gone":
            raise ConnectionError("no\nnetwork")
        column = "text" if hub_id == "me/own" else "sentence"
        return {
            name: datasets.Dataset.from_list([{column: row["sentence"], "label": row["label"]} for row in part])
            for name, part in parts.items()
        }

    monkeypatch.setattr(datasets, "load_dataset", fake)
    (sst2,) = load(Config(dataset=("sst2",))).tasks
    assert {row["text"] for row in sst2.train} == {f"s {i}" for i in range(4)}
    assert {row["text"] for row in sst2.test} == {"s 4", "s 5"}  # the test split has no labels
    (own,) = load(Config(dataset=("hub:me/own:part",), templates=yaml_file)).tasks
    assert (len(own.train), len(own.test)) == (4, 2)
    assert asked == [("stanfordnlp/sst2", None), ("me/own", "part")]
    with pytest.raises(UserError, match="no network"):
        load(Config(dataset=("hub:gone",), templates=yaml_file))


def test_prompts_of_p3(monkeypatch, yaml_file, capsys):
    def prompt(text, label, words=("negative", "positive"), pattern="{} What is the sentiment?"):
        return {
            "inputs_pretokenized": pattern.format(text),
            "targets_pretokenized": f"\n{words[label]}",
            "answer_choices": list(words),
        }

    subsets = {
        "films_Plain": [prompt(f"film {i}", i % 2) for i in range(4)] + [prompt("x", 0, pattern="{} Unknown?")],
        "films_Listed": [prompt(f"film {i}", i % 2, ("bad", "good"), "Is it good or bad? {}") for i in range(4)],
    }
    names = [*subsets, "films_Plain_score_eval", "other_Plain"]
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda hub_id: names)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda hub_id, subset: {
            "train": datasets.Dataset.from_list(subsets[subset]),
            "test": datasets.Dataset.from_list([row | {} for row in subsets[subset][:1]]),
        },
    )
    data = load(Config(zero_shot=("p3:films",), templates=yaml_file))
    assert "1 of 11 prompts" in capsys.readouterr().err
    (task,) = data.zero_shot
    assert [template.name for template in task.templates] == ["Plain", "Listed"]
    assert [i.options for i in instances(task, task.templates[1], None)] == [("bad", "good")]
    assert [i.options for i in instances(task, task.templates[1], None, ("dull", "lively"))] == [("dull", "lively")]
    subsets["films_Plain"] = subsets["films_Listed"] = [prompt("x", 0, pattern="{} Unknown?")]
    with pytest.raises(UserError, match="none of"):
        load(Config(dataset=("p3:films",), templates=yaml_file))
    with pytest.raises(UserError, match="no such prompts"):
        load(Config(dataset=("p3:nothing",), templates=yaml_file))


def task_of(count, name="t", sentiment=True, text="x"):
    template = Template("plain", "{{text}} What? ||| {{answer_choices[label]}}", "no good ||| good")
    rows = tuple({"text": text, "label": i % 2} for i in range(count))
    return Task(name, rows, rows, (template,), sentiment)


def test_drawing():
    tasks = [task_of(300, text="a"), task_of(100, text="b", sentiment=False)]
    drawn = draw(tasks, 2000, np.random.default_rng(0), 2)
    assert drawn == draw(tasks, 2000, np.random.default_rng(0), 2)
    first = [instance for instance in drawn if instance.fields == ("a",)]
    assert 0.7 < len(first) / 2000 < 0.8
    assert {instance.options for instance in first} == set(SEEN_PAIRS[:2])
    assert {instance.options for instance in drawn if instance.fields == ("b",)} == {("no good", "good")}
    with pytest.raises(UserError, match=r"in a row.*empty"):
        draw([task_of(3, text=" ")], 1, np.random.default_rng(0), 0)
    with pytest.raises(UserError, match="no training examples"):
        draw([], 1, np.random.default_rng(0), 0)


def test_instances_of_a_split():
    task = task_of(5)
    assert len(instances(task, task.templates[0], 3)) == 3
    assert len(instances(task, task.templates[0], None, ("dull", "lively"))) == 5
    assert instances(task_of(5, text=""), task.templates[0], None) == []
    with pytest.raises(UserError, match="train or test"):
        instances(task, task.templates[0], None, split="dev")


def test_wrong_options_are_wrong_and_uniform():
    made = [Instance(("", "?"), ("x",), ("a", "b", "c", "d"), i % 4) for i in range(4000)]
    wrong = np.array(wrong_options(made, np.random.default_rng(0)))
    right = np.arange(4000) % 4
    assert not (wrong == right).any()
    assert (np.bincount((wrong - right) % 4, minlength=4)[1:] > 1200).all()
    for bad in (Instance(("", "?"), ("x",), ("a",), 0), Instance(("", "?"), ("x",), ("a", "b"), None)):
        with pytest.raises(UserError, match="give both"):
            wrong_options([bad], np.random.default_rng(0))
