"""PEARL (Rakelly et al. 2019): soft actor-critic with a task's embedding z, inferred from transitions in any order.

q(z|c) ∝ Π_n N(z; f_φ(s_n, a_n, r_n)), a product of Gaussians (their equation 2), prior N(0, I). Critics' Bellman errors
and the KL divergence train the encoder; actor and value see z without its gradient. Off-policy: each training task has
a buffer of its own, and a small one of its newest exploration, which contexts are drawn from.
"""

from __future__ import annotations

import itertools
import math
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from metazoo import checkpoint, loop
from metazoo.errors import UserError
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from trmrl.collect import collect, means_of, on_all, standard_normal, starts
from trmrl.config import Config
from trmrl.env import TaskVectorEnv, make_vector
from trmrl.model import Sizes, Trials
from trmrl.ppo import share_of_tasks, sizes_of

CAPACITY = 20_000
"""Most transitions of a task that are kept."""
LOG_STD = (-20.0, 2.0)
MEAN_WEIGHT, STD_WEIGHT = 1e-3, 1e-3
"""Weights of the actor's mean² and (log std)² in its loss."""
TASKS, STARTS, NOISE, LATENTS, BATCHES, TRAIN = 0, 1, 2, 5, 6, 7


def network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Three hidden ReLU layers; the last layer starts near nothing."""
    widths = [inputs, hidden, hidden, hidden]
    layers: list[nn.Module] = []
    for width, following in itertools.pairwise(widths):
        linear = nn.Linear(width, following)
        nn.init.constant_(linear.bias, 0.1)
        layers += [linear, nn.ReLU()]
    last = nn.Linear(hidden, outputs)
    nn.init.uniform_(last.weight, -3e-3, 3e-3)
    nn.init.uniform_(last.bias, -3e-3, 3e-3)
    return nn.Sequential(*layers, last)


def product_of_gaussians(mean: Tensor, variance: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (…, latent) of a product over n: (…, n, latent), only where mask (…, n).

    1/σ² = Σ_n 1/σ_n², μ = σ² Σ_n μ_n/σ_n². Nothing at all gives the prior N(0, I).
    """
    precision = (mask[..., None] / variance.clamp(min=1e-7)).sum(-2)
    none = ~mask.any(-1, keepdim=True)
    found = 1.0 / torch.where(none, torch.ones_like(precision), precision)
    return found * (mask[..., None] * mean / variance.clamp(min=1e-7)).sum(-2), found


class Squashed:
    """Actions scale · tanh(u) + middle, u ~ N(mean, std²).

    Args:
        before: of u (…, A).
        scale, middle: (A,), half the range and the middle of actions.
    """

    def __init__(self, before: Normal, scale: Tensor, middle: Tensor) -> None:
        self.before, self.scale, self.middle = before, scale, middle

    @property
    def mean(self) -> Tensor:
        """The action of the mean of u, which is what tests take."""
        return self.scale * torch.tanh(self.before.mean) + self.middle

    def draw(self, noise: Tensor) -> Tensor:
        """Actions (…, A) from standard normal noise."""
        return self.scale * torch.tanh(self.before.mean + self.before.stddev * noise) + self.middle

    def draw_with_log_prob(self, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (…, A), and log π (…) of tanh(u): Σ log N(u) − log(1 − tanh² u)."""
        u = self.before.mean + self.before.stddev * noise
        # log(1 − tanh² u) without cancellation
        correction = 2 * (math.log(2) - u - F.softplus(-2 * u))
        return self.scale * torch.tanh(u) + self.middle, (self.before.log_prob(u) - correction).sum(-1)


class PEARLModel(nn.Module):
    """Encoder, actor, two critics, the value and its target.

    Args:
        sizes: of the environment.
        config: widths.
        low, high: (A,), of actions.
    """

    def __init__(self, sizes: Sizes, config: Config, low: np.ndarray, high: np.ndarray) -> None:
        super().__init__()
        self.sizes, self.latent = sizes, config.latent
        hidden, state, action = config.sac_hidden, sizes.observation, sizes.action
        self.encoder = network(state + action + 1, hidden, 2 * config.latent)
        self.actor = network(state + config.latent, hidden, 2 * action)
        self.critics = nn.ModuleList(network(state + action + config.latent, hidden, 1) for _ in range(2))
        self.value = network(state + config.latent, hidden, 1)
        self.target = network(state + config.latent, hidden, 1).requires_grad_(False)
        self.target.load_state_dict(self.value.state_dict())
        self.register_buffer("scale", torch.tensor((high - low) / 2, dtype=torch.float32), persistent=False)
        self.register_buffer("middle", torch.tensor((high + low) / 2, dtype=torch.float32), persistent=False)

    def posterior(self, context: Tensor, mask: Tensor) -> Normal:
        """q(z|c) of contexts (…, n, S + A + 1), as far as mask (…, n) says: (…, latent)."""
        mean, spread = self.encoder(context).chunk(2, -1)
        mean, variance = product_of_gaussians(mean, F.softplus(spread), mask)
        return Normal(mean, variance.sqrt(), validate_args=False)

    def act(self, state: Tensor, z: Tensor) -> Squashed:
        """The actor's distribution at states (…, S) with embeddings (…, latent)."""
        mean, log_std = self.actor(torch.cat([state, z], -1)).chunk(2, -1)
        return Squashed(Normal(mean, log_std.clamp(*LOG_STD).exp(), validate_args=False), self.scale, self.middle)  # type: ignore[arg-type]

    def q(self, state: Tensor, action: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Both critics (…)."""
        joined = torch.cat([state, action, z], -1)
        return self.critics[0](joined)[..., 0], self.critics[1](joined)[..., 0]


class Batch(NamedTuple):
    """A gradient step's share of one process: n tasks with b transitions and c of context each.

    state (n, b, S), action (n, b, A), reward (n, b), following (n, b, S), ended (n, b), context (n, c, S + A + 1), and
    standard normal noise of embeddings (n, latent) and of actions (n, b, A). ``tasks``: n over all processes.
    """

    state: Tensor
    action: Tensor
    reward: Tensor
    following: Tensor
    ended: Tensor
    context: Tensor
    latent_noise: Tensor
    action_noise: Tensor
    tasks: int

    @property
    def total(self) -> int:
        """Transitions over all processes."""
        return self.tasks * self.state.shape[1]


class PEARLAgent(nn.Module):
    """Acts with z from the prior in the first episode of a task, then with z from the posterior of all so far.

    Args:
        model: its networks.
        noise: (E, count, latent), standard normal, one row an episode; None: drawn from a seed of its own.
    """

    def __init__(self, model: PEARLModel, noise: Tensor | None = None) -> None:
        super().__init__()
        self.model, self.noise = model, noise
        self._episode, self._z = 0, torch.zeros(0)

    def _noise(self, count: int) -> Tensor:
        if self.noise is None:
            drawn = standard_normal(0, LATENTS, self._episode, shape=(count, self.model.latent))
        else:
            drawn = self.noise[self._episode]
        return drawn.to(self.model.scale.device)  # type: ignore[arg-type]

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        self._episode = 0
        self._z = self._noise(count)

    @torch.no_grad()
    def new_episode(self, so_far: Trials | None = None) -> None:
        assert so_far is not None
        self._episode += 1
        context = torch.cat(
            [so_far.tokens[..., : self.model.sizes.observation], so_far.actions, so_far.rewards[..., None]], -1
        ).flatten(1, 2)
        found = self.model.posterior(context, so_far.valid.flatten(1))
        self._z = found.mean + found.stddev * self._noise(len(context))

    def step(self, token: Tensor) -> Squashed:
        return self.model.act(token[:, : self.model.sizes.observation], self._z)


class PEARLLearner:
    """One update at a time: some training tasks are explored, then gradient steps on what is kept of all.

    Args:
        config: what to train.
        accelerator: of this process. Processes share the collection and the tasks of each gradient step; all keep all.

    Raises:
        UserError: a horizon of one step, as no next observation is ever seen; actions without bounds.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        if config.horizon < 2:
            raise UserError("--horizon is 1: give 2 or more, as pearl learns from steps that have a next observation")
        self.config, self.accelerator = config, accelerator
        self.mine = share_of_tasks(config.tasks, accelerator)
        self.sizes = sizes_of(config.env)
        torch.manual_seed(config.seed)
        first = make_vector(config.env, 1)
        space = first.single_action_space
        if not (np.isfinite(space.low) & np.isfinite(space.high)).all():  # type: ignore[attr-defined]
            raise UserError(
                f"--env {config.env}: its actions have no bounds, which pearl squashes them to: give a Box with"
            )
        self.model = PEARLModel(self.sizes, config, space.low, space.high).to(accelerator.device)  # type: ignore[attr-defined]
        model = self.model
        self.optimizers = {
            "critic": self._adam([*model.encoder.parameters(), *model.critics.parameters()]),
            "value": self._adam([*model.value.parameters()]),
            "actor": self._adam([*model.actor.parameters()]),
        }
        self.tasks = first.sample_tasks(config.train_tasks, np.random.default_rng([config.seed, TRAIN]), "train")
        first.close()
        steps = config.updates * config.episodes * config.horizon
        size, state, action = min(CAPACITY, max(steps, 1)), self.sizes.observation, self.sizes.action
        # on the CPU: s, a, r, s', d of each task in a ring; s, a, r of its newest episode with z from the prior
        self.kept = torch.zeros(config.train_tasks, size, 2 * state + action + 2)
        self.count = torch.zeros(config.train_tasks, dtype=torch.long)
        self.explored = torch.zeros(config.train_tasks, config.horizon, state + action + 1)
        self.explored_count = torch.zeros(config.train_tasks, dtype=torch.long)

    @cached_property
    def env(self) -> TaskVectorEnv:
        """This process's environments, made when they are first needed."""
        return make_vector(self.config.env, len(self.mine), self.config.threads)

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=self.config.sac_lr, fused=True)

    @property
    def agent(self) -> PEARLAgent:
        """What acts in tests."""
        return PEARLAgent(self.model)

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs, buffers included."""
        buffers = checkpoint.TensorState(
            kept=self.kept, count=self.count, explored=self.explored, explored_count=self.explored_count
        )
        named = {f"{name}_optimizer": optimizer for name, optimizer in self.optimizers.items()}
        return {"model": self.model, "buffers": buffers, **named}

    # ---- a step

    def step(self, step: int) -> dict[str, Any]:
        """One update; ``step`` counts from 0.

        Returns:
            loss (the critics'), value_loss, actor_loss, kl (Σ over tasks), entropy (of actions before scaling), z_std,
            means over the gradient steps, where there are any; return_1 … return_E, and means of what `info` says.
        """
        trials, which, infos = self.collect(step)
        self.keep(trials, which)
        row: dict[str, Any] = {
            f"return_{e + 1}": trials.rewards[:, e].sum(-1).mean() for e in range(self.config.episodes)
        }
        found = [self.gradient_step(step, done) for done in range(self.config.sac_steps)]
        if found:
            sums = torch.stack(found).mean(0)
            if self.accelerator.num_processes > 1:
                sums = self.accelerator.reduce(sums, reduction="sum")
            names = ("loss", "value_loss", "actor_loss", "kl", "entropy", "z_std")
            row |= dict(zip(names, sums, strict=True))
        return row | infos

    def collect(self, step: int) -> tuple[Trials, np.ndarray, dict[str, float]]:
        """Trials of some training tasks, of all processes, and which tasks these are."""
        config, count = self.config, self.config.tasks
        rng = np.random.default_rng([config.seed, step, TASKS])
        which = rng.permutation(np.resize(rng.permutation(config.train_tasks), count))
        begin = starts(config.seed, step, STARTS, episodes=config.episodes, count=count)
        noise = standard_normal(
            config.seed, step, NOISE, shape=(config.episodes, config.horizon, count, self.sizes.action)
        )
        latents = standard_normal(config.seed, step, LATENTS, shape=(config.episodes, count, config.latent))
        mine = slice(self.mine.start, self.mine.stop)
        found, infos = on_all(
            self.accelerator,
            lambda: collect(
                PEARLAgent(self.model, latents[:, mine]), self.env, self.tasks[which][mine], episodes=config.episodes,
                horizon=config.horizon, seeds=begin[:, mine], noise=noise[:, :, mine], device=self.accelerator.device,
            ),
        )  # fmt: skip
        means = means_of(infos, found.valid.cpu().numpy(), self.accelerator)
        if self.accelerator.num_processes > 1:
            found = Trials(*(self.accelerator.gather(part.contiguous()) for part in found))
        return found, which, means

    def keep(self, trials: Trials, which: np.ndarray) -> None:
        """Put trials into the buffers of tasks ``which`` (B,).

        A step at the horizon has no next observation in the trials, and is left out of the replay buffer. One that
        ended its episode before is kept with d = 1: its next observation does not count. Time limits never give d = 1.
        """
        tokens, actions, rewards, valid = (part.cpu() for part in trials[:4])
        state = tokens[..., : self.sizes.observation]
        following = torch.cat([state[:, :, 1:], state[:, :, -1:]], 2)
        goes_on = torch.cat([valid[:, :, 1:], valid[:, :, -1:]], 2)
        ended = valid & ~goes_on
        held = valid.clone()
        held[:, :, -1] = False  # the trials do not tell what came after it, nor whether it was an end
        rows = torch.cat([state, actions, rewards[..., None], following, ended[..., None].float()], -1)
        size = self.kept.shape[1]
        for row, task in enumerate(which.tolist()):
            new = rows[row][held[row]]
            places = (self.count[task] + torch.arange(len(new))) % size
            self.kept[task, places[-size:]] = new[-size:]  # no place twice, as it would be open which one stays
            self.count[task] += len(new)
            first = valid[row, 0]
            number = int(first.sum())
            explored = torch.cat([state[row, 0], actions[row, 0], rewards[row, 0, :, None]], -1)[first]
            self.explored[task, :number] = explored
            self.explored_count[task] = number

    def draw(self, step: int, done: int) -> Batch | None:
        """What this process takes of a gradient step; None: nothing, there are more processes than tasks."""
        config, device = self.config, self.accelerator.device
        rng = np.random.default_rng([config.seed, step, BATCHES, done])
        # every process draws for all tasks, so that how they are shared makes no difference
        tasks = rng.choice((self.count > 0).nonzero()[:, 0].numpy(), config.sac_tasks)
        count, batch = config.sac_tasks, config.sac_batch
        kept = np.minimum(self.count[tasks].numpy(), self.kept.shape[1])
        places = torch.from_numpy(rng.integers(kept[:, None], size=(count, batch)))
        explored = self.explored_count[tasks].numpy()
        seen = torch.from_numpy(rng.integers(explored[:, None], size=(count, config.context)))
        latent_noise = torch.from_numpy(rng.standard_normal((count, config.latent), dtype=np.float32))
        action_noise = torch.from_numpy(rng.standard_normal((count, batch, self.sizes.action), dtype=np.float32))
        shared = loop.share(torch.arange(count), self.accelerator)
        if not shared:
            return None
        mine = shared[0]
        rows = torch.from_numpy(tasks)[mine]
        widths = [self.sizes.observation, self.sizes.action, 1, self.sizes.observation, 1]
        state, action, reward, following, ended = self.kept[rows[:, None], places[mine]].to(device).split(widths, -1)
        return Batch(
            state, action, reward[..., 0], following, ended[..., 0],
            self.explored[rows[:, None], seen[mine]].to(device), latent_noise[mine].to(device),
            action_noise[mine].to(device), count,
        )  # fmt: skip

    def critic_loss(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What trains critics and encoder: Σ_i mean (Q_i − y)² + weight · Σ KL(q(z|c) ‖ N(0, I)) over tasks.

        Returns:
            The loss; embeddings z (n, latent), without gradient; the Bellman part, the KL divergence and z's mean
            standard deviation (3,), without gradient.
        """
        config, model = self.config, self.model
        posterior = model.posterior(batch.context, torch.ones_like(batch.context[..., 0], dtype=torch.bool))
        z = posterior.mean + posterior.stddev * batch.latent_noise
        shown = beside(batch.state, z)
        with torch.no_grad():
            following = model.target(torch.cat([batch.following, shown], -1))[..., 0]
            wanted = bellman(batch.reward * config.reward_scale, batch.ended, following, config.discount)
        one, other = model.q(batch.state, batch.action, shown)
        errors = (((one - wanted) ** 2).sum() + ((other - wanted) ** 2).sum()) / batch.total
        kl = 0.5 * (posterior.variance + posterior.mean**2 - 1 - posterior.variance.log()).sum()
        spread = posterior.stddev.mean(-1).sum() / batch.tasks
        return errors + config.kl_weight * kl, z.detach(), torch.stack([errors, kl, spread]).detach()

    def policy_losses(self, batch: Batch, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What trains the value, (V − (min Q − log π))², and the actor, log π − min Q and its regularisers; means.

        Returns:
            Both losses, and −log π, without gradient.
        """
        model, shown = self.model, beside(batch.state, z)
        found = model.act(batch.state, shown)
        action, log_prob = found.draw_with_log_prob(batch.action_noise)
        least = torch.minimum(*model.q(batch.state, action, shown))
        value = model.value(torch.cat([batch.state, shown], -1))[..., 0]
        value_loss = ((value - (least - log_prob).detach()) ** 2).sum() / batch.total
        mean, log_std = found.before.mean, found.before.stddev.log()
        shrink = (MEAN_WEIGHT * mean**2 + STD_WEIGHT * log_std**2).sum() / self.sizes.action
        actor_loss = ((log_prob - least).sum() + shrink) / batch.total
        return value_loss, actor_loss, -log_prob.detach().sum() / batch.total

    def gradient_step(self, step: int, done: int) -> Tensor:
        """One step of critics and encoder, then of value and actor by the new critics; this process's sums (6,)."""
        batch = self.draw(step, done)
        if batch is None:
            sums = torch.zeros(6, device=self.accelerator.device)
            for name in self.optimizers:  # the others' gradients are taken nevertheless
                self._optimise(name, None)
        else:
            loss, z, shown = self.critic_loss(batch)
            self._optimise("critic", loss)
            value_loss, actor_loss, entropy = self.policy_losses(batch, z)
            self._optimise("value", value_loss)
            self._optimise("actor", actor_loss)
            sums = torch.stack([shown[0], value_loss, actor_loss, shown[1], entropy, shown[2]]).detach()
        with torch.no_grad():
            for slow, fast in zip(self.model.target.parameters(), self.model.value.parameters(), strict=True):
                slow.lerp_(fast, self.config.soft_target)
        return sums

    def _optimise(self, name: str, loss: Tensor | None) -> None:
        """Gradients of one part alone: the actor's loss runs through the critics, which it does not train."""
        optimizer = self.optimizers[name]
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        optimizer.zero_grad()
        if loss is not None:
            for value, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                value.grad = gradient
        loop.sum_gradients(parameters, self.accelerator)
        optimizer.step()


def beside(state: Tensor, z: Tensor) -> Tensor:
    """Embeddings (n, latent) beside each of states (n, b, S): (n, b, latent)."""
    return z[:, None].expand(-1, state.shape[1], -1)


def bellman(reward: Tensor, ended: Tensor, following: Tensor, discount: float) -> Tensor:
    """r + γ (1 − d) V(s')."""
    return reward + discount * (1 - ended) * following
