"""Milliseconds of a layer's training step, and of inference from the compressed form; bytes held; seconds of K-means.

`naive` is the same layer with Cox and de Boor's recursion in ordinary autograd; `matmul` the matrix products alone,
which bind at large batches. What is compared takes turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from metacluster.clustering import compress, kmeans
from metacluster.edges import ClusteredEdges
from metacluster.model import KAN, KANConv2d, KANLinear, kan_layers
from torch.profiler import ProfilerActivity, profile


def in_turn(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each, called in turn, after two calls to warm up."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i > 1:
                taken[name].append(1000 * (time.perf_counter() - start))
    found = {}
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4)
        found[name] = {"median": round(middle, 3), "q25": round(low, 3), "q75": round(high, 3)}
    return found


def ratio(found: dict[str, dict[str, float]], one: str, other: str) -> float:
    return round(found[one]["median"] / found[other]["median"], 2)


class Naive(torch.nn.Module):
    """efficient-kan's arithmetic, written down as the recursion says."""

    def __init__(self, layer: KANLinear, grid: int = 5, order: int = 3) -> None:
        super().__init__()
        vectors = layer.edges().detach().view(layer.out_features, layer.in_features, -1)
        self.spline = torch.nn.Parameter(vectors[..., :8].clone())
        self.base = torch.nn.Parameter(vectors[..., 8].clone())
        self.scale = torch.nn.Parameter(vectors[..., 9].clone())
        self.order = order
        self.register_buffer("knots", -1 + 2 / grid * torch.arange(-order, grid + order + 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        t, knots = x.unsqueeze(-1), self.knots
        values = ((t >= knots[:-1]) & (t < knots[1:])).to(x.dtype)
        for k in range(1, self.order + 1):
            left = (t - knots[: -k - 1]) / (knots[k:-1] - knots[: -k - 1]) * values[..., :-1]
            values = left + (knots[k + 1 :] - t) / (knots[k + 1 :] - knots[1:-k]) * values[..., 1:]
        weight = (self.spline * self.scale.unsqueeze(-1)).flatten(1)
        return F.linear(F.silu(x), self.base) + F.linear(values.flatten(1), weight)


def training(batch: int, inputs: int, outputs: int, repeats: int) -> dict[str, object]:
    """Forward and backward of one layer, to its coefficients and its input."""
    torch.manual_seed(0)
    ours = KANLinear(inputs, outputs, "bspline", scale=True)
    naive = Naive(ours)
    x = (torch.rand(batch, inputs) * 2 - 1).requires_grad_()
    assert torch.allclose(ours(x), naive(x), atol=1e-4)
    features, weight = torch.randn(batch, inputs * 9), torch.randn(outputs, inputs * 9)
    upstream = torch.randn(batch, outputs)

    def step(layer: torch.nn.Module) -> None:
        layer.zero_grad()
        x.grad = None
        layer(x).backward(upstream)

    def products() -> None:
        features @ weight.T, upstream.T @ features, upstream @ weight

    found = in_turn({"naive": lambda: step(naive), "ours": lambda: step(ours), "matmul": products}, repeats)
    ratios = {"naive/ours": ratio(found, "naive", "ours"), "ours/matmul": ratio(found, "ours", "matmul")}
    return {"shape": f"B={batch} {inputs}->{outputs}", "ms": found, **ratios}


@torch.no_grad()
def inference(model: torch.nn.Module, x: torch.Tensor, k: int, repeats: int) -> dict[str, object]:
    """The compressed form beside the dense one: time, most bytes allocated at once, bytes held."""
    clustered = compress(model, k, n_init=1)
    assert torch.allclose(model(x), clustered(x), rtol=1, atol=10)  # near: K-means moves coefficients
    found = in_turn({"dense": lambda: model(x), "clustered": lambda: clustered(x)}, repeats)
    held = 0
    for layer in kan_layers(clustered).values():
        assert isinstance(layer.edges, ClusteredEdges)
        held += layer.edges.packed.numel() + 4 * layer.edges.codebook.numel()
    return {
        "K": k,
        "batch": len(x),
        "ms": found,
        "clustered/dense": ratio(found, "clustered", "dense"),
        "bytes_held": {"dense": 4 * sum(p.numel() for p in model.parameters()), "clustered": held},
        "peak_bytes_while_running": {"dense": peak(lambda: model(x)), "clustered": peak(lambda: clustered(x))},
    }


def peak(function: Callable[[], object]) -> int:
    """Most bytes that were allocated at once during a call, by torch's own record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        function()
    now = most = 0
    for event in record.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


def clusters(count: int, k: int) -> dict[str, object]:
    """K-means of many edges that lie near a curve, as a meta-learner's do."""
    generator = torch.Generator().manual_seed(0)
    kinks = torch.randn(20, 10, generator=generator).cumsum(0)
    place = torch.rand(count, 1, generator=generator) * 18.999
    low = place.floor().long().squeeze(1)
    vectors = torch.lerp(kinks[low], kinks[low + 1], place - place.floor())
    vectors += 0.05 * torch.randn(vectors.shape, generator=generator)
    start = time.perf_counter()
    residual = kmeans(vectors, k).residual
    return {"edges": count, "K": k, "seconds": round(time.perf_counter() - start, 2), "residual": round(residual, 5)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, object] = {"threads": options.threads, "torch": torch.__version__}
    found["training"] = [
        training(*shape, options.repeats) for shape in ((256, 784, 64), (64, 256, 256), (1024, 784, 32))
    ]
    rows = []
    for sizes in ([784, 64], [256, 256], [784, 32]):
        torch.manual_seed(0)
        model = KAN(sizes, "bspline")
        for k in (16, 256):
            for batch in (1, 64, 256, 1024):
                row = inference(model, torch.rand(batch, sizes[0]) * 2 - 1, k, options.repeats)
                rows.append({"layer": "->".join(map(str, sizes)), **row})
    conv = torch.nn.Sequential(KANConv2d(32, 64, 3, padding=1, basis="gram"))
    for k in (16, 256):
        rows.append({"layer": "conv 32->64, 16 x 16", **inference(conv, torch.randn(64, 32, 16, 16), k, 8)})
    found["inference"] = rows
    found["kmeans"] = [clusters(1_000_000, k) for k in (16, 256)]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
