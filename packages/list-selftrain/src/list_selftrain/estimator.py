"""Few labelled texts and many unlabelled ones: after scikit-learn's protocol, and for the command line."""

from __future__ import annotations

import contextlib
import csv
import io
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from metazoo.loop import Stopped
from metazoo.options import RunOptions
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data

from list_selftrain.config import Config, PredictOptions
from list_selftrain.data import Data, Part, read_texts
from list_selftrain.model import Classifier
from list_selftrain.train import Run, load, score, train_on

Texts = tuple[tuple[str, ...], ...]

GIVEN = "LiSTClassifier.fit"  # config.dataset of runs on arrays
TEMPLATE = "*cls**sent_0*_It_was*mask*.*sep+*"  # of one text
PAIR_TEMPLATE = "*cls**sent-_0*?*mask*,*+sentl_1**sep+*"


class LiSTClassifier(ClassifierMixin, BaseEstimator):
    """A text classifier from few labels, self-trained on unlabelled texts with learned weights of pseudo-labels.

    X is a list, array or Series of texts, or of pairs of texts (also two columns). With ``model="features"`` it may be
    a table of numbers instead. A class −1 among numbers, or None (which pandas makes
    NaN), marks a row of X that has no label.

    Random states of the process are left as they were. A fit that fails leaves the estimator as it was, except for
    ``n_features_in_``.

    Args:
        model: tiny (a RoBERTa, pre-trained here on the texts), features (a network on TF-IDF features, or on a table of
            numbers), or hub id or folder of an AutoModelForMaskedLM.
        template: in LM-BFF's syntax [default: "<text> It was [mask]." of a text, "<one>? [mask], <two>" of a pair].
        words: for each class the word that stands at the mask, in the order of ``classes_`` (sorted) or by class;
            needed with classifier="prompt", not read by features.
        classifier: prompt (words at the mask), or classic (a new head on the first token).
        tune, adapter_dim, sessions, session_steps, teacher_epochs, finetune_epochs, weights, warmup, soft_labels,
            teacher_lr, lr, dropout: as in :class:`Config`.
        pretrain_steps: of masked language modelling on the texts [default: 1000 of tiny, 0 of a given model].
        random_state: seed. output_dir: keep the run there; a new folder for each fit. verbose: a bar on terminals.

    Attributes:
        classes_: sorted. model_: the trained network, in evaluation mode. sessions_: of the teacher and each student
            what is known, such as zero_weights and effective_examples.
        pseudo_labels_: the last session's, of the unlabelled rows of X and then of X_unlabeled; of those that it did
            not draw −1 where classes are numbers, else None.
        pseudo_label_weights_: their mean weights, 1 being that in a plain mean; NaN where never (re-)weighted.
        n_features_in_: columns of a table of numbers.

    >>> import numpy as np
    >>> y = np.repeat([0, 1], 200)
    >>> X = np.random.default_rng(0).normal(size=(400, 5)) + 3 * y[:, None]
    >>> model = LiSTClassifier("features", sessions=1, session_steps=20, random_state=0)
    >>> model.fit(X[190:210], y[190:210], X_unlabeled=X).predict(X[[0, -1]])
    array([0, 1])
    """

    model_: Classifier
    classes_: np.ndarray
    sessions_: list[dict[str, float]]
    pseudo_labels_: np.ndarray
    pseudo_label_weights_: np.ndarray
    n_features_in_: int
    _columns: int  # texts of an example; 0: a table of numbers

    def __init__(
        self,
        model: str = "tiny",
        *,
        template: str | None = None,
        words: Sequence[str] | Mapping[Any, str] | None = None,
        classifier: str = "prompt",
        tune: str = "adapter",
        adapter_dim: int = 8,
        sessions: int = 3,
        session_steps: int = 100,
        teacher_epochs: int = 50,
        finetune_epochs: int = 50,
        weights: str = "meta",
        warmup: float = 0.6,
        soft_labels: bool = True,
        teacher_lr: float = 1e-3,
        lr: float = 1e-3,
        dropout: float = 0.1,
        pretrain_steps: int | None = None,
        random_state: int | np.random.RandomState | None = None,
        output_dir: str | Path | None = None,
        verbose: bool = False,
    ) -> None:
        self.model = model
        self.template = template
        self.words = words
        self.classifier = classifier
        self.tune = tune
        self.adapter_dim = adapter_dim
        self.sessions = sessions
        self.session_steps = session_steps
        self.teacher_epochs = teacher_epochs
        self.finetune_epochs = finetune_epochs
        self.weights = weights
        self.warmup = warmup
        self.soft_labels = soft_labels
        self.teacher_lr = teacher_lr
        self.lr = lr
        self.dropout = dropout
        self.pretrain_steps = pretrain_steps
        self.random_state = random_state
        self.output_dir = output_dir
        self.verbose = verbose

    def fit(self, X: Any, y: Any, X_unlabeled: Any = None) -> Self:
        """Train on X of classes y, and on unlabelled texts.

        Args:
            X: [N] texts or pairs, or a table of numbers. y: [N] strings, integers or booleans; −1 or None: no label.
            X_unlabeled: as X, of any length. (scikit-learn's searches cut a fit parameter that is as long as X into
            folds, as if it belonged to the rows of X.)

        Raises:
            ValueError: a text or label is missing, there is one class only, nothing is unlabelled and ``sessions`` is
                not 0, words or template do not serve, or a parameter is out of its range.
        """
        if y is None:
            raise UserError("fit requires y to be passed, but the target y is None")
        part = self._part(X, "X", fitting=True)
        classes, codes = _coded(y)
        if len(codes) != len(part):
            raise UserError(f"X has {len(part)} rows and y has {len(codes)}: give a label for each row")
        known = np.flatnonzero(codes >= 0)
        labelled = part.take(known)
        labelled = Part(labelled.texts, codes[known], labelled.vectors)
        unlabelled = part.take(np.flatnonzero(codes < 0))
        columns = 0 if part.vectors is not None else len(part.texts[0])
        if X_unlabeled is not None and len(X_unlabeled):
            more = self._part(X_unlabeled, "X_unlabeled")
            if (more.vectors is None) != (part.vectors is None) or len(more.texts[0]) != columns:
                raise UserError(f"X_unlabeled has {_kind(more)} a row and X {_kind(part)}: give the same kind")
            unlabelled = _joined(unlabelled, more)
        config = self._config(classes, columns)
        if config.sessions and not len(unlabelled):
            raise UserError(
                f"sessions={config.sessions} learn from unlabelled rows, and there are none: give X_unlabeled, or "
                "sessions=0 to train on the labelled rows alone"
            )
        corpus = dict.fromkeys(text for row in (*labelled.texts, *unlabelled.texts) for text in row)
        data = Data(GIVEN, tuple(str(name) for name in classes), labelled, unlabelled, None, tuple(corpus))
        run = self._train(config, data)
        self.model_, self.classes_, self.sessions_, self._columns = run.model, classes, run.sessions, columns
        drawn = run.targets.sum(1) > 0
        self.pseudo_labels_ = _decoded(classes, np.where(drawn, run.targets.argmax(1), -1))
        self.pseudo_label_weights_ = run.weights
        return self

    def predict(self, X: Any) -> np.ndarray:
        """The likeliest class of each row [N]. Raises ValueError as :meth:`predict_proba`."""
        best = self.predict_proba(X).argmax(1)
        found: np.ndarray = self.classes_[best]
        return found

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probability of each class [N, classes].

        Raises:
            NotFittedError: before fit. ValueError: a text is missing, or X is of another kind than in fit.
        """
        check_is_fitted(self, "model_")
        if not len(X):
            return np.zeros((0, len(self.classes_)))
        part = self._part(X, "X")
        columns = 0 if part.vectors is not None else len(part.texts[0])
        if columns != self._columns:
            wanted = f"{self._columns or 'a table of numbers, not'} text{'s' * (self._columns != 1)}"
            raise UserError(f"X has {_kind(part)} a row, but fit was given {wanted}: give the same kind")
        logits = score(self.model_, self.model_.encode(part), range(len(part)))
        found: np.ndarray = logits.double().softmax(-1).cpu().numpy()
        return found

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the network as its class loads it; of a prompted one adapters and head alone, and the classes.

        Raises:
            NotFittedError: before fit. UserError: a network on features, which has no such form.
        """
        check_is_fitted(self, "model_")
        save = getattr(self.model_, "save_pretrained", None)
        if save is None:
            raise UserError(f"{type(self.model_).__name__} has no save_pretrained: give output_dir to keep a run of it")
        save(Path(folder), labels=tuple(str(name) for name in self.classes_))

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = self.model == "features"
        tags.input_tags.string = True
        return tags

    # ---- what fit consists of

    def _part(self, X: Any, name: str, *, fitting: bool = False) -> Part:
        """X as examples without labels."""
        table = _is_table(X)
        if table and self.model != "features":
            raise UserError(f'{name} is a table of numbers: give texts, or model="features"')
        if table:
            if not fitting and not hasattr(self, "n_features_in_"):
                raise UserError(f"{name} is a table of numbers, but X of fit was texts: give the same kind")
            vectors = validate_data(self, X, dtype=np.float32, reset=fitting)
            return Part(((),) * len(vectors), None, vectors)
        if fitting:
            for attribute in ("n_features_in_", "feature_names_in_"):
                if hasattr(self, attribute):
                    delattr(self, attribute)
        rows = _rows(X, name)
        if not rows:
            raise UserError(f"{name} is empty: give one text or more")
        return Part(rows)

    def _config(self, classes: np.ndarray, columns: int) -> Config:
        """The run's config. Raises UserError."""
        texts = self.model != "features"
        prompted = texts and self.classifier == "prompt"
        for name, known in (
            ("classifier", ("prompt", "classic")),
            ("weights", ("meta", "uniform", "confidence", "uncertainty")),
        ):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: give {', '.join(known)}")
        words = _words(self.words, classes) if prompted else ()
        state = self.random_state
        seed = state if isinstance(state, int | np.integer) else check_random_state(state).randint(2**31 - 1)
        integers = {name: int(getattr(self, name)) for name in _INTEGERS}
        if self.tune == "simple":  # has no rank
            del integers["adapter_dim"]
        steps = self.pretrain_steps
        return Config(
            dataset=GIVEN,
            shots=None,
            seed=int(seed),
            model=str(self.model),
            classifier=self.classifier,  # type: ignore[arg-type]
            template=(self.template or (TEMPLATE if columns == 1 else PAIR_TEMPLATE)) if prompted else None,
            words=words,
            tune=self.tune,  # type: ignore[arg-type]
            weights=self.weights,  # type: ignore[arg-type]
            soft_labels=bool(self.soft_labels),
            pretrain_steps=(1000 if self.model == "tiny" else 0) if steps is None else int(steps),
            **integers,  # type: ignore[arg-type]
            **{name: float(getattr(self, name)) for name in _NUMBERS},  # type: ignore[arg-type]
        )

    def _train(self, config: Config, data: Data) -> Run:
        with contextlib.ExitStack() as stack:
            folder = self.output_dir
            if folder is None:
                folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="list-selftrain-"))
            if not self.verbose:
                stack.enter_context(contextlib.redirect_stderr(_NoTerminal(sys.stderr)))
            stack.enter_context(_own_random_states())
            every = 100 if self.output_dir is not None else 2**31  # what goes with the folder is saved once
            options = RunOptions(output_dir=Path(folder), checkpoint_every=every)
            try:
                return train_on(config, lambda config: data, options)
            except Stopped as stop:
                if stop.code == 130:
                    raise KeyboardInterrupt from stop
                raise


_INTEGERS = ("adapter_dim", "sessions", "session_steps", "teacher_epochs", "finetune_epochs")  # NumPy's too, of a grid
_NUMBERS = ("warmup", "teacher_lr", "lr", "dropout")


class _NoTerminal:
    """A stream that shows messages but no bars."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def isatty(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def _own_random_states() -> Iterator[None]:
    """Random states are put back at the end."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


# ---- labels


def _coded(y: Any) -> tuple[np.ndarray, np.ndarray]:
    """Classes, sorted, and the place in them of each label, int64 [N], −1 where there is none. Raises UserError."""
    labels = np.asarray(y)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UserError(f"y has the shape {labels.shape}: give one label a row")
    known = ~np.array([_unlabelled(label) for label in labels.tolist()], dtype=bool)
    if labels.dtype.kind == "f" and np.isnan(labels).any():
        place = int(np.flatnonzero(np.isnan(labels))[0])
        raise UserError(f"y[{place}] is NaN: give a class, or −1 for a row without a label")
    named = labels[known]
    if named.dtype == object:
        texts = {isinstance(label, str) for label in named}
        if len(texts) > 1:
            raise UserError("y mixes strings and other labels: give labels of one kind")
        named = np.array(named.tolist())
    if not len(named):
        raise UserError("y marks all rows as unlabelled: give labels of two classes or more")
    check_classification_targets(named)
    classes, places = np.unique(named, return_inverse=True)
    if len(classes) < 2:
        raise UserError(
            f"y has one class only, {classes.tolist()[0]!r} (−1 and None mark rows without a label): give labels of "
            "two classes or more"
        )
    codes = np.full(len(labels), -1, dtype=np.int64)
    codes[known] = places
    return classes, codes


def _unlabelled(label: Any) -> bool:
    """−1 or None; pandas has NaN or NA for it."""
    if isinstance(label, str | bool):
        return False
    missing = label is None or label != label
    return not isinstance(missing, bool) or missing or (isinstance(label, int | float) and label == -1)


def _decoded(classes: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """Classes by their place; for a code of −1 the number −1, or None where classes are not numbers."""
    if classes.dtype.kind in "iuf":
        signed = classes.astype(float if classes.dtype.kind == "f" else np.int64)
        return np.asarray(np.where(codes >= 0, signed[codes], -1))
    found: np.ndarray = classes[codes].astype(object)
    found[codes < 0] = None
    return found


def _words(words: Sequence[str] | Mapping[Any, str] | None, classes: np.ndarray) -> tuple[str, ...]:
    """A word for each class, in their order."""
    names = classes.tolist()
    if words is None or isinstance(words, str) or not len(words):
        raise UserError(
            f'words is {words!r}: with classifier="prompt" give a word for each of the classes '
            f"{', '.join(map(repr, names))}, such as words={{{names[0]!r}: 'terrible', …}}"
        )
    if isinstance(words, Mapping):
        if set(words) != set(names):
            raise UserError(f"words has the classes {list(words)}, y has {names}: give a word for each of y's")
        words = [words[name] for name in names]
    elif len(words) != len(names):
        raise UserError(f"{len(words)} words for the {len(names)} classes {names}: give as many, in this order")
    for word in words:
        if not isinstance(word, str) or not word.strip():
            raise UserError(f"words has {word!r}: give a word for each class")
    return tuple(str(word) for word in words)


# ---- texts


def _is_table(X: Any) -> bool:
    """Whether rows are numbers."""
    if isinstance(X, str | bytes | Mapping) or not hasattr(X, "__getitem__"):
        return False
    try:
        first = np.asarray(X[:1])
    except (TypeError, ValueError, KeyError, IndexError):
        return False
    return first.ndim == 2 and first.dtype.kind in "biuf"


def _rows(X: Any, name: str) -> Texts:
    """Texts or pairs. Raises UserError that names the place."""
    if X is None or isinstance(X, str | bytes | Mapping):
        raise UserError(f"{name} is {type(X).__name__}: give a list of texts, or of pairs of texts")
    if hasattr(X, "columns"):
        X = list(zip(*(X[column] for column in X.columns), strict=True))
    rows = tuple(_row(value, f"{name}[{i}]") for i, value in enumerate(X))
    for i, row in enumerate(rows):
        if len(row) != len(rows[0]):
            raise UserError(f"{name}[{i}] is {len(row)} texts and {name}[0] {len(rows[0])}: give as many in each row")
    return rows


def _row(value: Any, place: str) -> tuple[str, ...]:
    row = tuple(value) if isinstance(value, tuple | list | np.ndarray) and np.ndim(value) == 1 else (value,)
    if len(row) not in (1, 2):
        raise UserError(f"{place} has {len(row)} values: give a text or a pair of texts")
    for text in row:
        if not isinstance(text, str):
            missing = text is None or (isinstance(text, float) and text != text)
            kind = f"missing ({text})" if missing else type(text).__name__
            raise UserError(f"{place} is {kind}: give a text or a pair of texts, or leave the row out")
        if not text.strip():
            raise UserError(f"{place} is empty: give a text, or leave the row out")
    return tuple(str(text) for text in row)


def _kind(part: Part) -> str:
    if part.vectors is not None:
        return f"{part.vectors.shape[1]} numbers"
    return "one text" if len(part.texts[0]) == 1 else "two texts"


def _joined(one: Part, two: Part) -> Part:
    if one.vectors is None or two.vectors is None:
        return Part(one.texts + two.texts)
    return Part(one.texts + two.texts, None, np.concatenate([one.vectors, two.vectors]))


# ---- command line


def predict(options: PredictOptions) -> str:
    """Classify texts, or those of a file.

    Returns:
        A line for each: label, its probability, and the text as far as the terminal is wide.

    Raises:
        UserError: the output exists, a text is empty, the file cannot be read, the run learned from pairs or vectors
            and these are not such, or as :func:`list_selftrain.train.load`.
    """
    if options.output is not None and options.output.exists():
        raise UserError(f"{options.output} exists: choose another --output")
    if options.file is None:
        texts: Texts = tuple((text.strip(),) for text in options.texts)
        for i, (text,) in enumerate(texts, 1):
            if not text:
                raise UserError(f"--texts {i} is empty: give a text, or leave it out")
    else:
        texts = tuple(read_texts(options.file))
    if runfolder.open_run(options.run, Config).dataset == GIVEN:
        model = options.run / "model"
        other = f", or with PromptClassifier.from_pretrained({str(model)!r})" if model.is_dir() else ""
        raise UserError(
            f"{options.run} was trained by LiSTClassifier.fit, on data that are not kept: predict with the "
            f"estimator{other}"
        )
    run = load(options.run)
    wanted = len(run.data.labelled.texts[0])
    if not wanted:
        raise UserError(f"{options.run} classifies vectors: it takes no texts")
    if len(texts[0]) != wanted:
        how = "a file with the columns sentence1 and sentence2" if wanted == 2 else "one text in each line"
        raise UserError(f"{options.run} classifies {('single texts', 'pairs of texts')[wanted - 1]}: give {how}")
    probabilities = run.predict_proba(Part(texts), options.batch_size)
    best, labels = probabilities.argmax(1), run.data.labels
    if options.output is not None:
        runfolder.write_text(options.output, _csv(texts, labels, probabilities))
    width = max(map(len, labels))
    return "\n".join(
        _shortened(f"{labels[k]:{width}s}  {row[k]:6.1%}  {' | '.join(text)}")
        for text, row, k in zip(texts, probabilities, best, strict=True)
    )


def _shortened(line: str) -> str:
    """A line without control characters, as long as the terminal is wide."""
    line = "".join(c if c.isprintable() else " " for c in line)
    width = max(20, shutil.get_terminal_size().columns)
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _csv(texts: Texts, labels: Sequence[str], probabilities: np.ndarray) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = ("text",) if len(texts[0]) == 1 else ("text_a", "text_b")
    writer.writerow([*names, "label", *(f"probability_{label}" for label in labels)])
    for row, values in zip(texts, probabilities, strict=True):
        writer.writerow([*row, labels[int(values.argmax())], *(f"{value:.6g}" for value in values)])
    return out.getvalue()
