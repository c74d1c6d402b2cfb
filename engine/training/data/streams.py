"""Random numbers that follow from a seed and a place, never from what was drawn before or from a global state.

Philox 4x64 is a counter-based generator (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): each
place has its own range of 2^64 counts. NumPy promises that a bit generator's raw stream stays as it is (NEP 19), which
it does not of what is derived from it (``permutation``, ``random``): so only raw draws are used here.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

#: One stream for each use, so that no two uses share numbers.
ORDER, MASKS = 1, 2


def draws(seed: int, use: int, epoch: int, index: int, count: int) -> NDArray[np.uint64]:
    """``count`` uniform 64-bit numbers for the sample ``index`` of ``epoch``."""
    found: NDArray[np.uint64] = np.random.Philox(
        key=np.array([seed, use], np.uint64), counter=np.array([0, index, epoch, 0], np.uint64)
    ).random_raw(count)
    return found


def permutation(seed: int, epoch: int, size: int) -> NDArray[np.int64]:
    """The order of ``size`` samples in ``epoch``: the ranks of as many random numbers."""
    return np.argsort(draws(seed, ORDER, epoch, 0, size), kind="stable")
