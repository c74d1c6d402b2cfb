"""What a run of the suite says about itself: minutes per package against a limit, and what was not run and why.

``--max-minutes=N`` prints the table and fails the run when it took longer on the clock. Tests marked ``gpu``,
``multigpu``, ``netns`` or ``browser`` are skipped where the machine lacks what they need; the summary counts them by
marker and reason. Works with and without xdist: workers skip, the controller counts from the reports that reach it.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest


def _cuda_devices() -> int:
    import torch  # only when a test asks for a GPU: importing it takes seconds

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _lacks_gpu() -> str | None:
    return None if _cuda_devices() >= 1 else "no CUDA GPU here (run `make test-gpu` where there is one)"


def _lacks_two_gpus() -> str | None:
    found = _cuda_devices()
    return None if found >= 2 else f"{found} CUDA GPUs here, 2 needed (run `make test-gpu` where there are)"


def _lacks_namespaces() -> str | None:
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        return "no `ip` or `unshare` here (Debian: apt install iproute2 util-linux)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    tried = subprocess.run(["unshare", "--net", "true"], capture_output=True, text=True, check=False)
    return None if tried.returncode == 0 else f"this machine makes no network namespace: {tried.stderr.strip()}"


def _lacks_browser() -> str | None:
    found = shutil.which("chromium") and shutil.which("chromedriver")
    return (
        None
        if found
        else "no Chromium with its driver here (`make browser`, or on Debian: apt install chromium-driver)"
    )


# Marker -> why its tests cannot run on this machine, or None where they can.
REQUIREMENTS: dict[str, Callable[[], str | None]] = {
    "gpu": _lacks_gpu,
    "multigpu": _lacks_two_gpus,
    "netns": _lacks_namespaces,
    "browser": _lacks_browser,
}

# How a worker tells the controller a test's markers: a report's keywords also hold the names of folders and files.
PROPERTY = "house_marker"


@functools.cache
def reason_not_to_run(marker: str) -> str | None:
    """Why tests with this marker cannot run here, or None; asked once a process."""
    return REQUIREMENTS[marker]()


def package_of(nodeid: str) -> str:
    """``tests/ops`` for ``tests/ops/eager/test_x.py::test_y``, ``tests`` for a file right inside tests."""
    folders = nodeid.split("::", 1)[0].split("/")[:-1]
    return "/".join(folders[:2]) or "."


@dataclass
class Tally:
    """What the reports of one run add up to."""

    seconds: Counter[str] = field(default_factory=Counter)
    tests: Counter[str] = field(default_factory=Counter)
    marked: Counter[str] = field(default_factory=Counter)
    not_run: Counter[tuple[str, str]] = field(default_factory=Counter)

    def add(self, report: pytest.TestReport) -> None:
        """Count one phase (setup, call or teardown) of one test."""
        package = package_of(report.nodeid)
        markers = [str(marker) for name, marker in report.user_properties if name == PROPERTY]
        self.seconds[package] += report.duration
        if report.when == "setup":
            self.tests[package] += 1
            self.marked.update(markers)
        if report.skipped and not hasattr(report, "wasxfail"):
            self.not_run.update((marker, skip_reason(report)) for marker in markers)

    def package_lines(self) -> list[str]:
        """One line a package, the slowest first, minutes summed over the workers."""
        width = max((len(name) for name in self.seconds), default=0)
        return [
            f"{name:<{width}}  {seconds / 60:6.2f} min  {self.tests[name]:5d} tests"
            for name, seconds in self.seconds.most_common()
        ]

    def marker_lines(self, markers: Sequence[str]) -> list[str]:
        """For each marker: how many of its tests were not run, and why."""
        lines = []
        for marker in markers:
            reasons = [(reason, count) for (name, reason), count in sorted(self.not_run.items()) if name == marker]
            total = self.marked[marker]
            lines += [f"{marker}: {count} of {total} tests not run: {reason}" for reason, count in reasons]
            if not reasons:
                lines.append(f"{marker}: all {total} tests run" if total else f"{marker}: no tests in this run")
        return lines


def skip_reason(report: pytest.TestReport) -> str:
    """The words given to ``pytest.skip``, without the file and line before them."""
    longrepr = report.longrepr
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


class HouseReport:
    """Lives in the process that the user started: counts reports, prints the summary, enforces the limit."""

    def __init__(self, max_minutes: float | None) -> None:
        self.max_minutes = max_minutes
        self.tally = Tally()
        self.started = time.monotonic()
        self.elapsed_minutes = 0.0

    @property
    def too_slow(self) -> bool:
        """Whether the run took longer than it may."""
        return self.max_minutes is not None and self.elapsed_minutes > self.max_minutes

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Count a report."""
        self.tally.add(report)

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail a run that passed but took too long."""
        self.elapsed_minutes = (time.monotonic() - self.started) / 60
        if self.too_slow and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """Print what was not run; with a limit, also the minutes and the markers whose tests all ran."""
        whole = self.max_minutes is not None
        markers = [name for name in REQUIREMENTS if whole or any(key[0] == name for key in self.tally.not_run)]
        if markers:
            terminalreporter.section("not run on this machine")
            for line in self.tally.marker_lines(markers):
                terminalreporter.line(line)
        if self.max_minutes is not None:
            terminalreporter.section("minutes per package")
            for line in self.tally.package_lines():
                terminalreporter.line(line)
            verdict = "TOO SLOW" if self.too_slow else "within the limit"
            terminalreporter.line(
                f"on the clock {self.elapsed_minutes:.2f} min of {self.max_minutes:g}: {verdict}",
                red=self.too_slow,
                green=not self.too_slow,
            )


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--max-minutes``."""
    parser.addoption(
        "--max-minutes", type=float, default=None, help="print minutes per package; fail if the run takes longer"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the report in the process the user started, not in xdist's workers; declare the markers."""
    for marker in REQUIREMENTS:
        config.addinivalue_line("markers", f"{marker}: see tests/plugins/house_report.py")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(HouseReport(config.getoption("--max-minutes")), "house-report")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Note each test's markers, and skip what this machine cannot run."""
    for item in items:
        for marker in REQUIREMENTS:
            if item.get_closest_marker(marker) is None:
                continue
            item.user_properties.append((PROPERTY, marker))
            if reason := reason_not_to_run(marker):
                item.add_marker(pytest.mark.skip(reason=reason))
