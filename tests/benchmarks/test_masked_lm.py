"""The pre-training models beside Hugging Face's own, whose heads see every position."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.masked_lm import IGNORED, MaskedLM, Norm, Shape, masked_lm, random_batch
from engine.training.data.encoder import Encoder
from engine.training.data.packed import MaskedText
from engine.training.layer_drop import LayerDrop
from tests.benchmarks.small import loop_of
from tests.engine.training.data.texts import word_tokenizer

SMALL = Shape(layers=3, hidden=32, heads=2, length=24, vocabulary=90, dropout=0.0)
NORMS: tuple[Norm, ...] = ("postln", "preln")


def theirs(model: MaskedLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Hugging Face's loss, with positions counted as it does itself."""
    found: Tensor = model.model(ids, attention_mask=torch.ones_like(ids), labels=labels).loss
    return found


@pytest.mark.parametrize("norm", NORMS)
def test_loss_and_gradients_are_hugging_face_s(norm: Norm) -> None:
    model = masked_lm(norm, SMALL)
    batch = random_batch(SMALL, 5, "cpu")
    ids, labels = batch["input_ids"], batch["labels"]
    labels[0] = IGNORED  # rows ask for different numbers of tokens
    labels[1, labels[1] != IGNORED] = torch.where(torch.arange(SMALL.asked) < 2, 7, IGNORED)
    model(ids, labels).backward()
    mine = {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    expected = theirs(model, ids, labels)
    expected.backward()
    assert torch.allclose(model(ids, labels), expected, rtol=1e-5)
    assert "model.cls.predictions.transform.dense.weight" in mine or "model.lm_head.dense.weight" in mine
    for name, parameter in model.named_parameters():
        if name in mine:
            assert torch.allclose(mine[name], parameter.grad, rtol=1e-4, atol=1e-6), name  # type: ignore[arg-type]
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("length", [8, 24, 31, 128, 512])
def test_no_label_is_left_out(length: int) -> None:
    """The most labels that a chunk of the masked data has are those that the head has room for."""
    stream = np.random.default_rng(0).integers(5, 205, 20 * length).astype(np.int32)
    text = MaskedText(stream, Encoder(word_tokenizer()), length)
    labels = text.batch(np.arange(10), np.zeros(10, np.int64), 0)["labels"]
    most = int((labels != IGNORED).sum(1).max())
    assert most <= Shape(length=length).asked <= most + 1


def test_pre_norm_is_pre_norm() -> None:
    """The sum that enters a block leaves it by additions alone: the block's own norms, branches zeroed, change nothing.
    In a post-norm block they do."""
    for norm, same in (("postln", False), ("preln", True)):
        model = masked_lm(norm, SMALL)  # type: ignore[arg-type]
        block = next(module for name, module in model.named_modules() if name.endswith("encoder.layer.0"))
        for dense in (block.attention.output.dense, block.output.dense):  # type: ignore[union-attr]
            torch.nn.init.zeros_(dense.weight)  # type: ignore[arg-type, union-attr]
            torch.nn.init.zeros_(dense.bias)  # type: ignore[arg-type, union-attr]
        hidden = torch.randn(2, 5, SMALL.hidden) * 3
        found = block(hidden)
        found = found[0] if isinstance(found, tuple) else found
        assert torch.equal(found, hidden) is same


@pytest.mark.parametrize("norm", NORMS)
def test_layer_drop_finds_the_stack_and_both_branches(norm: Norm) -> None:
    model, drop = masked_lm(norm, SMALL), LayerDrop(0.5, gamma=1e6)
    loop = loop_of(model, drop)
    for seed in range(6):
        loop.train_batch([random_batch(SMALL, 2, "cpu", seed)])
    assert len(drop.stack.blocks) == SMALL.layers
    assert drop.stack.paths[0].endswith("encoder.layer")
    rules = {gate.residual.branches for gate in drop._gates if gate.residual is not None}
    assert rules == {("attention.output.dense", "output.dense")}


def test_random_batches_ask_for_what_they_hide() -> None:
    batch = random_batch(SMALL, 4, "cpu", 3)
    labels = batch["labels"]
    asked = labels != IGNORED
    assert asked.sum(1).tolist() == [SMALL.asked] * 4 == [4] * 4
    assert torch.equal(labels[asked], batch["input_ids"][asked])
    assert not torch.equal(labels, random_batch(SMALL, 4, "cpu", 4)["labels"])
