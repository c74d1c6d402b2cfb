"""Where a task's rows come from: files of any format, their columns under the names that tasks have for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from engine.errors import EngineError
from engine.training.data.files import Seen, resolve
from engine.training.data.readers import READERS, Format, Layout, Row, format_of

#: What tasks call their columns; those of the second line hold text.
ROLES = ("text", "text_pair", "question", "context", "label", "answers", "id")
TEXTS = frozenset(("text", "text_pair", "question", "context"))
#: Rows, and characters, that are tokenized at a time: enough for the tokenizer's own threads.
BLOCK_ROWS = 1000
BLOCK_CHARACTERS = 4_000_000


@dataclass(frozen=True)
class Source:
    """Files of labelled or plain text.

    paths:   a file, a glob, or several of them; read in this order, the matches of a glob sorted.
    columns: what the files call a column, by what tasks call it (ROLES); one that is not named has the task's name.
    format:  of all files; None takes each file's from its name. layout: see :class:`Layout`.
    """

    paths: str | Path | Sequence[str | Path]
    columns: Mapping[str, str] = field(default_factory=dict)
    format: Format | None = None
    layout: Layout = field(default_factory=Layout)

    def __post_init__(self) -> None:
        for role in self.columns:
            if role not in ROLES:
                raise EngineError(f"columns: {role!r} is no column of a task: there are {', '.join(ROLES)}")
        if self.format is not None and self.format not in READERS:
            raise EngineError(f"format: {self.format!r} is not known: there are {', '.join(READERS)}")

    def rows(
        self, required: Sequence[str], optional: Sequence[str] = (), seen: Seen = lambda more: None
    ) -> Iterator[Row]:
        """Rows whose values stand under the names of ``required`` and of those ``optional`` columns that are there.

        The first row decides which optional columns are there (null is not); those named in ``columns`` must be.
        ``seen`` is told how many more bytes have been read. Raises :class:`EngineError` with file and line for a
        missing column, a null, a text column that holds something else, a file without rows, and whatever else is
        wrong in a file.
        """
        names = {role: self.columns.get(role, role) for role in (*required, *optional)}
        roles: list[str] | None = None
        for path in resolve(self.paths):
            read = READERS[self.format or format_of(path)]
            empty = True
            for row in read(path, self.layout, frozenset(names.values()), seen):
                empty = False
                if roles is None:
                    there = (
                        role for role in optional if role in self.columns or row.values.get(names[role]) is not None
                    )
                    roles = [*required, *there]
                yield self._taken(row, names, roles)
            if empty:
                raise EngineError(f"{path}: holds no rows: give a file with data, or leave this one out")

    def _taken(self, row: Row, names: Mapping[str, str], roles: Sequence[str]) -> Row:
        for role in names:
            if role not in roles and row.values.get(names[role]) is not None:
                raise row.error(f"has a {names[role]!r}, which the first row has not")
        return row._replace(values={role: _value(row, names[role], role in TEXTS) for role in roles})

    def blocks(self, required: Sequence[str], optional: Sequence[str] = ()) -> Iterator[list[Row]]:
        """:meth:`rows` in lists of a size to tokenize, with a progress bar where that takes more than a second."""
        total = sum(path.stat().st_size for path in resolve(self.paths))
        with tqdm(total=total, desc="tokenizing", unit="B", unit_scale=True, disable=None, delay=1, leave=False) as bar:
            block: list[Row] = []
            characters = 0
            for row in self.rows(required, optional, bar.update):
                block.append(row)
                characters += sum(len(value) for value in row.values.values() if isinstance(value, str))
                if len(block) == BLOCK_ROWS or characters >= BLOCK_CHARACTERS:
                    yield block
                    block, characters = [], 0
            if block:
                yield block


def _value(row: Row, name: str, text: bool) -> Any:
    if name not in row.values:
        there = ", ".join(map(repr, row.values)) or "none"
        raise row.error(f"no column {name!r} (there are: {there}): name the right one under columns")
    value = row.values[name]
    if value is None:
        raise row.error(f"{name!r} is null")
    if text and not isinstance(value, str):
        raise row.error(f"{name!r} is {value!r:.40}, wanted text")
    return value
