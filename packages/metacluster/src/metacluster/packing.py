"""The compressed network on disk, and where its bits are (Section 3.3).

A folder with model.safetensors — every codebook, the stream of all indices, and what stays dense — and config.json with
the architecture. It loads without the code that trains.

Bits: Σ_layers E·⌈log₂ K⌉ + Σ_codebooks K·W·32 + 32 for each dense number (norms, biases, Gram's β), against
32·E·W + dense for the network itself.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch
from huggingface_hub import ModelHubMixin, hf_hub_download
from metazoo.checkpoint import read_tensors
from metazoo.errors import UserError
from metazoo.runfolder import read_json, write_json
from safetensors.torch import save_file
from torch import nn

from metacluster import bases
from metacluster.bits import bits_for, pack_indices, unpack_indices
from metacluster.edges import ClusteredEdges
from metacluster.model import KAN, ConvKAN, KANLinear, kan_layers

if TYPE_CHECKING:
    from metacluster.config import ReportOptions

__all__ = [
    "CompressedKAN",
    "CompressionReport",
    "bits_for",
    "compression_report",
    "load_packed",
    "pack_indices",
    "save_packed",
    "unpack_indices",
]

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class CompressionReport:
    """Where the bits are."""

    edges: int
    """Number of edges E."""
    dense_bits: int
    """Of all coefficients in float32: 32·E·W."""
    index_bits: int
    """Of the assignment: E·⌈log₂ K⌉."""
    codebook_bits: int
    """Of all codebooks."""
    other_bits: int
    """Of what is not clustered: norms, biases, running statistics, β."""
    dense_other_bits: int
    """Of the same in the uncompressed network, in float32."""

    @property
    def bits(self) -> int:
        """Of the whole compressed network."""
        return self.index_bits + self.codebook_bits + self.other_bits

    @property
    def factor(self) -> float:
        """How many times smaller the whole network is, dense parts counted on both sides."""
        return (self.dense_bits + self.dense_other_bits) / self.bits

    @property
    def edge_factor(self) -> float:
        """How many times smaller the coefficients alone are: the paper's compression factor."""
        return self.dense_bits / (self.index_bits + self.codebook_bits)


def compression_report(model: nn.Module, *, codebook_width: int = 32) -> CompressionReport:
    """Count the bits of a clustered model.

    Args:
        model: from :func:`metacluster.compress`. codebook_width: bits of a stored float (16 for half precision).

    Raises:
        UserError: a KAN layer is not clustered.
    """
    layers = _clustered(model)
    codebooks = _codebooks(layers)
    others = sum(tensor.numel() for tensor in _rest(model).values())
    return CompressionReport(
        edges=sum(edges.count for edges in layers.values()),
        dense_bits=sum(32 * edges.count * edges.codebook.shape[1] for edges in layers.values()),
        index_bits=sum(edges.count * edges.bits for edges in layers.values()),
        codebook_bits=sum(codebook_width * codebook.numel() for codebook in codebooks),
        other_bits=codebook_width * others,
        dense_other_bits=32 * others,
    )


def save_packed(model: nn.Module, folder: Path | str, *, half: bool = False) -> Path:
    """Write a clustered model: model.safetensors and config.json.

    Args:
        model: from :func:`metacluster.compress`; a KAN, a ConvKAN, or a module of your own (then loading needs it).
        folder: made if need be. half: codebooks and dense parts in float16.

    Returns:
        The path of model.safetensors.

    Raises:
        UserError: a layer is not clustered, numbers are not finite, or the folder cannot be written.
    """
    folder = Path(folder)
    layers = _clustered(model)
    codebooks = _codebooks(layers)
    rest = _rest(model)
    dtype = torch.float16 if half else torch.float32
    numbers = {"codebook": list(codebooks), "dense": list(rest.values())}
    tensors = {
        name: torch.cat([t.detach().flatten() for t in parts]).to("cpu", dtype)
        for name, parts in numbers.items()
        if parts
    }
    for name, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{name} of the compressed network holds NaN or infinity: it cannot be saved")
    width = {edges.bits for edges in layers.values()}
    if len(width) == 1:  # one stream without gaps
        stream = torch.cat([edges.assignment for edges in layers.values()]).cpu()
        tensors["indices"] = pack_indices(stream, width.pop())
    else:
        tensors["indices"] = torch.cat([edges.packed.cpu() for edges in layers.values()])
    path = folder / "model.safetensors"
    beside = folder / f".{path.name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside)
        digest = _sha256(beside)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    write_json(
        folder / "config.json",
        {
            "format": FORMAT,
            "sha256": digest,
            "architecture": _architecture(model),
            "codebooks": [list(codebook.shape) for codebook in codebooks],
            "layers": {
                name: {"edges": edges.count, "codebook": _place(codebooks, edges.codebook)}
                for name, edges in layers.items()
            },
        },
    )
    return path


def load_packed(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """The compressed network of a folder, ready for inference; indices stay packed.

    Args:
        folder: from :func:`save_packed`. model: a module of your own architecture, changed in place; KAN and ConvKAN
            are built from config.json.

    Raises:
        UserError: a file is missing, truncated, altered or a pickle; or ``model`` has other layers.
    """
    folder = Path(folder)
    config = _config(folder)
    path = folder / "model.safetensors"
    if not path.is_file():
        raise UserError(f"{path} is missing: give a folder that `metacluster train` or `compress` wrote")
    tensors = read_tensors(path)
    if _sha256(path) != config["sha256"]:
        raise UserError(f"{path} is not the file that {folder / 'config.json'} describes: write the model again")
    try:
        if model is None:
            model = _build(config["architecture"], folder)
        return _fill(model, config, tensors, folder)
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(
            f"{folder / 'config.json'} does not fit {path.name} ({error!r}): write the model again"
        ) from error


def _fill(model: nn.Module, config: Mapping[str, Any], tensors: dict[str, torch.Tensor], folder: Path) -> nn.Module:
    layers = kan_layers(model)
    if set(layers) != set(config["layers"]):
        raise UserError(
            f"{folder} holds the layers {', '.join(config['layers'])}, the model has {', '.join(layers) or 'none'}: "
            "give the architecture that was compressed"
        )
    shapes = config["codebooks"]
    sizes = [k * w for k, w in shapes]
    if sum(sizes) != tensors["codebook"].numel():
        raise UserError(f"{folder}: the codebooks have {tensors['codebook'].numel()} numbers, not {sum(sizes)}")
    flat = tensors["codebook"].float().split(sizes)
    codebooks = [nn.Parameter(part.view(*shape).clone()) for part, shape in zip(flat, shapes, strict=True)]
    entries = {name: config["layers"][name] for name in config["layers"]}
    widths = {bits_for(len(codebooks[entry["codebook"]])) for entry in entries.values()}
    start = 0
    for name, entry in entries.items():
        layer, codebook = layers[name], codebooks[entry["codebook"]]
        if layer.count != entry["edges"] or layer.vector_size != codebook.shape[1]:
            raise UserError(
                f"{folder}: layer {name} has {entry['edges']} edges of {codebook.shape[1]} coefficients, the model's "
                f"has {layer.count} of {layer.vector_size}: give the architecture that was compressed"
            )
        bits = bits_for(len(codebook))
        if len(widths) == 1:
            assignment = unpack_indices(tensors["indices"], bits, layer.count, start=start)
            start += layer.count
        else:
            length = math.ceil(layer.count * bits / 8)
            assignment = unpack_indices(tensors["indices"][start : start + length], bits, layer.count)
            start += length
        layer.edges = ClusteredEdges(codebook, assignment).to(next(layer.parameters()))
    rest = _rest(model)
    stored = tensors.get("dense", torch.empty(0)).float()
    if stored.numel() != sum(tensor.numel() for tensor in rest.values()):
        raise UserError(
            f"{folder}: {stored.numel()} dense numbers do not fit the model: give the one that was compressed"
        )
    with torch.no_grad():
        for tensor, part in zip(rest.values(), stored.split([t.numel() for t in rest.values()]), strict=True):
            tensor.copy_(part.view_as(tensor))
    return model.eval()


class CompressedKAN(nn.Module, ModelHubMixin):
    """A compressed network: codebooks and packed indices, for inference; saved, loaded and pushed in the hub's way.

    Args:
        model: a clustered KAN or ConvKAN, from :func:`metacluster.compress`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        _clustered(model)
        self.model = model.eval()

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the clustered network gives; no gradient."""
        return self.model(x)  # type: ignore[no-any-return]

    def report(self) -> CompressionReport:
        """Where the bits are."""
        return compression_report(self.model)

    def _save_pretrained(self, save_directory: Path) -> None:
        save_packed(self.model, save_directory)

    @classmethod
    def _from_pretrained(
        cls,
        *,
        model_id: str,
        revision: str | None,
        cache_dir: str | Path | None,
        force_download: bool,
        local_files_only: bool,
        token: str | bool | None,
        **kwargs: Any,
    ) -> Self:
        folder = Path(model_id)
        if not folder.is_dir():
            files = [
                hf_hub_download(
                    model_id,
                    name,
                    revision=revision,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    local_files_only=local_files_only,
                    token=token,
                )
                for name in ("config.json", "model.safetensors")
            ]
            folder = Path(files[0]).parent
        return cls(load_packed(folder))


def report(options: ReportOptions) -> dict[str, Any]:
    """`metacluster report`: the bits of a compressed network by part, and its file's size."""
    model = load_packed(options.model)
    found = compression_report(model)
    layers = _clustered(model)
    return {
        "edges": found.edges,
        "codebooks": ", ".join(f"{k} x {w}" for k, w in (tuple(c.shape) for c in _codebooks(layers))),
        "bits_per_index": ", ".join(str(edges.bits) for edges in layers.values()),
        "dense_bytes": (found.dense_bits + found.dense_other_bits) / 8,
        "index_bytes": found.index_bits / 8,
        "codebook_bytes": found.codebook_bits / 8,
        "other_bytes": found.other_bits / 8,
        "file_bytes": (options.model / "model.safetensors").stat().st_size,
        "factor": found.factor,
        "factor_of_coefficients": found.edge_factor,
    }


def _clustered(model: nn.Module) -> dict[str, ClusteredEdges]:
    """The clustered edges by layer."""
    found = {}
    for name, layer in kan_layers(model).items():
        if not isinstance(layer.edges, ClusteredEdges):
            raise UserError(f"layer {name} is not clustered: call compress first")
        found[name] = layer.edges
    if not found:
        raise UserError("the model has no KAN layer (KANLinear, KANConv2d): there is nothing compressed in it")
    return found


def _codebooks(layers: Mapping[str, ClusteredEdges]) -> list[nn.Parameter]:
    """Every codebook once, in the order of the layers."""
    return list({id(edges.codebook): edges.codebook for edges in layers.values()}.values())


def _place(codebooks: list[nn.Parameter], codebook: nn.Parameter) -> int:
    return next(i for i, other in enumerate(codebooks) if other is codebook)


def _rest(model: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and running statistics outside the edges, by name.

    Raises:
        UserError: a tensor of whole numbers, for which the file has no place (batch norm's count of batches aside).
    """
    edges = tuple(f"{name}.edges." for name in kan_layers(model))
    rest = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if not name.startswith(edges) and not name.endswith("num_batches_tracked")
    }
    for name, tensor in rest.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{name} holds {tensor.dtype}, which a compressed file has no place for: use a float buffer"
            )
    return rest


def _architecture(model: nn.Module) -> dict[str, Any] | None:
    """What builds a model of ours again; None for others."""
    if isinstance(model, KAN):
        return {
            "class": "KAN",
            "layers": [
                {
                    "in_features": layer.in_features,
                    "out_features": layer.out_features,
                    "basis": bases.settings(layer.basis),
                    "base": layer.base,
                    "scale": layer.scale,
                    "norm": layer.norm is not None,
                    "affine": layer.norm is None or layer.norm.elementwise_affine,
                }
                for layer in model.layers
                if isinstance(layer, KANLinear)
            ],
        }
    if isinstance(model, ConvKAN):
        return {"class": "ConvKAN", **model.settings}
    return None


def _build(architecture: Mapping[str, Any] | None, folder: Path) -> nn.Module:
    if architecture is None:
        raise UserError(f"{folder} holds a network of your own class: give it as load_packed(folder, model)")
    settings = dict(architecture)
    kind = settings.pop("class")
    if kind == "ConvKAN":
        return ConvKAN(**settings)
    if kind != "KAN":
        raise UserError(f"{folder / 'config.json'} describes a {kind}, which this version does not know")
    layers = [KANLinear(**layer) for layer in settings["layers"]]
    model = KAN([layers[0].in_features, *(layer.out_features for layer in layers)])
    model.layers = nn.ModuleList(layers)
    return model


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is no compressed network (no config.json): give a folder that `metacluster train` wrote"
        )
    config = read_json(path)
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise UserError(f"{path} is not of a compressed network of format {FORMAT}: write the model again")
    missing = {"sha256", "architecture", "codebooks", "layers"} - set(config)
    if missing:
        raise UserError(f"{path} lacks {', '.join(sorted(missing))}: write the model again")
    return config


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
