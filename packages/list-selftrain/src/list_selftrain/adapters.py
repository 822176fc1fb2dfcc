"""LiST's adapters, and which weights of a masked language model are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from metazoo.errors import UserError
from torch import Tensor, nn

from list_selftrain.config import Tune

PLACES = {"attention": "attention.output.dense", "ffn": "output.dense"}


@dataclass(frozen=True)
class LiSTAdapterConfig:
    """Rank, kind (LiST's linear one, Houlsby's with a ReLU, or one full matrix), places in a layer, and initial
    spread."""

    r: int = 128
    kind: Literal["adapter", "houlsby", "simple"] = "adapter"
    places: tuple[str, ...] = ("attention", "ffn")
    std: float = 2e-4

    def __post_init__(self) -> None:
        if self.r < 1 or self.kind not in ("adapter", "houlsby", "simple") or not set(self.places) <= set(PLACES):
            raise UserError(f"{self}: give r of 1 or more, a known kind, and places among {', '.join(PLACES)}")


class LiSTAdapter(nn.Module):
    """y = x + (x W1ᵀ) W2ᵀ with W1 [r, d] and W2 [d, r], neither bias nor non-linearity; [..., d] -> [..., d].

    Houlsby's has a ReLU between the two. "simple" is y = x Wᵀ with W [d, d] near I. Initial weights are N(0, std²),
    almost the identity.
    """

    def __init__(
        self, width: int, config: LiSTAdapterConfig, device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.config = config
        if config.kind == "simple":
            self.full = nn.Linear(width, width, bias=False, device=device, dtype=dtype)
        else:
            self.down = nn.Linear(width, config.r, bias=False, device=device, dtype=dtype)
            self.up = nn.Linear(config.r, width, bias=False, device=device, dtype=dtype)
        self.reset()

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw the weights anew, on the CPU [default: from the global random state of torch]."""
        with torch.no_grad():
            for weight in self.parameters():
                drawn = torch.empty(weight.shape).normal_(0, self.config.std, generator=generator)
                weight.copy_(drawn + torch.eye(len(weight)) if self.config.kind == "simple" else drawn)

    def forward(self, x: Tensor) -> Tensor:
        if self.config.kind == "simple":
            found: Tensor = self.full(x)
            return found
        inner = self.down(x)
        if self.config.kind == "houlsby":
            inner = inner.relu()
        found = x + self.up(inner)
        return found


class Adapted(nn.Module):
    """A dense layer with an adapter on its output: before the dropout, the residual and the layer norm that follow."""

    def __init__(self, base: nn.Module, adapter: LiSTAdapter) -> None:
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.adapter(self.base(x))
        return found


def encoder_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Layers that are built as BERT's: attention.output.dense, intermediate.dense and output.dense."""
    for module in model.modules():
        owners = getattr(module, "attention", None), module
        found = [getattr(getattr(owner, "output", None), "dense", None) for owner in owners]
        if hasattr(module, "intermediate") and all(isinstance(dense, nn.Linear | Adapted) for dense in found):
            yield module


def add_adapters(model: nn.Module, config: LiSTAdapterConfig) -> int:
    """Put adapters into each layer of a BERT, RoBERTa, XLM-R, DeBERTa, ELECTRA or the like; returns how many.

    A layer has two of 2·r·d weights each (``simple``: d²): 12,582,912 in RoBERTa large at r = 128.

    Raises:
        UserError: the model has no such layers, or has adapters already.
    """
    if any(isinstance(module, Adapted) for module in model.modules()):
        raise UserError(f"{_type(model)} has adapters already: give a model without")
    count = 0
    for layer in list(encoder_layers(model)):
        for place in config.places:
            parent = layer.get_submodule(PLACES[place].rpartition(".")[0])
            dense: Any = parent.dense
            adapter = LiSTAdapter(dense.out_features, config, dense.weight.device, dense.weight.dtype)
            parent.dense = Adapted(dense, adapter)
            count += 1
    if not count:
        raise UserError(
            f"{_type(model)} has no layers with attention.output.dense and output.dense to put adapters in: give a "
            "BERT, RoBERTa or DeBERTa, or --tune full, bias or lora"
        )
    return count


def choose(encoder: nn.Module, tune: str, config: LiSTAdapterConfig) -> None:
    """Let of an encoder (without its head) be trained what ``tune`` names, and nothing else; adapters are added first.

    Args:
        tune: adapter, houlsby, simple, lora, bias, head (nothing), feedforward, attention, embedding or full; as
            ``update_component`` of the paper's code, where attention has its layer norm and feedforward has not.

    Raises:
        UserError: an unknown ``tune``, or the encoder has nothing of the kind; lora without peft.
    """
    if tune not in get_args(Tune):
        raise UserError(f"--tune {tune}: give one of {', '.join(get_args(Tune))}")
    for parameter in encoder.parameters():
        parameter.requires_grad_(False)
    if tune == "lora":
        _add_lora(encoder, config.r)
        return
    if tune in ("adapter", "houlsby", "simple"):
        add_adapters(encoder, replace(config, kind=cast(Any, tune)))

    dense = {"intermediate", "output"}

    def wanted(name: str) -> bool:
        parts = name.split(".")
        attention = "attention" in parts
        return {
            "adapter": "adapter" in parts, "houlsby": "adapter" in parts, "simple": "adapter" in parts,
            "bias": parts[-1].endswith("bias"), "head": False, "attention": attention,
            "feedforward": not attention and ("ffn" in parts or ("dense" in parts and bool(dense & set(parts)))),
            "embedding": any("embeddings" in part for part in parts), "full": True,
        }[tune]  # fmt: skip

    found = [p.requires_grad_(True) for name, p in encoder.named_parameters() if wanted(name)]
    if not found and tune != "head":
        raise UserError(f"--tune {tune}: {_type(encoder)} has nothing of the kind: give another")


def _add_lora(encoder: nn.Module, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--tune lora needs peft: pip install peft, or give --tune adapter") from error
    names = {name.rpartition(".")[2] for name, _ in encoder.named_modules()}
    known = ("query", "value", "query_proj", "value_proj", "in_proj", "q_lin", "v_lin")
    targets = [name for name in known if name in names]
    if not targets:
        raise UserError(f"--tune lora: {_type(encoder)} has no query and value to adapt: give another")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets), encoder)


def _type(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))
