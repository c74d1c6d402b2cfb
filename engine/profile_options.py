"""The options of ``slipstream profile``, read from the command line. Imports nothing heavy."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.bench.options import count

#: What is profiled where neither a job nor an option says it: sequences, tokens of each, tokens to generate.
BATCH, TOKENS, NEW = 1, 128, 16

EXAMPLES = """\
examples:
  slipstream profile my.json
  slipstream profile my.json --html profile.html --json profile.json
  slipstream profile my.json --set kernels=eager --trace profile.trace.json
  slipstream profile my.json --batch 8 --tokens 256
  slipstream profile --diff before.json after.json

What a step costs (FLOPs, bytes, memory, time), part by part, and how far from
this device's limits it runs. With a section "training": optimizer steps on the
section "data"; nothing is saved. Without one: the texts of the job, or
sequences of any tokens (--batch, --tokens). The table goes where the
section "flops_profiler" says, to the terminal without one. An open profile.html
needs no network; Perfetto (ui.perfetto.dev) shows a trace; --diff says what
changed between two profiles that --json has written.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options; ``--set`` is there already."""
    parser.add_argument("config", metavar="CONFIG", nargs="?", help="a JSON file")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the profile as data")
    parser.add_argument("--html", metavar="FILE", type=Path, help="write a page: roofline, map of modules, tables")
    parser.add_argument("--trace", metavar="FILE", type=Path, help="write a timeline of a step")
    parser.add_argument(
        "--diff", metavar=("BEFORE", "AFTER"), nargs=2, type=Path, help="compare two profiles; takes no CONFIG"
    )
    parser.add_argument("--batch", metavar="N", type=count, help=f"sequences in place of the job's texts ({BATCH})")
    parser.add_argument("--tokens", metavar="N", type=count, help=f"tokens of each ({TOKENS})")
    parser.add_argument("--new", metavar="N", type=count, help=f"tokens to generate (the config's, or {NEW})")
