"""PPO over trials (RL²'s outer loop): a trial of several episodes of one task is one trajectory."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from metazoo import checkpoint, loop
from metazoo.errors import UserError
from scipy.signal import lfilter
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from trmrl.collect import collect, means_of, on_all, standard_normal, starts
from trmrl.config import Config
from trmrl.env import TaskVectorEnv, make_vector
from trmrl.model import Policy, Sizes, Trials, TrMRLPolicy, Value, policy_of

CHUNK = 4096
TASKS, STARTS, NOISE, ORDER = 0, 1, 2, 3


def discounted_sums(values: np.ndarray, factor: float) -> np.ndarray:
    """y_t = x_t + factor · y_{t+1} along the last axis."""
    found: np.ndarray = lfilter([1.0], [1.0, -factor], values[..., ::-1].astype(np.float64), axis=-1)[..., ::-1]
    return found


def gae(rewards: np.ndarray, values: np.ndarray, discount: float, lam: float) -> np.ndarray:
    """Generalised advantage estimation along the last axis, without a bootstrap at the end: Σ_k (γλ)^k δ_{t+k},
    δ_t = r_t + γ V_{t+1} − V_t, V after the end = 0."""
    following = np.concatenate([values[..., 1:], np.zeros_like(values[..., :1])], -1)
    return discounted_sums(rewards + discount * following - values, discount * lam)


def returns_and_advantages(
    rewards: np.ndarray, values: np.ndarray, valid: np.ndarray, discount: float, lam: float
) -> tuple[np.ndarray, np.ndarray]:
    """Of trials (B, E, T), across their episodes; steps after an episode's end are cut out, and get zeros.

    Returns:
        Discounted returns and advantages (B, E, T).
    """
    count = len(rewards)
    flat = [part.reshape(count, -1) for part in (rewards, values, valid)]
    order = np.argsort(~flat[2], axis=1, kind="stable")  # what is valid comes first, in its order
    packed = [np.take_along_axis(np.where(flat[2], part, 0.0), order, 1) for part in flat[:2]]
    found = []
    for part in (discounted_sums(packed[0], discount), gae(packed[0], packed[1], discount, lam)):
        back = np.zeros_like(part)
        np.put_along_axis(back, order, part, 1)
        found.append(np.where(flat[2], back, 0.0).reshape(rewards.shape))
    return found[0], found[1]


def log_prob(distribution: Normal, actions: Tensor) -> Tensor:
    """Of actions (M, A): (M,)."""
    return distribution.log_prob(actions).sum(-1)


def clipped_surrogate(log_new: Tensor, log_old: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """min(ρA, clip(ρ, 1 ± ε)A), ρ = exp(log π − log π_old), of each sample."""
    ratio = (log_new - log_old).exp()
    return torch.minimum(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)


def rate(config: Config, update: int) -> float:
    """The factor of learning rates at an update: from `decay_from` to `decay_to` it falls by a constant ratio."""
    if not config.decay_to:
        return 1.0
    span = config.decay_to - config.decay_from
    return float(config.decay_floor ** (min(max(update - config.decay_from + 1, 0), span) / span))


class PPOLearner:
    """One update at a time: fresh trials, the policy's passes, then the value's.

    Args:
        config: what to train.
        accelerator: of this process.
    """

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.config, self.accelerator = config, accelerator
        self.mine = share_of_tasks(config.tasks, accelerator)
        self.sizes = sizes_of(config.env)
        torch.manual_seed(config.seed)
        self.policy = policy_of(config, self.sizes).to(accelerator.device)
        self.value = Value(self._value_size(), config.head_hidden).to(accelerator.device)
        trained = [value for value in self.policy.parameters() if value.requires_grad]
        head = {id(value) for value in self.policy.head.parameters()}  # the value does not train how to act
        shared = [value for value in trained if id(value) not in head] if config.shared_trunk else []
        trunk = [*self.value.parameters(), *shared]
        self.policy_optimizer = torch.optim.AdamW(
            trained, lr=config.lr, weight_decay=config.weight_decay, fused=True
        )  # fmt: skip
        self.value_optimizer = torch.optim.AdamW(
            trunk, lr=config.value_lr, weight_decay=config.weight_decay, fused=True
        )  # fmt: skip
        self.auxiliary = self._auxiliary()

    @cached_property
    def env(self) -> TaskVectorEnv:
        """This process's environments, made when they are first needed."""
        return make_vector(self.config.env, len(self.mine), self.config.threads)

    def _auxiliary(self) -> Any:
        """What learns the belief over tasks, where the policy has one."""
        if self.config.algo != "varibad":
            return None
        from trmrl.varibad import BeliefLearner

        return BeliefLearner(self.config, self.policy, self.accelerator)

    @property
    def agent(self) -> Policy:
        """What acts in tests."""
        return self.policy

    def state(self) -> dict[str, checkpoint.Stateful]:
        """All that a resumed run needs. Environments start anew with each update, from seeds of their own."""
        found: dict[str, checkpoint.Stateful] = {
            "model": self.policy, "value": self.value, "policy_optimizer": self.policy_optimizer,
            "value_optimizer": self.value_optimizer,
        }  # fmt: skip
        return found | (self.auxiliary.state() if self.auxiliary is not None else {})

    # ---- a step

    def step(self, step: int) -> dict[str, Any]:
        """One update; ``step`` counts from 0.

        Returns:
            loss (the policy's), value_loss, kl (old ‖ new), clipped (share of samples), entropy, std, lr, return_1 …
            return_E (undiscounted, of each episode of the trials, with exploration), and means of what `info` says.
        """
        trials, infos = self.collect(step)
        with torch.no_grad():
            values = self._in_chunks(trials, lambda index: self.value(self.value_features(trials, index)).mean)
            log_old = self._in_chunks(
                trials, lambda index: log_prob(self.policy(trials, index), actions_of(trials, index))
            )
        returns, advantages = returns_and_advantages(
            trials.rewards.cpu().numpy(), values.cpu().numpy().reshape(trials.rewards.shape),
            trials.valid.cpu().numpy(), self.config.discount, self.config.gae_lambda,
        )  # fmt: skip
        device = self.accelerator.device
        flat = [torch.from_numpy(part.reshape(-1)).to(device, torch.float32) for part in (returns, advantages)]
        if self.config.normalize_advantages:
            used = flat[1][trials.valid.reshape(-1)]
            flat[1] = (flat[1] - used.mean()) / (used.std(correction=0) + 1e-8)
        row = self._train_policy(trials, log_old, flat[1], step)
        row |= self._train_value(trials, flat[0], step)
        if self.auxiliary is not None:
            row |= self.auxiliary.step(trials, step)
        row |= {f"return_{e + 1}": trials.rewards[:, e].sum(-1).mean() for e in range(self.config.episodes)}
        return row | infos

    def collect(self, step: int) -> tuple[Trials, dict[str, float]]:
        """The trials of all processes, each having collected those of its own tasks."""
        config, count = self.config, self.config.tasks
        tasks = self.env.sample_tasks(count, np.random.default_rng([config.seed, step, TASKS]), "train")
        begin = starts(config.seed, step, STARTS, episodes=config.episodes, count=count)
        noise = standard_normal(
            config.seed, step, NOISE, shape=(config.episodes, config.horizon, count, self.sizes.action)
        )
        mine = slice(self.mine.start, self.mine.stop)
        found, infos = on_all(
            self.accelerator,
            lambda: collect(
                self.policy, self.env, tasks[mine], episodes=config.episodes, horizon=config.horizon,
                seeds=begin[:, mine], noise=noise[:, :, mine], device=self.accelerator.device,
            ),
        )  # fmt: skip
        means = means_of(infos, found.valid.cpu().numpy(), self.accelerator)
        if self.accelerator.num_processes > 1:
            found = Trials(*(self.accelerator.gather(part.contiguous()) for part in found))
        return found, means

    def _in_chunks(self, trials: Trials, function: Any) -> Tensor:
        """A function of samples, for all of them."""
        size = max(CHUNK // trials.length, 1) * trials.length if self.policy.by_trial else CHUNK
        every = torch.arange(trials.size, device=self.accelerator.device)
        return torch.cat([function(part) for part in every.split(size)])

    def _minibatches(self, trials: Trials, step: int, which: int) -> Iterator[tuple[Tensor, int]]:
        """This process's share of each minibatch of samples, and the minibatch's size over all processes."""
        config, device = self.config, trials.rewards.device
        valid = trials.valid.reshape(-1).cpu()
        units = torch.arange(len(trials.rewards)) if self.policy.by_trial else valid.nonzero()[:, 0]
        size = max(config.minibatch // trials.length, 1) if self.policy.by_trial else config.minibatch
        for done in range(config.passes):
            rng = np.random.default_rng([config.seed, step, ORDER, which, done])
            for part in units[rng.permutation(len(units))].split(size):
                shared = loop.share(part, self.accelerator)
                mine = shared[0] if shared else part[:0]
                if self.policy.by_trial:
                    steps = torch.arange(trials.length)
                    part, mine = ((of[:, None] * trials.length + steps).reshape(-1) for of in (part, mine))
                yield mine.to(device), int(valid[part].sum())

    def _train_policy(self, trials: Trials, log_old: Tensor, advantages: Tensor, step: int) -> dict[str, Any]:
        config, valid = self.config, trials.valid.reshape(-1).float()
        losses, clipped, shown = [], [torch.zeros_like(valid[0])], [torch.zeros_like(valid[0])]
        self._set_rate(self.policy_optimizer, config.lr * rate(config, step))
        for index, count in self._minibatches(trials, step, 0):
            loss = torch.zeros((), device=valid.device)
            if len(index):
                found = self.policy(trials, index)
                log_new = log_prob(found, actions_of(trials, index))
                objective = clipped_surrogate(log_new, log_old[index], advantages[index], config.clip)
                if config.entropy:
                    objective = objective + config.entropy * F.softplus(found.entropy().sum(-1))
                loss = -(objective * valid[index]).sum() / count
                outside = ((log_new - log_old[index]).exp() - 1).abs() > config.clip
                clipped.append((outside * valid[index]).sum().detach())
                shown.append(valid[index].sum())
            self._optimise(self.policy_optimizer, loss if len(index) else None)
            losses.append(loss.detach())
        with torch.no_grad():
            log_new = self._in_chunks(
                trials, lambda index: log_prob(self.policy(trials, index), actions_of(trials, index))
            )
            std = self.policy.head.log_std.exp()
        kl = ((log_old - log_new) * valid).sum() / valid.sum()
        per_update = len(losses) // config.passes
        sums = torch.stack([torch.stack(losses[-per_update:]).sum(), sum(clipped), sum(shown)])  # type: ignore[arg-type]
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums, reduction="sum")
        entropy = (0.5 + 0.5 * np.log(2 * np.pi) + std.log()).sum()
        return {
            "loss": sums[0] / per_update, "kl": kl, "clipped": sums[1] / sums[2], "entropy": entropy,
            "std": std.mean(), "lr": config.lr * rate(config, step),
        }  # fmt: skip

    def _train_value(self, trials: Trials, returns: Tensor, step: int) -> dict[str, Any]:
        config, valid = self.config, trials.valid.reshape(-1).float()
        losses = []
        self._set_rate(self.value_optimizer, config.value_lr * (rate(config, step) if config.decay_value else 1.0))
        for index, count in self._minibatches(trials, step, 1):
            loss = torch.zeros((), device=valid.device)
            if len(index):
                found = self.value(self.value_features(trials, index))
                loss = -(found.log_prob(returns[index]) * valid[index]).sum() / count
            self._optimise(self.value_optimizer, loss if len(index) else None)
            losses.append(loss.detach())
        per_update = len(losses) // config.passes
        total = torch.stack(losses[-per_update:]).sum()
        if self.accelerator.num_processes > 1:
            total = self.accelerator.reduce(total, reduction="sum")
        return {"value_loss": total / per_update}

    def _set_rate(self, optimizer: torch.optim.Optimizer, lr: float) -> None:
        for group in optimizer.param_groups:
            group["lr"] = lr

    def _optimise(self, optimizer: torch.optim.Optimizer, loss: Tensor | None) -> None:
        optimizer.zero_grad()
        if loss is not None:
            loss.backward()
        parameters = [value for group in optimizer.param_groups for value in group["params"]]
        loop.sum_gradients(parameters, self.accelerator)
        if self.config.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, self.config.max_grad_norm)
        optimizer.step()

    # ---- the value's inputs

    def _value_size(self) -> int:
        if self.config.shared_trunk:
            return int(self.policy.head.mean[0].in_features)  # type: ignore[arg-type]
        if self.config.algo == "varibad":
            return self.sizes.observation + 2 * self.config.latent
        return self.sizes.token + (self.sizes.task if self.config.algo == "oracle" else 0)

    def value_features(self, trials: Trials, index: Tensor) -> Tensor:
        """What the value sees at samples (M,): the policy's memory, or the newest token as the policy is shown it."""
        if self.config.shared_trunk or self.config.algo == "varibad":
            return self.policy.features(trials, index)
        shown: Tensor = self.policy.shown  # type: ignore[assignment]
        token = trials.tokens.flatten(0, 2)[index]
        if isinstance(self.policy, TrMRLPolicy) and self.policy.sizes.task:
            token = torch.cat([token, trials.tasks[index // trials.length]], -1)
        return token * shown


def actions_of(trials: Trials, index: Tensor) -> Tensor:
    """Actions (M, A) at samples (M,)."""
    return trials.actions.flatten(0, 2)[index]


def sizes_of(env: str) -> Sizes:
    """Sizes of an environment's observations, actions and tasks, of which one is made for it."""
    made = make_vector(env, 1)
    task = made.sample_tasks(1, np.random.default_rng(0), "train")
    made.close()
    shapes = made.single_observation_space.shape, made.single_action_space.shape
    return Sizes(shapes[0][0], shapes[1][0], task.shape[1])  # type: ignore[index]


def share_of_tasks(tasks: int, accelerator: Accelerator) -> range:
    """The tasks of this process.

    Raises:
        UserError: they cannot be shared evenly.
    """
    processes = accelerator.num_processes
    if tasks % processes:
        raise UserError(f"--tasks is {tasks}, which {processes} processes cannot share evenly: give a multiple of it")
    size = tasks // processes
    return range(accelerator.process_index * size, (accelerator.process_index + 1) * size)
