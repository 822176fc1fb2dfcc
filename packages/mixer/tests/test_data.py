"""mixer.data: generators against closed forms and the released files, loaders, inputs that are refused."""

import csv
import json
import math
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from metazoo.errors import UserError
from mixer import data
from mixer.data import Environments
from scipy.integrate import solve_ivp

SHAPES = {
    "odebench-2": {"train": (10, 4, 100, 2), "test": (10, 32, 100, 2), "adapt-train": (8, 1, 100, 2)},
    "odebench-4": {"train": (20, 4, 100, 2), "test": (20, 32, 100, 2), "adapt-train": (16, 1, 100, 2)},
    "odebench-10A": {"train": (50, 4, 100, 2), "test": (50, 32, 100, 2), "adapt-train": (40, 1, 100, 2)},
    "odebench-10B": {"train": (160, 4, 100, 2), "test": (160, 32, 100, 2), "adapt-test": (40, 32, 100, 2)},
    "lotka-volterra": {"train": (9, 4, 20, 2), "test": (9, 32, 20, 2), "adapt-train": (4, 1, 20, 2)},
    "glycolytic": {"train": (9, 32, 20, 7), "adapt-train": (4, 1, 20, 7), "adapt-test": (4, 32, 20, 7)},
    "selkov": {"train": (21, 4, 11, 2), "test": (21, 4, 11, 2), "adapt-train": (6, 1, 11, 2)},
}


def released(dataset: str, split: str) -> Environments:
    if "METAZOO_DATA" not in os.environ:
        pytest.skip("METAZOO_DATA is not set: the released files are not shipped (no licence)")
    try:
        return data.load(dataset, split)
    except UserError as error:
        if "not found" not in str(error):
            raise
        pytest.skip(str(error))


def refused(match: str, call, *args, **kwargs) -> str:
    """The call raises a UserError of one line that matches."""
    with pytest.raises(UserError, match=match) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def small(E: int = 3, I: int = 2, T: int = 6, d: int = 2) -> Environments:
    rng = np.random.default_rng(0)
    t = np.sort(rng.uniform(0, 10, (E, T)), axis=1)
    x = rng.normal(size=(E, I, T, d))
    return Environments(t, x, np.arange(E), tuple({"c0": float(e)} for e in range(E)), tuple("abcdefgh"[:E]))


# Equations


def test_harmonic_closed_form():
    """x(t) = x0 cos ωt + v0/ω sin ωt with ω² = c0, for every trajectory of odebench-4's first family."""
    envs = data.odebench("odebench-4", "test", 3)
    envs = envs.select(envs.family == 0)
    omega = np.sqrt([p["c0"] for p in envs.parameters])[:, None, None]
    t, x0, v0 = envs.t[:, None], envs.x[:, :, :1, 0], envs.x[:, :, :1, 1]
    np.testing.assert_allclose(envs.x[..., 0], x0 * np.cos(omega * t) + v0 / omega * np.sin(omega * t), atol=1e-8)
    np.testing.assert_allclose(envs.x[..., 1], v0 * np.cos(omega * t) - x0 * omega * np.sin(omega * t), atol=1e-8)


def test_damped_closed_form():
    """x(t) = e^(-c1 t/2) (x0 cos ωt + (v0 + c1 x0/2)/ω sin ωt), ω² = c0 - c1²/4 (id 25)."""
    envs = data.odebench("odebench-10A", "train", 0)
    envs = envs.select(envs.family == 1)
    c0, c1 = (np.array([p[k] for p in envs.parameters])[:, None, None] for k in ("c0", "c1"))
    omega = np.sqrt(c0 - c1**2 / 4)
    t, x0, v0 = envs.t[:, None], envs.x[:, :, :1, 0], envs.x[:, :, :1, 1]
    wave = x0 * np.cos(omega * t) + (v0 + c1 * x0 / 2) / omega * np.sin(omega * t)
    np.testing.assert_allclose(envs.x[..., 0], np.exp(-c1 * t / 2) * wave, atol=1e-8)


def test_energies_are_conserved():
    """v²/2 - c0 cos x for the pendulum, v²/2 + cos²x/2 - c0 cos x for the bead: constant along each."""
    envs = data.odebench("odebench-10A", "test", 0)
    for family, potential in ((2, 0.0), (4, 0.5)):
        part = envs.select(envs.family == family)
        c0 = np.array([p["c0"] for p in part.parameters])[:, None, None]
        x, v = part.x[..., 0], part.x[..., 1]
        energy = v**2 / 2 + potential * np.cos(x) ** 2 - c0 * np.cos(x)
        np.testing.assert_allclose(energy, np.broadcast_to(energy[..., :1], energy.shape), atol=1e-8)


def test_lotka_volterra_invariant():
    """V = δx - γ ln x + βy - α ln y is constant along every trajectory of every split."""
    for split in data.SPLITS:
        envs = data.lotka_volterra(split, 1)
        a, b, c, d = (
            np.array([p[k] for p in envs.parameters])[:, None, None] for k in ("alpha", "beta", "gamma", "delta")
        )
        x, y = envs.x[..., 0], envs.x[..., 1]
        V = d * x - c * np.log(x) + b * y - a * np.log(y)
        np.testing.assert_allclose(V, np.broadcast_to(V[..., :1], V.shape), atol=1e-8)


def test_lienard_is_van_der_pol():
    """Id 38's first variable solves x'' = c0 x' (1 - x²) - x: the curve of id 37's field from (x, x')."""
    envs = data.odebench("odebench-10A", "train", 0)
    envs = envs.select(envs.family == 7)
    for e, p in enumerate(envs.parameters):
        x0 = envs.x[e, :, 0]
        speed = np.array(data.van_der_pol_lienard(x0.T, p["c0"]))[0]
        again = data._integrate(data.van_der_pol, np.stack([x0[:, 0], speed], -1)[None], [p], envs.t[e])
        np.testing.assert_allclose(again[0, ..., 0], envs.x[e, ..., 0], atol=1e-6)


@pytest.mark.parametrize(
    ("field", "x", "parameters", "slope"),
    [
        (data.double_well, (2.0, 3.0), (0.5,), (3.0, -7.5)),
        (data.bead_on_hoop, (math.pi / 2, 3.0), (0.5,), (3.0, -0.5)),
        (data.shear_flow, (0.0, math.pi / 4), (3.0,), (1.0, 0.0)),
        (data.shear_flow, (math.pi / 2, math.pi / 6), (3.0,), (0.0, 1.5)),
        (data.van_der_pol, (2.0, 3.0), (0.5,), (3.0, -6.5)),
        (data.glycolysis_2d, (2.0, 3.0), (5.0, 7.0), (25.0, -15.0)),
        (data._selkov, (2.0, 2 / 4.1), (0.1, 2.0), (0.0, 0.0)),
        (
            data._glycolytic,
            (1.0,) * 7,
            tuple(data._GLYCOLYTIC.values()),
            (-47.5, 88.0, -48.0, -52.0, -112.0, -5.28, -1.8),
        ),
    ],
)
def test_fields_by_hand(field, x, parameters, slope):
    """dx/dt at one point, worked by hand from the equations as published."""
    np.testing.assert_allclose(field(np.array(x), *parameters), slope, atol=1e-12)


def test_stacked_solve_is_the_single_solve():
    """A trajectory solved among 640 equals the same one solved alone."""
    envs = data.odebench("odebench-4", "test", 0)
    for e in (0, 7, 13, 19):
        rhs = data.RELEASED[envs.family[e]].field
        alone = data._integrate(rhs, envs.x[e : e + 1, 5:6, 0], [envs.parameters[e]], envs.t[e])
        np.testing.assert_allclose(alone[0, 0], envs.x[e, 5], atol=1e-6)


# Grids, splits and seeds


def test_grids_of_the_released_files():
    """The four families' parameters, as listed in the released train_envs.json and adapt_train_envs.json."""
    grids = {
        24: (1.68, 1.89, 2.1, 2.31, 2.52),
        35: (1.6, 1.8, 2.0, 2.2, 2.4),
        32: (0.08, 0.09, 0.1, 0.11, 0.12),
        40: (0.71, 0.8, 0.89, 0.97, 1.06),
    }
    assert [system.id for system in data.RELEASED] == list(grids)
    for system, values in zip(data.RELEASED, grids.values(), strict=True):
        assert data.training_grid(system.parameters, 5, 0.2) == [{"c0": value} for value in values]
        assert data.adaptation_grid(system.parameters, 1) == [{"c0": values[0]}]
    train = data.odebench("odebench-4", "train", 0)
    assert [p["c0"] for p in train.parameters] == [value for values in grids.values() for value in values]


@pytest.mark.parametrize("split", data.SPLITS)
def test_grids_equal_the_envs_files(split: str):
    """Equal to the *_envs.json of the released files; in adaptation, to the one environment per family."""
    theirs = released("odebench-files", split)
    ours = data.odebench("odebench-4", split, 0)
    if split.startswith("adapt"):
        ours = ours.select(np.arange(0, 16, 4))
    assert ours.parameters == theirs.parameters
    np.testing.assert_array_equal(ours.family, theirs.family)
    np.testing.assert_allclose(ours.t, theirs.t, atol=1e-12)


def test_two_parameter_grid():
    """Two parameters: ceil(√n) values each, the last fastest, cut at n; points equal by rounding stay."""
    grid = data.training_grid({"c0": 2.4, "c1": 0.07}, 5, 0.1)
    assert [tuple(p.values()) for p in grid] == [
        (2.16, 0.06),
        (2.16, 0.07),
        (2.16, 0.08),
        (2.4, 0.06),
        (2.4, 0.07),
    ]
    assert len(data.training_grid({"c0": 2.4, "c1": 0.07}, 16, 0.1)) == 16
    assert len({p["c0"] for p in data.training_grid({"c0": 0.18}, 16, 0.1)}) == 5


def test_initial_states():
    """First and last are the reference states, the others lie between; one is always the first."""
    reference = ((1.0, -0.3), (0.7, -1.7))
    states = data.initial_states(reference, 32, np.random.default_rng(0))
    assert tuple(states[0]) == reference[0]
    assert tuple(states[-1]) == reference[1]
    assert ((states[1:-1] > (0.7, -1.7)) & (states[1:-1] < (1.0, -0.3))).all()
    assert tuple(data.initial_states(reference, 1, np.random.default_rng(1))[0]) == reference[0]


def test_shear_flow_starts_clear_of_the_pole():
    """The second angle starts at or below -0.3 in every variant and seed."""
    for variant, family in (("odebench-4", 1), ("odebench-10A", 5)):
        envs = data.odebench(variant, "test", 7)
        assert envs.x[envs.family == family, :, 0, 1].max() <= -0.3


@pytest.mark.parametrize("name", SHAPES)
def test_generators(name: str):
    """Shapes, families and names of each split; the same seed gives the same bits, another one others."""
    np.random.seed(0)  # noqa: NPY002  (the global state must not matter)
    for split, shape in SHAPES[name].items():
        envs = data.load(name, split, seed=5)
        assert envs.x.shape == shape
        assert envs.t.shape == (shape[0], shape[2])
        assert envs.t.dtype == envs.x.dtype == np.float64
        assert len(envs.names) == len(set(envs.names)) == len(envs) == shape[0]
        assert np.abs(envs.x).max() < 6
        again = data.load(name, split, seed=5)
        assert again.x.tobytes() == envs.x.tobytes()
        if split != "adapt-train" or name in ("lotka-volterra", "glycolytic", "selkov"):
            assert not np.array_equal(data.load(name, split, seed=6).x, envs.x)
    if name.startswith("odebench"):
        train = data.load(name, "train")
        np.testing.assert_array_equal(np.bincount(train.family), train.x.shape[0] / (train.family.max() + 1))


def test_splits_have_their_own_states():
    """With one seed, no drawn initial state of training comes back in the test split."""
    for name in ("odebench-4", "lotka-volterra", "glycolytic", "selkov"):
        train, test = (data.load(name, split, seed=0).x[0, :, 0] for split in ("train", "test"))
        if name == "odebench-4":  # the two reference states are in both, as in the released files
            train, test = train[1:-1], test[1:-1]
        assert not (train[:, None] == test[None]).any()


def test_families_of_related_sets():
    """Three of equal size by δ, K1 and the range of b; none where adaptation leaves the training values."""
    for name, key in (("lotka-volterra", "delta"), ("glycolytic", "K1"), ("selkov", "b")):
        envs = data.load(name, "train")
        values = np.array([p[key] for p in envs.parameters])
        assert np.bincount(envs.family).tolist() == [len(envs) // 3] * 3
        assert values[envs.family == 0].max() < values[envs.family == 1].min()
        assert values[envs.family == 1].max() < values[envs.family == 2].min()
    # the order of the released files: β fastest, K1 fastest and falling
    assert data.lotka_volterra("train", 0).family.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert data.glycolytic("train", 0).family.tolist() == [2, 1, 0] * 3
    assert data.lotka_volterra("adapt-train", 0).family is None
    assert data.selkov("adapt-train", 0).family.tolist() == [0, 0, 1, 1, 2, 2]


# Released files


def official(rhs, x0, parameters, t, horizon):
    """One trajectory by the solver of the released scripts: RK45 at scipy's default tolerances."""
    values = [np.float64(value) for value in parameters.values()]
    return solve_ivp(lambda _, y: np.array(rhs(y, *values)), (0, horizon), x0, t_eval=t, method="RK45").y.T


def single_precision_lotka(x, *parameters):
    """The released Lotka–Volterra files were made with a right-hand side rounded to single precision."""
    return np.array(data._lotka_volterra(x, *parameters)).astype(np.float32)


@pytest.mark.parametrize("split", ["train", "adapt-test"])
@pytest.mark.parametrize("name", ["odebench", "lotka-volterra", "glycolytic", "selkov"])
def test_released_files(name: str, split: str):
    """Our equations and parameters from a file's own initial states reproduce it.

    To 1e-6 with the official solver and its tolerances; our solver shows how far these are off the solution:
    .3 % of the trajectory's maximum at the median point, at most 15 % (shear flow; Lotka–Volterra 3 %).
    """
    envs = released(f"{name}-files", split)
    for e in range(len(envs)):
        if name == "odebench":
            system = data.RELEASED[envs.family[e]]
            rhs, theirs, horizon = system.field, system.field, system.horizon
        else:
            rhs = getattr(data, f"_{name.replace('-', '_')}")
            theirs = single_precision_lotka if name == "lotka-volterra" else rhs
            horizon = {"lotka-volterra": 10, "glycolytic": 1, "selkov": 40}[name]
        x = envs.x[e, :3]
        scale = np.abs(x).max(axis=1, keepdims=True)
        same = np.stack([official(theirs, x0, envs.parameters[e], envs.t[e], horizon) for x0 in x[:, 0]])
        assert (np.abs(same - x) / scale).max() < 1e-6
        exact = data._integrate(rhs, x[None, :, 0], [envs.parameters[e]], envs.t[e])[0]
        error = np.abs(exact - x) / scale
        assert np.median(error) < 1e-2
        assert error.max() < 0.15


@pytest.mark.parametrize(("name", "E"), [("lotka-volterra", 9), ("glycolytic", 9), ("selkov", 21), ("odebench", 20)])
def test_released_splits(name: str, E: int):
    """Every split of the released files loads, with the generator's sizes but for ODEBench's adaptation."""
    for split in data.SPLITS:
        theirs = released(f"{name}-files", split)
        ours = data.load("odebench-4" if name == "odebench" else name, split)
        assert theirs.x.shape[1:] == ours.x.shape[1:]
        if not split.startswith("adapt"):
            assert len(theirs) == E
            assert theirs.names == ours.names
            np.testing.assert_array_equal(theirs.family, ours.family)


def test_released_series():
    """The real synthetic_control.data and Epilepsy2_TRAIN.ts."""
    control = released("synthetic-control", "train")
    assert control.x.shape == (600, 1, 60, 1)
    np.testing.assert_allclose(control.x.mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(control.x.std(0), 1)
    trend = control.x[:, 0, -10:, 0].mean(1) - control.x[:, 0, :10, 0].mean(1)
    means = [trend[control.family == f].mean() for f in range(3)]
    assert means[2] < means[0] < means[1]  # decreasing < flat < increasing
    epilepsy = released("epilepsy2", "train")
    assert epilepsy.x.shape == (80, 1, 178, 1)
    assert np.bincount(epilepsy.labels).tolist() == [40, 40]
    assert epilepsy.x[0, 0, 0, 0] == 0.3416549789621318


# Environments


def test_subsample_and_select():
    """Step 5 leaves every fifth of 100 times; select takes positions and masks and keeps all in step."""
    envs = data.odebench("odebench-4", "train", 0)
    thin = envs.subsample(5)
    assert thin.x.shape == (20, 4, 20, 2)
    np.testing.assert_array_equal(thin.x, envs.x[:, :, ::5])
    np.testing.assert_array_equal(thin.t, envs.t[:, ::5])
    by_mask, by_index = envs.select(envs.family == 2), envs.select([12, 10])
    assert by_mask.names == envs.names[10:15]
    assert by_index.names == (envs.names[12], envs.names[10])
    assert by_index.parameters == (envs.parameters[12], envs.parameters[10])
    assert by_mask.family.tolist() == [2] * 5
    labelled = replace(small(), labels=np.array([7, 8, 9])).select([2, 0])
    assert labelled.labels.tolist() == [9, 7]
    np.testing.assert_array_equal(by_index.x, envs.x[[12, 10]])
    refused("fewer than 2", envs.subsample, 100)
    refused("step 0", envs.subsample, 0)


def test_crop():
    """Windows lie inside, span 60 % or more and keep lines; the same generator gives the same ones."""
    T = 20
    t = np.tile(np.linspace(0, 19, T), (50, 1))
    slope = np.random.default_rng(0).normal(size=(50, 3, 1, 2))
    envs = Environments(t, slope * t[:, None, :, None], None, ({},) * 50, ("e",) * 50).check()
    cropped = envs.crop(0.6, np.random.default_rng(1))
    assert cropped.t.shape == t.shape
    assert cropped.t.min() == 0
    assert cropped.t.max() == 19
    spans = cropped.t[:, -1] - cropped.t[:, 0]
    assert set(spans) <= set(range(11, 20))  # 12 to 20 samples
    assert len(set(spans)) > 3
    np.testing.assert_allclose(cropped.x, slope * cropped.t[:, None, :, None], atol=1e-12)
    np.testing.assert_array_equal(cropped.x, envs.crop(0.6, np.random.default_rng(1)).x)
    np.testing.assert_allclose(envs.crop(1.0, np.random.default_rng(1)).x, envs.x, atol=1e-12)
    for proportion in (0.05, 1.01, math.nan):
        refused("crop", envs.crop, proportion, np.random.default_rng(0))


def test_check_names_the_place():
    """NaN and infinity are named by environment, trajectory and time index."""
    envs = small()
    assert envs.check() is envs
    envs.x[1, 1, 4, 0] = np.nan
    refused(r"environment 1 \('b'\), trajectory 1, time index 4: state 0 is nan", envs.check)
    envs = small()
    envs.t[2, 3] = np.inf
    refused(r"environment 2 \('c'\), time index 3", envs.check)


def test_check_times():
    """Unsorted and repeated times are refused."""
    envs = small()
    envs.t[1] = envs.t[1, ::-1]
    refused(r"environment 1 \('b'\): time", envs.check)
    envs = small()
    envs.t[0, 3] = envs.t[0, 2]
    refused("repeated", envs.check)


@pytest.mark.parametrize(
    ("field", "value", "match"),
    [
        ("t", np.arange(6.0), "do not fit"),
        ("t", np.tile(np.arange(5.0), (3, 1)), "do not fit"),
        ("x", np.zeros((3, 6, 2)), "do not fit"),
        ("x", np.zeros((3, 0, 6, 2)), "at least one"),
        ("names", ("a",), "1 names for 3"),
        ("parameters", (), "0 parameters for 3"),
        ("family", np.zeros(2, int), "families"),
        ("labels", np.zeros((3, 1), int), "labels"),
    ],
)
def test_check_shapes(field: str, value: object, match: str):
    """Fields whose sizes do not agree are refused."""
    refused(match, replace(small(), **{field: value}).check)


# The user's own data


def test_from_arrays():
    """Arrays and nested lists; a time grid for all, or one per environment."""
    envs = small()
    made = data.from_arrays(envs.x.tolist(), envs.t.tolist(), names=envs.names)
    np.testing.assert_array_equal(made.x, envs.x)
    np.testing.assert_array_equal(made.t, envs.t)
    assert made.family is None
    shared = data.from_arrays(envs.x, np.arange(6))
    np.testing.assert_array_equal(shared.t, np.tile(np.arange(6.0), (3, 1)))
    # as many times as environments: still one grid for all
    assert data.from_arrays(np.zeros((3, 1, 3, 1)), [0, 1, 2]).t.shape == (3, 3)


def test_from_arrays_refuses():
    """Ragged input names the environment; text, objects and wrong depths are refused."""
    envs = small()
    ragged = envs.x.tolist()
    ragged[2] = ragged[2][:1]
    refused("environment 2", data.from_arrays, ragged, envs.t)
    ragged = envs.x.tolist()
    ragged[1][0] = ragged[1][0][:3]
    refused("environment 1: ragged", data.from_arrays, ragged, envs.t)
    times = envs.t.tolist()
    times[1] = times[1][:4]
    refused("times of environment 1", data.from_arrays, envs.x, times)
    refused("environment 0", data.from_arrays, envs.x[0], envs.t[0])
    refused("environments", data.from_arrays, [], [])
    refused("real numbers", data.from_arrays, [[[["a"]]]], [0.0])
    refused("real numbers", data.from_arrays, envs.x.astype(complex), envs.t)
    refused("real numbers", data.from_arrays, [[[[None], [1.0]]]], [0.0, 1.0])
    refused("not an array", data.from_arrays, 3.0, envs.t)
    refused("do not fit", data.from_arrays, envs.x, np.arange(5))


numbers = st.floats(allow_nan=False, allow_infinity=False)
sizes = st.tuples(*[st.integers(1, 3)] * 2, st.integers(2, 4), st.integers(1, 3))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data(), size=sizes)
def test_csv_round_trip(tmp_path: Path, drawn: st.DataObject, size: tuple[int, int, int, int]):
    """Any finite states and increasing times, written to CSV in any column order, come back bit for bit."""
    E, I, T, d = size
    x = drawn.draw(arrays(float, size, elements=numbers))
    t = np.sort(drawn.draw(arrays(float, (E, T), elements=st.floats(-1e6, 1e6), unique=True)), axis=1)
    names = drawn.draw(
        st.lists(
            st.text("abc ,;\"'é0", min_size=1).map(str.strip).filter(bool),
            min_size=E,
            max_size=E,
            unique=True,
        )
    )
    columns = drawn.draw(st.permutations(["env", "trajectory", "t", *(f"x{j}" for j in range(d))]))
    state = [name for name in columns if name.startswith("x")]
    path = tmp_path / "mine.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for e in range(E):
            for i in range(I):
                for k in range(T):
                    cells = dict(zip(state, map(float, x[e, i, k]), strict=True))
                    writer.writerow({"env": names[e], "trajectory": i, "t": float(t[e, k]), **cells})
    made = data.from_csv(path)
    assert made.names == tuple(names)
    assert made.x.tobytes() == x.tobytes()
    np.testing.assert_array_equal(made.t, t)


CSV = [
    "env,trajectory,t,x,y",
    "a,0,0,1,2",
    "a,0,1,3,4",
    "a,1,0,5,6",
    "a,1,1,7,8",
    "b,0,0,1,2",
    "b,0,2,3,4",
    "b,1,0,5,6",
    "b,1,2,7,8",
]


def test_csv_by_hand(tmp_path: Path):
    """A small table, also with interleaved rows, a byte-order mark, blank lines and spaces in the header."""
    path = tmp_path / "a.csv"
    interleaved = [CSV[0].replace(",t", " , t"), *CSV[1::2], "", *CSV[2::2]]
    for lines in (CSV, interleaved):
        path.write_text("\n".join(lines), encoding="utf-8-sig")
        envs = data.from_csv(path)
        assert envs.names == ("a", "b")
        np.testing.assert_array_equal(envs.t, [[0, 1], [0, 2]])
        np.testing.assert_array_equal(envs.x[1], [[[1, 2], [3, 4]], [[5, 6], [7, 8]]])


@pytest.mark.parametrize(
    ("line", "text", "match"),
    [
        (
            0,
            "environment,trajectory,t,x,y",
            "no column 'env' .found 'environment', 'trajectory', 't', 'x', 'y'",
        ),
        (0, "env,trajectory,t,x,x", "column 'x' is repeated"),
        (0, "env,trajectory,t,x,", "unnamed"),
        (4, "a,1,1,7,eight", "line 5, column 'y': 'eight'"),
        (4, "a,1,1,7", "line 5: 4 cells"),
        (4, "a,1,1,7,8,9", "line 5: 6 cells"),
        (4, "a,1,1,nan,8", r"environment 0 \('a'\), trajectory 1, time index 1: state 0 is nan"),
        (4, "a,1,1.5,7,8", "environment 'a': its trajectories have different times"),
        (4, "", "environment 'a', trajectory '1' has 1 times"),
        (4, "a,2,1,7,8", "'1' has 1 times"),
        (8, "b,0,3,7,8", "environment 'b', trajectory '0' has 3 times"),
        (8, "c,0,0,1,1", "environment 'b', trajectory '1' has 1 times|environment 'c' has 1 trajectories"),
        (2, "a,0,-1,3,4", "different times"),
    ],
)
def test_csv_refuses(tmp_path: Path, line: int, text: str, match: str):
    """One line of the table changed: the error names the file and the place."""
    lines = list(CSV)
    lines[line] = text
    path = tmp_path / "a.csv"
    path.write_text("\n".join(lines))
    assert str(path) in refused(match, data.from_csv, path)


def test_csv_refuses_other_files(tmp_path: Path):
    """Empty files, headers alone, no state column, binary content, unsorted times and absent files."""
    path = tmp_path / "a.csv"
    path.write_text("")
    refused("found none", data.from_csv, path)
    path.write_text(CSV[0])
    refused("no rows", data.from_csv, path)
    path.write_text("env,trajectory,t\na,0,0")
    refused("no state variable", data.from_csv, path)
    path.write_bytes(b"\xff\xfe\x00env")
    refused("UTF-8", data.from_csv, path)
    path.write_text("env,trajectory,t,x\na,0,1,1\na,0,0,1")
    refused("sort the times", data.from_csv, path)
    refused("no such file", data.from_csv, tmp_path / "absent.csv")


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(drawn=st.data(), size=sizes)
def test_npz_round_trip(tmp_path: Path, drawn: st.DataObject, size: tuple[int, int, int, int]):
    """CoDA's layout, one time grid for all or one per environment: the same states and times come back."""
    E, _, T, _ = size
    x = drawn.draw(arrays(float, size, elements=numbers))
    t = np.cumsum(drawn.draw(arrays(float, (E, T), elements=st.floats(0.01, 10))), axis=1)
    if drawn.draw(st.booleans()):
        t = np.tile(t[0], (E, 1))
        np.savez(tmp_path / "a.npz", X=x, t=t[0])
    else:
        np.savez(tmp_path / "a.npz", X=x, t=t)
    made = data.from_npz(tmp_path / "a.npz")
    np.testing.assert_array_equal(made.x, x)
    np.testing.assert_array_equal(made.t, t)


def test_npz_of_families(tmp_path: Path):
    """ODEBench's layout: families flattened in order, each on its grid, parameters from the JSON beside."""
    X = np.random.default_rng(0).normal(size=(2, 3, 1, 4, 2))
    t = np.array([np.linspace(0, 1, 4), np.linspace(0, 2, 4)])
    path = tmp_path / "train.npz"
    np.savez(path, X=X, t=t)
    envs = data.from_npz(path)
    np.testing.assert_array_equal(envs.x, X.reshape(6, 1, 4, 2))
    np.testing.assert_array_equal(envs.t[:, -1], [1, 1, 1, 2, 2, 2])
    assert envs.family.tolist() == [0, 0, 0, 1, 1, 1]
    assert envs.parameters == ({},) * 6
    beside = tmp_path / "train_envs.json"
    beside.write_text(json.dumps({"24": [{"c0": c} for c in (1.0, 2.0, 3.0)], "35": [{"c0": 4.0}] * 3}))
    envs = data.from_npz(path)
    assert [p["c0"] for p in envs.parameters] == [1, 2, 3, 4, 4, 4]
    assert envs.names[2] == "24-2 c0=3"
    beside.write_text(json.dumps({"24": [{"c0": 1.0}]}))
    refused("2 families of 3", data.from_npz, path)
    for bad in ("{", "[1]", '{"24": [1]}', '{"24": [{"c0": "x"}]}'):
        beside.write_text(bad)
        refused("not a list of parameters", data.from_npz, path)
    beside.unlink()
    np.savez(path, X=X, t=t[0])
    refused("do not fit", data.from_npz, path)


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_npz_refuses(tmp_path: Path):
    """Pickles never run; missing arrays, text and NaN are named with the file."""
    path, marker = tmp_path / "a.npz", tmp_path / "ran"
    path.write_bytes(pickle.dumps(Payload(marker)))
    refused("a.npz", data.from_npz, path)
    objects = np.empty(1, dtype=object)
    objects[0] = Payload(marker)
    np.savez(path, X=objects, t=np.zeros(2))
    refused("a.npz", data.from_npz, path)
    assert not marker.exists()
    np.savez(path, x=np.zeros((1, 1, 2, 1)), t=np.arange(2))
    refused("no array X; it has x, t", data.from_npz, path)
    np.savez(path, X=np.full((1, 1, 2, 1), "a"), t=np.arange(2))
    refused("array X: values of type", data.from_npz, path)
    np.savez(path, X=np.full((1, 1, 2, 1), np.nan), t=np.arange(2))
    refused("a.npz: environment 0 .*trajectory 0, time index 0", data.from_npz, path)


# Series files


def control_file(folder: Path, rows: np.ndarray) -> Path:
    np.savetxt(folder / "synthetic_control.data", rows, fmt="%.4f")
    return folder


def test_synthetic_control(tmp_path: Path):
    """600 lines of 60 become standardised environments with 6 classes of 100 and 3 families of 200."""
    rows = np.random.default_rng(0).normal(30, 5, (600, 60)).round(4)
    envs = data.load("synthetic-control", "train", data_dir=control_file(tmp_path, rows))
    np.testing.assert_allclose(envs.x[:, 0, :, 0], (rows - rows.mean(0)) / rows.std(0), atol=1e-12)
    np.testing.assert_array_equal(envs.t[599], np.linspace(0, 1, 60))
    assert envs.labels.tolist() == [c for c in range(6) for _ in range(100)]
    assert [envs.family[k] for k in range(0, 600, 100)] == [0, 0, 1, 2, 1, 2]
    refused("no split 'adapt-train'", data.load, "synthetic-control", "adapt-train", data_dir=tmp_path)
    control_file(tmp_path, rows[:599])
    refused("599 series", data.synthetic_control, tmp_path)
    control_file(tmp_path, rows[:, :59])
    refused("line 1: 59 values", data.synthetic_control, tmp_path)
    (tmp_path / "synthetic_control.data").write_text("1 x" + " 1" * 58)
    refused("line 1, value 2: 'x'", data.synthetic_control, tmp_path)
    (tmp_path / "synthetic_control.data").write_bytes(b"\xff\x00")
    refused("text", data.synthetic_control, tmp_path)


TS = """# a comment
@problemName Epilepsy2
@univariate true
@classLabel true 0 1

@data
0.5,1.5,2.5:1
1,2,3:0
"""


def test_epilepsy2(tmp_path: Path):
    """The .ts format: comments, header, values, class; train and test read TRAIN, adaptation reads TEST."""
    (tmp_path / "Epilepsy2_TRAIN.ts").write_text(TS)
    (tmp_path / "Epilepsy2_TEST.ts").write_text(TS + "4,5,6:1\n")
    for split, E in (("train", 2), ("test", 2), ("adapt-train", 3), ("adapt-test", 3)):
        envs = data.load("epilepsy2", split, data_dir=tmp_path)
        assert envs.x.shape == (E, 1, 3, 1)
    np.testing.assert_array_equal(envs.x[:, 0, :, 0], [[0.5, 1.5, 2.5], [1, 2, 3], [4, 5, 6]])
    assert envs.labels.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(envs.t[0], [0, 0.5, 1])
    refused("split 'valid'", data.epilepsy2, tmp_path, "valid")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("1,2,3:0", "1,2:0", "environment 1 has 1 × 2 values, the first one 1 × 3"),
        ("1,2,3:0", "1,?,3:0", "line 8, value 2"),
        ("1,2,3:0", "1,2,3:7", "class '7'"),
        ("1,2,3:0", "1,2,3:1,2:0", "unequal"),
        ("1,2,3:0", "1,NaN,3:0", "environment 1 .*time index 1"),
        ("1,2,3:0", "1,2,3", "class '1,2,3'"),
        ("@classLabel true 0 1", "@classLabel false", "class '1'"),
        ("@data", "", "before @data"),
        ("@data\n0.5,1.5,2.5:1\n1,2,3:0\n", "@data", "no series"),
    ],
)
def test_epilepsy2_refuses(tmp_path: Path, old: str, new: str, match: str):
    """Each way a .ts file can be wrong is named."""
    assert old in TS
    (tmp_path / "Epilepsy2_TRAIN.ts").write_text(TS.replace(old, new))
    refused(match, data.epilepsy2, tmp_path, "train")


# load


def test_load_names():
    """An unknown name lists the known ones, an unknown split the splits."""
    message = refused("unknown", data.load, "odebench-5", "train")
    assert all(name in message for name in data.NAMES)
    for name in (
        "odebench-4",
        "lotka-volterra",
        "glycolytic",
        "selkov",
        "selkov-files",
        "epilepsy2",
        "a.csv",
    ):
        message = refused("split 'valid'", data.load, name, "valid")
        assert all(split in message for split in data.SPLITS)
    refused("ODEBench variant", data.odebench, "odebench-5", "train", 0)
    refused("seed -1", data.load, "odebench-2", "train", seed=-1)


def test_load_paths(tmp_path: Path):
    """A path is the train split; with {split} in it, every split has its file."""
    envs = small()
    for split in ("train", "adapt-test"):
        np.savez(tmp_path / f"{split}.npz", X=envs.x, t=envs.t)
    (tmp_path / "a.csv").write_text("\n".join(CSV))
    assert len(data.load(str(tmp_path / "a.csv"), "train")) == 2
    refused(r"one file is the train split only.*\{split\}", data.load, str(tmp_path / "a.csv"), "test")
    np.testing.assert_array_equal(data.load(str(tmp_path / "{split}.npz"), "adapt-test").x, envs.x)
    refused("no such file", data.load, str(tmp_path / "{split}.npz"), "test")


def test_load_released_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Released files that are nowhere: the line names the file and the ways to give it."""
    monkeypatch.delenv("METAZOO_DATA", raising=False)
    message = refused("not found", data.load, "selkov-files", "adapt-train", data_dir=tmp_path)
    assert "ood_train.npz" in message
    assert "METAZOO_DATA" in message


def test_load_released_format(tmp_path: Path):
    """A file of the real layout in data_dir gets the generator's parameters, names and families."""
    ours = data.selkov("train", 0)
    np.savez(tmp_path / "train.npz", X=ours.x, t=ours.t[0])
    theirs = data.load("selkov-files", "train", data_dir=tmp_path)
    assert theirs.parameters == ours.parameters
    assert theirs.names == ours.names
    np.testing.assert_array_equal(theirs.family, ours.family)
    np.savez(tmp_path / "train.npz", X=ours.x[:5], t=ours.t[0])  # another grid: nothing is claimed about it
    assert data.load("selkov-files", "train", data_dir=tmp_path).family is None
