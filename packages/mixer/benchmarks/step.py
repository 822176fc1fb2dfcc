"""Milliseconds of a training step, a gate update and an outer step at the setting that official_jax.py times, and the
loss matrix of all experts batched against a Python loop over experts."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from accelerate import Accelerator
from mixer.config import Config
from mixer.train import MixERLearner, training_data

# 4 families x 5 environments, 4 trajectories, T = 20; GEPS width 64, depth 3, c = 4, RK4 with one step a sample
SETTING = Config(dataset="odebench-4", every=5, experts=4, context_size=16, width=64, depth=3, contributors=5)


def timed(function: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median and quartiles in milliseconds, after two calls to warm up."""
    function(), function()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        seconds.append(1000 * (time.perf_counter() - start))
    low, middle, high = statistics.quantiles(seconds, n=4)
    return {"median": round(middle, 2), "q25": round(low, 2), "q75": round(high, 2)}


def learner(**changes: object) -> MixERLearner:
    config = replace(SETTING, **changes)  # type: ignore[arg-type]
    return MixERLearner(config, training_data(config), Accelerator(cpu=True))


def steps(trained: MixERLearner, gate_every: int, count: int) -> dict[str, float]:
    """One outer step of 12 + 12 inner steps."""
    trained.config = replace(trained.config, gate_every=gate_every)
    return timed(lambda: [trained.step(i) for i in range(24)], count)


def loss_matrix(repeats: int, environments: str) -> dict[str, object]:
    """ℓ [E, M] with M = 10: all pairs at once, and expert by expert."""
    ours = learner(dataset=environments, experts=10, context_size=40)
    e = len(ours.environments)
    everywhere = torch.arange(e)

    @torch.no_grad()
    def loop() -> torch.Tensor:
        chosen = [torch.full((e,), m) for m in range(10)]
        contexts = ours.contexts.detach()
        return torch.stack([ours.objective.losses(everywhere, contexts, expert=m) for m in chosen], dim=1)

    def batched() -> torch.Tensor:
        return ours.objective.loss_matrix(ours.contexts.detach())

    assert torch.allclose(loop(), batched(), rtol=1e-4)
    one, other = timed(batched, repeats), timed(loop, repeats)
    return {"environments": e, "batched": one, "loop": other, "ratio": round(other["median"] / one["median"], 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, object] = {"threads": options.threads, "torch": torch.__version__}
    for contributors in (5, 20):
        ours = learner(contributors=contributors)
        envs = torch.arange(20)[:contributors]
        found[f"contributors_{contributors}"] = {
            "context_step_ms": timed(lambda o=ours, e=envs: o.backward(e, [o.contexts]), options.repeats),
            "model_step_ms": timed(lambda o=ours, e=envs: o.backward(e, o.parameters), options.repeats),
            "gate_update_ms": timed(ours.update_gate, options.repeats),
            "outer_step_gate_every_1_ms": steps(ours, 1, max(4, options.repeats // 5)),
            "outer_step_gate_every_4_ms": steps(ours, 4, max(4, options.repeats // 5)),
        }
    found["loss_matrix_ms"] = [loss_matrix(options.repeats, name) for name in ("odebench-4", "odebench-10A")]
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
