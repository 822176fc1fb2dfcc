"""Weights, gradients and optimizer state in shards over the processes (PyTorch's fully_shard), for models that fit no
single device: the same loop, the same objective."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from metazoo.errors import UserError
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


def check_processes() -> None:
    """Raises UserError where there is one process only."""
    if not dist.is_initialized():
        raise UserError(
            "--fsdp shards over processes, but there is one: start with `accelerate launch --num_processes N -m "
            "flipped_learning.train …` (on CPU `torchrun --nproc_per_node N -m flipped_learning.train …`)"
        )


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Shard ``model`` in place, a group for each transformer block, and add gradients up instead of averaging them.

    Raises:
        UserError: there is one process only.
    """
    check_processes()
    policy = MixedPrecisionPolicy()
    if accelerator.mixed_precision == "bf16":
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    blocks = set(getattr(model, "_no_split_modules", None) or ())
    for module in [m for m in model.modules() if type(m).__name__ in blocks]:
        fully_shard(module, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # the loss is already divided by the tokens of the global batch
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no pre-multiplied sum


class Sharded:
    """State of a sharded model and its optimizer as whole tensors, as checkpoints keep it. All processes must ask for
    it together; the main one writes."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = _Weights(parameters), _Optimizer(optimizer)


class _Weights:
    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.parameters = parameters

    def state_dict(self) -> dict[str, Any]:
        return {name: whole(parameter.detach()) for name, parameter in self.parameters.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(_like(parameter, state[name]))


class _Optimizer:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        state = self.optimizer.state_dict()
        kept = {i: {key: whole(value) for key, value in of.items()} for i, of in state["state"].items()}
        return {"state": kept, "param_groups": state["param_groups"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = {
            i: {key: _like(parameters[int(i)], value) for key, value in of.items()} for i, of in state["state"].items()
        }
        self.optimizer.load_state_dict({"state": kept, "param_groups": state["param_groups"]})


def whole(value: Any) -> Any:
    """A sharded tensor gathered on the CPU of the main process; on the others only its shape, which takes no memory."""
    if not isinstance(value, DTensor):
        return value
    full = value.full_tensor()
    return full.cpu() if dist.get_rank() == 0 else torch.empty((), dtype=full.dtype).expand(full.shape)


def _like(parameter: torch.Tensor, value: Any) -> Any:
    """``value`` in the shards of ``parameter``, where it has its shape."""
    if not isinstance(parameter, DTensor) or not isinstance(value, torch.Tensor) or value.shape != parameter.shape:
        return value
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)
