"""The job "generate": texts as they come, one prompt after the other."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from config_schema.job import GenerateJob
from engine.inference.generation import Logprob, Piece
from engine.jobs.console import Console, fit
from engine.jobs.files import Write, results
from engine.jobs.tables import WIDTH

if TYPE_CHECKING:
    from engine.engine import Engine


@dataclass
class Row:
    """One prompt and what has come after it."""

    asked: Mapping[str, Any]
    heading: str
    prompt: list[int]
    tokens: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        """Takes in one more token."""
        self.tokens.append(piece.token)
        self.texts.append(piece.text)
        if piece.logprob is not None:
            self.logprobs.append(piece.logprob)
        self.finish_reason = piece.finish_reason

    def record(self) -> dict[str, Any]:
        """The row as one line of the output."""
        record = {
            **self.asked,
            "text": "".join(self.texts),
            "token_ids": self.tokens,
            "prompt_tokens": len(self.prompt),
            "finish_reason": self.finish_reason,
        }
        if self.logprobs:
            record["logprobs"] = [{"token": p.token, "logprob": p.logprob, "top": p.top} for p in self.logprobs]
        return record


class Stopwatch:
    """Time to the first token, and tokens a second from there on."""

    def __init__(self) -> None:
        self.begun = time.perf_counter()
        self.first = self.last = self.begun
        self.tokens = self.firsts = 0

    def tick(self, *, first_of_row: bool) -> None:
        """One more token."""
        self.last = time.perf_counter()
        if not self.tokens:
            self.first = self.last
        self.tokens += 1
        self.firsts += first_of_row

    @property
    def rate(self) -> float:
        """Tokens a second behind the first of each prompt; of all where there are no others."""
        later = self.tokens - self.firsts
        seconds = self.last - (self.first if later else self.begun)
        return (later or self.tokens) / seconds if seconds > 0 else 0.0


def run(engine: Engine, job: GenerateJob, console: Console) -> None:
    """Generates for every prompt in batches; shows the texts in the order of the prompts."""
    rows = _rows(engine, job)
    read = sum(len(row.prompt) for row in rows)
    with results(job.output) as write:
        watch = Stopwatch()
        console.status(f"reading {read} prompt {_tokens(read)}")
        screen = _Screen(rows, console, write, stream=job.stream)
        for piece in engine.generate([row.prompt for row in rows], stream=True):
            watch.tick(first_of_row=not rows[piece.index].tokens)
            screen.push(piece)
            console.status(f"{watch.tokens} {_tokens(watch.tokens)}, {watch.rate:.1f} tokens/s{screen.progress}")
    counts = f"{read} prompt {_tokens(read)}, {watch.tokens} new {_tokens(watch.tokens)}"
    console.note(f"{counts}, {watch.first - watch.begun:.2f} s to the first, {watch.rate:.1f} tokens/s")


def _tokens(count: int) -> str:
    return "token" if count == 1 else "tokens"


def _rows(engine: Engine, job: GenerateJob) -> list[Row]:
    if job.messages is not None:
        messages = [message.model_dump() for message in job.messages]
        return [Row({"messages": messages}, messages[-1]["content"], engine.text.chat(messages))]
    assert job.prompts is not None
    return [Row({"prompt": prompt}, prompt, engine.text.encode(prompt)) for prompt in job.prompts]


class _Screen:
    """Shows rows that grow side by side one after the other: the first unfinished one live, others in their turn."""

    def __init__(self, rows: Sequence[Row], console: Console, write: Write, *, stream: bool) -> None:
        self._rows, self._console, self._write, self._stream = rows, console, write, stream
        self._at = -1
        self._open_next()

    @property
    def progress(self) -> str:
        """How many prompts are done, where there are several."""
        return f", {self._at} of {len(self._rows)} prompts done" if len(self._rows) > 1 else ""

    def push(self, piece: Piece) -> None:
        """Takes in one more token of one row."""
        self._rows[piece.index].add(piece)
        if piece.index != self._at:
            return
        if self._stream:
            self._console.write(piece.text)
        while self._at < len(self._rows) and self._rows[self._at].finish_reason is not None:
            self._close()
            self._open_next()

    def _open_next(self) -> None:
        self._at += 1
        if self._at == len(self._rows):
            return
        row = self._rows[self._at]
        if len(self._rows) > 1:
            self._console.line(fit(f"[{self._at + 1}/{len(self._rows)}] {row.heading}", WIDTH))
        if self._stream:
            self._console.write("".join(row.texts))

    def _close(self) -> None:
        row = self._rows[self._at]
        if not self._stream:
            self._console.write("".join(row.texts))
        self._console.end_line()
        if self._at + 1 < len(self._rows):
            self._console.line()
        self._write(row.record())
