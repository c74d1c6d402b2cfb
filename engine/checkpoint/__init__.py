"""Reading checkpoints by tensor and by row, and saving them so that a crash leaves the old one whole."""

from engine.checkpoint.directory import Checkpoint, open_checkpoint, open_weights
from engine.checkpoint.save import save_safetensors
from engine.checkpoint.sources import FileSource
from engine.checkpoint.state_dict import StateDictSource

__all__ = [
    "Checkpoint",
    "FileSource",
    "StateDictSource",
    "open_checkpoint",
    "open_weights",
    "save_safetensors",
]
