"""A link between hosts is cut in the midst of compressed training: all say who does not answer, nobody hangs, and the
run goes on from its checkpoint as if nothing had been."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.netns import INTERFACE, Network
from engine.errors import is_of_exchange
from engine.training.checkpoint_files import check, list_saved
from tests.conftest import PYTHONPATH
from tests.engine.training import cut_link
from tests.engine.training.test_workers import has_steps, lines, wait_for

#: Seconds, beside an exchange's, for all to find out who is gone and to say so; and to end then, on a busy machine.
ASK, END = 8.0, 20.0
#: More than a run makes before its link is cut, and how many it makes when it goes on.
MANY, MORE = 10**6, 20


def link(network: Network, host: int, state: str) -> None:
    """Takes a host's interface down or up: no packet tells the others."""
    subprocess.run(["ip", "-n", network.names[host], "link", "set", INTERFACE, state], check=True)


PIPES: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def environment(rank: int, size: int, address: str, port: int, **more: str) -> dict[str, str]:
    """As torchrun sets it."""
    given = {
        "RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_ADDR": address, "MASTER_PORT": port,
        "OMP_NUM_THREADS": 1, "PYTHONPATH": PYTHONPATH, **more,
    }  # fmt: skip
    return {**os.environ, **{name: str(value) for name, value in given.items()}}


def begin(network: Network, *arguments: str) -> list[subprocess.Popen[str]]:
    """The script on all hosts."""
    size, address = len(network.names), network.addresses[0]
    argv = [sys.executable, cut_link.__file__, *arguments]
    return [
        network.start(rank, argv, environment(rank, size, address, 29500, GLOO_SOCKET_IFNAME=INTERFACE), **PIPES)
        for rank in range(size)
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> list[tuple[int, str]]:
    """What each has come to and said, for which all have so long together."""
    last = time.monotonic() + seconds
    said = [process.communicate(timeout=max(last - time.monotonic(), 0.1))[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


def raised(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    """What each has come to and why, once one of them has gone: soon enough."""
    gone = time.monotonic()
    said = [(code, text.split(" ", 1)) for code, text in ended(processes, cut_link.TIMEOUT + ASK + END)]
    assert all(float(when) - gone < cut_link.TIMEOUT + ASK for _, (when, _) in said), said
    return [(code, why) for code, (_, why) in said]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 5000ms for recv", True),
        ("Application timeout caused pair closure", True),
        ("mat1 and mat2 shapes cannot be multiplied (2x6 and 5x6)", False),
    ],
)
def test_what_is_of_an_exchange(text: str, wanted: bool) -> None:
    """Gloo's words are all that tells; torch's own errors of the network have a class."""
    assert is_of_exchange(RuntimeError(text)) == wanted
    assert is_of_exchange(torch.distributed.DistNetworkError(text))


@pytest.mark.netns
@pytest.mark.parametrize(
    ("hosts", "cut", "kind", "seen"),
    [(2, 0, "OneBitLamb", ["rank 1"]), (3, 2, "OneBitAdam", ["rank 2", "rank 2"])],
    ids=["the store's host", "another of three"],
)
def test_a_cut_link(tmp_path: Path, hosts: int, cut: int, kind: str, seen: list[str]) -> None:
    """Whoever reaches the store names whom it does not hear of (``seen``, from the first rank on); others, the store's
    host. With two hosts the run then goes on, and another one never stops."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    with Network(hosts, "10mbit") as network:
        processes = begin(network, kind, str(MANY), str(run))
        wait_for(partial(has_steps, run / "metrics.jsonl", 12))
        link(network, cut, "down")
        said = raised(processes)
        saved = list_saved(run / "checkpoints")[-1]
        last = saved.step
        assert check(saved, deep=True), "it is whole"
        link(network, cut, "up")
        again = ended(begin(network, kind, str(last + MORE), str(run), str(whole)), 60) if hosts == 2 else []
    beyond = (
        f"rank 0 does not answer, nor does the store of the processes at {network.addresses[0]}: gone, or behind a cut "
        "link, which may be this host's own"
    )
    wanted = [f"{one} does not answer: gone, standing still, or behind a cut link" for one in seen]
    wanted += [beyond] * (hosts - len(seen))
    assert said == [(2, f"rank {rank} ends because {why}\n") for rank, why in enumerate(wanted)]
    assert last >= 10
    assert last % 5 == 0
    if hosts == 2:
        assert again == [(0, "")] * 2
        assert len(lines(whole)) == last + MORE
        assert lines(run) == lines(whole)


@pytest.mark.parametrize(("number", "loop"), [(signal.SIGKILL, "run"), (signal.SIGSTOP, "-")], ids=["gone", "stopped"])
def test_a_process_that_does_not_answer(tmp_path: Path, number: signal.Signals, loop: str) -> None:
    """In a run, and in a loop of one's own, with nobody to watch the processes from outside."""
    output = str(tmp_path / "run") if loop == "run" else loop
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, cut_link.__file__, "OneBitAdam", str(MANY), output]
    one, other = (subprocess.Popen(argv, env=environment(rank, 2, "127.0.0.1", port), **PIPES) for rank in range(2))
    try:
        if loop == "run":
            wait_for(partial(has_steps, tmp_path / "run" / "metrics.jsonl", 12))
        else:
            assert one.stdout is not None
            assert one.stdout.readline() == "signs\n"
        other.send_signal(number)
        said = raised([one])
    finally:
        for process in (one, other):
            process.kill()
            process.communicate()
    assert said == [(2, "rank 0 ends because rank 1 does not answer: gone, standing still, or behind a cut link\n")]
