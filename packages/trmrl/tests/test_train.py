"""Training: every algorithm, two processes, resuming, rates, what is saved, and what a config refuses."""

from __future__ import annotations

import dataclasses
import json
import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from metazoo import checkpoint, testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from trmrl import maml, pearl, plots, ppo
from trmrl import train as training
from trmrl.config import PRESETS, Config
from trmrl.model import TrMRLPolicy
from trmrl.ppo import PPOLearner, rate, share_of_tasks
from trmrl.train import load, train

torch.set_num_threads(1)
SCRIPT = Path(__file__).parent / "two_processes.py"
DRAW = plots.training
ALGORITHMS = ("trmrl", "rl2", "ppo", "oracle", "varibad", "maml", "pearl")
EVERY = pytest.mark.parametrize("algo", ALGORITHMS)
TINY = Config(
    horizon=4, episodes=2, tasks=4, window=3, d_model=8, heads=2, layers=1, d_ff=16, head_hidden=(8,), updates=3,
    passes=2, minibatch=16, rollouts=2, sac_steps=2, sac_hidden=8, sac_batch=4, sac_tasks=2, context=4, train_tasks=6,
    vae_trials=8, vae_steps=2,
)  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "shared-trunk": {"shared_trunk": True},
    "shared-trunk-rl2": {"shared_trunk": True, "algo": "rl2"},
    "carried": {"carry_memory": True, "window": 6},
    "mixed": {"readout": "mixed", "norm": "pre"},
    "full": {"readout": "full", "norm": "post", "init": "xavier"},
    "long-window": {"window": 9, "layers": 2, "init": "tfixup-original"},
    "masked": {"mask_reward": True, "mask_action": True},
    "masked-rl2": {"mask_reward": True, "mask_action": True, "algo": "rl2"},
    "entropy": {"entropy": 0.1, "normalize_advantages": True, "max_grad_norm": 0.5, "output_gain": 0.01},
    "no-remainder": {"minibatch": 7, "tasks": 3},
}


@pytest.fixture(scope="module", autouse=True)
def _undrawn() -> Iterator[None]:
    """The picture of a training takes longer than the training; test_run_folder draws it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plots, "training", lambda rows, path: None)
        yield


def of(algo: str, **changes: Any) -> Config:
    return replace(TINY, algo=algo, **changes)  # type: ignore[arg-type]


def trained(folder: Path, config: Config, *, resume: bool = False, every: int = 1) -> training.Run:
    return train(config, RunOptions(output_dir=folder, log_every=1, checkpoint_every=every, resume=resume))


def learner(config: Config) -> PPOLearner:
    found = training.learner_of(config, Accelerator(cpu=True))
    assert isinstance(found, PPOLearner)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint but the random states."""
    tensors = checkpoint.read_tensors(checkpoint.listing(folder / "checkpoints")[0] / "state.safetensors")
    return {name: value for name, value in tensors.items() if not name.startswith("random.")}


def same(one: Path, other: Path) -> bool:
    held, others = weights(one), weights(other)
    assert held.keys() == others.keys()
    return all(torch.equal(value, others[name]) for name, value in held.items())


class Interrupted(Exception):
    """What ends a run early."""


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Config, last: int) -> None:
    """A run that ends before update ``last``, with a checkpoint of each."""
    real = training.learner_of

    def stopping(config: Config, accelerator: Accelerator) -> Any:
        found: Any = real(config, accelerator)
        held = found.step

        def step(number: int) -> dict[str, Any]:
            if number == last:
                raise Interrupted
            return held(number)  # type: ignore[no-any-return]

        found.step = step
        return found

    with monkeypatch.context() as patch:
        patch.setattr(training, "learner_of", stopping)
        with pytest.raises(Interrupted):
            trained(folder, config)


# ---- algorithms


@EVERY
def test_algorithms(tmp_path: Path, algo: str) -> None:
    """Every algorithm trains: finite rows, other weights after each update; twice the same bits, by its seed."""
    run = trained(tmp_path / "run", of(algo))
    assert [row["step"] for row in run.metrics] == [1, 2, 3]
    for row in run.metrics:
        assert {"return_1", "return_2", "loss"} <= set(row)
        assert all(np.isfinite(value) for value in row.values()), row
        assert -4 * 3 < row["return_1"] < 0  # four steps, at most three or so from the goal
    assert len({row["loss"] for row in run.metrics}) == 3
    torch.manual_seed(7)
    torch.rand(3)
    np.random.rand(3)  # noqa: NPY002
    again = trained(tmp_path / "again", of(algo))
    testing.assert_same_run(tmp_path / "run", tmp_path / "again")
    assert again.metrics == run.metrics
    other = trained(tmp_path / "other", of(algo, seed=1))
    assert not same(tmp_path / "run", tmp_path / "other")
    assert other.metrics[0]["loss"] != run.metrics[0]["loss"]


@EVERY
def test_load(tmp_path: Path, algo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A finished run from its folder: the same rows, and an agent with the same bits that acts.

    Environments of the training are not made for it, but one that tells sizes.
    """
    run = trained(tmp_path / "run", of(algo, updates=2))
    made: list[int] = []
    for module in (ppo, maml, pearl):
        real = module.make_vector
        monkeypatch.setattr(module, "make_vector", lambda env, n, t=1, real=real: made.append(n) or real(env, n, t))
    found = load(tmp_path / "run")
    assert set(made) == {1}
    assert found.metrics == run.metrics
    assert found.config == run.config
    assert found.folder == tmp_path / "run"
    token, task = torch.randn(4, 6), torch.full((4, 1), 0.5)
    said = []
    for agent in (run.agent, found.agent):
        agent.reset(4, task)
        torch.manual_seed(0)
        said.append(torch.cat([agent.step(token + i).mean for i in range(3)]))
    assert torch.isfinite(said[0]).all()
    assert torch.equal(*said)


@EVERY
def test_resumed_is_never_interrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, algo: str) -> None:
    """Weights, optimizers, buffers, random states and rows."""
    trained(tmp_path / "whole", of(algo))
    folder = tmp_path / "stopped"
    interrupted(monkeypatch, folder, of(algo), 1)
    with pytest.raises(UserError, match="stopped is at update 1 of 3: finish it with --resume first"):
        load(folder)
    run = trained(folder, of(algo), resume=True)
    testing.assert_same_run(tmp_path / "whole", folder)
    assert len(run.metrics) == 3


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(tmp_path: Path, name: str) -> None:
    run = trained(tmp_path / "run", replace(TINY, **VARIANTS[name]), every=9)
    assert len(run.metrics) == 3
    assert all(np.isfinite(value) for row in run.metrics for value in row.values())
    assert any(row["kl"] != 0 for row in run.metrics)


def test_returns_rise(tmp_path: Path) -> None:
    """On the point robot, in ten updates."""
    config = replace(
        TINY, horizon=8, tasks=8, updates=10, passes=5, minibatch=32, lr=2e-2, normalize_advantages=True,
        max_grad_norm=0.5,
    )  # fmt: skip
    rows = trained(tmp_path / "run", config, every=100).metrics
    early, late = (np.mean([row["return_1"] for row in part]) for part in (rows[:3], rows[-3:]))
    assert late > early + 0.5


def test_no_updates(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", replace(TINY, updates=0))
    assert not run.metrics
    found = load(tmp_path / "run").agent
    assert isinstance(found, TrMRLPolicy)
    assert isinstance(run.agent, TrMRLPolicy)
    assert all(torch.equal(value, run.agent.state_dict()[name]) for name, value in found.state_dict().items())


def test_mujoco(tmp_path: Path) -> None:
    """Its `error` goes into the row: the mean distance from the target velocity."""
    config = replace(TINY, env="trmrl/HalfCheetahVel-v5", horizon=3, tasks=2, updates=1)
    (row,) = trained(tmp_path / "run", config).metrics
    assert np.isfinite(row["loss"])
    assert 0 < row["error"] < 10
    cost = -row["return_1"] / 3 - row["return_2"] / 3  # of both episodes, −r = |v − v*| + 0.05‖a‖²
    assert row["error"] < cost / 2 < row["error"] + 0.05 * 6 * 25


# ---- run folders


def test_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is in it; model/ is the policy, and acts as it does."""
    monkeypatch.setattr(plots, "training", DRAW)
    run = trained(tmp_path / "run", TINY)
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert {
        "config.json", "environment.json", "metrics.jsonl", "model/config.json", "model/model.safetensors",
        "checkpoints/step-00000002/state.safetensors", "checkpoints/step-00000003/state.safetensors",
    } <= names  # fmt: skip
    assert (run.folder / "training.png").stat().st_size > 1000
    assert json.loads((run.folder / "config.json").read_text())["d_model"] == 8
    assert json.loads((run.folder / "environment.json").read_text())["sessions"][0]["seconds"] > 0
    assert run.metrics == testing.rows(run.folder)
    policy = TrMRLPolicy.load(run.folder / "model")
    assert isinstance(run.agent, TrMRLPolicy)
    policy.reset(5)
    run.agent.reset(5)
    for _ in range(4):
        token = torch.randn(5, 6)
        ours, theirs = run.agent.step(token), policy.step(token)
        assert torch.equal(ours.mean, theirs.mean)
        assert torch.equal(ours.stddev, theirs.stddev)
    assert ours.mean.std() > 0


def test_model_is_trmrls_alone(tmp_path: Path) -> None:
    trained(tmp_path / "run", of("rl2", updates=1))
    assert not (tmp_path / "run" / "model").exists()


def test_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a run folder"):
        load(tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        load(tmp_path / "none")
    assert not list(tmp_path.iterdir())


def test_folders_are_not_overwritten(tmp_path: Path) -> None:
    """Refused before an environment is made; nothing changes."""
    trained(tmp_path / "run", TINY)
    before = testing._contents(tmp_path / "run")
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        trained(tmp_path / "run", TINY)
    with pytest.raises(UserError, match="already holds a run"):
        trained(tmp_path / "run", replace(TINY, env="none/None-v0"))
    with pytest.raises(UserError, match="lr"):
        trained(tmp_path / "run", replace(TINY, lr=0.5), resume=True)
    trained(tmp_path / "run", TINY, resume=True)  # it is finished: nothing to do
    assert testing._contents(tmp_path / "run") == before


def test_no_such_environment_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--env none/None-v0"):
        trained(tmp_path / "run", replace(TINY, env="none/None-v0"))
    assert not list(tmp_path.iterdir())


# ---- rates and norms


def test_rate() -> None:
    """1 until decay_from, then by a constant ratio to decay_floor, then no more."""
    config = replace(TINY, updates=10, decay_from=2, decay_to=6, decay_floor=0.1)
    found = [rate(config, update) for update in range(10)]
    assert found == pytest.approx([1, 1, *(0.1 ** (i / 4) for i in (1, 2, 3, 4)), 0.1, 0.1, 0.1, 0.1])
    assert {rate(replace(config, decay_from=0, decay_to=0), update) for update in range(10)} == {1.0}


@pytest.mark.parametrize("decay_value", [False, True])
def test_rates_of_optimizers(decay_value: bool) -> None:
    """Set before each update's steps; the value's falls only when it is told to."""
    config = replace(TINY, updates=4, decay_from=1, decay_to=3, value_lr=2e-3, decay_value=decay_value)
    one = learner(config)
    seen: dict[str, list[float]] = {"policy": [], "value": []}
    for name, optimizer in (("policy", one.policy_optimizer), ("value", one.value_optimizer)):
        optimizer.register_step_pre_hook(
            lambda optimizer, *args, name=name: seen[name].append(optimizer.param_groups[0]["lr"])
        )
    for update in range(4):
        for held in seen.values():
            held.clear()
        row = one.step(update)
        factor = rate(config, update)
        assert row["lr"] == pytest.approx(1e-3 * factor)
        assert seen["policy"] == pytest.approx([1e-3 * factor] * 4)  # two passes of two minibatches
        assert seen["value"] == pytest.approx([2e-3 * (factor if decay_value else 1)] * 4)


@pytest.mark.parametrize("norm", [0.0, 1e-3])
def test_clipping(norm: float) -> None:
    """AdamW gets gradients of the norm that is allowed; 0: as they are."""
    one = learner(replace(TINY, max_grad_norm=norm))
    seen: list[float] = []

    def note(optimizer: torch.optim.Optimizer, *args: Any) -> None:
        grads = [value.grad for group in optimizer.param_groups for value in group["params"]]
        seen.append(float(torch.cat([grad.flatten() for grad in grads if grad is not None]).norm()))

    for optimizer in (one.policy_optimizer, one.value_optimizer):
        optimizer.register_step_pre_hook(note)
    one.step(0)
    assert len(seen) == 8
    assert seen == [pytest.approx(norm, rel=1e-2)] * 8 if norm else min(seen) > 1e-2


# ---- processes


def test_share_of_tasks() -> None:
    """Contiguous parts, refused where they would not be even."""

    def process(index: int, of: int) -> Any:
        return SimpleNamespace(process_index=index, num_processes=of)

    assert [share_of_tasks(6, process(i, 3)) for i in range(3)] == [range(0, 2), range(2, 4), range(4, 6)]
    assert share_of_tasks(5, process(0, 1)) == range(5)
    with pytest.raises(UserError, match="--tasks is 4, which 3 processes cannot share evenly: give a multiple of it"):
        share_of_tasks(4, process(0, 3))


IN_TWO = {
    "trmrl": of("trmrl", updates=2),
    "odd": of("trmrl", updates=2, minibatch=31),
    "rl2": of("rl2", updates=2),
    "shared": of("trmrl", updates=2, shared_trunk=True, max_grad_norm=0.5, normalize_advantages=True),
    **{algo: of(algo, updates=2) for algo in ("varibad", "maml", "pearl")},
    "one-trial": of("rl2", updates=2, minibatch=8),  # a process has no share of any gradient step
}


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """All of them one after the other, started once: their folders, and what went wrong on the way."""
    root = tmp_path_factory.mktemp("processes")
    jobs = [(str(root / name), dataclasses.asdict(config)) for name, config in IN_TWO.items()]
    try:
        testing.torchrun(2, str(SCRIPT), json.dumps(jobs))
    except AssertionError as error:
        return root, str(error)
    return root, ""


@pytest.mark.parametrize("name", IN_TWO)
def test_two_processes_train_the_same(tmp_path: Path, in_two: tuple[Path, str], name: str) -> None:
    """Weights and rows after two updates are those of one process, for each kind of learner."""
    root, error = in_two
    assert (root / f"{name}.0.npz").exists(), error
    seen = [np.load(root / f"{name}.{rank}.npz") for rank in (0, 1)]
    wanted = runpy.run_path(str(SCRIPT))["trained"](tmp_path / "one", IN_TWO[name])
    assert set(seen[0]) == set(seen[1]) == set(wanted)
    assert wanted
    # ten steps of conjugate gradients on a nearly singular matrix make much of rounding
    close, of_row = (2e-3, 2e-2) if name == "maml" else (1e-5, 1e-3)
    for key, value in wanted.items():
        assert np.array_equal(seen[0][key], seen[1][key]), key  # the processes never part
        np.testing.assert_allclose(seen[0][key], value, rtol=0, atol=close, err_msg=key)
    for row, other in zip(testing.rows(root / name), testing.rows(tmp_path / "one"), strict=True):
        assert row == pytest.approx(other, rel=of_row, abs=close)


# ---- configs

AT_LEAST = {
    1: (
        "horizon", "episodes", "tasks", "threads", "window", "d_model", "heads", "layers", "d_ff", "passes",
        "minibatch", "rollouts", "latent", "vae_trials", "sac_tasks", "sac_batch", "context", "train_tasks",
        "sac_hidden",
    ),
    0: (
        "updates", "entropy", "weight_decay", "max_grad_norm", "decay_from", "decay_to", "kl_weight", "vae_steps",
        "sac_steps", "output_gain",
    ),
}  # fmt: skip
ABOVE_ZERO = ("lr", "value_lr", "clip", "init_std", "inner_lr", "max_kl", "vae_lr", "sac_lr", "reward_scale")
SHARES = ("discount", "gae_lambda", "inner_discount", "decay_floor", "soft_target")
REFUSED: list[tuple[dict[str, Any], str]] = [
    *(({name: least - 1}, f"give {least} or more") for least, names in AT_LEAST.items() for name in names),
    *(({name: value}, "give 0 or more") for name in ("entropy", "kl_weight") for value in (np.nan, np.inf)),
    *(({name: value}, "give a number above 0") for name in ABOVE_ZERO for value in (0.0, -1.0, np.nan, np.inf)),
    *(({name: value}, "give 0 to 1") for name in SHARES for value in (-0.1, 1.1, np.nan)),
    ({"d_model": 30, "heads": 4}, "--d-model 30 is no multiple of --heads 4: change one"),
    ({"d_model": 9, "heads": 3}, "--d-model is 9: give an even number"),
    ({"head_hidden": (8, 0)}, "--head-hidden is 8 0: give numbers of 1 or more"),
    ({"decay_to": 3, "updates": 3}, "--decay-to is 3: give more than --decay-from (0) and less than --updates (3)"),
    ({"decay_to": 2, "decay_from": 2}, "--decay-to is 2: give more than --decay-from (2)"),
    *(
        ({"carry_memory": True, "algo": algo}, f"--carry-memory is for trmrl, not for {algo}: leave it out")
        for algo in ALGORITHMS[1:]
    ),
    *(
        ({"shared_trunk": True, "algo": algo}, f"--shared-trunk is for trmrl and rl2, not for {algo}: leave it out")
        for algo in ALGORITHMS[2:]
    ),
]


@pytest.mark.parametrize(("changes", "says"), REFUSED, ids=[str(changes) for changes, _ in REFUSED])
def test_refused(changes: dict[str, Any], says: str) -> None:
    """The message begins with the option's name, and says what to give."""
    with pytest.raises(UserError) as error:
        replace(TINY, **changes)
    text = str(error.value)
    assert says in text
    assert text.startswith(f"--{next(iter(changes)).replace('_', '-')} ")
    assert "\n" not in text


def test_edges_are_taken() -> None:
    """What lies just inside."""
    Config(
        horizon=1, episodes=1, tasks=1, window=1, d_model=2, heads=1, layers=1, d_ff=1, head_hidden=(), updates=2,
        decay_from=0, decay_to=1, discount=0.0, gae_lambda=1.0, decay_floor=0.0, output_gain=0.0,
    )  # fmt: skip
    replace(TINY, shared_trunk=True, carry_memory=True)
    replace(TINY, shared_trunk=True, algo="rl2")


def test_every_algorithm_is_here() -> None:
    assert set(get_args(get_type_hints(Config)["algo"])) == set(ALGORITHMS)


def test_steps() -> None:
    """Of an update, as they are really taken."""
    assert TINY.steps == 4 * 2 * 4
    assert of("maml").steps == 2 * 4 * 2 * 4
    assert PRESETS["paper"].steps == 20 * 2 * 200
