"""Opening a checkpoint: a directory or a name on the hub, its configuration and its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoint.bin_file import BinFile
from engine.checkpoint.deepspeed_files import is_deepspeed, open_deepspeed
from engine.checkpoint.files import file_inside, read_json_object
from engine.checkpoint.gguf_file import GGUFFile
from engine.checkpoint.hub import HUB_NAME, fetch
from engine.checkpoint.quantized import BLOCK, QuantizedFile, Stored, is_quantized
from engine.checkpoint.safetensors_file import SafetensorsFile
from engine.checkpoint.shards import SHARD_NAME, listed, missing_numbers, open_sharded
from engine.checkpoint.sources import FileSource
from engine.errors import CheckpointError
from ops.weights import WeightSource


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was opened and whose files were found whole; tensors are read from ``source`` on demand.

    ``config`` is ``config.json`` (for GGUF: what transformers makes of the file's metadata), ``generation_config`` is
    ``generation_config.json`` or ``{}``, ``gguf_file`` the GGUF file's name in ``directory`` or None.
    """

    directory: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    source: WeightSource
    gguf_file: str | None


def open_checkpoint(path: str, *, revision: str | None = None, gguf_file: str | None = None) -> Checkpoint:
    """The checkpoint in the directory ``path`` or, if there is none, of that name on the Hugging Face hub.

    ``revision`` is a branch, tag or commit on the hub; ``gguf_file`` names one GGUF file of the directory or repository
    to read in place of its other weights. Otherwise safetensors are taken before ``.bin``, one file before several.
    Raises ``CheckpointError``: one line that names the file and says what to do.
    """
    directory = model_directory(path, revision, gguf_file)
    if gguf_file is not None:
        file = _open_gguf(directory, gguf_file)
        return Checkpoint(directory, file.config, {}, FileSource.single(file), gguf_file)
    if _says_quantized(directory):
        config = _config(directory)
        where = str(directory / "config.json")
        weights = _regular(directory, "model.safetensors")
        quantized = QuantizedFile(weights, Stored.from_json(config[BLOCK], where))
        return Checkpoint(directory, config, _optional_json(directory, "generation_config.json"), quantized, None)
    source = open_weights(directory)
    config = _config(directory)
    return Checkpoint(directory, config, _optional_json(directory, "generation_config.json"), source, None)


def _says_quantized(directory: Path) -> bool:
    return (directory / "config.json").is_file() and is_quantized(_config(directory))


def open_weights(directory: Path) -> FileSource:
    """The weights of a local directory alone, whatever its configuration. Raises ``CheckpointError``."""
    for name, open_file in _WEIGHTS.items():
        if (directory / name).exists() or (directory / name).is_symlink():
            return open_file(_regular(directory, name))
    if is_deepspeed(directory):
        return open_deepspeed(directory)
    raise CheckpointError(_no_weights(directory))


def deepspeed_weights(directory: Path) -> FileSource | None:
    """The weights of a local directory in which only DeepSpeed wrote some, or None. Raises ``CheckpointError``."""
    if any((directory / name).exists() for name in _WEIGHTS) or not is_deepspeed(directory):
        return None
    return open_deepspeed(directory)


def _single_safetensors(path: Path) -> FileSource:
    return FileSource.single(SafetensorsFile(path))


def _single_bin(path: Path) -> FileSource:
    return FileSource.single(BinFile(path))


def _sharded_safetensors(path: Path) -> FileSource:
    return open_sharded(path, SafetensorsFile)


def _sharded_bin(path: Path) -> FileSource:
    return open_sharded(path, BinFile)


_WEIGHTS: dict[str, Callable[[Path], FileSource]] = {
    "model.safetensors": _single_safetensors,
    "model.safetensors.index.json": _sharded_safetensors,
    "pytorch_model.bin": _single_bin,
    "pytorch_model.bin.index.json": _sharded_bin,
}
"""The files that stand for a checkpoint's weights, the preferred one first."""


def model_directory(path: str, revision: str | None = None, gguf_file: str | None = None) -> Path:
    """The local directory of a checkpoint, fetched from the hub if it is a name there. Raises ``CheckpointError``."""
    local = Path(path).expanduser() if path else Path("")
    if "\0" in path or not path:
        raise CheckpointError(f"{path!r}: not a path: give a checkpoint's directory or its name on the hub (org/name)")
    if local.is_dir():
        if revision is not None:
            raise CheckpointError(
                f"{local}: revision {revision!r} was given, but this is a directory here, not on the hub"
            )
        if not any(local.iterdir()):
            raise CheckpointError(f"{local}: an empty directory: it must hold config.json, weights and tokenizer")
        return local
    if local.exists():
        where = f'"{local.parent}" with gguf_file "{local.name}"' if local.suffix == ".gguf" else f'"{local.parent}"'
        raise CheckpointError(f"{local}: a file, where the checkpoint's directory is wanted: give {where}")
    if HUB_NAME.fullmatch(path):
        return fetch(path, revision, gguf_file)
    raise CheckpointError(f"{local}: no such directory (and not a name on the hub, which would be org/name)")


def _regular(directory: Path, name: str) -> Path:
    path = file_inside(directory, name, str(directory))
    if path.is_symlink() and not path.exists():
        raise CheckpointError(
            f"{path}: a symbolic link to {path.readlink()}, which does not exist: fetch the checkpoint again"
        )
    if not path.is_file():
        raise CheckpointError(f"{path}: {'not a regular file' if path.exists() else 'no such file'}")
    return path


def _config(directory: Path) -> dict[str, Any]:
    if not (directory / "config.json").exists():
        raise CheckpointError(f"{directory}: config.json is missing{_hint(directory)}")
    config = read_json_object(_regular(directory, "config.json"))
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(
            f"{directory / 'config.json'}: model_type is missing or not a string: it names the family "
            '("llama", "gpt2", "bert", ...); save_pretrained() of transformers writes it'
        )
    return config


def _optional_json(directory: Path, name: str) -> dict[str, Any]:
    return read_json_object(_regular(directory, name)) if (directory / name).exists() else {}


def _open_gguf(directory: Path, name: str) -> GGUFFile:
    path = file_inside(directory, name, "gguf_file")
    if not path.is_file():
        others = sorted(other.name for other in directory.glob("*.gguf"))
        raise CheckpointError(f"{path}: no such file; GGUF files there: {listed(others) or 'none'}")
    return GGUFFile(path)


def _no_weights(directory: Path) -> str:
    """Why a directory has no weights, as far as its files tell."""
    found = sorted(entry.name + "/" * entry.is_dir() for entry in directory.iterdir())
    shards = [name for name in found if SHARD_NAME.fullmatch(name)]
    if shards:
        missing = missing_numbers(found)
        index = {"bin": "pytorch_model.bin", "safetensors": "model.safetensors"}[shards[0].rpartition(".")[2]]
        also = f", and of the shards {listed(missing)}" if missing else ""
        return f"{directory}: {len(shards)} shards, but {index}.index.json is missing{also}; fetch the checkpoint again"
    wanted = ", ".join(_WEIGHTS)
    return f"{directory}: no weights: none of {wanted}{_hint(directory)}. It holds: {listed(found)}"


def _hint(directory: Path) -> str:
    """What a directory without the files of a checkpoint is instead, and what to do; "" if that cannot be told."""
    hints = {
        "adapter_config.json": "an adapter (LoRA) without its base model: merge them (peft's merge_and_unload)",
        "latest": "a DeepSpeed checkpoint: copy the config.json and the tokenizer of the model that was trained to it",
        "*_model_states.pt": "inside of a DeepSpeed checkpoint: give the directory above it, with `latest`",
        "*/*_model_states.pt": "a DeepSpeed checkpoint without its file `latest`: write that folder's name into it",
        "model_index.json": "a diffusion pipeline, which is not supported",
        "*.gguf": "a GGUF checkpoint: name its file with gguf_file",
        "consolidated*": "the original release, not Hugging Face's format: convert it, or fetch the -hf repository",
        "*.pth": "the original release, not Hugging Face's format: convert it, or fetch the -hf repository",
        "tf_model.h5": "TensorFlow weights: convert them with transformers",
        "flax_model.msgpack": "Flax weights: convert them with transformers",
        "*.safetensors": "its safetensors go by another name: the file must be called model.safetensors",
        "*/config.json": "the checkpoint is in a subdirectory: give that as the path",
    }
    found = next(
        ((hint, sorted(match)[0]) for glob, hint in hints.items() if (match := list(directory.glob(glob)))), None
    )
    return "" if found is None else f" ({found[1].relative_to(directory)}: {found[0]})"
