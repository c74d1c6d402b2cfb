"""A process of test_cut_link.py: ``KIND STEPS OUTPUT...``, a run after the other; an output "-" is a loop of one's own.
Says when an error was raised, and which. Imports no transformers."""

from __future__ import annotations

import sys
import time

import torch
from torch import nn

from config_schema import SlipstreamError
from engine import Engine

#: Seconds of an exchange.
TIMEOUT = 4.0


def own_loop(engine: Engine, steps: int) -> None:
    """Says when the variance stands."""
    for step in range(steps):
        engine.train_batch({"input": torch.ones(2, 12)})
        if step == 8:
            print("signs", flush=True)


def main(kind: str, steps: int, *outputs: str) -> int:
    """Trains with a variance that stands from step 4 on."""
    generator = torch.Generator().manual_seed(1)
    rows = [{"input": torch.randn(12, generator=generator)} for _ in range(24)]
    for output in outputs:
        torch.manual_seed(5)
        model = nn.Sequential(nn.Linear(12, 40), nn.GELU(), nn.Linear(40, 3))
        training = {
            "micro_batch_size": 2, "max_steps": steps, "checkpoint_every": 5, "output": output,
            "exchange_timeout": TIMEOUT,
        }  # fmt: skip
        given = {"device": "cpu", "training": training, "optimizer": {"type": kind, "lr": 0.01, "freeze_step": 4}}
        engine = Engine(given, model=model, loss_function=lambda outputs, batch: outputs.square().mean())
        try:
            if output == "-":
                own_loop(engine, steps)
            else:
                engine.fit(rows)
        except SlipstreamError as error:
            print(f"{time.monotonic()} {error}", flush=True)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
