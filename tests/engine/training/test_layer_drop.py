"""Progressive layer drop: its formulas, its gates, and training with it against the same computation written out."""

from __future__ import annotations

import copy
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training.block_gate import BlockGate
from engine.training.feature import Feature, Progress
from engine.training.layer_drop import LayerDrop, Schedule, draw_gates
from engine.training.loop import Loop
from tests.engine.training.blocks import (
    WIDTH,
    Inline,
    OneBranch,
    PostNorm,
    PreNorm,
    Stacked,
    TwoBranches,
    batches,
    squared,
)

#: Falls to theta within the first step.
AT_ONCE = 1e6


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01)


def with_drop(model: nn.Module, **options: Any) -> tuple[Loop, LayerDrop]:
    drop = LayerDrop(**{"theta": 0.5, "gamma": AT_ONCE} | options)
    return Loop(model, sgd(model), squared, (drop,)), drop


def drop_for(model: nn.Module, step: int = 1, **options: Any) -> tuple[LayerDrop, Progress]:
    """The feature at the start of a step, without a loop."""
    drop = LayerDrop(**{"theta": 0.5, "gamma": AT_ONCE} | options)
    progress = Progress(model.train(), sgd(model), step)
    drop.setup(progress)
    drop.step_start(progress)
    return drop, progress


# The formulas


def test_theta_falls_from_one() -> None:
    schedule = Schedule(0.5, gamma=0.001)
    assert schedule.theta_at(0) == 1.0
    assert schedule.theta_at(1000) == pytest.approx(0.5 + 0.5 / math.e)
    assert schedule.theta_at(10**7) == 0.5
    assert Schedule(0.6, total_steps=200).theta_at(2) == pytest.approx(0.6 + 0.4 / math.e), "gamma is 100 / T"


def test_deeper_layers_go_first() -> None:
    schedule = Schedule(0.5, gamma=AT_ONCE)
    assert schedule.keep_probabilities(0, 4) == (1.0,) * 4
    assert schedule.keep_probabilities(1, 4) == (0.875, 0.75, 0.625, 0.5)
    assert sum(schedule.keep_probabilities(1, 12)) == pytest.approx(8.75)
    assert Schedule(1, gamma=1).keep_probabilities(9, 3) == (1.0,) * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 0.0, "gamma": 1}, "^theta is 0.0: it must be greater than 0 and at most 1$"),
        ({"theta": 1.01, "gamma": 1}, "^theta is 1.01"),
        ({"theta": math.nan, "gamma": 1}, "^theta is nan"),
        ({"theta": "0.5", "gamma": 1}, "^theta is '0.5': it must be a number"),
        ({"theta": True, "gamma": 1}, "^theta is True"),
        ({"theta": 0.5}, "^gamma or total_steps: give one"),
        ({"theta": 0.5, "gamma": 1, "total_steps": 9}, "^gamma or total_steps: give one"),
        ({"theta": 0.5, "gamma": 0}, "^gamma is 0: it must be greater than 0"),
        ({"theta": 0.5, "gamma": math.inf}, "^gamma is inf"),
        ({"theta": 0.5, "total_steps": 0}, "^total_steps is 0: it must be a whole number"),
        ({"theta": 0.5, "total_steps": 9.5}, "^total_steps is 9.5"),
    ],
)
def test_options_out_of_range_are_told(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        LayerDrop(**options)


# The gates


def test_gates_follow_their_probabilities() -> None:
    probabilities = Schedule(0.5, gamma=AT_ONCE).keep_probabilities(1, 12)
    draws = 20_000
    kept = torch.tensor([draw_gates(probabilities, 0, step, 1) for step in range(draws)], dtype=torch.float64)
    assert float(kept.sum(1).mean()) == pytest.approx(8.75, rel=0.01)
    p = torch.tensor(probabilities, dtype=torch.float64)
    assert ((kept.mean(0) - p).abs() < 4.5 * (p * (1 - p) / draws).sqrt()).all()
    cross = torch.corrcoef(kept.T) - torch.eye(12)
    assert float(cross.abs().max()) < 4.5 / math.sqrt(draws), "layers are independent"
    again = torch.tensor([draw_gates(probabilities, 0, step, 2) for step in range(draws)], dtype=torch.float64)
    assert abs(float(torch.corrcoef(torch.stack([kept[:, 11], again[:, 11]]))[0, 1])) < 4.5 / math.sqrt(draws)


def test_gates_depend_on_their_arguments_alone() -> None:
    p = (0.5,) * 64
    state = torch.get_rng_state()
    first = draw_gates(p, 1, 2, 3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert draw_gates(p, 1, 2, 3) == first
    others = [(2, 2, 3), (1, 3, 3), (1, 2, 4), (1, 23, 3), (12, 3, 3)]
    assert len({first, *[draw_gates(p, *key) for key in others]}) == 6
    assert all(draw_gates((1.0,) * 64, 1, 2, 3))
    assert draw_gates((0.25,) * 64, 1, 2, 3) != first


def gates_of(blocks: nn.ModuleList) -> list[BlockGate]:
    return [BlockGate(f"blocks.{i}", block, {}, ()) for i, block in enumerate(blocks)]


@pytest.mark.parametrize("kind", [OneBranch, Inline])
def test_the_mean_over_all_gates_is_the_undropped_stack(kind: type[nn.Module]) -> None:
    """A stack of linear blocks: the sum over all 2^L outcomes, weighted, is what it gives without layer drop."""
    torch.manual_seed(2)
    blocks = nn.ModuleList(kind() for _ in range(4)).double().train()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    through = nn.Sequential(*blocks)
    undropped = through(x)
    probabilities = (0.9, 0.7, 0.6, 0.3)
    gates = gates_of(blocks)
    mean = torch.zeros_like(x)
    for outcome in itertools.product((True, False), repeat=4):
        for gate, keep, p in zip(gates, outcome, probabilities, strict=True):
            gate.set(keep, p)
        chance = math.prod(p if keep else 1 - p for keep, p in zip(outcome, probabilities, strict=True))
        mean += chance * through(x)
    assert torch.allclose(mean, undropped, rtol=0, atol=1e-13)


def test_one_gate_scales_both_branches() -> None:
    """The paper's block: its mean is x + A x + B x + (1/p) B A x."""
    torch.manual_seed(2)
    block = TwoBranches().double().train()
    x = torch.randn(5, WIDTH, dtype=torch.float64)
    a, b = block.first.weight, block.second.weight
    gate = gates_of(nn.ModuleList([block]))[0]
    gate.set(True, 0.8)
    kept = block(x)
    gate.set(False, 0.8)
    assert block(x) is x
    ax = x @ a.T
    assert torch.allclose(kept, x + (ax + x @ b.T) / 0.8 + ax @ b.T / 0.64, rtol=0, atol=1e-13)
    assert torch.allclose(0.8 * kept + 0.2 * x, x + ax + x @ b.T + ax @ b.T / 0.8, rtol=0, atol=1e-13)


def test_a_post_norm_block_is_scaled_before_its_norms() -> None:
    block = PostNorm().train()
    x = torch.randn(5, WIDTH)
    h = block.norm(x + block.mix(x) / 0.4)
    expected = block.norm2(h + block.down(F.gelu(block.up(h))) / 0.4)
    gate = gates_of(nn.ModuleList([block]))[0]
    gate.set(True, 0.4)
    assert torch.allclose(block(x), expected, atol=1e-6)


# Training


def written_out(model: Stacked, x: Tensor, keep: tuple[bool, ...], p: tuple[float, ...]) -> Tensor:
    """A stack of :class:`PreNorm` blocks with gates, as one would write it by hand."""
    x = model.start(x)
    for block, kept, probability in zip(model.blocks, keep, p, strict=True):
        if kept:
            x = x + block.mix(block.norm(x)) / probability
            x = x + block.down(F.gelu(block.up(block.norm2(x)))) / probability
    return model.end(x)


def test_training_is_what_one_would_write_by_hand() -> None:
    model = Stacked(PreNorm, 4)
    by_hand = copy.deepcopy(model)
    optimizer = sgd(by_hand)
    loop, drop = with_drop(model, gamma=0.3, seed=8)
    micro = batches(3)
    ran = 0
    for step in range(6):
        p = drop.schedule.keep_probabilities(step, 4)
        gates = [draw_gates(p, 8, step, index) for index in range(3)]
        optimizer.zero_grad()
        for (x, y), keep in zip(micro, gates, strict=True):
            ((written_out(by_hand, x, keep, p) - y).square().mean() / 3).backward()
        optimizer.step()
        report = loop.train_batch(micro)
        ran += sum(map(sum, gates))
        assert report.metrics == {
            "layer_drop/theta": drop.schedule.theta_at(step),
            "layer_drop/layers": sum(map(sum, gates)) / 3,
            "layer_drop/expected": sum(p),
        }
    pairs = zip(model.parameters(), by_hand.parameters(), strict=True)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in pairs)
    assert drop.executed == ran < 6 * 3 * 4
    assert drop.micro_batches == 18
    assert drop.describe() == "layer_drop: blocks (4 PreNorm), scaled: branches mix, down"


def test_layers_that_run_are_counted() -> None:
    model = Stacked(OneBranch, 12)
    drop, progress = drop_for(model)
    x = batches(1)[0][0]
    calls = [0] * 12
    for index, block in enumerate(model.blocks):
        block.inner.register_forward_hook(lambda *_, index=index: calls.__setitem__(index, calls[index] + 1))
    with torch.no_grad():
        for progress.micro_batch in range(3000):
            with drop.forward_context(progress):
                model(x)
    traced = 1
    assert sum(calls) - traced == drop.executed
    assert drop.step_end(progress)["layers"] == pytest.approx(8.75, rel=0.01)
    assert drop.step_end(progress)["expected"] == pytest.approx(8.75)


def test_a_dropped_layer_has_no_gradient_and_keeps_its_optimizer_state() -> None:
    model = Stacked(PreNorm, 3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    drop = LayerDrop(1e-9, gamma=AT_ONCE)
    loop = Loop(model, optimizer, squared, (drop,))
    loop.train_batch(batches(2))
    last = model.blocks[2]
    before, state = copy.deepcopy(last.state_dict()), copy.deepcopy(optimizer.state[last.mix.weight])
    for _ in range(3):
        loop.train_batch(batches(2))
        assert all(p.grad is None for p in last.parameters())
        assert model.start.weight.grad is not None
    assert all(torch.equal(before[key], value) for key, value in last.state_dict().items())
    assert all(torch.equal(state[key], value) for key, value in optimizer.state[last.mix.weight].items())
    assert state["step"] == 1


def test_a_resumed_run_draws_the_same_gates() -> None:
    def start() -> tuple[Loop, LayerDrop]:
        torch.manual_seed(0)
        return with_drop(Stacked(PreNorm, 4), gamma=0.2)

    loop, drop = start()
    micro = batches(2)
    for _ in range(4):
        loop.train_batch(micro)
    state, weights = copy.deepcopy(loop.state_dict()), copy.deepcopy(loop.progress.model.state_dict())
    rest = [loop.train_batch(micro) for _ in range(4)]
    resumed, again = start()
    resumed.progress.model.load_state_dict(weights)
    resumed.load_state_dict(state)
    torch.manual_seed(1234)
    assert [resumed.train_batch(micro) for _ in range(4)] == rest
    assert again.state_dict() == drop.state_dict()
    assert drop.micro_batches == 16
    other, _ = with_drop(Stacked(PreNorm, 3))
    with pytest.raises(EngineError, match=r"has 4 layers, this model has 3 in blocks \(3 PreNorm\)"):
        other.load_state_dict(state)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_gives_the_same_gradients(reentrant: bool) -> None:
    found = []
    for way in (None, reentrant):
        model = Stacked(lambda: PreNorm(0.3), 4, way)
        loop, drop = with_drop(model)
        torch.manual_seed(7)
        reports = [loop.train_batch(batches(3)) for _ in range(4)]
        found.append((reports, [p.grad for p in model.parameters()], drop.executed))
    (reports, gradients, executed), (again, recomputed, counted) = found
    assert reports == again
    assert executed == counted < 48, "a recomputation is not counted"
    for a, b in zip(gradients, recomputed, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


class Validation(Feature):
    """Runs the model in evaluation mode between a micro-batch's forward and backward pass."""

    name = "validation"

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def loss(self, progress: Progress, loss: Tensor) -> Tensor:
        progress.model.eval()
        with torch.no_grad():
            self.seen.append(progress.model(batches(1)[0][0]))
        progress.model.train()
        return loss


def test_validation_runs_every_layer_unscaled() -> None:
    model = Stacked(PreNorm, 4)
    validation, drop = Validation(), LayerDrop(0.01, gamma=AT_ONCE)
    loop = Loop(model, sgd(model), squared, (drop, validation))
    for _ in range(3):
        plain = copy.deepcopy(model).eval()
        loop.train_batch(batches(1))
        assert torch.equal(validation.seen[-1], written_out(plain, batches(1)[0][0], (True,) * 4, (1.0,) * 4))
    with torch.no_grad():  # in training mode too, outside of a step
        assert torch.equal(model(batches(1)[0][0]), written_out(model, batches(1)[0][0], (True,) * 4, (1.0,) * 4))
    assert drop.executed < 3 * 4


def test_autocast_leaves_the_stream_in_its_dtype() -> None:
    model = Stacked(PreNorm, 4)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return squared(model, batch)

    drop = LayerDrop(0.3, gamma=AT_ONCE)
    seen: list[Tensor] = []
    model.blocks[3].register_forward_hook(lambda module, args, out: seen.append(out[0]))
    loop = Loop(model, sgd(model), loss, (drop,))
    losses = [loop.train_batch(batches(2)).loss for _ in range(12)]
    assert losses[-1] < losses[0]
    assert {str(out.dtype) for out in seen} <= {"torch.bfloat16", "torch.float32"}
    assert drop.executed < 12 * 2 * 4


@pytest.mark.parametrize("kind", [PreNorm, Inline])
def test_torch_compile_changes_nothing(kind: type[nn.Module]) -> None:
    torch.compiler.reset()
    plain = Stacked(kind, 4)
    model = Stacked(kind, 4)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled.eval()(batches(1)[0][0])  # compiled without gates first
    first, _ = with_drop(plain, gamma=0.5)
    second, drop = with_drop(compiled, gamma=0.5)
    compiled.eval()(batches(1)[0][0])
    compiled.train()(batches(1)[0][0])  # and with gates that have no hooks yet
    for _ in range(8):
        a, b = first.train_batch(batches(2)), second.train_batch(batches(2))
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.metrics == b.metrics
    assert drop.executed < 8 * 2 * 4


# On and off


def test_remove_leaves_the_model_as_found() -> None:
    def look(model: nn.Module) -> list[Any]:
        return [
            (
                name,
                set(vars(module)),
                vars(module).get("forward"),
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
            )
            for name, module in model.named_modules()
        ]

    model = Stacked(PreNorm, 3)
    own = model.blocks[1].forward
    model.blocks[1].forward = own
    before = look(model)
    drop, progress = drop_for(model)
    with drop.forward_context(progress):
        model(batches(1)[0][0])
    assert look(model) != before
    drop.remove()
    assert look(model) == before
    drop.setup(progress)
    drop.remove()
    assert look(model) == before


def test_two_layer_drops_on_a_block_are_refused() -> None:
    model = Stacked(PreNorm, 3)
    first, progress = drop_for(model)
    with pytest.raises(EngineError, match=r"blocks\.0 already has a layer drop"):
        LayerDrop(0.5, gamma=1).setup(progress)
    first.setup(progress)
    first.remove()
    assert "forward" not in vars(model.blocks[0])


def test_a_copy_of_the_model_runs_its_own_weights() -> None:
    model = Stacked(PreNorm, 3)
    loop, _ = with_drop(model)
    loop.train_batch(batches(1))
    twin = copy.deepcopy(model)
    x = batches(1)[0][0]
    before = twin(x)
    loop.train_batch(batches(1))
    assert torch.equal(twin(x), before)
    assert not torch.equal(model(x), before)


class Besides(nn.Module):
    """Has a stack that its forward pass does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = Stacked(PreNorm, 2), Stacked(PreNorm, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.used(x)
        return out


def test_a_stack_that_does_not_run_is_an_error() -> None:
    loop, _ = with_drop(Besides())
    with pytest.raises(
        EngineError, match=r"ran without unused\.blocks\.0, .*2, so layer_drop applies to nothing there"
    ):
        loop.train_batch(batches(1))
    loop, drop = with_drop(Besides(), paths="used.blocks")
    loop.train_batch(batches(1))
    assert drop.stack.paths == ("used.blocks",)


def test_a_model_without_a_stack_is_an_error() -> None:
    with pytest.raises(EngineError, match="no stack of residual blocks in Linear"):
        with_drop(nn.Linear(4, 1))
    with pytest.raises(EngineError, match="no stack yet"):
        _ = LayerDrop(0.5, gamma=1).stack


def test_a_dropout_that_blocks_share_is_not_where_they_are_scaled() -> None:
    shared = nn.Dropout(0.0)

    def block() -> nn.Module:
        made = PreNorm()
        made.dropout = shared
        return made

    loop, drop = with_drop(Stacked(block, 3))
    loop.train_batch(batches(1))
    assert drop.describe().endswith("scaled: branches mix, down")


def test_an_error_in_the_forward_pass_opens_the_gates() -> None:
    model = Stacked(PreNorm, 3)
    drop, progress = drop_for(model, theta=1e-9)
    x = batches(1)[0][0]
    with pytest.raises(RuntimeError), drop.forward_context(progress):
        model(x[:, :3])
    assert torch.equal(model(x), written_out(model, x, (True,) * 3, (1.0,) * 3))
