"""Meta-training: order, gradients over parts and processes, rules, optimizers, adapters, shards, the run folder."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from flipped_learning import data, flipping
from flipped_learning import train as training
from flipped_learning.config import Config, EvaluateOptions
from flipped_learning.evaluate import evaluate
from flipped_learning.minimodel import BagOfWords, words
from flipped_learning.model import load_model
from flipped_learning.templates import SEEN_PAIRS, Instance
from flipped_learning.train import FlippedLearner, Run, load, text_of, train
from metazoo import checkpoint, testing
from metazoo.errors import UserError
from metazoo.options import RunOptions
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

torch.set_num_threads(1)
SCRIPT = str(Path(__file__).with_name("two_processes.py"))
TINY = Config(
    max_examples=60, width=16, heads=2, layers=1, feedforward=32, vocabulary=300, pretrain_steps=0, steps=8,
    batch_size=8, dropout=0.0, template_names=("Text Expressed Sentiment", "Reviewer Enjoyment"),
)  # fmt: skip
BAG = dataclasses.replace(
    TINY, model="bag", pairs=3, width=6, vocabulary=100, clip=0.0, template_names=("Text Expressed Sentiment",)
)


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Pre-trained models of these tests go nowhere else; children inherit it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METAZOO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


LOAD = data.load


@functools.cache
def source_of(names: tuple[str, ...], pairs: int, seed: int) -> data.Data:
    return LOAD(dataclasses.replace(TINY, template_names=names, pairs=pairs, seed=seed))


@pytest.fixture(autouse=True)
def _loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generated reviews are made once for all of these tests."""

    def once(config: Config) -> data.Data:
        made = config.dataset == ("generated",)
        return source_of(config.template_names, config.pairs, config.seed) if made else LOAD(config)

    monkeypatch.setattr(data, "load", once)


def learner_of(config: Config = TINY, **changes: Any) -> FlippedLearner:
    config = dataclasses.replace(config, **changes)
    return FlippedLearner(config, source_of(config.template_names, config.pairs, config.seed), Accelerator(cpu=True))


def gradient(learner: FlippedLearner, step: int = 0) -> list[torch.Tensor]:
    learner.optimizer.zero_grad()
    learner.backward(*learner.draw(step))
    return [p.grad.clone() for p in learner.parameters if p.grad is not None]


def close(one: Sequence[torch.Tensor], other: Sequence[torch.Tensor], atol: float = 1e-5) -> bool:
    return all(torch.allclose(a, b, rtol=0, atol=atol) for a, b in zip(one, other, strict=True))


def trained(folder: Path, config: Config = TINY, **changes: Any) -> Run:
    return train(dataclasses.replace(config, **changes), RunOptions(output_dir=folder, log_every=1, checkpoint_every=4))


def test_instances(run: Run) -> list[Instance]:
    task = run.data.tasks[0]
    return data.instances(task, task.templates[0], 6)


test_instances.__test__ = False  # type: ignore[attr-defined]


def scores(run: Run) -> np.ndarray:
    return np.stack(run.score(test_instances(run)))


class Interrupted(Exception):
    """What ends a run early."""


def interrupted(monkeypatch: pytest.MonkeyPatch, folder: Path, config: Config, last: int) -> None:
    """A run that ends before step ``last``, with a checkpoint every fourth."""
    real = FlippedLearner.step

    def step(self: FlippedLearner, step: int) -> dict[str, Any]:
        if step == last:
            raise Interrupted
        return real(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(FlippedLearner, "step", step)
        with pytest.raises(Interrupted):
            trained(folder, config)


# ---- data order and objective


def test_instances_follow_from_seed_and_step() -> None:
    """The same step draws the same instances and wrong options, another step or seed others."""
    one, again, later, other = (
        learner_of(model="bag", pairs=3, seed=seed, template_names=BAG.template_names).draw(step)
        for seed, step in ((0, 3), (0, 3), (0, 4), (1, 3))
    )
    assert one == again
    assert one != later
    assert one[0] != other[0]
    instances, wrong = one
    assert wrong is not None
    assert all(instance.label != k for instance, k in zip(instances, wrong, strict=True))
    assert len(instances) == TINY.batch_size


@pytest.mark.parametrize("changes", [{"method": "direct"}, {"method": "channel"}, {"unlikelihood": 0.0}])
def test_no_wrong_options_where_none_is_needed(changes: dict[str, Any]) -> None:
    learner = learner_of(BAG, **changes)
    assert learner.draw(0)[1] is None
    assert set(learner.step(0)) == {"loss", "likelihood", "log_p_right", "lr", "grad_norm"}


def test_lambda_zero_is_plain_likelihood() -> None:
    """Loss and gradient are those of transformers' own loss on the right rows; so are those of DIRECT and CHANNEL."""
    for changes in ({"unlikelihood": 0.0}, {"method": "direct"}, {"method": "channel"}):
        learner = learner_of(**changes)
        instances, wrong = learner.draw(0)
        found = learner.backward(instances, wrong)
        ours = [p.grad.clone() for p in learner.parameters if p.grad is not None]
        assert learner.collator is not None
        batch = learner.collator(instances)
        learner.optimizer.zero_grad()
        loss = learner.model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        loss.backward()
        assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-5)
        assert close(ours, [p.grad for p in learner.parameters if p.grad is not None])


def test_objective_is_likelihood_plus_lambda_unlikelihood() -> None:
    """−mean log p over all tokens of right rows − λ mean log(1 − p) over the instruction's own of wrong rows."""
    learner = learner_of(unlikelihood=3.0)
    instances, wrong = learner.draw(0)
    found = learner.backward(instances, wrong)
    ours = [p.grad.clone() for p in learner.parameters if p.grad is not None]
    assert learner.collator is not None
    assert wrong is not None
    learner.optimizer.zero_grad()
    right, other = (learner.collator.pad([learner.collator.encode(o, o.options[k]) for o, k in pairs]) for pairs in (
        [(one, one.label or 0) for one in instances], list(zip(instances, wrong, strict=True)),
    ))  # fmt: skip
    p = [
        learner.model(b.input_ids, attention_mask=b.attention_mask, labels=b.labels).logits.softmax(-1)
        .gather(-1, b.labels.clamp(min=0)[..., None])[..., 0]
        for b in (right, other)
    ]  # fmt: skip
    loss = -p[0][right.labels != -100].log().mean() - 3 * torch.log(1 - p[1][other.counted]).mean()
    loss.backward()
    assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-4)
    assert close(ours, [p.grad for p in learner.parameters if p.grad is not None])
    assert found["log_p_wrong"].item() == pytest.approx(p[1][other.counted].log().mean().item(), abs=1e-4)
    assert found["log_p_right"].item() == pytest.approx(p[0][right.counted].log().mean().item(), abs=1e-4)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, method="direct"), BAG], ids=["t5", "direct", "bag"])
def test_accumulated_gradient_is_the_gradient(config: Config) -> None:
    """One part, 3 or 8, and parts that are computed again in the backward pass: the same gradient and terms."""
    whole = learner_of(config)
    wanted, row = gradient(whole), whole.backward(*whole.draw(0))
    for changes in ({"accumulation": 3}, {"accumulation": 8}, {"accumulation": 2, "gradient_checkpointing": True}):
        learner = learner_of(config, **changes)
        assert close(wanted, gradient(learner))
        found = learner.backward(*learner.draw(0))
        assert {k: v.item() for k, v in found.items()} == pytest.approx({k: v.item() for k, v in row.items()}, abs=1e-5)


def test_bag_gradient_and_step_by_hand() -> None:
    """s = hᵀ M E[l]; −log σ(s) of the right label, −λ log(1 − σ(s)) of the wrong one; then a step of Adam."""
    learner = learner_of(BAG, unlikelihood=2.0, seed=4)
    model = learner.model
    assert isinstance(model, BagOfWords)
    with torch.no_grad():
        model.match.add_(0.3 * torch.randn(model.match.shape, generator=torch.Generator().manual_seed(0)))
    E, M = (p.detach().double().numpy() for p in (model.embedding.weight, model.match))
    dE, dM = np.zeros_like(E), np.zeros_like(M)
    instances, wrong = learner.draw(0)
    assert wrong is not None
    for instance, k in zip(instances, wrong, strict=True):
        ids = [model.vocabulary.get(word, 0) for word in words(text_of(instance))]
        h = E[ids].sum(0) / np.sqrt(len(ids))
        for option, right in ((instance.label, True), (k, False)):
            l = model.vocabulary[instance.options[option or 0]]
            p = 1 / (1 + np.exp(-(h @ M @ E[l])))
            slope = ((p - 1) if right else 2.0 * p) / len(instances)
            dM += slope * np.outer(h, E[l])
            dE[l] += slope * (M.T @ h)
            for i in ids:
                dE[i] += slope * (M @ E[l]) / np.sqrt(len(ids))
    grads = gradient(learner)
    named = {tuple(p.shape): g.numpy() for p, g in zip(learner.parameters, grads, strict=True)}
    assert np.allclose(named[M.shape], dM, atol=1e-6)
    assert np.allclose(named[E.shape], dE, atol=1e-6)
    learner.step(0)
    large = np.abs(dE) > 1e-5
    assert np.allclose(model.embedding.weight.detach().numpy()[large], (E - BAG.lr * np.sign(dE))[large], atol=1e-5)
    assert np.array_equal(model.embedding.weight.detach().double().numpy()[dE == 0], E[dE == 0])


# ---- training


@pytest.mark.parametrize(("config", "steps"), [(BAG, 60), (TINY, 25)], ids=["bag", "t5"])
def test_training_makes_the_margin(config: Config, steps: int) -> None:
    """The loss falls; the instruction becomes more likely given the right label than given a wrong one."""
    learner = learner_of(config, lr=3e-2 if config is BAG else 1e-2)
    rows = [learner.step(step) for step in range(steps)]
    loss, right, wrong = (
        np.array([row[name].item() for row in rows]) for name in ("loss", "log_p_right", "log_p_wrong")
    )
    assert loss[-5:].mean() < 0.8 * loss[:5].mean()
    if config is BAG:  # a T5 first learns the instruction by heart
        assert (right - wrong)[-5:].mean() > (right - wrong)[:5].mean() + 0.5
    else:
        assert right[-5:].mean() > right[:5].mean() + 1


def test_same_seed_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs, and one that was interrupted, with Adafactor and dropout, end with the same bits; another seed not."""
    config = dataclasses.replace(TINY, optimizer="adafactor", dropout=0.1, lr=1e-3, pretrain_steps=2)
    trained(tmp_path / "one", config)
    trained(tmp_path / "two", config)
    testing.assert_same_run(tmp_path / "one", tmp_path / "two")
    interrupted(monkeypatch, tmp_path / "three", config, 6)
    train(config, RunOptions(output_dir=tmp_path / "three", log_every=1, checkpoint_every=4, resume=True))
    testing.assert_same_run(tmp_path / "one", tmp_path / "three")
    other = learner_of(config, seed=1)
    assert other.step(0)["loss"].item() != testing.rows(tmp_path / "one")[0]["loss"]


@pytest.mark.parametrize("method", ["direct", "channel"])
@pytest.mark.parametrize("config", [TINY, BAG], ids=["t5", "bag"])
def test_other_rules_train(config: Config, method: str) -> None:
    learner = learner_of(config, method=method, lr=1e-2, tied=config.model == "bag")
    before = learner.backward(*learner.draw(0))["loss"]
    for step in range(12):
        learner.step(step)
    assert learner.backward(*learner.draw(0))["loss"] < before


def test_learning_rate() -> None:
    """Rises over the warm-up, then falls linearly; without --decay it stays."""
    rates = [learner.step(step)["lr"] for learner in [learner_of(BAG, warmup=3, decay=True)] for step in range(8)]
    assert rates == pytest.approx([BAG.lr * share for share in (1 / 3, 2 / 3, 1, 1, 0.8, 0.6, 0.4, 0.2)])
    learner = learner_of(BAG, warmup=2)
    assert [learner.step(step)["lr"] for step in (0, 1, 7)] == pytest.approx([BAG.lr / 2, BAG.lr, BAG.lr])
    assert learner.optimizer.param_groups[0]["lr"] == BAG.lr


def test_clip() -> None:
    """The gradient that the optimizer sees is no longer than --clip; grad_norm is the length before."""
    learner = learner_of(BAG, clip=1e-3)
    norm = learner.step(0)["grad_norm"]
    assert norm > 1e-3
    seen = torch.cat([p.grad.flatten() for p in learner.parameters if p.grad is not None]).norm()
    assert seen.item() == pytest.approx(1e-3, rel=1e-2)
    free = learner_of(BAG, clip=0.0)
    assert free.step(0)["grad_norm"].item() == pytest.approx(norm.item())
    assert torch.cat([p.grad.flatten() for p in free.parameters if p.grad is not None]).norm() == pytest.approx(norm)


def test_adapters_alone_are_trained(tmp_path: Path) -> None:
    """LoRA: the frozen weights stay, checkpoints hold adapters only, and model/ is the merged model."""
    config = dataclasses.replace(TINY, lora=2, lr=3e-2, pretrain_steps=2)
    run = trained(tmp_path / "run", config)
    moved = {name for name, p in run.model.named_parameters() if p.requires_grad}
    assert moved
    assert all("lora_" in name for name in moved)
    fresh, _ = load_model(config, run.data.corpus, Accelerator(cpu=True))
    before = dict(fresh.named_parameters())
    for name, p in run.model.named_parameters():
        assert torch.equal(p, before[name]) == (name not in moved), name
    kept = load_file(checkpoint.listing(run.folder / "checkpoints")[0] / "state.safetensors")
    assert {name for name in kept if name.startswith("model.")} == {f"model.{name}" for name in moved}
    wanted = scores(run)
    assert np.array_equal(scores(load(run.folder)), wanted)
    merged = AutoModelForSeq2SeqLM.from_pretrained(run.folder / "model")
    assert not any("lora_" in name for name, _ in merged.named_parameters())
    assert run.collator is not None
    found = np.stack(flipping.score(merged.eval(), run.collator, test_instances(run)))
    assert np.allclose(found, wanted, atol=1e-3)
    unadapted = np.stack(flipping.score(fresh.get_base_model(), run.collator, test_instances(run)))  # type: ignore[operator]
    assert not np.allclose(unadapted, wanted, atol=1e-2)
    assert (run.folder / "adapter" / "adapter_model.safetensors").exists()
    assert run.folder.joinpath("adapter", "adapter_config.json").exists()


def test_bf16(tmp_path: Path) -> None:
    """Mixed precision on the CPU: the first loss within 5 % of float32's; weights stay float32."""
    first = learner_of().step(0)["loss"].item()
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trained(tmp_path / "run", precision="bf16", steps=2)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert all(p.dtype == torch.float32 for p in run.model.parameters())
    assert run.metrics[0]["loss"] != first
    assert run.metrics[0]["loss"] == pytest.approx(first, rel=0.05)


def test_another_precision(tmp_path: Path) -> None:
    """Accelerate keeps a process's first precision: another one is refused in our words, and nothing is written."""
    Accelerator(cpu=True)
    with pytest.raises(UserError, match="--precision is bf16, but this process has worked with no"):
        trained(tmp_path / "run", precision="bf16")
    assert not list(tmp_path.iterdir())


def test_too_few_instances_for_the_parts() -> None:
    with pytest.raises(UserError, match="--batch-size is 8 for 1 processes x 9 parts"):
        learner_of(accumulation=9)


# ---- run folder


def test_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is in it; load() and transformers' own from_pretrained score as the run did."""
    run = trained(tmp_path / "run", pretrain_steps=2)
    assert "Writing model" not in capsys.readouterr().err
    names = {str(path.relative_to(run.folder)) for path in run.folder.rglob("*") if path.is_file()}
    assert {"config.json", "environment.json", "metrics.jsonl", "training.png", "model/tokenizer.json"} <= names
    assert {f"checkpoints/step-0000000{step}/state.safetensors" for step in (4, 8)} <= names
    assert not run.model.training
    assert [row["step"] for row in run.metrics] == list(range(1, 9)) == [r["step"] for r in testing.rows(run.folder)]
    wanted = {"step", "loss", "likelihood", "unlikelihood", "log_p_right", "log_p_wrong", "lr", "grad_norm"}
    assert all(set(row) == wanted for row in run.metrics)
    again = load(run.folder)
    assert again.config == run.config
    assert again.metrics == run.metrics
    assert np.array_equal(scores(again), scores(run))
    model = AutoModelForSeq2SeqLM.from_pretrained(run.folder / "model").eval()
    collator = training.make_collator(run.config, AutoTokenizer.from_pretrained(run.folder / "model"))
    assert np.allclose(flipping.score(model, collator, test_instances(run)), scores(run), atol=1e-4)
    hub = learner_of(model=str(run.folder / "model"))  # and can be meta-trained further
    assert all(torch.equal(a, b) for a, b in zip(hub.parameters, learner_weights(run), strict=True))


def learner_weights(run: Run) -> list[nn.Parameter]:
    return [p for p in run.model.parameters() if p.requires_grad]


def test_bag_run(tmp_path: Path) -> None:
    """No model/, which transformers could not load; the run's scores are those of its texts, in the order given."""
    run = trained(tmp_path / "run", BAG)
    assert not (run.folder / "model").exists()
    task = run.data.tasks[0]
    mixed = [
        one
        for pair in zip(*(data.instances(task, task.templates[0], 4, pair) for pair in SEEN_PAIRS[:2]), strict=True)
        for one in pair
    ]
    assert isinstance(run.model, BagOfWords)
    wanted = [run.model.score([text_of(one)], one.options)[0].double().numpy() for one in mixed]
    assert np.allclose(run.score(mixed), wanted, atol=1e-6)
    assert np.array_equal(np.stack(load(run.folder).score(mixed)), np.stack(run.score(mixed)))


def test_no_steps(tmp_path: Path) -> None:
    """The untrained model is a run, too: it can be loaded and scored."""
    run = trained(tmp_path / "run", BAG, steps=0)
    assert run.metrics == []
    assert np.array_equal(scores(load(run.folder)), scores(run))


def test_unfinished_and_foreign_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is one line that says what the folder is."""
    interrupted(monkeypatch, tmp_path / "half", BAG, 6)
    interrupted(monkeypatch, tmp_path / "start", BAG, 2)
    for name, fields in (("foreign", {"dataset": "omniglot", "tasks": 5}), ("broken", None)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{" if fields is None else json.dumps(fields))
    for name, said in (
        ("half", "is at step 4 of 8: finish it with --resume"), ("start", "no checkpoint yet"),
        ("foreign", "which this version does not know"), ("broken", "config.json"), ("none", "not a run folder"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said) as caught:
            load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_taken_folder_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before data are read and a model is pre-trained, and nothing in it changes."""
    (tmp_path / "config.json").write_text("{}")

    def never(*args: Any) -> None:
        raise AssertionError("too late")

    monkeypatch.setattr(training, "load_model", never)
    monkeypatch.setattr(data, "load", never)
    with pytest.raises(UserError, match="already holds a run: add --resume"):
        trained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_sharding_needs_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line, before a model is loaded, and no run folder."""
    monkeypatch.setattr(training, "load_model", lambda *args: pytest.fail("too late"))
    with pytest.raises(UserError, match="--fsdp shards over processes, but there is one: start with") as caught:
        trained(tmp_path / "run", fsdp=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_own_data_and_templates(tmp_path: Path) -> None:
    """A .csv with a templates.yaml, trained, evaluated and loaded again."""
    lines = [f'"the {kind} number {i} was {word}",{word}' for i in range(20) for kind, word in (
        ("soup", "tasty"), ("bread", "stale"),
    )]  # fmt: skip
    (tmp_path / "meals.csv").write_text("\n".join(["note,label", *lines]) + "\n")
    (tmp_path / "templates.yaml").write_text(
        "dataset: meals\ntemplates:\n"
        "  a: {name: Meal, answer_choices: 'stale ||| tasty',\n"
        "    jinja: '{{note}} How was the meal? ||| {{answer_choices[label]}}'}\n"
    )
    config = dataclasses.replace(
        TINY, dataset=(str(tmp_path / "meals.csv"),), templates=str(tmp_path / "templates.yaml"), template_names=(),
        vocabulary=100,
    )  # fmt: skip
    run = trained(tmp_path / "run", config)
    (task,) = run.data.tasks
    assert [template.name for template in task.templates] == ["Meal"]
    assert (len(task.train), len(task.test)) == (32, 8)
    found = evaluate(run, EvaluateOptions(plots=False))
    assert 0 <= found[f"{task.name} accuracy"] <= 100
    assert f"{task.name} novel_f1" not in found
    assert np.array_equal(scores(load(run.folder)), scores(run))


def test_long_texts_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained(tmp_path / "run", max_source=40, max_target=8, steps=2)
    said = capsys.readouterr().err
    assert "sources were longer than --max-source and lost text of theirs" in said
    assert "targets were longer than --max-target and lost their end" in said


# ---- processes


def test_two_processes_train_as_one(tmp_path: Path) -> None:
    """With and without shards: the same weights, state of Adam and rows, also after a resume; model/ is whole."""
    config = dataclasses.replace(TINY, pretrain_steps=2, warmup=2)
    sharded = dataclasses.replace(config, fsdp=True)
    whole = trained(tmp_path / "one", config)
    bag = trained(tmp_path / "bag", BAG)
    jobs = [
        (str(tmp_path / name), dataclasses.asdict(settings), last)
        for name, settings, last in (
            ("two", config, 0), ("two-bag", BAG, 0), ("sharded", sharded, 0), ("resumed", sharded, 6),
        )
    ]  # fmt: skip
    testing.torchrun(2, SCRIPT, json.dumps(jobs))
    for one, names in ((bag, ["two-bag"]), (whole, ["two", "sharded", "resumed"])):
        step, wanted = checkpoint.read(checkpoint.listing(one.folder / "checkpoints")[0])
        for name in names:
            found_step, found = checkpoint.read(checkpoint.listing(tmp_path / name / "checkpoints")[0])
            assert found_step == step == 8
            assert list(found["model"]) == list(wanted["model"])
            assert close([*found["model"].values()], [*wanted["model"].values()]), name
            assert found["optimizer"]["state"].keys() == wanted["optimizer"]["state"].keys()
            for key, of in wanted["optimizer"]["state"].items():
                assert close([*found["optimizer"]["state"][key].values()], [*of.values()], 1e-4), (name, key)
            rows = testing.rows(tmp_path / name)
            assert [row["step"] for row in rows] == list(range(1, 9))
            for row, other in zip(rows, one.metrics, strict=True):
                assert row == pytest.approx(other, abs=1e-4)
    testing.assert_same_run(tmp_path / "sharded", tmp_path / "resumed")
    wanted = load_file(whole.folder / "model" / "model.safetensors")
    for name in ("two", "sharded", "resumed"):
        found = load_file(tmp_path / name / "model" / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert close([found[key] for key in wanted], [*wanted.values()]), name
        settings = json.loads((tmp_path / name / "model" / "config.json").read_text())
        assert settings == json.loads((whole.folder / "model" / "config.json").read_text())
        again = load(tmp_path / name)
        assert np.allclose(scores(again), scores(whole), atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("config", [TINY, BAG], ids=["t5", "bag"])
def test_gpu(tmp_path: Path, config: Config) -> None:
    """Losses on CUDA are the CPU's up to float error, and a bf16 run stays finite."""
    rows = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        learner = FlippedLearner(
            config, source_of(config.template_names, config.pairs, config.seed), Accelerator(cpu=cpu)
        )
        rows.append([learner.step(step)["loss"].item() for step in range(4)])
    assert rows[0] == pytest.approx(rows[1], rel=1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trained(tmp_path / "run", config, precision="no" if config.model == "bag" else "bf16")
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
    assert np.isfinite(scores(run)).all()
    AcceleratorState._reset_state(reset_partial_state=True)
