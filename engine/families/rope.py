"""Rotary frequencies from a Hugging Face config: plain, and with the published scalings for long contexts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.errors import CheckpointError
from engine.families.base import HFConfig
from ops.spec import RotaryPositions


def rotary_from_hf(
    config: HFConfig, head_dim: int, max_positions: int, *, interleaved: bool = False
) -> RotaryPositions:
    """The rotary embedding that ``config`` describes.

    transformers 4 writes ``rope_theta`` and ``rope_scaling``, transformers 5 ``rope_parameters``; both are read.
    """
    scaling: Mapping[str, Any] = config.values.get("rope_parameters") or config.values.get("rope_scaling") or {}
    reader = HFConfig(scaling, f"{config.where}: rope_scaling")
    theta = reader.get(float, "rope_theta", config.get(float, "rope_theta", 10000.0))
    dim = int(head_dim * reader.get(float, "partial_rotary_factor", config.get(float, "partial_rotary_factor", 1.0)))
    plain = [theta ** (-2 * i / dim) for i in range(dim // 2)]
    kind = reader.get(str, "rope_type", str(scaling.get("type", "default")))
    factor = 1.0
    # "dynamic" scales only past the trained length, which ModelSpec.max_positions never exceeds.
    if kind == "linear":
        plain = [f / reader.get(float, "factor") for f in plain]
    elif kind == "llama3":
        plain = [_llama3(f, reader) for f in plain]
    elif kind == "yarn":
        plain, factor = _yarn(plain, reader, theta, dim, max_positions)
    elif kind not in ("default", "dynamic"):
        raise CheckpointError(
            f"{reader.where}: rope_type {kind!r} is not supported; default, linear, dynamic, llama3, yarn are"
        )
    return RotaryPositions(dim, tuple(plain), factor, interleaved)


def _llama3(frequency: float, scaling: HFConfig) -> float:
    """Llama 3.1's rule: short wavelengths stay, long ones are stretched, those between are blended."""
    factor = scaling.get(float, "factor")
    low, high = scaling.get(float, "low_freq_factor"), scaling.get(float, "high_freq_factor")
    trained = scaling.get(float, "original_max_position_embeddings")
    turns = trained * frequency / (2 * math.pi)
    blend = min(max((turns - low) / (high - low), 0.0), 1.0)
    return frequency * (blend + (1 - blend) / factor)


def _yarn(
    plain: list[float], scaling: HFConfig, theta: float, dim: int, max_positions: int
) -> tuple[list[float], float]:
    """YaRN (Peng et al., arXiv 2309.00071): interpolate slow pairs, keep fast ones, ramp between, sharpen the
    softmax."""
    trained = scaling.get(float, "original_max_position_embeddings", float(max_positions))
    factor = scaling.get(float, "factor", max_positions / trained)

    def pair_that_turns(times: float) -> float:
        return dim * math.log(trained / (times * 2 * math.pi)) / (2 * math.log(theta))

    low = pair_that_turns(scaling.get(float, "beta_fast", 32.0))
    high = pair_that_turns(scaling.get(float, "beta_slow", 1.0))
    if scaling.get(bool, "truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = max(high - low, 0.001)
    ramp = [min(max((i - low) / width, 0.0), 1.0) for i in range(dim // 2)]
    frequencies = [f / factor * r + f * (1 - r) for f, r in zip(plain, ramp, strict=True)]
    return frequencies, scaling.optional(float, "attention_factor") or _yarn_factor(scaling, factor)


def _yarn_factor(scaling: HFConfig, factor: float) -> float:
    """The temperature on cosines and sines: ``0.1 m ln(factor) + 1``, a quotient of two where mscale_all_dim is
    given."""

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    one, both = scaling.optional(float, "mscale"), scaling.optional(float, "mscale_all_dim")
    return mscale(one) / mscale(both) if one and both else mscale(1.0)
