"""The truth for the model's tests: one expert and one environment at a time, written as the papers have it."""

from __future__ import annotations

import torch
from mixer.model import CoDAExpert, GEPSExpert, MixER, NCFExpert, ShallowPLRNNExpert


def swish(x: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    return x / (1 + torch.exp(-beta * x))


def mlp(layers: list[tuple[torch.Tensor, torch.Tensor]], betas: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for k, (weight, bias) in enumerate(layers):
        x = weight @ x + bias
        if k < len(layers) - 1:
            x = swish(x, betas[k])
    return x


def geps(p: dict[str, torch.Tensor], n: int, x: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    xi = xi + p["shift"]
    layers, betas = [], []
    for k in range(n):
        weight = p[f"root.weight.{k}"] + p[f"left.{k}"] @ torch.diag(xi) @ p[f"right.{k}"]
        layers.append((weight, p[f"root.bias.{k}"] + p[f"left_bias.{k}"] @ xi))
        if k < n - 1:
            betas.append(p[f"root.beta.{k}"] + p[f"left_beta.{k}"] @ xi)
    return mlp(layers, betas, x)


def coda(p: dict[str, torch.Tensor], n: int, x: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    names = [f"root.{kind}.{k}" for kind in ("weight", "bias", "beta") for k in range(n - (kind == "beta"))]
    move = p["hyper"] @ (xi + p["shift"])
    moved, at = {}, 0
    for name in names:
        moved[name] = p[name] + move[at : at + p[name].numel()].reshape(p[name].shape)
        at += p[name].numel()
    assert at == len(move)
    layers = [(moved[f"root.weight.{k}"], moved[f"root.bias.{k}"]) for k in range(n)]
    return mlp(layers, [moved[f"root.beta.{k}"] for k in range(n - 1)], x)


def ncf(p: dict[str, torch.Tensor], counts: tuple[int, int, int], x: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    def network(name: str, n: int, value: torch.Tensor) -> torch.Tensor:
        layers = [(p[f"{name}.weight.{k}"], p[f"{name}.bias.{k}"]) for k in range(n)]
        return mlp(layers, [p[f"{name}.beta.{k}"] for k in range(n - 1)], value)

    seen = network("context", counts[0], xi + p["shift"])
    return network("main", counts[2], torch.cat([network("data", counts[1], x), seen]))


def plrnn(
    p: dict[str, torch.Tensor], d: int, hidden: int, alpha_min: float, x: torch.Tensor, xi: torch.Tensor
) -> torch.Tensor:
    flat = p["hyper"] @ (xi + p["shift"])
    sizes = [d * d, d * hidden, hidden * d, d, hidden, 1]
    a, w1, w2, h1, h2, alpha = flat.split(sizes)
    a, w1, w2 = a.view(d, d), w1.view(d, hidden), w2.view(hidden, d)
    alpha = torch.clamp(alpha, min=alpha_min)
    z, out = torch.zeros(d, dtype=x.dtype), []
    for seen in x:
        z = alpha * z + (1 - alpha) * seen
        z = a @ z + w1 @ torch.relu(w2 @ z + h2) + h1
        out.append(z)
    return torch.stack(out)


def expert_parameters(model: MixER, m: int) -> dict[str, torch.Tensor]:
    return {name: stack[m] for name, stack in zip(model.names, model.stacked, strict=True)}


def expert(model: MixER, m: int, x: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    """f_m(x, ξ_m) for one state x [d] (a sequence [T, d] for shplrnn) and one whole context ξ [C]."""
    c = model.context_size // model.experts if model.split_context else model.context_size
    own = xi[m * c : (m + 1) * c] if model.split_context else xi
    p, structure = expert_parameters(model, m), model.structure[0]
    if isinstance(structure, GEPSExpert):
        return geps(p, len(structure.root.weight), x, own)
    if isinstance(structure, CoDAExpert):
        return coda(p, len(structure.root.weight), x, own)
    if isinstance(structure, NCFExpert):
        counts = (len(structure.context.weight), len(structure.data.weight), len(structure.main.weight))
        return ncf(p, counts, x, own)
    assert isinstance(structure, ShallowPLRNNExpert)
    d, hidden = structure.shapes[1]
    return plrnn(p, d, hidden, structure.alpha_min, x, own)


def mixture(model: MixER, x: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    """The gate's choice for one context, times its softmax value in the naive mixture."""
    scores = torch.cat([xi, xi.new_ones(1)]) @ model.gate_weight
    m = int(scores.argmax())
    out = expert(model, m, x, xi)
    return scores.softmax(0)[m] * out if model.gate == "gradient" else out


def solve(model: MixER, t: torch.Tensor, x0: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
    """RK4 for one environment and one trajectory: t [T], x0 [d] -> [T, d]."""
    x, out = x0, [x0]
    for k in range(len(t) - 1):
        h = t[k + 1] - t[k]
        k1 = mixture(model, x, xi)
        k2 = mixture(model, x + h / 2 * k1, xi)
        k3 = mixture(model, x + h / 2 * k2, xi)
        k4 = mixture(model, x + h * k3, xi)
        x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        out.append(x)
    return torch.stack(out)
