"""Training: phases, towers, resuming, two processes, what is refused; and that it learns."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from metazoo.errors import UserError
from metazoo.options import RunOptions
from streetclip import data, evaluate, plots, train
from streetclip.config import COUNTRY_CAPTION, Config, EvaluateOptions
from transformers import CLIPModel

torch.set_num_threads(1)
TINY = Config(
    images=40, test_images=6, width=16, heads=2, vision_layers=1, text_layers=1, projection=8, batch=8,
    generic_batch=8, generic_steps=3, steps=4, warmup=0,
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "training", lambda rows, path: None)


def trained(folder: Path, config: Config, **options: Any) -> train.Run:
    return train.train(config, RunOptions(output_dir=folder, **{"log_every": 1, "checkpoint_every": 100, **options}))


def weights(run: train.Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.clip.state_dict().items()}


def moved(one: train.Run, other: train.Run) -> set[str]:
    return {name for name, value in weights(one).items() if not torch.equal(value, other.clip.state_dict()[name])}


def test_run_folder(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", TINY)
    assert [row["step"] for row in run.metrics] == list(range(1, 8))
    assert [row["phase"] for row in run.metrics] == [0] * 3 + [1] * 4
    for row in run.metrics:
        assert row["loss"] == pytest.approx((row["classifier_loss"] + row["representation_loss"]) / 2, abs=1e-5)
    loaded = CLIPModel.from_pretrained(tmp_path / "run" / "model")
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, run.clip.model.state_dict()[name])
    again = train.load(tmp_path / "run")
    assert not moved(run, again)
    assert again.metrics == run.metrics


def test_same_seed_same_bits(tmp_path: Path) -> None:
    one, other, third = (trained(tmp_path / str(i), replace(TINY, seed=seed)) for i, seed in enumerate((0, 0, 1)))
    assert not moved(one, other)
    assert moved(one, third)


@pytest.mark.parametrize("method", ["streetclip", "label-head"])
def test_resumed_anywhere(tmp_path: Path, method: Any) -> None:
    """Also at the change of phase, where the optimizer begins anew."""
    config = replace(TINY, method=method)
    whole = trained(tmp_path / "whole", config)
    for at in (2, 3, 4):
        folder = tmp_path / f"cut-{at}"
        held = train.SyntheticCaptionTrainer.step

        def stopping(self: Any, step: int, at: int = at, held: Any = held) -> Any:
            if step == at:
                raise KeyboardInterrupt
            return held(self, step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train.SyntheticCaptionTrainer, "step", stopping)
            with pytest.raises(KeyboardInterrupt):
                trained(folder, config, checkpoint_every=1)
        resumed = trained(folder, config, checkpoint_every=1, resume=True)
        assert not moved(whole, resumed), at
        if whole.head is not None:
            assert resumed.head is not None
            assert torch.equal(whole.head.linear.weight, resumed.head.linear.weight)
        assert [row["loss"] for row in resumed.metrics] == [row["loss"] for row in whole.metrics]


def test_clip_is_the_start_of_streetclip(tmp_path: Path) -> None:
    """The baseline is what synthetic captions begin from: the same first phase, bit for bit."""
    clip = trained(tmp_path / "clip", replace(TINY, method="clip"))
    start = trained(tmp_path / "start", replace(TINY, steps=0))
    assert not moved(clip, start)
    whole = trained(tmp_path / "whole", TINY)
    assert [row["loss"] for row in whole.metrics[:3]] == [row["loss"] for row in clip.metrics]


@pytest.mark.parametrize(
    ("towers", "still"),
    [("both", ()), ("image", ("text_model", "text_projection")), ("text", ("vision_model", "visual"))],
)
def test_towers(tmp_path: Path, towers: Any, still: tuple[str, ...]) -> None:
    start = trained(tmp_path / "start", replace(TINY, method="clip"))
    run = trained(tmp_path / "run", replace(TINY, towers=towers))
    changed = moved(start, run)
    assert "model.logit_scale" in changed
    for tower in ("text_model", "text_projection", "vision_model", "visual"):
        assert any(tower in name for name in changed) == (tower not in still), tower


def test_label_head_leaves_the_text_tower(tmp_path: Path) -> None:
    start = trained(tmp_path / "start", replace(TINY, method="clip"))
    run = trained(tmp_path / "run", replace(TINY, method="label-head"))
    assert not any("text" in name for name in moved(start, run))
    assert any("vision" in name for name in moved(start, run))


def test_micro_batches_change_nothing(tmp_path: Path) -> None:
    """GradCache: the same steps up to float error."""
    whole = trained(tmp_path / "whole", TINY)
    parts = trained(tmp_path / "parts", replace(TINY, micro_batch=3))
    for one, other in zip(whole.metrics, parts.metrics, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    whole = trained(tmp_path / "whole", TINY)
    again = trained(tmp_path / "again", replace(TINY, checkpointing=True))
    assert [row["loss"] for row in again.metrics] == pytest.approx([row["loss"] for row in whole.metrics], rel=1e-5)


def test_bf16(tmp_path: Path) -> None:
    """In a process of its own, as Accelerate keeps the precision; weights stay in 32 bits."""
    code = (
        "import sys, torch; from dataclasses import replace; from pathlib import Path\n"
        "from streetclip import plots; plots.training = lambda rows, path: None\n"
        "from streetclip.config import Config; from streetclip.train import train\n"
        "from metazoo.options import RunOptions; torch.set_num_threads(1)\n"
        f"config = Config(**{asdict(replace(TINY, precision='bf16'))!r})\n"
        "run = train(config, RunOptions(output_dir=Path(sys.argv[1]), log_every=1))\n"
        "assert {v.dtype for v in run.clip.parameters()} == {torch.float32}\n"
        "print(run.metrics[-1]['loss'])"
    )
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path / "bf16")], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    whole = trained(tmp_path / "whole", TINY)
    assert float(found.stdout.split()[-1]) == pytest.approx(whole.metrics[-1]["loss"], rel=0.05)


def test_two_processes(tmp_path: Path) -> None:
    """The same gradient of the whole batch, each process encoding half: negatives of both, the temperature's once."""
    fields: dict[str, dict[str, Any]] = {
        "plain": {}, "cached": {"micro_batch": 2}, "soft": {"targets": "soft", "template": COUNTRY_CAPTION},
        "image": {"towers": "image"}, "head": {"method": "label-head"},
    }  # fmt: skip
    jobs = [(str(tmp_path / name), asdict(replace(TINY, **more))) for name, more in fields.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29611"]
    script = Path(__file__).with_name("two_processes.py")
    found = subprocess.run([*command, str(script), json.dumps(jobs)], capture_output=True, text=True, timeout=300)
    assert found.returncode == 0, found.stderr[-2000:]
    from metazoo import loop

    for name, more in fields.items():
        ranks = [np.load(f"{tmp_path / name}.{rank}.npz") for rank in (0, 1)]
        noted: list[np.ndarray] = []

        def summed(parameters: Any, accelerator: Any, noted: list[np.ndarray] = noted) -> None:
            noted.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).numpy().copy())

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loop, "sum_gradients", summed)
            alone = trained(tmp_path / f"alone-{name}", replace(TINY, **more))
        assert len(noted) == 7
        kept = [key for key in ranks[0].files if key != "weights"]
        assert len(kept) == 7
        np.testing.assert_allclose(ranks[0][kept[0]], noted[0], rtol=1e-4, atol=1e-6, err_msg=name)
        for one in kept:
            np.testing.assert_array_equal(ranks[0][one], ranks[1][one])
        np.testing.assert_array_equal(ranks[0]["weights"], ranks[1]["weights"])
        last = torch.cat([value.detach().flatten() for value in alone.clip.parameters()]).numpy()
        np.testing.assert_allclose(ranks[0]["weights"], last, atol=3e-3, err_msg=name)


def test_scale_is_kept_below_its_most(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", replace(TINY, max_scale=14.0, lr=0.1, generic_lr=0.1))
    assert max(row["scale"] for row in run.metrics) <= 14.0 + 1e-4


def test_rates() -> None:
    config = replace(TINY, steps=10, warmup=4, schedule="cosine", lr=0.2)
    learner = train.SyntheticCaptionTrainer(config, data.load(config), Accelerator())
    rates = [learner._rate(i, False) for i in range(10)]
    assert rates[:4] == pytest.approx([0.05, 0.1, 0.15, 0.2])
    assert [learner._rate(i, True) for i in (0, 3, 9)] == pytest.approx([0.25e-3, 1e-3, 1e-3])
    assert rates[4:] == pytest.approx([0.1 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])


def test_weight_decay_spares_vectors() -> None:
    learner = train.SyntheticCaptionTrainer(TINY, data.load(TINY), Accelerator())
    decayed, spared = learner.optimizer.param_groups
    assert decayed["weight_decay"] == 0.01
    assert spared["weight_decay"] == 0
    assert all(value.ndim > 1 for value in decayed["params"])
    assert any(value is learner.clip.log_scale for value in spared["params"])


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"batch": 41}, "40 training photos, --batch is 41"),
        ({"dataset": "nowhere.csv", "generic_steps": 0}, "nowhere.csv"),
        ({"model": "nowhere/nothing", "generic_steps": 0}, "nowhere/nothing"),
    ],
)
def test_refused(tmp_path: Path, fields: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=says):
        trained(tmp_path / "run", replace(TINY, **fields))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_one_place_is_refused(tmp_path: Path) -> None:
    def one_country(config: Config) -> data.Data:
        held = data.load(config)
        assert held.train is not None
        return replace(held, train=replace(held.train, country=("Baba",) * len(held.train)))

    with pytest.raises(UserError, match="one caption"):
        train.train_on(replace(TINY, template=COUNTRY_CAPTION), one_country, RunOptions(output_dir=tmp_path / "run"))


def test_learns(tmp_path: Path) -> None:
    """After some steps photos are told from the captions of their batch far above chance."""
    config = replace(
        TINY, images=512, width=32, heads=4, vision_layers=2, text_layers=1, projection=32, batch=32, generic_steps=0,
        steps=120, lr=2e-3, warmup=20,
    )  # fmt: skip
    run = trained(tmp_path / "run", config)
    accuracy = np.mean([row["batch_accuracy"] for row in run.metrics[-10:]])
    assert run.metrics[-1]["classifier_loss"] < 0.7 * math.log(32)
    assert accuracy > 4 * 100 / 32


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["streetclip", "label-head"])
def test_gpu(tmp_path: Path, method: Any) -> None:
    """Losses on CUDA are the CPU's up to float error; a bf16 run trains there, resumes, is loaded and evaluated."""
    config = replace(TINY, method=method)
    rows = []
    for cpu in (True, False):
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.manual_seed(0)
        learner = train.SyntheticCaptionTrainer(config, data.load(config), Accelerator(cpu=cpu))
        rows.append([float(learner.step(step)["loss"]) for step in range(3)])
        assert learner.clip.log_scale.is_cuda != cpu
    assert rows[0] == pytest.approx(rows[1], rel=1e-3, abs=1e-5)
    AcceleratorState._reset_state(reset_partial_state=True)
    config = replace(config, precision="bf16", micro_batch=3, checkpointing=True)
    run = trained(tmp_path / "run", config)
    assert run.clip.log_scale.is_cuda
    assert all(np.isfinite(row["loss"]) for row in run.metrics)
    found = evaluate.evaluate(run, EvaluateOptions(plots=False, knn=2))
    assert all(np.isfinite(value) for value in found.values())
    assert not moved(run, trained(tmp_path / "run", config, resume=True))
