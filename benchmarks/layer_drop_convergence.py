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
import math
import sys
from pathlib import Path

import torch

from benchmarks.convergence_run import ARMS, Run
from benchmarks.masked_lm import Shape
from benchmarks.steps import device_in_words, device_of, say
from config_schema import SlipstreamError
from engine.bench import options, report


def shape_of(chosen: argparse.Namespace, vocabulary: int) -> Shape:
    """The sizes that are asked for."""
    heads = chosen.heads or max(chosen.hidden // 64, 1)
    return Shape(chosen.layers, chosen.hidden, heads, chosen.length, vocabulary, chosen.dropout)


def train(chosen: argparse.Namespace) -> None:
    """``--arm``: one run, or ``--probe`` steps of it."""
    from benchmarks import convergence_data, convergence_run

    if chosen.data is None:
        raise SlipstreamError("--arm needs --data, the file that --prepare makes")
    corpus = convergence_data.load(chosen.data, chosen.length)
    run = Run(
        arm=chosen.arm,
        lr=chosen.lr,
        seed=chosen.seed,
        steps=chosen.steps,
        batch=chosen.batch,
        shape=shape_of(chosen, len(corpus.tokenizer)),
        precision=chosen.precision,
        compiled=chosen.compile,
        theta=chosen.theta,
        warmup=chosen.warmup,
        evaluations=chosen.evaluations,
    )
    device = device_of(chosen.device)
    if chosen.probe:
        seconds = convergence_run.probe(run, corpus, device, chosen.probe)
        fit = "" if math.isinf(chosen.seconds) else f": {chosen.seconds:g} seconds hold {int(chosen.seconds / seconds)}"
        print(f"{run.arm}, {device_in_words(device)}: {1000 * seconds:.4g} ms a step{fit}")
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(f"{run.name}: {convergence_run.train(run, corpus, chosen.out, device, chosen.seconds, say)}")


def prepare(chosen: argparse.Namespace) -> None:
    """``--prepare``."""
    from benchmarks import convergence_data

    if chosen.data is None or chosen.vocab is None:
        raise SlipstreamError("--prepare needs --vocab, BERT's vocab.txt, and --data, the file to write")
    report.check_writable(chosen.data, "--data")
    counts = convergence_data.prepare(chosen.prepare, chosen.vocab, chosen.data)
    print(f"{chosen.data}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))


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
        report.check_writable(chosen.png, "--png")
    print(convergence_plot.summary(chosen.plot))
    if chosen.png is not None:
        convergence_plot.draw(convergence_plot.read(chosen.plot)[0], chosen.png)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prepare", metavar="TEXT", type=Path, help="tokenize a text file (.gz too) into --data")
    what.add_argument("--arm", choices=list(ARMS), help="train one run")
    what.add_argument("--finetune", metavar="DIR", type=Path, nargs="+", help="tasks, with train and dev .jsonl(.gz)")
    what.add_argument("--plot", metavar="DIR", type=Path, help="tables of all runs in it")
    parser.add_argument("--data", metavar="FILE", type=Path, help="the tokenized text")
    parser.add_argument("--vocab", metavar="FILE", type=Path, help="BERT's vocab.txt")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path("runs/layer_drop"), help="(runs/layer_drop)")
    parser.add_argument("--device", default="auto", help="as in a config")
    parser.add_argument("--threads", metavar="N", type=options.count, help="threads of torch (as torch chooses)")
    parser.add_argument("--precision", choices=["bf16", "fp32", "fp16"], default="bf16", help="(bf16)")
    run = parser.add_argument_group("a run")
    run.add_argument("--lr", type=float, default=4e-4, help="the highest rate (4e-4)")
    run.add_argument("--seed", type=int, default=1, help="of weights, order, masks, dropout and gates (1)")
    run.add_argument("--steps", metavar="N", type=options.count, default=4000, help="of the schedule (4000)")
    run.add_argument("--seconds", metavar="S", type=float, default=math.inf, help="stop then, with a checkpoint")
    run.add_argument("--probe", metavar="N", type=options.count, help="only time so many steps")
    run.add_argument("--batch", metavar="N", type=options.count, default=256, help="sequences a step (256)")
    run.add_argument("--evaluations", metavar="N", type=options.count, default=40, help="in a run (40)")
    run.add_argument("--warmup", metavar="SHARE", type=float, default=0.05, help="of the steps (0.05)")
    run.add_argument("--theta", type=float, default=0.5, help="of layer drop (0.5)")
    run.add_argument("--compile", action="store_true", help="torch.compile the training step")
    sizes = Shape()
    run.add_argument("--length", metavar="N", type=options.count, default=sizes.length, help="tokens (128)")
    run.add_argument("--layers", metavar="N", type=options.count, default=sizes.layers, help="(12)")
    run.add_argument("--hidden", metavar="N", type=options.count, default=sizes.hidden, help="(768; FFN 4 times)")
    run.add_argument("--heads", metavar="N", type=options.count, help="(hidden / 64)")
    run.add_argument("--dropout", type=float, default=sizes.dropout, help="(0.1)")
    tune = parser.add_argument_group("fine-tuning")
    tune.add_argument("--run", metavar="DIR", type=Path, help="the directory that a run wrote")
    tune.add_argument("--tune-lr", metavar="LR", type=float, default=5e-5, help="(5e-5)")
    tune.add_argument("--epochs", type=float, default=3, help="(3)")
    tune.add_argument("--tune-batch", metavar="N", type=options.count, default=32, help="(32)")
    tune.add_argument("--tune-seeds", metavar="N", type=int, nargs="+", default=[1, 2, 3], help="one by one (1 2 3)")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw the curves of --plot (needs matplotlib)")
    return parser


def main() -> int:
    """Does what the first option says."""
    parser = _parser()
    chosen = parser.parse_args()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    modes = {"prepare": prepare, "arm": train, "finetune": finetune, "plot": plot}
    try:
        modes[next(name for name in modes if getattr(chosen, name) is not None)](chosen)
    except SlipstreamError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
