"""Contextual self-modulation: the Taylor identities, and the fast form inside the model."""

from __future__ import annotations

import pytest
import torch
from mixer.modulation import nearest, taylor
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


def _naive(model: torch.nn.Module, x: torch.Tensor, xi: torch.Tensor, xi0: torch.Tensor, order: int) -> torch.Tensor:
    route = model.route(xi0)  # the neighbour's gate chooses

    def f(z: torch.Tensor) -> torch.Tensor:
        out = model.vector_field(x, z, expert=route)
        if model.gate == "gradient":
            out = model.gate_probabilities(z).gather(1, route[:, None])[:, :, None] * out
        return out

    return taylor(f, xi, xi0, order)


def test_nearest_starts_with_itself() -> None:
    """Mean absolute distance, ascending; against a sort by hand."""
    contexts = rows(4)
    found = nearest(contexts, contexts, 3)
    assert torch.equal(found[:, 0], contexts)
    for b in range(5):
        order = sorted(range(5), key=lambda e: (contexts[b] - contexts[e]).abs().mean().item())
        assert torch.equal(found[b], contexts[order[:3]])
