"""MoQ by JSON: an engine that trains, evaluates, saves and goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from engine import Engine
from engine.errors import EngineError
from ops.quantization import dequantize, quantize
from tests.engine.training.trained import bert, config, llama, masked

BATCHES = [masked(4, seed) for seed in range(6)]
MOQ: dict[str, Any] = {"start_bits": 6, "target_bits": 4, "quantize_period": 2, "group_size": 8}


def engine_of(dropout: float = 0.1, training: dict[str, Any] | None = None, **keys: Any) -> Engine:
    return Engine(config(quantize_training=MOQ | keys, training=training or {}), model=bert(dropout=dropout))


def test_bits_fall_and_are_reported() -> None:
    engine = engine_of(rules=[{"modules": "*.layer.0", "target_bits": 6}])
    reports = [engine.train_batch(batch) for batch in BATCHES]
    bits = [{key: value for key, value in r.metrics.items() if "/bits/" in key} for r in reports]
    assert [line["quantize_training/bits/bert.encoder.layer.1"] for line in bits] == [6, 6, 5, 5, 4, 4]
    assert {line["quantize_training/bits/bert.encoder.layer.0"] for line in bits} == {6}
    assert bits[0].keys() >= {f"quantize_training/bits/{name}" for name in ("bert.embeddings.word_embeddings",)}
    moq = engine._trainer.plan.quantize_training
    assert moq is not None
    sizes = [(weight.parameter.numel(), weight.layer == "bert.encoder.layer.0") for weight in moq.weights]
    mean = sum(size * (6 if first else 4) for size, first in sizes) / sum(size for size, _ in sizes)
    assert reports[-1].metrics["quantize_training/bits"] == pytest.approx(mean)
    assert reports[-1].loss != pytest.approx(float(Engine(config(), model=bert()).train_batch(BATCHES[0])))


def test_what_is_evaluated_is_what_would_be_served() -> None:
    """Outputs of the weights that a file of quantized ones holds, after training by chance and mixing."""
    engine = engine_of(rounding="stochastic", quantize_change_ratio=0.5, quantize_period=1)
    for batch in BATCHES[:5]:
        engine.train_batch(batch)
    engine.eval()
    found = engine._trainer.infer(BATCHES[0]).logits
    other = bert().eval()
    other.load_state_dict(engine.model.state_dict())
    with torch.no_grad():
        plain = other(**BATCHES[0]).logits
        for module in other.modules():
            tied = module is other.get_output_embeddings()  # its weight is the embedding's
            if module is other.get_input_embeddings() or (isinstance(module, torch.nn.Linear) and not tied):
                module.weight.copy_(dequantize(quantize(module.weight, bits=4, group_size=8)))
        wanted = other(**BATCHES[0]).logits
    assert torch.equal(found, wanted)
    assert not torch.equal(found, plain)


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    keys: dict[str, Any] = {"rounding": "stochastic", "eigenvalue": {}, "quantize_period": 1, "start_bits": 8}
    whole = engine_of(0.1, {"max_steps": 60}, **keys)
    wanted = []
    for step in range(6):
        torch.manual_seed(step)
        wanted.append(whole.train_batch(BATCHES[step]))
        if step == 2:
            whole.save_checkpoint(str(tmp_path))
    resumed = engine_of(0.1, {"max_steps": 60}, **keys)
    assert resumed.load_checkpoint(str(tmp_path)) == 3
    found = []
    for step in range(3, 6):
        torch.manual_seed(step)
        found.append(resumed.train_batch(BATCHES[step]))
    assert found == wanted[3:]
    with pytest.raises(EngineError, match="has the state of features"):
        Engine(config(training={"max_steps": 60}), model=bert()).load_checkpoint(str(tmp_path))


def test_what_is_saved_is_a_plain_model(tmp_path: Path) -> None:
    """Under its names, with the weights that training changes: quantizing them gives what training computed with."""
    engine = engine_of()
    for batch in BATCHES:
        engine.train_batch(batch)
    engine.save_pretrained(str(tmp_path))
    loaded = transformers.BertForMaskedLM.from_pretrained(str(tmp_path))
    own = engine.model.state_dict()
    assert all(torch.equal(tensor, own[name]) for name, tensor in loaded.state_dict().items())
    moq = engine._trainer.plan.quantize_training
    assert moq is not None
    for name, tensor in moq.quantized().items():
        again = quantize(loaded.get_parameter(name), bits=4, group_size=8)
        assert torch.equal(tensor.values, again.values)
        assert torch.equal(tensor.scales, again.scales)


@pytest.mark.parametrize(("precision", "bits", "size"), [("int8", 8, None), ("int4", 4, 16)])
def test_an_engine_serves_what_was_trained(precision: str, bits: int, size: int | None, tmp_path: Path) -> None:
    """From the saved weights, in as many bits: the logits that training evaluates with."""
    keys = {"start_bits": bits, "target_bits": bits, "group_size": size}
    trained = Engine(config(quantize_training=keys), model=llama())
    for seed in range(3):
        ids = masked(4, seed)["input_ids"]
        trained.train_batch({"input_ids": ids, "labels": ids})
    trained.save_pretrained(str(tmp_path))
    served = Engine(
        {
            "model": {"path": str(tmp_path)},
            "device": "cpu",
            "precision": precision,
            "quantization": {"group_size": size, "scale_dtype": "fp16", "compute": "fp32"},
        }
    )
    batch = {"input_ids": BATCHES[0]["input_ids"]}
    wanted = trained._trainer.infer(batch).logits
    torch.testing.assert_close(served(batch).logits, wanted, rtol=0, atol=1e-5)
    trained.model.eval()
    with torch.no_grad():
        assert not torch.allclose(trained.model(**batch).logits, wanted, rtol=0, atol=1e-5)


def test_a_schedule_longer_than_the_training_is_refused() -> None:
    with pytest.raises(EngineError, match=r"\$.quantize_training: from 16 to 4 bits takes 4097 optimizer steps, and"):
        engine_of(start_bits=16).train_batch(BATCHES[0])


def test_a_run_by_its_file(tmp_path: Path) -> None:
    """fit() knows how long it is from its data; each line of metrics has the bits."""
    document = config(
        quantize_training=MOQ | {"quantize_period": 1},
        training={"max_steps": None, "epochs": 4, "output": str(tmp_path / "run"), "accumulation_steps": 1},
    )
    del document["training"]["max_steps"]
    engine = Engine(document, model=bert())
    engine.fit([{key: value[0] for key, value in masked(1, seed).items()} for seed in range(4)])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    bits = [line["quantize_training/bits"] for line in lines if "quantize_training/bits" in line]
    assert bits == [6, 5, 4, 4, 4, 4, 4, 4]


def test_it_is_told_and_can_be_switched_off() -> None:
    engine = engine_of(enabled=False)
    wanted = [float(engine.train_batch(batch)) for batch in BATCHES[:2]]
    plain = Engine(config(), model=bert())
    assert [float(plain.train_batch(batch)) for batch in BATCHES[:2]] == wanted
    assert "weights are rounded from 6 to 4 bits" in engine_of().explain()
    assert "rounded" not in plain.explain()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_as_on_a_cpu(precision: str) -> None:
    """The same losses, to the rounding of products, with eigenvalues asked for on the way."""

    def losses(device: str, **sections: Any) -> tuple[list[float], dict[str, float]]:
        bits = {"start_bits": 10, "target_bits": 8, "quantize_period": 1, "eigenvalue": {"max_iter": 5}}
        document = config(quantize_training=bits, training={"max_steps": 60}) | {"device": device, **sections}
        engine = Engine(document, model=bert(dropout=0.0))
        found = [engine.train_batch(batch).loss for batch in BATCHES[:4]]
        moq = engine._trainer.plan.quantize_training
        assert moq is not None
        return found, moq.eigenvalues

    wanted, shares = losses("cpu")
    found, theirs = losses("cuda", precision=precision)
    assert found == pytest.approx(wanted, rel=1e-4 if precision == "fp32" else 3e-2)
    assert theirs.keys() == shares.keys()
    assert max(theirs.values()) == 1
