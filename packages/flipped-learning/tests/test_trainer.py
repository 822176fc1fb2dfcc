"""FlippedTrainer: loss and gradient of the whole step, wrong options, evaluation, files, bad settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flipped_learning import flipping, metrics
from flipped_learning.classifier import FlippedClassifier
from flipped_learning.config import Config
from flipped_learning.flipping import Batch, FlippedCollator
from flipped_learning.model import tiny_t5, train_tokenizer
from flipped_learning.templates import Instance, Template
from flipped_learning.trainer import FlippedTrainer, _WithWrongOptions
from metazoo.errors import UserError
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback, TrainingArguments

torch.set_num_threads(1)

TEMPLATE = Template("", "{{text}} What is the sentiment ?", None)
OPTIONS = ("bad", "good", "odd")
CORPUS = ["input: output: What is the sentiment ? text", "abcdefghijklmnopqrstuvwxyz", *OPTIONS, "dull great strange"]
TOKENIZER = train_tokenizer(CORPUS, 100)
CONFIG = Config(width=16, layers=1, heads=2, feedforward=16, dropout=0.0)
# sources and targets of different lengths
INSTANCES = [
    Template("", f"{{{{text}}}} What is{' the' * (i % 3)} sentiment ?", None).apply(
        {"text": " ".join([("dull", "great", "strange")[i % 3]] * (1 + i % 4)), "label": i % 3}, OPTIONS
    )
    for i in range(8)
]


def tiny(seed: int = 0, dropout: float = 0.0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = tiny_t5(CONFIG, TOKENIZER)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
    return model


def settings(folder: Path, kind: type[TrainingArguments] = TrainingArguments, **kwargs: Any) -> Any:
    given = {
        "remove_unused_columns": False, "report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True,
        "disable_tqdm": True, "per_device_train_batch_size": 4, "max_steps": 3, "dataloader_pin_memory": False,
        "learning_rate": 1e-2,
    }  # fmt: skip
    return kind(output_dir=str(folder), **{**given, **kwargs})


class Gradients(TrainerCallback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.found: list[list[torch.Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        grads = [p.grad for p in kwargs["model"].parameters()]
        self.found.append([grad.clone() for grad in grads if grad is not None])


def gradients(folder: Path, batch: int, parts: int, **kwargs: Any) -> tuple[list[list[torch.Tensor]], list[Any]]:
    kept = Gradients()
    args = settings(
        folder, per_device_train_batch_size=batch, gradient_accumulation_steps=parts, max_steps=2, max_grad_norm=0.0
    )
    trainer = FlippedTrainer(tiny(), args, INSTANCES, None, TOKENIZER, callbacks=[kept], **kwargs)
    trainer.train()
    return kept.found, [row for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("method", ["flipped", "direct"])
def test_accumulation_does_not_change_the_gradient(tmp_path: Path, method: flipping.Method) -> None:
    """One batch of 8, 8 of one, and 3 + 3 + 2: the same gradients and logged terms, two epochs long."""
    whole, rows = gradients(tmp_path, 8, 1, method=method)
    for batch, parts in ((1, 8), (3, 3)):
        found, logged = gradients(tmp_path, batch, parts, method=method)
        for step, wanted in zip(found, whole, strict=True):
            for a, b in zip(step, wanted, strict=True):
                assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
        for one, other in zip(logged, rows, strict=True):
            assert one == pytest.approx(other, rel=1e-4)


def test_loss_is_that_of_flipping(tmp_path: Path) -> None:
    """The first step's terms are those that flipping gives for its instances and their wrong options."""
    args = settings(tmp_path, per_device_train_batch_size=8, max_steps=1)
    trainer = FlippedTrainer(tiny(), args, INSTANCES, None, TOKENIZER, unlikelihood=0.5)
    drawn = [trainer.train_dataset[i] for i in range(8)]
    batch = FlippedCollator(TOKENIZER)(INSTANCES, [wrong for _, wrong in drawn if wrong is not None])
    with torch.no_grad():
        terms = flipping.loss_terms(flipping.batch_log_probs(tiny(), batch), batch)
    right, wrong, right_counted = flipping.token_counts(batch)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(float(terms.loss(right, wrong, 0.5)), rel=1e-5)
    assert row["likelihood"] == pytest.approx(float(terms.likelihood) / right, rel=1e-5)
    assert row["unlikelihood"] == pytest.approx(float(terms.unlikelihood) / wrong, rel=1e-5)
    assert row["log_p_right"] == pytest.approx(float(terms.log_p_right) / right_counted, rel=1e-5)
    assert row["log_p_wrong"] == pytest.approx(float(terms.log_p_wrong) / wrong, rel=1e-5)


class FirstSeen(torch.utils.data.Dataset[Instance]):
    """Instances as a dataset of torch."""

    def __init__(self, instances: Sequence[Instance]) -> None:
        self.instances = instances

    def __len__(self) -> int:
        return len(self.instances)

    def __getitem__(self, index: int) -> Instance:
        return self.instances[index]


@pytest.mark.parametrize(("method", "weight"), [("direct", 1.0), ("flipped", 0.0), ("channel", 1.0)])
def test_without_unlikelihood_it_is_seq2seqtrainer(tmp_path: Path, method: flipping.Method, weight: float) -> None:
    collator = FlippedCollator(TOKENIZER, method)

    def collate(items: Sequence[Instance]) -> dict[str, torch.Tensor]:
        batch = collator(items)
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    args = settings(tmp_path, Seq2SeqTrainingArguments)
    theirs = Seq2SeqTrainer(tiny(), args, collate, FirstSeen(INSTANCES), processing_class=TOKENIZER)
    theirs.train()
    ours = FlippedTrainer(
        tiny(), settings(tmp_path), FirstSeen(INSTANCES), None, TOKENIZER, method=method, unlikelihood=weight
    )
    ours.train()
    losses = [[row["loss"] for row in one.state.log_history if "loss" in row] for one in (theirs, ours)]
    assert len(losses[0]) == 3
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    for a, b in zip(theirs.model.parameters(), ours.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert "unlikelihood" not in ours.state.log_history[0]


def test_two_runs_agree_and_resuming_does(tmp_path: Path) -> None:
    """With dropout: the same bits again; and from a checkpoint in the middle of the second epoch."""

    def trained(folder: Path, resume: str | None = None) -> torch.nn.Module:
        args = settings(folder, max_steps=5, save_strategy="steps", save_steps=3)
        trainer = FlippedTrainer(tiny(dropout=0.1), args, INSTANCES, None, TOKENIZER)
        trainer.train(resume_from_checkpoint=resume)
        return trainer.model

    one, other = trained(tmp_path / "one"), trained(tmp_path / "other")
    resumed = trained(tmp_path / "one", str(tmp_path / "one" / "checkpoint-3"))
    for a, b, c in zip(one.parameters(), other.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_wrong_options_are_uniform_and_differ_by_epoch() -> None:
    drawn = _WithWrongOptions([INSTANCES[1]] * 600, 0, wanted=True)
    first = [drawn[i][1] for i in range(600)]
    assert first == [drawn[i][1] for i in range(600)]
    assert set(first) == {0, 2}
    assert 240 < first.count(0) < 360
    drawn.epoch.fill_(1)
    assert 200 < sum(a != drawn[i][1] for i, a in enumerate(first)) < 400


def test_learns_and_evaluates(tmp_path: Path) -> None:
    """Texts of one word that decides the label; evaluation is flipping.score's; the saved model scores the same."""
    test = INSTANCES[:7]
    args = settings(
        tmp_path, max_steps=90, per_device_train_batch_size=8, per_device_eval_batch_size=3, logging_steps=10
    )
    trainer = FlippedTrainer(tiny(), args, INSTANCES * 5, test, TOKENIZER)
    before = trainer.evaluate()
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0] / 4
    found = trainer.evaluate()
    assert found["eval_accuracy"] == 100
    assert found["eval_macro_f1"] == 100
    assert found["eval_loss"] < before["eval_loss"]
    trainer.save_model()
    loaded = FlippedClassifier.from_pretrained(tmp_path, labels=OPTIONS, template="{{text}} What is the sentiment ?")
    assert list(loaded.predict(["dull", "great", "strange"])) == list(OPTIONS)


@pytest.mark.parametrize("method", ["flipped", "direct", "channel"])
def test_evaluation_is_that_of_score(tmp_path: Path, method: flipping.Method) -> None:
    """Also with options of different number, and two sets by name."""
    test = [*INSTANCES[:4], TEMPLATE.apply({"text": "dull", "label": 1}, ("great", "dull")), *INSTANCES[4:]]
    args = settings(tmp_path, per_device_eval_batch_size=2)
    trainer = FlippedTrainer(tiny(), args, None, {"a": test, "b": test[:3]}, TOKENIZER, method=method)
    found = trainer.evaluate()
    scores = flipping.score(tiny(), FlippedCollator(TOKENIZER, method), test)
    best, _ = flipping.choose(scores)
    labels = [one.label for one in test if one.label is not None]
    for name, count in (("a", 9), ("b", 3)):
        for metric, value in metrics.compute(best[:count], labels[:count]).items():
            assert found[f"eval_{name}_{metric}"] == pytest.approx(value)
    assert np.array_equal(trainer.predict(test).predictions, best)
    batch = FlippedCollator(TOKENIZER, method)(test[:2])
    with torch.no_grad():
        log_probs = flipping.batch_log_probs(tiny(), batch)
    loss, _, _ = trainer.prediction_step(trainer.model, trainer.data_collator(test[:2]), prediction_loss_only=True)
    assert loss is not None
    assert float(loss) == pytest.approx(-float(log_probs.sum()) / flipping.token_counts(batch)[0], rel=1e-5)


def test_loss_with_outputs(tmp_path: Path) -> None:
    trainer = FlippedTrainer(tiny(), settings(tmp_path), INSTANCES, None, TOKENIZER)
    inputs = trainer.data_collator([trainer.train_dataset[0], trainer.train_dataset[1]])
    loss, outputs = trainer.compute_loss(trainer.model, inputs, return_outputs=True)
    assert torch.equal(loss, trainer.compute_loss(trainer.model, inputs))
    assert outputs["log_probs"].shape == Batch(**inputs).labels.shape


def test_workers_draw_the_same(tmp_path: Path) -> None:
    """Two worker processes that last over the epochs see them begin."""
    rows = []
    for kwargs in ({}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}):
        trainer = FlippedTrainer(tiny(), settings(tmp_path, **kwargs), INSTANCES, None, TOKENIZER)
        trainer.train()
        rows.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert rows[0] == rows[1]


@pytest.mark.parametrize(
    ("changed", "kwargs", "message"),
    [
        ({"fp16_full_eval": True}, {}, "T5 overflows"),
        ({"remove_unused_columns": True}, {}, "remove_unused_columns=False"),
        ({"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor"),
        ({}, {"processing_class": None}, "give the model's tokenizer"),
        ({}, {"data_collator": lambda items: {}}, "its own data_collator"),
        ({}, {"unlikelihood": -1.0}, "unlikelihood is -1.0"),
        ({}, {"train_dataset": iter(INSTANCES)}, "no length"),
    ],
)
def test_bad_settings(tmp_path: Path, changed: dict[str, Any], kwargs: dict[str, Any], message: str) -> None:
    given = {"train_dataset": INSTANCES, "processing_class": TOKENIZER, **kwargs}
    with pytest.raises(UserError, match=message) as raised:
        FlippedTrainer(tiny(), settings(tmp_path, **changed), **given)
    assert "\n" not in str(raised.value)


def test_fp16_is_refused(tmp_path: Path) -> None:
    args = settings(tmp_path)
    args.fp16 = True  # TrainingArguments would not take it without a GPU
    with pytest.raises(UserError, match="args has fp16, in which T5 overflows: use bf16=True"):
        FlippedTrainer(tiny(), args, INSTANCES, None, TOKENIZER)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: "a text", r"train_dataset\[\d\] is str: give instances"),
        (lambda one: Instance(one.pieces, one.fields, one.options, None), r"train_dataset\[\d\] has no label"),
        (lambda one: Instance(one.pieces, one.fields, ("bad",), 0), r"train_dataset\[\d\] has 1 option"),
    ],
)
def test_bad_instances(tmp_path: Path, change: Callable[[Instance], Any], message: str) -> None:
    trainer = FlippedTrainer(tiny(), settings(tmp_path), [change(one) for one in INSTANCES], None, TOKENIZER)
    with pytest.raises(UserError, match=message):
        trainer.train()


def test_evaluation_needs_labels(tmp_path: Path) -> None:
    without = TEMPLATE.apply({"text": "dull"}, OPTIONS)
    trainer = FlippedTrainer(tiny(), settings(tmp_path), None, [without], TOKENIZER)
    with pytest.raises(UserError, match="has no label or fewer than two options"):
        trainer.evaluate()
