"""Training step, peak memory, forking and state of Mamba here, beside mambapy and transformers' MambaModel on the CPU.

Peers do the same work: as many blocks of the same width, states, expansion and convolution, float32, one process. What
is compared takes turns, so that a busy machine slows all alike. `exp` is the floor that the machine sets: the
exponentials of exp(Δ A) alone, which any exact scan takes twice (forward, and backward instead of keeping them).
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

import torch
from mambacl.data import EpisodeConfig, FeatureEpisodes
from mambacl.model import ContinualLearner, LearnerState, MambaBlock
from torch import Tensor, nn


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


def ratio(found: dict[str, dict[str, float]], one: str, other: str) -> float:
    return round(found[one]["median"] / found[other]["median"], 2)


class Ours(nn.Module):
    """Mamba blocks one after the other."""

    def __init__(self, width: int, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(MambaBlock(width, blocks=blocks) for _ in range(blocks))

    def forward(self, h: Tensor) -> Tensor:
        for block in self.blocks:
            h, _, _ = block(h)
        return h


def mambapy(width: int, blocks: int) -> Callable[[Tensor], Tensor]:
    from mambapy.mamba import Mamba, MambaConfig

    return Mamba(MambaConfig(d_model=width, n_layers=blocks))  # type: ignore[no-any-return]


def transformers(width: int, blocks: int) -> Callable[[Tensor], Tensor]:
    from transformers import MambaConfig, MambaModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    config = MambaConfig(
        hidden_size=width, num_hidden_layers=blocks, state_size=16, expand=2, conv_kernel=4, vocab_size=8,
        use_cache=False,
    )  # fmt: skip
    model = MambaModel(config).train()
    return lambda h: model(inputs_embeds=h).last_hidden_state


MAKERS: dict[str, Callable[[int, int], Callable[[Tensor], Tensor]]] = {
    "mambacl": Ours,
    "mambapy": mambapy,
    "transformers": transformers,
}


def training(width: int, batch: int, length: int, repeats: int, slow: bool) -> dict[str, object]:
    """Forward and backward of two blocks."""
    torch.manual_seed(0)
    h = torch.randn(batch, length, width)
    steps: dict[str, Callable[[], object]] = {}
    for name, make in MAKERS.items():
        if name == "transformers" and not slow:
            continue
        model = make(width, 2)
        steps[name] = lambda model=model: model(h).square().mean().backward()
    decays = torch.rand(16, batch, 2 * width, 16) * -1  # a chunk of 16 steps at a time
    steps["exp"] = lambda: [torch.exp(decays) for _ in range(2 * 2 * length // 16)]
    found = in_turn(steps, repeats)
    ratios = {f"{name} / mambacl": ratio(found, name, "mambacl") for name in steps if name not in ("mambacl", "exp")}
    ratios["mambacl / exp"] = ratio(found, "mambacl", "exp")
    return {"width": width, "batch": batch, "length": length, "milliseconds": found, **ratios}


def peak(name: str, width: int, batch: int, length: int) -> None:
    """Peak memory of one training step in this process above what the model needs at length 2 [MB], printed."""
    torch.set_num_threads(1)
    model = MAKERS[name](width, 2)
    values = []
    for size in (2, length):
        model(torch.randn(batch, size, width)).square().mean().backward()
        status = Path("/proc/self/status").read_text()  # ru_maxrss would keep the peak of the process that started this
        values.append(int(status.partition("VmHWM:")[2].split()[0]) / 1024)
    print(round(values[1] - values[0], 1))


def memory(width: int, batch: int, length: int) -> dict[str, object]:
    """Each in a process of its own."""
    found = {}
    for name in ("mambacl", "mambapy"):
        command = [sys.executable, __file__, "--peak", name, str(width), str(batch), str(length)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = float(done.stdout.split()[-1])
    share = round(found["mambacl"] / found["mambapy"], 3)
    return {"width": width, "batch": batch, "length": length, "megabytes": found, "mambacl / mambapy": share}


def learner(method: str, width: int = 64) -> ContinualLearner:
    torch.manual_seed(0)
    return ContinualLearner((8,), "class", 20, method=method, width=width, blocks=2, heads=4, head_size=16).eval()


@torch.no_grad()
def forking(examples: int, queries: int, repeats: int) -> dict[str, object]:
    """M' queries after M examples: the state forked, against the stream read again for each query; same answers.

    `rerun` reads it once per query; `rerun in one batch` reads M' copies side by side, the stronger way.
    """
    model = learner("mamba")
    episodes = FeatureEpisodes(8, 0.3, EpisodeConfig(tasks=20, shots=examples // 20, queries=queries, vocabulary=20))
    episode = episodes.draw(1, torch.Generator().manual_seed(0))

    def fork() -> Tensor:
        return model.predict(episode.query_x, model.observe(episode.x, episode.y))

    def rerun() -> Tensor:
        answers = []
        for j in range(queries):
            state = model.observe(episode.x, episode.y)
            answers.append(model.predict(episode.query_x[:, j : j + 1], state))
        return torch.cat(answers, 1)

    def batched() -> Tensor:
        copies = [t.expand(queries, *t.shape[1:]) for t in (episode.x, episode.y)]
        return model.predict(episode.query_x.transpose(0, 1), model.observe(*copies)).transpose(0, 1)

    assert torch.allclose(fork(), rerun(), atol=1e-4)
    assert torch.allclose(fork(), batched(), atol=1e-4)
    found = in_turn({"fork": fork, "rerun": rerun, "rerun in one batch": batched}, repeats)
    ratios = {f"{name} / fork": ratio(found, name, "fork") for name in found if name != "fork"}
    return {"examples": examples, "queries": queries, "milliseconds": found, **ratios}


@torch.no_grad()
def streams(method: str, repeats: int) -> list[dict[str, object]]:
    """Bytes of the state after M examples, and tokens per second of reading them one by one and all at once."""
    model, rows = learner(method), []
    for examples in (40, 200, 1000, 2000):
        setting = EpisodeConfig(tasks=20, shots=examples // 20, queries=1, vocabulary=20)
        episode = FeatureEpisodes(8, 0.3, setting).draw(1, torch.Generator().manual_seed(0))

        def one_by_one(episode: object = episode, examples: int = examples) -> LearnerState | None:
            state = None
            for i in range(examples):
                state = model.observe(episode.x[:, i : i + 1], episode.y[:, i : i + 1], state)
            return state

        found = in_turn({"together": lambda e=episode: model.observe(e.x, e.y), "one by one": one_by_one}, repeats)
        speeds = {f"tokens/s {name}": round(2000 * examples / its["median"]) for name, its in found.items()}
        rows.append({"examples": examples, "bytes": model.observe(episode.x, episode.y).bytes, **speeds})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--peak", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.repeats < 1:
        parser.error(f"--repeats is {options.repeats}: give 1 or more")
    if options.peak:
        peak(options.peak[0], *map(int, options.peak[1:]))
        return
    torch.set_num_threads(options.threads)
    found = {
        "torch": torch.__version__,
        "threads": options.threads,
        "training": [
            training(64, 16, 256, options.repeats, slow=True),
            training(256, 4, 256, options.repeats, slow=False),
            training(64, 16, 1000, options.repeats, slow=False),
        ],
        "memory": [memory(64, 16, 1000), memory(256, 4, 1000)],
        "forking": [forking(100, 100, options.repeats), forking(1000, 100, max(2, options.repeats // 2))],
        "streams": {name: streams(name, 2) for name in ("mamba", "linear_transformer", "transformer")},
    }
    text = json.dumps(found, indent=1)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
