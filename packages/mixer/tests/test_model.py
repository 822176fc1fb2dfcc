"""Experts and MixER against one-at-a-time versions, their limits, and the paper's parameter counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import naive
import pytest
import torch
from metazoo.errors import UserError
from mixer.model import CoDAExpert, GEPSExpert, MixER, NCFExpert, widths

KINDS: dict[str, dict[str, Any]] = {
    "geps": {"width": 6, "depth": 3},
    "coda": {"width": 5, "depth": 3},
    "ncf": {"width": 6, "depth": 2, "intermediate": 5, "context_depth": 2, "data_depth": 1},
}


def mixer(kind: str, *, split: bool = True, gate: str = "least-squares", experts: int = 5, **changes: Any) -> MixER:
    """An odd-sized mixture in float64 with different experts and a gate that uses several of them."""
    options = {**KINDS.get(kind, {}), **changes}
    model = MixER(
        expert=kind, state_size=3, context_size=3 * experts, experts=experts, split_context=split, same_init=False,
        gate=gate, seed=1, **options,
    ).double()  # fmt: skip
    with torch.no_grad():
        model.gate_weight.normal_(generator=torch.Generator().manual_seed(5))
        model.stacked[model.names.index("shift")].normal_(0, 0.1, generator=torch.Generator().manual_seed(6))
    return model


def batch(e: int = 7, i: int = 3, t: int = 11, c: int = 15, d: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    times = torch.rand(e, t, generator=generator, dtype=torch.float64).cumsum(1) * 0.1
    x0 = torch.randn(e, i, d, generator=generator, dtype=torch.float64)
    xi = torch.randn(e, c, generator=generator, dtype=torch.float64) * 0.3
    return times, x0, xi


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("gate", ["least-squares", "gradient"])
@pytest.mark.parametrize("kind", list(KINDS))
def test_batched_mixture_is_the_loop_over_experts(kind: str, gate: str, split: bool) -> None:
    """Outputs and the gradients of every weight, context and initial state agree at odd sizes (E=7, I=3, M=5, T=11),
    each environment on its own time grid."""
    model = mixer(kind, split=split, gate=gate)
    times, x0, xi = batch()
    found, gradients = [], []
    for batched in (True, False):
        start, context = x0.clone().requires_grad_(), xi.clone().requires_grad_()
        if batched:
            out = model(times, start, context)
        else:
            out = torch.stack(
                [
                    torch.stack([naive.solve(model, times[e], start[e, i], context[e]) for i in range(3)])
                    for e in range(7)
                ]
            )
        weighted = (out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)).sum()
        wanted = [start, context, *(p for p in model.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(weighted, wanted))
        found.append(out)
    assert len(model.route(xi).unique()) > 1
    assert torch.allclose(found[0], found[1], rtol=1e-10, atol=1e-11)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def test_batched_recurrence_is_the_loop() -> None:
    """The shallow PLRNN: outputs and gradients, with α clipped for some environments and not for others."""
    model = mixer("shplrnn", split=False, hidden=4, alpha_min=0.05)
    xi = batch()[2]
    x = torch.randn(7, 2, 9, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    outs, gradients = [], []
    for batched in (True, False):
        context = xi.clone().requires_grad_()
        if batched:
            out = model.rollout(x, context)
        else:
            out = torch.stack([torch.stack([naive.mixture(model, s, context[e]) for s in x[e]]) for e in range(7)])
        wanted = [context, *(p for p in model.parameters() if p.requires_grad)]
        gradients.append(torch.autograd.grad(out.square().sum(), wanted))
        outs.append(out)
    alphas = model.condition(xi, model.route(xi))[-1]
    assert (alphas == 0.05).any()
    assert (alphas > 0.05).any()
    assert torch.allclose(*outs, rtol=1e-10, atol=1e-12)
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-10)


def count(module: torch.nn.Module) -> int:
    """Parameters without the Swish scalars, their modulation, and the shift: how the paper counts."""
    return sum(p.numel() for n, p in module.named_parameters() if "beta" not in n and n != "shift")


def test_parameter_counts() -> None:
    """Check 8, width 64, depth 3, c = 4, d = 2: root MLP 4482, GEPS 6042, CoDA 22 410, NCF 13 398."""
    geps = GEPSExpert(2, 4, 64, 3, True)
    assert count(geps.root) == 4482
    assert count(geps) == 6042
    coda = CoDAExpert(2, 4, 64, 3, True)
    betas = 2 * 4  # H's rows for the two Swish scalars
    assert count(coda) - betas == 22410
    assert count(NCFExpert(2, 4, 64, 3, True, 32, 1, 1)) == 13398
    assert widths(4, 32, 1) == [4, 12, 32]
    assert widths(2, 32, 1) == [2, 8, 32]


@pytest.mark.parametrize("kind", list(KINDS))
def test_one_expert_is_the_bare_meta_learner(kind: str) -> None:
    """Check 2: with M = 1 the output is the expert's, for any W, to the last bit."""
    model = mixer(kind, experts=1)
    x = torch.randn(7, 3, 3, dtype=torch.float64)
    xi = batch(c=3)[2]
    before = model.vector_field(x, xi)
    own = torch.stack([torch.stack([naive.expert(model, 0, x[e, i], xi[e]) for i in range(3)]) for e in range(7)])
    assert torch.allclose(before, own, rtol=1e-12, atol=1e-13)
    with torch.no_grad():
        model.gate_weight.normal_()
    assert torch.equal(model.vector_field(x, xi), before)


@pytest.mark.parametrize("kind", ["geps", "coda"])
def test_zero_context_is_the_root_network(kind: str) -> None:
    """Check 2: ξ = 0 (and no shift) gives the root MLP."""
    model = mixer(kind)
    with torch.no_grad():
        model.stacked[model.names.index("shift")].zero_()
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    out = model.vector_field(x, torch.zeros(5, 15, dtype=torch.float64), expert=torch.arange(5))
    for m in range(5):
        p = naive.expert_parameters(model, m)
        layers = [(p[f"root.weight.{k}"], p[f"root.bias.{k}"]) for k in range(3)]
        for point in range(4):
            expected = naive.mlp(layers, [p["root.beta.0"], p["root.beta.1"]], x[m, point])
            assert torch.allclose(out[m, point], expected, atol=1e-12)


def test_gradients_reach_only_the_routed_expert_and_its_slice() -> None:
    """Check 3: no gradient to W in least-squares mode, to experts without environments, outside the active slice."""
    model = mixer("geps")
    times, x0, xi = batch()
    xi.requires_grad_()
    route = model.route(xi)
    model(times, x0, xi).square().sum().backward()
    assert model.gate_weight.grad is None
    used = set(route.tolist())
    assert used != set(range(5))
    for name, stack in zip(model.names, model.stacked, strict=True):
        for m in range(5):
            assert bool(stack.grad[m].any()) == (m in used), (name, m)
    slices = model.slices(xi.grad)
    for e in range(7):
        for m in range(5):
            assert bool(slices[e, m].any()) == (m == route[e])


def test_naive_gate_gets_a_gradient() -> None:
    model = mixer("geps", gate="gradient")
    times, x0, xi = batch()
    model(times, x0, xi).square().sum().backward()
    assert model.gate_weight.grad.abs().max() > 0


@pytest.mark.parametrize("kind", list(KINDS))
def test_relabelling_the_experts_changes_nothing(kind: str) -> None:
    """Check 10: permute Θ_m, the context slices and the columns of W together."""
    model, order = mixer(kind), torch.tensor([3, 0, 4, 2, 1])
    times, x0, xi = batch()
    before = model(times, x0, xi)
    with torch.no_grad():
        for stack in model.stacked:
            stack.copy_(stack[order].clone())
        rows = model.gate_weight[:-1].view(5, 3, 5)[order].flatten(0, 1)
        model.gate_weight.copy_(torch.cat([rows, model.gate_weight[-1:]])[:, order])
    moved = xi.view(7, 5, 3)[:, order].flatten(1)
    assert torch.allclose(model(times, x0, moved), before, rtol=1e-10, atol=1e-12)


def test_slices() -> None:
    """Split: the m-th of M equal parts; not split: all of ξ for every expert."""
    xi = torch.arange(12.0).view(2, 6)
    split = MixER(experts=3, context_size=6).slices(xi)
    assert split[1].tolist() == [[6, 7], [8, 9], [10, 11]]
    whole = MixER(experts=3, context_size=6, split_context=False).slices(xi)
    assert whole.shape == (2, 3, 6)
    assert (whole == xi[:, None]).all()


def test_experts_start_alike_or_not() -> None:
    for same in (True, False):
        model = MixER(experts=3, context_size=6, same_init=same)
        stack = model.stacked[model.names.index("root.weight.0")]
        assert torch.equal(stack[0], stack[1]) == same


def test_nothing_is_nan_at_the_start() -> None:
    """ξ = 0, where training and adaptation begin: finite outputs and a gradient that moves ξ, for every expert."""
    for kind in (*KINDS, "shplrnn"):
        model = mixer(kind, split=kind != "shplrnn")
        xi = torch.zeros(4, 15, dtype=torch.float64, requires_grad=True)
        x = torch.randn(4, 2, 5, 3, dtype=torch.float64)
        times = torch.linspace(0, 1, 5, dtype=torch.float64).repeat(4, 1)
        out = model.rollout(x, xi) if kind == "shplrnn" else model(times, x[:, :, 0], xi)
        (out - x).square().sum().backward()
        assert torch.isfinite(out).all()
        assert torch.isfinite(xi.grad).all()
        assert (xi.grad.abs().sum(1) > 0).all()


def test_saved_model_loads_as_it_was(tmp_path: Path) -> None:
    """save_pretrained and from_pretrained, without a network: safetensors and a config.json."""
    model = mixer("coda", split=False, gate="gradient").float()
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix in (".json", ".safetensors")) == [
        "config.json",
        "model.safetensors",
    ]
    again = MixER.from_pretrained(tmp_path)
    times, x0, xi = (value.float() for value in batch())
    assert torch.equal(model(times, x0, xi), again(times, x0, xi))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 3, "context_size": 7}, "context_size 7 cannot be split over 3 experts"),
        ({"expert": "lstm"}, "unknown expert 'lstm'"),
        ({"gate": "softmax"}, "unknown gate 'softmax'"),
        ({"experts": 0}, "experts is 0: give 1 or more"),
        ({"context_size": 0, "split_context": False}, "context_size is 0: give 1 or more"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        MixER(**options)


def test_the_wrong_kind_of_expert_is_refused() -> None:
    """Vector fields have no rollout, sequence experts no trajectories of their own."""
    times, x0, xi = batch()
    with pytest.raises(UserError, match="use rollout"):
        mixer("shplrnn", split=False)(times, x0, xi)
    with pytest.raises(UserError, match="use rollout"):
        mixer("shplrnn", split=False).vector_field(x0, xi)
    with pytest.raises(UserError, match="use forward or vector_field"):
        mixer("geps").rollout(x0[:, :, None], xi)


def test_initialisation_leaves_the_generators_alone() -> None:
    """Weights depend on the seed only, not on the global generator or the default device; that generator goes on."""
    torch.manual_seed(3)
    expected = torch.rand(2)
    one = MixER(seed=4)
    torch.manual_seed(3)
    with torch.device("meta"):
        other = MixER(seed=4)
    assert torch.equal(torch.rand(2), expected)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    weights = one.names.index("root.weight.0")
    assert not torch.equal(one.stacked[weights], MixER(seed=5).stacked[weights])
