"""The command line that the convergence benchmarks share: preparing a text, training one run or timing its steps."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks import convergence_data
from benchmarks.convergence_loop import PreTraining, Settings, probe, train
from benchmarks.masked_lm import Shape
from benchmarks.steps import device_in_words, device_of, say
from config_schema import SlipstreamError
from engine.bench import options
from engine.outputs import check_writable


def parser_of(doc: str | None, arms: Iterable[str], out: str, batch: int, evaluations: int) -> argparse.ArgumentParser:
    """A parser with what all take; ``out``, ``batch`` and ``evaluations`` are defaults."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data", metavar="FILE", type=Path, help="the tokenized text")
    parser.add_argument("--vocab", metavar="FILE", help="BERT's vocab.txt, or how many words to learn")
    parser.add_argument("--out", metavar="DIR", type=Path, default=Path(out), help=f"({out})")
    parser.add_argument("--device", default="auto", help="as in a config")
    parser.add_argument("--threads", metavar="N", type=options.count, help="threads of torch (as torch chooses)")
    parser.add_argument("--precision", choices=["bf16", "fp32", "fp16"], default="bf16", help="(bf16)")
    parser.add_argument("--prepare", metavar="TEXT", type=Path, help="tokenize a text file (.gz too) into --data")
    parser.add_argument("--arm", choices=list(arms), help="train one run")
    parser.add_argument("--plot", metavar="DIR", type=Path, help="tables of all runs in it")
    parser.add_argument("--png", metavar="FILE", type=Path, help="draw the curves of --plot (needs matplotlib)")
    run = parser.add_argument_group("a run")
    run.add_argument("--lr", type=float, default=4e-4, help="the highest rate (4e-4)")
    run.add_argument("--seed", type=int, default=1, help="of all that is drawn at random (1)")
    run.add_argument("--steps", metavar="N", type=options.count, default=4000, help="of the schedule (4000)")
    run.add_argument("--seconds", metavar="S", type=float, default=math.inf, help="stop then, with a checkpoint")
    run.add_argument("--probe", metavar="N", type=options.count, help="only time so many steps")
    run.add_argument("--batch", metavar="N", type=options.count, default=batch, help=f"sequences a step ({batch})")
    run.add_argument(
        "--evaluations", metavar="N", type=options.count, default=evaluations, help=f"in a run ({evaluations})"
    )
    run.add_argument("--warmup", metavar="SHARE", type=float, default=0.05, help="of the steps (0.05)")
    return parser


def add_sizes(parser: argparse.ArgumentParser, sizes: Shape) -> None:
    """Of the model; ``sizes`` are the defaults."""
    group = parser.add_argument_group("the model")
    for name in ("length", "layers", "hidden"):
        value = getattr(sizes, name)
        group.add_argument(f"--{name}", metavar="N", type=options.count, default=value, help=f"({value})")
    group.add_argument("--heads", metavar="N", type=options.count, help="(hidden / 64)")
    group.add_argument("--dropout", type=float, default=sizes.dropout, help=f"({sizes.dropout})")
    group.add_argument("--init", type=float, default=sizes.init, help=f"deviation of the first weights ({sizes.init})")


def shape_of(chosen: argparse.Namespace, vocabulary: int) -> Shape:
    """The sizes that are asked for."""
    heads = chosen.heads or max(chosen.hidden // 64, 1)
    return Shape(chosen.layers, chosen.hidden, heads, chosen.length, vocabulary, chosen.dropout, chosen.init)


def prepare(chosen: argparse.Namespace) -> None:
    """``--prepare``."""
    if chosen.data is None or chosen.vocab is None:
        raise SlipstreamError(
            "--prepare needs --vocab, BERT's vocab.txt or a number of words, and --data, the file to write"
        )
    check_writable(chosen.data, "--data ")
    counts = convergence_data.prepare(chosen.prepare, chosen.vocab, chosen.data)
    print(f"{chosen.data}: " + ", ".join(f"{value} {name}" for name, value in counts.items()))


def run_arm(
    chosen: argparse.Namespace,
    kind: Callable[..., Settings],
    training: Callable[[Any, convergence_data.Corpus, torch.device], PreTraining],
) -> None:
    """``--arm``: one run, or ``--probe`` steps of it. ``kind`` takes what all runs have."""
    if chosen.data is None:
        raise SlipstreamError("--arm needs --data, the file that --prepare makes")
    corpus = convergence_data.load(chosen.data, chosen.length)
    common = ("arm", "lr", "seed", "steps", "batch", "precision", "warmup", "evaluations")
    run = kind(shape=shape_of(chosen, len(corpus.tokenizer)), **{name: getattr(chosen, name) for name in common})
    device = device_of(chosen.device)
    if chosen.probe:
        going = training(run, corpus, device)
        found = probe(going, chosen.probe)
        seconds = found["seconds"]
        fit = "" if math.isinf(chosen.seconds) else f": {chosen.seconds:g} seconds hold {int(chosen.seconds / seconds)}"
        print(f"{run.arm}, {device_in_words(device)}: {1000 * seconds:.4g} ms a step{fit}")
        print("medians: " + ", ".join(f"{key} {value:.4g}" for key, value in found.items()))
        return
    chosen.out.mkdir(parents=True, exist_ok=True)
    print(f"{run.name}: {train(run, lambda: training(run, corpus, device), chosen.out, chosen.seconds, say)}")


def execute(parser: argparse.ArgumentParser, modes: Mapping[str, Callable[[argparse.Namespace], None]]) -> int:
    """Does the one of ``modes`` that is asked for; what a user did wrong ends in one line."""
    chosen = parser.parse_args()
    asked = [name for name in modes if getattr(chosen, name) is not None]
    if len(asked) != 1:
        parser.error(f"give one of {', '.join(f'--{name}' for name in modes)}")
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    try:
        modes[asked[0]](chosen)
    except SlipstreamError as error:
        parser.error(str(error))
    return 0
