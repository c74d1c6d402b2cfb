"""What graphs and persistent kernels are counted as on a GPU, and that counting leaves what was captured in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from engine import Engine
from profiler import Counter
from tests.engine.tiny import tiny

pytestmark = pytest.mark.gpu
ROWS = [[5, 6, 7, 8], [9, 10, 11, 12]]
#: Multiples of 64, as the persistent kernels want them, and as many positions as the tests need.
GPT2: dict[str, Any] = {"n_embd": 128, "n_head": 2, "n_layer": 2, "n_inner": 256}


def engine_of(kernels: str) -> Engine:
    directory = tiny("gpt2", "causal_lm", **GPT2).directory
    return Engine.from_pretrained(directory, device="cuda", precision="bf16", kernels=kernels)


def generated(engine: Engine, **options: Any) -> list[list[int]]:
    found = engine.generate(ROWS, max_new_tokens=6, ignore_eos=True, **options)
    assert isinstance(found, list)
    return [one.token_ids for one in found]


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("kernels", ["generic", "specialized"])
def test_counting_before_and_after_capture_changes_no_token(kernels: str, sampled: bool) -> None:
    options: dict[str, Any] = {"do_sample": sampled, "seed": 3}
    wanted = generated(engine_of(kernels), **options)
    first, then = engine_of(kernels), engine_of(kernels)
    with Counter():
        assert generated(first, **options) == wanted
    assert generated(first, **options) == wanted
    assert generated(then, **options) == wanted
    with Counter() as counter:
        assert generated(then, **options) == wanted
    assert generated(then, **options) == wanted
    assert not counter.counts().unknown


def test_the_persistent_decoder_counts_what_generic_does() -> None:
    """Products and attention exactly: each row's own tokens, 6 new ones of which the first is the prompt's."""
    work = {}
    for kernels in ("generic", "specialized"):
        engine = engine_of(kernels)
        generated(engine)
        with Counter() as counter:
            generated(engine)
        counts = counter.counts()
        work[kernels] = counts.module("gpt2.decode").total()
        assert counts.root.total_parameters == engine.spec.parameters()
    assert "persistent_decode" in counts.root.operators()
    assert counts.module("gpt2.decode.step").total() == work["specialized"]
    assert work["generic"].macs == work["specialized"].macs
    assert 0 <= work["specialized"].flops - work["generic"].flops <= 2 * 5 * engine.spec.vocab_size


def test_an_encoders_graph_counts_as_its_launches() -> None:
    """Before and after its bucket was captured, with the same results."""
    engine = Engine.from_pretrained(
        tiny("bert", "embedding").directory, device="cuda", precision="fp16", kernels="generic"
    )
    ids = torch.tensor(ROWS * 2, device="cuda")
    found = []
    for _ in range(2):
        with Counter() as counter:
            counted = engine(ids).last_hidden_state
        found.append(counter.counts().module("bert.layers").total())
        assert torch.equal(counted, engine(ids).last_hidden_state)
    assert found[0] == found[1]
    tokens, spec = 16, engine.spec
    products = 2 * tokens * spec.layers * (4 * spec.hidden * spec.q_size + 2 * spec.hidden * spec.ffn)
    pairs = 4 * spec.layers * spec.q_size * 4 * 4 * 4
    assert found[0].macs * 2 == products + pairs


@pytest.mark.parametrize("kernels", ["generic", "specialized"])
def test_a_profile_of_generation(kernels: str) -> None:
    report = engine_of(kernels).profile(prompt=ROWS, max_new_tokens=8, repeats=2)
    assert report.timing is not None
    assert report.timing.clock == "device"
    assert report.machine["kernels"] == kernels
    decode = [name for name in report.timing.modules if name.startswith("gpt2.decode")]
    assert sum(report.timing.own(name).seconds for name in decode) > 0
    total = report.timing.busy_seconds + report.timing.idle_seconds
    assert total == pytest.approx(report.timing.step_seconds, rel=0.05)
