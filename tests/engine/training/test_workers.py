"""Workers that an engine starts itself: what they compute, what cannot be mirrored, and processes that fail."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers

from config_schema import SlipstreamError
from engine import Engine
from engine.errors import EngineError
from engine.training import workers
from engine.training.workers import WorkerFailed, first_failure
from tests.conftest import PYTHONPATH
from tests.engine.tiny_text import bpe_tokenizer
from tests.engine.training.trained import write_labelled

#: Steps of the run that is ended in its midst.
TOTAL = 60
#: What a worker does wrong, by a file that Python reads as it starts: the first process is no worker.
BREAKS = """
import os, sys
if "engine.worker" in sys.orig_argv and "BREAK" in os.environ:
    if os.environ["BREAK"] == "start":
        sys.modules["transformers"] = None
    else:
        import torch
        step, calls = torch.optim.AdamW.step, []
        def broken(*args, **kwargs):
            calls.append(1)
            if len(calls) == 3:
                raise ValueError("this worker is broken")
            return step(*args, **kwargs)
        torch.optim.AdamW.step = broken
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What :func:`prepared` writes."""
    return prepared(tmp_path_factory.mktemp("workers"))


def prepared(home: Path) -> Path:
    """A tiny classifier that drops out, one that does not (``plain``), and data."""
    tokenizer = bpe_tokenizer()
    tokenizer.pad_token = "<eos>"
    sizes: dict[str, Any] = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 32, "hidden_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 24,
    }  # fmt: skip
    for name, rate in (("model", 0.1), ("plain", 0.0)):
        tokenizer.save_pretrained(home / name)
        rates = {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate}
        transformers.BertConfig(**sizes, **rates).save_pretrained(home / name)
    write_labelled(home / "train.jsonl", 60, 1)
    write_labelled(home / "dev.jsonl", 21, 2)
    (home / "breaks").mkdir()
    (home / "breaks" / "sitecustomize.py").write_text(BREAKS, encoding="utf-8")
    (home / "train.json").write_text(json.dumps(document(home)), encoding="utf-8")
    return home


@pytest.fixture(autouse=True)
def _one_thread_and_no_process_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    workers.end_others()
    assert not worker_pids(os.getpid()), "a worker outlives its engine"


def document(home: Path, model: str = "model", **training: Any) -> dict[str, Any]:
    """A configuration on two processes; ``training`` replaces or extends."""
    return {
        "model": {"path": str(home / model), "task": "sequence_classification", "weights": "random"},
        "device": "cpu",
        "training": {
            "train_batch_size": 8, "micro_batch_size": 2, "max_steps": TOTAL, "output": str(home / "run"),
            "checkpoint_every": 2, "clip_norm": 1.0, "seed": 3, "processes": 2, **training,
        },
        "optimizer": {"type": "AdamW", "lr": 0.01},
        "data": {
            "train": str(home / "train.jsonl"), "eval": str(home / "dev.jsonl"), "length": 24, "labels": ["a", "b"],
        },
        "job": {"type": "train"},
    }  # fmt: skip


def batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Rows for the classifier."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (rows, 10), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


def worker_pids(parent: int) -> list[int]:
    """The workers of a process that are there."""
    found = []
    for child in psutil.Process(parent).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "engine.worker" in child.cmdline():
                found.append(child.pid)
    return found


def wait_for(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """What is true at last."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, "it does not come"
        time.sleep(0.02)
    return found


def has_steps(metrics: Path, count: int) -> bool:
    """Whether a run has made so many."""
    return metrics.exists() and metrics.read_text(encoding="utf-8").count('"loss"') >= count


def is_gone(pid: int) -> bool:
    """Whether there is no such process."""
    return not psutil.pid_exists(pid)


def start(home: Path, *arguments: str) -> subprocess.Popen[str]:
    """Python with our packages, in a process group of its own, as a terminal gives it one."""
    environment = {**os.environ, "PYTHONPATH": PYTHONPATH}
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip


def lines(output: Path) -> list[dict[str, Any]]:
    """The metrics of a run, without what depends on the clock."""
    text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(line).items() if k != "samples_per_second"} for line in text.splitlines()]


def test_a_run_ended_twice_is_that_of_torchrun(home: Path) -> None:
    """kill -9 of the first process, Ctrl-C for all of them, and the rest: to the last bit what torchrun computes."""
    whole = start(
        home, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
        "-m", "engine", "run", "train.json", "--set", f"training.output={home / 'whole'}",
    )  # fmt: skip
    metrics = home / "run" / "metrics.jsonl"
    for number, at in ((signal.SIGKILL, 3), (signal.SIGINT, 8)):
        run = start(home, "-m", "engine", "run", "train.json")
        wait_for(partial(has_steps, metrics, at))
        (worker,) = worker_pids(run.pid)
        if number == signal.SIGKILL:
            run.kill()
        else:
            os.killpg(run.pid, number)
        _, err = run.communicate(timeout=60)
        wait_for(partial(is_gone, worker), 10)
        if number == signal.SIGINT:
            assert run.returncode == 0, err
            assert err.count("SIGINT: stopping behind this step") == 1, "the first process speaks, and it alone"
            assert "stopped; the same command goes on from here" in err
    last = start(home, "-m", "engine", "run", "train.json")
    out, err = last.communicate(timeout=100)
    assert last.returncode == 0, err
    assert " of them earlier)" in out
    assert out.count("loss of the last step") == 1
    _, err = whole.communicate(timeout=100)
    assert whole.returncode == 0, err
    assert [line["step"] for line in lines(home / "run") if "loss" in line] == list(range(1, TOTAL + 1))
    assert [line for line in lines(home / "run") if "loss" in line] == [
        line for line in lines(home / "whole") if "loss" in line
    ]
    assert lines(home / "run")[-1] == lines(home / "whole")[-1], "the figures"


def test_steps_are_those_of_one_process(home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A batch is cut evenly; saving, loading and evaluating are of all; what cannot be mirrored is told."""
    two = Engine(document(home, "plain", output=str(tmp_path)))
    assert not worker_pids(os.getpid()), "inference needs none"
    assert two.global_step == 0
    one = Engine(document(home, "plain", output=str(tmp_path), processes=1))
    one.model.load_state_dict(two.model.state_dict())
    batches = [batch(8, seed) for seed in range(4)]
    wanted = [float(one.train_batch(each)) for each in batches]
    parts = [{name: value[at : at + 2] for name, value in batches[1].items()} for at in range(0, 8, 2)]
    given = [batches[0], parts, iter([{k: v[at : at + 2] for k, v in batches[2].items()} for at in range(0, 8, 2)])]
    found = [float(two.train_batch(each)) for each in [*given, transformers.BatchEncoding(batches[3])]]
    assert found == pytest.approx(wanted, rel=1e-5)
    assert two.global_step == 4
    (worker,) = worker_pids(os.getpid())
    batch_error = r"2 micro-batches of 2 rows in each of 2 processes \(\$.training: 8 in all\), got 2"
    for call, said in (
        (lambda: two.train_batch(batch(4, 0)), batch_error),
        (lambda: two.train_batch([{"x": object()}] * 4), "holds tensors, numbers and texts, got object"),
        (lambda: two(batch(2, 0)), "processes is 2, and the other .* torchrun; engine.eval"),
        (lambda: two.backward(torch.zeros(())), r"backward\(\): .* torchrun"),
        (lambda: two.step(), r"step\(\): .* torchrun"),
        (lambda: two.fit([batch(1, 0)]), r"fit\(\) with a dataset: .* torchrun; or name files"),
        (lambda: two.evaluate([batch(1, 0)]), r"evaluate\(\) of a dataset: .* torchrun"),
        (lambda: two.load_checkpoint(tmp_path / "nowhere"), "nowhere: no such directory"),
    ):
        with pytest.raises(SlipstreamError, match=said):
            call()  # type: ignore[no-untyped-call]
    os.kill(worker, signal.SIGINT)  # a terminal's Ctrl-C: the first process decides
    assert two.evaluate()
    assert worker_pids(os.getpid()) == [worker], "an error that all meet alike ends nothing"
    two.save_checkpoint()
    figures = two.evaluate()
    with torch.no_grad():
        for parameter in two.model.parameters():
            parameter.zero_()  # the workers have to learn of it
    assert two.evaluate()["accuracy"] in (9 / 21, 12 / 21) != figures["accuracy"]
    assert two.load_checkpoint() == 4
    assert two.evaluate() == figures
    two.eval()
    assert two.classify(["moon sea"])[0][0].label in ("a", "b")
    two.model.requires_grad_(False)
    with pytest.raises(EngineError, match=r"the model has changed since .* torchrun"):
        two.train_batch(batches[0])
    assert one.load_checkpoint() == 4, "one process goes on from there"
    assert one.evaluate() == pytest.approx(figures)
    assert not worker_pids(os.getpid()), "a process has one process group"
    with pytest.raises(EngineError, match="another engine began to train"):
        two.evaluate()


def test_a_worker_that_fails_shows_why(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception while the first process waits for it in an exchange; then kill -9; then one that cannot start."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(home / "breaks"), PYTHONPATH]))
    monkeypatch.setenv("BREAK", "run")
    engine = Engine(document(home, output=str(tmp_path)))
    begun = time.monotonic()
    with pytest.raises(WorkerFailed, match=r"rank 1 failed with ValueError: this worker is broken") as error:
        engine.fit()
    assert 'sitecustomize.py", line' in str(error.value), "its own traceback"
    assert "in train_batch" in str(error.value)
    assert time.monotonic() - begun < 40
    with pytest.raises(EngineError, match=r"have ended \(rank 1 failed with ValueError: .* build it anew"):
        engine.evaluate()
    assert engine.classify(["moon sea"]), "inference goes on"
    monkeypatch.delenv("BREAK")
    engine = Engine(document(home, output=str(tmp_path), max_steps=10**6, checkpoint_every=None))
    killer = threading.Thread(target=lambda: kill_in_the_midst(tmp_path))
    killer.start()
    with pytest.raises(WorkerFailed, match=r"rank 1 failed: its process \d+ was ended by SIGKILL"):
        engine.fit()
    killer.join()
    monkeypatch.setenv("BREAK", "start")
    engine = Engine(document(home, output=str(tmp_path)))
    with pytest.raises(WorkerFailed, match=r"rank 1 failed with ModuleNotFoundError: .*transformers") as error:
        engine.evaluate()
    assert "Traceback" in str(error.value)


def test_a_worker_that_stands_still_is_named(home: Path, tmp_path: Path) -> None:
    """By the exchange's timeout, and it is ended with the others."""
    engine = Engine(document(home, output=str(tmp_path), max_steps=10**6, exchange_timeout=3.0))
    stopper = threading.Thread(target=lambda: kill_in_the_midst(tmp_path, signal.SIGSTOP))
    stopper.start()
    with pytest.raises(WorkerFailed, match=r"rank 1 does not answer: standing still, or slower than \$.training.exch"):
        engine.fit()
    raised = time.monotonic()
    stopper.join()
    assert raised - stopped[0] < 3 + 3 + 5, "the timeout, the time to ask, and a busy machine"
    wait_for(lambda: not worker_pids(os.getpid()), 10)


#: When a worker was last killed, or stopped.
stopped: list[float] = []


def kill_in_the_midst(output: Path, number: signal.Signals = signal.SIGKILL) -> None:
    """Kills the worker once the run, which goes on from a checkpoint or begins, has made steps."""
    metrics = output / "metrics.jsonl"
    before = metrics.stat().st_size if metrics.exists() else 0
    wait_for(metrics.exists)
    wait_for(lambda: metrics.stat().st_size > before + 2000)
    stopped[:] = [time.monotonic()]
    os.kill(worker_pids(os.getpid())[0], number)


#: How a script ends: within a call, where the worker waits for it in an exchange, and behind one, where it is idle.
ENDS = {
    "raise": """
step = torch.optim.AdamW.step
def broken(*args, **kwargs):
    if engine.global_step == 1:
        tell()
        raise ValueError("my own")
    return step(*args, **kwargs)
torch.optim.AdamW.step = broken
engine.fit()
""",
    "kill": "engine.fit(); tell(); os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_script_that_ends_leaves_no_worker(home: Path, tmp_path: Path, how: str) -> None:
    """Nor is it imported again: it has no ``if __name__``."""
    config = document(home, output=str(tmp_path / "run"), max_steps=3)
    script = f"""
import os, psutil, signal, torch
from engine import Engine
engine = Engine({config!r})
def tell():
    print(*(child.pid for child in psutil.Process().children()), flush=True)
{ENDS[how]}
"""
    (tmp_path / "script.py").write_text(script, encoding="utf-8")
    run = start(tmp_path, "script.py")
    out, err = run.communicate(timeout=60)
    (worker,) = map(int, out.split())
    wait_for(partial(is_gone, worker), 10)
    if how == "kill":
        assert run.returncode == -signal.SIGKILL
    else:
        assert run.returncode == 1
        assert err.rstrip().splitlines()[-1] == "ValueError: my own", "without a rank before it"


def test_the_first_failure_is_told() -> None:
    """Not the echo of it that others met in the exchange."""
    met: dict[str, Any] = {"event": "failed", "type": "RuntimeError", "user_error": False, "traceback": "Traceback"}
    echo = {**met, "text": "Connection closed", "exchange": True}
    own = {**met, "text": "my own", "exchange": False}
    user = {**own, "text": "one line", "user_error": True}
    gone = {"event": "ended", "text": "SIGKILL"}
    assert str(first_failure([(1, echo), (2, own)])) == "rank 2 failed with RuntimeError: my own\nTraceback"
    assert str(first_failure([(1, echo), (2, user)])) == "rank 2 failed: one line"
    assert str(first_failure([(1, echo), (3, own), (2, gone)])) == "rank 2 failed: SIGKILL"
    assert str(first_failure([(1, echo)])).startswith("rank 1 failed with RuntimeError: Connection closed")


def test_numbers_that_contradict_and_what_is_told_before(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All is said without a process."""
    from engine.cli import main

    assert main(["run", str(home / "train.json"), "--dry-run", "--set", "training.data_parallel=shard"]) == 0
    assert "a step is 8 samples: 2 micro-batches of 2 in each of 2 processes" in capsys.readouterr().out
    assert main(["explain", str(home / "train.json"), "--set", "training.processes=auto"]) == 0
    said = capsys.readouterr().out
    assert '$.training.processes: "auto" is 1: on a CPU' in said
    assert "4 micro-batches of 2 in each of 1 processes" in said
    with pytest.raises(EngineError, match=r"model=, loss_function=: \$.training.processes is 2, .* torchrun"):
        Engine(document(home), model=torch.nn.Linear(2, 2), loss_function=lambda outputs, batch: outputs)
    with pytest.raises(SlipstreamError, match=r"9 is no multiple of 3 \(micro_batch_size\) x 2 \(processes\)"):
        Engine(document(home, train_batch_size=9, micro_batch_size=3))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(EngineError, match=r"\$.training.processes: 2, but 4 were started"):
        Engine(document(home))
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(EngineError, match=r"\$.training.processes: 2 processes need a GPU each, and 1 are visible"):
        Engine({**document(home), "device": "cuda"})
    with pytest.raises(EngineError, match=r'need a GPU each, but \$.device is "cuda:0"'):
        Engine({**document(home), "device": "cuda:0"})
    assert not workers.live()
