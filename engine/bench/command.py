"""The command ``slipstream bench``: from options to rows, table, JSON and chart."""

from __future__ import annotations

import argparse
import importlib.util
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, TextIO

from tqdm import tqdm

from config_schema import Config, load_config
from engine.bench import chart, report
from engine.bench.job import PEERS, Case, Job, Request, Subject
from engine.bench.pool import Outcome, Pool, Watch
from engine.bench.report import Context, Row
from engine.errors import EngineError
from engine.outputs import check_writable

#: What a row says of a peer whose distribution is not here.
NOT_INSTALLED = "not installed"


@dataclass(frozen=True)
class Model:
    """A surveyed model: its subject, its cases, the work of each, the device's rates in its precision."""

    subject: Subject
    cases: tuple[Case, ...]
    works: tuple[Mapping[str, float], ...]
    rates: Mapping[str, float]
    weight_bytes: int


@dataclass(frozen=True)
class Survey:
    """The models (or the error of each, in one line), the device in words, its memory in bytes, the versions."""

    models: tuple[Model | str, ...]
    device: str
    memory: int
    versions: str


def bench(options: argparse.Namespace) -> int:
    """Measures as the options say, and shows the rows. 0 if anything could be measured, else 1."""
    config = load_config(options.config, overrides=options.set)
    for path, option in ((options.json, "--json"), (options.chart, "--chart")):
        if path is not None:
            check_writable(path, f"{option} ")
    if options.chart is not None:
        chart.check_installed()
    pool = pool_of(options, Bars(sys.stderr))
    found = survey(pool, [request_of(config, options)])
    (model,) = found.models
    if isinstance(model, str):
        raise EngineError(model)
    print(heading(model, found.device), flush=True)
    rows: list[Row] = []
    context = context_of(found, ["slipstream", *options.arguments])
    for job in jobs(model, options.kernels or (config.kernels,), options.against, options):
        outcome = measure(pool, [job])[0]
        rows += report.rows(outcome, model.works, model.rates, context)
        if options.json is not None:  # after each run: whoever has had enough keeps what there is
            report.write_json(options.json, rows)
    print(f"\n{report.table(rows)}")
    if options.chart is not None:
        chart.draw(rows, options.chart)
    return 0 if any(row.ms is not None for row in rows) else 1


def request_of(config: Config, options: argparse.Namespace) -> Request:
    """What the survey is asked."""
    return Request(
        config=config.to_dict(),
        random=options.random_weights,
        batches=options.batch,
        prompt=options.prompt,
        new=options.new,
        first=options.first_token,
        tokens=options.tokens,
    )


def pool_of(options: argparse.Namespace, watch: Watch, deadline: float | None = None) -> Pool:
    """The pool that the options describe."""
    return Pool(timeout=options.timeout, deadline=deadline, pythons=dict(options.python), watch=watch)


def survey(pool: Pool, requests: Sequence[Request]) -> Survey:
    """Opens the models and measures the device's rates, in a worker."""
    pool.watch.preparing(["survey"])
    try:
        found = pool.survey([asdict(request) for request in requests])
    finally:
        pool.watch.finished()
    models = tuple(_model(one, found["rates"]) for one in found["models"])
    return Survey(models, found["device"], found["memory"], found["versions"])


def _model(found: Mapping[str, Any], rates: Mapping[str, Mapping[str, float]]) -> Model | str:
    if "error" in found:
        return str(found["error"])
    subject = Subject(**found["subject"])
    cases = tuple(Case(**case) for case in found["cases"])
    return Model(subject, cases, tuple(found["works"]), rates[subject.precision], found["weight_bytes"])


def context_of(found: Survey, command: Sequence[str]) -> Context:
    """What the rows say of when and where, and the words of the command as it was typed."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    return Context(date, found.device, found.versions, shlex.join(command))


def heading(model: Model, device: str) -> str:
    """What stands above the table."""
    subject, first = model.subject, model.cases[0]
    weights = "random weights" if subject.random else "its own weights"
    what = {
        "decode": f"{first.new} tokens behind prompts of {first.tokens}, greedy",
        "prefill": f"the first token behind prompts of {first.tokens}",
        "encode": "whole passes",
    }[first.kind]
    lines = (
        f"{subject.name}, {subject.precision}, {weights}: {what}",
        f"{device}: {report.rates_in_words(model.rates, subject.precision)}",
    )
    return "\n".join(textwrap.fill(line, report.WIDTH, subsequent_indent="  ") for line in lines)


def jobs(model: Model, kernels: Sequence[str], peers: Sequence[str], options: argparse.Namespace) -> list[Job]:
    """A run for each kernel set, then one for each peer."""
    common = {"cases": model.cases, "rounds": options.rounds, "gpu_time": not options.no_gpu_time}
    own = [Job("slipstream", model.subject, kernels=name, **common) for name in kernels]
    return [*own, *(Job(name, model.subject, **common) for name in peers)]


def measure(pool: Pool, wave: Sequence[Job]) -> list[Outcome]:
    """The outcomes of jobs that get ready side by side, in their order; a peer that is not installed costs no
    process."""
    found: dict[int, Outcome] = {}
    for index, job in enumerate(wave):
        needs = PEERS.get(job.runner)
        if needs is not None and job.runner not in pool.pythons and importlib.util.find_spec(needs) is None:
            found[index] = Outcome(job, job.label)
            found[index].fail(NOT_INSTALLED)
    here = [index for index in range(len(wave)) if index not in found]
    if here:
        found |= dict(zip(here, pool.measure([wave[index] for index in here]), strict=True))
    return [found[index] for index in range(len(wave))]


class Bars(Watch):
    """A line a run on a terminal, and nothing where stderr is none."""

    def __init__(self, file: TextIO) -> None:
        self._file, self._bar = file, self._none()

    def preparing(self, names: Sequence[str]) -> None:
        """A line that goes away again."""
        what = ", ".join(names) if len(names) < 4 else f"{len(names)} runs"
        self._open(f"preparing {what}", None, "{desc} {elapsed}", leave=False)

    def tick(self) -> None:
        """Moves the clock."""
        self._bar.refresh()

    def measuring(self, name: str, cases: int) -> None:
        """A line that stays."""
        self._open(name, cases, "{desc:<12} {bar:20} {n_fmt}/{total_fmt} {elapsed}{postfix}", leave=True)

    def measured(self, text: str) -> None:
        """One step further."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def finished(self) -> None:
        """Ends the line."""
        self._bar.close()

    def _open(self, text: str, total: int | None, form: str, *, leave: bool) -> None:
        self._bar.close()
        self._bar = tqdm(
            total=total, desc=text, bar_format=form, file=self._file, disable=None, leave=leave, dynamic_ncols=True
        )

    def _none(self) -> tqdm[Any]:
        return tqdm(disable=True)
