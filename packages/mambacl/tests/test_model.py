"""The block and the learner: state, forking (check 3), peers' weights, encoders, initialisation, bad input."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import mambapy.mamba as peer_module
import pytest
import torch
import transformers
from mambacl.data import Episode, EpisodeConfig, FeatureEpisodes, SineEpisodes
from mambacl.model import BatchNorm, ContinualLearner, Encoder, ExpertMLP, LearnerState, MambaBlock, sinusoids
from mambacl.scan import scan_quadratic
from metazoo.errors import UserError
from torch import Tensor

torch.set_num_threads(1)
METHODS = ["mamba", "transformer", "linear_transformer", "performer"]


def learner(method: str = "mamba", **changes: object) -> ContinualLearner:
    torch.manual_seed(0)
    model = ContinualLearner((8,), "class", 6, **{"method": method, "width": 16, "blocks": 2, "chunk": 5, **changes})
    return model.double().eval()


def episodes(count: int = 2, **changes: int) -> Episode:
    setting = EpisodeConfig(**{"tasks": 3, "shots": 3, "test_shots": 2, "vocabulary": 6, **changes})
    episode = FeatureEpisodes(8, 0.3, setting).draw(count, torch.Generator().manual_seed(1))
    return Episode(*(t.double() if t.is_floating_point() else t for t in episode))


@pytest.mark.parametrize("method", METHODS)
def test_fork_is_each_query_appended_alone(method: str) -> None:
    """Check 3: M' queries from one state = a forward pass of every block over the stream and that query alone."""
    model, episode = learner(method), episodes()
    forked = model(episode).prediction
    x, y = model.encoder(episode.x), model.encode_label(episode.y)
    tokens = torch.stack([x, y], 2).flatten(1, 2)
    for j in range(episode.query_x.shape[1]):
        h = torch.cat([tokens, model.encoder(episode.query_x[:, j : j + 1])], 1)
        if model.positions:
            h = h + sinusoids(0, h.shape[1], h.shape[2], h.device)
        for block in model.blocks:
            h, _, _ = block(h)
        alone = model.head(model.final_norm(h[:, -1]))
        assert torch.allclose(alone, forked[:, j], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", METHODS)
def test_queries_are_independent(method: str) -> None:
    """Check 3: permuted queries give permuted answers; another query changes no answer; the state stays."""
    model, episode = learner(method), episodes()
    state = model.observe(episode.x, episode.y)
    before = [tensor.clone() for block in state.blocks for tensor in block]
    answers = model.predict(episode.query_x, state)
    order = torch.tensor([3, 1, 0, 5, 4, 2])
    assert torch.allclose(model.predict(episode.query_x[:, order], state), answers[:, order], rtol=0, atol=1e-12)
    changed = episode.query_x.clone()
    changed[:, 2] = 7.0
    keep = torch.tensor([0, 1, 3, 4, 5])
    assert torch.allclose(model.predict(changed, state)[:, keep], answers[:, keep], rtol=0, atol=1e-12)
    after = [tensor for block in state.blocks for tensor in block]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_stream_in_any_pieces(method: str) -> None:
    """One example at a time, or all at once: the same state and answers (the convolution's window is carried too)."""
    model, episode = learner(method), episodes()
    whole = model.observe(episode.x, episode.y)
    state = None
    for piece in (slice(0, 1), slice(1, 2), slice(2, 9)):
        state = model.observe(episode.x[:, piece], episode.y[:, piece], state)
    assert state is not None
    assert state.tokens == whole.tokens == 18
    for a, b in zip(state.blocks, whole.blocks, strict=True):
        for one, other in zip(a, b, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-6)  # the states are float32 at least
    found, wanted = (model.predict(episode.query_x, s) for s in (state, whole))
    assert torch.allclose(found, wanted, rtol=0, atol=1e-6)


def test_gradient_goes_through_the_state() -> None:
    """The answers' gradient reaches the encoder by way of the stream: dL/dx of every example is not 0."""
    model, episode = learner(), episodes()
    x = episode.x.clone().requires_grad_()
    model(episode._replace(x=x)).prediction.square().sum().backward()
    assert (x.grad.abs().sum(-1) > 0).all()


def test_distributed_queries_see_what_came_before() -> None:
    """A query asked after task k has the answer of an episode cut there; after the last task, forward's own."""
    model, episode = learner(), episodes()
    last = torch.full_like(episode.query_task, 2)
    whole, distributed = model(episode), model.forward_distributed(episode, last)
    assert torch.allclose(whole.prediction, distributed.prediction, rtol=0, atol=1e-10)
    for a, b in zip(whole.associations, distributed.associations, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-10)
    after = torch.maximum(episode.query_task, torch.tensor([[0, 1, 2, 1, 2, 2], [1, 0, 1, 1, 2, 2]]))
    found = model.forward_distributed(episode, after)
    for b in range(2):
        for j in range(6):
            seen = 3 * (int(after[b, j]) + 1)
            state = model.observe(episode.x[b : b + 1, :seen], episode.y[b : b + 1, :seen])
            alone = model.predict(episode.query_x[b : b + 1, j : j + 1], state)
            assert torch.allclose(found.prediction[b, j], alone[0, 0], rtol=0, atol=1e-6)
            assert (found.associations[0][b, :, j, 2 * seen :] < -1e8).all()
            assert found.associations[0][b, 0, j].exp().sum().item() == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_distributed_queries_are_encoded_as_forward_does(method: str) -> None:
    """With batch norm in training: one set of statistics for the stream's labels and one step of the running ones, so
    queries after the last task have forward's answers and leave the same learner."""
    episode = SineEpisodes(EpisodeConfig(tasks=3, shots=2)).draw(2, torch.Generator().manual_seed(0))
    last = torch.full_like(episode.query_task, 2)
    found = []
    for distributed in (False, True):
        torch.manual_seed(0)
        model = ContinualLearner((50,), "vector", 50, method=method, encoder="mlp", width=16, encoder_width=8).double()
        output = model.forward_distributed(episode, last) if distributed else model(episode)
        found.append((output.prediction, {name: buffer for name, buffer in model.named_buffers() if "norm" in name}))
    (wanted, statistics), (answers, ours) = found
    assert torch.allclose(answers, wanted, rtol=0, atol=1e-6)  # the states are float32 at least
    assert statistics.keys() == ours.keys()
    assert int(statistics["label.net.2.norm.num_batches_tracked"]) == 1
    assert all(torch.equal(ours[name], statistics[name]) for name in ours)


DISTRIBUTED = {
    "back": ({"task": torch.tensor([[0, 1, 2] * 3] * 2)}, 2, "sort the stream by task"),
    "uneven": ({"task": torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2]] * 2)}, 2, "as many examples each"),
    "gap": ({"task": torch.tensor([[0, 0, 0, 1, 1, 1, 3, 3, 3]] * 2)}, 3, "tasks 0, 1, …"),
    "many": ({"task": torch.full((2, 9), 50)}, 2, "tasks 0, 1, …"),
    "negative": ({"task": torch.full((2, 9), -2)}, 2, "tasks 0, 1, …"),
    "early": ({}, 1, "before its own task"),
    "late": ({}, 3, "after task 2, the last one"),
    "float": ({}, 2.0, "a task (int64) for each query (2, 6)"),
}


@pytest.mark.parametrize("case", DISTRIBUTED)
def test_bad_distributed_queries(case: str) -> None:
    """Tasks that come back, differ in length or leave numbers out would be cut at the wrong places in silence."""
    changes, after, words = DISTRIBUTED[case]
    episode = episodes()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        learner().forward_distributed(episode._replace(**changes), torch.full((2, 6), after))
    assert "\n" not in str(caught.value)


def test_state_size_does_not_depend_on_the_stream() -> None:
    """Fixed for Mamba, Linear Transformer and Performer; the Transformer's grows by 2 tokens an example."""
    for method in METHODS:
        model = learner(method)
        sizes = [model.observe(e.x, e.y).bytes for e in (episodes(1, shots=2), episodes(1, shots=20))]
        assert (sizes[0] == sizes[1]) == (method != "transformer")
    keys_and_values = 2 * 4 * (8 + 8) * 8  # blocks, heads, sizes, bytes of float64
    assert sizes == sizes
    model = learner("transformer")
    assert model.observe(*episodes(1, shots=20)[:2]).bytes == 120 * keys_and_values


def test_weights_of_mambapy_give_its_outputs() -> None:
    """The same block as mambapy's, weight for weight."""
    peer = peer_module.ResidualBlock(peer_module.MambaConfig(d_model=32, n_layers=1))
    ours = MambaBlock(32)
    names = {
        "norm.weight": "norm.weight",
        **{n: f"mixer.{n}" for n, _ in ours.named_parameters() if n != "norm.weight"},
    }
    theirs = peer.state_dict()
    ours.load_state_dict({name: theirs[other] for name, other in names.items()})
    h = torch.randn(2, 21, 32)
    assert torch.allclose(ours(h)[0], peer(h), atol=1e-5)


def test_weights_of_transformers_give_its_outputs() -> None:
    """And as transformers' MambaModel, two blocks and the last norm."""
    config = transformers.MambaConfig(
        hidden_size=32, num_hidden_layers=2, state_size=16, expand=2, conv_kernel=4, vocab_size=8, use_cache=False
    )
    torch.manual_seed(0)
    peer = transformers.MambaModel(config).eval()
    h = torch.randn(2, 9, 32)
    x = h
    for theirs in peer.layers:
        ours = MambaBlock(32)
        state = {"norm.weight": theirs.norm.weight, **{f"{n}": p for n, p in theirs.mixer.state_dict().items()}}
        ours.load_state_dict(state)
        x, _, _ = ours(x)
    with torch.no_grad():
        wanted = peer(inputs_embeds=h).last_hidden_state
    assert torch.allclose(x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), wanted, atol=1e-4)


def test_parameters_and_initialisation() -> None:
    """Check 10: 1 694 720 parameters (+ 512 of the norm) at d = 512; A = −(1 … N), D = 1, Δ between 1e-3 and 1e-1."""
    block = MambaBlock(512)
    assert sum(p.numel() for name, p in block.named_parameters() if name != "norm.weight") == 1_694_720
    assert block.norm.weight.numel() == 512
    assert torch.allclose(torch.exp(block.A_log), torch.arange(1.0, 17).expand(1024, 16))
    assert (block.D == 1).all()
    delta = torch.nn.functional.softplus(block.dt_proj.bias)
    assert delta.min() >= 1e-3 * 0.999
    assert delta.max() <= 1e-1 * 1.001
    assert block.dt_proj.weight.abs().max() <= 32**-0.5
    narrow = MambaBlock(512, blocks=4)
    assert narrow.out_proj.weight.std().item() == pytest.approx(block.out_proj.weight.std().item() / 2, rel=0.02)


def test_full_association_is_the_scan_s_kernel() -> None:
    """Check 2 in the learner: |kernel| of the query over the stream, summed over channels, normalised."""
    block = MambaBlock(8, state_size=3, association="full").double()
    h, asked = torch.randn(1, 7, 8, dtype=torch.float64), torch.randn(1, 1, 8, dtype=torch.float64)
    _, state, keys = block(h)
    _, query = block.query(asked, state)
    found = block.log_association(query, keys).exp()[0, 0, 0]
    _, _, _, delta, B, C = block._scan(torch.cat([h, asked], 1), None, None)
    A = -torch.exp(block.A_log)
    wanted = torch.zeros(7, dtype=torch.float64)
    for s in range(7):  # the answer at the query to an impulse in each channel at s
        for channel in range(16):
            x = torch.zeros(1, 8, 16, dtype=torch.float64)
            x[0, s, channel] = 1.0
            wanted[s] += scan_quadratic(x, delta, A, B, C)[0, 7, channel].abs()
    assert torch.allclose(found, wanted / wanted.sum(), atol=1e-5)


def test_experts() -> None:
    """Each token goes through its best expert alone, weighted by the router's share."""
    mlp = ExpertMLP(8, 3).double()
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    out = mlp(h)
    normed = mlp.norm(h)
    share = torch.softmax(mlp.router(normed), -1)
    chosen = share.argmax(-1)
    assert len(chosen.unique()) > 1
    for b in range(2):
        for t in range(5):
            e = int(chosen[b, t])
            token = torch.nn.functional.silu(normed[b, t] @ mlp.up[e]) @ mlp.down[e] * share[b, t, e]
            assert torch.allclose(out[b, t], token)


@pytest.mark.parametrize(
    ("kind", "shape"), [("linear", (5,)), ("mlp", (50,)), ("conv3", (1, 20, 20)), ("conv5", (3, 32, 32)),
                        ("resnet18", (3, 16, 16))],
)  # fmt: skip
def test_encoders(kind: str, shape: tuple[int, ...]) -> None:
    """[B, M, *shape] -> [B, M, d]; in eval an example's code does not depend on its neighbours."""
    encoder = Encoder(kind, shape, 12, 6)
    x = torch.randn(2, 3, *shape)
    assert encoder(x).shape == (2, 3, 6)
    encoder.eval()
    assert torch.allclose(encoder(x)[0, 0], encoder(x[:1, :1])[0, 0], atol=1e-5)
    free = Encoder(kind, shape, 12, 6, norm=False)
    assert not any(isinstance(m, BatchNorm) for m in free.modules())


def test_resnet18_has_its_parameters() -> None:
    """11.17 million weights in convolutions, as torchvision's with a 3 x 3 stem."""
    encoder = Encoder("resnet18", (3, 16, 16), 1, 10)
    convolutions = sum(m.weight.numel() for m in encoder.modules() if isinstance(m, torch.nn.Conv2d))
    assert convolutions == 11_159_232


def test_sinusoids() -> None:
    """PE(p, 2i) = sin(p / 10000^{2i/d}), PE(p, 2i+1) its cosine, from any first position."""
    found = sinusoids(3, 2, 6, torch.device("cpu"))
    assert found[1, 2].item() == pytest.approx(math.sin(4 / 10_000 ** (2 / 6)), abs=1e-6)
    assert found[0, 5].item() == pytest.approx(math.cos(3 / 10_000 ** (4 / 6)), abs=1e-6)


@pytest.mark.parametrize("kind", ["vector", "angle", "image"])
def test_vector_answers(kind: str) -> None:
    """Targets as labels: [B, Q, O], within (−1, 1) for images."""
    model = ContinualLearner((4,), kind, 2, width=8).eval()
    state = model.observe(torch.randn(2, 5, 4), torch.randn(2, 5, 2))
    answer = model.predict(100 * torch.randn(2, 3, 4), state)
    assert answer.shape == (2, 3, 2)
    assert (answer.abs() <= 1).all() or kind != "image"


def bad(case: str) -> Tensor:
    model = learner().float()
    x, y = torch.zeros(1, 2, 8), torch.zeros(1, 2, dtype=torch.int64)
    state = model.observe(x, y)
    if case == "before":
        return model.predict(x, None)
    if case == "code":
        return model.observe(x, y + 6).blocks[0][0]
    if case == "labels":
        return model.observe(x, y[:, :1]).blocks[0][0]
    if case == "columns":
        return model.predict(x[..., :7], state)
    if case == "none":
        return model.observe(x[:, :0], y[:, :0]).blocks[0][0]
    if case == "method":
        return learner("lstm")(x)
    if case == "kind":
        return ContinualLearner((8,), "text", 6)(x)
    if case == "encoder":
        return learner(encoder="conv3")(x)
    return learner(encoder="vit")(x)


NAN, INF = float("nan"), float("inf")
X, Y = torch.zeros(2, 3, 8), torch.zeros(2, 3, dtype=torch.int64)
T = torch.zeros(2, 3, 5)


def single(kind: str = "class") -> ContinualLearner:
    return ContinualLearner((8,), kind, 6 if kind == "class" else 5).eval()


def spoilt(x: Tensor, value: float) -> Tensor:
    x = x.clone()
    x[1, 2, 3] = value
    return x


BAD: dict[str, tuple[Callable[[], object], str]] = {
    "x nan": (lambda: single().observe(spoilt(X, NAN), Y), "x: nan at index (1, 2, 3)"),
    "x inf": (lambda: single().observe(spoilt(X, -INF), Y), "x: -inf at index (1, 2, 3)"),
    "x too large": (lambda: single().observe(spoilt(X.double(), 1e300), Y), "x: inf at index (1, 2, 3)"),
    "y nan": (lambda: single("vector").observe(X, spoilt(T, NAN)), "y: nan at index (1, 2, 3)"),
    "float codes": (lambda: single().observe(X, Y.float()), "y is torch.float32 (2, 3): classes want codes [B, M]"),
    "bool codes": (lambda: single().observe(X, Y.bool()), "classes want codes"),
    "columns of codes": (lambda: single().observe(X, Y.unsqueeze(2)), "(2, 3, 1): classes want codes [B, M]"),
    "negative code": (lambda: single().observe(X, Y - 1), "outside 0 … 5"),
    "codes for vectors": (lambda: single("vector").observe(X, Y), "kind 'vector' wants targets [B, M, 5]"),
    "short targets": (lambda: single("vector").observe(X, T[..., :4]), "kind 'vector' wants targets [B, M, 5]"),
    "more labels": (lambda: single().observe(X[:, :2], Y), "labels have the shape (2, 3), examples (2, 2, 8)"),
    "one stream": (lambda: single().observe(X[0], Y[0]), "the learner wants [B, M, 8]"),
    "uint8": (lambda: single().observe(X.byte(), Y), "x is torch.uint8: give floating-point numbers"),
    "no streams": (lambda: single().observe(X[:0], Y[:0]), "at least one"),
    "batch": (lambda: single().observe(X[:1], Y[:1], single().observe(X, Y)), "x is of 1 streams (B), the state of 2"),
    "state": (lambda: learner(blocks=1).observe(X, Y, single().observe(X, Y)), "the state has 2 blocks, the learner 1"),
    "query nan": (lambda: single().predict(spoilt(X, NAN), single().observe(X, Y)), "x: nan at index (1, 2, 3)"),
    "query shape": (lambda: single().predict(X.unsqueeze(3), single().observe(X, Y)), "wants [B, M, 8]"),
    "query batch": (lambda: single().predict(X[:1], single().observe(X, Y)), "x is of 1 streams (B), the state of 2"),
    "query uint8": (lambda: single().predict(X.byte(), single().observe(X, Y)), "x is torch.uint8"),
    "nothing yet": (lambda: single().predict(X, LearnerState((), 0)), "observe labelled examples first"),
    "forward kind": (lambda: single("vector")(zeros()), "kind 'vector' wants targets"),
    "forward shape": (lambda: single()(zeros()._replace(x=T, query_x=T)), "the learner wants (8,)"),
    "forward batch": (lambda: single()(zeros().take(slice(0, 0))), "no episodes"),
}


def zeros() -> Episode:
    return Episode(X, Y, Y, X, Y, Y)


@pytest.mark.parametrize("case", BAD)
def test_bad_streams_and_queries(case: str) -> None:
    """One line for each, where there were answers of NaN, other streams' states or torch's own words."""
    call, words = BAD[case]
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", METHODS)
def test_state_of_another_number_of_streams(method: str) -> None:
    """Every kind of state knows how many streams it is of."""
    model, episode = learner(method), episodes()
    state = model.observe(episode.x, episode.y)
    for call in (lambda: model.observe(episode.x[:1], episode.y[:1], state), lambda: model.predict(X[:1], state)):
        with pytest.raises(UserError, match="the state of 2: give as many"):
            call()


def test_other_dtypes_are_cast() -> None:
    """float64 or bfloat16 examples and codes of any whole-number dtype: what the parameters' dtype gives."""
    model = single()
    x = torch.randn(2, 3, 8).bfloat16()
    wanted = model.predict(x.float(), model.observe(x.float(), Y))
    for dtype, codes in ((torch.float64, torch.int32), (torch.bfloat16, torch.uint8)):
        assert torch.equal(model.predict(x.to(dtype), model.observe(x.to(dtype), Y.to(codes))), wanted)
        episode = Episode(x.to(dtype), Y.to(codes), Y, x.to(dtype), Y.to(codes), Y)
        assert torch.equal(model(episode).prediction, model(Episode(x.float(), Y, Y, x.float(), Y, Y)).prediction)
    vectors, y = single("vector"), torch.randn(2, 3, 5)
    wanted = vectors.predict(x.float(), vectors.observe(x.float(), y))
    assert torch.equal(vectors.predict(x, vectors.observe(x.double(), y.double())), wanted)


def test_batch_norm_of_one_value() -> None:
    """It has no variance: one line in training, alone or over processes; no matter in eval."""
    torch.manual_seed(0)
    norm, x = BatchNorm(3), torch.randn(1, 3, 1, 1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(UserError, match="one value a channel"):
            norm(x)
        assert norm(torch.randn(2, 3, 1, 1)).isfinite().all()
        assert all(buffer.isfinite().all() for buffer in norm.buffers())
    finally:
        torch.distributed.destroy_process_group()
    with pytest.raises(UserError, match="one value a channel") as caught:
        norm(x)
    assert "\n" not in str(caught.value)
    assert norm.eval()(x).isfinite().all()
    one = Episode(*(part[:1, :1] for part in (X, T, Y, X, T, Y)))  # the learner's labels: one vector, in training
    with pytest.raises(UserError, match="more episodes or examples"):
        single("vector").train()(one)


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("before", "observe labelled examples first"), ("code", "outside 0 … 5"), ("labels", "one for each"),
        ("columns", "the learner wants"), ("none", "at least one"), ("method", "one of mamba"),
        ("kind", "one of class"), ("encoder", "use mlp"), ("vit", "one of linear"),
    ],
)  # fmt: skip
def test_bad_input(case: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        bad(case)
    assert "\n" not in str(caught.value)


def test_learner_saves_and_loads(tmp_path: object) -> None:
    """The hub's layout: config.json and safetensors; the same answers."""
    model, episode = learner(), episodes()
    model.save_pretrained(str(tmp_path))
    again = ContinualLearner.from_pretrained(str(tmp_path)).double().eval()
    assert torch.allclose(again(episode).prediction, model(episode).prediction, atol=1e-5)
