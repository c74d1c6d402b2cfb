"""A link between hosts is cut in the midst of compressed training: all say who does not answer, nobody hangs, and the
run goes on from its checkpoint as if nothing had been."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks.netns import INTERFACE, Network
from engine.training.checkpoint import Checkpoints
from tests.conftest import PYTHONPATH
from tests.engine.training.test_workers import document, has_steps, lines, prepared, wait_for

#: Seconds of an exchange, and those that the survivors have to find out who is gone, to say so and to end.
TIMEOUT, END = 4.0, 10.0
STEPS, RATE = 40, "10mbit"


def link(network: Network, host: int, state: str) -> None:
    """Takes a host's interface down or up, as who stands before it does."""
    subprocess.run(["ip", "-n", network.names[host], "link", "set", INTERFACE, state], check=True)


def begin(network: Network, home: Path, output: str) -> list[subprocess.Popen[str]]:
    """``slipstream run`` on all hosts."""
    found, hosts = [], len(network.names)
    for rank in range(hosts):
        given = {
            "RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": hosts, "MASTER_ADDR": network.addresses[0],
            "MASTER_PORT": 29500, "GLOO_SOCKET_IFNAME": INTERFACE, "OMP_NUM_THREADS": 1, "PYTHONPATH": PYTHONPATH,
        }  # fmt: skip
        environment = {**os.environ, **{name: str(value) for name, value in given.items()}}
        argv = [sys.executable, "-m", "engine", "run", "train.json", "--set", f"training.output={home / output}"]
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": home}
        found.append(network.start(rank, argv, environment, **pipes))
    return found


def errors(processes: list[subprocess.Popen[str]], seconds: float) -> list[str]:
    """What each says of slipstream's at its end, for which all have so long."""
    last = time.monotonic() + seconds
    said = [process.communicate(timeout=max(last - time.monotonic(), 0.1))[1] for process in processes]
    return ["\n".join(line for line in text.splitlines() if line.startswith("slipstream: error")) for text in said]


def prepare(home: Path, kind: str, hosts: int) -> None:
    """A classifier's directory and a configuration whose variance stands from step 4 on."""
    prepared(home)
    sizes = {"train_batch_size": 2 * hosts, "micro_batch_size": 2}
    given = document(home, max_steps=STEPS, checkpoint_every=5, exchange_timeout=TIMEOUT, **sizes)
    del given["training"]["processes"]
    given["optimizer"] = {"type": kind, "lr": 0.01, "freeze_step": 4}
    (home / "train.json").write_text(json.dumps(given), encoding="utf-8")


@pytest.mark.netns
@pytest.mark.parametrize(
    ("hosts", "cut", "kind", "seen"),
    [(2, 0, "OneBitLamb", ["rank 1"]), (3, 2, "OneBitAdam", ["rank 2", "rank 2"])],
    ids=["the store's host", "another of three"],
)
def test_a_cut_link(tmp_path: Path, hosts: int, cut: int, kind: str, seen: list[str]) -> None:
    """Whoever reaches the store names whom it does not hear of (``seen``, from the first rank on); others, the store's
    host. With two hosts the run then goes on, beside one that never stopped."""
    prepare(tmp_path, kind, hosts)
    others: list[list[str]] = []
    with Network(hosts, RATE) as network:
        run = begin(network, tmp_path, "run")
        wait_for(partial(has_steps, tmp_path / "run" / "metrics.jsonl", 12))
        link(network, cut, "down")
        said = errors(run, TIMEOUT + END)
        assert [process.returncode for process in run] == [2] * hosts
        last = Checkpoints(tmp_path / "run" / "checkpoints").latest()
        link(network, cut, "up")
        if hosts == 2:
            others = [errors(begin(network, tmp_path, output), 60) for output in ("run", "whole")]
    where = network.addresses[0]
    beyond = (
        f"rank 0 does not answer, nor does the store of the processes at {where}: gone, or behind a cut link, which "
        "may be this host's own"
    )
    wanted = [f"{one} does not answer: gone, standing still, or behind a cut link" for one in seen]
    wanted += [beyond] * (hosts - len(seen))
    assert said == [f"slipstream: error: rank {rank} ends because {why}" for rank, why in enumerate(wanted)]
    assert last is not None
    assert last >= 10
    assert last % 5 == 0
    if hosts == 2:
        assert others == [[""] * 2] * 2
        assert len(lines(tmp_path / "whole")) == STEPS + 1, "and the figures"
        assert lines(tmp_path / "run") == lines(tmp_path / "whole")
