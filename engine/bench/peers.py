"""The peers: Hugging Face eager, the same under torch.compile, and DeepSpeed's kernel injection.

Needs torch, transformers and the peer alone, so that a peer may live in an environment of its own.
"""

from __future__ import annotations

import inspect
import os
import socket
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from engine.bench import hugging_face
from engine.bench.job import Case, Job
from engine.bench.timing import Prepared, generation, passes, random_ids

#: Static caches are as long as a case needs, rounded up to this.
CACHE_STEP = 64
#: Calls ahead of a capture, on a stream of their own, as CUDA graphs want them.
CALLS_BEFORE_CAPTURE = 3
#: The least workspace that DeepSpeed is asked for, in tokens.
WORKSPACE = 512
NO_STATIC_CACHE = "transformers has no static cache for this model, so its outputs may be wrong"

#: Given a forward function, what calls it with the case's inputs.
Call = Callable[[Callable[..., Any]], Callable[[], Any]]


class HuggingFace:
    """transformers as it comes: ``generate``, or the model's forward pass."""

    def __init__(self, job: Job) -> None:
        import transformers

        self.name, self.device, self.rounds, self.vocab = (
            job.runner,
            torch.device(job.subject.device),
            job.rounds,
            job.subject.vocab,
        )
        if self.device.index is not None:
            torch.cuda.set_device(self.device)
        self.model = hugging_face.load(job.subject)
        if any(case.new for case in job.cases):  # the checkpoint's own sampling and stops are none of our business
            self.model.generation_config = transformers.GenerationConfig(pad_token_id=0)
        self.caller = self.model

    def order(self, cases: Collection[Case]) -> list[Case]:
        """As they come."""
        return list(cases)

    def prepare(self, case: Case) -> Prepared:
        """Greedy ``generate`` of exactly so many tokens, or a pass with a mask of ones."""
        ids = random_ids(case, self.vocab).to(self.device)
        mask = torch.ones_like(ids)

        def generate(new: int) -> Any:
            with torch.inference_mode():
                return self.model.generate(
                    ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False, use_cache=True
                )

        def forward() -> Any:
            with torch.inference_mode():
                return self.caller(ids, attention_mask=mask)

        if case.first:
            generate(1)
            return passes(lambda: generate(1), self.rounds, self.device)
        if case.new:
            generate(2)
            return generation(generate, case, self.rounds, self.device)
        forward()
        return passes(forward, self.rounds, self.device)


class Inductor(HuggingFace):
    """The same model through torch.compile, its shapes static; on a GPU in one CUDA graph.

    For decoding that is the forward pass of one token over a static cache, replayed, without choosing the token: the
    figure that favours it. For the first token it is the pass of the prompts that fills an empty cache and gives their
    last logits. What cannot be captured runs in the mode ``without_graph`` instead, and says so.
    """

    mode: str | None = None
    without_graph = "reduce-overhead"

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        import torch._dynamo.config as dynamo

        # Named so until transformers 4.55, and since.
        self._static = all(
            getattr(self.model, f"_{name}", True) for name in ("supports_static_cache", "can_compile_fullgraph")
        )
        #: Why this model cannot be captured: found out at the first case, and not tried again.
        self._refused = ""
        # Each batch is a program of its own, and after eight of them dynamo would silently run the rest uncompiled.
        for limit in ("recompile_limit", "cache_size_limit"):
            if hasattr(dynamo, limit):
                setattr(dynamo, limit, 64)

    def prepare(self, case: Case) -> Prepared:
        """Compiles, and captures where there is a GPU."""
        call, before = self._step(case) if case.kind == "decode" else (self._pass(case), _nothing)
        what = "" if case.kind == "encode" else "forward only"
        if case.kind == "decode" and not self._static:
            what = f"{what}; {NO_STATIC_CACHE}"
        if self.device.type != "cuda":
            run = _inference(call(self._compiled(self.mode)))
            run()
            return passes(run, self.rounds, self.device, before, what)
        if self._refused:
            return self._without_graph(call, before, what)
        try:
            replay = self._captured(_inference(call(self._compiled(self.mode))), before)
        except RuntimeError as error:
            self._refused = f"no CUDA graph ({_first_line(error)}), so mode {self.without_graph}"
            return self._without_graph(call, before, what)
        return passes(
            replay, self.rounds, self.device, before, f"{what}, in a CUDA graph" if what else "in a CUDA graph"
        )

    def _compiled(self, mode: str | None) -> Callable[..., Any]:
        return torch.compile(self.model.forward, dynamic=False, mode=mode)

    def _pass(self, case: Case) -> Call:
        """Whole sequences; prompts leave their keys and values in a cache, and give the logits of their last tokens."""
        ids = random_ids(case, self.vocab).to(self.device)
        given: dict[str, Any] = {}
        if case.first:
            takes = inspect.signature(self.model.forward).parameters
            given = {"use_cache": True, **_known(takes, logits_to_keep=1)}
        return lambda forward: lambda: forward(ids, **given)

    def _step(self, case: Case) -> tuple[Call, Callable[[], object]]:
        """One token behind a prompt, and what puts the cache back to where the prompt ends."""
        from transformers import StaticCache

        takes = inspect.signature(self.model.forward).parameters
        ids = random_ids(case, self.vocab).to(self.device)
        room = -(-(case.tokens + case.new + 1) // CACHE_STEP) * CACHE_STEP
        shape = {"max_batch_size": case.batch, "max_cache_len": room, "device": self.device, "dtype": self.model.dtype}
        cache = StaticCache(config=self.model.config, **shape)
        kept = {"cache" if "cache" in takes else "past_key_values": cache, "use_cache": True}
        place = torch.tensor([case.tokens], device=self.device)
        with torch.inference_mode():
            self.model(ids, **kept, **_known(takes, cache_position=torch.arange(case.tokens, device=self.device)))
        mask = torch.zeros(case.batch, room, dtype=torch.int64, device=self.device)
        mask[:, : case.tokens + 1] = 1
        position = place[None].expand(case.batch, 1).contiguous()
        given = {"attention_mask": mask, **kept, **_known(takes, cache_position=place, position_ids=position)}
        token = ids[:, :1].clone()
        counters = _counters(cache)
        saved = [counter.clone() for counter in counters]

        def back() -> None:
            with torch.inference_mode():
                for counter, value in zip(counters, saved, strict=True):
                    counter.copy_(value)

        return (lambda forward: lambda: forward(token, **given)), back

    def _captured(self, run: Callable[[], object], before: Callable[[], object]) -> Callable[[], object]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(CALLS_BEFORE_CAPTURE):
                before()
                run()
        torch.cuda.current_stream().wait_stream(stream)
        before()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = run()

        def replay(graph: Any = graph, kept: object = kept) -> None:  # holds the outputs' memory as long as the graph
            graph.replay()

        return replay

    def _without_graph(self, call: Call, before: Callable[[], object], what: str) -> Prepared:
        torch.cuda.synchronize()
        torch.compiler.reset()
        compiled = _inference(call(self._compiled(self.without_graph)))

        def run() -> object:
            torch.compiler.cudagraph_mark_step_begin()
            return compiled()

        for _ in range(CALLS_BEFORE_CAPTURE):
            before()
            run()
        note = f"{what}; {self._refused}" if what else self._refused
        return passes(run, self.rounds, self.device, before, note)


class Autotune(Inductor):
    """The same, with every matrix product tuned when it is compiled, which takes minutes."""

    mode = "max-autotune-no-cudagraphs"
    without_graph = "max-autotune"


class DeepSpeed(HuggingFace):
    """DeepSpeed-Inference with kernel injection."""

    def __init__(self, job: Job) -> None:
        import deepspeed

        single = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        for name, value in {**single, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
            os.environ.setdefault(name, value)
        super().__init__(job)
        needed = max(case.tokens + case.new + 1 for case in job.cases)
        engine = deepspeed.init_inference(
            self.model,
            tensor_parallel={"tp_size": 1},
            dtype=self.model.dtype,
            replace_with_kernel_inject=True,
            max_out_tokens=max(WORKSPACE, needed),
            enable_cuda_graph=False,
        )
        # Where it knows no policy for the model it runs Hugging Face's own layers without a word.
        if not any(type(part).__name__.startswith("DeepSpeed") for part in engine.module.modules()):
            raise RuntimeError(f"kernel injection does not know {type(self.model).__name__}")
        self.model = engine.module
        self.caller = engine

    def order(self, cases: Collection[Case]) -> list[Case]:
        """The largest first: its workspace is made for the first call and does not grow."""
        return sorted(cases, key=lambda case: (case.batch * case.tokens, case.batch), reverse=True)


RUNNERS: Mapping[str, Callable[[Job], HuggingFace]] = {
    "hf": HuggingFace,
    "inductor": Inductor,
    "autotune": Autotune,
    "deepspeed": DeepSpeed,
}


def _nothing() -> None:
    """Nothing has to be put back."""


def _inference(run: Callable[[], Any]) -> Callable[[], Any]:
    def inner() -> Any:
        with torch.inference_mode():
            return run()

    return inner


def _known(takes: Collection[str], **values: Any) -> dict[str, Any]:
    """Those of the arguments that this version's forward takes."""
    return {name: value for name, value in values.items() if name in takes}


def _counters(cache: Any) -> list[Tensor]:
    """Integers that a static cache keeps on the device to know where it stands, whatever this version calls them."""
    found = [value for layer in getattr(cache, "layers", ()) for value in vars(layer).values()]
    return [value for value in found if isinstance(value, Tensor) and not value.is_floating_point()]


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
