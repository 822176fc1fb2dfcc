"""What the method says in numbers: sizes, initialisation, causality, PPO and GAE, and what is possible by reference."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from metazoo.errors import UserError
from torch import Tensor, nn
from trmrl import ppo
from trmrl.bayes import consensus, consensus_risk, minimum_bayes_risk, risk
from trmrl.config import Config
from trmrl.env import PointRobotEnv
from trmrl.model import (
    EncoderLayer,
    GaussianHead,
    Policy,
    RL2Policy,
    Sizes,
    Trials,
    TrMRLPolicy,
    Value,
    policy_of,
    sinusoids,
)
from trmrl.ppo import PPOLearner, clipped_surrogate, discounted_sums, gae, log_prob, rate, returns_and_advantages
from trmrl.references import GOALS, goals, memoryless_return, oracle_return, score
from trmrl.tfixup import tfixup_init_

torch.set_num_threads(1)
SIZES = Sizes(3, 2, 1)
TINY: dict[str, Any] = {"d_model": 8, "heads": 2, "layers": 2, "d_ff": 16, "head_hidden": (8,)}
READOUTS = pytest.mark.parametrize("readout", ["latest", "mixed", "full"])


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def tiny(**changes: Any) -> TrMRLPolicy:
    """A small policy whose biases are not zero."""
    policy = TrMRLPolicy(SIZES.observation, SIZES.action, **(TINY | {"window": 4} | changes))
    for name, value in policy.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(value, 0, 0.3)
    return policy


def trials_of(batch: int = 3, episodes: int = 2, steps: int = 7, seed: int = 0) -> Trials:
    generator = torch.Generator().manual_seed(seed)
    shape = batch, episodes, steps

    def normal(*more: int) -> Tensor:
        return torch.randn(*shape, *more, generator=generator)

    tasks, tokens = torch.randn(batch, SIZES.task, generator=generator), normal(SIZES.token)
    tokens[..., -1] = 0  # no episode ends early
    return Trials(tokens, normal(SIZES.action), normal(), torch.ones(shape, dtype=torch.bool), tasks)


def with_early_ends(trials: Trials) -> Trials:
    """The first trial's first episode ends after 2 steps, the second one's second after 3."""
    valid, tokens = trials.valid.clone(), trials.tokens.clone()
    valid[0, 0, 2:] = valid[1, 1, 3:] = False
    tokens[..., -1] = (~valid).float()
    return trials._replace(tokens=tokens, valid=valid)


def stepped(policy: Policy, trials: Trials) -> Tensor:
    """Mean actions (B E T, A), asked for one token after the other."""
    count, episodes, steps = trials.rewards.shape
    policy.reset(count, trials.tasks)
    found = []
    for episode in range(episodes):
        if episode:
            policy.new_episode()
        found += [policy.step(trials.tokens[:, episode, t]).mean for t in range(steps)]
    return torch.stack(found, 1).flatten(0, 1)


def learner_of(**changes: Any) -> PPOLearner:
    config = Config(**(TINY | {"tasks": 4, "horizon": 5, "episodes": 2, "passes": 2, "minibatch": 16} | changes))
    return PPOLearner(config, Accelerator(cpu=True))


# ---- sizes and initialisation


@pytest.mark.parametrize(
    ("observation", "action", "sizes", "count"),
    [(20, 6, {}, 807_436), (27, 8, {}, 808_720), (39, 4, {"d_model": 32, "heads": 4, "d_ff": 128}, 58_280)],
)
def test_parameter_counts(observation: int, action: int, sizes: dict[str, int], count: int) -> None:
    policy = TrMRLPolicy(observation, action, **sizes)
    assert sum(value.numel() for value in policy.parameters() if value.requires_grad) == count


def initialised(mode: Any, inputs: int = 1000) -> tuple[nn.ModuleList, nn.Linear]:
    encoder = nn.ModuleList(EncoderLayer(128, 16, 512) for _ in range(4))
    embedding = nn.Linear(inputs, 128, bias=False)
    tfixup_init_(encoder, embedding, 4, mode, torch.Generator().manual_seed(1))
    return encoder, embedding


def spread(values: Any) -> float:
    return float(torch.cat([value.reshape(-1) for value in values]).std())


def test_tfixup_standard_deviations() -> None:
    encoder, embedding = initialised("tfixup")
    assert spread([embedding.weight]) == pytest.approx(0.03608, rel=0.01)
    for part in range(3):
        parts = [layer.in_proj.weight.chunk(3)[part] for layer in encoder]
        assert spread(parts) == pytest.approx(0.04188, rel=0.01)
    assert spread([layer.out_proj.weight for layer in encoder]) == pytest.approx(0.04188, rel=0.01)
    for name in ("linear1", "linear2"):
        assert spread([getattr(layer, name).weight for layer in encoder]) == pytest.approx(0.02648, rel=0.01)


def test_tfixup_scales_xavier() -> None:
    """The same draws, scaled: 0.67 N^(−1/4), and √2 of it where queries, keys and values are fused."""
    plain, scaled = initialised("xavier")[0], initialised("tfixup")[0]
    for before, after in zip(plain, scaled, strict=True):
        for name in ("out_proj", "linear1", "linear2"):
            old, new = getattr(before, name).weight, getattr(after, name).weight
            torch.testing.assert_close(new, old * 0.47376, rtol=2e-5, atol=0)
        torch.testing.assert_close(after.in_proj.weight, before.in_proj.weight * 0.67, rtol=1e-5, atol=0)


def test_tfixup_original() -> None:
    plain, scaled = initialised("xavier")[0], initialised("tfixup-original")[0]
    for before, after in zip(plain, scaled, strict=True):
        assert torch.equal(after.in_proj.weight[:256], before.in_proj.weight[:256])
    queries_keys = [layer.in_proj.weight[:256] for layer in scaled]
    assert spread(queries_keys) ** 2 == pytest.approx(1 / (2 * 128), rel=0.01)
    assert spread([layer.in_proj.weight[256:] for layer in scaled]) == pytest.approx(0.04188, rel=0.01)


def test_initialisation_leaves_biases_and_xavier_the_embedding() -> None:
    encoder = nn.ModuleList([EncoderLayer(8, 2, 16)])
    embedding = nn.Linear(5, 8, bias=False)
    biases = [value.clone() for name, value in encoder.named_parameters() if name.endswith("bias")]
    before = embedding.weight.clone()
    tfixup_init_(encoder, embedding, 1, "xavier")
    assert torch.equal(embedding.weight, before)
    tfixup_init_(encoder, embedding, 1)
    assert not torch.equal(embedding.weight, before)
    after = [value for name, value in encoder.named_parameters() if name.endswith("bias")]
    assert all(map(torch.equal, biases, after))


def test_sinusoids() -> None:
    found = sinusoids(4, 4)
    rows = [[math.sin(t), math.cos(t), math.sin(t / 100), math.cos(t / 100)] for t in range(4)]
    torch.testing.assert_close(found, torch.tensor(rows))


# ---- the encoder


def full_memories(policy: TrMRLPolicy, window: Tensor) -> Tensor:
    """All outputs (n, K, d) of all layers, without shortcuts."""
    h = policy.embedding(window) + policy.positions[: window.shape[1]]
    for layer in policy.encoder:
        h = layer(h)
    return h


def test_causality() -> None:
    policy = tiny(window=5)
    window = torch.randn(2, 5, SIZES.token)
    before = full_memories(policy, window)
    for j in range(5):
        changed = window.clone()
        changed[:, j] += 3.0
        after = full_memories(policy, changed)
        torch.testing.assert_close(after[:, :j], before[:, :j], rtol=0, atol=1e-6)
        assert ((after - before)[:, j:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("norm", ["none", "post", "pre"])
def test_shortcut_of_the_last_layer(norm: str) -> None:
    policy = tiny(window=5, norm=norm)
    window, length = torch.randn(5, 5, SIZES.token), torch.arange(1, 6)
    wanted = full_memories(policy, window)[torch.arange(5), length - 1]
    torch.testing.assert_close(policy.encode(window, length), wanted, rtol=1e-5, atol=1e-6)


@READOUTS
def test_rows_beyond_the_length(readout: str) -> None:
    policy = tiny(window=5, readout=readout)
    window = torch.randn(3, 5, SIZES.token)
    for length in range(1, 6):
        lengths = torch.full((3,), length)
        short = policy.encode(window[:, :length])
        for tail in (0.0, 1.0, 100.0):
            filled = window.clone()
            filled[:, length:] = tail * torch.randn(3, 5 - length, SIZES.token)
            torch.testing.assert_close(policy.encode(filled, lengths), short, rtol=1e-5, atol=1e-6)


def test_readouts() -> None:
    latest = tiny(window=5)
    mixed, full = tiny(window=5, readout="mixed"), tiny(window=5, readout="full")
    for other in (mixed, full):
        other.embedding.load_state_dict(latest.embedding.state_dict())
        other.encoder.load_state_dict(latest.encoder.state_dict())
    window, length = torch.randn(2, 5, SIZES.token), torch.tensor([3, 5])
    newest = latest.encode(window, length)
    embedded = latest.embedding(window)[torch.arange(2), length - 1]
    torch.testing.assert_close(mixed.encode(window, length), torch.cat([embedded, newest], -1))
    memories = full_memories(latest, window)
    memories[0, 3:] = 0
    torch.testing.assert_close(full.encode(window, length), memories.flatten(1))


def test_genuine_zero_token_is_no_padding() -> None:
    policy = tiny(window=3)
    window = torch.randn(1, 3, SIZES.token)
    window[:, 2] = 0
    assert not torch.allclose(policy.encode(window), policy.encode(window[:, :2]), atol=1e-4)


def test_layer_is_multihead_attention() -> None:
    layer, attention = EncoderLayer(8, 2, 16), nn.MultiheadAttention(8, 2, batch_first=True)
    nn.init.normal_(layer.in_proj.bias)
    nn.init.normal_(layer.out_proj.bias)
    attention.in_proj_weight.copy_(layer.in_proj.weight)
    attention.in_proj_bias.copy_(layer.in_proj.bias)
    attention.out_proj.load_state_dict(layer.out_proj.state_dict())
    h = torch.randn(3, 5, 8)
    unseen = torch.ones(5, 5, dtype=torch.bool).triu(1)
    mixed, weights = attention(h, h, h, attn_mask=unseen, average_attn_weights=False)
    wanted = h + mixed
    wanted = wanted + layer.linear2(layer.linear1(wanted).relu())
    maps: list[Tensor] = []
    torch.testing.assert_close(layer(h, maps=maps), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(maps[0], weights, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_layer_with_norm_is_torchs(norm: str) -> None:
    layer = EncoderLayer(8, 2, 16, norm)
    for value in layer.parameters():
        if value.ndim == 1:
            nn.init.normal_(value)
    theirs = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=norm == "pre")
    names = {"in_proj.weight": "self_attn.in_proj_weight", "in_proj.bias": "self_attn.in_proj_bias"}
    state = {
        names.get(name, f"self_attn.{name}" if name.startswith("out_proj") else name): value
        for name, value in layer.state_dict().items()
    }
    theirs.load_state_dict(state)
    h = torch.randn(3, 5, 8)
    unseen = torch.ones(5, 5, dtype=torch.bool).triu(1)
    torch.testing.assert_close(layer(h), theirs(h, src_mask=unseen), rtol=1e-5, atol=1e-5)


def test_window_of_one_is_an_mlp() -> None:
    policy = tiny(window=1)
    token = torch.randn(6, SIZES.token)
    h = policy.embedding(token) + torch.tensor([0.0, 1.0] * 4)  # the first position: sin 0, cos 0
    for layer in policy.encoder:
        value = nn.functional.linear(h, layer.in_proj.weight[16:], layer.in_proj.bias[16:])
        h = h + layer.out_proj(value)
        h = h + layer.linear2(layer.linear1(h).relu())
    maps: list[Tensor] = []
    found = policy.encode(token[:, None], maps=maps)
    torch.testing.assert_close(found, h, rtol=1e-5, atol=1e-6)
    assert all((weights == 1).all() for weights in maps)
    for layer in policy.encoder:
        layer.in_proj.weight[:16] += torch.randn(16, 8)
        layer.in_proj.bias[:16] += torch.randn(16)
    torch.testing.assert_close(policy.encode(token[:, None]), found, rtol=0, atol=1e-6)


@READOUTS
def test_attention_maps(readout: str) -> None:
    policy = tiny(window=5, readout=readout)
    maps: list[Tensor] = []
    length = torch.tensor([1, 3, 5])
    policy.encode(torch.randn(3, 5, SIZES.token), length, maps)
    assert [tuple(weights.shape) for weights in maps] == [(3, 2, 5, 5), (3, 2, 5 if readout == "full" else 1, 5)]
    for weights in maps:
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert (weights >= 0).all()
        if weights.shape[2] == 5:
            assert (weights.triu(1) == 0).all()
        else:
            for row, last in zip(weights, length, strict=True):
                assert (row[..., last:] == 0).all()
                assert (row[..., :last] > 0).all()


# ---- one token after the other, and stored trials


@READOUTS
@pytest.mark.parametrize("window", [1, 4, 9, 16])
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize("task_size", [0, 1])
def test_steps_are_the_stored_samples(readout: str, window: int, carry: bool, task_size: int) -> None:
    policy = tiny(window=window, readout=readout, carry_memory=carry, task_size=task_size)
    trials = trials_of()
    stored = policy(trials, torch.arange(trials.size))
    torch.testing.assert_close(stepped(policy, trials), stored.mean, rtol=1e-5, atol=1e-5)
    some = torch.tensor([40, 0, 13, 13, 7])
    torch.testing.assert_close(policy(trials, some).mean, stored.mean[some], rtol=1e-5, atol=1e-5)


def test_rl2_steps_are_the_stored_samples() -> None:
    policy, trials = RL2Policy(SIZES, 8), trials_of()
    stored = policy(trials, torch.arange(trials.size)).mean
    torch.testing.assert_close(stepped(policy, trials), stored, rtol=1e-5, atol=1e-5)
    whole = torch.cat([torch.arange(28, 42), torch.arange(14)])  # trials 2 and 0
    torch.testing.assert_close(policy(trials, whole).mean, stored[whole], rtol=1e-5, atol=1e-5)


def test_second_episode_begins_as_the_first() -> None:
    tokens = torch.randn(6, 2, SIZES.token)
    tokens[..., -1] = 0
    for policy, same in ((tiny(), True), (tiny(carry_memory=True), False), (RL2Policy(SIZES, 8), False)):
        policy.reset(2)
        first = policy.step(tokens[0]).mean
        for token in tokens[1:]:
            policy.step(token)
        policy.new_episode()
        assert torch.equal(policy.step(tokens[0]).mean, first) == same
        policy.reset(2)
        assert torch.equal(policy.step(tokens[0]).mean, first)


@pytest.mark.parametrize(
    ("algo", "changes"),
    [("trmrl", {"carry_memory": True}), ("trmrl", {"carry_memory": True, "window": 12}), ("rl2", {}), ("varibad", {})],
)
def test_memories_stand_still_after_an_early_end(algo: Any, changes: dict[str, Any]) -> None:
    """Acting and stored trials agree, and what comes after an episode's end changes nothing that follows."""
    policy, trials = policy_of(Config(algo=algo, **(TINY | changes)), SIZES), with_early_ends(trials_of())
    every = torch.arange(trials.size)
    found = policy(trials, every).mean
    going = trials.valid.reshape(-1)
    torch.testing.assert_close(stepped(policy, trials).reshape(len(every), -1)[going], found[going])
    tokens = trials.tokens.clone()
    tokens[~trials.valid] = 9.0
    other = policy(trials._replace(tokens=tokens), every).mean
    assert torch.equal(other[going], found[going])
    alone = with_early_ends(trials_of(seed=1))  # an episode that ended counts as it would if it were no longer
    short = [alone.tokens[0, 0, :2], *alone.tokens[0, 1]]
    policy.reset(1)
    seen = []
    for i, token in enumerate([*short[0], *short[1:]]):
        if i == 2:
            policy.new_episode()
        seen.append(policy.step(token[None]).mean[0])
    wanted = policy(alone, torch.arange(alone.length)).mean[alone.valid[0].reshape(-1)]
    torch.testing.assert_close(torch.stack(seen), wanted)


@pytest.mark.parametrize("algo", ["trmrl", "rl2", "varibad"])
def test_as_many_tokens_as_trials(algo: Any) -> None:
    policy = policy_of(Config(algo=algo, **TINY), SIZES)
    policy.reset(2)
    with pytest.raises(UserError, match=r"3 tokens for 2 trials: call reset\(3\) first"):
        policy.act(torch.zeros(3, SIZES.token))


@settings(max_examples=25, deadline=None, database=None)
@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(1, 8), st.booleans(), st.integers(0, 99))
def test_windows_by_hand(batch: int, episodes: int, steps: int, window: int, carry: bool, seed: int) -> None:
    policy = TrMRLPolicy(SIZES.observation, SIZES.action, **(TINY | {"window": window, "carry_memory": carry}))
    trials = trials_of(batch, episodes, steps, seed)
    order = torch.randperm(trials.size, generator=torch.Generator().manual_seed(seed))
    found, lengths = policy.windows(trials, order)
    for i, sample in enumerate(order.tolist()):
        b, rest = divmod(sample, episodes * steps)
        e, t = divmod(rest, steps)
        rows = [trials.tokens[b, e, k] for k in range(t + 1)]
        if carry:
            rows = [trials.tokens[b, before, k] for before in range(e) for k in range(steps)] + rows
        wanted = torch.stack(rows[-window:])
        assert lengths[i] == len(wanted)
        assert torch.equal(found[i, : len(wanted)], wanted)


# ---- what policies do not see


def changed_tokens(trials: Trials, *entries: int) -> Trials:
    tokens = trials.tokens.clone()
    tokens[..., list(entries)] += 5.0
    return trials._replace(tokens=tokens)


ACTION, REWARD, DONE = (3, 4), 5, 6


@pytest.mark.parametrize("algo", ["trmrl", "rl2"])
def test_masked_entries(algo: Any) -> None:
    trials = trials_of()
    every = torch.arange(trials.size)
    for masks, hidden, seen in (
        ({"mask_reward": True}, (REWARD,), ACTION),
        ({"mask_action": True}, ACTION, (REWARD,)),
        ({}, (), (*ACTION, REWARD)),
    ):
        policy = policy_of(Config(algo=algo, **(TINY | masks)), SIZES)
        before = policy(trials, every).mean
        assert torch.equal(policy(changed_tokens(trials, *hidden), every).mean, before)
        for entry in seen:
            assert not torch.allclose(policy(changed_tokens(trials, entry), every).mean, before)


@pytest.mark.parametrize("algo", ["ppo", "oracle"])
def test_memoryless_policies(algo: Any) -> None:
    policy, trials = policy_of(Config(algo=algo, **TINY), SIZES), trials_of()
    every = torch.arange(trials.size)
    before = policy(trials, every).mean
    assert torch.equal(policy(changed_tokens(trials, *ACTION, REWARD, DONE), every).mean, before)
    assert not torch.allclose(policy(changed_tokens(trials, 0), every).mean, before)
    past = trials.tokens.clone()
    past[:, :, :-1] += 5.0  # all but the last of each episode
    after = policy(trials._replace(tokens=past), every).mean
    last = every[every % 7 == 6]
    assert torch.equal(after[last], before[last])
    other = policy(trials._replace(tasks=trials.tasks + 1), every).mean
    assert torch.equal(other, before) == (algo == "ppo")


@pytest.mark.parametrize("algo", ["ppo", "oracle", "trmrl"])
def test_values_see_what_policies_see(algo: Any) -> None:
    learner, sizes = learner_of(algo=algo), Sizes(2, 2, 1)
    trials, _ = learner.collect(0)
    found = learner.value_features(trials, torch.arange(trials.size))
    tokens = trials.tokens.flatten(0, 2)
    if algo == "trmrl":
        assert torch.equal(found, tokens)
        return
    assert torch.equal(found[:, : sizes.observation], tokens[:, : sizes.observation])
    assert (found[:, sizes.observation : sizes.token] == 0).all()
    assert found.shape[1] == sizes.token + (algo == "oracle")
    if algo == "oracle":
        assert torch.equal(found[:, -1].reshape(4, 10), trials.tasks.expand(4, 10))


# ---- Gaussians


def test_gaussian_head() -> None:
    head = GaussianHead([3, 4, 2], std=0.5)
    head.log_std.copy_(torch.tensor([math.log(0.5), math.log(2.0)]))
    seen, action = torch.randn(5, 3), torch.randn(5, 2)
    found = head(seen)
    first, _, last = head.mean
    mean = last(torch.tanh(first(seen)))
    assert torch.equal(found.mean, mean)
    std = torch.tensor([0.5, 2.0])
    wanted = -0.5 * ((action - mean) / std) ** 2 - std.log() - 0.5 * math.log(2 * math.pi)
    torch.testing.assert_close(log_prob(found, action), wanted.sum(-1))
    entropy = 2 * 0.5 * (1 + math.log(2 * math.pi)) + math.log(0.5) + math.log(2.0)
    torch.testing.assert_close(found.entropy().sum(-1), torch.full((5,), entropy))


def test_gaussian_head_begins_as_said() -> None:
    head = GaussianHead([40, 30, 2], gain=0.01, std=0.2)
    first, _, last = head.mean
    assert torch.equal(head(torch.randn(4, 40)).stddev, torch.full((4, 2), math.log(0.2)).exp())
    assert not first.bias.any()
    assert not last.bias.any()
    assert last.weight.abs().max() <= 0.01 * math.sqrt(6 / 32)
    assert 0.9 * math.sqrt(6 / 70) < first.weight.abs().max() <= math.sqrt(6 / 70)
    head.log_std.fill_(-50.0)
    torch.testing.assert_close(head(torch.randn(1, 40)).stddev, torch.full((1, 2), 1e-6))


@torch.enable_grad()
def test_value_gradient() -> None:
    value = Value(3, (4,))
    value.head.log_std.data.fill_(math.log(0.7))
    seen, returns = torch.randn(6, 3), torch.randn(6)
    found = value(seen)
    assert found.mean.shape == (6,)
    (-found.log_prob(returns)).mean().backward()
    error = (returns - found.mean).detach()
    last = value.head.mean[-1]
    torch.testing.assert_close(last.bias.grad, -(error / 0.7**2).mean()[None])
    torch.testing.assert_close(value.head.log_std.grad, (1 - error**2 / 0.7**2).mean()[None])


# ---- PPO


@torch.enable_grad()
def test_ratio_of_the_old_policy() -> None:
    policy, trials = tiny(), trials_of()
    index, advantages = torch.arange(trials.size), torch.randn(trials.size)
    actions = trials.actions.flatten(0, 2)
    parameters = list(policy.parameters())
    log_new = log_prob(policy(trials, index), actions)
    log_old = log_new.detach().clone()
    assert torch.equal((log_new - log_old).exp(), torch.ones(trials.size))
    objective = clipped_surrogate(log_new, log_old, advantages, 0.2)
    assert torch.equal(objective, advantages)
    found = torch.autograd.grad(objective.mean(), parameters)
    plain = torch.autograd.grad((log_prob(policy(trials, index), actions) * advantages).mean(), parameters)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert sum(float(value.abs().sum()) for value in plain) > 0


@torch.enable_grad()
def test_no_clip() -> None:
    log_new, log_old, advantages = (2 * torch.randn(50) for _ in range(3))
    log_new.requires_grad_()
    plain = (log_new - log_old).exp() * advantages
    unclipped = clipped_surrogate(log_new, log_old, advantages, math.inf)
    assert torch.equal(unclipped, plain)
    one, other = (torch.autograd.grad(value.sum(), log_new)[0] for value in (unclipped, plain))
    torch.testing.assert_close(one, other)


@torch.enable_grad()
def test_clip_by_hand() -> None:
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1, 0.9], dtype=torch.float64)
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    log_new = ratio.log().requires_grad_()
    found = clipped_surrogate(log_new, torch.zeros(6, dtype=torch.float64), advantages, 0.2)
    wanted = torch.tensor([2.4, -3.0, 1.0, -1.6, 2.2, -1.8], dtype=torch.float64)
    torch.testing.assert_close(found.detach(), wanted)
    (slope,) = torch.autograd.grad(found.sum(), log_new)  # d(ρA)/d log π = ρA; nothing where the clip holds
    torch.testing.assert_close(slope, torch.tensor([0.0, -3.0, 1.0, 0.0, 2.2, -1.8], dtype=torch.float64))


@torch.enable_grad()
@pytest.mark.parametrize("algo", ["trmrl", "rl2"])
def test_shared_trunk(algo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With advantages of zero the policy's passes do nothing: what changes is the value optimiser's work."""
    true = ppo.returns_and_advantages
    monkeypatch.setattr(
        ppo, "returns_and_advantages", lambda *parts: (true(*parts)[0], np.zeros_like(true(*parts)[1]))
    )  # fmt: skip
    for shared in (False, True):
        learner = learner_of(algo=algo, shared_trunk=shared, weight_decay=0.0)
        before = {name: value.clone() for name, value in learner.policy.state_dict().items()}
        value = {name: part.clone() for name, part in learner.value.state_dict().items()}
        learner.step(0)
        changed = {name for name, part in learner.policy.state_dict().items() if not torch.equal(part, before[name])}
        trunk = {name for name in before if not name.startswith("head.")}
        assert changed == (trunk if shared else set())
        assert all(not torch.equal(part, value[name]) for name, part in learner.value.state_dict().items())
        groups = learner.value_optimizer.param_groups
        owned = {id(part) for group in groups for part in group["params"]}
        assert ({id(part) for name, part in learner.policy.named_parameters() if name in trunk} <= owned) == shared
        assert {id(part) for part in learner.value.parameters()} <= owned


@torch.enable_grad()
def test_value_passes_leave_the_policys_head() -> None:
    """Not even weight decay of the shared optimiser reaches it."""
    learner = learner_of(shared_trunk=True, weight_decay=0.1)
    trials, _ = learner.collect(0)
    before = {name: part.clone() for name, part in learner.policy.head.state_dict().items()}
    learner._train_value(trials, torch.randn(trials.size), 0)
    for name, part in learner.policy.head.state_dict().items():
        assert torch.equal(part, before[name])


@torch.enable_grad()
def test_first_step_is_the_policy_gradient() -> None:
    """One pass of one minibatch: AdamW is given −∇ mean(A log π)."""
    learner = learner_of(passes=1, minibatch=1000, weight_decay=0.0)
    trials, _ = learner.collect(0)
    index, advantages = torch.arange(trials.size), torch.randn(trials.size)
    parameters = list(learner.policy.parameters())
    log_old = log_prob(learner.policy(trials, index), trials.actions.flatten(0, 2))
    wanted = torch.autograd.grad(-(log_old * advantages).mean(), parameters)
    row = learner._train_policy(trials, log_old.detach(), advantages, 0)
    for parameter, slope in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-4, atol=1e-6)
    assert float(row["loss"]) == pytest.approx(-float(advantages.mean()), abs=1e-5)
    assert float(row["clipped"]) == 0.0
    std = learner.policy.head.log_std.detach().exp()
    assert float(row["entropy"]) == pytest.approx(float((0.5 * (2 * math.pi * math.e * std**2).log()).sum()))


@torch.enable_grad()
def test_steps_after_an_end_train_nothing() -> None:
    learner = learner_of(passes=1, minibatch=1000)
    trials, _ = learner.collect(0)
    valid = trials.valid.clone()
    valid[1, 0, 2:] = valid[3, 1, 1:] = False
    index = valid.reshape(-1).nonzero()[:, 0]
    advantages = torch.randn(trials.size)
    advantages[~valid.reshape(-1)] = 1e6
    log_old = log_prob(learner.policy(trials, torch.arange(trials.size)), trials.actions.flatten(0, 2))
    parameters = list(learner.policy.parameters())
    wanted = torch.autograd.grad(-(log_old * advantages)[index].mean(), parameters)
    learner._train_policy(trials._replace(valid=valid), log_old.detach(), advantages, 0)
    for parameter, slope in zip(parameters, wanted, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, slope, rtol=1e-4, atol=1e-6)


@torch.enable_grad()
@pytest.mark.parametrize(("first", "last"), [(2, 6), (0, 3), (1, 2)])
def test_rate_is_the_released_schedule(first: int, last: int) -> None:
    """MultiStepLR stepped after each minibatch, with a milestone at the start of each update from first to last − 1."""
    minibatches, floor = 3, 0.1
    config = Config(decay_from=first, decay_to=last, decay_floor=floor, updates=9)
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    milestones = [update * minibatches for update in range(first, last)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=floor ** (1 / (last - first)))
    for update in range(9):
        for _ in range(minibatches):
            assert optimizer.param_groups[0]["lr"] == pytest.approx(rate(config, update))
            optimizer.step()
            schedule.step()
    assert rate(config, 8) == pytest.approx(floor)


def test_constant_rate() -> None:
    assert [rate(Config(), update) for update in (0, 1, 100)] == [1.0, 1.0, 1.0]


# ---- returns and advantages


def test_gae_by_hand() -> None:
    rewards, values = np.array([1.0, 2.0, -1.0]), np.array([0.5, 1.0, 2.0])
    # δ = 1 + 0.9·1 − 0.5, 2 + 0.9·2 − 1, −1 + 0 − 2; γλ = 0.45
    deltas = 1.4, 2.8, -3.0
    last = deltas[2]
    middle = deltas[1] + 0.45 * last
    wanted = [deltas[0] + 0.45 * middle, middle, last]
    np.testing.assert_allclose(gae(rewards, values, 0.9, 0.5), wanted, rtol=1e-12)
    np.testing.assert_allclose(discounted_sums(rewards, 0.9), [1 + 0.9 * 1.1, 2 - 0.9, -1.0], rtol=1e-12)


def test_gae_at_the_ends_of_lambda() -> None:
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 4, 9))
    returns = discounted_sums(rewards, 0.9)
    np.testing.assert_allclose(gae(rewards, values, 0.9, 1.0), returns - values, rtol=1e-9, atol=1e-12)
    following = np.concatenate([values[:, 1:], np.zeros((4, 1))], 1)
    np.testing.assert_allclose(gae(rewards, values, 0.9, 0.0), rewards + 0.9 * following - values, rtol=1e-12)


def test_trial_is_one_long_episode() -> None:
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 3, 2, 5))
    returns, advantages = returns_and_advantages(rewards, values, np.ones((3, 2, 5), bool), 0.9, 0.8)
    long_rewards, long_values = rewards.reshape(3, 10), values.reshape(3, 10)
    np.testing.assert_allclose(advantages.reshape(3, 10), gae(long_rewards, long_values, 0.9, 0.8), rtol=1e-12)
    np.testing.assert_allclose(returns.reshape(3, 10), discounted_sums(long_rewards, 0.9), rtol=1e-12)
    assert not np.allclose(advantages[:, 0], gae(rewards[:, 0], values[:, 0], 0.9, 0.8))


def slow_gae(rewards: list[float], values: list[float], discount: float, lam: float) -> list[float]:
    """Σ_k (γλ)^k δ_{t+k}, term by term."""
    count, ahead = len(rewards), [*values[1:], 0.0]
    deltas = [rewards[t] + discount * ahead[t] - values[t] for t in range(count)]
    return [sum((discount * lam) ** (k - t) * deltas[k] for k in range(t, count)) for t in range(count)]


NUMBERS = st.floats(-10, 10, allow_nan=False)


@settings(max_examples=25, deadline=None, database=None)
@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=12), st.floats(0, 1), st.floats(0, 1))
def test_gae_is_the_slow_loop(steps: list[tuple[float, float]], discount: float, lam: float) -> None:
    rewards, values = (list(part) for part in zip(*steps, strict=True))
    found = gae(np.array([rewards, values]), np.array([values, rewards]), discount, lam)
    np.testing.assert_allclose(found[0], slow_gae(rewards, values, discount, lam), atol=1e-9)
    np.testing.assert_allclose(found[1], slow_gae(values, rewards, discount, lam), atol=1e-9)


@settings(max_examples=25, deadline=None, database=None)
@given(st.lists(st.lists(st.integers(1, 5), min_size=2, max_size=2), min_size=1, max_size=3), st.integers(0, 99))
def test_steps_after_an_end_are_cut_out(ends: list[list[int]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    rewards, values = rng.normal(size=(2, len(ends), 2, 5))
    valid = np.arange(5) < np.array(ends)[..., None]
    returns, advantages = returns_and_advantages(rewards, values, valid, 0.9, 0.8)
    for b in range(len(ends)):
        places = [(e, t) for e in range(2) for t in range(ends[b][e])]
        cut_rewards, cut_values = ([float(part[b][place]) for place in places] for part in (rewards, values))
        wanted = slow_gae(cut_rewards, cut_values, 0.9, 0.8)
        sums = slow_gae(cut_rewards, [0.0] * len(places), 0.9, 1.0)
        np.testing.assert_allclose([advantages[b][place] for place in places], wanted, atol=1e-9)
        np.testing.assert_allclose([returns[b][place] for place in places], sums, atol=1e-9)
    assert not returns[~valid].any()
    assert not advantages[~valid].any()


def test_numbers_after_an_end_do_not_count() -> None:
    valid = np.array([[[True, False, False], [True, True, True]]])
    rewards, values = np.ones((1, 2, 3)), np.ones((1, 2, 3))
    clean = returns_and_advantages(rewards, values, valid, 0.9, 0.8)
    values[~valid] = rewards[~valid] = np.nan
    for one, other in zip(clean, returns_and_advantages(rewards, values, valid, 0.9, 0.8), strict=True):
        assert np.array_equal(one, other)


# ---- minimum Bayes risk


def test_consensus_is_at_most_the_minimum_bayes_risk() -> None:
    memories = nn.functional.normalize(torch.randn(2000, 7, 16, dtype=torch.float64), dim=-1)
    weights = torch.rand(2000, 7, dtype=torch.float64)
    weights /= weights.sum(-1, keepdim=True)
    found = consensus_risk(weights, memories)
    torch.testing.assert_close(found, risk(consensus(weights, memories), weights, memories))
    by_hand = -torch.stack([(weights[:, i, None] * memories[:, i]) for i in range(7)]).sum(0).square().sum(-1).sqrt()
    torch.testing.assert_close(found, by_hand)
    least = minimum_bayes_risk(weights, memories)
    each = torch.stack([risk(memories[:, j], weights, memories) for j in range(7)])
    torch.testing.assert_close(least, each.amin(0))
    assert (found < least).all()


def test_certain_memory() -> None:
    memories = nn.functional.normalize(torch.randn(5, 16, dtype=torch.float64), dim=-1)
    for weights in torch.eye(5, dtype=torch.float64):
        assert float(consensus_risk(weights, memories)) == pytest.approx(-1.0)
        assert float(minimum_bayes_risk(weights, memories)) == pytest.approx(-1.0)


# ---- the point robot's references


def walked(target_of: Any) -> float:
    """Mean return of 64 episodes of the environment itself, walking towards a target."""
    env, total = PointRobotEnv(), 0.0
    for angle in goals():
        env.set_task(angle)
        place, _ = env.reset()
        for _ in range(20):
            place, reward, *_ = env.step((target_of(float(angle[0])) - place) / 0.1)
            total += reward
    return total / GOALS


def test_references() -> None:
    assert oracle_return() == pytest.approx(-3.85, abs=0.02)
    assert memoryless_return() == pytest.approx(-15.07, abs=0.02)
    assert walked(lambda angle: np.array([np.cos(angle), np.sin(angle)])) == pytest.approx(oracle_return())
    assert walked(lambda angle: np.array([0.0, 0.8])) == pytest.approx(memoryless_return(), abs=0.02)


def test_score() -> None:
    assert score(oracle_return()) == pytest.approx(1.0)
    assert score(memoryless_return()) == pytest.approx(0.0)
    assert score((oracle_return() + memoryless_return()) / 2) == pytest.approx(0.5)
