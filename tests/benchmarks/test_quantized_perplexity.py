"""The benchmark of quantized perplexity, on a small model; and what 8 and 4 bits cost a real one."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import pytest
import torch

from benchmarks.quantized_perplexity import document, log_perplexity, read, windows
from engine import Engine
from tests.conftest import ROOT
from tests.engine.tiny import tiny

PROSE = ("docs/structure.md", "docs/layer_drop.md")


def test_texts_and_windows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words", "utf-8")
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"words"))
    assert read(tmp_path / "a.txt") == read(tmp_path / "a.txt.gz") == "words"
    assert windows(range(10), 3) == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
    assert windows(range(10), 3, 2) == [[0, 1, 2], [3, 4, 5]]


def test_precisions() -> None:
    assert document("m", "int4:32")["quantization"] == {"group_size": 32}
    assert document("m", "int8:row")["quantization"] == {"group_size": None}
    assert "quantization" not in document("m", "bf16")
    with pytest.raises(SystemExit, match="wanted one of fp32"):
        document("m", "int3")


def test_the_loss_is_hugging_faces() -> None:
    one = tiny("llama", "causal_lm")
    rows = windows(torch.randint(1, 160, (60,), generator=torch.Generator().manual_seed(0)).tolist(), 20)
    found = log_perplexity(Engine(document(str(one.directory), "fp32", device="cpu")), rows)
    ids = torch.tensor(rows)
    with torch.inference_mode():
        assert found == pytest.approx(float(one.model(ids, labels=ids).loss), rel=1e-5)


def test_what_bits_cost_a_real_model(smollm2_dir: Path) -> None:
    """8 bits: within 0.5% of the perplexity in fp32, all sums in fp32. 4 bits, to nearest: less than twice."""
    text = "\n".join((ROOT / name).read_text("utf-8") for name in PROSE)
    losses = {}
    for how in ("fp32", "int8", "int4"):
        config = document(str(smollm2_dir), how, device="cpu")
        if how != "fp32":
            config["quantization"] = {"compute": "fp32"}
        engine = Engine(config)
        losses[how] = log_perplexity(engine, windows(engine.text.encode(text), 256, 4))
    rise = {how: math.exp(loss - losses["fp32"]) - 1 for how, loss in losses.items()}
    assert rise["int8"] != 0
    assert abs(rise["int8"]) < 0.005
    assert 0.005 < rise["int4"] < 1, rise
