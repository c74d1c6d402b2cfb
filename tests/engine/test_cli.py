"""The command line as a user types it: real processes, exit codes, one line for each mistake, no traceback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.engine.tiny import tiny


def slipstream(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "engine", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)


def config(directory: Path, name: str = "config.json", **document: object) -> str:
    path = directory / name
    model = {"path": str(tiny("gpt2", "causal_lm").directory)}
    path.write_text(json.dumps({"model": model, "device": "cpu", **document}))
    return str(path)


def test_validate_imports_no_torch_and_says_what_is_wrong(tmp_path: Path) -> None:
    good, bad = config(tmp_path), config(tmp_path, "bad.json", precison="fp32", kernels="fast")
    code = (
        "import sys; from engine.cli import main; code = main(sys.argv[1:]); assert 'torch' not in sys.modules; "
        "sys.exit(code)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, "validate", good, bad], capture_output=True, text=True, timeout=100, check=False
    )
    assert (found.returncode, found.stdout) == (2, f"{good}: valid\n")
    lines = found.stderr.splitlines()
    assert len(lines) == 2
    assert lines[0].startswith(f'slipstream: error: {bad}: $.precison: unknown key, did you mean "precision"?')
    assert "$.kernels" in lines[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "empty"),
        ("{", "line 1"),
        ('{"model": {"path": "x"},}', "line 1"),
        ("[1]", "wanted an object"),
        ('{"model": {"path": "x"}, "model": {"path": "y"}}', "$.model"),
        ('{"model": {"path": "x"}, "generation": {"temperature": NaN}}', "NaN"),
        ('{"model": {"path": 3}}', "$.model.path"),
        ("{}", "$.model"),
        ("[" * 200 + "]" * 200, "levels"),
    ],
    ids=range(9),
)
def test_broken_files_are_one_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    found = slipstream("validate", str(path))
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    assert len(found.stderr.splitlines()) == 1
    assert said in found.stderr


def test_run_writes_results_to_stdout_alone(tmp_path: Path) -> None:
    from tests.engine.tiny_text import save_decoder

    job = {"type": "generate", "prompts": ["The moon is"]}
    path = tmp_path / "run.json"
    model = {"path": str(save_decoder(tmp_path / "model", "gpt2"))}
    path.write_text(json.dumps({"model": model, "device": "cpu", "generation": {"max_new_tokens": 4}, "job": job}))
    dry = slipstream("run", str(path), "--dry-run")
    assert (dry.returncode, dry.stderr) == (0, "")
    assert "ready: generate" in dry.stdout
    found = slipstream("run", str(path))
    assert found.returncode == 0, found.stderr
    assert found.stdout.strip()
    assert "tokens/s" in found.stderr
    long = slipstream("run", str(path), "--set", "inference.max_tokens=5")
    assert long.returncode == 2
    assert "inference.max_tokens is 5" in long.stderr


def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    assert 'did you mean "validate"' in slipstream("valdate", "x").stderr
    missing = slipstream("run", str(tmp_path / "no.json"))
    assert missing.returncode == 2
    assert "no.json" in missing.stderr
    nothing = slipstream("run", config(tmp_path))
    assert nothing.returncode == 2
    assert "$.job: missing" in nothing.stderr
    verify = slipstream("verify", config(tmp_path), "--set", "precision=fp32")
    assert verify.returncode == 0, verify.stderr
    assert "agrees with Hugging Face" in verify.stdout


def test_help_schema_and_env() -> None:
    for arguments in (("--help",), ("run", "--help"), ("env",)):
        found = slipstream(*arguments)
        assert found.returncode == 0
        assert all(len(line) <= 80 for line in found.stdout.splitlines()), arguments
    assert json.loads(slipstream("schema").stdout)["title"]
    assert json.loads(slipstream("env", "--json").stdout)
