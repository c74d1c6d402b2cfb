"""Reading: files that are no configuration, texts that are no JSON, Python values that JSON does not have."""

from __future__ import annotations

import enum
import os
import re
import socket
import threading
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from config_schema import ConfigError, load_config
from config_schema.reader import MAX_BYTES, MAX_DEPTH
from tests.config_schema.test_messages import problems_of, with_model


def problems_of_file(path: Path, content: bytes | str) -> list[str]:
    """The lines of the error, without the name of the file, which must stand before each."""
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.source == str(path)
    lines = str(caught.value).splitlines()
    assert all(line.startswith(f"{path}: ") for line in lines)
    return [line.removeprefix(f"{path}: ") for line in lines]


FILES: dict[str, tuple[bytes | str, str]] = {
    "empty": (b"", 'is empty; the smallest configuration is {"model": {"path": "..."}}'),
    "blank": (b" \n\t", 'is empty; the smallest configuration is {"model": {"path": "..."}}'),
    "byte order mark": (b"\xef\xbb\xbf{}", "starts with a byte order mark; save it as UTF-8 without one"),
    "UTF-16": ("{}".encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
    "Latin-1": ('{"model": "é"}'.encode("latin-1"), "is not UTF-8: byte 0xe9 at offset 11"),
    "array": ("[1, 2]", "$: got an array of 2, wanted an object: {...}"),
    "string": ('"gpt2"', '$: got the string "gpt2", wanted an object: {...}'),
    "null": ("null", "$: got null, wanted an object: {...}"),
    "NaN": ("NaN", "$: NaN is not a JSON value; write a number"),
    "trailing comma": (
        '{"model": {"path": "m"},\n}',
        'line {2,1}, column {1,24}: not JSON: a comma before "}" or "]" is not allowed; remove it',
    ),
    "trailing comma of an array": (
        '{"a": [1,]}',
        'line 1, column {10,9}: not JSON: a comma before "}" or "]" is not allowed; remove it',
    ),
    "comment": ('{\n  // why\n  "a": 1}', "line 2, column 3: not JSON: JSON has no comments; remove it"),
    "comment after a value": ('{"a": 1 # why\n}', "line 1, column 9: not JSON: JSON has no comments; remove it"),
    "single quotes": ("{'a': 1}", "line 1, column 2: not JSON: strings take double quotes, not single ones"),
    "typographic quotes": (
        "{“a”: 1}",
        'line 1, column 2: not JSON: a typographic quote; strings take plain double quotes (")',
    ),
    "Python's names": ('{"a": True}', "line 1, column 7: not JSON: JSON writes true, false and null"),
    "bare key": ("{a: 1}", "line 1, column 2: not JSON: wanted a key in double quotes"),
    "bare word": ('{"a": yes}', "line 1, column 7: not JSON: wanted a value"),
    "missing comma": (
        '{"a": 1\n "b": 2}',
        "line 2, column 2: not JSON: wanted a comma or the closing bracket here",
    ),
    "missing colon": ('{"a" 1}', 'line 1, column 6: not JSON: wanted ":" after the key'),
    "truncated": (
        '{"model": {"path": "m"}',
        "line 1, column 24: not JSON: the text ends too early; a brace, a bracket or a quote is not closed",
    ),
    "open string": ('{"a": "b}', "line 1, column 7: not JSON: the string that starts here is not closed"),
    "two values": ("{} {}", "line 1, column 4: not JSON: something follows the end of the JSON value"),
    "plus sign": ('{"a": +1}', "line 1, column 7: not JSON: a number starts with a digit or with -"),
    "line break in a string": (
        '{"a": "b\nc"}',
        "line 1, column 9: not JSON: a line break or control character inside a string; "
        'write "\\n", "\\t" or "\\u00XX"',
    ),
    "backslashes": (
        '{"a": "C:\\models"}',
        'line 1, column 10: not JSON: a backslash inside a string is written "\\\\"',
    ),
    "too deep": ("\n" + "[" * 100_000, f"line 2: nested deeper than {MAX_DEPTH} levels"),
    "too deep, objects": ('{"a":' * 100_000, f"line 1: nested deeper than {MAX_DEPTH} levels"),
    "too large": (
        b'{"a": "' + b"x" * MAX_BYTES + b'"}',
        f"is larger than {MAX_BYTES} bytes; put long lists into a file that the job names",
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_file_that_is(name: str, tmp_path: Path) -> None:
    content, expected = FILES[name]
    # {3.12 and before, later}: two places where versions of Python's parser stop at different characters
    variants = [re.sub(r"\{(\d+),(\d+)\}", rf"\{choice}", expected) for choice in (1, 2)]
    (line,) = problems_of_file(tmp_path / "config.json", content)
    assert line in variants


def test_values_in_a_file(tmp_path: Path) -> None:
    text = """{"model": {"path": "m", "path": "n", "path": 5}, "generation": {"temperature": NaN, "top_p": -Infinity,
      "top_k": 1e999, "seed": SEED, "stop": ["\\ud800", {"a": 1, "a": 1}]}, "a b": {"x": [{"y": 1, "y": 2}]}}"""
    assert problems_of_file(tmp_path / "c.json", text.replace("SEED", "9" * 5000)) == [
        "$.model.path: the key appears more than once in its object; keep one",
        "$.generation.temperature: NaN is not a JSON value; write a number",
        "$.generation.top_p: -Infinity is not a JSON value; write a number",
        "$.generation.top_k: the number is infinite, or too large",
        "$.generation.seed: the number is too large",
        "$.generation.stop[0]: \\ud800 is half a character (a lone surrogate); it is not Unicode text",
        "$.generation.stop[1]: got an object, wanted a non-empty string",
        "$.generation.stop[1].a: the key appears more than once in its object; keep one",
        '$["a b"]: unknown key (allowed: $schema, model, device, precision, quantization, kernels, inference, '
        "generation, embedding, training, optimizer, schedule, progressive_layer_drop, flops_profiler, data, job)",
        '$["a b"].x[0].y: the key appears more than once in its object; keep one',
    ]


def test_brackets_in_strings_are_not_depth(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text('{"model": {"path": "' + r"\"" + "[{" * 1000 + '"}}')
    assert load_config(path).model.path == '"' + "[{" * 1000


def test_hostile_text_is_scanned_in_linear_time(tmp_path: Path) -> None:
    assert problems_of_file(tmp_path / "c.json", '{"' + '\\"' * (MAX_BYTES // 2 - 10))
    assert problems_of_file(tmp_path / "c.json", '{"' + '\\"' * (MAX_BYTES // 2 - 10) + "\\")


def test_deepest_text_that_is_read(tmp_path: Path) -> None:
    deep = "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1)
    (line,) = problems_of_file(tmp_path / "c.json", f'{{"model": {{"path": "m"}}, "a": {deep}}}')
    assert line.startswith("$.a: unknown key")


def test_missing_file(tmp_path: Path) -> None:
    missing = tmp_path / "no.json"
    assert problems_of_source(missing) == f"{missing}: no such file"
    assert problems_of_source(str(missing)) == f"{missing}: no such file"
    assert problems_of_source(os.fsencode(missing).decode()) == f"{missing}: no such file"


def problems_of_source(source: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(source)
    return str(caught.value)


def test_sources_that_are_no_file(tmp_path: Path) -> None:
    assert problems_of_source(tmp_path) == f"{tmp_path}: is a directory; name a JSON file in it"
    assert problems_of_source("") == '"": no such file'
    assert "embedded null byte" in problems_of_source("a\0b")
    assert "File name too long" in problems_of_source("a" * 5000)
    assert problems_of_source('{"model": 1}').endswith(
        "no such file; JSON text must be parsed first: a string is taken as a path"
    )
    assert problems_of_source(42) == "wanted a path, a mapping or a Config, not int"
    assert problems_of_source(["a"]) == "wanted a path, a mapping or a Config, not list"
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "Too many levels of symbolic links" in problems_of_source(loop)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        assert "cannot be read: " in problems_of_source(tmp_path / "s")


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="permissions of POSIX")
def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.touch(mode=0o000)
    user = os.geteuid()
    try:
        os.seteuid(user or 65534)  # root may read everything, so it becomes nobody for a moment
        line = problems_of_source(path)
    finally:
        os.seteuid(user)
    assert line == f"{path}: cannot be read: Permission denied"


def test_named_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_text, args=('{"model": {"path": "m"}}',))
    writer.start()
    assert load_config(pipe).model.path == "m"
    writer.join()


class Name(str, enum.Enum):  # noqa: UP042 - the older way is what is tested
    CPU = "cpu"


class Size(enum.IntEnum):
    SMALL = 8


def test_mappings_and_subclasses_become_plain() -> None:
    section = MappingProxyType({"page_size": Size.SMALL})
    config = load_config(MappingProxyType(with_model(device=Name.CPU, inference=section)))
    assert (config.device, config.inference.page_size) == ("cpu", 8)
    assert type(config.device) is str
    assert type(config.inference.page_size) is int


def test_python_values_that_json_lacks() -> None:
    document = with_model(
        generation={"stop": ("a",), "temperature": float("nan"), "top_p": float("inf"), "seed": 10**400},
        job={"type": "encode", "texts": {"a"}, "output": Path("a")},
        inference={"max_tokens": 1j, "max_batch": b"auto", 1: 2, None: 3},
        device="\udc80",
        zz={1},
    )
    assert problems_of(document) == [
        "$.generation.stop: a Python tuple is not a JSON value; write a list",
        "$.generation.temperature: NaN is not a JSON value; write a number",
        "$.generation.top_p: the number is infinite, or too large",
        "$.generation.seed: the number is too large",
        "$.job.texts: a Python set is not a JSON value; write a list",
        "$.job.output: a Python PosixPath is not a JSON value; write str(path)",
        "$.inference.max_tokens: a Python complex is not a JSON value",
        "$.inference.max_batch: a Python bytes is not a JSON value",
        '$.inference["1"]: the key is not a string but of type int',
        "$.inference.None: the key is not a string but of type NoneType",
        "$.device: \\udc80 is half a character (a lone surrogate); it is not Unicode text",
        "$.zz: a Python set is not a JSON value; write a list",
        "$.zz: unknown key (allowed: $schema, model, device, precision, quantization, kernels, inference, generation, "
        "embedding, "
        "training, optimizer, schedule, progressive_layer_drop, flops_profiler, data, job)",
    ]


def test_mapping_that_contains_itself() -> None:
    document: dict[str, Any] = with_model()
    document["a"] = document["b"] = document
    assert problems_of(document) == [f"nested deeper than {MAX_DEPTH} levels"]


def test_mapping_that_unfolds_to_too_much() -> None:
    node: list[Any] = ["x"]
    for _ in range(50):
        node = [node, node]
    assert problems_of(with_model(a=node)) == ["holds more than 524289 values"]
