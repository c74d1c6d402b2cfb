"""The section "embedding": how an encoder's hidden states become one vector a text."""

from __future__ import annotations

from typing import Literal

from config_schema.section import Count, Section


class Embedding(Section):
    """Sentence embeddings."""

    pooling: Literal["auto", "mean", "cls"] = "auto"
    """Mean of all tokens or the first token's state; "auto" reads the checkpoint's own pooling file."""

    normalize: bool | Literal["auto"] = "auto"
    """Scale each vector to length 1; "auto" does what the checkpoint's own modules say."""

    batch_size: Count = 32
    """Texts that run at a time."""

    truncate: bool = False
    """Cut texts that are longer than the model's positions; false refuses them."""
