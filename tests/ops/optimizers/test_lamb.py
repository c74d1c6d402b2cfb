"""LAMB's numbers: against the paper, by hand, against AdamW, and its two paths against each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ops.optimizers import LAMB
from tests.ops.optimizers.equations import PaperLamb

FOREACH = pytest.mark.parametrize("foreach", [False, True], ids=["each", "foreach"])
DEVICE = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
SHAPES = [(7, 5), (33,), (1,), (2, 3, 4), (), (64, 17)]


def parameters(shapes=SHAPES, dtype=torch.float32, device="cpu", seed=0, scale=1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter((scale * torch.randn(shape, generator=generator)).to(device=device, dtype=dtype))
        for shape in shapes
    ]


def set_gradients(params: list[nn.Parameter], seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(1000 + seed)
    for param in params:
        grad = scale * torch.randn(param.shape, generator=generator)
        param.grad = grad.to(device=param.device, dtype=param.dtype)


def double(tensor: Tensor) -> Any:
    return tensor.detach().double().cpu().numpy()


def assert_near(found: Tensor, wanted: Any, steps: int, dtype: torch.dtype = torch.float32) -> None:
    """Each step rounds a dozen times, each time by up to eps of something no larger than the weights."""
    wanted = torch.as_tensor(wanted, dtype=torch.float64)
    limit = 12 * steps * torch.finfo(dtype).eps * max(1.0, float(wanted.abs().max()))
    assert float((found.detach().double().cpu() - wanted).abs().max()) <= limit


OPTIONS = [
    {},
    {"weight_decay": 0.1},
    {"bias_correction": False},
    {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.3},
    {"betas": (0.0, 0.0), "weight_decay": 0.01},
    {"max_coeff": 0.3, "min_coeff": 0.2},
    {"max_coeff": None, "min_coeff": None},
    {"maximize": True, "weight_decay": 0.1},
]


@FOREACH
@DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "defaults")
def test_it_follows_the_equations(options, dtype, device, foreach) -> None:
    params = parameters(dtype=dtype, device=device)
    optimizer = LAMB(params, lr=0.05, foreach=foreach, **options)
    bounds = (options.get("min_coeff", 0.01) or 0, options.get("max_coeff", 10.0) or math.inf)
    paper = [
        PaperLamb(
            double(param),
            betas=options.get("betas", (0.9, 0.999)),
            eps=options.get("eps", 1e-8),
            decay=options.get("weight_decay", 0.0),
            bounds=bounds,
            corrected=options.get("bias_correction", True),
        )
        for param in params
    ]
    sign = -1 if options.get("maximize") else 1
    for step in range(12):
        set_gradients(params, step, scale=10.0 ** (step % 3 - 1))
        for reference, param in zip(paper, params, strict=True):
            reference.step(sign * double(param.grad), 0.05)
        optimizer.step()
    for reference, param in zip(paper, params, strict=True):
        assert_near(param, reference.weight, 12, dtype)
        assert float(optimizer.state[param]["trust_ratio"]) == pytest.approx(reference.ratio, rel=1e-5)
        assert float(optimizer.state[param]["step"]) == 12


@FOREACH
def test_two_steps_by_hand(foreach) -> None:
    """w = (3, 4), g = (1, -1) then (1, 1), betas (1/2, 1/2), eps 0, lr 0.1, no bounds.

    Step 1: corrected m = g and v = g^2, so u = (1, -1), ratio 5/sqrt(2); w = (3 - 0.5/sqrt 2, 4 + 0.5/sqrt 2).
    Step 2: m = (3/4, 1/4), v = (3/4, 3/4), both divided by 3/4: u = (1, 1/3), |u| = sqrt(10)/3.
    """
    param = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = LAMB([param], 0.1, (0.5, 0.5), 0.0, max_coeff=None, min_coeff=None, foreach=foreach)
    param.grad = torch.tensor([1.0, -1.0], dtype=torch.float64)
    optimizer.step()
    first = (3 - 0.5 / math.sqrt(2), 4 + 0.5 / math.sqrt(2))
    assert param.tolist() == pytest.approx(first, rel=1e-15)
    param.grad = torch.tensor([1.0, 1.0], dtype=torch.float64)
    optimizer.step()
    ratio = math.hypot(*first) * 3 / math.sqrt(10)
    assert param.tolist() == pytest.approx((first[0] - 0.1 * ratio, first[1] - 0.1 * ratio / 3), rel=1e-14)
    assert optimizer.trust_ratios() == {"0.0": pytest.approx(ratio, rel=1e-14)}


@FOREACH
@pytest.mark.parametrize("unit", [{"min_coeff": 1.0, "max_coeff": 1.0}, {"adapt": False}], ids=["bounds", "adapt"])
@pytest.mark.parametrize("decay", [0.0, 0.2])
def test_with_a_ratio_of_one_it_is_adamw(unit, decay, foreach) -> None:
    ours, theirs = parameters(), parameters()
    optimizer = LAMB(ours, lr=0.01, weight_decay=decay, foreach=foreach, **unit)
    adamw = torch.optim.AdamW(theirs, lr=0.01, weight_decay=decay)
    for step in range(50):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        optimizer.step()
        adamw.step()
    for mine, other in zip(ours, theirs, strict=True):
        assert_near(mine, double(other), 50)
        assert torch.equal(optimizer.state[mine]["exp_avg"], adamw.state[other]["exp_avg"])
        assert torch.equal(optimizer.state[mine]["exp_avg_sq"], adamw.state[other]["exp_avg_sq"])
    assert set(optimizer.trust_ratios().values()) == {1.0}


@FOREACH
def test_the_ratio_is_bounded_and_one_where_a_norm_is_zero(foreach) -> None:
    huge, tiny = nn.Parameter(torch.full((4,), 1e3)), nn.Parameter(torch.full((4,), 1e-3))
    blank, still = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.ones(4))
    params = [huge, tiny, blank, still]
    optimizer = LAMB(params, lr=0.1, max_coeff=7.0, min_coeff=0.25, foreach=foreach)
    for param in params:
        param.grad = torch.ones(4)
    still.grad = torch.zeros(4)
    optimizer.step()
    assert list(optimizer.trust_ratios().values()) == [7.0, 0.25, 1.0, 1.0]
    assert torch.allclose(blank, torch.full((4,), -0.1))
    assert torch.equal(still, torch.ones(4))
    unbounded = LAMB(params, max_coeff=None, min_coeff=None, foreach=foreach)
    unbounded.step()
    assert unbounded.trust_ratios()["0.0"] > 500


@FOREACH
def test_nan_is_shown(foreach) -> None:
    param = nn.Parameter(torch.ones(3))
    optimizer = LAMB([param], foreach=foreach)
    param.grad = torch.tensor([1.0, math.nan, 1.0])
    optimizer.step()
    assert math.isnan(optimizer.trust_ratios()["0.0"])


def strided(shape: tuple[int, ...], kind: str, dtype: torch.dtype, device: str) -> nn.Parameter:
    base = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(5)).to(device=device, dtype=dtype)
    views = {"gaps": base[..., 1], "transposed": base[..., 0].contiguous().t(), "flat": base[..., 0].contiguous()}
    return nn.Parameter(views[kind])


@DEVICE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("maximize", [False, True])
def test_both_paths_agree(dtype, device, maximize, monkeypatch) -> None:
    """Odd shapes, gaps between elements, transposed, empty; in batches of several sizes. On a CPU to the last bit."""
    monkeypatch.setattr(LAMB, "batch_elements", 100)
    results = []
    for foreach in (False, True):
        params = parameters([*SHAPES, (0,), (3, 0)], dtype, device)
        params += [strided((5, 6), kind, dtype, device) for kind in ("gaps", "transposed", "flat")]
        optimizer = LAMB(params, lr=0.02, weight_decay=0.1, maximize=maximize, foreach=foreach)
        for step in range(6):
            set_gradients(params, step)
            params[2].grad = None if step == 3 else params[2].grad
            params[-1].grad = params[-1].grad.t().contiguous().t()
            optimizer.step()
        results.append([*params, *(value for param in params for value in optimizer.state[param].values())])
    limit = 0 if device == "cpu" else 8 * torch.finfo(dtype).eps
    for each, many in zip(*results, strict=True):
        assert torch.allclose(each, many, rtol=limit, atol=limit)


def test_the_device_decides_the_path_if_nobody_does(monkeypatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("called")

    params = parameters()
    set_gradients(params, 0)
    monkeypatch.setattr(torch, "_foreach_lerp_", fail)
    LAMB(params).step()
    with pytest.raises(AssertionError, match="called"):
        LAMB(params, foreach=True).step()


@pytest.mark.gpu
@FOREACH
def test_a_step_does_not_wait_for_the_gpu(foreach) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        params = parameters(dtype=dtype, device="cuda")
        set_gradients(params, 0)
        optimizers = [
            LAMB(params, foreach=foreach),
            LAMB(params, lr=torch.tensor(1e-3, device="cuda"), foreach=foreach),
        ]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@FOREACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_parameters_take_steps_below_their_spacing(dtype, foreach) -> None:
    """The master copy walks as an fp32 parameter would with the same gradients; the parameter is it, rounded."""
    half, full = parameters([(40, 3)], dtype), parameters([(40, 3)])
    with torch.no_grad():
        full[0].copy_(half[0])
    ours, reference = LAMB(half, lr=1e-4, foreach=foreach), LAMB(full, lr=1e-4, foreach=foreach)
    for step in range(40):
        set_gradients(half, step)
        full[0].grad = half[0].grad.float()
        ours.step()
        reference.step()
    state = ours.state[half[0]]
    assert all(state[name].dtype == torch.float32 for name in ("exp_avg", "exp_avg_sq", "master_weight"))
    assert torch.equal(state["master_weight"], full[0])
    assert torch.equal(half[0], full[0].to(dtype))


@FOREACH
def test_what_others_write_to_a_half_parameter_is_kept(foreach) -> None:
    param = nn.Parameter(torch.linspace(0.5, 2, 64).bfloat16())
    optimizer = LAMB([param], lr=1e-4, foreach=foreach)
    for step in range(3):
        set_gradients([param], step)
        optimizer.step()
    before = optimizer.state[param]["master_weight"].clone()
    param.data[:8] = 100.0  # not even autograd's version counter sees this
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(param[:8], torch.full((8,), 100.0).bfloat16())
    master = optimizer.state[param]["master_weight"]
    assert torch.equal(master[:8], torch.full((8,), 100.0))
    assert torch.equal(master[8:], before[8:])
    assert not torch.equal(before[8:], param[8:].float())


def test_a_large_learning_rate_trains_a_small_network() -> None:
    """A two-layer network learns a fixed teacher; biases are in a group that is not adapted."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(256, 8, generator=generator)
    targets = torch.sin(inputs @ torch.randn(8, 2, generator=generator))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 2))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 1e-4},
        {"params": [p for p in model.parameters() if p.ndim == 1], "adapt": False},
    ]
    optimizer = LAMB(groups, lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20
