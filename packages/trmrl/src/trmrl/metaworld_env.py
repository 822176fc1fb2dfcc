"""Meta-World's ML1, ML10 and ML45 with the goal hidden; needs the extra [metaworld]."""

from __future__ import annotations

import collections
import functools
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from metazoo.errors import UserError

from trmrl.env import Array, Split

_IDLE: dict[str, list[Any]] = collections.defaultdict(list)
"""Simulations by class that no environment uses just now: they take long to make and hold much memory."""


@functools.cache
def _benchmark(benchmark: str, name: str, seed: int) -> Any:
    """Classes and goals of a benchmark, which take seconds to make: many environments share them."""
    import metaworld

    if benchmark != "ML1":
        return getattr(metaworld, benchmark)(seed=seed)
    if f"{name}-v3" not in metaworld.ML1.ENV_NAMES:
        raise UserError(f"Meta-World has no {name}-v3: one of {', '.join(sorted(metaworld.ML1.ENV_NAMES))}")
    return metaworld.ML1(f"{name}-v3", seed=seed)


class MetaWorldEnv(gym.Env):
    """A benchmark of Meta-World. A task (2,) is the number of its class and of its goal in that class.

    Args:
        benchmark: ML1, ML10 or ML45.
        name: of ML1's class without its version: "reach".
        seed: of the benchmark's goals, 50 for training and 50 for the test of each class.
        render_mode: rgb_array or None.

    Raises:
        UserError: no such class; a goal that can be seen.
    """

    metadata: ClassVar[dict[str, Any]] = {"render_modes": ["rgb_array"]}

    def __init__(
        self, benchmark: str = "ML1", name: str = "reach", seed: int = 0, render_mode: str | None = None
    ) -> None:
        self.render_mode = render_mode
        made = _benchmark(benchmark, name, seed)
        self._classes = {"train": dict(made.train_classes), "test": dict(made.test_classes)}
        self._goals = {
            split: {name: [task for task in tasks if task.env_name == name] for name in self._classes[split]}
            for split, tasks in (("train", made.train_tasks), ("test", made.test_tasks))
        }
        self._env: Any = None
        self._name = ""
        self.set_task(np.array([0.0, 0.0]))
        space = self._env.observation_space
        self.observation_space = spaces.Box(-np.inf, np.inf, space.shape, np.float64)
        self.action_space = spaces.Box(-1.0, 1.0, self._env.action_space.shape, np.float64)
        self._give_back()  # until a task is set others may have it

    def sample_tasks(self, count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        """Classes and goals (count, 2); those of the test are counted from the last of training on. ood: as test.

        Classes take turns, in an order drawn anew, so that none has two tasks more than another; goals of a class
        repeat only when there are no more.
        """
        part = "train" if split == "train" else "test"
        classes = list(self._classes[part])
        which = np.resize(rng.permutation(len(classes)), count)
        goals = np.zeros(count, dtype=int)
        for number, name in enumerate(classes):
            mine = which == number
            goals[mine] = np.resize(rng.permutation(len(self._goals[part][name])), int(mine.sum()))
        first = 0 if part == "train" else len(self._classes["train"])
        return np.stack([which + first, goals], 1).astype(np.float64)

    def set_task(self, task: Array) -> None:
        """Take a class and a goal."""
        number, goal = (int(value) for value in task)
        part = "train" if number < len(self._classes["train"]) else "test"
        names = list(self._classes[part])
        name = names[number - (0 if part == "train" else len(self._classes["train"]))]
        if name != self._name:
            self._give_back()
            self._env = _IDLE[name].pop() if _IDLE[name] else self._classes[part][name]()
            self._name = name
        self._env.set_task(self._goals[part][name][goal])
        if not self._env._partially_observable:
            raise UserError(f"Meta-World's {name} shows its goal: a meta-learner must infer it, so hide it")

    def _give_back(self) -> None:
        if self._env is not None:
            _IDLE[self._name].append(self._env)
        self._env, self._name = None, ""

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        super().reset(seed=seed)
        if self._env is None:
            self.set_task(np.array([0.0, 0.0]))
        return self._env.reset(seed=seed)

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        action = np.clip(action, -1.0, 1.0).astype(np.float32)
        found, reward, _, truncated, info = self._env.step(action)  # a success does not end the episode
        return found, float(reward), False, bool(truncated), info

    def close(self) -> None:
        self._give_back()

    def render(self) -> Any:
        self._env.render_mode = self.render_mode
        return self._env.render()
