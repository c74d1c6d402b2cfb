"""Packaging. VERSION is said here alone; at run time it is ``importlib.metadata.version("slipstream-runtime")``."""

from pathlib import Path

from setuptools import find_packages, setup

VERSION = "0.1.0"

PACKAGES = ("engine", "profiler", "ops", "config_schema", "sample_configs")

# The bounds are what the suite is run on; `torch==2.13.0`, which the Makefile installs first, satisfies them.
INSTALL_REQUIRES = [
    "torch>=2.11,<2.14",
    "numpy>=1.26",
    "transformers>=4.51",
    "safetensors>=0.4.3",
    "huggingface_hub>=0.30",
    "pydantic>=2.12,<3",
    "jsonschema>=4.20",
    "tabulate>=0.9",
    "nvidia-ml-py>=12.560",
    "tqdm>=4.66",
    "triton>=3.6; sys_platform == 'linux'",  # CUDA builds of torch bring their own; its CPU builds bring none
    "wcwidth>=0.2",  # tabulate pads wide characters right only with it
]

GGUF = ["gguf>=0.10", "accelerate>=1.0"]
REPORT = [
    "matplotlib>=3.8",  # charts of `slipstream bench`
    "plotly>=6.5",  # figures of the profiler's page
    "jinja2>=3.1",
]
DATA = ["pyarrow>=17"]  # training data in Parquet files

TEST = [
    *GGUF,
    *REPORT,
    *DATA,
    "pytest>=8.2",
    "pytest-xdist>=3.6",
    "pytest-timeout>=2.3",
    "pytest-cov>=6.0",
    "hypothesis>=6.100",
    "import-linter>=2.3",
    "psutil>=5.9",
    "selenium>=4.20",  # drives Chromium over the profiler's page
    "setuptools>=77",
    "triton==3.6.*; sys_platform == 'linux'",
    "nvidia-cuda-nvrtc-cu12>=12.4; sys_platform == 'linux'",  # compiles the CUDA C++ kernels without a GPU
    "numpy<2.4",  # Triton's interpreter, with which kernels are tested without a GPU, does not know numpy 2.4
]

# Linters are pinned: a new release of one must not turn an unchanged tree red.
DEV = [
    *TEST,
    "ruff==0.17.6",
    "mypy==2.4.1",
    "types-jsonschema",
    "types-psutil",
    "types-tabulate",
    "types-tqdm",
]

setup(
    name="slipstream-runtime",
    version=VERSION,
    description="Train a Transformer cheaply and serve it fast: one JSON file, one Engine",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=[pattern for name in PACKAGES for pattern in (name, f"{name}.*")]),
    package_data={
        "engine": ["py.typed"],
        "profiler": ["py.typed", "*.json", "page/*.html.j2", "page/*.css", "page/*.js"],
        "ops": ["py.typed", "csrc/*.cu", "csrc/*.cuh", "gemm/tuned/*.json"],
        "config_schema": ["py.typed", "schema/*.json"],
        "sample_configs": ["*.json", "data/*.jsonl"],
    },
    install_requires=INSTALL_REQUIRES,
    # CuPy's own name on the index is source only: the wheels are named after the CUDA they are built for.
    extras_require={
        "cuda12": ["cupy-cuda12x>=13.4"],
        "cuda13": ["cupy-cuda13x>=13.6"],
        "gguf": GGUF,
        "report": REPORT,
        "data": DATA,
        "test": TEST,
        "dev": DEV,
    },
    entry_points={"console_scripts": ["slipstream=engine.cli:main"]},
)
