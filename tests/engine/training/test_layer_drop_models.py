"""Layer drop on Hugging Face's models, as they come: they learn, and with theta at 1 nothing changes, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from engine.errors import EngineError
from engine.training.block_gate import BlockGate
from engine.training.layer_drop import LayerDrop
from engine.training.loop import Loop, StepReport

SIZES = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
BERT = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
GPT2 = {"n_embd": 16, "n_layer": 4, "n_head": 2}


@dataclass(frozen=True)
class Case:
    """A model type with its class, sizes, and the class of its blocks."""

    kind: str
    model: str
    sizes: dict[str, Any]
    block: str

    def build(self, **options: Any) -> Any:
        """The model with random weights, dropout as the config has it."""
        torch.manual_seed(4)
        sizes = self.sizes if self.kind == "vit" else SIZES | self.sizes
        config = transformers.AutoConfig.for_model(self.kind, **sizes)
        return getattr(transformers, self.model)._from_config(config, **options)

    def batch(self, rows: int = 4) -> dict[str, Tensor]:
        """Inputs and labels."""
        generator = torch.Generator().manual_seed(6)
        if self.kind == "vit":
            return {"pixel_values": torch.randn(rows, 3, 8, 8, generator=generator), "labels": torch.arange(rows) % 3}
        ids = torch.randint(4, 50, (rows, 10), generator=generator)
        mask = torch.ones_like(ids)
        mask[0, 7:] = 0
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


DISTILBERT = {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32}
CASES = [
    Case("bert", "BertForMaskedLM", BERT, "BertLayer"),
    Case("roberta", "RobertaForMaskedLM", BERT, "RobertaLayer"),
    Case("distilbert", "DistilBertForMaskedLM", DISTILBERT, "TransformerBlock"),
    Case("gpt2", "GPT2LMHeadModel", GPT2, "GPT2Block"),
    Case("llama", "LlamaForCausalLM", BERT | {"num_key_value_heads": 1}, "LlamaDecoderLayer"),
    Case("vit", "ViTForImageClassification", BERT | {"image_size": 8, "patch_size": 4, "num_labels": 3}, "ViTLayer"),
]
BY_KIND = {case.kind: case for case in CASES}
models = pytest.mark.parametrize("case", CASES, ids=[case.kind for case in CASES])


def own_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    found: Tensor = model(**batch).loss
    return found


def train(case: Case, model: nn.Module, steps: int, *features: LayerDrop) -> list[StepReport]:
    loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=5e-3), own_loss, features)
    torch.manual_seed(12)
    return [loop.train_batch([case.batch(), case.batch(2)]) for _ in range(steps)]


@models
def test_it_learns(case: Case) -> None:
    drop = LayerDrop(0.5, gamma=0.5)
    reports = train(case, case.build(), 20, drop)
    assert sum(r.loss for r in reports[-4:]) < 0.92 * sum(r.loss for r in reports[:4])
    assert f"(4 {case.block}), scaled: branches " in drop.describe(), "in the paper's form, not as a whole"
    assert reports[0].metrics["layer_drop/layers"] == 4
    assert 20 * 2 < drop.executed < 20 * 2 * 3.6


@models
def test_at_theta_one_nothing_changes(case: Case) -> None:
    model = case.build()
    twin = copy.deepcopy(model)
    with_it = [r.loss for r in train(case, model, 4, LayerDrop(1.0, gamma=0.1))]
    assert with_it == [r.loss for r in train(case, twin, 4)]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


@models
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(case: Case, reentrant: bool) -> None:
    model = case.build()
    twin = copy.deepcopy(model)
    twin.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if getattr(model.config, "use_cache", None):
        model.config.use_cache = twin.config.use_cache = False
    first, second = LayerDrop(0.3, gamma=2.0), LayerDrop(0.3, gamma=2.0)
    assert train(case, model, 3, first) == train(case, twin, 3, second)
    assert first.executed == second.executed < 3 * 2 * 4
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


def gated(case: Case, probability: float) -> tuple[nn.Module, nn.Module, Tensor]:
    """The first block with a gate that keeps it, its twin without one, and hidden states; without dropout."""
    model = replace(case, sizes=case.sizes | {"attention_probs_dropout_prob": 0.0, "attn_pdrop": 0.0}).build()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and type(m[0]).__name__ == case.block)
    block = stack[0].eval().train()
    twin = copy.deepcopy(block).eval()
    BlockGate("block", block, {}, ()).set(True, probability)
    return block, twin, torch.randn(2, 5, 16)


def first_of(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def bert_by_hand(block: Any, x: Tensor, p: float) -> Tensor:
    attention, output = block.attention, block.output
    h = attention.output.LayerNorm(x + attention.output.dense(first_of(attention.self(x))) / p)
    result: Tensor = output.LayerNorm(h + output.dense(block.intermediate(h)) / p)
    return result


def gpt2_by_hand(block: Any, x: Tensor, p: float) -> Tensor:
    h = x + first_of(block.attn(block.ln_1(x))) / p
    result: Tensor = h + block.mlp(block.ln_2(h)) / p
    return result


@pytest.mark.parametrize(("kind", "by_hand"), [("bert", bert_by_hand), ("gpt2", gpt2_by_hand)])
def test_a_kept_block_is_the_papers(kind: str, by_hand: Callable[[Any, Tensor, float], Tensor]) -> None:
    block, twin, x = gated(BY_KIND[kind], 0.4)
    out = first_of(block(x))
    assert torch.allclose(out, by_hand(twin, x, 0.4), atol=1e-5)
    assert not torch.allclose(out, by_hand(twin, x, 1.0), atol=1e-2)


@models
def test_hidden_states_are_complete(case: Case) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        output = model(**batch, output_hidden_states=True)
        assert len(output.hidden_states) == 5
        found: Tensor = output.loss
        return found

    model = case.build()
    drop = LayerDrop(1e-6, gamma=1e6)
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.01), loss, (drop,))
    for _ in range(3):
        loop.train_batch([case.batch()])
    assert drop.executed < 12


@models
@pytest.mark.parametrize("by", ["argument", "config"])
def test_attentions_are_refused(case: Case, by: str) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch, **{"output_attentions": True} if by == "argument" else {}).loss
        return found

    model = case.build(attn_implementation="eager")
    model.config.output_attentions = by == "config"
    loop = Loop(model, torch.optim.SGD(model.parameters(), lr=0.01), loss, (LayerDrop(0.5, gamma=1.0),))
    with pytest.raises(EngineError, match="no attentions to give: set output_attentions to false"):
        loop.train_batch([case.batch()])
    with torch.no_grad():
        model.eval()
        assert len(model(**case.batch(), output_attentions=True).attentions) == 4, "evaluation has them all"


def test_position_biases_between_blocks_are_refused() -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 3, "num_heads": 2, "decoder_start_token_id": 0}
    case = Case("t5", "T5ForConditionalGeneration", sizes, "T5Block")
    with pytest.raises(EngineError, match=r"^decoder\.block\.0 returns more tensors than its hidden states"):
        train(case, case.build(), 1, LayerDrop(0.5, gamma=1.0))


def test_the_stages_of_swin() -> None:
    sizes = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "image_size": 16, "patch_size": 2, "window_size": 2}
    torch.manual_seed(4)
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, num_labels=3))
    drop = LayerDrop(0.5, gamma=1e6)
    loop = Loop(model, torch.optim.AdamW(model.parameters(), lr=5e-3), own_loss, (drop,))
    batch = {"pixel_values": torch.randn(3, 3, 16, 16), "labels": torch.arange(3)}
    losses = [loop.train_batch([batch]).loss for _ in range(12)]
    assert losses[-1] < losses[0]
    assert "swin.encoder.layers.0.blocks + swin.encoder.layers.1.blocks (4 SwinLayer)" in drop.describe()
