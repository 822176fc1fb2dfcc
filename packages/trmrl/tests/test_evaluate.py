"""Trials on test tasks, their numbers and pictures, and that a policy acts alike by each of its ways."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from metazoo.errors import UserError
from PIL import Image
from torch.distributions import Normal
from trmrl import plots
from trmrl.collect import collect, starts
from trmrl.config import Config, EvaluateOptions
from trmrl.env import RL2Wrapper, make_vector
from trmrl.evaluate import (
    SETTLED,
    Adaptation,
    Filmed,
    Watched,
    by_step,
    evaluate,
    evaluate_adaptation,
    interval,
    settled,
    summarise,
)
from trmrl.model import Policy, Sizes, TrMRLPolicy, policy_of
from trmrl.train import Run

torch.set_num_threads(1)
ROBOT = "trmrl/PointRobot-v0"
SIZES = Sizes(2, 2, 1)


def config_of(algo: str = "trmrl", **changes: Any) -> Config:
    sizes: dict[str, Any] = {"horizon": 4, "window": 3, "d_model": 8, "heads": 2, "layers": 2, "d_ff": 16}
    return Config(**{"algo": algo, "head_hidden": (8,), **sizes, **changes})


def policy_for(algo: str = "trmrl", **changes: Any) -> Policy:
    torch.manual_seed(0)
    return policy_of(config_of(algo, **changes), SIZES)


def adapted(agent: Any, count: int = 3, **more: Any) -> Adaptation:
    return evaluate_adaptation(agent, make_vector(ROBOT, count), **{"episodes": 2, "horizon": 4, **more})


# ---- trials


def test_shapes_and_tasks() -> None:
    """Tasks are those of the seed and the split; rewards are those of the point robot."""
    found = adapted(policy_for(), episodes=5)
    assert found.rewards.shape == (3, 5, 4)
    assert found.tasks.shape == (3, 1)
    assert ((found.tasks >= 0) & (found.tasks <= np.pi)).all()
    np.testing.assert_allclose(found.returns, found.rewards.sum(2))
    assert (found.rewards < 0).all()
    assert (abs(found.rewards[:, :, 0] + 1) <= 0.1 * np.sqrt(2) + 1e-6).all()  # one step from the middle of the circle
    np.testing.assert_array_equal(found.rewards[:, 1:], np.repeat(found.rewards[:, 1:2], 4, 1))  # no memory is carried
    np.testing.assert_array_equal(found.rewards[:, 0], found.rewards[:, 1])


def test_seeds_and_splits() -> None:
    policy = policy_for()
    one = adapted(policy)
    again = adapted(policy)
    np.testing.assert_array_equal(one.rewards, again.rewards)
    np.testing.assert_array_equal(one.tasks, again.tasks)
    assert (adapted(policy, seed=1001).tasks != one.tasks).all()
    out = adapted(policy, split="ood")
    assert (np.abs(out.tasks - np.pi / 2) > np.pi / 2).all()
    assert (out.rewards != one.rewards).all()


def test_stochastic() -> None:
    """Noise of the seed on top of the means: other rewards, the same tasks, and the same twice."""
    policy = policy_for()
    mean, one, again = adapted(policy), adapted(policy, stochastic=True), adapted(policy, stochastic=True)
    assert (one.rewards != mean.rewards).all()
    np.testing.assert_array_equal(one.tasks, mean.tasks)
    np.testing.assert_array_equal(one.rewards, again.rewards)
    assert (adapted(policy, stochastic=True, seed=1).rewards != one.rewards).all()


def test_given_tasks() -> None:
    tasks = np.array([[0.0], [1.0], [4.0]])
    found = adapted(policy_for(), tasks=tasks)
    np.testing.assert_array_equal(found.tasks, tasks)
    oracle = adapted(policy_for("oracle"), tasks=tasks)
    assert len(np.unique(oracle.rewards[:, 0, 0].round(6))) == 3


class Explorer:
    """An agent that notes what it is told, and asks for exploration."""

    explore = 1

    def __init__(self) -> None:
        self.said: list[Any] = []
        self.seen: list[Any] = []

    def reset(self, count: int = 1, tasks: torch.Tensor | None = None) -> None:
        self.said.append(("reset", count, self.explore))

    def new_episode(self, so_far: Any = None) -> None:
        self.said.append(("episode", tuple(so_far.rewards.shape), self.explore))
        self.seen.append(so_far.rewards.numpy())

    def step(self, token: torch.Tensor) -> Normal:
        return Normal(torch.zeros(len(token), 2), torch.ones(len(token), 2))


@pytest.mark.parametrize("stochastic", [False, True])
def test_agents_that_explore(stochastic: bool) -> None:
    """Each episode is scored by itself, after as many with drawn actions as come before it."""
    agent = Explorer()
    found = adapted(agent, episodes=3, stochastic=stochastic)
    assert agent.said == [
        ("reset", 3, 0), ("reset", 3, 1), ("episode", (3, 1, 4), 1), ("reset", 3, 2), ("episode", (3, 1, 4), 2),
        ("episode", (3, 2, 4), 2),
    ]  # fmt: skip
    assert agent.explore == 1  # as it was
    assert found.rewards.shape == found.valid.shape == (3, 3, 4)
    assert len(np.unique(found.rewards[0])) == (12 if stochastic else 1)  # else it stays in the middle
    one, again, two = agent.seen
    np.testing.assert_array_equal(one, again)
    np.testing.assert_array_equal(one, two[:, :1])
    assert len(np.unique(two[0])) == 8


@pytest.mark.parametrize(
    ("algo", "changes"),
    [("trmrl", {}), ("trmrl", {"carry_memory": True, "window": 6}), ("rl2", {}), ("ppo", {}), ("varibad", {})],
)
def test_acting_in_one_environment(algo: str, changes: dict[str, Any]) -> None:
    """RL2Wrapper and Policy.act, step by step, give the actions of collect()."""
    policy = policy_for(algo, **changes)
    tasks = np.array([[0.3], [2.0]])
    trials, _ = collect(
        policy, make_vector(ROBOT, 2), tasks, episodes=2, horizon=4, seeds=starts(0, episodes=2, count=2)
    )
    assert trials.actions.std() > 1e-3
    for i, task in enumerate(tasks):
        env = RL2Wrapper(gym.make(ROBOT))
        env.unwrapped.set_task(task)  # type: ignore[attr-defined]
        policy.reset(1)
        for episode in range(2):
            if episode:
                policy.new_episode()
            token, _ = env.reset()
            for step in range(4):
                np.testing.assert_allclose(token, trials.tokens[i, episode, step], atol=1e-6)
                action = policy.act(torch.from_numpy(token), deterministic=True).numpy()
                assert action.shape == (2,)
                np.testing.assert_allclose(action, trials.actions[i, episode, step], atol=1e-5)
                token, reward, terminated, truncated, _ = env.step(action)
                np.testing.assert_allclose(reward, trials.rewards[i, episode, step], atol=1e-5)
                assert not terminated
                assert not truncated
        env.close()


def test_act_draws() -> None:
    """Not deterministic: around the mean, by the standard deviation."""
    policy = policy_for(init_std=0.5)
    torch.manual_seed(1)
    policy.reset(2000)
    drawn = policy.act(torch.zeros(2000, 6))
    policy.reset(2000)
    mean = policy.act(torch.zeros(2000, 6), deterministic=True)
    assert drawn.shape == mean.shape == (2000, 2)
    assert (drawn - mean).std() == pytest.approx(0.5, rel=0.05)
    assert abs(float((drawn - mean).mean())) < 0.05


# ---- numbers


def adaptation(rewards: np.ndarray, infos: dict[str, np.ndarray]) -> Adaptation:
    return Adaptation(rewards, infos, np.zeros((len(rewards), 1)), np.ones(rewards.shape, dtype=bool))


def test_what_comes_after_an_end_is_no_number() -> None:
    """Means are over the steps of those that were still going; where nobody was there is none."""
    error = np.ones((2, 1, SETTLED + 3))
    error[0, :, SETTLED + 1 :], error[1, :, SETTLED + 2 :] = np.nan, np.nan
    error[1, :, SETTLED + 1] = 4.0
    assert settled(adaptation(np.zeros(error.shape), {"error": error}), 0) == pytest.approx((1 + 1 + 4) / 3)
    assert by_step(error)[0][-3:] == [1.0, 4.0, None]
    assert np.isnan(
        settled(adaptation(np.zeros((2, 1, SETTLED + 1)), {"error": np.full((2, 1, SETTLED + 1), np.nan)}), 0)
    )


def test_summarise() -> None:
    rng = np.random.default_rng(0)
    rewards, error = rng.normal(size=(4, 3, 25)), rng.random((4, 3, 25))
    success = np.full((4, 3, 25), np.nan)
    success[0, 2, 7] = 1.0
    success[1, 1, :] = 1.0  # not in the last episode
    success[2, 2, :] = 0.0
    found = summarise(adaptation(rewards, {"error": error, "success": success}))
    names = {f"return_{e}{suffix}" for e in (1, 2, 3) for suffix in ("", "_low", "_high")}
    assert set(found) == names | {"error_settled", "success"}
    for e in range(3):
        assert found[f"return_{e + 1}"] == pytest.approx(rewards[:, e].sum(-1).mean())
        assert found[f"return_{e + 1}_low"] < found[f"return_{e + 1}"] < found[f"return_{e + 1}_high"]
    assert found["error_settled"] == pytest.approx(error[:, 0, 20:].mean())
    assert found["success"] == 0.25


def test_summarise_what_is_not_there() -> None:
    """Too few steps to settle; nobody says whether it was a success."""
    infos = {"error": np.ones((2, 1, SETTLED)), "success": np.full((2, 1, SETTLED), np.nan)}
    assert set(summarise(adaptation(np.zeros((2, 1, SETTLED)), infos))) == {
        "return_1", "return_1_low", "return_1_high"
    }  # fmt: skip
    infos = {"error": np.ones((2, 1, SETTLED + 1))}
    assert summarise(adaptation(np.zeros((2, 1, SETTLED + 1)), infos))["error_settled"] == 1.0


def test_interval() -> None:
    """Of one value; of equal ones; of two (means are 0, ½ or 1); of many it is that of the normal law."""
    assert interval(np.array([3.5])) == (3.5, 3.5)
    assert interval(np.array([2.0, 2.0, 2.0])) == (2.0, 2.0)
    assert interval(np.array([0.0, 1.0])) == (0.0, 1.0)
    values = np.random.default_rng(0).normal(5.0, 2.0, 400)
    low, high = interval(values)
    half = 1.96 * values.std() / 20
    assert (low, high) == (pytest.approx(values.mean() - half, abs=0.03), pytest.approx(values.mean() + half, abs=0.03))
    assert interval(values) == (low, high)


def test_evaluation_file(tmp_path: Path) -> None:
    """What it holds is what evaluate returns, and mean rewards by step; by hand from evaluate_adaptation."""
    policy = policy_for()
    run = Run(tmp_path, config_of(), policy, [])
    options = EvaluateOptions(tasks=3, episodes=2, seed=4, split="ood", stochastic=True)
    found = evaluate(run, options)
    held = json.loads((tmp_path / "evaluation.json").read_text())
    assert held.pop("split") == "ood"
    assert held.pop("stochastic") is True
    steps = held.pop("by_step")
    assert held == found
    wanted = adapted(policy, seed=4, split="ood", stochastic=True)
    assert set(steps) == {"reward"}
    np.testing.assert_allclose(steps["reward"], wanted.rewards.mean(0), rtol=1e-6)
    assert found["return_2"] == pytest.approx(wanted.returns[:, 1].mean())
    check_picture(tmp_path / "adaptation.png")


def test_evaluate_without_plots(tmp_path: Path) -> None:
    evaluate(Run(tmp_path, config_of(), policy_for(), []), EvaluateOptions(tasks=1, episodes=1, plots=False))
    assert [path.name for path in tmp_path.iterdir()] == ["evaluation.json"]
    with pytest.raises(UserError, match="is not a run folder"):
        evaluate(tmp_path)


@pytest.mark.parametrize("name", ["tasks", "episodes"])
def test_options(name: str) -> None:
    with pytest.raises(UserError, match=f"^--{name} is 0: give 1 or more"):
        EvaluateOptions(**{name: 0})


# ---- attention


@pytest.mark.parametrize("changes", [{}, {"readout": "full"}, {"readout": "mixed", "norm": "pre"}])
def test_watched(changes: dict[str, Any]) -> None:
    """The same actions as the policy's own; attention sums to 1 over what is in the window, the newest first."""
    policy = policy_for(**changes)
    assert isinstance(policy, TrMRLPolicy)
    watched = Watched(policy)
    env, tasks = make_vector(ROBOT, 2), np.array([[0.3], [2.0]])
    seeds = starts(0, episodes=2, count=2)
    one, _ = collect(policy, env, tasks, episodes=2, horizon=5, seeds=seeds)
    other, _ = collect(watched, env, tasks, episodes=2, horizon=5, seeds=seeds)
    assert torch.equal(one.actions, other.actions)
    maps = np.stack(watched.maps)  # (steps, layers, tasks, K)
    assert maps.shape == (10, 2, 2, 3)
    np.testing.assert_allclose(maps.sum(-1), 1, atol=1e-6)
    for step in range(10):
        held = min(step % 5 + 1, 3)
        assert (maps[step, ..., :held] > 0).all()
        assert (maps[step, ..., held:] == 0).all()
    assert len(watched.memories) == 10
    np.testing.assert_allclose(
        policy.head(torch.from_numpy(watched.memories[3])).mean.detach(), one.actions[:, 0, 3], atol=1e-6
    )


def test_watched_order() -> None:
    """The first column is the newest transition: with two in the window, the weights are those of encode()."""
    policy = policy_for()
    assert isinstance(policy, TrMRLPolicy)
    watched = Watched(policy)
    tokens = torch.randn(2, 1, 6)
    watched.reset(1)
    with torch.no_grad():
        for token in tokens:
            watched.step(token)
        maps: list[torch.Tensor] = []
        policy.encode(tokens.transpose(0, 1), maps=maps)
    for layer, map_ in enumerate(maps):
        wanted = map_[0, :, -1].mean(0).flip(0)
        np.testing.assert_allclose(watched.maps[-1][layer, 0], [*wanted, 0], atol=1e-6)


# ---- pictures


def check_picture(path: Path) -> None:
    """It is there, and something coloured is in it."""
    with Image.open(path) as picture:
        held = np.asarray(picture.convert("RGB")).astype(int)
    assert min(held.shape[:2]) > 200
    assert ((held.max(-1) - held.min(-1)) > 60).sum() > 20


ROW = {"step": 1, "return_1": -3.0, "return_2": -2.0, "value_loss": 1.0, "kl": 0.01, "std": 0.5, "loss": 0.1}
TRAININGS: dict[str, list[dict[str, Any]]] = {
    "one": [ROW],
    "gaps": [ROW, {"step": 2, "return_1": -1.0, "kl": None}, {**ROW, "step": 3}],
    "many-episodes": [{"step": s, **{f"return_{e}": -s * e for e in range(1, 12)}} for s in (1, 2)],
}


@pytest.mark.parametrize("name", TRAININGS)
def test_training_picture(tmp_path: Path, name: str) -> None:
    plots.training(TRAININGS[name], tmp_path / "a" / "b.png")
    check_picture(tmp_path / "a" / "b.png")


def test_band() -> None:
    """That of evaluate, column by column, of the tasks that have a value; a lone task has no width."""
    values = np.random.default_rng(1).normal(size=(30, 3))
    for column, low, high in zip(values.T, *plots.band(values), strict=True):
        assert (low, high) == pytest.approx(interval(column), abs=0.05)
    gaps = np.concatenate([values, np.full((30, 3), np.nan)])
    low, high = plots.band(gaps)
    assert (low < values.mean(0)).all()
    assert (high > values.mean(0)).all()
    np.testing.assert_allclose(high - low, np.subtract(*plots.band(values)[::-1]), rtol=0.2)
    assert [end.tolist() for end in plots.band(np.array([[1.0, 2.0]]))] == [[1.0, 2.0]] * 2
    assert np.isfinite(plots.band(np.array([[1.0], [np.nan]]))).all()


@pytest.mark.parametrize("shape", [(5, 3, 8), (1, 1, 1)])
def test_adaptation_picture(tmp_path: Path, shape: tuple[int, ...]) -> None:
    rewards = np.random.default_rng(0).normal(size=shape)
    plots.adaptation(rewards.sum(-1), -rewards, tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("layers", "steps", "window", "tasks", "width"),
    [(2, 6, 3, 5, 8), (1, 3, 2, 2, 1), (1, 1, 2, 1, 8)],
)
def test_attention_picture(tmp_path: Path, layers: int, steps: int, window: int, tasks: int, width: int) -> None:
    """Also of one layer, one step, one task, a memory of one number."""
    rng = np.random.default_rng(0)
    maps = rng.dirichlet(np.ones(window), (layers, steps))
    plots.attention(maps, rng.normal(size=(steps, tasks, width)), np.linspace(0, 3, tasks), tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


def test_attention_picture_of_equal_memories(tmp_path: Path) -> None:
    plots.attention(np.ones((1, 2, 1)), np.ones((2, 3, 4)), np.zeros(3), tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("values", "lines"),
    [
        ({"one": [1.0]}, {}),
        ({f"arm {i}": [float(i), i + 1.0] for i in range(9)}, {"top": 1.0, "floor": 0.0}),
    ],
)
def test_picture_by_arm(tmp_path: Path, values: dict[str, list[float]], lines: dict[str, float]) -> None:
    plots.by_arm(values, tmp_path / "a.png", "S", lines)
    check_picture(tmp_path / "a.png")


@pytest.mark.parametrize(("seeds", "points"), [(1, 1), (3, 4)])
def test_picture_of_curves(tmp_path: Path, seeds: int, points: int) -> None:
    rng = np.random.default_rng(0)
    groups = {name: rng.normal(size=(seeds, points)) for name in ("a", "b")}
    x = {name: np.arange(points) * 10 for name in groups}
    plots.curves(groups, x, tmp_path / "a.png", ("steps", "return"))
    check_picture(tmp_path / "a.png")


def test_picture_of_depths(tmp_path: Path) -> None:
    plots.depths({"tfixup": [1.0, 1.1, 1.1, 1.2, 1.2], "xavier": [2.0, 9.0, 70.0, 1e4, 1e8]}, tmp_path / "a.png")
    check_picture(tmp_path / "a.png")


def test_filmed() -> None:
    """A frame after each reset and each step, tasks side by side; what cannot be drawn is refused."""
    env = Filmed(ROBOT, 3, False)
    evaluate_adaptation(policy_for(), env, episodes=2, horizon=4)
    assert len(env.frames) == 10
    assert {frame.shape for frame in env.frames} == {(240, 720, 3)}
    assert not np.array_equal(env.frames[0], env.frames[4])
    np.testing.assert_array_equal(env.frames[0], env.frames[5])  # both at the start
    assert not np.array_equal(env.frames[0][:, :240], env.frames[0][:, 240:480])  # other goals
    env.close()


def test_filmed_when_graphics_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    from trmrl.env import PointRobotEnv

    def broken(self: PointRobotEnv) -> None:
        raise RuntimeError("no display")

    monkeypatch.setattr(PointRobotEnv, "render", broken)
    env = Filmed(ROBOT, 1, True)
    with pytest.raises(UserError, match=r"cannot be rendered here \(RuntimeError\): set MUJOCO_GL=egl"):
        env.reset()
