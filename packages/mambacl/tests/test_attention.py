"""Attention blocks: state, fork, mask and recurrence say the same; features, redraws and log q are what they should."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from mambacl.attention import AttentionBlock
from mambacl.selectivity import relevant_tokens, task_attention
from metazoo.errors import UserError
from torch import Tensor

torch.set_num_threads(1)

MAPS = (None, "elu", "favor")
D, H, QK, V = 6, 3, 4, 5


def block(feature_map: str | None, *, features: int = 8, seed: int = 0, **changes: float) -> AttentionBlock:
    """A small block in float64, for inference."""
    torch.manual_seed(seed)
    made = AttentionBlock(D, H, QK, V, 7, feature_map=feature_map, features=features, **changes)  # type: ignore[arg-type]
    return made.double().eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def phi(layer: AttentionBlock, x: Tensor) -> Tensor:
    """Features of [..., qk], without any shift."""
    if layer.feature_map == "elu":
        return F.elu(x) + 1
    x = x / math.sqrt(math.sqrt(QK))
    omega = torch.cat([layer.omega, -layer.omega], 1)
    return torch.exp(x @ omega - x.square().sum(-1, keepdim=True) / 2) / math.sqrt(omega.shape[1])


def heads(layer: AttentionBlock, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of tokens [L, d], each [H, L, ·]."""
    qkv = F.linear(layer.attention_norm(h), layer.qkv.weight, layer.qkv.bias).view(len(h), H, 2 * QK + V)
    qkv = qkv.permute(1, 0, 2)
    return qkv[..., :QK], qkv[..., QK : 2 * QK], qkv[..., 2 * QK :]


def similarity(layer: AttentionBlock, q: Tensor, k: Tensor) -> Tensor:
    """Attention before its normalisation [..., L, L]."""
    if layer.feature_map is None:
        return torch.exp(q @ k.mT / math.sqrt(QK))
    return phi(layer, q) @ phi(layer, k).mT


def masked(layer: AttentionBlock, h: Tensor, seen: Tensor) -> Tensor:
    """The whole block on tokens [L, d] at once: token i sees token j where seen[i, j]."""
    q, k, v = heads(layer, h)
    weights = similarity(layer, q, k) * seen
    attended = (weights / weights.sum(-1, keepdim=True)) @ v
    h = h + layer.projection(attended.permute(1, 0, 2).reshape(len(h), H * V))
    return h + layer.mlp[2](F.gelu(layer.mlp[0](layer.mlp_norm(h))))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("feature_map", MAPS)
def test_fork_is_append_is_mask(feature_map: str | None, norm: bool) -> None:
    """Check 3: queries by state = each appended alone to the stream = one masked pass of stream and queries."""
    layer = block(feature_map, norm=norm)
    stream, asked = tokens(2, 7), tokens(2, 5, seed=2)
    read, state, _ = layer(stream)
    answered, _ = layer.query(asked, state)
    seen = torch.ones(12, 12, dtype=torch.bool).tril()
    seen[7:, 7:] = torch.eye(5, dtype=torch.bool)
    for row in range(2):
        whole = masked(layer, torch.cat([stream[row], asked[row]]), seen)
        close(read[row], whole[:7])
        close(answered[row], whole[7:])
    for i in range(5):
        appended, _, _ = layer(torch.cat([stream, asked[:, i : i + 1]], 1))
        close(appended[:, -1], answered[:, i])


@pytest.mark.parametrize("feature_map", MAPS)
def test_queries_are_independent(feature_map: str | None) -> None:
    """Check 3: permuted queries have permuted answers, one that changes changes no other, none changes the state."""
    layer = block(feature_map)
    _, state, _ = layer(tokens(2, 7))
    before = [tensor.clone() for tensor in state]
    asked = tokens(2, 6, seed=2)
    answers, queries = layer.query(asked, state)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    permuted, permuted_queries = layer.query(asked[:, order], state)
    close(permuted, answers[:, order])
    close(permuted_queries, queries[:, :, order])
    other = asked.clone()
    other[:, 2] += 10
    changed, _ = layer.query(other, state)
    kept = [0, 1, 3, 4, 5]
    assert torch.equal(changed[:, kept], answers[:, kept])
    assert not torch.allclose(changed[:, 2], answers[:, 2])
    assert all(torch.equal(a, b) for a, b in zip(before, state, strict=True))


@pytest.mark.parametrize("feature_map", MAPS)
def test_no_token_sees_a_later_one(feature_map: str | None) -> None:
    """However large the later one is."""
    layer = block(feature_map, norm=False)
    stream = tokens(1, 9)
    other = stream.clone()
    other[:, 5:] *= 5
    close(layer(stream)[0][:, :5], layer(other)[0][:, :5])


@pytest.mark.parametrize("cuts", [(4,), (1,), (3, 4, 9), tuple(range(1, 11))])
@pytest.mark.parametrize("feature_map", MAPS)
def test_reading_in_parts(feature_map: str | None, cuts: tuple[int, ...]) -> None:
    """A stream of 11 tokens, in parts of odd and even lengths, down to 1: outputs, answers and log q of one pass."""
    layer = block(feature_map, norm=False)
    stream, asked = 2 * tokens(2, 11), 2 * tokens(2, 3, seed=2)
    wanted, last, all_keys = layer(stream)
    state, outputs, keys = None, [], []
    for first, end in itertools.pairwise((0, *cuts, 11)):
        out, state, key = layer(stream[:, first:end], state)
        outputs.append(out)
        keys.append(key)
        state = tuple(state)  # any tuple of tensors will do
    close(torch.cat(outputs, 1), wanted)
    (answer, query), (wanted_answer, _) = layer.query(asked, state), layer.query(asked, last)
    close(answer, wanted_answer)
    close(layer.log_association(query, torch.cat(keys, 2)), layer.log_association(query, all_keys))
    for mine, other in zip(state, last, strict=True):
        close(mine, other)


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("feature_map", ["elu", "favor"])
def test_recurrence(feature_map: str, start: int) -> None:
    """Check 6: S_t = S_{t-1} + φ(k_t) ⊗ v_t and z_t = z_{t-1} + φ(k_t), token by token, is the parallel masked form."""
    layer = block(feature_map)
    h = tokens(1, 9)
    q, k, v = heads(layer, h[0])
    S, z = torch.zeros(H, 8 if feature_map == "favor" else QK, V).double(), 0.0
    outputs = []
    for t in range(9):
        key, query = phi(layer, k[:, t]), phi(layer, q[:, t])
        S, z = S + key.unsqueeze(2) * v[:, t].unsqueeze(1), z + key
        attended = torch.einsum("hf,hfv->hv", query, S) / (query * z).sum(-1, keepdim=True)
        out = h[0, t] + layer.projection(attended.flatten())
        outputs.append(out + layer.mlp(layer.mlp_norm(out)))
    state = layer(h[:, :start])[1] if start else None
    read, state, _ = layer(h[:, start:], state)
    close(read[0], torch.stack(outputs[start:]))
    close(state.S[0] * state.scale[0].exp(), S)
    close(state.z[0] * state.scale[0, ..., 0].exp(), z)


@pytest.mark.parametrize("feature_map", MAPS)
def test_size_of_the_state(feature_map: str | None) -> None:
    """The kernelised state has one size; the cache has H (qk + v) numbers for each token."""
    layer = block(feature_map)
    sizes = []
    for length in (1, 2, 30):
        _, state, keys = layer(tokens(2, length))
        assert keys.shape == (2, H, length, QK)
        assert all(len(tensor) == 2 for tensor in state)
        sizes.append(sum(tensor[0].numel() for tensor in state))
    features = {"elu": QK, "favor": 8}
    if feature_map is None:
        assert sizes == [H * (QK + V) * length for length in (1, 2, 30)]
    else:
        f = features[feature_map]
        assert sizes == [H * (f * V + f + 1)] * 3


@pytest.mark.parametrize("feature_map", MAPS)
def test_log_association(feature_map: str | None) -> None:
    """log q is the log of the normalised similarity of queries with all tokens of the stream."""
    layer = block(feature_map)
    stream, asked = tokens(2, 6), tokens(2, 3, seed=2)
    _, state, keys = layer(stream)
    _, queries = layer.query(asked, state)
    found = layer.log_association(queries, keys)
    assert found.shape == (2, H, 3, 6)
    for row in range(2):
        weights = similarity(layer, heads(layer, asked[row])[0], heads(layer, stream[row])[1])
        close(found[row], (weights / weights.sum(-1, keepdim=True)).log())
    close(found.logsumexp(-1), torch.zeros(2, H, 3).double())


@pytest.mark.parametrize("feature_map", MAPS)
def test_mass_of_the_right_task(feature_map: str | None) -> None:
    """Check 13: cross-entropy on tasks of the logsumexp over each one's 2S keys = −log of the task's summed share."""
    layer = block(feature_map)
    tasks, shots = 3, 2
    stream, asked = tokens(2, 2 * tasks * shots), tokens(2, 4, seed=2)
    task, query_task = torch.arange(tasks).repeat_interleave(shots).expand(2, -1), torch.tensor([[0, 2, 1, 1]] * 2)
    _, state, keys = layer(stream)
    log_q = layer.log_association(layer.query(asked, state)[1], keys)
    half, losses = max(1, H // 2), []
    for row in range(2):
        q, k = heads(layer, asked[row])[0][:half], heads(layer, stream[row])[1][:half]
        by_task = similarity(layer, q, k).log().unflatten(-1, (tasks, 2 * shots)).logsumexp(-1)
        losses += [F.cross_entropy(logits, query_task[row]) for logits in by_task]
    close(task_attention(log_q, relevant_tokens(task, query_task)), torch.stack(losses).mean())


@pytest.mark.parametrize("feature_map", MAPS)
def test_gradients(feature_map: str | None) -> None:
    """Of outputs, answers and log q with respect to both parts of the stream and to the queries, by differences."""
    layer = block(feature_map, features=4)

    def everything(first: Tensor, second: Tensor, asked: Tensor) -> tuple[Tensor, ...]:
        one, state, keys = layer(first)
        two, state, more = layer(second, state)
        answer, queries = layer.query(asked, state)
        return one, two, answer, layer.log_association(queries, torch.cat([keys, more], 2))

    inputs = [x.requires_grad_() for x in (tokens(1, 3), tokens(1, 2, seed=2), tokens(1, 2, seed=3))]
    assert torch.autograd.gradcheck(everything, inputs, fast_mode=True)


@pytest.mark.parametrize("size", [0.0, 30.0, 1e4])
@pytest.mark.parametrize("feature_map", MAPS)
def test_extreme_tokens(feature_map: str | None, size: float) -> None:
    """In float32 without LayerNorm, tokens of any size: outputs, log q and gradients stay finite."""
    layer = block(feature_map, norm=False, features=64).float()
    stream = (size * tokens(2, 9)).float().requires_grad_()
    asked = (size * tokens(2, 3, seed=2)).float().requires_grad_()
    out, state, keys = layer(stream)
    answer, queries = layer.query(asked, state)
    log_q = layer.log_association(queries, keys)
    assert all(torch.isfinite(x).all() for x in (out, answer, log_q))
    for part in (out, answer, log_q):
        gradients = torch.autograd.grad(part.sum(), [stream, *layer.parameters()], retain_graph=True, allow_unused=True)
        assert all(torch.isfinite(g).all() for g in gradients if g is not None)
    if feature_map:
        assert log_q.min() >= math.log(1e-9) - 1e-5


def test_features_that_float32_cannot_hold() -> None:
    """Keys so long that their features e^-150 are 0 in float32: answers and log q are those of float64 all the same."""
    layer = block("favor", norm=False)
    stream, asked = (20 * tokens(2, 1, seed=7) + 0.2 * tokens(2, n, seed=n) for n in (9, 3))
    assert all((phi(layer, heads(layer, h)[1]).float() == 0).any(-1).any() for h in stream)
    seen = torch.eye(12, dtype=torch.bool)
    seen[:, :9] = True
    wanted = torch.stack([masked(layer, torch.cat(pair), seen)[9:] for pair in zip(stream, asked, strict=True)])
    log_q = layer.log_association(layer.query(asked, layer(stream)[1])[1], layer(stream)[2])
    layer.float()
    _, state, keys = layer(stream.float())
    answer, queries = layer.query(asked.float(), state)
    torch.testing.assert_close(answer.double(), wanted, rtol=0, atol=1e-3)
    torch.testing.assert_close(layer.log_association(queries, keys).double(), log_q, rtol=0, atol=1e-3)


@pytest.mark.parametrize("feature_map", MAPS)
def test_mixed_precision(feature_map: str | None) -> None:
    """Under bfloat16 the sums and log q stay in float32, and answers are near those without it."""
    layer = block(feature_map, features=64).float()
    stream, asked = tokens(2, 9).float(), tokens(2, 3, seed=2).float()
    wanted = layer.query(asked, layer(stream)[1])[0]
    with torch.autocast("cpu", torch.bfloat16):
        _, state, keys = layer(stream)
        answer, queries = layer.query(asked, state)
        assert layer.log_association(queries, keys).dtype == torch.float32
    if feature_map:
        assert all(tensor.dtype == torch.float32 for tensor in state)
    torch.testing.assert_close(answer.float(), wanted, rtol=0, atol=0.05)


def test_orthogonal_directions() -> None:
    """Columns of ω are orthogonal in groups of qk, with the norms of N(0, I): mean square qk."""
    omega = block("favor", features=2 * (2 * QK + 1)).omega
    assert omega.shape == (QK, 2 * QK + 1)
    for group in (omega[:, :QK], omega[:, QK : 2 * QK]):
        product = (group.T @ group).double()
        off = product - product.diag().diag()
        assert off.abs().max() < 1e-5
    squares = torch.stack([block("favor", seed=s).omega.square().sum(0) for s in range(200)])
    error = math.sqrt(2 * QK / squares.numel())  # chi-squared of qk degrees of freedom
    assert abs(float(squares.mean()) - QK) < 5 * error


def test_favor_is_the_softmax_kernel_on_average() -> None:
    """E φ(q)·φ(k) = exp(q·k/√qk) within sampling error, over 5000 independent groups of qk orthogonal directions."""
    q, k = tokens(1, 1)[0, :, :QK], tokens(1, 1, seed=5)[0, :, :QK]
    groups = 5000
    layer = block("favor", features=2 * QK * groups)
    (phi_q, a), (phi_k, b) = layer._features(q, (-1,)), layer._features(k, (-1,))
    estimates = (phi_q * phi_k * (a + b).exp()).view(2, groups, QK).sum((0, 2)) * groups
    error = float(estimates.std()) / math.sqrt(groups)
    assert abs(float(estimates.mean()) - float(torch.exp((q * k).sum() / math.sqrt(QK)))) < 4 * error
    assert error < 0.05


def test_favor_nears_softmax() -> None:
    """The Performer's answers near the Transformer's of the same weights as features grow."""
    softmax = block(None)
    stream, asked = tokens(4, 15), tokens(4, 5, seed=2)
    wanted = softmax.query(asked, softmax(stream)[1])[0]
    errors = []
    for features in (4, 64, 4096):
        layer = block("favor", features=features)
        layer.load_state_dict(softmax.state_dict() | {n: b for n, b in layer.named_buffers()})
        errors.append(float((layer.query(asked, layer(stream)[1])[0] - wanted).detach().square().mean().sqrt()))
    assert errors[1] < errors[0] / 2
    assert errors[2] < errors[1] / 3


def test_redraws() -> None:
    """ω lasts for `redraw` streams of training; parts of a stream, queries and inference never redraw it."""
    layer = block("favor", redraw=3).train()
    stream = tokens(1, 2)
    seen = []
    for _ in range(7):
        _, state, _ = layer(stream)
        layer(stream, state)
        layer.query(stream, state)
        seen.append(layer.omega)
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert same == [True, True, False, True, True, False]
    assert int(layer.calls) == 7
    layer.eval()
    for _ in range(5):
        layer(stream)
    assert torch.equal(layer.omega, seen[-1])
    assert int(layer.calls) == 7

    resumed = block("favor", redraw=3, seed=1).train()
    resumed.load_state_dict(layer.state_dict())
    layer.train()
    for _ in range(4):
        torch.manual_seed(5)
        layer(stream)
        torch.manual_seed(6)
        resumed(stream)
        assert torch.equal(layer.omega, resumed.omega)
    assert not torch.equal(layer.omega, seen[-1])

    never = block("favor").train()
    first = never.omega.clone()
    for _ in range(5):
        never(stream)
    assert torch.equal(never.omega, first)


def test_a_redraw_leaves_earlier_graphs_alone() -> None:
    """Two passes with a redraw between them, then backward through both."""
    layer = block("favor", redraw=1).train()
    stream = tokens(1, 3).requires_grad_()
    loss = layer(stream)[0].sum() + layer(stream)[0].sum()
    loss.backward()
    assert stream.grad is not None
    assert torch.isfinite(stream.grad).all()


def test_dropout_is_for_training_only() -> None:
    layer = block(None, dropout=0.5)
    stream = tokens(1, 5)
    assert torch.equal(layer(stream)[0], layer(stream)[0])
    layer.train()
    assert not torch.equal(layer(stream)[0], layer(stream)[0])


@pytest.mark.parametrize("features", [0, 1, 7])
def test_refusals(features: int) -> None:
    with pytest.raises(UserError, match=f"--favor-features is {features}: give an even number"):
        block("favor", features=features)
    with pytest.raises(UserError, match="feature map 'relu': one of elu, favor"):
        block("relu")
