"""Indices that are broken, halves of checkpoints, names and links that leave the directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from engine.checkpoint import open_checkpoint
from tests.engine.checkpoint import builders
from tests.engine.checkpoint.builders import edit_json, refused

INDEX = "model.safetensors.index.json"
SHARD = "model-{:05d}-of-00003.safetensors".format


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return builders.sharded(tmp_path / "model")


def rename_shard(name: Any) -> Callable[[Any], None]:
    """An edit that maps one tensor to the file ``name``."""
    return lambda index: index["weight_map"].__setitem__("embed.weight", name)


EDITS: dict[str, tuple[Callable[[Any], None], tuple[str, ...]]] = {
    "no map": (lambda index: index.pop("weight_map"), ("'weight_map' must be an object",)),
    "an empty map": (lambda index: index["weight_map"].clear(), ("'weight_map' must be an object",)),
    "a list": (lambda index: index.__setitem__("weight_map", ["a"]), ("'weight_map' must be an object",)),
    "a number": (rename_shard(3), ("embed.weight", "must be a file name, is 3")),
    "the parent": (rename_shard("../model/" + SHARD(1)), ("'../model/", "leads out")),
    "an absolute path": (rename_shard("/etc/passwd"), ("'/etc/passwd' leads out",)),
    "a Windows path": (rename_shard("C:\\model\\x"), ("leads out",)),
    "a Windows parent": (rename_shard("..\\x"), ("leads out",)),
    "nothing": (rename_shard(""), ("'' leads out",)),
    "a zero byte": (rename_shard("a\0b"), ("leads out",)),
    "the directory": (rename_shard("."), ("1 of them missing: .",)),
    "a shard that is missing": (rename_shard("other.safetensors"), ("1 of them missing: other.safetensors",)),
    "the wrong shard": (rename_shard(SHARD(2)), ("maps 1 tensors", f"embed.weight (not in {SHARD(2)})")),
    "a tensor that is nowhere": (
        lambda index: index["weight_map"].__setitem__("ghost", SHARD(3)),
        ("maps 1 tensors", f"ghost (not in {SHARD(3)})"),
    ),
}


@pytest.mark.parametrize("case", EDITS)
def test_broken_index(case: str, directory: Path) -> None:
    edit, parts = EDITS[case]
    edit_json(directory / INDEX, edit)
    refused(lambda: open_checkpoint(str(directory)), str(directory / INDEX), *parts)


def test_an_index_that_is_not_json(directory: Path) -> None:
    (directory / INDEX).write_text('{"weight_map": {"a": "b",}}')
    refused(lambda: open_checkpoint(str(directory)), INDEX, "not JSON", "line 1, column ")


def test_half_a_checkpoint_lists_all_that_is_missing(directory: Path) -> None:
    (directory / SHARD(1)).unlink()
    (directory / SHARD(3)).unlink()
    refused(lambda: open_checkpoint(str(directory)), "names 3 files, 2 of them missing", f"{SHARD(1)}, {SHARD(3)}")
    (directory / INDEX).unlink()
    refused(lambda: open_checkpoint(str(directory)), f"{INDEX} is missing", f"and of the shards {SHARD(1)}, {SHARD(3)}")


def test_only_the_index_is_missing(directory: Path) -> None:
    (directory / INDEX).unlink()
    message = refused(lambda: open_checkpoint(str(directory)), f"3 shards, but {INDEX} is missing")
    assert "of the shards" not in message


def test_a_truncated_shard_is_named(directory: Path) -> None:
    shard = directory / SHARD(2)
    shard.write_bytes(shard.read_bytes()[:-3])
    refused(lambda: open_checkpoint(str(directory)), str(shard), "cut off", "fetch the file again")


def test_a_tensor_the_index_forgets_is_offered_unless_two_shards_hold_it(directory: Path) -> None:
    extra = {"extra": torch.ones(2)}
    safetensors.torch.save_file(builders.shards()[0] | extra, directory / SHARD(1))
    assert open_checkpoint(str(directory)).source.locate("extra") == f"{SHARD(1)}: extra"
    safetensors.torch.save_file(builders.shards()[1] | extra, directory / SHARD(2))
    refused(lambda: open_checkpoint(str(directory)), INDEX, SHARD(1), SHARD(2), "extra")


def test_the_index_decides_between_two_shards(directory: Path) -> None:
    twin = {"embed.weight": torch.full((6, 4), 9.0)}
    safetensors.torch.save_file(builders.shards()[1] | twin, directory / SHARD(2))
    source = open_checkpoint(str(directory)).source
    assert torch.equal(source.read("embed.weight"), builders.tensors()["embed.weight"])


def test_a_sub_directory_may_hold_shards(directory: Path) -> None:
    (directory / "parts").mkdir()
    (directory / SHARD(1)).rename(directory / "parts" / SHARD(1))
    part = builders.shards()[0]
    edit_json(directory / INDEX, lambda index: index["weight_map"].update(dict.fromkeys(part, "parts/" + SHARD(1))))
    assert set(open_checkpoint(str(directory)).source.names()) == set(builders.tensors())


@pytest.mark.parametrize("name", [SHARD(2), "config.json", INDEX])
def test_a_link_that_leaves_the_directory(name: str, directory: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    (directory / name).rename(outside)
    (directory / name).symlink_to(outside)
    refused(
        lambda: open_checkpoint(str(directory)), str(directory / name), f"a symbolic link to {outside}", "Copy the file"
    )


def test_links_inside_and_a_link_to_the_directory_are_followed(directory: Path, tmp_path: Path) -> None:
    (directory / SHARD(2)).rename(directory / "real.safetensors")
    (directory / SHARD(2)).symlink_to("real.safetensors")
    (tmp_path / "alias").symlink_to(directory)
    assert torch.equal(
        open_checkpoint(str(tmp_path / "alias")).source.read("layers.1.scale"), torch.tensor(2.5).double()
    )


def test_links_that_lead_nowhere(directory: Path) -> None:
    (directory / SHARD(2)).unlink()
    (directory / SHARD(2)).symlink_to(SHARD(2))
    refused(lambda: open_checkpoint(str(directory)), SHARD(2))
    single = builders.single(directory)
    (single / "model.safetensors").unlink()
    (single / "model.safetensors").symlink_to("gone.safetensors")
    refused(lambda: open_checkpoint(str(single)), "model.safetensors", "gone.safetensors", "does not exist")


def cache(directory: Path, repository: Path) -> Path:
    """``directory`` as the hub's cache lays it out: a snapshot of links to blobs."""
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "blobs").mkdir()
    for number, file in enumerate(sorted(directory.iterdir())):
        shutil.copy(file, repository / "blobs" / str(number))
        (snapshot / file.name).symlink_to(Path("../../blobs") / str(number))
    return snapshot


def test_the_layout_of_the_hub_cache(directory: Path, tmp_path: Path) -> None:
    snapshot = cache(directory, tmp_path / "hub" / "models--org--name")
    source = open_checkpoint(str(snapshot)).source
    assert torch.equal(source.read("embed.weight"), builders.tensors()["embed.weight"])
    assert source.locate("embed.weight") == f"{SHARD(1)}: embed.weight"


def test_the_layout_of_the_hub_cache_opens_no_other_door(directory: Path, tmp_path: Path) -> None:
    elsewhere = cache(directory, tmp_path / "hub" / "something-else")
    refused(lambda: open_checkpoint(str(elsewhere)), "a symbolic link to")
    snapshot = cache(directory, tmp_path / "hub" / "models--org--name")
    (snapshot / SHARD(1)).unlink()
    (snapshot / SHARD(1)).symlink_to(directory / SHARD(1))
    refused(lambda: open_checkpoint(str(snapshot)), SHARD(1), "a symbolic link to")
