"""Turn a Llama-family GGUF file into an ordinary Hugging Face directory: safetensors in bf16, config, tokenizer.

The weights come through transformers' own GGUF reader (dequantized to fp32, then rounded to bf16). ``save_pretrained``
refuses a model that was read from a GGUF, and what it writes depends on the version of transformers (4.x and 5.x spell
the rotary base, the dtype and the tokenizer's class differently), so the small JSON files are written here, in the
spelling that both read.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

# The keys of config.json that transformers 4.51 and 5.x both read with one meaning.
CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
    "tie_word_embeddings",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)

# GPT-2's byte-level BPE, which is what a GGUF means by `tokenizer.ggml.model = gpt2`; SmolLM2 also splits every digit.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
TOKENIZER_PARTS: dict[str, Any] = {
    "normalizer": None,
    "pre_tokenizer": {
        "type": "Sequence",
        "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL],
    },
    "post_processor": None,
    "decoder": BYTE_LEVEL,
}
BPE_OPTIONS = {
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


def convert_gguf(gguf: Path, target: Path) -> None:
    """Write the checkpoint directory ``target`` (created) from the file ``gguf``."""
    target.mkdir(parents=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    config = model_config(model.config)
    tensors = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    save_file(tensors, str(target / "model.safetensors"), metadata={"format": "pt"})
    (target / "model.safetensors").chmod(0o644)  # safetensors creates it readable by its owner alone
    _write_json(target / "config.json", config)
    _write_json(target / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
    _write_json(target / "tokenizer.json", tokenizer_json(tokenizer), indent=None)
    _write_json(target / "tokenizer_config.json", tokenizer_config(tokenizer, config))


def model_config(config: Any) -> dict[str, Any]:
    """``config.json``: the Hugging Face config without ``quantization_config``, spelled for both 4.x and 5.x."""
    values = config.to_dict()
    rope = values.get("rope_parameters") or {"rope_theta": values["rope_theta"], "rope_type": "default"}
    if rope["rope_type"] != "default":
        raise ValueError(f"this script writes plain rotary embeddings, but the GGUF says {rope}")
    # GGUF stores eps as fp32 (9.999999747378752e-06): seven digits give back the number that was meant.
    values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.6g}")
    chosen = {key: values[key] for key in CONFIG_KEYS}
    return {
        "architectures": ["LlamaForCausalLM"],
        **chosen,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None,
        "torch_dtype": "bfloat16",
    }


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """``tokenizer.json``: vocabulary and merges as the GGUF has them, the rest as byte-level BPE is defined.

    transformers 4.x rebuilds a Llama GGUF's tokenizer with SentencePiece's steps (a BOS in front, byte fallback), 5.x
    without: both end up the same here.
    """
    values: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    values["model"].update(BPE_OPTIONS)
    return {**values, **TOKENIZER_PARTS}


def tokenizer_config(tokenizer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json``: special tokens by the config's own ids, and the chat template inside it."""
    special = {
        name: tokenizer.convert_ids_to_tokens(config[f"{name}_id"]) for name in ("bos_token", "eos_token", "pad_token")
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "unk_token": tokenizer.unk_token,
        "model_max_length": config["max_position_embeddings"],
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }


def _write_json(path: Path, values: dict[str, Any], indent: int | None = 2) -> None:
    path.write_text(json.dumps(values, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
