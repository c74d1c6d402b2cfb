"""Weights of 8 and 4 bits end to end: every family computes what the same model with dequantized weights computes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from config_schema import ConfigError, load_config
from engine import Engine, build
from engine.checkpoint import StateDictSource
from engine.checkpoint.quantized import QuantizedFile
from engine.errors import CheckpointError, EngineError
from ops.errors import KernelError
from ops.quantization import QuantizedTensor, Scheme, dequantize, quantize
from ops.spec import Task
from ops.weights import quantized_weight
from tests.engine.tiny import cases, flat, padded, tiny, token_rows

CPU = torch.device("cpu")
#: Activations in fp32: a few roundings. In bf16: torch's products round what the reference rounds elsewhere.
TOLERANCES = {"fp32": 2e-5, "bf16": 4e-2}


def document(path: Path, precision: str, task: str = "auto", **section: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(path), "task": task},
        "device": "cpu",
        "precision": precision,
        "quantization": {"compute": "fp32", **section},
    }


def dequantized(engine: Engine, compute: str) -> Engine:
    """The same model, each quantized weight replaced by what it stands for, run in floats."""
    plan = engine.plan
    weights = {name: plan.source.read(name).clone() for name in plan.source.names()}
    assert plan.scheme is not None
    for module in plan.scheme.modules:
        weights[f"{module}.weight"] = dequantize(quantized_weight(plan.source, plan.scheme, module, CPU))
    dtype = build.DTYPES[compute]
    return Engine(replace(plan, source=StateDictSource(weights), scheme=None, dtype=dtype))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
@pytest.mark.parametrize(("precision", "group"), [("int8", None), ("int8", 16), ("int4", 32)])
@pytest.mark.parametrize(("model_type", "task"), cases())
def test_outputs_are_those_of_dequantized_weights(
    model_type: str, task: Task, precision: str, group: int | None, compute: str
) -> None:
    one = tiny(model_type, task)
    engine = Engine(document(one.directory, precision, task, group_size=group, compute=compute))
    rows = token_rows(one.vocab_size)
    batch = padded(rows, "right", one.pad)
    found = flat(engine(batch), rows, task, "right").float()
    wanted = flat(dequantized(engine, compute)(batch), rows, task, "right").float()
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= TOLERANCES[compute] * float(wanted.abs().max())
    floats = Engine({**document(one.directory, compute, task), "quantization": None})
    assert not torch.allclose(found, flat(floats(batch), rows, task, "right").float(), rtol=1e-3), "nothing is rounded"


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "opt", "gpt_neo", "qwen2"])
def test_generates_as_with_dequantized_weights(model_type: str, precision: str) -> None:
    one = tiny(model_type, "causal_lm")
    engine = Engine(document(one.directory, precision, group_size=16))
    rows = token_rows(one.vocab_size)
    options = {"max_new_tokens": 6, "do_sample": False, "ignore_eos": True}
    found = [one.token_ids for one in engine.generate(rows, **options)]
    assert found == [one.token_ids for one in dequantized(engine, "fp32").generate(rows, **options)]


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_encodes(compute: str) -> None:
    one = tiny("bert", "embedding")
    engine = Engine(document(one.directory, "int8", "embedding", compute=compute))
    rows = token_rows(one.vocab_size)
    found, wanted = engine.encode(rows), dequantized(engine, compute).encode(rows)
    assert found.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.999


@pytest.mark.parametrize(("model_type", "task"), [("gpt2", "causal_lm"), ("llama", "causal_lm"), ("bert", "embedding")])
@pytest.mark.parametrize(
    ("precision", "section"),
    [
        ("int8", {}),
        ("int4", {"group_size": 16, "symmetric": False}),
        ("int8", {"exclude": ["layers.1.*"], "group_size": 7}),
    ],
)
def test_saved_and_loaded_bit_for_bit(
    tmp_path: Path, model_type: str, task: Task, precision: str, section: dict[str, Any]
) -> None:
    one = tiny(model_type, task)
    engine = Engine(document(one.directory, precision, task, **section))
    engine.save_quantized(tmp_path / "saved")
    again = Engine({"model": {"path": str(tmp_path / "saved"), "task": task}, "device": "cpu",
                    "quantization": {"compute": "fp32"}})  # fmt: skip
    assert again.plan.explain()["precision"] == precision
    assert again.plan.scheme == engine.plan.scheme
    assert isinstance(again.plan.source, QuantizedFile)
    assert engine.plan.scheme is not None
    for module in engine.plan.scheme.modules:
        mine = quantized_weight(engine.plan.source, engine.plan.scheme, module, CPU)
        held = again.plan.source.quantized(f"{module}.weight")
        for part, other in zip(parts(mine), parts(held), strict=True):
            assert torch.equal(part, other)
    rows = token_rows(one.vocab_size)
    batch = padded(rows, "right", one.pad)
    assert torch.equal(flat(engine(batch), rows, task, "right"), flat(again(batch), rows, task, "right"))


def parts(tensor: QuantizedTensor) -> list[torch.Tensor]:
    return list(tensor.to_tensors("w").values())


def test_a_tied_head_is_the_embedding() -> None:
    one = tiny("llama", "causal_lm", tie_word_embeddings=True)
    weights = Engine(document(one.directory, "int8"))._runner().weights
    assert isinstance(weights.embed.token, QuantizedTensor)
    assert weights.head is not None
    assert weights.head.out is not None
    assert weights.head.out.weight is weights.embed.token


def test_what_is_excluded_stays() -> None:
    one = tiny("llama", "causal_lm")
    section = {"exclude": ["layers.0.*", "layers.*.down"], "embedding": False, "head": False}
    engine = Engine(document(one.directory, "int4", group_size=16, **section))
    weights = engine._runner().weights
    assert isinstance(weights.embed.token, torch.Tensor)
    quantized = {
        name
        for name in ("qkv", "out", "up", "down")
        if isinstance(getattr(weights.layers[1], name).weight, QuantizedTensor)
    }
    assert quantized == {"qkv", "out", "up"}
    assert not any(
        isinstance(getattr(weights.layers[0], name).weight, QuantizedTensor) for name in ("qkv", "out", "up", "down")
    )
    assert engine.plan.scheme is not None
    assert not any(name.startswith(("head", "embed", "layers.0")) for name in engine.plan.scheme.modules)


@pytest.mark.parametrize(
    ("precision", "section", "message"),
    [
        (
            "int8",
            {"exclude": ["layers.9.down"]},
            r'exclude: "layers.9.down" matches no linear layer .* like "layers.0.q"',
        ),
        (
            "int8",
            {"exclude": ["layers.*.q"]},
            r"layers\.0\.k, layers\.0\.q, layers\.0\.v are one matrix here: exclude all of them or none",
        ),
    ],
)
def test_names_that_cannot_be_excluded(precision: str, section: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        build.plan(load_config(document(tiny("llama", "causal_lm").directory, precision, **section)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"precision": "int4"},
            r'\$.precision: "int4", but model.safetensors holds weights of 8 bits: .*"int8" or "auto"',
        ),
        (
            {"precision": "fp32", "quantization": None},
            r'\$.precision: "fp32", but the checkpoint is quantized: .*"int8"',
        ),
        ({"quantization": {"group_size": 8}}, r"\$.quantization.group_size: 8, but .* is quantized with 16"),
        ({"quantization": {"symmetric": False}}, r"\$.quantization.symmetric: False, but .* with True"),
        ({"quantization": {"scale_dtype": "fp32"}}, r"\$.quantization.scale_dtype: 'fp32', but .* with 'fp16'"),
        ({"quantization": {"exclude": ["layers.0.*"]}}, "leaves out other layers than model.safetensors does"),
    ],
)
def test_a_checkpoint_that_does_not_fit_the_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    one = tiny("llama", "causal_lm")
    Engine(document(one.directory, "int8", group_size=16)).save_quantized(tmp_path / "saved")
    with pytest.raises(EngineError, match=message):
        build.plan(load_config({"model": {"path": str(tmp_path / "saved")}, "device": "cpu", **change}))


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"bits": 4}, "8 bits, group size 16, symmetric True, but config.json says 4 bits"),
        ({"group_size": 32}, "but config.json says 8 bits, group size 32"),
        ({"group_size": "all"}, "quantization_config has a value that it cannot have"),
        ({"format": "slipstream.quantized.9"}, "is not of format slipstream.quantized.1"),
        ({"scale_dtype": "bf16"}, "scales in torch.float16, but config.json says bf16"),
    ],
)
def test_a_checkpoint_that_contradicts_itself(tmp_path: Path, block: dict[str, Any], message: str) -> None:
    one = tiny("llama", "causal_lm")
    Engine(document(one.directory, "int8", group_size=16)).save_quantized(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] |= block
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        build.plan(load_config({"model": {"path": str(tmp_path)}, "device": "cpu"}))


@pytest.mark.parametrize("kernels", ["generic", "specialized"])
def test_other_kernels_say_what_to_set(kernels: str) -> None:
    from ops.generic.kernel_set import assert_plain_weights

    scheme = Scheme(8, None, True, torch.float16, frozenset())
    with pytest.raises(KernelError, match=f'"{kernels}" do not read weights of 8 bits yet: set "kernels" to "eager"'):
        assert_plain_weights(kernels, scheme)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "bf16"}, r'\$.quantization: has no effect with \$.precision "bf16"'),
        ({"precision": "int8", "training": {"micro_batch_size": 1}}, r'\$.precision: "int8" is for inference'),
        ({"precision": "int4", "quantization": {"exclude": ["a", "a"]}}, r"\$.quantization.exclude: "),
        ({"precision": "int4", "quantization": {"group_size": 0}}, r"\$.quantization.group_size: got 0"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"model": {"path": "m"}, "quantization": {}, **change})


def test_auto_precision_leaves_a_float_checkpoint_alone() -> None:
    path = str(tiny("llama", "causal_lm").directory)
    with pytest.raises(
        EngineError, match=r'\$.quantization: has no effect on this checkpoint: set \$.precision to "int8"'
    ):
        build.plan(load_config({"model": {"path": path}, "device": "cpu", "quantization": {}}))


def test_the_resolved_config_is_a_config() -> None:
    found = build.plan(
        load_config(
            {"model": {"path": str(tiny("llama", "causal_lm").directory)}, "device": "cpu", "precision": "int4"}
        )
    )
    text = found.explain()
    assert text["quantization"]["group_size"] == 64
    assert "auto" not in text["quantization"].values()
    assert load_config({**text}).to_dict() == text


def test_a_weight_that_is_not_finite_is_named() -> None:
    source = StateDictSource({"head.out.weight": torch.tensor([[1.0, float("nan")]])})
    scheme = Scheme(8, None, True, torch.float16, frozenset({"head.out"}))
    with pytest.raises(ValueError, match=r"live model: head\.out\.weight: the weight holds nan at row 0, column 1"):
        quantized_weight(source, scheme, "head.out", CPU)


def test_quantized_in_pieces_is_quantized_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ops.quantization.scheme.CHUNK", 100)
    weight = torch.randn(23, 30)
    scheme = Scheme(4, 8, False, torch.bfloat16, frozenset())
    found = scheme.quantized(lambda rows: weight[rows], (23, 30), CPU)
    whole = quantize(weight, bits=4, group_size=8, symmetric=False, scale_dtype=torch.bfloat16)
    assert all(torch.equal(a, b) for a, b in zip(parts(found), parts(whole), strict=True))
