"""Fetching by name, against a real HTTP server that speaks the hub's interface."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.checkpoint import builders
from tests.engine.checkpoint.hub_server import SHA, Hub, serve

ROOT = Path(__file__).parents[3]
TENSORS = {name: tensor.tolist() for name, tensor in builders.tensors().items()}


def files(directory: Path, *more: str) -> dict[str, bytes]:
    """The directory's files, and small ones of the names in ``more``."""
    return {file.name: file.read_bytes() for file in directory.iterdir()} | {name: name.encode() for name in more}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    path = tmp_path_factory.mktemp("repositories")
    safetensors = files(builders.sharded(path / "sharded"), "tokenizer.json", "1_Pooling/config.json", "merges.txt")
    other = dict.fromkeys(
        ["pytorch_model.bin", "onnx/model.safetensors", "consolidated.safetensors", "modeling.py", "training_args.bin"],
        b"must not be fetched",
    )
    repositories = {
        "org/sharded": safetensors | other,
        "classic": files(builders.single(path / "single")),
        "org/bin": files(builders.single_bin(path / "bin"), "training_args.bin"),
        "org/gated": files(path / "single"),
        "org/half": {name: body for name, body in safetensors.items() if "00002" not in name},
        "org/gguf": {"a.gguf": b"GGUF, but not really", "b.gguf": b"another quantization", "README.md": b""},
        "org/broken": {},
    }
    with serve(Hub(repositories, gated=frozenset({"org/gated"}), broken=frozenset({"org/broken"}))) as running:
        yield running


def attempts(
    cache: Path, endpoint: str, *requests: tuple[str, str | None, str | None], **env: str
) -> list[dict[str, Any]]:
    """What :mod:`tests.engine.checkpoint.open_worker` finds with this cache and hub; no token, no other setting."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    settings = {
        "HF_HOME": str(cache),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.checkpoint.open_worker"],
        input=json.dumps(requests),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**clean, **settings, **env},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: list[dict[str, Any]] = json.loads(done.stdout)
    return result


@pytest.fixture(scope="module")
def cache(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache into which the good repositories were fetched; checks what that gave and what was asked for."""
    path = tmp_path_factory.mktemp("cache")
    good = attempts(path, hub.url, ("org/sharded", None, None), ("classic", "main", None), ("org/bin", SHA, None))
    for found in good:
        assert found.get("names") == TENSORS, found
        assert Path(found["directory"]).is_relative_to(path)
    return path


def test_fetches_what_a_checkpoint_needs_and_nothing_else(hub: Hub, cache: Path) -> None:
    fetched = {name for name in hub.fetched if name.startswith("org/sharded/")}
    shards = {f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)}
    small = {"config.json", "model.safetensors.index.json", "tokenizer.json", "1_Pooling/config.json", "merges.txt"}
    assert fetched == {f"org/sharded/{name}" for name in shards | small}
    assert {name for name in hub.fetched if name.startswith("org/bin/")} == {
        "org/bin/config.json",
        "org/bin/pytorch_model.bin",
    }
    snapshot = next((cache / "hub" / "models--org--sharded" / "snapshots").iterdir())
    assert (snapshot / "config.json").is_symlink(), "the cache links to its blobs, so the test covers that layout"


def test_failures_say_what_to_do(hub: Hub, cache: Path, tmp_path: Path) -> None:
    cases: list[tuple[tuple[str, str | None, str | None], tuple[str, ...]]] = [
        (
            ("org/nothing", None, None),
            ("org/nothing", "no directory", f"no repository of this name at {hub.url}", "HF_TOKEN"),
        ),
        (("org/gated", None, None), ("org/gated: gated", f"{hub.url}/org/gated", "hf auth login")),
        (("org/sharded", "v9", None), ("org/sharded", "no revision 'v9'")),
        (("org/broken", None, None), ("org/broken", hub.url, "500")),
        (("org/bad--name", None, None), ("org/bad--name: neither a directory here nor a possible name",)),
        (("org/half", None, None), ("names 3 files, 1 of them missing: model-00002-of-00003.safetensors",)),
        (("org/gguf", None, None), ("org/gguf: the repository has no config.json", "gguf_file")),
        (("org/gguf", None, "c.gguf"), ("org/gguf: the repository has no c.gguf",)),
        (("org/gguf", None, "a.gguf"), ("a.gguf",)),
    ]
    for (request, parts), found in zip(cases, attempts(tmp_path, hub.url, *(case[0] for case in cases)), strict=True):
        message = found["error"]
        assert "\n" not in message, message
        assert all(part in message for part in parts), (request, message)
    assert "org/gguf/a.gguf" in hub.fetched
    assert "org/gguf/b.gguf" not in hub.fetched


def test_offline(hub: Hub, cache: Path) -> None:
    before = len(hub.fetched)
    cached, missing, old_bin = attempts(
        cache,
        hub.url,
        ("org/sharded", None, None),
        ("org/other", None, None),
        ("org/bin", SHA, None),
        HF_HUB_OFFLINE="1",
    )
    assert cached["names"] == TENSORS
    assert old_bin["names"] == TENSORS
    assert "\n" not in missing["error"]
    for part in ("org/other", "HF_HUB_OFFLINE", str(cache), "hf download org/other"):
        assert part in missing["error"]
    assert len(hub.fetched) == before


def test_no_network(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        cached, missing = attempts(cache, url, ("org/sharded", None, None), ("org/other", None, None))
    assert cached["names"] == TENSORS
    assert "\n" not in missing["error"]
    for part in ("org/other", url, "check the network or HF_ENDPOINT", "Connect"):
        assert part in missing["error"]
