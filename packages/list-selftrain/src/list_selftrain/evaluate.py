"""What a run is worth: accuracy, calibration, sessions, and how its weights part right from wrong pseudo-labels."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from metazoo import runfolder
from metazoo.errors import UserError
from metazoo.options import RunOptions

from list_selftrain import baselines, data, metrics
from list_selftrain.config import PRESETS, Config, EvaluateOptions, ExportOptions, ReweightOptions
from list_selftrain.model import PromptClassifier, parameters
from list_selftrain.train import Run, load, train


def evaluate(run: Run | Path | str, options: EvaluateOptions | None = None) -> dict[str, Any]:
    """Score a run on its test part.

    Returns:
        accuracy, macro_f1, chance (the most frequent class), calibration_error, in percent; teacher_accuracy and
        session_N_accuracy; of the last session's pseudo-labels pseudo_label_accuracy, and where they were re-weighted
        weight_separation (area under the ROC curve, right against wrong ones) and zero_weights; tfidf_accuracy and
        tfidf_self_training_accuracy (scikit-learn); trained_parameters, parameters. All also goes to evaluation.json.

    Raises:
        UserError: not a run folder, an unfinished run, no good checkpoint, or no test part.
    """
    options = options or EvaluateOptions()
    if not isinstance(run, Run):
        run = load(run)
    test = run.data.test
    if test is None or test.labels is None:
        raise UserError(f"{run.folder} was trained without test rows: give them to `train` with --test")
    probabilities = run.predict_proba(test, options.batch_size)
    found: dict[str, Any] = dict(metrics.compute(probabilities.argmax(1), test.labels))
    found["chance"] = 100 * float(np.bincount(test.labels).max() / len(test.labels))
    found["calibration_error"] = metrics.calibration_error(probabilities, test.labels)
    for number, session in enumerate(run.sessions):
        if "accuracy" in session:
            found["teacher_accuracy" if number == 0 else f"session_{number}_accuracy"] = session["accuracy"]
    found |= pseudo_labels(run)
    if options.baselines and test.texts[0]:
        found |= baselines.tfidf_self_training(run.data, run.config.seed)
    found["trained_parameters"], found["parameters"] = parameters(run.model)
    runfolder.write_text(run.folder / "evaluation.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    if options.plots:
        from list_selftrain import plots

        curves = {"test": metrics.reliability(probabilities, test.labels)}
        drawn, truth = _drawn(run), run.data.unlabelled.labels
        if truth is not None and len(drawn):
            curves["pseudo-labels"] = metrics.reliability(run.targets[drawn], truth[drawn])
        plots.calibration(curves, run.folder / "calibration.png")
        if "weight_separation" in found:
            plots.weights(weight_groups(run), run.folder / "weights.png")
    return found


def _drawn(run: Run) -> np.ndarray:
    return np.flatnonzero(run.targets.sum(1) > 0)


def pseudo_labels(run: Run) -> dict[str, float]:
    """Of the last session: pseudo_label_accuracy where the truth is known, weight_separation where it was re-weighted,
    zero_weights and effective_examples (means over its re-weighted steps)."""
    last = run.sessions[-1]
    found = {
        name: last[name] for name in ("pseudo_label_accuracy", "zero_weights", "effective_examples") if name in last
    }
    truth = run.data.unlabelled.labels
    if truth is not None and run.config.sessions and run.config.weights == "meta":
        separation = metrics.separation(run.weights, run.targets.argmax(1) == truth)
        if not np.isnan(separation):
            found["weight_separation"] = separation
    return found


def weight_groups(run: Run) -> dict[str, np.ndarray]:
    """Weights of the last session's right and wrong pseudo-labels."""
    truth = run.data.unlabelled.labels
    assert truth is not None
    right, held = run.targets.argmax(1) == truth, ~np.isnan(run.weights)
    return {"right": run.weights[right & held], "wrong": run.weights[~right & held]}


def reweight_demo(options: ReweightOptions) -> dict[str, Any]:
    """`list-selftrain reweight-demo`: the true labels of the unlabelled part, flipped, with and without learned
    weights.

    A network on frozen features learns twice from the same flipped labels, with the preset features.

    Returns:
        uniform_accuracy and meta_accuracy on the test part, in percent; flipped (share of pseudo-labels);
        weight_separation; mean_weight_right and mean_weight_wrong. A plot of the weights goes to the folder.

    Raises:
        UserError: as :func:`list_selftrain.train.train`.
    """
    from list_selftrain import plots

    config: Config = replace(
        PRESETS["features"], dataset=options.dataset, data_dir=options.data_dir, noise=options.noise,
        noise_rate=options.noise_rate, seed=options.seed,
    )  # fmt: skip
    if data.load(config).test is None:
        raise UserError(f"{options.dataset} has no test part to compare students on: name another --dataset")
    runs = {
        weights: train(replace(config, weights=weights), RunOptions(output_dir=options.output_dir / weights))
        for weights in ("uniform", "meta")
    }
    found: dict[str, Any] = {f"{weights}_accuracy": run.sessions[-1]["accuracy"] for weights, run in runs.items()}
    groups = weight_groups(runs["meta"])
    found["flipped"] = 100 - runs["meta"].sessions[-1]["pseudo_label_accuracy"]
    found["weight_separation"] = pseudo_labels(runs["meta"]).get("weight_separation", float("nan"))
    found |= {
        f"mean_weight_{name}": float(values.mean()) if len(values) else math.nan for name, values in groups.items()
    }
    path = options.output_dir / "weights.png"
    plots.weights(groups, path, title=f"{options.dataset}, {options.noise} noise of {options.noise_rate:g}")
    found["plot"] = str(path)
    return found


def export_adapter(options: ExportOptions) -> str:
    """`list-selftrain export-adapter`: adapters and head of a run, alone.

    Raises:
        UserError: no prompted classifier, or as :func:`list_selftrain.train.load`.
    """
    run = load(options.run)
    if not isinstance(run.model, PromptClassifier):
        raise UserError(f"{options.run} holds no prompted classifier: only those have adapters to export")
    run.model.save_pretrained(options.output, labels=run.data.labels)
    trained, every = parameters(run.model)
    size = sum(path.stat().st_size for path in options.output.glob("*.safetensors"))
    return (
        f"{options.output}: {trained:,} of {every:,} parameters, {size / 1e6:.2f} MB; load it with "
        f"PromptClassifier.from_pretrained({str(options.output)!r})"
    )
