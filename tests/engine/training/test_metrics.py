"""Metrics against their closed forms and hand-computed values; parts merged are the whole."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from engine.errors import EngineError
from engine.training.metrics import (
    FIGURES,
    SMALLER_IS_BETTER,
    Classification,
    MeanLoss,
    Metric,
    Regression,
    figure_of,
    metric_for,
    normalized,
    squad_scores,
)


def classified(classes: int, truth: list[int], found: list[int]) -> dict[str, float]:
    metric = Classification(classes)
    metric.update(np.eye(classes)[found] - 0.5, np.array(truth))
    return metric.compute()


def correlated(found: list[float], truth: list[float]) -> dict[str, float]:
    metric = Regression()
    metric.update(torch.tensor(found)[:, None], torch.tensor(truth))
    return metric.compute()


def test_two_classes() -> None:
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives.
    figures = classified(2, [1, 1, 1, 0, 1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0, 0, 0])
    assert figures == {
        "accuracy": pytest.approx(0.7),
        "f1": pytest.approx(6 / 9),
        "f1_macro": pytest.approx((6 / 9 + 8 / 11) / 2),
        "matthews": pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6)),
    }


def test_three_classes() -> None:
    figures = classified(3, [0, 1, 2, 2, 1, 0, 2, 1], [0, 2, 2, 2, 1, 0, 1, 1])
    assert figures["accuracy"] == 0.75
    assert figures["f1"] == figures["f1_macro"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    # R_K: (right * all - sum(true * found)) / sqrt((all^2 - sum true^2) (all^2 - sum found^2))
    assert figures["matthews"] == pytest.approx((6 * 8 - (2 * 2 + 3 * 3 + 3 * 3)) / (64 - 22))


def test_classes_that_are_not_there() -> None:
    assert classified(2, [0, 0], [0, 0]) == {"accuracy": 1.0, "f1": 0.0, "f1_macro": 1.0, "matthews": 0.0}
    assert classified(2, [1, 0], [1, 1])["matthews"] == 0.0
    assert classified(4, [0, 1], [0, 1])["f1_macro"] == 1.0
    assert classified(2, [0, 1], [1, 0])["matthews"] == -1.0


def test_correlations() -> None:
    found, truth = [1.0, 2.0, 4.0, 3.0], [1.0, 3.0, 3.5, 5.0]
    figures = correlated(found, truth)
    assert figures["pearson"] == pytest.approx(float(np.corrcoef(found, truth)[0, 1]))
    # No ties: 1 - 6 sum d^2 / (n (n^2 - 1)) with ranks 1 2 4 3 and 1 2 3 4.
    assert figures["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert figures["mse"] == pytest.approx((0 + 1 + 0.25 + 4) / 4)
    # Ties: ranks 1.5 1.5 3 4 and 1 2.5 2.5 4.
    ranks = np.corrcoef([1.5, 1.5, 3, 4], [1, 2.5, 2.5, 4])[0, 1]
    assert correlated([1, 1, 2, 9], [0, 5, 5, 7])["spearman"] == pytest.approx(float(ranks))
    assert correlated([1, 2, 3], [2, 4, 9])["spearman"] == pytest.approx(1)
    assert correlated([1, 2, 3], [-1, -2, -3])["pearson"] == pytest.approx(-1)
    assert correlated([2, 2, 2], [1, 2, 3]) == {"pearson": 0.0, "spearman": 0.0, "mse": pytest.approx(2 / 3)}
    # Far from 0, where sums of squares alone lose every digit.
    assert correlated([1e6, 1e6 + 1, 1e6 + 2], [1, 2, 3])["pearson"] == pytest.approx(1)


@pytest.mark.parametrize("shift", [False, True])
def test_mean_loss(shift: bool) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(7, (3, 5))
    labels[0, 2:] = labels[2] = -100
    if shift:
        wanted = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1))
    else:
        wanted = torch.nn.functional.cross_entropy(logits.reshape(-1, 7), labels.reshape(-1))
    parts, told = MeanLoss(shift), MeanLoss(shift)
    for at in range(3):
        parts.update(logits[at : at + 1], labels[at : at + 1])
    assert parts.compute() == {"loss": pytest.approx(float(wanted)), "perplexity": pytest.approx(math.exp(wanted))}
    for rows in (slice(0, 1), slice(1, 2), slice(2, 3)):
        one = MeanLoss(shift)
        one.update(logits[rows], labels[rows])
        asked = bool((labels[rows] != -100).any())
        told.update_loss(one.compute()["loss"] if asked else math.nan, labels[rows])
    assert told.compute()["loss"] == pytest.approx(float(wanted)), "batches weigh as many tokens as they ask for"
    told.update_loss(1e9, torch.zeros(1, 2))
    assert told.compute()["perplexity"] == math.inf


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    metric = MeanLoss(shift=False)
    metric.update(torch.zeros(2, 3, 50, dtype=torch.bfloat16), torch.full((2, 3), 7))
    assert metric.compute() == {"loss": pytest.approx(math.log(50)), "perplexity": pytest.approx(50)}


@pytest.mark.parametrize(
    ("prediction", "answers", "exact", "f1"),
    [
        ("the Cat!", ["cat"], 1, 1),
        ("a cat sat", ["cat"], 0, 2 / 3),
        ("sat", ["cat", "cat sat down"], 0, 0.5),
        ("an apple, a day", ["Apple Day", "x"], 1, 1),
        ("cat cat", ["cat"], 0, 2 / 3),
        ("dog", ["cat"], 0, 0),
        ("", [], 1, 1),
        ("", ["cat"], 0, 0),
        ("", ["the", "cat"], 0, 0),
        ("cat", [], 0, 0),
        ("the", ["a"], 1, 1),
        ("theatre", ["atre"], 0, 0),
    ],
)
def test_squad_scores(prediction: str, answers: list[str], exact: float, f1: float) -> None:
    assert squad_scores(prediction, answers) == (exact, pytest.approx(f1))


def test_normalization_is_squads() -> None:
    assert normalized("  The U.S.A.'s  an-swer,\nA+ ") == "usas answer"
    assert normalized("Über “a” thing") == "über “ ” thing", "only ASCII punctuation is taken out"


def random_parts(metric: Metric) -> list[tuple[Any, Any]]:
    rng = np.random.default_rng(2)
    if isinstance(metric, Regression):
        return [(rng.normal(size=(size, 1)), rng.normal(size=size)) for size in (4, 1, 6)]
    if isinstance(metric, Classification):
        return [(rng.normal(size=(size, 3)), rng.integers(0, 3, size)) for size in (4, 1, 6)]
    return [(rng.normal(size=(size, 4, 5)), rng.integers(0, 5, (size, 4))) for size in (4, 1, 6)]


@pytest.mark.parametrize("make", [lambda: Classification(3), Regression, lambda: MeanLoss(True)])
def test_parts_of_ranks_merge_to_the_whole(make: Callable[[], Metric]) -> None:
    parts = random_parts(make())
    whole, ranks, merged = make(), [make() for _ in parts], make()
    for rank, part in zip(ranks, parts, strict=True):
        whole.update(*part)
        rank.update(*part)
    merged.update(*parts[0])
    merged.merge([rank.state() for rank in ranks])
    assert merged.compute() == pytest.approx(whole.compute(), rel=1e-12)
    before = whole.compute()
    whole.merge([whole.state()])
    assert whole.compute() == before, "alone, merging changes nothing"
    idle = make()
    merged.merge([rank.state() for rank in (*ranks, idle)])
    assert merged.compute() == pytest.approx(before, rel=1e-12), "a rank may have seen nothing"


@pytest.mark.parametrize("make", [lambda: Classification(3), Regression])
def test_half_precision_and_empty_batches(make: Callable[[], Metric]) -> None:
    metric, other = make(), make()
    shape = (4, 3) if isinstance(metric, Classification) else (4, 1)
    outputs, labels = torch.randn(shape, requires_grad=True).to(torch.bfloat16), torch.tensor([0, 2, 1, 1])
    metric.update(outputs, labels)
    metric.update(outputs[:0], labels[:0])
    other.update(outputs.float().detach().numpy(), labels.numpy())
    assert metric.compute() == other.compute()


def test_what_cannot_be_computed_is_told() -> None:
    for metric in (Classification(2), Regression(), MeanLoss(False)):
        with pytest.raises(EngineError, match="no sample was evaluated"):
            metric.compute()
    for call, message in (
        (lambda: Classification(2).update(np.array([[0.0, math.nan]]), [0]), "not finite"),
        (lambda: Classification(2).update(np.zeros((1, 3)), [0]), r"outputs are \[1, 3\], wanted \[1, 2\]"),
        (lambda: Classification(2).update(np.zeros((1, 2)), [2]), "wanted 0 to 1"),
        (lambda: Regression().update(np.array([math.inf]), [0.0]), "not finite"),
        (lambda: Regression().update(np.zeros((2, 2)), [0.0, 1.0]), "a regression has one output"),
    ):
        with pytest.raises(EngineError, match=message):
            call()


def test_each_task_has_its_metric() -> None:
    for task, figures in FIGURES.items():
        samples = SimpleNamespace(task=task, classes=2)
        metric = metric_for(samples)
        if task == "question_answering":
            continue
        labels = {"regression": [0.0, 1.0]}.get(task, [0, 1] if task == "classification" else [[0, 1]])
        outputs = (
            np.zeros((2, 2))
            if task == "classification"
            else np.zeros(2)
            if task == "regression"
            else np.zeros((1, 2, 2))
        )
        metric.update(outputs, np.array(labels))
        assert set(metric.compute()) == set(figures)
    assert metric_for(SimpleNamespace(task="causal_lm")).shift  # type: ignore[attr-defined]
    assert not metric_for(SimpleNamespace(task="masked_lm")).shift  # type: ignore[attr-defined]
    assert figure_of("classification") == "accuracy"
    assert figure_of("classification", "matthews") == "matthews"
    assert {figure for figures in FIGURES.values() for figure in figures} > SMALLER_IS_BETTER
    with pytest.raises(EngineError, match="metric: regression has no 'f1': there are pearson, spearman, mse"):
        figure_of("regression", "f1")
