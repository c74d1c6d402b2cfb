"""Runs a program as ranks on hosts of their own, joined by links of a given rate; needs root.

    python -m benchmarks.slow_network --hosts 2 --rate 100mbit,1gbit -- python train.py
    python -m benchmarks.slow_network --measure all-reduce --elements 110e6 --dtype fp16
    python -m benchmarks.slow_network --clean        # removes what a killed run left; each run does so too

Each rank has what torchrun sets: RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Its lines are printed behind
its rank. Where one fails, all are ended. A step's expected time is that of 2 (W - 1) / W of the tensor's bytes, in
frames of 1,514 bytes of which 1,448 are data.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Thread
from typing import Any

from benchmarks.netns import INTERFACE, Network, NetworkError, bits_per_second, clean
from config_schema import SlipstreamError

SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}
FRAME, DATA = 1514, 1448
KEPT = 40


def run_ranks(network: Network, argv: Sequence[str], timeout: float) -> tuple[float, list[Any]]:
    """Runs ``argv`` on every host. Gives seconds, and for each rank what it wrote to the file SLOW_NETWORK_RESULT
    (JSON; None: nothing). Raises :class:`NetworkError` with the last lines of the rank that failed first."""
    size, tails, readers = len(network.names), [deque[str](maxlen=KEPT) for _ in network.names], []
    processes: list[subprocess.Popen[Any]] = []
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(size):
                given = {
                    "RANK": rank,
                    "LOCAL_RANK": 0,
                    "WORLD_SIZE": size,
                    "LOCAL_WORLD_SIZE": 1,
                    "MASTER_ADDR": network.addresses[0],
                    "MASTER_PORT": 29500,
                    "GLOO_SOCKET_IFNAME": INTERFACE,
                    "OMP_NUM_THREADS": max(1, (os.cpu_count() or 1) // size),
                    "PYTHONUNBUFFERED": 1,
                    "SLOW_NETWORK_RESULT": f"{folder}/{rank}",
                }
                env = {**os.environ, **{name: str(value) for name, value in given.items()}}
                pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE}
                process = network.start(rank, argv, env, **pipes, stderr=subprocess.STDOUT)
                processes.append(process)
                readers.append(Thread(target=_echo, args=(rank, process.stdout, tails[rank]), daemon=True))
                readers[-1].start()
            failed = _wait(processes, start + timeout)
        finally:
            _end(processes)
        for reader in readers:
            reader.join(2)
        if failed is not None:
            code = processes[failed].returncode
            raise NetworkError(f"rank {failed} failed (exit code {code}):\n{''.join(tails[failed]).rstrip()}")
        paths = [Path(folder, str(rank)) for rank in range(size)]
        return time.perf_counter() - start, [json.loads(p.read_text()) if p.exists() else None for p in paths]


def _wait(processes: Sequence[subprocess.Popen[Any]], deadline: float) -> int | None:
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if None not in codes:
            return None
        if time.perf_counter() > deadline:
            raise NetworkError("the ranks took longer than --timeout: give more, or look where they wait")
        time.sleep(0.01)


def _end(processes: Sequence[subprocess.Popen[Any]]) -> None:
    for process in processes:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _echo(rank: int, stream: Any, tail: deque[str]) -> None:
    for line in stream:
        text = line.decode(errors="replace")
        tail.append(text)
        print(f"[{rank}] {text}", end="", flush=True)


def expected_seconds(elements: int, dtype: str, hosts: int, rate: str) -> float:
    """Of one all-reduce, if the link were all that takes time."""
    return 2 * (hosts - 1) / hosts * elements * SIZES[dtype] * FRAME / DATA * 8 / bits_per_second(rate)


def measure_row(chosen: argparse.Namespace, rate: str, seconds: float, results: list[Any], row: dict[str, Any]) -> None:
    """Adds to ``row`` what the ranks measured: a step is over when the slowest rank's is."""
    steps = [max(each) for each in zip(*(one["seconds"] for one in results), strict=True)]
    row["step s"] = statistics.median(steps)
    if chosen.measure:
        row["ideal s"] = expected_seconds(chosen.elements, chosen.dtype, chosen.hosts, rate)
    row["step MB"] = max(statistics.median(one["sent"]) for one in results) / 1e6
    row["steps"] = results


def run(chosen: argparse.Namespace, command: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each rate."""
    rows = []
    for rate in chosen.rate.split(","):
        with Network(chosen.hosts, rate, chosen.delay) as network:
            seconds, results = run_ranks(network, command, chosen.timeout)
            counted = network.counters()
        sent, received = max(one.sent for one in counted), max(one.received for one in counted)
        row: dict[str, Any] = {"rate": rate, "s": seconds, "sent MB": sent / 1e6, "got MB": received / 1e6}
        row["Mbit/s"] = max(sent, received) * 8 / seconds / 1e6
        if all(results):
            measure_row(chosen, rate, seconds, results, row)
        rows.append({**row, "interfaces": [vars(one) for one in counted]})
    return rows


def main() -> int:
    """Runs, prints the table, writes the file."""
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="%(prog)s [options] [-- COMMAND]",
    )
    parser.add_argument("--hosts", type=int, default=2, help="ranks, one a host (2)")
    parser.add_argument("--rate", default="100mbit,1gbit,10gbit", help="of each link, both ways (100mbit,1gbit,10gbit)")
    parser.add_argument("--delay", help="one way, like 1ms; needs the kernel's netem")
    parser.add_argument("--measure", choices=["all-reduce"], help="in place of a command")
    parser.add_argument("--elements", type=lambda text: int(float(text)), help="(110e6)")
    parser.add_argument("--dtype", choices=SIZES, help="(fp16)")
    parser.add_argument("--rounds", type=int, help="of the measurement, after one to warm up (3)")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds a rate may take (3600)")
    parser.add_argument("--clean", action="store_true", help="remove what killed runs left, and do no more")
    parser.add_argument("--json", type=Path, help="write all that was counted to this file")
    chosen, command = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    if not chosen.clean and bool(command) == bool(chosen.measure):
        parser.error("give a command behind -- or --measure all-reduce, one of the two")
    for name, value in (("elements", 110_000_000), ("dtype", "fp16"), ("rounds", 3)):
        if command and getattr(chosen, name) is not None:
            parser.error(f"--{name} is of --measure, and a command is given: leave it out")
        setattr(chosen, name, getattr(chosen, name) or value)
    if chosen.measure:
        asked = ["--elements", str(chosen.elements), "--dtype", chosen.dtype, "--rounds", str(chosen.rounds)]
        command = [sys.executable, "-m", "benchmarks.network_steps", *asked]
    try:
        if chosen.clean:
            print("removed:", ", ".join(clean()) or "nothing was left")
            return 0
        [bits_per_second(rate) for rate in chosen.rate.split(",")]
        rows = run(chosen, command)
    except SlipstreamError as error:
        parser.exit(2, f"error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "stopped; nothing is left of the network\n")
    from benchmarks.measure import report  # imports torch

    title = f"{chosen.hosts} hosts: {' '.join(command)}; busiest interface"
    shown = [{key: value for key, value in row.items() if key not in ("interfaces", "steps")} for row in rows]
    report(title, shown, chosen.json, interfaces=[row["interfaces"] for row in rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
