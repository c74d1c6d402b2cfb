"""The section "generation": the defaults of ``engine.generate``, with Hugging Face's names and meanings."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from config_schema.section import Count, NonEmptyText, Section


class Generation(Section):
    """How text is generated. Whatever is null is taken from the checkpoint's generation_config.json."""

    max_new_tokens: Count | None = None
    """Most tokens to generate after the prompt."""

    min_new_tokens: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Tokens to generate before an end-of-sequence token may come."""

    do_sample: bool | None = None
    """Draw from the distribution (true) or take the likeliest token (false)."""

    temperature: Annotated[float, Field(ge=0)] | None = None
    """Divides the logits before sampling; 0 is greedy."""

    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Sample among this many likeliest tokens; 0 is off."""

    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    """Sample among the likeliest tokens whose probabilities add up to this; 1 is off."""

    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    """Divides the positive and multiplies the negative logits of tokens seen before; 1 is off."""

    stop: tuple[NonEmptyText, ...] = ()
    """Strings that end the text where they appear."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] | None = None
    """Seed of the sampling; null draws a new one each time."""

    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Return the log-probability of each new token, and of this many likeliest alternatives."""

    ignore_eos: bool = False
    """Go on to max_new_tokens whatever comes; for measurements."""
