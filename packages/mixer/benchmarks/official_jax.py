"""Time one training step of the released JAX code of MixER, on the CPU.

The peer half of the benchmark. It needs a clone of `ddrous/MixER` and an environment of its own, because that package
is called `mixer` too: python 3.11 with jax, equinox, diffrax, optax, einops, torch, pandas, seaborn and scipy (and not
torchvision). Nothing in the clone is changed and nothing of it is repeated here: the step functions timed are the
closures of its own `NCFTrainer.meta_train_gated`, and whole outer steps are timed as that function prints them.
Settings follow `examples/ode-bench/main_mixer.py`, with fewer environments and experts.

    python official_jax.py --official MixER --data ode-bench/data --threads 1

prints one line of JSON: milliseconds unless a key says otherwise; "q25" is the quartile of the fast side. "cpu" is the
time that the process had on its cores, all threads together: where other processes share the cores and there is one
thread, it is the figure to compare.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import os
import platform
import re
import statistics
import sys
import time
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

INNER_STEPS = 12  # of contexts, and again of the model, in one outer step (main_mixer.py)
PROXIMAL_BETAS = (10.0, 10.0)
LEARNING_RATE = 1e-3
CONTEXT_PER_EXPERT = 4
Reading = tuple[float, float]  # seconds: wall clock, processor
Call = tuple[Any, tuple[Any, ...]]  # a function and all its arguments but the last, the key
VERSIONS = ("jax", "jaxlib", "equinox", "diffrax", "optax", "torch", "numpy")
SEED = 20960  # main_mixer.py's


class _Captured(Exception):
    """Ends a run of the official trainer as soon as its step functions are in hand."""


class _Clock(io.StringIO):
    """Keeps what the official trainer prints, and the clocks at each of its lines on an outer step."""

    def __init__(self) -> None:
        super().__init__()
        self.readings: list[Reading] = []

    def write(self, text: str) -> int:
        if "Time/Step(s)" in text:  # by then it has waited for the step's losses
            self.readings.append(now())
        return super().write(text)


def now() -> Reading:
    """Return the seconds of the wall clock and those of this process on its cores."""
    return time.perf_counter(), time.process_time()


def since(start: Reading, end: Reading) -> Reading:
    """Return the seconds between two readings of the clocks."""
    return end[0] - start[0], end[1] - start[1]


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--official", type=Path, required=True, help="clone of ddrous/MixER")
    parser.add_argument("--data", type=Path, required=True, help="folder of ODEBench's train.npz")
    parser.add_argument("--experts", type=int, default=4, help="number of experts M")
    parser.add_argument("--contributors", type=int, default=5, help="environments in one gradient step")
    parser.add_argument("--expert", choices=("GEPS", "CoDA", "NCF"), default="GEPS", help="kind of expert")
    parser.add_argument("--width", type=int, default=64, help="width of the experts")
    parser.add_argument("--depth", type=int, default=3, help="depth of the experts, as the official code counts it")
    parser.add_argument("--solver", choices=("rk4", "tsit5"), default="rk4", help="rk4: fixed steps; tsit5: adaptive")
    parser.add_argument("--subdivisions", type=int, default=1, help="steps of rk4 between two samples")
    parser.add_argument(
        "--gate-every", type=int, nargs="*", default=[1, 4], help="inner steps per gate update, each run"
    )
    parser.add_argument("--steps", type=int, default=15, help="outer steps timed in each run, after one of warm-up")
    parser.add_argument("--repeats", type=int, default=60, help="timed calls of each piece")
    parser.add_argument(
        "--scan", type=int, nargs="*", default=[], help="numbers of experts for time and FLOP against M"
    )
    parser.add_argument("--threads", type=int, default=1, help="cores this process may run on")
    return parser.parse_args(argv)


def limit_threads(threads: int) -> int:
    """Keep this process to its last `threads` cores and return how many it has; before jax or torch is imported."""
    # XLA sizes its pool by the cores it may run on, so the affinity is the setting that counts; the rest are for BLAS.
    allowed = sorted(os.sched_getaffinity(0))[-threads:]
    os.sched_setaffinity(0, allowed)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    if threads == 1:
        os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["MPLBACKEND"] = "Agg"
    return len(allowed)


def load(official: Path) -> Any:
    """Import the clone's package `mixer` under today's jax, without torchvision."""
    if importlib.util.find_spec("torchvision") is None:  # only its image data sets use it
        for name in ("torchvision", "torchvision.transforms"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["torchvision.transforms"].transforms = None  # type: ignore[attr-defined]
    import jax

    jax.tree_map = jax.tree.map  # the old name, removed from jax, that learner.py calls
    sys.path.insert(0, str(official))
    with contextlib.redirect_stdout(io.StringIO()):  # it prints on import
        import mixer

    if official.resolve() not in Path(mixer.__file__).resolve().parents:
        raise SystemExit(f"--official, {official}: not the package that `import mixer` finds; use another environment")
    return mixer


def build(mixer: Any, options: argparse.Namespace, experts: int) -> tuple[Any, Any]:
    """Return the official trainer (fresh, same seed) and its data loader."""
    import diffrax
    import jax
    import jax.numpy as jnp
    import optax
    from mixer._utils import RK4

    dataset = mixer.ODEBenchDataset(data_dir=str(options.data / "train.npz"), skip_steps=5, traj_prop_min=1.0)
    loader = mixer.NumpyLoader(dataset, batch_size=dataset.total_envs)
    context_size = CONTEXT_PER_EXPERT * experts
    contexts = mixer.ArrayContextParams(nb_envs=dataset.total_envs, context_size=context_size, key=None)
    sizes: dict[str, object] = {"width": options.width, "depth": options.depth}
    if options.expert == "NCF":
        sizes = {"width_main": options.width, "depth_main": options.depth, "depth_data": 1, "depth_ctx": 1}
        sizes |= {"intermediate_size": 32, "ctx_utils": None}
    if options.solver == "rk4":
        ivp = {"return_traj": True, "integrator": RK4, "subdivisions": options.subdivisions}
    else:
        ivp = {"return_traj": True, "integrator": diffrax.Tsit5(), "rtol": 1e-3, "atol": 1e-6, "max_steps": 4096}
        ivp |= {"adjoint": diffrax.RecursiveCheckpointAdjoint()}

    def squared_error(
        _model: Any, _context: Any, predicted: Any, observed: Any
    ) -> tuple[Any, tuple[Any, float, float]]:
        loss = jnp.mean((predicted - observed) ** 2)
        return loss, (loss, 0.0, 0.0)

    key = jax.random.PRNGKey(SEED)
    network = mixer.MixER(
        key=key,
        nb_experts=experts,
        meta_learner=options.expert,
        split_context=True,
        same_expert_init=True,
        use_gate_bias=True,
        gate_update_strategy="least_squares",
        data_size=dataset.data_size,
        context_size=context_size,
        activation="swish",
        shift_context=True,
        **sizes,
    )
    learner = mixer.Learner(
        model=mixer.NeuralODE(neuralnet=network, taylor_order=0, ivp_args=ivp),
        context_size=context_size,
        context_pool_size=1,
        env_loss_fn=squared_error,
        contexts=contexts,
        reuse_contexts=True,
        loss_contributors=options.contributors,
        self_reweighting=False,
        key=key,
    )
    updates = 1500 * INNER_STEPS  # the example's whole run, so that no timed step reaches a change of rate
    schedule = optax.piecewise_constant_schedule(LEARNING_RATE, {updates // 3: 0.4, 2 * updates // 3: 0.4})
    optimisers = (optax.adabelief(schedule), optax.adabelief(LEARNING_RATE))
    return mixer.NCFTrainer(learner, optimisers, key=key), loader


def run(trainer: Any, loader: Any, outer_steps: int, gate_every: int) -> _Clock:
    """Train by the official loop and return what it printed, with the clocks at each outer step."""
    text = _Clock()
    with contextlib.redirect_stdout(text):  # without verbose=True, which prints tables as well
        trainer.meta_train_gated(
            dataloader=loader,
            nb_epochs=1,
            nb_outer_steps=outer_steps,
            nb_inner_steps=(INNER_STEPS, INNER_STEPS),
            proximal_betas=PROXIMAL_BETAS,
            print_error_every=(1, 1),
            update_gate_every=gate_every,
            key=trainer.key,
        )
    return text


def closures(trainer: Any, loader: Any) -> Mapping[str, Any]:
    """Return the step functions that `meta_train_gated` defines inside itself, before it has compiled any of them."""
    found: dict[str, Any] = {}

    def capture(_environments: int) -> None:  # stands in for the first method the trainer calls after defining them
        found.update(sys._getframe(1).f_locals)
        raise _Captured

    trainer.learner.reset_contexts = capture
    with contextlib.suppress(_Captured):
        run(trainer, loader, 1, 1)
    del trainer.learner.reset_contexts
    return {name: found[name] for name in ("train_step_ctx", "train_step_model", "train_step_gates")}


def summary(readings: Sequence[Reading]) -> dict[str, float]:
    """Return median, quartiles and minimum of the wall clock, median and lower quartile of the processor, in ms."""
    wall, processor = zip(*readings, strict=True)
    low, middle, high = statistics.quantiles(wall, n=4, method="inclusive")
    cpu_low, cpu_middle, _ = statistics.quantiles(processor, n=4, method="inclusive")
    values = {"median": middle, "q25": low, "q75": high, "min": min(wall)}
    values |= {"cpu_median": cpu_middle, "cpu_q25": cpu_low, "cpu_min": min(processor)}
    return {name: round(1e3 * value, 3) for name, value in values.items()} | {"n": len(wall)}


def timed(call: Call, repeats: int) -> list[Reading]:
    """Return the seconds that `call` took to its last result, each time with another key."""
    import jax

    function, arguments = call
    seconds: list[Reading] = []
    with contextlib.redirect_stdout(io.StringIO()):  # the gate prints at every update
        for key in jax.random.split(jax.random.PRNGKey(1), repeats):
            key.block_until_ready()
            start = now()
            jax.block_until_ready(jax.tree.leaves(function(*arguments, key)))
            seconds.append(since(start, now()))
    return seconds


def measured(calls: Mapping[str, Call], repeats: int) -> dict[str, dict[str, float]]:
    """Time every piece, warm."""
    return {name: summary(timed(call, repeats + 1)[1:]) for name, call in calls.items()}


def bind(steps: Mapping[str, Any], trainer: Any, batch: Any) -> dict[str, Call]:
    """Return the pieces of an outer step, each with its arguments in the state that `trainer` is in."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    model, contexts = trainer.learner.model, trainer.learner.contexts
    environments, size = contexts.params.shape
    experts = model.vectorfield.neuralnet.n_experts
    weights = jnp.ones(environments) / environments
    context_state = trainer.opt_ctx.init(eqx.filter(contexts, eqx.is_array))

    # Contexts in as many clusters as there are experts, and their centres: a gate update that is accepted. With one
    # centre far from all of them K-means finds an empty cluster in its first iteration and the update is given up.
    centres = 0.5 * jnp.repeat(jnp.eye(experts), size // experts, axis=1)
    noise = 0.01 * jax.random.normal(jax.random.PRNGKey(2), (environments, size))
    params = centres[jnp.arange(environments) * experts // environments] + noise
    grouped = eqx.tree_at(lambda tree: tree.params, contexts, params)
    far = centres.at[-1].set(1e3)

    gate, matrix = steps["train_step_gates"], trainer.learner.loss_fn_multitask
    context_step, model_step = steps["train_step_ctx"], steps["train_step_model"]
    old_contexts, old_model = (contexts, PROXIMAL_BETAS[1]), (model, PROXIMAL_BETAS[0])
    model_state = trainer.opt_state_model

    def accepted(*arguments: Any) -> Any:
        result = gate(*arguments)
        assert result[3] is not None, "the gate gave up where it should not"
        return result

    def aborted(*arguments: Any) -> Any:
        result = gate(*arguments)
        assert result[3] is None, "the gate accepted an empty cluster"
        return result

    return {
        "context_step": (context_step, (model, contexts, old_contexts, batch, weights, context_state)),
        "model_step": (model_step, (model, old_model, contexts, batch, weights, model_state)),
        "gate_loss_matrix": (matrix, (model, contexts, batch)),
        "gate_accepted": (accepted, (model, grouped, centres, batch)),
        "gate_aborted": (aborted, (model, grouped, far, batch)),
    }


def whole(trainer: Any, loader: Any, outer_steps: int, gate_every: int) -> dict[str, Any]:
    """Time outer steps of the official loop; `by_its_own_clock` is the median of the times that it prints."""
    start = now()
    clock = run(trainer, loader, outer_steps + 1, gate_every)
    wall, _ = since(start, now())
    text, readings = clock.getvalue(), clock.readings
    printed = [1e3 * float(found) for found in re.findall(r"Time/Step\(s\): *([0-9.]+)", text)]
    losses = trainer.losses_model[-1]
    return {
        **summary([since(a, b) for a, b in itertools.pairwise(readings)]),
        "by_its_own_clock": round(statistics.median(printed[1:]), 1),
        "first_outer_step_s": round(printed[0] / 1e3, 3),
        "wall_s": round(wall, 2),
        "gate_updates_accepted": text.count("converged after"),
        "gate_updates_aborted": text.count("is empty") + text.count("did not converge"),
        "loss_first": float(losses[0, 0]),
        "loss_last": float(losses[-1, 0]),
    }


def composed(
    figures: Mapping[str, Mapping[str, float]], run_figures: Mapping[str, float], gate_every: int, statistic: str
) -> float:
    """Return the milliseconds of an outer step put together from its pieces."""
    accepted, aborted = run_figures["gate_updates_accepted"], run_figures["gate_updates_aborted"]
    piece = {name: values[statistic] for name, values in figures.items()}
    gate = (accepted * piece["gate_accepted"] + aborted * piece["gate_aborted"]) / (accepted + aborted)
    gates = 2 * len(range(0, INNER_STEPS, gate_every))
    return round(INNER_STEPS * (piece["context_step"] + piece["model_step"]) + gates * gate, 1)


def primitives(jaxpr: Any) -> collections.Counter[str]:
    """Count the primitives of a jaxpr and of those inside it."""
    from jax.extend.core import jaxprs_in_params

    counts: collections.Counter[str] = collections.Counter()
    for equation in jaxpr.eqns:
        counts[equation.primitive.name] += 1
        for inner in jaxprs_in_params(equation.params):
            counts += primitives(inner)
    return counts


def work(mixer: Any, options: argparse.Namespace, experts: int) -> dict[str, Any]:
    """Say what one step computes with `experts` experts, at initialisation: `lax.cond` or select, FLOP, time."""
    import jax
    import jax.numpy as jnp

    trainer, loader = build(mixer, options, experts)
    steps, batch = closures(trainer, loader), next(iter(loader))
    network = trainer.learner.model.vectorfield.neuralnet
    state, contexts = jnp.ones(2), trainer.learner.contexts.params[: options.contributors]

    def field(context: Any) -> Any:
        return network(0.0, state, context)

    one = primitives(jax.make_jaxpr(field)(contexts[0]).jaxpr)
    many = primitives(jax.make_jaxpr(jax.vmap(field))(contexts).jaxpr)
    calls = bind(steps, trainer, batch)
    figures: dict[str, Any] = {
        "experts": experts,
        "cond_in_field_one_environment": one["cond"],
        "cond_in_field_all_environments": many["cond"],
        "products_in_field_all_environments": many["dot_general"],
    }
    for name in ("context_step", "model_step", "gate_loss_matrix"):
        function, arguments = calls[name]
        call = function.lower(*arguments, trainer.key).compile()
        figures[name] = {
            # XLA counts the body of a loop once, whatever the number of turns: for ratios only.
            "mflop_loops_once": round(call.compiled.cost_analysis()["flops"] / 1e6, 3),
            "conditionals_compiled": call.compiled.as_text().count(" conditional("),
            **summary(timed((call, arguments), options.repeats + 1)[1:]),
        }
    return figures


def main() -> None:
    """Run the benchmark and print its line of JSON."""
    options = parse()
    cores = limit_threads(options.threads)
    mixer = load(options.official)
    with contextlib.redirect_stdout(sys.stderr):
        trainer, loader = build(mixer, options, options.experts)
        steps, batch = closures(trainer, loader), next(iter(loader))
        fresh = bind(steps, trainer, batch)
        first = {
            name: [round(clock, 3) for clock in timed(call, 1)[0]]
            for name, call in fresh.items()
            if name != "gate_aborted"
        }
        runs: dict[int, dict[str, Any]] = {}
        figures: dict[str, dict[str, float]] = {}
        for gate_every in options.gate_every:
            trained, loader = build(mixer, options, options.experts)
            runs[gate_every] = whole(trained, loader, options.steps, gate_every)
            if not figures:  # in the state that the first of these runs has reached
                figures = measured(bind(steps, trained, batch), options.repeats)
            for statistic in ("median", "cpu_median"):
                total = composed(figures, runs[gate_every], gate_every, statistic)
                runs[gate_every][f"composed_of_pieces_{statistic}"] = total
        if not figures:
            figures = measured(fresh, options.repeats)
        scan = [work(mixer, options, experts) for experts in options.scan]
    settings = {name: value for name, value in vars(options).items() if name not in ("official", "data")}
    versions = {name: importlib.metadata.version(name) for name in VERSIONS} | {"python": platform.python_version()}
    shape = list(batch[1].shape)
    result = {
        "settings": settings,
        "cores": cores,
        "data_shape": shape,
        "first_call_s_wall_cpu": first,
        "pieces_ms": figures,
    }
    print(json.dumps(result | {"outer_step_ms": runs, "scan": scan, "versions": versions}))


if __name__ == "__main__":
    main()
