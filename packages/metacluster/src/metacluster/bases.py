"""The functions that a KAN's edges are made of: B-splines, radial functions, polynomials, Fourier.

Each basis is a module that maps x [...] to its values, in a new dimension ``dim`` of the result (the last by default),
and has a ``size``, the number of functions. Polynomials and Gram take tanh(x), which lies in [-1, 1].
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from metazoo.errors import UserError
from torch import nn

CHUNK = 8192  # inputs worked on at once on a CPU: their basis functions stay in its cache


def _check(**sizes: tuple[int, int]) -> None:
    for name, (value, least) in sizes.items():
        if value < least:
            raise UserError(f"{name} is {value}, which gives no basis: use {least} or more")


def _check_range(low: float, high: float) -> None:
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"range ({low}, {high}) is empty: give the lower end first")


def _numbers(x: torch.Tensor, dim: int, count: int, start: float) -> torch.Tensor:
    """start, start + 1, … (``count`` of them) along ``dim`` of what x becomes with a new dimension there."""
    shape = [1] * (x.ndim + 1)
    shape[dim] = count
    return torch.arange(count, dtype=x.dtype, device=x.device).add_(start).view(shape)


def _centred(x: torch.Tensor, dim: int, count: int, start: float) -> torch.Tensor:
    """x − (start + j), j = 0 … count − 1 in a new dimension ``dim``."""
    return x.unsqueeze(dim) - _numbers(x, dim, count, start)


def cardinal_spline(t: torch.Tensor, order: int, derivative: int = 0) -> torch.Tensor:
    """The B-spline of ``order`` k on knots one apart, centred at 0, or a derivative of it. Overwrites ``t``.

    B(t) = 1/k! Σ_i (−1)^i C(k+1, i) (m − i − |t|)₊^k with m = (k+1)/2, the truncated powers of de Boor's book
    folded at 0. No recursion: the same values as Cox and de Boor's in a third of the memory traffic.
    """
    if derivative > order:
        return t.zero_()
    power = order - derivative
    sign = t.sign().neg_() if derivative % 2 else None
    t.abs_().neg_()
    m = (order + 1) / 2
    total: torch.Tensor | None = None
    for i in range(math.ceil(m)):
        base = (t + (m - i)).clamp_(min=0)
        term = (base > 0).to(t.dtype) if power == 0 else base
        for _ in range(power - 1):
            term = term * base
        weight = (-1) ** i * math.comb(order + 1, i) / math.factorial(power)
        total = term.mul(weight) if total is None else total.add_(term, alpha=weight)
    assert total is not None
    return total if sign is None else total.mul_(sign)


class _Splines(torch.autograd.Function):
    """Values (or a derivative) of all B-splines at t, in units of the grid; keeps t alone for the backward pass."""

    @staticmethod
    def forward(ctx: Any, t: torch.Tensor, dim: int, grid: int, order: int, derivative: int) -> torch.Tensor:
        ctx.save_for_backward(t)
        ctx.settings = dim, grid, order, derivative
        count, start = grid + order, (1 - order) / 2  # centre of the first one
        rows = _rows(t)
        if len(t) <= rows:
            return cardinal_spline(_centred(t, dim, count, start), order, derivative)
        shape = list(t.shape)
        shape.insert(dim if dim >= 0 else t.ndim + 1 + dim, count)
        values = t.new_empty(shape)
        for out, part in zip(values.split(rows), t.split(rows), strict=True):
            out.copy_(cardinal_spline(_centred(part, dim, count, start), order, derivative))
        return values

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        (t,), (grad,) = ctx.saved_tensors, grads
        dim, grid, order, derivative = ctx.settings
        if torch.is_grad_enabled():  # a second derivative is wanted
            slope = _Splines.apply(t, dim, grid, order, derivative + 1)
            return (grad * slope).sum(dim), None, None, None, None
        count, start, rows = grid + order, (1 - order) / 2, _rows(t)
        total = torch.empty_like(t)
        for out, part, upstream in zip(total.split(rows), t.split(rows), grad.split(rows), strict=True):
            slope = cardinal_spline(_centred(part, dim, count, start), order, derivative + 1)
            out.copy_(slope.mul_(upstream).sum(dim))
        return total, None, None, None, None


def _rows(t: torch.Tensor) -> int:
    """Rows of t [N, ...] worked on at once."""
    if t.device.type != "cpu" or t.numel() == 0:
        return max(1, len(t))
    return max(1, CHUNK * len(t) // t.numel())


class BSpline(nn.Module):
    """B-splines on uniform knots t_j = low + (j − order)·h, h = (high − low)/grid, j = 0 … grid + 2·order.

    The grid + order functions sum to 1 on [low, high] and are 0 from order·h outside it on: there an edge has its base
    term alone. An input outside [low, high] is not refused (see :meth:`outside`).

    Args:
        grid: intervals of [low, high]. order: k ≥ 1.

    Raises:
        UserError: sizes that give no basis, an empty range.
    """

    def __init__(self, grid: int = 5, order: int = 3, low: float = -1.0, high: float = 1.0) -> None:
        super().__init__()
        _check(grid=(grid, 1), order=(order, 1))
        _check_range(low, high)
        self.grid, self.order, self.low, self.high = grid, order, low, high
        self.size = grid + order

    def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        t = (x - self.low) * (self.grid / (self.high - self.low))
        if t.ndim == 0:
            return self.forward(x.unsqueeze(0))[0]
        return _Splines.apply(t, dim, self.grid, self.order, 0)  # type: ignore[no-any-return]

    def outside(self, x: torch.Tensor) -> torch.Tensor:
        """Where x [...] leaves [low, high]."""
        return (x < self.low) | (x > self.high)


class GaussianRBF(nn.Module):
    """FastKAN's radial functions exp(−((x − u_g)/h)²), centres u_g evenly from low to high, h their spacing.

    Args:
        centres: 2 or more.

    Raises:
        UserError: sizes that give no basis, an empty range.
    """

    def __init__(self, centres: int = 8, low: float = -2.0, high: float = 2.0) -> None:
        super().__init__()
        _check(centres=(centres, 2))
        _check_range(low, high)
        self.size, self.low, self.high = centres, low, high

    def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        t = (x - self.low) * ((self.size - 1) / (self.high - self.low))
        return _centred(t, dim, self.size, 0.0).square().neg().exp()

    def outside(self, x: torch.Tensor) -> torch.Tensor:
        """Where x [...] is more than two spacings from every centre: all functions are below exp(−4) there."""
        margin = 2 * (self.high - self.low) / (self.size - 1)
        return (x < self.low - margin) | (x > self.high + margin)


class _Polynomials(nn.Module, ABC):
    """Base of the polynomial families: P_0 = 1, P_1 = u, a recurrence from there on, u = tanh(x)."""

    def __init__(self, degree: int = 3) -> None:
        super().__init__()
        _check(degree=(degree, 1))
        self.degree, self.size = degree, degree + 1

    def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        u = x.tanh()
        values = [torch.ones_like(u), u]
        for n in range(1, self.degree):
            values.append(self.following(n, u, values[n], values[n - 1]))
        return torch.stack(values, dim)

    @abstractmethod
    def following(self, n: int, u: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        """P_{n+1} from P_n and P_{n−1}."""

    def outside(self, x: torch.Tensor) -> torch.Tensor:
        """Nowhere: tanh takes every x into the range."""
        return torch.zeros_like(x, dtype=torch.bool)


class Chebyshev(_Polynomials):
    """T_{n+1} = 2 u T_n − T_{n−1}; not cos(n·arccos u), whose gradient is infinite at ±1."""

    def following(self, n: int, u: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return 2 * u * now - before


class Legendre(_Polynomials):
    """(n + 1) P_{n+1} = (2n + 1) u P_n − n P_{n−1}."""

    def following(self, n: int, u: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        return ((2 * n + 1) * u * now - n * before) / (n + 1)


class Gram(_Polynomials):
    """Discrete orthogonal polynomials P_{n+1} = u P_n − β(n, n+1) P_{n−1} with learned factors (KAGN).

    β(n, m) = (m + n)(m − n) n² / (m² / (4n² − 1)) · b_n as in torch-conv-kan (kagn_conv.py), b ``beta`` [degree + 1];
    that code also sends the polynomials through SiLU, this one does not. β stays dense when coefficients are shared.
    """

    def __init__(self, degree: int = 3) -> None:
        super().__init__(degree)
        self.beta = nn.Parameter(torch.zeros(degree + 1))

    def following(self, n: int, u: torch.Tensor, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
        m = n + 1
        factor = (m + n) * (m - n) * n**2 / (m**2 / (4 * n**2 - 1))
        return u * now - factor * self.beta[n] * before


class Fourier(nn.Module):
    """[cos x, …, cos Nx, sin x, …, sin Nx].

    Raises:
        UserError: no frequency.
    """

    def __init__(self, frequencies: int = 4) -> None:
        super().__init__()
        _check(frequencies=(frequencies, 1))
        self.frequencies, self.size = frequencies, 2 * frequencies

    def forward(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        angles = x.unsqueeze(dim) * _numbers(x, dim, self.frequencies, 1.0)
        return torch.cat([angles.cos(), angles.sin()], dim)

    def outside(self, x: torch.Tensor) -> torch.Tensor:
        """Nowhere: the functions are periodic."""
        return torch.zeros_like(x, dtype=torch.bool)


Basis = BSpline | GaussianRBF | Chebyshev | Legendre | Gram | Fourier

BASES: dict[str, type[Basis]] = {
    "bspline": BSpline,
    "rbf": GaussianRBF,
    "chebyshev": Chebyshev,
    "legendre": Legendre,
    "gram": Gram,
    "fourier": Fourier,
}


def make(basis: str | Mapping[str, Any] | Basis) -> Basis:
    """A basis by its name with its default sizes, by its settings {"name": …, sizes}, or the given one.

    Raises:
        UserError: unknown name or setting.
    """
    if isinstance(basis, nn.Module):
        return basis
    settings = {"name": basis} if isinstance(basis, str) else dict(basis)
    name = settings.pop("name", None)
    if name not in BASES:
        raise UserError(f"unknown basis {name!r}: one of {', '.join(BASES)}")
    try:
        return BASES[name](**settings)
    except TypeError as error:
        raise UserError(f"basis {name}: {error}") from error


def settings(basis: Basis) -> dict[str, Any]:
    """What :func:`make` needs to make the same basis."""
    if isinstance(basis, BSpline):
        return {"name": "bspline", "grid": basis.grid, "order": basis.order, "low": basis.low, "high": basis.high}
    if isinstance(basis, GaussianRBF):
        return {"name": "rbf", "centres": basis.size, "low": basis.low, "high": basis.high}
    if isinstance(basis, Fourier):
        return {"name": "fourier", "frequencies": basis.frequencies}
    return {"name": type(basis).__name__.lower(), "degree": basis.degree}
