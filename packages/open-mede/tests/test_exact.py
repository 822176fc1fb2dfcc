"""The cross-batch step, the averages, the baselines and the video learner against numbers by hand and other ways of
computing them (the card's exact checks)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo.errors import UserError
from open_mede import baselines, crossbatch, ensemble, metrics
from open_mede.config import AverageOptions, Config
from open_mede.crossbatch import cross_batch_step, gradient_of, virtual_step
from open_mede.ensemble import (
    ExponentialWeightAverage,
    GaussianWeightAverage,
    UniformWeightAverage,
    WeightAverage,
    gaussian_weights,
)
from open_mede.features import generate
from open_mede.model import (
    FeatureClassifier,
    TemporalAttention,
    VideoTextClassifier,
    load_classifier,
    load_model,
    tiny_clip,
    tiny_tokenizer,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPModel, XCLIPConfig, XCLIPModel

torch.set_num_threads(1)

TINY = Config(
    dataset="sprites", model="tiny", width=8, heads=2, vision_layers=2, text_layers=1, patch=16, expand=True,
    border="mask", adapter=0, difference=False, trained="vision",
)  # fmt: skip
NAMES = ("east steady", "west halting", "turn accelerating", "north steady")
Batch = tuple[Tensor, Tensor]


# ---- material


def network(seed: int = 0, widths: Sequence[int] = (5, 7, 3)) -> nn.Sequential:
    """Two layers in 64 bits, with a smooth bend."""
    torch.manual_seed(seed)
    layers = [nn.Linear(widths[0], widths[1]), nn.Tanh(), nn.Linear(widths[1], widths[2])]
    return nn.Sequential(*layers).double()


def batch(seed: int, size: int = 6) -> Batch:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=g).double(), torch.randint(3, (size,), generator=g)


def loss_of(module: nn.Module, size: int = 6) -> Callable[[Any], Tensor]:
    """Cross-entropy: its sum over the size of a whole batch, so that shares add up."""
    return lambda given: F.cross_entropy(module(given[0]), given[1], reduction="sum") / size


def grads(module: nn.Module) -> Tensor:
    found = [value.grad for value in module.parameters() if value.requires_grad]
    return torch.cat([one.flatten() for one in found if one is not None])


def flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([one.flatten() for one in tensors])


def at(module: nn.Module, given: Any) -> Tensor:
    """Gradient of the loss as the module stands."""
    return flat(torch.autograd.grad(loss_of(module)(given), list(module.parameters())))


def moved(module: nn.Module, given: Any, alpha: float) -> nn.Module:
    """A copy after one step on a batch."""
    other = network()
    other.load_state_dict(module.state_dict())
    found = torch.autograd.grad(loss_of(module)(given), list(module.parameters()))
    with torch.no_grad():
        for value, one in zip(other.parameters(), found, strict=True):
            value.sub_(alpha * one)
    return other


def never(given: Any) -> Tensor:
    raise AssertionError("the query was looked at")


# ---- cross-batch step


def test_alpha_zero_is_both_batches() -> None:
    module, support, query = network(), batch(1), batch(2)
    for delta in (1.0, 0.3):
        found = cross_batch_step(module, loss_of(module), support, query, alpha=0.0, delta=delta)
        both = loss_of(module)(support) + delta * loss_of(module)(query)
        wanted = flat(torch.autograd.grad(both, list(module.parameters())))
        torch.testing.assert_close(grads(module), wanted, rtol=0, atol=1e-10)
        assert float(found.support_loss) == pytest.approx(loss_of(module)(support).item(), abs=1e-12)
        assert float(found.query_loss) == pytest.approx(loss_of(module)(query).item(), abs=1e-12)


def test_delta_zero_is_the_support_batch() -> None:
    module, support = network(), batch(1)

    def loss(given: Any) -> Tensor:
        return never(given) if given is None else loss_of(module)(given)

    cross_batch_step(module, loss, support, None, alpha=0.7, delta=0.0)
    torch.testing.assert_close(grads(module), at(module, support), rtol=0, atol=1e-12)


def test_first_order_is_the_gradient_at_the_moved_weights() -> None:
    module, support, query = network(), batch(1), batch(2)
    found = cross_batch_step(module, loss_of(module), support, query, alpha=0.7, delta=0.4)
    there = moved(module, support, 0.7)
    torch.testing.assert_close(grads(module), at(module, support) + 0.4 * at(there, query), rtol=0, atol=1e-12)
    assert float(found.query_loss) == pytest.approx(loss_of(there)(query).item(), abs=1e-12)


class Point(nn.Module):
    """θ alone, and a frozen one beside it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.randn(size, dtype=torch.float64))
        self.still = nn.Parameter(torch.ones(1, dtype=torch.float64), requires_grad=False)


@pytest.mark.parametrize("first_order", [True, False])
def test_quadratic_in_closed_form(first_order: bool) -> None:
    """L = ½θᵀAθ − bᵀθ: (Aθ − b) + δ (I − αA) (A(θ − α(Aθ − b)) − b), without the Hessian (I − αA) in first order."""
    torch.manual_seed(0)
    point = Point(4)
    half = torch.randn(4, 4, dtype=torch.float64)
    a, b = half @ half.T, torch.randn(4, dtype=torch.float64)
    theta, alpha, delta = point.theta.detach().clone(), 0.2, 0.6

    def loss(given: Any) -> Tensor:
        return point.still * (0.5 * point.theta @ given[0] @ point.theta - given[1] @ point.theta)

    def sum_of(given: Any) -> Tensor:
        return loss(given).sum()

    cross_batch_step(point, sum_of, (a, b), (a, b), alpha=alpha, delta=delta, first_order=first_order)
    g = a @ theta - b
    second = a @ (theta - alpha * g) - b
    if not first_order:
        second = second - alpha * a @ second
    assert point.theta.grad is not None
    torch.testing.assert_close(point.theta.grad, g + delta * second, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(point.theta.detach(), theta, rtol=0, atol=0)
    assert point.still.grad is None


def test_finite_difference_is_the_hessian_times_the_support_gradient() -> None:
    """(∇L^Q(θ − αg_S) − ∇L^Q(θ)) / α → −H_Q g_S, with an error that shrinks as α does."""
    module, support, query = network(), batch(1), batch(2)
    parameters = list(module.parameters())
    g = torch.autograd.grad(loss_of(module)(support), parameters)
    of_query = torch.autograd.grad(loss_of(module)(query), parameters, create_graph=True)
    hessian = -flat(torch.autograd.grad(of_query, parameters, grad_outputs=g))
    assert hessian.norm() > 0.01
    cross_batch_step(module, loss_of(module), support, query, alpha=0.0)
    plain = grads(module)
    errors = []
    for alpha in (1e-2, 1e-3, 1e-4):
        cross_batch_step(module, loss_of(module), support, query, alpha=alpha)
        errors.append(float(((grads(module) - plain) / alpha - hessian).norm() / hessian.norm()))
    assert errors[2] < 1e-3
    assert errors[1] / errors[0] == pytest.approx(0.1, rel=0.2)
    assert errors[2] / errors[1] == pytest.approx(0.1, rel=0.2)


@settings(deadline=None, max_examples=40)
@given(
    widths=st.tuples(st.integers(1, 17), st.integers(1, 13)), alpha=st.floats(1e-12, 1e6), delta=st.floats(0, 10),
    first_order=st.booleans(),
)  # fmt: skip
def test_no_trace_is_left(widths: tuple[int, int], alpha: float, delta: float, first_order: bool) -> None:
    """In 32 bits, where taking away and adding again would not come back."""
    module = nn.Linear(*widths)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    x, y = torch.randn(2, 3, widths[0]), torch.randn(2, 3, widths[1])
    cross_batch_step(
        module, lambda i: (module(x[i]) - y[i]).square().mean(), 0, 1, alpha=alpha, delta=delta,
        first_order=first_order,
    )  # fmt: skip
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name])
    torch.optim.SGD(module.parameters(), lr=0.0).step()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items() if delta < 1)


def test_no_trace_is_left_by_a_query_that_fails() -> None:
    module = network().float()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    moved_then: list[bool] = []

    def loss(given: Any) -> Tensor:
        if given is None:
            moved_then.append(not torch.equal(module[0].weight, before["0.weight"]))
            raise RuntimeError("out of memory")
        return F.cross_entropy(module(given[0].float()), given[1])

    for step in (cross_batch_step, virtual_step):
        with pytest.raises(RuntimeError, match="out of memory"):
            step(module, loss, batch(1), None, alpha=0.3)
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert moved_then[0]


@pytest.mark.parametrize("first_order", [True, False])
def test_micro_batches_add_up(first_order: bool) -> None:
    module, support, query = network(), batch(1), batch(2)
    whole = cross_batch_step(module, loss_of(module), support, query, alpha=0.7, first_order=first_order)
    wanted = grads(module)
    parts = [[(x[:1], y[:1]), (x[1:4], y[1:4]), (x[4:], y[4:])] for x, y in (support, query)]
    found = cross_batch_step(module, loss_of(module), *parts, alpha=0.7, first_order=first_order)
    torch.testing.assert_close(grads(module), wanted, rtol=0, atol=1e-12)
    for name in ("support_loss", "query_loss", "cosine"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(whole, name)), abs=1e-12)
    seen = [virtual_step(module, loss_of(module), *pair, alpha=0.7) for pair in (parts, (support, query))]
    assert float(seen[0].gain) == pytest.approx(float(seen[1].gain), abs=1e-12)


def test_reduce_adds_the_other_shares() -> None:
    """Two processes, each with half of both batches: the one's `reduce` adds what the other has at the same weights."""
    module, support, query = network(), batch(1), batch(2)
    loss, parameters = loss_of(module), list(module.parameters())
    halves = [[tuple(one[i::2] for one in given) for i in (0, 1)] for given in (support, query)]
    whole = cross_batch_step(module, loss, support, query, alpha=0.7, delta=0.4)
    wanted = grads(module)
    others = iter([halves[0][1], halves[1][1]])

    def reduce(tensors: Sequence[Tensor]) -> None:
        value, gradient = gradient_of(loss, next(others), parameters, None)
        for one, more in zip(tensors, [value, *gradient], strict=True):
            one.add_(more)

    found = cross_batch_step(module, loss, halves[0][0], halves[1][0], alpha=0.7, delta=0.4, reduce=reduce)
    torch.testing.assert_close(grads(module), wanted, rtol=0, atol=1e-12)
    for name in ("support_loss", "query_loss", "cosine"):
        assert float(getattr(found, name)) == pytest.approx(float(getattr(whole, name)), abs=1e-12)
    # a process without a share has nothing to add, and gets all
    given = iter([support, query])

    def all_of(tensors: Sequence[Tensor]) -> None:
        value, gradient = gradient_of(loss, next(given), parameters, None)
        for one, more in zip(tensors, [value, *gradient], strict=True):
            one.add_(more)

    cross_batch_step(module, loss, [], [], alpha=0.7, delta=0.4, reduce=all_of)
    torch.testing.assert_close(grads(module), wanted, rtol=0, atol=1e-12)


def test_unused_and_frozen_parameters() -> None:
    """One that the loss does not see gets zeros; one without a gradient is left alone; old gradients are replaced."""
    module = nn.ModuleDict({"used": nn.Linear(5, 3), "unused": nn.Linear(2, 2), "frozen": nn.Linear(5, 3)}).double()
    module["frozen"].requires_grad_(False)
    module["used"].weight.grad = torch.full((3, 5), 7.0).double()

    def loss(given: Any) -> Tensor:
        return F.cross_entropy(module["used"](given[0]) + module["frozen"](given[0]), given[1])

    for first_order in (True, False):
        cross_batch_step(module, loss, batch(1), batch(2), alpha=0.1, first_order=first_order)
        assert module["unused"].weight.grad is not None
        assert module["unused"].weight.grad.abs().sum() == 0
        assert module["frozen"].weight.grad is None
        assert module["used"].weight.grad is not None
        assert 0 < module["used"].weight.grad.abs().max() < 7


@pytest.mark.parametrize(
    ("change", "says"),
    [({"alpha": -0.1}, "alpha is -0.1"), ({"delta": -1.0}, "delta -1"), ({"frozen": True}, "nothing to train"),
     ({"first_order": False, "reduce": lambda tensors: None}, "one process")],
)  # fmt: skip
def test_step_refused(change: dict[str, Any], says: str) -> None:
    module = network()
    module.requires_grad_(not change.pop("frozen", False))
    with pytest.raises(ValueError, match=says):
        cross_batch_step(module, never, None, None, **{"alpha": 0.1, **change})


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 5))
def test_cosine_is_numpy_s(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    one, other = ([rng.normal(size=(size, 3)), rng.normal(size=size)] for _ in range(2))
    a, b = (np.concatenate([x.ravel() for x in side]) for side in (one, other))
    found = crossbatch.cosine([torch.from_numpy(x) for x in one], [torch.from_numpy(x) for x in other])
    assert float(found) == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-10)


def test_cosine_of_what_vanishes_is_zero() -> None:
    some, none = [torch.ones(3), torch.ones(2, 2)], [torch.zeros(3), torch.zeros(2, 2)]
    assert [float(crossbatch.cosine(*pair)) for pair in ((some, none), (none, some), (none, none))] == [0, 0, 0]
    assert float(crossbatch.cosine(some, some)) == pytest.approx(1)


def test_virtual_step_by_hand() -> None:
    module, support, query = network(), batch(1), batch(2)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    for i, value in enumerate(module.parameters()):
        value.grad = torch.full_like(value, float(i))
    found = virtual_step(module, loss_of(module), support, query, alpha=0.7)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(bool((value.grad == i).all()) for i, value in enumerate(module.parameters()))
    there = moved(module, support, 0.7)
    assert float(found.gain) == pytest.approx((loss_of(there)(query) - loss_of(module)(query)).item(), abs=1e-12)
    assert float(found.query_loss) == pytest.approx(loss_of(module)(query).item(), abs=1e-12)
    angle = F.cosine_similarity(at(module, support), at(module, query), dim=0)
    assert float(found.cosine) == pytest.approx(angle.item(), abs=1e-10)
    assert float(found.gain) != 0


def test_second_order_through_a_video_learner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equals differences of L^S(θ) + δ L^Q(θ − α∇L^S(θ)) along random directions, in 64 bits."""
    # features are cast to 32 bits, which are too few for differences
    monkeypatch.setattr(torch.Tensor, "float", lambda self: self)
    model = clip(adapter=2, difference=True, vision_layers=1).double()
    texts = torch.randn(4, 8, dtype=torch.float64)
    g = torch.Generator().manual_seed(5)
    batches = [(torch.randn(3, 2, 3, 32, 32, generator=g).double(), torch.tensor([i, 2, 3])) for i in (0, 1)]
    parameters = [value for value in model.parameters() if value.requires_grad]

    def loss(given: Any) -> Tensor:
        return F.cross_entropy(model(given[0], texts), given[1])

    alpha, delta = 0.05, 0.8

    def objective() -> float:
        inner = torch.autograd.grad(loss(batches[0]), parameters)
        before = [value.detach().clone() for value in parameters]
        with torch.no_grad():
            first = float(loss(batches[0]))
            torch._foreach_sub_(parameters, list(inner), alpha=alpha)
            second = float(loss(batches[1]))
            torch._foreach_copy_(parameters, before)
        return first + delta * second

    cross_batch_step(model, loss, *batches, alpha=alpha, delta=delta, first_order=True)
    first_order = grads(model)
    cross_batch_step(model, loss, *batches, alpha=alpha, delta=delta, first_order=False)
    gradient = [value.grad for value in parameters]
    assert (grads(model) - first_order).norm() > 0.01 * first_order.norm()
    for seed in range(3):
        g = torch.Generator().manual_seed(seed)
        direction = [torch.randn(value.shape, generator=g).double() for value in parameters]
        eps, sides = 1e-6, []
        for sign in (1, -1):
            with torch.no_grad():
                torch._foreach_add_(parameters, direction, alpha=sign * eps)
            sides.append(objective())
            with torch.no_grad():
                torch._foreach_sub_(parameters, direction, alpha=sign * eps)
        slope = sum(float((a * b).sum()) for a, b in zip(gradient, direction, strict=True) if a is not None)
        assert (sides[0] - sides[1]) / (2 * eps) == pytest.approx(slope, rel=1e-5)


def test_checkpointing_changes_no_step() -> None:
    """Activations that are computed again in the query's backward pass are those at θ′, not at θ."""
    found = []
    for checkpointing in (False, True):
        model = clip(vision_layers=2)
        if checkpointing:
            model.backbone.vision_model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        g = torch.Generator().manual_seed(5)
        batches = [(torch.randn(3, 2, 3, 32, 32, generator=g), torch.tensor([i, 2, 3])) for i in (0, 1)]
        texts = torch.randn(4, 8, generator=g)

        def loss(given: Any, model: nn.Module = model, texts: Tensor = texts) -> Tensor:
            return F.cross_entropy(model(given[0], texts), given[1])

        cross_batch_step(model, loss, *batches, alpha=0.5)
        found.append(grads(model))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-3


# ---- averages


def epochs_of(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    return [
        {"w": torch.randn(3, 2, generator=g), "b": torch.randn(2, generator=g), "n": torch.tensor(i)}
        for i in range(1, count + 1)
    ]


def fed(average: WeightAverage, epochs: Sequence[dict[str, Tensor]]) -> WeightAverage:
    for weights in epochs:
        average.update(weights)
    return average


def offline(epochs: Sequence[dict[str, Tensor]], weights: Sequence[float], name: str) -> Tensor:
    """Σ w_t θ_t / Σ w_t in 64 bits."""
    total = sum(w * one[name].double() for w, one in zip(weights, epochs, strict=True))
    assert isinstance(total, Tensor)
    return (total / sum(weights)).float()


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), mu=st.floats(-3, 45), sigma=st.floats(2, 100), seed=st.integers(0, 99))
def test_running_average_is_the_offline_one(count: int, mu: float, sigma: float, seed: int) -> None:
    """Also with the constant factor of the bell, which cancels."""
    epochs = epochs_of(count, seed)
    average = fed(GaussianWeightAverage(mu, sigma), epochs)
    for factor in (1.0, 1 / (math.sqrt(2 * math.pi) * sigma)):
        weights = [factor * math.exp(-((t - mu) ** 2) / (2 * sigma**2)) for t in range(1, count + 1)]
        for name in ("w", "b"):
            torch.testing.assert_close(average.average[name], offline(epochs, weights, name), rtol=1e-4, atol=1e-5)
        shares = np.array(weights) / sum(weights)
        np.testing.assert_allclose(gaussian_weights(count, mu, sigma), shares, rtol=1e-8)
    assert int(average.average["n"]) == count
    assert average.average["n"].dtype == torch.int64


def test_wide_bell_is_swa() -> None:
    epochs = epochs_of(9)
    mean = torch.stack([one["w"] for one in epochs]).mean(0)
    for average in (GaussianWeightAverage(4.0, math.inf), GaussianWeightAverage(4.0, 1e6), UniformWeightAverage()):
        torch.testing.assert_close(fed(average, epochs).average["w"], mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("mu", "wanted"), [(2.3, 2), (4.0, 4), (6.9, 7), (-50.0, 1), (1e6, 9)])
@pytest.mark.parametrize("sigma", [1e-2, 1e-9])
def test_narrow_bell_is_one_epoch(mu: float, wanted: int, sigma: float) -> None:
    """Far from the first epochs, too, where their weights are 0 in floats and 0 / 0 would be NaN."""
    epochs = epochs_of(9)
    average = GaussianWeightAverage(mu, sigma)
    for t, one in enumerate(epochs, 1):
        average.update(one)
        assert average.average["w"].isfinite().all()
        assert 0 <= average.share(t) <= 1
    assert torch.equal(average.average["w"], epochs[wanted - 1]["w"])
    shares = gaussian_weights(9, mu, sigma)
    assert shares.argmax() == wanted - 1
    assert shares.sum() == pytest.approx(1)


@pytest.mark.parametrize(
    "average",
    [GaussianWeightAverage(2.0, 1.0), UniformWeightAverage(), ExponentialWeightAverage(0.7), WeightAverage()],
)
def test_starts_at_the_first_epoch(average: WeightAverage) -> None:
    """θ_0 never enters; what is kept is a copy."""
    held = {"w": torch.full((3,), 100.0)}  # as of θ_0: trained in place, it becomes θ_1
    held["w"].copy_(torch.tensor([1.0, 2.0, 3.0]))
    average.update(held)
    held["w"].fill_(7)
    assert average.average["w"].tolist() == [1, 2, 3]


def test_half_precision_is_averaged_in_32_bits() -> None:
    epochs = [{"w": one["w"].half()} for one in epochs_of(30)]
    average = fed(GaussianWeightAverage(15.0, 5.0), epochs).average["w"]
    assert average.dtype == torch.float32
    weights = [math.exp(-((t - 15.0) ** 2) / 50) for t in range(1, 31)]
    wanted = offline(epochs, weights, "w")
    torch.testing.assert_close(average, wanted, rtol=1e-5, atol=1e-6)
    assert (average - wanted.half().float()).abs().max() > 1e-6


def test_later_start_and_exponential_by_hand() -> None:
    epochs = [{"w": torch.tensor([float(x)])} for x in (8, 4, 2, 6)]
    late = UniformWeightAverage(3)
    held = [float(fed(late, [one]).average["w"]) for one in epochs]
    assert held == [8, 4, 2, 4]
    decayed = ExponentialWeightAverage(0.75)
    held = [float(fed(decayed, [one]).average["w"]) for one in epochs]
    assert held == pytest.approx([8, 7, 5.75, 5.8125])
    assert float(fed(WeightAverage(), epochs).average["w"]) == 6


@pytest.mark.parametrize(
    "make",
    [lambda: GaussianWeightAverage(3.0, 1.5), lambda: UniformWeightAverage(2), lambda: ExponentialWeightAverage(0.6)],
)
def test_average_goes_on_from_its_state(make: Callable[[], WeightAverage]) -> None:
    epochs = epochs_of(6)
    whole, first, then = fed(make(), epochs), fed(make(), epochs[:3]), make()
    then.load_state_dict(first.state_dict())
    kept = {name: value.clone() for name, value in first.average.items()}
    fed(then, epochs[3:])
    assert then.epoch == whole.epoch == 6
    for name, value in whole.average.items():
        assert torch.equal(value, then.average[name])
        assert torch.equal(kept[name], first.average[name])


def test_other_names_or_shapes_are_refused() -> None:
    average = fed(GaussianWeightAverage(2.0, 1.0), epochs_of(2))
    for other, says in (
        ({"w": torch.zeros(3, 2), "b": torch.zeros(2)}, "n is in one"),
        ({**epochs_of(1)[0], "more": torch.zeros(1)}, "more is in one"),
        ({**epochs_of(1)[0], "w": torch.zeros(2, 3)}, r"w has shape \(2, 3\)"),
    ):
        with pytest.raises(UserError, match=says):
            average.update(other)
    assert average.epoch == 2
    for mu, sigma in ((2.0, 0.0), (2.0, -1.0), (math.nan, 1.0), (2.0, math.nan)):
        with pytest.raises(UserError, match="sigma"):
            GaussianWeightAverage(mu, sigma)


def test_average_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    epochs = epochs_of(4)
    paths = []
    for i, one in enumerate(epochs):
        paths.append(tmp_path / f"{i}.safetensors")
        save_file({**one, "w": one["w"].half()}, paths[-1])
    (tmp_path / "3").mkdir()
    paths[3] = paths[3].rename(tmp_path / "3" / "model.safetensors").parent
    options = AverageOptions(checkpoints=tuple(paths), mu=3.0, sigma=1.0, output=tmp_path / "new" / "out.safetensors")
    said = ensemble.average(options)
    weights = [math.exp(-((t - 3.0) ** 2) / 2) for t in range(1, 5)]
    assert [said[f"weight_{t}"] for t in range(1, 5)] == pytest.approx([w / sum(weights) for w in weights])
    found = load_file(options.output)
    assert found["w"].dtype == torch.float16
    halves = [{"w": one["w"].half()} for one in epochs]
    torch.testing.assert_close(found["w"].float(), offline(halves, weights, "w"), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found["b"], offline(epochs, weights, "b"), rtol=1e-5, atol=1e-6)
    assert int(found["n"]) == 4
    with pytest.raises(UserError, match="--overwrite"):
        ensemble.average(options)
    (tmp_path / "0.safetensors").write_bytes(b"not it")
    with pytest.raises(UserError, match=r"0\.safetensors"):
        ensemble.average(replace(options, overwrite=True))
    assert torch.equal(load_file(options.output)["b"], found["b"])
    assert not capsys.readouterr().err
    ensemble.average(replace(options, checkpoints=(paths[1], paths[2]), mu=9.0, overwrite=True))
    assert "outside of epochs 1 to 2" in capsys.readouterr().err


def test_harmonic_means() -> None:
    assert metrics.harmonic_mean(60, 30) == pytest.approx(40)
    assert metrics.harmonic_mean(0, 0) == 0
    found = metrics.summary({"base_in": 80.0, "base_out": 20.0, "novel_in": 40.0, "novel_out": 10.0})
    assert found["hm_in"] == pytest.approx(2 * 80 * 40 / 120)
    assert found["hm_out"] == pytest.approx(2 * 20 * 10 / 30)
    assert found["base_hm"] == pytest.approx(32)
    assert found["novel_hm"] == pytest.approx(16)
    assert (found["base_drop"], found["novel_drop"]) == (60, 30)
    assert metrics.summary({"base": 60.0, "novel": 30.0})["hm"] == pytest.approx(40)


# ---- the video learner


def spread(module: nn.Module, seed: int = 0) -> None:
    """Weights large enough that every part shows."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in sorted(module.named_parameters()):
            if value.ndim > 1 or "class_embedding" in name:
                value.copy_(torch.randn(value.shape, generator=g) * 0.4)


def image_clip(vision_layers: int = 2) -> CLIPModel:
    backbone = tiny_clip(replace(TINY, vision_layers=vision_layers))[0]
    spread(backbone)
    return backbone


def clip(vision_layers: int = 2, **fields: Any) -> VideoTextClassifier:
    """Around the same image CLIP each time; new parts get weights unless ``fresh``."""
    fresh = fields.pop("fresh", False)
    torch.manual_seed(1)
    _, tokenizer, processor = tiny_clip(TINY)
    model = VideoTextClassifier.of(image_clip(vision_layers), tokenizer=tokenizer, processor=processor, **fields)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if (".adapter." in name or ".difference." in name) and not fresh:
                value.copy_(torch.randn(value.shape, generator=g) * 0.4)
    return model


def videos(count: int = 2, frames: int = 5, seed: int = 3) -> Tensor:
    return torch.randn(count, frames, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def image_logits(backbone: CLIPModel, clips: Tensor, texts: Tensor) -> Tensor:
    """transformers' own, of each frame, [B, T, C]."""
    with torch.no_grad():
        found = F.normalize(backbone.get_image_features(pixel_values=clips.flatten(0, 1)).pooler_output, dim=-1)
        logits = backbone.logit_scale.exp() * found @ F.normalize(texts, dim=-1).T
    return logits.view(*clips.shape[:2], -1)


def close(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    return bool(((one - other).abs() <= tolerance * (1 + other.abs())).all())


@torch.no_grad()
def test_identical_frames_are_the_image() -> None:
    still = videos(2, 1).expand(-1, 6, -1, -1, -1)
    model = clip(expand=True, border="mask")
    texts = model.encode_texts(NAMES)
    wanted = image_logits(image_clip(), still, texts)
    torch.testing.assert_close(model(still, texts), wanted[:, 0], rtol=1e-4, atol=1e-4)
    frames = model.video_features(still)["frames"]
    padded = clip(expand=True, border="zero").video_features(still)["frames"]
    # two layers: what is missing beyond the ends reaches the second frame, too
    torch.testing.assert_close(padded[:, 2:4], frames[:, 2:4], rtol=1e-4, atol=1e-5)
    for t in (0, 1, 4, 5):
        assert not close(padded[:, t], frames[:, t], 1e-3), t


@torch.no_grad()
def test_reversed_and_shuffled_frames() -> None:
    """Frozen pooling knows no order; a view of both neighbours knows distance, but no direction; new parts know it."""
    clips = videos()
    backwards, shuffled = clips.flip(1), clips[:, [2, 0, 4, 1, 3]]
    texts = clip().encode_texts(NAMES)

    def same(other: Tensor, **fields: Any) -> bool:
        model = clip(**fields)
        return close(model(clips, texts), model(other, texts))

    assert same(backwards, expand=False)
    assert same(shuffled, expand=False)
    for border in ("mask", "zero"):
        assert same(backwards, expand=True, border=border)
        assert not same(shuffled, expand=True, border=border)
    assert not same(backwards, expand=False, adapter=3)
    assert not same(backwards, expand=False, difference=True)
    assert not same(backwards, expand=True, adapter=3, difference=True)


@torch.no_grad()
def test_new_parts_add_nothing_at_first() -> None:
    clips, texts = videos(), clip().encode_texts(NAMES)
    wanted = image_logits(image_clip(), clips, texts).mean(1)
    for fields in ({}, {"adapter": 3}, {"difference": True}, {"adapter": 3, "difference": True}):
        found = clip(expand=False, fresh=True, **fields)(clips, texts)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    expanded = clip(expand=True)(clips, texts)
    assert not close(expanded, wanted)
    both = clip(expand=True, fresh=True, adapter=3, difference=True)(clips, texts)
    torch.testing.assert_close(both, expanded, rtol=1e-4, atol=1e-4)
    assert not close(clip(expand=True, adapter=3)(clips, texts), expanded)


@torch.no_grad()
@pytest.mark.parametrize("border", ["mask", "zero"])
@pytest.mark.parametrize("frames", [1, 2, 5])
def test_temporal_attention_frame_by_frame(border: Any, frames: int) -> None:
    """Against a loop over videos, frames and heads, over the tokens of neighbours that are there."""
    layer: nn.Module = clip(expand=True, border=border).backbone.vision_model.encoder.layers[0].self_attn
    assert isinstance(layer, TemporalAttention)
    b, n, d, heads = 2, 5, 8, 2
    tokens = torch.randn(b, frames, n, d, generator=torch.Generator().manual_seed(0))
    layer.frames = frames
    found = layer(tokens.flatten(0, 1))[0].view(b, frames, n, d)
    for video in range(b):
        for t in range(frames):
            keys, values = [], []
            for other in (t - 1, t, t + 1):
                if 0 <= other < frames:
                    keys.append(layer.k_proj(tokens[video, other]))
                    values.append(layer.v_proj(tokens[video, other]))
                elif border == "zero" and frames > 1:
                    keys.append(torch.zeros(n, d))
                    values.append(torch.zeros(n, d))
            k, v, q = torch.cat(keys), torch.cat(values), layer.q_proj(tokens[video, t])
            out = []
            for head in range(heads):
                part = slice(head * d // heads, (head + 1) * d // heads)
                weights = (q[:, part] @ k[:, part].T / math.sqrt(d // heads)).softmax(-1)
                out.append(weights @ v[:, part])
            wanted = layer.out_proj(torch.cat(out, dim=-1))
            torch.testing.assert_close(found[video, t], wanted, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_videos_do_not_see_each_other() -> None:
    model = clip(expand=True, adapter=3, difference=True)
    clips, texts = videos(3), model.encode_texts(NAMES)
    apart = torch.cat([model(one[None], texts) for one in clips])
    torch.testing.assert_close(model(clips, texts), apart, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_differences_are_patches_of_what_a_frame_changes() -> None:
    """Moving content by a constant step: the second half's weights act on x_t − x_{t−1}, on nothing in frame 1."""
    model = clip(expand=False, difference=True)
    plain = clip(expand=False)
    held = model.backbone.vision_model.embeddings
    clips = videos(2, 4)
    held.frames = 4
    more = held(clips.flatten(0, 1)) - plain.backbone.vision_model.embeddings(clips.flatten(0, 1))
    more = more.view(2, 4, 5, 8)
    assert more[:, 0].abs().max() < 1e-5
    assert more[:, :, 0].abs().max() < 1e-5
    for t in (1, 2, 3):
        change = clips[:, t] - clips[:, t - 1]
        wanted = F.conv2d(change, held.difference.weight, stride=16).flatten(2).transpose(1, 2)
        torch.testing.assert_close(more[:, t, 1:], wanted, rtol=1e-3, atol=1e-4)


def xclip() -> XCLIPModel:
    width = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    config = XCLIPConfig(
        text_config={**width, "vocab_size": len(tiny_tokenizer()), "max_position_embeddings": 16, "eos_token_id": 3},
        vision_config={
            **width, "image_size": 32, "patch_size": 16, "num_frames": 4, "mit_hidden_size": 8,
            "mit_intermediate_size": 16, "mit_num_attention_heads": 2,
        },
        projection_dim=8, prompt_layers=1, prompt_num_attention_heads=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = XCLIPModel(config).eval()
    spread(model)
    with torch.no_grad():
        model.prompts_generator.alpha.fill_(0.5)
    return model


@torch.no_grad()
def test_xclip_is_transformers_own() -> None:
    held = xclip()
    model = VideoTextClassifier.of(held, tokenizer=tiny_tokenizer())
    clips = videos(3, 4)
    ids = tiny_tokenizer()(list(NAMES), padding=True, return_tensors="pt")
    wanted = held(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], pixel_values=clips).logits_per_video
    texts = model.encode_texts(NAMES)
    torch.testing.assert_close(model(clips, texts), wanted, rtol=1e-4, atol=1e-4)
    assert wanted.std() > 0.05


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "xclip"])
def test_an_unseen_name_changes_no_other_logits(kind: str) -> None:
    model = clip() if kind == "clip" else VideoTextClassifier.of(xclip(), tokenizer=tiny_tokenizer())
    clips = videos(2, 4)
    few, more = model.encode_texts(NAMES[:3]), model.encode_texts(("bounce halting in a", *NAMES[:3]))
    torch.testing.assert_close(model(clips, more)[:, 1:], model(clips, few), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_logits_do_not_know_lengths() -> None:
    model = clip(adapter=2)
    clips, texts = videos(), model.encode_texts(NAMES)
    before = model(clips, texts)
    model.backbone.visual_projection.weight.mul_(3)
    torch.testing.assert_close(model(clips, 5 * texts), before, rtol=1e-4, atol=1e-4)
    world = generate(0, 8, 4)
    learner = FeatureClassifier.of(world)
    inputs, names = torch.from_numpy(world.train.inputs), learner.encode_texts(world.names)
    before = learner(inputs, names)
    learner.map.weight.mul_(3)
    torch.testing.assert_close(learner(inputs, names), before, rtol=1e-4, atol=1e-4)
    assert before.abs().max() <= 20.0 + 1e-4


@torch.no_grad()
def test_texts_are_means_over_prompts_and_are_counted() -> None:
    model = clip()
    one = model.encode_texts(NAMES)
    assert model.encoded == 4
    ids = tiny_tokenizer()(list(NAMES), padding=True, return_tensors="pt")
    wanted = image_clip().get_text_features(**ids).pooler_output
    torch.testing.assert_close(one, wanted, rtol=1e-4, atol=1e-5)
    both = model.encode_texts(NAMES, ("{}", "a {} in sand"))
    assert model.encoded == 12
    other = model.encode_texts([f"a {name} in sand" for name in NAMES])
    torch.testing.assert_close(both, (F.normalize(one, dim=-1) + F.normalize(other, dim=-1)) / 2, rtol=1e-4, atol=1e-5)
    for names, says in (
        ((), "no classes"), (("a", " "), "class 2 has no name"), (("a", "b", "a"), "'a' comes twice"),
        ((" ".join(["east"] * 20),), "more tokens than the 16"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=says):
            model.encode_texts(names)
    model.tokenizer = None
    with pytest.raises(UserError, match="no tokenizer"):
        model.encode_texts(NAMES)


@pytest.mark.parametrize("kind", ["clip", "xclip"])
def test_texts_and_temperature_are_frozen(kind: str) -> None:
    held = xclip() if kind == "xclip" else image_clip()
    model = VideoTextClassifier.of(held, tokenizer=tiny_tokenizer(), adapter=2)
    F.cross_entropy(model(videos(2, 4), model.encode_texts(NAMES)), torch.tensor([0, 1])).backward()
    for name, value in model.backbone.named_parameters():
        text = name.startswith("text_") or name == "logit_scale"
        assert (value.grad is None) == text, name
    assert not model.encode_texts(NAMES).requires_grad


def test_adapters_alone() -> None:
    model = clip(adapter=2, difference=True)
    model.freeze("adapter")
    wanted = {name for name, value in model.named_parameters() if value.requires_grad}
    assert wanted
    assert all(".adapter." in name or ".difference." in name for name in wanted)
    with pytest.raises(UserError, match="--trained adapter"):
        clip().freeze("adapter")


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "xclip"])
def test_saved_and_loaded(tmp_path: Path, kind: str) -> None:
    clips = videos(2, 4)
    if kind == "clip":
        model = clip(expand=True, border="zero", adapter=3, difference=True)
    else:
        model = VideoTextClassifier.of(xclip(), tokenizer=tiny_tokenizer(), processor=tiny_clip(TINY)[2])
    wanted = model(clips, model.encode_texts(NAMES))
    model.save_pretrained(tmp_path / "model")
    again = load_classifier(tmp_path / "model")
    assert torch.equal(again(clips, again.encode_texts(NAMES)), wanted)
    assert again.config.to_dict()["border"] == model.config.border
    bytes_ = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    assert torch.equal(again.pixels(bytes_), model.pixels(bytes_))
    torch.testing.assert_close(model.pixels(bytes_)[0, 0, 0, 1], torch.tensor((1 / 255 - 0.5) / 0.25))
    assert {name for name, value in again.named_parameters() if value.requires_grad} == {
        name for name, value in model.named_parameters() if value.requires_grad
    }
    plain = VideoTextClassifier.from_pretrained(tmp_path / "model")
    assert torch.equal(plain(clips, again.encode_texts(NAMES)), wanted)


@torch.no_grad()
def test_image_clip_is_loaded_frame_by_frame(tmp_path: Path) -> None:
    held, tokenizer, processor = tiny_clip(TINY)
    spread(held)
    for part in (held, tokenizer, processor):
        part.save_pretrained(tmp_path / "clip")
    model = load_classifier(tmp_path / "clip")
    clips, texts = videos(), model.encode_texts(NAMES)
    torch.testing.assert_close(model(clips, texts), image_logits(held, clips, texts).mean(1), rtol=1e-4, atol=1e-4)


def test_low_rank_updates(tmp_path: Path) -> None:
    model = clip(expand=True, adapter=2)
    clips, texts = videos(), model.encode_texts(NAMES)
    before = model(clips, texts).detach()
    model.freeze("lora", 2)
    torch.testing.assert_close(model(clips, texts).detach(), before, rtol=1e-4, atol=1e-4)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    assert len(trained) == 2 * 2 * 2  # A and B of queries and values, in two layers
    assert all("lora_" in name for name in trained)
    with torch.no_grad():
        for value in trained.values():
            value.normal_(0, 0.3)
    wanted = model(clips, texts).detach()
    assert not close(wanted, before)
    model.save_pretrained(tmp_path / "model")
    assert not any("lora" in name for name in load_file(tmp_path / "model" / "model.safetensors"))
    again = load_classifier(tmp_path / "model")
    torch.testing.assert_close(again(clips, texts).detach(), wanted, rtol=1e-4, atol=1e-4)


def test_load_model_is_what_a_config_says() -> None:
    torch.manual_seed(0)
    model = load_model(replace(TINY, adapter=2, border="zero", trained="adapter"))
    assert isinstance(model, VideoTextClassifier)
    assert (model.config.adapter, model.config.border, model.config.expand) == (2, "zero", True)
    assert all(".adapter." in name for name, value in model.named_parameters() if value.requires_grad)


# ---- baselines


def test_interpolation_by_hand() -> None:
    module, given = network().float(), tuple(one.float() if one.is_floating_point() else one for one in batch(1))
    parameters = list(module.parameters())
    start = [value.detach() + torch.randn_like(value) for value in parameters]
    before = [value.detach().clone() for value in parameters]
    loss = loss_of(module)
    value, plain = gradient_of(loss, given, parameters, None)
    for share in (0.0, 0.35, 1.0):
        found, gradient = baselines.interpolated_gradient(loss, given, parameters, start, share, 0.5)
        assert all(torch.equal(one, held) for one, held in zip(parameters, before, strict=True))
        assert torch.equal(found, value)
        with torch.no_grad():
            for one, held, first in zip(parameters, before, start, strict=True):
                one.copy_(share * first + (1 - share) * held)
        _, there = gradient_of(loss, given, parameters, None)
        with torch.no_grad():
            torch._foreach_copy_(parameters, before)
        torch.testing.assert_close(flat(gradient), flat(plain) + 0.5 * flat(there), rtol=1e-5, atol=1e-6)
        if share == 0:
            torch.testing.assert_close(flat(gradient), 1.5 * flat(plain), rtol=1e-6, atol=1e-8)
    _, alone = baselines.interpolated_gradient(loss, given, parameters, start, 0.35, 0.0)
    assert torch.equal(flat(alone), flat(plain))


def test_interpolation_leaves_no_trace_where_it_fails() -> None:
    module = network()
    parameters = list(module.parameters())
    before, calls = [value.detach().clone() for value in parameters], []

    def loss(given: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("out of memory")
        return loss_of(module)(given)

    with pytest.raises(RuntimeError, match="out of memory"):
        baselines.interpolated_gradient(loss, batch(1), parameters, [0 * one for one in before], 0.5, 0.5)
    assert all(torch.equal(one, held) for one, held in zip(parameters, before, strict=True))


def test_anchor_is_the_gradient_of_the_squared_distance() -> None:
    one = nn.Parameter(torch.tensor([1.0, 2.0]))
    one.grad = torch.tensor([10.0, 20.0])
    baselines.add_anchor([one], [torch.tensor([0.0, 5.0])], 0.5)
    assert one.grad.tolist() == [11, 17]


def test_fresh_projector_changes_nothing() -> None:
    torch.manual_seed(0)
    projector = baselines.ResidualProjector(8)
    features = F.normalize(torch.randn(3, 4, 8), dim=-1)
    assert torch.equal(projector(features), features)
    other = F.normalize(torch.randn(3, 4, 8), dim=-1)
    wanted = 1 - (features * other).sum(-1).mean(1)
    torch.testing.assert_close(baselines.distillation_loss(features, other, projector), wanted, rtol=1e-5, atol=1e-6)
    baselines.distillation_loss(features, other, projector).sum().backward()
    assert projector.second.weight.grad is not None
    assert projector.second.weight.grad.abs().max() > 0


def test_distillation_of_frozen_texts_is_zero() -> None:
    """The text side, with a projector of its own: no distance, and no gradient that would make one."""
    torch.manual_seed(0)
    projector = baselines.ResidualProjector(8).double()
    texts = clip().encode_texts(NAMES).double()[:, None]
    found = baselines.distillation_loss(texts, texts.clone(), projector)
    assert found.abs().max() < 1e-12
    found.sum().backward()
    for value in projector.parameters():
        assert value.grad is not None
        assert value.grad.abs().max() < 1e-12
