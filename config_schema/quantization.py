"""The section "quantization": how weights become 8 or 4 bits where "precision" asks for that."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from config_schema.section import Count, NonEmptyText, Section


class Quantization(Section):
    """Weights of 8 or 4 bits; activations keep the floating dtype that "compute" names."""

    group_size: Count | Literal["auto"] | None = "auto"
    """Columns of one row that share a scale, the last group of a row the rest; null is the whole row. "auto" takes the
    row for 8 bits, 64 for 4."""

    symmetric: bool | Literal["auto"] = "auto"
    """Whether zero is the integer 0; false spends a zero point a group on ranges that are not even. "auto" is true."""

    scale_dtype: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Data type of the scales; "auto" takes bf16 beside bf16, else fp16."""

    compute: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Data type of activations and sums; "auto" chooses by device and checkpoint."""

    exclude: Annotated[tuple[NonEmptyText, ...], Field(json_schema_extra={"uniqueItems": True})] = ()
    """Linear layers that stay as they are, by name; "*" stands for any text ("layers.0.*", "layers.*.down")."""

    embedding: bool = True
    """Whether the token embedding is quantized, and with it an output projection that is tied to it."""

    head: bool = True
    """Whether an output projection of its own, and the other linear layers of the head, are quantized."""
