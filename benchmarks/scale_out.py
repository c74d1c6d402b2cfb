"""How long a training step takes on 8 to 4096 GPUs, by a model: full gradients in a ring or by node, or signs.

    python -m benchmarks.scale_out --compute-ms 267 --elements 110e6 --gbps 10,100
    python -m benchmarks.scale_out --published
    python -m benchmarks.scale_out --measured

Every constant is an input, and the table says where each is from. --compute-ms: of a step on one GPU, all but the
exchange, as benchmarks.train_step or layer_drop_cost measure it. --pass-gbs: of the passes that make and read signs, as
benchmarks.compression measures them. --gbps: what a node can send, as benchmarks.slow_network or iperf measure it.
docs/scale_out.md has the formulas, and how they compare with what is published.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from engine.bench.report import write
from engine.jobs.tables import table
from engine.outputs import check_writable

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
#: Bytes of an fp32 momentum's passes, by element: measured and packed (benchmarks.compression: "both"), and unpacked.
PASSES = (2 * 4 + 12 + 1 / 8) + (4 + 1 / 8)
#: Of a chunk that a rank serves: its error is read and written; signs of all ranks are read once.
SERVE = 8 + 1 / 8
SCALE = 4


@dataclass(frozen=True)
class Constants:
    """What the model is given. Units are in the names; the metadata say where a value is from.

    elements: of the model. element_bytes: of a gradient that is averaged. hidden_ms: of the full exchange, what runs
    behind the backward pass. node: GPUs of a node. gbps: what a node sends in a ring, 10^9 bits a second; many_gbps:
    what it sends in an all-to-all, in which many connections are open. node_gbs: a GPU's all-reduce bandwidth inside of
    a node, 10^9 bytes a second. hop_us, local_us: of a message to another node, and inside of one. message_us: what
    each further message of an all-to-all costs. pass_gbs: bandwidth of the passes over a momentum. warmup: share of the
    steps with full gradients.
    """

    elements: float = 110e6
    compute_ms: float = 267.3
    element_bytes: float = 2.0
    hidden_ms: float = 0.0
    node: int = 8
    gbps: float = 100.0
    many_gbps: float = 0.0
    node_gbs: float = 200.0
    hop_us: float = 20.0
    local_us: float = 5.0
    message_us: float = 1.0
    pass_gbs: float = 2000.0
    warmup: float = 0.15


#: Where a default is from. "assumed": nothing was measured, give the value of your machines.
SOURCES = {
    "elements": "BERT-base",
    "compute_ms": "measured: RESULTS, layer drop's cost, BERT-base, 1,024 sequences on an H100",
    "element_bytes": "fp16",
}
#: 40-gigabit Ethernet with 4.1 effective, 4 V100s a node, BERT-Large (arXiv 2102.02888, and its announcement).
PUBLISHED = Constants(elements=340e6, compute_ms=0.0, node=4, gbps=4.1, pass_gbs=700.0, node_gbs=100.0)
PUBLISHED_GPUS, PUBLISHED_STAGE, PUBLISHED_RUN = 256, 6.6, 3.3
#: Ranks on a CPU, one a node, whose passes are part of their arithmetic.
MEASURED = Constants(elements=108.9e6, node=1, hop_us=0.0, message_us=0.0, pass_gbs=1e9)
#: Of the bytes on a wire, the share that is data: TCP's, in frames of 1,514 bytes.
DATA_SHARE = 1448 / 1514


@dataclass(frozen=True)
class Series:
    """Steps that ``benchmarks.slow_network`` measured (RESULTS, "Over a slow network" and "Where it does not pay"):
    seconds by Gbit/s."""

    machine: str
    optimizer: str
    ranks: int
    signs: bool
    seconds: Mapping[float, float]


SERIES = (
    Series("AMD", "LAMB", 2, False, {1: 4.10, 0.1: 21.7}),
    Series("AMD", "LAMB", 4, False, {1: 8.95, 0.1: 31.2}),
    Series("AMD", "1-bit LAMB", 2, True, {1: 2.62, 0.1: 3.89}),
    Series("AMD", "1-bit LAMB", 4, True, {1: 5.33, 0.1: 6.22}),
    Series("AMD", "1-bit Adam", 2, True, {1: 2.08, 0.1: 3.32}),
    Series("Intel", "AdamW", 2, False, {10: 0.80, 1: 2.47, 0.1: 20.7}),
    Series("Intel", "LAMB", 2, False, {10: 1.67, 1: 3.53, 0.1: 21.5}),
    Series("Intel", "LAMB", 4, False, {10: 4.62, 1: 8.92}),
    Series("Intel", "1-bit LAMB", 2, True, {10: 3.17, 1: 4.06, 0.1: 3.31}),
    Series("Intel", "1-bit Adam", 4, True, {10: 6.82, 1: 6.76, 0.1: 7.04}),
    Series("Intel", "0/1 Adam", 2, True, {10: 4.38, 1: 4.60, 0.1: 4.38}),
    Series("Intel", "0/1 Adam", 4, True, {10: 8.00, 1: 9.20, 0.1: 8.63}),
)


@dataclass(frozen=True)
class Step:
    """Milliseconds of a step with each exchange, compute included, on ``gpus``."""

    gpus: int
    ring: float
    by_node: float
    signs: float
    run: float

    @property
    def full(self) -> float:
        """The better of the full exchanges."""
        return min(self.ring, self.by_node)

    @property
    def stage_times(self) -> float:
        """How many times faster a step with signs is."""
        return self.full / self.signs

    @property
    def run_times(self) -> float:
        """How many times faster a whole run is, whose warm-up exchanges full gradients."""
        return self.full / self.run


def hops_ms(c: Constants, gpus: int) -> float:
    """A message once around a ring through all GPUs, node by node."""
    nodes = -(-gpus // c.node)
    return ((nodes - 1) * c.hop_us + (gpus - nodes) * c.local_us) / 1e3


def wire_ms(size: float, gbps: float) -> float:
    """``size`` bytes at a rate of 10^9 bits a second."""
    return 8 * size / gbps / 1e6


def ring_ms(c: Constants, gpus: int) -> float:
    """An all-reduce in one ring: 2 (W - 1) / W of the bytes through each link, and 2 (W - 1) hops."""
    size = 2 * (gpus - 1) / gpus * c.elements * c.element_bytes
    outside = wire_ms(size, c.gbps) if gpus > c.node else 0.0
    return max(outside, size / c.node_gbs / 1e6) + 2 * hops_ms(c, gpus)


def by_node_ms(c: Constants, gpus: int) -> float:
    """An all-reduce inside of nodes around one between them, in which the GPUs of a node share its link."""
    here, nodes, size = min(c.node, gpus), -(-gpus // c.node), c.elements * c.element_bytes
    inside = 2 * (here - 1) / here * size / c.node_gbs / 1e6 + 2 * (here - 1) * c.local_us / 1e3
    return inside + wire_ms(2 * (nodes - 1) / nodes * size, c.gbps) + 2 * (nodes - 1) * c.hop_us / 1e3


def all_to_all_bytes(c: Constants, gpus: int) -> float:
    """Signs that a node sends to others in the first phase: each of its GPUs has a part for each GPU elsewhere."""
    here = min(c.node, gpus)
    return here * c.elements / 8 * (gpus - here) / gpus


def signs_ms(c: Constants, gpus: int) -> float:
    """The three exchanges of ``ops.compression`` and its passes over the momentum: scales around a ring, signs from all
    to all, and the served signs around a ring."""
    here = min(c.node, gpus)
    passes = c.elements * (PASSES + SERVE / gpus) / c.pass_gbs / 1e6
    first = wire_ms(all_to_all_bytes(c, gpus), c.many_gbps or c.gbps) + here * (gpus - here) * c.message_us / 1e3
    served = (gpus - 1) / gpus * c.elements / 8 + (gpus - 1) * SCALE
    second = wire_ms(served, c.gbps) if gpus > c.node else 0.0
    local = 2 * (here - 1) / here * c.elements / 8 / c.node_gbs / 1e6
    return passes + first + max(second, local) + 2 * hops_ms(c, gpus)


def step(c: Constants, gpus: int) -> Step:
    """All of it. A mean of full gradients may run behind the backward pass in part, ``hidden_ms``; signs do not."""
    ring, by_node = (c.compute_ms + max(exchange(c, gpus) - c.hidden_ms, 0.0) for exchange in (ring_ms, by_node_ms))
    signs = c.compute_ms + signs_ms(c, gpus)
    return Step(gpus, ring, by_node, signs, c.warmup * min(ring, by_node) + (1 - c.warmup) * signs)


def steps_table(steps: Sequence[Step]) -> str:
    """Milliseconds, and how many times less."""
    headers = ["GPUs", "ring", "by node", "signs", "x a step", "x a run"]
    rows = []
    for one in steps:
        times = [f"{ms:.4g}" for ms in (one.ring, one.by_node, one.signs)]
        rows.append([str(one.gpus), *times, f"{one.stage_times:.2f}", f"{one.run_times:.2f}"])
    return table(headers, rows, texts=[])


def constants_table(c: Constants, given: Sequence[str]) -> str:
    """Every constant, and where it is from."""
    rows = []
    for field in fields(c):
        value = getattr(c, field.name)
        source = "given" if field.name in given else SOURCES.get(field.name, "assumed: give your own")
        if field.name == "many_gbps" and not value:
            value, source = c.gbps, "as gbps"
        rows.append([field.name, f"{value:g}", source])
    return table(["constant", "value", "from"], rows, texts=[0, 2])


def published() -> str:
    """The model beside the published figures, for several times of the compute, which is not published with them."""
    rows = []
    for many in (4.1, 10.0, 20.0):
        for compute in (0.0, 100.0, 200.0):
            c = Constants(**{**asdict(PUBLISHED), "compute_ms": compute, "many_gbps": many})
            found = step(c, PUBLISHED_GPUS)
            rows.append(
                [f"{many:g}", f"{compute:g}", f"{found.full:.4g}", f"{found.signs:.4g}", f"{found.stage_times:.2f}"]
            )
    for share in (0.15, 0.2):
        run = 1 / (share + (1 - share) / PUBLISHED_STAGE)
        rows.append([f"a run of which {share:.0%} is warm-up", "", "", "", f"{run:.2f}"])
    headers = ["Gb/s, all-to-all", "compute ms", "full ms", "signs ms", "x"]
    return (
        f"BERT-Large on {PUBLISHED_GPUS} V100s, 4.1 Gb/s a node: published are {PUBLISHED_STAGE:g} a step, "
        f"{PUBLISHED_RUN:g} a run\n{table(headers, rows, texts=[0])}"
    )


def measured() -> str:
    """The model beside steps over a shaped network: of each series the fastest rate gives the arithmetic, the others
    are foretold."""
    rows = []
    for series in SERIES:
        fitted, *others = sorted(series.seconds, reverse=True)
        arithmetic = 1e3 * series.seconds[fitted] - _exchange_ms(series, fitted)
        for rate in others:
            found, seconds = (arithmetic + _exchange_ms(series, rate)) / 1e3, series.seconds[rate]
            named = [series.machine, series.optimizer, str(series.ranks), f"{fitted:g}", f"{rate:g}"]
            rows.append([*named, f"{seconds:.3g}", f"{found:.3g}", f"{found / seconds - 1:+.0%}"])
    headers = ["CPU", "optimizer", "ranks", "from", "at Gb/s", "measured s", "model s", "off"]
    return table(headers, rows, texts=[0, 1])


def _exchange_ms(series: Series, rate: float) -> float:
    """Of a step of the series, at 10^9 bits a second."""
    c = replace(MEASURED, compute_ms=0.0, gbps=rate * DATA_SHARE)
    return signs_ms(c, series.ranks) if series.signs else ring_ms(c, series.ranks)


def numbers(text: str) -> tuple[float, ...]:
    """Positive numbers, separated by commas."""
    try:
        found = tuple(float(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) <= 0:
        raise argparse.ArgumentTypeError(f'got "{text}", wanted positive numbers, separated by commas')
    return found


def number(least: float, most: float = float("inf")) -> Callable[[str], float]:
    """A reader of numbers from ``least`` to ``most``."""

    def read(text: str) -> float:
        try:
            found = float(text)
        except ValueError:
            found = float("nan")
        if not least <= found <= most:
            upper = "" if most == float("inf") else f" up to {most:g}"
            raise argparse.ArgumentTypeError(f'got "{text}", wanted a number from {least:g}{upper}')
        return found

    return read


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--published", action="store_true", help="the model beside published figures")
    parser.add_argument("--measured", action="store_true", help="the model beside steps over a shaped network")
    parser.add_argument("--gpus", metavar="N,N", type=numbers, default=GPUS, help="(8 to 4096)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write constants and steps to this file")
    readers = {"warmup": number(0, 1), "node": number(1), "elements": number(1), "pass_gbs": number(1e-3)}
    for field in fields(Constants):
        name = f"--{field.name.replace('_', '-')}"
        reader = numbers if field.name == "gbps" else readers.get(field.name, number(0))
        parser.add_argument(name, metavar="X", type=reader, help=f"({field.default:g})")
    return parser


def main() -> int:
    """The command."""
    parser = _parser()
    chosen = parser.parse_args()
    if chosen.published or chosen.measured:
        print(published() if chosen.published else measured())
        return 0
    if chosen.json is not None:
        check_writable(chosen.json, "--json ")
    given = {field.name: value for field in fields(Constants) if (value := getattr(chosen, field.name)) is not None}
    cases = []
    for rate in given.pop("gbps", (Constants.gbps,)):
        c = Constants(**{**given, "gbps": rate, "node": int(given.get("node", Constants.node))})
        steps = [step(c, int(gpus)) for gpus in chosen.gpus]
        cases.append({"constants": asdict(c), "steps": [asdict(one) for one in steps]})
        names = [*given, *(["gbps"] if chosen.gbps else [])]
        print(f"{constants_table(c, names)}\n\nms of a step at {rate:g} Gb/s a node\n{steps_table(steps)}\n")
    if chosen.json is not None:
        write(chosen.json, json.dumps(cases, indent=1).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
