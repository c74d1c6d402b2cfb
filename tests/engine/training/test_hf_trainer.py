"""Layer drop under Hugging Face's Trainer, against our own loop with the same gates and counts of what ran."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import Trainer, TrainerCallback

from engine.errors import EngineError
from engine.training.hf_trainer import LayerDropCallback
from engine.training.layer_drop import LayerDrop, Schedule, draw_gates
from engine.training.loop import Loop
from engine.training.optimizer import build_optimizer
from engine.training.precision import Precision
from ops.optimizers import LAMB
from tests.engine.training.hf_small import arguments, collate, rows, small, training_logs, weights

BLOCKS = {"bert": "bert.encoder.layer", "gpt2": "transformer.h", "llama": "model.layers"}
ATTENTION = {"bert": "attention", "gpt2": "attn", "llama": "self_attn"}


class Recorder:
    """A collator that keeps the batches in the order in which Trainer took them."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def __call__(self, samples: Any) -> dict[str, Tensor]:
        self.seen.append(collate(samples))
        return self.seen[-1]


class Counter:
    """Counts the forward calls of a submodule of each block, those in a backward pass left out."""

    def __init__(self, model: nn.Module, kind: str) -> None:
        self.calls = 0
        for block in model.get_submodule(BLOCKS[kind]).children():
            block.get_submodule(ATTENTION[kind]).register_forward_hook(self._count)

    def _count(self, module: nn.Module, *rest: Any) -> None:
        # The run that looks at a block's structure is in evaluation mode, a recomputation within a backward pass.
        self.calls += module.training and torch._C._current_graph_task_id() == -1


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05)


def trainer_for(
    tmp_path: Path, model: nn.Module, *callbacks: TrainerCallback, optimizer: Any = sgd, **options: Any
) -> tuple[Trainer, Recorder]:
    recorder = Recorder()
    trainer = Trainer(
        model,
        arguments(tmp_path, **options),
        data_collator=recorder,
        train_dataset=rows(),
        eval_dataset=rows(4),
        optimizers=(optimizer(model), None),
        callbacks=list(callbacks),
    )
    return trainer, recorder


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The mean over the tokens of a micro-batch; all micro-batches have the same number of them."""
    found: Tensor = model(**batch).loss
    return found


def draws(schedule: Schedule, seed: int, micro_batches: list[int], layers: int = 4) -> list[int]:
    """How many layers run in each step of so many micro-batches, by the formula."""
    return [
        sum(sum(draw_gates(schedule.keep_probabilities(step, layers), seed, step, micro)) for micro in range(count))
        for step, count in enumerate(micro_batches)
    ]


CASES = [
    ("gpt2", 2, {}),
    ("gpt2", 1, {}),
    ("gpt2", 3, {"max_grad_norm": 0.1}),
    ("llama", 2, {"bf16": True}),
    ("llama", 2, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}),
    ("bert", 2, {}),
    ("bert", 2, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    ("bert", 2, {"torch_compile": True, "torch_compile_backend": "eager"}),
]


@pytest.mark.parametrize(("kind", "accumulation", "options"), CASES)
def test_it_computes_what_our_loop_computes(
    tmp_path: Path, kind: str, accumulation: int, options: dict[str, Any]
) -> None:
    callback, model = LayerDropCallback(0.4, gamma=0.5, seed=3), small(kind)
    counter = Counter(model, kind)
    options = {"max_steps": 5, "gradient_accumulation_steps": accumulation} | options
    trainer, recorder = trainer_for(tmp_path, model, callback, **options)
    trainer.train()

    own, drop = small(kind), LayerDrop(0.4, gamma=0.5, seed=3)
    precision = Precision("bf16") if options.get("bf16") else None
    loop = Loop(own, sgd(own), own_loss, (drop,), precision=precision, clip_norm=options.get("max_grad_norm"))
    steps = [recorder.seen[at : at + accumulation] for at in range(0, 5 * accumulation, accumulation)]
    reports = [loop.train_batch(step) for step in steps]

    logs = training_logs(trainer)
    assert [line["loss"] for line in logs] == pytest.approx([report.loss for report in reports], abs=6e-5)
    torch.testing.assert_close(weights(model), weights(own), rtol=2e-6, atol=2e-7)
    for line, report in zip(logs, reports, strict=True):
        assert {key: line[key] for key in report.metrics} == pytest.approx(report.metrics)
    expected = draws(Schedule(0.4, gamma=0.5), 3, [accumulation] * 5)
    assert [line["layer_drop/layers"] * accumulation for line in logs] == pytest.approx(expected)
    assert callback.layer_drop.executed == drop.executed == sum(expected) < 20 * accumulation
    assert "torch_compile" in options or counter.calls == sum(expected)


def test_lamb_is_an_optimizer_for_trainer(tmp_path: Path) -> None:
    def lamb(model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, "LAMB", {"lr": 0.01, "weight_decay": 0.1})

    callback, model = LayerDropCallback(gamma=0.5), small()
    trainer, recorder = trainer_for(tmp_path, model, callback, optimizer=lamb, gradient_accumulation_steps=1)
    trainer.train()
    own = small()
    loop = Loop(own, lamb(own), own_loss, (LayerDrop(gamma=0.5),))
    for batch in recorder.seen[:6]:
        loop.train_batch([batch])
    torch.testing.assert_close(weights(model), weights(own), rtol=0, atol=0)


def test_without_gamma_theta_follows_the_length_of_the_training(tmp_path: Path) -> None:
    trainer, _ = trainer_for(tmp_path, small(), LayerDropCallback(0.6), max_steps=4)
    trainer.train()
    thetas = [line["layer_drop/theta"] for line in training_logs(trainer)]
    assert thetas == [Schedule(0.6, total_steps=4).theta_at(step) for step in range(4)]


def test_an_epoch_may_end_within_a_step(tmp_path: Path) -> None:
    callback = LayerDropCallback(gamma=0.5, seed=1)
    trainer = Trainer(
        small(),
        arguments(tmp_path, max_steps=-1, num_train_epochs=2),
        data_collator=collate,
        train_dataset=rows(10),
        callbacks=[callback],
    )
    trainer.train()
    steps = [2, 2, 1, 2, 2, 1][: trainer.state.global_step]  # transformers 4.51 ends after four
    assert callback.layer_drop.micro_batches == sum(steps) > 5
    assert callback.layer_drop.executed == sum(draws(Schedule(0.5, gamma=0.5), 1, steps))


class Watcher(TrainerCallback):
    """Compares each evaluation with one of a bare copy of the model, and keeps what it is given to log."""

    def __init__(self) -> None:
        self.bare = small()
        self.evaluated = 0
        self.logged: list[dict[str, Any]] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.bare.load_state_dict(kwargs["model"].state_dict())
        with torch.no_grad():
            expected = float(self.bare.eval()(**collate(rows(4))).loss)
        assert metrics["eval_loss"] == pytest.approx(expected, abs=1e-6)
        self.evaluated += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.logged.append(dict(logs))


def test_evaluation_runs_every_layer_and_logs_hold_the_means_between_them(tmp_path: Path) -> None:
    callback, watcher = LayerDropCallback(gamma=0.5), Watcher()
    options = {"eval_strategy": "steps", "eval_steps": 1, "logging_steps": 3, "per_device_eval_batch_size": 4}
    trainer, _ = trainer_for(tmp_path, small(), callback, watcher, **options)
    trainer.train()
    assert watcher.evaluated == 6
    counts = draws(Schedule(0.5, gamma=0.5), 0, [2] * 6)
    probabilities = [sum(Schedule(0.5, gamma=0.5).keep_probabilities(step, 4)) for step in range(6)]
    logs = training_logs(trainer)
    assert [line["layer_drop/layers"] for line in logs] == [sum(counts[:3]) / 6, sum(counts[3:]) / 6]
    assert [line["layer_drop/expected"] for line in logs] == pytest.approx(
        [sum(probabilities[:3]) / 3, sum(probabilities[3:]) / 3]
    )
    told = [line for line in watcher.logged if "layer_drop/theta" in line]
    assert [line["loss"] for line in told] == [line["loss"] for line in logs], (
        "other callbacks see them, in these alone"
    )


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, restore: bool) -> None:
    def lamb(model: nn.Module) -> torch.optim.Optimizer:
        return LAMB(model.parameters(), lr=0.01)

    def build(*callbacks: TrainerCallback) -> Trainer:
        options = {"save_strategy": "steps", "save_steps": 3, "restore_callback_states_from_checkpoint": restore}
        return trainer_for(tmp_path, small(dropout=0.1), *callbacks, optimizer=lamb, **options)[0]

    whole = build(callback := LayerDropCallback(0.5, gamma=0.5, seed=3, paths=["transformer.h"]))
    whole.train()
    assert (tmp_path / "checkpoint-3").is_dir()
    resumed = build(LayerDropCallback(0.5, gamma=0.5, seed=3, paths=["transformer.h"]))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert training_logs(resumed)[3:] == training_logs(whole)[3:]
    torch.testing.assert_close(weights(resumed.model), weights(whole.model), rtol=0, atol=0)
    found = next(cb for cb in resumed.callback_handler.callbacks if isinstance(cb, LayerDropCallback))
    assert found.layer_drop.state_dict() == callback.layer_drop.state_dict()


def test_a_checkpoint_of_a_run_without_layer_drop_starts_the_counts(tmp_path: Path) -> None:
    trainer_for(tmp_path, small(), save_strategy="steps", save_steps=4)[0].train()
    callback = LayerDropCallback(gamma=0.5)
    trainer, _ = trainer_for(tmp_path, small(), callback)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert callback.layer_drop.executed == sum(draws(Schedule(0.5, gamma=0.5), 0, [2] * 6)[4:])


def test_the_model_is_left_as_it_was_found(tmp_path: Path) -> None:
    model, callback = small(), LayerDropCallback(gamma=0.5)
    hooks = copy.copy(model._forward_pre_hooks), copy.copy(model._forward_hooks)
    trainer, _ = trainer_for(tmp_path, model, callback)
    trainer.train()
    assert not any("forward" in block.__dict__ for block in model.transformer.h)
    assert (model._forward_pre_hooks, model._forward_hooks) == hooks
    first = callback.layer_drop.executed
    trainer.train()
    assert callback.layer_drop.executed == first, "a second training counts anew"


class Calls(Trainer):
    """A Trainer with a loss of the user's own."""

    def __init__(self, loss: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.own = loss

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return self.own(model, inputs)


def with_loss(tmp_path: Path, loss: Callable[..., Tensor], callback: LayerDropCallback) -> Calls:
    model = small()
    options = arguments(tmp_path, max_steps=4, gradient_accumulation_steps=1)
    return Calls(
        loss, model, options, data_collator=collate, train_dataset=rows(), optimizers=(sgd(model), None),
        callbacks=[callback],
    )  # fmt: skip


def test_two_passes_of_a_micro_batch_have_the_same_gates(tmp_path: Path) -> None:
    passes: list[bool] = []

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        first, second = model(**inputs).logits, model(**inputs).logits
        passes.append(torch.equal(first, second))
        return first.square().mean()

    callback = LayerDropCallback(gamma=0.5)
    with_loss(tmp_path, loss, callback).train()
    assert passes == [True] * 4
    assert callback.layer_drop.executed == sum(draws(Schedule(0.5, gamma=0.5), 0, [1] * 4)) < 16


def test_a_pass_in_evaluation_mode_within_a_micro_batch_runs_every_layer(tmp_path: Path) -> None:
    bare = small()

    def loss(model: nn.Module, inputs: Any) -> Tensor:
        bare.load_state_dict(model.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(model.eval()(**inputs).logits, bare.eval()(**inputs).logits, rtol=0, atol=0)
        found: Tensor = model.train()(**inputs).logits.square().mean()
        return found

    callback = LayerDropCallback(gamma=0.5)
    with_loss(tmp_path, loss, callback).train()
    assert callback.layer_drop.executed == sum(draws(Schedule(0.5, gamma=0.5), 0, [1] * 4))


class Between(TrainerCallback):
    """Runs the model in training mode where no micro-batch is under way."""

    def __init__(self) -> None:
        self.bare = small()
        self.runs = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bare.load_state_dict(kwargs["model"].state_dict())
        batch = collate(rows(2))
        with torch.no_grad():
            found, expected = kwargs["model"](**batch).logits, self.bare.train()(**batch).logits
        assert torch.equal(found, expected), "the gates are open behind a backward pass"
        self.runs += 1

    on_step_end = on_pre_optimizer_step


def test_gates_are_open_behind_the_last_backward_pass(tmp_path: Path) -> None:
    callback, between = LayerDropCallback(gamma=0.5), Between()
    trainer, _ = trainer_for(tmp_path, small(), callback, between, gradient_accumulation_steps=1)
    trainer.train()
    assert between.runs == 12
    assert callback.layer_drop.executed == sum(draws(Schedule(0.5, gamma=0.5), 0, [1] * 6))


def test_a_loss_without_the_model_is_an_error(tmp_path: Path) -> None:
    def loss(model: Any, inputs: Any) -> Tensor:
        found: Tensor = model.lm_head(model.transformer(inputs["input_ids"])[0]).square().mean()
        return found

    with pytest.raises(EngineError, match=r"^step 1: the loss was computed without a call of the model itself"):
        with_loss(tmp_path, loss, LayerDropCallback(gamma=0.5)).train()


@pytest.mark.parametrize("removed", [True, False])
def test_after_an_error_the_model_can_be_trained_again(tmp_path: Path, removed: bool) -> None:
    def loss(model: nn.Module, inputs: Any) -> Tensor:
        if callback.layer_drop.micro_batches == 3 and broken:
            inputs["input_ids"] = inputs["input_ids"] + 1000
        found: Tensor = model(**inputs).logits.square().mean()
        return found

    callback, broken = LayerDropCallback(gamma=0.5), [True]
    trainer = with_loss(tmp_path, loss, callback)
    with pytest.raises(IndexError):
        trainer.train()
    if removed:
        callback.remove()
        assert not any("forward" in block.__dict__ for block in trainer.model.transformer.h)
        assert not trainer.model._forward_pre_hooks
    broken.clear()
    trainer.train()
    assert callback.layer_drop.executed == sum(draws(Schedule(0.5, gamma=0.5), 0, [1] * 4))


# What is refused


class NoStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.linear(input_ids.float()) - labels).square().mean()}


def test_a_model_without_a_stack_is_an_error(tmp_path: Path) -> None:
    trainer, _ = trainer_for(tmp_path, NoStack(), LayerDropCallback(gamma=0.5))
    with pytest.raises(EngineError, match=r"^no stack of residual blocks in NoStack"):
        trainer.train()


def test_two_callbacks_are_an_error(tmp_path: Path) -> None:
    trainer, _ = trainer_for(tmp_path, small(), LayerDropCallback(gamma=0.5), LayerDropCallback(gamma=0.5))
    with pytest.raises(EngineError, match="already has a layer drop"):
        trainer.train()


def test_a_checkpoint_of_another_depth_is_an_error(tmp_path: Path) -> None:
    trainer_for(tmp_path, small(), LayerDropCallback(gamma=0.5), save_strategy="steps", save_steps=3)[0].train()
    saved = tmp_path / "checkpoint-3" / "trainer_state.json"
    text = saved.read_text()
    assert '"layers": 4' in text
    saved.write_text(text.replace('"layers": 4', '"layers": 6'))
    trainer, _ = trainer_for(tmp_path, small(), LayerDropCallback(gamma=0.5))
    with pytest.raises(EngineError, match="the checkpoint's layer_drop has 6 layers, this model has 4"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"theta": 0.0}, "^theta is 0.0: it must be greater than 0"),
        ({"gamma": 0.0}, "^gamma is 0.0"),
        ({"gamma": 0.1, "total_steps": 9}, "^gamma or total_steps"),
        ({"total_steps": 0}, "^total_steps is 0"),
    ],
)
def test_options_out_of_range_are_told_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        LayerDropCallback(**options)


def test_a_callback_that_came_too_late_is_an_error() -> None:
    callback = LayerDropCallback(gamma=0.5)
    with pytest.raises(EngineError, match="has no gates on a model: give it to Trainer before"):
        callback.on_step_begin(None, SimpleNamespace(global_step=1), None)
    with pytest.raises(EngineError, match=r"no layer drop before Trainer\.train\(\) begins"):
        _ = callback.layer_drop


class Wrapped(FullyShardedDataParallel):
    """One of FSDP's first generation, without the process group that it needs."""

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._fsdp_wrapped_module = nn.Linear(1, 1)


@pytest.mark.parametrize(
    ("model", "args", "message"),
    [
        (nn.Identity, {"n_gpu": 2}, r"copy the model to 2 GPUs .* torchrun"),
        (nn.Identity, {"deepspeed": "ds.json"}, "does not run under DeepSpeed's engine"),
        (Wrapped, {}, "needs FSDP2"),
        (nn.Identity, {"world_size": 2, "ddp_static_graph": True}, "leave ddp_static_graph out"),
    ],
)
def test_ways_to_run_that_do_not_fit_are_told(model: type[nn.Module], args: dict[str, Any], message: str) -> None:
    usual = {
        "deepspeed": None, "n_gpu": 1, "world_size": 1, "gradient_checkpointing": False,
        "ddp_find_unused_parameters": None,
    }  # fmt: skip
    state = SimpleNamespace(global_step=0, max_steps=9, stateful_callbacks={})
    with pytest.raises(EngineError, match=message):
        LayerDropCallback(gamma=0.5).on_train_begin(SimpleNamespace(**usual | args), state, None, model=model())
