"""CUDA C++ kernels on a CPU: compiled with g++ against a header that emulates the GPU's instructions."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

FOLDER = Path(__file__).parent
SHARED_MEMORY = "extern __shared__ __align__(1024) char memory[];"


def compiler() -> str | None:
    """g++, or another C++ compiler that takes its options."""
    return shutil.which("g++") or shutil.which("clang++")


def load(defines: dict[str, str], sources: list[str], main: str, folder: Path) -> ctypes.CDLL:
    """The library of a kernel's sources, macros in front, with ``main`` of this folder behind them."""
    macros = "".join(f"#define {name} {value}\n" for name, value in defines.items())
    text = "\n".join(sources).replace(SHARED_MEMORY, "")
    text = re.sub(r"^#pragma unroll.*$", "", text, flags=re.M)
    text = f'{macros}#include "{FOLDER / "emulated.h"}"\n{text}\n#include "{FOLDER / main}"\n'
    source, library = folder / "kernel.cpp", folder / "kernel.so"
    source.write_text(text, encoding="utf-8")
    command = [str(compiler()), "-std=c++17", "-O1", "-shared", "-fPIC", "-w", str(source), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[:3000]
    return ctypes.CDLL(str(library))
