"""Write the JSON Schema that is checked in, or say with --check whether it is current."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from config_schema.schema_file import SCHEMA_PATH, generated_text


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 0, or 1 where ``--check`` finds the file missing or stale."""
    parser = argparse.ArgumentParser(prog="python -m config_schema.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit with 1 where the file is not current; write nothing")
    parser.add_argument("--output", type=Path, default=SCHEMA_PATH, help="the file (default: %(default)s)")
    options = parser.parse_args(arguments)
    text = generated_text()
    if options.check:
        current = options.output.is_file() and options.output.read_text(encoding="utf-8") == text
        if not current:
            print(f"{options.output} is stale; run python -m config_schema.generate", file=sys.stderr)
        return 0 if current else 1
    _write(options.output, text)
    return 0


def _write(path: Path, text: str) -> None:
    """Write aside and rename, so that no reader ever sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        os.unlink(aside)
        raise


if __name__ == "__main__":
    sys.exit(main())
