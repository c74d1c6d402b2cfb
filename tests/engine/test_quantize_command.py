"""``slipstream quantize``: what it writes runs like any checkpoint, texts included."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import Engine, cli
from tests.engine.tiny_text import save_decoder, write_config


def test_quantized_runs_as_the_model_quantized_while_loading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = save_decoder(tmp_path / "model", "gpt2")
    config = write_config(tmp_path / "c.json", model, precision="int4", device="cpu", quantization={"group_size": 8})
    assert cli.main(["quantize", str(config), "--output", str(tmp_path / "small")]) == 0
    assert "small: weights of 4 bits: " in capsys.readouterr().out
    block = json.loads((tmp_path / "small" / "config.json").read_text())["quantization_config"]
    assert (block["quant_method"], block["bits"], block["group_size"]) == ("slipstream", 4, 8)
    options = {"max_new_tokens": 5, "do_sample": False, "ignore_eos": True}
    loaded = Engine({"model": {"path": str(tmp_path / "small")}, "device": "cpu"}).generate("The moon", **options)
    assert loaded.text == Engine(config).generate("The moon", **options).text


@pytest.mark.parametrize(
    ("change", "output", "message"),
    [
        ("precision=fp32", "small", 'save_quantized: $.precision is not "int8" or "int4": set it to one of these'),
        ("precision=int8", "model", "holds the model that is read: give another directory"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, output: str, message: str
) -> None:
    model = save_decoder(tmp_path / "model", "gpt2")
    config = write_config(tmp_path / "c.json", model, device="cpu")
    assert cli.main(["quantize", str(config), "--set", change, "--output", str(tmp_path / output)]) == 2
    assert message in capsys.readouterr().err


def test_verify_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_decoder(tmp_path / "model", "gpt2")
    config = write_config(tmp_path / "c.json", model, precision="int8", device="cpu")
    assert cli.main(["verify", str(config)]) == 2
    assert "Hugging Face has no such weights to compare with" in capsys.readouterr().err


def test_dry_run_names_the_bits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_decoder(tmp_path / "model", "gpt2")
    job = {"type": "generate", "prompts": ["The"]}
    section = {"compute": "fp32"}
    config = write_config(tmp_path / "c.json", model, precision="int8", device="cpu", quantization=section, job=job)
    assert cli.main(["run", str(config), "--dry-run"]) == 0
    assert "on cpu, 8-bit weights and fp32, eager kernels" in capsys.readouterr().out
