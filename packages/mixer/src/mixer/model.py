"""Experts (NCF, CoDA, GEPS, hierarchical shallow PLRNN) and MixER, their mixture with one gate on the contexts.

Shapes: E environments, B pairs of an environment and an expert, I trajectories, T times, d states, M experts,
C context size, c context size that one expert sees (C/M if split, else C), P neighbours, L hidden units.

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
        moves = (self.hyper @ (xi + self.shift)).split([p.numel() for p in parts])
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
        *parts, alpha = flat.split([math.prod(shape) for shape in self.shapes])
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
        UserError: C cannot be split over M experts.
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

        with torch.random.fork_rng(devices=[]):
            made = []
            for m in range(experts):
                torch.manual_seed(seed if same_init else seed * 1_000_003 + m)
                made.append(make())
            torch.manual_seed(seed + 1)
            bound = (context_size + 1) ** -0.5
            self.gate_weight = _uniform(context_size + 1, experts, bound=bound)  # W
        self.gate_weight.requires_grad_(gate == "gradient")
        trained = {name for name, p in made[0].named_parameters() if p.requires_grad}
        stacked, _ = stack_module_state(made)  # type: ignore[arg-type]
        self.names = tuple(stacked)
        self.stacked = nn.ParameterList(
            [nn.Parameter(stacked[name].detach(), requires_grad=name in trained) for name in self.names]
        )
        # the structure of one expert, without weights; in a tuple, so that it is no sub-module
        self.structure = (made[0].to("meta"),)
        self.active = () if expert == "shplrnn" else cast("tuple[bool, ...]", made[0].active)

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
                the expert, as in the released code.
        """
        if neighbours is None or taylor_order == 0:
            return self._network(xi, expert, field)(x)
        b, p, _ = neighbours.shape
        expanded = self._expanded(xi, expert, neighbours, taylor_order, field)
        return expanded(x.repeat_interleave(p, 0)).unflatten(0, (b, p))

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
        """
        around = neighbours if taylor_order else None
        if around is None:
            network = self._network(xi, expert, field)
        else:
            network = self._expanded(xi, expert, around, taylor_order, field)
            t, x0 = (tensor.repeat_interleave(around.shape[1], 0) for tensor in (t, x0))
        solved = rk4(network, t, x0, substeps) if solver == "rk4" else adaptive(network, t, x0, method=solver)
        return solved if around is None else solved.unflatten(0, around.shape[:2])

    def rollout(
        self,
        x: torch.Tensor,
        xi: torch.Tensor,
        *,
        expert: torch.Tensor | None = None,
        neighbours: torch.Tensor | None = None,
        taylor_order: int = 0,
    ) -> torch.Tensor:
        """Sequence to sequence (shplrnn): x [B, I, T, d] -> [B, I, T, d], or [B, P, I, T, d] with neighbours."""

        def network(weights: Any, active: Sequence[bool], x: torch.Tensor) -> torch.Tensor:
            return recurrence(weights, x)

        if neighbours is None or taylor_order == 0:
            return self._network(xi, expert, network)(x)
        b, p, _ = neighbours.shape
        expanded = self._expanded(xi, expert, neighbours, taylor_order, network)
        return expanded(x.repeat_interleave(p, 0)).unflatten(0, (b, p))

    def _network(
        self, xi: torch.Tensor, expert: torch.Tensor | None, network: Callable[..., torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The chosen experts as a function of the state, conditioned once."""
        chosen = self.route(xi) if expert is None else expert
        weights = self.condition(xi, chosen)
        if self.gate == "least-squares" or expert is not None:
            return lambda x: network(weights, self.active, x)
        gate = self._gate_value(xi, chosen)
        return lambda x: _times(gate, network(weights, self.active, x))

    def _gate_value(self, xi: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        return self.gate_probabilities(xi).gather(1, chosen[:, None]).squeeze(1)

    def _expanded(
        self,
        xi: torch.Tensor,
        expert: torch.Tensor | None,
        neighbours: torch.Tensor,
        order: int,
        network: Callable[..., torch.Tensor],
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """The Taylor expansion of the chosen experts about each neighbour [B·P].

        Along ζ(s) = ξ' + s(ξ − ξ') the expansion of order k at ξ is the Taylor polynomial of s ↦ f(ζ(s)) at s = 1, so
        the conditioning and its derivatives along s are taken once and every evaluation differentiates in s alone;
        :func:`mixer.modulation.taylor` is the same, evaluation by evaluation.
        """
        p = neighbours.shape[1]
        around = neighbours.flatten(0, 1)
        own = xi.repeat_interleave(p, 0)
        chosen = self.route(around) if expert is None else expert.repeat_interleave(p, 0)
        multiply = self.gate == "gradient" and expert is None

        def conditioned(s: torch.Tensor) -> Any:
            zeta = around + s * (own - around)
            return self.condition(zeta, chosen), self._gate_value(zeta, chosen) if multiply else None

        def drop_none(s: torch.Tensor) -> Any:
            weights, gate = conditioned(s)
            return (weights, gate) if gate is not None else (weights,)

        zero = torch.zeros((), dtype=xi.dtype, device=xi.device)
        one = torch.ones_like(zero)

        def first(s: torch.Tensor) -> Any:
            return jvp(drop_none, (s,), (one,))[1]

        values, slopes = jvp(drop_none, (zero,), (one,))
        curves = jvp(first, (zero,), (one,))[1] if order == 2 else None

        def along(s: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
            at = _combine(values, slopes, curves, s)
            out = network(at[0], self.active, x)
            return _times(at[1], out) if multiply else out

        def evaluate(x: torch.Tensor) -> torch.Tensor:
            def slope(s: torch.Tensor) -> torch.Tensor:
                return jvp(lambda u: along(u, x), (s,), (one,))[1]

            value, gradient = jvp(lambda u: along(u, x), (zero,), (one,))
            if order == 1:
                return value + gradient
            return value + gradient + 0.5 * jvp(slope, (zero,), (one,))[1]

        return evaluate


def _times(gate: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Multiply each pair's output by its gate value: [B], [B, …] -> [B, …]."""
    return gate.view(-1, *[1] * (out.ndim - 1)) * out


def _combine(values: Any, slopes: Any, curves: Any, s: torch.Tensor) -> Any:
    """values + s·slopes + s²/2·curves, through nested tuples."""
    if isinstance(values, tuple):
        return tuple(
            _combine(value, slope, None if curves is None else curves[i], s)
            for i, (value, slope) in enumerate(zip(values, slopes, strict=True))
        )
    moved = values + s * slopes
    return moved if curves is None else moved + 0.5 * s.square() * curves
