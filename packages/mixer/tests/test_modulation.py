"""Contextual self-modulation: the Taylor identities, and the fast form inside the model."""

from __future__ import annotations

import pytest
import torch
from metazoo.errors import UserError
from mixer.model import MixER
from mixer.modulation import multiplication, nearest, relu_series, swish_series, taylor
from mixer.solve import rk4
from test_model import KINDS, batch, mixer


def quadratic(z: torch.Tensor) -> torch.Tensor:
    """Per row: a vector of three forms, quadratic in z."""
    generator = torch.Generator().manual_seed(0)
    h = torch.randn(3, 4, 4, generator=generator, dtype=torch.float64)
    j = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    return torch.einsum("bi,kij,bj->bk", z, h, z) + z @ j.T + 1


def rows(seed: int) -> torch.Tensor:
    return torch.randn(5, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_order_two_is_exact_for_a_quadratic_and_order_one_for_a_linear_map() -> None:
    """Check 1."""
    xi, xi0 = rows(1), rows(2)
    assert torch.allclose(taylor(quadratic, xi, xi0, 2), quadratic(xi), atol=1e-10)
    assert not torch.allclose(taylor(quadratic, xi, xi0, 1), quadratic(xi), atol=1e-2)
    linear = rows(3)[:3].T
    assert torch.allclose(taylor(lambda z: z @ linear, xi, xi0, 1), xi @ linear, atol=1e-12)


def test_order_two_is_the_second_taylor_polynomial() -> None:
    """Check 1: f(ξ') + 1.5 g(ξ') + 0.5 ∂g[v] = f + Jv + ½ vᵀHv, J and H taken in reverse mode."""

    def f(z: torch.Tensor) -> torch.Tensor:
        return (z.sin() * z.roll(1, -1)).sum(-1)

    xi, xi0 = rows(1), rows(2)
    for b in range(5):
        v = xi[b] - xi0[b]
        j = torch.autograd.functional.jacobian(f, xi0[b])
        h = torch.autograd.functional.hessian(f, xi0[b])
        expected = f(xi0[b]) + j @ v + 0.5 * v @ h @ v
        assert torch.allclose(taylor(f, xi[b], xi0[b], 2), expected, atol=1e-10)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_at_its_own_context_every_order_is_the_function(order: int) -> None:
    """Check 1: ξ' = ξ."""
    xi = rows(1)
    assert torch.allclose(taylor(quadratic, xi, xi.clone(), order), quadratic(xi), atol=1e-12)


@pytest.mark.parametrize("gate", ["least-squares", "gradient"])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", list(KINDS))
def test_expansion_along_the_line_is_the_expansion(kind: str, order: int, gate: str) -> None:
    """The model conditions once and differentiates along ξ' + s(ξ − ξ'); the naive form expands at every evaluation.
    Outputs, and gradients of weights and contexts, agree."""
    model = mixer(kind, gate=gate)
    _, _, xi = batch()
    x = torch.randn(7, 4, 3, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    outs, gradients = [], []
    for fast in (True, False):
        contexts = xi.clone().requires_grad_()
        around = nearest(contexts, contexts, 3)
        if fast:
            out = model.vector_field(x, contexts, neighbours=around, taylor_order=order)
        else:
            out = torch.stack([_naive(model, x, contexts, around[:, k], order) for k in range(3)], dim=1)
        wanted = [contexts, *(p for p in model.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(out.square().sum(), wanted))
        outs.append(out)
    assert outs[0].shape == (7, 3, 4, 3)
    assert torch.allclose(*outs, rtol=1e-9, atol=1e-10)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


def _naive(model: MixER, x: torch.Tensor, xi: torch.Tensor, xi0: torch.Tensor, order: int) -> torch.Tensor:
    route = model.route(xi0)  # the neighbour's gate chooses

    def f(z: torch.Tensor) -> torch.Tensor:
        out = model.rollout(x, z, expert=route) if model.recurrent else model.vector_field(x, z, expert=route)
        if model.gate == "gradient":
            factor = model.gate_probabilities(z).gather(1, route[:, None])
            out = factor.view(-1, *[1] * (out.ndim - 1)) * out
        return out

    return taylor(f, xi, xi0, order)


@pytest.mark.parametrize("gate", ["least-squares", "gradient"])
@pytest.mark.parametrize("order", [1, 2])
def test_expanded_recurrence_is_the_expansion(order: int, gate: str) -> None:
    """The shallow PLRNN in power series: outputs and gradients, with α clipped for some pairs and not for others."""
    model = mixer("shplrnn", split=False, gate=gate, hidden=4, alpha_min=0.05)
    xi = batch()[2]
    x = torch.randn(7, 2, 9, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    outs, gradients = [], []
    for fast in (True, False):
        contexts = xi.clone().requires_grad_()
        around = nearest(contexts, contexts, 3)
        if fast:
            out = model.rollout(x, contexts, neighbours=around, taylor_order=order)
        else:
            out = torch.stack([_naive(model, x, contexts, around[:, k], order) for k in range(3)], dim=1)
        wanted = [contexts, *(p for p in model.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(out.square().sum(), wanted))
        outs.append(out)
    alphas = model.condition(xi, model.route(xi))[-1]
    assert (alphas == 0.05).any()
    assert (alphas > 0.05).any()
    assert outs[0].shape == (7, 3, 2, 9, 3)
    assert torch.allclose(*outs, rtol=1e-9, atol=1e-10)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-7, atol=1e-9)


def test_trajectories_under_each_neighbour() -> None:
    """forward with a pool: each neighbour's expanded field solved from the same state on the environment's grid."""
    model = mixer("geps")
    times, x0, xi = batch(t=4)
    around = nearest(xi, xi, 2)
    found = model(times, x0, xi, neighbours=around, taylor_order=2, substeps=2)
    assert found.shape == (7, 2, 3, 4, 3)
    for k in range(2):

        def expanded(x: torch.Tensor, k: int = k) -> torch.Tensor:
            return _naive(model, x, xi, around[:, k], 2)

        assert torch.allclose(found[:, k], rk4(expanded, times, x0, substeps=2), rtol=1e-9, atol=1e-10)
    assert torch.allclose(found[:, 0], model(times, x0, xi, substeps=2), rtol=1e-9, atol=1e-10)  # itself comes first


def test_order_zero_does_not_look_at_the_pool() -> None:
    model = mixer("geps")
    times, x0, xi = batch(t=4)
    assert torch.equal(model(times, x0, xi, neighbours=nearest(xi, xi, 2)), model(times, x0, xi))


def test_unknown_order_is_refused() -> None:
    _, x0, xi = batch()
    with pytest.raises(UserError, match="taylor_order is 3: give 0, 1 or 2"):
        taylor(quadratic, rows(1), rows(2), 3)
    with pytest.raises(UserError, match="taylor_order is 3: give 0, 1 or 2"):
        mixer("geps").vector_field(x0, xi, neighbours=nearest(xi, xi, 2), taylor_order=3)


def test_power_series_by_hand() -> None:
    """(1 + 2s + 3s²)(4 + 5s + 6s²) = 4 + 13s + 28s² + …; relu of 1 − 2s + 3s² and of −1 + 2s; x·σ(βx) at x = s,
    β = 2: s·σ(2s) = s/2 + s²/2 + …"""

    def column(*values: float) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64).view(1, 1, -1)

    product = multiplication([torch.full((1, 1, 1), value, dtype=torch.float64) for value in (1, 2, 3)])
    assert (product @ column(4, 5, 6).mT).flatten().tolist() == [4, 13, 28]
    assert relu_series(column(1, -2, 3), 3).flatten().tolist() == [1, -2, 3]
    assert relu_series(column(-1, 2, 0), 3).abs().sum() == 0
    beta = [torch.tensor([value], dtype=torch.float64) for value in (2, 0, 0)]
    assert swish_series(column(0, 1, 0), beta).flatten().tolist() == [0, 0.5, 0.5]
    assert swish_series(column(0, 1), beta[:2]).flatten().tolist() == [0, 0.5]
    assert swish_series(column(1, 0, 0), [*beta[1:], beta[0] / 2]).flatten().tolist() == [0.5, 0, 0.25]  # β = s²


def test_nearest_starts_with_itself() -> None:
    """Mean absolute distance, ascending; against a sort by hand. The choice has no gradient, the chosen have one."""
    contexts = rows(4)
    found = nearest(contexts, contexts, 3)
    assert torch.equal(found[:, 0], contexts)
    for b in range(5):
        order = sorted(range(5), key=lambda e: (contexts[b] - contexts[e]).abs().mean().item())
        assert torch.equal(found[b], contexts[order[:3]])
    own = contexts.clone().requires_grad_()
    (grad,) = torch.autograd.grad(nearest(own, own, 1).sum(), own)
    assert torch.equal(grad, torch.ones_like(grad))
