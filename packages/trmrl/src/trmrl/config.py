"""Settings of a trmrl run: tasks and trials, the policy's memory, PPO, the other meta-learners' own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError
from tyro.conf import Positional

POLICIES = ("trmrl", "rl2", "ppo", "oracle", "varibad")
"""Algorithms whose policy is trained by PPO on whole trials."""


def _at_least(options: object, **least: float) -> None:
    for name, value in least.items():
        if not value <= getattr(options, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give {value} or more")


def _between(options: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give {low:g} to {high:g}")


def _above_zero(options: object, *names: str) -> None:
    for name in names:
        if not 0 < getattr(options, name) < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give a number above 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tasks and trials, the policy's memory, PPO, the other meta-learners' own."""

    algo: Literal["trmrl", "rl2", "ppo", "oracle", "varibad", "maml", "pearl"] = "trmrl"
    """trmrl: a transformer over the last transitions. rl2: a GRU over the whole trial. ppo: the observation alone (no
    memory). oracle: the observation and the task. varibad: a belief over tasks. maml: MAML-TRPO. pearl: PEARL."""
    env: str = "trmrl/PointRobot-v0"
    """Id of a gymnasium environment with `sample_tasks` and `set_task`; `module:id` imports module first."""
    horizon: int = 20
    """Steps of an episode."""
    episodes: int = 2
    """Episodes of a trial: one task, the same memory (rl2, varibad) or none carried over (trmrl)."""
    tasks: int = 40
    """Tasks of an update, each with one trial; over all processes."""
    threads: int = 1
    """Threads that step MuJoCo environments; any number gives the same transitions."""

    window: int = 5
    """Working memories that the transformer sees, K (trmrl)."""
    d_model: int = 32
    """Width of memories (trmrl); of the GRU (rl2, varibad)."""
    heads: int = 4
    """Attention heads (trmrl)."""
    layers: int = 2
    """Encoder layers N (trmrl)."""
    d_ff: int = 128
    """Width of feed-forward parts (trmrl)."""
    norm: Literal["none", "post", "pre"] = "none"
    """LayerNorm in the encoder: none as in the paper, after each residual sum, or before each part."""
    init: Literal["tfixup", "tfixup-original", "xavier"] = "tfixup"
    """tfixup: the paper's, which scales queries and keys, too; tfixup-original: T-Fixup's own; xavier: unscaled."""
    readout: Literal["latest", "mixed", "full"] = "latest"
    """What the heads see: the newest output; it and the newest embedding; the outputs of all places (trmrl)."""
    carry_memory: bool = False
    """Keep the window from one episode of a trial to the next; the paper empties it (trmrl)."""
    mask_reward: bool = False
    """Show no reward to the policy."""
    mask_action: bool = False
    """Show no previous action to the policy."""
    head_hidden: tuple[int, ...] = (64, 64)
    """Hidden layers (tanh) of the policy's head; of the value's; of ppo's and oracle's networks."""
    output_gain: float = 1.0
    """Gain of the Xavier initialisation of the policy's last layer."""
    init_std: float = 0.5
    """Standard deviation of actions at the start; learned."""
    shared_trunk: bool = False
    """Whether the value is read from the policy's memory and trains it, too [else from the newest token alone]."""

    updates: int = 150
    """Updates (the paper's epochs), each on fresh trials."""
    discount: float = 0.9
    """Discount γ."""
    gae_lambda: float = 0.8
    """GAE's λ; advantages run across the episodes of a trial."""
    clip: float = 0.2
    """PPO's ε."""
    lr: float = 1e-3
    """Learning rate of the policy."""
    value_lr: float = 1e-3
    """Learning rate of the value function."""
    weight_decay: float = 0.01
    """Of both AdamW."""
    passes: int = 10
    """Passes over an update's samples: first the policy's, then the value's."""
    minibatch: int = 256
    """Samples of a gradient step; recurrent policies take whole trials, at least one."""
    entropy: float = 0.0
    """Weight of softplus(entropy) in the objective."""
    normalize_advantages: bool = False
    """Whether advantages of an update are standardised; the released commands do not."""
    max_grad_norm: float = 0.0
    """Clip gradients to this norm; 0: not at all, as in the paper."""
    decay_from: int = 0
    """Update at which the learning rate begins to fall."""
    decay_to: int = 0
    """Update at which it has fallen to `decay_floor` of its start; 0: it never falls."""
    decay_floor: float = 0.1
    """Share of the learning rate that is left in the end."""
    decay_value: bool = False
    """Whether the value's learning rate falls, too."""

    inner_lr: float = 0.1
    """Rate of the inner step (maml)."""
    rollouts: int = 10
    """Episodes of a task before its inner step, and as many after it (maml)."""
    inner_discount: float = 0.99
    """Discount of returns (maml)."""
    max_kl: float = 0.01
    """TRPO's trust region (maml)."""
    first_order: bool = False
    """Leave out second derivatives (maml)."""

    latent: int = 5
    """Dimensions of the task's embedding (varibad, pearl)."""
    kl_weight: float = 0.1
    """Weight of the KL divergence from the prior (varibad, pearl)."""
    vae_lr: float = 1e-3
    """Learning rate of encoder and decoder (varibad)."""
    vae_steps: int = 3
    """Gradient steps of encoder and decoder an update (varibad)."""
    vae_trials: int = 1000
    """Recent trials that encoder and decoder learn from (varibad)."""
    decode_state: bool = False
    """Whether the decoder predicts the next observation besides the reward (varibad)."""

    sac_steps: int = 60
    """Gradient steps an update (pearl)."""
    sac_tasks: int = 10
    """Tasks of a gradient step (pearl)."""
    sac_batch: int = 32
    """Transitions of each of them (pearl)."""
    context: int = 64
    """Transitions from which a task's embedding is inferred in training (pearl)."""
    train_tasks: int = 100
    """Tasks drawn once, each with a buffer of its own (pearl)."""
    sac_hidden: int = 128
    """Width of three hidden layers of actor, critics and encoder (pearl)."""
    sac_lr: float = 3e-4
    """Learning rate of all parts (pearl)."""
    reward_scale: float = 5.0
    """Rewards are multiplied by it (pearl)."""
    soft_target: float = 0.005
    """Rate of the target critics' moving average (pearl)."""

    seed: int = 0
    """Of initialisation, tasks, starts and actions."""

    def __post_init__(self) -> None:
        _at_least(
            self, horizon=1, episodes=1, tasks=1, threads=1, window=1, d_model=1, heads=1, layers=1, d_ff=1, updates=0,
            passes=1, minibatch=1, entropy=0, weight_decay=0, max_grad_norm=0, decay_from=0, decay_to=0, rollouts=1,
            latent=1, kl_weight=0, vae_steps=0, vae_trials=1, sac_steps=0, sac_tasks=1, sac_batch=1, context=1,
            train_tasks=1, sac_hidden=1, output_gain=0, seed=0,
        )  # fmt: skip
        _above_zero(
            self, "lr", "value_lr", "clip", "init_std", "inner_lr", "max_kl", "vae_lr", "sac_lr", "reward_scale"
        )
        _between(self, 0, 1, "discount", "gae_lambda", "inner_discount", "decay_floor", "soft_target")
        if self.d_model % self.heads:
            raise UserError(f"--d-model {self.d_model} is no multiple of --heads {self.heads}: change one")
        if self.d_model % 2:
            raise UserError(f"--d-model is {self.d_model}: give an even number, as positions are sines and cosines")
        if any(width < 1 for width in self.head_hidden):
            raise UserError(f"--head-hidden is {' '.join(map(str, self.head_hidden))}: give numbers of 1 or more")
        if self.decay_to and not self.decay_from < self.decay_to < self.updates:
            raise UserError(
                f"--decay-to is {self.decay_to}: give more than --decay-from ({self.decay_from}) and less than "
                f"--updates ({self.updates}), or 0 for a constant rate"
            )
        if self.carry_memory and self.algo != "trmrl":
            raise UserError(f"--carry-memory is for trmrl, not for {self.algo}: leave it out")
        if self.shared_trunk and self.algo not in ("trmrl", "rl2"):
            raise UserError(f"--shared-trunk is for trmrl and rl2, not for {self.algo}: leave it out")

    @property
    def steps(self) -> int:
        """Environment steps of an update, over all processes."""
        if self.algo == "maml":
            return 2 * self.tasks * self.rollouts * self.horizon
        return self.tasks * self.episodes * self.horizon


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Try a trained agent on new tasks."""

    tasks: int = 20
    """Test tasks."""
    episodes: int = 6
    """Episodes on each."""
    split: Literal["test", "ood"] = "test"
    """Tasks of the training distribution, or out of it."""
    stochastic: bool = False
    """Draw actions from the policy instead of taking its mean."""
    seed: int = 1000
    """Of tasks and starts."""
    plots: bool = True
    """Draw returns by episode, rewards by step, and the progress of training."""

    def __post_init__(self) -> None:
        _at_least(self, tasks=1, episodes=1, seed=0)


def _check_run(run: Path) -> None:
    if not (run / "config.json").is_file():
        raise UserError(f"{run} is not a run folder (no config.json): give the --output-dir of `trmrl train`")


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Film a trained agent on a few tasks, beside each other."""

    run: Positional[Path]
    """Run folder."""
    output: Path = Path("agent.gif")
    """.gif, or .mp4 (needs the extra [video])."""
    tasks: int = 3
    """Test tasks, one column each."""
    episodes: int = 2
    """Episodes, one after the other."""
    split: Literal["test", "ood"] = "test"
    """Tasks of the training distribution, or out of it."""
    renderer: Literal["drawn", "gl"] = "drawn"
    """drawn: outlines, which need no graphics library; gl: the environment's own rendering."""
    fps: int = 20
    """Frames a second."""
    seed: int = 1000
    """Of tasks and starts."""

    def __post_init__(self) -> None:
        _at_least(self, tasks=1, episodes=1, fps=1, seed=0)
        if self.output.suffix not in (".gif", ".mp4"):
            raise UserError(f"--output {self.output}: give a name that ends in .gif or .mp4")
        _check_run(self.run)


@dataclass(frozen=True, kw_only=True)
class AttentionOptions:
    """Draw what a trained transformer attends to, and its episodic memories in two dimensions."""

    run: Positional[Path]
    """Run folder of a trmrl agent."""
    output: Path | None = None
    """.png [default: attention.png in the run folder]."""
    tasks: int = 20
    """Test tasks whose memories are shown."""
    seed: int = 1000
    """Of tasks and starts."""

    def __post_init__(self) -> None:
        _at_least(self, tasks=2, seed=0)
        if self.output is not None and self.output.suffix != ".png":
            raise UserError(f"--output {self.output}: give a name that ends in .png")
        _check_run(self.run)


_CHEETAH_VEL = Config(
    env="trmrl/HalfCheetahVel-v5", horizon=200, episodes=2, tasks=20, window=5, d_model=128, heads=16, layers=4,
    d_ff=512, discount=0.9, gae_lambda=0.8, clip=0.1, lr=3e-5, value_lr=2.5e-4, minibatch=256, passes=10,
    init_std=0.2, decay_from=100, decay_to=750, decay_floor=0.1, updates=2500,
)  # fmt: skip
_CHEETAH_DIR = replace(
    _CHEETAH_VEL, env="trmrl/HalfCheetahDir-v5", clip=0.2, value_lr=3e-5, init_std=0.5, decay_to=3700,
    decay_floor=1e-4, decay_value=True, shared_trunk=True, updates=5000,
)  # fmt: skip
_META_WORLD = Config(
    env="trmrl/ML1-reach-v3", horizon=500, episodes=10, tasks=25, window=5, d_model=32, heads=4, layers=4, d_ff=128,
    discount=0.9, gae_lambda=0.95, clip=0.2, lr=5e-5, value_lr=5e-5, minibatch=32, passes=10, init_std=1.0,
    output_gain=0.01, updates=2000,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(normalize_advantages=True, max_grad_norm=0.5, updates=100, decay_from=40, decay_to=99),
    "paper": _CHEETAH_VEL,
    "medium": replace(
        _CHEETAH_VEL,
        d_model=32,
        heads=4,
        layers=2,
        d_ff=128,
        lr=5e-4,
        value_lr=1e-3,
        passes=4,
        minibatch=1000,
        updates=120,
        decay_from=80,
        decay_to=119,
        normalize_advantages=True,
        max_grad_norm=0.5,
    ),
    "paper-cheetah-dir": _CHEETAH_DIR,
    "paper-ant-dir": replace(
        _CHEETAH_DIR, env="trmrl/AntDir-v5", discount=0.92, decay_from=500, decay_to=3500, output_gain=0.01
    ),
    "paper-ml1": _META_WORLD,
    "paper-ml10": replace(_META_WORLD, env="trmrl/ML10-v3", tasks=20),
    "paper-ml45": replace(_META_WORLD, env="trmrl/ML45-v3", tasks=45),
}
"""small: the point robot, minutes on two cores. medium: HalfCheetahVel on two cores. paper…: the released commands; the
epochs of Meta-World are not stated, and neither are ML10's and ML45's tasks: here as often as there are classes."""
