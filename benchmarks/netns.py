"""Hosts in network namespaces, joined by veth pairs and a bridge, links shaped by token buckets both ways.

    with Network(2, "100mbit") as network:
        process = network.start(0, ["ping", "-c1", network.addresses[1]])

The bridge lies in a namespace of its own: the machine's own network is not touched. Needs root, iproute2, util-linux.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config_schema import SlipstreamError

PREFIX, INTERFACE = "slownet", "eth0"
NAMES, LOCKS = Path("/run/netns"), Path("/run/slipstream-slownet")
#: A bucket holds what the rate gives in this time, at least so many bytes: what an idle link lets through at once.
BURST_SECONDS, LEAST_BURST = 200e-6, 16 * 1024
#: How long a packet may wait in a queue before it is dropped.
QUEUE = "50ms"
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_TOOLS = {"ip": "iproute2", "tc": "iproute2", "setpriv": "util-linux"}


class NetworkError(SlipstreamError):
    """The network cannot be made, or what ran in it failed."""


@dataclass(frozen=True)
class Counters:
    """Bytes through a host's interface. A large packet that the kernel has not cut yet counts its header once."""

    sent: int
    received: int


def bits_per_second(rate: str) -> float:
    """``100mbit``, ``2.5gbit`` ... as a number. Raises :class:`NetworkError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate.lower())
    if match is None or float(match[1]) == 0:
        raise NetworkError(f'rate: got "{rate}", wanted a number with kbit, mbit or gbit, like 100mbit')
    return float(match[1]) * _UNITS[match[2]]


def check_machine() -> None:
    """Raises :class:`NetworkError` where there is no root or a program is missing."""
    if os.geteuid() != 0:
        raise NetworkError("network namespaces need root: run this with sudo")
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            raise NetworkError(f"there is no `{tool}` here: install {package} (Debian: apt install {package})")


def _call(*command: str) -> str:
    # In a session of its own: a Ctrl-C in the terminal must not cut the tearing down short.
    done = subprocess.run(command, capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise NetworkError(f"`{' '.join(command)}` failed: {said}. {_remedy(command, said)}")
    return done.stdout


def _remedy(command: Sequence[str], said: str) -> str:
    if "Unknown device type" in said:
        return f"This kernel lacks {'veth' if 'veth' in command else 'bridge'}: modprobe it, or take another kernel"
    if "qdisc kind is unknown" in said:
        kind = "sch_netem, which --delay needs" if "netem" in command else "sch_tbf"
        return f"This kernel lacks {kind}: modprobe it, or take another kernel"
    return "In a container this needs --privileged; the kernel needs network namespaces"


class Network:
    """``hosts`` (1 to 250) namespaces, each with one link of ``rate`` both ways (None: not shaped); ``delay``: one way,
    as tc writes it, on the way out of a host (needs the kernel's netem). A context manager: all is made on entering and
    removed on leaving, also by an exception, SIGINT, SIGTERM or SIGHUP; what a killed run left, on the next entering.
    """

    def __init__(self, hosts: int, rate: str | None, delay: str | None = None) -> None:
        if not 1 <= hosts <= 250:
            raise NetworkError(f"hosts: got {hosts}, wanted 1 to 250")
        self._bits = None if rate is None else bits_per_second(rate)
        self._delay = delay
        run = f"{PREFIX}-{secrets.token_hex(4)}"
        self.run, self.switch = run, f"{run}-switch"
        self.names = [f"{run}-{host}" for host in range(hosts)]
        self.addresses = [f"10.77.0.{host + 1}" for host in range(hosts)]
        self._stack = ExitStack()

    def __enter__(self) -> Network:
        check_machine()
        clean()
        self._catch_signals()
        atexit.register(self.close)
        try:
            self._stack.callback(os.close, _lock(self.run))
            self._stack.callback(_remove, self.run)
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _catch_signals(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, _leave)
                self._stack.callback(signal.signal, number, signal.SIG_DFL)

    def _build(self) -> None:
        for name in [self.switch, *self.names]:
            _call("ip", "netns", "add", name)
            _call("ip", "-n", name, "link", "set", "lo", "up")
        _call("ip", "-n", self.switch, "link", "add", "switch", "type", "bridge")
        _call("ip", "-n", self.switch, "link", "set", "switch", "addrgenmode", "none", "up")
        for host, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            port = f"port{host}"
            peer = ["type", "veth", "peer", "name", INTERFACE, "netns", name]
            _call("ip", "-n", self.switch, "link", "add", port, *peer)
            # No IPv6: its packets would be counted.
            _call("ip", "-n", self.switch, "link", "set", port, "addrgenmode", "none", "master", "switch", "up")
            _call("ip", "-n", name, "link", "set", INTERFACE, "addrgenmode", "none", "up")
            _call("ip", "-n", name, "address", "add", f"{address}/24", "dev", INTERFACE)
            parent = ["root"]
            if self._delay is not None:
                netem = ["handle", "1:", "netem", "delay", self._delay, "limit", "100000"]
                _call("tc", "-n", name, "qdisc", "add", "dev", INTERFACE, "root", *netem)
                parent = ["parent", "1:1"]
            self._shape(name, INTERFACE, parent)
            self._shape(self.switch, port, ["root"])

    def _shape(self, name: str, interface: str, parent: Sequence[str]) -> None:
        if self._bits is not None:
            burst = max(LEAST_BURST, int(self._bits / 8 * BURST_SECONDS))
            bucket = ["tbf", "rate", f"{self._bits:.0f}bit", "burst", str(burst), "latency", QUEUE]
            _call("tc", "-n", name, "qdisc", "add", "dev", interface, *parent, *bucket)

    def start(
        self, host: int, argv: Sequence[str], env: Mapping[str, str] | None = None, **popen: Any
    ) -> subprocess.Popen[Any]:
        """Starts a program in a host, in a session of its own. It is killed where the thread that calls this ends."""
        inside = ["ip", "netns", "exec", self.names[host], "setpriv", "--pdeathsig", "KILL", "--", *argv]
        return subprocess.Popen(inside, env=env, start_new_session=True, **popen)

    def counters(self) -> list[Counters]:
        """Of every host's interface, since the network was made."""
        found = []
        for name in self.names:
            link = json.loads(_call("ip", "-n", name, "-s", "-j", "link", "show", INTERFACE))[0]["stats64"]
            found.append(Counters(link["tx"]["bytes"], link["rx"]["bytes"]))
        return found

    def close(self) -> None:
        """Kills what runs in the hosts and removes them. A signal meanwhile is taken when that is done."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            self._stack.close()
            atexit.unregister(self.close)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def _lock(run: str) -> int:
    """A lock that ends with the process, however it ends. Raises ``BlockingIOError`` where another holds it."""
    LOCKS.mkdir(mode=0o700, exist_ok=True)
    while True:
        file = os.open(LOCKS / run, os.O_CREAT | os.O_RDWR, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BaseException:
            os.close(file)
            raise
        if os.fstat(file).st_nlink:
            return file
        os.close(file)  # another removed the file in between


def _remove(run: str) -> None:
    for path in sorted(NAMES.glob(f"{run}-*")):
        deadline = time.monotonic() + 5
        while pids := _call("ip", "netns", "pids", path.name).split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if time.monotonic() > deadline:
                raise NetworkError(f"{path.name}: processes {', '.join(pids)} do not end")
            time.sleep(0.01)
        _call("ip", "netns", "delete", path.name)
    (LOCKS / run).unlink(missing_ok=True)


def clean() -> list[str]:
    """Removes what runs left that were killed; gives their names."""
    left = {path.name.rsplit("-", 1)[0] for path in NAMES.glob(f"{PREFIX}-*")}
    left |= {path.name for path in LOCKS.glob(f"{PREFIX}-*")}
    removed = []
    for run in sorted(left):
        try:
            lock = _lock(run)
        except BlockingIOError:
            continue
        try:
            _remove(run)
        finally:
            os.close(lock)
        removed.append(run)
    return removed
