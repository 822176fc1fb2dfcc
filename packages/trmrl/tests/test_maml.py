"""MAML-TRPO: the baseline, the inner step and what is differentiated through it, the trust region, who acts how, and
that bits repeat."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from metazoo import inner
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from torch.func import functional_call, grad
from trmrl import maml
from trmrl.collect import collect, standard_normal, starts
from trmrl.config import Config
from trmrl.env import make_vector
from trmrl.evaluate import evaluate_adaptation
from trmrl.maml import (
    Batch,
    MAMLAgent,
    MAMLLearner,
    adapted,
    batch_of,
    conjugate_gradient,
    distributions,
    hessian_of,
    linear_baseline,
)
from trmrl.model import GaussianHead, Sizes, Trials

SIZES = Sizes(observation=2, action=2, task=1)
CONFIG = Config(algo="maml", horizon=6, tasks=3, rollouts=2, head_hidden=(4,), inner_lr=0.1, init_std=1.0)
LINEAR = replace(CONFIG, head_hidden=())  # eight parameters: conjugate gradients end
ORDERS = pytest.mark.parametrize("first_order", [False, True])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_learner(config: Config = CONFIG) -> MAMLLearner:
    return MAMLLearner(config, Accelerator(cpu=True))


def make_trials(count: int = 6, episodes: int = 2, horizon: int = 6, seed: int = 0, ended: bool = True) -> Trials:
    """Random trials, of which every third episode ends early."""
    draws = torch.Generator().manual_seed(seed)
    shape = count, episodes, horizon
    tokens, actions = (torch.randn(*shape, width, generator=draws) for width in (SIZES.token, SIZES.action))
    valid = torch.ones(shape, dtype=torch.bool)
    if ended:
        valid.view(-1, horizon)[::3, horizon // 2 :] = False
    return Trials(tokens, actions, torch.randn(shape, generator=draws) * valid, valid, torch.zeros(count, 1))


def make_batches(config: Config = CONFIG, seed: int = 0) -> tuple[Batch, Batch]:
    trials = make_trials(config.tasks * config.rollouts, horizon=config.horizon, seed=seed)
    before, after = (doubled(batch_of(trials, config.rollouts, SIZES, 0.99, slice(e, e + 1))) for e in (0, 1))
    return before, after


def doubled(batch: Batch) -> Batch:
    """In float64, with weights that add up to 1 there, too."""
    found = Batch(*(part.double() for part in batch))
    return found._replace(weights=found.weights / found.weights.sum(1, keepdim=True))


def task_of(batch: Batch, task: int) -> Batch:
    return Batch(*(part[task] for part in batch))


# ---- the same by loops over tasks, by torch.autograd


def looped_loss(policy: GaussianHead, params: dict[str, Tensor], batch: Batch) -> Tensor:
    """Minus the mean of log π(a|s) A over the steps that count; the density written out."""
    total, count = torch.zeros((), dtype=batch.observations.dtype), 0
    for i in range(len(batch.weights)):
        if batch.weights[i] > 0:
            found = functional_call(policy, params, (batch.observations[i],))
            z = (batch.actions[i] - found.mean) / found.stddev
            log = (-0.5 * z**2 - found.stddev.log() - 0.5 * math.log(2 * math.pi)).sum()
            total, count = total - log * batch.advantages[i], count + 1
    return total / count


def looped_step(
    policy: GaussianHead, params: dict[str, Tensor], batch: Batch, rate: float, first_order: bool
) -> dict[str, Tensor]:
    grads = torch.autograd.grad(looped_loss(policy, params, batch), list(params.values()), create_graph=not first_order)
    return {name: value - rate * one for (name, value), one in zip(params.items(), grads, strict=True)}


def looped_functions(
    learner: MAMLLearner, before: Batch, after: Batch
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """Surrogate and divergence at θ; the old policy is that of the learner."""
    config, policy = learner.config, learner.policy

    def acting(flat: Tensor) -> list[Normal]:
        parts = flat.split([value.numel() for value in policy.parameters()])
        params = {name: part.view_as(v) for (name, v), part in zip(policy.named_parameters(), parts, strict=True)}
        found = []
        for task in range(config.tasks):
            moved = looped_step(policy, params, task_of(before, task), config.inner_lr, config.first_order)
            found.append(functional_call(policy, moved, (after.observations[task],)))
        return found

    start = learner.flat().requires_grad_()
    old = [Normal(one.mean.detach(), one.stddev.detach()) for one in acting(start)]

    def mean(samples: list[Tensor]) -> Tensor:
        counts = [after.weights[task] > 0 for task in range(config.tasks)]
        return torch.stack([one[used].mean() for one, used in zip(samples, counts, strict=True)]).mean()

    def surrogate(flat: Tensor) -> Tensor:
        logs = [
            [one.log_prob(after.actions[task]).sum(-1) for one in (new, was)]
            for task, (new, was) in enumerate(zip(acting(flat), old, strict=True))
        ]
        return mean([(new - was).exp() * after.advantages[task] for task, (new, was) in enumerate(logs)])

    def divergence(flat: Tensor) -> Tensor:
        return mean([kl_divergence(was, new).sum(-1) for new, was in zip(acting(flat), old, strict=True)])

    return surrogate, divergence


# ---- baseline and advantages


def features_of(observations: np.ndarray) -> np.ndarray:
    """(episodes, T, S) → (episodes · T, 2 S + 4), one step after the other."""
    rows = []
    for episode in observations.astype(np.float64):
        for t, seen in enumerate(episode):
            cut = [min(max(value, -10.0), 10.0) for value in seen]
            rows.append([*cut, *(value**2 for value in cut), t / 100, (t / 100) ** 2, (t / 100) ** 3, 1.0])
    return np.array(rows)


def test_baseline_fits_what_is_linear() -> None:
    """Returns that are linear in the features are met up to the ridge, each task by weights of its own."""
    draws = np.random.default_rng(0)
    observations = draws.normal(size=(3, 4, 50, 2)) * np.array([1.0, 8.0])
    assert (np.abs(observations) > 10).any()
    features = np.stack([features_of(one) for one in observations])
    weights = draws.normal(size=(3, features.shape[2], 1))
    returns = (features @ weights).reshape(3, 4, 50)
    found = linear_baseline(observations, returns, np.ones((3, 4, 50), dtype=bool))
    np.testing.assert_allclose(found, returns, rtol=0, atol=1e-3)
    ridge = features.swapaxes(1, 2) @ features + 1e-5 * np.eye(8)
    exact = features @ np.linalg.solve(ridge, features.swapaxes(1, 2) @ returns.reshape(3, -1, 1))
    np.testing.assert_allclose(found, exact.reshape(found.shape), rtol=0, atol=1e-9)


def test_baseline_does_not_see_what_does_not_count() -> None:
    draws = np.random.default_rng(0)
    observations, returns = draws.normal(size=(2, 3, 20, 2)), draws.normal(size=(2, 3, 20))
    valid = np.ones((2, 3, 20), dtype=bool)
    valid[:, 0, 12:] = False
    found = linear_baseline(observations, returns, valid)
    other = linear_baseline(np.where(valid[..., None], observations, 5.0), np.where(valid, returns, -99.0), valid)
    np.testing.assert_allclose(found[valid], other[valid], rtol=0, atol=1e-12)
    assert np.abs(found - linear_baseline(observations, returns, np.ones_like(valid)))[valid].max() > 1e-3


def test_baseline_of_a_singular_task(monkeypatch: pytest.MonkeyPatch) -> None:
    """It gets a greater ridge; the other task's values do not change."""
    monkeypatch.setattr(maml, "RIDGE", 1e-17)
    draws = np.random.default_rng(0)
    observations, returns = draws.normal(size=(2, 4, 8, 1)), draws.normal(size=(2, 4, 8))
    observations[1], returns[1] = 1.0, 3.0  # s, s² and 1 are the same
    valid = np.ones((2, 4, 8), dtype=bool)
    found = linear_baseline(observations, returns, valid)
    alone = linear_baseline(observations[:1], returns[:1], valid[:1])
    np.testing.assert_array_equal(found[0], alone[0])
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found[1], 3.0, atol=0.5)
    monkeypatch.setattr(maml, "RIDGE", 0.0)
    found = linear_baseline(observations, returns, valid)
    np.testing.assert_array_equal(found[1], 0.0)  # no ridge helps
    np.testing.assert_allclose(found[0], alone[0], atol=1e-6)


def test_batch_by_hand() -> None:
    """Rows of a task and their episodes, discounted returns up to each episode's end, standardised over a task."""
    trials = make_trials()
    batch = batch_of(trials, 2, SIZES, 0.9)
    assert batch.observations.shape == (3, 24, 2)
    valid = trials.valid.numpy()
    for task in range(3):
        returns, seen, used, actions = [], [], [], []
        for row in (2 * task, 2 * task + 1):
            for e in range(2):
                last = int(valid[row, e].sum())
                for t in range(6):
                    later = [0.9 ** (k - t) * float(trials.rewards[row, e, k]) for k in range(t, last)]
                    returns.append(sum(later))
                    used.append(t < last)
                seen.append(trials.tokens[row, e, :, :2].numpy() * valid[row, e, :, None])
                actions.append(trials.actions[row, e].numpy() * valid[row, e, :, None])
        kept = np.array(used)
        values = linear_baseline(np.array(seen)[None], np.array(returns).reshape(1, 4, 6), kept.reshape(1, 4, 6))
        advantages = np.array(returns) - values.reshape(-1)
        advantages = (advantages - advantages[kept].mean()) / (advantages[kept].std() + 1e-8)
        np.testing.assert_allclose(batch.advantages[task].numpy()[kept], advantages[kept], rtol=0, atol=1e-5)
        np.testing.assert_array_equal(batch.observations[task].numpy(), np.concatenate(seen))
        np.testing.assert_array_equal(batch.actions[task].numpy(), np.concatenate(actions))
        np.testing.assert_allclose(batch.weights[task].numpy(), kept / kept.sum(), rtol=1e-6)


def test_episodes_of_a_batch() -> None:
    trials = make_trials()
    for e in range(2):
        alone = Trials(*(part[:, e : e + 1] for part in trials[:4]), trials.tasks)  # type: ignore[call-arg]
        for part, other in zip(
            batch_of(trials, 2, SIZES, 0.9, slice(e, e + 1)), batch_of(alone, 2, SIZES, 0.9), strict=True
        ):
            assert torch.equal(part, other)


def test_masked_steps_have_no_influence() -> None:
    """Whatever is there, NaN, too: the same bits."""
    trials = make_trials()
    off = ~trials.valid
    assert off.any()
    other = Trials(*(part.clone() for part in trials))
    other.tokens[off], other.actions[off], other.rewards[off] = math.nan, math.inf, -1e6
    for part, same in zip(batch_of(trials, 2, SIZES, 0.9), batch_of(other, 2, SIZES, 0.9), strict=True):
        assert torch.isfinite(part).all()
        assert torch.equal(part, same)
    assert (batch_of(trials, 2, SIZES, 0.9).weights > 0).sum() == trials.valid.sum()


# ---- the inner step, and through it


@ORDERS
def test_inner_step_is_that_of_each_task(first_order: bool) -> None:
    learner = make_learner()
    before, after = make_batches()
    params = {name: value.double() for name, value in inner.parameters(learner.policy).items()}
    found = adapted(learner.policy, params, before, 0.1, first_order)
    acting = distributions(learner.policy, found, after.observations)
    for task in range(3):
        own = {name: value.clone().requires_grad_() for name, value in params.items()}
        wanted = looped_step(learner.policy, own, task_of(before, task), 0.1, first_order)
        for name, value in wanted.items():
            torch.testing.assert_close(found[name][task], value.detach(), rtol=0, atol=1e-12)
            assert (value - own[name]).abs().max() > 1e-4, name  # it moves all of them
        one = functional_call(learner.policy, wanted, (after.observations[task],))
        torch.testing.assert_close(acting.mean[task], one.mean.detach(), rtol=0, atol=1e-12)
        torch.testing.assert_close(acting.stddev[task], one.stddev.detach(), rtol=0, atol=1e-12)


def test_meta_gradient_by_finite_differences() -> None:
    learner = make_learner()
    surrogate, _ = learner.functions(*make_batches())
    start = learner.flat() + 0.02  # away from the old policy, so that ratios are not 1
    assert start.dtype == torch.float64
    found = grad(surrogate)(start)
    for i, unit in enumerate(torch.eye(len(start), dtype=torch.float64)):
        numeric = (surrogate(start + 1e-5 * unit) - surrogate(start - 1e-5 * unit)) / 2e-5
        assert float(found[i]) == pytest.approx(float(numeric), rel=1e-6, abs=1e-8)


@ORDERS
def test_surrogate_and_divergence_are_the_loops(first_order: bool) -> None:
    """Values and gradients; with ``first_order`` the inner gradient is a constant, in the divergence, too."""
    learner = make_learner(replace(CONFIG, first_order=first_order))
    batches = make_batches()
    other = make_learner(replace(CONFIG, first_order=not first_order)).functions(*batches)
    start = learner.flat() + 0.02
    for one, loops, otherwise in zip(
        learner.functions(*batches), looped_functions(learner, *batches), other, strict=True
    ):
        at = start.clone().requires_grad_()
        value = loops(at)
        torch.testing.assert_close(one(start), value.detach(), rtol=0, atol=1e-12)
        gradient = grad(one)(start)
        torch.testing.assert_close(gradient, torch.autograd.grad(value, at)[0], rtol=0, atol=1e-11)
        torch.testing.assert_close(one(start), otherwise(start), rtol=0, atol=1e-12)
        assert (gradient - grad(otherwise)(start)).abs().max() > 1e-3


def test_at_the_old_policy() -> None:
    """All ratios are 1: the surrogate is the mean advantage, which is 0; the divergence and its gradient vanish."""
    learner = make_learner()
    before, after = make_batches()
    surrogate, divergence = learner.functions(before, after)
    start = learner.flat()
    assert float(surrogate(start)) == pytest.approx(0, abs=1e-6)
    raised = learner.functions(before, after._replace(advantages=after.advantages + 2))[0]
    assert float(raised(start)) == pytest.approx(2, abs=1e-6)
    assert float(divergence(start)) == 0
    assert grad(divergence)(start).abs().max() < 1e-12


@ORDERS
def test_hessian_times_vector(first_order: bool) -> None:
    """Of the divergence; with ``first_order`` of one whose inner steps are constants that are added to θ."""
    learner = make_learner(replace(LINEAR, first_order=first_order))
    before, after = make_batches(LINEAR)
    start = learner.flat()
    _, dense_of = looped_functions(learner, before, after)
    if first_order:
        policy, seen = learner.policy, after
        params = {name: value.double().requires_grad_() for name, value in inner.parameters(policy).items()}
        moved = [looped_step(policy, params, task_of(before, task), 0.1, True) for task in range(3)]
        steps = [torch.cat([(one[name] - params[name]).flatten().detach() for name in params]) for one in moved]

        def dense_of(flat: Tensor) -> Tensor:
            found = []
            for task, step in enumerate(steps):
                old, new = (
                    functional_call(policy, learner._shaped(at + step), (seen.observations[task],))
                    for at in (start, flat)
                )
                found.append(kl_divergence(old, new).sum(-1)[seen.weights[task] > 0].mean())
            return torch.stack(found).mean()

    dense = torch.autograd.functional.hessian(dense_of, start)
    assert dense.abs().max() > 0.1
    assert torch.linalg.eigvalsh(dense).min() > -1e-8
    product = hessian_of(learner.functions(before, after)[1], start)
    for vector in torch.randn(3, len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64):
        torch.testing.assert_close(product(vector), dense @ vector, rtol=0, atol=1e-6)


# ---- the trust region


def test_conjugate_gradient() -> None:
    """n steps solve a system of n; fewer do as much as they can; nothing is divided by zero at the end."""
    draws = torch.Generator().manual_seed(0)
    root, target = (torch.randn(6, n, generator=draws, dtype=torch.float64) for n in (6, 1))
    matrix, target = root @ root.T + torch.eye(6), target[:, 0]
    wanted = torch.linalg.solve(matrix, target)
    asked: list[Tensor] = []

    def product(vector: Tensor) -> Tensor:
        asked.append(vector)
        return matrix @ vector

    torch.testing.assert_close(conjugate_gradient(product, target), wanted, rtol=0, atol=1e-5)
    assert len(asked) <= 7
    first = conjugate_gradient(product, target, steps=1)
    torch.testing.assert_close(first, (target @ target) / (target @ matrix @ target) * target)
    assert torch.equal(conjugate_gradient(product, torch.zeros(6, dtype=torch.float64)), torch.zeros(6).double())


def test_conjugate_gradient_is_not_led_by_rounding() -> None:
    """On a spectrum such as the divergence has, 1e1 to 1e-9: ten steps are those of a Krylov space's best x."""
    draws = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(24, 24, generator=draws, dtype=torch.float64))[0]
    matrix = basis @ torch.diag(torch.logspace(1, -9, 24, dtype=torch.float64)) @ basis.T + 1e-5 * torch.eye(24)
    target = matrix @ torch.randn(24, generator=draws, dtype=torch.float64)
    krylov = [target / target.norm()]
    for _ in range(9):
        following = matrix @ krylov[-1]
        for _ in range(2):
            for one in krylov:
                following = following - (one @ following) * one
        krylov.append(following / following.norm())
    space = torch.stack(krylov, 1)
    wanted = space @ torch.linalg.solve(space.T @ matrix @ space, space.T @ target)
    found = conjugate_gradient(lambda vector: matrix @ vector, target)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-8)
    noise = 1 + 1e-14 * torch.randn(24, generator=draws, dtype=torch.float64)
    torch.testing.assert_close(conjugate_gradient(lambda v: matrix @ v, target * noise), found, rtol=0, atol=1e-9)


def test_step_is_the_natural_gradient() -> None:
    """θ moves by fraction · √(2 KL / xᵀHx) x, H x = g, with the dense matrix."""
    learner = make_learner(LINEAR)
    before, after = make_batches(LINEAR)
    start = learner.flat()
    surrogate, divergence = looped_functions(learner, before, after)
    at = start.clone().requires_grad_()
    gradient = torch.autograd.grad(surrogate(at), at)[0]
    matrix = torch.autograd.functional.hessian(divergence, start) + 1e-5 * torch.eye(len(start), dtype=torch.float64)
    x = torch.linalg.solve(matrix, gradient)
    whole = math.sqrt(2 * learner.config.max_kl / float(x @ matrix @ x)) * x
    row = learner.outer_step(before, after)
    assert row["accepted"] == 1
    torch.testing.assert_close(learner.flat() - start, row["step_fraction"] * whole, rtol=0, atol=1e-4)
    reached = learner.flat().requires_grad_()
    assert float(row["loss"]) == pytest.approx(-surrogate(reached).item(), abs=1e-6)
    assert float(row["kl"]) == pytest.approx(divergence(reached).item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@ORDERS
def test_accepted_steps_keep_their_promise(seed: int, first_order: bool) -> None:
    learner = make_learner(replace(CONFIG, first_order=first_order))
    batches = make_batches(seed=seed)
    surrogate, divergence = learner.functions(*batches)
    start = learner.flat()
    row = learner.outer_step(*batches)
    assert row["accepted"] == 1
    assert 0 < float(divergence(learner.flat())) <= learner.config.max_kl * (1 + 1e-4)
    assert float(surrogate(learner.flat())) > float(surrogate(start))
    assert float(row["kl"]) <= learner.config.max_kl


def towards(
    learner: MAMLLearner, monkeypatch: pytest.MonkeyPatch, gain: Callable[[Tensor], Tensor], bend: float = 0.0
) -> dict[str, Any]:
    """A step where the surrogate is ``gain`` of the way along one axis, as a share of the whole step, and the
    divergence way²/2 + bend · way⁴."""
    start = learner.flat()
    whole = math.sqrt(2 * learner.config.max_kl)
    functions = (
        lambda flat: gain((flat - start)[0] / whole),
        lambda flat: (flat - start).square().sum() / 2 + bend * (flat - start).square().sum() ** 2,
    )
    monkeypatch.setattr(learner, "functions", lambda before, after: functions)
    return learner.outer_step(*make_batches())


@pytest.mark.parametrize(("tries", "share"), [(0, 1.01), (1, 0.9), (4, 0.45), (14, 0.044)])
def test_backtracking(monkeypatch: pytest.MonkeyPatch, tries: int, share: float) -> None:
    """The surrogate x − x²/share falls below its start beyond ``share`` of the step: 0.8^tries is the first below."""
    learner = make_learner()
    start = learner.flat()
    row = towards(learner, monkeypatch, lambda x: x - x**2 / share)
    assert row["step_fraction"] == pytest.approx(0.8**tries)
    assert row["accepted"] == 1
    moved = learner.flat() - start
    assert float(moved[0]) == pytest.approx(0.8**tries * math.sqrt(2 * 0.01), rel=1e-3)
    assert not moved[1:].any()


def test_backtracking_for_the_divergence(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.01 x² + bend · 4e-4 x⁴ ≤ 0.01 is demanded of the share x."""
    row = towards(make_learner(), monkeypatch, lambda x: x, bend=25.0)  # x² + x⁴ ≤ 1: x ≤ 0.786
    assert row["step_fraction"] == pytest.approx(0.8**2)
    assert float(row["kl"]) == pytest.approx(0.01 * (0.64**2 + 0.64**4), rel=1e-3)


@pytest.mark.parametrize("why", ["surrogate", "divergence", "nan"])
def test_refused(monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    """The sixteenth try is not made; the bits of θ stay."""
    learner = make_learner()
    before = [value.detach().clone() for value in learner.policy.parameters()]
    gain: Callable[[Tensor], Tensor] = {
        "surrogate": lambda x: x - x**2 / 0.043, "divergence": lambda x: x, "nan": lambda x: x + 0 / x.square(),
    }[why]  # fmt: skip
    row = towards(learner, monkeypatch, gain, bend=1e9 if why == "divergence" else 0.0)
    assert (row["accepted"], row["step_fraction"], float(row["kl"])) == (0, 0, 0)
    assert all(torch.equal(*pair) for pair in zip(before, learner.policy.parameters(), strict=True))
    if why != "nan":
        assert float(row["loss"]) == 0


def test_nothing_to_gain() -> None:
    """Without advantages there is no direction; nothing becomes NaN."""
    learner = make_learner()
    before, after = make_batches()
    start = learner.flat()
    row = learner.outer_step(before, after._replace(advantages=torch.zeros_like(after.advantages)))
    assert (row["accepted"], float(row["kl"]), float(row["loss"])) == (0, 0, 0)
    assert torch.equal(learner.flat(), start)


# ---- what acts


def make_agent(rollouts: int = 2) -> MAMLAgent:
    torch.manual_seed(0)
    return MAMLAgent(GaussianHead([2, 4, 2], std=0.5), SIZES, CONFIG, rollouts)


@pytest.mark.parametrize("rollouts", [1, 2, 3])
def test_agent_adapts_each_task(rollouts: int) -> None:
    """θ until it has explored; then each task's own θ' for its rows, and no other one; θ again for new tasks."""
    agent, trials, token = make_agent(rollouts), make_trials(), torch.randn(6, SIZES.token)
    agent.reset(6, trials.tasks)
    first = agent.step(token)
    wanted = agent.policy(token[:, :2])
    assert torch.equal(first.mean, wanted.mean)
    for episodes in (1, 2):
        agent.explore = episodes
        agent.reset(6, trials.tasks)
        for until in (1, 2):
            agent.new_episode(Trials(*(part[:, :until] for part in trials[:4]), trials.tasks))  # type: ignore[call-arg]
            assert torch.equal(agent.step(token).mean, first.mean) == (until < episodes)
        found = agent.step(token)
        assert found.mean.shape == found.stddev.shape == (6, 2)
        batch = doubled(batch_of(trials, rollouts, SIZES, 0.99, slice(0, episodes)))
        for row in range(6):
            params = {name: value.double().requires_grad_() for name, value in inner.parameters(agent.policy).items()}
            moved = looped_step(agent.policy, params, task_of(batch, row // rollouts), 0.1, True)
            one = functional_call(agent.policy, moved, (token[row, :2].double(),))
            torch.testing.assert_close(found.mean[row].double(), one.mean.detach(), rtol=0, atol=1e-5)
            torch.testing.assert_close(found.stddev[row].double(), one.stddev.detach(), rtol=0, atol=1e-5)
        assert (found.mean - first.mean).abs().max() > 1e-3
    agent.reset(6, trials.tasks)
    assert torch.equal(agent.step(token).mean, first.mean)


def test_agent_sees_the_observation_alone() -> None:
    agent, trials = make_agent(), make_trials()
    agent.explore = 2
    token = torch.randn(6, SIZES.token)
    other = torch.cat([token[:, :2], torch.randn(6, SIZES.token - 2)], 1)
    for _ in range(2):
        assert torch.equal(agent.step(token).mean, agent.step(other).mean)
        agent.new_episode(trials)


def test_agent_explores_in_tests() -> None:
    """Each episode that is scored comes after one inner step on episodes by θ, all with drawn actions."""
    learner = make_learner()
    agent = learner.agent
    assert agent.rollouts == 1
    assert agent.policy is learner.policy
    assert next(agent.parameters()).device == learner.accelerator.device
    env = make_vector(learner.config.env, 3)
    tasks = np.array([[0.3], [1.0], [2.5]])
    found = evaluate_adaptation(agent, env, episodes=3, horizon=4, tasks=tasks, seed=7)
    shape = 3, 4, 3, 2
    noise, begin = standard_normal(7, 1, shape=shape), starts(7, episodes=3, count=3)
    plain = MAMLAgent(learner.policy, learner.sizes, learner.config)
    plain.explore = 9
    explored, _ = collect(plain, env, tasks, episodes=3, horizon=4, seeds=begin, noise=noise)
    for episode in range(3):
        params = inner.parameters(learner.policy)
        seen = Trials(*(part[:, :episode] for part in explored[:4]), explored.tasks)
        acting = MAMLAgent(learner.policy, learner.sizes, learner.config)
        if episode:
            batch = batch_of(seen, 1, learner.sizes, learner.config.inner_discount)
            acting._adapted = adapted(learner.policy, params, batch, learner.config.inner_lr)
        acting.reset = lambda count=1, tasks=None: None  # type: ignore[method-assign]
        wanted, _ = collect(acting, env, tasks, episodes=1, horizon=4, seeds=begin[episode : episode + 1])
        np.testing.assert_allclose(found.rewards[:, episode], wanted.rewards[:, 0].numpy(), rtol=1e-5)


# ---- the learner


def test_collection() -> None:
    """Rows of a task share it; episode 1 by θ, episode 2 by θ' of the outer step, noise by its place."""
    learner = make_learner()
    trials, _ = learner.collect(3)
    assert trials.rewards.shape == (6, 2, 6)
    assert torch.equal(trials.tasks[::2], trials.tasks[1::2])
    assert len(trials.tasks.unique()) == 3
    noise = standard_normal(0, 3, maml.NOISE, shape=(2, 6, 6, 2)).permute(2, 0, 1, 3)
    seen = trials.tokens[..., :2]
    with torch.no_grad():
        acting = learner.policy(seen[:, 0])
    torch.testing.assert_close(trials.actions[:, 0], acting.mean + acting.stddev * noise[:, 0])
    before = batch_of(trials, 2, SIZES, 0.99, slice(0, 1))
    moved = adapted(learner.policy, inner.parameters(learner.policy), before, 0.1)
    acting = distributions(learner.policy, moved, seen[:, 1].reshape(3, 12, 2))
    drawn = acting.mean + acting.stddev * noise[:, 1].reshape(3, 12, 2)
    torch.testing.assert_close(trials.actions[:, 1].reshape(3, 12, 2), drawn, rtol=0, atol=1e-5)
    assert not torch.equal(learner.collect(4)[0].tasks, trials.tasks)


def test_row() -> None:
    learner = make_learner(replace(CONFIG, init_std=0.2))
    trials, _ = learner.collect(0)
    row = learner.step(0)
    assert set(row) == {"loss", "kl", "accepted", "step_fraction", "entropy", "std", "return_1", "return_2"}
    for e in range(2):
        assert float(row[f"return_{e + 1}"]) == pytest.approx(float(trials.rewards[:, e].sum()) / 6, rel=1e-5)
    std = learner.policy.log_std.detach().exp()
    assert float(row["std"]) == pytest.approx(float(std.mean()), rel=1e-6)
    assert float(row["entropy"]) == pytest.approx(float(Normal(torch.zeros(2), std).entropy().sum()), rel=1e-5)


def test_infos_are_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the steps that count, and without what is not known."""
    learner = make_learner()
    real = learner.env.step
    at = iter(range(12))

    def step(actions: np.ndarray) -> tuple[Any, ...]:
        *found, _ = real(actions)
        known = np.array([next(at), np.nan, np.nan, np.nan, np.nan, np.nan])
        return *found, {"error": known, "nothing": np.full(6, np.nan)}

    monkeypatch.setattr(learner.env, "step", step)
    _, infos = learner.collect(0)
    assert infos == {"error": 5.5}


def test_same_seed_same_bits_and_resumed() -> None:
    one, two, resumed = make_learner(), make_learner(), make_learner()
    rows = [one.step(0), one.step(1)]
    again = [two.step(0)]
    resumed.policy.load_state_dict({k: v.clone() for k, v in two.state()["model"].state_dict().items()})
    again.append(resumed.step(1))
    assert rows == again
    assert torch.equal(one.flat(), resumed.flat())
    assert not torch.equal(one.flat(), make_learner().flat())
    assert not torch.equal(make_learner(replace(CONFIG, seed=1)).flat(), make_learner().flat())


def test_learns() -> None:
    """Short episodes of the point robot: the inner step helps by much, and after a few updates by more."""
    learner = make_learner(replace(CONFIG, horizon=10, tasks=10, rollouts=5, inner_lr=0.3, init_std=0.5))
    rows = [learner.step(step) for step in range(10)]
    assert all(row["return_2"] > row["return_1"] + 1.5 for row in rows)
    assert all(row["accepted"] for row in rows)
    first, last = (np.mean([float(row["return_2"]) for row in part]) for part in (rows[:2], rows[-3:]))
    assert last > first + 0.3


class Together:
    """An accelerator of one of several processes, which are threads here."""

    device = torch.device("cpu")

    def __init__(self, index: int, barrier: threading.Barrier, held: list[Tensor]) -> None:
        self.process_index, self.num_processes = index, barrier.parties
        self.barrier, self.held = barrier, held

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        self.held[self.process_index] = value
        self.barrier.wait(60)
        found = getattr(torch.stack(self.held), reduction)(0)
        self.barrier.wait(60)
        return found


@ORDERS
def test_two_processes_take_the_same_step(first_order: bool) -> None:
    """Of a linear policy: with more parameters, first order's divergence is so flat that rounding shows."""
    config = replace(LINEAR, tasks=4, first_order=first_order)
    alone = make_learner(config)
    barrier, held = threading.Barrier(2), [torch.zeros(())] * 2
    learners = [MAMLLearner(config, Together(i, barrier, held)) for i in range(2)]  # type: ignore[arg-type]
    assert [learner.env.num_envs for learner in learners] == [4, 4]
    rows: dict[int, list[dict[str, Any]]] = {0: [], 1: []}

    def run(index: int) -> None:
        torch.set_num_threads(1)
        rows[index] = [learners[index].step(step) for step in range(2)]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    wanted = [alone.step(step) for step in range(2)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 2
    assert torch.equal(learners[0].flat(), learners[1].flat())
    torch.testing.assert_close(learners[0].flat(), alone.flat(), rtol=0, atol=1e-5)
    for row, other in zip(rows[0], wanted, strict=True):
        assert {k: float(v) for k, v in row.items()} == pytest.approx({k: float(v) for k, v in other.items()}, abs=1e-5)
