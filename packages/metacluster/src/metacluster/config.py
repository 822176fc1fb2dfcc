"""Settings of a MetaCluster run: stage 1 (meta-learner), stage 2 (K-means), stage 3 (codebook)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metazoo.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Data, network, meta-learner, codebook and training of MetaCluster."""

    dataset: str = "mnist14"
    """mnist14 (10 000 digits at 14 x 14, in the package), digits (scikit-learn), exp-sine, sine-sum (generated
    equations); mnist, cifar10, cifar100 (--data-dir, METAZOO_DATA or the hub); kmnist (a folder of its idx files);
    or the path of your own .csv or .npz."""
    data_dir: str | None = None
    """Folder of the file-based data sets."""
    target: str | None = None
    """Column of your own .csv to predict [default: the last one]."""
    task: Literal["auto", "classification", "regression"] = "auto"
    """Of your own file; auto: text, and up to 20 distinct whole numbers, are classes; others are regressed."""
    dimension: int = 10
    """Number of variables d of the generated equations."""
    train_size: int | None = None
    """Use the first n training examples [default: all]."""
    seed: int = 0
    """Seed of initialisation, order of the data, K-means and generated data."""

    model: Literal["kan", "conv", "mlp"] = "kan"
    """Fully connected KAN, convolutional KAN, or a multi-layer perceptron as the baseline (no clustering)."""
    hidden: tuple[int, ...] = (64,)
    """Widths of the hidden layers (kan, mlp)."""
    channels: tuple[int, ...] = (32, 64, 128, 512)
    """Channels of the convolutions (conv)."""
    strides: tuple[int, ...] = (1, 2, 2, 1)
    """Strides of the convolutions (conv)."""
    basis: Literal["bspline", "rbf", "chebyshev", "legendre", "gram", "fourier"] = "rbf"
    """Functions that an edge's curve is made of."""
    grid: int = 5
    """Intervals of the B-spline grid."""
    order: int = 3
    """Order of the B-splines."""
    centres: int = 8
    """Number of radial functions."""
    degree: int = 3
    """Highest degree of the polynomials (chebyshev, legendre, gram)."""
    frequencies: int = 4
    """Number of frequencies of fourier."""
    input_range: tuple[float, float] | None = None
    """Range of bspline and rbf [default: (-1, 1) and (-2, 2)]."""
    scale: bool = False
    """Give each edge a scale of its own beside the coefficients, as efficient-kan does."""
    norm: Literal["none", "plain", "affine"] = "plain"
    """Normalise a layer's inputs before the basis (kan): LayerNorm without learned gain and shift (plain), or with them
    as in FastKAN (affine: they stay dense). With fewer than 8 inputs to the network there is none: it
    would lose their level."""

    edges: Literal["meta", "direct"] = "meta"
    """meta: coefficients are emitted by the meta-learner; direct: they are trained themselves (then K-means is the
    naive weight sharing that the paper compares with)."""
    embedding_size: int = 1
    """Size d_emb of an edge's embedding z."""
    meta_hidden: int = 32
    """Hidden units d_hidden of the meta-learner."""
    meta_scope: Literal["layer", "model"] = "layer"
    """A meta-learner for each layer, or one for all."""

    clusters: int = 16
    """Centroids K of a codebook; an edge then costs ceil(log2 K) bits."""
    scope: Literal["layer", "model"] = "layer"
    """A codebook for each layer, or one for all."""
    kmeans_starts: int = 4
    """Starts of K-means (k-means++), of which the best is kept."""
    standardise: bool = False
    """Divide each coefficient by its standard deviation before K-means."""

    epochs: int = 25
    """Epochs of stage 1."""
    finetune_epochs: int = 4
    """Epochs of stage 3, on the codebook."""
    batch_size: int = 128
    """Examples in one step, over all processes."""
    lr: float = 1e-2
    """Learning rate of the meta-learner, of direct coefficients and of all dense parameters (AdamW)."""
    embedding_lr: float = 1e-1
    """Learning rate of the embeddings."""
    weight_decay: float = 0.0
    """Decoupled weight decay of what --lr trains."""
    embedding_weight_decay: float = 0.0
    """Decoupled weight decay of the embeddings."""
    finetune_lr: float = 3e-3
    """Learning rate of the codebook in stage 3 (Adam)."""
    schedule: Literal["cosine", "exponential", "constant"] = "cosine"
    """Of both learning rates within stage 1; stage 3 is always cosine to 0."""
    gamma: float = 0.975
    """Factor per epoch of the exponential schedule."""
    accumulation: int = 1
    """Parts that a step is cut into, to save memory. Batch norm (conv) then normalises each part by itself."""
    recompute: bool = False
    """Recompute basis functions in the backward pass instead of keeping them: slower, far less memory."""
    precision: Literal["no", "bf16"] = "no"
    """Mixed precision of the forward pass; K-means and codebook stay in float32."""

    def __post_init__(self) -> None:
        at_least = {
            "dimension": 1, "grid": 1, "order": 1, "centres": 2, "degree": 1, "frequencies": 1, "embedding_size": 1,
            "meta_hidden": 1, "clusters": 1, "kmeans_starts": 1, "epochs": 1, "finetune_epochs": 0, "batch_size": 1,
            "accumulation": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give {least} or more")
        for name in ("lr", "embedding_lr", "finetune_lr"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give a number above 0")
        for name in ("weight_decay", "embedding_weight_decay"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}: give 0 or a number above it")
        if not 0 < self.gamma <= 1:
            raise UserError(f"--gamma is {self.gamma}: give a factor above 0 and at most 1")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"--seed is {self.seed}: give 0 to {2**32 - 1}")
        if self.train_size is not None and self.train_size < 1:
            raise UserError(f"--train-size is {self.train_size}: give 1 or more, or None for all")
        if min((*self.hidden, *self.channels, *self.strides), default=1) < 1:
            raise UserError("--hidden, --channels and --strides: give whole numbers of 1 or more")
        if self.model == "conv" and (not self.channels or len(self.channels) != len(self.strides)):
            raise UserError(
                f"--channels has {len(self.channels)} numbers and --strides {len(self.strides)}: give as many of both"
            )
        if self.input_range is not None and not self.input_range[0] < self.input_range[1]:
            raise UserError(f"--input-range is {self.input_range}: give the lower end first")
        if self.clusters > 65536:
            raise UserError(f"--clusters is {self.clusters}: indices hold at most 16 bits, so give at most 65536")


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Accuracy at each stage, sizes, and pictures of a run."""

    baselines: bool = False
    """Also compress the uncompressed network by quantisation, product quantisation, pruning and other clusterings
    (none of them fine-tuned)."""
    plots: bool = True
    """Draw the shared curves, the clouds of coefficients, residual and accuracy against K."""


@dataclass(frozen=True, kw_only=True)
class CompressOptions:
    """Compress a finished run again with another K; stage 1 is not repeated."""

    run: Path = Path("runs/metacluster-small")
    """Run folder of `metacluster train`."""
    clusters: int | None = None
    """Centroids K [default: the run's own]."""
    scope: Literal["layer", "model"] | None = None
    """A codebook for each layer, or one for all [default: the run's own]."""
    finetune_epochs: int | None = None
    """Epochs on the codebook [default: the run's own]."""
    half: bool = False
    """Store codebook and dense parameters in float16."""
    output: Path | None = None
    """Folder to write [default: RUN/compressed-K-SCOPE]."""


@dataclass(frozen=True, kw_only=True)
class ReportOptions:
    """Where the bits of a compressed network are."""

    model: Path = Path("runs/metacluster-small/compressed")
    """Folder of a compressed network."""


_FC = Config(
    dataset="mnist", hidden=(32,), basis="bspline", norm="none", scale=True, epochs=100, finetune_epochs=10,
    batch_size=1024, lr=1e-4, embedding_lr=1e-3, weight_decay=1e-4, embedding_weight_decay=5e-4, finetune_lr=1e-3,
    schedule="exponential",
)  # fmt: skip
_CONV = Config(
    dataset="cifar10", model="conv", basis="gram", meta_hidden=64, clusters=256, epochs=150, finetune_epochs=15,
    batch_size=64, lr=1e-3, embedding_lr=1e-2, weight_decay=1e-4, embedding_weight_decay=5e-4, finetune_lr=1e-3,
    schedule="exponential",
)  # fmt: skip

PRESETS: dict[str, Config] = {
    "small": Config(),
    "paper": _FC,
    "paper-conv4": _CONV,
    "paper-conv8": replace(
        _CONV, channels=(32, 64, 128, 512, 1024, 1024, 1024, 1024), strides=(1, 2, 2, 1, 1, 2, 1, 1)
    ),
    "equation": Config(
        dataset="exp-sine", dimension=100, hidden=(32,), basis="bspline", norm="none", input_range=(-2.0, 2.0),
        clusters=4, epochs=40, finetune_epochs=8, batch_size=256, lr=1e-3, embedding_lr=1e-2,
    ),
}  # fmt: skip
