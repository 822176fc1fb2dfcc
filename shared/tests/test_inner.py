"""The inner loop: closed forms, finite differences, the gradients of higher and TorchOpt, three ways to one number."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo import inner
from torch import Tensor, nn

with warnings.catch_warnings(action="ignore"):  # of their old syntax, where they are compiled for the first time
    import higher
    import torchopt

WAYS: dict[str, dict[str, bool]] = {"plain": {}, "checkpoint": {"checkpoint": True}, "functional": {"functional": True}}
FIRST_ORDER = {name: {**WAYS[name], "first_order": True} for name in ("plain", "functional")}
ways = pytest.mark.parametrize("way", list(WAYS.values()), ids=list(WAYS))
first_order_ways = pytest.mark.parametrize("way", list(FIRST_ORDER.values()), ids=list(FIRST_ORDER))
all_ways = pytest.mark.parametrize(
    "way", [*WAYS.values(), *FIRST_ORDER.values()], ids=[*WAYS, *(f"first order, {name}" for name in FIRST_ORDER)]
)


@pytest.fixture(autouse=True, scope="module")
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def theta_of(seed: int = 0, inputs: int = 2, hidden: int = 3) -> inner.Params:
    """A network of one hidden layer."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"in": (inputs, hidden), "bias": (hidden,), "out": (hidden, 1)}
    return {name: torch.randn(shape, generator=generator).requires_grad_() for name, shape in shapes.items()}


def batches_of(count: int, seed: int = 1, inputs: int = 2, size: int = 4) -> list[tuple[Tensor, Tensor]]:
    """A different batch for each step, and none like another."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, inputs, generator=generator), torch.randn(size, 1, generator=generator))
        for _ in range(count)
    ]


def loss(params: inner.Params, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error."""
    x, y = batch
    return (torch.tanh(x @ params["in"] + params["bias"]) @ params["out"] - y).square().mean()


def module_loss(module: nn.Module) -> inner.Loss:
    """The same of a module."""
    return lambda params, batch: (inner.call(module, params, batch[0]) - batch[1]).square().mean()


def grads_of(value: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    """As torch.autograd.grad, zero where there is no path."""
    return torch.autograd.grad(value, tensors, materialize_grads=True, allow_unused=True)


def flat(params: inner.Params) -> Tensor:
    return torch.cat([value.flatten() for value in params.values()])


def apart(one: inner.Params, other: inner.Params) -> float:
    """The largest difference of two entries; of the same names, in the same order."""
    assert list(one) == list(other)
    assert all(one[name].shape == other[name].shape for name in one)
    return (flat(one) - flat(other)).abs().max().item()


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@contextlib.contextmanager
def kept() -> Iterator[weakref.WeakSet[_Kept]]:
    """What autograd saves for backward inside, as long as a graph holds it."""
    found: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        one = _Kept(tensor.detach())  # else it holds the graph that holds it
        found.add(one)
        return one

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one.tensor):
        yield found


# ---- numbers by hand


def quadratic(params: inner.Params, batch: tuple[float, float]) -> Tensor:
    curvature, centre = batch
    return 0.5 * curvature * (params["x"] - centre).square()


@pytest.mark.parametrize(
    ("steps", "adapted", "of_theta", "of_rate"),
    [(0, 2.0, 2.0, 0.0), (1, 1.55, 0.77, -4.95), (2, 1.235, 0.2303, -2.961)],
)
@ways
def test_quadratic(way: dict[str, bool], steps: int, adapted: float, of_theta: float, of_rate: float) -> None:
    """a_s = 3, c_s = 0.5, α = 0.1, θ = 2, a = 2, c = 1: φ − c_s = (1 − 0.3)^U · 1.5, dL/dθ = (1 − 0.3)^U · 2 (φ − 1),
    dL/dα = −3 U (1 − 0.3)^(U − 1) · 1.5 · 2 (φ − 1)."""
    theta, rate = torch.tensor(2.0, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    found = inner.adapt(quadratic, {"x": theta}, [(3.0, 0.5)] * steps, rate, **way)
    assert found.params["x"].item() == pytest.approx(adapted, abs=1e-15)
    by_theta, by_rate = grads_of(quadratic(found.params, (2.0, 1.0)), theta, rate)
    assert by_theta.item() == pytest.approx(of_theta, abs=1e-15)
    assert by_rate.item() == pytest.approx(of_rate, abs=1e-14)


@pytest.mark.parametrize(("steps", "of_theta", "of_rate"), [(0, 2.0, 0.0), (1, 1.1, -4.95), (2, 0.47, -3.5955)])
@first_order_ways
def test_quadratic_to_first_order(way: dict[str, bool], steps: int, of_theta: float, of_rate: float) -> None:
    """The same: dL/dθ = 2 (φ − 1); dL/dα = −Σ_u 3 (φ_u − 0.5) · 2 (φ − 1), where 3 (φ_u − 0.5) are 4.5 and 3.15."""
    theta, rate = torch.tensor(2.0, requires_grad=True), torch.tensor(0.1, requires_grad=True)
    found = inner.adapt(quadratic, {"x": theta}, [(3.0, 0.5)] * steps, rate, **way)
    by_theta, by_rate = grads_of(quadratic(found.params, (2.0, 1.0)), theta, rate)
    assert by_theta.item() == pytest.approx(of_theta, abs=1e-15)
    assert by_rate.item() == pytest.approx(of_rate, abs=1e-14)


def test_distance() -> None:
    """√(3² + 4² + 12²) = 13 over all parameters; it is a record, without a gradient."""
    one = {"a": torch.tensor([3.0, 0.0], requires_grad=True), "b": torch.tensor([[5.0], [10.0]])}
    other = {"a": torch.zeros(2), "b": torch.tensor([[1.0], [-2.0]])}
    assert inner.distance(one, other).item() == 13.0
    assert not inner.distance(one, other).requires_grad
    assert inner.distance(one, one).item() == 0.0


@all_ways
def test_what_an_inner_loop_came_to(way: dict[str, bool]) -> None:
    """Losses before each step, the gradient of the first one; both detached. Its batch counts, not the last."""
    theta, batches = theta_of(), batches_of(3)
    found = inner.adapt(loss, theta, batches, 0.1, **way)
    params, losses = theta, []
    for batch in batches:
        value = loss(params, batch)
        grads = dict(zip(params, torch.autograd.grad(value, list(params.values())), strict=True))
        if not losses:
            assert apart(found.gradient, grads) < 1e-15
        losses.append(value.detach())
        params = {name: (params[name] - 0.1 * grads[name]).detach().requires_grad_() for name in params}
    assert apart(found.params, params) < 1e-14
    assert (found.losses - torch.stack(losses)).abs().max() < 1e-14
    assert not found.losses.requires_grad
    assert not any(value.requires_grad for value in found.gradient.values())
    assert all(value.requires_grad for value in found.params.values())


@all_ways
def test_no_batches(way: dict[str, bool]) -> None:
    theta = theta_of()
    found = inner.adapt(loss, theta, [], 0.1, **way)
    assert all(found.params[name] is theta[name] for name in theta)
    assert found.losses.shape == (0,)
    assert found.gradient == {}
    elsewhere = {name: value.to("meta") for name, value in theta.items()}
    assert inner.adapt(loss, elsewhere, [], 0.1, **way).losses.device.type == "meta"  # where the parameters are


# ---- finite differences, and others' gradients


@pytest.mark.parametrize("kind", ["float", "tensor", "mapping"])
@pytest.mark.parametrize("steps", [0, 1, 3])
@ways
def test_finite_differences(way: dict[str, bool], steps: int, kind: str) -> None:
    """Of θ ↦ L(φ_U(θ)), and of the rates."""
    theta = theta_of(inputs=1, hidden=2)
    *batches, query = batches_of(steps + 1, inputs=1, size=3)
    rates: dict[str, tuple[Tensor, ...]] = {
        "float": (),
        "tensor": (torch.tensor(0.3),),
        "mapping": (torch.full((1, 2), 0.3), torch.tensor(0.2), torch.tensor([[0.4], [-0.1]])),
    }

    def outer(*tensors: Tensor) -> Tensor:
        params = dict(zip(theta, tensors[:3], strict=True))
        given: Any = {"float": 0.3, "tensor": tensors[-1], "mapping": dict(zip(theta, tensors[3:], strict=False))}[kind]
        return loss(inner.adapt(loss, params, batches, given, **way).params, query)

    inputs = (*theta.values(), *(rate.requires_grad_() for rate in rates[kind]))
    assert torch.autograd.gradcheck(outer, inputs, eps=1e-6, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("first_order", [False, True])
def test_torch_func_differentiates_the_functional_way(first_order: bool) -> None:
    """What torch.autograd gives through it and what torch.func.grad does are one."""
    theta, (*batches, query) = theta_of(), batches_of(4)

    def outer(params: inner.Params, rate: Tensor) -> Tensor:
        found = inner.adapt(loss, params, batches, rate, first_order=first_order, functional=True)
        return loss(found.params, query)

    rate = torch.tensor(0.1, requires_grad=True)
    *expected, of_rate = grads_of(outer(theta, rate), *theta.values(), rate)
    found, found_rate = torch.func.grad(outer, argnums=(0, 1))(
        {name: value.detach() for name, value in theta.items()}, rate.detach()
    )
    assert apart(found, dict(zip(theta, expected, strict=True))) < 1e-15
    assert (found_rate - of_rate).abs() < 1e-15
    nested = torch.func.jacrev(lambda params: torch.func.grad(outer)(params, rate.detach())["bias"])(theta)
    assert all(value.isfinite().all() for value in nested.values())


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1))


def ours(module: nn.Module, batches: list[Any], query: Any, **way: bool) -> inner.Params:
    """The outer gradient."""
    theta = inner.parameters(module)
    of = module_loss(module)
    found, _, _ = inner.gradient(
        lambda params: (of(inner.adapt(of, params, batches, 0.1, **way).params, query), ()),
        theta,
        functional=way.get("functional", False),
    )
    return found


@pytest.mark.parametrize("first_order", [False, True])
def test_gradients_of_higher(first_order: bool) -> None:
    """Three steps on a module; to first order, higher's gradients are detached."""
    module, (*batches, query) = network(), batches_of(4)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    with higher.innerloop_ctx(module, optimizer, copy_initial_weights=False, track_higher_grads=True) as (fast, steps):
        for x, y in batches:
            steps.step(
                (fast(x) - y).square().mean(),
                grad_callback=(lambda grads: [grad.detach() for grad in grads]) if first_order else None,
            )
        value = (fast(query[0]) - query[1]).square().mean()
        found = torch.autograd.grad(value, list(module.parameters()))
    theirs = dict(zip(inner.parameters(module), found, strict=True))
    for way in (FIRST_ORDER if first_order else WAYS).values():
        assert apart(ours(module, batches, query, **way), theirs) < 1e-10


def test_gradients_of_torchopt() -> None:
    """Its differentiable SGD: three steps on a module."""
    module, (*batches, query) = network(), batches_of(4)
    start = torchopt.extract_state_dict(module, by="reference")
    theta = list(module.parameters())
    optimizer = torchopt.MetaSGD(module, lr=0.1)
    for x, y in batches:
        optimizer.step((module(x) - y).square().mean())
    found = torch.autograd.grad((module(query[0]) - query[1]).square().mean(), theta)
    torchopt.recover_state_dict(module, start)
    theirs = dict(zip(inner.parameters(module), found, strict=True))
    for way in WAYS.values():
        assert apart(ours(module, batches, query, **way), theirs) < 1e-10


def test_first_order_gradients_of_torchopt() -> None:
    """Its functional SGD, given constant gradients."""
    module, (*batches, query) = network(), batches_of(4)
    of, theta = module_loss(module), dict(module.named_parameters())
    optimizer, params = torchopt.sgd(lr=0.1), dict(theta)
    state = optimizer.init(params)
    for batch in batches:
        grads = dict(zip(params, torch.autograd.grad(of(params, batch), list(params.values())), strict=True))
        updates, state = optimizer.update(grads, state, inplace=False)
        params = torchopt.apply_updates(params, updates, inplace=False)
    found = torch.autograd.grad(of(params, query), list(theta.values()))
    for way in FIRST_ORDER.values():
        assert apart(ours(module, batches, query, **way), dict(zip(theta, found, strict=True))) < 1e-10


# ---- first order


@first_order_ways
def test_first_order_is_the_gradient_at_the_end(way: dict[str, bool]) -> None:
    """dL/dθ = ∇L(φ_U; Q), bit for bit."""
    theta, (*batches, query) = theta_of(), batches_of(4)
    found = inner.adapt(loss, theta, batches, 0.1, **way)
    end = {name: value.detach().requires_grad_() for name, value in found.params.items()}
    expected = torch.autograd.grad(loss(end, query), list(end.values()))
    outer = torch.autograd.grad(loss(found.params, query), list(theta.values()))
    assert all(torch.equal(one, other) for one, other in zip(outer, expected, strict=True))


@first_order_ways
def test_first_order_makes_the_inner_gradient_a_constant_to_all(way: dict[str, bool]) -> None:
    """Also to a tensor that the loss takes from elsewhere."""
    scale, theta = torch.tensor(3.0, requires_grad=True), theta_of()

    def scaled(params: inner.Params, batch: Any) -> Tensor:
        return scale * loss(params, batch)

    found = inner.adapt(scaled, theta, batches_of(2), 0.1, **way)
    assert torch.autograd.grad(flat(found.params).sum(), scale, allow_unused=True) == (None,)


def test_second_order_reaches_what_the_loss_holds() -> None:
    """dφ/ds = −α ∇ℓ(θ) where the loss is s ℓ, as for a learned loss; not with checkpoint."""
    scale, theta, batches = torch.tensor(3.0, requires_grad=True), theta_of(), batches_of(1)

    def scaled(params: inner.Params, batch: Any) -> Tensor:
        return scale * loss(params, batch)

    expected = -0.1 * sum(grad.sum() for grad in torch.autograd.grad(loss(theta, batches[0]), list(theta.values())))
    for way in (WAYS["plain"], WAYS["functional"]):
        found = inner.adapt(scaled, theta, batches, 0.1, **way)
        (grad,) = torch.autograd.grad(flat(found.params).sum(), scale)
        assert (grad - expected).abs() < 1e-14


def test_graphs_kept() -> None:
    """None to first order or without gradients; to second order one that grows with the steps."""
    theta, batches = theta_of(), batches_of(4)
    with kept() as saved:
        found = inner.adapt(loss, theta, batches, 0.1, first_order=True)
        assert len(saved) == 0
        del found
        during: list[int] = []

        def of(params: inner.Params, batch: Any) -> Tensor:
            during.append(len(saved))
            return loss(params, batch)

        with torch.no_grad():
            found = inner.adapt(of, theta, batches, 0.1)
        assert during == [0, 0, 0, 0]
        assert len(saved) == 0
        assert not any(value.requires_grad for value in found.params.values())
        found = inner.adapt(loss, theta, batches[:2], 0.1)
        two = len(saved)
        assert two > 0
        found = inner.adapt(loss, theta, batches, 0.1)
        assert len(saved) == 2 * two
        del found
        assert len(saved) == 0
        _, value, (extra, text) = inner.gradient(
            lambda params: (loss(params, batches[0]), ({"exp": params["in"].exp()}, "text")), theta
        )
        assert len(saved) == 0
    assert not value.requires_grad
    assert not extra["exp"].requires_grad
    assert text == "text"


# ---- checkpoint


def deep(depth: int, calls: list[int]) -> inner.Loss:
    def of(params: inner.Params, batch: Any) -> Tensor:
        calls.append(1)
        x = batch[0] @ params["in"] + params["bias"]
        for _ in range(depth):
            x = torch.tanh(x)
        return (x @ params["out"] - batch[1]).square().mean()

    return of


def test_checkpoint_gives_the_same_numbers() -> None:
    """φ, losses, first gradient; gradients with respect to θ and to rates: one for all, one each, shared by some."""
    theta, (*batches, query) = theta_of(), batches_of(6)
    one, other = torch.tensor(0.1, requires_grad=True), torch.tensor([0.2, 0.0, 0.3], requires_grad=True)
    fixed = torch.tensor(0.05)
    for rates in (
        0.1,
        one,
        {"in": one, "bias": other, "out": one},
        {"in": one, "out": 0.5},
        {"bias": other, "out": fixed},
    ):
        results = []
        for way in (WAYS["plain"], WAYS["checkpoint"]):
            found = inner.adapt(loss, theta, batches, rates, **way)
            results.append((found, grads_of(loss(found.params, query), *theta.values(), one, other)))
        (plain, plain_grads), (checkpointed, grads) = results
        assert apart(plain.params, checkpointed.params) < 1e-12
        assert apart(plain.gradient, checkpointed.gradient) < 1e-12
        assert (plain.losses - checkpointed.losses).abs().max() < 1e-12
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(plain_grads, grads, strict=True))


def test_checkpoint_keeps_inputs_and_calls_twice() -> None:
    """The graph of a step is made again in the backward pass; between the passes its parameters and rate are kept."""
    theta, (*batches, query), rate = theta_of(), batches_of(4), torch.tensor(0.1, requires_grad=True)
    sizes: dict[tuple[str, int], int] = {}
    for depth in (1, 20):
        for name in ("plain", "checkpoint"):
            calls: list[int] = []
            with kept() as saved:
                found = inner.adapt(deep(depth, calls), theta, batches, rate, **WAYS[name])
                sizes[name, depth] = len(saved)
            assert len(calls) == len(batches)
            torch.autograd.grad(loss(found.params, query), list(theta.values()))
            assert len(calls) == len(batches) * (2 if name == "checkpoint" else 1)
            del found
            assert len(saved) == 0
    assert sizes["checkpoint", 1] == sizes["checkpoint", 20] == len(batches) * (len(theta) + 1)
    assert sizes["plain", 20] > sizes["plain", 1] > sizes["checkpoint", 1]


def test_checkpoint_frees_gradients() -> None:
    """Those of a step are gone after it, except the first one's, which are returned."""
    theta, batches = theta_of(), batches_of(4)
    gc.collect()
    before = sum(type(one) is Tensor for one in gc.get_objects())
    found = inner.adapt(loss, theta, batches, 0.1, checkpoint=True)
    made = sum(type(one) is Tensor for one in gc.get_objects()) - before
    assert made == len(theta) * len(batches) + len(found.gradient) + 1  # φ_1 … φ_4, the first gradient, the losses


def test_checkpoint_takes_integers_among_the_parameters() -> None:
    """As the other ways do: they have no rate."""
    theta, batches = theta_of(), batches_of(2)

    def of(params: inner.Params, batch: Any) -> Tensor:
        return loss(params, batch) * params["power"]

    rates = dict.fromkeys(theta, torch.tensor(0.1))
    results = []
    for way in WAYS.values():
        found = inner.adapt(of, {**theta, "power": torch.tensor(2)}, batches, rates, **way)
        assert found.params["power"].item() == 2
        results.append(torch.autograd.grad(loss(found.params, batches[0]), list(theta.values())))
    for other in results[1:]:
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(results[0], other, strict=True))


def test_checkpoint_is_differentiated_again() -> None:
    """Finite differences of the outer gradient, with respect to θ and to a rate."""
    theta, (*batches, query), rate = theta_of(), batches_of(3), torch.tensor(0.3, requires_grad=True)

    def outer(*tensors: Tensor) -> Tensor:
        params = dict(zip(theta, tensors, strict=False))
        return loss(inner.adapt(loss, params, batches, tensors[-1], checkpoint=True).params, query)

    assert torch.autograd.gradgradcheck(outer, (*theta.values(), rate), eps=1e-6, atol=1e-6, rtol=1e-5)
    for inputs in ([rate], [theta["bias"]]):  # the rest is not differentiated, and yet must stay connected
        found = []
        for way in (WAYS["plain"], WAYS["checkpoint"]):
            value = loss(inner.adapt(loss, theta, batches, rate, **way).params, query)
            (grad,) = torch.autograd.grad(value, inputs, create_graph=True)
            found.append(grads_of(grad.square().sum(), *theta.values(), rate))
        assert all((a - b).abs().max() < 1e-11 for a, b in zip(*found, strict=True))
        assert all(grad.abs().max() > 0 for grad in found[0])


@ways
def test_some_parameters_are_constants(way: dict[str, bool]) -> None:
    """a² b + 3c at (1, 1, 1): a moves by −0.2, b by −0.1, c by −0.3, whose slopes in a are −0.2, −0.2 and 0."""
    start, constant, other = torch.tensor(1.0, requires_grad=True), torch.tensor(1.0), torch.tensor(1.0)

    def of(params: inner.Params, _: Any) -> Tensor:
        return params["a"].square() * params["b"] + 3 * params["c"]

    found = inner.adapt(of, {"a": start, "b": constant, "c": other}, [0], 0.1, **way).params
    assert [round(value.item(), 12) for value in found.values()] == [0.8, 0.9, 0.7]
    total = torch.stack([*found.values(), start])
    slopes = [torch.autograd.grad(total[i], start, retain_graph=True)[0].item() for i in range(3)]
    assert slopes == [pytest.approx(0.8), pytest.approx(-0.2), 0.0]


@pytest.mark.parametrize("other", ["functional", "first_order"])
def test_checkpoint_alone(other: str) -> None:
    with pytest.raises(ValueError, match="checkpoint=True is for second order without functional=True"):
        inner.adapt(loss, theta_of(), batches_of(1), 0.1, checkpoint=True, **{other: True})


# ---- a meta-batch at once


def tasks_of(count: int, steps: int) -> tuple[list[list[tuple[Tensor, Tensor]]], list[tuple[Tensor, Tensor]]]:
    """Tasks as lists of steps + 1 batches, and these batches with the tasks first."""
    tasks = [batches_of(steps + 1, seed=10 + task) for task in range(count)]
    stacked = [(torch.stack([x for x, _ in of]), torch.stack([y for _, y in of])) for of in zip(*tasks, strict=True)]
    return tasks, stacked


def outer_of(params: inner.Params, batches: Any, **way: bool) -> tuple[inner.Params, Tensor, inner.Adapted]:
    """Outer gradient, outer loss and the inner loop of a task."""

    def objective(given: inner.Params) -> tuple[Tensor, inner.Adapted]:
        found = inner.adapt(loss, given, batches[:-1], 0.1, **way)
        return loss(found.params, batches[-1]), found

    return inner.gradient(objective, params, functional=way.get("functional", False))


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize("shared", [True, False])
def test_over_tasks(shared: bool, first_order: bool, chunk: int | None) -> None:
    """As one task after another by torch.autograd: parameters of all tasks, or each its own."""
    tasks, stacked = tasks_of(5, 3)
    each = [theta_of(0 if shared else task) for task in range(5)]
    params = each[0] if shared else {name: torch.stack([one[name] for one in each]) for name in each[0]}
    params = {name: value.detach() for name, value in params.items()}
    calls: list[int] = []

    def one(params: inner.Params, batches: Any) -> Any:
        calls.append(1)
        return outer_of(params, batches, functional=True, first_order=first_order)

    dims = (None if shared else 0, 0)
    grads, values, adapted = inner.over_tasks(one, dims, params, stacked, chunk=chunk)
    assert len(calls) == (3 if chunk else 1)
    assert isinstance(adapted, inner.Adapted)
    assert values.shape == (5,)
    assert adapted.losses.shape == (5, 3)
    for task in range(5):
        expected, value, alone = outer_of(each[task], tasks[task], first_order=first_order)
        assert apart({name: grad[task] for name, grad in grads.items()}, expected) < 1e-12
        assert apart({name: found[task] for name, found in adapted.params.items()}, alone.params) < 1e-12
        assert apart({name: found[task] for name, found in adapted.gradient.items()}, alone.gradient) < 1e-12
        assert (adapted.losses[task] - alone.losses).abs().max() < 1e-12
        assert (values[task] - value).abs() < 1e-12


@pytest.mark.parametrize("first_order", [False, True])
def test_over_tasks_inside_a_gradient(first_order: bool) -> None:
    """∇ of the mean over tasks is the mean of the tasks' ∇; by torch.func.grad and by torch.autograd."""
    tasks, stacked = tasks_of(3, 2)
    theta = theta_of()

    def mean(params: inner.Params) -> Tensor:
        def one(batches: Any) -> Tensor:
            found = inner.adapt(loss, params, batches[:-1], 0.1, functional=True, first_order=first_order)
            return loss(found.params, batches[-1])

        return inner.over_tasks(one, 0, stacked).mean()

    each = [outer_of(theta, batches, first_order=first_order)[0] for batches in tasks]
    expected = {name: torch.stack([grads[name] for grads in each]).mean(0) for name in theta}
    assert apart(torch.func.grad(mean)({name: value.detach() for name, value in theta.items()}), expected) < 1e-12
    found = torch.autograd.grad(mean(theta), list(theta.values()))
    assert apart(dict(zip(theta, found, strict=True)), expected) < 1e-12


@pytest.mark.parametrize("way", [{}, {"checkpoint": True}, {"first_order": True}], ids=["plain", "checkpoint", "first"])
def test_transforms_need_the_functional_way(way: dict[str, bool]) -> None:
    """Below vmap, torch.autograd may see a loss without a gradient: such a task would silently not adapt."""
    theta, stacked = theta_of(), tasks_of(2, 1)[1]

    def one(batch: Any) -> Tensor:
        return inner.adapt(loss, theta, [batch], 0.1, **way).params["bias"]

    with pytest.raises(ValueError, match="functional=False below a transform"):
        inner.over_tasks(one, 0, stacked[0])


# ---- what is adapted


@all_ways
def test_parameters_without_a_rate(way: dict[str, bool]) -> None:
    """ANIL: the body stays as it is, and has the outer gradient of finite differences."""
    theta, (*batches, query) = theta_of(), batches_of(3)
    rates = {"out": torch.tensor(0.1)}

    def outer(params: inner.Params, **other: bool) -> tuple[Tensor, inner.Adapted]:
        found = inner.adapt(loss, params, batches, rates, **(other or way))
        return loss(found.params, query), found

    value, found = outer(theta)
    assert all(found.params[name] is theta[name] for name in ("in", "bias"))
    assert not torch.equal(found.params["out"], theta["out"])
    assert list(found.gradient) == ["out"]
    grads = torch.autograd.grad(value, list(theta.values()))
    if way.get("first_order"):
        end = {name: one.detach().requires_grad_() for name, one in found.params.items()}
        expected = list(torch.autograd.grad(loss(end, query), list(end.values())))
    else:
        steps = torch.eye(sum(one.numel() for one in theta.values())) * 1e-6
        sizes = [one.numel() for one in theta.values()]

        def at(moved: Tensor) -> float:
            parts = zip(theta.items(), moved.split(sizes), strict=True)
            return outer({name: one.detach() + part.view_as(one) for (name, one), part in parts})[0].item()

        slopes = torch.tensor([(at(step) - at(-step)) / 2e-6 for step in steps])
        expected = [part.view_as(one) for part, one in zip(slopes.split(sizes), theta.values(), strict=True)]
    assert all((a - b).abs().max() < 1e-8 for a, b in zip(grads, expected, strict=True))
    assert all(grad.abs().max() > 1e-3 for grad in grads)


@all_ways
def test_nothing_has_a_rate(way: dict[str, bool]) -> None:
    """θ stays, and the losses are told."""
    theta, batches = theta_of(), batches_of(2)
    found = inner.adapt(loss, theta, batches, {}, **way)
    assert all(found.params[name] is theta[name] for name in theta)
    assert found.gradient == {}
    assert torch.equal(found.losses, torch.stack([loss(theta, batch).detach() for batch in batches]))


def test_rate_of_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="rates for 'head', which is no parameter: name one of"):
        inner.adapt(loss, theta_of(), batches_of(1), {"in": torch.tensor(0.1), "head": torch.tensor(0.1)})


@all_ways
def test_parameter_that_the_loss_does_not_use(way: dict[str, bool]) -> None:
    """Gradient zero: it has a rate and stays where it is."""
    theta, (*batches, query) = {**theta_of(), "idle": torch.ones(2, requires_grad=True)}, batches_of(3)
    found = inner.adapt(loss, theta, batches, 0.1, **way)
    assert torch.equal(found.params["idle"], theta["idle"])
    assert torch.equal(found.gradient["idle"], torch.zeros(2))
    *_, grad = grads_of(loss(found.params, query), *theta.values())
    assert torch.equal(grad, torch.zeros(2))
    constant = inner.adapt(lambda params, batch: torch.tensor(1.5), theta, batches, 0.1, **way)
    assert apart(constant.params, theta) == 0.0
    assert constant.losses.tolist() == [1.5, 1.5]
    for functional in (False, True):
        grads, value, _ = inner.gradient(lambda params: (params["in"].sum(), ()), theta, functional=functional)
        assert torch.equal(grads["idle"], torch.zeros(2))
        assert torch.equal(grads["in"], torch.ones(2, 3))
        assert value.item() == theta["in"].sum().item()


@all_ways
def test_gradients_are_partial(way: dict[str, bool]) -> None:
    """3a + 5b at (1, 1), where b is the tensor a or 1 · a: a moves by −0.3, b by −0.5 in every way."""
    start = torch.tensor(1.0, requires_grad=True)
    for other in (start, 1 * start):
        found = inner.adapt(
            lambda params, _: 3 * params["a"] + 5 * params["b"], {"a": start, "b": other}, [0], 0.1, **way
        )
        assert found.params["a"].item() == pytest.approx(0.7)
        assert found.params["b"].item() == pytest.approx(0.5)
        (grad,) = torch.autograd.grad(found.params["a"] + found.params["b"], start)
        assert grad.item() == 2.0


def test_gradient_that_is_differentiated_again() -> None:
    """∇‖∇ℓ‖² by two nested gradients is that of torch.func; without create_graph there is none."""
    theta, (batch,) = theta_of(), batches_of(1)

    def square(params: inner.Params, **options: bool) -> Tensor:
        grads, _, _ = inner.gradient(lambda given: (loss(given, batch), ()), params, **options)
        return flat(grads).square().sum()

    plain, _, _ = inner.gradient(lambda params: (square(params, create_graph=True), ()), theta)
    functional, _, _ = inner.gradient(lambda params: (square(params, functional=True), ()), theta, functional=True)
    assert apart(plain, functional) < 1e-13
    assert not square(theta).requires_grad


# ---- modules


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)
        self.body.requires_grad_(False)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.head(self.norm(self.body(x)))


def test_module_as_a_function() -> None:
    """Frozen parameters are left out and used; those given replace the module's; buffers stay its own."""
    torch.manual_seed(0)
    module = _Net().eval()
    module.norm.running_mean.fill_(0.5)
    params = inner.parameters(module)
    assert list(params) == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
    assert params["head.weight"].data_ptr() == module.head.weight.data_ptr()
    assert not any(value.requires_grad for value in params.values())
    x = torch.randn(4, 2)
    assert torch.equal(inner.call(module, params, x, scale=2.0), 2 * module(x))
    given = {"head.weight": torch.tensor([[1.0, 2.0, 3.0]]), "head.bias": torch.tensor([0.25])}
    expected = module.norm(module.body(x)) @ torch.tensor([[1.0], [2.0], [3.0]]) + 0.25
    assert (inner.call(module, given, x) - expected).abs().max() < 1e-15
    assert torch.equal(module.head.weight, params["head.weight"])
    assert inner.call(module, {"norm.running_mean": torch.zeros(3)}, x).shape == (4, 1)
    assert module.norm.running_mean.tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["weight", "head.wieght", "module.head.weight"])
def test_module_without_such_a_parameter(name: str) -> None:
    """Its own would be used, and have gradient zero: a loop that adapts nothing."""
    with pytest.raises(ValueError, match=rf"_Net has no parameter '{name}'"):
        inner.call(_Net().eval(), {name: torch.zeros(1, 3)}, torch.zeros(1, 2))


@all_ways
def test_module_is_left_as_it_was(way: dict[str, bool]) -> None:
    """Tied weights are one parameter and move as one; nothing of the module changes, no .grad appears."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Linear(2, 1))
    module[2].weight = module[0].weight
    before = {name: value.clone() for name, value in module.state_dict().items()}
    theta = inner.parameters(module)
    assert "2.weight" not in theta
    assert inner.call(module, {"2.weight": theta["0.weight"]}, torch.zeros(1, 2)).shape == (1, 1)
    (batch,) = batches_of(1)
    found = inner.adapt(module_loss(module), theta, [batch], 0.1, **way)
    value = (module(batch[0]) - batch[1]).square().mean()
    (grad,) = torch.autograd.grad(value, module[0].weight)  # of both uses
    assert (found.params["0.weight"] - (module[0].weight - 0.1 * grad)).abs().max() < 1e-14
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(value.grad is None for value in module.parameters())


# ---- all ways are one


@settings(max_examples=25, deadline=None)
@given(
    inputs=st.integers(1, 4), hidden=st.integers(1, 4), size=st.integers(1, 4), steps=st.integers(0, 4),
    seed=st.integers(0, 2**31), rate=st.floats(-0.5, 0.5), named=st.sets(st.sampled_from(["in", "bias", "out"])),
)  # fmt: skip
def test_all_ways_are_one(
    inputs: int, hidden: int, size: int, steps: int, seed: int, rate: float, named: set[str]
) -> None:
    """φ, losses, the first gradient; the outer gradient of θ and of a rate for each entry of the parameters named."""
    theta = theta_of(seed, inputs, hidden)
    *batches, query = batches_of(steps + 1, seed + 1, inputs, size)
    rates = {name: torch.full_like(theta[name], rate).requires_grad_() for name in theta if name in named}
    results: list[tuple[inner.Adapted, inner.Params]] = []
    for way in WAYS.values():
        found = inner.adapt(loss, theta, batches, rates, **way)
        names = [*theta, *(f"rate of {name}" for name in rates)]
        grads = grads_of(loss(found.params, query), *theta.values(), *rates.values())
        results.append((found, dict(zip(names, grads, strict=True))))
    first, first_grads = results[0]
    scale = 1 + flat(first_grads).abs().max().item()
    for found, grads in results[1:]:
        assert apart(found.params, first.params) < 1e-11
        assert not rates or steps == 0 or apart(found.gradient, first.gradient) < 1e-11
        assert steps == 0 or (found.losses - first.losses).abs().max() < 1e-11
        assert apart(grads, first_grads) < 1e-11 * scale


# ---- autocast


@all_ways
def test_autocast(way: dict[str, bool]) -> None:
    """In bfloat16: θ, φ and gradients stay float32 and finite; about those of float32."""
    module = network().float()
    theta = {name: value.clone().requires_grad_() for name, value in inner.parameters(module).items()}
    *batches, query = [(x.float(), y.float()) for x, y in batches_of(4)]
    seen: list[torch.dtype] = []

    def of(params: inner.Params, batch: Any) -> Tensor:
        output = inner.call(module, params, batch[0])
        seen.append(output.dtype)
        return (output.float() - batch[1]).square().mean()

    results = []
    for enabled in (True, False):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            found = inner.adapt(of, theta, batches, 0.1, **way)
            value = of(found.params, query)
        grads = dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True))
        for params in (found.params, found.gradient, grads):
            assert all(one.dtype == torch.float32 and one.isfinite().all() for one in params.values())
        assert found.losses.dtype == torch.float32
        results.append((flat(found.params).detach(), flat(grads)))
    assert seen[0] == torch.bfloat16
    for low, full in zip(*results, strict=True):
        assert 0 < (low - full).norm() < 0.05 * full.norm()


def test_checkpoint_under_autocast() -> None:
    """Steps are computed again as they were, also where the backward pass is outside of it."""
    module = network().float()
    theta = {name: value.clone().requires_grad_() for name, value in inner.parameters(module).items()}
    *batches, query = [(x.float(), y.float()) for x, y in batches_of(4)]
    of, results = module_loss(module), []
    for way in (WAYS["plain"], WAYS["checkpoint"]):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value = of(inner.adapt(of, theta, batches, 0.1, **way).params, query)
        results.append(dict(zip(theta, torch.autograd.grad(value, list(theta.values())), strict=True)))
    assert apart(*results) == 0.0


@pytest.mark.parametrize("way", [{"first_order": True}, {"checkpoint": True}], ids=["first order", "checkpoint"])
def test_autocast_keeps_no_parameters(way: dict[str, bool]) -> None:
    """Its cache of casts lives until the end of the region: the φ_u of all steps would, too."""
    module = nn.Linear(3, 1, dtype=torch.float32)
    seen: list[weakref.ref[Tensor]] = []

    def of(params: inner.Params, batch: Tensor) -> Tensor:
        seen.append(weakref.ref(params["weight"]))
        return inner.call(module, params, batch).square().mean()

    theta = inner.parameters(module)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inner.adapt(of, theta, [torch.ones(2, 3, dtype=torch.float32)] * 3, 0.1, **way)
        assert len(seen) == 3
        assert all(one() is None for one in seen)
