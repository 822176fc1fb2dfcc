"""The pixel-level world: a glyph moves over a texture. Its class is how it moves; the texture nearly always agrees.

Sixty classes, (motion, manner) pairs of twenty motions and three manners; each has a texture of its own. Thirty are
known: every motion and every manner is among them, the other thirty are new pairs. `still` looks the same in every
manner, which leaves 58 of 60 classes to be told by motion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from open_mede.stripes import stripe_background

SIZE, FRAMES, SPRITE = 32, 8, 8
"""Pixels of a frame's side; frames; pixels of a glyph's side."""
MOTIONS = (
    "east", "northeast", "north", "northwest", "west", "southwest", "south", "southeast", "clockwise", "anticlockwise",
    "grow", "shrink", "flicker", "blink", "sway", "nod", "turn", "unwind", "bounce", "still",
)  # fmt: skip
MANNERS = ("steady", "accelerating", "halting")
CLASSES = tuple((motion, manner) for motion in MOTIONS for manner in MANNERS)
TEXTURES = [
    "sand",
    "moss",
    "slate",
    "brick",
    "cork",
    "linen",
    "rust",
    "straw",
    "tar",
    "clay",
    "chalk",
    "coral",
    "denim",
    "ember",
    "fern",
    "frost",
    "glass",
    "gravel",
    "hay",
    "ice",
    "ivy",
    "jade",
    "kelp",
    "lava",
    "leaf",
    "lime",
    "loam",
    "marble",
    "mist",
    "mud",
    "oak",
    "onyx",
    "opal",
    "paper",
    "pearl",
    "petal",
    "pine",
    "plum",
    "quartz",
    "reed",
    "resin",
    "salt",
    "satin",
    "shale",
    "silk",
    "silt",
    "smoke",
    "snow",
    "soil",
    "steel",
    "stone",
    "suede",
    "thatch",
    "tile",
    "tin",
    "turf",
    "velvet",
    "wax",
    "wheat",
    "wool",
]
GLYPHS = {
    "eff": "7e40407c40404000", "ell": "404040404040407e", "pee": "7c42427c40404000", "gee": "3c42404e42423c00",
    "jay": "1e04040404443800", "are": "7c42427c48444200", "seven": "7e02040810101000", "four": "0c14247e04040400",
    "aitch": "40405c6242424200", "why": "42424222140810e0",
}  # fmt: skip
SIZES, ROWS, COLUMNS = ("small", "medium", "large"), ("top", "middle", "bottom"), ("left", "centre", "right")
CAPTIONS = (
    "{size} {glyph} at {row} {column} on {texture}", "{texture} below {size} {glyph} at {row} {column}",
    "a {size} {glyph} in {texture} at {row} {column}", "{row} {column} a {size} {glyph} in {texture}",
    "{glyph} in {texture}", "{row} {column} in {texture}",
)  # fmt: skip
BRIGHT, DARK = (190, 256), 0.6
"""Bytes of a glyph's colours; share of 255 that backgrounds reach. A small network finds no glyph of any colour."""
ACTIONS = (
    "{motion} {manner} in {texture}", "in {texture} {motion} {manner}", "{manner} {motion} on {texture}",
    "a {motion} in {texture} {manner}",
)  # fmt: skip
TOGETHER = 16
"""Textures in one batch of single frames, or of texts."""
BACKGROUNDS = 200
"""Stripe backgrounds that a seed draws from."""


def known_classes(seed: int) -> np.ndarray:
    """Numbers of the 30 known classes: one or two manners of each motion, each manner about ten times."""
    rng = np.random.default_rng([seed, 0])
    # ten motions have two known manners, ten have one; manners in turn, so that each is known ten times
    counts = rng.permutation(np.repeat([1, 2], len(MOTIONS) // 2))
    manners = np.concatenate([rng.permutation(len(MANNERS)) for _ in range(len(MOTIONS))])
    taken, found = 0, []
    for motion in rng.permutation(len(MOTIONS)):
        chosen = manners[taken : taken + counts[motion]]
        if len(set(chosen.tolist())) < len(chosen):  # the end of one round and the start of the next
            chosen = np.array([chosen[0], (chosen[0] + 1) % len(MANNERS)])
        taken += counts[motion]
        found += [motion * len(MANNERS) + manner for manner in chosen]
    return np.sort(np.array(found))


def progress(manner: int) -> np.ndarray:
    """Share of the way at each frame, [8]."""
    if manner == 0:
        return np.linspace(0, 1, FRAMES)
    if manner == 1:
        return np.linspace(0, 1, FRAMES) ** 2
    return np.array([0, 0.25, 0.5, 0.5, 0.5, 0.5, 0.75, 1])


@dataclass(frozen=True)
class Path:
    """Where a glyph is, from its start: [8] each.

    Attributes:
        x, y: pixels to the right and down.
        scale: size, of 8 pixels.
        angle: radians, clockwise.
        shown: whether it is there.
    """

    x: np.ndarray
    y: np.ndarray
    scale: np.ndarray
    angle: np.ndarray
    shown: np.ndarray


def path_of(label: int) -> Path:
    """Of a class."""
    motion, manner = divmod(label, len(MANNERS))
    name, u = MOTIONS[motion], progress(manner)
    zero, one = np.zeros(FRAMES), np.ones(FRAMES)
    x, y, scale, angle, shown = zero, zero, one, zero, np.ones(FRAMES, dtype=bool)
    if motion < 8:
        direction = motion * np.pi / 4
        x, y = 14 * np.cos(direction) * u, -14 * np.sin(direction) * u
    elif name in ("clockwise", "anticlockwise"):
        turn = 2 * np.pi * u * (1 if name == "clockwise" else -1)
        x, y = 6 * np.sin(turn), -6 * np.cos(turn)
    elif name in ("grow", "shrink"):
        scale = 0.5 + u if name == "grow" else 1.5 - u
    elif name in ("flicker", "blink"):
        ticks = np.floor(7 * u / (1 if name == "flicker" else 2) + 1e-9)
        shown = ticks % 2 == 0
    elif name == "sway":
        x = 6 * np.sin(3 * np.pi * u)
    elif name == "nod":
        y = 6 * np.sin(3 * np.pi * u)
    elif name in ("turn", "unwind"):
        angle = 1.5 * np.pi * u * (1 if name == "turn" else -1)
    elif name == "bounce":
        y = -10 * np.abs(np.sin(2 * np.pi * u))
    return Path(x, y, scale, angle, shown)


def masks_of(labels: np.ndarray, glyphs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Where the glyph is, [N, 8, 32, 32] bool, its start at random so that all of its way is inside.

    Of a turning one, corners may be outside for a while.
    """
    bits = _glyphs()
    found = np.empty((len(labels), FRAMES, SIZE, SIZE), dtype=bool)
    rows, columns = np.mgrid[:SIZE, :SIZE].astype(np.float32)
    for i, (label, glyph) in enumerate(zip(labels, glyphs, strict=True)):
        path = path_of(int(label))
        radius = SPRITE / 2 * path.scale.max()
        low_x, high_x = radius - path.x.min(), SIZE - radius - path.x.max()
        low_y, high_y = radius - path.y.min(), SIZE - radius - path.y.max()
        x = rng.uniform(low_x, high_x) + path.x
        y = rng.uniform(low_y, high_y) + path.y
        found[i] = _drawn(bits[glyph], x, y, path.scale, path.angle, path.shown, rows, columns)
    return found


def _glyphs() -> np.ndarray:
    """Masks [10, 8, 8] of 0 and 1, with lines two pixels wide."""
    thin = np.array([[[int(b) for b in f"{byte:08b}"] for byte in bytes.fromhex(rows)] for rows in GLYPHS.values()])
    wide = thin.copy()
    wide[:, :, 1:] |= thin[:, :, :-1]
    return wide


def _drawn(
    bits: np.ndarray, x: np.ndarray, y: np.ndarray, scale: np.ndarray, angle: np.ndarray, shown: np.ndarray,
    rows: np.ndarray, columns: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Masks [T, 32, 32] of a glyph [8, 8] with its middle at x, y; every pixel asks which of the glyph's it is."""
    dx = (columns[None] + 0.5 - x[:, None, None]) / scale[:, None, None]
    dy = (rows[None] + 0.5 - y[:, None, None]) / scale[:, None, None]
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    column = np.floor(cos * dx + sin * dy + SPRITE / 2).astype(int)
    row = np.floor(-sin * dx + cos * dy + SPRITE / 2).astype(int)
    inside = (row >= 0) & (row < SPRITE) & (column >= 0) & (column < SPRITE) & shown[:, None, None]
    return inside & bits[row.clip(0, SPRITE - 1), column.clip(0, SPRITE - 1)].astype(bool)


class SpriteWorld:
    """Textures, classes and backgrounds of a seed.

    Attributes:
        known, novel: numbers of 30 classes each.
        textures: [60, 48, 48, 3] of bytes.
        stripes: [200, 32, 32, 3] of bytes, drawn when first asked for.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.known = known_classes(seed)
        self.novel = np.setdiff1d(np.arange(len(CLASSES)), self.known)
        rng = np.random.default_rng([seed, 1])
        self.owner = rng.permutation(len(CLASSES))  # texture of each class
        self.textures = np.stack([_texture(rng) for _ in TEXTURES])
        self._stripes: np.ndarray | None = None

    @property
    def stripes(self) -> np.ndarray:
        if self._stripes is None:
            rng = np.random.default_rng([self.seed, 2])
            drawn = np.stack([stripe_background(rng, SIZE) for _ in range(BACKGROUNDS)])
            self._stripes = (drawn * DARK).astype(np.uint8)
        return self._stripes

    def name(self, label: int, *, debiased: bool = False) -> str:
        """A class's name, with its texture or without."""
        motion, manner = CLASSES[label]
        return f"{motion} {manner}" if debiased else f"{motion} {manner} in {TEXTURES[self.owner[label]]}"

    def foregrounds(self, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Masks [N, 8, 32, 32] and colours [N, 3] of clips of classes [N]."""
        glyphs = rng.integers(len(GLYPHS), size=len(labels))
        return masks_of(labels, glyphs, rng), rng.integers(*BRIGHT, size=(len(labels), 3)).astype(np.uint8)

    def crops(self, textures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Backgrounds [N, 32, 32, 3], each a place in a texture."""
        most = self.textures.shape[1] - SIZE + 1
        places = rng.integers(most, size=(len(textures), 2))
        return np.stack([
            self.textures[texture, y : y + SIZE, x : x + SIZE]
            for texture, (y, x) in zip(textures, places, strict=True)
        ])  # fmt: skip

    def clips(
        self, labels: np.ndarray, rng: np.random.Generator, *, ratio: float, classes: np.ndarray | None = None
    ) -> np.ndarray:
        """Training clips [N, 8, 3, 32, 32] of bytes: a class's own texture with a probability, else any of them.

        Args:
            labels: [N] classes.
            rng: of all that is drawn.
            ratio: probability of the own texture.
            classes: whose textures the others are [default: the known ones'].
        """
        masks, colours = self.foregrounds(labels, rng)
        among = self.known if classes is None else classes
        others = among[rng.integers(len(among), size=len(labels))]
        shown = np.where(rng.random(len(labels)) < ratio, labels, others)
        return paste(masks, colours, self.crops(self.owner[shown], rng))

    def test(
        self, classes: np.ndarray, count: int, draws: int, number: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same foregrounds in their own context and out of it.

        Returns:
            labels [N], clips in context [N, 8, 3, 32, 32], and out of it [draws, N, 8, 3, 32, 32], of bytes.
        """
        rng = np.random.default_rng([self.seed, 3, number])
        labels = classes[np.arange(count) % len(classes)]
        masks, colours = self.foregrounds(labels, rng)
        inside = paste(masks, colours, self.crops(self.owner[labels], rng))
        chosen = rng.integers(BACKGROUNDS, size=(draws, count))
        outside = np.stack([paste(masks, colours, self.stripes[row]) for row in chosen])
        return labels, inside, outside

    def frames(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, list[str]]:
        """Single frames [N, 1, 3, 32, 32] and what is on them, as an image model learns from.

        A caption has the glyph, its size, where it is, and the texture: all that a frame shows, and nothing that moves.
        """
        glyphs = rng.integers(len(GLYPHS), size=count)
        # few textures at a time: what is on them counts, too
        textures = rng.permutation(len(TEXTURES))[:TOGETHER][rng.integers(TOGETHER, size=count)]
        sizes, rows, columns = (rng.integers(3, size=count) for _ in range(3))
        scales = np.array([0.6, 1.0, 1.4])[sizes] + rng.uniform(-0.1, 0.1, size=count)
        low, wide = SPRITE / 2 * scales, (SIZE - SPRITE * scales) / 3
        x, y = (low + wide * (cell + rng.random(count)) for cell in (columns, rows))
        bits, (down, right) = _glyphs(), np.mgrid[:SIZE, :SIZE].astype(np.float32)
        still, shown = np.zeros(1), np.ones(1, dtype=bool)
        masks = np.stack([
            _drawn(bits[glyph], x[i : i + 1], y[i : i + 1], scales[i : i + 1], still, shown, down, right)
            for i, glyph in enumerate(glyphs)
        ])  # fmt: skip
        colours = rng.integers(*BRIGHT, size=(count, 3)).astype(np.uint8)
        names = list(GLYPHS)
        said = [
            CAPTIONS[form].format(
                glyph=names[glyphs[i]],
                size=SIZES[sizes[i]],
                row=ROWS[rows[i]],
                column=COLUMNS[columns[i]],
                texture=TEXTURES[textures[i]],
            )
            for i, form in enumerate(rng.integers(len(CAPTIONS), size=count))
        ]
        return paste(masks, colours, self.crops(textures, rng)), said

    def actions(self, count: int, rng: np.random.Generator) -> tuple[list[str], list[str]]:
        """Actions [N] in places, each said in two ways: what a text model knows of words, whatever frames show."""
        motions, manners = rng.integers(len(MOTIONS), size=count), rng.integers(len(MANNERS), size=count)
        textures = rng.permutation(len(TEXTURES))[:TOGETHER][rng.integers(TOGETHER, size=count)]
        ways = np.array([rng.permutation(len(ACTIONS))[:2] for _ in range(count)]).T
        one, other = (
            [
                ACTIONS[way].format(motion=MOTIONS[motion], manner=MANNERS[manner], texture=TEXTURES[texture])
                for way, motion, manner, texture in zip(row, motions, manners, textures, strict=True)
            ]
            for row in ways
        )
        return one, other


def paste(masks: np.ndarray, colours: np.ndarray, backgrounds: np.ndarray) -> np.ndarray:
    """Glyphs [N, T, H, W] in colours [N, 3] on backgrounds [N, H, W, 3]: clips [N, T, 3, H, W] of bytes."""
    behind = backgrounds.transpose(0, 3, 1, 2)[:, None]
    return np.where(masks[:, :, None], colours[:, None, :, None, None], behind)


def _texture(rng: np.random.Generator) -> np.ndarray:
    """Value noise between two colours, [48, 48, 3] of bytes."""
    grid = int(rng.integers(3, 9))
    noise = Image.fromarray(rng.random((grid, grid)).astype(np.float32))
    mixed = np.asarray(noise.resize((48, 48), Image.Resampling.BILINEAR))[..., None]
    one, other = DARK * rng.random((2, 3))
    return (255 * (mixed * one + (1 - mixed) * other)).astype(np.uint8)
