"""An engine that trains: its steps beside a loop written by hand, and inference on the weights as they are."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from config_schema import SlipstreamError
from engine import Engine
from engine.errors import EngineError
from tests.engine.training.trained import Stack, bert, config, llama, masked

BATCHES = [masked(4, seed) for seed in range(6)]


def by_hand(model: Any, steps: int, *, clip: float | None = None, warmup: int = 0) -> list[float]:
    """Two micro-batches of two rows a step; AdamW, no decay of biases and norms; the rate falls to 0 in a line."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, warmup, steps)
    model.train()
    losses = []
    for batch in BATCHES[:steps]:
        total = 0.0
        for rows in (slice(0, 2), slice(2, 4)):
            loss = model(**{name: value[rows] for name, value in batch.items()}).loss
            (loss / 2).backward()
            total += loss.item() / 2
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        losses.append(total)
    return losses


def test_steps_are_those_of_a_loop_by_hand() -> None:
    theirs, ours = bert(dropout=0.0), bert(dropout=0.0)
    wanted = by_hand(theirs, 6, clip=0.5, warmup=2)
    engine = Engine(config(schedule={"type": "linear", "warmup_steps": 2}, training={"clip_norm": 0.5}), model=ours)
    found = [float(engine.train_batch(batch)) for batch in BATCHES]
    assert found == pytest.approx(wanted, abs=1e-6)
    assert found[-1] < found[0]
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4, msg=name)


def test_three_calls_are_one() -> None:
    one, three = (Engine(config(), model=bert()) for _ in range(2))
    torch.manual_seed(9)
    wanted = [float(one.train_batch(batch)) for batch in BATCHES[:3]]
    torch.manual_seed(9)
    found = []
    for batch in BATCHES[:3]:
        for rows in (slice(0, 2), slice(2, 4)):
            three.backward(three({name: value[rows] for name, value in batch.items()}).loss)
            report = three.step()
            assert (report is None) == (rows.start == 0)
        assert report is not None
        found.append(report.loss)
    assert found == wanted
    assert three.global_step == 3
    assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), three.model.parameters(), strict=True))


def test_generates_with_the_weights_as_they_are() -> None:
    engine = Engine(config(inference={"max_tokens": 48, "max_batch": 1}), model=llama())
    prompt = [5, 6, 7]

    def theirs() -> list[int]:
        engine.model.eval()
        out = engine.model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=None)
        engine.model.train()
        return list(out[0, 3:].tolist())

    answers = []
    for step in range(3):
        found = engine.generate(prompt, max_new_tokens=8, ignore_eos=True, temperature=0)
        assert found.token_ids == theirs()
        answers.append(found.token_ids)
        ids = torch.randint(3, 60, (4, 10), generator=torch.Generator().manual_seed(step))
        for _ in range(4):
            engine.train_batch({"input_ids": ids, "labels": ids})
    assert len({tuple(answer) for answer in answers}) > 1, "the steps changed the answers"
    packed = engine._runner()
    assert engine._runner() is packed, "packed again only when weights changed"


def test_evaluation_mode_infers_and_training_goes_on() -> None:
    engine = Engine(config(), model=bert(dropout=0.5))
    rows = {name: BATCHES[0][name][:1] for name in ("input_ids", "attention_mask")}
    engine.eval()
    ours = engine(rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    theirs = engine.model(**rows).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        assert float(engine(BATCHES[0]).loss) == pytest.approx(float(engine.model(**BATCHES[0]).loss))
    engine.train()
    assert engine(BATCHES[0]).loss.requires_grad


def test_parts_in_evaluation_mode_stay_so() -> None:
    """A user freezes the dropout of a part; steps and an evaluation between them leave it."""
    engine = Engine(config(), model=bert(dropout=0.5))
    engine.train_batch(BATCHES[0])
    engine.model.bert.embeddings.eval()
    engine.evaluate([{name: value[0] for name, value in BATCHES[0].items()}])
    engine.train_batch(BATCHES[1])
    assert engine.model.training
    assert engine.model.bert.encoder.training
    assert not engine.model.bert.embeddings.dropout.training


def test_a_model_of_ones_own(caplog: pytest.LogCaptureFixture) -> None:
    def loss(outputs: torch.Tensor, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        return (outputs[:, 0] - batch["wanted"]).square().mean()

    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    batch = {"x": x, "wanted": x.sum(1)}
    engine = Engine(config(training={"max_steps": 60}), model=Stack(), loss_function=loss)
    losses = [engine.train_batch(batch).loss for _ in range(60)]
    assert losses[-1] < losses[0] / 4
    engine.eval()
    with caplog.at_level(logging.WARNING, "slipstream.training"):
        first, again = engine({"x": x}), engine({"x": x})
    assert torch.equal(first, again)
    assert [record.getMessage() for record in caplog.records if "own forward" in record.getMessage()] != []
    assert sum("own forward" in record.getMessage() for record in caplog.records) == 1


@pytest.mark.parametrize("own", [False, True], ids=["hugging face", "own"])
@pytest.mark.parametrize("drop", [False, True], ids=["all layers", "layers dropped"])
def test_activation_checkpointing_changes_no_number(own: bool, drop: bool) -> None:
    def run(checkpointing: bool) -> list[float]:
        sections: dict[str, Any] = {"training": {"activation_checkpointing": checkpointing}}
        if drop:
            sections["progressive_layer_drop"] = {"theta": 0.3, "gamma": 5.0}
        model = Stack() if own else bert()
        loss = (lambda outputs, batch: outputs.square().mean()) if own else None
        engine = Engine(config(**sections), model=model, loss_function=loss)
        torch.manual_seed(2)
        generator = torch.Generator().manual_seed(1)
        batches = [{"x": torch.randn(4, 6, generator=generator)} for _ in range(4)] if own else BATCHES[:4]
        return [engine.train_batch(batch).loss for batch in batches]

    assert run(True) == pytest.approx(run(False), abs=1e-6)


@pytest.mark.parametrize("drop", [False, True], ids=["all layers", "layers dropped"])
def test_compiling_changes_no_number(drop: bool) -> None:
    def run(compiled: bool) -> list[float]:
        sections: dict[str, Any] = {"training": {"compile": compiled}}
        if drop:
            sections["progressive_layer_drop"] = {"theta": 0.3, "gamma": 5.0}
        engine = Engine(config(**sections), model=Stack(), loss_function=lambda outputs, batch: outputs.square().mean())
        generator = torch.Generator().manual_seed(1)
        found = [engine.train_batch({"x": torch.randn(4, 6, generator=generator)}).loss for _ in range(4)]
        assert "blocks.0.norm.weight" in engine.model.state_dict()
        return found

    torch._dynamo.reset()  # what other tests compiled counts towards its limit
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert run(True) == pytest.approx(run(False), rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > before


def test_layers_are_dropped_and_counted() -> None:
    engine = Engine(config(progressive_layer_drop={"theta": 0.2, "gamma": 9.0}), model=bert(layers=6))
    reports = [engine.train_batch(batch) for batch in BATCHES]
    assert reports[0].metrics["layer_drop/expected"] == 6
    assert reports[-1].metrics["layer_drop/expected"] == pytest.approx(6 - 0.8 * 3.5)
    assert sum(report.metrics["layer_drop/layers"] for report in reports[1:]) < 5 * 6
    assert "bert.encoder.layer (6 BertLayer)" in engine.describe_training()


def test_low_precision_trains_fp32_weights() -> None:
    engine = Engine(config(precision="bf16"), model=bert())
    losses = [engine.train_batch(BATCHES[0]).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    assert engine.model.dtype == torch.float32
    with pytest.raises(EngineError, match=r'\$\.precision: "bf16" trains weights that are kept in fp32'):
        Engine(config(precision="bf16"), model=bert().to(torch.bfloat16))


def test_takes_the_next_micro_batches_of_an_iterator() -> None:
    one, other = (Engine(config(), model=bert()) for _ in range(2))
    torch.manual_seed(9)
    wanted = one.train_batch(BATCHES[0]).loss
    halves = [{name: value[rows] for name, value in BATCHES[0].items()} for rows in (slice(0, 2), slice(2, 4))]
    left = iter([*halves, {}])
    torch.manual_seed(9)
    assert other.train_batch(left).loss == wanted
    assert list(left) == [{}], "no more than a step's"
    with pytest.raises(EngineError, match=r"a step is 2 micro-batches .* got 0"):
        other.train_batch(iter([]))


def test_lamb_is_an_optimizer() -> None:
    engine = Engine(config(optimizer={"type": "LAMB", "lr": 1e-2}), model=bert())
    assert [engine.train_batch(BATCHES[0]).loss for _ in range(4)][-1] < 5
    assert type(engine._trainer.loop.progress.optimizer).__name__ == "LAMB"


def test_saves_what_others_open(tmp_path: Path) -> None:
    engine = Engine(config(), model=bert())
    for batch in BATCHES[:2]:
        engine.train_batch(batch)
    engine.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / "saved")
    for (name, mine), other in zip(engine.model.named_parameters(), again.named_parameters(), strict=True):
        assert torch.equal(mine, other[1]), name
    ours = Engine(
        {"model": {"path": str(tmp_path / "saved"), "task": "masked_lm"}, "device": "cpu", "precision": "fp32"}
    )
    ids = BATCHES[0]["input_ids"][:1]
    again.eval()
    torch.testing.assert_close(ours(ids).logits, again(ids).logits, atol=1e-4, rtol=1e-4)
    assert sorted(tmp_path.iterdir()) == [tmp_path / "saved"], "nothing is left aside"
    with pytest.raises(EngineError, match="save_pretrained writes Hugging Face models, this is a Stack"):
        Engine(config(), model=Stack(), loss_function=lambda out, batch: out.mean()).save_pretrained(tmp_path / "x")


def test_goes_back_to_a_checkpoint(tmp_path: Path) -> None:
    engine, other = (Engine(config(), model=bert()) for _ in range(2))
    engine.train_batch(BATCHES[0])
    engine.save_checkpoint(tmp_path)
    wanted = [engine.train_batch(batch).loss for batch in BATCHES[1:4]]
    assert other.load_checkpoint(tmp_path) == 1
    assert [other.train_batch(batch).loss for batch in BATCHES[1:4]] == wanted
    with pytest.raises(SlipstreamError, match="layer"):
        Engine(config(), model=bert(layers=2)).load_checkpoint(tmp_path)


BROKEN: dict[str, tuple[dict[str, Any], Any, str]] = {
    "no stack to drop": ({"progressive_layer_drop": {"gamma": 1.0}}, nn.Linear(6, 1), "no stack of residual blocks"),
    "a path that is not there": (
        {"progressive_layer_drop": {"gamma": 1.0, "paths": "encoder.blocks"}},
        bert(),
        'no module "encoder.blocks"',
    ),
    "a schedule without an end": (
        {"training": {"max_steps": None}, "schedule": {"type": "linear"}},
        bert(),
        r'\$\.schedule\.total_steps: "auto" is the end of the training: set \$\.training\.max_steps',
    ),
    "sharded alone": ({"training": {"data_parallel": "shard"}}, bert(), r'"shard" needs several processes'),
    "no loss": ({}, Stack(), "Stack has to give a scalar loss, got one of shape"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_refuses(name: str) -> None:
    sections, model, message = BROKEN[name]
    batch = {"x": torch.zeros(4, 6)} if isinstance(model, Stack) else BATCHES[0]
    with pytest.raises(EngineError, match=message):
        Engine(config(**sections), model=model).train_batch(batch)


def test_refuses_batches_that_are_no_step() -> None:
    engine = Engine(config(), model=bert())
    with pytest.raises(EngineError, match="a batch of 5 rows is no multiple of micro_batch_size, which is 2"):
        engine.train_batch(masked(5, 0))
    with pytest.raises(EngineError, match=r"a step is 2 micro-batches of 2 rows in each process .* got 3"):
        engine.train_batch(masked(6, 0))


def test_texts_are_no_batch_of_training() -> None:
    engine = Engine(config(), model=bert())
    for batch in ("a text", ["texts"], 5):
        with pytest.raises(EngineError, match=r"a batch is tensors, got .*: engine\.eval\(\) comes before"):
            engine(batch)


def test_explains_a_model_of_ones_own() -> None:
    engine = Engine(config(), model=Stack(), loss_function=lambda outputs, batch: outputs.mean())
    assert "\n}\n\nStack, 169 parameters, on cpu in fp32\na step is 4 samples" in engine.explain()
    assert '"train_batch_size": null' in engine.explain()


def test_an_engine_that_only_infers_says_so() -> None:
    engine = Engine({"device": "cpu"}, model=bert())
    with pytest.raises(EngineError, match='add a section "training"'):
        engine.train_batch(BATCHES[0])
    with pytest.raises(EngineError, match="loss_function has no effect"):
        Engine({"device": "cpu"}, model=bert(), loss_function=lambda out, batch: out)


def test_no_number_leaves_the_weights() -> None:
    engine = Engine(config(), model=bert())
    with torch.no_grad():
        engine.model.bert.embeddings.LayerNorm.weight[0] = torch.nan
    before = [p.detach().clone() for p in engine.model.parameters()]
    with pytest.raises(EngineError, match="step 1: the loss of micro-batch 0 is nan"):
        engine.train_batch(BATCHES[0])
    for old, new in zip(before, engine.model.parameters(), strict=True):
        assert torch.equal(old.nan_to_num(7), new.nan_to_num(7))
