"""How well a model does: sums, or gathered predictions, over batches and processes, and the figures that follow."""

from __future__ import annotations

import math
import re
import string
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import EngineError

#: The figures of each task; the first is the one it is judged by where nothing else is said.
FIGURES: Mapping[str, tuple[str, ...]] = {
    "masked_lm": ("loss", "perplexity"),
    "causal_lm": ("loss", "perplexity"),
    "classification": ("accuracy", "f1", "f1_macro", "matthews"),
    "regression": ("pearson", "spearman", "mse"),
    "question_answering": ("f1", "exact_match"),
}
#: Figures of which the smaller is the better.
SMALLER_IS_BETTER = frozenset(("loss", "perplexity", "mse"))

#: A metric's sums or predictions, as arrays that another process's can be merged with.
State = dict[str, NDArray[Any]]
#: Rows of logits whose softmax is computed at a time.
LOSS_ROWS = 1024
IGNORED = -100


class Metric(ABC):
    """Collects the outputs of batches. Figures are shares from 0 to 1, correlations from -1 to 1, losses in nats."""

    @abstractmethod
    def update(self, outputs: Any, labels: Any, indices: Any = None) -> None:
        """Takes in a batch: a model's outputs (tensors or arrays), the labels, the samples' numbers in the data."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The figures, by name. Raises :class:`EngineError` where nothing was taken in."""

    @abstractmethod
    def state(self) -> State:
        """All that was taken in, to be merged elsewhere."""

    @abstractmethod
    def merge(self, states: Sequence[State]) -> None:
        """Replaces what was taken in by all of ``states``, one a process, in the order of their ranks.

        ``metric.merge(ranks.every(metric.state))`` (:mod:`engine.training.ranks`) gives every rank the figures of all
        of them, the same bit for bit.
        """


class MeanLoss(Metric):
    """``loss``, the mean cross entropy of the tokens that are asked for, and ``perplexity``, its exponential.

    ``shift``: whether a token's label is asked for at the position before it, as in a causal language model.
    """

    def __init__(self, shift: bool) -> None:
        self.shift = shift
        self._sums = np.zeros(2)

    def update(self, outputs: Any, labels: Any, indices: Any = None) -> None:
        """``outputs``: logits [B, S, V]; ``labels``: [B, S], -100 where nothing is asked for."""
        logits, wanted = torch.as_tensor(outputs), torch.as_tensor(labels)
        if self.shift:
            logits, wanted = logits[:, :-1], wanted[:, 1:]
        asked = wanted != IGNORED
        wanted = wanted[asked]
        total = 0.0
        for rows, targets in zip(logits[asked].split(LOSS_ROWS), wanted.split(LOSS_ROWS), strict=True):
            total += float(torch.nn.functional.cross_entropy(rows.float(), targets, reduction="sum"))
        self._sums += (total, len(wanted))

    def update_loss(self, mean: float, labels: Any) -> None:
        """Takes the ``mean`` loss that the model has computed over ``labels`` itself: no logits need be kept."""
        wanted = torch.as_tensor(labels)
        count = int(((wanted[:, 1:] if self.shift else wanted) != IGNORED).sum())
        if count:
            self._sums += (float(mean) * count, count)

    def compute(self) -> dict[str, float]:
        """The mean over all tokens that were asked for, and its exponential."""
        total, count = self._sums
        _some(count)
        loss = float(total / count)
        return {"loss": loss, "perplexity": perplexity(loss)}

    def state(self) -> State:
        """The sum of losses and the number of tokens, [2]."""
        return {"sums": self._sums}

    def merge(self, states: Sequence[State]) -> None:
        """Sums up."""
        self._sums = np.sum([state["sums"] for state in states], axis=0)


def perplexity(loss: float) -> float:
    """``exp`` of a mean loss in nats; infinite where no float is that large."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


class Classification(Metric):
    """``accuracy``, ``f1`` (of class 1 where there are two classes, else as the next), ``f1_macro`` (the mean over the
    classes that are there or predicted), ``matthews`` (for more than two classes Gorodkin's R_K).

    A figure whose denominator is 0 is 0, as the Matthews correlation of predictions that are all the same.
    """

    def __init__(self, classes: int) -> None:
        self.classes = classes
        self._counts = np.zeros((classes, classes), np.int64)

    def update(self, outputs: Any, labels: Any, indices: Any = None) -> None:
        """``outputs``: logits [B, classes]; ``labels``: [B]."""
        logits, truth = _array(outputs), _array(labels).astype(np.int64)
        if not len(truth):
            return
        if logits.shape != (len(truth), self.classes):
            raise EngineError(f"outputs are {list(logits.shape)}, wanted [{len(truth)}, {self.classes}]: other labels?")
        if truth.min() < 0 or truth.max() >= self.classes:
            raise EngineError(f"label {truth.min()} to {truth.max()}: wanted 0 to {self.classes - 1}")
        np.add.at(self._counts, (truth, _finite(logits).argmax(1)), 1)

    def compute(self) -> dict[str, float]:
        """The four figures of the class's description."""
        counts = self._counts.astype(np.float64)
        total, right = counts.sum(), np.diag(counts)
        _some(total)
        truth, found = counts.sum(1), counts.sum(0)
        f1 = np.divide(2 * right, truth + found, out=np.zeros(self.classes), where=truth + found > 0)
        present = f1[truth + found > 0]
        macro = float(present.mean())
        # Gorodkin, "Comparing two K-category assignments by a K-category correlation coefficient", 2004; for two
        # classes it is Matthews' coefficient.
        covariance = right.sum() * total - truth @ found
        spread = (total**2 - truth @ truth) * (total**2 - found @ found)
        return {
            "accuracy": float(right.sum() / total),
            "f1": float(f1[1]) if self.classes == 2 else macro,
            "f1_macro": macro,
            "matthews": float(covariance / math.sqrt(spread)) if spread > 0 else 0.0,
        }

    def state(self) -> State:
        """How often each class [row] was taken for each [column], int64."""
        return {"counts": self._counts}

    def merge(self, states: Sequence[State]) -> None:
        """Sums up."""
        self._counts = np.sum([state["counts"] for state in states], axis=0)


class Regression(Metric):
    """``pearson``, ``spearman`` (ties have their mean rank) and ``mse``. A correlation with a constant is 0."""

    def __init__(self) -> None:
        self._parts: list[NDArray[np.float64]] = []

    def update(self, outputs: Any, labels: Any, indices: Any = None) -> None:
        """``outputs``: [B] or [B, 1]; ``labels``: [B]."""
        found, truth = _finite(_array(outputs)).astype(np.float64).reshape(-1), _array(labels).astype(np.float64)
        if found.shape != truth.shape:
            raise EngineError(
                f"outputs are {list(found.shape)}, labels {list(truth.shape)}: a regression has one output"
            )
        self._parts.append(np.stack([found, truth]))

    def compute(self) -> dict[str, float]:
        """The three figures of the class's description."""
        found, truth = self.state()["values"]
        _some(len(truth))
        return {
            "pearson": _correlation(found, truth),
            "spearman": _correlation(_ranks(found), _ranks(truth)),
            "mse": float(np.square(found - truth).mean()),
        }

    def state(self) -> State:
        """Outputs and labels, [2, N] float64."""
        return {"values": np.concatenate([np.zeros((2, 0)), *self._parts], axis=1)}

    def merge(self, states: Sequence[State]) -> None:
        """Puts the parts end to end."""
        self._parts = [state["values"] for state in states]


def _correlation(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    a, b = a - a.mean(), b - b.mean()
    norm = math.sqrt(a @ a) * math.sqrt(b @ b)
    return float(np.clip(a @ b / norm, -1, 1)) if norm > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1; equal values have the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


class _Asked(Protocol):
    """A question as :class:`engine.training.data.answering.Question` holds it."""

    @property
    def context(self) -> str: ...
    @property
    def answers(self) -> tuple[tuple[str, int], ...]: ...


class _Windows(Protocol):
    """What :class:`Answers` asks of :class:`engine.training.data.answering.SpanTexts`."""

    @property
    def questions(self) -> Sequence[_Asked]: ...
    @property
    def question(self) -> NDArray[np.int64]: ...
    @property
    def unanswerable(self) -> bool: ...
    def best(self, index: int, start: Any, end: Any) -> tuple[float, int, int, float]:
        """From a window's logits to (score, first character, end, score of no answer)."""
        ...


class Answers(Metric):
    """``exact_match`` and ``f1`` of SQuAD's official script, as shares, over the questions whose windows were taken in.

    A question's answer is the best span of all its windows. Where the data have questions without an answer, a
    prediction is empty if no window's span scores higher than the window that is the least for "no answer".
    """

    def __init__(self, samples: _Windows) -> None:
        self.samples = samples
        self._rows: list[tuple[float, ...]] = []

    def update(self, outputs: Any, labels: Any, indices: Any = None) -> None:
        """``outputs``: start and end logits, each [B, S]; ``labels`` are not read; ``indices``: [B] windows."""
        starts, ends = (_finite(_array(part)) for part in outputs)
        for start, end, index in zip(starts, ends, _array(indices).tolist(), strict=True):
            self._rows.append((float(self.samples.question[index]), *self.samples.best(index, start, end)))

    def predictions(self) -> dict[int, str]:
        """The answer to each question that was taken in, by its number in the data."""
        best: dict[int, tuple[float, ...]] = {}
        nothing: dict[int, float] = {}
        for number, score, start, end, null in sorted(self._rows):
            key = int(number)
            nothing[key] = min(null, nothing.get(key, math.inf))
            if key not in best or score > best[key][0]:
                best[key] = (score, start, end)
        found = {}
        for key, (score, start, end) in best.items():
            empty = self.samples.unanswerable and nothing[key] > score
            found[key] = "" if empty else self.samples.questions[key].context[int(start) : int(end)].strip()
        return found

    def compute(self) -> dict[str, float]:
        """The means over the questions."""
        found = self.predictions()
        _some(len(found))
        pairs = [
            squad_scores(text, [answer for answer, _ in self.samples.questions[key].answers])
            for key, text in found.items()
        ]
        exact, f1 = np.mean(pairs, axis=0)
        return {"exact_match": float(exact), "f1": float(f1)}

    def state(self) -> State:
        """A row a window, [N, 5] float64: question, score, first character, end, score of no answer."""
        return {"rows": np.array(self._rows, np.float64).reshape(-1, 5)}

    def merge(self, states: Sequence[State]) -> None:
        """Puts the rows end to end."""
        self._rows = [tuple(row) for state in states for row in state["rows"].tolist()]


def squad_scores(prediction: str, answers: Sequence[str]) -> tuple[float, float]:
    """(exact match, F1) of a prediction with the best of ``answers`` (none: the empty text is right), each 0 to 1.

    As SQuAD 2.0's official script (Rajpurkar et al., arXiv 1806.03822), which agrees with 1.1's where all have answers.
    """
    wanted = [answer for answer in answers if normalized(answer)] or [""]
    return (
        float(max(normalized(prediction) == normalized(answer) for answer in wanted)),
        max(_overlap(prediction, answer) for answer in wanted),
    )


def normalized(text: str) -> str:
    """Lower case, ASCII punctuation and the articles a, an, the taken out, one space between words."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def _overlap(prediction: str, answer: str) -> float:
    found, wanted = normalized(prediction).split(), normalized(answer).split()
    if not found or not wanted:
        return float(found == wanted)
    same = (Counter(found) & Counter(wanted)).total()
    return 2 * same / (len(found) + len(wanted))


def metric_for(samples: Any) -> Metric:
    """The metric of a data set of :mod:`engine.training.data`, by its ``task``."""
    made: dict[str, Any] = {
        "masked_lm": lambda: MeanLoss(shift=False),
        "causal_lm": lambda: MeanLoss(shift=True),
        "classification": lambda: Classification(samples.classes),
        "regression": Regression,
        "question_answering": lambda: Answers(samples),
    }
    metric: Metric = made[samples.task]()
    return metric


def figure_of(task: str, wanted: str | None = None) -> str:
    """The figure that ``task`` is judged by: ``wanted``, or its first. Raises :class:`EngineError` for another's."""
    if wanted is not None and wanted not in FIGURES[task]:
        raise EngineError(f"metric: {task} has no {wanted!r}: there are {', '.join(FIGURES[task])}")
    return wanted or FIGURES[task][0]


def _array(values: Any) -> NDArray[Any]:
    """Values on the CPU as an array; half precisions, which NumPy lacks in part, as fp32."""
    if isinstance(values, Tensor):
        plain = values.detach()
        return np.asarray((plain.float() if plain.is_floating_point() else plain).cpu())
    return np.asarray(values)


def _finite(values: NDArray[Any]) -> NDArray[Any]:
    if not np.isfinite(values).all():
        raise EngineError("the model's outputs are not finite: no metric can be computed of them")
    return values


def _some(count: float) -> None:
    if not count:
        raise EngineError("no sample was evaluated: the metric has nothing to compute")
