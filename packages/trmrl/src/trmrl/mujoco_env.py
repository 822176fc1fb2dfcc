"""MuJoCo tasks: the released environments' rewards and observations on gymnasium's v5 models.

One environment and many at once share the formulas (:meth:`outcome`), written for a leading axis of environments.
"""

from __future__ import annotations

import abc
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from metazoo.errors import UserError

from trmrl.env import Array, Split, TaskVectorEnv

try:
    import mujoco
    from gymnasium.envs.mujoco.ant_v5 import AntEnv
    from gymnasium.envs.mujoco.half_cheetah_v5 import HalfCheetahEnv
    from gymnasium.envs.mujoco.humanoid_v5 import HumanoidEnv
except ImportError as _error:
    _WHY = str(_error)

    class _Missing(gym.Env):
        """Stands where gymnasium's environments would be, so that this module can be imported without MuJoCo."""

        def __init__(self, **kwargs: Any) -> None:
            raise UserError(
                f"MuJoCo's environments cannot be made ({_WHY}): pip install 'metazoo-trmrl[mujoco]' (in the "
                "repository: uv pip install './packages/trmrl[mujoco]')"
            )

    AntEnv = HalfCheetahEnv = HumanoidEnv = _Missing  # type: ignore[misc, assignment]

Outcome = tuple[Array, Array, dict[str, Array]]


class MujocoTasks:
    """A MuJoCo environment with tasks. A subclass says what it measures, and what follows from it."""

    size: ClassVar[int]
    """Numbers in an observation."""
    view: ClassVar[tuple[int, int]] = (0, 2)
    """Axes of a drawing: across and up."""
    first_task: ClassVar[float]
    data: Any
    model: Any
    frame_skip: int
    render_mode: str | None

    def __init__(self, render_mode: str | None = None) -> None:
        super().__init__(render_mode=render_mode)  # type: ignore[call-arg]
        self.observation_space = spaces.Box(-np.inf, np.inf, (self.size,), np.float64)
        self.set_task(np.array([self.first_task]))

    @staticmethod
    @abc.abstractmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        """Tasks (count, 1)."""

    def set_task(self, task: Array) -> None:
        """Take a task (1,)."""
        self.task = np.asarray(task, dtype=np.float64)

    @abc.abstractmethod
    def measures(self) -> Array:
        """What the reward is made of, from the state as it is now."""

    @staticmethod
    @abc.abstractmethod
    def outcome(before: Array, after: Array, action: Array, task: Array, dt: float) -> Outcome:
        """Rewards (n,), whether the episode has ended (n,), and figures of interest (n,), of n environments.

        Args:
            before, after: measures (n, …) before the step and after it.
            action: (n, action size), as it was asked for: MuJoCo cuts it to its range, the cost does not.
            task: (n, 1).
            dt: seconds of a step.
        """

    def advance(self, action: Array) -> None:
        """Simulate one step."""
        self.data.ctrl[:] = action
        mujoco.mj_step(self.model, self.data, nstep=self.frame_skip)  # without Python's lock: threads run beside it
        mujoco.mj_rnePostConstraint(self.model, self.data)  # contact forces

    def step(self, action: Array) -> tuple[Array, float, bool, bool, dict[str, Any]]:
        action = np.asarray(action, dtype=np.float64)
        before = self.measures()
        self.advance(action)
        reward, ended, info = self.outcome(
            before[None],
            self.measures()[None],
            action[None],
            self.task[None],
            self.model.opt.timestep * self.frame_skip,
        )
        if self.render_mode == "human":
            self.render()  # type: ignore[attr-defined]
        found = {name: float(value[0]) for name, value in info.items()}
        return self._get_obs(), float(reward[0]), bool(ended[0]), False, found

    @abc.abstractmethod
    def _get_obs(self) -> Array: ...

    def draw(self, size: int = 240) -> Array:
        """A picture (size, size, 3) of the bodies' outlines, without a graphics library."""
        from trmrl.drawing import draw_bodies

        return draw_bodies(self.model, self.data, self.view, size)


class _HalfCheetah(MujocoTasks, HalfCheetahEnv):
    size = 20

    def _get_obs(self) -> Array:
        return np.concatenate([self.data.qpos[1:], self.data.qvel, self.data.body("torso").xpos])

    def measures(self) -> Array:
        return self.data.qpos[:1].copy()


class HalfCheetahVelEnv(_HalfCheetah):
    """r = −|v_x − v*| − 0.05‖a‖² with a target velocity v* ~ U(0, 3) m/s; out of distribution U(3, 4)."""

    first_task = 1.5

    @staticmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        return rng.uniform(3.0, 4.0, (count, 1)) if split == "ood" else rng.uniform(0.0, 3.0, (count, 1))

    @staticmethod
    def outcome(before: Array, after: Array, action: Array, task: Array, dt: float) -> Outcome:
        velocity = (after[:, 0] - before[:, 0]) / dt
        error = np.abs(velocity - task[:, 0])
        reward = -error - 0.05 * np.square(action).sum(-1)
        return reward, np.zeros(len(action), dtype=bool), {"velocity": velocity, "error": error}


class HalfCheetahDirEnv(_HalfCheetah):
    """r = dir·v_x − 0.05‖a‖², dir ∈ {−1, +1}. There is nothing out of distribution: ood draws the same tasks."""

    first_task = 1.0

    @staticmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        return 2.0 * rng.integers(2, size=(count, 1)) - 1.0

    @staticmethod
    def outcome(before: Array, after: Array, action: Array, task: Array, dt: float) -> Outcome:
        velocity = (after[:, 0] - before[:, 0]) / dt
        reward = task[:, 0] * velocity - 0.05 * np.square(action).sum(-1)
        return reward, np.zeros(len(action), dtype=bool), {"velocity": velocity}


class _Ant(MujocoTasks, AntEnv):
    size = 27
    view = (0, 1)

    def _get_obs(self) -> Array:
        return np.concatenate([self.data.qpos[2:], self.data.qvel])

    def measures(self) -> Array:
        """Torso's place (3), its height, whether the state is finite, contact forces squared (each cut to ±1)."""
        finite = np.isfinite(self.data.qpos).all() and np.isfinite(self.data.qvel).all()
        contact = np.square(np.clip(self.data.cfrc_ext, -1, 1)).sum()
        return np.concatenate([self.data.body("torso").xpos, [self.data.qpos[2], finite, contact]])

    @staticmethod
    def parts(before: Array, after: Array, action: Array, dt: float) -> tuple[Array, Array, Array]:
        """Velocity (n, 2), the reward without its forward part (n,), the end (n,): torso out of [0.2, 1] m."""
        velocity = (after[:, :2] - before[:, :2]) / dt
        rest = 1.0 - 0.5 * np.square(action).sum(-1) - 0.5e-3 * after[:, 5]
        ended = ~((after[:, 4] > 0) & (after[:, 3] >= 0.2) & (after[:, 3] <= 1.0))
        return velocity, rest, ended


class AntDirEnv(_Ant):
    """r = v·(cos g, sin g) − 0.5‖a‖² − 0.0005‖clip(cfrc)‖² + 1, g ∈ {−1, +1} in radians, as released (±57°)."""

    first_task = 1.0

    @staticmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        return 2.0 * rng.integers(2, size=(count, 1)) - 1.0

    @staticmethod
    def outcome(before: Array, after: Array, action: Array, task: Array, dt: float) -> Outcome:
        velocity, rest, ended = _Ant.parts(before, after, action, dt)
        forward = velocity[:, 0] * np.cos(task[:, 0]) + velocity[:, 1] * np.sin(task[:, 0])
        return forward + rest, ended, {"forward": forward}


class AntDirForwardBackwardEnv(AntDirEnv):
    """AntDir with g ∈ {0, π}: forwards or backwards, as in PEARL."""

    first_task = 0.0

    @staticmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        return np.pi * rng.integers(2, size=(count, 1))


class AntVelEnv(_Ant):
    """AntDir's costs with −|v_x − v*| for the forward part, v* ~ U(0, 3) m/s, out of distribution U(3, 4).

    The paper names this environment; the released code does not have it.
    """

    first_task = 1.5

    @staticmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        return rng.uniform(3.0, 4.0, (count, 1)) if split == "ood" else rng.uniform(0.0, 3.0, (count, 1))

    @staticmethod
    def outcome(before: Array, after: Array, action: Array, task: Array, dt: float) -> Outcome:
        velocity, rest, ended = _Ant.parts(before, after, action, dt)
        error = np.abs(velocity[:, 0] - task[:, 0])
        return rest - error, ended, {"velocity": velocity[:, 0], "error": error}


class HumanoidDirEnv(MujocoTasks, HumanoidEnv):
    """r = 0.25 Δ(centre of mass)·(cos g, sin g)/timestep − 0.1‖ctrl‖² − impact + 5, g ~ U(0, 2π), as released."""

    size = 376
    first_task = 0.0

    @staticmethod
    def sample_tasks(count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        return rng.uniform(0, 2 * np.pi, (count, 1))

    def _get_obs(self) -> Array:
        data = self.data
        parts = (data.qpos[2:], data.qvel, data.cinert, data.cvel, data.qfrc_actuator, data.cfrc_ext)
        return np.concatenate([part.ravel() for part in parts])

    def measures(self) -> Array:
        """Centre of mass (2), height, ‖ctrl‖², contact forces squared, the model's own timestep [s]."""
        mass = self.model.body_mass
        centre = (mass[:, None] * self.data.xipos).sum(0) / mass.sum()
        return np.array([
            *centre[:2], self.data.qpos[2], np.square(self.data.ctrl).sum(), np.square(self.data.cfrc_ext).sum(),
            self.model.opt.timestep,
        ])  # fmt: skip

    @staticmethod
    def outcome(before: Array, after: Array, action: Array, task: Array, dt: float) -> Outcome:
        moved = after[:, :2] - before[:, :2]
        forward = moved[:, 0] * np.cos(task[:, 0]) + moved[:, 1] * np.sin(task[:, 0])
        forward = 0.25 * forward / after[:, 5]
        reward = forward - 0.1 * after[:, 3] - np.minimum(0.5e-6 * after[:, 4], 10.0) + 5.0
        return reward, (after[:, 2] < 1.0) | (after[:, 2] > 2.0), {"forward": forward}


class MujocoVectorEnv(TaskVectorEnv):
    """Many environments of one class, simulated by threads, with rewards of all in one go.

    The same numbers as one environment at a time, whatever ``threads`` is.
    """

    of: ClassVar[type[Any]]

    def __init__(self, num_envs: int = 1, threads: int = 1) -> None:
        self.envs = [self.of() for _ in range(num_envs)]
        first = self.envs[0]
        super().__init__(num_envs, first.observation_space, first.action_space)
        self.tasks = np.stack([env.task for env in self.envs])
        self.dt = first.model.opt.timestep * first.frame_skip
        self.threads = min(threads, num_envs)
        self._pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        self._measures = np.stack([env.measures() for env in self.envs])

    def sample_tasks(self, count: int, rng: np.random.Generator, split: Split = "train") -> Array:
        found: Array = self.of.sample_tasks(count, rng, split)
        return found

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Array, dict[str, Any]]:
        seeds = seed if isinstance(seed, (list, tuple, np.ndarray)) else [seed] * self.num_envs
        first = [
            env.reset(seed=None if number is None else int(number))[0]
            for env, number in zip(self.envs, seeds, strict=True)
        ]
        self._measures = np.stack([env.measures() for env in self.envs])
        return np.stack(first), {}

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        actions = np.asarray(actions, dtype=np.float64)

        def part(start: int) -> None:
            for i in range(start, self.num_envs, self.threads):
                self.envs[i].advance(actions[i])

        if self._pool is None:
            part(0)
        else:
            list(self._pool.map(part, range(self.threads)))
        before, self._measures = self._measures, np.stack([env.measures() for env in self.envs])
        rewards, ended, info = self.of.outcome(before, self._measures, actions, self.tasks, self.dt)
        observations = np.stack([env._get_obs() for env in self.envs])
        return observations, rewards, ended, np.zeros(self.num_envs, dtype=bool), info

    def close_extras(self, **kwargs: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        for env in self.envs:
            env.close()


class HalfCheetahVelVectorEnv(MujocoVectorEnv):
    """Many HalfCheetahVel."""

    of = HalfCheetahVelEnv


class HalfCheetahDirVectorEnv(MujocoVectorEnv):
    """Many HalfCheetahDir."""

    of = HalfCheetahDirEnv


class AntDirVectorEnv(MujocoVectorEnv):
    """Many AntDir."""

    of = AntDirEnv


class AntDirForwardBackwardVectorEnv(MujocoVectorEnv):
    """Many AntDirForwardBackward."""

    of = AntDirForwardBackwardEnv


class AntVelVectorEnv(MujocoVectorEnv):
    """Many AntVel."""

    of = AntVelEnv


class HumanoidDirVectorEnv(MujocoVectorEnv):
    """Many HumanoidDir."""

    of = HumanoidDirEnv
