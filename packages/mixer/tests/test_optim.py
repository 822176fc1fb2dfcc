"""AdaBelief against numbers worked by hand, and against its own form with one state for all experts."""

from __future__ import annotations

import torch
from mixer.optim import AdaBelief


def test_two_steps_by_hand() -> None:
    """g = 1, then 3, lr 0.1. Step 1: m = .1, s = .001·(1−0)²; m̂ = ŝ = 1 -> θ = −0.1.
    Step 2: deviation 3 − .1 = 2.9, m = .9·.1 + .1·3 = .39, s = .999·.001 + .001·2.9²."""
    p = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = AdaBelief([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.allclose(p, torch.tensor([-0.1], dtype=torch.float64), atol=1e-12)
    p.grad = torch.full_like(p, 3.0)
    optimizer.step()
    belief = (0.999 * 0.001 + 0.001 * 2.9**2) / (1 - 0.999**2)
    expected = -0.1 - 0.1 * (0.39 / (1 - 0.9**2)) / belief**0.5
    assert torch.allclose(p, torch.tensor([expected], dtype=torch.float64), atol=1e-10)


def test_scale_of_the_gradient_does_not_matter() -> None:
    """ε is 1e-16: a loss a thousand times larger takes the same steps."""
    steps = []
    for scale in (1.0, 1000.0):
        p = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
        optimizer = AdaBelief([p], lr=0.01)
        for _ in range(20):
            optimizer.zero_grad()
            (scale * (p**2 + p.sin()).sum()).backward()
            optimizer.step()
        steps.append(p.detach())
    assert torch.allclose(*steps, rtol=1e-6)


def test_shared_state_updates_one_expert_after_the_other() -> None:
    """A stack of experts with one state equals one parameter that gets the experts' gradients in turn."""
    grads = torch.tensor([[[1.0, 2.0], [3.0, -1.0]], [[0.5, 0.1], [-2.0, 4.0]]], dtype=torch.float64)  # [step, M, n]
    stack = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    shared = AdaBelief([{"params": [stack], "shared": True}], lr=0.1)
    turns = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    single = AdaBelief([turns], lr=0.1)
    moved = torch.zeros(2, 2, dtype=torch.float64)
    for of_step in grads:
        stack.grad = of_step.clone()
        shared.step()
        for expert, grad in enumerate(of_step):
            before = turns.detach().clone()
            turns.grad = grad.clone()
            single.step()
            moved[expert] += turns.detach() - before
    assert torch.allclose(stack.detach(), moved, atol=1e-12)
