"""Eigenvalues by power iteration against those of the whole Hessian matrix, by torch's own functions."""

from __future__ import annotations

import logging
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from engine.training.curvature import Curvature


def model() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def loss_of(net: nn.Module, scale: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)
    return scale * F.mse_loss(net(x), y)


def largest(net: nn.Sequential, names: list[str]) -> float:
    """Of the Hessian in some of the weights, as a matrix."""
    sizes = [net.get_parameter(name).numel() for name in names]

    def of(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        given = {name: part.view_as(net.get_parameter(name)) for name, part in parts}
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)
        return F.mse_loss(functional_call(net, given, (x,)), y)

    flat = torch.cat([net.get_parameter(name).detach().flatten() for name in names])
    matrix = torch.autograd.functional.hessian(of, flat)
    values = torch.linalg.eigvalsh(matrix)
    return float(values[values.abs().argmax()])


BLOCKS = [["0.weight"], ["2.weight", "4.weight"]]


@pytest.mark.parametrize("scale", [1.0, 4096.0])
def test_they_are_those_of_the_matrix(scale: float) -> None:
    net = model()
    curvature = Curvature(max_iter=1000, tol=1e-6, scale=lambda: scale)
    blocks = [[net.get_parameter(name) for name in names] for names in BLOCKS]
    wanted = [largest(net, names) for names in BLOCKS]
    assert curvature.eigenvalues(loss_of(net), blocks) == pytest.approx(wanted, rel=1e-3)
    shares = curvature.shares(loss_of(net), blocks)
    assert shares == pytest.approx([abs(value) / max(map(abs, wanted)) for value in wanted], rel=1e-3)
    assert max(shares) == 1


def test_a_quadratic_in_closed_form() -> None:
    """Of ``x^T diag(d) x / 2`` the eigenvalues are ``d``; also a negative one, by its size."""
    x = nn.Parameter(torch.ones(4))
    for values in ([1.0, 3.0, 2.0, 0.5], [1.0, -7.0, 2.0, 0.5]):
        loss = (torch.tensor(values) * x * x).sum() / 2
        assert Curvature(1000, 1e-7).eigenvalues(loss, [[x]])[0] == pytest.approx(max(values, key=abs), rel=1e-3)


def test_the_graph_stays_for_the_backward_pass() -> None:
    net, other = model(), model()
    loss = loss_of(net)
    Curvature().shares(loss, [[net[0].weight]])
    assert all(parameter.grad is None for parameter in net.parameters())
    loss.backward()
    loss_of(other).backward()
    for ours, wanted in zip(net.parameters(), other.parameters(), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, wanted.grad)


def test_iterations_end() -> None:
    net = model()
    asked: list[int] = []

    def counted(tensor: Tensor) -> Tensor:
        asked.append(tensor.numel())
        return tensor

    Curvature(max_iter=3, tol=1e-30, mean=counted).shares(loss_of(net), [[net[0].weight], [net[2].weight]])
    assert asked == [20, 20, 20, 20, 20, 20]


def test_the_mean_over_ranks_is_that_of_the_whole_batch() -> None:
    """Two ranks whose losses are 1 and 3 times the same: the mean product is that of twice the loss."""
    net = model()
    blocks = [[net[0].weight]]
    alone = Curvature(1000, 1e-6).eigenvalues(loss_of(net, 2.0), blocks)
    others = Curvature(1000, 1e-6, mean=lambda product: (product + 3 * product) / 2)
    assert others.eigenvalues(loss_of(net), blocks) == pytest.approx(alone, rel=1e-3)


def test_blocks_without_one_count_as_the_largest(caplog: pytest.LogCaptureFixture) -> None:
    net, unused, linear = model(), nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    loss = loss_of(net) + linear.sum()
    shares = Curvature().shares(loss, [[net[0].weight], [unused], [net[4].weight], [linear]])
    assert shares[1] == shares[3] == 1
    assert min(shares[0], shares[2]) < 1
    assert Curvature().eigenvalues(loss_of(net) * math.inf, [[net[0].weight]]) == [0]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with caplog.at_level(logging.WARNING):
        assert Curvature().shares(loss_of(net) * math.nan, [[net[0].weight], [net[2].weight]]) == [1, 1]
    assert "no block's loss is curved" in caplog.text
