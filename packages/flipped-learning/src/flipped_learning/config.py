"""Settings of a flipped-learning run: data and templates, seq2seq model, meta-training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError

TRAINED_HERE = ("tiny", "bag")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Data, model and meta-training."""

    dataset: tuple[str, ...] = ("generated",)
    """Data sets of meta-training: generated (reviews from a grammar, in the package); mr, cr, sst2, subj, mpqa, trec,
    rte (files in --data-dir or METAZOO_DATA, else from the hub); p3:NAME (all prompts of NAME in bigscience/P3);
    hub:ID or hub:ID:CONFIG; or the path of a .csv or .jsonl."""
    zero_shot: tuple[str, ...] = ()
    """Data sets that are only evaluated [default: none]."""
    data_dir: str | None = None
    """Folder of the file-based data sets."""
    templates: str | None = None
    """A templates.yaml in promptsource's form, or a folder of them as promptsource keeps it [default: those in the
    package, for the sets that it knows]."""
    template_names: tuple[str, ...] = ()
    """Only the templates of these names [default: all]."""
    pairs: int = 0
    """Take the labels of two-class sentiment sets from the first N of six pairs of words (bad/good, terrible/great, …)
    instead of from the templates, which then must not list options; 0: the templates' own."""
    hide_words: bool = False
    """Delete the words of the seven novel pairs from all text that is trained on (a negative control)."""
    max_examples: int | None = None
    """Training examples of each data set [default: all]."""
    seed: int = 0
    """Seed of initialisation, splits and order."""

    method: Literal["flipped", "direct", "channel"] = "flipped"
    """What is scored: P(instruction | x, label), P(label | instruction, x), or P(instruction, x | label)."""
    unlikelihood: float = 1.0
    """Weight λ of the unlikelihood of the instruction given a wrong label (flipped)."""
    unlikelihood_on_sentinels: bool = False
    """Let sentinels and the end token count in the unlikelihood, too."""
    sentinels: bool = True
    """Mark in the source where the template has instruction text, and number the pieces in the target (flipped)."""

    model: str = "tiny"
    """tiny (a T5, pre-trained here by span corruption), bag (a bag-of-words scorer), or the hub id or folder of any
    AutoModelForSeq2SeqLM."""
    vocabulary: int = 500
    """Tokens of the tokenizer that is trained here (tiny), without the 100 sentinels; words (bag)."""
    width: int = 64
    """Width of the model (tiny, bag)."""
    layers: int = 2
    """Encoder layers, and as many decoder layers (tiny)."""
    heads: int = 4
    """Attention heads (tiny)."""
    feedforward: int = 128
    """Hidden units of the gated-GELU feed-forward layers (tiny)."""
    tied: bool = False
    """Score outputs by the input embedding instead of by one of their own, as T5 v1.1 does (tiny, bag)."""
    pretrain_steps: int = 800
    """Steps of span corruption before meta-training, once for all runs that agree in it (tiny)."""
    pretrain_batch_size: int = 32
    """Texts in such a step."""
    pretrain_lr: float = 3e-3
    """Learning rate of Adam in them."""
    pretrain_seed: int | None = None
    """Seed of initialisation and order of the pre-training [default: --seed]."""
    lora: int = 0
    """Rank of LoRA adapters (peft) on the attention's queries and values; the rest is frozen; 0: train all weights."""

    max_source: int = 512
    """Tokens of a source; what is longer is cut in the instance's text, never in instruction or label."""
    max_target: int = 128
    """Tokens of a target."""
    steps: int = 600
    """Meta-training steps."""
    batch_size: int = 32
    """Instances in one step, over all processes; flipped passes each twice, with the right and a wrong label."""
    optimizer: Literal["adam", "adafactor"] = "adam"
    """Adam, or Adafactor at a constant rate as the paper's."""
    lr: float = 2e-3
    """Learning rate."""
    warmup: int = 0
    """Steps over which it rises."""
    decay: bool = False
    """Let it fall linearly to 0 after the warm-up."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    dropout: float = 0.0
    """Dropout of the model."""
    accumulation: int = 1
    """Parts that a step's instances are cut into, to save memory."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the forward pass; T5 overflows in fp16, which is therefore not offered."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    fsdp: bool = False
    """Shard weights, gradients and Adam's state over the processes (fully_shard), for models that fit no GPU."""

    def __post_init__(self) -> None:
        at_least = {
            "pairs": 0, "vocabulary": 64, "width": 2, "layers": 1, "heads": 1, "feedforward": 1, "pretrain_steps": 0,
            "pretrain_batch_size": 1, "lora": 0, "max_source": 16, "max_target": 4, "steps": 0, "batch_size": 1,
            "warmup": 0, "accumulation": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        for name in ("lr", "pretrain_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0")
        for name in ("unlikelihood", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name} is {getattr(self, name)}: give 0 or a number above it")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: give 0 or more and less than 1")
        for name in ("seed", "pretrain_seed"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < 2**32:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 0 to {2**32 - 1}")
        if self.max_examples is not None and self.max_examples < 1:
            raise UserError(f"--max-examples is {self.max_examples}: give 1 or more")
        if not self.dataset:
            raise UserError("--dataset is empty: name at least one data set")
        if self.pairs > 6:
            raise UserError(f"--pairs is {self.pairs}: there are six seen pairs")
        if self.model == "bag" and self.pairs == 0:
            raise UserError("--model bag knows labels of one word only: give --pairs 1 to 6")
        if self.model == "bag" and (self.lora or self.precision != "no"):
            raise UserError("--model bag has neither --lora nor --precision")
        if self.model == "tiny" and self.width % self.heads:
            raise UserError(f"--width is {self.width}: give a multiple of --heads {self.heads}")
        if self.fsdp and (self.model == "bag" or self.lora or self.optimizer != "adam"):
            raise UserError(
                "--fsdp shards a seq2seq model under --optimizer adam: neither --lora nor the bag, and Adafactor takes "
                "no sharded tensors"
            )
        if self.tied and self.model not in TRAINED_HERE:
            raise UserError("--tied is for the models that are trained here: a checkpoint has its own embeddings")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Zero-shot evaluation of a run: accuracy and macro-F1 of each template, seen and novel label words."""

    examples: int | None = 300
    """Test examples of each data set [default of None: all]."""
    batch_size: int = 64
    """Pairs of instance and option that are scored at a time."""
    plots: bool = True
    """Draw scores by label pair and the calibration."""

    def __post_init__(self) -> None:
        for name in ("examples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """Classify texts zero-shot, with labels and an instruction of your own."""

    run: str = "runs/flipped-learning-small"
    """Run folder of `flipped-learning train`; or the hub id or folder of a seq2seq model, with --method."""
    texts: tuple[str, ...] = ()
    """Texts to classify."""
    file: Path | None = None
    """Or a file: a text on each line, or a .csv or .jsonl with the template's fields."""
    labels: tuple[str, ...] = ("negative", "positive")
    """Label words; any, seen in training or not."""
    template: str = "{{text}} What is the sentiment expressed in this text?"
    """Instruction with the instance's fields, in promptsource's form."""
    method: Literal["flipped", "direct", "channel"] | None = None
    """How to score [default: as the run was trained; flipped for a model that is no run]."""
    output: Path | None = None
    """Also write a .csv of text, label and log-likelihoods."""
    batch_size: int = 64
    """Pairs of text and label that are scored at a time."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"--batch-size is {self.batch_size}: give 1 or more")
        if bool(self.texts) == (self.file is not None):
            raise UserError("give --texts or --file, one of them")


@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """Macro-F1 of a run on its sentiment sets' test examples, by pair of label words."""

    run: Path = Path("runs/flipped-learning-small")
    """Run folder of `flipped-learning train`."""
    pairs: tuple[str, ...] = ()
    """Pairs as negative/positive, such as dull/lively [default: the six seen and the seven novel ones]."""
    examples: int | None = 300
    """Test examples of each data set [default of None: all]."""
    batch_size: int = 64
    """Pairs of instance and label that are scored at a time."""

    def __post_init__(self) -> None:
        for pair in self.pairs:
            words = pair.split("/")
            if len(words) != 2 or not all(word.strip() for word in words) or words[0] == words[1]:
                raise UserError(f"--pairs {pair!r}: give two different words with a slash, such as dull/lively")
        for name in ("examples", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more")


# Table of hyperparameters: batch 240, 5,000 steps, Adafactor at 5e-5, sources of 512 and targets of 128 tokens (model
# card of the 3B model); λ is not stated.
_PAPER = Config(
    dataset=(
        "p3:cos_e", "p3:dream", "p3:quail", "p3:quartz", "p3:social_i_qa", "p3:wiqa", "p3:cosmos_qa", "p3:qasc",
        "p3:quarel", "p3:sciq", "p3:amazon_polarity", "p3:app_reviews", "p3:imdb", "p3:rotten_tomatoes",
        "p3:yelp_review_full", "p3:ag_news", "p3:dbpedia_14", "p3:glue_mrpc", "p3:paws", "p3:glue_qqp",
    ),
    zero_shot=("p3:super_glue_rte", "p3:super_glue_cb", "p3:super_glue_wic", "p3:super_glue_copa"),
    templates="promptsource/templates", model="google/t5-v1_1-xl", steps=5000, batch_size=240, accumulation=30,
    optimizer="adafactor", lr=5e-5, dropout=0.1, gradient_checkpointing=True,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(pairs=3, decay=True),
    "paper": _PAPER,
    "paper-11b": replace(
        _PAPER, model="google/t5-v1_1-xxl", precision="bf16", fsdp=True, optimizer="adam", accumulation=5
    ),
    "base": replace(_PAPER, model="google/t5-v1_1-base", batch_size=128, accumulation=8, steps=2000, lr=1e-4),
    "bag": Config(
        dataset=("mr",), zero_shot=("cr",), pairs=3, model="bag", vocabulary=3000, width=24, batch_size=64,
        steps=800, lr=2e-3, clip=0.0,
    ),
}  # fmt: skip
