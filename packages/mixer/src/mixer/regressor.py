"""MixER on somebody's own trajectories, after scikit-learn's estimator protocol."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from metazoo.errors import UserError
from metazoo.options import RunOptions
from numpy.typing import ArrayLike
from sklearn.base import BaseEstimator
from sklearn.utils.validation import check_is_fitted

from mixer import data
from mixer.config import Config
from mixer.evaluate import adapt
from mixer.train import train


class MixERRegressor(BaseEstimator):
    """Reconstruct dynamical systems from trajectories of many environments; group and adapt them.

    Parameters are those of :class:`mixer.Config` that a user changes; the rest keeps its default.

    Args:
        experts: number of experts M, at most the number of environments.
        context_size: context size c of each expert.
        expert: "geps", "coda" or "ncf".
        width, depth: of the expert networks.
        objective: "trajectory" or "derivative" (faster, for dense clean data).
        outer_steps: rounds of 12 + 12 steps.
        contributors: environments in one step; None for all.
        lr: learning rate of experts and contexts.
        substeps: RK4 steps between two samples.
        output_dir: run folder to keep; None trains in a temporary one.
        seed: of initialisation, contributors and gate.

    Attributes:
        contexts_: [E, M·c]; assignments_: expert of each environment [E]; model_: the MixER; loss_: losses logged.

    >>> import numpy as np
    >>> t = np.linspace(0, 3, 31)
    >>> rates = [0.5, 0.6, 2.0, 2.2]                        # two slow and two fast decays
    >>> X = np.stack([[x0 * np.exp(-r * t)[:, None] for x0 in (1.0, 2.0)] for r in rates])   # [4, 2, 31, 1]
    >>> model = MixERRegressor(experts=2, context_size=2, width=16, objective="derivative", outer_steps=10)
    >>> model.fit(X, t).predict(0, np.array([[1.5]]), t).shape
    (1, 31, 1)
    """

    def __init__(
        self,
        experts: int = 4,
        context_size: int = 4,
        expert: Literal["geps", "coda", "ncf"] = "geps",
        width: int = 32,
        depth: int = 4,
        objective: Literal["trajectory", "derivative"] = "trajectory",
        outer_steps: int = 100,
        contributors: int | None = None,
        lr: float = 3e-3,
        substeps: int = 1,
        output_dir: str | Path | None = None,
        seed: int = 0,
    ) -> None:
        self.experts = experts
        self.context_size = context_size
        self.expert = expert
        self.width = width
        self.depth = depth
        self.objective = objective
        self.outer_steps = outer_steps
        self.contributors = contributors
        self.lr = lr
        self.substeps = substeps
        self.output_dir = output_dir
        self.seed = seed

    def fit(self, X: ArrayLike, t: ArrayLike) -> MixERRegressor:
        """Train on trajectories X [E, I, T, d] at times t [T] or [E, T].

        Raises:
            UserError: NaN, unsorted times, ragged environments, more experts than environments.
        """
        environments = data.from_arrays(X, t)
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(self.output_dir) if self.output_dir is not None else Path(scratch) / "run"
            file = Path(scratch) / "own.npz"
            np.savez(file, t=environments.t, X=environments.x)
            self.config_ = self._config(str(file))
            run = train(self.config_, RunOptions(output_dir=folder, log_every=12, checkpoint_every=1_000_000))
        self.model_ = run.model
        self.contexts_ = run.contexts.cpu().numpy()
        self.assignments_ = run.model.route(run.contexts).cpu().numpy()
        self.loss_ = np.array([row["loss"] for row in run.metrics])
        self.n_features_in_ = environments.x.shape[-1]
        return self

    def predict(self, env: int, x0: ArrayLike, t: ArrayLike) -> np.ndarray:
        """Trajectories [I, T, d] of environment ``env`` (index of a fitted one) from x0 [I, d] at times t [T].

        Raises:
            UserError: no such environment, or states of another size.
        """
        check_is_fitted(self)
        if not -len(self.contexts_) <= env < len(self.contexts_):
            raise UserError(f"environment {env}: the model was fitted on {len(self.contexts_)}")
        return self._solve(self.contexts_[env], x0, t, expert=None)

    def adapt(
        self, X: ArrayLike, t: ArrayLike, *, steps: int = 500, strategy: Literal["paper", "probe"] = "probe"
    ) -> AdaptedEnvironments:
        """Fit contexts for new environments from few trajectories X [E, I, T, d]; experts and gate stay.

        Raises:
            UserError: bad data, or another number of states.
            sklearn.exceptions.NotFittedError: before fit.
        """
        check_is_fitted(self)
        found = adapt(self.model_, data.from_arrays(X, t), self.config_, steps=steps, strategy=strategy)
        return AdaptedEnvironments(
            self, found.contexts.cpu().numpy(), found.experts.cpu().numpy(), found.losses.cpu().numpy()
        )

    def score(self, X: ArrayLike, t: ArrayLike) -> float:
        """R² of the predicted trajectories of the fitted environments, from the first states of X [E, I, T, d]."""
        check_is_fitted(self)
        environments = data.from_arrays(X, t)
        predicted = np.stack(
            [self.predict(e, environments.x[e, :, 0], environments.t[e]) for e in range(len(environments))]
        )
        spread = environments.x - environments.x.mean((1, 2), keepdims=True)
        return float(1 - np.square(predicted - environments.x).sum() / np.square(spread).sum())

    def _config(self, dataset: str) -> Config:
        return Config(
            dataset=dataset, every=1, seed=self.seed, expert=self.expert, experts=self.experts,
            context_size=self.experts * self.context_size, width=self.width, depth=self.depth, gate_every=4,
            contributors=self.contributors, objective=self.objective, substeps=self.substeps,
            outer_steps=self.outer_steps, lr=self.lr, context_lr=self.lr,
        )  # fmt: skip

    def _solve(self, context: np.ndarray, x0: ArrayLike, t: ArrayLike, expert: int | None) -> np.ndarray:
        device = self.model_.gate_weight.device
        states = torch.as_tensor(np.asarray(x0, dtype=np.float64), dtype=torch.float32, device=device)
        times = torch.as_tensor(np.asarray(t, dtype=np.float64), dtype=torch.float32, device=device)
        if states.ndim != 2 or states.shape[1] != self.n_features_in_:
            raise UserError(f"x0 has shape {tuple(states.shape)}: give [I, {self.n_features_in_}]")
        if times.ndim != 1 or len(times) < 2 or not bool((times.diff() > 0).all()):
            raise UserError("t: give at least two increasing times")
        chosen = None if expert is None else torch.tensor([expert], device=device)
        ξ = torch.as_tensor(context, device=device)[None]
        with torch.no_grad():
            return self.model_(times[None], states[None], ξ, expert=chosen, substeps=self.substeps)[0].cpu().numpy()

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.two_d_array = False  # X is [E, I, T, d]
        tags.input_tags.three_d_array = False
        tags.target_tags.required = True
        return tags


class AdaptedEnvironments:
    """New environments of a fitted regressor: ``contexts_`` [E, C], ``assignments_`` [E], ``losses_`` [E]."""

    def __init__(
        self, regressor: MixERRegressor, contexts: np.ndarray, assignments: np.ndarray, losses: np.ndarray
    ) -> None:
        self._regressor = regressor
        self.contexts_, self.assignments_, self.losses_ = contexts, assignments, losses

    def predict(self, env: int, x0: ArrayLike, t: ArrayLike) -> np.ndarray:
        """Trajectories [I, T, d] of new environment ``env`` from x0 [I, d] at times t [T]."""
        if not -len(self.contexts_) <= env < len(self.contexts_):
            raise UserError(f"environment {env}: {len(self.contexts_)} were adapted")
        return self._regressor._solve(self.contexts_[env], x0, t, expert=int(self.assignments_[env]))
