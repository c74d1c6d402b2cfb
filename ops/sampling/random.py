"""Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), as Triton's ``tl.rand``
computes it.

Counter-based: a number depends on its key (seed) and counter alone, so rows draw independently of the batch they are
in, and nothing but two integers a row has to be saved to resume.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
#: Triton's uint_to_uniform_float: the largest factor that maps 2^31 - 1, rounded to fp32, below 1.
_TO_UNIT = 4.6566127342e-10


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Ten rounds on counters [4, B] with keys [2, B] to random words [4, B]; all are 32-bit words in int64."""
    multipliers, steps = _constants(counter.device)
    even, odd = counter[0::2], counter[1::2]
    for round_key in (key + steps).unbind():
        # An int64 product wraps around, which leaves the bits of the unsigned product. The mask drops the copies of the
        # sign that >> drags in, and the upper halves that the words of ``odd`` still have.
        product = (even * multipliers).flip(0)
        even, odd = (product >> 32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_MASK), product
    return torch.stack((even[0], odd[0] & _MASK, even[1], odd[1] & _MASK))


def philox_uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """One fp32 number in [0, 1) for each row of ``seed`` [B] and ``counter`` [B], both int64.

    Equal bit for bit to Triton's ``tl.rand(seed, counter)`` with a 64-bit offset (key: the seed's low and high word;
    counter: low, high, 0, 0), and to that with a 32-bit offset while counters stay below 2^32.
    """
    zero = torch.zeros_like(counter)
    words = torch.stack((counter & _MASK, (counter >> 32) & _MASK, zero, zero))
    bits = philox4x32(words, torch.stack((seed & _MASK, (seed >> 32) & _MASK)))[0]
    # Read as int32, a negative number x becomes -x - 1, which is the unsigned word's complement.
    return torch.minimum(bits, _MASK - bits).to(torch.float32) * _TO_UNIT


@lru_cache(maxsize=16)
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    """The multipliers [2, 1] and each round's addition to the key [10, 2, 1], copied to a device once."""
    with torch.inference_mode(False):
        multipliers = torch.tensor(_MULTIPLIERS, device=device).unsqueeze(1)
        rounds = torch.arange(_ROUNDS, device=device).view(-1, 1, 1)
        steps = rounds * torch.tensor(_KEY_STEPS, device=device).unsqueeze(1)
    return multipliers, steps
