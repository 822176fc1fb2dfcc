"""Settings of an open-mede run: clips and their classes, CLIP and its temporal part, cross-batch training, averages."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError
from tyro.conf import Positional

DATASETS = ("features", "sprites", "kinetics", "ucf101", "hmdb51", "ssv2")
"""Names of data sets; anything else is a .csv or a folder of class folders."""
AVERAGES = ("last", "gwa", "swa", "ema")


def _at_least(options: object, **least: float) -> None:
    for name, value in least.items():
        found = getattr(options, name)
        if found is not None and not value <= found < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {found}: give {value} or more")


def _between(options: object, low: float, high: float, *names: str) -> None:
    for name in names:
        if not low <= getattr(options, name) <= high:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(options, name)}: give {low:g} to {high:g}")


def _above_zero(options: object, *names: str) -> None:
    for name in names:
        found = getattr(options, name)
        if found is not None and not 0 < found < float("inf"):
            raise UserError(f"--{name.replace('_', '-')} is {found}: give a number above 0")


def check_templates(templates: tuple[str, ...]) -> None:
    """Raise UserError unless each has one place for a class name, and no other."""
    if not templates:
        raise UserError('--templates: none given: give one or more, as "{}"')
    for template in templates:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise UserError(f"--templates {template!r}: give one {{}} for the class name, as 'a video of {{}}.'")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Clips and their classes, CLIP and its temporal part, cross-batch training, averages."""

    dataset: str = "features"
    """features (generated vectors), sprites (generated clips), kinetics, ucf101, hmdb51, ssv2 (videos in --data-dir
    with their official lists), a .csv with columns video, label and, if any, split (train or test), or a folder with a
    folder of videos for each class."""
    data_dir: str | None = None
    """Folder of videos [default: beside the .csv]. Where scuba/videos.csv is in it, as make-ooc writes it, tests are in
    context and out of it."""
    list_number: int = 1
    """Which of the official lists (ucf101, hmdb51)."""
    split: Literal["all", "frequent"] = "all"
    """Classes that are trained on: all, or the half with the most training videos, the others being novel (videos)."""
    base_classes: str | None = None
    """File with the names of classes to be trained on, one a line (videos)."""
    novel_classes: str | None = None
    """File with the names of novel classes, one a line [default: all others; videos]."""
    shots: int | None = None
    """Training videos of each class [default: all; videos]."""
    clips: int = 2_000
    """Training clips (features, sprites)."""
    test_clips: int = 2_000
    """Clips of each test set (features, sprites)."""
    draws: int = 5
    """Backgrounds on which each test clip is seen out of context (sprites)."""
    ratio: float = 0.95
    """Probability that a training clip has its own class's context (features, sprites)."""
    motion_noise: float = 1.0
    """Standard deviation of motions around their class's (features)."""
    holdout: int = 0
    """Classes of those trained on that are kept for choosing settings instead: tests are on these alone."""
    debiased: bool = False
    """Class names without their textures (sprites)."""
    seed: int = 0
    """Seed of worlds, initialisation and order."""

    model: str = "linear"
    """linear or mlp (features), tiny (sprites: a CLIP, first trained on single frames), or the hub id or folder of any
    CLIP or X-CLIP of transformers."""
    hidden: int = 128
    """Units of the residual adapter (mlp)."""
    width: int = 64
    """Width of both towers (tiny)."""
    vision_layers: int = 3
    """Layers of the image tower (tiny)."""
    text_layers: int = 2
    """Layers of the text tower (tiny)."""
    heads: int = 4
    """Attention heads (tiny)."""
    patch: int = 8
    """Pixels of a patch's side, of 32 (tiny)."""
    image_steps: int = 0
    """First steps, on single frames and what is on them: they make a static-biased CLIP (tiny)."""
    image_batch: int = 64
    """Frames in each of these, over all processes."""
    image_lr: float = 1e-3
    """Learning rate of these."""
    expand: bool = True
    """A frame attends to the frames before and after it, too (CLIP)."""
    border: Literal["mask", "zero"] = "mask"
    """First and last frame: leave the missing neighbour out; or give it keys and values of zero, as Open-VCLIP does."""
    adapter: int = 0
    """Width of temporal adapters beside attention, which tell the order of frames; 0: none (CLIP)."""
    difference: bool = False
    """Also embed what a frame changes, patch by patch (CLIP)."""
    trained: Literal["vision", "adapter", "lora"] = "vision"
    """All of the vision side; adapters and differences alone; or low-rank updates of queries and values. Not texts."""
    lora_rank: int = 8
    """Rank of low-rank updates."""
    templates: tuple[str, ...] = ("{}",)
    """Prompts of a class; its text is the mean of all."""

    frames: int = 8
    """Frames of a clip (videos)."""
    stride: int = 16
    """Video frames from one to the next; less where a video is too short."""
    views: int = 3
    """Clips of a video at test time, evenly spaced; their probabilities are averaged."""
    jitter: tuple[int, int] = (224, 256)
    """Shorter side that training clips are scaled to, at random between these, before they are cropped."""
    flip: bool = False
    """Mirror half of the training clips; not where left and right make a class."""
    unreadable: Literal["stop", "skip"] = "stop"
    """A video that cannot be read: stop, or take the next one in its place; it is named and counted."""
    workers: int = 4
    """Threads that read videos, one batch ahead."""

    method: Literal["frozen", "finetune", "two-batch", "meta", "interp", "distill", "l2-sp"] = "meta"
    """CLIP as it is; cross-entropy; on two batches at once, at the cost of meta; cross-batch meta-optimisation;
    Open-VCLIP's interpolated weights; FROSTER's distillation; or an L2 anchor at CLIP's weights."""
    alpha: float = 0.5
    """Rate of the inner step (meta)."""
    delta: float = 1.0
    """Weight of the query batch's gradient (meta, two-batch)."""
    order: Literal["first", "second"] = "first"
    """Leave the inner step's Hessian out, or not (meta)."""
    query: Literal["next", "shuffle", "class-disjoint"] = "next"
    """Query batch: the next of the epoch, one of another order, or one of classes that the support batch lacks."""
    anchor: float = 0.02
    """Weight of the squared distance to CLIP's weights (l2-sp)."""
    distill_weight: float = 2.0
    """Weight of the distance to CLIP's features (distill)."""
    interp_max: float = 0.6
    """Share of CLIP's weights is drawn from 0 to this, each step (interp)."""
    interp_weight: float = 0.5
    """Weight of the loss at the interpolated weights (interp)."""
    mix: float = 0.0
    """Share of CLIP's weights in the final ones; Open-VCLIP has 0.5."""

    epochs: int = 30
    """Passes over the training clips."""
    batch: int = 32
    """Clips in a batch, over all processes."""
    micro_batch: int | None = None
    """Clips whose activations are held at a time, in a process [default: all of its share]."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with momentum, or AdamW."""
    lr: float = 0.1
    """Its learning rate β."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 0.0
    """Of AdamW, not on biases and norms."""
    warmup_epochs: float = 0.0
    """Epochs of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "cosine"
    """Learning rate after it."""
    clip: float = 0.0
    """Largest norm of the gradient; 0: no limit."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision; weights and averages stay in 32 bits."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory (CLIP)."""
    watch_every: int = 0
    """Steps between two measurements of what the inner step does, at the cost of a step; 0: never. A multiple of
    --log-every, or they are not written."""

    average: Literal["gwa", "swa", "ema", "last"] = "gwa"
    """Final weights: Gaussian-weighted, uniform or exponential average of the epochs', or the last."""
    mu: float | None = None
    """Epoch of the largest Gaussian weight [default: half of them]."""
    sigma: float | None = None
    """Its width, in epochs [default: a sixth of them]."""
    swa_start: int = 1
    """First epoch of the uniform average."""
    ema_decay: float = 0.7
    """Of the exponential average, an epoch."""

    def __post_init__(self) -> None:
        _at_least(
            self, list_number=1, shots=1, clips=1, test_clips=1, draws=1, holdout=0, seed=0, hidden=1, width=4,
            vision_layers=1, text_layers=1, heads=1, patch=1, image_steps=0, image_batch=2, adapter=0, lora_rank=1,
            frames=1, stride=1, views=1, workers=1, alpha=0, delta=0, anchor=0, distill_weight=0, interp_weight=0,
            epochs=1, batch=1, micro_batch=1, momentum=0, weight_decay=0, warmup_epochs=0, clip=0, watch_every=0,
            motion_noise=0, swa_start=1,
        )  # fmt: skip
        _above_zero(self, "lr", "image_lr", "sigma")
        _between(self, 0, 1, "ratio", "interp_max", "mix", "ema_decay", "momentum")
        check_templates(self.templates)
        if self.mu is not None and not math.isfinite(self.mu):
            raise UserError(f"--mu is {self.mu}: give a number")
        self._check_model()
        if self.jitter[0] > self.jitter[1] or self.jitter[0] < 1:
            raise UserError(f"--jitter is {self.jitter[0]} {self.jitter[1]}: give the smaller first")
        if self.swa_start > self.epochs:
            raise UserError(f"--swa-start is {self.swa_start}, --epochs {self.epochs}: give one of the epochs")
        if self.warmup_epochs > self.epochs:
            raise UserError(f"--warmup-epochs is {self.warmup_epochs}, --epochs {self.epochs}: give fewer")
        if self.order == "second" and self.checkpointing:
            raise UserError("--order second and --checkpointing: activations would be computed again at other weights: "
                            "leave one out")  # fmt: skip
        if self.order == "second" and self.method != "meta":
            raise UserError(f"--order second is for --method meta, this is {self.method}: leave it out")
        if self.query != "next" and self.method not in ("meta", "two-batch"):
            raise UserError(f"--query is for --method meta or two-batch, this is {self.method}: leave it out")
        if self.watch_every and self.method not in ("meta", "two-batch"):
            raise UserError(f"--watch-every is for --method meta or two-batch, this is {self.method}: leave it out")
        self._check_data()

    def _check_model(self) -> None:
        vectors, clip = self.model in ("linear", "mlp"), self.model not in ("linear", "mlp")
        if vectors != (self.dataset == "features"):
            wanted = "linear or mlp" if self.dataset == "features" else "tiny or a CLIP"
            raise UserError(f"--dataset {self.dataset} and --model {self.model}: give --model {wanted}")
        if self.model == "tiny" and (self.width % self.heads or 32 % self.patch):
            raise UserError(f"--width {self.width}, --patch {self.patch}: give a multiple of --heads, a divisor of 32")
        if self.image_steps and (self.model != "tiny" or self.dataset != "sprites"):
            raise UserError("--image-steps are for --dataset sprites --model tiny: give 0")
        if self.trained == "adapter" and not (self.adapter or self.difference) and clip:
            raise UserError("--trained adapter: there is none: give --adapter 8 or more, or --difference")
        if self.trained == "lora" and (self.average != "last" or self.mix or self.method in ("interp", "l2-sp")):
            raise UserError("--trained lora: factors of low rank cannot be averaged for their products: give "
                            "--average last, without --mix, and another method than interp and l2-sp")  # fmt: skip
        if not clip and (self.trained != "vision" or self.checkpointing):
            raise UserError(f"--trained and --checkpointing are for CLIPs, this is {self.model}: leave them out")

    def _check_data(self) -> None:
        videos = self.dataset not in ("features", "sprites")
        chosen = {"--split": self.split != "all", "--base-classes": self.base_classes, "--shots": self.shots}
        if not videos and any(chosen.values()):
            option = next(name for name, value in chosen.items() if value)
            raise UserError(f"{option} is for videos; --dataset {self.dataset} has known and novel classes of its own")
        if self.novel_classes is not None and self.base_classes is None:
            raise UserError("--novel-classes without --base-classes: give both, or the base classes alone")
        if self.split != "all" and self.base_classes is not None:
            raise UserError("--split and --base-classes: give one of them")
        if videos and self.dataset in DATASETS and self.data_dir is None:
            raise UserError(f"--dataset {self.dataset} needs --data-dir, the folder of its videos and lists")
        if self.debiased and self.dataset != "sprites":
            raise UserError(f"--debiased is for --dataset sprites, this is {self.dataset}: leave it out")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score a run: classes trained on and novel ones, in context and out of it, or other data sets' classes."""

    average: Literal["gwa", "swa", "ema", "last"] | None = None
    """Weights: which average [default: the run's]."""
    dataset: str | None = None
    """Another data set, whose classes are asked for: a name, .csv or folder [default: the run's own tests]."""
    data_dir: Path | None = None
    """Folder of its videos [default: beside the .csv]."""
    list_number: int = 1
    """Which of its official lists."""
    unreadable: Literal["stop", "skip"] | None = None
    """A video that cannot be read: stop, or leave it out; it is named and counted [default: the run's]."""
    without_trained: bool = False
    """Leave its classes that the run was trained on out, as the K600 protocol does."""
    views: int | None = None
    """Clips of a video [default: the run's]."""
    templates: tuple[str, ...] = ()
    """Prompts of a class [default: the run's]."""
    batch_size: int = 64
    """Clips or videos at a time, these with all their views."""
    plots: bool = True
    """Draw accuracies, classes, and frames with predictions."""

    def __post_init__(self) -> None:
        _at_least(self, views=1, batch_size=1, list_number=1)
        if self.templates:
            check_templates(self.templates)
        if self.dataset in ("features", "sprites"):
            raise UserError(f"--dataset {self.dataset} is a run's own: leave it out")
        if self.dataset is None and self.without_trained:
            raise UserError("--without-trained is for another --dataset: give it, or leave it out")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Say what happens in videos, among classes of your own."""

    videos: Positional[tuple[Path, ...]] = ()
    """Videos: files, folders of frames, or .npy [T, H, W, 3]."""
    model: str = ""
    """A run folder, a saved VideoTextClassifier, or the hub id or folder of a CLIP or X-CLIP."""
    classes: tuple[str, ...] = ()
    """Class names, or one file with a name a line."""
    templates: tuple[str, ...] = ()
    """Prompts of a class [default: the run's, or the plain name]."""
    top_k: int = 3
    """Classes that are given for each video."""
    frames: int | None = None
    """Frames of a clip [default: the run's, or 8]."""
    stride: int | None = None
    """Video frames from one to the next [default: the run's, or 16]."""
    views: int | None = None
    """Clips of a video [default: the run's, or 3]."""
    unreadable: Literal["stop", "skip"] = "stop"
    """A video that cannot be read: stop, or name it and go on."""
    output_dir: Path = Path("runs/open-mede-predict")
    """Folder for predictions.csv and strips.png."""
    overwrite: bool = False
    """Replace what is there."""

    def __post_init__(self) -> None:
        _at_least(self, top_k=1, frames=1, stride=1, views=1)
        if not self.videos:
            raise UserError("no videos: give videos, folders of frames, or .npy")
        for video in self.videos:
            if not video.exists():
                raise UserError(f"{video}: no such video")
        if not self.classes:
            raise UserError("no --classes: give class names, or a file with a name a line")
        if not self.model:
            raise UserError("no --model: give a run folder, or the hub id or folder of a CLIP or X-CLIP")
        if self.templates:
            check_templates(self.templates)


@dataclass(frozen=True, kw_only=True)
class AverageOptions:
    """Average the weights of checkpoints of one model, epoch by epoch, by Gaussian weights."""

    checkpoints: Positional[tuple[Path, ...]] = ()
    """.safetensors files, or folders with one model.safetensors, in order of epochs from 1 on."""
    mu: float | None = None
    """Epoch of the largest weight [default: half of them]."""
    sigma: float | None = None
    """Width, in epochs [default: a sixth of them]; inf: all alike."""
    output: Path = Path("averaged.safetensors")
    """File that is written."""
    overwrite: bool = False
    """Replace it if it is there."""

    def __post_init__(self) -> None:
        if len(self.checkpoints) < 2:
            raise UserError(f"{len(self.checkpoints)} checkpoints: give 2 or more, in order of epochs")
        for path in self.checkpoints:
            if not path.exists():
                raise UserError(f"{path}: no such checkpoint")
        if self.sigma is not None and not self.sigma > 0:
            raise UserError(f"--sigma is {self.sigma}: give a number above 0")


@dataclass(frozen=True, kw_only=True)
class SpriteOptions:
    """Write the moving sprites as files: videos.csv, videos/*.npy, masks/*.npy, base.txt and novel.txt."""

    output_dir: Path = Path("runs/open-mede-sprites")
    """An empty folder, or a new one."""
    clips: int = 600
    """Training clips."""
    test_clips: int = 120
    """Test clips of known classes, and of novel ones."""
    seed: int = 0
    """Seed of the world."""

    def __post_init__(self) -> None:
        _at_least(self, clips=1, test_clips=1, seed=0)


@dataclass(frozen=True, kw_only=True)
class ScubaOptions:
    """Put the foreground of videos onto striped backgrounds (SCUBA), as .npy, with a .csv of them."""

    videos: Path | None = None
    """A .csv with columns video, label."""
    data_dir: Path | None = None
    """Folder of its videos [default: beside the .csv]."""
    masks: Path | None = None
    """Folder of masks: for each video NAME a NAME.npy [T, H, W], or a folder NAME of images, one a frame."""
    boxes: Path | None = None
    """Or a .csv with columns video, frame, x1, y1, x2, y2: boxes of actors, in pixels, frames from 0."""
    draws: int = 5
    """Backgrounds of each video."""
    seed: int = 0
    """Seed of the backgrounds."""
    output_dir: Path = Path("runs/open-mede-scuba")
    """An empty folder, or a new one."""
    unreadable: Literal["stop", "skip"] = "stop"
    """A video or mask that cannot be read: stop, or name it and go on."""

    def __post_init__(self) -> None:
        _at_least(self, draws=1, seed=0)
        if self.videos is None:
            raise UserError("no --videos: give a .csv with columns video, label")
        if not self.videos.is_file():
            raise UserError(f"--videos {self.videos}: no such file")
        if (self.masks is None) == (self.boxes is None):
            raise UserError("give one of --masks and --boxes")
        for option, path in (("--masks", self.masks), ("--boxes", self.boxes)):
            if path is not None and not path.exists():
                raise UserError(f"{option} {path}: no such file or folder")


_SPRITES = Config(
    dataset="sprites", model="tiny", clips=1_000, test_clips=300, draws=2, ratio=0.8, image_steps=800, adapter=16,
    difference=True, epochs=10, optimizer="adamw", lr=2e-3, weight_decay=0.01, clip=1.0, warmup_epochs=1, alpha=2e-2,
)  # fmt: skip

# FROSTER's and Open-VCLIP's runs: 64 videos over 8 GPUs, 22 epochs, AdamW; alpha is not published.
_PAPER = Config(
    dataset="kinetics", data_dir="kinetics", model="openai/clip-vit-base-patch16", epochs=22, batch=64,
    optimizer="adamw", lr=3.33e-6, weight_decay=0.01, warmup_epochs=2, clip=1.0, alpha=3.33e-5,
    precision="bf16", checkpointing=True, workers=8, swa_start=2, unreadable="skip",
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(),
    "paper": _PAPER,
    "sprites": _SPRITES,
    "base-to-novel": replace(_PAPER, dataset="ucf101", data_dir="ucf101", split="frequent", shots=16, epochs=12),
    "xclip": replace(_PAPER, model="microsoft/xclip-base-patch16", expand=False),
}
