"""slipstream's own runs: one kernel set, measured through the public ``Engine``."""

from __future__ import annotations

import gc
from collections.abc import Collection
from dataclasses import replace

import torch
from torch import Tensor

from config_schema import load_config
from engine import build
from engine.bench import hugging_face
from engine.bench.job import Case, Job
from engine.bench.timing import Prepared, generation, passes, random_ids
from engine.engine import Engine
from ops.weights import WeightSource


class OneReading:
    """A source that is read once: afterwards :meth:`drop` lets go of it, and its version stays what it was.

    A live model's version is looked up before each call, tensor by tensor, which no checkpoint on disk costs.
    """

    def __init__(self, source: WeightSource) -> None:
        self._source: WeightSource | None = source
        self.version = source.version

    def drop(self) -> None:
        """Lets go of the tensors."""
        self._source = None

    def names(self) -> Collection[str]:
        """Of every tensor."""
        return self._open().names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._open().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor."""
        return self._open().dtype(name)

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """The tensor or rows of it."""
        return self._open().read(name, rows)

    def locate(self, name: str) -> str:
        """For messages."""
        return self._open().locate(name)

    def _open(self) -> WeightSource:
        assert self._source is not None, "read after it was dropped"
        return self._source


class Slipstream:
    """An engine of the job's kernel set."""

    def __init__(self, job: Job) -> None:
        config = load_config({**job.subject.config, "kernels": job.kernels})
        if job.subject.random:
            model = hugging_face.load(job.subject)
            plan = build.plan(config, model=model)
            source = OneReading(plan.source)
            self._engine = Engine(replace(plan, source=source))
            source.drop()
            del model, plan, source
            gc.collect()
            if self._engine.plan.device.type == "cuda":
                torch.cuda.empty_cache()
        else:
            self._engine = Engine(config)
        self._rounds, self._vocab = job.rounds, job.subject.vocab
        self.name = self._engine.plan.kernels

    def order(self, cases: Collection[Case]) -> list[Case]:
        """As they come."""
        return list(cases)

    def prepare(self, case: Case) -> Prepared:
        """Runs the case once in full, so that whatever compiles or captures has done so."""
        engine, device = self._engine, self._engine.plan.device
        ids = random_ids(case, self._vocab)
        if not case.new:
            ids = ids.to(device)
            engine(ids)
            return passes(lambda: engine(ids), self._rounds, device)
        rows = ids.tolist()  # the ids come from the host, as a tokenizer's do

        def generate(new: int) -> object:
            return engine.generate(rows, max_new_tokens=new, do_sample=False, ignore_eos=True)

        generate(1)
        if case.first:
            return passes(lambda: generate(1), self._rounds, device)
        generate(case.new + 1)
        return generation(generate, case, self._rounds, device)
