"""The root of the configuration, and the rules that JSON Schema cannot state.

To add a section: write it in a file of its own (a frozen ``Section`` with a docstring under each field) and give it one
line in ``Config``; then run ``python -m config_schema.generate``. To add a rule: write a small function and give it one
line in ``RULES``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

from pydantic import Field, ValidationInfo, field_validator

from config_schema.embedding import Embedding
from config_schema.environment import escaped
from config_schema.errors import Problem
from config_schema.generation import Generation
from config_schema.inference import Inference
from config_schema.job import Job
from config_schema.model import Model
from config_schema.reader import Json
from config_schema.section import Section

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

    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of weights and activations; "auto" chooses by checkpoint and device."""

    kernels: Literal["auto", "eager", "generic", "specialized"] = "auto"
    """Kernel set: "eager" is plain PyTorch, "generic" cuBLAS and Triton, "specialized" fuses deeper than that."""

    inference: Inference = Field(default_factory=Inference)
    """Sizes that bound what runs at a time."""

    generation: Generation = Field(default_factory=Generation)
    """Defaults of text generation."""

    embedding: Embedding = Field(default_factory=Embedding)
    """Sentence embeddings."""

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


@dataclass(frozen=True)
class Rule:
    """A check that needs several fields. It runs where all sections it reads are valid."""

    reads: frozenset[str]
    check: Callable[[Config], list[Problem]]


def _job_fits_task(config: Config) -> list[Problem]:
    if config.job is None or config.model.task in ("auto", _TASK_OF_JOB[config.job.type]):
        return []
    task = _TASK_OF_JOB[config.job.type]
    wanted = f'needs $.model.task to be "{task}" or "auto", which is "{config.model.task}"'
    return [Problem("$.job.type", f'"{config.job.type}" {wanted}')]


def _new_tokens_fit_budget(config: Config) -> list[Problem]:
    """A prompt has at least one token, so the budget must exceed the new tokens."""
    new, budget = config.generation.max_new_tokens, config.inference.max_tokens
    generates = config.job is None or config.job.type == "generate"
    if not generates or new is None or budget == "auto" or new < budget:
        return []
    reason = f"{new} new tokens and a prompt do not fit $.inference.max_tokens, which is {budget}"
    return [Problem("$.generation.max_new_tokens", f"{reason}; set that to more than {new}, or lower this")]


def _least_is_not_over_most(config: Config) -> list[Problem]:
    least, most = config.generation.min_new_tokens, config.generation.max_new_tokens
    if least is None or most is None or least <= most:
        return []
    return [
        Problem("$.generation.min_new_tokens", f"{least} is more than $.generation.max_new_tokens, which is {most}")
    ]


def _temperature_can_sample(config: Config) -> list[Problem]:
    if config.generation.do_sample is not True or config.generation.temperature != 0:
        return []
    wanted = "raise it, or set $.generation.do_sample to false"
    return [Problem("$.generation.temperature", f"0 is greedy, but $.generation.do_sample is true; {wanted}")]


def _sampling_options_apply(config: Config) -> list[Problem]:
    """An option that is switched on must have an effect: none of these has without sampling."""
    generation = config.generation
    if generation.do_sample is False:
        reason = "$.generation.do_sample is false"
    elif generation.temperature == 0 and generation.do_sample is None:
        reason = "$.generation.temperature is 0 (greedy)"
    else:
        return []
    on = {
        "temperature": bool(generation.temperature),
        "top_k": bool(generation.top_k),
        "top_p": generation.top_p is not None and generation.top_p < 1,
    }
    return [
        Problem(f"$.generation.{name}", f"has no effect because {reason}; remove one of the two")
        for name, is_on in on.items()
        if is_on
    ]


def _output_is_not_input(config: Config) -> list[Problem]:
    output = getattr(config.job, "output", None)
    return [
        Problem("$.job.output", f"would overwrite $.job.{name}; give it another name")
        for name in ("prompts_file", "texts_file")
        if output is not None and getattr(config.job, name, None) == output
    ]


RULES = (
    Rule(frozenset({"job", "model"}), _job_fits_task),
    Rule(frozenset({"job", "generation", "inference"}), _new_tokens_fit_budget),
    Rule(frozenset({"generation"}), _least_is_not_over_most),
    Rule(frozenset({"generation"}), _temperature_can_sample),
    Rule(frozenset({"generation"}), _sampling_options_apply),
    Rule(frozenset({"job"}), _output_is_not_input),
)

_TASK_OF_JOB: Mapping[str, str] = {
    "generate": "causal_lm",
    "encode": "embedding",
    "classify": "sequence_classification",
    "classify_tokens": "token_classification",
    "answer": "question_answering",
    "fill_mask": "masked_lm",
}
