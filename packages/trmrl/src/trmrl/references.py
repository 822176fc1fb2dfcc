"""What is possible on the point robot, in closed form or by search: floor and ceiling of its returns."""

from __future__ import annotations

import numpy as np

from trmrl.env import PointRobotEnv, Split

GOALS = 64


def goals(split: Split = "test") -> np.ndarray:
    """64 angles (64, 1) on the half-circle, ends included; out of distribution 32 on either arc beside it, which ends a
    third of π away."""
    if split != "ood":
        return np.linspace(0.0, np.pi, GOALS)[:, None]
    beyond = np.linspace(0.0, np.pi / 3, GOALS // 2 + 1)[1:]
    return np.concatenate([-beyond[::-1], np.pi + beyond])[:, None]


def oracle_return(horizon: int = 20, tasks: np.ndarray | None = None) -> float:
    """Mean return of an episode for one that knows the goal: straight to it on each axis."""
    goal = PointRobotEnv.goal(goals() if tasks is None else tasks)
    return _return(goal, goal, horizon)


def memoryless_return(horizon: int = 20) -> float:
    """Mean return of the best point to go to for one that knows nothing of the goal (found on the axis of symmetry)."""
    goal = PointRobotEnv.goal(goals())
    heights = np.linspace(0.0, 1.0, 101)
    return max(_return(np.array([0.0, height]), goal, horizon) for height in heights)


def _return(target: np.ndarray, goal: np.ndarray, horizon: int) -> float:
    place, total = np.zeros_like(goal), np.zeros(len(goal))
    for _ in range(horizon):
        place = PointRobotEnv.move(place, (target - place) / PointRobotEnv.reach)
        total -= np.linalg.norm(place - goal, axis=-1)
    return float(total.mean())


def velocity_score(error: float) -> float:
    """S of target velocities from U(0, 3): 0 for the best single velocity, 1.5 m/s, which is off by 0.75 on average; 1
    for one that runs at each task's own.

    Args:
        error: mean |v − v*| [m/s].
    """
    return 1.0 - error / 0.75


def score(episode_return: float, horizon: int = 20) -> float:
    """S: 0 for the best memoryless behaviour, 1 for the oracle's."""
    floor = memoryless_return(horizon)
    return (episode_return - floor) / (oracle_return(horizon) - floor)
