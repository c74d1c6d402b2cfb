"""MoQ's schedule against its closed form, and against DeepSpeed's loop written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ops.quantization import BitSchedule, QuantizationError, Stage, factor_of


def run(schedule: BitSchedule, steps: int, factor: int = 1) -> list[Stage]:
    """The stage of each step's forward pass."""
    stage, found = schedule.first(), []
    for step in range(steps):
        after = schedule.advance(stage, step)
        stage = schedule.stretched(after, factor) if after is not stage else after
        found.append(stage)
    return found


def losses_of(schedule: BitSchedule, steps: int, factor: int = 1) -> list[int]:
    """Steps at which a bit is lost."""
    bits = [schedule.start_bits, *(stage.bits for stage in run(schedule, steps, factor))]
    return [step for step in range(steps) if bits[step + 1] < bits[step]]


def test_bits_go_when_deepspeed_takes_them() -> None:
    """DeepSpeed 0.4 was seen to switch so, from 12 bits to 8 with a period of 10."""
    assert losses_of(BitSchedule(12, 8, 10), 200) == [10, 20, 40, 80]
    assert losses_of(BitSchedule(12, 8, 10, offset=7), 200) == [17, 27, 47, 87]
    assert losses_of(BitSchedule(8, 8, 1), 200) == []


@given(st.integers(1, 16), st.integers(0, 6), st.integers(1, 9), st.integers(0, 9), st.integers(1, 3))
def test_the_loop_of_deepspeed(target: int, lost: int, period: int, offset: int, factor: int) -> None:
    """``if bits != target and qsteps >= period: bits -= 1; period <- 2 * period * factor``."""
    schedule = BitSchedule(min(16, target + lost), target, period, offset)
    bits, threshold, wanted = schedule.start_bits, period, []
    for step in range(300):
        if bits != target and step - offset >= threshold:
            bits, threshold = bits - 1, 2 * threshold * factor
        wanted.append(bits)
    found = run(schedule, 300, factor)
    assert [stage.bits for stage in found] == wanted
    reached = schedule.reached(factor)
    if reached < 300:
        assert wanted[reached] == target
        assert reached == offset or schedule.start_bits == target or wanted[reached - 1] == target + 1


@pytest.mark.parametrize(("start", "steps"), [(8, 3), (9, 13), (10, 23), (12, 83)])
def test_the_step_that_reaches_the_target(start: int, steps: int) -> None:
    assert BitSchedule(start, 8, 10, offset=3).reached() == steps


def test_weights_are_mixed_in_by_and_by() -> None:
    schedule = BitSchedule(9, 8, 10, offset=3, change_ratio=0.25)
    kept = [schedule.kept(stage, step) for step, stage in enumerate(run(schedule, 20))]
    assert kept[:9] == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert kept[12:19] == [0, 1, 0.75, 0.5, 0.25, 0, 0], "from the beginning after a lost bit, at step 13"
    assert schedule.reached() == 17
    assert kept[16] > 0


def test_without_a_ratio_all_is_rounded_from_the_offset_on() -> None:
    schedule = BitSchedule(8, 8, 1, offset=2)
    assert [schedule.kept(schedule.first(), step) for step in range(4)] == [1, 1, 0, 0]


def test_factors_are_those_of_deepspeed() -> None:
    shares = [0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 0.9999, 1.0]
    assert [factor_of(share) for share in shares] == [1, 1, 2, 3, 3, 4, 4, 5]
    assert losses_of(BitSchedule(11, 8, 2), 300, factor=5) == [2, 20, 200]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((7, 8, 1), "^from 7 to 8 bits: use 1 to 16"),
        ((17, 8, 1), "^from 17 to 8 bits"),
        ((8, 0, 1), "^from 8 to 0 bits"),
        ((8, 4, 0), "^a period of 0 steps behind 0: use at least 1"),
        ((8, 4, 1, -1), "^a period of 1 steps behind -1"),
        ((8, 4, 1, 0, 0.0), "^a change ratio of 0.0: use more than 0"),
        ((8, 4, 1, 0, 1.1), "^a change ratio of 1.1"),
    ],
)
def test_what_is_out_of_range_is_told(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(QuantizationError, match=message):
        BitSchedule(*arguments)


def test_a_share_is_one() -> None:
    with pytest.raises(QuantizationError, match=r"an eigenvalue of 1.5: blocks' are given as a share"):
        factor_of(1.5)
