"""The command ``slipstream import-config``: reads a file of DeepSpeed's, writes ours, says what became of each key."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from engine.errors import EngineError
from engine.import_config import import_config

EXAMPLES = """\
examples:
  slipstream import-config ds_config.json
  slipstream import-config ds_config.json -o my.json
  slipstream import-config ds_config.json --model DIR > my.json

Reads the JSON of deepspeed.initialize and of deepspeed.init_inference, and says
of every key what becomes of it. Without -o, that goes to stderr.
"""


def add(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("config", metavar="DS_CONFIG", help="a JSON file of DeepSpeed")
    parser.add_argument("-o", "--output", metavar="FILE", help="write the config there (default: to stdout)")
    parser.add_argument("--model", metavar="DIR", help="$.model.path, which DeepSpeed's file does not have")


def run(options: argparse.Namespace) -> int:
    """Does it. Raises where the output is there already: a file that someone has filled in is not written over."""
    if options.output is not None and os.path.lexists(options.output):
        raise EngineError(f"{options.output}: is there already: remove it, or give another name")
    found = import_config(options.config, options.model)
    if options.output is None:
        sys.stdout.write(found.to_json())
        print(found.report(), file=sys.stderr)
    else:
        _write(Path(options.output), found.to_json())
        print(found.report())
    return 0


def _write(path: Path, text: str) -> None:
    """Aside, then renamed."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as aside:
            (Path(aside) / path.name).write_text(text, encoding="utf-8")
            os.replace(Path(aside) / path.name, path)
    except OSError as error:
        raise EngineError(f"{path}: cannot be written: {error.strerror or error}") from None
