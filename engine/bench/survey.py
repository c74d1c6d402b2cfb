"""What is to be measured: models opened, their work counted, the device's own rates measured. Runs in a worker.

The parent asks with one :class:`Request` a model, and never touches a GPU itself.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from config_schema import Config, SlipstreamError, load_config
from engine import build, env_report
from engine.bench import floors, hugging_face
from engine.bench.job import Case, Request, Subject
from engine.errors import EngineError
from engine.families import spec_from_hf
from engine.verify import AUTO_CLASSES
from ops.spec import ModelSpec, Task

#: Lengths of an encoder's sequences where none are asked for.
ENCODER_TOKENS = (128, 384)
#: The budget of tokens is rounded up to this, as a user's would be.
ROUND = 64
#: A directory that holds one of these holds weights, whole or not.
WEIGHT_FILES = ("*.safetensors*", "*.bin*", "*.gguf", "*.pth", "*.h5", "*.msgpack")


@dataclass(frozen=True)
class Found:
    """One surveyed model: what the runs share, the cases, and the work of each."""

    subject: Subject
    cases: tuple[Case, ...]
    works: tuple[floors.Work, ...]
    weight_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON document."""
        return asdict(self)


def survey(asked: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The answer to several requests: ``models`` (each found, or an ``error`` in one line), the ``rates`` of each
    device and precision among them, the device in words and its memory in bytes."""
    models: list[dict[str, Any]] = []
    rates: dict[str, dict[str, float]] = {}
    device = torch.device("cpu")
    for document in asked:
        try:
            found = _survey(Request.from_json(document))
        except SlipstreamError as error:
            models.append({"error": str(error)})
            continue
        models.append(found.to_json())
        subject = found.subject
        device = torch.device(subject.device)
        if subject.precision not in rates:
            rates[subject.precision] = asdict(floors.rates(device, hugging_face.DTYPES[subject.precision]))
    return {"models": models, "rates": rates, "device": _device_name(device), "memory": _memory(device)}


def _survey(request: Request) -> Found:
    # "eager" runs everything: whether a faster set can is for its own run to find out.
    config = load_config({**request.config, "kernels": "eager"})
    random = request.random or _without_weights(config)
    if random:
        directory = Path(config.model.path).expanduser()
        task = _task(directory, config)
        shape = hugging_face.random_model(AUTO_CLASSES[task], str(directory), torch.device("meta"), None)
        plan = build.plan(config, model=shape)
    else:
        plan = build.plan(config)
        assert plan.directory is not None
        directory = plan.directory
        task = plan.spec.head.task if plan.spec.head is not None else "embedding"
    if plan.scheme is not None:
        raise EngineError('$.precision: bench compares floating weights: set it to "bf16", "fp16" or "fp32"')
    cases = _cases(request, plan.spec)
    precision = next(name for name, dtype in build.DTYPES.items() if dtype == plan.dtype)
    subject = Subject(
        name=request.name or directory.resolve().name,
        config=_document(request.config, cases, plan, precision),
        random=random,
        directory=str(directory),
        gguf_file=plan.gguf_file,
        hf_class=AUTO_CLASSES[task],
        vocab=plan.spec.vocab_size,
        device=str(plan.device),
        precision=precision,
    )
    works = tuple(floors.work(plan.spec, case, plan.dtype.itemsize) for case in cases)
    return Found(subject, cases, works, plan.spec.parameters() * plan.dtype.itemsize)


def _without_weights(config: Config) -> bool:
    directory = Path(config.model.path).expanduser()
    if config.model.gguf_file is not None or not (directory / "config.json").is_file():
        return False
    return not any(True for pattern in WEIGHT_FILES for _ in directory.glob(pattern))


def _task(directory: Path, config: Config) -> Task:
    """The task of a config.json without weights; raises for a directory that has none."""
    path = directory / "config.json"
    if not path.is_file():
        raise EngineError(f"{path}: no such file: random weights need the config.json of a local directory")
    try:
        values = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise EngineError(f"{path}: not JSON ({error})") from error
    asked: Task | None = None if config.model.task == "auto" else config.model.task
    _, spec = spec_from_hf(values, asked, str(path))
    return spec.head.task if spec.head is not None else "embedding"


def _cases(request: Request, spec: ModelSpec) -> tuple[Case, ...]:
    limit = spec.max_positions
    if spec.head is not None and spec.head.task == "causal_lm":
        new = 1 if request.first else request.new
        cases = tuple(Case(batch, request.prompt, new, request.first) for batch in request.batches)
        need = cases[0].room
        if need > limit and request.first:
            raise EngineError(
                f"--prompt {request.prompt} takes {need} tokens with the first new one, "
                f"but this model ends at {limit}: lower it"
            )
        if need > limit:
            raise EngineError(
                f"--prompt {request.prompt} and --new {request.new} take {need} tokens with the one that is not timed, "
                f"but this model ends at {limit}: lower one of the two"
            )
        return cases
    if request.first:
        raise EngineError("--first-token needs a causal LM, this model is an encoder: leave it out")
    lengths = request.tokens
    if not lengths:
        lengths = tuple(tokens for tokens in ENCODER_TOKENS if tokens <= limit) or (limit,)
    if max(lengths) > limit:
        raise EngineError(f"--tokens {max(lengths)}, but this model ends at {limit}: lower it")
    return tuple(Case(batch, tokens) for tokens in lengths for batch in request.batches)


def _document(given: Mapping[str, Any], cases: Sequence[Case], plan: build.Plan, precision: str) -> dict[str, Any]:
    """The configuration that the runs get: device and precision decided, budgets that hold every case, no sampling."""
    document = {name: section for name, section in given.items() if name not in ("job", "generation")}
    inference = dict(document.get("inference", {}))
    inference["max_batch"] = max(case.batch for case in cases)
    need = max(case.room for case in cases)
    own = inference.get("max_tokens", "auto")
    if own == "auto" or own < need:
        inference["max_tokens"] = min(-(-need // ROUND) * ROUND, plan.spec.max_positions)
    return {**document, "inference": inference, "device": str(plan.device), "precision": precision}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = env_report.cpu()
    threads = torch.get_num_threads()
    return f"{cpu['model'] or platform.machine()}, {threads} thread{'s' if threads > 1 else ''}"


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(env_report.cpu()["free_bytes"])
