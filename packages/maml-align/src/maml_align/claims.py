"""MAML-Align's claims as code. Margins, seeds and metrics were set before the claims were measured.

A seed decides initialisation, split and meta-tasks. `tuning` counts trials at seeds from 100 on, scored on the dev part
(benchmarks/tuning.py): the same number for each trained arm of a claim.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from metazoo.claims import Claim

from maml_align.config import PRESETS, Config

_PAPER, _PAPER_STS = PRESETS["paper"], PRESETS["paper-stsb"]


def measure(config: Config, seed: int) -> dict[str, Any]:
    """Train one arm, and score it on the test part.

    Returns:
        What :func:`maml_align.evaluate.evaluate` returns of the trained encoder; seconds_of_training; kd_share and
        distance, means over the rows of training where they are; matrix of scores by languages, as lists.
    """
    import tempfile
    import time

    import numpy as np
    from metazoo.options import RunOptions

    from maml_align import evaluate
    from maml_align.data import Questions
    from maml_align.train import train

    with tempfile.TemporaryDirectory() as scratch:
        started = time.perf_counter()
        options = RunOptions(output_dir=Path(scratch) / "run", log_every=10, checkpoint_every=10**9)
        run = train(replace(config, seed=seed), options)
        seconds = time.perf_counter() - started
    if run.data.kind == "vectors":
        found: dict[str, Any] = dict(evaluate.evaluate_world(run))
    else:
        summary, matrix = evaluate.score(run.encoder, run.data.test, run.config)  # type: ignore[arg-type]
        languages = [*config.languages, *config.unseen]
        found = dict(summary)
        found["matrix"] = [[matrix.get((one, other)) for other in languages] for one in languages]
        if isinstance(run.data.test, Questions):
            found["questions"] = float(len(run.data.test.ids))
    for name in ("kd_share", "distance"):
        values = [row[name] for row in run.metrics if name in row]
        if values:
            found[name] = float(np.mean(values))
    return {**found, "seconds_of_training": seconds}


def arms_of(base: Config, **rates: tuple[float, float]) -> dict[str, Config]:
    """Zero-shot, the teacher alone, the student alone, MAML-Align, and fine-tuning on the same outer sets or on all.

    Args:
        base: MAML-Align.
        rates: (inner, outer) of an arm, where they are not the base's.
    """
    arms = {
        "zero-shot": replace(base, method="zero-shot"),
        "t-maml": _two_sets(base, "MONO_BIL"),
        "s-maml": _two_sets(base, "BIL_MULTI"),
        "maml-align": base,
        "fine-tune": replace(base, method="fine-tune", finetune_sets="outer"),
        "fine-tune-all": replace(base, method="fine-tune", finetune_sets="all"),
    }
    for arm, (inner_lr, outer_lr) in rates.items():
        name = arm.replace("_", "-")
        arms[name] = replace(arms[name], inner_lr=inner_lr, outer_lr=outer_lr)
    arms["as-coded"] = replace(arms["maml-align"], student_steps=0)
    arms["second-order"] = replace(arms["maml-align"], first_order=False)
    return arms


def _two_sets(base: Config, mode: str) -> Config:
    """MAML in a mode of two sets; of the base's tuples those two."""
    places = (0, 1) if mode == "MONO_BIL" else (1, 2)
    tuples = tuple("-".join(text.split("-")[i] for i in places) for text in base.tuples)
    return replace(base, method="maml", mode=mode, tuples=tuples)


def _only(arms: Mapping[str, Config], *names: str) -> dict[str, Config]:
    return {name: arms[name] for name in names}


CLAIMS: tuple[Claim, ...] = ()
