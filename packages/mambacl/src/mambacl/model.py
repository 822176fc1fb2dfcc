"""The continual learner: encoders, the Mamba block with a state that can be carried and forked, the whole model.

Shapes: B episodes, M = T·S stream examples, L = 2 M tokens, Q queries, d width, D channels, N state, H heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.distributed
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from metazoo.errors import UserError
from torch import Tensor, nn

from mambacl.attention import AttentionBlock, wide
from mambacl.data import Episode
from mambacl.episodes import INTEGERS, KINDS, check_codes, check_labels, check_shapes, finite
from mambacl.scan import selective_scan

State = tuple[Any, ...]

ONE_VALUE = (
    "batch norm in training has one value a channel, which has no variance: give more episodes or examples a part (a "
    "larger --batch-size, more --shots, a smaller --accumulation), or call eval() to answer"
)


class Output(NamedTuple):
    """What a learner answers.

    prediction [B, Q, O]: logits over the vocabulary, or vectors; associations: per block log q [B, H, Q, L], the
    shares of the stream's tokens in what a query recalls (none for learners that are no sequence models).
    """

    prediction: Tensor
    associations: list[Tensor]


class LearnerState(NamedTuple):
    """All that a learner keeps of a stream: a state for each block, and how many tokens it was."""

    blocks: tuple[State, ...]
    tokens: int

    @property
    def bytes(self) -> int:
        """Bytes of the states of all B streams; without padding or Python's own."""
        return sum(tensor.numel() * tensor.element_size() for state in self.blocks for tensor in state)


class _SumOverProcesses(torch.autograd.Function):
    """Sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous().clone()
        torch.distributed.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.contiguous().clone()
        torch.distributed.all_reduce(grad)
        return grad


class BatchNorm(nn.BatchNorm2d):
    """Batch normalisation over the batch of all processes (SyncBatchNorm, which torch has for GPUs only).

    So that two processes train what one does. On one process it is torch's own.
    """

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, height, width] -> the same shape.

        Raises:
            UserError: one value a channel in training, over all processes: it has no variance.
        """
        distributed = torch.distributed
        alone = x.numel() <= x.shape[1]
        if not (self.training and distributed.is_available() and distributed.is_initialized()):
            if self.training and alone:
                raise UserError(ONE_VALUE)
            return super().forward(x)
        values = x.float()  # statistics in float32 under mixed precision too
        shape = (1, -1, 1, 1)
        count = values.new_tensor([values.numel() / values.shape[1]])
        sums = _SumOverProcesses.apply(torch.cat([values.sum((0, 2, 3)), count]))
        total = sums[-1]
        if alone and float(total) <= 1:  # else the sum is not looked at: a GPU would be waited for
            raise UserError(ONE_VALUE)
        mean = sums[:-1] / total
        centred = values - mean.view(shape)
        variance = _SumOverProcesses.apply(centred.square().sum((0, 2, 3))) / total
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (total / (total - 1)), self.momentum)
        factor = self.weight * (variance + self.eps).rsqrt()
        return (centred * factor.view(shape) + self.bias.view(shape)).to(x.dtype)


class Encoder(nn.Module):
    """Encoder of an example, trained from scratch.

    Args:
        kind: linear; mlp (3 linear layers with batch norm and ReLU, no biases); conv3 (3 strided convolutions of
            ``hidden`` channels); conv5 (32, 64, 128, 256, 256 channels, strides 1, 2, 2, 2, 2); resnet18.
        shape: of an example; images are (channels, height, width). hidden: width of mlp, channels of conv3.
        width: d of the output. norm: batch norm; without it, for learners that cannot share statistics.

    Raises:
        UserError: a convolution for examples that are no images.
    """

    def __init__(self, kind: str, shape: Sequence[int], hidden: int, width: int, *, norm: bool = True) -> None:
        super().__init__()
        self.shape = tuple(shape)
        if kind not in ("linear", "mlp", "conv3", "conv5", "resnet18"):
            raise UserError(f"encoder {kind!r}: one of linear, mlp, conv3, conv5, resnet18")
        if kind in ("linear", "mlp"):
            sizes = [math.prod(shape), *([hidden] * 3 if kind == "mlp" else [])]
            layers: list[nn.Module] = [nn.Flatten()]
            for i, o in itertools.pairwise(sizes):
                layers += [nn.Linear(i, o, bias=not norm), *([_Norm1d(o)] if norm else []), nn.ReLU()]
            self.net = nn.Sequential(*layers, nn.Linear(sizes[-1], width))
            return
        if len(shape) != 3:
            raise UserError(f"--encoder {kind} needs images, but an example has the shape {tuple(shape)}: use mlp")
        if kind == "resnet18":
            body: nn.Module = _resnet18(shape[0], norm)
        else:
            channels, strides = (
                ([hidden] * 3, [2, 2, 2]) if kind == "conv3" else ([32, 64, 128, 256, 256], [1, 2, 2, 2, 2])
            )
            layers = []
            for i, o, stride in zip([shape[0], *channels], channels, strides, strict=False):
                layers += [*_convolution(i, o, stride, norm), nn.ReLU()]
            body = nn.Sequential(*layers)
        with torch.no_grad():
            features = body.eval()(torch.zeros(1, *shape)).numel()
        self.net = nn.Sequential(body.train(), nn.Flatten(), nn.Linear(features, width))

    def forward(self, x: Tensor) -> Tensor:
        """[..., *shape] -> [..., d]; batch norm takes its statistics over all leading dimensions together."""
        leading = x.shape[: x.ndim - len(self.shape)]
        return self.net(x.reshape(-1, *self.shape)).view(*leading, -1)  # type: ignore[no-any-return]


class _Norm1d(nn.Module):
    """Batch norm of vectors [N, C]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = BatchNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x[..., None, None])[..., 0, 0]  # type: ignore[no-any-return]


def _convolution(i: int, o: int, stride: int, norm: bool, size: int = 3) -> list[nn.Module]:
    convolution = nn.Conv2d(i, o, size, stride, padding=size // 2, bias=not norm)
    return [convolution, *([BatchNorm(o)] if norm else [])]


class _Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, i: int, o: int, stride: int, norm: bool) -> None:
        super().__init__()
        self.body = nn.Sequential(*_convolution(i, o, stride, norm), nn.ReLU(), *_convolution(o, o, 1, norm))
        same = i == o and stride == 1
        self.shortcut = nn.Identity() if same else nn.Sequential(*_convolution(i, o, stride, norm, size=1))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def _resnet18(channels: int, norm: bool) -> nn.Sequential:
    """ResNet-18 for small images: a 3 x 3 stem of stride 1, no max pooling; the mean over pixels at the end."""
    layers: list[nn.Module] = [*_convolution(channels, 64, 1, norm), nn.ReLU()]
    width = 64
    for o, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        layers += [_Residual(width, o, stride, norm), _Residual(o, o, 1, norm)]
        width = o
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1))


class Block(Protocol):
    """What the learner asks of a block, Mamba's or attention's."""

    def __call__(self, h: Tensor, state: State | None = None) -> tuple[Tensor, State, Tensor]:
        """Tokens h [B, L, d] after ``state``, causally; (h, the state after them, their keys [B, H, L, k])."""

    def query(self, h: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Q independent tokens h [B, Q, d], each as if appended alone; (h, their queries [B, H, Q, k])."""

    def log_association(self, queries: Tensor, keys: Tensor) -> Tensor:
        """log q [B, H, Q, L] of the tokens with ``keys``."""


class MambaBlock(nn.Module):
    """A residual Mamba block (arXiv 2312.00752, Section 3.4), whose state is (the convolution's window, S).

    Args:
        width: d. state_size: N. expand: D / d. conv: width of the causal depthwise convolution. blocks: how many the
            network has (out_proj is scaled by 1/√blocks). chunk: of the scan. association: which log q the queries
            have, see :meth:`log_association`. experts: of the MLP after the block; 0 for none.
    """

    def __init__(
        self,
        width: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        conv: int = 4,
        blocks: int = 1,
        chunk: int = 16,
        association: Literal["cb", "full"] = "cb",
        experts: int = 0,
    ) -> None:
        super().__init__()
        inner, rank = expand * width, math.ceil(width / 16)
        self.inner, self.rank, self.state_size, self.chunk = inner, rank, state_size, chunk
        self.association = association
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv, groups=inner)
        self.x_proj = nn.Linear(inner, rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, state_size + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.mlp = ExpertMLP(width, experts) if experts else None
        self.watch, self.statistics = False, dict[str, Tensor]()  # of the last stream, where they are asked for
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(rank**-0.5), rank**-0.5)
            step = torch.exp(torch.rand(inner) * math.log(1e-1 / 1e-3) + math.log(1e-3)).clamp(min=1e-4)
            self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus
            nn.init.kaiming_uniform_(self.out_proj.weight, a=math.sqrt(5))
            self.out_proj.weight /= math.sqrt(blocks)

    def forward(self, h: Tensor, state: State | None = None) -> tuple[Tensor, State, Tensor]:
        """Tokens h [B, L, d] after ``state`` (None: the beginning).

        Returns:
            h [B, L, d]; the state after them: window [B, conv − 1, D] and S [B, D, N]; keys [B, 1, L, N (+ D)]: B_j,
            with the association "full" also Δ_j.
        """
        window, S = (None, None) if state is None else state
        y, window, S, delta, B, _ = self._scan(h, window, S)
        keys = B if self.association == "cb" else torch.cat([B, delta], -1)
        if self.watch:
            flat = delta.detach().flatten()
            self.statistics = {
                "delta_mean": flat.mean(),
                "delta_p95": flat.kthvalue(math.ceil(0.95 * len(flat))).values,
                "state_norm": S.detach().flatten(1).norm(dim=1).mean(),
            }
        return self._out(h, y), (window, S), keys.unsqueeze(1)

    def query(self, h: Tensor, state: State) -> tuple[Tensor, Tensor]:
        """Q independent tokens h [B, Q, d]: the state is forked to B·Q rows, one step each, and thrown away.

        Returns:
            h [B, Q, d] and queries [B, 1, Q, N (+ D)]: C_i, with the association "full" also Δ_i.
        """
        window, S = state
        count, queries = h.shape[:2]
        rows = (count * queries, 1, h.shape[2])
        forked = [t.unsqueeze(1).expand(-1, queries, *t.shape[1:]).flatten(0, 1) for t in (window, S)]
        y, _, _, delta, _, C = self._scan(h.reshape(rows), forked[0], forked[1])
        found = C if self.association == "cb" else torch.cat([C, delta], -1)
        return self._out(h, y.view(count, queries, -1)), found.view(count, 1, queries, -1)

    def log_association(self, queries: Tensor, keys: Tensor) -> Tensor:
        """log q_i [B, 1, Q, L], the shares of the earlier tokens j in what a query i recalls.

        "cb": softmax_j(C_i·B_j / √N): C plays a query, B a key; neither Δ nor A is in it. "full": the scan's own kernel
        Σ_n C_{i,n} exp(A_{d,n} Σ_{j<r≤i} Δ_{r,d}) Δ_{j,d} B_{j,n}, its absolute value summed over channels d and
        normalised over j, and then at least 1e-9: an early token's share decays to 0, and its log has no gradient. A
        clamped token has none either.
        """
        if self.association == "cb":
            return torch.log_softmax(wide(queries) @ wide(keys).mT / math.sqrt(self.state_size), -1)
        n = self.state_size
        B, delta = wide(keys)[:, 0].split([n, self.inner], -1)  # [B, L, N], [B, L, D]
        C, last = wide(queries)[:, 0].split([n, self.inner], -1)
        after = delta.sum(1, keepdim=True) - delta.cumsum(1)  # Σ_{j<r≤L} Δ_r
        kernel = delta.new_zeros(C.shape[0], C.shape[1], *delta.shape[1:])
        A = -torch.exp(wide(self.A_log))
        for i in range(n):  # [B, Q, L, D] at a time, not N of them
            decay = torch.exp(A[:, i] * after).unsqueeze(1) * torch.exp(A[:, i] * last).unsqueeze(2)
            kernel = kernel + (C[..., i].unsqueeze(2) * B[..., i].unsqueeze(1)).unsqueeze(-1) * decay
        mass = (kernel * delta.unsqueeze(1)).abs().sum(-1)
        share = mass / mass.sum(-1, keepdim=True).clamp(min=1e-30)
        return torch.log(share.clamp(min=1e-9)).unsqueeze(1)

    def _scan(
        self, h: Tensor, window: Tensor | None, S: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """y [B, L, D] before out_proj, the new window and S, and Δ, B, C of the tokens."""
        x, z = self.in_proj(self.norm(h)).chunk(2, -1)
        width = self.conv1d.kernel_size[0]
        if window is None:
            window = x.new_zeros(x.shape[0], width - 1, self.inner)
        padded = torch.cat([window.to(x.dtype), x], 1)
        length = x.shape[1]
        weight = self.conv1d.weight.squeeze(1)
        x = self.conv1d.bias + sum(padded[:, k : k + length] * weight[:, k] for k in range(width))  # type: ignore[operator]
        x = F.silu(x)
        dt, B, C = self.x_proj(x).split([self.rank, self.state_size, self.state_size], -1)
        delta = F.softplus(wide(self.dt_proj(dt)))
        y, S = selective_scan(x, delta, -torch.exp(wide(self.A_log)), B, C, self.D, state=S, chunk=self.chunk)
        # a copy: a view would keep the whole stream's buffer alive
        return y * F.silu(z), padded[:, length:].clone(), S, delta, B, C

    def _out(self, h: Tensor, y: Tensor) -> Tensor:
        h = h + self.out_proj(y)
        return h if self.mlp is None else h + self.mlp(h)


class ExpertMLP(nn.Module):
    """A mixture-of-experts MLP: each token goes to the expert that the router likes best, weighted by its share.

    Args:
        width: d. experts: their number. Each has a hidden layer of 2 d units (SiLU).
    """

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.randn(experts, width, 2 * width) / math.sqrt(width))
        self.down = nn.Parameter(torch.randn(experts, 2 * width, width) / math.sqrt(2 * width))

    def forward(self, h: Tensor) -> Tensor:
        """[..., d] -> [..., d]."""
        tokens = self.norm(h).flatten(0, -2)
        share, chosen = torch.softmax(self.router(tokens).float(), -1).max(-1)
        out = torch.zeros_like(tokens)
        for expert in range(len(self.up)):
            mine = (chosen == expert).nonzero().squeeze(1)
            hidden = F.silu(tokens[mine] @ self.up[expert])
            out = out.index_add(0, mine, (hidden @ self.down[expert] * share[mine].unsqueeze(1)).to(out.dtype))
        return out.view_as(h)


def sinusoids(first: int, count: int, width: int, device: torch.device) -> Tensor:
    """Fixed positions [count, d] of tokens first, first + 1, …: sines in even, cosines in odd columns."""
    place = torch.arange(first, first + count, device=device, dtype=torch.float32).unsqueeze(1)
    rate = torch.exp(torch.arange(0, width, 2, device=device, dtype=torch.float32) * (-math.log(10_000.0) / width))
    return torch.stack([torch.sin(place * rate), torch.cos(place * rate)], -1).flatten(1)


class ContinualLearner(nn.Module, PyTorchModelHubMixin):
    """A sequence model as continual learner: it reads (x_1, y_1, x_2, y_2, …) once, and answers queries from its state.

    Args:
        shape: of an example. kind: class (codes), vector, angle or image; the loss, see
            :func:`mambacl.selectivity.task_loss`. outputs: symbols of the vocabulary, or numbers of a target.
        method: mamba, transformer, linear_transformer or performer. The others: fields of
            :class:`mambacl.config.Config` of the same name.

    Raises:
        UserError: an unknown method or encoder, or one that does not fit the examples.
    """

    def __init__(
        self,
        shape: Sequence[int],
        kind: str,
        outputs: int,
        *,
        method: str = "mamba",
        width: int = 32,
        blocks: int = 2,
        state_size: int = 16,
        expand: int = 2,
        conv: int = 4,
        experts: int = 0,
        chunk: int = 16,
        association: Literal["cb", "full"] = "cb",
        heads: int = 4,
        head_size: int = 8,
        value_size: int = 8,
        feedforward: int = 64,
        dropout: float = 0.0,
        norm: bool = True,
        positions: bool = True,
        favor_features: int = 32,
        favor_redraw: int = 1000,
        encoder: str = "linear",
        encoder_width: int = 64,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise UserError(f"kind {kind!r}: one of {', '.join(KINDS)}")
        self.shape, self.kind, self.outputs, self.method = tuple(shape), kind, outputs, method
        self.positions = positions and method != "mamba"
        self.encoder = Encoder(encoder, shape, encoder_width, width)
        if kind == "class":
            self.label: nn.Module = nn.Embedding(outputs, width)
        else:
            self.label = Encoder("mlp", (outputs,), encoder_width, width)
        maps = {"transformer": None, "linear_transformer": "elu", "performer": "favor"}
        if method == "mamba":
            built: list[nn.Module] = [
                MambaBlock(
                    width, state_size=state_size, expand=expand, conv=conv, blocks=blocks, chunk=chunk,
                    association=association, experts=experts,
                )
                for _ in range(blocks)
            ]  # fmt: skip
        elif method in maps:
            built = [
                AttentionBlock(
                    width, heads, head_size, value_size, feedforward, feature_map=maps[method],
                    features=favor_features, redraw=favor_redraw, dropout=dropout, norm=norm,
                )
                for _ in range(blocks)
            ]  # fmt: skip
        else:
            raise UserError(f"method {method!r}: one of mamba, {', '.join(maps)}")
        self.blocks = nn.ModuleList(built)
        self.final_norm = nn.RMSNorm(width, eps=1e-5) if method == "mamba" or norm else nn.Identity()
        self.head = nn.Linear(width, outputs)

    def observe(self, x: Tensor, y: Tensor, state: LearnerState | None = None) -> LearnerState:
        """Read labelled examples, in order, after what ``state`` has seen (None: nothing yet).

        Args:
            x: [B, M, *shape], of any floating-point dtype. y: codes [B, M], or targets [B, M, O]. M may be 1: one
                example at a time.

        Returns:
            The state after them. With Mamba, Linear Transformer and Performer it has the same size whatever M is.

        Raises:
            UserError: shapes or dtypes do not agree, with each other or with ``state``; NaN or infinity; a code is
                outside the vocabulary.
        """
        x = self._examples(x, state)
        check_labels(y, self.kind, self.outputs)
        if y.shape[:2] != x.shape[:2]:
            raise UserError(f"labels have the shape {tuple(y.shape)}, examples {tuple(x.shape)}: give one for each")
        if self.kind == "class":
            check_codes(y, self.outputs)
        else:
            finite(y, "y")
        return self._read(self.encoder(x), self.encode_label(y), state)[0]

    def predict(self, x: Tensor, state: LearnerState | None) -> Tensor:
        """Answer queries x [B, Q, *shape] from ``state``, each by itself; the state stays as it is.

        Returns:
            [B, Q, O]: logits over the vocabulary, or targets.

        Raises:
            UserError: nothing was observed before; shapes or dtypes do not agree, also with ``state``; NaN or infinity.
        """
        if state is None or not state.tokens:
            raise UserError("nothing to answer from: observe labelled examples first, then predict from that state")
        return self._answer(self.encoder(self._examples(x, state)), state)[0]

    def forward(self, episode: Episode) -> Output:
        """The whole episode: the stream once, then all queries from the state after it (meta-objective, Section 3).

        Under batch norm in training, stream and queries are encoded together, as in the precursor's code.

        Raises:
            UserError: shapes or dtypes do not agree. No value is looked at, as this runs at every step:
                :func:`mambacl.validate` does, once for episodes of your own.
        """
        check_shapes(episode, self.kind, self.shape, self.outputs)
        stream, labels, asked = self._encode(episode)
        state, keys = self._read(stream, labels, None)
        prediction, queries = self._answer(asked, state)
        return Output(prediction, self._associations(queries, keys))

    def forward_distributed(self, episode: Episode, after: Tensor) -> Output:
        """The episode with query (b, j) asked after task after[b, j], not at the end (the precursor's option).

        Args:
            after: [B, Q] task indices, at least the query's own. All tasks have as many examples.

        Returns:
            As :meth:`forward`; tokens that a query has not seen have log q = −1e9.

        Raises:
            UserError: as :meth:`forward`; tasks do not come one after the other, of as many examples each; or ``after``
                is no task from the query's own on.
        """
        check_shapes(episode, self.kind, self.shape, self.outputs)
        tasks, examples = int(episode.task.max()) + 1, episode.x.shape[1]
        shots = examples // max(1, tasks)
        order = torch.arange(examples, device=episode.task.device) // max(1, shots)
        if tasks * shots != examples or (episode.task != order).any():
            raise UserError(
                "queries amid the stream need tasks 0, 1, … one after the other, of as many examples each: sort the "
                "stream by task, or call forward"
            )
        if after.shape != episode.query_task.shape or after.dtype not in INTEGERS:
            raise UserError(
                f"after is {after.dtype} {tuple(after.shape)}: give a task (int64) for each query "
                f"{tuple(episode.query_task.shape)}"
            )
        if ((after < episode.query_task) | (after >= tasks)).any():
            raise UserError(f"after: a query is asked before its own task, or after task {tasks - 1}, the last one")
        stream, labels, asked = self._encode(episode)
        state: LearnerState | None = None
        keys: list[Tensor] = []
        predictions: list[Tensor] = []
        associations: list[list[Tensor]] = [[] for _ in self.blocks]
        places: list[Tensor] = []
        for task in range(tasks):
            part = slice(task * shots, (task + 1) * shots)
            state, new = self._read(stream[:, part], labels[:, part], state)
            keys = [torch.cat(pair, 2) for pair in zip(keys, new, strict=True)] if keys else new
            rows, columns = (after == task).nonzero(as_tuple=True)
            if not len(rows):
                continue
            mine = LearnerState(tuple(tuple(t[rows] for t in block) for block in state.blocks), state.tokens)
            prediction, queries = self._answer(asked[rows, columns].unsqueeze(1), mine)
            predictions.append(prediction.squeeze(1))
            places.append(rows * after.shape[1] + columns)
            for found, log_q in zip(associations, self._associations(queries, [k[rows] for k in keys]), strict=True):
                unseen = 2 * (examples - (task + 1) * shots)
                found.append(F.pad(log_q.squeeze(2), (0, unseen), value=-1e9))
        order = torch.cat(places).argsort()
        shape = after.shape
        return Output(
            torch.cat(predictions)[order].view(*shape, -1),
            [torch.cat(found)[order].unflatten(0, shape).transpose(1, 2) for found in associations],
        )

    def encode_label(self, y: Tensor) -> Tensor:
        """Label tokens [B, M, d] of codes [B, M] or targets [B, M, O]."""
        return self.label(y.long() if self.kind == "class" else y.to(self.head.weight.dtype))  # type: ignore[no-any-return]

    def _encode(self, episode: Episode) -> tuple[Tensor, Tensor, Tensor]:
        """Encoded stream [B, M, d], its labels [B, M, d] and queries [B, Q, d], each batch norm's statistics of all."""
        encoded = self.encoder(torch.cat([episode.x, episode.query_x], 1).to(self.head.weight.dtype))
        stream, asked = encoded.split([episode.x.shape[1], episode.query_x.shape[1]], 1)
        return stream, self.encode_label(episode.y), asked

    def _read(self, x: Tensor, y: Tensor, state: LearnerState | None) -> tuple[LearnerState, list[Tensor]]:
        """The state after encoded examples and labels [B, M, d], and their keys by block."""
        tokens = torch.stack([wide(x), wide(y)], 2).flatten(1, 2)  # x_1, y_1, x_2, …
        first = 0 if state is None else state.tokens
        if self.positions:
            tokens = tokens + sinusoids(first, tokens.shape[1], tokens.shape[2], tokens.device)
        h, states, keys = tokens, [], []
        for i, block in enumerate(self.blocks):
            h, after, key = block(h, None if state is None else state.blocks[i])
            states.append(after)
            keys.append(key)
        return LearnerState(tuple(states), first + tokens.shape[1]), keys

    def _answer(self, h: Tensor, state: LearnerState) -> tuple[Tensor, list[Tensor]]:
        """Answers to encoded queries [B, Q, d], and their queries by block."""
        h = wide(h)
        if self.positions:
            h = h + sinusoids(state.tokens, 1, h.shape[-1], h.device)
        queries = []
        for block, its in zip(self.blocks, state.blocks, strict=True):
            h, query = block.query(h, its)  # type: ignore[operator]
            queries.append(query)
        prediction = self.head(self.final_norm(h))
        return (torch.tanh(prediction) if self.kind == "image" else prediction), queries

    def _associations(self, queries: list[Tensor], keys: list[Tensor]) -> list[Tensor]:
        pairs = zip(self.blocks, queries, keys, strict=True)
        return [block.log_association(query, key) for block, query, key in pairs]  # type: ignore[operator]

    def _examples(self, x: Tensor, state: LearnerState | None) -> Tensor:
        """x in the parameters' dtype, checked, against the state too."""
        if x.ndim != 2 + len(self.shape) or tuple(x.shape[2:]) != self.shape:
            wanted = ", ".join(["B", "M", *(str(size) for size in self.shape)])
            raise UserError(f"examples have the shape {tuple(x.shape)}: the learner wants [{wanted}]")
        if not x.shape[0] or not x.shape[1]:
            raise UserError("no examples: give at least one")
        if not x.is_floating_point():
            raise UserError(f"x is {x.dtype}: give floating-point numbers, scaled as in meta-training")
        if state is not None and len(state.blocks) != len(self.blocks):
            raise UserError(
                f"the state has {len(state.blocks)} blocks, the learner {len(self.blocks)}: give a state of its own"
            )
        if state is not None and len(state.blocks[0][0]) != len(x):
            raise UserError(
                f"x is of {len(x)} streams (B), the state of {len(state.blocks[0][0])}: give as many as were observed"
            )
        x = x.to(self.head.weight.dtype)
        finite(x, "x")
        return x
