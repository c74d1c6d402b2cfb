"""What slipstream finds on this machine, and what each missing piece costs (``slipstream env``)."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

import engine
from ops.machine import cpu_model

GIB = 2**30
WIDTH = 80


@dataclass(frozen=True)
class Piece:
    """A package: the distributions that provide it (wheels of one go by several names), and what is lost without it."""

    name: str
    distributions: tuple[str, ...]
    costs: str


PIECES = (
    Piece("transformers", ("transformers",), "no tokenizer can be loaded: models run on token ids alone"),
    Piece("safetensors", ("safetensors",), "no safetensors checkpoint can be read"),
    Piece("huggingface_hub", ("huggingface_hub",), "checkpoints are not fetched by name: give local directories"),
    Piece("pydantic", ("pydantic",), "no configuration can be read"),
    Piece("jsonschema", ("jsonschema",), "no configuration can be read"),
    Piece("tabulate", ("tabulate",), "`slipstream run` prints no tables"),
    Piece("gguf", ("gguf",), "GGUF checkpoints cannot be read: pip install 'slipstream-runtime[gguf]'"),
    Piece(
        "triton",
        ("triton", "pytorch-triton", "triton-windows"),
        "the kernel sets generic and specialized need it (pip install triton), eager does not",
    ),
    Piece(
        "cupy",
        ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "the kernel set specialized needs it to decode, and for short texts of encoders (pip install cupy-cuda13x, or "
        "cupy-cuda12x); generic and eager do not",
    ),
    Piece(
        "matplotlib",
        ("matplotlib",),
        "`slipstream bench` draws no charts: pip install 'slipstream-runtime[report]'",
    ),
    Piece("pyarrow", ("pyarrow",), "training data in Parquet cannot be read: pip install 'slipstream-runtime[data]'"),
    Piece("nvidia-ml-py", ("nvidia-ml-py",), "driver version and free memory of the GPUs are not shown"),
)


def gather() -> dict[str, Any]:
    """Everything as a JSON document; ``null`` is a package that is not installed."""
    return {
        "slipstream": engine.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu(),
        "torch": _torch(),
        "gpus": _gpus(),
        "nvml": _nvml(),
        "packages": {piece.name: _version(piece.distributions) for piece in PIECES},
        "missing": {piece.name: piece.costs for piece in PIECES if _version(piece.distributions) is None},
        "auto": _auto(),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """The report for a terminal of 80 columns."""
    cpu, torch, nvml = found["cpu"], found["torch"], found["nvml"]
    rows = [
        ("slipstream", found["slipstream"]),
        ("Python", f"{found['python']}, {found['platform']}"),
        ("CPU", f"{cpu['model']}, {cpu['cores']} cores, of which {cpu['usable']} may be used"),
        ("memory", f"{cpu['memory_bytes'] / GIB:.1f} GiB, {cpu['free_bytes'] / GIB:.1f} GiB free"),
        ("torch", f"{torch['version']}, {torch['build']}, {torch['threads']} threads"),
        *[(f"GPU {at}", _gpu_line(gpu)) for at, gpu in enumerate(found["gpus"])],
    ]
    if not found["gpus"]:
        rows.append(("GPU", f"none that torch can use: {torch['no_gpu']}"))
    rows.append(("NVML", f"driver {nvml['driver']}" if nvml["driver"] else f"not available: {nvml['reason']}"))
    for name, version in found["packages"].items():
        rows.append((name, version or f"not installed: {found['missing'][name]}"))
    lines = _wrapped(rows)
    lines += ["", 'What "auto" becomes here, for a GPT-2 stored in fp32:']
    lines += _wrapped([(choice["path"], f"{choice['value']}: {choice['reason']}") for choice in found["auto"]])
    return "\n".join(lines)


def _wrapped(rows: Sequence[tuple[str, str]]) -> list[str]:
    """Names in one column, what is said of them in another, wrapped."""
    indent = 2 + max(len(name) for name, _ in rows)
    lines = []
    for name, text in rows:
        first, *rest = textwrap.wrap(text, WIDTH - indent, break_on_hyphens=False)
        lines += [name.ljust(indent) + first, *[" " * indent + line for line in rest]]
    return lines


def _gpu_line(gpu: Mapping[str, Any]) -> str:
    free = "" if gpu["free_bytes"] is None else f", {gpu['free_bytes'] / GIB:.1f} GiB free"
    return (
        f"{gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_bytes'] / GIB:.1f} GiB{free}, "
        f"{gpu['multiprocessors']} multiprocessors"
    )


def _version(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def cpu() -> dict[str, Any]:
    """The CPU's name and cores, and the memory beside it."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    page = os.sysconf("SC_PAGE_SIZE")
    return {
        "model": cpu_model(),
        "cores": os.cpu_count(),
        "usable": usable,
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * page,
        "free_bytes": os.sysconf("SC_AVPHYS_PAGES") * page,
    }


def _torch() -> dict[str, Any]:
    import torch

    kind = "CPU build"
    if torch.version.cuda is not None:
        kind = f"CUDA {torch.version.cuda} build"
    elif torch.version.hip is not None:
        kind = f"ROCm {torch.version.hip} build"
    no_gpu = "this build of torch is for CPUs" if kind == "CPU build" else "the driver shows none"
    return {"version": torch.__version__, "build": kind, "threads": torch.get_num_threads(), "no_gpu": no_gpu}


def _gpus() -> list[dict[str, Any]]:
    import torch

    if not torch.cuda.is_available():
        return []
    return [_gpu(torch, index) for index in range(torch.cuda.device_count())]


def _gpu(torch: Any, index: int) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(index)
    try:
        free = int(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:  # a GPU in exclusive mode that another process holds is still worth reporting
        free = None
    return {
        "name": facts.name,
        "capability": f"{facts.major}.{facts.minor}",
        "memory_bytes": facts.total_memory,
        "free_bytes": free,
        "multiprocessors": facts.multi_processor_count,
    }


def _nvml() -> dict[str, str | None]:
    try:
        import pynvml
    except ImportError:
        return {"driver": None, "reason": "nvidia-ml-py is not installed"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return {"driver": None, "reason": f"{error} (normal on a machine without an NVIDIA GPU)"}
    try:
        driver = pynvml.nvmlSystemGetDriverVersion()
        return {"driver": driver.decode() if isinstance(driver, bytes) else str(driver), "reason": None}
    except pynvml.NVMLError as error:
        return {"driver": None, "reason": str(error)}
    finally:
        pynvml.nvmlShutdown()


def _auto() -> list[dict[str, Any]]:
    from engine import build

    return [asdict(choice) for choice in build.preview()]
