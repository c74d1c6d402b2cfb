"""Tiny checkpoints with tokenizers, for tests that begin with text: what ``save_pretrained`` leaves in a directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from engine.verify import AUTO_CLASSES
from ops.spec import Task

CORPUS = (
    "The moon is a quiet place and the night is long.",
    "A small boat went out to sea under the moon.",
    "Nobody knew where the road would end, or when.",
    "the quick brown fox jumps over the lazy dog 0123456789 ,.;:!?'()-",
)

#: Sizes that every encoder family of Hugging Face knows by one name or the other.
ENCODER_SIZES: Mapping[str, Mapping[str, Any]] = {
    "bert": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
    "roberta": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "pad_token_id": 0,
        "bos_token_id": 101,
        "eos_token_id": 102,
        "type_vocab_size": 2,
    },
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48},
}

DECODER_SIZES: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 96},
    "llama": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 96,
    },
}
#: What a checkpoint of real text needs of MiniLM's: its WordPiece vocabulary and how the tokenizer uses it.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")


def save_encoder(directory: Path, minilm: Path, model_type: str, task: Task, **changes: Any) -> Path:
    """A random encoder with MiniLM's tokenizer; its outputs are spread enough to have clear winners."""
    import transformers

    values = {"vocab_size": 30522, "max_position_embeddings": 130, **ENCODER_SIZES[model_type], **changes}
    config = transformers.AutoConfig.for_model(model_type, **values)
    torch.manual_seed(7)
    model = getattr(transformers, AUTO_CLASSES[task]).from_config(config).eval()
    _randomize(model)
    model.save_pretrained(directory)
    for name in TOKENIZER_FILES:
        if (minilm / name).is_file():
            shutil.copy(minilm / name, directory / name)
    return directory


def save_decoder(directory: Path, model_type: str, *, chat: bool = False, **changes: Any) -> Path:
    """A random decoder with a byte-level BPE tokenizer trained on four sentences; ``chat`` gives it a template."""
    import transformers

    tokenizer = bpe_tokenizer()
    if chat:
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    eos = tokenizer.eos_token_id
    values = {
        "vocab_size": len(tokenizer),
        "bos_token_id": eos,
        "eos_token_id": eos,
        **DECODER_SIZES[model_type],
        **changes,
    }
    config = transformers.AutoConfig.for_model(model_type, **values)
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    _randomize(model)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def bpe_tokenizer() -> Any:
    """A byte-level BPE tokenizer of some 320 tokens, as Hugging Face's class."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Transformers warns of texts longer than model_max_length; the command line must not show that.
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", model_max_length=16)


def _randomize(model: Any) -> None:
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.25)
        else:
            parameter.data.add_(torch.randn_like(parameter) * 0.2)


def write_config(path: Path, model: Path, **sections: Any) -> Path:
    """A configuration file for the checkpoint ``model``, on the CPU."""
    path.write_text(json.dumps({"model": {"path": str(model)}, "device": "cpu", **sections}), encoding="utf-8")
    return path
