"""Masked-LM pre-training with progressive layer drop: how soon it gets where Post-LN BERT gets, and what it is worth.

    python -m benchmarks.layer_drop_convergence --prepare text.txt.gz --vocab vocab.txt --data build/corpus.safetensors
    python -m benchmarks.layer_drop_convergence --data build/corpus.safetensors --arm postln --lr 4e-4 --probe 30
    python -m benchmarks.layer_drop_convergence --data build/corpus.safetensors --arm postln --lr 4e-4 --seed 1 \\
        --batch 64 --steps 9000 --seconds 560 --out runs/pld
    python -m benchmarks.layer_drop_convergence --finetune sst2 mrpc --run runs/pld/NAME --out runs/pld
    python -m benchmarks.layer_drop_convergence --plot runs/pld --png curves.png

Arms: postln, Hugging Face's BERT as it is; preln, the same with norms in front of attention and FFN; preln_pld, that
with progressive layer drop, theta 0.5 and gamma 100 / steps; postln_pld, for the ablation. All else is alike: sizes,
batches, masks (by seed), AdamW (weight decay 0.01), clipping to 1, warm-up, then a straight line to 0. One document of
50 is held out; its loss is that of all layers. Give each arm a small sweep of --lr, and its best rate a second --seed:
--plot takes each arm's rate with the lowest final loss, and the first place where its curves reach postln's final loss.

A run is a process, NAME.json (and, done, the model NAME/) its result; start several with CUDA_VISIBLE_DEVICES, or on
one GPU, which --batch 64 fills by a half: seconds are then longer than alone. One that --seconds cuts leaves a
checkpoint in NAME.checkpoints/: the same command goes on from there. --probe with a small --steps times layer drop at
its theta.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from benchmarks.convergence_command import add_sizes, execute, parser_of, prepare, run_arm
from benchmarks.convergence_run import ARMS, Run, Training
from benchmarks.masked_lm import Shape
from benchmarks.steps import device_of, say
from config_schema import SlipstreamError
from engine.bench import options
from engine.outputs import check_writable


def train(chosen: argparse.Namespace) -> None:
    """``--arm``."""
    run_arm(chosen, partial(Run, compiled=chosen.compile, theta=chosen.theta), Training)


def finetune(chosen: argparse.Namespace) -> None:
    """``--finetune``: each task in turn."""
    from benchmarks import convergence_tune

    if chosen.run is None:
        raise SlipstreamError("--finetune needs --run, the directory that a run wrote when it was done")
    chosen.out.mkdir(parents=True, exist_ok=True)
    for task in chosen.finetune:
        tuning = convergence_tune.Tuning(
            run=chosen.run.name,
            task=task.resolve().name,
            lr=chosen.tune_lr,
            epochs=chosen.epochs,
            batch=chosen.tune_batch,
            seeds=tuple(chosen.tune_seeds),
            precision=chosen.precision,
        )
        convergence_tune.finetune(chosen.run, task, tuning, chosen.out, device_of(chosen.device), say)


def plot(chosen: argparse.Namespace) -> None:
    """``--plot``: the tables, and with ``--png`` the picture."""
    from benchmarks import convergence_plot

    if chosen.png is not None:
        check_writable(chosen.png, "--png ")
    print(convergence_plot.summary(chosen.plot))
    if chosen.png is not None:
        convergence_plot.draw(convergence_plot.read(chosen.plot)[0], chosen.png)


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, ARMS, "runs/layer_drop", batch=256, evaluations=40)
    parser.add_argument("--theta", type=float, default=0.5, help="of layer drop (0.5)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the training step")
    add_sizes(parser, Shape())
    tune = parser.add_argument_group("fine-tuning")
    tune.add_argument("--finetune", metavar="DIR", type=Path, nargs="+", help="tasks, with train and dev .jsonl(.gz)")
    tune.add_argument("--run", metavar="DIR", type=Path, help="the directory that a run wrote")
    tune.add_argument("--tune-lr", metavar="LR", type=float, default=5e-5, help="(5e-5)")
    tune.add_argument("--epochs", type=float, default=3, help="(3)")
    tune.add_argument("--tune-batch", metavar="N", type=options.count, default=32, help="(32)")
    tune.add_argument("--tune-seeds", metavar="N", type=int, nargs="+", default=[1, 2, 3], help="one by one (1 2 3)")
    return parser


def main() -> int:
    """Does what the first option says."""
    return execute(_parser(), {"prepare": prepare, "arm": train, "finetune": finetune, "plot": plot})


if __name__ == "__main__":
    sys.exit(main())
