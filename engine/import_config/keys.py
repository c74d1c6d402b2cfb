"""The keys of DeepSpeed's configuration files, training and inference, up to 0.19: what slipstream has for each.

To add one: put it into the line of its section below. A key that ``sections.py`` turns into one of ours has no reason.
A section with a reason gets one line of the report for all of it; its own keys are listed so that misspelt ones are
found. A name that ends in ``*`` holds what users name themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Fate(Enum):
    """What becomes of a key; the value is the heading in the report."""

    MAPPED = "taken over"
    CHECK = "taken over, but look at it"
    LATER = "not there yet"
    DROPPED = "left out"
    OFF = "off, so nothing to take over"
    UNKNOWN = "no key of DeepSpeed"


@dataclass(frozen=True)
class Known:
    """A key of DeepSpeed: what becomes of it, and why; ``any_keys`` where its own keys are the user's."""

    fate: Fate
    reason: str = ""
    any_keys: bool = False


_COMPRESSION = "write it as $.quantize_training (docs/moq.md)"
_EIGENVALUES_LOGGED = "eigenvalues are logged"
_BLOCKS_COUNTED = "blocks are counted"
_WHEN_ASKED = "eigenvalues are asked for when a bit is lost"
_TENSOR_PARALLEL = "a model that is split over several GPUs for inference"
_COMMUNICATION = "a tuning of DeepSpeed's communication; torch's own is used"
_WHOLE_MODEL = "slipstream reads models of known families itself: $.model.path is enough"
_OFFLOAD = "weights and optimizer stay on the GPU"
_QUANTIZATION = "weights in 8 bits"
_NO_MOE = "there are no mixtures of experts"
_IN_FP32 = "weights and gradients are kept in fp32"
_CHECKPOINTS = "checkpoints are always whole, and checked when they are read"

_TABLE: tuple[tuple[Fate, str, str, str], ...] = (
    # Taken over by sections.py.
    (Fate.MAPPED, "", "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps", ""),
    (Fate.MAPPED, "", "gradient_clipping optimizer scheduler fp16 bf16 bfloat16 amp* torch_autocast dtype", ""),
    (Fate.MAPPED, "", "zero_optimization activation_checkpointing progressive_layer_drop steps_per_print", ""),
    (Fate.MAPPED, "", "tensorboard replace_with_kernel_inject kernel_inject max_out_tokens max_tokens", ""),
    (Fate.MAPPED, "", "tensor_parallel tp mp_size", ""),
    (Fate.MAPPED, "optimizer.", "type params", ""),
    (Fate.DROPPED, "optimizer.", "legacy_fusion", "AdamW is torch's fused one"),
    (Fate.MAPPED, "optimizer.params.", "lr betas eps weight_decay adam_w_mode bias_correction max_coeff min_coeff", ""),
    (Fate.MAPPED, "optimizer.params.", "max_grad_norm amsgrad", ""),
    (Fate.DROPPED, "optimizer.params.", "torch_adam set_grad_none fp32_optimizer_states", "there is one AdamW"),
    (Fate.DROPPED, "optimizer.params.", "eps_inside_sqrt momentum", "no optimizer has such an option here"),
    (Fate.MAPPED, "optimizer.params.", "freeze_step var_freeze_step", ""),
    (Fate.MAPPED, "optimizer.params.", "var_update_scaler local_step_scaler local_step_clipper", ""),
    (Fate.MAPPED, "optimizer.params.", "coeff_beta factor_max factor_min factor_threshold", ""),
    (Fate.DROPPED, "optimizer.params.", "cuda_aware comm_backend_name", "torch exchanges: NCCL on GPUs, Gloo on CPUs"),
    (Fate.MAPPED, "scheduler.", "type params", ""),
    (Fate.MAPPED, "scheduler.params.", "warmup_min_lr warmup_max_lr warmup_num_steps warmup_type total_num_steps", ""),
    (Fate.MAPPED, "scheduler.params.", "warmup_min_ratio cos_min_ratio", ""),
    (Fate.MAPPED, "scheduler.params.", "cycle_min_lr cycle_max_lr cycle_first_step_size cycle_second_step_size", ""),
    (Fate.DROPPED, "scheduler.params.", "cycle_momentum cycle_min_mom cycle_max_mom", "betas stay as they are"),
    (Fate.DROPPED, "scheduler.params.", "cycle_first_stair_count cycle_second_stair_count", "the rate has no stairs"),
    (Fate.DROPPED, "scheduler.params.", "decay_lr_rate decay_mom_rate decay_step_size", "the cycle ends near 0"),
    (Fate.DROPPED, "scheduler.params.", "lr_range_test_min_lr lr_range_test_step_size", "part of the range test"),
    (Fate.DROPPED, "scheduler.params.", "lr_range_test_step_rate lr_range_test_staircase", "part of the range test"),
    (Fate.DROPPED, "scheduler.params.", "last_batch_iteration", "a checkpoint knows its step"),
    (Fate.MAPPED, "fp16.", "enabled loss_scale initial_scale_power loss_scale_window hysteresis min_loss_scale", ""),
    (Fate.DROPPED, "fp16.", "consecutive_hysteresis", "the scale halves at the first overflow"),
    (Fate.DROPPED, "fp16.", "auto_cast", "autocast decides what is computed in fp16"),
    (Fate.DROPPED, "fp16.", "fp16_master_weights_and_grads", _IN_FP32),
    (Fate.DROPPED, "fp16.", "fused_mode", "AdamW is torch's fused one"),
    (Fate.MAPPED, "bf16.", "enabled", ""),
    (Fate.DROPPED, "bf16.", "immediate_grad_update", "gradients are gathered in fp32 as they come"),
    (Fate.DROPPED, "bf16.", "check_grad_overflow", "a step without a number for a loss or gradient always stops"),
    (Fate.DROPPED, "bf16.", "bf16_master_weights_and_grads bf16_optimizer_states", _IN_FP32),
    (Fate.MAPPED, "bfloat16.", "enabled", ""),
    (Fate.MAPPED, "amp.", "enabled", ""),
    (Fate.MAPPED, "torch_autocast.", "enabled dtype", ""),
    (Fate.DROPPED, "torch_autocast.", "lower_precision_safe_modules", "torch's own list is used"),
    (Fate.MAPPED, "zero_optimization.", "stage offload_optimizer offload_param", ""),
    (Fate.DROPPED, "zero_optimization.", "cpu_offload cpu_offload_params cpu_offload_param", _OFFLOAD),
    (Fate.DROPPED, "zero_optimization.", "cpu_offload_use_pin_memory zenflow super_offload", _OFFLOAD),
    (Fate.DROPPED, "zero_optimization.", "contiguous_gradients reduce_scatter reduce_bucket_size", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "use_multi_rank_bucket_allreduce allgather_partitions", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "allgather_bucket_size allgather_size overlap_comm", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "sub_group_size prefetch_bucket_size round_robin_gradients", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "param_persistence_threshold model_persistence_threshold", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "max_live_parameters max_reuse_distance", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "module_granularity_threshold allgather_sequential", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "use_all_reduce_for_fetch_params", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "stage3_prefetch_bucket_size stage3_max_live_parameters", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "stage3_param_persistence_threshold", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "stage3_model_persistence_threshold", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "stage3_max_reuse_distance stage3_allgather_sequential", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "stage3_module_granularity_threshold", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "stage3_use_all_reduce_for_fetch_params", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "zero_hpz_partition_size zero_quantized_weights", _COMMUNICATION),
    (
        Fate.DROPPED,
        "zero_optimization.",
        "zero_quantized_nontrainable_weights zero_quantized_gradients",
        _COMMUNICATION,
    ),
    (Fate.DROPPED, "zero_optimization.", "zeropp_loco_param* mics_shard_size", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "mics_hierarchical_params_gather leaf_module*", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "parameter_alignment grad_hooks", _COMMUNICATION),
    (Fate.DROPPED, "zero_optimization.", "compute_grad_norm", "each step's norm is in metrics.jsonl"),
    (Fate.DROPPED, "zero_optimization.", "ignore_unused_parameters legacy_stage1", "unused parameters are found"),
    (Fate.DROPPED, "zero_optimization.", "memory_efficient_linear override_module_apply", "FSDP2 has no such option"),
    (Fate.DROPPED, "zero_optimization.", "log_trace_cache_warnings enable_sanity_checks", "FSDP2 has no such option"),
    (Fate.DROPPED, "zero_optimization.", "save_muon_momentum_buffer_in_memory", "there is no Muon"),
    (Fate.DROPPED, "zero_optimization.", "elastic_checkpoint load_from_fp32_weights", _CHECKPOINTS),
    (Fate.DROPPED, "zero_optimization.", "pipeline_loading_checkpoint", _CHECKPOINTS),
    (Fate.DROPPED, "zero_optimization.", "stage3_gather_16bit_weights_on_model_save", _CHECKPOINTS),
    (Fate.DROPPED, "zero_optimization.", "stage3_gather_fp16_weights_on_model_save", _CHECKPOINTS),
    (Fate.DROPPED, "zero_optimization.", "gather_16bit_weights_on_model_save", _CHECKPOINTS),
    (Fate.DROPPED, "zero_optimization.offload_optimizer.", "device nvme_path buffer_count pin_memory", _OFFLOAD),
    (Fate.DROPPED, "zero_optimization.offload_optimizer.", "pipeline pipeline_read pipeline_write", _OFFLOAD),
    (Fate.DROPPED, "zero_optimization.offload_optimizer.", "fast_init ratio super_offload", _OFFLOAD),
    (Fate.DROPPED, "zero_optimization.offload_optimizer.", "cpuadam_cores_perc", _OFFLOAD),
    (Fate.DROPPED, "zero_optimization.offload_param.", "device nvme_path buffer_count buffer_size", _OFFLOAD),
    (Fate.DROPPED, "zero_optimization.offload_param.", "max_in_cpu pin_memory", _OFFLOAD),
    (Fate.MAPPED, "activation_checkpointing.", "partition_activations cpu_checkpointing number_checkpoints", ""),
    (Fate.DROPPED, "activation_checkpointing.", "contiguous_memory_optimization profile", "torch's checkpoint is used"),
    (Fate.DROPPED, "activation_checkpointing.", "synchronize_checkpoint_boundary", "torch's checkpoint is used"),
    (Fate.MAPPED, "progressive_layer_drop.", "enabled theta gamma", ""),
    (Fate.MAPPED, "tensorboard.", "enabled output_path job_name", ""),
    (Fate.MAPPED, "tensor_parallel.", "tp_size enabled autotp_size", ""),
    (Fate.MAPPED, "tp.", "tp_size enabled", ""),
    # Features with a place in slipstream that it does not have yet.
    (Fate.MAPPED, "", "quantize_training eigenvalue", ""),
    (Fate.MAPPED, "quantize_training.", "enabled quantize_bits quantize_schedule quantize_groups quantize_algo", ""),
    (Fate.MAPPED, "quantize_training.", "fp16_mixed_quantize eigenvalue", ""),
    (Fate.DROPPED, "quantize_training.", "quantize_verbose", "metrics.jsonl has the bits of each layer"),
    (Fate.DROPPED, "quantize_training.", "quantizer_kernel", "there is nothing to choose"),
    (Fate.DROPPED, "quantize_training.", "quantize_type", "DeepSpeed never read it"),
    (Fate.MAPPED, "quantize_training.quantize_bits.", "start_bits target_bits", ""),
    (Fate.MAPPED, "quantize_training.quantize_schedule.", "quantize_period schedule_offset", ""),
    (Fate.MAPPED, "quantize_training.quantize_algo.", "q_type rounding", ""),
    (Fate.MAPPED, "quantize_training.fp16_mixed_quantize.", "enabled quantize_change_ratio", ""),
    (Fate.MAPPED, "quantize_training.eigenvalue.", "enabled max_iter tol stability layer_name", ""),
    (Fate.DROPPED, "quantize_training.eigenvalue.", "verbose", _EIGENVALUES_LOGGED),
    (Fate.DROPPED, "quantize_training.eigenvalue.", "layer_num", _BLOCKS_COUNTED),
    (Fate.DROPPED, "quantize_training.eigenvalue.", "gas_boundary_resolution", _WHEN_ASKED),
    (Fate.MAPPED, "eigenvalue.", "enabled max_iter tol stability layer_name", ""),
    (Fate.DROPPED, "eigenvalue.", "verbose", _EIGENVALUES_LOGGED),
    (Fate.DROPPED, "eigenvalue.", "layer_num", _BLOCKS_COUNTED),
    (Fate.DROPPED, "eigenvalue.", "gas_boundary_resolution", _WHEN_ASKED),
    (Fate.LATER, "compression_training.", "weight_quantization", _COMPRESSION),
    (Fate.DROPPED, "compression_training.", "activation_quantization", "activations are not quantized"),
    (Fate.DROPPED, "compression_training.", "sparse_pruning* row_pruning* head_pruning*", "there is no pruning"),
    (Fate.DROPPED, "compression_training.", "channel_pruning* layer_reduction*", "there is no pruning"),
    (Fate.LATER, "compression_training.weight_quantization.", "shared_parameters different_groups*", ""),
    (Fate.LATER, "compression_training.weight_quantization.shared_parameters.", "enabled quantizer_kernel", ""),
    (Fate.LATER, "compression_training.weight_quantization.shared_parameters.", "schedule_offset quantize_groups", ""),
    (Fate.LATER, "compression_training.weight_quantization.shared_parameters.", "quantize_verbose rounding", ""),
    (Fate.LATER, "compression_training.weight_quantization.shared_parameters.", "quantization_type", ""),
    (Fate.LATER, "compression_training.weight_quantization.shared_parameters.", "quantize_weight_in_forward", ""),
    (Fate.LATER, "compression_training.weight_quantization.shared_parameters.", "fp16_mixed_quantize*", ""),
    (Fate.DROPPED, "compression_training.activation_quantization.", "shared_parameters* different_groups*", ""),
    (Fate.MAPPED, "", "compression_training", ""),
    (Fate.MAPPED, "", "flops_profiler", ""),
    (Fate.MAPPED, "flops_profiler.", "enabled profile_step module_depth top_modules detailed output_file", ""),
    (Fate.DROPPED, "flops_profiler.", "recompute_fwd_factor", "backward and recomputed work are counted and timed"),
    (Fate.DROPPED, "", "wall_clock_breakdown timers*", "$.flops_profiler times each phase of a step, and each module"),
    (Fate.LATER, "tensor_parallel.", "tp_grain_size mpu tp_group dtype tp_overlap_comm tp", _TENSOR_PARALLEL),
    (Fate.LATER, "tensor_parallel.", "partition_config* preset_model", _TENSOR_PARALLEL),
    (Fate.LATER, "tensor_parallel.", "injection_policy_tuple keep_module_on_host", _TENSOR_PARALLEL),
    (Fate.LATER, "tensor_parallel.", "replace_with_kernel_inject kernel_inject tensor_parallel*", _TENSOR_PARALLEL),
    (Fate.LATER, "tensor_parallel.", "vocab_parallel_lm_head vocab_parallel_ce_backend", _TENSOR_PARALLEL),
    (Fate.LATER, "tp.", "tp_grain_size mpu tp_group", _TENSOR_PARALLEL),
    (Fate.LATER, "", "mpu injection_policy* injection_dict* injection_policy_tuple", _TENSOR_PARALLEL),
    (Fate.LATER, "", "quant", _QUANTIZATION),
    (Fate.LATER, "quant.", "enabled activation* weight* qkv*", ""),
    # Without a place.
    (Fate.DROPPED, "", "memory_breakdown", "metrics.jsonl and torch's profiler"),
    (Fate.DROPPED, "", "dump_state", "`slipstream explain` shows the configuration with every choice"),
    (
        Fate.DROPPED,
        "",
        "wandb* comet* csv_monitor*",
        "metrics.jsonl holds the metrics, and TensorBoard's files if wanted",
    ),
    (Fate.DROPPED, "", "prescale_gradients gradient_predivide_factor disable_allgather", _COMMUNICATION),
    (Fate.DROPPED, "", "communication_data_type seq_parallel_communication_data_type", _COMMUNICATION),
    (Fate.DROPPED, "", "seq_parallel_comm_data_type", _COMMUNICATION),
    (Fate.DROPPED, "", "gradient_allreduce_op", "gradients are averaged"),
    (Fate.DROPPED, "", "comms_logger* zero_allow_comm_data_type_fp32", _COMMUNICATION),
    (Fate.DROPPED, "", "aio*", _OFFLOAD),
    (Fate.DROPPED, "", "data_types* fp32_allreduce", _IN_FP32),
    (Fate.DROPPED, "", "disable_python_gc", "Python collects its garbage as ever"),
    (Fate.DROPPED, "", "sparse_gradients", "gradients of embeddings are dense"),
    (Fate.DROPPED, "", "managed_gradient_accumulation", "accumulation is always managed"),
    (Fate.DROPPED, "", "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer", "AdamW and LAMB may be sharded"),
    (Fate.DROPPED, "", "checkpoint* load_universal_checkpoint nebula* datastates*", _CHECKPOINTS),
    (Fate.DROPPED, "", "dataloader_drop_last", "the end of an epoch runs into the next one, no sample is lost"),
    (Fate.DROPPED, "", "vocabulary_size", "the tokenizer and the model say it"),
    (Fate.DROPPED, "", "log_level", "-v and -vv say more"),
    (Fate.DROPPED, "", "compile*", "set $.training.compile for torch.compile"),
    (Fate.DROPPED, "", "graph_harvesting", "CUDA graphs are used for inference without asking"),
    (Fate.DROPPED, "", "sparse_attention*", "attention is dense"),
    (Fate.DROPPED, "", "elasticity*", "a run may go on with another number of processes: $.training.resume"),
    (Fate.DROPPED, "", "autotuning*", "batch sizes are yours to choose"),
    (Fate.DROPPED, "", "hybrid_engine*", "the engine that trains also generates"),
    (Fate.DROPPED, "", "curriculum_learning* data_efficiency*", "data come in one order, shuffled"),
    (Fate.DROPPED, "", "pipeline* sequence_parallel_size", "training is data-parallel"),
    (Fate.DROPPED, "", "expert_parallel* use_data_before_expert_parallelism moe* ep_size ep_group", _NO_MOE),
    (Fate.DROPPED, "", "ep_mp_group expert_group expert_mp_group moe_experts moe_type", _NO_MOE),
    (Fate.DROPPED, "", "weight_quantization*", "ZeRO-Inference is not there"),
    (Fate.DROPPED, "", "enable_cuda_graph use_triton triton_autotune", "chosen by itself where it helps"),
    (Fate.DROPPED, "", "zero*", _OFFLOAD),
    (Fate.DROPPED, "", "triangular_masking tm return_tuple transposed_mode replace_method", _WHOLE_MODEL),
    (Fate.DROPPED, "", "base_dir set_empty_params checkpoint_config* ckpt_config*", _WHOLE_MODEL),
    (Fate.DROPPED, "", "save_mp_checkpoint_path training_mp_size keep_module_on_host config* args*", _WHOLE_MODEL),
    (Fate.DROPPED, "", "min_out_tokens min_tokens", "memory is taken page by page, as sequences grow"),
)


def _keys() -> dict[str, Known]:
    return {
        prefix + name.rstrip("*"): Known(fate, reason, name.endswith("*"))
        for fate, prefix, names, reason in _TABLE
        for name in names.split()
    }


#: Every key by its dotted path.
KEYS: Mapping[str, Known] = _keys()

#: Keys of inference files alone, and those that only training has.
OF_INFERENCE = [
    "replace_with_kernel_inject",
    "kernel_inject",
    "dtype",
    "tensor_parallel",
    "tp",
    "mp_size",
    "max_out_tokens",
    "max_tokens",
    "min_out_tokens",
    "min_tokens",
    "enable_cuda_graph",
    "use_triton",
    "quant",
    "replace_method",
    "injection_policy",
    "return_tuple",
]
OF_TRAINING = [
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "gradient_clipping",
    "progressive_layer_drop",
    "quantize_training",
    "fp16",
    "bf16",
    "bfloat16",
    "zero_optimization",
]

#: What Hugging Face's Trainer puts in the place of "auto": the field of TrainingArguments, and its default.
AUTO: Mapping[str, tuple[str, int | float | str | list[float] | None]] = {
    "train_batch_size": ("per_device_train_batch_size x gradient_accumulation_steps x processes", None),
    "train_micro_batch_size_per_gpu": ("per_device_train_batch_size", 8),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", 1),
    "gradient_clipping": ("max_grad_norm", 1.0),
    "optimizer.params.lr": ("learning_rate", 5e-5),
    "optimizer.params.betas": ("adam_beta1 and adam_beta2", [0.9, 0.999]),
    "optimizer.params.eps": ("adam_epsilon", 1e-8),
    "optimizer.params.weight_decay": ("weight_decay", 0.0),
    "scheduler.params.warmup_min_lr": ("0", 0.0),
    "scheduler.params.warmup_max_lr": ("learning_rate", 5e-5),
    "scheduler.params.warmup_num_steps": ("warmup_steps or warmup_ratio", 0),
    "scheduler.params.total_num_steps": ("max_steps, or the length of num_train_epochs", "auto"),
}

#: Switches whose "auto" Trainer fills in; nobody does for another one.
AUTO_FLAGS = frozenset({"fp16.enabled", "bf16.enabled", "bfloat16.enabled", "amp.enabled"})
