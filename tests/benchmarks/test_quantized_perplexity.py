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
    """8 bits: within 0.5% of the perplexity in fp32, all sums in fp32. 4 bits cost more, and the more columns share a
    scale the more."""
    text = "\n".join((ROOT / name).read_text("utf-8") for name in PROSE)
    losses = []
    for how, group in (("fp32", None), ("int8", None), ("int4", 32), ("int4", 128)):
        config = document(str(smollm2_dir), how, device="cpu")
        if how != "fp32":
            config["quantization"] = {"compute": "fp32", "group_size": group}
        engine = Engine(config)
        losses.append(log_perplexity(engine, windows(engine.text.encode(text), 256, 4)))
    eight, narrow, wide = (math.exp(loss - losses[0]) - 1 for loss in losses[1:])
    assert eight != 0
    assert abs(eight) < 0.005
    assert 0.005 < narrow < wide
