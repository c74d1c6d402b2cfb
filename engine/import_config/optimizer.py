"""From DeepSpeed's optimizers and schedulers to ours."""

from __future__ import annotations

import difflib
from typing import Any

from engine.import_config.draft import Draft, shown
from engine.import_config.keys import Fate

_KINDS = {
    "adam": "AdamW",
    "adamw": "AdamW",
    "lamb": "LAMB",
    "onebitadam": "OneBitAdam",
    "zerooneadam": "ZeroOneAdam",
    "onebitlamb": "OneBitLamb",
}
_TRUST = {"max_coeff": "number", "min_coeff": "number"}
#: What each kind has of its own: the key, which is ours too, and its kind of value.
_OWN = {
    "LAMB": _TRUST,
    "OneBitAdam": {"freeze_step": "integer"},
    "OneBitLamb": {
        "freeze_step": "integer",
        **_TRUST,
        **dict.fromkeys(("coeff_beta", "factor_max", "factor_min", "factor_threshold"), "number"),
    },
    "ZeroOneAdam": dict.fromkeys(
        ("var_freeze_step", "var_update_scaler", "local_step_scaler", "local_step_clipper"), "integer"
    ),
}
COMPRESSED = ("OneBitAdam", "OneBitLamb", "ZeroOneAdam")
_DECAY = "decay_all is true, as DeepSpeed decays all that it is given: false if you gave it groups"
_PARAMS = "optimizer.params"


def optimizer(draft: Draft) -> None:
    """AdamW, LAMB and the compressed ones. DeepSpeed's defaults are written where ours are others."""
    if draft.take("optimizer", "section") is None:
        return
    given = draft.take("optimizer.type", "text")
    if given is None:
        draft.problem("optimizer.type", "missing, wanted the name of an optimizer")
        return
    kind = _KINDS.get(given.lower())
    if kind is None:
        said = f"there is no {given}, only AdamW, LAMB, {', '.join(COMPRESSED)}: choose one, with its rate"
        draft.tell(Fate.DROPPED, "optimizer", said)
        return
    draft.write("optimizer.type", kind)
    if given.lower() == "adam":
        said = "AdamW: DeepSpeed's Adam decouples weight decay too"
        draft.tell(Fate.MAPPED, "optimizer.type", said, "optimizer.type")
    else:
        corrected = kind == "LAMB" and draft.get(f"{_PARAMS}.bias_correction") is not False
        said = "the trust ratio is of the bias-corrected update, as in the paper; DeepSpeed's is not"
        fate, reason = (Fate.CHECK, said) if corrected else (Fate.MAPPED, "")
        draft.tell(fate, "optimizer.type", reason, "optimizer.type")
    draft.take(_PARAMS, "section")
    _rate(draft)
    draft.move(f"{_PARAMS}.betas", "optimizer.betas", "pair")
    draft.move(f"{_PARAMS}.eps", "optimizer.eps", "number")
    _decay(draft)
    _bias_correction(draft, kind)
    for name, value_kind in _OWN.get(kind, {}).items():
        draft.move(f"{_PARAMS}.{name}", f"optimizer.{name}", value_kind)
    for name in ("amsgrad", "adam_w_mode"):
        key = f"{_PARAMS}.{name}"
        value = draft.take(key, "flag")
        if value is None:
            continue
        harmless = value is (name == "adam_w_mode") or (name == "adam_w_mode" and given.lower() == "adamw")
        said = "" if harmless else "weight decay is decoupled" if name == "adam_w_mode" else "there is no AMSGrad"
        draft.tell(Fate.OFF if harmless else Fate.DROPPED, key, said)


def _rate(draft: Draft) -> None:
    if draft.move(f"{_PARAMS}.lr", "optimizer.lr", "number") is None:
        draft.write("optimizer.lr", 1e-3)
        draft.tell(Fate.MAPPED, f"{_PARAMS}.lr", "0.001, DeepSpeed's default", "optimizer.lr")


def _decay(draft: Draft) -> None:
    key, target = f"{_PARAMS}.weight_decay", "optimizer.weight_decay"
    given = draft.take(key, "number")
    if given is None:
        draft.write(target, 0.0)
        draft.tell(Fate.MAPPED, key, "0, DeepSpeed's default", target)
    else:
        draft.move(key, target, "number", _DECAY if given not in (0, "auto") else "")
        if given:
            draft.write("optimizer.decay_all", True)


def _bias_correction(draft: Draft, kind: str) -> None:
    key = f"{_PARAMS}.bias_correction"
    given = draft.take(key, "flag")
    if kind in COMPRESSED:
        said = f"false: DeepSpeed's {kind} corrects no moments" + (", whatever this key says" if given else "")
        draft.write("optimizer.bias_correction", False)
        draft.tell(Fate.CHECK if given else Fate.MAPPED, key, said, "optimizer.bias_correction")
        return
    if given is None:
        return
    if kind == "LAMB":
        draft.move(key, "optimizer.bias_correction", "flag")
    elif given is False:
        draft.tell(Fate.DROPPED, key, "AdamW always corrects its moments")
    else:
        draft.tell(Fate.OFF, key)


# ---- schedulers ----

_SP = "scheduler.params"
_TYPES = {
    "WarmupLR": "constant",
    "WarmupDecayLR": "linear",
    "WarmupCosineLR": "cosine",
    "OneCycle": "one_cycle",
    "LRRangeTest": None,
}


def scheduler(draft: Draft) -> None:
    """The four that end somewhere; a range test is none."""
    if draft.take("scheduler", "section") is None:
        return
    given = draft.take("scheduler.type", "text")
    if given is None:
        draft.problem("scheduler.type", "missing, wanted the name of a scheduler")
        return
    if given not in _TYPES:
        close = difflib.get_close_matches(given, _TYPES, n=1)
        hint = f', did you mean "{close[0]}"?' if close else ""
        draft.tell(
            Fate.DROPPED, "scheduler", f"DeepSpeed has no {given} of its own{hint} $.schedule has the kinds here"
        )
        return
    kind = _TYPES[given]
    if kind is None:
        said = "there is no range test: try rates with --set optimizer.lr=..."
        draft.tell(Fate.DROPPED, "scheduler", said)
        return
    draft.write("schedule.type", kind)
    if kind == "one_cycle":
        _one_cycle(draft)
    else:
        draft.tell(Fate.MAPPED, "scheduler.type", "", "schedule.type")
        _warm_up(draft, given)


def _warm_up(draft: Draft, given: str) -> None:
    steps, key = "schedule.warmup_steps", f"{_SP}.warmup_num_steps"
    if draft.move(key, steps, "integer") is None:
        draft.write(steps, 1000)
        draft.tell(Fate.MAPPED, key, "1000, DeepSpeed's default", steps)
    shape, key = draft.take(f"{_SP}.warmup_type", "text"), f"{_SP}.warmup_type"
    if shape == "linear":
        draft.tell(Fate.MAPPED, key, "as all of ours", "schedule.type")
    elif draft.document["schedule"]["warmup_steps"] or draft.get(f"{_SP}.warmup_num_steps") == "auto":
        said = "the rate rises in a straight line, DeepSpeed's along a logarithm"
        draft.tell(Fate.CHECK, key, said + ("" if shape else ", its default"), "schedule.type")
    elif shape is not None:
        draft.tell(Fate.OFF, key)
    key = f"{_SP}.warmup_min_ratio" if given == "WarmupCosineLR" else f"{_SP}.warmup_min_lr"
    if draft.filled(key, "number"):
        draft.tell(Fate.DROPPED, key, "the rate rises from 0")
    elif draft.get(key) is not None:
        draft.tell(Fate.OFF, key)
    if given != "WarmupCosineLR":
        _highest(draft, f"{_SP}.warmup_max_lr", 0.001 if given == "WarmupDecayLR" else None)
    if given != "WarmupLR" and draft.move(f"{_SP}.total_num_steps", "schedule.total_steps", "integer") is None:
        draft.problem(f"{_SP}.total_num_steps", f"missing, wanted the number of steps at whose end {given} ends")
    end = draft.take(f"{_SP}.cos_min_ratio", "number")
    if given == "WarmupCosineLR" and end is not None:
        draft.tell(Fate.CHECK if end else Fate.MAPPED, f"{_SP}.cos_min_ratio", "the rate falls to 0", "schedule.type")


def _highest(draft: Draft, key: str, default: float | None) -> None:
    """DeepSpeed takes the scheduler's highest rate, whatever the optimizer's is; ours is the optimizer's."""
    rate: Any = draft.filled(key, "number")
    given = draft.get(key)
    rate = default if rate is None else rate
    if rate is None:
        return
    if "optimizer" not in draft.document:
        draft.write("optimizer", {"type": "AdamW", "lr": rate, "weight_decay": 0.0})
        draft.tell(Fate.CHECK, key, "the file has no optimizer that can be taken over: AdamW is written", "optimizer")
        return
    before = draft.document["optimizer"]["lr"]
    draft.write("optimizer.lr", rate)
    if given == "auto":
        draft.tell_auto(key, "optimizer.lr")
    elif before != rate:
        what = f"{shown(rate)}, DeepSpeed's default, " if given is None else ""
        draft.tell(
            Fate.CHECK, key, f"{what}goes before the optimizer's {shown(before)}, as in DeepSpeed", "optimizer.lr"
        )
    elif given is not None:
        draft.tell(Fate.MAPPED, key, "", "optimizer.lr")


def _one_cycle(draft: Draft) -> None:
    _highest(draft, f"{_SP}.cycle_max_lr", None)
    first = draft.take(f"{_SP}.cycle_first_step_size", "integer")
    second = draft.take(f"{_SP}.cycle_second_step_size", "integer")
    up = 2000 if first is None else first
    down = up if second is None else second
    draft.write("schedule.warmup_steps", up)
    draft.write("schedule.total_steps", up + down)
    said = "" if first is not None else "2000, DeepSpeed's default"
    draft.tell(Fate.MAPPED, f"{_SP}.cycle_first_step_size", said, "schedule.warmup_steps")
    said = f"{up} steps up and {down} down"
    draft.tell(Fate.MAPPED, f"{_SP}.cycle_second_step_size", said, "schedule.total_steps")
    said = (
        f"along a cosine from a 25th of the highest rate, near 0 from step {up + down} on, and the betas stay; "
        "DeepSpeed's goes in lines from cycle_min_lr, back to it and on from there, and moves the betas"
    )
    draft.tell(Fate.CHECK, "scheduler.type", said, "schedule.type")
    if draft.take(f"{_SP}.cycle_min_lr", "number") is not None:
        draft.tell(Fate.DROPPED, f"{_SP}.cycle_min_lr", "the cycle begins at a 25th of the highest rate")
