"""Ids of the environments; ``import trmrl.env`` registers them.

``trmrl/PointRobot-v0``; on MuJoCo ``HalfCheetahVel-v5``, ``HalfCheetahDir-v5``, ``AntDir-v5`` (radians, as released),
``AntDirForwardBackward-v5``, ``AntVel-v5``, ``HumanoidDir-v5``; of Meta-World ``ML1-v3`` (reach; another by
``gymnasium.make("trmrl/ML1-v3", name="door-open")``), ``ML1-push-v3``, ``ML1-pick-place-v3``, ``ML10-v3``, ``ML45-v3``.
"""

from __future__ import annotations

MUJOCO = ("HalfCheetahVel", "HalfCheetahDir", "AntDir", "AntDirForwardBackward", "AntVel", "HumanoidDir")
META_WORLD = ("ML1", "ML1-reach", "ML1-push", "ML1-pick-place", "ML10", "ML45")
NEEDS: dict[str, tuple[str, ...]] = {
    "trmrl/PointRobot-v0": (),
    **{f"trmrl/{name}-v5": ("mujoco",) for name in MUJOCO},
    **{f"trmrl/{name}-v3": ("metaworld",) for name in META_WORLD},
}
"""Id → the packages that it needs beside gymnasium."""


def register() -> None:
    """Register all ids, once."""
    from gymnasium.envs.registration import register as add
    from gymnasium.envs.registration import registry

    for name in NEEDS:
        if name in registry:
            continue
        short = name.removeprefix("trmrl/").rpartition("-")[0]
        if name.endswith("-v0"):
            add(name, "trmrl.env:PointRobotEnv", vector_entry_point="trmrl.env:PointRobotVectorEnv")
        elif name.endswith("-v5"):
            module = "trmrl.mujoco_env"
            add(name, f"{module}:{short}Env", vector_entry_point=f"{module}:{short}VectorEnv")
        else:
            benchmark, _, task = short.partition("-")
            kwargs = {"benchmark": benchmark, **({"name": task} if task else {})}
            add(name, "trmrl.metaworld_env:MetaWorldEnv", kwargs=kwargs)
