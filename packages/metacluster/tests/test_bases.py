"""Each basis against its closed form, its derivatives, its range."""

from __future__ import annotations

from typing import Any

import naive
import numpy as np
import pytest
import torch
from metacluster import bases
from metazoo.errors import UserError

X = torch.linspace(-3.3, 3.3, 331, dtype=torch.float64)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize(("grid", "low", "high"), [(5, -1.0, 1.0), (1, -2.0, 0.5), (8, 0.0, 3.0)])
def test_splines_are_those_of_the_recursion(order: int, grid: int, low: float, high: float) -> None:
    """Folded truncated powers = Cox and de Boor's recursion, inside, at the knots' edges and outside."""
    basis = bases.BSpline(grid, order, low, high)
    x = X + 1e-7  # at a knot itself order 1 would depend on the side
    truth = naive.cox_de_boor(x.numpy(), grid, order, low, high)
    assert basis.size == truth.shape[1] == grid + order
    assert np.allclose(basis(x), truth, atol=1e-10)
    assert np.allclose(basis(x.float()), truth, atol=1e-5)


def test_splines_are_scipys() -> None:
    """A second witness: scipy's B-splines, and their derivatives, which are the backward pass."""
    from scipy.interpolate import BSpline

    knots = -1 + 0.4 * np.arange(-3, 9)
    x = torch.linspace(-0.99, 0.99, 57, dtype=torch.float64, requires_grad=True)
    values = bases.BSpline()(x)
    for j in range(8):
        spline = BSpline(knots, np.eye(8)[j], 3)
        assert np.allclose(values[:, j].detach(), spline(x.detach()), atol=1e-12)
        (slope,) = torch.autograd.grad(values[:, j].sum(), x, retain_graph=True)
        assert np.allclose(slope, spline(x.detach(), nu=1), atol=1e-10)


def test_splines_sum_to_one_inside_and_to_zero_far_outside() -> None:
    """Check 1 of the method: partition of unity on the grid; nothing beyond order·h of it."""
    total = bases.BSpline()(X).sum(-1)
    assert torch.allclose(total[(X >= -1) & (X <= 1)], torch.ones(1, dtype=torch.float64))
    assert not total[X.abs() > 1 + 3 * 0.4 + 1e-9].any()


def test_chunks_give_the_same_bits() -> None:
    """Worked on in parts or at once: the same values and gradients, in any dimension."""
    x = torch.randn(300, 50, requires_grad=True)  # more than CHUNK
    whole = torch.stack([bases.BSpline()(row) for row in x])
    assert torch.equal(bases.BSpline()(x), whole)
    assert torch.equal(bases.BSpline()(x, dim=1), whole.movedim(-1, 1))
    upstream = torch.randn_like(whole)
    (many,) = torch.autograd.grad(bases.BSpline()(x), x, upstream)
    (one,) = torch.autograd.grad(whole, x, upstream)
    assert torch.allclose(many, one, atol=1e-6)


@pytest.mark.parametrize("name", list(bases.BASES))
@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_gradients(name: str, dim: int) -> None:
    """First and second derivatives by finite differences; ``dim`` only moves the values."""
    basis = bases.make(name).double()
    if name == "gram":
        torch.nn.init.normal_(basis.beta)
    x = (torch.rand(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 2.6 - 1.3).requires_grad_()
    assert torch.equal(basis(x, dim=dim), basis(x).movedim(-1, dim))
    assert torch.autograd.gradcheck(lambda v: basis(v, dim=dim), (x,))
    assert torch.autograd.gradgradcheck(lambda v: basis(v, dim=dim), (x,))


def test_closed_forms() -> None:
    """T_n(cos θ) = cos nθ; Legendre's of NumPy; Gram's with β = 0 are powers; RBF is 1 at a centre; Fourier."""
    u = X.tanh()
    cheb = bases.Chebyshev(6)(X)
    assert torch.allclose(cheb, torch.stack([torch.cos(n * torch.arccos(u)) for n in range(7)], -1), atol=1e-9)
    legendre = np.polynomial.legendre.legvander(u.numpy(), 5)
    assert np.allclose(bases.Legendre(5)(X), legendre, atol=1e-12)
    assert torch.allclose(bases.Gram(4).double()(X), torch.stack([u**n for n in range(5)], -1))
    rbf = bases.GaussianRBF()
    centres = torch.linspace(-2, 2, 8)
    assert torch.allclose(rbf(centres).diagonal(), torch.ones(8))
    assert torch.allclose(rbf(X), torch.exp(-(((X[:, None] - centres.double()) / (4 / 7)) ** 2)), atol=1e-6)
    t = torch.arange(64, dtype=torch.float64) * 2 * torch.pi / 64
    fourier = bases.Fourier(3)(t)
    assert torch.allclose(fourier.T @ fourier / 32, torch.eye(6, dtype=torch.float64), atol=1e-12)
    assert torch.allclose(fourier[:, 4], torch.sin(2 * t))


def test_gram_recurrence() -> None:
    """P₂ = u² − β(1, 2)·b₁ with β(1, 2) = 3·1·1/(4/3); P₃ = u P₂ − β(2, 3) b₂ u with β(2, 3) = 5·1·4/(9/15)."""
    basis = bases.Gram(3).double()
    torch.nn.init.normal_(basis.beta)
    u, b = X.tanh(), basis.beta
    second = u**2 - (3 / (4 / 3)) * b[1]
    third = u * second - (20 / (9 / 15)) * b[2] * u
    assert torch.allclose(basis(X)[:, 2], second)
    assert torch.allclose(basis(X)[:, 3], third)


def test_outside() -> None:
    """Splines end with their grid, radial functions two spacings beyond it, the others nowhere."""
    x = torch.tensor([-1.01, -1.0, 0.0, 1.0, 1.01, 3.0, 3.2])
    assert bases.BSpline().outside(x).tolist() == [True, False, False, False, True, True, True]
    assert bases.GaussianRBF().outside(x).tolist() == [False] * 6 + [True]
    assert not bases.Fourier().outside(x).any()
    assert not bases.Gram().outside(x).any()


@pytest.mark.parametrize("name", list(bases.BASES))
def test_settings_make_the_same_basis(name: str) -> None:
    basis = bases.make(name)
    again = bases.make(bases.settings(basis))
    assert type(again) is type(basis)
    assert again.size == basis.size
    assert torch.equal(again(X), basis(X))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bases.BSpline(0), "grid is 0"),
        (lambda: bases.BSpline(5, 0), "order is 0"),
        (lambda: bases.BSpline(low=1.0, high=1.0), "range"),
        (lambda: bases.GaussianRBF(1), "centres is 1"),
        (lambda: bases.Gram(0), "degree is 0"),
        (lambda: bases.Fourier(0), "frequencies is 0"),
        (lambda: bases.make("wavelet"), "unknown basis 'wavelet'"),
        (lambda: bases.make({"name": "rbf", "degree": 3}), "basis rbf"),
    ],
)
def test_no_basis_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()
