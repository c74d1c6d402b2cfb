"""Training with fewer and fewer bits, against the same loop written out by torch's own means."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from config_schema.quantize_training import QuantizeTraining
from engine.errors import EngineError
from engine.training.curvature import Curvature
from engine.training.layer_drop import LayerDrop
from engine.training.loop import Loop
from engine.training.moq import MoQ
from engine.training.precision import LossScale, Precision
from ops.quantization import QuantizationError, dequantize, fake_quantize, quantize
from tests.engine.training.hf_small import rows, small
from tests.engine.training.trained import Stack, bert, masked

Bits = Callable[[int, str], int | None]


def section(**keys: Any) -> QuantizeTraining:
    return QuantizeTraining(**{"start_bits": 6, "target_bits": 4, "quantize_period": 2} | keys)


def batches(steps: int, count: int = 2) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [[torch.randn(8, 6, generator=generator) for _ in range(count)] for _ in range(steps)]


def squared(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).square().mean()
    return loss


def hugging(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def loop_of(model: nn.Module, chosen: QuantizeTraining, loss: Any = squared, **options: Any) -> tuple[Loop, MoQ]:
    moq = MoQ(chosen, curvature=options.pop("curvature", None))
    features = (*options.pop("features", ()), moq)
    return Loop(model, adam(model), loss, features, **options), moq


class StraightThrough(torch.autograd.Function):
    """The rounded weight forward, the gradient as it is backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, rounded: Tensor) -> Tensor:
        return rounded.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def by_hand(
    model: nn.Module,
    data: Sequence[Sequence[Any]],
    bits_at: Callable[[int], int | None],
    rounded: Callable[[Tensor, int], Tensor],
    names: Sequence[str],
    loss_of: Any = None,
    context: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> list[float]:
    """Each step's mean loss: weights of ``names`` are replaced by a function of themselves in each forward pass."""
    optimizer, found = adam(model), []
    for step, micro_batches in enumerate(data):
        optimizer.zero_grad()
        losses = []
        for batch in micro_batches:
            given = {}
            bits = bits_at(step)
            for name in names:
                weight = model.get_parameter(name)
                if bits is not None:
                    given[name] = StraightThrough.apply(weight, rounded(weight.detach(), bits))
            with context():
                if isinstance(batch, Tensor):
                    loss = functional_call(model, given, (batch,)).square().mean()
                else:
                    loss = functional_call(model, given, (), batch).loss
            (loss / len(micro_batches)).backward()
            losses.append(float(loss.detach().double()))
        optimizer.step()
        found.append(sum(losses) / len(losses))
    return found


def nearest(group_size: int | None, symmetric: bool) -> Callable[[Tensor, int], Tensor]:
    """By way of the real thing: packed and back."""
    return lambda weight, bits: dequantize(quantize(weight, bits=bits, group_size=group_size, symmetric=symmetric))


def linear_names(model: nn.Module) -> list[str]:
    """Of linear layers and the token embedding."""
    rounded = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    names = [f"{name}.weight" for name, _ in rounded]
    return ["bert.embeddings.word_embeddings.weight", *names] if hasattr(model, "bert") else names


def falling(step: int) -> int | None:
    """start_bits 6, target_bits 4, quantize_period 2, schedule_offset 1."""
    return None if step < 1 else 6 - (step >= 3) - (step >= 5)


# Against a loop by hand


@pytest.mark.parametrize("group_size", [None, 4])
@pytest.mark.parametrize("q_type", ["symmetric", "asymmetric"])
def test_each_loss_is_that_of_a_loop_by_hand(group_size: int | None, q_type: str) -> None:
    model, other, data = Stack(), Stack(), batches(8)
    loop, _ = loop_of(model, section(schedule_offset=1, group_size=group_size, q_type=q_type))
    found = [loop.train_batch(batch).loss for batch in data]
    wanted = by_hand(other, data, falling, nearest(group_size, q_type == "symmetric"), linear_names(other))
    assert found == wanted
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, other.get_parameter(name)), name
    plain = by_hand(Stack(), data, lambda step: None, nearest(None, True), [])
    assert found[0] == plain[0]
    assert found[1] != plain[1]


def test_plain_training_with_few_bits_from_the_first_step() -> None:
    data, other = batches(4), Stack()
    loop, moq = loop_of(Stack(), section(start_bits=3, target_bits=3))
    found = [loop.train_batch(batch).loss for batch in data]
    assert found == by_hand(other, data, lambda step: 3, nearest(None, True), linear_names(other))
    assert {stage.bits for stage in moq.stages} == {3}


def test_a_model_of_hugging_face_whose_embedding_is_its_head() -> None:
    data = [[masked(2, seed) for seed in (step, step + 50)] for step in range(5)]
    model, other = bert(dropout=0.0), bert(dropout=0.0)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    loop, moq = loop_of(model, section(), hugging)
    found = [loop.train_batch(batch).loss for batch in data]
    names = [name for name in linear_names(other) if name != "cls.predictions.decoder.weight"]
    assert found == by_hand(other, data, lambda step: 6 - (step >= 2) - (step >= 4), nearest(None, True), names)
    assert [f"{weight.name}.weight" for weight in moq.weights] == names


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_in_low_precision(mode: Any) -> None:
    """Autocast rounds the rounded weights, as it does others."""
    data, other = batches(6), Stack()
    precision = Precision(mode, "cpu", LossScale(256.0) if mode == "fp16" else None)
    loop, _ = loop_of(Stack(), section(schedule_offset=1), precision=precision)
    found = [loop.train_batch(batch).loss for batch in data]
    dtype = torch.bfloat16 if mode == "bf16" else torch.float16
    wanted = by_hand(
        other,
        data,
        falling,
        nearest(None, True),
        linear_names(other),
        context=lambda: torch.autocast("cpu", dtype=dtype),
    )
    assert found == pytest.approx(wanted, rel=0 if mode == "bf16" else 1e-3)


def test_transposed_weights_have_groups_along_their_inputs() -> None:
    """GPT-2's Conv1D stores [in, out]."""
    model = small("gpt2")
    loop, moq = loop_of(model, section(start_bits=4, target_bits=4, group_size=8), hugging)
    weight = next(weight for weight in moq.weights if weight.name == "transformer.h.0.attn.c_attn")
    seen = []
    module = model.get_submodule(weight.name)
    module.register_forward_hook(lambda m, args, out: seen.append((m.weight.clone(), m.weight.stride())))
    kept = weight.parameter.detach().clone()
    loop.train_batch([{key: value[None] for key, value in rows(1)[0].items()}])
    assert weight.transposed
    assert torch.equal(seen[0][0], fake_quantize(kept.T, bits=4, group_size=8).T)
    assert not torch.equal(seen[0][0], fake_quantize(kept, bits=4, group_size=8))
    assert seen[0][1] == kept.stride()


# What parameters hold


def test_parameters_hold_rounded_weights_within_a_step_alone() -> None:
    model = Stack()
    loop, moq = loop_of(model, section(), accumulation=2)
    names, states = list(model.state_dict()), copy.deepcopy(model.state_dict())
    pointers = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    loss = loop.forward(batches(1)[0][0])
    inside = model.state_dict()
    assert {name for name in names if not torch.equal(inside[name], states[name])} == set(linear_names(model))
    loop.backward(loss)
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())
    loop.backward(loop.forward(batches(1)[0][1]))
    loop.step()
    assert list(model.state_dict()) == names
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == pointers
    assert moq.step_end(loop.progress)["bits"] == 6


def test_what_fails_leaves_the_weights() -> None:
    model = Stack()
    loop, _ = loop_of(model, section())
    states = copy.deepcopy(model.state_dict())
    for bad in (torch.ones(2, 5), torch.full((2, 6), torch.nan)):
        with pytest.raises((EngineError, RuntimeError)):
            loop.train_batch([bad])
        assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())


def test_a_backward_pass_that_fails_leaves_the_weights() -> None:
    model = Stack()

    def breaks(grad: Tensor) -> Tensor:
        raise RuntimeError("out of memory")

    def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
        output = model(batch)
        output.register_hook(breaks)
        loss: Tensor = output.square().mean()
        return loss

    loop, _ = loop_of(model, section(), loss_of)
    states = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="out of memory"):
        loop.train_batch(batches(1)[0])
    assert all(torch.equal(tensor, states[name]) for name, tensor in model.state_dict().items())


def test_an_overflow_takes_no_bit_twice() -> None:
    model = Stack()
    precision = Precision("fp16", "cpu", LossScale(2.0**40))
    loop, moq = loop_of(model, section(start_bits=8, quantize_period=1), precision=precision)
    reports = [loop.train_batch(batch) for batch in batches(60)]
    assert sum(report.skipped for report in reports) > 4
    bits = [report.metrics["quantize_training/bits"] for report in reports if not report.skipped]
    assert bits[:9] == [8, 7, 6, 6, 5, 5, 5, 5, 4]
    assert {stage.bits for stage in moq.stages} == {4}


# Rounding by chance, and mixing


def test_stochastic_rounding_is_of_the_seed_and_the_step_alone() -> None:
    def seen(seed: int, skip: int = 0) -> list[Tensor]:
        model = Stack()
        loop, moq = loop_of(model, section(rounding="stochastic", seed=seed))
        loop.progress.step = skip
        kept: list[Tensor] = []
        model.blocks[0].inner.register_forward_hook(lambda m, args, out: kept.append(m.weight.clone()))
        torch.manual_seed(skip)
        state = torch.get_rng_state()
        loop.train_batch(batches(1)[0])
        assert torch.equal(torch.get_rng_state(), state)
        step = quantize(Stack().blocks[0].inner.weight, bits=moq.stages[0].bits, group_size=None).scales.float()
        assert bool(((kept[0] / step) % 1 == 0).all()), "levels of the grid"
        return kept

    first = seen(0)
    assert torch.equal(first[0], first[1]), "one rounding a step"
    assert torch.equal(first[0], seen(0)[0])
    assert not torch.equal(first[0], seen(1)[0])
    assert not torch.equal(first[0], seen(0, skip=1)[0])


def test_weights_are_mixed_with_their_rounded_ones() -> None:
    model, data = Stack(), batches(4, 1)
    loop, _ = loop_of(model, section(start_bits=2, target_bits=2, quantize_change_ratio=0.5))
    seen: list[Tensor] = []
    model.out.register_forward_hook(lambda m, args, out: seen.append(m.weight.clone()))
    kept = []
    for batch in data:
        own = model.out.weight.detach().clone()
        kept.append(loop.train_batch(batch).metrics["quantize_training/kept"])
        share = kept[-1]
        wanted = share * own + (1 - share) * fake_quantize(own, bits=2, group_size=None)
        torch.testing.assert_close(seen[-1], wanted)
    assert kept == [1, 0.5, 0, 0]


# With what is around it


def test_layers_are_dropped_too() -> None:
    """Gates and losses are those of a run by hand in which the same blocks are left out."""
    data = batches(6, 3)
    model = Stack(4)
    drop = LayerDrop(0.3, gamma=2.0)
    loop, _ = loop_of(model, section(), features=(drop,))
    reports = [loop.train_batch(batch) for batch in data]
    other = Stack(4)
    names, optimizer = linear_names(other), adam(other)
    other_drop = LayerDrop(0.3, gamma=2.0)

    class Replaced(nn.Module):
        """The weights of a step, rounded, in a copy that gets the gates."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = copy.deepcopy(other)

    replaced = Replaced()
    plain = Loop(replaced.inner, torch.optim.SGD(replaced.inner.parameters(), lr=0.0), squared, (other_drop,))
    found = []
    for step, batch in enumerate(data):
        bits = 6 - (step >= 2) - (step >= 4)
        with torch.no_grad():
            for name, parameter in replaced.inner.named_parameters():
                own = other.get_parameter(name)
                parameter.copy_(nearest(None, True)(own, bits) if name in names else own)
        found.append(plain.train_batch(batch).loss)
        for name, parameter in replaced.inner.named_parameters():
            other.get_parameter(name).grad = parameter.grad
        optimizer.step()
    assert [report.loss for report in reports] == found
    assert any(report.metrics["layer_drop/layers"] < 4 for report in reports)


def test_a_run_that_is_resumed_goes_on_bit_for_bit() -> None:
    chosen = section(start_bits=8, rounding="stochastic", quantize_change_ratio=0.5, eigenvalue={})
    data = batches(16)

    def fresh() -> tuple[Loop, MoQ]:
        return loop_of(Stack(), chosen, curvature=Curvature(seed=3))

    whole, _ = fresh()
    wanted = [whole.train_batch(batch) for batch in data]
    first, _ = fresh()
    for batch in data[:9]:
        first.train_batch(batch)
    state = copy.deepcopy(
        (first.progress.model.state_dict(), first.progress.optimizer.state_dict(), first.state_dict())
    )
    second, moq = fresh()
    second.progress.model.load_state_dict(state[0])
    second.progress.optimizer.load_state_dict(state[1])
    second.load_state_dict(state[2])
    assert [second.train_batch(batch) for batch in data[9:]] == wanted[9:]
    assert min(report.metrics["quantize_training/bits"] for report in wanted) < 8
    assert set(moq.eigenvalues) == {"blocks.0", "blocks.1", "blocks.2"}


def test_another_models_state_is_refused() -> None:
    loop, _ = loop_of(Stack(3), section())
    other, _ = loop_of(Stack(3), section(exclude=("out",)))
    with pytest.raises(EngineError, match=r"rounds other weights than this run \(4 and 3; out\)"):
        other.load_state_dict(loop.state_dict())


# Second order


class Fixed(Curvature):
    """Says what it was told."""

    def __init__(self, *shares: float) -> None:
        super().__init__()
        self.fixed, self.asked = list(shares), 0

    def shares(self, loss: Tensor, blocks: Sequence[Sequence[Tensor]]) -> list[float]:
        assert len(blocks) == len(self.fixed)
        self.asked += 1
        return self.fixed


def test_steep_blocks_keep_their_bits_longer() -> None:
    curvature = Fixed(1.0, 0.5, 0.1)
    loop, moq = loop_of(Stack(), section(start_bits=7, quantize_period=1, eigenvalue={}), curvature=curvature)
    metrics = [loop.train_batch(batch).metrics for batch in batches(40)]

    def lost(layer: str) -> list[int]:
        bits = [int(line[f"quantize_training/bits/{layer}"]) for line in metrics]
        return [step for step in range(1, len(bits)) if bits[step] < bits[step - 1]]

    assert lost("blocks.0") == [1, 10], "2 x 5 x as long each time, the last at step 100"
    assert lost("blocks.1") == [1, 6, 36], "2 x 3 x"
    assert lost("blocks.2") == lost("out") == [1, 2, 4]
    assert curvature.asked == 4, "behind a lost bit that is not the last one: at steps 1, 2, 6 and 10"
    assert moq.eigenvalues == {"blocks.0": 1.0, "blocks.1": 0.5, "blocks.2": 0.1}


def test_eigenvalues_are_those_of_the_loss_at_the_rounded_weights() -> None:
    """By hand: round, then ask of the Hessian; and the step's own gradients are what they would have been."""
    model, data = Stack(), batches(3)
    curvature = Curvature(1000, 1e-6)
    loop, moq = loop_of(model, section(start_bits=8, quantize_period=1, eigenvalue={}), curvature=curvature)
    losses = [loop.train_batch(data[0]).loss]
    other = copy.deepcopy(model)
    with torch.no_grad():
        for name in linear_names(other):
            other.get_parameter(name).copy_(nearest(None, True)(other.get_parameter(name), 7))
    wanted = curvature.shares(squared(other, data[1][0]), [[block.inner.weight] for block in other.blocks])
    losses += [loop.train_batch(batch).loss for batch in data[1:2]]
    assert list(moq.eigenvalues.values()) == pytest.approx(wanted, rel=1e-6)
    plain = Stack()
    assert losses == by_hand(plain, data[:2], lambda step: 8 - step, nearest(None, True), linear_names(plain))


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama"])
def test_attention_is_differentiated_twice(kind: str) -> None:
    model = small(kind)
    batch = {key: torch.stack([row[key] for row in rows(4)]) for key in rows(4)[0]}
    chosen = section(start_bits=8, quantize_period=1, eigenvalue={"max_iter": 3})
    loop, moq = loop_of(model, chosen, hugging, curvature=Curvature(3))
    for _ in range(2):
        loop.train_batch([batch])
    shares = list(moq.eigenvalues.values())
    assert len(shares) == 4
    assert max(shares) == 1
    assert 0 < min(shares) < 1


def test_eigenvalues_need_blocks() -> None:
    with pytest.raises(EngineError, match=r"eigenvalue: no weight of the blocks blocks \(3 Block\) is rounded"):
        loop_of(Stack(), section(exclude=("blocks",), eigenvalue={}), curvature=Curvature())


# Bits in time


def test_a_schedule_that_ends_too_late_is_refused(caplog: pytest.LogCaptureFixture) -> None:
    def begin(length: int | None, **keys: Any) -> None:
        curvature = Curvature() if "eigenvalue" in keys else None
        Loop(Stack(), adam(Stack()), squared, (MoQ(section(**keys), lambda: length, curvature),))

    begin(5)
    with pytest.raises(
        EngineError,
        match=r"from 6 to 4 bits takes 5 optimizer steps, and the training has 4: lower quantize_period \(now 2\)",
    ):
        begin(4)
    with pytest.raises(EngineError, match="takes 15 optimizer steps"):
        begin(14, quantize_change_ratio=0.1)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    with caplog.at_level(logging.WARNING):
        begin(20, eigenvalue={})
        assert "needs 21 optimizer steps to 4 bits, and the training has 20" in caplog.text
        begin(None)
    assert "4 bits need 5 optimizer steps; how many there will be is not known" in caplog.text


# What is served


def test_what_training_ends_with_is_what_quantize_gives() -> None:
    model, data = Stack(), batches(6)
    loop, moq = loop_of(model, section(rounding="stochastic", group_size=4))
    for batch in data:
        loop.train_batch(batch)
    own = copy.deepcopy(model.state_dict())
    quantized = moq.quantized()
    with moq.served():
        inside = copy.deepcopy(model.state_dict())
        output = model(data[0][0])
    assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    assert set(quantized) == set(linear_names(model))
    for name, tensor in inside.items():
        if name in quantized:
            assert quantized[name].bits == 4
            assert torch.equal(dequantize(quantized[name]), tensor)
            assert torch.equal(tensor, dequantize(quantize(own[name], bits=4, group_size=4)))
        else:
            assert torch.equal(tensor, own[name])
    model.load_state_dict(inside)
    assert torch.equal(model(data[0][0]), output)


def test_nothing_is_rounded_before_the_offset() -> None:
    model = Stack()
    loop, moq = loop_of(model, section(start_bits=16, schedule_offset=2))
    own = copy.deepcopy(model.state_dict())
    with moq.served():
        assert all(torch.equal(tensor, own[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(QuantizationError, match="16 bits"):
        moq.quantized()
    for batch in batches(2):
        loop.train_batch(batch)
    own = copy.deepcopy(model.state_dict())
    with moq.served():
        assert not torch.equal(model.out.weight, own["out.weight"])


def test_within_a_step_its_weights_stay() -> None:
    model = Stack()
    loop, moq = loop_of(model, section(), accumulation=1)
    loss = loop.forward(batches(1)[0][0])
    rounded = model.out.weight.detach().clone()
    with moq.served():
        assert torch.equal(model.out.weight, rounded)
    assert torch.equal(model.out.weight, rounded)
    loop.backward(loss)
