"""Sampling on the device: counter-based random numbers, Hugging Face's logits processors by row, and the draw."""

from __future__ import annotations

from ops.sampling.random import philox4x32, philox_uniform
from ops.sampling.sample import SampleOutput, TokenLogprobs, sample, token_logprobs
from ops.sampling.state import SamplingError, SamplingPlan, SamplingState

__all__ = [
    "SampleOutput",
    "SamplingError",
    "SamplingPlan",
    "SamplingState",
    "TokenLogprobs",
    "philox4x32",
    "philox_uniform",
    "sample",
    "token_logprobs",
]
