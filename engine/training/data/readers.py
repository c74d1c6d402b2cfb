"""One function a format: from a file to rows, which hold values by column names and know their place in the file."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from engine.errors import EngineError
from engine.training.data.files import Seen, lines

Format = Literal["text", "jsonl", "csv", "tsv", "parquet"]

#: By the ending of a file's name, ``.gz`` taken off.
FORMATS: Mapping[str, Format] = {
    ".txt": "text",
    ".text": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
}
#: Rows of a Parquet file that become Python objects at a time.
PARQUET_ROWS = 1000


class Row(NamedTuple):
    """One row: ``values`` by column, the file, and its number from 1 (of its first line; in Parquet, of the row)."""

    values: Mapping[str, Any]
    path: Path
    number: int
    unit: str = "line"

    def error(self, text: str) -> EngineError:
        """An error that names the place of this row."""
        return EngineError(f"{self.path}: {self.unit} {self.number}: {text}")


@dataclass(frozen=True)
class Layout:
    """What a file does not say of itself.

    documents: what divides the documents of a text file, "blank_line" (a document may have several lines) or "line".
    quoted:    whether fields of CSV or TSV may stand in double quotes; None is yes for CSV and no for TSV, whose
               quotes are plain characters by its definition (IANA's text/tab-separated-values).
    """

    documents: Literal["blank_line", "line"] = "blank_line"
    quoted: bool | None = None


#: From a file to its rows. ``wanted`` are the columns that will be asked for: a reader may leave out others.
Reader = Callable[[Path, Layout, Collection[str], Seen], Iterator[Row]]


def format_of(path: Path) -> Format:
    """The format that the name of a file tells. Raises :class:`EngineError` where it tells none."""
    name = path.name.lower()
    plain = Path(name.removesuffix(".gz"))
    found = FORMATS.get(plain.suffix)
    if found is None:
        raise EngineError(f"{path}: no format is known by this ending ({', '.join(FORMATS)}, or one with .gz): name it")
    return found


def read_text(path: Path, layout: Layout, wanted: Collection[str], seen: Seen) -> Iterator[Row]:
    """The documents of a text file as the column ``text``; blank documents are none."""
    if layout.documents == "line":
        for number, line in lines(path, seen):
            if line.strip():
                yield Row({"text": line.rstrip("\r\n")}, path, number)
        return
    block: list[str] = []
    first = 0
    for number, line in lines(path, seen):
        if line.strip():
            first = first if block else number
            block.append(line.rstrip("\r\n"))
        elif block:
            yield Row({"text": "\n".join(block)}, path, first)
            block = []
    if block:
        yield Row({"text": "\n".join(block)}, path, first)


def read_jsonl(path: Path, layout: Layout, wanted: Collection[str], seen: Seen) -> Iterator[Row]:
    """One JSON object a line; blank lines are passed over."""
    for number, line in lines(path, seen):
        if not line.strip():
            continue
        row = Row({}, path, number)
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            hint = ": wanted one whole JSON object a line" if line.strip() in ("[", "{") else ""
            raise row.error(f"broken JSON: {error.msg} (column {error.colno}){hint}") from error
        except RecursionError:
            raise row.error("broken JSON: nested too deep") from None
        except ValueError as error:  # an integer of thousands of digits
            raise row.error(f"broken JSON: {error}") from error
        if not isinstance(values, dict):
            raise row.error(f"wanted a JSON object, got {_shown(values)}")
        if "\\u" in line and not _encodable(values):
            raise row.error("holds half of a surrogate pair, which is no text")
        yield row._replace(values=values)


def _encodable(value: object) -> bool:
    """Whether what JSON has made of its escapes can be written as UTF-8: ``"\\ud800"`` cannot."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def read_csv(path: Path, layout: Layout, wanted: Collection[str], seen: Seen) -> Iterator[Row]:
    """Comma-separated values under a header line, as Python's csv module reads them."""
    return _separated(path, ",", layout.quoted is not False, seen)


def read_tsv(path: Path, layout: Layout, wanted: Collection[str], seen: Seen) -> Iterator[Row]:
    """Tab-separated values under a header line."""
    return _separated(path, "\t", layout.quoted is True, seen)


def _separated(path: Path, delimiter: str, quoted: bool, seen: Seen) -> Iterator[Row]:
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
    reader = csv.reader((line for _, line in lines(path, seen)), delimiter=delimiter, quoting=quoting, strict=True)
    header: list[str] | None = None
    while True:
        row = Row({}, path, reader.line_num + 1)
        try:
            fields = next(reader, None)
        except csv.Error as error:
            hint = " (texts this long: use JSONL)" if "limit" in str(error) else ""
            raise row.error(f"broken {'CSV' if delimiter == ',' else 'TSV'}: {error}{hint}") from error
        if fields is None:
            return
        if not fields:
            continue
        if header is None:
            header = fields
            if len(set(header)) != len(header):
                raise row.error(f"the header names a column twice: {', '.join(header)}")
        elif len(fields) != len(header):
            raise row.error(f"has {len(fields)} fields, the header names {len(header)}")
        else:
            yield row._replace(values=dict(zip(header, fields, strict=True)))


def read_parquet(path: Path, layout: Layout, wanted: Collection[str], seen: Seen) -> Iterator[Row]:
    """The rows of a Parquet file, of the ``wanted`` columns alone. Needs pyarrow."""
    if path.suffix == ".gz":
        raise EngineError(f"{path}: Parquet is compressed within: gunzip the file")
    try:
        import pyarrow
        from pyarrow import parquet
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] != "pyarrow":
            raise
        remedy = "pip install 'slipstream-runtime[data]'"
        raise EngineError(f"{path}: Parquet needs pyarrow, which is not installed: {remedy}") from None
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in names if name in wanted] or names
            size, rows, done = path.stat().st_size, max(file.metadata.num_rows, 1), 0
            for batch in file.iter_batches(PARQUET_ROWS, columns=columns):
                for number, values in enumerate(batch.to_pylist(), start=done + 1):
                    yield Row(values, path, number, "row")
                seen(size * (done + batch.num_rows) // rows - size * done // rows)
                done += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(f"{path}: cannot be read as Parquet: {reason}") from error


def _shown(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else f"{text[:37]}..."


READERS: Mapping[Format, Reader] = {
    "text": read_text,
    "jsonl": read_jsonl,
    "csv": read_csv,
    "tsv": read_tsv,
    "parquet": read_parquet,
}
