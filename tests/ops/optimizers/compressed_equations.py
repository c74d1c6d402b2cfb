"""1-bit Adam (arXiv 2102.02888), 1-bit LAMB (2104.06069) and 0/1 Adam (2202.06009) straight from the papers, for all
ranks at
once, in double precision and NumPy, to compare with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

Arrays = Sequence[np.ndarray]
#: The mean of one array a rank, as the exchange gives it: exact, or of signs.
Mean = Callable[[Arrays], np.ndarray]


def exact_mean(parts: Arrays) -> np.ndarray:
    """What an exchange without compression gives."""
    return np.mean(np.stack(parts), axis=0)


@dataclass
class SignMean:
    """The error-compensated mean of signs of arrays of n elements, in two phases; ``bounds`` are those of the ranks'
    chunks, ``parts`` elements whose signs have a size of their own.

    Each rank sends sign(b) and, of each part, the root mean square of b = x + its error; each server does the same with
    the mean of what it got for its chunk, and what of each part lies in it.
    """

    bounds: list[int]
    parts: list[int]
    worker: list[np.ndarray] = field(init=False)
    server: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.worker = [np.zeros(self.bounds[-1]) for _ in self.bounds[1:]]
        self.server = np.zeros(self.bounds[-1])

    def __call__(self, parts: Arrays) -> np.ndarray:
        """The mean that all ranks get; the errors are updated."""
        ends = np.cumsum(self.parts)
        sent = [self._compressed(part + error, ends) for part, error in zip(parts, self.worker, strict=True)]
        self.worker = [part + error - one for part, error, one in zip(parts, self.worker, sent, strict=True)]
        mean = np.mean(sent, axis=0) + self.server
        found = self._compressed(mean, np.union1d(ends, self.bounds))
        self.server = mean - found
        return found

    @staticmethod
    def _compressed(values: np.ndarray, ends: np.ndarray) -> np.ndarray:
        pieces = [piece for piece in np.split(values, ends) if piece.size]
        return np.concatenate([np.sqrt(np.mean(one**2)) * np.where(one >= 0, 1.0, -1.0) for one in pieces])


@dataclass
class PaperOneBitAdam:
    """The parameters of a model as arrays; ``step`` takes each rank's gradients of them.

    Up to ``freeze`` steps this is AdamW on mean gradients. Then the variance stands, each rank moves the common
    momentum by
    its own gradient, and the momenta's exchanged mean is the new one. Where the variance is zero nothing ever had a
    gradient:
    signs would move it, so its momentum stays zero.
    """

    weights: list[np.ndarray]
    freeze: int
    mean: Mean
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    corrected: bool = True
    t: int = 0

    def __post_init__(self) -> None:
        self.weights = [np.array(weight, dtype=np.float64) for weight in self.weights]
        self.m = [np.zeros_like(weight) for weight in self.weights]
        self.v = [np.zeros_like(weight) for weight in self.weights]

    def step(self, gradients: Sequence[Arrays], rate: float) -> None:
        """``gradients[rank][parameter]``."""
        self.t += 1
        if self.t <= self.freeze:
            self._warm_up([exact_mean([own[i] for own in gradients]) for i in range(len(self.weights))])
        else:
            self._exchange(gradients)
        self._update(rate)

    def _warm_up(self, gradients: Arrays) -> None:
        beta1, beta2 = self.betas
        for i, gradient in enumerate(gradients):
            self.m[i] = beta1 * self.m[i] + (1 - beta1) * gradient
            self.v[i] = beta2 * self.v[i] + (1 - beta2) * gradient**2

    def _exchange(self, gradients: Sequence[Arrays]) -> None:
        beta1 = self.betas[0]
        own = [
            np.concatenate([(beta1 * m + (1 - beta1) * g).ravel() for m, g in zip(self.m, rank, strict=True)])
            for rank in gradients
        ]
        self._take(self.mean(own))

    def _take(self, flat: np.ndarray) -> None:
        begin = 0
        for i, v in enumerate(self.v):
            self.m[i] = np.where(v > 0, flat[begin : begin + v.size].reshape(v.shape), 0.0)
            begin += v.size

    def corrections(self) -> tuple[float, float]:
        """Of the two moments; the variance's stands with it."""
        if not self.corrected:
            return 1.0, 1.0
        return 1 - self.betas[0] ** self.t, 1 - self.betas[1] ** min(self.t, self.freeze)

    def directions(self) -> list[np.ndarray]:
        """What the weights move along."""
        c1, c2 = self.corrections()
        return [
            (m / c1) / (np.sqrt(v / c2) + self.eps) + self.decay * w
            for m, v, w in zip(self.m, self.v, self.weights, strict=True)
        ]

    def _update(self, rate: float) -> None:
        self.weights = [w - rate * u for w, u in zip(self.weights, self.directions(), strict=True)]


def norm(values: np.ndarray) -> float:
    """Euclidean."""
    return float(np.sqrt((values**2).sum()))


@dataclass
class PaperOneBitLamb(PaperOneBitAdam):
    """Up to ``freeze`` steps LAMB on mean gradients, whose ratios' moving average is kept for each parameter. Then
    momenta are
    brought to one size (``scales``, fixed at the freeze) before they are exchanged together and back after; the ratio
    is the
    kept one times what the variance, reconstructed from the momenta, has changed by.
    """

    bounds: tuple[float, float] = (0.01, 10.0)
    keep: float = 0.9
    factors: tuple[float, float] = (0.5, 4.0)
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        count = len(self.weights)
        self.kept, self.last, self.ratios = [0.0] * count, [1.0] * count, [1.0] * count
        self.fresh: list[np.ndarray] = []
        self.scales: list[float] = []

    def _exchange(self, gradients: Sequence[Arrays]) -> None:
        beta1, beta2 = self.betas
        if not self.scales:
            sizes = [norm(m) / np.sqrt(m.size) for m in self.m]
            self.scales = [np.mean(sizes) / size if size else 1.0 for size in sizes]
            self.fresh = [v.copy() for v in self.v]
        before = [m.copy() for m in self.m]
        own = [
            np.concatenate(
                [
                    ((beta1 * m + (1 - beta1) * g) * scale).ravel()
                    for m, g, scale in zip(self.m, rank, self.scales, strict=True)
                ]
            )
            for rank in gradients
        ]
        self._take(self.mean(own))
        self.m = [m / scale for m, scale in zip(self.m, self.scales, strict=True)]
        for i, (m, old) in enumerate(zip(self.m, before, strict=True)):
            gradient = (m - beta1 * old) / (1 - beta1)
            self.fresh[i] = beta2 * self.fresh[i] + (1 - beta2) * gradient**2

    def _update(self, rate: float) -> None:
        directions = self.directions()
        for i, (w, u) in enumerate(zip(self.weights, directions, strict=True)):
            self.ratios[i] = self._warm_ratio(i, w, u) if self.t <= self.freeze else self._frozen_ratio(i, w, u)
            self.weights[i] = w - rate * self.ratios[i] * u

    def _warm_ratio(self, i: int, weight: np.ndarray, direction: np.ndarray) -> float:
        ratio = 1.0
        if norm(weight) > 0 and norm(direction) > 0:
            ratio = min(max(norm(weight) / norm(direction), self.bounds[0]), self.bounds[1])
            # In the papers' code a ratio that was not taken leaves no trace.
            self.kept[i] = self.keep * self.kept[i] + (1 - self.keep) * ratio
        return ratio

    def _frozen_ratio(self, i: int, weight: np.ndarray, direction: np.ndarray) -> float:
        c1, c2 = self.corrections()
        old, new = np.sqrt(self.v[i] / c2) + self.eps, np.sqrt(self.fresh[i] / c2) + self.eps
        factor = float((old / new).max())
        if self.decay:
            share = min(1.0, norm(self.m[i] / c1 / old) / norm(direction)) if norm(direction) else 1.0
            factor = factor * share + (1 - share)
        factor = min(max(factor, self.factors[0]), self.factors[1])
        factor = min(max(factor, self.last[i] * (1 - self.threshold)), self.last[i] * (1 + self.threshold))
        self.last[i] = factor
        return self.kept[i] * factor


@dataclass
class PaperZeroOneAdam:
    """Each rank's weights in ``weights[rank]``. ``means`` are of gradients, up to ``freeze`` steps, and of momenta
    behind it."""

    start: list[np.ndarray]
    ranks: int
    freeze: int
    means: tuple[Mean, Mean]
    kappa: int = 2
    scaler: int = 3
    clipper: int = 4
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    decay: float = 0.0
    t: int = 0

    def __post_init__(self) -> None:
        flat = np.concatenate([np.asarray(weight, dtype=np.float64).ravel() for weight in self.start])
        self.weights = [flat.copy() for _ in range(self.ranks)]
        self.m = [np.zeros_like(flat) for _ in range(self.ranks)]
        self.v, self.sums = np.zeros_like(flat), [np.zeros_like(flat) for _ in range(self.ranks)]
        self.interval, self.count, self.own, self.alone, self.local, self.rates = 1, 0, 1, 0, 0, 0.0

    def step(self, gradients: Sequence[Arrays], rate: float) -> None:
        """``gradients[rank][parameter]``."""
        self.t += 1
        own = [np.concatenate([one.ravel() for one in rank]) for rank in gradients]
        if self.t > self.freeze:
            self._alone(own, rate)
            return
        beta1, beta2 = self.betas
        if self.t % self.interval == 0:
            mean = exact_mean(own)
            self.v = beta2 * self.v + (1 - beta2) * mean**2
            self.count += 1
        else:
            mean = np.where(self.v > 0, self.means[0](own), 0.0)
        if self.count == self.kappa:
            self.count, self.interval = 0, 2 * self.interval
        for r in range(self.ranks):
            self.m[r] = beta1 * self.m[r] + (1 - beta1) * mean
            self.weights[r] = self.weights[r] - rate * self._way(r)

    def _way(self, r: int) -> np.ndarray:
        return self.m[r] / (np.sqrt(self.v) + self.eps) + self.decay * self.weights[r]

    def _alone(self, own: Arrays, rate: float) -> None:
        beta1, denominator = self.betas[0], np.sqrt(self.v) + self.eps
        self.rates += rate
        for r, gradient in enumerate(own):
            self.m[r] = beta1 * self.m[r] + (1 - beta1) * gradient
            way = rate * self._way(r)
            self.sums[r], self.weights[r] = self.sums[r] + way, self.weights[r] - way
        self.alone += 1
        if self.alone == self.own:
            together = self.weights[0] + self.sums[0]
            mean = np.where(self.v > 0, self.means[1]([total * denominator for total in self.sums]), 0.0)
            for r in range(self.ranks):
                self.weights[r] = together - mean / denominator
                self.m[r], self.sums[r] = mean / self.rates, np.zeros_like(self.v)
            self.alone, self.rates = 0, 0.0
        self.local += 1
        if self.local == self.scaler:
            self.local, self.own = 0, min(2 * self.own, self.clipper)
