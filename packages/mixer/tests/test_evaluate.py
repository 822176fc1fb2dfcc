"""Metrics by hand, adaptation, and the estimator on somebody's own trajectories."""

from __future__ import annotations

import doctest
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from metazoo.errors import UserError
from metazoo.options import RunOptions
from mixer import regressor
from mixer.config import Config, EvaluateOptions
from mixer.data import generate, load
from mixer.evaluate import adapt, evaluate, purity, rel_mse, relative_field_error, routing_ari
from mixer.regressor import MixERRegressor
from mixer.train import Run, train
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

TINY = Config(
    dataset="odebench-4", every=10, experts=4, context_size=8, width=8, depth=2, contributors=5, outer_steps=3,
    inner_steps=(6, 6), gate_every=2,
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(TINY, RunOptions(output_dir=tmp_path_factory.mktemp("runs") / "run", log_every=6))


def test_metrics_by_hand() -> None:
    """‖x̂−x‖²/‖x‖²: (3²+4²)/(3²+4²) = 1 at one time and 0 at the other; the field's ratio sums before it divides."""
    truth = torch.tensor([[[[3.0, 4.0], [1.0, 0.0]]]])
    predicted = torch.tensor([[[[0.0, 0.0], [1.0, 0.0]]]])
    assert rel_mse(predicted, truth).tolist() == [0.5]
    slope = torch.tensor([[[1.0, 0.0], [3.0, 0.0]]])
    assert torch.allclose(relative_field_error(slope + 1, slope), torch.tensor([4 / 10]))
    family = np.array([0, 0, 1, 1])
    assert routing_ari(torch.tensor([3, 3, 1, 1]), family) == 1.0
    assert routing_ari(torch.tensor([2, 2, 2, 2]), family) == 0.0
    assert purity(np.array([0, 0, 0, 1]), family) == 0.75


def test_evaluate_writes_metrics_and_plots(run: Run) -> None:
    found = evaluate(run.folder, EvaluateOptions(adapt_steps=3))
    assert {"mse", "rel_mse", "field_error", "routing_ari", "experts_used", "adapt_mse"} <= set(found)
    assert all(np.isfinite(value) for value in found.values())
    for name in ("evaluation.json", "contexts.png", "trajectories.png"):
        assert (run.folder / name).stat().st_size > 0


def test_bulk_adaptation_is_one_by_one(run: Run) -> None:
    """Environments do not disturb each other, and the experts are left as they were."""
    new = load("odebench-4", "adapt-train").subsample(10)
    before = [p.detach().clone() for p in run.model.parameters()]
    together = adapt(run.model, new, run.config, steps=5)
    alone = adapt(run.model, new, run.config, steps=5, bulk=False)
    assert torch.allclose(together.contexts, alone.contexts, rtol=1e-3, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, run.model.parameters(), strict=True))


def test_probe_keeps_the_best_expert(run: Run) -> None:
    """Its support loss is at most that of the gate's choice, as that expert was tried too."""
    new = load("odebench-4", "adapt-train").subsample(10)
    probe = adapt(run.model, new, run.config, steps=20, strategy="probe")
    paper = adapt(run.model, new, run.config, steps=0)
    assert (probe.losses <= paper.losses + 1e-6).all()
    slices = run.model.slices(probe.contexts)
    for e, expert in enumerate(probe.experts):
        assert slices[e, expert].any()
        assert slices[e].abs().sum() == slices[e, expert].abs().sum()


def test_adaptation_wants_the_same_states(run: Run) -> None:
    with pytest.raises(UserError, match="have 7 states, the model was trained on 2"):
        adapt(run.model, load("glycolytic", "adapt-train"), run.config, steps=1)


def decays() -> tuple[np.ndarray, np.ndarray]:
    """Six environments of x' = −r x, two trajectories each, on their own grids."""
    rates = np.array([0.5, 0.6, 0.7, 2.0, 2.2, 2.4])
    t = np.linspace(0, 2, 21)[None] * np.linspace(0.8, 1.2, 6)[:, None]
    x0 = np.array([1.0, 2.0])
    return (x0[None, :, None] * np.exp(-rates[:, None, None] * t[:, None]))[..., None], t


def test_regressor_learns_and_adapts(tmp_path: Path) -> None:
    """Own arrays, own time grids: a better fit than the mean, new environments by contexts alone, a run folder."""
    x, t = decays()
    model = MixERRegressor(
        experts=2, context_size=2, width=16, objective="derivative", outer_steps=25, output_dir=tmp_path / "run"
    ).fit(x, t)
    assert model.score(x, t) > 0.9
    assert model.contexts_.shape == (6, 4)
    assert set(model.assignments_) <= {0, 1}
    assert model.predict(-1, x[-1, :, 0], t[-1]).shape == (2, 21, 1)
    adapted = model.adapt(x[:2, :1], t[:2], steps=100)
    assert np.abs(adapted.predict(0, x[0, :, 0], t[0]) - x[0]).mean() < 0.2
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def test_regressor_follows_the_protocol() -> None:
    model = MixERRegressor(experts=3, lr=1e-2)
    assert clone(model).get_params() == model.get_params()
    assert model.set_params(width=8).width == 8
    with pytest.raises(NotFittedError):
        model.predict(0, np.zeros((1, 1)), [0.0, 1.0])
    with pytest.raises(NotFittedError):
        model.adapt(*decays())


def bad_inputs() -> list[tuple[Any, Any, str]]:
    x, t = decays()
    broken, unsorted = x.copy(), t.copy()
    broken[3, 1, 7, 0] = np.nan
    unsorted[2, 5] = unsorted[2, 4]
    ragged = [list(x[0]), list(x[1][:1])]
    return [
        (broken, t, "environment 3"),
        (x, unsorted, "environment 2"),
        (ragged, t[:2], "environment"),
        (x[:1], t[:1], "--experts is 2, but"),
    ]


@pytest.mark.parametrize("case", range(4))
def test_regressor_refuses_bad_data(case: int) -> None:
    x, t, message = bad_inputs()[case]
    with pytest.raises(UserError) as error:
        MixERRegressor(experts=2, outer_steps=1).fit(x, t)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_example_in_the_docstring() -> None:
    results = doctest.testmod(regressor)
    assert results.attempted > 3
    assert results.failed == 0


def test_generated_csv_trains(tmp_path: Path) -> None:
    """What `mixer generate` writes is what `mixer train --dataset FILE` reads, to the last bit."""
    from mixer.config import GenerateOptions

    for name in ("own.csv", "own.npz"):
        generate(GenerateOptions(output=tmp_path / name))
        again = load(str(tmp_path / name), "train")
        assert np.array_equal(again.x, load("odebench-4", "train").x)
        with pytest.raises(UserError, match="exists"):
            generate(GenerateOptions(output=tmp_path / name))
    with pytest.raises(UserError, match="is read, not generated"):
        generate(GenerateOptions(dataset="epilepsy2", output=tmp_path / "e.csv"))
