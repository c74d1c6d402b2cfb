"""Checkpoint directories as DeepSpeed's ``save_checkpoint`` lays them out (runtime/engine.py of 0.19.6)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TAG = "global_step3"


def model_states(module: Any, zero: int = 0, client_state: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What ``_common_checkpoint_state`` gathers, for a run of one process with AdamW in bf16."""
    tensors = module if isinstance(module, Mapping) else {}
    shapes = OrderedDict((name, tensor.shape) for name, tensor in tensors.items())
    moments = {i: {"step": 3, "exp_avg": torch.zeros(2), "exp_avg_sq": torch.zeros(2)} for i in range(2)}
    groups = [{"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "params": [0, 1]}]
    scaled = {
        "dynamic_loss_scale": True, "cur_scale": 65536.0, "cur_iter": 3, "last_overflow_iter": -1, "scale_factor": 2.0,
        "scale_window": 1000, "optimizer_state_dict": {"state": moments, "param_groups": groups},
        "fp32_groups_flat": [torch.zeros(4)], "clip_grad": 0.0,
    }  # fmt: skip
    return {
        "module": module,
        "buffer_names": [],
        "optimizer": None if zero else scaled,
        "param_shapes": [shapes] if zero else None,
        "frozen_param_shapes": OrderedDict() if zero > 1 else None,
        "shared_params": {"lm_head.weight": "transformer.wte.weight"} if zero else None,
        "frozen_param_fragments": OrderedDict() if zero > 1 else None,
        "lr_scheduler": {"last_batch_iteration": 2},
        "data_sampler": None,
        "random_ltd": None,
        "sparse_tensor_module_names": {"embed"},
        "skipped_steps": 0,
        "global_steps": 3,
        "global_samples": 6,
        "dp_world_size": 1,
        "mp_world_size": 1,
        "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1},
        "ds_config": {"train_micro_batch_size_per_gpu": 2, "zero_optimization": {"stage": zero}, "bf16": {}},
        "ds_version": "0.19.6",
        **(client_state or {}),
    }


class LossScaler:
    """Stands for the classes of DeepSpeed that ZeRO's optimizer states hold."""


def deepspeed(directory: Path, module: Any, zero: int = 0, client_state: Mapping[str, Any] | None = None) -> Path:
    """The directory after ``save_checkpoint(directory)``, without ``config.json``. Stages of ZeRO: 0 to 3."""
    folder = directory / TAG
    folder.mkdir(parents=True, exist_ok=True)
    stage3 = "zero_pp_rank_0_" if zero == 3 else ""
    torch.save(model_states(module, zero, client_state), folder / f"{stage3}mp_rank_00_model_states.pt")
    if zero:
        state = {"loss_scaler": LossScaler(), "zero_stage": zero, "partition_count": 1}
        torch.save({"optimizer_state_dict": state}, folder / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
        (directory / "zero_to_fp32.py").write_text("raise SystemExit('not to be run')\n")
    (directory / "latest").write_text(TAG)
    return directory


def cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The floating-point ones in ``dtype``."""
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in tensors.items()}
