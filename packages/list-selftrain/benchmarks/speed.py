"""Meta weights of 16 unlabelled and 4 labelled sentences, and a student's step, beside what one would write otherwise.

`python speed.py [--layers 6 --width 384 --length 32] [--output PATH]` measures, each in a process of its own:

- meta weights by one backward and one forward-mode product (jvp), by two passes (finite), by this package's backward
  through an inner step (double), and by the library higher as the paper's code uses it, on the same prompted encoder
  with LiST adapters: milliseconds (median), and megabytes by which the peak of the process grows over its size before;
- a student's step of the learner (its draw of a batch, loss, backward, clipping, AdamW) and the same written by hand.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FORMS = ("jvp", "finite", "double", "higher")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--length", type=int, default=32, help="tokens of a sentence")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each form, in turn")
    parser.add_argument("--output", type=Path, default=Path("results/bench/speed.json"))
    parser.add_argument("--child", choices=(*FORMS, "step"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(step(args) if args.child == "step" else weigh(args, args.child)))
        return
    found: dict[str, Any] = {"layers": args.layers, "width": args.width, "length": args.length}
    rows: dict[str, list[dict[str, float]]] = {}
    for _ in range(args.rounds):
        for child in (*FORMS, "step"):
            command = [sys.executable, __file__, *sys.argv[1:], "--child", child]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            rows.setdefault(child, []).append(json.loads(done.stdout.splitlines()[-1]))
    for child, values in rows.items():
        found[child] = {key: statistics.median(one[key] for one in values) for key in values[0]}
        found[child]["all"] = values
    for form in ("jvp", "finite", "double"):
        ratios = [b["ms"] / a["ms"] for a, b in zip(rows[form], rows["higher"], strict=True)]
        memory = [a["mb"] / b["mb"] for a, b in zip(rows[form], rows["higher"], strict=True)]
        found[f"{form} faster than higher"] = [min(ratios), statistics.median(ratios), max(ratios)]
        found[f"{form} memory over higher"] = [min(memory), statistics.median(memory), max(memory)]
    ratios = [one["by_hand_ms"] / one["learner_ms"] for one in rows["step"]]
    found["learner's step as fast as by hand"] = [min(ratios), statistics.median(ratios), max(ratios)]
    from metazoo.environment import describe

    found["environment"] = describe()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    for key, value in found.items():
        if isinstance(value, list):
            print(f"{key}: {value[1]:.2f} ({value[0]:.2f} to {value[2]:.2f})")


def prepare(args: argparse.Namespace) -> Any:
    """A learner on generated reviews cut or filled to one length; its encoder is as initialised, as time is the
    same."""
    import torch
    from accelerate import Accelerator
    from list_selftrain import data
    from list_selftrain.config import Config
    from list_selftrain.train import LiSTLearner

    torch.set_num_threads(1)
    config = Config(
        width=args.width, layers=args.layers, heads=args.width // 32, feedforward=4 * args.width, pretrain_steps=0,
        adapter_dim=args.width // 8, sessions=1, session_steps=200, teacher_epochs=0, weights="uniform", dropout=0.1,
    )  # fmt: skip
    source = data.load(config)
    return LiSTLearner(config, source, Accelerator(cpu=True))


def batch(learner: Any, count: int, length: int, labelled: bool) -> dict[str, Any]:
    """Token ids repeated to ``length``, so that all forms see the same work."""
    import torch

    inputs = (learner.labelled if labelled else learner.unlabelled).take(range(count))
    ids = inputs["input_ids"]
    ids = ids.repeat(1, -(-length // ids.shape[1]))[:, :length].clamp(min=5)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mask_position": torch.full((count,), length - 2),
    }


def timed(work: Callable[[], Any], repeats: int) -> float:
    """Milliseconds, the median of ``repeats`` after two that warm up."""
    times = []
    for i in range(repeats + 2):
        started = time.perf_counter()
        work()
        if i > 1:
            times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def weigh(args: argparse.Namespace, form: str) -> dict[str, float]:
    """ms and mb of one set of meta weights."""
    import torch
    import torch.nn.functional as F
    from list_selftrain import reweighting
    from metazoo import environment

    learner = prepare(args)
    model = learner.model.eval()
    model.__dict__["full"] = None  # kept for saving; higher would take it for a part of the model
    unlabelled, labelled = batch(learner, 16, args.length, False), batch(learner, 4, args.length, True)
    targets = torch.full((16, model.classes), 1 / model.classes)
    labels = learner.labels[:4]
    if form != "higher":

        def work() -> Any:
            return reweighting.normalised(
                reweighting.products(model, [(labelled, labels)], unlabelled, targets, form)
            )  # fmt: skip

    else:
        import higher

        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)

        def work() -> Any:
            with (
                model.differentiable(),
                higher.innerloop_ctx(model, optimizer, copy_initial_weights=True) as (student, inner),
            ):
                losses = reweighting.distillation(student(**unlabelled), targets)
                epsilon = torch.zeros(16, requires_grad=True)
                inner.step((losses * epsilon).sum())
                loss = F.cross_entropy(student(**labelled), labels)
                (found,) = torch.autograd.grad(loss, epsilon)
            return reweighting.normalised(-found)

    with torch.no_grad():
        model(**labelled)  # what the first pass allocates for good is no part of it
    size = resident_mb()
    environment.reset_peak_memory()
    work()
    peak = environment.peak_memory_mb() - size
    return {"ms": timed(work, args.repeats), "mb": peak}


def resident_mb() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this benchmark reads /proc, which Linux has")


def step(args: argparse.Namespace) -> dict[str, float]:
    """ms of a student's step of the learner and by hand, in turn, on the same sentences."""
    import torch

    learner = prepare(args)
    counter = iter(range(10**6))
    learner_ms, hand_ms = [], []
    model, optimizer = learner.model, torch.optim.AdamW(learner.parameters, lr=1e-3, weight_decay=0.0)
    order = learner.draws(1)
    learner.step(0)
    targets = learner.targets

    def by_learner() -> None:
        learner.step(1 + next(counter))

    def by_hand() -> None:
        rows = order[1 + next(counter)]
        inputs = learner.unlabelled.take(rows)
        model.train()
        optimizer.zero_grad()
        logits = model(**inputs)
        q = targets[rows]
        loss = -(q * logits.log_softmax(-1)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learner.parameters, 1.0)
        optimizer.step()

    for _ in range(3):
        learner_ms.append(timed(by_learner, 10))
        hand_ms.append(timed(by_hand, 10))
    return {"learner_ms": statistics.median(learner_ms), "by_hand_ms": statistics.median(hand_ms)}


if __name__ == "__main__":
    main()
