"""Decoding on a CPU beside Hugging Face: milliseconds a token at batch 1, same process, all precisions in turn.

(t(n + 1 new tokens) - t(1 new token)) / n, greedy, after a prompt of 128 random tokens; medians over rounds.

    python -m benchmarks.cpu_decode build/models/SmolLM2-135M-Instruct
    python -m benchmarks.cpu_decode build/models/SmolLM2-135M-Instruct --precisions fp32 int8 int4
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.measure import interleaved, parser, report, spread
from engine import Engine
from engine.build import DTYPES
from engine.quantization import BITS

CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def per_token(generate: Callable[[int], object], new: int, clock: Callable[[], float]) -> float:
    """Milliseconds a token."""

    def seconds(count: int) -> float:
        start = clock()
        generate(count)
        return clock() - start

    return (seconds(new + 1) - seconds(1)) / new * 1e3


def main() -> None:
    """Measures and prints."""
    from transformers import AutoModelForCausalLM

    arguments = parser("decode on a CPU, beside Hugging Face")
    arguments.add_argument("model", help="directory of a causal LM")
    arguments.add_argument("--new", type=int, default=64, help="tokens to time")
    arguments.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    arguments.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=[*DTYPES, *BITS])
    arguments.add_argument(
        "--clock",
        choices=list(CLOCKS),
        default="wall",
        help="process: CPU time, of use on a busy machine with --threads 1",
    )
    options = arguments.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    runs: dict[str, Callable[[], float]] = {}
    for precision in options.precisions:
        engine = Engine.from_pretrained(options.model, precision=precision, device="cpu")
        ids = torch.randint(engine.spec.vocab_size, (1, options.prompt), generator=torch.Generator().manual_seed(0))

        def ours(count: int, engine: Engine = engine, row: torch.Tensor = ids[0]) -> None:
            engine.generate(row, max_new_tokens=count, do_sample=False, ignore_eos=True)

        runs[f"slipstream {precision}"] = lambda f=ours: per_token(f, options.new, CLOCKS[options.clock])  # type: ignore[misc]
        if precision not in DTYPES:
            continue
        model = AutoModelForCausalLM.from_pretrained(options.model).to(DTYPES[precision]).eval()

        def theirs(count: int, model: torch.nn.Module = model, ids: torch.Tensor = ids) -> None:
            with torch.inference_mode():
                mask = torch.ones_like(ids)
                model.generate(ids, attention_mask=mask, min_new_tokens=count, max_new_tokens=count, do_sample=False)

        runs[f"Hugging Face {precision}"] = lambda f=theirs: per_token(f, options.new, CLOCKS[options.clock])  # type: ignore[misc]
    found = interleaved(runs, options.rounds)
    rows = []
    for name, values in found.items():
        median = statistics.median(values)
        same = f"Hugging Face {name.rpartition(' ')[2]}"
        base = statistics.median(found[same]) if same in found else None
        times = {"x Hugging Face": base and base / median, "tokens/s": 1e3 / median}
        rows.append({"": name, "ms a token": spread(values), **times})
    report(f"decode, batch 1, {options.model}", rows, options.json, prompt=options.prompt, new=options.new)


if __name__ == "__main__":
    main()
