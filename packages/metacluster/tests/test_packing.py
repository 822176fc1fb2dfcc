"""Bits by formula, files of that size, and files that are refused."""

from __future__ import annotations

import itertools
import json
import math
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metacluster.clustering import attach_meta_learner, compress
from metacluster.model import KAN, ConvKAN, KANConv2d, KANLinear
from metacluster.packing import (
    CompressedKAN,
    bits_for,
    compression_report,
    load_packed,
    pack_indices,
    save_packed,
    unpack_indices,
)
from metazoo.errors import UserError
from safetensors.torch import load_file


@settings(max_examples=60, deadline=None)
@given(k=st.integers(1, 65536), count=st.integers(0, 70), seed=st.integers(0, 99), data=st.data())
def test_packing_round_trip(k: int, count: int, seed: int, data: Any) -> None:
    """Check 8: every K up to 65 536, every length, from any start."""
    bits = bits_for(k)
    assert bits == max(1, math.ceil(math.log2(k)))
    indices = torch.randint(0, k, (count,), generator=torch.Generator().manual_seed(seed))
    packed = pack_indices(indices, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == math.ceil(count * bits / 8)
    assert torch.equal(unpack_indices(packed, bits, count), indices)
    start = data.draw(st.integers(0, count))
    assert torch.equal(unpack_indices(packed, bits, count - start, start=start), indices[start:])


def test_bits_are_in_order() -> None:
    """3-bit indices 1, 2, 3 as one stream, the lowest bits first: 0b(11)010001, 0b0."""
    assert pack_indices(torch.tensor([1, 2, 3]), 3).tolist() == [0b11010001, 0b0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: pack_indices(torch.tensor([4]), 2), "index 4 does not fit 2 bits"),
        (lambda: pack_indices(torch.tensor([-1]), 2), "index -1 does not fit"),
        (lambda: pack_indices(torch.tensor([0]), 17), "give 1 to 16"),
        (lambda: unpack_indices(torch.zeros(1, dtype=torch.uint8), 4, 3), "hold 2 indices of 4 bits, not 3"),
        (lambda: bits_for(65537), "65537"),
        (lambda: bits_for(0), "0 centroids"),
    ],
)
def test_indices_that_do_not_fit_are_refused(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(
    ("sizes", "options", "k", "scope", "factor"),
    [
        ([196, 64, 10], {"basis": "rbf"}, 16, "layer", 61.3),
        ([196, 64, 10], {"basis": "rbf"}, 64, "layer", 32.7),
        ([784, 64, 10], {"scale": True}, 16, "model", 78.0),
    ],
)
def test_factors_of_the_card(
    sizes: list[int], options: dict[str, Any], k: int, scope: Any, factor: float, tmp_path: Path
) -> None:
    """Check 8's closed form; and the file, header included, is within 2 % of it (claim 6)."""
    model = compress(KAN(sizes, **options), k, scope=scope, n_init=1)
    report = compression_report(model)
    edges = sum(i * o for i, o in itertools.pairwise(sizes))
    codebooks = 1 if scope == "model" else 2
    size = 10 if options.get("scale") else 9
    assert report.edges == edges
    assert report.bits == edges * bits_for(k) + codebooks * k * size * 32
    assert report.factor == report.edge_factor == pytest.approx(factor, abs=0.05)
    path = save_packed(model, tmp_path)
    assert path.stat().st_size <= 1.02 * report.bits / 8


def test_dense_parts_are_counted() -> None:
    """Norms, batch norm with its statistics, PReLU and Gram's β: 32 bits each, on both sides of the factor."""
    model = compress(ConvKAN(1, 3, (4,), (1,), {"name": "gram", "degree": 2}), 4)
    report = compression_report(model)
    assert report.other_bits == 32 * (4 * 4 + 1 + 3 + 3)
    assert report.factor < report.edge_factor


@pytest.mark.parametrize("kind", ["kan", "shared", "uneven", "conv"])
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    """Identical logits, packed indices, also where layers have indices of several widths."""
    torch.manual_seed(0)
    if kind == "conv":
        model, x = compress(ConvKAN(3, 4, (5, 6), (1, 2)), 9).eval(), torch.randn(2, 3, 8, 8)
    else:
        x = torch.randn(6, 7)
        plain = attach_meta_learner(KAN([7, 9, 3], {"name": "bspline", "grid": 4, "high": 2.0}, norm=True))
        model = compress(plain, 5, scope="model" if kind == "shared" else "layer")
        if kind == "uneven":
            model.layers[1].edges = compress(plain, 20).layers[1].edges
    save_packed(model, tmp_path / "net")
    with torch.no_grad():
        again = load_packed(tmp_path / "net")
        assert torch.equal(again(x), model(x))
        assert torch.equal(CompressedKAN.from_pretrained(tmp_path / "net")(x), model(x))
    assert compression_report(again) == compression_report(model)
    CompressedKAN(model).save_pretrained(tmp_path / "hub")
    assert (
        load_file(tmp_path / "hub" / "model.safetensors").keys()
        == load_file(tmp_path / "net" / "model.safetensors").keys()
    )


def test_half_precision(tmp_path: Path) -> None:
    """float16 codebooks: outputs to 1e-2, a file that is smaller by as much as the report says."""
    model = compress(KAN([20, 30, 4], "rbf", norm=True), 8)
    full = save_packed(model, tmp_path / "full").stat().st_size
    half = save_packed(model, tmp_path / "half", half=True).stat().st_size
    saved = (compression_report(model).bits - compression_report(model, codebook_width=16).bits) / 8
    assert full - half == pytest.approx(saved, abs=16)
    x = torch.randn(5, 20)
    with torch.no_grad():
        assert torch.allclose(load_packed(tmp_path / "half")(x), model(x), atol=2e-2)


class Own(torch.nn.Module):
    """A user's architecture around the layers."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv = KANConv2d(1, channels, 3, basis="rbf")
        self.linear = torch.nn.Linear(channels, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(self.conv(x).mean((2, 3)))


def test_a_network_of_ones_own(tmp_path: Path) -> None:
    """compress takes any module; loading is given one, and refuses another."""
    model = compress(Own(), 5)
    save_packed(model, tmp_path)
    x = torch.randn(2, 1, 6, 6)
    with torch.no_grad():
        assert torch.equal(load_packed(tmp_path, Own())(x), model(x))
    with pytest.raises(UserError, match="your own class"):
        load_packed(tmp_path)
    with pytest.raises(UserError, match="36 edges"):
        load_packed(tmp_path, Own(6))
    with pytest.raises(UserError, match="the model has layers"):
        load_packed(tmp_path, KAN([2, 2]))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_packed(compress(KAN([7, 9, 3]), 5), tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "fault", ["truncated", "flipped", "foreign", "pickle", "missing", "no-config", "edited", "format"]
)
def test_damaged_files_are_refused(saved: Path, fault: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One line that names the file; a pickle dressed as safetensors is not run."""
    path, config = saved / "model.safetensors", saved / "config.json"
    marker = tmp_path_factory.mktemp("marker") / "ran"
    raw = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(raw[:-3])
    elif fault == "flipped":
        path.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    elif fault == "foreign":
        save_packed(compress(KAN([7, 8, 3]), 5), saved / "other")
        path.write_bytes((saved / "other" / "model.safetensors").read_bytes())
    elif fault == "pickle":

        class Payload:
            def __reduce__(self) -> Any:
                return marker.touch, ()

        path.write_bytes(pickle.dumps(Payload()))
    elif fault == "missing":
        path.unlink()
    elif fault == "no-config":
        config.unlink()
    else:
        stored = json.loads(config.read_text())
        if fault == "edited":
            stored["architecture"]["layers"][0]["out_features"] = 8
        else:
            stored["format"] = 99
        config.write_text(json.dumps(stored))
    with pytest.raises(UserError) as error:
        load_packed(saved)
    assert str(saved) in str(error.value)
    assert "\n" not in str(error.value)
    assert not marker.exists()


def test_what_is_not_clustered_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"layers\.0 is not clustered"):
        save_packed(KAN([3, 2]), tmp_path / "net")
    broken = compress(KAN([3, 2]), 2)
    broken.layers[0].edges.codebook.data[0, 0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        save_packed(broken, tmp_path / "net")
    assert not (tmp_path / "net").exists()


def test_loading_needs_no_training_code(saved: Path) -> None:
    """Neither the trainer nor K-means is imported by a process that only predicts."""
    code = (
        "import sys, torch; from metacluster import load_packed; "
        f"load_packed({str(saved)!r})(torch.zeros(1, 7)); "
        "assert not {'metacluster.train', 'metacluster.clustering', 'sklearn', 'accelerate'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_own_modules_keep_their_device_and_type(tmp_path: Path) -> None:
    """A codebook comes to where the layer is; whole-number buffers, which the file has no place for, are refused."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(KANLinear(5, 4, "rbf"))
    save_packed(compress(model, 3), tmp_path / "a")
    found = load_packed(tmp_path / "a", torch.nn.Sequential(KANLinear(5, 4, "rbf")).double())
    assert {p.dtype for p in found.parameters()} == {torch.float64}
    model.register_buffer("order", torch.arange(5))
    with pytest.raises(UserError, match=r"order holds torch\.int64"):
        save_packed(compress(model, 3), tmp_path / "b")


def test_half_precision_counts_the_uncompressed_network_in_full() -> None:
    """factor: float32 coefficients and norms over 16-bit ones."""
    model = compress(KAN([6, 5], "rbf", norm=True), 4)
    found = compression_report(model, codebook_width=16)
    dense = 32 * (30 * 9 + 12)
    assert found.factor == pytest.approx(dense / (30 * 2 + 16 * 4 * 9 + 16 * 12))
