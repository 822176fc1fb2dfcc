"""Open-MeDe's claims as code. Margins, seeds and metrics were set before the claims were measured.

A seed decides the world, the initialisation and the order of clips. `tuning` counts trials at seeds from 100 on, that
is on other worlds, and on held-out known classes alone (benchmarks/tuning.py), and pilots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metazoo.claims import Claim

from open_mede.config import PRESETS, Config

CACHE_VARIABLE = "METAZOO_CACHE"  # folder of the first phase's CLIPs [default: ~/.cache/metazoo]
_SOURCES = ("config", "data", "model", "sprites", "stripes", "train")
GROUPS = ("base_in", "base_out", "novel_in", "novel_out")
LEVEL = 0.02
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
        step that a pair of batches would take, gain and cosine_at, means over training, and gain_at_level and
        cosine_at_level, where the query batch's loss is near ``LEVEL``; of sprites, shuffled_base_out, with the frames
        of all clips in one other order, and its share of base_out; seconds_of_training.
    """
    import tempfile
    import time

    import numpy as np
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
            found |= {
                f"{average}_gain_{name}": found[f"{average}_{name}"] - found[f"last_{name}"] for name in run.data.tests
            }
        found |= {f"gwa_over_swa_{name}": found[f"gwa_{name}"] - found[f"swa_{name}"] for name in run.data.tests}
        if config.dataset == "sprites":
            run.use()
            held = run.data.tests["base_out"]
            order = np.random.default_rng([seed, 12]).permutation(held.array.shape[1])
            shuffled = evaluator({"base_out": replace(held, array=held.array[:, order])})["base_out"]
            found |= {"shuffled_base_out": shuffled, "shuffled_share": shuffled / max(found["base_out"], 1e-9)}
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
    log = np.log(loss.clip(1e-12) / LEVEL)
    near = np.abs(log) < np.log(2)  # between half and twice the level: a line through them, read off at it
    if near.sum() >= 5:
        found |= {
            "gain_at_level": float(np.polyfit(log[near], gain[near], 1)[1]),
            "cosine_at_level": float(np.polyfit(log[near], cosine[near], 1)[1]),
        }
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
        "distill": replace(base, method="distill", average="swa"),
    }
    return {name: replace(arm, **fields.get(name.replace("-", "_"), {})) for name, arm in arms.items()}


_SMALL = replace(PRESETS["small"], watch_every=0)
_FEATURES = arms_of(_SMALL)
_WATCHED = {name: replace(_FEATURES[name], watch_every=10) for name in ("two-batch", "meta")}
# with a residual ReLU adapter: half the clips, 12 epochs
_MLP = arms_of(replace(_SMALL, model="mlp", clips=1_000, epochs=12))
_MLP["meta-second"] = replace(_MLP["meta"], order="second")
# a rate that does not fall, small batches, noisy motions
_NOISY = arms_of(
    replace(_SMALL, lr=0.5, schedule="constant", batch=8, clips=600, epochs=20, motion_noise=1.5)
)  # fmt: skip
# on Kinetics: the more frequent half of the classes is trained on; `open-mede make-ooc` makes tests out of context
_PAPER = arms_of(replace(PRESETS["paper"], split="frequent"))


def sprite_arms(**fields: Mapping[str, Any]) -> dict[str, Config]:
    """The same on moving sprites."""
    return arms_of(PRESETS["sprites"], **fields)


# Rates of the pixel level: benchmarks/tuning.py.
_SPRITES = sprite_arms(
    finetune={"lr": 3e-3}, two_batch={"lr": 1e-3}, meta={"lr": 1e-3, "alpha": 0.2}, l2_sp={"lr": 3e-3},
    interp={"lr": 3e-3}, distill={"lr": 1e-3},
)  # fmt: skip
# with pilots, in which the world, the same for all arms, was settled: with fine-tuning, and with CLIP as it is
_TRIALS = {"frozen": 4, "finetune": 14, "two-batch": 2, "meta": 4, "l2-sp": 2, "interp": 2, "distill": 2}
_CHANCE, _CHANCE_PIXELS = 100 / 20, 100 / 30


def _claim(name: str, arms: Mapping[str, Config], names: tuple[str, ...], **more: Any) -> Claim:
    paper = {**_PAPER, "meta-second": replace(_PAPER["meta"], order="second", checkpointing=False)}
    if "gain_at_level" in more["metric"] or "cosine_at_level" in more["metric"]:
        paper = {one: replace(paper[one], watch_every=10) for one in names}
    return Claim(
        name=name, version=1, measure=measure,
        arms={"small": {one: arms[one] for one in names}, "paper": {one: paper[one] for one in names}},
        **{"treatment": names[-1], "baseline": names[0], "seeds": 10, "margin": 0.0, "chance": _CHANCE,
           "tuning": dict.fromkeys(names, 1), **more},
    )  # fmt: skip


def _value(name: str, arms: Mapping[str, Config], arm: str, **more: Any) -> Claim:
    return _claim(name, arms, (arm,), **{"baseline": None, "compare": "value", **more})


def _pixels(claim: Claim) -> Claim:
    """On moving sprites: five seeds, and the trials that were spent."""
    tuning = {arm: _TRIALS[arm] for arm in claim.arms["small"]}
    chance = None if claim.chance is None else _CHANCE_PIXELS
    return replace(claim, seeds=5, tuning=tuning, chance=chance)


_ABLATION = "Table of the ablation, UCF-101 in context and UCF-SCUBA"
_STATIC = "Section 1, Figure 1"
_ALL = ("base_in", "base_out", "novel_in", "novel_out")
_IN = {"metric": "novel_in", "also": ("base_in", "base_out", "novel_out")}
_OUT = {"metric": "novel_out", "better": "less", "also": ("base_in", "base_out", "novel_in")}

CLAIMS: tuple[Claim, ...] = (
    # the diagnosis: a pull back to CLIP
    _claim(
        "anchor-in-context", _FEATURES, ("finetune", "l2-sp"), flagship=True, **_IN, source=_STATIC,
        statement="A pull back to CLIP's weights lifts accuracy on novel classes in their context",
        paper="Open-VCLIP 83.3, FROSTER 82.9 against frozen CLIP 73.8 % (UCF-101)",
    ),
    _claim(
        "anchor-out-of-context", _FEATURES, ("finetune", "l2-sp"), flagship=True, **_OUT, source=_STATIC,
        statement="The same pull lowers it out of context, over the same motions",
        paper="Open-VCLIP 33.2, FROSTER 34.1 against cross-batch training 41.8 % (UCF-SCUBA)",
    ),
    _claim(
        "anchor-in-context-mlp", _MLP, ("finetune", "l2-sp"), **_IN, source=_STATIC,
        statement="With a residual adapter, the pull lifts novel classes in context, too",
        paper="not stated for this learner",
    ),
    _claim(
        "anchor-out-of-context-mlp", _MLP, ("finetune", "l2-sp"), **_OUT, source=_STATIC,
        statement="With a residual adapter, the pull lowers novel classes out of context, too",
        paper="not stated for this learner",
    ),
    *(
        _pixels(_claim(
            f"{arm}-{place}-sprites", _SPRITES, ("finetune", arm), **held, source=_ABLATION,
            statement=f"On moving sprites, {title} {does}",
            paper=paper,
        ))
        for arm, title, paper in (
            ("interp", "Open-VCLIP's interpolation", "Open-VCLIP 83.3 in, 33.2 % out; fine-tuning not given"),
            ("distill", "FROSTER's distillation", "FROSTER 82.9 in, 34.1 % out of context; fine-tuning not given"),
        )
        for place, held, does in (
            ("in-context", _IN, "lifts novel classes in their context"),
            ("out-of-context", _OUT, "lowers novel classes out of context"),
        )
    ),
    # the method
    _claim(
        "meta-gwa-over-anchor-out", _FEATURES, ("l2-sp", "meta"), metric="novel_out", also=_ALL[:3], source=_ABLATION,
        statement="Cross-batch training with Gaussian averaging is above a learner pulled back to CLIP, out of context",
        paper="44.7 against 33.2 (Open-VCLIP) and 34.1 % (FROSTER)",
    ),
    _pixels(_claim(
        "meta-gwa-over-interp-out-sprites", _SPRITES, ("interp", "meta"), metric="novel_out", also=_ALL[:3],
        source=_ABLATION,
        statement="On moving sprites, cross-batch training with Gaussian averaging is above Open-VCLIP's interpolation "
        "out of context",
        paper="44.7 against 33.2 %",
    )),
    _pixels(_claim(
        "meta-gwa-over-frozen-out-sprites", _SPRITES, ("frozen", "meta"), metric="novel_out", also=_ALL[:3],
        source=_ABLATION,
        statement="On moving sprites, cross-batch training with Gaussian averaging is above frozen CLIP out of context",
        paper="44.7 against 42.0 %",
    )),
    _pixels(_claim(
        "meta-gwa-over-interp-base-out-sprites", _SPRITES, ("interp", "meta"), metric="base_out",
        also=("base_in", "novel_in", "novel_out"), source=_ABLATION,
        statement="On moving sprites, that holds against the interpolation on the classes trained on, too",
        paper="44.7 against 33.2 %, on classes not trained on",
    )),
    # cross-batch training against as much data an update
    *(
        _claim(
            f"meta-over-two-batch-{place}{suffix}", arms, names, metric=f"last_novel_{place}",
            treatment="meta", also=("last_base_in", "last_base_out"), source="Section 3.2",
            statement=f"{title}judging a step on the next batch is above training on both at once, on novel classes "
            f"{'in' if place == 'in' else 'out of'} context",
            paper="not compared: the paper has no control of equal cost",
        )
        for arms, suffix, names, title in (
            (_FEATURES, "", ("two-batch", "meta"), "At equal cost, "),
            (_MLP, "-mlp", ("two-batch", "meta", "meta-second"), "With a residual adapter, "),
        )
        for place in ("in", "out")
    ),
    *(
        _pixels(_claim(
            f"meta-over-two-batch-{place}-sprites", _SPRITES, ("two-batch", "meta"), metric=f"last_novel_{place}",
            also=("last_base_in", "last_base_out", "seconds_of_training"), source="Section 3.2",
            statement="On moving sprites, judging a step on the next batch is above training on both at once, on novel "
            f"classes {'in' if place == 'in' else 'out of'} context",
            paper="not compared: the paper has no control of equal cost",
        ))
        for place in ("in", "out")
    ),
    _claim(
        "inner-step-gain", _WATCHED, ("two-batch", "meta"), metric="gain_at_level", better="less", chance=None,
        also=("gain", "cosine_at", "train_loss"), source="Section 3.2",
        statement="At equal query loss, a step on one batch lowers the loss of the next one more, after cross-batch "
        "training",
        paper="not stated; it is what the objective asks for",
    ),
    _claim(
        "gradients-agree", _WATCHED, ("two-batch", "meta"), metric="cosine_at_level", chance=None,
        also=("gain", "cosine_at", "train_loss"), source="Section 3.2",
        statement="At equal query loss, gradients of consecutive batches agree more, after cross-batch training",
        paper="not stated; it follows by Taylor's expansion",
    ),
    # Gaussian weight averaging
    *(
        _value(
            f"gwa-not-worse-{place}", _FEATURES, "meta", metric=f"gwa_gain_novel_{place}", margin=-1.0, chance=None,
            also=(f"last_novel_{place}", f"gwa_novel_{place}", f"swa_novel_{place}"), source="Section 3.3",
            statement="With a rate that falls to zero, the Gaussian average is at most a point below the last epoch, "
            f"on novel classes {'in' if place == 'in' else 'out of'} context",
            paper=f"+{'1.2' if place == 'in' else '2.9'} points",
        )
        for place in ("in", "out")
    ),
    _value(
        "gwa-gain-noisy-anchored", _NOISY, "l2-sp", metric="gwa_gain_novel_in", margin=5.0, chance=None,
        also=("last_novel_in", "gwa_novel_in", "swa_novel_in", "gwa_gain_novel_out"), source="Section 3.3",
        statement="With a constant rate, small batches and a pull back to CLIP, the Gaussian average is 5 points above "
        "the last epoch",
        paper="+1.2 in, +2.9 points out of context",
    ),
    _value(
        "gwa-gain-noisy", _NOISY, "meta", metric="gwa_gain_novel_in", chance=None,
        also=("last_novel_in", "gwa_novel_in", "swa_novel_in", "gwa_gain_novel_out"), source="Section 3.3",
        statement="Without that pull, cross-batch training in the same setting gains by the Gaussian average, too",
        paper="+1.2 in, +2.9 points out of context",
    ),
    _value(
        "gwa-over-swa-noisy-anchored", _NOISY, "l2-sp", metric="gwa_over_swa_novel_in", chance=None,
        also=("gwa_novel_in", "swa_novel_in"), source="Section 3.3",
        statement="With a constant rate, small batches and a pull back to CLIP, the Gaussian average is above the "
        "uniform one",
        paper="not stated here; Gaussian weights are preferred to uniform ones",
    ),
    *(
        _pixels(_value(
            f"gwa-gain-{place}-sprites", _SPRITES, "meta", metric=f"gwa_gain_novel_{place}", chance=None,
            also=(f"last_novel_{place}", f"gwa_novel_{place}", f"swa_novel_{place}"), source=_ABLATION,
            statement="On moving sprites, cross-batch training gains by the Gaussian average on novel classes "
            f"{'in' if place == 'in' else 'out of'} context",
            paper=f"{'82.5 to 83.7' if place == 'in' else '41.8 to 44.7'} %",
        ))
        for place in ("in", "out")
    ),
    # what an image model starts with
    _value(
        "frozen-at-chance-out", _FEATURES, "frozen", metric="novel_out", better="less", margin=_CHANCE + 1,
        also=("base_in", "base_out", "novel_in"), source=_STATIC,
        statement="An image model is at chance out of context, to a point",
        paper="CLIP falls from 73.8 to 42.0 % (UCF-101, UCF-SCUBA)",
    ),
    _value(
        "frozen-in-context", _FEATURES, "frozen", metric="novel_in", margin=75.0, also=("base_in",), source=_STATIC,
        statement="An image model is above 75 % in context",
        paper="CLIP has 73.8 % (UCF-101)",
    ),
    _claim(
        "finetune-lifts-out", _FEATURES, ("frozen", "finetune"), metric="novel_out", margin=10.0, also=_ALL[:3],
        source=_STATIC,
        statement="Fine-tuning lifts novel classes by 10 points out of context",
        paper="not stated",
    ),
    _pixels(_claim(
        "finetune-lifts-base-out-sprites", _SPRITES, ("frozen", "finetune"), metric="base_out", margin=5.0,
        also=("base_in", "novel_in", "novel_out"), source=_STATIC,
        statement="On moving sprites, fine-tuning lifts classes trained on by 5 points out of context",
        paper="not stated",
    )),
    _pixels(_value(
        "order-of-frames-counts-sprites", _SPRITES, "finetune", metric="shuffled_share", better="less", margin=0.7,
        chance=None, also=("base_out", "shuffled_base_out"), source="Ours: clips with their frames in another order",
        statement="With frames in another order, at most 70 % of fine-tuning's accuracy out of context is left",
        paper="not stated",
    )),
)  # fmt: skip


def plot(folder: Path, scale: str) -> None:
    """Beside the effects: arms by seed, in context and out of it, of feature vectors and of moving sprites."""
    import json

    from metazoo.runfolder import config_to_dict

    from open_mede import plots

    by_name = {claim.name: claim for claim in CLAIMS if scale in claim.arms}
    sets = {"features": _FEATURES, "sprites": _SPRITES} if scale == "small" else {"videos": _PAPER}
    found: dict[str, dict[str, dict[int, dict[str, Any]]]] = {name: {} for name in sets}
    for path in sorted((folder / "cells").glob("*.json")):
        cell = json.loads(path.read_text(encoding="utf-8"))
        claim = by_name.get(cell["claim"])
        if claim is None or cell["scale"] != scale or cell["version"] != claim.version or cell["seed"] >= claim.seeds:
            continue
        for name, arms in sets.items():
            arm = arms.get(cell["arm"])
            if arm is not None and config_to_dict(arm) == cell["config"]:
                found[name].setdefault(cell["arm"], {})[cell["seed"]] = cell["metrics"]
    for name, arms in sets.items():
        held = {arm: found[name][arm] for arm in arms if arm in found[name]}
        metrics = [one for one in GROUPS if held and all(one in row for of in held.values() for row in of.values())]
        if metrics:
            titles = {
                one: ("trained on, " if one.startswith("base") else "novel, ")
                + ("in context" if one.endswith("in") else "out of context")
                for one in metrics
            }
            panels = {
                titles[one]: {arm: [of[seed][one] for seed in sorted(of)] for arm, of in held.items()}
                for one in metrics
            }
            chance = _CHANCE if name == "features" else _CHANCE_PIXELS
            plots.arms(
                panels, folder / f"{scale}-{name}.png", label="accuracy [%]", chance=dict.fromkeys(panels, chance)
            )  # fmt: skip
