"""From sections of DeepSpeed's configuration to ours: one function a section. ``SECTIONS`` lists them in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from engine.import_config.draft import Draft, shown
from engine.import_config.keys import OF_INFERENCE, OF_TRAINING, Fate
from engine.import_config.optimizer import COMPRESSED

_DTYPES = {
    **dict.fromkeys(("fp16", "half", "float16", "torch.float16", "torch.half"), "fp16"),
    **dict.fromkeys(("bf16", "bfloat16", "torch.bfloat16"), "bf16"),
    **dict.fromkeys(("fp32", "float", "float32", "torch.float32", "torch.float"), "fp32"),
}
#: Steps that no training has: Accelerate writes as many for "print nothing".
NEVER = 2**31 - 1
#: Bits of the largest loss scale that is a number.
LARGEST_POWER = 1023
_LAYERS_FOUND = "slipstream finds the layers of the model itself and drops them; the model needs no change"


def trains(draft: Draft) -> bool:
    """Whether the file is for training. Both kinds share some names; those that one kind alone has decide."""
    has = draft.source.keys()
    return bool(has & set(OF_TRAINING)) or not has & set(OF_INFERENCE)


def batch(draft: Draft) -> None:
    """The three numbers of a batch."""
    if not trains(draft):
        return
    total = draft.move("train_batch_size", "training.train_batch_size", "integer")
    for key, name in (
        ("train_micro_batch_size_per_gpu", "micro_batch_size"),
        ("gradient_accumulation_steps", "accumulation_steps"),
    ):
        if total is not None and draft.get(key) == "auto":
            draft.tell(Fate.MAPPED, key, '"auto" follows from train_batch_size', f"training.{name}")
        else:
            draft.move(key, f"training.{name}", "integer")
    training = draft.document.setdefault("training", {})
    if "train_batch_size" not in training and "micro_batch_size" not in training:
        draft.write("training.micro_batch_size", 1)
        key = "train_micro_batch_size_per_gpu"
        draft.tell(Fate.CHECK, key, "the file has no batch size: 1 is written", "training.micro_batch_size")


def precision(draft: Draft) -> None:
    """fp16, bf16 and the two kinds of autocast; fp32 where there is none of them."""
    if not trains(draft):
        return
    names = ("fp16", "bf16", "bfloat16", "amp", "torch_autocast")
    on = {name: value for name in names if (value := draft.flag(name))}
    if "fp16" in on and ("bf16" in on or "bfloat16" in on) and "auto" not in on.values():
        draft.problem("fp16.enabled", "bf16 is on too: switch one of them off")
        return
    chosen = next((name for name in names if on.get(name) is True), None)
    for name in on:
        if on[name] == "auto":
            said = f'"auto" is TrainingArguments.{name}: set $.precision to "{name}" if you pass that'
            draft.tell(Fate.CHECK, name, said, "precision" if chosen is None else "")
    if chosen is None:
        if not on:
            draft.write("precision", "fp32")
            draft.tell(Fate.MAPPED, "fp16 and bf16", "both are off, so fp32", "precision")
        return
    if chosen == "fp16":
        draft.write("precision", "fp16")
        draft.tell(Fate.MAPPED, "fp16.enabled", "", "precision")
        _loss_scale(draft)
    elif chosen == "torch_autocast":
        draft.tell(Fate.MAPPED, "torch_autocast.enabled", "", "precision")
        _dtype(draft, "torch_autocast.dtype", "bf16")
    elif chosen == "amp":
        draft.write("precision", "fp16")
        draft.tell(Fate.CHECK, "amp", "torch's autocast in the place of apex", "precision")
    else:
        draft.write("precision", "bf16")
        draft.tell(Fate.MAPPED, f"{chosen}.enabled", "", "precision")


def _loss_scale(draft: Draft) -> None:
    """DeepSpeed's defaults are not ours: what it leaves out is written too."""
    initial, window = "training.loss_scale.initial", "training.loss_scale.growth_interval"
    fixed = draft.take("fp16.loss_scale", "number")
    if fixed:
        draft.write(initial, float(fixed))
        draft.write(window, NEVER)
        draft.tell(Fate.CHECK, "fp16.loss_scale", "fixed in DeepSpeed; here it does not grow, but may halve", initial)
        for key in ("initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"):
            if draft.get(f"fp16.{key}") is not None:
                draft.tell(Fate.OFF, f"fp16.{key}", "DeepSpeed's scale is fixed")
        return
    power = draft.take("fp16.initial_scale_power", "integer")
    if power is not None and power > LARGEST_POWER:
        draft.problem("fp16.initial_scale_power", f"got {shown(power)}, wanted at most {LARGEST_POWER}")
        return
    draft.write(initial, 2.0 ** (16 if power is None else power))
    if fixed is not None:
        draft.tell(Fate.MAPPED, "fp16.loss_scale", "0 is a scale that moves", "training.loss_scale")
    if power is not None:
        draft.tell(Fate.MAPPED, "fp16.initial_scale_power", f"2^{power}", initial)
    steps = draft.take("fp16.loss_scale_window", "integer")
    draft.write(window, 1000 if steps is None else steps)
    draft.tell(Fate.MAPPED, "fp16.loss_scale_window", "1000, DeepSpeed's default" if steps is None else "", window)
    overflows = draft.take("fp16.hysteresis", "integer")
    said = "the scale halves at the first overflow"
    if overflows is None:
        draft.tell(Fate.DROPPED, "fp16.hysteresis", f"2, DeepSpeed's default: {said} here")
    else:
        draft.tell(Fate.MAPPED if overflows == 1 else Fate.DROPPED, "fp16.hysteresis", said)
    if draft.take("fp16.min_loss_scale", "number") is not None:
        draft.tell(Fate.DROPPED, "fp16.min_loss_scale", "the scale has no floor")


def clipping(draft: Draft) -> None:
    """The norm that gradients are shortened to; old files have it among the optimizer's parameters."""
    if not trains(draft):
        return
    target, old = "training.clip_norm", "optimizer.params.max_grad_norm"
    for key in ("gradient_clipping", old):
        if draft.get(key) is None:
            continue
        if draft.take(key, "number") == 0:
            draft.tell(Fate.OFF, key)
        elif key == old and "clip_norm" in draft.document["training"]:
            draft.tell(Fate.DROPPED, key, "gradient_clipping says it")
        else:
            draft.move(key, target, "number")
    if draft.get("gradient_clipping") is None and draft.get(old) is None:
        said = "DeepSpeed of late clips at 1.0 where the file is silent, before it did not: not written"
        draft.tell(Fate.CHECK, "gradient_clipping", said, target)


def parallelism(draft: Draft) -> None:
    """ZeRO's stages, as a way to spread over processes."""
    target = "training.data_parallel"
    stage_one = draft.get("zero_optimization")
    if stage_one is False:
        draft.tell(Fate.OFF, "zero_optimization")
        return
    if stage_one is True:
        draft.write(target, "auto")
        draft.tell(Fate.CHECK, "zero_optimization", "an old spelling of stage 1", target)
        return
    if draft.take("zero_optimization", "section") is None:
        return
    stage = draft.take("zero_optimization.stage", "integer") or 0
    ways: dict[int, tuple[Fate, str, str]] = {
        0: (Fate.MAPPED, "replicate", "a copy of the model in each process"),
        1: (
            Fate.CHECK,
            "auto",
            'weights, gradients and moments are sharded together, where they outgrow a GPU ("shard": always)',
        ),
        3: (Fate.CHECK, "shard", "FSDP2; it needs several processes (training.processes, or torchrun)"),
    }
    ways[2] = ways[1]
    if stage not in ways:
        draft.problem("zero_optimization.stage", f"got {stage}, wanted 0, 1, 2 or 3")
        return
    fate, way, reason = ways[stage]
    kind = draft.document.get("optimizer", {}).get("type")
    if kind in COMPRESSED and stage:
        fate, way, reason = Fate.CHECK, "replicate", f"{kind} exchanges momenta of whole weights, as in DeepSpeed"
    draft.write(target, way)
    draft.tell(fate, "zero_optimization.stage", reason, target)
    for part in ("offload_optimizer", "offload_param"):
        key = f"zero_optimization.{part}"
        if draft.take(key, "section") is not None:
            off = draft.take(f"{key}.device", "text") in (None, "none")
            draft.tell(Fate.OFF if off else Fate.DROPPED, key, "" if off else "weights and optimizer stay on the GPU")


def activations(draft: Draft) -> None:
    """DeepSpeed's block only tunes what the model calls; ours switches it on."""
    name = "activation_checkpointing"
    if draft.take(name, "section") is None:
        return
    parts = ("partition_activations", "cpu_checkpointing", "number_checkpoints")
    used = [part for part in parts if draft.get(f"{name}.{part}")]
    if not used:
        draft.tell(Fate.OFF, name)
        return
    draft.write(f"training.{name}", True)
    draft.tell(Fate.CHECK, name, "switched on: each block is computed again in the backward pass", f"training.{name}")


def layer_drop(draft: Draft) -> None:
    """Progressive layer dropping, with DeepSpeed's defaults."""
    name = "progressive_layer_drop"
    if not draft.flag(name):
        return
    draft.write(name, {"enabled": True})
    draft.tell(Fate.MAPPED, f"{name}.enabled", _LAYERS_FOUND, f"{name}.enabled")
    draft.move(f"{name}.theta", f"{name}.theta", "number")
    if draft.move(f"{name}.gamma", f"{name}.gamma", "number") is None:
        draft.write(f"{name}.gamma", 0.001)
        draft.tell(Fate.MAPPED, f"{name}.gamma", "0.001, DeepSpeed's default", f"{name}.gamma")


def flops_profiler(draft: Draft) -> None:
    """The profile of a training step; DeepSpeed leaves it off that does not say ``"enabled": true``."""
    name = "flops_profiler"
    if not trains(draft) or not draft.flag(name):
        return
    draft.move(f"{name}.enabled", f"{name}.enabled", "flag")
    for key in ("profile_step", "module_depth", "top_modules"):
        draft.move(f"{name}.{key}", f"{name}.{key}", "integer")
    draft.move(f"{name}.detailed", f"{name}.detailed", "flag")
    draft.move(f"{name}.output_file", f"{name}.output_file", "text")


def logs(draft: Draft) -> None:
    """What is written while training."""
    if not trains(draft):
        return
    if (draft.take("steps_per_print", "number") or 0) > NEVER:
        draft.tell(Fate.DROPPED, "steps_per_print", "that is never; each step has its line in metrics.jsonl")
    else:
        draft.move("steps_per_print", "training.log_every", "integer")
    if draft.take("compile.enabled", "flag"):
        draft.move("compile.enabled", "training.compile", "flag")
    if draft.flag("tensorboard"):
        draft.write("training.tensorboard", True)
        draft.tell(Fate.MAPPED, "tensorboard", "beside metrics.jsonl in $.training.output", "training.tensorboard")


def inference(draft: Draft) -> None:
    """``deepspeed.init_inference``'s keys, in both spellings."""
    for key in ("replace_with_kernel_inject", "kernel_inject"):
        wanted = draft.take(key, "flag")
        if wanted is not None:
            said = "" if wanted else '"eager" would be plain PyTorch; "auto" takes fused kernels where there is a GPU'
            draft.write("kernels", "auto")
            draft.tell(Fate.MAPPED if wanted else Fate.CHECK, key, said, "kernels")
    for key in ("max_out_tokens", "max_tokens"):
        draft.move(key, "inference.max_tokens", "integer")
    for key in ("tensor_parallel.tp_size", "tensor_parallel.autotp_size", "tp.tp_size", "mp_size"):
        size = draft.take(key, "integer")
        if size is not None:
            several = isinstance(size, int) and size > 1
            said = "a model that is split over several GPUs for inference" if several else ""
            draft.tell(Fate.LATER if several else Fate.OFF, key, said)
    for key in ("tensor_parallel.enabled", "tp.enabled"):
        if draft.take(key, "flag") is not None:
            draft.tell(Fate.OFF, key)
    if trains(draft):
        return
    _files(draft)
    if draft.get("dtype") in ("int8", "torch.int8"):
        draft.tell(Fate.LATER, "dtype", "weights in 8 bits; $.precision is left to slipstream")
    else:
        _dtype(draft, "dtype", "fp16")


def _files(draft: Draft) -> None:
    """Where ``init_inference`` finds weights, which is the model's directory here."""
    for key in ("checkpoint", "base_dir", "checkpoint_config", "ckpt_config"):
        if draft.get(key):
            draft.tell(Fate.CHECK, key, "the directory of Hugging Face's files of this model goes there", "model.path")


def _dtype(draft: Draft, key: str, default: str) -> None:
    given = draft.take(key, "text")
    if given is None:
        draft.write("precision", default)
        draft.tell(Fate.MAPPED, key, f"{default}, DeepSpeed's default", "precision")
    elif given in _DTYPES:
        draft.write("precision", _DTYPES[given])
        draft.tell(Fate.MAPPED, key, "", "precision")
    else:
        draft.problem(key, f"got {shown(given)}, wanted fp16, bf16 or fp32")


def _sections() -> tuple[Callable[[Draft], Any], ...]:
    from engine.import_config.moq import quantize_training
    from engine.import_config.optimizer import optimizer, scheduler

    return (
        batch, precision, clipping, optimizer, scheduler, parallelism, activations, layer_drop, quantize_training,
        flops_profiler, logs, inference,
    )  # fmt: skip


SECTIONS = _sections()
