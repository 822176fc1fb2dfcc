"""Speed on a CLIP of the shape of ViT-B/32 with random weights, one thread, beside what one would otherwise run.

`python speed.py [PART …] [--photos N] [--rounds N] [--output FILE]` with parts

- reference: the loop of the independent reproduction (zilunzhang/StreetCLIP-Repoduce): countries encoded with each
  batch, then for each photo its 30 cities, and the photo once more; batches of one photo and of all. Predictions must
  agree.
- pipeline: transformers' zero-shot-image-classification on the same photos with 200 candidates.
- candidates: a photo's time with all 4,500 cities as candidates, against 200, once captions are encoded.
- world: steps per second of the small preset, and photos rendered per second.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import environment
from PIL import Image
from streetclip import data, model, world
from streetclip.config import CITY_CAPTION, COUNTRY_CAPTION, PRESETS
from streetclip.gazetteer import Gazetteer
from streetclip.geolocator import HierarchicalZeroShotGeolocator
from streetclip.model import Clip
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, PreTrainedTokenizerFast, pipeline


def a_clip(places: Gazetteer) -> Clip:
    """Of the shape of ViT-B/32, with a tokenizer trained on the names."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unknown>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=8192, special_tokens=list(model.SPECIALS), show_progress=False)
    texts = [COUNTRY_CAPTION, CITY_CAPTION, *places.countries, *(places.cities[i] for i in places.candidates(30))]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 3)]
    )
    names = {"pad_token": "<pad>", "bos_token": "<start>", "unk_token": "<unknown>", "eos_token": "<end>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=77, **names)
    torch.manual_seed(0)
    config = CLIPConfig(text_config={"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3})
    return Clip(CLIPModel(config).eval(), fast, CLIPImageProcessorPil())


def photos_of(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    places = world.make(0)
    drawn = world.render(world.photo_attributes(places, rng.integers(384, size=count), rng), rng)
    return [Image.fromarray(one).resize((320, 240)) for one in drawn]


def timed(*calls: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, in turn."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, found, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return found


def ratio(slow: Sequence[float], quick: Sequence[float]) -> dict[str, float]:
    """Median of the rounds' ratios, and their range."""
    each = np.array(slow) / np.array(quick)
    return {"ratio": float(np.median(each)), "low": float(each.min()), "high": float(each.max())}


@torch.no_grad()
def reference_loop(clip: Clip, places: Gazetteer, photos: Sequence[Image.Image], batch: int) -> list[int]:
    """Cities found, as the reproduction finds them; all captions are encoded anew."""
    found = []
    for start in range(0, len(photos), batch):
        part = photos[start : start + batch]
        countries = clip.encode_texts(clip.tokenize([COUNTRY_CAPTION.format(country=one) for one in places.countries]))
        best = (clip.encode_images(clip.pixels(part)) @ countries.T).argmax(1).tolist()
        for photo, country in zip(part, best, strict=True):
            held = places.top(country, 30)
            cities = clip.encode_texts(clip.tokenize([CITY_CAPTION.format(city=places.cities[i]) for i in held]))
            found.append(int(held[(clip.encode_images(clip.pixels([photo])) @ cities.T).argmax()]))
    return found


def reference(clip: Clip, places: Gazetteer, photos: Sequence[Image.Image], rounds: int) -> dict[str, Any]:
    locator = HierarchicalZeroShotGeolocator(clip, places)
    ours = [places.find(one.country, one.city) for one in locator.predict(photos, 1)]  # captions are encoded by now
    names = [(places.country[i], places.cities[i]) for i in reference_loop(clip, places, photos, len(photos))]
    agree = [(places.country[i], places.cities[i]) for i in ours if i is not None] == names
    few = photos[:4]
    single, mine = timed(
        lambda: reference_loop(clip, places, few, 1), lambda: [locator.predict([one], 1) for one in few], rounds=rounds
    )
    batched, cached = timed(
        lambda: reference_loop(clip, places, photos, len(photos)), lambda: locator.predict(photos, 1), rounds=rounds
    )
    country = [COUNTRY_CAPTION.format(country=one) for one in places.countries]
    texts, kept = timed(
        lambda: clip.features_of_texts(country[:30]), lambda: locator.city_weights(int(places.country[ours[0] or 0])),
        rounds=rounds,
    )  # fmt: skip
    return {
        "same_predictions": agree, "photos": len(photos), "photo_by_photo": ratio(single, mine),
        "in_one_batch": ratio(batched, cached), "captions_of_a_photo": ratio(texts, kept),
        "seconds_per_photo": {"reference": float(np.median(batched)) / len(photos), "ours": float(np.median(cached)) /
                              len(photos)},
    }  # fmt: skip


def peer(clip: Clip, places: Gazetteer, photos: Sequence[Image.Image], rounds: int) -> dict[str, Any]:
    """transformers' pipeline, with 200 countries as candidates."""
    names = list(places.countries[:200])
    theirs = pipeline(
        "zero-shot-image-classification", model=clip.model, tokenizer=clip.tokenizer, image_processor=clip.processor
    )  # fmt: skip
    locator = HierarchicalZeroShotGeolocator(clip, places)
    captions = [COUNTRY_CAPTION.format(country=name) for name in names]
    weights = locator.zero_shot_classifier(captions)

    def ours() -> list[int]:
        found: list[int] = (locator.features(photos, len(photos)) @ weights.T).argmax(1).tolist()
        return found

    template = COUNTRY_CAPTION.replace("{country}", "{}")
    few = list(photos[:4])
    best = [row[0]["label"] for row in theirs(few, candidate_labels=names, hypothesis_template=template)]
    slow, quick = timed(lambda: theirs(few, candidate_labels=names, hypothesis_template=template), ours, rounds=rounds)
    per_photo = [one / len(few) for one in slow], [one / len(photos) for one in quick]
    return {"same_predictions": best == [names[i] for i in ours()[: len(few)]], **ratio(*per_photo)}


def candidates(clip: Clip, places: Gazetteer, photos: Sequence[Image.Image], rounds: int) -> dict[str, Any]:
    """All cities against 200 of them; and what finding places alone takes, with features at hand."""
    locator = HierarchicalZeroShotGeolocator(clip, places, mode="flat")
    weights = locator.all_city_weights()
    few = weights[:200].contiguous()

    def by(kept: torch.Tensor) -> Callable[[], Any]:
        return lambda: (locator.features(photos, len(photos)) @ kept.T).softmax(-1).argmax(1)

    hierarchical = HierarchicalZeroShotGeolocator(clip, places)
    hierarchical._kept = locator._kept
    features = torch.nn.functional.normalize(torch.randn(1000, weights.shape[1]), dim=-1)
    hierarchical.locate(features)
    many, little = timed(by(weights), by(few), rounds=rounds)
    flat, steps = timed(lambda: locator.locate(features), lambda: hierarchical.locate(features), rounds=rounds)
    return {
        "candidates": len(weights), **ratio(many, little), "flat_ms": float(np.median(flat)),
        "hierarchical_ms": float(np.median(steps)),
    }  # fmt: skip  # seconds of 1000 photos: ms of one


def generated(rounds: int) -> dict[str, Any]:
    from accelerate import Accelerator
    from streetclip.train import SyntheticCaptionTrainer

    config = PRESETS["small"]
    started = time.perf_counter()
    held = data.load(config)
    seconds = time.perf_counter() - started
    count = 2 * config.images + 3 * config.test_images
    learner = SyntheticCaptionTrainer(config, held, Accelerator())
    for step in range(3):
        learner.step(step)
    (steps,) = timed(lambda: [learner.step(config.generic_steps + i) for i in range(10)], rounds=rounds)
    return {"photos_rendered_per_second": count / seconds, "steps_per_second": 10 / float(np.median(steps))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("reference", "pipeline", "candidates", "world")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(names))
    parser.add_argument("--photos", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=None)
    args = parser.parse_args()
    if wrong := [part for part in args.parts if part not in names]:
        parser.error(f"no part {wrong[0]!r}: one of {', '.join(names)}")
    torch.set_num_threads(1)
    chosen = args.parts or names
    found: dict[str, Any] = {}
    if set(chosen) - {"world"}:
        places = Gazetteer.geonames()
        clip, photos = a_clip(places), photos_of(args.photos)
    for part in chosen:
        if part == "world":
            found[part] = generated(args.rounds)
        else:
            call = {"reference": reference, "pipeline": peer, "candidates": candidates}[part]
            found[part] = call(clip, places, photos, args.rounds)
        print(part, json.dumps(found[part], indent=2), flush=True)
    found["environment"] = environment.describe()
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
