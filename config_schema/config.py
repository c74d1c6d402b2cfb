"""The root of the configuration, and the rules that JSON Schema cannot state.

To add a section: write it in a file of its own (a frozen ``Section`` with a docstring under each field) and give it one
line in ``Config``; then run ``python -m config_schema.generate``. Rules that need several sections: ``rules.py``.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator

from config_schema.data import Data
from config_schema.embedding import Embedding
from config_schema.environment import escaped
from config_schema.flops_profiler import FlopsProfiler
from config_schema.generation import Generation
from config_schema.inference import Inference
from config_schema.job import Job
from config_schema.model import Model
from config_schema.optimizer import Optimizer
from config_schema.progressive_layer_drop import ProgressiveLayerDrop
from config_schema.quantization import Quantization
from config_schema.quantize_training import QuantizeTraining
from config_schema.reader import Json
from config_schema.schedule import Schedule
from config_schema.section import Section
from config_schema.training import Training

CudaDevice = Annotated[
    str,
    Field(
        pattern=r"^cuda:(0|[1-9][0-9]{0,2})(?!\n)$",
        json_schema_extra={"errorMessage": 'a numbered GPU such as "cuda:0"'},
    ),
]


class Config(Section):
    """Configuration of slipstream: one JSON file that says which model runs, how, and what it does."""

    schema_: str | None = Field(default=None, alias="$schema")
    """Where editors find this schema; has no effect on what runs."""

    model: Model
    """Which checkpoint."""

    device: Literal["auto", "cpu", "cuda"] | CudaDevice = "auto"
    """Where it runs; "auto" takes a GPU where there is one."""

    precision: Literal["auto", "fp32", "bf16", "fp16", "int8", "int4"] = "auto"
    """Data type of weights and activations; "auto" chooses by checkpoint and device. "int8" and "int4" are of weights
    alone, while loading or in a checkpoint that holds them so: inference only."""

    quantization: Quantization | None = Field(default=None, title="Quantization")
    """How weights become 8 or 4 bits; null takes the defaults where "precision" asks for them."""

    kernels: Literal["auto", "eager", "generic", "specialized"] = "auto"
    """Kernel set: "eager" is plain PyTorch, "generic" cuBLAS and Triton, "specialized" fuses deeper than that."""

    inference: Inference = Field(default_factory=Inference)
    """Sizes that bound what runs at a time."""

    generation: Generation = Field(default_factory=Generation)
    """Defaults of text generation."""

    embedding: Embedding = Field(default_factory=Embedding)
    """Sentence embeddings."""

    training: Training | None = Field(default=None, title="Training")
    """The training loop; where it is missing, the engine infers and nothing else."""

    optimizer: Optimizer | None = Field(default=None, discriminator="type")
    """What turns gradients into steps."""

    schedule: Schedule | None = Field(default=None, title="Schedule")
    """The learning rate by step; null keeps it."""

    progressive_layer_drop: ProgressiveLayerDrop | None = Field(default=None, title="Progressive Layer Drop")
    """Leaves out residual blocks while training."""

    quantize_training: QuantizeTraining | None = Field(default=None, title="Quantize Training")
    """Rounds weights while training, to fewer and fewer bits."""

    flops_profiler: FlopsProfiler | None = Field(default=None, title="Flops Profiler")
    """A profile of training: FLOPs, time and limits, module by module."""

    data: Data | None = Field(default=None, title="Data")
    """Files to train and to evaluate on."""

    job: Job | None = Field(default=None, discriminator="type")
    """What `slipstream run` does; an engine used from Python needs none."""

    @field_validator("*", mode="after")
    @classmethod
    def _remember_what_is_valid(cls, value: Any, info: ValidationInfo) -> Any:
        """Leave each valid section in the caller's context: rules about these still run beside an invalid one."""
        if info.context is not None and info.field_name is not None:
            info.context[info.field_name] = value
        return value

    def to_dict(self) -> dict[str, Json]:
        """The whole configuration, defaults included, as a plain JSON document that ``load_config`` reads back equal.

        A literal ``${`` is written ``$${``, because reading expands environment variables.
        """
        document = self.model_dump(mode="json", by_alias=True)
        if document["$schema"] is None:
            del document["$schema"]
        return cast(dict[str, Json], escaped(document))

    def to_json(self, indent: int | None = 2) -> str:
        """``to_dict`` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False, allow_nan=False)
