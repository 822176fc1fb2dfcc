"""A classifier that learns from a stream of feature vectors without a gradient step, after scikit-learn's protocol."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
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


class MambaContinualClassifier(ClassifierMixin, BaseEstimator):
    """Classes that come one after the other, held in one recurrent state of fixed size.

    Two kinds of learning. *Meta-training*, once: :meth:`meta_fit` on a table of other classes' features (the more
    classes the better), or a learner that is given, or else, at the first fit, generated classes (normal means,
    ``spread`` within). *Learning*, by :meth:`partial_fit`: the examples are read once, in their order, into the state;
    no weights change and nothing is replayed. Columns are standardised by the table of
    :meth:`meta_fit`; without one they are taken as they are (generated classes have means of deviation 1).

    Args:
        learner: a meta-trained :class:`ContinualLearner` of classes, or a folder of its ``save_pretrained``; None for
            meta-training here.
        vocabulary: the most classes that a stream may have. tasks, shots: classes and examples of each in an episode
            of meta-training (streams like those are learned best). spread: of generated classes.
        width, blocks, steps, batch_size, lr, selectivity: as in :class:`Config`.
        random_state: seed of meta-training and of the classes' codes. progress: show a bar.

    Attributes:
        learner_: the meta-trained learner. state_: what it keeps of the stream. classes_: seen so far, sorted.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).normal(size=(60, 4)) + np.repeat(np.eye(4)[:3] * 5, 20, 0)
    >>> y = np.repeat([0, 1, 2], 20)
    >>> model = MambaContinualClassifier(steps=20, random_state=0)
    >>> for task in range(3):  # one class after the other
    ...     model = model.partial_fit(X[20 * task : 20 * task + 4], y[20 * task : 20 * task + 4])
    >>> model.predict(X[:2]).shape
    (2,)
    """

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
        x, labels = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(labels)
        names, classes = np.unique(labels, return_inverse=True)
        counts = np.bincount(classes)
        if len(names) < self.tasks or counts.min() <= self.shots:
            raise UserError(
                f"{len(names)} classes with {counts.min()} examples or more, but episodes of {self.tasks} tasks and "
                f"{self.shots} shots want {self.tasks} with {self.shots + 1}: give more, or lower tasks or shots"
            )
        self._remember_scale(x)
        config = self._config()
        setting = EpisodeConfig.from_config(config)
        episodes = ClassEpisodes(self._scaled(x)[:, 0], torch.from_numpy(classes.astype(np.int64)), setting)
        self._meta_train(config, Data("table", episodes, episodes))
        self._forget()
        return self

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Forget any stream and read this one, X [N, columns] and classes y [N], in its order.

        Raises:
            ValueError: as :meth:`partial_fit`.
        """
        if hasattr(self, "state_"):
            self._forget()
        return self.partial_fit(X, y)

    def partial_fit(self, X: ArrayLike, y: ArrayLike, classes: ArrayLike | None = None) -> Self:
        """Read further examples X [N, columns] of classes y [N] into the state; new classes may come at any time.

        Args:
            classes: all that will come, as scikit-learn's protocol allows; only their number is checked.

        Raises:
            ValueError: NaN, another number of columns, or more classes than the vocabulary has symbols.
        """
        fresh = not hasattr(self, "learner_")
        x, labels = validate_data(self, X, y, dtype=np.float64, reset=fresh)
        check_classification_targets(labels)
        known = self._codes if hasattr(self, "state_") else {}
        names = np.unique(labels)
        if fresh:
            # one class's columns say nothing about the others': without a table of meta_fit, columns stay as they are
            self.feature_mean_, self.feature_scale_ = np.zeros(x.shape[1]), np.ones(x.shape[1])
            self._prepare(x.shape[1])
        coming = {*known, *names.tolist(), *(np.unique(np.asarray(classes)).tolist() if classes is not None else [])}
        if len(coming) > self.learner_.outputs:
            raise UserError(
                f"{len(coming)} classes, but the learner has {self.learner_.outputs} symbols for them: meta-train "
                "with a larger vocabulary"
            )
        if not hasattr(self, "state_") or self.state_ is None:
            self._forget()
        for name in names.tolist():
            if name not in self._codes:
                self._codes[name] = int(self._free.pop())
        self.classes_ = np.unique(np.concatenate([self.classes_, names])) if len(self.classes_) else names
        codes = torch.tensor([[self._codes[name] for name in labels.tolist()]])
        with torch.no_grad():
            self.state_ = self.learner_.observe(self._scaled(x).transpose(0, 1), codes, self.state_)
        return self

    def decision_function(self, X: ArrayLike) -> np.ndarray:
        """Logits of the classes seen [N, classes] (of two: the second's minus the first's [N]); the state stays."""
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
        """Write learner, state and codes: safetensors and JSON. :meth:`load` goes on where the stream stopped."""
        check_is_fitted(self, "learner_")
        path = Path(folder)
        self.learner_.save_pretrained(path / "learner")
        tensors = {}
        if self.state_ is not None:
            for i, block in enumerate(self.state_.blocks):
                tensors |= {f"{i}.{j}": tensor.contiguous() for j, tensor in enumerate(block)}
        if tensors:
            save_file(tensors, path / "state.safetensors")
        else:
            (path / "state.safetensors").unlink(missing_ok=True)
        parameters = {k: v for k, v in self.get_params().items() if k not in ("random_state", "learner")}
        write_json(
            path / "estimator.json",
            {
                "parameters": {k: v.item() if isinstance(v, np.generic) else v for k, v in parameters.items()},
                "mean": self.feature_mean_.tolist(),
                "scale": self.feature_scale_.tolist(),
                "feature_names": [str(name) for name in getattr(self, "feature_names_in_", [])],
                "tokens": 0 if self.state_ is None else self.state_.tokens,
                "classes": self.classes_.tolist(),
                "dtype": self.classes_.dtype.str,
                "codes": [self._codes[name] for name in self.classes_.tolist()],
                "free": [int(code) for code in self._free],
            },
        )

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """What :meth:`save` wrote, ready to predict and to read on.

        Raises:
            UserError: a file is missing or damaged.
        """
        path = Path(folder)
        stored = read_json(path / "estimator.json")
        try:
            estimator = cls(**stored["parameters"])
            estimator.feature_mean_ = np.array(stored["mean"], dtype=np.float64)
            estimator.feature_scale_ = np.array(stored["scale"], dtype=np.float64)
            estimator.n_features_in_ = len(estimator.feature_mean_)
            if stored["feature_names"]:
                estimator.feature_names_in_ = np.array(stored["feature_names"], dtype=object)
            estimator.classes_ = np.array(stored["classes"], dtype=np.dtype(stored["dtype"]))
            estimator._codes = dict(zip(estimator.classes_.tolist(), stored["codes"], strict=True))
            estimator._free = list(stored["free"])
            tokens = stored["tokens"]
            estimator.learner_ = ContinualLearner.from_pretrained(path / "learner").eval()
            estimator.state_ = None
            if tokens:
                tensors = load_file(path / "state.safetensors")
                sizes = [
                    sum(name.startswith(f"{i}.") for name in tensors) for i in range(len(estimator.learner_.blocks))
                ]
                blocks = tuple(tuple(tensors[f"{i}.{j}"] for j in range(size)) for i, size in enumerate(sizes))
                estimator.state_ = LearnerState(blocks, tokens)
        except (KeyError, TypeError, ValueError, OSError, SafetensorError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged ({' '.join(str(error).split())}): save the estimator again") from error
        return estimator

    def _config(self) -> Config:
        state = self.random_state
        if isinstance(state, np.random.RandomState):
            state = int(state.randint(2**31 - 1))
        elif state is None:
            state = int(np.random.default_rng().integers(2**31 - 1))
        numbers = ("vocabulary", "tasks", "shots", "width", "blocks", "steps", "batch_size")
        return Config(
            seed=int(state),
            lr=self.lr,
            selectivity=self.selectivity,
            spread=self.spread,
            decay_every=max(1, int(0.7 * self.steps)),
            **{name: int(getattr(self, name)) for name in numbers},  # a grid of NumPy's gives its own integers
        )

    def _prepare(self, columns: int) -> None:
        """A learner where none was meta-trained by a table: the one given, or one of generated classes."""
        if self.learner is None:
            config = self._config()
            episodes = FeatureEpisodes(columns, self.spread, EpisodeConfig.from_config(config))
            self._meta_train(config, Data("features", episodes, episodes))
            return
        learner = self.learner
        if not isinstance(learner, ContinualLearner):
            if not (Path(learner) / "config.json").is_file():
                raise UserError(f"learner {str(learner)!r}: no folder of a learner's save_pretrained (RUN/model)")
            learner = ContinualLearner.from_pretrained(learner)
        if learner.kind != "class" or learner.shape != (columns,):
            raise UserError(
                f"the learner is for {learner.kind} of examples {learner.shape}, X has {columns} columns: give one "
                "that was meta-trained on classes of as many columns"
            )
        self.learner_ = learner.eval()

    def _meta_train(self, config: Config, source: Data) -> None:
        trained = MambaCLLearner(config, source, _OneCPU(), log_every=10**9)  # type: ignore[arg-type]
        for step in tqdm(range(trained.steps), desc="mambacl", disable=not self.progress):
            loss = trained.step(step)["loss"]
            if not bool(torch.isfinite(loss)):
                raise UserError(f"the loss became {loss.item()} at step {step + 1}: lower lr")
        assert isinstance(trained.model, ContinualLearner)
        self.learner_ = trained.model.eval()

    def _forget(self) -> None:
        """An empty state; each class that comes takes a random free symbol."""
        generator = np.random.default_rng(
            self.random_state if isinstance(self.random_state, (int, np.integer)) else None
        )
        self.state_: LearnerState | None = None
        self.classes_: np.ndarray = np.array([])
        self._codes: dict[Any, int] = {}
        self._free: list[int] = generator.permutation(self.learner_.outputs).tolist()

    def _remember_scale(self, x: np.ndarray) -> None:
        deviation = x.std(0)
        self.feature_mean_, self.feature_scale_ = x.mean(0), np.where(deviation > 0, deviation, 1.0)

    def _scaled(self, x: np.ndarray) -> torch.Tensor:
        """[N, columns] -> [N, 1, columns], standardised."""
        scaled = (x - self.feature_mean_) / self.feature_scale_
        return torch.from_numpy(scaled.astype(np.float32)).unsqueeze(1)

    def _logits(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self, "learner_")
        if self.state_ is None:
            raise UserError("nothing to answer from: call fit or partial_fit with labelled examples first")
        x = validate_data(self, X, reset=False, dtype=np.float64)
        with torch.no_grad():
            parts = [
                self.learner_.predict(part.transpose(0, 1), self.state_)[0] for part in self._scaled(x).split(1000)
            ]
        codes = [self._codes[name] for name in self.classes_.tolist()]
        found: np.ndarray = torch.cat(parts)[:, codes].double().numpy()
        return found
