"""One worker process as the process that trains with it sees it: :mod:`engine.worker` is what runs in it.

What is said to it goes to its stdin: a line of JSON, then as many bytes as the line says. It answers with events on its
stdout, a line of JSON each. What it writes to stderr is passed on. Its stdin's end is its end: it ends with us, however
we end.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

MODULE = "engine.worker"
#: Where the packages lie that the worker needs.
ROOT = Path(__file__).resolve().parents[2]
#: Seconds for a process whose stdin or stdout has ended to end as well.
GRACE = 3.0
#: Lines of its stderr that are kept, to be shown where it ends without a word.
KEPT = 60

#: Is told each event of a worker: its rank, and what it said. The last event is "ended".
Listener = Callable[[int, Mapping[str, Any]], None]


class WorkerProcess:
    """Starts a worker in ``directory`` and listens to it; ``listener`` is called from a thread."""

    def __init__(self, rank: int, directory: str, listener: Listener) -> None:
        paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
        self.rank, self._listener = rank, listener
        self._tail: deque[str] = deque(maxlen=KEPT)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=directory,
            env=environment,
        )
        self._errors = Thread(target=self._pass_on, name=f"slipstream-stderr-{rank}", daemon=True)
        self._errors.start()
        Thread(target=self._listen, name=f"slipstream-worker-{rank}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def say(self, line: Mapping[str, Any], body: bytes = b"") -> None:
        """Sends a line, with bytes behind it. Of one that is dead already the listener hears."""
        stdin = self._process.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):
            stdin.write(json.dumps({**line, "bytes": len(body)}).encode() + b"\n" + body)
            stdin.flush()

    def leave(self) -> None:
        """Lets it end: its stdin ends."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def end(self, seconds: float = 0.0) -> None:
        """Ends it at once if it has not by itself within ``seconds``."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _listen(self) -> None:
        stdout = self._process.stdout
        assert stdout is not None
        for line in stdout:
            with contextlib.suppress(ValueError):
                self._listener(self.rank, json.loads(line))
        self.end(GRACE)
        self._listener(self.rank, {"event": "ended", "text": self._why()})

    def _why(self) -> str:
        code = self._process.returncode
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            hint = ", as the system does where memory runs out" if -code == signal.SIGKILL else ""
            how = f"{name}{hint}"
        else:
            how = f"exit code {code}"
        self._errors.join(GRACE)
        said = "".join(self._tail).rstrip()
        return f"its process {self.pid} was ended by {how}" + (f"; it said\n{said}" if said else "")

    def _pass_on(self) -> None:
        stderr = self._process.stderr
        assert stderr is not None
        for line in stderr:
            text = line.decode(errors="replace")
            self._tail.append(text)
            with contextlib.suppress(ValueError, OSError):  # ours may be closed
                sys.stderr.write(text)
                sys.stderr.flush()
