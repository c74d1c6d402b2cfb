"""The command ``slipstream profile``: a profile of what a config describes, or what changed between two."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from config_schema import Config, load_config
from config_schema.flops_profiler import FlopsProfiler
from engine.engine import Engine
from engine.errors import EngineError
from engine.jobs import prepare
from engine.outputs import check_writable
from engine.profile_options import BATCH, NEW, TOKENS
from engine.profiling import check, write
from engine.training.data.batches import Batches
from engine.training.profile_step import WANTED
from profiler.compare import compare
from profiler.page import check_installed
from profiler.report import Format, Report
from profiler.units import many

log = logging.getLogger("slipstream.profiler")

#: Option of each format that a file can be asked for.
OPTIONS: dict[Format, str] = {"json": "json", "html": "html", "chrome_trace": "trace"}
#: Options that say what inference does.
SIZES = ("batch", "tokens", "new")
#: Steps that a schedule is told of where the config has no number of them: its rate does not matter here.
MANY = 10**6


def run(options: argparse.Namespace) -> int:
    """Profiles as the options say. Always 0: what goes wrong is raised."""
    files, sizes = _files(options), [name for name in SIZES if getattr(options, name) is not None]
    if options.diff is not None:
        if options.config is not None or files or sizes or options.set:
            raise EngineError("--diff compares two files: give it neither a CONFIG nor options beside it")
        print(compare(*map(Report.load, options.diff)), end="")
        return 0
    if options.config is None:
        raise EngineError("profile: give a CONFIG, or --diff with two profiles (see `slipstream profile --help`)")
    config = load_config(options.config, overrides=options.set)
    if config.training is not None and sizes:
        raise EngineError(f'--{sizes[0]}: of no use with a section "training", which says what a step is: leave it out')
    section = config.flops_profiler or FlopsProfiler()
    check(section)
    for name, path in files.items():
        check_writable(path, f"--{OPTIONS[name]} ")
    if "html" in files:
        check_installed()
    with _told():
        if config.training is not None:
            report = _trained(config, section, "chrome_trace" in files)
        else:
            report = _inferred(config, options, "chrome_trace" in {*files, *section.formats})
            write(report, section)
        for name, path in files.items():
            write(report, FlopsProfiler(output_file=str(path), formats=(name,)))
    return 0


@contextmanager
def _told() -> Iterator[None]:
    """Says on stderr what is being done, unless less was asked for: a profile takes its time."""
    level = log.level
    if log.getEffectiveLevel() == logging.WARNING:
        log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.setLevel(level)


def _files(options: argparse.Namespace) -> dict[Format, Path]:
    given: dict[Format, Path | None] = {name: getattr(options, option) for name, option in OPTIONS.items()}
    return {name: path for name, path in given.items() if path is not None}


def _trained(config: Config, section: FlopsProfiler, events: bool) -> Report:
    """Of optimizer steps on the config's data. They change weights that are then thrown away."""
    section = section.model_copy(update={"enabled": True, "profile_step": 1})
    engine = Engine(config.model_copy(update={"flops_profiler": section}))
    trainer = engine._trainer
    feature = trainer.plan.profile_step
    assert feature is not None
    feature.events = feature.events or events
    trainer.plan.length = max(trainer.settings.max_steps or MANY, 1 + WANTED)
    team, sizes = trainer.ranks, trainer.sizes
    # Where the engine has started the other processes itself, a batch is that of all of them.
    parts = sizes.accumulation * (sizes.world // team.size)
    batches = Batches(trainer.samples("train"), sizes.micro, trainer.settings.seed, team.rank, team.size)
    while feature.report is None:
        engine.train_batch([next(batches).inputs for _ in range(parts)])
    return feature.report


def _inferred(config: Config, options: argparse.Namespace, events: bool) -> Report:
    """Of the job's texts, or of any tokens: without a job, or where their number is given."""
    engine = Engine(config)
    generates = engine.spec.head is not None and engine.spec.head.task == "causal_lm"
    if options.new is not None and not generates:
        raise EngineError("--new: this model generates nothing: leave it out")
    texts = _texts(config) if options.batch is options.tokens is None else None
    new = options.new
    if texts is not None:
        log.info("profiling %s of the job", many(len(texts), "text"))
    else:
        rows, new = options.batch or BATCH, new or NEW
        room = engine.spec.max_positions - (new if generates else 0)
        tokens = options.tokens or max(1, min(TOKENS, room))
        if tokens > room:
            raise EngineError(f"--tokens: {tokens}, but this model takes {room}: lower it")
        log.info("profiling %s of %s each", many(rows, "sequence"), many(tokens, "token"))
        row = [1 + place % (engine.spec.vocab_size - 1) for place in range(tokens)]
        texts = [list(row) for _ in range(rows)]
    if generates:
        return engine.profile(prompt=texts, events=events, **({} if new is None else {"max_new_tokens": new}))
    return engine.profile(texts, events=events)


def _texts(config: Config) -> list[Any] | None:
    """Those of the config's job, None without one."""
    if config.job is None:
        return None
    job = prepare(config)
    found = getattr(job, "prompts", None) or getattr(job, "texts", None)
    if found is not None:
        return list(found)
    questions = getattr(job, "questions", None)
    return None if questions is None else [(one.question, one.context) for one in questions]
