"""MAML-TRPO (Finn et al. 2017): weights from which one policy-gradient step on a task's own episodes helps most.

Inner step (their equation 4): θ'_i = θ − α ∇_θ L_i(θ), L_i = −mean(log π_θ(a|s) A) on episodes of task i. Outer step:
a trust region (Schulman et al. 2015) for the mean over tasks of the surrogate at θ'_i(θ) on episodes after the
inner step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from metazoo import checkpoint, inner
from metazoo.inner import Params
from torch import Tensor, nn
from torch.distributions import Normal, kl_divergence
from torch.func import grad, grad_and_value, vjp

from trmrl.collect import collect, means_of, on_all, standard_normal, starts
from trmrl.config import Config
from trmrl.env import TaskVectorEnv, make_vector
from trmrl.model import GaussianHead, Sizes, Trials
from trmrl.ppo import NOISE, STARTS, TASKS, discounted_sums, log_prob, share_of_tasks, sizes_of

CG_STEPS, CG_DAMPING, CG_RESIDUAL = 10, 1e-5, 1e-10
BACKTRACK, BACKTRACKS = 0.8, 15
RIDGE, RIDGES = 1e-5, 5


class Batch(NamedTuple):
    """Episodes of tasks, ready for a gradient: (tasks, samples, …). Weights are 0 where an episode had ended, and add
    up to 1 over the samples of a task."""

    observations: Tensor
    actions: Tensor
    advantages: Tensor
    weights: Tensor


def batch_of(trials: Trials, rollouts: int, sizes: Sizes, discount: float, episodes: slice = slice(None)) -> Batch:
    """Episodes of trials, with advantages over the linear baseline (GAE with λ = 1), standardised for each task.

    Args:
        trials: rows of one task follow each other.
        rollouts: rows of a task.
        sizes: of the environment.
        discount: γ.
        episodes: which of each row [default: all].
    """
    valid, steps = trials.valid[:, episodes], trials.rewards.shape[2]

    def by_task(part: Tensor) -> Tensor:  # (tasks, episodes, T, …), zeros where nothing counts: NaN · 0 would be NaN
        part = part[:, episodes]
        kept = part.where(valid.reshape(*valid.shape, *[1] * (part.dim() - 3)), torch.zeros_like(part))
        return kept.reshape(-1, rollouts * part.shape[1], *part.shape[2:])

    seen = by_task(trials.tokens[..., : sizes.observation])
    actions, rewards = by_task(trials.actions), by_task(trials.rewards).cpu().numpy()
    weights = by_task(trials.valid).cpu().numpy().astype(np.float64)
    weights /= weights.sum((1, 2), keepdims=True)
    returns = discounted_sums(rewards, discount)  # no bootstrap: what follows an episode's end is zero
    advantages = returns - linear_baseline(seen.cpu().numpy(), returns, weights > 0)
    advantages -= (advantages * weights).sum((1, 2), keepdims=True)
    spread = np.sqrt((advantages**2 * weights).sum((1, 2), keepdims=True))
    flat = [
        torch.from_numpy(part.reshape(-1, part.shape[1] * steps)) for part in (advantages / (spread + 1e-8), weights)
    ]
    return Batch(seen.flatten(1, 2), actions.flatten(1, 2), *(part.to(seen) for part in flat))


def linear_baseline(observations: np.ndarray, returns: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Values of the linear feature baseline (Duan et al. 2016), fitted to each task by ridge regression.

    Features: s (cut to ±10), s², t/100, (t/100)², (t/100)³, 1. A task whose system is singular gets ten times the
    ridge, up to four times over; if that does not help, values are zero.

    Args:
        observations: (tasks, episodes, T, S).
        returns: (tasks, episodes, T), discounted.
        valid: (tasks, episodes, T), whether a step counts.

    Returns:
        (tasks, episodes, T).
    """
    tasks, episodes, steps, _ = observations.shape
    seen = np.clip(observations, -10, 10).astype(np.float64)
    time = np.broadcast_to((np.arange(steps) / 100.0)[:, None], (tasks, episodes, steps, 1))
    features = np.concatenate([seen, seen**2, time, time**2, time**3, np.ones_like(time)], -1)
    features = features.reshape(tasks, episodes * steps, -1)
    weighted = (features * valid.reshape(tasks, -1, 1)).swapaxes(1, 2)
    gram, target = weighted @ features, weighted @ returns.reshape(tasks, -1, 1)
    weights, todo = np.zeros_like(target), np.arange(tasks)
    for attempt in range(RIDGES):
        system = gram[todo] + RIDGE * 10**attempt * np.eye(gram.shape[1])
        found, failed = (part.numpy() for part in torch.linalg.solve_ex(*map(torch.from_numpy, (system, target[todo]))))
        good = (failed == 0) & np.isfinite(found).all((1, 2))
        weights[todo[good]] = found[good]
        todo = todo[~good]
        if not len(todo):
            break
    values: np.ndarray = (features @ weights).reshape(tasks, episodes, steps)
    return values


def policy_loss(policy: GaussianHead, params: Params, batch: Batch) -> Tensor:
    """L(θ) of one task: minus the mean of log π_θ(a|s) A."""
    log = log_prob(inner.call(policy, params, batch.observations), batch.actions)
    return -(log * batch.advantages * batch.weights).sum()


def adapted(policy: GaussianHead, params: Params, batch: Batch, rate: float, first_order: bool = False) -> Params:
    """θ' of each task, (tasks, …): one step of vanilla policy gradient from θ on its episodes.

    Args:
        policy: gives the network.
        params: θ.
        batch: of all tasks.
        rate: α.
        first_order: the step's gradient is a constant when θ' is differentiated.
    """

    def one(episodes: Batch) -> Params:
        def loss(of: Params, batch: Batch) -> Tensor:
            return policy_loss(policy, of, batch)

        return inner.adapt(loss, params, [episodes], rate, first_order=first_order, functional=True).params

    found: Params = inner.over_tasks(one, 0, batch)
    return found


def distributions(policy: GaussianHead, params: Params, observations: Tensor) -> Normal:
    """Of actions (tasks, n, A), each task by its own params (tasks, …) on its observations (tasks, n, S)."""

    def one(params: Params, seen: Tensor) -> tuple[Tensor, Tensor]:
        found: Normal = inner.call(policy, params, seen)
        return found.mean, found.stddev

    mean, std = inner.over_tasks(one, 0, params, observations)
    return Normal(mean, std, validate_args=False)


def hessian_of(function: Callable[[Tensor], Tensor], at: Tensor) -> Callable[[Tensor], Tensor]:
    """Products of a function's Hessian with vectors. As it is symmetric, one graph, run backwards, serves them all."""
    _, pull, *_ = vjp(grad(function), at)
    return lambda vector: pull(vector)[0]


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, steps: int = CG_STEPS) -> Tensor:
    """x with H x = target, from products with the symmetric, positive definite H.

    Residuals are made orthogonal to all earlier ones, which they are but for rounding. Else rounding brings large
    eigenvalues in again after a few steps, and on a nearly singular H the last steps are made of little else.
    """
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), residual @ residual
    units: list[Tensor] = []
    for _ in range(steps):
        if size < CG_RESIDUAL:
            break
        units.append(residual / size.sqrt())
        along = product(direction)
        step = size / (direction @ along)
        x, residual = x + step * direction, residual - step * along
        basis = torch.stack(units)
        for _ in range(2):  # once leaves what the subtraction itself rounds
            residual = residual - basis.T @ (basis @ residual)
        size, before = residual @ residual, size
        direction = residual + size / before * direction
    return x


class MAMLAgent(nn.Module):
    """Acts by θ in the first ``explore`` episodes of a task, and by θ' after one inner step from θ on these.

    The inner step needs explored actions: without noise, its gradient says nothing about what other actions would
    have brought; and actions of θ, as it is θ's gradient. Tests therefore score each episode after drawn ones by θ.

    Args:
        policy: with weights θ.
        sizes: of the environment.
        config: with the inner step's rate and discount.
        rollouts: rows of a task, one after the other.
    """

    explore = 1

    def __init__(self, policy: GaussianHead, sizes: Sizes, config: Config, rollouts: int = 1) -> None:
        super().__init__()
        self.policy, self.sizes, self.config, self.rollouts = policy, sizes, config, rollouts
        self._adapted: Params | None = None

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        self._adapted = None

    @torch.no_grad()
    def new_episode(self, so_far: Trials | None = None) -> None:
        assert so_far is not None
        if so_far.rewards.shape[1] != self.explore:  # not yet, or already
            return
        batch = batch_of(so_far, self.rollouts, self.sizes, self.config.inner_discount)
        self._adapted = adapted(self.policy, inner.parameters(self.policy), batch, self.config.inner_lr)

    def step(self, token: Tensor) -> Normal:
        observations = token[:, : self.sizes.observation]
        if self._adapted is None:
            found: Normal = self.policy(observations)
            return found
        found = distributions(
            self.policy, self._adapted, observations.reshape(-1, self.rollouts, self.sizes.observation)
        )
        return Normal(found.mean.flatten(0, 1), found.stddev.flatten(0, 1), validate_args=False)


class MAMLLearner:
    """One outer step at a time, on fresh tasks.

    Args:
        config: what to train.
        accelerator: of this process. Each process has its own tasks; what is a mean over tasks is one over all.

    Raises:
        UserError: tasks that processes cannot share evenly; an environment that is not there.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.mine = share_of_tasks(config.tasks, accelerator)
        self.sizes = sizes_of(config.env)
        torch.manual_seed(config.seed)
        widths = [self.sizes.observation, *config.head_hidden, self.sizes.action]
        self.policy = GaussianHead(widths, config.output_gain, config.init_std).to(accelerator.device)
        # conjugate gradients make much of rounding on a nearly singular matrix: of ten steps in float32, the last ones
        # are noise (MPS has no float64)
        self.dtype = torch.float32 if accelerator.device.type == "mps" else torch.float64

    @cached_property
    def env(self) -> TaskVectorEnv:
        """Of each rollout of this process's tasks, made when they are first needed."""
        return make_vector(self.config.env, len(self.mine) * self.config.rollouts, self.config.threads)

    @property
    def agent(self) -> MAMLAgent:
        """What acts in tests: one row a task."""
        return MAMLAgent(self.policy, self.sizes, self.config)

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs: a trust region has no state of its own."""
        return {"model": self.policy}

    def step(self, step: int) -> dict[str, Any]:
        """One outer step; ``step`` counts from 0.

        Returns:
            loss (minus the surrogate after the step), kl, accepted (0 or 1), step_fraction, entropy, std, return_1
            before and return_2 after the inner step (undiscounted, with exploration), and means of what `info` says.
        """
        trials, infos = self.collect(step)
        before, after = (
            batch_of(trials, self.config.rollouts, self.sizes, self.config.inner_discount, slice(episode, episode + 1))
            for episode in (0, 1)
        )
        found = self.outer_step(before, after)
        std = self.policy.log_std.detach().clamp(min=self.policy.floor).exp()
        returns = self._mean(trials.rewards.sum(-1).mean(0))
        return {
            **found, "entropy": (0.5 + 0.5 * math.log(2 * math.pi) + std.log()).sum(), "std": std.mean(),
            "return_1": returns[0], "return_2": returns[1], **infos,
        }  # fmt: skip

    def collect(self, step: int) -> tuple[Trials, dict[str, float]]:
        """Of this process's tasks: rollouts by θ, then as many by each task's θ'."""
        config = self.config
        rows = config.tasks * config.rollouts
        tasks = self.env.sample_tasks(config.tasks, np.random.default_rng([config.seed, step, TASKS]), "train")
        begin = starts(config.seed, step, STARTS, episodes=2, count=rows)
        noise = standard_normal(config.seed, step, NOISE, shape=(2, config.horizon, rows, self.sizes.action))
        mine = slice(self.mine.start * config.rollouts, self.mine.stop * config.rollouts)
        found, infos = on_all(
            self.accelerator,
            lambda: collect(
                MAMLAgent(self.policy, self.sizes, config, config.rollouts), self.env,
                np.repeat(tasks, config.rollouts, axis=0)[mine], episodes=2, horizon=config.horizon,
                seeds=begin[:, mine], noise=noise[:, :, mine], device=self.accelerator.device,
            ),
        )  # fmt: skip
        return found, means_of(infos, found.valid.cpu().numpy(), self.accelerator)

    # ---- the trust region

    def outer_step(self, before: Batch, after: Batch) -> dict[str, Any]:
        """Move θ along the natural gradient, as far as the trust region allows and the surrogate grows; or not at all.

        Args:
            before, after: this process's episodes before and after the inner step.

        Returns:
            loss, kl, accepted, step_fraction.
        """
        surrogate, divergence = self.functions(before, after)
        start = self.flat()
        gradient, value = (self._mean(part) for part in grad_and_value(surrogate)(start))
        hessian = hessian_of(divergence, start)

        def product(vector: Tensor) -> Tensor:
            return self._mean(hessian(vector)) + CG_DAMPING * vector

        direction = conjugate_gradient(product, gradient)
        curvature = direction @ product(direction)
        # no gradient, no direction: nothing is better than the start then, and the step is refused
        whole = (2 * self.config.max_kl / curvature.clamp(min=1e-12)).sqrt() * direction
        for fraction in BACKTRACK ** np.arange(BACKTRACKS):
            new = start + float(fraction) * whole
            with torch.no_grad():
                reached, moved = self._mean(torch.stack([surrogate(new), divergence(new)]))
            if reached > value and moved <= self.config.max_kl:
                self.set_flat(new)
                return {"loss": -reached, "kl": moved, "accepted": 1.0, "step_fraction": float(fraction)}
        return {"loss": -value, "kl": torch.zeros_like(value), "accepted": 0.0, "step_fraction": 0.0}

    def functions(self, before: Batch, after: Batch) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Surrogate and KL divergence KL(π_{θ'_old} ‖ π_{θ'}), as functions of θ as one vector.

        Both are means over samples, then over this process's tasks, and go through the inner step.
        """
        config, policy = self.config, self.policy
        before, after = (Batch(*(part.to(self.dtype) for part in batch)) for batch in (before, after))

        def acting(flat: Tensor) -> Normal:
            params = adapted(policy, self._shaped(flat), before, config.inner_lr, config.first_order)
            return distributions(policy, params, after.observations)

        with torch.no_grad():
            old = acting(self.flat())
            log_old = log_prob(old, after.actions)

        def mean(samples: Tensor) -> Tensor:
            return (samples * after.weights).sum(1).mean()

        def surrogate(flat: Tensor) -> Tensor:
            return mean((log_prob(acting(flat), after.actions) - log_old).exp() * after.advantages)

        def divergence(flat: Tensor) -> Tensor:
            return mean(kl_divergence(old, acting(flat)).sum(-1))

        return surrogate, divergence

    def _mean(self, value: Tensor) -> Tensor:
        """Over processes, each with as many tasks."""
        if self.accelerator.num_processes == 1:
            return value
        found: Tensor = self.accelerator.reduce(value, reduction="mean")
        return found

    def flat(self) -> Tensor:
        """θ as one vector, in the outer step's precision."""
        return torch.cat([value.detach().flatten() for value in self.policy.parameters()]).to(self.dtype)

    @torch.no_grad()
    def set_flat(self, flat: Tensor) -> None:
        """Take θ from one vector."""
        shaped = self._shaped(flat)
        for name, value in self.policy.named_parameters():
            value.copy_(shaped[name])

    def _shaped(self, flat: Tensor) -> Params:
        parts = torch.split(flat, [value.numel() for value in self.policy.parameters()])
        return {
            name: part.view_as(value) for (name, value), part in zip(self.policy.named_parameters(), parts, strict=True)
        }
