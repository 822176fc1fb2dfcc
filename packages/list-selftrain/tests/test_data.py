"""Labelled, unlabelled and test parts that do not overlap, the corpus, injected noise, readers of public formats."""

import csv
import json
import os
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from list_selftrain import data as module
from list_selftrain.config import Config
from list_selftrain.data import CLASSES, LIST_FILES, Part, flip, load, read_texts
from metazoo.errors import UserError

REAL = os.environ.get("METAZOO_DATA")


@pytest.fixture(autouse=True)
def nothing_found(monkeypatch):
    monkeypatch.delenv("METAZOO_DATA", raising=False)

    def no_network(hub_id, subset=None):
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", no_network)


@pytest.fixture
def real(monkeypatch):
    if not REAL:
        pytest.skip("METAZOO_DATA is not set")
    monkeypatch.setenv("METAZOO_DATA", REAL)


@pytest.fixture
def folder(tmp_path):
    """Small files in the formats of the corpora and of LiST's splits."""
    sentences, splits = tmp_path / "data" / "sentences", tmp_path / "data" / "list-splits"
    sentences.mkdir(parents=True)
    (sentences / "subj.all").write_bytes(
        "\n".join([*(f"{i % 2} subj line {i} ." for i in range(60)), "0 h\u00e9roes", "1 ", ""]).encode("latin-1")
    )
    (sentences / "mpqa.all").write_text("".join(f"{i % 2} phrase {i}\n" for i in range(50)) + "0 phrase 49\n")
    (sentences / "rt-polarity.all").write_text("".join(f"{i % 2} film {i} .\n" for i in range(40)) + "1 a sofa\n")
    (sentences / "custrev.all").write_text("".join(f"{i % 2} camera {i} .\n" for i in range(40)))
    (sentences / "stsa.binary.train").write_text("".join(f"{i % 2} lamp {i}\n" for i in range(50)) + "0 a bed .\n")
    (sentences / "stsa.binary.dev").write_text("0 a bed\n1 a film\n")
    (sentences / "stsa.binary.test").write_text("1 a sofa .\n0 film 3\n")
    (sentences / "TREC.train.all").write_text("".join(f"{i % 6} What is {i} ?\n" for i in range(60)))
    (sentences / "TREC.test.all").write_text("2 What is AI ?\n4 What is 7 ?\n")
    texts = {
        "subj": [f"subj line {i} ." for i in range(60)],
        "mpqa": [f"phrase {i}" for i in range(50)],
        "sst2": [f"lamp {i}" for i in range(50)],
    }
    for name, lines in texts.items():
        own, kind = LIST_FILES[name]
        for k in (10, 30):
            for split in range(1, 6):
                _write_list(splits / own / f"{k}-{split}" / f"train.{kind}", name, lines[split : split + k])
        tests = {"subj": ["h\u0439roes", *lines[50:]], "mpqa": lines[45:], "sst2": ["A bed !", "a film"]}[name]
        _write_list(splits / own / f"test.{kind}", name, tests, head=name == "sst2")
    for part, rows in (("10-1/train", range(10)), ("10-2/train", range(8, 28)), ("test", range(90, 94))):
        path = splits / "RTE" / f"{part}.tsv"
        path.parent.mkdir(parents=True, exist_ok=True)
        body = "".join(f'{i}\tsome "p {i}.\th {i}.\t{("entailment", "not_entailment")[i % 2]}\n' for i in rows)
        path.write_text("index\tsentence1\tsentence2\tlabel\n" + body)
    return tmp_path / "data"


def _write_list(path, name, texts, head=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            csv.writer(file, lineterminator="\n").writerows((i % 2, text) for i, text in enumerate(texts))
        else:
            file.write("sentence\tlabel\n" * head + "".join(f"{text}\t{i % 2}\n" for i, text in enumerate(texts)))


def settings(dataset, **changes):
    return Config(**({"dataset": str(dataset), "unlabelled_batch": 1, "shots": 10} | changes))


def key(text):
    return re.sub(r"[\W_]+", "", text.lower())


def keys(part):
    return {key(" ".join(texts)) for texts in part.texts}


def check(data, overlap=0):
    """Parts of one data set, without overlap; corpus without test text."""
    parts = [data.labelled, data.unlabelled, *([data.test] if data.test else [])]
    for part in parts:
        assert part.labels is None or (part.labels.dtype == np.int64 and part.labels.shape == (len(part),))
    assert set(data.labelled.labels) == set(range(len(data.labels)))
    assert not keys(data.labelled) & keys(data.unlabelled)
    if data.test:
        assert not keys(data.unlabelled) & keys(data.test)
        assert len(keys(data.labelled) & keys(data.test)) <= overlap
        held = {key(text) for texts in data.test.texts for text in texts}
        assert not held & {key(text) for text in data.corpus}
    assert len({key(text) for text in data.corpus}) == len(data.corpus)


# Noise


@given(
    labels=st.lists(st.integers(0, 3), max_size=60),
    rate=st.floats(0, 1),
    noise=st.sampled_from(["class", "symmetric"]),
    seed=st.integers(0, 99),
)
def test_flips_are_exact(labels, rate, noise, seed):
    before = np.array(labels, dtype=np.int64)
    after = flip(before, noise, rate, 4, np.random.default_rng(seed))
    assert before.tolist() == labels
    changed = before != after
    if noise == "class":
        assert changed.sum() == round(rate * labels.count(1))
        assert (before[changed] == 1).all()
        assert (after[changed] == 0).all()
    else:
        assert changed.sum() == round(rate * len(labels))
        assert set(after) <= {0, 1, 2, 3}
    assert (after == flip(before, noise, rate, 4, np.random.default_rng(seed))).all()


def test_symmetric_flips_are_uniform_over_the_others():
    after = flip(np.zeros(9000, dtype=np.int64), "symmetric", 1.0, 4, np.random.default_rng(0))
    assert (np.bincount(after, minlength=4)[1:] > 2800).all()
    assert (flip(after, "none", 0.5, 4, np.random.default_rng(0)) == after).all()
    for noise, classes in (("other", 2), ("symmetric", 1)):
        with pytest.raises(UserError, match="give"):
            flip(after, noise, 0.1, classes, np.random.default_rng(0))


def test_take():
    part = Part((("a",), ("b",), ("c",)), np.array([0, 1, 0]), np.eye(3, dtype=np.float32))
    taken = part.take([2, 0])
    assert (len(taken), taken.texts) == (2, (("c",), ("a",)))
    assert taken.labels.tolist() == [0, 0]
    assert (taken.vectors == np.eye(3)[[2, 0]]).all()
    assert Part((("a",),)).take([]).labels is None


# Sets in the package


def test_generated_reviews():
    data, again, other = (load(Config(seed=seed)) for seed in (0, 0, 1))
    check(data)
    assert data.labelled.texts == again.labelled.texts != other.labelled.texts
    assert data.corpus == other.corpus
    assert data.test.texts == other.test.texts
    assert (len(data.labelled), len(data.unlabelled), len(data.test)) == (30, 2970, 500)
    assert 0.45 < data.unlabelled.labels.mean() < 0.55
    assert data.labels == ("negative", "positive")
    text = " ".join(data.corpus)
    for word in ("great", "terrible"):
        assert len(re.findall(rf" It was {word}\.", text)) > 100
        assert len(re.findall(rf"\b{word}\b", text)) > 250
    assert "It was" not in " ".join(texts[0] for texts in data.unlabelled.texts)


def test_gaussian():
    data, again, other = (load(Config(dataset="gaussian", model="features", dimension=7, seed=s)) for s in (3, 3, 4))
    assert (data.unlabelled.vectors == again.unlabelled.vectors).all()
    assert not (data.unlabelled.vectors == other.unlabelled.vectors).any()
    assert (len(data.labelled), len(data.unlabelled), len(data.test), data.corpus) == (30, 4000, 5000, ())
    vectors, labels = data.test.vectors, data.test.labels
    assert (vectors.dtype, vectors.shape, data.test.texts[0]) == (np.float32, (5000, 7), ())
    for label, mean in ((0, -2), (1, 2)):
        assert np.allclose(vectors[labels == label].mean(0), [mean] + [0] * 6, atol=0.1)
        assert np.allclose(np.cov(vectors[labels == label].T), np.eye(7), atol=0.15)
    assert abs(((vectors[:, 0] > 0) == labels).mean() - 0.977) < 0.01
    for seed in range(20):
        few = load(Config(dataset="gaussian", model="features", shots=2, seed=seed)).labelled
        assert sorted(few.labels) == [0, 1]


def test_limits():
    whole = load(Config())
    one, other = (load(Config(seed=seed, max_unlabelled=100, max_test=50)) for seed in (0, 1))
    assert len(one.unlabelled) == len(other.unlabelled) == 100
    assert one.unlabelled.texts != other.unlabelled.texts
    assert one.test.texts == other.test.texts
    assert len(one.test) == 50
    truth = dict(zip(whole.unlabelled.texts, whole.unlabelled.labels, strict=True))
    assert [truth[texts] for texts in one.unlabelled.texts] == one.unlabelled.labels.tolist()
    assert load(Config(max_unlabelled=10**6)).unlabelled.texts == whole.unlabelled.texts


# Files of the corpora and of LiST


def test_splits_of_list(folder, capsys):
    data = load(settings("subj", data_dir=str(folder), seed=1))
    check(data)
    assert data.labels == ("subjective", "objective")
    assert data.labelled.texts == tuple((f"subj line {i} .",) for i in range(2, 12))
    assert (len(data.unlabelled), len(data.test)) == (40, 11)
    assert data.test.texts[0] == ("h\u00e9roes",)  # LiST's file has it through Mac Cyrillic
    chosen = load(settings("subj", data_dir=str(folder), split=5, shots=30))
    assert chosen.labelled.texts[0] == ("subj line 5 .",)
    check(load(settings("mpqa", data_dir=str(folder), shots=30)))
    assert capsys.readouterr().err == ""
    sst2 = load(settings("sst2", data_dir=str(folder)))
    check(sst2)
    assert sst2.test.texts == (("A bed !",), ("a film",))
    assert len(sst2.unlabelled) == 40
    assert capsys.readouterr().err == "1 unlabelled texts are test texts: dropped\n"


def test_rte(folder, monkeypatch, capsys):
    data = load(settings("rte", data_dir=str(folder)))
    check(data)
    assert data.labels == ("not_entailment", "entailment")
    assert data.labelled.texts[0] == ('some "p 0.', "h 0.")
    assert data.labelled.labels.tolist() == [1, 0] * 5
    assert (len(data.unlabelled), len(data.test)) == (18, 4)
    monkeypatch.setenv("METAZOO_DATA", str(folder))
    assert load(settings("rte")).unlabelled.texts == data.unlabelled.texts
    assert "no network" in capsys.readouterr().err
    rows = [{"sentence1": f"p {i}", "sentence2": "h", "label": i % 2, "idx": i} for i in range(20)]
    parts = {"train": rows, "validation": rows[:1], "test": [rows[0] | {"label": -1}]}
    splits = {name: datasets.Dataset.from_list(part) for name, part in parts.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_: splits)
    hub = load(settings("rte"))
    assert (len(hub.unlabelled), hub.unlabelled.labels[0], len(hub.test)) == (20, 1, 4)
    monkeypatch.delenv("METAZOO_DATA")
    assert load(settings("rte")).test.texts == (("p 0", "h"),)


def test_drawn_sets(folder, capsys):
    trec = load(settings("trec", data_dir=str(folder), shots=12))
    check(trec)
    assert (trec.labels[2], trec.test.texts[0], trec.test.labels[0]) == ("Expression", ("What is AI ?",), 2)
    assert (len(trec.labelled), len(trec.unlabelled)) == (12, 47)
    assert capsys.readouterr().err == "1 unlabelled texts are test texts: dropped\n"
    for name in ("mr", "cr"):
        one, other = (load(settings(name, data_dir=str(folder), seed=seed)) for seed in (0, 1))
        check(one)
        check(other)
        assert one.labelled.texts != other.labelled.texts
        assert one.test.texts == other.test.texts
        assert one.corpus == other.corpus
        assert 8 <= len(one.test) <= 9
    # neither the splits nor the number of shots: the test stays LiST's
    drawn = load(settings("subj", data_dir=str(folder), shots=7))
    check(drawn)
    assert (len(drawn.labelled), len(drawn.unlabelled), len(drawn.test)) == (7, 43, 11)
    capsys.readouterr()
    missing = load(settings("subj", data_dir=str(folder), shots=20))
    assert (len(missing.labelled), len(missing.unlabelled)) == (20, 30)
    assert "20-1 not found" in capsys.readouterr().err


def test_sentences_alone(folder):
    (folder / "list-splits").rename(folder / "elsewhere")
    subj = load(settings("subj", data_dir=str(folder), shots=30))
    check(subj)
    assert (len(subj.labelled), len(subj.test)) == (30, 13)
    sst2 = load(settings("sst2", data_dir=str(folder)))
    check(sst2)
    assert len(sst2.test) == 2


def test_corpus_is_the_same_for_all_of_list(folder):
    made = {
        (name, seed): load(settings(name, data_dir=str(folder), seed=seed, shots=shots)).corpus
        for name, shots in (("subj", 10), ("mpqa", 30), ("sst2", 10), ("rte", 10), ("trec", 12))
        for seed in (0, 1)
    }
    (corpus,) = set(made.values())
    kept = {key(text) for text in corpus}
    assert {"film1", "lamp3", "whatis1", "somep3", "h3", "subjline49"} <= kept
    assert not {"asofa", "film3", "abed", "whatisai", "whatis7", "subjline50", "phrase49", "someh90"} & kept


@pytest.mark.parametrize(
    ("name", "sizes", "overlap"),
    [
        ("subj", (30, 7968, 2000), 0),
        ("mpqa", (30, 7502, 2000), 6),  # LiST's own labelled phrases are among its test phrases
        ("sst2", (30, 6916, 872), 0),
        ("rte", (30, 118, 277), 0),
        ("mr", (30, 8469, 2162), 0),
        ("cr", (30, 2968, 771), 0),
        ("trec", (30, 5411, 500), 0),
    ],
)
def test_real_files(real, name, sizes, overlap):
    data = load(settings(name, shots=30))
    check(data, overlap)
    assert tuple(map(len, (data.labelled, data.unlabelled, data.test))) == sizes
    assert data.labels == CLASSES[name]
    if name not in ("mr", "cr"):  # of which a part is held out
        assert len(data.corpus) == 29854


def test_real_corpus(real):
    corpora = [load(settings(name, seed=seed)).corpus for name, seed in (("subj", 0), ("rte", 1), ("mpqa", 1))]
    assert corpora[0] == corpora[1] == corpora[2]


def test_real_splits(real):
    folder = Path(REAL) / "list-splits"
    found = [(name, path) for name, (own, kind) in LIST_FILES.items() for path in folder.glob(f"{own}/*/train.{kind}")]
    assert len(found) == 60
    for name, path in found:
        labels = [label for _, label in module._list_file(path, name)]
        assert len(labels) == int(path.parent.name.partition("-")[0])
        assert set(labels) == {0, 1}


# Files of one's own


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
@pytest.mark.parametrize("columns", [("text",), ("sentence",), ("premise", "hypothesis"), ("text_a", "text_b")])
def test_own_files(tmp_path, kind, columns, capsys):
    def write(path, rows):
        with path.open("w", newline="", encoding="utf-8") as file:
            if kind == "jsonl":
                file.write("\n".join(json.dumps(row) for row in rows) + "\n\n")
            else:
                writer = csv.DictWriter(file, list(rows[0]), delimiter={"csv": ",", "tsv": "\t"}[kind])
                writer.writeheader()
                writer.writerows(rows)

    rows = [dict.fromkeys(columns, f"t\u00e9xt, {i}") | {"label": ("pos", "neg", "odd")[i % 3]} for i in range(30)]
    path, test = tmp_path / f"own.{kind}", tmp_path / f"test.{kind}"
    write(path, rows)
    write(test, [*rows[28:], dict.fromkeys(columns, "new") | {"label": "pos"}])
    data = load(settings(path, test=str(test)))
    check(data)
    assert data.labels == ("neg", "odd", "pos")
    assert (len(data.labelled), len(data.unlabelled), len(data.test)) == (10, 18, 3)
    assert capsys.readouterr().err == "2 unlabelled texts are test texts: dropped\n"
    for part in (data.labelled, data.unlabelled):  # the truth stays with its text
        wanted = [{"neg": 0, "odd": 1, "pos": 2}[("pos", "neg", "odd")[int(t[0].split()[1]) % 3]] for t in part.texts]
        assert part.labels.tolist() == wanted
    assert data.corpus == load(settings(path, test=str(test), seed=7)).corpus
    assert load(settings(path)).test is None
    everything = load(settings(path, shots=None, sessions=0))
    assert (len(everything.labelled), len(everything.unlabelled)) == (30, 0)
    assert len(everything.labelled.texts[0]) == len(columns)
    more = load(settings(path, shots=None, unlabelled=str(test)))
    assert (len(more.labelled), more.unlabelled.texts, more.unlabelled.labels) == (30, (("new",) * len(columns),), None)
    assert read_texts(test)[-1] == ("new",) * len(columns)
    everything = load(settings(path, shots=None, sessions=0, test=str(test)))
    assert "2 labelled texts are test texts" in capsys.readouterr().err


def test_own_unlabelled_texts_of_a_set_in_the_package(tmp_path, folder, capsys):
    path = tmp_path / "more.txt"
    path.write_bytes("\ufeffsubj line 50\r\n\r\nnew text\r\n subj line 3.\r\nlast".encode())
    assert read_texts(path) == [("subj line 50",), ("new text",), ("subj line 3.",), ("last",)]
    data = load(settings("subj", data_dir=str(folder), unlabelled=str(path)))
    check(data)
    assert data.unlabelled.texts == (("new text",), ("last",))
    assert capsys.readouterr().err == "1 unlabelled texts are test texts: dropped\n"


ROWS = "text,label\n" + "".join(f"t{i},{i % 2}\n" for i in range(40))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx\ny,1\n", "a.csv line 2: not as many"),
        ("a.csv", "text,label\nx,1,2\ny,1\n", "a.csv line 2: not as many"),
        ("a.csv", "text,label\n", "no examples"),
        ("a.csv", "words,label\nx,1\n", "line 2: no column `text` .columns words, label"),
        ("a.csv", "text,mark\nx,0\ny,1\n", "line 2: the label is None .*column `label`"),
        ("a.csv", "text,label\nx,0\ny,\n", "line 3: the label is ''"),
        ("a.csv", "text,label\nx,0\n ,1\n", "line 3: column `text` is ' ': give a text"),
        ("a.csv", "text,label\nx,0\ny,0\n", "all labels are '0'"),
        ("a.csv", b"text,label\nx,0\n\xe9,1\n", "line 3: not UTF-8: save the file as UTF-8"),
        ("a.csv", f"text,label\n{'x' * 200_000},1\n", "line 2: no CSV"),
        ("a.csv", None, "cannot be read"),
        ("a.tsv", "sentence1\tsentence2\tlabel\nx\t\t1\n", "line 2: column `sentence2` is ''"),
        ("a.jsonl", "{\n{}", "line 1: no JSON"),
        ("a.jsonl", "[1]\n[2]", "line 1: give an object"),
        ("a.jsonl", '{"text": NaN, "label": 1}', "line 1: column `text` is nan"),
        ("a.jsonl", '{"text": "x", "label": NaN}', "line 1: the label is nan"),
        ("a.jsonl", '{"text": "x", "label": 1}\n{"text_a": "x", "text_b": "y", "label": 0}', "one text and some"),
        ("a.jsonl", None, "cannot be read"),
    ],
)
def test_refused_files(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=message) as caught:
        load(settings(path))
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nbad \xff\n", "a.txt line 2: not UTF-8: save the file as UTF-8"),
        ("a.txt", b"\n \n", "no texts"),
        ("a.txt", None, "cannot be read"),
        ("a.doc", b"x", "no kind of file"),
        ("a.csv", b"text\n", "no texts"),
    ],
)
def test_refused_texts(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dataset": "nowhere"}, "unknown data set 'nowhere': one of generated, subj, mpqa, sst2, rte"),
        ({"dataset": "mr", "split": 1}, "--split: mr has no splits"),
        ({"dataset": "subj", "split": 1, "shots": 12}, "--split 1: LiST has splits of 10, 20 and 30 shots, not of 12"),
        ({"dataset": "subj", "split": 1, "shots": 20}, "--split 1: .*20-1.* not found"),
        ({"dataset": "subj", "split": 1, "data_dir": None}, "--split 1: .*subj/test.csv not found"),
        ({"dataset": "mr", "data_dir": "not-there"}, "not a folder"),
        ({"dataset": "subj", "data_dir": "not-there"}, "not a folder"),
        ({"dataset": "mpqa", "data_dir": None}, "mpqa.all not found"),
        ({"dataset": "mr", "data_dir": None}, "rt-polarity.all not found.*no network"),
        ({"dataset": "rte", "data_dir": None}, "no network"),
        ({"dataset": "hub:gone"}, "hub data set 'gone': no network"),
        ({"dataset": "mr", "unlabelled_batch": 64}, "22 unlabelled .* fewer than --unlabelled-batch 64.*--sessions 0"),
        ({"dataset": "mr", "shots": None}, "0 unlabelled"),
        ({"dataset": "mr", "shots": 1}, "--shots 1 is less than the 2 classes"),
        ({"dataset": "own.csv", "test": "test.csv"}, "test.csv line 3: the label '7' is none of .* 0, 1"),
        ({"dataset": "own.csv", "test": "x.txt"}, "x.txt: labelled rows are read from"),
        ({"dataset": "own.csv", "unlabelled": "x.txt", "noise": "class", "noise_rate": 0.5}, "--noise flips labels"),
        ({"dataset": "own.csv", "unlabelled": "pairs.tsv"}, "some examples are one text and some are two"),
        ({"dataset": "rare.csv", "shots": 2}, "1000 draws of 2 examples lack one of the 2 classes"),
        ({"dataset": "gaussian", "model": "features", "shots": 1}, "--shots 1: give 2 or more"),
        ({"dataset": "gaussian", "model": "features", "shots": None}, "--shots None: give 2 or more"),
        ({"dataset": "gaussian", "model": "features", "test": "test.csv"}, "leave --unlabelled and --test out"),
    ],
)
def test_refused_settings(folder, tmp_path, monkeypatch, change, message):
    monkeypatch.chdir(tmp_path)
    Path("own.csv").write_text(ROWS)
    Path("test.csv").write_text("text,label\nx,1\ny,7\n")
    Path("x.txt").write_text("x\n")
    Path("pairs.tsv").write_text("text_a\ttext_b\nx\ty\n")
    Path("rare.csv").write_text("text,label\n" + "".join(f"t{i},0\n" for i in range(100_000)) + "x,1\n")
    with pytest.raises(UserError, match=message) as caught:
        load(settings(**({"data_dir": str(folder)} | change)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("file", "content", "name", "message"),
    [
        ("sentences/rt-polarity.all", "0 a\nx b\n", "mr", "line 2: 'x' is no label 0 to 1"),
        ("sentences/rt-polarity.all", "", "mr", "no labelled examples"),
        ("list-splits/subj/10-1/train.csv", "0,a\nb\n", "subj", "line 2"),
        ("list-splits/subj/10-1/train.csv", "0,a\n", "subj", "class 'objective' has no labelled example"),
        ("list-splits/SST-2/10-1/train.tsv", "a\t0\n\t1\n", "sst2", "line 2"),
        ("list-splits/RTE/test.tsv", "index\tsentence1\tsentence2\tlabel\n0\ta\tentailment\n", "rte", "line 2"),
        ("list-splits/RTE/test.tsv", "", "rte", "no examples"),
    ],
)
def test_damaged_files_of_the_corpora(folder, file, content, name, message):
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message):
        load(settings(name, data_dir=str(folder)))


# The hub


def test_hub_sets(monkeypatch):
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "ya"])}
    )
    rows = [{"sentence": f"s {i}", "label": i % 2} for i in range(20)]
    trec = [{"text": f"t {i}", "coarse_label": i % 6} for i in range(40)]
    subj = [{"text": f"u {i}", "label": i % 2, "label_text": ("objective", "subjective")[i % 2]} for i in range(40)]
    unseen = {
        "train": [{"text": "x", "label": "b"}, {"text": "y", "label": "a"}],
        "test": [{"text": "z", "label": "c"}],
    }
    hidden = [{"sentence": "hidden", "label": -1}]
    sets = {
        "stanfordnlp/sst2": {"train": rows, "validation": [{"sentence": "v", "label": 0}], "test": hidden},
        "me/own": {"train": rows, "test": [{"sentence": "t", "label": 1}]},
        "me/single": {"data": rows},
        "me/none": {"train": [{"sentence": "x"}]},
        "me/one": {"train": [{"sentence": "x", "label": 0}]},
        "me/unseen": unseen,
        "CogComp/trec": {"train": trec, "test": [{"text": "t", "coarse_label": 0}]},
        "SetFit/subj": {"train": subj[:30], "test": subj[30:]},
    }
    asked = []

    def fake(hub_id, subset=None):
        asked.append((hub_id, subset))
        named = features if hub_id == "me/own" else None
        return {name: datasets.Dataset.from_list(part, features=named) for name, part in sets[hub_id].items()}

    monkeypatch.setattr(datasets, "load_dataset", fake)
    sst2 = load(settings("sst2"))
    check(sst2)
    assert (len(sst2.unlabelled), sst2.test.texts) == (10, (("v",),))  # the test split has no labels
    own = load(settings("hub:me/own:part"))
    check(own)
    assert (own.labels, own.test.labels.tolist(), asked[-1]) == (("no", "ya"), [1], ("me/own", "part"))
    single = load(settings("hub:me/single", shots=4))
    check(single)
    assert (single.labels, len(single.labelled), len(single.test)) == (("0", "1"), 4, 4)
    questions = load(settings("trec", shots=12))
    assert (questions.labels[questions.test.labels[0]], len(questions.unlabelled)) == ("Expression", 28)
    lines = load(settings("subj"))
    check(lines)
    assert all(
        int(texts[0].split()[1]) % 2 != label for texts, label in zip(lines.test.texts, lines.test.labels, strict=True)
    )
    for name, message in (("none", "column `label`"), ("one", "two classes"), ("unseen", "test row 1: the label 'c'")):
        with pytest.raises(UserError, match=message):
            load(settings(f"hub:me/{name}"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="pip install"):
        load(settings("hub:me/own"))


def test_a_large_hub_split_is_sampled():
    split = datasets.Dataset.from_list([{"i": i} for i in range(50)])
    taken = [row["i"] for row in module._sample(split, 10, 0)]
    assert (len(set(taken)), taken) == (10, sorted(taken))
