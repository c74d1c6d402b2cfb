"""The command ``slipstream profile``: a profile of what a config describes, or what changed between two."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from config_schema import Config, load_config
from config_schema.flops_profiler import FlopsProfiler
from engine.engine import Engine
from engine.errors import EngineError
from engine.jobs import prepare
from engine.profiling import path_of, write
from engine.training.data.batches import Batches
from engine.training.profile_step import WANTED
from profiler.compare import compare
from profiler.report import Format, Report

log = logging.getLogger("slipstream.profiler")

#: Steps that a schedule is told of where the config has no number of them: its rate does not matter here.
MANY = 10**6


def run(options: argparse.Namespace) -> int:
    """Profiles as the options say. Always 0: what goes wrong is raised."""
    files = _files(options)
    if options.diff is not None:
        if options.config is not None or files or options.set:
            raise EngineError("--diff compares two files: give it neither a CONFIG nor options beside it")
        print(compare(*map(Report.load, options.diff)), end="")
        return 0
    if options.config is None:
        raise EngineError("profile: give a CONFIG, or --diff with two profiles (see `slipstream profile --help`)")
    for path in files.values():
        if not path.resolve().parent.is_dir():
            raise EngineError(f"{path}: there is no directory {path.resolve().parent}: make it, or give another name")
    config = load_config(options.config, overrides=options.set)
    if config.training is not None:
        report = _trained(config, "chrome_trace" in files)
    else:
        report = _inferred(config, options, "chrome_trace" in files)
        write(report, config.flops_profiler or FlopsProfiler())
    for name, path in files.items():
        report.write((name,), path_of(str(path), report))
    return 0


def _files(options: argparse.Namespace) -> dict[Format, Path]:
    given: dict[Format, Path | None] = {"json": options.json, "html": options.html, "chrome_trace": options.trace}
    return {name: path for name, path in given.items() if path is not None}


def _trained(config: Config, events: bool) -> Report:
    """Of optimizer steps on the config's data. They change weights that are then thrown away."""
    section = config.flops_profiler or FlopsProfiler()
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
    """Of the job's texts, or of any tokens."""
    engine = Engine(config)
    texts = _texts(config)
    generates = engine.spec.head is not None and engine.spec.head.task == "causal_lm"
    if texts is not None:
        log.info("profiling the %d texts of the job", len(texts))
    new: dict[str, Any] = {}
    if texts is None:
        room = engine.spec.max_positions - (options.new if generates else 0)
        if options.tokens > room:
            raise EngineError(f"--tokens: {options.tokens}, but this model takes {room}: lower it")
        row = [1 + place % (engine.spec.vocab_size - 1) for place in range(options.tokens)]
        texts = [list(row) for _ in range(options.batch)]
        new = {"max_new_tokens": options.new}
    if generates:
        return engine.profile(prompt=texts, events=events, **new)
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
