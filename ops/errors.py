"""Errors of the kernels."""

from __future__ import annotations

from config_schema.errors import SlipstreamError


class KernelError(SlipstreamError):
    """A kernel set cannot do what was asked of it: the message says what, and what to set instead."""


class IdError(KernelError):
    """A step was given a token id or token type outside the model's tables; nothing was read there."""
