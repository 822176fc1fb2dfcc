"""The contrastive loss of Section 3 in closed form, its gradient in parts and processes, and what a batch is."""

from __future__ import annotations

import math

import pytest
import torch
from accelerate import Accelerator
from streetclip import contrastive, data
from streetclip.config import Config
from streetclip.model import Clip, load_model
from torch import Tensor
from torch.nn import functional as F

torch.set_num_threads(1)
TINY = Config(width=16, heads=2, vision_layers=1, text_layers=1, projection=8)
LOG_SCALE = torch.tensor(2.0, dtype=torch.float64)


def features(count: int, seed: int, width: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator, dtype=torch.float64), dim=-1)


@pytest.fixture(scope="module")
def clip() -> Clip:
    torch.manual_seed(0)
    return load_model(TINY)


# ---- the loss


def test_equal_logits_give_log_b() -> None:
    same = features(1, 0).expand(7, -1)
    found = contrastive.contrastive_loss(same, same, LOG_SCALE)
    for loss in found[:3]:
        assert loss.item() == pytest.approx(math.log(7), abs=1e-12)


def test_a_batch_of_one_costs_nothing() -> None:
    assert contrastive.contrastive_loss(features(1, 0), features(1, 1), LOG_SCALE).loss.item() == 0


def test_is_the_mean_of_rows_and_columns() -> None:
    """½ [CE(L) + CE(Lᵀ)], written out: −log of the softmax's own entry."""
    images, texts = features(5, 0), features(5, 1)
    logits = (LOG_SCALE.exp() * images @ texts.T).tolist()
    rows = [math.log(sum(math.exp(x) for x in row)) - row[i] for i, row in enumerate(logits)]
    columns = [
        math.log(sum(math.exp(x) for x in column)) - column[i] for i, column in enumerate(zip(*logits, strict=True))
    ]
    found = contrastive.contrastive_loss(images, texts, LOG_SCALE)
    assert found.classifier.item() == pytest.approx(sum(rows) / 5, abs=1e-12)
    assert found.representation.item() == pytest.approx(sum(columns) / 5, abs=1e-12)
    assert found.loss.item() == pytest.approx((sum(rows) + sum(columns)) / 10, abs=1e-12)


def test_swapping_towers_changes_nothing() -> None:
    images, texts = features(5, 0), features(5, 1)
    one, other = (contrastive.contrastive_loss(*pair, LOG_SCALE) for pair in ((images, texts), (texts, images)))
    assert one.loss.item() == pytest.approx(other.loss.item(), abs=1e-12)
    assert one.classifier.item() == pytest.approx(other.representation.item(), abs=1e-12)


def test_is_clips_own_loss(clip: Clip) -> None:
    """transformers' CLIPModel gives the same loss."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(6, 3, 32, 32, generator=generator)
    ids = clip.tokenize(
        [f"a street view photo in {name}." for name in ("baba", "fafa", "kaka", "lala", "mama", "nana")]
    )
    with torch.no_grad():
        theirs = clip.model(input_ids=ids, pixel_values=pixels, return_loss=True)
        images, texts = clip.encode_images(pixels), clip.encode_texts(ids)
        ours = contrastive.contrastive_loss(images, texts, clip.log_scale)
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(contrastive.logits(images, texts, clip.log_scale), theirs.logits_per_image)


def test_duplicate_captions_bound_the_classifier() -> None:
    """With n_c photos of a caption and hard targets, the classifier's loss is (1/B) Σ n_c log n_c at best."""
    number = torch.tensor([0, 0, 0, 1, 1, 2])
    corners = torch.eye(3, dtype=torch.float64)[number]  # photos at their captions: others are far
    bound = sum(n * math.log(n) for n in (3, 2, 1)) / 6
    losses = [
        contrastive.contrastive_loss(corners, corners, torch.tensor(scale)).classifier for scale in (2.0, 3.0, 5.0)
    ]
    assert losses[-1].item() == pytest.approx(bound, abs=1e-9)
    assert losses[0] > losses[1] > losses[2] >= bound
    generator = torch.Generator().manual_seed(0)
    for seed in range(20):
        images, texts = features(6, seed), features(3, seed + 100)[number]
        scale = 5 * torch.rand((), generator=generator, dtype=torch.float64)
        assert contrastive.contrastive_loss(images, texts, scale).classifier >= bound - 1e-12


def test_soft_targets_reach_their_entropy() -> None:
    number = torch.tensor([0, 0, 0, 1, 1, 2])
    same = number[:, None] == number[None]
    corners = torch.eye(3, dtype=torch.float64)[number]
    entropy = sum(n * math.log(n) for n in (3, 2, 1)) / 6
    found = contrastive.contrastive_loss(corners, corners, torch.tensor(6.0, dtype=torch.float64), same, soft=True)
    assert found.loss.item() - entropy == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(contrastive.soft_targets(same).sum(1), torch.ones(6))
    alone = torch.eye(6, dtype=torch.bool)  # no caption twice: as hard targets
    images, texts = features(6, 0), features(6, 1)
    hard, soft = (contrastive.contrastive_loss(images, texts, LOG_SCALE, alone, soft=way) for way in (False, True))
    torch.testing.assert_close(hard.loss, soft.loss)


def test_accuracy_counts_equal_captions() -> None:
    """With hard targets, too: of equal captions the first has the greatest logit, and is right."""
    images = torch.eye(3, dtype=torch.float64)
    texts = images[[1, 0, 2]]
    assert contrastive.contrastive_loss(images, texts, LOG_SCALE).accuracy.item() == pytest.approx(1 / 3)
    same = torch.tensor([[True, True, False], [True, True, False], [False, False, True]])
    for soft in (False, True):
        assert contrastive.contrastive_loss(images, texts, LOG_SCALE, same, soft=soft).accuracy.item() == 1


# ---- its gradient


def batch(clip: Clip, count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64)
    syllables = ["ba", "da", "fa", "ga", "ka", "la", "ma", "na", "pa", "ra", "sa", "ta"]
    return pixels, clip.tokenize([f"a street view photo in {one}{other}." for one in syllables[:3] for other in
                                  syllables[: count // 3]])  # fmt: skip


def gradients(clip: Clip) -> dict[str, Tensor]:
    return {name: value.grad.clone() for name, value in clip.named_parameters() if value.grad is not None}


def through_parts(clip: Clip, sizes: list[int], same: Tensor | None = None, soft: bool = False) -> dict[str, Tensor]:
    clip.zero_grad()
    pixels, ids = batch(clip)
    contrastive.backward(
        pixels.split(sizes),
        ids.split(sizes),
        clip.encode_images,
        clip.encode_texts,
        clip.log_scale,
        Accelerator(),
        same,
        soft=soft,
    )
    return gradients(clip)


@pytest.fixture(scope="module")
def double() -> Clip:
    """In 64 bits; features too, which float() would cut."""
    torch.manual_seed(0)
    clip = load_model(TINY).double()

    def images(pixels: Tensor) -> Tensor:
        return F.normalize(clip.model.visual_projection(clip.model.vision_model(pixels).pooler_output), dim=-1)

    def texts(ids: Tensor) -> Tensor:
        return F.normalize(clip.model.text_projection(clip.model.text_model(ids).pooler_output), dim=-1)

    clip.encode_images, clip.encode_texts = images, texts  # type: ignore[method-assign]
    return clip


@pytest.mark.parametrize("soft", [False, True])
def test_gradient_is_autograds(double: Clip, soft: bool) -> None:
    number = torch.arange(12) // 2
    same = number[:, None] == number[None]
    pixels, ids = batch(double)
    double.zero_grad()
    contrastive.contrastive_loss(
        double.encode_images(pixels), double.encode_texts(ids), double.log_scale, same, soft=soft
    ).loss.backward()
    whole = gradients(double)
    assert set(whole) == {name for name, _ in double.named_parameters()}
    for sizes in ([12], [4, 4, 4], [5, 5, 2], [1] * 12):  # GradCache
        parts = through_parts(double, sizes, same, soft)
        for name, value in whole.items():
            torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-12, msg=name)


def test_accumulated_small_batches_are_another_objective(double: Clip) -> None:
    """Their negatives are fewer."""
    pixels, ids = batch(double)
    double.zero_grad()
    for one, other in zip(pixels.split(4), ids.split(4), strict=True):
        loss = contrastive.contrastive_loss(
            double.encode_images(one), double.encode_texts(other), double.log_scale
        ).loss
        (loss / 3).backward()
    accumulated = gradients(double)
    whole = through_parts(double, [12])
    name = "model.visual_projection.weight"
    assert (accumulated[name] - whole[name]).norm() > 0.1 * whole[name].norm()


def test_gradients_add_up(double: Clip) -> None:
    """What is there stays: a second backward doubles all, the temperature's too."""
    once = through_parts(double, [6, 6])
    pixels, ids = batch(double)
    contrastive.backward(
        pixels.split([6, 6]), ids.split([6, 6]), double.encode_images, double.encode_texts, double.log_scale,
        Accelerator(),
    )  # fmt: skip
    for name, value in gradients(double).items():
        torch.testing.assert_close(value, 2 * once[name], msg=name)


def test_frozen_tower_gets_no_gradient(double: Clip) -> None:
    frozen = [*double.model.text_model.parameters(), *double.model.text_projection.parameters()]
    for value in frozen:
        value.requires_grad_(False)
    try:
        whole, parts = through_parts(double, [12]), through_parts(double, [6, 6])
    finally:
        for value in frozen:
            value.requires_grad_(True)
    assert "model.logit_scale" in whole
    assert whole.keys() == parts.keys()
    assert not [name for name in whole if "text" in name]


def test_gradient_of_the_formula() -> None:
    """∂loss/∂v_i = exp(τ)/2B · Σ_j (P_ij + Q_ij − 2·1[i=j]) x_j, with P, Q the softmax over rows and columns."""
    images, texts = features(5, 0).requires_grad_(), features(5, 1)
    contrastive.contrastive_loss(images, texts, LOG_SCALE).loss.backward()
    logits = LOG_SCALE.exp() * images.detach() @ texts.T
    weights = logits.softmax(1) + logits.softmax(0) - 2 * torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(images.grad, LOG_SCALE.exp() / 10 * weights @ texts)


# ---- the tiny CLIP


def test_features_do_not_see_what_stands_after_the_end(clip: Clip) -> None:
    short = clip.tokenize(["a street view photo in baba."])
    both = clip.tokenize(["a street view photo in baba.", "a street view photo close to the town of kuku in fafa."])
    assert both.shape[1] > short.shape[1]
    with torch.no_grad():
        torch.testing.assert_close(clip.encode_texts(short)[0], clip.encode_texts(both)[0], rtol=1e-5, atol=1e-6)


def test_names_fall_into_syllables(clip: Clip) -> None:
    from streetclip import world

    places = world.make(0)
    for country, values in zip(places.country_names, places.attributes[:: world.REGIONS * world.CITIES], strict=True):
        pieces = clip.tokenizer.convert_ids_to_tokens(clip.tokenizer(country)["input_ids"])[1:-1]
        assert pieces == [world.SYLLABLES[i][value] for i, value in enumerate(values[:4])]
    for city in places.city_names:
        pieces = clip.tokenizer.convert_ids_to_tokens(clip.tokenizer(city)["input_ids"])[1:-1]
        assert len(pieces) == 2
        assert "<unknown>" not in pieces


def test_templates_have_no_unknown_words(clip: Clip) -> None:
    from streetclip import world

    words = [word for of in world.ATTRIBUTES.values() for word in of]
    for text in (*words, TINY.template.replace("[", "").replace("]", ""), TINY.country_template, TINY.city_template):
        assert "<unknown>" not in clip.tokenizer.convert_ids_to_tokens(clip.tokenizer(text)["input_ids"]), text


def test_batches_are_epochs() -> None:
    """Each photo once before any is twice, also where an epoch ends within a batch."""
    drawn = [i for step in range(6) for i in data.batch_of(10, 5, step, seed=3, phase=1).tolist()]
    assert [sorted(drawn[i : i + 10]) for i in (0, 10, 20)] == [list(range(10))] * 3
    assert drawn[:10] != drawn[10:20]
    drawn = [i for step in range(5) for i in data.batch_of(6, 4, step, seed=3, phase=1).tolist()]
    assert [sorted(drawn[i : i + 6]) for i in (0, 6, 12)] == [list(range(6))] * 3
