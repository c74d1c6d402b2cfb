"""Rows out of files of every format, and one line of error for each thing that is wrong with a file."""

from __future__ import annotations

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.errors import EngineError
from engine.training.data.readers import Layout
from engine.training.data.source import BLOCK_ROWS, Source
from tests.engine.training.data.texts import write, write_rows

ROWS = [{"text": "a, b", "label": 1}, {"text": 'say "no"', "label": 0}]


def values(source: Source, *required: str, optional: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    return [dict(row.values) for row in source.rows(required, optional)]


def texts(source: Source) -> list[str]:
    return [row["text"] for row in values(source, "text")]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_documents_of_a_text_file(tmp_path: Path, ending: str) -> None:
    path = write(tmp_path / f"a.txt{ending}", "\ufeff\n one\ntwo\r\n\n \n\nthree\u2028four\x0cfive")
    found = list(Source(path).rows(["text"]))
    assert [row.values["text"] for row in found] == [" one\ntwo", "three\u2028four\x0cfive"]
    assert [row.number for row in found] == [2, 7]
    assert texts(Source(path, layout=Layout(documents="line"))) == [" one", "two", "three\u2028four\x0cfive"]


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_json_lines(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"a.jsonl{ending}", ROWS)
    assert values(Source(path), "text", "label") == ROWS


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_csv_and_tsv(tmp_path: Path, ending: str) -> None:
    csv = write(tmp_path / f"a.csv{ending}", '\ufefftext,label\r\n"a, b",1\r\n\r\n"say ""no""\nnow",0\r\nc,1')
    found = list(Source(csv).rows(["text", "label"]))
    assert [(row.values["text"], row.values["label"]) for row in found] == [
        ("a, b", "1"),
        ('say "no"\nnow', "0"),
        ("c", "1"),
    ]
    assert [row.number for row in found] == [2, 4, 6], "the first line of each row"
    tsv = write(tmp_path / f"a.tsv{ending}", 'text\tlabel\n"it is\t1\nb"\t0\n')
    assert texts(Source(tsv)) == ['"it is', 'b"'], "quotes of TSV are plain characters"
    tsv = write(tmp_path / f"b.tsv{ending}", 'text\tlabel\n"it\tis"\t1\n')
    assert texts(Source(tsv, layout=Layout(quoted=True))) == ["it\tis"]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    answers = [{"text": ["a"], "answer_start": [0]}, {"text": [], "answer_start": []}]
    table = pyarrow.table({"text": ["a", "b"], "label": [1, 0], "answers": answers, "other": [None, 1.5]})
    parquet.write_table(table, tmp_path / "a.parquet")
    seen: list[int] = []
    source = Source(tmp_path / "a.parquet", {"id": "label"})
    found = list(source.rows(["text", "id", "answers"], seen=seen.append))
    assert [row.values for row in found] == [
        {"text": "a", "id": 1, "answers": answers[0]},
        {"text": "b", "id": 0, "answers": answers[1]},
    ]
    assert sum(seen) == (tmp_path / "a.parquet").stat().st_size
    with pytest.raises(EngineError, match=r"a\.parquet: row 1: no column 'text_pair' \(there are: 'text'"):
        list(Source(tmp_path / "a.parquet").rows(["text", "text_pair"]))
    write(tmp_path / "b.parquet", "PAR1 no")
    with pytest.raises(EngineError, match=r"b\.parquet: cannot be read as Parquet: "):
        list(Source(tmp_path / "b.parquet").rows(["text"]))


def test_parquet_without_pyarrow_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EngineError, match=r"Parquet needs pyarrow, .* pip install 'slipstream-runtime\[data\]'"):
        list(Source(write(tmp_path / "a.parquet", "")).rows(["text"]))


def test_several_files_and_globs(tmp_path: Path) -> None:
    for name in ("b", "a", "c[1]"):
        write_rows(tmp_path / f"{name}.jsonl", [{"text": name}])
    write(tmp_path / "d.txt", "d")
    assert texts(Source([tmp_path / "d.txt", str(tmp_path / "[ab].jsonl")])) == ["d", "a", "b"]
    assert texts(Source(tmp_path / "c[1].jsonl")) == ["c[1]"], "a file is no pattern"


def test_columns_have_the_tasks_names(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl", [{"sentence": "a", "text_pair": None, "gold": 1}, {"sentence": "b", "gold": 0}]
    )
    source = Source(path, {"text": "sentence", "label": "gold"})
    assert values(source, "text", "label", optional=("text_pair",)) == [
        {"text": "a", "label": 1},
        {"text": "b", "label": 0},
    ]
    with pytest.raises(EngineError, match=r"line 1: 'text_pair' is null"):
        values(Source(path, {"text": "sentence", "text_pair": "text_pair"}), "text", optional=("text_pair",))
    path = write_rows(tmp_path / "b.jsonl", [{"text": "a"}, {"text": "b", "text_pair": "c"}])
    with pytest.raises(EngineError, match=r"line 2: has a 'text_pair', which the first row has not"):
        values(Source(path), "text", optional=("text_pair",))
    with pytest.raises(EngineError, match=r"columns: 'labl' is no column of a task"):
        Source(path, {"labl": "x"})


def test_blocks_hold_every_row_in_order(tmp_path: Path) -> None:
    rows = [{"text": str(number)} for number in range(2 * BLOCK_ROWS + 3)]
    blocks = list(Source(write_rows(tmp_path / "a.jsonl", rows)).blocks(["text"]))
    assert [len(block) for block in blocks] == [BLOCK_ROWS, BLOCK_ROWS, 3]
    assert [row.values for block in blocks for row in block] == rows


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_progress_counts_the_bytes_on_the_disk(tmp_path: Path, ending: str) -> None:
    path = write_rows(tmp_path / f"a.jsonl{ending}", [{"text": f"row {number}"} for number in range(2500)])
    seen: list[int] = []
    list(Source(path).rows(["text"], seen=seen.append))
    assert len(seen) >= 3
    assert sum(seen) == path.stat().st_size


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl: line 2: broken JSON: Expecting value"),
        ("a.jsonl", "[\n{}]", r"line 1: broken JSON: .*wanted one whole JSON object a line"),
        ("a.jsonl", '{"text": "a"}\n\n["b"]\n', r"line 3: wanted a JSON object, got \[\"b\"\]"),
        (
            "a.jsonl",
            '{"text": "a"}\n{"txt": "b"}\n',
            r"line 2: no column 'text' \(there are: 'txt'\): name the right one",
        ),
        ("a.jsonl", '{"text": null}', r"line 1: 'text' is null"),
        ("a.jsonl", '{"text": 5}', r"line 1: 'text' is 5, wanted text"),
        ("a.jsonl", '{"text": "\\ud800"}', r"line 1: holds half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, r"line 1: broken JSON: nested too deep"),
        ("a.jsonl", '{"text": ' + "9" * 5000 + "}", r"line 1: broken JSON: Exceeds the limit"),
        ("a.jsonl", "\n\n", r"a\.jsonl: holds no rows"),
        ("a.txt", "", r"a\.txt: holds no rows"),
        ("a.txt", "a\n\nb", r"THIS"),
        ("a.txt", b"a\nb\xff\n", r"a\.txt: line 2 is not UTF-8 \(byte 0xff\)"),
        ("a.csv", "text,label\n", r"a\.csv: holds no rows"),
        ("a.csv", "text,label\na,1\nb\n", r"line 3: has 1 fields, the header names 2"),
        ("a.csv", "text,text\na,1\n", r"line 1: the header names a column twice"),
        ("a.csv", "words,label\na,1\n", r"line 2: no column 'text' \(there are: 'words', 'label'\)"),
        ("a.csv", 'text\n"a\nb\n', r"line 2: broken CSV: unexpected end of data"),
        ("a.csv", "text\n" + "a" * 140_000, r"line 2: broken CSV: field larger than .* use JSONL"),
        ("a.csv", b"text\nb\xff\n", r"line 2 is not UTF-8"),
        ("a.xlsx", "a", r"a\.xlsx: no format is known by this ending"),
        ("a.parquet.gz", "a", r"Parquet is compressed within"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    source = Source(write(tmp_path / name, content))
    if message == "THIS":
        assert texts(source) == ["a", "b"], "the control: what is right is read"
        return
    with pytest.raises(EngineError, match=message) as caught:
        list(source.rows(["text"]))
    assert "\n" not in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for path, message in (
        (tmp_path, r"is a directory: name the files in it, for example .*\*\.jsonl"),
        (tmp_path / "no.txt", r"no\.txt: no such file \(relative names start at"),
        (tmp_path / "*.txt", r"\*\.txt: no file matches"),
    ):
        with pytest.raises(EngineError, match=message):
            list(Source(path).rows(["text"]))
    with pytest.raises(EngineError, match="no data files are given"):
        list(Source([]).rows(["text"]))
    with pytest.raises(EngineError, match="format: 'xml' is not known"):
        Source(tmp_path, format="xml")  # type: ignore[arg-type]


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = gzip.compress(b"".join(b"line %d\n" % number for number in range(5000)))
    for content, message in (
        (whole[: len(whole) // 2], r"line \d+: the gzip file is damaged"),
        (b"plain", r"line 1: the gzip"),
    ):
        (tmp_path / "a.txt.gz").write_bytes(content)
        with pytest.raises(EngineError, match=message):
            texts(Source(tmp_path / "a.txt.gz", layout=Layout(documents="line")))


def test_a_given_format_goes_before_the_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.data", '{"text": "a"}\n')
    assert texts(Source(path, format="jsonl")) == ["a"]
