"""Policies with a memory, and the value function.

A policy is asked in two ways, which give the same distributions: :meth:`Policy.step`, one transition after the other
while episodes run, and :meth:`Policy.forward` on the stored trials while it is trained.
"""

from __future__ import annotations

import abc
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from metazoo.errors import UserError
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from trmrl.config import Config
from trmrl.tfixup import Mode, tfixup_init_

MIN_LOG_STD = math.log(1e-6)


class Sizes(NamedTuple):
    """Of an environment: numbers in an observation, an action, a task."""

    observation: int
    action: int
    task: int = 0

    @property
    def token(self) -> int:
        """Of x_t = [s_t ; a_{t−1} ; r_{t−1} ; d_{t−1}]."""
        return self.observation + self.action + 2


def mlp(sizes: Sequence[int], gain: float = 1.0) -> nn.Sequential:
    """Linear layers with tanh between them: Xavier-uniform, zero biases, ``gain`` on the last."""
    layers: list[nn.Module] = []
    for i, (width, following) in enumerate(itertools.pairwise(sizes)):
        linear = nn.Linear(width, following)
        last = i == len(sizes) - 2
        nn.init.xavier_uniform_(linear.weight, gain=gain if last else 1.0)
        nn.init.zeros_(linear.bias)
        layers += [linear] if last else [linear, nn.Tanh()]
    return nn.Sequential(*layers)


class GaussianHead(nn.Module):
    """A diagonal Gaussian with a mean by an MLP and a learned standard deviation that depends on nothing."""

    def __init__(self, sizes: Sequence[int], gain: float = 1.0, std: float = 1.0, floor: float = MIN_LOG_STD) -> None:
        super().__init__()
        self.mean, self.floor = mlp(sizes, gain), floor
        self.log_std = nn.Parameter(torch.full((sizes[-1],), math.log(std)))

    def forward(self, features: Tensor) -> Normal:
        return Normal(self.mean(features), self.log_std.clamp(min=self.floor).exp(), validate_args=False)


class EncoderLayer(nn.Module):
    """h ← h + MHSA(h); h ← h + W2·ReLU(W1·h): causal, without LayerNorm unless asked for."""

    def __init__(self, d_model: int, heads: int, d_ff: int, norm: str = "none") -> None:
        super().__init__()
        self.heads, self.norm = heads, norm
        self.in_proj = nn.Linear(d_model, 3 * d_model)
        self.out_proj = nn.Linear(d_model, d_model)
        self.linear1, self.linear2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)
        nn.init.zeros_(self.in_proj.bias)
        nn.init.zeros_(self.out_proj.bias)
        self.norm1 = nn.LayerNorm(d_model) if norm != "none" else nn.Identity()
        self.norm2 = nn.LayerNorm(d_model) if norm != "none" else nn.Identity()

    def forward(self, h: Tensor, index: Tensor | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """Refine memories.

        Args:
            h: (n, K, d).
            index: (n,), the place of each row that is wanted [default: all].
            maps: takes the attention weights (n, heads, K or 1, K).

        Returns:
            (n, K, d) or, with ``index``, (n, 1, d).
        """
        seen = self.norm1(h) if self.norm == "pre" else h
        weight, bias = self.in_proj.weight, self.in_proj.bias
        width = h.shape[-1]
        key, value = F.linear(seen, weight[width:], bias[width:]).chunk(2, -1)
        if index is not None:  # only one place is read: nothing else needs a query and a feed-forward part
            place = index[:, None, None].expand(-1, 1, width)
            seen, h = seen.gather(1, place), h.gather(1, place)
        query = F.linear(seen, weight[:width], bias[:width])
        places = torch.arange(key.shape[1], device=h.device)
        last = places[None] if index is None else index[:, None]
        mask = places <= last[..., None]  # (1, K, K) or (n, 1, K): each place sees itself and those before it
        # (n, heads, Q or K, d / heads)
        query, key, value = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (query, key, value))
        mask = mask[:, None]
        if maps is not None:
            scores = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            maps.append(scores.masked_fill(~mask, -math.inf).softmax(-1))
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        h = h + self.out_proj(mixed.transpose(1, 2).flatten(2))
        if self.norm == "post":
            h = self.norm1(h)
        seen = self.norm2(h) if self.norm == "pre" else h
        h = h + self.linear2(F.relu(self.linear1(seen)))
        return self.norm2(h) if self.norm == "post" else h


class Trials(NamedTuple):
    """B trials of E episodes of T steps.

    tokens (B, E, T, D), actions (B, E, T, A), rewards (B, E, T), valid (B, E, T): whether the episode was still going,
    tasks (B, k).
    """

    tokens: Tensor
    actions: Tensor
    rewards: Tensor
    valid: Tensor
    tasks: Tensor

    @property
    def size(self) -> int:
        """Steps of all trials."""
        return self.rewards.numel()

    @property
    def length(self) -> int:
        """Steps of a trial, ΣT."""
        return self.rewards.shape[1] * self.rewards.shape[2]


class Policy(nn.Module, abc.ABC):
    """What PPO trains. Samples are steps, numbered trial by trial, episode by episode."""

    head: GaussianHead
    by_trial = False
    """Whether a gradient step takes whole trials."""

    @abc.abstractmethod
    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        """Begin ``count`` trials."""

    def new_episode(self, so_far: Trials | None = None) -> None:
        """Begin the next episode of each trial; ``so_far`` holds those before it."""

    @abc.abstractmethod
    def memory(self, token: Tensor) -> Tensor:
        """Take the newest tokens (count, D); what the head sees (count, …)."""

    def step(self, token: Tensor) -> Normal:
        """Take the newest tokens (count, D); the distribution of actions (count, A)."""
        return self.head(self.memory(token))

    @torch.no_grad()
    def act(self, token: Tensor, deterministic: bool = False) -> Tensor:
        """Take the newest token(s), (D,) or (count, D), of :class:`trmrl.env.RL2Wrapper`; actions likewise."""
        found = self.step(token.reshape(-1, token.shape[-1]).float())
        action = found.mean if deterministic else found.sample()
        return action.reshape(*token.shape[:-1], -1)

    @abc.abstractmethod
    def features(self, trials: Trials, index: Tensor) -> Tensor:
        """What the head sees at samples ``index`` (M,): (M, …)."""

    def forward(self, trials: Trials, index: Tensor) -> Normal:
        """The distributions at samples ``index`` (M,): (M, A)."""
        return self.head(self.features(trials, index))


class TrMRLPolicy(Policy, PyTorchModelHubMixin, library_name="trmrl"):
    """A causal transformer over the last K transitions, and a Gaussian head on its newest output.

    Args:
        observation_size, action_size, task_size: of the environment; with a task size the task is seen (oracle).
        window: K.
        d_model, heads, layers, d_ff: of the encoder.
        norm, init, readout, carry_memory, mask_reward, mask_action, head_hidden, output_gain, init_std: see
            :class:`trmrl.config.Config`.
    """

    def __init__(
        self, observation_size: int, action_size: int, task_size: int = 0, window: int = 5, d_model: int = 128,
        heads: int = 16, layers: int = 4, d_ff: int = 512, norm: str = "none", init: Mode = "tfixup",
        readout: str = "latest", carry_memory: bool = False, mask_reward: bool = False, mask_action: bool = False,
        head_hidden: Sequence[int] = (64, 64), output_gain: float = 1.0, init_std: float = 0.5,
    ) -> None:  # fmt: skip
        super().__init__()
        if d_model % heads or d_model % 2:
            raise UserError(f"d_model is {d_model}: give an even multiple of heads ({heads})")
        if window < 1:
            raise UserError(f"window is {window}: give 1 or more")
        self.sizes = Sizes(observation_size, action_size, task_size)
        self.window, self.readout, self.carry_memory = window, readout, carry_memory
        self.embedding = nn.Linear(self.sizes.token + task_size, d_model, bias=False)
        self.encoder = nn.ModuleList(EncoderLayer(d_model, heads, d_ff, norm) for _ in range(layers))
        tfixup_init_(self.encoder, self.embedding, layers, init)
        self.register_buffer("positions", sinusoids(window, d_model), persistent=False)
        shown = torch.ones(self.sizes.token + task_size)
        if mask_action:
            shown[observation_size : observation_size + action_size] = 0
        if mask_reward:
            shown[observation_size + action_size] = 0
        if mask_action and mask_reward:
            shown[observation_size + action_size + 1] = 0
        self.register_buffer("shown", shown, persistent=False)
        width = {"latest": d_model, "mixed": 2 * d_model, "full": window * d_model}[readout]
        self.head = GaussianHead([width, *head_hidden, action_size], output_gain, init_std)
        self._window, self._tasks = torch.zeros(1, window, 0), torch.zeros(1, task_size)
        self._length, self._lengths = 0, torch.zeros(1, dtype=torch.long)  # the longest, and each trial's own
        self.reset()

    # ---- the encoder

    def encode(self, window: Tensor, length: Tensor | None = None, maps: list[Tensor] | None = None) -> Tensor:
        """Episodic memories of windows.

        Args:
            window: (n, K' ≤ K, D), the oldest first; rows from ``length`` on are not looked at.
            length: (n,), how many rows hold transitions [default: all].
            maps: takes the attention weights (n, heads, K' or 1, K') of each layer.

        Returns:
            What the head sees: (n, d) latest, (n, 2d) mixed, (n, Kd) full (zeros after the newest).
        """
        count, rows = window.shape[:2]
        embedded = self.embedding(window * self.shown)
        h = embedded + self.positions[:rows]
        if length is None:
            length = window.new_full((count,), rows, dtype=torch.long)
        index = length - 1
        for i, layer in enumerate(self.encoder):
            last = i == len(self.encoder) - 1 and self.readout != "full"
            h = layer(h, index if last else None, maps)
        if self.readout == "full":
            h = h * (torch.arange(rows, device=h.device) < length[:, None])[..., None]
            return F.pad(h, (0, 0, 0, self.window - rows)).flatten(1)
        newest = h[:, 0]
        if self.readout == "mixed":
            row = embedded.gather(1, index[:, None, None].expand(-1, 1, embedded.shape[-1]))[:, 0]
            return torch.cat([row, newest], -1)
        return newest

    # ---- one transition after the other

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        device = self.embedding.weight.device
        self._window = torch.zeros(count, self.window, self.embedding.in_features, device=device)
        self._length, self._lengths = 0, torch.zeros(count, dtype=torch.long, device=device)
        self._tasks = torch.zeros(count, self.sizes.task, device=device)
        if self.sizes.task and tasks is not None:
            self._tasks = tasks.to(device, torch.float32)

    def new_episode(self, so_far: Trials | None = None) -> None:
        if not self.carry_memory:
            self._length = 0

    def memory(self, token: Tensor, maps: list[Tensor] | None = None) -> Tensor:
        check_count(token, len(self._window))
        ended = over(token)
        token = torch.cat([token, self._tasks], -1) if self.sizes.task else token
        if self.carry_memory:
            # each trial has a length of its own, as what comes after an episode's end is not taken in
            ended = ended & (self._lengths > 0)
            full = (self._lengths == self.window) & ~ended
            self._window = torch.where(full[:, None, None], self._window.roll(-1, 1), self._window)
            self._lengths = (self._lengths + ~ended).clamp(max=self.window)
            newest = torch.arange(self.window, device=token.device) == self._lengths[:, None] - 1
            self._window = torch.where((newest & ~ended[:, None])[..., None], token[:, None], self._window)
            return self.encode(self._window, self._lengths, maps)
        if self._length == self.window:
            self._window = torch.cat([self._window[:, 1:], token[:, None]], 1)
        else:
            self._window[:, self._length] = token
            self._length += 1
        return self.encode(self._window[:, : self._length], maps=maps)

    # ---- stored trials

    def windows(self, trials: Trials, index: Tensor) -> tuple[Tensor, Tensor]:
        """Windows (M, K, D) at samples ``index`` and their lengths (M,), cut from the trials as they are needed."""
        span = trials.length if self.carry_memory else trials.rewards.shape[2]
        tokens = trials.tokens.reshape(-1, span, trials.tokens.shape[-1])
        row, t = index // span, index % span
        if self.carry_memory:  # places are counted among what is valid
            valid = trials.valid.flatten(1)
            t = (valid.cumsum(1) - 1)[row, t]
        first = (t - self.window + 1).clamp(min=0)
        width = min(self.window, span)
        places = (first[:, None] + torch.arange(width, device=index.device)).clamp(max=span - 1)
        if self.carry_memory:
            places = (~valid).byte().argsort(dim=1, stable=True)[row[:, None], places]
        found = tokens[row[:, None], places]
        if self.sizes.task:
            tasks = trials.tasks[index // trials.length].to(found.dtype)
            found = torch.cat([found, tasks[:, None].expand(-1, width, -1)], -1)
        return found, (t + 1).clamp(max=self.window)

    def features(self, trials: Trials, index: Tensor) -> Tensor:
        return self.encode(*self.windows(trials, index))

    # ---- files

    @classmethod
    def load(cls, source: str | Path) -> TrMRLPolicy:
        """A saved policy from a folder, or by its hub id.

        Raises:
            UserError: there is none, or its files are broken.
        """
        try:
            return cls.from_pretrained(str(source))
        except (
            OSError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            SafetensorError,
            TypeError,
        ) as error:
            raise UserError(
                f"{source} is no saved policy (a folder with config.json and model.safetensors, or a hub id): "
                f"{' '.join(str(error).split())[:200]}"
            ) from error


def sinusoids(length: int, width: int) -> Tensor:
    """Positions (length, width): sines on even places, cosines on odd ones."""
    place = torch.arange(length, dtype=torch.float32)[:, None]
    rate = torch.exp(torch.arange(0, width, 2, dtype=torch.float32) * (-math.log(10_000.0) / width))
    found = torch.zeros(length, width)
    found[:, 0::2], found[:, 1::2] = torch.sin(place * rate), torch.cos(place * rate)
    return found


class RL2Policy(Policy):
    """RL²: a GRU over the whole trial, whose state lives on from one episode to the next."""

    by_trial = True

    def __init__(
        self, sizes: Sizes, width: int, head_hidden: Sequence[int] = (64, 64), output_gain: float = 1.0,
        init_std: float = 0.5, mask_reward: bool = False, mask_action: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.sizes = sizes
        self.gru = nn.GRU(sizes.token, width, batch_first=True)
        self.head = GaussianHead([width, *head_hidden, sizes.action], output_gain, init_std)
        shown = torch.ones(sizes.token)
        if mask_action:
            shown[sizes.observation : sizes.observation + sizes.action] = 0
        if mask_reward:
            shown[sizes.observation + sizes.action] = 0
        if mask_action and mask_reward:
            shown[sizes.observation + sizes.action + 1] = 0
        self.register_buffer("shown", shown, persistent=False)
        self._state: Tensor | None = None

    def reset(self, count: int = 1, tasks: Tensor | None = None) -> None:
        self._state = torch.zeros(1, count, self.gru.hidden_size, device=self.shown.device)

    def memory(self, token: Tensor) -> Tensor:
        if self._state is None:
            self.reset(len(token))
        assert self._state is not None
        check_count(token, self._state.shape[1])
        new = self.gru((token * self.shown)[:, None], self._state)[1]
        self._state = torch.where(over(token)[:, None], self._state, new)
        return self._state[0]

    def features(self, trials: Trials, index: Tensor) -> Tensor:
        """``index`` holds whole trials, one after the other."""
        rows = index[:: trials.length] // trials.length
        tokens, valid = trials.tokens[rows].flatten(1, 2), trials.valid[rows].flatten(1)
        return while_going(lambda seen: self.gru(seen * self.shown)[0], tokens, valid).flatten(0, 1)


def over(token: Tensor) -> Tensor:
    """Whether the episodes of tokens (…, D) have ended: d_{t−1} is 1 from there on, and 0 in the next episode.

    Memories that outlive an episode take nothing in until then.
    """
    return token[..., -1] > 0


def while_going(function: Callable[[Tensor], Tensor], tokens: Tensor, valid: Tensor) -> Tensor:
    """A recurrent function of the tokens of trials (n, L, D) that are valid (n, L): (n, L, …).

    At steps after an episode's end it is what it was at the last step before.
    """
    if valid.all():
        return function(tokens)
    order = (~valid).byte().argsort(dim=1, stable=True)  # what is valid comes first, in its order
    found = function(tokens.gather(1, order[..., None].expand_as(tokens)))
    place = valid.cumsum(1) - 1
    return found.gather(1, place[..., None].expand(-1, -1, found.shape[-1]))


def check_count(token: Tensor, count: int) -> None:
    """A policy acts in as many trials as it began.

    Raises:
        UserError: there are other ones.
    """
    if len(token) != count:
        raise UserError(f"{len(token)} tokens for {count} trials: call reset({len(token)}) first")


class Value(nn.Module):
    """A Gaussian over the discounted return, by an MLP and one learned standard deviation."""

    def __init__(self, size: int, hidden: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        self.head = GaussianHead([size, *hidden, 1], floor=-math.inf)

    def forward(self, features: Tensor) -> Normal:
        """(M, size) → a Normal (M,)."""
        found = self.head(features)
        return Normal(found.mean[..., 0], found.stddev[..., 0], validate_args=False)


def policy_of(config: Config, sizes: Sizes) -> Policy:
    """The untrained policy of a config."""
    more: dict[str, Any] = {
        "head_hidden": list(config.head_hidden), "output_gain": config.output_gain, "init_std": config.init_std,
    }  # fmt: skip
    if config.algo == "rl2":
        return RL2Policy(sizes, config.d_model, mask_reward=config.mask_reward, mask_action=config.mask_action, **more)
    if config.algo == "varibad":
        from trmrl.varibad import VariBADPolicy

        return VariBADPolicy(sizes, config)
    blind = config.algo in ("ppo", "oracle")
    return TrMRLPolicy(
        sizes.observation, sizes.action, sizes.task if config.algo == "oracle" else 0,
        window=1 if blind else config.window, d_model=config.d_model, heads=config.heads, layers=config.layers,
        d_ff=config.d_ff, norm=config.norm, init=config.init, readout="latest" if blind else config.readout,
        carry_memory=config.carry_memory, mask_reward=blind or config.mask_reward,
        mask_action=blind or config.mask_action, **more,
    )  # fmt: skip
