"""Speed and memory of a cross-batch step, one thread, beside its equal-cost control and what one would otherwise run.

`python speed.py [PART …] [--rounds N] [--output FILE]` with parts

- step: first-order steps on moving sprites and on a wider CLIP, in turn with two-batch steps (both gradients at θ) and
  with higher's: as its users write it, the support's gradient once for the outer loop and once for the inner step; and
  with that gradient caught in the inner step. All must give the same gradient.
- memory: peak of a process that does ten of our steps, or ten two-batch steps.
- average: a Gaussian update beside torch's AveragedModel with the same rule, on the weights of ViT-B/32's image tower.
- texts: class names encoded in a run of several epochs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import environment
from metazoo.options import RunOptions
from open_mede.config import PRESETS
from open_mede.crossbatch import cross_batch_step
from open_mede.ensemble import GaussianWeightAverage, gaussian_weights
from open_mede.model import VideoTextClassifier, tiny_clip
from open_mede.train import train
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel
from transformers import CLIPVisionConfig, CLIPVisionModel

ALPHA = 1e-2
SIZES = {
    "sprites": {"width": 64, "vision_layers": 3, "batch": 32},
    "wide": {"width": 384, "vision_layers": 6, "batch": 8},
}


def a_learner(
    width: int, vision_layers: int, batch: int
) -> tuple[VideoTextClassifier, Callable[[Any], Tensor], list[Any]]:
    """A learner of moving sprites' shape, its loss, and two batches."""
    torch.manual_seed(0)
    config = replace(PRESETS["sprites"], width=width, vision_layers=vision_layers, heads=4)
    clip, tokenizer, processor = tiny_clip(config)
    model = VideoTextClassifier.of(
        clip, adapter=config.adapter, difference=config.difference, tokenizer=tokenizer, processor=processor
    )
    model.train()
    texts = model.encode_texts(["east steady in moss", "west steady in clay", "nod halting in wool"])

    def loss(batch_of: tuple[Tensor, Tensor], module: Any = model) -> Tensor:
        return F.cross_entropy(module(batch_of[0], texts), batch_of[1])

    batches = [(torch.randn(batch, 8, 3, 32, 32), torch.randint(3, (batch,))) for _ in range(2)]
    return model, loss, batches


def by_higher(model: Any, loss: Any, support: Any, query: Any, caught: bool) -> list[Tensor]:
    """The same gradient with higher."""
    import higher

    trained = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=ALPHA)
    of_support: list[Tensor] = []
    if not caught:
        of_support = list(torch.autograd.grad(loss(support), trained))
    with higher.innerloop_ctx(model, optimizer, track_higher_grads=False) as (functional, inner):

        def catch(grads: list[Tensor]) -> list[Tensor]:
            if caught:
                of_support.extend(one for one in grads if one is not None)  # frozen ones are among them
            return grads

        inner.step(loss(support, functional), grad_callback=catch)
        fast = [value for value in functional.parameters() if value.requires_grad]
        of_query = torch.autograd.grad(loss(query, functional), fast)
    return [a + b for a, b in zip(of_support, of_query, strict=True)]


def timed(*calls: Callable[[], Any], rounds: int) -> list[list[float]]:
    """Seconds of each call in each round, in turn."""
    for call in calls:
        call()
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, seconds in zip(calls, found, strict=True):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return found


def ratio(one: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median of the rounds' ratios, and their middle half."""
    each = np.array(one) / np.array(other)
    low, middle, high = np.quantile(each, [0.25, 0.5, 0.75])
    return {"ratio": float(middle), "low": float(low), "high": float(high)}


def step(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, size in SIZES.items():
        model, loss, (support, query) = a_learner(**size)

        def ours(alpha: float, model: Any = model, loss: Any = loss, s: Any = support, q: Any = query) -> None:
            cross_batch_step(model, loss, s, q, alpha=alpha)

        ours(ALPHA)
        expected = [value.grad for value in model.parameters() if value.requires_grad]
        for caught in (False, True):
            for a, b in zip(expected, by_higher(model, loss, support, query, caught), strict=True):
                torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-3)
        meta, control, plain, lean = timed(
            lambda: ours(ALPHA), lambda: ours(0.0), lambda: by_higher(model, loss, support, query, False),  # noqa: B023
            lambda: by_higher(model, loss, support, query, True), rounds=rounds,  # noqa: B023
        )  # fmt: skip
        found[name] = {
            "seconds": float(np.median(meta)), "over_two_batch": ratio(meta, control),
            "higher_over_ours": ratio(plain, meta), "higher_caught_over_ours": ratio(lean, meta),
        }  # fmt: skip
    return found


def memory(rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in SIZES:
        peaks = {}
        for alpha in (ALPHA, 0.0):
            said = subprocess.run(
                [sys.executable, __file__, "--peak", name, str(alpha)], check=True, capture_output=True, text=True
            )
            peaks[alpha] = json.loads(said.stdout)
        grown = {alpha: one["peak_mb"] - one["before_mb"] for alpha, one in peaks.items()}
        found[name] = {
            "peak_mb": peaks[ALPHA]["peak_mb"], "two_batch_peak_mb": peaks[0.0]["peak_mb"],
            "process_ratio": peaks[ALPHA]["peak_mb"] / peaks[0.0]["peak_mb"], "step_ratio": grown[ALPHA] / grown[0.0],
        }  # fmt: skip
    return found


def peak(name: str, alpha: float) -> dict[str, float]:
    """Of this process, before steps and after."""
    model, loss, (support, query) = a_learner(**SIZES[name])
    environment.reset_peak_memory()
    before = environment.peak_memory_mb()
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], fused=True)
    for _ in range(10):
        cross_batch_step(model, loss, support, query, alpha=alpha)
        optimizer.step()
        optimizer.zero_grad()
    return {"before_mb": before, "peak_mb": environment.peak_memory_mb()}


def average(rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    tower = CLIPVisionModel(CLIPVisionConfig())
    weights = dict(tower.named_parameters())
    running = GaussianWeightAverage(mu=11, sigma=3.7)
    shares = [float(gaussian_weights(t, 11, 3.7)[-1]) for t in range(1, 10 * rounds)]

    def rule(old: Tensor, new: Tensor, count: Any) -> Tensor:
        share = shares[int(count)]
        return (1 - share) * old + share * new

    theirs = AveragedModel(tower, avg_fn=rule)
    same = GaussianWeightAverage(mu=11, sigma=3.7)
    for _ in range(3):
        same.update(weights)
        theirs.update_parameters(tower)
        with torch.no_grad():
            for value in weights.values():
                value.add_(0.01)
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(value.data, same.average[name])
    ours, other = timed(lambda: running.update(weights), lambda: theirs.update_parameters(tower), rounds=rounds)
    return {"seconds": float(np.median(ours)), "averaged_model_over_ours": ratio(other, ours)}


def texts(rounds: int) -> dict[str, Any]:
    config = replace(PRESETS["sprites"], image_steps=0, clips=64, batch=16, epochs=3, test_clips=2, draws=1)
    with tempfile.TemporaryDirectory() as scratch:
        run = train(config, RunOptions(output_dir=Path(scratch) / "run", log_every=1))
    assert run.data.train is not None
    classes = len(run.data.train.classes)
    return {
        "classes": classes, "epochs": config.epochs, "steps": len(run.metrics), "texts_encoded": run.model.encoded,
        "times_each": run.model.encoded / classes,
    }  # fmt: skip


PARTS = {"step": step, "memory": memory, "average": average, "texts": texts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(peak(args.peak[0], float(args.peak[1]))))
        return
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {min(unknown)!r}: one of {', '.join(PARTS)}")
    found: dict[str, Any] = {"environment": environment.describe(), "rounds": args.rounds}
    for part in args.parts or PARTS:
        found[part] = PARTS[part](args.rounds)
        print(part, json.dumps(found[part], indent=2), flush=True)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
