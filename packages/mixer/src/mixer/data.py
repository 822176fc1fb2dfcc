"""Data of MixER: the paper's generators, loaders of the released files, and the user's own trajectories.

Shapes: E environments, I trajectories (initial conditions) per environment, T times, d state size.
Everything ends in an `Environments`; nothing here is random but for the seed or generator given.
"""

from __future__ import annotations

import csv
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
from metazoo.data import find, load_npz
from metazoo.errors import UserError
from numpy.typing import ArrayLike, NDArray
from scipy.integrate import solve_ivp

from mixer.config import GenerateOptions

Array = NDArray[np.float64]
Labels = NDArray[np.int64]
Field = Callable[..., Sequence[Array]]  # rhs(x, *parameters) -> the d components of dx/dt

SPLITS = ("train", "test", "adapt-train", "adapt-test")


@dataclass(frozen=True, eq=False)
class Environments:
    """Trajectories of E environments, each on its own time grid."""

    t: Array
    """times [E, T], increasing along T"""
    x: Array
    """states [E, I, T, d]"""
    family: Labels | None
    """ground-truth family of each environment [E], for evaluation only; None where unknown"""
    parameters: tuple[Mapping[str, float], ...]
    """the equation's parameters per environment; empty mappings where unknown"""
    names: tuple[str, ...]
    """one name per environment, for messages and plots"""
    labels: Labels | None = None
    """classes [E] of a classification set; None elsewhere"""

    def __len__(self) -> int:
        return len(self.t)

    def check(self) -> Self:
        """Return self; every loader calls this.

        Raises:
            UserError: shapes that do not agree, NaN or infinity (names environment, trajectory and time
                index), times that do not increase.
        """
        t, x = self.t, self.x
        if x.ndim != 4 or t.ndim != 2 or x.shape[0] != t.shape[0] or x.shape[2] != t.shape[1]:
            raise UserError(
                f"states {list(x.shape)} and times {list(t.shape)} do not fit: "
                "give x [environments, trajectories, times, state] and t [times] or [environments, times]"
            )
        if 0 in x.shape or t.shape[1] < 2:
            raise UserError(f"states {list(x.shape)}: give at least one of each, and two times")
        for what, values in (("names", self.names), ("parameters", self.parameters)):
            if len(values) != len(t):
                raise UserError(f"{len(values)} {what} for {len(t)} environments: give one per environment")
        for what, classes in (("families", self.family), ("labels", self.labels)):
            if classes is not None and classes.shape != (len(t),):
                raise UserError(f"{what} {list(classes.shape)} for {len(t)} environments: give one per environment")
        if not np.isfinite(t).all():
            e, k = np.argwhere(~np.isfinite(t))[0]
            raise UserError(f"environment {e} ({self.names[e]!r}), time index {k}: time is {t[e, k]}: mend or drop it")
        if not np.isfinite(x).all():
            e, i, k, j = np.argwhere(~np.isfinite(x))[0]
            raise UserError(
                f"environment {e} ({self.names[e]!r}), trajectory {i}, time index {k}: "
                f"state {j} is {x[e, i, k, j]}: mend or drop it"
            )
        if not (np.diff(t, axis=1) > 0).all():
            e, k = np.argwhere(np.diff(t, axis=1) <= 0)[0]
            raise UserError(
                f"environment {e} ({self.names[e]!r}): time {t[e, k + 1]} at index {k + 1} does not follow "
                f"{t[e, k]}: sort the times and drop repeated ones"
            )
        return self

    def subsample(self, step: int) -> Self:
        """Every `step`-th time from the first (step 5 leaves ODEBench's 100 times at 20)."""
        if step < 1 or (self.t.shape[1] - 1) // step < 1:
            raise UserError(f"step {step} leaves fewer than 2 of {self.t.shape[1]} times: give a smaller one, from 1")
        return replace(self, t=self.t[:, ::step], x=self.x[:, :, ::step])

    def select(self, indices: ArrayLike) -> Self:
        """Only these environments, in this order; `indices` are positions or a mask [E]."""
        rows = np.arange(len(self))[np.asarray(indices)]
        return replace(
            self,
            t=self.t[rows],
            x=self.x[rows],
            family=None if self.family is None else self.family[rows],
            parameters=tuple(self.parameters[r] for r in rows),
            names=tuple(self.names[r] for r in rows),
            labels=None if self.labels is None else self.labels[rows],
        )

    def crop(self, proportion: float, rng: np.random.Generator) -> Self:
        """A random window of `proportion` to all of the times per environment, stretched back to T points.

        The window is drawn once per environment and shared by its trajectories; states are interpolated
        linearly at T equidistant times of the window (mixer/dataloader.py, ODEBenchDataset: .6 in the
        ODEBench runs, after the subsampling). The official window never reaches the last sample (both draws
        exclude their upper end); here the whole trajectory can be drawn, and proportion 1 changes nothing on
        an equidistant grid.

        Raises:
            UserError: a proportion above 1, or one that leaves fewer than 2 times.
        """
        T = self.t.shape[1]
        # The small term keeps products such as 0.29 · 100 = 28.999… whole.
        least = math.floor(proportion * T + 1e-9) if 0 < proportion <= 1 else 0
        if least < 2:
            raise UserError(f"crop {proportion} of {T} times: give a proportion up to 1 that leaves 2 or more")
        t, x = np.empty_like(self.t), np.empty_like(self.x)
        for e in range(len(self)):
            start = int(rng.integers(0, T - least + 1))
            stop = int(rng.integers(start + least, T + 1))
            old = self.t[e, start:stop]
            t[e] = np.linspace(old[0], old[-1], T)
            for i in range(x.shape[1]):
                for j in range(x.shape[3]):
                    x[e, i, :, j] = np.interp(t[e], old, self.x[e, i, start:stop, j])
        return replace(self, t=t, x=x)


def _integrate(rhs: Field, x0: Array, parameters: Sequence[Mapping[str, float]], t: Array) -> Array:
    """Trajectories [E, I, T, d] of dx/dt = rhs(x, *parameters) from x0 [E, I, d] at times t [T].

    scipy's solve_ivp, DOP853, rtol 1e-10, atol 1e-12, with all environments and trajectories as one state.
    The error norm is a mean over that state; the tolerance is tight enough for that not to matter. The
    released files come from RK45 at scipy's default rtol 1e-3 and are off the true solution by up to 13 %
    of a trajectory's maximum (shear flow; the median over points is 0.1 %).
    """
    E, I, d = x0.shape
    values = [np.array([p[key] for p in parameters])[:, None] for key in parameters[0]]

    def field(_: float, y: Array) -> Array:
        return np.stack(rhs(y.reshape(d, E, I), *values)).reshape(-1)

    start = np.moveaxis(x0, -1, 0).reshape(-1)
    solution = solve_ivp(field, (t[0], t[-1]), start, t_eval=t, method="DOP853", rtol=1e-10, atol=1e-12)
    if not solution.success:
        raise RuntimeError(f"{rhs.__name__}: the solver stopped: {solution.message}")
    return np.moveaxis(solution.y.reshape(d, E, I, len(t)), 0, -1)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise UserError(f"split {split!r}: unknown: choose from {', '.join(SPLITS)}")


def _rng(seed: int, split: str, *path: int) -> np.random.Generator:
    """Independent stream per split (and family): no initial state is drawn twice across splits."""
    if seed < 0:
        raise UserError(f"seed {seed}: negative: give 0 or more")
    return np.random.default_rng([seed, SPLITS.index(split), *path])


def _generated(
    rhs: Field,
    x0: Array,
    grid: Sequence[Mapping[str, float]],
    t: Array,
    names: Sequence[str],
    family: Labels | None,
) -> Environments:
    """Environments of one system on a parameter grid, all from the same initial states x0 [I, d]."""
    x = _integrate(rhs, np.broadcast_to(x0, (len(grid), *x0.shape)), grid, t)
    times = np.tile(t, (len(grid), 1))
    return Environments(times, x, family, tuple(grid), tuple(names)).check()


def _describe(parameters: Mapping[str, float]) -> str:
    return " ".join(f"{key}={value:g}" for key, value in parameters.items())


def harmonic(x: Array, c0: Array) -> Sequence[Array]:
    """x'' = -c0 x."""
    return x[1], -c0 * x[0]


def damped_harmonic(x: Array, c0: Array, c1: Array) -> Sequence[Array]:
    """x'' = -c0 x - c1 x'."""
    return x[1], -c0 * x[0] - c1 * x[1]


def pendulum(x: Array, c0: Array) -> Sequence[Array]:
    """x'' = -c0 sin x."""
    return x[1], -c0 * np.sin(x[0])


def double_well(x: Array, c0: Array) -> Sequence[Array]:
    """x'' = -c0 x' - x³ + x."""
    return x[1], -c0 * x[1] - x[0] ** 3 + x[0]


def bead_on_hoop(x: Array, c0: Array) -> Sequence[Array]:
    """x'' = (cos x - c0) sin x."""
    return x[1], (np.cos(x[0]) - c0) * np.sin(x[0])


def shear_flow(x: Array, c0: Array) -> Sequence[Array]:
    """Angles of a body in a shear flow; the field has a pole where the second one is 0."""
    theta, phi = x
    return np.cos(theta) / np.tan(phi), np.sin(theta) * (c0 * np.sin(phi) ** 2 + np.cos(phi) ** 2)


def van_der_pol(x: Array, c0: Array) -> Sequence[Array]:
    """x'' = -c0 x' (x² - 1) - x; ids 37 and 40 ("Duffing" in the catalogue) are both of this form."""
    return x[1], c0 * x[1] * (1 - x[0] ** 2) - x[0]


def van_der_pol_lienard(x: Array, c0: Array) -> Sequence[Array]:
    """Van der Pol in Liénard's variables: x' = c0 (y + x - x³/3), y' = -x / c0."""
    return c0 * (x[1] + x[0] - x[0] ** 3 / 3), -x[0] / c0


def glycolysis_2d(x: Array, c0: Array, c1: Array) -> Sequence[Array]:
    """x' = c0 y + x² y - x, y' = c1 - c0 x - x² y. Note c0 x in y', where Sel'kov's equation has c0 y."""
    return c0 * x[1] + x[0] ** 2 * x[1] - x[0], c1 - c0 * x[0] - x[0] ** 2 * x[1]


@dataclass(frozen=True)
class System:
    """One ODE of the catalogue: its field, reference parameters, two reference initial states and horizon."""

    id: int
    name: str
    field: Field
    parameters: Mapping[str, float]
    initial: tuple[tuple[float, ...], tuple[float, ...]]
    horizon: float


# The ten two-dimensional systems, with the figures of examples/ode-bench/data_gen/ode_definitions_2D.json.
CATALOGUE = (
    System(24, "harmonic oscillator", harmonic, {"c0": 2.1}, ((0.4, -0.03), (0.0, 0.2)), 10),
    System(25, "damped oscillator", damped_harmonic, {"c0": 4.5, "c1": 0.43}, ((0.12, 0.043), (0.0, -0.3)), 8),
    System(28, "pendulum", pendulum, {"c0": 0.9}, ((-1.9, 0.0), (0.3, 0.8)), 15),
    System(32, "damped double well", double_well, {"c0": 0.18}, ((-1.8, -1.8), (-2.8, 1.0)), 5),
    System(34, "bead on a hoop", bead_on_hoop, {"c0": 0.93}, ((2.1, 0.0), (-1.2, -0.2)), 20),
    System(35, "shear flow", shear_flow, {"c0": 4.2}, ((1.13, -0.3), (0.7, -1.7)), 5),
    System(37, "van der Pol", van_der_pol, {"c0": 0.43}, ((2.2, 0.0), (0.1, 3.2)), 15),
    System(38, "van der Pol (Liénard)", van_der_pol_lienard, {"c0": 3.37}, ((0.7, 0.0), (-1.1, -0.7)), 15),
    System(39, "glycolytic (2-D)", glycolysis_2d, {"c0": 2.4, "c1": 0.07}, ((0.4, 0.31), (0.2, -0.7)), 4),
    System(40, "Duffing", van_der_pol, {"c0": 0.886}, ((0.63, -0.03), (0.2, 0.2)), 10),
)
_BY_ID = {system.id: system for system in CATALOGUE}

# The four families of the released files, with the figures of the definitions beside these files
# (examples/ode-bench/data/ode_definitions_2D.json), not those of the catalogue.
RELEASED = (
    replace(_BY_ID[24], initial=((0.5, 0.5), (0.75, 0.75)), horizon=6),
    replace(_BY_ID[35], parameters={"c0": 2.0}, initial=((0.3, -0.3), (0.5, -0.5)), horizon=6),
    replace(_BY_ID[32], parameters={"c0": 0.1}, initial=((-0.5, -0.5), (-0.7, -0.7)), horizon=8),
    replace(_BY_ID[40], initial=((0.4, 0.0), (0.3, 0.1)), horizon=8),
)


@dataclass(frozen=True)
class _Variant:
    systems: tuple[System, ...]
    environments: int  # training environments per family
    spread: float  # training parameters lie within ± spread of the reference


_ODEBENCH = {
    "odebench-2": _Variant((_BY_ID[24], _BY_ID[40]), 5, 0.1),
    "odebench-4": _Variant(RELEASED, 5, 0.2),
    "odebench-10A": _Variant(CATALOGUE, 5, 0.1),
    "odebench-10B": _Variant(CATALOGUE, 16, 0.1),
}


def training_grid(reference: Mapping[str, float], count: int, spread: float) -> list[dict[str, float]]:
    """First `count` points of a grid within ± spread of the reference parameters.

    ceil(count^(1/p)) equidistant values per parameter, rounded to two digits, last parameter fastest
    (ode_generation.py). The rounding makes equal environments where the reference is small: with 16 points,
    system 32 (c0 = 0.18) has 5 distinct ones, and system 39 (c1 = 0.07) has 12.
    """
    per_axis = math.ceil(round(count ** (1 / len(reference)), 9))
    axes = [np.round(np.linspace((1 - spread) * v, (1 + spread) * v, per_axis), 2) for v in reference.values()]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(axes))
    return [dict(zip(reference, map(float, point), strict=True)) for point in points[:count]]


def adaptation_grid(reference: Mapping[str, float], count: int) -> list[dict[str, float]]:
    """All reference parameters scaled together by `count` factors from .8 to 1.2, rounded to two digits."""
    scalings = np.linspace(0.8, 1.2, count)
    return [{key: float(np.round(value * s, 2)) for key, value in reference.items()} for s in scalings]


def initial_states(reference: Sequence[Sequence[float]], count: int, rng: np.random.Generator) -> Array:
    """`count` states [I, d]: first reference state, uniform draws in the box of both, second one last.

    With count 1 it is the first reference state whatever the generator, as in ode_generation.py.
    """
    first, last = np.asarray(reference, dtype=np.float64)
    low, high = np.minimum(first, last) + 1e-3, np.maximum(first, last) - 1e-3
    inner = rng.uniform(low, high, size=(max(count - 2, 0), len(first)))
    return np.concatenate([first[None], inner, last[None]])[:count]


def odebench(variant: str, split: str, seed: int) -> Environments:
    """ODEBench-2, -4, -10A or -10B: families of 2-D ODEs, 100 times on [0, horizon) (ode_generation.py).

    Families × training environments: odebench-2 2×5, odebench-4 4×5, odebench-10A 10×5, odebench-10B 10×16.
    Trajectories: train 4, test 32, adapt-train 1, adapt-test 32, from the same states in every environment of
    a family; adapt-train has the first reference state alone, which training has too (so officially).
    Training parameters lie within ±10 % of the reference, ±20 % in odebench-4 (as released). `family` is the
    position in the variant's list of systems.

    - odebench-2: the paper's two families are not stated in what was read. We take ids 24 and 40; 24 and 25,
      the first two of the catalogue, are both harmonic oscillators.
    - odebench-4 has the systems, parameters, reference states and horizons of the released files.
    - The adaptation splits have 4 environments per family, at .8, .93, 1.07 and 1.2 times the reference. The
      released files have one, at .8, which in odebench-4 is also a training environment (as is 1.2).
    - The released script builds adapt_train from the training grid and adapt_test from the scalings, which
      agree for one environment only; here both have the scalings.
    - Initial states of the shear flow keep the second angle in the box's negative range, clear of its pole.

    Raises:
        UserError: unknown variant or split.
    """
    if variant not in _ODEBENCH:
        raise UserError(f"ODEBench variant {variant!r}: unknown: choose from {', '.join(_ODEBENCH)}")
    _check_split(split)
    chosen = _ODEBENCH[variant]
    count = {"train": 4, "test": 32, "adapt-train": 1, "adapt-test": 32}
    parts = []
    for number, system in enumerate(chosen.systems):
        rng = _rng(seed, split, system.id)
        if split.startswith("adapt"):
            grid = adaptation_grid(system.parameters, 4)
        else:
            grid = training_grid(system.parameters, chosen.environments, chosen.spread)
        parts.append(
            _generated(
                system.field,
                initial_states(system.initial, count[split], rng),
                grid,
                np.linspace(0, system.horizon, 100, endpoint=False),
                [f"{system.id}-{k} {_describe(p)}" for k, p in enumerate(grid)],
                np.full(len(grid), number),
            )
        )
    return _concatenate(parts)


def _concatenate(parts: Sequence[Environments]) -> Environments:
    families = [part.family for part in parts if part.family is not None]
    return Environments(
        t=np.concatenate([part.t for part in parts]),
        x=np.concatenate([part.x for part in parts]),
        family=np.concatenate(families),
        parameters=tuple(p for part in parts for p in part.parameters),
        names=tuple(name for part in parts for name in part.names),
    )


def _lotka_volterra(x: Array, alpha: Array, beta: Array, gamma: Array, delta: Array) -> Sequence[Array]:
    return alpha * x[0] - beta * x[0] * x[1], delta * x[0] * x[1] - gamma * x[1]


def _lotka_grid(adapt: bool) -> list[dict[str, float]]:
    # The order of the released files: δ outer in training, β outer in adaptation.
    if adapt:
        pairs = [(beta, delta) for beta in (0.625, 1.125) for delta in (0.625, 1.125)]
    else:
        pairs = [(beta, delta) for delta in (0.5, 0.75, 1.0) for beta in (0.5, 0.75, 1.0)]
    return [{"alpha": 0.5, "beta": beta, "gamma": 0.5, "delta": delta} for beta, delta in pairs]


def lotka_volterra(split: str, seed: int) -> Environments:
    """Lotka–Volterra of CoDA: α = γ = .5, β and δ vary; 20 times, 0.5 apart; initial states in [1, 2]².

    Training 9 environments β, δ ∈ {.5, .75, 1} with 4 trajectories (test 32); adaptation {.625, 1.125}²
    with 1 (32). V = δx - γ ln x + βy - α ln y is constant along each. `family` is the index of δ among its
    three training values (our choice: the paper gives none), None in adaptation, where δ has other values.
    """
    _check_split(split)
    adapt = split.startswith("adapt")
    count = {"train": 4, "test": 32, "adapt-train": 1, "adapt-test": 32}
    x0 = _rng(seed, split).uniform(1, 2, size=(count[split], 2))
    grid = _lotka_grid(adapt)
    family = None if adapt else _index_of([p["delta"] for p in grid])
    return _generated(
        _lotka_volterra,
        x0,
        grid,
        np.linspace(0, 10, 20, endpoint=False),
        _grid_names(grid, "beta", "delta"),
        family,
    )


def _glycolytic(x: Array, *parameters: Array) -> Sequence[Array]:
    J0, k1, k2, k3, k4, k5, k6, K1, q, N, A, kappa, psi, k = parameters
    s1, s2, s3, s4, s5, s6, s7 = x
    v1 = k1 * s1 * s6 / (1 + (s6 / K1) ** q)
    v2 = k2 * s2 * (N - s5)
    v3 = k3 * s3 * (A - s6)
    v4 = k4 * s4 * s5
    v6 = k6 * s2 * s5
    leak = kappa * (s4 - s7)
    return (
        J0 - v1,
        2 * v1 - v2 - v6,
        v2 - v3,
        v3 - v4 - leak,
        v2 - v4 - v6,
        2 * v3 - 2 * v1 - k5 * s6,
        psi * leak - k * s7,
    )


# CoDA train.py; the order is the one in which _glycolytic takes them.
_GLYCOLYTIC = {
    "J0": 2.5, "k1": 100.0, "k2": 6.0, "k3": 16.0, "k4": 100.0, "k5": 1.28, "k6": 12.0,
    "K1": 1.0, "q": 4.0, "N": 1.0, "A": 4.0, "kappa": 13.0, "psi": 0.1, "k": 1.8,
}  # fmt: skip
_GLYCOLYTIC_LOW = np.array([0.15, 0.19, 0.04, 0.10, 0.08, 0.14, 0.05])
_GLYCOLYTIC_HIGH = np.array([1.60, 2.16, 0.20, 0.35, 0.30, 2.67, 0.10])


def _glycolytic_grid(adapt: bool) -> list[dict[str, float]]:
    k1s, K1s = ((85.0, 95.0), (0.625, 0.875)) if adapt else ((100.0, 90.0, 80.0), (1.0, 0.75, 0.5))
    return [{**_GLYCOLYTIC, "k1": k1, "K1": K1} for k1 in k1s for K1 in K1s]


def glycolytic(split: str, seed: int) -> Environments:
    """Yeast glycolytic oscillator of CoDA, 7 states; 20 times, 0.05 apart; k1 and K1 vary.

    Training 9 environments k1 ∈ {100, 90, 80}, K1 ∈ {1, .75, .5}, with 32 trajectories (test 32); adaptation
    {85, 95} × {.625, .875}, with 1 (32). Initial states are uniform in CoDA's ranges (the published model's).
    `family` is the index of K1 among its three training values (our choice: the paper gives none), None in
    adaptation, where K1 has other values.
    """
    _check_split(split)
    adapt = split.startswith("adapt")
    count = {"train": 32, "test": 32, "adapt-train": 1, "adapt-test": 32}
    x0 = _rng(seed, split).uniform(_GLYCOLYTIC_LOW, _GLYCOLYTIC_HIGH, size=(count[split], 7))
    grid = _glycolytic_grid(adapt)
    family = None if adapt else _index_of([p["K1"] for p in grid])
    return _generated(
        _glycolytic, x0, grid, np.linspace(0, 1, 20, endpoint=False), _grid_names(grid, "k1", "K1"), family
    )


def _selkov(x: Array, a: Array, b: Array) -> Sequence[Array]:
    autocatalysis = a * x[1] + x[0] ** 2 * x[1]
    return autocatalysis - x[0], b - autocatalysis


def _selkov_grid(adapt: bool) -> list[dict[str, float]]:
    if adapt:
        values = [-1.25, -0.65, -0.05, 0.02, 0.6, 1.2]
    else:
        values = [*np.linspace(-1, -0.25, 7), *np.linspace(-0.1, 0.1, 7), *np.linspace(0.25, 1, 7)]
    return [{"a": 0.1, "b": float(b)} for b in values]


def selkov(split: str, seed: int) -> Environments:
    """Sel'kov's glycolysis model of ncflow: a = .1, b varies; 11 times on [0, 40]; initial states in [0, 3]².

    Training 21 environments: b in 7 steps over each of [-1, -.25], [-.1, .1] and [.25, 1]; adaptation 6, two
    near each range; 4 trajectories, 1 in adapt-train. `family` is the range: 0, 1, 2.
    """
    _check_split(split)
    adapt = split.startswith("adapt")
    count = {"train": 4, "test": 4, "adapt-train": 1, "adapt-test": 4}
    x0 = _rng(seed, split).uniform(0, 3, size=(count[split], 2))
    grid = _selkov_grid(adapt)
    return _generated(_selkov, x0, grid, np.linspace(0, 40, 11), _grid_names(grid, "b"), _selkov_family(grid))


def _selkov_family(grid: Sequence[Mapping[str, float]]) -> Labels:
    return np.digitize([p["b"] for p in grid], [-0.175, 0.175]).astype(np.int64)


def _index_of(values: Sequence[float]) -> Labels:
    """Position of each value among the distinct ones, in increasing order."""
    return np.unique(values, return_inverse=True)[1].astype(np.int64)


def _grid_names(grid: Sequence[Mapping[str, float]], *keys: str) -> list[str]:
    return [_describe({key: p[key] for key in keys}) for p in grid]


def synthetic_control(folder: str | os.PathLike[str]) -> Environments:
    """Synthetic Control Chart time series (UCI): each of 600 series of 60 values is an environment, d = 1.

    Standardised per time step over the series (mixer/dataloader.py, TrendsDataset); t = linspace(0, 1, 60).
    `labels`: the 6 classes of 100, in the file's order (normal, cyclic, increasing, decreasing, upward shift,
    downward shift). `family`: 0 normal or cyclic, 1 increasing or upward, 2 decreasing or downward.

    Raises:
        UserError: synthetic_control.data is missing or is not 600 lines of 60 numbers.
    """
    path = Path(folder) / "synthetic_control.data"
    rows = []
    for number, line in enumerate(_lines(path), 1):
        cells = line.split()
        if not cells:
            continue
        where = f"{path}, line {number}"
        if len(cells) != 60:
            raise UserError(f"{where}: {len(cells)} values, not 60: fetch the file again")
        rows.append(_floats(cells, where))
    if len(rows) != 600:
        raise UserError(f"{path}: {len(rows)} series, not 600: fetch the file again")
    x = np.array(rows)
    x = (x - x.mean(0)) / x.std(0)
    labels = np.repeat(np.arange(6), 100)
    family = np.array([0, 0, 1, 2, 1, 2])[labels]
    return _series(x[:, None, :, None], family, labels)


def epilepsy2(folder: str | os.PathLike[str], split: str) -> Environments:
    """Epilepsy2 (UEA/UCR archive): EEG series of 178 values at t = linspace(0, 1, 178), d = 1.

    Every series is an environment with one trajectory, so that train and test are both Epilepsy2_TRAIN.ts
    (80 series; the official validation reads it too), adapt-train and adapt-test both Epilepsy2_TEST.ts
    (11 420).
    `labels` are positions in the file's @classLabel list, and stand for the families.

    Raises:
        UserError: the file is missing, ragged, has missing values, or is not in the .ts format.
    """
    _check_split(split)
    path = Path(folder) / _EPILEPSY_FILES[split]
    classes: list[str] | None = None
    series: list[list[list[float]]] = []
    labels: list[int] = []
    in_data = False
    for number, line in enumerate(_lines(path), 1):
        where = f"{path}, line {number}"
        if not line.strip() or line.startswith("#"):
            continue
        if not in_data:
            words = line.split()
            if words[0].lower() == "@classlabel" and len(words) > 2 and words[1].lower() == "true":
                classes = words[2:]
            in_data = words[0].lower() == "@data"
            if not words[0].startswith("@"):
                raise UserError(f"{where}: data before @data: give a .ts file")
            continue
        *dimensions, label = line.strip().split(":")
        if classes is None or label not in classes:
            raise UserError(
                f"{where}: class {label[:40]!r} is not in @classLabel: give a .ts file with its class labels"
            )
        columns = [_floats(values.split(","), where) for values in dimensions]
        if not columns or {len(c) for c in columns} != {len(columns[0])}:
            raise UserError(f"{where}: dimensions of unequal length: give series of equal length")
        if series and (len(columns), len(columns[0])) != (len(series[0]), len(series[0][0])):
            raise UserError(
                f"{where}: environment {len(series)} has {len(columns)} × {len(columns[0])} values, "
                f"the first one {len(series[0])} × {len(series[0][0])}: give series of equal length"
            )
        series.append(columns)
        labels.append(classes.index(label))
    if not series:
        raise UserError(f"{path}: no series: give a .ts file")
    x = np.array(series).transpose(0, 2, 1)[:, None]
    return _series(x, np.array(labels), np.array(labels))


_EPILEPSY_FILES = {
    "train": "Epilepsy2_TRAIN.ts",
    "test": "Epilepsy2_TRAIN.ts",
    "adapt-train": "Epilepsy2_TEST.ts",
    "adapt-test": "Epilepsy2_TEST.ts",
}


def _series(x: Array, family: Labels, labels: Labels) -> Environments:
    E, _, T, _ = x.shape
    t = np.tile(np.linspace(0, 1, T), (E, 1))
    names = tuple(f"series {e}" for e in range(E))
    return Environments(t, x, family, ({},) * E, names, labels).check()


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the folder")
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as text: fetch the file again") from error


def _floats(cells: Sequence[str], where: str) -> list[float]:
    values = []
    for column, cell in enumerate(cells):
        try:
            values.append(float(cell))
        except ValueError:
            raise UserError(f"{where}, value {column + 1}: {cell[:40]!r} is not a number: mend or drop it") from None
    return values


def from_arrays(X: ArrayLike, t: ArrayLike, *, names: Sequence[str] | None = None) -> Environments:
    """Environments from states X [E, I, T, d] and times t [T] or [E, T], as arrays or nested lists.

    Raises:
        UserError: environments of unequal shapes (names the first that differs), no numbers, and what
            `Environments.check` refuses.
    """
    x = _rectangular(X, 3, "states", "[trajectories, times, state]")
    times = _times(t, len(x))
    chosen = tuple(f"environment {e}" for e in range(len(x))) if names is None else tuple(names)
    return Environments(times, x, None, ({},) * len(x), chosen).check()


def _times(t: ArrayLike, E: int) -> Array:
    """Times [E, T] from [T], which all environments share, or from [E, T]."""
    try:
        shared = np.ndim(t) == 1
    except ValueError:  # ragged: _rectangular names the environment
        shared = False
    return np.tile(_numbers(t, "times"), (E, 1)) if shared else _rectangular(t, 1, "times", "[times]")


def _items(values: ArrayLike) -> list[Any]:
    try:
        return list(values)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{type(values).__name__} is not an array: give nested lists or a numpy array") from None


def _numbers(values: Any, where: str) -> Array:
    """As float64, refusing ragged nesting, text, complex numbers and other objects."""
    try:
        array = np.asarray(values)
    except ValueError:
        raise UserError(f"{where}: ragged: every trajectory needs the same times and state variables") from None
    if array.dtype.kind not in "iuf":
        raise UserError(f"{where}: values of type {array.dtype}: give real numbers")
    return array.astype(np.float64)


def _rectangular(values: ArrayLike, ndim: int, what: str, layout: str) -> Array:
    """One float64 array from per-environment parts of `ndim` dimensions; names the first that differs."""
    parts = [_numbers(part, f"{what} of environment {e}") for e, part in enumerate(_items(values))]
    for e, part in enumerate(parts):
        if part.ndim != ndim:
            raise UserError(f"{what} of environment {e}: shape {list(part.shape)}: give {layout} per environment")
        if part.shape != parts[0].shape:
            raise UserError(
                f"{what} of environment {e}: shape {list(part.shape)} where environment 0 has "
                f"{list(parts[0].shape)}: cut or interpolate to equal shapes"
            )
    if not parts:
        raise UserError(f"{what}: no environments: give at least one")
    return np.stack(parts)


def from_npz(path: str | os.PathLike[str]) -> Environments:
    """Environments from arrays X and t of an .npz file, in any of the layouts in use.

    - X [E, I, T, d] with t [T] or [E, T] (CoDA, ncflow; the user's own).
    - X [F, E, I, T, d] with t [F, T] (ODEBench files of MixER): F families of E environments each. The
      parameters come from <stem>_envs.json beside the file where there is one.

    Raises:
        UserError: a damaged file, a missing array, pickles (never run), or what `from_arrays` refuses.
    """
    path = Path(path)
    arrays = load_npz(path, ("X", "t"))
    X, t = (_numbers(arrays[key], f"{path}, array {key}") for key in ("X", "t"))
    if X.ndim != 5:
        return _located(path, lambda: from_arrays(X, t))
    if t.shape != (X.shape[0], X.shape[3]):
        raise UserError(
            f"{path}: X {list(X.shape)} and t {list(t.shape)} do not fit: give t [families, times] for X "
            "[families, environments, trajectories, times, state]"
        )
    F, E = X.shape[:2]
    family = np.repeat(np.arange(F), E)
    names = [f"family {f} environment {e}" for f in range(F) for e in range(E)]
    parameters: list[Mapping[str, float]] = [{}] * (F * E)
    beside = path.with_name(f"{path.stem}_envs.json")
    if beside.is_file():
        stored = _envs_json(beside)
        if len(stored) != F or any(len(grid) != E for grid in stored.values()):
            raise UserError(f"{beside}: does not list {F} families of {E} environments: give the file of this npz")
        parameters = [p for grid in stored.values() for p in grid]
        names = [f"{key}-{e} {_describe(p)}" for key, grid in stored.items() for e, p in enumerate(grid)]
    made = _located(path, lambda: from_arrays(X.reshape(F * E, *X.shape[2:]), np.repeat(t, E, axis=0), names=names))
    return replace(made, family=family, parameters=tuple(parameters)).check()


def _located(path: Path, make: Callable[[], Environments]) -> Environments:
    """make(), with the path put before the message of its error."""
    try:
        return make()
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _envs_json(path: Path) -> dict[str, list[dict[str, float]]]:
    """{"24": [{"c0": 1.68}, …], …}, checked."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {
            str(key): [{str(name): float(value) for name, value in p.items()} for p in grid]
            for key, grid in stored.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a list of parameters per family: delete it or fetch it again") from error


def from_csv(path: str | os.PathLike[str]) -> Environments:
    """Environments from a long table with columns env, trajectory, t and one more per state variable.

    The columns may stand in any order; the state variables keep theirs. Environments and trajectories are
    numbered as they first appear, and rows of one trajectory must stand in order of time. All trajectories of
    an environment need the same times, all environments the same number of trajectories and times.

    Raises:
        UserError: a missing, repeated or unnamed column (names those found), a cell that is not a number,
            ragged environments, and what `Environments.check` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the path")
    tracks: dict[str, dict[str, list[list[float]]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header = [cell.strip() for cell in next(reader, [])]
            keys, columns = _columns(path, header)
            for row in reader:
                if not row:
                    continue
                where = f"{path}, line {reader.line_num}"
                if len(row) != len(header):
                    raise UserError(f"{where}: {len(row)} cells, but the header has {len(header)}: mend the line")
                env, trajectory = (row[k].strip() for k in keys)
                values = [_cell(row[k], f"{where}, column {header[k]!r}") for k in columns]
                tracks.setdefault(env, {}).setdefault(trajectory, []).append(values)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not readable as CSV in UTF-8: export it again") from error
    if not tracks:
        raise UserError(f"{path}: no rows: give at least one environment")
    X, t = [], []
    first_env, first = next(iter(tracks.items()))
    I, T = len(first), len(next(iter(first.values())))
    for env, trajectories in tracks.items():
        if len(trajectories) != I:
            raise UserError(
                f"{path}: environment {env!r} has {len(trajectories)} trajectories, {first_env!r} has {I}: "
                "give the same number in every environment"
            )
        for trajectory, rows in trajectories.items():
            if len(rows) != T:
                raise UserError(
                    f"{path}: environment {env!r}, trajectory {trajectory!r} has {len(rows)} times, "
                    f"the first one {T}: cut or interpolate to equal length"
                )
        block = np.array(list(trajectories.values()))  # [I, T, 1 + d]
        times = block[:, :, 0]
        if not np.array_equal(times, np.broadcast_to(times[:1], times.shape), equal_nan=True):
            raise UserError(
                f"{path}: environment {env!r}: its trajectories have different times: interpolate to one grid"
            )
        t.append(times[0])
        X.append(block[:, :, 1:])
    return _located(path, lambda: from_arrays(X, t, names=list(tracks)))


def _columns(path: Path, header: Sequence[str]) -> tuple[list[int], list[int]]:
    """Positions of (env, trajectory) and of (t, state variables…)."""
    found = f"found {', '.join(map(repr, header)) or 'none'}"
    for name in ("env", "trajectory", "t"):
        if name not in header:
            raise UserError(f"{path}: no column {name!r} ({found}): give env, trajectory, t and the state variables")
    for name in header:
        if not name or header.count(name) > 1:
            raise UserError(f"{path}: column {name!r} is {'repeated' if name else 'unnamed'} ({found}): name each once")
    state = [k for k, name in enumerate(header) if name not in ("env", "trajectory", "t")]
    if not state:
        raise UserError(f"{path}: no state variable ({found}): add a column per variable")
    return [header.index("env"), header.index("trajectory")], [header.index("t"), *state]


def _cell(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise UserError(f"{where}: {text[:40]!r} is not a number: mend or drop the line") from None


# Released files, below $METAZOO_DATA or in --data-dir: folder, then file names in the order of SPLITS.
_CODA_NAMES = ("train.npz", "test.npz", "ood_train.npz", "ood_test.npz")
_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "odebench-files": (
        "dynamics/ode-bench/data",
        ("train.npz", "test.npz", "adapt_train.npz", "adapt_test.npz"),
    ),
    "lotka-volterra-files": ("dynamics/lotka", _CODA_NAMES),
    "glycolytic-files": ("dynamics/glycolytic/data", _CODA_NAMES),
    "selkov-files": ("dynamics/selkov/data", _CODA_NAMES),
    "synthetic-control": ("dynamics/synthetic-control/data", ("synthetic_control.data",) * 2),
    "epilepsy2": ("dynamics/epilepsy/data", tuple(_EPILEPSY_FILES.values())),
}
GENERATED = (*_ODEBENCH, "lotka-volterra", "glycolytic", "selkov")
NAMES = (*GENERATED, *_FILES)


def load(dataset: str, split: str, *, data_dir: str | os.PathLike[str] | None = None, seed: int = 0) -> Environments:
    """One split (of SPLITS) of a data set: one of NAMES, or a path to .npz or .csv.

    - Generated from `seed`: odebench-2, odebench-4, odebench-10A, odebench-10B, lotka-volterra, glycolytic,
      selkov.
    - Released files, in data_dir or below $METAZOO_DATA: odebench-files, lotka-volterra-files,
      glycolytic-files, selkov-files, synthetic-control, epilepsy2; the first four with the parameters and
      families of the generators where the sizes agree.
    - A path: "{split}" in it is replaced by the split's name ("mine/{split}.csv"); without it the file is the
      train split, and the others are refused.

    Raises:
        UserError: unknown name or split, a split the set does not have, and what the loaders refuse.
    """
    _check_split(split)
    if dataset in _ODEBENCH:
        return odebench(dataset, split, seed)
    if dataset == "lotka-volterra":
        return lotka_volterra(split, seed)
    if dataset == "glycolytic":
        return glycolytic(split, seed)
    if dataset == "selkov":
        return selkov(split, seed)
    if dataset in _FILES:
        return _released(dataset, split, data_dir)
    if dataset.endswith((".npz", ".csv")):
        if "{split}" not in dataset and split != "train":
            raise UserError(
                f"{dataset}: one file is the train split only: name the files after their splits and give "
                f"a path with {{split}} in it to have {split!r}"
            )
        path = dataset.replace("{split}", split)
        return from_npz(path) if path.endswith(".npz") else from_csv(path)
    raise UserError(f"data set {dataset!r}: unknown: give a path to .npz or .csv, or one of {', '.join(NAMES)}")


def _released(dataset: str, split: str, data_dir: str | os.PathLike[str] | None) -> Environments:
    folder_name, files = _FILES[dataset]
    if SPLITS.index(split) >= len(files):
        raise UserError(f"data set {dataset!r} has no split {split!r}: choose from {', '.join(SPLITS[: len(files)])}")
    file = files[SPLITS.index(split)]
    folder = find(folder_name, [file], data_dir=data_dir)
    if dataset == "synthetic-control":
        return synthetic_control(folder)
    if dataset == "epilepsy2":
        return epilepsy2(folder, split)
    made = from_npz(folder / file)
    adapt = split.startswith("adapt")
    if dataset == "lotka-volterra-files":
        grid = _lotka_grid(adapt)
        names, family = (
            _grid_names(grid, "beta", "delta"),
            None if adapt else _index_of([p["delta"] for p in grid]),
        )
    elif dataset == "glycolytic-files":
        grid = _glycolytic_grid(adapt)
        names, family = _grid_names(grid, "k1", "K1"), None if adapt else _index_of([p["K1"] for p in grid])
    elif dataset == "selkov-files":
        grid = _selkov_grid(adapt)
        names, family = _grid_names(grid, "b"), _selkov_family(grid)
    else:
        return made
    if len(made) != len(grid):
        return made
    return replace(made, parameters=tuple(grid), names=tuple(names), family=family)


def generate(options: GenerateOptions) -> str:
    """Write a generated data set to ``options.output`` (.npz or .csv), with its parameters beside it as JSON.

    Returns:
        A line that says what was written.

    Raises:
        UserError: not a generated set, another file ending, or the file exists or cannot be written.
    """
    output = Path(options.output)
    if options.dataset in _FILES or options.dataset.endswith((".npz", ".csv")):
        raise UserError(f"data set {options.dataset!r} is read, not generated: one of {', '.join(GENERATED)}")
    if output.suffix not in (".npz", ".csv"):
        raise UserError(f"--output {output}: end it in .npz or .csv")
    if output.exists():
        raise UserError(f"--output {output} exists: remove it or name another file")
    made = load(options.dataset, options.split, seed=options.seed)
    try:
        if output.suffix == ".npz":
            np.savez(output, t=made.t, X=made.x)
        else:
            with output.open("w", newline="", encoding="utf-8") as file:
                writer = csv.writer(file)
                writer.writerow(["env", "trajectory", "t", *(f"x{k + 1}" for k in range(made.x.shape[-1]))])
                for e, i, k in np.ndindex(made.x.shape[:3]):
                    writer.writerow([e, i, repr(float(made.t[e, k])), *map(repr, made.x[e, i, k].tolist())])
        about = {"names": made.names, "parameters": [dict(p) for p in made.parameters]}
        about["family"] = None if made.family is None else made.family.tolist()
        output.with_suffix(".about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    E, I, T, d = made.x.shape
    return f"{output}: {E} environments x {I} trajectories x {T} times x {d} states"
