"""The trust ratio of layer-wise optimizers: how far a tensor may move, measured by its own size."""

from __future__ import annotations

from torch import Tensor


def trust_ratios(
    weight_norms: Tensor, update_norms: Tensor, min_coeff: float | None = None, max_coeff: float | None = None
) -> Tensor:
    """``weight_norms / update_norms`` ([n], on one device) within ``min_coeff`` and ``max_coeff`` (None: no bound).

    It is 1 where either norm is 0, whatever the bounds: a bias that starts at 0 has no size to be measured by
    (arXiv 1904.00962, section 3; the bounds of the ratio are DeepSpeed's). NaN stays NaN. Nothing waits for the device.
    """
    ratios = weight_norms / update_norms
    if min_coeff is not None or max_coeff is not None:
        ratios = ratios.clamp(min_coeff, max_coeff)
    return ratios.masked_fill_((weight_norms == 0) | (update_norms == 0), 1.0)
