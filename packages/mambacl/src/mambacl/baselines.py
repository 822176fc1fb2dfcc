"""What MambaCL is compared with: OML, prototypical network, GeMCL, and two references that are not meta-trained.

Shapes: B episodes, M stream examples, Q queries, V symbols of the vocabulary, O outputs, d width of the encoder.
Sequence models other than Mamba are in :mod:`mambacl.attention`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from metazoo.errors import UserError
from torch import Tensor, nn

from mambacl.data import Episode
from mambacl.episodes import check_shapes
from mambacl.model import Output
from mambacl.selectivity import task_loss

ABSENT = -1e9  # logit of a symbol that the stream lacks: its cross-entropy stays finite


def _encode(encoder: nn.Module, episode: Episode) -> tuple[Tensor, Tensor]:
    """Stream [B, M, d] and queries [B, Q, d], encoded together: batch norm has one set of statistics."""
    x = torch.cat([episode.x, episode.query_x], 1)
    encoded = encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])
    stream, queries = encoded.split([episode.x.shape[1], episode.query_x.shape[1]], 1)
    return stream, queries


class OML(nn.Module):
    """Online-aware meta-learning (arXiv 1905.12588), as in the precursor: SGD in the stream, one example at a time.

    The encoder is slow: the meta-objective alone trains it. The layers after it are fast: every example of the stream
    changes them by one step of SGD, in order, and the meta-gradient goes through all steps, to their initial weights
    and to the log of the inner learning rate.

    Args:
        encoder: [N, *shape] -> [N, d]. width: d. outputs: V, or O. kind: class, vector, angle or image (tanh); of the
            inner loss too. hidden: units of the fast layers. fast_layers: how many, 2 or more; ReLU between them, no
            bias in the last. inner_lr: where the inner learning rate starts.

    Raises:
        UserError: less than 2 fast layers.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        outputs: int,
        kind: str,
        *,
        hidden: int,
        fast_layers: int = 2,
        inner_lr: float = 0.03,
    ) -> None:
        super().__init__()
        if fast_layers < 2:
            raise UserError(f"--fast-layers is {fast_layers}: give 2 or more")
        self.kind, self.outputs, self.vocabulary = kind, outputs, outputs if kind == "class" else 0
        self.encoder = encoder
        sizes = [width, *[hidden] * (fast_layers - 1), outputs]
        self.weights = nn.ParameterList(torch.empty(o, i) for i, o in pairwise(sizes))
        self.biases = nn.ParameterList(torch.zeros(o) for o in sizes[1:-1])
        for weight in self.weights:
            nn.init.xavier_normal_(weight)
        self.inner_log_lr = nn.Parameter(torch.tensor(math.log(inner_lr)))

    def forward(self, episode: Episode) -> Output:
        """Learn the stream, then answer; second order where gradients are recorded; also under torch.no_grad.

        Returns:
            prediction [B, Q, O]; no associations.

        Raises:
            UserError: episodes of another kind.
        """
        check_shapes(episode, self.kind, outputs=self.outputs)
        outer = torch.is_grad_enabled()
        stream, queries = _encode(self.encoder, episode)
        with torch.autocast(stream.device.type, enabled=False):
            fast = [p.expand(len(stream), *p.shape) for p in (*self.weights, *self.biases)]
            lr = self.inner_log_lr.exp()
            stream, queries = stream.to(lr.dtype), queries.to(lr.dtype)
            with torch.enable_grad():
                for i in range(stream.shape[1]):
                    if not outer:
                        fast = [p.detach().requires_grad_() for p in fast]
                    now = slice(i, i + 1)
                    loss = task_loss(self.kind, self._answer(stream[:, now], fast), episode.y[:, now]).sum()
                    gradients = torch.autograd.grad(loss, fast, create_graph=outer)
                    fast = [p - lr * gradient for p, gradient in zip(fast, gradients, strict=True)]
            prediction = self._answer(queries, fast)
        return Output(prediction, [])

    def _answer(self, h: Tensor, fast: Sequence[Tensor]) -> Tensor:
        """[B, n, d] -> [B, n, O] by fast weights with a leading dimension B."""
        weights, biases = fast[: len(self.weights)], fast[len(self.weights) :]
        for weight, bias in zip(weights[:-1], biases, strict=True):
            h = F.relu(torch.baddbmm(bias.unsqueeze(1), h, weight.mT))
        h = torch.bmm(h, weights[-1].mT)
        return torch.tanh(h) if self.kind == "image" else h


def _classes(x: Tensor, y: Tensor, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of each class [B, V, d], how many examples it has [B, V], and their indicator [B, M, V].

    Args:
        x: [B, M, d]. y: codes [B, M].
    """
    indicator = F.one_hot(y.long(), vocabulary).to(x.dtype)
    count = indicator.sum(1)
    return indicator.mT @ x / count.clamp(min=1).unsqueeze(-1), count, indicator


class PrototypicalNetwork(nn.Module):
    """Prototypical network (arXiv 1703.05175): logits −‖f(query) − mean of f(class)‖². Classes only.

    Args:
        encoder: f, [N, *shape] -> [N, d]. vocabulary: V.
    """

    kind = "class"

    def __init__(self, encoder: nn.Module, vocabulary: int) -> None:
        super().__init__()
        self.encoder, self.outputs, self.vocabulary = encoder, vocabulary, vocabulary

    def forward(self, episode: Episode) -> Output:
        """prediction [B, Q, V]: −1e9 for symbols that the stream lacks; no associations.

        Raises:
            UserError: episodes that are not of classes.
        """
        check_shapes(episode, self.kind)
        stream, queries = _encode(self.encoder, episode)
        return Output(_prototype_logits(stream, episode.y, queries, self.vocabulary), [])


def _prototype_logits(x: Tensor, y: Tensor, queries: Tensor, vocabulary: int) -> Tensor:
    """[B, Q, V] of x [B, M, d] with codes y [B, M], and queries [B, Q, d]."""
    with torch.autocast(x.device.type, enabled=False):
        mean, count, _ = _classes(x.to(torch.promote_types(x.dtype, torch.float32)), y, vocabulary)
        # by differences: ‖a‖² − 2ab + ‖b‖² would lose the distance between far points that are close to each other
        distance = torch.cdist(queries.to(mean.dtype), mean, compute_mode="donot_use_mm_for_euclid_dist")
        return (-distance.square()).masked_fill((count == 0).unsqueeze(1), ABSENT)


class GeMCL(nn.Module):
    """Generative meta-continual learning (Banayeeanzade et al., NeurIPS 2021). Classes only.

    Every feature of a class is normal, with a Gamma(α, β) prior on its precision. After n examples α' = α + n/2,
    β' = β + ½ Σ (x − mean)²; a query's logits are its log density by class. That is Student's t of 2α' degrees of
    freedom and squared scale β'/α' · (1 + 1/n); with ``map``, a normal distribution of variance β'/(α' − ½).

    α and β start at 100 and 1000 and are trained as logarithms, which keeps them above 0. The density is the exact one,
    as the authors' code has it up to a constant; the precursor's code counts log variance twice in Student's t.

    Args:
        encoder: [N, *shape] -> [N, d]. vocabulary: V. map: the variance's mode instead of the predictive density.
    """

    kind = "class"

    def __init__(self, encoder: nn.Module, vocabulary: int, *, map: bool = False) -> None:
        super().__init__()
        self.encoder, self.outputs, self.vocabulary, self.map = encoder, vocabulary, vocabulary, map
        self.log_alpha = nn.Parameter(torch.tensor(math.log(100.0)))
        self.log_beta = nn.Parameter(torch.tensor(math.log(1000.0)))

    def forward(self, episode: Episode) -> Output:
        """prediction [B, Q, V]: log densities, −1e9 for symbols that the stream lacks; no associations.

        Raises:
            UserError: episodes that are not of classes.
        """
        check_shapes(episode, self.kind)
        stream, queries = _encode(self.encoder, episode)
        with torch.autocast(stream.device.type, enabled=False):
            stream, queries = stream.to(self.log_alpha.dtype), queries.to(self.log_alpha.dtype)
            mean, count, indicator = _classes(stream, episode.y, self.vocabulary)
            own_mean = indicator @ mean  # [B, M, d]: of each example's class
            scatter = indicator.mT @ (stream - own_mean).square()
            n = count.clamp(min=1).unsqueeze(-1)  # [B, V, 1]
            alpha = self.log_alpha.exp() + n / 2
            beta = self.log_beta.exp() + scatter / 2
            squares = (queries.unsqueeze(2) - mean.unsqueeze(1)).square()  # [B, Q, V, d]
            if self.map:
                variance = (beta / (alpha - 0.5)).unsqueeze(1)
                density = -(squares / variance + (2 * math.pi * variance).log()) / 2
            else:
                freedom, variance = (2 * alpha).unsqueeze(1), (beta / alpha * (1 + 1 / n)).unsqueeze(1)
                half = (freedom + 1) / 2
                density = (
                    torch.lgamma(half) - torch.lgamma(freedom / 2) - (freedom * math.pi * variance).log() / 2
                    - half * torch.log1p(squares / (freedom * variance))
                )  # fmt: skip
            return Output(density.sum(-1).masked_fill((count == 0).unsqueeze(1), ABSENT), [])


class Offline(nn.Module):
    """Upper reference: for each episode a network from scratch, trained on its stream as an ordinary data set.

    Encoder, ReLU and a linear layer, by Adam on mini-batches that are drawn anew from the whole stream for every step;
    the networks of all B episodes are trained at once (torch.func). Nothing is meta-trained: the one parameter, 0, is
    there for optimizers and checkpoints only. Initial weights and batches are drawn from a fixed seed, so the same
    batch of episodes gets the same answers.

    Args:
        shape: of an example. kind: class, vector, angle or image (tanh). outputs: V, or O.
        make_encoder: makes a new encoder [N, *shape] -> [N, d] without batch norm, whose running statistics B networks
            cannot keep apart. steps, lr: of Adam. batch: examples of a mini-batch, without replacement; at most M.

    Raises:
        UserError: an encoder with batch norm.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kind: str,
        outputs: int,
        *,
        make_encoder: Callable[[], nn.Module],
        steps: int,
        lr: float,
        batch: int,
    ) -> None:
        super().__init__()
        self.shape, self.kind, self.outputs = tuple(shape), kind, outputs
        self.vocabulary = outputs if kind == "class" else 0
        self.make_encoder, self.steps, self.lr, self.batch = make_encoder, steps, lr, batch
        self.nothing = nn.Parameter(torch.zeros(()))
        encoder = make_encoder()
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in encoder.modules()):
            raise UserError("the offline reference trains many networks at once: give it an encoder without batch norm")
        with torch.no_grad():
            self.width = encoder(torch.zeros(1, *shape)).shape[-1]

    def forward(self, episode: Episode) -> Output:
        """Train on the stream, then answer, also under torch.no_grad; prediction [B, Q, O] has no gradient.

        Raises:
            UserError: episodes of another kind, or of other examples.
        """
        check_shapes(episode, self.kind, self.shape, self.outputs)
        count, examples = episode.x.shape[:2]
        device = episode.x.device
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            networks = [self._network().to(device) for _ in range(count)]
            parameters, buffers = torch.func.stack_module_state(networks)
            answer = torch.func.vmap(lambda *state: torch.func.functional_call(networks[0], state[:2], state[2]))
            optimizer = torch.optim.Adam(parameters.values(), lr=self.lr)
            rows = torch.arange(count, device=device).unsqueeze(1)
            for _ in range(self.steps):
                chosen = torch.rand(count, examples).argsort(1)[:, : self.batch].to(device)
                prediction = answer(parameters, buffers, episode.x[rows, chosen])
                loss = task_loss(self.kind, prediction, episode.y[rows, chosen]).mean(1).sum()
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
            return Output(answer(parameters, buffers, episode.query_x).detach(), [])

    def _network(self) -> nn.Module:
        layers = [self.make_encoder(), nn.ReLU(), nn.Linear(self.width, self.outputs)]
        return nn.Sequential(*layers, *([nn.Tanh()] if self.kind == "image" else []))


def nearest_class_mean(episode: Episode, vocabulary: int) -> Tensor:
    """Codes [B, Q] of the classes whose mean raw input in the stream is nearest.

    For Gaussian features of one spread this is what Bayes' rule says up to the means' own errors.

    Raises:
        UserError: episodes that are not of classes.
    """
    check_shapes(episode, "class")
    return _prototype_logits(episode.x.flatten(2), episode.y, episode.query_x.flatten(2), vocabulary).argmax(-1)
