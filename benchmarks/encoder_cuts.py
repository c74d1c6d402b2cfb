"""The persistent encoder kernel cut in many ways, beside what else computes such steps: random weights, one Hopper GPU.

For each model and number of tokens: the graph of the generic set, fused tiles (norms in launches of their own, as they
are shipped), and the persistent kernel as it is shipped, as asked for, and cut otherwise, one product at a time. The
best go into ``CUTS`` in ``ops/specialized/encoder_layout.py``, and up to how many tokens they are ahead into
``AHEAD_PERSISTENT`` in ``ops/specialized/tile_table.py``. All ways of a size are timed by turns.

    python -m benchmarks.encoder_cuts --tokens 8 16 24 32 48 --cut "24/1 32/3 24/1 32/8" --json cuts.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OutOfTime
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.encoder_kernels import HALF, MODELS, bert, events_us, packed
from ops.collective import SingleProcess
from ops.eager.kernel_set import EagerKernels
from ops.errors import KernelError
from ops.generic.encoder_graph import EncoderGraphs
from ops.generic.kernel_set import GenericKernels
from ops.macro_ops import walk
from ops.plan import Bucket, StepInputs, StepPlan
from ops.spec import ModelSpec
from ops.specialized.encoder import EncoderPlan
from ops.specialized.encoder_layout import CUTS, Layout, Units, compiled_rows
from ops.specialized.persistent_encoder import PersistentEncoder, machine_code, source

#: Of QKV, projection, up and down.
Cut = tuple[Units, ...]
#: Of a model, so many rows, and a cut.
Kernel = tuple[str, int, Cut]
BUCKET, ALONE = Bucket("encode"), SingleProcess()


def text_of(cut: Cut) -> str:
    """As results print it: columns and parts of K of QKV, projection, up and down."""
    return " ".join(f"{units.wide}/{units.split}" for units in cut)


def cut_of(text: str) -> Cut:
    """Of what :func:`text_of` gives."""
    cut = tuple(Units(*map(int, one.split("/"))) for one in text.split())
    if len(cut) != 4 or cut[0].split != 1 or cut[2].split != 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not like 24/1 32/3 24/1 32/4: QKV and up take all of K")
    return cut


def layout_of(spec: ModelSpec, rows: int, blocks: int, cut: Cut) -> Layout | None:
    """The kernel's sizes with that cut, or None if it is none for this model."""
    try:
        layout = Layout.cut(spec, rows, blocks, *cut)
    except KernelError:
        return None
    # QKV and up hold all of a row of x: no part of down may be longer.
    return layout if cut[3].steps(spec.ffn) * 64 <= spec.hidden else None


def around(spec: ModelSpec, rows: int, blocks: int, start: Cut, count: int) -> list[Cut]:
    """Cuts that differ from ``start`` in one product: ``count`` of each, those first that keep the most blocks busy."""
    shapes = ((3 * spec.hidden, False), (spec.hidden, True), (spec.ffn, False), (spec.hidden, True))
    found = []
    for at, (n, splits) in enumerate(shapes):

        def idle(units: Units, n: int = n) -> tuple[int, int]:
            parts = -(-n // units.wide) * units.split
            waves = -(-parts // blocks)
            return waves, waves * blocks - parts

        others = [Units(*one) for one in product(range(16, 65, 8), (1, 2, 3, 4, 6, 8) if splits else (1,))]
        cuts = [(*start[:at], units, *start[at + 1 :]) for units in sorted(others, key=idle) if units != start[at]]
        found += [cut for cut in cuts if layout_of(spec, rows, blocks, cut) is not None][:count]
    return found


def cuts_of(spec: ModelSpec, rows: int, blocks: int, options: argparse.Namespace) -> list[Cut]:
    """What the options ask for in a kernel of so many rows; what is shipped comes first."""
    shipped = Layout.of(spec, rows, blocks).units
    asked = [cut for cut in options.cut if layout_of(spec, rows, blocks, cut) is not None]
    # Where nobody measured, what is shipped for fewer rows is the better start.
    start = shipped if (spec.hidden, spec.ffn, rows) in CUTS else Layout.of(spec, 16, blocks).units
    return list(dict.fromkeys([shipped, start, *asked, *around(spec, rows, blocks, start, options.around)]))


def compile_one(model: str, rows: int, cut: Cut, blocks: int) -> None:
    """In a process of its own, which needs no GPU: the machine code goes to the cache on disk."""
    spec = bert(model)
    layout = layout_of(spec, rows, blocks, cut)
    assert layout is not None
    machine_code(source(spec, layout, HALF))


def compiled(tasks: dict[Future[None], Kernel], seconds: float) -> set[Kernel]:
    """Those that compile within the time."""
    done, begin = set(), time.monotonic()
    try:
        for future in as_completed(tasks, timeout=seconds):
            if (error := future.exception()) is None:
                done.add(tasks[future])
            else:
                model, rows, cut = tasks[future]
                print(f"  {model} {rows} rows, {text_of(cut)}: {error}"[:200])
    except OutOfTime:
        print("  time is up")
    print(f"  {len(done)} of {len(tasks)} in {time.monotonic() - begin:.0f} s more", flush=True)
    return done


@dataclass(frozen=True)
class Way:
    """One way to compute a step: its launches alone, and the hidden states."""

    name: str
    again: Callable[[], object]
    hidden: Tensor


class Model:
    """Random weights, exact results, and what computes its steps."""

    def __init__(self, name: str) -> None:
        self.name, self.spec = name, bert(name)
        self.weights, self._exact = packed(self.spec, HALF), packed(self.spec, torch.float32)
        self._tiles = EncoderPlan(self.spec, self.weights)

    def inputs(self, tokens: int) -> StepInputs:
        """One sequence."""
        generator = torch.Generator("cuda").manual_seed(tokens)
        ids = torch.randint(0, self.spec.vocab_size, (tokens,), device="cuda", generator=generator)
        return StepInputs(ids, torch.arange(tokens, device="cuda"), (tokens,))

    def exact(self, inputs: StepInputs) -> Tensor:
        """By the eager set in fp32."""
        return EagerKernels().plan(self.spec, self._exact, BUCKET, ALONE).run(inputs).hidden

    def generic(self, inputs: StepInputs) -> Way:
        """The walk of the set in a graph, without the copies in and out that its plan's own graph has."""
        plan = StepPlan(BUCKET, walk(self.spec, self.weights, GenericKernels(), ALONE))
        hidden = plan.run(inputs).hidden
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            plan.run(inputs)
        return Way("generic", graph.replay, hidden)

    def tiles(self, inputs: StepInputs) -> Way:
        """As they are shipped."""
        return self._way("tiles", self._tiles, inputs)

    def persistent(self, inputs: StepInputs, cut: Cut) -> Way:
        """With that cut."""

        def layout(spec: ModelSpec, rows: int, blocks: int) -> Layout:
            return Layout.cut(spec, rows, blocks, *cut)

        graphs = PersistentEncoder(self.spec, self.weights, tokens=64, layout=layout)
        return self._way(text_of(cut), graphs, inputs)

    @staticmethod
    def _way(name: str, graphs: EncoderGraphs, inputs: StepInputs) -> Way:
        return Way(name, graphs.again, graphs.run(inputs.token_ids, None, inputs.lengths))


def measure(model: Model, tokens: int, cuts: list[Cut], rounds: int) -> list[dict[str, Any]]:
    """All ways by turns: the median of the rounds, and the range; the fastest first."""
    inputs = model.inputs(tokens)
    exact = model.exact(inputs)
    ways = [model.generic(inputs), model.tiles(inputs), *(model.persistent(inputs, cut) for cut in cuts)]
    times = [[events_us(way.again, 12) for way in ways] for _ in range(rounds)]
    found = []
    for way, mine in zip(ways, zip(*times, strict=True), strict=True):
        error = float((way.hidden.float() - exact).norm() / exact.norm())
        us = {"gpu_us": statistics.median(mine), "least": min(mine), "most": max(mine)}
        found.append({"model": model.name, "tokens": tokens, "how": way.name, **us, "error": error})
    for one in sorted(found, key=lambda one: float(one["gpu_us"])):
        spread = f"{one['least'] / 1e3:.4f} to {one['most'] / 1e3:.4f}"
        how = f"{one['how']}{' (shipped)' if cuts and one['how'] == text_of(cuts[0]) else ''}"
        print(
            f"{model.name:5} {tokens:3} {how:34} gpu {one['gpu_us'] / 1e3:.4f} ms ({spread})  error {one['error']:.1e}",
            flush=True,
        )
    return found


def main() -> None:
    """Compiles in processes, measures, prints, and writes what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8, 16, 24, 32, 48], help="up to 64 each")
    parser.add_argument("--cut", action="append", type=cut_of, default=[], help="a cut to try, may be repeated")
    parser.add_argument("--around", type=int, default=3, help="other cuts of each product")
    parser.add_argument("--rounds", type=int, default=3, help="times that all ways are timed by turns")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    parser.add_argument("--limit-seconds", type=float, default=60, help="to wait for the compilers")
    parser.add_argument("--json", type=Path, help="write everything to this file")
    options = parser.parse_args()
    blocks = torch.cuda.get_device_properties(0).multi_processor_count
    kinds = product(options.models, sorted({compiled_rows(tokens) for tokens in options.tokens}))
    cuts = {(model, rows): cuts_of(bert(model), rows, blocks, options) for model, rows in kinds}
    longest = max(map(len, cuts.values()))
    # The likeliest cuts of every size first, should time run out.
    kernels = [(*size, them[at]) for at in range(longest) for size, them in cuts.items() if at < len(them)]
    found: list[dict[str, Any]] = []
    with (
        torch.inference_mode(),
        ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        print(f"compiling {len(kernels)} kernels in {options.workers} processes", flush=True)
        tasks = {pool.submit(compile_one, *kernel, blocks): kernel for kernel in kernels}
        models = [Model(name) for name in options.models]
        for model in models:  # Triton compiles in this process meanwhile
            for tokens in options.tokens:
                model.generic(model.inputs(tokens))
                model.tiles(model.inputs(tokens))
        known = compiled(tasks, options.limit_seconds)
        pool.shutdown(cancel_futures=True)
        for model, tokens in product(models, options.tokens):
            rows = compiled_rows(tokens)
            there = [cut for cut in cuts[model.name, rows] if (model.name, rows, cut) in known]
            found += measure(model, tokens, there, options.rounds)
            if options.json is not None:
                options.json.write_text(
                    json.dumps({"device": torch.cuda.get_device_name(), "forwards": found}, indent=1)
                )


if __name__ == "__main__":
    main()
