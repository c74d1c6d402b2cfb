"""The skinny GEMM's kernels against their definition in fp64, at shapes that no tile divides, among NaNs."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from ops import reference
from ops.errors import KernelError
from ops.gemm import GemmConfig, skinny_gemm
from ops.gemm.config import heuristic
from ops.quantization.reference import quantize
from ops.spec import Activation
from ops.weights import Norm
from tests.ops.devices import DEVICES
from tests.ops.fence import fence
from tests.ops.specs import assert_near, noise

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CONFIGS = {
    "fma": GemmConfig("fma", 4, 32, 2),
    "fma once": GemmConfig("fma", 2, 256, 2),
    "mma": GemmConfig("mma", 16, 32, 2),
    "mma once": GemmConfig("mma", 32, 128, 2),
    "mma narrow": GemmConfig("mma", 8, 32, 2),
    "mma narrow once": GemmConfig("mma", 8, 64, 4),
    "ring": GemmConfig("ring", 16, 32, 2, stages=2),
    "ring of slices": GemmConfig("ring", 16, 16, 4, slices=4, stages=2),
}


def amid_nan(tensor: Tensor, offset: int = 16) -> Tensor:
    """A copy in the middle of NaNs, ``offset`` elements into them: what is read beyond it poisons the result."""
    room = torch.full((tensor.numel() + 64 + offset,), math.nan, dtype=tensor.dtype, device=tensor.device)
    room[offset : offset + tensor.numel()] = tensor.flatten()
    return room[offset : offset + tensor.numel()].view(tensor.shape)


class Problem:
    """Tensors of one product, and its exact result."""

    def __init__(
        self,
        shape: tuple[int, int, int],
        dtype: torch.dtype,
        device: str,
        norm: str | None = None,
        gated: bool = False,
        offset: int = 16,
        mean: float = 0.5,
    ) -> None:
        self.rows, self.columns, self.inner = shape
        height = self.columns * (2 if gated else 1)

        def tensor(*size: int, scale: float = 1.0, seed: int = 0) -> Tensor:
            return amid_nan((noise(*size, seed=seed) * scale).to(device, dtype), offset)

        self.x = amid_nan((noise(self.rows, self.inner) + mean).to(device, dtype), offset)
        self.weight = tensor(height, self.inner, scale=self.inner**-0.5, seed=1)
        self.bias = tensor(height, seed=2)
        self.residual = tensor(self.rows, self.columns, seed=3)
        shift = tensor(self.inner, seed=5) if norm == "layernorm" else None
        self.norm = Norm(tensor(self.inner, seed=4), shift) if norm is not None else None
        self.kind, self.gated = norm or "layernorm", gated
        self.dtype, self.device = dtype, device

    def options(self, names: str = "bias residual") -> dict[str, Any]:
        """Keywords of ``skinny_gemm``: norm and gate, and the tensors that are named."""
        found = {name: getattr(self, name) for name in names.split()}
        return {"norm": self.norm, "norm_kind": self.kind, "gated": self.gated, **found}

    def exact(self, names: str = "bias residual", activation: Activation | None = None) -> Tensor:
        """The result in fp64."""
        found = {name: getattr(self, name).double() for name in names.split()}
        return reference.skinny_gemm(
            self.x.double(),
            self.weight.double(),
            norm_weight=None if self.norm is None else self.norm.weight.double(),
            norm_bias=None if self.norm is None or self.norm.bias is None else self.norm.bias.double(),
            norm_kind=self.kind,
            activate=activation,
            gated=self.gated,
            **found,
        )

    def check(
        self, config: GemmConfig | None, activation: Activation | None = None, names: str = "bias residual"
    ) -> None:
        """Runs, and looks at the result and at what lies around it."""
        room = torch.full((self.rows * self.columns + 32,), math.nan, dtype=self.dtype, device=self.device)
        out = room[16:-16].view(self.rows, self.columns)
        norm = (self.norm.weight, self.norm.bias) if self.norm is not None else ()
        read = (self.x, self.weight, self.bias, self.residual, *norm)
        with fence(read, [out]) if self.device == "cpu" else nullcontext():
            found = skinny_gemm(
                self.x, self.weight, out=out, config=config, activation=activation, **self.options(names)
            )
        assert found is out
        assert_near(out, self.exact(names, activation), self.dtype, self.inner)
        assert room[:16].isnan().all()
        assert room[-16:].isnan().all()


def runs(name: str, dtype: torch.dtype) -> bool:
    return not (name.startswith("mma") and dtype == torch.float32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    "shape", [(1, 5, 96), (2, 17, 104), (3, 9, 77), (9, 6, 152), (16, 18, 64), (20, 3, 40), (1, 1, 1), (8, 16, 128)]
)
def test_products(name: str, dtype: torch.dtype, device: str, shape: tuple[int, int, int]) -> None:
    if runs(name, dtype):
        Problem(shape, dtype, device).check(CONFIGS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
@pytest.mark.parametrize("shape", [(1, 5, 96), (10, 7, 120), (3, 9, 77)])
def test_norms(name: str, dtype: torch.dtype, device: str, norm: str, gated: bool, shape: tuple[int, int, int]) -> None:
    if runs(name, dtype):
        Problem(shape, dtype, device, norm, gated).check(CONFIGS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_activations(name: str, device: str, activation: Activation, gated: bool) -> None:
    Problem((2, 5, 40), torch.float16, device, gated=gated).check(CONFIGS[name], activation)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("names", ["", "bias", "residual"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_what_is_left_out(name: str, device: str, names: str, gated: bool) -> None:
    Problem((5, 7, 48), torch.float16, device, gated=gated).check(CONFIGS[name], None, names)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_64_rows(name: str, device: str) -> None:
    Problem((64, 3, 40), torch.float16, device, "rmsnorm").check(CONFIGS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("offset", [1, 8], ids=["unaligned", "aligned"])
def test_where_tensors_begin(name: str, device: str, offset: int) -> None:
    """Words are read only where every tensor begins on 16 bytes."""
    Problem((3, 6, 64), torch.float16, device, "layernorm", offset=offset).check(CONFIGS[name])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_layernorm_of_a_large_mean(name: str, device: str) -> None:
    """Sums of x and of its square would cancel: at mean 1000 and deviation 1 fp32 has one digit of the variance left.

    The mean itself is rounded to 1000 times fp32's epsilon, which is what the tolerance of so many terms allows.
    """
    if runs(name, torch.float32):
        one = Problem((2, 5, 96), torch.float32, device, "layernorm", mean=1000.0)
        found = skinny_gemm(one.x, one.weight, config=CONFIGS[name], **one.options())
        assert_near(found, one.exact(), torch.float32, 1000**2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_residual_may_be_out(name: str, device: str) -> None:
    one = Problem((5, 18, 40), torch.float16, device)
    expected = one.exact()
    found = skinny_gemm(one.x, one.weight, one.bias, residual=one.residual, out=one.residual, config=CONFIGS[name])
    assert found is one.residual
    assert_near(found, expected, one.dtype, one.inner)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("activation", ["relu", "gelu", "silu"])
def test_nan_and_infinity_pass_through(name: str, device: str, activation: Activation) -> None:
    one = Problem((3, 5, 40), torch.float16, device)
    one.x[1, 3] = math.nan
    one.x[2, 3] = math.inf
    found = skinny_gemm(one.x, one.weight, config=CONFIGS[name], activation=activation)
    assert found[0].isfinite().all()
    assert found[1].isnan().all()
    assert not found[2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(0, 5, 8), (3, 0, 8)])
def test_empty(device: str, shape: tuple[int, int, int]) -> None:
    rows, columns, inner = shape
    x, weight = torch.zeros(rows, inner, device=device), torch.zeros(columns, inner, device=device)
    assert skinny_gemm(x, weight).shape == (rows, columns)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2, 8, 16, 17])
@pytest.mark.parametrize("gated", [False, True])
def test_what_nobody_tuned_runs(dtype: torch.dtype, rows: int, device: str, gated: bool) -> None:
    Problem((rows, 6, 88), dtype, device, "layernorm", gated).check(None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_heuristic_covers_every_size(dtype: torch.dtype, gated: bool) -> None:
    for rows in (1, 2, 3, 8, 9, 16, 17, 64):
        for columns, inner in ((1, 1), (768, 3072), (50257, 768), (36864, 12288)):
            found = heuristic(dtype, rows, columns, inner, gated)
            assert found.kind != "mma" or dtype != torch.float32
            assert found.rows(rows) >= min(rows, 4)


def refusals() -> dict[str, tuple[dict[str, Any], str]]:
    x, weight = torch.zeros(2, 8), torch.zeros(4, 8)
    return {
        "dtype": ({"x": x.double(), "weight": weight.double()}, "float64"),
        "weight's dtype": ({"weight": weight.half()}, "weight is torch.float16"),
        "inner sizes": ({"weight": torch.zeros(4, 9)}, r"\[2, 8\] and weight \[4, 9\]"),
        "three axes": ({"x": torch.zeros(1, 2, 8)}, "must be"),
        "nothing to sum": ({"x": torch.zeros(2, 0), "weight": torch.zeros(4, 0)}, "K > 0"),
        "rows": ({"x": torch.zeros(65, 8)}, "65 rows"),
        "odd gate": ({"weight": torch.zeros(5, 8), "gated": True}, "two halves"),
        "strided x": ({"x": torch.zeros(2, 16)[:, ::2]}, "x has strides"),
        "strided weight": ({"weight": torch.zeros(8, 4).T}, "weight has strides"),
        "strided bias": ({"bias": torch.zeros(8)[::2]}, "bias has strides"),
        "device": ({"weight": torch.zeros(4, 8, device="meta")}, "weight is on meta"),
        "bias": ({"bias": torch.zeros(5)}, "bias has shape"),
        "gated bias": ({"bias": torch.zeros(2), "gated": True}, r"\[4\] expected"),
        "residual": ({"residual": torch.zeros(4, 2)}, "residual has shape"),
        "residual's dtype": ({"residual": torch.zeros(2, 4).half()}, "residual is torch.float16"),
        "out": ({"out": torch.zeros(2, 5)}, "out has shape"),
        "out is x": ({"weight": torch.zeros(8, 8), "x": x, "out": x}, "shares memory"),
        "norm": ({"norm": Norm(torch.zeros(7))}, "norm_weight has shape"),
        "norm's bias": ({"norm": Norm(torch.zeros(8), torch.zeros(9))}, "norm_bias has shape"),
        "norm kind": ({"norm_kind": "batchnorm"}, "batchnorm"),
        "activation": ({"activation": "swish"}, "swish"),
        "kind": ({"config": GemmConfig("mma", 16, 32)}, "mma"),
        "quantized": (
            {"weight": quantize(torch.ones(4, 8), bits=8, group_size=8, symmetric=True)},
            "int8 and int4 weights are not supported yet",
        ),
        "dependent launch": ({"pdl": True}, "Hopper"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="takes CPU tensors, which only the interpreter runs")
@pytest.mark.parametrize("name", refusals())
def test_refused(name: str) -> None:
    changed, message = refusals()[name]
    with pytest.raises(KernelError, match=message) as caught:
        skinny_gemm(**{"x": torch.zeros(2, 8), "weight": torch.zeros(4, 8), **changed})
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
def test_a_cpu_tensor_is_refused_on_a_gpu_machine() -> None:
    with pytest.raises(KernelError, match="need a CUDA GPU"):
        skinny_gemm(torch.zeros(2, 8), torch.zeros(4, 8))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_dependent_launches_in_a_graph(name: str) -> None:
    """Each launch reads what the one before it wrote, and overwrites what the one before that reads."""
    if torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("dependent launch needs a Hopper GPU")
    size, layers, config = 512, 40, CONFIGS[name]
    weights = [noise(size, size, seed=i, device="cuda", dtype=torch.float16) * size**-0.5 for i in range(layers)]
    gain = Norm(torch.ones(size, device="cuda", dtype=torch.float16))
    start = noise(4, size, device="cuda", dtype=torch.float16)
    buffers = [start.clone(), torch.zeros_like(start)]

    def chain(pdl: bool) -> None:
        buffers[0].copy_(start)
        for index, weight in enumerate(weights):
            source, target = buffers[index % 2], buffers[1 - index % 2]
            skinny_gemm(source, weight, norm=gain, norm_kind="rmsnorm", out=target, config=config, pdl=pdl)

    torch.cuda.synchronize()
    chain(False)
    expected = buffers[layers % 2].clone()
    chain(True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain(True)
    for _ in range(20):
        buffers[layers % 2].fill_(math.nan)
        graph.replay()
        assert torch.equal(buffers[layers % 2], expected)
