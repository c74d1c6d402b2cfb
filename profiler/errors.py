"""Errors of the profiler."""

from __future__ import annotations

from config_schema.errors import SlipstreamError


class ProfilerError(SlipstreamError):
    """Something cannot be profiled as it was asked: the message says what, and what to do instead."""
