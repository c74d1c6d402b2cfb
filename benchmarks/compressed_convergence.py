"""Masked-LM pre-training with optimizers that exchange signs, beside those they stand in for, on one GPU.

    python -m benchmarks.compressed_convergence --prepare text.txt.gz --vocab vocab.txt --data build/corpus.safetensors
    python -m benchmarks.compressed_convergence --data build/corpus.safetensors --arm onebit_lamb --probe 15
    python -m benchmarks.compressed_convergence --data build/corpus.safetensors --arm onebit_lamb --lr 2e-3 --seed 1 \\
        --steps 1500 --out runs/ranks
    python -m benchmarks.compressed_convergence --plot runs/ranks --png curves.png

Arms: lamb and onebit_lamb; adamw, onebit_adam and zero_one_adam. A step's batch is cut in --ranks parts. The first of
each line take the mean of the parts' gradients. In the others each part has a model and an optimizer of its own, which
exchange through ops.compression.SimulatedCollective: the bits are those of as many processes. All else is alike: sizes,
batches, masks and dropout (by seed), weight decay 0.01, clipping to 1, warm-up of the rate, then a straight line to 0.
The variance stands behind --freeze of the steps, which should lie where the loss falls: on the plateau before, some
weights have next to no gradient, and signs move all alike. Signs have a scale for each parameter (those of 1-bit LAMB,
which brings momenta to one size, one for all); --one-scale shows why: a key's bias, whose gradient is nothing but
rounding, then takes steps of its neighbours' size. --exact takes full means in their place, and shows what the freeze
does by itself. 0/1 Adam has DeepSpeed's intervals for BERT, scaled to the length of the run. At every evaluation the
weights of all ranks must be the same to the last bit, or the run ends.

One document of 50 is held out. Give each arm three --seed, and the baseline and its arm the same --lr: --plot takes the
difference of their last losses, and the baseline's deviation between seeds. Larger batches: --batch and --steps.

A run is a process, NAME.json (and, done, the model NAME/) its result; start several on one GPU. One that --seconds cuts
leaves a checkpoint in NAME.checkpoints/: the same command goes on from there.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import Literal

from benchmarks.convergence_command import add_sizes, execute, parser_of, prepare, run_arm
from benchmarks.convergence_ranks import ARMS, RanksRun, RanksTraining
from benchmarks.masked_lm import Shape
from engine.bench import options
from engine.outputs import check_writable


def share_or_auto(text: str) -> float | Literal["auto"]:
    """A share from 0 to 1, or ``auto``."""
    if text == "auto":
        return "auto"
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not 0 < found <= 1:
        raise argparse.ArgumentTypeError(f'got "{text}", wanted a share of the steps, above 0 and up to 1, or auto')
    return found


def train(chosen: argparse.Namespace) -> None:
    """``--arm``."""
    names = ("ranks", "norm", "freeze", "clip", "eps", "one_scale", "exact", "var_update_scaler")
    run_arm(chosen, partial(RanksRun, **{name: getattr(chosen, name) for name in names}), RanksTraining)


def plot(chosen: argparse.Namespace) -> None:
    """``--plot``: the tables, and with ``--png`` the picture."""
    from benchmarks import convergence_compare

    if chosen.png is not None:
        check_writable(chosen.png, "--png ")
    print(convergence_compare.summary(chosen.plot))
    if chosen.png is not None:
        convergence_compare.draw(convergence_compare.read(chosen.plot), chosen.png)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, ARMS, "runs/ranks", batch=256, evaluations=25)
    ranks = parser.add_argument_group("ranks and optimizers")
    ranks.add_argument("--ranks", metavar="N", type=options.count, default=4, help="that share a batch (4)")
    ranks.add_argument("--norm", choices=["preln", "postln"], default="preln", help="of the model (preln)")
    ranks.add_argument(
        "--freeze", metavar="SHARE", type=share_or_auto, default=0.2, help="of the steps before signs, or auto (0.2)"
    )
    ranks.add_argument("--clip", metavar="NORM", type=float, default=1.0, help="of the gradient, 0 for none (1)")
    ranks.add_argument(
        "--one-scale",
        action="store_true",
        help="for the signs of all parameters that are exchanged together, whatever the optimizer has",
    )
    ranks.add_argument("--exact", action="store_true", help="full means in place of signs: what the freeze alone does")
    ranks.add_argument(
        "--var-update-scaler",
        metavar="N",
        type=options.count,
        default=16,
        help="of 0/1 Adam: its variance moves at every step N times, at every second N times, and so on (16)",
    )
    ranks.add_argument("--eps", type=float, default=1e-8, help="of the optimizers (1e-8)")
    add_sizes(parser, Shape(6, 512, 8, dropout=0.0))
    return parser


def main() -> int:
    """Does what the first option says."""
    return execute(_parser(), {"prepare": prepare, "arm": train, "plot": plot})


if __name__ == "__main__":
    sys.exit(main())
