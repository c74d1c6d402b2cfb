"""Open checkpoints by name in a process of its own: ``huggingface_hub`` reads its environment when it is imported.

Takes a JSON list of ``[path, revision, gguf_file]`` on stdin; prints a JSON list, one object for each:
``{"names": {tensor: values}, "directory": ...}`` or ``{"error": ...}``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from engine.checkpoint import open_checkpoint
from engine.errors import CheckpointError


def attempt(path: str, revision: str | None, gguf_file: str | None) -> dict[str, Any]:
    """What opening ``path`` gives."""
    try:
        checkpoint = open_checkpoint(path, revision=revision, gguf_file=gguf_file)
    except CheckpointError as error:
        return {"error": str(error)}
    source = checkpoint.source
    return {
        "names": {name: source.read(name).tolist() for name in source.names()},
        "directory": str(checkpoint.directory),
    }


if __name__ == "__main__":
    print(json.dumps([attempt(*request) for request in json.load(sys.stdin)]))
