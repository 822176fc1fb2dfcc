"""Open-MeDe's claims as code. Margins, seeds and metrics were set before the claims were measured.

A seed decides the world, the initialisation and the order of clips. `tuning` counts trials at seeds from 100 on, that
is on other worlds, and on held-out known classes alone (benchmarks/tuning.py), and pilots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from open_mede.config import PRESETS, Config

CACHE_VARIABLE = "METAZOO_CACHE"  # folder of the first phase's CLIPs [default: ~/.cache/metazoo]
_SOURCES = ("config", "data", "model", "sprites", "stripes", "train")
GROUPS = ("base_in", "base_out", "novel_in", "novel_out")
LEVEL = 0.5
"""Training loss at which what an inner step does is compared."""


def start_of(config: Config, seed: int) -> Path:
    """Folder of the tiny CLIP after its single frames, which all arms of a seed share: it is trained once, and kept.

    Another seed, setting or version of the code or of torch is another CLIP.

    Raises:
        UserError: the cache folder cannot be written into.
    """
    import hashlib
    import json
    import os

    import filelock
    import torch
    import transformers
    from metazoo.errors import UserError
    from metazoo.options import RunOptions
    from metazoo.runfolder import config_to_dict

    from open_mede.train import train

    shared = ("width", "vision_layers", "text_layers", "heads", "patch", "image_steps", "image_batch", "image_lr")
    first = Config(
        dataset="sprites", model="tiny", method="frozen", expand=False, clips=2, test_clips=1, draws=1, seed=seed,
        **{name: getattr(config, name) for name in shared},
    )  # fmt: skip
    digest = hashlib.sha256(json.dumps([config_to_dict(first), torch.__version__, transformers.__version__]).encode())
    for name in _SOURCES:
        digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
    root = Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "metazoo") / "open-mede"
    entry = root / digest.hexdigest()[:32]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{entry}.lock"):
            if not (entry / "done").exists():
                again = (entry / "config.json").exists()
                train(first, RunOptions(output_dir=entry, log_every=25, checkpoint_every=200, resume=again))
                (entry / "done").touch()
    except OSError as error:
        raise UserError(
            f"cannot write into {root}: {error.strerror}; set {CACHE_VARIABLE} to a folder that can be written"
        ) from error
    return entry / "model"


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Train one arm, and score it on base and novel classes, in context and out of it.

    Returns:
        base_in, base_out, novel_in, novel_out, and what :func:`open_mede.metrics.summary` adds, of the final weights;
        last_, gwa_, swa_ before them, of these weights; gwa_gain_ and swa_gain_, these less the last; of the inner
        step that a pair of batches would take, gain and cosine_at, means over training, and relative_gain, at a
        training loss of ``LEVEL``; seconds_of_training.
    """
    import tempfile
    import time

    from metazoo.options import RunOptions

    from open_mede.evaluate import OpenVocabularyEvaluator
    from open_mede.train import train

    with tempfile.TemporaryDirectory() as scratch:
        config = replace(config, seed=seed)
        if config.image_steps:
            config = replace(config, model=str(start_of(config, seed)), image_steps=0)
        started = time.perf_counter()
        every = config.watch_every or 10
        run = train(config, RunOptions(output_dir=Path(scratch) / "run", log_every=every, checkpoint_every=10**9))
        seconds = time.perf_counter() - started
    found: dict[str, Any] = {"seconds_of_training": seconds}
    evaluator = OpenVocabularyEvaluator(run.use(), config.templates, 256)
    found |= evaluator(run.data.tests)
    if run.weights:
        for average in ("last", "gwa", "swa"):
            run.use(average)
            found |= {f"{average}_{name}": value for name, value in evaluator(run.data.tests).items()}
        for average in ("gwa", "swa"):
            found |= {f"{average}_gain_{name}": found[f"{average}_{name}"] - found[f"last_{name}"] for name in GROUPS}
        found |= {f"gwa_over_swa_{name}": found[f"gwa_{name}"] - found[f"swa_{name}"] for name in GROUPS}
    return found | _watched(run.metrics)


def _watched(rows: list[dict[str, Any]]) -> dict[str, float]:
    """What the inner step would do: over training, and at one training loss, that of the query batch before it."""
    import numpy as np

    held = [row for row in rows if "gain" in row]
    if not held:
        return {}
    loss = np.array([row["query_loss_at"] for row in held])
    gain = np.array([row["gain"] for row in held])
    cosine = np.array([row["cosine_at"] for row in held])
    found = {"gain": float(gain.mean()), "cosine_at": float(cosine.mean()), "train_loss": float(loss.mean())}
    near = np.abs(np.log(loss.clip(1e-12) / LEVEL)) < np.log(2)  # between half and twice the level
    if near.any():
        found |= {"gain_at_level": float(gain[near].mean()), "cosine_at_level": float(cosine[near].mean())}
    return found


def arms_of(base: Config, **fields: Mapping[str, Any]) -> dict[str, Config]:
    """CLIP as it is, cross-batch training, its equal-cost control, fine-tuning, and pulls back to CLIP.

    Args:
        base: fine-tuning.
        fields: of an arm, where they are not the base's.
    """
    arms = {
        "frozen": replace(base, method="frozen", average="last"),
        "finetune": replace(base, method="finetune", average="last"),
        "two-batch": replace(base, method="two-batch", average="last"),
        "meta": replace(base, method="meta", average="gwa"),
        "l2-sp": replace(base, method="l2-sp", average="last"),
        "interp": replace(base, method="interp", average="swa", mix=0.5),
        "distill": replace(base, method="distill", average="last"),
    }
    return {name: replace(arm, **fields.get(name.replace("-", "_"), {})) for name, arm in arms.items()}


_SMALL = replace(PRESETS["small"], watch_every=0)
_FEATURES = arms_of(_SMALL)
_WATCHED = {name: replace(_FEATURES[name], watch_every=10) for name in ("two-batch", "meta")}
# with a residual ReLU adapter: half the clips, 12 epochs
_MLP = arms_of(replace(_SMALL, model="mlp", clips=1_000, epochs=12))
# a rate that does not fall, small batches, noisy motions
_NOISY = arms_of(
    replace(_SMALL, lr=0.5, schedule="constant", batch=8, clips=600, epochs=20, motion_noise=1.5)
)  # fmt: skip
_PAPER = arms_of(PRESETS["paper"])


def sprite_arms(**fields: Mapping[str, Any]) -> dict[str, Config]:
    """The same on moving sprites."""
    return arms_of(PRESETS["sprites"], **fields)
