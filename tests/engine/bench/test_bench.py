"""``slipstream bench`` from the command line to the files it writes, with real workers on tiny models."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from engine import cli
from engine.bench import own, peers, survey
from engine.bench.job import Case, Job, Request, Subject
from engine.bench.pool import Pool
from tests.engine.bench.samples import job, player, size_of_png
from tests.engine.tiny import tiny
from tests.engine.tiny_text import write_config

SHORT = ["--prompt", "16", "--new", "8", "--rounds", "2"]


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers share two cores with other tests: one thread each."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A config for a tiny GPT-2, with sections that a bench has no use for."""
    sections = {"generation": {"temperature": 0.7}, "job": {"type": "generate", "prompts": ["x"]}}
    return write_config(tmp_path / "c.json", tiny("gpt2", "causal_lm").directory, precision="fp32", **sections)


@pytest.fixture
def empty_encoder(tmp_path: Path) -> Path:
    """A config for the config.json of a tiny BERT, without weights."""
    directory = tmp_path / "shape"
    directory.mkdir()
    shutil.copy(tiny("bert", "embedding").directory / "config.json", directory)
    return write_config(tmp_path / "e.json", directory, precision="fp32")


def test_a_decoder_beside_its_peers(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = ["--json", str(tmp_path / "rows.json"), "--chart", str(tmp_path / "rows.png")]
    runs = ["--kernels", "eager", "--against", "hf,deepspeed", "--batch", "1,3"]
    assert cli.main(["bench", str(config), *SHORT, *runs, *files]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    lines = shown.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "fp32, its own weights: 8 tokens behind prompts of 16, greedy" in lines[0]
    assert "fp32 matrix products" in shown.out
    assert lines[-1] == "deepspeed: not installed"

    rows = json.loads((tmp_path / "rows.json").read_text("utf-8"))
    assert [(row["run"], row["batch"]) for row in rows] == [
        (n, b) for n in ("eager", "hf", "deepspeed") for b in (1, 3)
    ]
    for row in rows:
        assert (row["kind"], row["tokens"], row["new"], row["precision"]) == ("decode", 16, 8, "fp32")
        assert row["floor_ms"] == pytest.approx(max(row["bytes"] / row["read"], row["flops"] / row["rate"]) * 1e3)
        assert row["command"].startswith(f"slipstream bench {config} --")
        assert row["device"]
        assert f"torch {torch.__version__}" in row["versions"]
        assert row["date"].endswith("+00:00")
        assert row["gpu_ms"] is None
    for row in rows[:4]:
        assert row["samples"] == 2
        assert row["ms_min"] <= row["ms"] <= row["ms_max"]
        assert row["error"] == ""
    for row in rows[4:]:
        assert (row["ms"], row["percent"], row["error"]) == (None, None, "not installed")
    assert rows[0]["model"] == tiny("gpt2", "causal_lm").directory.name
    assert size_of_png(tmp_path / "rows.png")[0] > 900


def test_the_first_token(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    runs = ["--kernels", "eager", "--against", "hf", "--batch", "2", "--json", str(path), "--first-token"]
    assert cli.main(["bench", str(config), *SHORT, *runs]) == 0
    out = capsys.readouterr().out
    assert "its own weights: the first token behind prompts of 16" in out
    assert "ms/first" in out
    rows = json.loads(path.read_text("utf-8"))
    assert [(row["run"], row["kind"], row["batch"], row["tokens"], row["new"]) for row in rows] == [
        ("eager", "prefill", 2, 16, 1),
        ("hf", "prefill", 2, 16, 1),
    ]
    assert all(row["samples"] == 8 and row["ms"] > 0 and row["error"] == "" for row in rows)


def test_an_encoder_without_weights_and_a_set_that_cannot_run(
    empty_encoder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [
        "--kernels",
        "eager,specialized",
        "--against",
        "none",
        "--batch",
        "2",
        "--tokens",
        "24",
        "--rounds",
        "1",
    ]
    assert cli.main(["bench", str(empty_encoder), *arguments]) == 0
    out = capsys.readouterr().out
    assert "shape, fp32, random weights: whole passes" in out
    assert "2 x 24  eager" in out
    reason = " ".join(out.partition("\nspecialized: ")[2].split())
    assert re.search(r'"specialized" .*: set "kernels" to|"specialized" .*; set "kernels" to', reason)


def test_where_nothing_can_be_measured_the_exit_code_says_so(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    start = player("say(event='failed', error='no room')\nsay(event='done')")
    monkeypatch.setattr(Pool, "survey", _surveyed)
    monkeypatch.setattr("engine.bench.command.pool_of", lambda *given: Pool(start=start))
    assert cli.main(["bench", str(config), "--against", "none"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "auto: no room"


def _surveyed(pool: Pool, requests: object) -> dict[str, object]:
    """A survey's answer."""
    one = job(1)
    found = {
        "subject": one.to_json()["subject"],
        "cases": one.to_json()["cases"],
        "works": [{"bytes": 1.0, "flops": 1.0}],
        "weight_bytes": 1,
    }
    rates = {"fp32": {"read": 1.0, "flops": 1.0}}
    return {"models": [found], "rates": rates, "device": "none", "memory": 1, "versions": ""}


def _heed_ctrl_c() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_ctrl_c_ends_the_workers_too(config: Path, repository: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", "bench", str(config), *SHORT[:4], "--rounds", "1000000", "--against", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(repository)},
        preexec_fn=_heed_ctrl_c,  # the suite itself may run where Ctrl-C is ignored
    )
    assert process.stdout is not None
    process.stdout.readline()  # the heading: the survey is over
    workers: list[psutil.Process] = []
    while not workers:
        workers = psutil.Process(process.pid).children()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, b"slipstream: interrupted\n")
    assert not [worker for worker in psutil.wait_procs(workers, timeout=10)[1] if worker.status() != "zombie"]


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--against", "vllm"],
            'argument --against: unknown peer "vllm" (there are hf, inductor, autotune, deepspeed)',
        ),
        (
            ["--kernels", "eagr"],
            'argument --kernels: unknown kernel set "eagr" (there are specialized, generic, eager)',
        ),
        (["--against", ","], "argument --against: no peer given"),
        (["--batch", "1,x"], 'argument --batch: got "x", wanted a whole number from 1'),
        (["--new", "0"], 'argument --new: got "0", wanted a whole number from 1'),
        (["--python", "hf"], 'argument --python: got "hf", wanted hf|inductor|autotune|deepspeed=PROGRAM'),
        (["--python", "hf=no-such-python"], "argument --python: no-such-python: no such program"),
        (["--json", "none/x.json"], "--json none/x.json: there is no directory "),
        (["--set", "device=gpu"], '$.device: got "gpu"'),
    ],
)
def test_bad_input_is_one_line(
    config: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", str(config), *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def _ask(directory: Path, **changes: object) -> dict[str, object]:
    """What the survey says of one model; no rates are measured for one that is refused."""
    request = Request(config={"model": {"path": str(directory)}, "device": "cpu"}, **changes)  # type: ignore[arg-type]
    return survey.survey([vars(request)])["models"][0]  # type: ignore[no-any-return]


def test_a_survey_refuses_in_one_line_what_does_not_fit(tmp_path: Path) -> None:
    decoder, encoder = tiny("gpt2", "causal_lm").directory, tiny("bert", "embedding").directory
    assert "take 1001 tokens with the one that is not timed, but this model ends at" in str(_ask(decoder, prompt=936))
    assert "--prompt 1024 takes 1025 tokens with the first new one" in str(_ask(decoder, prompt=1024, first=True))
    assert "--first-token needs a causal LM" in str(_ask(encoder, first=True))
    assert _ask(encoder, tokens=(16, 600))["error"] == "--tokens 600, but this model ends at 128: lower it"
    (tmp_path / "x.txt").touch()
    assert "random weights need the config.json" in str(_ask(tmp_path, random=True))
    assert "no weights: none of model.safetensors" in str(_ask(tmp_path))
    shutil.copy(decoder / "config.json", tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").touch()
    assert "1 shards, but model.safetensors.index.json is missing" in str(_ask(tmp_path))  # half is not none


# ---- what the workers do, in this process ----


def subject(kind: str, task: str, random: bool = False) -> Subject:
    """A tiny model as a survey would give it."""
    one = tiny(kind, task)  # type: ignore[arg-type]
    names = {"causal_lm": "AutoModelForCausalLM", "embedding": "AutoModel"}
    config = {"model": {"path": str(one.directory)}, "device": "cpu", "precision": "fp32"}
    values = {"vocab": one.vocab_size, "device": "cpu", "precision": "fp32", "hf_class": names[task]}
    return Subject(kind, config, random, str(one.directory), None, **values)


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_the_static_step_is_the_model_s_next_one_and_can_be_repeated(kind: str) -> None:
    """What inductor compiles, uncompiled: the logits behind prompt + token, the same at every replay."""
    case = Case(batch=2, tokens=11, new=4)
    try:
        peer = peers.Inductor(Job("inductor", subject(kind, "causal_lm"), (case,)))
        call, before = peer._step(case)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        if int(importlib.metadata.version("transformers").partition(".")[0]) >= 5:
            raise  # only old ones may have no static cache for some family
        pytest.skip(f"this transformers has no static cache for {kind}: {error}")
    ids = peers.random_ids(case, peer.vocab)
    with torch.inference_mode():
        wanted = peer.model(torch.cat((ids, ids[:, :1]), dim=1)).logits[:, -1]
        run = call(peer.model.forward)
        for _ in range(80):  # more often than the cache has room for, if it moved on
            before()
            found = run().logits[:, -1]
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("name", ["inductor", "autotune"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gpt_neo"])
def test_the_pass_ahead_of_the_first_token_gives_its_logits_and_fills_a_cache(kind: str, name: str) -> None:
    """What inductor compiles, uncompiled, and again: each pass begins with an empty cache."""
    case = Case(batch=2, tokens=11, new=1, first=True)
    peer = peers.RUNNERS[name](Job(name, subject(kind, "causal_lm"), (case,)))
    assert isinstance(peer, peers.Inductor)
    ids = peers.random_ids(case, peer.vocab)
    with torch.inference_mode():
        wanted = peer.model(ids).logits[:, -1]
        run = peer._pass(case)(peer.model.forward)
        for _ in range(2):
            found = run()
            assert torch.allclose(found.logits[:, -1], wanted, atol=1e-4)
            cache = getattr(found, "cache", None) or found.past_key_values
            length = cache[0][0].shape[-2] if isinstance(cache, tuple) else cache.get_seq_length()  # tuples, once
            assert length == 11


@pytest.mark.parametrize(("first", "calls"), [(False, [1, 6] * 5), (True, [1] * 14)])
def test_what_is_asked_of_the_engine(first: bool, calls: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the first token every call is timed: one ahead of all, one to warm up, four a round."""
    asked: list[int] = []

    def generate(self: object, rows: object, *, max_new_tokens: int, **options: object) -> None:
        asked.append(max_new_tokens)

    case = Case(1, 4, 1 if first else 5, first)
    runner = own.Slipstream(Job("slipstream", subject("gpt2", "causal_lm"), (case,), kernels="eager", rounds=3))
    monkeypatch.setattr("engine.engine.Engine.generate", generate)
    runner.prepare(case).measure()
    assert asked == calls


def test_generation_is_timed_over_new_tokens_alone() -> None:
    from engine.bench.timing import generation

    asked: list[int] = []
    prepared = generation(asked.append, Case(1, 4, 5), 3, torch.device("cpu"))
    assert len(prepared.measure()) == 3
    assert asked == [1, 6] * 4  # the first round warms up


@pytest.mark.parametrize(("kind", "task"), [("llama", "causal_lm"), ("bert", "embedding")])
def test_random_weights_leave_no_model_behind(kind: str, task: str) -> None:
    case = Case(2, 7, 3 if task == "causal_lm" else 0)
    runner = own.Slipstream(Job("slipstream", subject(kind, task, random=True), (case,), kernels="eager", rounds=1))
    assert runner.name == "eager"
    assert len(runner.prepare(case).measure()) == (1 if case.new else 4)
    source = runner._engine.plan.source
    assert isinstance(source, own.OneReading)
    assert source.version == runner._engine._runner().weights.version
    with pytest.raises(AssertionError, match="dropped"):
        source.names()


def test_deepspeed_gets_the_largest_case_first() -> None:
    cases = (Case(1, 128, 64), Case(16, 128, 64), Case(4, 128, 64))
    assert [case.batch for case in peers.DeepSpeed.order(None, cases)] == [16, 4, 1]  # type: ignore[arg-type]
