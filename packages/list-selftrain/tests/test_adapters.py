"""Adapters: closed forms, parameter counts of the card (check 5), layouts, and what each --tune trains."""

from __future__ import annotations

import builtins
import copy
from typing import Any, get_args

import pytest
import torch
from list_selftrain.adapters import Adapted, LiSTAdapter, LiSTAdapterConfig, add_adapters, choose, encoder_layers
from list_selftrain.config import Tune
from metazoo.errors import UserError
from torch import nn
from transformers import (
    AutoModelForMaskedLM,
    BertConfig,
    DebertaConfig,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    RobertaConfig,
    XLMRobertaConfig,
)

SIZE: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 40,
}  # fmt: skip
DEBERTA: dict[str, Any] = {
    **SIZE, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False,
}  # fmt: skip
CONFIGS = {
    "bert": BertConfig(**SIZE),
    "roberta": RobertaConfig(**SIZE),
    "xlm-roberta": XLMRobertaConfig(**SIZE),
    "electra": ElectraConfig(**SIZE, embedding_size=8),
    "deberta": DebertaConfig(**DEBERTA),
    "deberta-v2": DebertaV2Config(**DEBERTA),
}
IDS = torch.arange(5, 17).view(2, 6)


def make(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return AutoModelForMaskedLM.from_config(CONFIGS[name]).eval()


# ---- one adapter


def test_adapter_by_hand() -> None:
    """y = x + (x W1ᵀ) W2ᵀ: x = (1, 2), W1 = (1, −1), W2 = (3, 5)ᵀ give x W1ᵀ = −1, y = (−2, −3); with ReLU y = x."""
    x = torch.tensor([[1.0, 2.0]])
    for kind, wanted in (("adapter", [-2.0, -3.0]), ("houlsby", [1.0, 2.0])):
        adapter = LiSTAdapter(2, LiSTAdapterConfig(1, kind))  # type: ignore[arg-type]
        with torch.no_grad():
            adapter.down.weight.copy_(torch.tensor([[1.0, -1.0]]))
            adapter.up.weight.copy_(torch.tensor([[3.0], [5.0]]))
        assert adapter(x).tolist() == [wanted]
    simple = LiSTAdapter(2, LiSTAdapterConfig(1, "simple"))
    with torch.no_grad():
        simple.full.weight.copy_(torch.tensor([[1.0, 2.0], [0.0, 3.0]]))
    assert simple(x).tolist() == [[5.0, 6.0]]


@pytest.mark.parametrize("kind", ["adapter", "houlsby", "simple"])
def test_initial_weights(kind: Any) -> None:
    """N(0, std²), of simple around I; also before any reset, and the same for the same generator."""
    adapter = LiSTAdapter(64, LiSTAdapterConfig(32, kind))
    assert all("bias" not in name for name, _ in adapter.named_parameters())
    for _ in range(2):
        for weight in adapter.parameters():
            drawn = weight.detach() - (torch.eye(64) if kind == "simple" else 0)
            assert drawn.std().item() == pytest.approx(2e-4, rel=0.1)
            assert abs(drawn.mean().item()) < 2e-5
        x = torch.randn(3, 64)
        torch.testing.assert_close(adapter(x), x, atol=1e-2, rtol=0)
        adapter.reset(torch.Generator().manual_seed(3))
    again = LiSTAdapter(64, LiSTAdapterConfig(32, kind))
    again.reset(torch.Generator().manual_seed(3))
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def test_refused_settings() -> None:
    for wrong in ({"r": 0}, {"kind": "parallel"}, {"places": ("mlp",)}):
        with pytest.raises(UserError, match="a known kind, and places among attention, ffn"):
            LiSTAdapterConfig(**wrong)


# ---- in models


@pytest.mark.parametrize("name", CONFIGS)
def test_adapters_in_a_layout(name: str) -> None:
    """Check 5: after attention.output.dense and output.dense of each layer; at W2 = 0 all logits are exactly the same,
    and each adapter of its own changes them otherwise."""
    mlm = make(name)
    before = sum(p.numel() for p in mlm.parameters())
    wanted = mlm(input_ids=IDS).logits
    assert add_adapters(mlm, LiSTAdapterConfig(4)) == 4
    assert sum(p.numel() for p in mlm.parameters()) - before == 2 * (2 * 2 * 4 * 16)
    for layer in encoder_layers(mlm):
        assert isinstance(layer.attention.output.dense, Adapted)  # type: ignore[union-attr]
        assert isinstance(layer.output.dense, Adapted)  # type: ignore[union-attr]
    adapters = [module for module in mlm.modules() if isinstance(module, LiSTAdapter)]
    assert len(adapters) == 4
    torch.testing.assert_close(mlm(input_ids=IDS).logits, wanted, atol=1e-4, rtol=0)
    for adapter in adapters:
        nn.init.zeros_(adapter.up.weight)
    assert torch.equal(mlm(input_ids=IDS).logits, wanted)
    for adapter in adapters:
        nn.init.normal_(adapter.up.weight)
        nn.init.normal_(adapter.down.weight)
        assert not torch.allclose(mlm(input_ids=IDS).logits, wanted, atol=1e-5)
        nn.init.zeros_(adapter.up.weight)
    with pytest.raises(UserError, match="has adapters already"):
        add_adapters(mlm, LiSTAdapterConfig(4))


def test_adapter_comes_before_the_residual() -> None:
    """LayerNorm(adapter(dense(h)) + x), worked out apart."""
    mlm = make("bert")
    add_adapters(mlm, LiSTAdapterConfig(4, std=0.5))
    output = next(encoder_layers(mlm)).output
    h, x = torch.randn(2, 3, 24), torch.randn(2, 3, 16)
    dense = output.dense.base(h)  # type: ignore[union-attr]
    adapter = output.dense.adapter  # type: ignore[union-attr]
    changed = dense + (dense @ adapter.down.weight.T) @ adapter.up.weight.T
    torch.testing.assert_close(output(h, x), output.LayerNorm(changed + x))  # type: ignore[union-attr, operator]


def test_places() -> None:
    for places, name in ((("attention",), "attention.output.dense"), (("ffn",), "output.dense")):
        mlm = make("roberta")
        assert add_adapters(mlm, LiSTAdapterConfig(4, places=places)) == 2
        layers = "roberta.encoder.layer"
        found = [at for at, module in mlm.named_modules() if isinstance(module, Adapted)]
        assert found == [f"{layers}.0.{name}", f"{layers}.1.{name}"]


def test_numbers_of_roberta_large() -> None:
    """The card: 12,582,912 in adapters; with the head's dense, layer norm, bias and two decoder rows 13,686,873."""
    config = RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096,
        max_position_embeddings=514, type_vocab_size=1,
    )  # fmt: skip
    with torch.device("meta"):
        mlm = AutoModelForMaskedLM.from_config(config)
    assert sum(p.numel() for p in mlm.parameters()) == 355_412_057
    choose(mlm.base_model, "adapter", LiSTAdapterConfig())
    count = sum(p.numel() for p in mlm.base_model.parameters() if p.requires_grad)
    assert count == 24 * 2 * 2 * 1024 * 128 == 12_582_912
    head = sum(p.numel() for p in [*mlm.lm_head.dense.parameters(), *mlm.lm_head.layer_norm.parameters()])
    assert head == 1_049_600 + 2_048
    assert count + head + mlm.lm_head.bias.numel() + 2 * 1024 == 13_686_873
    assert 0.038 < 13_686_873 / 355_412_057 < 0.039


def test_dtype_is_the_models() -> None:
    mlm = make("bert").to(torch.bfloat16)
    add_adapters(mlm, LiSTAdapterConfig(4))
    assert {p.dtype for p in mlm.parameters()} == {torch.bfloat16}
    assert mlm(input_ids=IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        DistilBertConfig(vocab_size=60, dim=16, n_layers=1, n_heads=2, hidden_dim=24),
        MPNetConfig(**{**SIZE, "num_hidden_layers": 1}),
    ],
)
def test_model_without_such_layers(config: Any) -> None:
    mlm = AutoModelForMaskedLM.from_config(config)
    with pytest.raises(UserError, match=f"{config.model_type} has no layers with attention.output.dense"):
        add_adapters(mlm, LiSTAdapterConfig(4))
    with pytest.raises(UserError, match="has no layers"):
        choose(mlm.base_model, "houlsby", LiSTAdapterConfig(4))


# ---- what is trained

LAYER = "encoder.layer.0."
TRAINED = {
    "bias": ("embeddings.LayerNorm.bias", LAYER + "attention.self.query.bias", LAYER + "output.dense.bias"),
    "feedforward": (LAYER + "intermediate.dense.weight", LAYER + "output.dense.weight", LAYER + "output.dense.bias"),
    "attention": (LAYER + "attention.self.value.weight", LAYER + "attention.output.LayerNorm.weight"),
    "embedding": ("embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"),
    "full": ("embeddings.word_embeddings.weight", LAYER + "output.LayerNorm.weight"),
    "adapter": (LAYER + "attention.output.dense.adapter.down.weight", LAYER + "output.dense.adapter.up.weight"),
    "houlsby": (LAYER + "attention.output.dense.adapter.down.weight", LAYER + "output.dense.adapter.up.weight"),
    "simple": (LAYER + "output.dense.adapter.full.weight",),
    "lora": (
        LAYER + "attention.self.query.lora_A.default.weight",
        LAYER + "attention.self.value.lora_B.default.weight",
    ),
    "head": (),
}
# of a layer of width 16, 24 hidden units; embeddings [60 + 40 + 2 types, 16] and their layer norm
COUNTS = {
    "bias": 2 * (6 * 16 + 24 + 2 * 16) - 2 * 16 + 16, "feedforward": 2 * (2 * 16 * 24 + 24 + 16),
    "attention": 2 * (4 * (16 * 16 + 16) + 2 * 16), "embedding": 102 * 16 + 32, "adapter": 2 * 256, "houlsby": 2 * 256,
    "simple": 2 * 2 * 256, "lora": 2 * 2 * 2 * 4 * 16, "head": 0,
}  # fmt: skip


@pytest.mark.parametrize("tune", get_args(Tune))
def test_what_is_trained(tune: str) -> None:
    encoder = make("bert").base_model
    before = {name: p.detach().clone() for name, p in encoder.named_parameters()}
    choose(encoder, tune, LiSTAdapterConfig(4))
    trained = {name: p for name, p in encoder.named_parameters() if p.requires_grad}
    assert set(TRAINED[tune]) <= set(trained)
    if tune == "full":
        assert len(trained) == len(before)
    else:
        assert sum(p.numel() for p in trained.values()) == COUNTS[tune]
    if tune in ("adapter", "houlsby", "simple", "lora"):
        assert not set(before) & set(trained)
        kept = [p for name, p in encoder.named_parameters() if name not in trained]
        assert all(torch.equal(a, b) for a, b in zip(kept, before.values(), strict=True))


@pytest.mark.parametrize("tune", ["adapter", "bias", "feedforward", "attention", "embedding", "lora"])
@pytest.mark.parametrize("name", ["deberta", "deberta-v2", "electra"])
def test_every_choice_has_something_in_other_layouts(name: str, tune: str) -> None:
    encoder = make(name).base_model
    choose(encoder, tune, LiSTAdapterConfig(4))
    trained = [at for at, p in encoder.named_parameters() if p.requires_grad]
    assert len(trained) >= 2
    if tune == "bias" and name == "deberta":
        assert any(at.endswith("q_bias") for at in trained)
    if tune == "embedding" and name.startswith("deberta"):
        assert "encoder.rel_embeddings.weight" in trained


def test_lora_begins_as_the_model_itself() -> None:
    mlm = make("roberta")
    wanted = mlm(input_ids=IDS).logits
    kind = type(mlm.base_model)
    choose(mlm.base_model, "lora", LiSTAdapterConfig(4))
    assert type(mlm.base_model) is kind
    assert torch.equal(mlm(input_ids=IDS).logits, wanted)


def test_lora_without_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match="--tune lora needs peft"):
        choose(make("bert").base_model, "lora", LiSTAdapterConfig(4))


def test_nothing_of_the_kind() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

    for tune in ("attention", "feedforward", "embedding"):
        with pytest.raises(UserError, match=f"--tune {tune}: Plain has nothing of the kind"):
            choose(Plain(), tune, LiSTAdapterConfig())
    with pytest.raises(UserError, match="--tune everything: give one of adapter"):
        choose(Plain(), "everything", LiSTAdapterConfig())
    with pytest.raises(UserError, match="Plain has no query and value"):
        choose(Plain(), "lora", LiSTAdapterConfig())


@pytest.mark.parametrize("tune", ["adapter", "bias", "feedforward"])
def test_frozen_weights_stay_in_a_step(tune: str) -> None:
    """An AdamW step with weight decay over what is trained leaves every other bit."""
    mlm = make("roberta")
    choose(mlm.base_model, tune, LiSTAdapterConfig(4, std=0.1))
    mlm.lm_head.requires_grad_(False)
    before = copy.deepcopy(mlm.state_dict())
    optimizer = torch.optim.AdamW([p for p in mlm.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    mlm(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    trained = {name for name, p in mlm.named_parameters() if p.requires_grad}
    moved = {name for name, value in mlm.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained
