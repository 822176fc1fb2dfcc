"""The selective scan in PyTorch: one recurrence, in the forms that a learner needs.

    S_t = exp(Δ_t A) ⊙ S_{t−1} + (Δ_t x_t) ⊗ B_t        y_t = S_t C_t + D ⊙ x_t

A is discretised by zero-order hold, B by Euler's rule, as in Mamba (arXiv 2312.00752, Algorithm 2). Shapes:
b batch, l time, d channels, n state; x and Δ [b, l, d], B and C [b, l, n], A [d, n], D [d], S [b, d, n].

:func:`selective_scan` is what models call; :func:`scan_step` is the recurrence itself, :func:`scan_parallel` the
associative scan over the whole length, and :func:`scan_quadratic` the same map as an attention matrix: they are the
truth that the first one is tested against, and small enough to be read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from metazoo.errors import UserError
from torch import Tensor


def scan_step(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence.

    Args:
        x, delta: [b, d]. A: [d, n], negative. B, C: [b, n]. D: [d], or None for no skip. state: S_{t−1} [b, d, n].

    Returns:
        y_t [b, d] and S_t [b, d, n].
    """
    decay = torch.exp(delta.unsqueeze(-1) * A)
    state = decay * state + (delta * x).unsqueeze(-1) * B.unsqueeze(-2)
    y = (state * C.unsqueeze(-2)).sum(-1)
    return (y if D is None else y + D * x), state


def scan_parallel(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, *, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The associative scan (Hillis and Steele) over (a, u) = (exp(Δ A), (Δ x) ⊗ B): log₂ l passes over b·l·d·n numbers.

    Returns:
        y [b, l, d] and the last state [b, d, n] (the first one where l is 0); all of it differentiable by autograd,
        as often as wanted, which keeps every pass.
    """
    if not x.shape[1]:
        return x, x.new_zeros(x.shape[0], *A.shape) if state is None else state
    decay = torch.exp(delta.unsqueeze(-1) * A)
    update = (delta * x).unsqueeze(-1) * B.unsqueeze(-2)
    if state is not None:
        update = torch.cat([update[:, :1] + decay[:, :1] * state.unsqueeze(1), update[:, 1:]], 1)
    step = 1
    while step < x.shape[1]:
        update = torch.cat([update[:, :step], update[:, step:] + decay[:, step:] * update[:, :-step]], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    y = (update * C.unsqueeze(-2)).sum(-1)
    return (y if D is None else y + D * x), update[:, -1]


def scan_quadratic(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None) -> Tensor:
    """The scan as hidden attention, from a state of zeros.

        y_{t,d} = Σ_{s≤t} [Σ_n C_{t,n} exp(A_{d,n} Σ_{s<r≤t} Δ_{r,d}) Δ_{s,d} B_{s,n}] x_{s,d}

    Costs b·l²·d·n: for checks and pictures of short streams.
    """
    time = delta.cumsum(1)
    between = time.unsqueeze(2) - time.unsqueeze(1)  # [b, t, s, d]
    kernel = torch.einsum("btn,btsdn,bsn->btsd", C, torch.exp(between.unsqueeze(-1).clamp(min=0) * A), B)
    causal = torch.ones(x.shape[1], x.shape[1], dtype=x.dtype, device=x.device).tril()
    y = torch.einsum("btsd,ts,bsd->btd", kernel, causal, delta * x)
    return y if D is None else y + D * x


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    state: Tensor | None = None,
    chunk: int = 16,
    doubling: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """The selective scan, ``chunk`` steps at a time, with a backward pass of its own.

    Forward it holds the b·chunk·d·n numbers of one chunk and keeps the state at the start of each one; backward
    computes a chunk's states again from there. So it needs memory for b·(l/chunk + 3·chunk)·d·n numbers where autograd
    over :func:`scan_parallel` keeps b·l·d·n several times, and reads each of them about once. There is no second
    derivative: :func:`scan_parallel` has it.

    Args:
        x, delta: [b, l, d]; delta is positive (after softplus). A: [d, n], negative. B, C: [b, l, n]. D: [d] or None.
        state: S before the first step [b, d, n]; None for zeros. Gradients go through it.
        chunk: steps held at a time, 1 or more; l need not be a multiple of it, and may be 0.
        doubling: within a chunk, log₂(chunk) wide passes instead of ``chunk`` narrow ones: fewer calls, but
            b·l·d·n·log₂(chunk) operations for b·l·d·n, and memory for 5·chunk in place of 3·chunk above. [default: on
            a GPU]

    Returns:
        y [b, l, d] in the dtype of x, and the last state [b, d, n] in float32 (float64 for float64), with gradient;
        where l is 0, the first state.

    Raises:
        UserError: shapes that do not agree, or a chunk below 1; in the backward pass, if its graph is to be kept
            (``create_graph``).

    On a GPU with mamba-ssm (extra ``cuda``) its fused kernel is used where no gradient is asked for, no state is given
    (its own last state carries none) and x is not float64 (it works in float32).
    """
    _check(x, delta, A, B, C, D, state, chunk)
    if _fusible(x, state) and _fused_kernel() is not None:
        return _fused(x, delta, A, B, C, D)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide = [tensor.to(dtype) for tensor in (x, delta, A, B, C)]
    start = x.new_zeros(x.shape[0], *A.shape, dtype=dtype) if state is None else state.to(dtype)
    if doubling is None:
        doubling = x.is_cuda
    y, last = _ChunkedScan.apply(*wide, start, chunk, doubling)
    if D is not None:
        y = y + D * wide[0]
    return y.to(x.dtype), last


def _check(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor | None, chunk: int
) -> None:
    if chunk < 1:
        raise UserError(f"chunk is {chunk}: give 1 or more")
    if x.ndim != 3 or A.ndim != 2:
        raise UserError(f"x is {tuple(x.shape)} and A {tuple(A.shape)}: the scan wants [b, l, d] and [d, n]")
    (b, length, d), n = x.shape, A.shape[1]
    for name, tensor, wanted in (
        ("delta", delta, (b, length, d)), ("A", A, (d, n)), ("B", B, (b, length, n)), ("C", C, (b, length, n)),
        ("D", D, (d,)), ("state", state, (b, d, n)),
    ):  # fmt: skip
        if tensor is not None and tensor.shape != wanted:
            raise UserError(f"{name} is {tuple(tensor.shape)}: for x {tuple(x.shape)} the scan wants {wanted}")


def _fusible(x: Tensor, state: Tensor | None) -> bool:
    """Whether the fused kernel may stand in: it has no first state, no gradient of the last one, and no float64."""
    free = state is None and not torch.is_grad_enabled()
    return free and x.is_cuda and x.dtype != torch.float64 and x.shape[1] > 0


@functools.cache
def _fused_kernel() -> Callable[..., Any] | None:
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
    except ImportError:
        return None
    return selective_scan_fn  # type: ignore[no-any-return]


def _fused(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None) -> tuple[Tensor, Tensor]:
    """mamba-ssm's kernel, which wants time last."""
    kernel = _fused_kernel()
    assert kernel is not None
    turned = [tensor.transpose(1, 2).contiguous() for tensor in (x, delta.to(x.dtype), B.to(x.dtype), C.to(x.dtype))]
    y, last = kernel(
        turned[0],
        turned[1],
        A.float(),
        turned[2],
        turned[3],
        None if D is None else D.float(),
        return_last_state=True,
    )
    return y.transpose(1, 2), last.float()


class _ChunkedScan(torch.autograd.Function):
    """Time comes first within: [l, b, d]."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor, chunk: int, doubling: bool
    ) -> tuple[Tensor, Tensor]:
        x, delta, B, C = (tensor.transpose(0, 1).contiguous() for tensor in (x, delta, B, C))
        steps = range(0, len(x), chunk)
        starts = x.new_empty(len(steps), *state.shape)
        y = torch.empty_like(x)
        for i, t in enumerate(steps):
            part = slice(t, t + chunk)
            starts[i] = state
            _, states = _states(x[part], delta[part], A, B[part], state, doubling)
            torch.matmul(states, C[part].unsqueeze(-1), out=y[part].unsqueeze(-1))
            state = states[-1]
        ctx.save_for_backward(x, delta, A, B, C, starts)
        ctx.chunk, ctx.doubling = chunk, doubling
        return y.transpose(0, 1), state.clone()

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # once_differentiable would let a wrong second derivative pass in silence
            raise UserError("selective_scan has no second derivative (create_graph): use mambacl.scan.scan_parallel")
        x, delta, A, B, C, starts = ctx.saved_tensors
        grad_y = grad_y.transpose(0, 1).contiguous()
        grad_x, grad_delta, grad_B, grad_C = (torch.empty_like(tensor) for tensor in (x, delta, B, C))
        grad_A = torch.zeros_like(A)
        carried = grad_last.clone()
        for i, t in reversed(list(enumerate(range(0, len(x), ctx.chunk)))):
            part = slice(t, t + ctx.chunk)
            decay, states = _states(x[part], delta[part], A, B[part], starts[i], ctx.doubling)
            # ∂/∂S_t = C_t ⊗ ∂/∂y_t + a_{t+1} ⊙ ∂/∂S_{t+1}
            grads = grad_y[part].unsqueeze(-1) * C[part].unsqueeze(-2)
            grads[-1] += carried
            _scan_back(decay, grads, ctx.doubling)
            carried = decay[0] * grads[0]
            torch.matmul(grad_y[part].unsqueeze(-2), states, out=grad_C[part].unsqueeze(-2))
            driven = delta[part] * x[part]
            torch.matmul(driven.unsqueeze(-2), grads, out=grad_B[part].unsqueeze(-2))
            grad_driven = torch.matmul(grads, B[part].unsqueeze(-1)).squeeze(-1)
            # ∂/∂(Δ_t A) = ∂/∂S_t ⊙ a_t ⊙ S_{t−1}
            decay.mul_(grads)
            decay[1:].mul_(states[:-1])
            decay[0].mul_(starts[i])
            grad_A += torch.einsum("lbd,lbdn->dn", delta[part], decay)
            torch.mul(grad_driven, delta[part], out=grad_x[part])
            torch.mul(grad_driven, x[part], out=grad_delta[part])
            grad_delta[part] += torch.einsum("lbdn,dn->lbd", decay, A)
        turned = [tensor.transpose(0, 1) for tensor in (grad_x, grad_delta, grad_B, grad_C)]
        return turned[0], turned[1], grad_A, turned[2], turned[3], carried, None, None


def _states(x: Tensor, delta: Tensor, A: Tensor, B: Tensor, state: Tensor, doubling: bool) -> tuple[Tensor, Tensor]:
    """Decays a_t and states S_t of one chunk, both [c, b, d, n]."""
    decay = torch.mul(delta.unsqueeze(-1), A).exp_()
    states = torch.mul((delta * x).unsqueeze(-1), B.unsqueeze(-2))
    states[0].addcmul_(decay[0], state)
    if doubling:
        product, step = decay.clone(), 1
        while step < len(states):
            states[step:] += product[step:] * states[:-step]
            product[step:] = product[step:] * product[:-step]
            step *= 2
    else:
        for t in range(1, len(states)):
            states[t].addcmul_(decay[t], states[t - 1])
    return decay, states


def _scan_back(decay: Tensor, grads: Tensor, doubling: bool) -> None:
    """grads_t += a_{t+1} ⊙ grads_{t+1} from the end to the start, in place."""
    if doubling:
        product, step = decay[1:].clone(), 1  # product[t] leads from t + 1 to t
        while step < len(grads):
            grads[:-step] += product[: len(grads) - step] * grads[step:]
            product[:-step] = product[:-step] * product[step:]
            step *= 2
    else:
        for t in range(len(grads) - 2, -1, -1):
            grads[t].addcmul_(decay[t + 1], grads[t + 1])
