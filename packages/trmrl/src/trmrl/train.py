"""The outer loop: updates on fresh trials, for any of the algorithms."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from metazoo import checkpoint, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions

from trmrl.collect import Agent
from trmrl.config import POLICIES, PRESETS, Config
from trmrl.env import TaskVectorEnv
from trmrl.model import TrMRLPolicy
from trmrl.ppo import PPOLearner


class MetaLearner(loop.Learner, Protocol):
    """What is trained: a learner with an agent to act, and environments of its own."""

    env: TaskVectorEnv

    @property
    def agent(self) -> Agent: ...


@dataclass
class Run:
    """A trained agent, with the rows of metrics.jsonl."""

    folder: Path
    config: Config
    agent: Agent
    metrics: list[dict[str, Any]]


def learner_of(config: Config, accelerator: Accelerator) -> MetaLearner:
    """The learner of an algorithm, before training."""
    if config.algo in POLICIES:
        return PPOLearner(config, accelerator)
    if config.algo == "maml":
        from trmrl.maml import MAMLLearner

        return MAMLLearner(config, accelerator)
    from trmrl.pearl import PEARLLearner

    return PEARLLearner(config, accelerator)


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Train an agent; see :class:`trmrl.config.Config`.

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints, training.png, and of trmrl
        the policy in model/.

    Raises:
        UserError: the environment is not there or breaks the protocol; a number became NaN; the folder is another's.
    """
    options = loop.with_folder(options or RunOptions(), loop.default_folder("trmrl", "small"))
    assert options.output_dir is not None
    accelerator = loop.prepare(options, seed=config.seed)
    main = accelerator.is_main_process
    if main and (options.output_dir / "config.json").exists():
        # what would refuse the folder is said now, before anything is made
        runfolder.RunFolder(options.output_dir, config, resume=options.resume).close()
    learner = learner_of(config, accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=main)
    try:
        metrics = loop.fit(learner, folder, accelerator, steps=config.updates, options=options, name="trmrl")
        run = Run(folder.path, config, learner.agent, metrics)
        if main:
            _finish(run)
    finally:
        folder.close()
        learner.env.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def load(folder: Path | str) -> Run:
    """A finished run from its folder.

    Raises:
        UserError: not a run folder, a run that is not finished, or no good checkpoint.
    """
    path = Path(folder)
    config = runfolder.open_run(path, Config)
    learner = learner_of(config, loop.prepare(RunOptions(), seed=config.seed))
    state = learner.state()
    step = checkpoint.restore(path / "checkpoints", state, say=lambda line: print(line, file=sys.stderr))
    if step < config.updates:
        raise UserError(f"{path} is at update {step} of {config.updates}: finish it with --resume first")
    metrics = path / "metrics.jsonl"
    rows = list(runfolder.read_metrics(metrics)) if metrics.exists() else []
    return Run(path, config, learner.agent, rows)


def _finish(run: Run) -> None:
    """Save the policy, and draw the training."""
    from trmrl import plots

    if isinstance(run.agent, TrMRLPolicy):
        run.agent.save_pretrained(run.folder / "model")
    if run.metrics:
        plots.training(run.metrics, run.folder / "training.png")


if __name__ == "__main__":
    from trmrl.cli import main

    sys.argv[1:1] = ["train"]
    main()
