"""The options of ``slipstream bench``, read from the command line. Imports nothing heavy."""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from engine.bench.job import KERNELS, PEERS

EXAMPLES = """\
examples:
  slipstream bench my.json
  slipstream bench my.json --against hf,inductor --batch 1,8 --chart bench.png
  slipstream bench my.json --kernels specialized,generic --json bench.json
  slipstream bench my.json --first-token --prompt 2048 --batch 1
  slipstream bench my.json --random-weights --against none

A decoder: time of one more token behind a prompt, all sequences of the batch
together (--first-token: of the prompt and its first token). An encoder: time of
one pass, ids in, hidden states out. Beside each stands the floor: the bytes it
must read (weights, cache) at the bandwidth measured here, or its arithmetic at
the rate measured here, whichever is longer.

Every kernel set and every peer runs in a process of its own, one after the
other. One that is not installed or fails gets a line that says so.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options; CONFIG and ``--set`` are there already."""
    parser.add_argument(
        "--against",
        metavar="PEERS",
        type=names(PEERS, "peer"),
        default=("hf",),
        help=f"some of {','.join(PEERS)}, or none (hf)",
    )
    parser.add_argument(
        "--kernels",
        metavar="SETS",
        type=names(KERNELS, "kernel set"),
        default=(),
        help=f"some of {','.join(KERNELS)} (the config's)",
    )
    measures(parser)
    parser.add_argument(
        "--random-weights", action="store_true", help="draw weights at random; needs only the model's config.json"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write every row with all its facts to this file")
    parser.add_argument("--chart", metavar="FILE", type=Path, help="draw the rows in this PNG file (needs matplotlib)")


def measures(parser: argparse.ArgumentParser) -> None:
    """Adds what ``slipstream bench`` and ``benchmarks.models`` have in common."""
    parser.add_argument(
        "--batch", metavar="N,N", type=counts, default=(1, 4, 8, 16), help="sequences at a time (1,4,8,16)"
    )
    parser.add_argument("--prompt", metavar="N", type=count, default=128, help="tokens of a prompt (128)")
    parser.add_argument("--new", metavar="N", type=count, default=64, help="tokens to time behind it (64)")
    parser.add_argument(
        "--first-token", action="store_true", help="time the first token behind the prompt (prefill) instead of those"
    )
    parser.add_argument(
        "--tokens", metavar="N,N", type=counts, default=(), help="lengths of an encoder's sequences (128,384)"
    )
    parser.add_argument(
        "--rounds", metavar="N", type=count, default=5, help="rounds to measure (5); passes take four times as many"
    )
    parser.add_argument("--no-gpu-time", action="store_true", help="wall time alone: do not sum up the kernels' times")
    parser.add_argument(
        "--timeout", metavar="S", type=count, default=600, help="stop a run that is silent for so many seconds (600)"
    )
    parser.add_argument(
        "--python",
        metavar="PEER=EXE",
        type=interpreter,
        action="append",
        default=[],
        help="Python of the environment that a peer is installed in",
    )


def names(known: Iterable[str], what: str) -> Callable[[str], tuple[str, ...]]:
    """A reader of ``a,b`` where all are ``known``; ``none`` is an empty list."""
    allowed = tuple(known)

    def read(text: str) -> tuple[str, ...]:
        found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
        if found == ("none",):
            return ()
        for name in found:
            if name not in allowed:
                raise argparse.ArgumentTypeError(f'unknown {what} "{name}" (there are {", ".join(allowed)})')
        if not found:
            raise argparse.ArgumentTypeError(f"no {what} given (there are {', '.join(allowed)}; none for none)")
        return found

    return read


def count(text: str) -> int:
    """A whole number from 1."""
    try:
        found = int(text)
    except ValueError:
        found = 0
    if found < 1:
        raise argparse.ArgumentTypeError(f'got "{text}", wanted a whole number from 1')
    return found


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers from 1, separated by commas, each once."""
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def interpreter(text: str) -> tuple[str, str]:
    """``PEER=EXE``: a known peer and a program that can be run."""
    name, _, program = text.partition("=")
    if name not in PEERS or not program:
        raise argparse.ArgumentTypeError(f'got "{text}", wanted {"|".join(PEERS)}=PROGRAM')
    found = shutil.which(os.path.expanduser(program))
    if found is None:
        raise argparse.ArgumentTypeError(f"{program}: no such program")
    return name, os.path.abspath(found)
