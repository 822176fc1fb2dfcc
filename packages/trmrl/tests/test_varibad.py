"""VariBAD: the belief, its ELBO, who trains what, and the buffer of trials."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from metazoo import checkpoint
from torch import Tensor
from torch.distributions import Normal, kl_divergence
from trmrl import varibad
from trmrl.config import Config
from trmrl.model import Sizes, Trials
from trmrl.ppo import PPOLearner
from trmrl.varibad import BeliefLearner, BeliefModel, VariBADPolicy, gaussian_kl

SIZES = Sizes(observation=3, action=2)
CONFIG = Config(
    algo="varibad", horizon=4, episodes=2, tasks=3, d_model=8, heads=2, latent=2, head_hidden=(8,), vae_trials=5
)
KEYS = {"elbo_loss", "reconstruction", "belief_kl", "belief_std"}


def make_trials(count: int = 3, seed: int = 0, config: Config = CONFIG, sizes: Sizes = SIZES) -> Trials:
    rng = np.random.default_rng(seed)
    shape = count, config.episodes, config.horizon
    numbers = [
        torch.from_numpy(rng.standard_normal((*shape, n), dtype=np.float32)) for n in (sizes.token, sizes.action)
    ]
    tokens, actions = numbers
    tokens[:, :, 0, sizes.observation :] = 0  # no transition comes before an episode's first step
    tokens[..., -1] = 0
    return Trials(tokens, actions, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), torch.zeros(count, 1))


def make_policy(config: Config = CONFIG) -> VariBADPolicy:
    torch.manual_seed(0)
    return VariBADPolicy(SIZES, config)


def make_learner(config: Config = CONFIG) -> tuple[VariBADPolicy, BeliefLearner]:
    policy = make_policy(config)
    return policy, BeliefLearner(config, policy, Accelerator(cpu=True))


def features(policy: VariBADPolicy, trials: Trials) -> Tensor:
    return policy.features(trials, torch.arange(trials.size)).unflatten(0, (len(trials.tokens), -1))


def bits(policy: VariBADPolicy) -> list[Tensor]:
    return [value.clone() for value in policy.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


# ---- the belief


@pytest.mark.parametrize("masks", [{}, {"mask_reward": True, "mask_action": True}])
def test_step_by_step_is_as_stored(masks: dict[str, bool]) -> None:
    policy, trials = make_policy(replace(CONFIG, **masks)), make_trials()
    policy.reset(3)
    found = []
    for episode in range(2):
        if episode:
            policy.new_episode()
        found += [policy.memory(trials.tokens[:, episode, t]) for t in range(4)]
    torch.testing.assert_close(torch.stack(found, 1), features(policy, trials))
    some = policy.features(trials, torch.arange(16).roll(8))  # trial 1, then 0
    torch.testing.assert_close(some, features(policy, trials)[[1, 0]].flatten(0, 1))
    torch.testing.assert_close(policy.step(trials.tokens[:, 0, 0]).mean.shape, torch.Size([3, 2]))


def test_first_belief_is_the_prior_step_whatever_is_observed() -> None:
    policy, trials = make_policy(), make_trials()
    first = features(policy, trials)[:, 0, 3:]
    assert torch.equal(first, first[:1].expand_as(first))
    hidden = torch.zeros(1, 8)
    torch.testing.assert_close(first[:1], torch.cat(policy.belief.encoder.belief(hidden), -1))
    policy.reset(3)
    torch.testing.assert_close(policy.memory(trials.tokens[:, 0, 0] + 5)[:, 3:], first)


def test_a_belief_depends_on_the_past_alone() -> None:
    policy, trials = make_policy(), make_trials()
    before = features(policy, trials)
    trials.tokens.flatten(1, 2)[:, 5] += 1
    changed = (features(policy, trials) != before)[..., 3:].any(-1).any(0)
    assert changed.tolist() == [False] * 5 + [True] * 3


@pytest.mark.parametrize(("mask", "hidden"), [("mask_reward", slice(5, 6)), ("mask_action", slice(3, 5))])
def test_masks_hide_inputs(mask: str, hidden: slice) -> None:
    trials = make_trials()
    for options, equal in ({}, False), ({mask: True}, True):
        policy = make_policy(replace(CONFIG, **options))
        changed = trials.tokens.clone()
        changed[..., hidden] += 1
        assert torch.equal(features(policy, trials), features(policy, trials._replace(tokens=changed))) is equal


def test_a_new_trial_forgets_and_a_new_episode_does_not() -> None:
    policy, trials = make_policy(), make_trials()
    policy.reset(3)
    policy.memory(trials.tokens[:, 0, 0])
    policy.memory(trials.tokens[:, 0, 1])
    policy.new_episode()
    later = policy.memory(trials.tokens[:, 1, 0])
    policy.reset(3)
    assert not torch.equal(later, policy.memory(trials.tokens[:, 1, 0]))


# ---- the ELBO


def test_kl_is_that_of_torch() -> None:
    torch.manual_seed(0)
    mean, logvar, prior_mean, prior_logvar = torch.randn(4, 6, 5)
    expected = kl_divergence(Normal(mean, (logvar / 2).exp()), Normal(prior_mean, (prior_logvar / 2).exp())).sum(-1)
    torch.testing.assert_close(gaussian_kl(mean, logvar, prior_mean, prior_logvar), expected)


def slow_elbo(
    model: BeliefModel, trials: Trials, terms: Tensor, noise: Tensor, last: int
) -> tuple[list[float], list[float]]:
    """Of the first ``last`` transitions of each episode, one number after the other."""
    errors, divergences = [], []
    for n in range(len(trials.tokens)):
        flat, valid = trials.tokens[n].flatten(0, 1), trials.valid[n].flatten()
        hidden, beliefs = torch.zeros(1, 1, 8), []
        for t in range(8):
            if t and valid[t]:
                hidden = model.encoder.gru(model.encoder.embed(flat[None, t : t + 1]), hidden)[1]
            mean, logvar = model.encoder.belief(hidden[0, 0])
            beliefs.append(Normal(mean, (logvar / 2).exp()))
        error = kl = 0.0
        for place, t in enumerate(terms[n].tolist()):
            if not valid[t]:
                continue
            prior = beliefs[t - 1] if t else Normal(torch.zeros(2), torch.ones(2))
            kl += kl_divergence(beliefs[t], prior).sum().item()
            m = (beliefs[t].mean + beliefs[t].stddev * noise[n, place])[None, None]
            for episode in range(2):
                for i in range(last):
                    if not trials.valid[n, episode, i]:
                        continue
                    now, after = trials.tokens[n, episode, i], trials.tokens[n, episode, i + 1]
                    inputs = [part[None, None] for part in (now[:3], after[3:5], after[:3])]
                    error += (model.reward(m, *inputs).item() - after[5].item()) ** 2
                    if model.state is not None:
                        error += (model.state(m, *inputs)[0, 0, 0] - after[:3]).square().mean().item()
        errors.append(error)
        divergences.append(kl)
    return errors, divergences


@pytest.mark.parametrize("decode_state", [False, True])
def test_elbo_is_that_of_a_slow_loop(decode_state: bool) -> None:
    model, trials = make_policy(replace(CONFIG, decode_state=decode_state)).belief, make_trials()
    trials.valid[1, 0, 2:] = trials.valid[2, 1, 1:] = False
    terms, transitions = torch.arange(8).repeat(3, 1), torch.arange(6).repeat(3, 1)
    noise = torch.randn(3, 8, 2, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        error, kl, std = model(trials.tokens, trials.valid, terms, transitions, noise)
        expected = slow_elbo(model, trials, terms, noise, last=3)
    torch.testing.assert_close(error, torch.tensor(expected[0]))
    torch.testing.assert_close(kl, torch.tensor(expected[1]))
    torch.testing.assert_close(std, (features_of(model, trials)[:, -1] / 2).exp())


def features_of(model: BeliefModel, trials: Trials) -> Tensor:
    found: Tensor = model.encoder(trials.tokens.flatten(1, 2), trials.valid.flatten(1))[1]
    return found


def test_sums_over_some_are_scaled_up() -> None:
    """Averaged over all choices of one t and one i, with no noise, they are the full sums."""
    model, trials = make_policy().belief, make_trials()
    noise = torch.zeros(3, 8, 2)
    with torch.no_grad():
        full = model(trials.tokens, trials.valid, torch.arange(8).repeat(3, 1), torch.arange(6).repeat(3, 1), noise)
        each = [
            model(trials.tokens, trials.valid, torch.full((3, 1), t), torch.full((3, 1), i), noise[:, :1])
            for t in range(8)
            for i in range(6)
        ]
    for whole, parts in zip(full[:2], list(zip(*each, strict=True))[:2], strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), whole)


def test_invalid_steps_have_no_influence() -> None:
    trials = make_trials()
    trials.valid[:, 1, 2:] = False
    found = []
    for change in (False, True):
        policy, learner = make_learner(replace(CONFIG, decode_state=True))
        if change:  # the token at the first invalid step holds the last valid transition
            trials.tokens[:, 1, 3] = 100.0
        row = learner.step(trials, 0)
        found.append([*bits(policy), row["elbo_loss"]])
    assert same(*found)


def test_long_trials_are_subsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varibad, "LONG", 7)
    monkeypatch.setattr(varibad, "TERMS", 3)
    monkeypatch.setattr(varibad, "TRANSITIONS", 4)
    policy, learner = make_learner()
    seen: list[Any] = []
    policy.belief.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    row = learner.step(make_trials(), 0)
    assert all(torch.isfinite(value) for value in row.values())
    for _, _, terms, transitions, noise in seen:
        assert terms.shape == (3, 3)
        assert transitions.shape == (3, 4)
        assert noise.shape == (3, 3, 2)
        assert all(len(set(part.tolist())) == len(part) for part in [*terms, *transitions])
        assert terms.max() < 8
        assert transitions.max() < 6
    assert not torch.equal(seen[0][2], seen[1][2])


# ---- who trains what


def test_ppo_trains_the_head_alone() -> None:
    learner = PPOLearner(replace(CONFIG, vae_steps=0, passes=1), Accelerator(cpu=True))
    policy = learner.policy
    trained = {id(value) for group in learner.policy_optimizer.param_groups for value in group["params"]}
    assert trained == {id(value) for value in policy.head.parameters()}
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    row = learner.step(0)
    assert not KEYS & set(row)
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]) is not name.startswith("head.")
    assert all(value.grad is None for value in policy.belief.parameters())


def test_no_gradient_of_the_policy_reaches_the_belief() -> None:
    policy, trials = make_policy(), make_trials()
    policy.belief.requires_grad_(True)  # even so
    policy(trials, torch.arange(24)).mean.sum().backward()
    assert all(value.grad is None for value in policy.belief.parameters())


def test_belief_learner_leaves_the_head() -> None:
    policy, learner = make_learner(replace(CONFIG, decode_state=True))
    before = {name: value.clone() for name, value in policy.state_dict().items()}
    row = learner.step(make_trials(), 0)
    assert set(row) == KEYS
    assert all(torch.isfinite(value) for value in row.values())
    torch.testing.assert_close(row["elbo_loss"], row["reconstruction"] + CONFIG.kl_weight * row["belief_kl"])
    for name, value in policy.state_dict().items():
        assert torch.equal(value, before[name]) is name.startswith("head."), name
    assert all(value.grad is None for value in policy.parameters())
    assert [name for name, value in policy.named_parameters() if value.requires_grad] == [
        name for name, _ in policy.named_parameters() if name.startswith("head.")
    ]


def test_trials_of_one_step() -> None:
    config = replace(CONFIG, horizon=1, episodes=1)
    policy, learner = make_learner(config)
    trials = make_trials(config=config)
    assert features(policy, trials).shape == (3, 1, 7)
    assert learner.step(trials, 0)["reconstruction"] == 0


# ---- the buffer


def test_ring_wraps() -> None:
    _, learner = make_learner(replace(CONFIG, vae_steps=0))
    one, two, many = make_trials(3, 1), make_trials(4, 2), make_trials(12, 3)
    learner.step(one, 0)
    assert torch.equal(learner.tokens[:3], one.tokens)
    assert not learner.tokens[3:].any()
    assert learner.step(two, 1) == {}
    assert torch.equal(learner.tokens, torch.cat([two.tokens[2:], one.tokens[2:], two.tokens[:2]]))
    learner.step(many, 2)
    assert {tuple(row.flatten().tolist()) for row in learner.tokens} == {
        tuple(row.flatten().tolist()) for row in many.tokens[-5:]
    }
    assert learner.valid.all()
    assert int(learner.count) == 19


def test_only_kept_trials_are_learned_from() -> None:
    _, learner = make_learner()
    learner.tokens.fill_(float("nan"))
    assert all(torch.isfinite(value) for value in learner.step(make_trials(3), 0).values())


def test_same_seed_same_bits() -> None:
    found = []
    for seed in (0, 0, 1):
        policy, learner = make_learner(replace(CONFIG, seed=seed))
        torch.manual_seed(len(found))  # global randomness plays no part
        for update in range(2):
            learner.step(make_trials(seed=update), update)
        found.append(bits(policy))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_resumed_run_has_the_same_bits(tmp_path: Any) -> None:
    policy, learner = make_learner()
    for update in range(2):
        learner.step(make_trials(seed=update), update)
    checkpoint.save(tmp_path, 2, {"policy": policy, **learner.state()})
    other, resumed = make_learner()
    assert checkpoint.restore(tmp_path, {"policy": other, **resumed.state()}) == 2
    for update in (2, 3):
        rows = [each.step(make_trials(seed=update), update) for each in (learner, resumed)]
        assert rows[0] == rows[1]
    assert same(bits(policy), bits(other))
    assert torch.equal(learner.tokens, resumed.tokens)
    assert int(resumed.count) == 12


class Half:
    """One of two processes; what it sends is kept, and comes back as it is."""

    device, num_processes = torch.device("cpu"), 2

    def __init__(self, index: int) -> None:
        self.process_index, self.sent = index, []

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        self.sent.append(value.clone())
        return value


@pytest.mark.parametrize("count", [1, 3])
def test_shares_of_two_processes_sum_to_the_whole(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    config, gradients = replace(CONFIG, vae_steps=1), []
    _policy, learner = make_learner(config)
    step = learner.optimizer.step
    monkeypatch.setattr(
        learner.optimizer, "step",
        lambda: (gradients.extend(value.grad.flatten().clone() for value in learner.parameters), step()),
    )  # fmt: skip
    row = learner.step(make_trials(count), 0)
    halves = [Half(0), Half(1)]
    for half in halves:
        BeliefLearner(config, make_policy(config), half).step(make_trials(count), 0)  # type: ignore[arg-type]
    sums = [sum(parts) for parts in zip(*(half.sent for half in halves), strict=True)]
    torch.testing.assert_close(sums[0], torch.cat(gradients))
    torch.testing.assert_close(sums[1], torch.stack([row["reconstruction"], row["belief_kl"], row["belief_std"]]))


# ---- learning


def test_learns_to_predict_rewards_from_the_trial() -> None:
    """On the point robot; and late beliefs, which have seen the task, come to predict better than the first."""
    config = Config(algo="varibad", horizon=10, tasks=50, vae_steps=120, d_model=32, latent=3)
    learner = PPOLearner(config, Accelerator(cpu=True))
    trials, _ = learner.collect(0)
    belief: BeliefLearner = learner.auxiliary

    @torch.no_grad()
    def error(t: int) -> float:
        terms, transitions = torch.full((50, 1), t), torch.arange(18).repeat(50, 1)
        found = belief.model(trials.tokens, trials.valid, terms, transitions, torch.zeros(50, 1, 3))
        return float(found[0].mean()) / (20 * 18)

    start = error(19)
    row = belief.step(trials, 0)
    assert all(torch.isfinite(value) for value in row.values())
    assert error(19) < 0.2 * start
    assert error(19) < 0.8 * error(0)
