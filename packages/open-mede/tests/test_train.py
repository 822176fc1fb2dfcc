"""Training: episodes, phases, averages, resuming, two processes, what is refused; and that it learns."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from metazoo import loop, testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from open_mede import data, evaluate, plots, sprites, train
from open_mede.config import AVERAGES, Config, EvaluateOptions
from open_mede.data import Clips, Data
from open_mede.model import FeatureClassifier, VideoTextClassifier, load_classifier
from torch import Tensor

torch.set_num_threads(1)

SCRIPT = Path(__file__).with_name("two_processes.py")
FEATURES = Config(
    dataset="features", model="linear", clips=48, test_clips=40, method="meta", alpha=0.5, delta=1.0, epochs=3, batch=8,
    optimizer="sgd", lr=0.1, momentum=0.9, schedule="cosine", average="gwa", mu=2.0, sigma=1.0, hidden=8,
)  # fmt: skip
SPRITES = Config(
    dataset="sprites", model="tiny", clips=26, test_clips=6, draws=1, width=8, heads=2, vision_layers=1, text_layers=1,
    patch=16, image_steps=3, image_batch=6, adapter=2, difference=True, method="meta", alpha=0.01, epochs=2, batch=8,
    optimizer="adamw", lr=1e-3, weight_decay=0.01, clip=1.0, warmup_epochs=0.5, average="gwa", mu=1.0, sigma=1.0,
)  # fmt: skip
METHODS = ("frozen", "finetune", "two-batch", "meta", "interp", "distill", "l2-sp")


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "training", lambda rows, path: None)
    monkeypatch.setattr(plots, "gaussian", lambda config, path: None)
    monkeypatch.setattr(sprites, "BACKGROUNDS", 4)  # drawing all takes longer than a training


@cache
def _source(dataset: str, clips: int, test_clips: int, draws: int, seed: int, holdout: int) -> Data:
    model = "linear" if dataset == "features" else "tiny"
    return data.load(
        Config(
            dataset=dataset, model=model, clips=clips, test_clips=test_clips, draws=draws, seed=seed, holdout=holdout
        )
    )  # fmt: skip


def source(config: Config) -> Data:
    """What data.load gives, generated once."""
    return _source(config.dataset, config.clips, config.test_clips, config.draws, config.seed, config.holdout)


def trained(folder: Path, config: Config, **options: Any) -> train.Run:
    return train.train_on(
        config, source, RunOptions(output_dir=folder, **{"log_every": 1, "checkpoint_every": 100, **options})
    )


def learner(config: Config, load: Callable[[Config], Data] = source) -> train.CrossBatchMetaTrainer:
    return train.CrossBatchMetaTrainer(config, load(config), loop.prepare(RunOptions(), seed=config.seed))


def weights(run: train.Run) -> dict[str, Tensor]:
    """All of the learner's, and all averages'."""
    found = {name: value.clone() for name, value in run.model.state_dict().items()}
    for average, held in run.weights.items():
        found |= {f"{average} {name}": value for name, value in held.items()}
    return found


def moved(one: train.Run, other: train.Run) -> set[str]:
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys()
    return {name for name, value in a.items() if not torch.equal(value, b[name])}


def losses(run: train.Run) -> list[float]:
    return [row["loss"] for row in run.metrics]


# ---- runs


def test_run_folder(tmp_path: Path) -> None:
    run = train.train(FEATURES, RunOptions(output_dir=tmp_path / "run", log_every=1))
    assert [row["step"] for row in run.metrics] == list(range(1, 19))
    assert [row["epoch"] for row in run.metrics] == [1] * 6 + [2] * 6 + [3] * 6
    for row in run.metrics:
        assert row.keys() >= {"loss", "query_loss", "cosine", "lr", "grad_norm", "epoch", "phase"}
        assert row["phase"] == 1
        assert -1 <= row["cosine"] <= 1
    for name in ("config.json", "environment.json", "metrics.jsonl", "checkpoints/step-00000018/state.safetensors"):
        assert (tmp_path / "run" / name).is_file()
    assert set(run.weights) == set(AVERAGES)
    again = train.load(tmp_path / "run")
    assert not moved(run, again)
    assert again.metrics == run.metrics
    saved = FeatureClassifier.from_pretrained(tmp_path / "run" / "model")
    for name, value in saved.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[name])


def test_run_folder_of_a_video_learner(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", SPRITES)
    assert [row["phase"] for row in run.metrics] == [0] * 3 + [1] * 6
    assert [row["epoch"] for row in run.metrics] == [0] * 3 + [1] * 3 + [2] * 3
    saved = load_classifier(tmp_path / "run" / "model")
    assert isinstance(run.model, VideoTextClassifier)
    clips, _ = source(SPRITES).tests["base_in"].testing([0, 1])
    assert len(clips) == 2
    with torch.no_grad():
        texts = [model.encode_texts(["east steady", "still halting"]) for model in (run.model, saved)]
        logits = [m(m.pixels(clips[:, 0]), t) for m, t in zip((run.model, saved), texts, strict=True)]
    assert torch.equal(*texts)
    assert torch.equal(*logits)
    assert not moved(run, train.load(tmp_path / "run", source))


@pytest.mark.parametrize("config", [FEATURES, SPRITES], ids=["features", "sprites"])
def test_same_seed_same_bits(tmp_path: Path, config: Config) -> None:
    one, other, third = (trained(tmp_path / str(i), replace(config, seed=seed)) for i, seed in enumerate((0, 0, 1)))
    assert not moved(one, other)
    assert one.metrics == other.metrics
    assert any(name.startswith("gwa ") for name in moved(one, third))


@pytest.mark.parametrize(
    ("config", "cuts"),
    [
        (SPRITES, (2, 3, 6, 7)),
        (replace(SPRITES, method="distill", epochs=1), (4,)),
        (replace(FEATURES, method="l2-sp"), (1, 6, 17)),
        (replace(FEATURES, method="interp", mix=0.5), (12,)),
        (replace(FEATURES, query="class-disjoint", watch_every=2), (5,)),
    ],
    ids=["sprites", "distill", "l2-sp", "interp", "class-disjoint"],
)
def test_resumed_anywhere(tmp_path: Path, config: Config, cuts: tuple[int, ...]) -> None:
    """Also at the change of phase, where the optimizer begins anew, and at ends of epochs, where averages are taken."""
    whole = trained(tmp_path / "whole", config)
    held = train.CrossBatchMetaTrainer.step
    for at in cuts:
        folder = tmp_path / f"cut-{at}"

        def stopping(self: Any, step: int, at: int = at) -> Any:
            if step == at:
                raise KeyboardInterrupt
            return held(self, step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.CrossBatchMetaTrainer, "step", stopping)
            with pytest.raises(KeyboardInterrupt):
                trained(folder, config, checkpoint_every=1)
        with pytest.raises(UserError, match=f"at step {at} of {len(whole.metrics)}"):
            train.load(folder, source)
        resumed = trained(folder, config, checkpoint_every=1, resume=True)
        assert not moved(whole, resumed), at
        assert resumed.metrics == whole.metrics


def test_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=str(tmp_path)):
        train.load(tmp_path)


@pytest.mark.parametrize("method", METHODS)
def test_every_method(tmp_path: Path, method: Any) -> None:
    """The image phase is the same in all, and the start of each; a frozen learner is frame by frame."""
    run = trained(tmp_path / "run", replace(SPRITES, method=method, mix=0.0))
    assert np.isfinite(losses(run)).all()
    other = trained(tmp_path / "other", replace(SPRITES, method="finetune", epochs=1))
    assert losses(run)[:3] == pytest.approx(losses(other)[:3], rel=1e-5)
    if method == "frozen":
        assert len(run.metrics) == 3
        assert not run.weights
        assert isinstance(run.model, VideoTextClassifier)
        assert not run.model.config.temporal
        return
    assert losses(run)[:3] == losses(other)[:3]
    for name, value in run.weights["start"].items():
        assert torch.equal(value, other.weights["start"][name])
    held, begun = run.model.state_dict(), other.model.state_dict()
    for name, value in held.items():
        if "text" in name or "logit_scale" in name:
            assert torch.equal(value, begun[name]), name
    changed = {name for name, value in run.weights["start"].items() if not torch.equal(held[name], value)}
    for part in ("vision_model", "visual_projection", ".adapter.", ".difference."):
        assert any(part in name for name in changed), part
    vectors = trained(tmp_path / "mlp", replace(FEATURES, model="mlp", method=method))
    assert np.isfinite(losses(vectors)).all()
    assert any("adapter" in name for name, value in vectors.weights["last"].items() if value.abs().sum() > 0)


def test_averages_are_those_of_the_epochs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held, epochs = train.CrossBatchMetaTrainer.step, []

    def noting(self: Any, step: int) -> Any:
        row = held(self, step)
        if (step + 1) % self.per_epoch == 0:
            epochs.append({name: value.detach().clone() for name, value in self.trained.items()})
        return row

    monkeypatch.setattr(train.CrossBatchMetaTrainer, "step", noting)
    run = trained(tmp_path / "run", replace(FEATURES, epochs=4, swa_start=3, ema_decay=0.6, mu=2.0, sigma=0.8))
    assert len(epochs) == 4
    theta = torch.stack([one["map.weight"].double() for one in epochs])
    bell = torch.tensor([math.exp(-((t - 2) ** 2) / (2 * 0.8**2)) for t in (1, 2, 3, 4)], dtype=torch.float64)
    ema = theta[0]
    for one in theta[1:]:
        ema = 0.6 * ema + 0.4 * one
    wanted = {
        "last": theta[3], "swa": theta[2:].mean(0), "ema": ema,
        "gwa": torch.einsum("t,tij->ij", bell / bell.sum(), theta),
    }  # fmt: skip
    for name, value in wanted.items():
        torch.testing.assert_close(run.weights[name]["map.weight"].double(), value, rtol=1e-4, atol=1e-6)
        used = run.use(name).state_dict()["map.weight"]
        assert torch.equal(used, run.weights[name]["map.weight"])
        assert all(not torch.equal(used, run.weights[other]["map.weight"]) for other in wanted if other != name)


def test_mixed_with_the_start(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", FEATURES)
    start = learner(FEATURES).model.state_dict()["map.weight"]
    for share in (0.5, 1.0):
        run = trained(tmp_path / str(share), replace(FEATURES, mix=share))
        assert torch.equal(run.weights["gwa"]["map.weight"], whole.weights["gwa"]["map.weight"])
        wanted = share * start + (1 - share) * whole.weights["gwa"]["map.weight"]
        torch.testing.assert_close(run.model.state_dict()["map.weight"], wanted, rtol=1e-6, atol=1e-7)
        if share == 1:
            assert torch.equal(run.model.state_dict()["map.weight"], start)
        saved = FeatureClassifier.from_pretrained(tmp_path / str(share) / "model")
        assert torch.equal(saved.map.weight, run.model.state_dict()["map.weight"])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"method": "l2-sp", "anchor": 0.0}, {"method": "finetune"}),
        ({"method": "distill", "distill_weight": 0.0}, {"method": "finetune"}),
        ({"method": "interp", "interp_weight": 0.0}, {"method": "finetune"}),
        ({"method": "interp", "interp_max": 0.0, "interp_weight": 1.0, "lr": 0.05}, {"method": "finetune", "lr": 0.1}),
        ({"method": "meta", "alpha": 0.0}, {"method": "two-batch"}),
        ({"method": "meta", "delta": 0.0}, {"method": "finetune"}),
    ],
    ids=["l2-sp", "distill", "interp", "interp-0", "meta", "delta"],
)
def test_limits_are_other_methods(tmp_path: Path, one: dict[str, Any], other: dict[str, Any]) -> None:
    """Bit for bit; twice the gradient at half the rate, too."""
    runs = [trained(tmp_path / str(i), replace(FEATURES, model="mlp", **f)) for i, f in enumerate((one, other))]
    for average in AVERAGES:
        for name, value in runs[0].weights[average].items():
            assert torch.equal(value, runs[1].weights[average][name]), name
    assert losses(runs[0]) == losses(runs[1])


@pytest.mark.parametrize("fields", [{"method": "l2-sp", "anchor": 0.5}, {"method": "distill"}, {"method": "interp"},
                                    {"method": "meta"}, {"method": "two-batch"}])  # fmt: skip
def test_methods_differ_from_finetuning(tmp_path: Path, fields: dict[str, Any]) -> None:
    plain, run = (trained(tmp_path / str(i), replace(FEATURES, **f)) for i, f in enumerate(
        ({"method": "finetune"}, fields)))  # fmt: skip
    assert not torch.equal(plain.weights["last"]["map.weight"], run.weights["last"]["map.weight"])


def test_anchor_keeps_weights_near(tmp_path: Path) -> None:
    start = learner(FEATURES).model.state_dict()["map.weight"]
    far = []
    for anchor in (0.0, 0.5, 2.0):
        run = trained(tmp_path / str(anchor), replace(FEATURES, method="l2-sp", anchor=anchor, epochs=6))
        far.append(float((run.weights["last"]["map.weight"] - start).norm()))
    assert far[0] > 1.2 * far[1] > 1.2 * far[2] > 0


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    whole, parts = (trained(tmp_path / str(n), replace(SPRITES, micro_batch=n)) for n in (None, 3))
    for one, other in zip(whole.metrics, parts.metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    whole, again = (trained(tmp_path / str(on), replace(SPRITES, checkpointing=on)) for on in (False, True))
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)


def test_low_rank_run(tmp_path: Path) -> None:
    """It is scored alike right after training and when it is loaded; what is saved is merged."""
    config = replace(SPRITES, trained="lora", lora_rank=2, adapter=0, average="last")
    run = trained(tmp_path / "run", config)
    assert all("lora_" in name for name in run.weights["last"])
    again = train.load(tmp_path / "run", source)
    options = EvaluateOptions(plots=False)
    assert evaluate.evaluate(run, options) == evaluate.evaluate(again, options)
    with pytest.raises(UserError, match="--average gwa: the run has last"):
        evaluate.evaluate(again, replace(options, average="gwa"))
    saved = load_classifier(tmp_path / "run" / "model")
    clips = torch.randn(2, 8, 3, 32, 32)
    assert isinstance(again.model, VideoTextClassifier)
    with torch.no_grad():
        texts = saved.encode_texts(["east steady", "still halting"])
        torch.testing.assert_close(saved(clips, texts), again.model(clips, texts), rtol=1e-4, atol=1e-4)


def test_texts_are_encoded_once(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", replace(SPRITES, templates=("{}", "a {} in sand")))
    assert run.data.train is not None
    assert run.model.encoded == 2 * len(run.data.train.classes) == 60
    evaluate.evaluate(run, EvaluateOptions(plots=False))
    # the classes of in and out of context are the same: once for both
    assert run.model.encoded == 60 + 2 * 60


# ---- episodes


Episode = tuple[Any, Any, float, float, bool]


@pytest.fixture
def episodes(monkeypatch: pytest.MonkeyPatch) -> list[Episode]:
    """(support, query, alpha, delta, first_order) of each step that is taken."""
    found: list[Episode] = []
    held = train.cross_batch_step

    def noted(module: Any, loss: Any, support: Any, query: Any, **options: Any) -> Any:
        found.append((support, query, options["alpha"], options["delta"], options["first_order"]))
        return held(module, loss, support, query, **options)

    monkeypatch.setattr(train, "cross_batch_step", noted)
    return found


def inputs(part: Any) -> Tensor:
    return torch.cat([one[0] for one in part])


def labels(part: Any) -> list[int]:
    return [int(label) for one in part for label in one[1]]


def test_query_is_the_next_batch(tmp_path: Path, episodes: list[Episode]) -> None:
    """Of the same epoch: its last batch is judged on its first."""
    trained(tmp_path / "run", FEATURES)
    assert len(episodes) == 18
    for epoch in range(3):
        own = episodes[6 * epoch : 6 * epoch + 6]
        for number in range(6):
            assert torch.equal(inputs(own[number][1]), inputs(own[(number + 1) % 6][0]))
        seen = torch.cat([inputs(one[0]) for one in own])
        assert len(seen.unique(dim=0)) == 48
    assert not torch.equal(inputs(episodes[0][0]), inputs(episodes[6][0]))
    assert {one[2:] for one in episodes} == {(0.5, 1.0, True)}


def test_options_reach_the_step(tmp_path: Path, episodes: list[Episode]) -> None:
    trained(tmp_path / "second", replace(FEATURES, alpha=0.3, delta=0.7, order="second", epochs=1))
    assert {one[2:] for one in episodes} == {(0.3, 0.7, False)}
    episodes.clear()
    trained(tmp_path / "two", replace(FEATURES, method="two-batch", alpha=0.3, delta=0.7, epochs=1))
    assert {one[2:] for one in episodes} == {(0.0, 0.7, True)}


def test_query_of_another_order(tmp_path: Path, episodes: list[Episode]) -> None:
    trained(tmp_path / "run", replace(FEATURES, query="shuffle", epochs=1))
    supports = [inputs(one[0]) for one in episodes]
    queries = [inputs(one[1]) for one in episodes]
    assert len(torch.cat(queries).unique(dim=0)) == 48
    same = [torch.equal(a, b) for a in supports for b in queries]
    assert not any(same)


def test_query_of_other_classes(tmp_path: Path, episodes: list[Episode]) -> None:
    trained(tmp_path / "run", replace(FEATURES, query="class-disjoint"))
    for support, query, *_ in episodes:
        assert len(labels(query)) == 8
        assert not set(labels(support)) & set(labels(query))
    assert len({tuple(labels(one[1])) for one in episodes}) == len(episodes)


def test_query_of_other_classes_where_there_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="class-disjoint"):
        trained(tmp_path / "run", replace(FEATURES, clips=600, batch=300, query="class-disjoint"))


def test_what_the_inner_step_does_is_measured(tmp_path: Path) -> None:
    plain = trained(tmp_path / "plain", FEATURES)
    run = trained(tmp_path / "run", replace(FEATURES, watch_every=3))
    assert [row["step"] for row in run.metrics if "gain" in row] == [3, 6, 9, 12, 15, 18]
    # watching changes nothing
    assert torch.equal(run.weights["last"]["map.weight"], plain.weights["last"]["map.weight"])
    assert losses(run) == losses(plain)
    for row in run.metrics:
        if "gain" in row:
            assert row["query_loss_at"] + row["gain"] == pytest.approx(row["query_loss"], rel=1e-4, abs=1e-5)


def test_gradient_of_a_step_by_hand() -> None:
    """Σ over both batches, at θ and at θ′, of the mean cross-entropy."""
    one = learner(FEATURES)
    held = one.source.train
    assert isinstance(held, Clips)
    order = data.batches(48, 8, 0, 0)
    texts = one.model.encode_texts(held.classes)
    weight = one.trained["map.weight"].detach().clone().requires_grad_()

    def loss(at: Tensor, rows: np.ndarray) -> Tensor:
        features = torch.nn.functional.normalize(torch.from_numpy(held.array[rows]) @ at.T, dim=-1)
        return torch.nn.functional.cross_entropy(20 * features @ texts.T, torch.from_numpy(held.labels[rows]))

    (g,) = torch.autograd.grad(loss(weight, order[0]), weight)
    there = (weight - 0.5 * g).detach().requires_grad_()
    (more,) = torch.autograd.grad(loss(there, order[1]), there)
    row = one.step(0)
    assert float(row["loss"]) == pytest.approx(loss(weight, order[0]).item(), rel=1e-5)
    assert float(row["query_loss"]) == pytest.approx(loss(there, order[1]).item(), rel=1e-5)
    assert float(row["grad_norm"]) == pytest.approx((g + more).norm().item(), rel=1e-4)
    wanted = weight.detach() - 0.1 * (g + more)
    torch.testing.assert_close(one.trained["map.weight"].detach(), wanted, rtol=1e-4, atol=1e-6)


def test_rates() -> None:
    one = learner(replace(FEATURES, epochs=4, warmup_epochs=1.5, lr=0.2))  # six steps an epoch, nine of warm-up
    rates = [one._rate(step) for step in range(24)]
    assert rates[:9] == pytest.approx([0.2 * (i + 1) / 10 for i in range(9)])
    assert rates[9:] == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 15)) for i in range(15)])
    assert max(rates) == pytest.approx(0.2)
    constant = learner(replace(FEATURES, epochs=4, schedule="constant", lr=0.2))
    assert [constant._rate(step) for step in (0, 7, 23)] == [0.2, 0.2, 0.2]


def test_rates_are_used(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", SPRITES)
    one = learner(SPRITES)
    assert [row["lr"] for row in run.metrics[3:]] == pytest.approx([one._rate(step) for step in range(6)])


def test_weight_decay_spares_vectors() -> None:
    one = learner(SPRITES)
    decayed, spared = one.optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.01, 0.0)
    assert all(value.ndim > 1 for value in decayed["params"])
    assert all(value.ndim <= 1 for value in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(one.parameters)


def test_gradients_are_clipped(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", replace(FEATURES, clip=1e-3, momentum=0.0, schedule="constant", epochs=1))
    start = learner(FEATURES).model.state_dict()["map.weight"]
    assert min(row["grad_norm"] for row in run.metrics) > 1e-3
    assert float((run.weights["last"]["map.weight"] - start).norm()) <= 6 * 0.1 * 1e-3 * 1.001


# ---- scores


def test_evaluation(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", FEATURES)
    found = evaluate.evaluate(run, EvaluateOptions(plots=False))
    kept = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert {name: kept[name] for name in found} == found
    sets = ("base_in", "base_out", "novel_in", "novel_out")
    assert found.keys() >= {*sets, "hm_in", "hm_out", "base_hm", "novel_hm", "base_drop", "novel_drop"}
    texts = {kind: source(FEATURES).tests[f"{kind}_in"].classes for kind in ("base", "novel")}
    for name in sets:
        held = source(FEATURES).tests[name]
        assert found[f"chance_{name}"] == 5
        with torch.no_grad():
            names = run.model.encode_texts(texts[name.split("_")[0]])
            said = run.model(torch.from_numpy(held.array), names).argmax(1).numpy()  # type: ignore[union-attr]
        assert found[name] == pytest.approx(100 * (said == held.labels).mean())
        by_class = kept["by_class"][name]
        for i, label in enumerate(held.classes):
            if (held.labels == i).any():
                assert by_class[label] == pytest.approx(100 * (said == i)[held.labels == i].mean())
    again = evaluate.evaluate(train.load(tmp_path / "run", source), EvaluateOptions(plots=False))
    assert again == found
    last = evaluate.evaluate(run, EvaluateOptions(plots=False, average="last"))
    assert torch.equal(run.model.state_dict()["map.weight"], run.weights["last"]["map.weight"])
    assert last.keys() == found.keys()


def test_evaluation_of_a_frozen_learner(tmp_path: Path) -> None:
    config = replace(FEATURES, method="frozen")
    run = trained(tmp_path / "run", config)
    assert not run.metrics
    found = evaluate.evaluate(train.load(tmp_path / "run", source), EvaluateOptions(plots=False))
    assert found["novel_in"] > 50 > found["novel_out"]
    with pytest.raises(UserError, match="--average gwa"):
        evaluate.evaluate(run, EvaluateOptions(plots=False, average="gwa"))
    with pytest.raises(UserError, match="feature vectors"):
        evaluate.evaluate(run, EvaluateOptions(plots=False, dataset="other.csv"))


def test_holdout_is_of_the_known_classes() -> None:
    """Settings are chosen on them: neither trained on, nor novel."""
    for config in (replace(FEATURES, holdout=5), replace(SPRITES, holdout=5)):
        held, plain = source(config), source(replace(config, holdout=0))
        assert held.train is not None
        assert plain.train is not None
        base, novel = held.tests["base_in"].classes, held.tests["novel_in"].classes
        assert held.train.classes == base
        assert len(novel) == 5
        assert not set(base) & set(novel)
        assert set(base) | set(novel) == set(plain.train.classes)
        assert not set(novel) & set(plain.tests["novel_in"].classes)


def test_learns(tmp_path: Path) -> None:
    """Cross-batch training lifts what is out of context far above the start, which is at chance there."""
    config = replace(FEATURES, clips=800, test_clips=400, batch=32, epochs=8, mu=6.0, sigma=3.0)
    start, run = (trained(tmp_path / m, replace(config, method=m)) for m in ("frozen", "meta"))
    before, after = (evaluate.evaluate(one, EvaluateOptions(plots=False)) for one in (start, run))
    assert before["base_out"] < 12
    assert after["base_out"] > before["base_out"] + 20
    assert after["novel_out"] > before["novel_out"] + 5
    assert after["base_in"] > 90
    assert np.mean(losses(run)[-10:]) < 0.5 * np.mean(losses(run)[:3])


# ---- refused


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"clips": 15}, "15 training clips are 1 batches of 8, --method meta needs 2"),
        ({"clips": 15, "method": "two-batch"}, "--method two-batch needs 2"),
        ({"clips": 7, "method": "finetune"}, "7 training clips are 0 batches of 8"),
        ({"holdout": 19}, "--holdout is 19 of 20 classes"),
    ],
)
def test_refused(tmp_path: Path, fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        trained(tmp_path / "run", replace(FEATURES, **fields))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"alpha": -0.1}, "--alpha"), ({"delta": -1.0}, "--delta"), ({"sigma": 0.0}, "--sigma"),
        ({"sigma": -1.0}, "--sigma"), ({"mu": math.nan}, "--mu"), ({"lr": 0.0}, "--lr"), ({"epochs": 0}, "--epochs"),
        ({"order": "second", "method": "finetune"}, "--order second"), ({"mix": 1.5}, "--mix"),
        ({"query": "shuffle", "method": "interp"}, "--query"), ({"swa_start": 9}, "--swa-start"),
        ({"warmup_epochs": 4.0}, "--warmup-epochs"), ({"templates": ("a video",)}, "--templates"),
        ({"templates": ()}, "--templates"), ({"model": "tiny"}, "--model linear or mlp"), ({"image_steps": 3}, "tiny"),
        ({"watch_every": 2, "method": "finetune"}, "--watch-every"), ({"split": "frequent"}, "--split"),
        ({"debiased": True}, "--debiased"), ({"trained": "lora"}, "--trained"), ({"ratio": 1.1}, "--ratio"),
    ],
)  # fmt: skip
def test_config_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(FEATURES, **fields)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"trained": "lora", "average": "gwa"}, "--trained lora"), ({"trained": "lora", "average": "last", "mix": 0.5},
                                                                   "--trained lora"),
        ({"trained": "adapter", "adapter": 0, "difference": False}, "--trained adapter"),
        ({"order": "second", "checkpointing": True}, "--order second and --checkpointing"), ({"width": 9}, "--width 9"),
        ({"patch": 5}, "--patch 5"), ({"dataset": "features"}, "--model linear or mlp"),
    ],
)  # fmt: skip
def test_config_of_sprites_refused(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        replace(SPRITES, **fields)


def test_one_class_and_no_clips_are_refused(tmp_path: Path) -> None:
    held = source(FEATURES)
    assert isinstance(held.train, Clips)
    alone = Clips(("base 0",), np.zeros(48, dtype=int), held.train.array)
    for train_clips, says in ((alone, "one class to train on, 'base 0'"), (None, "no training clips")):
        with pytest.raises(UserError, match=says):
            train.train_on(
                FEATURES, lambda config, given=train_clips: replace(held, train=given),
                RunOptions(output_dir=tmp_path / "run"),
            )  # fmt: skip
    # a frozen learner needs none
    train.train_on(
        replace(FEATURES, method="frozen"), lambda config: replace(held, train=None),
        RunOptions(output_dir=tmp_path / "frozen"),
    )  # fmt: skip


def test_second_order_in_two_processes_is_refused() -> None:
    class Two:
        num_processes = 2

    with pytest.raises(UserError, match="--order second is for one process"):
        train.CrossBatchMetaTrainer(replace(FEATURES, order="second"), source(FEATURES), Two())  # type: ignore[arg-type]


# ---- processes and precision


def test_two_processes(tmp_path: Path) -> None:
    """The same gradient of the whole batch, each process having its share, odd ones too, and the same θ′."""
    features = replace(FEATURES, batch=7, epochs=2)
    configs = {
        "meta": features, "parts": replace(features, micro_batch=2, model="mlp", query="class-disjoint"),
        "interp": replace(features, method="interp"), "distill": replace(features, method="distill"),
        "sprites": replace(SPRITES, alpha=0.05),
    }  # fmt: skip
    jobs = [(str(tmp_path / name), _plain(config)) for name, config in configs.items()]
    testing.torchrun(2, str(SCRIPT), json.dumps(jobs))
    for name, config in configs.items():
        ranks = [np.load(f"{tmp_path / name}.{rank}.npz") for rank in (0, 1)]
        gradients: list[np.ndarray] = []
        held = train.CrossBatchMetaTrainer._gradient

        def noted(self: Any, *args: Any, held: Any = held, gradients: list[np.ndarray] = gradients) -> Any:
            row = held(self, *args)
            found = [value.grad.flatten() for value in self.parameters if value.grad is not None]
            gradients.append(torch.cat(found).numpy().copy())
            return row

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.CrossBatchMetaTrainer, "_gradient", noted)
            alone = trained(tmp_path / f"alone-{name}", config)
        for key in ("gradients", "weights", "losses"):
            np.testing.assert_array_equal(ranks[0][key], ranks[1][key], err_msg=name)
        assert len(ranks[0]["gradients"]) == len(gradients) == len(alone.metrics) - config.image_steps
        scale = np.abs(gradients[0]).max()
        np.testing.assert_allclose(ranks[0]["gradients"][0], gradients[0], rtol=1e-3, atol=1e-5 * scale, err_msg=name)
        last = torch.cat([value.detach().flatten() for value in alone.model.parameters()]).numpy()
        np.testing.assert_allclose(ranks[0]["weights"], last, atol=3e-3, err_msg=name)
        np.testing.assert_allclose(ranks[0]["losses"], losses(alone), rtol=1e-2, err_msg=name)


def _plain(config: Config) -> dict[str, Any]:
    return {name: value for name, value in asdict(config).items() if value is not None}


@pytest.fixture
def new_precision() -> Iterator[None]:
    """Accelerate keeps a process's precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("new_precision")
def test_bf16(tmp_path: Path) -> None:
    """Weights and averages stay in 32 bits; another precision in the same process is refused."""
    config = replace(SPRITES, precision="bf16")
    run = trained(tmp_path / "bf16", config)
    assert {value.dtype for value in run.model.parameters()} == {torch.float32}
    assert {value.dtype for value in run.weights["gwa"].values()} == {torch.float32}
    with pytest.raises(UserError, match="--precision is no"):
        trained(tmp_path / "other", SPRITES)
    AcceleratorState._reset_state(reset_partial_state=True)
    whole = trained(tmp_path / "whole", SPRITES)
    assert losses(run) != losses(whole)
    assert losses(run) == pytest.approx(losses(whole), rel=0.05)


@pytest.mark.gpu
@pytest.mark.usefixtures("new_precision")
@pytest.mark.parametrize("method", ["meta", "distill"])
def test_gpu(tmp_path: Path, method: Any) -> None:
    """Losses on an accelerator are the CPU's up to float error; a bf16 run trains there, resumes, and is scored."""
    from accelerate import Accelerator

    config = replace(SPRITES, method=method)
    rows = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        one = train.CrossBatchMetaTrainer(config, source(config), Accelerator(cpu=cpu))
        assert (one.model.device.type == "cpu") == cpu
        rows.append([float(one.step(step)["loss"]) for step in range(5)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-4)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = replace(config, precision="bf16", micro_batch=3, checkpointing=True)
    run = trained(tmp_path / "run", config)
    assert run.model.device.type != "cpu"
    assert {value.dtype for value in run.model.parameters()} == {torch.float32}
    assert np.isfinite(losses(run)).all()
    found = evaluate.evaluate(run, EvaluateOptions(plots=False))
    assert all(np.isfinite(value) for value in found.values())
    assert not moved(run, trained(tmp_path / "run", config, resume=True))
    assert not moved(run, train.load(tmp_path / "run", source))
