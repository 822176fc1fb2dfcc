"""Solvers and finite differences: order, own time grids, closed forms."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo.errors import UserError
from mixer.solve import adaptive, derivatives, rk4

OMEGA = torch.tensor([1.0, 1.7, 0.4], dtype=torch.float64)[:, None]


def oscillators(x: torch.Tensor) -> torch.Tensor:
    """x'' = −ω²x, one ω per environment. [3, I, 2]."""
    return torch.stack([x[..., 1], -(OMEGA**2) * x[..., 0]], dim=-1)


def truth(t: torch.Tensor, x0: torch.Tensor) -> torch.Tensor:
    angle = (OMEGA * (t - t[:, :1]))[:, None]
    x, v, w = x0[..., :1], x0[..., 1:], OMEGA[..., None]
    return torch.stack([x * angle.cos() + v / w * angle.sin(), -w * x * angle.sin() + v * angle.cos()], dim=-1)


def setting(steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Three environments on three different grids, two trajectories each."""
    t = torch.stack([torch.linspace(a, b, steps + 1, dtype=torch.float64) for a, b in ((0, 2), (1, 4), (0, 7))])
    return t, torch.tensor([[1.0, 0.0], [0.3, -0.8]], dtype=torch.float64).expand(3, 2, 2)


def test_rk4_has_order_four() -> None:
    """Check 9: halving h divides the error by 16 on the harmonic oscillator."""
    errors = []
    for steps in (20, 40, 80):
        t, x0 = setting(steps)
        errors.append((rk4(oscillators, t, x0)[:, :, -1] - truth(t, x0)[:, :, -1]).abs().amax((1, 2)))
    for before, after in itertools.pairwise(errors):
        assert ((before / after - 16).abs() < 1.5).all()


def test_every_environment_has_its_own_grid() -> None:
    """Three grids at once are three solves, and uneven samples are met."""
    t, x0 = setting(12)
    uneven = t + torch.linspace(0, 0.05, 13, dtype=torch.float64).sin() * torch.arange(3)[:, None]
    together = rk4(oscillators, uneven, x0, substeps=4)
    for e in range(3):

        def alone(x: torch.Tensor, e: int = e) -> torch.Tensor:
            return torch.stack([x[..., 1], -(OMEGA[e] ** 2) * x[..., 0]], dim=-1)

        assert torch.allclose(rk4(alone, uneven[e : e + 1], x0[e : e + 1], substeps=4)[0], together[e], atol=1e-14)
    assert torch.allclose(together, truth(uneven, x0), atol=1e-4)


def test_substeps_are_finer_samples() -> None:
    t, x0 = setting(10)
    fine = torch.stack([torch.linspace(g[0], g[-1], 31, dtype=torch.float64) for g in t])
    assert torch.allclose(rk4(oscillators, t, x0, substeps=3), rk4(oscillators, fine, x0)[:, :, ::3], atol=1e-12)


def test_adaptive_meets_the_truth_on_own_grids() -> None:
    t, x0 = setting(9)
    found = adaptive(oscillators, t, x0, rtol=1e-8, atol=1e-10)
    assert torch.allclose(found, truth(t, x0), atol=1e-6)


def test_adaptive_has_the_gradient_of_many_small_steps() -> None:
    t, x0 = setting(4)
    grads = []
    for solve in (
        lambda x: adaptive(oscillators, t, x, rtol=1e-8, atol=1e-10),
        lambda x: rk4(oscillators, t, x, substeps=40),
    ):
        start = x0.clone().requires_grad_()
        grads.append(torch.autograd.grad(solve(start)[:, :, 1:].square().sum(), start)[0])
    assert torch.allclose(*grads, rtol=1e-5, atol=1e-6)


def test_one_hard_environment_keeps_its_accuracy_among_many_easy_ones() -> None:
    """The tolerance holds for the worst trajectory: 200 environments at rest do not loosen it."""

    def field(x: torch.Tensor) -> torch.Tensor:
        speed = torch.zeros(len(x), 1, dtype=x.dtype)
        speed[0] = 6.0
        return torch.stack([x[..., 1], -(speed**2) * x[..., 0]], dim=-1)

    def error(count: int) -> float:
        t = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.float64).repeat(count, 1)
        x0 = torch.zeros(count, 1, 2, dtype=torch.float64)
        x0[0, 0, 0] = 1.0
        return abs(adaptive(field, t, x0, rtol=1e-4, atol=1e-6)[0, 0, -1, 0].item() - math.cos(18.0))

    assert error(201) < 1.05 * error(1)


def test_adaptive_that_cannot_go_on_says_so() -> None:
    t, x0 = setting(3)
    with pytest.raises(UserError, match=r"dopri5 cannot go on between times 0 and 1 .*: lower the learning rate"):
        adaptive(lambda x: x * float("nan"), t, x0)


def test_missing_torchdiffeq_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "torchdiffeq":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(UserError, match=r"metazoo-mixer\[adaptive\]"):
        adaptive(oscillators, *setting(3))


def test_lotka_volterra_keeps_its_constant() -> None:
    """Check 9: V = δx − γ ln x + βy − α ln y stays within 1e-4 along a solution."""
    alpha, beta, gamma, delta = 0.5, 0.75, 0.5, 0.5

    def prey(x: torch.Tensor) -> torch.Tensor:
        a, b = x.unbind(-1)
        return torch.stack([alpha * a - beta * a * b, delta * a * b - gamma * b], -1)

    t = torch.linspace(0, 10, 21, dtype=torch.float64)[None]
    x = rk4(prey, t, torch.tensor([[[1.0, 1.5]]], dtype=torch.float64), substeps=5)[0, 0]
    v = delta * x[:, 0] - gamma * x[:, 0].log() + beta * x[:, 1] - alpha * x[:, 1].log()
    assert (v - v[0]).abs().max() < 1e-4


@settings(max_examples=40, deadline=None)
@given(gaps=st.lists(st.floats(0.05, 2.0), min_size=3, max_size=12), seed=st.integers(0, 99))
def test_derivatives_are_numpys(gaps: list[float], seed: int) -> None:
    """numpy.gradient with edge_order=2, for each environment on its own uneven grid."""
    rng = np.random.default_rng(seed)
    t = np.stack([np.cumsum([0.0, *gaps]), np.cumsum([1.0, *gaps[::-1]])])
    x = rng.standard_normal((2, 3, t.shape[1], 2))
    found = derivatives(torch.from_numpy(t), torch.from_numpy(x)).numpy()
    for e in range(2):
        assert np.allclose(found[e], np.gradient(x[e], t[e], axis=1, edge_order=2), rtol=1e-9, atol=1e-9)


def test_derivatives_need_three_times() -> None:
    with pytest.raises(UserError, match="3 times or more, got 2"):
        derivatives(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 1, 2, 1))


def test_gradient_of_a_solution() -> None:
    """d x(T)/d x0 of the oscillator is the rotation by ωT."""
    t, x0 = setting(60)
    start = x0.clone().requires_grad_()
    (grad,) = torch.autograd.grad(rk4(oscillators, t, start)[0, 0, -1, 0], start)
    assert math.isclose(grad[0, 0, 0].item(), math.cos(2.0), abs_tol=1e-6)
    assert math.isclose(grad[0, 0, 1].item(), math.sin(2.0), abs_tol=1e-6)
