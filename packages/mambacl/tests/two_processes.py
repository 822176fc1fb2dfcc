"""Run under torchrun by test_train.py: train MambaCL on the shared work of two processes."""

import json
import sys
from pathlib import Path

import torch
from mambacl.config import Config
from mambacl.train import train
from metazoo.options import RunOptions

torch.set_num_threads(1)
config = Config(**{k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[2]).items()})
train(config, RunOptions(output_dir=Path(sys.argv[1]), log_every=1, checkpoint_every=10))
