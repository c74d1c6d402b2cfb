"""Links are shaped in both directions, and nothing of a network stays, however its run ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import netns
from benchmarks.netns import NAMES, Network, NetworkError, bits_per_second, clean
from tests.conftest import ROOT

RECEIVE = """import socket, sys
s = socket.create_server(("", int(sys.argv[1]))); print("ready", flush=True); c, _ = s.accept()
while c.recv(1 << 16): pass
c.sendall(b"x")"""
SEND = """import socket, sys, time
c = socket.create_connection((sys.argv[1], int(sys.argv[2]))); start = time.perf_counter()
c.sendall(bytes(int(sys.argv[3]))); c.shutdown(socket.SHUT_WR); c.recv(1); print(start, time.perf_counter())"""
#: A shell's background job has SIGINT ignored, and hands that on.
HOLD = """import signal
from benchmarks.netns import Network
signal.signal(signal.SIGINT, signal.default_int_handler)
with Network(2, "100mbit") as n:
    p = n.start(0, ["sleep", "60"]); print(n.run, p.pid, flush=True); p.wait()"""


@pytest.mark.parametrize(("rate", "bits"), [("100mbit", 1e8), ("2.5gbit", 2.5e9), ("8KBIT", 8e3)])
def test_rates(rate: str, bits: float) -> None:
    assert bits_per_second(rate) == bits


@pytest.mark.parametrize("rate", ["", "100", "0mbit", "-1mbit", "1mbyte"])
def test_a_wrong_rate_is_refused(rate: str) -> None:
    with pytest.raises(NetworkError, match="like 100mbit"):
        bits_per_second(rate)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(NetworkError, match="need root"):
        netns.check_machine()
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NetworkError, match="apt install iproute2"):
        netns.check_machine()


@pytest.mark.netns
@pytest.mark.parametrize("flows", [[(0, 2), (1, 2)], [(0, 1), (0, 2)]], ids=["into one", "out of one"])
def test_a_link_is_shaped(flows: list[tuple[int, int]]) -> None:
    """The reply comes when all has arrived, so that no more than the rate can be seen."""
    size, python = 1_000_000, [sys.executable, "-SEc"]
    with Network(3, "50mbit") as network:
        for port, (_, to) in enumerate(flows):
            receiver = network.start(to, [*python, RECEIVE, str(5000 + port)], stdout=subprocess.PIPE)
            assert receiver.stdout is not None
            receiver.stdout.readline()
        senders = [
            network.start(by, [*python, SEND, network.addresses[to], str(5000 + at), str(size)], stdout=subprocess.PIPE)
            for at, (by, to) in enumerate(flows)
        ]
        times = [[float(word) for word in sender.communicate(timeout=30)[0].split()] for sender in senders]
        seconds = max(end for _, end in times) - min(start for start, _ in times)
        counted = network.counters()
    assert 2 * size * 8 / seconds <= 50e6
    assert sum(one.sent for one in counted) >= 2 * size


@pytest.mark.netns
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_stays(number: signal.Signals) -> None:
    held = subprocess.Popen([sys.executable, "-c", HOLD], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert held.stdout is not None
    run, pid = held.stdout.readline().decode().split()
    assert run not in clean(), "a living run's"
    held.send_signal(number)
    held.wait(20)  # not for its pipes: where it is killed at once, what it started may hold them until clean()
    if number == signal.SIGKILL:
        assert run in clean()
    assert not list(NAMES.glob(f"{run}-*"))
    assert not (netns.LOCKS / run).exists()
    held.communicate(timeout=20)
    deadline = time.monotonic() + 5
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():  # a zombie's is empty
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.netns
def test_nothing_stays_after_an_exception() -> None:
    with pytest.raises(KeyError), Network(1, None) as network:
        raise KeyError
    assert not list(NAMES.glob(f"{network.run}-*"))
