"""The section "inference": the budget of memory and the sizes that batching works with."""

from __future__ import annotations

from typing import Literal

from config_schema.section import Count, Section

PageSize = Literal[8, 16, 32, 64, 128, 256]


class Inference(Section):
    """Sizes that bound what runs at a time."""

    max_tokens: Count | Literal["auto"] = "auto"
    """Most tokens of one sequence, prompt plus new; "auto" takes what the model and the memory allow."""

    max_batch: Count | Literal["auto"] = "auto"
    """Most sequences that run at a time; "auto" takes what the memory allows."""

    page_size: PageSize = 16
    """Tokens in one page of the KV cache: a power of two from 8 to 256."""

    prefill_chunk: Count | Literal["auto"] = "auto"
    """Most prompt tokens in one prefill step; longer prompts are read in several."""
