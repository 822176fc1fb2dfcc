"""PEARL: the posterior, the actor's density, who trains what, what is kept, and that bits repeat."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from gymnasium import spaces
from metazoo import checkpoint
from metazoo.errors import UserError
from torch import Tensor
from torch.distributions import (
    AffineTransform,
    Independent,
    Normal,
    TanhTransform,
    TransformedDistribution,
    kl_divergence,
)
from torch.nn import functional as F
from trmrl import pearl
from trmrl.collect import collect, standard_normal, starts
from trmrl.config import Config
from trmrl.env import PointRobotVectorEnv
from trmrl.model import Sizes, Trials
from trmrl.pearl import Batch, PEARLAgent, PEARLLearner, PEARLModel, Squashed, product_of_gaussians

SIZES = Sizes(observation=2, action=2, task=1)
CONFIG = Config(
    algo="pearl", horizon=4, episodes=2, tasks=3, updates=3, latent=3, sac_steps=2, sac_tasks=2, sac_batch=5, context=6,
    train_tasks=4, sac_hidden=8, sac_lr=1e-2,
)  # fmt: skip
LOW, HIGH = np.array([-1.0, 0.0]), np.array([1.0, 4.0])


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def make_model(config: Config = CONFIG) -> PEARLModel:
    """A model with last layers away from zero, so that nothing holds for the smallness of its outputs."""
    torch.manual_seed(0)
    model = PEARLModel(SIZES, config, LOW, HIGH)
    with torch.no_grad():
        for value in model.parameters():
            value.add_(0.1 * torch.randn_like(value))
    return model


def make_learner(config: Config = CONFIG) -> PEARLLearner:
    return PEARLLearner(config, Accelerator(cpu=True))


def make_trials(count: int = 3, horizon: int = 4, episodes: int = 2, seed: int = 0) -> Trials:
    draws = torch.Generator().manual_seed(seed)
    shape = count, episodes, horizon
    tokens, actions = (torch.randn(*shape, width, generator=draws) for width in (SIZES.token, SIZES.action))
    return Trials(
        tokens, actions, torch.randn(shape, generator=draws), torch.ones(shape, dtype=torch.bool), torch.zeros(count, 1)
    )


def make_batch(seed: int = 0, tasks: int = 2, batch: int = 5) -> Batch:
    draws = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draws)

    ended = (drawn(tasks, batch) > 0).float()
    return Batch(
        drawn(tasks, batch, 2), drawn(tasks, batch, 2), drawn(tasks, batch), drawn(tasks, batch, 2), ended,
        drawn(tasks, 6, 5), drawn(tasks, CONFIG.latent), drawn(tasks, batch, 2), tasks,
    )  # fmt: skip


def bits(learner: PEARLLearner) -> list[Tensor]:
    """Everything that a checkpoint would hold."""
    found: dict[str, Tensor] = {}
    for name, part in learner.state().items():
        checkpoint._pack(part.state_dict(), name, found)
    return [found[name] for name in sorted(found)]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def snapshot(module: torch.nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in module.state_dict().values()]


# ---- the posterior


def test_product_of_two_gaussians_is_the_closed_form() -> None:
    mean, variance = torch.tensor([[1.0], [4.0]]), torch.tensor([[0.5], [2.0]])
    found = product_of_gaussians(mean, variance, torch.ones(2, dtype=torch.bool))
    assert found[0].item() == pytest.approx((1 / 0.5 + 4 / 2) / (1 / 0.5 + 1 / 2))
    assert found[1].item() == pytest.approx(1 / (1 / 0.5 + 1 / 2))


def test_product_of_densities_is_proportional_to_the_product() -> None:
    draws = torch.Generator().manual_seed(0)
    mean, variance = torch.randn(6, 3, generator=draws).double(), torch.rand(6, 3, generator=draws).double() + 0.1
    found = product_of_gaussians(mean, variance, torch.ones(6, dtype=torch.bool))
    at = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None, None]
    each = Normal(mean, variance.sqrt(), validate_args=False).log_prob(at).sum(1)
    product = Normal(found[0], found[1].sqrt(), validate_args=False).log_prob(at[:, 0])
    torch.testing.assert_close(each - each[:1], product - product[:1])


def test_tiny_variances_are_clamped() -> None:
    mean = torch.tensor([[1.0], [3.0]])
    found = product_of_gaussians(mean, torch.tensor([[0.0], [1e-7]]), torch.ones(2, dtype=torch.bool))
    torch.testing.assert_close(found, (torch.tensor([2.0]), torch.tensor([0.5e-7])))


def test_posterior_does_not_depend_on_the_order() -> None:
    model, context = make_model(), make_batch().context
    mask = torch.ones(context.shape[:2], dtype=torch.bool)
    mask[0, 4:] = False
    order = torch.tensor([5, 2, 0, 4, 1, 3])
    one, other = model.posterior(context, mask), model.posterior(context[:, order], mask[:, order])
    torch.testing.assert_close(one.mean, other.mean)
    torch.testing.assert_close(one.stddev, other.stddev)
    torch.testing.assert_close(one.mean[:1], model.posterior(context[:1, :4], mask[:1, :4]).mean)


def test_posterior_variance_is_the_softplus_of_the_second_half() -> None:
    model, context = make_model(), make_batch().context[:, :1]
    out = model.encoder(context)[:, 0]
    found = model.posterior(context, torch.ones(2, 1, dtype=torch.bool))
    torch.testing.assert_close(found.mean, out[:, : CONFIG.latent])
    torch.testing.assert_close(found.variance, F.softplus(out[:, CONFIG.latent :]))


@pytest.mark.parametrize("rows", [0, 3])
def test_posterior_without_context_is_the_prior(rows: int) -> None:
    found = make_model().posterior(torch.randn(2, rows, 5), torch.zeros(2, rows, dtype=torch.bool))
    assert torch.equal(found.mean, torch.zeros(2, CONFIG.latent))
    assert torch.equal(found.stddev, torch.ones(2, CONFIG.latent))


# ---- the actor


def test_density_of_actions_is_the_change_of_variables() -> None:
    draws = torch.Generator().manual_seed(0)
    mean, std = torch.randn(7, 2, generator=draws).double(), torch.rand(7, 2, generator=draws).double() + 0.2
    noise = torch.randn(7, 2, generator=draws).double()
    scale, middle = (torch.from_numpy(part) for part in ((HIGH - LOW) / 2, (HIGH + LOW) / 2))
    found = Squashed(Normal(mean, std), scale, middle)
    action, log_prob = found.draw_with_log_prob(noise)
    squashed = TransformedDistribution(Independent(Normal(mean, std), 1), [TanhTransform()])
    torch.testing.assert_close(log_prob, squashed.log_prob((action - middle) / scale))
    scaled = TransformedDistribution(squashed, [AffineTransform(middle, scale, event_dim=1)])
    torch.testing.assert_close(log_prob - scale.log().sum(), scaled.log_prob(action))  # scaling moves it by a constant


def test_density_stays_finite_where_tanh_is_one() -> None:
    mean = torch.tensor([[30.0, -30.0]], requires_grad=True)
    action, log_prob = Squashed(Normal(mean, torch.ones(1, 2)), torch.ones(2), torch.zeros(2)).draw_with_log_prob(
        torch.zeros(1, 2)
    )
    # log N(0; 0, 1) − log(4 e^−2|u|), twice
    assert log_prob.item() == pytest.approx(2 * (-0.5 * np.log(2 * np.pi) - np.log(4) + 60), rel=1e-5)
    (gradient,) = torch.autograd.grad(log_prob.sum() + action.sum(), mean)
    assert torch.isfinite(gradient).all()


def test_actions_reach_the_bounds_and_no_further() -> None:
    found = make_model().act(torch.zeros(1, 2), torch.zeros(1, CONFIG.latent))
    assert torch.equal(found.draw(torch.full((1, 2), 1e6)), torch.tensor(HIGH[None], dtype=torch.float32))
    assert torch.equal(found.draw(torch.full((1, 2), -1e6)), torch.tensor(LOW[None], dtype=torch.float32))
    assert torch.equal(found.draw(torch.zeros(1, 2)), found.mean)


def test_log_std_is_clamped() -> None:
    model = make_model()
    for far, bound in ((100.0, 2.0), (-100.0, -20.0)):
        with torch.no_grad():
            model.actor[-1].bias[SIZES.action :] = far
        std = model.act(torch.zeros(1, 2), torch.zeros(1, CONFIG.latent)).before.stddev
        torch.testing.assert_close(std, torch.full((1, 2), bound).exp())


def test_networks_have_three_hidden_layers() -> None:
    linear = [part for part in make_model().encoder if isinstance(part, torch.nn.Linear)]
    assert [part.in_features for part in linear] == [SIZES.observation + SIZES.action + 1, 8, 8, 8]
    assert linear[-1].out_features == 2 * CONFIG.latent


# ---- losses


def test_critic_loss_by_hand() -> None:
    learner, batch = make_learner(), make_batch()
    learner.model = model = make_model()
    with torch.no_grad():
        for value in model.target.parameters():
            value.add_(0.3)  # the target is another network than the value
    loss, z, shown = learner.critic_loss(batch)
    errors, divergences = [], []
    for task in range(2):
        posterior = model.posterior(batch.context[task], torch.ones(6, dtype=torch.bool))
        embedding = posterior.mean + posterior.stddev * batch.latent_noise[task]
        torch.testing.assert_close(z[task], embedding)
        divergences.append(kl_divergence(posterior, Normal(torch.zeros(3), torch.ones(3))).sum())
        for row in range(5):
            value = model.target(torch.cat([batch.following[task, row], embedding]))[0]
            ended, reward = batch.ended[task, row], batch.reward[task, row]
            wanted = 5.0 * reward + (0.0 if ended else 0.9 * value)
            joined = torch.cat([batch.state[task, row], batch.action[task, row], embedding])
            errors.append(sum((critic(joined)[0] - wanted) ** 2 for critic in model.critics))
    mean, divergence = torch.stack(errors).mean(), torch.stack(divergences).sum()
    torch.testing.assert_close(loss, mean + 0.1 * divergence)
    torch.testing.assert_close(shown[:2], torch.stack([mean, divergence]).detach())


def test_policy_losses_by_hand() -> None:
    learner, batch = make_learner(), make_batch()
    learner.model = model = make_model()
    z = torch.randn(2, CONFIG.latent, generator=torch.Generator().manual_seed(1))
    value_loss, actor_loss, entropy = learner.policy_losses(batch, z)
    wanted, actors, logs, regular = [], [], [], []
    for task in range(2):
        for row in range(5):
            state = batch.state[task, row]
            found = model.act(state, z[task])
            action, log_prob = found.draw_with_log_prob(batch.action_noise[task, row])
            least = min(critic(torch.cat([state, action, z[task]]))[0] for critic in model.critics)
            wanted.append((model.value(torch.cat([state, z[task]]))[0] - (least - log_prob)) ** 2)
            actors.append(log_prob - least)
            logs.append(log_prob)
            out = model.actor(torch.cat([state, z[task]]))
            regular.append(1e-3 * (out[:2] ** 2).mean() + 1e-3 * (out[2:] ** 2).mean())
    torch.testing.assert_close(value_loss, torch.stack(wanted).mean())
    torch.testing.assert_close(actor_loss, torch.stack(actors).mean() + torch.stack(regular).mean())
    torch.testing.assert_close(entropy, -torch.stack(logs).mean().detach())


def test_critics_train_the_encoder_and_actor_and_value_do_not() -> None:
    learner, batch = make_learner(), make_batch()
    learner.model = model = make_model()
    encoder = list(model.encoder.parameters())
    loss, z, _ = learner.critic_loss(batch)
    assert not z.requires_grad
    gradients = torch.autograd.grad(loss, encoder, allow_unused=True)
    assert all(gradient is not None and gradient.any() for gradient in gradients)
    others = [*model.actor.parameters(), *model.value.parameters(), *model.target.parameters()]
    losses = learner.policy_losses(batch, z)
    with_grad = [value for value in others if value.requires_grad]
    assert not any(
        g is not None for g in torch.autograd.grad(learner.critic_loss(batch)[0], with_grad, allow_unused=True)
    )
    for found in losses[:2]:
        gradients = torch.autograd.grad(found, encoder, allow_unused=True, retain_graph=True)
        assert all(gradient is None for gradient in gradients)


def test_bellman_errors_reach_the_encoder_without_the_kl() -> None:
    learner = make_learner(replace(CONFIG, kl_weight=0.0))
    learner.model = make_model()
    gradients = torch.autograd.grad(learner.critic_loss(make_batch())[0], list(learner.model.encoder.parameters()))
    assert all(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("name", ["critic", "value", "actor"])
def test_each_optimizer_moves_its_own_networks(name: str) -> None:
    learner = make_learner()
    batch = make_batch()
    loss, z, _ = learner.critic_loss(batch)
    losses = dict(zip(("value", "actor"), learner.policy_losses(batch, z)[:2], strict=True)) | {"critic": loss}
    parts = ("encoder", "critics", "value", "actor", "target")
    before = {part: snapshot(getattr(learner.model, part)) for part in parts}
    learner._optimise(name, losses[name])
    moved = {part for part in parts if not same(before[part], snapshot(getattr(learner.model, part)))}
    assert moved == ({"encoder", "critics"} if name == "critic" else {name})


def test_target_moves_a_little_towards_the_value() -> None:
    learner = make_learner()
    learner.step(0)
    before = snapshot(learner.model.target)
    learner.gradient_step(0, 9)
    for old, value, new in zip(
        before, learner.model.value.parameters(), learner.model.target.parameters(), strict=True
    ):
        torch.testing.assert_close(new, 0.995 * old + 0.005 * value)
    assert not same(before, snapshot(learner.model.target))


def test_actor_and_value_are_trained_by_the_new_critics(monkeypatch: pytest.MonkeyPatch) -> None:
    learner, order = make_learner(), []
    learner.step(0)
    optimise, losses = learner._optimise, learner.policy_losses
    monkeypatch.setattr(learner, "_optimise", lambda name, loss: (order.append(name), optimise(name, loss)))
    monkeypatch.setattr(learner, "policy_losses", lambda *args: (order.append("losses"), losses(*args))[1])
    learner.gradient_step(1, 0)
    assert order == ["critic", "losses", "value", "actor"]


# ---- buffers


def test_kept_transitions_follow_each_other_and_last_steps_are_left_out() -> None:
    learner, trials = make_learner(), make_trials()
    learner.keep(trials, np.array([2, 0, 3]))
    assert learner.count.tolist() == [6, 0, 6, 6]  # 2 episodes of 4 steps, less the last of each
    for row, task in enumerate([2, 0, 3]):
        for place in range(6):
            episode, t = divmod(place, 3)
            state, action, reward, following, ended = learner.kept[task, place].split([2, 2, 1, 2, 1])
            assert torch.equal(state, trials.tokens[row, episode, t, :2])
            assert torch.equal(action, trials.actions[row, episode, t])
            assert torch.equal(reward[0], trials.rewards[row, episode, t])
            assert torch.equal(following, trials.tokens[row, episode, t + 1, :2])
            assert ended == 0  # a time limit is no end


def test_ends_are_kept_with_d_and_steps_after_them_are_not() -> None:
    learner, trials = make_learner(), make_trials(1)
    trials.valid[0, 0, 2:] = False  # ended at step 1
    trials.valid[0, 1, 3:] = False  # ended at step 2, one before the horizon
    learner.keep(trials, np.array([1]))
    assert learner.count.tolist() == [0, 5, 0, 0]
    assert learner.kept[1, :5, -1].tolist() == [0, 1, 0, 0, 1]
    assert torch.equal(learner.kept[1, :5, 4], torch.cat([trials.rewards[0, 0, :2], trials.rewards[0, 1, :3]]))


def test_an_episode_that_lasts_to_the_horizon_is_not_taken_for_ended() -> None:
    learner, trials = make_learner(), make_trials(1)
    learner.keep(trials, np.array([0]))
    assert not learner.kept[0, :, -1].any()


def test_contexts_hold_the_newest_exploration_alone() -> None:
    learner, first, second = make_learner(), make_trials(1, seed=0), make_trials(1, seed=1)
    learner.keep(first, np.array([1]))
    assert learner.explored_count.tolist() == [0, 4, 0, 0]  # the last step has a reward, so it tells of the task
    second.valid[0, 0, 2:] = False
    learner.keep(second, np.array([1]))
    assert learner.explored_count.tolist() == [0, 2, 0, 0]
    wanted = torch.cat([second.tokens[0, 0, :, :2], second.actions[0, 0], second.rewards[0, 0, :, None]], -1)
    assert torch.equal(learner.explored[1, :2], wanted[:2])
    learner.count[:] = torch.tensor([0, 6, 0, 0])
    batch = learner.draw(0, 0)
    assert batch is not None
    rows = [wanted[0].tolist(), wanted[1].tolist()]
    assert all(row in rows for row in batch.context.flatten(0, 1).tolist())


def test_ring_keeps_the_newest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pearl, "CAPACITY", 8)
    learner = make_learner()
    first, second = make_trials(1, seed=0), make_trials(1, seed=1)
    for trials in (first, second):
        learner.keep(trials, np.array([0]))
    assert learner.count.tolist() == [12, 0, 0, 0]
    rewards = torch.cat([part.rewards[0, :, :3].flatten() for part in (first, second)])
    assert learner.kept[0, :, 4].tolist() == torch.cat([rewards[8:], rewards[4:8]]).tolist()


def test_ring_smaller_than_one_trial_keeps_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pearl, "CAPACITY", 4)
    learner, trials = make_learner(), make_trials(1)
    learner.keep(trials, np.array([0]))
    rewards = trials.rewards[0, :, :3].flatten()
    assert learner.count[0] == 6
    assert learner.kept[0, :, 4].tolist() == [*rewards[4:6].tolist(), *rewards[2:4].tolist()]


def test_batches_come_from_tasks_with_data_and_their_own_rows() -> None:
    learner = make_learner(replace(CONFIG, sac_tasks=7))
    learner.keep(make_trials(2), np.array([3, 1]))
    learner.kept[:, :, 4] = torch.arange(4.0)[:, None]  # rewards and contexts name their task
    learner.explored[:] = torch.arange(4.0)[:, None, None]
    found = [learner.draw(step, 0) for step in range(3)]
    for batch in found:
        assert batch is not None
        assert batch.state.shape == (7, 5, 2)
        assert batch.context.shape == (7, 6, 5)
        assert set(batch.reward.flatten().tolist()) <= {1.0, 3.0}
        assert torch.equal(batch.reward[:, :1].expand(-1, 5), batch.reward)
        assert torch.equal(batch.context[:, 0, 0], batch.reward[:, 0])


def test_processes_share_the_tasks_of_a_batch() -> None:
    learner = make_learner(replace(CONFIG, sac_tasks=3))
    learner.keep(make_trials(), np.array([0, 1, 2]))
    whole = learner.draw(0, 0)
    assert whole is not None
    parts = []
    for index in range(4):
        learner.accelerator = SimpleNamespace(process_index=index, num_processes=4, device=torch.device("cpu"))  # type: ignore[assignment]
        parts.append(learner.draw(0, 0))
    assert parts[3] is None
    for i, part in enumerate(parts[:3]):
        assert part is not None
        assert part.total == whole.total
        assert all(torch.equal(a[0], b[i]) for a, b in zip(part[:-1], whole[:-1], strict=True))


def test_losses_of_shares_sum_to_the_loss_of_all() -> None:
    learner, batch = make_learner(), make_batch(tasks=3)
    learner.model = make_model()
    parts = [Batch(*(part[i : i + 1] for part in batch[:-1]), 3) for i in range(3)]
    loss, z, shown = learner.critic_loss(batch)
    found = [learner.critic_loss(part) for part in parts]
    torch.testing.assert_close(sum(part[0] for part in found), loss)
    torch.testing.assert_close(sum(part[2] for part in found), shown)
    whole = learner.policy_losses(batch, z)
    split = [learner.policy_losses(part, found[i][1]) for i, part in enumerate(parts)]
    for i in range(3):
        torch.testing.assert_close(sum(part[i] for part in split), whole[i])


# ---- the agent


def test_first_episode_has_the_prior_and_later_ones_the_posterior() -> None:
    model, trials = make_model(), make_trials()
    noise = torch.randn(2, 3, CONFIG.latent, generator=torch.Generator().manual_seed(5))
    agent = PEARLAgent(model, noise)
    token = torch.randn(3, SIZES.token)
    agent.reset(3)
    assert torch.equal(agent.step(token).mean, model.act(token[:, :2], noise[0]).mean)
    agent.new_episode(trials)
    context = torch.cat([trials.tokens[..., :2], trials.actions, trials.rewards[..., None]], -1).flatten(1, 2)
    found = model.posterior(context, torch.ones(3, 8, dtype=torch.bool))
    z = found.mean + found.stddev * noise[1]
    torch.testing.assert_close(agent.step(token).mean, model.act(token[:, :2], z).mean)
    agent.reset(3)
    assert torch.equal(agent.step(token).mean, model.act(token[:, :2], noise[0]).mean)


def test_a_row_of_the_posterior_sees_its_own_valid_steps_alone() -> None:
    agent, trials = PEARLAgent(make_model()), make_trials()
    trials.valid[0, 0, 2:] = False

    def embedding(seen: Trials) -> Tensor:
        agent.reset(3)
        agent.new_episode(seen)
        return agent._z

    before = embedding(trials)
    changed = trials._replace(actions=trials.actions.clone(), rewards=trials.rewards.clone())
    changed.actions[1] += 1.0
    changed.rewards[0, 0, 2:] = 7.0  # after the end
    after = embedding(changed)
    assert torch.equal(before[[0, 2]], after[[0, 2]])
    assert not torch.equal(before[1], after[1])


def test_agent_shows_nothing_but_the_state() -> None:
    agent, token = PEARLAgent(make_model()), torch.randn(3, SIZES.token)
    agent.reset(3)
    other = torch.cat([token[:, :2], torch.randn(3, SIZES.token - 2)], -1)
    assert torch.equal(agent.step(token).mean, agent.step(other).mean)


def test_collected_actions_are_squashed_draws() -> None:
    env, model = PointRobotVectorEnv(2), make_model()
    noise = standard_normal(0, shape=(1, 4, 2, 2))
    agent = PEARLAgent(model)
    trials, _ = collect(
        agent, env, np.array([[0.5], [2.0]]), episodes=1, horizon=4, seeds=starts(0, episodes=1, count=2), noise=noise
    )
    agent.reset(2)
    for t in range(4):
        wanted = agent.step(trials.tokens[:, 0, t]).draw(noise[0, t])
        torch.testing.assert_close(trials.actions[:, 0, t], wanted.detach())


def test_collection_takes_training_tasks_by_place() -> None:
    learner = make_learner(replace(CONFIG, tasks=6))
    trials, which, _ = learner.collect(2)
    assert set(which.tolist()) == set(range(4))  # each at least once, as there are more trials than tasks
    torch.testing.assert_close(trials.tasks.double(), torch.from_numpy(learner.tasks[which]), rtol=1e-6, atol=1e-6)
    again, same_tasks, _ = learner.collect(2)
    assert np.array_equal(which, same_tasks)
    assert all(torch.equal(a, b) for a, b in zip(trials, again, strict=True))
    other, _, _ = learner.collect(3)
    assert not torch.equal(trials.actions, other.actions)


# ---- whole updates


def test_step_reports_what_it_should() -> None:
    row = make_learner().step(0)
    names = {"loss", "value_loss", "actor_loss", "kl", "entropy", "z_std", "return_1", "return_2"}
    assert set(row) == names
    assert all(np.isfinite(float(value)) for value in row.values())


def test_same_seed_same_bits_whatever_the_global_state() -> None:
    one, other = make_learner(), make_learner()
    for step in range(2):
        one.step(step)
        torch.manual_seed(step + 50)
        np.random.seed(step)  # noqa: NPY002
        other.step(step)
    assert same(bits(one), bits(other))
    third = make_learner(replace(CONFIG, seed=1))
    third.step(0)
    third.step(1)
    assert not same(bits(one), bits(third))


def test_restored_from_disk_it_goes_on_with_the_same_bits(tmp_path: Any) -> None:
    one = make_learner()
    one.step(0)
    checkpoint.save(tmp_path, 1, one.state())
    one.step(1)
    one.step(2)
    torch.manual_seed(99)
    other = make_learner()
    state = other.state()
    assert checkpoint.restore(tmp_path, state) == 1
    other.step(1)
    other.step(2)
    assert same(bits(one), bits(other))


def test_agent_of_a_learner_is_a_module_on_its_device() -> None:
    learner = make_learner()
    agent = learner.agent
    assert isinstance(agent, torch.nn.Module)  # evaluation asks modules for their device
    assert {id(value) for value in agent.parameters()} == {id(value) for value in learner.model.parameters()}


def test_horizon_of_one_step_is_refused() -> None:
    with pytest.raises(UserError, match="--horizon is 1: give 2 or more"):
        make_learner(replace(CONFIG, horizon=1))


def test_actions_without_bounds_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PointRobotVectorEnv, "action_space", spaces.Box(-np.inf, 1.0, (2,), np.float64))
    with pytest.raises(UserError, match="its actions have no bounds"):
        make_learner()


def test_buffers_take_what_a_run_brings_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    assert make_learner().kept.shape == (4, 3 * 2 * 4, 8)
    monkeypatch.setattr(pearl, "CAPACITY", 10)
    assert make_learner().kept.shape == (4, 10, 8)
