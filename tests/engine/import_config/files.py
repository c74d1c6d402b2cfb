"""Files of DeepSpeed's tutorials and of Hugging Face's documentation, written out."""

from __future__ import annotations

from typing import Any

Document = dict[str, Any]

#: Of the Hugging Face documentation ("DeepSpeed", ZeRO-3), all but the models.
TRAINER_ZERO3: Document = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}

#: Of DeepSpeed's tutorial "Accelerating Training of Transformer-Based Language Models with Progressive Layer Dropping".
LAYER_DROP: Document = {
    "train_batch_size": 4096,
    "train_micro_batch_size_per_gpu": 16,
    "steps_per_print": 1000,
    "prescale_gradients": True,
    "gradient_predivide_factor": 8,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 1e-3, "weight_decay": 0.01, "bias_correction": False},
    },
    "gradient_clipping": 1.0,
    "wall_clock_breakdown": False,
    "fp16": {"enabled": True, "loss_scale": 0},
    "progressive_layer_drop": {"enabled": True, "theta": 0.5, "gamma": 0.001},
}

#: Of the tutorial of BERT pre-training (bing_bert), with its LAMB.
BING_BERT: Document = {
    "train_batch_size": 65536,
    "train_micro_batch_size_per_gpu": 64,
    "steps_per_print": 100,
    "prescale_gradients": False,
    "optimizer": {
        "type": "Lamb",
        "params": {"lr": 11e-3, "weight_decay": 0.01, "bias_correction": False, "max_coeff": 0.3, "min_coeff": 0.01},
    },
    "gradient_clipping": 1.0,
    "wall_clock_breakdown": False,
    "fp16": {"enabled": True, "loss_scale": 0},
    "sparse_attention": {"mode": "fixed", "block": 16},
}

#: Of the tutorial of MoQ, with the hyphen that it has in "quantize-algo".
MOQ: Document = {
    "train_batch_size": 32,
    "optimizer": {"type": "Adam", "params": {"lr": 2e-5}},
    "fp16": {"enabled": True},
    "quantize_training": {
        "enabled": True,
        "quantize_verbose": True,
        "quantizer_kernel": True,
        "quantize-algo": {"q_type": "symmetric"},
        "quantize_bits": {"start_bits": 16, "target_bits": 8},
        "quantize_schedule": {"quantize_period": 400, "schedule_offset": 0},
        "quantize_groups": 8,
    },
}

#: Of the tutorial of 1-bit LAMB.
ONE_BIT: Document = {
    "train_batch_size": 65536,
    "train_micro_batch_size_per_gpu": 64,
    "optimizer": {
        "type": "OneBitLamb",
        "params": {
            "lr": 11e-3,
            "max_coeff": 0.3,
            "min_coeff": 0.01,
            "freeze_step": 1000,
            "cuda_aware": False,
            "comm_backend_name": "nccl",
            "coeff_beta": 0.9,
            "factor_max": 4.0,
            "factor_min": 0.5,
            "factor_threshold": 0.1,
        },
    },
    "gradient_clipping": 1.0,
    "fp16": {"enabled": True, "loss_scale": 0, "initial_scale_power": 16},
}

#: Of the tutorial of the cycle (1Cycle) and of CIFAR-10.
ONE_CYCLE: Document = {
    "train_batch_size": 16,
    "steps_per_print": 2000,
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7},
    },
    "scheduler": {
        "type": "OneCycle",
        "params": {
            "cycle_first_step_size": 1000,
            "cycle_first_stair_count": 500,
            "cycle_second_step_size": 1000,
            "cycle_second_stair_count": 500,
            "decay_step_size": 1000,
            "cycle_min_lr": 0.0001,
            "cycle_max_lr": 0.0010,
            "decay_lr_rate": 0.001,
            "cycle_min_mom": 0.85,
            "cycle_max_mom": 0.99,
            "decay_mom_rate": 0.0,
        },
    },
    "wall_clock_breakdown": True,
    "flops_profiler": {"enabled": True, "profile_step": 1, "module_depth": -1, "top_modules": 3, "detailed": True},
    "zero_optimization": {"stage": 0, "cpu_offload": False},
}

#: What the tutorial of inference gives to init_inference.
INFERENCE: Document = {
    "tensor_parallel": {"tp_size": 2},
    "dtype": "half",
    "replace_with_kernel_inject": True,
    "max_out_tokens": 2048,
    "enable_cuda_graph": False,
    "checkpoint": None,
}
