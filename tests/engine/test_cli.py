"""The command line: in this process where that shows all, as a real process where output, signals or imports count."""

from __future__ import annotations

import json
import logging
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from config_schema import SCHEMA_PATH, json_schema
from engine import __version__, cli
from engine.errors import EngineError
from tests.engine.tiny_text import save_decoder, save_encoder, write_config

PYTHON = [sys.executable, "-m", "engine"]


@pytest.fixture(autouse=True)
def _leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What ``main`` sets for a whole process is put back behind each test."""
    for name in ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, os.environ.get(name, "error" if "VERBOSITY" in name else "1"))
    log = logging.getLogger("slipstream")
    level, handlers = log.level, list(log.handlers)
    with warnings.catch_warnings():
        yield
    log.setLevel(level)
    log.handlers[:] = handlers


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 directory as transformers saves it."""
    return save_decoder(tmp_path_factory.mktemp("gpt2"), "gpt2")


@pytest.fixture
def config(tmp_path: Path, gpt2: Path) -> Path:
    """A config that generates six tokens."""
    sections = {"generation": {"max_new_tokens": 6, "ignore_eos": True}, "precision": "fp32"}
    return write_config(tmp_path / "c.json", gpt2, job={"type": "generate", "prompts": ["The moon is"]}, **sections)


def _process(*arguments: str, repository: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(repository), **options.pop("env", {})}
    chatty = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS")
    environment = {name: value for name, value in environment.items() if name not in chatty}
    return subprocess.run(
        [*PYTHON, *arguments], capture_output=True, text=True, encoding="utf-8", env=environment, timeout=240, **options
    )


# ---- user errors ----

BROKEN = {
    "a comma too many": (
        '{"model": {"path": "m"},}',
        'line 1, column 25: not JSON: a comma before "}" or "]" is not allowed; remove it',
    ),
    "a comment": ('{\n  // mine\n  "model": {}\n}', "line 2, column 3: not JSON: JSON has no comments; remove it"),
    "single quotes": (
        "{'model': {'path': 'm'}}",
        "line 1, column 2: not JSON: strings take double quotes, not single ones",
    ),
    "not closed": (
        '{"model": {"path": "m"}',
        "line 1, column 24: not JSON: the text ends too early; a brace, a bracket or a quote is not closed",
    ),
    "Python's None": (
        '{"model": {"path": "m"}, "job": None}',
        "line 1, column 33: not JSON: JSON writes true, false and null",
    ),
    "a key twice": (
        '{"model": {"path": "m"}, "device": "cpu", "device": "cuda"}',
        "$.device: the key appears more than once in its object; keep one",
    ),
    "NaN": (
        '{"model": {"path": "m"}, "generation": {"temperature": NaN}}',
        "$.generation.temperature: NaN is not a JSON value; write a number",
    ),
    "a typo": (
        '{"model": {"path": "m"}, "precison": "fp32"}',
        '$.precison: unknown key, did you mean "precision"? (allowed: $schema, model, device, precision, '
        "quantization, kernels, "
        "inference, generation, embedding, training, optimizer, schedule, progressive_layer_drop, flops_profiler, "
        "data, job)",
    ),
    "a number in quotes": (
        '{"model": {"path": "m"}, "generation": {"max_new_tokens": "20"}}',
        '$.generation.max_new_tokens: got the string "20", wanted an integer from 1 to 2147483647 or null; '
        "remove the quotes",
    ),
    "a value that is not there": (
        '{"model": {"path": "m"}, "precision": "fp8"}',
        '$.precision: got "fp8", wanted one of "auto", "fp32", "bf16", "fp16", "int8", "int4"',
    ),
    "a list": ("[1, 2]", "$: got an array of 2, wanted an object: {...}"),
    "nothing": ("", 'is empty; the smallest configuration is {"model": {"path": "..."}}'),
    "a contradiction": (
        '{"model": {"path": "m", "task": "embedding"}, "job": {"type": "generate", "prompts": ["x"]}}',
        '$.job.type: "generate" needs $.model.task to be "causal_lm" or "auto", which is "embedding"',
    ),
    "a nest": ('{"model": ' + "[" * 100 + "]" * 100 + "}", "line 1: nested deeper than 64 levels"),
    "Latin 1": ('{"model": {"path": "mod\udce8le"}}', "is not UTF-8: byte 0xe8 at offset 23"),
}


@pytest.mark.parametrize("command", ["validate", "run"])
@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_line_that_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, command: str
) -> None:
    text, message = BROKEN[name]
    monkeypatch.chdir(tmp_path)
    Path("c.json").write_bytes(text.encode("utf-8", errors="surrogateescape"))
    assert cli.main([command, "c.json"]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"slipstream: error: c.json: {message}\n"
    assert shown.out == ""


def test_validate_looks_at_every_file_and_shows_every_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("good.json").write_text('{"model": {"path": "m"}}')
    Path("bad.json").write_text('{"model": {"path": ""}, "device": "gpu", "job": {"type": "generte"}}')
    assert cli.main(["validate", "bad.json", "good.json", "none.json"]) == 2
    shown = capsys.readouterr()
    assert shown.out == "good.json: valid\n"
    lines = shown.err.splitlines()
    assert len(lines) == 4
    assert [re.match(r"slipstream: error: (\S+: (?:\$\.[a-z]+)?)", line)[1] for line in lines] == [  # type: ignore[index]
        "bad.json: $.model",
        "bad.json: $.device",
        "bad.json: $.job",
        "none.json: ",
    ]
    assert cli.main(["validate", "good.json"]) == 0
    assert cli.main(["validate", "good.json", "--set", "device=gpu"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rnu", "x.json"], 'unknown command "rnu", did you mean "run"? (commands: run, validate, explain'),
        (["-v", "valdate"], 'unknown command "valdate", did you mean "validate"?'),
        ([], "the following arguments are required: COMMAND (see `slipstream --help`)"),
        (["run"], "the following arguments are required: CONFIG (see `slipstream run --help`)"),
        (["run", "x.json", "--sett", "a=b"], "unrecognized arguments: --sett a=b"),
        (["run", "none.json"], "none.json: no such file"),
        (["explain", "."], ".: is a directory; name a JSON file in it"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert cli.main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"slipstream: error: {message}")
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_a_config_without_its_command_is_recognized(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([str(config)]) == 2
    assert f'did you mean "slipstream run {config}"?' in capsys.readouterr().err


def test_requests_beyond_the_model_name_the_numbers(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def error(*settings: str) -> str:
        assert cli.main(["run", str(config), *(x for setting in settings for x in ("--set", setting))]) == 2
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err.count("\n") == 1
        return shown.err.removeprefix("slipstream: error: ").strip()

    assert "prompt 0 has 12" in error("job.prompts.0=" + "moon " * 120)
    assert error("generation.max_new_tokens=95") == (
        "prompt 0 has 3 tokens and 95 new ones are asked for, 98 in all, but inference.max_tokens is 96: "
        "the model ends at 96, or ask for fewer with max_new_tokens"
    )
    assert error("generation.max_new_tokens=96") == (
        "$.generation.max_new_tokens: 96 new tokens and a prompt do not fit $.inference.max_tokens, which is 96 "
        "(this model ends at 96): lower it"
    )
    assert "set inference.max_tokens to at least 9" in error("inference.max_tokens=8")


def test_half_a_checkpoint_is_one_line(
    config: Path, gpt2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half = tmp_path / "half"
    shutil.copytree(gpt2, half)

    def error(*options: str) -> str:
        assert cli.main(["run", str(config), "--set", f"model.path={half}", *options]) == 2
        shown = capsys.readouterr()
        assert shown.err.count("\n") == 1, shown.err
        assert "Traceback" not in shown.err
        return shown.err

    whole = (half / "model.safetensors").read_bytes()
    (half / "tokenizer.json").unlink()
    assert "no usable tokenizer here" in error()
    (half / "tokenizer_config.json").unlink()
    assert re.search(
        r"no (usable )?tokenizer here \(.*token ids still work", error()
    )  # in words of either transformers
    (half / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert re.search(r"model\.safetensors: transformer\.h\.1\S+: .* cut off", error("--dry-run"))
    (half / "model.safetensors").unlink()
    assert "no weights: none of model.safetensors" in error("--dry-run")
    shutil.rmtree(half)
    assert f"{half}: no such directory" in error("--dry-run")


# ---- what the commands give ----


def test_a_dry_run_reads_no_weights(
    config: Path, gpt2: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine import build

    def refuse(plan: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(build, "runner", refuse)
    assert cli.main(["run", str(config), "--dry-run"]) == 0
    parameters = r"\d\d,\d{3} parameters"
    wanted = rf"{config}: ready: generate with GPT-2 causal_lm, {parameters}, on cpu, fp32, eager kernels\n"
    assert re.fullmatch(wanted, capsys.readouterr().out)
    assert cli.main(["run", str(config)]) == cli.BUG
    assert cli.main(["run", str(config), "--dry-run", "--set", 'job={"type": "encode", "texts": ["x"]}']) == 2
    assert '"encode" needs $.model.task "embedding"' in capsys.readouterr().err


def test_explain_gives_the_resolved_config_and_the_reasons(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(config), "--set", "inference.max_batch=3"]) == 0
    document, _, reasons = capsys.readouterr().out.partition("\n\n")
    found = json.loads(document)
    assert (found["model"]["task"], found["kernels"], found["inference"]["max_batch"]) == ("causal_lm", "eager", 3)
    assert '$.inference.max_tokens: "auto" is 96' in reasons
    assert "max_batch" not in reasons


def test_verify_says_whether_the_outputs_agree(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine import verify

    assert cli.main(["verify", str(config)]) == 0
    assert "agrees with Hugging Face" in capsys.readouterr().out
    monkeypatch.setitem(verify.TOLERANCES, __import__("torch").float32, 0.0)
    assert cli.main(["verify", str(config)]) == 1
    assert "DIFFERS from" in capsys.readouterr().out


def test_schema_prints_the_schema_or_its_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json_schema()
    assert cli.main(["schema", "--path"]) == 0
    assert capsys.readouterr().out == f"{SCHEMA_PATH}\n"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"slipstream {__version__}\n"


@pytest.mark.parametrize("command", [None, *cli.COMMANDS])
def test_help_teaches_by_examples_in_80_columns(
    command: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main([*([command] if command else []), "--help"]) == 0
    text = capsys.readouterr().out
    assert "examples:\n  slipstream " in text
    assert max(map(len, text.splitlines())) <= 80
    for line in re.findall(r"^  (slipstream .*)", text, re.MULTILINE):
        words = re.sub(r'"[^"]*"', "x", line).split(" > ")[0].split("   ")[0].split()
        cli._parser().parse_args(words[1:])  # an example that does not parse teaches wrong


# ---- -v, -vv and bugs ----


def test_v_shows_the_choices_with_their_reasons(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, shown in ((["run"], False), (["run", "-v"], True), (["-v", "run"], True)):
        assert cli.main([*arguments, str(config), "--dry-run"]) == 0
        assert ('slipstream.build: $.kernels: "auto" is eager' in capsys.readouterr().err) is shown


def test_a_bug_is_called_one_and_vv_shows_where(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine import build

    def broken(plan: Any) -> Any:
        raise KeyError("layers.0\nqkv")

    monkeypatch.setattr(build, "runner", broken)
    assert cli.main(["run", str(config)]) == 1
    line = "slipstream: error: this is a bug in slipstream: KeyError: 'layers.0\\nqkv'"
    assert capsys.readouterr().err == f"{line}; -vv shows where\n"
    assert cli.main(["run", str(config), "-vv"]) == 1
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.endswith(f"{line}\n")


def test_vv_shows_where_a_user_error_came_from(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(config), "--set", "job=null", "-vv"]) == 2
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert shown.splitlines()[-1].startswith("slipstream: error: $.job: missing, so there is nothing to run")


def test_exhausted_memory_is_no_bug(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from engine import build

    def exhausted(plan: Any) -> Any:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(build, "runner", exhausted)
    assert cli.main(["run", str(config)]) == 2
    assert capsys.readouterr().err == (
        "slipstream: error: out of memory (CUDA out of memory): lower inference.max_batch, inference.max_tokens "
        "or the precision\n"
    )


def test_errors_of_several_lines_are_several_errors(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from engine import build

    def refuse(plan: Any) -> Any:
        raise EngineError("one\ntwo\nTraceback (most recent call last):\n  of a worker")

    monkeypatch.setattr(build, "runner", refuse)
    assert cli.main(["run", str(config)]) == 2
    told = "slipstream: error: one\nslipstream: error: two\n"
    assert capsys.readouterr().err == f"{told}Traceback (most recent call last):\n  of a worker\n"


# ---- real processes ----


def test_quick_commands_import_no_torch(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text('{"model": {"path": "m"}}')
    (tmp_path / "bad.json").write_text("{")
    script = """
import sys
from engine.cli import main
for arguments in (["validate", "c.json"], ["validate", "bad.json"], ["schema"], ["--help"], ["run", "--help"],
                  ["--version"], ["run", "bad.json"], ["rnu"]):
    main(arguments)
    heavy = {"torch", "transformers", "numpy", "tabulate"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
print("none of them")
"""
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    ran = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("none of them\n")


def test_stdout_holds_the_text_and_stderr_the_summary(repository: Path, config: Path, gpt2: Path) -> None:
    """Nothing of transformers' chatter beside them, which would warn of more than 16 tokens."""
    from engine import Engine

    prompt = "The moon is a quiet place and the night is long. " * 3
    wanted = Engine(config).generate(prompt)
    ran = _process("run", str(config), "--set", f"job.prompts.0={prompt}", repository=repository)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == f"{wanted}\n"
    summary = r"\d\d prompt tokens, 6 new tokens, \d+\.\d\d s to the first, \d+\.\d tokens/s\n"
    assert re.fullmatch(summary, ran.stderr), ran.stderr


def test_verify_is_quiet_too(repository: Path, config: Path) -> None:
    ran = _process("verify", str(config), repository=repository)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr == ""
    assert ran.stdout.count("\n") == 1


@pytest.fixture
def endless(tmp_path: Path) -> Path:
    """A config whose text takes minutes."""
    sizes = {"max_position_embeddings": 1_000_000}
    model = save_decoder(tmp_path / "model", "llama", **sizes)
    sections = {
        "generation": {"max_new_tokens": 200_000, "ignore_eos": True},
        "inference": {"max_tokens": 200_100, "max_batch": 1},
    }
    job = {"type": "generate", "prompts": ["The moon is"], "output": str(tmp_path / "out.jsonl")}
    return write_config(tmp_path / "c.json", model, job=job, **sections)


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _start(config: Path, repository: Path) -> subprocess.Popen[bytes]:
    """The process, once its first text has come."""
    process = subprocess.Popen(
        [*PYTHON, "run", str(config)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
        env={**os.environ, "PYTHONPATH": str(repository)},
        # A shell starts background jobs with Ctrl-C ignored, and the suite may be one; a user's terminal does not.
        preexec_fn=_heed_ctrl_c,
    )
    assert process.stdout is not None
    assert process.stdout.read(1)
    return process


def test_ctrl_c_ends_a_stream_cleanly(repository: Path, endless: Path) -> None:
    process = _start(endless, repository)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    assert err == b"slipstream: interrupted\n"
    assert sorted(path.name for path in endless.parent.iterdir()) == ["c.json", "model"]


def test_a_pipe_that_closes_ends_the_run_quietly(repository: Path, endless: Path) -> None:
    process = _start(endless, repository)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=120) == 141
    assert process.stderr.read() == b""
    process.stderr.close()
    assert sorted(path.name for path in endless.parent.iterdir()) == ["c.json", "model"]


def test_on_a_terminal_text_streams_with_progress(repository: Path, config: Path) -> None:
    parent, child = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(repository), "TERM": "xterm", "COLUMNS": "80"}
    process = subprocess.Popen([*PYTHON, "run", str(config)], stdout=child, stderr=child, env=environment)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux's way to say that the other side is closed
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait(timeout=120) == 0
    assert re.search(rb"\x1b7\x1b\[B\r\x1b\[K\d tokens?, [\d.]+ tokens/s\x1b8", shown), shown
    assert re.search(rb"\r\x1b\[K\d prompt tokens, 6 new tokens, .* tokens/s\r\n$", shown), shown


def test_the_demo_runs(repository: Path, smollm2_dir: Path, tmp_path: Path) -> None:
    """A real model through a real process: the text makes sense."""
    job = {"type": "generate", "prompts": ["The capital of France is"]}
    sections = {"generation": {"max_new_tokens": 3}, "inference": {"max_tokens": 32, "max_batch": 1}}
    config = write_config(tmp_path / "c.json", smollm2_dir, job=job, **sections)
    ran = _process("run", str(config), repository=repository)
    assert ran.returncode == 0, ran.stderr
    assert "Paris" in ran.stdout
    assert ran.stderr.count("\n") == 1


def test_a_file_of_texts_goes_through_a_process(repository: Path, tmp_path: Path, minilm_dir: Path) -> None:
    """Relative names start at the working directory; the vectors are written there."""
    model = save_encoder(tmp_path / "model", minilm_dir, "bert", "embedding")
    (tmp_path / "texts.txt").write_text("one\n\ntwo\n", "utf-8")
    job = {"type": "encode", "texts_file": "texts.txt", "output": "vectors.jsonl"}
    write_config(tmp_path / "c.json", model, job=job)
    ran = _process("run", "c.json", repository=repository, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert "Cosine similarity" in ran.stdout
    records = [json.loads(line) for line in (tmp_path / "vectors.jsonl").read_text("utf-8").splitlines()]
    assert [(record["text"], len(record["vector"])) for record in records] == [("one", 32), ("two", 32)]
