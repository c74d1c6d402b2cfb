"""The command ``slipstream import-config``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cli
from engine.import_config import Fate, import_config
from tests.engine.import_config.files import LAYER_DROP


def run(*arguments: str) -> int:
    """The exit code of ``slipstream import-config``."""
    return cli.main(["import-config", *arguments])


@pytest.fixture
def ds_config(tmp_path: Path) -> Path:
    """The file of the tutorial of layer dropping."""
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(LAYER_DROP), "utf-8")
    return path


def test_the_document_goes_to_stdout_and_the_report_to_stderr(
    ds_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(ds_config), "--model", "org/bert") == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {**import_config(LAYER_DROP).document, "model": {"path": "org/bert"}}
    assert "  train_batch_size = 4096  ->  $.training.train_batch_size\n" in shown.err
    assert "$.model.path:" not in shown.err
    assert max(map(len, shown.err.splitlines())) <= 80


def test_a_written_file_is_valid_and_stdout_has_the_report(
    ds_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "out.json"
    assert run(str(ds_config), "-o", str(target)) == 0
    shown = capsys.readouterr()
    assert cli.main(["validate", str(target)]) == 0
    assert [Fate.MAPPED.value in shown.out, shown.err] == [True, ""]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ds_config.json", "out.json"]
    before = target.read_text("utf-8")
    assert run(str(ds_config), "-o", str(target)) == 2
    assert capsys.readouterr().err.endswith(f"{target}: is there already: remove it, or give another name\n")
    assert target.read_text("utf-8") == before


def test_errors_of_the_command(tmp_path: Path, ds_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(str(tmp_path / "none.json")) == 2
    assert "no such file" in capsys.readouterr().err
    broken = tmp_path / "b.json"
    broken.write_text('// of the example\n{"fp16": {"enabled": True,}}')
    assert run(str(broken)) == 2
    assert "line 2, column 22: not JSON: JSON writes true, false and null" in capsys.readouterr().err
    assert run(str(ds_config), "-o", str(tmp_path / "no" / "out.json")) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_as_a_process_without_torch(repository: Path, ds_config: Path) -> None:
    script = (
        "import sys; from engine.cli import main; code = main(sys.argv[1:]); sys.exit(code or 'torch' in sys.modules)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", script, "import-config", str(ds_config)],
        env={**os.environ, "PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout)["optimizer"]["type"] == "AdamW"
