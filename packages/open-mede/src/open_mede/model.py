"""The video learner: any CLIP of transformers over frames, with a temporal view; and learners of feature vectors."""

from __future__ import annotations

import contextlib
import copy
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin
from metazoo.errors import UserError
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPVisionEmbeddings
from transformers.utils import logging as transformers_logging

from open_mede import sprites
from open_mede.config import Config
from open_mede.features import SIDE, TEXT, FeatureWorld

SPECIALS = ("<pad>", "<start>", "<unknown>", "<end>")  # an id of 2 for <end> would mean something else to CLIP
BACKBONES = ("clip", "xclip")


class TemporalAdapter(nn.Module):
    """Down, a convolution over three frames for each channel, up (ST-Adapter, Pan et al. 2022). It may start at 0.

    Args:
        width: of tokens.
        bottleneck: channels between.
    """

    def __init__(self, width: int, bottleneck: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, bottleneck)
        self.mix = nn.Conv1d(bottleneck, bottleneck, 3, padding=1, groups=bottleneck)
        self.up = nn.Linear(bottleneck, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, T, N, D] of tokens [B, T, N, D]."""
        b, t, n, _ = tokens.shape
        found = self.down(tokens).permute(0, 2, 3, 1).reshape(b * n, -1, t)
        found = F.gelu(self.mix(found)).reshape(b, n, -1, t).permute(0, 3, 1, 2)
        lifted: Tensor = self.up(found)
        return lifted


class TemporalAttention(CLIPAttention):
    """CLIP's attention of frame t over the tokens of frames t − 1, t, t + 1 (Open-VCLIP): no new parameters.

    The set of three frames has no order: run backwards, a video gives the same features backwards, and the same mean.
    What tells order is the adapter beside it.

    Attributes:
        frames: T of the videos that come next; tokens come as [B·T, N, D].
    """

    def __init__(self, config: Any, *, expand: bool, border: Literal["mask", "zero"], adapter: int) -> None:
        super().__init__(config)
        self.frames = 1
        self.expand, self.border = expand, border
        self.adapter = TemporalAdapter(config.hidden_size, adapter) if adapter else None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Tokens [B·T, N, D]."""
        rows, n, d = hidden_states.shape
        t = self.frames
        heads = (rows // t, t, n, self.num_heads, self.head_dim)
        queries, keys, values = (
            layer(hidden_states).view(heads).transpose(2, 3) for layer in (self.q_proj, self.k_proj, self.v_proj)
        )  # [B, T, heads, N, d]
        mask = None
        if self.expand and t > 1:
            keys, values = _neighbours(keys), _neighbours(values)
            if self.border == "mask":
                mask = _border_mask(t, n, keys.device)
        drop = self.dropout if self.training else 0.0
        found = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=drop, scale=self.scale)
        found = self.out_proj(found.transpose(2, 3).reshape(rows, n, d))
        if self.adapter is not None:
            found = found + self.adapter(hidden_states.view(-1, t, n, d)).reshape(rows, n, d)
        return found, None


class TemporalEmbeddings(CLIPVisionEmbeddings):
    """CLIP's patches and, beside them, those of the difference to the frame before (ours). They can start at nothing.

    Attributes:
        frames: T of the videos that come next; pixels come as [B·T, 3, H, W].
    """

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.frames = 1
        held = self.patch_embedding
        self.difference = nn.Conv2d(
            held.in_channels, held.out_channels, held.kernel_size, stride=held.stride, bias=False
        )
        nn.init.zeros_(self.difference.weight)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool = False) -> Tensor:
        """Tokens [B·T, N, D]."""
        tokens: Tensor = super().forward(pixel_values, interpolate_pos_encoding)
        clips = pixel_values.unflatten(0, (-1, self.frames))
        change = torch.diff(clips, dim=1, prepend=clips[:, :1]).flatten(0, 1)
        moved = self.difference(change.to(self.difference.weight.dtype)).flatten(2).transpose(1, 2)
        return torch.cat([tokens[:, :1], tokens[:, 1:] + moved], dim=1)


def _neighbours(tokens: Tensor) -> Tensor:
    """[B, T, h, 3N, d]: those of the frame before, of the frame, of the frame after; zeros beyond the ends."""
    padded = F.pad(tokens, (0, 0, 0, 0, 0, 0, 1, 1))
    return torch.cat([padded[:, :-2], tokens, padded[:, 2:]], dim=3)


def _border_mask(t: int, n: int, device: torch.device) -> Tensor:
    """[T, 1, 1, 3N]: False where a frame would attend to one that is not there."""
    mask = torch.ones(t, 1, 1, 3, n, dtype=torch.bool, device=device)
    mask[0, :, :, 0] = False
    mask[-1, :, :, 2] = False
    return mask.view(t, 1, 1, 3 * n)


class VideoTextConfig(PreTrainedConfig):
    """Of a :class:`VideoTextClassifier`.

    Args:
        backbone: config of a CLIP or X-CLIP, as a dictionary with its model_type.
        expand: frames attend to their neighbours (CLIP).
        border: what the first and last frame see beyond the end, "mask" or "zero".
        adapter: width of temporal adapters, 0 for none (CLIP).
        difference: patches of frame differences, too (CLIP).
    """

    model_type = "video-text-classifier"

    def __init__(
        self, backbone: dict[str, Any] | None = None, expand: bool = True, border: str = "mask", adapter: int = 0,
        difference: bool = False, **kwargs: Any,
    ) -> None:  # fmt: skip
        self.backbone = backbone or {}
        self.expand, self.border, self.adapter, self.difference = expand, border, adapter, difference
        super().__init__(**kwargs)

    @property
    def temporal(self) -> bool:
        """Whether frames know of each other."""
        return bool(self.expand or self.adapter or self.difference)


class VideoTextClassifier(PreTrainedModel):
    """Videos against class names: logits exp(τ)·cos of frames and texts, and their mean over frames (Section 3.1).

    Attributes:
        backbone: transformers' CLIPModel or XCLIPModel.
        tokenizer, processor: its own, None until they are set; saved and loaded with it.
        encoded: texts that were encoded so far.
    """

    config_class = VideoTextConfig
    base_model_prefix = ""
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True

    def __init__(self, config: VideoTextConfig) -> None:
        super().__init__(config)
        kind = config.backbone.get("model_type")
        if kind not in BACKBONES:
            raise UserError(f"a backbone of type {kind!r}: give a CLIP or an X-CLIP")
        held = dict(config.backbone)
        self.backbone = AutoModel.from_config(AutoConfig.for_model(held.pop("model_type"), **held))
        self.tokenizer: Any = None
        self.processor: Any = None
        self.encoded = 0
        if kind == "clip" and (config.expand or config.adapter):
            for layer in self.backbone.vision_model.encoder.layers:
                layer.self_attn = TemporalAttention(
                    self.backbone.config.vision_config, expand=config.expand, border=config.border,
                    adapter=config.adapter,
                )  # fmt: skip
        if kind == "clip" and config.difference:
            self.backbone.vision_model.embeddings = TemporalEmbeddings(self.backbone.config.vision_config)
        self.post_init()

    @torch.no_grad()
    def start_new_parts(self, blank: bool = True) -> None:
        """Initialise what CLIP does not have, by torch's generator.

        Args:
            blank: they add nothing at first; else they begin with small weights, as CLIP's own layers do.
        """
        for module in self.backbone.modules():
            if isinstance(module, TemporalAdapter):
                for layer in (module.down, module.mix):
                    layer.reset_parameters()
                nn.init.normal_(module.up.weight, std=0.0 if blank else 0.02)
                nn.init.zeros_(module.up.bias)
            if isinstance(module, TemporalEmbeddings):
                nn.init.normal_(module.difference.weight, std=0.0 if blank else 0.02)

    @classmethod
    def from_pretrained(cls, source: str | Path, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Weights, and tokenizer and image processor if they are beside them; texts and temperature are frozen."""
        found = super().from_pretrained(source, *args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model.freeze()
        if (Path(source) / "tokenizer_config.json").is_file() or not Path(source).is_dir():
            model.tokenizer = AutoTokenizer.from_pretrained(source)
            model.processor = AutoImageProcessor.from_pretrained(source, backend="pil")
        return found

    @classmethod
    def of(
        cls, backbone: PreTrainedModel, *, expand: bool = True, border: str = "mask", adapter: int = 0,
        difference: bool = False, blank: bool = True, tokenizer: Any = None, processor: Any = None,
    ) -> VideoTextClassifier:  # fmt: skip
        """Around a CLIP or X-CLIP: its weights are copied, texts and temperature frozen.

        With ``blank``, what is new adds nothing at first; else it keeps the small weights of transformers'
        initialisation.
        """
        clip = backbone.config.model_type == "clip"
        config = VideoTextConfig(
            backbone.config.to_dict(),
            expand=expand and clip,
            border=border,
            adapter=adapter if clip else 0,
            difference=difference and clip,
        )
        model = cls(config)
        missing = model.backbone.load_state_dict(backbone.state_dict(), strict=False)
        if missing.unexpected_keys or any(not is_new(name) for name in missing.missing_keys):
            name = (missing.unexpected_keys or missing.missing_keys)[0]
            raise UserError(f"the backbone's weights do not fit: {name}")
        if blank:
            model.start_new_parts()
        model.tokenizer, model.processor = tokenizer, processor
        model.freeze()
        return model.eval()

    def freeze(self, trained: Literal["vision", "adapter", "lora"] = "vision", rank: int = 8) -> None:
        """Leave only the trained part with gradients: the vision side, its adapters, or low-rank updates.

        Raises:
            UserError: low-rank updates without peft, or adapters that are not there.
        """
        if trained == "lora":
            _low_rank(self.backbone.vision_model, rank)
        found = 0
        for name, value in self.backbone.named_parameters():
            text = name.startswith(("text_model.", "text_projection.")) or name == "logit_scale"
            wanted = {"vision": not text, "adapter": is_new(name), "lora": "lora_" in name}[trained]
            value.requires_grad_(wanted)
            found += wanted
        if not found:
            raise UserError(f"--trained {trained}: the model has no such part: give --adapter 8 or more")

    @property
    def scale(self) -> Tensor:
        """exp(τ), 0-d."""
        found: Tensor = self.backbone.logit_scale.exp()
        return found

    def forward(self, pixel_values: Tensor, texts: Tensor) -> Tensor:
        """Logits [B, C] of clips [B, T, 3, H, W] for texts [C, d]."""
        return self.logits(self.video_features(pixel_values), texts)

    def video_features(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Features of clips [B, T, 3, H, W]: ``frames`` [B, T, d] of norm 1, of an X-CLIP [B, 1, d] and ``patches``.

        Raises:
            UserError: another shape, or another T than an X-CLIP has places for.
        """
        if pixel_values.ndim != 5 or pixel_values.shape[2] != 3:
            raise UserError(f"clips have shape {tuple(pixel_values.shape)}: give [B, T, 3, H, W]")
        b, t = pixel_values.shape[:2]
        self.check_frames(t)
        flat = pixel_values.flatten(0, 1)
        if self.backbone.config.model_type == "xclip":
            return self._xclip_features(flat, b, t)
        for module in self.backbone.vision_model.modules():
            if isinstance(module, (TemporalAttention, TemporalEmbeddings)):
                module.frames = t
        pooled = self.backbone.vision_model(pixel_values=flat).pooler_output
        frames = F.normalize(self.backbone.visual_projection(pooled).float(), dim=-1)
        return {"frames": frames.view(b, t, -1)}

    def check_frames(self, frames: int) -> None:
        """Raise UserError where the model has places for another number of frames."""
        if self.backbone.config.model_type == "xclip":
            held = self.backbone.config.vision_config.num_frames
            if frames != held:
                raise UserError(f"this X-CLIP reads {held} frames, not {frames}: give --frames {held}")

    @contextlib.contextmanager
    def frame_by_frame(self) -> Iterator[None]:
        """Frames attend to themselves alone, as in the image model."""
        held = [(one, one.expand) for one in self.backbone.modules() if isinstance(one, TemporalAttention)]
        for one, _ in held:
            one.expand = False
        try:
            yield
        finally:
            for one, expand in held:
                one.expand = expand

    def _xclip_features(self, flat: Tensor, b: int, t: int) -> dict[str, Tensor]:
        held = self.backbone
        found = held.vision_model(pixel_values=flat)
        frames = held.visual_projection(found.pooler_output).view(b, t, -1)
        video = held.mit(frames).pooler_output
        patches = held.prompts_visual_layernorm(found.last_hidden_state[:, 1:]) @ held.prompts_visual_projection
        patches = patches.view(b, t, -1, video.shape[-1]).mean(1)
        return {"frames": F.normalize(video.float(), dim=-1)[:, None], "patches": patches}

    def logits(self, features: dict[str, Tensor], texts: Tensor) -> Tensor:
        """Logits [B, C] in 32 bits: per frame, then the mean. An X-CLIP first fits its texts to each video."""
        frames = features["frames"]
        fitted = texts
        if "patches" in features:  # each text reads the video by itself: others do not change it
            fitted = texts[None].expand(len(frames), -1, -1)
            fitted = fitted + self.backbone.prompts_generator(fitted, features["patches"])
        with torch.autocast(frames.device.type, enabled=False):
            fitted = F.normalize(fitted.float(), dim=-1)
            product = "btd,bcd->btc" if fitted.ndim == 3 else "btd,cd->btc"
            cosines = torch.einsum(product, frames.float(), fitted)
            found: Tensor = self.scale.float() * cosines.mean(1)
        return found

    @torch.no_grad()
    def encode_texts(self, names: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Texts [C, d] of class names: the mean over prompts; without a gradient, as texts are frozen.

        Raises:
            UserError: no class, an empty name, one that comes twice, or one with too many tokens.
        """
        check_names(names)
        total: Tensor | None = None
        for template in templates:
            prompts = [template.format(name) for name in names]
            found = self._encode(prompts)
            if len(templates) > 1 and self.backbone.config.model_type == "clip":
                found = F.normalize(found, dim=-1)
            total = found if total is None else total + found
        assert total is not None
        return total / len(templates)

    def _encode(self, prompts: Sequence[str]) -> Tensor:
        if self.tokenizer is None:
            raise UserError("the model has no tokenizer: set model.tokenizer")
        ids = self.tokenizer(list(prompts), padding=True, return_tensors="pt")["input_ids"]
        most = self.backbone.config.text_config.max_position_embeddings
        if ids.shape[1] > most:
            long = max(prompts, key=len)
            raise UserError(f"class {long!r} has more tokens than the {most} of the text tower: shorten it")
        parts = []
        for i in range(0, len(ids), 256):
            # what stands behind a text's end does not count, as attention is causal
            found = self.backbone.text_model(input_ids=ids[i : i + 256].to(self.device)).pooler_output
            parts.append(self.backbone.text_projection(found).float())
        self.encoded += len(prompts)
        return torch.cat(parts)

    def pixels(self, clips: np.ndarray) -> Tensor:
        """Pixel values of clips [..., 3, H, W] of bytes, by the processor's mean and deviation, on its device."""
        mean, deviation = self.processor.image_mean, self.processor.image_std
        values = torch.from_numpy(np.ascontiguousarray(clips)).to(self.device).float().div_(255)
        shape = (3, 1, 1)
        return (values - values.new_tensor(mean).view(shape)) / values.new_tensor(deviation).view(shape)

    @property
    def size(self) -> int:
        """Pixels of a frame's side."""
        found: int = self.backbone.config.vision_config.image_size
        return found

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Weights and config, and tokenizer and image processor beside them; low-rank updates are merged in them."""
        if any("lora_" in name for name, _ in self.named_parameters()):
            merged = copy.deepcopy(self)
            merged._merge()
            merged.save_pretrained(save_directory, **kwargs)
            return
        with quiet():
            super().save_pretrained(save_directory, **kwargs)
        for part in (self.tokenizer, self.processor):
            if part is not None:
                part.save_pretrained(save_directory)

    def _merge(self) -> None:
        for module in list(self.backbone.vision_model.modules()):
            for name, child in list(module.named_children()):
                if hasattr(child, "merge") and hasattr(child, "get_base_layer"):
                    child.merge()
                    setattr(module, name, child.get_base_layer())


def is_new(name: str) -> bool:
    """Whether a parameter of the backbone is none of CLIP's own."""
    return ".adapter." in name or ".difference." in name


def _low_rank(vision: nn.Module, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("--trained lora needs peft: pip install 'metazoo-open-mede[lora]'") from error
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"]), vision)


class FeatureClassifier(nn.Module, PyTorchModelHubMixin):
    """A linear map of feature vectors to texts, with or without a residual adapter.

    Args:
        names: of all classes.
        hidden: units of the adapter; 0: none.
    """

    def __init__(self, names: Sequence[str], hidden: int = 0) -> None:
        super().__init__()
        self.map = nn.Linear(2 * SIDE, TEXT, bias=False)
        self.adapter: nn.Sequential | None = None
        if hidden:
            self.adapter = nn.Sequential(nn.Linear(2 * SIDE, hidden), nn.ReLU(), nn.Linear(hidden, TEXT, bias=False))
            nn.init.zeros_(self.adapter[2].weight)
        self.names = list(names)
        self.register_buffer("texts", torch.zeros(len(self.names), TEXT))
        self.encoded = 0

    texts: Tensor

    @classmethod
    def of(cls, world: FeatureWorld, hidden: int = 0) -> FeatureClassifier:
        """With a world's texts and its static-biased start: nothing is known of the temporal half."""
        model = cls(world.names, hidden)
        with torch.no_grad():
            model.map.weight.zero_()[:, :SIDE] = torch.from_numpy(world.start)
            model.texts.copy_(torch.from_numpy(world.texts))
        return model

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.map.weight.device

    def forward(self, inputs: Tensor, texts: Tensor) -> Tensor:
        """Logits [B, C] of inputs [B, 128] for texts [C, 48]."""
        return self.logits(self.video_features(inputs), texts)

    def video_features(self, inputs: Tensor) -> dict[str, Tensor]:
        """``frames`` [B, 1, 48] of norm 1."""
        found = self.map(inputs)
        if self.adapter is not None:
            found = found + self.adapter(inputs)
        return {"frames": F.normalize(found, dim=-1)[:, None]}

    def logits(self, features: dict[str, Tensor], texts: Tensor) -> Tensor:
        """20 times the cosines, [B, C]."""
        return 20 * features["frames"].mean(1) @ texts.T

    def encode_texts(self, names: Sequence[str], templates: Sequence[str] = ("{}",)) -> Tensor:
        """Texts [C, 48] of class names."""
        check_names(names)
        self.encoded += len(names)
        return self.texts[[self.names.index(name) for name in names]]

    def pixels(self, clips: np.ndarray) -> Tensor:
        """Inputs on the model's device."""
        return torch.from_numpy(clips).to(self.device)


Learner = VideoTextClassifier | FeatureClassifier


def check_names(names: Sequence[str]) -> None:
    """Raise UserError unless there are classes, each with a name of its own."""
    if not names:
        raise UserError("no classes: give one or more names")
    if "" in (stripped := [name.strip() for name in names]):
        raise UserError(f"class {stripped.index('') + 1} has no name: give one")
    if len(set(names)) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise UserError(f"class {twice!r} comes twice: give each once")


AutoConfig.register(VideoTextConfig.model_type, VideoTextConfig)  # for tokenizers that are loaded beside it


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' bars for loading and saving."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def load_model(config: Config, world: FeatureWorld | None = None) -> Learner:
    """The learner of a config, before training; what is new in it is initialised by torch's generator.

    Raises:
        UserError: no such model, or none of this form.
    """
    if config.model in ("linear", "mlp"):
        assert world is not None
        return FeatureClassifier.of(world, config.hidden if config.model == "mlp" else 0)
    backbone, tokenizer, processor = tiny_clip(config) if config.model == "tiny" else load_backbone(config.model)
    if isinstance(backbone, VideoTextClassifier) and not backbone.config.temporal:
        backbone = backbone.backbone  # frame by frame: it gets the temporal part that the config has
    frozen = config.method == "frozen"
    wanted = {"expand": config.expand, "adapter": config.adapter, "difference": config.difference}
    if isinstance(backbone, VideoTextClassifier):
        model = backbone
        held = {name: getattr(model.config, name) for name in wanted}
        if held != wanted and not frozen:
            said = ", ".join(f"{name} {value}" for name, value in held.items())
            raise UserError(f"--model {config.model} has a temporal part of its own ({said}): give the same options")
    else:
        if frozen:  # CLIP as it is: frame by frame
            wanted = {"expand": False, "adapter": 0, "difference": False}
        elif backbone.config.model_type == "xclip" and any(wanted.values()):
            raise UserError(f"--model {config.model} is an X-CLIP, with a temporal part of its own: give --no-expand, "
                            "without --adapter and --difference")  # fmt: skip
        model = VideoTextClassifier.of(
            backbone, border=config.border, tokenizer=tokenizer, processor=processor,
            blank=config.dataset != "sprites" or config.image_steps > 0, **wanted,
        )  # fmt: skip
    if not frozen:
        model.freeze(config.trained, config.lora_rank)
    if config.dataset != "sprites":
        model.check_frames(config.frames)
    return model


def load_classifier(source: str | Path) -> VideoTextClassifier:
    """A saved VideoTextClassifier, or one around a CLIP or X-CLIP; only safetensors are loaded.

    Raises:
        UserError: no such model, or none of this form.
    """
    backbone, tokenizer, processor = load_backbone(source)
    if isinstance(backbone, VideoTextClassifier):
        return backbone
    return VideoTextClassifier.of(backbone, expand=False, tokenizer=tokenizer, processor=processor)


def load_backbone(source: str | Path) -> tuple[PreTrainedModel, Any, Any]:
    """Model, tokenizer and image processor of a hub id or folder; a VideoTextClassifier comes whole.

    Raises:
        UserError: no such model, or none of this form.
    """
    source = str(source)
    folder = Path(source)
    kind = None
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"{source}: no config.json in it: give the folder of a CLIP or X-CLIP of transformers")
        try:
            held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder / 'config.json'}: not JSON: give the folder of a CLIP") from error
        kind = held.get("model_type") if isinstance(held, dict) else None
        if kind not in (*BACKBONES, VideoTextConfig.model_type):
            raise UserError(f"{source} holds a model of type {kind!r}: give a CLIP or an X-CLIP")
    try:
        with quiet():
            loader = VideoTextClassifier if kind == VideoTextConfig.model_type else AutoModel
            model, info = loader.from_pretrained(source, use_safetensors=True, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(source)
            processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"cannot load {source!r} ({reason}): give the hub id of a CLIP or X-CLIP with safetensors (without a "
            "network only those in the cache), or its folder"
        ) from error
    if model.config.model_type not in (*BACKBONES, VideoTextConfig.model_type):
        raise UserError(f"{source} is a {model.config.model_type}: give a CLIP or an X-CLIP")
    known, needed = len(tokenizer), _text_config(model).vocab_size
    if known < needed // 2:
        raise UserError(f"{source}: its tokenizer has {known} tokens, its text tower {needed}: add its tokenizer.json")
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{source}: weights of {missing[0]} are missing ({len(missing)} in all): give a whole model")
    for parameter in model.parameters():  # small updates vanish below 32 bits
        parameter.data = parameter.data.float()
    if isinstance(model, VideoTextClassifier):
        model.tokenizer, model.processor = tokenizer, processor
    return model.eval(), tokenizer, processor


def _text_config(model: PreTrainedModel) -> Any:
    held = model.backbone if isinstance(model, VideoTextClassifier) else model
    return held.config.text_config


def tiny_clip(config: Config) -> tuple[CLIPModel, PreTrainedTokenizerFast, Any]:
    """A CLIP of 32 × 32 pixels and a closed vocabulary, with its tokenizer and image processor."""
    tokenizer = tiny_tokenizer()
    both = {
        "hidden_size": config.width, "intermediate_size": 4 * config.width, "num_attention_heads": config.heads,
        "hidden_act": "gelu",
    }  # fmt: skip
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **both, "num_hidden_layers": config.text_layers, "vocab_size": len(tokenizer),
                "max_position_embeddings": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
            },
            vision_config={
                **both, "num_hidden_layers": config.vision_layers, "image_size": sprites.SIZE,
                "patch_size": config.patch,
            },
            projection_dim=config.width,
        )
    )  # fmt: skip
    side = {"height": sprites.SIZE, "width": sprites.SIZE}
    processor = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.25] * 3, do_convert_rgb=True
    )
    return model.eval(), tokenizer, processor


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Of the words of the moving sprites."""
    captions = " ".join(sprites.CAPTIONS).split()
    words = [
        *sprites.MOTIONS, *sprites.MANNERS, *sprites.TEXTURES, *sprites.GLYPHS, *sprites.SIZES, *sprites.ROWS,
        *sprites.COLUMNS, *(word for word in captions if "{" not in word),
    ]  # fmt: skip
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((*SPECIALS, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unknown>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", unk_token="<unknown>", eos_token="<end>",
        model_max_length=16,
    )  # fmt: skip
