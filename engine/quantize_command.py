"""The command ``slipstream quantize``. Imports nothing heavy before it runs."""

from __future__ import annotations

import argparse

from config_schema import load_config

EXAMPLES = """\
examples:
  slipstream quantize my.json --output models/small-int4 --set precision=int4

Writes the model with weights of 8 or 4 bits, as "precision" and the section
"quantization" say. The directory then loads as any checkpoint does.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Adds the options; ``--set`` comes from the command line's own."""
    parser.add_argument("config", metavar="CONFIG", help="a JSON file")
    parser.add_argument("--output", metavar="DIR", required=True, help="directory of the quantized model")


def run(options: argparse.Namespace) -> int:
    """Reads, quantizes and writes, tensor by tensor. Always 0: what goes wrong is raised."""
    config = load_config(options.config, overrides=options.set)
    from engine import build, quantization
    from engine.inference.text import Text

    plan = build.plan(config)
    tokenizer = Text(plan.directory, plan.gguf_file).tokenizer if plan.gguf_file is not None else None
    quantization.save(plan, options.output, tokenizer)
    print(f"{options.output}: {quantization.summary(plan, options.output)}")
    return 0
