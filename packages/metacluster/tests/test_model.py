"""Layers against edge-by-edge loops, the two inference paths, networks taken over from elsewhere."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import naive
import pytest
import torch
import torch.nn.functional as F
from metacluster import bases
from metacluster.clustering import attach_meta_learner, compress
from metacluster.edges import ClusteredEdges
from metacluster.model import (
    KAN,
    BatchNorm2d,
    ConvKAN,
    KANConv2d,
    KANLinear,
    from_efficient_kan,
    from_fastkan,
    outside_shares,
)
from metazoo.errors import UserError


@pytest.mark.parametrize("basis", list(bases.BASES))
@pytest.mark.parametrize(("base", "scale", "norm"), [(True, False, False), (False, True, True), (True, True, False)])
def test_linear_is_its_edges(basis: str, base: bool, scale: bool, norm: bool) -> None:
    """Check 2: one matmul = the loop over edges, in value and in every gradient."""
    torch.manual_seed(0)
    layer = KANLinear(4, 3, basis, base=base, scale=scale, norm=norm).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    inputs = [x, *layer.parameters()]
    fast, slow = layer(x), naive.linear(layer, x)
    assert torch.allclose(fast, slow, atol=1e-12)
    upstream = torch.randn_like(fast)
    for a, b in zip(
        torch.autograd.grad(fast, inputs, upstream, allow_unused=True),
        torch.autograd.grad(slow, inputs, upstream, allow_unused=True),
        strict=True,
    ):
        assert (a is None and b is None) or torch.allclose(a, b, atol=1e-10)


@pytest.mark.parametrize("basis", list(bases.BASES))
def test_half_precision_is_as_good_as_its_inputs(basis: str) -> None:
    """In bfloat16 (a model of it, or autocast) outputs are off by bfloat16's own rounding, not by cancelled powers."""
    torch.manual_seed(0)
    layer = KANLinear(64, 32, basis)
    x = torch.randn(50, 64).bfloat16()
    with torch.no_grad():
        exact = layer(x.float())
        with torch.autocast("cpu", torch.bfloat16):
            mixed = layer(x)
        half = copy.deepcopy(layer).bfloat16()(x)
    assert torch.equal(layer.values(x), layer.values(x.float()).bfloat16())
    for found in (mixed, half):
        assert found.dtype == torch.bfloat16
        assert (found.float() - exact).square().mean().sqrt() < 0.01 * exact.std()


@pytest.mark.parametrize("base", [True, False])
def test_second_derivatives_of_a_scaled_layer(base: bool) -> None:
    """The one pass over the gradient can itself be differentiated, as a meta-learner's inner loop does."""
    torch.manual_seed(0)
    layer = KANLinear(3, 2, "rbf", base=base, scale=True).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    names = ("edges.coefficients",)

    def outputs(vectors: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(layer, dict(zip(names, [vectors], strict=True)), (x,))

    vectors = layer.edges.coefficients.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(outputs, (vectors,))
    assert torch.autograd.gradgradcheck(outputs, (vectors,))


@pytest.mark.parametrize("basis", list(bases.BASES))
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups", "kernel"), [(1, 1, 1, 1, 3), (2, 0, 1, 2, (2, 3)), (2, 2, 2, 1, 3)]
)
def test_convolution_is_its_edges(
    basis: str, stride: int, padding: int, dilation: int, groups: int, kernel: Any
) -> None:
    """Strides, padding, dilation, groups: one convolution = the loops over pixels and edges."""
    torch.manual_seed(0)
    layer = KANConv2d(2, 4, kernel, stride, padding, dilation, groups, basis, scale=basis == "rbf").double()
    x = torch.randn(2, 2, 6, 7, dtype=torch.float64)
    assert torch.allclose(layer(x), naive.convolution(layer, x), atol=1e-10)


@pytest.mark.parametrize("k", [1, 3, 5, 16, 100])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (1, 7), (0, 7), (130, 7)])
@pytest.mark.parametrize("norm", [False, True])
def test_clustered_inference_is_dense_inference(k: int, shape: tuple[int, ...], norm: bool) -> None:
    """Check 10: table and blocks (no gradient) = the network with its coefficients written out (gradient)."""
    torch.manual_seed(k)
    model = compress(KAN([7, 197, 5], "bspline", scale=True, norm=norm), k)
    x = torch.randn(shape)
    dense = model(x)
    with torch.no_grad():
        clustered = model(x)
    assert clustered.shape == dense.shape == (*shape[:-1], 5)
    assert torch.allclose(clustered, dense, atol=1e-5)


def test_both_paths_of_clustered_inference_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above would prove less if one path took all cases."""
    calls = []
    original = KANLinear._by_table
    monkeypatch.setattr(KANLinear, "_by_table", lambda self, *args: calls.append(1) or original(self, *args))
    for k, rows in ((6, 32), (6, 31), (7, 32)):
        with torch.no_grad():
            compress(KAN([7, 193], "rbf"), k)(torch.randn(rows, 7))
    assert len(calls) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_clustered_convolution_is_dense(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of some output channels at a time: also when a block is smaller than a group."""
    monkeypatch.setattr("metacluster.model.BLOCK", 300)
    torch.manual_seed(0)
    layer = KANConv2d(4, 6, 3, padding=1, groups=groups, basis="gram")
    model = compress(torch.nn.Sequential(layer), 9)
    x = torch.randn(2, 4, 5, 5)
    dense = model(x)
    with torch.no_grad():
        assert torch.allclose(model(x), dense, atol=1e-5)


def test_parameter_counts() -> None:
    """Check 9: 784-32-10 with ten numbers an edge, and MetaKAN with 32 and 16 hidden units."""

    def count(model: torch.nn.Module) -> int:
        return sum(p.numel() for p in model.parameters())

    assert count(KAN([784, 32, 10], scale=True)) == 254_080
    assert count(attach_meta_learner(KAN([784, 32, 10]), 1, 32)) == 26_130
    assert count(attach_meta_learner(KAN([784, 32, 10]), 1, 16)) == 25_778


def test_efficient_kan_is_taken_over() -> None:
    """A state dict with its names and its layout gives its formula's output."""
    torch.manual_seed(0)
    sizes, state = [4, 3, 2], {}
    for n, (i, o) in enumerate(itertools.pairwise(sizes)):
        state[f"layers.{n}.base_weight"] = torch.randn(o, i)
        state[f"layers.{n}.spline_weight"] = torch.randn(o, i, 8)
        state[f"layers.{n}.spline_scaler"] = torch.randn(o, i)
        state[f"layers.{n}.grid"] = (torch.arange(-3, 9) * 0.4 - 1).expand(i, -1).contiguous()
    x = torch.rand(6, 4) * 2 - 1
    y = x
    for n in range(2):
        flat = y.flatten().double().numpy()
        values = torch.tensor(naive.cox_de_boor(flat, 5, 3, -1, 1)).float().view(*y.shape, 8)
        weight = state[f"layers.{n}.spline_weight"] * state[f"layers.{n}.spline_scaler"].unsqueeze(-1)
        y = F.silu(y) @ state[f"layers.{n}.base_weight"].T + torch.einsum("big,oig->bo", values, weight)
    model = from_efficient_kan(state)
    assert torch.allclose(model(x), y, atol=1e-4)
    moved = {**state, "layers.1.grid": state["layers.1.grid"] ** 3}
    with pytest.raises(UserError, match=r"layers\.1\.grid is not uniform"):
        from_efficient_kan(moved)
    with pytest.raises(UserError, match=r"no layers\.0\.base_weight"):
        from_efficient_kan({"weight": torch.zeros(1)})
    with pytest.raises(UserError, match="not order 2"):
        from_efficient_kan(state, order=2)


def test_a_network_taken_over_saves_its_own_grid(tmp_path: Any) -> None:
    """Grid and range of the other network, not the defaults, are in the hub's config."""
    torch.manual_seed(0)
    state = {
        "layers.0.base_weight": torch.randn(3, 4),
        "layers.0.spline_weight": torch.randn(3, 4, 10),
        "layers.0.grid": (torch.arange(-3, 11) * 0.8 - 3).expand(4, -1).contiguous(),
    }
    model = from_efficient_kan(state)
    model.save_pretrained(tmp_path)
    x = torch.randn(5, 4)
    assert torch.equal(KAN.from_pretrained(tmp_path)(x), model(x))


def test_batch_norm_of_one_process_among_processes_is_torchs(tmp_path: Any) -> None:
    """The distributed arithmetic gives torch's outputs, gradients and statistics, far from 0 and in bfloat16 too."""
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        for dtype, offset, atol in (
            (torch.float32, 0.0, 1e-5),
            (torch.float32, 1e3, 1e-2),
            (torch.bfloat16, 0.0, 5e-2),
        ):
            torch.manual_seed(0)
            values = (torch.randn(6, 3, 4, 4) + offset).to(dtype)
            ours, torchs = BatchNorm2d(3), torch.nn.BatchNorm2d(3)
            found = []
            for layer in (ours, torchs):
                x = values.clone().requires_grad_()
                y = layer(x)
                assert y.dtype == dtype
                (y * torch.arange(4)).square().sum().backward()
                found.append([y.float(), x.grad.float() / x.grad.float().std(), layer.running_mean, layer.running_var])
            for a, b in zip(*found, strict=True):
                assert torch.allclose(a, b, atol=atol, rtol=1e-2)
    finally:
        torch.distributed.destroy_process_group()


def test_fastkan_is_taken_over() -> None:
    """LayerNorm, radial functions, base weight and bias by its formula."""
    torch.manual_seed(0)
    state = {
        "layers.0.layernorm.weight": torch.randn(4),
        "layers.0.layernorm.bias": torch.randn(4),
        "layers.0.rbf.grid": torch.linspace(-2, 2, 8),
        "layers.0.spline_linear.weight": torch.randn(3, 32),
        "layers.0.base_linear.weight": torch.randn(3, 4),
        "layers.0.base_linear.bias": torch.randn(3),
    }
    x = torch.randn(5, 4)
    normed = F.layer_norm(x, (4,), state["layers.0.layernorm.weight"], state["layers.0.layernorm.bias"])
    values = torch.exp(-(((normed[..., None] - state["layers.0.rbf.grid"]) / (4 / 7)) ** 2)).flatten(1)
    expected = values @ state["layers.0.spline_linear.weight"].T + F.linear(
        F.silu(x), state["layers.0.base_linear.weight"], state["layers.0.base_linear.bias"]
    )
    assert torch.allclose(from_fastkan(state)(x), expected, atol=1e-5)


def test_layers_have_betas_of_their_own() -> None:
    """Gram's learned factors are not shared among layers, whichever way the basis was given."""
    model = KAN([3, 4, 2], bases.Gram(2))
    first, second = (layer.basis for layer in model.layers)
    assert first.beta is not second.beta


def test_networks_save_and_load_in_the_hubs_way(tmp_path: Any) -> None:
    x = torch.randn(3, 5)
    model = KAN([5, 4, 2], {"name": "rbf", "centres": 5}, norm=True, affine=False)
    model.save_pretrained(tmp_path / "kan")
    assert torch.equal(KAN.from_pretrained(tmp_path / "kan")(x), model(x))
    images = torch.randn(2, 3, 8, 8)
    conv = ConvKAN(3, 4, (4, 5), (1, 2)).eval()
    conv.save_pretrained(tmp_path / "conv")
    assert torch.equal(ConvKAN.from_pretrained(tmp_path / "conv").eval()(images), conv(images))


def test_start_has_unit_scale() -> None:
    """Coefficients N(0, 1/I) directly or emitted: activations neither vanish nor explode with the number of inputs."""
    for inputs in (20, 500):
        for meta in (False, True):
            torch.manual_seed(0)
            model = KAN([inputs, 100], "rbf")
            if meta:
                attach_meta_learner(model)
            assert 0.2 < model(torch.randn(200, inputs)).std() < 3


def test_outside_shares() -> None:
    """Half of the inputs beyond the grid: 0.5 for the first layer."""
    x = torch.tensor([[0.0, 2.0], [-2.0, 0.5]])
    assert outside_shares(KAN([2, 3]), x) == {"layers.0": 0.5}


def test_copies_and_half_precision() -> None:
    """A deep copy is its own; a clustered network in double gives the same through the block path."""
    model = compress(KAN([7, 49], "rbf"), 8)
    other = copy.deepcopy(model).double()
    assert isinstance(other.layers[0].edges, ClusteredEdges)
    x = torch.randn(4, 7)
    with torch.no_grad():
        assert torch.allclose(other(x.double()).float(), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: KANLinear(0, 3), "0 inputs"),
        (lambda: KAN([5]), "sizes"),
        (lambda: KANConv2d(3, 4, groups=2), "groups must divide"),
        (lambda: KANConv2d(3, 4, padding=(1, 1)), r"padding is \(1, 1\)"),
        (lambda: KANConv2d(3, 4, stride=0), "stride is 0"),
        (lambda: KANConv2d(3, 4, 0), "kernel_size"),
        (lambda: ConvKAN(3, 10, (4, 4), (1,)), "one stride"),
        (lambda: KANLinear(3, 2)(torch.zeros(4, 5)), r"\[\.\.\., 3\]"),
        (lambda: KANConv2d(3, 2)(torch.zeros(4, 1, 8, 8)), r"\[B, 3, height, width\]"),
        (lambda: KANConv2d(3, 2)(torch.zeros(3, 8, 8)), r"\[B, 3, height, width\]"),
        (lambda: KANConv2d(3, 2, 5)(torch.zeros(4, 3, 3, 8)), "smaller than the kernel"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)
