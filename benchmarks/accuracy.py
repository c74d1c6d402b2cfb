"""How exact the kernel sets are on a real checkpoint: their greedy tokens beside eager's, their logits beside fp32.

    python -m benchmarks.accuracy --json accuracy.json                  # SmolLM2 of `make models`, fp16
    python -m benchmarks.accuracy DIRECTORY --precision bf16 --kernels generic

Tokens: each prompt is continued greedily, one at a time. A set may leave eager's tokens only at a near tie: where, by
eager's own logits, the token that it took lies behind eager's best by less than the largest error that those logits
have beside Hugging Face in fp32, after the same tokens. Logits: behind each prompt (prefill) and behind eager's first
token (decode), against Hugging Face in fp32, beside what Hugging Face itself makes of them in that precision.
Exits with 1 if a set breaks the rule, is less exact than Hugging Face, or cannot run.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import machine
from benchmarks.prompts import PROMPTS
from config_schema import SlipstreamError
from engine import Engine
from engine.bench import hugging_face, options, report
from engine.bench.job import KERNELS, Subject
from engine.build import DTYPES
from engine.jobs.tables import table
from engine.outputs import check_writable
from engine.verify import AUTO_CLASSES
from ops.sampling import SamplingState

#: Where `make models` puts the demo's causal language model.
DEMO = Path(__file__).parents[1] / "build" / "models" / "SmolLM2-135M-Instruct"
THEIRS = "hf"
#: A set's errors may be so many times Hugging Face's own: the typical one, and the largest of all.
MEDIAN, LARGEST = 1.5, 2.0
#: In fp32 both are right, and two orders of summation differ by this share of the largest logit.
FP32 = 1e-4


@dataclass(frozen=True)
class Followed:
    """How far one set follows eager behind one prompt.

    equal, new: tokens that are eager's at their places, of how many.
    first:      place of the first one that is not, from 0; None where all are. The rest is about that place:
    gap:        eager's best logit less its second best.
    behind:     eager's best logit less its logit of the token that the set took.
    error:      largest difference of eager's logits from Hugging Face's in fp32.
    """

    run: str
    prompt: str
    equal: int
    new: int
    first: int | None = None
    gap: float | None = None
    behind: float | None = None
    error: float | None = None

    @property
    def verdict(self) -> str:
        """``same``, ``near tie`` or ``WRONG``."""
        if self.first is None:
            return "same"
        assert self.behind is not None
        assert self.error is not None
        return "near tie" if self.behind < self.error else "WRONG"  # not so for NaN


@dataclass(frozen=True)
class Errors:
    """Absolute errors of a run's logits, all prompts together, against Hugging Face's in fp32.

    step: ``prefill`` or ``decode``. ok: whether they are Hugging Face's own in that precision, or not much larger.
    """

    step: str
    run: str
    median: float
    largest: float
    ok: bool


@dataclass
class Run:
    """What one set gives: each prompt's tokens, and its logits [2, vocabulary] behind the prompt and one token more."""

    tokens: list[list[int]]
    logits: list[Tensor]


@dataclass
class Findings:
    """All that was found; ``refused`` holds the sets that cannot run, and why."""

    device: str
    followed: list[Followed] = field(default_factory=list)
    errors: list[Errors] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every set that was asked for is as exact as it must be."""
        return not self.refused and all(
            [*(one.verdict != "WRONG" for one in self.followed), *(one.ok for one in self.errors)]
        )


def divergence(ours: Sequence[int], eager: Sequence[int]) -> int | None:
    """The first place at which they differ."""
    return next((at for at, pair in enumerate(zip(ours, eager, strict=True)) if pair[0] != pair[1]), None)


def continuations(engine: Engine, rows: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """``new`` greedy tokens behind each row alone, through the public ``generate``."""
    chosen = {"max_new_tokens": new, "do_sample": False, "ignore_eos": True}
    return [engine.generate(list(row), **chosen).token_ids for row in rows]


def step_logits(engine: Engine, row: Sequence[int], forced: Sequence[int]) -> Tensor:
    """The logits that ``generate`` sees, fp32 [1 + forced, vocabulary] on the CPU: behind ``row``, then behind each of
    the tokens ``forced``, one decode step each, by the device's own decoder where the set has one."""
    generator = engine._generator()
    runner, cache = generator.runner, generator.cache
    held = cache.allocate(len(row) + len(forced))
    try:
        with torch.inference_mode():
            found = [runner.prefill(cache, [held], [list(row)], generator.prefill_chunk)[0]]
            step = runner.decode_step(cache, 1)
            for at, token in enumerate(forced, start=len(row)):
                if step is None:
                    found.append(runner.decode(cache, [held], [token])[0])
                    continue
                assert step.decoder is not None
                tokens, positions = (torch.tensor([value], device=runner.device) for value in (token, at))
                greedy = SamplingState.create(1, engine.spec.vocab_size, runner.device)
                step.begin([held.pages], tokens, positions, greedy, None, 1)
                found.append(step.decoder.logits(at + 1)[0].clone())  # the next step overwrites it
            return torch.stack(found).float().cpu()
    finally:
        cache.release(held)


def whole_logits(model: Any, ids: Sequence[int], last: int) -> Tensor:
    """Hugging Face's logits behind the ``last`` tokens of ``ids``, one pass: fp32 [last, vocabulary] on the CPU."""
    with torch.inference_mode():
        return model(torch.tensor([list(ids)], device=model.device)).logits[0, -last:].float().cpu()


def cached_logits(model: Any, row: Sequence[int], token: int) -> Tensor:
    """As :func:`step_logits` with one token, by Hugging Face: a pass that fills its cache, and one of a token."""
    with torch.inference_mode():
        first = model(torch.tensor([list(row)], device=model.device), use_cache=True)
        name = "cache" if getattr(first, "cache", None) is not None else "past_key_values"
        kept = {name: getattr(first, name)}
        second = model(torch.tensor([[token]], device=model.device), use_cache=True, **kept)
        return torch.stack((first.logits[0, -1], second.logits[0, -1])).float().cpu()


def follow(run: str, prompt: str, ours: Sequence[int], eager: Sequence[int], logits: Tensor, exact: Tensor) -> Followed:
    """One row that leaves eager's tokens; ``logits`` and ``exact`` [vocabulary] are eager's and fp32's at that
    place."""
    first = divergence(ours, eager)
    assert first is not None
    best, second = logits.topk(2).values.tolist()
    behind, error = best - float(logits[ours[first]]), float((logits - exact).abs().max())
    equal = sum(a == b for a, b in zip(ours, eager, strict=True))
    return Followed(run, prompt, equal, len(eager), first, best - second, behind, error)


def errors(step: str, found: Mapping[str, Sequence[Tensor]], exact: Sequence[Tensor], precision: str) -> list[Errors]:
    """A row for each run in ``found``, Hugging Face's own among them, from its logits [vocabulary] of each prompt."""
    largest = max(float(one.abs().max()) for one in exact)
    sizes = {}
    for run, logits in found.items():
        apart = torch.stack([(a - b).abs() for a, b in zip(logits, exact, strict=True)]).flatten()
        sizes[run] = (float(apart.median()), float(apart.max()))
    least = FP32 * largest if precision == "fp32" else 0.0
    median, most = (max(factor * own, least) for factor, own in zip((MEDIAN, LARGEST), sizes[THEIRS], strict=True))
    return [Errors(step, run, *own, own[0] <= median and own[1] <= most) for run, own in sizes.items()]


def measure(
    model: Path,
    precision: str,
    kernels: Sequence[str],
    device: str,
    prompts: Sequence[str],
    new: int,
    say: Callable[[str], object] = lambda text: None,
) -> Findings:
    """Runs eager, each set and Hugging Face, one after the other; ``say`` is told what comes next."""

    def opened(name: str) -> Engine:
        say(name)
        sizes = {"max_batch": 1}
        return Engine.from_pretrained(model, precision=precision, device=device, kernels=name, inference=sizes)

    eager = opened("eager")
    rows = [eager.text.encode(prompt) for prompt in prompts]
    wanted = continuations(eager, rows, new)
    runs: dict[str, Run] = {}
    where = eager.plan.device
    findings = Findings(torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU")
    for name in ("eager", *(name for name in kernels if name != "eager")):
        try:
            engine = eager if name == "eager" else opened(name)
            tokens = wanted if name == "eager" else continuations(engine, rows, new)
            logits = [step_logits(engine, row, first[:1]) for row, first in zip(rows, wanted, strict=True)]
            runs[name] = Run(tokens, logits)
        except SlipstreamError as error:
            findings.refused[name] = str(error)
        engine = None
        _free()
    eager_logits = {
        (index, at): step_logits(eager, rows[index], wanted[index][:at])[-1] for index, at in _places(runs, wanted)
    }
    subject = _subject(eager, precision)
    del eager
    _free()
    _compare(findings, subject, prompts, rows, runs, eager_logits, say)
    return findings


def _places(runs: Mapping[str, Run], wanted: Sequence[Sequence[int]]) -> list[tuple[int, int]]:
    """(prompt, place) wherever some run leaves eager's tokens, each once."""
    found = {
        (index, divergence(tokens, eager))
        for run in runs.values()
        for index, (tokens, eager) in enumerate(zip(run.tokens, wanted, strict=True))
    }
    return sorted((index, at) for index, at in found if at is not None)


def _subject(engine: Engine, precision: str) -> Subject:
    plan = engine.plan
    return Subject(
        name=str(plan.directory),
        config={},
        random=False,
        directory=str(plan.directory),
        gguf_file=plan.gguf_file,
        hf_class=AUTO_CLASSES["causal_lm"],
        vocab=plan.spec.vocab_size,
        device=str(plan.device),
        precision=precision,
    )


def _compare(
    findings: Findings,
    subject: Subject,
    prompts: Sequence[str],
    rows: Sequence[list[int]],
    runs: Mapping[str, Run],
    eager_logits: Mapping[tuple[int, int], Tensor],
    say: Callable[[str], object],
) -> None:
    """Asks Hugging Face in fp32 and in the precision, and fills the findings."""
    wanted = runs["eager"].tokens
    say("Hugging Face in fp32")
    torch.set_float32_matmul_precision("highest")  # TF32 would round what the others are measured by
    model = hugging_face.load(replace(subject, precision="fp32"))
    exact = [whole_logits(model, [*row, tokens[0]], 2) for row, tokens in zip(rows, wanted, strict=True)]
    places = {(at, n): whole_logits(model, [*rows[at], *wanted[at][:n]], 1)[0] for at, n in eager_logits}
    del model
    _free()
    say(f"Hugging Face in {subject.precision}")
    model = hugging_face.load(subject)
    theirs = [cached_logits(model, row, tokens[0]) for row, tokens in zip(rows, wanted, strict=True)]
    del model
    _free()
    logits = {**{name: run.logits for name, run in runs.items()}, THEIRS: theirs}
    for place, step in enumerate(("prefill", "decode")):
        found = {name: [one[place] for one in them] for name, them in logits.items()}
        findings.errors += errors(step, found, [one[place] for one in exact], subject.precision)
    for name, run in runs.items():
        if name == "eager":
            continue
        for index, (prompt, tokens) in enumerate(zip(prompts, run.tokens, strict=True)):
            at = divergence(tokens, wanted[index])
            if at is None:
                findings.followed.append(Followed(name, prompt, len(tokens), len(tokens)))
                continue
            place = (index, at)
            findings.followed.append(follow(name, prompt, tokens, wanted[index], eager_logits[place], places[place]))


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def text_of(findings: Findings) -> str:
    """The tables and a line of counts for each set, in at most 80 columns.

    Errors of logits are medians, then the largest of all, then both as multiples of Hugging Face's own.
    """
    lines = []
    if findings.followed:
        cells = [
            [one.run, " ".join(one.prompt.split()), f"{one.equal}/{one.new}", _cell(one.first), _small(one.gap),
             _small(one.error), one.verdict]
            for one in findings.followed
        ]  # fmt: skip
        lines += [table(["run", "prompt", "equal", "leaves", "gap", "error", "verdict"], cells, texts=[0, 1]), ""]
    theirs = {one.step: one for one in findings.errors if one.run == THEIRS}
    cells = [
        [one.step, one.run, _small(one.median), _small(one.largest), _times(one.median, theirs[one.step].median),
         _times(one.largest, theirs[one.step].largest), "ok" if one.ok else "WORSE"]
        for one in findings.errors
    ]  # fmt: skip
    headers = ["logits", "run", "error", "largest", "x median", "x largest", "verdict"]
    lines += [table(headers, cells, texts=[0, 1]), ""]
    for run in dict.fromkeys(one.run for one in findings.followed):
        verdicts = [one.verdict for one in findings.followed if one.run == run]
        ties = [one for one in findings.followed if one.run == run and one.first is not None]
        least = f", the largest gap {max(one.gap or 0 for one in ties):.2g}" if ties else ""
        error = f" of an error of {statistics.median(one.error or 0 for one in ties):.2g} in the median" if ties else ""
        counts = ", ".join(f"{verdicts.count(word)} {word}" for word in ("same", "near tie", "WRONG"))
        lines += textwrap.wrap(f"{run}: {len(verdicts)} prompts, {counts}{least}{error}", report.WIDTH)
    for run, why in findings.refused.items():
        lines += textwrap.wrap(f"{run}: not measured: {why}", report.WIDTH, subsequent_indent="  ")
    return "\n".join(lines)


def _cell(value: int | None) -> str:
    return "-" if value is None else str(value)


def _small(value: float | None) -> str:
    return "-" if value is None else f"{value:.2e}"


def _times(value: float, theirs: float) -> str:
    return f"{value / theirs:.2f}" if theirs else "-"


def main() -> int:
    """Measures, prints, and says by the exit code whether all is as exact as it must be."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", type=Path, nargs="?", default=DEMO, help="directory of a causal LM (the demo's)")
    parser.add_argument("--precision", choices=list(DTYPES), default="fp16", help="of all but the reference (fp16)")
    parser.add_argument(
        "--kernels", type=options.names(KERNELS, "kernel set"), default=KERNELS[:2], help="(specialized,generic)"
    )
    parser.add_argument("--device", default="auto", help="as in a config")
    parser.add_argument("--new", metavar="N", type=options.count, default=64, help="greedy tokens (64)")
    parser.add_argument(
        "--prompts", metavar="N", type=options.count, default=len(PROMPTS), help=f"so many of them ({len(PROMPTS)})"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all findings to this file")
    chosen = parser.parse_args()
    prompts = PROMPTS[: chosen.prompts]
    try:
        if chosen.json is not None:
            check_writable(chosen.json, "--json ")
        if not chosen.model.is_dir():
            raise SlipstreamError(f"{chosen.model}: no such directory: `make models` gets the demo's, or give another")
        given = (chosen.model, chosen.precision, chosen.kernels, chosen.device, prompts, chosen.new)
        findings = measure(*given, lambda text: print(f"... {text}", file=sys.stderr, flush=True))
    except SlipstreamError as error:
        parser.error(str(error))
    what = f"{chosen.model.resolve().name}, {chosen.precision}, {len(prompts)} prompts, {chosen.new} greedy tokens"
    print("\n".join(textwrap.fill(line, report.WIDTH) for line in (what, f"{findings.device}; {machine()}")))
    print(f"\n{text_of(findings)}")
    if chosen.json is not None:
        document = {
            "title": what,
            "machine": machine(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "ok": findings.ok,
            **asdict(findings),
        }
        document["followed"] = [{**asdict(one), "verdict": one.verdict} for one in findings.followed]
        report.write(chosen.json, json.dumps(document, indent=1, ensure_ascii=False).encode() + b"\n")
    return 0 if findings.ok else 1


if __name__ == "__main__":
    sys.exit(main())
