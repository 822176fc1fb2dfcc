"""MetaCluster on somebody's own table, after scikit-learn's estimator protocol."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from metazoo.errors import UserError
from metazoo.runfolder import read_json, write_json
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, validate_data
from tqdm import tqdm

from metacluster.config import Config
from metacluster.data import Dataset
from metacluster.evaluate import predict
from metacluster.packing import CompressionReport, compression_report, load_packed, save_packed
from metacluster.train import MetaClusterLearner, residual_of


class _OneCPU:
    """What the learner asks of an Accelerator. The real one would take over the process's earlier device and
    precision, and refuse another."""

    device = torch.device("cpu")
    num_processes, process_index = 1, 0

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()


class _MetaCluster(BaseEstimator, ABC):
    """What classifier and regressor share: parameters, scaling, the three stages, files."""

    def __init__(
        self,
        hidden: tuple[int, ...] = (64,),
        basis: str = "rbf",
        clusters: int = 16,
        embedding_size: int = 1,
        meta_hidden: int = 32,
        epochs: int = 25,
        finetune_epochs: int = 4,
        batch_size: int = 128,
        lr: float = 1e-2,
        embedding_lr: float = 1e-1,
        finetune_lr: float = 3e-3,
        random_state: int | np.random.RandomState | None = None,
        progress: bool = False,
    ) -> None:
        self.hidden = hidden
        self.basis = basis
        self.clusters = clusters
        self.embedding_size = embedding_size
        self.meta_hidden = meta_hidden
        self.epochs = epochs
        self.finetune_epochs = finetune_epochs
        self.batch_size = batch_size
        self.lr = lr
        self.embedding_lr = embedding_lr
        self.finetune_lr = finetune_lr
        self.random_state = random_state
        self.progress = progress

    def _train(self, x: np.ndarray, y: torch.Tensor, classes: tuple[str, ...] | None) -> None:
        self.feature_low_, self.feature_high_ = x.min(0), x.max(0)
        inputs = self._scaled(x)
        state = self.random_state
        if isinstance(state, np.random.RandomState):
            state = int(state.randint(2**31 - 1))
        elif state is None:
            state = int(np.random.default_rng().integers(2**31 - 1))
        numbers = ("clusters", "embedding_size", "meta_hidden", "epochs", "finetune_epochs", "batch_size")
        config = Config(
            dataset="arrays.npz",
            seed=int(state),
            hidden=tuple(map(int, self.hidden)),
            basis=self.basis,  # type: ignore[arg-type]
            lr=self.lr,
            embedding_lr=self.embedding_lr,
            finetune_lr=self.finetune_lr,
            **{name: int(getattr(self, name)) for name in numbers},  # a grid of NumPy's gives its own integers
        )
        dataset = Dataset("arrays", inputs, y, inputs[:0], y[:0], classes, (x.shape[1],))
        learner = MetaClusterLearner(config, dataset, _OneCPU())  # type: ignore[arg-type]
        for step in tqdm(range(learner.steps), desc="metacluster", disable=not self.progress):
            loss = learner.step(step)["loss"]
            if not bool(torch.isfinite(loss)):
                raise UserError(f"the loss became {loss.item()} at step {step + 1}: lower lr or embedding_lr")
        if config.finetune_epochs == 0:
            learner.cluster()
        assert learner.clustered is not None
        self.uncompressed_, self.network_ = learner.model.eval(), learner.clustered.eval()
        self.residual_ = residual_of(learner.model, learner.clustered)
        self.compression_report_: CompressionReport = compression_report(learner.clustered)

    def _scaled(self, x: np.ndarray) -> torch.Tensor:
        """Columns to [−1, 1] by the least and greatest value in training; constant columns to 0."""
        span = self.feature_high_ - self.feature_low_
        safe = np.where(span > 0, span, 1.0)
        scaled = np.where(span > 0, 2 * (x - self.feature_low_) / safe - 1, 0.0)
        return torch.from_numpy(scaled.astype(np.float32))

    def _outputs(self, X: ArrayLike) -> np.ndarray:
        check_is_fitted(self, "network_")
        x = validate_data(self, X, reset=False, dtype=np.float64)
        network = copy.deepcopy(self.network_).double()  # so that a prediction does not depend on its neighbours
        found: np.ndarray = predict(network, self._scaled(x).double()).numpy()
        return found

    @abstractmethod
    def _remembered(self) -> dict[str, Any]:
        """What prediction needs besides the network, for JSON."""

    @abstractmethod
    def _recall(self, stored: dict[str, Any]) -> None:
        """Take it back."""

    def save(self, folder: Path | str) -> Path:
        """Write the compressed network and what prediction needs beside it (safetensors and JSON)."""
        check_is_fitted(self, "network_")
        path = save_packed(self.network_, folder)
        write_json(
            Path(folder) / "estimator.json",
            {
                "estimator": type(self).__name__,
                "parameters": {k: _plain(v) for k, v in self.get_params().items() if k != "random_state"},
                "feature_low": self.feature_low_.tolist(),
                "feature_high": self.feature_high_.tolist(),
                "feature_names": [str(name) for name in getattr(self, "feature_names_in_", [])],
                "residual": self.residual_,
                **self._remembered(),
            },
        )
        return path

    @classmethod
    def load(cls, folder: Path | str) -> Self:
        """A fitted estimator from a folder of :meth:`save`, for prediction: it has no ``uncompressed_``.

        Raises:
            UserError: a file is missing or damaged, or of another estimator.
        """
        path = Path(folder) / "estimator.json"
        stored = read_json(path)
        try:
            if stored["estimator"] != cls.__name__:
                raise UserError(f"{path} is of a {stored['estimator']}: load it with that class")
            parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in stored["parameters"].items()}
            estimator = cls(**parameters)
            estimator.feature_low_ = np.array(stored["feature_low"], dtype=np.float64)
            estimator.feature_high_ = np.array(stored["feature_high"], dtype=np.float64)
            estimator.n_features_in_ = len(estimator.feature_low_)
            if stored["feature_names"]:
                estimator.feature_names_in_ = np.array(stored["feature_names"], dtype=object)
            estimator.residual_ = dict(stored["residual"])
            estimator._recall(stored)
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path} is damaged ({error!r}): save the estimator again") from error
        estimator.network_ = load_packed(folder)
        estimator.compression_report_ = compression_report(estimator.network_)
        return estimator


def _plain(value: Any) -> Any:
    """What JSON can hold: NumPy's numbers and arrays as Python's."""
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    return list(map(_plain, value)) if isinstance(value, tuple) else value


class MetaClusterClassifier(ClassifierMixin, _MetaCluster):
    """A KAN classifier that ends as a codebook and a few bits an edge.

    Args:
        hidden: widths of the hidden layers. basis: its name (bases.BASES). clusters: centroids K of a layer, at most
            its number of edges. embedding_size, meta_hidden: d_emb and d_hidden of the meta-learner. epochs,
            finetune_epochs: of stages 1 and 3. batch_size, lr, embedding_lr, finetune_lr: as in :class:`Config`.
        random_state: seed. progress: show a bar.

    Columns are scaled to [−1, 1] by their least and greatest value in training. With 8 columns or more the inputs of a
    layer are normalised (LayerNorm without gain) before the basis.

    Attributes:
        network_: the clustered network; uncompressed_: the one before K-means; classes_; residual_: within-cluster /
            total variance by layer; compression_report_: where the bits are.

    >>> from sklearn.datasets import load_digits
    >>> X, y = load_digits(return_X_y=True)
    >>> model = MetaClusterClassifier(epochs=2, finetune_epochs=1, random_state=0).fit(X[:500], y[:500])
    >>> model.predict_proba(X[500:502]).shape
    (2, 10)
    """

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on X [N, columns] and classes y [N].

        Raises:
            ValueError: NaN, one class only, more clusters than edges (the message names what and how to mend it).
        """
        x, labels = validate_data(self, X, y, dtype=np.float64, ensure_min_samples=2)
        check_classification_targets(labels)
        self.classes_, codes = np.unique(labels, return_inverse=True)
        if len(self.classes_) < 2:
            raise UserError(f"one class only ({self.classes_[0]}): a classifier needs samples of at least 2 classes")
        self._train(x, torch.from_numpy(codes.astype(np.int64)), tuple(map(str, self.classes_)))
        return self

    def predict_proba(self, X: ArrayLike) -> np.ndarray:
        """Probability of each class [N, classes]."""
        logits = self._outputs(X)
        powers = np.exp(logits - logits.max(1, keepdims=True))
        found: np.ndarray = powers / powers.sum(1, keepdims=True)
        return found

    def predict(self, X: ArrayLike) -> np.ndarray:
        """The likeliest class [N]."""
        chosen = self._outputs(X).argmax(1)
        found: np.ndarray = self.classes_[chosen]
        return found

    def _remembered(self) -> dict[str, Any]:
        return {"classes": self.classes_.tolist(), "dtype": self.classes_.dtype.str}

    def _recall(self, stored: dict[str, Any]) -> None:
        self.classes_ = np.array(stored["classes"], dtype=np.dtype(stored["dtype"]))


class MetaClusterRegressor(RegressorMixin, _MetaCluster):
    """A KAN regressor that ends as a codebook and a few bits an edge; parameters as :class:`MetaClusterClassifier`.

    The target is standardised in training; predictions have its unit.

    >>> import numpy as np
    >>> X = np.random.default_rng(0).uniform(-1, 1, (200, 2))
    >>> MetaClusterRegressor(epochs=2, random_state=0).fit(X, X.sum(1)).predict(X[:3]).shape
    (3,)
    """

    def __init__(
        self,
        hidden: tuple[int, ...] = (64,),
        basis: str = "rbf",
        clusters: int = 16,
        embedding_size: int = 1,
        meta_hidden: int = 32,
        epochs: int = 100,
        finetune_epochs: int = 10,
        batch_size: int = 128,
        lr: float = 1e-3,
        embedding_lr: float = 1e-2,
        finetune_lr: float = 3e-3,
        random_state: int | np.random.RandomState | None = None,
        progress: bool = False,
    ) -> None:
        super().__init__(
            hidden, basis, clusters, embedding_size, meta_hidden, epochs, finetune_epochs, batch_size, lr, embedding_lr,
            finetune_lr, random_state, progress,
        )  # fmt: skip

    def fit(self, X: ArrayLike, y: ArrayLike) -> Self:
        """Train on X [N, columns] and targets y [N].

        Raises:
            ValueError: NaN, or more clusters than edges (the message names what and how to mend it).
        """
        x, targets = validate_data(self, X, y, dtype=np.float64, y_numeric=True, ensure_min_samples=2)
        self.target_mean_, self.target_std_ = float(targets.mean()), float(targets.std()) or 1.0
        standard = (targets - self.target_mean_) / self.target_std_
        self._train(x, torch.from_numpy(standard.astype(np.float32)).unsqueeze(1), None)
        return self

    def predict(self, X: ArrayLike) -> np.ndarray:
        """Targets [N], in the unit of y."""
        found: np.ndarray = self._outputs(X)[:, 0] * self.target_std_ + self.target_mean_
        return found

    def _remembered(self) -> dict[str, Any]:
        return {"target_mean": self.target_mean_, "target_std": self.target_std_}

    def _recall(self, stored: dict[str, Any]) -> None:
        self.target_mean_, self.target_std_ = float(stored["target_mean"]), float(stored["target_std"])
