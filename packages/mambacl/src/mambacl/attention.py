"""Attention blocks as continual learners: softmax (Transformer), elu + 1 (Linear Transformer), FAVOR+ (Performer).

All have the interface of the Mamba block: they read a stream causally from a state, and answer independent queries from
it. The state of softmax attention is its cache of keys and values, which grows; the kernelised ones keep sums of fixed
size. Positions are the learner's matter.

Shapes: B episodes, L tokens of the stream, Q queries, d width, H heads, qk and v sizes of a head, f features.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from metazoo.errors import UserError
from torch import Tensor, nn

LEAST_SHARE = 1e-9  # of a token in log q, as in the precursor's code
LEAST_MASS = 1e-30  # of all tokens: only where every product of features underflows


class Cache(NamedTuple):
    """What softmax attention keeps of L tokens: keys [B, H, L, qk] and values [B, H, L, v]."""

    keys: Tensor
    values: Tensor


class Sums(NamedTuple):
    """What kernelised attention keeps of any number of tokens (arXiv 2006.16236, Section 3.4).

    S = Σ φ(k) ⊗ v [B, H, f, v] and z = Σ φ(k) [B, H, f], both divided by exp(scale), scale [B, H, 1, 1]: the largest
    log feature so far for FAVOR+, whose features may span more than float32 can; 0 for elu.
    """

    S: Tensor
    z: Tensor
    scale: Tensor


class AttentionBlock(nn.Module):
    """A residual block of causal multi-head attention and an MLP, each after a LayerNorm.

    Args:
        width: d. heads: H. head_size: qk. value_size: v. feedforward: hidden units of the MLP.
        feature_map: None for softmax; "elu": φ(x) = x + 1 for x > 0, else e^x (arXiv 2006.16236); "favor": positive
            orthogonal random features of the kernel exp(q·k/√qk) (arXiv 2009.14794, Lemma 1), exp(±ωᵀx − ‖x‖²/2)/√f
            of x = q/qk^¼.
        features: f of "favor", an even number. redraw: streams read in training between two draws of ω; 0: never.
        dropout: after the attention's projection and after the MLP. norm: LayerNorms; the precursor has none.

    Raises:
        UserError: an unknown feature map, or features that do not come in pairs.
    """

    omega: Tensor
    seed: Tensor
    calls: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        head_size: int,
        value_size: int,
        feedforward: int,
        *,
        feature_map: str | None = None,
        features: int = 0,
        redraw: int = 0,
        dropout: float = 0.0,
        norm: bool = True,
    ) -> None:
        super().__init__()
        if feature_map not in (None, "elu", "favor"):
            raise UserError(f"feature map {feature_map!r}: one of elu, favor, or None for softmax")
        self.heads, self.sizes, self.feature_map, self.redraw = heads, (head_size, value_size), feature_map, redraw
        self.attention_norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.qkv = nn.Linear(width, heads * (2 * head_size + value_size))
        self.projection = nn.Linear(heads * value_size, width)
        self.dropout = nn.Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.mlp = nn.Sequential(
            nn.Linear(width, feedforward), nn.GELU(), nn.Linear(feedforward, width), nn.Dropout(dropout)
        )
        if feature_map == "favor":
            if features < 2 or features % 2:
                raise UserError(f"--favor-features is {features}: give an even number, features come in pairs ±ω")
            # ω depends on the seed and the number of draws alone: the same on all processes and after resuming
            self.register_buffer("seed", torch.randint(2**31, ()))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.register_buffer("omega", _orthogonal(head_size, features // 2, int(self.seed)))

    def forward(self, h: Tensor, state: tuple[Tensor, ...] | None = None) -> tuple[Tensor, Cache | Sums, Tensor]:
        """Read tokens of the stream, each after ``state`` and the tokens before it.

        Args:
            h: [B, L, d]. state: of the stream so far; None at its start.

        Returns:
            h [B, L, d], the state with these tokens, and their keys [B, H, L, qk] for :meth:`log_association`.
        """
        if state is None and self.training and self.feature_map == "favor":
            self._count()  # never amid a stream: its sums hold for the ω that they were made with
        queries, keys, values = self._split(h)
        after: Cache | Sums
        if self.feature_map is None:
            attended, after = _softmax_stream(queries, keys, values, state)
        else:
            with torch.autocast(h.device.type, enabled=False):
                attended, after = self._kernel_stream(wide(queries), wide(keys), wide(values), state)
        return self._residual(h, attended), after, keys

    def query(self, h: Tensor, state: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Independent tokens, each as if it alone came after ``state``; the state stays as it is.

        Args:
            h: [B, Q, d].

        Returns:
            h [B, Q, d] and the tokens' queries [B, H, Q, qk] for :meth:`log_association`.
        """
        queries, keys, values = self._split(h)
        if self.feature_map is None:
            attended = _softmax_queries(queries, keys, values, state)
        else:
            with torch.autocast(h.device.type, enabled=False):
                attended = self._kernel_queries(wide(queries), wide(keys), wide(values), state)
        return self._residual(h, attended), queries

    def log_association(self, queries: Tensor, keys: Tensor) -> Tensor:
        """log q: the log-share of each token of the stream in what a query attends to, without its own share.

        Softmax: log softmax_j(q·k_j/√qk). Kernelised: log(φ(q)·φ(k_j) / Σ_j φ(q)·φ(k_j)), at least log 1e-9: a share
        may underflow to 0, whose log has no gradient either; a clamped token has none.

        Args:
            queries: [B, H, Q, qk] of :meth:`query`. keys: [B, H, L, qk] of :meth:`forward`, of one or more calls.

        Returns:
            [B, H, Q, L], float32 or wider.
        """
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = wide(queries), wide(keys)
            if self.feature_map is None:
                return torch.log_softmax(queries @ keys.mT / math.sqrt(queries.shape[-1]), -1)
            weights = self._features(queries, (-1,))[0] @ self._features(keys, (-2, -1))[0].mT
            shares = weights / weights.sum(-1, keepdim=True).clamp(min=LEAST_MASS)
            return shares.clamp(min=LEAST_SHARE).log()

    def _split(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys [B, H, L, qk] and values [B, H, L, v] of tokens [B, L, d]."""
        size, value_size = self.sizes
        qkv = self.qkv(self.attention_norm(h)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        queries, keys, values = qkv.split([size, size, value_size], -1)
        return queries, keys, values

    def _residual(self, h: Tensor, attended: Tensor) -> Tensor:
        attended = attended.transpose(1, 2).flatten(2).to(h.dtype)
        h = h + self.dropout(self.projection(attended))
        return h + self.mlp(self.mlp_norm(h))  # type: ignore[no-any-return]

    def _count(self) -> None:
        calls = int(self.calls)
        if self.redraw and calls and calls % self.redraw == 0:
            rows, columns = self.omega.shape
            omega = _orthogonal(rows, columns, int(self.seed) + calls)
            self.omega = omega.to(self.omega)  # not in place: the graph of an earlier pass may hold the last one
        self.calls += 1

    def _features(self, x: Tensor, over: tuple[int, ...], least: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """φ(x)/exp(scale) [B, H, L, f] of x [B, H, L, qk], and scale: the largest log feature over the dims ``over``.

        A factor that queries share, or all keys, leaves attention as it is. ``least``: scale is at least this.
        """
        if self.feature_map == "elu":
            phi = torch.where(x > 0, x + 1, x.clamp(max=0).exp())
            return phi, torch.zeros_like(x.detach().amax(over, keepdim=True))
        x = x * x.shape[-1] ** -0.25
        projected = x @ self.omega.to(x.dtype)
        offset = (x.square().sum(-1, keepdim=True) + math.log(2 * projected.shape[-1])) / 2
        log_phi = torch.cat([projected - offset, -projected - offset], -1)
        scale = log_phi.detach().amax(over, keepdim=True)
        if least is not None:
            scale = torch.maximum(scale, least)
        return (log_phi - scale).exp(), scale

    def _kernel_stream(self, q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, Sums]:
        """The masked form, quadratic in L; equal to S_t = S_{t−1} + φ(k_t) ⊗ v_t, y_t = φ(q_t)S_t / φ(q_t)·z_t."""
        phi_q, _ = self._features(q, (-1,))
        phi_k, scale = self._features(k, (-2, -1), None if state is None else state[2])
        weights = (phi_q @ phi_k.mT).tril()
        attended, mass = weights @ v, weights.sum(-1, keepdim=True)
        S, z = phi_k.mT @ v, phi_k.sum(-2)
        if state is not None:
            old_S, old_z, old_scale = state
            fade = (old_scale - scale).exp()
            old_S, old_z = old_S * fade, old_z * fade.squeeze(-1)
            attended, mass = attended + phi_q @ old_S, mass + phi_q @ old_z.unsqueeze(-1)
            S, z = S + old_S, z + old_z
        return attended / mass.clamp(min=LEAST_MASS), Sums(S, z, scale)

    def _kernel_queries(self, q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...]) -> Tensor:
        S, z, old_scale = state
        phi_q, _ = self._features(q, (-1,))
        phi_k, scale = self._features(k, (-1,), old_scale)
        fade = (old_scale - scale).exp()
        own = (phi_q * phi_k).sum(-1, keepdim=True)
        attended, mass = phi_q @ S * fade + own * v, phi_q @ z.unsqueeze(-1) * fade + own
        return attended / mass.clamp(min=LEAST_MASS)


def _softmax_stream(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, Cache]:
    past = 0
    if state is not None:
        old_k, old_v = state
        past = old_k.shape[2]
        k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
    seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(past)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen), Cache(k, v)


def _softmax_queries(q: Tensor, k: Tensor, v: Tensor, state: tuple[Tensor, ...]) -> Tensor:
    old_k, old_v = state
    scores = torch.cat([q @ old_k.mT, (q * k).sum(-1, keepdim=True)], -1)
    shares = torch.softmax(scores / math.sqrt(q.shape[-1]), -1)
    return shares[..., :-1].to(old_v.dtype) @ old_v + shares[..., -1:] * v


def wide(x: Tensor) -> Tensor:
    """At least float32: sums over a stream lose small terms in less."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _orthogonal(rows: int, columns: int, seed: int) -> Tensor:
    """ω [rows, columns]: each column N(0, I), orthogonal in groups of ``rows`` (arXiv 2009.14794, Section 2.4)."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // rows)
    directions = torch.linalg.qr(torch.randn(groups, rows, rows, generator=generator)).Q
    directions = directions.transpose(0, 1).flatten(1)[:, :columns]  # signs do not matter: features have ±ω
    lengths = torch.linalg.vector_norm(torch.randn(rows, columns, generator=generator), dim=0)
    return directions * lengths  # type: ignore[no-any-return]
