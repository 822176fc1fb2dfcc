"""Training tokens/s beside transformers' Seq2SeqTrainer, scoring beside the one-by-one loop, and its memory.

The same T5 (two layers, random weights) and the same prompted reviews on both sides, float32, one process; what is
compared takes turns, so that a busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flipped_learning import data
from flipped_learning.config import Config
from flipped_learning.flipping import FlippedCollator, batch_log_probs, score, source_and_target, token_counts
from flipped_learning.model import quiet, tiny_t5, train_tokenizer
from flipped_learning.templates import Instance
from flipped_learning.train import FlippedLearner
from metazoo import loop
from metazoo.options import RunOptions
from torch import nn

BATCH, OPTIONS = 32, 6
WORDS = ("bad", "terrible", "worst", "awful", "boring", "dull", "good", "great", "best", "wonderful", "entertaining")


def in_turn(functions: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Median and quartiles in milliseconds of each, called in turn, after one call to warm up; ``repeats`` >= 1."""
    taken: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(repeats + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if i:
                taken[name].append(1000 * (time.perf_counter() - start))
    found = {}
    for name, values in taken.items():
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
        found[name] = {"median": round(middle, 3), "q25": round(low, 3), "q75": round(high, 3)}
    return found


def setup(width: int, vocabulary: int = 1000) -> tuple[Any, Any, data.Data, Config]:
    config = Config(width=width, feedforward=2 * width, vocabulary=vocabulary, pretrain_steps=0, dropout=0.0)
    source = data.load(config)
    tokenizer = train_tokenizer(source.corpus, vocabulary)
    torch.manual_seed(0)
    return tiny_t5(config, tokenizer), tokenizer, source, config


def training(width: int, steps: int, repeats: int) -> dict[str, object]:
    """``steps`` optimizer steps of plain likelihood (λ = 0), by our loop and by Seq2SeqTrainer's."""
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

    _, tokenizer, source, config = setup(width)
    config = replace(config, unlikelihood=0.0, batch_size=BATCH, steps=steps, lr=1e-4)
    learner = FlippedLearner(config, source, loop.prepare(RunOptions(), seed=0))
    drawn = [learner.draw(step)[0] for step in range(steps)]
    learner.draw = lambda step: (drawn[step], None)  # type: ignore[method-assign]
    collator = learner.collator
    assert collator is not None
    tokens = sum(sum(token_counts(collator(batch))[:1]) + int(collator(batch).attention_mask.sum()) for batch in drawn)
    peer = tiny_t5(config, tokenizer)

    def collate(features: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        batch = collator([feature["instance"] for feature in features])
        return {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}

    rows = [{"instance": one} for batch in drawn for one in batch]
    with tempfile.TemporaryDirectory() as folder:
        arguments = Seq2SeqTrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=steps, learning_rate=1e-4, report_to=[],
            save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True, remove_unused_columns=False,
            max_grad_norm=1.0, dataloader_pin_memory=False,
        )  # fmt: skip

        def trainer() -> None:
            Seq2SeqTrainer(model=peer, args=arguments, train_dataset=rows, data_collator=collate).train()

        def ours() -> None:
            learner.accelerator = loop.prepare(RunOptions(), seed=0)  # the peer has reset what it stands on
            for step in range(steps):
                learner.step(step)

        with quiet():
            found = in_turn({"flipped-learning": ours, "Seq2SeqTrainer": trainer}, repeats)
    speeds = {f"tokens/s {name}": round(1000 * tokens / its["median"]) for name, its in found.items()}
    share = round(found["Seq2SeqTrainer"]["median"] / found["flipped-learning"]["median"], 3)
    return {"width": width, "steps": steps, "milliseconds": found, **speeds, "flipped-learning / Seq2SeqTrainer": share}


def options_of(source: data.Data, count: int) -> list[Instance]:
    """``count`` reviews with six options each."""
    (task,) = source.tasks
    words = WORDS[:OPTIONS]
    drawn = data.instances(task, task.templates[0], count)
    return [Instance(one.pieces, one.fields, words, 0) for one in drawn]


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, instances: list[Instance]) -> list[np.ndarray]:
    """A forward pass for each pair of instance and option, as evaluation code of the field does it."""
    found = []
    for instance in instances:
        row = []
        for option in instance.options:
            source, target = source_and_target(instance, option, "flipped")
            inputs = tokenizer(source, return_tensors="pt")
            labels = tokenizer(target, return_tensors="pt")["input_ids"]
            output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], labels=labels)
            row.append(-float(output.loss) * labels.shape[1])
        found.append(np.array(row))
    return found


def scoring(width: int, repeats: int) -> dict[str, object]:
    """K = 6 options of 32 reviews: batched here, and one by one; the same scores."""
    model, tokenizer, source, _ = setup(width)
    model.eval()
    collator = FlippedCollator(tokenizer)
    instances = options_of(source, BATCH)
    ours = score(model, collator, instances, batch_size=BATCH)
    assert np.allclose(np.stack(ours), np.stack(one_by_one(model, tokenizer, instances)), atol=1e-2)
    found = in_turn(
        {
            "batched": lambda: score(model, collator, instances, batch_size=BATCH),
            "one by one": lambda: one_by_one(model, tokenizer, instances),
        },
        repeats,
    )
    share = round(found["one by one"]["median"] / found["batched"]["median"], 2)
    return {"width": width, "options": OPTIONS, "batch": BATCH, "milliseconds": found, "one by one / batched": share}


def peak(what: str, width: int) -> None:
    """Peak memory of scoring, or of one forward pass of the same largest batch, above the model's own [MB], printed."""
    torch.set_num_threads(1)
    model, tokenizer, source, _ = setup(width, vocabulary=2000)
    model.eval()
    lm_head = nn.Linear(width, 32_128, bias=False)  # the vocabulary of T5, so that logits weigh what they do there
    model.lm_head, model.config.vocab_size = lm_head, 32_128
    collator = FlippedCollator(tokenizer)
    instances = options_of(source, BATCH)
    pairs = [collator.encode(one, option) for one in instances for option in one.options]
    pairs = sorted(pairs, key=lambda pair: len(pair[0]))[-BATCH:]
    batch = collator.pad(pairs)
    held = resident()
    with torch.no_grad():
        if what == "score":
            score(model, collator, instances, batch_size=BATCH)
        else:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
    print(round(resident() - held, 1))


def resident() -> float:
    """Peak resident memory of this process [MB]; ru_maxrss would keep that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def memory(width: int) -> dict[str, object]:
    """Each in a process of its own; the median of three."""
    found = {}
    for what in ("score", "forward"):
        command = [sys.executable, __file__, "--peak", what, str(width)]
        runs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(3)]
        found[what] = statistics.median(float(text.split()[-1]) for text in runs)
    return {"width": width, "megabytes": found, "score / forward": round(found["score"] / found["forward"], 3)}


def unlikelihood(width: int, repeats: int) -> dict[str, object]:
    """A step of λ = 1 (2B rows) over one of λ = 0 (B rows): what the wrong labels cost."""
    model, tokenizer, source, _ = setup(width)
    collator = FlippedCollator(tokenizer)
    rng = np.random.default_rng(0)
    instances = data.draw(source.tasks, BATCH, rng, 0)
    batches = {"right": collator(instances), "right and wrong": collator(instances, data.wrong_options(instances, rng))}
    steps = {
        name: (lambda batch=batch: batch_log_probs(model, batch).sum().backward()) for name, batch in batches.items()
    }
    found = in_turn(steps, repeats)
    share = round(found["right and wrong"]["median"] / found["right"]["median"], 2)
    return {"width": width, "milliseconds": found, "right and wrong / right": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: give 1 or more")
    if options.peak:
        peak(options.peak[0], int(options.peak[1]))
        return
    torch.set_num_threads(options.threads)
    found = {
        "torch": torch.__version__,
        "threads": options.threads,
        "training": [training(64, 50, options.repeats), training(128, 50, options.repeats)],
        "scoring": [scoring(64, options.repeats), scoring(256, options.repeats)],
        "memory": memory(128),
        "unlikelihood": unlikelihood(128, options.repeats),
    }
    text = json.dumps(found, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
