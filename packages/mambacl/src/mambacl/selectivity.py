"""The meta-objective: the loss of the queries, and the selectivity regulariser (Section 3.3 of the paper).

For a query of task k, p is uniform over the stream's tokens (x and y) of that task's examples, q the model's own
association of the query with all tokens of the stream, and ℓ_slct = KL(p ‖ q), averaged over queries, heads and blocks.
The meta-objective is the mean of ℓ(prediction, target) + λ ℓ_slct.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from metazoo.errors import UserError
from torch import Tensor

from mambacl.episodes import KINDS, check_labels

LEAST_NORM = 0.1  # of a predicted angle
FLOOR = math.log(1e-9)  # of log q: see selectivity_loss


def task_loss(kind: str, prediction: Tensor, target: Tensor) -> Tensor:
    """The loss of each query [B, Q].

    Args:
        kind: class: cross-entropy of logits [B, Q, O] on codes [B, Q]. vector, image: mean squared error of [B, Q, O].
            angle: 1 − cos between prediction and (cos, sin) [B, Q, 2]; the prediction's norm counts as 0.1 at least.

    Raises:
        UserError: an unknown kind, or shapes or dtypes that are not its own.
    """
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: one of {', '.join(KINDS)}")
    check_labels(target, kind, name="target")
    if prediction.ndim != 3 or prediction.shape[: target.ndim] != target.shape:
        raise UserError(f"predictions are {tuple(prediction.shape)} for targets {tuple(target.shape)}: give [B, Q, O]")
    if kind == "class":
        return F.cross_entropy(prediction.flatten(0, 1), target.flatten(), reduction="none").view_as(target)
    if kind == "angle":
        # clamped before the root, whose second derivative at 0 would be NaN
        norm = prediction.square().sum(-1, keepdim=True).clamp(min=LEAST_NORM**2).sqrt()
        return 1 - (prediction / norm * target).sum(-1)
    return (prediction - target).square().mean(-1)


def relevant_tokens(stream_task: Tensor, query_task: Tensor) -> Tensor:
    """p [B, Q, L]: uniform over the tokens of the stream's examples of the query's own task, 0 elsewhere.

    Args:
        stream_task: [B, M] task of each example; it has two tokens, so L = 2 M. query_task: [B, Q].

    Raises:
        UserError: shapes are others.
    """
    if stream_task.ndim != 2 or query_task.ndim != 2 or len(stream_task) != len(query_task):
        raise UserError(
            f"tasks of the stream are {tuple(stream_task.shape)}, of queries {tuple(query_task.shape)}: give [B, M] "
            "and [B, Q]"
        )
    same = (query_task.unsqueeze(2) == stream_task.unsqueeze(1)).float().repeat_interleave(2, 2)
    return same / same.sum(-1, keepdim=True).clamp(min=1)


def selectivity_loss(log_q: Tensor, p: Tensor) -> Tensor:
    """ℓ_slct = KL(p ‖ q) = Σ_j p_j (log p_j − log q_j), its mean over queries and heads: a number, at least 0.

    Args:
        log_q: [B, H, Q, L] of one block. p: [B, Q, L], rows that sum to 1 (rows of zeros count 0).

    log q counts as log 1e-9 at least: a share may vanish (a decayed kernel, a query that asks amid the stream and has
    not seen the token), and KL would be infinite. Below that a token is off the loss's slope: its own log q has no
    gradient, so it is not pulled back by itself, only as the other tokens of p push the shares.

    Raises:
        UserError: shapes do not agree.
    """
    _agree(log_q, p)
    entropy = torch.xlogy(p, p).sum(-1).unsqueeze(1)  # Σ p log p
    cross = (p.unsqueeze(1) * log_q.clamp(min=FLOOR)).sum(-1)
    return (entropy - cross).mean()


def relevant_mass(log_q: Tensor, p: Tensor) -> Tensor:
    """Σ_{j relevant} q_j, the mean over queries and heads: 1 when only the right tokens are recalled.

    Args and errors as :func:`selectivity_loss`.
    """
    _agree(log_q, p)
    return (torch.exp(log_q) * (p > 0).unsqueeze(1)).sum(-1).mean()


def task_attention(log_q: Tensor, p: Tensor) -> Tensor:
    """The precursor's loss: −log of the summed share of the right task's tokens, on the first half of the heads.

    Args:
        log_q: [B, H, Q, L] of one block. p: [B, Q, L], of which only the support counts.

    The log is clamped as in :func:`selectivity_loss`: a right mass below 1e-9 has no gradient.

    Raises:
        UserError: shapes do not agree, or a task's tokens do not stand side by side (looked at on the CPU alone; a GPU
            would have to be waited for at every step, see :func:`mambacl.episodes.validate`).
    """
    _agree(log_q, p)
    if p.device.type == "cpu":
        right = F.pad(p > 0, (1, 0))
        if ((right[..., 1:] & ~right[..., :-1]).sum(-1) > 1).any():
            raise UserError("tasks come back in the stream: sort its examples by task, or leave the loss on tasks out")
    half = log_q[:, : max(1, log_q.shape[1] // 2)]
    inside = half.masked_fill((p == 0).unsqueeze(1), -torch.inf)
    return -torch.logsumexp(inside, -1).clamp(min=FLOOR).mean()


def _agree(log_q: Tensor, p: Tensor) -> None:
    if log_q.ndim != 4 or p.shape != (log_q.shape[0], *log_q.shape[2:]):
        raise UserError(f"log q is {tuple(log_q.shape)}, p {tuple(p.shape)}: give [B, H, Q, L] and [B, Q, L]")
