"""The meta-objective's terms against numbers worked out by hand (checks 4, 9 and 13)."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from mambacl.data import EpisodeConfig, FeatureEpisodes
from mambacl.model import ContinualLearner
from mambacl.selectivity import FLOOR, relevant_mass, relevant_tokens, selectivity_loss, task_attention, task_loss
from metazoo.errors import UserError

torch.set_num_threads(1)


def test_relevant_tokens() -> None:
    """Both tokens of each example of the query's task share 1."""
    p = relevant_tokens(torch.tensor([[0, 0, 1]]), torch.tensor([[1, 0]]))
    assert torch.allclose(p, torch.tensor([[[0, 0, 0, 0, 0.5, 0.5], [0.25, 0.25, 0.25, 0.25, 0, 0]]]))


def test_divergence_by_hand() -> None:
    """Check 4: KL(p ‖ q) = −(1/m) Σ_rel log q − log m; 0 iff q = p."""
    p = relevant_tokens(torch.tensor([[0, 0, 1]]), torch.tensor([[1]]))
    q = torch.tensor([0.1, 0.1, 0.1, 0.2, 0.3, 0.2])
    found = selectivity_loss(q.log().view(1, 1, 1, 6), p)
    assert found.item() == pytest.approx(-(math.log(0.3) + math.log(0.2)) / 2 - math.log(2), abs=1e-6)
    assert selectivity_loss(p.unsqueeze(1).clamp(min=1e-30).log(), p).item() == pytest.approx(0, abs=1e-6)
    assert relevant_mass(q.log().view(1, 1, 1, 6), p).item() == pytest.approx(0.5)


def test_mean_over_heads_and_queries() -> None:
    """Two heads, two queries: the mean of the four divergences; log q is at least log 1e-9."""
    p = relevant_tokens(torch.tensor([[0, 1]]), torch.tensor([[0, 1]]))
    log_q = torch.log_softmax(torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(0)), -1)
    alone = [selectivity_loss(log_q[:, h : h + 1, j : j + 1], p[:, j : j + 1]) for h in range(2) for j in range(2)]
    assert selectivity_loss(log_q, p).item() == pytest.approx(torch.stack(alone).mean().item(), abs=1e-6)
    far = torch.tensor([-1e9, 0.0, -1e9, -1e9]).view(1, 1, 1, 4)
    found = selectivity_loss(far, p[:, :1]).item()
    assert found == pytest.approx(-math.log(2) - math.log(1e-9) / 2, rel=1e-6)


def test_task_attention_is_the_log_of_the_right_mass() -> None:
    """Check 13: −log Σ_rel q on the first half of the heads; the other half does not count."""
    p = relevant_tokens(torch.tensor([[0, 0, 1]]), torch.tensor([[0]]))
    q = torch.tensor([[0.1, 0.2, 0.3, 0.1, 0.2, 0.1], [1 / 6] * 6])
    assert task_attention(q.log().view(1, 2, 1, 6), p).item() == pytest.approx(-math.log(0.7), abs=1e-6)


def test_task_attention_is_cross_entropy_of_task_logits() -> None:
    """Check 13: the precursor's form, cross-entropy of logsumexp over each task's 2 S keys."""
    logits = torch.randn(1, 1, 1, 8, generator=torch.Generator().manual_seed(0))
    p = relevant_tokens(torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1]]))
    tasks = torch.logsumexp(logits.view(2, 4), -1)
    wanted = torch.nn.functional.cross_entropy(tasks.unsqueeze(0), torch.tensor([1]))
    assert task_attention(torch.log_softmax(logits, -1), p).item() == pytest.approx(wanted.item(), abs=1e-6)


def test_angle_loss() -> None:
    """Check 9: within [0, 2]; 0 for any positive multiple of norm 0.1 or more; below, the norm counts as 0.1."""
    target = torch.tensor([[[0.6, 0.8]]])
    for factor, wanted in ((1.0, 0.0), (5.0, 0.0), (0.1, 0.0), (-3.0, 2.0), (0.05, 0.5)):
        assert task_loss("angle", factor * target, target).item() == pytest.approx(wanted, abs=1e-6)


def test_losses_of_classes_and_vectors() -> None:
    logits, codes = torch.tensor([[[1.0, 2.0, 0.0]]]), torch.tensor([[0]])
    wanted = math.log(math.exp(1) + math.exp(2) + 1) - 1
    assert task_loss("class", logits, codes).item() == pytest.approx(wanted, abs=1e-6)
    assert task_loss("vector", torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2)).item() == pytest.approx(5.0)


@pytest.mark.parametrize("association", ["cb", "full"])
def test_gradient_of_a_block_s_own_term(association: str) -> None:
    """Check 4: of a block's own "cb" term neither A nor Δ has a gradient, blocks below do; "full" has both."""
    torch.manual_seed(0)
    model = ContinualLearner((8,), "class", 6, width=16, blocks=2, association=association)
    setting = EpisodeConfig(tasks=3, shots=2, test_shots=1, vocabulary=6)
    episode = FeatureEpisodes(8, 0.3, setting).draw(4, torch.Generator().manual_seed(0))
    log_q = model(episode).associations[1]
    selectivity_loss(log_q, relevant_tokens(episode.task, episode.query_task)).backward()
    own, below = model.blocks[1], model.blocks[0]
    for parameter in (own.A_log, own.dt_proj.weight, own.dt_proj.bias):
        if association == "cb":
            assert parameter.grad is None or not parameter.grad.any()
        else:
            assert parameter.grad.abs().max() > 0
    for parameter in (below.A_log, below.dt_proj.weight, own.in_proj.weight, own.x_proj.weight, own.conv1d.weight):
        assert parameter.grad.abs().max() > 0


def test_a_clamped_token_has_no_gradient() -> None:
    """As documented: below log 1e-9 the token's own log q is off the loss's slope; the others pull as ever."""
    p = relevant_tokens(torch.tensor([[0, 1]]), torch.tensor([[0]]))
    log_q = torch.tensor([FLOOR - 1, -1.0, -1.0, -2.0]).view(1, 1, 1, 4).requires_grad_()
    selectivity_loss(log_q, p).backward()
    assert log_q.grad.flatten().tolist() == [0.0, -0.5, 0.0, 0.0]


def test_tasks_that_come_back() -> None:
    """The loss on tasks wants each task's tokens side by side; the divergence does not mind."""
    p = relevant_tokens(torch.tensor([[0, 1, 0, 1], [0, 0, 1, 1]]), torch.tensor([[1], [0]]))
    log_q = torch.log_softmax(torch.randn(2, 2, 1, 8, generator=torch.Generator().manual_seed(0)), -1)
    with pytest.raises(UserError, match="tasks come back in the stream"):
        task_attention(log_q, p)
    assert task_attention(log_q[1:], p[1:]) > 0
    assert selectivity_loss(log_q, p) > 0


P, Q = torch.full((2, 3, 4), 0.25), torch.zeros(2, 1, 3, 4)
CODES, LOGITS = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3, 5)
BAD: dict[str, tuple[Callable[[], object], str]] = {
    "one stream": (lambda: relevant_tokens(CODES[0], CODES), "(3,), of queries (2, 3): give [B, M] and [B, Q]"),
    "batch": (lambda: relevant_tokens(CODES[:1], CODES), "give [B, M] and [B, Q]"),
    "no heads": (lambda: selectivity_loss(Q[:, 0], P), "log q is (2, 3, 4), p (2, 3, 4)"),
    "broadcast": (lambda: selectivity_loss(Q, P[:1]), "p (1, 3, 4): give [B, H, Q, L] and [B, Q, L]"),
    "queries": (lambda: relevant_mass(Q, P[:, :1]), "give [B, H, Q, L]"),
    "tokens": (lambda: task_attention(Q, P[..., :2]), "give [B, H, Q, L]"),
    "kind": (lambda: task_loss("text", LOGITS, LOGITS), "kind 'text': one of class, vector, angle, image"),
    "codes": (lambda: task_loss("class", LOGITS, LOGITS), "target is torch.float32 (2, 3, 5): classes want codes"),
    "vectors": (lambda: task_loss("vector", LOGITS, CODES), "kind 'vector' wants targets"),
    "angle": (lambda: task_loss("angle", LOGITS, LOGITS), "kind 'angle' wants targets [B, M, 2]"),
    "spread": (lambda: task_loss("vector", LOGITS, LOGITS[:, :1]), "predictions are (2, 3, 5) for targets (2, 1, 5)"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_shapes(case: str) -> None:
    """One line, where torch would broadcast."""
    call, words = BAD[case]
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)
