"""What a worker is asked to measure: plain data that travels as one line of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

#: Peers by name, with the distribution each needs beside torch.
PEERS: Mapping[str, str] = {
    "hf": "transformers",
    "inductor": "transformers",
    "autotune": "transformers",
    "deepspeed": "deepspeed",
}

#: Kernel sets by name, the fastest first; one that cannot run says so in its row.
KERNELS = ("specialized", "generic", "eager")

Kind = Literal["decode", "prefill", "encode"]


@dataclass(frozen=True)
class Case:
    """One thing to measure: ``batch`` sequences of ``tokens`` tokens each.

    new:   tokens to generate behind such prompts, timed one by one; 0 is a forward pass of whole sequences.
    first: the time until the first token behind the prompts is there, instead; ``new`` is 1 then.
    """

    batch: int
    tokens: int
    new: int = 0
    first: bool = False

    @property
    def kind(self) -> Kind:
        """What its times are of: one token, the first token, or one pass."""
        if self.first:
            return "prefill"
        return "decode" if self.new else "encode"

    @property
    def room(self) -> int:
        """Tokens of a sequence in the end; token by token, one more is generated than is timed."""
        return self.tokens + self.new + (self.kind == "decode")

    def __str__(self) -> str:
        return f"batch {self.batch}" if self.new else f"batch {self.batch} of {self.tokens} tokens"


@dataclass(frozen=True)
class Request:
    """A model to be surveyed, and what is to be measured of it.

    config:  a configuration as a JSON document.
    random:  draw its weights at random, even where there are some.
    batches: sequences at a time.
    prompt, new: tokens of a decoder's prompts, and how many to time behind them.
    first:   time the first token behind the prompts instead.
    tokens:  lengths of an encoder's sequences; none for those of ``survey.ENCODER_TOKENS`` that fit.
    name:    what tables call it; "" for the directory's name.
    """

    config: Mapping[str, Any]
    random: bool = False
    batches: tuple[int, ...] = (1, 4, 8, 16)
    prompt: int = 128
    new: int = 64
    first: bool = False
    tokens: tuple[int, ...] = ()
    name: str = ""

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Request:
        """The request whose ``asdict`` has travelled as JSON."""
        lists = {name: tuple(document[name]) for name in ("batches", "tokens")}
        return cls(**{**document, **lists})


@dataclass(frozen=True)
class Subject:
    """The model that all runs of one table share, as the survey has found it.

    name:      what tables call it.
    config:    the configuration as a JSON document (:meth:`config_schema.Config.to_dict`).
    random:    weights are drawn at random from ``directory``/config.json; latency does not depend on them.
    directory: the checkpoint's directory; ``gguf_file`` a file in it that holds the weights, or None.
    hf_class:  the Hugging Face auto class of its task.
    vocab:     ids go from 0 to ``vocab - 1``.
    device:    ``cpu``, ``cuda`` or ``cuda:N``; ``precision``: ``fp32``, ``bf16`` or ``fp16``.
    """

    name: str
    config: Mapping[str, Any]
    random: bool
    directory: str
    gguf_file: str | None
    hf_class: str
    vocab: int
    device: str
    precision: str


@dataclass(frozen=True)
class Job:
    """One process: ``runner`` measures ``cases`` of ``subject``.

    runner:   ``slipstream`` or the name of a peer.
    kernels:  the kernel set, for slipstream alone.
    rounds:   measured rounds of a generation; a single pass is measured four times as often.
    gpu_time: also sum up the kernels' times, where there is a GPU.
    """

    runner: str
    subject: Subject
    cases: tuple[Case, ...]
    kernels: str = ""
    rounds: int = 5
    gpu_time: bool = True

    @property
    def label(self) -> str:
        """What tables call the run before it has said more: the kernel set or the peer."""
        return self.kernels if self.runner == "slipstream" else self.runner

    def to_json(self) -> dict[str, Any]:
        """The job as a JSON document."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Job:
        """The job that :meth:`to_json` wrote."""
        cases = tuple(Case(**case) for case in document["cases"])
        return cls(**{**document, "subject": Subject(**document["subject"]), "cases": cases})
