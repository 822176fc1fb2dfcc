"""A classifier that learns from a stream of feature vectors without a gradient step, after scikit-learn's protocol."""

from __future__ import annotations

import copy
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from metazoo.errors import UserError
from metazoo.runfolder import read_json, write_json
from numpy.typing import ArrayLike
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm import tqdm

from mambacl.config import Config
from mambacl.data import ClassEpisodes, Data, EpisodeConfig, FeatureEpisodes
from mambacl.model import ContinualLearner, LearnerState
from mambacl.train import MambaCLLearner


class _OneCPU:
    """What the learner asks of an Accelerator. The real one would take over the process's earlier device and
    precision, and refuse another."""

    device = torch.device("cpu")
    num_processes, process_index = 1, 0

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


def _one_line(error: Exception) -> str:
    return f"no {error}" if isinstance(error, KeyError) else textwrap.shorten(str(error), 200)


def _kind_of_labels(labels: np.ndarray) -> str:
    """Labels of one kind compare, sort and are stored alike; raises UserError for any other."""
    strings = labels.dtype.kind in "UT" or (labels.dtype == object and all(isinstance(name, str) for name in labels))
    kinds = {"b": "booleans", "i": "numbers", "u": "numbers", "f": "numbers"}
    if not strings and labels.dtype.kind not in kinds:
        raise UserError(f"Unknown label type {labels.dtype}, or mixed types: give integers, booleans or strings")
    return "strings" if strings else kinds[labels.dtype.kind]


def _read_learner(folder: Path) -> ContinualLearner:
    """A learner of ``save_pretrained``, as it was (float32 at least), in eval mode. Raises UserError."""
    if not (folder / "config.json").is_file():  # else from_pretrained would ask the hub
        raise UserError(f"learner {str(folder)!r}: no folder of a learner's save_pretrained (RUN/model)")
    try:
        learner = ContinualLearner.from_pretrained(folder)
        weights = load_file(folder / "model.safetensors")
        # from_pretrained makes all float32, and leaves weights that the file lacks as they were drawn
        learner.to(_precision(weights["head.weight"])).load_state_dict(weights)
    except Exception as error:  # whatever a damaged file makes torch, safetensors and the hub's mixin raise
        raise UserError(f"the learner in {folder} is damaged ({_one_line(error)}): save it again") from error
    return learner


def _precision(weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _named(state: LearnerState) -> dict[str, torch.Tensor]:
    """A state's tensors by "block.place"."""
    return {f"{i}.{j}": tensor for i, block in enumerate(state.blocks) for j, tensor in enumerate(block)}


def _read_state(path: Path, learner: ContinualLearner, tokens: int) -> LearnerState:
    """The state after ``tokens`` that ``path`` holds; ValueError if ``learner`` makes none like it."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}  # some versions map the file
    code = torch.zeros(1, 1, dtype=torch.int64)
    with torch.no_grad():
        fresh = learner.observe(learner.head.weight.new_zeros(1, 1, *learner.shape), code)
    wanted = _named(fresh)
    if tensors.keys() != wanted.keys():
        raise ValueError(f"{path.name} has {len(tensors)} tensors, the learner's state {len(wanted)}")
    for name, tensor in wanted.items():
        shape = list(tensor.shape)
        if learner.method == "transformer":  # keys and values [B, H, tokens, size], the one state that grows
            shape[2] = tokens
        found = tensors[name]
        if list(found.shape) != shape or found.dtype != tensor.dtype or not bool(torch.isfinite(found).all()):
            raise ValueError(f"{path.name}: {name} is not finite numbers {shape} of {tensor.dtype}")
    blocks = tuple(tuple(tensors[f"{i}.{j}"] for j in range(len(block))) for i, block in enumerate(fresh.blocks))
    return LearnerState(blocks, tokens)


class MambaContinualClassifier(ClassifierMixin, BaseEstimator):
    """Classes that come one after the other, held in one recurrent state of fixed size.

    Two kinds of learning. *Meta-training*, once: :meth:`meta_fit` on a table of other classes' features (the more
    classes the better), or a learner that is given, or else, at each fit, generated classes (normal means,
    ``spread`` within). *Learning*, by :meth:`partial_fit`: the examples are read once, in their order, into the state;
    no weights change and nothing is replayed. Columns are standardised by the table of
    :meth:`meta_fit`; without one they are taken as they are (generated classes have means of deviation 1).

    A call that fails leaves the estimator as it was.

    Args:
        learner: a meta-trained :class:`ContinualLearner` of classes (it is copied), or a local folder of its
            ``save_pretrained``; None for meta-training here.
        vocabulary: the most classes that a stream may have. tasks, shots: classes and examples of each in an episode
            of meta-training (streams like those are learned best). spread: of generated classes.
        width, blocks, steps, batch_size, lr, selectivity: as in :class:`Config`.
        random_state: of :attr:`seed_`. progress: show a bar.

    Attributes:
        learner_: the meta-trained learner. state_: what it keeps of the stream; None: nothing yet. classes_: seen so
        far, sorted. seed_: of meta-training and of the classes' codes, drawn when ``learner_`` is made.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(60, 4)) + np.repeat(np.eye(4)[:3] * 5, 20, 0)
    >>> y = np.repeat([0, 1, 2], 20)
    >>> model = MambaContinualClassifier(steps=20, random_state=0)
    >>> for task in range(3):  # one class after the other
    ...     model = model.partial_fit(X[20 * task : 20 * task + 4], y[20 * task : 20 * task + 4])
    >>> model.predict(X[:2]).shape
    (2,)
    """

    learner_: ContinualLearner
    state_: LearnerState | None
    classes_: np.ndarray
    seed_: int
    _codes: dict[Any, int]  # each class seen, and its symbol
    _free: list[int]  # symbols for the next classes, the last one first

    def __init__(
        self,
        learner: ContinualLearner | Path | str | None = None,
        *,
        vocabulary: int = 6,
        tasks: int = 3,
        shots: int = 2,
        spread: float = 0.3,
        width: int = 32,
        blocks: int = 2,
        steps: int = 600,
        batch_size: int = 32,
        lr: float = 1e-2,
        selectivity: float = 1.0,
        random_state: int | np.random.RandomState | None = None,
        progress: bool = False,
    ) -> None:
        self.learner = learner
        self.vocabulary = vocabulary
        self.tasks = tasks
        self.shots = shots
        self.spread = spread
        self.width = width
        self.blocks = blocks
        self.steps = steps
        self.batch_size = batch_size
        self.lr = lr
        self.selectivity = selectivity
        self.random_state = random_state
        self.progress = progress

    def meta_fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Meta-train on episodes drawn from a table X [N, columns] of classes y [N], and forget any stream.

        Raises:
            ValueError: NaN; fewer classes than ``tasks``, or a class with fewer than ``shots`` + 1 examples.
        """
        with self._unchanged_by_failure():
            x, labels = validate_data(self, X, y, dtype=np.float64)
            _kind_of_labels(labels)
            check_classification_targets(labels)
            names, classes = np.unique(labels, return_inverse=True)
            least = np.bincount(classes).min()
            if len(names) < self.tasks or least <= self.shots:
                raise UserError(
                    f"{len(names)} classes with {least} examples or more, but episodes of {self.tasks} tasks and "
                    f"{self.shots} shots want {self.tasks} with {self.shots + 1}: give more, or lower tasks or shots"
                )
            deviation = x.std(0)
            self.feature_mean_, self.feature_scale_ = x.mean(0), np.where(deviation > 0, deviation, 1.0)
            self.seed_ = self._draw_seed()
            config = self._config()
            examples = torch.from_numpy(self._scaled(x)).float()
            episodes = ClassEpisodes(
                examples, torch.from_numpy(classes.astype(np.int64)), EpisodeConfig.from_config(config)
            )
            self.learner_ = self._meta_train(config, Data("table", episodes, episodes))
            self._fit_keeps_learner = True
            self._forget()
        return self

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Forget any stream and read this one, X [N, columns] and classes y [N], in its order.

        The learner of :meth:`meta_fit` or :meth:`load` stays, with its columns and their scale. Any other is prepared
        anew, from the parameters: without ``learner`` each call meta-trains on generated classes, and X may have any
        number of columns.

        Raises:
            ValueError: as :meth:`partial_fit`; other columns than those of a learner that stays.
        """
        keep = getattr(self, "_fit_keeps_learner", False)
        shape = np.shape(X) if keep else ()
        if len(shape) == 2 and shape[1] != self.n_features_in_:
            raise UserError(
                f"fit keeps the learner that was meta-trained on {self.n_features_in_} columns, X has {shape[1]}: call "
                "meta_fit with a table of as many, or take a new estimator"
            )
        with self._unchanged_by_failure():
            self._read(X, y, None, prepare=not keep, forget=True)
        return self

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Read further examples X [N, columns] of classes y [N] into the state; new classes may come at any time.

        Args:
            classes: all that will come, as scikit-learn's protocol allows; only their number and kind are checked.

        Raises:
            ValueError: NaN, another number of columns, labels of another kind than before (strings, numbers,
                booleans), or more classes than the vocabulary has symbols.
        """
        first = not hasattr(self, "learner_")
        with self._unchanged_by_failure():
            self._read(X, y, classes, prepare=first, forget=first)
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Logits of the classes seen, after scikit-learn's habit; the state stays as it is.

        Returns:
            [N, classes] for three classes or more; [N] for two: the second's minus the first's; [N, 1] for one, with
            which a stream may begin.
        """
        logits = self._logits(X)
        return logits[:, 1] - logits[:, 0] if logits.shape[1] == 2 else logits

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Probability of each class seen so far [N, classes]; the state stays as it is."""
        logits = self._logits(X)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        found: np.ndarray = powers / powers.sum(1, keepdims=True)
        return found

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The likeliest class seen so far [N]; the state stays as it is."""
        chosen = self._logits(X).argmax(1)
        found: np.ndarray = self.classes_[chosen]
        return found

    def save(self, folder: Path | str) -> None:
        """Write learner, state and codes: safetensors and JSON. :meth:`load` goes on where the stream stopped.

        Raises:
            UserError: the folder cannot be written; what it held before is still there.
        """
        check_is_fitted(self, "learner_")
        path = Path(folder)
        parameters = {k: v for k, v in self.get_params().items() if k != "learner"}
        if not isinstance(self.random_state, (int, np.integer)):  # a generator's place in its stream: seed_ is enough
            parameters["random_state"] = None
        values = {
            "parameters": {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()},
            "seed": self.seed_,
            "mean": self.feature_mean_.tolist(),
            "scale": self.feature_scale_.tolist(),
            "feature_names": [str(name) for name in getattr(self, "feature_names_in_", [])],
            "tokens": 0 if self.state_ is None else self.state_.tokens,
            "classes": self.classes_.tolist(),
            "dtype": self.classes_.dtype.str,
            "codes": [self._codes[name] for name in self.classes_.tolist()],
            "free": self._free,
        }
        try:
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=path) as beside:
                new = Path(beside)
                self.learner_.save_pretrained(new / "learner")
                if self.state_ is not None:
                    state = {name: tensor.contiguous() for name, tensor in _named(self.state_).items()}
                    save_file(state, new / "state.safetensors")
                write_json(new / "estimator.json", values)
                # all is on disk; if the moves are cut short, no estimator.json is there, and load refuses a mix
                for name in ("estimator.json", "state.safetensors"):
                    (path / name).unlink(missing_ok=True)
                (path / "learner").mkdir(exist_ok=True)
                for file in (*(new / "learner").iterdir(), *new.glob("*.safetensors"), new / "estimator.json"):
                    file.replace(path / file.relative_to(new))
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {path}: {_one_line(error)}; free space or choose another folder") from error

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """What :meth:`save` wrote, on the CPU, ready to predict and to read on; :meth:`fit` keeps its learner.

        Raises:
            UserError: a file is missing or damaged.
        """
        path = Path(folder)
        stored = read_json(path / "estimator.json")
        learner = _read_learner(path / "learner")
        try:
            estimator = cls(**stored["parameters"])
            estimator._restore(stored, learner, path)
        except Exception as error:  # whatever values of the wrong type lead to
            raise UserError(f"{path} is damaged ({_one_line(error)}): save the estimator again") from error
        return estimator

    def _restore(self, stored: dict[str, Any], learner: ContinualLearner, path: Path) -> None:
        """Take over what estimator.json holds; ValueError where it does not go together."""

        def require(sound: bool, what: str) -> None:
            if not sound:
                raise ValueError(what)

        require(learner.kind == "class" and len(learner.shape) == 1, "its learner is not one of classes of columns")
        columns = learner.shape
        mean, scale = (np.array(stored[name], dtype=np.float64) for name in ("mean", "scale"))
        require(mean.shape == columns, f"mean is not {columns[0]} numbers, as the learner has columns")
        require(scale.shape == columns, f"scale is not {columns[0]} numbers, as the learner has columns")
        require(bool(np.isfinite(mean).all()), "a mean is not finite")
        require(bool((np.isfinite(scale) & (scale > 0)).all()), "a scale is not finite and above 0")
        names = stored["feature_names"]
        strings = type(names) is list and all(isinstance(name, str) for name in names)
        require(strings and len(names) in (0, *columns), f"feature_names are not {columns[0]} strings, or none")
        seed, tokens, codes, free = (stored[name] for name in ("seed", "tokens", "codes", "free"))
        integers = [seed, tokens, *codes, *free]
        require(
            all(type(n) is int and n >= 0 for n in integers), "seed, tokens, codes or free are not integers from 0 on"
        )
        require(
            sorted([*codes, *free]) == list(range(learner.outputs)),
            f"codes and free are not the learner's {learner.outputs} symbols, each once",
        )
        classes = np.array(stored["classes"], dtype=np.dtype(stored["dtype"]))
        _kind_of_labels(classes)
        require(len(classes) == len(codes), f"{len(classes)} classes with {len(codes)} codes")
        require(classes.tolist() == stored["classes"], f"classes are not of the type {classes.dtype}")
        require(bool((classes[:-1] < classes[1:]).all()), "classes are not sorted, or one is there twice")
        require(tokens % 2 == 0 and tokens >= 2 * len(codes), f"{tokens} tokens for {len(codes)} classes")
        require(bool(codes) == bool(tokens), f"{tokens} tokens for {len(codes)} classes")
        self.state_ = _read_state(path / "state.safetensors", learner, tokens) if tokens else None
        self.learner_, self.seed_, self.classes_, self._free = learner, seed, classes, free
        self._codes = dict(zip(classes.tolist(), codes, strict=True))
        self.feature_mean_, self.feature_scale_, self.n_features_in_ = mean, scale, columns[0]
        if names:
            self.feature_names_in_ = np.array(names, dtype=object)
        self._fit_keeps_learner = True

    @contextmanager
    def _unchanged_by_failure(self) -> Iterator[None]:
        """What fails inside leaves no trace: attributes are replaced there, never changed in place."""
        before = self.__dict__.copy()
        try:
            yield
        except BaseException:
            self.__dict__ = before
            raise

    def _read(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None, *, prepare: bool, forget: bool) -> None:
        """Read a stream's examples. ``prepare``: with a new learner; ``forget``: after none."""
        x, labels = validate_data(self, X, y, dtype=np.float64, reset=prepare)
        kind = _kind_of_labels(labels)
        check_classification_targets(labels)
        known = np.array([]) if forget else self.classes_
        announced = labels[:0] if classes is None else np.asarray(classes).ravel()
        for others, what in ((known, "those before"), (announced, "classes")):
            if len(others) and _kind_of_labels(others) != kind:
                raise UserError(
                    f"labels are {kind}, but {what} are {_kind_of_labels(others)}: give all of a stream in one kind"
                )
        learner = self._given_learner(x.shape[1]) if prepare else self.learner_
        symbols = self.vocabulary if learner is None else learner.outputs
        coming = {*known.tolist(), *labels.tolist(), *announced.tolist()}
        if len(coming) > symbols:  # before meta-training, which takes its time
            raise UserError(
                f"{len(coming)} classes, but the learner has {symbols} symbols for them: meta-train with a larger "
                "vocabulary"
            )
        if prepare:
            # one class's columns say nothing about the others': without a table of meta_fit, columns stay as they are
            self.feature_mean_, self.feature_scale_ = np.zeros(x.shape[1]), np.ones(x.shape[1])
            self.seed_ = self._draw_seed()
            if learner is None:
                config = self._config()
                episodes = FeatureEpisodes(x.shape[1], self.spread, EpisodeConfig.from_config(config))
                learner = self._meta_train(config, Data("features", episodes, episodes))
            self.learner_ = learner
        if forget:
            self._forget()
        names = np.unique(labels)
        free = self._free.copy()
        codes = self._codes | {name: free.pop() for name in names.tolist() if name not in self._codes}
        seen = np.unique(np.concatenate([self.classes_, names])) if len(self.classes_) else names
        if any(name not in codes for name in seen.tolist()):  # integers beyond 2⁵³ beside floats
            raise UserError(f"labels are rounded in the type {seen.dtype} that holds them all: give all as integers")
        self._free, self._codes, self.classes_ = free, codes, seen
        examples = self._examples(x).transpose(0, 1)
        read = torch.tensor([[codes[name] for name in labels.tolist()]], device=examples.device)
        with torch.no_grad():
            state = self.learner_.observe(examples, read, self.state_)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in _named(state).values()):
            raise UserError("the state became NaN or infinite: scale the columns of X down, or take another learner")
        self.state_ = state

    def _draw_seed(self) -> int:
        """``random_state`` itself if it is an integer, else one drawn from it."""
        generator = check_random_state(self.random_state)
        if isinstance(self.random_state, (int, np.integer)):
            return int(self.random_state)
        return int(generator.randint(2**31 - 1))

    def _config(self) -> Config:
        counts = ("vocabulary", "tasks", "shots", "width", "blocks", "steps", "batch_size")
        return Config(
            seed=self.seed_,
            lr=self.lr,
            selectivity=self.selectivity,
            spread=self.spread,
            decay_every=max(1, int(0.7 * self.steps)),
            **{name: int(getattr(self, name)) for name in counts},  # a grid of NumPy's gives its own integers
        )

    def _given_learner(self, columns: int) -> ContinualLearner | None:
        """The learner of the parameter ``learner``, a copy: the caller may train theirs on. None: there is none."""
        if self.learner is None:
            return None
        if isinstance(self.learner, ContinualLearner):
            learner = copy.deepcopy(self.learner).eval()
        elif isinstance(self.learner, (str, Path)):
            learner = _read_learner(Path(self.learner))
        else:
            raise UserError(f"learner is a {type(self.learner).__name__}: give a ContinualLearner or a folder of one")
        if learner.kind != "class" or learner.shape != (columns,):
            raise UserError(
                f"the learner is for {learner.kind} of examples {learner.shape}, X has {columns} columns: give one "
                "that was meta-trained on classes of as many columns"
            )
        return learner.to(_precision(learner.head.weight))  # half precision is for autocast, not for a state

    def _meta_train(self, config: Config, source: Data) -> ContinualLearner:
        trained = MambaCLLearner(config, source, _OneCPU(), log_every=10**9)  # type: ignore[arg-type]
        for step in tqdm(range(trained.steps), desc="mambacl", disable=not self.progress):
            loss = trained.step(step)["loss"]
            if not bool(torch.isfinite(loss)):
                raise UserError(f"the loss became {loss.item()} at step {step + 1}: lower lr")
        assert isinstance(trained.model, ContinualLearner)
        return trained.model.eval()

    def _forget(self) -> None:
        """An empty state; each class that comes takes a random free symbol."""
        self.state_, self.classes_, self._codes = None, np.array([]), {}
        self._free = np.random.default_rng(self.seed_).permutation(self.learner_.outputs).tolist()

    def _scaled(self, x: np.ndarray) -> np.ndarray:
        """[N, columns], standardised."""
        scaled: np.ndarray = (x - self.feature_mean_) / self.feature_scale_
        return scaled

    def _examples(self, x: np.ndarray) -> torch.Tensor:
        """[N, columns] -> what the learner reads: [N, 1, columns], standardised, in its precision, on its device."""
        examples = torch.from_numpy(self._scaled(x)).to(self.learner_.head.weight)
        if not bool(torch.isfinite(examples).all()):
            raise UserError(f"X has numbers too large for the learner's {examples.dtype}: scale its columns down")
        return examples.unsqueeze(1)

    def _logits(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self, "learner_")
        if self.state_ is None:
            raise UserError("nothing to answer from: call fit or partial_fit with labelled examples first")
        x = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            parts = [
                self.learner_.predict(part.transpose(0, 1), self.state_)[0] for part in self._examples(x).split(1000)
            ]
        codes = [self._codes[name] for name in self.classes_.tolist()]
        found: np.ndarray = torch.cat(parts)[:, codes].double().cpu().numpy()
        if not np.isfinite(found).all():
            raise UserError("answers became NaN or infinite: scale the columns of X down, as those of the stream")
        return found
