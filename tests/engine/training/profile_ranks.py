"""What each process does in test_profile_step.py, under torchrun: ``HOME``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from engine import Engine, profiling
from tests.engine.training.trained import bert, config, masked
from tests.profiler.reports import LIMITS


def main() -> None:
    """Trains copies of a model with a profile of step 2; writes the losses."""
    home = Path(sys.argv[1])
    profiling.ceilings = lambda device: LIMITS  # measuring would take seconds
    section = {"enabled": True, "output_file": str(home / "profile.json"), "formats": ["json"]}
    engine = Engine(
        config(training={"max_steps": 12, "data_parallel": "replicate"}, flops_profiler=section),
        model=bert(dropout=0.0),
    )
    losses = [engine.train_batch(masked(4, seed)).loss for seed in range(12)]
    (home / f"losses{engine._trainer.ranks.rank}.json").write_text(json.dumps(losses), encoding="utf-8")


if __name__ == "__main__":
    main()
