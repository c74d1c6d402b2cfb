"""Fetching a checkpoint by its name on the Hugging Face hub."""

from __future__ import annotations

import re
from pathlib import Path

from engine.errors import CheckpointError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
"""``org/name``, or one of the hub's old names without an organization (``gpt2``)."""

_SMALL = ["*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]
_SAFETENSORS = ["*.safetensors"]
_BIN = ["pytorch_model*.bin"]
_NOT_OURS = ["*/*.safetensors", "*/*.bin", "consolidated*.safetensors"]
"""Other layouts of the same weights: subdirectories for other runtimes, Mistral's own format."""


def fetch(name: str, revision: str | None, gguf_file: str | None) -> Path:
    """The directory in the hub's cache that holds the checkpoint ``name``, downloaded as far as it is not there yet.

    Fetches configuration, tokenizer and safetensors, or the one ``gguf_file``; ``pytorch_model*.bin`` only if the
    repository has no safetensors. Never code. ``HF_HUB_OFFLINE``, ``HF_ENDPOINT``, ``HF_HOME`` and ``HF_TOKEN`` are
    honored by ``huggingface_hub``. Raises ``CheckpointError``: one line with what to do.
    """
    if gguf_file is not None:
        directory = _snapshot(name, revision, [*_SMALL, gguf_file], [])
    else:
        directory = _snapshot(name, revision, [*_SMALL, *_SAFETENSORS], _NOT_OURS)
        if not any(directory.glob("*.safetensors")):
            directory = _snapshot(name, revision, [*_SMALL, *_BIN], _NOT_OURS)
    if not directory.is_dir():
        wanted = gguf_file or "config.json, *.safetensors or pytorch_model*.bin"
        raise CheckpointError(f"{name}: the repository has no {wanted}; if it has GGUF files, name one with gguf_file")
    return directory


def _snapshot(name: str, revision: str | None, allow: list[str], ignore: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=allow, ignore_patterns=ignore)
        )
    except Exception as error:  # requests, httpx or the hub's own, depending on its version
        raise CheckpointError(_explain(error, name, revision)) from error


def _explain(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    endpoint, cache = constants.ENDPOINT, constants.HF_HUB_CACHE
    offline = (
        f"{name}: no such directory, and not (or not wholly) in the hub's cache {cache}, while HF_HUB_OFFLINE forbids "
        f"to fetch it: unset HF_HUB_OFFLINE, or run `hf download {name}` where there is a network"
    )
    unreachable = (
        f"{name}: no such directory, not (or not wholly) in the hub's cache {cache}, and {endpoint} did not answer as "
        f"it should ({_reason(error)}): check the network or HF_ENDPOINT, or give a local directory"
    )
    # The first class that fits: GatedRepoError is a RepositoryNotFoundError, and all of these are HfHubHTTPErrors.
    causes: tuple[tuple[type[Exception], str], ...] = (
        (
            errors.GatedRepoError,
            f"{name}: gated: accept its terms at {endpoint}/{name}, then run `hf auth login` or set HF_TOKEN",
        ),
        (
            errors.RepositoryNotFoundError,
            f"{name}: no directory of this name here, and no repository of this name at {endpoint}: check the "
            "spelling; if it is private, run `hf auth login` or set HF_TOKEN",
        ),
        (
            errors.RevisionNotFoundError,
            f"{name}: has no revision {revision!r} at {endpoint}: give a branch, a tag or a commit that it has",
        ),
        (errors.OfflineModeIsEnabled, offline),
        (errors.LocalEntryNotFoundError, offline if constants.HF_HUB_OFFLINE else unreachable),
        (errors.HFValidationError, f"{name}: neither a directory here nor a possible name on the hub (org/name)"),
    )
    fallback = f"{name}: cannot be fetched from {endpoint}: {_reason(error)}"
    return next((message for kind, message in causes if isinstance(error, kind)), fallback)


def _reason(error: Exception) -> str:
    """The innermost cause in one line: the outer ones are the hub's own advice."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
