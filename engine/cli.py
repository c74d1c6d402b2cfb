"""The command line: ``slipstream run, validate, explain, verify, bench, profile, quantize, import-config, schema,
env``, or ``python -m engine``.

Exit codes: 0 done; 1 a bug, or ``verify`` found a difference, or ``bench`` could measure nothing; 2 the user can put it
right (a line for each problem, no traceback); 130 interrupted; 141 whoever read stdout went away. torch is imported by
the commands that need it alone.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from config_schema import SCHEMA_PATH, Config, SlipstreamError, load_config, schema_text
from config_schema.job import Job
from engine import __version__, profile_options, quantize_command
from engine.bench import options as bench_options
from engine.import_config import console as import_console

PROG = "slipstream"
BUG, USER_ERROR, INTERRUPTED, BROKEN_PIPE = 1, 2, 130, 141

ABOUT = """\
Runs a Transformer as one JSON file says: text generation, sentence embeddings,
classification, question answering and masked words, from Hugging Face
checkpoints, on a CPU or a GPU.
"""

EXAMPLES = {
    "": """\
examples:
  slipstream run sample_configs/smollm2_generate.json
  slipstream run my.json --set generation.max_new_tokens=20
  slipstream validate *.json
  slipstream explain my.json
  slipstream env

`slipstream COMMAND --help` says more about each command.
""",
    "run": """\
examples:
  slipstream run my.json
  slipstream run my.json --set job.prompts.0="Hello" --set generation.seed=1
  slipstream run my.json --dry-run       is all well? reads no weights
  slipstream run my.json > texts.txt     results alone; progress stays on stderr

The smallest file that generates text:
  {"model": {"path": "DIR"}, "job": {"type": "generate", "prompts": ["Hi"]}}
""",
    "validate": """\
examples:
  slipstream validate my.json
  slipstream validate sample_configs/*.json

Every problem is one line: file, JSON path, what is wrong, what is allowed.
Looks at the files alone; `slipstream run --dry-run` looks at the model as well.
""",
    "explain": """\
examples:
  slipstream explain my.json
  slipstream explain my.json --set device=cpu
""",
    "verify": """\
examples:
  slipstream verify my.json
  slipstream verify my.json --set precision=bf16

Runs the checkpoint here and in Hugging Face transformers, and compares.
""",
    "bench": bench_options.EXAMPLES,
    "profile": profile_options.EXAMPLES,
    "quantize": quantize_command.EXAMPLES,
    "import-config": import_console.EXAMPLES,
    "schema": """\
examples:
  slipstream schema > slipstream.schema.json
  slipstream schema --path

An editor completes and checks a file whose first line is
  "$schema": "PATH OF THE SCHEMA",
""",
    "env": """\
examples:
  slipstream env
  slipstream env --json
""",
}


class Parser(argparse.ArgumentParser):
    """argparse whose errors look like all others: one line, with what to do."""

    def error(self, message: str) -> NoReturn:
        """Prints the error and exits with 2."""
        self.exit(USER_ERROR, f"{PROG}: error: {message} (see `{self.prog} --help`)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: the process's own) and returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        _refuse_unknown_command(arguments)
        options = _parser().parse_args(arguments)
        options.arguments = arguments
    except SlipstreamError as error:
        return _user_error(error)
    except SystemExit as stop:  # argparse's way to end after --help, --version or an error
        return stop.code if isinstance(stop.code, int) else USER_ERROR
    verbose: int = options.verbose + options.early_verbose
    _set_up_output(verbose)
    try:
        code: int = options.command(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # What is still buffered has nobody to go to, and Python would complain about that at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(f"{PROG}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except Exception as error:
        return _failed(error, verbose)


def _failed(error: Exception, verbose: int) -> int:
    if verbose > 1:
        traceback.print_exc()
    if isinstance(error, SlipstreamError):
        return _user_error(error)
    if type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        reason = str(error).partition("\n")[0].partition(". ")[0]
        return _user_error(
            f"out of memory ({reason}): lower inference.max_batch, inference.max_tokens or the precision"
        )
    what = " ".join(f"{type(error).__name__}: {error}".split())
    how = "" if verbose > 1 else "; -vv shows where"
    print(f"{PROG}: error: this is a bug in slipstream: {what}{how}", file=sys.stderr)
    return BUG


def _user_error(error: SlipstreamError | str) -> int:
    lines = str(error).splitlines()
    traceback = next((at for at, line in enumerate(lines) if line.startswith("Traceback (")), len(lines))
    for line in lines[:traceback]:
        print(f"{PROG}: error: {line}", file=sys.stderr)
    for line in lines[traceback:]:  # another process's
        print(line, file=sys.stderr)
    return USER_ERROR


def _refuse_unknown_command(arguments: Sequence[str]) -> None:
    """A command that does not exist, answered with the one that was meant rather than with argparse's list."""
    name = next((argument for argument in arguments if not argument.startswith("-")), None)
    if name is None or name in COMMANDS:
        return
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f', did you mean "{close[0]}"?' if close else ""
    if os.path.isfile(name):
        hint = f', did you mean "{PROG} run {name}"?'
    raise SlipstreamError(f'unknown command "{name}"{hint} (commands: {", ".join(COMMANDS)})')


def _set_up_output(verbose: int) -> None:
    """Our log on stderr at the level asked for; the chatter of libraries only with -v."""
    log = logging.getLogger("slipstream")
    level = (logging.WARNING, logging.INFO, logging.DEBUG)[min(verbose, 2)]
    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts, one speaks for all
    log.setLevel(level if first else logging.ERROR)
    if not any(isinstance(handler, _StderrHandler) for handler in log.handlers):
        log.addHandler(_StderrHandler())
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:  # a terminal that cannot show a character must not end the run
            reconfigure(errors="replace")
    if not verbose:
        warnings.simplefilter("ignore")
        # Read by the libraries when they are imported. What the user has set stays.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes ``slipstream.build: ...`` to whatever ``sys.stderr`` is at the time."""

    def emit(self, record: logging.LogRecord) -> None:
        """Prints the record."""
        level = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        print(f"{record.name}: {level}{record.getMessage()}", file=sys.stderr, flush=True)


# ---- the commands ----


def _run(options: argparse.Namespace) -> int:
    config = load_config(options.config, overrides=options.set)
    from engine import build, jobs

    job = jobs.prepare(config)
    if job.type == "train":
        return _train(options, config, job)
    plan = build.plan(config)
    jobs.check(job, plan)
    if options.dry_run:
        spec = plan.spec
        task = spec.head.task if spec.head is not None else "embedding"
        model = f"{plan.family.name} {task}, {spec.parameters():,} parameters"
        dtype = next(name for name, dtype in build.DTYPES.items() if dtype == plan.dtype)
        bits = f"{plan.scheme.bits}-bit weights and " if plan.scheme is not None else ""
        how = f"on {plan.device}, {bits}{dtype}, {plan.kernels} kernels"
        print(f"{options.config}: ready: {job.type} with {model}, {how}")
        return 0
    from engine.engine import Engine

    jobs.run(Engine(plan), job)
    return 0


def _train(options: argparse.Namespace, config: Config, job: Job) -> int:
    if options.dry_run:
        from engine.training.outline import outline

        plan, model = outline(config)
        print(f"{options.config}: ready: train\n{plan.describe(model)}")
        return 0
    from engine import jobs
    from engine.engine import Engine

    jobs.run(Engine(config), job)
    return 0


def _validate(options: argparse.Namespace) -> int:
    code = 0
    for path in options.config:
        try:
            load_config(path, overrides=options.set)
        except SlipstreamError as error:
            code = _user_error(error)
        else:
            print(f"{path}: valid")
    return code


def _explain(options: argparse.Namespace) -> int:
    config = load_config(options.config, overrides=options.set)
    if config.training is not None:
        from engine.training.outline import outline

        plan, model = outline(config)
        print(plan.explain(model))
        return 0
    from engine import build

    print(build.explain(build.plan(config)))
    return 0


def _verify(options: argparse.Namespace) -> int:
    config = load_config(options.config, overrides=options.set)
    from engine.engine import Engine

    found = Engine(config).verify()
    print(found)
    return 0 if found.ok else 1


def _bench(options: argparse.Namespace) -> int:
    from engine.bench.command import bench

    return bench(options)


def _profile(options: argparse.Namespace) -> int:
    from engine.profile_command import run

    return run(options)


def _schema(options: argparse.Namespace) -> int:
    print(SCHEMA_PATH if options.path else schema_text().rstrip("\n"))
    return 0


def _env(options: argparse.Namespace) -> int:
    import json

    from engine import env_report

    found = env_report.gather()
    print(json.dumps(found, indent=2) if options.json else env_report.as_text(found))
    return 0


#: What each command does: one line of help, and its function.
COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "run": ("run the job of a config", _run),
    "validate": ("say all that is wrong with config files", _validate),
    "explain": ('print a config with every "auto" decided, and why', _explain),
    "verify": ("compare the outputs with Hugging Face's", _verify),
    "bench": ("measure speed beside the floor and beside peers", _bench),
    "profile": ("say what a step costs, part by part, and how near the limits it is", _profile),
    "quantize": ("write a model with weights of 8 or 4 bits", quantize_command.run),
    "import-config": ("turn a config of DeepSpeed into one of slipstream", import_console.run),
    "schema": ("print the JSON Schema of the config", _schema),
    "env": ("say what is on this machine, and what is missing", _env),
}


def _parser() -> Parser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = Parser(prog=PROG, description=ABOUT, epilog=EXAMPLES[""], formatter_class=layout, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROG} {__version__}")
    parser.add_argument("-v", dest="early_verbose", action="count", default=0, help=argparse.SUPPRESS)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (summary, function) in COMMANDS.items():
        described = f"{summary[0].upper()}{summary[1:]}."
        sub = commands.add_parser(
            name, help=summary, description=described, epilog=EXAMPLES[name], formatter_class=layout, allow_abbrev=False
        )
        sub.set_defaults(command=function)
        OPTIONS[name](sub)
        sub.add_argument(
            "-v", "--verbose", action="count", default=0, help="show what is chosen and why; -vv also tracebacks"
        )
    return parser


def _takes_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="a JSON file")
    _takes_set(parser)


def _takes_configs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", nargs="+", help="JSON files")
    _takes_set(parser)


def _takes_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", metavar="A.B=VALUE", action="append", default=[], help="change one value; may be given several times"
    )


def _takes_dry_run(parser: argparse.ArgumentParser) -> None:
    _takes_config(parser)
    parser.add_argument("--dry-run", action="store_true", help="check config, job and checkpoint; read no weights")


def _takes_bench(parser: argparse.ArgumentParser) -> None:
    _takes_config(parser)
    bench_options.add(parser)


def _takes_profile(parser: argparse.ArgumentParser) -> None:
    profile_options.add(parser)
    _takes_set(parser)


def _takes_quantize(parser: argparse.ArgumentParser) -> None:
    quantize_command.add(parser)
    _takes_set(parser)


def _takes_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--path", action="store_true", help="print where the schema's file is")


def _takes_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as a JSON document")


OPTIONS: dict[str, Callable[[argparse.ArgumentParser], None]] = {
    "run": _takes_dry_run,
    "validate": _takes_configs,
    "explain": _takes_config,
    "verify": _takes_config,
    "bench": _takes_bench,
    "profile": _takes_profile,
    "quantize": _takes_quantize,
    "import-config": import_console.add,
    "schema": _takes_path,
    "env": _takes_json,
}


if __name__ == "__main__":
    sys.exit(main())
