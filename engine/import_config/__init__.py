"""``slipstream import-config``: a configuration of DeepSpeed's, as one of slipstream's.

Every key of the file comes out as one line of the report: taken over, taken over with a difference, not there yet, left
out, off, or no key of DeepSpeed at all (which DeepSpeed's own reader passes over in silence). What DeepSpeed does by
default and slipstream does not is written too. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from config_schema import Config, ConfigError, Problem, load_config
from config_schema.reader import parse_text, plain_document, read_file
from engine.import_config.draft import Draft, Row
from engine.import_config.hjson import plain_json
from engine.import_config.keys import KEYS, Fate
from engine.import_config.sections import SECTIONS, trains

__all__ = ["Fate", "Imported", "Row", "import_config"]

#: What stands for the model, which DeepSpeed's files do not name.
MODEL = "PATH/OF/THE/MODEL"


COLUMNS = 80


@dataclass(frozen=True)
class Imported:
    """What came of a file: ``document`` is JSON that ``load_config`` accepts, ``rows`` the report, ``missing`` what a
    file of DeepSpeed does not say and slipstream wants to know."""

    document: dict[str, Any]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]

    def report(self) -> str:
        """The report as text of 80 columns: a heading for each fate, and keys with the same reason together."""
        lines: list[str] = []
        for fate in Fate:
            groups: dict[tuple[str, str], list[Row]] = {}
            for row in self.rows:
                if row.fate is fate:
                    groups.setdefault((row.target, row.reason), []).append(row)
            if groups:
                lines += ["", f"{fate.value}:"]
            for (target, reason), rows in groups.items():
                said = ", ".join(part for part in (target and f"$.{target}", reason) if part)
                lines += [line for row in rows for line in _wrapped(str(row), 2)]
                if said and len(lines[-1]) + len(said) + 6 <= COLUMNS and len(rows) == 1:
                    lines[-1] += f"  ->  {said}"
                elif said:
                    lines += _wrapped(said, 6)
        if self.missing:
            lines += ["", "to be filled in:", *(part for line in self.missing for part in _wrapped(line, 2))]
        return "\n".join(lines[1:])

    def to_json(self) -> str:
        """The document as JSON text, with a line break at its end."""
        return json.dumps(self.document, indent=2, ensure_ascii=False) + "\n"


def import_config(source: str | os.PathLike[str] | Mapping[str, object], model: str | None = None) -> Imported:
    """Reads a configuration of DeepSpeed, for training or for ``init_inference``.

    source: path of a JSON file, in which comments and trailing commas pass as with DeepSpeed, or what stands in one.
    model: the directory or Hub name to write into it.

    Raises ``ConfigError`` for what is not JSON, and for values that neither DeepSpeed nor slipstream can use.
    """
    name = None if isinstance(source, Mapping) else os.fsdecode(source)
    value = source if name is None else parse_text(plain_json(read_file(name)), name)
    document, findings = plain_document(value)
    if findings or not isinstance(document, dict):
        problems = [finding.problem() for finding in findings]
        raise ConfigError(problems or [Problem("$", "wanted an object: {...}")], name)
    draft = Draft(document)
    for section in SECTIONS:
        section(draft)
    draft.tell_rest()
    if not any(key in KEYS for key in document):
        draft.problem("", "is no configuration of DeepSpeed: it has none of its keys")
    if draft.problems:
        raise ConfigError(draft.problems, name)
    draft.write("model.path", model or MODEL)
    ordered = {key: draft.document[key] for key in Config.model_fields if key in draft.document}
    _check(ordered, draft.rows, name)
    return Imported(ordered, tuple(draft.rows), _missing(draft, model))


def _wrapped(text: str, indent: int) -> list[str]:
    spaces = " " * indent
    return wrap(text, COLUMNS, initial_indent=spaces, subsequent_indent=spaces, break_on_hyphens=False)


def _check(document: dict[str, Any], rows: list[Row], name: str | None) -> None:
    """Raises with DeepSpeed's keys where slipstream refuses what was made of them."""
    try:
        load_config(document)
    except ConfigError as error:
        origin = {f"$.{row.target}": row.key for row in rows if row.target}
        raise ConfigError([_translated(problem, origin) for problem in error.problems], name) from None


def _translated(problem: Problem, origin: Mapping[str, str]) -> Problem:
    """The problem at DeepSpeed's key; the place may be an element of what that became."""
    place = problem.path.partition("[")[0]
    if place not in origin:
        return problem
    return Problem(f"$.{origin[place]}{problem.path[len(place) :]}", f"as {problem.path}: {problem.message}")


def _missing(draft: Draft, model: str | None) -> tuple[str, ...]:
    lines = [] if model else ["$.model.path: a checkpoint directory, or a name on the Hugging Face Hub"]
    if not trains(draft):
        return (*lines, "$.job: what `slipstream run` does; an engine used from Python needs none")
    if "optimizer" not in draft.document:
        lines.append("$.optimizer: its kind and rate, which the script that called DeepSpeed (or Trainer) chose")
    if "schedule" not in draft.document:
        lines.append("$.schedule: likewise; without it the rate stays")
    return (
        *lines,
        "$.training.max_steps or epochs: how long",
        "$.training.output: where metrics and checkpoints go",
        '$.data and $.job {"type": "train"}: for `slipstream run`; from Python, give fit() a dataset',
    )
