"""The scan's forms agree (checks 1, 2 and 5 of the recurrence), with their gradients, at odd lengths."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mambacl.scan import _fusible, scan_parallel, scan_quadratic, scan_step, selective_scan
from metazoo.errors import UserError
from metazoo.testing import nan_in_empty
from torch import Tensor

torch.set_num_threads(1)


def inputs(batch: int, length: int, channels: int, n: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    normal = lambda *shape: torch.randn(*shape, dtype=dtype, generator=generator)  # noqa: E731
    x, B, C = normal(batch, length, channels), normal(batch, length, n), normal(batch, length, n)
    delta = torch.nn.functional.softplus(normal(batch, length, channels))
    A, D, state = -torch.exp(normal(channels, n)), normal(channels), normal(batch, channels, n)
    return [tensor.requires_grad_() for tensor in (x, delta, A, B, C, D, state)]


def gradients(y: Tensor, last: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    """Of a weighted sum of all outputs, the last state among them."""
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    more = torch.linspace(-1, 2, last.numel(), dtype=y.dtype).view_as(last)
    return torch.autograd.grad((y * weights).sum() + (last * more).sum(), of)


@pytest.mark.parametrize("doubling", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 16])
@pytest.mark.parametrize("length", [1, 2, 13, 37])
def test_chunked_is_the_recurrence(length: int, chunk: int, doubling: bool) -> None:
    """Check 1: outputs, last state and all gradients, the initial state's too, to 1e-10."""
    of = inputs(2, length, 3, 4)
    *tensors, state = of
    wanted = naive.recurrent(*tensors, state)
    with nan_in_empty():
        found = selective_scan(*tensors, state=state, chunk=chunk, doubling=doubling)
        ours = gradients(*found, of)
    for a, b in zip(found, wanted, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
    for a, b in zip(ours, gradients(*wanted, of), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("length", [1, 7, 32, 37])
def test_parallel_and_tree_scans_are_the_recurrence(length: int) -> None:
    """Check 1: Hillis and Steele's and Blelloch's scans."""
    *tensors, state = inputs(2, length, 3, 4)
    x, delta, A, B, C, D = tensors
    y, last = naive.recurrent(*tensors, state)
    found = scan_parallel(*tensors, state=state)
    assert torch.allclose(found[0], y, rtol=0, atol=1e-10)
    assert torch.allclose(found[1], last, rtol=0, atol=1e-10)
    decay = torch.exp(delta.unsqueeze(-1) * A).transpose(0, 1)
    update = ((delta * x).unsqueeze(-1) * B.unsqueeze(2)).transpose(0, 1)
    update = torch.cat([update[:1] + decay[:1] * state, update[1:]])
    states = naive.blelloch(decay, update)
    assert torch.allclose(states[-1], last, rtol=0, atol=1e-10)
    assert torch.allclose((states * C.transpose(0, 1).unsqueeze(2)).sum(-1).transpose(0, 1) + D * x, y, atol=1e-10)


@pytest.mark.parametrize("given", [True, False])
def test_nothing_to_scan(given: bool) -> None:
    """l = 0: no outputs, and the state as it was, with its gradient."""
    *tensors, state = inputs(2, 0, 3, 4)
    wanted = state if given else torch.zeros_like(state)
    for scan in (scan_parallel, selective_scan):
        y, last = scan(*tensors, state=state if given else None)
        assert y.shape == (2, 0, 3)
        assert torch.equal(last, wanted)
        if given:
            assert torch.equal(torch.autograd.grad(last.sum(), state)[0], torch.ones_like(state))


def test_bad_chunk_and_shapes() -> None:
    """A chunk below 1 would skip all steps, and tensors of other sizes be broadcast."""
    x, delta, A, B, C, D, state = inputs(2, 5, 3, 4)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"chunk": 0}, "chunk is 0: give 1 or more"), ({"chunk": -5}, "chunk is -5"),
        ({"state": state[:1]}, "state is (1, 3, 4): for x (2, 5, 3) the scan wants (2, 3, 4)"),
        ({"delta": delta[..., :1]}, "delta is (2, 5, 1)"), ({"B": B[:, :1]}, "B is (2, 1, 4)"),
        ({"C": C[:1]}, "C is (1, 5, 4)"), ({"A": A[:1]}, "A is (1, 4)"), ({"D": D[:1]}, "D is (1,)"),
        ({"x": x[0]}, "x is (5, 3) and A (3, 4)"),
    ]  # fmt: skip
    for changes, words in bad:
        with pytest.raises(UserError, match=re.escape(words)) as caught:
            selective_scan(**{"x": x, "delta": delta, "A": A, "B": B, "C": C, "D": D, "state": state, **changes})
        assert "\n" not in str(caught.value)


def test_second_derivative_is_refused() -> None:
    """torch would give a wrong one in silence, of the paths beside the scan (here D's); scan_parallel has it."""
    *tensors, _ = inputs(1, 4, 2, 2)
    x = tensors[0]
    with pytest.raises(UserError, match="no second derivative"):
        torch.autograd.grad(selective_scan(*tensors)[0].square().sum(), x, create_graph=True)
    first = torch.autograd.grad(scan_parallel(*tensors)[0].square().sum(), x, create_graph=True)[0]
    ours = torch.autograd.grad(selective_scan(*tensors)[0].square().sum(), x)[0]
    assert torch.allclose(first, ours, rtol=0, atol=1e-10)
    assert torch.autograd.grad(first.sum(), x)[0].abs().min() > 0


def test_when_the_fused_kernel_may_stand_in() -> None:
    """On a GPU, without gradient and first state, and not for float64, which it would round to float32."""

    def there(dtype: torch.dtype = torch.float32, length: int = 5, cuda: bool = True) -> Any:
        return SimpleNamespace(is_cuda=cuda, dtype=dtype, shape=(2, length, 3))

    with torch.no_grad():
        assert _fusible(there(), None)
        assert _fusible(there(torch.bfloat16), None)
        assert not _fusible(there(torch.float64), None)
        assert not _fusible(there(length=0), None)
        assert not _fusible(there(cuda=False), None)
        assert not _fusible(there(), torch.zeros(2, 3, 4))
    assert not _fusible(there(), None)


def test_step_by_step_is_the_recurrence() -> None:
    """Check 1: one call a step, the state handed on."""
    *tensors, state = inputs(2, 11, 3, 4)
    x, delta, A, B, C, D = tensors
    wanted, last = naive.recurrent(*tensors, state)
    for t in range(11):
        y, state = scan_step(x[:, t], delta[:, t], A, B[:, t], C[:, t], D, state)
        assert torch.allclose(y, wanted[:, t], rtol=0, atol=1e-10)
    assert torch.allclose(state, last, rtol=0, atol=1e-10)


def test_hidden_attention_is_the_scan() -> None:
    """Check 2: the quadratic kernel gives the same outputs."""
    *tensors, _ = inputs(2, 19, 3, 4)
    assert torch.allclose(scan_quadratic(*tensors), selective_scan(*tensors)[0], rtol=0, atol=1e-10)


@given(cut=st.integers(1, 22), chunk=st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_split_in_two_is_one_pass(cut: int, chunk: int) -> None:
    """Check 1: carrying the state over any cut changes nothing, nor does it for the gradients."""
    of = inputs(1, 23, 2, 3)
    x, delta, A, B, C, D, state = of
    whole = selective_scan(x, delta, A, B, C, D, state=state, chunk=8)
    y, middle = selective_scan(x[:, :cut], delta[:, :cut], A, B[:, :cut], C[:, :cut], D, state=state, chunk=chunk)
    rest, last = selective_scan(x[:, cut:], delta[:, cut:], A, B[:, cut:], C[:, cut:], D, state=middle, chunk=chunk)
    parts = torch.cat([y, rest], 1), last
    assert torch.allclose(parts[0], whole[0], rtol=0, atol=1e-10)
    for a, b in zip(gradients(*parts, of), gradients(*whole, of), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)


def test_gradcheck() -> None:
    """Check 1: finite differences, the last state among the outputs and the first one among the inputs."""
    x, delta, A, B, C, D, state = inputs(1, 5, 2, 2)

    def scan(*args: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan(*args[:6], state=args[6], chunk=3)

    assert torch.autograd.gradcheck(scan, (x, delta, A, B, C, D, state))


def test_euler_meets_zero_order_hold() -> None:
    """Check 5: Δ B against (e^{ΔA} − 1)/A B: the relative error falls as Δ|A|/2."""
    for delta in (1e-1, 1e-2, 1e-3):
        A = -2.0
        hold = torch.expm1(torch.tensor(delta * A, dtype=torch.float64)) / A
        assert delta / hold.item() - 1 == pytest.approx(delta * abs(A) / 2, rel=0.1)


def test_half_precision_is_scanned_in_float32() -> None:
    """bf16 inputs: the same as their float32 values, rounded at the end; the state stays float32."""
    tensors = [tensor.detach().bfloat16() for tensor in inputs(1, 33, 2, 3)]
    y, last = selective_scan(*tensors[:6])
    wide, wide_last = selective_scan(*[tensor.float() for tensor in tensors[:6]])
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    assert torch.equal(last, wide_last)
    assert torch.allclose(y.float(), wide, rtol=1e-2, atol=1e-2)


def test_large_steps_do_not_overflow() -> None:
    """Δ|A| of 1 000 forgets everything: y = Δ x (B·C), no NaN, no infinity."""
    x, B, C = torch.randn(1, 20, 2), torch.randn(1, 20, 3), torch.randn(1, 20, 3)
    delta, A = torch.full_like(x, 1000.0), -torch.ones(2, 3)
    y, _ = selective_scan(x, delta, A, B, C)
    assert torch.allclose(y, 1000 * x * (B * C).sum(-1, keepdim=True), rtol=1e-4)


def test_memory_is_a_chunk_at_a_time() -> None:
    """What is kept for the backward pass: the inputs and one state a chunk, not one a step."""
    tensors = inputs(2, 64, 8, 16, torch.float32)
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        selective_scan(*tensors[:6], state=tensors[6], chunk=16)
    states = 2 * 64 * 8 * 16
    assert kept < states / 16 + 4 * 2 * 64 * (8 + 16) + 1000


@pytest.mark.gpu
def test_fused_kernel_is_the_scan() -> None:
    """mamba-ssm's kernel against ours on a GPU, outputs and last state."""
    pytest.importorskip("mamba_ssm")
    tensors = [tensor.detach().float().cuda() for tensor in inputs(2, 100, 16, 16)]
    ours = selective_scan(*tensors[:6], state=torch.zeros_like(tensors[6]))
    with torch.no_grad():
        fused = selective_scan(*tensors[:6])
    for a, b in zip(ours, fused, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
def test_scan_on_gpu_is_the_scan() -> None:
    """Wide passes on a GPU against the CPU, gradients too."""
    of = inputs(2, 100, 4, 8)
    there = [tensor.detach().cuda().requires_grad_() for tensor in of]
    here = gradients(*selective_scan(*of[:6], state=of[6]), of)
    for a, b in zip(gradients(*selective_scan(*there[:6], state=there[6]), there), here, strict=True):
        assert torch.allclose(a.cpu(), b, rtol=1e-9, atol=1e-9)
