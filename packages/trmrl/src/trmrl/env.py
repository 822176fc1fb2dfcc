"""Task distributions: environments that draw and take tasks, many tasks stepped at once, and RL²'s observations.

An environment for meta-learning is a `gymnasium.Env` with two more methods (:class:`MetaEnv`);
:mod:`trmrl.registration` lists those that are here.
"""

from __future__ import annotations

import abc
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from metazoo.errors import UserError

from trmrl.registration import NEEDS, register

Split = Literal["train", "test", "ood"]
Array = np.ndarray


class MetaEnv(Protocol):
    """What a `gymnasium.Env` needs besides its own methods. Tasks are rows of numbers."""

    def sample_tasks(self, count: int, rng: np.random.Generator, split: Split) -> Array:
        """Tasks (count, task size) of training, of the test, or out of the training distribution."""

    def set_task(self, task: Array) -> None:
        """Take a task (task size,); it holds from the next reset on."""


class TaskVectorEnv(VectorEnv):
    """Several tasks of one distribution stepped at once. Nothing resets by itself: episodes end for all together.

    Args:
        num_envs: how many.
        observation_space: of one.
        action_space: of one.
    """

    metadata: ClassVar[dict[str, Any]] = {"autoreset_mode": AutoresetMode.DISABLED}

    def __init__(self, num_envs: int, observation_space: spaces.Box, action_space: spaces.Box) -> None:
        self.num_envs = num_envs
        self.single_observation_space, self.single_action_space = observation_space, action_space
        self.observation_space = batch_space(observation_space, num_envs)
        self.action_space = batch_space(action_space, num_envs)
        self.tasks: Array = np.zeros((num_envs, 0))

    @abc.abstractmethod
    def sample_tasks(self, count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        """Tasks (count, task size)."""

    def set_tasks(self, tasks: Array) -> None:
        """Take tasks (num_envs, task size), from the next reset on."""
        self.tasks = np.asarray(tasks, dtype=np.float64)


# ---- the point robot


class _Point:
    """Goals on the unit circle: the upper half is trained and tested on, the arcs beside it are out of distribution."""

    reach = 0.1
    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float64)
    action_space = spaces.Box(-1.0, 1.0, (2,), np.float64)

    @staticmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        """Angles θ (count, 1): U(0, π); out of distribution U of the arcs beside it, (−π/3, 0) and (π, 4π/3)."""
        if split != "ood":
            return rng.uniform(0, np.pi, (count, 1))
        beyond = rng.uniform(-np.pi / 3, np.pi / 3, (count, 1))
        return np.where(beyond < 0, beyond, np.pi + beyond)

    @staticmethod
    def goal(tasks: Array) -> Array:
        """(…, 1) → (…, 2)."""
        return np.concatenate([np.cos(tasks), np.sin(tasks)], -1)

    @classmethod
    def move(cls, place: Array, action: Array) -> Array:
        """A step of 0.1 times the action, which is cut to ±1 on each axis."""
        return place + cls.reach * np.clip(action, -1.0, 1.0)


class PointRobotEnv(_Point, gym.Env):
    """A point in the plane, from (0, 0); the reward is minus the distance to a hidden goal after the move."""

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"], "render_fps": 10}

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode
        self.set_task(np.array([np.pi / 2]))
        self.trail = [np.zeros(2)]

    def set_task(self, task: Array) -> None:
        """The goal's angle θ (1,), in radians."""
        self.task = np.asarray(task, dtype=np.float64)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        self.trail = [np.zeros(2)]
        return self.trail[-1].copy(), {}

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        place = self.move(self.trail[-1], np.asarray(action, dtype=np.float64))
        self.trail.append(place)
        return place.copy(), -float(np.linalg.norm(place - self.goal(self.task))), False, False, {}

    def draw(self, size: int = 240) -> Array:
        """A picture (size, size, 3) of goal, point and its way."""
        from trmrl.drawing import draw_point

        return draw_point(self.trail, self.goal(self.task), size)

    def render(self) -> Array | None:
        return self.draw() if self.render_mode == "rgb_array" else None


class PointRobotVectorEnv(_Point, TaskVectorEnv):
    """Many point robots at once."""

    def __init__(self, num_envs: int = 1, threads: int = 1) -> None:
        TaskVectorEnv.__init__(self, num_envs, self.observation_space, self.action_space)
        self.tasks, self.place = np.full((num_envs, 1), np.pi / 2), np.zeros((num_envs, 2))

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        self.place = np.zeros((self.num_envs, 2))
        return self.place.copy(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        self.place = self.move(self.place, np.asarray(actions, dtype=np.float64))
        rewards = -np.linalg.norm(self.place - self.goal(self.tasks), axis=-1)
        no = np.zeros(self.num_envs, dtype=bool)
        return self.place.copy(), rewards, no, no.copy(), {}


# ---- any environment


class SyncTaskVectorEnv(TaskVectorEnv):
    """Any registered environment with `sample_tasks` and `set_task`, one after the other.

    An episode that ends before the others is stepped no more: its rows repeat the last observation.

    Raises:
        UserError: no such environment, no `set_task`, other spaces than boxes, spaces that change with the task, tasks
            that are no rows of numbers.
    """

    def __init__(self, env: str, num_envs: int = 1, **kwargs: Any) -> None:
        self.envs: list[gym.Env] = []  # where one cannot be made, those before it are closed
        for _ in range(num_envs):
            self.envs.append(make(env, **kwargs))
        first = self.envs[0]
        super().__init__(num_envs, first.observation_space, first.action_space)
        self.name, self._over = env, np.zeros(num_envs, dtype=bool)
        self._last = np.zeros((num_envs, *self.single_observation_space.shape))

    def sample_tasks(self, count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        found = self.envs[0].unwrapped.sample_tasks(count, rng, split)
        try:
            tasks = np.asarray(found, dtype=np.float64)
        except (TypeError, ValueError):
            tasks = np.zeros(0)
        if tasks.ndim != 2 or len(tasks) != count or not tasks.shape[1] or not np.isfinite(tasks).all():
            raise UserError(
                f"{self.name}: sample_tasks({count}, rng, {split!r}) gave {type(found).__name__} of shape "
                f"{np.shape(found) if tasks.size else 'unknown'}: give an array ({count}, task size) of finite numbers"
            )
        return tasks

    def set_tasks(self, tasks: Array) -> None:
        super().set_tasks(tasks)
        for env, task in zip(self.envs, self.tasks, strict=True):
            env.unwrapped.set_task(task)
            for name in ("observation_space", "action_space"):
                found, wanted = getattr(env, name), getattr(self, f"single_{name}")
                if found.shape != wanted.shape:
                    raise UserError(
                        f"{self.name}: {name} has shape {found.shape} in task {task.tolist()} and {wanted.shape} in "
                        "the first one: tasks must share their spaces; pad the smaller ones"
                    )

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        seeds = seed if isinstance(seed, (list, tuple, np.ndarray)) else [seed] * self.num_envs
        self._over[:] = False
        for i, (env, number) in enumerate(zip(self.envs, seeds, strict=True)):
            self._last[i] = env.reset(seed=None if number is None else int(number))[0]
        return self._last.copy(), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        rewards = np.zeros(self.num_envs)
        terminated, truncated = (np.zeros(self.num_envs, dtype=bool) for _ in range(2))
        success = np.full(self.num_envs, np.nan)
        for i, env in enumerate(self.envs):
            if self._over[i]:
                continue
            self._last[i], rewards[i], terminated[i], truncated[i], info = env.step(actions[i])
            success[i] = info.get("success", np.nan)
        self._over |= terminated | truncated
        return self._last.copy(), rewards, terminated, truncated, {"success": success}

    def close_extras(self, **kwargs: Any) -> None:
        for env in self.envs:
            env.close()


def make(env: str, **kwargs: Any) -> gym.Env:
    """One environment by id, with its two further methods checked.

    Raises:
        UserError: what is wrong with it, or what to install.
    """
    _spec(env)
    try:
        made = gym.make(env, disable_env_checker=True, **kwargs)
    except (gym.error.Error, ImportError) as error:
        raise UserError(f"--env {env} cannot be made: {' '.join(str(error).split())}") from error
    missing = [name for name in ("sample_tasks", "set_task") if not hasattr(made.unwrapped, name)]
    if missing:
        raise UserError(
            f"--env {env} has no {' and no '.join(missing)}: give an environment with sample_tasks(count, rng, split) "
            "and set_task(task)"
        )
    for name in ("observation_space", "action_space"):
        space = getattr(made, name)
        if not isinstance(space, spaces.Box) or len(space.shape) != 1:
            raise UserError(f"--env {env}: {name} is {space}: give a Box with one dimension, by a wrapper")
    return made


def make_vector(env: str, num_envs: int, threads: int = 1) -> TaskVectorEnv:
    """Many environments of an id at once: by its own vector class where it has one, else one after the other.

    Raises:
        UserError: what is wrong with it, or what to install.
    """
    spec = _spec(env)
    if spec.vector_entry_point is not None:
        creator: Any = spec.vector_entry_point
        creator = load_env_creator(creator) if isinstance(creator, str) else creator
        if isinstance(creator, type) and issubclass(creator, TaskVectorEnv):  # else it knows nothing of tasks
            made: TaskVectorEnv = creator(num_envs=num_envs, threads=threads, **spec.kwargs)  # type: ignore[call-arg]
            return made
    return SyncTaskVectorEnv(env, num_envs)


def _spec(env: str) -> Any:
    """Look an id up, and see that what it needs is installed."""
    module, _, name = env.rpartition(":")
    for package, extra in (("mujoco", "mujoco"), ("metaworld", "metaworld")):
        if package in NEEDS.get(name, ()) and importlib.util.find_spec(package) is None:
            raise UserError(
                f"--env {name} needs {package}, which is not installed: pip install 'metazoo-trmrl[{extra}]' "
                f"(in the repository: uv pip install './packages/trmrl[{extra}]')"
            )
    try:
        if ":" in env:
            importlib.import_module(module)
        return gym.spec(name)
    except (gym.error.Error, ImportError, TypeError, ValueError) as error:
        ours = ", ".join(NEEDS)
        raise UserError(
            f"--env {env}: {' '.join(str(error).split())} Here are {ours}; your own: module:id, where importing "
            "module registers id"
        ) from error


class RL2Wrapper(gym.Wrapper):
    """RL²'s observation [s_t ; a_{t−1} ; r_{t−1} ; d_{t−1}] of one environment; zeros after s_0 at a reset.

    d is 1 after the end of an episode by its state alone, never by its time limit.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        assert isinstance(env.observation_space, spaces.Box)
        assert isinstance(env.action_space, spaces.Box)
        size = env.observation_space.shape[0] + env.action_space.shape[0] + 2
        self.observation_space = spaces.Box(-np.inf, np.inf, (size,), np.float64)

    def reset(self, **kwargs: Any) -> tuple[Array, dict[str, Any]]:
        first, info = self.env.reset(**kwargs)
        return self._token(first, np.zeros(self.env.action_space.shape or 0), 0.0, False), info

    def step(self, action: Array) -> tuple[Array, Any, bool, bool, dict[str, Any]]:
        found, reward, terminated, truncated, info = self.env.step(action)
        return self._token(found, action, float(reward), terminated), reward, terminated, truncated, info

    def _token(self, observation: Array, action: Array, reward: float, done: bool) -> Array:
        return np.concatenate([observation, action, [reward, float(done)]]).astype(np.float64)


def seeds_of(seed: int, *place: int, count: int) -> Sequence[int]:
    """Seeds of starts, which depend on their place (update, episode, …) alone: a resumed run meets the same ones."""
    return np.random.SeedSequence([seed, *place]).generate_state(count).tolist()


register()
