"""Data sets with few labels: labelled, unlabelled and test examples, and raw text without any test text.

LiST's own splits of Subj, MPQA, SST-2 and RTE where its files are found; else labelled examples are drawn at random.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from metazoo.data import find
from metazoo.errors import UserError

from list_selftrain.config import Config

Example = tuple[tuple[str, ...], int | None]

SENTIMENT = ("negative", "positive")
# Class names in the order of the label ids of the files.
CLASSES = {
    "subj": ("subjective", "objective"),
    "mpqa": SENTIMENT,
    "sst2": SENTIMENT,
    "rte": ("not_entailment", "entailment"),
    "mr": SENTIMENT,
    "cr": SENTIMENT,
    "trec": ("Description", "Entity", "Expression", "Human", "Location", "Number"),
}
NAMES = ("generated", *CLASSES, "gaussian")
# Training file and, where there is one, test file.
CORPORA = {
    "subj": ("subj.all",),
    "mpqa": ("mpqa.all",),
    "mr": ("rt-polarity.all",),
    "cr": ("custrev.all",),
    "sst2": ("stsa.binary.train", "stsa.binary.test"),
    "trec": ("TREC.train.all", "TREC.test.all"),
}
NEVER_TRAINED = {"stsa.binary.dev": 2, "stsa.binary.test": 2, "TREC.test.all": 6}
LIST_FILES = {"subj": ("subj", "csv"), "mpqa": ("mpqa", "csv"), "sst2": ("SST-2", "tsv"), "rte": ("RTE", "tsv")}
LIST_SHOTS = (10, 20, 30)
HUB = {
    "mr": ("cornell-movie-review-data/rotten_tomatoes", None),
    "cr": ("SetFit/CR", None),
    "sst2": ("stanfordnlp/sst2", None),
    "subj": ("SetFit/subj", None),
    "trec": ("CogComp/trec", None),
    "rte": ("nyu-mll/glue", "rte"),
}
TRAIN_SIZES = {"mr": 8500, "cr": 3000, "subj": 9000, "mpqa": 9600}  # the rest is test; other sets: four fifths
# files have description 0, entity 1, abbreviation 2; the hub the other way round
TREC_LABELS = (2, 1, 0, 3, 4, 5)
CAP = 500_000  # of a hub split
TEXT_COLUMNS = (
    ("text",), ("text_a", "text_b"), ("sentence1", "sentence2"), ("premise", "hypothesis"),
    ("question1", "question2"), ("question", "sentence"), ("sentence",),
)  # fmt: skip
TABLES = (".csv", ".tsv", ".jsonl")
DRAWS = 1000


@dataclass(frozen=True)
class Part:
    """Examples: texts (1 or 2 strings each), labels int64 [N] or None, vectors float32 [N, d] or None (gaussian)."""

    texts: tuple[tuple[str, ...], ...]
    labels: np.ndarray | None = None
    vectors: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, indices: Sequence[int] | np.ndarray) -> Part:
        """The examples at `indices`, in that order."""
        rows = np.asarray(indices, dtype=np.int64)
        return Part(
            tuple(self.texts[i] for i in rows),
            None if self.labels is None else self.labels[rows],
            None if self.vectors is None else self.vectors[rows],
        )


@dataclass(frozen=True)
class Data:
    """A data set with few labels.

    Attributes:
        name: as in the settings.
        labels: class names, in order of the label ids.
        labelled: with labels, at least one of each class.
        unlabelled: its labels are the truth where that is known, for injected noise and for reports: never trained on.
        test: with labels; None: there is none.
        corpus: raw texts for masked language modelling, without any test text.
        pseudo: probabilities of the classes of the unlabelled examples from elsewhere, [N, C], such as an ensemble's
            or a larger model's; every session then learns them instead of the teacher's.
    """

    name: str
    labels: tuple[str, ...]
    labelled: Part
    unlabelled: Part
    test: Part | None
    corpus: tuple[str, ...]
    pseudo: np.ndarray | None = None


@dataclass(frozen=True)
class _Raw:
    """Examples as read.

    Attributes:
        classes: class names.
        pool: examples for training, of which the labelled ones are drawn where `labelled` is None.
        test: none where the set has no test part.
        labelled: those of one of LiST's splits.
        holds_test: the pool is a whole corpus, its test examples among it.
        texts: more text for the corpus.
    """

    classes: tuple[str, ...]
    pool: list[Example]
    test: list[Example]
    labelled: list[Example] | None = None
    holds_test: bool = False
    texts: tuple[str, ...] = ()


def load(config: Config) -> Data:
    """The data that `config` names.

    Subj, MPQA, SST-2 and RTE have LiST's labelled and test examples where its files are found. Elsewhere --shots
    examples are drawn by --seed, each class at least once, from a training part that is the same for all seeds; so is
    the test part. The unlabelled examples are the rest, or the texts of --unlabelled alone, without any test text (a
    line on stderr counts those) and without the labelled texts; of RTE the training split on the hub or, without a hub
    or with --data-dir, what LiST's other splits have.

    The corpus of the sentence sets is all the text of the corpora that are found, without any of their test texts: the
    same for every seed, and for the four sets of LiST. Of other sets it is the text of the training part.

    Raises:
        UserError: a set or file is unknown, missing or damaged, a class has no labelled example, the unlabelled
            examples are fewer than a batch, or --noise is given where their labels are not known; one line.
    """
    if config.split is not None and config.dataset not in LIST_FILES:
        raise UserError(f"--split: {config.dataset} has no splits of LiST, {', '.join(LIST_FILES)} have: leave it out")
    data = _gaussian(config) if config.dataset == "gaussian" else _assembled(config, _read(config))
    if not len(data.labelled):
        raise UserError(f"{data.name}: no labelled examples: give some")
    if config.noise != "none" and data.unlabelled.labels is None:
        raise UserError(f"--noise flips labels that the unlabelled texts of {data.name} lack: leave --unlabelled out")
    rng = np.random.default_rng(config.seed)
    unlabelled, test = _limited(data.unlabelled, config.max_unlabelled, rng), data.test
    if test is not None:
        test = _limited(test, config.max_test, np.random.default_rng(0))  # the same for all seeds
    if config.sessions and len(unlabelled) < config.unlabelled_batch:
        raise UserError(
            f"{data.name}: {len(unlabelled)} unlabelled examples are fewer than --unlabelled-batch "
            f"{config.unlabelled_batch}: lower it, or give --sessions 0 to train on the labelled ones alone"
        )
    return Data(data.name, data.labels, data.labelled, unlabelled, test, data.corpus)


def flip(labels: np.ndarray, noise: str, rate: float, classes: int, rng: np.random.Generator) -> np.ndarray:
    """Labels with noise of an exact amount; the argument stays as it is.

    Args:
        labels: int64 [N].
        noise: "class": round(rate * n1) of the n1 examples of class 1 become class 0; "symmetric": round(rate * N) of
            all examples get another class, uniformly; "none".
        rate: 0 to 1.
        classes: number of classes.
        rng: which examples, and which other class.

    Raises:
        UserError: the noise is none of these, or there are fewer than two classes.
    """
    flipped = np.array(labels, dtype=np.int64)
    if noise == "none":
        return flipped
    if noise not in ("symmetric", "class"):
        raise UserError(f"noise {noise!r}: give none, symmetric or class")
    if classes < 2:
        raise UserError(f"labels of {classes} classes cannot be flipped: give two or more")
    candidates = np.flatnonzero(flipped == 1) if noise == "class" else np.arange(len(flipped))
    chosen = rng.choice(candidates, size=round(rate * len(candidates)), replace=False)
    if noise == "class":
        flipped[chosen] = 0
    else:
        flipped[chosen] = (flipped[chosen] + rng.integers(1, classes, size=len(chosen))) % classes
    return flipped


def read_texts(path: Path) -> list[tuple[str, ...]]:
    """Texts of a file: of a .txt a text on each line that is not blank; of a .csv, .tsv or .jsonl the column `text` or
    `sentence`, or a pair such as `sentence1` and `sentence2`. UTF-8; a .tsv has no quotes.

    Raises:
        UserError: the file is missing, empty, not UTF-8, of another kind, or a line lacks a text.
    """
    found: list[tuple[str, ...]]
    path = Path(path)
    if path.suffix == ".txt":
        found = [(line.strip(),) for line in re.split(r"\r?\n|\r", _text_of(path)) if line.strip()]
    elif path.suffix in TABLES:
        found = [_row_texts(row, f"{path} line {number}") for number, row in _table(path)]
    else:
        raise UserError(f"{path}: no kind of file that is known: give a .txt, .csv, .tsv or .jsonl")
    if not found:
        raise UserError(f"{path}: no texts in it: give one or more")
    _check_arity(found, str(path))
    return found


# Assembling


def _assembled(config: Config, raw: _Raw) -> Data:
    """Labelled, unlabelled and test examples, and the corpus, before --max-unlabelled and --max-test."""
    name = config.dataset
    test = raw.test if config.test is None else _labelled_file(Path(config.test), raw.classes)[1]
    held = {_key(*texts) for texts, _ in test}
    drawing = raw.labelled is None and config.shots is not None and config.shots < len(raw.pool)
    if raw.labelled is not None:
        labelled, rest = raw.labelled, raw.pool
    elif drawing:
        rest = [example for example in raw.pool if _key(*example[0]) not in held]
        if not raw.holds_test and config.unlabelled is None:
            _report(len(raw.pool) - len(rest))
        chosen = _draw(rest, config, raw.classes)
        labelled = [rest[i] for i in chosen]
    else:
        labelled, rest = raw.pool, []
    if config.unlabelled is not None:
        rest = [(texts, None) for texts in read_texts(Path(config.unlabelled))]
    unlabelled = [example for example in rest if _key(*example[0]) not in held]
    if config.unlabelled is not None or not raw.holds_test:
        _report(len(rest) - len(unlabelled))
    taken = {_key(*texts) for texts, _ in labelled}
    unlabelled = [example for example in unlabelled if _key(*example[0]) not in taken]
    if raw.labelled is None and not drawing and (both := sum(_key(*texts) in held for texts, _ in labelled)):
        print(f"{both} labelled texts are test texts, too: the test is no fair one", file=sys.stderr)

    missing = set(range(len(raw.classes))) - {label for _, label in labelled}
    if labelled and missing:
        raise UserError(f"{name}: class {raw.classes[min(missing)]!r} has no labelled example: give one or more")
    _check_arity([texts for texts, _ in (*labelled, *unlabelled, *test)], name)
    return Data(
        name,
        raw.classes,
        _part(labelled),
        _part(unlabelled),
        _part(test) if test else None,
        _corpus(config, raw, [*labelled, *rest], test),
    )


def _id(example: Example) -> int:
    assert example[1] is not None
    return example[1]


def _part(examples: Sequence[Example]) -> Part:
    known = [label for _, label in examples if label is not None]
    labels = np.array(known, dtype=np.int64) if len(known) == len(examples) else None
    return Part(tuple(texts for texts, _ in examples), labels)


def _report(dropped: int) -> None:
    if dropped:
        print(f"{dropped} unlabelled texts are test texts: dropped", file=sys.stderr)


def _draw(pool: Sequence[Example], config: Config, classes: Sequence[str]) -> np.ndarray:
    """Indices of --shots examples, drawn again until each class is among them."""
    shots = config.shots
    assert shots is not None
    if shots < len(classes):
        raise UserError(f"--shots {shots} is less than the {len(classes)} classes of {config.dataset}: give more")
    if shots > len(pool):
        raise UserError(f"{config.dataset}: {len(pool)} examples without the test texts, --shots is {shots}: lower it")
    labels = np.array([_id(example) for example in pool])
    rng = np.random.default_rng(config.seed)
    for _ in range(DRAWS):
        chosen = rng.choice(len(pool), size=shots, replace=False)
        if len(np.unique(labels[chosen])) == len(classes):
            return np.asarray(np.sort(chosen))
    raise UserError(
        f"{config.dataset}: {DRAWS} draws of {shots} examples lack one of the {len(classes)} classes each: "
        "raise --shots"
    )


def _limited(part: Part, most: int | None, rng: np.random.Generator) -> Part:
    if most is None or most >= len(part):
        return part
    return part.take(rng.permutation(len(part))[:most])


def _check_arity(texts: Iterable[tuple[str, ...]], where: str) -> None:
    if len({len(example) for example in texts}) > 1:
        raise UserError(f"{where}: some examples are one text and some are two: give the same columns throughout")


# Reading


def _read(config: Config) -> _Raw:
    name = config.dataset
    if name == "generated":
        return _generated()
    if name in CLASSES:
        return _builtin(config)
    if name.startswith("hub:"):
        hub_id, _, subset = name.removeprefix("hub:").partition(":")
        return _any_hub(hub_id, subset or None)
    if name.endswith(TABLES):
        classes, pool = _labelled_file(Path(name), None)
        return _Raw(classes, pool, [])
    raise UserError(
        f"unknown data set {name!r}: one of {', '.join(NAMES)}, hub:ID, or the path of a .csv, .tsv or .jsonl"
    )


def _builtin(config: Config) -> _Raw:
    """LiST's labelled and test examples where they are found; else a pool to draw from and the set's own test."""
    name, classes = config.dataset, CLASSES[config.dataset]
    folder = _list_folder(config, name)
    labelled = None
    if name in LIST_FILES:
        labelled = _list_labelled(config, folder)
    test = [] if folder is None else _list_file(_list_path(folder, name, "test"), name)
    if name == "rte":
        pool, own = _rte(config, folder)
    else:
        pool, own = _files_or_hub(config, name, with_test=folder is None)
    if folder is not None:
        return _Raw(classes, pool, test, labelled, holds_test=name in ("subj", "mpqa"))
    if not own:
        pool, own = _split(pool, name)
    return _Raw(classes, pool, own)


def _split(examples: Sequence[Example], name: str) -> tuple[list[Example], list[Example]]:
    """Training and test part, shuffled, for some files are sorted by label; the same for all seeds."""
    order = np.random.default_rng(0).permutation(len(examples))
    size = TRAIN_SIZES.get(name, 0)
    if not 0 < size < len(examples):
        size = len(examples) * 4 // 5
    return [examples[i] for i in order[:size]], [examples[i] for i in order[size:]]


def _files_or_hub(config: Config, name: str, with_test: bool) -> tuple[list[Example], list[Example]]:
    files = CORPORA[name] if with_test else CORPORA[name][:1]
    try:
        folder = find("sentences", files, data_dir=config.data_dir)
    except UserError as missing:
        if config.data_dir is not None or name not in HUB:
            raise
        try:
            return _from_hub(name)
        except UserError as error:
            raise UserError(f"{missing}; {error}") from error
    parts = [_sentences(folder / file, len(CLASSES[name])) for file in files]
    return parts[0], parts[1] if len(parts) > 1 else []


def _sentences(path: Path, classes: int) -> list[Example]:
    """Lines "label SPACE text"; UTF-8, or latin-1 where a line is not."""
    examples: list[Example] = []
    for number, line in enumerate(_bytes_of(path).split(b"\n"), 1):
        label, _, text = _decoded(line).partition(" ")
        if not text.strip():
            continue  # as some lines of CR and MPQA
        if not label.isdecimal() or int(label) >= classes:
            raise UserError(f"{path} line {number}: {label[:20]!r} is no label 0 to {classes - 1}: mend it")
        examples.append(((text.strip(),), int(label)))
    return examples


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _bytes_of(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}): check the path") from error


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# LiST's files


def _list_path(folder: Path, name: str, part: str) -> Path:
    """`part` is "test" or, as "30-1/train", a split."""
    own, kind = LIST_FILES[name]
    return folder / own / f"{part}.{kind}"


def _list_folder(config: Config, name: str) -> Path | None:
    """The folder of LiST's files, if it has the set's test file."""
    if name not in LIST_FILES:
        return None
    own, kind = LIST_FILES[name]
    try:
        return find("list-splits", [f"{own}/test.{kind}"], data_dir=config.data_dir)
    except UserError as error:
        if config.split is not None:
            raise UserError(f"--split {config.split}: {error}") from error
        if config.data_dir is not None and not Path(config.data_dir).is_dir():
            raise
        return None


def _list_labelled(config: Config, folder: Path | None) -> list[Example] | None:
    """The split that the settings name; None where it is not to be had, and was not asked for."""
    name, shots = config.dataset, config.shots
    split = config.split or config.seed % 5 + 1
    if shots not in LIST_SHOTS:
        if config.split is not None:
            raise UserError(f"--split {split}: LiST has splits of 10, 20 and 30 shots, not of {shots}: give --shots 30")
        return None
    if folder is None or not (path := _list_path(folder, name, f"{shots}-{split}/train")).is_file():
        if config.split is not None and folder is not None:
            raise UserError(f"--split {split}: {path} not found: give the folder of LiST's splits with --data-dir")
        print(f"{name}: LiST's split {shots}-{split} not found: labelled examples are drawn", file=sys.stderr)
        return None
    return _list_file(path, name)


def _list_file(path: Path, name: str) -> list[Example]:
    """Subj and MPQA: label, text (csv); SST-2: text, label (tsv); RTE: index, sentence1, sentence2, label (tsv)."""
    classes = CLASSES[name]
    ids = {label: i for i, label in enumerate(classes)} if name == "rte" else {"0": 0, "1": 1}
    text = _decoded(_bytes_of(path))
    lines: Iterable[list[str]]
    if LIST_FILES[name][1] == "csv":
        lines = csv.reader(io.StringIO(text, newline=""))
    else:
        lines = (line.split("\t") for line in text.replace("\r\n", "\n").split("\n"))
    examples: list[Example] = []
    try:
        for number, row in enumerate(lines, 1):
            if not any(value.strip() for value in row) or (number == 1 and row[-1] == "label"):
                continue
            *texts, label = (row[1], row[0]) if LIST_FILES[name][1] == "csv" and len(row) == 2 else row
            texts = [_repaired(value.strip()) for value in (texts[1:] if name == "rte" else texts)]
            if label not in ids or len(texts) != 1 + (name == "rte") or not all(texts):
                raise UserError(f"{path} line {number}: give a text and one of the labels {', '.join(ids)}: mend it")
            examples.append((tuple(texts), ids[label]))
    except csv.Error as error:
        raise UserError(f"{path}: no CSV ({error}): fetch the file again") from error
    if not examples:
        raise UserError(f"{path}: no examples in it: fetch the file again")
    return examples


def _repaired(text: str) -> str:
    """LiST's Subj has latin-1 text that was once read as Mac Cyrillic (h\u0439roes): back to what subj.all has, so that
    the test's texts are found there."""
    if text.isascii() or not re.search("[\u0400-\u04ff]", text):
        return text
    try:
        return text.encode("mac_cyrillic").decode("latin-1")
    except UnicodeEncodeError:
        return text


def _rte(config: Config, folder: Path | None) -> tuple[list[Example], list[Example]]:
    """The hub's training split and test; without it, or with --data-dir, the union of LiST's training splits."""
    if config.data_dir is None or folder is None:
        try:
            return _from_hub("rte")
        except UserError as error:
            if folder is None:
                raise
            print(f"rte: unlabelled texts are those of LiST's other splits alone ({error})", file=sys.stderr)
    return _rte_union(folder), []


def _rte_union(folder: Path) -> list[Example]:
    files = sorted((folder / "RTE").glob("*/train.tsv"))
    return list(dict.fromkeys(chain.from_iterable(_list_file(path, "rte") for path in files)))


# The hub


def _from_hub(name: str) -> tuple[list[Example], list[Example]]:
    """A set of ours by its hub id, with the labels of the files."""
    hub_id, subset = HUB[name]
    column = "coarse_label" if name == "trec" else "label"
    parts: list[list[Example]] = []
    for split, rows in _hub(hub_id, _load_dataset(hub_id, subset), column):
        examples: list[Example] = []
        for number, row in enumerate(rows, 1):
            where, label = f"hub data set {hub_id!r} {split} row {number}", row[column]
            if not isinstance(label, int) or not 0 <= label < len(CLASSES[name]):
                raise UserError(f"{where}: the label is {label!r}: give files with --data-dir")
            if name == "subj" and "label_text" in row:
                label = int(row["label_text"] != "subjective")
            if name == "trec":
                label = TREC_LABELS[label]
            if name == "rte":
                label = 1 - label  # there entailment is 0
            examples.append((_row_texts(row, where), label))
        parts.append(examples)
    if name in TRAIN_SIZES:  # split here, as the files are
        return parts[0] + parts[1], []
    return parts[0], parts[1]


def _any_hub(hub_id: str, subset: str | None) -> _Raw:
    """A hub set with a column `label`; its classes have the names that it gives them, else their ids or texts."""
    splits = _load_dataset(hub_id, subset)
    ids: dict[Any, int] = {}
    parts: list[list[Example]] = []
    for split, rows in _hub(hub_id, splits, "label"):
        if not parts:
            ids = {label: i for i, label in enumerate(sorted({str(row["label"]) for row in rows}, key=_number_or_text))}
        examples: list[Example] = []
        for number, row in enumerate(rows, 1):
            where = f"hub data set {hub_id!r} {split} row {number}"
            if str(row["label"]) not in ids:
                raise UserError(
                    f"{where}: the label {row['label']!r} is none of the training data's {', '.join(ids)}: "
                    "give another set"
                )
            examples.append((_row_texts(row, where), ids[str(row["label"])]))
        parts.append(examples)
    if len(ids) < 2:
        raise UserError(f"hub data set {hub_id!r}: all labels are {next(iter(ids))!r}: give one of two classes or more")
    feature = getattr(next(iter(splits.values())), "features", {}).get("label")
    names = list(getattr(feature, "names", None) or [])
    classes = tuple(names[int(label)] if names and label.isdecimal() else label for label in ids)
    pool, test = parts
    return _Raw(classes, pool, test) if test else _Raw(classes, *_split(pool, hub_id))


def _number_or_text(label: str) -> tuple[int, str]:
    """Sorts ids as numbers."""
    return (int(label), label) if label.isdecimal() else (0, label)


def _hub(hub_id: str, splits: Mapping[str, Any], column: str) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """Training and test split of a hub set; the validation split where the test has no labels; at most CAP of each."""
    parts: dict[str, list[Mapping[str, Any]]] = {}
    for name, split in splits.items():
        parts[name] = [dict(row) for row in _sample(split, CAP, 0) if row.get(column) not in (-1, None)]
    first = "train" if parts.get("train") else next((name for name, rows in parts.items() if rows), None)
    if first is None:
        raise UserError(f"hub data set {hub_id!r}: no examples with a column `{column}`: give another")
    test = next((name for name in ("test", "validation", "dev") if parts.get(name) and name != first), None)
    return [(first, parts[first]), (test or "test", parts[test] if test else [])]


def _load_dataset(hub_id: str, subset: str | None) -> Mapping[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hub data set {hub_id!r}: datasets is missing: pip install datasets") from error
    try:
        found: Mapping[str, Any] = datasets.load_dataset(hub_id, subset)
    except Exception as error:  # those of hub, network and file formats have no base in common
        where = hub_id if subset is None else f"{hub_id}:{subset}"
        raise UserError(f"hub data set {where!r}: {_line(error)}: check the id, the network and the login") from error
    return found


def _sample(split: Any, most: int, seed: int) -> Any:
    if len(split) <= most:
        return split
    return split.select(np.sort(np.random.default_rng(seed).permutation(len(split))[:most]))


# Files of one's own


def _labelled_file(path: Path, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[Example]]:
    """Class names, sorted where they are not given, and the examples of a .csv, .tsv or .jsonl.

    Raises:
        UserError: see :func:`read_texts`; a label is missing or none of `classes`, or there is one class only.
    """
    if path.suffix not in TABLES:
        raise UserError(f"{path}: labelled rows are read from a .csv, .tsv or .jsonl: give one")
    found: list[tuple[str, tuple[str, ...], str]] = []
    for number, row in _table(path):
        where = f"{path} line {number}"
        texts, label = _row_texts(row, where), row.get("label")
        if label is None or label != label or not str(label).strip():
            raise UserError(f"{where}: the label is {label!r} (columns {', '.join(row)}): give a column `label`")
        found.append((where, texts, str(label).strip()))
    if not found:
        raise UserError(f"{path}: no examples in it: give one or more of each class")
    _check_arity([texts for _, texts, _ in found], str(path))
    if classes is None:
        classes = tuple(sorted({label for _, _, label in found}))
        if len(classes) < 2:
            raise UserError(f"{path}: all labels are {classes[0]!r}: give examples of two classes or more")
    ids = {label: i for i, label in enumerate(classes)}
    examples: list[Example] = []
    for where, texts, label in found:
        if label not in ids:
            raise UserError(
                f"{where}: the label {label!r} is none of the training data's {', '.join(classes)}: mend it"
            )
        examples.append((texts, ids[label]))
    return classes, examples


def _row_texts(row: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """One text or two, of the first columns of TEXT_COLUMNS that the row has."""
    columns = next((columns for columns in TEXT_COLUMNS if all(column in row for column in columns)), None)
    if columns is None:
        raise UserError(
            f"{where}: no column `text` (columns {', '.join(row)}): name it text or sentence, or two of them "
            "sentence1 and sentence2"
        )
    for column in columns:
        if not isinstance(row[column], str) or not row[column].strip():
            raise UserError(f"{where}: column `{column}` is {row[column]!r}: give a text")
    return tuple(row[column].strip() for column in columns)


def _table(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and rows of a .csv, .tsv (without quotes) or .jsonl."""
    text = _text_of(path)
    if path.suffix == ".jsonl":
        yield from _jsonl(path, text)
        return
    if path.suffix == ".tsv":
        table = csv.DictReader(io.StringIO(text, newline=""), delimiter="\t", quoting=csv.QUOTE_NONE)
    else:
        table = csv.DictReader(io.StringIO(text, newline=""))
    try:
        for row in table:
            if None in row or None in row.values():
                raise UserError(f"{path} line {table.line_num}: not as many values as columns: mend the line")
            yield table.line_num, row
    except csv.Error as error:
        raise UserError(f"{path} line {table.reader.line_num}: no CSV ({error}): save it again") from error


def _jsonl(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: no JSON ({_line(error)}): mend the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: give an object with the columns as keys")
        yield number, row


def _text_of(path: Path) -> str:
    content = _bytes_of(path)
    try:
        return content.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path} line {number}: not UTF-8: save the file as UTF-8") from error


# Text


def _key(*texts: str) -> str:
    """What is compared to tell that texts are the same: letters and digits only, for MR and SST-2 space their common
    sentences differently."""
    text = " ".join(texts).lower()
    return re.sub(r"[\W_]+", "", text) or "".join(text.split())


def _corpus(config: Config, raw: _Raw, used: Sequence[Example], test: Sequence[Example]) -> tuple[str, ...]:
    """Text of the training part; where a sentence set is used and files are found that of all of them; each text once,
    no test text."""
    held = {_key(text) for texts, _ in test for text in texts}
    texts: list[str] = []
    if config.dataset in CLASSES:
        texts = _corpora(config)
        held |= {_key(text) for text in _never_trained(config)}
    if not texts:
        texts = [text for example in (*raw.pool, *used) for text in example[0]] + list(raw.texts)
    once: dict[str, str] = {}
    for text in texts:
        once.setdefault(_key(text), text)
    return tuple(text for key, text in once.items() if key not in held)


def _corpora(config: Config) -> list[str]:
    """Text of the training files that are found and, with any, of LiST's training splits of RTE."""
    texts = []
    for name, files in CORPORA.items():
        try:
            folder = find("sentences", files[:1], data_dir=config.data_dir)
        except UserError:
            continue
        texts += [text for (text, *_), _ in _sentences(folder / files[0], len(CLASSES[name]))]
    if texts and (folder_of_list := _list_folder_quietly(config, "rte")) is not None:
        texts += [text for example in _rte_union(folder_of_list) for text in example[0]]
    return texts


def _never_trained(config: Config) -> list[str]:
    """Texts of all test sets that are found, and of SST-2's development set, which is LiST's test."""
    texts = []
    for file, classes in NEVER_TRAINED.items():
        try:
            folder = find("sentences", [file], data_dir=config.data_dir)
        except UserError:
            continue
        texts += [text for (text, *_), _ in _sentences(folder / file, classes)]
    for name in LIST_FILES:
        if (folder_of_list := _list_folder_quietly(config, name)) is not None:
            examples = _list_file(_list_path(folder_of_list, name, "test"), name)
            texts += [text for example in examples for text in example[0]]
    return texts


def _list_folder_quietly(config: Config, name: str) -> Path | None:
    try:
        return _list_folder(config, name)
    except UserError:
        return None


# Two classes of vectors


def _gaussian(config: Config) -> Data:
    """Vectors of N(-2 e1, I) and N(2 e1, I), classes equally likely: 4,000 unlabelled and 5,000 test examples."""
    if config.unlabelled is not None or config.test is not None:
        raise UserError("--dataset gaussian draws its vectors: leave --unlabelled and --test out")
    shots = config.shots
    if shots is None or shots < 2:
        raise UserError(f"--shots {shots}: give 2 or more for --dataset gaussian, one of each class")
    rng = np.random.default_rng([config.seed, 0x4C695354])
    labels = rng.integers(2, size=shots)
    while labels.min() == labels.max():
        labels = rng.integers(2, size=shots)
    parts = [_vectors(drawn, config.dimension, rng) for drawn in (labels, rng.integers(2, size=4000))]
    test = _vectors(rng.integers(2, size=5000), config.dimension, rng)
    return Data("gaussian", ("0", "1"), parts[0], parts[1], test, ())


def _vectors(labels: np.ndarray, dimension: int, rng: np.random.Generator) -> Part:
    vectors = rng.standard_normal((len(labels), dimension))
    vectors[:, 0] += 4 * labels - 2
    return Part(((),) * len(labels), labels.astype(np.int64), vectors.astype(np.float32))


# Generated reviews

_PAIRS = (
    ("bad", "good"), ("terrible", "great"), ("awful", "wonderful"), ("boring", "entertaining"),
    ("dull", "fascinating"),
)  # fmt: skip
_NEGATIVE = (*(pair[0] for pair in _PAIRS), "weak", "tedious", "messy")
_POSITIVE = (*(pair[1] for pair in _PAIRS), "strong", "charming", "gripping")
_VERDICTS = tuple(zip(*_PAIRS, strict=True))
_ADJECTIVES = (_NEGATIVE, _POSITIVE)
_VERBS = (
    ("fails", "disappoints", "drags"),
    ("succeeds", "impresses", "shines"),
)
_SUPERLATIVES = (("worst", "weakest"), ("best", "finest"))
_PARTS = (
    "plot", "acting", "story", "script", "dialogue", "cast", "music", "pacing", "ending", "camera work", "direction",
    "humor", "hero", "villain", "romance", "opening", "editing", "soundtrack",
)  # fmt: skip
_KINDS = ("film", "movie", "comedy", "drama", "thriller", "sequel", "documentary", "western")
_LINKS = ("was", "is", "felt", "seemed", "looked")
_DEGREES = ("", "", "", "very", "truly", "rather", "so", "really")
_OPENERS = ("", "", "", "in the end", "for once", "to my mind", "after an hour", "on the whole", "this year")


def _generated() -> _Raw:
    """3,000 and 500 different reviews of films, the same for all seeds, and more text: reviews that end in a verdict,
    and sentences that relate the words of opinion to each other."""
    rng = np.random.default_rng(0)
    rows: dict[str, int] = {}
    while len(rows) < 3500:
        label = int(rng.integers(2))
        rows.setdefault(_review(label, rng), label)
    examples: list[Example] = [((text,), label) for text, label in rows.items()]
    held = {text for (text,), _ in examples[3000:]}
    verdicts: list[str] = []
    while len(verdicts) < 2000:
        label = int(rng.integers(2))
        if (text := _review(label, rng)) not in held:
            verdicts.append(f"{text} It was {_pick(_VERDICTS[label], rng)}.")
    return _Raw(SENTIMENT, examples[:3000], examples[3000:], texts=(*verdicts, *(_relation(rng) for _ in range(1000))))


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _review(label: int, rng: np.random.Generator) -> str:
    """Two or three clauses that agree, or clauses that do not: then the one after "but" decides."""
    form, opener = rng.random(), _pick(_OPENERS, rng)
    clauses = _clause(label, rng)
    if form > 0.9:
        clauses = f"{_clause(1 - label, rng)} , but {clauses}"
    else:
        clauses = f"{clauses} and {_clause(label, rng)}"
        if form > 0.45:
            clauses = f"{clauses} , and {_clause(label, rng)}"
    return f"{opener} , {clauses} ." if opener else f"{clauses} ."


def _clause(label: int, rng: np.random.Generator) -> str:
    form, part, kind = rng.random(), _pick(_PARTS, rng), _pick(_KINDS, rng)
    adjective = _pick(_ADJECTIVES[label], rng)
    if form < 0.6:
        return " ".join(f"the {part} {_pick(_LINKS, rng)} {_pick(_DEGREES, rng)} {adjective}".split())
    if form < 0.63:
        return f"the {part} {_pick(('was', 'is'), rng)} not {_pick(_ADJECTIVES[1 - label], rng)}"
    if form < 0.7:
        return f"the {_pick((part, kind), rng)} {_pick(_VERBS[label], rng)}"
    if form < 0.8:
        return f"this is the {_pick(_SUPERLATIVES[label], rng)} {kind} in years"
    return f"it is {_article(adjective)} {kind} with {_article(_pick(_ADJECTIVES[label], rng))} {part}"


def _relation(rng: np.random.Generator) -> str:
    """A sentence on words that mean alike or the opposite."""
    label, form = int(rng.integers(2)), int(rng.integers(4))
    one, two = _pick(_ADJECTIVES[label], rng), _pick(_ADJECTIVES[label], rng)
    other, kind = _pick(_ADJECTIVES[1 - label], rng), _pick(_KINDS, rng)
    verb, top = _pick(_VERBS[label], rng), _pick(_SUPERLATIVES[label], rng)
    return (
        f"whoever calls a {kind} {one} will also call it {two} .",
        f"no {kind} can be {one} and {other} at the same time .",
        f"the {top} {kind} is the one that {verb} and that is {one} .",
        f"how does the viewer feel about the {kind} ? the reviewer finds it {one} .",
    )[form]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
