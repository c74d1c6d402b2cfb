"""A small Hugging Face model, data for it, and a Trainer; also what a rank does in test_hf_trainer_ranks.py."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from engine.errors import EngineError
from engine.training.hf_trainer import LayerDropCallback

SIZES: dict[str, Any] = {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "use_cache": False}
WIDTHS: dict[str, Any] = {
    "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32,
}  # fmt: skip
MODELS: Mapping[str, tuple[str, dict[str, Any]]] = {
    "bert": ("BertForMaskedLM", WIDTHS),
    "gpt2": ("GPT2LMHeadModel", {"n_embd": 16, "n_layer": 4, "n_head": 2}),
    "llama": ("LlamaForCausalLM", WIDTHS | {"num_key_value_heads": 1}),
}
#: What configurations call dropout.
DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "resid_pdrop", "embd_pdrop", "attn_pdrop")


def small(kind: str = "gpt2", dropout: float = 0.0) -> Any:
    """The model with random weights, always the same."""
    torch.manual_seed(4)
    name, sizes = MODELS[kind]
    config = transformers.AutoConfig.for_model(kind, **SIZES, **sizes, **dict.fromkeys(DROPOUTS, dropout))
    model = getattr(transformers, name)(config)
    if kind == "bert":
        model.accepts_loss_kwargs = False  # Trainer believes that its loss is over num_items_in_batch; it is a mean
    return model


def rows(count: int = 24) -> list[dict[str, Tensor]]:
    """Samples of 8 tokens that all count alike in the loss: a causal model predicts 7, and the first has no label."""
    generator = torch.Generator().manual_seed(6)
    ids = torch.randint(4, 50, (count, 8), generator=generator)
    return [{"input_ids": row, "labels": torch.cat([torch.tensor([-100]), row[1:]])} for row in ids]


def collate(samples: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """A batch."""
    return {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    """On the CPU, plain gradients, a log line a step."""
    fixed = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_MIXED_PRECISION", "ACCELERATE_DYNAMO_"))]:
        del os.environ[name]  # what transformers 4.51 leaves of the arguments before
    return TrainingArguments(str(directory), **fixed | options)


def training_logs(trainer: Trainer) -> list[dict[str, Any]]:
    """What Trainer logged of each step."""
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(model: nn.Module) -> list[Tensor]:
    """Copies of the parameters."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def run(directory: Path, **options: Any) -> dict[str, Any]:
    """Trains with layers dropped: the losses, the layers that ran, and the sum of the weights' squares."""
    model, callback = small(), LayerDropCallback(0.5, gamma=0.5, seed=3)
    trainer = Trainer(
        model, arguments(directory, **options), data_collator=collate, train_dataset=rows(), callbacks=[callback]
    )
    try:
        trainer.train()
    except EngineError as error:
        return {"error": str(error)}
    return {
        "losses": [line["loss"] for line in training_logs(trainer)],
        "executed": callback.layer_drop.executed,
        "squares": sum(float(w.double().square().sum()) for w in weights(model)),
    }


#: What each rank trains, by name.
RUNS: Mapping[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "ddp_find_unused_parameters": True,
    },
    "not told to look": {"ddp_find_unused_parameters": False},
    "not told to look for checkpoints": {"gradient_checkpointing": True},
    "reentrant": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
        "ddp_find_unused_parameters": True,
    },
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    results = {name: run(target, ddp_backend="gloo", **options) for name, options in RUNS.items()}
    (target / f"rank{sys.argv[2]}.json").write_text(json.dumps(results))
