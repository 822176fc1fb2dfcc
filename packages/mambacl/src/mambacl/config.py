"""Settings of a MambaCL run: episodes, sequence model, meta-training."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError

RECURRENT = ("mamba", "linear_transformer", "performer")
SEQUENCE = (*RECURRENT, "transformer")
CLASSES_ONLY = ("prototype", "gemcl")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Episodes, learner and meta-training of MambaCL."""

    dataset: str = "features"
    """features (Gaussian classes) and sine, generated; omniglot20 (242 real characters at 20 x 20, in the package);
    omniglot, cifar100, casia (--data-dir, METAZOO_DATA or the hub); sentences (frozen features of six corpora); or the
    path of your own .csv, .npz, or folder of images (a folder for each class)."""
    data_dir: str | None = None
    """Folder of the file-based data sets."""
    target: str | None = None
    """Column of the class in your own .csv [default: the last one]."""
    variant: Literal["classes", "rotation", "completion"] = "classes"
    """What is asked of images: their class, the angle that they were rotated by, or their lower half."""
    frozen: str | None = None
    """Frozen encoder whose features are the inputs: hub id or folder of a CLIP (images) or of a sentence encoder
    (sentences) [default: none for images, MiniLM of the extra minilm for sentences]."""
    meta_test_classes: int | None = None
    """Classes kept for meta-test [default: what the data set's protocol says, else a fifth of them]."""
    dimension: int = 8
    """Columns of the generated features."""
    spread: float = 0.3
    """Standard deviation of the generated features within a class (class means: 1)."""
    image_size: int = 32
    """Images are brought to this height and width [pixels]."""
    seed: int = 0
    """Seed of initialisation and episodes."""

    tasks: int = 3
    """Tasks T of an episode: classes, or functions."""
    shots: int = 2
    """Training examples S of a task, in the stream."""
    test_shots: int = 1
    """Queries of a task, after the stream."""
    queries: int | None = None
    """Queries of an episode, from random tasks [default: --test-shots of every task]."""
    vocabulary: int = 6
    """Symbols that codes of classes are drawn from; at least the largest T that will ever be asked for."""

    method: Literal[
        "mamba", "transformer", "linear_transformer", "performer", "oml", "prototype", "gemcl", "offline"
    ] = "mamba"
    """The learner."""
    width: int = 32
    """Width d of tokens."""
    blocks: int = 2
    """Number of blocks."""
    state_size: int = 16
    """State N of each channel (mamba)."""
    expand: int = 2
    """Channels of a block over its width (mamba)."""
    conv: int = 4
    """Width of the causal convolution (mamba)."""
    experts: int = 0
    """Experts of an MLP after each block, one chosen for each token; 0: no MLP (mamba)."""
    chunk: int = 16
    """Steps of the scan that are held in memory at a time (mamba)."""
    heads: int = 4
    """Attention heads."""
    head_size: int = 8
    """Size of a head's queries and keys."""
    value_size: int = 8
    """Size of a head's values."""
    feedforward: int = 64
    """Hidden units of the MLP in an attention block."""
    dropout: float = 0.0
    """Dropout of attention blocks."""
    norm: bool = True
    """LayerNorm before each part of an attention block (the precursor has none)."""
    positions: bool = True
    """Sinusoidal positions (attention; Mamba needs none and gets none)."""
    favor_features: int = 32
    """Random features of the Performer's softmax kernel."""
    favor_redraw: int = 1000
    """Forward passes in training between two draws of these features."""
    encoder: Literal["linear", "mlp", "conv3", "conv5", "resnet18"] = "linear"
    """Encoder of inputs: linear, 3-layer MLP with batch norm, 3 or 5 convolutions, ResNet-18; trained from scratch."""
    encoder_width: int = 64
    """Hidden units of the MLP; channels of conv3; conv5 and resnet18 have their own."""

    selectivity: float = 1.0
    """Weight λ of the selectivity regulariser."""
    association: Literal["cb", "full"] = "cb"
    """Of Mamba: softmax of C·B/√N, or the scan's own decayed kernel."""
    selectivity_blocks: Literal["all", "last"] = "all"
    """Blocks that are regularised."""
    selectivity_until: int | None = None
    """Step from which λ is 0 [default: never]."""
    task_attention: float = 0.0
    """Weight of the precursor's loss on the attention mass of the right task, on half of the heads."""
    task_attention_until: int | None = 10_000
    """Step from which that weight is 0."""
    distributed_until: int = 0
    """Up to this step each query is asked after a random task from its own on, instead of after the last."""

    steps: int = 600
    """Meta-training steps."""
    batch_size: int = 32
    """Episodes in one step, over all processes; of the offline reference, also examples in one of its inner steps."""
    lr: float = 1e-2
    """Learning rate of Adam; of the offline reference, whose inner Adam has it without decay and warm-up."""
    decay: float = 0.3
    """Factor of the learning rate every --decay-every steps."""
    decay_every: int = 420
    """Steps between two such factors."""
    warmup: int = 20
    """Steps over which the learning rate rises."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no limit."""
    weight_decay: float = 0.0
    """Decoupled weight decay; A_log, D, dt_proj's bias and norms have none."""
    accumulation: int = 1
    """Parts that a step's episodes are cut into, to save memory (batch norm then normalises each part by itself)."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the forward pass; the scan stays in float32."""
    eval_every: int = 0
    """Steps between two meta-tests during training, on fixed episodes: a curve, nothing is chosen by it; a multiple of
    --log-every; 0: none."""
    eval_episodes: int = 600
    """Episodes of a meta-test."""

    inner_lr: float = 0.03
    """Start of OML's learned inner learning rate."""
    fast_layers: int = 2
    """Layers that OML changes in its inner loop."""
    offline_steps: int = 100
    """Steps of the offline reference on each episode."""

    def __post_init__(self) -> None:
        at_least = {
            "dimension": 1, "image_size": 8, "tasks": 1, "shots": 1, "test_shots": 1, "vocabulary": 1, "width": 2,
            "blocks": 1, "state_size": 1, "expand": 1, "conv": 2, "experts": 0, "chunk": 1, "heads": 1, "head_size": 1,
            "value_size": 1, "feedforward": 1, "favor_features": 1, "favor_redraw": 1, "encoder_width": 1,
            "distributed_until": 0, "steps": 0, "batch_size": 1, "decay_every": 1, "warmup": 0, "accumulation": 1,
            "eval_every": 0, "eval_episodes": 1, "fast_layers": 2, "offline_steps": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        for name in ("queries", "meta_test_classes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}: give 1 or more, or None")
        for name in ("lr", "inner_lr", "decay"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0")
        for name in ("spread", "selectivity", "task_attention", "clip", "weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 or a number above it")
        if not 0 <= self.dropout < 1:
            raise UserError(f"--dropout is {self.dropout}: give 0 or more and less than 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}: give 0 to {2**32 - 1}")
        if self.method == "performer" and self.favor_features % 2:
            raise UserError(f"--favor-features is {self.favor_features}: give an even number (features are pairs)")
        if self.width % 2:
            raise UserError(f"--width is {self.width}: give an even number (positions are pairs of sine and cosine)")
        if self.classes and self.tasks > self.vocabulary:
            raise UserError(
                f"--tasks is {self.tasks} and --vocabulary {self.vocabulary}: each class of an episode needs a code of "
                "its own, so give at least as many symbols"
            )
        if self.method in CLASSES_ONLY and not self.classes:
            raise UserError(f"--method {self.method} is for classes only: {self.dataset} asks for vectors")
        if self.experts and self.method != "mamba":
            raise UserError(f"--experts is {self.experts}: only --method mamba has them")
        if self.association == "full" and self.method != "mamba":
            raise UserError(f"--association full is the kernel of Mamba's scan: leave it out for {self.method}")

    @property
    def classes(self) -> bool:
        """Whether an episode's tasks are classes."""
        return self.dataset != "sine" and self.variant == "classes"


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Meta-test of a run: by position in the stream, beside the trivial references."""

    episodes: int = 600
    """Meta-test episodes."""
    plots: bool = True
    """Draw the forgetting curve and the association of queries with the stream."""

    def __post_init__(self) -> None:
        if self.episodes < 2:
            raise UserError(f"--episodes is {self.episodes}: give 2 or more")


@dataclass(frozen=True, kw_only=True)
class GeneralizeOptions:
    """Meta-test of a run with other numbers of tasks and shots, with noise on the inputs, and on another data set."""

    run: Path = Path("runs/mambacl-small")
    """Run folder of `mambacl train`."""
    tasks: tuple[int, ...] | None = None
    """Numbers of tasks T [default: four from the run's T to the most that its vocabulary and the classes allow; to 4 T
    where neither is a limit]."""
    shots: tuple[int, ...] | None = None
    """Numbers of training examples S of a task [default: the run's S, 2 S, 3 S, 4 S, as far as the examples go]."""
    noise: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    """Standard deviations of Gaussian noise on the inputs of stream and queries, added to what the encoder gets: images
    of −1 … 1, features of a --frozen encoder, standardised columns of a .csv."""
    dataset: str | None = None
    """Another data set, as for `mambacl train`, all of whose classes are for meta-test: as streams of the run's own T
    and S. Its examples must have the shape of the run's; columns of a .csv are standardised by its own rows. That no
    class of it was in meta-training is yours to see to [default: none]."""
    data_dir: str | None = None
    """Folder of that data set, where it is file-based."""
    target: str | None = None
    """Column of the class in that .csv [default: the last one]."""
    episodes: int = 600
    """Meta-test episodes of each."""

    def __post_init__(self) -> None:
        for name in ("tasks", "shots"):
            for value in getattr(self, name) or ():
                if value < 1:
                    raise UserError(f"--{name} is {value}: give whole numbers of 1 or more")
        for sigma in self.noise:
            if not 0 <= sigma < float("inf"):
                raise UserError(f"--noise is {sigma}: give 0 or numbers above it")
        if self.dataset is None and (self.data_dir, self.target) != (None, None):
            raise UserError("--data-dir and --target belong to --dataset: name the data set, or leave them out")
        if self.episodes < 2:
            raise UserError(f"--episodes is {self.episodes}: give 2 or more")


@dataclass(frozen=True, kw_only=True)
class ForgettingOptions:
    """How the answers for each task fare while the stream goes on."""

    run: Path = Path("runs/mambacl-small")
    """Run folder of `mambacl train`."""
    tasks: int | None = None
    """Tasks of an episode [default: the run's own]."""
    episodes: int = 200
    """Meta-test episodes."""

    def __post_init__(self) -> None:
        if self.tasks is not None and self.tasks < 1:
            raise UserError(f"--tasks is {self.tasks}: give 1 or more")
        if self.episodes < 2:
            raise UserError(f"--episodes is {self.episodes}: give 2 or more")


_PAPER = Config(
    dataset="omniglot", tasks=20, shots=5, test_shots=5, vocabulary=20, width=512, blocks=3, encoder="conv5",
    heads=8, head_size=64, value_size=64, feedforward=1024, dropout=0.1, norm=False, favor_features=128,
    selectivity=0.5, steps=50_000, batch_size=16, lr=1e-4, decay=0.5, decay_every=10_000, warmup=0, clip=0.0,
    eval_every=1000, eval_episodes=1024, chunk=32,
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(queries=1, eval_every=60),
    "paper": _PAPER,
    "paper-transformer": replace(_PAPER, method="transformer", blocks=4),
    "paper-linear": replace(_PAPER, method="linear_transformer", blocks=4, head_size=512, value_size=512),
    "paper-performer": replace(
        _PAPER, method="performer", blocks=4, head_size=128, value_size=512, distributed_until=10_000
    ),
    "paper-cifar100": replace(_PAPER, dataset="cifar100"),
    "paper-casia": replace(_PAPER, dataset="casia", tasks=100, vocabulary=100),
    "paper-rotation": replace(_PAPER, dataset="casia", variant="rotation"),
    "paper-completion": replace(_PAPER, dataset="casia", variant="completion"),
    "paper-sine": replace(_PAPER, dataset="sine", encoder="mlp", encoder_width=512, tasks=100),
    "paper-clip": replace(_PAPER, dataset="cifar100", frozen="openai/clip-vit-base-patch16", encoder="linear"),
    "sine": Config(
        dataset="sine", tasks=5, shots=5, test_shots=5, width=64, blocks=2, encoder="mlp", encoder_width=64,
        heads=4, head_size=16, value_size=16, feedforward=128, steps=2000, batch_size=16, lr=3e-3, decay_every=1400,
        eval_episodes=300, selectivity=0.0,
    ),
    "omniglot": Config(
        dataset="omniglot20", image_size=20, tasks=5, shots=2, test_shots=2, vocabulary=5, width=64, blocks=2,
        encoder="conv3", encoder_width=32, heads=4, head_size=16, value_size=16, feedforward=128, steps=1200,
        batch_size=16, lr=1e-2, decay_every=840, eval_episodes=200,
    ),
}  # fmt: skip
