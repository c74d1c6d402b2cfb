"""``python -m engine.worker``: a process that trains with the one that started it (engine/training/workers.py).

It reads from stdin: a line of JSON, then as many bytes as the line says; first its rank and the configuration, then
calls. Its events go to stdout, a line of JSON each; what else would be printed there goes to stderr.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import traceback
import warnings
from typing import TYPE_CHECKING, Any, BinaryIO, TextIO

if TYPE_CHECKING:
    from engine.engine import Engine

#: The calls of an engine that all processes make.
CALLS = frozenset({"fit", "evaluate", "train_batch", "save_checkpoint", "load_checkpoint", "save_pretrained"})

Message = tuple[dict[str, Any], bytes]


class Link:
    """To the process that started this one. Where that has gone, this one ends at once, whatever it is doing."""

    def __init__(self, stdin: BinaryIO, events: TextIO) -> None:
        self._stdin, self._events = stdin, events
        self._messages: queue.Queue[Message] = queue.Queue()
        threading.Thread(target=self._read, name="slipstream-link", daemon=True).start()

    def next(self) -> Message:
        """What it says next: the line, and the bytes behind it."""
        return self._messages.get()

    def tell(self, event: str, **facts: Any) -> None:
        """Tells it an event."""
        self._events.write(json.dumps({"event": event, **facts}) + "\n")
        self._events.flush()

    def failed(self, error: Exception) -> None:
        """Tells it what went wrong here, or that an exchange did because something went wrong elsewhere."""
        from config_schema import SlipstreamError
        from engine.errors import is_of_exchange

        text = str(error)
        self.tell(
            "failed",
            type=type(error).__name__,
            text=text,
            user_error=isinstance(error, SlipstreamError),
            exchange=is_of_exchange(error),
            traceback="".join(traceback.format_exception(error)),
        )

    def _read(self) -> None:
        while line := self._stdin.readline():
            message = json.loads(line)
            body = self._stdin.read(message["bytes"])
            if len(body) < message["bytes"]:
                break
            self._messages.put((message, body))
        os._exit(0)


def main() -> int:
    """Joins, and makes the calls that come until there is nobody to make them for."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C reaches all processes of a terminal: the first one decides
        signal.signal(number, signal.SIG_IGN)
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    link = Link(sys.stdin.buffer, events)
    try:
        engine = _engine(link.next()[0], link)
    except Exception as error:
        link.failed(error)
        return 1
    link.tell("ready")
    while True:
        line, body = link.next()
        try:
            _call(engine, line, body)
        except Exception as error:
            link.failed(error)
        else:
            link.tell("done")


def _engine(setup: dict[str, Any], link: Link) -> Engine:
    """The engine that the first process has, joined with it. This one does not speak."""
    warnings.simplefilter("ignore")
    logging.getLogger("slipstream").setLevel(logging.ERROR)
    os.environ.update(TRANSFORMERS_VERBOSITY="error", HF_HUB_VERBOSITY="error", HF_HUB_DISABLE_PROGRESS_BARS="1")
    rank, world = setup["rank"], setup["world"]
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))  # as torchrun says it
    import torch
    import torch.distributed as dist

    from engine.engine import Engine
    from engine.training.ranks import in_seconds
    from engine.training.team import compute_as, follow

    compute_as(setup["arithmetic"])
    link.tell("imported")
    host, port = setup["store"]
    if setup["backend"] == "nccl":
        torch.cuda.set_device(rank)
    store = dist.TCPStore(host, port, world)  # type: ignore[attr-defined]
    dist.init_process_group(
        setup["backend"], store=store, rank=rank, world_size=world, timeout=in_seconds(setup["timeout"])
    )
    engine = Engine(setup["config"])
    follow(engine, setup["model"])
    return engine


def _call(engine: Engine, line: dict[str, Any], body: bytes) -> None:
    from engine.training.team import received

    if line["cwd"] != os.getcwd():
        os.chdir(line["cwd"])
    name, arguments = line["call"], line["arguments"]
    if line["share"]:
        engine._trainer.share()
    assert name in CALLS, name
    if name == "train_batch":
        arguments = {"batch": received(body)}
    getattr(engine, name)(**arguments)


if __name__ == "__main__":
    sys.exit(main())
