"""NVRTC, the run-time compiler of CUDA C++, called without a GPU: what the kernels are checked with on any machine."""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path


def library() -> ctypes.CDLL:
    """The NVRTC that the wheel ``nvidia-cuda-nvrtc-cu12`` brings."""
    found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    assert found is not None, "pip install nvidia-cuda-nvrtc-cu12 (the extra `test` has it)"
    folder = Path(next(iter(found.submodule_search_locations or []))) / "lib"
    (path,) = folder.glob("libnvrtc.so.*[0-9]")
    return ctypes.CDLL(str(path))


def compile_log(source: str, architecture: str) -> str | None:
    """None if ``source`` compiles to machine code for ``architecture`` (such as ``sm_90``), else the compiler's log."""
    nvrtc = library()
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None) == 0
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return log.value.decode(errors="replace") if failed else None
