"""Data sets, their splits and templates, and the drawing of instances from them.

Everything ends in a `Data`: tasks to meta-train on, tasks that are only evaluated, and raw text without any test text.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from metazoo.data import find
from metazoo.errors import UserError

from flipped_learning.config import Config
from flipped_learning.templates import BUILTIN, NOVEL_PAIRS, SEEN_PAIRS, Instance, NoInstance, Template, read_templates

Example = Mapping[str, Any]

CORPORA = {
    "mr": ("rt-polarity.all",),
    "cr": ("custrev.all",),
    "sst2": ("stsa.binary.train", "stsa.binary.dev", "stsa.binary.test"),
    "subj": ("subj.all",),
    "mpqa": ("mpqa.all",),
    "trec": ("TREC.train.all", "TREC.test.all"),
}
TEST_FILES = ("stsa.binary.test", "TREC.test.all")
HUB = {
    "mr": ("cornell-movie-review-data/rotten_tomatoes", None),
    "cr": ("SetFit/CR", None),
    "sst2": ("stanfordnlp/sst2", None),
    "subj": ("SetFit/subj", None),
    "trec": ("CogComp/trec", None),
    "rte": ("nyu-mll/glue", "rte"),
    "ag_news": ("fancyzhx/ag_news", None),
    "paws": ("google-research-datasets/paws", "labeled_final"),
}
HUB_COLUMNS = {
    "sst2": {"text": "sentence"},
    "rte": {"premise": "sentence1", "hypothesis": "sentence2"},
    "trec": {"label": "coarse_label"},
}
NAMES = ("generated", *CORPORA, "rte", "ag_news", "paws")
SENTIMENT = ("generated", "mr", "cr", "sst2", "mpqa")
TRAIN_SIZES = {"mr": 8500, "cr": 3000, "subj": 9000, "mpqa": 9600}  # the rest is test; other sets: four fifths
FOLDERS = {  # where promptsource keeps a set
    "generated": "rotten_tomatoes", "mr": "rotten_tomatoes", "sst2": "glue/sst2", "trec": "trec",
    "rte": "super_glue/rte", "ag_news": "ag_news", "paws": "paws/labeled_final",
}  # fmt: skip
# files have description 0, entity 1, abbreviation 2; the hub and the templates the other way round
TREC_LABELS = (2, 1, 0, 3, 4, 5)
CAP = 500_000  # T0's cap on a data set: this many examples, over the number of its templates
P3 = "bigscience/P3"
FAILURES = 100


@dataclass(frozen=True)
class Task:
    """One data set with its templates.

    Attributes:
        name: as in the settings.
        train, test: columns and `label`; of bigscience/P3 the ready "instance" and the name of its "template".
        templates: at least one.
        sentiment: label 0 is negative and 1 positive, so that pairs of words can stand for them.
    """

    name: str
    train: tuple[Example, ...]
    test: tuple[Example, ...]
    templates: tuple[Template, ...]
    sentiment: bool


@dataclass(frozen=True)
class Data:
    """Tasks to meta-train on, tasks that are only evaluated, and raw training text that holds no test text."""

    tasks: tuple[Task, ...]
    zero_shot: tuple[Task, ...]
    corpus: tuple[str, ...]


@dataclass(frozen=True)
class _Raw:
    """Examples as read; test is empty where the set has no test split of its own."""

    train: list[Example]
    test: list[Example]
    templates: tuple[Template, ...]
    texts: tuple[str, ...] = ()


def load(config: Config) -> Data:
    """The data that `config` names.

    Training examples whose text is a test text of another set are dropped, with a line on stderr: SST-2 and MR, for
    one, share sentences. Zero-shot sets have no training examples; their test is the set's own, else all of it.

    Raises:
        UserError: a set or template is unknown, missing or damaged; one line.
    """
    names, zero_shot = tuple(dict.fromkeys(config.dataset)), tuple(dict.fromkeys(config.zero_shot))
    for name in zero_shot:
        if name in names:
            raise UserError(f"{name} is in both --dataset and --zero-shot: leave it out of one")
    raw = {name: _read(config, name) for name in (*names, *zero_shot)}
    if config.template_names:
        known = {template.name for name in raw for template in _found_templates(config, name)}
        for wanted in config.template_names:
            if wanted.strip() not in known:
                raise UserError(
                    f"--template-names {wanted!r}: no data set has it; known are {', '.join(sorted(known))}"
                )

    splits = {name: _split(raw[name], name, config, name in zero_shot) for name in raw}
    columns = {name: _columns(raw[name].templates) for name in raw}
    held = {name: {_key(*_texts(row, columns[name])) for row in splits[name][1]} for name in raw}
    tasks = []
    for name in raw:
        train, test = splits[name]
        others = set().union(*(held[other] for other in raw if other != name))
        kept = [row for row in train if _key(*_texts(row, columns[name])) not in others]
        if len(kept) < len(train):
            lost = len(train) - len(kept)
            print(f"{name}: {lost} training examples are in another set's test: dropped", file=sys.stderr)
        kept = kept[: config.max_examples]
        if config.hide_words:
            kept = [_hidden_row(row, columns[name]) for row in kept]
        if not test or not (kept or name in zero_shot):
            raise UserError(f"{name}: {len(kept)} examples to train on and {len(test)} to test: give more")
        templates = raw[name].templates
        tasks.append(Task(name, tuple(kept), tuple(test), templates, _is_sentiment(name, templates)))

    return Data(tuple(tasks[: len(names)]), tuple(tasks[len(names) :]), _corpus(config, tasks, raw))


def templates_of(config: Config, name: str) -> tuple[Template, ...]:
    """Templates of a data set: from --templates, else those in the package; of them the chosen ones.

    With --pairs, sentiment sets keep the templates that any pair of label words can answer (`Template.takes_pairs`).

    Raises:
        UserError: there are none, or none is left.
    """
    templates = _found_templates(config, name)
    if config.template_names:
        wanted = {template.strip() for template in config.template_names}
        chosen = tuple(template for template in templates if template.name in wanted)
        if not chosen:
            known = ", ".join(template.name for template in templates)
            raise UserError(f"{name}: none of --template-names is a template of it; they are {known}")
    else:
        chosen = templates
    if config.pairs and _is_sentiment(name, templates):
        chosen = tuple(template for template in chosen if template.takes_pairs)
        if not chosen:
            raise UserError(
                f"{name}: --pairs needs templates that list no options and ask for a word, not for yes or no, but none "
                "of the chosen is such: choose others with --template-names or --templates"
            )
    return chosen


def draw(tasks: Sequence[Task], count: int, rng: np.random.Generator, pairs: int) -> list[Instance]:
    """`count` training instances: task in proportion to its size under T0's cap, template and example uniformly.

    Args:
        pairs: label words of sentiment tasks are one of the first so many seen pairs, uniformly; 0: the template's own.

    Raises:
        UserError: nothing to draw from, or 100 examples in a row that their template has no prompt for.
    """
    sizes = np.array([_size(task) for task in tasks], dtype=float)
    if not sizes.sum():
        raise UserError("there are no training examples to draw from: name another --dataset")
    drawn: list[Instance] = []
    failures = 0
    while len(drawn) < count:
        task = tasks[int(rng.choice(len(tasks), p=sizes / sizes.sum()))]
        template = task.templates[int(rng.integers(len(task.templates)))]
        example = task.train[int(rng.integers(len(task.train)))]
        options = SEEN_PAIRS[int(rng.integers(pairs))] if pairs and task.sentiment else None
        try:
            drawn.append(_instance(template, example, options))
            failures = 0
        except NoInstance as error:
            failures += 1
            if failures == FAILURES:
                raise UserError(
                    f"{task.name}: {FAILURES} examples in a row have no prompt, the last: {error}"
                ) from error
    return drawn


def instances(
    task: Task, template: Template, limit: int | None, options: Sequence[str] | None = None, split: str = "test"
) -> list[Instance]:
    """The first `limit` examples of a split (None: all) under one template; those without a prompt are left out."""
    if split not in ("train", "test"):
        raise UserError(f"split {split!r}: give train or test")
    examples: tuple[Example, ...] = task.train if split == "train" else task.test
    found: list[Instance] = []
    for example in examples:
        if limit is not None and len(found) >= limit:
            break
        if "instance" in example and example["template"] != template.name:
            continue
        with contextlib.suppress(NoInstance):
            found.append(_instance(template, example, options))
    return found


def wrong_options(instances: Sequence[Instance], rng: np.random.Generator) -> list[int]:
    """Index of a wrong option for each instance, uniformly.

    Raises:
        UserError: an instance has fewer than two options, or no label.
    """
    wrong = []
    for instance in instances:
        if len(instance.options) < 2 or instance.label is None:
            raise UserError(
                f"an instance has {len(instance.options)} options and the label {instance.label}: give both"
            )
        other = int(rng.integers(len(instance.options) - 1))
        wrong.append(other + (other >= instance.label))
    return wrong


def _instance(template: Template, example: Example, options: Sequence[str] | None) -> Instance:
    if "instance" not in example:
        return template.apply(example, options)
    instance: Instance = example["instance"]
    if options is None:
        return instance
    if len(options) != len(instance.options):
        raise NoInstance(f"{len(options)} label words for {len(instance.options)} options")
    return replace(instance, options=tuple(options))


def _size(task: Task) -> float:
    prompts = len(task.templates) if task.train and "instance" in task.train[0] else 1  # rows of P3 are prompts
    return min(len(task.train) / prompts, CAP / len(task.templates))


# Templates


def _found_templates(config: Config, name: str) -> tuple[Template, ...]:
    """All templates of a set, before any choice."""
    builtin = BUILTIN.get(_known_as(name))
    if config.templates is None:
        if builtin is None:
            raise UserError(f"{name}: the package has no templates for it: give --templates")
        return builtin
    root = Path(config.templates)
    if root.is_file():
        return read_templates(root)
    if not root.is_dir():
        raise UserError(f"--templates {config.templates}: no such file or folder: check the path")
    if name.startswith("p3:"):
        return _p3_templates(root, name.removeprefix("p3:"))
    for folder in _promptsource_folders(name):
        if (root / folder / "templates.yaml").is_file():
            return read_templates(root / folder / "templates.yaml")
    if builtin is None:
        places = ", ".join(f"{folder}/templates.yaml" for folder in _promptsource_folders(name))
        raise UserError(f"--templates {config.templates}: no {places} for {name}: give the file itself")
    return builtin


def _promptsource_folders(name: str) -> list[str]:
    folders = ["."]
    if name.startswith("hub:"):
        hub_id, _, subset = name.removeprefix("hub:").partition(":")
        for base in (hub_id, hub_id.rpartition("/")[2]):
            folders.append(f"{base}/{subset}" if subset else base)
    known = FOLDERS.get(_known_as(name))
    return folders if known is None else [*folders, known]


def _p3_templates(root: Path, name: str) -> tuple[Template, ...]:
    """Those of all data sets and subsets that `name` covers."""
    found: list[Template] = []
    for path in sorted(root.rglob("templates.yaml")):
        prefix = "_".join(path.parent.relative_to(root).parts)
        if not prefix or f"{name}_".startswith(f"{prefix}_") or prefix.startswith(f"{name}_"):
            found += read_templates(path)
    if not found:
        raise UserError(f"--templates {root}: no templates.yaml for {name}: give promptsource's folder of templates")
    return tuple(found)


def _known_as(name: str) -> str:
    """The package's own name of a data set on the hub."""
    if not name.startswith("hub:"):
        return name
    hub_id, _, subset = name.removeprefix("hub:").partition(":")
    # sst2 and rte have other columns on the hub than the templates here
    known = {(found, part): own for own, (found, part) in HUB.items() if own not in ("sst2", "rte", "trec")}
    return known.get((hub_id, subset or None), name)


def _is_sentiment(name: str, templates: Sequence[Template]) -> bool:
    """Known, or said by a template whose options are negative and positive in this order; not prompts of P3, whose
    label words stand in the text already."""
    if _known_as(name) in SENTIMENT:
        return True
    words = [tuple(option.lower() for option in template.fixed_options or ()) for template in templates]
    return not name.startswith("p3:") and _known_as(name) not in NAMES and ("negative", "positive") in words


# Reading


def _read(config: Config, name: str) -> _Raw:
    if name == "generated":
        train, test, texts = _generated(config.seed)
        return _Raw(train, test, templates_of(config, name), texts)
    if name.startswith("p3:"):
        return _p3(config, name)
    if name in NAMES:
        templates = templates_of(config, name)
        train, test = _files_or_hub(config, name)
    elif name.startswith("hub:"):
        templates = templates_of(config, name)
        hub_id, _, subset = name.removeprefix("hub:").partition(":")
        train, test = _hub(hub_id, subset or None, config)
    elif name.endswith((".csv", ".jsonl")):
        templates = templates_of(config, name)
        train, test = (_csv if name.endswith(".csv") else _jsonl)(Path(name)), []
    else:
        raise UserError(
            f"unknown data set {name!r}: one of {', '.join(NAMES)}, p3:NAME, hub:ID, or the path of a .csv or .jsonl"
        )
    if any(template.wants_label for template in templates):
        train, test = ([_with_index(row, templates, name) for row in rows] for rows in (train, test))
    return _Raw(train, test, templates)


def _split(raw: _Raw, name: str, config: Config, zero_shot: bool) -> tuple[list[Example], list[Example]]:
    """Training and test examples, shuffled, for some files are sorted by label."""
    rng = np.random.default_rng(config.seed)
    train = [raw.train[i] for i in rng.permutation(len(raw.train))]
    test = [raw.test[i] for i in rng.permutation(len(raw.test))]
    if zero_shot:
        return [], test or train
    if test:
        return train, test
    size = TRAIN_SIZES.get(_known_as(name), 0)
    if not 0 < size < len(train):
        size = len(train) * 4 // 5
    return train[:size], train[size:]


def _files_or_hub(config: Config, name: str) -> tuple[list[Example], list[Example]]:
    if name not in CORPORA and name != "rte":
        return _from_hub(name, config)
    kept_in, files = ("list-splits", ["RTE/test.tsv"]) if name == "rte" else ("sentences", list(CORPORA[name]))
    try:
        folder = find(kept_in, files, data_dir=config.data_dir)
    except UserError as missing:
        if config.data_dir is not None or name not in HUB:
            raise
        try:
            return _from_hub(name, config)
        except UserError as error:
            raise UserError(f"{missing}; {error}") from error
    try:
        return _rte(folder / "RTE") if name == "rte" else _sentences(folder, name)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{name} in {folder}: cannot be read ({_line(error)}): fetch the files again") from error


def _sentences(folder: Path, name: str) -> tuple[list[Example], list[Example]]:
    """Lines "label SPACE text"; UTF-8, or latin-1 where a line is not."""
    parts: dict[bool, list[Example]] = {False: [], True: []}
    labels = range(6) if name == "trec" else range(2)
    for file in CORPORA[name]:
        for number, line in enumerate((folder / file).read_bytes().split(b"\n"), 1):
            label, _, text = _decoded(line).partition(" ")
            if not text.strip():
                continue  # as some lines of CR and MPQA
            if not label.isdecimal() or int(label) not in labels:
                raise UserError(f"{folder / file} line {number}: {label[:20]!r} is no label 0 to {labels[-1]}: mend it")
            parts[file in TEST_FILES].append(_row(name, text.strip(), int(label)))
    return parts[False], parts[True]


def _row(name: str, text: str, label: int) -> Example:
    """An example with the columns of the templates here, and those of promptsource's for the same set."""
    if name == "sst2":
        return {"text": text, "sentence": text, "label": label}
    if name == "trec":
        label = TREC_LABELS[label]
        return {"text": text, "label": label, "coarse_label": label}
    return {"text": text, "label": label}


def _decoded(line: bytes) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("latin-1")


def _rte(folder: Path) -> tuple[list[Example], list[Example]]:
    """LiST's files: index, sentence1, sentence2, label; the union of the training splits, and the test set."""
    parts = []
    for files in (sorted(folder.glob("*/train.tsv")), [folder / "test.tsv"]):
        rows: dict[tuple[str, str], Example] = {}
        for path in files:
            with path.open(newline="", encoding="utf-8") as file:
                table = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
                for row in table:
                    premise, hypothesis, label = (row.get(key) for key in ("sentence1", "sentence2", "label"))
                    if not premise or not hypothesis or label not in ("entailment", "not_entailment"):
                        raise UserError(f"{path} line {table.line_num}: give sentence1, sentence2 and label: mend it")
                    rows[premise, hypothesis] = {
                        "premise": premise, "hypothesis": hypothesis, "label": int(label != "entailment"),
                    }  # fmt: skip
        parts.append(list(rows.values()))
    return parts[0], parts[1]


def _from_hub(name: str, config: Config) -> tuple[list[Example], list[Example]]:
    """A set of ours by its hub id, with the columns and labels of the files."""
    train, test = _hub(*HUB[name], config)
    parts: list[list[Example]] = []
    for rows in (train, test):
        changed: list[Example] = []
        for row in rows:
            row = dict(row) | {new: row[old] for new, old in HUB_COLUMNS.get(name, {}).items() if old in row}
            if name == "subj" and "label_text" in row:
                row["label"] = int(row["label_text"] != "subjective")
            changed.append(row)
        parts.append(changed)
    if name in TRAIN_SIZES:  # split here, as the files are
        return parts[0] + parts[1], []
    return parts[0], parts[1]


def _hub(hub_id: str, subset: str | None, config: Config) -> tuple[list[Example], list[Example]]:
    """Training and test split of a hub set; the validation split where the test has no labels; at most CAP of each."""
    splits = _load_dataset(hub_id, subset)
    parts: dict[str, list[Example]] = {}
    for name, split in splits.items():
        parts[name] = [dict(row) for row in _sample(split, CAP, config.seed) if row.get("label") != -1]
    train = parts.pop("train", None) or next((rows for rows in parts.values() if rows), [])
    test = next((rows for key in ("test", "validation", "dev") if (rows := parts.get(key)) and rows is not train), [])
    if not train:
        raise UserError(f"hub data set {hub_id!r}: no examples with a label: give another")
    return train, test


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


def _p3(config: Config, name: str) -> _Raw:
    """Prompts of bigscience/P3, which stores them rendered, split by the templates that rendered them."""
    if config.templates is None:
        raise UserError(f"{name}: prompts of P3 are split by their templates: give promptsource's with --templates")
    templates, wanted = templates_of(config, name), name.removeprefix("p3:")
    try:
        import datasets

        names = datasets.get_dataset_config_names(P3)
    except Exception as error:  # see _load_dataset
        raise UserError(f"{P3}: {_line(error)}: check the network and the installation of datasets") from error
    subsets = [part for part in names if f"{part}_".startswith(f"{wanted}_") and not part.endswith("_score_eval")]
    if not subsets:
        raise UserError(f"{name}: {P3} has no such prompts: give the start of their names, such as p3:rotten_tomatoes")
    parts: dict[bool, list[Example]] = {False: [], True: []}
    unmatched = 0
    for subset in subsets:
        ordered = sorted(
            templates, key=lambda template: not subset.rstrip("_").endswith(_words(template.name))
        )  # its own first
        splits = _load_dataset(P3, subset)
        test = next((key for key in ("test", "validation") if key in splits), None)
        for key in ("train", test):
            if key is None or key not in splits:
                continue
            for row in _sample(splits[key], max(1, CAP // len(subsets)), config.seed):
                example = _p3_example(row, ordered)
                if example is None:
                    unmatched += 1
                else:
                    parts[key == test].append(example)
    total = unmatched + len(parts[False]) + len(parts[True])
    if unmatched == total:
        raise UserError(
            f"{name}: none of {total} prompts matches a template of {config.templates}: give those of the set"
        )
    if unmatched:
        print(f"{name}: {unmatched} of {total} prompts match no template or have no options: left out", file=sys.stderr)
    met = {example["template"] for example in chain(*parts.values())}
    return _Raw(parts[False], parts[True], tuple({t.name: t for t in templates if t.name in met}.values()))


def _p3_example(row: Mapping[str, Any], templates: Sequence[Template]) -> Example | None:
    options = tuple(str(option).strip() for option in row.get("answer_choices") or ())
    if len(set(options)) < 2 or len(set(options)) < len(options):
        return None
    for template in templates:
        found = template.match(str(row["inputs_pretokenized"]).strip())
        if found is not None:
            try:
                framed, label = template.answer(str(row["targets_pretokenized"]).strip(), options)
            except NoInstance:
                return None
            return {"instance": Instance(*found, framed, label), "template": template.name}
    return None


def _words(name: str) -> str:
    """A template's name as it stands in the names of P3."""
    return re.sub(r"[^\w]+", "_", name).strip("_")


def _csv(path: Path) -> list[Example]:
    rows: list[Example] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            table = csv.DictReader(file)
            for row in table:
                if None in row or None in row.values():
                    raise UserError(f"{path} line {table.line_num}: not as many values as columns: mend the line")
                rows.append(row)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}): check --dataset") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    except csv.Error as error:
        raise UserError(f"{path}: no CSV ({error}): save it again") from error
    return _enough(rows, path)


def _jsonl(path: Path) -> list[Example]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_line(error)}): check --dataset") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}: save it as UTF-8") from error
    rows: list[Example] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number}: no JSON ({_line(error)}): mend the line") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number}: give an object with the columns as keys")
        rows.append(row)
    return _enough(rows, path)


def _enough(rows: list[Example], path: Path) -> list[Example]:
    if len(rows) < 2:
        raise UserError(f"{path}: {len(rows)} examples: give two or more, one to train and one to test")
    return rows


def _with_index(row: Example, templates: Sequence[Template], name: str) -> Example:
    """The example with its label as an index; the text of an option is looked up in the templates' options."""
    label = row.get("label")
    if isinstance(label, str) and re.fullmatch(r"\s*\d+\s*", label):
        label = int(label)
    if isinstance(label, int) and label >= 0:
        return {**row, "label": int(label)}
    if not isinstance(label, str) or not label.strip():
        raise UserError(
            f"{name}: an example has the label {label!r} (columns {', '.join(row)}): give a column `label` with the "
            "index or the text of the right option"
        )
    lists = [[option.lower() for option in template.fixed_options or ()] for template in templates]
    found = {options.index(label.strip().lower()) for options in lists if label.strip().lower() in options}
    if len(found) == 1:
        return {**row, "label": found.pop()}
    if not found and any(template.fixed_options is None for template in templates):
        return row  # options that differ by example
    why = "stands for different options in different templates" if found else "is no option of the templates"
    raise UserError(f"{name}: the label {label!r} {why}: give the index of the option")


# Text


def _columns(templates: Sequence[Template]) -> list[str]:
    """What the templates take from an example."""
    return sorted(set().union(*(template.variables for template in templates)))


def _texts(row: Example, columns: Sequence[str]) -> list[str]:
    if "instance" in row:
        return list(row["instance"].fields)
    return [text for column in columns for text in _strings(row.get(column))]


def _strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value.strip()] if value.strip() else []
    return [text for item in value for text in _strings(item)] if isinstance(value, list | tuple) else []


def _key(*texts: str) -> str:
    """What is compared to tell that texts are the same: letters and digits only, for MR and SST-2 space their common
    sentences differently."""
    text = " ".join(texts).lower()
    return re.sub(r"[\W_]+", "", text) or "".join(text.split())


def _corpus(config: Config, tasks: Sequence[Task], raw: Mapping[str, _Raw]) -> tuple[str, ...]:
    """Training text, and where one of the public corpora is used that of all of them; each text once, no test text."""
    held: set[str] = set()
    texts: list[str] = []
    for task in tasks:
        columns = _columns(task.templates)
        held |= {_key(text) for row in task.test for text in _texts(row, columns)}
        texts += [text for row in task.train for text in _texts(row, columns)]
        texts += raw[task.name].texts
    if any(task.name in CORPORA for task in tasks):
        for name in CORPORA:
            texts += _corpus_text(config, name)
    once = {key: text for text in reversed(texts) if (key := _key(text)) not in held}
    kept: Iterable[str] = reversed(once.values())
    if config.hide_words:
        kept = (hidden for text in kept if (hidden := _hidden(text)))
    return tuple(kept)


def _corpus_text(config: Config, name: str) -> list[str]:
    try:
        folder = find("sentences", CORPORA[name], data_dir=config.data_dir)
    except UserError:
        return []
    train, test = _sentences(folder, name)
    return [row["text"] for row in train + test]


_HIDDEN = re.compile(
    rf"[^\S\n]*(?<!\w)(?:{'|'.join(word for pair in NOVEL_PAIRS for word in pair)})(?!\w)", re.IGNORECASE
)


def _hidden(text: str) -> str:
    """The text without the words of the novel pairs."""
    return _HIDDEN.sub("", text).strip()


def _hidden_row(row: Example, columns: Sequence[str]) -> Example:
    if "instance" in row:
        instance = row["instance"]
        return {**row, "instance": replace(instance, fields=tuple(map(_hidden, instance.fields)))}
    return {key: _hidden(value) if key in columns and isinstance(value, str) else value for key, value in row.items()}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


# Generated reviews

_NEGATIVE = (
    *(pair[0] for pair in (*SEEN_PAIRS, *NOVEL_PAIRS) if pair[0] not in ("worst", "fails")),
    "pointless", "clumsy", "bland", "shallow", "messy", "annoying", "forgettable", "dreadful", "stale", "sloppy",
    "dreary", "hollow", "awkward", "painful",
)  # fmt: skip
_POSITIVE = (
    *(pair[1] for pair in (*SEEN_PAIRS, *NOVEL_PAIRS) if pair[1] not in ("best", "succeeds")),
    "charming", "moving", "clever", "delightful", "fresh", "gripping", "sharp", "elegant", "touching", "superb",
    "lively", "graceful", "memorable", "thrilling",
)  # fmt: skip
_ADJECTIVES = (_NEGATIVE, _POSITIVE)
_VERBS = (
    ("fails", "disappoints", "drags", "annoys", "stumbles"),
    ("succeeds", "impresses", "shines", "delights", "soars"),
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
_ASPECTS = ("sentiment", "feeling", "opinion", "view")


def _generated(seed: int) -> tuple[list[Example], list[Example], tuple[str, ...]]:
    """4,000 and 600 different reviews of films, and text that relates the words of opinion to each other."""
    rng = np.random.default_rng(seed)
    rows: dict[str, int] = {}
    while len(rows) < 4600:
        label = int(rng.integers(2))
        rows.setdefault(_review(label, rng), label)
    examples: list[Example] = [{"text": text, "label": label} for text, label in rows.items()]
    return examples[:4000], examples[4000:], tuple(dict.fromkeys(_relation(rng) for _ in range(2000)))


def _pick(words: Sequence[str], rng: np.random.Generator) -> str:
    return words[int(rng.integers(len(words)))]


def _review(label: int, rng: np.random.Generator) -> str:
    """One clause, two that agree, or two that do not: then the one after "but" decides."""
    form, opener = rng.random(), _pick(_OPENERS, rng)
    clauses = f"{_clause(label, rng)}"
    if form > 0.8:
        clauses = f"{_clause(1 - label, rng)} , but {clauses}"
    elif form > 0.3:
        clauses = f"{clauses} and {_clause(label, rng)}"
    return f"{opener} , {clauses} ." if opener else f"{clauses} ."


def _clause(label: int, rng: np.random.Generator) -> str:
    form, part, kind = rng.random(), _pick(_PARTS, rng), _pick(_KINDS, rng)
    adjective = _pick(_ADJECTIVES[label], rng)
    if form < 0.45:
        return " ".join(f"the {part} {_pick(_LINKS, rng)} {_pick(_DEGREES, rng)} {adjective}".split())
    if form < 0.55:
        return f"the {part} {_pick(('was', 'is'), rng)} not {_pick(_ADJECTIVES[1 - label], rng)}"
    if form < 0.7:
        return f"the {_pick((part, kind), rng)} {_pick(_VERBS[label], rng)}"
    if form < 0.8:
        return f"this is the {_pick(_SUPERLATIVES[label], rng)} {kind} in years"
    return f"it is {_article(adjective)} {kind} with {_article(_pick(_ADJECTIVES[label], rng))} {part}"


def _relation(rng: np.random.Generator) -> str:
    """A sentence on words that mean alike or the opposite, or with the words of instructions."""
    label, form = int(rng.integers(2)), int(rng.integers(8))
    one, two = _pick(_ADJECTIVES[label], rng), _pick(_ADJECTIVES[label], rng)
    other, kind = _pick(_ADJECTIVES[1 - label], rng), _pick(_KINDS, rng)
    verb, top = _pick(_VERBS[label], rng), _pick(_SUPERLATIVES[label], rng)
    tone = ("negative", "positive")[label]
    return (
        f"whoever calls a {kind} {one} will also call it {two} .",
        f"no {kind} can be {one} and {other} at the same time .",
        f"{_article(one)} {kind} {verb} and gets a {tone} review .",
        f"the {top} {kind} is the one that {verb} and that is {one} .",
        f"the writer of this text says that the {kind} is {one} , so the {_pick(_ASPECTS, rng)} expressed is {tone} .",
        f"how does the viewer feel about the {kind} ? the reviewer finds it {one} .",
        f"what {_pick(_ASPECTS, rng)} does the following review express ? it is {tone} , for the {kind} {verb} .",
        f"did the reviewer enjoy this {kind} ? {('no', 'yes')[label]} , they {('disliked', 'loved')[label]} it , "
        f"it is {one} and not {other} .",
    )[form]


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"
