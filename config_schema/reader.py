"""From a file, a text or a Python mapping to a plain JSON document, with everything in it that JSON does not allow.

Only dict, list, str, int, float, bool and None get through (mappings and subclasses of these types become the plain
type). Tuples, sets and paths are refused: what a configuration says in Python it must be able to say in a file.

JSON has one kind of number, so ``1.0`` is the integer 1, as JSON Schema has it: whole floats become ints here, before
pydantic, which takes an int for a float but not a float for an int.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TypeAlias

from config_schema.errors import ConfigError, Finding, Location, Problem
from config_schema.syntax import syntax_problem

MAX_BYTES = 1 << 20
"""Largest configuration file, in bytes. Long lists of prompts belong in a file that the job names."""

MAX_DEPTH = 64
"""Most levels of arrays and objects within each other."""

MAX_VALUES = MAX_BYTES // 2 + 1
"""Most values in a Python mapping; a file of MAX_BYTES cannot hold more."""

_LONGEST_NUMBER = 400

Json: TypeAlias = "dict[str, Json] | list[Json] | str | int | float | bool | None"

_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[\]{}]', re.DOTALL)

_FOREIGN_ENCODINGS = {
    b"\xef\xbb\xbf": "starts with a byte order mark; save it as UTF-8 without one",
    b"\xff\xfe": "is UTF-16, not UTF-8; save it as UTF-8",
    b"\xfe\xff": "is UTF-16, not UTF-8; save it as UTF-8",
}


class _Pairs:
    """An object of the text before its keys are known to be unique."""

    def __init__(self, pairs: list[tuple[str, object]]) -> None:
        self.pairs = pairs


class _Refused:
    """A number of the text that JSON, or a float, does not have."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


def read_file(path: str) -> str:
    """The text of a configuration file. Raises ``ConfigError`` where it cannot be read as UTF-8 text of sane size."""

    def refused(message: str) -> ConfigError:
        return ConfigError([Problem("", message)], source=path or '""')

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = (
            "; JSON text must be parsed first: a string is taken as a path" if path.lstrip()[:1] in ("{", "[") else ""
        )
        raise refused(f"no such file{hint}") from None
    except IsADirectoryError:
        raise refused("is a directory; name a JSON file in it") from None
    except (OSError, ValueError) as error:
        raise refused(f"cannot be read: {getattr(error, 'strerror', None) or error}") from None
    if len(data) > MAX_BYTES:
        raise refused(f"is larger than {MAX_BYTES} bytes; put long lists into a file that the job names")
    for mark, message in _FOREIGN_ENCODINGS.items():
        if data.startswith(mark):
            raise refused(message)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise refused(f"is not UTF-8: byte 0x{data[error.start]:02x} at offset {error.start}") from None
    if not text.strip():
        raise refused("is empty; the smallest configuration is " + '{"model": {"path": "..."}}')
    return text


def parse_text(text: str, source: str | None = None) -> object:
    """The value of a JSON text, for ``plain_document``, with duplicate keys and impossible numbers still in it.

    Raises ``ConfigError`` with line and column where the text is not JSON.
    """
    _check_depth(text, source)
    try:
        return json.loads(
            text, object_pairs_hook=_Pairs, parse_int=_integer, parse_float=_float, parse_constant=_constant
        )
    except json.JSONDecodeError as error:
        raise ConfigError([syntax_problem(text, error)], source) from None


def _check_depth(text: str, source: str | None) -> None:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
        elif match[0] in ("]", "}"):
            depth -= 1
        if depth > MAX_DEPTH:
            line = text.count("\n", 0, match.start()) + 1
            raise ConfigError([Problem("", f"line {line}: nested deeper than {MAX_DEPTH} levels")], source)


def _integer(text: str) -> object:
    return int(text) if len(text) <= _LONGEST_NUMBER else _Refused("the number is too large")


def _float(text: str) -> object:
    return float(text)


def _constant(text: str) -> object:
    return _Refused(f"{text} is not a JSON value; write a number")


def plain_document(value: object) -> tuple[Json, list[Finding]]:
    """A plain copy of ``value``, and what JSON does not allow in it. What is refused becomes None in the copy.

    Raises ``ConfigError`` where the value is too deep (one that contains itself is) or too large.
    """
    reader = _PlainReader()
    return reader.convert(value, ()), reader.findings


class _PlainReader:
    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.values = 0

    def convert(self, value: object, location: Location) -> Json:
        self.values += 1
        if self.values > MAX_VALUES:
            raise ConfigError([Problem("", f"holds more than {MAX_VALUES} values")])
        if isinstance(value, _Pairs):
            return self._object(value.pairs, location)
        if isinstance(value, Mapping):
            return self._object(value.items(), location)
        if isinstance(value, list):
            self._check_level(location)
            return [self.convert(item, (*location, index)) for index, item in enumerate(value)]
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return self._string(value, location)
        if isinstance(value, (int, float)):
            return self._number(value, location)
        return self._refuse(location, value.reason if isinstance(value, _Refused) else _not_json(value))

    def _object(self, pairs: Iterable[tuple[object, object]], location: Location) -> Json:
        self._check_level(location)
        result: dict[str, Json] = {}
        for key, item in pairs:
            if not isinstance(key, str):
                self._refuse((*location, str(key)), f"the key is not a string but of type {type(key).__name__}")
                continue
            name = self._string(key, (*location, key))
            if not isinstance(name, str):
                continue
            if name in result:
                self._refuse((*location, name), "the key appears more than once in its object; keep one")
                continue
            result[name] = self.convert(item, (*location, name))
        return result

    def _check_level(self, location: Location) -> None:
        if len(location) >= MAX_DEPTH:
            raise ConfigError([Problem("", f"nested deeper than {MAX_DEPTH} levels")])

    def _string(self, value: str, location: Location) -> Json:
        plain = str.__str__(value)
        try:
            plain.encode("utf-8")
        except UnicodeEncodeError as error:
            surrogate = f"\\u{ord(plain[error.start]):04x}"
            return self._refuse(location, f"{surrogate} is half a character (a lone surrogate); it is not Unicode text")
        return plain

    def _number(self, value: int | float, location: Location) -> Json:
        if isinstance(value, int):
            if abs(value) > sys.float_info.max:
                return self._refuse(location, "the number is too large")
            return int(value)
        if math.isnan(value):
            return self._refuse(location, "NaN is not a JSON value; write a number")
        if math.isinf(value):
            return self._refuse(location, "the number is infinite, or too large")
        return int(value) if value.is_integer() else float(value)

    def _refuse(self, location: Location, reason: str) -> Json:
        self.findings.append(Finding(location, reason))
        return None


def _not_json(value: object) -> str:
    name = type(value).__name__
    remedy = ""
    if isinstance(value, os.PathLike):
        remedy = "; write str(path)"
    elif isinstance(value, (tuple, set, frozenset)):
        remedy = "; write a list"
    return f"a Python {name} is not a JSON value{remedy}"
