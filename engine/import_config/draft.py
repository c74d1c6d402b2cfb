"""A configuration of DeepSpeed while it is read, ours while it is written, and a line of the report for each key."""

from __future__ import annotations

import difflib
import json
from dataclasses import dataclass
from typing import Any

from config_schema.errors import Problem
from config_schema.reader import Json
from engine.import_config.keys import AUTO, AUTO_FLAGS, KEYS, Fate

_WANTED = {
    "integer": "a whole number",
    "number": "a number",
    "flag": "true or false",
    "text": "a string",
    "pair": "an array of two numbers",
    "section": "an object",
}


@dataclass(frozen=True)
class Row:
    """A line of the report: a key of DeepSpeed with its value (as JSON, empty where the file does not give it), what
    became of it, where it went in ours (empty: nowhere), and what is to be said about that."""

    fate: Fate
    key: str
    value: str
    target: str
    reason: str

    def __str__(self) -> str:
        key = self.key or '""'
        return f"{key} = {self.value}" if self.value else f"({key})"


class Draft:
    """What the functions of ``sections.py`` read from and write to.

    source:   DeepSpeed's document.
    document: ours, as far as it is written.
    rows:     the report. ``problems`` holds values that are of no use.
    """

    def __init__(self, source: dict[str, Json]) -> None:
        self.source = source
        self.document: dict[str, Any] = {}
        self.rows: list[Row] = []
        self.problems: list[Problem] = []
        self._told: set[str] = set()

    # ---- reading ----

    def get(self, key: str) -> Json:
        """The value at a dotted path as it is; None where it is missing."""
        value: Json = self.source
        for name in key.split("."):
            if not isinstance(value, dict):
                return None
            value = value.get(name)
        return value

    def take(self, key: str, kind: str) -> Any:
        """The value at a dotted path, of a kind of ``_WANTED``; None where it is missing or of no use, "auto" as it is.

        What is of no use becomes a problem.
        """
        value = self.get(key)
        if value is None or (value == "auto" and (key in AUTO or key in AUTO_FLAGS)):
            return value
        whole = isinstance(value, float) and value.is_integer()
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        fits = {
            "integer": number and (whole or isinstance(value, int)),
            "number": number,
            "flag": isinstance(value, bool),
            "text": isinstance(value, str),
            "pair": isinstance(value, list) and len(value) == 2 and all(isinstance(x, (int, float)) for x in value),
            "section": isinstance(value, dict),
        }
        if not fits[kind]:
            self.problem(key, f"got {shown(value)}, wanted {_WANTED[kind]}")
            return None
        return int(value) if kind == "integer" else value  # type: ignore[arg-type]

    def flag(self, section: str, key: str = "enabled") -> Any:
        """Whether a section is switched on: true, false or "auto"; None where there is no such section.

        DeepSpeed leaves a section off that does not say ``"enabled": true``; what is off is told here.
        """
        if self.take(section, "section") is None:
            return None
        on = self.take(f"{section}.{key}", "flag") or False
        if on is False:
            self.tell(Fate.OFF, section)
        return on

    def filled(self, key: str, kind: str) -> Any:
        """``take``, with Hugging Face's default in the place of "auto"."""
        value = self.take(key, kind)
        return AUTO[key][1] if value == "auto" and key in AUTO else value

    # ---- writing ----

    def write(self, target: str, value: Any) -> None:
        """Puts a value at a dotted path of ours."""
        *sections, name = target.split(".")
        place = self.document
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value

    def tell(self, fate: Fate, key: str, reason: str = "", target: str = "") -> None:
        """Adds a line of the report about a key, and about all that is in it."""
        self._told.add(key)
        value = self.get(key)
        self.rows.append(Row(fate, key, "" if value is None else shown(value), target, reason))

    def move(self, key: str, target: str, kind: str, reason: str = "") -> Any:
        """Takes a key over as it is, and tells so; ``reason`` makes it one to look at. Returns the value, if any."""
        filled = self.filled(key, kind)
        if self.get(key) == "auto" and key in AUTO:
            self.tell_auto(key, target)
        elif filled is not None:
            self.tell(Fate.CHECK if reason else Fate.MAPPED, key, reason, target)
        if filled is not None:
            self.write(target, filled)
        return filled

    def tell_auto(self, key: str, target: str) -> None:
        """Says what stands in the place of "auto"."""
        field, default = AUTO[key]
        said = f"TrainingArguments.{field}" if field != "0" else "the Trainer's 0"
        if default is None or default == "auto":
            self.tell(Fate.MAPPED, key, f'"auto" is {said}; left to slipstream', target)
        else:
            what = json.dumps(default)
            self.tell(Fate.CHECK, key, f'"auto" is {said}: the default, {what}, is written here', target)

    def problem(self, key: str, message: str) -> None:
        """Notes a value that cannot be used."""
        self._told.add(key)
        self.problems.append(Problem(f"$.{key}" if key else "$", message))

    # ---- the rest ----

    def tell_rest(self) -> None:
        """Tells about every key that no function took: why it is left out, or that DeepSpeed has no such key."""
        self._rest(self.source, "", False)

    def _rest(self, section: dict[str, Json], prefix: str, covered: bool) -> None:
        for name, value in section.items():
            key = prefix + name
            known, told = None if "." in name else KEYS.get(key), covered or key in self._told
            if known is None:
                self.rows.append(Row(Fate.UNKNOWN, key, shown(value), "", _nearest(name, prefix)))
                continue
            if not told and (known.reason or value is None):
                off = _is_off(value)
                row = Row(Fate.OFF if off else known.fate, key, shown(value), "", "" if off else known.reason)
                self.rows.append(row)
                told = True
            if isinstance(value, dict) and not known.any_keys:
                self._rest(value, key + ".", told)
            elif not told:
                self.tell(Fate.DROPPED, key, "does not belong to what is chosen beside it")


def _is_off(value: Json) -> bool:
    """Whether a key does nothing; DeepSpeed's compression says so one section deeper."""
    if not isinstance(value, dict):
        return value is None or value is False
    shared = value.get("shared_parameters")
    return value.get("enabled", shared.get("enabled") if isinstance(shared, dict) else None) is False


def _nearest(name: str, prefix: str) -> str:
    """What the user may have meant; keys that DeepSpeed's own reader passes over are worth a word."""
    siblings = {key[len(prefix) :] for key in KEYS if key.startswith(prefix) and "." not in key[len(prefix) :]}
    plain = name.replace("-", "_").lower()
    close = difflib.get_close_matches(plain, siblings, n=1, cutoff=0.8)
    if close:
        return f'did you mean "{close[0]}"?'
    around = (prefix + plain, prefix.rstrip("."))
    elsewhere = sorted(key for key in KEYS if key.rpartition(".")[2] == plain and key not in around)
    return f'did you mean "{elsewhere[0]}"?' if elsewhere else ""


def shown(value: Json) -> str:
    """A value as JSON, cut to a length for a table."""
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 30 else f"{text[:27]}..."
