"""Workers as real processes: one that crashes, hangs, chatters or runs late costs its own rows and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engine.bench.job import Job
from engine.bench.pool import OUT_OF_TIME, Outcome, Pool, Watch, command
from tests.engine.bench.samples import job, player

GOOD = """
ready()
for index in range(len(cases)):
    measure(index)
say(event="done")
"""


def errors(outcome: Outcome) -> dict[int, str]:
    """Batch to error; batches that were measured are left out."""
    cases = outcome.job.cases
    return {cases[index].batch: result.error for index, result in outcome.results.items() if result.error}


def measured(outcome: Outcome) -> dict[int, tuple[float, ...]]:
    """Batch to samples."""
    return {outcome.job.cases[index].batch: result.ms for index, result in outcome.results.items() if result.ms}


def gone_at_once(pid: int) -> bool:
    """Whether the process has ended (who has to reap it is not our concern)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def gone(pid: int) -> bool:
    """The same, within some seconds."""
    for _ in range(100):
        if gone_at_once(pid):
            return True
        time.sleep(0.05)
    return False


def test_a_worker_measures_every_case() -> None:
    seen: list[str] = []

    class Listener(Watch):
        def measuring(self, name: str, cases: int) -> None:
            seen.append(f"{name} {cases}")

        def measured(self, text: str) -> None:
            seen.append(text)

    (outcome,) = Pool(start=player(GOOD), watch=Listener()).measure([job(1, 4)])
    assert measured(outcome) == {1: (1.0, 1.0, 9.0), 4: (1.0, 4.0, 9.0)}
    assert (outcome.name, outcome.versions) == ("played", "Python 0")
    assert seen == ["played 2", "1 ms", "4 ms"]


def test_what_a_library_prints_is_no_event() -> None:
    (outcome,) = Pool(start=player("print('Welcome to 3 GPUs!', flush=True)" + GOOD)).measure([job(1)])
    assert measured(outcome) == {1: (1.0, 1.0, 9.0)}


def test_a_crash_costs_its_case_and_the_others_get_a_new_process() -> None:
    script = """
ready()
for index, case in enumerate(cases):
    if case["batch"] == 4:
        say(event="case", case=index)
        print("loading\\nillegal memory access", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGSEGV)
    measure(index)
say(event="done")
"""
    (outcome,) = Pool(start=player(script)).measure([job(1, 4, 8, 16)])
    assert errors(outcome) == {4: "crashed (SIGSEGV): illegal memory access"}
    assert sorted(measured(outcome)) == [1, 8, 16]


def test_a_crash_ahead_of_every_case_is_told_of_all() -> None:
    script = "sys.exit('no such device')"
    (outcome,) = Pool(start=player(script)).measure([job(1, 4)])
    assert errors(outcome) == dict.fromkeys((1, 4), "crashed (exit code 1): no such device")


def test_a_worker_that_ends_with_work_undone_is_not_started_for_ever() -> None:
    (outcome,) = Pool(start=player("say(event='done')")).measure([job(1, 4)])
    assert errors(outcome) == dict.fromkeys((1, 4), "it ended without a result")


def test_one_that_hangs_is_stopped_with_all_it_has_started(tmp_path: Path) -> None:
    script = """
child = subprocess.Popen(["sleep", "600"])
with open(sys.argv[1], "w") as file:
    file.write(f"{os.getpid()} {child.pid}")
ready()
measure(0)
say(event="case", case=1)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""
    pids = tmp_path / "pids"
    start = time.monotonic()
    (outcome,) = Pool(timeout=2, start=player(script, str(pids))).measure([job(1, 4, 8)])
    assert time.monotonic() - start < 60
    silence = "no sign of life for 2 s, stopped"
    assert errors(outcome) == {4: silence, 8: f"not measured: at batch 4 there was {silence}"}
    assert sorted(measured(outcome)) == [1]
    assert all(gone(int(pid)) for pid in pids.read_text().split())


def test_the_deadline_gives_up_what_is_not_ready_and_measures_the_rest() -> None:
    script = (
        """
if job["runner"] == "inductor":
    say(event="case", case=0)
    time.sleep(600)
"""
        + GOOD
    )
    pool = Pool(start=player(script), deadline=time.monotonic() + 6, spare=4)
    slow, quick = pool.measure([job(1, 4, runner="inductor"), job(1, 4)])
    assert errors(slow) == dict.fromkeys((1, 4), OUT_OF_TIME)
    assert sorted(measured(quick)) == [1, 4]


def test_a_program_that_is_none_leaves_no_process(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Pool(start=lambda python: [str(tmp_path / "none")]).measure([job(1)])


def test_a_survey_that_breaks_says_how() -> None:
    with pytest.raises(RuntimeError, match=r"survey of the model: crashed \(exit code 3\)"):
        Pool(start=lambda python: [sys.executable, "-c", "import sys; sys.exit(3)"]).survey([])


def test_a_job_travels_as_json() -> None:
    sent = job(1, 4, runner="slipstream", kernels="eager")
    assert Job.from_json(sent.to_json()) == sent
    assert sent.label == "eager"


def test_a_worker_ends_when_its_parent_is_killed() -> None:
    """Nobody is left to kill it then, and its stdin is open still: it looks for itself."""
    script = f"import subprocess, time; p = subprocess.Popen({command()!r}, start_new_session=True); "
    script += "print(p.pid, flush=True); time.sleep(600)"
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    time.sleep(1.5)  # it looks for its parent's number when it starts
    assert not gone_at_once(worker)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert gone(worker)
    assert parent.stdin is not None
    parent.stdin.close()
