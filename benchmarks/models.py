"""The whole table: the models below, our kernel sets and the peers, at several batches, with random weights.

All runs get ready side by side (compiling takes most of the time), as many as the device's memory holds, and are then
measured one at a time. Ours and Hugging Face come first, what is slow to compile after them. Needs no network.

    python -m benchmarks.models --json models.json
    python -m benchmarks.models --only gpt2,bert-base --batch 1 --against none --limit-seconds 300
    python -m benchmarks.models --only gpt-neo-2.7b --precisions fp32 --batch 1
    python -m benchmarks.models --only llama-2-7b --prompt 4031 --batch 1 --against none       # to its last position
    python -m benchmarks.models --only llama-2-7b --first-token --prompt 2048 --batch 1        # prefill
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from config_schema import SlipstreamError
from engine.bench import command, options, report
from engine.bench.command import Bars, Model
from engine.bench.job import KERNELS, PEERS, Job, Request
from engine.bench.pool import Pool
from engine.bench.report import Row
from engine.outputs import check_writable

#: A config.json of each model, written by hand after the published ones.
SHAPES = Path(__file__).parent / "shapes"
#: Peers that take minutes to get ready.
SLOW = ("inductor", "autotune", "deepspeed")
#: Memory that a run needs beside its weights (context, caches, workspaces), and the share of the device's that runs may
#: take together.
ASIDE_BYTES, MEMORY_SHARE = 3 << 30, 0.85
#: Seconds kept for measuring what is ready when the time runs out.
SPARE = 60.0


@dataclass(frozen=True)
class Entry:
    """A model of the table, in one precision."""

    name: str
    precision: str


TABLE = (
    Entry("gpt2", "fp16"),
    Entry("gpt2-xl", "fp16"),
    Entry("gpt-neo-2.7b", "fp16"),
    Entry("gpt-neo-2.7b", "fp32"),
    Entry("llama-3.2-1b", "bf16"),
    Entry("llama-2-7b", "bf16"),
    Entry("bert-base", "fp16"),
    Entry("bert-large", "fp16"),
)


def entries(chosen: argparse.Namespace) -> list[Entry]:
    """The entries of the table that are asked for."""
    return [entry for entry in TABLE if entry.name in chosen.only and entry.precision in chosen.precisions]


def waves(runs: Sequence[tuple[Job, Model]], together: int, memory: float) -> Iterator[list[tuple[Job, Model]]]:
    """The runs in their order, cut where ``together`` or the memory would be exceeded; each wave has at least one."""
    wave: list[tuple[Job, Model]] = []
    taken = 0.0
    for job, model in runs:
        # Our own runs hold Hugging Face's random model until they have packed it.
        need = model.weight_bytes * (2 if job.runner == "slipstream" else 1) + ASIDE_BYTES
        if wave and (len(wave) == together or taken + need > memory * MEMORY_SHARE):
            yield wave
            wave, taken = [], 0.0
        wave.append((job, model))
        taken += need
    if wave:
        yield wave


def measure(chosen: argparse.Namespace, pool: Pool) -> list[Row]:
    """Every row, in the order of the table; the JSON file is written anew after each wave."""
    requests = [
        Request(
            config={"model": {"path": str(SHAPES / entry.name)}, "precision": entry.precision, "device": chosen.device},
            random=True,
            batches=chosen.batch,
            prompt=chosen.prompt,
            new=chosen.new,
            first=chosen.first_token,
            tokens=chosen.tokens,
        )
        for entry in entries(chosen)
    ]
    found = command.survey(pool, requests)
    models = [model for model in found.models if isinstance(model, Model)]
    for model in found.models:
        if isinstance(model, str):
            print(model, file=sys.stderr)
    for model in {one.subject.precision: one for one in models}.values():
        print(f"{found.device}: {report.rates_in_words(model.rates, model.subject.precision)}", flush=True)
    runs = [(job, model) for model in models for job in command.jobs(model, chosen.kernels, chosen.against, chosen)]
    places = {id(job): place for place, (job, _) in enumerate(runs)}
    context = command.context_of(found, ["python", "-m", "benchmarks.models", *sys.argv[1:]])
    rows: dict[int, list[Row]] = {}
    on_gpu = any(model.subject.device.startswith("cuda") for model in models)
    together = chosen.together or (8 if on_gpu else 1)
    for wave in waves(sorted(runs, key=lambda run: run[0].runner in SLOW), together, found.memory):
        for outcome, (job, model) in zip(command.measure(pool, [job for job, _ in wave]), wave, strict=True):
            rows[places[id(job)]] = report.rows(outcome, model.works, model.rates, context)
        if chosen.json is not None:
            report.write_json(chosen.json, [row for place in sorted(rows) for row in rows[place]])
    return [row for place in sorted(rows) for row in rows[place]]


def main() -> None:
    """Measures, and prints one Markdown table."""
    names = tuple(dict.fromkeys(entry.name for entry in TABLE))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", type=options.names(names, "model"), default=names, help=f"some of {','.join(names)}")
    precisions = tuple(dict.fromkeys(entry.precision for entry in TABLE))
    parser.add_argument(
        "--precisions", type=options.names(precisions, "precision"), default=precisions, help="some of the table's"
    )
    parser.add_argument(
        "--kernels", type=options.names(KERNELS, "kernel set"), default=KERNELS[:2], help="(specialized,generic)"
    )
    parser.add_argument(
        "--against", type=options.names(PEERS, "peer"), default=("hf", "inductor"), help="or none (hf,inductor)"
    )
    options.measures(parser)
    parser.add_argument("--device", default="auto", help="as in a config")
    parser.add_argument("--together", type=options.count, help="runs that get ready at a time (8 on a GPU, else 1)")
    parser.add_argument("--limit-seconds", type=options.count, help="stop then, with what there is")
    parser.add_argument("--json", type=Path, help="write every row to this file")
    chosen = parser.parse_args()
    if not entries(chosen):
        parser.error("none of --only has one of --precisions in the table")
    try:
        if chosen.json is not None:
            check_writable(chosen.json, "--json ")
    except SlipstreamError as error:
        parser.error(str(error))
    start = time.monotonic()
    deadline = None if chosen.limit_seconds is None else start + chosen.limit_seconds
    pool = command.pool_of(chosen, Bars(sys.stderr), deadline)
    pool.spare = min(SPARE, (chosen.limit_seconds or 0) / 4)
    rows = measure(chosen, pool)
    print(f"{time.monotonic() - start:.0f} s\n\n{report.markdown(rows, chosen.kernels, chosen.against)}")


if __name__ == "__main__":
    main()
