"""Zero-shot classification of texts with labels and an instruction of your own: after scikit-learn's protocol, and for
the command line."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import nn

from flipped_learning import flipping
from flipped_learning.config import TRAINED_HERE, Config, PredictOptions
from flipped_learning.flipping import FlippedCollator, Method
from flipped_learning.minimodel import BagOfWords
from flipped_learning.model import from_hub_or_folder
from flipped_learning.templates import SEPARATOR, Instance, NoInstance, Template

METHODS = ("flipped", "direct", "channel")
Row = Mapping[str, Any]


class FlippedClassifier(ClassifierMixin, BaseEstimator):
    """Chooses the label with which the instruction (flipped), the label (direct) or the prompt (channel) is likeliest.

    Nothing is learned from examples: ``fit`` loads the model, and the predicting methods do so where it has not been
    called, or ``model`` or ``method`` has changed since. Labels, template, batch size and ``normalise`` take effect at
    once. X is a list or array of texts, for a template of one field; or a list of dicts, a pandas or polars DataFrame
    or a ``datasets.Dataset`` with the template's fields (further columns are ignored).

    Args:
        model: run folder of ``flipped-learning train``; hub id or folder of a seq2seq model (safetensors; no code of
            theirs is run); or a pair (model, tokenizer), which stays on its device.
        labels: two or more different texts.
        template: an instruction around fields such as {{text}}, in promptsource's form; what follows "|||" is ignored.
        method: flipped, direct or channel [default: as the run was trained; flipped for other models].
        batch_size: pairs of text and label scored at a time.
        normalise: divide log-likelihoods by the number of target tokens.

    Attributes:
        classes_: labels in the given order, that of the columns of ``predict_proba`` (scorers that want them sorted,
            such as log loss, need ``labels`` sorted). model_: the loaded model, in eval mode. method_: the rule in use.
        n_ties_: texts of the last prediction whose best labels scored the same; the first of them is taken.

    >>> import numpy as np
    >>> classifier = FlippedClassifier("runs/flipped-learning-small", labels=("dull", "lively"))
    >>> classifier.get_params()["labels"]
    ('dull', 'lively')
    """

    model_: nn.Module
    method_: Method
    classes_: np.ndarray
    n_ties_: int
    _collator: FlippedCollator | None  # None: a bag of words
    _loaded: tuple[Any, str | None]  # model and method that are loaded

    def __init__(
        self,
        model: str | Path | tuple[nn.Module, Any] = "runs/flipped-learning-small",
        labels: Sequence[str] = ("negative", "positive"),
        template: str = "{{text}} What is the sentiment expressed in this text?",
        *,
        method: Method | None = None,
        batch_size: int = 64,
        normalise: bool = False,
    ) -> None:
        self.model = model
        self.labels = labels
        self.template = template
        self.method = method
        self.batch_size = batch_size
        self.normalise = normalise

    @classmethod
    def from_pretrained(cls, model: str | Path | tuple[nn.Module, Any], **kwargs: Any) -> Self:
        """A classifier whose model is loaded; ``kwargs`` as of the class. Raises UserError as :meth:`fit`."""
        return cls(model, **kwargs).fit()

    def fit(self, X: Any = None, y: Any = None) -> Self:
        """Load the model; X and y are ignored.

        Raises:
            UserError: the model cannot be loaded, the run is not finished, or labels, template or another argument do
                not serve.
        """
        self._check()
        self.model_, self._collator, self.method_ = _load(self.model, self.method)
        self._loaded = (self.model, self.method)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Labels [N]. Raises UserError as :meth:`predict_log_likelihood`."""
        scores = self.predict_log_likelihood(X)
        best, self.n_ties_ = flipping.choose(list(scores))
        labels: np.ndarray = self.classes_[best]
        return labels

    def predict_proba(self, X: Any) -> np.ndarray:
        """Softmax of the log-likelihoods over the labels [N, K]. Raises UserError as :meth:`predict_log_likelihood`."""
        scores = self.predict_log_likelihood(X)
        proba: np.ndarray = np.exp(scores - np.logaddexp.reduce(scores, axis=1, keepdims=True))
        return proba

    def predict_log_likelihood(self, X: Any) -> np.ndarray:
        """log P of the target of each label, in nats, summed over its tokens [N, K].

        Raises:
            UserError: as :meth:`fit`, a text or field is missing or empty, two labels are the same tokens, the
                template has no instruction (flipped), or instruction and label alone are longer than the model takes.

        Warns:
            UserWarning: how many sources or targets were longer than the model takes, and shortened.
        """
        rows = _rows(X, self.template)
        scores, notes = self._score(rows, [f"X[{i}]" for i in range(len(rows))])
        for note in notes:
            warnings.warn(note, UserWarning, stacklevel=2)
        return scores

    def _check(self) -> None:
        """Check the arguments and set ``classes_``."""
        labels = [] if isinstance(self.labels, str) else list(self.labels)
        if len(labels) < 2 or not all(isinstance(label, str) and label.strip() for label in labels):
            raise UserError(f"labels are {self.labels!r}: give two or more texts")
        twice = {label for label in labels if sum(label.strip() == other.strip() for other in labels) > 1}
        if twice:
            raise UserError(f"the label {min(twice)!r} stands twice in {labels}: give different ones")
        if self.method not in (None, *METHODS):
            raise UserError(f"method is {self.method!r}: give flipped, direct or channel")
        if self.batch_size < 1:
            raise UserError(f"batch_size is {self.batch_size}: give 1 or more")
        _fields(self.template)
        self.classes_ = np.array(labels)

    def _score(self, rows: Sequence[Row], places: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        """Log-likelihoods [N, K] of rows, and what the user should know; ``places`` names the rows in errors."""
        if getattr(self, "_loaded", None) == (self.model, self.method):
            self._check()
        else:
            self.fit()
        labels = [str(label) for label in self.classes_]
        instances = _instances(self.template, labels, rows, places)
        if not instances:
            return np.zeros((0, len(labels))), []
        if self._collator is None:
            return self._score_bags(instances), []
        collator = self._collator
        collator.shortened = collator.cut = 0
        scores = flipping.score(self.model_, collator, instances, batch_size=self.batch_size, normalise=self.normalise)
        pairs, notes = len(instances) * len(labels), []
        if collator.shortened:
            notes.append(
                f"{collator.shortened} of {pairs} sources (a text with a label) were longer than {collator.max_source} "
                "tokens and lost the end of their text"
            )
        if collator.cut:
            notes.append(
                f"{collator.cut} of {pairs} targets were longer than {collator.max_target} tokens and lost their end"
            )
        return np.stack(scores), notes

    def _score_bags(self, instances: Sequence[Instance]) -> np.ndarray:
        model = self.model_
        assert isinstance(model, BagOfWords)
        options = instances[0].options
        known: dict[int, str] = {}
        for label in options:
            other = known.setdefault(model.word(label), label)
            if other != label:
                raise UserError(
                    f"the bag of words takes the labels {other!r} and {label!r} for the same: give words that it knows"
                )
        texts = [" ".join(instance.fields) for instance in instances]
        parts = [texts[i : i + self.batch_size] for i in range(0, len(texts), self.batch_size)]
        return np.concatenate([model.score(part, options).double().numpy() for part in parts])

    def __getstate__(self) -> dict[str, Any]:
        """Without the loaded model: a copy loads it again, from the folder, the hub, or its own copy of the pair."""
        left_out = ("model_", "_collator", "_loaded")
        return {name: value for name, value in super().__getstate__().items() if name not in left_out}

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.target_tags.required = False
        tags.requires_fit = False
        return tags


# ---- models


def _load(
    source: str | Path | tuple[nn.Module, Any], method: Method | None
) -> tuple[nn.Module, FlippedCollator | None, Method]:
    """Model, collator (None: a bag of words) and rule. Raises UserError."""
    if isinstance(source, tuple | list):
        if len(source) != 2 or not isinstance(source[0], nn.Module):
            raise UserError("model is a tuple, but not of a seq2seq model and its tokenizer: give (model, tokenizer)")
        model, tokenizer = source
        return model.eval(), FlippedCollator(tokenizer, method or "flipped"), method or "flipped"
    path, name = Path(source), str(source)
    config = Config(method=method or "flipped")
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} has no config.json: give a run folder, or the folder of a seq2seq model")
        values = runfolder.read_json(path / "config.json")
        if not (isinstance(values, dict) and "model_type" in values):  # which all models of transformers have
            config = runfolder.open_run(path, Config)
            method = method or config.method
            if config.model == "bag":
                return _load_bag(path, config, method), None, method
            name = str(path / "model")
            if not (path / "model" / "config.json").is_file():
                raise UserError(
                    f"{path} is a run that is not finished (no model/ in it): finish it with --resume first"
                )
    elif name in TRAINED_HERE:
        raise UserError(f"model is {name!r}, which has to be trained first: give the run folder")
    elif name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1:  # no hub id
        raise UserError(f"{name} is no folder: give the --output-dir of `flipped-learning train`, or a hub id")
    method = method or config.method
    model, tokenizer = from_hub_or_folder(Config(model=name, method=method, sentinels=config.sentinels))
    if torch.accelerator.is_available():
        nn.Module.to(model, torch.accelerator.current_accelerator())
    collator = FlippedCollator(
        tokenizer, method, sentinels=config.sentinels, max_source=config.max_source, max_target=config.max_target
    )
    return model.eval(), collator, method  # type: ignore[no-untyped-call]


def _load_bag(path: Path, config: Config, method: Method) -> nn.Module:
    from flipped_learning import train  # with the data, of whose words its vocabulary is made

    if method != config.method:
        raise UserError(f"{path} is a bag of words trained as {config.method}: it cannot score as {method}")
    return train.load(path).model


# ---- texts


def _fields(template: str) -> frozenset[str]:
    """Names of the template's fields. Raises UserError if it is no template, or has none."""
    if not isinstance(template, str):
        raise UserError(f"template is {template!r}: give a text such as '{{{{text}}}} Good or bad?'")
    fields = _template(template).variables
    if not fields:
        raise UserError(f"the template {template!r} has no field: write {{{{text}}}} where the text belongs")
    return fields


def _template(template: str) -> Template:
    return Template("given", template.partition(SEPARATOR)[0], None)


def _rows(X: Any, template: str) -> list[Row]:
    """Each of X as a mapping from field to value."""
    if X is None or isinstance(X, str | bytes | Mapping):
        raise UserError(f"X is {type(X).__name__}: give a list of texts, or of dicts with the template's fields")
    if hasattr(X, "to_dicts"):  # polars
        X = X.to_dicts()
    elif hasattr(X, "to_dict") and hasattr(X, "columns"):  # pandas
        X = X.to_dict("records")
    elif isinstance(X, np.ndarray) and X.ndim != 1:
        raise UserError(f"X has the shape {X.shape}: give texts in one dimension")
    return [_row(value, f"X[{i}]", template) for i, value in enumerate(X)]


def _row(value: Any, place: str, template: str) -> Row:
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, str):
        raise UserError(f"{place} is {type(value).__name__}: give a text, or a dict with the template's fields")
    fields = sorted(_fields(template))
    if len(fields) > 1:
        raise UserError(f"{place} is a text, but the template has the fields {', '.join(fields)}: give dicts with them")
    return {fields[0]: value}


def _instances(template: str, labels: Sequence[str], rows: Sequence[Row], places: Sequence[str]) -> list[Instance]:
    """Rows in the template. Raises UserError naming the place of the first that does not serve."""
    known, fields = _template(template), sorted(_fields(template))
    instances = []
    for row, place in zip(rows, places, strict=True):
        missing = [field for field in fields if field not in row]
        if missing:
            raise UserError(
                f"{place} has no {', '.join(missing)}, only {', '.join(map(str, row)) or 'nothing'}: the template "
                "needs it"
            )
        values = {field: row[field] for field in fields}
        for field, value in values.items():
            if value is None or (isinstance(value, Real) and math.isnan(value)):
                raise UserError(f"{place}: {field} is missing (None or NaN): leave it out, or fill it in")
            if isinstance(value, str) and not value.strip():
                raise UserError(f"{place}: {field} is empty: leave it out, or fill it in")
        try:
            instances.append(known.apply(values, labels))
        except NoInstance as error:
            raise UserError(f"{place}: {error}") from error
    return instances


# ---- command line


@dataclass(frozen=True)
class _Table:
    """Rows to classify: where each stands, for errors, and the columns for the output."""

    rows: list[Row]
    places: list[str]
    columns: list[str]


def predict(options: PredictOptions) -> str:
    """Classify texts or a file's rows.

    Returns:
        A line for each: label, its probability, and the text as far as the terminal is wide.

    Raises:
        UserError: the output exists, the file is missing, empty, of another kind or not readable; a column is missing
            or a text is empty (its line is named); or as :class:`FlippedClassifier`.
    """
    if options.output is not None and options.output.exists():
        raise UserError(f"{options.output} exists: choose another --output")
    fields = sorted(_fields(options.template))
    if options.file is None:
        places = [f"--texts {i}" for i in range(1, len(options.texts) + 1)]
        rows = [_row(text, place, options.template) for text, place in zip(options.texts, places, strict=True)]
        table = _Table(rows, places, fields)
    else:
        table = _read(options.file, options.template)
    classifier = FlippedClassifier(
        options.run, options.labels, options.template, method=options.method, batch_size=options.batch_size
    )
    scores, notes = classifier._score(table.rows, table.places)
    best, ties = flipping.choose(list(scores))
    labels = [str(label) for label in classifier.classes_]
    if options.output is not None:
        runfolder.write_text(options.output, _csv(table, labels, scores, best))
    if ties:
        notes.append(f"{ties} texts had a tie of labels: the first is shown")
    width = max(map(len, labels))
    lines = []
    for row, values, k in zip(table.rows, scores, best, strict=True):
        sure = float(np.exp(values[k] - np.logaddexp.reduce(values)))
        lines.append(
            _shortened(f"{labels[k]:{width}s}  {sure:6.1%}  {' | '.join(str(row[field]) for field in fields)}")
        )
    return "\n".join([*lines, *(f"note: {note}" for note in notes)])


def _shortened(line: str) -> str:
    """A line without control characters, as long as the terminal is wide."""
    line = "".join(c if c.isprintable() else " " for c in line)
    width = max(20, shutil.get_terminal_size().columns)
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _csv(table: _Table, labels: Sequence[str], scores: np.ndarray, best: np.ndarray) -> str:
    header = list(table.columns)
    for name in ("label", *(f"log_likelihood_{label}" for label in labels)):
        while name in header:  # the label that the input came with, say
            name = f"{name}_predicted"
        header.append(name)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    for row, values, k in zip(table.rows, scores, best, strict=True):
        given = [row.get(column, "") for column in table.columns]
        cells = [json.dumps(cell, ensure_ascii=False) if isinstance(cell, dict | list) else cell for cell in given]
        writer.writerow([*cells, labels[k], *map(float, values)])
    return text.getvalue()


def _read(path: Path, template: str) -> _Table:
    """Rows of a file: .txt (or no ending), .csv or .jsonl."""
    kind = path.suffix.lower()
    if kind not in ("", ".txt", ".csv", ".jsonl"):
        raise UserError(f"{path}: cannot read {kind}: give a .txt of a text on each line, a .csv or a .jsonl")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UserError(f"cannot read {path}: {reason}: check --file") from error
    fields = sorted(_fields(template))
    if kind == ".csv":
        table = _read_csv(path, text, fields)
    elif kind == ".jsonl":
        table = _read_jsonl(path, text)
    else:
        lines = text.rstrip("\n").split("\n") if text.strip() else []
        places = [f"{path} line {i}" for i in range(1, len(lines) + 1)]
        rows = [_row(line, place, template) for line, place in zip(lines, places, strict=True)]
        table = _Table(rows, places, fields)
    if not table.rows:
        raise UserError(f"{path} is empty: give a file with texts in it")
    return table


def _read_csv(path: Path, text: str, fields: Iterable[str]) -> _Table:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[Row] = []
    places = []
    try:
        header = next(reader, [])
        missing = [field for field in fields if field not in header]
        if header and missing:
            raise UserError(
                f"{path} has no column {', '.join(missing)}, only {', '.join(header)}: rename one, or change --template"
            )
        if len(set(header)) < len(header):
            raise UserError(f"{path}: a column's name stands twice in {', '.join(header)}: rename one")
        for cells in reader:
            if not cells:  # a blank line
                continue
            place = f"{path} line {reader.line_num}"
            if len(cells) != len(header):
                raise UserError(f"{place} has {len(cells)} cells, the header {len(header)}: quote texts with commas")
            rows.append(dict(zip(header, cells, strict=True)))
            places.append(place)
    except csv.Error as error:
        raise UserError(f"{path} line {reader.line_num} is no CSV ({error}): mend it") from error
    return _Table(rows, places, header)


def _read_jsonl(path: Path, text: str) -> _Table:
    rows: list[Row] = []
    places = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path} line {number} is not JSON: mend it") from error
        if not isinstance(row, dict):
            raise UserError(f"{path} line {number} is no JSON object: write the template's fields in {{…}}")
        rows.append(row)
        places.append(f"{path} line {number}")
    return _Table(rows, places, list(dict.fromkeys(column for row in rows for column in row)))
