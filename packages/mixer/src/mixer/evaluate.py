"""Test error, routing and adaptation of a trained MixER (Section 4 of the paper; meta_test of the released code)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from metazoo import runfolder
from metazoo.errors import UserError
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score
from tqdm import tqdm

from mixer import data
from mixer.config import Config, EvaluateOptions
from mixer.model import MixER
from mixer.optim import AdaBelief
from mixer.train import Objective, Run, load


def rel_mse(predicted: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Relative squared error ‖x̂−x‖²/‖max(|x|, 1e-6)‖², norms over states, mean over trajectories and times
    (rel_l2 of the released code). [..., I, T, d] -> [...]."""
    error = (predicted - truth).square().sum(-1)
    return (error / truth.abs().clamp(min=1e-6).square().sum(-1)).mean((-1, -2))


def relative_field_error(field: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    """Σ‖f(x)−ẋ‖² / Σ‖ẋ‖² of each environment, sums over its samples. [E, N, d] -> [E]."""
    return (field - slope).square().sum((1, 2)) / slope.square().sum((1, 2))


def routing_ari(route: torch.Tensor, family: np.ndarray) -> float:
    """Adjusted Rand index of the gate's choice against the true families: 1 agrees, 0 is chance."""
    return float(adjusted_rand_score(family, route.cpu().numpy()))


def purity(assignment: np.ndarray, family: np.ndarray) -> float:
    """Share of environments whose cluster is mostly of their own family."""
    hits = sum(np.unique(family[assignment == c], return_counts=True)[1].max() for c in np.unique(assignment))
    return float(hits) / len(family)


@dataclass
class Adaptation:
    """Contexts [E, C] of new environments, the expert of each [E], and their support losses [E]."""

    contexts: torch.Tensor
    experts: torch.Tensor
    losses: torch.Tensor


def adapt(
    model: MixER,
    environments: data.Environments,
    config: Config,
    *,
    steps: int = 500,
    strategy: Literal["paper", "probe"] = "paper",
    bulk: bool = True,
) -> Adaptation:
    """Fit the contexts of new environments, with experts and gate frozen and no expansion.

    Args:
        model: the trained model.
        environments: support trajectories.
        config: objective, solver and context learning rate of the run.
        steps: AdaBelief steps, from ξ = 0.
        strategy: "paper": the gate chooses the expert, also while ξ moves; "probe" (ours): ξ is fitted under each
            expert and the one with the least support loss is kept, as split contexts can be stuck in the wrong one.
        bulk: all environments at once, or one by one (the same result, less memory).

    Raises:
        UserError: the environments have another number of states than the model.
    """
    if environments.x.shape[-1] != model.state_size:
        raise UserError(
            f"the environments have {environments.x.shape[-1]} states, the model was trained on {model.state_size}"
        )
    device = model.gate_weight.device
    objective = Objective(config, model, environments, device)
    frozen = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in frozen:
        p.requires_grad_(False)
    try:
        groups = [torch.arange(len(environments))] if bulk else torch.arange(len(environments)).split(1)
        parts = [
            _adapt(model, objective, group.to(device), config, steps, strategy)
            for group in tqdm(groups, desc="adapt", disable=None if len(groups) > 1 else True)
        ]
    finally:
        for p, required in frozen:
            p.requires_grad_(required)
    return Adaptation(*(torch.cat(column) for column in zip(*parts, strict=True)))


def _adapt(
    model: MixER, objective: Objective, envs: torch.Tensor, config: Config, steps: int, strategy: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    e, m = len(envs), model.experts
    expert = None
    if strategy == "probe":  # every environment once under each expert
        envs, expert = envs.repeat_interleave(m), torch.arange(m, device=envs.device).repeat(e)
    contexts = torch.zeros(len(envs), config.context_size, device=envs.device, requires_grad=True)
    optimizer = AdaBelief([contexts], lr=config.context_lr)
    for _ in tqdm(range(steps), desc="adapt", leave=False, disable=None if e > 1 else True):
        optimizer.zero_grad()
        # a sum: each environment is adapted as if it were alone
        objective.losses(envs, contexts, expert=expert).sum().backward()
        optimizer.step()
    with torch.no_grad():
        losses = objective.losses(envs, contexts, expert=expert)
        if expert is None:
            return contexts.detach(), model.route(contexts), losses
        best = losses.view(e, m).argmin(1)
        chosen = torch.arange(e, device=envs.device) * m + best
        return contexts.detach()[chosen], best, losses[chosen]


@torch.no_grad()
def predict(
    model: MixER,
    environments: data.Environments,
    contexts: torch.Tensor,
    config: Config,
    experts: torch.Tensor | None = None,
) -> torch.Tensor:
    """Predicted trajectories [E, I, T, d] (float32) from the first states of ``environments``, on their own times."""
    device = contexts.device
    x = torch.as_tensor(environments.x, dtype=torch.float32, device=device)
    t = torch.as_tensor(environments.t, dtype=torch.float32, device=device)
    if config.expert == "shplrnn":
        return model.rollout(x, contexts, expert=experts)
    return model(t, x[:, :, 0], contexts, expert=experts, substeps=config.substeps, solver=config.solver)


@torch.no_grad()
def errors(
    model: MixER,
    environments: data.Environments,
    contexts: torch.Tensor,
    config: Config,
    experts: torch.Tensor | None = None,
) -> dict[str, float]:
    """mse and rel_mse of trajectories (means over environments), and field_error against finite differences."""
    truth = torch.as_tensor(environments.x, dtype=torch.float32, device=contexts.device)
    predicted = predict(model, environments, contexts, config, experts)
    found = {
        "mse": (predicted - truth).square().mean().item(),
        "rel_mse": rel_mse(predicted, truth).mean().item(),
    }
    if config.expert != "shplrnn":
        objective = Objective(config, model, environments, contexts.device)
        field = model.vector_field(objective.x.flatten(1, 2), contexts, expert=experts)
        found["field_error"] = relative_field_error(field, objective.slope.flatten(1, 2)).mean().item()
    return found


def has_split(dataset: str, split: str) -> bool:
    """Whether ``dataset`` has this split: a file of one's own is the training split alone, unless its path holds
    {split}; synthetic-control has no new environments."""
    if dataset.endswith((".npz", ".csv")):
        return "{split}" in dataset or split == "train"
    return not split.startswith("adapt") or dataset != "synthetic-control"


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Metrics of a run on new initial states of its environments, and on new environments after adaptation.

    Returns:
        mse, rel_mse, field_error (test split; of the training data where there is no other), routing_ari and
        context_ari (K-means on the contexts) where families are known, experts_used, gate_accepted, gate_aborted,
        adapt_mse, adapt_rel_mse, adapt_field_error. Also written to evaluation.json in the run folder, with plots.

    Raises:
        UserError: not a run folder, no checkpoint, or data that do not fit the model.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    config, model, contexts = run.config, run.model, run.contexts
    test = run.environments
    if has_split(config.dataset, "test"):
        test = data.load(config.dataset, "test", data_dir=config.data_dir, seed=config.seed)
        if len(test) != len(run.environments):  # a classification set: other series, without a context of their own
            test = run.environments
    found: dict[str, Any] = errors(model, test, contexts, config)
    route = model.route(contexts)
    found["experts_used"] = len(route.unique())
    family = run.environments.family
    if family is not None:
        found["routing_ari"] = routing_ari(route, family)
        found["routing_purity"] = purity(route.cpu().numpy(), family)
        clusters = KMeans(len(np.unique(family)), n_init=10, random_state=0).fit_predict(contexts.cpu().numpy())
        found["context_ari"] = float(adjusted_rand_score(family, clusters))
    found["gate_accepted"], found["gate_aborted"] = run.gate.accepted, run.gate.aborted
    adaptation = None
    support, query = _adaptation_data(config, options)
    if support is not None and options.adapt_steps:
        adaptation = adapt(model, support, config, steps=options.adapt_steps, strategy=options.strategy)
        query = support if query is None else query
        after = errors(model, query, adaptation.contexts, config, adaptation.experts)
        found.update({f"adapt_{key}": value for key, value in after.items()})
    runfolder.write_text(run.folder / "evaluation.json", json.dumps(found, indent=2) + "\n")
    if options.plots:
        from mixer import plots

        plots.contexts(run, run.folder / "contexts.png")
        plots.trajectories(run, test, run.folder / "trajectories.png")
    return found


def _adaptation_data(
    config: Config, options: EvaluateOptions
) -> tuple[data.Environments | None, data.Environments | None]:
    """Support trajectories of new environments (sub-sampled as in training), and the query ones at full rate."""
    if options.adapt_data is not None:
        return data.load(options.adapt_data, "train").subsample(config.every), None
    if not has_split(config.dataset, "adapt-train"):
        return None, None
    support, query = (
        data.load(config.dataset, split, data_dir=config.data_dir, seed=config.seed)
        for split in ("adapt-train", "adapt-test")
    )
    return support.subsample(config.every), query
