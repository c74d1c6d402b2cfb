"""Environment variables in string values."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from config_schema import load_config
from config_schema.environment import escaped, interpolate
from tests.config_schema.test_messages import problems_of, with_model

VARIABLES = {"A": "one", "_b2": "two", "EMPTY": "", "REFERENCE": "${A} $${A}"}

MALFORMED = '"${" needs a variable: "${NAME}" or "${NAME:-default}"; a literal "${" is written "$${"'

EXPANDED = {
    "${A}": "one",
    "x${A}y${_b2}z": "xoneytwoz",
    "${EMPTY}": "",
    "${EMPTY:-d}": "d",
    "${NONE:-d}": "d",
    "${NONE:-}": "",
    "${A:-d}": "one",
    "${NONE:-a:-b /c}": "a:-b /c",
    "${REFERENCE}": "${A} $${A}",
    "$${A}": "${A}",
    "$$${A}": "$${A}",
    "$${": "${",
    "$A $ $$ {A} $(A)": "$A $ $$ {A} $(A)",
    "${A}}": "one}",
}

REFUSED = {
    "${}": MALFORMED,
    "${": MALFORMED,
    "a ${A": MALFORMED,
    "${1A}": MALFORMED,
    "${A B}": MALFORMED,
    "${A-b}": MALFORMED,
    "${NONE:-${A}}": MALFORMED,
    "${É}": MALFORMED,
    "${NONE}": 'the environment variable NONE is not set; set it, or give a default: "${NONE:-default}"',
}


@pytest.mark.parametrize("text", EXPANDED)
def test_expands(text: str) -> None:
    assert interpolate({"k": [text, 1]}, VARIABLES) == ({"k": [EXPANDED[text], 1]}, [])


@pytest.mark.parametrize("text", REFUSED)
def test_refuses(text: str) -> None:
    result, (finding,) = interpolate({"k": ["", text]}, VARIABLES)
    assert result == {"k": ["", text]}
    assert (finding.location, finding.message) == (("k", 1), REFUSED[text])


def test_keys_are_left_alone() -> None:
    assert interpolate({"${A}": None}, VARIABLES) == ({"${A}": None}, [])


@given(st.text(alphabet="${}A:-x", max_size=12))
def test_escaped_text_expands_to_itself(text: str) -> None:
    assert interpolate(escaped([text]), VARIABLES) == ([text], [])


def test_in_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLIPSTREAM_TEST", "/models")
    monkeypatch.delenv("SLIPSTREAM_UNSET", raising=False)
    document = {"model": {"path": "${SLIPSTREAM_TEST}/a"}, "device": "${SLIPSTREAM_UNSET:-cpu}"}
    config = load_config(document)
    assert (config.model.path, config.device) == ("/models/a", "cpu")
    assert document["device"] == "${SLIPSTREAM_UNSET:-cpu}"
    assert problems_of(with_model(device="${SLIPSTREAM_UNSET}", precision="${SLIPSTREAM_TEST}")) == [
        "$.device: the environment variable SLIPSTREAM_UNSET is not set; set it, or give a default: "
        '"${SLIPSTREAM_UNSET:-default}"',
        '$.precision: got "/models", wanted one of "auto", "fp32", "bf16", "fp16", "int8", "int4"',
    ]


def test_variables_that_are_not_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environb, b"SLIPSTREAM_TEST", b"\xff")
    assert problems_of({"model": {"path": "${SLIPSTREAM_TEST}"}}) == [
        "$.model.path: the environment variable SLIPSTREAM_TEST is not UTF-8"
    ]
