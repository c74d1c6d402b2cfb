"""How to generate: the caller's wishes over the config's over the checkpoint's, with Hugging Face's names and
meanings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.errors import EngineError

#: Hugging Face's defaults where nobody says anything.
MAX_NEW_TOKENS = 20
TOP_K = 50

#: GenerationConfig attributes that change the text in ways that are not built here, with the value that leaves them
#: off.
UNSUPPORTED: Mapping[str, Any] = {
    "num_beams": 1,
    "num_beam_groups": 1,
    "num_return_sequences": 1,
    "penalty_alpha": 0.0,
    "diversity_penalty": 0.0,
    "no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "min_p": 0.0,
    "top_h": None,
    "bad_words_ids": None,
    "force_words_ids": None,
    "constraints": None,
    "sequence_bias": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "guidance_scale": 1.0,
    "dola_layers": None,
    "watermarking_config": None,
    "prompt_lookup_num_tokens": None,
    "max_time": None,
}


@dataclass(frozen=True)
class SamplingParams:
    """One request's sampling, every value decided.

    max_new_tokens:     stop after so many tokens.
    min_new_tokens:     no end-of-sequence token before so many.
    temperature:        0 is greedy.
    top_k:              keep the k most likely tokens; 0 keeps all.
    top_p:              keep the fewest tokens whose probabilities sum to this; 1 keeps all.
    repetition_penalty: divides the positive and multiplies the negative logits of tokens seen; 1 is off.
    stop:               texts that end the output; they are not part of it.
    stop_ids:           end-of-sequence ids; empty if they are ignored.
    seed:               of the row's own random stream.
    logprobs:           None, or how many alternatives to report beside each chosen token's log-probability.
    """

    max_new_tokens: int
    min_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    repetition_penalty: float
    stop: tuple[str, ...]
    stop_ids: frozenset[int]
    seed: int
    logprobs: int | None


#: What a caller, a config or a checkpoint may say; None leaves it to the next.
OPTIONS = (
    "max_new_tokens",
    "min_new_tokens",
    "do_sample",
    "temperature",
    "top_k",
    "top_p",
    "repetition_penalty",
    "stop",
    "seed",
    "logprobs",
    "ignore_eos",
    "eos_token_id",
)
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p")


def resolve(*layers: Mapping[str, Any], fresh_seed: int) -> SamplingParams:
    """Merges ``layers`` of options, the strongest first (caller, GenerationConfig, config, checkpoint).

    Sampling happens where ``do_sample`` says so, or where a layer stronger than the one that says no gives a
    temperature above 0, a top_k or a top_p: an option that is given is applied. ``fresh_seed`` serves where no seed is
    given.
    """
    merged: dict[str, Any] = {}
    for layer in reversed(layers):
        given = {key: value for key, value in layer.items() if value is not None}
        if "do_sample" not in given and any(key in given for key in SAMPLING_OPTIONS):
            merged["do_sample"] = given.get("temperature", 1.0) != 0
        merged.update(given)
    sampling = bool(merged.get("do_sample", False)) and merged.get("temperature", 1.0) != 0
    eos = merged.get("eos_token_id")
    stop_ids = frozenset([eos] if isinstance(eos, int) else eos or ())
    stop = merged.get("stop") or ()
    params = SamplingParams(
        max_new_tokens=merged.get("max_new_tokens", MAX_NEW_TOKENS),
        min_new_tokens=merged.get("min_new_tokens", 0),
        temperature=float(merged.get("temperature", 1.0)) if sampling else 0.0,
        top_k=merged.get("top_k", TOP_K) if sampling else 0,
        top_p=float(merged.get("top_p", 1.0)) if sampling else 1.0,
        repetition_penalty=float(merged.get("repetition_penalty", 1.0)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stop_ids=frozenset() if merged.get("ignore_eos") else stop_ids,
        seed=merged.get("seed", fresh_seed),
        logprobs=merged.get("logprobs"),
    )
    _check(params)
    return params


def within(params: SamplingParams, vocab_size: int) -> SamplingParams:
    """``params`` without end-of-sequence ids that the vocabulary does not hold (configs copied from other models)."""
    return replace(params, stop_ids=frozenset(token for token in params.stop_ids if 0 <= token < vocab_size))


def _check(params: SamplingParams) -> None:
    ranges: tuple[tuple[str, bool, str], ...] = (
        ("max_new_tokens", params.max_new_tokens >= 1, "at least 1"),
        ("min_new_tokens", 0 <= params.min_new_tokens <= params.max_new_tokens, "from 0 to max_new_tokens"),
        ("temperature", params.temperature >= 0, "0 (greedy) or more"),
        ("top_k", params.top_k >= 0, "0 (off) or more"),
        ("top_p", 0 < params.top_p <= 1, "above 0 and at most 1"),
        ("repetition_penalty", params.repetition_penalty > 0, "above 0 (1 is off)"),
        ("stop", all(params.stop), "texts that are not empty"),
        ("seed", 0 <= params.seed < 2**63, "from 0 to 2**63 - 1"),
        ("logprobs", params.logprobs is None or 0 <= params.logprobs <= 20, "from 0 to 20"),
    )
    for name, fits, wanted in ranges:
        if not fits:
            raise EngineError(f"{name}: got {getattr(params, name)!r}, wanted {wanted}")


def checked(options: Mapping[str, Any]) -> dict[str, Any]:
    """A caller's options, refused by name where there is no such option or its type is wrong."""
    numbers = {"max_new_tokens", "min_new_tokens", "top_k", "seed"}
    for name, value in options.items():
        if value is None:
            continue
        integer = isinstance(value, int) and not isinstance(value, bool)
        if name in numbers and not integer:
            raise EngineError(f"{name}: got {value!r}, wanted an integer")
        if name in ("temperature", "top_p", "repetition_penalty") and not (integer or isinstance(value, float)):
            raise EngineError(f"{name}: got {value!r}, wanted a number")
        if name == "stop" and not (isinstance(value, str) or all(isinstance(text, str) for text in value)):
            raise EngineError(f"stop: got {value!r}, wanted a text or a list of texts")
    off = (
        "do_sample=False"
        if options.get("do_sample") is False
        else "temperature=0"
        if options.get("temperature") == 0
        else ""
    )
    for name in ("temperature", "top_k", "top_p") if off else ():
        if options.get(name) and options[name] != (1 if name == "top_p" else None):
            raise EngineError(f"{name}={options[name]!r} has no effect with {off}: leave one of the two out")
    if options.get("logprobs") is not None and isinstance(options["logprobs"], bool):
        return {**options, "logprobs": 0 if options["logprobs"] else None}
    return dict(options)


def from_generation_config(config: Any) -> dict[str, Any]:
    """The options of a Hugging Face ``GenerationConfig`` (or its dictionary); what is not built here is refused by
    name."""
    values: Mapping[str, Any] = config if isinstance(config, Mapping) else config.to_dict()
    for name, off in UNSUPPORTED.items():
        if values.get(name) not in (None, off):
            raise EngineError(f"GenerationConfig.{name}: {values[name]!r} is not supported; leave it at {off!r}")
    options = {key: values.get(key) for key in OPTIONS if key != "stop"}
    options["stop"] = values.get("stop_strings")
    return options


def length_limit(values: Mapping[str, Any], prompt: int) -> int | None:
    """``max_length`` of a GenerationConfig as new tokens, where it says nothing of ``max_new_tokens``."""
    limit = values.get("max_length")
    if values.get("max_new_tokens") is not None or not isinstance(limit, int):
        return None
    return max(limit - prompt, 1)


def option_names(options: Sequence[str]) -> None:
    """Raises for a name that is no option, with what is meant."""
    import difflib

    for name in options:
        if name not in OPTIONS:
            close = difflib.get_close_matches(name, OPTIONS, n=1)
            hint = f', did you mean "{close[0]}"?' if close else ""
            raise EngineError(f"generate: unknown option {name!r}{hint} (allowed: {', '.join(OPTIONS)})")
