"""Training: the proximal steps, contributors, gradients over parts and processes, and the run folder."""

from __future__ import annotations

import dataclasses
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo import testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from mixer.baselines import naive_moe, single_expert
from mixer.config import PRESETS, Config
from mixer.train import MixERLearner, Objective, coefficients, load, train, training_data
from safetensors.torch import load_file

SCRIPT = str(Path(__file__).with_name("two_processes.py"))
TINY = Config(
    dataset="odebench-4", every=20, experts=4, context_size=8, width=8, depth=2, contributors=6, outer_steps=5,
    inner_steps=(5, 5), gate_every=2,
)  # fmt: skip


def learner_of(config: Config, **changes: Any) -> MixERLearner:
    config = dataclasses.replace(config, **changes)
    return MixERLearner(config, training_data(config), Accelerator(cpu=True))


@settings(max_examples=30, deadline=None)
@given(losses=st.lists(st.floats(0, 5), min_size=2, max_size=8), reweighting=st.booleans())
def test_coefficients_are_the_gradient_of_the_loss(losses: list[float], reweighting: bool) -> None:
    """Σ c_i ℓ_i with c held fixed has the gradient of Σ w_i ℓ_i, through the softmax weights too."""
    values = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    weights = values.softmax(0) if reweighting else torch.full_like(values, 1 / len(values))
    (weights * values).sum().backward()
    assert values.grad is not None
    assert torch.allclose(coefficients(values.detach(), reweighting), values.grad, atol=1e-12)


def test_proximal_gradient_is_zero_at_the_anchor_and_exact_elsewhere() -> None:
    """Check 7 of the method: (β/2)·mean((θ−θ_old)²) and its gradient vanish at the first inner step."""
    learner = learner_of(TINY)
    tensors = [p.detach().clone().requires_grad_() for p in learner.parameters]
    anchors = [t.detach().clone() for t in tensors]
    learner._pull(tensors, anchors, beta=10.0)
    assert all(not t.grad.any() for t in tensors)
    moved = [t.detach().clone().add_(torch.randn_like(t)).requires_grad_() for t in tensors]
    flat = torch.cat([(m - a).flatten() for m, a in zip(moved, anchors, strict=True)])
    expected = torch.autograd.grad(10.0 / 2 * flat.square().mean(), moved)
    learner._pull(moved, anchors, beta=10.0)
    for tensor, gradient in zip(moved, expected, strict=True):
        assert torch.allclose(tensor.grad, gradient, rtol=1e-5, atol=1e-9)


def test_strong_proximal_term_holds_the_contexts() -> None:
    """β → ∞ keeps Ξ at its anchor up to AdaBelief's first steps; β = 0 lets it go."""
    drift = {}
    for beta in (0.0, 1e8):
        learner = learner_of(TINY, proximal=(beta, 10.0), inner_steps=(30, 0), experts=1, context_size=4)
        for step in range(30):
            learner.step(step)
        drift[beta] = (learner.contexts - learner.context_anchor).abs().mean().item()
    assert drift[1e8] < drift[0.0] / 3


def test_contributors_are_one_environment_and_its_nearest() -> None:
    """The NF rule: the drawn environment is among them, and nobody left out is nearer to it."""
    learner = learner_of(TINY)
    with torch.no_grad():
        learner.contexts.copy_(torch.randn_like(learner.contexts))
    for _ in range(20):
        before = learner.generator.get_state()
        chosen = learner.draw_contributors()
        first = torch.randint(20, (1,), generator=torch.Generator().manual_seed(0).set_state(before))
        distances = (learner.contexts - learner.contexts[first]).abs().mean(1)
        left = torch.tensor([e for e in range(20) if e not in chosen])
        assert first in chosen
        assert len(chosen) == 6
        assert distances[chosen].max() <= distances[left].min()


@pytest.mark.parametrize("reweighting", [False, True])
@pytest.mark.parametrize("taylor_order", [0, 1])
def test_accumulated_gradient_is_the_gradient(reweighting: bool, taylor_order: int) -> None:
    """One part or four: the same gradient of contexts and of the model."""
    found = []
    for parts in (1, 4):
        learner = learner_of(
            TINY, accumulation=parts, self_reweighting=reweighting, taylor_order=taylor_order, pool=2, context_l1=1e-2
        )
        with torch.no_grad():
            learner.contexts.copy_(torch.randn(20, 8, generator=torch.Generator().manual_seed(1)) * 0.1)
        inputs = [learner.contexts, *learner.parameters]
        loss = learner.backward(torch.tensor([0, 3, 7, 11, 13, 19]), inputs)
        found.append([loss, *(p.grad.clone() for p in inputs)])
    for one, many in zip(*found, strict=True):
        assert torch.allclose(one, many, rtol=1e-4, atol=1e-6)


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """Fault 8 over 50 steps: the same contributors, the same routing, losses equal up to float error, no drift."""
    train(TINY, RunOptions(output_dir=tmp_path / "one", log_every=1, checkpoint_every=50))
    testing.torchrun(2, SCRIPT, str(tmp_path / "two"), json.dumps(dataclasses.asdict(TINY)))
    one, two = (testing.rows(tmp_path / name) for name in ("one", "two"))
    assert [row["contributors"] for row in one] == [row["contributors"] for row in two]
    assert [row["route"] for row in one] == [row["route"] for row in two]
    difference = np.array([a["loss"] - b["loss"] for a, b in zip(one, two, strict=True)])
    assert np.abs(difference).max() < 1e-4
    assert abs(difference.mean()) < 1e-5
    assert len(one) == 50


def test_small_preset_learns(tmp_path: Path) -> None:
    """A few rounds of the preset that users run: the loss over all environments falls, every part moves."""
    config = dataclasses.replace(PRESETS["small"], outer_steps=8, width=16, every=10)
    start = learner_of(config)
    run = train(config, RunOptions(output_dir=tmp_path / "run", log_every=1))
    everywhere = torch.arange(20)
    before = start.objective.losses(everywhere, start.contexts).mean()
    after = Objective(config, run.model, run.environments, torch.device("cpu")).losses(everywhere, run.contexts).mean()
    assert after < 0.8 * before
    for (name, before), after in zip(start.model.named_parameters(), run.model.parameters(), strict=True):
        assert not torch.equal(before, after), name
    assert run.contexts.abs().amax(dim=1).min() > 0  # of each environment, in the experts that it was routed to
    for name in ("config.json", "environment.json", "metrics.jsonl", "checkpoints", "model", "training.png"):
        assert (run.folder / name).exists(), name


def test_run_loads_as_it_was(tmp_path: Path) -> None:
    run = train(TINY, RunOptions(output_dir=tmp_path / "run", log_every=10))
    again = load(tmp_path / "run")
    assert torch.equal(run.contexts, again.contexts)
    assert all(torch.equal(a, b) for a, b in zip(run.model.parameters(), again.model.parameters(), strict=True))
    exported = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert exported


@pytest.mark.parametrize("kind", ["ncf", "coda", "geps", "naive", "single", "taylor", "derivative", "paper-kmeans"])
def test_every_kind_trains(kind: str, tmp_path: Path) -> None:
    """Each expert, baseline and ablation runs through the same loop; losses stay finite."""
    config = {
        "ncf": dataclasses.replace(TINY, expert="ncf", intermediate=8),
        "coda": dataclasses.replace(TINY, expert="coda"),
        "geps": TINY,
        "naive": naive_moe(TINY, same_init=False),
        "single": single_expert(TINY),
        "taylor": dataclasses.replace(TINY, taylor_order=2, pool=2),
        "derivative": dataclasses.replace(TINY, objective="derivative", shared_state=True),
        "paper-kmeans": dataclasses.replace(TINY, kmeans_init="paper", crop=0.6),
    }[kind]
    config = dataclasses.replace(config, outer_steps=2)
    told = pytest.warns(UserWarning, match="gate updates were given up") if kind == "paper-kmeans" else nullcontext()
    with told:
        run = train(config, RunOptions(output_dir=tmp_path / "run", log_every=1))
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
    if kind == "naive":
        assert run.gate.accepted == run.gate.aborted == 0


def test_naive_gate_learns_by_gradient() -> None:
    """The baseline is no strawman: its W gets a gradient; in least-squares mode W gets none."""
    naive = learner_of(naive_moe(TINY, same_init=False))
    with torch.no_grad():
        naive.contexts.normal_(generator=torch.Generator().manual_seed(0))
    naive.backward(torch.arange(6), naive.parameters)
    assert naive.model.gate_weight.grad is not None
    assert naive.model.gate_weight.grad.abs().max() > 0
    assert not learner_of(TINY).model.gate_weight.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"experts": 21, "context_size": 42}, "--experts is 21, but odebench-4 has 20 environments"),
        ({"contributors": 21}, "--contributors is 21, but odebench-4 has 20 environments"),
        ({"taylor_order": 1, "pool": 7}, "--pool is 7, but a step has 6 contributors"),
        ({"context_size": 9}, "--context-size 9 cannot be split over --experts 4"),
        ({"inner_steps": (0, 0)}, "--inner-steps"),
        ({"crop": 0.0}, "--crop is 0.0"),
        ({"expert": "shplrnn", "objective": "derivative"}, "--objective derivative needs a vector field"),
    ],
)
def test_configs_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")) as error:
        learner_of(TINY, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.gpu
def test_gpu_takes_the_same_step(tmp_path: Path) -> None:
    """The gradient on CUDA is the CPU's up to float error, and a bf16 run stays finite."""
    grads = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = Accelerator(cpu=cpu)
        learner = MixERLearner(TINY, training_data(TINY), accelerator)
        learner.backward(torch.arange(6, device=accelerator.device), learner.parameters)
        grads.append(torch.cat([p.grad.flatten().cpu() for p in learner.parameters]))
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = dataclasses.replace(TINY, precision="bf16", outer_steps=2)
    run = train(config, RunOptions(output_dir=tmp_path / "run", log_every=1))
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
