"""MAML-TRPO (Finn et al. 2017): weights from which one policy-gradient step on a task's own episodes helps most.

Inner step (their equation 4): θ'_i = θ − α ∇_θ L_i(θ), L_i = −mean(log π_θ(a|s) A) on episodes of task i. Outer step: a
trust region (Schulman et al. 2015) for the mean over tasks of the surrogate at θ'_i(θ) on episodes after the inner step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from metazoo import checkpoint
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, grad, jvp, vmap

from trmrl.collect import collect, standard_normal, starts
from trmrl.config import Config
from trmrl.env import make_vector
from trmrl.model import GaussianHead, Sizes, Trials
from trmrl.ppo import NOISE, STARTS, TASKS, discounted_sums, share_of_tasks, sizes_of

Params = dict[str, Tensor]
CG_STEPS, CG_DAMPING = 10, 1e-5
BACKTRACK, BACKTRACKS = 0.8, 15
RIDGE = 1e-5


def linear_baseline(observations: np.ndarray, returns: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values of the linear feature baseline (Duan et al. 2016), fitted to each task by ridge regression.

    Features: s (cut to ±10), s², t/100, (t/100)², (t/100)³, 1.

    Args:
        observations: (tasks, episodes, T, S).
        returns: (tasks, episodes, T), discounted.
        weights: (tasks, episodes, T), 0 where a step does not count.

    Returns:
        (tasks, episodes, T).
    """
    tasks, episodes, steps, _ = observations.shape
    seen = np.clip(observations, -10, 10).astype(np.float64)
    time = np.broadcast_to((np.arange(steps) / 100.0)[:, None], (tasks, episodes, steps, 1))
    features = np.concatenate([seen, seen**2, time, time**2, time**3, np.ones_like(time)], -1)
    features = features.reshape(tasks, episodes * steps, -1)
    weighted = features * weights.reshape(tasks, -1, 1)
    gram, target = weighted.swapaxes(1, 2) @ features, weighted.swapaxes(1, 2) @ returns.reshape(tasks, -1, 1)
    ridge = RIDGE
    while True:
        found = np.linalg.solve(gram + ridge * np.eye(gram.shape[1]), target)
        if np.isfinite(found).all():
            break
        ridge *= 10
    values: np.ndarray = (features @ found).reshape(tasks, episodes, steps)
    return values


class Batch:
    """Episodes of tasks, ready for a gradient: all of (tasks, samples, …).

    Args:
        trials: rows of one task follow each other.
        episodes: which of them.
        rollouts: rows of a task.
        sizes: of the environment.
        discount: γ.
    """

    def __init__(self, trials: Trials, episodes: slice, rollouts: int, sizes: Sizes, discount: float) -> None:
        tokens, rewards = trials.tokens[:, episodes], trials.rewards[:, episodes]
        tasks, steps = len(rewards) // rollouts, rewards.shape[2]
        seen = tokens[..., : sizes.observation].reshape(tasks, -1, steps, sizes.observation)
        valid = trials.valid[:, episodes].reshape(tasks, -1, steps)
        weights = valid.cpu().numpy().astype(np.float64)
        returns = discounted_sums(rewards.reshape(tasks, -1, steps).cpu().numpy(), discount)
        advantages = returns - linear_baseline(seen.cpu().numpy(), returns, weights)  # GAE with λ = 1
        count = weights.sum((1, 2), keepdims=True)
        centred = advantages - (advantages * weights).sum((1, 2), keepdims=True) / count
        spread = np.sqrt((centred**2 * weights).sum((1, 2), keepdims=True) / count)
        self.observations = seen.flatten(1, 2)
        self.actions = trials.actions[:, episodes].reshape(tasks, -1, sizes.action)
        self.weights = (valid / torch.from_numpy(count).to(valid.device)).flatten(1).float()  # add up to 1
        found = torch.from_numpy(centred / (spread + 1e-8)).to(seen.device, torch.float32)
        self.advantages = found.flatten(1)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Observations, actions, advantages, weights."""
        return self.observations, self.actions, self.advantages, self.weights


def log_likelihood(policy: GaussianHead, params: Params, observations: Tensor, actions: Tensor) -> Tensor:
    """log π(a|s) of samples (n, …): (n,)."""
    found: Normal = functional_call(policy, params, (observations,))
    return found.log_prob(actions).sum(-1)


def inner_step(
    policy: GaussianHead, params: Params, parts: tuple[Tensor, Tensor, Tensor, Tensor], rate: float, first_order: bool
) -> Params:
    """θ' of one task: one step of vanilla policy gradient; its gradient is a constant for ``first_order``."""

    def loss(of: Params) -> Tensor:
        observations, actions, advantages, weights = parts
        return -(log_likelihood(policy, of, observations, actions) * advantages * weights).sum()

    gradient = grad(loss)(params)
    if first_order:
        gradient = {name: value.detach() for name, value in gradient.items()}
    return {name: value - rate * gradient[name] for name, value in params.items()}


def conjugate_gradient(product: Callable[[Tensor], Tensor], target: Tensor, steps: int = CG_STEPS) -> Tensor:
    """x with H x = target, by products with H."""
    x, residual = torch.zeros_like(target), target.clone()
    direction, size = residual.clone(), residual @ residual
    for _ in range(steps):
        if size < 1e-10:
            break
        along = product(direction)
        step = size / (direction @ along)
        x, residual = x + step * direction, residual - step * along
        size, before = residual @ residual, size
        direction = residual + size / before * direction
    return x


class MAMLAgent:
    """Acts by θ in the first episode of a task; before each later one takes one inner step from θ on all so far.

    The inner step needs actions that vary: this agent's actions are drawn, in tests, too.

    Args:
        policy: with weights θ.
        sizes: of the environment.
        config: with the inner step's rate and discount.
        rollouts: rows of a task, one after the other.
    """

    explores = True

    def __init__(self, policy: GaussianHead, sizes: Sizes, config: Config, rollouts: int = 1) -> None:
        self.policy, self.sizes, self.config, self.rollouts = policy, sizes, config, rollouts
        self._adapted: Params | None = None

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        self._adapted = None

    def new_episode(self, so_far: Trials | None = None) -> None:
        assert so_far is not None
        batch = Batch(so_far, slice(None), self.rollouts, self.sizes, self.config.inner_discount)
        params = {name: value.detach() for name, value in self.policy.named_parameters()}
        step = vmap(
            lambda *parts: inner_step(self.policy, params, parts, self.config.inner_lr, True)  # type: ignore[arg-type]
        )
        self._adapted = {name: value.detach() for name, value in step(*batch.parts).items()}

    def step(self, token: Tensor) -> Normal:
        observations = token[:, : self.sizes.observation]
        if self._adapted is None:
            found: Normal = self.policy(observations)
            return found
        grouped = observations.unflatten(0, (-1, self.rollouts))

        def one(params: Params, seen: Tensor) -> tuple[Tensor, Tensor]:
            found = functional_call(self.policy, params, (seen,))
            return found.mean, found.stddev

        mean, std = (part.flatten(0, 1) for part in vmap(one)(self._adapted, grouped))
        return Normal(mean, std, validate_args=False)


class MAMLLearner:
    """One outer step at a time, on fresh tasks.

    Args:
        config: what to train.
        accelerator: of this process. Each process has its own tasks; what is summed over tasks is a mean over all.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.mine = share_of_tasks(config.tasks, accelerator)
        self.env = make_vector(config.env, len(self.mine) * config.rollouts, config.threads)
        self.sizes = sizes_of(self.env)
        torch.manual_seed(config.seed)
        widths = [self.sizes.observation, *config.head_hidden, self.sizes.action]
        self.policy = GaussianHead(widths, config.output_gain, config.init_std).to(accelerator.device)

    @property
    def agent(self) -> MAMLAgent:
        """What acts in tests: an episode of a task at a time."""
        return MAMLAgent(self.policy, self.sizes, self.config)

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs: a trust region has no state of its own."""
        return {"model": self.policy}

    def step(self, step: int) -> dict[str, Any]:
        """One outer step; ``step`` counts from 0.

        Returns:
            loss (minus the surrogate after the step), kl, accepted (0 or 1), step_fraction, entropy, std, return_1
            before and return_2 after the inner step, and means of what `info` says.
        """
        trials, infos = self.collect(step)
        config = self.config
        inner = Batch(trials, slice(0, 1), config.rollouts, self.sizes, config.inner_discount)
        outer = Batch(trials, slice(1, 2), config.rollouts, self.sizes, config.inner_discount)
        found = self.outer_step(inner, outer)
        std = self.policy.log_std.detach().clamp(min=self.policy.floor).exp()
        returns = self._mean(trials.rewards.sum(-1).mean(0))
        return {
            **found, "entropy": (0.5 + 0.5 * math.log(2 * math.pi) + std.log()).sum(), "std": std.mean(),
            "return_1": returns[0], "return_2": returns[1], **infos,
        }  # fmt: skip

    def collect(self, step: int) -> tuple[Trials, dict[str, float]]:
        """Of this process's tasks: rollouts by θ, then as many by each task's θ'."""
        config = self.config
        count, rows = config.tasks, config.tasks * config.rollouts
        tasks = self.env.sample_tasks(count, np.random.default_rng([config.seed, step, TASKS]), "train")
        begin = starts(config.seed, step, STARTS, episodes=2, count=rows)
        noise = standard_normal(config.seed, step, NOISE, shape=(2, config.horizon, rows, self.sizes.action))
        mine = slice(self.mine.start * config.rollouts, self.mine.stop * config.rollouts)
        found, infos = collect(
            MAMLAgent(self.policy, self.sizes, config, config.rollouts), self.env,
            np.repeat(tasks, config.rollouts, axis=0)[mine], episodes=2, horizon=config.horizon, seeds=begin[:, mine],
            noise=noise[:, :, mine], device=self.accelerator.device,
        )  # fmt: skip
        valid = found.valid.cpu().numpy()
        means = {name: float(np.nanmean(value[valid])) for name, value in infos.items() if np.isfinite(value).any()}
        if means:
            numbers = self._mean(torch.tensor(list(means.values()), device=self.accelerator.device))
            means = dict(zip(means, numbers.tolist(), strict=True))
        return found, means

    # ---- the trust region

    def outer_step(self, inner: Batch, outer: Batch) -> dict[str, Any]:
        """Move θ as far as the trust region allows in the natural gradient's direction; or not at all."""
        objective, divergence = self.functions(inner, outer)
        start = self.flat()
        gradient, before = self._gradient(objective, start)
        if not gradient.any():
            return {"loss": -before, "kl": before.new_zeros(()), "accepted": 0.0, "step_fraction": 0.0}

        def product(vector: Tensor) -> Tensor:
            return self._mean(jvp(grad(divergence), (start,), (vector,))[1]) + CG_DAMPING * vector

        direction = conjugate_gradient(product, gradient)
        curvature = direction @ product(direction)
        length = (2 * self.config.max_kl / curvature.clamp(min=1e-12)).sqrt()
        for tried in range(BACKTRACKS):
            fraction = BACKTRACK**tried
            new = start + fraction * length * direction
            with torch.no_grad():
                value, moved = self._mean(torch.stack([objective(new), divergence(new)]))
            if value > before and moved <= self.config.max_kl:
                self._set(new)
                return {"loss": -value, "kl": moved, "accepted": 1.0, "step_fraction": fraction}
        return {"loss": -before, "kl": before.new_zeros(()), "accepted": 0.0, "step_fraction": 0.0}

    def functions(self, inner: Batch, outer: Batch) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """Surrogate and KL divergence, means over this process's tasks, as functions of θ as one vector."""
        config, policy = self.config, self.policy

        def adapted(flat: Tensor) -> Params:
            params = self._shaped(flat)
            return vmap(  # type: ignore[no-any-return]
                lambda *parts: inner_step(policy, params, parts, config.inner_lr, config.first_order)  # type: ignore[arg-type]
            )(*inner.parts)

        def distribution(params: Params, seen: Tensor) -> tuple[Tensor, Tensor]:
            found = functional_call(policy, params, (seen,))
            return found.mean, found.stddev

        with torch.no_grad():
            old = adapted(self.flat())
            old_mean, old_std = vmap(distribution)(old, outer.observations)
            old_log = Normal(old_mean, old_std, validate_args=False).log_prob(outer.actions).sum(-1)

        def surrogate(flat: Tensor) -> Tensor:
            mean, std = vmap(distribution)(adapted(flat), outer.observations)
            log = Normal(mean, std, validate_args=False).log_prob(outer.actions).sum(-1)
            return ((log - old_log).exp() * outer.advantages * outer.weights).sum(1).mean()

        def divergence(flat: Tensor) -> Tensor:
            mean, std = vmap(distribution)(adapted(flat), outer.observations)
            before = Normal(old_mean, old_std, validate_args=False)
            found = kl_divergence(before, Normal(mean, std, validate_args=False)).sum(-1)
            return (found * outer.weights).sum(1).mean()

        return surrogate, divergence

    def _gradient(self, function: Callable[[Tensor], Tensor], flat: Tensor) -> tuple[Tensor, Tensor]:
        gradient, value = torch.func.grad_and_value(function)(flat)
        return self._mean(gradient), self._mean(value)

    def _mean(self, value: Tensor) -> Tensor:
        """Over processes, each with as many tasks."""
        if self.accelerator.num_processes == 1:
            return value
        found: Tensor = self.accelerator.reduce(value, reduction="mean")
        return found

    def flat(self) -> Tensor:
        """θ as one vector."""
        return torch.cat([value.detach().flatten() for value in self.policy.parameters()])

    def _shaped(self, flat: Tensor) -> Params:
        parts = flat.split([value.numel() for value in self.policy.parameters()])
        return {
            name: part.view_as(value) for (name, value), part in zip(self.policy.named_parameters(), parts, strict=True)
        }

    @torch.no_grad()
    def _set(self, flat: Tensor) -> None:
        for name, value in self.policy.named_parameters():
            value.copy_(self._shaped(flat)[name])
