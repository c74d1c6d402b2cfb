"""The model of the scale-out: its bytes are those that the collectives count; published figures beside it."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import scale_out
from benchmarks.scale_out import PUBLISHED, PUBLISHED_GPUS, Constants, by_node_ms, ring_ms, signs_ms, step
from ops.compression import Sent
from ops.compression.parts import cut
from tests.benchmarks import small
from tests.benchmarks.small import call

#: Where only bytes count: 8 * 10^-6 Gb/s are a byte in a millisecond.
BYTES: dict[str, Any] = {
    "gbps": 8e-6, "node": 1, "hop_us": 0, "local_us": 0, "message_us": 0, "pass_gbs": 1e30, "node_gbs": 1e30
}  # fmt: skip


@pytest.mark.parametrize("gpus", [2, 8, 64])
def test_bytes_are_those_that_collectives_count(gpus: int) -> None:
    n, sent = 8 * 64 * 1000, Sent()
    c = Constants(elements=n, **BYTES)
    sent.count_full(2 * n, gpus)
    assert ring_ms(c, gpus) == pytest.approx(sent.full)
    assert by_node_ms(c, gpus) == pytest.approx(sent.full)
    sent.count_compressed(cut((n,), gpus))
    # The collective counts scales on the way to the servers as well; the model takes those for a matter of hops.
    assert signs_ms(c, gpus) == pytest.approx(sent.compressed - 4 * (gpus - 1))


def test_a_node_s_gpus_share_its_link() -> None:
    """Between nodes full gradients are the same whatever a node has; the signs of all its GPUs go to all others."""
    alone, four = (Constants(elements=8e6, **{**BYTES, "node": node}) for node in (1, 4))
    assert by_node_ms(four, 4 * 16) == pytest.approx(by_node_ms(alone, 16))
    assert scale_out.all_to_all_bytes(four, 64) == pytest.approx(4 * 1e6 * 60 / 64)
    assert scale_out.all_to_all_bytes(four, 4) == 0


def test_hops_count_where_bytes_do_not() -> None:
    c = Constants(elements=1, gbps=1e30, hop_us=20, local_us=5, node=8, message_us=0, pass_gbs=1e30, node_gbs=1e30)
    around = (7 * 20 + 56 * 5) / 1e3
    assert ring_ms(c, 64) == pytest.approx(2 * around)
    assert by_node_ms(c, 64) == pytest.approx(2 * (7 * 20 + 7 * 5) / 1e3)
    assert signs_ms(c, 64) == pytest.approx(2 * around)
    assert signs_ms(replace(c, message_us=1), 64) == pytest.approx(2 * around + 8 * 56 / 1e3)


def test_steps_that_were_measured_are_foretold(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of steps of 2 s of arithmetic and the time of their bytes, by hand, nothing is off; half a second less is."""

    def seconds(gigabits: float) -> float:
        return 2.0 + 2 * 3 / 4 * 2 * 108.9e6 * 8 / (gigabits * 1e9 * 1448 / 1514)

    series = scale_out.Series("x", "LAMB", 4, False, {0.1: seconds(0.1), 10: seconds(10), 1: seconds(1) - 0.5})
    monkeypatch.setattr(scale_out, "SERIES", (series,))
    *_, near, far = scale_out.measured().splitlines()
    assert near.split() == ["x", "LAMB", "4", "10", "1", f"{seconds(1) - 0.5:.3g}", f"{seconds(1):.3g}", "+12%"]
    assert far.split()[-2:] == [f"{seconds(0.1):.3g}", "+0%"]


def test_what_is_hidden_and_what_is_not() -> None:
    c = Constants(warmup=0.25)
    found = step(c, 64)
    assert found.run == pytest.approx(0.25 * found.full + 0.75 * found.signs)
    assert found.signs == pytest.approx(c.compute_ms + signs_ms(c, 64))
    assert step(replace(c, hidden_ms=1e6), 64).full == c.compute_ms
    assert step(replace(c, hidden_ms=1e6), 64).signs == found.signs
    assert step(replace(c, many_gbps=50.0), 64).signs > found.signs


def test_beside_what_is_published() -> None:
    """docs/scale_out.md says so: at one connection's rate a step is at most 6.2 times faster, whatever the compute."""
    best = step(PUBLISHED, PUBLISHED_GPUS).stage_times
    assert best == pytest.approx(6.16, abs=0.01)
    assert step(replace(PUBLISHED, compute_ms=200, many_gbps=10), PUBLISHED_GPUS).stage_times == pytest.approx(
        scale_out.PUBLISHED_STAGE, rel=0.02
    )
    assert scale_out.published().count("\n") > 10


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "steps.json"
    given = ["--gbps", "10,100", "--gpus", "8,64", "--compute-ms", "50", "--json", target]
    assert call(scale_out.main, monkeypatch, *given) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    lines = [line.split() for line in text.splitlines()]
    assert ["compute_ms", "50", "given"] in lines
    assert ["hop_us", "20", "assumed:", "give", "your", "own"] in lines
    found = small.read(target)
    assert [case["constants"]["gbps"] for case in found] == [10, 100]
    assert found[0]["steps"][1] == asdict(step(Constants(compute_ms=50, gbps=10), 64))
    assert call(scale_out.main, monkeypatch, "--published") == 0


@pytest.mark.parametrize("wrong", [("--gbps", "0"), ("--warmup", "2"), ("--node", "x"), ("--gpus", "8,-1")])
def test_a_number_that_cannot_be(
    wrong: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        call(scale_out.main, monkeypatch, *wrong)
    assert f'got "{wrong[1]}", wanted' in capsys.readouterr().err
