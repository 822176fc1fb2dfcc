"""Episodes: a stream of labelled examples of new tasks, in task order, then queries.

Shapes: B episodes, T tasks, S shots, M = T·S stream examples, Q queries, O numbers of a target.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
import torch.nn.functional as F
from metazoo.data import check_finite
from metazoo.errors import UserError
from torch import Tensor
from torch.utils.data import IterableDataset

from mambacl.config import Config

KINDS = ("class", "vector", "angle", "image")
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Episode(NamedTuple):
    """B episodes.

    x [B, M, *shape]; y: codes [B, M] int64 (a random injection of the T classes into the vocabulary), or targets
    [B, M, O]; task [B, M], 0 … T − 1, which never falls; query_x [B, Q, *shape], query_y, query_task [B, Q].
    """

    x: Tensor
    y: Tensor
    task: Tensor
    query_x: Tensor
    query_y: Tensor
    query_task: Tensor

    def to(self, device: torch.device | str) -> Episode:
        """On another device."""
        return Episode(*(tensor.to(device) for tensor in self))

    def take(self, index: Tensor | slice) -> Episode:
        """Some of the B episodes."""
        return Episode(*(tensor[index] for tensor in self))


@dataclass(frozen=True, kw_only=True)
class EpisodeConfig:
    """How long an episode is: T tasks, S shots, and what is asked."""

    tasks: int
    shots: int
    test_shots: int = 1
    queries: int | None = None
    """Queries of random tasks of the episode; None: ``test_shots`` of every task, in task order."""
    vocabulary: int = 0
    """Symbols that codes of classes are drawn from."""
    noise: float = 0.0
    """Standard deviation of Gaussian noise on what the encoder gets, of stream and queries."""

    def __post_init__(self) -> None:
        for name in ("tasks", "shots", "test_shots"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 1 or more")
        if self.queries is not None and self.queries < 1:
            raise UserError(f"queries is {self.queries}: give 1 or more, or None")
        if not 0 <= self.noise < math.inf:
            raise UserError(f"noise is {self.noise}: give 0 or a number above it")

    @classmethod
    def from_config(cls, config: Config) -> Self:
        """The episodes of meta-training."""
        names = ("tasks", "shots", "test_shots", "queries", "vocabulary")
        return cls(**{name: getattr(config, name) for name in names})

    @property
    def most_of_a_task(self) -> int:
        """Examples of one task that an episode may need."""
        return self.shots + (self.test_shots if self.queries is None else self.queries)

    def places(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Tasks of stream and queries, and the rank of each query among its task's: [B, M], [B, Q], [B, Q]."""
        stream = torch.arange(self.tasks).repeat_interleave(self.shots).expand(count, -1)
        if self.queries is None:
            asked = torch.arange(self.tasks).repeat_interleave(self.test_shots).expand(count, -1)
        else:
            asked = torch.randint(self.tasks, (count, self.queries), generator=generator)
        same = asked.unsqueeze(2) == asked.unsqueeze(1)
        return stream, asked, same.tril(-1).sum(2)


class Episodes(IterableDataset[Episode]):
    """A source of episodes.

    Args:
        kind: class (codes), vector, angle (cosine and sine) or image (−1 … 1). shape: of an example. outputs: O of
            targets; 0 for classes. setting: of episodes that are drawn. seed: of iteration.
    """

    def __init__(self, kind: str, shape: tuple[int, ...], outputs: int, setting: EpisodeConfig, seed: int = 0) -> None:
        super().__init__()
        self.kind, self.shape, self.outputs, self.setting, self.seed = kind, shape, outputs, setting, seed

    @abstractmethod
    def draw(self, count: int, generator: torch.Generator, setting: EpisodeConfig | None = None) -> Episode:
        """``count`` episodes at once, by ``generator`` alone; ``setting`` in place of the source's own.

        Raises:
            UserError: more classes than symbols, or too few classes or examples.
        """

    def __iter__(self) -> Iterator[Episode]:
        """Single episodes without end, [M, …], the same ones each time (in each worker its own)."""
        worker = torch.utils.data.get_worker_info()
        generator = torch.Generator().manual_seed(self.seed * 1009 + (0 if worker is None else worker.id))
        while True:
            yield self.draw(1, generator).take(0)  # type: ignore[arg-type]


def codes(count: int, setting: EpisodeConfig, generator: torch.Generator) -> Tensor:
    """A random injection of T classes into the vocabulary for each episode [B, T].

    Raises:
        UserError: more classes than symbols.
    """
    if setting.tasks > setting.vocabulary:
        raise UserError(
            f"{setting.tasks} classes, but a vocabulary of {setting.vocabulary} symbols: train with a larger "
            "--vocabulary, or ask for fewer tasks"
        )
    return torch.rand(count, setting.vocabulary, generator=generator).argsort(1)[:, : setting.tasks]


def noisy(x: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """x + N(0, noise²)."""
    return x + noise * torch.randn(x.shape, generator=generator) if noise else x


class FeatureEpisodes(Episodes):
    """Gaussian classes: mean μ ~ N(0, I), examples μ + spread · N(0, I); like frozen features, but exactly known.

    Args:
        dimension: columns. spread: standard deviation within a class.
    """

    def __init__(self, dimension: int, spread: float, setting: EpisodeConfig, seed: int = 0) -> None:
        super().__init__("class", (dimension,), 0, setting, seed)
        self.spread = spread

    def draw(self, count: int, generator: torch.Generator, setting: EpisodeConfig | None = None) -> Episode:
        setting = setting or self.setting
        symbols = codes(count, setting, generator)
        task, asked, _ = setting.places(count, generator)
        means = torch.randn(count, setting.tasks, *self.shape, generator=generator)
        rows = torch.arange(count).unsqueeze(1)
        x, query_x = (
            noisy(noisy(means[rows, its], self.spread, generator), setting.noise, generator) for its in (task, asked)
        )
        return Episode(x, symbols.gather(1, task), task, query_x, symbols.gather(1, asked), asked)


class SineEpisodes(Episodes):
    """Sine regression of the precursor: x and y are curves at 50 times t = 0 … 10.

    Of a task: frequency ~ U(0.1, 1.1) and two phases ~ U(0, 2π); of an example: amplitude ~ U(0.5, 1.5).
    x = a sin(2π f t + φ_x) + N(0, 0.1²), y = a sin(2π f t + φ_y).
    """

    POINTS, NOISE = 50, 0.1

    def __init__(self, setting: EpisodeConfig, seed: int = 0) -> None:
        super().__init__("vector", (self.POINTS,), self.POINTS, setting, seed)

    def draw(self, count: int, generator: torch.Generator, setting: EpisodeConfig | None = None) -> Episode:
        setting = setting or self.setting
        task, asked, _ = setting.places(count, generator)

        def uniform(low: float, high: float, *size: int) -> Tensor:
            return low + (high - low) * torch.rand(*size, generator=generator)

        frequency = uniform(0.1, 1.1, count, setting.tasks)
        phases = uniform(0, 2 * math.pi, 2, count, setting.tasks)
        rows = torch.arange(count).unsqueeze(1)
        times = torch.linspace(0, 10, self.POINTS)

        def curves(its: Tensor) -> tuple[Tensor, Tensor]:
            amplitude = uniform(0.5, 1.5, *its.shape).unsqueeze(-1)
            angle = 2 * math.pi * frequency[rows, its].unsqueeze(-1) * times
            x, y = (amplitude * torch.sin(angle + phase[rows, its].unsqueeze(-1)) for phase in phases)
            return noisy(noisy(x, self.NOISE, generator), setting.noise, generator), y

        (x, y), (query_x, query_y) = curves(task), curves(asked)
        return Episode(x, y, task, query_x, query_y, asked)


class ClassEpisodes(Episodes):
    """Classes of a labelled set: T of them without replacement, and of each S examples and its queries, all different.

    Args:
        x: examples [N, *shape], float32, or uint8 images [N, C, height, width], which are scaled to −1 … 1 when drawn.
        y: class of each, int64 [N], any numbers.

    Raises:
        UserError: no examples, or x and y of different lengths.
    """

    def __init__(self, x: Tensor, y: Tensor, setting: EpisodeConfig, seed: int = 0) -> None:
        if len(x) != len(y) or not len(x):
            raise UserError(f"{len(x)} examples and {len(y)} labels: give one for each")
        super().__init__("class", tuple(x.shape[1:]), 0, setting, seed)
        self.x, self.y = x, y
        self.classes, place = y.unique(return_inverse=True)
        self.order = place.argsort(stable=True)  # examples, class after class
        self.counts = torch.bincount(place)
        self.starts = self.counts.cumsum(0) - self.counts

    def draw(self, count: int, generator: torch.Generator, setting: EpisodeConfig | None = None) -> Episode:
        setting = setting or self.setting
        symbols = codes(count, setting, generator)
        task, asked, chosen, asked_for = self.choose(count, generator, setting)
        x, query_x = (noisy(scaled(self.x[index]), setting.noise, generator) for index in (chosen, asked_for))
        return Episode(x, symbols.gather(1, task), task, query_x, symbols.gather(1, asked), asked)

    def choose(
        self, count: int, generator: torch.Generator, setting: EpisodeConfig
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Tasks of stream and queries [B, M], [B, Q], and which examples they are.

        Raises:
            UserError: too few classes or examples, by number.
        """
        total = len(self.classes)
        if setting.tasks > total:
            raise UserError(f"{setting.tasks} tasks, but this part has {total} classes: ask for fewer")
        each = setting.most_of_a_task
        if each > int(self.counts.min()):
            least = int(self.counts.argmin())
            raise UserError(
                f"class {int(self.classes[least])} has {int(self.counts[least])} examples, an episode may want {each} "
                "of it: ask for fewer shots or queries, or leave the class out"
            )
        task, asked, rank = setting.places(count, generator)
        drawn = torch.rand(count, total, generator=generator).argsort(1)[:, : setting.tasks]  # [B, T]
        most = int(self.counts[drawn].max())
        lottery = torch.rand(count, setting.tasks, most, generator=generator)
        lottery.masked_fill_(torch.arange(most) >= self.counts[drawn].unsqueeze(-1), 2.0)
        picks = self.order[self.starts[drawn].unsqueeze(-1) + lottery.argsort(-1)[..., :each]]  # [B, T, S + queries]
        rows = torch.arange(count).unsqueeze(1)
        chosen = picks[:, :, : setting.shots].flatten(1)
        return task, asked, chosen, picks[rows, asked, setting.shots + rank]


def scaled(x: Tensor) -> Tensor:
    """Images 0 … 255 as −1 … 1; anything else as it is."""
    return x.float().mul(2 / 255).sub(1) if x.dtype == torch.uint8 else x


class RotationEpisodes(ClassEpisodes):
    """By which angle was the image rotated? The tasks are classes: which way up one stands, its stream tells.

    Angles are U(0, 2π), targets (cos, sin). (The precursor adds an offset to the angles of a task; as image and target
    both have it, they are distributed as without.)
    """

    def __init__(self, x: Tensor, y: Tensor, setting: EpisodeConfig, seed: int = 0) -> None:
        super().__init__(x, y, setting, seed)
        if x.dtype != torch.uint8 or x.ndim != 4:
            raise UserError("only images can be rotated: use --variant classes")
        self.kind, self.outputs = "angle", 2

    def draw(self, count: int, generator: torch.Generator, setting: EpisodeConfig | None = None) -> Episode:
        setting = setting or self.setting
        task, asked, chosen, asked_for = self.choose(count, generator, setting)
        parts = []
        for index in (chosen, asked_for):
            angle = 2 * math.pi * torch.rand(index.shape, generator=generator)
            x = noisy(rotate(scaled(self.x[index]), angle), setting.noise, generator)
            parts.append((x, torch.stack([torch.cos(angle), torch.sin(angle)], -1)))
        (x, y), (query_x, query_y) = parts
        return Episode(x, y, task, query_x, query_y, asked)


def rotate(x: Tensor, angle: Tensor) -> Tensor:
    """Images [B, M, C, height, width] turned anticlockwise by angle [B, M] in radians, bilinear, white (1) outside."""
    flat, turned = x.flatten(0, 1), angle.flatten()
    cos, sin, zero = torch.cos(turned), torch.sin(turned), torch.zeros_like(turned)
    ratio = x.shape[-1] / x.shape[-2]  # of width to height: grid coordinates are −1 … 1 in both
    rows = torch.stack([torch.stack([cos, -sin / ratio, zero], -1), torch.stack([sin * ratio, cos, zero], -1)], 1)
    grid = F.affine_grid(rows, list(flat.shape), align_corners=False)
    dark = F.grid_sample(flat - 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    return (dark + 1).view_as(x)


class CompletionEpisodes(ClassEpisodes):
    """The lower half of an image from its upper half: x [C, height / 2, width], targets −1 … 1, flattened."""

    def __init__(self, x: Tensor, y: Tensor, setting: EpisodeConfig, seed: int = 0) -> None:
        super().__init__(x, y, setting, seed)
        if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[2] % 2:
            raise UserError("only images of even height can be completed: use --variant classes, or an even size")
        channels, height, width = x.shape[1:]
        self.kind, self.shape, self.outputs = "image", (channels, height // 2, width), channels * height // 2 * width

    def draw(self, count: int, generator: torch.Generator, setting: EpisodeConfig | None = None) -> Episode:
        setting = setting or self.setting
        task, asked, chosen, asked_for = self.choose(count, generator, setting)
        parts = []
        for index in (chosen, asked_for):
            upper, lower = scaled(self.x[index]).chunk(2, 3)
            parts.append((noisy(upper, setting.noise, generator), lower.flatten(2)))
        (x, y), (query_x, query_y) = parts
        return Episode(x, y, task, query_x, query_y, asked)


def validate(episode: Episode, kind: str, vocabulary: int, *, task_order: bool = False) -> None:
    """Check episodes that come from outside, shapes and values.

    Args:
        kind: class, vector, angle or image. vocabulary: symbols that codes of classes are drawn from; else not looked
            at. task_order: tasks must come one after the other as 0, 1, …, as a loss on tasks and queries amid the
            stream need them.

    Raises:
        UserError: what :func:`check_shapes` refuses; NaN or infinity, codes outside the vocabulary, angles that are no
            (cos, sin), images outside −1 … 1, a query whose label or task is not in the stream, or tasks that come back
            or leave a number out.
    """
    check_shapes(episode, kind)
    x, y, task, query_x, query_y, query_task = episode
    for name, values in (("x", x), ("query_x", query_x), ("y", y), ("query_y", query_y)):
        finite(values, name)
    if kind == "class":
        check_codes(torch.cat([y, query_y], 1), vocabulary)
        unseen = ~(query_y.unsqueeze(2) == y.unsqueeze(1)).any(2)
        if unseen.any():
            b, j = (int(i) for i in unseen.nonzero()[0])
            raise UserError(
                f"episode {b}, query {j}: label {int(query_y[b, j])} is not in the stream: show it before asking"
            )
    targets = torch.cat([y, query_y], 1)
    if kind == "angle" and ((targets.norm(dim=-1) - 1).abs() > 1e-2).any():
        raise UserError("a target is no (cos, sin) of an angle: its norm is not 1, so divide it by its norm")
    if kind == "image" and (targets.abs() > 1 + 1e-4).any():
        raise UserError("a target image is outside −1 … 1, where no answer can be: scale it")
    if not (query_task.unsqueeze(2) == task.unsqueeze(1)).any(2).all():
        raise UserError("a query of a task that is not in the stream: show the task before asking")
    if task_order:
        step = task.diff(dim=1)
        if (step < 0).any():
            raise UserError("tasks come back in the stream: sort its examples by task, or leave the loss on tasks out")
        if task[:, 0].any() or (step > 1).any():
            raise UserError("tasks of the stream are not 0, 1, 2, …: number them in the order that they come in")


def check_shapes(episode: Episode, kind: str, shape: tuple[int, ...] | None = None, outputs: int | None = None) -> None:
    """The part of :func:`validate` that looks at no value: cheap at every step, and a GPU is not waited for.

    Args:
        shape: of an example, where it is known. outputs: O of targets, where it is known; not looked at for classes.

    Raises:
        UserError: an unknown kind, shapes or dtypes that do not agree with it or each other, no episodes, or an empty
            stream.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: one of {', '.join(KINDS)}")
    x, y, task, query_x, query_y, query_task = episode
    if x.ndim < 3 or query_x.ndim < 3:
        raise UserError(
            f"x of the stream is {tuple(x.shape)}, of the queries {tuple(query_x.shape)}: give [B, M, …] and [B, Q, …]"
        )
    if not len(x):
        raise UserError("no episodes (B = 0): give at least one")
    if not x.shape[1] or not query_x.shape[1]:
        raise UserError("an episode without stream or queries: give at least one shot and one query")
    pairs = (("y", y, x), ("task", task, x), ("query_y", query_y, query_x), ("query_task", query_task, query_x))
    for name, labels, of in pairs:
        if labels.shape[:2] != of.shape[:2] or ("task" in name and labels.ndim != 2):
            raise UserError(f"{name} is {tuple(labels.shape)} for examples {tuple(of.shape)}: one for each")
    if query_x.shape[2:] != x.shape[2:] or len(query_x) != len(x):
        raise UserError(f"queries are {tuple(query_x.shape)}, the stream {tuple(x.shape)}: give the same kind of both")
    if shape is not None and x.shape[2:] != shape:
        raise UserError(f"examples have the shape {tuple(x.shape[2:])}: the learner wants {shape}")
    if y.shape[2:] != query_y.shape[2:]:
        raise UserError(f"labels are {tuple(y.shape)}, those of queries {tuple(query_y.shape)}: give the same of both")
    for name, values in (("x", x), ("query_x", query_x)):
        if not values.is_floating_point():
            raise UserError(f"{name} is {values.dtype}: give floating-point numbers, scaled as in meta-training")
    for name, values in (("task", task), ("query_task", query_task)):
        if values.dtype not in INTEGERS:
            raise UserError(f"{name} is {values.dtype}: give whole numbers (int64)")
    for name, values in (("y", y), ("query_y", query_y)):
        check_labels(values, kind, outputs, name)


def check_labels(y: Tensor, kind: str, outputs: int | None = None, name: str = "y") -> None:
    """Shape and dtype of labels: codes [B, M] of classes, else targets [B, M, O].

    Raises:
        UserError: they are of another kind.
    """
    if kind == "class":
        if y.ndim != 2 or y.dtype not in INTEGERS:
            raise UserError(f"{name} is {y.dtype} {tuple(y.shape)}: classes want codes [B, M], whole numbers (int64)")
        return
    numbers = 2 if kind == "angle" else outputs
    if y.ndim != 3 or not y.is_floating_point() or numbers not in (None, y.shape[-1]):
        wanted = f"[B, M, {'O' if numbers is None else numbers}]"
        raise UserError(f"{name} is {y.dtype} {tuple(y.shape)}: kind {kind!r} wants targets {wanted}, floating-point")


def check_codes(y: Tensor, vocabulary: int) -> None:
    """Codes must be symbols of the vocabulary.

    Raises:
        UserError: one is not.
    """
    if ((y < 0) | (y >= vocabulary)).any():
        raise UserError(f"a code is outside 0 … {vocabulary - 1}: more classes than the vocabulary has symbols")


def finite(x: Tensor, name: str) -> None:
    """No NaN, no infinity.

    Raises:
        UserError: the first one, by its index in ``name``.
    """
    if not torch.isfinite(x).all():
        check_finite(x.detach().double().cpu().numpy(), name)
