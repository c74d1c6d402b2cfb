"""One GGUF file, through transformers' reader: its names, its undoing of llama.cpp's permutations, its config.

``from_pretrained(gguf_file=...)`` dequantizes the whole model into memory. This keeps transformers' tables and
processors and calls them one tensor at a time, when the tensor is read.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.files import read_head, what_it_is
from engine.errors import CheckpointError


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's blocks lie in the file. gguf's own record would keep the whole parsed metadata alive."""

    name: str
    kind: Any
    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def blocks(self, path: Path) -> np.ndarray[Any, Any]:
        """The tensor as it is stored, mapped."""
        return np.memmap(path, self.dtype, "r", self.offset, self.shape)


class GGUFFile:
    """An opened GGUF file (see :class:`engine.checkpoint.sources.TensorFile`); every tensor is read as float32.

    ``config`` is the Hugging Face config that transformers makes of the file's metadata. Tensors for which transformers
    has no name keep the file's own, so that they are seen to be surplus. Raises ``CheckpointError`` if the optional
    package is missing, the file is damaged or transformers does not know its architecture.
    """

    def __init__(self, path: Path) -> None:
        head = read_head(path)
        if not head.startswith(b"GGUF"):
            raise CheckpointError(f"{path}: not a GGUF file, but {what_it_is(head) or 'something else'}")
        self.label = path.name
        self._path = path
        with _one_line(path):
            self._open()
        gc.collect()  # the parsed vocabulary is tens of megabytes, and some of it hangs in cycles

    def _open(self) -> None:
        import gguf
        import transformers
        from transformers import modeling_gguf_pytorch_utils

        reader: Any = modeling_gguf_pytorch_utils
        models: Any = transformers.AutoModelForCausalLM
        self._dequantize = gguf.dequantize
        metadata = reader.load_gguf_checkpoint(str(self._path))["config"]
        file: Any = gguf.GGUFReader(str(self._path))
        architecture = bytes(file.fields["general.architecture"].parts[-1]).decode()
        self._processor: Any = reader.TENSOR_PROCESSORS.get(architecture, reader.TensorProcessor)(config=metadata)
        with torch.device("meta"):
            model = models.from_config(transformers.AutoConfig.for_model(**metadata))
        self.config: dict[str, Any] = model.config.to_dict() | {"architectures": [type(model).__name__]}
        names = reader.get_gguf_hf_weights_map
        # transformers passes the processor since 4.52
        arguments = (model, self._processor) if "processor" in inspect.signature(names).parameters else (model,)
        self._names: dict[str, str] = names(*arguments)
        expected = model.state_dict()
        self._stored: dict[str, _Stored] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for tensor in file.tensors:
            name, data = self._names.get(tensor.name, tensor.name), tensor.data
            self._stored[name] = _Stored(
                tensor.name, tensor.tensor_type, int(tensor.data_offset), data.dtype, tuple(map(int, data.shape))
            )
            own = tuple(map(int, reversed(tensor.shape)))
            self._shapes[name] = tuple(expected[name].shape) if name in expected else own

    def names(self) -> Collection[str]:
        """Hugging Face's names of the tensors, in the order of the file."""
        return self._stored.keys()

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape under Hugging Face's name, from the architecture; :meth:`tensor` makes sure of it."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """float32, whatever the file stores."""
        del name
        return torch.float32

    def tensor(self, name: str) -> Tensor:
        """The tensor, dequantized anew at each call, float32."""
        stored = self._stored[name]
        try:
            weights = self._dequantize(stored.blocks(self._path), stored.kind)
            result = self._processor.process(
                weights=weights,
                name=stored.name,
                tensor_key_mapping=self._names,
                parsed_parameters={"tensors": {}, "config": self.config},
            )
            tensor = _owned(result.weights)
        except Exception as error:
            raise CheckpointError(f"{self._path}: {name}: cannot be dequantized: {error!r}") from error
        if tuple(tensor.shape) != self._shapes[name]:
            raise CheckpointError(
                f"{self._path}: {name}: shape {list(tensor.shape)}, its architecture expects {list(self._shapes[name])}"
            )
        return tensor


def _owned(weights: Any) -> Tensor:
    """A NumPy array as a float32 tensor, copied only if it is strided or still a read-only view of the file."""
    array = np.ascontiguousarray(weights, dtype=np.float32)
    return torch.from_numpy(array if array.flags.writeable else array.copy())


@contextlib.contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """What transformers and gguf raise, as a ``CheckpointError``."""
    try:
        yield
    except ImportError as error:
        raise CheckpointError(
            f'{path}: GGUF needs optional packages: pip install "slipstream-runtime[gguf]"'
        ) from error
    except (ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: transformers cannot read this file: {str(error).splitlines()[0]}") from error
    except Exception as error:  # the reader indexes and parses unchecked bytes: a damaged file can raise anything
        raise CheckpointError(f"{path}: damaged or cut off ({error!r}); fetch the file again") from error
