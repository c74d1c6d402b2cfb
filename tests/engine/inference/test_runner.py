"""Whole sequences as tensors: the same outputs as from lists, the same errors, whoever checks the ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from engine import Engine
from engine.errors import EngineError
from engine.inference.inputs import flat_from
from engine.inference.runner import Runner
from ops.errors import IdError
from ops.plan import Bucket, Launch, StepInputs, StepPlan, StepResult, StepState
from tests.engine.tiny import tiny

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0], [0, 0, 0, 11]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 1]])
TYPES = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 0, 0, 1]])


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pretrained(tiny("bert", "embedding").directory, device="cpu", precision="fp32")


def test_a_tensor_gives_what_lists_give(engine: Engine) -> None:
    lists = {"input_ids": IDS.tolist(), "attention_mask": MASK.tolist(), "token_type_ids": TYPES.tolist()}
    wanted, found = engine(lists), engine(IDS, attention_mask=MASK, token_type_ids=TYPES)
    assert torch.equal(wanted.last_hidden_state, found.last_hidden_state)
    assert torch.equal(wanted.pooler_output, found.pooler_output)
    assert bool((found.last_hidden_state[MASK == 0] == 0).all())
    assert torch.equal(engine(IDS[:1]).last_hidden_state, engine(IDS[:1].tolist()).last_hidden_state)
    assert torch.equal(engine(IDS[0]).last_hidden_state, engine(IDS[:1]).last_hidden_state)


def test_a_model_without_types_ignores_them() -> None:
    one = Engine.from_pretrained(tiny("distilbert", "embedding").directory, device="cpu")
    found = one(IDS, attention_mask=MASK, token_type_ids=TYPES + 7)
    assert torch.equal(found.last_hidden_state, one(IDS, attention_mask=MASK).last_hidden_state)


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "id": (
        {"batch": IDS.clone().index_fill_(1, torch.tensor([1]), 999)},
        "sequence 0: token id 999 is outside the voc",
    ),
    "negative": ({"batch": IDS - 11}, "sequence 0: token id -6 is outside the vocabulary of 160"),
    "type": ({"batch": IDS, "token_type_ids": TYPES * 2}, "sequence 0: this model's token types go from 0 to 1"),
    "empty": ({"batch": IDS, "attention_mask": MASK * torch.tensor([[1], [0], [1]])}, "sequence 1 is empty"),
    "all empty": ({"batch": IDS, "attention_mask": MASK * 0}, "sequence 0 is empty"),
    "long": ({"batch": torch.ones(1, 129, dtype=torch.long)}, "sequence 0 has 129 tokens, this model takes 128"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("guarded", [False, True])
def test_errors_are_the_same_whoever_finds_them(
    engine: Engine, kind: str, guarded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, message = BAD[kind]
    if guarded:
        monkeypatch.setattr(engine._runner(), "_plans", {"encode": _guarding(engine._runner(), lambda inputs: True)})
    with pytest.raises(EngineError, match=message):
        engine(**arguments)
    as_lists = {name: value.tolist() for name, value in arguments.items()}
    with pytest.raises(EngineError, match=message):
        engine(as_lists.pop("batch"), **as_lists)


def test_what_a_mask_hides_is_not_checked(engine: Engine) -> None:
    hidden = torch.where(MASK == 1, IDS, 999)
    found = engine(hidden, attention_mask=MASK, token_type_ids=torch.where(MASK == 1, TYPES, 9))
    assert torch.equal(
        found.last_hidden_state, engine(IDS, attention_mask=MASK, token_type_ids=TYPES).last_hidden_state
    )


@pytest.mark.parametrize("guards", [True, False])
def test_a_plan_that_guards_its_tables_is_asked_nothing_before(engine: Engine, guards: bool) -> None:
    seen: list[StepInputs] = []
    own = engine._runner()
    runner = Runner(own.spec, own.weights, own.kernels, own.device, own.group)
    runner._plans["encode"] = _guarding(own, lambda inputs: guards, seen)
    flat = flat_from(IDS[:2], CPU)
    assert flat is not None
    runner.flat(flat, hidden_of)
    assert [inputs.checked for inputs in seen] == [not guards]
    assert seen[0].positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    short = flat_from(IDS[:1, :2], CPU)
    assert short is not None
    runner.flat(short, hidden_of)
    assert seen[1].positions.tolist() == [0, 1]


def test_a_guard_that_is_wrong_is_not_hidden(engine: Engine) -> None:
    own = engine._runner()
    runner = Runner(own.spec, own.weights, own.kernels, own.device, own.group)

    def refuse(state: StepState) -> None:
        raise IdError("wrong")

    runner._plans["encode"] = StepPlan(Bucket("encode"), [Launch("x", refuse)], guards=lambda inputs: True)
    flat = flat_from(IDS, CPU)
    assert flat is not None
    with pytest.raises(IdError):
        runner.flat(flat, hidden_of)


def hidden_of(result: StepResult) -> torch.Tensor:
    """What a step gives."""
    return result.hidden


def test_outputs_are_built_before_the_wait(engine: Engine) -> None:
    """Once, by whichever plan; and not given where the wait finds an id that is wrong."""
    own = engine._runner()
    runner = Runner(own.spec, own.weights, own.kernels, own.device, own.group)
    whole = own._plan(Bucket("encode"))
    told: list[str] = []

    def waits(state: StepState) -> None:
        result = whole.run(replace(state.inputs, meanwhile=None))
        assert state.inputs.meanwhile is not None
        state.inputs.meanwhile(result)
        told.append("waited")
        state.hidden = result.hidden
        if len(told) > 2:
            raise IdError("wrong")

    def build(result: StepResult) -> torch.Tensor:
        told.append("built")
        return result.hidden + 1

    runner._plans["encode"] = StepPlan(Bucket("encode"), [Launch("x", waits)], guards=lambda inputs: True)
    flat = flat_from(IDS, CPU)
    assert flat is not None
    assert torch.equal(runner.flat(flat, build), own.flat(flat, hidden_of) + 1)
    assert told == ["built", "waited"]
    with pytest.raises(IdError):
        runner.flat(flat, build)


def _guarding(runner: Runner, guards: Callable[[StepInputs], bool], seen: list[StepInputs] | None = None) -> StepPlan:
    """The engine's own plan behind a launch that finds ids outside the tables, as a fused plan does."""
    plan = runner.kernels.plan(runner.spec, runner.weights, Bucket("encode"), runner.group)

    def check(state: StepState) -> None:
        inputs = state.inputs
        if seen is not None:
            seen.append(inputs)
        types = torch.zeros(1) if inputs.token_types is None else inputs.token_types
        outside = [not bool(((t >= 0) & (t < n)).all()) for t, n in ((inputs.token_ids, 160), (types, 2))]
        if not inputs.checked and any(outside):
            raise IdError("outside")

    return replace(plan, launches=[Launch("check", check), *plan.launches], guards=guards)
