"""Environments: the point robot, MuJoCo's formulas, many at once, tokens, trials, and what is refused."""

from __future__ import annotations

import functools
import importlib.util
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from metazoo.errors import UserError
from torch import Tensor
from torch.distributions import Normal
from trmrl import metaworld_env, mujoco_env, references
from trmrl.collect import collect, means_of, on_all, standard_normal, starts
from trmrl.env import PointRobotEnv, PointRobotVectorEnv, RL2Wrapper, SyncTaskVectorEnv, make, make_vector, seeds_of
from trmrl.model import Trials, TrMRLPolicy
from trmrl.mujoco_env import (
    AntDirEnv,
    AntDirForwardBackwardEnv,
    AntVelEnv,
    HalfCheetahDirEnv,
    HalfCheetahVelEnv,
    HumanoidDirEnv,
)
from trmrl.registration import MUJOCO

torch.set_num_threads(1)
SIZE = {"HalfCheetahVel": 20, "HalfCheetahDir": 20, "AntDir": 27, "AntDirForwardBackward": 27, "AntVel": 27,
        "HumanoidDir": 376}  # fmt: skip
NO_REWARD, NO_START, WIDER = -1, -2, -3


class Scripted(gym.Env):
    """Ends after as many steps as the task says (0: never); tasks below 0 break it. The reward is the step's number."""

    action_space: spaces.Space[Any] = spaces.Box(-1, 1, (2,), np.float64)

    def __init__(self, action_space: spaces.Space[Any] | None = None) -> None:
        self.observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        self.action_space = action_space or Scripted.action_space
        self.task, self.episode, self.t, self.stepped = 0, 0, 0, 0

    def sample_tasks(self, count: int, rng: np.random.Generator, split: str) -> np.ndarray:
        return rng.integers(1, 4, size=(count, 1))

    def set_task(self, task: np.ndarray) -> None:
        self.task, self.episode = int(task[0]), 0
        if self.task == WIDER:
            self.observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)

    def _seen(self) -> np.ndarray:
        return np.array([self.episode, self.t, 7.0])

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.full(3, np.nan) if self.task == NO_START else self._seen(), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.t += 1
        self.stepped += 1
        broken = self.task == NO_REWARD and (self.episode, self.t) == (2, 3)
        info = {"success": float(self.t > 1)}
        return self._seen(), math.nan if broken else float(self.t), self.t == self.task, False, info


class Picture(Scripted):
    """Its observation has two dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = spaces.Box(0, 1, (2, 2), np.float64)


for name, entry, more in (
    ("Scripted", Scripted, {}),
    ("Limited", Scripted, {"max_episode_steps": 4}),
    ("Discrete", Scripted, {"kwargs": {"action_space": spaces.Discrete(3)}}),
    ("Picture", Picture, {}),
):
    if f"trmrl-test/{name}-v0" not in gym.registry:
        gym.register(f"trmrl-test/{name}-v0", entry, **more)
SCRIPTED, LIMITED = "trmrl-test/Scripted-v0", "trmrl-test/Limited-v0"


class Recorder:
    """An agent with the mean actions (0.5, −0.25); keeps what it was shown."""

    def __init__(self) -> None:
        self.tokens: list[Tensor] = []
        self.begun: list[tuple[int, Tensor | None]] = []
        self.between: list[Trials | None] = []

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        self.begun.append((count, tasks))

    def new_episode(self, so_far: Trials | None = None) -> None:
        self.between.append(so_far)

    def step(self, token: Tensor) -> Normal:
        self.tokens.append(token.clone())
        return Normal(torch.tensor([[0.5, -0.25]]).expand(len(token), 2), torch.tensor(0.1))


def collected(
    env: str, tasks: list[int], horizon: int = 5, noise: Tensor | None = None
) -> tuple[Trials, dict[str, Any], Recorder]:
    agent = Recorder()
    rows = np.array(tasks, dtype=float)[:, None]
    seeds = starts(0, episodes=2, count=len(tasks))
    vector = make_vector(env, len(tasks))
    trials, infos = collect(agent, vector, rows, episodes=2, horizon=horizon, seeds=seeds, noise=noise)
    return trials, infos, agent


# ---- the point robot


def test_point_robot_single_and_vector() -> None:
    rng = np.random.default_rng(0)
    vector = make_vector("trmrl/PointRobot-v0", 3)
    assert isinstance(vector, PointRobotVectorEnv)
    tasks = vector.sample_tasks(3, rng)
    vector.set_tasks(tasks)
    singles = [PointRobotEnv() for _ in range(3)]
    for env, task in zip(singles, tasks, strict=True):
        env.set_task(task)
    for _ in range(2):
        first, _ = vector.reset(seed=[1, 2, 3])
        assert np.array_equal(first, np.zeros((3, 2)))
        assert np.array_equal(first, [env.reset()[0] for env in singles])
        for _ in range(6):
            actions = rng.normal(0, 2, (3, 2))
            places, rewards, terminated, truncated, _ = vector.step(actions)
            found = [env.step(action) for env, action in zip(singles, actions, strict=True)]
            assert np.array_equal(places, [row[0] for row in found])
            np.testing.assert_allclose(rewards, [row[1] for row in found], rtol=1e-14)
            assert not (terminated | truncated).any()
            assert not any(row[2] or row[3] for row in found)


def test_point_robot_moves_and_rewards() -> None:
    env = PointRobotEnv()
    env.set_task(np.array([0.0]))  # the goal is (1, 0)
    env.reset()
    place, reward, *_ = env.step(np.array([5.0, -0.5]))
    np.testing.assert_allclose(place, [0.1, -0.05])
    assert reward == pytest.approx(-math.hypot(0.9, 0.05))
    place, reward, *_ = env.step(np.array([0.2, -7.0]))
    np.testing.assert_allclose(place, [0.12, -0.15])
    assert reward == pytest.approx(-math.hypot(0.88, 0.15))


def test_point_robot_vector_keeps_what_it_gave() -> None:
    vector = PointRobotVectorEnv(2)
    first, _ = vector.reset()
    second = vector.step(np.ones((2, 2)))[0]
    vector.step(np.ones((2, 2)))
    assert not first.any()
    np.testing.assert_allclose(second, 0.1)


# ---- tasks


@pytest.mark.parametrize(
    ("env", "train", "ood"),
    [
        (PointRobotEnv, (0, math.pi), (-math.pi / 3, 4 * math.pi / 3)),
        (HalfCheetahVelEnv, (0, 3), (3, 4)),
        (AntVelEnv, (0, 3), (3, 4)),
        (HumanoidDirEnv, (0, 2 * math.pi), (0, 2 * math.pi)),
    ],
)
def test_ranges_of_tasks(env: Any, train: tuple[float, float], ood: tuple[float, float]) -> None:
    for split, (low, high) in (("train", train), ("test", train), ("ood", ood)):
        tasks = env.sample_tasks(2000, np.random.default_rng(3), split)
        assert tasks.shape == (2000, 1)
        assert low <= tasks.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < tasks.max() <= high
        assert tasks.mean() == pytest.approx((low + high) / 2, abs=0.03 * (high - low))
        assert np.array_equal(tasks, env.sample_tasks(2000, np.random.default_rng(3), split))


def test_goals_beside_the_half_circle() -> None:
    """Out of distribution, and next to it: as many on either side."""
    tasks = PointRobotEnv.sample_tasks(2000, np.random.default_rng(3), "ood")
    assert not ((tasks > 0) & (tasks < math.pi)).any()
    assert 900 < (tasks < 0).sum() < 1100
    goals = references.goals("ood")
    assert goals.shape == references.goals().shape == (64, 1)
    assert not ((goals >= 0) & (goals <= math.pi)).any()
    assert goals.min() == pytest.approx(-math.pi / 3)
    assert goals.max() == pytest.approx(4 * math.pi / 3)
    assert (goals < 0).sum() == 32


@pytest.mark.parametrize(
    "tasks",
    [np.zeros(2), np.zeros((3, 1)), np.zeros((2, 0)), np.full((2, 1), np.nan), [["a"], ["b"]], [[0], [1, 2]], None],
    ids=["flat", "too-many", "empty", "nan", "words", "ragged", "none"],
)
def test_tasks_are_rows_of_numbers(tasks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Scripted, "sample_tasks", lambda self, count, rng, split: tasks)
    vector = make_vector(SCRIPTED, 2)
    with pytest.raises(UserError, match=r"sample_tasks\(2, rng, 'train'\) gave .*: give an array \(2, task size\)"):
        vector.sample_tasks(2, np.random.default_rng(0))


class Arm:
    """Stands for a class of Meta-World."""

    made: ClassVar[list[str]] = []
    observation_space, action_space = spaces.Box(-1, 1, (39,)), spaces.Box(-1, 1, (4,))
    _partially_observable = True

    def __init__(self, name: str) -> None:
        self.made.append(name)

    def set_task(self, task: Any) -> None:
        self.task = task


def test_meta_world_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes come up equally often, goals of a class once before any comes again, and simulations are shared."""
    names = [f"c{i}" for i in range(5)]
    classes = {name: functools.partial(Arm, name) for name in names}
    tasks = [SimpleNamespace(env_name=name, number=i) for name in names for i in range(4)]
    made = SimpleNamespace(train_classes=classes, test_classes=classes, train_tasks=tasks, test_tasks=tasks)
    monkeypatch.setattr(metaworld_env, "_benchmark", lambda *_: made)
    monkeypatch.setattr(metaworld_env, "_IDLE", defaultdict(list))
    env = metaworld_env.MetaWorldEnv("ML10")
    for split, first in (("train", 0), ("test", 5)):
        drawn = env.sample_tasks(12, np.random.default_rng(0), split)  # type: ignore[arg-type]
        counts = np.bincount(drawn[:, 0].astype(int) - first, minlength=5)
        assert sorted(counts) == [2, 2, 2, 3, 3]
        assert len({tuple(row) for row in drawn.tolist()}) == 12
    several = [env, *(metaworld_env.MetaWorldEnv("ML10") for _ in range(4))]
    for seed in range(20):
        for one, task in zip(several, env.sample_tasks(5, np.random.default_rng(seed)), strict=True):
            one.set_task(task)
            assert (one._name, one._env.task.number) == (names[int(task[0])], task[1])
    assert max(Arm.made.count(name) for name in names) <= 3  # of each one or two, and what waits for its turn


@pytest.mark.parametrize(
    ("env", "values"),
    [(HalfCheetahDirEnv, (-1, 1)), (AntDirEnv, (-1, 1)), (AntDirForwardBackwardEnv, (0, math.pi))],
)
def test_two_tasks(env: Any, values: tuple[float, float]) -> None:
    for split in ("train", "test", "ood"):
        tasks = env.sample_tasks(400, np.random.default_rng(0), split)
        assert tasks.shape == (400, 1)
        assert set(tasks[:, 0]) == set(values)
        assert 150 < (tasks == values[1]).sum() < 250


# ---- MuJoCo


@pytest.mark.filterwarnings("ignore:.*Box observation space (minimum|maximum) value is.*")
@pytest.mark.parametrize("name", ["trmrl/PointRobot-v0", "trmrl/HalfCheetahVel-v5"])
def test_gymnasiums_checks(name: str) -> None:
    env = gym.make(name)
    check_env(env.unwrapped, skip_render_check=True)
    env.close()


@pytest.mark.parametrize("name", MUJOCO)
def test_vector_is_single_bit_for_bit(name: str) -> None:
    """With two threads; and the observation has the paper's size."""
    identifier, seeds = f"trmrl/{name}-v5", [3, 4, 5]
    vector = make_vector(identifier, 3, threads=2)
    assert isinstance(vector, getattr(mujoco_env, f"{name}VectorEnv"))
    assert vector.threads == 2
    rng = np.random.default_rng(1)
    tasks = vector.sample_tasks(3, rng)
    vector.set_tasks(tasks)
    assert vector.single_observation_space.shape == (SIZE[name],)
    first, _ = vector.reset(seed=seeds)
    assert first.shape == (3, SIZE[name])
    low, high = vector.single_action_space.low, vector.single_action_space.high
    actions = rng.uniform(1.5 * low, 1.5 * high, (10, 3, len(low)))
    steps = [vector.step(part) for part in actions]
    single = make(identifier)
    for i, (task, seed) in enumerate(zip(tasks, seeds, strict=True)):
        single.unwrapped.set_task(task)
        assert np.array_equal(single.reset(seed=seed)[0], first[i])
        for part, (observations, rewards, terminated, truncated, infos) in zip(actions[:, i], steps, strict=True):
            found = single.step(part)
            assert np.array_equal(found[0], observations[i])
            assert found[1] == rewards[i]
            assert (found[2], found[3]) == (terminated[i], truncated[i])
            assert found[4] == {key: value[i] for key, value in infos.items()}
    again, _ = vector.reset(seed=np.array(seeds))
    assert np.array_equal(again, first)
    assert np.array_equal(vector.step(actions[0])[1], steps[0][1])
    vector.close()
    single.close()


def test_cheetah_vel() -> None:
    dt, task = 0.05, np.array([[1.7], [1.7], [0.5]])
    before = np.array([[2.0], [2.0], [-1.0]])
    after = before + dt * np.array([[1.7], [1.0], [1.0]])
    action = np.array([[0.0] * 6, [0.0] * 6, [0.5] * 6])
    rewards, ended, infos = HalfCheetahVelEnv.outcome(before, after, action, task, dt)
    np.testing.assert_allclose(rewards, [0, -0.7, -0.5 - 0.05 * 6 * 0.25], atol=1e-12)
    np.testing.assert_allclose(infos["velocity"], [1.7, 1, 1])
    np.testing.assert_allclose(infos["error"], [0, 0.7, 0.5], atol=1e-12)
    assert not ended.any()


def test_cheetah_vel_at_its_own_velocity() -> None:
    env = HalfCheetahVelEnv()
    env.reset(seed=0)
    velocity = env.step(np.zeros(6))[4]["velocity"]
    env.set_task(np.array([velocity]))
    env.reset(seed=0)
    assert env.step(np.zeros(6))[1] == 0.0
    x = env.data.qpos[0]
    observation, reward, terminated, truncated, _ = env.step(np.full(6, 0.4))
    moved = (env.data.qpos[0] - x) / 0.05
    assert reward == pytest.approx(-abs(moved - velocity) - 0.05 * 6 * 0.16)
    assert (terminated, truncated) == (False, False)
    parts = env.data.qpos[1:], env.data.qvel, env.data.body("torso").xpos
    assert np.array_equal(observation, np.concatenate(parts))


def test_cheetah_dir() -> None:
    rng = np.random.default_rng(0)
    before, after, action = rng.normal(size=(5, 1)), rng.normal(size=(5, 1)), rng.normal(size=(5, 6))
    both = [HalfCheetahDirEnv.outcome(before, after, action, np.full((5, 1), way), 0.05) for way in (-1.0, 1.0)]
    cost = 0.05 * np.square(action).sum(-1)
    np.testing.assert_allclose(both[0][0] + both[1][0], -2 * cost, atol=1e-12)
    np.testing.assert_allclose(both[1][0], (after - before)[:, 0] / 0.05 - cost)
    assert not both[0][1].any()


def ant(
    *, velocity: tuple[float, float] = (0.0, 0.0), height: float = 0.5, finite: float = 1.0, contact: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Measures before a step of 0.05 s and after it."""
    before = np.array([[1.0, 2.0, 0.5, 0.5, 1.0, 99.0]])
    x, y = 1.0 + 0.05 * velocity[0], 2.0 + 0.05 * velocity[1]
    return before, np.array([[x, y, height, height, finite, contact]])


@pytest.mark.parametrize("angle", [-1.0, 1.0, 0.0, math.pi])
@pytest.mark.parametrize("env", [AntDirEnv, AntDirForwardBackwardEnv])
def test_ant_dir(env: Any, angle: float) -> None:
    action = np.full((1, 8), 0.5)
    rewards, ended, infos = env.outcome(*ant(velocity=(2.0, 3.0), contact=40.0), action, np.array([[angle]]), 0.05)
    forward = 2 * math.cos(angle) + 3 * math.sin(angle)
    assert rewards == pytest.approx(forward - 0.5 * 8 * 0.25 - 0.0005 * 40 + 1)
    assert infos["forward"] == pytest.approx(forward)
    assert not ended.any()


def test_ant_forwards_and_backwards() -> None:
    """Opposite ways, and nothing for going sideways."""
    action = np.zeros((1, 8))
    for velocity, wanted in (((2.0, 0.0), (3.0, -1.0)), ((0.0, 2.0), (1.0, 1.0))):
        tasks = [np.array([[angle]]) for angle in (0.0, math.pi)]
        found = [
            AntDirForwardBackwardEnv.outcome(*ant(velocity=velocity), action, task, 0.05)[0].item() for task in tasks
        ]
        assert found == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("state", "wanted"),
    [
        ({"height": 0.19}, True),
        ({"height": 0.2}, False),
        ({"height": 1.0}, False),
        ({"height": 1.01}, True),
        ({"height": math.nan}, True),
        ({"finite": 0.0}, True),
    ],
)
@pytest.mark.parametrize("env", [AntDirEnv, AntVelEnv])
def test_ends_of_ants(env: Any, state: dict[str, float], wanted: bool) -> None:
    ended = env.outcome(*ant(**state), np.zeros((1, 8)), np.ones((1, 1)), 0.05)[1]
    assert ended.tolist() == [wanted]


def test_ant_vel() -> None:
    action = np.full((1, 8), 0.5)
    measures = ant(velocity=(2.0, 3.0), contact=40.0)
    rewards, ended, infos = AntVelEnv.outcome(*measures, action, np.array([[2.75]]), 0.05)
    assert rewards == pytest.approx(-0.75 - 1.0 - 0.02 + 1)
    assert (infos["velocity"].item(), infos["error"].item()) == pytest.approx((2.0, 0.75))
    assert not ended.any()


def test_ant_by_its_state() -> None:
    """A whole step against numbers read from MuJoCo, until the ant has fallen or jumped."""
    env, rng = AntDirEnv(), np.random.default_rng(0)
    env.reset(seed=0)
    contacts = []
    for _ in range(30):
        x, action = env.data.body("torso").xpos.copy(), rng.uniform(-1, 1, 8)
        observation, reward, terminated, _, _ = env.step(action)
        velocity = (env.data.body("torso").xpos - x) / env.dt
        contacts.append(np.square(np.clip(env.data.cfrc_ext, -1, 1)).sum())
        forward = velocity[0] * math.cos(1) + velocity[1] * math.sin(1)
        assert reward == pytest.approx(forward - 0.5 * (action**2).sum() - 0.0005 * contacts[-1] + 1)
        assert np.array_equal(observation, np.concatenate([env.data.qpos[2:], env.data.qvel]))
        assert terminated == (not 0.2 <= env.data.qpos[2] <= 1.0)
    assert max(contacts) > 0
    env.data.qvel[3] = np.inf
    assert env.measures()[4] == 0
    env.data.qvel[3] = 0.0
    assert env.measures()[4] == 1


def test_humanoid_dir() -> None:
    before = np.array([[1.0, 2.0, 1.4, 0.0, 0.0, 0.003]])
    after = np.array([[1.3, 1.8, 1.4, 0.5, 2e6, 0.003]])
    task = np.array([[0.7]])
    forward = 0.25 * (0.3 * math.cos(0.7) - 0.2 * math.sin(0.7)) / 0.003
    rewards, ended, infos = HumanoidDirEnv.outcome(before, after, np.zeros((1, 17)), task, 0.015)
    assert rewards == pytest.approx(forward - 0.05 - 1.0 + 5)
    assert infos["forward"] == pytest.approx(forward)
    assert not ended.any()
    after[0, 4] = 1e9  # the impact costs 10 at most
    assert HumanoidDirEnv.outcome(before, after, np.zeros((1, 17)), task, 0.015)[0] == pytest.approx(forward - 5.05)
    for height, wanted in ((0.99, True), (1.0, False), (2.0, False), (2.01, True)):
        after[0, 2] = height
        assert HumanoidDirEnv.outcome(before, after, np.zeros((1, 17)), task, 0.015)[1].item() is wanted


def test_humanoid_by_its_state() -> None:
    env = HumanoidDirEnv()
    env.set_task(np.array([0.7]))
    env.reset(seed=0)

    def centre() -> np.ndarray:
        return np.average(env.data.xipos, axis=0, weights=env.model.body_mass)

    for _ in range(3):
        start = centre()
        _, reward, *_ = env.step(np.full(17, 0.3))
        moved = centre() - start
        forward = 0.25 * (moved[0] * math.cos(0.7) + moved[1] * math.sin(0.7)) / 0.003
        impact = min(0.5e-6 * np.square(env.data.cfrc_ext).sum(), 10)
        assert reward == pytest.approx(forward - 0.1 * 17 * 0.09 - impact + 5)


# ---- tokens


def test_tokens_of_one_environment() -> None:
    env = RL2Wrapper(make(SCRIPTED))
    env.unwrapped.set_task(np.array([2]))
    assert env.observation_space.shape == (7,)
    assert env.reset()[0].tolist() == [1, 0, 7, 0, 0, 0, 0]
    token, reward, terminated, _, _ = env.step(np.array([0.5, -0.25]))
    assert token.tolist() == [1, 1, 7, 0.5, -0.25, 1, 0]
    assert (reward, terminated) == (1.0, False)
    token, _, terminated, _, _ = env.step(np.array([0.0, 1.0]))
    assert token.tolist() == [1, 2, 7, 0, 1, 2, 1]
    assert terminated
    assert env.reset()[0].tolist() == [2, 0, 7, 0, 0, 0, 0]


def test_time_limit_is_no_end_in_tokens() -> None:
    env = RL2Wrapper(make(LIMITED))
    env.reset()
    for t in range(4):
        token, _, terminated, truncated, _ = env.step(np.zeros(2))
        assert token[-1] == 0
        assert (terminated, truncated) == (False, t == 3)


def test_wrapper_and_collect_show_the_same_tokens() -> None:
    torch.manual_seed(0)
    policy = TrMRLPolicy(2, 2, window=3, d_model=8, heads=2, layers=1, d_ff=16)
    vector, task = make_vector("trmrl/PointRobot-v0", 1), np.array([[0.4]])
    trials, _ = collect(policy, vector, task, episodes=2, horizon=6, seeds=starts(0, episodes=2, count=1))
    env = RL2Wrapper(make("trmrl/PointRobot-v0"))
    env.unwrapped.set_task(task[0])
    policy.reset()
    for episode in range(2):
        if episode:
            policy.new_episode()
        token, _ = env.reset()
        for t in range(6):
            np.testing.assert_allclose(trials.tokens[0, episode, t], token, rtol=1e-5, atol=1e-6)
            action = policy.act(torch.from_numpy(token), deterministic=True)
            assert action.shape == (2,)
            token, reward, *_ = env.step(action.numpy())
            assert float(trials.rewards[0, episode, t]) == pytest.approx(reward, rel=1e-5)


# ---- trials


def test_trials_with_early_ends() -> None:
    trials, infos, agent = collected(SCRIPTED, [0, 2, 1])
    assert (trials.size, trials.length) == (30, 10)
    assert tuple(trials.tokens.shape) == (3, 2, 5, 7)
    for episode in range(2):
        assert trials.valid[:, episode].sum(-1).tolist() == [5, 2, 1]
        assert trials.rewards[:, episode].tolist() == [[1, 2, 3, 4, 5], [1, 2, 0, 0, 0], [1, 0, 0, 0, 0]]
        first = trials.tokens[:, episode]
        assert first[:, 0].tolist() == [[episode + 1, 0, 7, 0, 0, 0, 0]] * 3
        assert first[0, 1:].tolist() == [[episode + 1, t, 7, 0.5, -0.25, t, 0] for t in range(1, 5)]
        assert first[1, 1:3, -2:].tolist() == [[1, 0], [2, 1]]  # reward and d
        assert first[1, 2, :3].tolist() == [episode + 1, 2, 7]
        assert first[2, 1].tolist() == [episode + 1, 1, 7, 0.5, -0.25, 1, 1]
    assert not trials.tokens[0, ..., -1].any()
    assert torch.equal(trials.actions, torch.tensor([0.5, -0.25]).expand(3, 2, 5, 2))
    assert trials.tasks.tolist() == [[0], [2], [1]]
    assert infos["success"].shape == (3, 2, 5)
    assert infos["success"][0].tolist() == [[0, 1, 1, 1, 1]] * 2
    assert infos["success"][1, :, :2].tolist() == [[0, 1]] * 2
    shown = torch.stack(agent.tokens, 1).reshape(3, 2, 5, 7)
    assert torch.equal(shown, trials.tokens)


class Two:
    """Of two processes the one that runs here; ``other`` is what the other one brings to a sum."""

    num_processes, device = 2, torch.device("cpu")

    def __init__(self, other: Any) -> None:
        self.other = torch.as_tensor(other, dtype=torch.float32)

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return value + self.other


def test_a_failure_is_everybodys() -> None:
    """Nobody waits for a process that has failed."""

    def broken() -> int:
        raise UserError("NaN here")

    assert on_all(Two(0.0), lambda: 3) == 3  # type: ignore[arg-type]
    with pytest.raises(UserError, match="another process failed"):
        on_all(Two(1.0), lambda: 3)  # type: ignore[arg-type]
    for other in (0.0, 1.0):
        with pytest.raises(UserError, match="NaN here"):
            on_all(Two(other), broken)  # type: ignore[arg-type]


def test_means_over_processes() -> None:
    """Of all that was said at valid steps, however much each process has of it."""
    infos = {"error": np.array([[[1.0, 2.0, 9.0]]]), "success": np.full((1, 1, 3), np.nan)}
    valid = np.array([[[True, True, False]]])
    assert means_of(infos, valid, SimpleNamespace(num_processes=1)) == {"error": 1.5}  # type: ignore[arg-type]
    assert means_of(infos, valid, Two([[6.0, 1.0], [1.0, 2.0]])) == {"error": 3.0, "success": 0.5}  # type: ignore[arg-type]
    assert means_of({}, valid, Two(0.0)) == {}  # type: ignore[arg-type]


def test_agents_are_told_of_episodes() -> None:
    trials, _, agent = collected(SCRIPTED, [0, 2])
    ((count, tasks),) = agent.begun
    assert count == 2
    assert tasks is not None
    assert tasks.tolist() == [[0], [2]]
    (so_far,) = agent.between
    assert so_far is not None
    for part, whole in zip(so_far[:4], trials[:4], strict=True):
        assert torch.equal(part, whole[:, :1])
    assert torch.equal(so_far.tasks, trials.tasks)


def test_ended_environments_are_stepped_no_more() -> None:
    vector = make_vector(SCRIPTED, 2)
    assert isinstance(vector, SyncTaskVectorEnv)
    vector.set_tasks(np.array([[0], [1]]))
    vector.reset(seed=1)
    found = [vector.step(np.zeros((2, 2))) for _ in range(3)]
    assert [env.unwrapped.stepped for env in vector.envs] == [3, 1]
    assert [row[0][1].tolist() for row in found] == [[1, 1, 7]] * 3
    assert [row[1].tolist() for row in found] == [[1, 1], [2, 0], [3, 0]]
    assert [row[2].tolist() for row in found] == [[False, True], [False, False], [False, False]]
    vector.reset()
    assert vector.step(np.zeros((2, 2)))[2].tolist() == [False, True]
    vector.close()


def test_noise() -> None:
    noise = standard_normal(0, 1, shape=(2, 5, 1, 2))
    trials, _, _ = collected(SCRIPTED, [0], noise=noise)
    np.testing.assert_allclose(trials.actions[0], torch.tensor([0.5, -0.25]) + 0.1 * noise[:, :, 0], rtol=1e-5)
    assert torch.equal(trials.tokens[0, :, 1:, 3:5], trials.actions[0, :, :-1])


def test_no_number_for_a_reward() -> None:
    with pytest.raises(UserError, match=r"reward that is no finite number in task 1 \(-1\), episode 1, at step 2"):
        collected(SCRIPTED, [0, NO_REWARD, 0])


def test_no_number_for_an_observation() -> None:
    with pytest.raises(
        UserError, match=r"observation that is no finite number in task 2 \(-2\), episode 0, at the reset"
    ):
        collected(SCRIPTED, [0, 1, NO_START])


def test_time_limit_before_the_horizon() -> None:
    with pytest.raises(UserError, match=r"after 4 steps \(task 1: 0\), the horizon is 6: give --horizon 4"):
        collected(LIMITED, [2, 0], horizon=6)
    for horizon in (3, 4):
        trials, _, _ = collected(LIMITED, [0, 2], horizon=horizon)
        assert trials.valid[0].all()
        assert not trials.tokens[0, ..., -1].any()


def test_end_at_the_time_limit_is_an_end() -> None:
    trials, _, _ = collected(LIMITED, [4, 2], horizon=4)
    assert trials.valid.sum(-1).tolist() == [[4, 4], [2, 2]]


# ---- what is refused


MAKERS = pytest.mark.parametrize("maker", [make, lambda env: make_vector(env, 2)], ids=["make", "make_vector"])


@MAKERS
@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ("trmrl/Nothing-v0", r"--env trmrl/Nothing-v0: .*Here are trmrl/PointRobot-v0, .*module:id"),
        ("no_such_module_of_mine:Nothing-v0", r"No module named 'no_such_module_of_mine'.*module:id"),
        ("Pendulum-v1", r"Pendulum-v1 has no sample_tasks and no set_task: give an environment with sample_tasks"),
        ("CartPole-v1", r"CartPole-v1 has no sample_tasks and no set_task: give an environment with sample_tasks"),
        (":trmrl/PointRobot-v0", r"--env :trmrl/PointRobot-v0"),
        ("trmrl-test/Discrete-v0", r"action_space is Discrete\(3\): give a Box with one dimension"),
        ("trmrl-test/Picture-v0", r"observation_space is Box\(.*: give a Box with one dimension"),
    ],
)
def test_bad_environments(maker: Any, env: str, wanted: str) -> None:
    with pytest.raises(UserError, match=wanted):
        maker(env)


def test_spaces_that_change() -> None:
    vector = make_vector(SCRIPTED, 2)
    vector.set_tasks(np.array([[1], [2]]))
    with pytest.raises(UserError, match=r"observation_space has shape \(4,\) in task \[-3.0\] and \(3,\) in the first"):
        vector.set_tasks(np.array([[1], [WIDER]]))


OWN = """
import gymnasium
from trmrl.env import PointRobotEnv

class Own(PointRobotEnv):
    pass

gymnasium.register("trmrl-test/Own-v0", Own)
"""


def test_module_and_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trmrl_test_own.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    try:
        with pytest.raises(UserError, match="trmrl-test/Own"):
            make("trmrl-test/Own-v0")
        assert type(make("trmrl_test_own:trmrl-test/Own-v0").unwrapped).__name__ == "Own"
        vector = make_vector("trmrl_test_own:trmrl-test/Own-v0", 2)
        assert vector.num_envs == 2
        assert vector.sample_tasks(5, np.random.default_rng(0)).shape == (5, 1)
    finally:
        gym.registry.pop("trmrl-test/Own-v0", None)


@MAKERS
@pytest.mark.parametrize(("env", "extra"), [("trmrl/AntDir-v5", "mujoco"), ("trmrl/ML1-v3", "metaworld")])
def test_missing_packages(maker: Any, env: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    true = importlib.util.find_spec
    found = SimpleNamespace(find_spec=lambda name, *more: None if name == extra else true(name, *more))
    monkeypatch.setattr("trmrl.env.importlib.util", found)
    with pytest.raises(
        UserError, match=rf"{env} needs {extra}, which is not installed: pip install 'metazoo-trmrl\[{extra}\]'"
    ):
        maker(env)
    assert make("trmrl/PointRobot-v0")


# ---- drawings


def test_drawing_of_the_point_robot() -> None:
    env = PointRobotEnv(render_mode="rgb_array")
    env.set_task(np.array([0.0]))
    env.reset()
    before = env.draw(120)
    assert before.shape == (120, 120, 3)
    assert before.dtype == np.uint8
    red, blue = (0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2)
    rows, columns = np.nonzero((before == red).all(-1))
    scale = 120 / 2.6
    assert (rows.mean(), columns.mean()) == pytest.approx((60, 60 + scale), abs=1.5)
    rows, columns = np.nonzero((before == blue).all(-1))
    assert (rows.mean(), columns.mean()) == pytest.approx((60, 60), abs=1.5)
    for _ in range(5):
        env.step(np.array([-1.0, 1.0]))
    after = env.draw(120)
    rows, columns = np.nonzero((after == blue).all(-1))
    assert rows.min() < 60 - 0.5 * scale
    assert columns.min() < 60 - 0.5 * scale
    picture = env.render()
    assert picture is not None
    assert picture.shape == (240, 240, 3)
    assert PointRobotEnv().render() is None


@pytest.mark.parametrize("env", [HalfCheetahVelEnv, AntDirEnv, HumanoidDirEnv])
def test_drawing_of_bodies(env: Any) -> None:
    made = env()
    made.reset(seed=0)
    before = made.draw(100)
    assert before.shape == (100, 100, 3)
    assert before.dtype == np.uint8
    body = (before == (0x00, 0x72, 0xB2)).all(-1)
    assert 0.01 < body.mean() < 0.5
    assert np.abs(np.argwhere(body).mean(0) - 50).max() < 25
    for _ in range(10):
        made.step(np.full(made.action_space.shape, 0.4))
    assert not np.array_equal(made.draw(100), before)


# ---- seeds


def test_seeds_of_places() -> None:
    found = seeds_of(0, 3, 1, count=50)
    assert found == seeds_of(0, 3, 1, count=50)
    assert len(set(found)) == 50
    for other in (seeds_of(0, 3, 2, count=50), seeds_of(0, 4, 1, count=50), seeds_of(1, 3, 1, count=50)):
        assert not set(other) & set(found)
    assert all(type(seed) is int for seed in found)


def test_starts_and_noise_of_places() -> None:
    found = starts(0, 3, episodes=2, count=4)
    assert found.shape == (2, 4)
    assert len(set(found.reshape(-1).tolist())) == 8
    assert np.array_equal(found, starts(0, 3, episodes=2, count=4))
    assert not np.array_equal(found, starts(0, 4, episodes=2, count=4))
    noise = standard_normal(0, 3, shape=(100, 20))
    assert noise.dtype == torch.float32
    assert torch.equal(noise, standard_normal(0, 3, shape=(100, 20)))
    assert not torch.equal(noise, standard_normal(0, 4, shape=(100, 20)))
    assert (float(noise.mean()), float(noise.std())) == pytest.approx((0, 1), abs=0.06)


def test_starts_decide_the_reset() -> None:
    vector = make_vector("trmrl/HalfCheetahVel-v5", 2)
    first, again, other = (vector.reset(seed=seeds)[0] for seeds in ([1, 2], [1, 2], [2, 1]))
    assert np.array_equal(first, again)
    assert np.array_equal(other, first[::-1])
    assert not np.array_equal(first[0], first[1])
    vector.close()
