"""A trained agent on new tasks: how its return and its behaviour change within an episode and from one to the next."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from scipy.stats import bootstrap
from torch.distributions import Normal

from trmrl.collect import Agent, collect, standard_normal, starts
from trmrl.config import AttentionOptions, EvaluateOptions, VideoOptions
from trmrl.env import Array, Split, SyncTaskVectorEnv, TaskVectorEnv, make_vector
from trmrl.model import Trials, TrMRLPolicy
from trmrl.train import Run, load

SETTLED = 20
"""Steps after which behaviour counts as adapted (Section 6 of the paper: about 20 steps to a target velocity)."""


@dataclass
class Adaptation:
    """Trials of an agent on test tasks.

    Rewards (B, E, T), zero after an episode's end; what the environment said (B, E, T), NaN there; tasks (B, k);
    whether the episode was still going (B, E, T).
    """

    rewards: Array
    infos: dict[str, Array]
    tasks: Array
    valid: Array

    @property
    def returns(self) -> Array:
        """Undiscounted returns (B, E)."""
        return self.rewards.sum(-1)


def evaluate_adaptation(
    agent: Agent, env: TaskVectorEnv, *, episodes: int, horizon: int, split: Split = "test", stochastic: bool = False,
    seed: int = 1000, tasks: Array | None = None, device: torch.device | str | None = None,
) -> Adaptation:  # fmt: skip
    """Let an agent act for several episodes on each of env's tasks, its weights frozen.

    Args:
        agent: a policy, or what adapts between episodes.
        env: one environment a task.
        episodes, horizon: of a trial.
        split: where tasks come from.
        stochastic: draw actions. An agent that must explore before it adapts (MAML's) draws them in any case until
            then: each of its episodes is scored by itself, after as many of exploration as come before it.
        seed: of tasks, starts and actions.
        tasks: (env.num_envs, k) instead of drawn ones.
        device: of the agent [default: where its weights are].
    """
    count = env.num_envs
    device = _device(agent) if device is None else device
    if tasks is None:
        tasks = env.sample_tasks(count, np.random.default_rng([seed, 0]), split)
    explores = hasattr(agent, "explore")
    noise = None
    if stochastic or explores:
        noise = standard_normal(seed, 1, shape=(episodes, horizon, count, env.single_action_space.shape[0]))  # type: ignore[index]
    begin = starts(seed, episodes=episodes, count=count)

    def run(until: int, noise: torch.Tensor | None) -> Adaptation:
        trials, infos = collect(
            agent, env, tasks, episodes=until, horizon=horizon, seeds=begin[:until], noise=noise, device=device
        )
        valid = trials.valid.cpu().numpy()
        said = {name: np.where(valid, value, np.nan) for name, value in infos.items()}
        return Adaptation(trials.rewards.cpu().numpy(), said, tasks, valid)

    if not explores:
        return run(episodes, noise)
    assert noise is not None
    scored, before = [], agent.explore  # type: ignore[attr-defined]
    for episode in range(episodes):  # without noise actions are the means
        agent.explore = episode  # type: ignore[attr-defined]
        last = noise[episode] if stochastic else torch.zeros_like(noise[episode])
        scored.append(run(episode + 1, torch.cat([noise[:episode], last[None]])))
    agent.explore = before  # type: ignore[attr-defined]
    infos = {name: np.stack([found.infos[name][:, -1] for found in scored], 1) for name in scored[-1].infos}
    rewards, valid = (np.stack([getattr(found, part)[:, -1] for found in scored], 1) for part in ("rewards", "valid"))
    return Adaptation(rewards, infos, tasks, valid)


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Try a run's agent on test tasks.

    Returns:
        For each episode e return_e with return_e_low and return_e_high (95 % bootstrap over tasks); where the
        environment reports them, error_settled (mean |v − v*| [m/s] after step 20 of the first episode) and success
        (share of tasks with a success in the last episode). All, with mean rewards by step, goes to evaluation.json.

    Raises:
        UserError: not a run folder, an unfinished run, or no good checkpoint.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    env = make_vector(run.config.env, options.tasks, run.config.threads)
    found = evaluate_adaptation(
        run.agent, env, episodes=options.episodes, horizon=run.config.horizon, split=options.split,
        stochastic=options.stochastic, seed=options.seed, device=_device(run.agent),
    )  # fmt: skip
    env.close()
    summary = summarise(found)
    curves = {"reward": by_step(np.where(found.valid, found.rewards, np.nan))}
    curves |= {name: by_step(found.infos[name]) for name in ("error",) if name in found.infos}
    text = json.dumps(
        {**summary, "split": options.split, "stochastic": options.stochastic, "by_step": curves}, indent=2
    )
    runfolder.write_text(run.folder / "evaluation.json", text + "\n")
    if options.plots:
        from trmrl import plots

        errors = found.infos.get("error", np.where(found.valid, -found.rewards, np.nan))
        plots.adaptation(found.returns, errors, run.folder / "adaptation.png")
    return summary


def by_step(values: Array) -> list[list[float | None]]:
    """Means over tasks of values (B, E, T), NaN where there is none: E lists of T, None where no task has one."""
    there = np.isfinite(values)
    sums, counts = np.where(there, values, 0.0).sum(0), there.sum(0)
    return [
        [float(total / number) if number else None for total, number in zip(*rows, strict=True)]
        for rows in zip(sums, counts, strict=True)
    ]


def settled(found: Adaptation, episode: int) -> float:
    """Mean |v − v*| [m/s] after step 20 of an episode, over the steps of tasks that were still going."""
    errors = found.infos["error"][:, episode, SETTLED:]
    return float(np.nanmean(errors)) if np.isfinite(errors).any() else float("nan")


def summarise(found: Adaptation) -> dict[str, float]:
    """The numbers of :func:`evaluate`."""
    summary: dict[str, float] = {}
    for episode in range(found.rewards.shape[1]):
        values = found.returns[:, episode]
        low, high = interval(values)
        name = f"return_{episode + 1}"
        summary |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    if "error" in found.infos and found.rewards.shape[2] > SETTLED:
        summary["error_settled"] = settled(found, 0)
    if "success" in found.infos and np.isfinite(found.infos["success"]).any():
        summary["success"] = float((np.nan_to_num(found.infos["success"][:, -1]) > 0).any(-1).mean())
    return summary


def interval(values: Array) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean over tasks; a single task's value twice."""
    if len(values) < 2:
        return float(values[0]), float(values[0])
    found = bootstrap((values,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(found.low), float(found.high)


def _device(agent: Agent) -> torch.device:
    if isinstance(agent, torch.nn.Module):
        return next(agent.parameters()).device
    return torch.device("cpu")


# ---- videos


class Filmed(SyncTaskVectorEnv):
    """Environments that are photographed after each reset and step, side by side."""

    def __init__(self, env: str, num_envs: int, gl: bool) -> None:
        super().__init__(env, num_envs, **({"render_mode": "rgb_array"} if gl else {}))
        self.gl, self.frames = gl, list[Array]()
        if not gl and not hasattr(self.envs[0].unwrapped, "draw"):
            raise UserError(f"{env} has no outlines to draw: give --renderer gl")

    def reset(self, **kwargs: Any) -> tuple[Array, dict[str, Any]]:
        found = super().reset(**kwargs)
        self._photograph()
        return found

    def step(self, actions: Array) -> tuple[Array, Array, Array, Array, dict[str, Any]]:
        found = super().step(actions)
        self._photograph()
        return found

    def _photograph(self) -> None:
        try:
            shots = [env.render() if self.gl else env.unwrapped.draw() for env in self.envs]  # type: ignore[attr-defined]
        except Exception as error:  # graphics libraries fail in ways of their own
            raise UserError(
                f"the environment cannot be rendered here ({type(error).__name__}): set MUJOCO_GL=egl or osmesa where "
                "one is installed, or give --renderer drawn"
            ) from error
        self.frames.append(np.concatenate([np.asarray(shot) for shot in shots], 1))


def video(options: VideoOptions) -> str:
    """Film an agent on a few tasks; says where the film is.

    Raises:
        UserError: no finished run; an environment that cannot be drawn; .mp4 without the extra [video].
    """
    if options.output.suffix == ".mp4":
        _av()
    run = load(options.run)
    env = Filmed(run.config.env, options.tasks, options.renderer == "gl")
    found = evaluate_adaptation(
        run.agent, env, episodes=options.episodes, horizon=run.config.horizon, split=options.split, seed=options.seed,
        device=_device(run.agent),
    )  # fmt: skip
    env.close()
    frames = env.frames[-options.episodes * (run.config.horizon + 1) :]  # of the last run, where there are several
    write_video(frames, options.output, options.fps)
    returns = "; ".join(
        f"episode {i + 1}: " + ", ".join(f"{value:.4g}" for value in values) for i, values in enumerate(found.returns.T)
    )
    return f"{options.output}: {len(frames)} frames; returns of the tasks: {returns}"


def write_video(frames: list[Array], path: Path, fps: int) -> None:
    """Write frames (h, w, 3) as .gif (Pillow) or .mp4 (PyAV, H.264)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        from PIL import Image

        images = [Image.fromarray(frame).quantize(32) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
        return
    av = _av()
    with av.open(str(path), "w") as film:
        stream = film.add_stream("h264", rate=fps)
        height, width = (size // 2 * 2 for size in frames[0].shape[:2])  # H.264 wants even sizes
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame[:height, :width]), format="rgb24")
            film.mux(stream.encode(picture))
        film.mux(stream.encode())


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise UserError(
            "an .mp4 needs PyAV: pip install 'metazoo-trmrl[video]' (in the repository: uv pip install "
            "'./packages/trmrl[video]'), or give a name that ends in .gif"
        ) from error
    return av


# ---- what the transformer attends to


class Watched:
    """A policy whose attention and episodic memories are kept, step by step."""

    def __init__(self, policy: TrMRLPolicy) -> None:
        self.policy = policy
        self.maps: list[Array] = []
        self.memories: list[Array] = []

    def reset(self, count: int = 1, tasks: torch.Tensor | None = None) -> None:
        self.policy.reset(count, tasks)

    def new_episode(self, so_far: Trials | None = None) -> None:
        self.policy.new_episode(so_far)

    def step(self, token: torch.Tensor) -> Normal:
        maps: list[torch.Tensor] = []
        memory = self.policy.memory(token, maps)
        newest = torch.stack([one[:, :, -1].mean(1) for one in maps])  # (layers, count, K'), mean over heads
        padded = torch.nn.functional.pad(newest.flip(-1), (0, self.policy.window - newest.shape[-1]))
        self.maps.append(padded.cpu().numpy())  # the newest transition comes first
        self.memories.append(memory.cpu().numpy())
        return self.policy.head(memory)


def attention(options: AttentionOptions) -> str:
    """Draw a transformer's attention by step and its episodic memories; says where the picture is.

    Raises:
        UserError: no finished run, or one without a transformer over a window.
    """
    from trmrl import plots

    run = load(options.run)
    if isinstance(run.agent, TrMRLPolicy) and run.config.algo == "trmrl" and run.agent.window < 2:
        raise UserError(f"{options.run} was trained with --window 1: there is nothing to attend to; give 2 or more")
    if not isinstance(run.agent, TrMRLPolicy) or run.config.algo != "trmrl":
        raise UserError(f"{options.run} was trained by --algo {run.config.algo}: attention is drawn for trmrl only")
    watched = Watched(run.agent)
    env = make_vector(run.config.env, options.tasks, run.config.threads)
    found = evaluate_adaptation(
        watched, env, episodes=1, horizon=run.config.horizon, seed=options.seed, device=_device(run.agent)
    )
    env.close()
    path = options.output or options.run / "attention.png"
    plots.attention(
        np.stack(watched.maps).mean(2).transpose(1, 0, 2), np.stack(watched.memories), found.tasks[:, 0], path
    )
    return f"{path}: attention of each layer by step, and episodic memories of {options.tasks} tasks"
