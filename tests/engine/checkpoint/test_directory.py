"""Opening directories: every layout that works, every directory that is no checkpoint."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import engine.checkpoint
from engine.checkpoint import open_checkpoint
from ops.weights import WeightSource
from tests.engine.checkpoint import builders
from tests.engine.checkpoint.builders import refused

LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "single": builders.single,
    "sharded": builders.sharded,
    "bin": builders.single_bin,
    "sharded bin": lambda directory: builders.sharded(directory, "bin"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_tensors(layout: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(str(LAYOUTS[layout](tmp_path / "model")))
    source = checkpoint.source
    expected = builders.tensors()
    assert isinstance(source, WeightSource)
    assert set(source.names()) == set(expected)
    for name, tensor in expected.items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.dtype(name) == tensor.dtype
        assert torch.equal(source.read(name), tensor)
        assert source.read(name).dtype == tensor.dtype
        assert source.locate(name).endswith(f": {name}")
        if len(tensor.shape) and len(tensor) >= 3:
            assert torch.equal(source.read(name, slice(1, 3)), tensor[1:3])
            assert torch.equal(source.read(name, slice(1, None)), tensor[1:])
            assert source.read(name, slice(0, 0)).shape == (0, *tensor.shape[1:])
    assert source.version == source.version == 0
    with pytest.raises(KeyError):
        source.shape("no.such.tensor")
    assert checkpoint.config == builders.CONFIG
    assert checkpoint.generation_config == {}
    assert checkpoint.gguf_file is None


def test_rows_out_of_range_do_not_pass_silently(tmp_path: Path) -> None:
    source = open_checkpoint(str(builders.single(tmp_path / "model"))).source
    for rows in (slice(0, 7), slice(4, 2), slice(-1, 2), slice(0, 4, 2)):
        with pytest.raises(AssertionError):
            source.read("embed.weight", rows)


def test_locate_names_the_shard(tmp_path: Path) -> None:
    source = open_checkpoint(str(builders.sharded(tmp_path / "model"))).source
    assert source.locate("layers.1.scale") == "model-00002-of-00003.safetensors: layers.1.scale"


def test_reads_are_views_of_the_file(tmp_path: Path) -> None:
    """Writing into the file shows in a tensor read before: nothing was copied. The other way it does not show."""
    path = builders.single(tmp_path / "model", {"weight": torch.zeros(4, 2)}) / "model.safetensors"
    source = open_checkpoint(str(path.parent)).source
    view = source.read("weight")
    rows = source.read("weight", slice(3, 4))
    with path.open("r+b") as file:
        file.seek(-8, 2)
        file.write(torch.tensor([7.0, 8.0]).numpy().tobytes())
    assert view[3].tolist() == [7.0, 8.0]
    assert rows.tolist() == [[7.0, 8.0]]
    before = path.read_bytes()
    view.fill_(1.0)
    assert path.read_bytes() == before


def test_safetensors_go_before_bin_and_one_file_before_several(tmp_path: Path) -> None:
    directory = builders.single_bin(builders.sharded(tmp_path / "model", "bin"))
    assert open_checkpoint(str(directory)).source.locate("embed.weight").startswith("pytorch_model.bin:")
    builders.sharded(directory)
    assert open_checkpoint(str(directory)).source.locate("embed.weight").startswith("model-00001-of-00003.safetensors:")
    builders.single(directory)
    assert open_checkpoint(str(directory)).source.locate("embed.weight").startswith("model.safetensors:")


def test_generation_config_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = builders.single(tmp_path / "model")
    builders.write_json(directory / "generation_config.json", {"top_k": 50})
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_checkpoint("~/model").generation_config == {"top_k": 50}


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_directory_saved_by_transformers(shard_size: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16)
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    checkpoint = open_checkpoint(str(tmp_path))
    state = model.state_dict()
    assert checkpoint.config["model_type"] == "gpt2"
    assert {name for name in state if name != "lm_head.weight"} == set(checkpoint.source.names())
    assert all(torch.equal(checkpoint.source.read(name), state[name]) for name in checkpoint.source.names())
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")


def test_what_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    file = builders.single(tmp_path / "model") / "model.safetensors"
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"GGUF")
    refused(lambda: open_checkpoint(str(tmp_path / "nowhere")), str(tmp_path / "nowhere"), "no such directory")
    refused(lambda: open_checkpoint("./nowhere/at/all"), "nowhere/at/all", "no such directory")
    refused(lambda: open_checkpoint(str(tmp_path / "empty")), str(tmp_path / "empty"), "empty directory", "config.json")
    refused(lambda: open_checkpoint(str(file)), str(file), "a file", f'give "{file.parent}"')
    refused(lambda: open_checkpoint(str(gguf)), 'with gguf_file "some.gguf"')
    refused(lambda: open_checkpoint(str(file.parent), revision="v1"), "revision 'v1'", "a directory here")
    refused(lambda: open_checkpoint(""), "not a path")
    refused(lambda: open_checkpoint("a\0b"), "not a path")


NO_WEIGHTS = {
    "notes.txt": "It holds: config.json, notes.txt",
    "some.gguf": "name its file with gguf_file",
    "adapter_config.json": "merge_and_unload",
    "adapter_model.safetensors": "must be called model.safetensors",
    "consolidated.00.pth": "original release",
    "tf_model.h5": "TensorFlow",
    "model_index.json": "diffusion",
}


@pytest.mark.parametrize("name", NO_WEIGHTS)
def test_a_directory_without_weights_says_what_it_holds(name: str, tmp_path: Path) -> None:
    builders.write_json(tmp_path / "config.json", builders.CONFIG)
    (tmp_path / name).write_text("x")
    refused(lambda: open_checkpoint(str(tmp_path)), str(tmp_path), "no weights", "model.safetensors", NO_WEIGHTS[name])


def test_a_checkpoint_one_directory_further_down(tmp_path: Path) -> None:
    builders.single(tmp_path / "inner")
    refused(lambda: open_checkpoint(str(tmp_path)), "inner/config.json", "subdirectory")


CONFIGS = {
    b"": ("config.json", "not JSON", "line 1, column 1"),
    b'{"model_type": "llama",\n "x": }': ("config.json", "not JSON", "line 2, column 7"),
    b"\xff\xfe": ("config.json", "not UTF-8"),
    b"[1]": ("config.json", "must hold a JSON object, holds an array"),
    b"null": ("config.json", "must hold a JSON object, holds null"),
    b'{"model_type": "a", "model_type": "b"}': ("config.json", "'model_type' appears twice"),
    b'{"model_type": "llama", "eps": NaN}': ("config.json", "NaN"),
    b'{"model_type": "llama", "x": ' + b"9" * 5000 + b"}": ("config.json", "not usable JSON"),
    b"[" * 100_000: ("config.json", "nested too deep"),
    b'{"hidden_size": 4}': ("config.json", "model_type is missing"),
    b'{"model_type": 3}': ("config.json", "model_type is missing or not a string"),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": ("config.json", "git lfs pull"),
}


@pytest.mark.parametrize("content", CONFIGS, ids=range(len(CONFIGS)))
def test_bad_config(content: bytes, tmp_path: Path) -> None:
    directory = builders.single(tmp_path / "model")
    (directory / "config.json").write_bytes(content)
    refused(lambda: open_checkpoint(str(directory)), str(directory), *CONFIGS[content])


def test_config_missing(tmp_path: Path) -> None:
    directory = builders.single(tmp_path / "model")
    (directory / "config.json").unlink()
    refused(lambda: open_checkpoint(str(directory)), str(directory), "config.json is missing")
    (directory / "adapter_config.json").write_text("{}")
    refused(lambda: open_checkpoint(str(directory)), "config.json is missing", "LoRA")
    (directory / "config.json").mkdir()
    refused(lambda: open_checkpoint(str(directory)), "config.json", "not a regular file")


LIGHT = """
import json, pathlib, sys, types
engine = types.ModuleType("engine")  # in place of engine/__init__.py, which imports more than this package
engine.__path__ = [str(pathlib.Path("engine").resolve())]
sys.modules["engine"] = engine
import engine.checkpoint
print(json.dumps(sorted(sys.modules)))
"""


def test_imports_stay_light() -> None:
    root = Path(engine.checkpoint.__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True, cwd=root)
    loaded = set(json.loads(done.stdout))
    assert {"torch", "safetensors"} <= loaded
    assert not loaded & {"transformers", "huggingface_hub", "gguf"}
