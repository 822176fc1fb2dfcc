"""A second-order meta-step beside the library higher's, encoding beside sentence-transformers, and search.

`python speed.py [--rounds 3] [--output PATH]` measures, each in a process of its own, one thread:

- the outer gradient of two tasks (MAML, second order, 2 inner steps, 8 scored pairs of 24 tokens in each set) on an
  encoder of 6 layers of width 384, with a vocabulary of 30,522 (MiniLM's) and of 250,002 (the multilingual encoders'):
  here, here with checkpointing, and by higher: milliseconds (median), megabytes by which the peak of the process grows;
- outer steps of the preset stsb's size with all tasks at once (vmap) and one after another;
- memory over 200 outer steps; sentences encoded in a second; 100,000 vectors of width 384 indexed and searched.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

VOCABULARIES = (30522, 250002)
PARTS = ["step", "tasks", "flat", "encode", "search"]
FORMS = ("ours", "checkpointed", "higher")
STEPS, RATE, PAIRS, LENGTH, TASKS = 2, 0.01, 8, 24, 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="processes for each form, in turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("results/bench/speed.json"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; others are kept")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(CHILDREN[args.child.split(":")[0]](args.child, args.repeats)))
        return
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    for vocabulary in VOCABULARIES if "step" in args.parts else ():
        rows: dict[str, list[dict[str, float]]] = {}
        for _ in range(args.rounds):
            for form in FORMS:
                rows.setdefault(form, []).append(child(f"step:{vocabulary}:{form}", args.repeats))
        for form, values in rows.items():
            found[f"{form}, vocabulary {vocabulary}"] = {
                key: statistics.median(one[key] for one in values) for key in values[0]
            }
        for form in FORMS[:2]:
            pairs = list(zip(rows[form], rows["higher"], strict=True))
            found[f"{form} faster than higher, vocabulary {vocabulary}"] = spread([b["ms"] / a["ms"] for a, b in pairs])
            found[f"{form} memory over higher, vocabulary {vocabulary}"] = spread([a["mb"] / b["mb"] for a, b in pairs])
    for name in PARTS[1:]:
        if name in args.parts:
            found[name] = child(name, args.repeats)
    from metazoo.environment import describe

    found["environment"] = describe()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(found, indent=2) + "\n")
    for key, value in found.items():
        if key != "environment":
            print(f"{key}: {value}")


def child(name: str, repeats: int) -> Any:
    command = [sys.executable, __file__, "--child", name, "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> dict[str, float]:
    return {"least": min(values), "median": statistics.median(values), "most": max(values)}


def median_ms(function: Callable[[], Any], repeats: int) -> float:
    function()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return 1000 * statistics.median(times)


def encoder_of(vocabulary: int) -> Any:
    """A BERT of MiniLM's shape as initialised; time does not depend on the weights."""
    import torch
    import transformers
    from maml_align.model import DualEncoder, _with_ends, quiet, train_tokenizer

    torch.manual_seed(0)
    shape = transformers.BertConfig(
        vocab_size=vocabulary, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    tokenizer = _with_ends(train_tokenizer(["a few words"], 300))
    with tempfile.TemporaryDirectory() as folder, quiet():
        transformers.BertModel(shape, add_pooling_layer=False).save_pretrained(folder)
        transformers.BertTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
        return DualEncoder.from_pretrained(folder, attention="eager")


def step(name: str, repeats: int) -> dict[str, float]:
    """The outer gradient of TASKS tasks, in all parameters' .grad."""
    import torch
    from maml_align.meta_distillation import Inner, outer, similarity_loss
    from metazoo.environment import peak_memory_mb, reset_peak_memory

    torch.set_num_threads(1)
    _, size, form = name.split(":")
    vocabulary = int(size)
    encoder = encoder_of(vocabulary)
    generator = torch.Generator().manual_seed(0)

    def batch() -> dict[str, Any]:
        ids = torch.randint(5, vocabulary, (2 * PAIRS, LENGTH), generator=generator)
        tokens = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return {"tokens": tokens, "scores": torch.rand(PAIRS, generator=generator), "weight": torch.ones(PAIRS)}

    tasks = [[batch(), batch()] for _ in range(TASKS)]
    parameters = dict(encoder.named_parameters())
    loss = similarity_loss(encoder)

    def ours() -> None:
        total = {name: torch.zeros_like(value) for name, value in parameters.items()}
        for task in tasks:
            used, sets = encoder.cut(task)
            theta = {name: value.detach() for name, value in parameters.items()}
            theta[encoder.table] = theta[encoder.table][used]
            found = outer(loss, theta, *sets, Inner(STEPS, RATE, False, form == "checkpointed"))
            for name, value in found.gradient.items():
                if name == encoder.table:
                    total[name].index_add_(0, used, value)
                else:
                    total[name] += value
        for name, value in parameters.items():
            value.grad = total[name]

    def by_higher() -> None:
        import higher

        network = encoder.backbone[0].model  # higher cannot patch sentence-transformers' classes
        encoder.zero_grad()
        for support, query in tasks:
            optimizer = torch.optim.SGD(network.parameters(), lr=RATE)
            with higher.innerloop_ctx(network, optimizer, copy_initial_weights=False) as (model, inner):

                def of(batch: dict[str, Any], model: Any = model) -> torch.Tensor:
                    vectors = model(**batch["tokens"]).last_hidden_state.mean(1)
                    one, two = torch.nn.functional.normalize(vectors, dim=-1).chunk(2)
                    return ((one * two).sum(-1) - batch["scores"]).square().mean()

                for _ in range(STEPS):
                    inner.step(of(support))
                of(query).backward()

    function = by_higher if form == "higher" else ours
    reset_peak_memory()
    before = peak_memory_mb()
    ms = median_ms(function, repeats)
    norm = float(torch.stack([value.grad.norm() for value in parameters.values() if value.grad is not None]).norm())
    return {"ms": ms, "mb": peak_memory_mb() - before, "norm": norm}


def learner() -> Any:
    """The preset stsb's encoder and task sizes, on the questions in the package taken as pairs of their own."""
    from dataclasses import replace

    import numpy as np
    import torch
    from maml_align import data
    from maml_align.config import PRESETS
    from maml_align.train import MetaLearner
    from metazoo import loop
    from metazoo.options import RunOptions

    torch.set_num_threads(1)
    config = replace(PRESETS["stsb"], dataset="questions", languages=("de", "en", "es"), unseen=())
    asked = data.load_xquad_r(None, config.languages).questions.questions
    rows = np.random.default_rng(0).permutation(1190)
    scores = np.random.default_rng(1).uniform(0, 5, 1190)
    texts = {(one, one): (tuple(asked[one]), tuple(asked[one][i] for i in rows), scores) for one in config.languages}
    part = data.Pairs(config.languages, texts, aligned=True)  # type: ignore[arg-type]
    accelerator = loop.prepare(RunOptions(), seed=0)
    return MetaLearner(config, data.Data("questions", "pairs", part, part, part), accelerator)


def tasks(name: str, repeats: int) -> dict[str, Any]:
    """The gradients of an outer step of MAML-Align: its four tasks at once, and one after another."""
    one = learner()
    batch, objective = one.sampler.batch(0), one.objective(0)
    at_once = median_ms(lambda: one.gradients(batch, objective), 20)
    in_turn = median_ms(lambda: [one.gradients([task], objective) for task in batch], 20)
    return {"at once, ms": at_once, "in turn, ms": in_turn, "ratio": in_turn / at_once}


def flat(name: str, repeats: int) -> dict[str, float]:
    """Peak megabytes of the process in the first 20 outer steps, and in the 180 after."""
    from metazoo.environment import peak_memory_mb, reset_peak_memory

    one, peaks = learner(), {}
    for first, last in ((0, 20), (20, 200)):
        reset_peak_memory()
        for number in range(first, last):
            one.step(number)
        peaks[f"MB in steps {first} to {last}"] = peak_memory_mb()
    return peaks


def encode(name: str, repeats: int) -> dict[str, float]:
    """Sentences in a second: the questions of the package by MiniLM."""
    import sentence_transformers
    import torch
    from maml_align import data
    from maml_align.model import DualEncoder, minilm

    torch.set_num_threads(1)
    texts = [text for text in data.load_xquad_r(None, ("en",)).questions.questions["en"] if text][:256]
    ours = DualEncoder.from_pretrained(minilm())
    theirs = sentence_transformers.SentenceTransformer(str(minilm()), device="cpu")
    rows = []
    for _ in range(repeats):
        rows.append([
            1000 * len(texts) / median_ms(lambda: ours.encode(texts), 1),
            1000 * len(texts) / median_ms(lambda: theirs.encode(texts, batch_size=64), 1),
        ])  # fmt: skip
    return {
        "sentences a second": statistics.median(a for a, _ in rows),
        "of sentence-transformers": statistics.median(b for _, b in rows),
        "ratio": statistics.median(a / b for a, b in rows),
    }


def search(name: str, repeats: int) -> dict[str, Any]:
    """100,000 vectors in 2,000 clusters, 200 queries, the 10 nearest."""
    import numpy as np
    from maml_align.search import Index

    rng = np.random.default_rng(0)
    centres = rng.standard_normal((2000, 384))
    vectors = centres[rng.integers(2000, size=100_200)] + rng.standard_normal((100_200, 384))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries, vectors = vectors[:200], vectors[200:]
    found: dict[str, Any] = {}
    truth: Any = None
    for kind in ("exact", "faiss", "hnsw"):
        started = time.perf_counter()
        index = Index(vectors, kind)  # type: ignore[arg-type]
        seconds = time.perf_counter() - started
        _, nearest = index.search(queries, 10)
        truth = nearest if truth is None else truth
        found[kind] = {
            "seconds to index": seconds,
            "ms for 200 queries": median_ms(lambda index=index: index.search(queries, 10), 3),
            "recall at 10": float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(nearest, truth, strict=True)])),
        }
    return found


CHILDREN: dict[str, Callable[[str, int], Any]] = {
    "step": step, "tasks": tasks, "flat": flat, "encode": encode, "search": search,
}  # fmt: skip


if __name__ == "__main__":
    main()
