"""Proximal alternating minimisation of MixER (Section 3 of the paper; meta_train_gated of the released code).

Each outer step anchors Θ and Ξ, then takes inner steps on the contexts Ξ and on the experts Θ with AdaBelief; every
few inner steps the gate is refitted by K-means and least squares, without a gradient.

Shapes: E environments, I trajectories, T times, d states, M experts, C context size, B environments in one step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from metazoo import checkpoint, loop, runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions

from mixer import data
from mixer.config import PRESETS, Config
from mixer.gating import KMeansLeastSquaresGate
from mixer.model import MixER
from mixer.modulation import nearest
from mixer.optim import AdaBelief
from mixer.solve import derivatives


@dataclass
class Run:
    """A trained (or training) MixER.

    ``contexts`` is Ξ [E, C]; ``environments`` the training data after sub-sampling and cropping.
    """

    folder: Path
    config: Config
    model: MixER
    contexts: torch.Tensor
    environments: data.Environments
    metrics: list[dict[str, Any]]
    gate: KMeansLeastSquaresGate


def build_model(config: Config, state_size: int) -> MixER:
    """The MixER that ``config`` describes, for states of size d, seeded by the config."""
    return MixER(
        expert=config.expert,
        state_size=state_size,
        context_size=config.context_size,
        experts=config.experts,
        split_context=config.split_context,
        same_init=config.same_init,
        shift_context=config.shift_context,
        width=config.width,
        depth=config.depth,
        intermediate=config.intermediate,
        context_depth=config.context_depth,
        data_depth=config.data_depth,
        hidden=config.hidden,
        alpha_min=config.alpha_min,
        gate=config.gate,
        seed=config.seed,
    )


def training_data(config: Config) -> data.Environments:
    """The training split, sub-sampled; cropped once, as the released code draws one batch."""
    environments = data.load(config.dataset, "train", data_dir=config.data_dir, seed=config.seed)
    environments = environments.subsample(config.every)
    if config.crop < 1:
        environments = environments.crop(config.crop, np.random.default_rng(config.seed))
    return environments


class Objective:
    """Losses of one data set under one model: mean squared error of states, or of derivatives.

    Args:
        config: objective, solver and context penalty.
        model: MixER.
        environments: E environments.
        device: where to compute.
    """

    def __init__(self, config: Config, model: MixER, environments: data.Environments, device: torch.device) -> None:
        self.config, self.model = config, model
        self.t = torch.as_tensor(environments.t, dtype=torch.float32, device=device)  # [E, T]
        self.x = torch.as_tensor(environments.x, dtype=torch.float32, device=device)  # [E, I, T, d]
        # taken in float64, where the difference of close states keeps its digits
        slopes = derivatives(torch.as_tensor(environments.t), torch.as_tensor(environments.x))
        self.slope = slopes.to(device, torch.float32)  # [E, I, T, d]

    def losses(
        self,
        envs: torch.Tensor,
        contexts: torch.Tensor,
        *,
        expert: torch.Tensor | None = None,
        neighbours: torch.Tensor | None = None,
        taylor_order: int = 0,
    ) -> torch.Tensor:
        """Loss of each pair of an environment [B] and a context [B, C] -> [B].

        ``expert`` [B] names the expert; None leaves it to the gate. ``neighbours`` [B, P, C] are the contexts that
        the Taylor expansion is taken around; the loss is the mean over them.
        """
        config, model = self.config, self.model
        x = self.x[envs]
        options = {"expert": expert, "neighbours": neighbours, "taylor_order": taylor_order}
        if config.expert == "shplrnn":
            predicted, target = model.rollout(x, contexts, **options), x
        elif config.objective == "derivative":
            flat = x.flatten(1, 2)  # every sample is a point of the field
            predicted, target = model.vector_field(flat, contexts, **options), self.slope[envs].flatten(1, 2)
        else:
            predicted = model(
                self.t[envs], x[:, :, 0], contexts, substeps=config.substeps, solver=config.solver, **options
            )
            target = x
        if neighbours is not None and taylor_order:
            target = target.unsqueeze(1)  # the pool is the second dimension of the prediction
        losses = (predicted - target).square().flatten(1).mean(1)
        if config.context_l1:
            losses = losses + config.context_l1 * contexts.abs().mean(1)
        return losses

    @torch.no_grad()
    def loss_matrix(self, contexts: torch.Tensor, accelerator: Accelerator | None = None) -> torch.Tensor:
        """ℓ [E, M]: the loss of every expert alone in every environment, without expansion. The pairs are shared
        among the processes."""
        e, m = contexts.shape[0], self.model.experts
        pairs = torch.arange(e * m, device=contexts.device)
        processes, rank = (1, 0) if accelerator is None else (accelerator.num_processes, accelerator.process_index)
        mine = pairs[rank::processes]
        losses = self.losses(mine // m, contexts[mine // m], expert=mine % m)
        if processes == 1:
            return losses.view(e, m)
        assert accelerator is not None
        matrix = torch.zeros(e * m, dtype=losses.dtype, device=losses.device)
        matrix[mine] = losses
        return accelerator.reduce(matrix, reduction="sum").view(e, m)


def coefficients(losses: torch.Tensor, self_reweighting: bool) -> torch.Tensor:
    """dL/dℓ_i of the training loss L = Σ w_i ℓ_i of the contributors [B].

    Equal weights: 1/B. Self-reweighting, w = softmax(ℓ): the gradient runs through the weights as in the released
    code, which gives w_i (1 + ℓ_i − L). Backpropagating Σ c_i ℓ_i with c held fixed has the gradient of L, and can be
    cut over processes and micro-batches.
    """
    if not self_reweighting:
        return torch.full_like(losses, 1 / len(losses))
    weights = losses.softmax(0)
    return weights * (1 + losses - (weights * losses).sum())


class MixERLearner:
    """One inner step at a time of proximal alternating minimisation.

    Args:
        config: the run's config.
        environments: training data.
        accelerator: device and processes.

    Raises:
        UserError: more experts than environments, or more contributors, or a pool larger than the contributors.
    """

    def __init__(self, config: Config, environments: data.Environments, accelerator: Accelerator) -> None:
        e = len(environments)
        if config.experts > e:
            raise UserError(
                f"--experts is {config.experts}, but {config.dataset} has {e} environments: use at most {e}"
            )
        b = e if config.contributors is None else config.contributors
        if b > e:
            raise UserError(f"--contributors is {b}, but {config.dataset} has {e} environments: use at most {e}")
        if config.taylor_order and config.pool > b:
            raise UserError(f"--pool is {config.pool}, but a step has {b} contributors: use at most {b}")
        self.config, self.accelerator, self.environments = config, accelerator, environments
        device = accelerator.device
        self.model = build_model(config, environments.x.shape[-1]).to(device)
        self.objective = Objective(config, self.model, environments, device)
        self.contexts = torch.zeros(e, config.context_size, device=device, requires_grad=True)  # Ξ, from 0
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        experts = [p for p in self.parameters if p is not self.model.gate_weight]
        gate = [p for p in self.parameters if p is self.model.gate_weight]
        groups = [{"params": experts, "shared": config.shared_state}, {"params": gate, "shared": False}]
        self.model_optimizer = AdaBelief([g for g in groups if g["params"]], lr=config.lr)
        self.context_optimizer = AdaBelief([self.contexts], lr=config.context_lr)
        self.anchors = [p.detach().clone() for p in self.parameters]  # Θ_old
        self.context_anchor = self.contexts.detach().clone()  # Ξ_old
        self.generator = torch.Generator().manual_seed(config.seed)
        self.gate = KMeansLeastSquaresGate(
            config.experts,
            init=config.kmeans_init,
            max_iterations=config.kmeans_iterations,
            tolerance=config.kmeans_tolerance,
            noise=config.gate_noise,
            seed=config.seed,
        )
        self.total_parameters = sum(p.numel() for p in self.parameters)

    def state(self) -> Mapping[str, checkpoint.Stateful]:
        anchors = {f"anchor_{i}": anchor for i, anchor in enumerate(self.anchors)}
        return {
            "model": self.model,
            "contexts": checkpoint.TensorState(contexts=self.contexts, anchor=self.context_anchor, **anchors),
            "model_optimizer": self.model_optimizer,
            "context_optimizer": self.context_optimizer,
            "gate": self.gate,
            "contributors": checkpoint.GeneratorState(self.generator),
        }

    def step(self, step: int) -> dict[str, Any]:
        """Inner step ``step``, counted over the whole training."""
        on_contexts, on_model = self.config.inner_steps
        outer, inner = divmod(step, on_contexts + on_model)
        if inner == 0:
            self._anchor()
        phase_step = inner if inner < on_contexts else inner - on_contexts
        envs = self.draw_contributors()
        if inner < on_contexts:
            loss = self.backward(envs, [self.contexts])
            self._pull([self.contexts], [self.context_anchor], self.config.proximal[0])
            self.context_optimizer.step()
        else:
            self._set_learning_rate(outer * on_model + phase_step, self.config.outer_steps * on_model)
            loss = self.backward(envs, self.parameters)
            self._pull(self.parameters, self.anchors, self.config.proximal[1])
            self.model_optimizer.step()
        if self.config.gate == "least-squares" and self.config.experts > 1 and phase_step % self.config.gate_every == 0:
            self.update_gate()
        with torch.no_grad():
            route = self.model.route(self.contexts)
        return {
            "loss": loss,
            "phase": "contexts" if inner < on_contexts else "model",
            "contributors": envs,
            "route": route,
            "gate_accepted": self.gate.accepted,
            "gate_aborted": self.gate.aborted,
        }

    def draw_contributors(self) -> torch.Tensor:
        """Environments of one gradient step [B]: one at random and its nearest contexts (mean |·|), the "NF" rule of
        the released code; all of them if the config says so."""
        e, b = self.contexts.shape[0], self.config.contributors
        if b is None or b == e:
            return torch.arange(e, device=self.contexts.device)
        first = torch.randint(e, (1,), generator=self.generator).to(self.contexts.device)
        contexts = self.contexts.detach()
        distances = (contexts - contexts[first]).abs().mean(1)
        return distances.argsort(stable=True)[:b]

    def backward(self, envs: torch.Tensor, inputs: list[torch.Tensor]) -> torch.Tensor:
        """Gradient of the loss of the contributors ``envs`` [B] into ``inputs``; returns the loss, without its
        proximal term. The same gradient for any number of processes and of accumulated parts."""
        config = self.config
        parts = loop.share(torch.arange(len(envs), device=envs.device), self.accelerator, config.accumulation)
        neighbours = None
        if config.taylor_order:
            pool = self.contexts[envs]
            neighbours = nearest(pool, pool, config.pool)
        for tensor in inputs:
            tensor.grad = None
        losses = torch.zeros(len(envs), device=envs.device)
        if config.self_reweighting and (len(parts) > 1 or self.accelerator.num_processes > 1):
            with torch.no_grad():  # the weights need every loss before the first backward pass
                for part in parts:
                    losses[part] = self._losses(envs, part, neighbours)
            losses = self.accelerator.reduce(losses, reduction="sum")
        for i, part in enumerate(parts):
            current = self._losses(envs, part, neighbours)
            if len(part) == len(envs):
                losses = current.detach()
            elif not config.self_reweighting:
                losses[part] = current.detach()
            weights = coefficients(losses, config.self_reweighting)[part]
            retain = neighbours is not None and i + 1 < len(parts)  # the pool's graph is common to the parts
            self.accelerator.backward((weights * current).sum(), inputs=inputs, retain_graph=retain)
        loop.sum_gradients(inputs, self.accelerator)
        if self.accelerator.num_processes > 1 and not config.self_reweighting:
            losses = self.accelerator.reduce(losses, reduction="sum")
        weights = losses.softmax(0) if config.self_reweighting else 1 / len(envs)
        return (weights * losses).sum()

    def _losses(self, envs: torch.Tensor, part: torch.Tensor, neighbours: torch.Tensor | None) -> torch.Tensor:
        around = None if neighbours is None else neighbours[part]
        with self.accelerator.autocast():
            return self.objective.losses(
                envs[part], self.contexts[envs[part]], neighbours=around, taylor_order=self.config.taylor_order
            )

    def update_gate(self) -> None:
        """Refit W by K-means on Ξ and least squares, from the losses of every expert in every environment."""
        losses = self.objective.loss_matrix(self.contexts.detach(), self.accelerator)
        update = self.gate.update(self.contexts.detach(), losses)
        if update.weight is not None:
            with torch.no_grad():
                self.model.gate_weight.copy_(update.weight)

    @torch.no_grad()
    def _anchor(self) -> None:
        torch._foreach_copy_(self.anchors, self.parameters)
        self.context_anchor.copy_(self.contexts)

    @torch.no_grad()
    def _pull(self, tensors: list[torch.Tensor], anchors: list[torch.Tensor], beta: float) -> None:
        """Add the gradient β (θ − θ_old)/N of the proximal term (β/2)·mean((θ − θ_old)²)."""
        count = sum(tensor.numel() for tensor in tensors)
        for tensor in tensors:
            if tensor.grad is None:
                tensor.grad = torch.zeros_like(tensor)
        drift = torch._foreach_sub([t.detach() for t in tensors], anchors)
        torch._foreach_add_([t.grad for t in tensors], drift, alpha=beta / count)

    def _set_learning_rate(self, model_step: int, total: int) -> None:
        """The model's rate times 0.4 from one third and again from two thirds of its steps."""
        passed = int(model_step >= total // 3) + int(model_step >= 2 * total // 3)
        for group in self.model_optimizer.param_groups:
            group["lr"] = self.config.lr * 0.4**passed


def train(config: Config = PRESETS["small"], options: RunOptions | None = None) -> Run:
    """Train MixER; also under ``accelerate launch -m mixer.train PRESET …`` and ``torchrun -m mixer.train …``.

    Args:
        config: what to train.
        options: run folder, resuming, checkpoints, trackers [default: runs/mixer-small].

    Returns:
        The run; its folder holds config.json, environment.json, metrics.jsonl, checkpoints/, model/ and plots.

    Raises:
        UserError: the config does not fit the data, or the folder holds another run.
    """
    options = loop.with_folder(options or RunOptions(), loop.default_folder("mixer", "small"))
    assert options.output_dir is not None
    accelerator = loop.prepare(options, seed=config.seed, precision=config.precision)
    environments = training_data(config)
    learner = MixERLearner(config, environments, accelerator)
    folder = runfolder.RunFolder(options.output_dir, config, resume=options.resume, main=accelerator.is_main_process)
    try:
        metrics = loop.fit(
            learner,
            folder,
            accelerator,
            steps=config.outer_steps * sum(config.inner_steps),
            options=options,
            name="mixer",
        )
        run = _run(folder.path, learner, metrics)
        if accelerator.is_main_process:
            _finish(run)
    finally:
        folder.close()
    accelerator.wait_for_everyone()
    accelerator.end_training()
    return run


def load(path: Path | str) -> Run:
    """The run in the folder ``path``, at its last good checkpoint.

    Raises:
        UserError: it is not a run folder, or has no good checkpoint.
    """
    path = Path(path)
    config = runfolder.open_run(path, Config)
    accelerator = loop.prepare(RunOptions(), seed=config.seed)
    learner = MixERLearner(config, training_data(config), accelerator)
    if not checkpoint.restore(path / "checkpoints", learner.state()):
        raise UserError(f"{path} has no checkpoint yet: train it first")
    return _run(path, learner, list(runfolder.read_metrics(path / "metrics.jsonl")))


def _run(path: Path, learner: MixERLearner, metrics: list[dict[str, Any]]) -> Run:
    return Run(
        folder=path,
        config=learner.config,
        model=learner.model,
        contexts=learner.contexts.detach(),
        environments=learner.environments,
        metrics=metrics,
        gate=learner.gate,
    )


def _finish(run: Run) -> None:
    """Save the model in the hub's layout, and draw the training."""
    import warnings

    from mixer import plots

    run.model.save_pretrained(run.folder / "model")
    plots.training(run, run.folder / "training.png")
    updates = run.gate.accepted + run.gate.aborted
    if updates and run.gate.aborted > updates / 2:
        warnings.warn(
            f"{run.gate.aborted} of {updates} gate updates were given up (an empty cluster, or no convergence): "
            "routing has hardly been learned; use --kmeans-init kmeans++ or fewer experts",
            stacklevel=2,
        )


if __name__ == "__main__":
    import sys

    from mixer.cli import main

    sys.argv[1:1] = ["train"]
    main()
