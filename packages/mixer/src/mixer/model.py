"""Experts (NCF, CoDA, GEPS, hierarchical shallow PLRNN) and MixER, their mixture with one gate on the contexts.

Shapes: E environments, B pairs of an environment and an expert, I trajectories, T times, d states, M experts,
C context size, c context size that one expert sees (C/M if split, else C), P neighbours, L hidden units,
K order of a Taylor expansion.

An expert's ``condition`` does all that depends on the context alone: it gives the weights of a plain network, once per
solve; the network is then evaluated at every stage of the solver. Weights of the M experts are stacked, and a batch of
pairs is conditioned by vmap over gathered stacks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from huggingface_hub import PyTorchModelHubMixin
from metazoo.errors import UserError
from torch import nn
from torch.func import functional_call, jvp, stack_module_state, vmap

from mixer.modulation import multiplication, relu_series, swish_series
from mixer.solve import adaptive, rk4

Tensors = tuple[torch.Tensor, ...]
Weights = tuple[Tensors, Tensors, Tensors]  # of a conditioned MLP: matrices, biases, Swish scalars


def _uniform(*shape: int, bound: float) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))


class MLP(nn.Module):
    """Linear layers with Swish x·σ(βx) between them, one learned β ~ U(0.01, 1) a layer; weights and biases
    U(±1/√in)."""

    def __init__(self, sizes: Sequence[int]) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(sizes))
        self.weight = nn.ParameterList([_uniform(o, i, bound=i**-0.5) for i, o in pairs])
        self.bias = nn.ParameterList([_uniform(o, bound=i**-0.5) for i, o in pairs])
        self.beta = nn.ParameterList([nn.Parameter(torch.empty(()).uniform_(0.01, 1)) for _ in pairs[:-1]])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        for weight, bias, beta in zip(self.weight, self.bias, [*self.beta, None], strict=True):
            x = x @ weight.T + bias
            if beta is not None:
                x = x * torch.sigmoid(beta * x)
        return x


class GEPSExpert(nn.Module):
    """GEPS (Kassaï Koupaï et al., 2024): every layer W + A diag(ξ) B, b + A_b ξ; β + A_β ξ as in the released code.

    Args:
        state_size: d. context_size: c. width: hidden units. depth: linear layers. shift: learn a scalar added to ξ.
    """

    def __init__(self, state_size: int, context_size: int, width: int, depth: int, shift: bool) -> None:
        super().__init__()
        self.active = (True,) * (depth - 1) + (False,)
        self.root = MLP([state_size, *[width] * (depth - 1), state_size])
        self.left = nn.ParameterList(
            [_uniform(w.shape[0], context_size, bound=w.shape[0] ** -0.5) for w in self.root.weight]
        )
        self.right = nn.ParameterList(
            [_uniform(context_size, w.shape[1], bound=context_size**-0.5) for w in self.root.weight]
        )
        self.left_bias = nn.ParameterList(
            [_uniform(len(b), context_size, bound=len(b) ** -0.5) for b in self.root.bias]
        )
        self.left_beta = nn.ParameterList([_uniform(context_size, bound=1.0) for _ in self.root.beta])
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=shift)

    def forward(self, xi: torch.Tensor) -> Weights:
        """Condition on ξ [c]."""
        xi = xi + self.shift
        matrices = tuple(w + (a * xi) @ b for w, a, b in zip(self.root.weight, self.left, self.right, strict=True))
        biases = tuple(b + a @ xi for b, a in zip(self.root.bias, self.left_bias, strict=True))
        betas = tuple(b + a @ xi for b, a in zip(self.root.beta, self.left_beta, strict=True))
        return matrices, biases, betas


class CoDAExpert(nn.Module):
    """CoDA (Kirchmeyer et al., 2022): all weights θ + H ξ, H [P, c] one linear layer without bias, U(±1/√c).

    Args: as :class:`GEPSExpert`.
    """

    def __init__(self, state_size: int, context_size: int, width: int, depth: int, shift: bool) -> None:
        super().__init__()
        self.active = (True,) * (depth - 1) + (False,)
        self.root = MLP([state_size, *[width] * (depth - 1), state_size])
        count = sum(p.numel() for p in self.root.parameters())
        self.hyper = _uniform(count, context_size, bound=context_size**-0.5)
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=shift)

    def forward(self, xi: torch.Tensor) -> Weights:
        """Condition on ξ [c]."""
        parts = [*self.root.weight, *self.root.bias, *self.root.beta]
        moves = torch.split(self.hyper @ (xi + self.shift), [p.numel() for p in parts])
        moved = [p + move.view(p.shape) for p, move in zip(parts, moves, strict=True)]
        n = len(self.root.weight)
        return tuple(moved[:n]), tuple(moved[n : 2 * n]), tuple(moved[2 * n :])


def widths(size: int, target: int, hidden: int) -> list[int]:
    """Widths of NCF's context and data networks: ``hidden`` layers between ``size`` and ``target``, interpolated
    geometrically, cut to an integer and rounded up to the next even number."""
    between = [int(size * math.exp(i / (hidden + 1) * math.log(target / size))) for i in range(1, hidden + 1)]
    return [size, *(math.ceil(w / 2) * 2 for w in between), target]


class NCFExpert(nn.Module):
    """Neural context flow (Nzoyem et al., 2024): a network of ξ and one of x, concatenated into a main network.

    Conditioned, it is one MLP in x: the data network, whose last layer has no activation, then the main network,
    with the context's part of its first layer in the bias.

    Args:
        state_size: d. context_size: c. width: of the main network. depth: its hidden layers. shift: as in GEPS.
        intermediate: output size of the context and the data network. context_depth, data_depth: their hidden layers.
    """

    def __init__(
        self, state_size: int, context_size: int, width: int, depth: int, shift: bool, intermediate: int,
        context_depth: int, data_depth: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.active = (True,) * data_depth + (False,) + (True,) * depth + (False,)
        self.context = MLP(widths(context_size, intermediate, context_depth))
        self.data = MLP(widths(state_size, intermediate, data_depth))
        self.main = MLP([2 * intermediate, *[width] * depth, state_size])
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=shift)

    def forward(self, xi: torch.Tensor) -> Weights:
        """Condition on ξ [c]."""
        seen = self.context(xi + self.shift)
        first, *rest = self.main.weight
        on_data, on_context = first.split(len(seen), dim=1)  # concatenated in this order
        bias = self.main.bias[0] + on_context @ seen
        return (
            (*self.data.weight, on_data, *rest),
            (*self.data.bias, bias, *list(self.main.bias)[1:]),
            (*self.data.beta, *self.main.beta),
        )


class ShallowPLRNNExpert(nn.Module):
    """Hierarchical shallow PLRNN (Brenner et al., 2024): all of (A, W1, W2, h1, h2, α) = H ξ, without root weights.

    Args:
        state_size: d, also the latent size. context_size: c. hidden: L. alpha_min: least α. shift: as in GEPS.
    """

    def __init__(self, state_size: int, context_size: int, hidden: int, alpha_min: float, shift: bool) -> None:
        super().__init__()
        d = state_size
        self.shapes = ((d, d), (d, hidden), (hidden, d), (d,), (hidden,), ())  # A, W1, W2, h1, h2, α
        self.alpha_min = alpha_min
        count = sum(math.prod(shape) for shape in self.shapes)
        self.hyper = _uniform(count, context_size, bound=context_size**-0.5)
        self.shift = nn.Parameter(torch.zeros(()), requires_grad=shift)

    def forward(self, xi: torch.Tensor) -> Tensors:
        """Condition on ξ [c]: A [d, d], W1 [d, L], W2 [L, d], h1 [d], h2 [L], α []."""
        flat = self.hyper @ (xi + self.shift)
        *parts, alpha = torch.split(flat, [math.prod(shape) for shape in self.shapes])
        shaped = [part.view(shape) for part, shape in zip(parts, self.shapes, strict=False)]
        return (*shaped, alpha.squeeze(0).clamp(min=self.alpha_min))


def field(weights: Weights, active: Sequence[bool], x: torch.Tensor) -> torch.Tensor:
    """The conditioned MLPs of B pairs: matrices [B, out, in], biases [B, out], β [B], x [B, N, d] -> [B, N, d]."""
    matrices, biases, betas = weights
    swish = iter(betas)
    for matrix, bias, on in zip(matrices, biases, active, strict=True):
        x = torch.baddbmm(bias[:, None], x, matrix.mT)
        if on:
            x = x * torch.sigmoid(next(swish)[:, None, None] * x)
    return x


def recurrence(weights: Tensors, x: torch.Tensor) -> torch.Tensor:
    """Conditioned shallow PLRNNs with teacher forcing: z ← αz + (1−α)x_t, then z' = A z + W1 relu(W2 z + h2) + h1.

    Args:
        weights: A [B, d, d], W1 [B, d, L], W2 [B, L, d], h1 [B, d], h2 [B, L], α [B].
        x: observations [B, I, T, d].

    Returns:
        [B, I, T, d]: at t the z' computed from x_t, as in the released code; z starts at 0.
    """
    a, w1, w2, h1, h2, alpha = weights
    alpha = alpha[:, None, None]
    observed = ((1 - alpha[..., None]) * x).unbind(2)
    a, w1, w2, h1, h2 = a.mT, w1.mT, w2.mT, h1[:, None], h2[:, None]
    z = torch.zeros_like(x[:, :, 0])
    states = []
    for seen in observed:
        z = torch.addcmul(seen, z, alpha)
        z = torch.baddbmm(torch.baddbmm(h1, z, a), torch.baddbmm(h2, z, w2).relu(), w1)
        states.append(z)
    return torch.stack(states, dim=2)


def field_series(series: Sequence[Weights], active: Sequence[bool]) -> Callable[[torch.Tensor], torch.Tensor]:
    """:func:`field` for weights that are power series in s, the k-th of ``series`` the coefficient of s^k.

    Returns:
        A function of states that do not depend on s, x [B, N, d] -> the output's coefficients [B, N, K + 1, d].
    """
    matrices = [multiplication([weights[0][i] for weights in series]).mT for i in range(len(active))]
    biases = [torch.cat([weights[1][i] for weights in series], dim=-1)[:, None] for i in range(len(active))]
    betas = [[weights[2][i] for weights in series] for i in range(sum(active))]
    matrices[0] = matrices[0][:, : series[0][0][0].shape[-1]]  # of x only the coefficient of 1 is not 0

    def evaluate(x: torch.Tensor) -> torch.Tensor:
        swish = iter(betas)
        for matrix, bias, on in zip(matrices, biases, active, strict=True):
            x = torch.baddbmm(bias, x, matrix)
            if on:
                x = swish_series(x, next(swish))
        return x.reshape(*x.shape[:-1], len(series), -1)

    return evaluate


def recurrence_series(series: Sequence[Tensors]) -> Callable[[torch.Tensor], torch.Tensor]:
    """:func:`recurrence` for weights that are power series in s: x [B, I, T, d] -> coefficients [B, I, T, K + 1, d]."""
    alpha = [weights[5] for weights in series]
    one = torch.eye(series[0][0].shape[-1], dtype=alpha[0].dtype, device=alpha[0].device)
    keep = multiplication([value[:, None, None] * one for value in alpha]).mT
    share = torch.stack([1 - alpha[0], *(-value for value in alpha[1:])], dim=1)[:, None, None, :, None]
    a, w1, w2 = (multiplication([weights[i] for weights in series]).mT for i in range(3))
    h1, h2 = (torch.cat([weights[i] for weights in series], dim=-1)[:, None] for i in (3, 4))

    def evaluate(x: torch.Tensor) -> torch.Tensor:
        observed = (share * x[..., None, :]).flatten(-2).unbind(2)
        z = torch.zeros_like(observed[0])
        states = []
        for seen in observed:
            z = torch.baddbmm(seen, z, keep)
            z = torch.baddbmm(torch.baddbmm(h1, z, a), relu_series(torch.baddbmm(h2, z, w2), len(series)), w1)
            states.append(z)
        return torch.stack(states, dim=2).reshape(*x.shape[:-1], len(series), -1)

    return evaluate


class MixER(nn.Module, PyTorchModelHubMixin):
    """dx/dt = f_m(x, ξ_m), m = argmax_j [ξ; 1]ᵀW_j: M experts, and a gate that looks at the context only.

    Saves and loads in the hub's way (``save_pretrained``, ``from_pretrained``; safetensors).

    Args:
        expert: "geps", "coda", "ncf", or "shplrnn" (sequence to sequence; use :meth:`rollout`).
        state_size: d.
        context_size: C, over all experts.
        experts: M.
        split_context: expert m sees the m-th of M slices; off, every expert sees all of ξ.
        same_init: all experts start from the same weights.
        shift_context: learn a scalar per expert, added to ξ.
        width, depth, intermediate, context_depth, data_depth, hidden, alpha_min: of the experts.
        gate: "least-squares": W is no parameter of the gradient and the expert's output is not multiplied by the gate;
            "gradient" (the naive mixture): the output is multiplied by the chosen expert's softmax value.
        seed: of the initialisation.

    Raises:
        UserError: C cannot be split over M experts, a size is below 1, or the expert or the gate is unknown.
    """

    def __init__(
        self,
        *,
        expert: Literal["geps", "coda", "ncf", "shplrnn"] = "geps",
        state_size: int = 2,
        context_size: int = 16,
        experts: int = 4,
        split_context: bool = True,
        same_init: bool = True,
        shift_context: bool = True,
        width: int = 64,
        depth: int = 3,
        intermediate: int = 32,
        context_depth: int = 1,
        data_depth: int = 1,
        hidden: int = 32,
        alpha_min: float = 0.0,
        gate: Literal["least-squares", "gradient"] = "least-squares",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if gate not in ("least-squares", "gradient"):
            raise UserError(f"unknown gate {gate!r}: one of least-squares, gradient")
        for name, size in (("state_size", state_size), ("context_size", context_size), ("experts", experts)):
            if size < 1:
                raise UserError(f"{name} is {size}: give 1 or more")
        if split_context and context_size % experts:
            raise UserError(f"context_size {context_size} cannot be split over {experts} experts: make it a multiple")
        self.state_size, self.context_size, self.experts = state_size, context_size, experts
        self.split_context, self.gate = split_context, gate
        c = context_size // experts if split_context else context_size

        def make() -> nn.Module:
            if expert == "geps":
                return GEPSExpert(state_size, c, width, depth, shift_context)
            if expert == "coda":
                return CoDAExpert(state_size, c, width, depth, shift_context)
            if expert == "ncf":
                return NCFExpert(state_size, c, width, depth, shift_context, intermediate, context_depth, data_depth)
            if expert == "shplrnn":
                return ShallowPLRNNExpert(state_size, c, hidden, alpha_min, shift_context)
            raise UserError(f"unknown expert {expert!r}: one of geps, coda, ncf, shplrnn")

        # on the CPU and from its generator alone: the same weights on every device, whose generators are left alone
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            made = []
            for m in range(experts):
                torch.default_generator.manual_seed(seed if same_init else seed * 1_000_003 + m)
                made.append(make())
            torch.default_generator.manual_seed(seed + 1)
            bound = (context_size + 1) ** -0.5
            self.gate_weight = _uniform(context_size + 1, experts, bound=bound)  # W
        self.gate_weight.requires_grad_(gate == "gradient")
        trained = {name for name, p in made[0].named_parameters() if p.requires_grad}
        stacked, _ = stack_module_state(made)
        self.names = tuple(stacked)
        self.stacked = nn.ParameterList(
            [nn.Parameter(stacked[name].detach(), requires_grad=name in trained) for name in self.names]
        )
        # the structure of one expert, without weights; in a tuple, so that it is no sub-module
        self.structure = (made[0].to("meta"),)
        self.recurrent = expert == "shplrnn"
        self.active = () if self.recurrent else cast("tuple[bool, ...]", made[0].active)

    def slices(self, xi: torch.Tensor) -> torch.Tensor:
        """What each expert sees of the contexts: [B, C] -> [B, M, c]."""
        if self.split_context:
            return xi.view(len(xi), self.experts, -1)
        return xi[:, None].expand(-1, self.experts, -1)

    def scores(self, xi: torch.Tensor) -> torch.Tensor:
        """[ξ; 1]ᵀW: [B, C] -> [B, M]."""
        return xi @ self.gate_weight[:-1] + self.gate_weight[-1]

    def route(self, xi: torch.Tensor) -> torch.Tensor:
        """The expert of each context: [B, C] -> [B]."""
        return self.scores(xi.detach()).argmax(1)

    def gate_probabilities(self, xi: torch.Tensor) -> torch.Tensor:
        """Softmax of the scores, for display, and as the factor of the naive mixture: [B, C] -> [B, M]."""
        return self.scores(xi).softmax(1)

    def condition(self, xi: torch.Tensor, expert: torch.Tensor) -> Any:
        """Weights of the conditioned networks of B pairs: contexts [B, C], experts [B] -> stacks with leading B."""
        seen = xi if not self.split_context else self.slices(xi)[torch.arange(len(xi), device=xi.device), expert]
        gathered = {name: stack[expert] for name, stack in zip(self.names, self.stacked, strict=True)}
        return vmap(lambda weights, own: functional_call(self.structure[0], weights, (own,)))(gathered, seen)

    def vector_field(
        self,
        x: torch.Tensor,
        xi: torch.Tensor,
        *,
        expert: torch.Tensor | None = None,
        neighbours: torch.Tensor | None = None,
        taylor_order: int = 0,
    ) -> torch.Tensor:
        """dx/dt at given points: x [B, N, d], ξ [B, C] -> [B, N, d], or [B, P, N, d] with neighbours [B, P, C].

        Args:
            expert: expert of each pair [B]; None leaves it to the gate.
            neighbours: contexts that a Taylor expansion of order ``taylor_order`` is taken around; their gate chooses
                the expert, as in the released code. Order 0 does not look at them.

        Raises:
            UserError: the experts are sequence to sequence.
        """
        self._require_field(True)
        return self._evaluate(x, xi, expert, neighbours, taylor_order)

    def forward(
        self,
        t: torch.Tensor,
        x0: torch.Tensor,
        xi: torch.Tensor,
        *,
        expert: torch.Tensor | None = None,
        neighbours: torch.Tensor | None = None,
        taylor_order: int = 0,
        substeps: int = 1,
        solver: Literal["rk4", "dopri5"] = "rk4",
    ) -> torch.Tensor:
        """Solve from x0 [B, I, d] at times t [B, T] -> [B, I, T, d], or [B, P, I, T, d] with neighbours.

        Args: as :meth:`vector_field`; ``substeps`` of RK4 between two samples, or an adaptive ``solver``.

        Raises:
            UserError: the experts are sequence to sequence.
        """
        self._require_field(True)
        around = neighbours if taylor_order else None
        if around is None:
            network = self._network(xi, expert)
        else:
            network = self._expanded(xi, expert, around, taylor_order)
            t, x0 = (tensor.repeat_interleave(around.shape[1], 0) for tensor in (t, x0))
        solved = rk4(network, t, x0, substeps) if solver == "rk4" else adaptive(network, t, x0, method=solver)
        return solved if around is None else solved.view(*around.shape[:2], *solved.shape[1:])

    def rollout(
        self,
        x: torch.Tensor,
        xi: torch.Tensor,
        *,
        expert: torch.Tensor | None = None,
        neighbours: torch.Tensor | None = None,
        taylor_order: int = 0,
    ) -> torch.Tensor:
        """Sequence to sequence (shplrnn): x [B, I, T, d] -> [B, I, T, d], or [B, P, I, T, d] with neighbours.

        Raises:
            UserError: the experts are vector fields.
        """
        self._require_field(False)
        return self._evaluate(x, xi, expert, neighbours, taylor_order)

    def _require_field(self, wanted: bool) -> None:
        if self.recurrent == wanted:
            raise UserError(
                "the experts map sequences to sequences: use rollout"
                if wanted
                else "the experts are vector fields: use forward or vector_field"
            )

    def _evaluate(
        self,
        x: torch.Tensor,
        xi: torch.Tensor,
        expert: torch.Tensor | None,
        neighbours: torch.Tensor | None,
        taylor_order: int,
    ) -> torch.Tensor:
        if neighbours is None or taylor_order == 0:
            return self._network(xi, expert)(x)
        b, p, _ = neighbours.shape
        out = self._expanded(xi, expert, neighbours, taylor_order)(x.repeat_interleave(p, 0))
        return out.view(b, p, *out.shape[1:])

    def _network(self, xi: torch.Tensor, expert: torch.Tensor | None) -> Callable[[torch.Tensor], torch.Tensor]:
        """The chosen experts as a function of the state, conditioned once."""
        chosen = self.route(xi) if expert is None else expert
        weights = self.condition(xi, chosen)

        def evaluate(x: torch.Tensor) -> torch.Tensor:
            return recurrence(weights, x) if self.recurrent else field(weights, self.active, x)

        if self.gate == "least-squares" or expert is not None:
            return evaluate
        gate = self._gate_value(xi, chosen)
        return lambda x: gate.view(-1, *[1] * (x.ndim - 1)) * evaluate(x)

    def _gate_value(self, xi: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return self.gate_probabilities(xi).gather(1, chosen[:, None]).squeeze(1)

    def _expanded(
        self, xi: torch.Tensor, expert: torch.Tensor | None, neighbours: torch.Tensor, order: int
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The Taylor expansion of the chosen experts about each neighbour [B·P].

        Along ζ(s) = ξ' + s(ξ − ξ') the expansion of order K at ξ is the Taylor polynomial of s ↦ f(ζ(s)) at s = 1.
        Conditioning gives the weights' own coefficients in s by forward-mode products, once; an evaluation multiplies
        truncated power series. :func:`mixer.modulation.taylor` is the same with products at every evaluation.
        """
        if order not in (1, 2):
            raise UserError(f"taylor_order is {order}: give 0, 1 or 2")
        p = neighbours.shape[1]
        around = neighbours.flatten(0, 1)
        own = xi.repeat_interleave(p, 0)
        chosen = self.route(around) if expert is None else expert.repeat_interleave(p, 0)
        multiply = self.gate == "gradient" and expert is None
        zero = torch.zeros((), dtype=xi.dtype, device=xi.device)
        one = torch.ones_like(zero)

        def conditioned(s: torch.Tensor) -> Any:
            zeta = around + s * (own - around)
            gate = (self._gate_value(zeta, chosen),) if multiply else ()
            return self.condition(zeta, chosen), gate

        def with_slope(s: torch.Tensor) -> Any:
            return jvp(conditioned, (s,), (one,))

        if order == 1:
            coefficients = cast("tuple[Any, ...]", with_slope(zero))
        else:  # a tangent of ½ turns the second derivative into the coefficient of s²
            first, (_, last) = cast("Any", jvp(with_slope, (zero,), (one / 2,)))
            coefficients = (*first, last)
        series = [weights for weights, _ in coefficients]
        evaluate = recurrence_series(series) if self.recurrent else field_series(series, self.active)
        if not multiply:
            return lambda x: evaluate(x).sum(-2)
        # Σ_k Σ_{i+j=k} g_i y_j at s = 1, cut at s^K: y_j is multiplied by g_0 + … + g_{K−j}
        factors = torch.stack([gate for _, (gate,) in coefficients], dim=1).cumsum(1).flip(1)
        return lambda x: (factors.view(len(own), *[1] * (x.ndim - 2), -1, 1) * evaluate(x)).sum(-2)
