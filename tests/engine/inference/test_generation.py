"""Generation on tiny models: rows are independent, stops stop, nothing leaks."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from engine import Engine
from engine.errors import EngineError
from engine.inference.generation import Generation, StopText
from engine.inference.text import Detokenizer, Text
from tests.engine.tiny import padded, tiny, token_rows


class Letters:
    """A tokenizer whose ids 0 to 25 are letters, 26 a space and 27 to 30 the four bytes of one emoji."""

    def decode(self, ids: list[int], **_: Any) -> str:
        data = b"".join(
            bytes([97 + i]) if i < 26 else b" " if i == 26 else "\N{GRINNING FACE}".encode()[i - 27 : i - 26]
            for i in ids
        )
        return data.decode("utf-8", errors="replace")


TEXT = Text(None, tokenizer=Letters())


@pytest.fixture(scope="module")
def engine() -> Engine:
    one = tiny("llama", "causal_lm")
    return Engine.from_pretrained(
        one.directory, precision="fp32", device="cpu", inference={"max_batch": 4, "max_tokens": 64, "page_size": 8}
    )


ROWS = token_rows(160, (9, 1, 14, 3, 6), seed=8)


def ids(found: Any) -> list[list[int]]:
    assert isinstance(found, list)
    assert all(isinstance(one, Generation) for one in found)
    return [one.token_ids for one in found]


def test_a_batch_gives_what_each_row_alone_gives(engine: Engine) -> None:
    """Five rows with room for four at a time, greedy and sampled."""
    for options in ({}, {"temperature": 1.5, "top_k": 0, "seed": 40}):
        batch = engine.generate(ROWS, max_new_tokens=12, **options)
        for place, (row, one) in enumerate(zip(ROWS, batch, strict=True)):
            alone = {**options, "seed": 40 + place} if "seed" in options else options
            assert engine.generate(row, max_new_tokens=12, **alone).token_ids == one.token_ids


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(engine: Engine, side: str) -> None:
    batch = padded(ROWS[:3], side, pad=0)
    assert ids(engine.generate(batch, max_new_tokens=8)) == ids(engine.generate(ROWS[:3], max_new_tokens=8))
    mask = batch["attention_mask"]
    assert ids(engine.generate(batch["input_ids"], attention_mask=mask, max_new_tokens=8)) == ids(
        engine.generate(ROWS[:3], max_new_tokens=8)
    )


def test_seeds_repeat_and_differ(engine: Engine) -> None:
    def sampled(seed: int) -> list[int]:
        return engine.generate(ROWS[0], max_new_tokens=20, temperature=2.0, top_k=0, seed=seed).token_ids

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_end_of_sequence_ends_one_row_and_not_the_others(engine: Engine) -> None:
    free = ids(engine.generate(ROWS[:3], max_new_tokens=10))
    eos = free[0][4]
    found = engine.generate(ROWS[:3], max_new_tokens=10, eos_token_id=eos)
    for one, whole in zip(found, free, strict=True):
        upto = whole.index(eos) + 1 if eos in whole else 10
        assert one.token_ids == whole[:upto]
        assert one.finish_reason == ("stop" if eos in whole else "length")
    held = engine.generate(ROWS[0], max_new_tokens=10, eos_token_id=eos, min_new_tokens=8)
    assert eos not in held.token_ids[:8]
    assert len(held.token_ids) >= 8
    assert ids(engine.generate(ROWS[:3], max_new_tokens=10, eos_token_id=eos, ignore_eos=True)) == free


def test_repetition_penalty_is_hugging_faces(engine: Engine) -> None:
    one = tiny("llama", "causal_lm")
    for row in ROWS[:3]:
        with torch.inference_mode():
            theirs = one.model.generate(
                torch.tensor([row]),
                attention_mask=torch.ones(1, len(row), dtype=torch.long),
                max_new_tokens=12,
                repetition_penalty=1.7,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        ours = engine.generate(row, max_new_tokens=12, repetition_penalty=1.7, ignore_eos=True)
        assert ours.token_ids == theirs[0, len(row) :].tolist()


def test_a_generation_config_object(engine: Engine) -> None:
    config = GenerationConfig(max_new_tokens=5, do_sample=False)
    assert len(engine.generate(ROWS[0], generation_config=config, ignore_eos=True).token_ids) == 5
    longest = GenerationConfig(max_length=len(ROWS[0]) + 3)
    assert len(engine.generate(ROWS[0], generation_config=longest, ignore_eos=True).token_ids) == 3


def test_a_stream_gives_the_same_tokens_in_order(engine: Engine) -> None:
    engine.text = Text(None, tokenizer=Lenient())
    pieces = list(engine.generate(ROWS[:2], max_new_tokens=6, stream=True, ignore_eos=True))
    whole = ids(engine.generate(ROWS[:2], max_new_tokens=6, ignore_eos=True))
    for index in (0, 1):
        mine = [piece for piece in pieces if piece.index == index]
        assert [piece.token for piece in mine] == whole[index]
        assert [piece.finish_reason for piece in mine] == [None] * 5 + ["length"]
        assert "".join(map(str, mine)) == Lenient().decode(whole[index])


class Lenient:
    """Any id as a two-letter text."""

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(97 + i // 26) + chr(97 + i % 26) for i in ids)


def test_a_stop_text_is_cut_and_ends_the_row(engine: Engine) -> None:
    engine.text = Text(None, tokenizer=Lenient())
    free = engine.generate(ROWS[0], max_new_tokens=10, ignore_eos=True)
    text = str(free)
    stop = text[9:12]  # begins in the middle of a token
    found = engine.generate(ROWS[0], max_new_tokens=10, ignore_eos=True, stop=[stop, "never"])
    assert found.text == text[: text.index(stop)]
    assert found.finish_reason == "stop"
    assert found.token_ids == free.token_ids[: len(found.token_ids)]


def test_a_dropped_stream_gives_its_memory_and_its_turn_back(engine: Engine) -> None:
    engine.text = Text(None, tokenizer=Lenient())
    free = engine._cache.free_pages
    stream = engine.generate(ROWS, max_new_tokens=20, stream=True)
    next(stream)
    assert engine._cache.free_pages < free
    stream.close()
    assert engine._cache.free_pages == free


def test_threads_take_turns(engine: Engine) -> None:
    alone = ids(engine.generate(ROWS, max_new_tokens=12))
    found: list[list[list[int]]] = []
    threads = [
        threading.Thread(target=lambda: found.append(ids(engine.generate(ROWS, max_new_tokens=12)))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [alone] * 3


def test_several_engines_live_in_one_process(engine: Engine) -> None:
    other = Engine.from_pretrained(tiny("gpt2", "causal_lm").directory, device="cpu")
    before = ids(engine.generate(ROWS, max_new_tokens=5))
    other.generate(ROWS[0], max_new_tokens=5)
    assert ids(engine.generate(ROWS, max_new_tokens=5)) == before


def test_the_budget_is_checked_before_any_work(engine: Engine) -> None:
    with pytest.raises(
        EngineError,
        match=r"prompt 1 has 60 tokens and 20 new ones .* 80 in all, but inference.max_tokens is 64: set .* 80",
    ):
        engine.generate([ROWS[0], [5] * 60], max_new_tokens=20)
    with pytest.raises(EngineError, match="the model ends at 128"):
        engine.generate([5] * 120, max_new_tokens=20)
    assert len(engine.generate([5] * 44, max_new_tokens=20, ignore_eos=True).token_ids) == 20


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "the batch is empty"),
        ([[4], []], "prompt 1 is empty"),
        ([[4, 160]], "token id 160 is outside"),
        ([[-1]], "token id -1"),
    ],
)
def test_prompts_that_cannot_be(engine: Engine, prompt: Any, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        engine.generate(prompt)


def test_prompt_or_messages(engine: Engine) -> None:
    for arguments in ({}, {"prompt": [4], "messages": [{"role": "user", "content": "x"}]}):
        with pytest.raises(EngineError, match="a prompt or messages"):
            engine.generate(**arguments)
    with pytest.raises(EngineError, match=r"messages\[0\]: wanted an object with role and content"):
        engine.generate(messages=[{"content": "x"}])


def test_logits_that_are_not_finite_are_told() -> None:
    one = tiny("gpt2", "causal_lm")
    live = Engine({"device": "cpu", "precision": "fp32"}, model=one.model)
    spoiled = live._runner().weights.layers[0].attn_norm.weight
    spoiled.fill_(float("nan"))
    with pytest.raises(EngineError, match="prompt 0: the model's logits are not finite in float32"):
        live.generate([5, 6])
    assert live._cache.free_pages > 0


def test_weights_that_change_are_packed_again() -> None:
    import copy

    model = copy.deepcopy(tiny("gpt2", "causal_lm").model)
    live = Engine({"device": "cpu", "precision": "fp32"}, model=model)
    before = live.generate(ROWS[0], max_new_tokens=8)
    packed = live._runner()
    assert live._runner() is packed, "nothing changed, nothing is packed"
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight.mul_(-3)
    after = live.generate(ROWS[0], max_new_tokens=8)
    assert live._runner() is not packed
    assert after.token_ids != before.token_ids


# ---- text ----


def test_text_comes_when_it_is_whole() -> None:
    detokenizer = Detokenizer(TEXT)
    assert [detokenizer.push(i) for i in (0, 26, 27, 28, 29, 30, 1)] == ["a", " ", "", "", "", "\N{GRINNING FACE}", "b"]
    unfinished = Detokenizer(TEXT)
    assert [unfinished.push(i) for i in (2, 27, 28)] == ["c", "", ""]
    assert unfinished.flush() == "\N{REPLACEMENT CHARACTER}"


def test_what_may_be_a_stop_text_is_held_back() -> None:
    watch = StopText(TEXT, ["bcd"])
    assert [watch.push(i) for i in (0, 1, 2, 1, 2)] == [
        ("a", False),
        ("", False),
        ("", False),
        ("bc", False),
        ("", False),
    ]
    assert watch.push(3) == ("", True)
    ends = StopText(TEXT, ["bcd"])
    assert [ends.push(i)[0] for i in (0, 1)] == ["a", ""]
    assert ends.flush() == ("b", False)
