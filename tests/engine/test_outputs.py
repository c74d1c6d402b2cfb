"""What a user is told who names a file that cannot be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.errors import EngineError
from engine.outputs import check_writable


def test_a_file_that_cannot_be_written_is_told_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^--json .*none/x\.json: there is no directory .*none: make it, or"):
        check_writable(tmp_path / "none" / "x.json", "--json ")
    with pytest.raises(EngineError, match=r"^--chart .*: is not a file: give the name of one"):
        check_writable(tmp_path, "--chart ")
    check_writable(tmp_path / "x.json", "--json ")


def test_directories_that_will_be_made(tmp_path: Path) -> None:
    check_writable(tmp_path / "none" / "deep" / "x.json", "", makes_directories=True)
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match=r"there is no directory .*/file: make it"):
        check_writable(tmp_path / "file" / "x.json", "", makes_directories=True)
    assert [one.name for one in tmp_path.iterdir()] == ["file"]


def test_a_directory_that_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Permissions do not hold for root, who may run this."""
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(EngineError, match="is not writable"):
        check_writable(tmp_path / "x.json", "")
