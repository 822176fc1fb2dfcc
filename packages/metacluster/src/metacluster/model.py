"""KAN layers and networks. A layer computes y_o = Σ_i [w^b_oi SiLU(x_i) + Σ_g c_oig B_g(x_i)].

Shapes: B batch, I inputs, O outputs, E edges (O·I; of a convolution O·I·kh·kw), G basis functions, K centroids,
W = |w| numbers of an edge: [G coefficients | base weight | scale], the last two where the layer has them.

All edges share the basis, so its G values are computed once per input and multiplied by one matrix (Blealtan's
efficient-kan). Where the coefficients come from is the business of ``layer.edges`` (edges.py).
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from metazoo.errors import UserError
from torch import nn
from torch.utils.checkpoint import checkpoint

from metacluster import bases
from metacluster.bases import Basis, BSpline, GaussianRBF
from metacluster.edges import ClusteredEdges, DirectEdges, Edges

BLOCK = 1 << 19  # numbers of a clustered layer's weights that exist at once


class _Scaled(torch.autograd.Function):
    """Vectors [..., G + base + 1] -> coefficients times scale [..., G], base weights [..., base].

    In ordinary autograd the gradient is written three times, which shows in small batches.
    """

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.save_for_backward(vectors)
        ctx.size = size
        return vectors[..., :size] * vectors[..., -1:], vectors[..., size:-1].clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        (vectors,), (spline, base), size = ctx.saved_tensors, grads, ctx.size
        if torch.is_grad_enabled():  # a second derivative is wanted
            scale = (spline * vectors[..., :size]).sum(-1, keepdim=True)
            return torch.cat([spline * vectors[..., -1:], base, scale], -1), None
        total = torch.empty_like(vectors)
        torch.mul(spline, vectors[..., -1:], out=total[..., :size])
        total[..., size:-1] = base
        total[..., -1] = torch.einsum("...g,...g->...", spline, vectors[..., :size])
        return total, None


class _Layer(nn.Module, ABC):
    """What linear and convolutional layers share: the basis, the edges, and the layout of an edge's vector."""

    edges: Edges

    def __init__(
        self, count: int, fan_in: int, basis: str | Mapping[str, Any] | Basis, base: bool, scale: bool
    ) -> None:
        super().__init__()
        self.basis = bases.make(basis)
        self.base, self.scale, self.fan_in, self.count = base, scale, fan_in, count
        self.vector_size = self.basis.size + base + scale
        self.recompute = False  # basis functions again in the backward pass, instead of keeping them
        mean, spread = self.start()
        self.edges = DirectEdges(mean + spread * torch.randn(count, self.vector_size))

    def start(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation [W] of an edge's numbers before training: N(0, 1/fan_in), scales near 1."""
        mean, spread = torch.zeros(self.vector_size), torch.full((self.vector_size,), self.fan_in**-0.5)
        if self.scale:
            mean[-1], spread[-1] = 1.0, 0.0
        return mean, spread

    def effective(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Vectors [..., W] -> what multiplies the basis [..., G] (scaled), and the base weight [...]."""
        if self.scale:
            spline, base = _Scaled.apply(vectors, self.basis.size)
        else:  # one split, whose backward pass is one concatenation
            spline, base = vectors.split([self.basis.size, int(self.base)], -1)
        return spline, base.squeeze(-1) if self.base else None

    def values(self, x: torch.Tensor, dim: int = -1) -> torch.Tensor:
        """The basis at x, worked out in float32 where x is less precise: the powers of splines nearly cancel."""
        if x.dtype in (torch.bfloat16, torch.float16):
            return self.basis(x.float(), dim).to(x.dtype)  # type: ignore[no-any-return]
        return self.basis(x, dim)  # type: ignore[no-any-return]

    @abstractmethod
    def outside_share(self, x: torch.Tensor) -> float:
        """Share of the inputs x that leave the range on which the basis is meant. (A norm comes first.)"""

    def _kept(self, function: Any, *args: Any) -> torch.Tensor:
        """function(*args), with what it computes kept for the backward pass or, with ``recompute``, not."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return function(*args)  # type: ignore[no-any-return]


class KANLinear(_Layer):
    """A fully connected KAN layer; edge e = o·I + i.

    An input outside the range of a B-spline meets fewer splines, and beyond order·h of it the base term alone, as in
    efficient-kan; :func:`outside_shares` counts the inputs outside.

    Args:
        in_features: I. out_features: O.
        basis: a name (see bases.BASES), its settings {"name": "bspline", "grid": 8}, or a module of bases.py.
        base: add w^b·SiLU(x). scale: one more number an edge, which multiplies its coefficients (efficient-kan).
        norm: the basis takes LayerNorm(x), the base term x itself (FastKAN). affine: the norm has a learned gain and
            shift for each input (they stay dense; without them nothing does).

    Raises:
        UserError: no inputs or outputs, or a basis without functions.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        basis: str | Mapping[str, Any] | Basis = "bspline",
        *,
        base: bool = True,
        scale: bool = False,
        norm: bool = False,
        affine: bool = True,
    ) -> None:
        if in_features < 1 or out_features < 1:
            raise UserError(f"a layer of {in_features} inputs and {out_features} outputs: give 1 or more of each")
        super().__init__(in_features * out_features, in_features, basis, base, scale)
        self.in_features, self.out_features = in_features, out_features
        self.norm = nn.LayerNorm(in_features, elementwise_affine=affine) if norm else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O].

        Raises:
            UserError: another number of inputs.
        """
        if x.shape[-1:] != (self.in_features,):
            raise UserError(f"input of shape {list(x.shape)}: the layer takes [..., {self.in_features}]")
        rows = x.reshape(-1, self.in_features)
        if isinstance(self.edges, ClusteredEdges) and not torch.is_grad_enabled():
            y = self._clustered(rows, self.edges)
        else:
            y = self._kept(self._dense, rows, self.edges())
        return y.view(*x.shape[:-1], self.out_features)

    def _dense(self, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """[B, I], coefficients [E, W] -> [B, O]."""
        spline, base = self.effective(vectors)
        inputs = x if self.norm is None else self.norm(x)
        y = F.linear(self.values(inputs).flatten(1), spline.reshape(self.out_features, -1))
        return y if base is None else y + F.linear(F.silu(x), base.reshape(self.out_features, self.in_features))

    def _clustered(self, x: torch.Tensor, edges: ClusteredEdges) -> torch.Tensor:
        """The same from the codebook and packed indices, a block of outputs at a time; no gradient."""
        inputs = x if self.norm is None else self.norm(x)
        spline, base = self.effective(edges.codebook)
        many = 32 * len(edges.codebook) <= self.out_features and len(x) >= 32
        if many and x.dtype == torch.float32 and not torch.is_autocast_enabled(x.device.type):
            return self._by_table(x, inputs, edges, spline, base)
        features = self.values(inputs).flatten(1)  # [B, I·G]
        activated = F.silu(x)
        step = max(1, BLOCK // (self.in_features * self.basis.size))
        parts = []
        for first in range(0, self.out_features, step):
            last = min(first + step, self.out_features)
            chosen = edges.indices(first * self.in_features, last * self.in_features)
            part = F.linear(features, F.embedding(chosen, spline).view(last - first, -1))
            if base is not None:
                part += F.linear(activated, base.index_select(0, chosen).view(last - first, -1))
            parts.append(part)
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def _by_table(
        self,
        x: torch.Tensor,
        inputs: torch.Tensor,
        edges: ClusteredEdges,
        spline: torch.Tensor,
        base: torch.Tensor | None,
    ) -> torch.Tensor:
        """Few centroids: evaluate all K curves at every input, then add up one of them per edge.

        y_o = Σ_i f_{a(o,i)}(x_i): I·K·G multiplications and E additions per example, where a dense layer has E·G
        multiplications. No weight matrix exists.
        """
        k, n, o = len(edges.codebook), self.in_features, self.out_features
        y = x.new_empty(o, len(x))
        step = max(1, BLOCK // n)
        rows = max(32, (1 << 20) // (n * k))  # the table of a block of examples stays in the cache
        offset = torch.arange(0, n * k, k, device=x.device)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            table = torch.matmul(spline, self.values(inputs[part].T.contiguous(), dim=1))  # [I, K, B]
            if base is not None:
                table.addcmul_(base[:, None], F.silu(x[part].T)[:, None, :])
            for first in range(0, o, step):
                last = min(first + step, o)
                chosen = edges.indices(first * n, last * n).view(-1, n) + offset
                y[first:last, part] = F.embedding_bag(chosen, table.flatten(0, 1), mode="sum")
        return y.T.contiguous()

    def outside_share(self, x: torch.Tensor) -> float:
        if x.numel() == 0:
            return 0.0
        return self.basis.outside(x if self.norm is None else self.norm(x)).float().mean().item()


class KANConv2d(_Layer):
    """A convolution whose kernel has a curve at each position; edge e = ((o·I/groups + i)·kh + ky)·kw + kx.

    The basis is evaluated at every pixel, then the maps are padded with zeros: outside the image a curve gives 0 (as in
    torch-conv-kan).

    Args:
        in_channels: I. out_channels: O. kernel_size: kh = kw, or both. stride, padding, dilation: one whole number for
            both directions. groups: as Conv2d.
        basis, base, scale: as :class:`KANLinear`.

    Raises:
        UserError: channels that groups do not divide, or a basis without functions.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int] = 3,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        basis: str | Mapping[str, Any] | Basis = "bspline",
        *,
        base: bool = True,
        scale: bool = False,
    ) -> None:
        if min(in_channels, out_channels, groups) < 1 or in_channels % groups or out_channels % groups:
            raise UserError(
                f"{in_channels} input and {out_channels} output channels in {groups} groups: groups must divide both"
            )
        kernel = (kernel_size, kernel_size) if isinstance(kernel_size, int) else tuple(kernel_size)
        sizes = [(f"kernel_size {kernel}", min(kernel), 1), ("stride", stride, 1), ("dilation", dilation, 1)]
        for what, value, least in [*sizes, ("padding", padding, 0)]:
            if not isinstance(value, int) or value < least:
                raise UserError(f"{what} is {value!r}: give a whole number of {least} or more, for both directions")
        fan_in = in_channels // groups * math.prod(kernel)
        super().__init__(out_channels * fan_in, fan_in, basis, base, scale)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, kernel
        self.stride, self.padding, self.dilation, self.groups = stride, padding, dilation, groups

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, I, height, width] -> [B, O, height', width'].

        Raises:
            UserError: no image, another number of channels, or an image smaller than the kernel.
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise UserError(f"images of shape {list(x.shape)}: the layer takes [B, {self.in_channels}, height, width]")
        for length, kernel in zip(x.shape[2:], self.kernel_size, strict=True):
            if length + 2 * self.padding < self.dilation * (kernel - 1) + 1:
                raise UserError(f"images of {list(x.shape[2:])} pixels are smaller than the kernel {self.kernel_size}")
        if isinstance(self.edges, ClusteredEdges) and not torch.is_grad_enabled():
            return self._clustered(x, self.edges)
        return self._kept(self._dense, x, self.edges())

    def _convolve(self, maps: torch.Tensor, weight: torch.Tensor, groups: int) -> torch.Tensor:
        return F.conv2d(maps, weight, None, self.stride, self.padding, self.dilation, groups)

    def _kernels(self, vectors: torch.Tensor, out_channels: int) -> torch.Tensor:
        """Vectors [E', W] of some whole output channels -> kernels [O', (G + base)·(I/groups), kh, kw]."""
        spline, base = self.effective(vectors)
        parts = spline if base is None else torch.cat([spline, base.unsqueeze(-1)], -1)
        shape = (out_channels, self.in_channels // self.groups, *self.kernel_size, parts.shape[-1])
        return parts.view(shape).permute(0, 2, 3, 4, 1).flatten(3).permute(0, 3, 1, 2)

    def _maps(self, x: torch.Tensor) -> torch.Tensor:
        """Basis functions and SiLU of each channel: [B, groups·(G + base)·(I/groups), height, width].

        Channels are last in memory: on a CPU the convolution and its gradient then take half to three quarters of
        the time.
        """
        pixels = x.permute(0, 2, 3, 1).contiguous().unflatten(3, (self.groups, -1))
        maps = self.values(pixels, dim=-2)
        if self.base:
            maps = torch.cat([maps, F.silu(pixels).unsqueeze(-2)], -2)
        return maps.flatten(3).permute(0, 3, 1, 2)  # type: ignore[no-any-return]

    def _dense(self, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        return self._convolve(self._maps(x), self._kernels(vectors, self.out_channels), self.groups)

    def _clustered(self, x: torch.Tensor, edges: ClusteredEdges) -> torch.Tensor:
        """The same with the kernels of a block of output channels at a time; no gradient."""
        maps = self._maps(x)
        per_channel = self.fan_in
        per_group = self.out_channels // self.groups
        step = min(per_group, max(1, BLOCK // (per_channel * self.vector_size)))
        parts = []
        for group, group_maps in enumerate(maps.chunk(self.groups, 1)):
            for first in range(group * per_group, (group + 1) * per_group, step):
                last = min(first + step, (group + 1) * per_group)
                vectors = F.embedding(edges.indices(first * per_channel, last * per_channel), edges.codebook)
                parts.append(self._convolve(group_maps, self._kernels(vectors, last - first), 1))
        return torch.cat(parts, 1)

    def outside_share(self, x: torch.Tensor) -> float:
        return 0.0 if x.numel() == 0 else self.basis.outside(x).float().mean().item()


KANLayer = KANLinear | KANConv2d


def kan_layers(model: nn.Module) -> dict[str, KANLayer]:
    """The KAN layers of any model, by their names in it."""
    return {name: module for name, module in model.named_modules() if isinstance(module, (KANLinear, KANConv2d))}


@torch.no_grad()
def outside_shares(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    """Share of each layer's inputs that leave the range of its basis, when ``model`` is given x."""
    shares: dict[str, float] = {}
    hooks = [
        layer.register_forward_pre_hook(
            lambda layer, args, name=name: shares.__setitem__(name, layer.outside_share(args[0]))
        )
        for name, layer in kan_layers(model).items()
    ]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return shares


class KAN(nn.Module, PyTorchModelHubMixin):
    """Fully connected KAN layers, one after another: ``KAN([784, 64, 10], basis="rbf")``.

    Args:
        sizes: widths, inputs first. basis: a name, or settings {"name": "rbf", "centres": 12}. base, scale, norm,
            affine: as :class:`KANLinear`.

    Raises:
        UserError: fewer than two sizes.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        basis: str | Mapping[str, Any] | Basis = "bspline",
        *,
        base: bool = True,
        scale: bool = False,
        norm: bool = False,
        affine: bool = True,
    ) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise UserError(f"sizes {list(sizes)}: give at least inputs and outputs")
        self.sizes, self.basis = list(sizes), bases.settings(bases.make(basis))
        self.layers = nn.ModuleList(
            KANLinear(i, o, self.basis, base=base, scale=scale, norm=norm, affine=affine)
            for i, o in itertools.pairwise(sizes)
        )
        self._hub_mixin_config = {
            "sizes": self.sizes, "basis": self.basis, "base": base, "scale": scale, "norm": norm, "affine": affine
        }  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        for layer in self.layers:
            x = layer(x)
        return x


class _SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        total = grads[0].clone()
        torch.distributed.all_reduce(total)
        return total


class BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation over the batch of all processes (SyncBatchNorm, which torch has for GPUs only).

    So that two processes train what one does. On one process it is torch's own.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, height, width] -> the same shape."""
        distributed = torch.distributed
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            return super().forward(x)
        values = x.float()  # statistics in float32 under mixed precision too
        shape = (1, -1, 1, 1)
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([values.sum((0, 2, 3)), count]))
        total = sums[-1]
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (total / (total - 1)), self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return (centred * factor.view(shape) + self.bias.view(shape)).to(x.dtype)


class ConvKAN(nn.Module, PyTorchModelHubMixin):
    """KAN convolutions (3 x 3), each with batch norm and PReLU; the mean over pixels; a KAN layer as head.

    The Simple (4 layers) and EightSimple networks of torch-conv-kan, which the paper's ancestor uses.

    Args:
        in_channels: of the images. classes: outputs. channels, strides: of the convolutions. basis, base, scale: as
            :class:`KANLinear`.
    """

    def __init__(
        self,
        in_channels: int,
        classes: int,
        channels: Sequence[int] = (32, 64, 128, 512),
        strides: Sequence[int] = (1, 2, 2, 1),
        basis: str | Mapping[str, Any] | Basis = "gram",
        *,
        base: bool = True,
        scale: bool = False,
    ) -> None:
        super().__init__()
        if not channels or len(channels) != len(strides):
            raise UserError(f"{len(channels)} channels and {len(strides)} strides: give one stride a convolution")
        described = bases.settings(bases.make(basis))
        pairs = zip(itertools.pairwise([in_channels, *channels]), strides, strict=True)
        self.layers = nn.ModuleList(
            nn.Sequential(
                KANConv2d(i, o, 3, stride, padding=1, basis=described, base=base, scale=scale),
                BatchNorm2d(o),
                nn.PReLU(),
            )
            for (i, o), stride in pairs
        )
        self.head = KANLinear(channels[-1], classes, described, base=base, scale=scale)
        self.settings = {
            "in_channels": in_channels, "classes": classes, "channels": list(channels), "strides": list(strides),
            "basis": described, "base": base, "scale": scale,
        }  # fmt: skip
        self._hub_mixin_config = self.settings

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, height, width] -> [B, classes]."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


class MLP(nn.Module, PyTorchModelHubMixin):
    """Linear layers with SiLU between them: the baseline of equal size."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]."""
        for i, layer in enumerate(self.layers):
            x = layer(F.silu(x) if i else x)
        return x


def from_efficient_kan(state: Mapping[str, torch.Tensor], *, order: int = 3) -> KAN:
    """A KAN with the outputs of an efficient-kan network, from its state dict.

    Args:
        state: layers.N.base_weight [O, I], .spline_weight [O, I, G], .spline_scaler [O, I] (or none), .grid [I, …].
        order: its spline_order, which the state dict does not tell.

    Raises:
        UserError: a tensor is missing, a grid is no longer uniform (after update_grid), or layers differ in theirs.
    """
    layers = _numbered(state, "base_weight")
    scale = "layers.0.spline_scaler" in state
    built = []
    for n in range(layers):
        base, spline, grid = (_tensor(state, f"layers.{n}.{name}") for name in ("base_weight", "spline_weight", "grid"))
        steps = grid.diff(dim=1)
        if not torch.allclose(steps, steps[0, 0].expand_as(steps), rtol=1e-3):
            raise UserError(
                f"layers.{n}.grid is not uniform (update_grid was called): only uniform grids are taken over"
            )
        if not torch.allclose(grid, grid[:1].expand_as(grid), atol=1e-5):
            raise UserError(f"layers.{n}.grid differs among the inputs: only one grid for all is taken over")
        if grid.shape[1] != spline.shape[2] + order + 1:
            raise UserError(
                f"layers.{n}.grid has {grid.shape[1]} knots for {spline.shape[2]} splines: not order {order}"
            )
        basis = BSpline(grid.shape[1] - 2 * order - 1, order, grid[0, order].item(), grid[0, -1 - order].item())
        parts = [spline, base.unsqueeze(-1)]
        if scale:
            parts.append(_tensor(state, f"layers.{n}.spline_scaler").unsqueeze(-1))
        layer = KANLinear(base.shape[1], base.shape[0], basis, scale=scale)
        layer.edges = DirectEdges(torch.cat(parts, -1).flatten(0, 1))
        built.append(layer)
    described = bases.settings(built[0].basis)
    if any(bases.settings(layer.basis) != described for layer in built):
        raise UserError("layers differ in their grids: only one grid for all is taken over")
    model = KAN([built[0].in_features, *(layer.out_features for layer in built)], described, scale=scale)
    model.layers = nn.ModuleList(built)
    return model


def from_fastkan(state: Mapping[str, torch.Tensor]) -> nn.Module:
    """A KAN with the outputs of a FastKAN network, from its state dict.

    FastKAN's base term has a bias for each output; it is returned as a layer of its own would be: as a
    :class:`Biased` around the KAN layer.

    Args:
        state: layers.N.layernorm.{weight,bias}, .rbf.grid [G], .spline_linear.weight [O, I·G],
            .base_linear.{weight,bias}.

    Raises:
        UserError: a tensor is missing.
    """
    parts: list[nn.Module] = []
    for n in range(_numbered(state, "spline_linear.weight")):
        spline, grid, base, bias = (
            _tensor(state, f"layers.{n}.{name}")
            for name in ("spline_linear.weight", "rbf.grid", "base_linear.weight", "base_linear.bias")
        )
        out, size = base.shape
        norm = f"layers.{n}.layernorm.weight" in state
        layer = KANLinear(size, out, GaussianRBF(len(grid), grid[0].item(), grid[-1].item()), norm=norm)
        vectors = torch.cat([spline.view(out, size, -1), base.unsqueeze(-1)], -1)
        layer.edges = DirectEdges(vectors.flatten(0, 1).clone())
        if layer.norm is not None:
            layer.norm.load_state_dict({k: _tensor(state, f"layers.{n}.layernorm.{k}") for k in ("weight", "bias")})
        parts.append(Biased(layer, bias))
    return nn.Sequential(*parts)


class Biased(nn.Module):
    """A KAN layer plus a bias [O]."""

    def __init__(self, layer: KANLinear, bias: torch.Tensor) -> None:
        super().__init__()
        self.layer, self.bias = layer, nn.Parameter(bias.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., I] -> [..., O]."""
        return self.layer(x) + self.bias  # type: ignore[no-any-return]


def _tensor(state: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
    if name not in state:
        raise UserError(f"the state dict has no {name}: it is of another kind of network")
    return state[name].detach()


def _numbered(state: Mapping[str, torch.Tensor], tensor: str) -> int:
    count = sum(1 for name in state if name.startswith("layers.") and name.split(".", 2)[2] == tensor)
    if not count:
        raise UserError(f"the state dict has no layers.0.{tensor}: it is of another kind of network")
    return count
