"""AdaBelief (Zhuang et al., 2020), the optimizer of the paper's code, as a torch.optim.Optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch


class AdaBelief(torch.optim.Optimizer):
    """Adam whose second moment is that of the gradient's deviation from its running mean (Algorithm 2 there).

    m ← β₁ m + (1−β₁) g;  s ← β₂ s + (1−β₂)(g−m)² + ε;  θ ← θ − lr · m̂ / (√ŝ + ε), with bias-corrected m̂, ŝ.
    The released MixER code uses optax's, whose deviation is from the mean before this step and whose ε is 1e-16:
    those are the defaults here.

    Args:
        params: parameters; each parameter of a group with ``shared=True`` is a stack over experts (dim 0) that share
            one state: the experts are updated one after the other (``same_expert_optstate`` of the released code).
        lr: learning rate.
        betas: decay of the two moments.
        eps: ε.
    """

    def __init__(
        self,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-16,
        shared: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "shared": shared})
        for group in self.param_groups:
            for p in group["params"]:
                like = p[0] if group["shared"] else p
                self.state[p] = {
                    "step": 0,
                    "mean": torch.zeros_like(like, requires_grad=False),
                    "belief": torch.zeros_like(like, requires_grad=False),
                }

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            held = [p for p in group["params"] if p.grad is not None]
            if not held:
                continue
            states = [self.state[p] for p in held]
            if group["shared"]:
                for expert in range(held[0].shape[0]):
                    self._update([p[expert] for p in held], [p.grad[expert] for p in held], states, group)
            else:
                self._update(held, [p.grad for p in held], states, group)
        return loss

    @staticmethod
    def _update(
        params: list[torch.Tensor], grads: list[torch.Tensor], states: list[dict[str, Any]], group: dict[str, Any]
    ) -> None:
        beta1, beta2 = group["betas"]
        means, beliefs = [state["mean"] for state in states], [state["belief"] for state in states]
        for state in states:
            state["step"] += 1
        step = states[0]["step"]
        deviations = torch._foreach_sub(grads, means)
        torch._foreach_lerp_(means, grads, 1 - beta1)
        torch._foreach_mul_(beliefs, beta2)
        torch._foreach_addcmul_(beliefs, deviations, deviations, value=1 - beta2)
        torch._foreach_add_(beliefs, group["eps"])
        scale = torch._foreach_div(beliefs, 1 - beta2**step)
        torch._foreach_sqrt_(scale)
        torch._foreach_add_(scale, group["eps"])
        torch._foreach_addcdiv_(params, means, scale, value=-group["lr"] / (1 - beta1**step))
