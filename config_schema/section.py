"""What all sections of a configuration share: the strict base class and the types that several sections use.

Two decisions make pydantic and JSON Schema give the same verdict:

* Patterns run on Python's ``re``, the engine ``jsonschema`` uses as well. ``$`` also matches before a final line break
  there, hence ``(?!\\n)$`` in patterns that must not let one through.
* Counts end at 2**31 - 1, because lengths and sizes beyond it are mistakes in every field that uses them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, GetJsonSchemaHandler, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from config_schema.errors import quote

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
"""How many of something, at least one."""

NonEmptyText = Annotated[str, Field(min_length=1)]

FilePath = Annotated[
    str, Field(pattern=r"^[^\x00]+$", json_schema_extra={"errorMessage": "a non-empty path without NUL characters"})
]
"""A path as the operating system takes it. ``errorMessage`` is what editors and our messages say for the pattern."""


class Section(BaseModel):
    """A part of the configuration: strict (no ``"yes"`` for ``true``), frozen, and closed to unknown keys.

    The docstring under a field is its description in the JSON Schema.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        regex_engine="python-re",
    )

    exactly_one_of: ClassVar[tuple[str, ...]] = ()
    """Optional fields of which one, and only one, must be given (``null`` counts as not given)."""

    @model_validator(mode="after")
    def _exactly_one_is_given(self) -> Self:
        given = [name for name in self.exactly_one_of if getattr(self, name) is not None]
        reason = exactly_one_of_reason(self.exactly_one_of, given)
        if reason:
            raise PydanticCustomError("exactly_one_of", "{reason}", {"reason": reason})
        return self

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        schema = handler(core_schema)
        if cls.exactly_one_of:
            handler.resolve_ref_schema(schema)["oneOf"] = [
                {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in cls.exactly_one_of
            ]
        return schema


def exactly_one_of_reason(names: Sequence[str], given: Sequence[str]) -> str | None:
    """Why ``given`` is not exactly one of ``names``, or None where it is (or where there are no names)."""
    if not names or len(given) == 1:
        return None
    choices = ", ".join(quote(name) for name in names)
    if not given:
        return f"give exactly one of {choices}; none is there"
    return f"give exactly one of {choices}; {' and '.join(quote(name) for name in given)} are there"
