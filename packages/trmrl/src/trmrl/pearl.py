"""PEARL (Rakelly et al. 2019): soft actor-critic with a task's embedding z, inferred from transitions in any order.

q(z|c) ∝ Π_n N(z; f_φ(s_n, a_n, r_n)), a product of Gaussians (their equation 2), prior N(0, I). Critics' Bellman errors
and the KL divergence train the encoder; actor and value see z without its gradient. Off-policy: each training task has a
buffer of its own, and a small one of its newest exploration, which contexts are drawn from.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from metazoo import checkpoint, loop
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from trmrl.collect import collect, standard_normal, starts
from trmrl.config import Config
from trmrl.env import make_vector
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
    for width, following in zip(widths[:-1], widths[1:], strict=True):
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
        finite = np.isfinite(low) & np.isfinite(high)
        scale, middle = np.where(finite, (high - low) / 2, 1.0), np.where(finite, (high + low) / 2, 0.0)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float32), persistent=False)
        self.register_buffer("middle", torch.tensor(middle, dtype=torch.float32), persistent=False)

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


class PEARLAgent:
    """Acts with z from the prior in the first episode of a task, then with z from the posterior of all so far.

    Args:
        model: its networks.
        noise: (E, count, latent), standard normal, one row an episode; None: drawn from a seed of its own.
    """

    def __init__(self, model: PEARLModel, noise: Tensor | None = None) -> None:
        self.model, self.noise = model, noise
        self._episode, self._z = 0, torch.zeros(0)

    def parameters(self) -> Any:
        """Of the networks."""
        return self.model.parameters()

    def _noise(self, count: int) -> Tensor:
        shape = (count, self.model.latent)
        drawn = standard_normal(0, LATENTS, self._episode, shape=shape) if self.noise is None else self.noise[self._episode]
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
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.mine = share_of_tasks(config.tasks, accelerator)
        self.env = make_vector(config.env, len(self.mine), config.threads)
        self.sizes = sizes_of(self.env)
        torch.manual_seed(config.seed)
        space = self.env.single_action_space
        self.model = PEARLModel(self.sizes, config, space.low, space.high).to(accelerator.device)  # type: ignore[attr-defined]
        model = self.model
        self.optimizers = {
            "critic": self._adam([*model.encoder.parameters(), *model.critics.parameters()]),
            "value": self._adam([*model.value.parameters()]),
            "actor": self._adam([*model.actor.parameters()]),
        }
        self.tasks = self.env.sample_tasks(
            config.train_tasks, np.random.default_rng([config.seed, TRAIN]), "train"
        )
        steps = config.updates * config.episodes * config.horizon
        size, state, action = min(CAPACITY, max(steps, 1)), self.sizes.observation, self.sizes.action
        # on the CPU: s, a, r, s', d of each task in a ring; s, a, r of its newest episode with z from the prior
        self.kept = torch.zeros(config.train_tasks, size, 2 * state + action + 2)
        self.count = torch.zeros(config.train_tasks, dtype=torch.long)
        self.explored = torch.zeros(config.train_tasks, config.horizon, state + action + 1)
        self.explored_count = torch.zeros(config.train_tasks, dtype=torch.long)

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
        found, infos = collect(
            PEARLAgent(self.model, latents[:, mine]), self.env, self.tasks[which][mine], episodes=config.episodes,
            horizon=config.horizon, seeds=begin[:, mine], noise=noise[:, :, mine], device=self.accelerator.device,
        )  # fmt: skip
        valid = found.valid.cpu().numpy()
        means = {name: float(np.nanmean(value[valid])) for name, value in infos.items() if np.isfinite(value).any()}
        if self.accelerator.num_processes > 1:
            found = Trials(*(self.accelerator.gather(part.contiguous()) for part in found))
            if means:
                numbers = torch.tensor(list(means.values()), device=self.accelerator.device)
                means = dict(zip(means, self.accelerator.reduce(numbers, reduction="mean").tolist(), strict=True))
        return found, which, means

    def keep(self, trials: Trials, which: np.ndarray) -> None:
        """Put trials into the buffers of tasks ``which`` (B,).

        The last step of an episode has no next observation in the trials, and is left out of the replay buffer, unless
        the task ended it: then the next observation does not count.
        """
        tokens, actions, rewards, valid = (part.cpu() for part in trials[:4])
        state = tokens[..., : self.sizes.observation]
        following = torch.cat([state[:, :, 1:], state[:, :, -1:]], 2)
        goes_on = torch.cat([valid[:, :, 1:], valid[:, :, -1:]], 2)
        ended = valid & ~goes_on
        held = valid.clone()
        held[:, :, -1] = False
        rows = torch.cat([state, actions, rewards[..., None], following, ended[..., None].float()], -1)
        size = self.kept.shape[1]
        for row, task in enumerate(which.tolist()):
            new = rows[row][held[row]]
            places = (self.count[task] + torch.arange(len(new))) % size
            self.kept[task, places] = new
            self.count[task] += len(new)
            first = valid[row, 0]
            number = int(first.sum())
            explored = torch.cat([state[row, 0], actions[row, 0], rewards[row, 0, :, None]], -1)[first]
            self.explored[task, :number] = explored
            self.explored_count[task] = number

    def gradient_step(self, step: int, done: int) -> Tensor:
        """One step of critics and encoder, of the value, of the actor, on some tasks; this process's sums (6,)."""
        config, device = self.config, self.accelerator.device
        rng = np.random.default_rng([config.seed, step, BATCHES, done])
        known = (self.count > 0).nonzero()[:, 0].numpy()
        tasks = rng.choice(known, min(config.sac_tasks, len(known)), replace=False)
        batch, total = config.sac_batch, len(tasks) * config.sac_batch
        # every process draws for all tasks, so that how they are shared makes no difference
        counts = np.minimum(self.count[tasks].numpy(), self.kept.shape[1])
        places = torch.from_numpy(rng.integers(counts[:, None], size=(len(tasks), batch)))
        seen = torch.from_numpy(
            rng.integers(self.explored_count[tasks].numpy()[:, None], size=(len(tasks), config.context))
        )
        noise = torch.from_numpy(rng.standard_normal((len(tasks), config.latent), dtype=np.float32))
        acting = torch.from_numpy(rng.standard_normal((len(tasks), batch, self.sizes.action), dtype=np.float32))
        model, sums = self.model, torch.zeros(6, device=device)
        critic_loss = value_loss = actor_loss = None
        for mine in loop.share(torch.arange(len(tasks)), self.accelerator):
            rows = torch.from_numpy(tasks)[mine]
            drawn = self.kept[rows[:, None], places[mine]].to(device)
            context = self.explored[rows[:, None], seen[mine]].to(device)
            widths = [self.sizes.observation, self.sizes.action, 1, self.sizes.observation, 1]
            state, action, reward, following, ended = drawn.split(widths, -1)
            posterior = model.posterior(context, torch.ones_like(context[..., 0], dtype=torch.bool))
            z = (posterior.mean + posterior.stddev * noise[mine].to(device))[:, None].expand(-1, batch, -1)
            fixed = z.detach()
            with torch.no_grad():
                target = model.target(torch.cat([following, fixed], -1))[..., 0]
                target = bellman(reward[..., 0] * config.reward_scale, ended[..., 0], target, config.discount)
            kl = 0.5 * (posterior.variance + posterior.mean**2 - 1 - posterior.variance.log()).sum()
            bellman_loss = sum(((found - target) ** 2).sum() for found in model.q(state, action, z)) / total
            critic_loss = bellman_loss + config.kl_weight * kl
            found = model.act(state, fixed)
            drawn_action, log_prob = found.draw_with_log_prob(acting[mine].to(device))
            least = torch.minimum(*model.q(state, drawn_action, fixed))
            wanted = (least - log_prob).detach()
            value_loss = ((model.value(torch.cat([state, fixed], -1))[..., 0] - wanted) ** 2).sum() / total
            mean, log_std = found.before.mean, found.before.stddev.log()
            size = total * self.sizes.action
            shrink = MEAN_WEIGHT * (mean**2).sum() / size + STD_WEIGHT * (log_std**2).sum() / size
            actor_loss = (log_prob - least).sum() / total + shrink
            parts = [bellman_loss, value_loss, actor_loss, kl, -log_prob.sum() / total]
            sums = torch.stack([*parts, posterior.stddev.mean(-1).sum() / len(tasks)]).detach()
        self._optimise("critic", critic_loss)
        self._optimise("value", value_loss)
        self._optimise("actor", actor_loss)
        with torch.no_grad():
            for slow, fast in zip(model.target.parameters(), model.value.parameters(), strict=True):
                slow.lerp_(fast, config.soft_target)
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


def bellman(reward: Tensor, ended: Tensor, following: Tensor, discount: float) -> Tensor:
    """r + γ (1 − d) V(s')."""
    return reward + discount * (1 - ended) * following
