"""The engine as a user meets it: ways to make one, what it says of itself, embeddings, real models."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

from config_schema import ConfigError, load_config
from engine import Engine
from engine.errors import CheckpointError, EngineError
from tests.engine.tiny import flat, reference, tiny, token_rows

SENTENCES = [
    "A cat sits on the mat.",
    "A kitten rests on the rug, purring quietly while the rain falls on the roof of the old house.",
    "Stocks fell.",
    "The orchestra played a symphony by Mahler to a full hall.",
]


def test_a_path_a_dict_and_a_config_make_the_same_engine(tmp_path: Path) -> None:
    document = {"model": {"path": str(tiny("gpt2", "causal_lm").directory)}, "device": "cpu"}
    path = tmp_path / "config.json"
    path.write_text(load_config(document).to_json())
    found = [
        Engine(source).generate([5, 6], max_new_tokens=4).token_ids
        for source in (path, str(path), document, load_config(document))
    ]
    assert all(ids == found[0] for ids in found)


def test_overrides_reach_the_engine(tmp_path: Path) -> None:
    document = {"model": {"path": str(tiny("gpt2", "causal_lm").directory)}, "device": "cpu"}
    assert Engine(document, overrides=["precision=bf16"]).plan.dtype is torch.bfloat16


def test_bad_configurations_are_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"\$\.precison: unknown key, did you mean \"precision\""):
        Engine({"model": {"path": "x"}, "precison": "fp32"})
    with pytest.raises(ConfigError, match=r"\$\.precision"):
        Engine.from_pretrained("x", precision="fp12")
    with pytest.raises(ConfigError, match=r"\$\.inferense"):
        Engine.from_pretrained("x", inferense={"max_batch": 2})


def test_a_directory_that_is_not_there() -> None:
    with pytest.raises(CheckpointError, match="no/such/directory"):
        Engine.from_pretrained("./no/such/directory")


def test_an_encoder_does_not_generate_and_a_decoder_does_not_encode() -> None:
    with pytest.raises(EngineError, match="generate needs a causal LM, this BERT model is an encoder"):
        Engine.from_pretrained(tiny("bert", "embedding").directory, device="cpu").generate([5])
    with pytest.raises(EngineError, match=r"encode needs an encoder, but \$\.model\.task is causal_lm"):
        Engine.from_pretrained(tiny("gpt2", "causal_lm").directory, device="cpu").encode([[5]])


def test_a_live_model_needs_no_path_and_follows_its_own_class() -> None:
    one = tiny("bert", "masked_lm")
    engine = Engine({"device": "cpu"}, model=one.model)
    rows = token_rows(one.vocab_size)
    ours = flat(engine(rows), rows, "masked_lm", "right")
    assert torch.allclose(ours, reference(one.model, rows, "masked_lm"), atol=1e-4 * float(ours.abs().max()))
    with pytest.raises(EngineError, match="model=: wanted a Hugging Face model, got Linear"):
        Engine({"device": "cpu", "model": {"path": "x"}}, model=torch.nn.Linear(2, 2))
    with pytest.raises(EngineError, match="give token ids, or tokenizer="):
        engine("text")


def test_explain_resolves_every_auto() -> None:
    engine = Engine.from_pretrained(tiny("gpt2", "causal_lm").directory)
    text = engine.explain()
    document = text.split("\n\n")[0]
    assert '"auto"' not in document.replace('"embedding": {\n    "pooling": "auto",\n    "normalize": "auto"', "")
    for path in ("$.model.task", "$.device", "$.precision", "$.kernels", "$.inference.max_tokens"):
        assert any(line.startswith(f'{path}: "auto" is ') for line in text.splitlines()), path
    assert '$.inference.max_tokens: "auto" is 128: all of the model\'s positions' in text


def test_verify_tells_right_from_wrong() -> None:
    one = tiny("llama", "causal_lm")
    engine = Engine.from_pretrained(one.directory, device="cpu", precision="fp32")
    assert engine.verify().ok
    assert engine.verify(token_rows(one.vocab_size)).ok
    assert "agrees with Hugging Face" in str(engine.verify())
    engine._runner().weights.layers[1].ffn_norm.weight.mul_(1.01)
    spoiled = engine.verify()
    assert not spoiled.ok
    assert "DIFFERS from Hugging Face" in str(spoiled)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_verify_allows_for_the_rounding_of_the_precision(precision: str) -> None:
    assert Engine.from_pretrained(tiny("gpt2", "causal_lm").directory, device="cpu", precision=precision).verify().ok


def test_outputs_are_hugging_faces_classes() -> None:
    engine = Engine.from_pretrained(tiny("bert", "embedding").directory, device="cpu")
    found = engine([[5, 6, 7], [8]])
    assert type(found).__name__ == "BaseModelOutputWithPooling"
    assert found.last_hidden_state.shape == (2, 3, 48)
    assert found.pooler_output.shape == (2, 48)
    assert bool((found.last_hidden_state[1, 1:] == 0).all()), "padded places are zero"


# ---- real models ----


def test_minilm_embeds_as_sentence_transformers_would(minilm_dir: Path) -> None:
    """Mean of the last hidden states over real tokens, normalized: computed here with Hugging Face's model."""
    engine = Engine.from_pretrained(minilm_dir, device="cpu")
    tokenizer, model = AutoTokenizer.from_pretrained(minilm_dir), AutoModel.from_pretrained(minilm_dir).eval()
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    exact = F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    ours = engine.encode(SENTENCES)
    assert ours.shape == (4, 384)
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs().max()) < 1e-5
    similar = ours @ ours.T
    assert similar[0, 1] > 0.4
    assert similar[0, 2] < 0.2
    assert torch.allclose(engine.encode(SENTENCES[1]), ours[1], atol=1e-6), "one text gives one vector"
    assert torch.allclose(engine.encode(SENTENCES, batch_size=1), ours, atol=1e-6)
    first = F.normalize(hidden[:, 0], dim=-1)
    assert float((engine.encode(SENTENCES, pooling="cls") - first).abs().max()) < 1e-5
    lengths = engine.encode(SENTENCES, normalize=False).norm(dim=-1)
    assert bool((lengths - 1).abs().min() > 0.1)


def test_long_texts_are_refused_or_cut_as_the_config_says(minilm_dir: Path) -> None:
    long = "word " * 600
    with pytest.raises(EngineError, match="sequence 1 has 602 tokens, this model takes 512"):
        Engine.from_pretrained(minilm_dir, device="cpu").encode(["short", long])
    cutting = Engine.from_pretrained(minilm_dir, device="cpu", embedding={"truncate": True})
    assert torch.allclose(cutting.encode(long), cutting.encode("word " * 510), atol=1e-6), (
        "the last token is still [SEP]"
    )
    with pytest.raises(EngineError, match="got pooling='max'"):
        cutting.encode("x", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(EngineError, match="batch_size=0"):
        cutting.encode("x", batch_size=0)


def test_smollm2_says_what_hugging_face_says(smollm2_dir: Path) -> None:
    engine = Engine.from_pretrained(smollm2_dir, device="cpu", precision="fp32")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir).float().eval()
    messages = [{"role": "user", "content": "Name three colours."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    batch = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.inference_mode():
        theirs = model.generate(**batch, max_new_tokens=24, do_sample=False)[0, batch["input_ids"].shape[1] :]
    ours = engine.generate(messages=messages, max_new_tokens=24, do_sample=False)
    assert ours.token_ids == theirs.tolist()
    assert ours.text == tokenizer.decode(theirs, skip_special_tokens=True)
    streamed = "".join(
        str(piece) for piece in engine.generate(messages=messages, max_new_tokens=24, do_sample=False, stream=True)
    )
    assert streamed == ours.text
    both = engine.generate(["The moon is", "Water boils at"], max_new_tokens=5, do_sample=False)
    assert [len(one.token_ids) for one in both] == [5, 5]
    assert engine.verify("The quick brown fox jumps over the lazy dog.").ok


# ---- the package itself ----


def test_importing_the_engine_is_light() -> None:
    """`import engine` alone brings neither torch nor transformers, using the engine no transformers."""
    code = (
        "import sys, engine; assert not {'torch', 'transformers'} & set(sys.modules); "
        "from engine import Engine; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_stranger_of_the_same_name_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ops").mkdir()
    (tmp_path / "ops" / "__init__.py").write_text("")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import engine"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode != 0
    assert "ImportError: the package 'ops' that Python finds" in found.stderr
    assert "is not slipstream's" in found.stderr


def test_the_version_is_the_distributions() -> None:
    import engine

    assert importlib.metadata.version("slipstream-runtime") == engine.__version__
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = engine.Motor
