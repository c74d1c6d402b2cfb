"""Numbers as people read them: three digits, and the prefix of the SI that fits."""

from __future__ import annotations

import math

_LARGE = ("", "K", "M", "G", "T", "P", "E")
_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))

#: Stands where there is no number.
NOTHING = "-"


def quantity(number: float | None, unit: str = "") -> str:
    """``12.3 K``, ``1.23 GB``: decimal prefixes, at most seven signs beside the unit's. ``-`` for None."""
    if number is None:
        return NOTHING
    if not math.isfinite(number):
        return "inf"
    scaled, prefix = float(number), 0
    # 999.5 would be written as 1000.
    while abs(scaled) >= 999.5 and prefix < len(_LARGE) - 1:
        scaled, prefix = scaled / 1000, prefix + 1
    exact = prefix == 0 and scaled == int(scaled)
    return f"{int(scaled) if exact else _digits(scaled)} {_LARGE[prefix]}{unit}".rstrip()


def seconds(number: float | None) -> str:
    """``1.23 ms``, in s, ms, us or ns. ``-`` for None."""
    return _small(number, "s")


def joules(number: float | None) -> str:
    """``1.23 mJ``, in J, mJ, uJ or nJ, and larger ones as ``quantity`` has them. ``-`` for None."""
    return quantity(number, "J") if number is not None and number >= 1 else _small(number, "J")


def _small(number: float | None, unit: str) -> str:
    if number is None:
        return NOTHING
    if number == 0:
        return "0"
    scale, prefix = next((one for one in _SMALL if abs(number) >= 0.9995 * one[0]), _SMALL[-1])
    return f"{_digits(number / scale)} {prefix}{unit}"


def percentage(share: float | None) -> str:
    """``31%``, ``2.4%``, ``<0.1%``, ``>999%``: a tenth below ten. ``-`` for None."""
    if share is None or not math.isfinite(share):
        return NOTHING
    percent = 100 * share
    if 0 < percent < 0.05:
        return "<0.1%"
    if percent >= 999.5:
        return ">999%"
    return f"{percent:.0f}%" if abs(percent) >= 9.95 or percent == 0 else f"{percent:.1f}%"


def many(number: int, what: str) -> str:
    """``1 sample``, ``1,024 tokens``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def _digits(number: float) -> str:
    """Three of them, of a number below 1,000."""
    size = abs(number)
    return f"{number:.0f}" if size >= 99.95 else f"{number:.1f}" if size >= 9.995 else f"{number:.2f}"
