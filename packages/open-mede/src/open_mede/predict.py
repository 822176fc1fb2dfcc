"""What happens in a user's own videos, among classes of their own."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError

from open_mede import lists, videos
from open_mede.config import Config, PredictOptions
from open_mede.evaluate import OpenVocabularyEvaluator, _said
from open_mede.model import VideoTextClassifier, load_classifier


def predict(options: PredictOptions) -> dict[str, Any]:
    """Predictions as predictions.csv (video, rank, class, probability), and frames of the first videos as strips.png.

    Returns:
        videos: how many were read; skipped; predictions: the file.

    Raises:
        UserError: no such model, no or equal class names, a video that cannot be read, or predictions are there.
    """
    target = options.output_dir / "predictions.csv"
    if target.exists() and not options.overwrite:
        raise UserError(f"{target} is there: give --overwrite, or another --output-dir")
    classes = _classes(options.classes)
    model, config = _model(options.model)
    frames, stride = options.frames or config.frames, options.stride or config.stride
    views = options.views or config.views
    model.check_frames(frames)
    model.to(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    evaluator = OpenVocabularyEvaluator(model, options.templates or config.templates)
    texts = evaluator.texts(classes)
    places = [(i + 0.5) / views for i in range(views)]
    rows, strips, skipped = [], [], 0
    for path in options.videos:
        try:
            clips = videos.read_clips(path, frames, stride, places)
        except videos.Unreadable as error:
            if options.unreadable == "stop":
                raise UserError(f"{error} (--unreadable skip goes on without it)") from error
            print(f"skipped: {error}", file=sys.stderr)
            skipped += 1
            continue
        held = np.stack([videos.fitted(clip, model.size, model.size, 0.5, 0.5, False) for clip in clips])
        with torch.no_grad():
            said = model(model.pixels(held), texts).softmax(-1).mean(0).cpu().numpy()
        best = _said(said, classes, options.top_k)
        rows += [(str(path), rank, name, f"{probability:.4f}") for rank, (name, probability) in enumerate(best, 1)]
        if len(strips) < 24:
            strips.append((held[0], path.name, best))
    if not rows:
        raise UserError(f"none of the {len(options.videos)} videos can be read")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["video", "rank", "class", "probability"])
    writer.writerows(rows)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    runfolder.write_text(target, text.getvalue())
    from open_mede import plots

    plots.strips(strips, options.output_dir / "strips.png")
    return {"videos": len(options.videos) - skipped, "skipped": skipped, "predictions": str(target)}


def _classes(given: Sequence[str]) -> tuple[str, ...]:
    """Names, or those in the one file that is named."""
    if len(given) == 1 and Path(given[0]).is_file():
        return lists.names_in(Path(given[0]))
    return tuple(given)


def _model(source: str) -> tuple[VideoTextClassifier, Config]:
    """Of a run folder, with its config; of a folder or a hub id."""
    folder = Path(source)
    if (folder / "metrics.jsonl").exists() or (folder / "checkpoints").is_dir():
        folder = folder / "model"
        if not (folder / "config.json").is_file():
            raise UserError(f"{source} has no model yet: finish it with --resume first")
        config = runfolder.open_run(folder.parent, Config)
        if config.dataset == "features":
            raise UserError(f"{source} has learned of feature vectors, not of videos: give another run")
        return load_classifier(folder), config
    if source.startswith("runs/") and not folder.exists():
        raise UserError(f"--model {source}: no such run: train one, or give the hub id of a CLIP")
    return load_classifier(source), Config(dataset="", model=source)
