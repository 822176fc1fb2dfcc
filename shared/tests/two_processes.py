"""Run under torchrun by test_loop.py: train the toy and save what process 0 has."""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)

from metazoo.options import RunOptions  # noqa: E402
from toy_method import Config, train  # noqa: E402

folder = Path(sys.argv[1])
steps = int(sys.argv[2])
resume = "resume" in sys.argv
learner = train(
    Config(steps=steps, dropout=0.0), RunOptions(output_dir=folder, resume=resume, log_every=1, checkpoint_every=10)
)
if learner.accelerator.is_main_process:
    save_file(learner.model.state_dict(), folder / "final.safetensors")
