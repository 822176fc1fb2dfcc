"""CLIP: any of transformers by hub id or folder, or a tiny one of the same class, with a closed vocabulary."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from metazoo.errors import UserError
from safetensors import SafetensorError
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoImageProcessor,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from streetclip import world
from streetclip.config import CITY_CAPTION, COUNTRY_CAPTION, FULL_CAPTION, Config

if TYPE_CHECKING:
    from PIL.Image import Image

SPECIALS = ("<pad>", "<start>", "<unknown>", "<end>")  # an id of 2 for <end> would mean something else to CLIP


class Clip(nn.Module):
    """A CLIP with its tokenizer and image processor.

    Attributes:
        model: transformers' CLIPModel. tokenizer, processor: its own.
    """

    def __init__(self, model: CLIPModel, tokenizer: Any, processor: Any) -> None:
        super().__init__()
        self.model, self.tokenizer, self.processor = model, tokenizer, processor

    @property
    def log_scale(self) -> nn.Parameter:
        """τ, 0-d: logits are exp(τ) times cosines."""
        scale = self.model.logit_scale
        assert isinstance(scale, nn.Parameter)
        return scale

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.log_scale.device

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Features [B, d] of norm 1 of pixel values [B, 3, H, W]."""
        found = self.model.vision_model(pixel_values=pixels).pooler_output
        return F.normalize(self.model.visual_projection(found).float(), dim=-1)

    def encode_texts(self, ids: Tensor) -> Tensor:
        """Features [B, d] of norm 1 of token ids [B, T], filled up at the end.

        What stands after the end of a text does not count, as attention is causal: no mask is needed.
        """
        found = self.model.text_model(input_ids=ids).pooler_output
        return F.normalize(self.model.text_projection(found).float(), dim=-1)

    def tokenize(self, captions: Sequence[str]) -> Tensor:
        """Token ids [N, T] of captions, filled up.

        Raises:
            UserError: a caption has more tokens than the text tower has positions.
        """
        ids = self.tokenizer(list(captions), padding=True, return_tensors="pt")["input_ids"]
        most = self.model.config.text_config.max_position_embeddings
        if ids.shape[1] > most:
            for caption in captions:
                if (count := len(self.tokenizer(caption)["input_ids"])) > most:
                    raise UserError(f"caption {caption!r} has {count} tokens, the text tower {most}: shorten it")
        assert isinstance(ids, Tensor)
        return ids

    def pixels(self, images: Sequence[Image]) -> Tensor:
        """Pixel values [N, 3, H, W] of RGB photos, resized, cropped and scaled as this CLIP was trained."""
        found = self.processor(images=list(images), return_tensors="pt")["pixel_values"]
        assert isinstance(found, Tensor)
        return found

    @torch.no_grad()
    def features_of_texts(self, captions: Sequence[str], batch_size: int = 256) -> Tensor:
        """Features [N, d] of norm 1 of captions, on the model's device."""
        parts = [
            self.encode_texts(self.tokenize(captions[i : i + batch_size]).to(self.device))
            for i in range(0, len(captions), batch_size)
        ]
        return torch.cat(parts) if parts else torch.empty(0, self.model.config.projection_dim, device=self.device)

    def save_pretrained(self, folder: Path | str) -> None:
        """Weights, tokenizer and image processor, as ``CLIPModel`` and ``CLIPProcessor`` load them."""
        with quiet():
            self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        self.processor.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> Clip:
        """Of a hub id or folder. Only safetensors are loaded.

        Raises:
            UserError: no such model, or none of this form.
        """
        source = str(source)
        folder = Path(source)
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise UserError(f"{source}: no config.json in it: give the folder of a CLIP of transformers")
        if folder.is_dir():
            try:
                held = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise UserError(f"{folder / 'config.json'}: not JSON: give the folder of a CLIP") from error
            kind = held.get("model_type") if isinstance(held, dict) else None
            if kind != "clip":
                raise UserError(f"{source} holds a model of type {kind!r}: give a CLIP")
        try:
            with quiet():
                model, info = CLIPModel.from_pretrained(source, use_safetensors=True, output_loading_info=True)
                tokenizer, processor = AutoTokenizer.from_pretrained(source), _image_processor(source)
        except (OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"cannot load {source!r} ({reason}): give the hub id of a CLIP with safetensors (without a network "
                "only those in the cache), or its folder"
            ) from error
        if missing := sorted(info["missing_keys"]):
            raise UserError(f"{source}: weights of {missing[0]} are missing ({len(missing)} in all): give a whole CLIP")
        known, needed = len(tokenizer), model.config.text_config.vocab_size
        if known < needed // 2:
            raise UserError(
                f"{source}: its tokenizer has {known} tokens, its text tower {needed}: add its tokenizer.json"
            )
        for parameter in model.parameters():  # small updates vanish below 32 bits
            parameter.data = parameter.data.float()
        return cls(model.eval(), tokenizer, processor)


def _image_processor(source: str) -> Any:
    """With PIL, the same with or without torchvision."""
    processor = AutoImageProcessor.from_pretrained(source, backend="pil")
    return processor


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


def load_model(config: Config) -> Clip:
    """The CLIP of a config, before training; a tiny one is initialised by torch's generator.

    Raises:
        UserError: no such model.
    """
    if config.model != "tiny":
        return Clip.from_pretrained(config.model)
    tokenizer = tiny_tokenizer()
    both = {
        "hidden_size": config.width, "intermediate_size": 4 * config.width, "num_attention_heads": config.heads,
        "hidden_act": "gelu",
    }  # fmt: skip
    model = CLIPModel(
        CLIPConfig(
            text_config={
                **both, "num_hidden_layers": config.text_layers, "vocab_size": len(tokenizer),
                "max_position_embeddings": 77, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3,
            },
            vision_config={
                **both, "num_hidden_layers": config.vision_layers, "image_size": world.SIZE, "patch_size": config.patch,
            },
            projection_dim=config.projection,
        )
    )  # fmt: skip
    side = {"height": world.SIZE, "width": world.SIZE}
    processor = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.25] * 3, do_convert_rgb=True
    )
    return Clip(model.eval(), tokenizer, processor)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Of a closed vocabulary: the words of templates and attributes, the syllables of names, letters and digits.

    A word that is none of these is read from its start, each time the longest piece that there is: a place's name falls
    into its syllables.
    """
    templates = (FULL_CAPTION, COUNTRY_CAPTION, CITY_CAPTION)
    lower = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])
    split = pre_tokenizers.BertPreTokenizer()
    texts = [
        *templates,
        *world.CARRIERS,
        *(word for words in world.ATTRIBUTES.values() for word in words),
        "[]{}.,'()-",
        "united states",
    ]
    pieces = [piece for text in texts for piece, _ in split.pre_tokenize_str(lower.normalize_str(text))]
    pieces += [syllable for syllables in world.SYLLABLES for syllable in syllables]
    pieces += [*world.PLAIN_SYLLABLES, *"abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys((*SPECIALS, *pieces)))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unknown>", continuing_subword_prefix=""))
    tokenizer.normalizer, tokenizer.pre_tokenizer = lower, split
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<start>", unk_token="<unknown>", eos_token="<end>",
        model_max_length=77,
    )  # fmt: skip
