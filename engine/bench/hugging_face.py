"""The Hugging Face model of a job, read or made at random. Needs torch and transformers alone."""

from __future__ import annotations

from typing import Any

import torch

from engine.bench.job import Subject

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def load(subject: Subject) -> Any:
    """The model in eval mode, on the subject's device and in its precision. Code from the checkpoint is never run."""
    import transformers

    device, dtype = torch.device(subject.device), DTYPES[subject.precision]
    if subject.random:
        return random_model(subject.hf_class, subject.directory, device, dtype).eval()
    extra = {"gguf_file": subject.gguf_file} if subject.gguf_file else {}
    auto = getattr(transformers, subject.hf_class)
    model = auto.from_pretrained(subject.directory, trust_remote_code=False, torch_dtype=dtype, **extra)
    return model.to(device, dtype).eval()


def random_model(hf_class: str, directory: str, device: torch.device, dtype: torch.dtype | None) -> Any:
    """A model with the shape of ``directory``/config.json, made where it will stay.

    ``dtype`` None takes what the config says, and fp32 where it says nothing.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    if dtype is not None:
        # transformers 4.56 renamed it, and kept the old name as a property.
        old = not isinstance(getattr(type(config), "torch_dtype", None), property)
        setattr(config, "torch_dtype" if old else "dtype", dtype)
    torch.manual_seed(0)
    with torch.device(device):
        model = getattr(transformers, hf_class).from_config(config)
    return model if dtype is None else model.to(dtype)
