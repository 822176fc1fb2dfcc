"""OML against autograd by hand, class means and densities against loops and scipy, the references on easy episodes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mambacl.baselines import OML, GeMCL, Offline, PrototypicalNetwork, nearest_class_mean
from mambacl.data import Episode
from metazoo.errors import UserError
from metazoo.testing import nan_in_empty
from scipy import stats
from torch import Tensor, nn

torch.set_num_threads(1)

KINDS = ("class", "vector", "angle", "image")
OUTPUTS = {"class": 5, "vector": 3, "angle": 2, "image": 4}


def episode(kind: str, *, batch: int = 2, tasks: int = 3, shots: int = 2, width: int = 4, seed: int = 0) -> Episode:
    """Random inputs in float64; classes have well-separated means and codes among 5 symbols."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator)  # noqa: E731
    task = torch.arange(tasks).repeat_interleave(shots).expand(batch, -1)
    query_task = torch.arange(tasks).expand(batch, -1)
    x, query_x = normal(batch, tasks * shots, width), normal(batch, tasks, width)
    if kind == "class":
        code = torch.rand(batch, OUTPUTS[kind], generator=generator).argsort(1)[:, :tasks]
        mean = 10 * normal(batch, tasks, width)
        x = x + mean.repeat_interleave(shots, 1)
        return Episode(x, code.gather(1, task), task, query_x + mean, code.gather(1, query_task), query_task)
    y, query_y = normal(batch, tasks * shots, OUTPUTS[kind]), normal(batch, tasks, OUTPUTS[kind])
    if kind == "angle":
        y, query_y = F.normalize(y, dim=-1), F.normalize(query_y, dim=-1)
    return Episode(x, y, task, query_x, query_y, query_task)


def single(given: Episode) -> Episode:
    """The same in float32."""
    return Episode(*(part.float() if part.is_floating_point() else part for part in given))


def by_hand(kind: str, out: Tensor, target: Tensor) -> Tensor:
    """The loss of one example, out [O] before any tanh."""
    if kind == "class":
        return -out.log_softmax(-1)[target]
    if kind == "vector":
        return (out - target).square().mean()
    if kind == "image":
        return (torch.tanh(out) - target).square().mean()
    return 1 - (out * target).sum() / max(out.norm(), out.new_tensor(0.1))


def oml(kind: str, *, fast_layers: int = 2, inner_lr: float = 0.1) -> OML:
    torch.manual_seed(3)
    made = OML(
        nn.Linear(4, 6), 6, OUTPUTS[kind], kind, hidden=8, fast_layers=fast_layers, inner_lr=inner_lr
    ).double()  # fmt: skip
    for bias in made.biases:
        nn.init.normal_(bias, std=0.1)
    return made


def plain(h: Tensor, weights: list[Tensor], biases: list[Tensor]) -> Tensor:
    for weight, bias in zip(weights[:-1], biases, strict=True):
        h = torch.relu(weight @ h + bias)
    return weights[-1] @ h


@pytest.mark.parametrize("fast_layers", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_oml_is_sgd_by_hand(kind: str, fast_layers: int) -> None:
    """Check 12: each step is W − lr ∂ℓ/∂W by autograd, one example and one episode at a time, in order; the
    meta-gradient of all parameters, the inner learning rate's too, is that of the graph of all steps."""
    model = oml(kind, fast_layers=fast_layers)
    given = episode(kind)
    predictions = []
    for row in range(2):
        weights, biases = list(model.weights), list(model.biases)
        for x, y in zip(given.x[row], given.y[row], strict=True):
            loss = by_hand(kind, plain(model.encoder(x), weights, biases), y)
            steps = torch.autograd.grad(loss, [*weights, *biases], create_graph=True)
            moved = [p - model.inner_log_lr.exp() * g for p, g in zip([*weights, *biases], steps, strict=True)]
            weights, biases = moved[:fast_layers], moved[fast_layers:]
        predictions.append(torch.stack([plain(model.encoder(x), weights, biases) for x in given.query_x[row]]))
    wanted = torch.stack(predictions)
    wanted = torch.tanh(wanted) if kind == "image" else wanted
    output = model(given)
    assert output.associations == []
    torch.testing.assert_close(output.prediction, wanted, rtol=0, atol=1e-12)
    weight = torch.linspace(-1, 2, wanted.numel()).double().view_as(wanted)
    found = torch.autograd.grad((output.prediction * weight).sum(), list(model.parameters()))
    hand = torch.autograd.grad((wanted * weight).sum(), list(model.parameters()))
    for mine, other in zip(found, hand, strict=True):
        assert mine.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", KINDS)
def test_oml_without_inner_learning(kind: str) -> None:
    """Check 12: as inner lr -> 0 the prediction is that of the initial fast weights; the difference is linear in it."""
    model, given = oml(kind), episode(kind)
    initial = torch.stack([
        torch.stack([plain(model.encoder(x), list(model.weights), list(model.biases)) for x in row])
        for row in given.query_x
    ])  # fmt: skip
    initial = torch.tanh(initial) if kind == "image" else initial
    gaps = []
    for lr in (1e-5, 1e-6, 0.0):
        with torch.no_grad():
            model.inner_log_lr.fill_(math.log(lr) if lr else -math.inf)
        gaps.append(float((model(given).prediction - initial).detach().abs().max()))
    assert gaps[2] < 1e-14
    assert gaps[1] == pytest.approx(gaps[0] / 10, rel=0.02)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_oml_learns_under_no_grad(kind: str, training: bool) -> None:
    """The inner loop runs at meta-test too: the same answers, no graph, nothing left in .grad."""
    model, given = oml(kind).train(training), episode(kind)
    wanted = model(given).prediction
    assert wanted.requires_grad
    with torch.no_grad():
        found = model(given).prediction
    assert not found.requires_grad
    torch.testing.assert_close(found, wanted.detach(), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_oml_with_dead_units(kind: str) -> None:
    """All hidden units off: the prediction is exactly 0, and the second-order gradient is finite there too."""
    model, given = oml(kind), episode(kind)
    with torch.no_grad():
        model.biases[0].fill_(-1e3)
    model(given).prediction.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_oml_meta_gradient_by_differences() -> None:
    """Of the inner learning rate's logarithm and of the fast weights."""
    model, given = oml("vector"), episode("vector")
    names = ["inner_log_lr", "weights.0", "weights.1", "biases.0"]

    def meta(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (given,)).prediction

    parameters = dict(model.named_parameters())
    inputs = [parameters[name].detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(meta, inputs, fast_mode=True)


def test_oml_starts_as_the_precursor() -> None:
    """Zero biases, Xavier's variance 2/(i + o), no bias in the last layer, nothing left uninitialised."""
    with nan_in_empty():
        model = OML(nn.Identity(), 200, 100, "class", hidden=300, fast_layers=3)
    assert [tuple(w.shape) for w in model.weights] == [(300, 200), (300, 300), (100, 300)]
    assert [tuple(b.shape) for b in model.biases] == [(300,), (300,)]
    assert all(not b.any() for b in model.biases)
    for w in model.weights:
        assert float(w.detach().var()) == pytest.approx(2 / sum(w.shape), rel=0.05)
    assert math.exp(model.inner_log_lr.item()) == pytest.approx(0.03)
    with pytest.raises(UserError, match="--fast-layers is 1"):
        OML(nn.Identity(), 2, 2, "class", hidden=2, fast_layers=1)


def test_oml_meta_learns() -> None:
    """A hundred meta-steps on three-class episodes: the loss after the stream falls below half of the first."""
    torch.manual_seed(0)
    model = OML(nn.Linear(4, 16), 16, 5, "class", hidden=16).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step in range(100):
        given = episode("class", batch=16, seed=step + 10)
        given = given._replace(x=given.x / 10, query_x=given.query_x / 10)
        loss = F.cross_entropy(model(given).prediction.flatten(0, 1), given.query_y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) < sum(losses[:10]) / 2


def uneven() -> Episode:
    """Classes of 4, 1 and 2 examples; symbols 1 and 3 do not occur."""
    generator = torch.Generator().manual_seed(0)
    y = torch.tensor([[2, 2, 2, 2, 0, 4, 4], [4, 4, 4, 4, 2, 0, 0]])
    task = torch.tensor([[0, 0, 0, 0, 1, 2, 2]] * 2)
    x = torch.randn(2, 7, 3, dtype=torch.float64, generator=generator) + 3 * y.unsqueeze(-1)
    query_y = torch.tensor([[0, 2, 4, 2], [4, 4, 0, 2]])
    query_x = torch.randn(2, 4, 3, dtype=torch.float64, generator=generator) + 3 * query_y.unsqueeze(-1)
    return Episode(x, y, task, query_x, query_y, torch.zeros_like(query_y))


def present(given: Episode, row: int) -> dict[int, Tensor]:
    """Examples [n, d] of each symbol in the stream."""
    return {code: given.x[row][given.y[row] == code] for code in given.y[row].unique().tolist()}


def test_prototypes_are_nearest_class_means() -> None:
    """Check 11: with an identity encoder, logits −‖x − mean‖²; the answer is the nearest class mean, and all are right
    for well-separated means."""
    given = uneven()
    logits = PrototypicalNetwork(nn.Identity(), 5)(given).prediction
    nearest = nearest_class_mean(given, 5)
    for row in range(2):
        means = {code: x.mean(0) for code, x in present(given, row).items()}
        for i, query in enumerate(given.query_x[row]):
            distance = {code: float((query - mean).square().sum()) for code, mean in means.items()}
            for code in range(5):
                assert float(logits[row, i, code]) == pytest.approx(-distance[code] if code in distance else -1e9)
            assert int(nearest[row, i]) == min(distance, key=lambda code: distance[code])
    separate = episode("class", batch=50)
    answers = PrototypicalNetwork(nn.Identity(), 5)(separate).prediction.argmax(-1)
    assert torch.equal(answers, nearest_class_mean(separate, 5))
    assert (answers == separate.query_y).float().mean() > 0.98
    far = single(separate._replace(x=separate.x + 3e4, query_x=separate.query_x + 3e4))  # squares beyond float32
    assert torch.equal(PrototypicalNetwork(nn.Identity(), 5)(far).prediction.argmax(-1), answers)


@pytest.mark.parametrize("map_", [False, True])
def test_gemcl_densities(map_: bool) -> None:
    """Check 11: with S examples of a class α' = α + S/2, β' = β + ½ Σ (x − μ)²; logits are Student's t of 2α' degrees
    of freedom and squared scale β'/α' (1 + 1/S), by scipy; with map, the normal of variance β'/(α' − ½)."""
    given = uneven()
    model = GeMCL(nn.Identity(), 5, map=map_).double()
    with torch.no_grad():
        model.log_alpha.fill_(math.log(1.5))
        model.log_beta.fill_(math.log(0.7))
    logits = model(given).prediction.detach()
    for row in range(2):
        for code, x in present(given, row).items():
            alpha = 1.5 + len(x) / 2
            beta = 0.7 + (x - x.mean(0)).square().sum(0) / 2
            for i, query in enumerate(given.query_x[row]):
                difference = (query - x.mean(0)).numpy()
                if map_:
                    density = stats.norm.logpdf(difference, scale=(beta / (alpha - 0.5)).sqrt().numpy())
                else:
                    scale = (beta / alpha * (1 + 1 / len(x))).sqrt().numpy()
                    density = stats.t.logpdf(difference, df=2 * alpha, scale=scale)
                assert float(logits[row, i, code]) == pytest.approx(density.sum(), rel=1e-9)
        absent = [code for code in range(5) if code not in present(given, row)]
        assert (logits[row][:, absent] == -1e9).all()


@pytest.mark.parametrize("map_", [False, True])
def test_gemcl_parameters(map_: bool) -> None:
    """α and β start at 100 and 1000; gradients by differences; any step leaves the variance above 0."""
    given = uneven()
    model = GeMCL(nn.Identity(), 5, map=map_).double()
    assert math.exp(model.log_alpha.item()) == pytest.approx(100)
    assert math.exp(model.log_beta.item()) == pytest.approx(1000)

    def logits(alpha: Tensor, beta: Tensor) -> Tensor:
        return torch.func.functional_call(model, {"log_alpha": alpha, "log_beta": beta}, (given,)).prediction

    values = [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(logits, values)
    with torch.no_grad():
        for p in model.parameters():
            p.sub_(12)
    assert torch.isfinite(model(given).prediction).all()


@pytest.mark.parametrize("learner", [PrototypicalNetwork, GeMCL])
def test_a_query_of_an_absent_class(learner: Any) -> None:
    """Its cross-entropy and gradients are finite; a query on top of its prototype is no trouble."""
    torch.manual_seed(0)
    given = uneven()
    given = given._replace(query_y=torch.full_like(given.query_y, 3), query_x=given.x[:, [4]].expand(-1, 4, -1))
    model = learner(nn.Linear(3, 6), 5).double()
    loss = F.cross_entropy(model(given).prediction.flatten(0, 1), given.query_y.flatten())
    assert torch.isfinite(loss)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_encoder_gradients_of_the_prototypes() -> None:
    """By differences, through prototypes and queries."""
    torch.manual_seed(0)
    given = uneven()
    for model in (PrototypicalNetwork(nn.Linear(3, 4), 5).double(), GeMCL(nn.Linear(3, 4), 5).double()):

        def logits(weight: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, {"encoder.weight": weight}, (given,)).prediction

        weight = model.encoder.weight.detach().clone().requires_grad_()
        assert torch.autograd.gradcheck(logits, (weight,), fast_mode=True)


def test_images_are_encoded_as_a_batch() -> None:
    """The encoder sees [N, *shape]: stream and queries of all episodes together."""
    shapes = []

    class Encoder(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            shapes.append(tuple(x.shape))
            return x.flatten(1)

    code = torch.tensor([[0, 0, 1]] * 2)
    none = torch.zeros(2, 5).long()
    given = Episode(torch.rand(2, 3, 1, 4, 4), code, code, torch.rand(2, 5, 1, 4, 4), none, none)
    assert PrototypicalNetwork(Encoder(), 2)(given).prediction.shape == (2, 5, 2)
    assert GeMCL(Encoder(), 2)(given).prediction.shape == (2, 5, 2)
    assert OML(Encoder(), 16, 2, "class", hidden=3)(given).prediction.shape == (2, 5, 2)
    assert shapes == [(16, 1, 4, 4)] * 3
    assert nearest_class_mean(given, 2).shape == (2, 5)


def offline(kind: str, **changes: Any) -> Offline:
    settings: dict[str, Any] = {"steps": 20, "lr": 1e-2, "batch": 4, "make_encoder": lambda: nn.Linear(4, 7)} | changes
    return Offline((4,), kind, OUTPUTS[kind], **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_offline_is_each_network_by_itself(kind: str) -> None:
    """With the whole stream as batch: B ordinary networks, each trained by an ordinary Adam."""
    given = single(episode(kind, batch=3))
    found = offline(kind, batch=99)(given).prediction
    torch.manual_seed(0)  # as Offline draws them
    networks = [nn.Sequential(nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, OUTPUTS[kind])) for _ in range(3)]
    for row, network in enumerate(networks):
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for _ in range(20):
            outs = network(given.x[row])
            loss = torch.stack([by_hand(kind, o, y) for o, y in zip(outs, given.y[row], strict=True)]).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        answer = network(given.query_x[row]).detach()
        torch.testing.assert_close(found[row], torch.tanh(answer) if kind == "image" else answer, rtol=0, atol=1e-5)


def test_offline_learns_and_repeats() -> None:
    """Mini-batches on separated classes: nearly no error; the same again; the global generator stays as it is."""
    given = single(episode("class", batch=20, shots=5))
    given = given._replace(x=given.x / 10, query_x=given.query_x / 10)
    model = offline("class", steps=100, lr=3e-2, make_encoder=lambda: nn.Sequential(nn.Flatten(), nn.Linear(4, 16)))
    generator = torch.get_rng_state()
    with torch.no_grad():
        first = model(given).prediction
    assert not first.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(model(given).prediction, first)
    assert (first.argmax(-1) == given.query_y).float().mean() > 0.9
    assert [p.numel() for p in model.parameters()] == [1]
    assert model.nothing.grad is None


def test_offline_refuses_batch_norm() -> None:
    with pytest.raises(UserError, match="without batch norm"):
        offline("class", make_encoder=lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_what_learners_say_of_themselves(kind: str) -> None:
    learners: list[Any] = [oml(kind), offline(kind)]
    if kind == "class":
        learners += [PrototypicalNetwork(nn.Identity(), 5), GeMCL(nn.Identity(), 5)]
    for learner in learners:
        assert learner.kind == kind
        assert learner.outputs == OUTPUTS[kind]
        assert learner.vocabulary == (5 if kind == "class" else 0)


@pytest.mark.parametrize("kind", KINDS)
def test_episodes_of_another_kind(kind: str) -> None:
    """One line, where the loss would broadcast or torch speak for itself."""
    learners: list[Any] = [oml(kind).float(), offline(kind, steps=1)]
    if kind == "class":
        learners += [PrototypicalNetwork(nn.Identity(), 5), GeMCL(nn.Identity(), 5)]
        learners.append(lambda episode: nearest_class_mean(episode, 5))
    for learner in learners:
        learner(single(episode(kind)))
        for other in KINDS:
            if other != kind:
                with pytest.raises(UserError, match=r"(classes want codes|wants targets)") as caught:
                    learner(single(episode(other)))
                assert "\n" not in str(caught.value)
        given = single(episode(kind))
        with pytest.raises(UserError, match="no episodes"):
            learner(given.take(slice(0, 0)))
        with pytest.raises(UserError, match="query_y is"):
            learner(given._replace(query_y=given.query_y[:, :1]))


def test_offline_wants_its_own_examples() -> None:
    given = single(episode("class"))
    with pytest.raises(UserError, match=r"examples have the shape \(3,\): the learner wants \(4,\)"):
        offline("class")(given._replace(x=given.x[..., :3], query_x=given.query_x[..., :3]))
