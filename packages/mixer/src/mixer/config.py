"""Settings of a MixER run, with the paper's own runs as presets (figures: ddrous/MixER, examples/*/main_mixer.py)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Data, experts, gate and training of MixER."""

    dataset: str = "odebench-4"
    """odebench-2, odebench-4, odebench-10A, odebench-10B, lotka-volterra, glycolytic, selkov (generated);
    synthetic-control, epilepsy2 (read from --data-dir or METAZOO_DATA); or the path of your own .npz or .csv."""
    data_dir: str | None = None
    """Folder of the file-based data sets."""
    every: int = 5
    """Keep every n-th sample of a trajectory."""
    crop: float = 1.0
    """Least share of a trajectory kept by the random crop that is drawn once per environment; 1 keeps all."""
    seed: int = 0
    """Seed of data, initialisation, contributors and gate."""

    expert: Literal["geps", "coda", "ncf", "shplrnn"] = "geps"
    """Meta-learner inside each expert; shplrnn maps sequences to sequences, the others are vector fields."""
    experts: int = 4
    """Number of experts M; 1 is the bare meta-learner."""
    context_size: int = 16
    """Size C of an environment's context vector, over all experts."""
    split_context: bool = True
    """Expert m sees only the m-th of M equal slices of the context; off, every expert sees all of it."""
    same_init: bool = True
    """All experts start from the same weights."""
    shift_context: bool = True
    """Add a learned scalar to the context."""
    width: int = 64
    """Width of the hidden layers (ncf, coda, geps)."""
    depth: int = 3
    """Linear layers of the root network (coda, geps); hidden layers of the main network (ncf)."""
    intermediate: int = 32
    """Output size of ncf's context and data networks."""
    context_depth: int = 1
    """Hidden layers of ncf's context network."""
    data_depth: int = 1
    """Hidden layers of ncf's data network."""
    hidden: int = 32
    """Hidden units of shplrnn."""
    alpha_min: float = 0.0
    """Least weight of shplrnn's own state against the observation (1: no teacher forcing)."""
    taylor_order: Literal[0, 1, 2] = 0
    """Order of contextual self-modulation in training (0: none)."""
    pool: int = 1
    """Neighbouring contexts that the expansion is taken around."""

    gate: Literal["least-squares", "gradient"] = "least-squares"
    """least-squares: the paper's K-means + least-squares gate; gradient: the naive mixture of experts, whose top-1
    expert is multiplied by its gate value and learned by gradient."""
    gate_every: int = 1
    """Inner steps between two updates of the gate."""
    kmeans_init: Literal["kmeans++", "paper"] = "kmeans++"
    """kmeans++ seeds by distance and re-seeds empty clusters; paper draws within ±1e-3 and gives up on them."""
    kmeans_iterations: int = 20
    """Most iterations of K-means per update."""
    kmeans_tolerance: float = 1e-4
    """K-means has converged when no centroid coordinate moves by more."""
    gate_noise: float = 1e-4
    """Standard deviation of the noise on the contexts in the least-squares fit."""

    contributors: int | None = 5
    """Environments in one gradient step [None: all]."""
    self_reweighting: bool = False
    """Weight the contributors by the softmax of their losses instead of equally."""
    context_l1: float = 0.0
    """Weight of the mean absolute context in the loss."""
    objective: Literal["trajectory", "derivative"] = "trajectory"
    """trajectory: solve from the first state and compare states; derivative: compare the vector field with finite
    differences of the data (gradient matching: fast, for dense clean data)."""
    solver: Literal["rk4", "dopri5"] = "rk4"
    """rk4: fixed steps on each environment's own times; dopri5: adaptive (extra "adaptive")."""
    substeps: int = 1
    """Steps of rk4 between two samples."""
    outer_steps: int = 100
    """Rounds of proximal alternating minimisation."""
    inner_steps: tuple[int, int] = (12, 12)
    """Steps on the contexts, then on the model, in each round."""
    proximal: tuple[float, float] = (10.0, 10.0)
    """Weight of the proximal term of the contexts and of the model."""
    lr: float = 1e-3
    """Learning rate of the experts (AdaBelief); times 0.4 at one and at two thirds of the training."""
    context_lr: float = 1e-3
    """Learning rate of the contexts (AdaBelief), constant."""
    shared_state: bool = False
    """All experts share one optimizer state."""
    accumulation: int = 1
    """Parts that a gradient step is cut into, to save memory."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the forward pass."""

    def __post_init__(self) -> None:
        at_least = {
            "every": 1, "experts": 1, "context_size": 1, "width": 1, "depth": 2, "intermediate": 1, "hidden": 1,
            "context_depth": 0, "data_depth": 0, "pool": 1, "gate_every": 1, "kmeans_iterations": 1, "substeps": 1,
            "outer_steps": 1, "accumulation": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        if self.contributors is not None and self.contributors < 1:
            raise UserError(f"--contributors is {self.contributors}: give 1 or more, or None for all")
        if min(self.inner_steps) < 0 or sum(self.inner_steps) < 1:
            raise UserError(f"--inner-steps is {self.inner_steps}: give two numbers, not both 0")
        if not 0 < self.crop <= 1:
            raise UserError(f"--crop is {self.crop}: give a share above 0 and at most 1")
        if self.split_context and self.context_size % self.experts:
            raise UserError(
                f"--context-size {self.context_size} cannot be split over --experts {self.experts}: make it a "
                "multiple, or use --no-split-context"
            )
        if self.expert == "shplrnn" and self.objective == "derivative":
            raise UserError("--objective derivative needs a vector field: use --expert ncf, coda or geps")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Test error, routing, and adaptation to new environments of a run."""

    adapt_steps: int = 500
    """Steps on the contexts of the new environments; 0 leaves adaptation out."""
    strategy: Literal["paper", "probe"] = "paper"
    """paper: contexts start at 0 under the learned gate; probe (ours): a context is fitted under each expert and the
    one with the least support loss is kept."""
    adapt_data: str | None = None
    """Your own new environments (.npz or .csv) [default: the adaptation split of the run's data set]."""
    plots: bool = True
    """Draw the gate over training, the contexts, and trajectories against the truth."""


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Write one of the paper's generated data sets as .npz or .csv."""

    dataset: str = "odebench-4"
    """odebench-2, odebench-4, odebench-10A, odebench-10B, lotka-volterra, glycolytic, selkov."""
    split: Literal["train", "test", "adapt-train", "adapt-test"] = "train"
    """Which initial states and parameters."""
    seed: int = 0
    """Seed of the initial states."""
    output: Path = Path("odebench-4.npz")
    """File to write; .npz (arrays t [E,T], X [E,I,T,d]) or .csv (columns env, trajectory, t, x1, …)."""


_PAPER = Config(
    dataset="odebench-10B", crop=0.6, experts=10, context_size=40, contributors=16, outer_steps=1500,
    kmeans_init="paper",
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(width=32, depth=4, gate_every=4, lr=3e-3, context_lr=3e-3),
    "paper": _PAPER,
    "paper-10A": replace(_PAPER, dataset="odebench-10A", contributors=5),
    "lotka-volterra": replace(
        _PAPER, dataset="lotka-volterra", every=1, crop=1.0, width=256, depth=4, experts=3, context_size=6,
        contributors=3, gate_every=5, context_l1=1e-3, self_reweighting=True, outer_steps=5000, substeps=5,
        context_depth=2, data_depth=2,
    ),
    "glycolytic": replace(
        _PAPER, dataset="glycolytic", every=1, crop=1.0, expert="coda", width=202, depth=3, experts=3, context_size=6,
        contributors=3, gate_every=5, outer_steps=500, shared_state=True,
    ),
    "selkov": replace(
        _PAPER, dataset="selkov", every=1, crop=1.0, expert="ncf", width=128, experts=3, context_size=768,
        contributors=7, gate_every=5, outer_steps=1000, taylor_order=2, pool=2, substeps=5, context_depth=2,
        data_depth=2, shared_state=True,
    ),
    "synthetic-control": replace(
        _PAPER, dataset="synthetic-control", every=1, crop=1.0, expert="shplrnn", hidden=32, experts=3, context_size=10,
        split_context=False, contributors=None, outer_steps=500, taylor_order=2, pool=20, alpha_min=0.0,
    ),
    "epilepsy2": replace(
        _PAPER, dataset="epilepsy2", every=1, crop=1.0, expert="shplrnn", hidden=16, experts=2, context_size=10,
        split_context=False, contributors=40, outer_steps=500, alpha_min=0.5, kmeans_tolerance=1e-3,
    ),
}  # fmt: skip
