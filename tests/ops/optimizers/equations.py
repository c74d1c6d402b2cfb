"""LAMB straight from the paper (arXiv 1904.00962, algorithm 2), in double precision and NumPy, to compare with."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np


@dataclass
class PaperLamb:
    """One tensor's LAMB. ``bounds`` clip the ratio of norms (DeepSpeed's min_coeff and max_coeff)."""

    weight: np.ndarray
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    bounds: tuple[float, float] = (0.01, 10.0)
    corrected: bool = True
    t: int = 0
    ratio: float = 1.0
    m: np.ndarray = field(init=False)
    v: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.weight = np.array(self.weight, dtype=np.float64)
        self.m, self.v = np.zeros_like(self.weight), np.zeros_like(self.weight)

    def step(self, gradient: np.ndarray, rate: float) -> None:
        """One update."""
        gradient = np.asarray(gradient, dtype=np.float64)
        (beta1, beta2), self.t = self.betas, self.t + 1
        self.m = beta1 * self.m + (1 - beta1) * gradient
        self.v = beta2 * self.v + (1 - beta2) * gradient**2
        m_hat = self.m / (1 - beta1**self.t) if self.corrected else self.m
        v_hat = self.v / (1 - beta2**self.t) if self.corrected else self.v
        update = m_hat / (np.sqrt(v_hat) + self.eps) + self.decay * self.weight
        weight_norm, update_norm = np.sqrt((self.weight**2).sum()), np.sqrt((update**2).sum())
        self.ratio = 1.0
        if weight_norm > 0 and update_norm > 0:
            self.ratio = min(max(weight_norm / update_norm, self.bounds[0]), self.bounds[1])
        self.weight = self.weight - rate * self.ratio * update
