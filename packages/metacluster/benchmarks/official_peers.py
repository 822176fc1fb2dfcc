"""Milliseconds of a forward and backward pass beside efficient-kan, FastKAN and pykan, at the same shape and numbers.

`python official_peers.py --efficient-kan kan.py --fast-kan fastkan.py`: the files of Blealtan/efficient-kan
(src/efficient_kan/kan.py) and ZiyaoLi/fast-kan (fastkan/fastkan.py); pykan 0.2.8 is imported where it is installed.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import types
from collections.abc import Callable
from pathlib import Path

import torch
from metacluster.model import KANLinear, from_efficient_kan, from_fastkan
from speed import in_turn, ratio

SHAPES = ((256, 784, 64), (64, 256, 256), (1024, 784, 32))


def module(path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def step(layer: torch.nn.Module, x: torch.Tensor, upstream: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        layer.zero_grad()
        x.grad = None
        found = layer(x)
        (found[0] if isinstance(found, tuple) else found).backward(upstream)

    return run


def compared(
    peer: torch.nn.Module, ours: torch.nn.Module, shape: tuple[int, int, int], repeats: int, same: bool
) -> dict[str, object]:
    batch, inputs, outputs = shape
    x = (torch.rand(batch, inputs) * 1.9 - 0.95).requires_grad_()
    upstream = torch.randn(batch, outputs)
    if same:
        assert torch.allclose(peer(x), ours(x), atol=1e-4), "they compute something else"
    found = in_turn({"peer": step(peer, x, upstream), "ours": step(ours, x, upstream)}, repeats)
    return {"shape": f"B={batch} {inputs}->{outputs}", "ms": found, "peer/ours": ratio(found, "peer", "ours")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--efficient-kan", type=Path)
    parser.add_argument("--fast-kan", type=Path)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found: dict[str, object] = {"threads": options.threads, "torch": torch.__version__}
    if options.efficient_kan:
        peers = module(options.efficient_kan)
        rows = []
        for shape, scale in itertools.product(SHAPES, (True, False)):
            peer = peers.KANLinear(*shape[1:], enable_standalone_scale_spline=scale)
            ours = from_efficient_kan({f"layers.0.{name}": value for name, value in peer.state_dict().items()})
            rows.append({"scale": scale, **compared(peer, ours, shape, options.repeats, same=True)})
        found["efficient-kan"] = rows
    if options.fast_kan:
        peers = module(options.fast_kan)
        rows = []
        for shape in SHAPES:
            peer = peers.FastKANLayer(*shape[1:])
            ours = from_fastkan({f"layers.0.{name}": value for name, value in peer.state_dict().items()})
            rows.append(compared(peer, ours, shape, options.repeats, same=True))
        found["fast-kan"] = rows
    if importlib.util.find_spec("kan") is not None:
        from kan import KAN as Peer

        rows = []
        for shape in ((64, 64, 64), (256, 196, 32)):
            for fast in (False, True):  # as a user gets it; and after speed(), without the symbolic branch
                peer = Peer(width=list(shape[1:]), grid=5, k=3, seed=0, auto_save=False)
                if fast:
                    peer.speed()
                ours = KANLinear(shape[1], shape[2], "bspline", scale=True)
                row = compared(peer, ours, shape, max(4, options.repeats // 4) if fast else 4, same=False)
                rows.append({"speed()": fast, **row})
        found["pykan"] = rows
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
