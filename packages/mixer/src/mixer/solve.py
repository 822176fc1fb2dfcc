"""Solvers for many environments at once, each on its own time grid, and derivatives of trajectories.

Shapes: B environments (or pairs of environment and expert), I trajectories, T times, d states.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from metazoo.errors import UserError

Field = Callable[[torch.Tensor], torch.Tensor]  # x [B, I, d] -> dx/dt [B, I, d]; the systems are autonomous


def rk4(field: Field, t: torch.Tensor, x0: torch.Tensor, substeps: int = 1) -> torch.Tensor:
    """Classical Runge-Kutta of order 4 with ``substeps`` equal steps between two samples.

    Every environment has its own grid: only time is a loop, and a step's length is a tensor [B, 1, 1].

    Args:
        field: vector field of all environments, x [B, I, d] -> [B, I, d].
        t: sample times [B, T].
        x0: states at t[:, 0], [B, I, d].
        substeps: steps between two samples.

    Returns:
        States at the samples [B, I, T, d]; the first is x0.
    """
    h = (t.diff(dim=1) / substeps)[:, :, None, None].unbind(1)  # T−1 tensors [B, 1, 1]
    x, states = x0, [x0]
    for step in h:
        half, sixth = step / 2, step / 6
        for _ in range(substeps):
            k1 = field(x)
            k2 = field(torch.addcmul(x, k1, half))
            k3 = field(torch.addcmul(x, k2, half))
            k4 = field(torch.addcmul(x, k3, step))
            x = torch.addcmul(x, torch.add(k1 + k4, k2 + k3, alpha=2), sixth)
        states.append(x)
    return torch.stack(states, dim=2)


def adaptive(
    field: Field,
    t: torch.Tensor,
    x0: torch.Tensor,
    *,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    method: str = "dopri5",
) -> torch.Tensor:
    """Adaptive solver of torchdiffeq, segment by segment, so that every environment keeps its own times.

    Between samples k and k + 1 time runs as t = t_k + s·(t_{k+1} − t_k), s in [0, 1], in each environment; the step
    sizes in s are common, small enough for the trajectory with the largest error (torchdiffeq's own norm would average
    it away among many). The defaults are the tolerances of the released code.

    Args:
        field, t, x0: as in :func:`rk4`.
        rtol, atol: relative and absolute tolerance (in the states' unit).
        method: a solver of torchdiffeq.

    Returns:
        States at the samples [B, I, T, d].

    Raises:
        UserError: torchdiffeq is not installed, or the step size became 0 (a state that is not finite, or stiffness).
    """
    try:
        from torchdiffeq import odeint
    except ImportError as error:
        raise UserError("--solver dopri5 needs torchdiffeq: install metazoo-mixer[adaptive], or use rk4") from error
    ends = torch.tensor([0.0, 1.0], dtype=t.dtype, device=t.device)
    x, states = x0, [x0]
    for k, length in enumerate(t.diff(dim=1)[:, :, None, None].unbind(1)):

        def scaled(s: torch.Tensor, x: torch.Tensor, length: torch.Tensor = length) -> torch.Tensor:
            return length * field(x)

        try:
            x = odeint(scaled, x, ends, rtol=rtol, atol=atol, method=method, options={"norm": _largest})[-1]
        except AssertionError as error:  # how torchdiffeq says it
            raise UserError(
                f"{method} cannot go on between times {k} and {k + 1} ({error}): lower the learning rate, or use rk4"
            ) from error
        states.append(x)
    return torch.stack(states, dim=2)


def _largest(error: torch.Tensor) -> torch.Tensor:
    """Root mean square of the worst trajectory: [B, I, d] -> []."""
    return error.detach().square().mean(-1).amax().sqrt()


def derivatives(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Finite differences of second order on uneven grids, one-sided at the ends (as numpy.gradient, edge_order=2).

    Args:
        t: times [B, T], at least 3.
        x: states [B, I, T, d].

    Returns:
        dx/dt [B, I, T, d].
    """
    if t.shape[1] < 3:
        raise UserError(f"derivatives need 3 times or more, got {t.shape[1]}: use --objective trajectory")
    h = t.diff(dim=1)[:, None, :, None]  # [B, 1, T−1, 1]
    left, right = h[:, :, :-1], h[:, :, 1:]
    slope = x.diff(dim=2) / h  # of each segment
    inside = (right * slope[:, :, :-1] + left * slope[:, :, 1:]) / (left + right)
    first = slope[:, :, :1] + left[:, :, :1] * (slope[:, :, :1] - slope[:, :, 1:2]) / (left + right)[:, :, :1]
    last = slope[:, :, -1:] + right[:, :, -1:] * (slope[:, :, -1:] - slope[:, :, -2:-1]) / (left + right)[:, :, -1:]
    return torch.cat([first, inside, last], dim=2)
