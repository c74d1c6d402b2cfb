"""DeepSpeed's sections "quantize_training" and "eigenvalue" (MoQ) as ours."""

from __future__ import annotations

from engine.import_config.draft import Draft
from engine.import_config.keys import Fate

_NAME = "quantize_training"


def quantize_training(draft: Draft) -> None:
    """Bits, schedule, groups, rounding and eigenvalues, with the defaults of DeepSpeed's code."""
    if not draft.flag(_NAME):
        if draft.flag("eigenvalue"):
            draft.tell(Fate.DROPPED, "eigenvalue", "only quantize_training asks for it")
        return
    draft.write(f"{_NAME}.enabled", True)
    draft.tell(Fate.MAPPED, f"{_NAME}.enabled", "in fp32, bf16 and fp16", f"{_NAME}.enabled")
    _number(draft, "quantize_bits.start_bits", 16)
    target = f"{_NAME}.target_bits"
    if draft.move(f"{_NAME}.quantize_bits.target_bits", target, "integer") is None:
        draft.tell(Fate.CHECK, f"{_NAME}.quantize_bits.target_bits", "missing: left to slipstream, 8", target)
    said = "in optimizer steps; DeepSpeed counted 6 times the layers (6 without eigenvalues) a step"
    _number(draft, "quantize_schedule.quantize_period", 1000, said)
    _number(draft, "quantize_schedule.schedule_offset", 1000, said)
    for key in ("q_type", "rounding"):
        draft.move(f"{_NAME}.quantize_algo.{key}", f"{_NAME}.{key}", "text")
    _groups(draft)
    mixed = f"{_NAME}.fp16_mixed_quantize"
    if draft.flag(mixed):
        ratio = f"{_NAME}.quantize_change_ratio"
        draft.tell(Fate.MAPPED, f"{mixed}.enabled", "in every precision", ratio)
        if draft.move(f"{mixed}.quantize_change_ratio", ratio, "number") is None:
            draft.write(ratio, 0.001)
            draft.tell(Fate.MAPPED, f"{mixed}.quantize_change_ratio", "0.001, DeepSpeed's default", ratio)
    inner = draft.get(f"{_NAME}.eigenvalue") is not None
    if inner and draft.flag("eigenvalue"):
        draft.tell(Fate.DROPPED, "eigenvalue", f"{_NAME}.eigenvalue says it")
    _eigenvalue(draft, f"{_NAME}.eigenvalue" if inner else "eigenvalue")


def _number(draft: Draft, key: str, default: int, reason: str = "") -> None:
    target = f"{_NAME}.{key.rpartition('.')[2]}"
    if draft.move(f"{_NAME}.{key}", target, "integer", reason) is None:
        draft.write(target, default)
        said = f"{default}, DeepSpeed's default"
        draft.tell(Fate.CHECK if reason else Fate.MAPPED, f"{_NAME}.{key}", f"{said}{reason and '; '}{reason}", target)


def _groups(draft: Draft) -> None:
    """How many rows a weight has is not known here: the engine refuses groups that are none of ours."""
    key, target = f"{_NAME}.quantize_groups", f"{_NAME}.quantize_groups"
    groups = draft.take(key, "integer")
    if groups is None or groups == 1:
        said = "one scale for a whole weight in DeepSpeed; here each row has its own, which is finer"
        draft.tell(Fate.CHECK, key, said, f"{_NAME}.group_size")
        return
    draft.write(target, groups)
    said = "groups of whole rows become rows with a scale each, which is finer; parts of rows stay; others are refused"
    draft.tell(Fate.CHECK, key, said, target)


def _eigenvalue(draft: Draft, source: str) -> None:
    if not draft.flag(source):
        return
    target = f"{_NAME}.eigenvalue"
    draft.move(f"{source}.enabled", f"{target}.enabled", "flag")
    for key, kind in (("max_iter", "integer"), ("tol", "number"), ("stability", "number"), ("layer_name", "text")):
        draft.move(f"{source}.{key}", f"{target}.{key}", kind)
