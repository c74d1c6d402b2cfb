"""Weights of 8 and 4 bits: what the config's section becomes for one model, and saving a model quantized."""

from __future__ import annotations

import fnmatch
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from config_schema.quantization import Quantization
from engine.checkpoint.quantized import BLOCK, SCALES, QuantizedFile, Stored
from engine.checkpoint.save import save_safetensors
from engine.errors import EngineError
from ops.eager.cpu_quantized import fast_bf16
from ops.quantization import Scheme
from ops.spec import ModelSpec
from ops.weights import WeightSource, quantized_weight

if TYPE_CHECKING:
    from engine.build import Plan

BITS: Mapping[str, int] = {"int8": 8, "int4": 4}
#: Columns of a group of 4 bits: 0.133 of the bytes of fp32, scales included; larger groups lose accuracy.
INT4_GROUP = 64
#: Modules that kernels read as one matrix; they are quantized together or not at all.
FUSED = (("q", "k", "v"), ("gate", "up"))
#: What is copied beside quantized weights: how the model's texts are made into ids, and how it is used.
BESIDE = (
    "generation_config.json",
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "spiece.model",
    "sentencepiece*",
    "modules.json",
    "1_Pooling/config.json",
)


class Choose(Protocol):
    """Notes what an ``"auto"`` becomes, and why; gives the value."""

    def __call__(self, path: str, value: Any, reason: str) -> Any: ...


def compute_dtype(section: Quantization, device: torch.device, stored: torch.dtype, choose: Choose) -> str:
    """What activations are in. ``stored``: the checkpoint's dtype."""
    path = "$.quantization.compute"
    if section.compute != "auto":
        return section.compute
    if device.type != "cpu":
        return str(choose(path, *floats_of_gpu(device, stored)))
    if fast_bf16():
        return str(choose(path, "bf16", "this CPU's products of bf16 with 8 and 4 bits are faster than those of fp32"))
    return str(choose(path, "fp32", "this CPU has no fast bf16"))


def floats_of_gpu(device: torch.device, stored: torch.dtype) -> tuple[str, str]:
    """The dtype of activations on a GPU, and why."""
    for name in ("bf16", "fp16"):
        if SCALES[name] == stored:
            return name, "the checkpoint is stored so"
    if torch.cuda.get_device_capability(device) >= (8, 0):
        return "bf16", "half the bytes of fp32, with its range"
    return "fp16", "this GPU has no bf16 arithmetic"


def decide(
    section: Quantization, precision: str, compute: str, spec: ModelSpec, source: WeightSource, choose: Choose
) -> Scheme:
    """The scheme of one model. Raises :class:`EngineError` for names that match nothing or part of a fused matrix, and
    for a quantized checkpoint that does not fit the section."""
    bits, modules = BITS[precision], selected(section, spec)
    if isinstance(source, QuantizedFile):
        return _stored(section, bits, modules, source, choose)
    size = section.group_size
    if size == "auto":
        row = bits == 8
        reason = (
            "one scale a row is exact enough for 8 bits" if row else f"{bits} bits need finer scales than one a row"
        )
        size = choose("$.quantization.group_size", None if row else INT4_GROUP, reason)
    scales = section.scale_dtype
    if scales == "auto":
        scales = choose("$.quantization.scale_dtype", "bf16" if compute == "bf16" else "fp16", f"beside {compute}")
    symmetric = section.symmetric
    if symmetric == "auto":
        symmetric = choose("$.quantization.symmetric", True, "weights lie about zero")
    return Scheme(bits, size, symmetric, SCALES[scales], modules)


def _stored(section: Quantization, bits: int, modules: frozenset[str], source: QuantizedFile, choose: Choose) -> Scheme:
    stored, where = source.stored, source.locate("").removesuffix(": ")
    asked = {"group_size": section.group_size, "symmetric": section.symmetric, "scale_dtype": section.scale_dtype}
    for name, value in asked.items():
        held = getattr(stored, name)
        if value == "auto":
            choose(f"$.quantization.{name}", held, "the checkpoint is stored so")
        elif value != held:
            raise EngineError(
                f"$.quantization.{name}: {value!r}, but {where} is quantized with {held!r}: "
                'set this to "auto", or quantize the model anew'
            )
    if bits != stored.bits:
        raise EngineError(
            f'$.precision: "int{bits}", but {where} holds weights of {stored.bits} bits: '
            f'set this to "int{stored.bits}" or "auto"'
        )
    if (section.exclude or not section.embedding or not section.head) and modules != source.modules:
        odd = sorted(modules ^ source.modules)[0]
        raise EngineError(
            f"$.quantization: leaves out other layers than {where} does ({odd}): remove exclude, embedding and head"
        )
    return Scheme(stored.bits, stored.group_size, stored.symmetric, SCALES[stored.scale_dtype], source.modules)


def selected(section: Quantization, spec: ModelSpec) -> frozenset[str]:
    """Canonical names of the modules that ``section`` quantizes."""
    weights = [name.removesuffix(".weight") for name, shape in spec.weight_shapes().items() if len(shape) == 2]
    found = {name for name in weights if name not in ("embed.position", "embed.token_type")}
    for pattern in section.exclude:
        matched = set(fnmatch.filter(found, pattern))
        if not matched:
            near = "layers.0.q" if "layers.0.q" in found else sorted(found)[0]
            raise EngineError(
                f'$.quantization.exclude: "{pattern}" matches no linear layer of this model: names are like "{near}"'
            )
        found -= matched
    for names in FUSED:
        for layer in range(spec.layers):
            group = {f"layers.{layer}.{name}" for name in names} & set(weights)
            if group & found and not group <= found:
                fused = ", ".join(sorted(group))
                raise EngineError(f"$.quantization.exclude: {fused} are one matrix here: exclude all of them or none")
    if not section.embedding:
        found -= {"embed.token", "embed.project"}
    return frozenset(name for name in found if section.head or not name.startswith("head."))


def save(plan: Plan, directory: str | os.PathLike[str], tokenizer: Any = None) -> Path:
    """Writes the model of ``plan``, quantized as its scheme says, and what it needs beside the weights, to
    ``directory``. The weights come one after the other: the model is never whole in floats."""
    scheme, target = plan.scheme, Path(directory)
    if scheme is None:
        raise EngineError('save_quantized: $.precision is not "int8" or "int4": set it to one of these')
    if plan.directory is not None and target.exists() and target.samefile(plan.directory):
        raise EngineError(f"{target}: holds the model that is read: give another directory")
    target.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(target))
    elif plan.directory is not None:
        _copy_beside(plan.directory, target)
    tensors: dict[str, Tensor] = {}
    metadata = {"format": "pt"}
    for name in plan.spec.weight_shapes():
        module = name.removesuffix(".weight")
        if name != module and module in scheme.modules:
            weight = quantized_weight(plan.source, scheme, module, torch.device("cpu"))
            tensors |= weight.to_tensors(name)
            metadata |= weight.to_metadata(name)
        else:
            tensors[name] = plan.source.read(name)
    save_safetensors(tensors, target / "model.safetensors", metadata)
    config = {**plan.hf_config, BLOCK: Stored.of(scheme).to_json()}
    (target / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target


def summary(plan: Plan, directory: str | os.PathLike[str]) -> str:
    """How much :func:`save` wrote, beside the model's size in fp32."""
    size, whole = (Path(directory) / "model.safetensors").stat().st_size, 4 * plan.spec.parameters()
    assert plan.scheme is not None, "save() refuses others"
    return f"weights of {plan.scheme.bits} bits: {size / 1e6:,.1f} MB, {size / whole:.3f} of fp32"


def _copy_beside(source: Path, target: Path) -> None:
    for pattern in BESIDE:
        for file in source.glob(pattern):
            to = target / file.relative_to(source)
            to.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, to)
