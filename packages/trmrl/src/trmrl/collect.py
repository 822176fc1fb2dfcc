"""Trials: a policy acts in many tasks at once, episode after episode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar, cast

import numpy as np
import torch
from accelerate import Accelerator
from metazoo.errors import UserError
from torch import Tensor
from torch.distributions import Normal

from trmrl.env import Array, TaskVectorEnv, seeds_of
from trmrl.model import Trials

Result = TypeVar("Result")


class Drawn(Protocol):
    """A distribution of actions that says itself how noise becomes an action."""

    @property
    def mean(self) -> Tensor: ...

    def draw(self, noise: Tensor) -> Tensor: ...


class Agent(Protocol):
    """What acts. Policies do, and what adapts between episodes."""

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None: ...

    def new_episode(self, so_far: Trials | None = None) -> None: ...

    def step(self, token: Tensor) -> Normal | Drawn: ...


def draw(distribution: Normal | Drawn, noise: Tensor) -> Tensor:
    """Actions (B, A) from standard normal noise (B, A)."""
    if isinstance(distribution, Normal):
        return distribution.mean + distribution.stddev * noise
    return distribution.draw(noise)


def collect(
    agent: Agent,
    env: TaskVectorEnv,
    tasks: Array,
    *,
    episodes: int,
    horizon: int,
    seeds: Array,
    noise: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> tuple[Trials, dict[str, Array]]:
    """One trial of each task.

    Args:
        agent: acts; it sees tokens (B, D) [s_t ; a_{t−1} ; r_{t−1} ; d_{t−1}], on ``device``.
        env: of B environments, each of which is stepped on after its episode's end.
        tasks: (B, task size).
        episodes: E, each begun by a reset.
        horizon: T. An episode that ends before is stepped on, and marked as not valid from there.
        seeds: (E, B) of the starts.
        noise: (E, T, B, A), standard normal; None takes the mean actions.
        device: of the agent and of the trials.

    Returns:
        The trials, and what the environment says in `info` of each step (B, E, T): numbers, zero where there are none.

    Raises:
        UserError: NaN or infinity in an observation or a reward (with task, episode and step); an episode that its time
            limit cuts off before the horizon.
    """
    count = len(tasks)
    sizes = env.single_observation_space.shape[0], env.single_action_space.shape[0]  # type: ignore[index]
    tokens = np.zeros((count, episodes, horizon, sum(sizes) + 2), dtype=np.float32)
    actions = np.zeros((count, episodes, horizon, sizes[1]), dtype=np.float32)
    rewards, valid = np.zeros((count, episodes, horizon), dtype=np.float32), np.zeros((count, episodes, horizon), bool)
    infos: dict[str, Array] = {}
    env.set_tasks(tasks)
    known = torch.as_tensor(tasks, dtype=torch.float32, device=device)

    def trials(until: int) -> Trials:
        parts = [torch.from_numpy(part[:, :until]).to(device) for part in (tokens, actions, rewards, valid)]
        return Trials(*parts, known)

    agent.reset(count, known)
    for episode in range(episodes):
        if episode:
            agent.new_episode(trials(episode))
        observation, _ = env.reset(seed=seeds[episode])
        going = np.ones(count, dtype=bool)
        _check_finite(observation, "observation", tasks, episode, -1, going)
        token = np.zeros((count, tokens.shape[-1]), dtype=np.float32)
        token[:, : sizes[0]] = observation
        for t in range(horizon):
            tokens[:, episode, t], valid[:, episode, t] = token, going
            with torch.no_grad():
                found = agent.step(torch.from_numpy(token).to(device))
                action = found.mean if noise is None else draw(found, noise[episode, t].to(device))
            acted = action.cpu().numpy()
            observation, reward, terminated, truncated, info = env.step(acted)
            _check_finite(reward, "reward", tasks, episode, t, going)
            _check_finite(observation, "observation", tasks, episode, t, going & ~terminated)
            reward = np.where(going, reward, 0.0)
            actions[:, episode, t], rewards[:, episode, t] = acted, reward
            for name, value in info.items():
                if isinstance(value, np.ndarray) and value.dtype.kind in "fb" and value.shape == (count,):
                    infos.setdefault(name, np.zeros((count, episodes, horizon)))[:, episode, t] = value
            if t < horizon - 1 and (going & truncated & ~terminated).any():
                task = int(np.argmax(going & truncated & ~terminated))
                raise UserError(
                    f"the environment cuts episodes off after {t + 1} steps (task {task}: {_say(tasks[task])}), the "
                    f"horizon is {horizon}: give --horizon {t + 1}, as a batch has one horizon"
                )
            going = going & ~terminated
            # what comes after the end may be anything
            observation = np.where(going[:, None] | np.isfinite(observation), observation, 0.0)
            token = np.concatenate(
                [observation, acted, reward[:, None], ~going[:, None]], 1, dtype=np.float32, casting="unsafe"
            )
    return trials(episodes), infos


def on_all(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """Do something on every process; where it fails on one, none waits for that one.

    Raises:
        UserError: of this process, or that another one has failed.
    """
    if accelerator.num_processes == 1:
        return work()
    found, failed = None, None
    try:
        found = work()
    except UserError as error:
        failed = error
    count = accelerator.reduce(torch.tensor(float(failed is not None), device=accelerator.device), reduction="sum")
    if failed is not None:
        raise failed
    if float(count):
        raise UserError("another process failed: see its message")
    return cast(Result, found)


def means_of(infos: dict[str, Array], valid: Array, accelerator: Accelerator) -> dict[str, float]:
    """Means of what environments said at valid steps, over all processes, whose environments say the same things.

    Args:
        infos: of each name (B, E, T), NaN where there is nothing to say.
        valid: (B, E, T).
        accelerator: of this process.
    """
    held = [value[valid & np.isfinite(value)] for value in infos.values()]
    sums = torch.tensor([[float(part.sum()), float(len(part))] for part in held], dtype=torch.float64)
    if accelerator.num_processes > 1 and held:
        sums = accelerator.reduce(sums.to(accelerator.device, torch.float32), reduction="sum").cpu()
    return {name: float(total / count) for name, (total, count) in zip(infos, sums, strict=True) if count}


def starts(seed: int, *place: int, episodes: int, count: int) -> Array:
    """Seeds (E, B) of starts at a place (update, …) of a run."""
    return np.array(seeds_of(seed, *place, count=episodes * count)).reshape(episodes, count)


def standard_normal(seed: int, *place: int, shape: tuple[int, ...]) -> Tensor:
    """Noise that depends on its place in a run alone."""
    rng = np.random.default_rng([seed, *place])
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _check_finite(values: Array, what: str, tasks: Array, episode: int, step: int, rows: Array) -> None:
    if not np.isfinite(values).all() and not np.isfinite(values[rows]).all():
        row = int(np.argmax(rows & ~np.isfinite(values).reshape(len(values), -1).all(1)))
        where = "at the reset" if step < 0 else f"at step {step}"
        raise UserError(
            f"the environment gave a {what} that is no finite number in task {row} ({_say(tasks[row])}), episode "
            f"{episode}, {where}: mend the environment (MuJoCo diverges when actions are extreme)"
        )


def _say(task: Array) -> str:
    return ", ".join(f"{value:.4g}" for value in np.atleast_1d(task))
