"""Directories that DeepSpeed wrote: their weights are found, nothing in them runs, and what is in pieces is told."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from config_schema import load_config
from engine import Engine
from engine.checkpoint import deepspeed_files, open_checkpoint, open_weights
from engine.errors import CheckpointError
from engine.training.model import load_model
from tests.engine.checkpoint import builders
from tests.engine.checkpoint.builders import refused
from tests.engine.checkpoint.deepspeed_builder import TAG, cast, deepspeed
from tests.engine.checkpoint.test_bin_file import Exploit
from tests.engine.tiny import tiny

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.tensor([1.5, -2.0])}


def whole(directory: Path, **options: object) -> Path:
    """A DeepSpeed checkpoint beside the model's config.json."""
    deepspeed(directory, OrderedDict(WEIGHTS), **options)  # type: ignore[arg-type]
    builders.write_json(directory / "config.json", builders.CONFIG)
    return directory


@pytest.mark.parametrize("zero", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_weights_are_those_of_the_module(zero: int, dtype: torch.dtype, tmp_path: Path) -> None:
    deepspeed(tmp_path, cast(WEIGHTS, dtype), zero, {"epoch": 3, "best": [0.5, None], "name": "a"})
    builders.write_json(tmp_path / "config.json", builders.CONFIG)
    checkpoint = open_checkpoint(str(tmp_path))
    source = checkpoint.source
    assert checkpoint.config == builders.CONFIG
    assert list(source.names()) == list(WEIGHTS)
    for name, tensor in cast(WEIGHTS, dtype).items():
        assert source.dtype(name) is dtype
        assert source.shape(name) == tuple(tensor.shape)
        assert torch.equal(source.read(name), tensor)
    assert torch.equal(source.read("a.weight", slice(1, 2)), cast(WEIGHTS, dtype)["a.weight"][1:])
    assert source.locate("a.bias") == f"{TAG}/mp_rank_00_model_states.pt: a.bias"


def test_the_prefix_of_a_wrapper_is_left_out(tmp_path: Path) -> None:
    deepspeed(tmp_path, {f"module.{name}": tensor for name, tensor in WEIGHTS.items()})
    assert list(open_weights(tmp_path).names()) == ["a.weight", "a.bias"]
    deepspeed(tmp_path, {"module.a": torch.ones(1), "b": torch.ones(1)})
    assert list(open_weights(tmp_path).names()) == ["module.a", "b"], "part of the model's own names"
    deepspeed(tmp_path, {f"module.module.{name}": tensor for name, tensor in WEIGHTS.items()})
    assert list(open_weights(tmp_path).names()) == ["a.weight", "a.bias"]


def test_latest_decides_and_hugging_faces_files_come_first(tmp_path: Path) -> None:
    whole(tmp_path)
    shutil.copytree(tmp_path / TAG, tmp_path / "global_step9")
    torch.save({"module": {"b": torch.ones(1)}}, tmp_path / "global_step9" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step9\n")
    assert list(open_weights(tmp_path).names()) == ["b"]
    builders.single(tmp_path)
    assert set(open_weights(tmp_path).names()) == set(builders.tensors())


def test_that_fp32_weights_are_elsewhere_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "slipstream.checkpoint"):
        open_weights(whole(tmp_path / "plain"))
        assert not caplog.text
        open_weights(whole(tmp_path / "zero", zero=2))
    assert "zero_to_fp32.py gives its fp32 weights" in caplog.text


def test_an_engine_runs_what_deepspeed_trained(tmp_path: Path) -> None:
    one = tiny("gpt2", "causal_lm", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    deepspeed(tmp_path, cast(one.model.state_dict(), torch.float16), zero=1)
    for name in ("config.json", "generation_config.json"):
        shutil.copy(one.directory / name, tmp_path / name)
    document = {"model": {"path": str(tmp_path)}, "device": "cpu", "precision": "fp32"}
    expected = AutoModelForCausalLM.from_pretrained(one.directory).half().float()
    rows = [[5, 6, 7], [9]]
    found = Engine(document).generate(rows, max_new_tokens=5, do_sample=False)
    for row, result in zip(rows, found, strict=True):
        asked = torch.tensor([row])
        alone = expected.generate(asked, attention_mask=torch.ones_like(asked), max_new_tokens=5, do_sample=False)
        assert alone[0, len(row) :].tolist() == list(result.token_ids)

    trained = Engine(document | {"training": {"micro_batch_size": 2}, "optimizer": {"type": "AdamW"}})
    batch = torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6]])
    first = trained.train_batch({"input_ids": batch, "labels": batch})
    loss = expected.train()(input_ids=batch, labels=batch).loss.detach()
    assert float(first) == pytest.approx(float(loss), rel=1e-5), "training begins from these weights"
    assert Engine(document).verify().ok


@pytest.mark.parametrize("whose", ["DeepSpeed", "Hugging Face"])
def test_weights_are_not_rounded_to_the_dtype_of_config_json(whose: str, tmp_path: Path) -> None:
    """It names that of the model's release, whatever the weights were trained or converted to since."""
    one = tiny("gpt2", "causal_lm")
    weights = cast(one.model.state_dict(), torch.float16) if whose == "DeepSpeed" else one.model.state_dict()
    if whose == "DeepSpeed":
        deepspeed(tmp_path, weights)
    else:
        shutil.copy(one.directory / "model.safetensors", tmp_path)
    facts = json.loads((one.directory / "config.json").read_text("utf-8"))
    builders.write_json(tmp_path / "config.json", {**facts, "dtype": "bfloat16", "torch_dtype": "bfloat16"})
    document = {"model": {"path": str(tmp_path)}, "device": "cpu", "precision": "fp32"}
    trained = load_model(load_config(document | {"training": {"micro_batch_size": 1}}), None).state_dict()
    assert trained.keys() == weights.keys()
    assert all(torch.equal(trained[name], weights[name].float()) for name in trained)
    assert Engine(document).verify().ok


# What is refused


def test_code_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    whole(tmp_path / "a", client_state={"hook": Exploit(marker)})
    refused(
        lambda: open_weights(tmp_path / "a"), f"{TAG}/mp_rank_00_model_states.pt", "posix.system", "is not run",
        'torch.load(FILE, weights_only=False)["module"]',
    )  # fmt: skip
    whole(tmp_path / "b", client_state={"args": argparse.Namespace(lr=1)})
    refused(lambda: open_weights(tmp_path / "b"), "needs argparse.Namespace, which is code")
    whole(tmp_path / "c", zero=1)
    torch.save(Exploit(marker), tmp_path / "c" / TAG / "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt")
    assert len(list(open_weights(tmp_path / "c").names())) == 2, "optimizer states are not opened"
    assert not marker.exists()


def test_zero_stage_3_is_told_with_the_way_out(tmp_path: Path) -> None:
    refused(
        lambda: open_checkpoint(str(whole(tmp_path, zero=3))), f"{tmp_path / TAG}: written by ZeRO stage 3",
        "run the zero_to_fp32.py that DeepSpeed put beside `latest`", "(python zero_to_fp32.py . OUTPUT)",
        "pytorch_model.bin", "(zero_pp_rank_0_mp_rank_00_model_states.pt)",
    )  # fmt: skip
    torch.save(WEIGHTS, tmp_path / "pytorch_model.bin")
    assert list(open_checkpoint(str(tmp_path)).source.names()) == list(WEIGHTS), "that file is read then"


@pytest.mark.parametrize(
    ("also", "what"),
    [
        ("mp_rank_01_model_states.pt", "written by tensor parallelism"),
        ("mp_rank_12_model_states.pt", "written by tensor parallelism"),
        ("layer_00-model_states.pt", "written by pipeline parallelism"),
        ("layer_0_expert_3_mp_rank_00_model_states.pt", "a mixture of experts"),
        ("expert_3_mp_rank_00_model_states.pt", "a mixture of experts"),
    ],
)
def test_a_model_in_pieces_is_refused(also: str, what: str, tmp_path: Path) -> None:
    whole(tmp_path)
    shutil.copy(tmp_path / TAG / "mp_rank_00_model_states.pt", tmp_path / TAG / also)
    refused(lambda: open_weights(tmp_path), f"{tmp_path / TAG}: {what}", f"({also})")


@pytest.mark.parametrize(
    ("latest", "parts"),
    [
        ("global_step7", ("names global_step7, and there is no such folder", f"write one of these into it: {TAG}")),
        ("", ("must name a folder beside it", "holds ''")),
        ("../other", ("must name a folder beside it",)),
        ("..", ("leads out of the checkpoint's directory",)),
        ("/etc", ("must name a folder beside it",)),
        ("two\nlines", ("must name a folder beside it",)),
    ],
)
def test_what_latest_says_is_checked(latest: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    whole(tmp_path / "a")
    (tmp_path / "other").mkdir()
    (tmp_path / "a" / "latest").write_text(latest)
    refused(lambda: open_weights(tmp_path / "a"), "latest: ", *parts)


def test_files_that_are_no_such_checkpoint(tmp_path: Path) -> None:
    path = whole(tmp_path) / TAG / "mp_rank_00_model_states.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    refused(lambda: open_weights(tmp_path), str(path), "damaged or cut off")
    for value, kind in ((None, "NoneType"), ({}, "dict")):
        torch.save({"module": value}, path)
        refused(lambda: open_weights(tmp_path), f'{path}: "module" must be a dictionary of weights, is {kind}')
    torch.save(WEIGHTS["a.bias"], path)
    refused(lambda: open_weights(tmp_path), "is Tensor")
    torch.save({"module": {"a": 3}}, path)
    refused(lambda: open_weights(tmp_path), f"{path}: a: a int where a tensor must be", '["module"]')
    torch.save({"module": {"language_model": {"a": WEIGHTS["a.bias"]}}}, path)
    refused(lambda: open_weights(tmp_path), f"{path}: language_model: a dictionary in the dictionary", "Megatron")
    path.write_text("no archive and no pickle")
    refused(lambda: open_weights(tmp_path), f"{path}: not a file of torch.save")
    path.unlink()
    (path.parent / "notes.txt").touch()
    refused(lambda: open_weights(tmp_path), "mp_rank_00_model_states.pt is missing; it holds: notes.txt")
    (tmp_path / "latest").write_bytes(b"\xff\xfe")
    refused(lambda: open_weights(tmp_path), "latest: cannot be read")


def test_links_that_leave_the_directory_are_not_followed(tmp_path: Path) -> None:
    whole(tmp_path / "a")
    (tmp_path / "a" / TAG).rename(tmp_path / "elsewhere")
    (tmp_path / "a" / TAG).symlink_to(tmp_path / "elsewhere")
    refused(lambda: open_weights(tmp_path / "a"), "outside of the checkpoint's directory")
    whole(tmp_path / "b")
    (tmp_path / "b" / "latest").rename(tmp_path / "latest")
    (tmp_path / "b" / "latest").symlink_to(tmp_path / "latest")
    refused(lambda: open_weights(tmp_path / "b"), "outside of the checkpoint's directory")


def test_directories_near_it_are_told_what_they_lack(tmp_path: Path) -> None:
    whole(tmp_path)
    refused(lambda: open_checkpoint(str(tmp_path / TAG)), "no weights", "give the directory above it, with `latest`")
    (tmp_path / "latest").unlink()
    refused(lambda: open_checkpoint(str(tmp_path)), "no weights", "without its file `latest`")
    deepspeed(tmp_path / "b", WEIGHTS)
    refused(lambda: open_checkpoint(str(tmp_path / "b")), "config.json is missing", "copy the config.json")


def test_a_folder_called_latest_is_not_deepspeeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builders.write_json(tmp_path / "config.json", builders.CONFIG)
    (tmp_path / "latest").mkdir()
    monkeypatch.setattr(deepspeed_files, "TAG_LIMIT", 1 << 20)  # a folder's own size differs among file systems
    with pytest.raises(CheckpointError, match="no weights: none of"):
        open_checkpoint(str(tmp_path))


def test_a_long_file_called_latest_is_not_deepspeeds(tmp_path: Path) -> None:
    whole(tmp_path)
    (tmp_path / "latest").write_text("t" * 256)
    with pytest.raises(CheckpointError, match="no weights: none of"):
        open_checkpoint(str(tmp_path))
    (tmp_path / TAG).rename(tmp_path / ("t" * 255))
    (tmp_path / "latest").write_text("t" * 255)
    assert list(open_weights(tmp_path).names()) == list(WEIGHTS)
