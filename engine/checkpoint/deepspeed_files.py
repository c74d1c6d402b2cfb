"""The weights in a directory that DeepSpeed's ``save_checkpoint`` wrote: ``latest`` names a folder, which holds them.

runs/a/
    latest                              "global_step500"
    zero_to_fp32.py                     DeepSpeed puts it there with ZeRO
    global_step500/
        mp_rank_00_model_states.pt      "module": the weights in the precision of the training; ZeRO up to stage 2
        *_optim_states.pt               fp32 weights and moments of ZeRO: not read, they are pickled classes
        zero_pp_rank_*_model_states.pt  in the place of mp_rank_00: ZeRO stage 3, no file has a whole weight
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path

from engine.checkpoint.bin_file import BinFile, load_plain
from engine.checkpoint.files import file_inside
from engine.checkpoint.shards import listed
from engine.checkpoint.sources import FileSource
from engine.errors import CheckpointError

logger = logging.getLogger("slipstream.checkpoint")

#: The file that names the folder of the last checkpoint, its tag.
LATEST = "latest"
#: Bytes of ``latest`` at most: file systems take no longer names.
TAG_LIMIT = 255

_WEIGHTS_FILE = "mp_rank_00_model_states.pt"
_CONSOLIDATE = (
    "where you trust its origin, run the zero_to_fp32.py that DeepSpeed put beside `latest`, where DeepSpeed is "
    "installed (python zero_to_fp32.py . OUTPUT), and use what it writes (pytorch_model.bin, or shards with an index), "
    "with config.json beside it"
)
_CONVERT = (
    'where you trust its origin, save its weights alone: torch.save(torch.load(FILE, weights_only=False)["module"], '
    '"pytorch_model.bin")'
)
_SLICES = (
    "written by tensor parallelism, in which each file has a slice of each weight, and how they join is known to the "
    "program that trained the model alone: save it whole there (save_16bit_model() of DeepSpeed, save_pretrained() of "
    "Hugging Face)"
)
#: Files of layouts in which no file holds the whole model, and what to do. The first that is there is told.
_IN_PIECES: Mapping[str, str] = {
    "zero_pp_rank_*_model_states.pt": f"written by ZeRO stage 3, in which each process has a part of each weight: "
    f"{_CONSOLIDATE}",
    "*expert_*_model_states.pt": "a mixture of experts in a file each, which is not supported",
    "layer_*-model_states.pt": "written by pipeline parallelism, a file for each layer: join them with the program "
    "that trained the model (save_pretrained() of Hugging Face writes what is read here)",
    "mp_rank_0[1-9]_model_states.pt": _SLICES,
    "mp_rank_[1-9]*_model_states.pt": _SLICES,
}


class ModelStatesFile(BinFile):
    """The weights under ``module`` in an opened ``*_model_states.pt``, memory-mapped.

    Where the model was wrapped, each prefix ``module.`` that all names have is left out. Raises ``CheckpointError``
    as :class:`engine.checkpoint.bin_file.BinFile` does; the rest of the file (optimizer, schedule, what the user's
    script added) is read as plain values and dropped.
    """

    def __init__(self, path: Path) -> None:
        state = load_plain(path, _CONVERT)
        module = state.get("module") if isinstance(state, Mapping) else None
        if not isinstance(module, Mapping) or not module:
            kind = type(module).__name__ if isinstance(state, Mapping) else type(state).__name__
            raise CheckpointError(
                f'{path}: "module" must be a dictionary of weights, is {kind}: not a file of DeepSpeed, or one of '
                "pipeline parallelism, whose weights lie in other files"
            )
        nested = next((name for name, value in module.items() if isinstance(value, Mapping)), None)
        if nested is not None:
            raise CheckpointError(
                f"{path}: {nested}: a dictionary in the dictionary of weights, as Megatron lays them out: convert it "
                "with the program that trained it (save_pretrained() of Hugging Face writes what is read here)"
            )
        while all(isinstance(name, str) and name.startswith("module.") for name in module):
            module = {name.removeprefix("module."): value for name, value in module.items()}
        super().__init__(path, module, _CONVERT)
        self.label = f"{path.parent.name}/{path.name}"


def is_deepspeed(directory: Path) -> bool:
    """Whether DeepSpeed wrote a checkpoint into the directory, as far as its file ``latest`` tells."""
    latest = directory / LATEST
    return latest.is_file() and latest.stat().st_size <= TAG_LIMIT


def open_deepspeed(directory: Path) -> FileSource:
    """The weights of the checkpoint that ``latest`` names.

    Raises ``CheckpointError``: one line that names the file; for a checkpoint in pieces, with the way to join them.
    """
    folder = _folder(directory)
    for pattern, what in _IN_PIECES.items():
        found = sorted(path.name for path in folder.glob(pattern))
        if found:
            raise CheckpointError(f"{folder}: {what} ({listed(found, 2)})")
    path = file_inside(folder, _WEIGHTS_FILE, str(folder))
    if not path.is_file():
        held = sorted(entry.name for entry in folder.iterdir())
        raise CheckpointError(f"{folder}: {_WEIGHTS_FILE} is missing; it holds: {listed(held) or 'nothing'}")
    source = FileSource.single(ModelStatesFile(path))
    if any(folder.glob("*_optim_states.pt")):
        logger.info(
            "%s: weights in the precision of DeepSpeed's training; zero_to_fp32.py gives its fp32 weights", path
        )
    return source


def _folder(directory: Path) -> Path:
    latest = file_inside(directory, LATEST, str(directory))
    try:
        tag = latest.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{latest}: cannot be read: {error}") from error
    if not re.fullmatch(r"[^/\\\x00-\x1f]+", tag):
        raise CheckpointError(f"{latest}: must name a folder beside it, as DeepSpeed writes it; it holds {tag[:40]!r}")
    folder = file_inside(directory, tag, str(latest))
    if not folder.is_dir():
        others = sorted(entry.parent.name for entry in directory.glob("*/*_model_states.pt"))
        known = f"; write one of these into it: {listed(list(dict.fromkeys(others)))}" if others else ""
        raise CheckpointError(f"{latest}: names {tag}, and there is no such folder beside it{known}")
    return folder
