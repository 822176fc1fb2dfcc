"""The generated worlds: feature vectors, moving sprites, stripes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo.errors import UserError
from open_mede import data, sprites
from open_mede.config import Config
from open_mede.features import CLASSES, SIDE, TEXT, FeatureWorld, generate
from open_mede.stripes import ScubaBackground, stripe_background

STATIC, TEMPORAL = slice(0, SIDE), slice(SIDE, None)
MOTIONS, MANNERS = sprites.MOTIONS, sprites.MANNERS


# ---- features


def test_feature_world_shapes() -> None:
    world = generate(0, 50, 30)
    assert len(world.names) == len(set(world.names)) == 2 * CLASSES
    assert world.texts.shape == (2 * CLASSES, TEXT)
    np.testing.assert_allclose(np.linalg.norm(world.texts, axis=1), 1, rtol=1e-5)
    assert world.start.shape == (TEXT, SIDE)
    assert world.train.inputs.shape == (50, 2 * SIDE)
    assert world.train.inputs.dtype == np.float32
    assert world.train.labels.max() < CLASSES
    assert set(world.tests) == {"base_in", "base_out", "novel_in", "novel_out"}
    for name, clips in world.tests.items():
        assert clips.inputs.shape == (30, 2 * SIDE)
        novel = name.startswith("novel")
        assert ((clips.labels >= CLASSES) == novel).all()


def arrays(world: FeatureWorld) -> list[np.ndarray]:
    sets = (world.train, *world.tests.values())
    return [world.texts, world.start, *(one.inputs for one in sets), *(one.labels for one in sets)]


def test_feature_world_is_its_seed_s() -> None:
    one, same, other = (arrays(generate(seed, 20, 10)) for seed in (3, 3, 4))
    for a, b, c in zip(one, same, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, c)


@pytest.mark.parametrize("kind", ["base", "novel"])
def test_in_and_out_of_context_share_motions_alone(kind: str) -> None:
    world = generate(1, 20, 200)
    inside, outside = world.tests[f"{kind}_in"], world.tests[f"{kind}_out"]
    np.testing.assert_array_equal(inside.labels, outside.labels)
    np.testing.assert_array_equal(inside.inputs[:, TEMPORAL], outside.inputs[:, TEMPORAL])
    assert (inside.inputs[:, STATIC] != outside.inputs[:, STATIC]).all()


def nearest(world: FeatureWorld, inputs: np.ndarray, half: slice) -> np.ndarray:
    """Known class whose mean of the test set in context is the nearest."""
    held = world.tests["base_in"]
    means = np.stack([held.inputs[held.labels == i][:, half].mean(0) for i in range(CLASSES)])
    return np.linalg.norm(inputs[:, None, half] - means, axis=-1).argmin(1)


def test_ratio_is_how_often_contexts_are_their_own() -> None:
    """1: always; 0: never. Motions do not change with it."""
    own = {ratio: generate(2, 1000, 1000, ratio=ratio) for ratio in (0.0, 0.5, 1.0)}
    right = {ratio: (nearest(w, w.train.inputs, STATIC) == w.train.labels).mean() for ratio, w in own.items()}
    assert right[1.0] > 0.9
    assert right[0.0] < 0.02
    assert right[0.5] == pytest.approx(0.5, abs=0.08)
    for world in own.values():
        np.testing.assert_array_equal(world.train.inputs[:, TEMPORAL], own[1.0].train.inputs[:, TEMPORAL])
        assert (nearest(world, world.train.inputs, TEMPORAL) == world.train.labels).mean() > 0.5


def test_motion_noise_is_of_motions() -> None:
    quiet, loud = (generate(2, 400, 10, motion_noise=noise) for noise in (0.0, 2.0))
    np.testing.assert_array_equal(quiet.train.inputs[:, STATIC], loud.train.inputs[:, STATIC])

    def within(world: FeatureWorld) -> float:
        held = world.train
        groups = [held.inputs[held.labels == i][:, TEMPORAL] for i in range(CLASSES)]
        return float(np.mean([((one - one.mean(0)) ** 2).mean() for one in groups]))

    # 0.3² of every coordinate, and the motion's 2² through a map of unit rows
    assert within(quiet) == pytest.approx(0.09, rel=0.15)
    assert within(loud) == pytest.approx(0.09 + 4.0, rel=0.25)


def test_the_start_knows_contexts_and_no_motions() -> None:
    """Chance is 5 %."""
    world = generate(0, 10, 800)

    def right(name: str) -> float:
        held = world.tests[name]
        first = CLASSES if name.startswith("novel") else 0
        found = held.inputs[:, STATIC] @ world.start.T
        found /= np.linalg.norm(found, axis=1, keepdims=True)
        said = (found @ world.texts[first : first + CLASSES].T).argmax(1) + first
        return float((said == held.labels).mean())

    for kind in ("base", "novel"):
        assert right(f"{kind}_in") > 0.6
        assert right(f"{kind}_out") < 0.1


# ---- sprites: classes and paths


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32))
def test_known_classes(seed: int) -> None:
    known = sprites.known_classes(seed)
    assert len(known) == len(set(known.tolist())) == 30
    assert known.min() >= 0
    assert known.max() < len(sprites.CLASSES) == 60
    assert (np.diff(known) > 0).all()
    motions, manners = np.divmod(known, len(MANNERS))
    assert set(motions.tolist()) == set(range(len(MOTIONS)))
    assert np.bincount(motions).max() <= 2
    assert set(manners.tolist()) == set(range(len(MANNERS)))
    np.testing.assert_array_equal(known, sprites.known_classes(seed))


def test_each_manner_is_known_about_ten_times() -> None:
    counts = np.array([np.bincount(sprites.known_classes(seed) % len(MANNERS)) for seed in range(300)])
    assert counts.min() >= 6
    assert counts.max() <= 14


def test_other_seeds_know_other_classes() -> None:
    assert len({tuple(sprites.known_classes(seed).tolist()) for seed in range(20)}) == 20


def path(motion: str, manner: str = "steady") -> sprites.Path:
    return sprites.path_of(sprites.CLASSES.index((motion, manner)))


def constant(*values: np.ndarray) -> bool:
    return all(bool((value == value[0]).all()) for value in values)


def test_compass_paths() -> None:
    """East is to the right, north is up; steady is in equal steps, accelerating in those of u²."""
    directions = {
        "east": (1, 0), "northeast": (1, -1), "north": (0, -1), "northwest": (-1, -1), "west": (-1, 0),
        "southwest": (-1, 1), "south": (0, 1), "southeast": (1, 1),
    }  # fmt: skip
    u = np.linspace(0, 1, sprites.FRAMES)
    for name, (right, down) in directions.items():
        held = path(name)
        length = np.hypot(held.x[-1], held.y[-1])
        assert length > 5
        share = length / np.hypot(right, down)
        np.testing.assert_allclose(held.x, right * share * u, atol=1e-9)
        np.testing.assert_allclose(held.y, down * share * u, atol=1e-9)
        assert constant(held.scale, held.angle, held.shown)
        np.testing.assert_allclose(path(name, "accelerating").x, right * share * u**2, atol=1e-9)
        halting = path(name, "halting")
        assert (halting.x[-1], halting.y[-1]) == pytest.approx((held.x[-1], held.y[-1]))
        steps = np.hypot(np.diff(halting.x), np.diff(halting.y))
        still = steps < 1e-9
        assert still.sum() >= 2
        assert not still[0]
        assert not still[-1]


def test_other_paths() -> None:
    clockwise, anticlockwise = path("clockwise"), path("anticlockwise")
    radius = np.hypot(clockwise.x, clockwise.y)
    np.testing.assert_allclose(radius, radius[0])
    # from the top to the right: y is down
    assert clockwise.y[0] == -radius[0]
    assert clockwise.x[1] > 0
    np.testing.assert_allclose(anticlockwise.x, -clockwise.x, atol=1e-9)
    np.testing.assert_allclose(anticlockwise.y, clockwise.y, atol=1e-9)
    grow, shrink = path("grow"), path("shrink")
    assert (np.diff(grow.scale) > 0).all()
    np.testing.assert_allclose(shrink.scale, grow.scale[::-1])
    flicker, blink = path("flicker"), path("blink")
    assert np.abs(np.diff(flicker.shown.astype(int))).sum() > np.abs(np.diff(blink.shown.astype(int))).sum() > 0
    sway, nod = path("sway"), path("nod")
    assert constant(sway.y, nod.x)
    np.testing.assert_array_equal(sway.x, nod.y)
    assert (np.diff(np.sign(np.diff(sway.x))) != 0).any()
    np.testing.assert_array_equal(path("turn").angle, -path("unwind").angle)
    assert (np.diff(path("turn").angle) > 0).all()
    assert path("bounce").y.min() < -5
    assert path("bounce").y.max() <= 0
    still = path("still")
    assert constant(still.x, still.y, still.scale, still.angle, still.shown)


def test_classes_are_told_by_motion() -> None:
    """All paths differ, but for `still` in three manners."""

    def bits(held: sprites.Path) -> bytes:
        return np.stack([held.x, held.y, held.scale, held.angle, held.shown.astype(float)]).round(9).tobytes()

    assert len({bits(sprites.path_of(label)) for label in range(60)}) == 58


# ---- sprites: clips


def masks(motion: str, manner: str = "steady", count: int = 12) -> np.ndarray:
    """Of a class, with all glyphs in turn."""
    label = sprites.CLASSES.index((motion, manner))
    glyphs = np.arange(count) % len(sprites.GLYPHS)
    return sprites.masks_of(np.full(count, label), glyphs, np.random.default_rng(0))


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 59), st.integers(0, 999))
def test_masks_are_inside_unless_hidden(label: int, seed: int) -> None:
    found = sprites.masks_of(np.full(3, label), np.array([0, 4, 9]), np.random.default_rng(seed))
    assert found.shape == (3, sprites.FRAMES, sprites.SIZE, sprites.SIZE)
    assert found.dtype == bool
    shown = sprites.path_of(label).shown
    pixels = found.sum((2, 3))
    assert (pixels[:, ~shown] == 0).all()
    assert (pixels[:, shown] > 0).all()


@pytest.mark.parametrize("motion", [*MOTIONS[:10], "sway", "nod", "bounce", "still", "flicker"])
def test_no_part_is_cut_off(motion: str) -> None:
    """A glyph that neither turns nor changes its size has the same pixels in every frame that it is in."""
    for manner in MANNERS:
        pixels = masks(motion, manner).sum((2, 3))
        for row in pixels:
            assert len(set(row[row > 0].tolist())) == 1


def test_east_is_to_the_right_and_north_is_up() -> None:
    rows, columns = np.mgrid[: sprites.SIZE, : sprites.SIZE]
    east, north = masks("east"), masks("north")
    x, y = ((found * grid).sum((2, 3)) / found.sum((2, 3)) for found, grid in ((east, columns), (north, rows)))
    assert (np.diff(x, axis=1) >= 0).all()
    assert (x[:, -1] - x[:, 0] > 5).all()
    assert (np.diff(y, axis=1) <= 0).all()
    assert (y[:, 0] - y[:, -1] > 5).all()


def test_paste_is_where_masks_say() -> None:
    world = sprites.SpriteWorld(0)
    rng = np.random.default_rng(1)
    labels = np.arange(0, 60, 7)
    found, colours = world.foregrounds(labels, rng)
    behind = world.crops(world.owner[labels], rng)
    clips = sprites.paste(found, colours, behind)
    assert clips.shape == (len(labels), sprites.FRAMES, 3, sprites.SIZE, sprites.SIZE)
    assert clips.dtype == np.uint8
    for clip, mask, colour, background in zip(clips, found, colours, behind, strict=True):
        for frame, where in zip(clip, mask, strict=True):
            assert (frame[:, where] == colour[:, None]).all()
            assert (frame[:, ~where] == background.transpose(2, 0, 1)[:, ~where]).all()


Pasted = tuple[np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture
def pasted(monkeypatch: pytest.MonkeyPatch) -> list[Pasted]:
    """(masks, colours, backgrounds) of every paste."""
    found: list[Pasted] = []
    held = sprites.paste

    def noted(*args: Any) -> np.ndarray:
        found.append(args)
        return held(*args)

    monkeypatch.setattr(sprites, "paste", noted)
    monkeypatch.setattr(sprites, "BACKGROUNDS", 12)
    return found


def inside_of(background: np.ndarray, texture: np.ndarray) -> bool:
    most = len(texture) - sprites.SIZE + 1
    views = np.lib.stride_tricks.sliding_window_view(texture, background.shape).reshape(most, most, *background.shape)
    return bool((views == background).all((2, 3, 4)).any())


def test_in_and_out_of_context_share_foregrounds(pasted: list[Pasted]) -> None:
    world = sprites.SpriteWorld(0)
    labels, inside, outside = world.test(world.novel, 40, 3, 1)
    assert set(labels.tolist()) == set(world.novel.tolist())
    assert outside.shape == (3, *inside.shape)
    found, colours, behind = pasted[0]
    stripes = {one.tobytes() for one in world.stripes}
    for draw, other in enumerate(pasted[1:]):
        np.testing.assert_array_equal(found, other[0])
        np.testing.assert_array_equal(colours, other[1])
        assert all(one.tobytes() in stripes for one in other[2])
        where = np.broadcast_to(found[:, :, None], inside.shape)
        np.testing.assert_array_equal(inside[where], outside[draw][where])
        assert (inside[~where] != outside[draw][~where]).mean() > 0.9
    for label, background in zip(labels, behind, strict=True):
        assert inside_of(background, world.textures[world.owner[label]])
    again = sprites.SpriteWorld(0).test(world.novel, 40, 3, 1)
    for one, other in zip((labels, inside, outside), again, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_training_contexts(ratio: float, pasted: list[Pasted]) -> None:
    """Own ones always; or those of any known class, their own as rarely as others."""
    world = sprites.SpriteWorld(3)
    labels = world.known[np.arange(60) % 30]
    clips = world.clips(labels, np.random.default_rng(0), ratio=ratio)
    assert clips.shape == (60, sprites.FRAMES, 3, sprites.SIZE, sprites.SIZE)
    ((_, _, behind),) = pasted
    own = [inside_of(b, world.textures[world.owner[label]]) for b, label in zip(behind, labels, strict=True)]
    if ratio == 1:
        assert all(own)
    else:
        assert sum(own) <= 10
        known = [world.textures[world.owner[label]] for label in world.known]
        assert all(any(inside_of(b, texture) for texture in known) for b in behind)


def test_world_s_names_and_textures() -> None:
    world = sprites.SpriteWorld(0)
    assert len({world.name(i) for i in range(60)}) == 60
    assert len({world.name(i, debiased=True) for i in range(60)}) == 60
    assert sorted(world.owner.tolist()) == list(range(60))
    assert set(world.known.tolist()) | set(world.novel.tolist()) == set(range(60))
    assert not set(world.known.tolist()) & set(world.novel.tolist())
    east = sprites.CLASSES.index(("east", "steady"))
    assert world.name(east, debiased=True) == "east steady"
    assert world.name(east) == f"east steady in {sprites.TEXTURES[world.owner[east]]}"
    assert len({one.tobytes() for one in world.textures}) == 60
    assert len(set(sprites.TEXTURES)) == 60
    other = sprites.SpriteWorld(1)
    assert not np.array_equal(world.textures, other.textures)


def test_frames_have_their_captions(pasted: list[Pasted]) -> None:
    """The texture that a caption names is behind the glyph; no motion is in it."""
    world = sprites.SpriteWorld(0)
    clips, said = world.frames(40, np.random.default_rng(0))
    assert clips.shape == (40, 1, 3, sprites.SIZE, sprites.SIZE)
    ((found, _, behind),) = pasted
    assert (found.sum((1, 2, 3)) > 0).all()
    for text, background in zip(said, behind, strict=True):
        words = text.split()
        (texture,) = [word for word in words if word in sprites.TEXTURES]
        assert inside_of(background, world.textures[sprites.TEXTURES.index(texture)])
        assert not set(words) & {*MOTIONS, *MANNERS}
    again, same = world.frames(40, np.random.default_rng(0))
    np.testing.assert_array_equal(clips, again)
    assert said == same


def test_sprite_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sprites, "BACKGROUNDS", 12)
    config = Config(dataset="sprites", model="tiny", clips=60, test_clips=30, draws=2, seed=0)
    found = data.load(config)
    assert found.train is not None
    assert len(found.train) == 60
    assert len(found.train.classes) == 30
    assert np.bincount(found.train.labels).tolist() == [2] * 30
    assert {name: len(one) for name, one in found.tests.items()} == {
        "base_in": 30, "base_out": 60, "novel_in": 30, "novel_out": 60
    }  # fmt: skip
    for kind in ("base", "novel"):
        inside, outside = (found.tests[f"{kind}_{where}"] for where in ("in", "out"))
        assert inside.classes == outside.classes
        np.testing.assert_array_equal(np.tile(inside.labels, 2), outside.labels)
    assert not set(found.tests["base_in"].classes) & set(found.tests["novel_in"].classes)
    with pytest.raises(UserError, match="--holdout is 29 of 30"):
        data.load(Config(dataset="sprites", model="tiny", clips=60, test_clips=30, draws=2, holdout=29))


# ---- order of an epoch


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 60), st.integers(1, 12), st.integers(0, 50), st.integers(0, 9))
def test_batches_of_an_epoch(count: int, batch: int, epoch: int, seed: int) -> None:
    found = data.batches(count, batch, epoch, seed)
    assert found.shape == (count // batch, batch)
    assert len(set(found.ravel().tolist())) == found.size
    assert set(found.ravel().tolist()) <= set(range(count))
    np.testing.assert_array_equal(found, data.batches(count, batch, epoch, seed))


def test_orders_differ() -> None:
    found = [data.batches(200, 10, *key).tobytes() for key in ((0, 0), (1, 0), (0, 1), (0, 0, 1))]
    assert len(set(found)) == 4


# ---- stripes


@pytest.mark.parametrize("seed", range(5))
def test_stripes_have_two_colours(seed: int) -> None:
    """One and its complement."""
    found = stripe_background(np.random.default_rng(seed))
    assert found.shape == (256, 256, 3)
    assert found.dtype == np.uint8
    colours = np.unique(found.reshape(-1, 3), axis=0).astype(int)
    assert len(colours) == 2
    assert np.abs(colours.sum(0) - 255).max() <= 1
    shares = (found == colours[0]).all(-1).mean()
    assert 0.1 < shares < 0.9


def test_stripes_are_their_seed_s() -> None:
    one, same, other = (stripe_background(np.random.default_rng(seed), 32) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)


@pytest.mark.parametrize("size", [32, 100, 256, 300])
def test_stripes_of_any_size(size: int) -> None:
    found = stripe_background(np.random.default_rng(0), size)
    assert found.shape == (size, size, 3)
    assert found.std() > 1


def test_scuba_keeps_the_foreground() -> None:
    rng = np.random.default_rng(0)
    frames = rng.integers(256, size=(4, 20, 30, 3)).astype(np.uint8)
    masks_ = rng.random((4, 20, 30)) < 0.4
    found = ScubaBackground(1)(frames, masks_)
    assert (found[masks_] == frames[masks_]).all()
    behind = ScubaBackground(1)(frames, np.zeros_like(masks_))
    assert (behind == behind[:1]).all()  # the same in all frames
    assert (found[~masks_] == behind[~masks_]).all()
    assert not np.array_equal(behind, ScubaBackground(2)(frames, np.zeros_like(masks_)))
    half = ScubaBackground(1)(frames, np.full(masks_.shape, 0.5))
    assert (np.abs(half - (frames.astype(float) + behind) / 2) <= 0.5).all()
    grey = np.full((20, 30, 3), 9, dtype=np.uint8)
    assert (ScubaBackground()(frames, masks_, grey)[~masks_] == 9).all()
    for bad, says in (((frames[..., 0], masks_), "colour last"), ((frames, masks_[:2]), "one mask"),
                      ((frames, masks_, grey[:3]), "background has shape")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            ScubaBackground()(*bad)
