"""The connector: the only place that turns a Config into objects, and that resolves every ``"auto"``, saying why."""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from tqdm import tqdm

from config_schema import Config, load_config
from config_schema.quantization import Quantization
from engine import quantization
from engine.checkpoint import Checkpoint, StateDictSource, open_checkpoint
from engine.checkpoint.quantized import QuantizedFile
from engine.errors import EngineError
from engine.families import Family, spec_from_hf
from engine.families.source import CanonicalSource
from engine.inference.encoder import Pooling, pooling_of
from engine.inference.runner import Runner
from ops.collective import SingleProcess
from ops.errors import KernelError
from ops.plan import KernelSet
from ops.quantization import Scheme
from ops.spec import ModelSpec, Task
from ops.weights import WeightSource

log = logging.getLogger("slipstream.build")

DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

#: Kernel sets by name: module and class, imported when chosen. The fastest stands last.
KERNEL_SETS: Mapping[str, tuple[str, str]] = {
    "eager": ("ops.eager.kernel_set", "EagerKernels"),
    "generic": ("ops.generic.kernel_set", "GenericKernels"),
    "specialized": ("ops.specialized.kernel_set", "SpecializedKernels"),
}
#: Sets of GPU kernels. On a CPU they run, if at all, in Triton's interpreter, for tests: "auto" never means that.
GPU_SETS = frozenset({"generic", "specialized"})

#: The share of the free memory that the KV cache may claim where inference.max_tokens is "auto".
CACHE_SHARE = 0.5
MAX_BATCH = 16
PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class Choice:
    """What an ``"auto"`` became, and why. ``path`` is the JSON path."""

    path: str
    value: Any
    reason: str


@dataclass(frozen=True)
class Plan:
    """Everything decided before a single weight is read."""

    config: Config
    choices: tuple[Choice, ...]
    directory: Path | None
    gguf_file: str | None
    generation_config: Mapping[str, Any]
    source: WeightSource
    family: Family
    spec: ModelSpec
    device: torch.device
    dtype: torch.dtype
    scheme: Scheme | None
    hf_config: Mapping[str, Any]
    kernels: str
    max_tokens: int
    max_batch: int
    prefill_chunk: int
    pooling: Pooling
    normalize: bool

    def explain(self) -> dict[str, Any]:
        """The config with every ``"auto"`` resolved, as a JSON document."""
        return resolved(self.config, self.choices)


def resolved(config: Config, choices: Sequence[Choice]) -> dict[str, Any]:
    """The config with the values of ``choices``, as a JSON document."""
    document = config.to_dict()
    for choice in choices:
        *parents, leaf = choice.path.removeprefix("$.").split(".")
        section: Any = document
        for parent in parents:
            section = section[parent]
        section[leaf] = choice.value
    return document


def reasons(choices: Sequence[Choice]) -> str:
    """One line a choice: path, value, reason."""
    return "\n".join(f'{choice.path}: "auto" is {json.dumps(choice.value)}: {choice.reason}' for choice in choices)


class Resolver:
    """Collects the choices; an explicit value passes through untouched."""

    def __init__(self) -> None:
        self.choices: list[Choice] = []

    def choose(self, path: str, value: Any, reason: str) -> Any:
        """Notes what the ``"auto"`` at ``path`` becomes, and why; gives ``value``."""
        self.choices.append(Choice(path, value, reason))
        log.info('%s: "auto" is %s: %s', path, value, reason)
        return value


def plan(config: Config, *, model: Any = None) -> Plan:
    """Opens the checkpoint (or takes the live ``model``), reads its facts and resolves every ``"auto"``."""
    resolver = Resolver()
    checkpoint = _live(model) if model is not None else _stored(config)
    family, spec = _facts(config, checkpoint, resolver)
    source: WeightSource
    if isinstance(checkpoint.source, QuantizedFile):
        source, spec = checkpoint.source, checkpoint.source.checked(spec)
    else:
        source = CanonicalSource(checkpoint.source, family, spec, checkpoint.name)
        spec = source.spec
    device = device_of(config, resolver)
    config, precision, scheme = _weights(config, spec, device, source, resolver)
    kernels = _kernels(config, spec, device, DTYPES[precision], resolver, scheme)
    batch = config.inference.max_batch
    if batch == "auto":
        batch = resolver.choose(
            "$.inference.max_batch", MAX_BATCH, "a batch that any machine serves; more wait their turn"
        )
    chunk = config.inference.prefill_chunk
    if chunk == "auto":
        chunk = resolver.choose("$.inference.prefill_chunk", PREFILL_CHUNK, "bounds the activations of a long prompt")
    max_tokens = _max_tokens(config, spec, device, DTYPES[precision], batch, resolver)
    pooling, normalize = _pooling(config, spec, checkpoint.directory, resolver)
    return Plan(
        config=config,
        choices=tuple(resolver.choices),
        directory=checkpoint.directory,
        gguf_file=checkpoint.gguf_file,
        generation_config=checkpoint.generation_config,
        source=source,
        family=family,
        spec=spec,
        device=device,
        dtype=DTYPES[precision],
        scheme=scheme,
        hf_config=checkpoint.config,
        kernels=kernels,
        max_tokens=max_tokens,
        max_batch=batch,
        prefill_chunk=chunk,
        pooling=pooling,
        normalize=normalize,
    )


def preview() -> tuple[Choice, ...]:
    """What device, precision and kernels become on this machine where they are ``"auto"``, for GPT-2 stored in fp32."""
    resolver = Resolver()
    config = load_config({"model": {"path": "gpt2"}})
    _, spec = spec_from_hf({"model_type": "gpt2"}, "causal_lm", "preview")
    device = device_of(config, resolver)
    precision = _precision(config, device, torch.float32, resolver)
    _kernels(config, spec, device, DTYPES[precision], resolver)
    return tuple(resolver.choices)


def runner(plan: Plan) -> Runner:
    """Reads and packs the weights; a progress bar shows on a terminal where that takes more than a second."""
    kernels = kernel_set(plan.kernels)
    with tqdm(total=plan.spec.layers, desc="loading", unit="layer", disable=None, delay=1, leave=False) as bar:
        weights = kernels.pack(plan.spec, plan.source, plan.device, plan.dtype, bar.update, plan.scheme)
    return Runner(plan.spec, weights, kernels, plan.device, SingleProcess())


def kernel_set(name: str) -> KernelSet:
    """The kernel set of that name. Raises :class:`KernelError` where a package that it is written in is missing."""
    module, cls = KERNEL_SETS[name]
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "triton":
            raise
        remedy = 'pip install triton, or set "kernels" to "eager"'
        raise KernelError(f'kernels "{name}" need triton, which is not installed: {remedy}') from None
    return cast(KernelSet, getattr(found, cls)())


@dataclass(frozen=True)
class _Opened:
    """A checkpoint or a live model, seen alike. ``name`` and ``where`` (of its config) are for messages."""

    directory: Path | None
    gguf_file: str | None
    config: Mapping[str, Any]
    name: str
    where: str
    generation_config: Mapping[str, Any]
    source: WeightSource


def _stored(config: Config) -> _Opened:
    found: Checkpoint = open_checkpoint(
        config.model.path, revision=config.model.revision, gguf_file=config.model.gguf_file
    )
    where = str(found.directory / (found.gguf_file or "config.json"))
    name = str(found.directory)
    return _Opened(found.directory, found.gguf_file, found.config, name, where, found.generation_config, found.source)


def _live(model: Any) -> _Opened:
    config = getattr(model, "config", None)
    if not isinstance(model, torch.nn.Module) or config is None or not hasattr(config, "to_dict"):
        raise EngineError(f"model=: wanted a Hugging Face model, got {type(model).__name__}")
    values = dict(config.to_dict())
    values["architectures"] = [type(model).__name__]
    generation: Any = getattr(model, "generation_config", None)
    name = Path(getattr(config, "_name_or_path", "") or "")
    directory = name if name.parts and name.is_dir() else None
    return _Opened(
        directory,
        None,
        values,
        type(model).__name__,
        f"{type(model).__name__}.config",
        generation.to_dict() if generation is not None else {},
        StateDictSource(model),
    )


def _facts(config: Config, checkpoint: _Opened, resolver: Resolver) -> tuple[Family, ModelSpec]:
    asked: Task | None = None if config.model.task == "auto" else config.model.task
    family, spec = spec_from_hf(checkpoint.config, asked, checkpoint.where)
    if asked is None:
        task = spec.head.task if spec.head is not None else "embedding"
        resolver.choose("$.model.task", task, f"{checkpoint.where} says so")
    return family, spec


def device_of(config: Config, resolver: Resolver) -> torch.device:
    """Where the model runs. Raises :class:`EngineError` for a GPU that is not there."""
    wanted = config.device
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device(resolver.choose("$.device", "cuda", f"{torch.cuda.get_device_name()} is here"))
        return torch.device(resolver.choose("$.device", "cpu", "no CUDA GPU is visible"))
    device = torch.device(wanted)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if count == 0:
            build = "a CPU build" if torch.version.cuda is None else f"a CUDA {torch.version.cuda} build"
            raise EngineError(
                f'$.device: "{wanted}", but no CUDA GPU is visible (torch {torch.__version__} is {build}): '
                'set "device" to "cpu" or "auto"'
            )
        if device.index is not None and device.index >= count:
            raise EngineError(f'$.device: "{wanted}", but the GPUs here are cuda:0 to cuda:{count - 1}')
    return device


def _weights(
    config: Config, spec: ModelSpec, device: torch.device, source: WeightSource, resolver: Resolver
) -> tuple[Config, str, Scheme | None]:
    """What activations are in, and how weights are quantized; the config with a section for it."""
    stored = source.dtype("embed.token.weight")
    held = f"int{source.stored.bits}" if isinstance(source, QuantizedFile) else None
    precision = config.precision
    if held is not None and precision == "auto":
        precision = resolver.choose("$.precision", held, "the checkpoint is stored so")
    if held is not None and precision not in quantization.BITS:
        raise EngineError(
            f'$.precision: "{precision}", but the checkpoint is quantized: set this to "{held}" or "auto"'
        )
    if precision not in quantization.BITS:
        if config.quantization is not None:
            raise EngineError('$.quantization: has no effect on this checkpoint: set $.precision to "int8" or "int4"')
        return config, _precision(config, device, stored, resolver), None
    section = config.quantization or Quantization()
    compute = quantization.compute_dtype(section, device, stored, resolver.choose)
    scheme = quantization.decide(section, precision, compute, spec, source, resolver.choose)
    return config.model_copy(update={"quantization": section}), compute, scheme


def _precision(config: Config, device: torch.device, stored: torch.dtype, resolver: Resolver) -> str:
    if config.precision != "auto":
        return config.precision
    path = "$.precision"
    if device.type == "cpu":
        return str(
            resolver.choose(
                path, "fp32", "the most exact on a CPU, and its kernels read exact fp16 copies where they can"
            )
        )
    name, reason = quantization.floats_of_gpu(device, stored)
    return str(resolver.choose(path, name, reason))


def _kernels(
    config: Config,
    spec: ModelSpec,
    device: torch.device,
    dtype: torch.dtype,
    resolver: Resolver,
    scheme: Scheme | None = None,
) -> str:
    if config.kernels != "auto":
        kernel_set(config.kernels).assert_supports(spec, device, dtype, scheme)
        return config.kernels
    refusals = []
    for name in reversed(list(KERNEL_SETS)):
        try:
            if name in GPU_SETS and device.type != "cuda":
                raise KernelError(f"it needs a CUDA GPU, the device is {device.type}")
            kernel_set(name).assert_supports(spec, device, dtype, scheme)
        except KernelError as error:
            refusals.append(f"{name}: {error}")
            continue
        reason = (
            "; ".join(["the fastest set that runs here", *refusals])
            if len(KERNEL_SETS) > 1
            else "the only set there is"
        )
        return str(resolver.choose("$.kernels", name, reason))
    raise KernelError("no kernel set runs this model here: " + "; ".join(refusals))


def _max_tokens(
    config: Config, spec: ModelSpec, device: torch.device, dtype: torch.dtype, batch: int, resolver: Resolver
) -> int:
    wanted = config.inference.max_tokens
    if wanted != "auto":
        if wanted > spec.max_positions:
            raise EngineError(
                f"$.inference.max_tokens: {wanted}, but this model's positions end at {spec.max_positions}: lower it"
            )
        return wanted
    per_token = 2 * spec.layers * spec.kv_size * dtype.itemsize
    room = int(_free_bytes(device) * CACHE_SHARE) // (per_token * batch)
    if not spec.causal or room >= spec.max_positions:
        return int(resolver.choose("$.inference.max_tokens", spec.max_positions, "all of the model's positions"))
    if room < 1:
        raise EngineError(
            f"$.inference.max_tokens: not one token a sequence fits the free memory of {device} at a batch of {batch}: "
            "lower inference.max_batch"
        )
    reason = f"{batch} sequences of it take {CACHE_SHARE:.0%} of the free memory ({per_token / 1024:.0f} KiB a token)"
    return int(resolver.choose("$.inference.max_tokens", room, reason))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _pooling(config: Config, spec: ModelSpec, directory: Path | None, resolver: Resolver) -> tuple[Pooling, bool]:
    wanted, normalize = config.embedding.pooling, config.embedding.normalize
    if spec.causal or (wanted != "auto" and normalize != "auto"):
        return "mean" if wanted == "auto" else wanted, normalize is True
    own_pooling: Literal["mean", "cls"]
    own_pooling, own_normalize, reason = (
        pooling_of(directory) if wanted == "auto" else (wanted, True, "usual for embeddings")
    )
    if wanted == "auto":
        resolver.choose("$.embedding.pooling", own_pooling, reason)
    if normalize == "auto":
        normalize = bool(resolver.choose("$.embedding.normalize", own_normalize, reason))
    return own_pooling, normalize


def explain(plan: Plan) -> str:
    """The resolved config as JSON, then one line a choice: path, value, reason."""
    said = reasons(plan.choices)
    return json.dumps(plan.explain(), indent=2, ensure_ascii=False) + (f"\n\n{said}" if said else "")
