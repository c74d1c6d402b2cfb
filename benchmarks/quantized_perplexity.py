"""Perplexity of a causal LM in several precisions over the same text, in windows that do not overlap.

Each window of ``--window`` tokens is read by itself; every token but its first is predicted. The mean is over all of
them, in fp64 from fp32 log-probabilities.

    python -m benchmarks.quantized_perplexity build/models/SmolLM2-135M-Instruct wikitext2_test.txt.gz
    python -m benchmarks.quantized_perplexity MODEL TEXT --precisions fp32 int4:32 int4:64 int4:128
"""

from __future__ import annotations

import gzip
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.measure import parser, report
from engine import Engine
from engine.build import DTYPES
from engine.quantization import BITS


def read(path: Path) -> str:
    """A text, gzipped or not."""
    return gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text("utf-8")


def windows(ids: Sequence[int], length: int, limit: int | None = None) -> list[list[int]]:
    """Whole windows of ``length`` tokens, the first ``limit`` of them."""
    starts = range(0, len(ids) - length + 1, length)
    return [list(ids[start : start + length]) for start in starts][:limit]


def log_perplexity(engine: Engine, rows: Sequence[Sequence[int]]) -> float:
    """Mean negative log-likelihood of a predicted token, in nats."""
    total, count = 0.0, 0
    for row in tqdm(rows, desc="windows", disable=None, leave=False):
        logits = engine([list(row)]).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits, torch.tensor(row[1:], device=logits.device), reduction="none"
        )
        total, count = total + float(losses.double().sum()), count + len(losses)
    return total / count


def document(model: str, how: str, **sections: Any) -> dict[str, Any]:
    """A config from "fp32", "int8", "int4:32" (a group size) or "int8:row"."""
    precision, _, group = how.partition(":")
    if precision not in (*DTYPES, *BITS):
        raise SystemExit(f"--precisions {how}: wanted one of {', '.join((*DTYPES, *BITS))}, perhaps :32 (a group size)")
    section = {"group_size": None if group == "row" else int(group)} if group else {}
    quantization = {"quantization": section} if precision in BITS else {}
    return {"model": {"path": model}, "precision": precision, **quantization, **sections}


def main() -> None:
    """Measures and prints."""
    arguments = parser("perplexity by precision")
    arguments.add_argument("model", help="directory of a causal LM")
    arguments.add_argument("text", type=Path, help="a text file, or a gzipped one")
    arguments.add_argument("--window", type=int, default=1024, help="tokens of a window")
    arguments.add_argument("--windows", type=int, help="read only so many windows")
    arguments.add_argument("--precisions", nargs="+", default=["fp32", "int8", "int4"], help="the first is the base")
    options = arguments.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows, losses = [], []
    for how in options.precisions:
        engine = Engine(document(options.model, how))
        ids = engine.text.tokenizer(read(options.text))["input_ids"]
        found = windows(ids, options.window, options.windows)
        if not found:
            raise SystemExit(f"{options.text}: {len(ids)} tokens do not fill a window of {options.window}")
        losses.append(log_perplexity(engine, found))
        rise = math.exp(losses[-1] - losses[0]) - 1
        activations = str(engine.plan.dtype).removeprefix("torch.")
        rows.append(
            {"": how, "activations": activations, "perplexity": math.exp(losses[-1]), "above the first, %": 100 * rise}
        )
    report(f"perplexity, {len(found)} windows of {options.window}, {options.model}", rows, options.json)


if __name__ == "__main__":
    main()
