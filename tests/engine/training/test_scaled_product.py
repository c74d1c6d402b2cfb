"""A linear layer scaled by way of its weight, against its output scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from engine.training.scaled_product import FEWEST, ScaledProduct, is_product

INPUTS, OUTPUTS = 6, 5
MANY, FEW = FEWEST * INPUTS, FEWEST * INPUTS - 1
SCALE = torch.tensor(1 / 0.7, dtype=torch.float64)


class By:
    """A scaling."""

    def __init__(self, scale: Tensor | None) -> None:
        self.scale = scale

    def current(self) -> Tensor | None:
        return self.scale


class Multiplied(TorchDispatchMode):
    """The shapes that products element by element have."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if str(func.overloadpacket) == "aten.mul":
            self.shapes.append(tuple(output.shape))
        return output


def layer(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "conv1d":
        module: nn.Module = Conv1D(OUTPUTS, INPUTS)
        nn.init.normal_(module.bias)  # type: ignore[arg-type]
    else:
        module = nn.Linear(INPUTS, OUTPUTS, bias=kind == "linear")
    return module.double()


def gradients(module: nn.Module, x: Tensor, scale: Tensor | None) -> list[Tensor]:
    """The output, and the gradients of a loss that weighs each element differently."""
    x = x.detach().requires_grad_()
    output = module(x) if scale is None else module(x) * scale
    loss = (output * torch.arange(1.0, output.numel() + 1, dtype=torch.float64).view(output.shape)).sum()
    return [output, *torch.autograd.grad(loss, [x, *module.parameters()])]


@pytest.mark.parametrize("kind", ["linear", "no bias", "conv1d"])
@pytest.mark.parametrize("rows", [0, FEW, MANY])
@pytest.mark.parametrize("strided", [False, True], ids=["", "strided"])
def test_is_the_output_scaled(kind: str, rows: int, strided: bool) -> None:
    module = layer(kind)
    assert is_product(module)
    x = torch.randn(INPUTS, 1, rows, dtype=torch.float64).permute(2, 1, 0)
    x = x if strided else x.contiguous()
    wanted = gradients(module, x, SCALE)
    kind_before = type(module)
    product = ScaledProduct(module, By(SCALE))
    assert is_product(module), "a later look at the block finds the same"
    with Multiplied() as seen:
        module(x)
    assert ((rows, 1, OUTPUTS) in seen.shapes) == (rows < MANY), "the output is passed over only where it is small"
    for found, right in zip(gradients(module, x, None), wanted, strict=True):
        torch.testing.assert_close(found, right, rtol=1e-12, atol=1e-12)
    product.remove()
    assert type(module) is kind_before
    assert not hasattr(module, "scaling")
    assert torch.equal(module(x) * SCALE, wanted[0])


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_unscaled_is_the_layer_itself(kind: str) -> None:
    module, x = layer(kind), torch.randn(MANY, INPUTS, dtype=torch.float64)
    wanted = module(x)
    ScaledProduct(module, By(None))
    assert torch.equal(module(x), wanted)


def test_other_layers_are_not_taken() -> None:
    class Own(nn.Linear):
        pass

    replaced = nn.Linear(2, 2)
    replaced.__dict__["forward"] = lambda x: x + 1
    assert not is_product(replaced)
    assert not is_product(Own(2, 2))
    assert not is_product(nn.Bilinear(2, 2, 2))
    assert not is_product(torch.nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
def test_is_compiled_once_for_all_layers(kind: str) -> None:
    """And once more for the unscaled ones."""
    torch.compiler.reset()
    counter = CompileCounter()
    layers = [layer(kind) for _ in range(9)]
    for at, module in enumerate(layers):
        ScaledProduct(module, By(None if at == 0 else torch.tensor(1 / (1 + at), dtype=torch.float64)))

    def run(module: nn.Module, x: Tensor) -> Tensor:
        found: Tensor = module(x)
        return found

    x = torch.randn(MANY, INPUTS, dtype=torch.float64)
    compiled = torch.compile(run, backend=counter)
    for module in layers:
        torch.testing.assert_close(compiled(module, x), run(module, x))
    assert counter.frame_count == 2
